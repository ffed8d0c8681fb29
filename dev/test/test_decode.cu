// The operations of a decode step: each GPU kernel against its CPU twin in double, and the draw of a token.
#include <map>

#include "../../kernels/cpu/decode.h"
#ifndef SAMBA_CPU
#include "../../kernels/decode.cuh"
#endif
#include "test_util.h"

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Drawing

// How often each token is drawn, by the definition
std::map<int, int> draws(const std::vector<float>& logits, const SampleOptions& o, int n, const uint8_t* seen = nullptr) {
    std::map<int, int> count;
    for (int i = 0; i < n; i++) count[cpu::sample_token(logits.data(), seen, (int)logits.size(), o, counter_uniform(7, (uint64_t)i))]++;
    return count;
}

TEST(Sample, TemperatureZeroTakesTheMostLikelyAndTheFirstOfEquals) {
    const std::vector<float> logits = {1, 3, -2, 3};
    EXPECT_EQ(draws(logits, {0, 0, 1, 1}, 10), (std::map<int, int>{{1, 10}}));
    const uint8_t seen[] = {0, 1, 0, 0};
    EXPECT_EQ(draws(logits, {0, 0, 1, 1.5f}, 10, seen), (std::map<int, int>{{3, 10}}));      // 3 / 1.5 < 3
}

TEST(Sample, FrequenciesAreTheSoftmax) {
    const std::vector<float> logits = {0, std::log(2.f), std::log(5.f), -100};
    const auto count = draws(logits, {1, 0, 1, 1}, 80000);
    EXPECT_EQ(count.count(3), 0u);
    for (auto [id, expected] : {std::pair{0, 10000}, {1, 20000}, {2, 50000}}) EXPECT_NEAR(count.at(id), expected, 5 * std::sqrt(expected));
    const auto sharp = draws(logits, {0.5f, 0, 1, 1}, 30000);                                // squares: 1, 4, 25
    for (auto [id, expected] : {std::pair{0, 1000}, {1, 4000}, {2, 25000}}) EXPECT_NEAR(sharp.at(id), expected, 5 * std::sqrt(expected));
}

TEST(Sample, CutsKeepTheMostLikely) {
    const std::vector<float> logits = {std::log(1.f), std::log(4.f), std::log(3.f), std::log(3.f), std::log(2.f)};   // of 13
    const auto kept = [&](int k, float p) {
        std::vector<int> ids;
        for (auto [id, n] : draws(logits, {1, k, p, 1}, 3000)) ids.push_back(id);
        return ids;
    };
    EXPECT_EQ(kept(1, 1), (std::vector<int>{1}));
    EXPECT_EQ(kept(2, 1), (std::vector<int>{1, 2}));                 // of equals the first
    EXPECT_EQ(kept(0, 0.5f), (std::vector<int>{1, 2}));              // 7/13
    EXPECT_EQ(kept(0, 0.6f), (std::vector<int>{1, 2, 3}));           // 10/13
    EXPECT_EQ(kept(3, 0.65f), (std::vector<int>{1, 2}));             // 7 of the 10 that top-k leaves
    EXPECT_EQ(kept(0, 0.f), (std::vector<int>{1}));
}

TEST(Sample, LogitsThatAreNotNumbersAreRefused) {
    const std::vector<float> nothing(5, NAN), some = {NAN, 1, -INFINITY};
    EXPECT_EQ(cpu::sample_token(nothing.data(), nullptr, 5, {1, 0, 1, 1}, 0.5), -1);
    EXPECT_EQ(cpu::sample_token(some.data(), nullptr, 3, {1, 0, 1, 1}, 0.5), 1);
}

// ---------------------------------------------------------------------------------------------------------------------
// GPU kernels

#ifndef SAMBA_CPU
template <class T> struct Both {           // the same values for the oracle and the device
    std::vector<double> host;
    DeviceBuffer<T> device;
    Both(size_t n, uint64_t seed, double scale = 1) : host(rounded<T>(random_values(n, seed, scale))), device(to_type<T>(host)) {}
    operator T*() { return device.ptr; }
    double* h() { return host.data(); }
    void expect_equal(const char* name, double tol = tolerance<T>()) { EXPECT_LT(rel_l2(to_double(device.host()), host), tol) << name; }
};

// x -> xw, squares, as the writer of x leaves them; the oracle sees the same rounding
struct Normed {
    int B, d;
    Both<float> x, norm, squares;
    Both<floatX> xw;
    Normed(int B, int d) : B(B), d(d), x((size_t)B * d, 1), norm(d, 2), squares((size_t)B * ceil_div(d, 8), 3), xw((size_t)B * d, 4) {
        cpu::decode_norm<double>(xw.h(), squares.h(), x.h(), norm.h(), B, d);
        gpu::decode_norm(xw, squares, x, norm, B, d, Stream{});
        xw.expect_equal("xw");
        squares.expect_equal("squares");
        xw.host = to_double(xw.device.host());
    }
};

const std::vector<int> BATCHES = {1, 3, 8, 9, 16};

TEST(DecodeGpu, NormLinearAndHead) {
    REQUIRE_GPU();
    for (int B : BATCHES)
        for (auto [N, d] : {std::pair{64, 64}, {203, 192}, {1000, 1536}, {37, 48}, {5000, 96}}) {
            SCOPED_TRACE("B " + std::to_string(B) + " N " + std::to_string(N) + " d " + std::to_string(d));
            Normed in(B, d);
            Both<floatX> w((size_t)N * d, 5, 0.1), y((size_t)B * N, 6);
            Both<float> logits((size_t)B * N, 7);
            cpu::decode_norm_linear<double>(y.h(), in.xw.h(), in.squares.h(), w.h(), B, N, d, 1e-5f);
            gpu::decode_norm_linear(y, in.xw, in.squares, w, B, N, d, 1e-5f, Stream{});
            gpu::decode_head(logits, in.xw, in.squares, w, B, N, d, 1e-5f, Stream{});
            y.expect_equal("y");
            logits.host = y.host;
            logits.expect_equal("logits");
        }
}

TEST(DecodeGpu, Residual) {
    REQUIRE_GPU();
    for (int B : BATCHES)
        for (auto [N, K] : {std::pair{64, 96}, {203, 192}, {1536, 3072}, {192, 512}, {40, 50}, {96, 6144}}) {
            SCOPED_TRACE("B " + std::to_string(B) + " N " + std::to_string(N) + " K " + std::to_string(K));
            Both<float> x((size_t)B * N, 1), norm(N, 2), squares((size_t)B * ceil_div(N, 8), 3);
            Both<floatX> xw((size_t)B * N, 4), in((size_t)B * K, 5), w((size_t)N * K, 6, 0.1);
            cpu::decode_residual<double>(x.h(), xw.h(), squares.h(), norm.h(), in.h(), w.h(), B, N, K);
            gpu::decode_residual(x, xw, squares, norm, in, w, B, N, K, Stream{});
            x.expect_equal("x");
            xw.expect_equal("xw");
            squares.expect_equal("squares");
            const auto before = xw.device.host();
            cpu::decode_residual<double>(x.h(), xw.h(), squares.h(), nullptr, in.h(), w.h(), B, N, K);
            gpu::decode_residual(x, xw, squares, nullptr, in, w, B, N, K, Stream{});
            x.expect_equal("x again");
            EXPECT_EQ(memcmp(xw.device.host().data(), before.data(), before.size() * sizeof(floatX)), 0);
        }
}

TEST(DecodeGpu, Swiglu) {
    REQUIRE_GPU();
    for (int B : BATCHES)
        for (auto [F, d] : {std::pair{64, 64}, {203, 192}, {4096, 1536}, {30, 48}}) {
            SCOPED_TRACE("B " + std::to_string(B) + " F " + std::to_string(F) + " d " + std::to_string(d));
            Normed in(B, d);
            Both<floatX> w1((size_t)2 * F * d, 5, 0.1), hidden((size_t)B * F, 6);
            cpu::decode_swiglu<double>(hidden.h(), in.xw.h(), in.squares.h(), w1.h(), B, d, F, 1e-5f);
            gpu::decode_swiglu(hidden, in.xw, in.squares, w1, B, d, F, 1e-5f, Stream{});
            hidden.expect_equal("hidden", 2 * tolerance<floatX>());                          // gate and up are rounded before their product
        }
}

TEST(DecodeGpu, MambaStep) {
    REQUIRE_GPU();
    for (int B : BATCHES)
        for (auto [d, N, rank] : {std::tuple{64, 16, 4}, {192, 16, 12}, {1536, 16, 96}, {48, 5, 3}, {64, 40, 300}}) {
            const int e = 2 * d, width = rank + 2 * N;
            SCOPED_TRACE("B " + std::to_string(B) + " d " + std::to_string(d) + " N " + std::to_string(N));
            Normed in(B, d);
            Both<floatX> in_proj((size_t)2 * e * d, 5, 0.1), u((size_t)B * e, 6), z((size_t)B * e, 7), halo((size_t)B * 3 * e, 8);
            Both<floatX> x_proj((size_t)width * e, 9, 0.05), dt_proj((size_t)e * rank, 10, 0.1), out((size_t)B * e, 11);
            Both<float> conv_w((size_t)e * 4, 12, 0.5), conv_b(e, 13, 0.5), A_log((size_t)e * N, 14), D(e, 15), dt_bias(e, 16, 2);
            Both<float> h((size_t)B * e * N, 17);
            DeviceBuffer<float> parts((size_t)gpu::decode_x_splits(width, e) * B * width);
            std::vector<double> x_dbl((size_t)B * width);
            cpu::decode_mamba_in<double>(u.h(), z.h(), halo.h(), in.xw.h(), in.squares.h(), in_proj.h(), conv_w.h(), conv_b.h(), B, d, e, 1e-5f);
            gpu::decode_mamba_in(u, z, halo, in.xw, in.squares, in_proj, conv_w, conv_b, B, d, e, 1e-5f, Stream{});
            u.expect_equal("u", 2 * tolerance<floatX>());
            z.expect_equal("z");
            halo.expect_equal("halo");
            u.host = to_double(u.device.host()), z.host = to_double(z.device.host());        // from here on the same again
            cpu::decode_x_proj<double>(x_dbl.data(), u.h(), x_proj.h(), B, width, e);
            gpu::decode_x_proj(parts.ptr, u, x_proj, B, width, e, Stream{});
            std::vector<double> sum(x_dbl.size());
            const auto part = parts.host();
            for (size_t i = 0; i < part.size(); i++) sum[i % sum.size()] += part[i];
            EXPECT_LT(rel_l2(sum, x_dbl), tolerance<float>());
            x_dbl = rounded<floatX>(sum);
            cpu::decode_scan<double>(out.h(), h.h(), x_dbl.data(), u.h(), z.h(), dt_proj.h(), A_log.h(), D.h(), dt_bias.h(), B, e, N, rank);
            gpu::decode_scan(out, h, parts.ptr, u, z, dt_proj, A_log, D, dt_bias, B, e, N, rank, Stream{});
            out.expect_equal("out", 2 * tolerance<floatX>());                                // dt is rounded on the way
            h.expect_equal("h", tolerance<floatX>());
        }
}

TEST(DecodeGpu, Attention) {
    REQUIRE_GPU();
    struct Case { int H, G, hd; int64_t capacity; bool rope; };
    for (int B : {1, 3, 16})
        for (const Case& c : {Case{3, 3, 64, 127, true}, Case{12, 12, 128, 2047, true}, Case{12, 1, 128, 300, false},
                              Case{6, 1, 256, 511, true}, Case{4, 2, 24, 50, true}, Case{2, 2, 8, 0, false}, Case{32, 4, 64, 3000, true}})
            for (int64_t first : {(int64_t)0, (int64_t)7, c.capacity - 1, c.capacity + 5, (int64_t)1000003}) {
                if (first < 0 || B * c.capacity * c.G * c.hd > 4 << 20) continue;             // the oracle's ring would take minutes
                SCOPED_TRACE("B " + std::to_string(B) + " H " + std::to_string(c.H) + " G " + std::to_string(c.G) + " hd " +
                             std::to_string(c.hd) + " position " + std::to_string(first));
                Both<floatX> qkv((size_t)B * (c.H + 2 * c.G) * c.hd, 1, 2), ring((size_t)B * c.capacity * 2 * c.G * c.hd + 1, 2);
                Both<floatX> out((size_t)B * c.H * c.hd, 3);
                Both<float> cos_sin((size_t)B * c.hd, 4);
                std::vector<int64_t> position(B);
                for (int b = 0; b < B; b++) position[b] = first + b * 3;
                DeviceBuffer<int64_t> device_position(position);
                const size_t bytes = gpu::decode_attention_workspace(B, c.H, c.G, c.hd);
                DeviceBuffer<char> workspace(std::vector<char>(bytes, 0));
                for (int step = 0; step < 2; step++) {     // the second finds the counters as the first left them
                    cpu::decode_attention<double>(out.h(), ring.h(), nullptr, qkv.h(), c.rope ? cos_sin.h() : nullptr, position.data(),
                                                  c.capacity, B, c.H, c.G, c.hd);
                    gpu::decode_attention(out, ring, workspace.ptr, qkv, c.rope ? (float*)cos_sin : nullptr, device_position.ptr,
                                          c.capacity, B, c.H, c.G, c.hd, Stream{});
                    out.expect_equal("out", 2 * tolerance<floatX>());                        // queries and keys are rounded after RoPE
                    ring.expect_equal("ring");
                    for (auto& p : position) p++;
                    copy_to_device(device_position.ptr, position.data(), B * sizeof(int64_t), Stream{});
                    stream_sync(Stream{});
                    ring.host = to_double(ring.device.host());
                }
            }
}

// The same draws as the definition. Weights differ by an ulp of exp2, 1e-7, so that a draw in a few thousand may fall on the other side.
TEST(DecodeGpu, SampleAndEmbed) {
    REQUIRE_GPU();
    const int B = 4, d = 40, hd = 16;
    for (int V : {64, 5000, 65536})
        for (const SampleOptions& o : {SampleOptions{0, 0, 1, 1}, SampleOptions{0.8f, 0, 1, 1.3f}, SampleOptions{1.2f, 50, 1, 1},
                                       SampleOptions{1, 0, 0.9f, 1.1f}, SampleOptions{0.9f, 200, 0.5f, 1}}) {
            SCOPED_TRACE("V " + std::to_string(V) + " temperature " + std::to_string(o.temperature) + " k " + std::to_string(o.top_k) +
                         " p " + std::to_string(o.top_p));
            const int choices = V - 5;
            Both<float> logits((size_t)B * V, 1, 6), x((size_t)B * d, 2), squares((size_t)B * ceil_div(d, 8), 3);
            Both<float> cos_sin((size_t)B * hd, 4), norm(d, 5);
            Both<floatX> embedding((size_t)V * d, 6), xw((size_t)B * d, 7);

            std::vector<int64_t> position = {0, 5, 1000000, 77}, drawn = {3, 3, 3, 3};
            std::vector<uint64_t> keys = {11, 12, 13, 14};
            std::vector<uint8_t> seen((size_t)B * V);
            for (size_t i = 0; i < seen.size(); i += 3) seen[i] = 1;
            std::vector<int> tokens(B), emitted((size_t)EMIT_SLOTS * B, -7);
            DeviceBuffer<int> device_tokens(B), device_emitted(emitted);
            DeviceBuffer<int64_t> device_position(position), device_drawn(drawn);
            DeviceBuffer<uint64_t> device_keys(keys);
            DeviceBuffer<uint8_t> device_seen(seen);
            for (int step = 0; step < (V > 10000 ? 5 : 20); step++) {
                cpu::decode_sample<double>(tokens.data(), emitted.data(), position.data(), drawn.data(), seen.data(), x.h(), xw.h(),
                                           squares.h(), cos_sin.h(), logits.h(), keys.data(), norm.h(), embedding.h(), 10000, o, B, V,
                                           choices, d, hd);
                gpu::decode_sample(device_tokens.ptr, device_emitted.ptr, device_position.ptr, device_drawn.ptr, device_seen.ptr, x, xw,
                                   squares, cos_sin, logits, device_keys.ptr, norm, embedding, 10000, o, B, V, choices, d, hd, Stream{});
                ASSERT_EQ(device_tokens.host(), tokens) << "step " << step;
            }
            EXPECT_EQ(device_emitted.host(), emitted);
            EXPECT_EQ(device_position.host(), position);
            EXPECT_EQ(device_drawn.host(), drawn);
            EXPECT_EQ(device_seen.host(), seen);
            x.expect_equal("x");
            xw.expect_equal("xw");
            squares.expect_equal("squares");
            cos_sin.expect_equal("cos_sin", tolerance<float>());
        }
}
#endif

} // namespace
