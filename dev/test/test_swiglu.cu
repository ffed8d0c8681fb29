// SwiGLU: gradients against finite differences, and gates so large that exp overflows.
#include "../../kernels/cpu/swiglu.h"
#ifndef SAMBA_CPU
#include "../../kernels/swiglu.cuh"
#endif
#include "test_util.h"

namespace {

TEST(SwiGLU, BackwardMatchesFiniteDifferences) {
    const int64_t M = 3;
    const int F = 11;
    auto gate_up = random_values(M * 2 * F, 1, 3);
    const auto dh = random_values(M * F, 2);
    std::vector<double> h(M * F), dgate_up(M * 2 * F, NAN);
    cpu::swiglu_backward(dgate_up.data(), dh.data(), gate_up.data(), M, F);
    auto f = [&] {
        cpu::swiglu_forward(h.data(), gate_up.data(), M, F);
        double sum = 0;
        for (size_t i = 0; i < h.size(); i++) sum += h[i] * dh[i];
        return sum;
    };
    expect_gradient(f, gate_up, dgate_up, "dgate_up");
}

TEST(SwiGLU, LargeGates) {
    const std::vector<float> gate_up = {-200, 200, 0, 3, 5, 7}, dh = {1, 1, 1};   // gate | up
    std::vector<float> h(3), dgate_up(6);
    cpu::swiglu_forward(h.data(), gate_up.data(), 1, 3);
    cpu::swiglu_backward(dgate_up.data(), dh.data(), gate_up.data(), 1, 3);
    EXPECT_EQ(h, (std::vector<float>{0, 1000, 0}));
    EXPECT_EQ(dgate_up, (std::vector<float>{0, 5, 3.5, 0, 200, 0}));
}

#ifndef SAMBA_CPU
TEST(SwiGLU, Gpu) {
    REQUIRE_GPU();
    const std::pair<int64_t, int> sizes[] = {{1, 1}, {5, 33}, {3, 100}, {70001, 8}, {7, 4096}, {2, 2056}};   // 70001 rows: more than grid.y holds
    for (auto [M, F] : sizes) {
        SCOPED_TRACE("M " + std::to_string(M) + " F " + std::to_string(F));
        auto values = random_values(M * 2 * F, 1, 6);
        if (values.size() > 2) values[0] = -200;           // alone, its h of 1e-85 would be all that is compared
        const auto gate_up = rounded<floatX>(values), dh = rounded<floatX>(random_values(M * F, 2));
        std::vector<double> h(M * F), dgate_up(M * 2 * F);
        cpu::swiglu_forward(h.data(), gate_up.data(), M, F);
        cpu::swiglu_backward(dgate_up.data(), dh.data(), gate_up.data(), M, F);
        DeviceBuffer<floatX> device_gate_up(to_type<floatX>(gate_up)), device_dh(to_type<floatX>(dh)), device_h(M * F), device_dgate_up(M * 2 * F);
        gpu::swiglu_forward(device_h.ptr, device_gate_up.ptr, M, F, Stream{});
        gpu::swiglu_backward(device_dgate_up.ptr, device_dh.ptr, device_gate_up.ptr, M, F, Stream{});
        EXPECT_LT(rel_l2(to_double(device_h.host()), h), tolerance<floatX>());
        EXPECT_LT(rel_l2(to_double(device_dgate_up.host()), dgate_up), tolerance<floatX>());
    }
}
#endif

} // namespace
