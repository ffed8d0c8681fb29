// The algorithms that matrix products were found to be fastest with, in a file that later runs read: so nothing is timed again, and
// two runs give the same bits. One file for each GPU, version of cuBLASLt and build, in --plans DIR:
//     {"gpu": "NVIDIA H200", "cublaslt": 130100, "build": "gpu-bf16", "plans": {"TN 6144x32768x1536 …": {"algorithm": "16 hex digits x 8",
//      "ms": 0.79, "first_ms": 0.83}, …}, "checksum": "16 hex digits"}
// The checksum is over the dumped "plans". A file that is broken or of another kind is not used: one line says so, and the products are
// timed and the file written anew.
#pragma once
#include <nlohmann/json.hpp>

#include "../kernels/matmul/choice.h"
#include "files.h"

struct MatmulPlanKey {
    std::string gpu;
    int64_t library;
    std::string build;
};

inline std::string hex64(uint64_t x) {
    char text[17];
    snprintf(text, sizeof text, "%016llx", (unsigned long long)x);
    return text;
}

// --plans as given, or a folder of the user's caches; "" where there is no home
inline std::string plan_directory(const std::string& given) {
    if (!given.empty()) return given;
    if (const char* cache = std::getenv("XDG_CACHE_HOME"); cache && *cache) return std::string(cache) + "/samba.cu";
    if (const char* home = std::getenv("HOME"); home && *home) return std::string(home) + "/.cache/samba.cu";
    return "";
}

inline std::string plan_file_name(const MatmulPlanKey& key) {
    std::string name = "matmul_" + key.gpu + "_cublaslt" + std::to_string(key.library) + "_" + key.build + ".json";
    for (char& c : name)
        if (!isalnum((unsigned char)c) && c != '.' && c != '-') c = '_';
    return name;
}

inline std::string matmul_plans_text(const MatmulPlanKey& key, const MatmulChoices& choices) {
    nlohmann::json plans = nlohmann::json::object();
    for (const auto& [name, choice] : choices) {
        std::string words;
        for (uint64_t word : choice.algorithm) words += hex64(word);
        plans[name] = {{"algorithm", words}, {"ms", choice.ms}, {"first_ms", choice.first_ms}};
    }
    const std::string dumped = plans.dump();
    return nlohmann::json{{"gpu", key.gpu}, {"cublaslt", key.library}, {"build", key.build}, {"plans", plans},
                          {"checksum", hex64(fnv1a64(dumped.data(), dumped.size()))}}.dump(1) + "\n";
}

// What is wrong with `text`, or "" and its choices
inline std::string parse_matmul_plans(const std::string& text, const MatmulPlanKey& key, MatmulChoices& choices) {
    const nlohmann::json j = nlohmann::json::parse(text, nullptr, false);
    if (j.is_discarded()) return "it is not JSON";
    try {
        if (j.at("gpu") != key.gpu || j.at("cublaslt") != key.library || j.at("build") != key.build)
            return "it was made for another GPU, library or build";
        const std::string dumped = j.at("plans").dump();
        if (j.at("checksum") != hex64(fnv1a64(dumped.data(), dumped.size()))) return "its checksum is not that of its plans";
        MatmulChoices read;
        for (const auto& [name, plan] : j.at("plans").items()) {
            const std::string words = plan.at("algorithm");
            MatmulChoice& choice = read[name];
            if (words.size() != 16 * choice.algorithm.size() || words.find_first_not_of("0123456789abcdef") != std::string::npos)
                return "the algorithm of " + printable(name) + " is no algorithm";
            for (size_t i = 0; i < choice.algorithm.size(); i++) choice.algorithm[i] = std::stoull(words.substr(16 * i, 16), nullptr, 16);
            choice.ms = plan.at("ms").is_number() ? plan.at("ms").get<double>() : 0;
            choice.first_ms = plan.at("first_ms").is_number() ? plan.at("first_ms").get<double>() : 0;
        }
        choices = std::move(read);
        return "";
    } catch (const nlohmann::json::exception& e) {
        return printable(e.what());
    }
}

// The choices of a file; none, with a line on stderr, where it cannot be used, and none without a word where there is no file
inline MatmulChoices load_matmul_plans(const std::string& path, const MatmulPlanKey& key) {
    MatmulChoices choices;
    if (access(path.c_str(), F_OK) != 0) return choices;
    std::string defect;
    try {
        defect = parse_matmul_plans(MappedFile(path).text(), key, choices);
    } catch (const Error& e) {
        defect = e.what();
    }
    if (!defect.empty()) fprintf(stderr, "%s: %s; timing matrix products again\n", path.c_str(), defect.c_str());
    return choices;
}

// Why no file could be kept in this folder, or ""
inline std::string folder_defect(const std::string& folder) {
    if (folder.empty()) return "there is no home folder";
    std::error_code error;
    std::filesystem::create_directories(folder, error);
    if (error) return folder + ": " + error.message();
    return access(folder.c_str(), W_OK) == 0 ? "" : folder + ": " + strerror(errno);
}

// Adds to what the file has by now: another run may have written it meanwhile, and the choices it made first stay.
inline void save_matmul_plans(const std::string& path, const MatmulPlanKey& key, const MatmulChoices& choices) {
    try {
        MatmulChoices all, ours = choices;
        if (access(path.c_str(), R_OK) == 0) parse_matmul_plans(MappedFile(path).text(), key, all);
        all.merge(ours);
        write_file_durably(path, matmul_plans_text(key, all));
    } catch (const std::exception& e) {
        fprintf(stderr, "the plans of matrix products are not kept: %s; --plans DIR names another folder\n", e.what());
    }
}
