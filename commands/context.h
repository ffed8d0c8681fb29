// train_samba eval --lengths: perplexity against context length.
//
//   one pass (default)   the data's first --tokens tokens are cut into sequences of the greatest length, and these into the shorter
//                        ones: every length reads the same tokens, each of them once, and only the context before them differs
//   --stride S           the paper's protocol: windows of each length that start every S tokens, each read from an empty state
//
// Of each: the mean over all positions, and over the last 4,096, which all have a long context.
#pragma once
#include <array>
#include <bit>
#include <fstream>

#include "../data/run_log.h"
#include "../data/shards.h"
#include "common.h"
#include "long_reader.h"

struct ContextOptions {
    std::vector<std::string> lengths;
    int64_t tokens = 1 << 20, stride = 0, windows = 0, last = 4096, micro_batch = 4, seq_len = 0;
    std::string json;
};

// "4k" -> 4096: context lengths are powers of two by custom, so that here k is 1,024 and m is 1,048,576.
inline int64_t context_length(const std::string& text) {
    size_t used = 0;
    long long value = 0;
    try { value = std::stoll(text, &used); } catch (const std::exception&) {}
    const std::string unit = used < text.size() ? text.substr(used) : "";
    const int shift = unit == "k" || unit == "K" ? 10 : unit == "m" || unit == "M" ? 20 : unit.empty() ? 0 : -1;
    if (used == 0 || shift < 0 || value < 1 || value > (1ll << 40) >> shift)
        fail("--lengths %s: write context lengths like 4k,8k,...,1m (k is 1024; ... doubles)", text.c_str());
    return value << shift;
}

// "4k","8k","...","1m" -> 4096, 8192, 16384, ..., 1048576: sorted, each once
inline std::vector<int64_t> context_lengths(const std::vector<std::string>& texts) {
    std::vector<int64_t> lengths;
    for (size_t i = 0; i < texts.size(); i++) {
        if (texts[i] != "...") {
            lengths.push_back(context_length(texts[i]));
            continue;
        }
        if (i == 0 || i + 1 == texts.size() || texts[i + 1] == "...") fail("--lengths: \"...\" stands between two lengths");
        for (const int64_t end = context_length(texts[i + 1]); lengths.back() * 2 < end;) lengths.push_back(lengths.back() * 2);
    }
    std::sort(lengths.begin(), lengths.end());
    lengths.erase(std::unique(lengths.begin(), lengths.end()), lengths.end());
    return lengths;
}

struct TextWindow { size_t shard; int64_t first; };

// Windows of `length` that start every `stride` tokens of each shard, at most `limit` of them (0: all)
inline std::vector<TextWindow> windows_of(const Shards& shards, int64_t length, int64_t stride, int64_t limit) {
    std::vector<TextWindow> windows;
    for (size_t s = 0; s < shards.info().size(); s++)
        for (int64_t first = 0; first + length + 1 <= shards.info()[s].tokens; first += stride) {
            if (limit > 0 && (int64_t)windows.size() == limit) return windows;
            windows.push_back({s, first});
        }
    return windows;
}

// Anonymous memory of this process now: without files that are mapped, whose pages the system may take back
inline int64_t host_bytes() {
    std::ifstream status("/proc/self/status");
    for (std::string key; status >> key;) {
        int64_t kib = 0;
        if (key == "RssAnon:" && status >> kib) return kib << 10;
    }
    return 0;
}

struct ContextResult {
    int64_t length = 0, sequences = 0, last = 0, host = 0;
    double sum = 0, last_sum = 0, seconds = 0;
    std::array<double, 64> by_position{};                  // sums over positions [0, 1024), [1024, 2048), [2048, 4096), ...

    static size_t bucket(int64_t position) { return (size_t)std::bit_width((uint64_t)position >> 10); }
    static int64_t bucket_end(size_t b) { return (int64_t)1024 << b; }
    double tokens() const { return (double)sequences * (double)length; }
    double loss() const { return sum / tokens(); }
    double last_loss() const { return last_sum / ((double)sequences * (double)last); }

    void add(int64_t position, double loss) {
        sum += loss;
        if (position >= length - last) last_sum += loss;
        by_position[bucket(position)] += loss;
    }
    nlohmann::ordered_json to_json() const {
        nlohmann::ordered_json positions = nlohmann::ordered_json::array();
        for (int64_t begin = 0; begin < length; begin = bucket_end(bucket(begin))) {
            const int64_t end = std::min(length, bucket_end(bucket(begin)));
            const double tokens_there = (double)sequences * (double)(end - begin);
            positions.push_back({{"from", begin}, {"to", end}, {"loss", by_position[bucket(begin)] / tokens_there}});
        }
        return {{"length", length}, {"sequences", sequences}, {"loss", loss()}, {"ppl", std::exp(loss())}, {"last", last},
                {"last_loss", last_loss()}, {"last_ppl", std::exp(last_loss())}, {"seconds", seconds}, {"tok_s", tokens() / seconds},
                {"host_bytes", host}, {"positions", positions}};
    }
};

// One pass over each window
inline ContextResult read_windows(LongReader& reader, const Shards& shards, const std::vector<TextWindow>& windows, int64_t length, int64_t last,
                                  int64_t max_B) {
    ContextResult result;
    result.length = length;
    result.sequences = (int64_t)windows.size();
    result.last = std::min(last, length);
    ProgressBar bar("context of " + std::to_string(length), result.tokens());
    const double start = now_seconds();
    for (size_t at = 0; at < windows.size(); at += (size_t)max_B) {
        const int64_t B = std::min<int64_t>(max_B, (int64_t)(windows.size() - at));
        const auto fetch = [&](int64_t first, int64_t n, int* tokens, int* targets) {
            for (int64_t b = 0; b < B; b++) {
                const TextWindow& window = windows[at + (size_t)b];
                shards.read_at(window.shard, window.first + first, n, tokens + b * n, targets + b * n);
            }
        };
        const auto see = [&](int64_t first, int64_t n, const float* losses, const uint8_t*) {
            for (int64_t i = 0; i < B * n; i++) {
                const TextWindow& window = windows[at + (size_t)(i / n)];
                if (!std::isfinite(losses[i]))
                    fail("%s: the loss at position %lld is %f; this model is broken, evaluate an older checkpoint",
                         shards.info()[window.shard].path.c_str(), (long long)(window.first + first + i % n), losses[i]);
                result.add(first + i % n, losses[i]);
            }
            bar.add((double)(B * n));
        };
        reader.read(B, length, fetch, see);
    }
    result.seconds = now_seconds() - start;
    result.host = host_bytes();
    return result;
}

// The windows that each length reads. Lengths that the data are too short for are left out with a line that says so.
using WindowPlan = std::vector<std::pair<int64_t, std::vector<TextWindow>>>;
inline WindowPlan plan_windows(const Shards& shards, std::vector<int64_t> lengths, const ContextOptions& o) {
    while (!lengths.empty() && windows_of(shards, lengths.back(), 1, 1).empty()) {
        fprintf(stderr, "a context of %lld tokens is left out: no shard is that long\n", (long long)lengths.back());
        lengths.pop_back();
    }
    if (lengths.empty()) fail("%s: too short for any of --lengths; give more data, or shorter lengths", shards.info()[0].path.c_str());
    WindowPlan plan;
    const int64_t longest = lengths.back();
    const std::vector<TextWindow> regions = windows_of(shards, longest, longest, std::max<int64_t>(1, o.tokens / longest));
    for (int64_t length : lengths) {
        std::vector<TextWindow> windows;
        if (o.stride > 0) windows = windows_of(shards, length, o.stride, o.windows);
        else
            for (const TextWindow& region : regions)
                for (int64_t i = 0; i < longest / length; i++) windows.push_back({region.shard, region.first + i * length});
        plan.emplace_back(length, std::move(windows));
    }
    return plan;
}

// `about`: what the JSON file says of the model and the data
inline void run_context(Model& m, const Shards& shards, const ContextOptions& o, int64_t T, nlohmann::ordered_json about) {
    if (o.last < 1 || o.stride < 0 || o.tokens < 1 || o.windows < 0)
        fail("--last and --tokens must be at least 1, --stride and --windows at least 0");
    if (!o.json.empty() && access(parent_directory(o.json).c_str(), W_OK) != 0)
        fail("--json %s: cannot write there: %s", o.json.c_str(), strerror(errno));
    const auto plan = plan_windows(shards, context_lengths(o.lengths), o);
    LongReader reader(m, o.micro_batch, T, plan.back().first);
    nlohmann::ordered_json results = nlohmann::ordered_json::array();
    const std::string last = "last " + std::to_string(o.last);
    printf("%9s %9s %10s %10s   %-12s %10s %9s\n", "context", "sequences", "loss", "perplexity", last.c_str(), "tok/s", "memory");
    for (const auto& [length, windows] : plan) {
        const ContextResult r = read_windows(reader, shards, windows, length, o.last, o.micro_batch);
        printf("%9lld %9lld %10.4f %10.3f   %-12.3f %10s %9s\n", (long long)length, (long long)r.sequences, r.loss(), std::exp(r.loss()),
               std::exp(r.last_loss()), human(r.tokens() / r.seconds).c_str(), human_bytes((double)reader.bytes()).c_str());
        fflush(stdout);
        results.push_back(r.to_json());
        results.back()["device_bytes"] = reader.bytes();
        if (ON_GPU) results.back()["gpu_used_bytes"] = (int64_t)device_info().total_bytes - (int64_t)device_free_bytes();
    }
    if (o.json.empty()) return;
    about["protocol"] = o.stride > 0 ? "windows every " + std::to_string(o.stride) + " tokens" : "one pass over the same tokens at every length";
    about["chunk"] = T;
    about["micro_batch"] = o.micro_batch;
    about["results"] = results;
    write_file_durably(o.json, about.dump(1) + "\n");
}
