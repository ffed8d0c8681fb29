// What a run tells: log.jsonl for programs, numbers and a progress bar for people.
#pragma once
#include <chrono>
#include <string>

#include <fcntl.h>
#include <unistd.h>

#include <nlohmann/json.hpp>

#include "files.h"

inline double now_seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// 1234567 -> "1.23M"
inline std::string human(double x) {
    static const char* const units[] = {"", "k", "M", "B", "T"};
    int u = 0;
    while (std::abs(x) >= 999.5 && u < 4) x /= 1000, u++;
    char text[32];
    snprintf(text, sizeof text, u == 0 ? "%.0f%s" : std::abs(x) < 9.995 ? "%.2f%s" : std::abs(x) < 99.95 ? "%.1f%s" : "%.0f%s", x, units[u]);
    return text;
}
inline std::string human_bytes(double bytes) {
    char text[32];
    if (bytes >= 0x1p30) snprintf(text, sizeof text, "%.2f GiB", bytes / 0x1p30);
    else snprintf(text, sizeof text, "%.1f MiB", bytes / 0x1p20);
    return text;
}
inline std::string human_time(double seconds) {
    const long s = std::lround(seconds);
    char text[32];
    if (s >= 86400) snprintf(text, sizeof text, "%ldd%02ldh", s / 86400, s / 3600 % 24);
    else if (s >= 3600) snprintf(text, sizeof text, "%ldh%02ldm", s / 3600, s / 60 % 60);
    else snprintf(text, sizeof text, "%ldm%02lds", s / 60, s % 60);
    return text;
}

// One JSON object a line, each written by one call of write(): a crash cuts at most the last line. A line left without its
// end by an earlier crash is completed first, so that it spoils no other.
class RunLog {
    int fd = -1;
    std::string path;

public:
    explicit RunLog(const std::string& path /*"": writes nothing*/) : path(path) {
        if (path.empty()) return;
        bool torn = false;
        if (access(path.c_str(), F_OK) == 0) {
            const MappedFile old(path);
            torn = old.size > 0 && old.data[old.size - 1] != '\n';
        }
        fd = open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
        if (fd < 0) fail("cannot write %s: %s", path.c_str(), strerror(errno));
        if (torn) append("\n");
    }
    RunLog(const RunLog&) = delete;
    RunLog& operator=(const RunLog&) = delete;
    ~RunLog() { if (fd >= 0) close(fd); }
    void write(const nlohmann::ordered_json& record) { append(record.dump() + "\n"); }

private:
    void append(const std::string& text) {
        if (fd < 0) return;
        const ssize_t n = ::write(fd, text.data(), text.size());
        if (n != (ssize_t)text.size()) fail("cannot write %s: %s", path.c_str(), n < 0 ? strerror(errno) : "the disk is full");
    }
};

// "checkpoint  [#####.....]  52%  1.20 of 2.31 GiB" on a terminal; nothing where nobody is looking.
class ProgressBar {
    std::string label;
    double total, done = 0, shown = -1;
    bool visible = isatty(STDERR_FILENO);

public:
    ProgressBar(std::string label, double total) : label(std::move(label)), total(total) { show(); }
    ~ProgressBar() { if (visible) fprintf(stderr, "\r\033[K"); }
    void add(double amount) { set(done + amount); }
    void set(double amount) { done = amount; show(); }

private:
    void show() {
        const double part = total > 0 ? std::min(1.0, done / total) : 1;
        if (!visible || part < shown + 0.01) return;
        shown = part;
        const int filled = (int)(part * 30);
        fprintf(stderr, "\r%s [%s%s] %3.0f%%", label.c_str(), std::string(filled, '#').c_str(), std::string(30 - filled, '.').c_str(), part * 100);
        fflush(stderr);
    }
};
