// What several processes share, tested in one: how the flat order is cut, that any cut saves and loads the same moments, in
// which order buckets complete, and where a run that is no longer finite says that it went wrong. Processes: test_parallel.py.
#include <bit>
#include <thread>

#include <gtest/gtest.h>

#include "../../kernels/data_parallel.cuh"
#include "model_fixture.h"
#include "test_files.h"

namespace {

std::vector<float> read(const float* device, int64_t n, Stream stream) {
    std::vector<float> host((size_t)n);
    copy_to_host(host.data(), device, host.size() * sizeof(float), stream);
    stream_sync(stream);
    return host;
}

// A process's parameters, with moments that differ in every element
struct Shard {
    Model m;
    Shard(const Config& c, int rank, int world) : m(c) {
        const std::vector<int64_t> bounds = DataParallel::shards(m.layout, world);
        m.w.create(m.layout, true, {bounds[rank], bounds[rank + 1]});
        initialise(m, 1);
    }
    void fill() {
        std::vector<float> values((size_t)m.w.own.size());
        for (float* moment : {m.w.m, m.w.v}) {
            for (size_t i = 0; i < values.size(); i++) values[i] = (float)(m.w.own.begin + (int64_t)i) + (moment == m.w.v ? 0.5f : 0.f);
            copy_to_device(moment, values.data(), values.size() * sizeof(float), m.stream);
            stream_sync(m.stream);
        }
    }
};

// In a tensor element i of the flat order must be i (+ 0.5); what lies between tensors is nobody's.
void expect_filled(const Shard& s) {
    for (const float* moment : {s.m.w.m, s.m.w.v}) {
        const std::vector<float> values = read(moment, s.m.w.own.size(), s.m.stream);
        for (const Tensor& t : s.m.layout.tensors) {
            const int64_t flat = s.m.layout.flat(t);
            const Range part = s.m.w.own & Range{flat, flat + t.size};
            for (int64_t i = part.begin; i < part.end; i++)
                ASSERT_EQ(values[(size_t)(i - s.m.w.own.begin)], (float)i + (moment == s.m.w.v ? 0.5f : 0.f)) << t.name;
        }
    }
}

void save(Shard& s, const std::string& folder, int rank, int world) { save_moments(s.m, folder + "/" + moments_file(world > 1, rank, world)); }

} // namespace

TEST(Parallel, ShardsCoverEverythingOnce) {
    for (int64_t n : {1, 127, 128, 129, 1000, 421793280})
        for (int world : {1, 2, 3, 7, 64}) {
            const std::vector<int64_t> bounds = shard_bounds(n, world, 128);
            ASSERT_EQ(bounds.front(), 0);
            ASSERT_EQ(bounds.back(), n);
            for (int r = 0; r < world; r++) {
                ASSERT_LE(bounds[r], bounds[r + 1]);
                ASSERT_LE(bounds[r + 1] - bounds[r], n / world + 256);
                if (bounds[r] < n) { ASSERT_EQ(bounds[r] % 128, 0); }
            }
        }
}

TEST(Parallel, RangesIntersect) {
    const Range a{10, 20};
    EXPECT_EQ((a & Range{0, 5}).size(), 0);
    EXPECT_EQ((a & Range{15, 40}).size(), 5);
    EXPECT_EQ((a & Range{30, 40}).size(), 0);
    EXPECT_EQ((a & Range{0, 100}).begin, 10);
}

// ---------------------------------------------------------------------------------------------------------------------
// bf16, and sums that travel as bf16

TEST(Bf16, RoundsToNearestEven) {
    using cpu::to_bf16;
    const float ulp = 0x1p-7f;                                             // at 1
    EXPECT_EQ(to_bf16(0.f), 0);
    EXPECT_EQ(to_bf16(-0.f), 0x8000);
    EXPECT_EQ(to_bf16(1.f), 0x3f80);
    EXPECT_EQ(to_bf16(1 + ulp / 2), 0x3f80) << "a tie goes to the even one";
    EXPECT_EQ(to_bf16(1 + 3 * ulp / 2), 0x3f82) << "a tie goes to the even one";
    EXPECT_EQ(to_bf16(1 + ulp / 2 + 0x1p-23f), 0x3f81);
    EXPECT_EQ(to_bf16(3.4e38f), 0x7f80) << "larger than the largest bf16 by half a unit: infinity";
    EXPECT_EQ(to_bf16(-INFINITY), 0xff80);
    EXPECT_TRUE(std::isnan(cpu::from_bf16(to_bf16(NAN))));
    EXPECT_TRUE(std::isnan(cpu::from_bf16(to_bf16(std::bit_cast<float>(0x7f800001u)))));
    EXPECT_EQ(cpu::from_bf16(to_bf16(0x1p-133f)), 0x1p-133f) << "the smallest subnormal";
    for (uint32_t bits = 0; bits < 0x10000; bits++)
        if (const float x = cpu::from_bf16((uint16_t)bits); !std::isnan(x)) { ASSERT_EQ(to_bf16(x), bits); }
}

#ifndef SAMBA_CPU
TEST(Bf16, GpuRoundsLikeTheCpu) {
    REQUIRE_GPU();
    for (int64_t n : {1, 3, 4, 1021, 4096}) {
        std::vector<float> x = to_type<float>(random_values((size_t)n + 1, 5, 1e3));
        x[(size_t)n / 2] = INFINITY;
        const DeviceBuffer<float> in(x);
        for (int64_t shift : {0, 1}) {                                     // 1: nothing is aligned
            DeviceBuffer<uint16_t> narrow((size_t)n + 1);
            DeviceBuffer<float> wide((size_t)n + 1);
            gpu::narrow(narrow.ptr + shift, in.ptr + shift, n, Stream{});
            gpu::widen(wide.ptr + shift, narrow.ptr + shift, n, Stream{});
            const std::vector<uint16_t> bits = narrow.host();
            const std::vector<float> values = wide.host();
            for (size_t i = (size_t)shift; i < (size_t)(n + shift); i++) {
                ASSERT_EQ(bits[i], cpu::to_bf16(x[i])) << n << " " << i;
                ASSERT_EQ(values[i], cpu::from_bf16(bits[i])) << n << " " << i;
            }
        }
    }
}
#endif

// `world` ranks in as many threads, each connected to the others by TCP and with a Comm of its own: body(comm)
template <class Body> void with_ranks(int world, Body body) {
    int port = 0;
    { Socket free = listen_on(0); port = port_of(free); }
    std::vector<std::thread> threads;
    for (int rank = 0; rank < world; rank++)
        threads.emplace_back([=] {
            Comm comm;
            comm.start({Launch::tcp, rank, world, -1, "127.0.0.1", port});
            comm.use_device(Comm::Mode::host, Stream{});
            body(comm);
            comm.finish();
        });
    for (std::thread& t : threads) t.join();
}

// What the owners have after the ranks of `world` added up n random numbers each: largest error of an element, in units of
// the sum of its contributions' absolute values
double error_of_sum(int world, int64_t n, bool bf16) {
    const std::vector<int64_t> bounds = shard_bounds(n, world, 128);
    std::vector<double> exact((size_t)n), absolute((size_t)n);
    for (int r = 0; r < world; r++) {
        const std::vector<double> x = rounded<float>(random_values((size_t)n, 100 + (uint64_t)r));
        for (size_t i = 0; i < (size_t)n; i++) { exact[i] += x[i]; absolute[i] += std::fabs(x[i]); }
    }
    std::vector<double> worst((size_t)world);
    with_ranks(world, [&](Comm& comm) {
        const DeviceBuffer<float> x(to_type<float>(random_values((size_t)n, 100 + (uint64_t)comm.rank)));
        if (bf16) comm.reduce_as_bf16(n);
        comm.reduce(x.ptr, {0, n}, bounds);
        const std::vector<float> sum = x.host();
        for (size_t i = (size_t)bounds[comm.rank]; i < (size_t)bounds[comm.rank + 1]; i++)
            worst[comm.rank] = std::max(worst[comm.rank], std::fabs((double)sum[i] - exact[i]) / absolute[i]);
    });
    return *std::max_element(worst.begin(), worst.end());
}

// More than one piece of the staging buffer for each rank. A rounding to float errs by 2^-24 at most, one to bf16 by 2^-8.
TEST(Parallel, SumsAreRoundedAsPromised) {
    REQUIRE_DEVICE();
    constexpr int world = 3;
    constexpr int64_t n = 3300007;
    EXPECT_LE(error_of_sum(world, n, false), (world - 1) * 0x1p-24);
    const double error = error_of_sum(world, n, true);
    EXPECT_LE(error, 0x1p-8 + world * 0x1p-24);
    EXPECT_GE(error, 0x1p-10) << "it did not travel as bf16";
}

// The path between GPUs, with one: what it sums is rounded once, and nothing else
TEST(Parallel, NcclWithOneRankRoundsOnce) {
#ifndef SAMBA_NCCL
    GTEST_SKIP() << "needs a GPU build with NCCL";
#endif
    REQUIRE_GPU();
    constexpr int64_t n = 100003;
    const std::vector<float> values = to_type<float>(random_values(n, 7));
    const DeviceBuffer<float> x(values);
    Comm comm;
    comm.start(Launch{});
    comm.use_device(Comm::Mode::nccl, Stream{});
    comm.reduce_as_bf16(n);
    comm.reduce(x.ptr, {3, n}, {0, n});
    comm.before_compute("the sum");
    const std::vector<float> sum = x.host();
    for (int64_t i = 0; i < n; i++) ASSERT_EQ(sum[(size_t)i], i < 3 ? values[(size_t)i] : cpu::from_bf16(cpu::to_bf16(values[(size_t)i]))) << i;
}

TEST(Parallel, MomentsPassThroughFourThreeAndOneProcesses) {
    REQUIRE_DEVICE();
    const Config c = small_config("MS");
    std::vector<std::unique_ptr<TempFolder>> folders;
    int before = 0;
    for (int world : {4, 3, 1, 2}) {
        folders.push_back(std::make_unique<TempFolder>());
        for (int rank = 0; rank < world; rank++) {
            Shard shard(c, rank, world);
            if (before == 0) shard.fill();
            else load_checkpoint_moments(shard.m, folders[folders.size() - 2]->root);
            expect_filled(shard);
            save(shard, folders.back()->root, rank, world);
        }
        EXPECT_EQ((int)folders.back()->list().size(), world);
        before = world;
    }
}

TEST(Parallel, AMissingPieceIsNamed) {
    REQUIRE_DEVICE();
    const Config c = small_config("MS");
    TempFolder folder;
    for (int rank : {0, 1, 3}) {
        Shard shard(c, rank, 4);
        shard.fill();
        save(shard, folder.root, rank, 4);
    }
    Shard reader(c, 0, 1);
    try {
        load_checkpoint_moments(reader.m, folder.root);
        FAIL() << "no error";
    } catch (const Error& e) {
        EXPECT_NE(std::string(e.what()).find("a part is missing"), std::string::npos) << e.what();
    }
}

// Whatever the buckets' size: together they are everything, each once, and none is sent before its layers are through.
TEST(Parallel, BucketsFollowBackward) {
    REQUIRE_DEVICE();
    for (const char* blocks : {"MSMS", "TT", "ss", "mmm", "PF"})
        for (int64_t bytes : {1, 5000, 20000, 1 << 30}) {
            Comm comm;
            comm.forced = true;
            Model m(small_config(blocks));
            m.w.create(m.layout, true);
            DataParallel parallel(comm, m, 1, bytes);
            std::vector<int> sent((size_t)m.w.n);
            int64_t below = m.layout.layer_matrices.back();
            for (const auto& b : parallel.buckets) {
                EXPECT_EQ(b.matrices.end, below);
                EXPECT_EQ(b.matrices.begin, b.last_layer < 0 ? 0 : m.layout.layer_matrices[b.last_layer]);
                below = b.matrices.begin;
                for (Range r : {b.matrices, b.vectors})
                    for (int64_t i = r.begin; i < r.end; i++) sent[(size_t)i]++;
            }
            EXPECT_EQ(parallel.buckets.back().last_layer, -1);
            for (int count : sent) ASSERT_EQ(count, 1);
            if (bytes == 1) { EXPECT_EQ(parallel.buckets.size(), m.layout.layers.size()); }
            m.before_layer = m.after_layer = nullptr;
        }
}

TEST(Parallel, NamesTheFirstLayerThatIsNotFinite) {
    REQUIRE_DEVICE();
    Fixture f(small_config("MS"), 1, 16, Recompute::full);
    const auto where = [&](const char* name) {
        initialise(f.m, 1);
        for (const Tensor& t : f.m.layout.tensors)
            if (t.name == name) upload_tensor(f.m, t, std::vector<float>((size_t)t.size, NAN).data());
        f.loss_and_gradients();
        return first_not_finite(f.m, f.B, f.T);
    };
    EXPECT_EQ(where(""), "");
    EXPECT_EQ(where("lm_head.weight"), "the output of the embedding");
    EXPECT_EQ(where("transformer.h.0.attn.A_log"), "the output of layer 0, the mamba of block 0");
    EXPECT_EQ(where("transformer.h.0.mlp.swiglu.w3.weight"), "the output of layer 1, the mlp of block 0");
    EXPECT_EQ(where("transformer.h.1.attn.proj.weight"), "the output of layer 2, the attention of block 1");
    EXPECT_EQ(where("transformer.ln_f.weight"), "the output of the head");
}
