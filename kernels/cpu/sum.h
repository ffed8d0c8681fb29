// Sums and maxima for the CPU twins. Sixteen running values side by side let the compiler use vector instructions without changing the
// order of additions behind our back: the result depends on n alone, never on the number of threads.
#pragma once
#include <cstdint>

namespace cpu {

template <class R, class F> R sum_over(int64_t n, F term /*R term(int64_t i)*/) {
    constexpr int LANES = 16;
    R lane[LANES] = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
#pragma omp simd
        for (int k = 0; k < LANES; k++) lane[k] += term(i + k);
    }
    for (int k = 0; i < n; i++, k++) lane[k] += term(i);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int k = 0; k < half; k++) lane[k] += lane[k + half];
    return lane[0];
}

template <class R, class F> R max_over(int64_t n /*>= 1*/, F term) {
    constexpr int LANES = 16;
    R lane[LANES];
    for (int k = 0; k < LANES; k++) lane[k] = term(0);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
#pragma omp simd
        for (int k = 0; k < LANES; k++) lane[k] = term(i + k) > lane[k] ? term(i + k) : lane[k];
    }
    for (; i < n; i++) lane[0] = term(i) > lane[0] ? term(i) : lane[0];
    R top = lane[0];
    for (R x : lane) top = x > top ? x : top;
    return top;
}

} // namespace cpu
