// What the tests of data/ share: a temporary folder, raw files, and the check of an error's line.
#pragma once
#include <filesystem>
#include <fstream>
#include <string>

#include <gtest/gtest.h>

#include "../../data/files.h"

#ifndef SAMBA_SOURCE_DIR
#define SAMBA_SOURCE_DIR "."
#endif

// A folder that is removed with all it holds
struct TempFolder {
    std::string root;
    TempFolder() {
        std::string name = (std::filesystem::temp_directory_path() / "samba_test_XXXXXX").string();
        if (!mkdtemp(name.data())) fail("cannot make a temporary folder %s: %s", name.c_str(), strerror(errno));
        root = name;
    }
    TempFolder(const TempFolder&) = delete;
    TempFolder& operator=(const TempFolder&) = delete;
    ~TempFolder() {
        std::error_code error;
        std::filesystem::remove_all(root, error);
    }
    std::string path(const std::string& name) const { return root + "/" + name; }
    std::vector<std::string> list() const {
        std::vector<std::string> names;
        for (auto& entry : std::filesystem::directory_iterator(root)) names.push_back(entry.path().filename().string());
        std::sort(names.begin(), names.end());
        return names;
    }
};

inline void write_text(const std::string& path, const std::string& content) {
    std::ofstream file(path, std::ios::binary | std::ios::trunc);
    file << content;
    file.close();
    if (!file) fail("cannot write %s", path.c_str());
}
inline std::string read_text(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
}

// The statement throws an Error of one line that contains the text.
#define EXPECT_ERROR(statement, text)                                                                              \
    do {                                                                                                           \
        std::string what_;                                                                                         \
        try { (void)(statement); } catch (const Error& e_) { what_ = e_.what(); }                                  \
        EXPECT_NE(what_.find(text), std::string::npos) << "got: " << (what_.empty() ? "no error" : what_);         \
        EXPECT_EQ(what_.find('\n'), std::string::npos) << what_;                                                   \
    } while (0)
