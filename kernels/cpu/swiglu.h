// SwiGLU, CPU twin of kernels/swiglu.cuh. A row of gate_up is gate a (F values), then up b (F values); s = sigma(a).
//   h = a s b          da = dh b s (1 + a (1 - s))          db = dh a s
#pragma once
#include "../device.cuh"
#include "exp.h"

namespace cpu {

template <class R>
void swiglu_forward(R* h /*(M,F)*/, const R* gate_up /*(M,2F): gate | up*/, int64_t M, int F, Stream = {}) {
#pragma omp parallel for
    for (int64_t i = 0; i < M; i++) {
        const R *gate = gate_up + i * 2 * F, *up = gate + F;
        R* out = h + i * F;
#pragma omp simd
        for (int j = 0; j < F; j++) out[j] = gate[j] / (1 + fast_exp(-gate[j])) * up[j];
    }
}

template <class R>
void swiglu_backward(R* dgate_up /*(M,2F)*/, const R* dh /*(M,F)*/, const R* gate_up /*(M,2F)*/, int64_t M, int F, Stream = {}) {
#pragma omp parallel for
    for (int64_t i = 0; i < M; i++) {
        const R *gate = gate_up + i * 2 * F, *up = gate + F, *g = dh + i * F;
        R *dgate = dgate_up + i * 2 * F, *dup = dgate + F;
#pragma omp simd
        for (int j = 0; j < F; j++) {
            const R a = gate[j], b = up[j], s = 1 / (1 + fast_exp(-a));
            dgate[j] = g[j] * b * s * (1 + a * (1 - s));
            dup[j] = g[j] * a * s;
        }
    }
}

} // namespace cpu
