// float to bf16 (to nearest, ties to even; NaN stays NaN) and back, for gradients that travel between GPUs as bf16.
// 4 + 2 bytes an element: a bucket of 64 MB of floats moves 96 MB, 0.03 ms at 3 TB/s. Runs on the stream of the collectives.
#pragma once
#include "device.cuh"
#include "rmsnorm.cuh"   // aligned_16

namespace gpu {

template <int W, class Out, class In> __global__ void convert_kernel(Out* out, const In* in, int64_t n) {
    const int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * W;
    if (i + W <= n) {
        const auto x = load_vec<W>(in + i);
        Vec<Out, W> y;
#pragma unroll
        for (int k = 0; k < W; k++) y[k] = from_float<Out>(to_float(x[k]));
        store_vec(out + i, y);
        return;
    }
    for (int64_t k = i; k < n; k++) out[k] = from_float<Out>(to_float(in[k]));
}

template <class Out, class In> void convert(Out* out, const In* in, int64_t n, Stream stream) {
    constexpr int W = 4, THREADS = 256;
    if (n < 1) return;
    if (aligned_16(out) && aligned_16(in)) convert_kernel<W><<<(unsigned)ceil_div(n, W * THREADS), THREADS, 0, stream>>>(out, in, n);
    else convert_kernel<1><<<(unsigned)ceil_div(n, THREADS), THREADS, 0, stream>>>(out, in, n);
    LAUNCH_CHECK();
}

inline void narrow(uint16_t* out, const float* in, int64_t n, Stream stream) { convert((__nv_bfloat16*)out, in, n, stream); }
inline void widen(float* out, const uint16_t* in, int64_t n, Stream stream) { convert(out, (const __nv_bfloat16*)in, n, stream); }

} // namespace gpu
