// A problem for the causal convolution, for the tests of it and of what is fused with it
#pragma once
#include "test_util.h"

struct ConvCase {
    int B;
    int64_t T;
    int e, gap = 0;      // columns behind the e used ones in rows of x and dx
    bool halo = true;
};

// Random values, in double
struct ConvInputs {
    ConvCase c;
    int64_t ldx;
    std::vector<double> x /*(B,T,ldx)*/, halo /*(B,3,e)*/, w /*(e,4)*/, b /*(e)*/, du /*(B,T,e)*/;
    ConvInputs(const ConvCase& c_, uint64_t seed) : c(c_), ldx(c_.e + c_.gap) {
        x = random_values(c.B * c.T * ldx, seed + 1);
        halo = random_values((size_t)c.B * 3 * c.e, seed + 2);
        w = random_values((size_t)c.e * 4, seed + 3);
        b = random_values(c.e, seed + 4);
        du = random_values(c.B * c.T * c.e, seed + 5);
    }
    // Activations as X holds them and parameters as float does
    template <class X> void round() {
        for (auto* v : {&x, &halo, &du}) *v = rounded<X>(*v);
        for (auto* v : {&w, &b}) *v = rounded<float>(*v);
    }
    const double* halo_in() const { return c.halo ? halo.data() : nullptr; }
};
