// What fp8 products read beside, or in place of, floatX. Shared by the model, fp8.cuh, matmul.cuh and their CPU twins.
#pragma once
#include "device.cuh"

// Rows of 8-bit floating-point numbers (e4m3), each row with a scale: x_ij = q_ij scale_i up to rounding. Null: not there
struct Quantised {
    uint8_t* q = nullptr;
    float* scale = nullptr;
};

// The weights (N,K) of a linear layer, as its products read them
struct Weights {
    const floatX* w;
    Quantised rows, columns;               // of (N,K), and of its transpose (K,N); null: products of floatX
    Quantised input;                       // where the product's other factor is quantised, (M,K) or (M,N)
    bool input_made = false;               // by what wrote that factor; else by the product

    Weights(const floatX* w, Quantised rows = {}, Quantised columns = {}, Quantised input = {}) : w(w), rows(rows), columns(columns), input(input) {}
    operator const floatX*() const { return w; }
    bool fp8() const { return rows.q != nullptr; }
    Weights with_input_made() const { Weights w = *this; w.input_made = true; return w; }
};
