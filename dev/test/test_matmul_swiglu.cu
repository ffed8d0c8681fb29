// Products with SwiGLU behind or before them: gradients against finite differences; on a GPU both the one-kernel form and the one of several
// kernels, at sizes that divide nothing, every element written, the same bits every time.
#include "../../kernels/cpu/matmul_swiglu.h"
#ifndef SAMBA_CPU
#include "../../kernels/matmul_swiglu.cuh"
#endif
#include "test_util.h"

namespace {

TEST(MatmulSwiGLU, BackwardMatchesFiniteDifferences) {
    const int64_t M = 3;
    const int F = 7, d = 5;
    cpu::Matmul matmul;
    const auto n = random_values(M * d, 1), w12 = random_values(2 * F * d, 2), w3 = random_values(d * F, 3), dy = random_values(M * d, 4);
    std::vector<double> gate_up(M * 2 * F), h(M * F), y(M * d), dgate_up(M * 2 * F, NAN), h_again(M * F, NAN), dh(M * F, NAN);
    cpu::matmul_swiglu_forward(matmul, h.data(), gate_up.data(), n.data(), w12.data(), M, F, d);
    cpu::matmul_swiglu_backward(matmul, dgate_up.data(), h_again.data(), dh.data(), dy.data(), w3.data(), gate_up.data(), M, F, d);
    EXPECT_EQ(h, h_again);
    auto loss = [&] {                                      // <dy, w3 h>
        cpu::swiglu_forward(h.data(), gate_up.data(), M, F);
        cpu::matmul_forward(matmul, y.data(), d, h.data(), F, w3.data(), M, d, F);
        double sum = 0;
        for (size_t i = 0; i < y.size(); i++) sum += y[i] * dy[i];
        return sum;
    };
    expect_gradient(loss, gate_up, dgate_up, "dgate_up");
}

#ifndef SAMBA_CPU
struct Sizes { int64_t M; int F, d; bool with_h; };

// One call on the GPU against the twin in double
struct Case {
    Sizes s;
    std::vector<double> n, w12, w3, dy, gate_up, h, dgate_up;
    explicit Case(Sizes s) : s(s), gate_up(s.M * 2 * s.F), h(s.M * s.F), dgate_up(s.M * 2 * s.F) {
        const auto [M, F, d, with_h] = s;
        n = rounded<floatX>(random_values(M * d, 1, 2)), w12 = rounded<floatX>(random_values((size_t)2 * F * d, 2, 2 / std::sqrt(d)));
        w3 = rounded<floatX>(random_values((size_t)d * F, 3)), dy = rounded<floatX>(random_values(M * d, 4));
        cpu::Matmul matmul;
        std::vector<double> dh(M * F);
        cpu::matmul_swiglu_forward(matmul, h.data(), gate_up.data(), n.data(), w12.data(), M, F, d);
        cpu::matmul_swiglu_backward(matmul, dgate_up.data(), (double*)nullptr, dh.data(), dy.data(), w3.data(), rounded<floatX>(gate_up).data(), M, F,
                                    d);
    }
    void check(gpu::Matmul& matmul) const {
        const auto [M, F, d, with_h] = s;
        DeviceBuffer<floatX> N(to_type<floatX>(n)), W12(to_type<floatX>(w12)), W3(to_type<floatX>(w3)), DY(to_type<floatX>(dy));
        DeviceBuffer<floatX> given(to_type<floatX>(gate_up));
        DeviceBuffer<floatX> H(M * F), GATE_UP(M * 2 * F), DGATE_UP(M * 2 * F), H_AGAIN(M * F), DH(M * F);
        gpu::matmul_swiglu_forward(matmul, H.ptr, GATE_UP.ptr, N.ptr, W12.ptr, M, F, d, Stream{});
        EXPECT_LT(rel_l2(to_double(GATE_UP.host()), gate_up), tolerance<floatX>());
        EXPECT_LT(rel_l2(to_double(H.host()), h), tolerance<floatX>());
        gpu::matmul_swiglu_backward(matmul, DGATE_UP.ptr, with_h ? H_AGAIN.ptr : nullptr, DH.ptr, DY.ptr, W3.ptr, given.ptr, M, F, d, Stream{});
        EXPECT_LT(rel_l2(to_double(DGATE_UP.host()), dgate_up), tolerance<floatX>());
        if (!with_h) return;
        gpu::matmul_swiglu_backward(matmul, DGATE_UP.ptr, H_AGAIN.ptr, DH.ptr, DY.ptr, W3.ptr, GATE_UP.ptr, M, F, d, Stream{});
        EXPECT_EQ(to_double(H_AGAIN.host()), to_double(H.host())) << "what backward makes again has forward's bits";
    }
};

TEST(MatmulSwiGLUGpu, MatchesTwin) {
    REQUIRE_GPU();
    gpu::Matmul matmul;
    // F a multiple of 256: one kernel on Hopper, with rows and d that end inside a tile, one row, and more tiles than blocks
    for (const Sizes s : {Sizes{1, 256, 8, true}, {300, 512, 200, true}, {1000, 256, 136, false}, {129, 1024, 64, true}, {5000, 1024, 72, false},
                          {5, 40, 24, true}, {77, 264, 96, false}}) {
        SCOPED_TRACE("M " + std::to_string(s.M) + " F " + std::to_string(s.F) + " d " + std::to_string(s.d));
        Case(s).check(matmul);
    }
}

// Gates so large that exp overflows, and a gradient for each
TEST(MatmulSwiGLUGpu, LargeGates) {
    REQUIRE_GPU();
    const int64_t M = 128;
    const int F = 256, d = 64;
    gpu::Matmul matmul;
    std::vector<double> gate_up(M * 2 * F), ones(M * d, 1), w3(d * F, 1. / d);          // dh = 1
    const double gates[] = {-1e30, -200, 0, 200, 1e30}, expected_da[] = {0, 0, 2.5, 5, 5}, expected_db[] = {0, 0, 0, 200, 1e30};   // b = 5
    for (int64_t i = 0; i < M * 2 * F; i++) gate_up[i] = i / F % 2 ? 5 : gates[i % 5];
    DeviceBuffer<floatX> given(to_type<floatX>(gate_up)), dy(to_type<floatX>(ones)), w(to_type<floatX>(w3)), out(M * 2 * F), dh(M * F);
    gpu::matmul_swiglu_backward(matmul, out.ptr, nullptr, dh.ptr, dy.ptr, w.ptr, given.ptr, M, F, d, Stream{});
    const auto result = to_double(out.host()), given_rounded = rounded<floatX>(gate_up);
    for (int64_t row = 0; row < M; row++)
        for (int j = 0; j < F; j++) {
            const int64_t at = row * 2 * F + j;
            ASSERT_EQ(result[at], expected_da[at % 5]) << "gate " << given_rounded[at];
            ASSERT_EQ(result[at + F], rounded<floatX>({expected_db[at % 5]})[0]) << "gate " << given_rounded[at];
        }
}

TEST(MatmulSwiGLUGpu, SameBitsEveryTime) {
    REQUIRE_GPU();
    const int64_t M = 3000;
    const int F = 1024, d = 256;
    gpu::Matmul matmul;
    DeviceBuffer<floatX> n(to_type<floatX>(random_values(M * d, 1))), w(to_type<floatX>(random_values((size_t)2 * F * d, 2, 0.1)));
    DeviceBuffer<floatX> gate_up(M * 2 * F), h(M * F), dgate_up(M * 2 * F), dh(M * F);
    std::vector<double> first[3];
    for (int run = 0; run < 100; run++) {
        for (auto* b : {&gate_up, &h, &dgate_up, &dh}) b->poison();
        gpu::matmul_swiglu_forward(matmul, h.ptr, gate_up.ptr, n.ptr, w.ptr, M, F, d, Stream{});
        gpu::matmul_swiglu_backward(matmul, dgate_up.ptr, nullptr, dh.ptr, n.ptr, w.ptr, gate_up.ptr, M, F, d, Stream{});
        if (run > 0 && run % 25 != 24) continue;          // read back a few: the host's conversions take longest
        const std::vector<double> now[3] = {to_double(gate_up.host()), to_double(h.host()), to_double(dgate_up.host())};
        for (int i = 0; i < 3; i++) {
            if (run == 0) first[i] = now[i];
            ASSERT_EQ(now[i], first[i]) << "run " << run;
        }
    }
}
#endif

} // namespace
