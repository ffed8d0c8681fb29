// 6. Hopper's way: one thread asks for a tile, one warpgroup multiplies it.
//
//   - TMA: a map describes qkv as a tensor (B,T,heads,HD); one instruction of one thread brings a box of it (rows past T become zeros), in the
//     pattern that the tensor cores want, and counts its bytes into an mbarrier, on which readers wait. No addresses, no predicates.
//   - wgmma: 128 threads multiply 64 x 16 by 16 x 128. Operands come from shared memory by themselves, named by 64-bit descriptors; the
//     left one may be registers: P again never leaves them. It runs in the background until somebody waits.
//
// The pieces are those of kernels/attention_sm90.cuh: load_tile, issue_rows (S), raise_bases and make_terms (P), issue_columns (O).
//
// What limits it: turns again. The tensor cores idle during the loads and the softmax; only the blocks beside each other on a
// multiprocessor overlap, by chance.
#include "../../../kernels/attention_sm90.cuh"
#include "problem.cuh"

namespace ladder_attention {

using namespace gpu::sm90;
constexpr int QUERIES = 64, KEYS = 128, Q_BYTES = QUERIES * HD * 2, K_BYTES = KEYS * HD * 2, SHARED = Q_BYTES + 2 * K_BYTES + 8;

__global__ void __launch_bounds__(WARPGROUP) forward_kernel(const __grid_constant__ CUtensorMap map, const ladder_attention::Problem p, bf16* out) {
#ifdef SAMBA_SM90A_CODE
    const int i0 = blockIdx.x * QUERIES, h = blockIdx.y, b = blockIdx.z;
    const int i = i0 + threadIdx.x / WARP * 16 + threadIdx.x % WARP / 4;              // i, i + 8: our rows
    const uint32_t queries = shared_address(sm90_shared), keys = queries + Q_BYTES, values = keys + K_BYTES, bar = values + K_BYTES;
    if (threadIdx.x == 0) barrier_init(bar, 1), barrier_init_done();
    __syncthreads();
    const float c = rsqrtf((float)HD) * gpu::attn::LOG2E;
    float s[KEYS / 2], o[HD / 2] = {}, shrink[2];
    uint32_t weights[KEYS / 16][4];
    Statistics stat;
    for (int j0 = i0 / KEYS * KEYS, turn = 0; j0 > p.first_key(i0) - KEYS; j0 -= KEYS, turn++) {
        if (threadIdx.x == 0) {
            barrier_expect(bar, 2 * K_BYTES + (turn == 0 ? Q_BYTES : 0));
            if (turn == 0) gpu::sm90::load_tile<HD, QUERIES, QUERIES>(queries, bar, &map, h * 3, i0, b);
            gpu::sm90::load_tile<HD, KEYS, QUERIES>(keys, bar, &map, h * 3 + 1, j0, b);
            gpu::sm90::load_tile<HD, KEYS, QUERIES>(values, bar, &map, h * 3 + 2, j0, b);
        }
        barrier_wait(bar, turn % 2);
        issue_rows<HD, QUERIES, KEYS>(s, queries, keys);
        wgmma_wait<0>();
        hold(s);
        for (int part = 0; part < KEYS; part += 64) {
            const int from[2] = {p.first_key(i) - j0 - part, p.first_key(i + 8) - j0 - part}, to[2] = {i - j0 - part, i + 8 - j0 - part};
            gpu::sm90::mask(s + part / 2, from, to);
        }
        if (raise_bases(s, stat, shrink, c)) rescale(o, shrink);
        make_terms(s, stat, c);
        pack_operand(weights, s);
        issue_columns<KEYS>(o, weights, values);
        wgmma_wait<0>();
        hold(o);
        __syncthreads();                                                              // all have read keys and values
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float sum = stat.sum[half];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (i + half * 8 >= p.T) continue;
        uint32_t* to = reinterpret_cast<uint32_t*>(out + p.out_at(b, i + half * 8, h)) + threadIdx.x % 4;
#pragma unroll
        for (int n = 0; n < HD / 8; n++) to[n * 4] = pack(o[n * 4 + half * 2] / sum, o[n * 4 + half * 2 + 1] / sum);
    }
#endif
}

} // namespace ladder_attention

int main() {
    using namespace ladder_attention;
    const char* name = "6 wgmma and TMA, one warpgroup";
    if (device_count() > 0 && !usable()) return printf("%s: needs compute capability 9.0 and code for sm_90a\n", name), 0;
    return run(name, [](const ladder_attention::Problem& p, bf16* out, float*) {
        CUDA_CHECK(cudaFuncSetAttribute(forward_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED));
        const CUtensorMap map = tensor_map(p.qkv, p.B, p.T, 3 * p.H, HD, QUERIES);
        forward_kernel<<<dim3((unsigned)ceil_div(p.T, QUERIES), p.H, p.B), WARPGROUP, SHARED>>>(map, p, out);
        LAUNCH_CHECK();
    });
}
