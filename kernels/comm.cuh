// Collectives between the processes of a run. A single process needs none of it: Comm then does nothing.
//
//   reduce(x, range)      sums x over ranks; the owner of each element gets the sum
//   all_gather(x, range)  every rank gets each element from its owner
//   gather(x, count)      x (world, count): every rank's row to all
//
// Element i of a flat array belongs to rank r where bounds[r] <= i < bounds[r+1]: contiguous shards, of any lengths.
// Between GPUs that is NCCL on a stream of its own (comm/nccl.cuh), reduce as one ncclReduce for each owner in a group: a ring moves each
// element over each link once, as reduce-scatter would, and needs no equal parts. Where ranks share a GPU (NCCL refuses that) and in the CPU
// build the bytes go through host memory and MPI or TCP (comm/through_host.cuh). Both add in an order of their own: two runs give the same bits.
// Cost of n fp32 elements on N ranks: reduce and all_gather each move 4 n (N-1)/N bytes into and out of every rank.
//
// After reduce_as_bf16() the sums travel as bf16, half the bytes, with an error of each contribution x of at most |x|/256:
//   host   what comes from others is rounded once, and added in fp32
//   NCCL   every contribution is rounded, and so is the sum on each of the N - 1 steps around the ring
//
// Who the processes are, how they meet and what they tell each other: comm/ranks.h. What ends the job when one is lost: comm/guard.h.
#pragma once
#include <map>

#include "comm/nccl.cuh"
#include "comm/provoke.cuh"
#include "comm/through_host.cuh"

// Shards of n elements: as equal as multiples of `alignment` allow
inline std::vector<int64_t> shard_bounds(int64_t n, int world, int64_t alignment) {
    std::vector<int64_t> bounds(world + 1);
    for (int r = 0; r <= world; r++) bounds[r] = std::min(n, round_up((int64_t)((__int128)n * r / world), alignment));
    return bounds;
}

struct Comm : Ranks {
    enum class Mode { automatic, nccl, host };
    std::vector<std::string> devices;              // of every rank, after use_device()
    bool forced = false;                           // one process, and yet through the collectives: for tests

    Comm() = default;
    Comm(const Comm&) = delete;
    Comm& operator=(const Comm&) = delete;
    ~Comm() { if (world > 1) finish(); }

    bool active() const { return world > 1 || forced; }
    bool own_stream() const { return nccl_used_; }
    bool as_bf16() const { return bf16_; }
    std::string describe() const {
        return (nccl_used_ ? "NCCL, in a ring" : std::string(host_transport()) + " through host memory") + (note_.empty() ? "" : " (" + note_ + ")");
    }

    // After this rank has chosen its GPU. Collectives are ordered after what was enqueued on `compute` when they are called.
    void use_device(Mode mode, Stream compute) {
        const std::string mine = device_identity();
        devices = world > 1 ? all_texts(mine) : std::vector<std::string>{mine};
        if (mode == Mode::nccl && !ON_GPU) fail("--collectives nccl: this build is for the CPU, which has only host");
        const std::string shared = ON_GPU ? shared_gpu() : "";
        if (mode == Mode::nccl && !shared.empty())
            fail("--collectives nccl: %s on %s, which NCCL refuses; start fewer ranks, or use --collectives host", shared.c_str(), hosts[0].c_str());
        forced = mode == Mode::nccl || forced;
        nccl_used_ = ON_GPU && mode != Mode::host && shared.empty() && active();
        note_ = mode == Mode::host || shared.empty() ? "" : shared + ", which NCCL refuses: gradients go through host memory";
        provoke_.start();
        compute_ = stream_ = compute;
        if (nccl_used_) start_nccl();
        else host_.start(stream_);
        order_event_ = event_create();
        computed_ = event_create();
    }
    // From here on reduce() rounds to bf16. longest: elements of the largest range that will be reduced.
    void reduce_as_bf16(int64_t longest) {
        bf16_ = true;
        if (nccl_used_) nccl_.reduce_as_bf16(longest);
        else host_.reduce_as_bf16();
    }

    // Takes leave of the other ranks. A rank that does not come here is missed, and ends the job.
    void finish() {
        if (world == 1) return;
        if (guard_) {
            wait_for_all("the end");
            guard_->set_check({});
        }
        nccl_.stop();                              // still watched: it waits for the others
        leave();
    }

    // -- streams --------------------------------------------------------------------------------------------------------

    // What the collectives do next comes after what `compute` has been given so far, and the other way round.
    // `what` is handed over; tests can leave that event out (comm/provoke.cuh).
    void after_compute(const char* what) { order(stream_, compute_, what); }
    void before_compute(const char* what) { order(compute_, stream_, what); }
    void backward_done() { event_record(computed_, compute_); }
    void delay_compute() { provoke_.delay_compute(compute_); }
    void mark(Event e) { event_record(e, stream_); }                               // after all collectives so far
    void wait(Event e) { if (own_stream() && !provoke_.drops("new weights")) stream_wait(compute_, e); }

    // Waits for `compute`. The guard can tell from it who computes and who waits: first for what came before
    // backward_done(), then for the others' part.
    void synchronise() {
        event_sync(computed_);
        const During during(*this, Guard::waiting, "exchanging gradients");
        stream_sync(compute_);
    }

    // -- collectives ----------------------------------------------------------------------------------------------------

    void reduce(float* x, Range range, const std::vector<int64_t>& bounds) {
        provoke_.disturb(x + range.begin, range.size() * (int64_t)sizeof(float), stream_);
        if (nccl_used_) nccl_.reduce(x, range, bounds);
        else if (world > 1) host_.reduce(x, range, bounds);
        tick();
    }
    template <class T> void all_gather(T* x, Range range, const std::vector<int64_t>& bounds) {
        provoke_.disturb(x + range.begin, range.size() * (int64_t)sizeof(T), stream_);
        if (nccl_used_) nccl_.all_gather((char*)x, sizeof(T), range, bounds);
        else if (world > 1) host_.all_gather((char*)x, sizeof(T), range, bounds);
        tick();
    }
    void gather(float* rows /*(world, count)*/, int64_t count) {
        if (nccl_used_) {
            provoke_.disturb(rows, world * count * (int64_t)sizeof(float), stream_);
            nccl_.gather(rows, count);
            return tick();
        }
        std::vector<int64_t> bounds(world + 1);
        for (int r = 0; r <= world; r++) bounds[r] = r * count;
        all_gather(rows, {0, world * count}, bounds);
    }

    // `bytes` to the next rank, and as many from the one before: what the link can do (dev/bench/bench_comm.cu)
    void shift(char* in, const char* out, int64_t bytes) {
        const int to = (rank + 1) % world, from = (rank - 1 + world) % world;
        if (nccl_used_) nccl_.shift(in, out, bytes, to, from);
        else host_.shift(in, out, bytes, to, from);
    }

    // Part `range` of a sharded array to rank 0. `own` holds this rank's shard.
    void collect(float* out /*(range), host, on rank 0*/, const float* own, Range range, const std::vector<int64_t>& bounds) {
        const auto part_of = [&](int r) { return range & Range{bounds[r], bounds[r + 1]}; };
        const Range mine = part_of(rank);
        std::vector<float> copy(main() ? 0 : (size_t)mine.size());
        float* to = main() ? out + (mine.begin - range.begin) : copy.data();
        copy_to_host(to, own + (mine.begin - bounds[rank]), (size_t)mine.size() * sizeof(float), compute_);
        stream_sync(compute_);
        tick();
        const During during(*this, Guard::waiting, "collecting weights");
        if (!main()) return exchange(0, copy.data(), mine.size() * (int64_t)sizeof(float), -1, nullptr, 0);
        for (int r = 1; r < world; r++)
            if (const Range part = part_of(r); part.size() > 0)
                exchange(-1, nullptr, 0, r, out + (part.begin - range.begin), part.size() * (int64_t)sizeof(float));
    }

private:
    NcclCollectives nccl_;
    CollectivesThroughHost host_{*this};
    Provoke provoke_;
    bool nccl_used_ = false, bf16_ = false;
    Stream compute_{}, stream_{};                  // stream_: where the collectives run
    Event order_event_{}, computed_{};
    std::string note_;

    // "ranks 0 and 1 share a GPU", or "" where each has its own
    std::string shared_gpu() const {
        std::map<std::string, int> owner;
        for (int r = 0; r < world; r++) {
            const auto [first, fresh] = owner.emplace(hosts[r] + " " + devices[r], r);
            if (!fresh) return "ranks " + std::to_string(first->second) + " and " + std::to_string(r) + " share a GPU";
        }
        return "";
    }
    void start_nccl() {
        nccl_.start(*this);
        stream_ = nccl_.stream();
        if (guard_) guard_->set_check(nccl_.error());
    }
    void order(Stream then, Stream first, const char* what) {
        event_record(order_event_, first);
        if (own_stream() && !provoke_.drops(what)) stream_wait(then, order_event_);
    }
};
