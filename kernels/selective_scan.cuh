// Selective scan, GPU: which kernels, their workspace, and the two passes. The mathematics is in scan/common.cuh.
#pragma once
#include "measure.cuh"
#include "scan/any.cuh"
#include "scan/mma_forward_whole.cuh"
#include "scan/mma_backward.cuh"
#include "scan/mma_forward.cuh"

namespace gpu {

// ---------------------------------------------------------------------------------------------------------------------
// Host

// Which kernels: scan/mma_*.cuh's for bf16 and 16 states where a block has the shared memory that they need (Hopper), scan/any.cuh's otherwise.
// It depends on nothing that may change between the passes, as what is saved differs.
inline bool scan_mma_fits() {
    static const bool fits = [] {
        int device = 0, bytes = 0;
        CUDA_CHECK(cudaGetDevice(&device));
        CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
        return (size_t)bytes >= sizeof(scan_mma::Shared<scan_mma::BackwardStage>);
    }();
    return fits;
}
template <class X> bool scan_uses_mma(int N) { return sizeof(X) == 2 && N == 16 && scan_mma_fits(); }
template <class X> ScanSegments scan_segments(int B, int64_t T, int e, int N) {
    return scan_uses_mma<X>(N) ? scan_segments(B, T, e, scan_mma::CH, 1) : scan_segments(B, T, e, SCAN_CHANNELS, 4);
}

// The forward pass in bf16: blocks of 192 channels, or narrow ones, which need fewer segments or none and leave less of the GPU idle in the last
// wave of blocks. Two numbers decide, both from bench_scan on an H200, to be measured again when one of the kernels changes:
//   1.17        a narrow block's time for a channel and step, in those of a wide one: 0.818 ms at B 1, T 32768 against 0.703 at B 8, T 4096
//               (d_inner 3072): one wave of blocks each, and as many channels times steps in a block
//   120 steps   what starting and ending a narrow block takes, from B 64, T 512
struct ScanForwardPlan {
    bool narrow;
    ScanSegments segments;
};
template <class X> ScanForwardPlan scan_forward_plan(int B, int64_t T, int e, int N) {
    const ScanSegments wide = scan_segments<X>(B, T, e, N);
    if (!scan_uses_mma<X>(N)) return {false, wide};
    const auto waves = [&](int channels) { return (double)ceil_div(B * ceil_div(e, channels), multiprocessors()) * channels; };
    if (wide.count == 1 && waves(scan_mma::CH) * T <= 1.17 * waves(scan_narrow::CHANNELS) * (T + 120)) return {false, wide};
    return {true, scan_segments(B, T, e, scan_narrow::CHANNELS, 1)};  // no more segments than the wide ones, whose workspace they use
}

// Where things are in the workspace. All fp32.
struct ScanWorkspace {
    float *end, *time;              // (B,S,e,Np), (B,S,e)
    float *dbc;                     // (channel blocks, B*T, 2 Np): B | C of the first group, B | C of the second, ...
    float *dA, *dD_dbias;           // (B,S,e,Np), (B,S,e,2)
    size_t bytes;
};
template <class X> int64_t scan_saved_steps(int N) { return scan_uses_mma<X>(N) ? scan_mma::TILE : SCAN_TILE; }
// Channels a block of the backward pass, and so of a partial sum of dB and dC
template <class X> int scan_backward_channels(int N) {
    return scan_uses_mma<X>(N) ? scan_mma::CH : sizeof(X) == 2 && N <= SCAN_GROUP ? 64 : SCAN_CHANNELS;
}
template <class X> ScanWorkspace scan_workspace(void* start, int B, int64_t T, int e, int N) {
    const int64_t S = scan_segments<X>(B, T, e, N).count, Np = scan_padded(N), blocks = ceil_div(e, scan_backward_channels<X>(N));
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
inline size_t selective_scan_saved(int B, int64_t T, int e, int N) {
    return (size_t)B * ceil_div(T, scan_saved_steps<floatX>(N)) * e * scan_padded(N) * sizeof(floatX);
}
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

template <class Kernel>
void scan_launch_mma(Kernel kernel, size_t shared, int threads, int channels, int64_t count, int B, int e, Stream stream, auto... arguments) {
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    kernel<<<dim3((unsigned)ceil_div(e, channels), (unsigned)B, (unsigned)count), threads, shared, stream>>>(arguments...);
    LAUNCH_CHECK();
}

// Segments are counted in tiles of SCAN_TILE steps.
template <class X, bool VEC, bool MANY>
void scan_forward(X* out, X* saved, float* h_out, const float* h_in, ScanInput<X> p, const ScanWorkspace& w, int B, Stream stream) {
    const auto [narrow, segments] = scan_forward_plan<X>(B, p.T, p.e, p.N);
    p.segment_tiles = segments.tiles;
    if (segments.count > 1) scan_chain_segments<X, VEC, false>(w.end, w.time, h_in, nullptr, p, B, segments, stream);
    const bool split = segments.count > 1;
    const int Np = scan_padded(p.N), h_stride = split ? Np : p.N;
    const float* h_first = split ? w.end : h_in;
    if constexpr (sizeof(X) == 2 && !MANY)
        if (scan_uses_mma<X>(p.N)) {
            if (narrow) {
                static_assert(scan_narrow::STEPS == SCAN_TILE);
                scan_launch_mma(scan_narrow::forward_kernel<VEC>, sizeof(scan_narrow::Block), scan_narrow::THREADS, scan_narrow::CHANNELS,
                                segments.count, B, p.e, stream, out, saved, h_out, h_first, h_stride, p);
            } else {
                using namespace scan_mma;
                p.segment_tiles *= SCAN_TILE / TILE;
                using Block = ForwardBlock<Wide>;
                scan_launch_mma(forward_kernel<VEC>, sizeof(Block), Block::THREADS, CH, 1, B, p.e, stream, out, saved, h_out, h_in, p.N, p);
            }
            return;
        }
    const int threads = SCAN_CHANNELS * SCAN_LANES;
    const size_t shared = MANY ? (size_t)Np / SCAN_GROUP * threads * sizeof(float4) : 0;
    auto kernel = selective_scan_forward_kernel<X, VEC, MANY>;
    if (shared > 16 * 1024) CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    const dim3 grid((unsigned)ceil_div(p.e, SCAN_CHANNELS), (unsigned)B, (unsigned)segments.count);
    kernel<<<grid, threads, shared, stream>>>(out, saved, h_out, h_first, h_stride, p);
    LAUNCH_CHECK();
}

inline void selective_scan_forward(floatX* out /*(B,T,e)*/, void* saved /*or null: inference*/, float* h_out /*(B,e,N) or null; may be h_in*/,
                                   const floatX* u /*(B,T,e)*/, const floatX* dt_raw /*(B,T,e)*/,
                                   const floatX* bc /*B at +0, C at +N of each row, row stride ldbc*/, int64_t ldbc,
                                   const floatX* z /*(B,T,e), row stride ldz*/, int64_t ldz, const float* A_log /*(e,N)*/, const float* D,
                                   const float* dt_bias, const float* h_in /*(B,e,N) or null*/, void* workspace, int B, int64_t T, int e, int N,
                                   Stream stream, const uint8_t* starts = nullptr /*(B,T), 1 where a document starts; or null*/) {
    const double elements = (double)B * T * e, states = saved ? (double)selective_scan_saved(B, T, e, N) : 0;
    const Operation op("scan forward", 4 * elements * sizeof(floatX) + states, 0, stream, elements * (N + 3));
    scan_check_states(N);
    const ScanInput<floatX> p{u, dt_raw, bc, z, ldbc, ldz, A_log, D, dt_bias, T, e, N, 0, starts};
    const ScanWorkspace w = scan_workspace<floatX>(workspace, B, T, e, N);
    const bool vec = scan_vectors<floatX>({out, u, dt_raw, bc, z}, {e, N, ldbc, ldz}), many = N > SCAN_GROUP;
    auto launch = vec ? (many ? scan_forward<floatX, true, true> : scan_forward<floatX, true, false>)
                      : (many ? scan_forward<floatX, false, true> : scan_forward<floatX, false, false>);
    launch(out, (floatX*)saved, h_out, h_in, p, w, B, stream);
}

template <class X, bool VEC, bool MANY>
void scan_backward(ScanGradients<X> out, ScanInput<X> p, const ScanWorkspace& w, int B, Stream stream) {
    constexpr int CH = sizeof(X) == 2 && !MANY ? 64 : SCAN_CHANNELS;
    const ScanSegments segments = scan_segments<X>(B, p.T, p.e, p.N);
    p.segment_tiles = segments.tiles;
    if (segments.count > 1) {
        scan_chain_segments<X, VEC, true>(w.end, w.time, out.carry, out.dout, p, B, segments, stream);
        out.carry = w.end, out.carry_stride = scan_padded(p.N);
    }
    if constexpr (sizeof(X) == 2 && !MANY)
        if (scan_uses_mma<X>(p.N)) {
            p.segment_tiles *= SCAN_TILE / scan_mma::TILE;
            scan_launch_mma(scan_mma::backward_kernel<VEC>, sizeof(scan_mma::Shared<scan_mma::BackwardStage>), scan_mma::THREADS, scan_mma::CH,
                            segments.count, B, p.e, stream, out, p);
            return;
        }
    const int threads = CH * SCAN_LANES, groups = scan_padded(p.N) / SCAN_GROUP;
    const size_t shared = sizeof(ScanTile<X, CH>) + (MANY ? 2 * (size_t)groups * threads * sizeof(float4) : 0);
    auto kernel = selective_scan_backward_kernel<X, CH, VEC, MANY>;
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    kernel<<<dim3((unsigned)ceil_div(p.e, CH), (unsigned)B, (unsigned)segments.count), threads, shared, stream>>>(out, p);
    LAUNCH_CHECK();
}

inline void selective_scan_backward(floatX* du /*(B,T,e)*/, floatX* ddt_raw /*(B,T,e)*/, floatX* dz /*(B,T,e), row stride lddz*/, int64_t lddz,
                                    floatX* dbc /*as bc*/, int64_t lddbc, floatX* out /*recomputed forward output (B,T,e)*/,
                                    float* dA_log /*+=*/, float* dD /*+=*/, float* ddt_bias /*+=*/,
                                    const floatX* dout, const floatX* u, const floatX* dt_raw, const floatX* bc, int64_t ldbc, const floatX* z,
                                    int64_t ldz, const float* A_log, const float* D, const float* dt_bias,
                                    const float* /*h_in, which is the first saved state*/,
                                    const void* saved, void* workspace, int B, int64_t T, int e, int N, Stream stream,
                                    const uint8_t* starts = nullptr /*as forward*/, float* dh_in = nullptr /*(B,e,N) or null*/,
                                    const float* dh_out = nullptr /*(B,e,N) or null*/) {
    const double elements = (double)B * T * e, states = (double)selective_scan_saved(B, T, e, N);
    const Operation op("scan backward", 8 * elements * sizeof(floatX) + states, 0, stream, elements * (N + 4));
    scan_check_states(N);
    const ScanInput<floatX> p{u, dt_raw, bc, z, ldbc, ldz, A_log, D, dt_bias, T, e, N, 0, starts};
    const ScanWorkspace w = scan_workspace<floatX>(workspace, B, T, e, N);
    const ScanGradients<floatX> gradients{du, ddt_raw, dz, out, lddz, dout, (const floatX*)saved, dh_out, N, w.dbc, w.dA, w.dD_dbias, dh_in};
    const bool many = N > SCAN_GROUP, vec = scan_vectors<floatX>({du, ddt_raw, dz, out, dout, u, dt_raw, bc, z}, {e, N, ldbc, ldz, lddz});
    auto launch = vec ? (many ? scan_backward<floatX, true, true> : scan_backward<floatX, true, false>)
                      : (many ? scan_backward<floatX, false, true> : scan_backward<floatX, false, false>);
    launch(gradients, p, w, B, stream);

    const int Np = scan_padded(N);
    const int64_t blocks = ceil_div(e, scan_backward_channels<floatX>(N)), rows = B * T;
    const int64_t dbc_blocks = ceil_div(rows * Np / 2, SCAN_ADD_THREADS), parameter_blocks = ceil_div((int64_t)e * Np, SCAN_ADD_THREADS);
    const ScanSums sums{w.dbc, w.dA, w.dD_dbias, blocks, rows, B * scan_segments<floatX>(B, T, e, N).count, dbc_blocks, e, N, Np};
    scan_add_kernel<<<(unsigned)(dbc_blocks + parameter_blocks), SCAN_ADD_THREADS, 0, stream>>>(dbc, lddbc, dA_log, dD, ddt_bias, sums);
    LAUNCH_CHECK();
}

} // namespace gpu
