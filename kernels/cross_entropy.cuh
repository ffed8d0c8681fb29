// Cross entropy over the vocabulary.
//   loss_i = log sum_v exp(l_iv) - l_i,target          dl_iv = scale (softmax(l_i)_v - [v = target])
// One block a row, fp32 arithmetic on X logits. The first walk keeps a running maximum and the sum of exponentials relative to it,
// so the loss is finite for any finite logits; the second (fused only) overwrites the logits with their gradient. A row of up to 96 KB
// (49,152 bf16 logits) is copied to shared memory first, so that it is read once.
// Bytes per row: forward 2V, fused 4V (bf16): 4.2 GB at 32768 x 32000, 1.4 ms at 3 TB/s. A target outside [0,V) gives NaN, not a
// read outside the row.
#pragma once
#include <cfloat>

#include "device.cuh"
#include "measure.cuh"
#include "rmsnorm.cuh"   // aligned_16

namespace gpu {

constexpr int CROSS_ENTROPY_THREADS = 512, CROSS_ENTROPY_BLOCKS = 3;   // of a multiprocessor: so many rows of up to 75 KB are on their way

// What a thread has of a row: vectors threadIdx.x, threadIdx.x + THREADS, ... of W logits. SHARED: copied once to shared memory, all on their way at
// once; each thread reads what it has copied itself. Otherwise read from memory each time.
template <int W, bool SHARED, class X> struct RowLogits {
    const X* row;
    int V;
    __device__ RowLogits(const X* logits, int V) : row(logits), V(V) {
        if constexpr (SHARED) {
            extern __shared__ float4 shared_row[];
            for (int v = threadIdx.x * W; v < V; v += CROSS_ENTROPY_THREADS * W)
                copy_async<16>((X*)shared_row + v, logits + v);
            copy_async_commit();
            copy_async_wait();
            row = (const X*)shared_row;
        }
    }
    template <class F> __device__ void each(F f) const {               // f(column, vector)
        // the last one first: if they are read again, it is the one that L1 has
        const int first = threadIdx.x * W, stride = CROSS_ENTROPY_THREADS * W;
        if (first >= V) return;
        for (int v = first + (V - 1 - first) / stride * stride; v >= 0; v -= stride) f(v, load_vec<W>(row + v));
    }
};

struct RowSoftmax { float max, sum; };   // softmax(l)_v = exp(l_v - max) / sum

template <class L> __device__ inline RowSoftmax row_softmax(const L& logits) {
    float top = -FLT_MAX, sum = 0;       // not -infinity: -infinity - -infinity is NaN
    logits.each([&](int, const auto& l) {
        float here = to_float(l[0]);
#pragma unroll
        for (int k = 1; k < (int)(sizeof l / sizeof l[0]); k++) here = fmaxf(here, to_float(l[k]));
        if (here > top) {
            sum *= __expf(top - here);
            top = here;
        }
#pragma unroll
        for (int k = 0; k < (int)(sizeof l / sizeof l[0]); k++) sum += __expf(to_float(l[k]) - top);
    });
    const float row_top = block_max(top);
    return {row_top, block_sum(sum * __expf(top - row_top))};
}

template <int W, bool SHARED, bool GRADIENT, class X>
__global__ void __launch_bounds__(CROSS_ENTROPY_THREADS, CROSS_ENTROPY_BLOCKS)
cross_entropy_kernel(float* losses, uint8_t* greedy, X* gradient, const X* logits /*== gradient if GRADIENT*/, const int* targets, float scale,
                     int V) {
    const int64_t row = blockIdx.x;
    logits += row * V;
    const int target = targets[row];
    const bool valid = target >= 0 && target < V;
    // Read before row_softmax's barriers: after them other threads overwrite the row.
    const float target_logit = valid ? to_float(logits[target]) : nanf("");
    const RowLogits<W, SHARED, X> own(logits, V);
    const RowSoftmax softmax = row_softmax(own);
    if (threadIdx.x == 0) losses[row] = logf(softmax.sum) + (softmax.max - target_logit);
    if (threadIdx.x == 0 && greedy) greedy[row] = target_logit >= softmax.max;
    if constexpr (GRADIENT) {
        gradient += row * V;
        const float factor = valid ? scale / softmax.sum : nanf("");
        own.each([&](int v, Vec<X, W> l) {
#pragma unroll
            for (int k = 0; k < W; k++)
                l[k] = from_float<X>(factor * __expf(to_float(l[k]) - softmax.max) - (v + k == target ? scale : 0.f));
            store_vec(gradient + v, l);
        });
    }
}

template <bool GRADIENT>
inline void launch_cross_entropy(float* losses, uint8_t* greedy, floatX* gradient, const floatX* logits, const int* targets, float scale,
                                 int64_t M, int V, Stream stream) {
    constexpr int W = 16 / sizeof(floatX);
    constexpr size_t MOST_SHARED = 96 << 10;                            // of a block: two share a multiprocessor of an H100; three up to 75 KB
    const size_t bytes = (size_t)V * sizeof(floatX);
    const bool vector = V % W == 0 && aligned_16(logits), shared = vector && bytes <= MOST_SHARED;
    auto kernel = !vector ? cross_entropy_kernel<1, false, GRADIENT, floatX>
                  : shared ? cross_entropy_kernel<W, true, GRADIENT, floatX>
                           : cross_entropy_kernel<W, false, GRADIENT, floatX>;
    if (shared && bytes > 48 << 10) CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
    kernel<<<(unsigned)M, CROSS_ENTROPY_THREADS, shared ? bytes : 0, stream>>>(losses, greedy, gradient, logits, targets, scale, V);
    LAUNCH_CHECK();
}

// greedy: as in the twin
inline void cross_entropy_forward(float* losses /*(M)*/, uint8_t* greedy /*(M) or null*/, const floatX* logits /*(M,V)*/, const int* targets /*(M)*/,
                                  int64_t M, int V, Stream stream) {
    const Operation op("cross entropy forward", (double)M * V * sizeof(floatX), 0, stream);
    launch_cross_entropy<false>(losses, greedy, nullptr, logits, targets, 0.f, M, V, stream);
}

inline void cross_entropy_fused(float* losses /*(M)*/, floatX* logits /*(M,V) in: logits, out: their gradient*/, const int* targets /*(M)*/,
                                float scale, int64_t M, int V, Stream stream) {
    const Operation op("cross entropy", 2.0 * M * V * sizeof(floatX), 0, stream);
    launch_cross_entropy<true>(losses, nullptr, logits, logits, targets, scale, M, V, stream);
}

template <int THREADS> __global__ void mean_losses_kernel(float* mean, const float* losses, int64_t M, bool accumulate, float weight) {
    float sum = 0;
    for (int64_t i = threadIdx.x; i < M; i += THREADS) sum += losses[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *mean = (accumulate ? *mean : 0.f) + weight * (sum / M);
}

// mean = weight / M * sum(losses), or mean += that. One block: M is a few ten thousand.
inline void mean_losses(float* mean /*(1)*/, const float* losses /*(M)*/, int64_t M, bool accumulate, float weight, Stream stream) {
    const Operation op("mean of losses", 4.0 * M, 0, stream);
    mean_losses_kernel<1024><<<1, 1024, 0, stream>>>(mean, losses, M, accumulate, weight);
    LAUNCH_CHECK();
}

} // namespace gpu
