// Every operation of a Samba step, timed alone at one micro-batch of Samba-421M (B=8, T=4096): ms, GB/s, TFLOP/s.
//   build/gpu-bf16/bench_ops [B T d_model d_ff n_head head_dim window] [matmul: only the matrix products]
#include "bench.cuh"

using namespace bench;

struct Shape {
    int B = 8;
    int64_t T = 4096;
    int d = 1536, F = 4096, H = 12, hd = 128;
    int64_t window = 2048;
    int V = 32000, N = 16;
    int64_t BT() const { return B * T; }
};

constexpr int COPIES = 3;
constexpr double X = sizeof(floatX);

static void bench_mamba(const Shape& s) {
    const int e = 2 * s.d, R = (s.d + 15) / 16, R2N = R + 2 * s.N;
    const int64_t BT = s.BT();
    Rotating<floatX> xz(BT * 2 * e, COPIES), u(BT * e, COPIES), dt(BT * e, COPIES), x_dbl(BT * R2N, COPIES), out(BT * e, COPIES);
    Rotating<float> conv_w(e * 4, 1, 0.5f), vector(e, 1, 0.5f), A_log(e * s.N, 1, 1.f), D(e, 1), dt_bias(e, 1, 4.f), grad(e * s.N, 1, 0.f);
    std::vector<void*> states(COPIES);
    for (auto& p : states) p = device_alloc(gpu::selective_scan_saved(s.B, s.T, e, s.N), "states");
    void* workspace = device_alloc(std::max(gpu::selective_scan_workspace(s.B, s.T, e, s.N),
                                            gpu::x_proj_conv_backward_workspace(s.B, s.T, e, R2N)), "workspace");
    floatX* no_halo = nullptr;
    float* no_h = nullptr;
    const double e_bytes = (double)BT * e * X;
    print_row("conv1d forward", time_ms([&](int i) {
        gpu::conv1d_forward(u[i], no_halo, xz[i], 2 * e, no_halo, conv_w[0], vector[0], s.B, s.T, e, 0);
    }), 2 * e_bytes);
    gpu::Matmul matmul;
    Rotating<floatX> w_x((int64_t)R2N * e, 1, 0.05f), w_dt((int64_t)e * R, 1, 0.05f);
    print_row("conv1d, x_proj, dt_proj forward", time_ms([&](int i) {
        gpu::scan_inputs_forward(matmul, u[i], x_dbl[i], dt[i], no_halo, xz[i], 2 * e, no_halo, conv_w[0], vector[0], w_x[0], w_dt[0], false,
                                 s.B, s.T, e, R, s.N, 0);
    }), 3 * e_bytes + X * ((double)BT * R2N + (double)(R2N + R) * e), 2.0 * BT * e * (R2N + R));
    print_row("scan forward", time_ms([&](int i) {
        gpu::selective_scan_forward(out[i], states[i % COPIES], no_h, u[i], dt[i], x_dbl[i] + R, R2N, xz[i] + e, 2 * e, A_log[0], D[0],
                                    dt_bias[0], no_h, workspace, s.B, s.T, e, s.N, 0);
    }), 4 * e_bytes + (double)gpu::selective_scan_saved(s.B, s.T, e, s.N));
    Rotating<floatX> du(BT * e, 2), ddt(BT * e, 2), dxz(BT * 2 * e, 2), dx_dbl(BT * R2N, 2), dout(BT * e, COPIES);
    print_row("scan backward", time_ms([&](int i) {
        gpu::selective_scan_backward(du[i], ddt[i], dxz[i] + e, 2 * e, dx_dbl[i] + R, R2N, out[i], grad[0], grad[0], grad[0],
                                     dout[i], u[i], dt[i], x_dbl[i] + R, R2N, xz[i] + e, 2 * e, A_log[0], D[0], dt_bias[0], no_h,
                                     states[i % COPIES], workspace, s.B, s.T, e, s.N, 0);
    }), 8 * e_bytes + (double)gpu::selective_scan_saved(s.B, s.T, e, s.N));
    print_row("conv1d backward", time_ms([&](int i) {
        gpu::conv1d_backward(dxz[i], 2 * e, grad[0], grad[0], du[i], xz[i], 2 * e, no_halo, conv_w[0], vector[0], workspace, s.B, s.T, e, 0);
    }), 3 * e_bytes);
    Rotating<float> dw_x((int64_t)R2N * e, 1, 0.f);
    print_row("x_proj and conv1d backward", time_ms([&](int i) {
        gpu::x_proj_conv_backward(matmul, dxz[i], 2 * e, dw_x[0], false, grad[0], grad[0], du[i], dx_dbl[i], w_x[0], u[i], xz[i], 2 * e,
                                  no_halo, conv_w[0], vector[0], workspace, s.B, s.T, e, R2N, 0);
    }), 3 * e_bytes, 4.0 * BT * e * R2N);
    for (void* p : states) cudaFree(p);
    cudaFree(workspace);
}

static void bench_attention(const Shape& s) {
    const int64_t BT = s.BT(), qkv_dim = 3 * s.H * s.hd;
    Rotating<floatX> qkv(BT * qkv_dim, COPIES), out(BT * s.H * s.hd, COPIES), dout(BT * s.H * s.hd, COPIES), dqkv(BT * qkv_dim, 2);
    Rotating<float> lse(BT * s.H, 1), table(s.T * s.hd, 1);
    void* workspace = device_alloc(gpu::attention_backward_workspace(s.B, s.T, s.H, s.H, s.hd, s.window), "workspace");
    const bench::Counter drawn;
    const floatX* no_ring = nullptr;
    const double w = (double)std::min(s.window, s.T), pairs = (w * (w + 1) / 2 + ((double)s.T - w) * w) * s.B * s.H, bytes = (double)BT * qkv_dim * X;
    gpu::rope_table(table[0], 0, s.T, s.hd, 10000.0, 0);
    print_row("rope", time_ms([&](int i) { gpu::rope_forward(qkv[i], table[0], s.B, s.T, s.H, s.H, s.hd, 0); }), bytes * 4 / 3);
    print_row("attention forward", time_ms([&](int i) {
        gpu::attention_forward(out[i], lse[0], qkv[i], no_ring, 0, 0, nullptr, s.B, s.T, s.H, s.H, s.hd, s.window, drawn.p, 0);
    }), bytes * 4 / 3, 4 * pairs * s.hd);
    print_row("attention backward", time_ms([&](int i) {
        gpu::attention_backward(dqkv[i], dout[i], out[i], qkv[i], lse[0], no_ring, 0, 0, nullptr, workspace, s.B, s.T, s.H, s.H, s.hd, s.window,
                                nullptr, drawn.p, 0);
    }), bytes * 8 / 3, 10 * pairs * s.hd);
    cudaFree(workspace);
}

static void bench_elementwise(const Shape& s) {
    const int64_t BT = s.BT();
    const double d_elements = (double)BT * s.d;
    Rotating<float> x(BT * s.d, COPIES), rstd(BT, 1), weight(s.d, 1), grad(s.d, 1, 0.f), losses(BT, 1);
    Rotating<floatX> n(BT * s.d, COPIES), gate_up(BT * 2 * s.F, 2), h(BT * s.F, 2), dgate_up(BT * 2 * s.F, 2), wte((int64_t)s.V * s.d, 1, 0.02f);
    void* workspace = device_alloc(std::max(gpu::rmsnorm_backward_workspace(BT, s.d), gpu::embedding_backward_workspace(BT, s.V, s.d)), "workspace");
    print_row("rmsnorm forward", time_ms([&](int i) { gpu::rmsnorm_forward(n[i], rstd[0], x[i], weight[0], BT, s.d, 1e-5f, 0); }),
              d_elements * (4 + X));
    // A gradient of the residual stream: its planes are two arrays of their own
    Rotating<floatX> high(BT * s.d, 2), low(BT * s.d / 2, 2);
    const auto gradient = [&](int i) { return ResidualGradient<floatX>{high[i], HAS_LOW_PLANE<floatX> ? (int8_t*)low[i] : nullptr}; };
    print_row("rmsnorm backward (dx +=)", time_ms([&](int i) {
        gpu::rmsnorm_backward(gradient(i), gradient(i), grad[0], n[i], n[i + 1], x[i], rstd[0], weight[0], workspace, BT, s.d, 0);
    }), d_elements * (2 * X + 2 * (X + HAS_LOW_PLANE<floatX>)));
    print_row("swiglu forward", time_ms([&](int i) { gpu::swiglu_forward(h[i], gate_up[i], BT, s.F, 0); }), 3.0 * BT * s.F * X);
    print_row("swiglu backward", time_ms([&](int i) { gpu::swiglu_backward(dgate_up[i], h[i], gate_up[i], BT, s.F, 0); }), 5.0 * BT * s.F * X);
    std::vector<int> host(BT);
    for (int64_t i = 0; i < BT; i++) host[i] = (int)((i * i * 7919 + i) % (i % 10 == 0 ? 7 : s.V));          // a few tokens are frequent
    int* tokens = (int*)device_alloc(BT * sizeof(int), "tokens");
    CUDA_CHECK(cudaMemcpy(tokens, host.data(), BT * sizeof(int), cudaMemcpyHostToDevice));
    Rotating<float> dwte((int64_t)s.V * s.d, 1, 0.f);
    print_row("embedding forward", time_ms([&](int i) { gpu::embedding_forward(x[i], tokens, wte[0], BT, s.d, 0); }), d_elements * (4 + X));
    print_row("embedding backward", time_ms([&](int i) { gpu::embedding_backward(dwte[0], gradient(i), tokens, workspace, BT, s.V, s.d, 0); }),
              d_elements * (X + HAS_LOW_PLANE<floatX>));
    const int64_t rows = std::min<int64_t>(BT, 4096);
    Rotating<floatX> logits(rows * s.V, 3, 5.f);
    print_row("cross entropy fused, 4096 rows",
              time_ms([&](int i) { gpu::cross_entropy_fused(losses[0], logits[i], tokens, 1e-5f, rows, s.V, 0); }), 2.0 * rows * s.V * X);
    cudaFree(workspace);
    cudaFree(tokens);
}

// Each product by the heuristic's first answer, and by the candidate that a rehearsal finds fastest.
struct Products {
    gpu::Matmul first, timed;
    Products() { timed.rehearsal = true; }
    void row(const std::string& name, double bytes, double flops, const std::function<void(gpu::Matmul&, int)>& product) {
        product(timed, 0);
        print_row(name, time_ms([&](int i) { product(first, i); }), bytes, flops);
        print_row("    the fastest candidate", time_ms([&](int i) { product(timed, i); }), bytes, flops);
    }
};

static void bench_matmul(const Shape& s) {
    Products products;
    const int64_t M = s.BT();
    const int e = 2 * s.d, R = (s.d + 15) / 16, R2N = R + 2 * s.N;
    struct Product { const char* name; int N, K; };
    const Product linear[] = {{"in_proj", 2 * e, s.d}, {"x_proj", R2N, e}, {"dt_proj", e, R}, {"out_proj", s.d, e},
                              {"qkv", 3 * s.H * s.hd, s.d}, {"attention out", s.d, s.H * s.hd}, {"w1|w2", 2 * s.F, s.d}, {"w3", s.d, s.F}};
    for (const Product& p : linear) {
        const std::string name = p.name;
        const int64_t ldx = name == "dt_proj" ? R2N : p.K;
        Rotating<floatX> x(M * ldx, 2), y(M * p.N, 2), w((int64_t)p.N * p.K, 2, 0.05f);
        Rotating<float> dw((int64_t)p.N * p.K, 1, 0.f);
        const double flops = 2.0 * M * p.N * p.K, weights = (double)p.N * p.K, bytes = X * ((double)M * p.N + (double)M * p.K + weights);
        products.row(name + " forward", bytes, flops,
                     [&](gpu::Matmul& mm, int i) { gpu::matmul_forward(mm, y[i], p.N, x[i], ldx, w[i], M, p.N, p.K, 0); });
        products.row(name + " dgrad", bytes, flops,
                     [&](gpu::Matmul& mm, int i) { gpu::matmul_dgrad(mm, x[i], ldx, y[i], p.N, w[i], M, p.N, p.K, name == "x_proj", 0); });
        products.row(name + " wgrad", bytes + (4 - X) * weights, flops,
                     [&](gpu::Matmul& mm, int i) { gpu::matmul_wgrad(mm, dw[0], y[i], p.N, x[i], ldx, M, p.N, p.K, false, 0); });
        products.row(name + " wgrad +=", bytes + (8 - X) * weights, flops,
                     [&](gpu::Matmul& mm, int i) { gpu::matmul_wgrad(mm, dw[0], y[i], p.N, x[i], ldx, M, p.N, p.K, true, 0); });
        if (p.N == s.d) {
            Rotating<float> r(M * p.N, 2), r2(M * p.N, 2);
            products.row(name + " residual", bytes + 6.0 * M * p.N, flops,
                         [&](gpu::Matmul& mm, int i) { gpu::matmul_residual(mm, r[i], r2[i], x[i], w[i], M, p.N, p.K, 0); });
        }
    }
    Rotating<floatX> n(M * s.d, 2), gate_up(M * 2 * s.F, 2), h(M * s.F, 2), dgate_up(M * 2 * s.F, 1), w(2 * (int64_t)s.F * s.d, 2, 0.05f);
    const double flops = 4.0 * M * s.F * s.d, outer = X * (double)M * s.d, hidden = X * (double)M * s.F, weights = X * (double)s.F * s.d;
    products.row("w1|w2 forward and swiglu", outer + 3 * hidden + 2 * weights, flops,
                 [&](gpu::Matmul& mm, int i) { gpu::matmul_swiglu_forward(mm, h[i], gate_up[i], n[i], w[i], M, s.F, s.d, 0); });
    products.row("w3 dgrad and swiglu", outer + 4 * hidden + weights, flops / 2, [&](gpu::Matmul& mm, int i) {
        gpu::matmul_swiglu_backward(mm, dgate_up[0], nullptr, h[i], n[i], w[i], gate_up[i], M, s.F, s.d, 0);
    });
    const int width = 3 * s.H * s.hd;
    Rotating<floatX> qkv(M * width, 2), w_qkv((int64_t)width * s.d, 2, 0.05f);
    Rotating<float> table(s.T * s.hd, 1);
    gpu::rope_table(table[0], 0, s.T, s.hd, 10000.0, 0);
    products.row("qkv forward and rope", outer + X * ((double)M * width + (double)width * s.d), 2.0 * M * width * s.d, [&](gpu::Matmul& mm, int i) {
        gpu::matmul_rope_forward(mm, qkv[i], n[i], w_qkv[i], table[0], s.B, s.T, s.H, s.H, s.hd, s.d, 0);
    });
    for (int64_t rows = std::min<int64_t>(M, 4096); rows <= M; rows *= 2) {
        const std::string name = "head, " + std::to_string(rows) + " rows";
        Rotating<floatX> x(rows * s.d, 2), y(rows * s.V, 2), w((int64_t)s.V * s.d, 1, 0.05f);
        Rotating<float> dw((int64_t)s.V * s.d, 1, 0.f);
        const double flops = 2.0 * rows * s.V * s.d, weights = (double)s.V * s.d, bytes = X * (double)(rows * s.V + rows * s.d) + X * weights;
        products.row(name + " forward", bytes, flops,
                     [&](gpu::Matmul& mm, int i) { gpu::matmul_forward(mm, y[i], s.V, x[i], s.d, w[0], rows, s.V, s.d, 0); });
        products.row(name + " dgrad", bytes, flops,
                     [&](gpu::Matmul& mm, int i) { gpu::matmul_dgrad(mm, x[i], s.d, y[i], s.V, w[0], rows, s.V, s.d, false, 0); });
        products.row(name + " wgrad +=", bytes + (8 - X) * weights, flops,
                     [&](gpu::Matmul& mm, int i) { gpu::matmul_wgrad(mm, dw[0], y[i], s.V, x[i], s.d, rows, s.V, s.d, true, 0); });
    }
}

static void bench_optimizer() {
    const int64_t n = 421793280;
    Rotating<float> master(n, 1, 0.05f), grads(n, 1, 0.01f), m(n, 1, 0.f), v(n, 1, 0.f), result(2, 1);
    Rotating<floatX> w(n, 1);
    void* workspace = device_alloc(gpu::global_norm_workspace(n), "workspace");
    print_row("global norm, 421.8M", time_ms([&](int) { gpu::global_norm(result[0], grads[0], n, 1.f, workspace, 0); }, 10), 4.0 * n);
    print_row("AdamW, 421.8M", time_ms([&](int i) {
        gpu::adamw_update(w[0], master[0], m[0], v[0], grads[0], result[0], n, AdamW{1e-4f, 0.9f, 0.95f, 1e-8f, 0.1f, i + 1}, 0);
    }, 10), (28.0 + X) * n);
    cudaFree(workspace);
}

int main(int argc, char** argv) {
    try {
        Shape s;
        const bool products_only = argc > 1 && std::string(argv[argc - 1]) == "matmul";
        if (argc > 7) s = {atoi(argv[1]), atoll(argv[2]), atoi(argv[3]), atoi(argv[4]), atoi(argv[5]), atoi(argv[6]), atoll(argv[7])};
        printf("%s, %s, B=%d T=%lld d=%d F=%d heads %dx%d window %lld\n", device_info().name.c_str(), BUILD_NAME, s.B, (long long)s.T, s.d, s.F,
               s.H, s.hd, (long long)s.window);
        print_header();
        bench_matmul(s);
        if (products_only) return 0;
        bench_mamba(s);
        bench_attention(s);
        bench_elementwise(s);
        bench_optimizer();
    } catch (const std::exception& error) {
        fprintf(stderr, "error: %s\n", error.what());
        return 1;
    }
}
