// Causal sliding-window attention with grouped heads. The plain C++ twin of kernels/attention.cuh, and its definition:
//
//   s(i, p) = q_i . k_p / sqrt(hd)     for p in max(oldest, i - window + 1, starts_i) .. i   (window <= 0: no limit)
//   out_i   = sum_p exp(s(i, p) - lse_i) v_p,     lse_i = log sum_p exp(s(i, p))
//   P = exp(s - lse), delta_i = dout_i . out_i, dS = P (dout v^T - delta)
//   dv = P^T dout,  dq = dS k / sqrt(hd),  dk = dS^T q / sqrt(hd)
//
// Shapes: qkv (B, T, G, H/G + 2, hd): per group its H/G query heads, its key head, its value head; out (B, T, H, hd);
// lse (B, H, T); ring (B, capacity, 2, G, hd): keys and values of earlier calls, position p in slot p % capacity. Positions count
// from this call's t = 0: the ring's are negative, the oldest is -min(position, capacity), or 0 without a ring.
// starts (B, T) or null: the position of the first token of t's document, not falling in t: a query sees no earlier document. A
// document that began in an earlier call has a negative start.
//
// No (T, T) buffer: scores live in tiles of QUERY_TILE x KEY_TILE, the softmax is the online one, tiles outside the window are
// never visited. Saved for backward: lse. Backward goes over the tiles twice, once per owner of keys (dk, dv) and once per
// owner of queries (dq), so that every sum has one owner and a fixed order.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "../device.cuh"
#include "exp.h"
#include "rope.h"

namespace cpu {

constexpr int QUERY_TILE = 32, KEY_TILE = 64;

// Where heads lie in a row of qkv, and what a query sees
struct AttentionShape {
    int64_t T;
    int H, G, hd;
    int64_t window, oldest = 0;
    const int* starts = nullptr;
    // The first key that query i sees
    int64_t first_key(int b, int64_t i) const {
        return std::max({i - window + 1, oldest, starts ? (int64_t)starts[b * T + i] : std::numeric_limits<int64_t>::min()});
    }
    int64_t row() const { return (int64_t)(H + 2 * G) * hd; }
    int group(int head) const { return head / (H / G); }
    int64_t query(int b, int64_t t, int head) const { return (b * T + t) * row() + (int64_t)(group(head) * (H / G + 2) + head % (H / G)) * hd; }
    int64_t key(int b, int64_t t, int g) const { return (b * T + t) * row() + (int64_t)(g * (H / G + 2) + H / G) * hd; }
    int64_t value(int b, int64_t t, int g) const { return key(b, t, g) + hd; }
    int64_t output(int b, int64_t t, int head) const { return ((b * T + t) * H + head) * hd; }
};

inline void attention_check(int H, int G, int hd) {
    if (G < 1 || H < 1 || H % G != 0 || hd < 1)
        fail("attention: %d query heads in %d groups of head_dim %d: heads must be a positive multiple of groups", H, G, hd);
}

// c (m, n) += a (m, k) b (k, n). Element (i, x) of a is a[i * a_row + x * a_col]. The inner loop is contiguous; four terms
// of the sum at a time keep c's loads and stores rare.
template <class R>
inline void tile_product(R* c, int64_t ldc, const R* a, int64_t a_row, int64_t a_col, const R* b, int64_t ldb, int m, int n, int k) {
    for (int i = 0; i < m; i++) {
        R* ci = c + i * ldc;
        const R* ai = a + i * a_row;
        int x = 0;
        for (; x + 4 <= k; x += 4) {
            const R a0 = ai[x * a_col], a1 = ai[(x + 1) * a_col], a2 = ai[(x + 2) * a_col], a3 = ai[(x + 3) * a_col];
            const R *b0 = b + x * ldb, *b1 = b0 + ldb, *b2 = b1 + ldb, *b3 = b2 + ldb;
#pragma omp simd
            for (int j = 0; j < n; j++) ci[j] += a0 * b0[j] + a1 * b1[j] + a2 * b2[j] + a3 * b3[j];
        }
        for (; x < k; x++)
            for (int j = 0; j < n; j++) ci[j] += ai[x * a_col] * b[x * ldb + j];
    }
}

// to (hd, KEY_TILE) = the transpose of n rows of hd values
template <class R> inline void transpose_tile(R* to, const R* from, int64_t row, int n, int hd) {
    for (int d = 0; d < hd; d++)
        for (int j = 0; j < n; j++) to[d * KEY_TILE + j] = from[j * row + d];
}

// One query tile against one key tile of the online softmax: scores (in) become probabilities relative to the running
// maximum, and the sums so far are rescaled to it. Row r may see columns [begin(r), end(r)).
template <class R, class Begin, class End>
inline void softmax_tile(R* s, R* maximum, R* sum, R* acc, int rows, int hd, R scale, int keys, Begin begin, End end) {
    for (int r = 0; r < rows; r++) {
        R* sr = s + r * KEY_TILE;
        const int first = std::clamp<int64_t>(begin(r), 0, keys), last = std::clamp<int64_t>(end(r), first, keys);
        if (first == last) { std::fill(sr, sr + keys, R(0)); continue; }
        R top = maximum[r], total = 0;
#pragma omp simd reduction(max : top)
        for (int j = first; j < last; j++) top = std::max(top, sr[j] * scale);
        const R shrink = fast_exp(std::max(maximum[r] - top, R(-1e4)));      // the first tile's maximum is -infinity
#pragma omp simd
        for (int j = first; j < last; j++) sr[j] = fast_exp(sr[j] * scale - top);
#pragma omp simd reduction(+ : total)
        for (int j = first; j < last; j++) total += sr[j];
        std::fill(sr, sr + first, R(0));
        std::fill(sr + last, sr + keys, R(0));
        maximum[r] = top;
        sum[r] = sum[r] * shrink + total;
        for (int d = 0; d < hd; d++) acc[r * hd + d] *= shrink;
    }
}

// A key (value = 0) or value (1) at position p, of the call or of the ring
template <class R> struct AttentionKeys {
    const R *qkv, *ring;
    int64_t capacity, position;
    const R* operator()(const AttentionShape& shape, int b, int64_t p, int g, int value) const {
        if (p >= 0) return qkv + shape.key(b, p, g) + value * shape.hd;
        return ring + (((b * capacity + (position + p) % capacity) * 2 + value) * shape.G + g) * shape.hd;
    }
};

inline AttentionShape attention_shape(int64_t T, int H, int G, int hd, int64_t window, bool ring, int64_t capacity, int64_t position,
                                      const int* starts) {
    attention_check(H, G, hd);
    if (window <= 0 || window > position + T) window = position + T;
    return {T, H, G, hd, window, ring ? -std::min(position, capacity) : 0, starts};
}

template <class R>
inline void attention_forward(R* out, R* lse, const R* qkv, const std::type_identity_t<R>* ring, int64_t capacity, int64_t position,
                              const int* starts, int B, int64_t T, int H, int G, int hd, int64_t window, int* /*drawn*/ = nullptr, Stream = {}) {
    const AttentionShape shape = attention_shape(T, H, G, hd, window, ring, capacity, position, starts);
    const AttentionKeys<R> key_at{qkv, ring, capacity, position};
    const int64_t tiles = ceil_div(T, QUERY_TILE);
    const R scale = R(1) / std::sqrt(R(hd));
#pragma omp parallel
    {
        std::vector<R> keys(hd * KEY_TILE), values(KEY_TILE * hd), s(QUERY_TILE * KEY_TILE), acc(QUERY_TILE * hd);
        std::vector<R> maximum(QUERY_TILE), sum(QUERY_TILE);
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < B * H * tiles; item++) {
            const int64_t i0 = item % tiles * QUERY_TILE;
            const int head = item / tiles % H, b = item / tiles / H, g = shape.group(head), rows = std::min<int64_t>(QUERY_TILE, T - i0);
            std::fill(acc.begin(), acc.end(), R(0));
            std::fill(sum.begin(), sum.end(), R(0));
            std::fill(maximum.begin(), maximum.end(), -std::numeric_limits<R>::infinity());
            for (int64_t p0 = shape.first_key(b, i0); p0 < i0 + rows; p0 += KEY_TILE) {
                const int n = std::min<int64_t>(KEY_TILE, i0 + rows - p0);
                for (int j = 0; j < n; j++) {
                    const R *k = key_at(shape, b, p0 + j, g, 0), *v = key_at(shape, b, p0 + j, g, 1);
                    for (int d = 0; d < hd; d++) keys[d * KEY_TILE + j] = k[d];
                    std::copy(v, v + hd, &values[j * hd]);
                }
                std::fill(s.begin(), s.end(), R(0));
                tile_product(s.data(), KEY_TILE, qkv + shape.query(b, i0, head), shape.row(), 1, keys.data(), KEY_TILE, rows, n, hd);
                softmax_tile(s.data(), maximum.data(), sum.data(), acc.data(), rows, hd, scale, n,
                             [&](int r) { return shape.first_key(b, i0 + r) - p0; }, [&](int r) { return i0 + r + 1 - p0; });
                tile_product(acc.data(), hd, s.data(), KEY_TILE, 1, values.data(), hd, rows, hd, n);
            }
            for (int r = 0; r < rows; r++) {
                lse[((int64_t)b * H + head) * T + i0 + r] = maximum[r] + std::log(sum[r]);
                R* o = out + shape.output(b, i0 + r, head);
                for (int d = 0; d < hd; d++) o[d] = acc[r * hd + d] / sum[r];
            }
        }
    }
}

// delta (B, H, T): enough for R = double
inline size_t attention_backward_workspace(int B, int64_t T, int H, int, int, int64_t) { return (size_t)B * H * T * sizeof(double); }

// p (QUERY_TILE, KEY_TILE) = P and ds = P (dP - delta) / sqrt(hd) of one pair of tiles: queries i0.. of `head`, keys p0..
// keys and values are transposed tiles (hd, KEY_TILE).
template <class R>
inline void attention_gradient_tile(R* p, R* ds, const R* qkv, const R* dout, const R* lse, const R* delta, const R* keys, const R* values,
                                    const AttentionShape& shape, int b, int head, int64_t i0, int rows, int64_t p0, int n) {
    const R scale = R(1) / std::sqrt(R(shape.hd));
    std::fill(p, p + QUERY_TILE * KEY_TILE, R(0));
    std::fill(ds, ds + QUERY_TILE * KEY_TILE, R(0));
    tile_product(p, KEY_TILE, qkv + shape.query(b, i0, head), shape.row(), 1, keys, KEY_TILE, rows, n, shape.hd);
    tile_product(ds, KEY_TILE, dout + shape.output(b, i0, head), (int64_t)shape.H * shape.hd, 1, values, KEY_TILE, rows, n, shape.hd);
    for (int r = 0; r < rows; r++) {
        const int64_t i = i0 + r;
        const R lse_i = lse[((int64_t)b * shape.H + head) * shape.T + i], delta_i = delta[((int64_t)b * shape.H + head) * shape.T + i];
        const int64_t first = shape.first_key(b, i);
        R *pr = p + r * KEY_TILE, *dsr = ds + r * KEY_TILE;
#pragma omp simd
        for (int j = 0; j < n; j++) {
            const bool seen = p0 + j <= i && p0 + j >= first;
            pr[j] = seen ? fast_exp(std::min(pr[j] * scale - lse_i, R(0))) : R(0);     // a probability: at most 1
            dsr[j] = pr[j] * (dsr[j] - delta_i) * scale;
        }
    }
}

template <class R>
inline void attention_backward_keys(R* dqkv, const R* dout, const R* qkv, const R* lse, const R* delta, int B, AttentionShape shape) {
    const int H = shape.H, G = shape.G, hd = shape.hd;
    const int64_t T = shape.T, tiles = ceil_div(T, KEY_TILE);
#pragma omp parallel
    {
        std::vector<R> keys(hd * KEY_TILE), values(hd * KEY_TILE), p(QUERY_TILE * KEY_TILE), ds(QUERY_TILE * KEY_TILE);
        std::vector<R> dk(KEY_TILE * hd), dv(KEY_TILE * hd);
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < B * G * tiles; item++) {
            const int64_t p0 = item % tiles * KEY_TILE;
            const int g = item / tiles % G, b = item / tiles / G, n = std::min<int64_t>(KEY_TILE, T - p0);
            transpose_tile(keys.data(), qkv + shape.key(b, p0, g), shape.row(), n, hd);
            transpose_tile(values.data(), qkv + shape.value(b, p0, g), shape.row(), n, hd);
            std::fill(dk.begin(), dk.end(), R(0));
            std::fill(dv.begin(), dv.end(), R(0));
            int64_t end = std::min(T, p0 + n - 1 + shape.window);                   // the last key's last query, + 1
            while (end > p0 + n && shape.first_key(b, end - 1) >= p0 + n) end--;
            for (int head = g * (H / G); head < (g + 1) * (H / G); head++)
                for (int64_t i0 = p0; i0 < end; i0 += QUERY_TILE) {
                    const int rows = std::min<int64_t>(QUERY_TILE, end - i0);
                    attention_gradient_tile(p.data(), ds.data(), qkv, dout, lse, delta, keys.data(), values.data(), shape, b, head, i0, rows, p0, n);
                    tile_product(dv.data(), hd, p.data(), 1, KEY_TILE, dout + shape.output(b, i0, head), (int64_t)H * hd, n, hd, rows);
                    tile_product(dk.data(), hd, ds.data(), 1, KEY_TILE, qkv + shape.query(b, i0, head), shape.row(), n, hd, rows);
                }
            for (int j = 0; j < n; j++) {
                std::copy(&dk[j * hd], &dk[j * hd] + hd, dqkv + shape.key(b, p0 + j, g));
                std::copy(&dv[j * hd], &dv[j * hd] + hd, dqkv + shape.value(b, p0 + j, g));
            }
        }
    }
}

template <class R>
inline void attention_backward_queries(R* dqkv, const R* dout, const AttentionKeys<R>& key_at, const R* lse, const R* delta, int B,
                                       AttentionShape shape) {
    const int H = shape.H, hd = shape.hd;
    const int64_t T = shape.T, tiles = ceil_div(T, QUERY_TILE);
#pragma omp parallel
    {
        std::vector<R> keys(hd * KEY_TILE), values(hd * KEY_TILE), rows_k(KEY_TILE * hd), p(QUERY_TILE * KEY_TILE), ds(QUERY_TILE * KEY_TILE),
            dq(QUERY_TILE * hd);
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < B * H * tiles; item++) {
            const int64_t i0 = item % tiles * QUERY_TILE;
            const int head = item / tiles % H, b = item / tiles / H, g = shape.group(head), rows = std::min<int64_t>(QUERY_TILE, T - i0);
            std::fill(dq.begin(), dq.end(), R(0));
            for (int64_t p0 = shape.first_key(b, i0); p0 < i0 + rows; p0 += KEY_TILE) {
                const int n = std::min<int64_t>(KEY_TILE, i0 + rows - p0);
                for (int j = 0; j < n; j++) {
                    const R *k = key_at(shape, b, p0 + j, g, 0), *v = key_at(shape, b, p0 + j, g, 1);
                    std::copy(k, k + hd, &rows_k[j * hd]);
                    for (int d = 0; d < hd; d++) keys[d * KEY_TILE + j] = k[d], values[d * KEY_TILE + j] = v[d];
                }
                attention_gradient_tile(p.data(), ds.data(), key_at.qkv, dout, lse, delta, keys.data(), values.data(), shape, b, head, i0, rows,
                                        p0, n);
                tile_product(dq.data(), hd, ds.data(), KEY_TILE, 1, rows_k.data(), hd, rows, hd, n);
            }
            for (int r = 0; r < rows; r++) std::copy(&dq[r * hd], &dq[r * hd] + hd, dqkv + shape.query(b, i0 + r, head));
        }
    }
}

// Gradients of this call's queries, keys and values; those of earlier calls, in the ring, are constants. Every element of dqkv is written.
template <class R>
inline void attention_backward(R* dqkv, const R* dout, const R* out, const R* qkv, const R* lse, const std::type_identity_t<R>* ring,
                               int64_t capacity, int64_t position, const int* starts, void* workspace, int B, int64_t T, int H, int G, int hd,
                               int64_t window, const std::type_identity_t<R>* rope, int* /*drawn*/ = nullptr, Stream = {}) {
    const AttentionShape shape = attention_shape(T, H, G, hd, window, ring, capacity, position, starts);
    R* delta = (R*)workspace;
#pragma omp parallel for
    for (int64_t row = 0; row < B * T; row++)
        for (int head = 0; head < H; head++) {
            R sum = 0;
            for (int d = 0; d < hd; d++) sum += dout[(row * H + head) * hd + d] * out[(row * H + head) * hd + d];
            delta[(row / T * H + head) * T + row % T] = sum;
        }
    attention_backward_keys(dqkv, dout, qkv, lse, (const R*)delta, B, shape);
    attention_backward_queries(dqkv, dout, AttentionKeys<R>{qkv, ring, capacity, position}, lse, (const R*)delta, B, shape);
    if (rope) rope_backward(dqkv, rope, B, T, H, G, hd);
}

// Stores the chunk's last min(T, capacity) keys and values in the ring, for the calls that follow.
template <class R>
inline void ring_update(R* ring, const R* qkv, int64_t capacity, int64_t position, int B, int64_t T, int H, int G, int hd, Stream = {}) {
    attention_check(H, G, hd);
    const AttentionShape shape{T, H, G, hd, 0};
    for (int b = 0; b < B; b++)
        for (int64_t t = std::max<int64_t>(0, T - capacity); t < T; t++)
            for (int g = 0; g < G; g++) {
                R* slot = ring + ((b * capacity + (position + t) % capacity) * 2 * G + g) * hd;
                std::copy(qkv + shape.key(b, t, g), qkv + shape.key(b, t, g) + hd, slot);
                std::copy(qkv + shape.value(b, t, g), qkv + shape.value(b, t, g) + hd, slot + (int64_t)G * hd);
            }
}

} // namespace cpu
