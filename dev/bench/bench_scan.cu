// Selective scan and convolution of a layer: relative L2 errors against the twin in double, then times at the shapes of training.
//
//   build/gpu-bf16/bench_scan                     everything
//   build/gpu-bf16/bench_scan quick               the first shape alone
//   build/gpu-bf16/bench_scan profile PASS        one call of a pass at the first shape, for a profiler; PASS as in the table
//
// The bounds are those of memory (a copy on this GPU, measured), of special functions (16 a clock and multiprocessor) and of instruction issue
// (128), the last two at the GPU's highest clock. % is the largest of them over the time; kept is the time an element at the first shape over
// the time an element. dev/ladder/selective_scan has the forms that led to the library's kernels, and times them.
#include <map>
#include "scan_twin.cuh"

using namespace bench;

static const Problem SHAPES[] = {{8, 4096, 3072}, {1, 32768, 3072}, {4, 4096, 4608}, {64, 512, 3072}, {1, 131072, 3072}};

// Per second
struct Rates { double bytes, special, slots; };
static Rates rates() {
    int kilohertz = 0;
    CUDA_CHECK(cudaDeviceGetAttribute(&kilohertz, cudaDevAttrClockRate, 0));
    const double clocks = device_info().sm_count * kilohertz * 1e3;
    const int64_t bytes = 1 << 30;
    const Rotating<float> buffers(bytes / (int64_t)sizeof(float), 2);
    const Time copy = time_ms([&](int i) { CUDA_CHECK(cudaMemcpyAsync(buffers[i], buffers[i + 1], bytes, cudaMemcpyDeviceToDevice)); }, 10);
    const Rates r{2 * bytes / copy.median * 1e3, 16 * clocks, 128 * clocks};
    printf("%s, %s, %d multiprocessors, %.3f GHz at most, copies at %.2f TB/s\n", device_info().name.c_str(), BUILD_NAME, device_info().sm_count,
           kilohertz * 1e-6, r.bytes * 1e-12);
    return r;
}

static bool check(const Problem& s, const Slice& slice) {
    const Layer l(s, 1);
    bool good = true;
    printf("\nerrors, B=%d T=%lld e=%d, channels %d to %d of %d sequences\n", s.B, (long long)s.T, s.e, slice.first_channel,
           slice.first_channel + slice.channels - 1, slice.sequences);
    for (const Pass& pass : passes()) {
        printf("  %-30s", pass.name);
        good &= check_pass(l, pass, slice);
    }
    return good;
}

// first: ms an element at the first shape, by pass
static void time_shape(const Problem& s, const Rates& rate, std::map<std::string, double>& first) {
    const Layer l(s, 2);
    printf("\nB=%d T=%lld e=%d\n%-30s %8s %8s %8s %8s | %8s %8s %8s %8s | %6s\n", s.B, (long long)s.T, s.e, "", "ms", "fastest", "slowest", "GB/s",
           "memory", "special", "issue", "% bound", "kept");
    for (const Pass& pass : passes()) {
        for (int i = 0; i < 2 && pass.before; i++) pass.before(l, i);
        const Time t = time_ms([&](int i) { pass.run(l, i); }, 20, 4);
        const Cost c = pass.cost(l);
        const double per = s.elements() * 1e3, memory = per * c.bytes / rate.bytes, special = per * c.special / rate.special,
                     issue = per * c.slots / rate.slots;
        const double each = t.median / s.elements(), kept = first.try_emplace(pass.name, each).first->second / each;
        printf("%-30s %8.4f %8.4f %8.4f %8.0f | %8.4f %8.4f %8.4f %7.1f%% | %5.1f%%\n", pass.name, t.median, t.fastest, t.slowest,
               s.elements() * c.bytes / t.median * 1e-6, memory, special, issue, 100 * std::max({memory, special, issue}) / t.median, 100 * kept);
        fflush(stdout);
    }
}

static void profile(const std::string& name) {
    for (const Pass& pass : passes())
        if (name == pass.name) {
            const Layer l(SHAPES[0], 1);
            if (pass.before) pass.before(l, 0);
            pass.run(l, 0);
            CUDA_CHECK(cudaDeviceSynchronize());
            return;
        }
    std::string names;
    for (const Pass& pass : passes()) names += std::string(names.empty() ? "" : ", ") + "\"" + pass.name + "\"";
    fail("profile: there is no pass \"%s\"; choose %s", name.c_str(), names.c_str());
}

int main(int argc, char** argv) {
    try {
        const std::string mode = argc > 1 ? argv[1] : "";
        if (device_count() == 0) fail("bench_scan needs an NVIDIA GPU of compute capability 8.0 or higher and finds none");
        if (mode == "profile" && argc == 3) return profile(argv[2]), 0;
        if (argc > 2 || (argc == 2 && mode != "quick")) fail("bench_scan: \"%s\" is not one of: quick, profile PASS", mode.c_str());
        const Rates rate = rates();
        bool good = check({2, 300, 208}, {0, 2, 0, 208});             // sizes that divide nothing
        good &= check({1, 3001, 72}, {0, 1, 0, 72});                  // segments of time
        std::map<std::string, double> first;
        for (const Problem& s : SHAPES) {
            good &= check(s, {s.B - 1, 1, s.e - 16, 16});             // the last channels of the last sequence
            time_shape(s, rate, first);
            if (mode == "quick") break;
        }
        if (!good) fail("bench_scan: an error is above its bound (TOO LARGE above)");
    } catch (const std::exception& error) {
        fprintf(stderr, "error: %s\n", error.what());
        return 1;
    }
}
