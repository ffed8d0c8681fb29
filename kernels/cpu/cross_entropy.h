// Cross entropy over the vocabulary, CPU twin of kernels/cross_entropy.cuh.
//   loss_i = log sum_v exp(l_iv) - l_i,target          dl_iv = scale (softmax(l_i)_v - [v = target])
// The maximum of the row is taken out first, so the loss is finite for any finite logits. A target outside [0,V) gives a
// NaN loss (and NaN gradients) for its row instead of a read outside it.
#pragma once
#include <cmath>
#include <limits>
#include "../device.cuh"
#include "exp.h"
#include "sum.h"

namespace cpu {

template <class R> struct RowSoftmax { R max, sum; };   // softmax(l)_v = exp(l_v - max) / sum

template <class R> RowSoftmax<R> row_softmax(const R* logits, int V) {
    const R top = max_over<R>(V, [=](int64_t v) { return logits[v]; });
    return {top, sum_over<R>(V, [=](int64_t v) { return fast_exp(logits[v] - top); })};
}

template <class R> R row_loss(const R* logits, RowSoftmax<R> s, int target, int V) {
    if (target < 0 || target >= V) return std::numeric_limits<R>::quiet_NaN();
    return std::log(s.sum) + (s.max - logits[target]);
}

// greedy: 1 where no logit of the row is above the target's, so that greedy decoding would have chosen it (or one as likely)
template <class R>
void cross_entropy_forward(R* losses /*(M)*/, uint8_t* greedy /*(M) or null*/, const R* logits /*(M,V)*/, const int* targets /*(M)*/,
                           int64_t M, int V, Stream = {}) {
#pragma omp parallel for
    for (int64_t i = 0; i < M; i++) {
        const RowSoftmax<R> s = row_softmax(logits + i * V, V);
        losses[i] = row_loss(logits + i * V, s, targets[i], V);
        if (greedy) greedy[i] = targets[i] >= 0 && targets[i] < V && logits[i * V + targets[i]] >= s.max;
    }
}

template <class R>
void cross_entropy_fused(R* losses /*(M)*/, R* logits /*(M,V) in: logits, out: their gradient*/, const int* targets /*(M)*/, float scale,
                         int64_t M, int V, Stream = {}) {
#pragma omp parallel for
    for (int64_t i = 0; i < M; i++) {
        R* row = logits + i * V;
        const RowSoftmax<R> s = row_softmax(row, V);
        losses[i] = row_loss(row, s, targets[i], V);
        const bool valid = targets[i] >= 0 && targets[i] < V;
        const R factor = valid ? (R)scale / s.sum : std::numeric_limits<R>::quiet_NaN(), top = s.max;
#pragma omp simd
        for (int v = 0; v < V; v++) row[v] = factor * fast_exp(row[v] - top);
        if (valid) row[targets[i]] -= (R)scale;
    }
}

// mean = weight / M * sum(losses), or mean += that
template <class R>
void mean_losses(R* mean /*(1)*/, const R* losses /*(M)*/, int64_t M, bool accumulate, float weight, Stream = {}) {
    const double sum = sum_over<double>(M, [=](int64_t i) { return (double)losses[i]; });
    const R value = (R)(weight * sum / M);
    *mean = accumulate ? *mean + value : value;
}

} // namespace cpu
