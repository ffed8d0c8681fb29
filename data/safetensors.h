// The safetensors format: u64 header length, a JSON header, then the tensors' bytes.
//
//   {"__metadata__": {"key": "text", ...}, "NAME": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ...}
//
// Offsets count from the end of the header; the tensors fill the rest of the file without gaps or overlaps. The reader
// checks all of it before it hands out a byte. The writer streams, so that a checkpoint needs no second copy in memory.
#pragma once
#include <bit>
#include <functional>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "files.h"

// Bytes of an element, 0 for a name that is not a safetensors dtype
inline int64_t dtype_bytes(const std::string& dtype) {
    static const std::map<std::string, int64_t> sizes = {
        {"F64", 8}, {"I64", 8}, {"U64", 8}, {"F32", 4}, {"I32", 4}, {"U32", 4}, {"F16", 2}, {"BF16", 2}, {"I16", 2}, {"U16", 2},
        {"I8", 1}, {"U8", 1}, {"BOOL", 1}, {"F8_E4M3", 1}, {"F8_E5M2", 1}};
    const auto found = sizes.find(dtype);
    return found == sizes.end() ? 0 : found->second;
}

// shape's element count times the dtype's size; -1 where that overflows
inline int64_t tensor_bytes(const std::string& dtype, const std::vector<int64_t>& shape) {
    int64_t bytes = dtype_bytes(dtype);
    for (int64_t n : shape) if (n == 0) return 0;
    for (int64_t n : shape) if (n < 0 || __builtin_mul_overflow(bytes, n, &bytes)) return -1;
    return bytes;
}

inline float half_to_float(uint16_t bits) {
    const uint32_t sign = (uint32_t)(bits >> 15) << 31, exponent = bits >> 10 & 31, mantissa = bits & 1023;
    if (exponent == 0) return (sign ? -1.f : 1.f) * (float)mantissa * 0x1p-24f;              // zero and subnormals
    if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | mantissa << 13);
    return std::bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
}

struct TensorInfo {
    std::string dtype;
    std::vector<int64_t> shape;
    int64_t nbytes = 0;
    int64_t offset = 0;          // from the end of the header

    int64_t elements() const { return nbytes / dtype_bytes(dtype); }
};

class SafetensorsReader {
public:
    explicit SafetensorsReader(const std::string& path) : path_(path), file_(path) {
        if (file_.size < 8) fail("%s is not a safetensors file: %zu bytes, the header alone needs more", path.c_str(), file_.size);
        uint64_t length;
        memcpy(&length, file_.data, 8);
        if (length > file_.size - 8)
            fail("%s is cut off or not a safetensors file: a header of %llu bytes in a file of %zu", path.c_str(), (unsigned long long)length,
                 file_.size);
        data_ = file_.data + 8 + length;
        parse_header((const char*)file_.data + 8, length);
        check_layout((int64_t)(file_.size - 8 - length));
    }

    const std::string& path() const { return path_; }
    const nlohmann::json& metadata() const { return metadata_; }        // an object of strings, empty where the file has none
    bool has(const std::string& name) const { return tensors_.count(name) > 0; }
    std::vector<std::string> names() const {                            // sorted
        std::vector<std::string> out;
        for (const auto& [name, info] : tensors_) out.push_back(name);
        return out;
    }
    const TensorInfo& info(const std::string& name) const {
        const auto found = tensors_.find(name);
        if (found == tensors_.end())
            fail("%s has no tensor '%s'; it is not a file of this kind or of this model", path_.c_str(), printable(name).c_str());
        return found->second;
    }
    // The tensor's bytes as they lie in the file: not necessarily aligned. Valid as long as the reader.
    const uint8_t* data(const std::string& name) const { return data_ + info(name).offset; }

    // All elements as float. `count` is what the caller expects; any real or integer dtype is converted.
    void read_f32(const std::string& name, float* out, int64_t count) const {
        if (info(name).elements() != count)
            fail("%s: tensor '%s' has %lld elements, %lld were expected; the file is of another model size", path_.c_str(), printable(name).c_str(),
                 (long long)info(name).elements(), (long long)count);
        convert(name, out);
    }
    std::vector<double> read_f64(const std::string& name) const {
        std::vector<double> out((size_t)info(name).elements());
        convert(name, out.data());
        return out;
    }

private:
    void parse_header(const char* text, size_t length) {
        using nlohmann::json;
        std::set<std::string> keys;                        // the parser itself would silently keep the last of equal names
        std::string repeated;
        json header;
        try {
            header = json::parse(text, text + length, [&](int depth, json::parse_event_t event, json& value) {
                const bool is_name = depth == 1 && event == json::parse_event_t::key;
                if (is_name && !keys.insert(value.get<std::string>()).second) repeated = value.get<std::string>();
                return true;
            });
        } catch (const json::exception& error) {
            fail("%s: the safetensors header is not JSON: %s", path_.c_str(), printable(error.what()).c_str());
        }
        if (!header.is_object()) fail("%s: the safetensors header is not a JSON object", path_.c_str());
        if (!repeated.empty()) fail("%s: the safetensors header names '%s' twice", path_.c_str(), printable(repeated).c_str());
        metadata_ = json::object();
        for (const auto& [name, value] : header.items()) {
            if (name != "__metadata__") tensors_[name] = parse_tensor(name, value);
            else if (value.is_object()) metadata_ = value;
            else if (!value.is_null()) fail("%s: the safetensors metadata is not a JSON object", path_.c_str());
        }
        for (const auto& [key, value] : metadata_.items())
            if (!value.is_string()) fail("%s: metadata '%s' is not a string", path_.c_str(), printable(key).c_str());
    }

    static bool is_size(const nlohmann::json& value) { return value.is_number_unsigned() && value.get<uint64_t>() <= (uint64_t)INT64_MAX; }
    static bool is_sizes(const nlohmann::json& value) {
        if (!value.is_array()) return false;
        for (const auto& n : value) if (!is_size(n)) return false;
        return true;
    }
    TensorInfo parse_tensor(const std::string& name, const nlohmann::json& value) const {
        const std::string shown = printable(name);
        if (!value.is_object() || !value.contains("dtype") || !value.contains("shape") || !value.contains("data_offsets"))
            fail("%s: tensor '%s' lacks dtype, shape or data_offsets", path_.c_str(), shown.c_str());
        if (!value["dtype"].is_string() || dtype_bytes(value["dtype"].get<std::string>()) == 0)
            fail("%s: tensor '%s' has an unknown dtype", path_.c_str(), shown.c_str());
        if (!is_sizes(value["shape"])) fail("%s: tensor '%s' has a shape that is not a list of sizes", path_.c_str(), shown.c_str());
        const auto& offsets = value["data_offsets"];
        if (!is_sizes(offsets) || offsets.size() != 2 || offsets[1].get<int64_t>() < offsets[0].get<int64_t>())
            fail("%s: tensor '%s' has data_offsets that are not [begin, end]", path_.c_str(), shown.c_str());
        TensorInfo info;
        info.dtype = value["dtype"].get<std::string>();
        info.shape = value["shape"].get<std::vector<int64_t>>();
        info.offset = offsets[0].get<int64_t>();
        info.nbytes = offsets[1].get<int64_t>() - info.offset;
        if (tensor_bytes(info.dtype, info.shape) != info.nbytes)
            fail("%s: tensor '%s' has %lld bytes, its shape and dtype %s need %lld", path_.c_str(), shown.c_str(), (long long)info.nbytes,
                 info.dtype.c_str(), (long long)tensor_bytes(info.dtype, info.shape));
        return info;
    }

    // Sorted by offset, the tensors must follow each other from 0 to the end of the file.
    void check_layout(int64_t available) const {
        std::vector<std::pair<const std::string*, const TensorInfo*>> order;
        for (const auto& [name, info] : tensors_) order.push_back({&name, &info});
        std::sort(order.begin(), order.end(), [](auto& a, auto& b) {
            return std::pair(a.second->offset, a.second->nbytes) < std::pair(b.second->offset, b.second->nbytes);
        });
        int64_t end = 0;
        for (const auto& [name, info] : order) {
            const std::string shown = printable(*name);
            if (info->offset < end) fail("%s: tensor '%s' overlaps another; the file is damaged", path_.c_str(), shown.c_str());
            if (info->offset > end)
                fail("%s: %lld bytes before tensor '%s' belong to none; the file is damaged", path_.c_str(), (long long)(info->offset - end),
                     shown.c_str());
            end = info->offset + info->nbytes;
            if (end > available)
                fail("%s is cut off: tensor '%s' ends at byte %lld and the file holds %lld; copy it again", path_.c_str(), shown.c_str(),
                     (long long)end, (long long)available);
        }
        if (end != available)
            fail("%s is too long: %lld bytes after its last tensor; the file is damaged", path_.c_str(), (long long)(available - end));
    }

    template <class Out> void convert(const std::string& name, Out* out) const {
        const TensorInfo& t = info(name);
        const auto each = [&]<class In>(In, auto to_number) {
            const uint8_t* p = data(name);
            for (int64_t i = 0, n = t.elements(); i < n; file_progress++)                     // the file is read where it is touched
                for (const int64_t end = std::min<int64_t>(n, i + (1 << 20)); i < end; i++) {
                    In value;
                    memcpy(&value, p + i * (int64_t)sizeof value, sizeof value);
                    out[i] = (Out)to_number(value);
                }
        };
        const auto same = [](auto value) { return value; };
        if (t.dtype == "F32") each(float{}, same);
        else if (t.dtype == "BF16") each(uint16_t{}, [](uint16_t bits) { return std::bit_cast<float>((uint32_t)bits << 16); });
        else if (t.dtype == "F16") each(uint16_t{}, half_to_float);
        else if (t.dtype == "F64") each(double{}, same);
        else if (t.dtype == "I64") each(int64_t{}, same);
        else if (t.dtype == "I32") each(int32_t{}, same);
        else if (t.dtype == "I16") each(int16_t{}, same);
        else if (t.dtype == "I8") each(int8_t{}, same);
        else if (t.dtype == "U64") each(uint64_t{}, same);
        else if (t.dtype == "U32") each(uint32_t{}, same);
        else if (t.dtype == "U16") each(uint16_t{}, same);
        else if (t.dtype == "U8" || t.dtype == "BOOL") each(uint8_t{}, same);
        else fail("%s: tensor '%s' of dtype %s cannot be read as numbers; convert it to F32 or BF16", path_.c_str(), printable(name).c_str(),
                  t.dtype.c_str());
    }

    std::string path_;
    MappedFile file_;
    const uint8_t* data_ = nullptr;
    std::map<std::string, TensorInfo> tensors_;
    nlohmann::json metadata_;
};

// ---------------------------------------------------------------------------------------------------------------------
// Writing

struct TensorToWrite {
    std::string name;
    std::string dtype;
    std::vector<int64_t> shape;
    std::function<void(void* dst, int64_t offset_bytes, int64_t bytes)> fill;   // copies this part of the tensor to dst (host)
};

inline std::string safetensors_header(const std::string& path, const std::vector<TensorToWrite>& tensors,
                                      const std::map<std::string, std::string>& metadata) {
    nlohmann::ordered_json header = nlohmann::ordered_json::object();
    if (!metadata.empty()) header["__metadata__"] = metadata;
    std::set<std::string> names;
    int64_t offset = 0;
    for (const TensorToWrite& tensor : tensors) {
        const int64_t bytes = tensor_bytes(tensor.dtype, tensor.shape);
        if (dtype_bytes(tensor.dtype) == 0 || bytes < 0)
            fail("cannot write %s: tensor '%s' has a bad dtype or shape", path.c_str(), printable(tensor.name).c_str());
        if (tensor.name == "__metadata__" || !names.insert(tensor.name).second)
            fail("cannot write %s: two tensors named '%s'", path.c_str(), printable(tensor.name).c_str());
        header[tensor.name] = {{"dtype", tensor.dtype}, {"shape", tensor.shape}, {"data_offsets", {offset, offset + bytes}}};
        offset += bytes;
    }
    std::string text;
    try {
        text = header.dump();
    } catch (const nlohmann::json::exception&) {
        fail("cannot write %s: a tensor name or metadata text is not UTF-8", path.c_str());
    }
    text.resize((size_t)round_up((int64_t)text.size(), 8), ' ');                 // so that the data begin aligned
    const uint64_t length = text.size();
    return std::string((const char*)&length, 8) + text;
}

// Writes the tensors, widest elements first (then in the order given) so that all lie aligned. fill() is called in file order,
// front to back; progress() after every piece of at most 64 MiB with the bytes written so far. The file appears under its name
// only when whole and synced; after an error (a full disk, an exception in fill) nothing new is left.
inline void write_safetensors(const std::string& path, std::vector<TensorToWrite> tensors, std::map<std::string, std::string> metadata,
                              std::function<void(int64_t bytes)> progress = {}) {
    constexpr int64_t PIECE = 64 << 20;
    std::stable_sort(tensors.begin(), tensors.end(),
                     [](const TensorToWrite& a, const TensorToWrite& b) { return dtype_bytes(a.dtype) > dtype_bytes(b.dtype); });
    const std::string header = safetensors_header(path, tensors, metadata);
    int64_t total = 0;
    for (const TensorToWrite& tensor : tensors) total += tensor_bytes(tensor.dtype, tensor.shape);

    DurableFile file(path);
    file.write(header.data(), header.size());
    std::vector<uint8_t> buffer((size_t)std::min(PIECE, total));
    int64_t used = 0, written = 0;                          // pieces cross tensors: one write for many small ones
    const auto flush = [&] {
        file.write(buffer.data(), (size_t)used);
        written += std::exchange(used, 0);
        if (progress) progress(written);
    };
    for (const TensorToWrite& tensor : tensors) {
        const int64_t bytes = tensor_bytes(tensor.dtype, tensor.shape);
        for (int64_t offset = 0; offset < bytes;) {
            const int64_t n = std::min(bytes - offset, (int64_t)buffer.size() - used);
            tensor.fill(buffer.data() + used, offset, n);
            offset += n;
            if ((used += n) == (int64_t)buffer.size()) flush();
        }
    }
    if (used > 0) flush();
    file.commit();
}
