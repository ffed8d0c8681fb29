// 4. Tensor cores. mma.sync multiplies 16 x 16 by 16 x 8 in bf16 and adds in fp32, the operands and sums spread over the 32 lanes of a warp:
// lane l has of the sums rows l/4 and l/4 + 8, columns 2 (l%4) and the next. Two facts make attention fit it:
//
//   - a row's scores lie in four neighbouring lanes, so its maximum and sum take two shuffles;
//   - the sums of S = Q K^T, rounded to bf16, are exactly the lane's part of the left operand of O += P V: no trip through memory.
//
// ldmatrix brings an operand from shared memory, four 8 x 8 matrices an instruction. Rows are 256 bytes, so the eight rows of one matrix
// would lie in the same banks: the 16-byte chunk c of row r is stored in place c ^ (r % 8).
//
// The pieces are those of kernels/attention/mma_tiles.cuh and attention/mma_forward.cuh: product_rows (S), online_softmax, product_columns (O),
// a warp's 32 queries each.
//
// What limits it: loads, products and exponentials take turns, each waits for the one before.
#include "../../../kernels/attention.cuh"
#include "problem.cuh"

namespace ladder_attention {

using namespace gpu::attn;
constexpr int WARPS = 4, BM = WARPS * 32, BN = 64, THREADS = WARPS * WARP, SHARED = (BM + BN) * HD * 2;

__global__ void __launch_bounds__(THREADS, 2) forward_kernel(const Problem p, bf16* out) {
    const int i0 = blockIdx.x * BM, h = blockIdx.y, b = blockIdx.z, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const uint32_t queries = shared_address(attention_shared), keys = queries + BM * HD * 2, mine = queries + warp * 32 * HD * 2;
    auto load = [&](uint32_t tile, auto rows, int t0, int part) {                     // rows past T become zeros
        load_tile<rows, HD, THREADS>(tile, lane_source<HD>(p.qkv + p.at(b, 0, h, part) + t0 * p.row(), p.row()), p.row(), p.T - t0);
        copy_async_commit();
        copy_async_wait();
        __syncthreads();
    };
    constexpr std::integral_constant<int, BM> query_rows;
    constexpr std::integral_constant<int, BN> key_rows;
    float o[2][HD / 8][4], top[2][2] = {{-INFINITY, -INFINITY}, {-INFINITY, -INFINITY}}, sum[2][2] = {};
    clear(o);
    load(queries, query_rows, i0, 0);
    for (int j0 = (min(i0 + BM, p.T) - 1) / BN * BN; j0 > p.first_key(i0) - BN && j0 >= 0; j0 -= BN) {
        float s[2][BN / 8][4];
        uint32_t weights[2][BN / 16][4];
        load(keys, key_rows, j0, 1);
        product_rows<HD>(s, mine, keys);
        mask(s, warp * 32 + lane / 4, [&](int r) { return p.first_key(i0 + r) - j0; }, [&](int r) { return i0 + r - j0; });
        __syncthreads();                                                              // all have read the keys
        load(keys, key_rows, j0, 2);                                                  // values, where the keys were
        online_softmax(s, o, top, sum, rsqrtf((float)HD) * gpu::attn::LOG2E);
        pack_operand(weights, s);
        product_columns<HD, HD>(o, weights, keys);
        __syncthreads();
    }
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {                                        // a lane has summed its own columns only
            sum[m][half] += __shfl_xor_sync(0xffffffffu, sum[m][half], 1);
            sum[m][half] += __shfl_xor_sync(0xffffffffu, sum[m][half], 2);
        }
    const int row0 = i0 + warp * 32;
    store_rows<HD>(out + p.out_at(b, 0, h) + (int64_t)row0 * p.H * HD, (int64_t)p.H * HD, p.T - row0, o, attention_shared + warp * 32 * HD * 2,
                   [&](int m, int half) { return 1.f / sum[m][half]; });
}

} // namespace ladder_attention

int main() {
    using namespace ladder_attention;
    return run("4 tensor cores", [](const Problem& p, bf16* out, float*) {
        CUDA_CHECK(cudaFuncSetAttribute(forward_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED));
        forward_kernel<<<dim3((unsigned)ceil_div(p.T, BM), p.H, p.B), THREADS, SHARED>>>(p, out);
        LAUNCH_CHECK();
    });
}
