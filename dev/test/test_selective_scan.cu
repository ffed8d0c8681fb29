// Selective scan: the twin against the recurrence written out and finite differences; the GPU against the twin in double.
#include "../../kernels/ops.cuh"
#include "test_util.h"
#ifndef SAMBA_CPU
#include "../bench/scan_twin.cuh"
#endif

namespace {

struct ScanCase {
    int B;
    int64_t T;
    int e, N;
    int gap = 0;      // columns in front of B, C and of z and dz in their rows
    bool h_in = true;
    bool documents = false;   // some start on the way, and the state after the last step has a gradient
};

// A problem, or its gradients, in type T. Rows of bc and z are wider than what is used of them.
struct ScanData {
    ScanCase c;
    int64_t ldbc, ldz;
    std::vector<double> u, dt_raw, bc, z, A_log, D, dt_bias, h_in, dout, dh_out;
    std::vector<uint8_t> starts;
    ScanData(const ScanCase& c_, uint64_t seed) : c(c_), ldbc(c_.gap + 2 * c_.N), ldz(c_.gap + c_.e) {
        const size_t BT = c.B * c.T;
        u = random_values(BT * c.e, seed + 1);
        dt_raw = random_values(BT * c.e, seed + 2, 2.0);
        bc = random_values(BT * ldbc, seed + 3);
        z = random_values(BT * ldz, seed + 4, 3.0);
        A_log = random_values((size_t)c.e * c.N, seed + 5, 2.0);
        D = random_values(c.e, seed + 6);
        dt_bias = random_values(c.e, seed + 7);
        for (double& x : dt_bias) x -= 2;
        h_in = random_values((size_t)c.B * c.e * c.N, seed + 8);
        dout = random_values(BT * c.e, seed + 9);
        dh_out = random_values(h_in.size(), seed + 10);
        starts.assign(BT, 0);
        const auto chance = random_values(BT, seed + 12);
        for (size_t i = 0; i < BT; i++) starts[i] = chance[i] > 0.9;
        if (BT > 3) starts[BT / 2] = starts[BT / 2 + 1] = 1;          // a document of one token
    }
    // Activations as X holds them and parameters and states as float does
    template <class X> void round() {
        for (auto* v : {&u, &dt_raw, &bc, &z, &dout}) *v = rounded<X>(*v);
        for (auto* v : {&A_log, &D, &dt_bias, &h_in, &dh_out}) *v = rounded<float>(*v);
    }
};

struct ScanResult {
    std::vector<double> out, h_out, du, ddt_raw, dz, dbc, remade_out, dA_log, dD, ddt_bias, dh_in;
};

// Both passes of the twin in R. Parameter gradients start from zero.
template <class R> ScanResult run_twin(const ScanData& d, bool backward = true) {
    const auto& [B, T, e, N, gap, has_h_in, documents] = d.c;
    const size_t BT = B * T;
    const auto u = to_type<R>(d.u), dt_raw = to_type<R>(d.dt_raw), bc = to_type<R>(d.bc), z = to_type<R>(d.z), dout = to_type<R>(d.dout);
    const auto A_log = to_type<R>(d.A_log), D = to_type<R>(d.D), dt_bias = to_type<R>(d.dt_bias), h_in = to_type<R>(d.h_in);
    const auto dh_out = to_type<R>(d.dh_out);
    const uint8_t* starts = documents ? d.starts.data() : nullptr;
    const R* h = has_h_in ? h_in.data() : nullptr;
    std::vector<R> out(BT * e), h_out(h_in.size()), remade(BT * e);
    std::vector<R> du(BT * e), ddt(BT * e), dz(BT * d.ldz), dbc(BT * d.ldbc), dA_log(A_log.size()), dD(e), ddt_bias(e), dh_in(h_in.size());
    std::vector<char> saved(cpu::selective_scan_saved(B, T, e, N)), workspace(cpu::selective_scan_workspace(B, T, e, N));
    cpu::selective_scan_forward(out.data(), saved.data(), h_out.data(), u.data(), dt_raw.data(), bc.data() + gap, d.ldbc, z.data() + gap, d.ldz,
                                A_log.data(), D.data(), dt_bias.data(), h, workspace.data(), B, T, e, N, {}, starts);
    if (backward)
        cpu::selective_scan_backward(du.data(), ddt.data(), dz.data() + gap, d.ldz, dbc.data() + gap, d.ldbc, remade.data(), dA_log.data(),
                                     dD.data(), ddt_bias.data(), dout.data(), u.data(), dt_raw.data(), bc.data() + gap, d.ldbc, z.data() + gap,
                                     d.ldz, A_log.data(), D.data(), dt_bias.data(), h, saved.data(), workspace.data(), B, T, e, N, {}, starts,
                                     dh_in.data(), documents ? dh_out.data() : nullptr);
    return {to_double(out),    to_double(h_out),  to_double(du), to_double(ddt),      to_double(dz),   to_double(dbc),
            to_double(remade), to_double(dA_log), to_double(dD), to_double(ddt_bias), to_double(dh_in)};
}

// The recurrence one channel after the other, as in the header of the twin
TEST(ScanCpu, IsTheRecurrence) {
    for (const ScanCase& c : {ScanCase{2, 70, 33, 5, 3}, ScanCase{1, 1, 1, 1}, ScanCase{1, 33, 16, 16, 0, false},
                              ScanCase{2, 70, 33, 5, 3, true, true}}) {
        const ScanData d(c, 1);
        const ScanResult got = run_twin<double>(d, false);
        std::vector<double> out(d.u.size()), h_out(d.h_in.size());
        for (int b = 0; b < c.B; b++)
            for (int i = 0; i < c.e; i++) {
                std::vector<double> h(c.N, 0.0);
                if (c.h_in) h.assign(&d.h_in[(b * c.e + i) * c.N], &d.h_in[(b * c.e + i) * c.N] + c.N);
                for (int64_t t = 0; t < c.T; t++) {
                    const int64_t row = b * c.T + t;
                    if (c.documents && d.starts[row]) h.assign(c.N, 0.0);
                    const double dt = std::log1p(std::exp(d.dt_raw[row * c.e + i] + d.dt_bias[i]));
                    const double u = d.u[row * c.e + i], z = d.z[row * d.ldz + c.gap + i];
                    double y = d.D[i] * u;
                    for (int n = 0; n < c.N; n++) {
                        h[n] = std::exp(-dt * std::exp(d.A_log[i * c.N + n])) * h[n] + dt * d.bc[row * d.ldbc + c.gap + n] * u;
                        y += d.bc[row * d.ldbc + c.gap + c.N + n] * h[n];
                    }
                    out[row * c.e + i] = y * z / (1 + std::exp(-z));
                }
                for (int n = 0; n < c.N; n++) h_out[(b * c.e + i) * c.N + n] = h[n];
            }
        EXPECT_LT(rel_l2(got.out, out), 1e-13);
        EXPECT_LT(rel_l2(got.h_out, h_out), 1e-13);
    }
}

TEST(ScanCpu, BackwardIsTheGradient) {
    for (const ScanCase& c : {ScanCase{2, 5, 3, 4, 2}, ScanCase{1, 1, 1, 1}, ScanCase{1, 67, 18, 3}, ScanCase{2, 33, 2, 7, 0, false},
                              ScanCase{2, 40, 3, 4, 1, true, true}}) {
        ScanData d(c, 11);
        const ScanResult gradient = run_twin<double>(d);
        EXPECT_EQ(gradient.out, gradient.remade_out);
        auto loss = [&] {
            const ScanResult r = run_twin<double>(d, false);
            double sum = 0;
            for (size_t i = 0; i < r.out.size(); i++) sum += r.out[i] * d.dout[i];
            for (size_t i = 0; c.documents && i < r.h_out.size(); i++) sum += r.h_out[i] * d.dh_out[i];
            return sum;
        };
        expect_gradient(loss, d.u, gradient.du, "du");
        expect_gradient(loss, d.dt_raw, gradient.ddt_raw, "ddt_raw");
        expect_gradient(loss, d.z, gradient.dz, "dz");
        expect_gradient(loss, d.bc, gradient.dbc, "dbc");
        expect_gradient(loss, d.A_log, gradient.dA_log, "dA_log");
        expect_gradient(loss, d.D, gradient.dD, "dD");
        expect_gradient(loss, d.dt_bias, gradient.ddt_bias, "ddt_bias");
        if (c.h_in) expect_gradient(loss, d.h_in, gradient.dh_in, "dh_in");
    }
}

void expect_close(const ScanResult& got, const ScanResult& want, double tol, const std::string& what) {
    EXPECT_LT(rel_l2(got.out, want.out), tol) << "out, " << what;
    EXPECT_LT(rel_l2(got.remade_out, want.out), tol) << "out of the backward pass, " << what;
    EXPECT_LT(rel_l2(got.du, want.du), tol) << "du, " << what;
    EXPECT_LT(rel_l2(got.ddt_raw, want.ddt_raw), tol) << "ddt_raw, " << what;
    EXPECT_LT(rel_l2(got.dz, want.dz), tol) << "dz, " << what;
    EXPECT_LT(rel_l2(got.dbc, want.dbc), tol) << "dbc, " << what;
    EXPECT_LT(rel_l2(got.dA_log, want.dA_log), tol) << "dA_log, " << what;
    EXPECT_LT(rel_l2(got.dD, want.dD), tol) << "dD, " << what;
    EXPECT_LT(rel_l2(got.ddt_bias, want.ddt_bias), tol) << "ddt_bias, " << what;
    EXPECT_LT(rel_l2(got.dh_in, want.dh_in), tol) << "dh_in, " << what;
    EXPECT_LT(rel_l2(got.h_out, want.h_out), 1e-5) << "h_out, " << what;      // fp32 in every build
}
std::string name_of(const ScanCase& c) {
    return "B " + std::to_string(c.B) + " T " + std::to_string(c.T) + " e " + std::to_string(c.e) + " N " + std::to_string(c.N);
}

TEST(ScanCpu, FloatMatchesDouble) {
    for (const ScanCase& c : {ScanCase{2, 100, 40, 16, 8}, ScanCase{1, 257, 33, 5}}) {
        ScanData d(c, 21);
        d.round<float>();
        expect_close(run_twin<float>(d), run_twin<double>(d), 1e-5, name_of(c));
    }
}

// dt_bias of +-30, A_log of +-10, zeros; one token, and lengths and widths that nothing divides
std::vector<ScanData> extreme_problems() {
    std::vector<ScanData> all;
    for (const ScanCase& c : {ScanCase{1, 37, 36, 16, 4}, ScanCase{2, 1, 35, 16, 1}}) {
        for (double bias : {30.0, -30.0})
            for (double A_log : {10.0, -10.0}) {
                ScanData d(c, 31);
                d.dt_bias.assign(d.dt_bias.size(), bias);
                d.A_log.assign(d.A_log.size(), A_log);
                all.push_back(d);
            }
        ScanData zeros(c, 32);
        for (auto* v : {&zeros.u, &zeros.dt_raw, &zeros.bc, &zeros.z, &zeros.A_log, &zeros.D, &zeros.dt_bias, &zeros.h_in, &zeros.dout})
            v->assign(v->size(), 0.0);
        all.push_back(zeros);
    }
    return all;
}
std::string name_of_extreme(const ScanData& d) {
    return name_of(d.c) + " dt_bias " + std::to_string(d.dt_bias[0]) + " A_log " + std::to_string(d.A_log[0]);
}

TEST(ScanCpu, ExtremesInFloat) {
    for (ScanData& d : extreme_problems()) {
        d.round<float>();
        expect_close(run_twin<float>(d), run_twin<double>(d), 1e-5, name_of_extreme(d));
    }
}

#ifndef SAMBA_CPU
// A problem on the GPU, and both passes over it
struct GpuScan {
    const ScanData& d;
    DeviceBuffer<floatX> u, dt_raw, bc, z, dout, out, remade, du, ddt, dz, dbc;
    DeviceBuffer<float> A_log, D, dt_bias, h_in, h_out, dA_log, dD, ddt_bias, dh_out, dh_in;
    DeviceBuffer<uint8_t> starts;
    DeviceBuffer<char> saved, workspace;
    float start = 1.f;
    explicit GpuScan(const ScanData& d_)
        : d(d_), u(to_type<floatX>(d.u)), dt_raw(to_type<floatX>(d.dt_raw)), bc(to_type<floatX>(d.bc)), z(to_type<floatX>(d.z)),
          dout(to_type<floatX>(d.dout)), out(d.u.size()), remade(d.u.size()), du(d.u.size()), ddt(d.u.size()), dz(d.z.size()), dbc(d.bc.size()),
          A_log(to_type<float>(d.A_log)), D(to_type<float>(d.D)), dt_bias(to_type<float>(d.dt_bias)), h_in(to_type<float>(d.h_in)),
          h_out(d.h_in.size()), dA_log(d.A_log.size()), dD(d.D.size()), ddt_bias(d.D.size()), dh_out(to_type<float>(d.dh_out)),
          dh_in(d.h_in.size()), starts(d.starts), saved(gpu::selective_scan_saved(d.c.B, d.c.T, d.c.e, d.c.N)),
          workspace(gpu::selective_scan_workspace(d.c.B, d.c.T, d.c.e, d.c.N)) {}

    // Gradients of parameters are added to `start`
    void run(float start_ = 1.f) {
        start = start_;
        const auto& [B, T, e, N, gap, has_h_in, documents] = d.c;
        const float *h = has_h_in ? h_in.ptr : nullptr, *after = documents ? dh_out.ptr : nullptr;
        const uint8_t* where = documents ? starts.ptr : nullptr;
        const std::vector<float> gradients(dA_log.size, start);
        for (DeviceBuffer<float>* p : {&dA_log, &dD, &ddt_bias}) copy_to_device(p->ptr, gradients.data(), p->size * sizeof(float), Stream{});
        gpu::selective_scan_forward(out.ptr, saved.ptr, h_out.ptr, u.ptr, dt_raw.ptr, bc.ptr + gap, d.ldbc, z.ptr + gap, d.ldz, A_log.ptr, D.ptr,
                                    dt_bias.ptr, h, workspace.ptr, B, T, e, N, Stream{}, where);
        gpu::selective_scan_backward(du.ptr, ddt.ptr, dz.ptr + gap, d.ldz, dbc.ptr + gap, d.ldbc, remade.ptr, dA_log.ptr, dD.ptr, ddt_bias.ptr,
                                     dout.ptr, u.ptr, dt_raw.ptr, bc.ptr + gap, d.ldbc, z.ptr + gap, d.ldz, A_log.ptr, D.ptr, dt_bias.ptr, h,
                                     saved.ptr, workspace.ptr, B, T, e, N, Stream{}, where, dh_in.ptr, after);
        stream_sync(Stream{});
    }
    ScanResult result() const {
        auto added = [&](std::vector<double> x) {
            for (double& v : x) v -= start;
            return x;
        };
        return {to_double(out.host()),
                to_double(h_out.host()),
                to_double(du.host()),
                to_double(ddt.host()),
                used_columns(to_double(dz.host()), d.ldz, d.c.gap, d.c.e),
                used_columns(to_double(dbc.host()), d.ldbc, d.c.gap, 2 * d.c.N),
                to_double(remade.host()),
                added(to_double(dA_log.host())),
                added(to_double(dD.host())),
                added(to_double(ddt_bias.host())),
                to_double(dh_in.host())};
    }
    // Everything that the passes write, byte by byte
    std::vector<char> bytes() const {
        std::vector<char> all;
        auto add = [&](const auto& buffer) {
            const auto values = buffer.host();
            all.insert(all.end(), (const char*)values.data(), (const char*)(values.data() + values.size()));
        };
        for (const auto* p : {&out, &remade, &du, &ddt, &dz, &dbc}) add(*p);
        for (const auto* p : {&h_out, &dA_log, &dD, &ddt_bias, &dh_in}) add(*p);
        return all;
    }
};
ScanResult run_gpu(const ScanData& d, float start = 1.f) {
    GpuScan scan(d);
    scan.run(start);
    return scan.result();
}

const ScanCase SCAN_CASES[] = {
    {1, 1, 64, 16},              // one step
    {2, 16, 64, 16, 96},         // one tile, the model's row layout
    {2, 33, 136, 16, 8},         // a tail in steps and channels
    {3, 70, 33, 16},             // e that no vector divides
    {2, 50, 40, 8, 8},           // fewer states than lanes hold
    {2, 50, 40, 5},
    {2, 47, 72, 64, 4},          // groups of states
    {1, 21, 35, 37, 3, false},
    {2, 1000, 72, 16, 0, false},
    {1, 5000, 40, 16},           // segments
    {1, 1500, 33, 20, 1},        // segments and groups, no vectors
    {2, 100, 400, 16, 8},        // a whole block of channels and a part of one
    {2, 100, 200, 16, 8, true, true},
    {2, 70, 33, 5, 3, true, true},
    {1, 3000, 208, 16, 0, true, true},
    {1, 3000, 36, 40, 0, true, true},
    {1, 600, 1608, 16, 8},       // narrow blocks of channels that fill the GPU, with no segments
    {1, 601, 1650, 16, 0, true, true},
    {1, 2307, 40, 16, 8},        // narrow blocks whose last segment is a part of a tile
    {1, 130, 1610, 16, 1, true, true},
    // On 132 multiprocessors:
    {34, 150, 200, 16, 8, true, true},   // narrow blocks, as wide ones would leave half of the GPU idle
    {132, 45, 136, 16, 8, true, true},   // wide blocks
    {132, 41, 33, 16},
};

// bf16 build: besides the rounding of the results, states are kept in bf16 between the passes, and dB and dC are sums of products of bf16
// values, as many independent roundings of 2^-9: 2.4e-3 altogether, within tolerance<bf16>.
TEST(ScanGpu, MatchesTwin) {
    REQUIRE_GPU();
    for (const ScanCase& c : SCAN_CASES) {
        ScanData d(c, 41);
        d.round<floatX>();
        expect_close(run_gpu(d), run_twin<double>(d), tolerance<floatX>(), name_of(c));
    }
}

// At the statistics of training: what the results may be off for bf16 inputs. Sums over time are closer than their terms.
TEST(ScanGpu, ErrorBounds) {
    REQUIRE_GPU();
    const double bound = sizeof(floatX) == 2 ? 4e-3 : 1e-5, sum_bound = sizeof(floatX) == 2 ? 2e-3 : 1e-5;
    for (const ScanCase& c : {ScanCase{4, 512, 192, 16, 96, false}, ScanCase{132, 64, 192, 16, 96, false}, ScanCase{1, 4099, 72, 16, 8, false}}) {
        ScanData d(c, 45);
        d.round<floatX>();
        const ScanResult got = run_gpu(d), want = run_twin<double>(d);
        expect_close(got, want, bound, name_of(c));
        EXPECT_LT(rel_l2(got.dA_log, want.dA_log), sum_bound) << name_of(c);
        EXPECT_LT(rel_l2(got.dD, want.dD), sum_bound) << name_of(c);
        EXPECT_LT(rel_l2(got.ddt_bias, want.ddt_bias), sum_bound) << name_of(c);
    }
}

TEST(ScanGpu, Extremes) {
    REQUIRE_GPU();
    for (ScanData& d : extreme_problems()) {
        d.round<floatX>();
        // Gradients may be 1e-13: added to zeros. The error is infinite where anything is not finite.
        expect_close(run_gpu(d, 0.f), run_twin<double>(d), tolerance<floatX>(), name_of_extreme(d));
    }
}

// Whole tiles and tails, segments, groups of states
TEST(ScanGpu, SameBitsEveryTime) {
    REQUIRE_GPU();
    for (const ScanCase& c : {ScanCase{8, 256, 1056, 16, 8}, ScanCase{2, 300, 200, 16, 8}, ScanCase{132, 45, 136, 16, 8}, ScanCase{1, 5000, 40, 16},
                              ScanCase{1, 400, 1608, 16}, ScanCase{1, 100, 40, 64}}) {
        const ScanData d(c, 51);
        GpuScan scan(d);
        scan.run();
        const std::vector<char> first = scan.bytes();
        for (int i = 1; i < 100; i++) {
            scan.run();
            ASSERT_EQ(first, scan.bytes()) << name_of(c) << ": run " << i;
        }
    }
}

// Offsets past 2^31: the last 16 channels of a sequence so long, and dB and dC of its last step, which are sums over all channels.
TEST(ScanGpu, MoreThan2To31Elements) {
    REQUIRE_GPU();
    using namespace bench;
    const Problem s{1, 700001, 3072};
    ASSERT_GT(s.elements(), (int64_t)1 << 31);
    const double need = 10.0 * s.elements() * sizeof(floatX) + gpu::selective_scan_saved(s.B, s.T, s.e, N) +
                        gpu::selective_scan_workspace(s.B, s.T, s.e, N) + (1 << 30);
    if ((double)device_free_bytes() < need) GTEST_SKIP() << "needs a GPU with " << (int)std::ceil(need / (1 << 30)) << " GiB of free memory";
    const Layer l(s, 1);
    const Rotating<float> h((int64_t)s.e * N, 1);
    l.reset();
    gpu::selective_scan_forward(l.out[0], l.saved[0], h[0], l.u[0], l.dt[0], l.bc[0] + GAP, LDBC, l.xz[0] + s.e, 2 * s.e, l.A_log[0], l.D[0],
                                l.dt_bias[0], nullptr, l.workspace, s.B, s.T, s.e, N, Stream{});
    scan_backward(l, 0);
    stream_sync(Stream{});
    const Slice slice{0, 1, s.e - 16, 16};
    const auto got = written(l, Kind::SCAN_GRADIENT, slice);
    const auto want = twin_of_scan(l, Kind::SCAN_GRADIENT, slice);
    ASSERT_EQ(got.size(), 7u);                                        // all but dbc
    for (size_t i = 0; i < got.size(); i++) EXPECT_LT(rel_l2(got[i].values, want[i]), got[i].bound) << got[i].name;

    const int64_t row = s.T - 1;
    const auto u = to_host(l.u[0] + row * s.e, s.e), dt_raw = to_host(l.dt[0] + row * s.e, s.e), z = to_host(l.xz[0] + row * 2 * s.e + s.e, s.e),
               g = to_host(l.dout[0] + row * s.e, s.e);
    const auto bias = to_host(l.dt_bias[0], s.e), states = to_host(h[0], (int64_t)s.e * N), bc = to_host(l.bc[0] + row * LDBC + GAP, 2 * N);
    // lambda of the last step is C dy, so dB is one sum over channels, whose terms may nearly cancel: the error is taken relative to the
    // root of the sum of the terms' squares, which is what roundings of the terms amount to
    std::vector<double> last(2 * N);
    double squares = 0;
    for (int c = 0; c < s.e; c++) {
        const double dy = g[c] * z[c] * cpu::sigmoid(z[c]), input = cpu::softplus(dt_raw[c] + bias[c]) * u[c];
        for (int n = 0; n < N; n++) {
            const double dB = bc[N + n] * dy * input, dC = dy * states[c * N + n];
            last[n] += dB, last[N + n] += dC, squares += dB * dB + dC * dC;
        }
    }
    const auto dbc = to_host(l.dbc[0] + row * LDBC + GAP, 2 * N);
    double error = 0;
    for (int n = 0; n < 2 * N; n++) error += (dbc[n] - last[n]) * (dbc[n] - last[n]);
    EXPECT_LT(std::sqrt(error / squares), BOUND);
}

// A sequence in chunks, the state handed on in place, nothing saved. The whole may be split into segments and the chunks not.
TEST(ScanGpu, ChunksMakeTheWhole) {
    REQUIRE_GPU();
    for (const ScanCase& c : {ScanCase{1, 1000, 72, 16, 8}, ScanCase{1, 200, 33, 40, 1}}) {
        ScanData d(c, 61);
        d.round<floatX>();
        const ScanResult want = run_twin<double>(d, false);
        DeviceBuffer<floatX> u(to_type<floatX>(d.u)), dt_raw(to_type<floatX>(d.dt_raw)), bc(to_type<floatX>(d.bc)), z(to_type<floatX>(d.z)),
            out(d.u.size());
        DeviceBuffer<float> A_log(to_type<float>(d.A_log)), D(to_type<float>(d.D)), dt_bias(to_type<float>(d.dt_bias)), h(to_type<float>(d.h_in));
        DeviceBuffer<char> workspace(gpu::selective_scan_workspace(1, c.T, c.e, c.N));
        const int64_t ends[] = {1, 2, 17, 100, 132, c.T};
        int64_t at = 0;
        for (int64_t end : ends) {
            gpu::selective_scan_forward(out.ptr + at * c.e, nullptr, h.ptr, u.ptr + at * c.e, dt_raw.ptr + at * c.e, bc.ptr + c.gap + at * d.ldbc,
                                        d.ldbc, z.ptr + c.gap + at * d.ldz, d.ldz, A_log.ptr, D.ptr, dt_bias.ptr, h.ptr, workspace.ptr, 1, end - at,
                                        c.e, c.N, Stream{});
            at = end;
        }
        EXPECT_LT(rel_l2(to_double(out.host()), want.out), tolerance<floatX>()) << name_of(c);
        EXPECT_LT(rel_l2(to_double(h.host()), want.h_out), 1e-5) << name_of(c);
    }
}

TEST(ScanGpu, RefusesTooManyStates) {
    REQUIRE_GPU();
    EXPECT_THROW(gpu::selective_scan_forward(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, 0, nullptr, 0, nullptr, nullptr, nullptr, nullptr,
                                             nullptr, 1, 1, 1, 257, Stream{}),
                 Error);
}
#endif

} // namespace
