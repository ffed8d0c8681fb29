// Collectives between GPUs by NCCL, on a stream of their own. What they do: comm.cuh.
// The ring algorithm is asked for, whose order of additions depends on the machine's wiring alone (NCCL_ALGO in the environment wins).
#pragma once
#include "../ops.cuh"
#include "ranks.h"

#ifdef SAMBA_NCCL
#include <nccl.h>

class NcclCollectives {
    ncclComm_t nccl_ = nullptr;
    int rank_ = 0, world_ = 1;
    Stream stream_{};
    uint16_t* rounded_ = nullptr;                  // device: a range in bf16, where sums travel so

    static void check(ncclResult_t status, const char* call) {
        if (status == ncclSuccess || status == ncclInProgress) return;
        fail("NCCL: %s: %s (%s); NCCL_DEBUG=INFO tells more", call, ncclGetErrorString(status), ncclGetLastError(nullptr));
    }

public:
    Stream stream() const { return stream_; }

    void start(const Ranks& ranks) {
        rank_ = ranks.rank, world_ = ranks.world;
        setenv("NCCL_ALGO", "Ring", 0);
        ncclUniqueId id{};
        if (ranks.main()) check(ncclGetUniqueId(&id), "ncclGetUniqueId");
        const std::string text = ranks.broadcast(std::string(id.internal, sizeof id.internal));
        memcpy(id.internal, text.data(), sizeof id.internal);
        const Ranks::During during(ranks, Guard::waiting, "starting NCCL");
        check(ncclCommInitRank(&nccl_, world_, id, rank_), "ncclCommInitRank");
        stream_ = stream_create();
    }
    // What the guard asks now and then: an error of the network, or ""
    std::function<std::string()> error() const {
        return [comm = nccl_] {
            ncclResult_t error = ncclSuccess;
            if (ncclCommGetAsyncError(comm, &error) != ncclSuccess || error == ncclSuccess || error == ncclInProgress) return std::string();
            return std::string("NCCL: ") + ncclGetErrorString(error) + " (" + ncclGetLastError(comm) + ")";
        };
    }
    void stop() {
        if (nccl_) ncclCommDestroy(nccl_);
        nccl_ = nullptr;
    }
    void reduce_as_bf16(int64_t longest) {
        rounded_ = (uint16_t*)device_alloc((size_t)longest * sizeof(uint16_t), "a bucket of gradients in bf16");
    }

    void reduce(float* x, Range range, const std::vector<int64_t>& bounds) {
        const auto at = [&](int64_t i) -> void* { return rounded_ ? (void*)(rounded_ + (i - range.begin)) : (void*)(x + i); };
        const ncclDataType_t type = rounded_ ? ncclBfloat16 : ncclFloat;
        if (rounded_) ops::narrow(rounded_, x + range.begin, range.size(), stream_);
        check(ncclGroupStart(), "ncclGroupStart");
        for (int r = 0; r < world_; r++) {
            const Range part = range & Range{bounds[r], bounds[r + 1]};
            if (part.size() <= 0) continue;
            void* p = at(part.begin);
            check(ncclReduce(p, p, (size_t)part.size(), type, ncclSum, r, nccl_, stream_), "ncclReduce");
        }
        check(ncclGroupEnd(), "ncclGroupEnd");
        const Range mine = range & Range{bounds[rank_], bounds[rank_ + 1]};
        if (rounded_) ops::widen(x + mine.begin, rounded_ + (mine.begin - range.begin), mine.size(), stream_);
    }
    void all_gather(char* x, size_t size, Range range, const std::vector<int64_t>& bounds) {
        check(ncclGroupStart(), "ncclGroupStart");
        for (int r = 0; r < world_; r++) {
            const Range part = range & Range{bounds[r], bounds[r + 1]};
            char* p = x + part.begin * (int64_t)size;
            if (part.size() > 0) check(ncclBroadcast(p, p, (size_t)part.size() * size, ncclChar, r, nccl_, stream_), "ncclBroadcast");
        }
        check(ncclGroupEnd(), "ncclGroupEnd");
    }
    void gather(float* rows /*(world, count)*/, int64_t count) {
        check(ncclAllGather(rows + rank_ * count, rows, (size_t)count, ncclFloat, nccl_, stream_), "ncclAllGather");
    }
    void shift(char* in, const char* out, int64_t bytes, int to, int from) {
        check(ncclGroupStart(), "ncclGroupStart");
        check(ncclSend(out, (size_t)bytes, ncclChar, to, nccl_, stream_), "ncclSend");
        check(ncclRecv(in, (size_t)bytes, ncclChar, from, nccl_, stream_), "ncclRecv");
        check(ncclGroupEnd(), "ncclGroupEnd");
    }
};

#else

// A program that was built without NCCL refuses to start it; nothing else of this is then called
class NcclCollectives {
    [[noreturn]] static void none() {
        fail("several GPUs need NCCL and this program was built without it: install libnccl-dev and build again, or use --collectives host");
    }

public:
    Stream stream() const { return {}; }
    void start(const Ranks&) { none(); }
    std::function<std::string()> error() const { return {}; }
    void stop() {}
    void reduce_as_bf16(int64_t) { none(); }
    void reduce(float*, Range, const std::vector<int64_t>&) { none(); }
    void all_gather(char*, size_t, Range, const std::vector<int64_t>&) { none(); }
    void gather(float*, int64_t) { none(); }
    void shift(char*, const char*, int64_t, int, int) { none(); }
};
#endif
