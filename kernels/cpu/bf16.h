// float to bf16 and back, CPU twin of kernels/bf16.cuh, and what several processes add up when gradients travel as bf16.
// A bf16 is kept as its 16 bits, the upper half of a float; rounding is to nearest, ties to even. NaN stays NaN.
#pragma once
#include <bit>
#include "../device.cuh"

namespace cpu {

inline uint16_t to_bf16(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    const uint32_t nearest = bits + 0x7fff + (bits >> 16 & 1);       // a carry moves on to the next exponent, and at last to infinity
    return (bits & 0x7fffffff) > 0x7f800000 ? (uint16_t)0x7fff : (uint16_t)(nearest >> 16);
}
inline float from_bf16(uint16_t x) { return std::bit_cast<float>((uint32_t)x << 16); }

inline void narrow(uint16_t* out, const float* in, int64_t n, Stream = {}) {
#pragma omp parallel for simd
    for (int64_t i = 0; i < n; i++) out[i] = to_bf16(in[i]);
}

inline void widen(float* out, const uint16_t* in, int64_t n, Stream = {}) {
#pragma omp parallel for simd
    for (int64_t i = 0; i < n; i++) out[i] = from_bf16(in[i]);
}

} // namespace cpu
