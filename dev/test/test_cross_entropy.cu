// Cross entropy: gradient against finite differences, extreme logits, targets outside the vocabulary, the mean of the losses.
#include "../../kernels/cpu/cross_entropy.h"
#ifndef SAMBA_CPU
#include "../../kernels/cross_entropy.cuh"
#endif
#include "test_util.h"

namespace {

std::vector<int> some_targets(int64_t M, int V) {
    std::vector<int> targets(M);
    for (int64_t i = 0; i < M; i++) targets[i] = (int)((i * 7919 + V - 1) % V);   // the first is the last column
    return targets;
}

TEST(CrossEntropy, FusedMatchesFiniteDifferences) {
    const int64_t M = 3;
    const int V = 33;
    auto logits = random_values(M * V, 1, 4);
    const auto targets = some_targets(M, V);
    const float scale = 0.25f;
    std::vector<double> losses(M), fused_losses(M), gradient = logits;
    cpu::cross_entropy_fused(fused_losses.data(), gradient.data(), targets.data(), scale, M, V);
    auto f = [&] {
        cpu::cross_entropy_forward(losses.data(), nullptr, logits.data(), targets.data(), M, V);
        return scale * (losses[0] + losses[1] + losses[2]);
    };
    f();
    EXPECT_EQ(losses, fused_losses);
    expect_gradient(f, logits, gradient, "dlogits");
}

// The true loss of (high, low, low, ...) with target 0 is about 0, with target 1 high - low.
TEST(CrossEntropy, ExtremeLogits) {
    std::vector<float> logits = {60000, -60000, -60000, 60000, -60000, -60000, -1e5f, -1e5f, -1e5f}, losses(3);
    const std::vector<int> targets = {0, 1, 2};
    cpu::cross_entropy_fused(losses.data(), logits.data(), targets.data(), 1, 3, 3);
    EXPECT_EQ(losses[0], 0);
    EXPECT_EQ(losses[1], 120000);
    EXPECT_NEAR(losses[2], std::log(3.0), 1e-6);
    const std::vector<float> gradient = {0, 0, 0, 1, -1, 0};
    for (int i = 0; i < 6; i++) EXPECT_EQ(logits[i], gradient[i]);
}

TEST(CrossEntropy, TargetOutsideVocabularyIsNaN) {
    std::vector<float> logits = {1, 2, 3, 1, 2, 3, 1, 2, 3}, losses(3);
    const std::vector<int> targets = {3, -1, 1};
    cpu::cross_entropy_fused(losses.data(), logits.data(), targets.data(), 1, 3, 3);
    EXPECT_TRUE(std::isnan(losses[0]) && std::isnan(losses[1]) && std::isfinite(losses[2]));
    EXPECT_TRUE(std::isnan(logits[0]) && std::isnan(logits[5]) && std::isfinite(logits[6]));
}

TEST(CrossEntropy, GreedyIsTheLikeliestTarget) {
    const std::vector<float> logits = {1, 3, 2, 5, 5, 4, 0, -1, 7, 1, 1, 1};
    std::vector<float> losses(4);
    std::vector<uint8_t> greedy(4, 9);
    const auto of = [&](std::vector<int> targets) {
        cpu::cross_entropy_forward(losses.data(), greedy.data(), logits.data(), targets.data(), 4, 3);
        return greedy;
    };
    EXPECT_EQ(of({1, 0, 2, 2}), (std::vector<uint8_t>{1, 1, 1, 1}));
    EXPECT_EQ(of({0, 2, 1, 3}), (std::vector<uint8_t>{0, 0, 0, 0}));
}

TEST(CrossEntropy, MeanOfLosses) {
    const auto losses = random_values(1001, 1);
    double sum = 0, mean = 1;
    for (double l : losses) sum += l;
    cpu::mean_losses(&mean, losses.data(), (int64_t)losses.size(), true, 0.5f);
    EXPECT_NEAR(mean, 1 + 0.5 * sum / 1001, 1e-12);
    cpu::mean_losses(&mean, losses.data(), (int64_t)losses.size(), false, 1);
    EXPECT_NEAR(mean, sum / 1001, 1e-12);
}

#ifndef SAMBA_CPU
void cross_entropy_gpu(int64_t M, int V, double range) {
    SCOPED_TRACE("M " + std::to_string(M) + " V " + std::to_string(V) + " range " + std::to_string(range));
    const auto logits = rounded<floatX>(random_values(M * V, 1, range));
    const auto targets = some_targets(M, V);
    const float scale = 1.f / M;
    std::vector<double> losses(M), gradient = logits;
    std::vector<uint8_t> likeliest(M);
    cpu::cross_entropy_forward(losses.data(), likeliest.data(), gradient.data(), targets.data(), M, V);
    cpu::cross_entropy_fused(losses.data(), gradient.data(), targets.data(), scale, M, V);
    DeviceBuffer<uint8_t> greedy(M);
    DeviceBuffer<floatX> device_logits(to_type<floatX>(logits));
    DeviceBuffer<int> device_targets(targets);
    DeviceBuffer<float> forward_losses(M), fused_losses(M);
    gpu::cross_entropy_forward(forward_losses.ptr, greedy.ptr, device_logits.ptr, device_targets.ptr, M, V, Stream{});
    gpu::cross_entropy_fused(fused_losses.ptr, device_logits.ptr, device_targets.ptr, scale, M, V, Stream{});
    EXPECT_LT(rel_l2(to_double(forward_losses.host()), losses), tolerance<float>());
    EXPECT_EQ(forward_losses.host(), fused_losses.host());
    EXPECT_EQ(greedy.host(), likeliest);
    EXPECT_LT(rel_l2(to_double(device_logits.host()), gradient), tolerance<floatX>());
}

TEST(CrossEntropy, Gpu) {
    REQUIRE_GPU();
    cross_entropy_gpu(1, 33, 3);
    cross_entropy_gpu(5, 250, 8);
    cross_entropy_gpu(3, 1, 8);         // loss and gradient are zero
    cross_entropy_gpu(70001, 8, 3);     // more rows than grid.y holds
    cross_entropy_gpu(7, 32000, 5);
    cross_entropy_gpu(3, 32001, 20);
    cross_entropy_gpu(3, 8200, 1000);
}

TEST(CrossEntropy, ExtremeLogitsAndBadTargetsGpu) {
    REQUIRE_GPU();
    const int V = 40;
    std::vector<double> logits(4 * V, -65536.0);   // exact in bf16
    logits[0] = logits[V] = 65536;
    const std::vector<int> targets = {0, 1, V, -1};
    DeviceBuffer<floatX> device_logits(to_type<floatX>(logits));
    DeviceBuffer<int> device_targets(targets);
    DeviceBuffer<float> device_losses(4);
    gpu::cross_entropy_fused(device_losses.ptr, device_logits.ptr, device_targets.ptr, 1, 4, V, Stream{});
    const auto losses = device_losses.host();
    const auto gradient = to_double(device_logits.host());
    EXPECT_EQ(losses[0], 0);
    EXPECT_EQ(losses[1], 131072);
    EXPECT_TRUE(std::isnan(losses[2]) && std::isnan(losses[3]));
    EXPECT_EQ(gradient[0], 0);
    EXPECT_EQ(gradient[V], 1);
    EXPECT_EQ(gradient[V + 1], -1);
    EXPECT_TRUE(std::isnan(gradient[2 * V]) && std::isnan(gradient[4 * V - 1]));
}

TEST(CrossEntropy, MeanOfLossesGpu) {
    REQUIRE_GPU();
    for (int64_t M : {1, 33, 5001}) {
        const auto losses = rounded<float>(random_values(M, 1));
        std::vector<double> mean = {1.0};
        DeviceBuffer<float> device_losses(to_type<float>(losses)), device_mean(std::vector<float>{1.f}), fresh(1);
        gpu::mean_losses(device_mean.ptr, device_losses.ptr, M, true, 0.5f, Stream{});
        cpu::mean_losses(mean.data(), losses.data(), M, true, 0.5f);
        EXPECT_NEAR(device_mean.host()[0], mean[0], 1e-6);
        gpu::mean_losses(fresh.ptr, device_losses.ptr, M, false, 1, Stream{});
        cpu::mean_losses(mean.data(), losses.data(), M, false, 1);
        EXPECT_NEAR(fresh.host()[0], mean[0], 1e-6);
    }
}
#endif

} // namespace
