// 8. What the trainer calls. kernels/selective_scan.cuh has the ideas of programs 3 to 7 together, and what a program for readers leaves
// out: any B, T, d_inner and d_state up to 256, rows inside wider rows, a state handed in and out, segments where the batch is
// short, and the tuning. Only its two public functions are used here: the same inputs, the same check, the same clock.
#include "../../../kernels/selective_scan.cuh"
#include "scan.cuh"

namespace scan {

static void forward(const Inputs& p, const Outputs& r) {
    const auto& [B, T, e] = p.s;
    gpu::selective_scan_forward(r.out, r.saved, nullptr, p.u, p.dt_raw, p.bc, 2 * N, p.z, e, p.A_log, p.D, p.dt_bias, nullptr, r.scratch, B, T, e, N,
                                cudaStream_t{});
}
static void backward(const Inputs& p, const Outputs& r) {
    const auto& [B, T, e] = p.s;
    gpu::selective_scan_backward(r.du, r.ddt_raw, r.dz, e, r.dbc, 2 * N, r.out, r.dA_log, r.dD, r.ddt_bias, p.dout, p.u, p.dt_raw, p.bc, 2 * N, p.z,
                                 e, p.A_log, p.D, p.dt_bias, nullptr, r.saved, r.scratch, B, T, e, N, cudaStream_t{});
}

} // namespace scan

int main() {
    using namespace scan;
    return run({"8 the library's kernels", forward, backward, [](const Sizes& s) { return gpu::selective_scan_saved(s.B, s.T, s.e, N); },
                [](const Sizes& s) { return gpu::selective_scan_workspace(s.B, s.T, s.e, N); }});
}
