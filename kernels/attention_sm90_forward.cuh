// The Hopper attention kernel of the forward pass. The scheme: attention_sm90.cuh.
#pragma once
#include "attention_sm90_common.cuh"

#ifdef __CUDACC__
namespace gpu {
namespace sm90 {

#ifdef SAMBA_SM90A_CODE
// Turns at issuing products: barrier 1 is the first consumer's, 2 the second's
__device__ inline void order_wait(int consumer) { named_sync(1 + consumer, 2 * WARPGROUP); }
__device__ inline void order_pass(int consumer) { named_arrive(2 - consumer, 2 * WARPGROUP); }

// Of a lane's two rows: probabilities so far are exp2(c s - base), `sum` is the lane's own part of their sum
struct Statistics { float base[2] = {-INFINITY, -INFINITY}, sum[2] = {}; };

// s becomes exp2(c s - base). A base may be up to SLACK below the row's maximum: terms stay under 2^SLACK, as exact as with the maximum, and
// hardly a tile after an item's first raises it. If a row of the warp goes beyond, the warp's bases become its maxima; true then, and
// `shrink` is what earlier sums (done here) and outputs must be multiplied with.
constexpr float SLACK = 8;
template <int NR> __device__ inline bool online_softmax(float (&s)[NR], Statistics& stat, float (&shrink)[2], float c) {
    float top[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float a = s[half * 2], b = s[half * 2 + 1];
#pragma unroll
        for (int n = 1; n < NR / 4; n++) a = fmaxf(a, s[n * 4 + half * 2]), b = fmaxf(b, s[n * 4 + half * 2 + 1]);
        a = fmaxf(a, b);
        a = fmaxf(a, __shfl_xor_sync(0xffffffffu, a, 1));
        top[half] = fmaxf(a, __shfl_xor_sync(0xffffffffu, a, 2)) * c;
    }
    const bool raise = __any_sync(0xffffffffu, top[0] > stat.base[0] + SLACK || top[1] > stat.base[1] + SLACK);
    if (raise)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float base = fmaxf(stat.base[half], top[half]);        // finite: the first tile holds every row's own key
            shrink[half] = exp2_fast(stat.base[half] - base);
            stat.base[half] = base, stat.sum[half] *= shrink[half];
        }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float x = 0.f, y = 0.f;
#pragma unroll
        for (int n = 0; n < NR / 4; n++) {
            x += s[n * 4 + half * 2] = exp2_fast(fmaf(s[n * 4 + half * 2], c, -stat.base[half]));
            y += s[n * 4 + half * 2 + 1] = exp2_fast(fmaf(s[n * 4 + half * 2 + 1], c, -stat.base[half]));
        }
        stat.sum[half] += x + y;
        asm volatile("" : "+f"(stat.sum[half]));                         // sums are formed here, among exp2, not behind the next wait
    }
    return raise;
}
template <int NR> __device__ inline void rescale(float (&o)[NR], const float (&factor)[2]) {
#pragma unroll
    for (int n = 0; n < NR / 4; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) o[n * 4 + e] *= factor[e / 2];
}
#endif // SAMBA_SM90A_CODE

template <int HD> constexpr int FORWARD_STAGES = HD == 64 ? 4 : 2;
// Q ring | K ring | V ring | O staging | barriers
template <int HD> constexpr int forward_shared() { return (3 + 2 * FORWARD_STAGES<HD>) * TILE_BYTES<HD> + 32 + 32 * FORWARD_STAGES<HD>; }

#ifdef SAMBA_SM90A_CODE
template <int HD> struct ForwardRings {
    static constexpr int STAGES = FORWARD_STAGES<HD>, TILE = TILE_BYTES<HD>, STAGING = (2 + 2 * STAGES) * TILE;
    Ring<2> queries;
    Ring<STAGES> keys, values;
    __device__ ForwardRings(uint32_t shared, uint32_t bars)
        : queries{shared, bars, TILE}, keys{shared + 2 * TILE, bars + 32, TILE},
          values{shared + (2 + STAGES) * TILE, bars + 32 + 16 * STAGES, TILE} {}
};

// The order in which the consumers want tiles: an item's queries and first keys, then the last values of the item before.
template <int HD> __device__ inline void
forward_produce(const ForwardRings<HD>& rings, const CUtensorMap* qkv_map, const CUtensorMap* ring_map, const Problem& a) {
    const int heads = a.H / a.G;
    const KeyMaps maps{qkv_map, ring_map};
    QueryWork before{};
    KeyTile tile_before{};
    int n = 0;
    for (int round = 0, item; (item = item_of_round(a.schedule, round)) < a.schedule.items; round++) {
        const QueryWork work = query_work(a, item);
        load_stage<HD>(rings.queries, round, qkv_map, work.h / heads * (heads + 2) + work.h % heads, work.i0, work.b);
        for (int j = 0; j < work.count; j++, n++) {                      // the diagonal tile first; keys one ahead of values
            const KeyTile tile = key_tile(work, j, a.prefix);
            load_keys<HD>(rings.keys, n, maps, a, work, tile, 0);
            if (n > 0) load_keys<HD>(rings.values, n - 1, maps, a, before, tile_before, 1);
            before = work, tile_before = tile;
        }
    }
    load_keys<HD>(rings.values, n - 1, maps, a, before, tile_before, 1);
}

// One warpgroup's 64 rows. Key tiles of all its items form one sequence: step n issues the scores of tile n and the product with
// the values of tile n - 1, then does softmax n while the second runs; an item's results are stored in the next one's first step.
// A consumer is never idle: every instruction between its products counts, hidden are only those between the two issues, where
// the tensor cores would make it wait anyway. There the step looks ahead.
template <int HD> struct ForwardConsumer {
    const ForwardRings<HD>& rings;
    const CUtensorMap* out_map;
    const Problem& a;
    const int consumer = which_consumer();
    const int row = consumer * 64 + threadIdx.x / WARP % 4 * 16 + threadIdx.x % WARP / 4;   // of the tile: this lane's first
    const float c = rsqrtf((float)HD) * attn::LOG2E;
    float s[ROWS / 2] = {}, o[HD / 2] = {}, shrink[2];
    uint32_t p[ROWS / 16][4] = {};
    int n = 0, round = 0, j = 0;                                         // tile n of all, j of item `round`
    int parts = 0, now, coming;                                          // halves that are multiplied: of tiles n - 1 (p), n (s) and n + 1
    int all;                                                             // the first key that all 64 queries see
    QueryWork work, before, next;                                        // this item, the ones before and after it
    bool more;                                                           // whether there is one after it
    Statistics stat;

    template <int N> __device__ void issue_scores() {
        const uint32_t q_at = rings.queries.tile(round) + consumer * 64 * 128, k_at = rings.keys.tile(n) + half_offset(now);
        issue_rows<HD, ROWS, ROWS>(part_of<N>(s), q_at, k_at);
    }
    // The product with the values of tile `of`, first or not of its item
    __device__ void issue_output(int of, bool first) {
        const uint32_t v_at = rings.values.tile(of) + half_offset(parts);
        rings.values.wait_full(of);
        if (parts == BOTH) issue_columns<ROWS>(o, p, v_at, !first);
        else issue_columns<ROWS>(o, part_of<64>(p), v_at, !first);
    }
    // The halves of visit j that are multiplied: at least one
    __device__ int visible_parts(const QueryWork& of, int j) const {
        const int visible = parts_of(consumer, of, key_tile(of, j, a.prefix).n0);
        return visible ? visible : UPPER;
    }
    __device__ void look_ahead() {
        if (j == 0) {
            const int item = item_of_round(a.schedule, round + 1);
            more = item < a.schedule.items;
            if (more) next = query_work(a, item);
        }
        coming = j + 1 < work.count ? visible_parts(work, j + 1) : more ? visible_parts(next, 0) : 0;
    }
    // S is there: its tiles may go, what is unseen becomes -infinity
    template <int N> __device__ void scores_done() {
        hold(s);
        rings.keys.release(n);
        if (j == work.count - 1) rings.queries.release(round);
        const KeyTile tile = key_tile(work, j, a.prefix);
        mask_keys(s, a, work, tile, tile.n0 + (now == UPPER ? 64 : 0), N, work.i0 + row, work.i0 + consumer * 64, all);
    }
    // The product with the values of tile n - 1 is done
    __device__ void output_done() {
        wgmma_wait<0>();
        hold(o), hold(p);
        rings.values.release(n - 1);
    }
    // The first tile of all: nothing to overlap with
    template <int N> __device__ void begin() {
        rings.queries.wait_full(0);
        rings.keys.wait_full(0);
        issue_scores<N>();
        look_ahead();
        wgmma_wait<0>();
        scores_done<N>();
        online_softmax(part_of<N>(s), stat, shrink, c);
        pack_operand(part_of<N>(p), part_of<N>(s));
        parts = now;
    }
    template <int N> __device__ void step() {
        if (j == 0) rings.queries.wait_full(round);
        rings.keys.wait_full(n);
        order_wait(consumer);
        issue_scores<N>();
        look_ahead();
        issue_output(n - 1, j == 0 ? before.count == 1 : j == 1);
        order_pass(consumer);
        wgmma_wait<1>();
        scores_done<N>();
        const Statistics old = stat;
        if (j == 0) stat = Statistics{};
        const bool raised = online_softmax(part_of<N>(s), stat, shrink, c);
        // The wait stands in the branches so that it comes after softmax: in one block with it, the compiler moves it to the front
        if (j == 0) {
            output_done();
            store(before, old);
        } else {
            output_done();
            if (raised) rescale(o, shrink);
        }
        pack_operand(part_of<N>(p), part_of<N>(s));
        parts = now;
    }
    __device__ void store(const QueryWork& of, const Statistics& stat) const {
        unsigned char* staging = sm90_shared + ForwardRings<HD>::STAGING + consumer * TILE_BYTES<HD> / 2;
        float sum[2], factor[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            sum[half] = stat.sum[half];
            sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 1);
            sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 2);
            factor[half] = __fdividef(1.f, sum[half]);                       // sum >= 1: the term of the key that set the base
        }
        const int first = threadIdx.x / WARP % 4 * 16, t = of.i0 + consumer * 64 + first;     // a warp stores its own 16 rows
        const bool leader = threadIdx.x % WARP == 0;
        if (leader) tma_store_wait();                                    // the last item's store has read them
        __syncwarp();
        stage_rows<64>(staging, o, factor);
        fence_async();
        __syncwarp();
        if (leader && t < a.T) {
            store_tile<HD, 64>(out_map, staging + first * 128, of.h, t, of.b);
            tma_store_commit();
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int i = of.i0 + row + half * 8;
            if (threadIdx.x % 4 == 0 && i < a.T) a.lse[(int64_t)of.owner * a.T + i] = (stat.base[half] + log2f(sum[half])) * (1 / attn::LOG2E);
        }
    }
    __device__ void begin_item(const QueryWork& item) {
        work = item;
        all = a.first_key(work.b, work.i0 + consumer * 64 + 63);
    }
    // On to the next tile, if there is one
    __device__ bool advance() {
        n++, now = coming;
        if (++j < work.count) return true;
        before = work, j = 0, round++;
        if (more) begin_item(next);
        return more;
    }
    __device__ void run() {
        begin_item(query_work(a, item_of_round(a.schedule, 0)));
        now = visible_parts(work, 0);
        if (now == BOTH) begin<128>();
        else begin<64>();
        if (consumer == 1) order_pass(1);
        while (advance())
            if (now == BOTH) step<128>();
            else step<64>();
        issue_output(n - 1, before.count == 1);
        wgmma_wait<0>();
        hold(o), hold(p);
        store(before, stat);
        if (consumer == 0) order_wait(0);                                // takes the other's last pass
        if (threadIdx.x % WARP == 0) tma_store_wait();
    }
};
#endif // SAMBA_SM90A_CODE

template <int HD, bool EXTRAS> __global__ void __launch_bounds__(BLOCK, 1)
forward(const __grid_constant__ CUtensorMap qkv_map, const __grid_constant__ CUtensorMap ring_map, const __grid_constant__ CUtensorMap out_map,
        const __grid_constant__ Problem given) {
#ifdef SAMBA_SM90A_CODE
    const Problem a = simplified<EXTRAS>(given);
    const uint32_t shared = shared_address(sm90_shared);
    const ForwardRings<HD> rings(shared, shared + ForwardRings<HD>::STAGING + TILE_BYTES<HD>);
    if (threadIdx.x == 0) {
        rings.queries.init(), rings.keys.init(), rings.values.init();
        barrier_init_done();
    }
    __syncthreads();
    if (threadIdx.x < WARPGROUP) {
        registers_down<24>();
        if (threadIdx.x == 0) forward_produce<HD>(rings, &qkv_map, &ring_map, a);
    } else {
        registers_up<240>();
        ForwardConsumer<HD>{rings, &out_map, a}.run();
    }
#endif
}

static_assert(forward_shared<128>() <= SHARED_LIMIT);
template <int HD> inline void launch_forward(const Args<bf16>& a, Stream stream) {
    launch_resident(a.ring || a.starts ? forward<HD, true> : forward<HD, false>, problem(a), (int64_t)a.B * a.H, true, ORDERLY, forward_shared<HD>(),
                    stream, qkv_map(a, ROWS), ring_map(a), tensor_map(a.out, a.B, a.T, a.H, HD, 16));
}

} // namespace sm90
} // namespace gpu
#endif // __CUDACC__
