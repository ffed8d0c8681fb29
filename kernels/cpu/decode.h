// One token for each of B sequences: the steps of a layer, fused as generation runs them. CPU twin of kernels/decode.cuh, and
// their definition: what forward computes for T = 1, but every sequence stands at a position of its own.
//
//   n     = r xw, xw = x w_norm, r = (mean x^2 + eps)^(-1/2)    of the residual stream x (B,d). Whoever writes x also writes
//           xw and squares (B, d/8 rounded up), the sums of x^2 over 8 columns each; norm = null: nobody reads them
//   mamba   xz = in_proj n; u = silu(conv(halo, x)); x_dbl = x_proj u; dt = dt_proj x_dbl[:R]; h, out = scan step; x += out_proj out
//   attn    qkv = W n; RoPE; the ring takes the new key and value; out = attention over ring and itself; x += proj out
//   mlp     hidden = silu(w1 n) * (w2 n); x += w3 hidden
//   head    logits = W n;  a token is drawn and its embedding is the next x
//
// A sequence's numbers do not depend on the others in the batch.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#include "../device.cuh"
#include "../random.h"
#include "exp.h"
#include "rope.h"
#include "sum.h"

namespace cpu {

template <class R> using Same = std::type_identity_t<R>;

constexpr int DECODE_COLUMNS = 8;          // of a sum of squares

template <class R> std::vector<R> decode_scales(const R* squares, int B, int d, float eps) {
    const int n = (int)ceil_div(d, DECODE_COLUMNS);
    std::vector<R> r(B);
    for (int b = 0; b < B; b++) r[b] = 1 / std::sqrt(sum_over<R>(n, [=](int64_t i) { return squares[(int64_t)b * n + i]; }) / d + (R)eps);
    return r;
}

template <class R> void decode_norm(R* xw /*(B,d)*/, Same<R>* squares, const Same<R>* x /*(B,d)*/, const Same<R>* norm, int B, int d, Stream = {}) {
    const int n = (int)ceil_div(d, DECODE_COLUMNS);
    for (int b = 0; b < B; b++)
        for (int i = 0; i < n; i++) {
            R square = 0;
            for (int64_t j = b * (int64_t)d + i * DECODE_COLUMNS; j < b * (int64_t)d + std::min(d, (i + 1) * DECODE_COLUMNS); j++) {
                xw[j] = x[j] * norm[j - b * (int64_t)d];
                square += x[j] * x[j];
            }
            squares[(int64_t)b * n + i] = square;
        }
}

// Below this many multiply-adds a loop is over before a second thread has begun.
constexpr int64_t DECODE_PARALLEL = 1 << 16;

// store(b, j, value): value = row j of w (N,K) times row b of in (B,K). A row of w is read once, for all sequences.
template <class R, class Store> void decode_rows(const R* in, const R* w, int B, int N, int K, Store store) {
#pragma omp parallel for schedule(static) if ((int64_t)N * K * B > DECODE_PARALLEL)
    for (int j = 0; j < N; j++)
        for (int b = 0; b < B; b++) {
            const R *xb = in + (int64_t)b * K, *wj = w + (int64_t)j * K;
            store(b, j, sum_over<R>(K, [=](int64_t k) { return xb[k] * wj[k]; }));
        }
}

template <class R>
void decode_norm_linear(R* y /*(B,N)*/, const R* xw /*(B,d)*/, const Same<R>* squares, const R* w /*(N,d)*/, int B, int N, int d, float eps,
                        Stream = {}) {
    const std::vector<R> scale = decode_scales<R>(squares, B, d, eps);
    decode_rows<R>(xw, w, B, N, d, [&](int b, int j, R v) { y[(int64_t)b * N + j] = v * scale[b]; });
}
template <class R>
void decode_head(Same<R>* logits /*(B,N)*/, const R* xw, const Same<R>* squares, const R* w, int B, int N, int d, float eps, Stream = {}) {
    decode_norm_linear<R>(logits, xw, squares, w, B, N, d, eps);
}

template <class R>
void decode_residual(Same<R>* x /*(B,N) +=*/, R* xw, Same<R>* squares, const Same<R>* norm, const R* in /*(B,K)*/, const R* w /*(N,K)*/, int B,
                     int N, int K, Stream = {}) {
    decode_rows<R>(in, w, B, N, K, [=](int b, int j, R v) { x[(int64_t)b * N + j] += v; });
    if (norm) decode_norm<R>(xw, squares, x, norm, B, N);
}

template <class R>
void decode_swiglu(R* hidden /*(B,F)*/, const R* xw /*(B,d)*/, const Same<R>* squares, const R* w1 /*(2F,d): w1, then w2*/, int B, int d, int F,
                   float eps, Stream = {}) {
    const std::vector<R> scale = decode_scales<R>(squares, B, d, eps);
#pragma omp parallel for schedule(static) if ((int64_t)F * d * B > DECODE_PARALLEL)
    for (int j = 0; j < F; j++)
        for (int b = 0; b < B; b++) {
            const R *xb = xw + (int64_t)b * d, *gate_row = w1 + (int64_t)j * d, *up_row = w1 + (int64_t)(F + j) * d;
            const R gate = scale[b] * sum_over<R>(d, [=](int64_t k) { return xb[k] * gate_row[k]; });
            const R up = scale[b] * sum_over<R>(d, [=](int64_t k) { return xb[k] * up_row[k]; });
            hidden[(int64_t)b * F + j] = gate * sigmoid(gate) * up;
        }
}

// in_proj, and the convolution's step: the halo (the last 3 inputs of each channel, oldest first) moves on.
template <class R>
void decode_mamba_in(R* u /*(B,e)*/, R* z /*(B,e)*/, R* halo /*(B,3,e)*/, const R* xw /*(B,d)*/, const Same<R>* squares, const R* in_proj /*(2e,d)*/,
                     const Same<R>* conv_w /*(e,4)*/, const Same<R>* conv_b, int B, int d, int e, float eps, Stream = {}) {
    const std::vector<R> scale = decode_scales<R>(squares, B, d, eps);
    decode_rows<R>(xw, in_proj, B, 2 * e, d, [&](int b, int j, R v) {
        v *= scale[b];
        if (j >= e) { z[(int64_t)b * e + j - e] = v; return; }
        R *h0 = halo + (int64_t)b * 3 * e + j, *h1 = h0 + e, *h2 = h1 + e;
        const R* w = conv_w + (int64_t)j * 4;
        const R s = conv_b[j] + w[0] * *h0 + w[1] * *h1 + w[2] * *h2 + w[3] * v;
        *h0 = *h1, *h1 = *h2, *h2 = v;
        u[(int64_t)b * e + j] = s * sigmoid(s);
    });
}

// x_dbl = x_proj u as a sum of `splits` parts (splits,B,N): the CPU needs one
inline int decode_x_splits(int /*N*/, int /*e*/) { return 1; }
template <class R> void decode_x_proj(Same<R>* parts, const R* u /*(B,e)*/, const R* w /*(N,e)*/, int B, int N, int e, Stream = {}) {
    decode_rows<R>(u, w, B, N, e, [=](int b, int j, R v) { parts[(int64_t)b * N + j] = v; });
}

// dt_proj, then one step of the scan (selective_scan.h) with its gate. h (B,e,N) is replaced.
template <class R>
void decode_scan(R* out /*(B,e)*/, Same<R>* h, const Same<R>* parts /*(splits,B,rank+2N)*/, const R* u, const R* z,
                 const R* dt_proj /*(e,rank)*/, const Same<R>* A_log /*(e,N)*/, const Same<R>* D, const Same<R>* dt_bias, int B, int e, int N,
                 int rank, Stream = {}) {
#pragma omp parallel for collapse(2) if ((int64_t)B * e * (rank + 8 * N) > DECODE_PARALLEL)
    for (int b = 0; b < B; b++)
        for (int c = 0; c < e; c++) {
            const R *x_dbl = parts + (int64_t)b * (rank + 2 * N), *Bn = x_dbl + rank, *Cn = Bn + N, *row = dt_proj + (int64_t)c * rank;
            const int64_t i = (int64_t)b * e + c;
            const R dt = softplus(sum_over<R>(rank, [=](int64_t k) { return row[k] * x_dbl[k]; }) + dt_bias[c]), input = dt * u[i];
            R* hi = h + i * N;
            R y = D[c] * u[i];
            for (int n = 0; n < N; n++) {
                hi[n] = fast_exp(-dt * std::exp(A_log[(int64_t)c * N + n])) * hi[n] + input * Bn[n];
                y += hi[n] * Cn[n];
            }
            out[i] = y * z[i] * sigmoid(z[i]);
        }
}

// One query a sequence and head, at position[b]: keys of the ring (B,capacity,2,G,hd), position p in slot p % capacity, and its
// own, which then takes the oldest one's slot. cos_sin (B,hd/2,2), or null for no RoPE.
inline size_t decode_attention_workspace(int, int, int, int) { return 0; }
template <class R>
void decode_attention(R* out /*(B,H hd)*/, R* ring, void* /*workspace*/, const R* qkv /*(B,G,H/G+2,hd)*/, const Same<R>* cos_sin,
                      const int64_t* position, int64_t capacity, int B, int H, int G, int hd, Stream = {}) {
    const int per_group = H / G, half = hd / 2;
    const R scale = 1 / std::sqrt((R)hd);
#pragma omp parallel for collapse(2) if (capacity * H * hd * B > DECODE_PARALLEL)
    for (int b = 0; b < B; b++)
        for (int g = 0; g < G; g++) {
            const int64_t p = position[b], seen = std::min(p, capacity);
            const R* of_group = qkv + ((int64_t)b * G + g) * (per_group + 2) * hd;
            std::vector<R> heads(of_group, of_group + (per_group + 2) * hd), scores(seen + 1);
            for (int head = 0; cos_sin && head <= per_group; head++)                    // queries and the key
                for (int j = 0; j < half; j++) {
                    const R c = cos_sin[((int64_t)b * half + j) * 2], s = cos_sin[((int64_t)b * half + j) * 2 + 1];
                    R &x1 = heads[(size_t)head * hd + j], &x2 = heads[(size_t)head * hd + half + j];
                    const R turned = x1 * c - x2 * s;
                    x2 = x1 * s + x2 * c;
                    x1 = turned;
                }
            const R *own_key = &heads[(size_t)per_group * hd], *own_value = own_key + hd;
            const auto key = [&](int64_t i) { return i == seen ? own_key : ring + (((b * capacity + i) * 2 + 0) * G + g) * hd; };
            const auto value = [&](int64_t i) { return i == seen ? own_value : ring + (((b * capacity + i) * 2 + 1) * G + g) * hd; };
            for (int head = 0; head < per_group; head++) {
                const R* q = &heads[(size_t)head * hd];
                R* o = out + ((int64_t)b * H + g * per_group + head) * hd;
                R top = -std::numeric_limits<R>::infinity(), sum = 0;
                for (int64_t i = 0; i <= seen; i++) {
                    const R* k = key(i);
                    top = std::max(top, scores[i] = scale * sum_over<R>(hd, [=](int64_t j) { return q[j] * k[j]; }));
                }
                std::fill(o, o + hd, R(0));
                for (int64_t i = 0; i <= seen; i++) {
                    const R weight = fast_exp(scores[i] - top), *v = value(i);
                    sum += weight;
                    for (int j = 0; j < hd; j++) o[j] += weight * v[j];
                }
                for (int j = 0; j < hd; j++) o[j] /= sum;
            }
            if (capacity == 0) continue;
            R* slot = ring + ((b * capacity + p % capacity) * 2 * G + g) * hd;
            std::copy(own_key, own_key + hd, slot);
            std::copy(own_value, own_value + hd, slot + (int64_t)G * hd);
        }
}

// What a step begins with: x (B,d), the token's row of the embedding, and cos_sin (B,hd/2,2) of its position (hd = 0: none)
template <class R>
void decode_embed(Same<R>* x, R* xw, Same<R>* squares, Same<R>* cos_sin, const int* tokens, const int64_t* position,
                  const Same<R>* norm /*of the first layer*/, const R* embedding /*(V,d)*/, double rope_base, int B, int d, int hd, Stream = {}) {
    for (int b = 0; b < B; b++) {
        for (int i = 0; i < d; i++) x[(int64_t)b * d + i] = embedding[(int64_t)tokens[b] * d + i];
        if (hd > 0) rope_table<R>(cos_sin + (int64_t)b * hd, position[b], 1, hd, rope_base);
    }
    decode_norm<R>(xw, squares, x, norm, B, d);
}

// A token from the logits (V): those of tokens seen before are penalised; weights are floor(2^40 e^((l - max)/temperature)); kept are
// the top_k greatest, of those the greatest that reach top_p of their sum (ties: the lower index first); the draw goes over the
// kept ones in the order of their indices. -1 where no logit is a number.
template <class R> int sample_token(const R* logits, const uint8_t* seen /*(V) or null*/, int V, const SampleOptions& o, double uniform) {
    std::vector<float> l(V);
    int best = -1;
    for (int i = 0; i < V; i++) {
        const float x = (float)logits[i];
        l[i] = seen && seen[i] ? (x > 0 ? x / o.penalty : x * o.penalty) : x;
        if (std::isnan(l[i])) l[i] = -std::numeric_limits<float>::infinity();
        if (l[i] > -std::numeric_limits<float>::infinity() && (best < 0 || l[i] > l[best])) best = i;
    }
    if (best < 0 || o.temperature <= 0) return best;
    const float scale = 1.44269504f / o.temperature;
    std::vector<uint64_t> mass(V);
    for (int i = 0; i < V; i++) mass[i] = (uint64_t)(std::exp2((l[i] - l[best]) * scale) * (float)SAMPLE_MASS);
    std::vector<int> order(V);
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int a, int b) { return l[a] != l[b] ? l[a] > l[b] : a < b; });
    const int k = o.top_k > 0 ? std::min(o.top_k, V) : V;
    uint64_t total = 0, kept = 0;
    for (int i = 0; i < k; i++) total += mass[order[i]];
    const uint64_t target = o.top_p < 1 ? std::clamp<uint64_t>((uint64_t)std::ceil((double)o.top_p * (double)total), 1, total) : total;
    int count = 0;
    while (count < k && kept < target) kept += mass[order[count++]];
    std::sort(order.begin(), order.begin() + count);
    uint64_t left = std::min((uint64_t)(uniform * (double)kept), kept - 1);
    for (int i = 0; i < count; i++) {
        if (left < mass[order[i]]) return order[i];
        left -= mass[order[i]];
    }
    return best;
}

// Draws a token for each sequence; it stands in `tokens` and in slot drawn % EMIT_SLOTS of `emitted`, its embedding is the next x. Sequence b's
// i-th draw uses element i of stream keys[b]. Counts position and drawn up.
template <class R>
void decode_sample(int* tokens /*(B)*/, int* emitted /*(EMIT_SLOTS,B), host memory*/, int64_t* position, int64_t* drawn, uint8_t* seen /*(B,V)*/,
                   Same<R>* x, R* xw, Same<R>* squares, Same<R>* cos_sin, const Same<R>* logits /*(B,V)*/, const uint64_t* keys,
                   const Same<R>* norm, const R* embedding, double rope_base, SampleOptions options, int B,
                   int V /*of which the first `choices` may be drawn*/, int choices, int d, int hd, Stream = {}) {
    for (int b = 0; b < B; b++) {
        const int id = sample_token(logits + (int64_t)b * V, seen + (int64_t)b * V, choices, options, counter_uniform(keys[b], (uint64_t)drawn[b]));
        emitted[drawn[b] % EMIT_SLOTS * B + b] = id;
        tokens[b] = std::max(id, 0);
        seen[(int64_t)b * V + tokens[b]] = 1;
        position[b]++;
        drawn[b]++;
    }
    decode_embed<R>(x, xw, squares, cos_sin, tokens, position, norm, embedding, rope_base, B, d, hd);
}

} // namespace cpu
