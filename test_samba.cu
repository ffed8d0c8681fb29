// The tests' entry, and the tests of the model as a whole. Operations have theirs in dev/test/. samba.cuh is included as a
// user would; the same file is compiled for the CPU, and for the GPU in bf16 and in float.
#include <filesystem>

#include "samba.cuh"

#include "data/model_io.h"
#include "dev/test/model_fixture.h"

#ifndef SAMBA_SOURCE_DIR
#define SAMBA_SOURCE_DIR "."
#endif

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Configurations

TEST(Configurations, ParameterCountsEqualTheSpecification) {
    const std::map<std::string, int64_t> expected = {
        {"llama-438m", 438081024}, {"llama-438m-swa", 438081024}, {"llama-438m-swa-full", 438081024}, {"llama-438m-swa-mqa", 414488064},
        {"llama-438m-swa-mqa6", 419206656}, {"llama-438m-swa-gqa2", 419206656}, {"llama-438m-swa-gqa4", 428643840}, {"llama-438m2k", 438081024},
        {"llama-438m8k-swa", 438081024}, {"llama-438m16k-swa", 438081024}, {"llama-438m32k-swa", 438081024}, {"llama-438m-swa-paral", 445536768},
        {"llama-438m-swa-8k4k", 445558272}, {"llama-438m-swa-8k2k", 445558272}, {"samba-421m", 421793280}, {"samba-421m-abl-mamba", 417240576},
        {"mamba-swa-mlp-400m", 394999296}, {"samba-421m-nope", 421793280}, {"llama-449m-full-mamba-0", 449180160},
        {"llama-449m-full-mamba-11", 449180160}, {"llama-449m-full-mamba-5", 449180160}, {"llama-443m-full-mamba-1-5", 443702784},
        {"samba-421m-mqa", 424152576}, {"samba-421m-gqa4", 431230464},
        {"samba-421m-gqa2", 426511872}, {"samba-421m-mqa6", 426511872}, {"samba-421m-1k-window", 421793280}, {"samba-421m-512-window", 421793280},
        {"samba-1.3b", 1330207488}, {"samba-1.3b-nope", 1330207488}, {"samba-1.3b-abl-mamba", 1315982592}, {"mamba-swa-mlp-1.3b", 1239397632},
        {"llama-1.3b-swa", 1347842304}, {"llama-1.3b-swa-8k4k", 1347842304}, {"llama-1.3b-swa-8k2k", 1347842304}, {"llama-1.3b", 1347842304},
        {"llama-2.9b", 2914667520}, {"mamba-370m", 352797696}, {"mamba-430m", 432804864}, {"mamba-1.3b", 1334740992}};
    EXPECT_EQ(expected.size(), 40u);                       // the reference's 46 less GLA, RetNet and Mega-S6, two each
    for (auto& [name, count] : expected) EXPECT_EQ(Layout(config_from_name(name)).parameters(), count) << name;
    const double retrieval = (double)Layout(config_from_name("retrieval")).parameters();
    EXPECT_NEAR((double)Layout(config_from_name("retrieval-swa")).parameters(), retrieval, 0.005 * retrieval);
    EXPECT_NEAR((double)Layout(config_from_name("samba-1.7b")).parameters(), 1742.2e6, 0.05e6);
    EXPECT_NEAR((double)Layout(config_from_name("samba-3.8b")).parameters(), 3864.3e6, 0.05e6);
}

TEST(Configurations, SurviveJson) {
    for (const NamedConfig& n : named_configs()) {
        const Config c = config_from_name(n.name), back = config_from_json(config_to_json(c), "test");
        EXPECT_EQ(config_to_json(back), config_to_json(c)) << n.name;
        EXPECT_EQ(Layout(back).parameters(), Layout(c).parameters()) << n.name;
    }
}

TEST(Configurations, OfficialFieldsGiveTheSameBlocks) {
    const auto blocks = [](nlohmann::json j) { return official_blocks(j, "test"); };
    EXPECT_EQ(blocks({{"n_layer", 4}, {"mb_per_layer", 2}, {"local_window", 64}}), "MSMS");
    EXPECT_EQ(blocks({{"n_layer", 4}, {"local_window", 64}, {"full_per_layer", 2}}), "SFSF");
    EXPECT_EQ(blocks({{"n_layer", 3}}), "FFF");
    EXPECT_EQ(blocks({{"n_layer", 4}, {"attn_layer_pos", "[1,3]"}}), "MFMF");
    EXPECT_EQ(blocks({{"n_layer", 2}, {"mb_per_layer", 2}, {"local_window", 64}, {"abl_mamba", true}}), "PS");
    EXPECT_EQ(blocks({{"n_layer", 2}, {"mamba_swa_mlp", true}}), "TT");
    EXPECT_EQ(blocks({{"n_layer", 2}, {"mamba", true}}), "mm");
    EXPECT_THROW(blocks({{"n_layer", 2}, {"use_mega", true}}), Error);
    EXPECT_THROW(blocks({{"n_layer", 2}, {"gla_per_layer", 2}}), Error);
}

TEST(Configurations, BadOnesAreRefusedByName) {
    const auto message = [](const std::string& blocks, auto change) {
        Config c = small_config("MS");
        c.blocks = blocks;
        change(c);
        try { validate(c, "x.json"); } catch (const Error& e) { return std::string(e.what()); }
        return std::string();
    };
    EXPECT_NE(message("MQ", [](Config&) {}).find("x.json: blocks \"MQ\""), std::string::npos);
    EXPECT_NE(message("MS", [](Config& c) { c.d_model = 60; }).find("d_model 60"), std::string::npos);
    EXPECT_NE(message("MS", [](Config& c) { c.vocab_size = 70000; }).find("vocab_size 70000"), std::string::npos);
    EXPECT_NE(message("MS", [](Config& c) { c.n_kv_head = 3; }).find("n_kv_head 3"), std::string::npos);
    EXPECT_NE(message("MS", [](Config& c) { c.head_dim = 12; }).find("head_dim 12"), std::string::npos);
    EXPECT_NE(message("MT", [](Config&) {}).find("cannot be mixed"), std::string::npos);
    EXPECT_THROW(config_from_name("samba-9000b"), Error);
    EXPECT_THROW(config_from_json(nlohmann::json::array(), "x.json"), Error);
    EXPECT_THROW(config_from_json({{"n_embd", "wide"}, {"blocks", "MS"}}, "x.json"), Error);
}

TEST(Initialisation, FollowsTheTwoFamilies) {
    // tensor -> standard deviation (a uniform of bound b has b/sqrt(3)), spec 1.3
    const auto check = [](const Config& c, const std::string& name, double mean, double deviation) {
        const Layout layout(c);
        for (const Tensor& t : layout.tensors) {
            if (t.name != name) continue;
            double sum = 0, squares = 0;
            const uint64_t key = stream_key(3407, t.name);
            for (int64_t i = 0; i < t.size; i++) {
                const double x = initial_value(t, key, i);
                sum += x; squares += x * x;
            }
            const double m = sum / (double)t.size, s = std::sqrt(std::max(0.0, squares / (double)t.size - m * m));
            EXPECT_NEAR(m, mean, 5 * deviation / std::sqrt((double)t.size) + 1e-7) << name;
            EXPECT_NEAR(s, deviation, 5 * deviation / std::sqrt(2.0 * (double)t.size) + 1e-7) << name;
            return;
        }
        FAIL() << "no tensor " << name;
    };
    Config a = small_config("MSMS");
    const std::string h = "transformer.h.";
    check(a, "lm_head.weight", 0, 0.02);
    check(a, h + "0.attn.in_proj.weight", 0, 1 / std::sqrt(3.0 * 64));
    check(a, h + "0.attn.conv1d.bias", 0, 0.5 / std::sqrt(3.0));
    check(a, h + "0.attn.dt_proj.weight", 0, 1 / std::sqrt(3.0 * 4));
    check(a, h + "0.attn.out_proj.weight", 0, 1 / std::sqrt(3.0 * 128) / std::sqrt(8.0));
    check(a, h + "1.attn.proj.weight", 0, 1 / std::sqrt(3.0 * 64) / std::sqrt(8.0));
    check(a, h + "1.mlp.swiglu.w3.weight", 0, 1 / std::sqrt(3.0 * 96) / std::sqrt(8.0));
    check(a, h + "0.attn.D", 1, 0);
    check(a, h + "0.norm_1.weight", 1, 0);
    Config b = small_config("SFS");
    b.init = InitFamily::llama;
    b.tied = false;
    check(b, "transformer.wte.weight", 0, std::sqrt(0.4 / 64));
    check(b, "lm_head.weight", 0, std::sqrt(0.4 / 64));
    check(b, h + "0.attn.attn.weight", 0, std::sqrt(0.4 / 64));
    check(b, h + "1.attn.proj.weight", 0, 1 / (std::sqrt(64.0) * 3));
    check(b, h + "2.mlp.swiglu.w3.weight", 0, 1 / (std::sqrt(64.0) * 3));
    check(small_config("TT"), h + "1.mb.out_proj.weight", 0, 1 / std::sqrt(3.0 * 128) / std::sqrt(6.0));
    check(small_config("mm"), h + "1.mixer.out_proj.weight", 0, 1 / std::sqrt(3.0 * 128) / std::sqrt(2.0));

    const Layout layout(a);
    for (const Tensor& t : layout.tensors) {
        const uint64_t key = stream_key(3407, t.name);
        if (t.name == h + "0.attn.A_log") {
            for (int64_t i = 0; i < t.size; i++) EXPECT_FLOAT_EQ(initial_value(t, key, i), std::log(1.0f + (float)(i % 16)));
        }
        if (t.name == h + "0.attn.dt_proj.bias") {
            for (int64_t i = 0; i < t.size; i++) {
                const double dt = std::log1p(std::exp((double)initial_value(t, key, i)));
                EXPECT_GE(dt, 0.001 * 0.999);
                EXPECT_LE(dt, 0.1 * 1.001);
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Golden files: the official code in float64

struct GoldenTolerance { double logits, gradients, losses; size_t norms; };   // norms: of how many steps the gradient norm is held to `gradients`
// float: the contract of design.md 8. bf16: weights are exact in bf16, so errors come from rounding activations: about ten
// roundings of 2^-9 a layer, four layers of a random walk, 2^-9 * sqrt(40 / 3) = 0.7e-2 for logits; the backward pass doubles
// the number of roundings and small tensors (norm gains, biases) average them less well. Adam's first updates are nearly
// lr * sign(gradient), so that gradients near 0 move weights by whole steps in one direction or the other. From the second
// step on a bf16 run is therefore another run of nearly the same course: its losses are held to 1e-2 of the first loss (they
// fall to a fifteenth of it, so that their own size is no measure), and the gradient norm is compared at the first step.
constexpr GoldenTolerance GOLDEN = EXACT ? GoldenTolerance{1e-4, 1e-4, 1e-3, 6} : GoldenTolerance{2e-2, 5e-2, 1e-2, 1};

void run_golden(const std::string& path) {
    const SafetensorsReader file(path);
    const Config config = read_config(path);
    const std::vector<int64_t> shape = file.info("idx").shape;
    const int B = (int)shape.at(0);
    const int64_t T = shape.at(1);
    Fixture f(config, B, T, Recompute::light);
    load_parameters(f.m, path, "model.");
    const auto integers = [&](const char* name) {
        const std::vector<double> values = file.read_f64(name);
        return std::vector<int>(values.begin(), values.end());
    };
    f.tokens = integers("idx");
    f.targets = integers("targets");
    const std::vector<double> losses = file.read_f64("losses"), norms = file.read_f64("grad_norms");

    const float loss = f.loss_and_gradients();
    EXPECT_NEAR(loss, losses[0], GOLDEN.losses * losses[0]) << path;
    const double logit_error = rel_l2(f.logits(B * T), file.read_f64("logits"));
    EXPECT_LE(logit_error, GOLDEN.logits) << path;
    double worst = 0;
    std::string worst_name;
    for (const Tensor& t : f.m.layout.tensors) {
        const double error = rel_l2(f.gradient(t), file.read_f64("grad." + t.name));
        EXPECT_LE(error, GOLDEN.gradients) << path << ": gradient of " << t.name;
        if (error >= worst) worst = error, worst_name = t.name;
    }
    double worst_loss = 0, worst_norm = 0;
    for (size_t step = 0; step < losses.size(); step++) {
        const float now = f.loss_and_gradients();
        worst_loss = std::max(worst_loss, std::abs(now - losses[step]) / (EXACT ? losses[step] : losses[0]));
        update(f.m, AdamW{1e-3f, 0.9f, 0.95f, 1e-8f, 0.1f, (int64_t)step + 1}, 1.0f, true);
        float norm[2];
        copy_to_host(norm, f.m.acts.norm, sizeof norm, f.m.stream);
        stream_sync(f.m.stream);
        const double norm_error = std::abs(norm[0] - norms[step]) / norms[step];
        worst_norm = std::max(worst_norm, norm_error);
        if (step < GOLDEN.norms) { EXPECT_LE(norm_error, GOLDEN.gradients) << path << ": gradient norm of step " << step; }
    }
    EXPECT_LE(worst_loss, GOLDEN.losses) << path << ": a loss of six AdamW steps";
    printf("golden %-28s logits %.1e   gradients %.1e (%s)   six steps: losses %.1e, norms %.1e\n",
           std::filesystem::path(path).filename().c_str(), logit_error, worst, worst_name.c_str(), worst_loss, worst_norm);
}

TEST(Golden, FilesOfTheOfficialCode) {
    REQUIRE_DEVICE();
    const char* given = std::getenv("SAMBA_GOLDEN_DIR");
    const std::string directory = given ? given : SAMBA_SOURCE_DIR "/dev/test/golden";
    const std::vector<std::string> paths = expand_globs({directory + "/*.safetensors"});
    ASSERT_FALSE(paths.empty());
    for (const std::string& path : paths) run_golden(path);
}

// ---------------------------------------------------------------------------------------------------------------------
// Gradients of every kind of block

class EveryBlock : public testing::TestWithParam<std::tuple<const char*, bool, bool>> {
protected:
    Config config() const {
        auto [blocks, rope, tied] = GetParam();
        Config c = small_config(blocks);
        c.rope = rope;
        c.tied = tied;
        if (!tied) c.init = InitFamily::llama;
        return c;
    }
};

// The derivative along the gradient itself: L(w + s g) - L(w - s g) = 2 s |g|^2 + O(s^3). One tensor at a time, so that an
// error in a small one is not drowned. The step changes the loss by 2e-4: a mean of 74 float losses of about 5 is exact to
// 1e-7, and the step is small enough for the cubic term. A larger embedding makes the scan's inputs, and so the gradients of
// its step size and decay, large enough for that.
TEST_P(EveryBlock, GradientIsTheDerivativeOfTheLoss) {
    REQUIRE_DEVICE();
    REQUIRE_FLOAT();
    Fixture f(config(), 2, 37);
    scale_tensor(f, "lm_head.weight", 10);
    scale_tensor(f, "transformer.wte.weight", 10);
    f.loss_and_gradients();
    const std::vector<float> grads = f.flat(f.m.w.grads), master = f.flat(f.m.w.master);
    for (const Tensor& t : f.m.layout.tensors) {
        const int64_t at = f.m.layout.flat(t);
        double squares = 0;
        for (int64_t i = 0; i < t.size; i++) squares += (double)grads[at + i] * grads[at + i];
        ASSERT_GT(squares, 0) << t.name;
        const double step = 1e-4 / squares;
        double loss[2];
        for (int sign : {0, 1}) {
            std::vector<float> moved(t.size);
            for (int64_t i = 0; i < t.size; i++) moved[i] = (float)(master[at + i] + (sign ? step : -step) * grads[at + i]);
            upload_tensor(f.m, t, moved.data());
            loss[sign] = f.loss_alone();
        }
        upload_tensor(f.m, t, master.data() + at);
        EXPECT_NEAR((loss[1] - loss[0]) / 2e-4, 1.0, 2e-2) << t.name;
    }
}

TEST_P(EveryBlock, RecomputationChangesNothing) {
    REQUIRE_DEVICE();
    std::vector<std::vector<float>> grads;
    std::vector<float> losses;
    size_t bytes = SIZE_MAX;
    for (Recompute level : {Recompute::none, Recompute::light, Recompute::full}) {
        Fixture f(config(), 2, 37, level);
        losses.push_back(f.loss_and_gradients());
        grads.push_back(f.flat(f.m.w.grads));
        EXPECT_LE(f.m.acts.bytes(), bytes) << recompute_name(level);
        bytes = f.m.acts.bytes();
    }
    for (int i : {1, 2}) {
        EXPECT_EQ(losses[i], losses[0]);
        EXPECT_EQ(memcmp(grads[i].data(), grads[0].data(), grads[0].size() * sizeof(float)), 0) << "level " << i;
    }
}

// One forward in chunks of several lengths, and token by token, with the state carried along
TEST_P(EveryBlock, ChunksAndStepsEqualTheWhole) {
    REQUIRE_DEVICE();
    const int64_t T = 40;
    Fixture f(config(), 2, T);
    upload_tokens(f.m, f.tokens.data(), nullptr, 2 * T);
    forward_layers(f.m, 2, T, nullptr);
    const int V = f.m.config().vocab_size;
    const std::vector<double> whole = f.logits(2 * T);
    for (std::vector<int64_t> lengths : {std::vector<int64_t>{17, 1, 22}, std::vector<int64_t>{2, 30, 8}, std::vector<int64_t>(T, 1)}) {
        SequenceState state;
        state.create(f.m.layout, 2, T, f.m.stream);
        std::vector<double> chunked(whole.size());
        int64_t at = 0;
        for (int64_t length : lengths) {
            std::vector<int> tokens(2 * length);
            for (int b = 0; b < 2; b++) std::copy_n(f.tokens.begin() + b * T + at, length, tokens.begin() + b * length);
            upload_tokens(f.m, tokens.data(), nullptr, 2 * length);
            forward_layers(f.m, 2, length, &state);
            const std::vector<double> part = f.logits(2 * length);
            for (int b = 0; b < 2; b++) std::copy_n(part.begin() + b * length * V, length * V, chunked.begin() + (b * T + at) * V);
            at += length;
        }
        // float: sums in another order. bf16: such a difference can flip a rounding, 2^-8 of a value, in some of a layer's tensors.
        EXPECT_LE(rel_l2(chunked, whole), EXACT ? 1e-5 : 1e-2) << lengths.size() << " chunks";
        EXPECT_EQ(state.position, T);
    }
}

INSTANTIATE_TEST_SUITE_P(Model, EveryBlock,
                         testing::Values(std::tuple{"MS", true, true}, std::tuple{"MFM", true, false}, std::tuple{"PS", false, true},
                                         std::tuple{"TT", true, true}, std::tuple{"mm", true, true}, std::tuple{"ss", true, true},
                                         std::tuple{"SF", true, false}),
                         [](const auto& info) {
                             return std::string(std::get<0>(info.param)) + (std::get<1>(info.param) ? "_rope" : "_nope") +
                                    (std::get<2>(info.param) ? "_tied" : "_untied");
                         });

// ---------------------------------------------------------------------------------------------------------------------
// Training

TEST(Training, FiftyStepsLearnAndTwoRunsAreTheSameBits) {
    REQUIRE_DEVICE();
    std::vector<float> first_losses;
    std::vector<float> first_weights;
    for (int repetition = 0; repetition < 2; repetition++) {
        Fixture f(small_config("MS"), 4, 32, Recompute::light);
        std::vector<float> losses;
        for (int step = 1; step <= 50; step++) {
            // a sequence that can be predicted: each token is the one before it plus a step that the sequence keeps
            for (int b = 0; b < 4; b++)
                for (int t = 0; t < 32; t++) {
                    const int stride = 1 + (step * 4 + b) % 5;
                    f.tokens[b * 32 + t] = (b * 7 + step + t * stride) % 97;
                    f.targets[b * 32 + t] = (b * 7 + step + (t + 1) * stride) % 97;
                }
            losses.push_back(f.loss_and_gradients());
            update(f.m, AdamW{3e-3f, 0.9f, 0.95f, 1e-8f, 0.1f, step}, 1.0f, true);
        }
        EXPECT_NEAR(losses.front(), std::log(97.0), 0.3);
        EXPECT_LT(losses.back(), 2.5);
        const std::vector<float> weights = f.flat(f.m.w.master);
        if (repetition == 0) first_losses = losses, first_weights = weights;
        EXPECT_EQ(losses, first_losses);
        EXPECT_EQ(memcmp(weights.data(), first_weights.data(), weights.size() * sizeof(float)), 0);
    }
}

// Four micro-batches of 2 sequences are one batch of 8
TEST(Training, MicroBatchesAddUpToTheBatch) {
    REQUIRE_DEVICE();
    Fixture whole(small_config("MS"), 8, 24), parts(small_config("MS"), 2, 24);
    whole.loss_and_gradients();
    const std::vector<float> expected = whole.flat(whole.m.w.grads);
    for (int i = 0; i < 4; i++) {
        upload_tokens(parts.m, whole.tokens.data() + i * 48, whole.targets.data() + i * 48, 48);
        forward_backward(parts.m, 2, 24, 0.25f, i == 0);
    }
    const std::vector<float> got = parts.flat(parts.m.w.grads);
    // float: another order of sums. bf16: gradients scaled by 1/4 exactly, then as above.
    EXPECT_LE(rel_l2(std::vector<double>(got.begin(), got.end()), std::vector<double>(expected.begin(), expected.end())), EXACT ? 2e-5 : 1e-2);
    float losses[2];
    copy_to_host(&losses[0], whole.m.acts.loss, sizeof(float), whole.m.stream);
    copy_to_host(&losses[1], parts.m.acts.loss, sizeof(float), parts.m.stream);
    stream_sync(whole.m.stream);
    stream_sync(parts.m.stream);
    EXPECT_NEAR(losses[0], losses[1], EXACT ? 1e-5 : 1e-3);
}

// A host that runs ahead of the GPU must not fill a batch's memory again before the batch has been copied
TEST(Training, ABatchIsCopiedBeforeTheOneAfterTheNextIsUploaded) {
    REQUIRE_DEVICE();
    Fixture f(small_config("MS"), 2, 24);
    std::vector<int*> batches;
    for (int i = 0; i < 2; i++) batches.push_back((int*)pinned_alloc(48 * sizeof(int)));
    std::fill_n(batches[0], 48, 1);
    stream_delay(f.m.stream, 100000);                      // the GPU is busy for a tenth of a second
    upload_tokens(f.m, batches[0], nullptr, 48);
    int* kept = (int*)device_alloc(48 * sizeof(int), "a copy");
    copy_on_device(kept, f.m.acts.tokens, 48 * sizeof(int), f.m.stream);
    std::fill_n(batches[1], 48, 2);
    upload_tokens(f.m, batches[1], nullptr, 48);
    std::fill_n(batches[0], 48, 3);                        // what the loader's thread may do from here on
    std::vector<int> got(48);
    copy_to_host(got.data(), kept, 48 * sizeof(int), f.m.stream);
    stream_sync(f.m.stream);
    EXPECT_EQ(got, std::vector<int>(48, 1));
    device_free(kept);
    for (int* p : batches) pinned_free(p);
}

// Steps of two micro-batches, replayed as graphs or not, with a validation in between that leaves other RoPE angles: the same bits.
// Both with the algorithms that the first rehearsal found.
TEST(Training, GraphsChangeNoBit) {
    REQUIRE_DEVICE();
    std::vector<std::vector<float>> weights;
    std::vector<float> losses;
    MatmulChoices choices;
    for (const auto pass : {forward_backward, forward_backward_graph}) {
        Fixture f(small_config("MS"), 2, 32, Recompute::light);
        SequenceState state;
        state.create(f.m.layout, 2, 64, f.m.stream);
        f.m.matmul.choices = choices;
        rehearse(f.m, 2, 32, true, true);
        choices = f.m.matmul.choices;
        for (int step = 1; step <= 4; step++) {
            for (int micro = 0; micro < 2; micro++) {
                f.tokens = random_tokens(64, 97, 10 * step + micro);
                upload_tokens(f.m, f.tokens.data(), f.targets.data(), 64);
                pass(f.m, 2, 32, 0.5f, micro == 0);
            }
            update(f.m, AdamW{3e-3f, 0.9f, 0.95f, 1e-8f, 0.1f, step}, 1.0f, true);
            float loss;
            copy_to_host(&loss, f.m.acts.loss, sizeof loss, f.m.stream);
            stream_sync(f.m.stream);
            losses.push_back(loss);
            if (step == 2) evaluate(f.m, 2, 32, &state), evaluate(f.m, 2, 32, &state);
        }
        weights.push_back(f.flat(f.m.w.master));
    }
    for (int i = 0; i < 4; i++) EXPECT_EQ(losses[i], losses[4 + i]) << "step " << i + 1;
    EXPECT_EQ(memcmp(weights[0].data(), weights[1].data(), weights[0].size() * sizeof(float)), 0);
}

TEST(Training, AGradientThatIsNotFiniteChangesNothing) {
    REQUIRE_DEVICE();
    Fixture f(small_config("MS"), 1, 8);
    f.loss_and_gradients();
    const std::vector<float> before = f.flat(f.m.w.master);
    const float nan = std::nanf("");
    copy_to_device(f.m.w.grads + 5, &nan, sizeof nan, f.m.stream);
    update(f.m, AdamW{1e-2f, 0.9f, 0.95f, 1e-8f, 0.1f, 1}, 1.0f, true);
    const std::vector<float> after = f.flat(f.m.w.master);
    EXPECT_EQ(memcmp(before.data(), after.data(), before.size() * sizeof(float)), 0);
}

TEST(Training, DecayOfMatricesAloneLeavesVectors) {
    REQUIRE_DEVICE();
    Fixture f(small_config("MS"), 1, 8);
    const std::vector<float> before = f.flat(f.m.w.master);
    device_zero(f.m.w.grads, f.m.w.n * sizeof(float), f.m.stream);
    update(f.m, AdamW{0.1f, 0.9f, 0.95f, 1e-8f, 0.5f, 1}, 1.0f, false);
    const std::vector<float> after = f.flat(f.m.w.master);
    for (const Tensor& t : f.m.layout.tensors) {
        const int64_t i = f.m.layout.flat(t) + t.size / 2;
        EXPECT_FLOAT_EQ(after[i], before[i] * (t.is_matrix ? 0.95f : 1.0f)) << t.name;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Model files

struct TemporaryDirectory {
    std::string path;
    TemporaryDirectory() {
        char name[] = "/tmp/samba_test_XXXXXX";
        path = mkdtemp(name);
    }
    ~TemporaryDirectory() { std::filesystem::remove_all(path); }
};

TEST(ModelFile, RoundTripsEveryBit) {
    REQUIRE_DEVICE();
    TemporaryDirectory directory;
    for (const char* blocks : {"MS", "TT", "mm", "ss"}) {
        Fixture saved(small_config(blocks), 1, 8, Recompute::none, 1), loaded(small_config(blocks), 1, 8, Recompute::none, 2);
        saved.loss_and_gradients();
        update(saved.m, AdamW{1e-2f, 0.9f, 0.95f, 1e-8f, 0.1f, 1}, 1.0f, true);
        save_parameters(saved.m, directory.path + "/model.safetensors");
        save_moments(saved.m, directory.path + "/optimizer.safetensors");
        load_parameters(loaded.m, directory.path + "/model.safetensors");
        load_moments(loaded.m, directory.path + "/optimizer.safetensors");
        EXPECT_EQ(config_to_json(read_config(directory.path + "/model.safetensors")), config_to_json(saved.m.config()));
        EXPECT_EQ(saved.flat(saved.m.w.master), loaded.flat(loaded.m.w.master)) << blocks;
        EXPECT_EQ(saved.flat(saved.m.w.m), loaded.flat(loaded.m.w.m)) << blocks;
        EXPECT_EQ(saved.flat(saved.m.w.v), loaded.flat(loaded.m.w.v)) << blocks;
        loaded.tokens = saved.tokens;
        loaded.targets = saved.targets;
        EXPECT_EQ(saved.loss_alone(), loaded.loss_alone()) << blocks;
    }
}

TEST(ModelFile, OfAnotherModelIsRefused) {
    REQUIRE_DEVICE();
    TemporaryDirectory directory;
    const std::string path = directory.path + "/model.safetensors";
    Fixture saved(small_config("MS"), 1, 8);
    save_parameters(saved.m, path);
    Config wider = small_config("MS");
    wider.d_ff = 128;
    for (const Config& other : {wider, small_config("SM")}) {
        Fixture f(other, 1, 8);
        try {
            load_parameters(f.m, path);
            FAIL() << "loaded a checkpoint of another model";
        } catch (const Error& e) {
            EXPECT_NE(std::string(e.what()).find(path), std::string::npos) << e.what();
            EXPECT_NE(std::string(e.what()).find("another model"), std::string::npos) << e.what();
        }
    }
}

// The plan alone: nothing is allocated, but a GPU build asks the GPU how much workspace its kernels want
TEST(Plan, LogitsLieWhereTheLayersGradientsWere) {
    REQUIRE_DEVICE();
    for (const char* name : {"samba-421m", "samba-1.3b", "llama-438m-swa-paral"}) {
        Config c = config_from_name(name), no_head = c;
        no_head.vocab_size = 2;
        int64_t rows = 0;
        for (Recompute level : {Recompute::none, Recompute::light, Recompute::full}) {
            SCOPED_TRACE(std::string(name) + " " + recompute_name(level));
            Activations acts, without;
            for (Activations* a : {&acts, &without}) a->B = 8, a->T = 4096, a->training = true, a->recompute = level;
            acts.plan(Layout(c));
            without.plan(Layout(no_head));
            EXPECT_EQ(acts.bytes() - acts.kept.bytes(), without.bytes() - without.kept.bytes()) << "the head takes no more scratch memory";
            EXPECT_GT(acts.logit_rows, 2 * ((256 << 20) / (c.vocab_size * (int64_t)sizeof(floatX))));
            EXPECT_EQ(acts.logit_rows % 128, 0);
            if (level == Recompute::none) rows = acts.logit_rows;
            EXPECT_EQ(acts.logit_rows, rows) << "the sums over rows are the same at every level";
        }
    }
}

TEST(Flops, PerTokenOfSamba421mIsThePapers) {
    // spec 7.1: 2.70 GFLOP with all parameters counted; vectors and norms add under 0.1%
    EXPECT_NEAR(flops_per_token(Layout(config_from_name("samba-421m")), 4096), 2.70e9, 0.01e9);
    EXPECT_NEAR(flops_per_token(Layout(config_from_name("samba-1.3b")), 4096), 8.36e9, 0.03e9);
}

} // namespace

int main(int argc, char** argv) {
    testing::InitGoogleTest(&argc, argv);
    return RUN_ALL_TESTS();
}
