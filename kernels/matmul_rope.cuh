// The product that makes queries, keys and values, with RoPE behind it.
//   qkv = n w^T, and its query and key heads turned by the angles of their positions (kernels/cpu/rope.h)
// On Hopper in bf16 one kernel (matmul/rope_sm90.cuh); elsewhere, and for sizes that it does not take, a product of cuBLASLt and a pass over
// memory (rope.cuh).
#pragma once
#include "matmul.cuh"
#include "matmul/rope_sm90.cuh"
#include "rope.cuh"

namespace gpu {

inline void matmul_rope_forward(Matmul& matmul, floatX* qkv /*(B,T,(H+2G)hd)*/, const floatX* n /*(B,T,d)*/, const Weights& w /*((H+2G)hd,d)*/,
                                const float* table /*(T,hd/2,2), or null: nothing is turned*/, int B, int64_t T, int H, int G, int hd, int d,
                                Stream stream) {
    const int64_t M = B * T;
    const int width = (H + 2 * G) * hd;
    if (sizeof(floatX) == 2 && table && !w.fp8() && sm90::rope_gemm_usable({qkv, n, w.w, table}, M, T, H, G, hd, d)) {
        const Operation op("attn forward, rope", BYTES * ((double)M * d + (double)width * d + (double)M * width), 2.0 * M * width * d, stream);
        using sm90::bf16;                                                     // which floatX is here; the float build must compile this too
        sm90::rope_gemm_forward((bf16*)qkv, (const bf16*)n, (const bf16*)w.w, table, M, T, H, G, hd, d, stream);
        return;
    }
    matmul_forward(matmul, qkv, width, n, d, w, M, width, d, stream);
    if (table) rope_forward(qkv, table, B, T, H, G, hd, stream);
}

} // namespace gpu
