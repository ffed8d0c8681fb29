// RMSNorm: gradients against finite differences, overwriting and accumulating.
#include "../../kernels/cpu/rmsnorm.h"
#ifndef SAMBA_CPU
#include "../../kernels/rmsnorm.cuh"
#endif
#include "test_util.h"

namespace {

constexpr float EPS = 1e-5f;

TEST(RMSNorm, BackwardMatchesFiniteDifferences) {
    for (int d : {1, 33}) {
        const int64_t N = 3;
        auto x = random_values(N * d, 1), weight = random_values(d, 2);
        const auto dout = random_values(N * d, 3);
        std::vector<double> out(N * d), rstd(N), dx(N * d, NAN), dx_copy(N * d, NAN), dweight(d, 0.0);
        auto f = [&] {
            cpu::rmsnorm_forward(out.data(), rstd.data(), x.data(), weight.data(), N, d, d == 1 ? 0.5f : EPS);   // d = 1: a large eps, or dx is zero
            double sum = 0;
            for (size_t i = 0; i < out.size(); i++) sum += out[i] * dout[i];
            return sum;
        };
        f();
        cpu::rmsnorm_backward(dx.data(), dx_copy.data(), dweight.data(), dout.data(), x.data(), rstd.data(), weight.data(), nullptr, N, d, false);
        expect_gradient(f, x, dx, "dx");
        expect_gradient(f, weight, dweight, "dweight");
        EXPECT_EQ(dx, dx_copy);
        auto twice = dx, dweight_twice = dweight;
        f();
        cpu::rmsnorm_backward(twice.data(), nullptr, dweight_twice.data(), dout.data(), x.data(), rstd.data(), weight.data(), nullptr, N, d, true);
        for (size_t i = 0; i < dx.size(); i++) EXPECT_NEAR(twice[i], 2 * dx[i], 1e-12);
        for (size_t i = 0; i < dweight.size(); i++) EXPECT_NEAR(dweight_twice[i], 2 * dweight[i], 1e-12);
    }
}

TEST(RMSNorm, UnitRows) {
    std::vector<float> x = {3, -3, 0, 0}, weight = {1, 2}, out(4), rstd(2);
    cpu::rmsnorm_forward(out.data(), rstd.data(), x.data(), weight.data(), 2, 2, 1e-5f);
    EXPECT_NEAR(out[0], 1, 1e-5);
    EXPECT_NEAR(out[1], -2, 1e-5);
    EXPECT_EQ(out[2], 0);               // a zero row stays zero
    EXPECT_NEAR(rstd[1], 1 / std::sqrt(1e-5), 1e-2);
}

#ifndef SAMBA_CPU
void rmsnorm_gpu(int64_t N, int d) {
    SCOPED_TRACE("N " + std::to_string(N) + " d " + std::to_string(d));
    const auto x = rounded<float>(random_values(N * d, 1)), weight = rounded<float>(random_values(d, 2));
    const auto dout = rounded<floatX>(random_values(N * d, 3)), dx_start = rounded<float>(random_values(N * d, 4)), dweight_start = rounded<float>(random_values(d, 5));
    std::vector<double> out(N * d), rstd(N);
    cpu::rmsnorm_forward(out.data(), rstd.data(), x.data(), weight.data(), N, d, EPS);
    DeviceBuffer<float> device_x(to_type<float>(x)), device_weight(to_type<float>(weight)), device_rstd(N);
    DeviceBuffer<floatX> device_out(N * d), device_dout(to_type<floatX>(dout));
    gpu::rmsnorm_forward(device_out.ptr, device_rstd.ptr, device_x.ptr, device_weight.ptr, N, d, EPS, Stream{});
    EXPECT_LT(rel_l2(to_double(device_out.host()), out), tolerance<floatX>());
    EXPECT_LT(rel_l2(to_double(device_rstd.host()), rstd), tolerance<float>());

    DeviceBuffer<char> workspace(gpu::rmsnorm_backward_workspace(N, d));
    for (bool accumulate : {false, true}) {
        auto dx = dx_start, dweight = dweight_start;
        cpu::rmsnorm_backward(dx.data(), nullptr, dweight.data(), dout.data(), x.data(), rstd.data(), weight.data(), nullptr, N, d, accumulate);
        DeviceBuffer<float> device_dx(N * d), device_dweight(to_type<float>(dweight_start));
        DeviceBuffer<floatX> dx_copy(N * d);
        if (accumulate) copy_to_device(device_dx.ptr, to_type<float>(dx_start).data(), N * d * sizeof(float), Stream{});
        stream_sync(Stream{});
        gpu::rmsnorm_backward(device_dx.ptr, accumulate ? dx_copy.ptr : nullptr, device_dweight.ptr, device_dout.ptr, device_x.ptr, device_rstd.ptr, device_weight.ptr,
                              workspace.ptr, N, d, accumulate, Stream{});
        EXPECT_LT(rel_l2(to_double(device_dx.host()), dx), tolerance<float>());
        EXPECT_LT(rel_l2(to_double(device_dweight.host()), dweight), tolerance<float>());
        if (accumulate) EXPECT_LT(rel_l2(to_double(dx_copy.host()), dx), tolerance<floatX>());
    }
}

TEST(RMSNorm, Gpu) {
    REQUIRE_GPU();
    rmsnorm_gpu(1, 2);         // not d = 1: dx is then a difference of equal numbers
    rmsnorm_gpu(1, 1536);
    rmsnorm_gpu(5, 33);
    rmsnorm_gpu(1027, 100);    // more rows than blocks in backward
    rmsnorm_gpu(2500, 33);
    rmsnorm_gpu(77, 1536);
    rmsnorm_gpu(40, 2304);
    rmsnorm_gpu(3, 16388);     // more than 48 KB of shared memory
}
#endif

} // namespace
