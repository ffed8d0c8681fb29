// A sequence state in a file, so that a text that was read once can be continued later, by another process or build.
//
//   halo.L  (B,3,e)           layer L's last inputs of the conv           h.L  (B,e,N)  its SSM state, F32
//   ring.L  (B,count,2,G,hd)  keys and values of the last `count` positions, the oldest first: all that the window still sees
//
// The others are in the writer's working precision (BF16 or F32); a build of the other one converts. The metadata hold the
// configuration, the position and a fingerprint of the weights: a state means nothing to another model.
#pragma once
#include <string>
#include <vector>

#include "../samba.cuh"
#include "safetensors.h"

constexpr const char* STATE_FORMAT = "samba sequence state 1";
constexpr const char* FLOATX_DTYPE = sizeof(floatX) == 2 ? "BF16" : "F32";

template <class T> std::vector<T> to_host(const Model& m, const T* device, int64_t count) {
    std::vector<T> out((size_t)count);
    copy_to_host(out.data(), device, out.size() * sizeof(T), m.stream);
    stream_sync(m.stream);
    return out;
}

// Of all vectors (gains, biases, recurrence), which are float in every build and change in every step of training
inline uint64_t weights_fingerprint(const Model& m) {
    const std::vector<float> vectors = to_host(m, m.w.vectors, m.w.n - m.w.n_matrix);
    uint64_t h = fnv1a64("", 0);
    for (const Tensor& t : m.layout.tensors)
        if (!t.is_matrix) h = fnv1a64(&vectors[(size_t)t.at], (size_t)t.size * sizeof(float), h);
    return h;
}

template <class T> TensorToWrite host_tensor(const std::string& name, const char* dtype, std::vector<int64_t> shape, std::vector<T> values) {
    return {name, dtype, std::move(shape),
            [values = std::move(values)](void* dst, int64_t offset, int64_t bytes) {
                memcpy(dst, (const char*)values.data() + offset, (size_t)bytes);
            }};
}

// The ring's rows of positions [position - count, position) of each sequence, between the ring's order and the file's.
// copy(row of the ring, row of the file)
template <class Copy> void for_ring_rows(int64_t B, int64_t capacity, int64_t position, int64_t count, Copy copy) {
    for (int64_t b = 0; b < B; b++)
        for (int64_t i = 0; i < count; i++) copy(b * capacity + (position - count + i) % capacity, b * count + i);
}

inline void save_state(const Model& m, const SequenceState& state, const std::string& path) {
    const Config& c = m.config();
    const int64_t B = state.B, e = c.d_inner(), N = c.d_state, row = (int64_t)2 * c.n_kv_head * c.head_dim;
    std::vector<TensorToWrite> tensors;
    for (size_t l = 0; l < state.layers.size(); l++) {
        const LayerState& s = state.layers[l];
        const std::string number = std::to_string(l);
        if (s.halo) tensors.push_back(host_tensor("halo." + number, FLOATX_DTYPE, {B, 3, e}, to_host(m, s.halo, B * 3 * e)));
        if (s.h) tensors.push_back(host_tensor("h." + number, "F32", {B, e, N}, to_host(m, s.h, B * e * N)));
        if (!s.ring) continue;
        const int64_t count = std::min(state.position, s.capacity);
        const std::vector<floatX> ring = to_host(m, s.ring, B * s.capacity * row);
        std::vector<floatX> rows((size_t)(B * count * row));
        for_ring_rows(B, s.capacity, state.position, count,
                      [&](int64_t from, int64_t to) { std::copy_n(&ring[(size_t)(from * row)], row, &rows[(size_t)(to * row)]); });
        tensors.push_back(host_tensor("ring." + number, FLOATX_DTYPE, {B, count, 2, c.n_kv_head, c.head_dim}, std::move(rows)));
    }
    write_safetensors(path, std::move(tensors), {{"format", STATE_FORMAT}, {"config", config_to_json(c).dump()},
                                                 {"position", std::to_string(state.position)}, {"sequences", std::to_string(B)},
                                                 {"weights", std::to_string(weights_fingerprint(m))}});
}

// Refuses a file of another configuration and names the item. How a model was named, initialised and trained is not its form.
inline void check_state_config(const std::string& path, const nlohmann::json& theirs, const nlohmann::json& ours) {
    for (const auto& [item, value] : ours.items()) {
        if (item == "name" || item == "block_size" || item == "mamba_init") continue;
        const nlohmann::json there = theirs.is_object() && theirs.contains(item) ? theirs[item] : nlohmann::json();
        if (there != value)
            fail("%s is the state of another configuration: %s is %s there and %s in this model; use the checkpoint that wrote it", path.c_str(),
                 item.c_str(), printable(there.dump()).c_str(), printable(value.dump()).c_str());
    }
}

// A whole number from the metadata, at least `least`
inline int64_t state_number(const SafetensorsReader& file, const char* key, int64_t least) {
    const std::string text = file.metadata().value(key, "");
    char* end = nullptr;
    errno = 0;
    const long long value = std::strtoll(text.c_str(), &end, 10);
    if (text.empty() || *end || errno || value < least)
        fail("%s: its metadata say %s \"%s\"; the file is damaged", file.path().c_str(), key, printable(text).c_str());
    return value;
}

inline std::vector<float> read_state_tensor(const SafetensorsReader& file, const std::string& name, const std::vector<int64_t>& shape) {
    if (file.info(name).shape != shape)
        fail("%s: the shape of %s is not what its metadata need; the file is damaged", file.path().c_str(), name.c_str());
    std::vector<float> values((size_t)file.info(name).elements());
    file.read_f32(name, values.data(), (int64_t)values.size());
    return values;
}

template <class T> void upload_state(const Model& m, T* device, const std::vector<float>& values) {
    const std::vector<T> converted(values.begin(), values.end());
    copy_to_device(device, converted.data(), converted.size() * sizeof(T), m.stream);
    stream_sync(m.stream);
}

// The file's tensors into a state that is empty
inline void read_state(const Model& m, SequenceState& state, const SafetensorsReader& file) {
    const Config& c = m.config();
    const int64_t B = state.B, e = c.d_inner(), N = c.d_state, row = (int64_t)2 * c.n_kv_head * c.head_dim;
    const int64_t position = state_number(file, "position", 0);
    for (size_t l = 0; l < state.layers.size(); l++) {
        const LayerState& s = state.layers[l];
        const Layer& layer = m.layout.layers[l];
        const std::string number = std::to_string(l);
        if (s.halo) upload_state(m, s.halo, read_state_tensor(file, "halo." + number, {B, 3, e}));
        if (s.h) upload_state(m, s.h, read_state_tensor(file, "h." + number, {B, e, N}));
        const int64_t count = layer.window > 0 ? std::min(position, layer.window - 1) : position;
        if (layer.kind != Kind::attention || count == 0) continue;
        if (count > s.capacity)
            fail("%s holds %lld positions and there is room for %lld; make room for more tokens", file.path().c_str(), (long long)count,
                 (long long)s.capacity);
        const std::vector<float> rows = read_state_tensor(file, "ring." + number, {B, count, 2, c.n_kv_head, c.head_dim});
        std::vector<float> ring((size_t)(B * s.capacity * row));
        for_ring_rows(B, s.capacity, position, count,
                      [&](int64_t to, int64_t from) { std::copy_n(&rows[(size_t)(from * row)], row, &ring[(size_t)(to * row)]); });
        upload_state(m, s.ring, ring);
    }
    state.position = position;
}

// Into a state that was created for this model. Its rings may have another capacity than the writer's. After an error it is empty.
inline void load_state(const Model& m, SequenceState& state, const std::string& path) {
    const SafetensorsReader file(path);
    if (file.metadata().value("format", "") != STATE_FORMAT) fail("%s is not a sequence state that this program wrote", path.c_str());
    check_state_config(path, nlohmann::json::parse(file.metadata().value("config", ""), nullptr, false), config_to_json(m.config()));
    if (file.metadata().value("weights", "") != std::to_string(weights_fingerprint(m)))
        fail("%s was written with other weights than this model's; use the checkpoint that wrote it", path.c_str());
    const int64_t sequences = state_number(file, "sequences", 1);
    if (sequences != state.B) fail("%s holds %lld sequences and %lld are wanted", path.c_str(), (long long)sequences, (long long)state.B);
    state.reset(m.layout, m.stream);
    try {
        read_state(m, state, file);
    } catch (...) {
        state.reset(m.layout, m.stream);
        throw;
    }
}
