// The Hopper attention kernels against the twin in double: every kind of tile edge (window, T, batch, documents, earlier keys in the
// ring), grouped heads, poisoned outputs, bit-identical repeats, and several rounds of work per block.
#include "attention_checks.h"

#ifndef SAMBA_CPU

namespace {

using bf16 = __nv_bfloat16;
const AttentionPath HOPPER = {false}, HOPPER_AGAIN = {false, 0};         // dS kept; made again

#define REQUIRE_HOPPER() \
    REQUIRE_GPU();       \
    if (!is_hopper()) GTEST_SKIP() << "needs compute capability 9.0"

bool is_hopper() {
    const DeviceInfo info = device_info();
    return info.compute_major == 9 && info.compute_minor == 0;
}

const AttentionCase HOPPER_CASES[] = {
    {1, 1, 2, 1, 64, 0},      {2, 1, 2, 2, 128, 2048},  {1, 64, 2, 2, 64, 0},     {1, 128, 2, 2, 128, 0},   {2, 130, 4, 2, 64, 17},
    {1, 300, 3, 1, 128, 1},   {1, 300, 4, 2, 128, 100}, {2, 257, 2, 2, 128, 64},  {1, 513, 2, 1, 128, 0},   {1, 700, 2, 1, 128, 257},
    {1, 700, 2, 2, 64, 300},  {1, 200, 2, 2, 128, 17},  {3, 63, 1, 1, 128, 17},   {2, 65, 1, 1, 64, 1},     {1, 1000, 1, 1, 128, 5000},
    {1, 129, 8, 1, 64, 129},  {1, 640, 1, 1, 128, 128}, {1, 640, 1, 1, 128, 129}, {1, 640, 1, 1, 128, 127}, {1, 640, 2, 1, 64, 255},
    {1, 640, 1, 1, 128, 256}, {1, 900, 1, 1, 128, 384}, {1, 900, 1, 1, 64, 513},  {5, 127, 3, 3, 128, 40},  {2, 191, 6, 2, 64, 0},
    {1, 900, 1, 1, 128, 448}, {1, 900, 2, 1, 128, 192},   {1, 192, 2, 2, 128, 100},  {2, 193, 2, 1, 64, 150},  {1, 1345, 3, 3, 128, 0},
};

// More tiles than blocks: items are drawn, rings and barriers pass from item to item, sections end
const AttentionCase MANY_ROUNDS[] = {
    {7, 650, 16, 4, 64, 200},   {5, 390, 24, 24, 128, 150}, {2, 1300, 8, 8, 128, 500}, {3, 100, 64, 64, 128, 0},
    {2, 1000, 30, 10, 128, 512}, {4, 300, 40, 8, 64, 1},    {2, 900, 30, 10, 128, 512, true}, {3, 500, 30, 30, 64, 0, true},
};

// Earlier keys: a ring half full, full, with slot 0 inside a tile and between tiles, larger than the window, with documents
const AttentionCase RING_CASES[] = {
    {2, 70, 2, 1, 64, 100, false, 99, 40},       {1, 200, 2, 2, 128, 300, false, 299, 1000}, {1, 300, 2, 1, 128, 257, false, 256, 5120},
    {2, 130, 2, 1, 128, 513, false, 700, 3333},  {1, 1, 4, 2, 64, 200, false, 199, 777},     {1, 150, 2, 1, 128, 200, true, 199, 1234},
    {2, 90, 3, 3, 64, 0, true, 500, 450},        {1, 600, 2, 1, 128, 1000, false, 999, 2500}, {1, 700, 40, 10, 128, 2048, false, 2047, 9999},
    {3, 129, 64, 64, 64, 130, true, 129, 1280},  {2, 40, 2, 1, 128, 1500, false, 1499, 5000}, // few queries, many tiles: warpgroups without rows
};

TEST(AttentionHopper, BuiltForIt) {
    REQUIRE_HOPPER();
    EXPECT_TRUE(gpu::sm90::usable()) << "build with ARCH=90a";
}

TEST(AttentionSchedule, DivisionsByMultiplication) {
    for (int d : {1, 2, 3, 7, 32, 33, 96, 1056, 4095, 4096, 65537, 1 << 30, INT_MAX})
        for (int64_t n : {0, 1, 2, 100, 12345678, INT_MAX - 1, INT_MAX})
            for (int64_t m : {n, n / d * d, n / d * d - 1})
                if (m >= 0) EXPECT_EQ(gpu::sm90::Divisor(d).quotient((int)m), m / d) << m << " / " << d;
}

// Every tile of every owner once, heavy tiles first inside a section: whole sections, a last one, fewer owners than a section has
TEST(AttentionSchedule, EveryItemOnce) {
    using namespace gpu::sm90;
    for (int tiles : {1, 3, 32})
        for (int owners : {1, 2, 5, 14, 19, 20, 33, 66, 96, 97})
            for (int blocks : {1, 16, 132})
                for (bool last_first : {false, true}) {
                    const Schedule s = schedule(tiles, owners, blocks, last_first);
                    const std::string name = std::to_string(tiles) + " tiles of " + std::to_string(owners) + ", blocks " + std::to_string(blocks);
                    std::vector<int> times(tiles * owners, 0), before(owners, last_first ? tiles : -1);
                    ASSERT_EQ(s.items, tiles * owners) << name;
                    for (int n = 0; n < s.items; n++) {
                        const Work work = work_item(s, n);
                        ASSERT_TRUE(work.tile >= 0 && work.tile < tiles && work.owner >= 0 && work.owner < owners) << name << ", item " << n;
                        times[work.owner * tiles + work.tile]++;
                        EXPECT_EQ(work.tile, before[work.owner] + (last_first ? -1 : 1)) << name << ", item " << n;
                        before[work.owner] = work.tile;
                    }
                    EXPECT_EQ(std::count(times.begin(), times.end(), 1), s.items) << name;
                }
}

TEST(AttentionHopper, ForwardMatchesTwin) {
    REQUIRE_HOPPER();
    for (const AttentionCase& c : HOPPER_CASES) expect_forward<bf16>(c, HOPPER);
}
TEST(AttentionHopper, ForwardWithDocuments) {
    REQUIRE_HOPPER();
    for (const AttentionCase& c : HOPPER_CASES) expect_forward<bf16>(c.with_documents(), HOPPER);
}
TEST(AttentionHopper, ForwardAfterEarlierKeys) {
    REQUIRE_HOPPER();
    for (const AttentionCase& c : RING_CASES) expect_forward<bf16>(c, HOPPER);
}
TEST(AttentionHopper, ForwardManyRounds) {
    REQUIRE_HOPPER();
    for (const AttentionCase& c : MANY_ROUNDS) expect_forward<bf16>(c, HOPPER);
}

// Large scores: a running maximum that keeps growing from tile to tile, and rows whose weight is on one key
TEST(AttentionHopper, ForwardWithSharpScores) {
    REQUIRE_HOPPER();
    const AttentionCase c{1, 600, 2, 1, 128, 333};
    for (double growth : {4.0, 12.0}) {                                                      // 12: terms of the first base would overflow
        AttentionData<bf16> x(c, 12);
        for (int64_t t = 0; t < c.T; t++)
            for (int64_t i = 0; i < c.row(); i++)
                if (i / c.hd < 3) x.qkv[t * c.row() + i] *= 1.0 + growth * (c.T - t) / c.T;  // queries and keys: the farther back, the larger
        x.qkv = rounded<bf16>(x.qkv);
        const AttentionResults want = twin_forward(c, x);
        AttentionOnGpu<bf16> on_gpu(c, x, HOPPER);
        on_gpu.forward();
        EXPECT_LT(rel_l2(to_double(on_gpu.out.host()), want.out), tolerance<bf16>()) << growth;
        EXPECT_LT(rel_l2(to_double(on_gpu.lse.host()), want.lse), 1e-5) << growth;
    }
}

TEST(AttentionHopper, BackwardMatchesTwin) {
    REQUIRE_HOPPER();
    for (const AttentionCase& c : HOPPER_CASES) expect_backward<bf16>(c, {HOPPER, HOPPER_AGAIN});
}
TEST(AttentionHopper, BackwardWithDocuments) {
    REQUIRE_HOPPER();
    for (const AttentionCase& c : HOPPER_CASES) expect_backward<bf16>(c.with_documents(), {HOPPER, HOPPER_AGAIN});
}
TEST(AttentionHopper, BackwardAfterEarlierKeys) {
    REQUIRE_HOPPER();
    for (const AttentionCase& c : RING_CASES) expect_backward<bf16>(c, {HOPPER});
}
TEST(AttentionHopper, BackwardTurnsBack) {
    REQUIRE_HOPPER();
    for (const AttentionCase& c : HOPPER_CASES)
        if (c.T > 1 && c.window != 1) expect_backward<bf16>(c.with_rope(), {HOPPER, HOPPER_AGAIN});
    for (const AttentionCase& c : RING_CASES) expect_backward<bf16>(c.with_rope(), {HOPPER});
    expect_backward<bf16>(AttentionCase{2, 1000, 30, 10, 128, 512, true}.with_rope(), {HOPPER, HOPPER_AGAIN});
}
TEST(AttentionHopper, BackwardManyRounds) {
    REQUIRE_HOPPER();
    for (const AttentionCase& c : MANY_ROUNDS) expect_backward<bf16>(c, {HOPPER, HOPPER_AGAIN});
}

TEST(AttentionHopper, LongSequences) {
    REQUIRE_HOPPER();
    const int64_t all = (int64_t)1 << 40;                                                    // dS of more than 2^31 bytes
    expect_long<bf16>({1, 131072, 2, 1, 128, 1}, HOPPER);
    expect_long<bf16>({1, 131072, 2, 1, 64, 17}, HOPPER);
    expect_long<bf16>({1, 131072, 4, 2, 128, 2048, true}, {false, all});
    expect_long<bf16>({1, 131072, 2, 1, 128, 2048}, HOPPER);
    expect_long<bf16>({1, 131072, 1, 1, 64, 200000}, HOPPER);
}

TEST(AttentionHopper, SameBitsEveryTime) {
    REQUIRE_HOPPER();
    expect_same_bits<bf16>({2, 1500, 16, 4, 128, 600, true}, HOPPER);
    expect_same_bits<bf16>({2, 1500, 16, 4, 128, 600}, HOPPER_AGAIN);
    expect_same_bits<bf16>({3, 700, 16, 16, 64, 0}, HOPPER);
}

TEST(AttentionHopper, LeavesOtherShapesAlone) {
    REQUIRE_HOPPER();
    DeviceBuffer<bf16> x(4096);
    DeviceBuffer<float> l(64);
    for (int hd : {256, 96}) {
        gpu::attn::Args<bf16> a = gpu::attention_args<bf16>(x.ptr, nullptr, 0, 0, nullptr, 1, 1, 1, 1, hd, 0);
        a.out = x.ptr, a.lse = l.ptr;
        EXPECT_FALSE(gpu::sm90::forward_if_supported(a, Stream{}));
    }
}

} // namespace
#endif
