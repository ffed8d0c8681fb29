// What the two portable attention paths share (*_mma and *_plain of attention.cuh): which tile a block owns, and the statistics of backward.
#pragma once
#include "common.cuh"

namespace gpu {
namespace attn {

// Which tile (of `rows` rows) of which (b, head) this block owns. Heads one after the other, so that the blocks that run at a
// time share keys in L2; last_first: the tiles with the longest past first.
struct Work { int tile, b, head; };
__device__ inline Work block_work(int T, int rows, int heads, bool last_first) {
    const int tiles = (T + rows - 1) / rows, tile = blockIdx.x % tiles, owner = blockIdx.x / tiles;
    return {last_first ? tiles - 1 - tile : tile, owner / heads, owner % heads};
}

// lse2 = lse log2(e) and delta = dout . out per row, (B, H, T): eight lanes a row
template <class X> __global__ void backward_statistics(const Args<X> a) {
    constexpr int V = 16 / sizeof(X), LANES = 8;
    const int64_t item = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / LANES;          // (b, t, h)
    const bool real = item < (int64_t)a.B * a.T * a.H;                                      // all lanes stay for the shuffles
    float sum = 0.f;
    for (int d = threadIdx.x % LANES * V; real && d < a.hd; d += LANES * V) {
        const Vec<X, V> x = load_vec<V>(a.dout + item * a.hd + d), y = load_vec<V>(a.saved_out + item * a.hd + d);
#pragma unroll
        for (int i = 0; i < V; i++) sum += to_float(x[i]) * to_float(y[i]);
    }
#pragma unroll
    for (int o = LANES / 2; o > 0; o /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, o);
    if (!real || threadIdx.x % LANES != 0) return;
    const int64_t row = item / a.H, at = a.stat(row / a.T, item % a.H) + row % a.T;
    a.delta[at] = sum;
    a.lse2[at] = a.lse[at] * LOG2E;
}

} // namespace attn
} // namespace gpu
