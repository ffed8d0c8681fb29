// Causal sliding-window attention with grouped heads (MHA, GQA, MQA), forward and deterministic backward.
// Formula, shapes, the ring of earlier keys and document starts: kernels/cpu/attention.h. Scores are never in memory; lse (fp32) is saved.
//
// Three paths, one choice (attn::forward, attn::backward):
//   sm90      bf16 on Hopper: TMA, warp-specialised wgmma; head_dim 64 and 128: attention_sm90.cuh
//   *_mma     bf16 on tensor cores: mma.sync m16n8k16, ldmatrix, cp.async (sm_80 and newer); head_dim 64, 128, 256
//   *_plain   fp32 arithmetic from either type; any head_dim that is a multiple of 8 up to 256
//
// Forward: a block owns a tile of queries and visits the key tiles of its window, the diagonal first; online softmax in the
// exp2 domain. Backward: blocks that own keys make dk and dv (they loop over the group's query heads) and keep dS in memory
// (attention_common.cuh); blocks that own queries make dq = dS K from it: 5 products, every sum has one owner and a fixed order, no
// atomics, no fp32 dq buffer. Where dS does not fit its workspace (ds_limit), or keys come from the ring, the second kernel makes S and
// dP again: 7 products. Precision: fp32 sums, softmax and statistics; P and dS are rounded to bf16 for their second product.
//
// Flops per (query, visible key) pair: 4 hd forward, 10 hd backward. Samba-421M (B 8, T 4096, window 2048, 12 heads of 128): 309 and
// 773 GFLOP a layer; bytes: 0.2 GB forward, 2.7 GB backward (dS 1.25 written and read). mma.sync reaches 300 to 350 TFLOP/s on an H100.
// H200: forward 0.966 ms, backward 2.78 with delta (dev/results/2026-11-25_h200_attention).
#pragma once
#include <algorithm>
#include <type_traits>

#include "attention_common.cuh"
#include "attention_sm90.cuh"
#include "device.cuh"
#include "rope.cuh"
#include "measure.cuh"

namespace gpu {
namespace attn {

// Which tile (of `rows` rows) of which (b, head) this block owns. Heads one after the other, so that the blocks that run at a
// time share keys in L2; last_first: the tiles with the longest past first.
struct Work { int tile, b, head; };
__device__ inline Work block_work(int T, int rows, int heads, bool last_first) {
    const int tiles = (T + rows - 1) / rows, tile = blockIdx.x % tiles, owner = blockIdx.x / tiles;
    return {last_first ? tiles - 1 - tile : tile, owner / heads, owner % heads};
}

// ---------------------------------------------------------------------------------------------------------------------
// Tensor-core path: tiles in shared memory
//
// A tile is ROWS x HD bf16, row-major; the 16-byte chunk c of row r lies in place c ^ (r % 8), so that the 8 rows which
// ldmatrix reads together, and the 8 chunks which cp.async writes together, hit different banks. A lane's address inside
// 16 rows is computed once (lane_a, lane_b); at_column() moves it to other columns, + 16 rows moves it down. Tiles are
// aligned to 128 bytes at least.

extern __shared__ __align__(1024) unsigned char attention_shared[];

// 16 rows x 16 columns: the A operand, or (transposed) B = rows as k, columns as n
template <int HD> __device__ inline uint32_t lane_a() {
    const int lane = threadIdx.x % WARP;
    return (lane % 16) * HD * 2 + ((lane / 16) ^ (lane % 8)) * 16;
}
// 16 rows x 16 columns as two B operands: rows as n, columns as k
template <int HD> __device__ inline uint32_t lane_b() {
    const int lane = threadIdx.x % WARP;
    return (lane % 8 + lane / 16 * 8) * HD * 2 + ((lane / 8 % 2) ^ (lane % 8)) * 16;
}

// `at` (column 0) moved to a column that is a multiple of 16
__device__ inline uint32_t at_column(uint32_t at, int column) { return (at ^ (column % 64 * 2)) + column / 64 * 128; }

// What this lane copies of a tile that starts at p: its first 16 bytes. Hoisted out of loops, it saves registers there.
template <int HD> __device__ inline const bf16* lane_source(const bf16* p, int64_t stride) {
    return p + threadIdx.x / (HD / 8) * stride + threadIdx.x % (HD / 8) * 8;
}
// ROWS rows, of which the first `valid` exist; the others become zeros. p: lane_source of the tile
template <int ROWS, int HD, int THREADS> __device__ inline void load_tile(uint32_t tile, const bf16* p, int64_t stride, int valid) {
    constexpr int CHUNKS = HD / 8, STEP = THREADS / CHUNKS;
    static_assert(THREADS % CHUNKS == 0 && ROWS % STEP == 0);
    const int chunk = threadIdx.x % CHUNKS, row0 = threadIdx.x / CHUNKS;
#pragma unroll
    for (int i = 0; i < ROWS / STEP; i++) {
        const int row = row0 + i * STEP;
        copy_async<16>(tile + row * HD * 2 + (chunk ^ (row % 8)) * 16, p, row < valid);
        p += STEP * stride;
    }
}
// Keys (value = 0) or values (1) n0 .. n0 + ROWS - 1 of group g, some or all of them in the ring
template <int ROWS, int HD, int THREADS>
__device__ inline void load_tile_ring(uint32_t tile, const Args<bf16>& a, int b, int g, int n0, int value) {
    constexpr int CHUNKS = HD / 8, STEP = THREADS / CHUNKS;
    const int chunk = threadIdx.x % CHUNKS, row0 = threadIdx.x / CHUNKS;
    const bf16* here = a.qkv + a.key(b, g) + value * HD;
    for (int row = row0; row < ROWS; row += STEP) {
        const int p = n0 + row;
        const bool real = p >= a.oldest() && p < a.T;
        const bf16* from = !real ? here : p < 0 ? a.ring_row(b, g, p, value) : here + p * a.row();
        copy_async<16>(tile + row * HD * 2 + (chunk ^ (row % 8)) * 16, from + chunk * 8, real);
    }
}

__device__ inline void load_matrices(uint32_t (&r)[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at));
}
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at));
}
// c (16, 8) += a (16, 16) b (16, 8). Lane l holds c of rows l/4 (c[0], c[1]) and l/4 + 8 (c[2], c[3]), columns l%4 * 2, + 1.
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <int MT, int NT> __device__ inline void clear(float (&c)[MT][NT][4]) {
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) c[m][n][e] = 0.f;
}

// c (16 MT, 8 NT) = a b^T: rows of two tiles against each other, over HD columns. a_tile: the warp's first row in its tile.
template <int HD, int MT, int NT> __device__ inline void product_rows(float (&c)[MT][NT][4], uint32_t a_tile, uint32_t b_tile) {
    clear(c);
#pragma unroll 4                                                           // all 8 at once cost spills
    for (int k = 0; k < HD / 16; k++) {
        uint32_t a[MT][4], b[4];
#pragma unroll
        for (int m = 0; m < MT; m++) load_matrices(a[m], a_tile + at_column(lane_a<HD>(), k * 16) + m * 16 * HD * 2);
#pragma unroll
        for (int n = 0; n < NT; n += 2) {
            load_matrices(b, b_tile + at_column(lane_b<HD>(), k * 16) + n * 8 * HD * 2);
#pragma unroll
            for (int m = 0; m < MT; m++) {
                mma(c[m][n], a[m], b[0], b[1]);
                mma(c[m][n + 1], a[m], b[2], b[3]);
            }
        }
    }
}
// c (16 MT, N) += p b: p (16 MT, 16 KT) in registers, b N columns of a tile of 16 KT rows of HD.
template <int HD, int N, int MT, int KT>
__device__ inline void product_columns(float (&c)[MT][N / 8][4], const uint32_t (&p)[MT][KT][4], uint32_t b_tile) {
#pragma unroll
    for (int k = 0; k < KT; k++)
#pragma unroll
        for (int n = 0; n < N / 8; n += 2) {
            uint32_t b[4];
            load_matrices_transposed(b, b_tile + at_column(lane_a<HD>(), n * 8) + k * 16 * HD * 2);
#pragma unroll
            for (int m = 0; m < MT; m++) {
                mma(c[m][n], p[m][k], b[0], b[1]);
                mma(c[m][n + 1], p[m][k], b[2], b[3]);
            }
        }
}
// A result's registers are, rounded, the A operand of the next product: no trip through shared memory.
template <int MT, int NT> __device__ inline void pack_operand(uint32_t (&p)[MT][NT / 2][4], const float (&c)[MT][NT][4]) {
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < NT; n++) {
            p[m][n / 2][n % 2 * 2 + 0] = pack(c[m][n][0], c[m][n][1]);
            p[m][n / 2][n % 2 * 2 + 1] = pack(c[m][n][2], c[m][n][3]);
        }
}

// Scores of unseen pairs become -infinity: row r of the block sees columns from(r) .. to(r). row: this lane's first.
template <int MT, int NT, class From, class To> __device__ inline void mask(float (&s)[MT][NT][4], int row, From from, To to) {
    const int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int r = row + m * 16 + half * 8, first = from(r) - column, last = to(r) - column;
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    if (n * 8 + e < first || n * 8 + e > last) s[m][n][half * 2 + e] = -INFINITY;
        }
}
// Rows are queries from i0 on, columns keys from n0 on; or rows keys, columns queries
template <int MT, int NT> __device__ inline void mask_keys(float (&s)[MT][NT][4], const Args<bf16>& a, int b, int row, int i0, int n0) {
    mask(s, row, [&](int r) { return a.first_key(b, i0 + r) - n0; }, [&](int r) { return i0 + r - n0; });
}
template <int MT, int NT> __device__ inline void mask_queries(float (&s)[MT][NT][4], const Args<bf16>& a, int b, int row, int n0, int i0) {
    mask(s, row, [&](int r) { return n0 + r - i0; }, [&](int r) { return a.last_query(b, n0 + r) - i0; });
}

// The warp's 16 MT result rows to global memory, rounded, by way of its own rows of a shared tile, in 16-byte stores.
// factor(m, half) scales a row, row_of(r) says where row r belongs. Rows from `valid` on are not written. Only this warp may use these
// rows of the tile.
struct SameRow { __device__ int operator()(int row) const { return row; } };
template <int HD, int MT, class F, class R = SameRow>
__device__ inline void store_rows(bf16* p, int64_t stride, int valid, const float (&c)[MT][HD / 8][4], unsigned char* rows, F factor, R row_of = {}) {
    const int lane = threadIdx.x % WARP;
    __syncwarp();
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = row_of(m * 16 + half * 8 + lane / 4);
            const float f = factor(m, half);
#pragma unroll
            for (int n = 0; n < HD / 8; n++)
                *reinterpret_cast<uint32_t*>(rows + row * HD * 2 + (n ^ (row % 8)) * 16 + lane % 4 * 4) =
                    pack(c[m][n][half * 2] * f, c[m][n][half * 2 + 1] * f);
        }
    __syncwarp();
    for (int i = lane; i < MT * 16 * (HD / 8); i += WARP) {
        const int row = i / (HD / 8), chunk = i % (HD / 8);
        if (row >= valid) continue;
        *reinterpret_cast<uint4*>(p + row * stride + chunk * 8) = *reinterpret_cast<const uint4*>(rows + row * HD * 2 + (chunk ^ (row % 8)) * 16);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Tensor-core path: forward

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

// ---------------------------------------------------------------------------------------------------------------------
// Tensor-core path: backward

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

// ---------------------------------------------------------------------------------------------------------------------
// Plain path: fp32 tiles of 16 R rows in shared memory, padded with zeros to HDP columns. 256 threads as 16 x 16: thread
// (ty, tx) owns rows ty + 16 r of a result, and columns tx + 16 k of scores or 4 tx + 64 k .. + 3 of head dimensions.

constexpr int PLAIN_THREADS = 256;
template <int HDP> constexpr int PLAIN_R = HDP <= 128 ? 2 : 1;
template <int HDP> constexpr int PLAIN_ROW = HDP + 4;                                        // in floats; 16 rows hit different banks
template <int HDP> constexpr int PLAIN_TILE = 16 * PLAIN_R<HDP> * PLAIN_ROW<HDP>;
template <int HDP> constexpr int PLAIN_SCORES = 16 * PLAIN_R<HDP> * (16 * PLAIN_R<HDP> + 1);

// tile rows r = row_of(r), a pointer to hd values, or zeros where it is null
template <int HDP, class X, class F> __device__ inline void plain_load(float* tile, int hd, F row_of) {
    constexpr int BT = 16 * PLAIN_R<HDP>;
    for (int i = threadIdx.x; i < BT * (HDP / 4); i += PLAIN_THREADS) {
        const int r = i / (HDP / 4), d = i % (HDP / 4) * 4;
        const X* from = row_of(r);
        Vec<float, 4> v{};
        if (from && d < hd) {
            const Vec<X, 4> x = load_vec<4>(from + d);
#pragma unroll
            for (int e = 0; e < 4; e++) v[e] = to_float(x[e]);
        }
        store_vec(tile + r * PLAIN_ROW<HDP> + d, v);
    }
}
template <int HDP, int R> __device__ inline void plain_product_rows(float (&s)[R][R], const float* x, const float* y) {
    const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int k = 0; k < R; k++) s[r][k] = 0.f;
#pragma unroll 4
    for (int d = 0; d < HDP; d += 4) {
        Vec<float, 4> a[R], b[R];
#pragma unroll
        for (int r = 0; r < R; r++) {
            a[r] = load_vec<4>(x + (ty + 16 * r) * PLAIN_ROW<HDP> + d);
            b[r] = load_vec<4>(y + (tx + 16 * r) * PLAIN_ROW<HDP> + d);
        }
#pragma unroll
        for (int r = 0; r < R; r++)
#pragma unroll
            for (int k = 0; k < R; k++)
#pragma unroll
                for (int e = 0; e < 4; e++) s[r][k] = fmaf(a[r][e], b[k][e], s[r][k]);
    }
}
// acc += p y: p (BT, BT) of this half-warp's rows goes through shared memory
template <int HDP, int R>
__device__ inline void plain_product_columns(float (&acc)[R][HDP / 16], const float (&p)[R][R], float* scores, const float* y) {
    constexpr int BT = 16 * R;
    const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    __syncwarp();
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int k = 0; k < R; k++) scores[(ty + 16 * r) * (BT + 1) + tx + 16 * k] = p[r][k];
    __syncwarp();
    for (int j = 0; j < BT; j++)
#pragma unroll
        for (int k = 0; k < HDP / 64; k++) {
            const Vec<float, 4> v = load_vec<4>(y + j * PLAIN_ROW<HDP> + tx * 4 + 64 * k);
#pragma unroll
            for (int r = 0; r < R; r++)
#pragma unroll
                for (int e = 0; e < 4; e++) acc[r][k * 4 + e] = fmaf(scores[(ty + 16 * r) * (BT + 1) + j], v[e], acc[r][k * 4 + e]);
        }
}
template <int HDP, int R, class X> __device__ inline void plain_store(X* to, const float (&acc)[R][HDP / 16], int r, int hd, float factor) {
#pragma unroll
    for (int k = 0; k < HDP / 64; k++) {
        const int d = threadIdx.x % 16 * 4 + 64 * k;
        Vec<X, 4> v;
#pragma unroll
        for (int e = 0; e < 4; e++) v[e] = from_float<X>(acc[r][k * 4 + e] * factor);
        if (d < hd) store_vec(to + d, v);
    }
}
template <int R, int N> __device__ inline void plain_clear(float (&acc)[R][N]) {
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int k = 0; k < N; k++) acc[r][k] = 0.f;
}
__device__ inline float half_warp_sum(float x) {
#pragma unroll
    for (int o = 8; o > 0; o /= 2) x += __shfl_xor_sync(0xffffffffu, x, o);
    return x;
}
__device__ inline float half_warp_max(float x) {
#pragma unroll
    for (int o = 8; o > 0; o /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, o));
    return x;
}

// A key (value = 0) or value (1) of the call or of the ring; null: there is none
template <class X> __device__ inline const X* plain_key(const Args<X>& a, int b, int g, int p, int value) {
    if (p < a.oldest() || p >= a.T) return nullptr;
    return p < 0 ? a.ring_row(b, g, p, value) : a.qkv + a.key(b, g) + (int64_t)value * a.hd + p * a.row();
}

template <int HDP> constexpr int forward_plain_shared() { return (2 * PLAIN_TILE<HDP> + PLAIN_SCORES<HDP>) * 4; }

template <class X, int HDP> __global__ void __launch_bounds__(PLAIN_THREADS) forward_plain(const Args<X> a) {
    constexpr int R = PLAIN_R<HDP>, BT = 16 * R;
    float *queries = reinterpret_cast<float*>(attention_shared), *keys = queries + PLAIN_TILE<HDP>, *scores = keys + PLAIN_TILE<HDP>;
    const Work work = block_work(a.T, BT, a.H, true);
    const int b = work.b, h = work.head, g = h / (a.H / a.G), ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    const int i0 = work.tile * BT;
    const float scale = rsqrtf((float)a.hd);
    float o[R][HDP / 16], top[R], sum[R];
    plain_clear(o);
    for (int r = 0; r < R; r++) top[r] = -INFINITY, sum[r] = 0.f;
    plain_load<HDP, X>(queries, a.hd, [&](int r) { return i0 + r < a.T ? a.qkv + a.query(b, h) + (i0 + r) * a.row() : nullptr; });
    for (int n0 = a.first_key(b, i0); n0 < min(i0 + BT, a.T); n0 += BT) {
        float s[R][R];
        plain_load<HDP, X>(keys, a.hd, [&](int r) { return plain_key(a, b, g, n0 + r, 0); });
        __syncthreads();
        plain_product_rows<HDP>(s, queries, keys);
        __syncthreads();
        plain_load<HDP, X>(keys, a.hd, [&](int r) { return plain_key(a, b, g, n0 + r, 1); });
#pragma unroll
        for (int r = 0; r < R; r++) {
            const int i = i0 + ty + 16 * r, first = a.first_key(b, i);
            float now = top[r], total = 0.f;
#pragma unroll
            for (int k = 0; k < R; k++) {
                const int p = n0 + tx + 16 * k;
                s[r][k] = p <= i && p >= first ? s[r][k] * scale : -INFINITY;
                now = fmaxf(now, s[r][k]);
            }
            now = half_warp_max(now);
            const float base = now == -INFINITY ? 0.f : now, shrink = expf(top[r] - base);
            top[r] = now;
#pragma unroll
            for (int k = 0; k < R; k++) total += s[r][k] = expf(s[r][k] - base);
            sum[r] = sum[r] * shrink + half_warp_sum(total);
#pragma unroll
            for (int k = 0; k < HDP / 16; k++) o[r][k] *= shrink;
        }
        __syncthreads();
        plain_product_columns<HDP>(o, s, scores, keys);
        __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < R; r++) {
        const int i = i0 + ty + 16 * r;
        if (i >= a.T) continue;
        if (tx == 0) a.lse[a.stat(b, h) + i] = top[r] + logf(sum[r]);
        plain_store<HDP>(a.out + a.output(b, h) + i * a.out_row(), o, r, a.hd, 1.f / sum[r]);
    }
}

template <int HDP> constexpr int backward_plain_shared() { return (4 * PLAIN_TILE<HDP> + PLAIN_SCORES<HDP>) * 4; }

// OWNS_KEYS: the block's tile is keys and values (rows of the scores), and it goes over the group's heads and queries;
// otherwise the tile is queries and dout, and it goes over keys. Both form P and dS of one pair of tiles at a time.
template <class X, int HDP, bool OWNS_KEYS> __global__ void __launch_bounds__(PLAIN_THREADS) backward_plain(const Args<X> a) {
    constexpr int R = PLAIN_R<HDP>, BT = 16 * R;
    float *own_a = reinterpret_cast<float*>(attention_shared), *own_b = own_a + PLAIN_TILE<HDP>, *other_a = own_b + PLAIN_TILE<HDP>,
          *other_b = other_a + PLAIN_TILE<HDP>, *scores = other_b + PLAIN_TILE<HDP>;
    const int heads = a.H / a.G, ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    const Work work = block_work(a.T, BT, OWNS_KEYS ? a.G : a.H, !OWNS_KEYS);
    const int b = work.b, g = OWNS_KEYS ? work.head : work.head / heads;
    const int own0 = work.tile * BT;
    const float scale = rsqrtf((float)a.hd);
    auto load_keys = [&](float* k, float* v, int p0) {
        plain_load<HDP, X>(k, a.hd, [&](int r) { return plain_key(a, b, g, p0 + r, 0); });
        plain_load<HDP, X>(v, a.hd, [&](int r) { return plain_key(a, b, g, p0 + r, 1); });
    };
    auto load_queries = [&](float* q, float* d, int h, int i0) {
        plain_load<HDP, X>(q, a.hd, [&](int r) { return i0 + r < a.T ? a.qkv + a.query(b, h) + (i0 + r) * a.row() : nullptr; });
        plain_load<HDP, X>(d, a.hd, [&](int r) { return i0 + r < a.T ? a.dout + a.output(b, h) + (i0 + r) * a.out_row() : nullptr; });
    };
    float first[R][HDP / 16], second[R][HDP / 16];                       // dk and dv, or dq and nothing
    plain_clear(first);
    plain_clear(second);
    if (OWNS_KEYS) load_keys(own_a, own_b, own0);
    else load_queries(own_a, own_b, work.head, own0);
    const int begin = OWNS_KEYS ? own0 : a.first_key(b, own0);
    const int end = OWNS_KEYS ? a.last_query(b, own0 + BT - 1) + 1 : min(a.T, own0 + BT);
    for (int h = OWNS_KEYS ? g * heads : work.head; h < (OWNS_KEYS ? (g + 1) * heads : work.head + 1); h++)
        for (int other0 = begin; other0 < end; other0 += BT) {
            __syncthreads();                                            // the last round's readers are done
            if (OWNS_KEYS) load_queries(other_a, other_b, h, other0);
            else load_keys(other_a, other_b, other0);
            __syncthreads();
            float p[R][R], ds[R][R];
            plain_product_rows<HDP>(p, own_a, other_a);
            plain_product_rows<HDP>(ds, own_b, other_b);
#pragma unroll
            for (int r = 0; r < R; r++)
#pragma unroll
                for (int k = 0; k < R; k++) {
                    const int row = own0 + ty + 16 * r, column = other0 + tx + 16 * k;
                    const int i = OWNS_KEYS ? column : row, key = OWNS_KEYS ? row : column;
                    const bool seen = i < a.T && key <= i && key >= a.first_key(b, i);
                    const int64_t at = a.stat(b, h) + (seen ? i : 0);
                    p[r][k] = seen ? expf(p[r][k] * scale - a.lse[at]) : 0.f;
                    ds[r][k] = p[r][k] * (ds[r][k] - a.delta[at]);
                }
            plain_product_columns<HDP>(first, ds, scores, other_a);
            if (OWNS_KEYS) plain_product_columns<HDP>(second, p, scores, other_b);
        }
#pragma unroll
    for (int r = 0; r < R; r++) {
        const int t = own0 + ty + 16 * r;
        if (t >= a.T) continue;
        plain_store<HDP>(a.dqkv + (OWNS_KEYS ? a.key(b, g) : a.query(b, work.head)) + t * a.row(), first, r, a.hd, scale);
        if (OWNS_KEYS) plain_store<HDP>(a.dqkv + a.value(b, g) + t * a.row(), second, r, a.hd, 1.f);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Launches. Functions that name many kernels are templates (of nothing), so that only a source that calls them compiles these.

// One block for each of `tiles` x `owners` (heads or groups, times the batch)
template <class X>
inline void launch(void (*kernel)(const Args<X>), const Args<X>& a, int64_t tiles, int64_t owners, int threads, int shared, Stream stream) {
    if (tiles * owners > INT32_MAX) fail("attention: B %d, T %d, %d heads need more than 2^31 blocks; use a smaller batch", a.B, a.T, a.H);
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    kernel<<<(unsigned)(tiles * owners), threads, shared, stream>>>(a);
    LAUNCH_CHECK();
}
inline int shared_limit() {                                              // bytes a block may have: 99 KB on sm_86/89/120, 163 on sm_80, 227 on sm_90
    int device = 0, bytes = 0;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    return bytes;
}

template <int HD, int WARPS, int MT> inline void launch_forward_mma(const Args<bf16>& a, Stream stream) {
    constexpr int BN = 64;
    launch(a.ring ? forward_mma<HD, WARPS, MT, BN, true> : forward_mma<HD, WARPS, MT, BN, false>, a, ceil_div(a.T, WARPS * MT * 16),
           (int64_t)a.B * a.H, WARPS * WARP, forward_shared<HD, WARPS, MT, BN>(), stream);
}
template <int HD, int WARPS, int MT, int BM, bool DK, bool DV> inline void launch_backward_keys_mma(const Args<bf16>& a, Stream stream) {
    launch(backward_keys_mma<HD, WARPS, MT, BM, DK, DV>, a, ceil_div(a.T, WARPS * MT * 16), (int64_t)a.B * a.G, WARPS * WARP,
           backward_keys_shared<HD, WARPS, MT, BM>(), stream);
}
template <int HD> inline void launch_backward_pairs_mma(const Args<bf16>& a, Stream stream) {
    launch(backward_pairs_mma<HD>, a, ceil_div(a.T, PAIRS * PAIR_KEYS), (int64_t)a.B * a.G, 2 * PAIRS * WARP, backward_pairs_shared<HD>(), stream);
}
template <int HD, int WARPS, int MT, int BN> inline void launch_backward_queries_mma(const Args<bf16>& a, Stream stream) {
    launch(a.ring ? backward_queries_mma<HD, WARPS, MT, BN, true> : backward_queries_mma<HD, WARPS, MT, BN, false>, a,
           ceil_div(a.T, WARPS * MT * 16), (int64_t)a.B * a.H, WARPS * WARP, backward_queries_shared<HD, WARPS, MT, BN>(), stream);
}
template <int HD> inline void launch_backward_product_mma(const Args<bf16>& a, Stream stream) {
    launch(backward_product_mma<HD>, a, ceil_div(a.T, PRODUCT_ROWS<HD>), (int64_t)a.B * a.H, PRODUCT_WARPS * WARP,
           backward_product_shared<HD>(), stream);
}
template <class X, int HDP> inline void launch_forward_plain(const Args<X>& a, Stream stream) {
    launch(forward_plain<X, HDP>, a, ceil_div(a.T, 16 * PLAIN_R<HDP>), (int64_t)a.B * a.H, PLAIN_THREADS, forward_plain_shared<HDP>(), stream);
}
template <class X, int HDP> inline void launch_backward_plain(const Args<X>& a, Stream stream) {
    const int64_t tiles = ceil_div(a.T, 16 * PLAIN_R<HDP>);
    launch(backward_plain<X, HDP, true>, a, tiles, (int64_t)a.B * a.G, PLAIN_THREADS, backward_plain_shared<HDP>(), stream);
    launch(backward_plain<X, HDP, false>, a, tiles, (int64_t)a.B * a.H, PLAIN_THREADS, backward_plain_shared<HDP>(), stream);
}

// Both return false where the tensor-core path has no kernel for this shape on this device
template <int = 0> inline bool forward_on_tensor_cores(const Args<bf16>& a, Stream stream) {
    if (a.hd == 64) launch_forward_mma<64, 4, 2>(a, stream);
    else if (a.hd == 128) launch_forward_mma<128, 4, 2>(a, stream);
    else if (a.hd == 256) launch_forward_mma<256, 4, 1>(a, stream);
    else return false;
    return true;
}
template <int = 0> inline bool backward_on_tensor_cores(const Args<bf16>& a, Stream stream) {
    const int limit = shared_limit();
    if (a.hd == 64) {
        launch_backward_keys_mma<64, 4, 2, 32, true, true>(a, stream);
        launch_backward_queries_mma<64, 4, 2, 64>(a, stream);
    } else if (a.hd == 128) {                                            // pairs of warps read less shared memory, where it is large enough
        if (limit >= backward_pairs_shared<128>()) launch_backward_pairs_mma<128>(a, stream);
        else launch_backward_keys_mma<128, 4, 1, 64, true, true>(a, stream);
        a.ds ? launch_backward_product_mma<128>(a, stream) : launch_backward_queries_mma<128, 4, 2, 32>(a, stream);
    } else if (a.hd == 256 && limit >= backward_keys_shared<256, 4, 1, 32>()) {
        launch_backward_keys_mma<256, 4, 1, 32, true, false>(a, stream);
        launch_backward_keys_mma<256, 4, 1, 32, false, true>(a, stream);
        a.ds ? launch_backward_product_mma<256>(a, stream) : launch_backward_queries_mma<256, 4, 1, 32>(a, stream);
    } else
        return false;
    return true;
}

// portable: not the Hopper path. Each path says whether it took the work.
template <class X> inline void forward(const Args<X>& a, bool portable, Stream stream) {
    if constexpr (std::is_same_v<X, bf16>) {
        if (!portable && sm90::forward_if_supported(a, stream)) return;
        if (forward_on_tensor_cores(a, stream)) return;
    }
    if (a.hd <= 64) launch_forward_plain<X, 64>(a, stream);
    else if (a.hd <= 128) launch_forward_plain<X, 128>(a, stream);
    else launch_forward_plain<X, 256>(a, stream);
}

// dS may take so much memory: the shape of the head needs 1.66 GB; a larger batch goes in parts. Head_dim 64 has as much of it as 128 and half
// the products: there making it again is faster (H200, 24 heads: 3.3 ms against 3.5 portable, 2.3 against 2.5 on the Hopper path).
constexpr int64_t DS_LIMIT = (int64_t)2 << 30;
// The limit on this device. The Hopper path makes dS again at head_dim 128, too, where memory is slow: writing and reading 4 bytes a pair takes
// longer than two products on an H100 (3.4 TB/s: 1.88 ms kept, 1.82 again, at the shape of the head), not on an H200 (4.8 TB/s: 1.67, 1.86).
inline int64_t ds_limit(int hd) {
    static signed char known[64] = {};                                   // per device: 0 not asked, 1 slow, -1 fast; races write equal values
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return DS_LIMIT;
    signed char& answer = known[device % 64];
    if (!answer) answer = device_info().bandwidth < 4e12 ? 1 : -1;
    return hd == 128 && answer > 0 && sm90::usable() ? 0 : DS_LIMIT;
}
// Workspace of backward: lse2 | delta | ends | dS
struct Workspace {
    int sequences = 0;                                                   // of which dS is kept at a time
    int64_t statistics, ends, ds;                                        // bytes; T rounded up to the tiles of the Hopper path
    Workspace(int B, int64_t T, int H, int hd, int64_t window, bool bf16_inputs, int64_t limit)
        : statistics(B * H * round_up(T, 128) * 4), ends(round_up(B * T * 4, 256)) {
        const int64_t one = ds_elements(H, T, (int)window) * (int64_t)sizeof(bf16), fit = std::min<int64_t>(limit / one, B);
        if (bf16_inputs && (hd == 128 || hd == 256) && fit > 0) sequences = (int)ceil_div(B, ceil_div(B, fit));   // equal parts
        ds = sequences * one;
    }
    int64_t bytes() const { return 2 * statistics + ends + ds; }
    template <class X> void give(Args<X>& a, void* workspace) const {
        char* at = (char*)workspace;
        a.lse2 = (float*)at, a.delta = (float*)(at + statistics), at += 2 * statistics;
        if (a.starts) a.ends = (const int*)at;
        if (sequences > 0 && !a.ring) a.ds = (bf16*)(at + ends), a.ds_sequences = sequences;
    }
};

// Tensor cores: a part of the batch at a time, if dS is kept
template <int = 0> inline bool backward_bf16(const Args<bf16>& a, bool hopper, Stream stream) {
    const int step = a.ds ? a.ds_sequences : a.B;
    for (int b = 0; b < a.B; b += step) {                                // lse2 and delta: padded on Hopper
        const Args<bf16> part = a.batches(b, std::min(step, a.B - b), hopper ? round_up(a.T, 128) : a.T);
        if (hopper) sm90::run_backward(part, stream);
        else if (!backward_on_tensor_cores(part, stream)) return false;
    }
    return true;
}
template <class X> inline void backward_portable(const Args<X>& a, Stream stream) {
    backward_statistics<X><<<(unsigned)ceil_div((int64_t)a.B * a.T * a.H * 8, 256), 256, 0, stream>>>(a);
    LAUNCH_CHECK();
    if constexpr (std::is_same_v<X, bf16>)
        if (backward_bf16(a, false, stream)) return;
    if (a.hd <= 64) launch_backward_plain<X, 64>(a, stream);
    else if (a.hd <= 128) launch_backward_plain<X, 128>(a, stream);
    else launch_backward_plain<X, 256>(a, stream);
}
template <class X> inline void backward(const Args<X>& a, bool portable, Stream stream) {
    if (a.starts) {
        document_ends<0><<<(unsigned)ceil_div((int64_t)a.B * a.T, 256), 256, 0, stream>>>(const_cast<int*>(a.ends), a.starts, a.B, a.T);
        LAUNCH_CHECK();
    }
    if constexpr (std::is_same_v<X, bf16>)
        if (!portable && sm90::backward_supported(a)) {                  // has statistics of its own, padded, and turns back by itself
            backward_bf16(a, true, stream);
            return;
        }
    backward_portable(a, stream);
    if (a.rope) rope_launch(a.dqkv, a.rope, -1.f, a.B, a.T, a.H, a.G, a.hd, stream);
}

inline void check(int64_t T, int64_t capacity, int H, int G, int hd) {
    if (G < 1 || H < 1 || H % G != 0) fail("attention: %d query heads in %d groups: heads must be a positive multiple of groups", H, G);
    if (hd < 8 || hd > 256 || hd % 8 != 0) fail("attention: head_dim %d: the GPU kernels need a multiple of 8 up to 256", hd);
    if (T > 1 << 29 || capacity > 1 << 29) fail("attention: T %lld, ring of %lld: at most 2^29 positions a call", (long long)T, (long long)capacity);
}

// Pairs of a query and a key it sees, where the ring holds nothing
template <class X> inline double visible_pairs(const Args<X>& a) {
    const double w = std::min<double>(a.window, a.T);
    return (w * (w + 1) / 2 + (a.T - w) * w) * a.B * a.H;
}

// An item is four values of one key or value: (b, t, group, key | value, part)
template <class X> __global__ void ring_update_kernel(X* ring, const Args<X> a, int first) {
    const int parts = a.hd / 4;
    const int64_t item = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, rows = a.T - first;
    const int part = item % parts, value = item / parts % 2, g = item / (2 * parts) % a.G;
    const int64_t row = item / ((int64_t)2 * parts * a.G), b = row / rows, t = first + row % rows;
    if (b >= a.B) return;
    X* to = ring + (((b * a.capacity + (a.position + t) % a.capacity) * 2 + value) * a.G + g) * a.hd;
    store_vec(to + part * 4, load_vec<4>(a.qkv + a.key(b, g) + value * a.hd + t * a.row() + part * 4));
}

} // namespace attn

// ---------------------------------------------------------------------------------------------------------------------

template <class X> inline attn::Args<X> attention_args(const X* qkv, const std::type_identity_t<X>* ring, int64_t capacity, int64_t position,
                                                       const int* starts, int B, int64_t T, int H, int G, int hd, int64_t window) {
    attn::check(T, capacity, H, G, hd);
    attn::Args<X> a{};
    a.qkv = qkv, a.starts = starts, a.capacity = capacity, a.position = position, a.B = B, a.T = (int)T, a.H = H, a.G = G, a.hd = hd;
    a.ring = position > 0 && capacity > 0 ? ring : nullptr;
    const int64_t visible = T + (a.ring ? std::min(position, capacity) : 0);
    a.window = (int)(window <= 0 ? visible : std::min(window, visible));
    return a;
}

// starts: (B, T) on the device, or null. portable: stay on the path that every GPU has, for tests
template <int = 0>
inline void attention_forward(floatX* out, float* lse, const floatX* qkv, const floatX* ring, int64_t capacity, int64_t position, const int* starts,
                              int B, int64_t T, int H, int G, int hd, int64_t window, Stream stream = {}, bool portable = false) {
    attn::Args<floatX> a = attention_args(qkv, ring, capacity, position, starts, B, T, H, G, hd, window);
    if (B * T == 0) return;
    a.out = out, a.lse = lse;
    const Operation op("attention forward", (double)B * T * (2 * H + 2 * G) * hd * sizeof(floatX), 4 * attn::visible_pairs(a) * hd, stream);
    attn::forward(a, portable, stream);
}

// 16-byte aligned
inline size_t attention_backward_workspace(int B, int64_t T, int H, int, int hd, int64_t window) {
    return attn::Workspace(B, T, H, hd, window <= 0 ? T : std::min(window, T), sizeof(floatX) == 2, attn::ds_limit(hd)).bytes();
}

// Gradients of this call's queries, keys and values; those of earlier calls, in the ring, are constants. Every element of dqkv is written.
// rope (T, hd/2, 2), or null: queries and keys were turned by it (rope_forward), and the gradients are of what they were before.
template <int = 0>
inline void attention_backward(floatX* dqkv, const floatX* dout, const floatX* out, const floatX* qkv, const float* lse, const floatX* ring,
                               int64_t capacity, int64_t position, const int* starts, void* workspace, int B, int64_t T, int H, int G, int hd,
                               int64_t window, const float* rope, Stream stream = {}, bool portable = false) {
    attn::Args<floatX> a = attention_args(qkv, ring, capacity, position, starts, B, T, H, G, hd, window);
    if (B * T == 0) return;
    a.dqkv = dqkv, a.dout = dout, a.saved_out = out, a.lse = const_cast<float*>(lse), a.rope = rope;
    attn::Workspace(B, T, H, hd, std::min<int64_t>(a.window, T), sizeof(floatX) == 2, attn::ds_limit(hd)).give(a, workspace);
    const Operation op("attention backward", (double)B * T * (4 * H + 4 * G) * hd * sizeof(floatX), 10 * attn::visible_pairs(a) * hd, stream);
    attn::backward(a, portable, stream);
}

// The chunk's last min(T, capacity) keys and values into the ring (B, capacity, 2, G, hd), for the calls that follow
inline void ring_update(floatX* ring, const floatX* qkv, int64_t capacity, int64_t position, int B, int64_t T, int H, int G, int hd,
                        Stream stream = {}) {
    attn::check(T, capacity, H, G, hd);
    const int64_t rows = std::min(T, capacity), items = B * rows * G * 2 * (hd / 4);
    if (items == 0) return;
    attn::Args<floatX> a{};
    a.qkv = qkv, a.capacity = capacity, a.position = position, a.B = B, a.T = (int)T, a.H = H, a.G = G, a.hd = hd;
    attn::ring_update_kernel<<<ceil_div(items, 256), 256, 0, stream>>>(ring, a, (int)(T - rows));
    LAUNCH_CHECK();
}

} // namespace gpu
