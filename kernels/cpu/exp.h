// exp, sigmoid and softplus for inner loops. The float forms have no branches and no calls, so that a loop over channels
// vectorises (g++ calls the library's expf one element at a time); the double forms are the library's. Relative error of the
// float forms: under 3e-7.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace cpu {

// e^x = 2^k e^r with k = round(x log2 e), |r| <= ln(2)/2: the series up to r^7 leaves 5e-9. Adding 1.5 * 2^23 rounds k to an
// integer in the low bits of the sum. Below -87 the result is 0, above 88 infinity.
inline float fast_exp(float x) {
    constexpr float SHIFT = 12582912.f;
    const float shifted = x * 1.44269504f + SHIFT;
    const float k = shifted - SHIFT;
    const float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;     // ln 2 in two parts: the first product is exact
    const float tail = 0.5f + r * (1.f / 6 + r * (1.f / 24 + r * (1.f / 120 + r * (1.f / 720 + r * (1.f / 5040)))));
    const float power = std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) + 127u) << 23);
    const float e = (1.f + (r + r * r * tail)) * power;
    const float low = x < -87.f ? 0.f : e;
    return x > 88.f ? std::numeric_limits<float>::infinity() : low;
}
inline double fast_exp(double x) { return std::exp(x); }

inline float sigmoid(float x) { return 1.f / (1.f + fast_exp(-x)); }
inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// log(1 + e^x) = max(x, 0) + log1p(e^-|x|), and log1p(q) = 2 artanh(s) with s = q / (2 + q) <= 1/3
inline float softplus(float x) {
    const float q = fast_exp(x < 0 ? x : -x), s = q / (2.f + q), s2 = s * s;
    const float series = 1.f / 3 + s2 * (1.f / 5 + s2 * (1.f / 7 + s2 * (1.f / 9 + s2 * (1.f / 11 + s2 * (1.f / 13)))));
    return (x > 0 ? x : 0.f) + 2.f * (s + s * s2 * series);
}
inline double softplus(double x) { return (x > 0 ? x : 0) + std::log1p(std::exp(x < 0 ? x : -x)); }

} // namespace cpu
