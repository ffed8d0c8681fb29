// Cross entropy over the vocabulary.
//   loss_i = log sum_v exp(l_iv) - l_i,target          dl_iv = scale (softmax(l_i)_v - [v = target])
// One block a row, fp32 arithmetic on X logits. The first walk keeps a running maximum and the sum of exponentials relative to it,
// so the loss is finite for any finite logits; the second (fused only) overwrites the logits with their gradient. A row of 32000 bf16
// logits is 64 KB: with two blocks an SM the second walk, which starts where the first one ended, mostly hits L1.
// Bytes per row: forward 2V, fused 4V (bf16): 4.2 GB at 32768 x 32000, 1.4 ms at 3 TB/s. A target outside [0,V) gives NaN, not a
// read outside the row.
#pragma once
#include <cfloat>

#include "device.cuh"
#include "measure.cuh"
#include "rmsnorm.cuh"   // aligned_16

namespace gpu {

constexpr int CROSS_ENTROPY_THREADS = 1024;

struct RowSoftmax { float max, sum; };   // softmax(l)_v = exp(l_v - max) / sum

template <int W, class X> __device__ inline RowSoftmax row_softmax(const X* logits, int V) {
    float top = -FLT_MAX, sum = 0;   // not -infinity: -infinity - -infinity is NaN
    for (int v = threadIdx.x * W; v < V; v += CROSS_ENTROPY_THREADS * W) {
        const auto l = load_vec<W>(logits + v);
        float here = to_float(l[0]);
#pragma unroll
        for (int k = 1; k < W; k++) here = fmaxf(here, to_float(l[k]));
        if (here > top) {
            sum *= __expf(top - here);
            top = here;
        }
#pragma unroll
        for (int k = 0; k < W; k++) sum += __expf(to_float(l[k]) - top);
    }
    const float row_top = block_max(top);
    return {row_top, block_sum(sum * __expf(top - row_top))};
}

template <int W, bool GRADIENT, class X>
__global__ void __launch_bounds__(CROSS_ENTROPY_THREADS, 2)
cross_entropy_kernel(float* losses, uint8_t* greedy, X* gradient, const X* logits /*== gradient if GRADIENT*/, const int* targets, float scale, int V) {
    const int64_t row = blockIdx.x;
    logits += row * V;
    const int target = targets[row];
    const bool valid = target >= 0 && target < V;
    // Read before row_softmax's barriers: after them other threads overwrite the row.
    const float target_logit = valid ? to_float(logits[target]) : nanf("");
    const RowSoftmax softmax = row_softmax<W>(logits, V);
    if (threadIdx.x == 0) losses[row] = logf(softmax.sum) + (softmax.max - target_logit);
    if (threadIdx.x == 0 && greedy) greedy[row] = target_logit >= softmax.max;
    if constexpr (GRADIENT) {
        gradient += row * V;
        const float factor = valid ? scale / softmax.sum : nanf("");
        // Each thread meets the vectors of its first walk again, last one first.
        const int first = threadIdx.x * W, stride = CROSS_ENTROPY_THREADS * W;
        if (first >= V) return;
        for (int v = first + (V - 1 - first) / stride * stride; v >= 0; v -= stride) {
            auto l = load_vec<W>(gradient + v);
#pragma unroll
            for (int k = 0; k < W; k++)
                l[k] = from_float<X>(factor * __expf(to_float(l[k]) - softmax.max) - (v + k == target ? scale : 0.f));
            store_vec(gradient + v, l);
        }
    }
}

// greedy: as in the twin
inline void cross_entropy_forward(float* losses /*(M)*/, uint8_t* greedy /*(M) or null*/, const floatX* logits /*(M,V)*/, const int* targets /*(M)*/,
                                  int64_t M, int V, Stream stream) {
    const Operation op("cross entropy forward", (double)M * V * sizeof(floatX), 0, stream);
    constexpr int W = 16 / sizeof(floatX);
    if (V % W == 0 && aligned_16(logits))
        cross_entropy_kernel<W, false, floatX><<<(unsigned)M, CROSS_ENTROPY_THREADS, 0, stream>>>(losses, greedy, nullptr, logits, targets, 0.f, V);
    else
        cross_entropy_kernel<1, false, floatX><<<(unsigned)M, CROSS_ENTROPY_THREADS, 0, stream>>>(losses, greedy, nullptr, logits, targets, 0.f, V);
    LAUNCH_CHECK();
}

inline void cross_entropy_fused(float* losses /*(M)*/, floatX* logits /*(M,V) in: logits, out: their gradient*/, const int* targets /*(M)*/, float scale,
                                int64_t M, int V, Stream stream) {
    const Operation op("cross entropy", 2.0 * M * V * sizeof(floatX), 0, stream);
    constexpr int W = 16 / sizeof(floatX);
    if (V % W == 0 && aligned_16(logits))
        cross_entropy_kernel<W, true, floatX><<<(unsigned)M, CROSS_ENTROPY_THREADS, 0, stream>>>(losses, nullptr, logits, logits, targets, scale, V);
    else
        cross_entropy_kernel<1, true, floatX><<<(unsigned)M, CROSS_ENTROPY_THREADS, 0, stream>>>(losses, nullptr, logits, logits, targets, scale, V);
    LAUNCH_CHECK();
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
