// Selective scan, CPU twin of kernels/selective_scan.cuh. For every channel c (index left out) and state n:
//   dt_t = softplus(dt_raw_t + dt_bias)                 A_n = -exp(A_log_n)          a_tn = exp(dt_t A_n)
//   h_tn = a_tn h_(t-1)n + dt_t B_tn u_t                y_t  = sum_n C_tn h_tn + D u_t
//   out_t = y_t silu(z_t)
// Backward, g = dout, time running backwards, lambda the gradient of h:
//   dy_t = g_t silu(z_t)                                dz_t = g_t y_t sigma(z_t) (1 + z_t (1 - sigma(z_t)))
//   lambda_tn = C_tn dy_t + a_(t+1)n lambda_(t+1)n
//   dB_tn = sum_c lambda_tn dt_t u_t                    dC_tn = sum_c dy_t h_tn
//   du_t = D dy_t + dt_t sum_n lambda_tn B_tn           dD = sum_t dy_t u_t
//   ddt_t = sum_n lambda_tn (A_n a_tn h_(t-1)n + B_tn u_t)      ddt_raw_t = ddt_t sigma(dt_raw_t + dt_bias)
//   dA_log_n = A_n sum_t lambda_tn dt_t a_tn h_(t-1)n           ddt_bias = sum_t ddt_raw_t
//   dh_in_n = a_1n lambda_1n, and a gradient dh_out of the state after the last step adds to lambda_T
// Where a document starts (starts_t = 1) the state before it is dropped: a_t = 0.
// A task is 16 neighbouring channels of one sequence: the inner loops run over the channels. Saved: h before every 32nd step.
#pragma once
#include <algorithm>
#include <type_traits>
#include <vector>
#include "../device.cuh"
#include "exp.h"

namespace cpu {

constexpr int SCAN_LANES = 16;   // channels worked on together
constexpr int SCAN_CHUNK = 32;   // steps between saved states
constexpr int SCAN_TASKS = 64;   // of the backward pass, at least, where there are channels enough

inline int64_t scan_channel_blocks(int e) { return ceil_div(e, SCAN_LANES); }
// Sums of dB and dC a sequence: one for each group of neighbouring channel blocks
inline int64_t scan_groups(int B, int e) { return std::min<int64_t>(scan_channel_blocks(e), ceil_div(SCAN_TASKS, B)); }

// Bytes, enough for double
inline size_t selective_scan_saved(int B, int64_t T, int e, int N) {
    return (size_t)B * ceil_div(T, SCAN_CHUNK) * scan_channel_blocks(e) * N * SCAN_LANES * sizeof(double);
}
inline size_t selective_scan_workspace(int B, int64_t T, int e, int N) {
    return ((size_t)scan_groups(B, e) * B * T * 2 * N + (size_t)B * e * (N + 2)) * sizeof(double);
}

// What does not change along the sequence, for 16 channels. Channels past the end have A = D = dt_bias = 0.
template <class R> struct ScanChannels {
    int first, count, N;
    std::vector<R> A;                                  // (N, lanes)
    R D[SCAN_LANES] = {}, dt_bias[SCAN_LANES] = {};
    ScanChannels(int64_t block, const R* A_log, const R* D_, const R* dt_bias_, int e, int N_)
        : first((int)block * SCAN_LANES), count(std::min(SCAN_LANES, e - first)), N(N_), A((size_t)N_ * SCAN_LANES) {
        for (int c = 0; c < count; c++) {
            D[c] = D_[first + c];
            dt_bias[c] = dt_bias_[first + c];
            for (int n = 0; n < N; n++) A[n * SCAN_LANES + c] = -std::exp(A_log[(int64_t)(first + c) * N + n]);
        }
    }
    void load(R* to, const R* row) const {
        for (int c = 0; c < SCAN_LANES; c++) to[c] = c < count ? row[first + c] : R(0);
    }
    void store(R* row, const R* from) const {
        for (int c = 0; c < count; c++) row[first + c] = from[c];
    }
};

template <class R>
void selective_scan_forward(R* out /*(B,T,e)*/, void* saved /*or null*/, std::type_identity_t<R>* h_out /*(B,e,N) or null*/,
                            const R* u /*(B,T,e)*/, const R* dt_raw /*(B,T,e)*/,
                            const R* bc /*B at +0, C at +N of each row, stride ldbc*/, int64_t ldbc, const R* z /*(B,T,e), stride ldz*/, int64_t ldz,
                            const R* A_log /*(e,N)*/, const R* D, const R* dt_bias, const std::type_identity_t<R>* h_in /*(B,e,N) or null*/,
                            void* /*workspace*/, int B, int64_t T, int e, int N, Stream = {},
                            const uint8_t* starts = nullptr /*(B,T) or null*/) {
    constexpr int L = SCAN_LANES;
    const int64_t blocks = scan_channel_blocks(e), chunks = ceil_div(T, SCAN_CHUNK);
#pragma omp parallel for collapse(2)
    for (int b = 0; b < B; b++)
        for (int64_t block = 0; block < blocks; block++) {
            const ScanChannels<R> ch(block, A_log, D, dt_bias, e, N);
            std::vector<R> state((size_t)N * L);
            R* h = state.data();
            const R* A = ch.A.data();
            if (h_in)
                for (int c = 0; c < ch.count; c++)
                    for (int n = 0; n < N; n++) h[n * L + c] = h_in[((int64_t)b * e + ch.first + c) * N + n];
            for (int64_t t = 0; t < T; t++) {
                if (saved && t % SCAN_CHUNK == 0)
                    std::copy(state.begin(), state.end(), (R*)saved + ((b * chunks + t / SCAN_CHUNK) * blocks + block) * N * L);
                const int64_t row = b * T + t;
                if (starts && starts[row]) std::fill(state.begin(), state.end(), R(0));
                R us[L], dt[L], zs[L], input[L], y[L];
                ch.load(us, u + row * e);
                ch.load(dt, dt_raw + row * e);
                ch.load(zs, z + row * ldz);
#pragma omp simd
                for (int c = 0; c < L; c++) {
                    dt[c] = softplus(dt[c] + ch.dt_bias[c]);
                    input[c] = dt[c] * us[c];
                    y[c] = ch.D[c] * us[c];
                }
                for (int n = 0; n < N; n++) {
                    const R Bn = bc[row * ldbc + n], Cn = bc[row * ldbc + N + n];
#pragma omp simd
                    for (int c = 0; c < L; c++) {
                        h[n * L + c] = fast_exp(dt[c] * A[n * L + c]) * h[n * L + c] + input[c] * Bn;
                        y[c] += h[n * L + c] * Cn;
                    }
                }
#pragma omp simd
                for (int c = 0; c < L; c++) y[c] *= zs[c] * sigmoid(zs[c]);
                ch.store(out + row * e, y);
            }
            if (h_out)
                for (int c = 0; c < ch.count; c++)
                    for (int n = 0; n < N; n++) h_out[((int64_t)b * e + ch.first + c) * N + n] = h[n * L + c];
        }
}

// Backward of the 16 channels of one block over one sequence. The pointers are those of the sequence.
template <class R> struct ScanBackward {
    static constexpr int L = SCAN_LANES;
    R *du, *ddt_raw, *dz, *out;
    const R *dout, *u, *dt_raw, *bc, *z;
    int64_t lddz, ldbc, ldz, T;
    int e, N;
    const uint8_t* starts;                             // or null

    // What the steps of a chunk leave for the way back
    struct Chunk {
        std::vector<R> h, a;                           // (steps, N, L): the state before each step, and the decay
        R us[SCAN_CHUNK][L], dt[SCAN_CHUNK][L], slope[SCAN_CHUNK][L], dy[SCAN_CHUNK][L];
    };

    // Forward from the saved state h: everything that does not need lambda, and out and dz. dC (steps,2N) += at +N.
    void remake(Chunk& k, R* h, R* dbc, R* dD, const ScanChannels<R>& ch, int64_t first, int64_t steps) const {
        const R* A = ch.A.data();
        for (int64_t i = 0; i < steps; i++) {
            const int64_t t = first + i;
            const bool start = starts && starts[t];
            R zs[L], gate[L], gs[L], y[L], dzs[L];
            R *us = k.us[i], *dt = k.dt[i], *slope = k.slope[i], *dy = k.dy[i];
            ch.load(us, u + t * e);
            ch.load(dt, dt_raw + t * e);
            ch.load(zs, z + t * ldz);
            ch.load(gs, dout + t * e);
#pragma omp simd
            for (int c = 0; c < L; c++) {
                slope[c] = sigmoid(dt[c] + ch.dt_bias[c]);
                dt[c] = softplus(dt[c] + ch.dt_bias[c]);
                gate[c] = sigmoid(zs[c]);
                dy[c] = gs[c] * zs[c] * gate[c];
                y[c] = ch.D[c] * us[c];
                dD[c] += dy[c] * us[c];
            }
            for (int n = 0; n < N; n++) {
                const R Bn = bc[t * ldbc + n], Cn = bc[t * ldbc + N + n];
                R *before = &k.h[(i * N + n) * L], *a = &k.a[(i * N + n) * L], *now = h + n * L, dC = 0;
#pragma omp simd reduction(+ : dC)
                for (int c = 0; c < L; c++) {
                    before[c] = now[c];
                    a[c] = start ? R(0) : fast_exp(dt[c] * A[n * L + c]);
                    now[c] = a[c] * now[c] + dt[c] * us[c] * Bn;
                    y[c] += now[c] * Cn;
                    dC += dy[c] * now[c];
                }
                dbc[i * 2 * N + N + n] += dC;
            }
#pragma omp simd
            for (int c = 0; c < L; c++) {
                dzs[c] = gs[c] * y[c] * gate[c] * (1 + zs[c] * (1 - gate[c]));
                y[c] *= zs[c] * gate[c];
            }
            ch.store(out + t * e, y);
            ch.store(dz + t * lddz, dzs);
        }
    }

    // Back through the same steps. carry (N,L) holds a_(t+1) lambda_(t+1).
    void reverse(const Chunk& k, R* carry, R* dbc, R* dA, R* ddt_bias, const ScanChannels<R>& ch, int64_t first, int64_t steps) const {
        const R* A = ch.A.data();
        for (int64_t i = steps - 1; i >= 0; i--) {
            const int64_t t = first + i;
            const R *us = k.us[i], *dt = k.dt[i], *slope = k.slope[i], *dy = k.dy[i];
            R dinput[L] = {}, ddecay[L] = {}, dus[L], ddts[L];     // gradients of dt u and of dt, the latter by way of a
            for (int n = 0; n < N; n++) {
                const R Bn = bc[t * ldbc + n], Cn = bc[t * ldbc + N + n];
                const R *before = &k.h[(i * N + n) * L], *a = &k.a[(i * N + n) * L];
                R *next = carry + n * L, *dAn = dA + n * L, dB = 0;
                const R* An = A + n * L;
#pragma omp simd reduction(+ : dB)
                for (int c = 0; c < L; c++) {
                    const R lambda = Cn * dy[c] + next[c];
                    dB += lambda * dt[c] * us[c];
                    dinput[c] += lambda * Bn;
                    next[c] = a[c] * lambda;
                    const R pull = next[c] * before[c];
                    ddecay[c] += An[c] * pull;
                    dAn[c] += dt[c] * pull;
                }
                dbc[i * 2 * N + n] += dB;
            }
#pragma omp simd
            for (int c = 0; c < L; c++) {
                dus[c] = ch.D[c] * dy[c] + dt[c] * dinput[c];
                ddts[c] = (ddecay[c] + us[c] * dinput[c]) * slope[c];
                ddt_bias[c] += ddts[c];
            }
            ch.store(du + t * e, dus);
            ch.store(ddt_raw + t * e, ddts);
        }
    }
};

template <class R>
void selective_scan_backward(R* du, R* ddt_raw, R* dz, int64_t lddz, R* dbc, int64_t lddbc, R* out /*recomputed (B,T,e)*/,
                             R* dA_log /*+=*/, R* dD /*+=*/, R* ddt_bias /*+=*/,
                             const R* dout, const R* u, const R* dt_raw, const R* bc, int64_t ldbc, const R* z, int64_t ldz,
                             const R* A_log, const R* D, const R* dt_bias,
                             const std::type_identity_t<R>* /*h_in, which is the first saved state*/, const void* saved,
                             void* workspace, int B, int64_t T, int e, int N, Stream = {},
                             const uint8_t* starts = nullptr /*(B,T) or null*/, std::type_identity_t<R>* dh_in = nullptr /*(B,e,N) or null*/,
                             const std::type_identity_t<R>* dh_out = nullptr /*(B,e,N) or null*/) {
    constexpr int L = SCAN_LANES;
    const int64_t blocks = scan_channel_blocks(e), groups = scan_groups(B, e), chunks = ceil_div(T, SCAN_CHUNK);
    R* dbc_parts = (R*)workspace;                              // (groups, B, T, 2N)
    R* parameter_parts = dbc_parts + groups * B * T * 2 * N;   // (B, e, N + 2): dA, dD, ddt_bias
#pragma omp parallel for collapse(2)
    for (int b = 0; b < B; b++)
        for (int64_t group = 0; group < groups; group++) {
            const int64_t at = b * T;
            const ScanBackward<R> scan{du + at * e, ddt_raw + at * e, dz + at * lddz, out + at * e, dout + at * e, u + at * e, dt_raw + at * e,
                                       bc + at * ldbc, z + at * ldz, lddz, ldbc, ldz, T, e, N, starts ? starts + at : nullptr};
            typename ScanBackward<R>::Chunk chunk;
            chunk.h.resize((size_t)SCAN_CHUNK * N * L);
            chunk.a.resize((size_t)SCAN_CHUNK * N * L);
            R* dbc_part = dbc_parts + (group * B + b) * T * 2 * N;
            std::fill(dbc_part, dbc_part + T * 2 * N, R(0));
            for (int64_t block = group * blocks / groups; block < (group + 1) * blocks / groups; block++) {
                const ScanChannels<R> ch(block, A_log, D, dt_bias, e, N);
                std::vector<R> h((size_t)N * L), carry((size_t)N * L), dA((size_t)N * L);
                R dDs[L] = {}, dbias[L] = {};
                auto state = [&](int c, int n) { return ((int64_t)b * e + ch.first + c) * N + n; };
                for (int c = 0; dh_out && c < ch.count; c++)
                    for (int n = 0; n < N; n++) carry[n * L + c] = dh_out[state(c, n)];
                for (int64_t k = chunks - 1; k >= 0; k--) {
                    const R* from = (const R*)saved + ((b * chunks + k) * blocks + block) * N * L;
                    const int64_t first = k * SCAN_CHUNK, steps = std::min<int64_t>(SCAN_CHUNK, T - first);
                    std::copy(from, from + N * L, h.begin());
                    scan.remake(chunk, h.data(), dbc_part + first * 2 * N, dDs, ch, first, steps);
                    scan.reverse(chunk, carry.data(), dbc_part + first * 2 * N, dA.data(), dbias, ch, first, steps);
                }
                for (int c = 0; dh_in && c < ch.count; c++)
                    for (int n = 0; n < N; n++) dh_in[state(c, n)] = carry[n * L + c];
                for (int c = 0; c < ch.count; c++) {
                    R* part = parameter_parts + ((int64_t)b * e + ch.first + c) * (N + 2);
                    for (int n = 0; n < N; n++) part[n] = ch.A[n * L + c] * dA[n * L + c];
                    part[N] = dDs[c];
                    part[N + 1] = dbias[c];
                }
            }
        }
#pragma omp parallel for
    for (int64_t row = 0; row < B * T; row++)
        for (int n = 0; n < 2 * N; n++) {
            R sum = 0;
            for (int64_t group = 0; group < groups; group++) sum += dbc_parts[(group * B * T + row) * 2 * N + n];
            dbc[row * lddbc + n] = sum;
        }
#pragma omp parallel for
    for (int c = 0; c < e; c++)
        for (int b = 0; b < B; b++) {
            const R* part = parameter_parts + ((int64_t)b * e + c) * (N + 2);
            for (int n = 0; n < N; n++) dA_log[(int64_t)c * N + n] += part[n];
            dD[c] += part[N];
            ddt_bias[c] += part[N + 1];
        }
}

} // namespace cpu
