// AdamW. g is the accumulated gradient times the clipping factor norm_result[1] of global_norm.cuh.
//   p -= lr wd p        m = b1 m + (1-b1) g        v = b2 v + (1-b2) g^2        p -= lr mhat / (sqrt(vhat) + eps)
//   mhat = m / (1 - b1^step), vhat = v / (1 - b2^step)        w = p rounded to the working precision
// norm_result[1] == 0 means that the gradient is not finite: nothing changes. Everything but w is fp32; the bias corrections are
// computed in double on the host. One pass, 30 bytes a parameter (bf16 w): 421M parameters 12.7 GB, 4.2 ms at 3 TB/s.
#pragma once
#include "adamw_options.h"
#include "device.cuh"
#include "measure.cuh"
#include "rmsnorm.cuh"   // aligned_16

namespace gpu {

struct AdamWFactors { float lr, shrink, beta1, beta2, eps, m_correction, v_correction; };

template <int N, class W>
__global__ void adamw_kernel(W* w, float* master, float* m, float* v, const float* grads, const float* norm_result, int64_t n, AdamWFactors f) {
    const float scale = norm_result[1];
    const int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * N;
    if (scale == 0.f || i >= n) return;
    const auto gs = load_vec<N>(grads + i);
    auto ps = load_vec<N>(master + i), ms = load_vec<N>(m + i), vs = load_vec<N>(v + i);
    Vec<W, N> ws;
#pragma unroll
    for (int k = 0; k < N; k++) {
        const float g = gs[k] * scale;
        ms[k] = f.beta1 * ms[k] + (1 - f.beta1) * g;
        vs[k] = f.beta2 * vs[k] + (1 - f.beta2) * g * g;
        ps[k] -= f.shrink * ps[k];
        ps[k] -= f.lr * (ms[k] * f.m_correction) / (sqrtf(vs[k] * f.v_correction) + f.eps);
        ws[k] = from_float<W>(ps[k]);
    }
    store_vec(master + i, ps);
    store_vec(m + i, ms);
    store_vec(v + i, vs);
    if (w) store_vec(w + i, ws);
}

// w may be master itself (fp32) or nullptr. Lengths that are no multiple of 4: the last elements by a second launch.
template <class W>
inline void adamw_update(W* w /*(n)*/, float* master /*(n)*/, float* m /*(n)*/, float* v /*(n)*/, const float* grads /*(n)*/,
                         const float* norm_result /*(2) device*/, int64_t n, const AdamW& options, Stream stream) {
    const Operation op("adamw", n * (28.0 + (w ? sizeof(W) : 0)), 0, stream);
    const AdamWFactors f = {options.lr, options.lr * options.weight_decay, options.beta1, options.beta2, options.eps,
                            (float)options.m_correction(), (float)options.v_correction()};
    constexpr int N = 4, THREADS = 256;
    const bool vector = aligned_16(w) && aligned_16(master) && aligned_16(m) && aligned_16(v) && aligned_16(grads);
    const int64_t whole = vector ? n / N * N : 0, rest = n - whole;
    if (whole) adamw_kernel<N><<<(unsigned)ceil_div(whole / N, THREADS), THREADS, 0, stream>>>(w, master, m, v, grads, norm_result, whole, f);
    LAUNCH_CHECK();
    if (rest)
        adamw_kernel<1><<<(unsigned)ceil_div(rest, THREADS), THREADS, 0, stream>>>(w ? w + whole : w, master + whole, m + whole, v + whole,
                                                                                   grads + whole, norm_result, rest, f);
    LAUNCH_CHECK();
}

} // namespace gpu
