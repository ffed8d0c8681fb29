// Selective scan: the recurrence of the Mamba mixer with its softplus, skip and gate. For every channel c (index left out) and state n:
//   dt_t = softplus(dt_raw_t + dt_bias)                 A_n = -exp(A_log_n)          a_tn = exp(dt_t A_n)
//   h_tn = a_tn h_(t-1)n + dt_t B_tn u_t                y_t  = sum_n C_tn h_tn + D u_t
//   out_t = y_t silu(z_t)
// The gradients are written out in cpu/selective_scan.h, which is the definition. u, dt_raw, z, out: (B,T,e) of X; B and C: (B,T,N) of X
// inside wider rows; A_log (e,N), D, dt_bias (e), the state h (B,e,N) and all arithmetic fp32.
//
// A block is 32 (backward, bf16: 64) neighbouring channels of one sequence and walks along it in tiles of 16 steps. Four lanes share a
// channel and keep 4 of its 16 states each in registers; more states than 16 are taken in groups of 16, tile by tile. What does not depend on
// the state (softplus, gate) is computed by one thread for 4 channels of a step and passed through shared memory.
// Past-the-end steps have dt = 0, so a = 1 and no input; past-the-end channels and states are zeros and are not stored.
// Saved for backward: h before every tile, as X (float or bf16): sizeof(X) bytes per (t,c) at N = 16. The backward pass goes from the last tile to the first,
// remakes the states of a tile from it, keeps them in shared memory as X, and goes back through them with lambda.
// dB and dC are sums over channels: on tensor cores with bf16 operands (bf16 build) or fp32 (float build) inside the block, then over the
// blocks by a second kernel in a fixed order. Nothing is atomic: the same inputs give the same bits.
// When B*e is too small to fill the GPU, T is split into segments: (a) every segment from a zero state, (b) the segments chained with
// their decay exp(A sum dt), (c) the main kernel from the right state. The same goes for lambda, backwards.
//
// Cost per (t,c) in bf16, N = 16: forward 8 bytes + 2 saved, 19 special-function results (16 of them the decays); backward 16 bytes + 2 + 4
// for the partial sums of dB and dC. At 32768 x 3072 on an H100: forward at least 0.34 ms by memory and 0.52 ms by special functions;
// backward at least 0.67 ms by memory, 0.98 ms by special functions, about 1.4 ms by instruction issue.
#pragma once
#include <initializer_list>
#include "device.cuh"
#include "measure.cuh"

namespace gpu {

constexpr int SCAN_TILE = 16;       // steps a tile; also steps between saved states
constexpr int SCAN_GROUP = 16;      // states a group
constexpr int SCAN_LANES = 4;       // lanes a channel
constexpr int SCAN_CHANNELS = 32;   // channels a block, but for the bf16 backward kernel
constexpr int SCAN_MAX_STATES = 256;
constexpr float SCAN_LOG2E = 1.4426950408889634f, SCAN_LN2 = 0.6931471805599453f;

inline int scan_padded(int N) { return (int)round_up(N, SCAN_GROUP); }
inline int64_t scan_tiles(int64_t T) { return ceil_div(T, SCAN_TILE); }

template <class X> struct ScanInput {
    const X *u, *dt_raw, *bc, *z;
    int64_t ldbc, ldz;
    const float *A_log, *D, *dt_bias;
    int64_t T;
    int e, N;
    int64_t segment_tiles;          // tiles a segment; segment number: blockIdx.z
};

// ---------------------------------------------------------------------------------------------------------------------
// Arithmetic. bf16: special-function instructions, relative error about 1e-6. float: the library's functions.
// The decay is 2^(dt A log2 e) by ex2.approx in both: 2 ulp.

__device__ inline float scan_ex2(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ inline float scan_lg2(float x) { float y; asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ inline float scan_rcp(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }

template <class X> __device__ inline float scan_sigmoid(float x) {
    if constexpr (sizeof(X) == 2) return scan_rcp(1.f + scan_ex2(-x * SCAN_LOG2E));
    else return 1.f / (1.f + expf(-x));
}
// log(1 + e^x), which is x above 20 in fp32. Below e^x = 0.01 the sum 1 + e^x would lose digits: a series.
template <class X> __device__ inline float scan_softplus(float x) {
    if constexpr (sizeof(X) == 2) {
        const float p = scan_ex2(x * SCAN_LOG2E), log = scan_lg2(1.f + p) * SCAN_LN2, series = p * (1.f - p * (0.5f - p * 0.33333333f));
        return x > 20.f ? x : p < 1e-2f ? series : log;
    } else {
        return x > 20.f ? x : log1pf(expf(x));
    }
}

// A log2(e) of 4 states from n on; 0 past the end
__device__ inline void scan_load_A(float (&A2)[4], const float* A_log, int channel, int n, int e, int N) {
#pragma unroll
    for (int j = 0; j < 4; j++) A2[j] = channel < e && n + j < N ? -expf(A_log[(int64_t)channel * N + n + j]) * SCAN_LOG2E : 0.f;
}

// 4 values of a row from column i on, zeros from `limit` on. VEC: all rows allow aligned loads of 4, and limit % 4 = 0.
template <bool VEC, class X> __device__ inline Vec<X, 4> scan_load(const X* row, int i, int limit) {
    Vec<X, 4> v;
    if (VEC && i < limit) return load_vec<4>(row + i);
#pragma unroll
    for (int k = 0; k < 4; k++) v[k] = !VEC && i + k < limit ? row[i + k] : from_float<X>(0.f);
    return v;
}
template <bool VEC, class X> __device__ inline void scan_store(X* row, int i, int limit, const float (&x)[4]) {
    Vec<X, 4> v;
#pragma unroll
    for (int k = 0; k < 4; k++) v[k] = from_float<X>(x[k]);
    if (VEC) {
        if (i < limit) store_vec(row + i, v);
    } else {
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (i + k < limit) row[i + k] = v[k];
    }
}
template <class X> __device__ inline float4 scan_floats(const Vec<X, 4>& v) { return make_float4(to_float(v[0]), to_float(v[1]), to_float(v[2]), to_float(v[3])); }

// B (first 4 threads of 8) or C (last 4) of one step of the tile and one group of states, for the first 128 threads
template <bool VEC, class X> __device__ inline Vec<X, 4> scan_load_bc(const ScanInput<X>& p, int64_t sequence, int64_t tile, int group) {
    const int64_t t = tile * SCAN_TILE + threadIdx.x / 8;
    const int column = threadIdx.x % 8 * 4, n = group * SCAN_GROUP + column % SCAN_GROUP;
    const X* row = p.bc + (sequence * p.T + t) * p.ldbc + (column < SCAN_GROUP ? 0 : p.N);
    return scan_load<VEC>(row, n, t < p.T ? p.N : 0);
}

// Which channel of the block (c) and which quarter of its states (q) a thread has. MERGE: q is bits 0 and 2 of the lane, so that both
// neighbours tid ^ 1 (same c) and tid ^ 2 (same q) read the same address in one of the loads of dt and of B or C: shared memory then
// serves a load of 8 bytes in one pass and of 16 bytes in two, instead of two and four.
template <bool MERGE> __device__ inline int scan_channel(int tid) { return MERGE ? tid / 32 * 8 + (tid >> 3 & 3) * 2 + (tid >> 1 & 1) : tid / SCAN_LANES; }
template <bool MERGE> __device__ inline int scan_quarter(int tid) { return MERGE ? (tid & 1) + (tid >> 1 & 2) : tid % SCAN_LANES; }

// v[i]: this lane's part of a sum for step i. Lane q of the four gets the whole sum for step q.
template <bool MERGE> __device__ inline float scan_sum_lanes(const float (&v)[4], int q) {
    const bool odd = q & 1, high = q & 2;
    const float low = (odd ? v[1] : v[0]) + __shfl_xor_sync(0xffffffffu, odd ? v[0] : v[1], 1);     // step 0 or 1
    const float top = (odd ? v[3] : v[2]) + __shfl_xor_sync(0xffffffffu, odd ? v[2] : v[3], 1);     // step 2 or 3
    return (high ? top : low) + __shfl_xor_sync(0xffffffffu, high ? low : top, MERGE ? 4 : 2);
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward. Grid (channel blocks, B, segments). h_first (B,S,e,h_stride), or null for zeros.

template <class X, bool VEC, bool MANY /*groups of states*/, bool MERGE = false>
__global__ void __launch_bounds__(SCAN_CHANNELS * SCAN_LANES, sizeof(X) == 2 && VEC && !MANY ? 6 : 4)
selective_scan_forward_kernel(X* out, X* saved, float* h_out, const float* h_first, int h_stride, ScanInput<X> p) {
    constexpr int CH = SCAN_CHANNELS, THREADS = CH * SCAN_LANES;
    __shared__ __align__(16) float2 s_dt[SCAN_TILE][CH];              // dt and dt u
    __shared__ __align__(16) float s_bc[SCAN_TILE][2 * SCAN_GROUP];   // B | C
    __shared__ __align__(16) float s_y[SCAN_TILE][CH + 8];            // + 8: the four lanes' rows lie in different banks
    extern __shared__ float4 s_h[];                                   // MANY: (groups, threads)

    const int tid = threadIdx.x, c = scan_channel<MERGE>(tid), q = scan_quarter<MERGE>(tid), channel = blockIdx.x * CH + c;
    const int row = tid / (CH / 4), column = tid % (CH / 4) * 4, first_channel = blockIdx.x * CH + column;   // for work without states
    const int64_t sequence = blockIdx.y, segment = sequence * gridDim.z + blockIdx.z;
    const int groups = MANY ? (p.N + SCAN_GROUP - 1) / SCAN_GROUP : 1, Np = groups * SCAN_GROUP;
    const int64_t tiles = (p.T + SCAN_TILE - 1) / SCAN_TILE, first_tile = blockIdx.z * p.segment_tiles;
    const int64_t last_tile = min(first_tile + p.segment_tiles, tiles);

    float A2[4], h[4], skip_weight[4], bias[4];
    for (int g = 0; g < groups; g++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int n = g * SCAN_GROUP + q * 4 + j;
            h[j] = h_first && channel < p.e && n < p.N ? h_first[(segment * p.e + channel) * h_stride + n] : 0.f;
        }
        if (MANY) s_h[g * THREADS + tid] = make_float4(h[0], h[1], h[2], h[3]);
    }
    scan_load_A(A2, p.A_log, channel, q * 4, p.e, p.N);
#pragma unroll
    for (int k = 0; k < 4; k++) {
        skip_weight[k] = first_channel + k < p.e ? p.D[first_channel + k] : 0.f;
        bias[k] = first_channel + k < p.e ? p.dt_bias[first_channel + k] : 0.f;
    }
    Vec<X, 4> us, dts, zs, bcs;
    auto load_tile = [&](int64_t tile) {
        const int64_t t = tile * SCAN_TILE + row, at = sequence * p.T + t;
        const int limit = t < p.T ? p.e : 0;
        us = scan_load<VEC>(p.u + at * p.e, first_channel, limit);
        dts = scan_load<VEC>(p.dt_raw + at * p.e, first_channel, limit);
        zs = scan_load<VEC>(p.z + at * p.ldz, first_channel, limit);
        bcs = scan_load_bc<VEC>(p, sequence, tile, 0);
    };
    load_tile(first_tile);
    for (int64_t tile = first_tile; tile < last_tile; tile++) {
        const int64_t t = tile * SCAN_TILE + row;
        float skip[4], gate[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const float x = to_float(us[k]), z = to_float(zs[k]);
            const float dt = t < p.T ? scan_softplus<X>(to_float(dts[k]) + bias[k]) : 0.f;
            s_dt[row][column + k] = make_float2(dt, dt * x);
            skip[k] = skip_weight[k] * x;
            gate[k] = z * scan_sigmoid<X>(z);
        }
        for (int g = 0; g < groups; g++) {
            if (MANY) {
                if (g > 0) __syncthreads();                           // the group before has been read
                bcs = scan_load_bc<VEC>(p, sequence, tile, g);
                scan_load_A(A2, p.A_log, channel, g * SCAN_GROUP + q * 4, p.e, p.N);
                const float4 v = s_h[g * THREADS + tid];
                h[0] = v.x, h[1] = v.y, h[2] = v.z, h[3] = v.w;
            }
            *(float4*)&s_bc[tid / 8][tid % 8 * 4] = scan_floats(bcs);
            __syncthreads();
            if (g == groups - 1 && tile + 1 < last_tile) load_tile(tile + 1);
            if (saved && channel < p.e) {
                Vec<X, 4> v;
#pragma unroll
                for (int j = 0; j < 4; j++) v[j] = from_float<X>(h[j]);
                store_vec(saved + ((sequence * tiles + tile) * p.e + channel) * Np + g * SCAN_GROUP + q * 4, v);
            }
#pragma unroll 2
            for (int t4 = 0; t4 < SCAN_TILE; t4 += 4) {
                float y[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float2 dt = s_dt[t4 + i][c];
                    const auto B = load_vec<4>(&s_bc[t4 + i][q * 4]), C = load_vec<4>(&s_bc[t4 + i][SCAN_GROUP + q * 4]);
                    y[i] = 0.f;
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        h[j] = fmaf(scan_ex2(dt.x * A2[j]), h[j], dt.y * B[j]);
                        y[i] = fmaf(h[j], C[j], y[i]);
                    }
                }
                const float sum = scan_sum_lanes<MERGE>(y, q);
                s_y[t4 + q][c] = MANY && g > 0 ? s_y[t4 + q][c] + sum : sum;
            }
            if (MANY) s_h[g * THREADS + tid] = make_float4(h[0], h[1], h[2], h[3]);
        }
        __syncthreads();
        const auto y = load_vec<4>(&s_y[row][column]);
        const float o[4] = {(y[0] + skip[0]) * gate[0], (y[1] + skip[1]) * gate[1], (y[2] + skip[2]) * gate[2], (y[3] + skip[3]) * gate[3]};
        scan_store<VEC>(out + (sequence * p.T + t) * p.e, first_channel, t < p.T ? p.e : 0, o);
    }
    if (!h_out || last_tile < tiles || channel >= p.e) return;
    for (int g = 0; g < groups; g++) {
        if (MANY) {
            const float4 v = s_h[g * THREADS + tid];
            h[0] = v.x, h[1] = v.y, h[2] = v.z, h[3] = v.w;
        }
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (const int n = g * SCAN_GROUP + q * 4 + j; n < p.N) h_out[(sequence * p.e + channel) * p.N + n] = h[j];
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Segments

struct ScanSegments {
    int64_t count, tiles;                                             // segments a sequence, tiles a segment
};
// One segment when the channel blocks of all sequences give every multiprocessor two blocks; otherwise enough segments for
// four, but of no less than 8 tiles. Depends on the sizes and the GPU's number of multiprocessors alone.
inline ScanSegments scan_segments(int B, int64_t T, int e) {
    int device = 0, processors = 1;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    const int64_t blocks = B * ceil_div(e, SCAN_CHANNELS), tiles = scan_tiles(T);
    int64_t count = blocks >= 2 * processors ? 1 : ceil_div(4 * processors, blocks);
    if (count > tiles / 8) count = tiles / 8 > 0 ? tiles / 8 : 1;
    const int64_t length = ceil_div(tiles, count);
    return {ceil_div(tiles, length), length};
}

// The state a segment ends with when it starts from zero, end (B,S,e,Np), and its sum of dt, time (B,S,e).
// REVERSE: the carry a_t lambda_t of its first step, from a zero carry behind its last. Grid (channel blocks, B, segments * groups).
template <class X, bool VEC, bool REVERSE>
__global__ void __launch_bounds__(SCAN_CHANNELS * SCAN_LANES)
scan_segment_kernel(float* end, float* time, const X* dout, ScanInput<X> p, int groups) {
    constexpr int CH = SCAN_CHANNELS;
    __shared__ __align__(16) float2 s_dt[SCAN_TILE][CH];              // dt and dt u; REVERSE: dt and dy
    __shared__ __align__(16) float s_bc[SCAN_TILE][2 * SCAN_GROUP];
    const int tid = threadIdx.x, c = tid / SCAN_LANES, q = tid % SCAN_LANES, channel = blockIdx.x * CH + c;
    const int row = tid / (CH / 4), column = tid % (CH / 4) * 4, first_channel = blockIdx.x * CH + column;
    const int group = blockIdx.z % groups, s = blockIdx.z / groups, segments = gridDim.z / groups;
    const int64_t sequence = blockIdx.y, segment = sequence * segments + s;
    const int64_t tiles = (p.T + SCAN_TILE - 1) / SCAN_TILE, first_tile = s * p.segment_tiles;
    const int64_t count = min(p.segment_tiles, tiles - first_tile);
    float A2[4], h[4] = {}, total = 0.f, bias[4];
    scan_load_A(A2, p.A_log, channel, group * SCAN_GROUP + q * 4, p.e, p.N);
#pragma unroll
    for (int k = 0; k < 4; k++) bias[k] = first_channel + k < p.e ? p.dt_bias[first_channel + k] : 0.f;
    Vec<X, 4> dts, inputs, zs, bcs;
    auto load_tile = [&](int64_t i) {
        const int64_t tile = REVERSE ? first_tile + count - 1 - i : first_tile + i, t = tile * SCAN_TILE + row, at = sequence * p.T + t;
        const int limit = t < p.T ? p.e : 0;
        dts = scan_load<VEC>(p.dt_raw + at * p.e, first_channel, limit);
        inputs = scan_load<VEC>((REVERSE ? dout : p.u) + at * p.e, first_channel, limit);
        if (REVERSE) zs = scan_load<VEC>(p.z + at * p.ldz, first_channel, limit);
        bcs = scan_load_bc<VEC>(p, sequence, tile, group);
    };
    load_tile(0);
    for (int64_t i = 0; i < count; i++) {
        const int64_t t = (REVERSE ? first_tile + count - 1 - i : first_tile + i) * SCAN_TILE + row;
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const float dt = t < p.T ? scan_softplus<X>(to_float(dts[k]) + bias[k]) : 0.f, z = REVERSE ? to_float(zs[k]) : 0.f;
            s_dt[row][column + k] = make_float2(dt, to_float(inputs[k]) * (REVERSE ? z * scan_sigmoid<X>(z) : dt));
        }
        *(float4*)&s_bc[tid / 8][tid % 8 * 4] = scan_floats(bcs);
        __syncthreads();
        if (i + 1 < count) load_tile(i + 1);
#pragma unroll
        for (int step = 0; step < SCAN_TILE; step++) {
            const int k = REVERSE ? SCAN_TILE - 1 - step : step;
            const float2 dt = s_dt[k][c];
            const auto v = load_vec<4>(&s_bc[k][(REVERSE ? SCAN_GROUP : 0) + q * 4]);
            total += dt.x;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float a = scan_ex2(dt.x * A2[j]);
                h[j] = REVERSE ? a * fmaf(dt.y, v[j], h[j]) : fmaf(a, h[j], dt.y * v[j]);
            }
        }
        __syncthreads();
    }
    if (channel >= p.e) return;
    if (q == 0 && group == 0) time[segment * p.e + channel] = total;
    *(float4*)(end + (segment * p.e + channel) * groups * SCAN_GROUP + group * SCAN_GROUP + q * 4) = make_float4(h[0], h[1], h[2], h[3]);
}

// In place: end of segment -> what the segment starts from. A thread is one state of one channel of one sequence.
template <bool REVERSE>
__global__ void scan_chain_kernel(float* end, const float* time, const float* h_in, const float* A_log, int64_t B, int64_t segments, int e, int N, int Np) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= B * e * Np) return;
    const int n = (int)(i % Np);
    const int64_t channel = i / Np % e, sequence = i / Np / e;
    const float A2 = n < N ? -expf(A_log[channel * N + n]) * SCAN_LOG2E : 0.f;
    float h = h_in && n < N ? h_in[(sequence * e + channel) * N + n] : 0.f;
    for (int64_t k = 0; k < segments; k++) {
        const int64_t at = (sequence * segments + (REVERSE ? segments - 1 - k : k)) * e + channel;
        const float local = end[at * Np + n];
        end[at * Np + n] = h;
        h = fmaf(scan_ex2(A2 * time[at]), h, local);
    }
}

template <class X, bool VEC, bool REVERSE>
void scan_chain_segments(float* end, float* time, const float* h_in, const X* dout, const ScanInput<X>& p, int B, const ScanSegments& segments, Stream stream) {
    const int Np = scan_padded(p.N), groups = Np / SCAN_GROUP;
    const dim3 grid((unsigned)ceil_div(p.e, SCAN_CHANNELS), (unsigned)B, (unsigned)(segments.count * groups));
    scan_segment_kernel<X, VEC, REVERSE><<<grid, SCAN_CHANNELS * SCAN_LANES, 0, stream>>>(end, time, dout, p, groups);
    LAUNCH_CHECK();
    scan_chain_kernel<REVERSE><<<(unsigned)ceil_div((int64_t)B * p.e * Np, 256), 256, 0, stream>>>(end, time, h_in, p.A_log, B, segments.count, p.e, p.N, Np);
    LAUNCH_CHECK();
}

// ---------------------------------------------------------------------------------------------------------------------
// Host

// Where things are in the workspace. All fp32.
struct ScanWorkspace {
    float *end, *time;              // (B,S,e,Np), (B,S,e)
    float *dbc;                     // (channel blocks, B*T, 2 Np): B | C of the first group, B | C of the second, ...
    float *dA, *dD_dbias;           // (B,S,e,Np), (B,S,e,2)
    size_t bytes;
};
template <class X> constexpr int scan_backward_channels(bool many) { return sizeof(X) == 2 && !many ? 64 : SCAN_CHANNELS; }
template <class X> ScanWorkspace scan_workspace(void* start, int B, int64_t T, int e, int N) {
    const int64_t S = scan_segments(B, T, e).count, Np = scan_padded(N), blocks = ceil_div(e, scan_backward_channels<X>(N > SCAN_GROUP));
    ScanWorkspace w{};
    auto take = [&](float** p, int64_t n) {
        *p = (float*)((char*)start + w.bytes);
        w.bytes += (size_t)round_up(n * (int64_t)sizeof(float), 256);
    };
    take(&w.end, B * S * e * Np);
    take(&w.time, B * S * e);
    take(&w.dbc, blocks * B * T * 2 * Np);
    take(&w.dA, B * S * e * Np);
    take(&w.dD_dbias, B * S * e * 2);
    return w;
}
inline size_t selective_scan_saved(int B, int64_t T, int e, int N) { return (size_t)B * scan_tiles(T) * e * scan_padded(N) * sizeof(floatX); }
inline size_t selective_scan_workspace(int B, int64_t T, int e, int N) { return scan_workspace<floatX>(nullptr, B, T, e, N).bytes; }

inline void scan_check_states(int N) {
    if (N < 1 || N > SCAN_MAX_STATES) fail("selective_scan: d_state is %d; it must be 1 to %d", N, SCAN_MAX_STATES);
}
template <class X> bool scan_vectors(std::initializer_list<const X*> pointers, std::initializer_list<int64_t> sizes) {
    for (const X* p : pointers)
        if ((uintptr_t)p % (4 * sizeof(X))) return false;
    for (int64_t n : sizes)
        if (n % 4) return false;
    return true;
}

template <class X, bool VEC, bool MANY>
void scan_forward(X* out, X* saved, float* h_out, const float* h_in, ScanInput<X> p, const ScanWorkspace& w, int B, Stream stream) {
    const ScanSegments segments = scan_segments(B, p.T, p.e);
    p.segment_tiles = segments.tiles;
    if (segments.count > 1) scan_chain_segments<X, VEC, false>(w.end, w.time, h_in, nullptr, p, B, segments, stream);
    const int threads = SCAN_CHANNELS * SCAN_LANES, Np = scan_padded(p.N);
    const size_t shared = MANY ? (size_t)Np / SCAN_GROUP * threads * sizeof(float4) : 0;
    auto kernel = selective_scan_forward_kernel<X, VEC, MANY>;
    if (shared > 16 * 1024) CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    const dim3 grid((unsigned)ceil_div(p.e, SCAN_CHANNELS), (unsigned)B, (unsigned)segments.count);
    const bool split = segments.count > 1;
    kernel<<<grid, threads, shared, stream>>>(out, saved, h_out, split ? w.end : h_in, split ? Np : p.N, p);
    LAUNCH_CHECK();
}

inline void selective_scan_forward(floatX* out /*(B,T,e)*/, void* saved /*or null: inference*/, float* h_out /*(B,e,N) or null; may be h_in*/, const floatX* u /*(B,T,e)*/,
                                   const floatX* dt_raw /*(B,T,e)*/, const floatX* bc /*B at +0, C at +N of each row, row stride ldbc*/, int64_t ldbc,
                                   const floatX* z /*(B,T,e), row stride ldz*/, int64_t ldz, const float* A_log /*(e,N)*/, const float* D, const float* dt_bias,
                                   const float* h_in /*(B,e,N) or null*/, void* workspace, int B, int64_t T, int e, int N, Stream stream) {
    const double elements = (double)B * T * e, states = saved ? (double)selective_scan_saved(B, T, e, N) : 0;
    const Operation op("scan forward", 4 * elements * sizeof(floatX) + states, 0, stream, elements * (N + 3));
    scan_check_states(N);
    const ScanInput<floatX> p{u, dt_raw, bc, z, ldbc, ldz, A_log, D, dt_bias, T, e, N, 0};
    const ScanWorkspace w = scan_workspace<floatX>(workspace, B, T, e, N);
    const bool vec = scan_vectors<floatX>({out, u, dt_raw, bc, z}, {e, N, ldbc, ldz}), many = N > SCAN_GROUP;
    auto launch = vec ? (many ? scan_forward<floatX, true, true> : scan_forward<floatX, true, false>)
                      : (many ? scan_forward<floatX, false, true> : scan_forward<floatX, false, false>);
    launch(out, (floatX*)saved, h_out, h_in, p, w, B, stream);
}
// ---------------------------------------------------------------------------------------------------------------------
// Backward

// Shared memory of a tile. stage holds a value for every step, channel and state of the group: first h_t, then, on the way back, lambda_t.
// Step t is in row t + 1; row 0 is the state before the tile.
template <class X, int CH> struct alignas(16) ScanTile {
    static constexpr int PAIR_STEPS = sizeof(X) == 2 ? SCAN_TILE : 1;
    X stage[SCAN_TILE + 1][CH * SCAN_GROUP];
    float2 dt[SCAN_TILE][CH];                                         // dt and dt u
    float dy[SCAN_TILE][CH];
    float bc[SCAN_TILE][2 * SCAN_GROUP];                              // B | C
    float y[SCAN_TILE][CH + 8], dinput[SCAN_TILE][CH + 8], ddecay[SCAN_TILE][CH + 8];   // + 8: as in the forward kernel
    float skip_weight[CH], dt_bias[CH];
    float dD[SCAN_TILE][CH], ddt_bias[SCAN_TILE][CH];                 // sums over the tiles, each thread its own: registers are short
    X input_X[PAIR_STEPS][CH], dy_X[PAIR_STEPS][CH];                  // bf16: dt u and dy as operands of the tensor cores

    // Where lane q of channel c keeps its 4 states in a row of stage. bf16: the two 16-byte halves of a channel change places in
    // every other group of 4 channels, so that ldmatrix, which reads one half of 8 channels, meets every bank once.
    __device__ static int at(int c, int q) {
        if constexpr (sizeof(X) == 2) return c * SCAN_GROUP + (((q >> 1) ^ (c >> 2 & 1)) << 3) + (q & 1) * 4;
        else return c * SCAN_GROUP + q * 4;
    }
};

__device__ inline void scan_ldmatrix_transposed(uint32_t (&a)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"((uint32_t)__cvta_generic_to_shared(row)) : "memory");
}
__device__ inline void scan_mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// sum_c weight[t][c] stage[t+1][c][n] for the steps of the tile and the 16 states: to[t * stride + n], t < steps.
// bf16: one product m16 n8 k16 a step and 16 channels: rows are states, k the channels, and the weights of the warp's i-th step fill
// column i and leave the others zero, so that one accumulator collects all steps of the warp.
template <int CH>
__device__ inline void scan_sum_channels(float* to, int64_t stride, int64_t steps, const ScanTile<__nv_bfloat16, CH>& s, const __nv_bfloat16 (&weight)[SCAN_TILE][CH]) {
    constexpr int STEPS = SCAN_TILE / (CH / 8);                       // a block has CH / 8 warps
    const int lane = threadIdx.x % WARP, g = lane / 4, q = lane % 4, first = threadIdx.x / WARP * STEPS;
    float sum[4] = {};
#pragma unroll
    for (int i = 0; i < STEPS; i++)
#pragma unroll
        for (int k = 0; k < CH; k += 16) {
            const int c = k + lane / 16 * 8 + lane % 8, half = lane / 8 % 2;
            uint32_t a[4];
            scan_ldmatrix_transposed(a, &s.stage[first + i + 1][s.at(c, 2 * half)]);
            const uint32_t* w = (const uint32_t*)&weight[first + i][k + 2 * q];
            scan_mma_bf16(sum, a, g == i ? w[0] : 0u, g == i ? w[4] : 0u);
        }
#pragma unroll
    for (int j = 0; j < 2; j++)                                       // lane q holds columns 2q and 2q + 1, rows g and g + 8
        if (const int i = 2 * q + j; i < STEPS && first + i < steps) {
            to[(first + i) * stride + g] = sum[j];
            to[(first + i) * stride + g + 8] = sum[2 + j];
        }
}
// float: a thread adds two states of one step; neighbouring steps start at different channels, for the banks' sake.
template <int CH>
__device__ inline void scan_sum_channels(float* to, int64_t stride, int64_t steps, const ScanTile<float, CH>& s, bool input) {
    static_assert(CH * SCAN_LANES == SCAN_TILE * SCAN_GROUP / 2);
    const int t = threadIdx.x / 8, n = threadIdx.x % 8 * 2;
    float sum0 = 0.f, sum1 = 0.f;
#pragma unroll 8
    for (int i = 0; i < CH; i++) {
        const int c = (i + t) % CH;
        const float weight = input ? s.dt[t][c].y : s.dy[t][c];
        const auto v = load_vec<2>(&s.stage[t + 1][c * SCAN_GROUP + n]);
        sum0 = fmaf(weight, v[0], sum0);
        sum1 = fmaf(weight, v[1], sum1);
    }
    if (t < steps) to[t * stride + n] = sum0, to[t * stride + n + 1] = sum1;
}

template <class X> struct ScanGradients {
    X *du, *ddt_raw, *dz, *out;
    int64_t lddz;
    const X *dout, *saved;
    const float* carry;             // (B,S,e,Np): a lambda of the step after the segment; null for zeros
    float *dbc, *dA, *dD_dbias;     // partial sums, see ScanWorkspace
};

// Forward through a tile from the state in row 0 of stage: fills the other rows and adds to y
template <class X, int CH, bool MANY, bool MERGE>
__device__ inline void scan_remake(ScanTile<X, CH>& s, const float (&A2)[4], int c, int q, bool add) {
    const auto first = load_vec<4>(&s.stage[0][s.at(c, q)]);
    float h[4] = {to_float(first[0]), to_float(first[1]), to_float(first[2]), to_float(first[3])};
#pragma unroll 2
    for (int t4 = 0; t4 < SCAN_TILE; t4 += 4) {
        float y[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float2 dt = s.dt[t4 + i][c];
            const auto B = load_vec<4>(&s.bc[t4 + i][q * 4]), C = load_vec<4>(&s.bc[t4 + i][SCAN_GROUP + q * 4]);
            Vec<X, 4> kept;
            y[i] = 0.f;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                h[j] = fmaf(scan_ex2(dt.x * A2[j]), h[j], dt.y * B[j]);
                y[i] = fmaf(h[j], C[j], y[i]);
                kept[j] = from_float<X>(h[j]);
            }
            store_vec(&s.stage[t4 + i + 1][s.at(c, q)], kept);
        }
        const float sum = scan_sum_lanes<MERGE>(y, q);
        s.y[t4 + q][c] = MANY && add ? s.y[t4 + q][c] + sum : sum;
    }
}

// Back through the tile. carry: a lambda of the step after the tile, then of its first step.
template <class X, int CH, bool MANY, bool MERGE>
__device__ inline void scan_reverse(ScanTile<X, CH>& s, float (&carry)[4], float (&dA)[4], const float (&A2)[4], int c, int q, bool add) {
#pragma unroll 1
    for (int t4 = SCAN_TILE - 4; t4 >= 0; t4 -= 4) {
        float dinput[4], ddecay[4];
#pragma unroll
        for (int i = 3; i >= 0; i--) {
            const int t = t4 + i;
            const float dt = s.dt[t][c].x, dy = s.dy[t][c];
            const auto B = load_vec<4>(&s.bc[t][q * 4]), C = load_vec<4>(&s.bc[t][SCAN_GROUP + q * 4]);
            const auto before = load_vec<4>(&s.stage[t][s.at(c, q)]);
            Vec<X, 4> kept;
            dinput[i] = ddecay[i] = 0.f;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float lambda = fmaf(dy, C[j], carry[j]);
                dinput[i] = fmaf(lambda, B[j], dinput[i]);
                carry[j] = scan_ex2(dt * A2[j]) * lambda;
                const float pull = carry[j] * to_float(before[j]);
                ddecay[i] = fmaf(A2[j], pull, ddecay[i]);
                dA[j] = fmaf(dt, pull, dA[j]);
                kept[j] = from_float<X>(lambda);
            }
            store_vec(&s.stage[t + 1][s.at(c, q)], kept);             // h_t has been read, at step t + 1
        }
        const float sum = scan_sum_lanes<MERGE>(dinput, q), decay_sum = scan_sum_lanes<MERGE>(ddecay, q);
        s.dinput[t4 + q][c] = MANY && add ? s.dinput[t4 + q][c] + sum : sum;
        s.ddecay[t4 + q][c] = MANY && add ? s.ddecay[t4 + q][c] + decay_sum : decay_sum;
    }
}

// 4 neighbouring channels of one step
template <class X> struct ScanRow { Vec<X, 4> u, dt_raw, z, dout; };

// What the sweeps over a tile need of its rows. live: the step is not past the end.
template <class X, int CH> __device__ inline void scan_fill_tile(ScanTile<X, CH>& s, const ScanRow<X>& r, bool live, int row, int column) {
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const float u = to_float(r.u[k]), z = to_float(r.z[k]), dy = to_float(r.dout[k]) * z * scan_sigmoid<X>(z);
        const float dt = live ? scan_softplus<X>(to_float(r.dt_raw[k]) + s.dt_bias[column + k]) : 0.f;
        s.dt[row][column + k] = make_float2(dt, dt * u);
        s.dy[row][column + k] = dy;
        if constexpr (sizeof(X) == 2) {
            s.input_X[row][column + k] = from_float<X>(dt * u);
            s.dy_X[row][column + k] = from_float<X>(dy);
        }
    }
}

// What the sweeps leave becomes gradients. at: the row of (B,T).
template <class X, int CH, bool VEC>
__device__ inline void scan_finish_tile(ScanTile<X, CH>& s, const ScanRow<X>& r, const ScanGradients<X>& out, const ScanInput<X>& p, int64_t at, bool live, int row, int column) {
    const int first_channel = blockIdx.x * CH + column, limit = live ? p.e : 0;
    float o[4], dz[4], du[4], ddt[4];
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const float u = to_float(r.u[k]), z = to_float(r.z[k]), gate = scan_sigmoid<X>(z), slope = scan_sigmoid<X>(to_float(r.dt_raw[k]) + s.dt_bias[column + k]);
        const float D = s.skip_weight[column + k], y = fmaf(D, u, s.y[row][column + k]), dinput = s.dinput[row][column + k], dy = s.dy[row][column + k];
        o[k] = y * z * gate;
        dz[k] = to_float(r.dout[k]) * y * gate * (1.f + z * (1.f - gate));
        du[k] = fmaf(dinput, s.dt[row][column + k].x, D * dy);
        ddt[k] = live ? fmaf(dinput, u, s.ddecay[row][column + k] * SCAN_LN2) * slope : 0.f;
        s.dD[row][column + k] = fmaf(dy, u, s.dD[row][column + k]);
        s.ddt_bias[row][column + k] += ddt[k];
    }
    scan_store<VEC>(out.out + at * p.e, first_channel, limit, o);
    scan_store<VEC>(out.dz + at * out.lddz, first_channel, limit, dz);
    scan_store<VEC>(out.du + at * p.e, first_channel, limit, du);
    scan_store<VEC>(out.ddt_raw + at * p.e, first_channel, limit, ddt);
}

// Grid (channel blocks, B, segments). Shared memory: the tile, then if MANY carry and dA of (groups, threads).
template <class X, int CH, bool VEC, bool MANY, bool MERGE = false>
__global__ void __launch_bounds__(CH * SCAN_LANES, CH == 64 ? (VEC ? 3 : 2) : 1)
selective_scan_backward_kernel(ScanGradients<X> out, ScanInput<X> p) {
    constexpr int THREADS = CH * SCAN_LANES;
    extern __shared__ float4 shared_floats[];
    ScanTile<X, CH>& s = *(ScanTile<X, CH>*)shared_floats;
    float4* s_carry = (float4*)(&s + 1);
    const int tid = threadIdx.x, c = scan_channel<MERGE>(tid), q = scan_quarter<MERGE>(tid), channel = blockIdx.x * CH + c;
    const int row = tid / (CH / 4), column = tid % (CH / 4) * 4, first_channel = blockIdx.x * CH + column;
    const int64_t sequence = blockIdx.y, segment = sequence * gridDim.z + blockIdx.z;
    const int groups = MANY ? (p.N + SCAN_GROUP - 1) / SCAN_GROUP : 1, Np = groups * SCAN_GROUP;
    float4* s_dA = s_carry + groups * THREADS;
    const int64_t tiles = (p.T + SCAN_TILE - 1) / SCAN_TILE, first_tile = blockIdx.z * p.segment_tiles;
    const int64_t last_tile = min(first_tile + p.segment_tiles, tiles);

    float A2[4], carry[4] = {}, dA[4] = {};
    for (int g = 0; g < groups; g++) {
        float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
        if (out.carry && channel < p.e) v = *(const float4*)(out.carry + (segment * p.e + channel) * Np + g * SCAN_GROUP + q * 4);
        carry[0] = v.x, carry[1] = v.y, carry[2] = v.z, carry[3] = v.w;
        if (MANY) s_carry[g * THREADS + tid] = v, s_dA[g * THREADS + tid] = make_float4(0.f, 0.f, 0.f, 0.f);
    }
    scan_load_A(A2, p.A_log, channel, q * 4, p.e, p.N);
    *(float4*)&s.dD[row][column] = *(float4*)&s.ddt_bias[row][column] = make_float4(0.f, 0.f, 0.f, 0.f);
    if (tid < CH) {
        const int i = blockIdx.x * CH + tid;
        s.skip_weight[tid] = i < p.e ? p.D[i] : 0.f;
        s.dt_bias[tid] = i < p.e ? p.dt_bias[i] : 0.f;
    }
    __syncthreads();
    ScanRow<X> next;
    Vec<X, 4> bcs, hs;
    auto load_state = [&](int64_t tile, int g) { return scan_load<true>(out.saved + ((sequence * tiles + tile) * p.e + channel) * Np, g * SCAN_GROUP + q * 4, channel < p.e ? Np : 0); };
    auto load_tile = [&](int64_t tile) {
        const int64_t t = tile * SCAN_TILE + row, at = sequence * p.T + t;
        const int limit = t < p.T ? p.e : 0;
        next.u = scan_load<VEC>(p.u + at * p.e, first_channel, limit);
        next.dt_raw = scan_load<VEC>(p.dt_raw + at * p.e, first_channel, limit);
        next.z = scan_load<VEC>(p.z + at * p.ldz, first_channel, limit);
        next.dout = scan_load<VEC>(out.dout + at * p.e, first_channel, limit);
        if (!MANY && tid < 128) bcs = scan_load_bc<VEC>(p, sequence, tile, 0);
        if (!MANY) hs = load_state(tile, 0);
    };
    load_tile(last_tile - 1);
    for (int64_t tile = last_tile - 1; tile >= first_tile; tile--) {
        const int64_t first_step = tile * SCAN_TILE, t = first_step + row;
        const ScanRow<X> now = next;                                  // next takes the next tile's
        scan_fill_tile(s, now, t < p.T, row, column);
        for (int g = 0; g < groups; g++) {
            if (MANY) {
                if (g > 0) __syncthreads();                           // the group before has been read
                bcs = scan_load_bc<VEC>(p, sequence, tile, g);
                hs = load_state(tile, g);
                scan_load_A(A2, p.A_log, channel, g * SCAN_GROUP + q * 4, p.e, p.N);
                const float4 v = s_carry[g * THREADS + tid], w = s_dA[g * THREADS + tid];
                carry[0] = v.x, carry[1] = v.y, carry[2] = v.z, carry[3] = v.w;
                dA[0] = w.x, dA[1] = w.y, dA[2] = w.z, dA[3] = w.w;
            }
            if (tid < 128) *(float4*)&s.bc[tid / 8][tid % 8 * 4] = scan_floats(bcs);
            store_vec(&s.stage[0][s.at(c, q)], hs);                   // read by this thread alone
            __syncthreads();
            if (g == groups - 1 && tile > first_tile) load_tile(tile - 1);
            scan_remake<X, CH, MANY, MERGE>(s, A2, c, q, g > 0);
            __syncthreads();                                          // all h are in stage
            float* part = out.dbc + (((int64_t)blockIdx.x * gridDim.y + sequence) * p.T + first_step) * 2 * Np + g * 2 * SCAN_GROUP;
            if constexpr (sizeof(X) == 2) scan_sum_channels<CH>(part + SCAN_GROUP, 2 * Np, p.T - first_step, s, s.dy_X);
            else scan_sum_channels<CH>(part + SCAN_GROUP, 2 * Np, p.T - first_step, s, false);
            __syncthreads();                                          // and may be replaced
            scan_reverse<X, CH, MANY, MERGE>(s, carry, dA, A2, c, q, g > 0);
            __syncthreads();                                          // all lambda are in stage
            if constexpr (sizeof(X) == 2) scan_sum_channels<CH>(part, 2 * Np, p.T - first_step, s, s.input_X);
            else scan_sum_channels<CH>(part, 2 * Np, p.T - first_step, s, true);
            if (MANY) {
                s_carry[g * THREADS + tid] = make_float4(carry[0], carry[1], carry[2], carry[3]);
                s_dA[g * THREADS + tid] = make_float4(dA[0], dA[1], dA[2], dA[3]);
            }
        }
        scan_finish_tile<X, CH, VEC>(s, now, out, p, sequence * p.T + t, t < p.T, row, column);
        __syncthreads();                                              // the tile has been read
    }
    for (int g = 0; g < groups; g++) {
        if (MANY) {
            const float4 w = s_dA[g * THREADS + tid];
            dA[0] = w.x, dA[1] = w.y, dA[2] = w.z, dA[3] = w.w;
            scan_load_A(A2, p.A_log, channel, g * SCAN_GROUP + q * 4, p.e, p.N);
        }
        if (channel < p.e)
            *(float4*)(out.dA + (segment * p.e + channel) * Np + g * SCAN_GROUP + q * 4) =
                make_float4(A2[0] * SCAN_LN2 * dA[0], A2[1] * SCAN_LN2 * dA[1], A2[2] * SCAN_LN2 * dA[2], A2[3] * SCAN_LN2 * dA[3]);
    }
    if (tid < 2 * CH && blockIdx.x * CH + tid % CH < p.e) {
        float sum = 0.f;
        for (int i = 0; i < SCAN_TILE; i++) sum += tid < CH ? s.dD[i][tid] : s.ddt_bias[i][tid - CH];
        out.dD_dbias[(segment * p.e + blockIdx.x * CH + tid % CH) * 2 + tid / CH] = sum;
    }
}

// dbc_row,n = sum over channel blocks, in order. A thread adds 4 neighbouring columns of the padded row.
template <class X>
__global__ void scan_add_dbc_kernel(X* dbc, int64_t lddbc, const float* part, int64_t blocks, int64_t rows, int N, int Np) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, quads = Np / 2;
    if (i >= rows * quads) return;
    float sum[4] = {};
#pragma unroll 4
    for (int64_t block = 0; block < blocks; block++) {
        const auto v = load_vec<4>(part + (block * rows * quads + i) * 4);
#pragma unroll
        for (int k = 0; k < 4; k++) sum[k] += v[k];
    }
    const int column = (int)(i % quads) * 4, n = column / (2 * SCAN_GROUP) * SCAN_GROUP + column % SCAN_GROUP;
    X* to = dbc + i / quads * lddbc + (column / SCAN_GROUP % 2 ? N : 0);
#pragma unroll
    for (int k = 0; k < 4; k++)
        if (n + k < N) to[n + k] = from_float<X>(sum[k]);
}

// dA_log, dD, ddt_bias += sums over sequences and segments, in order. A thread is one state of one channel.
template <int THREADS>
__global__ void __launch_bounds__(THREADS) scan_add_parameters_kernel(float* dA_log, float* dD, float* ddt_bias, const float* dA, const float* dD_dbias, int64_t parts, int e, int N, int Np) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (int64_t)e * Np) return;
    const int n = (int)(i % Np);
    const int64_t channel = i / Np;
    float sum = 0.f, sum_D = 0.f, sum_bias = 0.f;
    if (n < N) {
        for (int64_t k = 0; k < parts; k++) sum += dA[(k * e + channel) * Np + n];
        dA_log[channel * N + n] += sum;
    }
    if (n != 0) return;
    for (int64_t k = 0; k < parts; k++) {
        sum_D += dD_dbias[(k * e + channel) * 2];
        sum_bias += dD_dbias[(k * e + channel) * 2 + 1];
    }
    dD[channel] += sum_D;
    ddt_bias[channel] += sum_bias;
}

template <class X, bool VEC, bool MANY>
void scan_backward(ScanGradients<X> out, ScanInput<X> p, const ScanWorkspace& w, int B, Stream stream) {
    constexpr int CH = scan_backward_channels<X>(MANY);
    const ScanSegments segments = scan_segments(B, p.T, p.e);
    p.segment_tiles = segments.tiles;
    if (segments.count > 1) {
        scan_chain_segments<X, VEC, true>(w.end, w.time, nullptr, out.dout, p, B, segments, stream);
        out.carry = w.end;
    }
    const int threads = CH * SCAN_LANES, groups = scan_padded(p.N) / SCAN_GROUP;
    const size_t shared = sizeof(ScanTile<X, CH>) + (MANY ? 2 * (size_t)groups * threads * sizeof(float4) : 0);
    auto kernel = selective_scan_backward_kernel<X, CH, VEC, MANY>;
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    kernel<<<dim3((unsigned)ceil_div(p.e, CH), (unsigned)B, (unsigned)segments.count), threads, shared, stream>>>(out, p);
    LAUNCH_CHECK();
}

inline void selective_scan_backward(floatX* du /*(B,T,e)*/, floatX* ddt_raw /*(B,T,e)*/, floatX* dz /*(B,T,e), row stride lddz*/, int64_t lddz, floatX* dbc /*as bc*/, int64_t lddbc,
                                    floatX* out /*recomputed forward output (B,T,e)*/, float* dA_log /*+=*/, float* dD /*+=*/, float* ddt_bias /*+=*/,
                                    const floatX* dout, const floatX* u, const floatX* dt_raw, const floatX* bc, int64_t ldbc, const floatX* z, int64_t ldz,
                                    const float* A_log, const float* D, const float* dt_bias, const float* /*h_in, which is the first saved state*/,
                                    const void* saved, void* workspace, int B, int64_t T, int e, int N, Stream stream) {
    const double elements = (double)B * T * e, states = (double)selective_scan_saved(B, T, e, N);
    const Operation op("scan backward", 8 * elements * sizeof(floatX) + states, 0, stream, elements * (N + 4));
    scan_check_states(N);
    const ScanInput<floatX> p{u, dt_raw, bc, z, ldbc, ldz, A_log, D, dt_bias, T, e, N, 0};
    const ScanWorkspace w = scan_workspace<floatX>(workspace, B, T, e, N);
    const ScanGradients<floatX> gradients{du, ddt_raw, dz, out, lddz, dout, (const floatX*)saved, nullptr, w.dbc, w.dA, w.dD_dbias};
    const bool many = N > SCAN_GROUP, vec = scan_vectors<floatX>({du, ddt_raw, dz, out, dout, u, dt_raw, bc, z}, {e, N, ldbc, ldz, lddz});
    auto launch = vec ? (many ? scan_backward<floatX, true, true> : scan_backward<floatX, true, false>)
                      : (many ? scan_backward<floatX, false, true> : scan_backward<floatX, false, false>);
    launch(gradients, p, w, B, stream);

    const int Np = scan_padded(N);
    const int64_t blocks = ceil_div(e, scan_backward_channels<floatX>(many)), rows = B * T;
    scan_add_dbc_kernel<<<(unsigned)ceil_div(rows * Np / 2, 256), 256, 0, stream>>>(dbc, lddbc, w.dbc, blocks, rows, N, Np);
    LAUNCH_CHECK();
    scan_add_parameters_kernel<256><<<(unsigned)ceil_div((int64_t)e * Np, 256), 256, 0, stream>>>(dA_log, dD, ddt_bias, w.dA, w.dD_dbias, B * scan_segments(B, T, e).count, e, N, Np);
    LAUNCH_CHECK();
}

} // namespace gpu
