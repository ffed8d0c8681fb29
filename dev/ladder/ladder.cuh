// What the programs of dev/ladder share: the line that a machine without a GPU gets, errors, and a row of the table.
#pragma once
#include <exception>
#include <utility>

#include "../bench/errors.cuh"
#include "../bench/timing.cuh"

namespace ladder {

using bench::relative_error, bench::to_host;

// One line of the table. rate: of `unit`; errors: by name, each at most its bound, or the program ends with an error.
struct Figure { const char* name; double error, bound; };
inline void print_row(const char* program, double ms, double rate, const char* unit, const std::vector<Figure>& errors) {
    printf("%-46s %10.3f ms %9.4g %-10s error:", program, ms, rate, unit);
    for (const Figure& f : errors) printf(" %s %.1e", f.name, f.error);
    printf("\n");
    fflush(stdout);
    for (const Figure& f : errors)
        if (!(f.error <= f.bound)) fail("%s: the error of %s is %.2e and may be %.1e", program, f.name, f.error, f.bound);
}

// main() of a program: body prints rows
inline int run(const char* program, bool needs_gpu, const std::function<void()>& body) {
    try {
        if (needs_gpu && device_count() == 0) fail("%s needs an NVIDIA GPU of compute capability 8.0 or higher and finds none", program);
        body();
        return 0;
    } catch (const std::exception& error) {
        fprintf(stderr, "error: %s\n", error.what());
        return 1;
    }
}

} // namespace ladder
