// What the selective scan reads. CPU twin of kernels/scan_inputs.cuh: three operations after each other.
//   u = silu(conv(x))        x_dbl = u w_x^T, columns dt low | B | C        dt = x_dbl[:, :R] w_dt^T
#pragma once
#include "conv1d.h"
#include "matmul.h"

namespace cpu {

// keep_x_dbl: x_dbl is there already, as an earlier call made it
template <class T>
void scan_inputs_forward(Matmul& matmul, T* u /*(B,length,e)*/, T* x_dbl /*(B,length,R+2N)*/, T* dt /*(B,length,e)*/,
                         std::type_identity_t<T>* halo_out /*(B,3,e) or null*/, const T* x /*(B,length,e), row stride ldx*/, int64_t ldx,
                         const std::type_identity_t<T>* halo_in /*(B,3,e) or null*/, const T* w /*(e,4)*/, const T* b /*(e)*/,
                         const T* w_x /*(R+2N,e)*/, const T* w_dt /*(e,R)*/, bool keep_x_dbl, int B, int64_t length, int e, int R, int N,
                         Stream stream = {}) {
    const int64_t tokens = B * length, columns = R + 2 * N;
    conv1d_forward(u, halo_out, x, ldx, halo_in, w, b, B, length, e, stream);
    if (!keep_x_dbl) matmul_forward(matmul, x_dbl, columns, u, e, w_x, tokens, (int)columns, e, stream);
    matmul_forward(matmul, dt, e, x_dbl, columns, w_dt, tokens, e, R, stream);
}

} // namespace cpu
