// RMSNorm, CPU twin of kernels/rmsnorm.cuh.
//   r_i = (mean_j x_ij^2 + eps)^(-1/2)        xh_ij = x_ij r_i        out_ij = xh_ij w_j
//   dx_ij = r_i (w_j g_ij - xh_ij / d * sum_k g_ik out_ik)        dw_j = sum_i g_ij xh_ij        (g = dout)
// Backward takes xh from out, which the layer has kept for its weights' gradient: xh_ij = out_ij / w_j. Only where w_j is as good as zero
// out says nothing of it, and x is read.
#pragma once
#include <cmath>
#include "../device.cuh"
#include "../quantised.h"
#include "../residual_gradient.h"
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

constexpr double RMSNORM_LEAST_WEIGHT = 1e-30;   // of less, out / w is not the normalised x to any precision

template <class R>
void rmsnorm_backward(ResidualGradient<R> dx /*(N,d)*/, ResidualGradient<R> dx_before /*(N,d) or {}: dx = dx_before + ...; may be dx*/,
                      R* dweight /*(d) +=*/, const R* dout, const R* out, const R* x, const R* rstd, const R* weight, void* /*workspace*/,
                      int64_t N, int d, Stream = {}) {
    const auto normalised = [=](int64_t i, int j) {
        return std::abs(weight[j]) > (R)RMSNORM_LEAST_WEIGHT ? out[i * d + j] / weight[j] : x[i * d + j] * rstd[i];
    };
    // Column blocks, rows in order inside each: dweight does not depend on the number of threads.
    constexpr int COLUMNS = 64;
#pragma omp parallel for
    for (int first = 0; first < d; first += COLUMNS) {
        const int n = first + COLUMNS < d ? COLUMNS : d - first;
        R sum[COLUMNS] = {};
        for (int64_t i = 0; i < N; i++)
            for (int j = 0; j < n; j++) sum[j] += dout[i * d + first + j] * normalised(i, first + j);
        for (int j = 0; j < n; j++) dweight[first + j] += sum[j];
    }
#pragma omp parallel for
    for (int64_t i = 0; i < N; i++) {
        const R *g = dout + i * d, *n = out + i * d;
        const R pull = sum_over<R>(d, [=](int64_t j) { return g[j] * n[j]; }) / d;
        for (int j = 0; j < d; j++)
            dx.high[i * d + j] = (dx_before ? dx_before.high[i * d + j] : (R)0) + rstd[i] * (weight[j] * g[j] - normalised(i, j) * pull);
    }
}

} // namespace cpu
