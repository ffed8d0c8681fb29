// The product that makes queries, keys and values, with RoPE behind it, CPU twin of kernels/matmul_rope.cuh.
//   qkv = n w^T, and its query and key heads turned by the angles of their positions
#pragma once
#include "matmul.h"
#include "rope.h"

namespace cpu {

template <class R>
void matmul_rope_forward(Matmul& matmul, R* qkv /*(B,T,(H+2G)hd)*/, const R* n /*(B,T,d)*/, std::type_identity_t<const R*> w /*((H+2G)hd,d)*/,
                         std::type_identity_t<const R*> table /*(T,hd/2,2), or null: nothing is turned*/, int B, int64_t T, int H, int G, int hd,
                         int d, Stream stream = {}) {
    const int width = (H + 2 * G) * hd;
    matmul_forward(matmul, qkv, width, n, d, w, B * T, width, d, stream);
    if (table) rope_forward(qkv, table, B, T, H, G, hd, stream);
}

} // namespace cpu
