// Truncated backpropagation through time: gradients of a chunk whose sequence began before it, the state a constant.
#include "../../data/state_io.h"
#include "model_fixture.h"
#include "test_files.h"

namespace {

constexpr int64_t CHUNK = 19, CHUNKS = 3;                  // window 13: a chunk's first queries see keys of the one before
constexpr int SEQUENCES = 2;

// The model of the fixture, and sequences of CHUNKS * CHUNK tokens
struct LongSequences {
    Fixture f;
    SequenceState held;
    std::vector<int> tokens, targets;

    LongSequences(const Config& c, Recompute level) : f(c, SEQUENCES, CHUNK, level) {
        held.create(f.m.layout, SEQUENCES, CHUNKS * CHUNK, f.m.stream, true);
        tokens = random_tokens(SEQUENCES * CHUNKS * CHUNK, c.vocab_size, 7);
        targets = random_tokens(SEQUENCES * CHUNKS * CHUNK, c.vocab_size, 8);
    }
    void upload(int64_t k) { upload_chunk(f.m, tokens.data() + k * CHUNK, targets.data() + k * CHUNK, SEQUENCES, CHUNK, CHUNKS * CHUNK); }
    float train(int64_t k, float weight, bool first) {
        upload(k);
        forward_backward_from(&held, f.m, SEQUENCES, CHUNK, weight, first);
        float loss;
        copy_to_host(&loss, f.m.acts.loss, sizeof loss, f.m.stream);
        stream_sync(f.m.stream);
        return loss;
    }
    // Mean loss of chunk k behind this state
    double loss_behind(SequenceState& state, int64_t k) {
        upload(k);
        evaluate(f.m, SEQUENCES, CHUNK, &state);
        const std::vector<float> losses = to_host(f.m, f.m.acts.losses, SEQUENCES * CHUNK);
        double sum = 0;
        for (float l : losses) sum += l;
        return sum / (double)losses.size();
    }
};

class Tbptt : public testing::TestWithParam<const char*> {};

// The definition, by finite differences: d/dw of the loss of the last chunk with the state before it held as it was. Along the gradient
// itself, one tensor at a time, as in test_samba.cu. So few tokens leave a cubic term of some per cent, which two step sizes remove.
TEST_P(Tbptt, GradientIsTheDerivativeWithTheStateHeld) {
    REQUIRE_DEVICE();
    REQUIRE_FLOAT();
    TempFolder folder;
    const std::string path = folder.path("state.safetensors");
    LongSequences s(small_config(GetParam()), Recompute::none);
    Fixture& f = s.f;
    scale_tensor(f, "lm_head.weight", 10);
    for (int64_t k = 0; k + 1 < CHUNKS; k++) s.train(k, 1.0f, true);
    save_state(f.m, s.held, path);
    s.train(CHUNKS - 1, 1.0f, true);
    const std::vector<float> grads = f.flat(f.m.w.grads), master = f.flat(f.m.w.master);
    SequenceState state;
    state.create(f.m.layout, SEQUENCES, CHUNKS * CHUNK, f.m.stream);
    for (const Tensor& t : f.m.layout.tensors) {
        const int64_t at = f.m.layout.flat(t);
        double squares = 0;
        for (int64_t i = 0; i < t.size; i++) squares += (double)grads[at + i] * grads[at + i];
        ASSERT_GT(squares, 0) << t.name;
        const auto loss_at = [&](double change) {          // of weights moved so far that the loss changes by about this much
            load_state(f.m, state, path);                  // the state of the unmoved weights
            std::vector<float> moved(t.size);
            for (int64_t i = 0; i < t.size; i++) moved[i] = (float)(master[at + i] + change / squares * grads[at + i]);
            upload_tensor(f.m, t, moved.data());
            const double loss = s.loss_behind(state, CHUNKS - 1);
            upload_tensor(f.m, t, master.data() + at);
            return loss;
        };
        const auto slope = [&](double h) { return (loss_at(h) - loss_at(-h)) / (2 * h); };
        EXPECT_NEAR((4 * slope(5e-5) - slope(1e-4)) / 3, 1.0, 2e-2) << t.name;
    }
}

// What the chunks of a step add up to, the same bits at each level of recomputation; the losses are those of reading in chunks
TEST_P(Tbptt, RecomputationChangesNothingAndLossesAreThoseOfReading) {
    REQUIRE_DEVICE();
    std::vector<float> first;
    for (Recompute level : {Recompute::none, Recompute::light, Recompute::full}) {
        LongSequences s(small_config(GetParam()), level);
        SequenceState state;
        state.create(s.f.m.layout, SEQUENCES, CHUNKS * CHUNK, s.f.m.stream);
        double mean = 0;
        float loss = 0;
        for (int64_t k = 0; k < CHUNKS; k++) loss = s.train(k, 1.0f / CHUNKS, k == 0);
        const std::vector<float> grads = s.f.flat(s.f.m.w.grads);
        for (int64_t k = 0; k < CHUNKS; k++) mean += s.loss_behind(state, k) / CHUNKS;
        EXPECT_NEAR(loss, mean, EXACT ? 1e-5 : 1e-3);
        EXPECT_EQ(s.held.position, CHUNKS * CHUNK);
        if (first.empty()) first = grads;
        EXPECT_EQ(memcmp(grads.data(), first.data(), grads.size() * sizeof(float)), 0) << recompute_name(level);
    }
}

// The first chunk of a sequence has nothing behind it: the gradient is that of training without a state
TEST_P(Tbptt, FirstChunkIsOrdinaryTraining) {
    REQUIRE_DEVICE();
    LongSequences s(small_config(GetParam()), Recompute::light);
    s.train(0, 1.0f, true);
    const std::vector<float> carried = s.f.flat(s.f.m.w.grads);
    s.upload(0);
    forward_backward(s.f.m, SEQUENCES, CHUNK, 1.0f, true);
    const std::vector<float> plain = s.f.flat(s.f.m.w.grads);
    EXPECT_LE(rel_l2({carried.begin(), carried.end()}, {plain.begin(), plain.end()}), EXACT ? 1e-6 : 1e-2);
}

INSTANTIATE_TEST_SUITE_P(Model, Tbptt, testing::Values("MS", "TT", "mm", "ss", "SF", "MFM"),
                         [](const auto& info) { return std::string(info.param); });

TEST(TbpttState, AStateForReadingIsRefused) {
    REQUIRE_DEVICE();
    Fixture f(small_config("MS"), 1, 8);
    SequenceState state;
    state.create(f.m.layout, 1, 8, f.m.stream);
    EXPECT_ERROR(forward_backward_from(&state, f.m, 1, 8, 1.0f, true), "must be created held");
}

} // namespace
