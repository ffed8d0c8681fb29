// RMSNorm, CPU twin of kernels/rmsnorm.cuh.
//   r_i = (mean_j x_ij^2 + eps)^(-1/2)        out_ij = x_ij r_i w_j
//   dx_ij = r_i (w_j g_ij - x_ij r_i^2 / d * sum_k w_k g_ik x_ik)        dw_j = sum_i g_ij x_ij r_i        (g = dout)
#pragma once
#include <cmath>
#include <type_traits>
#include "../device.cuh"
#include "../quantised.h"
#include "sum.h"

namespace cpu {

template <class R>
void rmsnorm_forward(R* out /*(N,d)*/, R* rstd /*(N)*/, const R* x /*(N,d)*/, const R* weight /*(d)*/, int64_t N, int d, float eps,
                     Stream = {}, Quantised = {}) {
#pragma omp parallel for
    for (int64_t i = 0; i < N; i++) {
        const R* xi = x + i * d;
        const R mean_square = sum_over<R>(d, [=](int64_t j) { return xi[j] * xi[j]; }) / d;
        const R r = 1 / std::sqrt(mean_square + (R)eps);
        rstd[i] = r;
#pragma omp simd
        for (int j = 0; j < d; j++) out[i * d + j] = xi[j] * r * weight[j];
    }
}

inline size_t rmsnorm_backward_workspace(int64_t /*N*/, int /*d*/) { return 0; }

template <class R>
void rmsnorm_backward(R* dx /*(N,d)*/, std::type_identity_t<R>* dx_copy /*(N,d) or nullptr*/, R* dweight /*(d) +=*/, const R* dout, const R* x,
                      const R* rstd, const R* weight, void* /*workspace*/, int64_t N, int d, bool accumulate /*dx += or dx =*/, Stream = {}) {
    // Column blocks, rows in order inside each: dweight does not depend on the number of threads.
    constexpr int COLUMNS = 64;
#pragma omp parallel for
    for (int first = 0; first < d; first += COLUMNS) {
        const int n = first + COLUMNS < d ? COLUMNS : d - first;
        R sum[COLUMNS] = {};
        for (int64_t i = 0; i < N; i++) {
            const R *g = dout + i * d + first, *xi = x + i * d + first;
            const R r = rstd[i];
#pragma omp simd
            for (int j = 0; j < n; j++) sum[j] += g[j] * xi[j] * r;
        }
        for (int j = 0; j < n; j++) dweight[first + j] += sum[j];
    }
#pragma omp parallel for
    for (int64_t i = 0; i < N; i++) {
        const R *g = dout + i * d, *xi = x + i * d;
        R* dxi = dx + i * d;
        const R r = rstd[i];
        const R pull = sum_over<R>(d, [=](int64_t j) { return weight[j] * g[j] * xi[j]; }) * r * r / d;
        if (accumulate) {
#pragma omp simd
            for (int j = 0; j < d; j++) dxi[j] += r * (weight[j] * g[j] - xi[j] * pull);
        } else {
#pragma omp simd
            for (int j = 0; j < d; j++) dxi[j] = r * (weight[j] * g[j] - xi[j] * pull);
        }
        if (dx_copy)
            for (int j = 0; j < d; j++) dx_copy[i * d + j] = dxi[j];
    }
}

} // namespace cpu
