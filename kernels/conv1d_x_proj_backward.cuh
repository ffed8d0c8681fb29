// Backward of the Mamba layer's convolution and of x_proj, which reads its result u = silu(s), s = conv(x). K = R + 2N is x_proj's width:
//   du  += dx_dbl Wx                                             (B,T,K) (K,e): the gradient of u is the scan's and x_proj's
//   dWx (+)= dx_dbl^T u                                          (K,B,T) (B,T,e)
//   dx, dw, db of the convolution from du                        conv1d.cuh
// Each of the three reads or writes arrays of (B,T,e) and little else. On Hopper in bf16 they are one kernel, which makes s and u again from
// x and keeps du in registers; elsewhere, and for sizes that it does not take (T, K or row strides no multiples of 8, e none of 64, K > 256), they
// are two products of cuBLASLt and a pass over memory.
// Bytes per (t,c): 6 (du, x, dx) instead of 12; flops 4 K and 30. At 32768 x 3072, K = 128: 0.60 GB, floor 0.201 ms at 3.0 TB/s (H100).
#pragma once
#include "conv1d/x_proj_backward_sm90.cuh"
#include "matmul.cuh"

namespace gpu {

inline size_t x_proj_conv_backward_workspace(int B, int64_t T, int e, int K) {
    return std::max(conv1d_backward_workspace(B, T, e), sm90::x_proj_conv_workspace(e, K));
}

inline void x_proj_conv_backward(Matmul& matmul, floatX* dx /*(B,T,e), row stride lddx*/, int64_t lddx, float* dw_x /*(K,e)*/,
                                 bool accumulate /*dw_x += or dw_x =*/, float* dw /*(e,4) +=*/, float* db /*(e) +=*/,
                                 floatX* du /*(B,T,e): the scan's; may be overwritten*/, const floatX* dx_dbl /*(B,T,K)*/,
                                 const floatX* w_x /*(K,e)*/, const floatX* u /*(B,T,e)*/, const floatX* x /*(B,T,e), row stride ldx*/, int64_t ldx,
                                 const floatX* halo_in /*(B,3,e) or null*/, const float* w, const float* b, void* workspace, int B, int64_t T,
                                 int e, int K, Stream stream) {
    const int64_t BT = B * T;
    if (sizeof(floatX) == 2 && sm90::x_proj_conv_usable({dx, dw_x, du, dx_dbl, w_x, x, halo_in, workspace}, lddx, ldx, T, e, K)) {
        const double bytes = BYTES * (3.0 * BT * e + (double)BT * K + (double)K * e) + (accumulate ? 8.0 : 4.0) * K * e;
        const Operation op("x_proj, conv1d backward", bytes, 4.0 * BT * e * K, stream);
        using sm90::bf16;                                                     // which floatX is here; the float build must compile this too
        const sm90::XProjConv p{.dx = (bf16*)dx, .halo = (const bf16*)halo_in, .lddx = lddx, .w = w, .b = b,
                                .T = T, .e = e, .width = K};
        sm90::x_proj_conv(dw_x, accumulate, dw, db, p, (const bf16*)du, (const bf16*)dx_dbl, (const bf16*)w_x, (const bf16*)x, ldx, workspace, B,
                          stream);
        return;
    }
    matmul_dgrad(matmul, du, e, dx_dbl, K, w_x, BT, K, e, true, stream);
    matmul_wgrad(matmul, dw_x, dx_dbl, K, u, e, BT, K, e, accumulate, stream);
    conv1d_backward(dx, lddx, dw, db, du, x, ldx, halo_in, w, b, workspace, B, T, e, stream);
}

} // namespace gpu
