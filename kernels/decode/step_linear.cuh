// A decode step in one kernel (decode/step.cuh): what its consumer warps do in a linear layer, and in the scan that dt_proj belongs to.
//
// The results of a phase are shared out evenly between the blocks, in tiles of up to 16 weight rows. mma m16n8k16, weights as its rows and
// sequences as its columns; the order of k is free, so that a lane's 16 bytes of a row are operands as they come. A warp takes every 8th
// block of 32 columns and keeps its part of the activations in registers; the 8 warps' sums are added in order.
#pragma once
#include "linear.cuh"
#include "step_ring.cuh"

namespace gpu {
namespace decode {

constexpr int WARP_SUMS = WARPS * (2 + 256);               // floats: (WARPS, 2 + hd)
constexpr int PARTIAL = 2 * std::max(WARP_SUMS, WARPS * TILE * (MAX_BATCH + 2));

#if __CUDA_ARCH__ >= 900
__device__ inline void consumers_meet() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }
// sigmoid<float> with an approximate division (2 ulp): the exact one has a slow path, a subroutine
__device__ inline float quick_sigmoid(float x) { return __fdividef(1.f, 1.f + expf(-x)); }

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

    // The scan's B and C of the token, from what x_proj wrote
    __device__ void store_BC() const {
        for (int i = threadIdx.x; i < a.B * 2 * a.N; i += THREADS) {
            const int b = quotient(i, 2 * a.N);
            s.BC[i] = load_fresh(ph.in + b * ph.in_stride + a.rank + i - b * 2 * a.N);
        }
    }

    __device__ float sum_of_warps(const float* buffer /*(WARPS,TILE,LD)*/, int slot, int b) const {
        float total = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) total += buffer[(w * TILE + slot) * LD + b];
        return total * s.scale[b];
    }

    // v: prepared; o: early_first()
    __device__ void run(Ring& ring, Input& v, Operands o, long long* trace) const {
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4, K = ph.K;
        const Task task = ph.task;
        load(v);
        if (task == Task::scan) store_BC();
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
            const auto sum = [&](int slot, int seq) { return sum_of_warps(buffer, slot, seq); };
            if (task == Task::scan) {
                scan(ring.wait_for_piece(), first, n, o, sum);
                ring.release();
                continue;
            }
            float square = 0;
            if (live) finish(first + r, b, o, sum(r, b), pairs ? sum(n + r, b) : 0.f, share.begin, square);
            if (task == Task::residual) squares += lanes_sum<TILE>(square);
        }
        if (task == Task::residual && ph.out && r == 0 && b < a.B) a.sums[(int64_t)b * gridDim.x + blockIdx.x] = squares;
    }
};
#endif

} // namespace decode
} // namespace gpu
