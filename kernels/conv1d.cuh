// Depthwise causal convolution of width 4, then SiLU. For every channel:
//   s_t = b + sum_k w_k x_(t-3+k)       u_t = silu(s_t) = s_t sigma(s_t)       x_(-3..-1): halo_in, or zero
//   ds_t = du_t sigma(s_t) (1 + s_t (1 - sigma(s_t)))
//   dx_t = sum_k w_k ds_(t+3-k), terms past T-1 left out        dw_k = sum_t ds_t x_(t-3+k)        db = sum_t ds_t
// x, u (B,T,e) of X, x in wider rows; w (e,4), b (e) and all arithmetic fp32. Nothing is saved: the backward pass makes s again from x.
//
// A thread is W neighbouring channels and walks down its rows, four at a time, with the three rows before them in registers. The rows that come
// next are on their way to shared memory, to words that only this thread reads: many bytes in flight, no registers for them and no barrier.
// There are as many blocks as the GPU holds at once, each with an equal share of the rows, so no wave of blocks is a part of one. The general
// path is one channel a thread, for widths and addresses that copies of 8 or 16 bytes do not fit.
// dw, db: every block gives a part, a second kernel adds the parts in order.
// Bytes per (t,c), bf16: forward 4, floor 0.134 ms at 32768 x 3072 and 3.0 TB/s (H100), 0.095 at 4.24 (H200); backward 6, 0.201 and
// 0.143 ms. 8 and 30 flops. Measured on an H200: 0.115 and 0.173 ms (dev/results).
#pragma once
#include "device.cuh"
#include "measure.cuh"
#include "scan/common.cuh"

namespace gpu {

constexpr int CONV_WIDTH = 4, CONV_HALO = 3;
constexpr int CONV_THREADS = 128;
constexpr int CONV_GROUPS = 6;           // of four rows on their way to a thread, and the four in hand
constexpr int CONV_LEAST_ROWS = 16, CONV_LEAST_ROWS_BACKWARD = 64;   // a block

template <class X> struct ConvInput {
    const X *x, *halo;                   // halo (B,3,e), or null for zeros
    int64_t ldx;
    const float *w, *b;
    int64_t T;
    int e, rows;                         // rows: of a block
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
template <int W, class X> __device__ inline Vec<X, W> conv_round(const float (&from)[W]) {
    Vec<X, W> v;
#pragma unroll
    for (int k = 0; k < W; k++) v[k] = from_float<X>(from[k]);
    return v;
}
// Stores what is not read again soon: L2 may drop it first
template <int W, class X> __device__ inline void conv_store_last(X* to, const Vec<X, W>& v) {
    if constexpr (sizeof(v) == 16) __stcs((uint4*)to, *(const uint4*)&v);
    else if constexpr (sizeof(v) == 8) __stcs((uint2*)to, *(const uint2*)&v);
    else store_vec(to, v);
}
// Row t of a sequence, -3 <= t < T
template <int W, class X> __device__ inline void conv_load_row(float (&to)[W], const ConvInput<X>& p, int64_t sequence, int64_t t, int c) {
#pragma unroll
    for (int k = 0; k < W; k++) to[k] = 0.f;
    if (t >= 0) conv_load<W>(to, p.x + (sequence * p.T + t) * p.ldx + c);
    else if (p.halo) conv_load<W>(to, p.halo + (sequence * CONV_HALO + t + CONV_HALO) * p.e + c);
}
template <int W, class X> __device__ inline void conv_load_weights(float (&w)[CONV_WIDTH][W], float (&b)[W], const ConvInput<X>& p, int c) {
    conv_load<W>(b, p.b + c);
#pragma unroll
    for (int j = 0; j < W; j++)
#pragma unroll
        for (int k = 0; k < CONV_WIDTH; k++) w[k][j] = p.w[(int64_t)(c + j) * CONV_WIDTH + k];
}

// Rows of an array on their way to a thread, four at a time. Groups are asked for in order, and taken in order CONV_GROUPS - 1 later.
template <int W, class X> struct ConvQueue {
    using Row = Vec<X, W>;
    static constexpr size_t BYTES = CONV_GROUPS * 4 * CONV_THREADS * sizeof(Row);
    Row (*rows)[CONV_THREADS];           // (4 CONV_GROUPS, CONV_THREADS)
    const X* from;                       // the row that is asked for next
    int64_t ld;
    __device__ void ask(int group, int count) {        // rows from `count` on are zeros
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const bool live = group * 4 + k < count;
            Row& to = rows[group % CONV_GROUPS * 4 + k][threadIdx.x];
            if constexpr (sizeof(Row) >= 4) copy_async<sizeof(Row)>(&to, from + k * ld, live);
            else to[0] = live ? from[k * ld] : from_float<X>(0.f);
        }
        from += 4 * ld;
    }
    __device__ Row take(int group, int k) const { return rows[group % CONV_GROUPS * 4 + k][threadIdx.x]; }
};

// Four rows of W channels from the three before them, which move on
template <int W, class X>
__device__ inline void conv_four_rows(X* to, int64_t e, const Vec<X, W> (&now)[4], float (&x)[CONV_HALO][W], const float (&w)[CONV_WIDTH][W],
                                      const float (&b)[W], int rows) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float y[W];
#pragma unroll
        for (int j = 0; j < W; j++) {
            const float here = to_float(now[i][j]);
            const float s = fmaf(w[3][j], here, fmaf(w[2][j], x[2][j], fmaf(w[1][j], x[1][j], fmaf(w[0][j], x[0][j], b[j]))));
            y[j] = s * sigmoid<X>(s);
            x[0][j] = x[1][j], x[1][j] = x[2][j], x[2][j] = here;
        }
        if (i < rows) conv_store_last(to + i * e, conv_round<W, X>(y));
    }
}

// Grid (channels / W over the threads of a block, T / rows, B)
template <int W, class X> __global__ void __launch_bounds__(CONV_THREADS, 4) conv1d_forward_kernel(X* u, ConvInput<X> p) {
    extern __shared__ uint4 conv_shared[];
    const int c = (blockIdx.x * CONV_THREADS + threadIdx.x) * W;
    const int64_t sequence = blockIdx.z, first = (int64_t)blockIdx.y * p.rows, at = sequence * p.T + first;
    if (c >= p.e) return;
    const int count = (int)min((int64_t)p.rows, p.T - first);
    ConvQueue<W, X> queue{(Vec<X, W>(*)[CONV_THREADS])conv_shared, p.x + at * p.ldx + c, p.ldx};
    for (int i = 0; i < CONV_GROUPS - 1; i++) queue.ask(i, count), copy_async_commit();
    float w[CONV_WIDTH][W], b[W], x[CONV_HALO][W];
    conv_load_weights(w, b, p, c);
#pragma unroll
    for (int i = 0; i < CONV_HALO; i++) conv_load_row<W>(x[i], p, sequence, first - CONV_HALO + i, c);
    X* to = u + at * p.e + c;
    for (int i = 0; 4 * i < count; i++, to += 4 * (int64_t)p.e) {
        copy_async_wait<CONV_GROUPS - 2>();
        Vec<X, W> now[4];
#pragma unroll
        for (int k = 0; k < 4; k++) now[k] = queue.take(i, k);
        queue.ask(i + CONV_GROUPS - 1, count), copy_async_commit();
        conv_four_rows<W>(to, p.e, now, x, w, b, count - 4 * i);
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

// What a thread of the backward pass has of W channels
template <int W, class X> struct ConvBack {
    float w[CONV_WIDTH][W], b[W], dw[CONV_WIDTH][W] = {}, db[W] = {};
    float x[CONV_HALO + 4][W];                         // the three rows before four rows, and these
    float ds[4][W];                                    // of the last four rows: row t in ds[t % 4], counted from the block's first
    // ds of row i of the four; `sum`: it is one of the block's, so it counts for dw and db
    __device__ void row(int i, const Vec<X, W>& du, bool sum) {
#pragma unroll
        for (int j = 0; j < W; j++) {
            float s = b[j];
#pragma unroll
            for (int k = 0; k < CONV_WIDTH; k++) s = fmaf(w[k][j], x[i + k][j], s);
            const float gate = sigmoid<X>(s);
            ds[i][j] = to_float(du[j]) * gate * (1.f + s * (1.f - gate));
        }
        if (!sum) return;
#pragma unroll
        for (int j = 0; j < W; j++) {
            db[j] += ds[i][j];
#pragma unroll
            for (int k = 0; k < CONV_WIDTH; k++) dw[k][j] = fmaf(ds[i][j], x[i + k][j], dw[k][j]);
        }
    }
    // dx of the row three before row i of the four, whose last term is ds of row i
    __device__ Vec<X, W> dx(int i) const {
        float y[W] = {};
#pragma unroll
        for (int j = 0; j < W; j++)
#pragma unroll
            for (int k = 0; k < CONV_WIDTH; k++) y[j] = fmaf(w[k][j], ds[(i - k + 4) % 4][j], y[j]);
        return conv_round<W, X>(y);
    }
};

// dx, and the block's part of dw and db: part (B, row blocks, 5, e). The thread goes on for three rows after its block's. Grid as forward.
template <int W, class X>
__global__ void __launch_bounds__(CONV_THREADS, 4) conv1d_backward_kernel(X* dx, int64_t lddx, float* part, const X* du, ConvInput<X> p) {
    extern __shared__ uint4 conv_shared[];
    using Queue = ConvQueue<W, X>;
    const int c = (blockIdx.x * CONV_THREADS + threadIdx.x) * W;
    const int64_t sequence = blockIdx.z, first = (int64_t)blockIdx.y * p.rows, at = sequence * p.T + first;
    if (c >= p.e) return;
    const int count = (int)min((int64_t)p.rows, p.T - first), past = (int)min((int64_t)p.rows + CONV_HALO, p.T - first);
    Queue xs{(Vec<X, W>(*)[CONV_THREADS])conv_shared, p.x + at * p.ldx + c, p.ldx};
    Queue dus{(Vec<X, W>(*)[CONV_THREADS])((char*)conv_shared + Queue::BYTES), du + at * p.e + c, p.e};
    for (int i = 0; i < CONV_GROUPS - 1; i++) xs.ask(i, past), dus.ask(i, past), copy_async_commit();
    ConvBack<W, X> back;
    conv_load_weights(back.w, back.b, p, c);
#pragma unroll
    for (int i = 0; i < CONV_HALO; i++) conv_load_row<W>(back.x[4 + i], p, sequence, first - CONV_HALO + i, c);
    X* to = dx + (at - CONV_HALO) * lddx + c;
    for (int i = 0; 4 * i < count + CONV_HALO; i++, to += 4 * lddx) {
        copy_async_wait<CONV_GROUPS - 2>();
        Vec<X, W> g[4];
#pragma unroll
        for (int k = 0; k < CONV_HALO; k++)
#pragma unroll
            for (int j = 0; j < W; j++) back.x[k][j] = back.x[k + 4][j];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const Vec<X, W> v = xs.take(i, k);
            g[k] = dus.take(i, k);
#pragma unroll
            for (int j = 0; j < W; j++) back.x[CONV_HALO + k][j] = to_float(v[j]);
        }
        xs.ask(i + CONV_GROUPS - 1, past), dus.ask(i + CONV_GROUPS - 1, past), copy_async_commit();
#pragma unroll
        for (int k = 0; k < 4; k++) {
            back.row(k, g[k], 4 * i < p.rows);         // rows past the sequence's end have du = 0
            const int done = 4 * i + k - CONV_HALO;
            if (done >= 0 && done < count) conv_store_last(to + k * lddx, back.dx(k));
        }
    }
    float* sums = part + (sequence * gridDim.y + blockIdx.y) * (CONV_WIDTH + 1) * p.e + c;
#pragma unroll
    for (int k = 0; k < CONV_WIDTH; k++) store_vec(sums + (int64_t)k * p.e, conv_round<W, float>(back.dw[k]));
    store_vec(sums + (int64_t)CONV_WIDTH * p.e, conv_round<W, float>(back.db));
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

inline bool conv_vectors(std::initializer_list<const void*> pointers, std::initializer_list<int64_t> sizes, int W) {
    for (const void* p : pointers)
        if ((uintptr_t)p % 16) return false;
    for (int64_t n : sizes)
        if (n % W) return false;
    return true;
}

// The grid, and the rows of a block: so many that all blocks are on the GPU at once, if they have no less than `least`. A multiple of four.
template <class Kernel> dim3 conv_grid(int& rows, Kernel kernel, size_t shared, int W, int B, int64_t T, int e, int least) {
    int resident = 1;
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, CONV_THREADS, shared));
    const int64_t columns = ceil_div(e, (int64_t)W * CONV_THREADS), places = (int64_t)multiprocessors() * resident / (columns * B);
    const int64_t share = round_up(ceil_div(T, places > 1 ? places : 1), 4);
    rows = (int)(share < least ? least : share > 1 << 20 ? 1 << 20 : share);
    return dim3((unsigned)columns, (unsigned)ceil_div(T, rows), (unsigned)B);
}

// The last three rows of each sequence and its halo, which the next chunk starts from
inline void conv1d_halo(floatX* halo_out /*(B,3,e) or null; may be halo_in*/, const floatX* x /*(B,T,e), row stride ldx*/, int64_t ldx,
                        const floatX* halo_in /*(B,3,e) or null*/, int B, int64_t T, int e, Stream stream) {
    if (!halo_out) return;
    const ConvInput<floatX> p{x, halo_in, ldx, nullptr, nullptr, T, e, 0};
    conv1d_halo_kernel<256><<<(unsigned)ceil_div((int64_t)B * e, 256), 256, 0, stream>>>(halo_out, p, (int64_t)B);
    LAUNCH_CHECK();
}

inline void conv1d_forward(floatX* u /*(B,T,e)*/, floatX* halo_out /*(B,3,e) or null; may be halo_in*/,
                           const floatX* x /*(B,T,e), row stride ldx*/, int64_t ldx, const floatX* halo_in /*(B,3,e) or null*/,
                           const float* w /*(e,4)*/, const float* b /*(e)*/, int B, int64_t T, int e, Stream stream) {
    const Operation op("conv1d forward", 2.0 * B * T * e * sizeof(floatX), 0, stream);
    ConvInput<floatX> p{x, halo_in, ldx, w, b, T, e, 0};
    constexpr int W = 16 / sizeof(floatX);
    auto launch = [&](auto kernel, int width, size_t shared) {
        const dim3 grid = conv_grid(p.rows, kernel, shared, width, B, T, e, CONV_LEAST_ROWS);
        kernel<<<grid, CONV_THREADS, shared, stream>>>(u, p);
        LAUNCH_CHECK();
    };
    if (conv_vectors({u, x, halo_in, b}, {e, ldx}, W)) launch(conv1d_forward_kernel<W, floatX>, W, ConvQueue<W, floatX>::BYTES);
    else launch(conv1d_forward_kernel<1, floatX>, 1, ConvQueue<1, floatX>::BYTES);
    conv1d_halo(halo_out, x, ldx, halo_in, B, T, e, stream);
}

inline size_t conv1d_backward_workspace(int B, int64_t T, int e) {
    return (size_t)B * ceil_div(T, CONV_LEAST_ROWS_BACKWARD) * (CONV_WIDTH + 1) * e * sizeof(float);
}

inline void conv1d_backward(floatX* dx /*(B,T,e), row stride lddx*/, int64_t lddx, float* dw /*(e,4) +=*/, float* db /*(e) +=*/,
                            const floatX* du /*(B,T,e)*/, const floatX* x /*(B,T,e), row stride ldx*/, int64_t ldx,
                            const floatX* halo_in /*(B,3,e) or null*/, const float* w, const float* b, void* workspace, int B, int64_t T, int e,
                            Stream stream) {
    const Operation op("conv1d backward", 3.0 * B * T * e * sizeof(floatX), 0, stream);
    ConvInput<floatX> p{x, halo_in, ldx, w, b, T, e, 0};
    float* part = (float*)workspace;
    int64_t parts = 0;
    auto launch = [&](auto kernel, int width, size_t shared) {
        const dim3 grid = conv_grid(p.rows, kernel, shared, width, B, T, e, CONV_LEAST_ROWS_BACKWARD);
        kernel<<<grid, CONV_THREADS, shared, stream>>>(dx, lddx, part, du, p);
        LAUNCH_CHECK();
        parts = (int64_t)B * grid.y;
    };
    if (conv_vectors({dx, du, x, halo_in, b, part}, {e, ldx, lddx}, 4)) launch(conv1d_backward_kernel<4, floatX>, 4, 2 * ConvQueue<4, floatX>::BYTES);
    else launch(conv1d_backward_kernel<1, floatX>, 1, 2 * ConvQueue<1, floatX>::BYTES);
    conv1d_add_parts_kernel<32><<<dim3((unsigned)ceil_div(e, WARP), CONV_WIDTH + 1), dim3(WARP, 32), 0, stream>>>(dw, db, part, parts, e);
    LAUNCH_CHECK();
}

} // namespace gpu
