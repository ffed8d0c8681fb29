// 2. A thread for each channel. Channels do not speak to each other, so 8 x 3072 of them are 24,576 threads that run the loop
// side by side, 16 states in registers each. The arrays are (B,T,channels), channels last: in every step the 32 lanes of a warp read
// 32 neighbouring channels, one line of memory. B_t and C_t are the same for all of them: one address, a broadcast.
//
// What limits it: nothing keeps the memory busy. A warp asks for the next step's row, waits about a microsecond, computes for a
// fraction of that, and asks again, 4096 times; there are 1.5 warps for each of the chip's 528 schedulers, too few to fill in.
#include "scan.cuh"

namespace scan {

__global__ void forward_kernel(Inputs p, bf16* out) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x;
    const int64_t first_row = blockIdx.y * p.s.T;
    float A2[N], h[N] = {};
    load_A2(A2, p.A_log, c, 0);
    for (int64_t row = first_row; row < first_row + p.s.T; row++) {
        const int64_t at = row * p.s.e + c;
        const bf16 *B = p.bc + row * 2 * N, *C = B + N;
        const float u = to_float(p.u[at]), dt = softplus_fast(to_float(p.dt_raw[at]) + p.dt_bias[c]);
        float y = p.D[c] * u;
#pragma unroll
        for (int n = 0; n < N; n++) {
            h[n] = fmaf(ex2(dt * A2[n]), h[n], dt * u * to_float(B[n]));
            y = fmaf(h[n], to_float(C[n]), y);
        }
        out[at] = from_float<bf16>(y * silu(to_float(p.z[at])));
    }
}

} // namespace scan

int main() {
    using namespace scan;
    return run({"2 a thread per channel", [](const Inputs& p, const Outputs& r) {
        forward_kernel<<<dim3(p.s.e / 64, p.s.B), 64>>>(p, r.out);
        LAUNCH_CHECK();
    }});
}
