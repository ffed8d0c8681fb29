// Checkpoint directories: what makes one whole, how it is written, found and removed. Knows files, not models.
//
//   OUT/step_00001000/          state.json and the files that its table "files" names, each with its size in bytes
//   OUT/latest                  symbolic link to the checkpoint written last
//   OUT/.tmp_step_00001000.PID  one being written; renamed when everything in it is on the disk
//
// A checkpoint is whole when state.json can be read and every file that it names is there with that size. Names of the form
// step_00001000.replaced are whole checkpoints that a power cut kept from being replaced; they are found like any other.
#pragma once
#include <csignal>
#include <mutex>
#include <optional>

#include <nlohmann/json.hpp>

#include "files.h"

inline std::string checkpoint_name(int64_t step) {
    char name[32];
    snprintf(name, sizeof name, "step_%08lld", (long long)step);
    return name;
}

// The step in a checkpoint's directory name, nothing where it is not such a name
inline std::optional<int64_t> checkpoint_step(std::string name) {
    const std::string suffix = ".replaced";
    if (name.size() > suffix.size() && name.ends_with(suffix)) name.resize(name.size() - suffix.size());
    if (name.size() < 13 || name.size() > 23 || name.rfind("step_", 0) != 0) return {};
    if (name.find_first_not_of("0123456789", 5) != std::string::npos) return {};
    return (int64_t)std::stoull(name.substr(5));
}

// Why the directory is not a whole checkpoint; empty where it is one
inline std::string checkpoint_defect(const std::string& directory) {
    namespace fs = std::filesystem;
    std::error_code error;
    const std::string path = directory + "/state.json";
    if (!fs::is_directory(directory, error)) return "it is not a directory";
    if (!fs::is_regular_file(path, error)) return "state.json is missing";
    nlohmann::json state;
    try {
        const MappedFile file(path);
        state = nlohmann::json::parse(file.data, file.data + file.size, nullptr, false);
    } catch (const Error& e) {
        return e.what();
    }
    if (!state.is_object() || !state.contains("files") || !state["files"].is_object()) return "state.json is damaged";
    for (const auto& [name, bytes] : state["files"].items()) {
        if (name.empty() || name.find('/') != std::string::npos || !bytes.is_number_unsigned()) return "state.json is damaged";
        const uint64_t size = fs::file_size(directory + "/" + name, error);
        if (error) return printable(name) + " is missing";
        if (size != bytes.get<uint64_t>())
            return printable(name) + " has " + std::to_string(size) + " bytes instead of " + std::to_string(bytes.get<uint64_t>());
    }
    return "";
}

// Directories with a checkpoint's name in a run's directory, whole or not, the highest step first
inline std::vector<std::string> list_checkpoints(const std::string& out_dir) {
    std::vector<std::pair<int64_t, std::string>> found;
    std::error_code error;
    for (const auto& entry : std::filesystem::directory_iterator(out_dir, error)) {
        const std::string name = entry.path().filename().string();
        if (const auto step = checkpoint_step(name)) found.push_back({-*step, name});      // "...replaced" sorts behind its successor
    }
    if (error) fail("cannot look into %s: %s", out_dir.c_str(), error.message().c_str());
    std::sort(found.begin(), found.end());
    std::vector<std::string> names;
    for (auto& [step, name] : found) names.push_back(name);
    return names;
}

// The directory of the newest whole checkpoint. `directory` is a checkpoint (then it must be whole) or a run's directory, whose
// damaged checkpoints are skipped with a warning. Newest means the highest step.
inline std::string find_checkpoint(const std::string& directory) {
    namespace fs = std::filesystem;
    std::error_code error;
    if (!fs::exists(directory, error)) fail("no checkpoint: %s does not exist", directory.c_str());
    if (!fs::is_directory(directory, error)) fail("no checkpoint: %s is not a directory", directory.c_str());
    const std::string own_name = fs::weakly_canonical(directory, error).filename().string();
    if (checkpoint_step(own_name) || fs::exists(directory + "/state.json", error)) {
        const std::string defect = checkpoint_defect(directory);
        if (!defect.empty()) fail("checkpoint %s is not whole: %s; resume from another one", directory.c_str(), defect.c_str());
        return directory;
    }
    std::string looked_at;
    for (const std::string& name : list_checkpoints(directory)) {
        const std::string defect = checkpoint_defect(directory + "/" + name);
        if (defect.empty()) return directory + "/" + name;
        fprintf(stderr, "warning: skipped checkpoint %s/%s: %s\n", directory.c_str(), name.c_str(), defect.c_str());
        looked_at += (looked_at.empty() ? "" : "; ") + name + ": " + defect;
    }
    if (looked_at.empty()) fail("no checkpoint in %s: it holds no directory named like %s", directory.c_str(), checkpoint_name(1000).c_str());
    fail("no whole checkpoint in %s (%s)", directory.c_str(), looked_at.c_str());
}

// ---------------------------------------------------------------------------------------------------------------------
// Writing

// Temporaries that this process is writing now; prune_checkpoints() leaves them alone.
struct ActiveTemporaries {
    std::mutex mutex;
    std::set<std::string> names;
    static ActiveTemporaries& get() {
        static ActiveTemporaries instance;
        return instance;
    }
    void add(const std::string& name) { std::lock_guard<std::mutex> lock(mutex); names.insert(name); }
    void remove(const std::string& name) { std::lock_guard<std::mutex> lock(mutex); names.erase(name); }
    bool has(const std::string& name) { std::lock_guard<std::mutex> lock(mutex); return names.count(name) > 0; }
};

// Points out_dir/latest at `name` in one step: a reader sees the old target or the new one.
inline void point_latest(const std::string& out_dir, const std::string& name) {
    const std::string temporary = out_dir + "/.tmp_latest." + std::to_string(getpid()), latest = out_dir + "/latest";
    unlink(temporary.c_str());
    if (symlink(name.c_str(), temporary.c_str()) == 0 && rename(temporary.c_str(), latest.c_str()) == 0) return;
    fprintf(stderr, "warning: cannot point %s at %s: %s (the checkpoint itself is safe)\n", latest.c_str(), name.c_str(), strerror(errno));
    unlink(temporary.c_str());
}

// One process makes the writer; others may write into directory() too, if they are done before commit(). Without commit() the
// destructor removes everything: nothing looks like a checkpoint that is not one.
class CheckpointWriter {
public:
    CheckpointWriter(const std::string& out_dir, int64_t step)
        : out_dir_(out_dir), name_(checkpoint_name(step)), temporary_(".tmp_" + name_ + "." + std::to_string(getpid())) {
        if (step < 0) fail("a checkpoint cannot be of step %lld", (long long)step);
        std::error_code error;
        std::filesystem::create_directories(out_dir, error);
        if (error) fail("cannot make the directory %s: %s", out_dir.c_str(), error.message().c_str());
        remove_tree(directory(), error);    // of a killed process that had the same number
        if (mkdir(directory().c_str(), 0777) != 0) fail("cannot make the directory %s: %s", directory().c_str(), strerror(errno));
        ActiveTemporaries::get().add(temporary_);
    }
    CheckpointWriter(const CheckpointWriter&) = delete;
    CheckpointWriter& operator=(const CheckpointWriter&) = delete;
    ~CheckpointWriter() {
        std::error_code error;
        if (!committed_) remove_tree(directory(), error);
        ActiveTemporaries::get().remove(temporary_);
    }

    std::string directory() const { return out_dir_ + "/" + (committed_ ? name_ : temporary_); }
    std::string path(const std::string& file) const { return directory() + "/" + file; }

    // Adds the table of files to `state`, makes everything durable, and puts the directory in place of its name, also over a
    // checkpoint of the same step. Before the rename nothing has changed for a reader; after it the checkpoint is whole.
    void commit(nlohmann::json state) {
        if (committed_) fail("checkpoint %s was committed twice", directory().c_str());
        if (!state.is_object()) fail("the state of checkpoint %s is not a JSON object", directory().c_str());
        nlohmann::json files = nlohmann::json::object();
        for (const auto& entry : std::filesystem::directory_iterator(directory())) {
            const std::string file = entry.path().filename().string();
            if (file.rfind(".tmp_", 0) == 0) fail("checkpoint %s has an unfinished file, %s", directory().c_str(), file.c_str());
            if (!entry.is_regular_file()) fail("checkpoint %s has %s, which is not a regular file", directory().c_str(), file.c_str());
            if (file == "state.json") continue;
            fsync_path(entry.path().string());
            files[file] = (uint64_t)entry.file_size();
        }
        state["files"] = files;
        write_file_durably(path("state.json"), state.dump(1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n");
        fsync_path(directory());
        put_in_place();
        fsync_path(out_dir_);
        point_latest(out_dir_, name_);
        fsync_path(out_dir_);
    }

private:
    void put_in_place() {
        const std::string from = directory(), to = out_dir_ + "/" + name_, replaced = to + ".replaced";
        std::error_code error;
        if (!std::filesystem::exists(std::filesystem::symlink_status(to))) {
            rename_path(from, to);
            committed_ = true;
        } else if (renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, to.c_str(), RENAME_EXCHANGE) == 0) {
            committed_ = true;
            remove_tree(from, error);       // now the old one
        } else {                                            // a file system without exchange: the old one is never without a name
            remove_tree(replaced, error);
            rename_path(to, replaced);
            rename_path(from, to);
            committed_ = true;
            remove_tree(replaced, error);
        }
    }

    std::string out_dir_, name_, temporary_;
    bool committed_ = false;
};

// ---------------------------------------------------------------------------------------------------------------------
// Removing

// True for a ".tmp_NAME.PID" whose process is gone, or is this one and not writing it
inline bool is_stale_temporary(const std::string& name) {
    if (name.rfind(".tmp_", 0) != 0) return false;
    const std::string digits = name.substr(name.rfind('.') + 1);
    if (digits.empty() || digits.size() > 9 || digits.find_first_not_of("0123456789") != std::string::npos) return false;
    const pid_t pid = (pid_t)std::stol(digits);
    if (pid == getpid()) return name.rfind(".tmp_step_", 0) == 0 && !ActiveTemporaries::get().has(name);
    return kill(pid, 0) != 0 && errno == ESRCH;
}

// Keeps the `keep` newest whole checkpoints (all of them where keep <= 0) and the one that `latest` points to; removes the
// other whole ones and what dead processes left half-written. A damaged checkpoint is left for a person to look at.
inline void prune_checkpoints(const std::string& out_dir, int keep) {
    namespace fs = std::filesystem;
    std::error_code error;
    std::vector<std::string> doomed;
    for (const auto& entry : fs::directory_iterator(out_dir, error))
        if (is_stale_temporary(entry.path().filename().string())) doomed.push_back(entry.path().filename().string());
    const std::string latest = fs::read_symlink(out_dir + "/latest", error).string();
    int whole = 0;
    for (const std::string& name : list_checkpoints(out_dir)) {
        if (!checkpoint_defect(out_dir + "/" + name).empty()) continue;
        if (++whole > keep && keep > 0 && name != latest) doomed.push_back(name);
    }
    for (const std::string& name : doomed) {
        std::string path = out_dir + "/" + name;
        if (name[0] != '.') {                               // first take its name away, so that no half of it can be found
            const std::string hidden = out_dir + "/.tmp_" + name + "." + std::to_string(getpid());
            rename_path(path, hidden);
            path = hidden;
        }
        remove_tree(path, error);
        if (error) fprintf(stderr, "warning: cannot remove %s: %s\n", path.c_str(), error.message().c_str());
    }
}
