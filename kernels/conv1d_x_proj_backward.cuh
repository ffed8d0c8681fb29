// Backward of the Mamba layer's convolution and of x_proj, which reads its result u = silu(s), s = conv(x). K = R + 2N is x_proj's width:
//   du  += dx_dbl Wx                                             (B,T,K) (K,e): the gradient of u is the scan's and x_proj's
//   dWx (+)= dx_dbl^T u                                          (K,B,T) (B,T,e)
//   dx, dw, db of the convolution from du                        conv1d.cuh
// Each of the three reads or writes arrays of (B,T,e) and little else. On Hopper in bf16 they are one kernel, which makes s and u again from
// x and keeps du in registers; elsewhere, and for sizes that it does not take (T, e, K or row strides no multiples of 8, K > 256), they are two
// products of cuBLASLt and a pass over memory.
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
// The order of a product's rows and columns is ours to choose. Lane (g = lane / 4, q = lane % 4) of a warp has channels 2g and 2g + 1 of the
// warp's 16 and rows 8q to 8q + 7 of the tile: as results of the first product, as the walk through time wants them, and as operand of the second:
//   product row    16 w + g, 16 w + 8 + g             channel 16 w + 2g, 16 w + 2g + 1
//   product column 8 j + 2q + i                       tile row 8q + 2j + i
// TMA brings the rows of dx_dbl in that order. The three rows of x before a lane's come from shared memory, ds of the three after from the lane
// beside it.
constexpr int UNMIX_ROWS = 32;

struct XProjConv {
    bf16* dx;
    const bf16 *halo, *w_x;                            // halo (B,3,e), or null for zeros
    int64_t lddx;
    const float *w, *b;
    float* part;                                       // (parts, K + 5, e): of dWx, dw, db
    int64_t T, tiles, all_tiles, share;                // tiles: of a sequence; share: of a block, of the tiles of all columns of blocks
    int e, width, columns;                             // width: K
    // The first and the last block that has tiles of a column
    __host__ __device__ int64_t first_block(int64_t column) const { return column * all_tiles / share; }
    __host__ __device__ int64_t last_block(int64_t column) const { return ((column + 1) * all_tiles - 1) / share; }
};
// As boxes of 64 columns: of 32 rows of dx_dbl, of 3 and of 8 rows of x, of 8 rows of du
struct XProjConvMaps { CUtensorMap dx_dbl, x_before, x, du; };

// A stage is a tile of dx_dbl, in the form of hopper.cuh, and for each warpgroup x and du: rows of 128 bytes, eight and a gap of two, so that the
// rows 8q + r of a warp lie in different banks. In front of x, where rows 5 to 7 of eight more were, the three rows before the tile.
template <int KP, int GROUPS, int STAGES> struct XProjConvShared {
    static constexpr int PITCH = 10 * 128, X_BEFORE = 5 * 128, X = PITCH, DU = X + 4 * PITCH, GROUP = 11 * 1024;
    static constexpr int DX_DBL_BYTES = KP * UNMIX_ROWS * 2, STAGE = DX_DBL_BYTES + GROUPS * GROUP;
    static constexpr int LOADED = DX_DBL_BYTES + GROUPS * (2 * UNMIX_ROWS + CONV_HALO) * 128;
    static constexpr int W_X = STAGES * STAGE, BARRIERS = W_X + GROUPS * KP * 128, BYTES = BARRIERS + 2 * STAGES * 8;
};

#ifdef SAMBA_SM90A_CODE
__device__ inline void tma_load(uint32_t to, const CUtensorMap* map, uint32_t bar, int column, int row, int sequence) {
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %6, %4, %6, %5}], [%2];"
                 ::"r"(to), "l"(map), "r"(bar), "r"(column), "r"(row), "r"(sequence), "r"(0) : "memory");
}
// c (64, 32) += a b, both along rows
__device__ inline void wgmma_rows(float (&c)[16], uint64_t a, uint64_t b) {
    asm volatile(SM90_ADD("1") "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, "
                 "%16, %17, add, 1, 1, 0, 0;\n}" : SM90_F8("+f", c, 0), SM90_F8("+f", c, 8) : "l"(a), "l"(b));
}
__device__ inline uint32_t load_word(uint32_t at) {
    uint32_t v;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
    return v;
}
__device__ inline void store_word_if(bool wanted, void* to, uint32_t v) {          // no branch
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p st.global.b32 [%1], %2;\n}" ::"r"((int)wanted), "l"(to), "r"(v) : "memory");
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
    for (Cursor<STAGES> cursor; n < end;) {
        TileWalk walk(p, n, end);
        for (n += walk.own(); walk.count > 0; walk.back(), cursor.next()) {
            cursor.wait_empty(ring);
            const uint32_t bar = cursor.full_bar(ring), stage = cursor.tile(ring);
            const int t = walk.tile * UNMIX_ROWS, sequence = (int)walk.sequence;
            barrier_expect(bar, Shared::LOADED);
            for (int k = 0; k < KP; k += 64) tma_load(stage + k * UNMIX_ROWS * 2, &maps.dx_dbl, bar, k, t / 8, sequence);
            for (int group = 0; group < GROUPS; group++) {
                const uint32_t to = stage + Shared::DX_DBL_BYTES + group * Shared::GROUP;
                const int channel = ((int)walk.column * GROUPS + group) * 64;
                tma_load(to + Shared::X_BEFORE, &maps.x_before, bar, channel, t - CONV_HALO, sequence);
                for (int r = 0; r < 4; r++) {
                    tma_load(to + Shared::X + r * Shared::PITCH, &maps.x, bar, channel, t + 8 * r, sequence);
                    tma_load(to + Shared::DU + r * Shared::PITCH, &maps.du, bar, channel, t + 8 * r, sequence);
                }
            }
        }
    }
}

template <int KP, int GROUPS, int STAGES> struct XProjConvConsumer {
    using Shared = XProjConvShared<KP, GROUPS, STAGES>;
    static constexpr int THREADS = GROUPS * WARPGROUP, C = 64 * GROUPS;
    const XProjConv& p;
    const Ring<STAGES>& ring;
    Cursor<STAGES> cursor;
    const int thread = threadIdx.x - WARPGROUP, lane = thread % WARP, g = lane / 4, q = lane % 4;
    const int warp = __shfl_sync(0xffffffffu, thread / WARP, 0);
    int channel;                                       // the first of the lane's two
    float w[2][CONV_WIDTH], b[2];
    float sums[KP / 2], dw[2][CONV_WIDTH], db[2];      // sums: dWx^T
    float later[2][CONV_HALO];                         // ds of the lane's first three rows of the tile before
    uint32_t u[2][4];                                  // of the tile, as an operand
    uint32_t places[8];                                // of the lane's rows of x, in a stage
    bf16* dx;                                          // the lane's first row

    __device__ XProjConvConsumer(const XProjConv& p, const Ring<STAGES>& ring) : p(p), ring(ring) {
#pragma unroll
        for (int r = 0; r < 8; r++) {
            const int row = (q + 1) * 10 + r, chunk = warp % 4 * 2 + g / 4;
            places[r] = Shared::DX_DBL_BYTES + warp / 4 * Shared::GROUP + row * 128 + (chunk ^ row % 8) * 16 + g % 4 * 4;
        }
    }

    // Wx^T as operand a, columns from K on zeros
    __device__ void load_weights(int64_t column) {
        for (int i = thread; i < KP * C / 2; i += THREADS) {
            const int k = i / (C / 2), c = i % (C / 2) * 2, from = (int)column * C + c, row = c / 16 * 16 % 64 + c % 16 / 2;
            const uint32_t v = k < p.width && from < p.e ? *(const uint32_t*)(p.w_x + (int64_t)k * p.e + from) : 0u;
            unsigned char* to = sm90_shared + Shared::W_X + c / 64 * KP * 128 + k / 64 * 64 * 128 + (k % 64 / 8 ^ row % 8) * 16 + k % 8 * 2;
            *(uint16_t*)(to + row * 128) = (uint16_t)v;
            *(uint16_t*)(to + (row + 8) * 128) = (uint16_t)(v >> 16);
        }
#pragma unroll
        for (int c = 0; c < 2; c++) {
            b[c] = channel < p.e ? p.b[channel + c] : 0.f;
#pragma unroll
            for (int k = 0; k < CONV_WIDTH; k++) w[c][k] = channel < p.e ? p.w[(int64_t)(channel + c) * CONV_WIDTH + k] : 0.f;
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
        const uint64_t a = descriptor(shared_address(sm90_shared) + Shared::W_X + warp / 4 * KP * 128, 0), b = descriptor(dx_dbl, 0);
        hold(du);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < KP / 16; k++)
            wgmma_rows(du, a + (k / 4 * 64 * 128 + k % 4 * 32) / 16, b + (k / 4 * UNMIX_ROWS * 128 + k % 4 * 32) / 16);
        wgmma_commit();
        hold(du);
    }
    // dWx^T += u^T dx_dbl, not waited for: 128 columns at a time, and 64
    __device__ void add_weight_gradient(uint32_t dx_dbl) {
        const uint64_t b = descriptor(dx_dbl, UNMIX_ROWS * 128);
        hold(sums), hold(u);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 2; k++)
#pragma unroll
            for (int n = 0; n < KP; n += 128) {
                const uint64_t at = b + (n / 64 * UNMIX_ROWS * 128 + k * 2048) / 16;
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

    __device__ void load_halo(uint32_t (&x)[CONV_HALO + 8], int64_t sequence) const {
        asm volatile("" ::: "memory");                 // a branch where this is called
        if (q == 0 && channel < p.e)
#pragma unroll
            for (int r = 0; r < CONV_HALO; r++) x[r] = *(const uint32_t*)(p.halo + (sequence * CONV_HALO + r) * p.e + channel);
    }

    // The tile that has arrived. rows: so many of the lane's dx are stored
    __device__ void tile(bool at_start, int64_t sequence, int rows) {
        const uint32_t stage = __shfl_sync(0xffffffffu, cursor.tile(ring), 0);   // one for a warp: the compiler must see it
        float du[16], factor[2][8];                                        // factor: ds = du factor
        uint32_t x[CONV_HALO + 8];                                         // two channels a word
#pragma unroll
        for (int r = 0; r < 8; r++) {
            const uint32_t v = load_word(stage + places[r] + (Shared::DU - Shared::X));
            du[at(0, r)] = low_half(v), du[at(1, r)] = high_half(v);
        }
        add_x_proj(du, stage);
#pragma unroll
        for (int r = 0; r < CONV_HALO; r++) x[r] = load_word(stage + places[CONV_HALO + r] - 8 * 128);
#pragma unroll
        for (int r = 0; r < 8; r++) x[CONV_HALO + r] = load_word(stage + places[r]);
        if (at_start && p.halo) load_halo(x, sequence);
        auto x_of = [&](int c, int r) { return c ? high_half(x[r]) : low_half(x[r]); };
#pragma unroll
        for (int c = 0; c < 2; c++)
#pragma unroll
            for (int r = 0; r < 8; r += 2) {
                float y[2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float s = b[c];
#pragma unroll
                    for (int k = 0; k < CONV_WIDTH; k++) s = fmaf(w[c][k], x_of(c, r + i + k), s);
                    const float gate = scan_sigmoid<bf16>(s);
                    y[i] = s * gate;
                    factor[c][r + i] = fmaf(y[i], 1.f - gate, gate);       // gate (1 + s (1 - gate))
                }
                u[r / 4][r % 4 + c] = pack(y[0], y[1]);
            }
        add_weight_gradient(stage);
        wgmma_wait<1>();
        hold(du);
        float ds[2][8 + CONV_HALO];
#pragma unroll
        for (int c = 0; c < 2; c++) {
#pragma unroll
            for (int r = 0; r < 8; r++) {
                ds[c][r] = du[at(c, r)] * factor[c][r];
                db[c] += ds[c][r];
#pragma unroll
                for (int k = 0; k < CONV_WIDTH; k++) dw[c][k] = fmaf(ds[c][r], x_of(c, r + k), dw[c][k]);
            }
            // ds of the three rows after: of the next lane, or of the first lane in the tile before
#pragma unroll
            for (int k = 0; k < CONV_HALO; k++) {
                ds[c][8 + k] = __shfl_sync(0xffffffffu, q == 0 ? later[c][k] : ds[c][k], (lane & ~3) | ((lane + 1) & 3));
                later[c][k] = ds[c][k];
            }
        }
#pragma unroll
        for (int r = 0; r < 8; r++) {
            float y[2] = {};
#pragma unroll
            for (int c = 0; c < 2; c++)
#pragma unroll
                for (int k = 0; k < CONV_WIDTH; k++) y[c] = fmaf(w[c][k], ds[c][r + CONV_HALO - k], y[c]);
            store_word_if(r < rows, dx + r * p.lddx, pack(y[0], y[1]));
        }
    }

    // One column's tiles, and the part of its sums
    __device__ void run(TileWalk walk) {
        channel = (int)walk.column * C + warp * 16 + 2 * g;
        dx = p.dx + (walk.sequence * p.T + walk.tile * (int64_t)UNMIX_ROWS + 8 * q) * p.lddx + channel;
        const int last_rows = (int)(p.T - walk.last_tile * (int64_t)UNMIX_ROWS);
        named_sync(1, THREADS);                                            // nobody reads the weights of the column before
        load_weights(walk.column);
        fence_async();
        named_sync(1, THREADS);
        clear();
#pragma unroll
        for (int k = 0; k < CONV_HALO; k++) later[0][k] = later[1][k] = 0.f;
        bool own = !walk.extra;
        Cursor<STAGES> before{-1};
        while (walk.count > 0) {
            const int rows = (walk.tile == walk.last_tile ? last_rows : UNMIX_ROWS) - 8 * q;
            cursor.wait_full(ring);
            if (before.stage >= 0) wait_for_products(), before.release(ring);  // of the tile before: they have had its walk's time
            tile(walk.tile == 0, walk.sequence, own && channel < p.e ? rows : 0);
            before = cursor;
            cursor.next();
            if (!own) wait_for_products(), clear(), own = true;
            dx -= UNMIX_ROWS * p.lddx;
            if (walk.back()) {                                             // nothing comes after a sequence's last row
                dx += (UNMIX_ROWS - last_rows) * p.lddx;
#pragma unroll
                for (int k = 0; k < CONV_HALO; k++) later[0][k] = later[1][k] = 0.f;
            }
        }
        wait_for_products();
        before.release(ring);
        if (channel < p.e) store_part(p.part + (blockIdx.x - p.first_block(walk.column)) * (p.width + CONV_WIDTH + 1) * p.e + channel);
    }

    __device__ void store_part(float* to) {                                // by whole groups of four lanes
#pragma unroll
        for (int n = 0; n < KP / 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int k = 8 * n + 2 * q + i;
                if (k < p.width) *(float2*)(to + (int64_t)k * p.e) = make_float2(sums[4 * n + i], sums[4 * n + 2 + i]);
            }
        const unsigned lanes = __activemask();
#pragma unroll
        for (int k = 0; k <= CONV_WIDTH; k++) {
            float v[2];
#pragma unroll
            for (int c = 0; c < 2; c++) {
                v[c] = k < CONV_WIDTH ? dw[c][k % CONV_WIDTH] : db[c];
                v[c] += __shfl_xor_sync(lanes, v[c], 1);
                v[c] += __shfl_xor_sync(lanes, v[c], 2);
            }
            if (q == 0) *(float2*)(to + (int64_t)(p.width + k) * p.e) = make_float2(v[0], v[1]);
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
    const Ring<STAGES> ring{shared, shared + Shared::BARRIERS, Shared::STAGE};
    if (threadIdx.x == 0) ring.init(GROUPS * WARPGROUP / WARP), barrier_init_done();
    __syncthreads();
    int64_t n = blockIdx.x * p.share;
    const int64_t end = min(n + p.share, p.columns * p.all_tiles);
    if (threadIdx.x < WARPGROUP) {
        registers_down<24>();
        if (threadIdx.x == 0) x_proj_conv_produce<KP, GROUPS, STAGES>(p, maps, ring, n, end);
    } else {
        registers_up<GROUPS == 2 ? 240 : 232>();
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
    const int64_t columns = ceil_div(e, 64 * X_PROJ_CONV_GROUPS), parts = scan_processors() / columns + 2;       // a column's, at most
    return (size_t)parts * (K + CONV_WIDTH + 1) * e * sizeof(float);
}

// Do the kernels take these sizes and addresses (null: not given) on this GPU?
inline bool x_proj_conv_usable(std::initializer_list<const void*> arrays, int64_t lddx, int64_t ldx, int64_t T, int e, int K) {
    return conv_vectors(arrays, {e, lddx, ldx, K, T}, 8) && K <= 256 && T < (int64_t)1 << 30 && usable();
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
// (B,T,columns) in rows of ld, as boxes of `rows`
inline CUtensorMap row_map(const bf16* p, int columns, int64_t ld, int64_t T, int B, int rows) {
    return box_map(p, columns, {1, T, 1, B}, {ld, ld, ld, T * ld}, {1, rows, 1, 1});
}
// dx_dbl (B,T,K): row 8q + 2j + i is (i, q, j), which is the order of a box's rows
inline CUtensorMap x_dbl_map(const bf16* p, int K, int64_t T, int B) {
    return box_map(p, K, {2, T / 8, 4, B}, {K, 8 * (int64_t)K, 2 * (int64_t)K, T * K}, {2, 4, 4, 1});
}

inline void x_proj_conv(float* dw_x, bool accumulate, float* dw, float* db, XProjConv p, const bf16* du, const bf16* dx_dbl, const bf16* x,
                        int64_t ldx, void* workspace, int B, Stream stream) {
    const XProjConvMaps maps{x_dbl_map(dx_dbl, p.width, p.T, B), row_map(x, p.e, ldx, p.T, B, CONV_HALO), row_map(x, p.e, ldx, p.T, B, 8),
                             row_map(du, p.e, p.e, p.T, B, 8)};
    p.columns = (int)ceil_div(p.e, 64 * X_PROJ_CONV_GROUPS), p.part = (float*)workspace;
    p.tiles = ceil_div(p.T, UNMIX_ROWS), p.all_tiles = B * p.tiles, p.share = ceil_div(p.columns * p.all_tiles, scan_processors());
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
        const sm90::XProjConv p{.dx = (bf16*)dx, .halo = (const bf16*)halo_in, .w_x = (const bf16*)w_x, .lddx = lddx, .w = w, .b = b,
                                .T = T, .e = e, .width = K};
        sm90::x_proj_conv(dw_x, accumulate, dw, db, p, (const bf16*)du, (const bf16*)dx_dbl, (const bf16*)x, ldx, workspace, B, stream);
        return;
    }
    matmul_dgrad(matmul, du, e, dx_dbl, K, w_x, BT, K, e, true, stream);
    matmul_wgrad(matmul, dw_x, dx_dbl, K, u, e, BT, K, e, accumulate, stream);
    conv1d_backward(dx, lddx, dw, db, du, x, ldx, halo_in, w, b, workspace, B, T, e, stream);
}

} // namespace gpu
