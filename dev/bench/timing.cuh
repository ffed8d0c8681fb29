// Timing on the GPU: device events, random data, buffers that rotate so that the cache holds none of them.
#pragma once
#include <algorithm>
#include <functional>
#include <vector>

#include "../../kernels/device.cuh"

namespace bench {

// Value i of an array that looks like activations: uniform in [-scale, scale] with a hash of the index as randomness
__host__ __device__ inline float random_value(int64_t i, float scale, unsigned seed) {
    unsigned h = (unsigned)i * 2654435761u ^ (unsigned)(i >> 32) ^ seed;
    h = (h ^ (h >> 16)) * 0x7feb352du;
    h = (h ^ (h >> 15)) * 0x846ca68bu;
    h ^= h >> 16;
    return scale * ((float)h * 0x1p-31f - 1.f);
}
template <class T> __global__ void fill_kernel(T* p, int64_t n, float scale, unsigned seed) {
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < n; i += (int64_t)gridDim.x * blockDim.x)
        p[i] = from_float<T>(random_value(i, scale, seed));
}

// `copies` separate arrays of n values each, used in turn. Another seed (below 17): other values
template <class T> class Rotating {
    std::vector<T*> copies_;

public:
    Rotating(int64_t n, int copies, float scale = 1.f, unsigned seed = 1) {
        for (int c = 0; c < copies; c++) {
            copies_.push_back((T*)device_alloc((size_t)n * sizeof(T), "a benchmark buffer"));
            fill_kernel<<<1024, 256>>>(copies_.back(), n, scale, 17u * c + seed);
            LAUNCH_CHECK();
        }
    }
    Rotating(const Rotating&) = delete;
    Rotating& operator=(const Rotating&) = delete;
    ~Rotating() { for (T* p : copies_) cudaFree(p); }
    T* operator[](int i) const { return copies_[(size_t)i % copies_.size()]; }
};

// A counter that is zero when a kernel starts, and that it leaves so
struct Counter {
    int* p;
    Counter() : p((int*)device_alloc(sizeof(int), "a benchmark's counter")) { CUDA_CHECK(cudaMemset(p, 0, sizeof(int))); }
    Counter(const Counter&) = delete;
    Counter& operator=(const Counter&) = delete;
    ~Counter() { cudaFree(p); }
};

struct Time { double median, fastest, slowest; };   // ms a call

// Each call is timed alone between two events; the first `warmup` are not counted. launch(i) uses the buffers of turn i.
inline Time time_ms(const std::function<void(int)>& launch, int repeats = 30, int warmup = 5) {
    std::vector<cudaEvent_t> events(2 * repeats);
    for (auto& e : events) CUDA_CHECK(cudaEventCreate(&e));
    for (int i = 0; i < warmup; i++) launch(i);
    for (int i = 0; i < repeats; i++) {
        CUDA_CHECK(cudaEventRecord(events[2 * i], 0));
        launch(warmup + i);
        CUDA_CHECK(cudaEventRecord(events[2 * i + 1], 0));
    }
    CUDA_CHECK(cudaDeviceSynchronize());
    std::vector<double> ms(repeats);
    for (int i = 0; i < repeats; i++) {
        float t;
        CUDA_CHECK(cudaEventElapsedTime(&t, events[2 * i], events[2 * i + 1]));
        ms[i] = t;
    }
    for (auto& e : events) cudaEventDestroy(e);
    std::sort(ms.begin(), ms.end());
    return {ms[repeats / 2], ms.front(), ms.back()};
}

} // namespace bench
