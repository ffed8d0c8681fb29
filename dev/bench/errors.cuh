// What a benchmark reads back from the GPU, and how far it is from what it should be
#pragma once
#include <cmath>
#include <vector>

#include "../../kernels/device.cuh"

namespace bench {

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

// Columns first to first + count of `rows` rows of ld values
template <class T> std::vector<double> to_host(const T* device, int64_t rows, int64_t ld, int64_t first, int64_t count) {
    std::vector<T> values(rows * count);
    CUDA_CHECK(cudaMemcpy2D(values.data(), count * sizeof(T), device + first, ld * sizeof(T), count * sizeof(T), rows, cudaMemcpyDeviceToHost));
    std::vector<double> out(rows * count);
    for (size_t i = 0; i < out.size(); i++) out[i] = to_float(values[i]);
    return out;
}

} // namespace bench
