// Causal sliding-window attention for Hopper (compute capability 9.0, code built for sm_90a), bf16, head_dim 64 or 128. Same
// formula, layout and results' form as attention.cuh (the portable path), ring of earlier keys and document starts included.
//
// One thread of a block's first warpgroup feeds tiles through TMA into rings in shared memory (mbarriers say full and empty), the other
// warpgroups own 64 rows each and multiply by wgmma: three in forward, two in backward. Blocks stay resident (one per SM) and take one work
// item after another, so the next item's loads run during the last one's epilogue; whoever is done draws the next one from a counter. Every
// result has one owner and a fixed order of sums: the same bits whoever makes it, no floating-point atomics.
//
// Forward, per warpgroup and tile of 128 keys: S = Q K^T, softmax, O += P V, one after the other; a base below the maximum is kept as long as
// terms stay small. Three warpgroups do so, each at its own pace: one's softmax, masks and results hide behind the others' products, and 192
// queries share the keys that a block loads. What an item is (sequence, head, tiles) the producer finds out and passes on with the
// queries. Results are stored from the place where the queries were.
// Tiles that no query of the item sees are never loaded, halves that a warpgroup does not see not multiplied; only 64 x 64 blocks on an
// edge (diagonal, window, document, ring) are masked.
//
// Backward has two forms; neither has an fp32 dq buffer. With dS kept: a pass over out and dout makes delta; blocks that own keys make
// dk and dv (S^T, dP^T, P^T dO, dS^T Q) and keep dS in memory (attention/common.cuh); blocks that own queries make dq = dS K: 5 products. With dS
// made again: blocks that own queries make dq (S, dP, dS K) and, from tiles that they load anyway, delta; those that own keys then dk and
// dv: 7 products, half the bytes. The second form is taken where keys come from the ring, head_dim is 64, or memory is slow or small (ds_limit() in
// attention.cuh). An item's gradients are stored in the next item's first step. dq and dk are turned back by RoPE's angles on their way out.
// Precision as in the portable path: fp32 sums and softmax; P and dS rounded to bf16 for their product.
//
// Flops per visible pair: 4 hd forward, 10 hd backward. Samba-421M (B 8, T 4096, window 2048, 12 heads of 128): 309 and 773 GFLOP a
// layer, of which blocks of 64 x 64 do 319 and 797: 0.32 and 0.81 ms at the H100's nominal rate; dS is 1.25 GB written and read.
// Measured on an H100 (dev/results/2026-11-28_h100): forward 0.455 ms, for long and at the power limit (1.45 GHz) 0.509 to 0.525; backward 1.74 with
// delta. Read from memory: forward 302 MB, which is qkv once; backward's kernels 545 and 448, where what they read is 503 and 403.
//
// hopper.cuh: instructions, tiles, rings. attention/sm90_common.cuh: who works on what, masks, launches. The kernels: attention/sm90_forward.cuh
// and attention/sm90_backward.cuh.
#pragma once
#include "attention/sm90_backward.cuh"
#include "attention/sm90_forward.cuh"

namespace gpu {
namespace sm90 {

// false: not for this device or shape, nothing was done. Which fields of Args are read: as in attention.cuh.
template <int = 0> inline bool forward_if_supported(const Args<bf16>& a, Stream stream) {
    if (!supported(a, a.out)) return false;
    a.hd == 64 ? launch_forward<64>(a, stream) : launch_forward<128>(a, stream);
    return true;
}
inline bool backward_supported(const Args<bf16>& a) {
    return supported(a, a.dqkv) && ((uintptr_t)a.dout | (uintptr_t)a.saved_out | (uintptr_t)a.lse2 | (uintptr_t)a.rope) % 16 == 0;
}
template <int = 0> inline void run_backward(const Args<bf16>& a, Stream stream) {
    a.hd == 64 ? launch_backward<64>(a, stream) : launch_backward<128>(a, stream);
}

} // namespace sm90
} // namespace gpu
