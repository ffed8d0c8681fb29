// Depthwise causal convolution of width 4, then SiLU. CPU twin of kernels/conv1d.cuh. For every channel:
//   s_t = b + sum_k w_k x_(t-3+k)       u_t = silu(s_t) = s_t sigma(s_t)       x_(-3..-1): halo_in, or zero
//   ds_t = du_t sigma(s_t) (1 + s_t (1 - sigma(s_t)))
//   dx_t = sum_k w_k ds_(t+3-k), terms past T-1 left out        dw_k = sum_t ds_t x_(t-3+k)        db = sum_t ds_t
// The inner loops run over the channels of a row. The backward pass makes s again from x.
#pragma once
#include <type_traits>
#include <vector>
#include "../device.cuh"
#include "exp.h"

namespace cpu {

constexpr int CONV_WIDTH = 4, CONV_HALO = 3;

template <class R> std::vector<R> conv_transposed_weight(const R* w /*(e,4)*/, int e) {
    std::vector<R> out((size_t)CONV_WIDTH * e);
    for (int c = 0; c < e; c++)
        for (int k = 0; k < CONV_WIDTH; k++) out[(size_t)k * e + c] = w[c * CONV_WIDTH + k];
    return out;
}

// The rows of x, and in front of each sequence the halo: row t >= -3
template <class R> struct ConvInput {
    const R* x;
    int64_t ldx;
    const R* halo;
    int64_t T;
    int e;
    std::vector<R> zeros = std::vector<R>(e);
    const R* row(int64_t b, int64_t t) const {
        if (t >= 0) return x + (b * T + t) * ldx;
        return halo ? halo + (b * CONV_HALO + t + CONV_HALO) * e : zeros.data();
    }
};

template <class R>
void conv1d_forward(R* u /*(B,T,e)*/, std::type_identity_t<R>* halo_out /*(B,3,e) or null*/, const R* x /*(B,T,e), row stride ldx*/, int64_t ldx,
                    const std::type_identity_t<R>* halo_in /*or null*/, const R* w /*(e,4)*/, const R* b /*(e)*/, int B, int64_t T, int e,
                    Stream = {}) {
    const ConvInput<R> in{x, ldx, halo_in, T, e};
    const std::vector<R> wt = conv_transposed_weight(w, e);
    const R *w0 = wt.data(), *w1 = w0 + e, *w2 = w1 + e, *w3 = w2 + e;
#pragma omp parallel for
    for (int64_t i = 0; i < B * T; i++) {
        const int64_t s = i / T, t = i % T;
        const R *x0 = in.row(s, t - 3), *x1 = in.row(s, t - 2), *x2 = in.row(s, t - 1), *x3 = in.row(s, t);
        R* ui = u + i * e;
#pragma omp simd
        for (int c = 0; c < e; c++) {
            const R pre = b[c] + w0[c] * x0[c] + w1[c] * x1[c] + w2[c] * x2[c] + w3[c] * x3[c];
            ui[c] = pre * sigmoid(pre);
        }
    }
    if (halo_out)                                      // may be halo_in: rows move towards the front, oldest first
        for (int64_t s = 0; s < B; s++)
            for (int j = 0; j < CONV_HALO; j++) {
                const R* from = in.row(s, T - CONV_HALO + j);
                for (int c = 0; c < e; c++) halo_out[(s * CONV_HALO + j) * e + c] = from[c];
            }
}

inline size_t conv1d_backward_workspace(int B, int64_t T, int e) { return (size_t)B * T * e * sizeof(double); }

template <class R>
void conv1d_backward(R* dx /*(B,T,e), row stride lddx*/, int64_t lddx, R* dw /*(e,4) +=*/, R* db /*(e) +=*/, const R* du /*(B,T,e)*/,
                     const R* x /*(B,T,e), row stride ldx*/, int64_t ldx, const std::type_identity_t<R>* halo_in /*or null*/,
                     const R* w, const R* b, void* workspace, int B, int64_t T, int e, Stream = {}) {
    const ConvInput<R> in{x, ldx, halo_in, T, e};
    const std::vector<R> wt = conv_transposed_weight(w, e);
    const R *w0 = wt.data(), *w1 = w0 + e, *w2 = w1 + e, *w3 = w2 + e;
    R* ds = (R*)workspace;                             // (B,T,e)
#pragma omp parallel for
    for (int64_t i = 0; i < B * T; i++) {
        const int64_t s = i / T, t = i % T;
        const R *x0 = in.row(s, t - 3), *x1 = in.row(s, t - 2), *x2 = in.row(s, t - 1), *x3 = in.row(s, t), *dui = du + i * e;
        R* dsi = ds + i * e;
#pragma omp simd
        for (int c = 0; c < e; c++) {
            const R pre = b[c] + w0[c] * x0[c] + w1[c] * x1[c] + w2[c] * x2[c] + w3[c] * x3[c], gate = sigmoid(pre);
            dsi[c] = dui[c] * gate * (1 + pre * (1 - gate));
        }
    }
#pragma omp parallel for
    for (int64_t i = 0; i < B * T; i++) {
        const int64_t t = i % T;
        R* dxi = dx + i * lddx;
        for (int c = 0; c < e; c++) dxi[c] = w3[c] * ds[i * e + c];
        for (int k = CONV_WIDTH - 2; k >= 0 && t + 3 - k < T; k--) {
            const R *later = ds + (i + 3 - k) * e, *wk = wt.data() + (size_t)k * e;
#pragma omp simd
            for (int c = 0; c < e; c++) dxi[c] += wk[c] * later[c];
        }
    }
    // Column blocks, rows in order inside each: the sums do not depend on the number of threads.
    constexpr int COLUMNS = 32;
#pragma omp parallel for
    for (int first = 0; first < e; first += COLUMNS) {
        const int n = first + COLUMNS < e ? COLUMNS : e - first;
        R dws[CONV_WIDTH][COLUMNS] = {}, dbs[COLUMNS] = {};
        for (int64_t i = 0; i < B * T; i++) {
            const R* dsi = ds + i * e + first;
            for (int k = 0; k < CONV_WIDTH; k++) {
                const R* xk = in.row(i / T, i % T - 3 + k) + first;
#pragma omp simd
                for (int c = 0; c < n; c++) dws[k][c] += dsi[c] * xk[c];
            }
            for (int c = 0; c < n; c++) dbs[c] += dsi[c];
        }
        for (int c = 0; c < n; c++) {
            for (int k = 0; k < CONV_WIDTH; k++) dw[(int64_t)(first + c) * CONV_WIDTH + k] += dws[k][c];
            db[first + c] += dbs[c];
        }
    }
}

} // namespace cpu
