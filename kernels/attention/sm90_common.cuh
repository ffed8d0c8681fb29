// What the Hopper attention kernels share: who works on what, in which order, what a tile of keys holds for whom, masks, and how a
// kernel is launched. The scheme: attention_sm90.cuh.
#pragma once
#include <algorithm>

#include "../hopper.cuh"

namespace gpu {
namespace sm90 {

using attn::Args, attn::exp2_fast;

// ---------------------------------------------------------------------------------------------------------------------
// Work

// n / value for 0 <= n < 2^31 without a division: n (1 + multiplier / 2^32) / 2^shift
struct Divisor {
    uint32_t value, multiplier;
    int shift;
    Divisor(int d = 1) : value(d), shift(0) {
        while ((uint64_t)1 << shift < value) shift++;
        multiplier = (uint32_t)((((((uint64_t)1 << shift) - value) << 32) / value) + 1);
    }
    __host__ __device__ int quotient(int n) const {
#ifdef __CUDA_ARCH__
        const uint32_t high = __umulhi((uint32_t)n, multiplier);
#else
        const uint32_t high = (uint32_t)((uint64_t)n * multiplier >> 32);
#endif
        return (int)((high + (uint32_t)n) >> shift);
    }
};
// Item n of the order is one tile of one owner (a batch's head, or group); a block that is done draws the next one: draw(). Owners come in
// sections: inside a section the tiles with the most work come first for all its owners, so several tiles of each owner run at a time and
// share in L2 what they read. A section has as many owners as a 22nd of the blocks, so that about 22 tiles of an owner run at a time, more than
// a window of 2,048 has; the last section has more, at least a ninth, so that there are light tiles enough to end with.
struct Schedule {
    int tiles, owners, items;                                            // items = tiles * owners
    int sections;                                                        // of `section` owners; one of last_section follows
    Divisor section, last_section, section_items;                        // section_items = section * tiles
    bool last_first;                                                     // the most work: the last tiles (queries) or the first (keys)
};
struct Work { int tile, owner; };

constexpr int ROWS = 128;                                                // of every tile: 64 for each consumer
template <int HD> constexpr int TILE_BYTES = ROWS * HD * 2;
constexpr int LOWER = 1, UPPER = 2, BOTH = 3;                            // halves of a tile of keys

// The ring's slots (capacity 0: there is none): position p < 0 is in slot split + p, or + capacity where that is negative
struct Prefix { int capacity, split; };

// What every kernel gets besides its tensor maps
struct Problem : Args<bf16> {
    Schedule schedule;
    Divisor heads;                                                       // owners of a sequence
    Prefix prefix;
    int padded;                                                          // lse2 and delta are (B, H, padded): infinity and 0 past T
};

inline int64_t padded_length(int64_t T) { return round_up(T, ROWS); }

#ifdef __CUDACC__
__host__ __device__ inline Work work_item(const Schedule& s, int n) {
    const int number = s.section_items.quotient(n);
    const bool whole = number < s.sections;
    const int begin = (whole ? number : s.sections) * (int)s.section.value, rest = n - begin * s.tiles;
    const int order = whole ? s.section.quotient(rest) : s.last_section.quotient(rest);
    return {s.last_first ? s.tiles - 1 - order : order, begin + rest - order * (int)(whole ? s.section.value : s.last_section.value)};
}

#ifdef SAMBA_SM90A_CODE
// A tile of queries, from i0 on: the keys it sees are `count` tiles, of which the first (from key `top` on) holds its last query, each before
// the last. A tile of the ring that slot 0 divides comes twice, as its newer and its older part; `newer`: the last visit to the newer side of
// slot 0. first0, first1: the first key that the first and the second consumer's 64 queries see. Tiles of other than ROWS queries end where the
// last 64 queries end: what is missing for a whole number of them is missing in the first, which has least work.
struct QueryWork { int owner, b, h, i0, top, count, newer, twice, first0, first1; };
template <int QUERIES = ROWS> __device__ inline QueryWork query_work(const Problem& a, int item) {
    const Work work = work_item(a.schedule, item);
    const Prefix prefix = a.prefix;
    const int missing = QUERIES == ROWS ? 0 : a.schedule.tiles * QUERIES - (a.T + 63) / 64 * 64;
    const int b = a.heads.quotient(work.owner), i0 = work.tile * QUERIES - missing, last = (i0 + QUERIES - 1) / ROWS;
    const int first = a.first_key(b, max(i0, 0));
    const int twice = prefix.capacity > 0 && prefix.split % ROWS != 0 && first < -prefix.split;
    return {work.owner, b, work.owner - b * a.H, i0, last * ROWS, last - (first >> 7) + 1 + twice, last - (-prefix.split >> 7), twice,
            first, a.first_key(b, max(i0 + 64, 0))};
}
// Queries' slot in a row of qkv
__device__ inline int query_slot(const Problem& a, int h) { return h / (a.H / a.G) * (a.H / a.G + 2) + h % (a.H / a.G); }
// Visit j: keys n0 .. n0 + 127, of which from .. to are there, at row t of the call's keys or of the ring
struct KeyTile { int n0, t, from, to; bool ring; };
__device__ inline KeyTile key_tile(const QueryWork& work, int j, const Prefix& prefix) {
    const bool older = work.twice && j > work.newer;
    const int n0 = work.top - (j - older) * ROWS;
    if (n0 >= 0) return {n0, n0, 0, INT_MAX, false};
    if (j > work.newer) return {n0, prefix.split + prefix.capacity + n0, INT_MIN, -prefix.split - 1, true};
    return {n0, prefix.split + n0, -prefix.split, INT_MAX, true};
}
// The halves of a key tile that a consumer's 64 queries may see. Half a tile is worked on like a smaller tile.
__device__ inline int parts_of(int consumer, const QueryWork& work, int n0) {
    const int first = consumer ? work.first1 : work.first0;
    return (n0 + 63 >= first ? LOWER : 0) | (n0 + 64 <= work.i0 + consumer * 64 + 63 && n0 + 127 >= first ? UPPER : 0);
}
__device__ inline int half_offset(int parts) { return parts == UPPER ? 64 * 128 : 0; }           // bytes, to its rows in each slab

// ---------------------------------------------------------------------------------------------------------------------
// Pieces of the kernels

// A kernel for problems without documents and ring is compiled apart: what there is not costs it nothing
template <bool EXTRAS> __device__ inline Problem simplified(const Problem& given) {
    Problem a = given;
    if (!EXTRAS) a.ring = nullptr, a.starts = a.ends = nullptr, a.prefix = {0, 0};
    return a;
}

// A block's first item has the block's number; each next one is drawn by the producer from a counter that is 0 when the kernel starts. So blocks
// stay together in the order however long their items take, and end together. Results of an item do not depend on who took it. A block draws
// until there is no item, so that there are `items` draws in all, whatever the number of blocks: the last one sets the counter to 0 again, for
// the next kernel. By thread 0; the compiler must see that the number is one for its warp
__device__ inline int draw(const Problem& a) {
    results_wait();                                                      // the kernel before may still draw, if this one was launched EARLY
    return __shfl_sync(1u, gridDim.x + (int)atomicInc((unsigned*)a.drawn, a.schedule.items - 1), 0);
}
// An item's number goes to the consumers with its first tiles, position n of their ring: at NUMBERS in shared memory, there is one for each stage
template <int NUMBERS, int STAGES> __device__ inline int& number_of(const Ring<STAGES>&, int n) {
    return reinterpret_cast<int*>(sm90_shared + NUMBERS)[n % STAGES];
}
// By the producer, before it loads. false: there is no such item, and no more; the consumers find the number all the same
template <int NUMBERS, int STAGES> __device__ inline bool hand_on(const Ring<STAGES>& ring, int n, int item, const Schedule& s) {
    ring.wait_empty(n);
    number_of<NUMBERS>(ring, n) = item;
    if (item < s.items) return true;
    barrier_arrive(ring.full_bar(n));
    return false;
}
// By consumers, until they release the stage: read by the lane that does. The compiler must see that the number is one for a warp
template <int NUMBERS, int STAGES> __device__ inline int handed_on(const Ring<STAGES>& ring, int n) {
    ring.wait_full(n);
    int item = 0;
    if (threadIdx.x % WARP == 0) item = number_of<NUMBERS>(ring, n);
    return __shfl_sync(0xffffffffu, item, 0);
}

// A tile as position n of a ring, when its stage is empty
template <int HD, int STAGES> __device__ inline void load_stage(const Ring<STAGES>& ring, int n, const CUtensorMap* map, int head, int t, int b) {
    ring.wait_empty(n);
    barrier_expect(ring.full_bar(n), TILE_BYTES<HD>);
    load_tile<HD, ROWS, ROWS>(ring.tile(n), ring.full_bar(n), map, head, t, b);
}
// The maps a producer loads keys by
struct KeyMaps { const CUtensorMap *qkv, *ring; };
// Keys (value = 0) or values (1) of a visit, as position n of a ring of tiles
template <int HD, int STAGES>
__device__ inline void load_keys(const Ring<STAGES>& stages, int n, const KeyMaps& maps, const Args<bf16>& a, const QueryWork& work,
                                 const KeyTile& tile, int value) {
    const int heads = a.H / a.G, g = work.h / heads;
    load_stage<HD>(stages, n, tile.ring ? maps.ring : maps.qkv, tile.ring ? value * a.G + g : g * (heads + 2) + heads + value, tile.t, work.b);
}

// Scores of unseen pairs become -infinity, in 64 columns: this lane's first row sees columns from[0] .. to[0], its second from[1] .. to[1].
__device__ inline void mask(float* s, const int (&from)[2], const int (&to)[2]) {
    // How many of this lane's 16 columns, 8 n + column + e, lie before column x
    const int column = threadIdx.x % 4 * 2;
    auto before = [&](int x) {
        const int y = min(max(x - column, 0), 64);
        return y / 8 * 2 + min(y % 8, 2);
    };
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint32_t seen = ((1u << before(min(to[half], 63) + 1)) - 1) & ~((1u << before(from[half])) - 1);   // bit 2 n + e
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                if (!(seen >> (2 * n + e) & 1)) s[n * 4 + half * 2 + e] = -INFINITY;
    }
}
// The scores of a consumer's 64 queries, of which `row` is this lane's first, with N keys from n0 on. all: the first key that all 64 see
__device__ inline void
mask_keys(float* s, const Args<bf16>& a, const QueryWork& work, const KeyTile& tile, int n0, int N, int i, int least, int all) {
#pragma unroll
    for (int part = 0; part < ROWS; part += 64) {
        const int p = n0 + part;
        if (part >= N || p + 63 <= least && p >= all && p >= tile.from && p + 63 <= tile.to) continue;
        int from[2], to[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int query = i + half * 8;
            from[half] = max(a.first_key(work.b, query), tile.from) - p, to[half] = min(query, tile.to) - p;
        }
        mask(s + part / 2, from, to);
    }
}

// Gradients of turned queries or keys become those before the turn (kernels/cpu/rope.h): columns j and j + HD / 2 of a row are the same
// lane's. t: positions of this lane's two rows
template <int NR> __device__ inline void turn_back(float (&x)[NR], const Args<bf16>& a, const int (&t)[2]) {
    constexpr int HD = NR * 2, N = HD / 16;                              // column 8 (n + N) is that of n, + HD / 2
    if (!a.rope) return;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float* row = a.rope + (int64_t)min(t[half], a.T - 1) * HD + threadIdx.x % 4 * 4;
#pragma unroll
        for (int n = 0; n < N; n++) {
            const Vec<float, 4> cos_sin = load_vec<4>(row + n * 16);     // of j = 8 n + lane%4 * 2, and of j + 1
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float &x1 = x[n * 4 + half * 2 + e], &x2 = x[(n + N) * 4 + half * 2 + e];
                const float first = x1, second = x2;
                x1 = fmaf(first, cos_sin[2 * e], second * cos_sin[2 * e + 1]);
                x2 = fmaf(second, cos_sin[2 * e], -first * cos_sin[2 * e + 1]);
            }
        }
    }
}

// Gradients of a warpgroup, when all its products with the tiles where they are staged are done: stage() by all, send() by one thread
template <class Stage, class Send> __device__ inline void store_gradients(int consumer, bool real, Stage stage, Send send) {
    named_sync(3 + consumer, WARPGROUP);
    stage();
    fence_async();
    named_sync(3 + consumer, WARPGROUP);
    if (threadIdx.x % WARPGROUP == 0 && real) send(), tma_store_commit();
}
// That store has read its tiles: they may be loaded again. By the lane of each warp that read the item's number (handed_on); only the one that sent
// the store has anything to wait for
template <int STAGES> __device__ inline void release_staging(const Ring<STAGES>& ring, int round) {
    if (threadIdx.x % WARP == 0) tma_store_wait(), barrier_arrive(ring.empty_bar(round));
}

#endif // SAMBA_SM90A_CODE

// ---------------------------------------------------------------------------------------------------------------------
// Launches

inline Schedule schedule(int64_t tiles, int64_t owners, int blocks, bool last_first) {
    if (tiles * owners > INT32_MAX / 2)
        fail("attention: %lld tiles of %lld heads: more than 2^30 pieces of work; use a smaller batch", (long long)tiles, (long long)owners);
    const int section = (int)std::min<int64_t>(owners, std::max(1, blocks / 22));
    const int last = (int)std::min<int64_t>(owners, std::max(section, blocks / 9));                            // at least
    const int sections = (int)((owners - last) / section), rest = (int)owners - sections * section;
    return {(int)tiles, (int)owners, (int)(tiles * owners), sections, section, rest, (int)(section * tiles), last_first};
}
constexpr int SHARED_LIMIT = 227 * 1024;                                  // a block's, on compute capability 9.0
inline bool supported(const Args<bf16>& a, const void* other) {          // T * row * 2 < 2^40: a limit of tensor maps
    return (a.hd == 64 || a.hd == 128) && usable() && ((uintptr_t)a.qkv | (uintptr_t)a.ring | (uintptr_t)other) % 16 == 0 &&
           std::max<int64_t>(a.T * a.row(), a.ring ? a.capacity * 2 * a.G * a.hd : 0) < (int64_t)1 << 39;
}

// EARLY: blocks may start where those of the kernel before have ended, and wait for it (results_wait) before they read its results
enum Start { ORDERLY, EARLY };
// One block a multiprocessor, over tiles x heads (or groups): a producer and a warpgroup for each 64 rows of a tile
template <int TILE_ROWS = ROWS, class Kernel, class... Maps>
inline void launch_resident(Kernel kernel, Problem a, int64_t owners, bool last_first, Start start, int shared, Stream stream,
                            const Maps&... maps) {
    if (!a.drawn) fail("attention: this path needs a counter of the items that blocks have drawn, and none was given");
    const int blocks = multiprocessors();
    a.schedule = schedule(ceil_div(a.T, TILE_ROWS), owners, blocks, last_first);
    a.heads = (int)(owners / a.B);
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = std::min(blocks, a.schedule.items), config.blockDim = (1 + TILE_ROWS / 64) * WARPGROUP;
    config.dynamicSmemBytes = shared, config.stream = stream;
    config.attrs = &early, config.numAttrs = start == EARLY;
    CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, maps..., a));
    LAUNCH_CHECK();
}
inline Problem problem(const Args<bf16>& a) {
    return {a, {}, {}, a.ring ? Prefix{(int)a.capacity, (int)(a.position % a.capacity)} : Prefix{0, 0}, (int)padded_length(a.T)};
}
// Keys and queries of the call; of the ring (or, where there is none, anything)
inline CUtensorMap qkv_map(const Args<bf16>& a, int rows) { return tensor_map(a.qkv, a.B, a.T, a.H + 2 * a.G, a.hd, rows); }
inline CUtensorMap ring_map(const Args<bf16>& a) { return a.ring ? tensor_map(a.ring, a.B, a.capacity, 2 * a.G, a.hd, ROWS) : qkv_map(a, ROWS); }
#endif // __CUDACC__

} // namespace sm90
} // namespace gpu
