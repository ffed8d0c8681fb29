// Rotary position embedding, NeoX half-split, in place on the query and key heads of qkv (B, T, G, H/G + 2, head_dim).
// Formula: kernels/cpu/rope.h. Rotation in fp32, one rounding. Nothing is saved: backward is the rotation by minus the angle
// (attention_backward does it where it has dq and dk in registers). In training on Hopper forward is part of a product (matmul_rope.cuh).
//
// Bytes: the query and key heads read and written once, 4 BT (H + G) head_dim in bf16, and the fp32 table (L2 serves it
// after the first heads): 0.134 ms at 3 TB/s for 32768 tokens, 12 + 12 heads of 128. Flops do not matter.
#pragma once
#include <algorithm>

#include "cpu/rope.h"
#include "device.cuh"
#include "measure.cuh"

namespace gpu {

constexpr int ROPE_TABLE_ROWS = 16, ROPE_MAX_HALF = 128;

struct RopeTurns { uint64_t turn[ROPE_MAX_HALF]; };       // of each pair: rope_turn() in the twin

// A thread fills ROWS rows of one pair.
template <int ROWS> __global__ void rope_table_kernel(float2* table, int64_t position, int64_t T, int half, const RopeTurns turns) {
    const int64_t t0 = (int64_t)blockIdx.x * ROWS, t1 = min(T, t0 + ROWS);
    for (int j = threadIdx.x; j < half; j += blockDim.x)
        for (int64_t t = t0; t < t1; t++) {
            double sine, cosine;
            sincospi((double)(int64_t)((uint64_t)(position + t) * turns.turn[j]) * 0x1p-63, &sine, &cosine);
            table[t * half + j] = make_float2((float)cosine, (float)sine);
        }
}

// x1 and x2 of one pair, turned by the angle with cosine c and sine s. Which products are rounded is spelled out, not left to the compiler: all
// kernels that turn the same values make the same bits.
__device__ inline float2 rope_pair(float x1, float x2, float c, float s) { return make_float2(fmaf(x1, c, -(x2 * s)), fmaf(x1, s, x2 * c)); }

// A block turns one row (b, t). An item is V pairs of one query or key head.
template <class X, int V>
__global__ void rope_kernel(X* qkv, const float* table, float sign, int64_t T, int H, int G, int head_dim) {
    const int half = head_dim / 2, parts = half / V, heads_per_group = H / G;
    X* row = qkv + (int64_t)blockIdx.x * (H + 2 * G) * head_dim;
    const float* cos_sin = table + blockIdx.x % T * head_dim;
    for (int item = threadIdx.x; item < (H + G) * parts; item += blockDim.x) {
        const int j = item % parts * V, turned = item / parts;
        const int head = turned + turned / (heads_per_group + 1);              // steps over the value heads
        X* x = row + (int64_t)head * head_dim + j;
        Vec<X, V> x1 = load_vec<V>(x), x2 = load_vec<V>(x + half);
#pragma unroll
        for (int i = 0; i < V; i++) {
            const Vec<float, 2> cs = load_vec<2>(cos_sin + 2 * (j + i));
            const float2 y = rope_pair(to_float(x1[i]), to_float(x2[i]), cs[0], sign * cs[1]);
            x1[i] = from_float<X>(y.x), x2[i] = from_float<X>(y.y);
        }
        store_vec(x, x1);
        store_vec(x + half, x2);
    }
}

template <class X> inline void rope_launch(X* qkv, const float* table, float sign, int B, int64_t T, int H, int G, int head_dim, Stream stream) {
    if (G < 1 || H % G != 0 || head_dim % 2 != 0)
        fail("rope: %d heads in %d groups of head_dim %d: heads must be a multiple of groups and head_dim even", H, G, head_dim);
    if (B * T == 0) return;
    constexpr int V = 16 / sizeof(X);
    const int half = head_dim / 2;
    const bool vectors = half % V == 0;
    const int threads = (int)std::min<int64_t>(256, round_up((int64_t)(H + G) * (vectors ? half / V : half), WARP));
    if (vectors) rope_kernel<X, V><<<B * T, threads, 0, stream>>>(qkv, table, sign, T, H, G, head_dim);
    else rope_kernel<X, 1><<<B * T, threads, 0, stream>>>(qkv, table, sign, T, H, G, head_dim);
    LAUNCH_CHECK();
}

// table (T, head_dim/2, 2): cos and sin of rows position .. position + T - 1, rounded to fp32
inline void rope_table(float* table, int64_t position, int64_t T, int head_dim, double base, Stream stream = {}) {
    const int half = head_dim / 2;
    if (head_dim % 2 != 0 || half > ROPE_MAX_HALF) fail("rope: head_dim %d: must be even and at most %d", head_dim, 2 * ROPE_MAX_HALF);
    if (T == 0) return;
    RopeTurns turns{};
    for (int j = 0; j < half; j++) turns.turn[j] = cpu::rope_turn(j, head_dim, base);
    rope_table_kernel<ROPE_TABLE_ROWS><<<ceil_div(T, ROPE_TABLE_ROWS), round_up(half, WARP), 0, stream>>>((float2*)table, position, T, half, turns);
    LAUNCH_CHECK();
}
inline void rope_forward(floatX* qkv, const float* table, int B, int64_t T, int H, int G, int head_dim, Stream stream = {}) {
    const Operation op("rope", 2.0 * B * T * (H + G) * head_dim * sizeof(floatX), 0, stream);
    rope_launch(qkv, table, 1.f, B, T, H, G, head_dim, stream);
}
inline void rope_backward(floatX* dqkv, const float* table, int B, int64_t T, int H, int G, int head_dim, Stream stream = {}) {
    const Operation op("rope backward", 2.0 * B * T * (H + G) * head_dim * sizeof(floatX), 0, stream);
    rope_launch(dqkv, table, -1.f, B, T, H, G, head_dim, stream);
}

} // namespace gpu
