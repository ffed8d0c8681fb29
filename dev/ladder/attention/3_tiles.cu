// 3. Tiles. 64 queries share every key that one of them loads: a block keeps its tile of queries in shared memory and brings the keys
// there 64 at a time. A thread makes 4 x 4 scores from 4 queries and 4 keys, so it reads 8 numbers for 16 multiply-adds. The softmax goes on
// tile by tile: the maximum of a row over its 64 new scores, one correction of the sums, 64 exponentials.
//
// Tiles that no query of the block sees are never visited: the loop runs over the window only.
//
// What limits it: arithmetic in fp32 lanes, 128 multiply-adds a clock and multiprocessor. The tensor cores beside them do 2,048.
#include "problem.cuh"

namespace ladder_attention {

constexpr int TILE = 64, THREADS = 256, ROW = HD + 4;                                 // ROW: 16 neighbouring rows hit different banks

__device__ inline void load_tile(float* tile, const Problem& p, int b, int t0, int h, int part) {
    for (int i = threadIdx.x; i < TILE * HD / 4; i += THREADS) {
        const int r = i / (HD / 4), d = i % (HD / 4) * 4, t = min(t0 + r, p.T - 1);
        const auto x = load_vec<4>(p.qkv + p.at(b, t, h, part) + d);
#pragma unroll
        for (int e = 0; e < 4; e++) tile[r * ROW + d + e] = to_float(x[e]);
    }
}
// Over the 16 lanes that have a row's scores
template <class F> __device__ inline float reduce16(float x, F f) {
#pragma unroll
    for (int o = 8; o > 0; o /= 2) x = f(x, __shfl_xor_sync(0xffffffffu, x, o));
    return x;
}

// Thread (y, x) of 16 x 16: rows y + 16 r of the queries; keys x + 16 c, or dimensions 8 x .. 8 x + 7
__global__ void __launch_bounds__(THREADS) forward_kernel(const Problem p, bf16* out) {
    extern __shared__ float shared[];
    float *queries = shared, *keys = queries + TILE * ROW, *weights = keys + TILE * ROW;
    const int i0 = blockIdx.x * TILE, h = blockIdx.y, b = blockIdx.z, y = threadIdx.x / 16, x = threadIdx.x % 16;
    float o[4][8] = {}, top[4], sum[4] = {};
    for (int r = 0; r < 4; r++) top[r] = -INFINITY;
    load_tile(queries, p, b, i0, h, 0);
    for (int j0 = i0; j0 > p.first_key(i0) - TILE; j0 -= TILE) {                      // the diagonal first: every row has a key there
        __syncthreads();
        load_tile(keys, p, b, j0, h, 1);
        __syncthreads();
        float s[4][4] = {};
        for (int d = 0; d < HD; d++)
#pragma unroll
            for (int r = 0; r < 4; r++)
#pragma unroll
                for (int c = 0; c < 4; c++) s[r][c] = fmaf(queries[(y + 16 * r) * ROW + d], keys[(x + 16 * c) * ROW + d], s[r][c]);
        __syncthreads();
        load_tile(keys, p, b, j0, h, 2);                                      // values, where the keys were
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const int i = i0 + y + 16 * r;
            float now = top[r], total = 0.f;
#pragma unroll
            for (int c = 0; c < 4; c++) {
                const int j = j0 + x + 16 * c;
                s[r][c] = j >= p.first_key(i) && j <= i ? s[r][c] * rsqrtf((float)HD) : -INFINITY;
                now = fmaxf(now, s[r][c]);
            }
            now = reduce16(now, [](float a, float b) { return fmaxf(a, b); });
            const float shrink = __expf(top[r] - now);
#pragma unroll
            for (int c = 0; c < 4; c++) total += weights[(y + 16 * r) * (TILE + 1) + x + 16 * c] = __expf(s[r][c] - now);
            top[r] = now, sum[r] = sum[r] * shrink + reduce16(total, [](float a, float b) { return a + b; });
#pragma unroll
            for (int d = 0; d < 8; d++) o[r][d] *= shrink;
        }
        __syncthreads();
        for (int j = 0; j < TILE; j++)
#pragma unroll
            for (int r = 0; r < 4; r++)
#pragma unroll
                for (int d = 0; d < 8; d++) o[r][d] = fmaf(weights[(y + 16 * r) * (TILE + 1) + j], keys[j * ROW + x * 8 + d], o[r][d]);
    }
#pragma unroll
    for (int r = 0; r < 4; r++)
        if (i0 + y + 16 * r < p.T)
#pragma unroll
            for (int d = 0; d < 8; d++) out[p.out_at(b, i0 + y + 16 * r, h) + x * 8 + d] = from_float<bf16>(o[r][d] / sum[r]);
}

} // namespace ladder_attention

int main() {
    using namespace ladder_attention;
    return run("3 tiles in shared memory", [](const Problem& p, bf16* out, float*) {
        const int bytes = (2 * TILE * ROW + TILE * (TILE + 1)) * sizeof(float);
        CUDA_CHECK(cudaFuncSetAttribute(forward_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
        forward_kernel<<<dim3((unsigned)ceil_div(p.T, TILE), p.H, p.B), THREADS, bytes>>>(p, out);
        LAUNCH_CHECK();
    }, 3);
}
