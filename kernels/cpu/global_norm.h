// L2 norm of all gradients and the clipping factor it gives, CPU twin of kernels/global_norm.cuh.
//   result[0] = norm        result[1] = min(1, max_norm / (norm + 1e-6)); 1 if max_norm <= 0; 0 if the norm is not finite
#pragma once
#include <algorithm>
#include <cmath>
#include "../device.cuh"
#include "sum.h"

namespace cpu {

constexpr int64_t NORM_CHUNK = 1 << 16;   // fixed: the order of additions must not depend on the number of threads

inline size_t global_norm_workspace(int64_t n) { return (size_t)ceil_div(n, NORM_CHUNK) * sizeof(double); }

template <class R>
void global_norm(R* result /*(2)*/, const R* grads /*(n)*/, int64_t n, float max_norm, void* workspace, Stream = {}) {
    double* partial = (double*)workspace;
    const int64_t chunks = ceil_div(n, NORM_CHUNK);
#pragma omp parallel for
    for (int64_t c = 0; c < chunks; c++) {
        const R* g = grads + c * NORM_CHUNK;
        const int64_t length = c + 1 < chunks ? NORM_CHUNK : n - c * NORM_CHUNK;
        partial[c] = sum_over<double>(length, [=](int64_t i) { return (double)g[i] * (double)g[i]; });
    }
    double sum = 0;
    for (int64_t c = 0; c < chunks; c++) sum += partial[c];
    const R norm = (R)std::sqrt(sum);
    result[0] = norm;
    if (!std::isfinite(norm)) result[1] = 0;
    else if (max_norm <= 0) result[1] = 1;
    else result[1] = std::min((R)1, (R)max_norm / (norm + (R)1e-6));
}

} // namespace cpu
