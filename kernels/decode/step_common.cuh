// A decode step in one kernel (decode/step.cuh): which phases there are, and what a block does in each. The producers and the consumers go
// through the same loops.
#pragma once
#include "common.cuh"
#include "step.h"

namespace gpu {
namespace decode {

constexpr int PRODUCERS = 4 * WARP, STEP_THREADS = THREADS + PRODUCERS;
constexpr int TILE = 16;                                   // weight rows of a tile
constexpr int MAX_OWN = 24;                                // rows of x that a block owns
constexpr int MAX_STATES = 256;                            // d_state times sequences

enum class Task : int { conv, x_proj, scan, residual, qkv, attend, combine, swiglu, head };

struct Phase {
    using X = __nv_bfloat16;
    Task task;
    int results;                           // rows of w, or pairs of rows (qkv, swiglu)
    int K, in_stride;                      // columns of w; elements from one sequence's input to the next
    int squares_n;                         // entries of `squares` a sequence; 0: the input has no norm
    const X *w, *in;
    const float* squares;
    X *out, *z, *halo, *ring;              // out: u | x_dbl | out | xw or null | qkv | - | out | hidden | -
    float* h;
    int64_t capacity;
    double per_capacity;                   // 1 / capacity
    const X *u, *qkv;
    const float *conv_w, *conv_b, *A_log, *D, *dt_bias, *norm;
};

struct StepArgs {
    const Phase* phases;
    const int4* shares;                    // (count,blocks) Share
    int count, B, d, e, N, rank, H, G, hd, V, splits;
    bool rope;
    float eps;
    const float *x, *cos_sin;
    const int64_t* position;
    float *logits, *parts, *sums;          // parts: (B,H,splits,2+hd); sums: (B,blocks) squares of x
    unsigned* counter;                     // arrivals of blocks, ever; and what it was before this step
    int probe;                             // measurements only: 1 blocks do not wait for each other; 2 nor compute
    int depth;                             // pieces under way at a time
    long long* trace;                      // (phases, blocks, 4) clocks, or null
};

__device__ inline bool in_pairs(Task t) { return t == Task::qkv || t == Task::swiglu; }
__device__ inline int part_of(int n, int i, int parts) { return (int)((unsigned)n * (unsigned)i / (unsigned)parts); }
// x / by for x < 2^20, in a fifth of a division's instructions
__device__ inline int quotient(int x, int by) { return (int)__fdividef((float)x + 0.5f, (float)by); }

struct Share {                             // a block's results of a phase, and the tiles that they are in
    int begin, count, tiles, base;         // base: results of a tile, rounded down
    __device__ Share() {}
    __device__ explicit Share(int4 v) : begin(v.x), count(v.y), tiles(v.z), base(v.w) {}
    __device__ int tile_begin(int t) const { return begin + t * base + min(t, count - tiles * base); }
};

// The weight row in a slot of a tile of n results from `first` on
__device__ inline int weight_row(Task task, int results, int hd, int first, int n, int slot) {
    if (!in_pairs(task)) return first + slot;
    const int second = slot >= n, i = first + slot - second * n;
    if (task == Task::swiglu) return i + second * results;
    const int half = hd / 2;
    const int head = quotient(i, half);
    return i + (head + second) * half;                     // head hd + i mod half
}

struct KeyPart {                           // of one sequence and query head
    int b, h, split;
    int64_t begin, end;
    template <class Position> __device__ KeyPart(const StepArgs& a, int part, int64_t capacity, Position position) {
        const int head = quotient(part, a.splits);
        b = quotient(head, a.H);
        h = head - b * a.H;
        split = part - head * a.splits;
        const int64_t seen = min(position(b), capacity);                           // below 2^31 (possible())
        const int64_t share = ((unsigned)seen + a.splits - 1) / (unsigned)a.splits;
        begin = min(seen, split * share);
        end = min(seen, begin + share);
    }
};

} // namespace decode
} // namespace gpu
