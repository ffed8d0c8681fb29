// Token embedding, CPU twin of kernels/embedding.cuh.   out[i,:] = wte[tokens[i],:]     dwte[tokens[i],:] += dout[i,:]
#pragma once
#include "../device.cuh"
#include "../residual_gradient.h"

namespace cpu {

template <class R>
void embedding_forward(R* out /*(BT,d)*/, const int* tokens /*(BT)*/, const R* wte /*(V,d)*/, int64_t BT, int d, Stream = {}) {
#pragma omp parallel for
    for (int64_t i = 0; i < BT; i++) {
        const R* row = wte + (int64_t)tokens[i] * d;
        for (int c = 0; c < d; c++) out[i * d + c] = row[c];
    }
}

inline size_t embedding_backward_workspace(int64_t /*BT*/, int /*V*/, int /*d*/) { return 0; }

// Threads share the columns, not the positions: each sum runs over positions in order, whatever the number of threads.
template <class R>
void embedding_backward(R* dwte /*(V,d) +=*/, ResidualGradient<R> dout /*(BT,d)*/, const int* tokens, void* /*workspace*/, int64_t BT, int V,
                        int d, Stream = {}) {
    constexpr int COLUMNS = 64;
#pragma omp parallel for
    for (int first = 0; first < d; first += COLUMNS) {
        const int last = first + COLUMNS < d ? first + COLUMNS : d;
        for (int64_t i = 0; i < BT; i++) {
            if (tokens[i] < 0 || tokens[i] >= V) continue;
            R* row = dwte + (int64_t)tokens[i] * d;
            for (int c = first; c < last; c++) row[c] += dout.high[i * d + c];
        }
    }
}

} // namespace cpu
