// The Hopper attention kernels against the twin in double: every kind of tile edge (window, T, batch), grouped heads, poisoned
// outputs, bit-identical repeats, and several rounds of work per block.
#include "../../kernels/cpu/attention.h"
#include "test_util.h"

#ifndef SAMBA_CPU
#include "../../kernels/attention_sm90.cuh"

namespace {

using bf16 = __nv_bfloat16;

#define REQUIRE_HOPPER() \
    REQUIRE_GPU();       \
    if (!is_hopper()) GTEST_SKIP() << "needs compute capability 9.0"

bool is_hopper() {
    const DeviceInfo info = device_info();
    return info.compute_major == 9 && info.compute_minor == 0;
}

struct HopperCase {
    int B;
    int64_t T;
    int H, G, hd;
    int64_t window;
    int64_t row() const { return (int64_t)(H + 2 * G) * hd; }
    size_t qkv() const { return (size_t)(B * T * row()); }
    size_t out() const { return (size_t)(B * T * H * hd); }
    size_t lse() const { return (size_t)(B * H * T); }
    std::string name() const {
        return "B " + std::to_string(B) + " T " + std::to_string(T) + " H " + std::to_string(H) + " G " + std::to_string(G) + " hd " +
               std::to_string(hd) + " window " + std::to_string(window);
    }
};

const HopperCase HOPPER_CASES[] = {
    {1, 1, 2, 1, 64, 0},      {2, 1, 2, 2, 128, 2048},  {1, 64, 2, 2, 64, 0},     {1, 128, 2, 2, 128, 0},   {2, 130, 4, 2, 64, 17},
    {1, 300, 3, 1, 128, 1},   {1, 300, 4, 2, 128, 100}, {2, 257, 2, 2, 128, 64},  {1, 513, 2, 1, 128, 0},   {1, 700, 2, 1, 128, 257},
    {1, 700, 2, 2, 64, 300},  {1, 200, 2, 2, 128, 17},  {3, 63, 1, 1, 128, 17},   {2, 65, 1, 1, 64, 1},     {1, 1000, 1, 1, 128, 5000},
    {1, 129, 8, 1, 64, 129},  {1, 640, 1, 1, 128, 128}, {1, 640, 1, 1, 128, 129}, {1, 640, 1, 1, 128, 127}, {1, 640, 2, 1, 64, 255},
    {1, 640, 1, 1, 128, 256}, {1, 900, 1, 1, 128, 384}, {1, 900, 1, 1, 64, 513}, {1, 900, 1, 1, 128, 448}, {1, 900, 2, 1, 128, 192},  {5, 127, 3, 3, 128, 40},  {2, 191, 6, 2, 64, 0},
};

struct HopperOutputs { std::vector<double> out, lse; };
HopperOutputs twin_forward(const std::vector<double>& qkv, const HopperCase& c) {
    HopperOutputs r{std::vector<double>(c.out()), std::vector<double>(c.lse())};
    cpu::attention_forward(r.out.data(), r.lse.data(), qkv.data(), nullptr, 0, 0, c.B, c.T, c.H, c.G, c.hd, c.window);
    return r;
}

TEST(AttentionHopper, BuiltForIt) {
    REQUIRE_HOPPER();
    EXPECT_TRUE(gpu::sm90::usable()) << "build with ARCH=90a";
}

TEST(AttentionHopper, ForwardMatchesTwin) {
    REQUIRE_HOPPER();
    for (const HopperCase& c : HOPPER_CASES) {
        const std::vector<double> qkv = rounded<bf16>(random_values(c.qkv(), 6, 2.0));
        const HopperOutputs want = twin_forward(qkv, c);
        DeviceBuffer<bf16> x(to_type<bf16>(qkv)), out(c.out()), again(c.out());
        DeviceBuffer<float> lse(c.lse());
        ASSERT_TRUE(gpu::sm90::attention_forward(out.ptr, lse.ptr, x.ptr, c.B, c.T, c.H, c.G, c.hd, c.window));
        ASSERT_TRUE(gpu::sm90::attention_forward(again.ptr, lse.ptr, x.ptr, c.B, c.T, c.H, c.G, c.hd, c.window));
        const std::vector<bf16> got = out.host(), got_again = again.host();
        EXPECT_LT(rel_l2(to_double(got), want.out), tolerance<bf16>()) << c.name();
        EXPECT_LT(rel_l2(to_double(lse.host()), want.lse), 1e-5) << c.name();               // fp32
        EXPECT_EQ(memcmp(got.data(), got_again.data(), got.size() * sizeof(bf16)), 0) << c.name();
    }
}

// Large scores: a running maximum that keeps growing from tile to tile, and rows whose weight is on one key
TEST(AttentionHopper, ForwardWithSharpScores) {
    REQUIRE_HOPPER();
    const HopperCase c{1, 600, 2, 1, 128, 333};
    std::vector<double> qkv = random_values(c.qkv(), 12, 2.0);
    for (int64_t t = 0; t < c.T; t++)
        for (int64_t i = 0; i < c.row(); i++)
            if (i / c.hd < 3) qkv[t * c.row() + i] *= 1.0 + 4.0 * (c.T - t) / c.T;           // queries and keys: the farther back, the larger
    qkv = rounded<bf16>(qkv);
    const HopperOutputs want = twin_forward(qkv, c);
    DeviceBuffer<bf16> x(to_type<bf16>(qkv)), out(c.out());
    DeviceBuffer<float> lse(c.lse());
    ASSERT_TRUE(gpu::sm90::attention_forward(out.ptr, lse.ptr, x.ptr, c.B, c.T, c.H, c.G, c.hd, c.window));
    EXPECT_LT(rel_l2(to_double(out.host()), want.out), tolerance<bf16>());
    EXPECT_LT(rel_l2(to_double(lse.host()), want.lse), 1e-5);
}

// More tiles than blocks: rings and barriers pass from item to item, the schedule turns back, sections end.
TEST(AttentionHopper, ForwardManyRounds) {
    REQUIRE_HOPPER();
    for (const HopperCase& c : {HopperCase{7, 650, 16, 4, 64, 200}, {5, 390, 24, 24, 128, 150}, {3, 100, 64, 64, 128, 0},
                                {2, 1500, 30, 10, 128, 512}, {4, 300, 40, 8, 64, 1}}) {
        const std::vector<double> qkv = rounded<bf16>(random_values(c.qkv(), 13, 2.0));
        const HopperOutputs want = twin_forward(qkv, c);
        DeviceBuffer<bf16> x(to_type<bf16>(qkv)), out(c.out());
        DeviceBuffer<float> lse(c.lse());
        ASSERT_TRUE(gpu::sm90::attention_forward(out.ptr, lse.ptr, x.ptr, c.B, c.T, c.H, c.G, c.hd, c.window));
        EXPECT_LT(rel_l2(to_double(out.host()), want.out), tolerance<bf16>()) << c.name();
        EXPECT_LT(rel_l2(to_double(lse.host()), want.lse), 1e-5) << c.name();
    }
}

// The part of qkv that holds queries (0), keys (1) or values (2)
std::vector<double> part_of(const std::vector<double>& qkv, const HopperCase& c, int part) {
    std::vector<double> out;
    const int R = c.H / c.G;
    for (int64_t i = 0; i < (int64_t)qkv.size(); i++) {
        const int slot = i / c.hd % (R + 2);
        if ((slot < R ? 0 : slot - R + 1) == part) out.push_back(qkv[i]);
    }
    return out;
}

void expect_backward(const HopperCase& c) {
    const std::vector<double> qkv = rounded<bf16>(random_values(c.qkv(), 7, 2.0)), dout = rounded<bf16>(random_values(c.out(), 8));
    HopperOutputs y = twin_forward(qkv, c);
    y.out = rounded<bf16>(y.out), y.lse = rounded<float>(y.lse);
    std::vector<double> want(c.qkv()), workspace64(cpu::attention_backward_workspace(c.B, c.T, c.H, c.G, c.hd) / sizeof(double) + 1);
    cpu::attention_backward(want.data(), dout.data(), y.out.data(), qkv.data(), y.lse.data(), workspace64.data(), c.B, c.T, c.H, c.G, c.hd, c.window);
    DeviceBuffer<bf16> x(to_type<bf16>(qkv)), g(to_type<bf16>(dout)), o(to_type<bf16>(y.out)), dx(c.qkv()), again(c.qkv());
    DeviceBuffer<float> l(to_type<float>(y.lse));
    DeviceBuffer<char> workspace(gpu::sm90::attention_backward_workspace(c.B, c.T, c.H, c.G, c.hd));
    ASSERT_TRUE(gpu::sm90::attention_backward(dx.ptr, g.ptr, o.ptr, x.ptr, l.ptr, workspace.ptr, c.B, c.T, c.H, c.G, c.hd, c.window));
    ASSERT_TRUE(gpu::sm90::attention_backward(again.ptr, g.ptr, o.ptr, x.ptr, l.ptr, workspace.ptr, c.B, c.T, c.H, c.G, c.hd, c.window));
    const std::vector<bf16> got = dx.host(), got_again = again.host();
    EXPECT_LT(rel_l2(to_double(got), want), tolerance<bf16>()) << c.name();
    EXPECT_EQ(memcmp(got.data(), got_again.data(), got.size() * sizeof(bf16)), 0) << c.name();
    if (c.T == 1 || c.window == 1) return;                                                   // one key: dq = dk = 0 up to rounding
    for (int part = 0; part < 3; part++)
        EXPECT_LT(rel_l2(part_of(to_double(got), c, part), part_of(want, c, part)), tolerance<bf16>()) << c.name() << " part " << "qkv"[part];
}

TEST(AttentionHopper, BackwardMatchesTwin) {
    REQUIRE_HOPPER();
    for (const HopperCase& c : HOPPER_CASES) expect_backward(c);
}

TEST(AttentionHopper, BackwardManyRounds) {
    REQUIRE_HOPPER();
    for (const HopperCase& c : {HopperCase{7, 650, 16, 4, 64, 200}, {5, 390, 24, 24, 128, 150}, {2, 1300, 8, 8, 128, 500}, {3, 100, 64, 64, 128, 0},
                                {2, 1500, 30, 10, 128, 512}, {4, 300, 40, 8, 64, 1}}) expect_backward(c);
}

TEST(AttentionHopper, LeavesOtherShapesAlone) {
    REQUIRE_HOPPER();
    DeviceBuffer<bf16> x(4096);
    DeviceBuffer<float> l(64);
    EXPECT_FALSE(gpu::sm90::attention_forward(x.ptr, l.ptr, x.ptr, 1, 1, 1, 1, 256, 0));
    EXPECT_FALSE(gpu::sm90::attention_forward(x.ptr, l.ptr, x.ptr, 1, 1, 1, 1, 96, 0));
}

} // namespace
#endif
