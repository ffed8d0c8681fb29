// Matrix products with SwiGLU behind or before them, CPU twin of kernels/matmul_swiglu.cuh.
//   forward    gate|up = n (w1|w2)^T      h = silu(gate) up
//   backward   dh = dy w3                 dgate|dup = the gradient of h's formula at dh
#pragma once
#include "../quantised.h"
#include "matmul.h"
#include "swiglu.h"

namespace cpu {

template <class R>
void matmul_swiglu_forward(Matmul& matmul, R* h /*(M,F)*/, R* gate_up /*(M,2F)*/, const R* n /*(M,d)*/,
                           std::type_identity_t<const R*> w12 /*(2F,d): w1 | w2*/, int64_t M, int F, int d, Stream stream = {}, Quantised = {}) {
    matmul_forward(matmul, gate_up, 2 * (int64_t)F, n, d, w12, M, 2 * F, d, stream);
    swiglu_forward(h, gate_up, M, F, stream);
}

template <class R>
void matmul_swiglu_backward(Matmul& matmul, R* dgate_up /*(M,2F)*/, R* h /*(M,F) = silu(gate) up, or null*/, R* dh /*(M,F) scratch*/,
                            const R* dy /*(M,d)*/, std::type_identity_t<const R*> w3 /*(d,F)*/, const R* gate_up /*(M,2F)*/, int64_t M, int F, int d,
                            Stream stream = {}, Quantised = {}) {
    matmul_dgrad(matmul, dh, F, dy, d, w3, M, d, F, false, stream);
    if (h) swiglu_forward(h, gate_up, M, F, stream);
    swiglu_backward(dgate_up, dh, gate_up, M, F, stream);
}

} // namespace cpu
