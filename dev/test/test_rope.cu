// RoPE: its twin against the formula and finite differences; the GPU against the twin.
#include "../../kernels/cpu/rope.h"
#ifndef SAMBA_CPU
#include "../../kernels/rope.cuh"
#endif
#include "test_util.h"

#include <cfloat>

namespace {

struct RopeCase { int B; int64_t T, position; int H, G, head_dim; };
const RopeCase ROPE_CASES[] = {{2, 7, 0, 4, 2, 64}, {1, 1, 131071, 3, 3, 128}, {3, 33, 5, 8, 1, 16}, {1, 65, 1000000, 2, 1, 40},
                               {1, 5, 0, 1, 1, 256}, {2, 9, 3, 2, 2, 6}, {1, 40, 10000000, 2, 1, 128}, {1, 3, 10000000000, 1, 1, 64}};

size_t rope_size(const RopeCase& c) { return (size_t)c.B * c.T * (c.H + 2 * c.G) * c.head_dim; }

TEST(RopeCpu, TableIsTheFormula) {
    const int64_t position = 131000, T = 5;
    std::vector<double> table(T * 32 * 2);
    std::vector<float> table32(T * 32 * 2);
    cpu::rope_table(table.data(), position, T, 64, 10000.0);
    cpu::rope_table(table32.data(), position, T, 64, 10000.0);
    for (int t = 0; t < T; t++)
        for (int j = 0; j < 32; j++) {
            const double angle = (position + t) / std::pow(10000.0, j / 32.0);
            EXPECT_NEAR(table[(t * 32 + j) * 2 + 0], std::cos(angle), 1e-9);
            EXPECT_NEAR(table[(t * 32 + j) * 2 + 1], std::sin(angle), 1e-9);
            EXPECT_NEAR(table32[(t * 32 + j) * 2 + 0], std::cos(angle), 6e-8);
            EXPECT_NEAR(table32[(t * 32 + j) * 2 + 1], std::sin(angle), 6e-8);
        }
}

// Position, pair, head_dim and the cosine and sine of position 10000^(-2 pair/head_dim), by decimal arithmetic of 70 digits
const struct { int64_t position; int pair, head_dim; double cosine, sine; } FAR_ANGLES[] = {
    {10000000, 0, 128, -0.90727038618173961, 0.4205477931907825},      {10000000, 1, 128, 0.98664521336781807, 0.16288407822243661},
    {10000000, 17, 128, -0.99986615680575108, -0.016360576838769156},  {10000000, 63, 128, 0.24419017156224881, -0.96972736380510549},
    {10000000, 5, 64, 0.57332923361041133, -0.81932508193494136},      {123456789, 0, 128, 0.14025968153390964, 0.99011475180203545},
    {123456789, 1, 128, -0.71403940163252344, -0.70010551555909617},   {123456789, 17, 128, -0.64869851245521293, 0.76104549137248945},
    {123456789, 63, 128, 0.99979758976402777, 0.020119132735803402},   {123456789, 5, 64, 0.64217615818687479, -0.76655709627942648},
    {2147495993, 0, 128, -0.93875926815157718, -0.3445737025071926},   {2147495993, 1, 128, 0.85334443447750741, 0.52134755791723342},
    {2147495993, 17, 128, 0.25641980141646076, 0.96656551016552561},   {2147495993, 63, 128, -0.48083065612058301, -0.87681348081256694},
    {2147495993, 5, 64, 0.95130666025675992, -0.30824606753554773},    {10000000000, 0, 128, 0.87311962267685606, -0.48750602508751067},
    {10000000000, 1, 128, 0.96885054918435431, 0.24764614542765445},   {10000000000, 17, 128, -0.7940558953421335, -0.60784474586229886},
    {10000000000, 63, 128, -0.069416033285674889, 0.99758779780171836}, {10000000000, 5, 64, 0.45847625709307066, 0.88870665671071047}};

// What a position may be off by, position 2^-64 turns; a double's and a float's own rounding
double far_tolerance(int64_t position, double rounding) { return (double)position * 2 * M_PI * 0x1p-64 + rounding; }

TEST(RopeCpu, FarAnglesAreExact) {
    for (const auto& want : FAR_ANGLES) {
        std::vector<double> table(want.head_dim);
        std::vector<float> table32(want.head_dim);
        cpu::rope_table(table.data(), want.position, 1, want.head_dim, 10000.0);
        cpu::rope_table(table32.data(), want.position, 1, want.head_dim, 10000.0);
        EXPECT_NEAR(table[2 * want.pair], want.cosine, far_tolerance(want.position, 4e-16));
        EXPECT_NEAR(table[2 * want.pair + 1], want.sine, far_tolerance(want.position, 4e-16));
        EXPECT_NEAR(table32[2 * want.pair], want.cosine, far_tolerance(want.position, 0x1p-25));
        EXPECT_NEAR(table32[2 * want.pair + 1], want.sine, far_tolerance(want.position, 0x1p-25));
    }
}

// Long double has 64 bits: the same error again
TEST(RopeCpu, AngleOfEveryPairIsTheFormulaInLongDouble) {
    if (sizeof(long double) < 16 || LDBL_MANT_DIG < 64) GTEST_SKIP() << "needs a long double of 64 bits";
    for (int64_t position : {0ll, 1ll, 65535ll, 10000000ll, 999999937ll}) {
        std::vector<double> table(3 * 128);
        cpu::rope_table(table.data(), position, 3, 128, 10000.0);
        for (int t = 0; t < 3; t++)
            for (int j = 0; j < 64; j++) {
                const long double angle = (long double)(position + t) * std::pow(10000.0L, -j / 64.0L);
                EXPECT_NEAR(table[(t * 64 + j) * 2], (double)std::cos(angle), 2 * far_tolerance(position + t, 4e-16)) << position << " " << j;
                EXPECT_NEAR(table[(t * 64 + j) * 2 + 1], (double)std::sin(angle), 2 * far_tolerance(position + t, 4e-16)) << position << " " << j;
            }
    }
}

// Two query heads and a key head of one group, hd 4: only queries and keys turn, (x0, x2) by t and (x1, x3) by t/100.
TEST(RopeCpu, HalfSplitByHand) {
    std::vector<double> table(2 * 2 * 2), x(2 * 4 * 4);
    for (size_t i = 0; i < x.size(); i++) x[i] = (double)i + 1;
    const std::vector<double> before = x;
    cpu::rope_table(table.data(), 0, 2, 4, 10000.0);
    cpu::rope_forward(x.data(), table.data(), 1, 2, 2, 1, 4);
    for (int t = 0; t < 2; t++)
        for (int head = 0; head < 4; head++)
            for (int j = 0; j < 2; j++) {
                const double angle = head == 3 ? 0 : (j == 0 ? t : t / 100.0);
                const double x1 = before[(t * 4 + head) * 4 + j], x2 = before[(t * 4 + head) * 4 + j + 2];
                EXPECT_NEAR(x[(t * 4 + head) * 4 + j], x1 * std::cos(angle) - x2 * std::sin(angle), 1e-12);
                EXPECT_NEAR(x[(t * 4 + head) * 4 + j + 2], x1 * std::sin(angle) + x2 * std::cos(angle), 1e-12);
            }
}

TEST(RopeCpu, BackwardIsTheGradient) {
    for (const RopeCase& c : ROPE_CASES) {
        std::vector<double> x = random_values(rope_size(c), 1), weight = random_values(rope_size(c), 2), table((size_t)c.T * c.head_dim);
        cpu::rope_table(table.data(), c.position, c.T, c.head_dim, 10000.0);
        std::vector<double> dx = weight;
        cpu::rope_backward(dx.data(), table.data(), c.B, c.T, c.H, c.G, c.head_dim);
        expect_gradient([&] {
            std::vector<double> y = x;
            cpu::rope_forward(y.data(), table.data(), c.B, c.T, c.H, c.G, c.head_dim);
            double sum = 0;
            for (size_t i = 0; i < y.size(); i++) sum += weight[i] * y[i];
            return sum;
        }, x, dx, "rope dx");
    }
}

TEST(RopeCpu, RefusesOddShapes) {
    double x[64] = {}, table[64] = {};
    EXPECT_THROW(cpu::rope_forward(x, table, 1, 1, 3, 2, 4), Error);
    EXPECT_THROW(cpu::rope_forward(x, table, 1, 1, 2, 1, 5), Error);
}

#ifndef SAMBA_CPU
TEST(RopeGpu, TableMatchesTwin) {
    REQUIRE_GPU();
    for (const RopeCase& c : ROPE_CASES) {
        std::vector<double> want((size_t)c.T * c.head_dim);
        cpu::rope_table(want.data(), c.position, c.T, c.head_dim, 10000.0);
        DeviceBuffer<float> table((size_t)c.T * c.head_dim);
        gpu::rope_table(table.ptr, c.position, c.T, c.head_dim, 10000.0, Stream{});
        const std::vector<float> got = table.host();
        for (size_t i = 0; i < got.size(); i++) ASSERT_NEAR(got[i], want[i], 6e-8) << "element " << i;      // half an ulp of a float near 1
    }
}

TEST(RopeGpu, FarAnglesAreExact) {
    REQUIRE_GPU();
    for (const auto& want : FAR_ANGLES) {
        DeviceBuffer<float> table((size_t)want.head_dim);
        gpu::rope_table(table.ptr, want.position, 1, want.head_dim, 10000.0, Stream{});
        const std::vector<float> got = table.host();
        EXPECT_NEAR(got[2 * want.pair], want.cosine, far_tolerance(want.position, 0x1p-25));
        EXPECT_NEAR(got[2 * want.pair + 1], want.sine, far_tolerance(want.position, 0x1p-25));
    }
}

TEST(RopeGpu, MatchesTwinBothWays) {
    REQUIRE_GPU();
    for (const RopeCase& c : ROPE_CASES) {
        const std::vector<double> x = rounded<floatX>(random_values(rope_size(c), 3));
        std::vector<double> table64((size_t)c.T * c.head_dim);
        cpu::rope_table(table64.data(), c.position, c.T, c.head_dim, 10000.0);
        DeviceBuffer<float> table(to_type<float>(table64));
        for (bool forward : {true, false}) {
            std::vector<double> want = x;
            DeviceBuffer<floatX> y(to_type<floatX>(x));
            if (forward) {
                cpu::rope_forward(want.data(), table64.data(), c.B, c.T, c.H, c.G, c.head_dim);
                gpu::rope_forward(y.ptr, table.ptr, c.B, c.T, c.H, c.G, c.head_dim, Stream{});
            } else {
                cpu::rope_backward(want.data(), table64.data(), c.B, c.T, c.H, c.G, c.head_dim);
                gpu::rope_backward(y.ptr, table.ptr, c.B, c.T, c.H, c.G, c.head_dim, Stream{});
            }
            EXPECT_LT(rel_l2(to_double(y.host()), want), tolerance<floatX>()) << "T " << c.T << " head_dim " << c.head_dim;
        }
    }
}
#endif

} // namespace
