// What a pass wrote, beside what its twin in double makes of the same inputs: for the whole of a small problem, or for some channels
// of one sequence of a large one, which do not depend on the others.
#pragma once
#include "errors.cuh"
#include "scan_passes.cuh"

namespace bench {

struct Slice {
    int first_sequence, sequences, first_channel, channels;
    bool all_sequences(const Problem& s) const { return sequences == s.B; }              // sums over time are whole
    bool all_channels(const Problem& s) const { return channels == s.e; }                // sums over channels are
};
// By name. bound: of the relative L2 error
struct Quantity {
    const char* name;
    std::vector<double> values;
    double bound;
};
constexpr double BOUND = sizeof(floatX) == 2 ? 4e-3 : 1e-5, SUM_BOUND = sizeof(floatX) == 2 ? 2e-3 : 1e-5;

// Reads the slice of an activation of rows of ld, from column `first` of the channels on
inline std::vector<double> read(const Layer& l, const Slice& k, const floatX* p, int64_t ld, int64_t first) {
    return to_host(p + k.first_sequence * l.s.T * ld, k.sequences * l.s.T, ld, first, k.channels);
}
inline std::vector<double> read_bc(const Layer& l, const Slice& k, const floatX* p) {
    return to_host(p + k.first_sequence * l.s.T * LDBC, k.sequences * l.s.T, LDBC, GAP, 2 * N);
}

inline std::vector<Quantity> written(const Layer& l, Kind kind, const Slice& k) {
    const int e = l.s.e, c = k.first_channel;
    if (kind == Kind::SCAN) return {{"out", read(l, k, l.out[0], e, c), BOUND}};
    if (kind == Kind::CONV) return {{"u", read(l, k, l.u[0], e, c), BOUND}};
    if (kind == Kind::CONV_GRADIENT) {
        std::vector<Quantity> q{{"dx", read(l, k, l.dxz[0], 2 * e, c), BOUND}};
        if (!k.all_sequences(l.s)) return q;
        q.push_back({"dw", to_host(l.dw[0] + c * 4, k.channels * 4), SUM_BOUND});
        q.push_back({"db", to_host(l.db[0] + c, k.channels), SUM_BOUND});
        return q;
    }
    std::vector<Quantity> q{{"out", read(l, k, l.out[0], e, c), BOUND}, {"du", read(l, k, l.du[0], e, c), BOUND},
                            {"ddt", read(l, k, l.ddt[0], e, c), BOUND}, {"dz", read(l, k, l.dxz[0], 2 * e, e + c), BOUND}};
    if (!k.all_sequences(l.s)) return q;
    q.push_back({"dA", to_host(l.dA[0] + c * N, (int64_t)k.channels * N), SUM_BOUND});
    q.push_back({"dD", to_host(l.dD[0] + c, k.channels), SUM_BOUND});
    q.push_back({"dbias", to_host(l.ddt_bias[0] + c, k.channels), SUM_BOUND});
    if (k.all_channels(l.s)) q.push_back({"dBC", read_bc(l, k, l.dbc[0]), BOUND});
    return q;
}

// In the order of written()
inline std::vector<std::vector<double>> twin_of_conv(const Layer& l, Kind kind, const Slice& k) {
    const int e = k.channels, B = k.sequences;
    const int64_t T = l.s.T, n = B * T * e;
    const auto x = read(l, k, l.xz[0], 2 * l.s.e, k.first_channel), du = read(l, k, l.dout[0], l.s.e, k.first_channel);
    const auto w = to_host(l.conv_w[0] + k.first_channel * 4, e * 4), b = to_host(l.conv_b[0] + k.first_channel, e);
    std::vector<double> y(n), dw(e * 4), db(e);
    std::vector<char> space(cpu::conv1d_backward_workspace(B, T, e) * 2);
    const double* none = nullptr;
    double* nowhere = nullptr;
    if (kind == Kind::CONV) cpu::conv1d_forward(y.data(), nowhere, x.data(), e, none, w.data(), b.data(), B, T, e);
    else cpu::conv1d_backward(y.data(), e, dw.data(), db.data(), du.data(), x.data(), e, none, w.data(), b.data(), space.data(), B, T, e);
    return {y, dw, db};
}
inline std::vector<std::vector<double>> twin_of_scan(const Layer& l, Kind kind, const Slice& k) {
    const int e = k.channels, B = k.sequences, c = k.first_channel;
    const int64_t T = l.s.T, n = B * T * e;
    const auto u = read(l, k, l.u[0], l.s.e, c), dt = read(l, k, l.dt[0], l.s.e, c), z = read(l, k, l.xz[0], 2 * l.s.e, l.s.e + c),
               dout = read(l, k, l.dout[0], l.s.e, c);
    const auto bc = read_bc(l, k, l.bc[0]), A_log = to_host(l.A_log[0] + c * N, (int64_t)e * N), D = to_host(l.D[0] + c, e),
               bias = to_host(l.dt_bias[0] + c, e);
    std::vector<double> out(n), du(n), ddt(n), dz(n), dbc(B * T * 2 * N), dA((size_t)e * N), dD(e), dbias(e);
    std::vector<char> saved(cpu::selective_scan_saved(B, T, e, N)), space(cpu::selective_scan_workspace(B, T, e, N));
    const double* none = nullptr;
    double* nowhere = nullptr;
    cpu::selective_scan_forward(out.data(), saved.data(), nowhere, u.data(), dt.data(), bc.data(), 2 * N, z.data(), e, A_log.data(), D.data(),
                                bias.data(), none, space.data(), B, T, e, N);
    if (kind == Kind::SCAN_GRADIENT)
        cpu::selective_scan_backward(du.data(), ddt.data(), dz.data(), e, dbc.data(), 2 * N, out.data(), dA.data(), dD.data(), dbias.data(),
                                     dout.data(), u.data(), dt.data(), bc.data(), 2 * N, z.data(), e, A_log.data(), D.data(), bias.data(), none,
                                     saved.data(), space.data(), B, T, e, N);
    return {out, du, ddt, dz, dA, dD, dbias, dbc};
}

// Runs the pass on buffers 0 and prints its errors on the slice; false if one is above its bound
inline bool check_pass(const Layer& l, const Pass& pass, const Slice& k) {
    l.reset();
    if (pass.before) pass.before(l, 0);
    pass.run(l, 0);
    CUDA_CHECK(cudaDeviceSynchronize());
    const auto got = written(l, pass.kind, k);
    const bool scan = pass.kind == Kind::SCAN || pass.kind == Kind::SCAN_GRADIENT;
    const auto want = scan ? twin_of_scan(l, pass.kind, k) : twin_of_conv(l, pass.kind, k);
    bool good = true;
    for (size_t i = 0; i < got.size(); i++) {
        const double error = relative_error(got[i].values, want[i]);
        printf(" %s %.1e%s", got[i].name, error, error <= got[i].bound ? "" : " TOO LARGE");
        good &= error <= got[i].bound;
    }
    printf("\n");
    fflush(stdout);
    return good;
}

} // namespace bench
