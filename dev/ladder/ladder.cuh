// What the programs of dev/ladder share: the line that a machine without a GPU gets, errors, and a row of the table.
#pragma once
#include <exception>
#include <utility>

#include "../bench/timing.cuh"

namespace ladder {

// ||got - want|| / ||want||, infinity where anything is not finite
inline double relative_error(const std::vector<double>& got, const std::vector<double>& want) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < want.size(); i++) {
        if (!std::isfinite(got[i])) return INFINITY;
        difference += (got[i] - want[i]) * (got[i] - want[i]);
        norm += want[i] * want[i];
    }
    return std::sqrt(difference / (norm > 0 ? norm : 1));
}

template <class T> std::vector<double> to_host(const T* device, int64_t n) {
    std::vector<T> values(n);
    CUDA_CHECK(cudaMemcpy(values.data(), device, n * sizeof(T), cudaMemcpyDeviceToHost));
    std::vector<double> out(n);
    for (int64_t i = 0; i < n; i++) out[i] = to_float(values[i]);
    return out;
}

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
