// Backward of the convolution and x_proj in one call: the GPU, fused and not, against the twin in double, which is the three operations.
#include "../../kernels/ops.cuh"
#include "conv_inputs.h"

namespace {

struct Case {
    int B;
    int64_t T;
    int e, K, gap = 0;      // gap: columns behind the e used ones in rows of x and dx
    bool halo = true, accumulate = true;
};
struct Inputs : ConvInputs {
    Case problem;
    std::vector<double> dx_dbl /*(B,T,K)*/, w_x /*(K,e)*/;
    Inputs(const Case& c, uint64_t seed) : ConvInputs({c.B, c.T, c.e, c.gap, c.halo}, seed), problem(c) {
        dx_dbl = rounded<floatX>(random_values(c.B * c.T * c.K, seed + 6, 0.5));
        w_x = rounded<floatX>(random_values((size_t)c.K * c.e, seed + 7, 0.5));
        round<floatX>();
    }
};
struct Gradients {
    std::vector<double> dx, dw_x, dw, db;
    bool operator==(const Gradients&) const = default;
};
constexpr double BEFORE = 1;                           // in what is added to

Gradients run_twin(const Inputs& in) {
    const auto& [B, T, e, K, gap, has_halo, accumulate] = in.problem;
    std::vector<double> u(in.du.size()), du = in.du, space(cpu::x_proj_conv_backward_workspace(B, T, e, K) / sizeof(double) + 1);
    const auto zeros = [](const std::vector<double>& like) { return std::vector<double>(like.size()); };
    Gradients r{zeros(in.x), zeros(in.w_x), zeros(in.w), zeros(in.b)};
    cpu::Matmul matmul;
    cpu::conv1d_forward(u.data(), (double*)nullptr, in.x.data(), in.ldx, in.halo_in(), in.w.data(), in.b.data(), B, T, e);
    cpu::x_proj_conv_backward(matmul, r.dx.data(), in.ldx, r.dw_x.data(), false, r.dw.data(), r.db.data(), du.data(), in.dx_dbl.data(),
                              in.w_x.data(), u.data(), in.x.data(), in.ldx, in.halo_in(), in.w.data(), in.b.data(), space.data(), B, T, e, K);
    return r;
}

// The twin is the gradient of sum(u du) + sum(u Wx^T dx_dbl): the loss whose gradients in u and in x_proj's result the inputs are
TEST(XProjConvCpu, IsTheGradient) {
    for (const Case& c : {Case{2, 5, 6, 7, 2}, Case{1, 40, 3, 5, 0, false}}) {
        Inputs in(c, 11);
        const Gradients gradient = run_twin(in);
        const auto loss = [&] {
            std::vector<double> u(in.du.size());
            cpu::conv1d_forward(u.data(), (double*)nullptr, in.x.data(), in.ldx, in.halo_in(), in.w.data(), in.b.data(), c.B, c.T, c.e);
            double sum = 0;
            for (int64_t t = 0; t < c.B * c.T; t++)
                for (int i = 0; i < c.e; i++) {
                    double g = in.du[t * c.e + i];
                    for (int k = 0; k < c.K; k++) g += in.dx_dbl[t * c.K + k] * in.w_x[k * c.e + i];
                    sum += u[t * c.e + i] * g;
                }
            return sum;
        };
        expect_gradient(loss, in.x, gradient.dx, "dx");
        expect_gradient(loss, in.w_x, gradient.dw_x, "dw_x");
        expect_gradient(loss, in.w, gradient.dw, "dw");
        expect_gradient(loss, in.b, gradient.db, "db");
    }
}

#ifndef SAMBA_CPU
std::string name_of(const Case& c) {
    const auto number = [](int64_t n) { return " " + std::to_string(n); };
    return "B" + number(c.B) + " T" + number(c.T) + " e" + number(c.e) + " K" + number(c.K) + (c.halo ? " halo" : "");
}

struct OnGpu {
    const Inputs& in;
    DeviceBuffer<floatX> x, halo, dx_dbl, w_x, u, du, dx;
    DeviceBuffer<float> w, b, dw_x, dw, db;
    DeviceBuffer<char> workspace;
    gpu::Matmul matmul;
    explicit OnGpu(const Inputs& in)
        : in(in), x(to_type<floatX>(in.x)), halo(to_type<floatX>(in.halo)), dx_dbl(to_type<floatX>(in.dx_dbl)), w_x(to_type<floatX>(in.w_x)),
          u(in.du.size()), du(in.du.size()), dx(in.x.size()), w(to_type<float>(in.w)), b(to_type<float>(in.b)), dw_x(in.w_x.size()), dw(in.w.size()),
          db(in.b.size()), workspace(gpu::x_proj_conv_backward_workspace(in.c.B, in.c.T, in.c.e, in.problem.K)) {
        gpu::conv1d_forward(u.ptr, nullptr, x.ptr, in.ldx, halo_in(), w.ptr, b.ptr, in.c.B, in.c.T, in.c.e, Stream{});
    }
    const floatX* halo_in() const { return in.c.halo ? halo.ptr : nullptr; }
    Gradients run() {
        const auto& [B, T, e, K, gap, _, accumulate] = in.problem;
        dx.poison(), workspace.poison(), du.set(to_type<floatX>(in.du));
        for (auto* v : {&dw, &db}) v->set(std::vector<float>(v->size, BEFORE));
        if (accumulate) dw_x.set(std::vector<float>(dw_x.size, BEFORE));
        else dw_x.poison();
        gpu::x_proj_conv_backward(matmul, dx.ptr, in.ldx, dw_x.ptr, accumulate, dw.ptr, db.ptr, du.ptr, dx_dbl.ptr, w_x.ptr, u.ptr, x.ptr, in.ldx,
                                  halo_in(), w.ptr, b.ptr, workspace.ptr, B, T, e, K, Stream{});
        Gradients r{used_columns(to_double(dx.host()), in.ldx, 0, e), to_double(dw_x.host()), to_double(dw.host()), to_double(db.host())};
        for (auto* v : {&r.dw, &r.db})
            for (double& g : *v) g -= BEFORE;
        if (accumulate)
            for (double& g : r.dw_x) g -= BEFORE;
        return r;
    }
};

// Where it is three operations, du is rounded to floatX between them. u is rounded for the product in any case.
void expect_match(const Case& c, double tolerance_of_sums) {
    const Inputs in(c, 31);
    OnGpu on(in);
    const Gradients got = on.run(), want = run_twin(in);
    EXPECT_LT(rel_l2(got.dx, want.dx), tolerance<floatX>()) << name_of(c);
    EXPECT_LT(rel_l2(got.dw_x, want.dw_x), tolerance<floatX>()) << name_of(c);
    EXPECT_LT(rel_l2(got.dw, want.dw), tolerance_of_sums) << name_of(c);
    EXPECT_LT(rel_l2(got.db, want.db), tolerance_of_sums) << name_of(c);
}

TEST(XProjConvGpu, FusedMatchesTwin) {
    REQUIRE_GPU();
    const bool fused = sizeof(floatX) == 2 && gpu::sm90::usable();              // du stays fp32: dw and db are as exact as that
    for (const Case& c : {Case{1, 32, 128, 128, 0, false, false}, Case{2, 72, 256, 128, 8}, Case{3, 1000, 192, 96, 0, true, false},
                          Case{1, 8, 64, 40, 8, false}, Case{5, 96, 384, 64, 64}, Case{2, 136, 448, 176, 8}, Case{1, 264, 128, 208, 0, true, false},
                          Case{1, 96, 128, 256, 0, false}, Case{2, 704, 3072, 128, 3072}})      // the last: several blocks in a sequence
        expect_match(c, fused ? 1e-5 : tolerance<floatX>());
}

TEST(XProjConvGpu, OddSizesMatchTwin) {
    REQUIRE_GPU();
    for (const Case& c : {Case{2, 67, 256, 128, 8}, Case{1, 1, 8, 8}, Case{1, 3, 72, 40, 8, false, false}, Case{2, 72, 136, 128},
                          Case{1, 48, 128, 36}, Case{1, 48, 128, 264, 0, true, false}, Case{2, 40, 33, 20, 7}, Case{2, 40, 32, 16, 4}})
        expect_match(c, tolerance<floatX>());
}

TEST(XProjConvGpu, SameBitsEveryTime) {
    REQUIRE_GPU();
    for (const Case& c : {Case{2, 504, 448, 128, 8}, Case{3, 336, 320, 176, 0, false, false}}) {
        const Inputs in(c, 41);
        OnGpu on(in);
        const Gradients first = on.run();
        for (int run = 0; run < 100; run++) ASSERT_TRUE(on.run() == first) << name_of(c) << ", run " << run;
    }
}
#endif

} // namespace
