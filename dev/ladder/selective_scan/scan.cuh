// What the programs of this directory share: the problem, its random inputs, the check against the sequential loop in
// double and the timing. A program is one or two launchers (Pass) and a call of run().
#pragma once
#include "../ladder.cuh"
#include "sequential.h"

#ifdef SAMBA_FP32
#error "the ladder is bf16: build it without PRECISION=FP32"
#endif

namespace scan {

using bf16 = __nv_bfloat16;

struct Inputs {                                        // shapes: sequential.h
    const bf16 *u, *dt_raw, *z, *dout, *bc;
    const float *A_log, *D, *dt_bias;
    Sizes s;
};
struct Outputs {
    bf16 *out, *du, *ddt_raw, *dz, *dbc;
    float *dA_log, *dD, *ddt_bias;                     // += as in the library: a gradient is a sum over micro-batches
    void *saved, *scratch;                             // from forward to backward; within a pass
};
using Pass = void (*)(const Inputs&, const Outputs&);

struct Program {
    const char* name;
    Pass forward, backward = nullptr;                  // backward: uses what forward has left in `saved`
    size_t (*saved_bytes)(const Sizes&) = nullptr;
    size_t (*scratch_bytes)(const Sizes&) = nullptr;
    Sizes timed{8, 4096, 3072}, checked{2, 512, 192};  // Samba-421M's Mamba layer at 8 x 4096 tokens; one the CPU does in no time
    bool time_forward = true;
};

// The parameters as Mamba begins with them: A = -1, -2, ..., -16, D = 1, dt_bias = softplus^-1 of 0.001 to 0.1
inline Inputs_of<float> initial_parameters(int e) {
    Inputs_of<float> p;
    for (int c = 0; c < e; c++) {
        for (int n = 0; n < N; n++) p.A_log.push_back(std::log(n + 1.f));
        p.D.push_back(1.f);
        p.dt_bias.push_back(std::log(std::expm1(std::exp(-4.6f + bench::random_value(c, 2.3f, 11)))));
    }
    return p;
}
constexpr float SCALES[] = {1.f, 1.f, 2.f, 1.f, 1.f};  // of u, dt_raw, z, dout, bc; seeds 1 to 5

// Device arrays of one layer, `copies` of the activations
class Layer {
    using Activations = bench::Rotating<bf16>;
    using Floats = bench::Rotating<float>;
    Activations u_, dt_raw_, z_, dout_, bc_, out_, du_, ddt_raw_, dz_, dbc_;
    Floats A_log_, D_, dt_bias_, dA_log_, dD_, ddt_bias_;
    Floats saved_, scratch_;
    static int64_t floats(size_t (*bytes)(const Sizes&), const Sizes& s) { return bytes ? ceil_div(bytes(s), sizeof(float)) : 1; }

public:
    const Sizes s;
    Layer(const Program& program, const Sizes& s_, int copies)
        : u_(s_.elements(), copies, SCALES[0], 1), dt_raw_(s_.elements(), copies, SCALES[1], 2), z_(s_.elements(), copies, SCALES[2], 3),
          dout_(s_.elements(), copies, SCALES[3], 4), bc_(s_.rows() * 2 * N, copies, SCALES[4], 5), out_(s_.elements(), copies),
          du_(s_.elements(), copies), ddt_raw_(s_.elements(), copies), dz_(s_.elements(), copies), dbc_(s_.rows() * 2 * N, copies),
          A_log_((int64_t)s_.e * N, 1), D_(s_.e, 1), dt_bias_(s_.e, 1), dA_log_((int64_t)s_.e * N, 1), dD_(s_.e, 1), ddt_bias_(s_.e, 1),
          saved_(floats(program.saved_bytes, s_), 1), scratch_(floats(program.scratch_bytes, s_), 1), s(s_) {
        const Inputs_of<float> p = initial_parameters(s.e);
        CUDA_CHECK(cudaMemcpy(A_log_[0], p.A_log.data(), p.A_log.size() * sizeof(float), cudaMemcpyHostToDevice));
        CUDA_CHECK(cudaMemcpy(D_[0], p.D.data(), p.D.size() * sizeof(float), cudaMemcpyHostToDevice));
        CUDA_CHECK(cudaMemcpy(dt_bias_[0], p.dt_bias.data(), p.dt_bias.size() * sizeof(float), cudaMemcpyHostToDevice));
    }
    Inputs inputs(int i) const { return {u_[i], dt_raw_[i], z_[i], dout_[i], bc_[i], A_log_[0], D_[0], dt_bias_[0], s}; }
    Outputs outputs(int i) const { return {out_[i], du_[i], ddt_raw_[i], dz_[i], dbc_[i], dA_log_[0], dD_[0], ddt_bias_[0], saved_[0], scratch_[0]}; }
};

inline Inputs_of<double> on_host(const Inputs& p) {
    const int64_t n = p.s.elements();
    return {ladder::to_host(p.u, n),
            ladder::to_host(p.dt_raw, n),
            ladder::to_host(p.z, n),
            ladder::to_host(p.dout, n),
            ladder::to_host(p.bc, p.s.rows() * 2 * N),
            ladder::to_host(p.A_log, (int64_t)p.s.e * N),
            ladder::to_host(p.D, p.s.e),
            ladder::to_host(p.dt_bias, p.s.e)};
}

// Runs both passes once, on outputs filled with NaN and parameter gradients of zero
inline Results_of<double> results(const Program& program, const Layer& layer) {
    const Sizes s = layer.s;
    const Outputs o = layer.outputs(0);
    const int64_t n = s.elements();
    for (bf16* p : {o.out, o.du, o.ddt_raw, o.dz}) CUDA_CHECK(cudaMemset(p, 255, n * sizeof(bf16)));
    CUDA_CHECK(cudaMemset(o.dbc, 255, s.rows() * 2 * N * sizeof(bf16)));
    for (float* p : {o.dD, o.ddt_bias}) CUDA_CHECK(cudaMemset(p, 0, s.e * sizeof(float)));
    CUDA_CHECK(cudaMemset(o.dA_log, 0, s.e * N * sizeof(float)));
    program.forward(layer.inputs(0), o);
    if (program.backward) program.backward(layer.inputs(0), o);
    CUDA_CHECK(cudaDeviceSynchronize());
    Results_of<double> r(s);
    r.out = ladder::to_host(o.out, n), r.du = ladder::to_host(o.du, n), r.ddt_raw = ladder::to_host(o.ddt_raw, n), r.dz = ladder::to_host(o.dz, n);
    r.dbc = ladder::to_host(o.dbc, s.rows() * 2 * N), r.dA_log = ladder::to_host(o.dA_log, (int64_t)s.e * N);
    r.dD = ladder::to_host(o.dD, s.e), r.ddt_bias = ladder::to_host(o.ddt_bias, s.e);
    return r;
}

// Bounds: 4e-3 is twice what rounding a result to bf16 does; sums over time are in fp32
inline std::vector<ladder::Figure> errors_of(const Results_of<double>& got, const Results_of<double>& want, bool backward, double bound = 4e-3,
                                             double sum_bound = 2e-3) {
    using ladder::relative_error;
    if (!backward) return {{"out", relative_error(got.out, want.out), bound}};
    return {{"out", relative_error(got.out, want.out), bound},         {"du", relative_error(got.du, want.du), bound},
            {"ddt", relative_error(got.ddt_raw, want.ddt_raw), bound}, {"dz", relative_error(got.dz, want.dz), bound},
            {"dBC", relative_error(got.dbc, want.dbc), bound},         {"dA", relative_error(got.dA_log, want.dA_log), sum_bound},
            {"dD", relative_error(got.dD, want.dD), sum_bound},        {"dbias", relative_error(got.ddt_bias, want.ddt_bias), sum_bound}};
}
inline bool same_bits(const Results_of<double>& a, const Results_of<double>& b, bool backward) {
    if (!backward) return a.out == b.out;                             // the rest is NaN still
    return a.out == b.out && a.du == b.du && a.ddt_raw == b.ddt_raw && a.dz == b.dz && a.dbc == b.dbc && a.dA_log == b.dA_log && a.dD == b.dD &&
           a.ddt_bias == b.ddt_bias;
}

// Checks the program at its small size, then times it at its large one. GB/s counts every input read once and every
// result written once: 8 bytes an element (t,c) forward (u, dt_raw, z, out), 16 backward (and dout, du, ddt_raw, dz).
inline int run(const Program& program) {
    return ladder::run(program.name, true, [&] {
        std::vector<ladder::Figure> errors;
        {
            const Layer layer(program, program.checked, 1);
            const Results_of<double> got = results(program, layer);
            if (!same_bits(got, results(program, layer), program.backward)) fail("%s: a second run gives other bits", program.name);
            errors = errors_of(got, sequential(on_host(layer.inputs(0)), program.checked, program.backward), program.backward);
        }
        const Layer layer(program, program.timed, 2);
        const double gigabytes = program.timed.elements() * 1e-9;
        auto row = [&](const char* pass, const bench::Time& t, int bytes, const std::vector<ladder::Figure>& e) {
            ladder::print_row((std::string(program.name) + pass).c_str(), t.median, bytes * gigabytes / t.median * 1e3, "GB/s", e);
        };
        if (program.time_forward)
            row(", forward", bench::time_ms([&](int i) { program.forward(layer.inputs(i), layer.outputs(i)); }, 10, 2), 8, {errors[0]});
        if (!program.backward) return;
        program.forward(layer.inputs(0), layer.outputs(0));
        row(", backward", bench::time_ms([&](int i) { program.backward(layer.inputs(i), layer.outputs(i)); }, 10, 2), 16, errors);
    });
}

// ---------------------------------------------------------------------------------------------------------------------
// Device arithmetic

constexpr int STEPS = 16;                              // of a tile, and between saved states
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

// 2^x, one instruction of the special-function unit, 2 ulp
__device__ inline float ex2(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ inline float sigmoid_fast(float x) { return __fdividef(1.f, 1.f + ex2(-x * LOG2E)); }
// log(1 + e^x). Where e^x < 0.01 the sum 1 + e^x would lose its digits: three terms of the series instead
__device__ inline float softplus_fast(float x) {
    const float p = ex2(x * LOG2E);
    return x > 20.f ? x : p < 0.01f ? p * (1.f - p * (0.5f - p * 0.33333333f)) : __log2f(1.f + p) * LN2;
}
__device__ inline float silu(float x) { return x * sigmoid_fast(x); }
__device__ inline float silu_slope(float x) { const float s = sigmoid_fast(x); return s * (1.f + x * (1.f - s)); }

// f(i) for i < COUNT, by a block of THREADS. The trip count is known to the compiler, so nothing is left of the loop.
template <int COUNT, int THREADS, class F> __device__ inline void each(F f) {
#pragma unroll
    for (int first = 0; first < COUNT; first += THREADS)
        if (COUNT % THREADS == 0 || first + (int)threadIdx.x < COUNT) f(first + (int)threadIdx.x);
}

// A log2(e) of K states of a channel from n on: a_t = exp(dt A) = ex2(dt A2)
template <int K> __device__ inline void load_A2(float (&A2)[K], const float* A_log, int channel, int n) {
#pragma unroll
    for (int j = 0; j < K; j++) A2[j] = -expf(A_log[(int64_t)channel * N + n + j]) * LOG2E;
}

} // namespace scan
