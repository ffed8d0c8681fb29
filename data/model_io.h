// Which tensors a checkpoint holds: the model's parameters under the official names, and the optimizer's moments.
//
//   model.safetensors       every tensor of the layout, F32, official microsoft/Samba name and shape; the configuration as
//                           JSON under "config" in the metadata. With tied embeddings the one matrix is lm_head.weight.
//   optimizer.safetensors   exp_avg.NAME and exp_avg_sq.NAME for each of them, F32
//
// The master copy is saved, so a resumed run continues bit for bit: working copies are its rounding.
#pragma once
#include <string>
#include <vector>

#include "../samba.cuh"
#include "safetensors.h"

using Progress = std::function<void(int64_t bytes)>;      // bytes of this file written so far

inline TensorToWrite device_tensor(const Model& m, const std::string& name, const Tensor& t, const float* device) {
    const Stream stream = m.stream;
    return {name, "F32", t.shape, [device, stream](void* dst, int64_t offset, int64_t bytes) {
                copy_to_host(dst, (const char*)device + offset, (size_t)bytes, stream);
                stream_sync(stream);
            }};
}

// Writes the master copy. Errors name the path (disk full, permissions) and leave no partial file.
inline void save_parameters(const Model& m, const std::string& path, const Progress& progress = {}) {
    std::vector<TensorToWrite> tensors;
    for (const Tensor& t : m.layout.tensors) tensors.push_back(device_tensor(m, t.name, t, m.w.master + m.layout.flat(t)));
    write_safetensors(path, tensors, {{"config", config_to_json(m.config()).dump()}, {"format", "pt"}}, progress);
}

inline void save_moments(const Model& m, const std::string& path, const Progress& progress = {}) {
    std::vector<TensorToWrite> tensors;
    for (const Tensor& t : m.layout.tensors) {
        const int64_t at = m.layout.flat(t);
        tensors.push_back(device_tensor(m, "exp_avg." + t.name, t, m.w.m + at));
        tensors.push_back(device_tensor(m, "exp_avg_sq." + t.name, t, m.w.v + at));
    }
    write_safetensors(path, tensors, {}, progress);
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

inline void load_moments(Model& m, const std::string& path) {
    const SafetensorsReader file(path);
    for (const Tensor& t : m.layout.tensors)
        for (auto [prefix, moment] : {std::pair{"exp_avg.", m.w.m}, std::pair{"exp_avg_sq.", m.w.v}}) {
            const std::vector<float> values = read_checked(file, path, prefix + t.name, t);
            copy_to_device(moment + m.layout.flat(t), values.data(), t.size * sizeof(float), m.stream);
            stream_sync(m.stream);
        }
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
