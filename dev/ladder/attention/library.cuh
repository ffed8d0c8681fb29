// The library's kernels on the problem of this directory
#pragma once
#include "problem.cuh"

namespace ladder_attention {

inline gpu::attn::Args<bf16> library_arguments(const Problem& p, bf16* out, float* lse) {
    static const bench::Counter drawn;
    gpu::attn::Args<bf16> a{};
    a.out = out, a.lse = lse, a.drawn = drawn.p, a.qkv = p.qkv, a.B = p.B, a.T = p.T, a.H = a.G = p.H, a.hd = HD, a.window = p.window;
    return a;
}

} // namespace ladder_attention
