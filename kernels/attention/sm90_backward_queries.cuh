// The Hopper attention kernel of the backward pass that makes S and dP again and gives dq, lse2 and delta. The scheme: attention_sm90.cuh.
#pragma once
#include "sm90_common.cuh"

#ifdef __CUDACC__
namespace gpu {
namespace sm90 {

// dq with S and dP made again: a block owns 128 queries of a head and visits the key tiles of their window, as forward does. This kernel
// comes first and makes the statistics, too: an item's tile of out passes through the ring of values, and while the first products run,
// delta = rowsum(dout out) is summed from shared memory. A warpgroup's dq is staged in its rows of the item's query tile, and stored from
// there during the next item, whose queries have the ring's other stage.
constexpr int QUERIES_STAGES = 2;
// Q ring | dO | K ring | V ring | barriers, 112 bytes | two items' numbers
template <int HD> constexpr int backward_queries_shared() { return (3 + 2 * QUERIES_STAGES) * TILE_BYTES<HD> + 128; }

#ifdef SAMBA_SM90A_CODE
template <int HD> struct QueriesRings {
    static constexpr int STAGES = QUERIES_STAGES, TILE = TILE_BYTES<HD>, BARRIERS = (3 + 2 * STAGES) * TILE, NUMBERS = BARRIERS + 112;
    Ring<2> queries;
    Ring<1> douts;
    Ring<STAGES> keys, values;                                           // values: an item's out, then its tiles of values
    __device__ QueriesRings(uint32_t shared, uint32_t bars)
        : queries{shared, bars, TILE}, douts{shared + 2 * TILE, bars + 32, TILE}, keys{shared + 3 * TILE, bars + 48, TILE},
          values{shared + (3 + STAGES) * TILE, bars + 48 + 16 * STAGES, TILE} {}
};

template <int HD> __device__ inline void
queries_produce(const QueriesRings<HD>& rings, const KeyMaps& maps, const CUtensorMap* dout_map, const CUtensorMap* out_map, const Problem& a) {
    int n = 0, item = blockIdx.x;
    for (int round = 0; hand_on<QueriesRings<HD>::NUMBERS>(rings.queries, round, item, a.schedule); round++, item = draw(a)) {
        const QueryWork work = query_work(a, item);
        load_stage<HD>(rings.queries, round, maps.qkv, query_slot(a, work.h), work.i0, work.b);
        for (int j = 0; j < work.count; j++, n++) {
            const KeyTile tile = key_tile(work, j, a.prefix);
            load_keys<HD>(rings.keys, n, maps, a, work, tile, 0);
            if (j == 0) {
                load_stage<HD>(rings.values, n + round, out_map, work.h, work.i0, work.b);
                load_stage<HD>(rings.douts, round, dout_map, work.h, work.i0, work.b);
            }
            load_keys<HD>(rings.values, n + round + 1, maps, a, work, tile, 1);
        }
    }
}

// Of rows `row` and row + 8 of two tiles: the sums of their products, by the four lanes of a quad. Lanes of odd rows take a slab's chunks
// in the other order, so that the eight lanes that read together meet eight banks.
template <int HD> __device__ inline void row_products(float (&sum)[2], uint32_t x, uint32_t y, int row) {
    const int r = row % 8, quad = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        sum[half] = 0.f;
#pragma unroll
        for (int slab = 0; slab < HD / 64; slab++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint32_t at = slab * ROWS * 128 + (row + half * 8) * 128 + ((quad + 4 * (i ^ r % 2)) ^ r) * 16;
                uint32_t u[4], v[4];
                load_shared(u, x + at), load_shared(v, y + at);
#pragma unroll
                for (int k = 0; k < 4; k++) {                            // two bf16 a word: the upper half of a float each
                    sum[half] = fmaf(__uint_as_float(u[k] << 16), __uint_as_float(v[k] << 16), sum[half]);
                    sum[half] = fmaf(__uint_as_float(u[k] & 0xffff0000), __uint_as_float(v[k] & 0xffff0000), sum[half]);
                }
            }
        sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 1);
        sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 2);
    }
}

template <int HD> struct QueriesConsumer {
    static constexpr int NUMBERS = QueriesRings<HD>::NUMBERS;
    const QueriesRings<HD>& rings;
    const CUtensorMap* dqkv_map;
    const Problem& a;
    const int consumer = which_consumer();
    const int row = consumer * 64 + threadIdx.x / WARP % 4 * 16 + threadIdx.x % WARP / 4;
    const float scale = rsqrtf((float)HD), c = scale * attn::LOG2E;
    float s[ROWS / 2] = {}, dp[ROWS / 2] = {}, dq[HD / 2] = {}, lse2[2], delta[2];
    uint32_t ds[ROWS / 16][4] = {};
    int all;                                                             // the first key that all 64 queries see

    __device__ void begin_item(const QueryWork& work) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int i = work.i0 + row + half * 8;
            lse2[half] = i < a.T ? a.lse[(int64_t)work.owner * a.T + i] : INFINITY;       // times LOG2E when it is there: statistics()
        }
        all = a.first_key(work.b, work.i0 + consumer * 64 + 63);
    }
    // delta, for this item and for the kernel of dk and dv. n: the item's first tile
    __device__ void statistics(int n, int round, const QueryWork& work) {
        rings.values.wait_full(n + round);
        row_products<HD>(delta, rings.douts.tile(0), rings.values.tile(n + round), row);
        rings.values.release(n + round);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int64_t at = (int64_t)work.owner * a.padded + work.i0 + row + half * 8;
            lse2[half] *= attn::LOG2E;
            if (threadIdx.x % 4 == 0) a.lse2[at] = lse2[half], a.delta[at] = delta[half];
        }
    }
    template <int N> __device__ void dp_done(int m) {
        wgmma_wait<0>();
        hold(part_of<N>(dp));
        rings.values.release(m);
    }
    // Tile j of item `round`, tile n of all: N columns of it. The product of the step before runs until this step's scores are issued; an item's
    // first step also stores the dq of the one before.
    template <int N> __device__ void step(int n, int round, int j, int now, const QueryWork& work) {
        const bool first = j == 0;
        auto &st = part_of<N>(s), &dpt = part_of<N>(dp);
        const int m = n + round + 1;                                     // its values
        const uint32_t k_at = rings.keys.tile(n) + half_offset(now), v_at = rings.values.tile(m) + half_offset(now);
        rings.keys.wait_full(n);
        issue_rows<HD, ROWS, ROWS>(st, rings.queries.tile(round) + consumer * 64 * 128, k_at);
        if (first && round > 0) {
            wgmma_wait<0>();
            hold(dq), hold(ds), hold(st);
            rings.keys.release(n - 1);
            store(round - 1);
        }
        wgmma_wait<1>();
        hold(dq), hold(ds);
        if (!first) rings.keys.release(n - 1);
        if (first) rings.douts.wait_full(round);
        rings.values.wait_full(m);
        issue_rows<HD, ROWS, ROWS>(dpt, rings.douts.tile(0) + consumer * 64 * 128, v_at);
        if (first) statistics(n, round, work);
        wgmma_wait<1>();
        hold(st);
        const KeyTile tile = key_tile(work, j, a.prefix);
        mask_keys(s, a, work, tile, tile.n0 + (now == UPPER ? 64 : 0), N, work.i0 + row, work.i0 + consumer * 64, all);
#pragma unroll
        for (int i = 0; i < N / 2; i++) st[i] = exp2_fast(fmaf(st[i], c, -lse2[i / 2 % 2]));
        // The wait stands in the branches so that it comes after exp2: in one block with it, the compiler moves it to the front
        if (j == work.count - 1) {
            dp_done<N>(m);
            rings.douts.release(round);
        } else
            dp_done<N>(m);
#pragma unroll
        for (int i = 0; i < N / 2; i++) dpt[i] = st[i] * (dpt[i] - delta[i / 2 % 2]);
        pack_operand(part_of<N>(ds), dpt);
        issue_columns<ROWS>(dq, part_of<N>(ds), k_at, !first);
    }
    __device__ unsigned char* staging(int round) const { return sm90_shared + round % 2 * TILE_BYTES<HD> + consumer * 64 * 128; }
    __device__ void store(int round) {
        const QueryWork work = query_work(a, handed_on<NUMBERS>(rings.queries, round));
        const int t = work.i0 + consumer * 64;
        store_gradients(
            consumer, t < a.T,
            [&] {
                turn_back(dq, a, {work.i0 + row, work.i0 + row + 8});
                stage_rows<ROWS>(staging(round), dq, {scale, scale});
            },
            [&] { store_tile<HD, ROWS>(dqkv_map, staging(round), query_slot(a, work.h), t, work.b); });
    }
    __device__ void run() {
        int n = 0, round = 0;
        for (int item; (item = handed_on<NUMBERS>(rings.queries, round)) < a.schedule.items; round++) {
            const QueryWork work = query_work(a, item);
            begin_item(work);
            for (int j = 0; j < work.count; j++, n++) {
                const int visible = parts_of(consumer, work, key_tile(work, j, a.prefix).n0), now = visible ? visible : UPPER;
                if (now == BOTH) step<128>(n, round, j, now, work);
                else step<64>(n, round, j, now, work);
                if (j == 0 && round > 0) release_staging(rings.queries, round - 1);
            }
        }
        wgmma_wait<0>();
        hold(dq), hold(ds);
        store(round - 1);
        if (threadIdx.x % WARPGROUP == 0) tma_store_wait();
    }
};
#endif // SAMBA_SM90A_CODE

template <int HD, bool EXTRAS> __global__ void __launch_bounds__(BLOCK, 1)
backward_queries(const __grid_constant__ CUtensorMap qkv_map, const __grid_constant__ CUtensorMap ring_map,
                 const __grid_constant__ CUtensorMap dout_map, const __grid_constant__ CUtensorMap out_map,
                 const __grid_constant__ CUtensorMap dqkv_map, const __grid_constant__ Problem given) {
#ifdef SAMBA_SM90A_CODE
    const Problem a = simplified<EXTRAS>(given);
    const uint32_t shared = shared_address(sm90_shared);
    const QueriesRings<HD> rings(shared, shared + QueriesRings<HD>::BARRIERS);
    results_allow_next();
    if (threadIdx.x == 0) {
        rings.queries.init(), rings.douts.init(), rings.keys.init(), rings.values.init();
        barrier_init_done();
    }
    __syncthreads();
    if (threadIdx.x < WARPGROUP) {
        registers_down<24>();
        if (threadIdx.x == 0) queries_produce<HD>(rings, {&qkv_map, &ring_map}, &dout_map, &out_map, a);
    } else {
        registers_up<240>();
        QueriesConsumer<HD>{rings, &dqkv_map, a}.run();
    }
#endif
}

} // namespace sm90
} // namespace gpu
#endif // __CUDACC__
