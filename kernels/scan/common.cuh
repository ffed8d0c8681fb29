// Selective scan: the recurrence of the Mamba mixer with its softplus, skip and gate. For every channel c (index left out) and state n:
//   dt_t = softplus(dt_raw_t + dt_bias)                 A_n = -exp(A_log_n)          a_tn = exp(dt_t A_n)
//   h_tn = a_tn h_(t-1)n + dt_t B_tn u_t                y_t  = sum_n C_tn h_tn + D u_t
//   out_t = y_t silu(z_t)
// The gradients are written out in cpu/selective_scan.h, which is the definition. u, dt_raw, z, out: (B,T,e) of X; B and C: (B,T,N) of X
// inside wider rows; A_log (e,N), D, dt_bias (e), the state h (B,e,N) and all arithmetic fp32.
//
// Past-the-end steps have dt = 0, so a = 1 and no input; past-the-end channels and states are zeros and are not stored. Where a document
// starts (starts = 1) the state before it is dropped.
// Two pairs of kernels: mma_forward.cuh and mma_backward.cuh for bf16 and 16 states, on tensor cores, which training uses; any.cuh for the rest.
// mma_forward_whole.cuh is the first pair's forward pass where those blocks do not fill the GPU: narrow ones, each of whole sequences, do. All
// save h before every tile of steps, as X, for the backward pass, which goes from the last tile to the first, remakes the states of a tile and
// goes back through them with lambda. dB and dC are sums over channels: inside a block, then over the blocks by a second kernel in a fixed
// order. Nothing is atomic: the same inputs give the same bits.
// When B*e is too small to fill the GPU, T is split into segments: (a) every segment from a zero state, (b) the segments chained with
// their decay exp(A sum dt), (c) the main kernel from the right state. The same goes for lambda, backwards. (a) makes every decay but the last
// segment's a second time.
//
// This file: what both pairs share.
#pragma once
#include <initializer_list>
#include "../device.cuh"

namespace gpu {

constexpr int SCAN_TILE = 16;       // steps a tile; also steps between saved states
constexpr int SCAN_GROUP = 16;      // states a group
constexpr int SCAN_LANES = 4;       // lanes a channel
constexpr int SCAN_CHANNELS = 32;   // channels a block, but for the bf16 backward kernel
constexpr int SCAN_MAX_STATES = 256;
constexpr float SCAN_CUT = 1e30f;   // as dt it makes a decay zero (if A_log > -60): the state before the start of a document is dropped
constexpr float SCAN_LN2 = 0.6931471805599453f;

inline int scan_padded(int N) { return (int)round_up(N, SCAN_GROUP); }
inline int64_t scan_tiles(int64_t T) { return ceil_div(T, SCAN_TILE); }

template <class X> struct ScanInput {
    const X *u, *dt_raw, *bc, *z;
    int64_t ldbc, ldz;
    const float *A_log, *D, *dt_bias;
    int64_t T;
    int e, N;
    int64_t segment_tiles;          // tiles a segment; segment number: blockIdx.z
    const uint8_t* starts;          // (B,T): 1 where a document starts, or null
    __device__ bool is_start(int64_t sequence, int64_t t) const { return starts && t < T && starts[sequence * T + t]; }
};

template <class X> struct ScanGradients {
    X *du, *ddt_raw, *dz, *out;
    int64_t lddz;
    const X *dout, *saved;
    const float* carry;             // (B,S,e,carry_stride): a lambda of the step after the segment; null for zeros
    int carry_stride;
    float *dbc, *dA, *dD_dbias;     // partial sums, see ScanWorkspace
    float* dh_in;                   // (B,e,N), or null
};

// ---------------------------------------------------------------------------------------------------------------------
// Arithmetic. bf16: special-function instructions, relative error about 1e-6. float: the library's functions.
// The decay is 2^(dt A log2 e) by ex2.approx in both: 2 ulp.

__device__ inline float scan_lg2(float x) { float y; asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }

// log(1 + e^x) = max(x, 0) + log(1 + p) with p = e^-|x|. Below p = 0.01 the sum 1 + p would lose digits: a series.
template <class X> __device__ inline float scan_softplus(float x) {
    if constexpr (sizeof(X) == 2) {
        const float p = exp2_fast(fabsf(x) * -LOG2E);
        const float series = p * (LOG2E - p * (0.5f * LOG2E - p * (0.33333333f * LOG2E))), log = scan_lg2(1.f + p);
        return fmaf(p < 1e-2f ? series : log, SCAN_LN2, fmaxf(x, 0.f));
    } else {
        return x > 20.f ? x : log1pf(expf(x));
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// A block's threads, and what they load and store

// What a thread does. For the recurrence it is a lane: lane q of channel c of the block keeps 4 states of a group. For what does not depend on the
// states it has 4 neighbouring channels, from `column` of the block on, at step `row` of every tile.
template <int CH /*channels a block*/> struct ScanThread {
    int tid, c, q, channel;
    int row, column, first_channel;
    __device__ ScanThread()
        : tid(threadIdx.x), c(tid / SCAN_LANES), q(tid % SCAN_LANES), channel(blockIdx.x * CH + c),
          row(tid / (CH / 4)), column(tid % (CH / 4) * 4), first_channel(blockIdx.x * CH + column) {}
    __device__ int state(int group) const { return group * SCAN_GROUP + q * 4; }     // the first of the lane's
};

// A lane's 4 states of a group; also their decay rates and gradients
using ScanStates = Vec<float, 4>;

// A log2(e) of 4 states from n on; 0 past the end
__device__ inline ScanStates scan_load_A(const float* A_log /*(e,N)*/, int channel, int n, int e, int N) {
    ScanStates A2;
#pragma unroll
    for (int j = 0; j < 4; j++) A2[j] = channel < e && n + j < N ? -expf(A_log[(int64_t)channel * N + n + j]) * LOG2E : 0.f;
    return A2;
}

// 4 values of a row from column i on, zeros from `limit` on. VEC: all rows allow aligned loads of 4, and limit % 4 = 0.
template <bool VEC, class X> __device__ inline Vec<X, 4> scan_load(const X* row, int i, int limit) {
    Vec<X, 4> v;
    if (VEC && i < limit) return load_vec<4>(row + i);
#pragma unroll
    for (int k = 0; k < 4; k++) v[k] = !VEC && i + k < limit ? row[i + k] : from_float<X>(0.f);
    return v;
}
// 4 values as X
template <class X> __device__ inline Vec<X, 4> scan_round(const float (&x)[4]) {
    Vec<X, 4> v;
#pragma unroll
    for (int k = 0; k < 4; k++) v[k] = from_float<X>(x[k]);
    return v;
}
template <bool VEC, class X> __device__ inline void scan_store(X* row, int i, int limit, const float (&x)[4]) {
    const Vec<X, 4> v = scan_round<X>(x);
    if (VEC) {
        if (i < limit) store_vec(row + i, v);
    } else {
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (i + k < limit) row[i + k] = v[k];
    }
}

// B | C of a tile and a group of states, in shared memory
using ScanBC = float[SCAN_TILE][2 * SCAN_GROUP];
constexpr int SCAN_BC_THREADS = sizeof(ScanBC) / sizeof(float4);     // the first of a block, 8 a step: 4 for B, 4 for C
template <bool VEC, class X> __device__ inline Vec<X, 4> scan_load_bc(const ScanInput<X>& p, int64_t sequence, int64_t tile, int group) {
    const int64_t t = tile * SCAN_TILE + threadIdx.x / 8;
    const int column = threadIdx.x % 8 * 4, n = group * SCAN_GROUP + column % SCAN_GROUP;
    const X* row = p.bc + (sequence * p.T + t) * p.ldbc + (column < SCAN_GROUP ? 0 : p.N);
    return scan_load<VEC>(row, n, t < p.T ? p.N : 0);
}
template <class X> __device__ inline void scan_put_bc(ScanBC& bc, const Vec<X, 4>& v) {
    const int i = threadIdx.x;
    *(float4*)&bc[i / 8][i % 8 * 4] = make_float4(to_float(v[0]), to_float(v[1]), to_float(v[2]), to_float(v[3]));
}

// v[i]: this lane's part of a sum for step i. Lane q of the four gets the whole sum for step q.
__device__ inline float scan_sum_lanes(const float (&v)[4], int q) {
    const bool odd = q & 1, high = q & 2;
    const float low = (odd ? v[1] : v[0]) + __shfl_xor_sync(0xffffffffu, odd ? v[0] : v[1], 1);     // step 0 or 1
    const float top = (odd ? v[3] : v[2]) + __shfl_xor_sync(0xffffffffu, odd ? v[2] : v[3], 1);     // step 2 or 3
    return (high ? top : low) + __shfl_xor_sync(0xffffffffu, high ? low : top, 2);
}

// ---------------------------------------------------------------------------------------------------------------------
// Segments

struct ScanSegments {
    int64_t count, tiles;                                             // segments a sequence, tiles a segment
};
// One segment when the blocks of all sequences fill the GPU, `resident` a multiprocessor, more than half; otherwise enough segments to fill
// it, but of no less than 8 tiles. Depends on the sizes and the GPU's number of multiprocessors alone.
inline ScanSegments scan_segments(int B, int64_t T, int e, int channels, int resident) {
    const int64_t blocks = B * ceil_div(e, channels), tiles = scan_tiles(T), places = (int64_t)multiprocessors() * resident;
    int64_t count = 2 * blocks > places ? 1 : places / blocks;
    if (count > tiles / 8) count = tiles / 8 > 0 ? tiles / 8 : 1;
    const int64_t length = ceil_div(tiles, count);
    return {ceil_div(tiles, length), length};
}

// The state a segment ends with when it starts from zero, end (B,S,e,Np), and its sum of dt, time (B,S,e).
// REVERSE: the carry a_t lambda_t of its first step, from a zero carry behind its last. Nobody wants what the last segment ends with (REVERSE: the
// first), so those are left out. Grid (channel blocks, B, (segments - 1) * groups).
template <class X, bool VEC, bool REVERSE>
__global__ void __launch_bounds__(SCAN_CHANNELS * SCAN_LANES)
scan_segment_kernel(float* end, float* time, const X* dout, ScanInput<X> p, int groups) {
    __shared__ __align__(16) float2 s_dt[SCAN_TILE][SCAN_CHANNELS];   // dt and dt u; REVERSE: dt and dy
    __shared__ __align__(16) ScanBC s_bc;
    const ScanThread<SCAN_CHANNELS> me;
    const int group = blockIdx.z % groups, s = blockIdx.z / groups + REVERSE, segments = gridDim.z / groups + 1;
    const int64_t sequence = blockIdx.y, segment = sequence * segments + s;
    const int64_t tiles = (p.T + SCAN_TILE - 1) / SCAN_TILE, first_tile = s * p.segment_tiles;
    const int64_t count = min(p.segment_tiles, tiles - first_tile);
    const ScanStates A2 = scan_load_A(p.A_log, me.channel, me.state(group), p.e, p.N);
    const Vec<float, 4> bias = scan_load<false>(p.dt_bias, me.first_channel, p.e);
    ScanStates h = {};
    float total = 0.f;
    Vec<X, 4> dts, inputs, zs, bcs;
    auto load_tile = [&](int64_t i) {
        const int64_t tile = REVERSE ? first_tile + count - 1 - i : first_tile + i, t = tile * SCAN_TILE + me.row, at = sequence * p.T + t;
        const int limit = t < p.T ? p.e : 0;
        dts = scan_load<VEC>(p.dt_raw + at * p.e, me.first_channel, limit);
        inputs = scan_load<VEC>((REVERSE ? dout : p.u) + at * p.e, me.first_channel, limit);
        if (REVERSE) zs = scan_load<VEC>(p.z + at * p.ldz, me.first_channel, limit);
        bcs = scan_load_bc<VEC>(p, sequence, tile, group);
    };
    load_tile(0);
    for (int64_t i = 0; i < count; i++) {
        const int64_t t = (REVERSE ? first_tile + count - 1 - i : first_tile + i) * SCAN_TILE + me.row;
        const bool start = p.is_start(sequence, t);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const float dt = t < p.T ? scan_softplus<X>(to_float(dts[k]) + bias[k]) : 0.f, z = REVERSE ? to_float(zs[k]) : 0.f;
            s_dt[me.row][me.column + k] = make_float2(start ? SCAN_CUT : dt, to_float(inputs[k]) * (REVERSE ? z * sigmoid<X>(z) : dt));
        }
        scan_put_bc(s_bc, bcs);
        __syncthreads();
        if (i + 1 < count) load_tile(i + 1);
#pragma unroll
        for (int step = 0; step < SCAN_TILE; step++) {
            const int k = REVERSE ? SCAN_TILE - 1 - step : step;
            const float2 dt = s_dt[k][me.c];
            const auto v = load_vec<4>(&s_bc[k][(REVERSE ? SCAN_GROUP : 0) + me.q * 4]);
            total += dt.x;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float a = exp2_fast(dt.x * A2[j]);
                h[j] = REVERSE ? a * fmaf(dt.y, v[j], h[j]) : fmaf(a, h[j], dt.y * v[j]);
            }
        }
        __syncthreads();
    }
    if (me.channel >= p.e) return;
    if (me.q == 0 && group == 0) time[segment * p.e + me.channel] = total;
    *(float4*)(end + (segment * p.e + me.channel) * groups * SCAN_GROUP + group * SCAN_GROUP + me.q * 4) = make_float4(h[0], h[1], h[2], h[3]);
}

// In place: end of segment -> what the segment starts from. A thread is one state of one channel of one sequence.
template <bool REVERSE>
__global__ void scan_chain_kernel(float* end, const float* time, const float* h_in, const float* A_log, int64_t B, int64_t segments, int e,
                                  int N, int Np) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= B * e * Np) return;
    const int n = (int)(i % Np);
    const int64_t channel = i / Np % e, sequence = i / Np / e;
    const float A2 = n < N ? -expf(A_log[channel * N + n]) * LOG2E : 0.f;
    float h = h_in && n < N ? h_in[(sequence * e + channel) * N + n] : 0.f;
    for (int64_t k = 0; k < segments; k++) {
        const int64_t at = (sequence * segments + (REVERSE ? segments - 1 - k : k)) * e + channel;
        const float local = k + 1 < segments ? end[at * Np + n] : 0.f;
        end[at * Np + n] = h;
        if (k + 1 < segments) h = fmaf(exp2_fast(A2 * time[at]), h, local);
    }
}

template <class X, bool VEC, bool REVERSE>
void scan_chain_segments(float* end, float* time, const float* h_in, const X* dout, const ScanInput<X>& p, int B,
                         const ScanSegments& segments, Stream stream) {
    const int Np = scan_padded(p.N), groups = Np / SCAN_GROUP;
    const dim3 grid((unsigned)ceil_div(p.e, SCAN_CHANNELS), (unsigned)B, (unsigned)((segments.count - 1) * groups));
    scan_segment_kernel<X, VEC, REVERSE><<<grid, SCAN_CHANNELS * SCAN_LANES, 0, stream>>>(end, time, dout, p, groups);
    LAUNCH_CHECK();
    const unsigned blocks = (unsigned)ceil_div((int64_t)B * p.e * Np, 256);
    scan_chain_kernel<REVERSE><<<blocks, 256, 0, stream>>>(end, time, h_in, p.A_log, B, segments.count, p.e, p.N, Np);
    LAUNCH_CHECK();
}

// ---------------------------------------------------------------------------------------------------------------------
// The sums over blocks that end the backward pass, each in order.
constexpr int SCAN_ADD_THREADS = 256;
struct ScanSums {
    const float *dbc, *dA, *dD_dbias;                                 // see ScanWorkspace
    int64_t channel_blocks, rows, parts;                              // rows: B T; parts: sequences and segments
    int64_t dbc_blocks;                                               // blocks of threads that add dbc; those after them add parameters
    int e, N, Np;
};
// dbc_row,n = sum over channel blocks. Thread i adds 4 neighbouring columns of a padded row.
template <class X> __device__ inline void scan_add_dbc(X* dbc, int64_t lddbc, const ScanSums& s, int64_t i) {
    const int64_t quads = s.Np / 2;
    if (i >= s.rows * quads) return;
    float sum[4] = {};
#pragma unroll 4
    for (int64_t block = 0; block < s.channel_blocks; block++) {
        const auto v = load_vec<4>(s.dbc + (block * s.rows * quads + i) * 4);
#pragma unroll
        for (int k = 0; k < 4; k++) sum[k] += v[k];
    }
    const int column = (int)(i % quads) * 4, n = column / (2 * SCAN_GROUP) * SCAN_GROUP + column % SCAN_GROUP;
    X* to = dbc + i / quads * lddbc + (column / SCAN_GROUP % 2 ? s.N : 0);
#pragma unroll
    for (int k = 0; k < 4; k++)
        if (n + k < s.N) to[n + k] = from_float<X>(sum[k]);
}
// dA_log, dD, ddt_bias += sums over sequences and segments. Thread i is one state of one channel.
__device__ inline void scan_add_parameters(float* dA_log, float* dD, float* ddt_bias, const ScanSums& s, int64_t i) {
    const int n = (int)(i % s.Np);
    const int64_t channel = i / s.Np;
    if (channel >= s.e || n >= s.N) return;
    float sum = 0.f, sum_D = 0.f, sum_bias = 0.f;
    for (int64_t k = 0; k < s.parts; k++) sum += s.dA[(k * s.e + channel) * s.Np + n];
    dA_log[channel * s.N + n] += sum;
    if (n != 0) return;
    for (int64_t k = 0; k < s.parts; k++) {
        sum_D += s.dD_dbias[(k * s.e + channel) * 2];
        sum_bias += s.dD_dbias[(k * s.e + channel) * 2 + 1];
    }
    dD[channel] += sum_D;
    ddt_bias[channel] += sum_bias;
}
template <class X> __global__ void __launch_bounds__(SCAN_ADD_THREADS)
scan_add_kernel(X* dbc, int64_t lddbc, float* dA_log, float* dD, float* ddt_bias, ScanSums s) {
    if (blockIdx.x < s.dbc_blocks) scan_add_dbc(dbc, lddbc, s, blockIdx.x * (int64_t)SCAN_ADD_THREADS + threadIdx.x);
    else scan_add_parameters(dA_log, dD, ddt_bias, s, (blockIdx.x - s.dbc_blocks) * (int64_t)SCAN_ADD_THREADS + threadIdx.x);
}

} // namespace gpu
