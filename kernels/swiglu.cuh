// SwiGLU. A row of gate_up is gate a (F values), then up b (F values); s = sigma(a).
//   h = a s b          da = dh b s (1 + a (1 - s))          db = dh a s
// fp32 arithmetic on X values; saved for backward: gate_up. Bytes per row (bf16): forward 4F + 2F, backward 2F + 4F + 4F;
// at 32768 x 4096 805 MB = 0.27 ms and 1342 MB = 0.45 ms at 3 TB/s. Rows on grid.x, because grid.y ends at 65535.
#pragma once
#include "device.cuh"
#include "measure.cuh"
#include "rmsnorm.cuh"   // aligned_16

namespace gpu {

// exp(-a) = infinity for a < -88 gives s = 0 and a s = -0, as it should. For bf16 values by two special-function instructions, error about 2e-7;
// matmul_swiglu_sm90.cuh uses the same, so that h has the same bits wherever it is made.
template <class X> __device__ inline float sigmoid(float a) {
    if constexpr (sizeof(X) == 2) {
        float e, s;
        asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(a * -1.4426950408889634f));
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(1.f + e));
        return s;
    }
    return 1.f / (1.f + __expf(-a));
}

template <int W, class X> __global__ void swiglu_forward_kernel(X* h, const X* gate_up, int F) {
    const int64_t row = blockIdx.x;
    const int j = (blockIdx.y * blockDim.x + threadIdx.x) * W;
    if (j >= F) return;
    const auto gate = load_vec<W>(gate_up + row * 2 * F + j), up = load_vec<W>(gate_up + row * 2 * F + F + j);
    Vec<X, W> out;
#pragma unroll
    for (int k = 0; k < W; k++) {
        const float a = to_float(gate[k]);
        out[k] = from_float<X>(a * sigmoid<X>(a) * to_float(up[k]));
    }
    store_vec(h + row * F + j, out);
}

template <int W, class X> __global__ void swiglu_backward_kernel(X* dgate_up, const X* dh, const X* gate_up, int F) {
    const int64_t row = blockIdx.x;
    const int j = (blockIdx.y * blockDim.x + threadIdx.x) * W;
    if (j >= F) return;
    const auto gate = load_vec<W>(gate_up + row * 2 * F + j), up = load_vec<W>(gate_up + row * 2 * F + F + j), g = load_vec<W>(dh + row * F + j);
    Vec<X, W> dgate, dup;
#pragma unroll
    for (int k = 0; k < W; k++) {
        const float a = to_float(gate[k]), s = sigmoid<X>(a), dhk = to_float(g[k]);
        dgate[k] = from_float<X>(dhk * to_float(up[k]) * s * (1.f + a * (1.f - s)));
        dup[k] = from_float<X>(dhk * a * s);
    }
    store_vec(dgate_up + row * 2 * F + j, dgate);
    store_vec(dgate_up + row * 2 * F + F + j, dup);
}

inline void swiglu_forward(floatX* h /*(M,F)*/, const floatX* gate_up /*(M,2F): gate | up*/, int64_t M, int F, Stream stream) {
    const Operation op("swiglu forward", 3.0 * M * F * sizeof(floatX), 0, stream);
    constexpr int W = 16 / sizeof(floatX), THREADS = 256;
    if (F % W == 0 && aligned_16(h) && aligned_16(gate_up))
        swiglu_forward_kernel<W><<<dim3((unsigned)M, (unsigned)ceil_div(F, W * THREADS)), THREADS, 0, stream>>>(h, gate_up, F);
    else
        swiglu_forward_kernel<1><<<dim3((unsigned)M, (unsigned)ceil_div(F, THREADS)), THREADS, 0, stream>>>(h, gate_up, F);
    LAUNCH_CHECK();
}

inline void swiglu_backward(floatX* dgate_up /*(M,2F)*/, const floatX* dh /*(M,F)*/, const floatX* gate_up /*(M,2F)*/, int64_t M, int F, Stream stream) {
    const Operation op("swiglu backward", 5.0 * M * F * sizeof(floatX), 0, stream);
    constexpr int W = 16 / sizeof(floatX), THREADS = 256;
    if (F % W == 0 && aligned_16(dgate_up) && aligned_16(dh) && aligned_16(gate_up))
        swiglu_backward_kernel<W><<<dim3((unsigned)M, (unsigned)ceil_div(F, W * THREADS)), THREADS, 0, stream>>>(dgate_up, dh, gate_up, F);
    else
        swiglu_backward_kernel<1><<<dim3((unsigned)M, (unsigned)ceil_div(F, THREADS)), THREADS, 0, stream>>>(dgate_up, dh, gate_up, F);
    LAUNCH_CHECK();
}

} // namespace gpu
