// fp8: every code of e4m3; rows and columns quantised with the twin's bits; products of what was quantised; the whole model beside bf16's.
#include "../../kernels/cpu/fp8.h"
#include "model_fixture.h"

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Numbers

TEST(Fp8, EveryCodeIsItself) {
    for (int q = 0; q < 256; q++) {
        const float x = cpu::from_e4m3((uint8_t)q);
        if ((q & 0x7f) == 0x7f) EXPECT_TRUE(std::isnan(x)) << q;
        else EXPECT_EQ(cpu::to_e4m3(x), q) << x;
    }
    EXPECT_EQ(cpu::from_e4m3(0x7e), 448);
    EXPECT_EQ(cpu::from_e4m3(0x01), 0x1p-9f);
    EXPECT_EQ(cpu::from_e4m3(0x08), 0x1p-6f);
    EXPECT_EQ(cpu::to_e4m3(1e30f), 0x7e) << "the largest, not infinity";
    EXPECT_EQ(cpu::to_e4m3(NAN) & 0x7f, 0x7f);
}

// Between neighbours: the nearer one, and of two as near the one with an even code
TEST(Fp8, RoundsToTheNearestEven) {
    for (int q = 0; q < 0x7e; q++) {
        const float low = cpu::from_e4m3((uint8_t)q), high = cpu::from_e4m3((uint8_t)(q + 1)), middle = (low + high) / 2;
        EXPECT_EQ(cpu::to_e4m3(std::nextafter(middle, 0.f)), q);
        EXPECT_EQ(cpu::to_e4m3(std::nextafter(middle, 1e9f)), q + 1);
        EXPECT_EQ(cpu::to_e4m3(middle), q % 2 ? q + 1 : q);
        EXPECT_EQ(cpu::to_e4m3(-middle), (q % 2 ? q + 1 : q) | 0x80);
    }
}

// The hostile rows of a matrix: 0s, the smallest and largest numbers, one large among small, and what is not finite
constexpr int HOSTILE = 10;
std::vector<double> hostile_rows(int64_t M, int64_t K, uint64_t seed) {
    std::vector<double> x = random_values(M * K, seed);
    for (int64_t i = 0; i < M; i++)
        for (int64_t j = 0; j < K; j++) {
            double& v = x[i * K + j];
            switch (i % HOSTILE) {
            case 0: break;
            case 1: v = 0; break;
            case 2: v *= 1e-38; break;                                    // some of them denormal
            case 3: v *= 3e38; break;
            case 4: v *= j == K / 2 ? 1e30 : 1e-30; break;
            case 5: if (j == K - 1) v = INFINITY; break;
            case 6: if (j == 0) v = NAN; break;
            case 7: if (j == 1) v = -INFINITY; break;
            case 8: v = std::ldexp(v, (int)(j % 40) - 20); break;
            case 9: v = j % 2 ? 448 : -448; break;                        // exactly the largest at scale 1
            }
        }
    return x;
}
bool hostile_row_finite(int64_t i) { return i % HOSTILE < 5 || i % HOSTILE > 7; }

struct HostQuantised {
    std::vector<uint8_t> q;
    std::vector<float> scale;
    HostQuantised(int64_t rows, int64_t width) : q(rows * width, 0x55), scale(rows, -1) {}
    Quantised view() { return {q.data(), scale.data()}; }
    double value(int64_t row, int64_t column) const { return (double)cpu::from_e4m3(q[row * (q.size() / scale.size()) + column]) * scale[row]; }
};

TEST(Fp8, RowsKeepTheirOwnScale) {
    const int64_t M = 2 * HOSTILE, K = 48;
    const auto x = to_type<float>(hostile_rows(M, K, 1));
    HostQuantised out(M, K);
    cpu::quantise_rows(out.view(), x.data(), M, K);
    for (int64_t i = 0; i < M; i++) {
        if (!hostile_row_finite(i)) {
            EXPECT_TRUE(std::isnan(out.scale[i])) << "a row that is not finite must not become numbers";
            continue;
        }
        float most = 0;
        for (int64_t j = 0; j < K; j++) most = std::max(most, std::abs(x[i * K + j]));
        int exponent;
        EXPECT_EQ(std::frexp(out.scale[i], &exponent), 0.5f) << "a power of two";
        EXPECT_LE(most, 448 * out.scale[i]);
        if (most > 0x1p-100f) { EXPECT_GT(most, 224 * out.scale[i]) << "and not twice what is needed"; }
        for (int64_t j = 0; j < K; j++) {                                 // half a step: 2^-4 of the number, or 2^-10 of the scale
            const double exact = x[i * K + j], bound = std::max(std::abs(exact) * 0x1p-4, out.scale[i] * 0x1p-10);
            EXPECT_LE(std::abs(out.value(i, j) - exact), bound) << i << " " << j;
        }
    }
    EXPECT_EQ(out.scale[9], 1);
    HostQuantised turned(K, M), of_transpose(K, M);
    std::vector<float> transpose(K * M);
    for (int64_t i = 0; i < M; i++)
        for (int64_t j = 0; j < K; j++) transpose[j * M + i] = x[i * K + j];
    cpu::quantise_columns(turned.view(), x.data(), nullptr, M, K);
    cpu::quantise_rows(of_transpose.view(), transpose.data(), K, M);
    EXPECT_EQ(turned.q, of_transpose.q);
}

#ifndef SAMBA_CPU
// ---------------------------------------------------------------------------------------------------------------------
// Kernels

using bf16 = __nv_bfloat16;

struct DeviceQuantised {
    DeviceBuffer<uint8_t> q;
    DeviceBuffer<float> scale;
    DeviceQuantised(int64_t rows, int64_t width) : q(rows * width), scale(rows) {}
    Quantised view() { return {q.ptr, scale.ptr}; }
    void expect(const HostQuantised& twin) const {
        const std::vector<float> got = scale.host();
        for (size_t i = 0; i < got.size(); i++)
            ASSERT_TRUE(got[i] == twin.scale[i] || (std::isnan(got[i]) && std::isnan(twin.scale[i]))) << "scale " << i << ": " << got[i];
        EXPECT_EQ(q.host(), twin.q);
    }
};

TEST(Fp8Gpu, RowsHaveTheTwinsBits) {
    REQUIRE_GPU();
    const std::pair<int64_t, int64_t> sizes[] = {{1, 16}, {7, 1536}, {21, 80}, {20, 3072}, {20, 4096}, {13, 4608}, {11, 6144}, {30, 8192},
                                                 {10, 12288}, {20, 24576}};
    for (const auto& [M, K] : sizes) {
        SCOPED_TRACE(std::to_string(M) + " x " + std::to_string(K));
        const std::vector<double> x = rounded<bf16>(hostile_rows(M, K, (uint64_t)K));
        DeviceBuffer<bf16> device(to_type<bf16>(x));
        DeviceQuantised out(M, K);
        HostQuantised twin(M, K);
        cpu::quantise_rows(twin.view(), x.data(), M, K);
        gpu::quantise_rows(out.view(), device.ptr, M, K, Stream{});
        out.expect(twin);
    }
    DeviceBuffer<bf16> x(to_type<bf16>(random_values(64, 1)));
    DeviceQuantised out(2, 32);
    EXPECT_THROW(gpu::quantise_rows(out.view(), x.ptr, 2, 24, Stream{}), Error);
}

TEST(Fp8Gpu, ColumnsHaveTheTwinsBits) {
    REQUIRE_GPU();
    for (const auto& [N, K] : {std::pair<int64_t, int64_t>{16, 16}, {1536, 80}, {144, 4096}, {272, 48}, {8192, 64}}) {
        SCOPED_TRACE(std::to_string(N) + " x " + std::to_string(K));
        const std::vector<double> rows = rounded<bf16>(hostile_rows(K, N, (uint64_t)N));
        std::vector<double> w(N * K);
        for (int64_t i = 0; i < N; i++)
            for (int64_t j = 0; j < K; j++) w[i * K + j] = rows[j * N + i];
        DeviceBuffer<bf16> device(to_type<bf16>(w));
        DeviceQuantised out(K, N);
        DeviceBuffer<char> workspace(gpu::quantise_columns_workspace(N, K));
        HostQuantised twin(K, N);
        cpu::quantise_columns(twin.view(), w.data(), nullptr, N, K);
        gpu::quantise_columns(out.view(), device.ptr, workspace.ptr, N, K, Stream{});
        out.expect(twin);
    }
}

bool has_fp8() { return device_count() > 0 && device_info().compute_major == 9 && sizeof(floatX) == 2; }
#define REQUIRE_FP8() \
    do { if (!has_fp8()) GTEST_SKIP() << "needs a GPU of compute capability 9.0 and a build in bf16"; } while (0)

// What norm and SwiGLU write beside their results is what quantising those gives, and the results do not change
template <class Make> void expect_copy_of_result(int64_t M, int64_t width, Make make) {
    DeviceBuffer<floatX> plain(M * width), out(M * width);
    DeviceQuantised copy(M, width);
    HostQuantised twin(M, width);
    make(plain.ptr, Quantised{});
    make(out.ptr, copy.view());
    const std::vector<double> result = to_double(out.host());
    EXPECT_EQ(result, to_double(plain.host()));
    cpu::quantise_rows(twin.view(), result.data(), M, width);
    copy.expect(twin);
}
TEST(Fp8Gpu, OtherKernelsQuantiseWhatTheyWrite) {
    if (device_count() == 0 || sizeof(floatX) != 2) GTEST_SKIP() << "needs a GPU and a build in bf16";
    const int64_t M = 21;
    for (const int d : {16, 64, 1536, 2816, 4000}) {
        SCOPED_TRACE("norm of " + std::to_string(d));
        DeviceBuffer<float> x(to_type<float>(random_values(M * d, 1))), weight(to_type<float>(random_values(d, 2))), rstd(M);
        expect_copy_of_result(M, d, [&](floatX* out, Quantised copy) {
            gpu::rmsnorm_forward(out, rstd.ptr, x.ptr, weight.ptr, M, d, 1e-5f, Stream{}, copy);
        });
    }
    for (const int F : {16, 96, 4096, 9984, 16384}) {
        SCOPED_TRACE("SwiGLU of " + std::to_string(F));
        DeviceBuffer<floatX> gate_up(to_type<floatX>(random_values(M * 2 * F, 3, 4))), dh(to_type<floatX>(random_values(M * F, 4, 1e-5)));
        expect_copy_of_result(M, F, [&](floatX* out, Quantised copy) { gpu::swiglu_forward(out, gate_up.ptr, M, F, Stream{}, copy); });
        if (2 * F > gpu::QUANTISE_MOST) continue;
        expect_copy_of_result(M, 2 * F, [&](floatX* out, Quantised copy) { gpu::swiglu_backward(out, dh.ptr, gate_up.ptr, M, F, Stream{}, copy); });
    }
}

// The three products of weights (N,K) with factors as the GPU quantised them, in double
struct Products {
    int64_t M;
    int N, K;
    std::vector<double> x, w, dy, residual;
    DeviceBuffer<floatX> X, W, DY;
    DeviceQuantised rows, columns, input;
    DeviceBuffer<char> workspace;
    gpu::Matmul matmul;

    Products(int64_t M, int N, int K)
        : M(M), N(N), K(K), x(rounded<floatX>(random_values(M * K, 1))), w(rounded<floatX>(random_values((size_t)N * K, 2, 0.1))),
          dy(rounded<floatX>(random_values(M * N, 3, 1e-5))), residual(rounded<float>(random_values(M * N, 4))), X(to_type<floatX>(x)),
          W(to_type<floatX>(w)), DY(to_type<floatX>(dy)), rows(N, K), columns(K, N), input(M, std::max(N, K)),
          workspace(gpu::quantise_columns_workspace(N, K)) {
        gpu::quantise_rows(rows.view(), W.ptr, N, K, Stream{});
        gpu::quantise_columns(columns.view(), W.ptr, workspace.ptr, N, K, Stream{});
    }
    Weights weights() { return {W.ptr, rows.view(), columns.view(), input.view()}; }

    std::vector<double> forward() {
        DeviceBuffer<floatX> y(M * N);
        gpu::matmul_forward(matmul, y.ptr, N, X.ptr, K, weights(), M, N, K, Stream{});
        return to_double(y.host());
    }
    std::vector<double> residual_added() {
        DeviceBuffer<float> y(to_type<float>(residual));
        gpu::matmul_residual(matmul, y.ptr, y.ptr, X.ptr, weights(), M, N, K, Stream{});
        return to_double(y.host());
    }
    std::vector<double> dgrad() {
        DeviceBuffer<floatX> dx(M * K);
        gpu::matmul_dgrad(matmul, dx.ptr, K, DY.ptr, N, weights(), M, N, K, false, Stream{});
        return to_double(dx.host());
    }
    static std::vector<double> seen(const std::vector<double>& values, int64_t M, int64_t K) {    // what is left after quantising
        HostQuantised q(M, K);
        cpu::quantise_rows(q.view(), values.data(), M, K);
        std::vector<double> out(M * K);
        for (int64_t i = 0; i < M; i++)
            for (int64_t j = 0; j < K; j++) out[i * K + j] = q.value(i, j);
        return out;
    }
    std::vector<double> transposed_w() const {
        std::vector<double> out((size_t)N * K);
        for (int i = 0; i < N; i++)
            for (int j = 0; j < K; j++) out[(size_t)j * N + i] = w[(size_t)i * K + j];
        return out;
    }
    void check() {
        cpu::Matmul plain;
        const auto xq = seen(x, M, K), wq = seen(w, N, K), dyq = seen(dy, M, N), wtq = seen(transposed_w(), K, N);
        std::vector<double> y(M * N), sum(M * N), dx(M * K);
        cpu::matmul_forward(plain, y.data(), N, xq.data(), K, wq.data(), M, N, K);
        cpu::matmul_residual(plain, sum.data(), residual.data(), xq.data(), wq.data(), M, N, K);
        cpu::matmul_forward(plain, dx.data(), K, dyq.data(), N, wtq.data(), M, K, N);
        EXPECT_LT(rel_l2(forward(), y), tolerance<floatX>());
        EXPECT_LT(rel_l2(residual_added(), sum), tolerance<floatX>());
        EXPECT_LT(rel_l2(dgrad(), dx), tolerance<floatX>());
    }
};

TEST(Fp8Gpu, ProductsOfWhatWasQuantised) {
    REQUIRE_FP8();
    for (const auto& [M, N, K] : {std::tuple<int64_t, int, int>{80, 128, 64}, {1, 48, 80}, {333, 144, 272}, {1000, 1536, 512}, {129, 16, 16}}) {
        SCOPED_TRACE("M " + std::to_string(M) + " N " + std::to_string(N) + " K " + std::to_string(K));
        Products p(M, N, K);
        p.check();
        const auto y = p.forward(), dx = p.dgrad(), sum = p.residual_added();
        for (int i = 0; i < 5; i++) {
            EXPECT_EQ(p.forward(), y) << "same bits every time";
            EXPECT_EQ(p.dgrad(), dx);
            EXPECT_EQ(p.residual_added(), sum);
        }
    }
}

// An infinity or NaN in a token's row makes that token's results NaN, and no other's
TEST(Fp8Gpu, WhatIsNotFiniteStaysSo) {
    REQUIRE_FP8();
    Products p(64, 96, 48);
    const std::vector<double> clean = p.forward();
    std::vector<double> x = p.x;
    x[5 * p.K + 3] = NAN, x[9 * p.K] = INFINITY, x[63 * p.K + 47] = -INFINITY;
    p.X.set(to_type<floatX>(x));
    const std::vector<double> y = p.forward();
    for (int64_t i = 0; i < p.M; i++)
        for (int j = 0; j < p.N; j++) {
            if (i == 5 || i == 9 || i == 63) ASSERT_TRUE(std::isnan(y[i * p.N + j])) << i << " " << j;
            else ASSERT_EQ(y[i * p.N + j], clean[i * p.N + j]) << i << " " << j;
        }
}

// ---------------------------------------------------------------------------------------------------------------------
// The model

std::vector<double> all_gradients(const Fixture& f) { return to_double(f.flat(f.m.w.grads)); }

// Rounding to e4m3 is off by at most 2^-4 of a number, 2.6% in the root mean square over numbers spread evenly between powers of two; a product
// of two such factors by 3.7%, and by as much again for each product on the way through the network, at random. The longest way here goes through
// 2 large products a layer forward and 2 backward.
TEST(Fp8Gpu, GradientsAreThoseOfBf16WithinTheRounding) {
    REQUIRE_FP8();
    for (const char* blocks : {"MS", "PS", "T", "mm", "ss"}) {
        SCOPED_TRACE(blocks);
        const Config c = small_config(blocks);
        Fixture plain(c, 2, 40), fp8(c, 2, 40, Recompute::none, 1, true);
        const float plain_loss = plain.loss_and_gradients(), fp8_loss = fp8.loss_and_gradients();
        const double off = rel_l2(all_gradients(fp8), all_gradients(plain)), products = 4.0 * (double)plain.m.layout.layers.size();
        printf("%s: loss %f for %f, gradients off by %.4f\n", blocks, fp8_loss, plain_loss, off);
        EXPECT_LT(off, 2 * 0.037 * std::sqrt(products));
        EXPECT_GT(off, 0.01) << "these are not products in 8 bits";
        EXPECT_NEAR(fp8_loss, plain_loss, 0.02 * plain_loss);
        EXPECT_EQ(fp8.loss_alone(), plain.loss_alone()) << "evaluation is in bf16";
    }
}

TEST(Fp8Gpu, NothingChangesABit) {
    REQUIRE_FP8();
    const Config c = small_config("MS");
    Fixture f(c, 2, 40, Recompute::none, 1, true);
    f.loss_and_gradients();
    const auto gradients = all_gradients(f);
    f.loss_alone();
    f.loss_and_gradients();
    EXPECT_EQ(all_gradients(f), gradients) << "again";
    upload_tokens(f.m, f.tokens.data(), f.targets.data(), 80);
    forward_backward_graph(f.m, 2, 40, 1.0f, true);
    EXPECT_EQ(all_gradients(f), gradients) << "as a graph";
    for (Recompute level : {Recompute::light, Recompute::full}) {
        Fixture other(c, 2, 40, level, 1, true);
        other.loss_and_gradients();
        EXPECT_EQ(all_gradients(other), gradients) << recompute_name(level);
    }
}

// The copies are those of the weights that are there, and stay for all micro-batches of a step
TEST(Fp8Gpu, CopiesFollowTheWeights) {
    REQUIRE_FP8();
    const Config c = small_config("MS");
    Fixture f(c, 2, 40, Recompute::none, 1, true), other(c, 2, 40, Recompute::none, 2, true);
    other.loss_and_gradients();
    const auto expected = all_gradients(other);
    f.loss_and_gradients();
    for (const Tensor& t : f.m.layout.tensors) {           // other's weights
        const auto values = other.flat(other.m.w.master);
        upload_tensor(f.m, t, values.data() + f.m.layout.flat(t));
    }
    f.tokens = other.tokens, f.targets = other.targets;
    f.loss_and_gradients();
    EXPECT_EQ(all_gradients(f), expected);
    upload_tokens(f.m, f.tokens.data(), f.targets.data(), 80);
    forward_backward(f.m, 2, 40, 1.0f, false);             // a second micro-batch, the same: twice the gradient
    const auto twice = all_gradients(f);
    std::vector<double> doubled;
    for (double g : expected) doubled.push_back(2 * g);
    EXPECT_LT(rel_l2(twice, doubled), 1e-6);
}

// With several processes a layer's weights may arrive just before forward reads them: its copies are made after that.
TEST(Fp8Gpu, CopiesAreMadeWhenALayersWeightsAreThere) {
    REQUIRE_FP8();
    const Config c = small_config("MS");
    Fixture f(c, 2, 40, Recompute::none, 1, true), other(c, 2, 40, Recompute::none, 2, true);
    other.loss_and_gradients();
    const std::vector<float> weights = other.flat(other.m.w.master);
    f.tokens = other.tokens, f.targets = other.targets;
    f.m.before_layer = [&](int layer) {                    // -1: the embedding's, and all vectors
        const std::vector<int64_t>& begin = f.m.layout.layer_matrices;
        const Range matrices = layer < 0 ? Range{0, begin[0]} : Range{begin[layer], begin[layer + 1]};
        for (const Tensor& t : f.m.layout.tensors)
            if (t.is_matrix ? (Range{t.at, t.at + 1} & matrices).size() > 0 : layer < 0) upload_tensor(f.m, t, weights.data() + f.m.layout.flat(t));
    };
    f.loss_and_gradients();
    EXPECT_EQ(all_gradients(f), all_gradients(other));
}
#endif

} // namespace
