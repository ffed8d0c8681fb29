// 7. Everything at once: the library's Hopper kernel (forward of kernels/attention_sm90.cuh). Loads, products and exponentials of different
// tiles run at the same time, because different warps do them:
//
//   - a producer: one thread of a third warpgroup keeps rings of tiles full, far ahead; "full" and "empty" are mbarriers. It gives
//     its registers to the others (setmaxnreg);
//   - two consumers of 64 queries each issue the scores of the next tile and the output of the last one back to back, and make the
//     exponentials of the next tile while both run;
//   - they take turns at issuing, so that one's exponentials run during the other's products;
//   - a block stays on its multiprocessor and takes tile after tile, so that loads never stop between them;
//   - half tiles that nobody sees are skipped, and only 64 x 64 blocks on an edge are masked.
//
// What limits it: the tensor cores, at last, and the clock they run at when all of them work.
#include "../../../kernels/attention_sm90.cuh"
#include "library.cuh"

int main() {
    using namespace ladder_attention;
    const char* name = "7 everything at once: the Hopper kernel";
    if (device_count() > 0 && !gpu::sm90::usable()) return printf("%s: needs compute capability 9.0 and code for sm_90a\n", name), 0;
    return run(name, [](const Problem& p, bf16* out, float* lse) { gpu::sm90::launch_forward<HD>(library_arguments(p, out, lse), 0); });
}
