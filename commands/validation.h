// Validation, of a training run and of train_samba eval.
#pragma once
#include <numeric>

#include "../data/loader.h"
#include "../data/run_log.h"
#include "common.h"

// "1x","4x" -> {1,4}, sorted
inline std::vector<int64_t> length_multiples(const std::vector<std::string>& texts) {
    std::vector<int64_t> multiples;
    for (const std::string& text : texts) {
        char* end = nullptr;
        const long n = std::strtol(text.c_str(), &end, 10);
        if (n < 1 || n > 1000000 || std::string(end) != "x") fail("--val-lengths %s: write multiples of --seq-len as 1x,2x,4x", text.c_str());
        multiples.push_back(n);
    }
    std::sort(multiples.begin(), multiples.end());
    multiples.erase(std::unique(multiples.begin(), multiples.end()), multiples.end());
    return multiples;
}

// ---------------------------------------------------------------------------------------------------------------------
// Validation: mean loss over the first k*T tokens, for several k, in one pass over the longest. The sequence is read in
// chunks of T with the state carried along, so that memory does not depend on k.

// Processes take turns with the batches.
struct Validation {
    Model& m;
    const Comm& comm;
    const int64_t T;
    std::vector<int64_t> multiples;
    int64_t B = 0, batches = 0;
    std::unique_ptr<DataLoader> loader;
    SequenceState state;
    std::vector<int> tokens, targets;      // (B,T) of one chunk
    std::vector<float> losses;             // (B,T)

    // Lengths that the data is too short for are dropped with a line that says so.
    Validation(Model& m, const Comm& comm, const Shards& shards, std::vector<int64_t> wanted, int64_t max_B, int64_t T, int64_t max_batches)
        : m(m), comm(comm), T(T), multiples(std::move(wanted)) {
        while (!multiples.empty() && shards.samples(multiples.back() * T) == 0) {
            if (comm.main())
                fprintf(stderr, "validation at %lld tokens is left out: no validation shard is that long\n", (long long)(multiples.back() * T));
            multiples.pop_back();
        }
        if (multiples.empty())
            fail("%s: too short to validate on: a sequence of %lld + 1 tokens is needed", shards.info()[0].path.c_str(), (long long)T);
        const int64_t samples = shards.samples(multiples.back() * T);
        B = std::min(max_B, samples);
        batches = std::min(max_batches, samples / B);
        loader = std::make_unique<DataLoader>(shards, B, multiples.back() * T, B * comm.world, comm.rank, comm.world, 0, false);
        tokens.resize(B * T);
        targets.resize(B * T);
        losses.resize(B * T);
        state.create(m.layout, B, multiples.back() * T, m.stream);
    }

    // (length in tokens, mean loss) for each multiple
    std::vector<std::pair<int64_t, double>> run() {
        const int64_t chunks = multiples.back();
        std::vector<double> own(batches * chunks, 0.0), sums(chunks, 0.0);
        ProgressBar bar("validation", (double)(batches * chunks));
        loader->seek(0);
        for (int64_t i = comm.rank; i < batches; i += comm.world) {
            const Batch batch = loader->next();                                                            // (B,chunks*T)
            state.reset(m.layout, m.stream);
            for (int64_t k = 0; k < chunks; k++) {
                for (int64_t b = 0; b < B; b++) {
                    std::copy_n(batch.tokens + (b * chunks + k) * T, T, tokens.data() + b * T);
                    std::copy_n(batch.targets + (b * chunks + k) * T, T, targets.data() + b * T);
                }
                upload_tokens(m, tokens.data(), targets.data(), B * T);
                evaluate(m, (int)B, T, &state);
                comm.tick();
                copy_to_host(losses.data(), m.acts.losses, B * T * sizeof(float), m.stream);
                stream_sync(m.stream);
                own[i * chunks + k] = std::accumulate(losses.begin(), losses.end(), 0.0);
                bar.add(comm.world);
            }
        }
        const std::vector<std::vector<double>> all = comm.all_rows(own);
        for (int64_t i = 0; i < batches * chunks; i++) sums[i % chunks] += all[i / chunks % comm.world][i];
        std::vector<std::pair<int64_t, double>> result;
        for (int64_t k : multiples)
            result.emplace_back(k * T, std::accumulate(sums.begin(), sums.begin() + k, 0.0) / (double)(batches * B * T * k));
        return result;
    }
};
