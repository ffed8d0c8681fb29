// RMSNorm: gradients against finite differences, overwriting and accumulating.
#include "../../kernels/cpu/rmsnorm.h"
#ifndef SAMBA_CPU
#include "../../kernels/rmsnorm.cuh"
#endif
#include "gradient_planes.h"
#include "test_util.h"

namespace {

constexpr float EPS = 1e-5f;

// weight, some of whose elements are zero or so small that out / weight says nothing of x
std::vector<double> weights_with_zeros(int d, uint64_t seed) {
    auto weight = random_values(d, seed);
    for (int j = 2; j < d; j += 7) weight[j] = j % 2 ? 0 : 1e-35;
    return weight;
}

TEST(RMSNorm, BackwardMatchesFiniteDifferences) {
    for (int d : {1, 33}) {
        const int64_t N = 3;
        auto x = random_values(N * d, 1), weight = weights_with_zeros(d, 2);
        const auto dout = random_values(N * d, 3);
        std::vector<double> out(N * d), rstd(N), dx(N * d, NAN), dweight(d, 0.0);
        auto f = [&] {
            cpu::rmsnorm_forward(out.data(), rstd.data(), x.data(), weight.data(), N, d, d == 1 ? 0.5f : EPS);   // d = 1: a large eps, or dx is zero
            double sum = 0;
            for (size_t i = 0; i < out.size(); i++) sum += out[i] * dout[i];
            return sum;
        };
        f();
        const ResidualGradient<double> gradient{dx.data(), nullptr};
        cpu::rmsnorm_backward(gradient, {}, dweight.data(), dout.data(), out.data(), x.data(), rstd.data(), weight.data(), nullptr, N, d);
        expect_gradient(f, x, dx, "dx");
        expect_gradient(f, weight, dweight, "dweight");
        auto once = dx, dweight_twice = dweight;
        f();
        cpu::rmsnorm_backward(gradient, gradient, dweight_twice.data(), dout.data(), out.data(), x.data(), rstd.data(), weight.data(), nullptr, N, d);
        for (size_t i = 0; i < dx.size(); i++) EXPECT_NEAR(dx[i], 2 * once[i], 1e-12);
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
#ifndef SAMBA_FP32
// Of a float from both planes: its error, and what infinities, NaN and the ends of low become
TEST(ResidualGradient, Planes) {
    for (double x : random_values(100000, 1, 3)) {
        const float value = (float)(x * x * x);
        const __nv_bfloat16 high = __float2bfloat16_rn(value);
        const float back = joined(high, low_plane(value, high));
        ASSERT_LE(std::abs(back - value), std::abs(value) * 0x1p-15) << value;
    }
    for (uint32_t bits = 0x3f800000; bits < 0x3f820000; bits++) {              // every float from 1 to 1 + 2^-6
        const float value = std::bit_cast<float>(bits);
        const __nv_bfloat16 high = __float2bfloat16_rn(value);
        const float error = std::abs(joined(high, low_plane(value, high)) - value), rest = value - (float)high;
        ASSERT_LE(error, rest > 0x1p-8 - 0x1p-15 ? 0x1p-15 : 0x1p-16) << value;
        ASSERT_EQ(joined(high, 0), (float)high);
    }
    for (uint32_t bits : {0x7f800000u, 0xff800000u, 0x7fc00000u, 0x7fffffffu, 0xffffffffu, 0u, 0x80000000u}) {
        const float value = std::bit_cast<float>(bits);
        const __nv_bfloat16 high = __float2bfloat16_rn(value);
        const float back = joined(high, low_plane(value, high));
        if (std::isnan(value)) EXPECT_TRUE(std::isnan(back));
        else EXPECT_EQ(std::bit_cast<uint32_t>(back), bits);
    }
}
#endif

void rmsnorm_gpu(int64_t N, int d) {
    SCOPED_TRACE("N " + std::to_string(N) + " d " + std::to_string(d));
    const auto x = rounded<float>(random_values(N * d, 1)), weight = rounded<float>(weights_with_zeros(d, 2));
    const auto dout = rounded<floatX>(random_values(N * d, 3)), dweight_start = rounded<float>(random_values(d, 5));
    std::vector<double> out(N * d), rstd(N);
    cpu::rmsnorm_forward(out.data(), rstd.data(), x.data(), weight.data(), N, d, EPS);
    DeviceBuffer<float> device_x(to_type<float>(x)), device_weight(to_type<float>(weight)), device_rstd(N);
    DeviceBuffer<floatX> device_out(N * d), device_dout(to_type<floatX>(dout));
    gpu::rmsnorm_forward(device_out.ptr, device_rstd.ptr, device_x.ptr, device_weight.ptr, N, d, EPS, Stream{});
    EXPECT_LT(rel_l2(to_double(device_out.host()), out), tolerance<floatX>());
    EXPECT_LT(rel_l2(to_double(device_rstd.host()), rstd), tolerance<float>());

    out = to_double(device_out.host());                    // what backward is given
    DeviceBuffer<char> workspace(gpu::rmsnorm_backward_workspace(N, d));
    std::vector<double> first;
    for (int run = 0; run < 3; run++) {                    // dx =; dx = before +, in place; the same elsewhere, and once more
        Planes before(random_values(N * d, 4)), elsewhere(N * d);
        auto dx = before.values(), dweight = dweight_start;
        const ResidualGradient<double> twin{dx.data(), nullptr};
        cpu::rmsnorm_backward(twin, run ? twin : ResidualGradient<double>{}, dweight.data(), dout.data(), out.data(), x.data(), rstd.data(),
                              weight.data(), nullptr, N, d);
        DeviceBuffer<float> device_dweight(to_type<float>(dweight_start));
        Planes& result = run == 1 ? before : elsewhere;
        gpu::rmsnorm_backward(result.get(), run ? before.get() : ResidualGradient<floatX>{}, device_dweight.ptr, device_dout.ptr,
                              device_out.ptr, device_x.ptr, device_rstd.ptr, device_weight.ptr, workspace.ptr, N, d, Stream{});
        EXPECT_LT(rel_l2(result.values(), dx), tolerance<float>());
        EXPECT_LT(rel_l2(to_double(device_dweight.host()), dweight), tolerance<float>());
        if (run == 1) first = result.values();
        if (run == 2) EXPECT_EQ(result.values(), first) << "two runs must give the same bits, in place or not";
    }
}

TEST(RMSNorm, Gpu) {
    REQUIRE_GPU();
    rmsnorm_gpu(1, 2);         // not d = 1: dx is then a difference of equal numbers
    rmsnorm_gpu(1, 1536);
    rmsnorm_gpu(5, 33);
    rmsnorm_gpu(1027, 104);    // more rows than blocks in backward
    rmsnorm_gpu(2500, 33);
    rmsnorm_gpu(77, 1536);
    rmsnorm_gpu(1500, 2304);
    rmsnorm_gpu(40, 3072);
    rmsnorm_gpu(40, 4096);     // more than the vectorised kernel takes
    rmsnorm_gpu(3, 16388);     // more than 48 KB of shared memory
}
#endif

} // namespace
