// Collectives through host memory and MPI or TCP (ranks.h): the CPU build's, and those of ranks that share a GPU. What they do: comm.cuh.
// Contributions are added in the order of ranks: the same bits every time.
#pragma once
#include "../ops.cuh"
#include "ranks.h"

class CollectivesThroughHost {
    static constexpr int64_t STAGING = 1 << 20;    // floats on their way to or from each rank at a time
    const Ranks& ranks_;
    Stream stream_{};                              // copies to and from the device
    float* staging_ = nullptr;                     // host: (2, world, STAGING), to be sent and received
    uint16_t* rounded_ = nullptr;                  // the same in bf16, where sums travel so

public:
    explicit CollectivesThroughHost(const Ranks& ranks) : ranks_(ranks) {}

    void start(Stream stream) {
        stream_ = stream;
        if (ranks_.world > 1) staging_ = (float*)pinned_alloc((size_t)STAGING * (size_t)ranks_.world * 2 * sizeof(float));
    }
    void reduce_as_bf16() { if (ranks_.world > 1) rounded_ = (uint16_t*)pinned_alloc((size_t)STAGING * (size_t)ranks_.world * 2 * sizeof(uint16_t)); }

    void reduce(float* x, Range range, const std::vector<int64_t>& bounds) {
        const int rank = ranks_.rank, world = ranks_.world;
        pieces(range, bounds, STAGING, [&](const std::vector<Range>& part) {
            float *out = staging_, *in = staging_ + world * STAGING;
            const int64_t n = part[rank].size();
            for (int r = 0; r < world; r++)
                copy_to_host((r == rank ? in : out) + r * STAGING, x + part[r].begin, (size_t)part[r].size() * sizeof(float), stream_);
            stream_sync(stream_);
            if (rounded_) exchange_rounded(in, out, part);
            else exchange_parts(in, out, part);
            for (int r = 1; r < world; r++)
                for (int64_t i = 0; i < n; i++) in[i] += in[r * STAGING + i];
            copy_to_device(x + part[rank].begin, in, (size_t)n * sizeof(float), stream_);
            stream_sync(stream_);
        });
    }

    void all_gather(char* x, size_t size, Range range, const std::vector<int64_t>& bounds) {
        const int rank = ranks_.rank, world = ranks_.world;
        const int64_t piece = STAGING * (int64_t)sizeof(float) / (int64_t)size, stride = STAGING * (int64_t)sizeof(float);
        pieces(range, bounds, piece, [&](const std::vector<Range>& part) {
            char *out = (char*)staging_, *in = out + world * stride;
            const auto bytes = [&](int r) { return part[r].size() * (int64_t)size; };
            copy_to_host(out, x + part[rank].begin * (int64_t)size, (size_t)bytes(rank), stream_);
            stream_sync(stream_);
            const Ranks::During during(ranks_, Guard::waiting, "exchanging weights");
            for (int s = 1; s < world; s++) {
                const int to = (rank + s) % world, from = (rank - s + world) % world;
                ranks_.exchange(to, out, bytes(rank), from, in + from * stride, bytes(from));
                copy_to_device(x + part[from].begin * (int64_t)size, in + from * stride, (size_t)bytes(from), stream_);
                ranks_.tick();
            }
            stream_sync(stream_);
        });
    }

    void shift(char* in, const char* out, int64_t bytes, int to, int from) {
        const int64_t piece = STAGING * (int64_t)sizeof(float);
        char *host_out = (char*)staging_, *host_in = host_out + ranks_.world * piece;
        for (int64_t at = 0; at < bytes; at += piece) {
            const int64_t size = std::min(piece, bytes - at);
            copy_to_host(host_out, out + at, (size_t)size, stream_);
            stream_sync(stream_);
            ranks_.exchange(to, host_out, size, from, host_in, size);
            copy_to_device(in + at, host_in, (size_t)size, stream_);
            stream_sync(stream_);
        }
    }

private:
    // Walks the shards in pieces of the staging buffer: body(each rank's part of the piece)
    template <class F> void pieces(Range range, const std::vector<int64_t>& bounds, int64_t piece, F body) const {
        std::vector<Range> part(ranks_.world), now(ranks_.world);
        int64_t longest = 0;
        for (int r = 0; r < ranks_.world; r++) {
            part[r] = range & Range{bounds[r], bounds[r + 1]};
            longest = std::max(longest, part[r].size());
        }
        for (int64_t at = 0; at < longest; at += piece) {
            for (int r = 0; r < ranks_.world; r++) now[r] = part[r] & Range{part[r].begin + at, part[r].begin + at + piece};
            body(now);
        }
    }

    // Each rank's part of `out` to that rank, and everybody's piece of this rank's part into `in`, both (world, STAGING)
    template <class T> void exchange_parts(T* in, const T* out, const std::vector<Range>& part) const {
        const int rank = ranks_.rank, world = ranks_.world;
        const Ranks::During during(ranks_, Guard::waiting, "exchanging gradients");
        for (int s = 1; s < world; s++) {
            const int to = (rank + s) % world, from = (rank - s + world) % world;
            const auto bytes = [&](int r) { return part[r].size() * (int64_t)sizeof(T); };
            ranks_.exchange(to, out + to * STAGING, bytes(to), from, in + from * STAGING, bytes(rank));
            ranks_.tick();
        }
    }
    // As bf16: what comes from others was rounded once
    void exchange_rounded(float* in, const float* out, const std::vector<Range>& part) const {
        uint16_t *narrow_out = rounded_, *narrow_in = rounded_ + ranks_.world * STAGING;
        for (int r = 0; r < ranks_.world; r++)
            if (r != ranks_.rank) cpu::narrow(narrow_out + r * STAGING, out + r * STAGING, part[r].size());
        exchange_parts(narrow_in, narrow_out, part);
        for (int r = 0; r < ranks_.world; r++)
            if (r != ranks_.rank) cpu::widen(in + r * STAGING, narrow_in + r * STAGING, part[ranks_.rank].size());
    }
};
