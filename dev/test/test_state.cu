// Sequence states in files: what is read back continues as if nothing had happened, in this build and in another one.
#include "../../data/state_io.h"
#include "model_fixture.h"
#include "test_files.h"

namespace {

// Reads tokens [from, to) of the fixture's sequences; their logits, (B, to - from, V)
std::vector<double> read_on(Fixture& f, SequenceState& state, int64_t from, int64_t to) {
    const int64_t length = to - from;
    std::vector<int> tokens((size_t)(f.B * length));
    for (int b = 0; b < f.B; b++) std::copy_n(f.tokens.begin() + b * f.T + from, length, tokens.begin() + b * length);
    upload_tokens(f.m, tokens.data(), nullptr, f.B * length);
    forward_layers(f.m, f.B, length, &state);
    return f.logits(f.B * length);
}

// Window 13: 29 tokens have been once and a bit around the rings
TEST(StateFile, ContinuesBitForBit) {
    REQUIRE_DEVICE();
    TempFolder folder;
    const std::string path = folder.path("state.safetensors");
    for (const char* blocks : {"MS", "TT", "mm", "ss", "SF", "MFM"}) {
        Fixture f(small_config(blocks), 2, 40);
        for (int64_t before : {0, 1, 5, 12, 29}) {
            SequenceState kept, loaded;
            kept.create(f.m.layout, 2, 40, f.m.stream);
            if (before > 0) read_on(f, kept, 0, before);
            save_state(f.m, kept, path);
            const std::vector<double> want = read_on(f, kept, before, 40);
            loaded.create(f.m.layout, 2, 64, f.m.stream);                  // of full attention: larger rings
            read_on(f, loaded, 3, 40);                                     // something else was in it
            load_state(f.m, loaded, path);
            EXPECT_EQ(loaded.position, before);
            EXPECT_EQ(read_on(f, loaded, before, 40), want) << blocks << " after " << before;
        }
    }
}

TEST(StateFile, OfAnotherModelIsRefusedByItem) {
    REQUIRE_DEVICE();
    TempFolder folder;
    const std::string path = folder.path("state.safetensors");
    Fixture f(small_config("MS"), 2, 40);
    SequenceState state;
    state.create(f.m.layout, 2, 40, f.m.stream);
    read_on(f, state, 0, 20);
    save_state(f.m, state, path);
    const auto load_into = [&](const Config& c, int B, uint64_t seed) {
        Fixture other(c, B, 8, Recompute::none, seed);
        SequenceState into;
        into.create(other.m.layout, B, 40, other.m.stream);
        load_state(other.m, into, path);
    };
    Config window = small_config("MS"), rope = window, renamed = window;
    window.window = 12;
    rope.rope = false;
    renamed.name = "another name";
    renamed.seq_len = 77;
    EXPECT_ERROR(load_into(window, 2, 1), "state.safetensors is the state of another configuration: local_window is 13 there and 12 in this model");
    EXPECT_ERROR(load_into(rope, 2, 1), "nope is false there and true in this model");
    EXPECT_ERROR(load_into(small_config("SM"), 2, 1), "blocks is \"MS\" there and \"SM\" in this model");
    EXPECT_ERROR(load_into(small_config("MS"), 2, 2), "other weights");
    EXPECT_ERROR(load_into(small_config("MS"), 3, 1), "holds 2 sequences and 3 are wanted");
    load_into(renamed, 2, 1);                              // a name and a training length make no other model
}

TEST(StateFile, DamageIsSeenAndLeavesAnEmptyState) {
    REQUIRE_DEVICE();
    TempFolder folder;
    const std::string path = folder.path("state.safetensors");
    Fixture f(small_config("MS"), 1, 40);
    SequenceState state;
    state.create(f.m.layout, 1, 40, f.m.stream);
    const std::vector<double> fresh = read_on(f, state, 0, 9);
    save_state(f.m, state, path);
    const std::string whole = read_text(path);
    const auto with = [&](const std::string& from, const std::string& to) {
        std::string text = whole;
        text.replace(text.find(from), from.size(), to);
        write_text(path, text);
    };
    write_text(path, whole.substr(0, whole.size() - 5));
    EXPECT_ERROR(load_state(f.m, state, path), "state.safetensors is cut off");
    with("\"position\":\"9\"", "\"position\":\"x\"");
    EXPECT_ERROR(load_state(f.m, state, path), "position \"x\"");
    with("\"position\":\"9\"", "\"position\":\"8\"");
    EXPECT_ERROR(load_state(f.m, state, path), "the shape of ring.2");
    EXPECT_EQ(state.position, 0);
    EXPECT_EQ(read_on(f, state, 0, 9), fresh);             // nothing of it is left
    save_parameters(f.m, path);
    EXPECT_ERROR(load_state(f.m, state, path), "is not a sequence state");
    EXPECT_ERROR(load_state(f.m, state, folder.path("none")), "none");
}

// A crash while writing: the file that was there stays
TEST(StateFile, AFailedWriteLeavesTheOldOne) {
    REQUIRE_DEVICE();
    TempFolder folder;
    const std::string path = folder.path("state.safetensors");
    Fixture f(small_config("MS"), 1, 40);
    SequenceState state;
    state.create(f.m.layout, 1, 40, f.m.stream);
    read_on(f, state, 0, 9);
    save_state(f.m, state, path);
    const std::string before = read_text(path);
    const TensorToWrite stops{"h.0", "F32", {8}, [](void*, int64_t, int64_t) { fail("the machine stops here"); }};
    EXPECT_ERROR(write_safetensors(path, {stops}, {}), "the machine stops here");
    EXPECT_EQ(read_text(path), before);
    EXPECT_EQ(folder.list(), std::vector<std::string>{"state.safetensors"});
    EXPECT_ERROR(save_state(f.m, state, folder.path("no/such/folder/state")), "no/such/folder/state");
}

// Between builds: the CPU build has read the first half of an official sequence and written its state; here the second half
// follows, in chunks and token by token, and is held to the logits that the official code computed of the whole in float64.
struct OfficialSequence {
    static constexpr const char* MODEL = SAMBA_SOURCE_DIR "/dev/test/golden/mha_hd64.safetensors";
    static constexpr const char* STATE = SAMBA_SOURCE_DIR "/dev/test/golden/state/mha_hd64_after_80_on_cpu.safetensors";
    static constexpr int64_t HALF = 80;
    const SafetensorsReader file{MODEL};
    Fixture f{read_config(MODEL), (int)file.info("idx").shape[0], file.info("idx").shape[1]};
    SequenceState state;
    OfficialSequence() {
        load_parameters(f.m, MODEL, "model.");
        const std::vector<double> idx = file.read_f64("idx");
        f.tokens.assign(idx.begin(), idx.end());
        state.create(f.m.layout, f.B, f.T, f.m.stream);
    }
};

TEST(StateFile, OfTheCpuBuildContinuesInThisOne) {
    REQUIRE_DEVICE();
    OfficialSequence s;
    const int V = s.f.m.config().vocab_size;
    const std::vector<double> logits = s.file.read_f64("logits");          // (B,T,V)
    for (int64_t chunk : {s.f.T - s.HALF, (int64_t)33, (int64_t)1}) {
        load_state(s.f.m, s.state, s.STATE);
        ASSERT_EQ(s.state.position, s.HALF);
        for (int64_t at = s.HALF; at < s.f.T; at += chunk) {
            const int64_t end = std::min(at + chunk, s.f.T), length = end - at;
            const std::vector<double> got = read_on(s.f, s.state, at, end);
            for (int64_t i = 0; i < s.f.B * length; i++) {                 // token by token
                const double* want = &logits[(size_t)((i / length * s.f.T + at + i % length) * V)];
                EXPECT_LE(rel_l2({&got[(size_t)(i * V)], &got[(size_t)(i * V)] + V}, {want, want + V}), EXACT ? 1e-4 : 2e-2)
                    << "chunks of " << chunk << ", position " << at + i % length;
            }
        }
    }
}

// Makes the file of the test above: build/cpu/test_samba --gtest_also_run_disabled_tests --gtest_filter='StateFile.DISABLED_*'
TEST(StateFile, DISABLED_WriteThatOfTheCpuBuild) {
    OfficialSequence s;
    read_on(s.f, s.state, 0, s.HALF);
    save_state(s.f.m, s.state, s.STATE);
}

} // namespace
