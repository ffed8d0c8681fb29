// 7. Everything at once: the library's Hopper kernel (kernels/attention/sm90_forward.cuh). Loads, products and exponentials of different
// tiles run at the same time, because different warps do them:
//
//   - a producer: one thread of a warpgroup of its own keeps rings of tiles full, far ahead; "full" and "empty" are mbarriers. It gives
//     the warpgroup's registers to the others (setmaxnreg);
//   - three consumers of 64 queries each share the tiles of keys and values, and are in different places of their work: what one has to
//     wait for or to exponentiate, the others' products cover. A tile's output begins with its first 64 keys, while the exponentials of
//     the other 64 are made;
//   - a row's base, which its exponentials subtract, is raised only where the maximum has gone far beyond it: outputs are hardly rescaled;
//   - a block stays on its multiprocessor and takes tile after tile, so that loads never stop between them, and stores run beside them;
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
