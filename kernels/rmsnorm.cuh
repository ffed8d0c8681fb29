// RMSNorm over rows of d values.
//   r_i = (mean_j x_ij^2 + eps)^(-1/2)        out_ij = x_ij r_i w_j
//   dx_ij = r_i (w_j g_ij - x_ij r_i^2 / d * sum_k w_k g_ik x_ik)        dw_j = sum_i g_ij x_ij r_i        (g = dout)
// x, dx, weight and all arithmetic fp32; out and dout are X. Saved for backward: x and r.
// Bytes a row: forward 4d + 2d (bf16): 302 MB at 32768 x 1536, 0.10 ms at 3 TB/s. Backward 2d + 4d + 8d (+2d for dx_copy).
// Forward: a warp a row, which it keeps in registers. Backward: a block a row; its second walk over the row finds it in L1. dweight: every block adds up its own rows in shared
// memory, a second kernel adds the blocks in order. The number of blocks is fixed, so the result is the same on every GPU.
#pragma once
#include "device.cuh"
#include "fp8.cuh"
#include "measure.cuh"

namespace gpu {

constexpr int RMSNORM_BLOCKS = 1024;   // of the backward kernel: as many partial sums of dweight

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
        const uint32_t most = __reduce_max_sync(0xffffffffu, larger_half(halves));
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

// partial (gridDim.x, d): the part of dweight from rows blockIdx.x, blockIdx.x + gridDim.x, ... Each thread meets the same
// columns in every row, so its sums in shared memory are its own and need no barrier.
template <int W, class X>
__global__ void rmsnorm_backward_kernel(float* dx, X* dx_copy, float* partial, const X* dout, const float* x, const float* rstd, const float* weight,
                                        int64_t N, int d, bool accumulate) {
    extern __shared__ float4 shared_floats[];
    float* dweight = (float*)shared_floats;
    for (int j = threadIdx.x * W; j < d; j += blockDim.x * W) store_vec(dweight + j, Vec<float, W>{});
    for (int64_t row = blockIdx.x; row < N; row += gridDim.x) {
        const float* xi = x + row * d;
        const X* gi = dout + row * d;
        float dot = 0;
        for (int j = threadIdx.x * W; j < d; j += blockDim.x * W) {
            const auto xs = load_vec<W>(xi + j), ws = load_vec<W>(weight + j);
            const auto gs = load_vec<W>(gi + j);
#pragma unroll
            for (int k = 0; k < W; k++) dot += ws[k] * to_float(gs[k]) * xs[k];
        }
        const float r = rstd[row];
        const float pull = block_sum(dot) * r * r / d;
        for (int j = threadIdx.x * W; j < d; j += blockDim.x * W) {
            const auto xs = load_vec<W>(xi + j), ws = load_vec<W>(weight + j);
            const auto gs = load_vec<W>(gi + j);
            auto sums = load_vec<W>(dweight + j);
            Vec<float, W> dxs{};
            if (accumulate) dxs = load_vec<W>(dx + row * d + j);
            Vec<X, W> copy;
#pragma unroll
            for (int k = 0; k < W; k++) {
                const float g = to_float(gs[k]);
                sums[k] += g * xs[k] * r;
                dxs[k] += r * (ws[k] * g - xs[k] * pull);
                copy[k] = from_float<X>(dxs[k]);
            }
            store_vec(dweight + j, sums);
            store_vec(dx + row * d + j, dxs);
            if (dx_copy) store_vec(dx_copy + row * d + j, copy);
        }
    }
    for (int j = threadIdx.x * W; j < d; j += blockDim.x * W) store_vec(partial + (int64_t)blockIdx.x * d + j, load_vec<W>(dweight + j));
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

inline void rmsnorm_backward(float* dx /*(N,d)*/, floatX* dx_copy /*(N,d) or nullptr: dx after the update, rounded*/, float* dweight /*(d) +=*/, const floatX* dout /*(N,d)*/,
                             const float* x /*(N,d)*/, const float* rstd /*(N)*/, const float* weight /*(d)*/, void* workspace, int64_t N, int d,
                             bool accumulate /*dx += or dx =*/, Stream stream) {
    const Operation op("rmsnorm backward", (double)N * d * (8 + 4 * accumulate + (dx_copy ? 2 : 1) * sizeof(floatX)), 0, stream);
    float* partial = (float*)workspace;
    const unsigned blocks = (unsigned)rmsnorm_backward_blocks(N);
    const size_t shared = (size_t)d * sizeof(float);
    const bool vector = d % 4 == 0 && aligned_16(dx) && aligned_16(dx_copy) && aligned_16(dout) && aligned_16(x) && aligned_16(weight) && aligned_16(workspace);
    auto kernel = vector ? rmsnorm_backward_kernel<4, floatX> : rmsnorm_backward_kernel<1, floatX>;
    if (shared > 48 * 1024) CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    kernel<<<blocks, row_threads(vector ? d / 4 : d), shared, stream>>>(dx, dx_copy, partial, dout, x, rstd, weight, N, d, accumulate);
    LAUNCH_CHECK();
    add_column_sums(dweight, partial, blocks, d, stream);
}

} // namespace gpu
