// Backward of the Mamba layer's convolution and of x_proj, which reads its result u. CPU twin of kernels/conv1d_x_proj_backward.cuh.
//   du  += dx_dbl Wx            the gradient of u is the scan's and x_proj's
//   dWx (+)= dx_dbl^T u
//   dx, dw, db of the convolution from du
#pragma once
#include "conv1d.h"
#include "matmul.h"

namespace cpu {

inline size_t x_proj_conv_backward_workspace(int B, int64_t T, int e, int /*K*/) { return conv1d_backward_workspace(B, T, e); }

template <class R>
void x_proj_conv_backward(Matmul& matmul, R* dx /*(B,T,e), row stride lddx*/, int64_t lddx, R* dw_x /*(K,e)*/,
                          bool accumulate /*dw_x += or dw_x =*/, R* dw /*(e,4) +=*/, R* db /*(e) +=*/,
                          R* du /*(B,T,e): the scan's; overwritten*/, const R* dx_dbl /*(B,T,K)*/,
                          std::type_identity_t<const R*> w_x /*(K,e)*/, const R* u /*(B,T,e)*/, const R* x /*(B,T,e), row stride ldx*/, int64_t ldx,
                          const std::type_identity_t<R>* halo_in /*(B,3,e) or null*/, const R* w, const R* b, void* workspace, int B, int64_t T,
                          int e, int K, Stream stream = {}) {
    const int64_t BT = B * T;
    matmul_dgrad(matmul, du, e, dx_dbl, K, w_x, BT, K, e, true, stream);
    matmul_wgrad(matmul, dw_x, dx_dbl, K, u, e, BT, K, e, accumulate, stream);
    conv1d_backward(dx, lddx, dw, db, du, x, ldx, halo_in, w, b, workspace, B, T, e, stream);
}

} // namespace cpu
