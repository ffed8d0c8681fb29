// What the programs of this directory share: the problem, its random inputs, the definition as three loops, the check and the clock. A
// program is a kernel, its launch, and a call of run().
#pragma once
#include "../../../kernels/attention/common.cuh"
#include "../ladder.cuh"

#ifdef SAMBA_FP32
#error "the ladder is bf16: build it without PRECISION=FP32"
#endif

namespace ladder_attention {

using bf16 = __nv_bfloat16;
constexpr int HD = 128;                                // dimensions of a head

// qkv (B,T,H,3,HD): of every token and head its query, key and value, as one matrix product leaves them; out (B,T,H,HD)
struct Problem {
    int B, T, H, window;
    const bf16* qkv;
    __host__ __device__ int64_t row() const { return (int64_t)H * 3 * HD; }
    // part: q, k, v
    __host__ __device__ int64_t at(int b, int t, int h, int part) const { return ((int64_t)b * T + t) * row() + (h * 3 + part) * HD; }
    __host__ __device__ int64_t out_at(int b, int t, int h) const { return (((int64_t)b * T + t) * H + h) * HD; }
    __host__ __device__ int first_key(int i) const { return i - window + 1 > 0 ? i - window + 1 : 0; }
    int64_t values() const { return (int64_t)B * T * row(); }
    int64_t results() const { return (int64_t)B * T * H * HD; }
    double flops() const {                             // two products of HD for every query and key it sees
        double pairs = 0;
        for (int i = 0; i < T; i++) pairs += i - first_key(i) + 1;
        return 4.0 * HD * pairs * B * H;
    }
};
const Problem LARGE{8, 4096, 12, 2048, nullptr}, SMALL{2, 300, 3, 130, nullptr};     // Samba-421M's layer at 8 x 4096 tokens; one for the CPU

// The definition: for every query, scores of the keys it sees, their softmax, the mean of the values with these weights
inline std::vector<double> three_loops(const Problem& p, const std::vector<double>& qkv) {
    std::vector<double> out(p.results(), 0.0);
    for (int b = 0; b < p.B; b++)
        for (int h = 0; h < p.H; h++)
            for (int i = 0; i < p.T; i++) {                                           // 1: queries
                const double* q = &qkv[p.at(b, i, h, 0)];
                double* o = &out[p.out_at(b, i, h)];
                double sum = 0;
                for (int j = p.first_key(i); j <= i; j++) {                           // 2: keys
                    const double *k = &qkv[p.at(b, j, h, 1)], *v = &qkv[p.at(b, j, h, 2)];
                    double score = 0;
                    for (int d = 0; d < HD; d++) score += q[d] * k[d];                // 3: dimensions
                    const double weight = std::exp(score / std::sqrt((double)HD));
                    sum += weight;
                    for (int d = 0; d < HD; d++) o[d] += weight * v[d];
                }
                for (int d = 0; d < HD; d++) o[d] /= sum;
            }
    return out;
}

// forward(problem, out, lse): lse is (B,H,T), room for the library's second result
using Forward = void (*)(const Problem&, bf16*, float*);
struct Buffers {
    bench::Rotating<bf16> qkv, out;
    bench::Rotating<float> lse;
    Buffers(const Problem& p, int copies) : qkv(p.values(), copies, 2.f), out(p.results(), copies), lse((int64_t)p.B * p.H * p.T, 1) {}
};

// Checks a program on the small problem and times it on the large one. 4e-3: twice what rounding the results to bf16 does
inline int run(const char* name, Forward forward, int repeats = 10) {
    return ladder::run(name, true, [&] {
        double error;
        {
            Problem p = SMALL;
            const Buffers x(p, 1);
            p.qkv = x.qkv[0];
            CUDA_CHECK(cudaMemset(x.out[0], 0xFF, p.results() * sizeof(bf16)));       // NaN: what is not written shows
            forward(p, x.out[0], x.lse[0]);
            CUDA_CHECK(cudaDeviceSynchronize());
            error = ladder::relative_error(ladder::to_host(x.out[0], p.results()), three_loops(p, ladder::to_host(p.qkv, p.values())));
        }
        Problem p = LARGE;
        const Buffers x(p, 2);
        const bench::Time time = bench::time_ms([&](int i) { p.qkv = x.qkv[i]; forward(p, x.out[i], x.lse[0]); }, repeats, 2);
        ladder::print_row(name, time.median, p.flops() / time.median * 1e-9, "TFLOP/s", {{"out", error, 4e-3}});
    });
}

} // namespace ladder_attention
