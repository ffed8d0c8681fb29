// Embedding: backward is the transpose of forward; frequent, rare and absent tokens.
#include "../../kernels/cpu/embedding.h"
#ifndef SAMBA_CPU
#include "../../kernels/embedding.cuh"
#endif
#include "gradient_planes.h"
#include "test_util.h"

namespace {

std::vector<int> some_tokens(int64_t n, int V, uint64_t seed, double frequent /*part that is token V/2*/) {
    const auto r = random_values(2 * n, seed);
    std::vector<int> tokens(n);
    for (int64_t i = 0; i < n; i++) tokens[i] = (r[2 * i] + 1) / 2 < frequent ? V / 2 : std::min(V - 1, (int)((r[2 * i + 1] + 1) / 2 * V));
    return tokens;
}

TEST(Embedding, BackwardMatchesFiniteDifferences) {
    const int V = 7, d = 5;
    const int64_t BT = 11;
    const auto tokens = some_tokens(BT, V, 1, 0.3);
    auto wte = random_values(V * d, 2);
    auto dout = random_values(BT * d, 3);
    std::vector<double> dwte(V * d, 0.0), out(BT * d);
    cpu::embedding_backward(dwte.data(), ResidualGradient<double>{dout.data(), nullptr}, tokens.data(), nullptr, BT, V, d);
    auto f = [&] {
        cpu::embedding_forward(out.data(), tokens.data(), wte.data(), BT, d);
        double sum = 0;
        for (size_t i = 0; i < out.size(); i++) sum += out[i] * dout[i];
        return sum;
    };
    expect_gradient(f, wte, dwte, "dwte");
    auto twice = dwte;
    cpu::embedding_backward(twice.data(), ResidualGradient<double>{dout.data(), nullptr}, tokens.data(), nullptr, BT, V, d);
    for (size_t i = 0; i < dwte.size(); i++) EXPECT_DOUBLE_EQ(twice[i], 2 * dwte[i]) << "the gradient is added";
}

#ifndef SAMBA_CPU
TEST(Embedding, ForwardGpu) {
    REQUIRE_GPU();
    for (int d : {33, 100, 1536}) {
        const int V = 250;
        const int64_t BT = 301;
        const auto tokens = some_tokens(BT, V, 1, 0.1);
        const auto wte = random_values(V * d, 2);
        std::vector<double> ref(BT * d);
        cpu::embedding_forward(ref.data(), tokens.data(), rounded<floatX>(wte).data(), BT, d);
        DeviceBuffer<float> out(BT * d);
        DeviceBuffer<int> device_tokens(tokens);
        DeviceBuffer<floatX> device_wte(to_type<floatX>(wte));
        gpu::embedding_forward(out.ptr, device_tokens.ptr, device_wte.ptr, BT, d, Stream{});
        EXPECT_EQ(rel_l2(to_double(out.host()), ref), 0) << "d " << d << ": a copy is exact";   // the values are floatX already
    }
}

void backward_gpu(int64_t BT, int V, int d, double frequent) {
    SCOPED_TRACE("BT " + std::to_string(BT) + " V " + std::to_string(V) + " d " + std::to_string(d) + " frequent " + std::to_string(frequent));
    const auto tokens = some_tokens(BT, V, 1, frequent);
    const auto start = random_values((size_t)V * d, 3);
    Planes device_dout(random_values(BT * d, 2));
    auto ref = rounded<float>(start), dout = device_dout.values();
    cpu::embedding_backward(ref.data(), ResidualGradient<double>{dout.data(), nullptr}, tokens.data(), nullptr, BT, V, d);
    DeviceBuffer<int> device_tokens(tokens);
    DeviceBuffer<float> dwte(to_type<float>(start)), again(to_type<float>(start));
    DeviceBuffer<char> workspace(gpu::embedding_backward_workspace(BT, V, d));
    gpu::embedding_backward(dwte.ptr, device_dout.get(), device_tokens.ptr, workspace.ptr, BT, V, d, Stream{});
    gpu::embedding_backward(again.ptr, device_dout.get(), device_tokens.ptr, workspace.ptr, BT, V, d, Stream{});
    EXPECT_LT(rel_l2(to_double(dwte.host()), ref), tolerance<float>());
    EXPECT_EQ(dwte.host(), again.host()) << "two runs must give the same bits";
}

TEST(Embedding, BackwardGpu) {
    REQUIRE_GPU();
    backward_gpu(1, 1, 1, 0);
    backward_gpu(1, 33, 33, 0);
    backward_gpu(32, 33, 4, 0);
    backward_gpu(64, 2, 100, 1);        // one token only, whole chunks
    backward_gpu(97, 3, 33, 0.5);
    backward_gpu(1000, 250, 100, 0.1);
    backward_gpu(4096, 32000, 1536, 0.1);
    backward_gpu(5000, 5, 260, 0.9);
    backward_gpu(333, 33, 1100, 0.2);   // more than 256 vectors a row
}
#endif

} // namespace
