// 2. Online softmax. The sum over all keys is needed before the first weight is known, and keeping T scores a query means a matrix of
// (T,T) in memory. But the sums so far can be corrected when a larger score comes: with m the largest score yet,
//
//     m' = max(m, s),   sum' = sum exp(m - m') + exp(s - m'),   o' = o exp(m - m') + exp(s - m') v
//
// so one pass over the keys is enough, nothing is stored, and no exponential overflows. Four lanes a query, 32 dimensions each, in
// registers; the 32 queries of a block read the same keys.
//
// What limits it: every query reads every key from the cache for itself, 512 bytes for 512 operations.
#include "problem.cuh"

namespace ladder_attention {

constexpr int LANES = 4, PART = HD / LANES, QUERIES = 32;

__device__ inline void load_part(float (&x)[PART], const bf16* from) {
#pragma unroll
    for (int d = 0; d < PART; d += 8) {
        const auto v = load_vec<8>(from + d);
#pragma unroll
        for (int e = 0; e < 8; e++) x[d + e] = to_float(v[e]);
    }
}

__global__ void forward_kernel(const Problem p, bf16* out) {
    const int h = blockIdx.y, b = blockIdx.z, first = blockIdx.x * QUERIES, i = min(first + (int)threadIdx.x / LANES, p.T - 1);
    const int d0 = threadIdx.x % LANES * PART;
    float q[PART], k[PART], v[PART], o[PART] = {}, top = -INFINITY, sum = 0.f;
    load_part(q, p.qkv + p.at(b, i, h, 0) + d0);
    for (int j = p.first_key(first); j < min(first + QUERIES, p.T); j++) {            // all keys that one of the block's queries sees
        load_part(k, p.qkv + p.at(b, j, h, 1) + d0);
        load_part(v, p.qkv + p.at(b, j, h, 2) + d0);
        float s = 0.f;
#pragma unroll
        for (int d = 0; d < PART; d++) s = fmaf(q[d], k[d], s);
        s += __shfl_xor_sync(0xffffffffu, s, 1);
        s += __shfl_xor_sync(0xffffffffu, s, 2);
        s *= rsqrtf((float)HD);
        if (j < p.first_key(i) || j > i) continue;
        const float now = fmaxf(top, s), shrink = __expf(top - now), weight = __expf(s - now);
        top = now, sum = sum * shrink + weight;
#pragma unroll
        for (int d = 0; d < PART; d++) o[d] = fmaf(weight, v[d], o[d] * shrink);
    }
#pragma unroll
    for (int d = 0; d < PART; d++) out[p.out_at(b, i, h) + d0 + d] = from_float<bf16>(o[d] / sum);
}

} // namespace ladder_attention

int main() {
    using namespace ladder_attention;
    return run("2 online softmax, four lanes a query", [](const Problem& p, bf16* out, float*) {
        forward_kernel<<<dim3((unsigned)ceil_div(p.T, QUERIES), p.H, p.B), QUERIES * LANES>>>(p, out);
        LAUNCH_CHECK();
    }, 3);
}
