// Rotary position embedding (RoPE), NeoX half-split form. The plain C++ twin of kernels/rope.cuh, and its definition:
//
//   angle(t, j) = (position + t) base^(-2j/head_dim)                    j = 0 .. head_dim/2 - 1
//   x1' = x1 cos - x2 sin,   x2' = x1 sin + x2 cos                      x1 = dims [0, head_dim/2), x2 = the rest
//
// applied in place to the query and key heads of qkv (B, T, G, H/G + 2, head_dim): per group its H/G query heads, its key
// head and its value head, which is left alone. Backward is the rotation by minus the angle.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

#include "../device.cuh"

namespace cpu {

// What one token turns pair j by, base^(-2j/head_dim) / 2 pi turns, as a fraction of 2^64. A position times this, modulo 2^64, is
// the angle without its whole turns. Integers lose nothing, so that an angle is off by position 2^-64 turns at the most: 3e-12 rad at
// position 10^7, 3e-8, half an ulp of fp32, at 10^11. A product in double would be off by 2e-9 and 2e-5.
inline uint64_t rope_turn(int j, int head_dim, double base) {
    const long double turns = std::pow((long double)base, -2.0L * j / head_dim) / (2 * 3.14159265358979323846264338327950288L);
    return (uint64_t)std::llround(std::ldexp(turns - std::floor(turns + 0.5L), 64));      // between -1/2 and 1/2: fits
}

// table (T, head_dim/2, 2): cos and sin of row t, position + t
template <class R> inline void rope_table(R* table, int64_t position, int64_t T, int head_dim, double base, Stream = {}) {
    const int half = head_dim / 2;
    std::vector<uint64_t> turn(half);
    for (int j = 0; j < half; j++) turn[j] = rope_turn(j, head_dim, base);
#pragma omp parallel for
    for (int64_t t = 0; t < T; t++)
        for (int j = 0; j < half; j++) {
            const double angle = (double)(int64_t)((uint64_t)(position + t) * turn[j]) * (M_PI * 0x1p-63);     // -pi .. pi
            table[(t * half + j) * 2 + 0] = (R)std::cos(angle);
            table[(t * half + j) * 2 + 1] = (R)std::sin(angle);
        }
}

// sign = +1 rotates by the angle (forward), -1 back (backward)
template <class R> inline void rope_rotate(R* qkv, const R* table, R sign, int B, int64_t T, int H, int G, int head_dim) {
    if (G < 1 || H % G != 0 || head_dim % 2 != 0)
        fail("rope: %d heads in %d groups of head_dim %d: heads must be a multiple of groups and head_dim even", H, G, head_dim);
    const int half = head_dim / 2, heads_per_group = H / G;
#pragma omp parallel for
    for (int64_t row = 0; row < B * T; row++) {
        const R* cos_sin = table + (row % T) * half * 2;
        for (int head = 0; head < H + 2 * G; head++) {
            if (head % (heads_per_group + 2) == heads_per_group + 1) continue;      // the group's value head
            R* x = qkv + (row * (H + 2 * G) + head) * head_dim;
            for (int j = 0; j < half; j++) {
                const R c = cos_sin[2 * j], s = sign * cos_sin[2 * j + 1], x1 = x[j], x2 = x[j + half];
                x[j] = x1 * c - x2 * s;
                x[j + half] = x1 * s + x2 * c;
            }
        }
    }
}

template <class R> inline void rope_forward(R* qkv, const R* table, int B, int64_t T, int H, int G, int head_dim, Stream = {}) {
    rope_rotate(qkv, table, R(1), B, T, H, G, head_dim);
}
template <class R> inline void rope_backward(R* dqkv, const R* table, int B, int64_t T, int H, int G, int head_dim, Stream = {}) {
    rope_rotate(dqkv, table, R(-1), B, T, H, G, head_dim);
}

} // namespace cpu
