// The settings of AdamW, shared by kernels/adamw.cuh and its CPU twin.
#pragma once
#include <cmath>
#include <cstdint>

struct AdamW {
    float lr, beta1, beta2, eps, weight_decay;
    int64_t step;   // 1 at the first update; for the bias corrections

    // 1 / (1 - beta^step), in double: 1 - beta2^step loses all its digits in float at the first steps
    double m_correction() const { return 1 / (1 - std::pow((double)beta1, (double)step)); }
    double v_correction() const { return 1 / (1 - std::pow((double)beta2, (double)step)); }
};
