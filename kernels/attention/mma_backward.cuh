// Attention on tensor cores with mma.sync (attention.cuh), backward: dk and dv by blocks that own keys; dq from the dS which these keep,
// or from one made again, by blocks that own queries
#pragma once
#include <algorithm>

#include "mma_tiles.cuh"

namespace gpu {
namespace attn {

// s: scores in, P out. dp: dP in, dS = P (dP - delta) out. lse2(m, n, e), delta(m, n, e): those of element s[m][n][e]'s query
template <int MT, int NT, class F> __device__ inline void probabilities(float (&s)[MT][NT][4], float c, F lse2) {
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) s[m][n][e] = exp2_fast(fmaf(s[m][n][e], c, -lse2(m, n, e)));
}
template <int MT, int NT, class F> __device__ inline void score_gradients(float (&dp)[MT][NT][4], const float (&p)[MT][NT][4], F delta) {
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) dp[m][n][e] = p[m][n][e] * (dp[m][n][e] - delta(m, n, e));
}

template <int HD, int WARPS, int MT, int BM> constexpr int backward_keys_shared() { return (2 * WARPS * MT * 16 + 4 * BM) * HD * 2 + 4 * BM * 4; }

// Queries i0 .. i0 + BM - 1 of a head, their dout and their statistics into a stage; one group of copies
template <int HD, int BM, int THREADS>
__device__ inline void load_query_stage(const Args<bf16>& a, int b, int h, int i0, uint32_t stages, float* statistics, int stage) {
    constexpr int TILE = BM * HD * 2;
    const int t = threadIdx.x;
    const bf16 *queries = a.qkv + a.query(b, h) + i0 * a.row(), *douts = a.dout + a.output(b, h) + i0 * a.out_row();
    load_tile<BM, HD, THREADS>(stages + stage * 2 * TILE, lane_source<HD>(queries, a.row()), a.row(), a.T - i0);
    load_tile<BM, HD, THREADS>(stages + stage * 2 * TILE + TILE, lane_source<HD>(douts, a.out_row()), a.out_row(), a.T - i0);
    if (t < 2 * BM) {                                                   // rows past T get zeros, and so add nothing
        const bool real = i0 + t % BM < a.T;
        copy_async<4>(shared_address(statistics + stage * 2 * BM + t), (t < BM ? a.lse2 : a.delta) + a.stat(b, h) + (real ? i0 + t % BM : 0), real);
    }
    copy_async_commit();
}

// dS of a warp's 16 MT keys from `key` on and BM queries from i0 on (multiples of 32) to memory, for dq: as far as its blocks are kept
template <int MT, int KT> __device__ inline void keep(const Args<bf16>& a, int owner, int key, int i0, const uint32_t (&ds)[MT][KT][4]) {
    const int query_block = i0 / DS_EDGE, key_block = key / DS_EDGE, difference = query_block - key_block;
    if (!a.ds || difference < 0 || difference >= ds_bands(a.T, a.window) || query_block * DS_EDGE >= a.T) return;
    bf16* block = a.ds + ds_block(owner, query_block, key_block, a.T, a.window);
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int k = 0; k < KT; k += 2)                             // 32 queries each
                ds_store(block, key % DS_EDGE + m * 16 + half * 8 + threadIdx.x % WARP / 4, i0 / 32 % 2 + k / 2, ds[m][k][half], ds[m][k][2 + half],
                         ds[m][k + 1][half], ds[m][k + 1][2 + half]);
}

// The last tile of BM queries for keys up to p: the last that sees one, and to the end of its block of dS
template <int BM> __device__ inline int last_step(const Args<bf16>& a, int b, int p) { return min(a.T - 1, a.last_query(b, p) | (DS_EDGE - 1)) / BM; }

// A block owns BN = 16 WARPS MT keys of one group and goes over the group's query heads and their tiles of BM queries. Scores
// are formed transposed (keys as rows), so that P^T and dS^T are register operands. DK, DV: which of the two to compute;
// head_dim 256 needs a launch for each, its sums fill the registers.
template <int HD, int WARPS, int MT, int BM, bool DK, bool DV> __global__ void __launch_bounds__(WARPS* WARP) backward_keys_mma(const Args<bf16> a) {
    constexpr int BN = WARPS * MT * 16, ROW = HD * 2, THREADS = WARPS * WARP, STAGE = 2 * BM * ROW;
    static_assert(2 * BM <= THREADS);
    const Work work = block_work(a.T, BN, a.G, false);
    const int b = work.b, g = work.head, heads = a.H / a.G, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int n0 = work.tile * BN, first = n0 / BM, last = last_step<BM>(a, b, n0 + BN - 1);
    const int count = last - first + 1, steps = heads * count, all = a.last_query(b, n0);              // every key is seen up to `all`
    const float scale = rsqrtf((float)HD), c = scale * LOG2E;
    const uint32_t k_tile = shared_address(attention_shared), v_tile = k_tile + BN * ROW, stages = v_tile + BN * ROW;
    float* statistics = reinterpret_cast<float*>(attention_shared + 2 * BN * ROW + 2 * STAGE);         // (2 stages, lse2 | delta, BM)
    auto load_queries = [&](int step) {
        load_query_stage<HD, BM, THREADS>(a, b, g * heads + step / count, (first + step % count) * BM, stages, statistics, step % 2);
    };
    float dk[MT][HD / 8][4], dv[MT][HD / 8][4];
    if (DK) clear(dk);
    if (DV) clear(dv);
    const bf16* keys = lane_source<HD>(a.qkv + a.key(b, g) + n0 * a.row(), a.row());
    load_tile<BN, HD, THREADS>(k_tile, keys, a.row(), a.T - n0);
    if (DK) load_tile<BN, HD, THREADS>(v_tile, keys + HD, a.row(), a.T - n0);
    load_queries(0);
    for (int step = 0; step < steps; step++) {
        copy_async_wait();
        __syncthreads();                                                // this stage is here; the other one's readers are done
        if (step + 1 < steps) load_queries(step + 1);
        const int i0 = (first + step % count) * BM;
        const uint32_t q_tile = stages + step % 2 * STAGE, do_tile = q_tile + BM * ROW;
        const float *lse2 = statistics + step % 2 * 2 * BM + lane % 4 * 2, *delta = lse2 + BM;
        float s[MT][BM / 8][4];
        uint32_t operand[MT][BM / 16][4];
        product_rows<HD>(s, k_tile + warp * MT * 16 * ROW, q_tile);
        if (i0 < n0 + BN - 1 || i0 + BM - 1 > all) mask_queries(s, a, b, warp * MT * 16 + lane / 4, n0, i0);
        probabilities(s, c, [&](int, int n, int e) { return lse2[n * 8 + e % 2]; });
        if (DV) {
            pack_operand(operand, s);
            product_columns<HD, HD>(dv, operand, do_tile);
        }
        if (DK) {
            float dp[MT][BM / 8][4];
            product_rows<HD>(dp, v_tile + warp * MT * 16 * ROW, do_tile);
            score_gradients(dp, s, [&](int, int n, int e) { return delta[n * 8 + e % 2]; });
            pack_operand(operand, dp);
            keep(a, b * a.H + g * heads + step / count, n0 + warp * MT * 16, i0, operand);
            product_columns<HD, HD>(dk, operand, q_tile);
        }
    }
    const int row0 = n0 + warp * MT * 16;
    unsigned char* rows = attention_shared + warp * MT * 16 * ROW;      // the warp's own rows of the key tile
    if (DK) store_rows<HD>(a.dqkv + a.key(b, g) + row0 * a.row(), a.row(), a.T - row0, dk, rows, [&](int, int) { return scale; });
    if (DV) store_rows<HD>(a.dqkv + a.value(b, g) + row0 * a.row(), a.row(), a.T - row0, dv, rows, [&](int, int) { return 1.f; });
}

// The same with two warps for each 32 keys: each forms P^T and dS^T for 32 of the 64 queries, they exchange these, and each sums
// half of the columns of dk and dv. Less is read from shared memory per product (tiles of 32 x 32 and 32 x 64 instead of 16 x 64
// and 16 x 128), which is what bounds the kernel above at one block per SM.
constexpr int PAIRS = 4, PAIR_KEYS = 32, PAIR_QUERIES = 64, PAIR_PART = 2 * 2 * WARP * 16;             // bytes a warp hands over
template <int HD> constexpr int backward_pairs_shared() {
    return (2 * PAIRS * PAIR_KEYS + 4 * PAIR_QUERIES) * HD * 2 + 4 * PAIR_QUERIES * 4 + 2 * 2 * PAIRS * PAIR_PART;
}
__device__ inline void pair_sync(int pair) { asm volatile("bar.sync %0, 64;" ::"r"(1 + pair) : "memory"); }
__device__ inline void pair_write(uint4* part, const uint32_t (&p)[2][2][4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint32_t(&v)[4] = p[i / 2][i % 2];
        part[i * WARP + threadIdx.x % WARP] = make_uint4(v[0], v[1], v[2], v[3]);
    }
}
__device__ inline void pair_read(uint32_t (&p)[2][2][4], const uint4* part) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint4 v = part[i * WARP + threadIdx.x % WARP];
        p[i / 2][i % 2][0] = v.x, p[i / 2][i % 2][1] = v.y, p[i / 2][i % 2][2] = v.z, p[i / 2][i % 2][3] = v.w;
    }
}
// c (32, HD / 2) += operand b over all 64 queries: our 32 from registers, the other warp's by way of parts
template <int HD>
__device__ inline void pair_product(float (&c)[2][HD / 16][4], uint32_t (&operand)[2][2][4], uint32_t b_tile, uint4* parts, int pair, int side) {
    constexpr int HALF_TILE = PAIR_QUERIES / 2 * HD * 2, WORDS = PAIR_PART / 16;
    pair_write(parts + side * WORDS, operand);
    product_columns<HD, HD / 2>(c, operand, b_tile + side * HALF_TILE);
    pair_sync(pair);
    pair_read(operand, parts + (1 - side) * WORDS);
    product_columns<HD, HD / 2>(c, operand, b_tile + (1 - side) * HALF_TILE);
}

template <int HD> __global__ void __launch_bounds__(2 * PAIRS * WARP) backward_pairs_mma(const Args<bf16> a) {
    constexpr int BN = PAIRS * PAIR_KEYS, BM = PAIR_QUERIES, ROW = HD * 2, THREADS = 2 * PAIRS * WARP, STAGE = 2 * BM * ROW;
    static_assert(HD == 128, "a warp's half of the columns is 64: a whole number of swizzle periods");
    const Work work = block_work(a.T, BN, a.G, false);
    const int b = work.b, g = work.head, heads = a.H / a.G;
    const int lane = threadIdx.x % WARP, side = threadIdx.x / WARP % 2, pair = threadIdx.x / (2 * WARP);
    const int n0 = work.tile * BN, first = n0 / BM, last = last_step<BM>(a, b, n0 + BN - 1);
    const int count = last - first + 1, steps = heads * count, all = a.last_query(b, n0);              // every key is seen up to `all`
    const float scale = rsqrtf((float)HD), c = scale * LOG2E;
    const uint32_t k_tile = shared_address(attention_shared), v_tile = k_tile + BN * ROW, stages = v_tile + BN * ROW;
    const uint32_t k_at = k_tile + pair * PAIR_KEYS * ROW, v_at = k_at + BN * ROW;
    float* statistics = reinterpret_cast<float*>(attention_shared + 2 * BN * ROW + 2 * STAGE);         // (2 stages, lse2 | delta, BM)
    uint4* parts = reinterpret_cast<uint4*>(attention_shared + 2 * BN * ROW + 2 * STAGE + 4 * BM * 4) + pair * 2 * (PAIR_PART / 16);
    uint4* gradient_parts = parts + 2 * PAIRS * (PAIR_PART / 16);
    auto load_queries = [&](int step) {
        load_query_stage<HD, BM, THREADS>(a, b, g * heads + step / count, (first + step % count) * BM, stages, statistics, step % 2);
    };
    float dk[2][HD / 16][4], dv[2][HD / 16][4];
    clear(dk);
    clear(dv);
    const bf16* keys = lane_source<HD>(a.qkv + a.key(b, g) + n0 * a.row(), a.row());
    load_tile<BN, HD, THREADS>(k_tile, keys, a.row(), a.T - n0);
    load_tile<BN, HD, THREADS>(v_tile, keys + HD, a.row(), a.T - n0);
    load_queries(0);
    for (int step = 0; step < steps; step++) {
        copy_async_wait();
        __syncthreads();                                                // this stage is here; the other one's readers are done
        if (step + 1 < steps) load_queries(step + 1);
        const int i0 = (first + step % count) * BM + side * 32;         // of this warp's queries
        const uint32_t q_tile = stages + step % 2 * STAGE, do_tile = q_tile + BM * ROW;
        const float *lse2 = statistics + step % 2 * 2 * BM + side * 32 + lane % 4 * 2, *delta = lse2 + BM;
        float s[2][4][4], dp[2][4][4];
        uint32_t operand[2][2][4];
        product_rows<HD>(s, k_at, q_tile + side * 32 * ROW);
        if (i0 < n0 + BN - 1 || i0 + 31 > all) mask_queries(s, a, b, pair * PAIR_KEYS + lane / 4, n0, i0);
        probabilities(s, c, [&](int, int n, int e) { return lse2[n * 8 + e % 2]; });
        pack_operand(operand, s);
        pair_product<HD>(dv, operand, do_tile + side * 128, parts, pair, side);                        // + 128 bytes: our columns
        product_rows<HD>(dp, v_at, do_tile + side * 32 * ROW);
        score_gradients(dp, s, [&](int, int n, int e) { return delta[n * 8 + e % 2]; });
        pack_operand(operand, dp);
        keep(a, b * a.H + g * heads + step / count, n0 + pair * PAIR_KEYS, i0, operand);
        pair_product<HD>(dk, operand, q_tile + side * 128, gradient_parts, pair, side);
    }
    const int row0 = n0 + pair * PAIR_KEYS;
    __syncthreads();                                                    // the tiles' readers are done
    unsigned char* rows = attention_shared + (pair * 2 + side) * PAIR_KEYS * HD;                       // half rows of this warp
    bf16* out = a.dqkv + a.key(b, g) + row0 * a.row() + side * HD / 2;
    store_rows<HD / 2, 2>(out, a.row(), a.T - row0, dk, rows, [&](int, int) { return scale; });
    store_rows<HD / 2, 2>(out + HD, a.row(), a.T - row0, dv, rows, [&](int, int) { return 1.f; });
}

template <int HD, int WARPS, int MT, int BN> constexpr int backward_queries_shared() { return (2 * WARPS * MT * 16 + 4 * BN) * HD * 2; }

// dq with S and dP made again: a block owns BM = 16 WARPS MT queries of one head and goes over the key tiles of their window, two in flight.
template <int HD, int WARPS, int MT, int BN, bool RING> __global__ void __launch_bounds__(WARPS* WARP) backward_queries_mma(const Args<bf16> a) {
    constexpr int BM = WARPS * MT * 16, ROW = HD * 2, THREADS = WARPS * WARP, STAGE = 2 * BN * ROW;
    const Work work = block_work(a.T, BM, a.H, true);
    const int b = work.b, h = work.head, g = h / (a.H / a.G), warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int i0 = work.tile * BM, row0 = i0 + warp * MT * 16;
    const int first = a.first_key(b, i0) & -BN, last = (min(i0 + BM, a.T) - 1) & -BN;
    const int all = a.first_key(b, i0 + BM - 1);                        // every query of the tile sees the keys from here to i0
    const float scale = rsqrtf((float)HD), c = scale * LOG2E;
    const uint32_t q_tile = shared_address(attention_shared), do_tile = q_tile + BM * ROW, stages = do_tile + BM * ROW;
    const uint32_t q_at = q_tile + warp * MT * 16 * ROW, do_at = q_at + BM * ROW;
    const bf16* keys = lane_source<HD>(a.qkv + a.key(b, g), a.row());
    auto load_keys = [&](int n0) {
        const uint32_t tile = stages + (n0 / BN & 1) * STAGE;
        if (RING && n0 < 0) {
            load_tile_ring<BN, HD, THREADS>(tile, a, b, g, n0, 0);
            load_tile_ring<BN, HD, THREADS>(tile + BN * ROW, a, b, g, n0, 1);
        } else {
            load_tile<BN, HD, THREADS>(tile, keys + n0 * a.row(), a.row(), a.T - n0);
            load_tile<BN, HD, THREADS>(tile + BN * ROW, keys + n0 * a.row() + HD, a.row(), a.T - n0);
        }
        copy_async_commit();
    };
    float dq[MT][HD / 8][4], lse2[MT][2], delta[MT][2];
    clear(dq);
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int i = row0 + m * 16 + half * 8 + lane / 4;
            lse2[m][half] = i < a.T ? a.lse2[a.stat(b, h) + i] : 0.f;
            delta[m][half] = i < a.T ? a.delta[a.stat(b, h) + i] : 0.f;
        }
    load_tile<BM, HD, THREADS>(q_tile, lane_source<HD>(a.qkv + a.query(b, h) + i0 * a.row(), a.row()), a.row(), a.T - i0);
    load_tile<BM, HD, THREADS>(do_tile, lane_source<HD>(a.dout + a.output(b, h) + i0 * a.out_row(), a.out_row()), a.out_row(), a.T - i0);
    load_keys(first);
    for (int n0 = first; n0 <= last; n0 += BN) {
        copy_async_wait();
        __syncthreads();
        if (n0 < last) load_keys(n0 + BN);
        const uint32_t k_tile = stages + (n0 / BN & 1) * STAGE, v_tile = k_tile + BN * ROW;
        float s[MT][BN / 8][4], dp[MT][BN / 8][4];
        product_rows<HD>(s, q_at, k_tile);
        if (n0 + BN - 1 > i0 || n0 < all) mask_keys(s, a, b, warp * MT * 16 + lane / 4, i0, n0);
        probabilities(s, c, [&](int m, int, int e) { return lse2[m][e / 2]; });
        product_rows<HD>(dp, do_at, v_tile);
        score_gradients(dp, s, [&](int m, int, int e) { return delta[m][e / 2]; });
        uint32_t operand[MT][BN / 16][4];
        pack_operand(operand, dp);
        product_columns<HD, HD>(dq, operand, k_tile);
    }
    store_rows<HD>(a.dqkv + a.query(b, h) + row0 * a.row(), a.row(), a.T - row0, dq, attention_shared + warp * MT * 16 * ROW,
                   [&](int, int) { return scale; });
}

// dq = dS K from the blocks that the kernels of dk and dv kept. A warp owns 32 queries and up to 128 columns; a step is 64 keys: their
// tile and a block of dS for every 64 queries, STAGES of them on their way. Bound by reading dS: 8 KB for 4,096 hd multiply-adds.
constexpr int PRODUCT_WARPS = 4, PRODUCT_STAGES = 3;
template <int HD> constexpr int PRODUCT_ROWS = HD == 256 ? 64 : 128;
template <int HD> constexpr int product_stage() { return DS_EDGE * HD * 2 + PRODUCT_ROWS<HD> * DS_EDGE * 2; }
template <int HD> constexpr int backward_product_shared() { return (HD == 256 ? 2 : PRODUCT_STAGES) * product_stage<HD>(); }

template <int HD> __global__ void __launch_bounds__(PRODUCT_WARPS* WARP, 2) backward_product_mma(const Args<bf16> a) {
    constexpr int BM = PRODUCT_ROWS<HD>, BN = DS_EDGE, THREADS = PRODUCT_WARPS * WARP, STAGE = product_stage<HD>(), K_BYTES = BN * HD * 2;
    constexpr int STAGES = backward_product_shared<HD>() / STAGE, COLUMNS = BM * HD / (PRODUCT_WARPS * 32), MT = 2;
    const Work work = block_work(a.T, BM, a.H, true);
    const int b = work.b, h = work.head, g = h / (a.H / a.G), warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int i0 = work.tile * BM, row0 = warp * 32 % BM, column0 = warp * 32 / BM * COLUMNS;           // this warp's part of dq
    const int first = a.first_key(b, i0) / BN, last = (min(i0 + BM, a.T) - 1) / BN;
    const uint32_t stages = shared_address(attention_shared);
    const bf16* keys = lane_source<HD>(a.qkv + a.key(b, g), a.row());
    auto load = [&](int n) {                                            // block of keys n; one group of copies even if there is none
        const uint32_t stage = stages + n % STAGES * STAGE;
        if (n <= last) {
            load_tile<BN, HD, THREADS>(stage, keys + (int64_t)n * BN * a.row(), a.row(), a.T - n * BN);
#pragma unroll
            for (int q = 0; q < BM / DS_EDGE; q++) {                    // before the first key of the block's queries nothing was kept: zeros
                const int i = i0 + q * DS_EDGE;
                const bool kept = i < a.T && n <= i / DS_EDGE && n >= a.first_key(b, i) / BN;
                const bf16* from = a.ds + (kept ? ds_block(b * a.H + h, i / DS_EDGE, n, a.T, a.window) : 0) + threadIdx.x * 8;
#pragma unroll
                for (int part = 0; part < DS_BLOCK / (THREADS * 8); part++)
                    copy_async<16>(stage + K_BYTES + q * DS_BLOCK * 2 + (part * THREADS + threadIdx.x) * 16, from + part * THREADS * 8, kept);
            }
        }
        copy_async_commit();
    };
    float dq[MT][COLUMNS / 8][4];
    clear(dq);
    for (int n = first; n < first + STAGES - 1; n++) load(n);
    for (int n = first; n <= last; n++) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();                                                // this stage is here; the last one's readers are done
        load(n + STAGES - 1);
        const uint32_t k_tile = stages + n % STAGES * STAGE, ds_tile = k_tile + K_BYTES + row0 / DS_EDGE * DS_BLOCK * 2;
        uint32_t operand[MT][BN / 16][4];                               // rows are queries: the block's columns, hence transposed
        const int key = lane % 8 + lane / 16 * 8, chunk = row0 % DS_EDGE / 8 + lane / 8 % 2;
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int k = 0; k < BN / 16; k++)
                load_matrices_transposed(operand[m][k], ds_tile + (k * 16 + key) * 128 + ((chunk + m * 2) ^ (key % 8)) * 16);
        product_columns<HD, COLUMNS>(dq, operand, k_tile + column0 * 2);
    }
    copy_async_wait();
    __syncthreads();
    const float scale = rsqrtf((float)HD);
    bf16* to = a.dqkv + a.query(b, h) + (int64_t)(i0 + row0) * a.row() + column0;
    store_rows<COLUMNS>(to, a.row(), a.T - i0 - row0, dq, attention_shared + warp * 32 * COLUMNS * 2, [&](int, int) { return scale; },
                        [&](int r) { return ds_query(row0 % DS_EDGE + r) - row0 % DS_EDGE; });
}

} // namespace attn
} // namespace gpu
