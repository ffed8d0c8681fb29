// A decode step as a whole: what it reads and writes, layer by layer. DecodeStep (decode/step.cuh; none on a CPU) runs it in one kernel
// where its sizes allow that.
#pragma once
#include <vector>

#include "../device.cuh"

struct DecodeLayer {
    enum Kind { mamba, attention, mlp } kind = mlp;
    const float* next_norm = nullptr;      // of the norm that reads the x which this layer leaves; null: none does
    // mamba
    const floatX *in_proj = nullptr, *x_proj = nullptr, *dt_proj = nullptr, *out_proj = nullptr;
    const float *conv_w = nullptr, *conv_b = nullptr, *A_log = nullptr, *D = nullptr, *dt_bias = nullptr;
    floatX* halo = nullptr;                // (B,3,e)
    float* h = nullptr;                    // (B,e,N)
    // attention
    const floatX *qkv = nullptr, *proj = nullptr;
    floatX* ring = nullptr;                // (B,capacity,2,G,hd)
    int64_t capacity = 0;
    // mlp
    const floatX *w1 = nullptr, *w3 = nullptr;
    int F = 0;
};

struct DecodeModel {
    int B, d, e, N, rank, H, G, hd, V;
    bool rope;
    float eps;
    const floatX* head;                    // (V,d)
    std::vector<DecodeLayer> layers;
    // what the sampler leaves, and the logits that it wants
    const float *x, *squares, *cos_sin;    // (B,d), (B,d/8), (B,hd/2,2)
    floatX* xw;                            // (B,d)
    const int64_t* position;               // (B)
    float* logits;                         // (B,V)
};

#ifdef SAMBA_CPU
namespace cpu {
struct DecodeStep {
    static bool possible(const DecodeModel&) { return false; }
    void create(const DecodeModel&, Stream) {}
    void run(Stream) const {}
};
}
#endif
