// What the warpgroups of x_proj_backward_sm90.cuh do with a tile: its two products, the convolution's backward pass between them, and the sums.
#pragma once
#include "x_proj_backward_common.cuh"

namespace gpu::sm90 {

#ifdef SAMBA_SM90A_CODE
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

} // namespace gpu::sm90
