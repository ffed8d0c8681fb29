// RMSNorm over rows of d values.
//   r_i = (mean_j x_ij^2 + eps)^(-1/2)        xh_ij = x_ij r_i        out_ij = xh_ij w_j
//   dx_ij = r_i (w_j g_ij - xh_ij / d * sum_k g_ik out_ik)        dw_j = sum_i g_ij xh_ij        (g = dout)
// x, weight and all arithmetic fp32; out and dout are X, dx as residual_gradient.h says. Saved for backward: out, which the product behind needs
// anyway, and r: xh = out / w, half the bytes of x. Where w is as good as zero, out says nothing of it, and x is read.
// Bytes a row: forward 4d + 2d (bf16): 302 MB at 32768 x 1536, 0.10 ms at 3 TB/s. Backward 2d + 2d + 3d + 3d (bf16): 503 MB, 0.17 ms.
// Forward: a warp a row, which it keeps in registers. Backward: a block a row, whose next row is on its way meanwhile. dweight: every thread
// adds up its columns of the block's rows, a second kernel adds the blocks in order. The number of blocks is fixed, so the result is the same
// on every GPU.
#pragma once
#include "cpu/rmsnorm.h"
#include "device.cuh"
#include "fp8.cuh"
#include "measure.cuh"
#include "residual_gradient.h"

namespace gpu {

constexpr int RMSNORM_BLOCKS = 512;    // of the backward kernel: as many partial sums of dweight

// Threads for a row of `items` loads: a multiple of 32 up to 256 that leaves few idle in the last turn
inline int row_threads(int64_t items) {
    const int64_t turns = ceil_div(items, 256);
    return (int)round_up(ceil_div(items, turns), WARP);
}
inline bool aligned_16(const void* p) { return (uintptr_t)p % 16 == 0; }   // nullptr is

template <class X> __global__ void rmsnorm_forward_kernel(X* out, float* rstd, const float* x, const float* weight, int d, float eps) {
    const int64_t row = blockIdx.x;
    x += row * d;
    out += row * d;
    float square = 0;
    for (int j = threadIdx.x; j < d; j += blockDim.x) square += x[j] * x[j];
    const float r = 1.f / sqrtf(block_sum(square) / d + eps);
    if (threadIdx.x == 0) rstd[row] = r;
    for (int j = threadIdx.x; j < d; j += blockDim.x) out[j] = from_float<X>(x[j] * r * weight[j]);
}

// A row in a warp's registers: nothing is read twice, and no warp waits for another. A lane has `ITEMS` times 4 values; d <= 128 ITEMS.
// FP8: what is written is quantised too (fp8.cuh), while the row is at hand.
constexpr int RMSNORM_WARPS = 8;           // of a block
template <int ITEMS, bool FP8, class X>
__global__ void __launch_bounds__(RMSNORM_WARPS * WARP)
rmsnorm_forward_warp_kernel(X* out, Quantised copy, float* rstd, const float* x, const float* weight, int64_t N, int d, float eps) {
    const int64_t row = (int64_t)blockIdx.x * RMSNORM_WARPS + threadIdx.x / WARP;
    const int first = threadIdx.x % WARP * 4;
    if (row >= N) return;
    Vec<float, 4> xs[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; i++)
        xs[i] = first + i * 4 * WARP < d ? load_vec<4>(x + row * d + first + i * 4 * WARP) : Vec<float, 4>{};
    float square = 0;
#pragma unroll
    for (int i = 0; i < ITEMS; i++)
#pragma unroll
        for (int k = 0; k < 4; k++) square += xs[i][k] * xs[i][k];
    const float r = 1.f / sqrtf(warp_sum(square) / d + eps);
    if (first == 0) rstd[row] = r;
    [[maybe_unused]] uint2 words[ITEMS];
    [[maybe_unused]] uint32_t halves = 0;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int j = first + i * 4 * WARP;
        if (j >= d) break;
        const auto ws = load_vec<4>(weight + j);
        Vec<X, 4> ys;
#pragma unroll
        for (int k = 0; k < 4; k++) ys[k] = from_float<X>(xs[i][k] * r * ws[k]);
        store_vec(out + row * d + j, ys);
        if constexpr (FP8 && sizeof(X) == 2) {
            words[i] = words_of(ys);
            halves = larger_halves(larger_halves(halves, words[i].x), words[i].y);
        }
    }
    if constexpr (FP8) {
        const uint32_t most = row_most<1>(halves);
        const float inverse = inverse_scale(most);
        if (first == 0) copy.scale[row] = scale_of(most);
#pragma unroll
        for (int i = 0; i < ITEMS; i++)
            if (const int j = first + i * 4 * WARP; j < d) *(uint32_t*)(copy.q + row * d + j) = quantise_four(words[i].x, words[i].y, inverse);
    }
}

inline void rmsnorm_forward(floatX* out /*(N,d)*/, float* rstd /*(N)*/, const float* x /*(N,d)*/, const float* weight /*(d)*/, int64_t N, int d,
                            float eps, Stream stream, Quantised copy = {} /*of out, where wanted*/) {
    const Operation op("rmsnorm forward", (double)N * d * (4 + sizeof(floatX) + (copy.q ? 1 : 0)), 0, stream);
    const bool vector = d % 4 == 0 && aligned_16(out) && aligned_16(x) && aligned_16(weight);
    const unsigned blocks = (unsigned)ceil_div(N, RMSNORM_WARPS);
    const int threads = RMSNORM_WARPS * WARP, items = (int)ceil_div(d, 4 * WARP);
    const auto launch = [&](auto kernel) { kernel<<<blocks, threads, 0, stream>>>(out, copy, rstd, x, weight, N, d, eps); };
    if (vector && items <= 8) launch(copy.q ? rmsnorm_forward_warp_kernel<8, true, floatX> : rmsnorm_forward_warp_kernel<8, false, floatX>);
    else if (vector && items <= 12) launch(copy.q ? rmsnorm_forward_warp_kernel<12, true, floatX> : rmsnorm_forward_warp_kernel<12, false, floatX>);
    else if (vector && items <= 24) launch(copy.q ? rmsnorm_forward_warp_kernel<24, true, floatX> : rmsnorm_forward_warp_kernel<24, false, floatX>);
    else rmsnorm_forward_kernel<<<(unsigned)N, row_threads(d), 0, stream>>>(out, rstd, x, weight, d, eps);
    LAUNCH_CHECK();
    if (copy.q && !(vector && items <= 24)) quantise_rows(copy, out, N, d, stream);
}

// What backward reads and writes. before.high null: dx = ..., not dx = before + ...
template <class X> struct NormBackward {
    ResidualGradient<X> dx, before;
    float* partial;                        // (gridDim.x, d): the part of dweight from rows blockIdx.x, blockIdx.x + gridDim.x, ...
    const X *dout, *out;
    const float *x, *rstd, *weight;
    int64_t N;
    int d;
};

// Where w is as good as zero, n is put in as x r and counts as if w were 1.
__device__ inline bool is_tiny(float w) { return fabsf(w) <= (float)cpu::RMSNORM_LEAST_WEIGHT; }
__device__ inline float inverse_weight(float w) { return is_tiny(w) ? 1.f : 1.f / w; }
__device__ inline float rmsnorm_gradient(float g, float n, float r, float w, float inverse, float pull) {
    return fmaf(r * w, g, -(pull * inverse) * n);
}

// What a thread loads of a row
template <class X> struct NormWords {
    uint4 g, n;
    GradientWords<X> before;
    __device__ void load(const NormBackward<X>& p, int64_t at) {
        g = *(const uint4*)(p.dout + at), n = *(const uint4*)(p.out + at);
        if (p.before) before.load(p.before, at);
    }
};
// The compiler must not keep as floats until later what is here in half as many registers
__device__ inline void forget_floats(uint4& v) { asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)); }

// A thread's columns, in all rows of its block
template <class X> struct NormColumns {
    static constexpr int W = VALUES<X>;
    float w[W], inverse[W], sums[W] = {};
    bool any_tiny = false;
    __device__ void init(const float* weight) {
#pragma unroll
        for (int k = 0; k < W; k++) w[k] = weight[k], inverse[k] = inverse_weight(w[k]), any_tiny |= is_tiny(w[k]);
    }
    __device__ void row(const NormBackward<X>& p, const NormWords<X>& words, int64_t at, float r, float pull) {
        float g[W], n[W], dx[W] = {};
        unpack<X>(g, words.g), unpack<X>(n, words.n);
        if (p.before) words.before.join(dx);
        if (any_tiny)
#pragma unroll
            for (int k = 0; k < W; k++)
                if (is_tiny(w[k])) n[k] = p.x[at + k] * r;
#pragma unroll
        for (int k = 0; k < W; k++) {
            sums[k] = fmaf(g[k], n[k], sums[k]);
            dx[k] += rmsnorm_gradient(g[k], n[k], r, w[k], inverse[k], pull);
        }
        GradientWords<X> out;
        out.split(dx);
        out.store(p.dx, at);
    }
    __device__ void store_sums(float* partial) const {
#pragma unroll
        for (int k = 0; k < W; k++) partial[k] = sums[k] * inverse[k];
    }
};

// d / W threads, rounded up to whole warps
constexpr int RMSNORM_MOST_COLUMNS = 3072;
template <class X>
__global__ void __launch_bounds__(RMSNORM_MOST_COLUMNS / VALUES<X>, VALUES<X> / 4) rmsnorm_backward_kernel(const NormBackward<X> p) {
    constexpr int W = VALUES<X>;
    __shared__ float dots[2][WARP];        // of the warps, in turns: one barrier a row
    const int j = threadIdx.x * W, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    const bool mine = j < p.d;
    NormColumns<X> columns;
    NormWords<X> next{};
    if (mine) columns.init(p.weight + j), next.load(p, blockIdx.x * (int64_t)p.d + j);
    int turn = 0;
    for (int64_t row = blockIdx.x; row < p.N; row += gridDim.x, turn ^= 1) {
        NormWords<X> now = next;
        const float r = p.rstd[row];
        if (mine && row + gridDim.x < p.N) next.load(p, (row + gridDim.x) * p.d + j);
        float g[W], n[W], dot = 0.f;
        unpack<X>(g, now.g), unpack<X>(n, now.n);
#pragma unroll
        for (int k = 0; k < W; k++) dot = fmaf(g[k], n[k], dot);
        dot = warp_sum(dot);
        if (lane == 0) dots[turn][threadIdx.x / WARP] = dot;
        __syncthreads();
        dot = warp_sum(lane < warps ? dots[turn][lane] : 0.f);
        forget_floats(now.g), forget_floats(now.n);
        if (mine) columns.row(p, now, row * p.d + j, r, dot * r / p.d);
    }
    if (mine) columns.store_sums(p.partial + (int64_t)blockIdx.x * p.d + j);
}

// Any d: a thread has a row's columns one after the other, reads them twice, and keeps its sums for dweight in shared memory
template <class X> __global__ void rmsnorm_backward_any_kernel(const NormBackward<X> p) {
    extern __shared__ float4 shared_floats[];
    float* sums = (float*)shared_floats;   // the same columns in every row: no barrier
    for (int j = threadIdx.x; j < p.d; j += blockDim.x) sums[j] = 0.f;
    for (int64_t row = blockIdx.x; row < p.N; row += gridDim.x) {
        const int64_t first = row * p.d;
        float dot = 0.f;
        for (int j = threadIdx.x; j < p.d; j += blockDim.x) dot = fmaf(to_float(p.dout[first + j]), to_float(p.out[first + j]), dot);
        const float r = p.rstd[row], pull = block_sum(dot) * r / p.d;
        for (int j = threadIdx.x; j < p.d; j += blockDim.x) {
            const int64_t at = first + j;
            const float w = p.weight[j], inverse = inverse_weight(w), g = to_float(p.dout[at]), n = is_tiny(w) ? p.x[at] * r : to_float(p.out[at]);
            sums[j] += g * n * inverse;
            const float dx = (p.before ? load_gradient<1>(p.before, at)[0] : 0.f) + rmsnorm_gradient(g, n, r, w, inverse, pull);
            p.dx.high[at] = from_float<X>(dx);
            if constexpr (HAS_LOW_PLANE<X>) p.dx.low[at] = low_plane(dx, p.dx.high[at]);
        }
    }
    for (int j = threadIdx.x; j < p.d; j += blockDim.x) p.partial[(int64_t)blockIdx.x * p.d + j] = sums[j];
}

// out_j += sum over rows of partial_j. A block adds 32 columns: 32 warps take the rows in turn, the warps' sums are added in order.
template <int WARPS>
__global__ void add_column_sums_kernel(float* out, const float* partial, int64_t rows, int64_t d) {
    __shared__ float sums[WARPS][WARP];
    const int64_t j = (int64_t)blockIdx.x * WARP + threadIdx.x;
    float sum = 0;
    if (j < d)
        for (int64_t row = threadIdx.y; row < rows; row += WARPS) sum += partial[row * d + j];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y != 0 || j >= d) return;
    float total = 0;
    for (int warp = 0; warp < WARPS; warp++) total += sums[warp][threadIdx.x];
    out[j] += total;
}

inline void add_column_sums(float* out /*(d) +=*/, const float* partial /*(rows,d)*/, int64_t rows, int64_t d, Stream stream) {
    add_column_sums_kernel<32><<<(unsigned)ceil_div(d, WARP), dim3(WARP, 32), 0, stream>>>(out, partial, rows, d);
    LAUNCH_CHECK();
}

inline int64_t rmsnorm_backward_blocks(int64_t N) { return N < RMSNORM_BLOCKS ? N : RMSNORM_BLOCKS; }
inline size_t rmsnorm_backward_workspace(int64_t N, int d) { return (size_t)rmsnorm_backward_blocks(N) * d * sizeof(float); }

inline void rmsnorm_backward(ResidualGradient<floatX> dx /*(N,d)*/, ResidualGradient<floatX> before /*(N,d) or {}: dx = before + ...; may be dx*/,
                             float* dweight /*(d) +=*/, const floatX* dout /*(N,d)*/, const floatX* out /*(N,d)*/, const float* x /*(N,d)*/,
                             const float* rstd /*(N)*/, const float* weight /*(d)*/, void* workspace, int64_t N, int d, Stream stream) {
    const double gradient_bytes = sizeof(floatX) + HAS_LOW_PLANE<floatX>;
    const Operation op("rmsnorm backward", (double)N * d * (2 * sizeof(floatX) + (before ? 2 : 1) * gradient_bytes), 0, stream);
    const NormBackward<floatX> p{dx, before, (float*)workspace, dout, out, x, rstd, weight, N, d};
    const unsigned blocks = (unsigned)rmsnorm_backward_blocks(N);
    constexpr int W = VALUES<floatX>;
    const bool vector = d % W == 0 && d <= RMSNORM_MOST_COLUMNS && aligned_16(dx.high) && aligned_16(dx.low) && aligned_16(before.high) &&
                        aligned_16(before.low) && aligned_16(dout) && aligned_16(out);
    if (vector) {
        rmsnorm_backward_kernel<<<blocks, (unsigned)round_up(d / W, WARP), 0, stream>>>(p);
    } else {
        const size_t shared = (size_t)d * sizeof(float);
        auto kernel = rmsnorm_backward_any_kernel<floatX>;
        if (shared > 48 * 1024) CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
        kernel<<<blocks, row_threads(d), shared, stream>>>(p);
    }
    LAUNCH_CHECK();
    add_column_sums(dweight, p.partial, blocks, d, stream);
}

} // namespace gpu
