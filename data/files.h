// Files: globs, read-only mappings, and writes that survive a crash.
//
// A file that matters is written beside its place under a temporary name, synced and renamed, so that a reader sees the old
// content or the new one and never a part of it. Every failure is one line with the path and the reason of the system.
#pragma once
#include <algorithm>
#include <atomic>
#include <bit>
#include <cerrno>
#include <filesystem>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <glob.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../kernels/device.cuh"

static_assert(std::endian::native == std::endian::little, "the file formats are little-endian and read without swapping");

// Counts what reading and writing files got done, piece by piece. Whoever watches over this process (kernels/comm/guard.h) tells
// from it a slow disk, with which it goes on, from one that answers no more.
inline std::atomic<uint64_t> file_progress{0};

// Text of a file fit for an error line: control characters and bytes outside ASCII become '?', long text is cut.
inline std::string printable(const std::string& text, size_t limit = 200) {
    std::string out = text.substr(0, limit);
    for (char& c : out)
        if ((unsigned char)c < 0x20 || (unsigned char)c > 0x7e) c = '?';
    return text.size() > limit ? out + "..." : out;
}

// FNV-1a, 64 bits. Chains: fnv1a64(b, nb, fnv1a64(a, na)) is the hash of a followed by b.
inline uint64_t fnv1a64(const void* data, size_t bytes, uint64_t seed = 14695981039346656037ull) {
    const unsigned char* p = (const unsigned char*)data;
    for (size_t i = 0; i < bytes; i++) seed = (seed ^ p[i]) * 1099511628211ull;
    return seed;
}

// The directory that holds `path`, "." for a bare name
inline std::string parent_directory(const std::string& path) {
    const std::string parent = std::filesystem::path(path).parent_path().string();
    return parent.empty() ? "." : parent;
}

// The files that one pattern names. A path that exists is taken as it is, whatever characters it holds.
inline std::vector<std::string> expand_glob(const std::string& pattern) {
    struct stat st;
    if (stat(pattern.c_str(), &st) == 0) {
        if (S_ISDIR(st.st_mode)) fail("%s is a directory; name its files, for example '%s/*.bin'", pattern.c_str(), pattern.c_str());
        return {pattern};
    }
    std::vector<std::string> paths;
    glob_t found;
    if (glob(pattern.c_str(), GLOB_NOSORT | GLOB_BRACE | GLOB_TILDE, nullptr, &found) == 0) {
        for (size_t i = 0; i < found.gl_pathc; i++)
            if (stat(found.gl_pathv[i], &st) != 0 || !S_ISDIR(st.st_mode)) paths.push_back(found.gl_pathv[i]);
        globfree(&found);
    }
    return paths;
}

// All files that the patterns name: sorted by path (bytes, whatever the locale), each file once even when two patterns or
// two spellings lead to it. A pattern that matches nothing is an error.
inline std::vector<std::string> expand_globs(const std::vector<std::string>& patterns) {
    std::vector<std::string> paths;
    for (const std::string& pattern : patterns) {
        const std::vector<std::string> matches = expand_glob(pattern);
        if (matches.empty()) fail("no file matches '%s'; check the path (and quote the pattern if the shell changed it)", pattern.c_str());
        paths.insert(paths.end(), matches.begin(), matches.end());
    }
    std::sort(paths.begin(), paths.end());
    std::vector<std::string> unique;
    std::set<std::string> seen;
    for (const std::string& path : paths) {
        std::error_code error;
        const std::string canonical = std::filesystem::weakly_canonical(path, error).string();
        if (seen.insert(error ? path : canonical).second) unique.push_back(path);
    }
    return unique;
}

// A whole file, read-only, through the page cache. data is null for an empty file. The file must not be shortened meanwhile.
struct MappedFile {
    const uint8_t* data = nullptr;
    size_t size = 0;

    explicit MappedFile(const std::string& path) {
        const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
        if (fd < 0) fail("cannot open %s: %s", path.c_str(), strerror(errno));
        struct stat st;
        std::string problem;
        if (fstat(fd, &st) != 0) problem = strerror(errno);
        else if (!S_ISREG(st.st_mode)) problem = S_ISDIR(st.st_mode) ? "it is a directory" : "it is not a regular file";
        else if ((size = (size_t)st.st_size) > 0) {
            void* p = mmap(nullptr, size, PROT_READ, MAP_SHARED, fd, 0);
            if (p == MAP_FAILED) problem = strerror(errno);
            else data = (const uint8_t*)p;
        }
        close(fd);
        if (!problem.empty()) fail("cannot read %s: %s", path.c_str(), problem.c_str());
        file_progress++;
    }
    MappedFile(MappedFile&& other) noexcept : data(std::exchange(other.data, nullptr)), size(std::exchange(other.size, 0)) {}
    MappedFile& operator=(MappedFile&& other) noexcept {
        std::swap(data, other.data);
        std::swap(size, other.size);
        return *this;
    }
    ~MappedFile() { if (data) munmap((void*)data, size); }
    std::string text() const { return std::string((const char*)data, size); }
};

// Waits until the file or directory at `path` is on the disk. Some network file systems cannot sync a directory: no error.
inline void fsync_path(const std::string& path) {
    const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) fail("cannot open %s to sync it: %s", path.c_str(), strerror(errno));
    const int error = fsync(fd) == 0 ? 0 : errno;
    close(fd);
    if (error && error != EINVAL && error != ENOTSUP && error != EROFS) fail("cannot sync %s: %s", path.c_str(), strerror(error));
    file_progress++;
}

inline void rename_path(const std::string& from, const std::string& to) {
    if (rename(from.c_str(), to.c_str()) != 0) fail("cannot rename %s to %s: %s", from.c_str(), to.c_str(), strerror(errno));
}

// Removes a file or a directory with all that is in it, as std::filesystem::remove_all does
inline void remove_tree(const std::string& path, std::error_code& error) {
    std::vector<std::filesystem::path> entries;
    const std::filesystem::directory_iterator directory(path, error);
    for (const auto& entry : directory) entries.push_back(entry.path());
    for (const auto& entry : entries) {
        std::filesystem::remove_all(entry, error);
        file_progress++;
    }
    std::filesystem::remove_all(path, error);
}

// A file being written aside. commit() puts it in place; without it the destructor removes every trace.
// A path that exists and is no regular file (a device, a pipe) is written directly: there is nothing to rename.
// What was written is sent on to the disk window by window, and only so many windows are ever on their way: a slow disk makes write()
// slow, and leaves no long silence to the sync at the end.
class DurableFile {
public:
    explicit DurableFile(const std::string& path) : path_(path), temporary_(path) {
        struct stat st;
        direct_ = stat(path.c_str(), &st) == 0 && !S_ISREG(st.st_mode);
        if (direct_ && S_ISDIR(st.st_mode)) fail("cannot write %s: it is a directory", path.c_str());
        if (!direct_)
            temporary_ = parent_directory(path) + "/.tmp_" + std::filesystem::path(path).filename().string() + "." + std::to_string(getpid());
        fd_ = open(temporary_.c_str(), O_WRONLY | O_CLOEXEC | (direct_ ? 0 : O_CREAT | O_TRUNC), 0666);
        if (fd_ < 0) fail("cannot write %s: %s", path.c_str(), strerror(errno));
    }
    DurableFile(const DurableFile&) = delete;
    DurableFile& operator=(const DurableFile&) = delete;
    ~DurableFile() {
        if (fd_ >= 0) close(fd_);
        if (!committed_ && !direct_) unlink(temporary_.c_str());
    }

    void write(const void* data, size_t bytes) {
        const char* p = (const char*)data;
        while (bytes > 0) {
            const ssize_t n = ::write(fd_, p, std::min(bytes, (size_t)(sent_ + WINDOW - written_)));
            if (n < 0 && errno == EINTR) continue;
            if (n <= 0) fail_at(n < 0 ? errno : EIO);
            p += n;
            bytes -= (size_t)n;
            written_ += n;
            file_progress++;
            if (written_ == sent_ + WINDOW) send_window();
        }
    }
    void commit() {
        while (arrived_ < sent_) wait_for_window();
        if (fsync(fd_) != 0 && errno != EINVAL && errno != ENOTSUP) fail_at(errno);
        if (close(std::exchange(fd_, -1)) != 0) fail_at(errno);       // a network file system may report a full disk only here
        if (!direct_) {
            rename_path(temporary_, path_);
            committed_ = true;
            fsync_path(parent_directory(path_));
        }
    }

private:
    static constexpr int64_t WINDOW = 16 << 20, ON_THEIR_WAY = 8 * WINDOW;

    void send_window() {
        sync_window(sent_, SYNC_FILE_RANGE_WRITE);
        sent_ = written_;
        if (sent_ - arrived_ > ON_THEIR_WAY) wait_for_window();
    }
    void wait_for_window() {
        sync_window(arrived_, SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER);
        arrived_ += WINDOW;
        file_progress++;
    }
    // File systems that cannot do that have the sync at the end
    void sync_window(int64_t begin, unsigned how) {
        if (sync_file_range(fd_, begin, WINDOW, how) != 0 && (errno == EIO || errno == ENOSPC || errno == EDQUOT)) fail_at(errno);
    }
    [[noreturn]] void fail_at(int error) {
        const char* advice = error == ENOSPC || error == EDQUOT ? "; make room, or write elsewhere"
                             : error == EFBIG                    ? "; the file is over the size limit (ulimit -f)" : "";
        fail("cannot write %s: %s after %lld bytes%s", path_.c_str(), strerror(error), (long long)written_, advice);
    }
    std::string path_, temporary_;
    int fd_ = -1;
    int64_t written_ = 0, sent_ = 0, arrived_ = 0;         // bytes; of them in windows that were sent to the disk, and that are there
    bool direct_ = false, committed_ = false;
};

inline void write_file_durably(const std::string& path, const std::string& content) {
    DurableFile file(path);
    file.write(content.data(), content.size());
    file.commit();
}
