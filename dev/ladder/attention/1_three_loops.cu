// 1. The definition, on one core: for every query, the scores of the keys it sees, their softmax, and the mean of the values with these
// weights (three_loops in problem.cuh). A query sees itself and the window - 1 tokens before it.
//
//     s_ij = q_i . k_j / sqrt(HD),   p_ij = exp(s_ij) / sum_j exp(s_ij),   out_i = sum_j p_ij v_j
//
// 4 HD operations for each pair that sees each other: 309 billion for the layer the other programs time.
#include <chrono>

#include "problem.cuh"

int main() {
    using namespace ladder_attention;
    const char* name = "1 three loops, 2 x 300 x 3 heads";
    return ladder::run(name, false, [&] {
        std::vector<double> qkv(SMALL.values());
        for (size_t i = 0; i < qkv.size(); i++) qkv[i] = bench::random_value((int64_t)i, 2.f, 1);
        const auto start = std::chrono::steady_clock::now();
        const std::vector<double> out = three_loops(SMALL, qkv);
        const double ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
        ladder::print_row(name, ms, SMALL.flops() / ms * 1e-9, "TFLOP/s", {});
    });
}
