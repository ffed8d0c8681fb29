// DataLoader: the batches of a run, in an order that depends on nothing but (seed, epoch, global sample index).
//
//   global sample g      epoch = g / N, index = g % N, sample = permutation_{seed, epoch}(index), N samples in the shards
//   step                 takes the next samples_per_step global samples
//   micro-batch a of rank r of world, row b     global sample  step start + a * (world * B) + r * B + b
//
// So rank, world and B only choose which part of the global batch a process takes: 1 or 64 GPUs train on the same batches. The
// whole state is one integer, position(), and seek() is O(1): the permutation is computed, not stored.
#pragma once
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

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

// One micro-batch in pinned host memory: rows of T inputs and T targets. Valid until next() has been called twice more, so
// that the copy of one batch to the device may still run while the next one is fetched.
struct Batch {
    int* tokens = nullptr;       // (B, T)
    int* targets = nullptr;      // (B, T)
};

class DataLoader {
public:
    // `shards` must outlive the loader. Starts at global sample 0, prefetching at once.
    DataLoader(const Shards& shards, int64_t B, int64_t T, int64_t samples_per_step, int rank, int world, uint64_t seed, bool shuffle)
        : shards_(shards), B_(B), T_(T), samples_per_step_(samples_per_step), rank_(rank), world_(world), seed_(seed), shuffle_(shuffle) {
        if (B < 1 || T < 1) fail("a micro-batch of %lld samples of %lld tokens is empty; both must be at least 1", (long long)B, (long long)T);
        if (world < 1 || rank < 0 || rank >= world) fail("rank %d of %d does not exist", rank, world);
        if (samples_per_step < 1 || samples_per_step % (world * B) != 0)
            fail("a global batch of %lld samples is not a multiple of %lld (%d ranks x micro-batch %lld); change --global-batch or --micro-batch",
                 (long long)samples_per_step, (long long)(world * B), world, (long long)B);
        samples_ = shards.samples(T);
        if (samples_ == 0) fail_too_short();
        pinned_ = (int*)pinned_alloc(SLOTS * 2 * slot_ints() * sizeof(int));
        start();
    }
    DataLoader(const Shards&&, int64_t, int64_t, int64_t, int, int, uint64_t, bool) = delete;      // a temporary would not outlive it
    DataLoader(const DataLoader&) = delete;
    DataLoader& operator=(const DataLoader&) = delete;
    ~DataLoader() {
        stop();
        try { pinned_free(pinned_); } catch (...) {}       // the device may be gone already
    }

    int64_t samples_per_epoch() const { return samples_; }
    int64_t micro_steps() const { return samples_per_step_ / (world_ * B_); }                       // next() calls per step and rank

    // Global index of the first sample of the step that the next call of next() belongs to. After the last micro-batch of a
    // step it is the start of the following one: saved there, seek(position()) continues with exactly the batches that would
    // have come. Saved inside a step, it begins that step anew.
    int64_t position() const { return step_start_; }

    // The next batch is the first micro-batch of a step that begins at this global sample. Any value >= 0, so that a run may
    // be resumed with another global batch. Batches handed out earlier stay valid.
    void seek(int64_t global_sample) {
        if (global_sample < 0) fail("cannot seek the data to global sample %lld", (long long)global_sample);
        stop();
        step_start_ = global_sample;
        micro_step_ = 0;
        start();
    }

    // This rank's next micro-batch. Waits for the prefetch thread; an error there (a token outside the vocabulary) is thrown
    // here, when its batch is due, and again on every further call.
    Batch next() {
        std::unique_lock<std::mutex> lock(mutex_);
        if (taken_ >= 2) released_ = taken_ - 1;          // all but the last batch handed out
        room_.notify_one();
        ready_.wait(lock, [&] { return filled_ > taken_ || error_; });
        if (filled_ == taken_) std::rethrow_exception(error_);
        const Batch batch = slot(taken_++);
        if (++micro_step_ == micro_steps()) {
            micro_step_ = 0;
            step_start_ += samples_per_step_;
        }
        return batch;
    }

    // The sample that a global sample index stands for
    int64_t sample_at(int64_t global_sample) const {
        const int64_t epoch = global_sample / samples_, index = global_sample % samples_;
        return shuffle_ ? (int64_t)Permutation((uint64_t)samples_, seed_, (uint64_t)epoch)((uint64_t)index) : index;
    }

private:
    static constexpr int64_t SLOTS = 5;                    // two handed out, two ready, one being filled

    [[noreturn]] void fail_too_short() const {
        const ShardInfo* longest = &shards_.info()[0];
        for (const ShardInfo& shard : shards_.info())
            if (shard.tokens > longest->tokens) longest = &shard;
        fail("no shard holds a sample of %lld + 1 tokens; the longest, %s, has %lld: use a smaller --seq-len or more data",
             (long long)T_, longest->path.c_str(), (long long)longest->tokens);
    }

    int64_t slot_ints() const { return B_ * T_; }
    Batch slot(int64_t batch) const {
        int* tokens = pinned_ + (batch % SLOTS) * 2 * slot_ints();
        return {tokens, tokens + slot_ints()};
    }

    // Batches are numbered from the first of this object's life and never renumbered, so that a seek cannot overwrite one that
    // was handed out: batch n lives in slot n % SLOTS and may be filled once batch n - SLOTS is released.
    void start() {
        filled_ = taken_;
        error_ = nullptr;
        stopping_ = false;
        thread_ = std::thread([this, start = step_start_] { prefetch(start); });
    }
    void stop() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stopping_ = true;
        }
        room_.notify_one();
        if (thread_.joinable()) thread_.join();
    }

    void prefetch(int64_t step_start) {
        int64_t micro_step = 0;
        for (;;) {
            int64_t n;
            {
                std::unique_lock<std::mutex> lock(mutex_);
                room_.wait(lock, [&] { return stopping_ || filled_ < released_ + SLOTS; });
                if (stopping_) return;
                n = filled_;
            }
            std::exception_ptr error;
            try {
                fill(slot(n), step_start + micro_step * world_ * B_ + rank_ * B_);
            } catch (...) {
                error = std::current_exception();
            }
            {
                std::lock_guard<std::mutex> lock(mutex_);
                if (error) error_ = error;
                else filled_++;
            }
            ready_.notify_one();
            if (error) return;
            if (++micro_step == micro_steps()) {
                micro_step = 0;
                step_start += samples_per_step_;
            }
        }
    }
    void fill(const Batch& batch, int64_t first) const {
        for (int64_t b = 0; b < B_; b++) shards_.read(sample_at(first + b), T_, batch.tokens + b * T_, batch.targets + b * T_);
    }

    const Shards& shards_;
    const int64_t B_, T_, samples_per_step_;
    const int rank_, world_;
    const uint64_t seed_;
    const bool shuffle_;
    int64_t samples_ = 0;                                  // N
    int* pinned_ = nullptr;                                // (SLOTS, 2, B, T)

    int64_t step_start_ = 0, micro_step_ = 0;              // of the next batch to hand out

    std::mutex mutex_;                                     // guards the rest
    std::condition_variable ready_, room_;
    int64_t filled_ = 0, taken_ = 0, released_ = 0;        // batches with a smaller number are filled, handed out, free again
    bool stopping_ = false;
    std::exception_ptr error_;
    std::thread thread_;
};
