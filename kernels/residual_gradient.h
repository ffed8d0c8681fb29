// The gradient of the residual stream, as backward hands it from layer to layer. Products read it as X, but a sum over all layers needs
// more than the 8 bits of bf16. So a bf16 build keeps two planes: `high`, the value rounded to bf16, and `low`, the next 8 bits:
//   bits of the value, as a float = 2^16 bits of high + 2^8 low        -128 <= low <= 127
// That is a float without its last 8 bits: an error of at most 2^-16 of the value (2^-15 where low would be 128). An addition reads 3
// bytes and writes 3, for the 4 and 6 of a float with a rounded copy beside it. Where X is float, high is the value and low is null.
#pragma once
#include <algorithm>
#include <bit>

#include "device.cuh"

template <class X> struct ResidualGradient {
    X* high;
    int8_t* low;
    constexpr explicit operator bool() const { return high; }
};

template <class X> constexpr bool HAS_LOW_PLANE = sizeof(X) == 2;

#ifdef SAMBA_CPU
template <class R> R joined(R high, int8_t) { return high; }
#else
__host__ __device__ inline double joined(double high, int8_t) { return high; }
__host__ __device__ inline float joined(float high, int8_t) { return high; }
__host__ __device__ inline float joined(__nv_bfloat16 high, int8_t low) {
    return std::bit_cast<float>(((uint32_t)std::bit_cast<uint16_t>(high) << 16) + (uint32_t)((int)low << 8));
}
__host__ __device__ inline int8_t low_plane(float, float) { return 0; }
__host__ __device__ inline int8_t low_plane(float value, __nv_bfloat16 high) {
    const int rest = (int)(std::bit_cast<uint32_t>(value) - ((uint32_t)std::bit_cast<uint16_t>(high) << 16));
    const int low = (rest + 128) >> 8;                     // high is infinite or NaN: whatever low is, so is the sum
    return (int8_t)(low < -128 ? -128 : low > 127 ? 127 : low);
}

#ifdef __CUDACC__
// 16 bytes of X as floats, and back
template <class X> constexpr int VALUES = 16 / sizeof(X);
template <class X> __device__ inline void unpack(float (&to)[VALUES<X>], const uint4& from) {
    const uint32_t words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if constexpr (sizeof(X) == 2) to[2 * i] = __uint_as_float(words[i] << 16), to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
        else to[i] = __uint_as_float(words[i]);
    }
}
template <class X> __device__ inline uint4 packed(const float (&from)[VALUES<X>]) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if constexpr (sizeof(X) == 2) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(words[i]) : "f"(from[2 * i + 1]), "f"(from[2 * i]));
        else words[i] = __float_as_uint(from[i]);
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// As many values of both planes, as they are loaded and stored
template <class X> struct GradientWords {
    uint4 high;
    uint2 low;
    __device__ void load(ResidualGradient<X> from, int64_t at) {
        high = *(const uint4*)(from.high + at);
        if constexpr (HAS_LOW_PLANE<X>) low = *(const uint2*)(from.low + at);
    }
    __device__ void store(ResidualGradient<X> to, int64_t at) const {
        *(uint4*)(to.high + at) = high;
        if constexpr (HAS_LOW_PLANE<X>) *(uint2*)(to.low + at) = low;
    }
    __device__ void join(float (&to)[VALUES<X>]) const {
        unpack<X>(to, high);
        if constexpr (HAS_LOW_PLANE<X>)
#pragma unroll
            for (int k = 0; k < 8; k++) {
                uint32_t rest;                             // byte k, with its sign, times 256
                asm("prmt.b32 %0, %1, 0, %2;" : "=r"(rest) : "r"(k < 4 ? low.x : low.y), "r"(0x8804 + 0x1110 * (k % 4)));
                to[k] = __uint_as_float(__float_as_uint(to[k]) + rest);
            }
    }
    __device__ void split(const float (&from)[VALUES<X>]) {
        high = packed<X>(from);
        if constexpr (HAS_LOW_PLANE<X>) {
            float rounded[8];
            int rest[8];
            unpack<X>(rounded, high);
#pragma unroll
            for (int k = 0; k < 8; k++) rest[k] = (int)(__float_as_uint(from[k]) - __float_as_uint(rounded[k]) + 128) >> 8;
            low = make_uint2(pack_bytes(rest), pack_bytes(rest + 4));
        }
    }
    static __device__ uint32_t pack_bytes(const int* v) {  // with saturation
        uint32_t upper, all;
        asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, 0;" : "=r"(upper) : "r"(v[3]), "r"(v[2]));
        asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;" : "=r"(all) : "r"(v[1]), "r"(v[0]), "r"(upper));
        return all;
    }
};

template <int W, class X> __device__ inline Vec<float, W> load_gradient(ResidualGradient<X> g, int64_t i) {
    const auto high = load_vec<W>(g.high + i);
    Vec<int8_t, W> low{};
    if constexpr (HAS_LOW_PLANE<X>) low = load_vec<W>(g.low + i);
    Vec<float, W> value;
#pragma unroll
    for (int k = 0; k < W; k++) value[k] = joined(high[k], low[k]);
    return value;
}
#endif
#endif
