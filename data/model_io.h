// Which tensors a checkpoint holds: the model's parameters under the official names, and the optimizer's moments.
//
//   model.safetensors       every tensor of the layout, F32, official microsoft/Samba name and shape; the configuration as
//                           JSON under "config" in the metadata. With tied embeddings the one matrix is lm_head.weight.
//   optimizer.safetensors   exp_avg.NAME and exp_avg_sq.NAME for each of them, F32
//   optimizer.00002-of-00004.safetensors    instead, where processes share the optimizer's state: the third one's part. Of a
//                           tensor that lies in several parts each has a piece, as a list; where it begins is in the metadata
//
// The master copy is saved, so a resumed run continues bit for bit: working copies are its rounding.
#pragma once
#include <string>
#include <vector>

#include "../samba.cuh"
#include "safetensors.h"

using Progress = std::function<void(int64_t bytes)>;      // bytes of this file written so far

inline TensorToWrite device_tensor(const Model& m, const std::string& name, std::vector<int64_t> shape, const float* device) {
    const Stream stream = m.stream;
    return {name, "F32", std::move(shape), [device, stream](void* dst, int64_t offset, int64_t bytes) {
                copy_to_host(dst, (const char*)device + offset, (size_t)bytes, stream);
                stream_sync(stream);
            }};
}

// Brings a tensor of which this process holds a part to host memory
using Collect = std::function<void(float* host, const Tensor& t)>;

// Writes the master copy. Errors name the path (disk full, permissions) and leave no partial file. Where processes share it,
// `collect` is called once for each tensor of the layout, in order.
inline void save_parameters(const Model& m, const std::string& path, const Progress& progress = {}, const Collect& collect = {}) {
    std::vector<TensorToWrite> tensors;
    std::vector<float> whole;              // the tensor being written
    for (const Tensor& t : m.layout.tensors) {
        if (!collect) {
            tensors.push_back(device_tensor(m, t.name, t.shape, m.w.master + m.layout.flat(t)));
            continue;
        }
        tensors.push_back({t.name, "F32", t.shape, [&, tensor = &t](void* dst, int64_t offset, int64_t bytes) {
                               if (offset == 0) {
                                   whole.resize((size_t)tensor->size);
                                   collect(whole.data(), *tensor);
                               }
                               memcpy(dst, (const char*)whole.data() + offset, (size_t)bytes);
                           }});
    }
    write_safetensors(path, tensors, {{"config", config_to_json(m.config()).dump()}, {"format", "pt"}}, progress);
}

inline std::string moments_file(bool shared, int rank, int world) {
    if (!shared) return "optimizer.safetensors";
    char name[64];
    snprintf(name, sizeof name, "optimizer.%05d-of-%05d.safetensors", rank, world);
    return name;
}

// The moments that this process has: all, or the pieces in its own range
inline void save_moments(const Model& m, const std::string& path, const Progress& progress = {}) {
    std::vector<TensorToWrite> tensors;
    nlohmann::json begins = nlohmann::json::object();
    const bool all = m.w.own.size() == m.w.n;
    for (const Tensor& t : m.layout.tensors) {
        const int64_t flat = m.layout.flat(t);
        const Range piece = m.w.own & Range{flat, flat + t.size};
        if (piece.size() == 0) continue;
        if (!all) begins[t.name] = piece.begin - flat;
        const std::vector<int64_t> shape = all ? t.shape : std::vector<int64_t>{piece.size()};
        tensors.push_back(device_tensor(m, "exp_avg." + t.name, shape, m.w.at(m.w.m, piece.begin)));
        tensors.push_back(device_tensor(m, "exp_avg_sq." + t.name, shape, m.w.at(m.w.v, piece.begin)));
    }
    std::map<std::string, std::string> metadata;
    if (!all) metadata["begin"] = begins.dump();
    write_safetensors(path, tensors, metadata, progress);
}

inline std::string shape_text(const std::vector<int64_t>& shape) {
    std::string text = "[";
    for (size_t i = 0; i < shape.size(); i++) text += (i ? "," : "") + std::to_string(shape[i]);
    return text + "]";
}

// `name` of the file as floats, after checking that it has the tensor's shape.
inline std::vector<float> read_checked(const SafetensorsReader& file, const std::string& path, const std::string& name, const Tensor& t) {
    if (!file.has(name)) fail("%s: tensor %s is missing; this is a checkpoint of another model", path.c_str(), name.c_str());
    if (file.info(name).shape != t.shape)
        fail("%s: tensor %s has shape %s and the model needs %s; this is a checkpoint of another model", path.c_str(), name.c_str(),
             shape_text(file.info(name).shape).c_str(), shape_text(t.shape).c_str());
    std::vector<float> values(t.size);
    file.read_f32(name, values.data(), t.size);
    return values;
}

// Parameters from a safetensors file, in any dtype that it may have. `prefix` stands before every name in the file.
inline void load_parameters(Model& m, const std::string& path, const std::string& prefix = "") {
    const SafetensorsReader file(path);
    for (const Tensor& t : m.layout.tensors) {
        std::string name = prefix + t.name;
        if (t.name == "lm_head.weight" && m.config().tied && !file.has(name)) name = prefix + "transformer.wte.weight";
        upload_tensor(m, t, read_checked(file, path, name, t).data());
    }
}

inline void upload_moment(Model& m, float* moment, Range piece /*of the flat order*/, const float* values) {
    const Range own = m.w.own & piece;
    if (own.size() == 0) return;
    copy_to_device(m.w.at(moment, own.begin), values + (own.begin - piece.begin), (size_t)own.size() * sizeof(float), m.stream);
    stream_sync(m.stream);
}

inline void load_moments(Model& m, const std::string& path) {
    const SafetensorsReader file(path);
    for (const Tensor& t : m.layout.tensors)
        for (auto [prefix, moment] : {std::pair{"exp_avg.", m.w.m}, std::pair{"exp_avg_sq.", m.w.v}})
            upload_moment(m, moment, {m.layout.flat(t), m.layout.flat(t) + t.size}, read_checked(file, path, prefix + t.name, t).data());
}

// The same from files that share them, of any number of processes: every element must be in one.
inline void load_moment_pieces(Model& m, const std::vector<std::string>& paths) {
    std::map<std::string, int64_t> found;
    for (const std::string& path : paths) {
        const SafetensorsReader file(path);
        const nlohmann::json begins = nlohmann::json::parse(file.metadata().value("begin", "{}"), nullptr, false);
        if (!begins.is_object()) fail("%s: the \"begin\" in its metadata is damaged", path.c_str());
        for (const Tensor& t : m.layout.tensors) {
            if (!begins.contains(t.name)) continue;
            const int64_t begin = begins[t.name].is_number_integer() ? begins[t.name].get<int64_t>() : -1;
            for (auto [prefix, moment] : {std::pair{"exp_avg.", m.w.m}, std::pair{"exp_avg_sq.", m.w.v}}) {
                const int64_t count = file.info(prefix + t.name).elements(), flat = m.layout.flat(t) + begin;
                if (begin < 0 || begin + count > t.size)
                    fail("%s: %s%s does not fit the model; this is a checkpoint of another model", path.c_str(), prefix, t.name.c_str());
                found[prefix + t.name] += count;
                if ((m.w.own & Range{flat, flat + count}).size() == 0) continue;
                std::vector<float> values((size_t)count);
                file.read_f32(prefix + t.name, values.data(), count);
                upload_moment(m, moment, {flat, flat + count}, values.data());
            }
        }
    }
    for (const Tensor& t : m.layout.tensors)
        for (const char* prefix : {"exp_avg.", "exp_avg_sq."})
            if (found[prefix + t.name] != t.size)
                fail("%s and its sisters have %lld of %lld elements of %s%s; this is a checkpoint of another model, or a part is missing",
                     paths[0].c_str(), (long long)found[prefix + t.name], (long long)t.size, prefix, t.name.c_str());
}

// Whichever of the two a checkpoint directory holds
inline void load_checkpoint_moments(Model& m, const std::string& directory) {
    std::vector<std::string> pieces;
    for (const auto& entry : std::filesystem::directory_iterator(directory))
        if (const std::string name = entry.path().filename().string();
            name.rfind("optimizer.", 0) == 0 && name.find("-of-") != std::string::npos)
            pieces.push_back(entry.path().string());
    std::sort(pieces.begin(), pieces.end());
    pieces.empty() ? load_moments(m, directory + "/optimizer.safetensors") : load_moment_pieces(m, pieces);
}

// The configuration that a checkpoint's model file carries.
inline Config read_config(const std::string& path) {
    const SafetensorsReader file(path);
    const nlohmann::json& meta = file.metadata();
    if (!meta.contains("config")) fail("%s: no \"config\" in its metadata; it was not written by train_samba", path.c_str());
    nlohmann::json config;
    try {
        config = nlohmann::json::parse(meta["config"].get<std::string>());
    } catch (const nlohmann::json::exception& e) {
        fail("%s: the \"config\" in its metadata is not JSON: %s", path.c_str(), e.what());
    }
    return config_from_json(config, path);
}
