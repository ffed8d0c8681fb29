// What the DataLoader delivers with a warm page cache, on this machine: bench_loader [micro_batch] [seq_len] [seconds]
//
// One shard of 200 million random tokens in a temporary folder, read once first. Then batches are taken as fast as they come,
// in shuffled order, with every token checked against the vocabulary: alone, with document starts, and as a mixture of two sets.
// Eight H100s training Samba-421M at 45% of their bf16 peak (989 TFLOP/s each, 2.70 GFLOP a token) consume 1.32 million tokens/s.
#include <chrono>
#include <cstdio>
#include <fstream>

#include "../../data/loader.h"

namespace {

constexpr double EIGHT_H100 = 8 * 0.45 * 989e12 / 2.70e9;

double seconds_since(std::chrono::steady_clock::time_point start) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void measure(const char* what, DataLoader& loader, int64_t B, int64_t T, double seconds) {
    int64_t tokens = 0, sum = 0;
    for (int i = 0; i < 10; i++) loader.next();
    const auto start = std::chrono::steady_clock::now();
    while (seconds_since(start) < seconds) {
        sum += loader.next().targets[B * T - 1];
        tokens += B * T;
    }
    const double rate = (double)tokens / seconds_since(start);
    printf("%-28s %8.1f M tokens/s   %6.0f x what eight H100s consume%s\n", what, rate / 1e6, rate / EIGHT_H100, sum == 0 ? " (all zero)" : "");
}

} // namespace

int main(int argc, char** argv) {
    const int64_t B = argc > 1 ? atoll(argv[1]) : 8, T = argc > 2 ? atoll(argv[2]) : 4096, n = 200000000;
    const double seconds = argc > 3 ? atof(argv[3]) : 3;
    try {
        const std::string folder = (std::filesystem::temp_directory_path() / ("samba_bench_loader." + std::to_string(getpid()))).string();
        std::filesystem::create_directories(folder);
        std::vector<uint16_t> tokens((size_t)n);
        uint64_t state = 1;
        for (uint16_t& token : tokens) token = (uint16_t)((state = state * 6364136223846793005ull + 1442695040888963407ull) >> 33) % 32000;
        const char* bytes = (const char*)tokens.data();
        std::ofstream(folder + "/a.bin", std::ios::binary) << shard_header(n, 32000, 2, 0) << std::string(bytes, 2 * tokens.size());
        std::ofstream(folder + "/b.bin", std::ios::binary) << shard_header(n / 10, 32000, 2, 0) << std::string(bytes, 2 * tokens.size() / 10);
        {
            const Shards shards({folder + "/a.bin"}, 32000);
            const Mixture mixture({folder + "/a.bin:0.7", folder + "/b.bin:0.3"}, 32000);
            printf("micro-batch %lld x %lld tokens; eight H100s consume %.2f M tokens/s of Samba-421M\n", (long long)B, (long long)T,
                   EIGHT_H100 / 1e6);
            DataLoader warm(shards, B, T, B, 0, 1, 1, false);
            for (int64_t i = 0; i < warm.samples_per_epoch() / B; i++) warm.next();
            DataLoader plain(shards, B, T, B, 0, 1, 1, true);
            measure("one set", plain, B, T, seconds);
            DataLoader starts(shards, B, T, B, 0, 1, 1, true, shards.eos());
            measure("one set, document starts", starts, B, T, seconds);
            DataLoader mixed(mixture, B, T, B, 0, 1, 1, true);
            measure("mixture of two sets", mixed, B, T, seconds);
        }
        std::filesystem::remove_all(folder);
    } catch (const std::exception& e) {
        fprintf(stderr, "error: %s\n", e.what());
        return 1;
    }
    return 0;
}
