// Token shards: files of uint16 tokens, cut into samples of T inputs and T targets.
//
//   this project, llm.c   1,024-byte header of 256 little-endian int32, then the tokens
//                         [0] 20240520  [1] 1  [2] token count, low 32 bits
//                         and words that llm.c leaves zero:  [3] vocabulary size  [4] EOS id + 1  [5] [6] tokenizer fingerprint,
//                         low and high  [7] token count, high 32 bits. Zero = unknown
//   official Samba        24-byte header: "LITPKDS", u64 version 1, u8 dtype (8 = uint16), u64 token count; then the tokens
//
// Sample k of a shard reads tokens [k*T, k*T + T], both ends included: inputs are the first T, targets the last T. The stride is
// T, so that every token but a shard's first is a target exactly once, up to a tail shorter than a sample. Samples never cross
// shards. Sample numbers run over the shards in sorted path order.
#pragma once
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "files.h"

struct ShardInfo {
    std::string path;
    int64_t tokens = 0;
    int vocab_size = 0;          // 0 unknown
    int eos = -1;                // -1 unknown
    uint64_t fingerprint = 0;    // of the tokenizer: fnv1a64 of the bytes of its .model file; 0 unknown
};

constexpr int32_t SHARD_MAGIC = 20240520;
constexpr size_t SHARD_HEADER_BYTES = 1024, LITPKDS_HEADER_BYTES = 24;

class Shards {
public:
    // vocab_size is the model's, padding included: a shard of a larger vocabulary is refused, and so is a token outside it. 0 = check neither.
    Shards(const std::vector<std::string>& patterns, int vocab_size) : vocab_size_(vocab_size) {
        const std::vector<std::string> paths = expand_globs(patterns);
        if (paths.empty()) fail("no token shards were named; give files, for example --data 'data/NAME/train_*.bin'");
        for (const std::string& path : paths) add(path);
    }

    int64_t total_tokens() const {
        int64_t total = 0;
        for (const ShardInfo& shard : info_) total += shard.tokens;
        return total;
    }
    int64_t samples(int64_t T) const { return sample_ends(T).back(); }
    const std::vector<ShardInfo>& info() const { return info_; }

    // What the shards know, all the same by construction: 0, -1, 0 where none of them says
    int vocab_size() const { return vocab_.value; }
    int eos() const { return eos_.value ? (int)eos_.value - 1 : -1; }
    uint64_t fingerprint() const { return fingerprint_.value; }

    // tokens (T) and targets (T) of one sample, and where asked for, starts (T): 1 where a document starts, which is after each
    // `eos` and at a shard's first token (what was before it is not known). May be called from several threads.
    void read(int64_t sample, int64_t T, int* tokens, int* targets, uint8_t* starts = nullptr, int eos = -1) const {
        const std::vector<int64_t>& ends = sample_ends(T);
        const size_t s = (size_t)(std::upper_bound(ends.begin(), ends.end(), sample) - ends.begin());
        if (sample < 0 || s == ends.size())
            fail("sample %lld does not exist: there are %lld samples of %lld tokens", (long long)sample, (long long)ends.back(), (long long)T);
        const int64_t k = s ? sample - ends[s - 1] : sample;
        read_at(s, k * T, T, tokens, targets);
        if (!starts) return;
        const uint16_t* p = shard_tokens(s) + k * T;
        starts[0] = k == 0 || p[-1] == eos;
        for (int64_t t = 1; t < T; t++) starts[t] = p[t - 1] == eos;
    }
    // The same `count` tokens and targets from any place of a shard: position first
    void read_at(size_t shard, int64_t first, int64_t count, int* tokens, int* targets) const {
        if (shard >= info_.size() || first < 0 || count < 0 || first + count >= info_[shard].tokens)
            fail("%lld tokens from position %lld of shard %zu do not exist", (long long)count, (long long)first, shard);
        const uint16_t* p = shard_tokens(shard) + first;
        for (int64_t t = 0; t < count; t++) tokens[t] = p[t];
        for (int64_t t = 0; t < count; t++) targets[t] = p[t + 1];
        if (vocab_size_ > 0) check_tokens(shard, first, p, count + 1);
    }

private:
    const uint16_t* shard_tokens(size_t shard) const { return (const uint16_t*)(files_[shard].data + header_bytes_[shard]); }
    static int64_t samples_of(const ShardInfo& shard, int64_t T) {
        if (T < 1) fail("a sample must have at least 1 token, not %lld", (long long)T);
        return (shard.tokens - 1) / T;
    }

    // For each shard, the samples in it and all before it: found once for each T, then searched by halves.
    const std::vector<int64_t>& sample_ends(int64_t T) const {
        std::lock_guard<std::mutex> lock(*ends_mutex_);
        std::vector<int64_t>& ends = ends_[T];
        if (ends.empty()) {
            int64_t total = 0;
            for (const ShardInfo& shard : info_) ends.push_back(total += samples_of(shard, T));
        }
        return ends;
    }

    void check_tokens(size_t s, int64_t first, const uint16_t* p, int64_t n) const {
        int largest = 0;
        for (int64_t i = 0; i < n; i++) largest = std::max(largest, (int)p[i]);
        if (largest < vocab_size_) return;
        for (int64_t i = 0; i < n; i++)
            if (p[i] >= vocab_size_)
                fail("%s: token %d at position %lld is outside the vocabulary of %d; prepare the data with this model's tokenizer",
                     info_[s].path.c_str(), p[i], (long long)(first + i), vocab_size_);
    }

    void add(const std::string& path) {
        MappedFile file(path);
        const bool litpkds = file.size >= 7 && memcmp(file.data, "LITPKDS", 7) == 0;
        const size_t header = litpkds ? LITPKDS_HEADER_BYTES : SHARD_HEADER_BYTES;
        if (!litpkds && file.size >= 4 && word<int32_t>(file, 0) != SHARD_MAGIC)
            fail("%s is not a token shard: it begins with %d, not %d or LITPKDS; prepare it with data/prepare.py", path.c_str(),
                 word<int32_t>(file, 0), SHARD_MAGIC);
        if (file.size < header)
            fail("%s is too short for a token shard: %zu bytes, its header alone has %zu; prepare it again", path.c_str(), file.size, header);
        ShardInfo shard = litpkds ? parse_litpkds(path, file) : parse_header(path, file);
        shard.path = path;
        const uint64_t expected = header + 2 * (uint64_t)shard.tokens;
        if (shard.tokens == 0) fail("%s is empty: its header says 0 tokens; remove it", path.c_str());
        if (file.size != expected)
            fail("%s is %s: its header says %lld tokens, %llu bytes, and the file has %zu; copy or prepare it again", path.c_str(),
                 file.size < expected ? "cut off" : "too long", (long long)shard.tokens, (unsigned long long)expected, file.size);
        if (vocab_size_ > 0 && shard.vocab_size > vocab_size_)
            fail("%s was prepared with a vocabulary of %d and the model has only %d; use a model or data of the same tokenizer", path.c_str(),
                 shard.vocab_size, vocab_size_);
        agree(vocab_, (uint64_t)shard.vocab_size, path, "vocabularies");
        agree(eos_, (uint64_t)(shard.eos + 1), path, "EOS ids (plus one)");
        agree(fingerprint_, shard.fingerprint, path, "tokenizers, by fingerprint");
        info_.push_back(shard);
        header_bytes_.push_back(header);
        files_.push_back(std::move(file));
    }

    static ShardInfo parse_header(const std::string& path, const MappedFile& file) {
        ShardInfo shard;
        const int32_t version = word<int32_t>(file, 4), vocab = word<int32_t>(file, 12), eos = word<int32_t>(file, 16);
        if (version != 1) fail("%s: token shard version %d; this program reads version 1", path.c_str(), version);
        const uint64_t count = word<uint32_t>(file, 8) | (uint64_t)word<uint32_t>(file, 28) << 32;
        shard.tokens = checked_count(path, count);
        if (vocab < 0 || vocab > 65536) fail("%s: the header says a vocabulary of %d; 16-bit tokens allow 1 to 65536", path.c_str(), vocab);
        if (eos < 0 || eos > (vocab ? vocab : 65536))
            fail("%s: the header says EOS id %lld outside its vocabulary of %d", path.c_str(), (long long)eos - 1, vocab);
        shard.vocab_size = vocab;
        shard.eos = eos - 1;
        shard.fingerprint = word<uint64_t>(file, 20);
        return shard;
    }
    static ShardInfo parse_litpkds(const std::string& path, const MappedFile& file) {
        ShardInfo shard;
        const uint64_t version = word<uint64_t>(file, 7);
        const int dtype = file.data[15];
        if (version != 1) fail("%s: LITPKDS version %llu; this program reads version 1", path.c_str(), (unsigned long long)version);
        if (dtype != 8) fail("%s: LITPKDS tokens of dtype code %d; only 8 (uint16) is read", path.c_str(), dtype);
        shard.tokens = checked_count(path, word<uint64_t>(file, 16));
        return shard;
    }
    static int64_t checked_count(const std::string& path, uint64_t count) {      // so that sizes below cannot overflow
        if (count >> 60) fail("%s: the header says %llu tokens; it is damaged, copy or prepare it again", path.c_str(), (unsigned long long)count);
        return (int64_t)count;
    }
    template <class W> static W word(const MappedFile& file, size_t offset) {
        W value;
        memcpy(&value, file.data + offset, sizeof value);
        return value;
    }

    // A property that all shards which know it must share
    struct Shared { uint64_t value = 0; std::string path; };
    static void agree(Shared& shared, uint64_t value, const std::string& path, const char* what) {
        if (value == 0) return;
        if (shared.value != 0 && shared.value != value)
            fail("%s and %s were made with different %s: %llu and %llu; train on one kind", shared.path.c_str(), path.c_str(), what,
                 (unsigned long long)shared.value, (unsigned long long)value);
        if (shared.value == 0) shared = {value, path};
    }

    int vocab_size_;
    Shared vocab_, eos_, fingerprint_;
    std::vector<ShardInfo> info_;
    std::vector<size_t> header_bytes_;
    std::vector<MappedFile> files_;
    mutable std::map<int64_t, std::vector<int64_t>> ends_;                     // by T
    std::unique_ptr<std::mutex> ends_mutex_ = std::make_unique<std::mutex>();  // guards ends_, whose entries stay where they are
};

// Header of a shard, 1,024 bytes. data/prepare.py writes the same.
inline std::string shard_header(int64_t tokens, int vocab_size, int eos, uint64_t fingerprint) {
    const auto low = [](uint64_t x) { return (int32_t)(x & 0xffffffff); };
    const auto high = [](uint64_t x) { return (int32_t)(x >> 32); };
    int32_t words[256] = {SHARD_MAGIC, 1, low(tokens), vocab_size, eos + 1, low(fingerprint), high(fingerprint), high(tokens)};
    return std::string((const char*)words, sizeof words);
}
