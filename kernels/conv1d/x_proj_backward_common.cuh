// What the parts of the kernel of x_proj_backward_sm90.cuh share: its sizes, places in shared memory, the order of tiles, and instructions.
#pragma once
#include "../conv1d.cuh"
#include "../hopper.cuh"

namespace gpu::sm90 {

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
#endif // SAMBA_SM90A_CODE

} // namespace gpu::sm90
