// Reads sequences of any length in chunks, with the state carried along: memory depends on the chunk, not on the length. The
// device never waits for the host: while it computes a chunk, the host fetches the next one and looks at the losses of the last.
#pragma once
#include "../samba.cuh"

class LongReader {
public:
    // Up to B sequences at a time, T tokens of each in a chunk. max_context: the longest sequence (what full attention needs room for)
    LongReader(Model& m, int64_t B, int64_t T, int64_t max_context) : m_(m), B_(B), T_(T) {
        state_.create(m.layout, B, max_context, m.stream);
        for (Slot& slot : slots_) {
            slot.tokens = (int*)pinned_alloc((size_t)(B * T) * (2 * sizeof(int) + sizeof(float) + sizeof(uint8_t)));
            slot.targets = slot.tokens + B * T;
            slot.losses = (float*)(slot.targets + B * T);
            slot.greedy = (uint8_t*)(slot.losses + B * T);
            slot.done = event_create();
        }
    }
    LongReader(const LongReader&) = delete;
    LongReader& operator=(const LongReader&) = delete;
    ~LongReader() {
        for (Slot& slot : slots_) {
            try { event_destroy(slot.done); pinned_free(slot.tokens); } catch (...) {}         // the device may be gone already
        }
    }

    size_t bytes() const { return m_.w.arena.bytes() + m_.acts.bytes() + state_.arena.bytes(); }   // on the device: all of it

    // Reads `length` tokens of each of `count` sequences, all from an empty state.
    //   fetch(first, n, tokens, targets)     must write (count,n) tokens and targets: positions first .. first + n - 1
    //   see(first, n, losses, greedy)        gets (count,n) losses of the same positions, in order, and whether a target is the likeliest
    template <class Fetch, class See> void read(int64_t count, int64_t length, Fetch fetch, See see) {
        state_.reset(m_.layout, m_.stream);
        const auto look_at = [&](int64_t k) {
            event_sync(slots_[k % 2].done);
            see(k * T_, std::min(T_, length - k * T_), (const float*)slots_[k % 2].losses, (const uint8_t*)slots_[k % 2].greedy);
        };
        const int64_t chunks = ceil_div(length, T_);
        for (int64_t k = 0; k < chunks; k++) {
            const Slot& slot = slots_[k % 2];
            const int64_t n = std::min(T_, length - k * T_);
            fetch(k * T_, n, slot.tokens, slot.targets);
            upload_tokens(m_, slot.tokens, slot.targets, count * n);
            evaluate(m_, (int)count, n, &state_);
            copy_to_host(slot.losses, m_.acts.losses, (size_t)(count * n) * sizeof(float), m_.stream);
            copy_to_host(slot.greedy, m_.acts.greedy, (size_t)(count * n), m_.stream);
            event_record(slot.done, m_.stream);
            if (k > 0) look_at(k - 1);
        }
        if (chunks > 0) look_at(chunks - 1);
    }

private:
    struct Slot { int *tokens, *targets; float* losses; uint8_t* greedy; Event done; };     // (B,T) each
    Model& m_;
    const int64_t B_, T_;
    SequenceState state_;
    Slot slots_[2];
};
