// The collectives of a training step alone: how long they take, and which share of the link's own bandwidth they reach.
//
//   RANK=r WORLD_SIZE=N MASTER_ADDR=host bench_comm [elements] [elements in a bucket]      or under mpirun
//
// A rank sends (N-1)/N of the bytes in a reduce or a gather, so that is what `GB/s` counts; the link is measured by a long message
// to the next rank while one comes from the rank before. One JSON object on the last line, for dev/bench/scaling_check.py.
#include <algorithm>
#include <chrono>

#include "../../kernels/comm.cuh"

namespace {

double now_seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Median over `repeats` of the seconds of body(), which all ranks enter together; the slowest rank counts
template <class F> double seconds_of(Comm& comm, Stream stream, int repeats, F body) {
    std::vector<double> times;
    for (int i = -1; i < repeats; i++) {                 // the first one warms up
        stream_sync(stream);
        comm.wait_for_all("measuring");
        const double start = now_seconds();
        comm.after_compute("what comes before");
        body();
        comm.before_compute("what was measured");
        stream_sync(stream);
        double slowest = 0;
        for (const auto& row : comm.all_rows({now_seconds() - start})) slowest = std::max(slowest, row[0]);
        if (i >= 0) times.push_back(slowest);
    }
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
}

void run(Comm& comm, int argc, char** argv) {
    comm.start();
    if (comm.world < 2) fail("bench_comm measures what passes between processes: start at least 2 (RANK, WORLD_SIZE, MASTER_ADDR, or mpirun -np N)");
    if (ON_GPU) device_select(comm.local_rank % std::max(1, device_count()));
    const int64_t n = argc > 1 ? atoll(argv[1]) : ON_GPU ? 421'000'000 : 4'000'000, bucket = argc > 2 ? atoll(argv[2]) : 16 << 20;
    if (n < 1 || bucket < 1) fail("bench_comm %s: a number of elements is needed", argv[1]);
    const Stream stream = stream_create();
    comm.use_device(Comm::Mode::automatic, stream);
    const std::vector<int64_t> bounds = shard_bounds(n, comm.world, 128);
    float* x = (float*)device_alloc((size_t)n * sizeof(float), "the gradients");
    device_zero(x, (size_t)n * sizeof(float), stream);
    const auto in_buckets = [&](auto collective) {
        for (int64_t at = 0; at < n; at += bucket) collective(Range{at, std::min(n, at + bucket)});
    };
    const double share = (double)(comm.world - 1) / comm.world;
    const int64_t message = std::min<int64_t>(n / 2, (int64_t)64 << 20) * (int64_t)sizeof(float);
    const double link = (double)message / seconds_of(comm, stream, 5, [&] { comm.shift((char*)x, (char*)x + message, message); });
    const double hop = seconds_of(comm, stream, 20, [&] { comm.reduce(x, {0, std::min<int64_t>(n, 1024)}, bounds); });
    const double reduce = seconds_of(comm, stream, 5, [&] { in_buckets([&](Range r) { comm.reduce(x, r, bounds); }); });
    const double gather = seconds_of(comm, stream, 5, [&] { in_buckets([&](Range r) { comm.all_gather((floatX*)x, r, bounds); }); });
    comm.reduce_as_bf16(bucket);
    const double reduce_bf16 = seconds_of(comm, stream, 5, [&] { in_buckets([&](Range r) { comm.reduce(x, r, bounds); }); });
    if (comm.main()) {
        printf("%d ranks by %s, %lld elements in buckets of %lld\n", comm.world, comm.describe().c_str(), (long long)n, (long long)bucket);
        printf("%-22s %10s %10s %12s\n", "", "ms", "GB/s", "of the link");
        const auto line = [&](const char* what, double seconds, double bytes) {
            printf("%-22s %10.3f %10.2f %11.0f%%\n", what, seconds * 1e3, bytes * share / seconds / 1e9, 100 * bytes * share / seconds / link);
        };
        printf("%-22s %10.3f %10.2f\n", "link, one way", (double)message / link * 1e3, link / 1e9);
        printf("%-22s %10.3f\n", "reduce, 1024 elements", hop * 1e3);
        line("reduce, fp32", reduce, 4.0 * (double)n);
        line("reduce, bf16", reduce_bf16, 2.0 * (double)n);
        line("gather of weights", gather, (double)sizeof(floatX) * (double)n);
        printf("{\"ranks\": %d, \"elements\": %lld, \"link\": %.6g, \"hop\": %.6g, ", comm.world, (long long)n, link, hop);
        printf("\"reduce\": %.6g, \"reduce_bf16\": %.6g, \"gather\": %.6g}\n", reduce, reduce_bf16, gather);
    }
    comm.finish();
}

} // namespace

int main(int argc, char** argv) {
    Comm comm;
    try {
        run(comm, argc, argv);
        return 0;
    } catch (const std::exception& e) {
        return comm.give_up(e.what());
    }
}
