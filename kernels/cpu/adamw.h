// AdamW, CPU twin of kernels/adamw.cuh. g is the accumulated gradient times the clipping factor norm_result[1].
//   p -= lr wd p        m = b1 m + (1-b1) g        v = b2 v + (1-b2) g^2        p -= lr mhat / (sqrt(vhat) + eps)
//   mhat = m / (1 - b1^step), vhat = v / (1 - b2^step)        w = p rounded to the working precision
// norm_result[1] == 0 means that the gradient is not finite: nothing changes. w may be master itself (or nullptr).
#pragma once
#include <cmath>
#include "../adamw_options.h"
#include "../device.cuh"

namespace cpu {

template <class R>
void adamw_update(R* w /*(n)*/, R* master /*(n)*/, R* m /*(n)*/, R* v /*(n)*/, const R* grads /*(n)*/, const R* norm_result /*(2)*/, int64_t n,
                  const AdamW& options, Stream = {}) {
    const R scale = norm_result[1];
    if (scale == 0) return;
    const R lr = options.lr, beta1 = options.beta1, beta2 = options.beta2, eps = options.eps, shrink = (R)options.lr * (R)options.weight_decay;
    const R m_correction = (R)options.m_correction(), v_correction = (R)options.v_correction();
#pragma omp parallel for simd
    for (int64_t i = 0; i < n; i++) {
        const R g = grads[i] * scale;
        m[i] = beta1 * m[i] + (1 - beta1) * g;
        v[i] = beta2 * v[i] + (1 - beta2) * g * g;
        const R p = master[i] - shrink * master[i];
        master[i] = p - lr * (m[i] * m_correction) / (std::sqrt(v[i] * v_correction) + eps);
    }
    if (w && w != master)
#pragma omp parallel for
        for (int64_t i = 0; i < n; i++) w[i] = master[i];
}

} // namespace cpu
