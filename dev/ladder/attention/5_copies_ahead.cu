// 5. Copies ahead. cp.async writes shared memory without passing through registers and without a thread that waits: values load while
// the scores are multiplied, the next keys while the softmax and the second product run. Three more things of a real kernel:
//
//   - only tiles on an edge of the window are masked; between them, every query sees every key;
//   - two blocks on a multiprocessor, so that one's products run beside the other's exponentials;
//   - the heads' last tiles first: they have the longest windows, and short ones fill the end.
//
// This is forward_mma of kernels/attention/mma_forward.cuh, what every GPU since compute capability 8.0 runs.
//
// What limits it: on Hopper, mma.sync itself. It reaches at best 60% of what wgmma does, and a warp that issues it does nothing else.
#include "../../../kernels/attention.cuh"
#include "library.cuh"

int main() {
    using namespace ladder_attention;
    return run("5 copies ahead: the portable kernel", [](const Problem& p, bf16* out, float* lse) {
        gpu::attn::launch_forward_mma<HD, 4, 2>(library_arguments(p, out, lse), 0);
    });
}
