// What the selective scan reads, from the half of in_proj's output that is called x:
//   u = silu(conv(x))        x_dbl = u w_x^T, columns dt low | B | C        dt = x_dbl[:, :R] w_dt^T
// All three are bound by memory, so where it can a kernel makes them in one pass (scan/inputs_sm90.cuh); elsewhere, and for sizes that it does
// not take, they are made one after the other (conv1d.cuh, matmul.cuh).
#pragma once
#include "conv1d.cuh"
#include "matmul.cuh"
#include "scan/inputs_sm90.cuh"

namespace gpu {

// keep_x_dbl: x_dbl is there already, as an earlier call made it. The one pass makes it again, the same bits: that costs it nothing.
inline void scan_inputs_forward(Matmul& matmul, floatX* u /*(B,T,e)*/, floatX* x_dbl /*(B,T,R+2N)*/, floatX* dt /*(B,T,e)*/,
                                floatX* halo_out /*(B,3,e) or null; may be halo_in*/, const floatX* x /*(B,T,e), row stride ldx*/, int64_t ldx,
                                const floatX* halo_in /*(B,3,e) or null*/, const float* w /*(e,4)*/, const float* b /*(e)*/,
                                const floatX* w_x /*(R+2N,e)*/, const floatX* w_dt /*(e,R)*/, bool keep_x_dbl, int B, int64_t T, int e, int R, int N,
                                Stream stream) {
    const int64_t tokens = B * T, columns = R + 2 * N;
    const bool takes = sizeof(floatX) == 2 && sm90::scan_inputs_takes({u, x_dbl, dt, x, halo_in, w, b, w_x, w_dt}, ldx, B, T, e, R, N);
    if (takes && sm90::scan_inputs_fill(B, T)) {
        const double bytes = BYTES * (3.0 * tokens * e + (double)tokens * columns + (double)(columns + R) * e);
        const Operation op("conv1d, x_proj, dt_proj", bytes, 2.0 * tokens * e * (columns + R), stream);
        using sm90::bf16;                                                     // which floatX is here; the float build must compile this too
        sm90::scan_inputs((bf16*)u, (bf16*)x_dbl, (bf16*)dt, (const bf16*)x, ldx, (const bf16*)halo_in, w, b, (const bf16*)w_x, (const bf16*)w_dt,
                          B, T, e, R, stream);
        conv1d_halo(halo_out, x, ldx, halo_in, B, T, e, stream);
        return;
    }
    conv1d_forward(u, halo_out, x, ldx, halo_in, w, b, B, T, e, stream);
    if (!keep_x_dbl) matmul_forward(matmul, x_dbl, columns, u, e, w_x, tokens, (int)columns, e, stream);
    matmul_forward(matmul, dt, e, x_dbl, columns, w_dt, tokens, e, R, stream);
}

} // namespace gpu
