// The Hopper attention kernel of the forward pass. The scheme: attention_sm90.cuh.
#pragma once
#include "sm90_common.cuh"

#ifdef __CUDACC__
namespace gpu {
namespace sm90 {

#ifdef SAMBA_SM90A_CODE
// Of a lane's two rows: probabilities so far are exp2(c s - base), `sum` is the lane's own part of their sum
struct Statistics { float base[2] = {-INFINITY, -INFINITY}, sum[2] = {}; };

// A base may be up to SLACK below the row's maximum: terms stay under 2^SLACK, as exact as with the maximum, and hardly a tile after an item's
// first raises it. If a row of the warp goes beyond, the warp's bases become its maxima; true then, and `shrink` is what earlier sums (done
// here) and outputs must be multiplied with.
constexpr float SLACK = 8;
template <int NR> __device__ inline bool raise_bases(const float (&s)[NR], Statistics& stat, float (&shrink)[2], float c) {
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
    return raise;
}
// s becomes exp2(c s - base)
template <int NR> __device__ inline void make_terms(float (&s)[NR], Statistics& stat, float c) {
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
}
template <int NR> __device__ inline void rescale(float (&o)[NR], const float (&factor)[2]) {
#pragma unroll
    for (int n = 0; n < NR / 4; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) o[n * 4 + e] *= factor[e / 2];
}
#endif // SAMBA_SM90A_CODE

// A block's work: 192 queries of a head, 64 for each of three consumers
constexpr int CONSUMERS = 3, ITEM_QUERIES = CONSUMERS * 64;
template <int HD> constexpr int FORWARD_STAGES = HD == 64 ? 4 : 2;
template <int HD> constexpr int QUERY_BYTES = ITEM_QUERIES * HD * 2;
// What the producer finds out about an item (QueryWork) and the consumers read when its queries are there: b, h, i0, top, count, newer, twice
constexpr int ITEM_BYTES = 32, NO_MORE = -1;                             // NO_MORE: in place of h
// Q ring | K ring | V ring | barriers | two items
template <int HD> constexpr int forward_shared() {
    return 2 * QUERY_BYTES<HD> + 2 * FORWARD_STAGES<HD> * TILE_BYTES<HD> + 32 + 32 * FORWARD_STAGES<HD> + 2 * ITEM_BYTES;
}

#ifdef SAMBA_SM90A_CODE
template <int HD> struct ForwardRings {
    static constexpr int STAGES = FORWARD_STAGES<HD>, TILE = TILE_BYTES<HD>, QUERY = QUERY_BYTES<HD>, BARRIERS = 2 * QUERY + 2 * STAGES * TILE;
    static constexpr int ITEMS = forward_shared<HD>() - 2 * ITEM_BYTES;
    Ring<2> queries;
    Ring<STAGES> keys, values;
    __device__ ForwardRings(uint32_t shared)
        : queries{shared, shared + BARRIERS, QUERY}, keys{shared + 2 * QUERY, shared + BARRIERS + 32, TILE},
          values{shared + 2 * QUERY + STAGES * TILE, shared + BARRIERS + 32 + 16 * STAGES, TILE} {}
    __device__ void init() const {
        constexpr int WARPS = CONSUMERS * WARPGROUP / WARP;
        queries.init(WARPS), keys.init(WARPS), values.init(WARPS);
        barrier_init_done();
    }
    __device__ static int4* item(int round) { return reinterpret_cast<int4*>(sm90_shared + ITEMS) + round % 2 * 2; }
};

// An item's queries, then its keys and values, the last tile first; NO_MORE at the end
template <int HD> __device__ inline void
forward_produce(const ForwardRings<HD>& rings, const CUtensorMap* query_map, const KeyMaps& maps, const Problem& a) {
    int number = blockIdx.x;
    for (int round = 0, n = 0;; round++, number = draw(a)) {
        const uint32_t bar = rings.queries.full_bar(round);
        rings.queries.wait_empty(round);
        if (number >= a.schedule.items) {
            rings.item(round)[0].y = NO_MORE;
            barrier_arrive(bar);
            return;
        }
        const QueryWork work = query_work<ITEM_QUERIES>(a, number);
        rings.item(round)[0] = {work.b, work.h, work.i0, work.top}, rings.item(round)[1] = {work.count, work.newer, work.twice, 0};
        barrier_expect(bar, QUERY_BYTES<HD>);
        load_tile<HD, ITEM_QUERIES, ITEM_QUERIES>(rings.queries.tile(round), bar, query_map, query_slot(a, work.h), work.i0, work.b);
#pragma unroll 1                                                          // unrolled, registers are too few
        for (int j = 0; j < work.count; j++, n++) {
            const KeyTile tile = key_tile(work, j, a.prefix);
            load_keys<HD>(rings.keys, n, maps, a, work, tile, 0);
            load_keys<HD>(rings.values, n, maps, a, work, tile, 1);
        }
    }
}

// One warpgroup's 64 rows: for each tile of keys S = Q K^T, softmax, O += P V, one after the other. While one warpgroup does softmax, masks or
// stores, the other two keep the tensor cores busy. P takes the place of S, so that O and S fit the 160 registers of a lane.
template <int HD> struct ForwardConsumer {
    const ForwardRings<HD>& rings;
    const CUtensorMap* out_map;
    const Problem& a;
    const int consumer = which_consumer();
    const int row = consumer * 64 + threadIdx.x / WARP % 4 * 16 + threadIdx.x % WARP / 4;   // of the item: this lane's first
    const float c = rsqrtf((float)HD) * attn::LOG2E;
    float o[HD / 2];
    int n = 0, round = 0, j;                                             // tile n of all, j of item `round`
    bool fresh, staged = false;                                          // no product in o yet; the item before lies in its queries' place
    int least, first, all;                                               // first query; first key that one of the 64 sees, and that all see
    QueryWork work;
    Statistics stat;

    // The halves of a tile that this warpgroup multiplies. Half a tile is worked on like a smaller tile.
    __device__ int visible_parts(int n0) const {
        const int last = least + 63;
        return (n0 <= last && n0 + 63 >= first ? LOWER : 0) | (n0 + 64 <= last && n0 + 127 >= first ? UPPER : 0);
    }
    __device__ void next_keys() const { if (j + 1 < work.count) rings.keys.wait_full(n + 1); }
    template <int N> __device__ void step(const KeyTile& tile, int parts) {
        float s[N / 64][32], shrink[2];
        uint32_t p[N / 64][4][4];
        float (&scores)[N / 2] = reinterpret_cast<float (&)[N / 2]>(s);
        issue_rows<HD, ITEM_QUERIES, ROWS>(scores, rings.queries.tile(round) + consumer * 64 * 128, rings.keys.tile(n) + half_offset(parts));
        wgmma_wait<0>();
        hold(scores);
        rings.keys.release(n);
        mask_keys(scores, a, work, tile, tile.n0 + (parts == UPPER ? 64 : 0), N, work.i0 + row, least, all);
        if (raise_bases(scores, stat, shrink, c) && !fresh) rescale(o, shrink);
#pragma unroll
        for (int part = 0; part < N / 64; part++) {                      // the product of the first 64 keys runs during exp2 of the others
            make_terms(s[part], stat, c);
            pack_operand(p[part], s[part]);
            if (part == 0) rings.values.wait_full(n);
            issue_columns<ROWS>(o, p[part], rings.values.tile(n) + half_offset(parts) + part * 64 * 128, part > 0 || !fresh);
        }
        if (staged) release_queries(round - 1);
        next_keys();
        wgmma_wait<0>();
        hold(o);
        for (auto& part : p) hold(part);
        rings.values.release(n);
        fresh = false;
    }
    // A tile of which this warpgroup sees nothing
    __device__ void skip() {
        rings.keys.release(n);
        rings.values.wait_full(n);
        rings.values.release(n);
        next_keys();
        j++, n++;
    }
    // The store of item `of` has read its rows: their place may be loaded again
    __device__ void release_queries(int of) {
        if (threadIdx.x % WARP == 0) tma_store_wait();
        rings.queries.release(of);
        staged = false;
    }
    // Results go where the item's queries were, and from there to memory: each warp's own 16 rows
    __device__ void store() {
        unsigned char* place = sm90_shared + round % 2 * QUERY_BYTES<HD>;
        float sum[2], factor[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            sum[half] = stat.sum[half];
            sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 1);
            sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 2);
            factor[half] = __fdividef(1.f, sum[half]);                   // sum >= 1: the term of the key that set the base
        }
        const int first_row = consumer * 64 + threadIdx.x / WARP % 4 * 16, t = work.i0 + first_row;
        named_sync(1 + consumer, WARPGROUP);                             // all have multiplied by their queries
        stage_rows<ITEM_QUERIES>(place + consumer * 64 * 128, o, factor);
        fence_async();
        __syncwarp();
        if (threadIdx.x % WARP == 0 && t < a.T) {
            store_tile<HD, ITEM_QUERIES>(out_map, place + first_row * 128, work.h, t, work.b);
            tma_store_commit();
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int i = work.i0 + row + half * 8;
            if (threadIdx.x % 4 == 0 && i < a.T) a.lse[a.stat(work.b, work.h) + i] = (stat.base[half] + __log2f(sum[half])) * (1 / attn::LOG2E);
        }
        staged = true;
    }
    // The next item, when its queries are there. false: there is none
    __device__ bool begin_item() {
        auto uniform = [](int x) { return __shfl_sync(0xffffffffu, x, 0); };          // the compiler must see that it is
        rings.queries.wait_full(round);
        int4 x{}, y{};
        if (threadIdx.x % WARP == 0) x = rings.item(round)[0], y = rings.item(round)[1];   // read by the lane that releases them
        work.b = uniform(x.x), work.h = uniform(x.y), work.i0 = uniform(x.z), work.top = uniform(x.w);
        work.count = uniform(y.x), work.newer = uniform(y.y), work.twice = uniform(y.z);
        if (work.h == NO_MORE) return false;
        least = work.i0 + consumer * 64;
        first = least >= 0 ? a.first_key(work.b, least) : INT_MAX;       // before the start: sees nothing
        all = a.first_key(work.b, max(least + 63, 0));
        stat = Statistics{}, fresh = true, j = 0;
        return true;
    }
    __device__ void end_item() {
        if (!fresh) return store();
        if (staged) release_queries(round - 1);
        rings.queries.release(round);
    }
    // The tiles that a warpgroup sees lie between those that only later and those that only earlier queries see
    __device__ void run() {
        auto now = [&] { return key_tile(work, j, a.prefix); };
        for (; begin_item(); round++) {
            rings.keys.wait_full(n);
            while (j < work.count && !visible_parts(now().n0)) skip();
            for (; j < work.count; j++, n++) {
                const KeyTile tile = now();
                const int parts = visible_parts(tile.n0);
                if (parts == BOTH) step<128>(tile, parts);
                else if (parts) step<64>(tile, parts);
                else break;
            }
            end_item();
            while (j < work.count) skip();
        }
        if (threadIdx.x % WARP == 0) tma_store_wait();
    }
};
#endif // SAMBA_SM90A_CODE

template <int HD, bool EXTRAS> __global__ void __launch_bounds__((1 + CONSUMERS) * WARPGROUP, 1)
forward(const __grid_constant__ CUtensorMap query_map, const __grid_constant__ CUtensorMap qkv_map, const __grid_constant__ CUtensorMap ring_map,
        const __grid_constant__ CUtensorMap out_map, const __grid_constant__ Problem given) {
#ifdef SAMBA_SM90A_CODE
    const Problem a = simplified<EXTRAS>(given);
    const ForwardRings<HD> rings(shared_address(sm90_shared));
    if (threadIdx.x == 0) rings.init();
    __syncthreads();
    if (threadIdx.x < WARPGROUP) {
        registers_down<24>();
        if (threadIdx.x == 0) forward_produce<HD>(rings, &query_map, {&qkv_map, &ring_map}, a);
    } else {
        registers_up<160>();
        ForwardConsumer<HD>{rings, &out_map, a}.run();
    }
#endif
}

static_assert(forward_shared<128>() <= SHARED_LIMIT);
template <int HD> inline void launch_forward(const Args<bf16>& a, Stream stream) {
    launch_resident<ITEM_QUERIES>(a.ring || a.starts ? forward<HD, true> : forward<HD, false>, problem(a), (int64_t)a.B * a.H, true, ORDERLY,
                             forward_shared<HD>(), stream, qkv_map(a, ITEM_QUERIES), qkv_map(a, ROWS), ring_map(a),
                             tensor_map(a.out, a.B, a.T, a.H, HD, 16));
}

} // namespace sm90
} // namespace gpu
#endif // __CUDACC__
