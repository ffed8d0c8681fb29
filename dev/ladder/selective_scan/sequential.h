// The selective scan as plain loops, forward and backward: what every program here is compared with, in double.
// README.md derives the backward pass; the lines below are numbered as its equations.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

namespace scan {

constexpr int N = 16;                                  // d_state

struct Sizes {
    int B;
    int64_t T;
    int e;
    constexpr int64_t rows() const { return B * T; }
    constexpr int64_t elements() const { return rows() * e; }
};

template <class R> struct Inputs_of {
    std::vector<R> u, dt_raw, z, dout;                 // (B,T,e)
    std::vector<R> bc;                                 // (B,T,2N): B | C
    std::vector<R> A_log, D, dt_bias;                  // (e,N), (e), (e)
};
template <class R> struct Results_of {
    std::vector<R> out, du, ddt_raw, dz;               // (B,T,e)
    std::vector<R> dbc;                                // (B,T,2N)
    std::vector<R> dA_log, dD, ddt_bias;
    explicit Results_of(const Sizes& s)
        : out(s.elements()), du(s.elements()), ddt_raw(s.elements()), dz(s.elements()), dbc(s.rows() * 2 * N), dA_log((size_t)s.e * N), dD(s.e),
          ddt_bias(s.e) {}
};

template <class R> R softplus(R x) { return x > 20 ? x : std::log1p(std::exp(x)); }
template <class R> R sigmoid(R x) { return 1 / (1 + std::exp(-x)); }

// One channel c of sequence b. states (T+1,N), or null: h before every step, and after the last.
template <class R> void forward_channel(Results_of<R>& r, R* states, const Inputs_of<R>& p, const Sizes& s, int b, int c) {
    R A[N], h[N] = {};
    for (int n = 0; n < N; n++) A[n] = -std::exp(p.A_log[c * N + n]);
    for (int64_t t = 0; t < s.T; t++) {
        const int64_t row = b * s.T + t, at = row * s.e + c;
        const R *B = &p.bc[row * 2 * N], *C = B + N, u = p.u[at], z = p.z[at];
        const R dt = softplus(p.dt_raw[at] + p.dt_bias[c]);                              // (1)
        R y = p.D[c] * u;
        for (int n = 0; n < N; n++) {
            if (states) states[t * N + n] = h[n];
            h[n] = std::exp(dt * A[n]) * h[n] + dt * u * B[n];                           // (2)
            y += C[n] * h[n];                                                            // (3)
        }
        r.out[at] = y * z * sigmoid(z);                                                  // (4)
    }
    for (int n = 0; states && n < N; n++) states[s.T * N + n] = h[n];
}

// And back, from the states of the way there. Sums over channels (dbc) and over time (dA_log, dD, ddt_bias) are added to.
template <class R> void backward_channel(Results_of<R>& r, const R* states, const Inputs_of<R>& p, const Sizes& s, int b, int c) {
    R A[N], carry[N] = {};                                                               // carry: a_(t+1) lambda_(t+1)
    for (int n = 0; n < N; n++) A[n] = -std::exp(p.A_log[c * N + n]);
    for (int64_t t = s.T - 1; t >= 0; t--) {
        const int64_t row = b * s.T + t, at = row * s.e + c;
        const R *B = &p.bc[row * 2 * N], *C = B + N, u = p.u[at], z = p.z[at], g = p.dout[at], gate = sigmoid(z);
        const R *before = states + t * N, *now = before + N;
        R* dB = &r.dbc[row * 2 * N];
        const R dt = softplus(p.dt_raw[at] + p.dt_bias[c]), dy = g * z * gate;           // (5)
        R y = p.D[c] * u, dinput = 0, ddt = 0;
        for (int n = 0; n < N; n++) {
            const R a = std::exp(dt * A[n]), lambda = C[n] * dy + carry[n];              // (7)
            y += C[n] * now[n];
            dB[N + n] += dy * now[n];                                                    // (8) dC
            dB[n] += lambda * dt * u;                                                    // (9)
            dinput += lambda * B[n];                                                     // (10)
            carry[n] = a * lambda;
            ddt += A[n] * carry[n] * before[n];                                          // (11), by way of a
            r.dA_log[c * N + n] += A[n] * dt * carry[n] * before[n];                     // (13)
        }
        r.dz[at] = g * y * gate * (1 + z * (1 - gate));                                  // (6)
        r.du[at] = p.D[c] * dy + dt * dinput;                                            // (10)
        r.ddt_raw[at] = (ddt + u * dinput) * sigmoid(p.dt_raw[at] + p.dt_bias[c]);       // (11), (12)
        r.ddt_bias[c] += r.ddt_raw[at];
        r.dD[c] += dy * u;                                                               // (14)
    }
}

template <class R> Results_of<R> sequential(const Inputs_of<R>& p, const Sizes& s, bool backward = true) {
    Results_of<R> r(s);
    std::vector<R> states((s.T + 1) * N);
    for (int b = 0; b < s.B; b++)
        for (int c = 0; c < s.e; c++) {
            forward_channel(r, backward ? states.data() : nullptr, p, s, b, c);
            if (backward) backward_channel(r, states.data(), p, s, b, c);
        }
    return r;
}

} // namespace scan
