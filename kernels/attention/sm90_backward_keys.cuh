// The Hopper attention kernel of the backward pass that gives dk and dv, and keeps the score gradients if asked. The scheme: attention_sm90.cuh.
#pragma once
#include "sm90_common.cuh"

#ifdef __CUDACC__
namespace gpu {
namespace sm90 {

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
        rings.keys.init(), rings.steps.init();
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

} // namespace sm90
} // namespace gpu
#endif // __CUDACC__
