// Random numbers from a counter, and the settings of a draw from the logits: shared by both builds.
#pragma once
#include <cstdint>

// Element i of stream `key`: a number in (0,1), so that a value depends only on (seed, name, i).
constexpr double counter_uniform(uint64_t key, uint64_t i) {
    uint64_t z = key + (i + 1) * 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    z ^= z >> 31;
    return ((double)(z >> 11) + 0.5) * 0x1p-53;
}

// How a token is drawn (decode_sample)
struct SampleOptions {
    float temperature = 1;                 // 0: always the most likely
    int top_k = 0;                         // only the k most likely; 0: all
    float top_p = 1;                       // then only the most likely that reach this probability
    float penalty = 1;                     // of tokens seen before: positive logits are divided by it, negative ones multiplied
};

constexpr double SAMPLE_MASS = 0x1p40;     // the most likely token's weight: weights are integers, so that sums have no order
constexpr int EMIT_SLOTS = 16;             // draws that the host may be behind
