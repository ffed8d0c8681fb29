// The Hopper attention kernels of the backward pass: statistics; dk and dv; dq from the score gradients that were kept, or from ones
// made again. The scheme: attention_sm90.cuh.
#pragma once
#include "sm90_common.cuh"

#ifdef __CUDACC__
namespace gpu {
namespace sm90 {

// A block takes ROWS positions of one owner (b, h), eight lanes each.
template <int HD> __global__ void __launch_bounds__(256)
backward_statistics(const Problem a) {
    results_allow_next();
    constexpr int LANES = 8, STEP = 256 / LANES;
    const int tiles = a.padded / ROWS, owner = blockIdx.x / tiles, t0 = blockIdx.x % tiles * ROWS + threadIdx.x / LANES;
    const int64_t first = ((int64_t)(owner / a.H) * a.T * a.H + owner % a.H) * HD + threadIdx.x % LANES * 8, stride = (int64_t)a.H * HD;
#pragma unroll
    for (int t = t0; t < t0 + ROWS; t += STEP) {
        float sum = 0.f;
        if (t < a.T)
#pragma unroll
            for (int d = 0; d < HD; d += LANES * 8) {
                const Vec<bf16, 8> x = load_vec<8>(a.dout + first + t * stride + d), y = load_vec<8>(a.saved_out + first + t * stride + d);
#pragma unroll
                for (int i = 0; i < 8; i++) sum += to_float(x[i]) * to_float(y[i]);
            }
#pragma unroll
        for (int o = LANES / 2; o > 0; o /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, o);
        if (threadIdx.x % LANES != 0) continue;
        const int64_t at = (int64_t)owner * a.padded + t;
        a.delta[at] = sum;
        a.lse2[at] = t < a.T ? a.lse[(int64_t)owner * a.T + t] * attn::LOG2E : INFINITY;
    }
}

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
    const int heads = a.H / a.G;
    int n = 0, item = blockIdx.x;
    for (int round = 0; hand_on<QueriesRings<HD>::NUMBERS>(rings.queries, round, item, a.schedule); round++, item = draw(a)) {
        const QueryWork work = query_work(a, item);
        load_stage<HD>(rings.queries, round, maps.qkv, work.h / heads * (heads + 2) + work.h % heads, work.i0, work.b);
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

// Queries' slot in a row of qkv
__device__ inline int query_slot(const Problem& a, int h) { return h / (a.H / a.G) * (a.H / a.G + 2) + h % (a.H / a.G); }

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
        rings.queries.init(2), rings.douts.init(), rings.keys.init(), rings.values.init();      // 2: see release_staging()
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

// dq = dS K from the blocks that backward_keys kept: a block owns 128 queries of a head, a step is a tile of 128 keys and the up to
// four blocks of dS of it. Bound by reading dS: 32 KB for 2 x 2^20 multiply-adds at head_dim 128.
constexpr int PRODUCT_STAGES = 3;
constexpr int DS_BYTES = attn::DS_BLOCK * 2;
// ring of K | dS of consumer 0, lower and upper | of consumer 1; staging of dq; barriers; an item's number for each stage
template <int HD> constexpr int backward_product_shared() {
    return PRODUCT_STAGES * (TILE_BYTES<HD> + 4 * DS_BYTES + 16 + 4) + TILE_BYTES<HD>;
}

#ifdef SAMBA_SM90A_CODE
using ProductRing = Ring<PRODUCT_STAGES>;
template <int HD> constexpr int PRODUCT_NUMBERS = backward_product_shared<HD>() - 4 * PRODUCT_STAGES;

template <int HD> __device__ inline void product_produce(const ProductRing& ring, const CUtensorMap* qkv_map, const Problem& a) {
    const int slots = a.H / a.G + 2;
    results_wait();                                                      // dS
    int n = 0;
    for (int item = blockIdx.x; hand_on<PRODUCT_NUMBERS<HD>>(ring, n, item, a.schedule); item = draw(a)) {
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
        for (int item; (item = handed_on<PRODUCT_NUMBERS<HD>>(ring, n)) < a.schedule.items;) {
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

// dk, dv: a block owns 128 keys of a group and goes over the group's query heads and their tiles of 64 queries. Scores are formed
// transposed (keys as rows), so that P^T and dS^T come from registers. dk and dv are staged in the key and value tiles, as dq is.
constexpr int KEYS_STAGES = 3, STEP_ROWS = 64;
template <int HD> constexpr int STEP_BYTES = 2 * STEP_ROWS * HD * 2;     // Q | dO
// ring of K | V | ring of Q | dO | barriers, 80 bytes | two items' numbers
template <int HD> constexpr int backward_keys_shared() { return 4 * TILE_BYTES<HD> + KEYS_STAGES * STEP_BYTES<HD> + 128; }

#ifdef SAMBA_SM90A_CODE
template <int HD> struct KeysRings {
    static constexpr int STAGES = KEYS_STAGES, TILE = TILE_BYTES<HD>, BARRIERS = 4 * TILE + STAGES * STEP_BYTES<HD>, NUMBERS = BARRIERS + 80;
    Ring<2> keys;
    Ring<STAGES> steps;
    __device__ KeysRings(uint32_t shared)
        : keys{shared, shared + BARRIERS, 2 * TILE}, steps{shared + 4 * TILE, shared + BARRIERS + 32, STEP_BYTES<HD>} {}
};
// A tile of keys, and the first and last tile of queries that see it
struct KeyWork { int b, g, n0, first, last; };
__device__ inline KeyWork key_work(const Problem& a, int item) {
    const Work work = work_item(a.schedule, item);
    const int n0 = work.tile * ROWS, b = a.heads.quotient(work.owner);
    return {b, work.owner - b * a.G, n0, n0 / STEP_ROWS, a.last_query(b, n0 + ROWS - 1) / STEP_ROWS};
}

template <int HD> __device__ inline void
keys_produce(const KeysRings<HD>& rings, const CUtensorMap* qkv_map, const CUtensorMap* dout_map, const Problem& a) {
    constexpr int TILE = TILE_BYTES<HD>, STEP = STEP_BYTES<HD>, N = STEP_ROWS;
    Cursor<KEYS_STAGES> steps;
    int item = blockIdx.x;
    for (int round = 0; hand_on<KeysRings<HD>::NUMBERS>(rings.keys, round, item, a.schedule); round++, item = draw(a)) {
        const KeyWork work = key_work(a, item);
        const int heads = a.H / a.G, end = (work.last + 1) * N;
        const uint32_t bar = rings.keys.full_bar(round), tile = rings.keys.tile(round);
        barrier_expect(bar, 2 * TILE);
        load_tile<HD, ROWS, N>(tile, bar, qkv_map, work.g * (heads + 2) + heads, work.n0, work.b);
        load_tile<HD, ROWS, N>(tile + TILE, bar, qkv_map, work.g * (heads + 2) + heads + 1, work.n0, work.b);
        for (int h = work.g * heads; h < (work.g + 1) * heads; h++)
#pragma unroll 1                                                          // unrolled, 24 registers are too few
            for (int t = work.n0; t < end; t += N, steps.next()) {
                const uint32_t bar = steps.full_bar(rings.steps), tile = steps.tile(rings.steps);
                steps.wait_empty(rings.steps);
                barrier_expect(bar, STEP);
                load_tile<HD, N, N>(tile, bar, qkv_map, h + 2 * work.g, t, work.b);
                load_tile<HD, N, N>(tile + STEP / 2, bar, dout_map, h, t, work.b);
            }
    }
}
template <int HD> struct KeysConsumer {
    static constexpr int TILE = TILE_BYTES<HD>, STEP = STEP_BYTES<HD>, N = STEP_ROWS, NUMBERS = KeysRings<HD>::NUMBERS;
    const KeysRings<HD>& rings;
    const CUtensorMap* dqkv_map;
    const Problem& a;
    const int consumer = which_consumer();
    const int row = threadIdx.x / WARP % 4 * 16 + threadIdx.x % WARP / 4;             // of our 64: this lane's first
    const float scale = rsqrtf((float)HD), c = scale * attn::LOG2E;
    float s[N / 2], dp[N / 2], dk[HD / 2] = {}, dv[HD / 2] = {};
    uint32_t p[N / 16][4] = {}, ds[N / 16][4] = {};
    Cursor<KEYS_STAGES> at, held;                                        // stages of this step and of the last one,
    bool running = false;                                                // whose products may still run
    bf16* kept = nullptr;                                                // where its dS goes

    // Rows are keys p0 + row, + 8; columns queries from i0 on. all: the last query that sees all 64 keys
    __device__ void mask_queries(const KeyWork& work, int p0, int i0, int all) {
        if (i0 >= p0 + 63 && i0 + N - 1 <= all) return;
        int from[2], to[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int key = p0 + row + half * 8;
            from[half] = key - i0, to[half] = a.last_query(work.b, key) - i0;
        }
        mask(s, from, to);
    }
    // Where dS of these 64 keys and the tile's 64 queries goes, for dq; null: nowhere
    __device__ bf16* place(const KeyWork& work, int p0, int h, int tile) const {
        const int owner = work.b * a.H + work.g * (a.H / a.G) + h;
        return a.ds && tile * N >= p0 ? a.ds + attn::ds_block(owner, tile, p0 / N, a.T, a.window) : nullptr;
    }
    // The last step's dS goes there, while products run that read the same registers
    __device__ void keep() {
        if (!kept) return;
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int k = 0; k < 4; k += 2)
                attn::ds_store(kept, row + half * 8, k / 2, ds[k][half], ds[k][2 + half], ds[k + 1][half], ds[k + 1][2 + half]);
        kept = nullptr;
    }
    // What the lane has that loaded column 8 i + l%4 * 2
    __device__ static float of_column(float x, int i) { return __shfl_sync(0xffffffffu, x, i * 4 + threadIdx.x % 4); }
    // The last step's products are done: its stage may be loaded again
    __device__ void products_done() {
        hold(dk), hold(dv), hold(p), hold(ds);
        if (running) held.release(rings.steps);
        running = false;
    }
    // One tile of queries with the keys of item `round`. What a step does besides, it does while products run.
    __device__ void step(int h, int tile, int round, bool first, int all, const KeyWork& work, int64_t stat) {
        // A lane loads those of queries 2 l and 2 l + 1, and gets from others, by shuffles, those that its scores need
        const Vec<float, 2> lse2 = load_vec<2>(a.lse2 + stat), delta = load_vec<2>(a.delta + stat);
        const uint32_t k_at = rings.keys.tile(round) + consumer * 64 * 128, q_at = at.tile(rings.steps), do_at = q_at + STEP / 2;
        const int p0 = work.n0 + consumer * 64;
        at.wait_full(rings.steps);
        issue_rows<HD, ROWS, N>(s, k_at, q_at);
        keep();
        if (first && round > 0) {
            wgmma_wait<0>();
            products_done();
            hold(s);
            store(round - 1);
        }
        wgmma_wait<1>();
        products_done();
        issue_rows<HD, ROWS, N>(dp, k_at + TILE, do_at);
        kept = place(work, p0, h, tile);
        running = true, held = at, at.next();
        wgmma_wait<1>();
        hold(s);
        mask_queries(work, p0, tile * N, all);
#pragma unroll
        for (int i = 0; i < N / 8; i++) {
            const float l[2] = {of_column(lse2[0], i), of_column(lse2[1], i)};
#pragma unroll
            for (int e = 0; e < 4; e++) s[4 * i + e] = exp2_fast(fmaf(s[4 * i + e], c, -l[e % 2]));
        }
        pack_operand(p, s);
        issue_columns<N>(dv, p, do_at, !first);
        wgmma_wait<1>();
        hold(dp);
#pragma unroll
        for (int i = 0; i < N / 8; i++) {
            const float d[2] = {of_column(delta[0], i), of_column(delta[1], i)};
#pragma unroll
            for (int e = 0; e < 4; e++) dp[4 * i + e] = s[4 * i + e] * (dp[4 * i + e] - d[e % 2]);
        }
        pack_operand(ds, dp);
        issue_columns<N>(dk, ds, q_at, !first);
    }
    __device__ void finish() {
        keep();
        wgmma_wait<0>();
        products_done();
    }
    // A tile of queries that sees none of our 64 keys. Waiting for tiles while holding one would stop the producer.
    __device__ void skip() { finish(), at.wait_full(rings.steps), at.release(rings.steps), at.next(); }

    __device__ unsigned char* staging(int round) const { return sm90_shared + round % 2 * 2 * TILE + consumer * 64 * 128; }
    __device__ void store(int round) {
        const KeyWork work = key_work(a, handed_on<NUMBERS>(rings.keys, round));
        const int slot = work.g * (a.H / a.G + 2) + a.H / a.G, t = work.n0 + consumer * 64;
        store_gradients(
            consumer, t < a.T,
            [&] {
                turn_back(dk, a, {t + row, t + row + 8});
                stage_rows<ROWS>(staging(round), dk, {scale, scale});
                stage_rows<ROWS>(staging(round) + TILE, dv, {1.f, 1.f});
            },
            [&] {
                store_tile<HD, ROWS>(dqkv_map, staging(round), slot, t, work.b);
                store_tile<HD, ROWS>(dqkv_map, staging(round) + TILE, slot + 1, t, work.b);
            });
    }
    __device__ void run() {
        results_wait();                                                  // lse2, delta
        const int heads = a.H / a.G;
        int round = 0;
        for (int item; (item = handed_on<NUMBERS>(rings.keys, round)) < a.schedule.items; round++) {
            const KeyWork work = key_work(a, item);
            const int p0 = work.n0 + consumer * 64;
            // Tiles of queries before our keys, and behind the last that sees one of them, are skipped; one always stays
            const int mine = min(work.first + consumer, work.last), last = min(work.last, max(mine, a.last_query(work.b, p0 + 63) / N));
            const int all = a.last_query(work.b, p0);
            for (int h = 0; h < heads; h++) {
                int tile = work.first;
                int64_t stat = ((int64_t)work.b * a.H + work.g * heads + h) * a.padded + mine * N + threadIdx.x % WARP * 2;
                for (; tile < mine; tile++) skip();
                for (; tile <= last; tile++, stat += N) {
                    const bool first = h == 0 && tile == mine;
                    step(h, tile, round, first, all, work, stat);
                    if (first && round > 0) release_staging(rings.keys, round - 1);
                }
                for (; tile <= work.last; tile++) skip();
            }
        }
        finish();
        store(round - 1);
        if (threadIdx.x % WARPGROUP == 0) tma_store_wait();
    }
};
#endif // SAMBA_SM90A_CODE

template <int HD, bool EXTRAS> __global__ void __launch_bounds__(BLOCK, 1)
backward_keys(const __grid_constant__ CUtensorMap qkv_map, const __grid_constant__ CUtensorMap dout_map,
              const __grid_constant__ CUtensorMap dqkv_map, const __grid_constant__ Problem given) {
#ifdef SAMBA_SM90A_CODE
    const Problem a = simplified<EXTRAS>(given);
    const KeysRings<HD> rings(shared_address(sm90_shared));
    results_allow_next();
    if (threadIdx.x == 0) {
        rings.keys.init(2), rings.steps.init();                          // 2: see release_staging()
        barrier_init_done();
    }
    __syncthreads();
    if (threadIdx.x < WARPGROUP) {
        registers_down<24>();
        if (threadIdx.x == 0) keys_produce<HD>(rings, &qkv_map, &dout_map, a);
    } else {
        registers_up<240>();
        KeysConsumer<HD>{rings, &dqkv_map, a}.run();
    }
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Launches

static_assert(backward_queries_shared<128>() <= SHARED_LIMIT && backward_keys_shared<128>() <= SHARED_LIMIT);
static_assert(backward_product_shared<128>() <= SHARED_LIMIT);
template <int HD> inline void launch_statistics(const Args<bf16>& a, Stream stream) {
    backward_statistics<HD><<<(unsigned)(ceil_div(a.T, ROWS) * a.B * a.H), 256, 0, stream>>>(problem(a));
    LAUNCH_CHECK();
}
inline CUtensorMap dqkv_map(const Args<bf16>& a) { return tensor_map(a.dqkv, a.B, a.T, a.H + 2 * a.G, a.hd, 64); }
// dk and dv; dS is kept if a.ds
template <int HD> inline void launch_keys(const Args<bf16>& a, Stream stream) {
    launch_resident(a.starts ? backward_keys<HD, true> : backward_keys<HD, false>, problem(a), (int64_t)a.B * a.G, false, EARLY,
                    backward_keys_shared<HD>(), stream, qkv_map(a, STEP_ROWS), tensor_map(a.dout, a.B, a.T, a.H, HD, STEP_ROWS), dqkv_map(a));
}
// dq from dS
inline void launch_product(const Args<bf16>& a, Stream stream) {         // of head_dim 64 dS is not kept: DS_LIMIT in attention.cuh
    launch_resident(backward_product<128>, problem(a), (int64_t)a.B * a.H, true, EARLY, backward_product_shared<128>(), stream,
                    qkv_map(a, ROWS), dqkv_map(a));
}
// dq with S and dP made again, and the statistics
template <int HD> inline void launch_queries(const Args<bf16>& a, Stream stream) {
    launch_resident(a.ring || a.starts ? backward_queries<HD, true> : backward_queries<HD, false>, problem(a), (int64_t)a.B * a.H, true, ORDERLY,
                    backward_queries_shared<HD>(), stream, qkv_map(a, ROWS), ring_map(a), tensor_map(a.dout, a.B, a.T, a.H, HD, ROWS),
                    tensor_map(a.saved_out, a.B, a.T, a.H, HD, ROWS), dqkv_map(a));
}
template <int HD> inline void launch_backward(const Args<bf16>& a, Stream stream) {
    if (HD == 128 && a.ds) {
        launch_statistics<HD>(a, stream);
        launch_keys<HD>(a, stream);
        launch_product(a, stream);
    } else {
        launch_queries<HD>(a, stream);
        launch_keys<HD>(a, stream);
    }
}

} // namespace sm90
} // namespace gpu
#endif // __CUDACC__
