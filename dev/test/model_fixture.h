// What the tests of the whole model share: small configurations of every kind of block, and a model with random weights and tokens.
#pragma once
#include <string>
#include <vector>

#include "../../data/model_io.h"
#include "../../samba.cuh"
#include "test_util.h"

constexpr bool EXACT = sizeof(floatX) == 4;                // float: held to the golden files' own accuracy

#define REQUIRE_DEVICE() \
    do { if (ON_GPU && device_count() == 0) GTEST_SKIP() << "needs a GPU"; } while (0)
#define REQUIRE_FLOAT() \
    do { if (!EXACT) GTEST_SKIP() << "needs a float build: make CPU=1 or PRECISION=FP32"; } while (0)

// Small configurations that between them use every kind of block, head layout and initialisation
inline Config small_config(const std::string& blocks) {
    Config c;
    c.name = "test-" + blocks;
    c.blocks = blocks;
    c.d_model = 64; c.n_head = 4; c.n_kv_head = 2; c.head_dim = 16; c.d_ff = 96;
    c.window = 13; c.seq_len = 40; c.vocab_size = 97;
    validate(c, "test");
    return c;
}

inline std::vector<int> random_tokens(int64_t n, int vocab, uint64_t seed) {
    std::vector<int> out(n);
    for (int64_t i = 0; i < n; i++) out[i] = (int)(counter_uniform(seed, (uint64_t)i) * vocab);
    return out;
}

struct Fixture {
    Model m;
    int B;
    int64_t T;
    std::vector<int> tokens, targets;

    Fixture(const Config& c, int B, int64_t T, Recompute level = Recompute::none, uint64_t seed = 1, bool fp8 = false) : m(c), B(B), T(T) {
        m.w.create(m.layout, true, {0, m.layout.elements()}, fp8);
        m.acts.create(m.layout, B, T, true, level, fp8);
        initialise(m, seed);
        tokens = random_tokens(B * T, c.vocab_size, 100 + seed);
        targets = random_tokens(B * T, c.vocab_size, 200 + seed);
    }
    float loss_and_gradients() {
        upload_tokens(m, tokens.data(), targets.data(), B * T);
        forward_backward(m, B, T, 1.0f, true);
        float loss;
        copy_to_host(&loss, m.acts.loss, sizeof loss, m.stream);
        stream_sync(m.stream);
        return loss;
    }
    double loss_alone() {
        upload_tokens(m, tokens.data(), targets.data(), B * T);
        evaluate(m, B, T, nullptr);
        std::vector<float> losses(B * T);
        copy_to_host(losses.data(), m.acts.losses, losses.size() * sizeof(float), m.stream);
        stream_sync(m.stream);
        double sum = 0;
        for (float l : losses) sum += l;
        return sum / (double)losses.size();
    }
    std::vector<float> flat(const float* device) const {
        std::vector<float> out(m.w.n);
        copy_to_host(out.data(), device, out.size() * sizeof(float), m.stream);
        stream_sync(m.stream);
        return out;
    }
    std::vector<double> gradient(const Tensor& t) const {
        std::vector<float> out(t.size);
        copy_to_host(out.data(), m.w.grads + m.layout.flat(t), out.size() * sizeof(float), m.stream);
        stream_sync(m.stream);
        return std::vector<double>(out.begin(), out.end());
    }
    std::vector<double> logits(int64_t rows) {
        std::vector<float> out(rows * m.config().vocab_size);
        read_logits(m, out.data(), 0, rows);
        return std::vector<double>(out.begin(), out.end());
    }
};

inline void scale_tensor(Fixture& f, const std::string& name, float factor) {
    const std::vector<float> master = f.flat(f.m.w.master);
    for (const Tensor& t : f.m.layout.tensors) {
        if (t.name != name) continue;
        std::vector<float> values(master.begin() + f.m.layout.flat(t), master.begin() + f.m.layout.flat(t) + t.size);
        for (float& x : values) x *= factor;
        upload_tensor(f.m, t, values.data());
    }
}
