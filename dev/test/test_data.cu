// Token shards and the DataLoader: formats, malformed files, and an order that does not depend on ranks or micro-batches.
#include <fstream>
#include <numeric>

#include "../../data/loader.h"
#include "test_files.h"
#include "test_util.h"

// The loader's buffers are pinned, which takes a GPU in a GPU build.
#define REQUIRE_PINNED() \
    do { if (ON_GPU) REQUIRE_GPU(); } while (0)

namespace {

std::vector<uint16_t> counting(int64_t n, int first = 0, int modulus = 65536) {
    std::vector<uint16_t> tokens((size_t)n);
    for (int64_t i = 0; i < n; i++) tokens[(size_t)i] = (uint16_t)((first + i) % modulus);
    return tokens;
}
std::string bytes_of(const std::vector<uint16_t>& tokens) { return std::string((const char*)tokens.data(), 2 * tokens.size()); }

void write_shard(const std::string& path, const std::vector<uint16_t>& tokens, int vocab = 0, int eos = -1, uint64_t fingerprint = 0) {
    write_text(path, shard_header((int64_t)tokens.size(), vocab, eos, fingerprint) + bytes_of(tokens));
}
std::string litpkds(const std::vector<uint16_t>& tokens, uint64_t version = 1, uint8_t dtype = 8) {
    const uint64_t count = tokens.size();
    return "LITPKDS" + std::string((const char*)&version, 8) + (char)dtype + std::string((const char*)&count, 8) + bytes_of(tokens);
}

struct Sample {
    std::vector<int> tokens, targets;
    bool operator==(const Sample&) const = default;
};
Sample read(const Shards& shards, int64_t k, int64_t T) {
    Sample s{std::vector<int>((size_t)T, -1), std::vector<int>((size_t)T, -1)};
    shards.read(k, T, s.tokens.data(), s.targets.data());
    return s;
}

// Rows of a batch
std::vector<Sample> rows(const Batch& batch, int64_t B, int64_t T) {
    std::vector<Sample> out;
    for (int64_t b = 0; b < B; b++) {
        const int *tokens = batch.tokens + b * T, *targets = batch.targets + b * T;
        out.push_back({std::vector<int>(tokens, tokens + T), std::vector<int>(targets, targets + T)});
    }
    return out;
}

// Three shards of uneven length whose tokens are all different
struct UnevenShards : TempFolder {
    UnevenShards() {
        write_shard(path("a_0.bin"), counting(101, 0));
        write_shard(path("a_1.bin"), counting(8, 1000));
        write_shard(path("a_2.bin"), counting(47, 2000));
    }
};

} // namespace

TEST(Shards, HeaderGoldenBytes) {
    const std::string header = shard_header(0x123456789, 32000, 2, 0x1122334455667788ull);
    ASSERT_EQ(header.size(), 1024u);
    const int32_t* words = (const int32_t*)header.data();
    const int32_t expected[9] = {20240520, 1, 0x23456789, 32000, 3, 0x55667788, 0x11223344, 1, 0};
    for (int i = 0; i < 9; i++) EXPECT_EQ(words[i], expected[i]) << "word " << i;
    for (int i = 9; i < 256; i++) EXPECT_EQ(words[i], 0);
}

TEST(Shards, SamplesOfUnevenShards) {
    UnevenShards folder;
    Shards shards({folder.path("a_*.bin")}, 0);
    EXPECT_EQ(shards.total_tokens(), 156);
    EXPECT_EQ(shards.samples(10), 10 + 0 + 4);           // (101-1)/10, (8-1)/10, (47-1)/10
    EXPECT_EQ(shards.samples(7), 14 + 1 + 6);
    EXPECT_EQ(shards.samples(1), 100 + 7 + 46);
    EXPECT_EQ(shards.samples(1000), 0);
    std::vector<int> seen;                               // every target once, in order, none across shards
    for (int64_t k = 0; k < shards.samples(7); k++) {
        const Sample s = read(shards, k, 7);
        for (int t = 0; t < 7; t++) EXPECT_EQ(s.targets[t], s.tokens[t] + 1);
        seen.insert(seen.end(), s.targets.begin(), s.targets.end());
    }
    std::vector<int> expected;
    for (int i = 1; i <= 98; i++) expected.push_back(i);
    for (int i = 1001; i <= 1007; i++) expected.push_back(i);
    for (int i = 2001; i <= 2042; i++) expected.push_back(i);
    EXPECT_EQ(seen, expected);
    EXPECT_ERROR(read(shards, shards.samples(7), 7), "sample 21 does not exist");
    EXPECT_ERROR(read(shards, -1, 7), "does not exist");
    EXPECT_ERROR(shards.samples(0), "at least 1 token");
}

TEST(Shards, GlobsAreSortedAndFilesTakenOnce) {
    UnevenShards folder;
    std::filesystem::create_directory(folder.path("a_dir.bin"));                          // matched by the pattern, skipped
    std::filesystem::create_symlink("a_1.bin", folder.path("a_link.bin"));
    Shards shards({folder.path("a_2.bin"), folder.path("a_*.bin"), folder.path("./a_0.bin")}, 0);
    ASSERT_EQ(shards.info().size(), 3u);
    std::vector<std::string> names;
    for (auto& shard : shards.info()) names.push_back(std::filesystem::path(shard.path).filename().string());
    EXPECT_EQ(names, (std::vector<std::string>{"a_0.bin", "a_1.bin", "a_2.bin"}));
    EXPECT_EQ(shards.total_tokens(), 156);
    EXPECT_ERROR(expand_globs({folder.path("a_*.bin"), folder.path("b_*.bin")}), "no file matches '" + folder.path("b_*.bin"));
    EXPECT_ERROR(expand_globs({folder.path("")}), "is a directory");
    EXPECT_ERROR(Shards({}, 0), "no token shards");
    write_shard(folder.path("odd[1]*.bin"), counting(5));                                // a name that looks like a pattern
    EXPECT_EQ(expand_globs({folder.path("odd[1]*.bin")}).size(), 1u);
    EXPECT_EQ(expand_globs({folder.path("a_{0,2}.bin")}).size(), 2u);
}

TEST(Shards, HeaderWordsAreRead) {
    TempFolder folder;
    write_shard(folder.path("x.bin"), counting(9), 32000, 2, 0xfedcba9876543210ull);
    write_shard(folder.path("y.bin"), counting(9));                                       // as llm.c writes: unknown
    Shards shards({folder.path("*.bin")}, 32000);
    EXPECT_EQ(shards.info()[0].vocab_size, 32000);
    EXPECT_EQ(shards.info()[0].eos, 2);
    EXPECT_EQ(shards.info()[0].fingerprint, 0xfedcba9876543210ull);
    EXPECT_EQ(shards.info()[1].vocab_size, 0);
    EXPECT_EQ(shards.info()[1].eos, -1);
    EXPECT_EQ(shards.info()[1].fingerprint, 0u);
    EXPECT_EQ(shards.vocab_size(), 32000);
    EXPECT_EQ(shards.eos(), 2);
    EXPECT_EQ(shards.fingerprint(), 0xfedcba9876543210ull);
}

TEST(Shards, EosIdZeroAndFullVocabulary) {
    TempFolder folder;
    write_shard(folder.path("x.bin"), {65535, 0, 1}, 65536, 0);
    Shards shards({folder.path("x.bin")}, 65536);
    EXPECT_EQ(shards.eos(), 0);
    EXPECT_EQ(read(shards, 0, 2).tokens, (std::vector<int>{65535, 0}));
}

TEST(Shards, OfficialGoldenFiles) {
    const std::string golden = std::string(SAMBA_SOURCE_DIR) + "/dev/test/golden/litpkds";
    std::ifstream text(golden + "/documents.txt");
    std::vector<int> documents((std::istream_iterator<int>(text)), std::istream_iterator<int>());
    Shards shards({golden + "/*.bin"}, 32000);
    ASSERT_EQ(shards.info().size(), 2u);
    const int64_t chunk = 8294;
    EXPECT_EQ(shards.total_tokens(), 2 * chunk);
    ASSERT_GE((int64_t)documents.size(), 2 * chunk);
    const int64_t T = 97;
    ASSERT_EQ(shards.samples(T), 2 * ((chunk - 1) / T));
    for (int64_t k = 0; k < shards.samples(T); k++) {
        const int64_t per_shard = (chunk - 1) / T, first = k / per_shard * chunk + k % per_shard * T;
        const Sample s = read(shards, k, T);
        for (int64_t t = 0; t < T; t++) {
            ASSERT_EQ(s.tokens[t], documents[first + t]);
            ASSERT_EQ(s.targets[t], documents[first + t + 1]);
        }
    }
    EXPECT_EQ(shards.info()[0].vocab_size, 0);
}

TEST(Shards, DefectsAreNamed) {
    TempFolder folder;
    const std::string x = folder.path("x.bin");
    const auto open = [&](int vocab = 0) { Shards({x}, vocab); };
    const std::string good = shard_header(100, 0, -1, 0) + bytes_of(counting(100));
    const auto with_word = [&](int index, int32_t value) {
        std::string s = good;
        memcpy(&s[4 * (size_t)index], &value, 4);
        write_text(x, s);
    };
    write_text(x, good);
    EXPECT_NO_THROW(open());
    write_text(x, "");
    EXPECT_ERROR(open(), x + " is too short");
    write_text(x, "ab");
    EXPECT_ERROR(open(), "too short");
    write_text(x, good.substr(0, 1023));
    EXPECT_ERROR(open(), "too short");
    write_text(x, "LITPKDS");
    EXPECT_ERROR(open(), "too short");
    with_word(0, 20240801);
    EXPECT_ERROR(open(), "is not a token shard: it begins with 20240801");
    write_text(x, "some text that is no shard");
    EXPECT_ERROR(open(), "is not a token shard");
    with_word(1, 2);
    EXPECT_ERROR(open(), "version 2");
    write_text(x, good.substr(0, good.size() - 2));
    EXPECT_ERROR(open(), "is cut off: its header says 100 tokens, 1224 bytes, and the file has 1222");
    write_text(x, good.substr(0, good.size() - 1));
    EXPECT_ERROR(open(), "cut off");
    write_text(x, good + "x");
    EXPECT_ERROR(open(), "too long");
    with_word(2, -1);                                                                     // 2^32 - 1 tokens
    EXPECT_ERROR(open(), "header says 4294967295 tokens");
    with_word(7, -1);
    EXPECT_ERROR(open(), "damaged");
    with_word(7, 0x0fffffff);
    EXPECT_ERROR(open(), "cut off");
    with_word(3, -5);
    EXPECT_ERROR(open(), "vocabulary of -5");
    with_word(3, 70000);
    EXPECT_ERROR(open(), "vocabulary of 70000");
    with_word(4, -3);
    EXPECT_ERROR(open(), "EOS id");
    write_text(x, shard_header(0, 0, -1, 0));
    EXPECT_ERROR(open(), "is empty");
    write_shard(x, counting(5), 4096, 4096);
    EXPECT_ERROR(open(), "EOS id 4096 outside");
    write_shard(x, counting(5), 4096, 2);
    EXPECT_ERROR(open(4000), "vocabulary of 4096 and the model has only 4000");
    EXPECT_NO_THROW(open(4160));                           // padded
    EXPECT_NO_THROW(open(4096));
    EXPECT_NO_THROW(open(0));

    const std::string official = litpkds(counting(10));
    write_text(x, official);
    EXPECT_NO_THROW(open());
    write_text(x, litpkds(counting(10), 2));
    EXPECT_ERROR(open(), "LITPKDS version 2");
    write_text(x, litpkds(counting(10), 1, 4));
    EXPECT_ERROR(open(), "dtype code 4; only 8 (uint16)");
    write_text(x, official.substr(0, official.size() - 1));
    EXPECT_ERROR(open(), "cut off");
    write_text(x, litpkds({}));
    EXPECT_ERROR(open(), "is empty");

    std::filesystem::create_directory(folder.path("dir"));
    EXPECT_ERROR(Shards({folder.path("dir")}, 0), "is a directory");
    EXPECT_ERROR(Shards({"/dev/null"}, 0), "not a regular file");
    EXPECT_ERROR(Shards({folder.path("none.bin")}, 0), "no file matches");
}

TEST(Shards, MixedTokenizersAreRefused) {
    TempFolder folder;
    write_shard(folder.path("0.bin"), counting(5));                                       // knows nothing: goes with all
    write_shard(folder.path("1.bin"), counting(5), 100, 2, 7);
    write_shard(folder.path("2.bin"), counting(5), 100, 2, 8);
    EXPECT_ERROR(Shards({folder.path("*.bin")}, 100), "different tokenizers, by fingerprint: 7 and 8");
    write_shard(folder.path("2.bin"), counting(5), 101, 2, 7);
    EXPECT_ERROR(Shards({folder.path("*.bin")}, 0), "different vocabularies");
    write_shard(folder.path("2.bin"), counting(5), 100, 3, 7);
    EXPECT_ERROR(Shards({folder.path("*.bin")}, 100), "different EOS ids");
    write_shard(folder.path("2.bin"), counting(5), 100, 2, 7);
    EXPECT_NO_THROW(Shards({folder.path("*.bin")}, 100));
}

TEST(Shards, TokenOutsideTheVocabulary) {
    TempFolder folder;
    auto tokens = counting(100, 0, 50);
    tokens[57] = 50;
    write_shard(folder.path("x.bin"), tokens);
    Shards shards({folder.path("x.bin")}, 50);
    EXPECT_NO_THROW(read(shards, 4, 10));                                                 // 40..50
    EXPECT_ERROR(read(shards, 5, 10), folder.path("x.bin") + ": token 50 at position 57 is outside the vocabulary of 50");
    tokens[57] = 0;
    tokens[60] = 65535;                                                                   // a target only, last of sample 5
    write_shard(folder.path("x.bin"), tokens);
    Shards other({folder.path("x.bin")}, 50);
    EXPECT_ERROR(read(other, 5, 10), "token 65535 at position 60");
    EXPECT_NO_THROW(read(Shards({folder.path("x.bin")}, 0), 5, 10));
}

TEST(Shards, MoreThan31BitsOfTokens) {
    TempFolder folder;
    const int64_t n = (5ll << 30) + 12345, T = 4096;                                      // over 2^32 tokens; sparse, takes no disk
    const std::string path = folder.path("big.bin");
    write_text(path, shard_header(n, 0, -1, 0));
    std::error_code error;
    std::filesystem::resize_file(path, 1024 + 2 * (uint64_t)n, error);
    if (error) GTEST_SKIP() << "no sparse files here: " << error.message();
    const auto last = counting(T + 1, 7);
    const int64_t k = (n - 1) / T - 1;
    {
        std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
        file.seekp(1024 + 2 * k * T);
        file << bytes_of(last);
        ASSERT_TRUE(file.good());
    }
    Shards shards({path}, 0);
    EXPECT_EQ(shards.total_tokens(), n);
    EXPECT_EQ(shards.samples(T), k + 1);
    const Sample s = read(shards, k, T);
    for (int t = 0; t < T; t++) {
        ASSERT_EQ(s.tokens[t], 7 + t);
        ASSERT_EQ(s.targets[t], 8 + t);
    }
    EXPECT_EQ(read(shards, 1ll << 19, T).tokens[0], 0);
}

// ---------------------------------------------------------------------------------------------------------------------

TEST(Permutation, IsABijection) {
    for (uint64_t n = 1; n <= 200; n++)
        for (uint64_t epoch = 0; epoch < 3; epoch++) {
            Permutation permutation(n, 42, epoch);
            std::vector<int> hits(n, 0);
            for (uint64_t i = 0; i < n; i++) {
                ASSERT_LT(permutation(i), n);
                hits[permutation(i)]++;
            }
            for (uint64_t i = 0; i < n; i++) ASSERT_EQ(hits[i], 1) << "n " << n << ", value " << i;
        }
    for (uint64_t n : {4095ull, 65536ull, 65537ull, 1000003ull}) {
        Permutation permutation(n, 1234567, 9);
        std::vector<bool> hit(n, false);
        for (uint64_t i = 0; i < n; i++) {
            const uint64_t v = permutation(i);
            ASSERT_LT(v, n);
            ASSERT_FALSE(hit[v]);
            hit[v] = true;
        }
    }
    Permutation huge((1ull << 40) + 7, 3, 0);                                             // distinct as far as can be tried
    std::set<uint64_t> values;
    for (uint64_t i = 0; i < 20000; i++) values.insert(huge(i * 54975581ull));
    EXPECT_EQ(values.size(), 20000u);
    EXPECT_LE(*values.rbegin(), (1ull << 40) + 6);
}

TEST(Permutation, IsEven) {
    // Where index i lands over many epochs is uniform: chi-square against its mean of n-1 and deviation sqrt(2(n-1))
    for (uint64_t n : {2ull, 3ull, 5ull, 16ull, 17ull, 100ull})
        for (uint64_t i : {(uint64_t)0, n / 2, n - 1}) {
            const int trials = 20000;
            std::vector<double> count(n, 0);
            for (int e = 0; e < trials; e++) count[Permutation(n, 11, (uint64_t)e)(i)]++;
            double chi2 = 0;
            for (double c : count) chi2 += (c - (double)trials / n) * (c - (double)trials / n) / ((double)trials / n);
            EXPECT_LT(chi2, (n - 1) + 5 * std::sqrt(2.0 * (n - 1)) + 5) << "n " << n << ", index " << i;
        }
    // Neighbours do not stay neighbours: successive values of one epoch are uncorrelated (5 sigma of 1/sqrt(n))
    const uint64_t n = 100000;
    Permutation permutation(n, 5, 0);
    double correlation = 0;
    for (uint64_t i = 0; i + 1 < n; i++)
        correlation += ((double)permutation(i) / n - 0.5) * ((double)permutation(i + 1) / n - 0.5) * 12 / n;
    EXPECT_LT(std::abs(correlation), 5 / std::sqrt((double)n));
}

TEST(Permutation, DependsOnSeedAndEpoch) {
    const uint64_t n = 1000;
    Permutation base(n, 1, 0), same(n, 1, 0), epoch(n, 1, 1), seed(n, 2, 0);
    int equal_epoch = 0, equal_seed = 0;
    for (uint64_t i = 0; i < n; i++) {
        EXPECT_EQ(base(i), same(i));
        equal_epoch += base(i) == epoch(i);
        equal_seed += base(i) == seed(i);
    }
    EXPECT_LT(equal_epoch, 12);                                                           // one is expected
    EXPECT_LT(equal_seed, 12);
}

// ---------------------------------------------------------------------------------------------------------------------

TEST(DataLoader, SameGlobalBatchesForAnyWorldAndMicroBatch) {
    REQUIRE_PINNED();
    UnevenShards folder;
    Shards shards({folder.path("a_*.bin")}, 0);
    const int64_t T = 7, S = 12, steps = 6, N = shards.samples(T);                        // 72 samples: over three epochs of 21
    ASSERT_LT(3 * N, S * steps);
    for (bool shuffle : {false, true}) {
        std::vector<Sample> reference;
        {
            DataLoader loader(shards, S, T, S, 0, 1, 99, shuffle);
            for (int64_t step = 0; step < steps; step++)
                for (auto& row : rows(loader.next(), S, T)) reference.push_back(row);
        }
        for (auto [world, B] : std::vector<std::pair<int, int64_t>>{{1, 1}, {1, 4}, {2, 1}, {2, 3}, {3, 2}, {4, 3}, {12, 1}, {6, 2}}) {
            std::vector<Sample> got((size_t)(S * steps));
            for (int rank = 0; rank < world; rank++) {
                DataLoader loader(shards, B, T, S, rank, world, 99, shuffle);
                ASSERT_EQ(loader.micro_steps(), S / (world * B));
                for (int64_t step = 0; step < steps; step++)
                    for (int64_t a = 0; a < loader.micro_steps(); a++) {
                        ASSERT_EQ(loader.position(), step * S);
                        const auto batch = rows(loader.next(), B, T);
                        for (int64_t b = 0; b < B; b++) got[(size_t)(step * S + a * world * B + rank * B + b)] = batch[(size_t)b];
                    }
                ASSERT_EQ(loader.position(), steps * S);
            }
            EXPECT_EQ(got, reference) << "world " << world << ", B " << B;
        }
    }
}

TEST(DataLoader, EveryEpochHasEverySampleOnce) {
    REQUIRE_PINNED();
    UnevenShards folder;
    Shards shards({folder.path("a_*.bin")}, 0);
    const int64_t T = 10, N = shards.samples(T), epochs = 4;
    ASSERT_EQ(N, 14);
    DataLoader loader(shards, 1, T, 4, 0, 1, 7, true);                                    // 4 does not divide 14: steps cross epochs
    EXPECT_EQ(loader.samples_per_epoch(), N);
    std::vector<std::vector<int>> order;
    for (int64_t e = 0; e < epochs; e++) {
        std::vector<int> firsts, expected;
        for (int64_t i = 0; i < N; i++) firsts.push_back(loader.next().tokens[0]);
        order.push_back(firsts);
        std::sort(firsts.begin(), firsts.end());
        for (int64_t k = 0; k < N; k++) expected.push_back(read(shards, k, T).tokens[0]);
        std::sort(expected.begin(), expected.end());
        EXPECT_EQ(firsts, expected) << "epoch " << e;
    }
    EXPECT_NE(order[0], order[1]);
    EXPECT_NE(order[1], order[2]);
    DataLoader plain(shards, 1, T, 1, 0, 1, 7, false);
    for (int64_t g = 0; g < 2 * N; g++) ASSERT_EQ(plain.next().tokens[0], read(shards, g % N, T).tokens[0]);
}

TEST(DataLoader, SeekContinuesExactly) {
    REQUIRE_PINNED();
    UnevenShards folder;
    Shards shards({folder.path("a_*.bin")}, 0);
    const int64_t T = 7, B = 2, S = 8, steps = 20;
    std::vector<std::vector<Sample>> whole;
    DataLoader loader(shards, B, T, S, 1, 2, 5, true);
    for (int64_t i = 0; i < steps * loader.micro_steps(); i++) whole.push_back(rows(loader.next(), B, T));
    for (int64_t step : {19, 0, 7, 3, 12}) {                                              // also backwards, also on a used loader
        loader.seek(step * S);
        EXPECT_EQ(loader.position(), step * S);
        for (int64_t i = step * loader.micro_steps(); i < (int64_t)whole.size(); i++) ASSERT_EQ(rows(loader.next(), B, T), whole[(size_t)i]);
        EXPECT_EQ(loader.position(), steps * S);
    }
    for (int64_t calls = 0; calls < 6; calls++) {                                         // fresh loader, seek in any state
        DataLoader fresh(shards, B, T, S, 1, 2, 5, true);
        for (int64_t i = 0; i < calls; i++) fresh.next();
        EXPECT_EQ(fresh.position(), calls / 2 * S);
        fresh.seek(fresh.position());
        EXPECT_EQ(rows(fresh.next(), B, T), whole[(size_t)(calls / 2 * 2)]);
    }
    loader.seek(3);                                                                       // no multiple of S: steps start there
    const auto odd = rows(loader.next(), B, T);
    EXPECT_EQ(odd[0], read(shards, loader.sample_at(3 + 2), T));
    EXPECT_ERROR(loader.seek(-1), "global sample -1");
    const int64_t far = 1ll << 60;                                                        // O(1): instant
    loader.seek(far);
    EXPECT_EQ(rows(loader.next(), B, T)[1], read(shards, loader.sample_at(far + 3), T));
}

TEST(DataLoader, BatchesStayValidForOneMoreCall) {
    REQUIRE_PINNED();
    UnevenShards folder;
    Shards shards({folder.path("a_*.bin")}, 0);
    const int64_t T = 5, B = 3;
    DataLoader loader(shards, B, T, B, 0, 1, 5, true);
    Batch previous = loader.next();
    auto copy = rows(previous, B, T);
    for (int i = 0; i < 300; i++) {
        const Batch batch = loader.next();
        const auto batch_copy = rows(batch, B, T);
        if (i % 16 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));       // let the thread run ahead
        if (i % 50 == 49) {
            loader.seek(i);                                                               // not even a seek may overwrite it
            std::this_thread::sleep_for(std::chrono::milliseconds(5));
        }
        ASSERT_EQ(rows(previous, B, T), copy) << i;
        ASSERT_EQ(rows(batch, B, T), batch_copy) << i;
        previous = batch;
        copy = batch_copy;
    }
}

TEST(DataLoader, BadTokenIsThrownWhenItsBatchIsDue) {
    REQUIRE_PINNED();
    TempFolder folder;
    auto tokens = counting(101, 0, 50);
    tokens[57] = 60;
    write_shard(folder.path("x.bin"), tokens);
    Shards shards({folder.path("x.bin")}, 50);
    DataLoader loader(shards, 1, 10, 1, 0, 1, 0, false);
    for (int i = 0; i < 5; i++) EXPECT_EQ(loader.next().tokens[0], i * 10 % 50);
    EXPECT_EQ(loader.position(), 5);
    for (int i = 0; i < 3; i++) EXPECT_ERROR(loader.next(), "token 60 at position 57 is outside the vocabulary of 50");
    EXPECT_EQ(loader.position(), 5);
    loader.seek(6);
    EXPECT_EQ(loader.next().tokens[0], 10);
    loader.seek(5);
    EXPECT_ERROR(loader.next(), "position 57");
}

TEST(DataLoader, BadArgumentsAreNamed) {
    REQUIRE_PINNED();
    UnevenShards folder;
    Shards shards({folder.path("a_*.bin")}, 0);
    EXPECT_ERROR(DataLoader(shards, 4, 7, 10, 0, 2, 0, true), "global batch of 10 samples is not a multiple of 8");
    EXPECT_ERROR(DataLoader(shards, 4, 7, 0, 0, 2, 0, true), "not a multiple");
    EXPECT_ERROR(DataLoader(shards, 0, 7, 8, 0, 1, 0, true), "at least 1");
    EXPECT_ERROR(DataLoader(shards, 1, 0, 8, 0, 1, 0, true), "at least 1");
    EXPECT_ERROR(DataLoader(shards, 1, 7, 8, 2, 2, 0, true), "rank 2 of 2");
    EXPECT_ERROR(DataLoader(shards, 1, 101, 8, 0, 1, 0, true), "a_0.bin, has 101: use a smaller --seq-len");
    EXPECT_NO_THROW(DataLoader(shards, 1, 100, 8, 0, 1, 0, true));
}

TEST(DataLoader, StopsCleanly) {
    REQUIRE_PINNED();
    UnevenShards folder;
    Shards shards({folder.path("a_*.bin")}, 0);
    for (int i = 0; i < 200; i++) {                                                       // destroyed in every state of its thread
        DataLoader loader(shards, 2, 7, 4, 0, 1, (uint64_t)i, true);
        for (int k = 0; k < i % 5; k++) loader.next();
        if (i % 3 == 0) loader.seek(i);
    }
}

TEST(DataLoader, DocumentStartsComeFromEos) {
    REQUIRE_PINNED();
    TempFolder folder;
    const int eos = 2;
    const std::vector<uint16_t> a = {5, 6, 2, 7, 2, 2, 8, 9, 5, 2, 4, 4, 4}, b = {9, 9, 2, 1, 1};
    write_shard(folder.path("a.bin"), a, 10, eos);
    write_shard(folder.path("b.bin"), b, 10, eos);
    Shards shards({folder.path("*.bin")}, 10);
    DataLoader loader(shards, 1, 4, 1, 0, 1, 0, false, shards.eos());
    const std::vector<std::vector<int>> expected = {{1, 0, 0, 1}, {0, 1, 1, 0}, {0, 0, 1, 0}, {1, 0, 0, 1}};     // rows start at 0, 4, 8 and b's 0
    for (const auto& row : expected) {
        const Batch batch = loader.next();
        ASSERT_NE(batch.starts, nullptr);
        EXPECT_EQ(std::vector<int>(batch.starts, batch.starts + 4), row);
    }
    DataLoader plain(shards, 1, 4, 1, 0, 1, 0, false);
    EXPECT_EQ(plain.next().starts, nullptr);
}

// ---------------------------------------------------------------------------------------------------------------------

namespace {

struct ThreeSets : TempFolder {
    ThreeSets() {
        for (const char* name : {"big", "mid", "small"}) std::filesystem::create_directory(path(name));
        write_shard(path("big/train_000.bin"), counting(5000, 0, 10000), 30000, 2, 7);
        write_shard(path("big/train_001.bin"), counting(3000, 5000, 10000), 30000, 2, 7);
        write_shard(path("mid/train_000.bin"), counting(900, 10000), 30000, 2, 7);
        write_shard(path("small/train_000.bin"), counting(60, 20000), 30000, 2, 7);
    }
    std::vector<std::string> arguments() const { return {path("big:0.5"), path("mid/*.bin:0.3"), path("small:0.2")}; }
};

} // namespace

TEST(Mixture, ArgumentsAreReadAndDefectsNamed) {
    ThreeSets folder;
    const Mixture mixture(folder.arguments(), 30000);
    ASSERT_EQ(mixture.sets().size(), 3u);
    EXPECT_EQ(mixture.sets()[0]->total_tokens(), 8000);
    EXPECT_EQ(mixture.total_tokens(), 8960);
    EXPECT_EQ(mixture.info().size(), 4u);
    EXPECT_DOUBLE_EQ(mixture.share(1), 0.3);
    EXPECT_EQ(mixture.fingerprint(), 7u);
    EXPECT_EQ(mixture.eos(), 2);
    const Mixture plain({folder.path("big"), folder.path("mid/*.bin")}, 30000);           // without weights: one set
    EXPECT_EQ(plain.sets().size(), 1u);
    EXPECT_EQ(plain.total_tokens(), 8900);
    write_shard(folder.path("odd:2"), counting(50));                                      // a path that ends like a weight
    EXPECT_EQ(Mixture({folder.path("odd:2")}, 0).total_tokens(), 50);
    EXPECT_EQ(Mixture({folder.path("odd:2:3")}, 0).weights()[0], 3);
    EXPECT_ERROR(Mixture({folder.path("big:0.5"), folder.path("mid")}, 0), "has no weight and others have");
    EXPECT_ERROR(Mixture({folder.path("big:0")}, 0), "'0' is not a weight");
    EXPECT_ERROR(Mixture({folder.path("big:-1")}, 0), "'-1' is not a weight");
    EXPECT_ERROR(Mixture({folder.path("big:x")}, 0), "'x' is not a weight");
    EXPECT_ERROR(Mixture({folder.path("big:nan")}, 0), "'nan' is not a weight");
    EXPECT_ERROR(Mixture({folder.path("none:1")}, 0), "no file matches");
    EXPECT_ERROR(Mixture({}, 0), "no token shards");
    EXPECT_ERROR(MixtureOrder({1, 1e-6}, 0), "draws nothing");
    write_shard(folder.path("other.bin"), counting(50), 30000, 2, 8);
    EXPECT_ERROR(Mixture({folder.path("big:1"), folder.path("other.bin:1")}, 0), "different tokenizers, by fingerprint: 7 and 8");
    write_shard(folder.path("other.bin"), counting(50), 30000, 3, 7);
    EXPECT_ERROR(Mixture({folder.path("big:1"), folder.path("other.bin:1")}, 0), "different EOS ids");
}

TEST(Mixture, SharesAreExactAndEveryDrawComesOnce) {
    const MixtureOrder order({0.7, 0.2, 0.1}, 3);
    std::vector<std::vector<bool>> seen(3, std::vector<bool>(3 * 65536));
    std::vector<int64_t> count(3, 0), first_1000(3, 0);
    for (int64_t g = 0; g < 3 * MixtureOrder::PERIOD; g++) {
        const auto [set, draw] = order(g);
        ASSERT_FALSE(seen[(size_t)set][(size_t)draw]) << "g " << g;
        seen[(size_t)set][(size_t)draw] = true;
        count[(size_t)set]++;
        if (g < 1000) first_1000[(size_t)set]++;
    }
    EXPECT_EQ(count[0], 3 * std::llround(0.7 * 65536));
    EXPECT_EQ(std::accumulate(count.begin(), count.end(), (int64_t)0), 3 * MixtureOrder::PERIOD);
    for (size_t s = 0; s < 3; s++)
        for (int64_t i = 0; i < count[s]; i++) ASSERT_TRUE(seen[s][(size_t)i]);           // draws 0 .. count-1, none left out
    EXPECT_NEAR((double)first_1000[0], 700, 5 * std::sqrt(1000 * 0.7 * 0.3));             // five sigma: mixed from the start
    EXPECT_NEAR((double)first_1000[2], 100, 5 * std::sqrt(1000 * 0.1 * 0.9));
}

TEST(Mixture, SameGlobalBatchesForAnyWorldAndAfterAnyResume) {
    REQUIRE_PINNED();
    ThreeSets folder;
    const Mixture mixture(folder.arguments(), 30000);
    const int64_t T = 7, S = 12, steps = 60;
    std::vector<Sample> reference;
    {
        DataLoader loader(mixture, S, T, S, 0, 1, 99, true);
        for (int64_t step = 0; step < steps; step++)
            for (auto& row : rows(loader.next(), S, T)) reference.push_back(row);
        for (int64_t g = 0; g < S * steps; g++) {
            const auto place = loader.place_at(g);
            ASSERT_EQ(reference[(size_t)g], read(*mixture.sets()[(size_t)place.set], place.sample, T));
        }
    }
    std::vector<int> drawn(3, 0);
    std::map<int, int> small;                                                             // its 8 samples, by first token
    for (const Sample& s : reference) {
        drawn[(size_t)(s.tokens[0] / 10000)]++;
        if (s.tokens[0] >= 20000) small[s.tokens[0]]++;
    }
    EXPECT_NEAR(drawn[0], 360, 68);                                                       // five sigma of 720 draws
    EXPECT_NEAR(drawn[2], 144, 54);
    EXPECT_EQ(small.size(), 8u);
    for (auto [world, B] : std::vector<std::pair<int, int64_t>>{{1, 1}, {2, 3}, {3, 2}, {4, 1}, {12, 1}}) {
        std::vector<Sample> got((size_t)(S * steps));
        for (int rank = 0; rank < world; rank++) {
            auto loader = std::make_unique<DataLoader>(mixture, B, T, S, rank, world, 99, true);
            for (int64_t step = 0; step < steps; step++) {
                if (step % 17 == 16) {                                                    // stopped here, resumed by another process
                    const int64_t position = loader->position();
                    loader = std::make_unique<DataLoader>(mixture, B, T, S, rank, world, 99, true);
                    loader->seek(position);
                }
                for (int64_t a = 0; a < loader->micro_steps(); a++) {
                    const auto batch = rows(loader->next(), B, T);
                    for (int64_t b = 0; b < B; b++) got[(size_t)(step * S + a * world * B + rank * B + b)] = batch[(size_t)b];
                }
            }
        }
        EXPECT_EQ(got, reference) << "world " << world << ", B " << B;
    }
    DataLoader far(mixture, 1, T, 1, 0, 1, 99, true);
    far.seek(1ll << 60);                                                                  // O(1): instant
    EXPECT_EQ(rows(far.next(), 1, T)[0].tokens.size(), (size_t)T);
}

TEST(Mixture, TrillionTokensInAll) {
    REQUIRE_PINNED();
    TempFolder folder;
    const int64_t n = (5ll << 30) + 77, T = 4096;                                         // 5.4e9 tokens a shard, 190 shards: over 10^12
    for (int i = 0; i < 190; i++) {
        char name[32];
        snprintf(name, sizeof name, "train_%03d.bin", i);
        write_text(folder.path(name), shard_header(n, 0, -1, 0));
        std::error_code error;
        std::filesystem::resize_file(folder.path(name), 1024 + 2 * (uint64_t)n, error);   // sparse, takes no disk
        if (error) GTEST_SKIP() << "no sparse files here: " << error.message();
    }
    const int64_t per_shard = (n - 1) / T, samples = 190 * per_shard;
    const auto last = counting(T + 1, 7);
    {
        std::fstream file(folder.path("train_189.bin"), std::ios::in | std::ios::out | std::ios::binary);
        file.seekp(1024 + 2 * (per_shard - 1) * T);
        file << bytes_of(last);
        ASSERT_TRUE(file.good());
    }
    const Mixture mixture({folder.path("")}, 0);
    EXPECT_EQ(mixture.total_tokens(), 190 * n);
    ASSERT_GT(mixture.total_tokens(), 1000000000000ll);
    const Shards& shards = *mixture.sets()[0];
    EXPECT_EQ(shards.samples(T), samples);
    const Sample s = read(shards, samples - 1, T);
    EXPECT_EQ(s.tokens[0], 7);
    EXPECT_EQ(s.targets[(size_t)T - 1], 7 + (int)T);
    EXPECT_EQ(read(shards, samples - per_shard, T).tokens[0], 0);                         // first of the last shard
    EXPECT_ERROR(read(shards, samples, T), "does not exist");
    DataLoader loader(mixture, 2, T, 2, 0, 1, 1, true);
    loader.seek(3 * samples + 12345);                                                     // in the fourth epoch
    EXPECT_EQ(rows(loader.next(), 2, T)[0], read(shards, loader.sample_at(3 * samples + 12345), T));
}
