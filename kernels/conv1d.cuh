// Depthwise causal convolution of width 4, then SiLU. For every channel:
//   s_t = b + sum_k w_k x_(t-3+k)       u_t = silu(s_t) = s_t sigma(s_t)       x_(-3..-1): halo_in, or zero
//   ds_t = du_t sigma(s_t) (1 + s_t (1 - sigma(s_t)))
//   dx_t = sum_k w_k ds_(t+3-k), terms past T-1 left out        dw_k = sum_t ds_t x_(t-3+k)        db = sum_t ds_t
// x, u (B,T,e) of X, x in wider rows; w (e,4), b (e) and all arithmetic fp32. Nothing is saved: the backward pass makes s again from x.
//
// A thread is 4 neighbouring channels and walks down 16 rows (backward 64), 4 at a time, with the 3 rows before them in registers.
// No shared memory: the 3 rows that two threads need come from L1 or L2. The general path is one channel a thread. dw, db: every 64
// rows give a part, a second kernel adds the parts in order.
// Bytes per (t,c), bf16: forward 4, floor 0.134 ms at 32768 x 3072 and 3 TB/s (H100), 0.096 at 4.2 (H200); backward 6, 0.201 and
// 0.144 ms. 8 and 30 flops. Measured on an H200: the forward's loop alone 0.154 ms, backward 0.238 (dev/results).
#pragma once
#include "device.cuh"
#include "measure.cuh"
#include "scan_common.cuh"

namespace gpu {

constexpr int CONV_WIDTH = 4, CONV_HALO = 3;
constexpr int CONV_ROWS = 16;            // rows a thread, forward
constexpr int CONV_BACKWARD_ROWS = 64;   // rows a thread, backward: as many rows a partial sum
constexpr int CONV_THREADS = 128;

template <class X> struct ConvInput {
    const X *x, *halo;                   // halo (B,3,e), or null for zeros
    int64_t ldx;
    const float *w, *b;
    int64_t T;
    int e;
};


// W floats from W elements of X, 16 bytes at a time
template <int W, class X> __device__ inline void conv_load(float (&to)[W], const X* from) {
    constexpr int STEP = W * sizeof(X) > 16 ? 16 / (int)sizeof(X) : W;
#pragma unroll
    for (int i = 0; i < W; i += STEP) {
        const auto v = load_vec<STEP>(from + i);
#pragma unroll
        for (int k = 0; k < STEP; k++) to[i + k] = to_float(v[k]);
    }
}
template <int W, class X> __device__ inline void conv_store(X* to, const float (&from)[W]) {
    constexpr int STEP = W * sizeof(X) > 16 ? 16 / (int)sizeof(X) : W;
#pragma unroll
    for (int i = 0; i < W; i += STEP) {
        Vec<X, STEP> v;
#pragma unroll
        for (int k = 0; k < STEP; k++) v[k] = from_float<X>(from[i + k]);
        store_vec(to + i, v);
    }
}
template <int W> __device__ inline void conv_clear(float (&x)[W]) {
#pragma unroll
    for (int k = 0; k < W; k++) x[k] = 0.f;
}
// Row t >= -3 of a sequence, zeros from T on
template <int W, class X> __device__ inline void conv_load_row(float (&to)[W], const ConvInput<X>& p, int64_t sequence, int64_t t, int c) {
    if (t >= p.T || (t < 0 && !p.halo)) conv_clear(to);
    else conv_load<W>(to, t < 0 ? p.halo + (sequence * CONV_HALO + t + CONV_HALO) * p.e + c : p.x + (sequence * p.T + t) * p.ldx + c);
}
template <int W, class X> __device__ inline void conv_load_weights(float (&w)[CONV_WIDTH][W], float (&b)[W], const ConvInput<X>& p, int c) {
    conv_load<W>(b, p.b + c);
#pragma unroll
    for (int j = 0; j < W; j++)
#pragma unroll
        for (int k = 0; k < CONV_WIDTH; k++) w[k][j] = p.w[(int64_t)(c + j) * CONV_WIDTH + k];
}
// Rows t .. t+3 to x[3..6] after the 3 rows before them, which were there last, moved to x[0..2]
template <int W, class X> __device__ inline void conv_next_rows(float (&x)[7][W], const ConvInput<X>& p, int64_t sequence, int64_t t, int c) {
#pragma unroll
    for (int i = 0; i < CONV_HALO; i++)
#pragma unroll
        for (int j = 0; j < W; j++) x[i][j] = x[i + 4][j];
#pragma unroll
    for (int i = 0; i < 4; i++) conv_load_row<W>(x[CONV_HALO + i], p, sequence, t + i, c);
}

// Row t >= -3 of a sequence as it is stored, zeros from T on
template <int W, class X> __device__ inline Vec<X, W> conv_row(const ConvInput<X>& p, int64_t sequence, int64_t t, int c) {
    Vec<X, W> zero;
#pragma unroll
    for (int k = 0; k < W; k++) zero[k] = from_float<X>(0.f);
    if (t >= p.T || (t < 0 && !p.halo)) return zero;
    return load_vec<W>(t < 0 ? p.halo + (sequence * CONV_HALO + t + CONV_HALO) * p.e + c : p.x + (sequence * p.T + t) * p.ldx + c);
}

// Four rows of W channels from the three before them, which move on
template <int W, class X> __device__ inline void conv_four_rows(X* to, int64_t e, const Vec<X, W> (&now)[4], float (&x)[CONV_HALO][W], const float (&w)[CONV_WIDTH][W],
                                                                const float (&b)[W], int64_t rows) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        Vec<X, W> y;
#pragma unroll
        for (int j = 0; j < W; j++) {
            const float here = to_float(now[i][j]);
            const float s = fmaf(w[3][j], here, fmaf(w[2][j], x[2][j], fmaf(w[1][j], x[1][j], fmaf(w[0][j], x[0][j], b[j]))));
            y[j] = from_float<X>(s * scan_sigmoid<X>(s));
            x[0][j] = x[1][j], x[1][j] = x[2][j], x[2][j] = here;
        }
        if (i < rows) store_vec(to + i * e, y);
    }
}

// Grid (channels / W over the threads of a block, rows / CONV_ROWS, B). The next four rows are on their way while four are
// worked on: few registers and many loads in flight (H200: 0.154 ms, against 0.247 with 8 channels a thread and none ahead).
template <int W, class X>
__global__ void __launch_bounds__(CONV_THREADS, 5) conv1d_forward_kernel(X* u, ConvInput<X> p) {
    const int c = (blockIdx.x * CONV_THREADS + threadIdx.x) * W;
    const int64_t sequence = blockIdx.z;
    if (c >= p.e) return;
    float w[CONV_WIDTH][W], b[W], x[CONV_HALO][W];
    conv_load_weights(w, b, p, c);
    for (int64_t first = (int64_t)blockIdx.y * CONV_ROWS; first < p.T; first += (int64_t)gridDim.y * CONV_ROWS) {
        Vec<X, W> now[4], next[4];
#pragma unroll
        for (int i = 0; i < 4; i++) next[i] = conv_row<W>(p, sequence, first + i, c);
#pragma unroll
        for (int i = 0; i < CONV_HALO; i++) conv_load_row<W>(x[i], p, sequence, first - CONV_HALO + i, c);
#pragma unroll 1
        for (int64_t t = first; t < first + CONV_ROWS && t < p.T; t += 4) {
#pragma unroll
            for (int i = 0; i < 4; i++) now[i] = next[i];
            if (t + 4 < first + CONV_ROWS)
#pragma unroll
                for (int i = 0; i < 4; i++) next[i] = conv_row<W>(p, sequence, t + 4 + i, c);
            conv_four_rows<W>(u + (sequence * p.T + t) * p.e + c, p.e, now, x, w, b, p.T - t);
        }
    }
}

template <int THREADS, class X>
__global__ void __launch_bounds__(THREADS) conv1d_halo_kernel(X* halo_out, ConvInput<X> p, int64_t B) {
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x, sequence = i / p.e;
    const int c = (int)(i % p.e);
    if (sequence >= B) return;
    float x[CONV_HALO][1];
#pragma unroll
    for (int k = 0; k < CONV_HALO; k++) conv_load_row<1>(x[k], p, sequence, p.T - CONV_HALO + k, c);
#pragma unroll
    for (int k = 0; k < CONV_HALO; k++) halo_out[(sequence * CONV_HALO + k) * p.e + c] = from_float<X>(x[k][0]);
}

// dx, and the block's part of dw and db: part (B, row blocks, 5, e). The thread computes ds for its rows and the 3 after them, and
// a row's dx when the third row after it is known. Grid (channels / W over threads, row blocks, B).
template <int W, class X>
__global__ void __launch_bounds__(CONV_THREADS) conv1d_backward_kernel(X* dx, int64_t lddx, float* part, const X* du, ConvInput<X> p) {
    const int c = (blockIdx.x * CONV_THREADS + threadIdx.x) * W;
    const int64_t sequence = blockIdx.z, first = (int64_t)blockIdx.y * CONV_BACKWARD_ROWS;
    if (c >= p.e) return;
    float w[CONV_WIDTH][W], b[W], dw[CONV_WIDTH][W] = {}, db[W] = {};
    conv_load_weights(w, b, p, c);
    float x[7][W], ds[CONV_WIDTH][W];                  // ds of row t: ds[(t - first) % 4]
#pragma unroll
    for (int i = 0; i < CONV_HALO; i++) conv_load_row<W>(x[4 + i], p, sequence, first - CONV_HALO + i, c);
    for (int i4 = 0; i4 <= CONV_BACKWARD_ROWS; i4 += 4) {
        if (first + i4 - CONV_HALO >= p.T) break;
        float g[4][W];
        conv_next_rows<W>(x, p, sequence, first + i4, c);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (first + i4 + i < p.T) conv_load<W>(g[i], du + (sequence * p.T + first + i4 + i) * p.e + c);
            else conv_clear(g[i]);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int j = 0; j < W; j++) {
                float s = b[j];
#pragma unroll
                for (int k = 0; k < CONV_WIDTH; k++) s = fmaf(w[k][j], x[i + k][j], s);
                const float gate = scan_sigmoid<X>(s);
                ds[i][j] = g[i][j] * gate * (1.f + s * (1.f - gate));
            }
            if (i4 < CONV_BACKWARD_ROWS) {             // otherwise the rows after the block's
#pragma unroll
                for (int j = 0; j < W; j++) {
                    db[j] += ds[i][j];
#pragma unroll
                    for (int k = 0; k < CONV_WIDTH; k++) dw[k][j] = fmaf(ds[i][j], x[i + k][j], dw[k][j]);
                }
            }
            const int64_t done = first + i4 + i - CONV_HALO;          // its last term is ds of this row
            if (done >= first && done < first + CONV_BACKWARD_ROWS && done < p.T) {
                float y[W];
#pragma unroll
                for (int j = 0; j < W; j++) {
                    y[j] = 0.f;
#pragma unroll
                    for (int k = 0; k < CONV_WIDTH; k++) y[j] = fmaf(w[k][j], ds[(i - k + 4) % 4][j], y[j]);
                }
                conv_store<W>(dx + (sequence * p.T + done) * lddx + c, y);
            }
        }
    }
    float* to = part + (sequence * gridDim.y + blockIdx.y) * (CONV_WIDTH + 1) * p.e + c;
#pragma unroll
    for (int k = 0; k < CONV_WIDTH; k++) conv_store<W>(to + (int64_t)k * p.e, dw[k]);
    conv_store<W>(to + (int64_t)CONV_WIDTH * p.e, db);
}

// dw, db += sum of the parts. Grid (channels / 32, 5): 32 warps take the parts in turn, the warps' sums are added in order.
template <int WARPS>
__global__ void conv1d_add_parts_kernel(float* dw, float* db, const float* part, int64_t parts, int e) {
    __shared__ float sums[WARPS][WARP];
    const int c = blockIdx.x * WARP + threadIdx.x, k = blockIdx.y;
    float sum = 0.f;
    if (c < e)
        for (int64_t i = threadIdx.y; i < parts; i += WARPS) sum += part[(i * (CONV_WIDTH + 1) + k) * e + c];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y != 0 || c >= e) return;
    float total = 0.f;
    for (int i = 0; i < WARPS; i++) total += sums[i][threadIdx.x];
    if (k < CONV_WIDTH) dw[(int64_t)c * CONV_WIDTH + k] += total;
    else db[c] += total;
}

inline bool conv_aligned(const void* p) { return (uintptr_t)p % 16 == 0; }
inline dim3 conv_grid(int W, int e, int64_t row_blocks, int B) { return dim3((unsigned)ceil_div(e, (int64_t)W * CONV_THREADS), (unsigned)row_blocks, (unsigned)B); }

inline void conv1d_forward(floatX* u /*(B,T,e)*/, floatX* halo_out /*(B,3,e) or null; may be halo_in*/, const floatX* x /*(B,T,e), row stride ldx*/, int64_t ldx,
                           const floatX* halo_in /*(B,3,e) or null*/, const float* w /*(e,4)*/, const float* b /*(e)*/, int B, int64_t T, int e, Stream stream) {
    const Operation op("conv1d forward", 2.0 * B * T * e * sizeof(floatX), 0, stream);
    const ConvInput<floatX> p{x, halo_in, ldx, w, b, T, e};
    int64_t row_blocks = ceil_div(T, CONV_ROWS);
    if (row_blocks > 65535) row_blocks = 65535;        // of a grid's second dimension; the blocks then take several turns
    if (e % 4 == 0 && ldx % 4 == 0 && conv_aligned(u) && conv_aligned(x) && conv_aligned(halo_in) && conv_aligned(b))
        conv1d_forward_kernel<4><<<conv_grid(4, e, row_blocks, B), CONV_THREADS, 0, stream>>>(u, p);
    else
        conv1d_forward_kernel<1><<<conv_grid(1, e, row_blocks, B), CONV_THREADS, 0, stream>>>(u, p);
    LAUNCH_CHECK();
    if (!halo_out) return;
    conv1d_halo_kernel<256><<<(unsigned)ceil_div((int64_t)B * e, 256), 256, 0, stream>>>(halo_out, p, (int64_t)B);
    LAUNCH_CHECK();
}

inline size_t conv1d_backward_workspace(int B, int64_t T, int e) { return (size_t)B * ceil_div(T, CONV_BACKWARD_ROWS) * (CONV_WIDTH + 1) * e * sizeof(float); }

inline void conv1d_backward(floatX* dx /*(B,T,e), row stride lddx*/, int64_t lddx, float* dw /*(e,4) +=*/, float* db /*(e) +=*/, const floatX* du /*(B,T,e)*/,
                            const floatX* x /*(B,T,e), row stride ldx*/, int64_t ldx, const floatX* halo_in /*(B,3,e) or null*/, const float* w, const float* b,
                            void* workspace, int B, int64_t T, int e, Stream stream) {
    const Operation op("conv1d backward", 3.0 * B * T * e * sizeof(floatX), 0, stream);
    const ConvInput<floatX> p{x, halo_in, ldx, w, b, T, e};
    float* part = (float*)workspace;
    const int64_t row_blocks = ceil_div(T, CONV_BACKWARD_ROWS);
    if (row_blocks > 65535) fail("conv1d_backward: T is %lld; at most %lld", (long long)T, (long long)65535 * CONV_BACKWARD_ROWS);
    if (e % 4 == 0 && ldx % 4 == 0 && lddx % 4 == 0 && conv_aligned(dx) && conv_aligned(du) && conv_aligned(x) && conv_aligned(halo_in) && conv_aligned(b) && conv_aligned(part))
        conv1d_backward_kernel<4><<<conv_grid(4, e, row_blocks, B), CONV_THREADS, 0, stream>>>(dx, lddx, part, du, p);
    else
        conv1d_backward_kernel<1><<<conv_grid(1, e, row_blocks, B), CONV_THREADS, 0, stream>>>(dx, lddx, part, du, p);
    LAUNCH_CHECK();
    conv1d_add_parts_kernel<32><<<dim3((unsigned)ceil_div(e, WARP), CONV_WIDTH + 1), dim3(WARP, 32), 0, stream>>>(dw, db, part, B * row_blocks, e);
    LAUNCH_CHECK();
}

} // namespace gpu
