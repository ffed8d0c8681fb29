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
// The end of a step: a token is drawn, and its embedding is the next x. One block a sequence.

constexpr int SAMPLE_THREADS = 1024;       // of a block

template <class X> struct EmbedArgs {
    float* x;                              // (B,d)
    X* xw;
    float *squares, *cos_sin;              // (B,d/8), (B,hd/2,2)
    const float* norm;                     // of the first layer
    const X* embedding;
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
        float square = v * v;
        const unsigned eight = 0xffu << (threadIdx.x % WARP / ROWS * ROWS);
#pragma unroll
        for (int o = ROWS / 2; o > 0; o /= 2) square += __shfl_xor_sync(eight, square, o);
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

// add(x, y) of all threads' values, exact in any order; every thread gets it. `turn` (0, 1) changes from call to call, so that what one call
// left is not overwritten by the next before all have read it. *before: the sum of the threads in front of this one, where wanted.
template <int RANKS, class Add> __device__ inline uint64_t over_all(uint64_t x, int& turn, int rank, Add add, uint64_t* before = nullptr) {
    __shared__ uint64_t of_warps[2][WARP], of_block[2];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    turn ^= 1;
    uint64_t upto = x;                                                          // of the warp's lanes up to this one
#pragma unroll
    for (int o = 1; o < WARP; o *= 2) {
        const uint64_t other = __shfl_up_sync(0xffffffffu, upto, o);
        if (lane >= o) upto = add(upto, other);
    }
    if (lane == WARP - 1) of_warps[turn][warp] = upto;
    __syncthreads();
    uint64_t warps = of_warps[turn][lane];                                      // 32 of them: 1,024 threads
#pragma unroll
    for (int o = 1; o < WARP; o *= 2) {
        const uint64_t other = __shfl_up_sync(0xffffffffu, warps, o);
        if (lane >= o) warps = add(warps, other);
    }
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

struct SampleArgs {
    int *tokens, *emitted;
    int64_t *position, *drawn;
    uint8_t* seen;
    const float* logits;
    const uint64_t* keys;
    SampleOptions options;
    int B, V, choices, each;               // each: logits of a thread
};

template <class X, int RANKS> __global__ void __launch_bounds__(SAMPLE_THREADS) sample_kernel(SampleArgs a, EmbedArgs<X> e) {
    constexpr int MOST_KEPT = RANKS > 1 ? 65536 / (RANKS * SAMPLE_THREADS) : 1;  // a thread's logits, in registers; there may be 65,536
    __shared__ uint64_t chosen;                                                 // by this block: a token and one more, or 0
    wait_for_input();
    const int b = blockIdx.x / RANKS, rank = blockIdx.x % RANKS, thread = rank * SAMPLE_THREADS + threadIdx.x;
    const float* logits = a.logits + (int64_t)b * a.V;
    const uint8_t* seen = a.seen + (int64_t)b * a.V;
    const SampleOptions o = a.options;
    const int begin = min(a.choices, thread * a.each), count = min(a.choices - begin, a.each);
    const auto penalised = [&](int i) {
        float x = __ldcg(logits + i);
        if (o.penalty != 1.f && seen[i]) x = x > 0 ? x / o.penalty : x * o.penalty;
        return isnan(x) ? -INFINITY : x;
    };
    float kept[MOST_KEPT];
    if constexpr (RANKS > 1) {
#pragma unroll
        for (int k = 0; k < MOST_KEPT; k++) kept[k] = k < count ? penalised(begin + k) : -INFINITY;
    }
    const int64_t position = a.position[b] + 1, drawn_before = a.drawn[b];
    const uint64_t key = a.keys[b];
    if (rank == 0) embed_position(e, b, position);                              // the draw has no part in it
    // use(value, index) of this thread's logits
    const auto for_each = [&](auto use) {
        if constexpr (RANKS > 1) {
#pragma unroll
            for (int k = 0; k < MOST_KEPT; k++)
                if (k < count) use(kept[k], begin + k);
        } else {
            for (int k = 0; k < count; k++) use(penalised(begin + k), begin + k);
        }
    };
    int turn = 0;
    const auto most = [](uint64_t x, uint64_t y) { return max(x, y); };
    const auto sum = [](uint64_t x, uint64_t y) { return x + y; };
    uint64_t best = 0;
    for_each([&](float x, int i) { best = max(best, ranked(x, i)); });
    best = over_all<RANKS>(best, turn, rank, most);
    const int best_index = (int)(0xffffffffu - (unsigned)best);
    const bool any = (unsigned)(best >> 32) > order_key(-INFINITY);
    if (threadIdx.x == 0) chosen = 0;
    __syncthreads();
    int drawn_token = -1;                                                       // where this thread has it
    if (any && o.temperature > 0) {
        const unsigned best_key = (unsigned)(best >> 32);
        const float top = __uint_as_float(best_key & 0x80000000u ? best_key ^ 0x80000000u : ~best_key), scale = LOG2E / o.temperature;
        const auto mass = [&](float x) { return (uint64_t)(exp2f((x - top) * scale) * (float)SAMPLE_MASS); };
        uint64_t lowest = 0;                                                    // rank of those that are kept
        // The lowest rank so that what ranks there or above weighs at least `target`
        const auto cut = [&](uint64_t target, auto weight) {
            uint64_t at = 0;
            for (int bit = 63; bit >= 0; bit--) {
                if (bit == 31) bit = 15, at |= 0xffff0000ull;                   // indices are below 2^16: the upper half of their complement is ones
                const uint64_t candidate = at | 1ull << bit;
                uint64_t mine = 0;
                for_each([&](float x, int i) { mine += ranked(x, i) >= candidate ? weight(x) : 0; });
                if (over_all<RANKS>(mine, turn, rank, sum) >= target) at = candidate;
            }
            return at;
        };
        if (o.top_k > 0 && o.top_k < a.choices) lowest = cut((uint64_t)o.top_k, [](float) { return 1ull; });
        uint64_t before = 0, total;
        const auto weigh = [&]() {
            uint64_t mine = 0;
            for_each([&](float x, int i) { mine += ranked(x, i) >= lowest ? mass(x) : 0; });
            total = over_all<RANKS>(mine, turn, rank, sum, &before);
            return mine;
        };
        uint64_t mine = weigh();
        if (o.top_p < 1.f) {
            const uint64_t target = min(max((uint64_t)ceil((double)o.top_p * (double)total), (uint64_t)1), total);
            lowest = max(lowest, cut(target, mass));
            mine = weigh();
        }
        const uint64_t drawn = min((uint64_t)(counter_uniform(key, (uint64_t)drawn_before) * (double)total), total - 1);
        if (drawn >= before && drawn < before + mine)
            for_each([&](float x, int i) {
                if (ranked(x, i) >= lowest) before += mass(x);
                if (drawn_token < 0 && drawn < before) drawn_token = i;
            });
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
