// The inputs and outputs of one Mamba layer's scan and convolution on the GPU, laid out as the model has them.
#pragma once
#include "bench.cuh"

namespace bench {

constexpr int N = 16, GAP = 96, LDBC = GAP + 2 * N;    // d_state; dt_rank columns before B | C in their rows

struct Problem {
    int B;
    int64_t T;
    int e;
    int64_t rows() const { return B * T; }
    int64_t elements() const { return rows() * e; }
};

// `copies` of the activations. x and z are the halves of rows of 2 e, as in_proj makes them.
struct Layer {
    Problem s;
    Rotating<floatX> xz, u, dt, bc, out, dout, du, ddt, dxz, dbc;
    Rotating<float> A_log, D, dt_bias, dA, dD, ddt_bias, conv_w, conv_b, dw, db;
    std::vector<void*> saved;
    void* workspace;

    Layer(const Problem& p, int copies)
        : s(p), xz(p.rows() * 2 * p.e, copies, 2.f, 1), u(p.elements(), copies, 1.f, 2), dt(p.elements(), copies, 2.f, 3),
          bc(p.rows() * LDBC, copies, 1.f, 4), out(p.elements(), copies), dout(p.elements(), copies, 1.f, 5), du(p.elements(), copies),
          ddt(p.elements(), copies), dxz(p.rows() * 2 * p.e, copies), dbc(p.rows() * LDBC, copies), A_log((int64_t)p.e * N, 1, 2.f, 6),
          D(p.e, 1, 1.f, 7), dt_bias(p.e, 1, 3.f, 8), dA((int64_t)p.e * N, 1, 0.f), dD(p.e, 1, 0.f), ddt_bias(p.e, 1, 0.f),
          conv_w(p.e * 4, 1, 0.5f, 9), conv_b(p.e, 1, 0.5f, 10), dw(p.e * 4, 1, 0.f), db(p.e, 1, 0.f) {
        for (int i = 0; i < copies; i++) saved.push_back(device_alloc(saved_bytes(), "the scan's saved states"));
        workspace = device_alloc(std::max(gpu::selective_scan_workspace(p.B, p.T, p.e, N), gpu::conv1d_backward_workspace(p.B, p.T, p.e)),
                                 "the scan's workspace");
    }
    Layer(const Layer&) = delete;
    Layer& operator=(const Layer&) = delete;
    ~Layer() {
        for (void* v : saved) cudaFree(v);
        cudaFree(workspace);
    }
    size_t saved_bytes() const { return gpu::selective_scan_saved(s.B, s.T, s.e, N); }
    // What backward passes add to, to zero; what passes write, to NaN
    void reset() const {
        for (float* p : {dD[0], ddt_bias[0], db[0]}) CUDA_CHECK(cudaMemset(p, 0, s.e * sizeof(float)));
        CUDA_CHECK(cudaMemset(dA[0], 0, (size_t)s.e * N * sizeof(float)));
        CUDA_CHECK(cudaMemset(dw[0], 0, (size_t)s.e * 4 * sizeof(float)));
        for (floatX* p : {out[0], du[0], ddt[0]}) CUDA_CHECK(cudaMemset(p, 255, s.elements() * sizeof(floatX)));
        CUDA_CHECK(cudaMemset(dxz[0], 255, s.elements() * 2 * sizeof(floatX)));
        CUDA_CHECK(cudaMemset(dbc[0], 255, s.rows() * LDBC * sizeof(floatX)));
    }
};

} // namespace bench
