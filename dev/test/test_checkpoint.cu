// safetensors files and checkpoint directories: round trips, malformed files, full disks, crashes.
#include <csignal>
#include <numeric>

#include <sys/resource.h>
#include <sys/wait.h>

#include "../../data/checkpoint.h"
#include "../../data/safetensors.h"
#include "test_files.h"
#include "test_util.h"

namespace {

// A file of the format put together by hand
std::string raw_file(const std::string& header, const std::string& data) {
    const uint64_t n = header.size();
    return std::string((const char*)&n, 8) + header + data;
}

template <class T> TensorToWrite tensor(const std::string& name, const std::string& dtype, std::vector<int64_t> shape, const std::vector<T>& values) {
    const auto give = [values](void* dst, int64_t offset, int64_t bytes) { memcpy(dst, (const char*)values.data() + offset, (size_t)bytes); };
    return {name, dtype, std::move(shape), give};
}

// The largest file that this process may write, and no death by signal when it tries more
struct FileSizeLimit {
    rlimit old;
    void (*handler)(int);
    explicit FileSizeLimit(size_t bytes) {
        getrlimit(RLIMIT_FSIZE, &old);
        handler = signal(SIGXFSZ, SIG_IGN);
        rlimit limit = {bytes, old.rlim_max};
        setrlimit(RLIMIT_FSIZE, &limit);
    }
    ~FileSizeLimit() {
        setrlimit(RLIMIT_FSIZE, &old);
        signal(SIGXFSZ, handler);
    }
};

// A committed checkpoint with two files
std::string make_checkpoint(const std::string& out_dir, int64_t step, const std::string& content = "weights") {
    CheckpointWriter writer(out_dir, step);
    write_text(writer.path("model.safetensors"), content);
    write_text(writer.path("optimizer.safetensors"), "moments of " + content);
    writer.commit({{"step", step}});
    return out_dir + "/" + checkpoint_name(step);
}

// Captures stderr while in scope
std::string stderr_of(const std::function<void()>& f) {
    testing::internal::CaptureStderr();
    f();
    return testing::internal::GetCapturedStderr();
}

} // namespace

TEST(Safetensors, RoundTrip) {
    TempFolder folder;
    const std::string path = folder.path("x.safetensors");
    const std::vector<float> a = {1.5f, -2, 0x1p-140f, INFINITY, 5, 6};
    const std::vector<double> b = {1e300, -0.0, 3};
    const std::vector<int32_t> c = {INT32_MIN, 7};
    const std::vector<uint8_t> d = {1, 2, 255};
    const std::vector<float> scalar = {42};
    const std::map<std::string, std::string> metadata = {{"config", "{\"n\": 3}"}, {"quote\"\n", "ünïcode"}};
    std::vector<int64_t> progress;
    write_safetensors(path, {tensor("d", "U8", {3}, d), tensor("a", "F32", {2, 3}, a), tensor("empty", "F32", {0, 5}, std::vector<float>{}),
                             tensor("b", "F64", {3}, b), tensor("c", "I32", {2}, c), tensor("scalar", "F32", {}, scalar)},
                      metadata, [&](int64_t bytes) { progress.push_back(bytes); });
    EXPECT_EQ(folder.list(), std::vector<std::string>{"x.safetensors"});
    EXPECT_EQ(progress, std::vector<int64_t>{24 + 24 + 8 + 4 + 3});

    SafetensorsReader file(path);
    EXPECT_EQ(file.names(), (std::vector<std::string>{"a", "b", "c", "d", "empty", "scalar"}));
    EXPECT_EQ(file.metadata(), nlohmann::json(metadata));
    EXPECT_EQ(file.info("a").shape, (std::vector<int64_t>{2, 3}));
    EXPECT_EQ(file.info("a").dtype, "F32");
    EXPECT_EQ(file.info("a").nbytes, 24);
    EXPECT_EQ(file.info("empty").nbytes, 0);
    EXPECT_TRUE(file.info("scalar").shape.empty());
    EXPECT_EQ(memcmp(file.data("a"), a.data(), 24), 0);
    for (const char* name : {"a", "b", "c", "scalar"}) EXPECT_EQ((uintptr_t)file.data(name) % dtype_bytes(file.info(name).dtype), 0u) << name;
    std::vector<float> floats(6);
    file.read_f32("a", floats.data(), 6);
    EXPECT_EQ(floats, a);
    EXPECT_EQ(file.read_f64("b"), b);
    EXPECT_EQ(file.read_f64("c"), (std::vector<double>{INT32_MIN, 7}));
    EXPECT_EQ(file.read_f64("d"), (std::vector<double>{1, 2, 255}));
    EXPECT_TRUE(file.read_f64("empty").empty());
    EXPECT_TRUE(file.has("a"));
    EXPECT_FALSE(file.has("z"));
    EXPECT_FALSE(file.has("__metadata__"));
    EXPECT_ERROR(file.info("z"), path + " has no tensor 'z'");
    EXPECT_ERROR(file.read_f32("a", floats.data(), 5), "has 6 elements, 5 were expected");
}

TEST(Safetensors, HeaderBytes) {
    TempFolder folder;
    write_safetensors(folder.path("x"), {tensor("w", "F32", {1, 2}, std::vector<float>{1, 2})}, {});
    std::string header = R"({"w":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}})";
    header.resize((header.size() + 7) / 8 * 8, ' ');
    const float values[2] = {1, 2};
    EXPECT_EQ(read_text(folder.path("x")), raw_file(header, std::string((const char*)values, 8)));
    write_safetensors(folder.path("none"), {}, {});
    EXPECT_TRUE(SafetensorsReader(folder.path("none")).names().empty());
    EXPECT_TRUE(SafetensorsReader(folder.path("none")).metadata().is_object());
}

TEST(Safetensors, SixteenBitFloats) {
    TempFolder folder;
    const std::vector<uint16_t> bf16 = {0x3f80, 0xc000, 0x0001, 0x7f80, 0x7fc0};
    const std::vector<uint16_t> half = {0x3c00, 0xc000, 0x0001, 0x8000, 0x03ff, 0x0400, 0x7bff, 0xfc00, 0x7e00};
    write_safetensors(folder.path("x"), {tensor("bf16", "BF16", {5}, bf16), tensor("half", "F16", {9}, half)}, {});
    SafetensorsReader file(folder.path("x"));
    const auto b = file.read_f64("bf16"), h = file.read_f64("half");
    EXPECT_EQ(std::vector<double>(b.begin(), b.begin() + 4), (std::vector<double>{1, -2, 0x1p-133, INFINITY}));
    EXPECT_TRUE(std::isnan(b[4]));
    EXPECT_EQ(std::vector<double>(h.begin(), h.begin() + 8), (std::vector<double>{1, -2, 0x1p-24, 0, 1023 * 0x1p-24, 0x1p-14, 65504, -INFINITY}));
    EXPECT_TRUE(std::signbit(h[3]));
    EXPECT_TRUE(std::isnan(h[8]));
}

TEST(Safetensors, GoldenFilesOpen) {
    const std::string golden = std::string(SAMBA_SOURCE_DIR) + "/dev/test/golden/";
    for (const char* name : {"mha_hd64", "mqa_hd128", "swa_only"}) {
        SafetensorsReader file(golden + name + ".safetensors");
        EXPECT_TRUE(nlohmann::json::parse(file.metadata().at("config").get<std::string>()).contains("n_embd"));
        ASSERT_TRUE(file.has("idx") && file.has("logits"));
        EXPECT_EQ(file.info("idx").dtype, "I32");
        EXPECT_EQ(file.info("model.lm_head.weight").dtype, "BF16");
        const auto losses = file.read_f64("losses");
        ASSERT_EQ(losses.size(), 6u);
        EXPECT_LT(losses[5], losses[0]);
        for (const std::string& tensor : file.names())
            for (double x : file.read_f64(tensor)) ASSERT_TRUE(std::isfinite(x)) << name << ": " << tensor;
    }
}

TEST(Safetensors, LargeTensorsStreamInPieces) {
    TempFolder folder;
    const int64_t n = 40'000'003;                                                         // 160 MB in three pieces, behind a small tensor
    int64_t calls = 0, expected_offset = 0;
    std::vector<int64_t> progress;
    TensorToWrite large = {"large", "F32", {n}, [&](void* dst, int64_t offset, int64_t bytes) {
        EXPECT_EQ(offset, expected_offset);
        EXPECT_LE(bytes, 64 << 20);
        EXPECT_EQ((uintptr_t)dst % 4, 0u);
        for (int64_t i = 0; i < bytes / 4; i++) ((uint32_t*)dst)[i] = (uint32_t)((offset / 4 + i) * 2654435761u);
        expected_offset += bytes;
        calls++;
    }};
    const TensorToWrite small = tensor("small", "F32", {2}, std::vector<float>{1, 2});
    write_safetensors(folder.path("x"), {small, large}, {}, [&](int64_t b) { progress.push_back(b); });
    EXPECT_EQ(calls, 3);
    EXPECT_EQ(progress, (std::vector<int64_t>{64 << 20, 128 << 20, 4 * n + 8}));
    SafetensorsReader file(folder.path("x"));
    for (int64_t i = 0; i < n; i += 9973) {
        uint32_t value;
        memcpy(&value, file.data("large") + 4 * i, 4);
        ASSERT_EQ(value, (uint32_t)(i * 2654435761u)) << i;
    }
    EXPECT_EQ(file.read_f64("small"), (std::vector<double>{1, 2}));
}

TEST(Safetensors, MalformedFilesAreNamed) {
    TempFolder folder;
    const std::string x = folder.path("x.safetensors");
    const auto expect = [&](const std::string& content, const std::string& text) {
        write_text(x, content);
        EXPECT_ERROR(SafetensorsReader{x}, text);
        EXPECT_ERROR(SafetensorsReader{x}, x);
    };
    const std::string eight(8, '\0');
    const auto w = [](const std::string& body) { return "{\"w\":{" + body + "}}"; };
    expect("", "is not a safetensors file");
    expect("1234567", "is not a safetensors file");
    expect(std::string(8, '\xff'), "cut off or not a safetensors file");
    expect(raw_file("{}", "").substr(0, 9), "cut off");
    expect(raw_file("", ""), "not JSON");
    expect(raw_file("{", ""), "not JSON");
    expect(raw_file("{\"a\xff\": 1}", ""), "not JSON");
    expect(raw_file(std::string(100000, '['), ""), "not JSON");
    expect(raw_file("[]", ""), "not a JSON object");
    expect(raw_file("{\"w\":3}", ""), "lacks dtype");
    expect(raw_file(w(R"("dtype":"F32","shape":[2])"), eight), "lacks dtype, shape or data_offsets");
    expect(raw_file(w(R"("dtype":"F99","shape":[2],"data_offsets":[0,8])"), eight), "unknown dtype");
    expect(raw_file(w(R"("dtype":7,"shape":[2],"data_offsets":[0,8])"), eight), "unknown dtype");
    expect(raw_file(w(R"("dtype":"F32","shape":[-2],"data_offsets":[0,8])"), eight), "shape");
    expect(raw_file(w(R"("dtype":"F32","shape":2,"data_offsets":[0,8])"), eight), "shape");
    expect(raw_file(w(R"("dtype":"F32","shape":[2.0],"data_offsets":[0,8])"), eight), "shape");
    expect(raw_file(w(R"("dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,8])"), eight), "shape");
    expect(raw_file(w(R"("dtype":"F32","shape":[2],"data_offsets":[8,0])"), eight), "data_offsets");
    expect(raw_file(w(R"("dtype":"F32","shape":[2],"data_offsets":[0,8,9])"), eight), "data_offsets");
    expect(raw_file(w(R"("dtype":"F32","shape":[2],"data_offsets":[0,-1])"), eight), "data_offsets");
    expect(raw_file(w(R"("dtype":"F32","shape":[3],"data_offsets":[0,8])"), eight), "has 8 bytes, its shape and dtype F32 need 12");
    expect(raw_file(w(R"("dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0])"), ""), "its shape and dtype");  // 2^64: 0
    expect(raw_file(w(R"("dtype":"F32","shape":[2],"data_offsets":[0,8])"), eight.substr(1)),
           "is cut off: tensor 'w' ends at byte 8 and the file holds 7");
    expect(raw_file(w(R"("dtype":"F32","shape":[2],"data_offsets":[0,8])"), eight + "x"), "too long: 1 bytes");
    expect(raw_file(w(R"("dtype":"F32","shape":[1],"data_offsets":[4,8])"), eight), "4 bytes before tensor 'w' belong to none");
    expect(raw_file(w(R"("dtype":"F32","shape":[1],"data_offsets":[9223372036854775804,9223372036854775807])"), eight), "bytes");
    const std::string a = R"("a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]})", b = R"("b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]})";
    expect(raw_file("{" + a + "," + b + "}", eight), "tensor 'b' overlaps");
    expect(raw_file("{" + a + "," + a + "}", eight), "names 'a' twice");
    expect(raw_file("{\"__metadata__\":[]," + a + "}", eight), "metadata is not a JSON object");
    expect(raw_file("{\"__metadata__\":{\"k\":1}," + a + "}", eight), "metadata 'k' is not a string");
    expect(raw_file("{\"a\\nb\":1}", ""), "tensor 'a?b'");
    EXPECT_ERROR(SafetensorsReader(folder.path("missing")), "cannot open " + folder.path("missing") + ": No such file");
    EXPECT_ERROR(SafetensorsReader{folder.root}, "is a directory");
    write_text(x, raw_file(R"({"f8":{"dtype":"F8_E4M3","shape":[8],"data_offsets":[0,8]}})", eight));
    EXPECT_ERROR(SafetensorsReader(x).read_f64("f8"), "dtype F8_E4M3 cannot be read");
}

// Whatever the bytes, the reader either refuses the file in one line or gives tensors that lie inside it.
TEST(Safetensors, GarbageNeverCrashes) {
    TempFolder folder;
    const std::string x = folder.path("x");
    write_safetensors(x, {tensor("first", "F32", {2, 3}, std::vector<float>(6, 1.f)), tensor("second", "BF16", {5}, std::vector<uint16_t>(5, 7)),
                          tensor("third", "I32", {4}, std::vector<int32_t>(4, 7))}, {{"config", "{}"}});
    const std::string good = read_text(x);
    uint64_t header_bytes;
    memcpy(&header_bytes, good.data(), 8);
    const auto attempt = [&](const std::string& content) {
        write_text(x, content);
        try {
            SafetensorsReader file(x);
            double sum = 0;
            for (const std::string& name : file.names()) {
                if (file.info(name).dtype.rfind("F8", 0) == 0) continue;
                for (double v : file.read_f64(name)) sum += v;
            }
            return true;
        } catch (const Error& error) {
            EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos);
            return false;
        }
    };
    EXPECT_TRUE(attempt(good));
    for (size_t n = 0; n < good.size(); n++) EXPECT_FALSE(attempt(good.substr(0, n))) << "cut to " << n;
    uint64_t state = 1;
    const auto random = [&] { return (state = state * 6364136223846793005ull + 1442695040888963407ull) >> 33; };
    for (int i = 0; i < 3000; i++) {
        std::string bad = good;
        for (int k = 0; k <= i % 4; k++) bad[random() % (8 + header_bytes)] = (char)random();
        attempt(bad);
        for (int k = 0; k <= i % 3; k++) {                                                // digits and punctuation reach further
            const size_t at = 8 + random() % header_bytes;
            bad = good;
            bad[at] = "0123456789,:[]{}\"-e. "[random() % 21];
        }
        attempt(bad);
    }
}

TEST(Safetensors, BadTensorsAreNotWritten) {
    TempFolder folder;
    const auto one = tensor("w", "F32", {1}, std::vector<float>{1});
    EXPECT_ERROR(write_safetensors(folder.path("x"), {one, one}, {}), "two tensors named 'w'");
    EXPECT_ERROR(write_safetensors(folder.path("x"), {tensor("w", "F31", {1}, std::vector<float>{1})}, {}), "bad dtype or shape");
    EXPECT_ERROR(write_safetensors(folder.path("x"), {tensor("w", "F32", {-1}, std::vector<float>{1})}, {}), "bad dtype or shape");
    EXPECT_ERROR(write_safetensors(folder.path("x"), {one}, {{"k", "\xff"}}), "not UTF-8");
    EXPECT_ERROR(write_safetensors(folder.path("no/dir/x"), {one}, {}), "cannot write " + folder.path("no/dir/x") + ": No such file");
    EXPECT_ERROR(write_safetensors(folder.root, {one}, {}), "is a directory");
    EXPECT_TRUE(folder.list().empty());
}

TEST(Safetensors, FullDiskLeavesTheOldFile) {
    TempFolder folder;
    const std::string x = folder.path("x");
    const std::vector<float> values(100000, 1.f);
    write_text(x, "the old content");
    {
        FileSizeLimit limit(50000);
        EXPECT_ERROR(write_safetensors(x, {tensor("w", "F32", {100000}, values)}, {}), "cannot write " + x + ": File too large");
        EXPECT_ERROR(write_file_durably(x, std::string(60000, 'x')), "File too large");
    }
    EXPECT_EQ(read_text(x), "the old content");
    EXPECT_EQ(folder.list(), std::vector<std::string>{"x"});
    EXPECT_ERROR(write_safetensors("/dev/full", {tensor("w", "F32", {100000}, values)}, {}), "cannot write /dev/full: No space left on device");
    EXPECT_ERROR(write_file_durably("/dev/full", "x"), "No space left on device");
    EXPECT_TRUE(std::filesystem::exists("/dev/full"));
}

TEST(Safetensors, ExceptionInFillLeavesTheOldFile) {
    TempFolder folder;
    const std::string x = folder.path("x");
    write_text(x, "old");
    TensorToWrite bad = {"w", "F32", {10}, [](void*, int64_t, int64_t) { fail("the device is gone"); }};
    EXPECT_ERROR(write_safetensors(x, {bad}, {}), "the device is gone");
    EXPECT_EQ(read_text(x), "old");
    EXPECT_EQ(folder.list(), std::vector<std::string>{"x"});
}

TEST(Files, HashIsFnv1a) {
    EXPECT_EQ(fnv1a64("", 0), 0xcbf29ce484222325ull);                                     // published test vectors
    EXPECT_EQ(fnv1a64("a", 1), 0xaf63dc4c8601ec8cull);
    EXPECT_EQ(fnv1a64("foobar", 6), 0x85944171f73967e8ull);
    EXPECT_EQ(fnv1a64("bar", 3, fnv1a64("foo", 3)), fnv1a64("foobar", 6));
}

// ---------------------------------------------------------------------------------------------------------------------

TEST(Checkpoint, Names) {
    EXPECT_EQ(checkpoint_name(1000), "step_00001000");
    EXPECT_EQ(checkpoint_name(1234567890), "step_1234567890");
    EXPECT_EQ(checkpoint_step("step_00001000"), 1000);
    EXPECT_EQ(checkpoint_step("step_1234567890"), 1234567890);
    EXPECT_EQ(checkpoint_step("step_00001000.replaced"), 1000);
    for (const char* name : {"step_", "step_100", "step_0000100x", ".tmp_step_00001000.5", "latest", "step_00001000.old", "xstep_00001000",
                             "step_99999999999999999999"})
        EXPECT_FALSE(checkpoint_step(name)) << name;
}

TEST(Checkpoint, WriteFindLatest) {
    TempFolder folder;
    const std::string out = folder.path("deep/run");
    const std::string first = make_checkpoint(out, 100), second = make_checkpoint(out, 12000);
    EXPECT_EQ(find_checkpoint(out), second);
    EXPECT_EQ(find_checkpoint(out + "/"), out + "//step_00012000");
    EXPECT_EQ(find_checkpoint(first), first);
    EXPECT_EQ(find_checkpoint(out + "/latest"), out + "/latest");
    EXPECT_EQ(std::filesystem::read_symlink(out + "/latest").string(), "step_00012000");
    EXPECT_EQ(read_text(out + "/latest/model.safetensors"), "weights");
    const auto state = nlohmann::json::parse(read_text(first + "/state.json"));
    EXPECT_EQ(state["step"], 100);
    EXPECT_EQ(state["files"], (nlohmann::json{{"model.safetensors", 7}, {"optimizer.safetensors", 18}}));
    std::vector<std::string> names;
    for (auto& entry : std::filesystem::directory_iterator(out)) names.push_back(entry.path().filename().string());
    std::sort(names.begin(), names.end());
    EXPECT_EQ(names, (std::vector<std::string>{"latest", "step_00000100", "step_00012000"}));
}

TEST(Checkpoint, UncommittedLeavesNothing) {
    TempFolder folder;
    {
        CheckpointWriter writer(folder.root, 7);
        write_text(writer.path("model.safetensors"), "x");
        EXPECT_EQ(folder.list().size(), 1u);
        EXPECT_ERROR(find_checkpoint(folder.root), "no checkpoint in " + folder.root);
        EXPECT_EQ(writer.directory(), folder.path(".tmp_step_00000007." + std::to_string(getpid())));
    }
    EXPECT_TRUE(folder.list().empty());
    EXPECT_ERROR(find_checkpoint(folder.root), "holds no directory named like step_00001000");
    EXPECT_ERROR(find_checkpoint(folder.path("none")), "does not exist");
    write_text(folder.path("file"), "");
    EXPECT_ERROR(find_checkpoint(folder.path("file")), "is not a directory");
    EXPECT_ERROR(CheckpointWriter(folder.path("file/run"), 1), "cannot make the directory");
}

TEST(Checkpoint, DamagedOnesAreSkippedWithAWarning) {
    TempFolder folder;
    std::vector<std::string> all;
    for (int step : {1, 2, 3, 4, 5, 6, 7}) all.push_back(make_checkpoint(folder.root, step));
    std::filesystem::remove(all[6] + "/model.safetensors");
    write_text(all[5] + "/optimizer.safetensors", "short");
    write_text(all[4] + "/state.json", "{\"step\": 5");
    std::filesystem::remove(all[3] + "/state.json");
    write_text(all[2] + "/state.json", "{\"files\": {\"../x\": 1}}");
    std::filesystem::create_directory(folder.path(".tmp_step_00000008.1"));
    std::filesystem::create_directory(folder.path("step_00000009"));
    write_text(folder.path("step_00000010"), "a file");
    std::string found;
    const std::string warnings = stderr_of([&] { found = find_checkpoint(folder.root); });
    EXPECT_EQ(found, all[1]);
    EXPECT_NE(warnings.find("skipped checkpoint " + all[6] + ": model.safetensors is missing"), std::string::npos) << warnings;
    EXPECT_NE(warnings.find(all[5] + ": optimizer.safetensors has 5 bytes instead of 18"), std::string::npos) << warnings;
    EXPECT_NE(warnings.find(all[4] + ": state.json is damaged"), std::string::npos) << warnings;
    EXPECT_NE(warnings.find(all[3] + ": state.json is missing"), std::string::npos) << warnings;
    EXPECT_NE(warnings.find(all[2] + ": state.json is damaged"), std::string::npos) << warnings;
    EXPECT_NE(warnings.find("step_00000010: it is not a directory"), std::string::npos) << warnings;
    EXPECT_EQ(std::count(warnings.begin(), warnings.end(), '\n'), 7);

    EXPECT_ERROR(find_checkpoint(all[6]), "checkpoint " + all[6] + " is not whole: model.safetensors is missing");
    EXPECT_ERROR(find_checkpoint(all[3]), "state.json is missing");
    std::filesystem::remove_all(all[0]);
    std::filesystem::remove_all(all[1]);
    stderr_of([&] { EXPECT_ERROR(find_checkpoint(folder.root), "no whole checkpoint in " + folder.root + " (step_00000010"); });
}

TEST(Checkpoint, SameStepIsReplaced) {
    TempFolder folder;
    const std::string first = make_checkpoint(folder.root, 5, "old");
    write_text(first + "/extra", "x");
    EXPECT_EQ(make_checkpoint(folder.root, 5, "new weights"), first);
    EXPECT_EQ(read_text(first + "/model.safetensors"), "new weights");
    EXPECT_FALSE(std::filesystem::exists(first + "/extra"));
    EXPECT_EQ(folder.list(), (std::vector<std::string>{"latest", "step_00000005"}));
    std::filesystem::rename(first, first + ".replaced");                                  // power cut between two renames
    EXPECT_EQ(find_checkpoint(folder.root), first + ".replaced");
}

TEST(Checkpoint, CommitRefusesWhatIsUnfinished) {
    TempFolder folder;
    CheckpointWriter writer(folder.root, 5);
    write_text(writer.path(".tmp_model.safetensors.9"), "x");
    EXPECT_ERROR(writer.commit({{"step", 5}}), "has an unfinished file");
    std::filesystem::remove(writer.path(".tmp_model.safetensors.9"));
    EXPECT_ERROR(writer.commit(nlohmann::json::array()), "not a JSON object");
    {
        FileSizeLimit limit(100);
        EXPECT_ERROR(writer.commit({{"text", std::string(1000, 'x')}}), "File too large");
    }
    EXPECT_EQ(folder.list().size(), 1u);
    writer.commit({{"step", 5}});
    EXPECT_ERROR(writer.commit({{"step", 5}}), "committed twice");
    EXPECT_EQ(writer.directory(), folder.path("step_00000005"));
    EXPECT_EQ(find_checkpoint(folder.root), writer.directory());
}

// Killed at any moment, the run's directory holds the old checkpoint or the new one, whole.
TEST(Checkpoint, KilledWhileWriting) {
    TempFolder folder;
    make_checkpoint(folder.root, 1, "first");
    for (int round = 0; round < 30; round++) {
        const pid_t child = fork();
        if (child == 0) {
            alarm(20);                                                                    // should this process die first
            for (int step = 2;; step = step == 2 ? 3 : 2) make_checkpoint(folder.root, step, std::string(20000, (char)('a' + round)));
        }
        usleep((useconds_t)(500 + 700 * round));
        kill(child, SIGKILL);
        waitpid(child, nullptr, 0);
        std::string found;
        const std::string warnings = stderr_of([&] { found = find_checkpoint(folder.root); });
        EXPECT_EQ(warnings, "");
        EXPECT_EQ(checkpoint_defect(found), "");
        std::error_code error;
        EXPECT_TRUE(std::filesystem::exists(folder.path("latest/state.json"), error));
        prune_checkpoints(folder.root, 0);                                                // removes the dead child's leftovers
        for (const std::string& name : folder.list()) EXPECT_NE(name.rfind(".tmp_", 0), 0u) << name;
    }
}

TEST(Checkpoint, Prune) {
    TempFolder folder;
    for (int step : {10, 20, 30, 40, 50}) make_checkpoint(folder.root, step);
    const pid_t child = fork();
    if (child == 0) _exit(0);
    waitpid(child, nullptr, 0);                                                           // a process id that is free
    std::filesystem::create_directory(folder.path(".tmp_step_00000060." + std::to_string(child)));
    std::filesystem::create_directory(folder.path(".tmp_step_00000061." + std::to_string(getpid())));      // of an earlier process with our number
    std::filesystem::create_directory(folder.path(".tmp_step_00000062." + std::to_string(getppid())));     // alive: not ours to remove
    write_text(folder.path(".tmp_state.json." + std::to_string(child)), "x");
    write_text(folder.path("log.jsonl"), "x");
    CheckpointWriter active(folder.root, 70);
    const std::string active_name = ".tmp_step_00000070." + std::to_string(getpid()), alive = ".tmp_step_00000062." + std::to_string(getppid());
    const auto rest = [&] {
        auto names = folder.list();
        const auto expected = [&](auto& n) { return n == active_name || n == alive || n == "log.jsonl" || n == "latest"; };
        names.erase(std::remove_if(names.begin(), names.end(), expected), names.end());
        return names;
    };
    prune_checkpoints(folder.root, 0);
    EXPECT_EQ(rest(), (std::vector<std::string>{"step_00000010", "step_00000020", "step_00000030", "step_00000040", "step_00000050"}));
    EXPECT_EQ(folder.list().size(), 9u);
    std::filesystem::remove(folder.path("step_00000050/model.safetensors"));              // damaged: not counted, not removed
    prune_checkpoints(folder.root, 3);
    EXPECT_EQ(rest(), (std::vector<std::string>{"step_00000020", "step_00000030", "step_00000040", "step_00000050"}));
    prune_checkpoints(folder.root, 1);
    EXPECT_EQ(rest(), (std::vector<std::string>{"step_00000040", "step_00000050"}));
    make_checkpoint(folder.root, 5);                                                      // older step, written last: `latest` is kept
    make_checkpoint(folder.root, 6);
    prune_checkpoints(folder.root, 1);
    EXPECT_EQ(rest(), (std::vector<std::string>{"step_00000006", "step_00000040", "step_00000050"}));
    active.commit({{"step", 70}});
    prune_checkpoints(folder.root, 1);
    EXPECT_EQ(rest(), (std::vector<std::string>{"step_00000050", "step_00000070"}));
    EXPECT_EQ(find_checkpoint(folder.root), folder.path("step_00000070"));
}

TEST(Checkpoint, LatestThatIsNoLinkIsLeftAlone) {
    TempFolder folder;
    std::filesystem::create_directory(folder.path("latest"));
    write_text(folder.path("latest/mine"), "x");
    const std::string warnings = stderr_of([&] { make_checkpoint(folder.root, 5); });
    EXPECT_NE(warnings.find("cannot point"), std::string::npos);
    EXPECT_EQ(find_checkpoint(folder.root), folder.path("step_00000005"));
    EXPECT_EQ(folder.list(), (std::vector<std::string>{"latest", "step_00000005"}));
}
