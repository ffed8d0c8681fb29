// RoPE behind the product that makes queries, keys and values, for Hopper (gemm_sm90.cuh has the product), bf16:
//   qkv (M, (H + 2G) hd) = n (M,d) w^T      then in the query and key heads, for j < hd/2, of each row with the angles of position row % T:
//   x1 = qkv_j, x2 = qkv_(j + hd/2):        qkv_j = x1 cos - x2 sin        qkv_(j + hd/2) = x1 sin + x2 cos
// The product is rounded to bf16 before it is turned, in fp32, and rounded once more: rope_forward would make the same bits of it.
//
// The 256 columns of a tile are whole heads, 4, 2 or 1, so both parts of a pair lie in the tile. The warps that finish it read 8 pairs a lane: two
// times 16 bytes of each head from shared memory, and their cosines and sines, 64 bytes, once for all heads of the tile. Value heads pass.
//
// Samba-421M (M 32768, d 1536, 12 + 12 + 12 heads of 128): 464 GFLOP, 0.47 ms at the nominal 989 TFLOP/s; bytes 2 M (d + (H + 2G) hd) +
// 2 d (H + 2G) hd = 0.42 GB, 0.14 ms at 3 TB/s, where the separate pass moves 0.40 GB more, 0.13 ms. From L2: 786 KB a tile of both operands and
// 64 KB of the table (32 KB where heads are of 64, 128 KB of 256), 3.9 GB in all. A cluster has 35 tiles of 24,600 clocks of products and 1,500 until
// they are handed over, then the last one's end, 6,000: 0.66 ms at 1.4 GHz, about what the power limit leaves such products.
// Measured on an H100 at 700 W (dev/results/2026-11-28_h100): 0.691 ms; cuBLASLt's product and then the pass 0.788, its product alone 0.641.
#pragma once
#include "../rope.cuh"
#include "gemm_sm90.cuh"

namespace gpu::sm90 {

#ifdef SAMBA_SM90A_CODE
// Two neighbouring pairs by their angles: cosine, sine, cosine, sine
__device__ inline uint2 rope_pairs(uint32_t first, uint32_t second, const float4& angles) {
    const float2 x1 = floats(first), x2 = floats(second);
    const float2 y = rope_pair(x1.x, x2.x, angles.x, angles.y), z = rope_pair(x1.y, x2.y, angles.z, angles.w);
    return make_uint2(pack(y.x, z.x), pack(y.y, z.y));
}
// Eight
__device__ inline void rope_turn(uint4& x1, uint4& x2, const float4 (&angles)[4]) {
    const uint2 y0 = rope_pairs(x1.x, x2.x, angles[0]), y1 = rope_pairs(x1.y, x2.y, angles[1]);
    const uint2 y2 = rope_pairs(x1.z, x2.z, angles[2]), y3 = rope_pairs(x1.w, x2.w, angles[3]);
    x1 = make_uint4(y0.x, y1.x, y2.x, y3.x), x2 = make_uint4(y0.y, y1.y, y2.y, y3.y);
}
#endif

template <int HD> struct RopeForward {
    static constexpr bool BACKWARD = false;
    static constexpr int CLOCKS = 1500;
    static constexpr int HEADS = GEMM_N / HD, LANES = HD / 16, ROWS = WARP / LANES;      // of a tile; that share a row; of a warp at a time
    bf16* qkv;
    const float* table;                                                   // (T, hd/2, 2)
    int T, heads_per_group;                                               // with the group's key and value: H/G + 2
#ifdef SAMBA_SM90A_CODE
    __device__ static int right_row(const GemmTile& tile, int rank, const GemmSize&) { return tile.column * GEMM_N + rank * GEMM_N / 2; }

    // Which of a warp's rows a lane has. Eight lanes read 128 bytes at a time, which must lie in different banks: where four have a row, the next
    // four have the row 4 further, whose chunks lie elsewhere (GemmShared::place)
    __device__ static int row_of(int lane) { return LANES == 4 ? lane / 4 % 2 * 4 + lane / 8 : lane / LANES; }

    __device__ void finish(const GemmShared<false>& shared, const GemmTile& tile, const GemmSize& s, int finisher, int lane) const {
        const int chunk = lane % LANES, heads = min(HEADS, s.columns / HD - tile.column * HEADS);
        bool turned[HEADS];                                               // not a value
#pragma unroll
        for (int h = 0; h < HEADS; h++) turned[h] = (tile.column * HEADS + h) % heads_per_group != heads_per_group - 1;
#pragma unroll 2
        for (int rows = finisher; rows < GEMM_M / ROWS; rows += GEMM_FINISHERS) {
            const int row = rows * ROWS + row_of(lane);
            float4 angles[4];
            uint4 x1[HEADS], x2[HEADS];
#pragma unroll
            for (int i = 0; i < 4; i++) angles[i] = __ldg((const float4*)(table + (int64_t)((tile.row + row) % T) * HD + chunk * 16) + i);
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                x1[h] = load_shared(shared.place(row, h * HD / 8 + chunk)), x2[h] = load_shared(shared.place(row, h * HD / 8 + LANES + chunk));
                if (turned[h]) rope_turn(x1[h], x2[h], angles);
            }
            if (tile.row + row >= s.M) continue;
            bf16* const out = qkv + (int64_t)(tile.row + row) * s.columns + tile.column * GEMM_N + chunk * 8;
#pragma unroll
            for (int h = 0; h < HEADS; h++)
                if (h < heads) *(uint4*)(out + h * HD) = x1[h], *(uint4*)(out + h * HD + HD / 2) = x2[h];
        }
    }
#endif
};

// Does the kernel take these sizes and addresses on this GPU?
inline bool rope_gemm_usable(std::initializer_list<const void*> arrays, int64_t M, int64_t T, int H, int G, int hd, int d) {
    return (hd == 64 || hd == 128 || hd == 256) && G > 0 && H % G == 0 && T > 0 && gemm_usable(arrays, M, d);
}

// qkv (M, (H + 2G) hd), packed by group, from n (M,d), w ((H + 2G) hd, d) and the angles of T positions
inline void rope_gemm_forward(bf16* qkv, const bf16* n, const bf16* w, const float* table, int64_t M, int64_t T, int H, int G, int hd, int d,
                              Stream stream) {
    const int columns = (H + 2 * G) * hd, heads_per_group = H / G + 2, column_tiles = ceil_div(columns, GEMM_N);
    const CUtensorMap left = matrix_map(n, M, d, GEMM_M), right = matrix_map(w, columns, d, GEMM_N / 2);
    const auto launch = [&](auto epilogue) { launch_gemm(left, right, epilogue, M, columns, d, column_tiles, stream); };
    if (hd == 64) launch(RopeForward<64>{qkv, table, (int)T, heads_per_group});
    else if (hd == 128) launch(RopeForward<128>{qkv, table, (int)T, heads_per_group});
    else launch(RopeForward<256>{qkv, table, (int)T, heads_per_group});
}

} // namespace gpu::sm90
