// What the selective scan reads, made in one pass: the twin against its three operations; on a GPU both the one-kernel form and the one of
// several kernels against the twin in double, every element written, the same bits every time.
#include "../../kernels/cpu/scan_inputs.h"
#ifndef SAMBA_CPU
#include "../../kernels/scan_inputs.cuh"
#endif
#include "test_util.h"

namespace {

struct InputsCase {
    int B;
    int64_t T;
    int e, R, N;
    bool halo;
    std::string name() const {
        const auto number = [](int64_t n) { return std::to_string(n); };
        return "B " + number(B) + " T " + number(T) + " e " + number(e) + " R " + number(R) + " N " + number(N) + (halo ? " halo" : "");
    }
};

struct InputsData {
    InputsCase c;
    int columns;                                           // of x_dbl
    int64_t tokens, ldx;
    std::vector<double> x, halo, w, b, w_x, w_dt;
    InputsData(const InputsCase& c, uint64_t seed) : c(c), columns(c.R + 2 * c.N), tokens(c.B * c.T), ldx(2 * c.e) {
        x = random_values(tokens * ldx, seed + 1);
        halo = random_values((size_t)c.B * 3 * c.e, seed + 2);
        w = random_values((size_t)c.e * 4, seed + 3);
        b = random_values(c.e, seed + 4);
        w_x = random_values((size_t)columns * c.e, seed + 5, 2 / std::sqrt(c.e));
        w_dt = random_values((size_t)c.e * c.R, seed + 6, 2 / std::sqrt(c.R));
    }
    template <class X> void round() {
        for (auto* v : {&x, &halo, &w_x, &w_dt}) *v = rounded<X>(*v);
        for (auto* v : {&w, &b}) *v = rounded<float>(*v);
    }
};
struct InputsResult { std::vector<double> u, x_dbl, dt, halo_out; };

InputsResult run_twin(const InputsData& d) {
    const auto& [B, T, e, R, N, halo] = d.c;
    const std::vector<double> of_channels(d.tokens * e, NAN), of_columns(d.tokens * d.columns, NAN), of_halo(d.halo.size(), NAN);
    InputsResult r{of_channels, of_columns, of_channels, of_halo};
    cpu::Matmul matmul;
    cpu::scan_inputs_forward(matmul, r.u.data(), r.x_dbl.data(), r.dt.data(), r.halo_out.data(), d.x.data(), d.ldx, halo ? d.halo.data() : nullptr,
                             d.w.data(), d.b.data(), d.w_x.data(), d.w_dt.data(), false, B, T, e, R, N);
    return r;
}

TEST(ScanInputs, IsConvolutionAndTwoProducts) {
    const InputsData d({2, 5, 6, 3, 2, true}, 1);
    const auto& [B, T, e, R, N, halo] = d.c;
    const InputsResult got = run_twin(d);
    for (int64_t i = 0; i < d.tokens; i++) {
        for (int c = 0; c < e; c++) {
            double s = d.b[c];
            for (int k = 0; k < 4; k++) {
                const int64_t t = i % T - 3 + k;
                s += d.w[c * 4 + k] * (t >= 0 ? d.x[(i - 3 + k) * d.ldx + c] : d.halo[(i / T * 3 + t + 3) * e + c]);
            }
            EXPECT_NEAR(got.u[i * e + c], s / (1 + std::exp(-s)), 1e-14);
        }
        for (int j = 0; j < d.columns; j++) {
            double s = 0;
            for (int c = 0; c < e; c++) s += got.u[i * e + c] * d.w_x[j * e + c];
            EXPECT_NEAR(got.x_dbl[i * d.columns + j], s, 1e-13);
        }
        for (int c = 0; c < e; c++) {
            double s = 0;
            for (int j = 0; j < R; j++) s += got.x_dbl[i * d.columns + j] * d.w_dt[c * R + j];
            EXPECT_NEAR(got.dt[i * e + c], s, 1e-13);
        }
    }
}

TEST(ScanInputs, KeepsWhatIsThere) {
    const InputsData d({2, 5, 6, 3, 2, true}, 2);
    const auto& [B, T, e, R, N, halo] = d.c;
    const InputsResult want = run_twin(d);
    std::vector<double> u(want.u.size(), NAN), x_dbl = want.x_dbl, dt(want.dt.size(), NAN);
    const std::vector<double> no_w_x(d.w_x.size(), NAN);
    cpu::Matmul matmul;
    cpu::scan_inputs_forward(matmul, u.data(), x_dbl.data(), dt.data(), nullptr, d.x.data(), d.ldx, d.halo.data(), d.w.data(), d.b.data(),
                             no_w_x.data(), d.w_dt.data(), true, B, T, e, R, N);
    EXPECT_EQ(u, want.u);
    EXPECT_EQ(x_dbl, want.x_dbl);
    EXPECT_EQ(dt, want.dt);
}

#ifndef SAMBA_CPU
struct InputsGpu {
    const InputsData& d;
    DeviceBuffer<floatX> x, halo, w_x, w_dt, u, x_dbl, dt, halo_out;
    DeviceBuffer<float> w, b;
    gpu::Matmul matmul;
    explicit InputsGpu(const InputsData& d)
        : d(d), x(to_type<floatX>(d.x)), halo(to_type<floatX>(d.halo)), w_x(to_type<floatX>(d.w_x)), w_dt(to_type<floatX>(d.w_dt)),
          u(d.tokens * d.c.e), x_dbl(d.tokens * d.columns), dt(d.tokens * d.c.e), halo_out(d.halo.size()), w(to_type<float>(d.w)),
          b(to_type<float>(d.b)) {}
    const floatX* halo_in() const { return d.c.halo ? halo.ptr : nullptr; }
    void run(bool keep_x_dbl = false) {
        const auto& [B, T, e, R, N, has_halo] = d.c;
        gpu::scan_inputs_forward(matmul, u.ptr, x_dbl.ptr, dt.ptr, halo_out.ptr, x.ptr, d.ldx, halo_in(), w.ptr, b.ptr, w_x.ptr, w_dt.ptr, keep_x_dbl,
                                 B, T, e, R, N, Stream{});
    }
    // Does the one kernel take these sizes? It is launched even where the function above would find it slower
    bool run_one_kernel() {
        if constexpr (sizeof(floatX) != 2) return false;
        const auto& [B, T, e, R, N, has_halo] = d.c;
        using gpu::sm90::bf16;
        const auto arrays = {(const void*)u.ptr, (const void*)x_dbl.ptr, (const void*)dt.ptr, (const void*)x.ptr, (const void*)halo_in(),
                             (const void*)w.ptr, (const void*)b.ptr, (const void*)w_x.ptr, (const void*)w_dt.ptr};
        if (!gpu::sm90::scan_inputs_takes(arrays, d.ldx, B, T, e, R, N)) return false;
        gpu::sm90::scan_inputs((bf16*)u.ptr, (bf16*)x_dbl.ptr, (bf16*)dt.ptr, (const bf16*)x.ptr, d.ldx, (const bf16*)halo_in(), w.ptr, b.ptr,
                               (const bf16*)w_x.ptr, (const bf16*)w_dt.ptr, B, T, e, R, Stream{});
        return true;
    }
    void poison() {
        for (auto* buffer : {&u, &x_dbl, &dt, &halo_out}) buffer->poison();
    }
    void expect_near(const InputsResult& want) const {
        EXPECT_LT(rel_l2(to_double(u.host()), want.u), tolerance<floatX>());
        EXPECT_LT(rel_l2(to_double(x_dbl.host()), want.x_dbl), tolerance<floatX>());
        EXPECT_LT(rel_l2(to_double(dt.host()), want.dt), tolerance<floatX>());
    }
};

TEST(ScanInputsGpu, MatchesTwin) {
    REQUIRE_GPU();
    // R 64, 96, 128 and 144 with N 16 and e a multiple of 128: the one kernel on Hopper. Rows that end inside a tile, one row, sequences shorter
    // than a tile, more tiles than multiprocessors
    const InputsCase cases[] = {{1, 1, 128, 96, 16, false},   {3, 333, 384, 96, 16, true},   {2, 128, 3072, 96, 16, false},
                                {2, 201, 4608, 144, 16, true}, {1, 300, 256, 128, 16, true},  {1, 130, 128, 64, 16, false},
                                {300, 130, 128, 96, 16, true}, {2, 67, 64, 96, 16, true},     {2, 67, 40, 8, 16, true},
                                {1, 66, 136, 24, 4, false}};
    for (const InputsCase& c : cases) {
        SCOPED_TRACE(c.name());
        InputsData d(c, 11);
        d.round<floatX>();
        const InputsResult want = run_twin(d);
        InputsGpu gpu(d);
        gpu.run();
        gpu.expect_near(want);
        EXPECT_EQ(to_double(gpu.halo_out.host()), want.halo_out);
        const auto u = to_double(gpu.u.host()), dt = to_double(gpu.dt.host());
        gpu.u.poison(), gpu.dt.poison();
        gpu.run(true);                                     // x_dbl is there
        EXPECT_EQ(to_double(gpu.u.host()), u);
        EXPECT_EQ(to_double(gpu.dt.host()), dt);
        gpu.poison();
        const bool one_kernel = gpu.run_one_kernel();
        EXPECT_EQ(one_kernel, sizeof(floatX) == 2 && gpu::sm90::usable() && c.R >= 64 && c.e % 128 == 0);
        if (!one_kernel) continue;
        gpu.expect_near(want);
        EXPECT_EQ(to_double(gpu.u.host()), u) << "u is the sum of the convolution's own kernel, in its order";
    }
}

TEST(ScanInputsGpu, SameBitsEveryTime) {
    REQUIRE_GPU();
    const InputsData d({5, 4001, 512, 96, 16, true}, 21);
    InputsGpu gpu(d);
    if (!gpu.run_one_kernel()) GTEST_SKIP() << "needs the kernel for Hopper";
    const auto u = gpu.u.host(), x_dbl = gpu.x_dbl.host(), dt = gpu.dt.host();
    const auto same = [](const std::vector<floatX>& a, const std::vector<floatX>& b) {
        return memcmp(a.data(), b.data(), a.size() * sizeof(floatX)) == 0;
    };
    for (int run = 1; run < 100; run++) {
        gpu.poison();
        gpu.run_one_kernel();
        ASSERT_TRUE(same(gpu.u.host(), u) && same(gpu.x_dbl.host(), x_dbl) && same(gpu.dt.host(), dt)) << "run " << run;
    }
}
#endif

} // namespace
