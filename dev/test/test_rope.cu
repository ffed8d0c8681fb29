// RoPE: its twin against the formula and finite differences; the GPU against the twin.
#include "../../kernels/cpu/rope.h"
#ifndef SAMBA_CPU
#include "../../kernels/rope.cuh"
#endif
#include "test_util.h"

namespace {

struct RopeCase { int B; int64_t T, position; int H, G, head_dim; };
const RopeCase ROPE_CASES[] = {{2, 7, 0, 4, 2, 64}, {1, 1, 131071, 3, 3, 128}, {3, 33, 5, 8, 1, 16}, {1, 65, 1000000, 2, 1, 40}, {1, 5, 0, 1, 1, 256}, {2, 9, 3, 2, 2, 6}};

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
