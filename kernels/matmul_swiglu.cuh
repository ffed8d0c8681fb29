// Matrix products with SwiGLU behind or before them.
//   forward    gate|up = n (w1|w2)^T      h = silu(gate) up
//   backward   dh = dy w3                 dgate|dup = the gradient of h's formula at dh
// On Hopper in bf16 one kernel each (matmul/swiglu_sm90.cuh); elsewhere, and for sizes that it does not take, a product of cuBLASLt and a pass
// over memory (swiglu.cuh).
// The passes over memory quantise what they write, where the next product is to be in fp8.
#pragma once
#include "matmul.cuh"
#include "swiglu.cuh"
#include "matmul/swiglu_sm90.cuh"

namespace gpu {

inline void matmul_swiglu_forward(Matmul& matmul, floatX* h /*(M,F)*/, floatX* gate_up /*(M,2F)*/, const floatX* n /*(M,d)*/,
                                  const Weights& w12 /*(2F,d): w1 | w2*/, int64_t M, int F, int d, Stream stream, Quantised h_copy = {}) {
    if (sizeof(floatX) == 2 && !w12.fp8() && sm90::swiglu_gemm_usable({h, gate_up, n, w12.w}, M, F, d)) {
        const Operation op("w1|w2 forward, swiglu", BYTES * ((double)M * d + 2.0 * F * d + 3.0 * M * F), 4.0 * M * F * d, stream);
        using sm90::bf16;                                                     // which floatX is here; the float build must compile this too
        sm90::swiglu_gemm_forward((bf16*)h, (bf16*)gate_up, (const bf16*)n, (const bf16*)w12.w, M, F, d, stream);
        if (h_copy.q) quantise_rows(h_copy, h, M, F, stream);
        return;
    }
    matmul_forward(matmul, gate_up, 2 * (int64_t)F, n, d, w12, M, 2 * F, d, stream);
    swiglu_forward(h, gate_up, M, F, stream, h_copy);
}

inline void matmul_swiglu_backward(Matmul& matmul, floatX* dgate_up /*(M,2F)*/, floatX* h /*(M,F) = silu(gate) up, or null*/,
                                   floatX* dh /*(M,F) scratch*/, const floatX* dy /*(M,d)*/, const Weights& w3 /*(d,F)*/,
                                   const floatX* gate_up /*(M,2F)*/, int64_t M, int F, int d, Stream stream, Quantised dgate_up_copy = {}) {
    if (sizeof(floatX) == 2 && !w3.fp8() && sm90::swiglu_gemm_usable({dgate_up, h, dy, w3.w, gate_up}, M, F, d)) {
        const Operation op("w3 dgrad, swiglu", BYTES * ((double)M * d + (double)F * d + (h ? 5.0 : 4.0) * M * F), 2.0 * M * F * d, stream);
        using sm90::bf16;
        sm90::swiglu_gemm_backward((bf16*)dgate_up, (bf16*)h, (const bf16*)dy, (const bf16*)w3.w, (const bf16*)gate_up, M, F, d, stream);
        if (dgate_up_copy.q) quantise_rows(dgate_up_copy, dgate_up, M, 2 * (int64_t)F, stream);
        return;
    }
    matmul_dgrad(matmul, dh, F, dy, d, w3, M, d, F, false, stream);
    if (h) swiglu_forward(h, gate_up, M, F, stream);
    swiglu_backward(dgate_up, dh, gate_up, M, F, stream, dgate_up_copy);
}

} // namespace gpu
