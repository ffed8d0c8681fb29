// Writing with a model: a decode step against the forward pass, a batch against each alone, the recorded graph against the same
// launches without it, full attention that outgrows its room.
#include "../../kernels/decoder.cuh"
#include "test_util.h"

namespace {

constexpr bool EXACT = sizeof(floatX) == 4;
#define REQUIRE_DEVICE() \
    do { if (ON_GPU) REQUIRE_GPU(); } while (0)

Config decoder_config(const std::string& blocks, bool rope = true, int n_kv_head = 2) {
    Config c;
    c.name = "test";
    c.blocks = blocks;
    c.d_model = 64, c.n_head = 4, c.n_kv_head = n_kv_head, c.head_dim = 16, c.d_ff = 96, c.window = 9, c.seq_len = 64;
    c.rope = rope;
    c.vocab_size = 99;
    if (blocks[0] == 'm') c.n_head = c.n_kv_head = c.head_dim = c.d_ff = 0;
    validate(c, "test");
    return c;
}

// Sizes that the kernel of a whole step takes (kernels/decode/step.cuh)
Config wide_config(const std::string& blocks, bool rope = true, int d = 128, int head_dim = 32) {
    Config c = decoder_config(blocks, rope);
    c.d_model = d, c.window = 70, c.vocab_size = 515;
    if (c.n_head) c.n_head = 4, c.n_kv_head = 2, c.head_dim = head_dim, c.d_ff = 160;
    validate(c, "test");
    return c;
}
bool has_whole_kernel() {
#ifdef SAMBA_CPU
    return false;
#else
    return !EXACT && gpu::decode::gpu().major >= 9;
#endif
}

struct Writer {
    Model m;
    explicit Writer(const Config& c, int64_t chunk = 16) : m(c) {
        m.w.create(m.layout, false);
        m.acts.create(m.layout, 1, chunk, false, Recompute::full);
        initialise(m, 5);
    }
};

std::vector<int> some_tokens(int n, int seed) {
    std::vector<int> tokens(n);
    for (int i = 0; i < n; i++) tokens[i] = (int)(counter_uniform((uint64_t)seed, (uint64_t)i) * 99);
    return tokens;
}

std::vector<double> device_floats(const float* p, int64_t n, Stream stream) {
    std::vector<float> host(n);
    copy_to_host(host.data(), p, (size_t)n * sizeof(float), stream);
    stream_sync(stream);
    return {host.begin(), host.end()};
}

// Logits of every token of one sequence by the forward pass, (T,V)
std::vector<double> whole_logits(const Config& c, const std::vector<int>& tokens) {
    Writer w(c, (int64_t)tokens.size());
    upload_tokens(w.m, tokens.data(), nullptr, (int64_t)tokens.size());
    forward_layers(w.m, 1, (int64_t)tokens.size(), nullptr);
    std::vector<float> logits(tokens.size() * c.vocab_size);
    read_logits(w.m, logits.data(), 0, (int64_t)tokens.size());
    return {logits.begin(), logits.end()};
}

const std::vector<std::string> KINDS = {"MS", "SF", "FMM", "PS", "TT", "mm", "ss"};

// Prompts of unequal length, then token by token, past the window's end
void expect_steps_equal_forward(const Config& c, const std::vector<int>& lengths, int steps) {
    const int B = (int)lengths.size(), V = c.vocab_size;
    Writer w(c);
    Decoder decoder(w.m, B, {}, 1, V, 4);                  // too little room on purpose: full attention grows
    std::vector<std::vector<int>> tokens;
    std::vector<std::vector<double>> expected;
    for (int b = 0; b < B; b++) {
        tokens.push_back(some_tokens(lengths[b] + steps, b + 1));
        expected.push_back(whole_logits(c, tokens[b]));
        decoder.prefill(b, {tokens[b].begin(), tokens[b].begin() + lengths[b]});
    }
    for (int i = 0; i < steps; i++) {
        std::vector<int> given;
        for (int b = 0; b < B; b++) given.push_back(tokens[b][lengths[b] + i]);
        decoder.step_with(given);
        const auto logits = device_floats(decoder.logits, (int64_t)B * V, w.m.stream);
        for (int b = 0; b < B; b++) {
            const std::vector<double> got(logits.begin() + b * V, logits.begin() + (b + 1) * V);
            const auto row = expected[b].begin() + (lengths[b] + i) * V;
            // float: sums in another order. bf16: roundings in other places (RMSNorm's factor comes after the product), 2^-9 of a value each
            ASSERT_LE(rel_l2(got, std::vector<double>(row, row + V)), EXACT ? 1e-5 : 2e-2) << "sequence " << b << " step " << i;
        }
    }
}

TEST(Decoder, StepsEqualTheForwardPass) {
    REQUIRE_DEVICE();
    for (const std::string& kinds : KINDS)
        for (bool rope : {true, false}) {
            SCOPED_TRACE(kinds + (rope ? " rope" : " nope"));
            expect_steps_equal_forward(decoder_config(kinds, rope), {1, 20, 37}, 23);
            expect_steps_equal_forward(wide_config(kinds, rope), {1, 60, 90}, 23);
        }
}

// More than 8 sequences; heads of each size; sizes of Samba-421M, whose blocks have several tiles
TEST(Decoder, StepsOfLargeModelsEqualTheForwardPass) {
    REQUIRE_DEVICE();
    std::vector<int> lengths;
    for (int b = 0; b < 11; b++) lengths.push_back(1 + 9 * b);
    for (int head_dim : {24, 64, 128, 256}) expect_steps_equal_forward(wide_config("MSF", true, 384, head_dim), lengths, 5);
    if (!ON_GPU) return;
    Config c = config_from_name("samba-421m");
    c.blocks = "MS", c.vocab_size = 4001, c.window = 100;
    expect_steps_equal_forward(c, {150}, 4);
    lengths.resize(9);
    expect_steps_equal_forward(c, lengths, 4);
}

// The kernel of a whole step and the kernels of its parts round at the same places: what differs is the order of sums
TEST(Decoder, OneKernelEqualsMany) {
    REQUIRE_DEVICE();
    if (!has_whole_kernel()) GTEST_SKIP() << "the kernel of a whole step is for bf16 from compute capability 9.0 on";
    for (const std::string& kinds : KINDS)
        for (int B : {1, 8, 16}) {
            SCOPED_TRACE(kinds + " batch " + std::to_string(B));
            const Config c = wide_config(kinds);
            Writer w(c);
            Decoder one(w.m, B, {}, 1, c.vocab_size, 128), many(w.m, B, {}, 1, c.vocab_size, 128);
            many.want_one_kernel = false;
            ASSERT_TRUE(one.one_kernel());
            for (int b = 0; b < B; b++)
                for (Decoder* d : {&one, &many}) d->prefill(b, some_tokens(1 + 8 * b, b));
            for (int i = 0; i < 10; i++) {
                one.step_with(some_tokens(B, i));
                many.step_with(some_tokens(B, i));
                const int64_t n = (int64_t)B * c.vocab_size;
                ASSERT_LE(rel_l2(device_floats(one.logits, n, w.m.stream), device_floats(many.logits, n, w.m.stream)), 5e-3) << "step " << i;
            }
        }
}

std::vector<std::vector<int>> written(const Config& c, const std::vector<std::vector<int>>& prompts, const SampleOptions& options,
                                      uint64_t seed, int count, bool as_graph, int ahead, std::vector<double>* logits = nullptr) {
    Writer w(c);
    Decoder decoder(w.m, (int)prompts.size(), options, seed, c.vocab_size, 8);
    decoder.as_graph = as_graph;
    for (size_t b = 0; b < prompts.size(); b++) decoder.prefill((int)b, prompts[b]);
    std::vector<std::vector<int>> out(prompts.size());
    decoder.start();
    for (int launched = 1; (int)out[0].size() < count;) {
        while (launched < count && decoder.ahead() < ahead) decoder.step(), launched++;
        const std::vector<int> ids = decoder.read();
        for (size_t b = 0; b < out.size(); b++) out[b].push_back(ids[b]);
    }
    if (logits) *logits = device_floats(decoder.logits, (int64_t)prompts.size() * c.vocab_size, w.m.stream);
    return out;
}

const std::vector<SampleOptions> DRAWS = {{0, 0, 1, 1}, {1, 0, 1, 1}, {0.9f, 20, 0.8f, 1.2f}};
// Configurations and draws that take different kernels
std::vector<std::pair<Config, SampleOptions>> cases_of(const std::string& kinds) {
    const Config small = decoder_config(kinds), wide = wide_config(kinds);
    return {{small, DRAWS[0]}, {small, DRAWS[2]}, {wide, DRAWS[0]}, {wide, DRAWS[1]}};
}

TEST(Decoder, TheGraphChangesNoBit) {
    REQUIRE_DEVICE();
    for (const std::string& kinds : KINDS)
        for (const auto& [c, o] : cases_of(kinds)) {
            const std::vector<std::vector<int>> prompts = {some_tokens(5, 1), some_tokens(18, 2)};
            std::vector<double> with, without;
            const auto a = written(c, prompts, o, 3, 40, true, 8, &with), b = written(c, prompts, o, 3, 40, false, 1, &without);
            EXPECT_EQ(a, b) << kinds;
            EXPECT_EQ(with, without) << kinds;
            EXPECT_EQ(a[0].size(), 40u);
        }
}

// Blocks that read each other's results too early, or a step those of the step before, would show in some of many steps
TEST(Decoder, TheSameBitsEveryTime) {
    REQUIRE_DEVICE();
    for (const std::string& kinds : {std::string("MSF"), std::string("ss")})
        for (int B : {1, 2, 3, 9, 16}) {
            const Config c = wide_config(kinds);
            std::vector<std::vector<int>> prompts;
            for (int b = 0; b < B; b++) prompts.push_back(some_tokens(1 + 5 * b % 30, b));
            std::vector<double> first, again;
            const int count = ON_GPU ? 400 : 10;
            const auto a = written(c, prompts, {1, 0, 1, 1}, 3, count, true, 8, &first);
            const auto b = written(c, prompts, {1, 0, 1, 1}, 3, count, true, 8, &again);
            EXPECT_EQ(a, b) << kinds << " batch " << B;
            EXPECT_EQ(first, again) << kinds << " batch " << B;
        }
}

TEST(Decoder, ABatchWritesWhatEachWritesAlone) {
    REQUIRE_DEVICE();
    for (const std::string& kinds : KINDS)
        for (const auto& [c, o] : cases_of(kinds)) {
            std::vector<std::vector<int>> prompts;
            for (int b = 0; b < 11; b++) prompts.push_back(some_tokens(1 + 7 * b % 30, b));
            const auto together = written(c, prompts, o, 3, 20, true, 4);
            for (size_t b = 0; b < prompts.size(); b += 5)
                EXPECT_EQ(written(c, {prompts[b]}, o, 3 + b, 20, true, 4)[0], together[b]) << kinds << " sequence " << b;
        }
}

// A prompt in two turns is the prompt as a whole
TEST(Decoder, TurnsContinueTheState) {
    REQUIRE_DEVICE();
    for (const std::string& kinds : KINDS) {
        const Config c = decoder_config(kinds);
        Writer w(c);
        Decoder turns(w.m, 1, {0, 0, 1, 1}, 1, c.vocab_size, 8);
        std::vector<int> text = some_tokens(7, 1);
        turns.prefill(0, text);
        turns.start();
        text.push_back(turns.read()[0]);
        for (int i = 0; i < 12; i++) turns.step(), text.push_back(turns.read()[0]);
        const std::vector<int> more = some_tokens(21, 2);
        std::vector<int> next = {text.back()};             // was drawn and not yet read by the model
        next.insert(next.end(), more.begin(), more.end());
        turns.prefill(0, next);
        turns.start();
        text.insert(text.end(), more.begin(), more.end());
        EXPECT_EQ(turns.positions[0], (int64_t)text.size());
        const auto logits = device_floats(turns.logits, c.vocab_size, w.m.stream), expected = whole_logits(c, text);
        EXPECT_LE(rel_l2(logits, std::vector<double>(expected.end() - c.vocab_size, expected.end())), EXACT ? 1e-5 : 2e-2) << kinds;
    }
}

TEST(Decoder, RefusesWhatItCannotDo) {
    REQUIRE_DEVICE();
    Writer w(decoder_config("MS"));
    EXPECT_THROW(Decoder(w.m, 17, {}, 1, 99), Error);
    EXPECT_THROW(Decoder(w.m, 0, {}, 1, 99), Error);
}

} // namespace
