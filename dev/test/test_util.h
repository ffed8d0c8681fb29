// What the tests share: random data, device buffers with poisoned contents, error norms and finite differences.
#pragma once
#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "../../kernels/device.cuh"

#define REQUIRE_GPU() \
    do { if (device_count() == 0) GTEST_SKIP() << "needs a GPU"; } while (0)

// Uniform in [-scale, scale]; the same values for the same seed on every machine (splitmix64).
inline std::vector<double> random_values(size_t n, uint64_t seed, double scale = 1.0) {
    std::vector<double> out(n);
    const uint64_t s = seed * 0x9e3779b97f4a7c15ull + 0x2545f4914f6cdd1dull;
#pragma omp parallel for if (n > 1 << 20)
    for (size_t i = 0; i < n; i++) {
        uint64_t z = s + (i + 1) * 0x9e3779b97f4a7c15ull;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
        z ^= z >> 31;
        out[i] = scale * ((double)(z >> 11) * 0x1p-52 - 1.0);
    }
    return out;
}

template <class T> T convert_to(double x) { return (T)x; }
#ifndef SAMBA_CPU
template <> inline __nv_bfloat16 convert_to<__nv_bfloat16>(double x) { return __double2bfloat16(x); }
inline double convert_from(__nv_bfloat16 x) { return (double)__bfloat162float(x); }
#endif
template <class T> double convert_from(T x) { return (double)x; }

template <class T> std::vector<T> to_type(const std::vector<double>& in) {
    std::vector<T> out(in.size());
#pragma omp parallel for if (in.size() > 1 << 20)
    for (size_t i = 0; i < in.size(); i++) out[i] = convert_to<T>(in[i]);
    return out;
}
template <class T> std::vector<double> to_double(const std::vector<T>& in) {
    std::vector<double> out(in.size());
#pragma omp parallel for if (in.size() > 1 << 20)
    for (size_t i = 0; i < in.size(); i++) out[i] = convert_from(in[i]);
    return out;
}
// What the device sees of these values: rounded once to T. The oracle is given the same.
template <class T> std::vector<double> rounded(const std::vector<double>& in) { return to_double(to_type<T>(in)); }

// Device memory for a test. Without data every byte is 0xFF, a NaN in every type, so that an element that a kernel
// forgets to write is seen.
template <class T> struct DeviceBuffer {
    T* ptr = nullptr;
    size_t size;
    explicit DeviceBuffer(size_t n) : size(n) {
        ptr = (T*)device_alloc(n * sizeof(T), "a test buffer");
        poison();
    }
    explicit DeviceBuffer(const std::vector<T>& data) : size(data.size()) {
        ptr = (T*)device_alloc(size * sizeof(T), "a test buffer");
        set(data);
    }
    DeviceBuffer(const DeviceBuffer&) = delete;
    DeviceBuffer& operator=(const DeviceBuffer&) = delete;
    ~DeviceBuffer() { try { device_free(ptr); } catch (...) {} }   // after a faulty kernel every call fails: the test says so, not std::terminate
    void poison() { device_fill(ptr, 0xFF, size * sizeof(T), Stream{}); }
    void set(const std::vector<T>& data) {
        copy_to_device(ptr, data.data(), size * sizeof(T), Stream{});
        stream_sync(Stream{});
    }
    std::vector<T> host() const {
        std::vector<T> out(size);
        stream_sync(Stream{});
        copy_to_host(out.data(), ptr, size * sizeof(T), Stream{});
        stream_sync(Stream{});
        return out;
    }
};

// Elements outside the used columns of wider rows must keep their poison. They become zeros, as the twin leaves them.
inline std::vector<double> used_columns(std::vector<double> rows, int64_t ld, int first, int count) {
    for (size_t i = 0; i < rows.size(); i++) {
        const int64_t column = (int64_t)i % ld;
        if (column >= first && column < first + count) continue;
        EXPECT_TRUE(std::isnan(rows[i])) << "a column that is not the kernel's was written";
        rows[i] = 0;
    }
    return rows;
}

// ||got - ref|| / ||ref||. A NaN or infinity anywhere in `got` gives infinity.
inline double rel_l2(const std::vector<double>& got, const std::vector<double>& ref) {
    if (got.size() != ref.size()) return std::numeric_limits<double>::infinity();
    double difference = 0, norm = 0;
    for (size_t i = 0; i < got.size(); i++) {
        if (!std::isfinite(got[i])) return std::numeric_limits<double>::infinity();
        difference += (got[i] - ref[i]) * (got[i] - ref[i]);
        norm += ref[i] * ref[i];
    }
    return norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
}

// Relative L2 error allowed for an output of type T computed from exactly known inputs of type T with fp32 arithmetic.
// float: 2^-24 a rounding and sums of a few thousand terms. bf16: 2^-9 for rounding the output, and as much for rounding
// an intermediate that the operation must store in bf16.
template <class T> constexpr double tolerance() { return sizeof(T) == 2 ? 4e-3 : 1e-5; }

// Central differences of the scalar f() with respect to x (changed in place and restored), against `analytic`. At most
// 64 elements, evenly spread, are tried. The error is measured against the largest analytic element.
inline void expect_gradient(const std::function<double()>& f, std::vector<double>& x, const std::vector<double>& analytic,
                            const char* name, double eps = 1e-5, double tol = 1e-6) {
    ASSERT_EQ(x.size(), analytic.size()) << name;
    double scale = 0;
    for (double g : analytic) {
        ASSERT_TRUE(std::isfinite(g)) << name;
        scale = std::max(scale, std::abs(g));
    }
    ASSERT_GT(scale, 0) << name << ": the gradient is zero everywhere";
    const size_t step = std::max<size_t>(1, x.size() / 64);
    for (size_t i = 0; i < x.size(); i += step) {
        const double kept = x[i];
        x[i] = kept + eps;
        const double above = f();
        x[i] = kept - eps;
        const double below = f();
        x[i] = kept;
        EXPECT_NEAR((above - below) / (2 * eps), analytic[i], tol * scale) << name << "[" << i << "]";
    }
}
