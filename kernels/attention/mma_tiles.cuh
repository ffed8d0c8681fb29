// Attention on tensor cores with mma.sync (attention.cuh): tiles in shared memory, products of them, masks, results to global memory.
//
// A tile is ROWS x HD bf16, row-major; the 16-byte chunk c of row r lies in place c ^ (r % 8), so that the 8 rows which
// ldmatrix reads together, and the 8 chunks which cp.async writes together, hit different banks. A lane's address inside
// 16 rows is computed once (lane_a, lane_b); at_column() moves it to other columns, + 16 rows moves it down. Tiles are
// aligned to 128 bytes at least.
#pragma once
#include "portable.cuh"

namespace gpu {
namespace attn {

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

} // namespace attn
} // namespace gpu
