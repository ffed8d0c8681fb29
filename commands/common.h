// What the subcommands share: numbers on the command line, the device, the tokenizer's identity, a model to read with.
#pragma once
#include <cmath>
#include <cstdlib>
#include <memory>
#include <string>

#include <CLI/CLI.hpp>

#include "../samba.cuh"

#include "../data/checkpoint.h"
#include "../data/model_io.h"

#ifndef SAMBA_COMMIT
#define SAMBA_COMMIT "unknown"
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Options

// "20b" -> 20000000000: numbers take k, m, b suffixes, powers of a thousand (k = 1024 for nobody: 4k tokens is 4000).
inline std::string expand_count(std::string text) {
    const std::string given = text;
    double factor = 1;
    if (!text.empty()) {
        const char unit = (char)std::tolower(text.back());
        if (unit == 'k' || unit == 'm' || unit == 'b') {
            factor = unit == 'k' ? 1e3 : unit == 'm' ? 1e6 : 1e9;
            text.pop_back();
        }
    }
    size_t used = 0;
    double value = 0;
    try { value = std::stod(text, &used); } catch (const std::exception&) {}
    value *= factor;
    if (used == 0 || used != text.size() || value != std::floor(value) || std::abs(value) > 9e15)
        throw CLI::ValidationError(given + " is not a whole number (suffixes k, m, b are allowed)");
    return std::to_string((int64_t)value);
}

inline CLI::Option* add_count(CLI::App& app, const std::string& name, int64_t& value, const std::string& help) {
    const CLI::Validator as_digits([](std::string& s) { s = expand_count(s); return std::string(); }, "COUNT");
    return app.add_option(name, value, help)->transform(as_digits)->capture_default_str();
}

// What the subcommands that read with a checkpoint's model have in common
struct ReadingOptions {
    std::string checkpoint;
    int64_t micro_batch, seq_len;
    int gpu = 0;
};
inline void add_reading_options(CLI::App& app, ReadingOptions& o, const std::string& rows /*what a batch consists of*/) {
    app.add_option("--checkpoint", o.checkpoint, "A checkpoint, or a run's directory")->required();
    add_count(app, "--micro-batch", o.micro_batch, rows + " at a time");
    add_count(app, "--seq-len", o.seq_len, std::string("Tokens in a chunk") + (o.seq_len == 0 ? "; 0: the training length" : ""));
    app.add_option("--gpu", o.gpu, "Index of the GPU to use")->capture_default_str();
}

inline void select_gpu(int index) {
    if (!ON_GPU) return;
    const int count = device_count();
    if (count == 0) fail("this build needs an NVIDIA GPU and none is visible; build for the CPU with: make CPU=1");
    if (index < 0 || index >= count) fail("--gpu %d: this machine has GPUs 0 to %d", index, count - 1);
    device_select(index);
}

// Precision of a training step's large matrix products
inline CLI::Option* add_matmul(CLI::App& app, std::string& precision) {
    return app.add_option("--matmul", precision,
                          "Large matrix products, but those of weight gradients: in fp8 (H100, H200), or as the build has them")
        ->check(CLI::IsMember({"bf16", "fp8"}))->capture_default_str();
}
constexpr bool HAS_FP8 = ON_GPU && sizeof(floatX) == 2;    // of this build
// Whether fp8 is wanted; refused where there is no such product
inline bool use_fp8(const std::string& precision) {
    if (precision != "fp8") return false;
    if (!HAS_FP8) fail("--matmul fp8: the build %s has no such products; use a GPU build in bf16 (make)", BUILD_NAME);
    const DeviceInfo device = device_info();
    if (device.compute_major != 9)
        fail("--matmul fp8: %s has compute capability %d.%d, and products with a scale for each row need 9.0 (H100, H200); leave the option out",
             device.name.c_str(), device.compute_major, device.compute_minor);
    return true;
}

// ---------------------------------------------------------------------------------------------------------------------
// What memory a plan takes, by a dry run of it

// A named configuration or a .json file
inline Config load_config(const std::string& model) {
    if (!model.ends_with(".json")) return config_from_name(model);
    const nlohmann::json j = nlohmann::json::parse(MappedFile(model).text(), nullptr, false);
    if (j.is_discarded()) fail("%s is not JSON", model.c_str());
    return config_from_json(j, model);
}

// Bytes of activations at a recompute level, by a dry run of the plan
inline size_t activation_bytes(const Layout& layout, int64_t B, int64_t T, bool training, Recompute level, bool fp8 = false) {
    Activations dry;
    dry.B = B; dry.T = T; dry.training = training; dry.recompute = level; dry.fp8 = fp8;
    dry.plan(layout);
    return dry.bytes();
}
inline size_t state_bytes(const Layout& layout, int64_t B, int64_t max_context, bool held = false) {
    SequenceState dry;
    dry.B = B;
    dry.held = held;
    dry.plan(layout, max_context);
    return dry.arena.bytes();
}
// Of one process that owns this part of the flat order
inline int64_t parameter_bytes(const Layout& layout, bool training, Range own, bool fp8 = false) {
    Parameters dry;
    dry.own = own;
    dry.plan(layout, training, fp8);
    return (int64_t)dry.arena.bytes();
}
inline int64_t parameter_bytes(const Layout& layout, bool training, bool fp8 = false) {
    return parameter_bytes(layout, training, {0, layout.elements()}, fp8);
}

// What the driver and the kernels' code take besides, on an H200 with CUDA 13
constexpr int64_t DRIVER_BYTES = ON_GPU ? (int64_t)640 << 20 : 0;

// Of a GPU that trains by itself
inline int64_t memory_in_use(const Layout& layout, int64_t B, int64_t T, Recompute level, bool fp8 = false) {
    return parameter_bytes(layout, true, fp8) + (int64_t)activation_bytes(layout, B, T, true, level, fp8) +
           (int64_t)ops::Matmul::WORKSPACE_BYTES + DRIVER_BYTES;
}

constexpr size_t MEMORY_RESERVE = (size_t)768 << 20;       // for the driver, cuBLASLt and fragmentation

inline Recompute choose_recompute(const std::string& wanted, const Layout& layout, int64_t B, int64_t T, size_t other_bytes, bool fp8 = false) {
    for (Recompute level : {Recompute::none, Recompute::light, Recompute::full}) {
        if (wanted == recompute_name(level)) return level;
        if (wanted == "auto" && activation_bytes(layout, B, T, true, level, fp8) + other_bytes + MEMORY_RESERVE <= device_free_bytes()) return level;
    }
    fail("--micro-batch %lld with --seq-len %lld needs %s even with --recompute full, and %s are free; use a smaller --micro-batch",
         (long long)B, (long long)T,
         human_bytes((double)(activation_bytes(layout, B, T, true, Recompute::full, fp8) + other_bytes)).c_str(),
         human_bytes((double)device_free_bytes()).c_str());
}

// ---------------------------------------------------------------------------------------------------------------------
// Checkpoints and their tokenizers

inline nlohmann::json read_state(const std::string& dir) {
    const nlohmann::json state = nlohmann::json::parse(MappedFile(dir + "/state.json").text(), nullptr, false);
    if (state.is_discarded()) fail("%s/state.json is not JSON; remove this checkpoint to resume from an older one", dir.c_str());
    return state;
}

// Fingerprint of the tokenizer that a checkpoint was trained with, 0 where nothing says; that of a file, 0 without one
inline uint64_t file_fingerprint(const std::string& path) {
    if (path.empty() || access(path.c_str(), R_OK) != 0) return 0;
    const MappedFile file(path);
    return fnv1a64(file.data, file.size);
}
inline uint64_t checkpoint_fingerprint(const std::string& dir) {
    const nlohmann::json state = read_state(dir);
    const std::string text = state.value("tokenizer_fingerprint", "0");
    const uint64_t said = std::strtoull(text.c_str(), nullptr, 10);
    return said ? said : file_fingerprint(dir + "/tokenizer.model");
}
// Tokens of another tokenizer mean something else to the model, however well they fit its vocabulary.
inline void check_same_tokenizer(uint64_t ours, const std::string& who, uint64_t of_data, const std::string& path) {
    if (ours && of_data && ours != of_data)
        fail("%s: made with another tokenizer (fingerprint %016llx) than %s (%016llx); prepare it with that tokenizer", path.c_str(),
             (unsigned long long)of_data, who.c_str(), (unsigned long long)ours);
}

// A model for inference from a checkpoint directory, with room for B sequences in chunks of T tokens.
inline std::unique_ptr<Model> load_for_inference(const std::string& dir, int64_t B, int64_t T) {
    const std::string path = dir + "/model.safetensors";
    auto m = std::make_unique<Model>(read_config(path));
    m->w.create(m->layout, false);
    m->acts.create(m->layout, B, T, false, Recompute::full);
    initialise(*m, 0);
    load_parameters(*m, path);
    return m;
}
