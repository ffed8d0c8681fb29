// A decode step in one kernel. Formulas: kernels/cpu/decode.h; the same roundings as the kernels of decode.cuh, which do what does not
// fit here (possible(): bf16, compute capability 9.0, sizes).
//
// A step reads every weight once, and its 70 results that depend on each other are small: what it takes is the bytes over the
// bandwidth if memory never waits for them. So one block an SM stays for the whole step:
//   - four producer warps stream the block's rows of all matrices of all layers, keys, values and scan states in the order of their
//     use through a ring of 204 KB in shared memory (bulk copies, mbarriers). They wait for nothing but room, so that 27 MB, 8 us
//     of memory time, are there or on their way while the blocks wait for each other. Alone they reach 93% of a copy's bandwidth at
//     batch 1 and all of it at batch 16.
//   - 8 consumer warps compute. Between two phases all blocks meet: a counter in L2, one arrival a block. From the first arrival to the
//     first product of the next phase it is 2.5 to 3 thousand clocks, most of it three trips to L2; everything that does not depend on
//     other blocks (addresses, zeros, operands of the first tile) is done before.
//
//   phase      mamba: in_proj + conv | x_proj | dt_proj + scan | out_proj + residual     attention: qkv + RoPE | parts of the keys | their
//              sum, ring | proj + residual     mlp: w1|w2 + SwiGLU | w3 + residual     at the end: head
//
// Linear layers: the results of a phase are shared out evenly between the blocks, in tiles of up to 16 weight rows. mma m16n8k16, weights as
// its rows and sequences as its columns; the order of k is free, so that a lane's 16 bytes of a row are operands as they come. A warp
// takes every 8th block of 32 columns and keeps its part of the activations in registers; the 8 warps' sums are added in order.
//
// Bytes: those of all weights, keys and values in the window, scan states twice; Samba-421M 0.923 GB at batch 1, 2.093 GB at batch 16.
// Activations go through L2: each block reads all of a phase's input, 2 B K bytes (B = 16, K = 4096: 17 MB for all blocks).
// Measured, with the draw: dev/results/2026-11-27_h200_generate.
#pragma once
#include "decode_attention.cuh"
#include "decode_linear.cuh"
#include "decode_step.h"

namespace gpu {
namespace decode {

constexpr int PRODUCERS = 4 * WARP, STEP_THREADS = THREADS + PRODUCERS;
constexpr int TILE = 16;                                   // weight rows of a tile
constexpr int PIECE = 512;                                 // columns of a piece: two blocks of 32 for each warp
constexpr int PITCH = PIECE * 2 + 64;                      // bytes of a row in the ring; the end shifts the next row by half the banks
constexpr int STAGE = TILE * PITCH, STAGES = 12;
constexpr int MAX_OWN = 24;                                // rows of x that a block owns
constexpr int MAX_STATES = 256;                            // d_state times sequences
constexpr int WARP_SUMS = WARPS * (2 + 256);               // floats: (WARPS, 2 + hd)
constexpr int PARTIAL = 2 * std::max(WARP_SUMS, WARPS * TILE * (MAX_BATCH + 2));

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

// ---------------------------------------------------------------------------------------------------------------------
// Barriers

__device__ inline unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }
__device__ inline void mbarrier_init(unsigned bar, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}
__device__ inline void mbarrier_arrive(unsigned bar) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory"); }
#if __CUDA_ARCH__ >= 900
__device__ inline void mbarrier_expect(unsigned bar, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ inline void mbarrier_wait(unsigned bar, unsigned parity) {
    asm volatile("{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra DONE;\nbra AGAIN;\nDONE:\n}"
                 ::"r"(bar), "r"(parity)
                 : "memory");
}
__device__ inline void bulk_copy(unsigned to, const void* from, unsigned bytes, unsigned bar) {              // addresses and size: multiples of 16
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes), "r"(bar)
                 : "memory");
}
// Counts as an arrival when this thread's cp.async are through, and as one to wait for from now on
__device__ inline void copies_arrive(unsigned bar) { asm volatile("cp.async.mbarrier.arrive.shared::cta.b64 [%0];" ::"r"(bar) : "memory"); }
#endif
__device__ inline void copy_16_to(unsigned to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ inline void consumers_meet() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }
__device__ inline uint4 load_shared(unsigned at) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
    return v;
}

__device__ inline float4 load_shared4(unsigned at) {
    const uint4 v = load_shared(at);
    return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w));
}

// ---------------------------------------------------------------------------------------------------------------------
// What a block does in a phase: the producer and the consumers go through the same loops

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

struct RingPlace {
    int stage = 0;
    unsigned parity = 0;
    __device__ void next() { if (++stage == STAGES) stage = 0, parity ^= 1; }
};

#if __CUDA_ARCH__ >= 900
struct Ring {
    unsigned data, full, empty;            // shared addresses
    RingPlace at;
    __device__ unsigned stage() const { return data + at.stage * STAGE; }
    __device__ unsigned full_bar() const { return full + at.stage * 8; }
    // producer: all lanes
    __device__ void wait_for_room() { mbarrier_wait(empty + at.stage * 8, at.parity ^ 1); }
    // consumers: all lanes
    __device__ unsigned wait_for_piece() { mbarrier_wait(full_bar(), at.parity); return stage(); }
    __device__ void release() {
        __syncwarp();
        if (threadIdx.x % WARP == 0) mbarrier_arrive(empty + at.stage * 8);
        at.next();
    }
};

// The four producer warps: each brings a quarter of every piece
struct Producer {
    const StepArgs& a;
    Ring ring;
    RingPlace landed{};
    int issued = 0;
    const int lane = threadIdx.x % WARP, warp = (threadIdx.x - THREADS) / WARP;

    __device__ void begin_piece() {
        ring.wait_for_room();
        if (issued++ >= a.depth) {                                                 // more under way would only make the consumers' loads wait
            mbarrier_wait(ring.full + landed.stage * 8, landed.parity);
            landed.next();
        }
    }
    // Row r of a piece: `bytes` from `from` to offset `to`
    __device__ void copy_rows(int rows, unsigned bytes, const void* from, unsigned to) {      // from, to: of row 4 lane + warp
        begin_piece();
        const int mine = (rows - warp + 3) / 4;
        if (lane == 0) {
            if (mine > 0) mbarrier_expect(ring.full_bar(), mine * bytes);
            else mbarrier_arrive(ring.full_bar());
        }
        __syncwarp();
        if (lane < mine) bulk_copy(ring.stage() + to, from, bytes, ring.full_bar());
        ring.at.next();
    }
    __device__ void prefetch(const float* p, int n) const {                        // to L2
        for (int i = lane * 32; i < n + 31; i += WARP * 32) asm volatile("prefetch.global.L2 [%0];" ::"l"(p + min(i, n - 1)));
    }

    __device__ void linear(const Phase& ph, Task task, const Share& share, int results, int K, const __nv_bfloat16* w) {
        if (warp == 3 && share.count > 0) {                                        // small operands of the results
            const int c0 = share.begin, n = share.count;
            if (task == Task::residual && ph.norm) prefetch(ph.norm + c0, n);
            if (task == Task::scan) prefetch(ph.D + c0, n), prefetch(ph.dt_bias + c0, n);
            if (task == Task::conv && c0 < a.e) prefetch(ph.conv_w + c0 * 4, min(n, a.e - c0) * 4), prefetch(ph.conv_b + c0, min(n, a.e - c0));
        }
        const int row = 4 * lane + warp;
        for (int t = 0; t < share.tiles; t++) {
            const int first = share.tile_begin(t), n = share.tile_begin(t + 1) - first, slots = in_pairs(task) ? 2 * n : n;
            const __nv_bfloat16* from = w + (int64_t)weight_row(task, results, a.hd, first, n, min(row, slots - 1)) * K;
            for (int k = 0; k < K; k += PIECE) copy_rows(slots, min(PIECE, K - k) * 2, from + k, row * PITCH);
            if (task == Task::scan) {                                              // A_log, then each sequence's h
                const int r = min(row, a.B), bytes = n * a.N * 4;
                copy_rows(a.B + 1, bytes, r == 0 ? ph.A_log + (int64_t)first * a.N : ph.h + ((int64_t)(r - 1) * a.e + first) * a.N, r * bytes);
            }
        }
    }

    // Keys and values come as 16-byte copies: a bulk copy of 256 bytes costs as much as one of 1,024
    template <int LANES> __device__ void keys(const Phase& ph, int64_t position /*of sequence `lane`*/) {
        constexpr int TOKENS = 2 * THREADS / LANES;
        const int row = a.hd * 2, chunks = row / 16, per_group = a.H / a.G;        // bytes of a key
        const int64_t token = (int64_t)2 * a.G * row, capacity = ph.capacity;
        for (int part = blockIdx.x; part < a.B * a.H * a.splits; part += gridDim.x) {
            const KeyPart k(a, part, capacity, [&](int b) { return __shfl_sync(0xffffffffu, position, b); });
            const char* from = (const char*)ph.ring + (k.b * capacity + k.begin) * token + (int64_t)(k.h / per_group) * row;
            for (int64_t left = k.end - k.begin; left > 0; left -= TOKENS, from += TOKENS * token) {
                const int n = (int)min((int64_t)TOKENS, left);
                begin_piece();
                for (int i = warp * WARP + lane; i < n * chunks; i += PRODUCERS) {
                    const int key = quotient(i, chunks), c = (i - key * chunks) * 16;
                    const char* src = from + key * token + c;
                    copy_16_to(ring.stage() + key * row + c, src);
                    copy_16_to(ring.stage() + (TOKENS + key) * row + c, src + a.G * row);
                }
                copies_arrive(ring.full_bar());
                __syncwarp();
                if (lane == 0) mbarrier_arrive(ring.full_bar());
                ring.at.next();
            }
        }
    }

    template <int LANES> __device__ void run() {
        bool waited = false;
        int64_t position = 0;
        Task task = a.phases->task;
        int results = a.phases->results, K = a.phases->K;
        const __nv_bfloat16* w = a.phases->w;
        int4 share = a.shares[blockIdx.x];
        for (int p = 0; p < a.count; p++) {
            const Phase &ph = a.phases[p], &next = a.phases[min(p + 1, a.count - 1)];
            const Task next_task = next.task;                                      // before they are needed
            const int next_results = next.results, next_K = next.K;
            const int4 next_share = a.shares[min(p + 1, a.count - 1) * gridDim.x + blockIdx.x];
            const __nv_bfloat16* next_w = next.w;
            if (task == Task::attend) {
                if (!waited) {                                                     // the position is the sampler's
                    asm volatile("griddepcontrol.wait;" ::: "memory");
                    if (lane < a.B) position = __ldcg((const long long*)a.position + lane);
                    waited = true;
                }
                keys<LANES>(ph, position);
            } else if (task != Task::combine) {
                linear(ph, task, Share(share), results, K, w);
            }
            task = next_task, results = next_results, K = next_K, w = next_w, share = next_share;
        }
    }
};

__device__ inline float quick_sigmoid(float x) { return __fdividef(1.f, 1.f + expf(-x)); }

// ---------------------------------------------------------------------------------------------------------------------
// Linear layers

// A zero that the compiler does not know to be one, so that it is made once, and a load over it where i < n, past L1
__device__ inline unsigned zero() {
    unsigned v;
    asm volatile("mov.u32 %0, 0;" : "=r"(v));
    return v;
}
__device__ inline uint4 zeros() { return make_uint4(zero(), zero(), zero(), zero()); }
__device__ inline void load_if(uint4& v, const void* p, int i, int n) {
    asm volatile("{\n.reg .pred yes;\nsetp.lt.s32 yes, %5, %6;\n@yes ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];\n}"
                 : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w) : "l"(p), "r"(i), "r"(n));
}
__device__ inline void load_if(float& v, const void* p, int i, int n) {
    asm volatile("{\n.reg .pred yes;\nsetp.lt.s32 yes, %2, %3;\n@yes ld.global.cg.f32 %0, [%1];\n}" : "+f"(v) : "l"(p), "r"(i), "r"(n));
}

struct Scratch {                           // shared memory of the consumers
    float *partial;                        // 2 buffers of (WARPS,TILE,LD), or of (WARPS,2+hd)
    float *own;                            // (MAX_BATCH,MAX_OWN) x of the rows that this block owns
    float *scale;                          // (MAX_BATCH) 1/rms, or 1
    float *BC;                             // (MAX_BATCH,2N)
    int64_t* position;                     // (MAX_BATCH)
};

// What a thread's result of a tile needs from memory besides the sums. Nothing of it is younger than two barriers, so that the first
// tile's is loaded while the block waits for the others.
struct Operands { float v[10]; };

template <int NT> struct Linear {
    static constexpr int MOST = NT == 1 ? 24 : 16;          // blocks of 32 columns a warp
    static constexpr int LD = 8 * NT + 2;                   // of the warps' sums: 16 rows and 2 sequences fall on 32 banks
    using X = __nv_bfloat16;
    const StepArgs& a;
    const Phase& ph;
    Share share;
    Scratch s;

    // For the tile of n results from `first` on
    __device__ Operands early(int first, int n) const {
        Operands o{};
        if (ph.task == Task::scan) {                        // u and z of up to 4 channels' sequences; dt_bias, D
            const int r = threadIdx.x / 4 % TILE, c = first + r;
#pragma unroll
            for (int k = 0; k < 2 * NT; k++) {
                const int b = (threadIdx.x + k * THREADS) / (4 * TILE);
                if (r < n && b < a.B) o.v[k] = load_fresh(ph.u + (int64_t)b * a.e + c), o.v[4 + k] = load_fresh(ph.z + (int64_t)b * a.e + c);
            }
            if (r < n) o.v[8] = ph.dt_bias[c], o.v[9] = ph.D[c];
            return o;
        }
        const int r = threadIdx.x % TILE, b = threadIdx.x / TILE, j = first + r;
        if (r >= n || b >= a.B) return o;
        if (ph.task == Task::conv && j < a.e) {
#pragma unroll
            for (int k = 0; k < 3; k++) o.v[k] = load_fresh(ph.halo + ((int64_t)b * 3 + k) * a.e + j);
            const float4 w = *(const float4*)(ph.conv_w + (int64_t)j * 4);
            o.v[3] = w.x, o.v[4] = w.y, o.v[5] = w.z, o.v[6] = w.w, o.v[7] = ph.conv_b[j];
        } else if (ph.task == Task::residual && ph.out) {
            o.v[0] = ph.norm[j];
        } else if (ph.task == Task::qkv && a.rope) {
            const int half = a.hd / 2;
            const float2 turn = __ldcg((const float2*)(a.cos_sin + (int64_t)b * a.hd) + j - quotient(j, half) * half);
            o.v[0] = turn.x, o.v[1] = turn.y;
        }
        return o;
    }
    __device__ Operands early_first() const {
        return early(share.begin, share.tiles ? share.tile_begin(1) - share.begin : 0);
    }

    // Result j of sequence b, from the sums of its row, or of its two rows
    __device__ void finish(int j, int b, const Operands& o, float sum, float second, int begin, float& square) const {
        if (ph.task == Task::conv) {
            const float value = round_to<X>(sum);
            if (j >= a.e) { ph.z[(int64_t)b * a.e + j - a.e] = from_float<X>(value); return; }
            const float v = o.v[7] + o.v[3] * o.v[0] + o.v[4] * o.v[1] + o.v[5] * o.v[2] + o.v[6] * value;
            X* to = ph.halo + (int64_t)b * 3 * a.e + j;
            to[0] = from_float<X>(o.v[1]), to[a.e] = from_float<X>(o.v[2]), to[2 * a.e] = from_float<X>(value);
            ph.out[(int64_t)b * a.e + j] = from_float<X>(v * quick_sigmoid(v));
        } else if (ph.task == Task::x_proj) {
            ph.out[(int64_t)b * ph.results + j] = from_float<X>(sum);
        } else if (ph.task == Task::residual) {
            float& own = s.own[b * MAX_OWN + j - begin];
            const float x = own + sum;
            own = x;
            if (ph.out) ph.out[(int64_t)b * a.d + j] = from_float<X>(x * o.v[0]);
            square = x * x;
        } else if (ph.task == Task::qkv) {
            const int half = a.hd / 2, head = quotient(j, half), per_group = quotient(a.H, a.G);
            float x1 = round_to<X>(sum), x2 = round_to<X>(second);
            if (a.rope && head - quotient(head, per_group + 2) * (per_group + 2) <= per_group) {
                const float c = o.v[0], sn = o.v[1], turned = x1 * c - x2 * sn;
                x2 = x1 * sn + x2 * c, x1 = turned;
            }
            X* to = ph.out + ((int64_t)b * (a.H + 2 * a.G) + head) * a.hd + j - head * half;
            to[0] = from_float<X>(x1), to[half] = from_float<X>(x2);
        } else if (ph.task == Task::swiglu) {
            const float gate = round_to<X>(sum), up = round_to<X>(second);
            ph.out[(int64_t)b * ph.results + j] = from_float<X>(gate * quick_sigmoid(gate) * up);
        } else if (ph.task == Task::head) {
            a.logits[(int64_t)b * a.V + j] = sum;
        }
    }

    // The scan's step of a tile's channels: 4 lanes a channel of a sequence. dt_proj's sums: sum(slot, b)
    template <class Sum> __device__ void scan(unsigned state, int first, int n, const Operands& o, Sum sum) const {
        constexpr int TASKS = 2 * NT;                       // of a thread: one channel, several sequences
        constexpr float LOG2E = 1.44269504f;
        const unsigned bytes = n * a.N * 4;
        const int sub = threadIdx.x % 4, r = threadIdx.x / 4 % TILE, c = first + r, b0 = threadIdx.x / (4 * TILE);
        float dt[TASKS], y[TASKS] = {};
#pragma unroll
        for (int k = 0; k < TASKS; k++) {
            const int b = b0 + k * (THREADS / (4 * TILE));
            dt[k] = 0;
            if (r >= n || b >= a.B) continue;
            const float raw = round_to<X>(sum(r, b)) + o.v[8];
            dt[k] = raw > 20.f ? raw : log1pf(expf(raw));
        }
        for (int i = sub * 4; i < a.N; i += 16) {
            if (r >= n) continue;
            const float4 A_log = load_shared4(state + (r * a.N + i) * 4);
            const float A[4] = {-LOG2E * exp2f(LOG2E * A_log.x), -LOG2E * exp2f(LOG2E * A_log.y), -LOG2E * exp2f(LOG2E * A_log.z),
                                -LOG2E * exp2f(LOG2E * A_log.w)};
#pragma unroll
            for (int k = 0; k < TASKS; k++) {
                const int b = b0 + k * (THREADS / (4 * TILE));
                if (b >= a.B) continue;
                const float4 before = load_shared4(state + (b + 1) * bytes + (r * a.N + i) * 4);
                const float *Bn = s.BC + b * 2 * a.N + i, *Cn = Bn + a.N, input = dt[k] * o.v[k];
                const float4 h = make_float4(exp2f(dt[k] * A[0]) * before.x + input * Bn[0], exp2f(dt[k] * A[1]) * before.y + input * Bn[1],
                                             exp2f(dt[k] * A[2]) * before.z + input * Bn[2], exp2f(dt[k] * A[3]) * before.w + input * Bn[3]);
                y[k] += h.x * Cn[0] + h.y * Cn[1] + h.z * Cn[2] + h.w * Cn[3];
                *(float4*)(ph.h + ((int64_t)b * a.e + c) * a.N + i) = h;
            }
        }
#pragma unroll
        for (int k = 0; k < TASKS; k++) {
            const int b = b0 + k * (THREADS / (4 * TILE));
            y[k] += __shfl_xor_sync(0xffffffffu, y[k], 1);
            y[k] += __shfl_xor_sync(0xffffffffu, y[k], 2);
            if (r < n && b < a.B && sub == 0)
                ph.out[(int64_t)b * a.e + c] = from_float<X>((y[k] + o.v[9] * o.v[k]) * o.v[4 + k] * quick_sigmoid(o.v[4 + k]));
        }
    }

    // What a phase reads of what the phase before it wrote. prepare() does all that can be done before the blocks have met: addresses,
    // zeros where nothing will be loaded. The instructions between the meeting and the first product are few.
    struct Input {
        uint4 in[MOST][NT];                // lane (g,t): sequences g, g + 8; 8 columns of every 256
        float squares[NT][8];              // of sequences warp, warp + 8
        const X* from[NT];
        const float* squares_from[NT];
        int columns[NT], left[NT];         // loads are for indices below these
    };
    __device__ void prepare(Input& v) const {
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, k0 = warp * 32 + lane % 4 * 8;
#pragma unroll
        for (int i = 0; i < NT; i++) {
            const int b = lane / 4 + 8 * i, of = warp + WARPS * i;
            v.columns[i] = b < a.B ? ph.K - k0 : 0;
            v.from[i] = ph.in + b * ph.in_stride + k0;
            v.left[i] = of < a.B ? ph.squares_n - lane : 0;
            v.squares_from[i] = ph.squares + of * ph.squares_n + lane;
#pragma unroll
            for (int u = 0; u < MOST; u++) v.in[u][i] = zeros();
#pragma unroll
            for (int k = 0; k < 8; k++) v.squares[i][k] = __uint_as_float(zero());
        }
    }
    __device__ void load(Input& v) const {
#pragma unroll
        for (int u = 0; u < MOST; u++)
#pragma unroll
            for (int i = 0; i < NT; i++) load_if(v.in[u][i], v.from[i] + u * WARPS * 32, u * WARPS * 32, v.columns[i]);
#pragma unroll
        for (int i = 0; i < NT; i++)
#pragma unroll
            for (int k = 0; k < 8; k++) load_if(v.squares[i][k], v.squares_from[i] + k * WARP, k * WARP, v.left[i]);
    }
    // scale: 1/rms of each sequence's input, or 1
    __device__ void store_scale(const Input& v, int K) const {
        const int lane = threadIdx.x % WARP;
#pragma unroll
        for (int i = 0; i < NT; i++) {
            const int b = threadIdx.x / WARP + i * WARPS;
            if (b >= a.B) break;
            float r = 1;
            if (ph.squares_n) {
                float sum = 0;
#pragma unroll
                for (int k = 0; k < 8; k++) sum += v.squares[i][k];
                for (int at = 8 * WARP; at < v.left[i]; at += WARP) sum += __ldcg(v.squares_from[i] + at);
                r = rsqrtf(__fdividef(warp_sum(sum), (float)K) + a.eps);
            }
            if (lane == 0) s.scale[b] = r;
        }
    }

    // v: prepared; o: early_first()
    __device__ void run(Ring& ring, Input& v, Operands o, long long* trace) const {
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4, K = ph.K;
        const Task task = ph.task;
        load(v);
        if (task == Task::scan)
            for (int i = threadIdx.x; i < a.B * 2 * a.N; i += THREADS) {
                const int b = quotient(i, 2 * a.N);
                s.BC[i] = load_fresh(ph.in + b * ph.in_stride + a.rank + i - b * 2 * a.N);
            }
        const bool pairs = in_pairs(task);
        const int r = threadIdx.x % TILE, b = threadIdx.x / TILE;                  // of this thread's result
        float squares = 0;
        for (int tile = 0; tile < share.tiles; tile++) {
            const int first = share.tile_begin(tile), n = share.tile_begin(tile + 1) - first, slots = pairs ? 2 * n : n;
            const int columns = K - warp * 32 - t * 8, low_columns = g < slots ? columns : 0, high_columns = g + 8 < slots ? columns : 0;
            const bool live = r < n && b < a.B;
            if (tile > 0) o = early(first, n);
            float acc[2][NT][4] = {};
#pragma unroll
            for (int p = 0; p < MOST / 2; p++) {
                if (p * PIECE >= K) break;
                const unsigned at = ring.wait_for_piece() + g * PITCH + warp * 64 + t * 16;
                if (trace && p == 0 && tile == 0) trace[1] = clock64();
                uint4 low[2], high[2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int k = p * PIECE + i * WARPS * 32;
                    low[i] = k < low_columns ? load_shared(at + i * WARPS * 64) : make_uint4(0, 0, 0, 0);
                    high[i] = k < high_columns ? load_shared(at + i * WARPS * 64 + 8 * PITCH) : make_uint4(0, 0, 0, 0);
                }
                ring.release();
#pragma unroll
                for (int i = 0; i < 2; i++)
#pragma unroll
                    for (int m = 0; m < NT; m++) {
                        const uint4 x = v.in[2 * p + i][m];
                        mma(acc[0][m], low[i].x, high[i].x, low[i].y, high[i].y, x.x, x.y);
                        mma(acc[1][m], low[i].z, high[i].z, low[i].w, high[i].w, x.z, x.w);
                    }
            }
            if (tile == 0) store_scale(v, K);
            float* buffer = s.partial + tile % 2 * (WARPS * TILE * LD);
#pragma unroll
            for (int m = 0; m < NT; m++)
#pragma unroll
                for (int half = 0; half < 2; half++)
                    *(float2*)(buffer + (warp * TILE + g + 8 * half) * LD + m * 8 + 2 * t) =
                        make_float2(acc[0][m][2 * half] + acc[1][m][2 * half], acc[0][m][2 * half + 1] + acc[1][m][2 * half + 1]);
            consumers_meet();
            const auto sum = [&](int slot, int seq) {
                float total = 0;
#pragma unroll
                for (int w = 0; w < WARPS; w++) total += buffer[(w * TILE + slot) * LD + seq];
                return total * s.scale[seq];
            };
            if (task == Task::scan) {
                scan(ring.wait_for_piece(), first, n, o, sum);
                ring.release();
                continue;
            }
            float square = 0;
            if (live) finish(first + r, b, o, sum(r, b), pairs ? sum(n + r, b) : 0.f, share.begin, square);
            if (task == Task::residual) {
#pragma unroll
                for (int k = TILE / 2; k > 0; k /= 2) square += __shfl_xor_sync(0xffffffffu, square, k);
                squares += square;
            }
        }
        if (task == Task::residual && ph.out && r == 0 && b < a.B) a.sums[(int64_t)b * gridDim.x + blockIdx.x] = squares;
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// Attention: each block its parts of the keys, LANES lanes a key; then the sum of the parts, and the new key takes its place

template <int LANES> struct Attend {
    using X = __nv_bfloat16;
    static constexpr int TEAMS = THREADS / LANES, TOKENS = 2 * TEAMS;
    const StepArgs& a;
    const Phase& ph;
    Scratch s;
    const int sub = threadIdx.x % LANES, team = threadIdx.x / LANES, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;

    struct Heads { RawEight<X> q, key, value; };            // of a part; its own token's key and value belong to the first split
    __device__ Heads load(int part) const {
        const int per_group = quotient(a.H, a.G), head = quotient(part, a.splits), b = quotient(head, a.H), h = head - b * a.H;
        const int group = quotient(h, per_group), hd = a.hd;
        const bool live = part < a.B * a.H * a.splits && sub * 8 < hd;
        const X* heads = ph.qkv + (b * a.G + group) * (per_group + 2) * hd + sub * 8;
        const bool own = live && part == head * a.splits && warp == 0;
        return {load_eight(heads + (h - group * per_group) * hd, live), load_eight(heads + per_group * hd, own),
                load_eight(heads + (per_group + 1) * hd, own)};
    }
    __device__ static float dot(const Eight& x, const Eight& y) {
        float even = 0, odd = 0;
#pragma unroll
        for (int i = 0; i < 8; i += 2) even += x.v[i] * y.v[i], odd += x.v[i + 1] * y.v[i + 1];
        return lanes_sum<LANES>(even + odd);
    }
    // The warp's teams become one, in all lanes
    __device__ static void merge_teams(Softmax& soft) {
#pragma unroll
        for (int o = LANES; o < WARP; o *= 2) {
            const float other = __shfl_xor_sync(0xffffffffu, soft.top, o), top = fmaxf(soft.top, other);
            const float mine = soft.top == -INFINITY ? 0.f : exp2f(soft.top - top), theirs = other == -INFINITY ? 0.f : exp2f(other - top);
            soft.top = top;
            soft.sum = soft.sum * mine + __shfl_xor_sync(0xffffffffu, soft.sum, o) * theirs;
#pragma unroll
            for (int i = 0; i < 8; i++) soft.acc.v[i] = soft.acc.v[i] * mine + __shfl_xor_sync(0xffffffffu, soft.acc.v[i], o) * theirs;
        }
    }

    __device__ void run(Ring& ring) const {
        const int hd = a.hd, width = 2 + hd, parts = a.B * a.H * a.splits;
        const bool inside = sub * 8 < hd;
        const float scale = 1.44269504f * rsqrtf((float)hd);
        float* sums = s.partial;
        Heads heads = load(blockIdx.x);
        for (int part = blockIdx.x; part < parts; part += gridDim.x) {
            const KeyPart k(a, part, ph.capacity, [&](int b) { return s.position[b]; });
            Eight q = unpack(heads.q);
#pragma unroll
            for (int i = 0; i < 8; i++) q.v[i] *= scale;
            Softmax soft;
            soft.clear();
            if (k.split == 0 && warp == 0) {                                       // the token itself
                const float score = dot(q, unpack(heads.key));
                if (team == 0) soft.top = score, soft.add(score, unpack(heads.value));
            }
            heads = load(part + gridDim.x);
            for (int64_t left = k.end - k.begin; left > 0; left -= TOKENS) {
                const int n = (int)min((int64_t)TOKENS, left);
                const unsigned keys = ring.wait_for_piece() + sub * 16, row = hd * 2;
                RawEight<X> key[2]{}, value[2]{};
#pragma unroll
                for (int j = 0; j < 2; j++)
                    if (const int i = team + j * TEAMS; i < n && inside)
                        key[j].a = load_shared(keys + i * row), value[j].a = load_shared(keys + (TOKENS + i) * row);
                ring.release();
                float score[2], top = soft.top;
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const float x = dot(q, unpack(key[j]));
                    score[j] = team + j * TEAMS < n ? x : -INFINITY;
                    top = fmaxf(top, score[j]);
                }
                if (top == -INFINITY) continue;
                soft.rescale(top);
#pragma unroll
                for (int j = 0; j < 2; j++) soft.add(score[j], unpack(value[j]));
            }
            merge_teams(soft);
            float* to = sums + warp * width;
            if (lane == 0) to[0] = soft.top, to[1] = soft.sum;
            if (lane < LANES && inside)
#pragma unroll
                for (int i = 0; i < 8; i++) to[2 + sub * 8 + i] = soft.acc.v[i];
            consumers_meet();
            if ((int)threadIdx.x < hd) {                                           // warps in order
                float top = -INFINITY, sum = 0, acc = 0;
#pragma unroll
                for (int i = 0; i < WARPS; i++) top = fmaxf(top, sums[i * width]);
#pragma unroll
                for (int i = 0; i < WARPS; i++) {
                    const float* one = sums + i * width;
                    const float shrink = one[0] == -INFINITY ? 0.f : exp2f(one[0] - top);
                    sum += one[1] * shrink, acc += one[2 + threadIdx.x] * shrink;
                }
                float* out = a.parts + (int64_t)part * width;
                if (threadIdx.x == 0) out[0] = top, out[1] = sum;
                out[2 + threadIdx.x] = acc;
            }
            sums = sums == s.partial ? s.partial + WARP_SUMS : s.partial;
        }
    }
};

// A value of a head from its parts: 16 under way at a time
__device__ inline float sum_of_parts(const float* part, int splits, int width, int j) {
    float top = -INFINITY, sum = 0, acc = 0;
    for (int first = 0; first < splits; first += 16) {
        float tops[16], sums[16], values[16], most = top;
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const bool live = first + i < splits;
            const float* one = part + (int64_t)(first + i) * width;
            tops[i] = live ? __ldcg(one) : -INFINITY, sums[i] = live ? __ldcg(one + 1) : 0.f, values[i] = live ? __ldcg(one + 2 + j) : 0.f;
        }
#pragma unroll
        for (int i = 0; i < 16; i++) most = fmaxf(most, tops[i]);
        const float before = top == -INFINITY ? 0.f : exp2f(top - most);           // the first part holds the token itself: most is a number
        sum *= before, acc *= before, top = most;
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const float shrink = exp2f(tops[i] - most);                            // 0 for a part without keys
            sum += sums[i] * shrink, acc += values[i] * shrink;
        }
    }
    return __fdividef(acc, sum);
}

__device__ inline void combine(const StepArgs& a, const Phase& ph, const int64_t* position) {
    using X = __nv_bfloat16;
    const int hd = a.hd, width = 2 + hd, per_group = quotient(a.H, a.G), lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int first = (warp * gridDim.x + blockIdx.x) * WARP + lane, stride = gridDim.x * THREADS;
    for (int item = first; item < a.B * a.H * hd; item += stride) {
        const int head = quotient(item, hd);
        ph.out[item] = from_float<X>(sum_of_parts(a.parts + (int64_t)head * a.splits * width, a.splits, width, item - head * hd));
    }
    const int chunks = hd / 8;
    for (int item = first; ph.capacity > 0 && item < a.B * 2 * a.G * chunks; item += stride) {       // 8 values each of (B,2,G,hd)
        const int row = quotient(item, chunks), c = (item - row * chunks) * 8;
        const int half = quotient(row, a.G), g = row - half * a.G, value = half % 2, b = half / 2;
        int64_t slot = position[b];                                                // modulo capacity
        slot -= (int64_t)((double)slot * ph.per_capacity) * ph.capacity;
        if (slot < 0) slot += ph.capacity;
        if (slot >= ph.capacity) slot -= ph.capacity;
        const uint4 v = __ldcg((const uint4*)(ph.qkv + (((int64_t)b * a.G + g) * (per_group + 2) + per_group + value) * hd + c));
        *(uint4*)(ph.ring + (((b * ph.capacity + slot) * 2 + value) * a.G + g) * hd + c) = v;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The kernel

// Pieces of a phase that this block gets: for the measurement that only streams
template <int LANES> __device__ inline int pieces(const StepArgs& a, const Phase& ph, int p) {
    if (ph.task == Task::combine) return 0;
    if (ph.task != Task::attend) return Share(a.shares[p * gridDim.x + blockIdx.x]).tiles * ((ph.K + PIECE - 1) / PIECE + (ph.task == Task::scan));
    int n = 0;
    for (int part = blockIdx.x; part < a.B * a.H * a.splits; part += gridDim.x) {
        const KeyPart k(a, part, ph.capacity, [&](int b) { return a.position[b]; });
        n += (int)((k.end - k.begin + 2 * THREADS / LANES - 1) / (2 * THREADS / LANES));
    }
    return n;
}

template <int NT, int LANES>
__device__ inline void consume(const StepArgs& a, Ring ring, const Scratch& s, Phase* phases /*shared, 2*/, int4* shares /*shared, 2*/) {
    constexpr int WORDS = sizeof(Phase) / 4;
    asm volatile("griddepcontrol.wait;" ::: "memory");
    unsigned target = threadIdx.x == 0 ? __ldcg(a.counter + 1) : 0;
    // A phase's description comes one phase ahead: a word a thread
    const auto word_of = [&](int p) -> unsigned {
        if (threadIdx.x < WORDS) return ((const unsigned*)(a.phases + p))[threadIdx.x];
        return threadIdx.x < WORDS + 4 ? ((const unsigned*)(a.shares + p * gridDim.x + blockIdx.x))[threadIdx.x - WORDS] : 0;
    };
    const auto keep_word = [&](int p, unsigned word) {
        if (threadIdx.x < WORDS) ((unsigned*)(phases + p % 2))[threadIdx.x] = word;
        else if (threadIdx.x < WORDS + 4) ((unsigned*)(shares + p % 2))[threadIdx.x - WORDS] = word;
    };
    keep_word(0, word_of(0));
    if (threadIdx.x < a.B) s.position[threadIdx.x] = __ldcg((const long long*)a.position + threadIdx.x);
    const int own = part_of(a.d, blockIdx.x, gridDim.x), owned = part_of(a.d, blockIdx.x + 1, gridDim.x) - own;
    for (int i = threadIdx.x; i < a.B * owned; i += THREADS)
        s.own[i / owned * MAX_OWN + i % owned] = __ldcg(a.x + (int64_t)(i / owned) * a.d + own + i % owned);
    consumers_meet();
    for (int p = 0; p < a.count; p++) {
        const Phase& ph = phases[p % 2];
        const Linear<NT> linear{a, ph, Share(shares[p % 2]), s};
        const Operands early = linear.early_first();
        typename Linear<NT>::Input input;
        linear.prepare(input);
        long long* trace = a.trace && threadIdx.x == 0 ? a.trace + ((int64_t)p * gridDim.x + blockIdx.x) * 4 : nullptr;
        if (p > 0) {                                                               // all blocks have done what was before
            if (threadIdx.x == 0 && !a.probe) {
                target += gridDim.x;
                unsigned seen;
                for (unsigned polls = 0;; polls++) {
                    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(a.counter) : "memory");
                    if ((int)(seen - target) >= 0) break;
                    // Blocks are missing: not all are resident. No trap: with one ptxas gives no more registers than a block starts with
                    if (polls > 1u << 24) asm volatile("st.global.u32 [%0], %1;" ::"l"(0ll), "r"(polls) : "memory");
                }
            }
            consumers_meet();
        }
        const bool more = p + 1 < a.count;
        const unsigned word = more ? word_of(p + 1) : 0;
        if (trace) trace[0] = trace[1] = clock64();
        if (a.probe == 2) {
            for (int n = pieces<LANES>(a, ph, p); n > 0; n--) ring.wait_for_piece(), ring.release();
        } else if (ph.task == Task::attend) {
            Attend<LANES>{a, ph, s}.run(ring);
        } else if (ph.task == Task::combine) {
            combine(a, ph, s.position);
        } else {
            linear.run(ring, input, early, trace);
        }
        if (more) keep_word(p + 1, word);
        consumers_meet();
        if (threadIdx.x == 0 && more && !a.probe) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(a.counter) : "memory");
        if (trace) trace[2] = clock64();
    }
    if (threadIdx.x == 0 && blockIdx.x == 0 && !a.probe) a.counter[1] = target;    // all blocks have read it: they have been through a barrier
}
#endif

template <int NT, int LANES> __global__ void __launch_bounds__(STEP_THREADS, 1) step_kernel(const __grid_constant__ StepArgs a) {
#if __CUDA_ARCH__ >= 900
    extern __shared__ __align__(128) unsigned char step_memory[];
    __shared__ __align__(8) uint64_t bars[2 * STAGES];
    __shared__ __align__(16) Phase phases[2];
    __shared__ int4 shares[2];
    __shared__ float own[MAX_BATCH * MAX_OWN], scale[MAX_BATCH], BC[2 * MAX_STATES];
    __shared__ int64_t position[MAX_BATCH];
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    Ring ring{shared_address(step_memory), shared_address(bars), shared_address(bars + STAGES), {}};
    asm volatile("" : "+r"(ring.data), "+r"(ring.full), "+r"(ring.empty));         // kept in registers, not computed again at each use
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) mbarrier_init(ring.full + i * 8, PRODUCERS / WARP), mbarrier_init(ring.empty + i * 8, WARPS);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (threadIdx.x >= THREADS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
        Producer{a, ring}.template run<LANES>();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
        consume<NT, LANES>(a, ring, Scratch{(float*)(step_memory + STAGES * STAGE), own, scale, BC, position}, phases, shares);
    }
#endif
}

} // namespace decode

// ---------------------------------------------------------------------------------------------------------------------
// The host's side: the table of phases

class DecodeStep {
public:
    DecodeStep() = default;
    DecodeStep(const DecodeStep&) = delete;
    DecodeStep& operator=(const DecodeStep&) = delete;
    ~DecodeStep() { if (memory) cudaFree(memory); }

    // Whether run() can do this model's step
    static bool possible(const DecodeModel& m) {
        using namespace decode;
        if (sizeof(floatX) != 2 || gpu().major < 9 || m.B > MAX_BATCH) return false;
        const int most = (m.B > 8 ? 16 : 24) * WARPS * 32;
        const auto columns = [&](int K) { return K % 8 == 0 && K <= most; };
        if (!columns(m.d) || ceil_div(m.d, gpu().sms) > MAX_OWN) return false;
        for (const DecodeLayer& l : m.layers) {
            const bool states = m.N % 4 == 0 && m.N * m.B <= MAX_STATES && TILE * m.N * 4 * (m.B + 1) <= STAGE;
            if (l.kind == DecodeLayer::mamba && (!states || !columns(m.e) || !columns(m.rank) || (m.rank + 2 * m.N) % 8)) return false;
            if (l.kind == DecodeLayer::attention && (m.hd % 8 || m.hd > 256 || l.capacity >= INT32_MAX || !columns(m.H * m.hd))) return false;
            if (l.kind == DecodeLayer::mlp && !columns(l.F)) return false;
        }
        return true;
    }

    void create(const DecodeModel& m, Stream stream) {
        using namespace decode;
        const int splits = std::clamp(gpu().sms / std::max(1, m.H), 1, 64);
        int64_t F = 8;
        for (const DecodeLayer& l : m.layers) F = std::max<int64_t>(F, l.F);
        int64_t bytes = 0;
        const auto place = [&](int64_t n) { const int64_t at = bytes; bytes += round_up(n, 256); return at; };
        const int64_t width = m.rank + 2 * m.N, count = 4 * (int64_t)m.layers.size() + 1;
        const int64_t table = place(count * sizeof(Phase)), share = place(count * gpu().sms * sizeof(int4)), counter = place(8);
        const int64_t sums = place(4ll * m.B * gpu().sms), parts = place(4ll * m.B * m.H * splits * (2 + m.hd));
        const int64_t u = place(2ll * m.B * m.e), z = place(2ll * m.B * m.e), x_dbl = place(2 * m.B * width);
        const int64_t qkv = place(2ll * m.B * (m.H + 2 * m.G) * m.hd);
        const int64_t out = place(2ll * m.B * std::max<int64_t>({(int64_t)m.e, F, (int64_t)m.H * m.hd}));
        if (memory) CUDA_CHECK(cudaFree(memory));
        memory = (char*)device_alloc((size_t)bytes, "the buffers of a decode step");
        device_zero(memory, (size_t)bytes, stream);
        const auto X = [&](int64_t at) { return (Phase::X*)(memory + at); };
        args = {(const Phase*)(memory + table), (const int4*)(memory + share), 0, m.B, m.d, m.e, m.N, m.rank, m.H, m.G, m.hd, m.V, splits, m.rope,
                m.eps, m.x, m.cos_sin, m.position, m.logits, (float*)(memory + parts), (float*)(memory + sums), (unsigned*)(memory + counter), 0, 4,
                nullptr};
        tasks.clear();
        // What the next norm's reader reads: at first as the sampler left it
        const float* squares = m.squares;
        int squares_n = (int)ceil_div(m.d, ROWS);
        const auto normed = [&](Task task, int results, const floatX* w) {
            Phase p{};
            p.task = task, p.results = results, p.K = p.in_stride = m.d, p.w = (const Phase::X*)w;
            p.in = (const Phase::X*)m.xw, p.squares = squares, p.squares_n = squares_n;
            return p;
        };
        const auto plain = [&](Task task, int results, int K, int stride, const floatX* w, int64_t in) {
            Phase p{};
            p.task = task, p.results = results, p.K = K, p.in_stride = stride, p.w = (const Phase::X*)w, p.in = X(in);
            return p;
        };
        const auto residual = [&](const floatX* w, int K, const float* norm) {
            Phase p = plain(Task::residual, m.d, K, K, w, out);
            p.norm = norm, p.out = norm ? (Phase::X*)m.xw : nullptr;
            if (norm) squares = args.sums, squares_n = gpu().sms;
            tasks.push_back(p);
        };
        for (const DecodeLayer& l : m.layers) {
            if (l.kind == DecodeLayer::mamba) {
                Phase p = normed(Task::conv, 2 * m.e, l.in_proj);
                p.out = X(u), p.z = X(z), p.halo = (Phase::X*)l.halo, p.conv_w = l.conv_w, p.conv_b = l.conv_b;
                tasks.push_back(p);
                p = plain(Task::x_proj, (int)width, m.e, m.e, l.x_proj, u);
                p.out = X(x_dbl);
                tasks.push_back(p);
                p = plain(Task::scan, m.e, m.rank, (int)width, l.dt_proj, x_dbl);
                p.out = X(out), p.u = X(u), p.z = X(z), p.h = l.h, p.A_log = l.A_log, p.D = l.D, p.dt_bias = l.dt_bias;
                tasks.push_back(p);
                residual(l.out_proj, m.e, l.next_norm);
            } else if (l.kind == DecodeLayer::attention) {
                Phase p = normed(Task::qkv, (m.H + 2 * m.G) * m.hd / 2, l.qkv);
                p.out = X(qkv);
                tasks.push_back(p);
                p = Phase{};
                p.qkv = X(qkv), p.ring = (Phase::X*)l.ring, p.out = X(out);
                p.capacity = l.capacity, p.per_capacity = 1.0 / (double)std::max<int64_t>(1, l.capacity);
                p.task = Task::attend, tasks.push_back(p);
                p.task = Task::combine, tasks.push_back(p);
                residual(l.proj, m.H * m.hd, l.next_norm);
            } else {
                Phase p = normed(Task::swiglu, l.F, l.w1);
                p.out = X(out);
                tasks.push_back(p);
                residual(l.w3, l.F, l.next_norm);
            }
        }
        tasks.push_back(normed(Task::head, m.V, m.head));
        args.count = (int)tasks.size();
        copy_to_device(memory + table, tasks.data(), tasks.size() * sizeof(Phase), stream);
        std::vector<int4> shares;
        for (const Phase& p : tasks)
            for (int64_t i = 0; i < gpu().sms; i++) {
                const int most = p.task == Task::qkv || p.task == Task::swiglu ? TILE / 2 : TILE;
                const int begin = (int)(p.results * i / gpu().sms), n = (int)(p.results * (i + 1) / gpu().sms) - begin;
                const int tiles = (int)ceil_div(n, most);
                shares.push_back({begin, n, tiles, tiles ? n / tiles : 0});
            }
        copy_to_device(memory + share, shares.data(), shares.size() * sizeof(int4), stream);
        stream_sync(stream);
    }
    bool ready() const { return memory; }

    void run([[maybe_unused]] Stream stream) const {
        if constexpr (sizeof(floatX) == 2) {
            if (args.B > 8) heads<2>(stream);
            else heads<1>(stream);
        }
    }

    decode::StepArgs args{};               // a benchmark may set the fields of measurements
    std::vector<decode::Phase> tasks;

private:
    template <int NT> void heads(Stream stream) const {
        if (args.hd <= 64) go<NT, 8>(stream);
        else if (args.hd <= 128) go<NT, 16>(stream);
        else go<NT, 32>(stream);
    }
    template <int NT, int LANES> void go(Stream stream) const {
        using namespace decode;
        launch(step_kernel<NT, LANES>, dim3((unsigned)gpu().sms), STEP_THREADS, STAGES * STAGE + PARTIAL * sizeof(float), stream, args);
    }
    char* memory = nullptr;
};

} // namespace gpu
