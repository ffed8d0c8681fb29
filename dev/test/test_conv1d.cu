// Causal convolution with SiLU: the twin against the formula and finite differences; the GPU against the twin in double.
#include "../../kernels/ops.cuh"
#include "conv_inputs.h"

namespace {

const ConvCase CONV_CASES[] = {{1, 1, 8}, {2, 2, 3}, {2, 3, 16, 16}, {1, 4, 5, 2, false}, {3, 66, 40, 40}, {2, 67, 33, 7}, {1, 200, 1032, 8},
                               {2, 129, 12, 4, false}, {1, 64, 20, 3}};

struct ConvResult { std::vector<double> u, halo_out, dx, dw, db; };

template <class R> ConvResult run_twin(const ConvInputs& d) {
    const auto& [B, T, e, gap, has_halo] = d.c;
    const auto x = to_type<R>(d.x), halo = to_type<R>(d.halo), w = to_type<R>(d.w), b = to_type<R>(d.b), du = to_type<R>(d.du);
    const R* h = has_halo ? halo.data() : nullptr;
    std::vector<R> u(du.size()), halo_out(halo.size()), dx(x.size()), dw(w.size()), db(b.size());
    std::vector<char> workspace(cpu::conv1d_backward_workspace(B, T, e));
    cpu::conv1d_forward(u.data(), halo_out.data(), x.data(), d.ldx, h, w.data(), b.data(), B, T, e);
    cpu::conv1d_backward(dx.data(), d.ldx, dw.data(), db.data(), du.data(), x.data(), d.ldx, h, w.data(), b.data(), workspace.data(), B, T, e);
    return {to_double(u), to_double(halo_out), to_double(dx), to_double(dw), to_double(db)};
}

TEST(ConvCpu, IsTheFormula) {
    for (const ConvCase& c : CONV_CASES) {
        const ConvInputs d(c, 1);
        const ConvResult got = run_twin<double>(d);
        auto x = [&](int b, int64_t t, int i) {
            return t >= 0 ? d.x[(b * c.T + t) * d.ldx + i] : c.halo ? d.halo[(b * 3 + t + 3) * c.e + i] : 0.0;
        };
        std::vector<double> u(d.du.size()), halo(d.halo.size());
        for (int b = 0; b < c.B; b++)
            for (int i = 0; i < c.e; i++) {
                for (int64_t t = 0; t < c.T; t++) {
                    double s = d.b[i];
                    for (int k = 0; k < 4; k++) s += d.w[i * 4 + k] * x(b, t - 3 + k, i);
                    u[(b * c.T + t) * c.e + i] = s / (1 + std::exp(-s));
                }
                for (int k = 0; k < 3; k++) halo[(b * 3 + k) * c.e + i] = x(b, c.T - 3 + k, i);
            }
        EXPECT_LT(rel_l2(got.u, u), 1e-14);
        EXPECT_EQ(got.halo_out, halo);
    }
}

TEST(ConvCpu, BackwardIsTheGradient) {
    for (const ConvCase& c : CONV_CASES) {
        if (c.e > 100) continue;
        ConvInputs d(c, 11);
        const ConvResult gradient = run_twin<double>(d);
        auto loss = [&] {
            const ConvResult r = run_twin<double>(d);
            double sum = 0;
            for (size_t i = 0; i < r.u.size(); i++) sum += r.u[i] * d.du[i];
            return sum;
        };
        expect_gradient(loss, d.x, gradient.dx, "dx");
        expect_gradient(loss, d.w, gradient.dw, "dw");
        expect_gradient(loss, d.b, gradient.db, "db");
    }
}

TEST(ConvCpu, FloatMatchesDouble) {
    for (const ConvCase& c : CONV_CASES) {
        ConvInputs d(c, 21);
        d.round<float>();
        const ConvResult got = run_twin<float>(d), want = run_twin<double>(d);
        EXPECT_LT(rel_l2(got.u, want.u), 1e-6);
        EXPECT_LT(rel_l2(got.dx, want.dx), 1e-6);
        EXPECT_LT(rel_l2(got.dw, want.dw), 1e-5);
        EXPECT_LT(rel_l2(got.db, want.db), 1e-5);
    }
}

#ifndef SAMBA_CPU
ConvResult run_gpu(const ConvInputs& d) {
    const auto& [B, T, e, gap, has_halo] = d.c;
    DeviceBuffer<floatX> x(to_type<floatX>(d.x)), halo(to_type<floatX>(d.halo)), du(to_type<floatX>(d.du));
    DeviceBuffer<floatX> u(d.du.size()), halo_out(d.halo.size()), dx(d.x.size());
    DeviceBuffer<float> w(to_type<float>(d.w)), b(to_type<float>(d.b));
    DeviceBuffer<float> dw(std::vector<float>(d.w.size(), 1.f)), db(std::vector<float>(d.b.size(), 1.f));
    DeviceBuffer<char> workspace(gpu::conv1d_backward_workspace(B, T, e));
    const floatX* h = has_halo ? halo.ptr : nullptr;
    gpu::conv1d_forward(u.ptr, halo_out.ptr, x.ptr, d.ldx, h, w.ptr, b.ptr, B, T, e, Stream{});
    gpu::conv1d_backward(dx.ptr, d.ldx, dw.ptr, db.ptr, du.ptr, x.ptr, d.ldx, h, w.ptr, b.ptr, workspace.ptr, B, T, e, Stream{});
    ConvResult r{to_double(u.host()), to_double(halo_out.host()), used_columns(to_double(dx.host()), d.ldx, 0, e), to_double(dw.host()),
                 to_double(db.host())};
    for (auto* v : {&r.dw, &r.db})
        for (double& g : *v) g -= 1;                   // what was there before
    return r;
}

TEST(ConvGpu, MatchesTwin) {
    REQUIRE_GPU();
    std::vector<ConvCase> cases(std::begin(CONV_CASES), std::end(CONV_CASES));
    cases.push_back({2, 9001, 8, 8});                  // more rows than all blocks of the fewest rows have
    for (const ConvCase& c : cases) {
        ConvInputs d(c, 31);
        d.round<floatX>();
        const ConvResult got = run_gpu(d), want = run_twin<double>(d);
        const std::string name = "B " + std::to_string(c.B) + " T " + std::to_string(c.T) + " e " + std::to_string(c.e);
        EXPECT_LT(rel_l2(got.u, want.u), tolerance<floatX>()) << name;
        EXPECT_EQ(got.halo_out, want.halo_out) << name;
        EXPECT_LT(rel_l2(got.dx, want.dx), tolerance<floatX>()) << name;
        EXPECT_LT(rel_l2(got.dw, want.dw), 1e-5) << name;      // fp32 from the same bf16 inputs: nothing is rounded to bf16 on the way
        EXPECT_LT(rel_l2(got.db, want.db), 1e-5) << name;
    }
}

TEST(ConvGpu, SameBitsEveryTime) {
    REQUIRE_GPU();
    const ConvInputs d(ConvCase{2, 300, 136, 8}, 41);
    const ConvResult first = run_gpu(d), second = run_gpu(d);
    EXPECT_EQ(first.u, second.u);
    EXPECT_EQ(first.dx, second.dx);
    EXPECT_EQ(first.dw, second.dw);
    EXPECT_EQ(first.db, second.db);
}

// Chunks, the halo handed on in place, equal the whole bit for bit: every output is the same sum in the same order.
TEST(ConvGpu, ChunksMakeTheWhole) {
    REQUIRE_GPU();
    for (const ConvCase& c : {ConvCase{1, 60, 48, 16}, ConvCase{1, 60, 13, 1}}) {
        ConvInputs d(c, 51);
        const ConvResult want = run_gpu(d);
        DeviceBuffer<floatX> x(to_type<floatX>(d.x)), halo(to_type<floatX>(d.halo)), u(d.du.size());
        DeviceBuffer<float> w(to_type<float>(d.w)), b(to_type<float>(d.b));
        const int64_t ends[] = {1, 2, 4, 7, 24, 60};
        int64_t at = 0;
        for (int64_t end : ends) {
            gpu::conv1d_forward(u.ptr + at * c.e, halo.ptr, x.ptr + at * d.ldx, d.ldx, halo.ptr, w.ptr, b.ptr, 1, end - at, c.e, Stream{});
            at = end;
        }
        EXPECT_EQ(to_double(u.host()), want.u);
        EXPECT_EQ(to_double(halo.host()), want.halo_out);
    }
}
#endif

} // namespace
