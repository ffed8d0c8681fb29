// Several processes make one training step together. Each takes its part of the global batch through forward and backward of
// samba.cuh; gradients are summed over processes (their weights in the loss make that the mean) and everybody makes the same
// update. One process does the same steps without the collectives of comm.cuh.
//
//   zero 0   every process keeps all of master copy and moments      sum to owners, all-gather of gradients (fp32)
//   zero 1   each keeps and updates its 1/N of the flat order        sum to owners, all-gather of working weights
//
// Gradients are kept in fp32 and travel to their owners in fp32 or bf16.
// Matrices travel in buckets of neighbouring layers, as backward completes them, while it goes on with the layers below; the
// last bucket has the rest: what belongs to no layer, and all vectors. With zero 1 the new weights travel in the same buckets in
// forward's order, and forward waits for each where it first reads it.
#pragma once
#include "../samba.cuh"
#include "comm.cuh"

struct DataParallel {
    struct Bucket {
        int last_layer;                    // complete when backward has finished this layer; -1: when it is through
        Range matrices, vectors;           // of the flat order
        Event gathered;                    // its weights are up to date
    };
    Comm& comm;
    Model& m;
    bool sharded;                          // zero 1
    std::vector<int64_t> bounds;           // rank r owns [bounds[r], bounds[r+1]) of the flat order
    std::vector<Bucket> buckets;           // in the order of backward
    float *norms = nullptr, *local_norm = nullptr, *stats = nullptr;     // (N), (2), (N,2) loss and stop of each process
    float stop = 0;
    size_t next = 0;                       // bucket to reduce next
    bool reducing = false, weights_on_their_way = false;

    static std::vector<int64_t> shards(const Layout& layout, int world) { return shard_bounds(layout.elements(), world, TENSOR_ALIGNMENT); }
    static Range own_range(const Layout& layout, const Comm& comm, int zero) {
        const std::vector<int64_t> bounds = shards(layout, comm.world);
        return comm.active() && zero == 1 ? Range{bounds[comm.rank], bounds[comm.rank + 1]} : Range{0, layout.elements()};
    }

    // Buckets of at least bucket_bytes of gradients; <= 0: what suits the transport
    static std::vector<Bucket> plan(const Layout& layout, const Comm& comm, int64_t bucket_bytes) {
        if (bucket_bytes <= 0) bucket_bytes = comm.own_stream() ? 64 << 20 : INT64_MAX;            // nothing to overlap: all at once
        std::vector<Bucket> buckets;
        const std::vector<int64_t>& begin = layout.layer_matrices;
        int64_t end = begin.back();
        for (int l = (int)layout.layers.size() - 1; l > 0; l--) {
            if ((end - begin[l]) * (int64_t)sizeof(float) < bucket_bytes) continue;
            buckets.push_back({l, {begin[l], end}, {}, {}});
            end = begin[l];
        }
        buckets.push_back({-1, {0, end}, {layout.matrix_elements, layout.elements()}, {}});
        return buckets;
    }
    static int64_t longest(const std::vector<Bucket>& buckets) {
        int64_t most = 0;
        for (const Bucket& b : buckets) most = std::max({most, b.matrices.size(), b.vectors.size()});
        return most;
    }
    // Device memory besides parameters and activations
    static int64_t staging_bytes(const Layout& layout, const Comm& comm, int64_t bucket_bytes, bool bf16) {
        return comm.own_stream() && bf16 ? longest(plan(layout, comm, bucket_bytes)) * (int64_t)sizeof(uint16_t) : 0;
    }

    DataParallel(Comm& comm, Model& m, int zero, int64_t bucket_bytes, bool bf16 = false)
        : comm(comm), m(m), sharded(comm.active() && zero == 1), bounds(shards(m.layout, comm.world)) {
        if (!comm.active()) return;
        buckets = plan(m.layout, comm, bucket_bytes);
        for (Bucket& b : buckets) b.gathered = event_create();
        if (bf16) comm.reduce_as_bf16(longest(buckets));
        norms = (float*)device_alloc((size_t)(comm.world * 3 + 2) * sizeof(float), "the numbers of a step");
        stats = norms + comm.world;
        local_norm = stats + 2 * comm.world;
        m.before_layer = [this](int layer) { before_layer(layer); };
        m.after_layer = [this](int layer) { after_layer(layer); };
    }
    DataParallel(const DataParallel&) = delete;
    DataParallel& operator=(const DataParallel&) = delete;

    // Before each forward_backward: the gradients of the last one of a step are complete, and reduced on the way.
    void micro_batch(bool last) {
        reducing = last && comm.active();
        next = 0;
    }

    void after_layer(int layer) {
        comm.tick();
        if (!reducing) return;
        for (; next < buckets.size() && buckets[next].last_layer >= layer; next++) {
            comm.after_compute("gradients");
            for (Range range : {buckets[next].matrices, buckets[next].vectors}) {
                comm.reduce(m.w.grads, range, bounds);
                if (!sharded) comm.all_gather(m.w.grads, range, bounds);
            }
        }
        if (layer == -1) comm.backward_done();
        else comm.delay_compute();
    }

    void before_layer(int layer) {
        comm.tick();
        comm.delay_compute();
        if (!weights_on_their_way) return;
        const auto has = [&](const Bucket& b) {            // -1 wants the last bucket, which has all vectors; layers ascend from there
            const int64_t at = layer == -1 ? 0 : m.layout.layer_matrices[layer];
            return layer == -1 ? b.last_layer == -1 : b.matrices.begin <= at && at < b.matrices.end;
        };
        for (const Bucket& b : buckets)
            if (has(b)) comm.wait(b.gathered);
    }

    // The same as update() of samba.cuh, with the gradients of all processes. `stopping`: this process was asked to stop.
    void update(const AdamW& options, float clip, bool decay_all, bool stopping) {
        if (!comm.active()) return ::update(m, options, clip, decay_all);
        const int N = comm.world, rank = comm.rank;
        comm.before_compute("summed gradients");
        comm.delay_compute();
        stop = stopping;
        copy_on_device(stats + 2 * rank, m.acts.loss, sizeof(float), m.stream);
        copy_to_device(stats + 2 * rank + 1, &stop, sizeof(float), m.stream);
        if (sharded) {                     // the norm of all shards' norms is the norm of all; not finite anywhere is so everywhere
            ops::global_norm(local_norm, m.w.grads + m.w.own.begin, m.w.own.size(), 0, m.acts.workspace, m.stream);
            copy_on_device(norms + rank, local_norm, sizeof(float), m.stream);
        }
        comm.after_compute("own numbers");
        if (sharded) comm.gather(norms, 1);          // first: what test_without_an_event_the_bits_are_others looks at is in them
        comm.gather(stats, 2);
        comm.before_compute("everybody's numbers");
        comm.delay_compute();
        if (sharded) ops::global_norm(m.acts.norm, norms, N, clip, m.acts.workspace, m.stream);
        else ops::global_norm(m.acts.norm, m.w.grads, m.w.n, clip, m.acts.workspace, m.stream);
        adamw(m, options, decay_all);
        if (sharded) gather_weights();
    }

    void gather_weights() {
        comm.after_compute("own weights");
        for (size_t b = buckets.size(); b-- > 0;) {
            comm.all_gather(m.w.matrices, buckets[b].matrices, bounds);
            comm.all_gather(m.w.vectors - m.w.n_matrix, buckets[b].vectors, bounds);
            comm.mark(buckets[b].gathered);
        }
        weights_on_their_way = true;
    }

    struct Result { float loss, norm; bool applied, stop; };

    // Of the step that update() ended: the same on all processes
    Result result(bool stopping) {
        std::vector<float> all(2 * comm.world);
        float norm[2];
        if (comm.active()) comm.synchronise();
        if (comm.active()) copy_to_host(all.data(), stats, all.size() * sizeof(float), m.stream);
        else copy_to_host(all.data(), m.acts.loss, sizeof(float), m.stream);
        copy_to_host(norm, m.acts.norm, sizeof norm, m.stream);
        stream_sync(m.stream);
        Result r{0, norm[0], norm[1] != 0, !comm.active() && stopping};
        for (int i = 0; i < comm.world; i++) {                       // the global batch is their sum: weights add up to 1
            r.loss += all[2 * i];
            r.stop = r.stop || all[2 * i + 1] != 0;
        }
        return r;
    }

    // All of tensor t to the main process, from the owners of its parts of the master copy
    void collect(float* out, const Tensor& t) {
        const int64_t flat = m.layout.flat(t);
        comm.collect(out, m.w.master, {flat, flat + t.size}, bounds);
    }
};
