// Matrix products of the linear layers, CPU twin of kernels/matmul.cuh. All matrices row-major, W as stored: (N,K).
//   forward   y  = x w^T              residual  y = residual + x w^T
//   dgrad     dx (+)= dy w            wgrad     dw (+)= dy^T x
// float goes through OpenBLAS where it is compiled in; double, and builds without OpenBLAS, through the plain loops, which
// define the operation. Strides ld* are in elements between rows.
#pragma once
#include <algorithm>
#include <climits>
#include <type_traits>
#ifdef SAMBA_OPENBLAS
#include <cblas.h>
#include <omp.h>
#endif
#include "../device.cuh"
#include "../matmul/choice.h"
#include "sum.h"

namespace cpu {

struct Matmul {   // the GPU twin keeps a handle, a workspace and plans here
    static constexpr size_t WORKSPACE_BYTES = 0;
    bool rehearsal = false;
    MatmulChoices choices;
    static int64_t library() { return 0; }
    void forget_plans() {}
};

#ifdef SAMBA_OPENBLAS
// C (m,n) = op(A) op(B) + beta C. Our threads take blocks of C's rows and OpenBLAS one thread in each: its own threads would
// fight with OpenMP's, which still spin when a product begins (measured on 2 cores: a step of the tiny model 912 ms so, 134 ms else).
inline void sgemm(CBLAS_TRANSPOSE ta, CBLAS_TRANSPOSE tb, int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
                  float beta, float* c, int64_t ldc) {
    if (m > INT_MAX || n > INT_MAX || k > INT_MAX || lda > INT_MAX || ldb > INT_MAX || ldc > INT_MAX)
        fail("matmul of %lld x %lld x %lld does not fit OpenBLAS' 32-bit sizes; use a smaller --micro-batch or --seq-len", (long long)m,
             (long long)n, (long long)k);
    static const bool one_thread = (openblas_set_num_threads(1), true);
    (void)one_thread;
    const int64_t rows = round_up(ceil_div(m, omp_get_max_threads()), 16);
#pragma omp parallel for
    for (int64_t i = 0; i < m; i += rows)
        cblas_sgemm(CblasRowMajor, ta, tb, (int)std::min(rows, m - i), (int)n, (int)k, 1.f, ta == CblasTrans ? a + i : a + i * lda, (int)lda,
                    b, (int)ldb, beta, c + i * ldc, (int)ldc);
}
#endif

template <class R>
void matmul_forward(Matmul&, R* y /*(M,N) row stride ldy*/, int64_t ldy, const R* x /*(M,K) row stride ldx*/, int64_t ldx,
                    std::type_identity_t<const R*> w /*(N,K)*/, int64_t M, int N, int K, Stream = {}) {
#ifdef SAMBA_OPENBLAS
    if constexpr (std::is_same_v<R, float>) return sgemm(CblasNoTrans, CblasTrans, M, N, K, x, ldx, w, K, 0.f, y, ldy);
#endif
#pragma omp parallel for collapse(2)
    for (int64_t i = 0; i < M; i++)
        for (int j = 0; j < N; j++) {
            const R *xi = x + i * ldx, *wj = w + (int64_t)j * K;
            y[i * ldy + j] = sum_over<R>(K, [=](int64_t k) { return xi[k] * wj[k]; });
        }
}

template <class R>
void matmul_residual(Matmul&, R* y /*(M,N)*/, const R* residual /*(M,N), may equal y*/, const R* x /*(M,K)*/,
                     std::type_identity_t<const R*> w /*(N,K)*/, int64_t M, int N, int K, Stream = {}) {
#ifdef SAMBA_OPENBLAS
    if constexpr (std::is_same_v<R, float>) {
        if (y != residual) memcpy(y, residual, sizeof(R) * M * N);
        return sgemm(CblasNoTrans, CblasTrans, M, N, K, x, K, w, K, 1.f, y, N);
    }
#endif
#pragma omp parallel for collapse(2)
    for (int64_t i = 0; i < M; i++)
        for (int j = 0; j < N; j++) {
            const R *xi = x + i * K, *wj = w + (int64_t)j * K;
            y[i * N + j] = residual[i * N + j] + sum_over<R>(K, [=](int64_t k) { return xi[k] * wj[k]; });
        }
}

template <class R>
void matmul_dgrad(Matmul&, R* dx /*(M,K) row stride lddx*/, int64_t lddx, const R* dy /*(M,N) row stride lddy*/, int64_t lddy,
                  std::type_identity_t<const R*> w /*(N,K)*/, int64_t M, int N, int K, bool accumulate, Stream = {}) {
#ifdef SAMBA_OPENBLAS
    if constexpr (std::is_same_v<R, float>) return sgemm(CblasNoTrans, CblasNoTrans, M, K, N, dy, lddy, w, K, accumulate ? 1.f : 0.f, dx, lddx);
#endif
#pragma omp parallel for
    for (int64_t i = 0; i < M; i++) {
        R* dxi = dx + i * lddx;
        if (!accumulate)
            for (int k = 0; k < K; k++) dxi[k] = 0;
        for (int j = 0; j < N; j++) {
            const R g = dy[i * lddy + j], *wj = w + (int64_t)j * K;
#pragma omp simd
            for (int k = 0; k < K; k++) dxi[k] += g * wj[k];
        }
    }
}

template <class R>
void matmul_wgrad(Matmul&, R* dw /*(N,K)*/, const R* dy /*(M,N) row stride lddy*/, int64_t lddy, const R* x /*(M,K) row stride ldx*/, int64_t ldx,
                  int64_t M, int N, int K, bool accumulate /*dw += or dw =*/, Stream = {}) {
#ifdef SAMBA_OPENBLAS
    if constexpr (std::is_same_v<R, float>) return sgemm(CblasTrans, CblasNoTrans, N, K, M, dy, lddy, x, ldx, accumulate ? 1.f : 0.f, dw, K);
#endif
#pragma omp parallel for
    for (int j = 0; j < N; j++) {
        R* dwj = dw + (int64_t)j * K;
        if (!accumulate)
            for (int k = 0; k < K; k++) dwj[k] = 0;
        for (int64_t i = 0; i < M; i++) {
            const R g = dy[i * lddy + j], *xi = x + i * ldx;
#pragma omp simd
            for (int k = 0; k < K; k++) dwj[k] += g * xi[k];
        }
    }
}

} // namespace cpu
