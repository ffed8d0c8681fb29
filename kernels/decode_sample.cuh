// The end of a decode step: a token is drawn from the logits (sample_token() in kernels/cpu/decode.h), and its embedding is the next
// x. Weights are integers and their sums exact, so that blocks can add them in any order. A cut (top-k, top-p) is found bit by
// bit: the lowest rank so that what ranks above weighs enough.
#pragma once
#include "decode_linear.cuh"
#include "random.h"
#include "rope.cuh"

namespace gpu {
namespace decode {

// ---------------------------------------------------------------------------------------------------------------------
// The end of a step: a token is drawn, and its embedding is the next x. One block a sequence.

constexpr int SAMPLE_THREADS = 1024;

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

// xw and squares of a sequence's x (value(i), i < d), by the whole block
template <class X, class Value> __device__ inline void norm_row(X* xw, float* squares, const float* norm, int d, Value value) {
    const int tiles = (d + ROWS - 1) / ROWS;
    for (int i = threadIdx.x; i < tiles * ROWS; i += blockDim.x) {
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
    norm_row(xw + b * d, squares + b * ((d + ROWS - 1) / ROWS), norm, d, [&](int i) { return __ldcg(x + b * d + i); });
}

template <class X> __device__ inline void embed_token(const EmbedArgs<X>& a, int64_t b, int token) {
    norm_row(a.xw + b * a.d, a.squares + b * ((a.d + ROWS - 1) / ROWS), a.norm, a.d, [&](int i) {
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
    embed_token(a, blockIdx.x, tokens[blockIdx.x]);
}

template <class T> __device__ inline T block_total(T x) {                       // integers: exact in any order; every thread gets it
    __shared__ T partial[WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
    for (int o = WARP / 2; o > 0; o /= 2) x += __shfl_xor_sync(0xffffffffu, x, o);
    __syncthreads();
    if (lane == 0) partial[warp] = x;
    __syncthreads();
    x = partial[lane];
#pragma unroll
    for (int o = WARP / 2; o > 0; o /= 2) x += __shfl_xor_sync(0xffffffffu, x, o);
    return x;
}

// Of (value, index) the greatest value, the lowest index among equals: as one integer to maximise. Values in the order of their keys.
__device__ inline unsigned order_key(float x) {
    const unsigned bits = __float_as_uint(x == 0.f ? 0.f : x);                  // -0 equals 0
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ inline uint64_t ranked(float x, int i) { return (uint64_t)order_key(x) << 32 | (0xffffffffu - (unsigned)i); }

// The lowest rank so that what ranks there or above weighs at least `target`. weight(rank(i), i) of this thread's i, begin to end.
template <class Rank, class Weight> __device__ inline uint64_t cut(uint64_t target, int begin, int end, Rank rank, Weight weight) {
    uint64_t at = 0;
    for (int bit = 63; bit >= 0; bit--) {
        if (bit == 31) bit = 15, at |= 0xffff0000ull;  // indices are below 2^16: the upper half of their complement is ones
        const uint64_t candidate = at | 1ull << bit;
        uint64_t sum = 0;
        for (int i = begin; i < end; i++)
            if (rank(i) >= candidate) sum += weight(i);
        if (block_total(sum) >= target) at = candidate;
    }
    return at;
}

// The draw where nothing is cut: by 4 neighbouring indices a thread, chunk after chunk. First the sum of each chunk, then the draw's
// place in its chunk. -1 in all threads but the one that has it.
template <class Value> __device__ inline int draw_from_all(int choices, Value value, float top, float scale, double uniform) {
    constexpr int EACH = 4, CHUNK = SAMPLE_THREADS * EACH, MOST = 65536 / CHUNK;
    __shared__ uint64_t sums[MOST][WARP];              // of a chunk's warps
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, chunks = (choices + CHUNK - 1) / CHUNK;
    const auto mass = [&](int i) { return i < choices ? (uint64_t)(exp2f((value(i) - top) * scale) * (float)SAMPLE_MASS) : 0; };
    const auto warp_total = [](uint64_t x) {
#pragma unroll
        for (int o = WARP / 2; o > 0; o /= 2) x += __shfl_xor_sync(0xffffffffu, x, o);
        return x;
    };
    for (int c = 0; c < chunks; c++) {
        uint64_t mine = 0;
#pragma unroll
        for (int k = 0; k < EACH; k++) mine += mass(c * CHUNK + warp * WARP * EACH + k * WARP + lane);       // in any order; banks differ
        mine = warp_total(mine);
        if (lane == 0) sums[c][warp] = mine;
    }
    __syncthreads();
    uint64_t total = 0, until[MOST];                   // of the chunks up to this one; the same in all threads
#pragma unroll
    for (int c = 0; c < MOST; c++) {
        if (c < chunks) total += warp_total(sums[c][lane]);
        until[c] = total;
    }
    const uint64_t drawn = min((uint64_t)(uniform * (double)total), total - 1);
    int chunk = 0;
    uint64_t before = 0;
#pragma unroll
    for (int c = 0; c < MOST - 1; c++)
        if (drawn >= until[c]) chunk = c + 1, before = until[c];
    before += warp_total(lane < warp ? sums[chunk][lane] : 0);
    uint64_t own[EACH], sum = 0;
#pragma unroll
    for (int k = 0; k < EACH; k++) sum += own[k] = mass(chunk * CHUNK + (int)threadIdx.x * EACH + k);
    uint64_t upto = sum;                               // of the warp's lanes up to this one
#pragma unroll
    for (int o = 1; o < WARP; o *= 2) {
        const uint64_t other = __shfl_up_sync(0xffffffffu, upto, o);
        if (lane >= o) upto += other;
    }
    before += upto - sum;
    if (drawn < before || drawn >= before + sum) return -1;
#pragma unroll
    for (int k = 0; k < EACH; k++) {
        before += own[k];
        if (drawn < before) return chunk * CHUNK + (int)threadIdx.x * EACH + k;
    }
    return -1;
}

struct SampleArgs {
    int *tokens, *emitted;
    int64_t *position, *drawn;
    uint8_t* seen;
    const float* logits;
    const uint64_t* keys;
    SampleOptions options;
    int V, choices;
    bool in_shared;                        // the penalised logits fit in shared memory
};

template <class X> __global__ void __launch_bounds__(SAMPLE_THREADS) sample_kernel(SampleArgs a, EmbedArgs<X> e) {
    extern __shared__ float kept_logits[];
    __shared__ uint64_t warp_totals[WARP];
    __shared__ int chosen;
    wait_for_input();
    const int b = blockIdx.x, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const float* logits = a.logits + (int64_t)b * a.V;
    const uint8_t* seen = a.seen + (int64_t)b * a.V;
    const SampleOptions o = a.options;
    const int64_t position = a.position[b] + 1;
    embed_position(e, b, position);                    // the draw has no part in it
    const auto penalised = [&](int i) {
        float x = __ldcg(logits + i);
        if (o.penalty != 1.f && seen[i]) x = x > 0 ? x / o.penalty : x * o.penalty;
        return isnan(x) ? -INFINITY : x;
    };
    // The greatest, by all threads side by side
    uint64_t best = 0;
#pragma unroll 16
    for (int i = threadIdx.x; i < a.choices; i += SAMPLE_THREADS) {
        const float x = penalised(i);
        if (a.in_shared) kept_logits[i] = x;
        best = max(best, ranked(x, i));
    }
#pragma unroll
    for (int s = WARP / 2; s > 0; s /= 2) best = max(best, __shfl_xor_sync(0xffffffffu, best, s));
    if (lane == 0) warp_totals[warp] = best;
    __syncthreads();
    best = warp_totals[lane];
#pragma unroll
    for (int s = WARP / 2; s > 0; s /= 2) best = max(best, __shfl_xor_sync(0xffffffffu, best, s));
    const int best_index = (int)(0xffffffffu - (unsigned)best);
    const auto value = [&](int i) { return a.in_shared ? kept_logits[i] : penalised(i); };
    const bool any = (unsigned)(best >> 32) > order_key(-INFINITY);
    if (threadIdx.x == 0) chosen = any ? best_index : -1;
    const bool all_kept = (o.top_k <= 0 || o.top_k >= a.choices) && o.top_p >= 1.f;
    if (any && o.temperature > 0 && all_kept) {
        const int drawn = draw_from_all(a.choices, value, value(best_index), 1.44269504f / o.temperature, counter_uniform(a.keys[b], (uint64_t)a.drawn[b]));
        if (drawn >= 0) chosen = drawn;
    } else if (any && o.temperature > 0) {
        // A thread has neighbouring indices, an odd number of them so that shared memory's banks differ
        const int share = (a.choices + SAMPLE_THREADS - 1) / SAMPLE_THREADS | 1, begin = min(a.choices, (int)threadIdx.x * share), end = min(a.choices, begin + share);
        const float top = value(best_index), scale = 1.44269504f / o.temperature;
        const auto mass = [&](int i) { return (uint64_t)(exp2f((value(i) - top) * scale) * (float)SAMPLE_MASS); };
        const auto rank = [&](int i) { return ranked(value(i), i); };
        uint64_t lowest = 0;
        if (o.top_k > 0 && o.top_k < a.choices) lowest = cut((uint64_t)o.top_k, begin, end, rank, [](int) { return 1ull; });
        const auto my_mass = [&]() {
            uint64_t sum = 0;
            for (int i = begin; i < end; i++)
                if (lowest == 0 || rank(i) >= lowest) sum += mass(i);
            return sum;
        };
        uint64_t mine = my_mass(), total = block_total(mine);
        if (o.top_p < 1.f) {
            const uint64_t target = min(max((uint64_t)ceil((double)o.top_p * (double)total), (uint64_t)1), total);
            lowest = max(lowest, cut(target, begin, end, rank, mass));
            mine = my_mass(), total = block_total(mine);
        }
        const uint64_t drawn = min((uint64_t)(counter_uniform(a.keys[b], (uint64_t)a.drawn[b]) * (double)total), total - 1);
        uint64_t until = mine;             // of the threads up to this one
#pragma unroll
        for (int s = 1; s < WARP; s *= 2) {
            const uint64_t other = __shfl_up_sync(0xffffffffu, until, s);
            if (lane >= s) until += other;
        }
        __syncthreads();
        if (lane == WARP - 1) warp_totals[warp] = until;
        __syncthreads();
        for (int i = 0; i < warp; i++) until += warp_totals[i];
        uint64_t before = until - mine;
        if (drawn >= before && drawn < until)
            for (int i = begin; i < end; i++) {
                if (lowest > 0 && rank(i) < lowest) continue;
                before += mass(i);
                if (drawn < before) { chosen = i; break; }
            }
    }
    __syncthreads();
    const int id = chosen, token = max(id, 0);
    if (threadIdx.x == 0) {
        a.emitted[a.drawn[b] % EMIT_SLOTS * gridDim.x + b] = id;
        a.tokens[b] = token;
        a.seen[(int64_t)b * a.V + token] = 1;
        a.position[b] = position;
        a.drawn[b]++;
    }
    embed_token(e, b, token);
}

} // namespace decode
} // namespace gpu
