// The end of a decode step: a token is drawn from the logits (sample_token() in kernels/cpu/decode.h), and its embedding is the next
// x. Weights are integers and their sums exact, so that blocks can add them in any order. A cut (top-k, top-p) is found bit by
// bit: the lowest rank so that what ranks above weighs enough.
//
// Between two steps nothing else can run, so that the draw's 4 V bytes a sequence do not matter, but its latency does: on Hopper a
// cluster of 8 or 4 blocks takes a sequence, a thread some neighbouring logits, which it keeps; blocks read each other's sums in shared memory.
#pragma once
#include "linear.cuh"
#include "../random.h"
#include "../rope.cuh"

namespace gpu {
namespace decode {

// ---------------------------------------------------------------------------------------------------------------------
// The embedding of a token: the next x, and what the first layer's norm makes of it

constexpr int SAMPLE_THREADS = 1024;       // of a block

template <class X> struct EmbedArgs {
    float* x;                              // (B,d)
    X* xw;                                 // (B,d)
    float *squares, *cos_sin;              // (B,d/8), (B,hd/2,2)
    const float* norm;                     // (d) of the first layer
    const X* embedding;                    // (V,d)
    int d, hd;
    RopeTurns turns;
};

inline RopeTurns rope_turns(int hd, double base) {
    RopeTurns turns{};
    for (int j = 0; j < hd / 2; j++) turns.turn[j] = cpu::rope_turn(j, hd, base);
    return turns;
}

// xw and squares of a sequence's x (value(i), i < d), by `stride` threads of which this is the first-th
template <class X, class Value> __device__ inline void norm_row(X* xw, float* squares, const float* norm, int d, int first, int stride, Value value) {
    const int tiles = (d + ROWS - 1) / ROWS;
    for (int i = first; i < tiles * ROWS; i += stride) {
        const float v = i < d ? value(i) : 0.f;
        if (i < d) xw[i] = from_float<X>(v * norm[i]);
        const float square = tile_sum(v * v);
        if (i % ROWS == 0) squares[i / ROWS] = square;
    }
}

template <class X> __global__ void norm_kernel(X* xw, float* squares, const float* x, const float* norm, int d) {
    wait_for_input();
    const int64_t b = blockIdx.x;
    norm_row(xw + b * d, squares + b * ((d + ROWS - 1) / ROWS), norm, d, threadIdx.x, blockDim.x, [&](int i) { return __ldcg(x + b * d + i); });
}

// Columns of the whole row, from `first` on in steps of `stride` threads
template <class X> __device__ inline void embed_token(const EmbedArgs<X>& a, int64_t b, int token, int first, int stride) {
    norm_row(a.xw + b * a.d, a.squares + b * ((a.d + ROWS - 1) / ROWS), a.norm, a.d, first, stride, [&](int i) {
        const float v = to_float(a.embedding[(int64_t)token * a.d + i]);
        a.x[b * a.d + i] = v;
        return v;
    });
}
template <class X> __device__ inline void embed_position(const EmbedArgs<X>& a, int64_t b, int64_t position) {
    for (int j = threadIdx.x; j < a.hd / 2; j += blockDim.x) {
        double sine, cosine;
        sincospi((double)(int64_t)((uint64_t)position * a.turns.turn[j]) * 0x1p-63, &sine, &cosine);      // rope_table_kernel
        a.cos_sin[(b * (a.hd / 2) + j) * 2] = (float)cosine;
        a.cos_sin[(b * (a.hd / 2) + j) * 2 + 1] = (float)sine;
    }
}

template <class X> __global__ void __launch_bounds__(SAMPLE_THREADS) embed_kernel(EmbedArgs<X> a, const int* tokens, const int64_t* position) {
    wait_for_input();
    embed_position(a, blockIdx.x, position[blockIdx.x]);
    embed_token(a, blockIdx.x, tokens[blockIdx.x], threadIdx.x, blockDim.x);
}

// Of (value, index) the greatest value, the lowest index among equals: as one integer to maximise. Values in the order of their keys.
__device__ inline unsigned order_key(float x) {
    const unsigned bits = __float_as_uint(x == 0.f ? 0.f : x);                  // -0 equals 0
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ inline uint64_t ranked(float x, int i) { return (uint64_t)order_key(x) << 32 | (0xffffffffu - (unsigned)i); }
__device__ inline unsigned value_key(uint64_t rank) { return (unsigned)(rank >> 32); }
__device__ inline float value_of(uint64_t rank) {
    const unsigned key = value_key(rank);
    return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}
__device__ inline int index_of(uint64_t rank) { return (int)(0xffffffffu - (unsigned)rank); }

// ---------------------------------------------------------------------------------------------------------------------
// The threads of a sequence: RANKS blocks: 1, or a cluster

template <int RANKS> __device__ inline void ranks_meet() {
#if __CUDA_ARCH__ >= 900
    if constexpr (RANKS > 1) {
        asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
        return;
    }
#endif
    __syncthreads();
}
// *p of block `rank`
template <int RANKS> __device__ inline uint64_t load_from_rank(const uint64_t* p, int rank) {
#if __CUDA_ARCH__ >= 900
    if constexpr (RANKS > 1) {
        uint64_t v;
        unsigned at;
        asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"((unsigned)__cvta_generic_to_shared(p)), "r"(rank));
        asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(v) : "r"(at) : "memory");
        return v;
    }
#endif
    return *p;
}

// add(x, y) of the values of a warp's lanes up to this one
template <class Add> __device__ inline uint64_t up_to_lane(uint64_t x, int lane, Add add) {
#pragma unroll
    for (int o = 1; o < WARP; o *= 2) {
        const uint64_t other = __shfl_up_sync(0xffffffffu, x, o);
        if (lane >= o) x = add(x, other);
    }
    return x;
}

// add(x, y) of all threads' values, exact in any order; every thread gets it. `turn` (0, 1) changes from call to call, so that what one call
// left is not overwritten by the next before all have read it. *before: the sum of the threads in front of this one, where wanted.
template <int RANKS, class Add> __device__ inline uint64_t over_all(uint64_t x, int& turn, int rank, Add add, uint64_t* before = nullptr) {
    __shared__ uint64_t of_warps[2][WARP], of_block[2];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    turn ^= 1;
    const uint64_t upto = up_to_lane(x, lane, add);
    if (lane == WARP - 1) of_warps[turn][warp] = upto;
    __syncthreads();
    const uint64_t warps = up_to_lane(of_warps[turn][lane], lane, add);         // 32 of them: 1,024 threads
    const uint64_t in_front = __shfl_sync(0xffffffffu, warps, max(warp - 1, 0)), block = __shfl_sync(0xffffffffu, warps, WARP - 1);
    if (before) *before = upto - x + (warp > 0 ? in_front : 0);
    if constexpr (RANKS == 1) return block;
    if (threadIdx.x == 0) of_block[turn] = block;
    ranks_meet<RANKS>();
    uint64_t total = 0;
#pragma unroll
    for (int r = 0; r < RANKS; r++) {
        const uint64_t one = load_from_rank<RANKS>(&of_block[turn], r);
        if (before && r < rank) *before += one;
        total = add(total, one);
    }
    return total;
}

// What over_all() joins values by
struct Greatest { __device__ uint64_t operator()(uint64_t x, uint64_t y) const { return max(x, y); } };
struct Sum { __device__ uint64_t operator()(uint64_t x, uint64_t y) const { return x + y; } };

// ---------------------------------------------------------------------------------------------------------------------
// The draw

struct SampleArgs {
    int *tokens, *emitted;                 // (B), (EMIT_SLOTS,B)
    int64_t *position, *drawn;             // (B)
    uint8_t* seen;                         // (B,V)
    const float* logits;                   // (B,V)
    const uint64_t* keys;                  // (B)
    SampleOptions options;
    int B, V, choices, each;               // each: logits of a thread
};

// The logits of a thread: some neighbouring ones of a sequence, with the penalty of tokens that were there before. The threads of a cluster
// keep them in registers; one block has too few for that and reads them each time.
template <int RANKS> struct ThreadLogits {
    static constexpr int MOST_KEPT = RANKS > 1 ? 65536 / (RANKS * SAMPLE_THREADS) : 1;    // there may be 65,536
    const float* logits;                   // (V)
    const uint8_t* seen;                   // (V)
    float penalty;
    int begin, count;
    float kept[MOST_KEPT];

    __device__ ThreadLogits(const SampleArgs& a, int64_t b, int thread)
        : logits(a.logits + b * a.V), seen(a.seen + b * a.V), penalty(a.options.penalty), begin(min(a.choices, thread * a.each)),
          count(min(a.choices - begin, a.each)) {
        if constexpr (RANKS > 1) {
#pragma unroll
            for (int k = 0; k < MOST_KEPT; k++) kept[k] = k < count ? penalised(begin + k) : -INFINITY;
        }
    }
    __device__ float penalised(int i) const {
        float x = __ldcg(logits + i);
        if (penalty != 1.f && seen[i]) x = x > 0 ? x / penalty : x * penalty;
        return isnan(x) ? -INFINITY : x;
    }
    // use(value, index) of each
    template <class Use> __device__ void for_each(Use use) const {
        if constexpr (RANKS > 1) {
#pragma unroll
            for (int k = 0; k < MOST_KEPT; k++)
                if (k < count) use(kept[k], begin + k);
        } else {
            for (int k = 0; k < count; k++) use(penalised(begin + k), begin + k);
        }
    }
};

// The draw of a sequence's token by all its threads: each logit weighs 2^((x - top) scale), as an integer
template <int RANKS> struct Draw {
    const ThreadLogits<RANKS>& logits;
    int rank;                              // of this block
    int& turn;                             // of over_all()
    float top, scale;

    __device__ uint64_t mass(float x) const { return (uint64_t)(exp2f((x - top) * scale) * (float)SAMPLE_MASS); }

    // The lowest rank so that what ranks there or above weighs at least `target`
    template <class Weight> __device__ uint64_t cut(uint64_t target, Weight weight) const {
        uint64_t at = 0;
        for (int bit = 63; bit >= 0; bit--) {
            if (bit == 31) bit = 15, at |= 0xffff0000ull;                       // indices are below 2^16: the upper half of their complement is ones
            const uint64_t candidate = at | 1ull << bit;
            uint64_t mine = 0;
            logits.for_each([&](float x, int i) { mine += ranked(x, i) >= candidate ? weight(x) : 0; });
            if (over_all<RANKS>(mine, turn, rank, Sum{}) >= target) at = candidate;
        }
        return at;
    }

    struct Masses { uint64_t mine, before, total; };                            // of this thread's logits, of the threads' in front of it, of all
    __device__ Masses weigh(uint64_t lowest) const {
        Masses m{};
        logits.for_each([&](float x, int i) { m.mine += ranked(x, i) >= lowest ? mass(x) : 0; });
        m.total = over_all<RANKS>(m.mine, turn, rank, Sum{}, &m.before);
        return m;
    }

    // The token, in the thread that has it; -1 in the others
    __device__ int token(const SampleOptions& o, int choices, uint64_t key, int64_t drawn_before) const {
        uint64_t lowest = 0;                                                    // rank of those that are kept
        if (o.top_k > 0 && o.top_k < choices) lowest = cut((uint64_t)o.top_k, [](float) { return 1ull; });
        Masses m = weigh(lowest);
        if (o.top_p < 1.f) {
            const uint64_t target = min(max((uint64_t)ceil((double)o.top_p * (double)m.total), (uint64_t)1), m.total);
            lowest = max(lowest, cut(target, [&](float x) { return mass(x); }));
            m = weigh(lowest);
        }
        const uint64_t drawn = min((uint64_t)(counter_uniform(key, (uint64_t)drawn_before) * (double)m.total), m.total - 1);
        int found = -1;
        if (drawn >= m.before && drawn < m.before + m.mine)
            logits.for_each([&](float x, int i) {
                if (ranked(x, i) >= lowest) m.before += mass(x);
                if (found < 0 && drawn < m.before) found = i;
            });
        return found;
    }
};

template <class X, int RANKS> __global__ void __launch_bounds__(SAMPLE_THREADS) sample_kernel(SampleArgs a, EmbedArgs<X> e) {
    __shared__ uint64_t chosen;                                                 // by this block: a token and one more, or 0
    wait_for_input();
    const int b = blockIdx.x / RANKS, rank = blockIdx.x % RANKS, thread = rank * SAMPLE_THREADS + threadIdx.x;
    const SampleOptions o = a.options;
    const ThreadLogits<RANKS> logits(a, b, thread);
    const int64_t position = a.position[b] + 1, drawn_before = a.drawn[b];
    const uint64_t key = a.keys[b];
    if (rank == 0) embed_position(e, b, position);                              // the draw has no part in it
    int turn = 0;
    uint64_t best = 0;
    logits.for_each([&](float x, int i) { best = max(best, ranked(x, i)); });
    best = over_all<RANKS>(best, turn, rank, Greatest{});
    const int best_index = index_of(best);
    const bool any = value_key(best) > order_key(-INFINITY);
    if (threadIdx.x == 0) chosen = 0;
    __syncthreads();
    int drawn_token = -1;                                                       // where this thread has it
    if (any && o.temperature > 0) {
        drawn_token = Draw<RANKS>{logits, rank, turn, value_of(best), LOG2E / o.temperature}.token(o, a.choices, key, drawn_before);
    } else if (any && thread == 0) {
        drawn_token = best_index;
    }
    if (drawn_token >= 0) chosen = (uint64_t)drawn_token + 1;
    ranks_meet<RANKS>();
    uint64_t found = 0;
#pragma unroll
    for (int r = 0; r < RANKS; r++) found = max(found, load_from_rank<RANKS>(&chosen, r));
    const int id = (int)found - 1, token = max(id, 0);
    if (thread == 0) {
        a.emitted[drawn_before % EMIT_SLOTS * a.B + b] = id;
        a.tokens[b] = token;
        a.seen[(int64_t)b * a.V + token] = 1;
        a.position[b] = position;
        a.drawn[b] = drawn_before + 1;
    }
    embed_token(e, b, token, thread, RANKS * SAMPLE_THREADS);
    if constexpr (RANKS > 1) ranks_meet<RANKS>();                               // no block ends while another reads its shared memory
}

} // namespace decode
} // namespace gpu
