// SwiGLU. A row of gate_up is gate a (F values), then up b (F values); s = sigma(a).
//   h = a s b          da = dh b s (1 + a (1 - s))          db = dh a s
// fp32 arithmetic on X values; saved for backward: gate_up. Bytes per row (bf16): forward 4F + 2F, backward 2F + 4F + 4F;
// at 32768 x 4096 805 MB = 0.27 ms and 1342 MB = 0.45 ms at 3 TB/s. Rows on grid.x, because grid.y ends at 65535.
#pragma once
#include "device.cuh"
#include "measure.cuh"
#include "rmsnorm.cuh"   // aligned_16

namespace gpu {

// exp(-a) = infinity for a < -88 gives s = 0 and a s = -0, as it should. Float: the exponential by ex2 as well, error about 1e-7 (1 + |a|);
// sigmoid<float> would be more exact, and change the bits of runs of the FP32 build.
template <class X> __device__ inline float swiglu_sigmoid(float a) {
    if constexpr (sizeof(X) == 2) return sigmoid<X>(a);
    else return 1.f / (1.f + __expf(-a));
}

template <int W, class X> __device__ inline Vec<X, W> swiglu(const Vec<X, W>& gate, const Vec<X, W>& up) {
    Vec<X, W> h;
#pragma unroll
    for (int k = 0; k < W; k++) {
        const float a = to_float(gate[k]);
        h[k] = from_float<X>(a * swiglu_sigmoid<X>(a) * to_float(up[k]));
    }
    return h;
}
template <int W, class X>
__device__ inline void swiglu_gradient(Vec<X, W>& dgate, Vec<X, W>& dup, const Vec<X, W>& dh, const Vec<X, W>& gate, const Vec<X, W>& up) {
#pragma unroll
    for (int k = 0; k < W; k++) {
        const float a = to_float(gate[k]), s = swiglu_sigmoid<X>(a), g = to_float(dh[k]);
        dgate[k] = from_float<X>(g * to_float(up[k]) * s * (1.f + a * (1.f - s)));
        dup[k] = from_float<X>(g * a * s);
    }
}

template <int W, class X> __global__ void swiglu_forward_kernel(X* h, const X* gate_up, int F) {
    const int64_t row = blockIdx.x;
    const int j = (blockIdx.y * blockDim.x + threadIdx.x) * W;
    if (j >= F) return;
    store_vec(h + row * F + j, swiglu(load_vec<W>(gate_up + row * 2 * F + j), load_vec<W>(gate_up + row * 2 * F + F + j)));
}

template <int W, class X> __global__ void swiglu_backward_kernel(X* dgate_up, const X* dh, const X* gate_up, int F) {
    const int64_t row = blockIdx.x;
    const int j = (blockIdx.y * blockDim.x + threadIdx.x) * W;
    if (j >= F) return;
    Vec<X, W> dgate, dup;
    swiglu_gradient(dgate, dup, load_vec<W>(dh + row * F + j), load_vec<W>(gate_up + row * 2 * F + j), load_vec<W>(gate_up + row * 2 * F + F + j));
    store_vec(dgate_up + row * 2 * F + j, dgate);
    store_vec(dgate_up + row * 2 * F + F + j, dup);
}

// The same with what is written quantised too (fp8.cuh). A block has a row in its registers, 8 values `ITEMS` times a thread; F <= 2048 ITEMS.
constexpr int SWIGLU_ROW_THREADS = 256, SWIGLU_ROW_ITEMS = 6;
template <int ITEMS, class X>
__global__ void __launch_bounds__(SWIGLU_ROW_THREADS) swiglu_forward_row_kernel(X* h, Quantised copy, const X* gate_up, int F) {
    if constexpr (sizeof(X) == 2) {
        const int64_t row = blockIdx.x;
        uint4 words[ITEMS];
        uint32_t halves = 0;
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            const int j = (i * SWIGLU_ROW_THREADS + threadIdx.x) * 8;
            if (j >= F) break;
            const auto out = swiglu(load_vec<8>(gate_up + row * 2 * F + j), load_vec<8>(gate_up + row * 2 * F + F + j));
            store_vec(h + row * F + j, out);
            words[i] = words_of(out);
            halves = larger_halves(halves, words[i]);
        }
        const uint32_t most = row_most<SWIGLU_ROW_THREADS / WARP>(halves);
        const float inverse = inverse_scale(most);
        if (threadIdx.x == 0) copy.scale[row] = scale_of(most);
#pragma unroll
        for (int i = 0; i < ITEMS; i++)
            if (const int j = (i * SWIGLU_ROW_THREADS + threadIdx.x) * 8; j < F) *(uint2*)(copy.q + row * F + j) = quantise_eight(words[i], inverse);
    }
}
template <int ITEMS, class X>
__global__ void __launch_bounds__(SWIGLU_ROW_THREADS) swiglu_backward_row_kernel(X* dgate_up, Quantised copy, const X* dh, const X* gate_up, int F) {
    if constexpr (sizeof(X) == 2) {
        const int64_t row = blockIdx.x;
        uint4 words[2][ITEMS];
        uint32_t halves = 0;
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            const int j = (i * SWIGLU_ROW_THREADS + threadIdx.x) * 8;
            if (j >= F) break;
            Vec<X, 8> dgate, dup;
            swiglu_gradient(dgate, dup, load_vec<8>(dh + row * F + j), load_vec<8>(gate_up + row * 2 * F + j),
                            load_vec<8>(gate_up + row * 2 * F + F + j));
            store_vec(dgate_up + row * 2 * F + j, dgate);
            store_vec(dgate_up + row * 2 * F + F + j, dup);
            words[0][i] = words_of(dgate), words[1][i] = words_of(dup);
            halves = larger_halves(larger_halves(halves, words[0][i]), words[1][i]);
        }
        const uint32_t most = row_most<SWIGLU_ROW_THREADS / WARP>(halves);
        const float inverse = inverse_scale(most);
        if (threadIdx.x == 0) copy.scale[row] = scale_of(most);
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            const int j = (i * SWIGLU_ROW_THREADS + threadIdx.x) * 8;
            if (j >= F) break;
            *(uint2*)(copy.q + row * 2 * F + j) = quantise_eight(words[0][i], inverse);
            *(uint2*)(copy.q + row * 2 * F + F + j) = quantise_eight(words[1][i], inverse);
        }
    }
}
inline bool swiglu_row_fits(int F) { return sizeof(floatX) == 2 && F % 16 == 0 && F <= 8 * SWIGLU_ROW_THREADS * SWIGLU_ROW_ITEMS; }

inline void swiglu_forward(floatX* h /*(M,F)*/, const floatX* gate_up /*(M,2F): gate | up*/, int64_t M, int F, Stream stream,
                           Quantised copy = {} /*of h, where wanted*/) {
    const Operation op("swiglu forward", (double)M * F * (3.0 * sizeof(floatX) + (copy.q ? 1 : 0)), 0, stream);
    constexpr int W = 16 / sizeof(floatX), THREADS = 256;
    if (copy.q && swiglu_row_fits(F) && aligned_16(h) && aligned_16(gate_up)) {
        const auto kernel = F <= 4096 ? swiglu_forward_row_kernel<2, floatX> : swiglu_forward_row_kernel<SWIGLU_ROW_ITEMS, floatX>;
        kernel<<<(unsigned)M, SWIGLU_ROW_THREADS, 0, stream>>>(h, copy, gate_up, F);
        return LAUNCH_CHECK();
    }
    if (F % W == 0 && aligned_16(h) && aligned_16(gate_up))
        swiglu_forward_kernel<W><<<dim3((unsigned)M, (unsigned)ceil_div(F, W * THREADS)), THREADS, 0, stream>>>(h, gate_up, F);
    else
        swiglu_forward_kernel<1><<<dim3((unsigned)M, (unsigned)ceil_div(F, THREADS)), THREADS, 0, stream>>>(h, gate_up, F);
    LAUNCH_CHECK();
    if (copy.q) quantise_rows(copy, h, M, F, stream);
}

inline void swiglu_backward(floatX* dgate_up /*(M,2F)*/, const floatX* dh /*(M,F)*/, const floatX* gate_up /*(M,2F)*/, int64_t M, int F,
                            Stream stream, Quantised copy = {} /*of dgate_up, where wanted*/) {
    const Operation op("swiglu backward", (double)M * F * (5.0 * sizeof(floatX) + (copy.q ? 2 : 0)), 0, stream);
    constexpr int W = 16 / sizeof(floatX), THREADS = 256;
    if (copy.q && swiglu_row_fits(F) && aligned_16(dgate_up) && aligned_16(dh) && aligned_16(gate_up)) {
        const auto kernel = F <= 4096 ? swiglu_backward_row_kernel<2, floatX> : swiglu_backward_row_kernel<SWIGLU_ROW_ITEMS, floatX>;
        kernel<<<(unsigned)M, SWIGLU_ROW_THREADS, 0, stream>>>(dgate_up, copy, dh, gate_up, F);
        return LAUNCH_CHECK();
    }
    if (F % W == 0 && aligned_16(dgate_up) && aligned_16(dh) && aligned_16(gate_up))
        swiglu_backward_kernel<W><<<dim3((unsigned)M, (unsigned)ceil_div(F, W * THREADS)), THREADS, 0, stream>>>(dgate_up, dh, gate_up, F);
    else
        swiglu_backward_kernel<1><<<dim3((unsigned)M, (unsigned)ceil_div(F, THREADS)), THREADS, 0, stream>>>(dgate_up, dh, gate_up, F);
    LAUNCH_CHECK();
    if (copy.q) quantise_rows(copy, dgate_up, M, 2 * (int64_t)F, stream);
}

} // namespace gpu
