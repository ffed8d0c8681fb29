// Attention in fp32 arithmetic from either type (attention.cuh), forward and backward: any head_dim that is a multiple of 8 up to 256.
//
// Fp32 tiles of 16 R rows in shared memory, padded with zeros to HDP columns. 256 threads as 16 x 16: thread
// (ty, tx) owns rows ty + 16 r of a result, and columns tx + 16 k of scores or 4 tx + 64 k .. + 3 of head dimensions.
#pragma once
#include "portable.cuh"

namespace gpu {
namespace attn {

constexpr int PLAIN_THREADS = 256;
template <int HDP> constexpr int PLAIN_R = HDP <= 128 ? 2 : 1;
template <int HDP> constexpr int PLAIN_ROW = HDP + 4;                                        // in floats; 16 rows hit different banks
template <int HDP> constexpr int PLAIN_TILE = 16 * PLAIN_R<HDP> * PLAIN_ROW<HDP>;
template <int HDP> constexpr int PLAIN_SCORES = 16 * PLAIN_R<HDP> * (16 * PLAIN_R<HDP> + 1);

// tile rows r = row_of(r), a pointer to hd values, or zeros where it is null
template <int HDP, class X, class F> __device__ inline void plain_load(float* tile, int hd, F row_of) {
    constexpr int BT = 16 * PLAIN_R<HDP>;
    for (int i = threadIdx.x; i < BT * (HDP / 4); i += PLAIN_THREADS) {
        const int r = i / (HDP / 4), d = i % (HDP / 4) * 4;
        const X* from = row_of(r);
        Vec<float, 4> v{};
        if (from && d < hd) {
            const Vec<X, 4> x = load_vec<4>(from + d);
#pragma unroll
            for (int e = 0; e < 4; e++) v[e] = to_float(x[e]);
        }
        store_vec(tile + r * PLAIN_ROW<HDP> + d, v);
    }
}
template <int HDP, int R> __device__ inline void plain_product_rows(float (&s)[R][R], const float* x, const float* y) {
    const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int k = 0; k < R; k++) s[r][k] = 0.f;
#pragma unroll 4
    for (int d = 0; d < HDP; d += 4) {
        Vec<float, 4> a[R], b[R];
#pragma unroll
        for (int r = 0; r < R; r++) {
            a[r] = load_vec<4>(x + (ty + 16 * r) * PLAIN_ROW<HDP> + d);
            b[r] = load_vec<4>(y + (tx + 16 * r) * PLAIN_ROW<HDP> + d);
        }
#pragma unroll
        for (int r = 0; r < R; r++)
#pragma unroll
            for (int k = 0; k < R; k++)
#pragma unroll
                for (int e = 0; e < 4; e++) s[r][k] = fmaf(a[r][e], b[k][e], s[r][k]);
    }
}
// acc += p y: p (BT, BT) of this half-warp's rows goes through shared memory
template <int HDP, int R>
__device__ inline void plain_product_columns(float (&acc)[R][HDP / 16], const float (&p)[R][R], float* scores, const float* y) {
    constexpr int BT = 16 * R;
    const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    __syncwarp();
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int k = 0; k < R; k++) scores[(ty + 16 * r) * (BT + 1) + tx + 16 * k] = p[r][k];
    __syncwarp();
    for (int j = 0; j < BT; j++)
#pragma unroll
        for (int k = 0; k < HDP / 64; k++) {
            const Vec<float, 4> v = load_vec<4>(y + j * PLAIN_ROW<HDP> + tx * 4 + 64 * k);
#pragma unroll
            for (int r = 0; r < R; r++)
#pragma unroll
                for (int e = 0; e < 4; e++) acc[r][k * 4 + e] = fmaf(scores[(ty + 16 * r) * (BT + 1) + j], v[e], acc[r][k * 4 + e]);
        }
}
template <int HDP, int R, class X> __device__ inline void plain_store(X* to, const float (&acc)[R][HDP / 16], int r, int hd, float factor) {
#pragma unroll
    for (int k = 0; k < HDP / 64; k++) {
        const int d = threadIdx.x % 16 * 4 + 64 * k;
        Vec<X, 4> v;
#pragma unroll
        for (int e = 0; e < 4; e++) v[e] = from_float<X>(acc[r][k * 4 + e] * factor);
        if (d < hd) store_vec(to + d, v);
    }
}
template <int R, int N> __device__ inline void plain_clear(float (&acc)[R][N]) {
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int k = 0; k < N; k++) acc[r][k] = 0.f;
}
__device__ inline float half_warp_sum(float x) {
#pragma unroll
    for (int o = 8; o > 0; o /= 2) x += __shfl_xor_sync(0xffffffffu, x, o);
    return x;
}
__device__ inline float half_warp_max(float x) {
#pragma unroll
    for (int o = 8; o > 0; o /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, o));
    return x;
}

// A key (value = 0) or value (1) of the call or of the ring; null: there is none
template <class X> __device__ inline const X* plain_key(const Args<X>& a, int b, int g, int p, int value) {
    if (p < a.oldest() || p >= a.T) return nullptr;
    return p < 0 ? a.ring_row(b, g, p, value) : a.qkv + a.key(b, g) + (int64_t)value * a.hd + p * a.row();
}

template <int HDP> constexpr int forward_plain_shared() { return (2 * PLAIN_TILE<HDP> + PLAIN_SCORES<HDP>) * 4; }

template <class X, int HDP> __global__ void __launch_bounds__(PLAIN_THREADS) forward_plain(const Args<X> a) {
    constexpr int R = PLAIN_R<HDP>, BT = 16 * R;
    float *queries = reinterpret_cast<float*>(attention_shared), *keys = queries + PLAIN_TILE<HDP>, *scores = keys + PLAIN_TILE<HDP>;
    const Work work = block_work(a.T, BT, a.H, true);
    const int b = work.b, h = work.head, g = h / (a.H / a.G), ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    const int i0 = work.tile * BT;
    const float scale = rsqrtf((float)a.hd);
    float o[R][HDP / 16], top[R], sum[R];
    plain_clear(o);
    for (int r = 0; r < R; r++) top[r] = -INFINITY, sum[r] = 0.f;
    plain_load<HDP, X>(queries, a.hd, [&](int r) { return i0 + r < a.T ? a.qkv + a.query(b, h) + (i0 + r) * a.row() : nullptr; });
    for (int n0 = a.first_key(b, i0); n0 < min(i0 + BT, a.T); n0 += BT) {
        float s[R][R];
        plain_load<HDP, X>(keys, a.hd, [&](int r) { return plain_key(a, b, g, n0 + r, 0); });
        __syncthreads();
        plain_product_rows<HDP>(s, queries, keys);
        __syncthreads();
        plain_load<HDP, X>(keys, a.hd, [&](int r) { return plain_key(a, b, g, n0 + r, 1); });
#pragma unroll
        for (int r = 0; r < R; r++) {
            const int i = i0 + ty + 16 * r, first = a.first_key(b, i);
            float now = top[r], total = 0.f;
#pragma unroll
            for (int k = 0; k < R; k++) {
                const int p = n0 + tx + 16 * k;
                s[r][k] = p <= i && p >= first ? s[r][k] * scale : -INFINITY;
                now = fmaxf(now, s[r][k]);
            }
            now = half_warp_max(now);
            const float base = now == -INFINITY ? 0.f : now, shrink = expf(top[r] - base);
            top[r] = now;
#pragma unroll
            for (int k = 0; k < R; k++) total += s[r][k] = expf(s[r][k] - base);
            sum[r] = sum[r] * shrink + half_warp_sum(total);
#pragma unroll
            for (int k = 0; k < HDP / 16; k++) o[r][k] *= shrink;
        }
        __syncthreads();
        plain_product_columns<HDP>(o, s, scores, keys);
        __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < R; r++) {
        const int i = i0 + ty + 16 * r;
        if (i >= a.T) continue;
        if (tx == 0) a.lse[a.stat(b, h) + i] = top[r] + logf(sum[r]);
        plain_store<HDP>(a.out + a.output(b, h) + i * a.out_row(), o, r, a.hd, 1.f / sum[r]);
    }
}

template <int HDP> constexpr int backward_plain_shared() { return (4 * PLAIN_TILE<HDP> + PLAIN_SCORES<HDP>) * 4; }

// OWNS_KEYS: the block's tile is keys and values (rows of the scores), and it goes over the group's heads and queries;
// otherwise the tile is queries and dout, and it goes over keys. Both form P and dS of one pair of tiles at a time.
template <class X, int HDP, bool OWNS_KEYS> __global__ void __launch_bounds__(PLAIN_THREADS) backward_plain(const Args<X> a) {
    constexpr int R = PLAIN_R<HDP>, BT = 16 * R;
    float *own_a = reinterpret_cast<float*>(attention_shared), *own_b = own_a + PLAIN_TILE<HDP>, *other_a = own_b + PLAIN_TILE<HDP>,
          *other_b = other_a + PLAIN_TILE<HDP>, *scores = other_b + PLAIN_TILE<HDP>;
    const int heads = a.H / a.G, ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    const Work work = block_work(a.T, BT, OWNS_KEYS ? a.G : a.H, !OWNS_KEYS);
    const int b = work.b, g = OWNS_KEYS ? work.head : work.head / heads;
    const int own0 = work.tile * BT;
    const float scale = rsqrtf((float)a.hd);
    auto load_keys = [&](float* k, float* v, int p0) {
        plain_load<HDP, X>(k, a.hd, [&](int r) { return plain_key(a, b, g, p0 + r, 0); });
        plain_load<HDP, X>(v, a.hd, [&](int r) { return plain_key(a, b, g, p0 + r, 1); });
    };
    auto load_queries = [&](float* q, float* d, int h, int i0) {
        plain_load<HDP, X>(q, a.hd, [&](int r) { return i0 + r < a.T ? a.qkv + a.query(b, h) + (i0 + r) * a.row() : nullptr; });
        plain_load<HDP, X>(d, a.hd, [&](int r) { return i0 + r < a.T ? a.dout + a.output(b, h) + (i0 + r) * a.out_row() : nullptr; });
    };
    float first[R][HDP / 16], second[R][HDP / 16];                       // dk and dv, or dq and nothing
    plain_clear(first);
    plain_clear(second);
    if (OWNS_KEYS) load_keys(own_a, own_b, own0);
    else load_queries(own_a, own_b, work.head, own0);
    const int begin = OWNS_KEYS ? own0 : a.first_key(b, own0);
    const int end = OWNS_KEYS ? a.last_query(b, own0 + BT - 1) + 1 : min(a.T, own0 + BT);
    for (int h = OWNS_KEYS ? g * heads : work.head; h < (OWNS_KEYS ? (g + 1) * heads : work.head + 1); h++)
        for (int other0 = begin; other0 < end; other0 += BT) {
            __syncthreads();                                            // the last round's readers are done
            if (OWNS_KEYS) load_queries(other_a, other_b, h, other0);
            else load_keys(other_a, other_b, other0);
            __syncthreads();
            float p[R][R], ds[R][R];
            plain_product_rows<HDP>(p, own_a, other_a);
            plain_product_rows<HDP>(ds, own_b, other_b);
#pragma unroll
            for (int r = 0; r < R; r++)
#pragma unroll
                for (int k = 0; k < R; k++) {
                    const int row = own0 + ty + 16 * r, column = other0 + tx + 16 * k;
                    const int i = OWNS_KEYS ? column : row, key = OWNS_KEYS ? row : column;
                    const bool seen = i < a.T && key <= i && key >= a.first_key(b, i);
                    const int64_t at = a.stat(b, h) + (seen ? i : 0);
                    p[r][k] = seen ? expf(p[r][k] * scale - a.lse[at]) : 0.f;
                    ds[r][k] = p[r][k] * (ds[r][k] - a.delta[at]);
                }
            plain_product_columns<HDP>(first, ds, scores, other_a);
            if (OWNS_KEYS) plain_product_columns<HDP>(second, p, scores, other_b);
        }
#pragma unroll
    for (int r = 0; r < R; r++) {
        const int t = own0 + ty + 16 * r;
        if (t >= a.T) continue;
        plain_store<HDP>(a.dqkv + (OWNS_KEYS ? a.key(b, g) : a.query(b, work.head)) + t * a.row(), first, r, a.hd, scale);
        if (OWNS_KEYS) plain_store<HDP>(a.dqkv + a.value(b, g) + t * a.row(), second, r, a.hd, 1.f);
    }
}

} // namespace attn
} // namespace gpu
