// Attention on tensor cores with mma.sync (attention.cuh), forward: online softmax in registers
#pragma once
#include "mma_tiles.cuh"

namespace gpu {
namespace attn {

// s becomes exp2(c s - c max); the running maximum, sum and output follow. Sums are per lane, joined at the end.
template <int MT, int NT, int DT>
__device__ inline void online_softmax(float (&s)[MT][NT][4], float (&o)[MT][DT][4], float (&top)[MT][2], float (&sum)[MT][2], float c) {
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float now = top[m][half];
#pragma unroll
            for (int n = 0; n < NT; n++) now = fmaxf(now, fmaxf(s[m][n][half * 2], s[m][n][half * 2 + 1]));
            now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 1));
            now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 2));
            // Both products rounded: a maximum that stays must give 1 exactly, or a thousand tiles shrink what is there by 1e-4.
            const float base = now == -INFINITY ? 0.f : __fmul_rn(now, c);       // no key seen yet: keep -inf - -inf out
            const float shrink = exp2_fast(__fadd_rn(__fmul_rn(top[m][half], c), -base));
            top[m][half] = now;
            float total = sum[m][half] * shrink;
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int e = half * 2; e < half * 2 + 2; e++) total += s[m][n][e] = exp2_fast(fmaf(s[m][n][e], c, -base));
            sum[m][half] = total;
#pragma unroll
            for (int d = 0; d < DT; d++) {
                o[m][d][half * 2] *= shrink;
                o[m][d][half * 2 + 1] *= shrink;
            }
        }
}

template <int HD, int WARPS, int MT, int BN> constexpr int forward_shared() { return (WARPS * MT * 16 + 2 * BN) * HD * 2; }

// A block owns BM = 16 WARPS MT queries of one head. K and V have one buffer each: V loads during Q K^T, the next K during
// softmax and P V.
template <int HD, int WARPS, int MT, int BN, bool RING> __global__ void __launch_bounds__(WARPS* WARP, 2) forward_mma(const Args<bf16> a) {
    constexpr int BM = WARPS * MT * 16, ROW = HD * 2, THREADS = WARPS * WARP;
    const Work work = block_work(a.T, BM, a.H, true);
    const int b = work.b, h = work.head, g = h / (a.H / a.G), warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int i0 = work.tile * BM, first = a.first_key(b, i0) & -BN, last = (min(i0 + BM, a.T) - 1) & -BN;
    const int all = a.first_key(b, i0 + BM - 1);                     // every query of the tile sees the keys from here to i0
    const float c = rsqrtf((float)HD) * LOG2E;
    const uint32_t q_tile = shared_address(attention_shared), k_tile = q_tile + BM * ROW, v_tile = k_tile + BN * ROW;
    const uint32_t q_at = q_tile + warp * MT * 16 * ROW;
    const bf16* keys = lane_source<HD>(a.qkv + a.key(b, g), a.row());
    auto load_keys = [&](uint32_t tile, int n0, int value) {
        if (RING && n0 < 0) load_tile_ring<BN, HD, THREADS>(tile, a, b, g, n0, value);
        else load_tile<BN, HD, THREADS>(tile, keys + n0 * a.row() + value * HD, a.row(), a.T - n0);
        copy_async_commit();
    };
    float o[MT][HD / 8][4], top[MT][2], sum[MT][2];
    clear(o);
#pragma unroll
    for (int m = 0; m < MT; m++) top[m][0] = top[m][1] = -INFINITY, sum[m][0] = sum[m][1] = 0.f;

    load_tile<BM, HD, THREADS>(q_tile, lane_source<HD>(a.qkv + a.query(b, h) + i0 * a.row(), a.row()), a.row(), a.T - i0);
    load_keys(k_tile, last, 0);
    for (int n0 = last; n0 >= first; n0 -= BN) {                     // the diagonal first: from then on every maximum is finite
        copy_async_wait();
        __syncthreads();                                                // K is here; V's readers are done
        load_keys(v_tile, n0, 1);
        float s[MT][BN / 8][4];
        product_rows<HD>(s, q_at, k_tile);
        if (n0 + BN - 1 > i0 || n0 < all) mask_keys(s, a, b, warp * MT * 16 + lane / 4, i0, n0);
        copy_async_wait();
        __syncthreads();                                                // V is here; K's readers are done
        if (n0 > first) load_keys(k_tile, n0 - BN, 0);
        online_softmax(s, o, top, sum, c);
        uint32_t p[MT][BN / 16][4];
        pack_operand(p, s);
        product_columns<HD, HD>(o, p, v_tile);
    }

    const int row0 = i0 + warp * MT * 16;
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            sum[m][half] += __shfl_xor_sync(0xffffffffu, sum[m][half], 1);
            sum[m][half] += __shfl_xor_sync(0xffffffffu, sum[m][half], 2);
            const int i = row0 + m * 16 + half * 8 + lane / 4;
            if (lane % 4 == 0 && i < a.T) a.lse[a.stat(b, h) + i] = top[m][half] * rsqrtf((float)HD) + logf(sum[m][half]);
        }
    store_rows<HD>(a.out + a.output(b, h) + row0 * a.out_row(), a.out_row(), a.T - row0, o, attention_shared + warp * MT * 16 * ROW,
                   [&](int m, int half) { return 1.f / sum[m][half]; });
}

} // namespace attn
} // namespace gpu
