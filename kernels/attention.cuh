// Causal sliding-window attention with grouped heads (MHA, GQA, MQA), forward and deterministic backward.
// Formula, shapes, the ring of earlier keys and document starts: kernels/cpu/attention.h. Scores are never in memory; lse (fp32) is saved.
//
// Three paths, one choice (attn::forward, attn::backward):
//   sm90      bf16 on Hopper: TMA, warp-specialised wgmma; head_dim 64 and 128: attention_sm90.cuh
//   *_mma     bf16 on tensor cores: mma.sync m16n8k16, ldmatrix, cp.async (sm_80 and newer); head_dim 64, 128, 256: attention/mma_*.cuh
//   *_plain   fp32 arithmetic from either type; any head_dim that is a multiple of 8 up to 256: attention/plain.cuh
//
// Forward: a block owns a tile of queries and visits the key tiles of its window, the diagonal first; online softmax in the
// exp2 domain. Backward: blocks that own keys make dk and dv (they loop over the group's query heads) and keep dS in memory
// (attention/common.cuh); blocks that own queries make dq = dS K from it: 5 products, every sum has one owner and a fixed order, no
// atomics, no fp32 dq buffer. Where dS does not fit its workspace (ds_limit), or keys come from the ring, the second kernel makes S and
// dP again: 7 products. Precision: fp32 sums, softmax and statistics; P and dS are rounded to bf16 for their second product.
//
// Flops per (query, visible key) pair: 4 hd forward, 10 hd backward. Samba-421M (B 8, T 4096, window 2048, 12 heads of 128): 309 and
// 773 GFLOP a layer; bytes: 0.2 GB forward, 2.7 GB backward (dS 1.25 written and read). mma.sync reaches 300 to 350 TFLOP/s on an H100.
// H200: forward 0.966 ms, backward 2.78 with delta (dev/results/2026-11-25_h200_attention).
#pragma once
#include <algorithm>
#include <type_traits>

#include "attention/common.cuh"
#include "attention/mma_backward.cuh"
#include "attention/mma_forward.cuh"
#include "attention/plain.cuh"
#include "attention_sm90.cuh"
#include "device.cuh"
#include "measure.cuh"
#include "rope.cuh"

namespace gpu {
namespace attn {

// ---------------------------------------------------------------------------------------------------------------------
// Launches. Functions that name many kernels are templates (of nothing), so that only a source that calls them compiles these.

// One block for each of `tiles` x `owners` (heads or groups, times the batch)
template <class X>
inline void launch(void (*kernel)(const Args<X>), const Args<X>& a, int64_t tiles, int64_t owners, int threads, int shared, Stream stream) {
    if (tiles * owners > INT32_MAX) fail("attention: B %d, T %d, %d heads need more than 2^31 blocks; use a smaller batch", a.B, a.T, a.H);
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    kernel<<<(unsigned)(tiles * owners), threads, shared, stream>>>(a);
    LAUNCH_CHECK();
}
inline int shared_limit() {                                              // bytes a block may have: 99 KB on sm_86/89/120, 163 on sm_80, 227 on sm_90
    int device = 0, bytes = 0;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    return bytes;
}

template <int HD, int WARPS, int MT> inline void launch_forward_mma(const Args<bf16>& a, Stream stream) {
    constexpr int BN = 64;
    launch(a.ring ? forward_mma<HD, WARPS, MT, BN, true> : forward_mma<HD, WARPS, MT, BN, false>, a, ceil_div(a.T, WARPS * MT * 16),
           (int64_t)a.B * a.H, WARPS * WARP, forward_shared<HD, WARPS, MT, BN>(), stream);
}
template <int HD, int WARPS, int MT, int BM, bool DK, bool DV> inline void launch_backward_keys_mma(const Args<bf16>& a, Stream stream) {
    launch(backward_keys_mma<HD, WARPS, MT, BM, DK, DV>, a, ceil_div(a.T, WARPS * MT * 16), (int64_t)a.B * a.G, WARPS * WARP,
           backward_keys_shared<HD, WARPS, MT, BM>(), stream);
}
template <int HD> inline void launch_backward_pairs_mma(const Args<bf16>& a, Stream stream) {
    launch(backward_pairs_mma<HD>, a, ceil_div(a.T, PAIRS * PAIR_KEYS), (int64_t)a.B * a.G, 2 * PAIRS * WARP, backward_pairs_shared<HD>(), stream);
}
template <int HD, int WARPS, int MT, int BN> inline void launch_backward_queries_mma(const Args<bf16>& a, Stream stream) {
    launch(a.ring ? backward_queries_mma<HD, WARPS, MT, BN, true> : backward_queries_mma<HD, WARPS, MT, BN, false>, a,
           ceil_div(a.T, WARPS * MT * 16), (int64_t)a.B * a.H, WARPS * WARP, backward_queries_shared<HD, WARPS, MT, BN>(), stream);
}
template <int HD> inline void launch_backward_product_mma(const Args<bf16>& a, Stream stream) {
    launch(backward_product_mma<HD>, a, ceil_div(a.T, PRODUCT_ROWS<HD>), (int64_t)a.B * a.H, PRODUCT_WARPS * WARP,
           backward_product_shared<HD>(), stream);
}
template <class X, int HDP> inline void launch_forward_plain(const Args<X>& a, Stream stream) {
    launch(forward_plain<X, HDP>, a, ceil_div(a.T, 16 * PLAIN_R<HDP>), (int64_t)a.B * a.H, PLAIN_THREADS, forward_plain_shared<HDP>(), stream);
}
template <class X, int HDP> inline void launch_backward_plain(const Args<X>& a, Stream stream) {
    const int64_t tiles = ceil_div(a.T, 16 * PLAIN_R<HDP>);
    launch(backward_plain<X, HDP, true>, a, tiles, (int64_t)a.B * a.G, PLAIN_THREADS, backward_plain_shared<HDP>(), stream);
    launch(backward_plain<X, HDP, false>, a, tiles, (int64_t)a.B * a.H, PLAIN_THREADS, backward_plain_shared<HDP>(), stream);
}

// Both return false where the tensor-core path has no kernel for this shape on this device
template <int = 0> inline bool forward_on_tensor_cores(const Args<bf16>& a, Stream stream) {
    if (a.hd == 64) launch_forward_mma<64, 4, 2>(a, stream);
    else if (a.hd == 128) launch_forward_mma<128, 4, 2>(a, stream);
    else if (a.hd == 256) launch_forward_mma<256, 4, 1>(a, stream);
    else return false;
    return true;
}
template <int = 0> inline bool backward_on_tensor_cores(const Args<bf16>& a, Stream stream) {
    const int limit = shared_limit();
    if (a.hd == 64) {
        launch_backward_keys_mma<64, 4, 2, 32, true, true>(a, stream);
        launch_backward_queries_mma<64, 4, 2, 64>(a, stream);
    } else if (a.hd == 128) {                                            // pairs of warps read less shared memory, where it is large enough
        if (limit >= backward_pairs_shared<128>()) launch_backward_pairs_mma<128>(a, stream);
        else launch_backward_keys_mma<128, 4, 1, 64, true, true>(a, stream);
        a.ds ? launch_backward_product_mma<128>(a, stream) : launch_backward_queries_mma<128, 4, 2, 32>(a, stream);
    } else if (a.hd == 256 && limit >= backward_keys_shared<256, 4, 1, 32>()) {
        launch_backward_keys_mma<256, 4, 1, 32, true, false>(a, stream);
        launch_backward_keys_mma<256, 4, 1, 32, false, true>(a, stream);
        a.ds ? launch_backward_product_mma<256>(a, stream) : launch_backward_queries_mma<256, 4, 1, 32>(a, stream);
    } else
        return false;
    return true;
}

// portable: not the Hopper path. Each path says whether it took the work.
template <class X> inline void forward(const Args<X>& a, bool portable, Stream stream) {
    if constexpr (std::is_same_v<X, bf16>) {
        if (!portable && sm90::forward_if_supported(a, stream)) return;
        if (forward_on_tensor_cores(a, stream)) return;
    }
    if (a.hd <= 64) launch_forward_plain<X, 64>(a, stream);
    else if (a.hd <= 128) launch_forward_plain<X, 128>(a, stream);
    else launch_forward_plain<X, 256>(a, stream);
}

// dS may take so much memory: the shape of the head needs 1.66 GB; a larger batch goes in parts. Head_dim 64 has as much of it as 128 and half
// the products: there making it again is faster (H200, 24 heads: 3.3 ms against 3.5 portable, 2.3 against 2.5 on the Hopper path).
constexpr int64_t DS_LIMIT = (int64_t)2 << 30;
// The limit on this device. The Hopper path makes dS again at head_dim 128, too, where memory is slow: writing and reading 4 bytes a pair takes
// longer than two products on an H100 (3.4 TB/s: 1.88 ms kept, 1.82 again, at the shape of the head), not on an H200 (4.8 TB/s: 1.67, 1.86).
inline int64_t ds_limit(int hd) {
    static signed char known[64] = {};                                   // per device: 0 not asked, 1 slow, -1 fast; races write equal values
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return DS_LIMIT;
    signed char& answer = known[device % 64];
    if (!answer) answer = device_info().bandwidth < 4e12 ? 1 : -1;
    return hd == 128 && answer > 0 && sm90::usable() ? 0 : DS_LIMIT;
}
// Workspace of backward: lse2 | delta | ends | dS
struct Workspace {
    int sequences = 0;                                                   // of which dS is kept at a time
    int64_t statistics, ends, ds;                                        // bytes; T rounded up to the tiles of the Hopper path
    Workspace(int B, int64_t T, int H, int hd, int64_t window, bool bf16_inputs, int64_t limit)
        : statistics(B * H * round_up(T, 128) * 4), ends(round_up(B * T * 4, 256)) {
        const int64_t one = ds_elements(H, T, (int)window) * (int64_t)sizeof(bf16), fit = std::min<int64_t>(limit / one, B);
        if (bf16_inputs && (hd == 128 || hd == 256) && fit > 0) sequences = (int)ceil_div(B, ceil_div(B, fit));   // equal parts
        ds = sequences * one;
    }
    int64_t bytes() const { return 2 * statistics + ends + ds; }
    template <class X> void give(Args<X>& a, void* workspace) const {
        char* at = (char*)workspace;
        a.lse2 = (float*)at, a.delta = (float*)(at + statistics), at += 2 * statistics;
        if (a.starts) a.ends = (const int*)at;
        if (sequences > 0 && !a.ring) a.ds = (bf16*)(at + ends), a.ds_sequences = sequences;
    }
};

// Tensor cores: a part of the batch at a time, if dS is kept
template <int = 0> inline bool backward_bf16(const Args<bf16>& a, bool hopper, Stream stream) {
    const int step = a.ds ? a.ds_sequences : a.B;
    for (int b = 0; b < a.B; b += step) {                                // lse2 and delta: padded on Hopper
        const Args<bf16> part = a.batches(b, std::min(step, a.B - b), hopper ? round_up(a.T, 128) : a.T);
        if (hopper) sm90::run_backward(part, stream);
        else if (!backward_on_tensor_cores(part, stream)) return false;
    }
    return true;
}
template <class X> inline void backward_portable(const Args<X>& a, Stream stream) {
    backward_statistics<X><<<(unsigned)ceil_div((int64_t)a.B * a.T * a.H * 8, 256), 256, 0, stream>>>(a);
    LAUNCH_CHECK();
    if constexpr (std::is_same_v<X, bf16>)
        if (backward_bf16(a, false, stream)) return;
    if (a.hd <= 64) launch_backward_plain<X, 64>(a, stream);
    else if (a.hd <= 128) launch_backward_plain<X, 128>(a, stream);
    else launch_backward_plain<X, 256>(a, stream);
}
template <class X> inline void backward(const Args<X>& a, bool portable, Stream stream) {
    if (a.starts) {
        document_ends<0><<<(unsigned)ceil_div((int64_t)a.B * a.T, 256), 256, 0, stream>>>(const_cast<int*>(a.ends), a.starts, a.B, a.T);
        LAUNCH_CHECK();
    }
    if constexpr (std::is_same_v<X, bf16>)
        if (!portable && sm90::backward_supported(a)) {                  // has statistics of its own, padded, and turns back by itself
            backward_bf16(a, true, stream);
            return;
        }
    backward_portable(a, stream);
    if (a.rope) rope_launch(a.dqkv, a.rope, -1.f, a.B, a.T, a.H, a.G, a.hd, stream);
}

inline void check(int64_t T, int64_t capacity, int H, int G, int hd) {
    if (G < 1 || H < 1 || H % G != 0) fail("attention: %d query heads in %d groups: heads must be a positive multiple of groups", H, G);
    if (hd < 8 || hd > 256 || hd % 8 != 0) fail("attention: head_dim %d: the GPU kernels need a multiple of 8 up to 256", hd);
    if (T > 1 << 29 || capacity > 1 << 29) fail("attention: T %lld, ring of %lld: at most 2^29 positions a call", (long long)T, (long long)capacity);
}

// Pairs of a query and a key it sees, where the ring holds nothing
template <class X> inline double visible_pairs(const Args<X>& a) {
    const double w = std::min<double>(a.window, a.T);
    return (w * (w + 1) / 2 + (a.T - w) * w) * a.B * a.H;
}

// An item is four values of one key or value: (b, t, group, key | value, part)
template <class X> __global__ void ring_update_kernel(X* ring, const Args<X> a, int first) {
    const int parts = a.hd / 4;
    const int64_t item = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, rows = a.T - first;
    const int part = item % parts, value = item / parts % 2, g = item / (2 * parts) % a.G;
    const int64_t row = item / ((int64_t)2 * parts * a.G), b = row / rows, t = first + row % rows;
    if (b >= a.B) return;
    X* to = ring + (((b * a.capacity + (a.position + t) % a.capacity) * 2 + value) * a.G + g) * a.hd;
    store_vec(to + part * 4, load_vec<4>(a.qkv + a.key(b, g) + value * a.hd + t * a.row() + part * 4));
}

} // namespace attn

// ---------------------------------------------------------------------------------------------------------------------

template <class X> inline attn::Args<X> attention_args(const X* qkv, const std::type_identity_t<X>* ring, int64_t capacity, int64_t position,
                                                       const int* starts, int B, int64_t T, int H, int G, int hd, int64_t window) {
    attn::check(T, capacity, H, G, hd);
    attn::Args<X> a{};
    a.qkv = qkv, a.starts = starts, a.capacity = capacity, a.position = position, a.B = B, a.T = (int)T, a.H = H, a.G = G, a.hd = hd;
    a.ring = position > 0 && capacity > 0 ? ring : nullptr;
    const int64_t visible = T + (a.ring ? std::min(position, capacity) : 0);
    a.window = (int)(window <= 0 ? visible : std::min(window, visible));
    return a;
}

// starts: (B, T) on the device, or null. portable: stay on the path that every GPU has, for tests.
// drawn (1): a counter, zero before a call and after it; calls that may run at the same time need their own, as they need their own results
template <int = 0>
inline void attention_forward(floatX* out, float* lse, const floatX* qkv, const floatX* ring, int64_t capacity, int64_t position, const int* starts,
                              int B, int64_t T, int H, int G, int hd, int64_t window, int* drawn, Stream stream = {}, bool portable = false) {
    attn::Args<floatX> a = attention_args(qkv, ring, capacity, position, starts, B, T, H, G, hd, window);
    if (B * T == 0) return;
    a.out = out, a.lse = lse, a.drawn = drawn;
    const Operation op("attention forward", (double)B * T * (2 * H + 2 * G) * hd * sizeof(floatX), 4 * attn::visible_pairs(a) * hd, stream);
    attn::forward(a, portable, stream);
}

// 16-byte aligned
inline size_t attention_backward_workspace(int B, int64_t T, int H, int, int hd, int64_t window) {
    return attn::Workspace(B, T, H, hd, window <= 0 ? T : std::min(window, T), sizeof(floatX) == 2, attn::ds_limit(hd)).bytes();
}

// Gradients of this call's queries, keys and values; those of earlier calls, in the ring, are constants. Every element of dqkv is written.
// rope (T, hd/2, 2), or null: queries and keys were turned by it (rope_forward), and the gradients are of what they were before. drawn: as above
template <int = 0>
inline void attention_backward(floatX* dqkv, const floatX* dout, const floatX* out, const floatX* qkv, const float* lse, const floatX* ring,
                               int64_t capacity, int64_t position, const int* starts, void* workspace, int B, int64_t T, int H, int G, int hd,
                               int64_t window, const float* rope, int* drawn, Stream stream = {}, bool portable = false) {
    attn::Args<floatX> a = attention_args(qkv, ring, capacity, position, starts, B, T, H, G, hd, window);
    if (B * T == 0) return;
    a.dqkv = dqkv, a.dout = dout, a.saved_out = out, a.lse = const_cast<float*>(lse), a.rope = rope, a.drawn = drawn;
    attn::Workspace(B, T, H, hd, std::min<int64_t>(a.window, T), sizeof(floatX) == 2, attn::ds_limit(hd)).give(a, workspace);
    const Operation op("attention backward", (double)B * T * (4 * H + 4 * G) * hd * sizeof(floatX), 10 * attn::visible_pairs(a) * hd, stream);
    attn::backward(a, portable, stream);
}

// The chunk's last min(T, capacity) keys and values into the ring (B, capacity, 2, G, hd), for the calls that follow
inline void ring_update(floatX* ring, const floatX* qkv, int64_t capacity, int64_t position, int B, int64_t T, int H, int G, int hd,
                        Stream stream = {}) {
    attn::check(T, capacity, H, G, hd);
    const int64_t rows = std::min(T, capacity), items = B * rows * G * 2 * (hd / 4);
    if (items == 0) return;
    attn::Args<floatX> a{};
    a.qkv = qkv, a.capacity = capacity, a.position = position, a.B = B, a.T = (int)T, a.H = H, a.G = G, a.hd = hd;
    attn::ring_update_kernel<<<ceil_div(items, 256), 256, 0, stream>>>(ring, a, (int)(T - rows));
    LAUNCH_CHECK();
}

} // namespace gpu
