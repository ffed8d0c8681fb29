// What the microbenchmarks share: the library, timing, and the rows that they print.
#pragma once
#include <string>

#include "../../kernels/ops.cuh"
#include "timing.cuh"

namespace bench {

inline void print_header() { printf("%-34s %9s %9s %9s %9s %10s\n", "operation", "ms", "fastest", "slowest", "GB/s", "TFLOP/s"); }
// bytes: each input read once, each output written once; flops: 0 where they do not bound the operation
inline void print_row(const std::string& name, const Time& t, double bytes, double flops = 0) {
    printf("%-34s %9.4f %9.4f %9.4f %9.0f", name.c_str(), t.median, t.fastest, t.slowest, bytes / t.median * 1e-6);
    if (flops > 0) printf(" %10.1f", flops / t.median * 1e-9);
    printf("\n");
    fflush(stdout);
}

} // namespace bench
