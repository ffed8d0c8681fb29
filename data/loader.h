// DataLoader: the batches of a run, in an order that depends on nothing but (seed, epoch, global sample index).
//
//   global sample g      epoch = g / N, index = g % N, sample = permutation_{seed, epoch}(index), N samples in the shards
//                        (of a mixture: first the set that g draws from and the how-many-th draw from it g is, then that as g)
//   step                 takes the next samples_per_step global samples
//   micro-batch a of rank r of world, row b     global sample  step start + a * (world * B) + r * B + b
//
// So rank, world and B only choose which part of the global batch a process takes: 1 or 64 GPUs train on the same batches. The
// whole state is one integer, position(), and seek() is O(1): the permutation is computed, not stored.
#pragma once
#include <condition_variable>
#include <exception>
#include <mutex>
#include <numeric>
#include <thread>

#include "mixture.h"

// One micro-batch in pinned host memory: rows of T inputs and T targets. Valid until next() has been called twice more, so
// that the copy of one batch to the device may still run while the next one is fetched.
struct Batch {
    int* tokens = nullptr;       // (B, T)
    int* targets = nullptr;      // (B, T)
    uint8_t* starts = nullptr;   // (B, T), only if asked for: 1 where a document starts, so that masks and state can be reset there
};

class DataLoader {
public:
    // The sets must outlive the loader. Starts at global sample 0, prefetching at once. document_eos >= 0 asks for Batch::starts:
    // documents start after this token (Shards::eos() where the shards know it).
    DataLoader(const Mixture& mixture, int64_t B, int64_t T, int64_t samples_per_step, int rank, int world, uint64_t seed, bool shuffle,
               int document_eos = -1)
        : DataLoader(mixture.sets(), mixture.weights(), B, T, samples_per_step, rank, world, seed, shuffle, document_eos) {}
    DataLoader(const Shards& shards, int64_t B, int64_t T, int64_t samples_per_step, int rank, int world, uint64_t seed, bool shuffle,
               int document_eos = -1)
        : DataLoader({&shards}, {1.0}, B, T, samples_per_step, rank, world, seed, shuffle, document_eos) {}
    DataLoader(const Shards&&, int64_t, int64_t, int64_t, int, int, uint64_t, bool, int = -1) = delete;      // a temporary would not outlive it
    DataLoader(const Mixture&&, int64_t, int64_t, int64_t, int, int, uint64_t, bool, int = -1) = delete;
    DataLoader(const DataLoader&) = delete;
    DataLoader& operator=(const DataLoader&) = delete;
    ~DataLoader() {
        stop();
        try { pinned_free(pinned_); } catch (...) {}       // the device may be gone already
    }

    int64_t samples_per_epoch() const { return std::accumulate(samples_.begin(), samples_.end(), (int64_t)0); }  // of all sets
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

    // The set and its sample that a global sample index stands for
    struct Place { int set; int64_t sample; };
    Place place_at(int64_t global_sample) const {
        const auto [set, draw] = order_(global_sample);
        const int64_t N = samples_[(size_t)set], epoch = draw / N, index = draw % N;
        if (!shuffle_) return {set, index};
        const Permutation order((uint64_t)N, seed_ + (uint64_t)set * 0x9e3779b97f4a7c15ull, (uint64_t)epoch);
        return {set, (int64_t)order((uint64_t)index)};
    }
    int64_t sample_at(int64_t global_sample) const { return place_at(global_sample).sample; }

private:
    static constexpr int64_t SLOTS = 5;                    // two handed out, two ready, one being filled

    DataLoader(std::vector<const Shards*> sets, const std::vector<double>& weights, int64_t B, int64_t T, int64_t samples_per_step, int rank,
               int world, uint64_t seed, bool shuffle, int document_eos)
        : sets_(std::move(sets)), order_(weights, seed), B_(B), T_(T), samples_per_step_(samples_per_step), rank_(rank), world_(world),
          seed_(seed), shuffle_(shuffle), eos_(document_eos) {
        if (B < 1 || T < 1) fail("a micro-batch of %lld samples of %lld tokens is empty; both must be at least 1", (long long)B, (long long)T);
        if (world < 1 || rank < 0 || rank >= world) fail("rank %d of %d does not exist", rank, world);
        if (samples_per_step < 1 || samples_per_step % (world * B) != 0)
            fail("a global batch of %lld samples is not a multiple of %lld (%d ranks x micro-batch %lld); change --global-batch or --micro-batch",
                 (long long)samples_per_step, (long long)(world * B), world, (long long)B);
        for (const Shards* set : sets_) {
            samples_.push_back(set->samples(T));
            if (samples_.back() == 0) fail_too_short(*set);
        }
        pinned_ = (uint8_t*)pinned_alloc(SLOTS * slot_bytes());
        start();
    }

    [[noreturn]] void fail_too_short(const Shards& shards) const {
        const ShardInfo* longest = &shards.info()[0];
        for (const ShardInfo& shard : shards.info())
            if (shard.tokens > longest->tokens) longest = &shard;
        fail("no shard holds a sample of %lld + 1 tokens; the longest, %s, has %lld: use a smaller --seq-len or more data",
             (long long)T_, longest->path.c_str(), (long long)longest->tokens);
    }

    int64_t slot_ints() const { return B_ * T_; }
    size_t slot_bytes() const { return ((size_t)slot_ints() * (2 * sizeof(int) + (eos_ >= 0)) + 63) / 64 * 64; }
    Batch slot(int64_t batch) const {
        int* tokens = (int*)(pinned_ + (size_t)(batch % SLOTS) * slot_bytes());
        return {tokens, tokens + slot_ints(), eos_ >= 0 ? (uint8_t*)(tokens + 2 * slot_ints()) : nullptr};
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
        for (int64_t b = 0; b < B_; b++) {
            const Place place = place_at(first + b);
            uint8_t* starts = batch.starts ? batch.starts + b * T_ : nullptr;
            sets_[(size_t)place.set]->read(place.sample, T_, batch.tokens + b * T_, batch.targets + b * T_, starts, eos_);
        }
    }

    const std::vector<const Shards*> sets_;
    const MixtureOrder order_;
    const int64_t B_, T_, samples_per_step_;
    const int rank_, world_;
    const uint64_t seed_;
    const bool shuffle_;
    const int eos_;                                        // documents start after it; -1: starts are not asked for
    std::vector<int64_t> samples_;                         // N of each set
    uint8_t* pinned_ = nullptr;                            // SLOTS of tokens (B, T), targets (B, T), starts (B, T)

    int64_t step_start_ = 0, micro_step_ = 0;              // of the next batch to hand out

    std::mutex mutex_;                                     // guards the rest
    std::condition_variable ready_, room_;
    int64_t filled_ = 0, taken_ = 0, released_ = 0;        // batches with a smaller number are filled, handed out, free again
    bool stopping_ = false;
    std::exception_ptr error_;
    std::thread thread_;
};
