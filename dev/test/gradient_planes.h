// A gradient of the residual stream for tests of what reads and writes one
#pragma once
#include "../../kernels/residual_gradient.h"
#include "test_util.h"

#ifndef SAMBA_CPU
// Both planes of these values, and back
struct Planes {
    DeviceBuffer<floatX> high;
    DeviceBuffer<int8_t> low;
    explicit Planes(size_t n) : high(n), low(n) {}
    explicit Planes(const std::vector<double>& values) : Planes(values.size()) {
        std::vector<floatX> h(values.size());
        std::vector<int8_t> l(values.size());
        for (size_t i = 0; i < values.size(); i++) h[i] = (floatX)(float)values[i], l[i] = low_plane((float)values[i], h[i]);
        high.set(h), low.set(l);
    }
    ResidualGradient<floatX> get() { return {high.ptr, HAS_LOW_PLANE<floatX> ? low.ptr : nullptr}; }
    std::vector<double> values() const {
        const auto h = high.host();
        const auto l = low.host();
        std::vector<double> out(h.size());
        for (size_t i = 0; i < h.size(); i++) out[i] = joined(h[i], l[i]);
        return out;
    }
};
#endif
