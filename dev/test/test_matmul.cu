// Matrix products: gradients against finite differences; every product at awkward sizes, with rows further apart than wide.
#include "../../kernels/cpu/matmul.h"
#ifndef SAMBA_CPU
#include "../../kernels/matmul.cuh"
#endif
#include "test_util.h"

namespace {

TEST(Matmul, GradientsMatchFiniteDifferences) {
    const int64_t M = 3, ldx = 7, ldy = 9;
    const int N = 6, K = 5;
    cpu::Matmul matmul;
    auto x = random_values(M * ldx, 1), w = random_values(N * K, 2);
    const auto dy = random_values(M * ldy, 3);
    std::vector<double> y(M * ldy, 0.0), dx(M * ldx, 0.0), dw(N * K, 0.0);
    cpu::matmul_dgrad(matmul, dx.data(), ldx, dy.data(), ldy, w.data(), M, N, K, false);
    cpu::matmul_wgrad(matmul, dw.data(), dy.data(), ldy, x.data(), ldx, M, N, K, true);
    auto f = [&] {
        cpu::matmul_forward(matmul, y.data(), ldy, x.data(), ldx, w.data(), M, N, K);
        double sum = 0;
        for (int64_t i = 0; i < M; i++)
            for (int j = 0; j < N; j++) sum += y[i * ldy + j] * dy[i * ldy + j];
        return sum;
    };
    expect_gradient(f, x, dx, "dx");
    expect_gradient(f, w, dw, "dw");
    for (int64_t i = 0; i < M; i++) EXPECT_EQ(y[i * ldy + N], 0) << "nothing is written between the rows";
    auto twice = dx, dw_twice = dw;
    cpu::matmul_dgrad(matmul, twice.data(), ldx, dy.data(), ldy, w.data(), M, N, K, true);
    cpu::matmul_wgrad(matmul, dw_twice.data(), dy.data(), ldy, x.data(), ldx, M, N, K, true);
    for (size_t i = 0; i < dx.size(); i++) EXPECT_NEAR(twice[i], 2 * dx[i], 1e-12);
    for (size_t i = 0; i < dw.size(); i++) EXPECT_NEAR(dw_twice[i], 2 * dw[i], 1e-12);
}

struct Sizes { int64_t M; int N, K; int64_t pad; };   // pad: elements between rows of x, y, dx, dy
const Sizes SIZES[] = {{1, 33, 5, 0}, {1, 1, 1, 2}, {5, 1, 33, 3}, {7, 33, 100, 0}, {7, 33, 100, 5}, {129, 96, 176, 8}, {64, 128, 64, 0},
                       {300, 250, 40, 2}, {33, 264, 72, 24}, {1, 1536, 512, 0}, {513, 128, 512, 16}};

// The four products in double: what the float and the GPU versions are compared with
struct Products {
    Sizes s;
    int64_t ldx, ldy;
    std::vector<double> x, w, dy, residual, dx_start, dw_start, y, y_residual, dx, dx_added, dw, dw_alone, packed_x;
    template <class X> static Products make(Sizes s) {
        Products p;
        const auto [M, N, K, pad] = s;
        p.s = s, p.ldx = K + pad, p.ldy = N + pad;
        p.x = rounded<X>(random_values(M * p.ldx, 1)), p.w = rounded<X>(random_values((size_t)N * K, 2));
        p.dy = rounded<X>(random_values(M * p.ldy, 3)), p.residual = rounded<float>(random_values(M * N, 4));
        p.dx_start = rounded<X>(random_values(M * p.ldx, 5)), p.dw_start = rounded<float>(random_values((size_t)N * K, 6));
        for (int64_t i = 0; i < M; i++) p.packed_x.insert(p.packed_x.end(), p.x.begin() + i * p.ldx, p.x.begin() + i * p.ldx + K);
        p.y.assign(M * p.ldy, 0), p.y_residual.assign(M * N, 0), p.dx.assign(M * p.ldx, 0);
        p.dx_added = p.dx_start, p.dw = p.dw_start, p.dw_alone = p.dw_start;
        cpu::Matmul matmul;
        cpu::matmul_forward(matmul, p.y.data(), p.ldy, p.x.data(), p.ldx, p.w.data(), M, N, K);
        cpu::matmul_residual(matmul, p.y_residual.data(), p.residual.data(), p.packed_x.data(), p.w.data(), M, N, K);
        cpu::matmul_dgrad(matmul, p.dx.data(), p.ldx, p.dy.data(), p.ldy, p.w.data(), M, N, K, false);
        cpu::matmul_dgrad(matmul, p.dx_added.data(), p.ldx, p.dy.data(), p.ldy, p.w.data(), M, N, K, true);
        cpu::matmul_wgrad(matmul, p.dw.data(), p.dy.data(), p.ldy, p.x.data(), p.ldx, M, N, K, true);
        cpu::matmul_wgrad(matmul, p.dw_alone.data(), p.dy.data(), p.ldy, p.x.data(), p.ldx, M, N, K, false);
        return p;
    }
    std::string name() const {
        return "M " + std::to_string(s.M) + " N " + std::to_string(s.N) + " K " + std::to_string(s.K) + " pad " + std::to_string(s.pad);
    }
};

TEST(Matmul, FloatTwin) {
    for (Sizes s : SIZES) {
        const auto p = Products::make<float>(s);
        SCOPED_TRACE(p.name());
        const auto [M, N, K, pad] = s;
        cpu::Matmul matmul;
        const auto x = to_type<float>(p.x), packed = to_type<float>(p.packed_x), w = to_type<float>(p.w), dy = to_type<float>(p.dy);
        const auto residual = to_type<float>(p.residual);
        std::vector<float> y(M * p.ldy, 0), y_residual(M * N, NAN), dx(M * p.ldx, 0);
        auto dx_added = to_type<float>(p.dx_start), dw = to_type<float>(p.dw_start), in_place = residual;
        cpu::matmul_forward(matmul, y.data(), p.ldy, x.data(), p.ldx, w.data(), M, N, K);
        cpu::matmul_residual(matmul, y_residual.data(), residual.data(), packed.data(), w.data(), M, N, K);
        cpu::matmul_residual(matmul, in_place.data(), in_place.data(), packed.data(), w.data(), M, N, K);
        cpu::matmul_dgrad(matmul, dx.data(), p.ldx, dy.data(), p.ldy, w.data(), M, N, K, false);
        cpu::matmul_dgrad(matmul, dx_added.data(), p.ldx, dy.data(), p.ldy, w.data(), M, N, K, true);
        auto dw_alone = dw;
        cpu::matmul_wgrad(matmul, dw.data(), dy.data(), p.ldy, x.data(), p.ldx, M, N, K, true);
        cpu::matmul_wgrad(matmul, dw_alone.data(), dy.data(), p.ldy, x.data(), p.ldx, M, N, K, false);
        const double tol = tolerance<float>();
        EXPECT_LT(rel_l2(to_double(y), p.y), tol);
        EXPECT_LT(rel_l2(to_double(y_residual), p.y_residual), tol);
        EXPECT_LT(rel_l2(to_double(in_place), p.y_residual), tol);
        EXPECT_LT(rel_l2(to_double(dx), p.dx), tol);
        EXPECT_LT(rel_l2(to_double(dx_added), p.dx_added), tol);
        EXPECT_LT(rel_l2(to_double(dw), p.dw), tol);
        EXPECT_LT(rel_l2(to_double(dw_alone), p.dw_alone), tol);
    }
}

#ifndef SAMBA_CPU
std::vector<double> columns(const std::vector<double>& a, int64_t rows, int64_t ld, int width) {
    std::vector<double> out;
    for (int64_t i = 0; i < rows; i++) out.insert(out.end(), a.begin() + i * ld, a.begin() + i * ld + width);
    return out;
}

TEST(Matmul, Gpu) {
    REQUIRE_GPU();
    gpu::Matmul matmul;
    for (Sizes s : SIZES) {
        const auto p = Products::make<floatX>(s);
        SCOPED_TRACE(p.name());
        const auto [M, N, K, pad] = s;
        DeviceBuffer<floatX> x(to_type<floatX>(p.x)), packed(to_type<floatX>(p.packed_x)), w(to_type<floatX>(p.w)), dy(to_type<floatX>(p.dy));
        DeviceBuffer<floatX> y(M * p.ldy), dx(M * p.ldx), dx_added(to_type<floatX>(p.dx_start));
        DeviceBuffer<float> residual(to_type<float>(p.residual)), y_residual(M * N), dw(to_type<float>(p.dw_start));
        const double tol = tolerance<floatX>(), float_tol = tolerance<float>();
        gpu::matmul_forward(matmul, y.ptr, p.ldy, x.ptr, p.ldx, w.ptr, M, N, K, Stream{});
        EXPECT_LT(rel_l2(columns(to_double(y.host()), M, p.ldy, N), columns(p.y, M, p.ldy, N)), tol);
        if (pad)
            for (int64_t i = 0; i < M; i++) EXPECT_TRUE(std::isnan(convert_from(y.host()[i * p.ldy + N]))) << "written between the rows";
        gpu::matmul_residual(matmul, y_residual.ptr, residual.ptr, packed.ptr, w.ptr, M, N, K, Stream{});
        EXPECT_LT(rel_l2(to_double(y_residual.host()), p.y_residual), float_tol);
        gpu::matmul_residual(matmul, residual.ptr, residual.ptr, packed.ptr, w.ptr, M, N, K, Stream{});
        EXPECT_LT(rel_l2(to_double(residual.host()), p.y_residual), float_tol) << "in place";
        gpu::matmul_dgrad(matmul, dx.ptr, p.ldx, dy.ptr, p.ldy, w.ptr, M, N, K, false, Stream{});
        EXPECT_LT(rel_l2(columns(to_double(dx.host()), M, p.ldx, K), columns(p.dx, M, p.ldx, K)), tol);
        gpu::matmul_dgrad(matmul, dx_added.ptr, p.ldx, dy.ptr, p.ldy, w.ptr, M, N, K, true, Stream{});
        EXPECT_LT(rel_l2(to_double(dx_added.host()), p.dx_added), tol) << "accumulated, and unchanged between the rows";
        gpu::matmul_wgrad(matmul, dw.ptr, dy.ptr, p.ldy, x.ptr, p.ldx, M, N, K, true, Stream{});
        EXPECT_LT(rel_l2(to_double(dw.host()), p.dw), float_tol);
        gpu::matmul_wgrad(matmul, dw.ptr, dy.ptr, p.ldy, x.ptr, p.ldx, M, N, K, false, Stream{});
        EXPECT_LT(rel_l2(to_double(dw.host()), p.dw_alone), float_tol);
    }
}

// A second call of a shape finds its plan and gives the same bits; a pointer that is aligned differently gets a plan of its own.
TEST(Matmul, PlansAreKept) {
    REQUIRE_GPU();
    gpu::Matmul matmul;
    const int64_t M = 257;
    const int N = 128, K = 96;
    DeviceBuffer<floatX> x(to_type<floatX>(random_values(M * K + 1, 1))), w(to_type<floatX>(random_values(N * K, 2))), y(M * N), again(M * N);
    gpu::matmul_forward(matmul, y.ptr, N, x.ptr, K, w.ptr, M, N, K, Stream{});
    gpu::matmul_forward(matmul, again.ptr, N, x.ptr, K, w.ptr, M, N, K, Stream{});
    EXPECT_EQ(matmul.plans.size(), 1u);
    EXPECT_EQ(to_double(y.host()), to_double(again.host()));
    gpu::matmul_forward(matmul, again.ptr, N, x.ptr + 1, K, w.ptr, M, N, K, Stream{});
    EXPECT_EQ(matmul.plans.size(), 2u);
    for (double v : to_double(again.host())) ASSERT_TRUE(std::isfinite(v));
}

// A rehearsal times the candidates; what it chose is right, is found by a later Matmul that is given the choices, and gives the same
// bits there. Words that are no algorithm are not run.
TEST(Matmul, GpuChoicesOfARehearsalAreRepeated) {
    REQUIRE_GPU();
    const int64_t M = 512;
    const int N = 384, K = 256;
    const auto x_values = rounded<floatX>(random_values(M * K, 1)), w_values = rounded<floatX>(random_values(N * K, 2));
    DeviceBuffer<floatX> x(to_type<floatX>(x_values)), w(to_type<floatX>(w_values)), y(M * N), again(M * N);
    std::vector<double> expected(M * N);
    cpu::Matmul plain;
    cpu::matmul_forward(plain, expected.data(), N, x_values.data(), K, w_values.data(), M, N, K);
    gpu::Matmul timed, repeated, broken;
    timed.rehearsal = true;
    gpu::matmul_forward(timed, y.ptr, N, x.ptr, K, w.ptr, M, N, K, Stream{});
    ASSERT_EQ(timed.choices.size(), 1u);
    EXPECT_GT(timed.choices.begin()->second.ms, 0);
    EXPECT_LE(timed.choices.begin()->second.ms, timed.choices.begin()->second.first_ms);
    EXPECT_LT(rel_l2(to_double(y.host()), expected), tolerance<floatX>());
    repeated.choices = broken.choices = timed.choices;
    gpu::matmul_forward(repeated, again.ptr, N, x.ptr, K, w.ptr, M, N, K, Stream{});
    EXPECT_EQ(to_double(y.host()), to_double(again.host()));
    EXPECT_EQ(gpu::to_choice(repeated.plans.begin()->second.algorithm).algorithm, timed.choices.begin()->second.algorithm);
    broken.choices.begin()->second.algorithm.fill(~0ull);
    gpu::matmul_forward(broken, again.ptr, N, x.ptr, K, w.ptr, M, N, K, Stream{});
    EXPECT_TRUE(broken.choices.empty());
    EXPECT_LT(rel_l2(to_double(again.host()), expected), tolerance<floatX>());
}
#endif

} // namespace
