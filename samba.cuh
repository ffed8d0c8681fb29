// Samba (arXiv 2406.07522): Mamba, SwiGLU, sliding-window attention, SwiGLU, repeated. This file is the model: which
// configurations exist, which tensors a layer has, where they lie in memory, and one forward and one backward pass.
//
//   1. configurations     what can be built, one table
//   2. parameters         one line a tensor; sizes, names, initialisation, checkpoints all come from it
//   3. memory             arenas, and the plan of activations that hands them out
//   4. sequence state     what a model must remember of the tokens before this chunk
//   5. layers             Mamba, attention, SwiGLU: forward, and backward as its mirror image
//   6. the network        embedding, the loop over layers, the head with its loss
//   7. the update         gradient norm, clip, AdamW
//   8. costs              flops a token
//
// The same step shared between several processes is in kernels/data_parallel.cuh.
//
// Symbols: B sequences of T tokens, d = d_model, e = d_inner = 2d, N = d_state = 16, R = dt_rank = ceil(d/16), H query heads
// and G key/value heads of head_dim hd, F = d_ff, V = vocab_size, L layers. Arrays are row-major, channels last.
// `floatX` is the working precision (bf16 on a GPU, float elsewhere); the residual stream, weight gradients, master
// weights, moments and every reduction are float.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "kernels/ops.cuh"
#include "kernels/random.h"

// =====================================================================================================================
// 1. Configurations

// A model is a list of blocks, written as one letter each:
//   M  Mamba, then SwiGLU              S  sliding-window attention, then SwiGLU     F  full attention, then SwiGLU
//   P  SwiGLU of width 2d, then SwiGLU (Mamba ablated)                              T  Mamba, windowed attention, SwiGLU
//   m  Mamba alone                     s  windowed attention and SwiGLU in parallel, one shared norm
enum class InitFamily { samba, llama };   // spec: A (uniform 1/sqrt(fan_in), tied head) and B (normal 0.4/d, untied head)

struct Config {
    std::string name;
    std::string blocks;                    // one letter a block
    int d_model = 0, n_head = 0, n_kv_head = 0, head_dim = 0, d_ff = 0;
    int64_t window = 0;                    // keys that an S query sees, itself included; 0: full attention
    int64_t seq_len = 4096;                // training length
    bool rope = true, tied = true;
    InitFamily init = InitFamily::samba;
    int vocab_size = 32000;                // rows of the embedding, padding included
    int d_state = 16;
    float norm_eps = 1e-5f;
    double rope_base = 10000;

    int d_inner() const { return 2 * d_model; }
    int dt_rank() const { return (d_model + 15) / 16; }
    int n_block() const { return (int)blocks.size(); }
    int q_dim() const { return n_head * head_dim; }
    int qkv_dim() const { return (n_head + 2 * n_kv_head) * head_dim; }
    // How many residual additions a block makes: the depth in the initialisation's 1/sqrt(residuals * blocks)
    int residuals_per_block() const { return blocks[0] == 'm' ? 1 : blocks[0] == 'T' ? 3 : 2; }
};

struct NamedConfig {
    const char* name;
    const char* pattern;                   // repeated until there are n_block letters
    int n_block, d_model, n_head, n_kv_head, head_dim, d_ff, window, seq_len;
    bool rope = true;
    InitFamily init = InitFamily::samba;   // llama also means an untied head
    int vocab_size = 32000;
};

inline const std::vector<NamedConfig>& named_configs() {
    constexpr InitFamily LLAMA = InitFamily::llama, SAMBA = InitFamily::samba;
    // name                        pattern blocks  d     H   G  hd    F    window    T    rope  init  vocabulary
    static const std::vector<NamedConfig> table = {
        {"tiny",                       "MS",  4,  192,   3,  3,  64,  512,   128,   256, true, SAMBA, 4096},
        {"small",                      "MS",  8,  512,   8,  8,  64, 1408,   512,  1024, true, SAMBA, 4096},
        {"retrieval",                  "MS",  6,  256,   4,  4,  64,  704,   256,  4096, true, SAMBA, 256},      // scripts/passkey.sh
        {"retrieval-swa",              "S",   6,  256,   4,  4,  64,  816,   256,  4096, true, SAMBA, 256},      // the same size without Mamba
        {"samba-421m",                 "MS", 12, 1536,  12, 12, 128, 4096,  2048,  4096},
        {"samba-1.3b",                 "MS", 18, 2304,  18, 18, 128, 6144,  2048,  4096},
        {"samba-1.7b",                 "MS", 24, 2048,  32,  4,  64, 8196,  2048,  4096, true, SAMBA, 50304},
        {"samba-3.8b",                 "MS", 32, 2816,  11,  1, 256, 9984,  2048,  4096, true, SAMBA, 32064},
        {"samba-421m-nope",            "MS", 12, 1536,  12, 12, 128, 4096,  2048,  4096, false},
        {"samba-1.3b-nope",            "MS", 18, 2304,  18, 18, 128, 6144,  2048,  4096, false},
        {"samba-421m-mqa",             "MS", 12, 1536,  12,  1, 128, 4608,  2048,  4096},
        {"samba-421m-mqa6",            "MS", 12, 1536,   6,  1, 256, 4608,  2048,  4096},
        {"samba-421m-gqa2",            "MS", 12, 1536,  12,  2, 128, 4608,  2048,  4096},
        {"samba-421m-gqa4",            "MS", 12, 1536,  12,  4, 128, 4608,  2048,  4096},
        {"samba-421m-1k-window",       "MS", 12, 1536,  12, 12, 128, 4096,  1024,  4096},
        {"samba-421m-512-window",      "MS", 12, 1536,  12, 12, 128, 4096,   512,  4096},
        {"samba-421m-abl-mamba",       "PS", 12, 1536,  12, 12, 128, 4096,  2048,  4096},
        {"samba-1.3b-abl-mamba",       "PS", 18, 2304,  18, 18, 128, 6144,  2048,  4096},
        {"mamba-swa-mlp-400m",         "T",   8, 1536,  12, 12, 128, 4096,  2048,  4096},
        {"mamba-swa-mlp-1.3b",         "T",  12, 2304,  18, 18, 128, 6144,  2048,  4096},
        {"mamba-370m",                 "m",  48, 1024,   0,  0,   0,    0,     0,  4096},
        {"mamba-430m",                 "m",  60, 1024,   0,  0,   0,    0,     0,  4096},
        {"mamba-1.3b",                 "m",  48, 2048,   0,  0,   0,    0,     0,  4096},
        {"llama-449m-full-mamba-0",    "FMMMMMMMMMMM", 12, 1536, 12, 12, 128, 4096, 0, 4096},
        {"llama-449m-full-mamba-5",    "MMMMMFMMMMMM", 12, 1536, 12, 12, 128, 4096, 0, 4096},
        {"llama-449m-full-mamba-11",   "MMMMMMMMMMMF", 12, 1536, 12, 12, 128, 4096, 0, 4096},
        {"llama-443m-full-mamba-1-5",  "MFMMMFMMMMMM", 12, 1536, 12, 12, 128, 4096, 0, 4096},
        {"llama-438m",                 "F",  12, 1536,  12, 12, 128, 4096,     0,  4096, true, LLAMA},
        {"llama-438m2k",               "F",  12, 1536,  12, 12, 128, 4096,     0,  2048, true, LLAMA},
        {"llama-438m-swa",             "S",  12, 1536,  12, 12, 128, 4096,  2048,  4096, true, LLAMA},
        {"llama-438m-swa-full",        "SF", 12, 1536,  12, 12, 128, 4096,  2048,  4096, true, LLAMA},
        {"llama-438m-swa-mqa",         "S",  12, 1536,  12,  1, 128, 4608,  2048,  4096, true, LLAMA},
        {"llama-438m-swa-mqa6",        "S",  12, 1536,   6,  1, 256, 4608,  2048,  4096, true, LLAMA},
        {"llama-438m-swa-gqa2",        "S",  12, 1536,  12,  2, 128, 4608,  2048,  4096, true, LLAMA},
        {"llama-438m-swa-gqa4",        "S",  12, 1536,  12,  4, 128, 4608,  2048,  4096, true, LLAMA},
        {"llama-438m8k-swa",           "S",  12, 1536,  12, 12, 128, 4096,  2048,  8192, true, LLAMA},
        {"llama-438m16k-swa",          "S",  12, 1536,  12, 12, 128, 4096,  2048, 16384, true, LLAMA},
        {"llama-438m32k-swa",          "S",  12, 1536,  12, 12, 128, 4096,  2048, 32768, true, LLAMA},
        {"llama-438m-swa-paral",       "s",  14, 1536,  12, 12, 128, 4096,  2048,  4096},
        {"llama-438m-swa-8k4k",        "S",  14, 1536,  12, 12, 128, 4096,  4096,  8192},
        {"llama-438m-swa-8k2k",        "S",  14, 1536,  12, 12, 128, 4096,  2048,  8192},
        {"llama-1.3b",                 "F",  20, 2304,  18, 18, 128, 6144,     0,  4096},
        {"llama-1.3b-swa",             "S",  20, 2304,  18, 18, 128, 6144,  2048,  4096},
        {"llama-1.3b-swa-8k4k",        "S",  20, 2304,  18, 18, 128, 6144,  4096,  8192},
        {"llama-1.3b-swa-8k2k",        "S",  20, 2304,  18, 18, 128, 6144,  2048,  8192},
        {"llama-2.9b",                 "F",  24, 3072,  24, 24, 128, 8192,     0,  2048, true, LLAMA},
    };
    return table;
}

// Refuses by name what the code cannot compute. `source` is the file or option that the configuration came from.
inline void validate(const Config& c, const std::string& source) {
    const char* from = source.c_str();
    if (c.blocks.empty() || c.blocks.find_first_not_of("MSFPTms") != std::string::npos)
        fail("%s: blocks \"%s\": one letter of M S F P T m s for each block is needed", from, c.blocks.c_str());
    if (c.blocks.find('m') != std::string::npos && c.blocks.find_first_not_of('m') != std::string::npos)
        fail("%s: blocks \"%s\": m (Mamba without MLP) cannot be mixed with other blocks", from, c.blocks.c_str());
    if (c.blocks.find('T') != std::string::npos && c.blocks.find_first_not_of('T') != std::string::npos)
        fail("%s: blocks \"%s\": T (Mamba, attention, MLP) cannot be mixed with other blocks", from, c.blocks.c_str());
    if (c.d_model < 16 || c.d_model % 16) fail("%s: d_model %d: must be a multiple of 16", from, c.d_model);
    if (c.vocab_size < 2 || c.vocab_size > 65536) fail("%s: vocab_size %d: must be from 2 to 65536 (tokens are uint16)", from, c.vocab_size);
    if (c.d_state < 1 || c.d_state > 256) fail("%s: d_state %d: must be from 1 to 256", from, c.d_state);
    if (c.window < 0) fail("%s: window %lld: must be at least 1, or 0 for full attention", from, (long long)c.window);
    if (c.seq_len < 1) fail("%s: seq_len %lld: must be at least 1", from, (long long)c.seq_len);
    if (c.blocks.find_first_of("SFTs") != std::string::npos) {
        if (c.n_head < 1 || c.n_kv_head < 1 || c.n_head % c.n_kv_head)
            fail("%s: n_head %d with n_kv_head %d: the first must be a multiple of the second", from, c.n_head, c.n_kv_head);
        if (c.head_dim < 8 || c.head_dim > 256 || c.head_dim % 8) fail("%s: head_dim %d: must be a multiple of 8 up to 256", from, c.head_dim);
    }
    if (c.blocks[0] != 'm' && (c.d_ff < 1 || (int64_t)c.d_ff * c.d_model % 128))
        fail("%s: d_ff %d: d_ff * d_model must be a multiple of 128", from, c.d_ff);
}

inline Config config_from_name(const std::string& name) {
    for (const NamedConfig& n : named_configs()) {
        if (name != n.name) continue;
        Config c;
        c.name = n.name;
        for (int i = 0; i < n.n_block; i++) c.blocks += n.pattern[i % std::string(n.pattern).size()];
        c.d_model = n.d_model; c.n_head = n.n_head; c.n_kv_head = n.n_kv_head; c.head_dim = n.head_dim; c.d_ff = n.d_ff;
        c.window = n.window; c.seq_len = n.seq_len; c.rope = n.rope; c.init = n.init;
        c.tied = n.init == InitFamily::samba; c.vocab_size = n.vocab_size;
        validate(c, name);
        return c;
    }
    std::string known;
    for (const NamedConfig& n : named_configs()) known += std::string(known.empty() ? "" : " ") + n.name;
    fail("--model %s: no such model; give a .json file or one of: %s", name.c_str(), known.c_str());
}

inline nlohmann::json config_to_json(const Config& c) {
    return {{"name", c.name}, {"blocks", c.blocks}, {"n_embd", c.d_model}, {"n_head", c.n_head}, {"n_query_groups", c.n_kv_head},
            {"head_size", c.head_dim}, {"intermediate_size", c.d_ff}, {"local_window", c.window > 0 ? c.window : -1},
            {"block_size", c.seq_len}, {"nope", !c.rope}, {"tied", c.tied}, {"mamba_init", c.init == InitFamily::samba},
            {"padded_vocab_size", c.vocab_size}, {"d_state", c.d_state}, {"norm_eps", c.norm_eps}, {"rope_base", c.rope_base}};
}

// The block letters that the official configuration's fields stand for (microsoft/Samba lit_gpt/model.py, Block).
inline std::string official_blocks(const nlohmann::json& j, const std::string& source) {
    const int n_layer = j.at("n_layer"), mb = j.value("mb_per_layer", -1), full = j.value("full_per_layer", 1000000);
    for (const char* field : {"use_mega", "sc_attn"})
        if (j.value(field, false)) fail("%s: %s is not supported by this build", source.c_str(), field);
    for (const char* field : {"gla_per_layer", "ret_per_layer"})
        if (j.value(field, -1) > 0) fail("%s: %s is not supported by this build", source.c_str(), field);
    std::vector<int> attention_blocks;
    const bool listed = j.contains("attn_layer_pos") && !j["attn_layer_pos"].is_null();
    if (listed) {
        const auto& pos = j["attn_layer_pos"];
        attention_blocks = (pos.is_string() ? nlohmann::json::parse(pos.get<std::string>()) : pos).get<std::vector<int>>();
    }
    std::string blocks;
    for (int i = 0; i < n_layer; i++) {
        const bool windowed = j.value("local_window", -1) > -1 && i % full < full - 1;
        const bool mamba_slot = listed ? std::find(attention_blocks.begin(), attention_blocks.end(), i) == attention_blocks.end()
                                       : mb > 0 && i % mb == 0;
        blocks += j.value("mamba", false) ? 'm' : j.value("mamba_swa_mlp", false) ? 'T'
                : mamba_slot ? (j.value("abl_mamba", false) ? 'P' : 'M')
                : !windowed ? 'F' : j.value("parallel_residual", false) ? 's' : 'S';
    }
    return blocks;
}

// From our own fields or the official ones (the spelling is shared where the meaning is). Missing: the default above.
inline Config config_from_json(const nlohmann::json& j, const std::string& source) {
    try {
        Config c;
        c.name = j.value("name", "custom");
        c.blocks = j.contains("blocks") ? j.at("blocks").get<std::string>() : official_blocks(j, source);
        c.d_model = j.at("n_embd");
        c.n_head = j.value("n_head", 0);
        c.n_kv_head = j.contains("n_query_groups") && !j["n_query_groups"].is_null() ? j["n_query_groups"].get<int>() : c.n_head;
        c.head_dim = j.value("head_size", c.n_head > 0 ? c.d_model / c.n_head : 0);
        c.d_ff = j.value("intermediate_size", 4 * c.d_model);
        c.window = std::max<int64_t>(0, j.value("local_window", (int64_t)-1));
        c.seq_len = j.value("block_size", (int64_t)4096);
        c.rope = !j.value("nope", false);
        c.init = j.value("mamba_init", true) || j.value("mamba", false) ? InitFamily::samba : InitFamily::llama;
        c.tied = j.value("tied", c.init == InitFamily::samba);
        const bool padded = j.contains("padded_vocab_size") && !j["padded_vocab_size"].is_null();
        c.vocab_size = padded ? j["padded_vocab_size"].get<int>() : j.value("vocab_size", 32000);
        c.d_state = j.value("d_state", 16);
        c.norm_eps = j.value("norm_eps", 1e-5f);
        c.rope_base = j.value("rope_base", 10000.0);
        validate(c, source);
        return c;
    } catch (const nlohmann::json::exception& e) {
        fail("%s: not a model configuration: %s", source.c_str(), e.what());
    }
}

// =====================================================================================================================
// 2. Parameters

// How a tensor is drawn before training (spec 1.3).
struct Init {
    enum Kind { constant, uniform, normal, log_arange, dt_bias } kind = constant;
    double value = 0;                      // the constant, the bound of the uniform, the deviation of the normal
};

// A tensor is a matrix (a GEMM operand or an embedding: working copy in floatX) or a vector (a gain, bias or recurrence
// parameter: float everywhere). In memory all matrices come first, then all vectors, so that the optimizer makes one pass
// over each. `at` counts elements from the start of its part.
struct Matrix { int64_t at = -1; };
struct Vector { int64_t at = -1; };

struct Tensor {
    std::string name;                      // official checkpoint name
    std::vector<int64_t> shape;
    int64_t size, at;
    bool is_matrix;
    Init init;
};

// One line a tensor: kind of tensor, member, initialisation, name after the layer's prefix, shape.
#define MAMBA_TENSORS(MATRIX, VECTOR)                                               \
    VECTOR(norm,     ones(),              NORM,             d)                      \
    MATRIX(in_proj,  linear(d),           "in_proj.weight", 2 * e, d)               \
    VECTOR(conv_w,   uniform(0.5),        "conv1d.weight",  e, 1, 4)                \
    VECTOR(conv_b,   uniform(0.5),        "conv1d.bias",    e)                      \
    MATRIX(x_proj,   linear(e),           "x_proj.weight",  R + 2 * N, e)           \
    MATRIX(dt_proj,  linear(R),           "dt_proj.weight", e, R)                   \
    VECTOR(dt_bias,  Init{Init::dt_bias}, "dt_proj.bias",   e)                      \
    VECTOR(A_log,    Init{Init::log_arange}, "A_log",       e, N)                   \
    VECTOR(D,        ones(),              "D",              e)                      \
    MATRIX(out_proj, residual(e),         "out_proj.weight", d, e)

#define ATTENTION_TENSORS(MATRIX, VECTOR)                                           \
    VECTOR(norm,     ones(),              NORM,             d)                      \
    MATRIX(qkv,      linear(d),           "attn.weight",    c.qkv_dim(), d)         \
    MATRIX(proj,     residual(c.q_dim()), "proj.weight",    d, c.q_dim())

#define MLP_TENSORS(MATRIX, VECTOR)                                                 \
    VECTOR(norm,     ones(),              NORM,             d)                      \
    MATRIX(w1,       linear(d),           "w1.weight",      F, d)                   \
    MATRIX(w2,       linear(d),           "w2.weight",      F, d) /* follows w1: one GEMM of 2F rows */ \
    MATRIX(w3,       residual(F),         "w3.weight",      d, F)

#define NETWORK_TENSORS(MATRIX, VECTOR)                                             \
    MATRIX(head,     embedding(),         "lm_head.weight", c.vocab_size, d)        \
    VECTOR(norm_f,   ones(),              "transformer.ln_f.weight", d)

#define DECLARE_MATRIX(member, ...) Matrix member;
#define DECLARE_VECTOR(member, ...) Vector member;
struct MambaTensors { MAMBA_TENSORS(DECLARE_MATRIX, DECLARE_VECTOR) };
struct AttentionTensors { ATTENTION_TENSORS(DECLARE_MATRIX, DECLARE_VECTOR) };
struct MlpTensors { MLP_TENSORS(DECLARE_MATRIX, DECLARE_VECTOR) };
struct NetworkTensors { NETWORK_TENSORS(DECLARE_MATRIX, DECLARE_VECTOR) Matrix embedding; };
#undef DECLARE_MATRIX
#undef DECLARE_VECTOR

enum class Kind { mamba, attention, mlp };
inline const char* kind_name(Kind k) { return k == Kind::mamba ? "mamba" : k == Kind::attention ? "attention" : "mlp"; }

// One residual addition: x <- x + mixer(RMSNorm(x)). The paper counts these as layers.
struct Layer {
    Kind kind;
    int block;                             // of the official model
    int64_t window = 0;                    // attention: keys seen; 0: all
    int d_ff = 0;                          // mlp
    bool parallel = false;                 // mlp that reads what the attention before it read, and shares its norm
    MambaTensors mamba{};
    AttentionTensors attention{};
    MlpTensors mlp{};
};

constexpr int64_t TENSOR_ALIGNMENT = 128;  // elements; so that every matrix starts on 256 bytes

// Every tensor of a configuration, where it lies, and the layers that use it.
struct Layout {
    Config config;
    std::vector<Layer> layers;
    NetworkTensors network;
    std::vector<Tensor> tensors;
    std::vector<int64_t> layer_matrices;                  // where each layer's matrices begin in the flat order; then their end
    int64_t matrix_elements = 0, vector_elements = 0;     // with alignment gaps
    int64_t elements() const { return matrix_elements + vector_elements; }
    int64_t parameters() const { int64_t n = 0; for (auto& t : tensors) n += t.size; return n; }
    int64_t flat(const Tensor& t) const { return t.is_matrix ? t.at : matrix_elements + t.at; }

    explicit Layout(const Config& config) : config(config) {
        add_network();
        layer_matrices.push_back(matrix_elements);
        for (int i = 0; i < config.n_block(); i++) add_block(i, config.blocks[i]);
    }

private:
    Init ones() const { return {Init::constant, 1.0}; }
    Init uniform(double bound) const { return {Init::uniform, bound}; }
    Init linear(int fan_in) const {
        return config.init == InitFamily::samba ? uniform(1 / std::sqrt((double)fan_in)) : Init{Init::normal, std::sqrt(0.4 / config.d_model)};
    }
    // Matrices that write into the residual stream are smaller, by depth
    Init residual(int fan_in) const {
        if (config.init == InitFamily::samba)
            return uniform(1 / std::sqrt((double)fan_in) / std::sqrt((double)config.residuals_per_block() * config.n_block()));
        return {Init::normal, 1 / (std::sqrt((double)config.d_model) * config.n_block())};
    }
    Init embedding() const { return {Init::normal, config.init == InitFamily::samba ? 0.02 : std::sqrt(0.4 / config.d_model)}; }

    int64_t add(bool is_matrix, const std::string& name, Init init, std::vector<int64_t> shape) {
        int64_t& end = is_matrix ? matrix_elements : vector_elements;
        int64_t size = 1;
        for (int64_t n : shape) size *= n;
        const int64_t at = end;
        tensors.push_back({name, std::move(shape), size, at, is_matrix, init});
        end = round_up(end + size, TENSOR_ALIGNMENT);
        return at;
    }

    void add_layer(const Layer& layer) {
        layers.push_back(layer);
        layer_matrices.push_back(matrix_elements);
    }

#define ADD_MATRIX(member, init, name, ...) t.member.at = add(true,  prefix + name, init, {__VA_ARGS__});
#define ADD_VECTOR(member, init, name, ...) \
    t.member.at = add(false, std::string(name) == NORM ? norm + ".weight" : prefix + name, init, {__VA_ARGS__});
    static constexpr const char* NORM = "";              // the layer's norm, whose name depends on the kind of block

    void add_network() {
        const Config& c = config;
        const int d = c.d_model;
        const std::string prefix, norm;
        NetworkTensors& t = network;
        NETWORK_TENSORS(ADD_MATRIX, ADD_VECTOR)
        t.embedding = t.head;                            // tied: one tensor, read twice
        if (!c.tied) t.embedding.at = add(true, "transformer.wte.weight", embedding(), {c.vocab_size, d});
    }
    void add_mamba(int block, const std::string& norm, const std::string& prefix) {
        const int d = config.d_model, e = config.d_inner(), N = config.d_state, R = config.dt_rank();
        Layer layer{Kind::mamba, block};
        MambaTensors& t = layer.mamba;
        MAMBA_TENSORS(ADD_MATRIX, ADD_VECTOR)
        add_layer(layer);
    }
    void add_attention(int block, int64_t window, const std::string& norm, const std::string& prefix) {
        const Config& c = config;
        const int d = c.d_model;
        Layer layer{Kind::attention, block, window};
        AttentionTensors& t = layer.attention;
        ATTENTION_TENSORS(ADD_MATRIX, ADD_VECTOR)
        add_layer(layer);
    }
    void add_mlp(int block, int F, const std::string& norm, const std::string& prefix) {
        const int d = config.d_model;
        Layer layer{Kind::mlp, block, 0, F};
        MlpTensors& t = layer.mlp;
        MLP_TENSORS(ADD_MATRIX, ADD_VECTOR)
        add_layer(layer);
    }
    // The same without a norm of its own
    void add_parallel_mlp(int block, int F, const std::string& prefix) {
        const int d = config.d_model;
        Layer layer{Kind::mlp, block, 0, F, true};
        const std::string norm;
        MlpTensors& t = layer.mlp;
        const Vector shared = layers.back().attention.norm;
#define SHARED_VECTOR(member, ...) t.member = shared;
        MLP_TENSORS(ADD_MATRIX, SHARED_VECTOR)
#undef SHARED_VECTOR
        add_layer(layer);
    }
#undef ADD_MATRIX
#undef ADD_VECTOR

    // Adding a kind of layer: its table above, an add_ function, a letter here, and its forward and backward in section 5.
    void add_block(int i, char letter) {
        const std::string h = "transformer.h." + std::to_string(i) + ".";
        const Config& c = config;
        switch (letter) {
        case 'm': add_mamba(i, h + "norm", h + "mixer."); return;
        case 'M': add_mamba(i, h + "norm_1", h + "attn."); break;
        case 'P': add_mlp(i, 2 * c.d_model, h + "norm_1", h + "attn.swiglu."); break;
        case 'S': add_attention(i, c.window, h + "norm_1", h + "attn."); break;
        case 'F': add_attention(i, 0, h + "norm_1", h + "attn."); break;
        case 'T': add_mamba(i, h + "norm_m", h + "mb."); add_attention(i, c.window, h + "norm_attn", h + "attn."); break;
        case 's': add_attention(i, c.window, h + "norm_1", h + "attn."); add_parallel_mlp(i, c.d_ff, h + "mlp.swiglu."); return;
        }
        add_mlp(i, c.d_ff, h + "norm_2", h + "mlp.swiglu.");
    }
};

// "mamba of block 0"
inline std::string layer_name(const Layout& layout, size_t l) {
    return std::string(kind_name(layout.layers[l].kind)) + " of block " + std::to_string(layout.layers[l].block);
}

// The weights of a layer's large products, (N,K): those that --matmul fp8 multiplies in 8 bits, where N and K are multiples of 16. x_proj and
// dt_proj are bound by memory, the head decides on the loss: they stay in floatX.
struct LargeWeights { Matrix w; int N, K; };
inline std::vector<LargeWeights> large_weights(const Config& c, const Layer& layer) {
    const int d = c.d_model, e = c.d_inner(), F = layer.d_ff;
    switch (layer.kind) {
    case Kind::mamba: return {{layer.mamba.in_proj, 2 * e, d}, {layer.mamba.out_proj, d, e}};
    case Kind::attention: return {{layer.attention.qkv, c.qkv_dim(), d}, {layer.attention.proj, d, c.q_dim()}};
    case Kind::mlp: return {{layer.mlp.w1, 2 * F, d}, {layer.mlp.w3, d, F}};                          // w1 | w2
    }
    return {};
}

// A stream of counter_uniform() for each seed and name: a tensor's values depend only on (seed, name, i).
inline uint64_t stream_key(uint64_t seed, const std::string& name) {
    uint64_t h = 0xcbf29ce484222325ull ^ (seed * 0xd6e8feb86659fd93ull);
    for (unsigned char ch : name) h = (h ^ ch) * 0x100000001b3ull;
    return h ^ (h >> 29);
}

// The initial value of element i of t.
inline float initial_value(const Tensor& t, uint64_t key, int64_t i) {
    switch (t.init.kind) {
    case Init::constant: return (float)t.init.value;
    case Init::uniform: return (float)(t.init.value * (2 * counter_uniform(key, i) - 1));
    case Init::normal: {                   // Box-Muller, one draw an element
        const double radius = std::sqrt(-2 * std::log(counter_uniform(key, 2 * i))), angle = 2 * M_PI * counter_uniform(key, 2 * i + 1);
        return (float)(t.init.value * radius * std::cos(angle));
    }
    case Init::log_arange: return (float)std::log(1.0 + (double)(i % t.shape.back()));       // A = -(1, 2, ..., N)
    case Init::dt_bias: {                  // softplus^-1 of a step drawn log-uniformly from [0.001, 0.1]
        const double dt = std::max(1e-4, std::exp(std::log(0.001) + counter_uniform(key, i) * (std::log(0.1) - std::log(0.001))));
        return (float)(dt + std::log(-std::expm1(-dt)));
    }
    }
    return 0;
}

// =====================================================================================================================
// 3. Memory

// Hands out pieces of one allocation. The plan that takes them runs twice: dry, to learn the size, then for real.
class Arena {
    char* base = nullptr;
    size_t used = 0, peak = 0;

public:
    Arena() = default;
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;
    ~Arena() { if (base) device_free(base); }
    template <class T> T* take(int64_t count) {
        T* p = base ? reinterpret_cast<T*>(base + used) : nullptr;
        used += (size_t)round_up(count * (int64_t)sizeof(T), 256);
        peak = std::max(peak, used);
        return p;
    }
    void rewind() { used = 0; }            // what was taken before may be overwritten by what is taken next
    void allocate(const char* what) { rewind(); base = (char*)device_alloc(peak, what); }
    size_t taken() const { return used; }
    size_t bytes() const { return peak; }
};

// What backward finds again. x is always kept; the rest of a layer is kept or computed once more from x:
//   none   everything                                     light   the products of large GEMMs, attention and scan states
//   full   nothing: backward first runs the layer's forward
enum class Recompute { none, light, full };
inline const char* recompute_name(Recompute r) { return r == Recompute::none ? "none" : r == Recompute::light ? "light" : "full"; }

// A layer's tensors, in the order in which forward makes them; a kind uses its own part.
struct LayerActivations {
    float* rstd;                           // (B,T)         1/rms of x
    floatX* n;                             // (B,T,d)       normalised x
    // mamba
    floatX *xz, *u, *x_dbl, *dt;           // (B,T,2e) x|z, (B,T,e) after conv, (B,T,R+2N) dt low rank|B|C, (B,T,e) step before softplus
    void* states;                          //               scan states at chunk boundaries
    // attention
    floatX* qkv;                           // (B,T,(H+2G)hd) packed by group, after RoPE
    float* lse;                            // (B,H,T)       log-sum-exp of the scores
    // mlp
    floatX* gate_up;                       // (B,T,2F)
    floatX* out;                           // what the last GEMM reads: (B,T,e) gated scan, (B,T,H hd) heads, (B,T,F) hidden
    // gradients, in scratch
    floatX *d_out, *d_in, *dn;             // of `out`, of the first GEMM's result, of n
    floatX *du, *ddt, *dx_dbl;             // mamba
};

struct Activations {
    int64_t B = 0, T = 0;
    bool training = false;
    Recompute recompute = Recompute::light;
    bool fp8 = false;                      // large products in 8 bits

    std::vector<float*> x;                 // L+1 of (B,T,d): the residual stream before each layer, and after the last
    std::vector<LayerActivations> layers;
    int *tokens, *targets;                 // (B,T)
    int* staged;                           // (2,B,T)       the next batch's, on their way
    float* rope;                           // (T,hd/2,2)
    float* rstd_f;                         // (B,T)
    floatX* n_f;                           // (B,T,d)       what the head reads
    floatX* dn_f;                          // (B,T,d)
    floatX* logits;                        // (logit_rows,V), then their gradient in place
    int64_t logit_rows = 0;
    float* losses;                         // (B,T)
    uint8_t* greedy;                       // (B,T)         1: the target is what greedy decoding chooses; not in training
    float* loss;                           // (1)           mean, accumulated over micro-batches
    float* norm;                           // (2)           gradient norm and clip factor
    ResidualGradient<floatX> dx;           // (B,T,d)       gradient of the residual stream; high: what the layer's last GEMM gets
    floatX* dx_parallel;                   // (B,T,d)       high, between the parts of a parallel block
    Quantised quantised;                   // (B,T,widest)  fp8: what the next product reads, made of its floatX by what writes that or by the product
    void* workspace;                       //               of whichever operation runs
    int* drawn;                            // (1)           items of work that attention's blocks have drawn; zero between operations
    Arena kept, scratch;
    int64_t rope_position = -1, rope_T = -1;   // what `rope` holds

    void plan(const Layout& layout);
    void create(const Layout& layout, int64_t B_, int64_t T_, bool training_, Recompute recompute_, bool fp8_ = false) {
        B = B_; T = T_; training = training_; recompute = recompute_; fp8 = fp8_;
        plan(layout);
        kept.allocate("the activations");
        scratch.allocate("the scratch memory");
        plan(layout);
        device_zero(drawn, sizeof(int), Stream{});
        stream_sync(Stream{});
    }
    size_t bytes() const { return kept.bytes() + scratch.bytes(); }

private:
    size_t plan_layer(const Config& c, const Layer& layer, LayerActivations& a);
    int64_t head_rows(const Config& c, size_t gradient_bytes) const;
    size_t workspace_bytes(const Layout& layout) const;
};

// Keeping or recomputing is nothing but the arena that a tensor comes from. Returns the bytes of the gradients, which are scratch at every level.
inline size_t Activations::plan_layer(const Config& c, const Layer& layer, LayerActivations& a) {
    const int64_t BT = B * T;
    const int d = c.d_model, e = c.d_inner(), N = c.d_state, R = c.dt_rank(), F = layer.d_ff;
    Arena& cheap = training && recompute == Recompute::none ? kept : scratch;
    Arena& dear = training && recompute != Recompute::full ? kept : scratch;
    scratch.rewind();
    a.rstd = dear.take<float>(BT);
    a.n = cheap.take<floatX>(BT * d);
    switch (layer.kind) {
    case Kind::mamba:
        a.xz = dear.take<floatX>(BT * 2 * e);
        a.u = cheap.take<floatX>(BT * e);
        a.x_dbl = dear.take<floatX>(BT * (R + 2 * N));
        a.dt = cheap.take<floatX>(BT * e);
        a.states = training ? dear.take<char>((int64_t)ops::selective_scan_saved((int)B, T, e, N)) : nullptr;
        a.out = scratch.take<floatX>(BT * e);            // the scan's backward makes it again on its way
        break;
    case Kind::attention:
        a.qkv = dear.take<floatX>(BT * c.qkv_dim());
        a.out = dear.take<floatX>(BT * c.q_dim());
        a.lse = dear.take<float>(BT * c.n_head);
        break;
    case Kind::mlp:
        a.gate_up = dear.take<floatX>(BT * 2 * F);
        a.out = cheap.take<floatX>(BT * F);
        break;
    }
    if (!training) return 0;
    const size_t before = scratch.taken();
    switch (layer.kind) {
    case Kind::mamba:
        a.d_out = scratch.take<floatX>(BT * e);
        a.d_in = scratch.take<floatX>(BT * 2 * e);
        a.du = scratch.take<floatX>(BT * e);
        a.ddt = scratch.take<floatX>(BT * e);
        a.dx_dbl = scratch.take<floatX>(BT * (R + 2 * N));
        a.dn = a.d_out;                                   // d_out (B,T,e) is read for the last time before dn (B,T,d) is made
        break;
    case Kind::attention:
        a.d_out = scratch.take<floatX>(BT * c.q_dim());
        a.d_in = scratch.take<floatX>(BT * c.qkv_dim());
        a.dn = scratch.take<floatX>(BT * d);
        break;
    case Kind::mlp:
        a.d_out = scratch.take<floatX>(BT * F);
        a.d_in = scratch.take<floatX>(BT * 2 * F);
        a.dn = scratch.take<floatX>(BT * d);
        break;
    }
    return scratch.taken() - before;
}

// Logits exist for some rows at a time: equal parts of what fits where the layers' gradients are, or of 256 MiB. Not of what is free at this level of
// recomputation: the level changes no bit.
inline int64_t Activations::head_rows(const Config& c, size_t gradient_bytes) const {
    const int64_t BT = B * T, room = (int64_t)gradient_bytes - round_up(BT * c.d_model * (int64_t)sizeof(floatX), 256);   // beside dn_f
    const int64_t most = std::clamp<int64_t>(std::max<int64_t>(room, 256 << 20) / (c.vocab_size * (int64_t)sizeof(floatX)), 1, BT);
    const int64_t rows = ceil_div(BT, ceil_div(BT, most)), whole_tiles = round_up(rows, 128);
    return whole_tiles <= most ? whole_tiles : rows;
}

inline size_t Activations::workspace_bytes(const Layout& layout) const {
    const Config& c = layout.config;
    const int64_t BT = B * T;
    size_t most = 256;
    auto need = [&](size_t bytes) { most = std::max(most, bytes); };
    const bool any_mamba = std::any_of(layout.layers.begin(), layout.layers.end(), [](const Layer& l) { return l.kind == Kind::mamba; });
    for (int64_t b = 1; any_mamba && b <= B; b++)         // a smaller batch is split into more segments of time
        need(ops::selective_scan_workspace((int)b, T, c.d_inner(), c.d_state));
    if (!training) return most;
    need(ops::embedding_backward_workspace(BT, c.vocab_size, c.d_model));
    need(ops::rmsnorm_backward_workspace(BT, c.d_model));
    need(ops::global_norm_workspace(layout.elements()));
    for (const Layer& layer : layout.layers) {
        for (const LargeWeights& w : large_weights(c, layer))
            if (fp8) need(ops::quantise_columns_workspace(w.N, w.K));
        if (layer.kind == Kind::mamba) need(ops::x_proj_conv_backward_workspace((int)B, T, c.d_inner(), c.dt_rank() + 2 * c.d_state));
        if (layer.kind == Kind::attention) need(ops::attention_backward_workspace((int)B, T, c.n_head, c.n_kv_head, c.head_dim, layer.window));
    }
    return most;
}

inline void Activations::plan(const Layout& layout) {
    const Config& c = layout.config;
    const int64_t BT = B * T, d = c.d_model, V = c.vocab_size;
    const size_t L = layout.layers.size();
    kept.rewind();
    scratch.rewind();
    tokens = kept.take<int>(BT);
    targets = kept.take<int>(BT);
    staged = kept.take<int>(2 * BT);
    rope = kept.take<float>(T * std::max(c.head_dim, 2));
    losses = kept.take<float>(BT);
    greedy = training ? nullptr : kept.take<uint8_t>(BT);
    loss = kept.take<float>(1);
    norm = kept.take<float>(2);
    workspace = kept.take<char>((int64_t)workspace_bytes(layout));
    drawn = kept.take<int>(1);
    x.assign(L + 1, nullptr);
    float* two[2] = {nullptr, nullptr};                   // without a backward pass two buffers take turns
    for (size_t l = 0; l <= L; l++) {
        if (training || l < 2) x[l] = two[l % 2] = kept.take<float>(BT * d);
        else x[l] = two[l % 2];
    }
    layers.assign(L, LayerActivations{});
    size_t gradient_bytes = 0;
    for (size_t l = 0; l < L; l++) gradient_bytes = std::max(gradient_bytes, plan_layer(c, layout.layers[l], layers[l]));
    // The head comes when no layer's scratch is alive.
    rstd_f = kept.take<float>(BT);
    n_f = kept.take<floatX>(BT * d);
    scratch.rewind();
    logit_rows = head_rows(c, gradient_bytes);
    logits = scratch.take<floatX>(logit_rows * V);
    if (!training) return;
    dn_f = scratch.take<floatX>(BT * d);
    const bool any_parallel = std::any_of(layout.layers.begin(), layout.layers.end(), [](const Layer& l) { return l.parallel; });
    dx.high = kept.take<floatX>(BT * d);
    dx.low = HAS_LOW_PLANE<floatX> ? kept.take<int8_t>(BT * d) : nullptr;
    dx_parallel = any_parallel ? kept.take<floatX>(BT * d) : nullptr;
    int64_t widest = 0;
    for (const Layer& layer : layout.layers)
        for (const LargeWeights& w : large_weights(c, layer)) widest = std::max<int64_t>({widest, w.N, w.K});
    if (fp8) quantised = {kept.take<uint8_t>(BT * widest), kept.take<float>(BT)};
}

// Parameters in working precision; for training also master copy, gradients and moments, flat and in the same order: all
// matrices, then all vectors. Of master copy and moments a process may hold only its own range.
struct Parameters {
    int64_t n_matrix = 0, n = 0;
    Range own;                             // of the flat order
    floatX* matrices = nullptr;            // working copies
    float* vectors = nullptr;
    float* grads = nullptr;                                          // (n); null without training
    float *master = nullptr, *m = nullptr, *v = nullptr;             // (own); null without training
    struct Fp8Copies { LargeWeights of; Quantised rows, columns; };
    std::vector<std::vector<Fp8Copies>> fp8;                         // of each layer's large weights; empty: no products in 8 bits
    Arena arena;

    void create(const Layout& layout, bool training) { create(layout, training, {0, layout.elements()}); }
    void create(const Layout& layout, bool training, Range own_, bool with_fp8 = false) {
        own = own_;
        for (int dry = 1; dry >= 0; dry--) {
            plan(layout, training, with_fp8);
            if (dry) arena.allocate(training ? "the parameters and optimizer" : "the parameters");
        }
    }
    void plan(const Layout& layout, bool training, bool with_fp8) {
        n_matrix = layout.matrix_elements;
        n = layout.elements();
        matrices = arena.take<floatX>(n_matrix);
        vectors = arena.take<float>(n - n_matrix);
        grads = training ? arena.take<float>(n) : nullptr;
        for (float** p : {&master, &m, &v}) *p = training ? arena.take<float>(own.size()) : nullptr;
        fp8.clear();
        if (with_fp8) for (const Layer& layer : layout.layers) plan_fp8(large_weights(layout.config, layer));
    }
    void plan_fp8(const std::vector<LargeWeights>& of_layer) {
        std::vector<Fp8Copies>& copies = fp8.emplace_back();
        for (const LargeWeights& w : of_layer) {
            if (w.N % 16 || w.K % 16 || std::max(w.N, w.K) > ops::QUANTISE_MOST) continue;   // cuBLASLt, and our kernels, have none for these
            const int64_t n = (int64_t)w.N * w.K;
            copies.push_back({w, {arena.take<uint8_t>(n), arena.take<float>(w.N)}, {arena.take<uint8_t>(n), arena.take<float>(w.K)}});
        }
    }
    float* at(float* shard, int64_t i) const { return shard + (i - own.begin); }   // element i of the flat order in master, m or v
    floatX* operator()(Matrix t) const { return matrices + t.at; }
    float* operator()(Vector t) const { return vectors + t.at; }
    float* grad(Matrix t) const { return grads + t.at; }
    float* grad(Vector t) const { return grads + n_matrix + t.at; }
};

// =====================================================================================================================
// 4. Sequence state: all that a model remembers of the tokens before a chunk. Its size does not grow with their number,
// but for full attention, which needs room for `max_context` keys.

struct LayerState {
    floatX* halo = nullptr;                // mamba: (B,3,e) the conv's last inputs
    float* h = nullptr;                    // mamba: (B,e,N)
    floatX* next_halo = nullptr;           // mamba: what the layer leaves, before it replaces what it began with
    float* next_h = nullptr;
    floatX* ring = nullptr;                // attention: (B,capacity,2,G,hd); the key and value of position p in slot p % capacity
    int64_t capacity = 0;
};

struct SequenceState {
    int64_t B = 0;
    int64_t position = 0;                  // tokens seen so far
    bool held = false;                     // for training: a layer's state moves on when backward has passed the layer, which reads it
    std::vector<LayerState> layers;
    Arena arena;

    void plan(const Layout& layout, int64_t max_context) {
        const Config& c = layout.config;
        const int64_t e = c.d_inner(), N = c.d_state;
        arena.rewind();
        layers.assign(layout.layers.size(), {});
        floatX* next_halo = held ? nullptr : arena.take<floatX>(B * 3 * e);      // one for all layers, which come one after the other
        float* next_h = held ? nullptr : arena.take<float>(B * e * N);
        for (size_t l = 0; l < layers.size(); l++) {
            const Layer& layer = layout.layers[l];
            if (layer.kind == Kind::mamba) {
                layers[l].halo = arena.take<floatX>(B * 3 * e);
                layers[l].h = arena.take<float>(B * e * N);
                layers[l].next_halo = held ? arena.take<floatX>(B * 3 * e) : next_halo;
                layers[l].next_h = held ? arena.take<float>(B * e * N) : next_h;
            } else if (layer.kind == Kind::attention) {
                const int64_t most = layer.window > 0 ? layer.window - 1 : max_context;
                layers[l].capacity = std::min(most, max_context);
                layers[l].ring = layers[l].capacity > 0 ? arena.take<floatX>(B * layers[l].capacity * 2 * c.n_kv_head * c.head_dim) : nullptr;
            }
        }
    }
    // max_context: the most tokens that will be seen, where the caller knows; bounds the rings
    void create(const Layout& layout, int64_t B_, int64_t max_context, Stream stream, bool held_ = false) {
        B = B_; held = held_;
        plan(layout, max_context);
        arena.allocate("the sequence state");
        plan(layout, max_context);
        reset(layout, stream);
    }
    void reset(const Layout& layout, Stream stream) {
        const int64_t e = layout.config.d_inner(), N = layout.config.d_state;
        position = 0;
        for (LayerState& s : layers) {
            if (s.halo) device_zero(s.halo, B * 3 * e * sizeof(floatX), stream);
            if (s.h) device_zero(s.h, B * e * N * sizeof(float), stream);
        }                                                 // a ring's slots count only below `position`
    }
};

// =====================================================================================================================
// 5. Layers

// Forward and backward of a micro-batch, captured: what forward_backward() below enqueues for the same arguments.
struct MicroBatchGraph {
    int B;
    int64_t T;
    float weight;
    bool first;
    Graph graph;
};

struct Model {
    Layout layout;
    Stream stream, copies;                 // computes; brings the next batch
    ops::Matmul matmul;
    Parameters w;
    Activations acts;
    // Called where given: before forward reads a layer's weights (-1: the embedding's), after backward has made its gradients
    std::function<void(int layer)> before_layer, after_layer;
    Event uploaded, taken;                 // the tokens of the last upload have left the host's memory; have left acts.staged
    std::vector<MicroBatchGraph> graphs;

    explicit Model(const Config& config)
        : layout(config), stream(stream_create()), copies(stream_create()), uploaded(event_create()), taken(event_create()) {}
    ~Model() {
        stream_sync(copies);
        stream_sync(stream);
        for (MicroBatchGraph& g : graphs) graph_destroy(g.graph);
        stream_destroy(copies);
        stream_destroy(stream);
        event_destroy(uploaded);
        event_destroy(taken);
    }
    Model(const Model&) = delete;
    Model& operator=(const Model&) = delete;
    const Config& config() const { return layout.config; }
};

// Which of a layer's tensors to compute: all of them in forward; in backward those that the plan did not keep.
struct Make { bool cheap, dear; };
inline Make make_all() { return {true, true}; }
inline Make make_missing(Recompute r) { return {r != Recompute::none, r == Recompute::full}; }

// One call's shape and surroundings, so that each line below shows only what it computes.
struct Pass {
    Model& m;
    int B;
    int64_t T;
    SequenceState* state;                  // null: the sequence begins here and is not continued
    bool add = false;                      // backward: to the gradients of matrices that the step's earlier micro-batches left
    bool fp8 = false;                      // large products in 8 bits, with copies of the weights that the step's first micro-batch makes
    ResidualGradient<floatX> dx_sum{};     // backward: the sum so far. acts.dx, but between the parts of a parallel block
    int64_t BT() const { return B * T; }
    LayerState* layer_state(size_t l) const { return state ? &state->layers[l] : nullptr; }
    // Of a large product: with their copies in 8 bits, where this pass uses such
    Weights weights(Matrix t) const {
        if (!fp8) return m.w(t);
        for (const auto& layer : m.w.fp8)
            for (const auto& copies : layer)
                if (copies.of.w.at == t.at) return {m.w(t), copies.rows, copies.columns, m.acts.quantised};
        return m.w(t);
    }
};

// Layer l's weights in 8 bits, from what they are now
inline void quantise_weights(Model& m, size_t l) {
    for (const auto& [of, rows, columns] : m.w.fp8[l]) {
        ops::quantise_rows(rows, m.w(of.w), of.N, of.K, m.stream);
        ops::quantise_columns(columns, m.w(of.w), m.acts.workspace, of.N, of.K, m.stream);
    }
}

// What a layer remembers becomes what it has just computed: in forward, or of a held state in backward
inline void mamba_advance(const Pass& p, LayerState& s) {
    const Config& c = p.m.config();
    const int64_t B = p.B, e = c.d_inner(), N = c.d_state;
    copy_on_device(s.halo, s.next_halo, (size_t)(B * 3 * e) * sizeof(floatX), p.m.stream);
    copy_on_device(s.h, s.next_h, (size_t)(B * e * N) * sizeof(float), p.m.stream);
}
inline void attention_advance(const Pass& p, LayerState& s, const LayerActivations& a) {
    const Config& c = p.m.config();
    if (s.capacity == 0) return;
    ops::ring_update(s.ring, a.qkv, s.capacity, p.state->position, p.B, p.T, c.n_head, c.n_kv_head, c.head_dim, p.m.stream);
}

// Mamba up to what out_proj reads.  x (B,T,d) -> a.out (B,T,e)
inline void mamba_inner(Pass& p, const Layer& layer, LayerActivations& a, const float* x, LayerState* s, Make make) {
    Model& m = p.m;
    const Config& c = m.config();
    const MambaTensors& t = layer.mamba;
    const int d = c.d_model, e = c.d_inner(), N = c.d_state, R = c.dt_rank(), R2N = R + 2 * N, B = p.B;
    const int64_t T = p.T, BT = p.BT();
    const Stream stream = m.stream;
    floatX* halo_in = s ? s->halo : nullptr;
    floatX* halo_out = s ? s->next_halo : nullptr;
    float* h_in = s ? s->h : nullptr;
    float* h_out = s ? s->next_h : nullptr;

    const Weights in_proj = p.weights(t.in_proj).with_input_made();
    if (make.cheap) ops::rmsnorm_forward(a.n, a.rstd, x, m.w(t.norm), BT, d, c.norm_eps, stream, in_proj.input);             // (B,T,d)
    if (make.dear) ops::matmul_forward(m.matmul, a.xz, 2 * e, a.n, d, in_proj, BT, 2 * e, d, stream);                        // (B,T,2e) x|z
    if (make.cheap)
        ops::scan_inputs_forward(m.matmul, a.u, a.x_dbl, a.dt, halo_out, a.xz, 2 * e, halo_in, m.w(t.conv_w), m.w(t.conv_b), m.w(t.x_proj),
                                 m.w(t.dt_proj), !make.dear, B, T, e, R, N, stream);                 // (B,T,e), (B,T,R+2N) dt|B|C, (B,T,e)
    if (make.dear)
        ops::selective_scan_forward(a.out, a.states, h_out, a.u, a.dt, a.x_dbl + R, R2N, a.xz + e, 2 * e, m.w(t.A_log), m.w(t.D),
                                    m.w(t.dt_bias), h_in, m.acts.workspace, B, T, e, N, stream);                             // (B,T,e)
    if (s && !p.state->held) mamba_advance(p, *s);
}

inline void mamba_forward(Pass& p, const Layer& layer, LayerActivations& a, float* x_next, const float* x, LayerState* s) {
    Model& m = p.m;
    const int d = m.config().d_model, e = m.config().d_inner();
    mamba_inner(p, layer, a, x, s, make_all());
    ops::matmul_residual(m.matmul, x_next, x, a.out, p.weights(layer.mamba.out_proj), p.BT(), d, e, m.stream);               // (B,T,d)
}

// In: acts.dx = dL/dx_next. Out: the same of x, and += the gradients of the layer's parameters. A state (held) is a
// constant: it gets no gradient.
inline void mamba_backward(Pass& p, const Layer& layer, LayerActivations& a, const float* x, LayerState* s) {
    Model& m = p.m;
    const Config& c = m.config();
    const MambaTensors& t = layer.mamba;
    const Parameters& w = m.w;
    const int d = c.d_model, e = c.d_inner(), N = c.d_state, R = c.dt_rank(), R2N = R + 2 * N, B = p.B;
    const int64_t T = p.T, BT = p.BT();
    const Stream stream = m.stream;
    const floatX *dy = m.acts.dx.high, *halo_in = s ? s->halo : nullptr;
    const float* h_in = s ? s->h : nullptr;
    void* workspace = m.acts.workspace;

    mamba_inner(p, layer, a, x, s, make_missing(m.acts.recompute));
    ops::matmul_dgrad(m.matmul, a.d_out, e, dy, d, p.weights(t.out_proj), BT, d, e, false, stream);                          // (B,T,e)
    ops::selective_scan_backward(a.du, a.ddt, a.d_in + e, 2 * e, a.dx_dbl + R, R2N, a.out, w.grad(t.A_log), w.grad(t.D), w.grad(t.dt_bias),
                                 a.d_out, a.u, a.dt, a.x_dbl + R, R2N, a.xz + e, 2 * e, w(t.A_log), w(t.D), w(t.dt_bias), h_in,
                                 a.states, workspace, B, T, e, N, stream);                                         // du, ddt, dz, dB|dC, out
    ops::matmul_wgrad(m.matmul, w.grad(t.out_proj), dy, d, a.out, e, BT, d, e, p.add, stream);
    ops::matmul_dgrad(m.matmul, a.dx_dbl, R2N, a.ddt, e, w(t.dt_proj), BT, e, R, false, stream);                             // (B,T,R)
    ops::matmul_wgrad(m.matmul, w.grad(t.dt_proj), a.ddt, e, a.x_dbl, R2N, BT, e, R, p.add, stream);
    ops::x_proj_conv_backward(m.matmul, a.d_in, 2 * e, w.grad(t.x_proj), p.add, w.grad(t.conv_w), w.grad(t.conv_b), a.du, a.dx_dbl, w(t.x_proj), a.u,
                              a.xz, 2 * e, halo_in, w(t.conv_w), w(t.conv_b), workspace, B, T, e, R2N, stream);              // dx
    ops::matmul_dgrad(m.matmul, a.dn, d, a.d_in, 2 * e, p.weights(t.in_proj), BT, 2 * e, d, false, stream);                  // (B,T,d)
    ops::matmul_wgrad(m.matmul, w.grad(t.in_proj), a.d_in, 2 * e, a.n, d, BT, 2 * e, d, p.add, stream);
    ops::rmsnorm_backward(m.acts.dx, p.dx_sum, w.grad(t.norm), a.dn, a.n, x, a.rstd, w(t.norm), workspace, BT, d, stream);   // dx +=
    if (s) mamba_advance(p, *s);
}

// Attention up to what proj reads.  x (B,T,d) -> a.out (B,T,H hd)
inline void attention_inner(Pass& p, const Layer& layer, LayerActivations& a, const float* x, LayerState* s, Make make) {
    Model& m = p.m;
    const Config& c = m.config();
    const AttentionTensors& t = layer.attention;
    const int d = c.d_model, H = c.n_head, G = c.n_kv_head, hd = c.head_dim, B = p.B;
    const int64_t T = p.T, BT = p.BT(), position = s ? p.state->position : 0, capacity = s ? s->capacity : 0;
    const Stream stream = m.stream;
    const floatX* ring = position > 0 && capacity > 0 ? s->ring : nullptr;
    const int* starts = nullptr;                          // one document a sequence

    const Weights qkv = p.weights(t.qkv).with_input_made();
    if (make.cheap) ops::rmsnorm_forward(a.n, a.rstd, x, m.w(t.norm), BT, d, c.norm_eps, stream, qkv.input);                 // (B,T,d)
    if (!make.dear) return;
    ops::matmul_rope_forward(m.matmul, a.qkv, a.n, qkv, c.rope ? m.acts.rope : nullptr, B, T, H, G, hd, d, stream);          // (B,T,(H+2G)hd)
    ops::attention_forward(a.out, a.lse, a.qkv, ring, capacity, position, starts, B, T, H, G, hd, layer.window, m.acts.drawn, stream);   // (B,T,H hd)
    if (s && !p.state->held) attention_advance(p, *s, a);
}

inline void attention_forward(Pass& p, const Layer& layer, LayerActivations& a, float* x_next, const float* x, LayerState* s) {
    Model& m = p.m;
    const Config& c = m.config();
    attention_inner(p, layer, a, x, s, make_all());
    ops::matmul_residual(m.matmul, x_next, x, a.out, p.weights(layer.attention.proj), p.BT(), c.d_model, c.q_dim(), m.stream); // (B,T,d)
}

inline void attention_backward(Pass& p, const Layer& layer, LayerActivations& a, const float* x, LayerState* s) {
    Model& m = p.m;
    const Config& c = m.config();
    const AttentionTensors& t = layer.attention;
    const Parameters& w = m.w;
    const int d = c.d_model, H = c.n_head, G = c.n_kv_head, hd = c.head_dim, B = p.B;
    const int64_t T = p.T, BT = p.BT(), position = s ? p.state->position : 0, capacity = s ? s->capacity : 0;
    const Stream stream = m.stream;
    const floatX* dy = m.acts.dx.high;

    attention_inner(p, layer, a, x, s, make_missing(m.acts.recompute));
    ops::matmul_dgrad(m.matmul, a.d_out, c.q_dim(), dy, d, p.weights(t.proj), BT, d, c.q_dim(), false, stream);              // (B,T,H hd)
    ops::matmul_wgrad(m.matmul, w.grad(t.proj), dy, d, a.out, c.q_dim(), BT, d, c.q_dim(), p.add, stream);
    const floatX* ring = position > 0 && capacity > 0 ? s->ring : nullptr;
    const int* starts = nullptr;                          // one document a sequence
    ops::attention_backward(a.d_in, a.d_out, a.out, a.qkv, a.lse, ring, capacity, position, starts, m.acts.workspace, B, T, H, G, hd, layer.window,
                            c.rope ? m.acts.rope : nullptr, m.acts.drawn, stream);                                           // (B,T,(H+2G)hd)
    ops::matmul_dgrad(m.matmul, a.dn, d, a.d_in, c.qkv_dim(), p.weights(t.qkv), BT, c.qkv_dim(), d, false, stream);          // (B,T,d)
    ops::matmul_wgrad(m.matmul, w.grad(t.qkv), a.d_in, c.qkv_dim(), a.n, d, BT, c.qkv_dim(), d, p.add, stream);
    ops::rmsnorm_backward(m.acts.dx, p.dx_sum, w.grad(t.norm), a.dn, a.n, x, a.rstd, w(t.norm), m.acts.workspace, BT, d, stream);    // dx +=
    p.dx_sum = m.acts.dx;
    if (s) attention_advance(p, *s, a);
}

// SwiGLU up to what w3 reads: silu(w1 n) * (w2 n).  x (B,T,d) -> a.out (B,T,F)
inline void mlp_inner(Pass& p, const Layer& layer, LayerActivations& a, const float* x, Make make) {
    Model& m = p.m;
    const MlpTensors& t = layer.mlp;
    const int d = m.config().d_model, F = layer.d_ff;
    const int64_t BT = p.BT();
    const Weights w12 = p.weights(t.w1).with_input_made();
    const Quantised h_copy = p.weights(t.w3).input;
    if (make.cheap) ops::rmsnorm_forward(a.n, a.rstd, x, m.w(t.norm), BT, d, m.config().norm_eps, m.stream, w12.input);     // (B,T,d)
    if (make.dear) ops::matmul_swiglu_forward(m.matmul, a.out, a.gate_up, a.n, w12, BT, F, d, m.stream, h_copy);            // (B,T,F), (B,T,2F) w1|w2
}

// x_norm: what the norm reads; x itself, but in a parallel block what the attention before it read.
inline void mlp_forward(Pass& p, const Layer& layer, LayerActivations& a, float* x_next, const float* x, const float* x_norm) {
    Model& m = p.m;
    mlp_inner(p, layer, a, x_norm, make_all());
    const Weights w3 = p.weights(layer.mlp.w3).with_input_made();
    ops::matmul_residual(m.matmul, x_next, x, a.out, w3, p.BT(), m.config().d_model, layer.d_ff, m.stream);                  // (B,T,d)
}

inline void mlp_backward(Pass& p, const Layer& layer, LayerActivations& a, const float* x_norm) {
    Model& m = p.m;
    const MlpTensors& t = layer.mlp;
    const Parameters& w = m.w;
    const int d = m.config().d_model, F = layer.d_ff;
    const int64_t BT = p.BT();
    const Stream stream = m.stream;
    const floatX* dy = m.acts.dx.high;
    // In a parallel block the attention, next in backward, must still see the gradient of the block's output: the sum goes to another place.
    const ResidualGradient<floatX> dx = layer.parallel ? ResidualGradient<floatX>{m.acts.dx_parallel, m.acts.dx.low} : m.acts.dx;

    const Make missing = make_missing(m.acts.recompute);
    mlp_inner(p, layer, a, x_norm, missing);
    const Weights w12 = p.weights(t.w1);
    floatX* missing_out = missing.cheap && !missing.dear ? a.out : nullptr;
    ops::matmul_swiglu_backward(m.matmul, a.d_in, missing_out, a.d_out, dy, p.weights(t.w3), a.gate_up, BT, F, d, stream, w12.input); // (B,T,2F)
    ops::matmul_wgrad(m.matmul, w.grad(t.w3), dy, d, a.out, F, BT, d, F, p.add, stream);
    ops::matmul_dgrad(m.matmul, a.dn, d, a.d_in, 2 * F, w12.with_input_made(), BT, 2 * F, d, false, stream);                 // (B,T,d)
    ops::matmul_wgrad(m.matmul, w.grad(t.w1), a.d_in, 2 * F, a.n, d, BT, 2 * F, d, p.add, stream);
    ops::rmsnorm_backward(dx, p.dx_sum, w.grad(t.norm), a.dn, a.n, x_norm, a.rstd, w(t.norm), m.acts.workspace, BT, d, stream);      // dx +=
    p.dx_sum = dx;
}

// =====================================================================================================================
// 6. The network

// acts.rope (T,hd/2,2) for T tokens from `position`, made anew only where it holds others
inline void prepare_rope(Model& m, int64_t position, int64_t T) {
    Activations& acts = m.acts;
    const Config& c = m.config();
    if (!c.rope || c.head_dim == 0 || (acts.rope_position == position && acts.rope_T >= T)) return;
    ops::rope_table(acts.rope, position, T, c.head_dim, c.rope_base, m.stream);
    acts.rope_position = position;
    acts.rope_T = T;
}

// acts.tokens (B,T) -> acts.n_f (B,T,d), what the head reads. With a state: continues it, and leaves it after the chunk.
inline void forward_layers(Pass p) {
    Model& m = p.m;
    SequenceState* state = p.state;
    const int64_t T = p.T;
    Activations& acts = m.acts;
    const Config& c = m.config();
    prepare_rope(m, state ? state->position : 0, T);
    if (m.before_layer) m.before_layer(-1);
    ops::embedding_forward(acts.x[0], acts.tokens, m.w(m.layout.network.embedding), p.BT(), c.d_model, m.stream);            // (B,T,d)
    for (size_t l = 0; l < m.layout.layers.size(); l++) {
        const Layer& layer = m.layout.layers[l];
        LayerState* s = p.layer_state(l);
        float *x = acts.x[l], *x_next = acts.x[l + 1];
        const ProfilerRange range("forward, " + layer_name(m.layout, l));
        if (m.before_layer) m.before_layer((int)l);
        if (p.fp8 && !p.add) quantise_weights(m, l);
        switch (layer.kind) {
        case Kind::mamba: mamba_forward(p, layer, acts.layers[l], x_next, x, s); break;
        case Kind::attention: attention_forward(p, layer, acts.layers[l], x_next, x, s); break;
        case Kind::mlp: mlp_forward(p, layer, acts.layers[l], x_next, x, layer.parallel ? acts.x[l - 1] : x); break;
        }
    }
    ops::rmsnorm_forward(acts.n_f, acts.rstd_f, acts.x.back(), m.w(m.layout.network.norm_f), p.BT(), c.d_model, c.norm_eps, m.stream);
    if (state && !state->held) state->position += T;
}
inline void forward_layers(Model& m, int B, int64_t T, SequenceState* state) { forward_layers(Pass{m, B, T, state}); }

// acts.losses (B,T) = cross entropy of each token, acts.greedy (B,T) = whether it is the likeliest; no gradients.
inline void evaluate(Model& m, int B, int64_t T, SequenceState* state) {
    Activations& acts = m.acts;
    const int d = m.config().d_model, V = m.config().vocab_size;
    const int64_t BT = B * T;
    forward_layers(m, B, T, state);
    for (int64_t row = 0; row < BT; row += acts.logit_rows) {
        const int64_t rows = std::min(acts.logit_rows, BT - row);
        ops::matmul_forward(m.matmul, acts.logits, V, acts.n_f + row * d, d, m.w(m.layout.network.head), rows, V, d, m.stream);   // (rows,V)
        ops::cross_entropy_forward(acts.losses + row, acts.greedy ? acts.greedy + row : nullptr, acts.logits, acts.targets + row, rows, V, m.stream);
    }
}

// The last layer and its loss in one go, a few rows at a time: logits live only until their gradient has been used.
// `weight` is this micro-batch's share of the step's mean loss. Leaves acts.dn_f (B,T,d).
inline void head_forward_backward(Model& m, int64_t BT, float weight, bool add) {
    Activations& acts = m.acts;
    const Matrix head = m.layout.network.head;
    const int d = m.config().d_model, V = m.config().vocab_size;
    for (int64_t row = 0; row < BT; row += acts.logit_rows) {
        const int64_t rows = std::min(acts.logit_rows, BT - row);
        const floatX* n = acts.n_f + row * d;
        ops::matmul_forward(m.matmul, acts.logits, V, n, d, m.w(head), rows, V, d, m.stream);                                // (rows,V)
        ops::cross_entropy_fused(acts.losses + row, acts.logits, acts.targets + row, weight / (float)BT, rows, V, m.stream); // -> dlogits
        ops::matmul_dgrad(m.matmul, acts.dn_f + row * d, d, acts.logits, V, m.w(head), rows, V, d, false, m.stream);         // (rows,d)
        ops::matmul_wgrad(m.matmul, m.w.grad(head), acts.logits, V, n, d, rows, V, d, add || row > 0, m.stream);                  // (V,d)
    }
}

// One micro-batch of B x T tokens (already in acts.tokens and acts.targets): acts.loss (+)= weight * mean loss, gradients +=.
// `first` of a step: gradients and loss start from zero. Those of matrices do by being written instead of added to, but for an
// embedding of its own, whose rows are only added to. With a state (held): the tokens continue its sequences, to which they are
// constants: backpropagation through time ends where the micro-batch begins. Afterwards it is the state behind them.
inline void forward_backward_from(SequenceState* state, Model& m, int B, int64_t T, float weight, bool first) {
    if (state && !state->held) fail("a state for training must be created held");
    Pass p{m, B, T, state, !first, !m.w.fp8.empty()};
    Activations& acts = m.acts;
    const NetworkTensors& t = m.layout.network;
    const int64_t BT = p.BT(), V = m.config().vocab_size;
    const int d = m.config().d_model;
    if (first) device_zero(m.w.grads + m.w.n_matrix, (m.w.n - m.w.n_matrix) * sizeof(float), m.stream);
    if (first && !m.config().tied) device_zero(m.w.grad(t.embedding), V * d * sizeof(float), m.stream);

    forward_layers(p);
    head_forward_backward(m, BT, weight, p.add);
    ops::mean_losses(acts.loss, acts.losses, BT, !first, weight, m.stream);
    ops::rmsnorm_backward(acts.dx, {}, m.w.grad(t.norm_f), acts.dn_f, acts.n_f, acts.x.back(), acts.rstd_f, m.w(t.norm_f), acts.workspace, BT, d,
                          m.stream);                                                                                         // dx =
    p.dx_sum = acts.dx;
    for (size_t l = m.layout.layers.size(); l-- > 0;) {
        const Layer& layer = m.layout.layers[l];
        const ProfilerRange range("backward, " + layer_name(m.layout, l));
        switch (layer.kind) {
        case Kind::mamba: mamba_backward(p, layer, acts.layers[l], acts.x[l], p.layer_state(l)); break;
        case Kind::attention: attention_backward(p, layer, acts.layers[l], acts.x[l], p.layer_state(l)); break;
        case Kind::mlp: mlp_backward(p, layer, acts.layers[l], layer.parallel ? acts.x[l - 1] : acts.x[l]); break;
        }
        if (m.after_layer) m.after_layer((int)l);
    }
    ops::embedding_backward(m.w.grad(t.embedding), acts.dx, acts.tokens, acts.workspace, BT, m.config().vocab_size, d, m.stream);
    if (m.after_layer) m.after_layer(-1);
    if (state) state->position += T;
}
// Sequences that begin here
inline void forward_backward(Model& m, int B, int64_t T, float weight, bool first) { forward_backward_from(nullptr, m, B, T, weight, first); }

// Logits of `rows` tokens, the first of them token `row` of the last forward, each `stride` tokens after the one before;
// as float on the host, (rows,V).
inline void read_logits(Model& m, float* out, int64_t row, int64_t rows, int64_t stride = 1) {
    Activations& acts = m.acts;
    const int d = m.config().d_model, V = m.config().vocab_size;
    std::vector<floatX> host(std::min(rows, acts.logit_rows) * V);
    for (int64_t done = 0; done < rows; done += acts.logit_rows) {
        const int64_t count = std::min(acts.logit_rows, rows - done);
        const floatX* n_f = acts.n_f + (row + done * stride) * d;
        ops::matmul_forward(m.matmul, acts.logits, V, n_f, stride * d, m.w(m.layout.network.head), count, V, d, m.stream);
        copy_to_host(host.data(), acts.logits, count * V * sizeof(floatX), m.stream);
        stream_sync(m.stream);
        for (int64_t i = 0; i < count * V; i++) out[done * V + i] = (float)host[i];
    }
}

// The same, replayed as one graph; the first call with these arguments captures it. Every operation must have run once before
// (rehearse() below): what a first call sets up cannot be captured. The hooks of other processes are no part of it.
inline void forward_backward_graph(Model& m, int B, int64_t T, float weight, bool first) {
    auto found = std::find_if(m.graphs.begin(), m.graphs.end(), [&](const MicroBatchGraph& g) {
        return g.B == B && g.T == T && g.weight == weight && g.first == first;
    });
    prepare_rope(m, 0, T);                 // before the graph, not in it: a validation in between leaves another table
    if (found == m.graphs.end()) {
        const auto before = std::exchange(m.before_layer, nullptr), after = std::exchange(m.after_layer, nullptr);
        m.graphs.push_back({B, T, weight, first, graph_capture(m.stream, [&m, B, T, weight, first] { forward_backward(m, B, T, weight, first); })});
        m.before_layer = before;
        m.after_layer = after;
        found = std::prev(m.graphs.end());
    }
    graph_launch(found->graph, m.stream);
}

// Tokens from the host, in order with the passes around it. The copy may be under way when this returns, beside the pass that
// still computes; it is over when the next call returns. That is as long as DataLoader keeps a batch.
// A chunk of longer sequences: T tokens from each of B rows that are `stride` tokens apart.
inline void upload_chunk(Model& m, const int* tokens, const int* targets, int64_t B, int64_t T, int64_t stride) {
    const int64_t BT = B * T, rows = stride == T ? 1 : B, n = BT / rows;
    event_sync(m.uploaded);
    stream_wait(m.copies, m.taken);
    for (int64_t b = 0; b < rows; b++) {
        copy_to_device(m.acts.staged + b * n, tokens + b * stride, n * sizeof(int), m.copies);
        if (targets) copy_to_device(m.acts.staged + BT + b * n, targets + b * stride, n * sizeof(int), m.copies);
    }
    event_record(m.uploaded, m.copies);
    stream_wait(m.stream, m.uploaded);
    copy_on_device(m.acts.tokens, m.acts.staged, BT * sizeof(int), m.stream);
    if (targets) copy_on_device(m.acts.targets, m.acts.staged + BT, BT * sizeof(int), m.stream);
    event_record(m.taken, m.stream);
}
inline void upload_tokens(Model& m, const int* tokens, const int* targets, int64_t BT) { upload_chunk(m, tokens, targets, 1, BT, BT); }

// One step's passes on tokens that mean nothing, before the first: loads every kernel, and where asked for times the candidates of matrix
// products that have no choice yet. Leaves gradients and activations to be overwritten; nothing else changes. progress: called at each layer
inline void rehearse(Model& m, int B, int64_t T, bool several_micro_batches, bool time_products, const std::function<void()>& progress = {}) {
    std::vector<int> tokens(B * T);
    for (size_t i = 0; i < tokens.size(); i++) tokens[i] = (int)(counter_uniform(1, i) * m.config().vocab_size);
    const auto before = std::exchange(m.before_layer, nullptr), after = std::exchange(m.after_layer, nullptr);
    if (progress) m.before_layer = [&](int) { progress(); };
    m.matmul.rehearsal = time_products;
    upload_tokens(m, tokens.data(), tokens.data(), B * T);
    for (int pass = 0; pass < 1 + several_micro_batches; pass++) forward_backward(m, B, T, 1.0f, pass == 0);
    stream_sync(m.stream);
    m.matmul.rehearsal = false;
    m.before_layer = before;
    m.after_layer = after;
}
// =====================================================================================================================
// 7. The update

// AdamW on the parameters that this process owns, with the gradients that it has of them. acts.norm = {norm, factor}; the
// factor 0 leaves everything unchanged. decay_all: weight decay on vectors too, as the reference does.
inline void adamw(Model& m, const AdamW& options, bool decay_all) {
    Parameters& w = m.w;
    const Range matrices = w.own & Range{0, w.n_matrix}, vectors = w.own & Range{w.n_matrix, w.n};
    AdamW vector_options = options;
    if (!decay_all) vector_options.weight_decay = 0;
    const auto update = [&](auto* working, Range r, const AdamW& how) {
        float *master = w.at(w.master, r.begin), *m1 = w.at(w.m, r.begin), *m2 = w.at(w.v, r.begin);
        ops::adamw_update(working, master, m1, m2, w.grads + r.begin, m.acts.norm, r.size(), how, m.stream);
    };
    if (matrices.size()) update(w.matrices + matrices.begin, matrices, options);
    if (vectors.size()) update(w.vectors + (vectors.begin - w.n_matrix), vectors, vector_options);
}

// Clips the accumulated gradients to `clip` (<= 0: no clipping) and makes one AdamW step. A norm that is not finite leaves
// everything unchanged.
inline void update(Model& m, const AdamW& options, float clip, bool decay_all) {
    ops::global_norm(m.acts.norm, m.w.grads, m.w.n, clip, m.acts.workspace, m.stream);
    adamw(m, options, decay_all);
}

// A tensor's values from the host into the working copy, and into the master copy where there is one.
inline void upload_tensor(Model& m, const Tensor& t, const float* values) {
    const int64_t flat = m.layout.flat(t);
    const Range own = m.w.own & Range{flat, flat + t.size};
    if (m.w.master && own.size())
        copy_to_device(m.w.at(m.w.master, own.begin), values + (own.begin - flat), (size_t)own.size() * sizeof(float), m.stream);
    if (t.is_matrix) {
        std::vector<floatX> rounded(t.size);
#pragma omp parallel for
        for (int64_t i = 0; i < t.size; i++) rounded[i] = (floatX)values[i];
        copy_to_device(m.w.matrices + t.at, rounded.data(), t.size * sizeof(floatX), m.stream);
        stream_sync(m.stream);
    } else {
        copy_to_device(m.w.vectors + t.at, values, t.size * sizeof(float), m.stream);
        stream_sync(m.stream);
    }
}

// Fresh parameters. Alignment gaps and moments are zero.
// progress: called after each tensor
inline void initialise(Model& m, uint64_t seed, const std::function<void()>& progress = {}) {
    device_zero(m.w.matrices, m.w.n_matrix * sizeof(floatX), m.stream);
    if (m.w.grads) device_zero(m.w.grads, m.w.n * sizeof(float), m.stream);
    for (float* p : {m.w.master, m.w.m, m.w.v})
        if (p) device_zero(p, m.w.own.size() * sizeof(float), m.stream);
    for (const Tensor& t : m.layout.tensors) {
        std::vector<float> values(t.size);
        const uint64_t key = stream_key(seed, t.name);
#pragma omp parallel for
        for (int64_t i = 0; i < t.size; i++) values[i] = initial_value(t, key, i);
        upload_tensor(m, t, values.data());
        if (progress) progress();
    }
}

// Where numbers stopped being finite in the last micro-batch of B x T tokens: the first layer in forward, or else the first
// gradient in backward; "" where all is finite. For the line that ends a run: slow, through the host.
inline std::string first_not_finite(const Model& m, int B, int64_t T) {
    std::vector<float> host;
    const auto finite = [&](const float* p, int64_t n) {
        host.resize((size_t)n);
        copy_to_host(host.data(), p, (size_t)n * sizeof(float), m.stream);
        stream_sync(m.stream);
        return std::all_of(host.begin(), host.end(), [](float x) { return std::isfinite(x); });
    };
    const auto& layers = m.layout.layers;
    for (size_t l = 0; l <= layers.size(); l++) {
        if (finite(m.acts.x[l], B * T * m.config().d_model)) continue;
        if (l == 0) return "the output of the embedding";
        return "the output of layer " + std::to_string(l - 1) + ", the " + layer_name(m.layout, l - 1);
    }
    if (!finite(m.acts.losses, B * T)) return "the output of the head";
    for (size_t i = m.layout.tensors.size(); i-- > 0;)
        if (const Tensor& t = m.layout.tensors[i]; !finite(m.w.grads + m.layout.flat(t), t.size)) return "the gradient of " + t.name;
    return "";
}

// =====================================================================================================================
// 8. What a model costs

// Matrix products count 2 flops a multiply-add, three times for forward and both backward products; attention only the
// pairs inside the window. The scan, norms and other elementwise work are left out. Sources: spec.md 7.1.
inline double flops_per_token(const Layout& layout, int64_t T) {
    const Config& c = layout.config;
    double matrices = 0, pairs = 0;
    for (const Tensor& t : layout.tensors)
        if (t.is_matrix && t.name != "transformer.wte.weight") matrices += (double)t.size;
    for (const Layer& layer : layout.layers) {
        if (layer.kind != Kind::attention) continue;
        const double w = layer.window > 0 ? (double)std::min(layer.window, T) : (double)T;
        pairs += (w * (w + 1) / 2 + ((double)T - w) * w) / (double)T;                                                        // mean keys a query
    }
    return 6 * matrices + 12 * pairs * c.q_dim();
}
