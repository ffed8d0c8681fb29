// The passes that bench_scan times: the library's entry points, what they write, and the least they cost.
#pragma once
#include "scan_layer.cuh"

namespace bench {

enum class Kind { SCAN, SCAN_GRADIENT, CONV, CONV_GRADIENT };

// The least for each (t, c): bytes, results of the special-function unit, and issue slots (multiply-adds and special functions, a lane's
// each; kernels that put products on the tensor cores can do with fewer)
struct Cost { double bytes, special, slots; };

struct Pass {
    const char* name;
    Kind kind;
    std::function<void(const Layer&, int)> run, before;               // before: what must have run on the same buffers
    std::function<Cost(const Layer&)> cost;
};

inline void scan_forward(const Layer& l, int i, void* saved) {
    const auto& [B, T, e] = l.s;
    gpu::selective_scan_forward(l.out[i], saved, nullptr, l.u[i], l.dt[i], l.bc[i] + GAP, LDBC, l.xz[i] + e, 2 * e, l.A_log[0], l.D[0], l.dt_bias[0],
                                nullptr, l.workspace, B, T, e, N, Stream{});
}
inline void scan_forward_saving(const Layer& l, int i) { scan_forward(l, i, l.saved[i % l.saved.size()]); }
inline void scan_backward(const Layer& l, int i) {
    const auto& [B, T, e] = l.s;
    gpu::selective_scan_backward(l.du[i], l.ddt[i], l.dxz[i] + e, 2 * e, l.dbc[i] + GAP, LDBC, l.out[i], l.dA[0], l.dD[0], l.ddt_bias[0], l.dout[i],
                                 l.u[i], l.dt[i], l.bc[i] + GAP, LDBC, l.xz[i] + e, 2 * e, l.A_log[0], l.D[0], l.dt_bias[0], nullptr,
                                 l.saved[i % l.saved.size()], l.workspace, B, T, e, N, Stream{});
}
inline void conv_forward(const Layer& l, int i) {
    gpu::conv1d_forward(l.u[i], nullptr, l.xz[i], 2 * l.s.e, nullptr, l.conv_w[0], l.conv_b[0], l.s.B, l.s.T, l.s.e, Stream{});
}
inline void conv_backward(const Layer& l, int i) {
    gpu::conv1d_backward(l.dxz[i], 2 * l.s.e, l.dw[0], l.db[0], l.dout[i], l.xz[i], 2 * l.s.e, nullptr, l.conv_w[0], l.conv_b[0], l.workspace, l.s.B,
                         l.s.T, l.s.e, Stream{});
}

// The convolution's forward is last: it writes u.
inline std::vector<Pass> passes() {
    constexpr double X = sizeof(floatX);
    auto states = [](const Layer& l) { return (double)l.saved_bytes() / l.s.elements(); };
    // dt A, 2^x, (dt u) B, a h + ., C h + y for each state; softplus 2 and gate 1 special functions
    auto forward = [=](const Layer& l) { return Cost{4 * X + states(l), N + 3., 5. * N}; };
    auto evaluation = [](const Layer&) { return Cost{4 * X, N + 3., 5. * N}; };
    // the same again; lambda, i, a lambda, pull, ddt, dA, and the products of dB and dC
    auto backward = [=](const Layer& l) { return Cost{8 * X + states(l), N + 4., 13. * N}; };
    return {
        {"scan forward, states saved", Kind::SCAN, scan_forward_saving, {}, forward},
        {"scan forward, evaluation", Kind::SCAN, [](const Layer& l, int i) { scan_forward(l, i, nullptr); }, {}, evaluation},
        {"scan backward", Kind::SCAN_GRADIENT, scan_backward, scan_forward_saving, backward},
        {"conv backward", Kind::CONV_GRADIENT, conv_backward, {}, [](const Layer&) { return Cost{3 * X, 2., 20.}; }},
        {"conv forward", Kind::CONV, conv_forward, {}, [](const Layer&) { return Cost{2 * X, 2., 8.}; }},
    };
}

} // namespace bench
