// Backward of the Mamba layer's convolution and of x_proj, which reads its result u = silu(s), s = conv(x). K = R + 2N is x_proj's width:
//   du  += dx_dbl Wx                                             (B,T,K) (K,e): the gradient of u is the scan's and x_proj's
//   dWx (+)= dx_dbl^T u                                          (K,B,T) (B,T,e)
//   dx, dw, db of the convolution from du                        conv1d.cuh
// Each of the three reads or writes arrays of (B,T,e) and little else. On Hopper in bf16 they are one kernel, which makes s and u again from
// x and keeps du in registers; elsewhere, and for sizes that it does not take (T, K or row strides no multiples of 8, e none of 64, K > 256), they
// are two products of cuBLASLt and a pass over memory.
// Bytes per (t,c): 6 (du, x, dx) instead of 12; flops 4 K and 30. At 32768 x 3072, K = 128: 0.60 GB, floor 0.201 ms at 3.0 TB/s (H100).
#pragma once
#include "conv1d.cuh"
#include "hopper.cuh"
#include "matmul.cuh"

namespace gpu {
namespace sm90 {

// A block is 64 channels a warpgroup, and a producer. It walks up its share of the rows of all sequences, from the last to the first, in tiles of
// 32: dx of a row needs ds of the three rows after it, which the tile before has left in registers. What a block begins with, unless a
// sequence ends there, is the tile after its share, for these three rows alone.
//   du^T  (64,32) += Wx^T (64,K) dx_dbl^T (K,32)      Wx in shared memory all the time
//   dWx^T (64,K)  += u^T (64,32) dx_dbl (32,K)        u from registers, the sum in registers over all rows of the block
// The order of the products' tile rows is ours to choose. Lane (g = lane / 4, q = lane % 4) of a warp has channels g and g + 8 of the warp's 16 and
// rows 8q to 8q + 7 of the tile: as results of the first product, as the walk through time wants them, and as operand of the second. For that
// row 8q + 2j + i of the tile is column 8j + 2q + i of the first product, and TMA brings the rows of dx_dbl in that order. x, du and dx are moved
// by 8 x 8 matrices of the rows 2j, 2j + 1 of all q. ds of the three rows after a lane's comes from the lane beside it.
constexpr int X_PROJ_CONV_ROWS = 32;

struct XProjConv {
    bf16* dx;
    const bf16* halo;                                  // (B,3,e), or null for zeros
    int64_t lddx;
    const float *w, *b;
    float* part;                                       // (parts, K + 5, e): of dWx, dw, db
    int64_t T, tiles, all_tiles, share;                // tiles: of a sequence; share: of a block, of the tiles of all columns of blocks
    int e, width, columns;                             // width: K
    // The first and the last block that has tiles of a column
    __host__ __device__ int64_t first_block(int64_t column) const { return column * all_tiles / share; }
    __host__ __device__ int64_t last_block(int64_t column) const { return ((column + 1) * all_tiles - 1) / share; }
};
// As boxes of 64 columns: of 32 rows of dx_dbl, of K rows of Wx; as boxes of 64 columns for each warpgroup: of 8 rows of x and of du
struct XProjConvMaps { CUtensorMap dx_dbl, x, du, w_x; };

// A stage is a tile of dx_dbl, in the form of hopper.cuh, and x and du in rows of 128 bytes: eight for each warpgroup, and a gap of two, so that the
// rows 8q + r of a warp lie in different banks. x has the eight rows before the tile, too.
template <int KP, int GROUPS, int STAGES> struct XProjConvShared {
    static constexpr int PITCH = (8 * GROUPS + 2) * 128, BOX = GROUPS * 8 * 128;
    static constexpr int X = KP * X_PROJ_CONV_ROWS * 2, DU = X + 4 * PITCH, STAGE = DU + 4 * PITCH + BOX;     // DU: where rows before the tile were
    static constexpr int LOADED = KP * X_PROJ_CONV_ROWS * 2 + 9 * BOX;
    static_assert((DU - X) % 1024 == 0 && STAGE % 1024 == 0);
    static constexpr int W_X = STAGES * STAGE, DX = W_X + GROUPS * KP * 128;                         // dx: 1 KB a warp
    static constexpr int BARRIERS = DX + GROUPS * 4 * 1024, WEIGHT_BARRIERS = BARRIERS + 2 * STAGES * 8, BYTES = WEIGHT_BARRIERS + 16;
#ifdef SAMBA_SM90A_CODE
    __device__ static Ring<STAGES> ring(uint32_t shared) { return {shared, shared + BARRIERS, STAGE}; }
    __device__ static Ring<1> weights(uint32_t shared) { return {shared + W_X, shared + WEIGHT_BARRIERS, 0}; }
#endif
};

#ifdef SAMBA_SM90A_CODE
// By a whole warp, whose lanes all give the same: the operands are in uniform registers then. One lane, `chosen`, does it
__device__ inline void tma_load(bool chosen, uint32_t to, const CUtensorMap* map, uint32_t bar, int column, int row, int sequence, int group = 0) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %7, 0;\n"
                 "@p cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, 0, %4, %6, %5}], [%2];\n}"
                 ::"r"(to), "l"(map), "r"(bar), "r"(column), "r"(row), "r"(sequence), "r"(group), "r"((int)chosen) : "memory");
}
__device__ inline bool choose_lane() {
    uint32_t chosen;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(chosen));
    return chosen;
}
// c (64, 32) += a b, a along columns, b along rows
__device__ inline void wgmma_mixed(float (&c)[16], uint64_t a, uint64_t b) {
    asm volatile(SM90_ADD("1") "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, "
                 "%16, %17, add, 1, 1, 1, 0;\n}" : SM90_F8("+f", c, 0), SM90_F8("+f", c, 8) : "l"(a), "l"(b));
}
__device__ inline void load_blocks_transposed(uint32_t (&v)[4], uint32_t at) {       // as load_blocks: a lane has two neighbours of a column
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(at) : "memory");
}
__device__ inline void store_blocks_transposed(uint32_t at, const uint32_t (&v)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};"
                 ::"r"(at), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
}
__device__ inline void store_if(bool wanted, void* to, const uint32_t (&v)[4]) {      // no branch
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p st.global.v4.b32 [%1], {%2,%3,%4,%5};\n}"
                 ::"r"((int)wanted), "l"(to), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
}
__device__ inline float low_half(uint32_t v) { return __uint_as_float(v << 16); }
__device__ inline float high_half(uint32_t v) { return __uint_as_float(v & 0xffff0000u); }

// A block's tiles of one column of blocks, from the last to the first
struct TileWalk {
    int64_t column, sequence;
    int count, tile, last_tile;                        // count: of tiles left; the others: of the sequence
    bool extra;                                        // the first tile is not the block's own
    __device__ TileWalk(const XProjConv& p, int64_t n, int64_t end) : column(n / p.all_tiles) {      // n: the block's next tile, through all columns
        const int64_t first = n - column * p.all_tiles, last = min(p.all_tiles, first + end - n);
        extra = last % p.tiles != 0;
        const int64_t from = last - 1 + extra;
        sequence = from / p.tiles, tile = (int)(from % p.tiles), last_tile = (int)p.tiles - 1, count = (int)(last - first) + extra;
    }
    __device__ int own() const { return count - extra; }                                             // before the walk
    __device__ bool back() {                           // is the next tile a sequence's last?
        count--;
        if (--tile >= 0) return false;
        tile = last_tile, sequence--;
        return true;
    }
};

template <int KP, int GROUPS, int STAGES>
__device__ inline void x_proj_conv_produce(const XProjConv& p, const XProjConvMaps& maps, const Ring<STAGES>& ring, int64_t n, int64_t end) {
    using Shared = XProjConvShared<KP, GROUPS, STAGES>;
    const bool chosen = choose_lane();
    const Ring<1> weights = Shared::weights(ring.tiles);
    Cursor<1> weights_cursor;
    for (Cursor<STAGES> cursor; n < end; weights_cursor.next()) {
        TileWalk walk(p, n, end);
        weights_cursor.wait_empty(weights);
        if (chosen) barrier_expect(weights_cursor.full_bar(weights), GROUPS * KP * 128);
        const int first_group = (int)walk.column * GROUPS;
        for (int group = 0; group < GROUPS; group++)
            tma_load(chosen, weights.tiles + group * KP * 128, &maps.w_x, weights_cursor.full_bar(weights), (first_group + group) * 64, 0, 0);
        for (n += walk.own(); walk.count > 0; walk.back(), cursor.next()) {
            cursor.wait_empty(ring);
            const uint32_t bar = cursor.full_bar(ring), stage = cursor.tile(ring);
            const int t = walk.tile * X_PROJ_CONV_ROWS, sequence = (int)walk.sequence;
            if (chosen) barrier_expect(bar, Shared::LOADED);
            for (int k = 0; k < KP; k += 64) tma_load(chosen, stage + k * X_PROJ_CONV_ROWS * 2, &maps.dx_dbl, bar, k, t / 8, sequence);
            for (int r = -1; r < 4; r++) {
                tma_load(chosen, stage + Shared::X + (r + 1) * Shared::PITCH, &maps.x, bar, 0, t + 8 * r, sequence, first_group);
                if (r >= 0) tma_load(chosen, stage + Shared::DU + (r + 1) * Shared::PITCH, &maps.du, bar, 0, t + 8 * r, sequence, first_group);
            }
        }
    }
}

template <int KP, int GROUPS, int STAGES> struct XProjConvConsumer {
    using Shared = XProjConvShared<KP, GROUPS, STAGES>;
    static constexpr int C = 64 * GROUPS;
    const XProjConv& p;
    const Ring<STAGES>& ring;
    Cursor<STAGES> cursor;
    const Ring<1> weights;
    Cursor<1> weights_cursor;
    const int lane = threadIdx.x % WARP, g = lane / 4, q = lane % 4;
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / WARP, 0) - WARPGROUP / WARP;
    int channel;                                       // the warp's first
    float w[2][CONV_WIDTH], b[2];
    float sums[KP / 2], dw[2][CONV_WIDTH], db[2];      // sums: dWx^T
    float later[2][CONV_HALO];                         // ds of the lane's first three rows of the tile before
    uint32_t u[2][4];                                  // of the tile, as an operand
    // As load_blocks names rows: in a stage of x, channels 0 to 7, matrices j = 0 to 3; the other channels are in place ^ 16. Of the rows before, j =
    // 2, 3 of both. And on the way out of dx, which is written as matrices and read as 16 bytes of rows out_row and out_row + 4
    uint32_t place, place_before, out_place, read_place;
    const int out_row = lane / 2 % 4 * 8 + lane / 8;
    bf16* dx;                                          // the lane's 16 bytes of row out_row

    __device__ XProjConvConsumer(const XProjConv& p, const Ring<STAGES>& ring)
        : p(p), ring(ring), weights(Shared::weights(ring.tiles)) {
        const int i = lane % 8, j = lane / 8;
        place = x_place(i / 2 * 8 + j * 2 + i % 2, 0);
        place_before = x_place(i / 2 * 8 + (2 + j % 2) * 2 + i % 2 - 8, j / 2);
        out_place = dx_place(i / 2 * 8 + j * 2 + i % 2, 0), read_place = dx_place(out_row, lane % 2);
    }
    __device__ uint32_t dx_place(int row, int half) const {
        return ring.tiles + Shared::DX + warp * 1024 + row % 8 * 128 + row / 8 * 32 + (half ^ row % 2) * 16;
    }
    // Of the warp's 8 channels `half` of a tile's row -8 <= row < 32 of x
    __device__ uint32_t x_place(int row, int half) const {
        const int at = (row + 8) / 8 * (8 * GROUPS + 2) + warp / 4 * 8 + (row + 8) % 8, chunk = warp % 4 * 2 + half;
        return Shared::X + at * 128 + (chunk ^ at % 8) * 16;
    }
    __device__ int channel_of(int c) const { return channel + 8 * c + g; }

    __device__ void load_taps() {
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const bool live = channel_of(c) < p.e;
            b[c] = live ? p.b[channel_of(c)] : 0.f;
#pragma unroll
            for (int k = 0; k < CONV_WIDTH; k++) w[c][k] = live ? p.w[(int64_t)channel_of(c) * CONV_WIDTH + k] : 0.f;
        }
    }
    __device__ void clear() {
#pragma unroll
        for (int i = 0; i < KP / 2; i++) sums[i] = 0.f;
#pragma unroll
        for (int c = 0; c < 2; c++) {
            db[c] = 0.f;
#pragma unroll
            for (int k = 0; k < CONV_WIDTH; k++) dw[c][k] = 0.f;
        }
        hold(sums);                                    // a branch where this is called, not a choice of every number in every turn
    }

    // du^T += Wx^T dx_dbl^T, not waited for
    __device__ void add_x_proj(float (&du)[16], uint32_t dx_dbl) const {
        const uint64_t a = descriptor(weights.tiles + warp / 4 * KP * 128, 0), b = descriptor(dx_dbl, 0);
        hold(du);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < KP / 16; k++) wgmma_mixed(du, a + k * 2048 / 16, b + (k / 4 * X_PROJ_CONV_ROWS * 128 + k % 4 * 32) / 16);
        wgmma_commit();
        hold(du);
    }
    // dWx^T += u^T dx_dbl, not waited for: 128 columns at a time, and 64
    __device__ void add_weight_gradient(uint32_t dx_dbl) {
        const uint64_t b = descriptor(dx_dbl, X_PROJ_CONV_ROWS * 128);
        hold(sums), hold(u);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 2; k++)
#pragma unroll
            for (int n = 0; n < KP; n += 128) {
                const uint64_t at = b + (n / 64 * X_PROJ_CONV_ROWS * 128 + k * 2048) / 16;
                if (n + 128 <= KP) wgmma_columns(*reinterpret_cast<float (*)[64]>(sums + n / 2), u[k], at, 1);
                else wgmma_columns(*reinterpret_cast<float (*)[32]>(sums + n / 2), u[k], at, 1);
            }
        wgmma_commit();
        hold(sums);
    }
    __device__ void wait_for_products() {
        wgmma_wait<0>();
        hold(sums), hold(u);
    }

    // Where row r (of the lane's 8) of channel c (of its two) is in the result of add_x_proj
    __device__ static constexpr int at(int c, int r) { return r / 2 * 4 + c * 2 + r % 2; }

    using Rows = uint32_t[2][6];                       // of x: rows 2i - 4, 2i - 3 of channel c
    __device__ static float x_of(const Rows& x, int c, int r) {            // row r - 3 of the lane's
        return r % 2 ? low_half(x[c][(r + 1) / 2]) : high_half(x[c][(r + 1) / 2]);
    }
    __device__ void load_du(float (&du)[16], uint32_t stage) const {
#pragma unroll
        for (int c = 0; c < 2; c++) {
            uint32_t v[4];
            load_blocks_transposed(v, (stage + (place ^ c * 16)) + (Shared::DU - Shared::X));
#pragma unroll
            for (int j = 0; j < 4; j++) du[at(c, 2 * j)] = low_half(v[j]), du[at(c, 2 * j + 1)] = high_half(v[j]);
        }
    }
    __device__ void load_x(Rows& x, uint32_t stage) const {
        uint32_t before[4], v[4];
        load_blocks_transposed(before, stage + place_before);
#pragma unroll
        for (int c = 0; c < 2; c++) {
            load_blocks_transposed(v, stage + (place ^ c * 16));
            x[c][0] = before[2 * c], x[c][1] = before[2 * c + 1];
#pragma unroll
            for (int j = 0; j < 4; j++) x[c][2 + j] = v[j];
        }
    }
    // The rows before a sequence, for the lanes with its first rows
    __device__ void load_halo(Rows& x, int64_t sequence) const {
        if (q != 0) return;
#pragma unroll
        for (int c = 0; c < 2; c++) {
            if (channel_of(c) >= p.e) continue;
            const uint16_t* from = (const uint16_t*)p.halo + sequence * CONV_HALO * p.e + channel_of(c);
            x[c][0] = (uint32_t)from[0] << 16, x[c][1] = from[p.e] | (uint32_t)from[2 * p.e] << 16;
        }
    }
    // u, and what du is multiplied with to be ds
    __device__ void make_u(float (&factor)[2][8], const Rows& x) {
#pragma unroll
        for (int c = 0; c < 2; c++)
#pragma unroll
            for (int r = 0; r < 8; r += 2) {
                float y[2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float s = b[c];
#pragma unroll
                    for (int k = 0; k < CONV_WIDTH; k++) s = fmaf(w[c][k], x_of(x, c, r + i + k), s);
                    const float gate = sigmoid<bf16>(s);
                    y[i] = s * gate;
                    factor[c][r + i] = fmaf(y[i], 1.f - gate, gate);       // gate (1 + s (1 - gate))
                }
                u[r / 4][r % 4 + c] = pack(y[0], y[1]);
            }
    }
    // ds of the lane's rows and the three after: of the next lane, or of the first lane in the tile before. And the sums over rows
    __device__ void make_ds(float (&ds)[2][8 + CONV_HALO], const float (&du)[16], const float (&factor)[2][8], const Rows& x) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
#pragma unroll
            for (int r = 0; r < 8; r++) {
                ds[c][r] = du[at(c, r)] * factor[c][r];
                db[c] += ds[c][r];
#pragma unroll
                for (int k = 0; k < CONV_WIDTH; k++) dw[c][k] = fmaf(ds[c][r], x_of(x, c, r + k), dw[c][k]);
            }
#pragma unroll
            for (int k = 0; k < CONV_HALO; k++) {
                ds[c][8 + k] = __shfl_sync(0xffffffffu, q == 0 ? later[c][k] : ds[c][k], (lane & ~3) | ((lane + 1) & 3));
                later[c][k] = ds[c][k];
            }
        }
    }
    __device__ void make_dx(const float (&ds)[2][8 + CONV_HALO], int rows) const {
        uint32_t v[4];
#pragma unroll
        for (int c = 0; c < 2; c++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float y[2] = {};
#pragma unroll
                for (int i = 0; i < 2; i++)
#pragma unroll
                    for (int k = 0; k < CONV_WIDTH; k++) y[i] = fmaf(w[c][k], ds[c][2 * j + i + CONV_HALO - k], y[i]);
                v[j] = pack(y[0], y[1]);
            }
            store_blocks_transposed(out_place ^ c * 16, v);
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 2; i++) {
            load_shared(v, read_place + i * 512);
            store_if(out_row + 4 * i < rows, dx + 4 * i * p.lddx, v);
        }
    }

    // The tile that has arrived. rows: of dx that are stored
    __device__ void tile(bool at_start, int64_t sequence, int rows) {
        const uint32_t stage = __shfl_sync(0xffffffffu, cursor.tile(ring), 0);       // one for a warp: the compiler must see it
        float du[16], factor[2][8], ds[2][8 + CONV_HALO];
        Rows x;
        load_du(du, stage);
        add_x_proj(du, stage);
        load_x(x, stage);
        if (at_start && p.halo) load_halo(x, sequence);
        make_u(factor, x);
        add_weight_gradient(stage);
        wgmma_wait<1>();
        hold(du);
        make_ds(ds, du, factor, x);
        make_dx(ds, rows);
    }

    // One column's tiles, and the part of its sums
    __device__ void run(TileWalk walk) {
        channel = (int)walk.column * C + warp * 16;
        const int stored = channel + lane % 2 * 8;                         // channels of dx that the lane stores
        dx = p.dx + (walk.sequence * p.T + walk.tile * (int64_t)X_PROJ_CONV_ROWS + out_row) * p.lddx + stored;
        const int last_rows = (int)(p.T - walk.last_tile * (int64_t)X_PROJ_CONV_ROWS);
        load_taps();
        weights_cursor.wait_full(weights);
        clear();
#pragma unroll
        for (int k = 0; k < CONV_HALO; k++) later[0][k] = later[1][k] = 0.f;
        bool own = !walk.extra;
        Cursor<STAGES> before{-1};
        while (walk.count > 0) {
            const int rows = walk.tile == walk.last_tile ? last_rows : X_PROJ_CONV_ROWS;
            cursor.wait_full(ring);
            if (before.stage >= 0) wait_for_products(), before.release(ring);  // of the tile before: they have had its walk's time
            tile(walk.tile == 0, walk.sequence, own && stored < p.e ? rows : 0);
            before = cursor;
            cursor.next();
            if (!own) wait_for_products(), clear(), own = true;
            dx -= X_PROJ_CONV_ROWS * p.lddx;
            if (walk.back()) {                                             // nothing comes after a sequence's last row
                asm volatile("" ::: "memory");                             // a branch
                dx += (X_PROJ_CONV_ROWS - last_rows) * p.lddx;
#pragma unroll
                for (int k = 0; k < CONV_HALO; k++) later[0][k] = later[1][k] = 0.f;
            }
        }
        wait_for_products();
        before.release(ring);
        weights_cursor.release(weights);
        weights_cursor.next();
        store_part(p.part + (blockIdx.x - p.first_block(walk.column)) * (p.width + CONV_WIDTH + 1) * p.e);
    }

    __device__ void store_part(float* part) const {
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const bool live = channel_of(c) < p.e;
            float* to = part + channel_of(c);
#pragma unroll
            for (int n = 0; n < KP / 8; n++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int k = 8 * n + 2 * q + i;
                    if (live && k < p.width) to[(int64_t)k * p.e] = sums[4 * n + 2 * c + i];
                }
#pragma unroll
            for (int k = 0; k <= CONV_WIDTH; k++) {
                float v = k < CONV_WIDTH ? dw[c][k % CONV_WIDTH] : db[c];
                v += __shfl_xor_sync(0xffffffffu, v, 1);
                v += __shfl_xor_sync(0xffffffffu, v, 2);
                if (live && q == 0) to[(int64_t)(p.width + k) * p.e] = v;
            }
        }
    }
};
#endif // SAMBA_SM90A_CODE

// As many blocks as the GPU holds, with equal shares of the tiles of one column of 64 GROUPS channels after another: of one column, or of two
template <int KP, int GROUPS, int STAGES>
__global__ void __launch_bounds__((GROUPS + 1) * WARPGROUP, 3 - GROUPS)
x_proj_conv_kernel(const __grid_constant__ XProjConv p, const __grid_constant__ XProjConvMaps maps) {
#ifdef SAMBA_SM90A_CODE
    using Shared = XProjConvShared<KP, GROUPS, STAGES>;
    const uint32_t shared = shared_address(sm90_shared);
    const Ring<STAGES> ring = Shared::ring(shared);
    if (threadIdx.x == 0) {
        ring.init(GROUPS * WARPGROUP / WARP);
        Shared::weights(shared).init(GROUPS * WARPGROUP / WARP);
        barrier_init_done();
    }
    __syncthreads();
    int64_t n = blockIdx.x * p.share;
    const int64_t end = min(n + p.share, p.columns * p.all_tiles);
    if (threadIdx.x < WARPGROUP) {
        registers_down<40>();
        if (threadIdx.x < WARP) x_proj_conv_produce<KP, GROUPS, STAGES>(p, maps, ring, n, end);
    } else {
        registers_up<GROUPS == 2 ? 232 : 216>();
        XProjConvConsumer<KP, GROUPS, STAGES> consumer(p, ring);
        while (n < end) {
            const TileWalk walk(p, n, end);
            n += walk.own();
            consumer.run(walk);
        }
    }
#endif
}

// dWx (+)=, dw +=, db += the parts in order. A thread is four channels of a row of (K + 5, e).
template <int THREADS>
__global__ void x_proj_conv_add_kernel(float* dw_x, float* dw, float* db, const __grid_constant__ XProjConv p, int block_channels, bool add) {
    const int64_t i = (blockIdx.x * (int64_t)THREADS + threadIdx.x) * 4, row_size = p.e, all = (p.width + CONV_WIDTH + 1) * row_size;
    if (i >= all) return;
    const int k = (int)(i / row_size) - p.width, c = (int)(i % row_size);
    const int parts = (int)(p.last_block(c / block_channels) - p.first_block(c / block_channels)) + 1;
    float sum[4] = {};
    for (int n = 0; n < parts; n++) {
        const auto v = load_vec<4>(p.part + n * all + i);
#pragma unroll
        for (int j = 0; j < 4; j++) sum[j] += v[j];
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float& to = k < 0 ? dw_x[i + j] : k < CONV_WIDTH ? dw[(c + j) * CONV_WIDTH + k] : db[c + j];
        to = k < 0 && !add ? sum[j] : to + sum[j];
    }
}

constexpr int X_PROJ_CONV_GROUPS = 2;

inline size_t x_proj_conv_workspace(int e, int K) {
    const int64_t columns = ceil_div(e, 64 * X_PROJ_CONV_GROUPS), parts = multiprocessors() / columns + 2;       // a column's, at most
    return (size_t)parts * (K + CONV_WIDTH + 1) * e * sizeof(float);
}

// Do the kernels take these sizes and addresses (null: not given) on this GPU?
inline bool x_proj_conv_usable(std::initializer_list<const void*> arrays, int64_t lddx, int64_t ldx, int64_t T, int e, int K) {
    return conv_vectors(arrays, {lddx, ldx, K, T}, 8) && e % 64 == 0 && K <= 256 && T < (int64_t)1 << 30 && usable();
}

// An array as boxes: 64 columns, then dimensions of sizes[] elements, strides[] elements apart, `box` of each
inline CUtensorMap box_map(const bf16* p, int columns, const int64_t (&sizes)[4], const int64_t (&strides)[4], const int (&box)[4]) {
    CUtensorMap map;
    cuuint64_t size[5] = {(cuuint64_t)columns}, stride[4];
    cuuint32_t edge[5] = {64}, steps[5] = {1, 1, 1, 1, 1};
    for (int i = 0; i < 4; i++) size[i + 1] = sizes[i], stride[i] = strides[i] * sizeof(bf16), edge[i + 1] = box[i];
    const CUresult status = encode_tiled()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 5, const_cast<bf16*>(p), size, stride, edge, steps,
                                           CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                           CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS) fail("x_proj and conv1d backward: cuTensorMapEncodeTiled says %d", (int)status);
    return map;
}
// (B,T,e) in rows of ld, as boxes of 8 rows of 64 columns for each of `groups`
inline CUtensorMap group_map(const bf16* p, int e, int64_t ld, int64_t T, int B, int groups) {
    return box_map(p, 64, {1, T, e / 64, B}, {ld, ld, 64, T * ld}, {1, 8, groups, 1});
}
// Wx (K,e) as boxes of all rows
inline CUtensorMap w_x_map(const bf16* p, int K, int e) {
    return box_map(p, e, {1, K, 1, 1}, {e, e, e, e}, {1, (int)round_up(K, 64), 1, 1});
}
// dx_dbl (B,T,K): row 8q + 2j + i is (i, q, j), which is the order of a box's rows
inline CUtensorMap x_dbl_map(const bf16* p, int K, int64_t T, int B) {
    return box_map(p, K, {2, T / 8, 4, B}, {K, 8 * (int64_t)K, 2 * (int64_t)K, T * K}, {2, 4, 4, 1});
}

inline void x_proj_conv(float* dw_x, bool accumulate, float* dw, float* db, XProjConv p, const bf16* du, const bf16* dx_dbl, const bf16* w_x,
                        const bf16* x, int64_t ldx, void* workspace, int B, Stream stream) {
    const XProjConvMaps maps{x_dbl_map(dx_dbl, p.width, p.T, B), group_map(x, p.e, ldx, p.T, B, X_PROJ_CONV_GROUPS),
                             group_map(du, p.e, p.e, p.T, B, X_PROJ_CONV_GROUPS), w_x_map(w_x, p.width, p.e)};
    p.columns = (int)ceil_div(p.e, 64 * X_PROJ_CONV_GROUPS), p.part = (float*)workspace;
    p.tiles = ceil_div(p.T, X_PROJ_CONV_ROWS), p.all_tiles = B * p.tiles, p.share = ceil_div(p.columns * p.all_tiles, multiprocessors());
    const auto launch = [&]<int KP>() {
        constexpr int GROUPS = X_PROJ_CONV_GROUPS, STAGES = 4, SHARED = XProjConvShared<KP, GROUPS, STAGES>::BYTES;
        const auto kernel = x_proj_conv_kernel<KP, GROUPS, STAGES>;
        CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED));
        kernel<<<(unsigned)ceil_div(p.columns * p.all_tiles, p.share), (GROUPS + 1) * WARPGROUP, SHARED, stream>>>(p, maps);
        LAUNCH_CHECK();
    };
    if (p.width <= 64) launch.operator()<64>();
    else if (p.width <= 128) launch.operator()<128>();
    else if (p.width <= 192) launch.operator()<192>();
    else launch.operator()<256>();
    constexpr int THREADS = 256;
    const unsigned blocks = (unsigned)ceil_div((int64_t)(p.width + CONV_WIDTH + 1) * p.e, 4 * THREADS);
    x_proj_conv_add_kernel<THREADS><<<blocks, THREADS, 0, stream>>>(dw_x, dw, db, p, 64 * X_PROJ_CONV_GROUPS, accumulate);
    LAUNCH_CHECK();
}

} // namespace sm90

inline size_t x_proj_conv_backward_workspace(int B, int64_t T, int e, int K) {
    return std::max(conv1d_backward_workspace(B, T, e), sm90::x_proj_conv_workspace(e, K));
}

inline void x_proj_conv_backward(Matmul& matmul, floatX* dx /*(B,T,e), row stride lddx*/, int64_t lddx, float* dw_x /*(K,e)*/,
                                 bool accumulate /*dw_x += or dw_x =*/, float* dw /*(e,4) +=*/, float* db /*(e) +=*/,
                                 floatX* du /*(B,T,e): the scan's; may be overwritten*/, const floatX* dx_dbl /*(B,T,K)*/,
                                 const floatX* w_x /*(K,e)*/, const floatX* u /*(B,T,e)*/, const floatX* x /*(B,T,e), row stride ldx*/, int64_t ldx,
                                 const floatX* halo_in /*(B,3,e) or null*/, const float* w, const float* b, void* workspace, int B, int64_t T,
                                 int e, int K, Stream stream) {
    const int64_t BT = B * T;
    if (sizeof(floatX) == 2 && sm90::x_proj_conv_usable({dx, dw_x, du, dx_dbl, w_x, x, halo_in, workspace}, lddx, ldx, T, e, K)) {
        const double bytes = BYTES * (3.0 * BT * e + (double)BT * K + (double)K * e) + (accumulate ? 8.0 : 4.0) * K * e;
        const Operation op("x_proj, conv1d backward", bytes, 4.0 * BT * e * K, stream);
        using sm90::bf16;                                                     // which floatX is here; the float build must compile this too
        const sm90::XProjConv p{.dx = (bf16*)dx, .halo = (const bf16*)halo_in, .lddx = lddx, .w = w, .b = b,
                                .T = T, .e = e, .width = K};
        sm90::x_proj_conv(dw_x, accumulate, dw, db, p, (const bf16*)du, (const bf16*)dx_dbl, (const bf16*)w_x, (const bf16*)x, ldx, workspace, B,
                          stream);
        return;
    }
    matmul_dgrad(matmul, du, e, dx_dbl, K, w_x, BT, K, e, true, stream);
    matmul_wgrad(matmul, dw_x, dx_dbl, K, u, e, BT, K, e, accumulate, stream);
    conv1d_backward(dx, lddx, dw, db, du, x, ldx, halo_in, w, b, workspace, B, T, e, stream);
}

} // namespace gpu
