// The Hopper attention kernel of the backward pass that makes dq from score gradients that were kept. The scheme: attention_sm90.cuh.
#pragma once
#include "sm90_common.cuh"

#ifdef __CUDACC__
namespace gpu {
namespace sm90 {

// dq = dS K from the blocks that backward_keys kept: a block owns 128 queries of a head, a step is a tile of 128 keys and the up to
// four blocks of dS of it. Bound by reading dS: 32 KB for 2 x 2^20 multiply-adds at head_dim 128.
constexpr int PRODUCT_STAGES = 3;
constexpr int DS_BYTES = attn::DS_BLOCK * 2;
// ring of K | dS of consumer 0, lower and upper | of consumer 1; staging of dq; barriers
template <int HD> constexpr int backward_product_shared() {
    return PRODUCT_STAGES * (TILE_BYTES<HD> + 4 * DS_BYTES) + TILE_BYTES<HD> + 16 * PRODUCT_STAGES;
}

#ifdef SAMBA_SM90A_CODE
using ProductRing = Ring<PRODUCT_STAGES>;

template <int HD> __device__ inline void product_produce(const ProductRing& ring, const CUtensorMap* qkv_map, const Problem& a) {
    const int slots = a.H / a.G + 2;
    results_wait();                                                      // dS
    for (int n = 0, round = 0, item; (item = item_of_round(a.schedule, round)) < a.schedule.items; round++) {
        const QueryWork work = query_work(a, item);
        for (int j = 0; j < work.count; j++, n++) {
            const int n0 = work.i0 - j * ROWS;
            int parts[2];
#pragma unroll
            for (int c = 0; c < 2; c++) parts[c] = work.i0 + c * 64 < a.T ? parts_of(c, work, n0) : 0;
            const uint32_t bar = ring.full_bar(n);
            ring.wait_empty(n);
            barrier_expect(bar, TILE_BYTES<HD> + (__popc(parts[0]) + __popc(parts[1])) * DS_BYTES);
            load_tile<HD, ROWS, ROWS>(ring.tile(n), bar, qkv_map, work.h / (slots - 2) * slots + slots - 2, n0, work.b);
#pragma unroll
            for (int c = 0; c < 2; c++)
#pragma unroll
                for (int half = 0; half < 2; half++)
                    if (parts[c] >> half & 1)
                        bulk_load(ring.tile(n) + TILE_BYTES<HD> + (c * 2 + half) * DS_BYTES,
                                  a.ds + attn::ds_block(work.owner, work.i0 / 64 + c, n0 / 64 + half, a.T, a.window), DS_BYTES, bar);
        }
    }
}

template <int HD> struct ProductConsumer {
    static constexpr int TILE = TILE_BYTES<HD>;
    const ProductRing& ring;
    const CUtensorMap* dqkv_map;
    const Problem& a;
    const int consumer = which_consumer();
    float dq[HD / 2] = {};

    __device__ void store(const QueryWork& work) {
        unsigned char* staging = sm90_shared + PRODUCT_STAGES * (TILE + 4 * DS_BYTES) + consumer * TILE / 2;
        const float scale = rsqrtf((float)HD);
        const int t = work.i0 + consumer * 64;
        if (threadIdx.x % WARPGROUP == 0) tma_store_wait();              // the last item's store has read the staging tile
        store_gradients(
            consumer, t < a.T,
            [&] {
                const int row = threadIdx.x / WARP % 4 * 16 + threadIdx.x % WARP / 4;
                turn_back(dq, a, {t + attn::ds_query(row), t + attn::ds_query(row + 8)});
                stage_rows<64>(staging, dq, {scale, scale}, [](int position) { return attn::ds_query(position); });
            },
            [&] { store_tile<HD, 64>(dqkv_map, staging, query_slot(a, work.h), t, work.b); });
    }
    __device__ void run() {
        int n = 0;
        for (int round = 0, item; (item = item_of_round(a.schedule, round)) < a.schedule.items; round++) {
            const QueryWork work = query_work(a, item);
            int add = 0;
            for (int j = 0; j < work.count; j++, n++) {
                const int parts = work.i0 + consumer * 64 < a.T ? parts_of(consumer, work, work.i0 - j * ROWS) : 0;
                const uint32_t k_at = ring.tile(n), ds_at = k_at + TILE + consumer * 2 * DS_BYTES;
                ring.wait_full(n);
                if (parts & LOWER) issue_transposed<ROWS>(dq, ds_at, k_at, add), add = 1;
                if (parts & UPPER) issue_transposed<ROWS>(dq, ds_at + DS_BYTES, k_at + 64 * 128, add), add = 1;
                if (j > 0) {
                    if (parts == BOTH) wgmma_wait<2>();                  // the step before is done
                    else wgmma_wait<0>();
                    ring.release(n - 1);
                }
            }
            wgmma_wait<0>();
            hold(dq);
            ring.release(n - 1);
            store(work);
        }
        if (threadIdx.x % WARPGROUP == 0) tma_store_wait();
    }
};
#endif // SAMBA_SM90A_CODE

template <int HD> __global__ void __launch_bounds__(BLOCK, 1)
backward_product(const __grid_constant__ CUtensorMap qkv_map, const __grid_constant__ CUtensorMap dqkv_map, const __grid_constant__ Problem a) {
#ifdef SAMBA_SM90A_CODE
    constexpr int STAGE = TILE_BYTES<HD> + 4 * DS_BYTES;
    const uint32_t shared = shared_address(sm90_shared);
    const ProductRing ring{shared, shared + PRODUCT_STAGES * STAGE + TILE_BYTES<HD>, STAGE};
    if (threadIdx.x == 0) {
        ring.init();
        barrier_init_done();
    }
    __syncthreads();
    if (threadIdx.x < WARPGROUP) {
        if (threadIdx.x == 0) product_produce<HD>(ring, &qkv_map, a);
    } else
        ProductConsumer<HD>{ring, &dqkv_map, a}.run();
#endif
}

} // namespace sm90
} // namespace gpu
#endif // __CUDACC__
