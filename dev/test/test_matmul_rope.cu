// The product that makes queries, keys and values with RoPE behind it: the twin by hand; on a GPU both the one-kernel form and the one of two
// kernels, for heads of each size and groups of each kind, at sizes that divide nothing, nothing written past the ends, the same bits every time.
#include <cstring>

#include "../../kernels/cpu/matmul_rope.h"
#ifndef SAMBA_CPU
#include "../../kernels/matmul_rope.cuh"
#endif
#include "test_util.h"

namespace {

// Two sequences, two groups of two query heads each: element by element from the formula
TEST(MatmulRope, IsTheProductWithQueriesAndKeysTurned) {
    const int B = 2, H = 4, G = 2, hd = 6, d = 5, heads = H + 2 * G;
    const int64_t T = 3;
    cpu::Matmul matmul;
    const auto n = random_values(B * T * d, 1), w = random_values(heads * hd * d, 2);
    std::vector<double> table(T * hd), qkv(B * T * heads * hd, NAN), product = qkv;
    cpu::rope_table(table.data(), 7, T, hd, 10000.0);
    cpu::matmul_rope_forward(matmul, qkv.data(), n.data(), w.data(), table.data(), B, T, H, G, hd, d);
    cpu::matmul_rope_forward(matmul, product.data(), n.data(), w.data(), nullptr, B, T, H, G, hd, d);
    for (int64_t row = 0; row < B * T; row++)
        for (int head = 0; head < heads; head++)
            for (int j = 0; j < hd / 2; j++) {
                double x1 = 0, x2 = 0;
                for (int k = 0; k < d; k++) {
                    x1 += n[row * d + k] * w[(head * hd + j) * d + k];
                    x2 += n[row * d + k] * w[(head * hd + j + hd / 2) * d + k];
                }
                const bool value = head % 4 == 3;
                const double angle = value ? 0 : (7 + row % T) * std::pow(10000.0, -2.0 * j / hd);
                const int64_t at = (row * heads + head) * hd + j;
                EXPECT_NEAR(product[at], x1, 1e-12);
                EXPECT_NEAR(qkv[at], x1 * std::cos(angle) - x2 * std::sin(angle), 1e-12);
                EXPECT_NEAR(qkv[at + hd / 2], x1 * std::sin(angle) + x2 * std::cos(angle), 1e-12);
            }
}

#ifndef SAMBA_CPU
struct Sizes { int B; int64_t T; int H, G, hd, d; bool one_kernel; };      // on Hopper, in bf16
const Sizes SIZES[] = {
    {1, 1, 1, 1, 64, 8, true},         // one row; less than a tile
    {3, 100, 3, 1, 64, 200, true},     // 320 columns: of the second tile only one block of the cluster has any; k ends inside a stage
    {2, 77, 4, 2, 64, 136, true},
    {1, 129, 2, 2, 128, 64, true},     // one row in the second tile
    {2, 500, 12, 1, 128, 72, true},    // MQA
    {5, 103, 5, 5, 128, 64, true},     // 15 heads: half a tile at the end
    {7, 31, 2, 1, 256, 96, true},
    {1, 257, 11, 1, 256, 128, true},   // Samba-3.8B's heads
    {2, 2600, 4, 4, 128, 72, true},    // more tiles than blocks
    {2, 9, 3, 1, 16, 24, false}, {3, 5, 2, 1, 40, 16, false}, {1, 7, 2, 2, 64, 20, false}};

constexpr size_t GUARD = 4096;                                             // elements before and after the result

size_t differences(const std::vector<floatX>& a, const std::vector<floatX>& b) {
    if (a.size() != b.size()) return std::max(a.size(), b.size());
    size_t count = 0;
    for (size_t i = 0; i < a.size(); i++) count += memcmp(&a[i], &b[i], sizeof(floatX)) != 0;
    return count;
}

// One call on the GPU
struct Case {
    Sizes s;
    int64_t M, width;
    std::vector<double> n, w, table;
    DeviceBuffer<floatX> N, W, QKV;
    explicit Case(Sizes s)
        : s(s), M(s.B * s.T), width((s.H + 2 * s.G) * s.hd), n(rounded<floatX>(random_values(M * s.d, 1, 2))),
          w(rounded<floatX>(random_values(width * s.d, 2, 2 / std::sqrt(s.d)))), table(s.T * s.hd), N(to_type<floatX>(n)), W(to_type<floatX>(w)),
          QKV(M * width + 2 * GUARD) {
        cpu::rope_table(table.data(), 12345, s.T, s.hd, 10000.0);
    }
    // The angle 0 for every pair
    std::vector<double> identity() const {
        std::vector<double> t(table.size(), 0);
        for (size_t i = 0; i < t.size(); i += 2) t[i] = 1;
        return t;
    }
    // qkv (M,width); table: none if empty
    std::vector<floatX> run(gpu::Matmul& matmul, const std::vector<double>& angles, bool then_rope = false) {
        DeviceBuffer<float> TABLE(to_type<float>(table)), ANGLES(to_type<float>(angles));
        floatX* qkv = QKV.ptr + GUARD;
        QKV.poison();
        gpu::matmul_rope_forward(matmul, qkv, N.ptr, W.ptr, angles.empty() ? nullptr : ANGLES.ptr, s.B, s.T, s.H, s.G, s.hd, s.d, Stream{});
        if (then_rope) gpu::rope_forward(qkv, TABLE.ptr, s.B, s.T, s.H, s.G, s.hd, Stream{});
        const auto all = QKV.host();
        std::vector<floatX> poison(GUARD), result(all.begin() + GUARD, all.end() - GUARD);
        memset((void*)poison.data(), 0xFF, GUARD * sizeof(floatX));
        EXPECT_EQ(differences({all.begin(), all.begin() + GUARD}, poison), 0u) << "written before the result";
        EXPECT_EQ(differences({all.end() - GUARD, all.end()}, poison), 0u) << "written behind the result";
        return result;
    }
    std::vector<double> twin(bool turned) const {
        cpu::Matmul matmul;
        std::vector<double> qkv(M * width);
        cpu::matmul_rope_forward(matmul, qkv.data(), n.data(), w.data(), turned ? table.data() : nullptr, s.B, s.T, s.H, s.G, s.hd, s.d);
        return qkv;
    }
};

std::string name_of(const Sizes& s) {
    return std::to_string(s.B) + " x " + std::to_string(s.T) + " heads " + std::to_string(s.H) + "/" + std::to_string(s.G) + " of " +
           std::to_string(s.hd) + " d " + std::to_string(s.d);
}

TEST(MatmulRopeGpu, MatchesTwin) {
    REQUIRE_GPU();
    gpu::Matmul matmul;
    for (const Sizes& s : SIZES) {
        SCOPED_TRACE(name_of(s));
        Case c(s);
        EXPECT_LT(rel_l2(to_double(c.run(matmul, c.table)), c.twin(true)), tolerance<floatX>());
        EXPECT_LT(rel_l2(to_double(c.run(matmul, {})), c.twin(false)), tolerance<floatX>());
    }
}

// By the angle 0 the result is the product, rounded; rope_forward turns that
TEST(MatmulRopeGpu, SameBitsAsTheProductAndThenRope) {
    REQUIRE_GPU();
    gpu::Matmul matmul;
    for (const Sizes& s : SIZES) {
        SCOPED_TRACE(name_of(s));
        Case c(s);
        EXPECT_EQ(differences(c.run(matmul, c.table), c.run(matmul, c.identity(), true)), 0u);
    }
}

// Sizes that the kernel takes are given to it: one operation, and else two
TEST(MatmulRopeGpu, OneKernelWhereThereIsOne) {
    REQUIRE_GPU();
    const bool hopper = sizeof(floatX) == 2 && gpu::sm90::usable();
    gpu::Matmul matmul;
    for (const Sizes& s : SIZES) {
        SCOPED_TRACE(name_of(s));
        Case c(s);
        Recorder recorder;
        Recorder::active = &recorder;
        c.run(matmul, c.table);
        Recorder::active = nullptr;
        EXPECT_EQ(recorder.calls.size(), hopper && s.one_kernel ? 1u : 2u);
    }
}

TEST(MatmulRopeGpu, SameBitsEveryTime) {
    REQUIRE_GPU();
    gpu::Matmul matmul;
    for (const Sizes& s : {Sizes{3, 1000, 12, 12, 64, 256, true}, {3, 1000, 6, 2, 128, 256, true}, {3, 1000, 3, 1, 256, 256, true}}) {
        SCOPED_TRACE(name_of(s));
        Case c(s);
        DeviceBuffer<float> table(to_type<float>(c.table));
        std::vector<floatX> first;
        for (int run = 0; run < 100; run++) {
            c.QKV.poison();
            gpu::matmul_rope_forward(matmul, c.QKV.ptr, c.N.ptr, c.W.ptr, table.ptr, s.B, s.T, s.H, s.G, s.hd, s.d, Stream{});
            if (run > 0 && run % 25 != 24) continue;      // read back a few
            const auto now = c.QKV.host();
            if (run == 0) first = now;
            ASSERT_EQ(differences(now, first), 0u) << "run " << run;
        }
    }
}
#endif

} // namespace
