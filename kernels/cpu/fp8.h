// Quantising to 8-bit floating point, CPU twin of kernels/fp8.cuh.
//   scale_i = the smallest power of two with max_j |x_ij| <= 448 scale_i, but at least 2^-108        q_ij = e4m3(x_ij / scale_i)
// e4m3: a sign, 4 bits of exponent, 3 of mantissa; 2^-9 to 448, no infinity. Rounded to nearest, ties to even. Dividing by a power of two
// is exact: q is x rounded once. A row with an infinity or NaN has the scale NaN, so that whatever is multiplied with it becomes NaN.
#pragma once
#include <cmath>
#include "../quantised.h"

namespace cpu {

constexpr float E4M3_MAX = 448;            // 1.75 * 2^8
constexpr int SMALLEST_SCALE = -108;       // its exponent; rows below 2^-100 lose their last bits, then all

inline uint8_t to_e4m3(float x) {
    const uint8_t sign = std::signbit(x) ? 0x80 : 0;
    const float a = std::abs(x);
    if (std::isnan(x)) return sign | 0x7f;
    if (a >= E4M3_MAX) return sign | 0x7e;
    const int exponent = std::max(a > 0 ? std::ilogb(a) : -6, -6);                 // below 2^-6 the step stays 2^-9
    const int steps = (int)std::nearbyint(std::ldexp(a, 3 - exponent));           // 8 to 16 of a normal number, below 8 else
    return sign | (uint8_t)((exponent + 6) * 8 + steps);                          // 16: a carry to the next exponent
}
inline float from_e4m3(uint8_t q) {
    const int exponent = q >> 3 & 15, mantissa = q & 7;
    const float a = (q & 0x7f) == 0x7f ? NAN : exponent ? std::ldexp(8.f + mantissa, exponent - 10) : std::ldexp((float)mantissa, -9);
    return q & 0x80 ? -a : a;
}

// of n values `step` apart
template <class R> float e4m3_scale(const R* x, int64_t n, int64_t step) {
    float most = 0;
    for (int64_t i = 0; i < n; i++) {
        if (!std::isfinite((float)x[i * step])) return NAN;
        most = std::max(most, std::abs((float)x[i * step]));
    }
    int exponent = SMALLEST_SCALE;
    while (most > std::ldexp(E4M3_MAX, exponent)) exponent++;
    return std::ldexp(1.f, exponent);
}

template <class R> void quantise_rows(Quantised out /*(M,K), (M)*/, const R* x /*(M,K)*/, int64_t M, int64_t K, Stream = {}) {
#pragma omp parallel for
    for (int64_t i = 0; i < M; i++) {
        out.scale[i] = e4m3_scale(x + i * K, K, 1);
        for (int64_t j = 0; j < K; j++) out.q[i * K + j] = std::isnan(out.scale[i]) ? 0 : to_e4m3((float)x[i * K + j] / out.scale[i]);
    }
}

constexpr int64_t QUANTISE_MOST = INT64_MAX;                                      // values in a row; the GPU twin keeps one in registers
inline size_t quantise_columns_workspace(int64_t /*N*/, int64_t /*K*/) { return 0; }

// The same of the transpose
template <class R> void quantise_columns(Quantised out /*(K,N), (K)*/, const R* w /*(N,K)*/, void* /*workspace*/, int64_t N, int64_t K, Stream = {}) {
#pragma omp parallel for
    for (int64_t j = 0; j < K; j++) {
        out.scale[j] = e4m3_scale(w + j, N, K);
        for (int64_t i = 0; i < N; i++) out.q[j * N + i] = std::isnan(out.scale[j]) ? 0 : to_e4m3((float)w[i * K + j] / out.scale[j]);
    }
}

} // namespace cpu
