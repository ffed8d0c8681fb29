// The global gradient norm with its clipping factor, and AdamW against five steps written out in double.
#include "../../kernels/cpu/adamw.h"
#include "../../kernels/cpu/global_norm.h"
#ifndef SAMBA_CPU
#include "../../kernels/adamw.cuh"
#include "../../kernels/global_norm.cuh"
#endif
#include "test_util.h"

namespace {

template <class R> std::vector<R> norm_on_cpu(const std::vector<R>& grads, float max_norm) {
    std::vector<char> workspace(cpu::global_norm_workspace((int64_t)grads.size()));
    std::vector<R> result(2, (R)NAN);
    cpu::global_norm(result.data(), grads.data(), (int64_t)grads.size(), max_norm, workspace.data());
    return result;
}

TEST(GlobalNorm, ClippingFactor) {
    const std::vector<double> grads = {3, 0, -4};
    EXPECT_EQ(norm_on_cpu(grads, 0)[0], 5);
    EXPECT_EQ(norm_on_cpu(grads, 0)[1], 1) << "max_norm 0: no clipping";
    EXPECT_EQ(norm_on_cpu(grads, 6)[1], 1);
    EXPECT_NEAR(norm_on_cpu(grads, 1)[1], 0.2, 1e-6);
    EXPECT_EQ(norm_on_cpu<float>({1, NAN}, 1)[1], 0);
    EXPECT_EQ(norm_on_cpu<float>({1, INFINITY}, 0)[1], 0) << "not finite, even without clipping";
}

TEST(GlobalNorm, ManyChunks) {
    const auto grads = random_values(200003, 1);
    double sum = 0;
    for (double g : grads) sum += g * g;
    EXPECT_NEAR(norm_on_cpu(grads, 1)[0], std::sqrt(sum), 1e-9);
    EXPECT_NEAR(norm_on_cpu(to_type<float>(grads), 1)[0], std::sqrt(sum), 1e-6 * std::sqrt(sum));
}

constexpr AdamW OPTIONS = {1e-2f, 0.9f, 0.95f, 1e-8f, 0.1f, 1};

// Written once more, from the paper, one element at a time
void reference_steps(std::vector<double>& p, std::vector<double>& m, std::vector<double>& v, const std::vector<std::vector<double>>& grads,
                     double scale) {
    const double lr = OPTIONS.lr, b1 = OPTIONS.beta1, b2 = OPTIONS.beta2, wd = OPTIONS.weight_decay;
    for (size_t step = 1; step <= grads.size(); step++)
        for (size_t i = 0; i < p.size(); i++) {
            const double g = grads[step - 1][i] * scale;
            m[i] += (1 - b1) * (g - m[i]);
            v[i] += (1 - b2) * (g * g - v[i]);
            const double mhat = m[i] / (1 - std::pow(b1, (double)step)), vhat = v[i] / (1 - std::pow(b2, (double)step));
            p[i] = p[i] * (1 - lr * wd) - lr * mhat / (std::sqrt(vhat) + (double)OPTIONS.eps);
        }
}

std::vector<std::vector<double>> five_gradients(size_t n) {
    std::vector<std::vector<double>> grads;
    for (int step = 0; step < 5; step++) grads.push_back(rounded<float>(random_values(n, 10 + step, 0.01)));
    grads[0][0] = 0;   // m and v still zero: 0 / (0 + eps)
    return grads;
}

template <class R> void five_steps_on_cpu(double tol) {
    const size_t n = 101;
    const auto start = rounded<float>(random_values(n, 1));
    const auto grads = five_gradients(n);
    auto p = start, m = std::vector<double>(n, 0.0), v = m;
    reference_steps(p, m, v, grads, 0.5);
    std::vector<R> w(n), master = to_type<R>(start), cm(n, 0), cv(n, 0);
    const std::vector<R> norm = {1, 0.5};
    AdamW options = OPTIONS;
    for (options.step = 1; options.step <= 5; options.step++)
        cpu::adamw_update(w.data(), master.data(), cm.data(), cv.data(), to_type<R>(grads[options.step - 1]).data(), norm.data(), (int64_t)n,
                          options);
    EXPECT_LT(rel_l2(to_double(master), p), tol);
    EXPECT_LT(rel_l2(to_double(cm), m), tol);
    EXPECT_LT(rel_l2(to_double(cv), v), tol);
    EXPECT_EQ(w, master);
}

TEST(AdamW, FiveSteps) {
    five_steps_on_cpu<double>(1e-6);   // shrink and the like come from float options: 6e-8 relative
    five_steps_on_cpu<float>(tolerance<float>());
}

TEST(AdamW, NothingChangesOnABadGradient) {
    std::vector<float> w = {9}, master = {1}, m = {2}, v = {3};
    const std::vector<float> grads = {NAN}, norm = {NAN, 0};
    cpu::adamw_update(w.data(), master.data(), m.data(), v.data(), grads.data(), norm.data(), 1, OPTIONS);
    EXPECT_EQ(w[0], 9);
    EXPECT_EQ(master[0], 1);
    EXPECT_EQ(m[0], 2);
    EXPECT_EQ(v[0], 3);
}

#ifndef SAMBA_CPU
std::vector<float> norm_on_gpu(const std::vector<float>& grads, float max_norm, int offset = 0) {
    std::vector<float> padded(offset, 1e30f);   // offset 1: a pointer without 16-byte alignment
    padded.insert(padded.end(), grads.begin(), grads.end());
    DeviceBuffer<float> device_grads(padded), result(2);
    DeviceBuffer<char> workspace(gpu::global_norm_workspace((int64_t)grads.size()));
    gpu::global_norm(result.ptr, device_grads.ptr + offset, (int64_t)grads.size(), max_norm, workspace.ptr, Stream{});
    return result.host();
}

TEST(GlobalNorm, Gpu) {
    REQUIRE_GPU();
    for (size_t n : {1, 3, 1000, 2097155, 4000001})
        for (int offset : {0, 1}) {
            const auto grads = to_type<float>(random_values(n, 1));
            const auto ref = norm_on_cpu(to_double(grads), 0.5), got = to_double(norm_on_gpu(grads, 0.5, offset));
            EXPECT_NEAR(got[0], ref[0], 1e-6 * ref[0]) << "n " << n << " offset " << offset;
            EXPECT_NEAR(got[1], ref[1], 1e-6 * ref[1]) << "n " << n << " offset " << offset;
        }
    std::vector<float> grads(5001, 1e-3f);
    EXPECT_EQ(norm_on_gpu(grads, 0)[1], 1);
    EXPECT_EQ(norm_on_gpu(grads, 1)[1], 1);
    grads[5000] = NAN;
    EXPECT_EQ(norm_on_gpu(grads, 1)[1], 0);
    grads[5000] = -INFINITY;
    EXPECT_EQ(norm_on_gpu(grads, 0)[1], 0);
}

template <class W> void five_steps_on_gpu(size_t n) {
    SCOPED_TRACE("n " + std::to_string(n) + " bytes of w " + std::to_string(sizeof(W)));
    const auto start = rounded<float>(random_values(n, 1));
    const auto grads = five_gradients(n);
    auto p = start, m = std::vector<double>(n, 0.0), v = m;
    reference_steps(p, m, v, grads, 0.5);
    DeviceBuffer<W> w(n);
    DeviceBuffer<float> master(to_type<float>(start)), dm(std::vector<float>(n, 0.f)), dv(std::vector<float>(n, 0.f));
    DeviceBuffer<float> norm(std::vector<float>{1.f, 0.5f}), bad(std::vector<float>{NAN, 0.f});
    AdamW options = OPTIONS;
    for (options.step = 1; options.step <= 5; options.step++) {
        DeviceBuffer<float> g(to_type<float>(grads[options.step - 1]));
        gpu::adamw_update(w.ptr, master.ptr, dm.ptr, dv.ptr, g.ptr, norm.ptr, (int64_t)n, options, Stream{});
        gpu::adamw_update(w.ptr, master.ptr, dm.ptr, dv.ptr, g.ptr, bad.ptr, (int64_t)n, options, Stream{});   // changes nothing
        stream_sync(Stream{});
    }
    EXPECT_LT(rel_l2(to_double(master.host()), p), tolerance<float>());
    EXPECT_LT(rel_l2(to_double(dm.host()), m), tolerance<float>());
    EXPECT_LT(rel_l2(to_double(dv.host()), v), tolerance<float>());
    EXPECT_EQ(to_double(w.host()), rounded<W>(to_double(master.host()))) << "w is master, rounded";
}

TEST(AdamW, FiveStepsGpu) {
    REQUIRE_GPU();
    for (size_t n : {1, 3, 4, 1030, 10007}) {
        five_steps_on_gpu<floatX>(n);
        five_steps_on_gpu<float>(n);
    }
}
#endif

} // namespace
