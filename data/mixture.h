// Sets of shards drawn from by weight, and the order of everything, computed and not stored.
//
//   --data 'a/train_*.bin' 'b/*.bin'        one set
//   --data a:0.7 'b/train_*.bin:0.3'        two sets: 7 samples of 10 come from the first. Weights need not add up to one; a
//                                           folder stands for its train_*.bin
//
// Weights count samples, and so tokens. A small set with a large weight is read for several epochs while a large one is still in
// its first.
#pragma once
#include <cmath>
#include <numeric>

#include "shards.h"

// A bijection on [0, n) drawn by (seed, epoch), in O(1) memory: a balanced Feistel network on the smallest even number of bits
// that holds n, walked along its cycle until it lands inside [0, n) (fewer than 4 steps on average).
class Permutation {
public:
    Permutation(uint64_t n, uint64_t seed, uint64_t epoch) : n_(n) {
        while (half_bits_ < 32 && (1ull << (2 * half_bits_)) < n) half_bits_++;
        uint64_t state = mix(seed ^ mix(epoch + 0x9e3779b97f4a7c15ull));
        for (uint64_t& key : keys_) key = mix(state += 0x9e3779b97f4a7c15ull);
    }
    uint64_t operator()(uint64_t index) const {
        do index = network(index); while (index >= n_);
        return index;
    }

private:
    static constexpr int ROUNDS = 8;
    static uint64_t mix(uint64_t z) {                       // splitmix64's finaliser
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
        return z ^ (z >> 31);
    }
    uint64_t network(uint64_t x) const {
        const uint64_t mask = (1ull << half_bits_) - 1;
        uint64_t left = x >> half_bits_, right = x & mask;
        for (uint64_t key : keys_) {
            const uint64_t next = left ^ (mix(key ^ right) & mask);
            left = right;
            right = next;
        }
        return left << half_bits_ | right;
    }
    uint64_t n_;
    int half_bits_ = 0;
    uint64_t keys_[ROUNDS];
};

// Which set the global sample g draws from, and the how-many-th draw from that set it is, in O(1). Every period of 65,536 global
// samples has exactly each set's share, in an order drawn by (seed, period); so shares are exact to 1/65,536.
class MixtureOrder {
public:
    MixtureOrder(const std::vector<double>& weights, uint64_t seed) : seed_(seed ^ 0x6d69787475726573ull) {
        const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
        double sum = 0;
        for (double weight : weights) {                     // rounded sums, so that the last ends at PERIOD
            sum += weight;
            ends_.push_back((int64_t)std::llround(sum / total * PERIOD));
            if (!(weight > 0) || share(ends_.size() - 1) == 0)
                fail("a weight of %g beside a total of %g draws nothing; leave that set out or give it at least 1/%lld of the total", weight,
                     total, (long long)PERIOD);
        }
    }
    std::pair<int, int64_t> operator()(int64_t g) const {
        if (ends_.size() == 1) return {0, g};
        const int64_t period = g / PERIOD, slot = (int64_t)Permutation(PERIOD, seed_, (uint64_t)period)((uint64_t)(g % PERIOD));
        const size_t set = (size_t)(std::upper_bound(ends_.begin(), ends_.end(), slot) - ends_.begin());
        return {(int)set, period * share(set) + slot - (set ? ends_[set - 1] : 0)};
    }
    static constexpr int64_t PERIOD = 1 << 16;

private:
    int64_t share(size_t set) const { return ends_[set] - (set ? ends_[set - 1] : 0); }
    uint64_t seed_;
    std::vector<int64_t> ends_;                             // in each period, slots [ends_[s-1], ends_[s]) are set s's
};

// The sets that --data names
class Mixture {
public:
    Mixture(const std::vector<std::string>& arguments, int vocab_size) {
        std::vector<std::string> unweighted;
        for (const std::string& argument : arguments) {
            const auto [pattern, weight] = split_weight(argument);
            if (weight < 0) unweighted.push_back(of_folder(pattern));
            else add({of_folder(pattern)}, pattern, weight, vocab_size);
        }
        if (!unweighted.empty() && !owned_.empty()) fail("%s has no weight and others have; write PATTERN:WEIGHT for each", unweighted[0].c_str());
        if (owned_.empty()) add(unweighted, unweighted.empty() ? "" : unweighted[0], 1, vocab_size);
    }

    std::vector<const Shards*> sets() const {
        std::vector<const Shards*> all;
        for (const auto& set : owned_) all.push_back(set.get());
        return all;
    }
    const std::vector<double>& weights() const { return weights_; }
    const std::vector<std::string>& names() const { return names_; }
    double share(size_t set) const { return weights_[set] / std::accumulate(weights_.begin(), weights_.end(), 0.0); }

    int64_t total_tokens() const { return owned_sum([](const Shards& set) { return set.total_tokens(); }); }
    const std::vector<ShardInfo>& info() const { return info_; }        // of all sets
    uint64_t fingerprint() const { return fingerprint_; }
    int eos() const { return eos_; }

private:
    // "PATTERN:0.3" -> PATTERN, 0.3; weight -1 where there is none. A path that exists is taken as it is.
    static std::pair<std::string, double> split_weight(const std::string& argument) {
        struct stat st;
        const size_t colon = argument.rfind(':');
        if (colon == std::string::npos || stat(argument.c_str(), &st) == 0) return {argument, -1};
        char* end = nullptr;
        const std::string text = argument.substr(colon + 1);
        const double weight = strtod(text.c_str(), &end);
        if (text.empty() || *end || !(weight > 0) || !std::isfinite(weight))
            fail("--data %s: '%s' is not a weight; write PATTERN:WEIGHT with a number above 0", argument.c_str(), text.c_str());
        return {argument.substr(0, colon), weight};
    }
    static std::string of_folder(const std::string& pattern) {
        return std::filesystem::is_directory(pattern) ? (std::filesystem::path(pattern) / "train_*.bin").string() : pattern;
    }
    void add(const std::vector<std::string>& patterns, const std::string& name, double weight, int vocab_size) {
        owned_.push_back(std::make_unique<Shards>(patterns, vocab_size));
        const Shards& set = *owned_.back();
        names_.push_back(name);
        weights_.push_back(weight);
        info_.insert(info_.end(), set.info().begin(), set.info().end());
        if (set.fingerprint() && fingerprint_ && set.fingerprint() != fingerprint_)
            fail("%s and %s were made with different tokenizers, by fingerprint: %llu and %llu; train on one kind", names_[0].c_str(), name.c_str(),
                 (unsigned long long)fingerprint_, (unsigned long long)set.fingerprint());
        if (set.eos() >= 0 && eos_ >= 0 && set.eos() != eos_)
            fail("%s and %s were made with different EOS ids: %d and %d; train on one kind", names_[0].c_str(), name.c_str(), eos_, set.eos());
        if (set.fingerprint()) fingerprint_ = set.fingerprint();
        if (set.eos() >= 0) eos_ = set.eos();
    }
    template <class F> int64_t owned_sum(F f) const {
        int64_t sum = 0;
        for (const auto& set : owned_) sum += f(*set);
        return sum;
    }

    std::vector<std::unique_ptr<Shards>> owned_;
    std::vector<std::string> names_;
    std::vector<double> weights_;
    std::vector<ShardInfo> info_;
    uint64_t fingerprint_ = 0;
    int eos_ = -1;
};
