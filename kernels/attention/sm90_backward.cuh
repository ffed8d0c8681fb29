// The backward pass of Hopper attention: its kernels' launches, and the statistics where score gradients are kept. The scheme:
// attention_sm90.cuh.
#pragma once
#include "sm90_backward_keys.cuh"
#include "sm90_backward_product.cuh"
#include "sm90_backward_queries.cuh"

#ifdef __CUDACC__
namespace gpu {
namespace sm90 {

// A block takes ROWS positions of one owner (b, h), eight lanes each.
template <int HD> __global__ void __launch_bounds__(256)
backward_statistics(const Problem a) {
    results_allow_next();
    constexpr int LANES = 8, STEP = 256 / LANES;
    const int tiles = a.padded / ROWS, owner = blockIdx.x / tiles, t0 = blockIdx.x % tiles * ROWS + threadIdx.x / LANES;
    const int64_t first = ((int64_t)(owner / a.H) * a.T * a.H + owner % a.H) * HD + threadIdx.x % LANES * 8, stride = (int64_t)a.H * HD;
#pragma unroll
    for (int t = t0; t < t0 + ROWS; t += STEP) {
        float sum = 0.f;
        if (t < a.T)
#pragma unroll
            for (int d = 0; d < HD; d += LANES * 8) {
                const Vec<bf16, 8> x = load_vec<8>(a.dout + first + t * stride + d), y = load_vec<8>(a.saved_out + first + t * stride + d);
#pragma unroll
                for (int i = 0; i < 8; i++) sum += to_float(x[i]) * to_float(y[i]);
            }
#pragma unroll
        for (int o = LANES / 2; o > 0; o /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, o);
        if (threadIdx.x % LANES != 0) continue;
        const int64_t at = (int64_t)owner * a.padded + t;
        a.delta[at] = sum;
        a.lse2[at] = t < a.T ? a.lse[(int64_t)owner * a.T + t] * attn::LOG2E : INFINITY;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Launches

static_assert(backward_queries_shared<128>() <= SHARED_LIMIT && backward_keys_shared<128>() <= SHARED_LIMIT);
static_assert(backward_product_shared<128>() <= SHARED_LIMIT);
template <int HD> inline void launch_statistics(const Args<bf16>& a, Stream stream) {
    backward_statistics<HD><<<(unsigned)(ceil_div(a.T, ROWS) * a.B * a.H), 256, 0, stream>>>(problem(a));
    LAUNCH_CHECK();
}
inline CUtensorMap dqkv_map(const Args<bf16>& a) { return tensor_map(a.dqkv, a.B, a.T, a.H + 2 * a.G, a.hd, 64); }
// dk and dv; dS is kept if a.ds
template <int HD> inline void launch_keys(const Args<bf16>& a, Stream stream) {
    launch_resident(a.starts ? backward_keys<HD, true> : backward_keys<HD, false>, problem(a), (int64_t)a.B * a.G, false, EARLY,
                    backward_keys_shared<HD>(), stream, qkv_map(a, STEP_ROWS), tensor_map(a.dout, a.B, a.T, a.H, HD, STEP_ROWS), dqkv_map(a));
}
// dq from dS
inline void launch_product(const Args<bf16>& a, Stream stream) {         // of head_dim 64 dS is not kept: DS_LIMIT in attention.cuh
    launch_resident(backward_product<128>, problem(a), (int64_t)a.B * a.H, true, EARLY, backward_product_shared<128>(), stream, qkv_map(a, ROWS),
                    dqkv_map(a));
}
// dq with S and dP made again, and the statistics
template <int HD> inline void launch_queries(const Args<bf16>& a, Stream stream) {
    launch_resident(a.ring || a.starts ? backward_queries<HD, true> : backward_queries<HD, false>, problem(a), (int64_t)a.B * a.H, true, ORDERLY,
                    backward_queries_shared<HD>(), stream, qkv_map(a, ROWS), ring_map(a), tensor_map(a.dout, a.B, a.T, a.H, HD, ROWS),
                    tensor_map(a.saved_out, a.B, a.T, a.H, HD, ROWS), dqkv_map(a));
}
template <int HD> inline void launch_backward(const Args<bf16>& a, Stream stream) {
    if (HD == 128 && a.ds) {
        launch_statistics<HD>(a, stream);
        launch_keys<HD>(a, stream);
        launch_product(a, stream);
    } else {
        launch_queries<HD>(a, stream);
        launch_keys<HD>(a, stream);
    }
}

} // namespace sm90
} // namespace gpu
#endif // __CUDACC__
