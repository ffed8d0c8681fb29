// Backward of the convolution and of x_proj (conv1d_x_proj_backward.cuh) as one kernel, for Hopper (code built for sm_90a), bf16.
//
// A block is 64 channels a warpgroup, and a producer. It walks up its share of the rows of all sequences, from the last to the first, in tiles of
// 32: dx of a row needs ds of the three rows after it, which the tile before has left in registers. What a block begins with, unless a
// sequence ends there, is the tile after its share, for these three rows alone.
//   du^T  (64,32) += Wx^T (64,K) dx_dbl^T (K,32)      Wx in shared memory all the time
//   dWx^T (64,K)  += u^T (64,32) dx_dbl (32,K)        u from registers, the sum in registers over all rows of the block
// The order of the products' tile rows is ours to choose. Lane (g = lane / 4, q = lane % 4) of a warp has channels g and g + 8 of the warp's 16 and
// rows 8q to 8q + 7 of the tile: as results of the first product, as the walk through time wants them, and as operand of the second. For that
// row 8q + 2j + i of the tile is column 8j + 2q + i of the first product, and TMA brings the rows of dx_dbl in that order. x, du and dx are moved
// by 8 x 8 matrices of the rows 2j, 2j + 1 of all q. ds of the three rows after a lane's comes from the lane beside it.
//
// x_proj_backward_common.cuh: sizes, places in shared memory. x_proj_backward_consumer.cuh: what a warpgroup does with a tile.
#pragma once
#include "x_proj_backward_consumer.cuh"

namespace gpu::sm90 {

#ifdef SAMBA_SM90A_CODE
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

constexpr const char* X_PROJ_CONV = "x_proj and conv1d backward";         // in errors

// (B,T,e) in rows of ld, as boxes of 8 rows of 64 columns for each of `groups`
inline CUtensorMap group_map(const bf16* p, int e, int64_t ld, int64_t T, int B, int groups) {
    return box_map(X_PROJ_CONV, p, 64, {1, T, e / 64, B}, {ld, ld, 64, T * ld}, {1, 8, groups, 1});
}
// Wx (K,e) as boxes of all rows
inline CUtensorMap w_x_map(const bf16* p, int K, int e) {
    return box_map(X_PROJ_CONV, p, e, {1, K, 1, 1}, {e, e, e, e}, {1, (int)round_up(K, 64), 1, 1});
}
// dx_dbl (B,T,K): row 8q + 2j + i is (i, q, j), which is the order of a box's rows
inline CUtensorMap x_dbl_map(const bf16* p, int K, int64_t T, int B) {
    return box_map(X_PROJ_CONV, p, K, {2, T / 8, 4, B}, {K, 8 * (int64_t)K, 2 * (int64_t)K, T * K}, {2, 4, 4, 1});
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

} // namespace gpu::sm90
