// Token embedding.   out[i,:] = wte[tokens[i],:]     dwte[tokens[i],:] += dout[i,:]
// out, dout, dwte fp32 (the residual stream and its gradient), wte X. Forward reads 2d and writes 4d bytes a token: 302 MB at
// 32768 x 1536, 0.10 ms at 3 TB/s. Backward reads 4d, and reads and writes 4d a distinct token.
//
// Backward without atomics: (token, position) pairs are sorted by token (stable), so each token's positions form a segment, in order.
//   1. every block adds up EMBEDDING_CHUNK consecutive pairs; a segment inside the chunk goes to dwte, the pieces of one that
//      crosses its ends go to partial (at most one piece at each end)
//   2. the chunk in which a crossing segment begins adds its pieces in order
// A token on every tenth position is thus shared by about a hundred blocks. Tokens must be in [0,V): the loader checks that.
#pragma once
#include <climits>

#include <cub/device/device_radix_sort.cuh>

#include "device.cuh"
#include "measure.cuh"
#include "rmsnorm.cuh"   // aligned_16, row_threads

namespace gpu {

constexpr int EMBEDDING_CHUNK = 32;   // positions

template <int W, class X> __global__ void embedding_forward_kernel(float* out, const int* tokens, const X* wte, int d) {
    const int64_t i = blockIdx.x;
    const X* row = wte + (int64_t)tokens[i] * d;
    for (int c = threadIdx.x * W; c < d; c += blockDim.x * W) {
        const auto x = load_vec<W>(row + c);
        Vec<float, W> y;
#pragma unroll
        for (int k = 0; k < W; k++) y[k] = to_float(x[k]);
        store_vec(out + i * d + c, y);
    }
}

inline void embedding_forward(float* out /*(BT,d)*/, const int* tokens /*(BT)*/, const floatX* wte /*(V,d)*/, int64_t BT, int d, Stream stream) {
    const Operation op("embedding forward", (double)BT * d * (4 + sizeof(floatX)), 0, stream);
    if (d % 4 == 0 && aligned_16(out) && aligned_16(wte))
        embedding_forward_kernel<4><<<(unsigned)BT, row_threads(d / 4), 0, stream>>>(out, tokens, wte, d);
    else
        embedding_forward_kernel<1><<<(unsigned)BT, row_threads(d), 0, stream>>>(out, tokens, wte, d);
    LAUNCH_CHECK();
}

template <int THREADS> __global__ void positions_kernel(int* positions, int64_t n) {
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < n) positions[i] = (int)i;
}

template <int W> __device__ inline Vec<float, W> operator+(Vec<float, W> x, const Vec<float, W>& y) {
#pragma unroll
    for (int k = 0; k < W; k++) x[k] += y[k];
    return x;
}

// Stage 1. partial (chunks,2,d): [0] the piece of a segment that began in an earlier chunk, [1] of one that begins here and goes on.
template <int W, class X>
__global__ void embedding_chunk_kernel(float* dwte, float* partial, ResidualGradient<X> dout, const int* tokens /*sorted*/,
                                       const int* positions, int64_t BT, int V, int d) {
    constexpr int GROUP = 4;   // rows in flight
    __shared__ int token[EMBEDDING_CHUNK + 2], position[EMBEDDING_CHUNK];   // token[i + 1] belongs to pair i; its neighbours at both ends
    const int64_t chunk = blockIdx.x, first = chunk * EMBEDDING_CHUNK;
    const int count = (int)(BT - first < EMBEDDING_CHUNK ? BT - first : EMBEDDING_CHUNK);
    for (int i = threadIdx.x; i < count + 2; i += blockDim.x) {
        const int64_t p = first + i - 1;
        token[i] = p >= 0 && p < BT ? tokens[p] : -1;
        if (i < count) position[i] = positions[first + i];
    }
    __syncthreads();
    const int c = (blockIdx.y * blockDim.x + threadIdx.x) * W;
    if (c >= d) return;
    Vec<float, W> sum{};
    bool began_here = token[0] != token[1];
    for (int base = 0; base < count; base += GROUP) {
        Vec<float, W> rows[GROUP], before[GROUP];                               // before: of dwte, where a segment ends
#pragma unroll
        for (int k = 0; k < GROUP; k++) {
            if (base + k >= count) break;
            const int t = token[base + k + 1];
            rows[k] = load_gradient<W>(dout, (int64_t)position[base + k] * d + c);
            if (token[base + k + 2] != t && t >= 0 && t < V) before[k] = load_vec<W>(dwte + (int64_t)t * d + c);
        }
#pragma unroll
        for (int k = 0; k < GROUP; k++) {
            const int i = base + k;
            if (i >= count) break;
            const int t = token[i + 1];
#pragma unroll
            for (int j = 0; j < W; j++) sum[j] += rows[k][j];
            const bool ends = token[i + 2] != t;
            if (!ends && i + 1 < count) continue;
            if (!began_here) store_vec(partial + (chunk * 2 + 0) * d + c, sum);
            else if (!ends) store_vec(partial + (chunk * 2 + 1) * d + c, sum);
            else if (t >= 0 && t < V) store_vec(dwte + (int64_t)t * d + c, before[k] + sum);
            sum = {};
            began_here = true;
        }
    }
}

// Stage 2: the chunk in which a segment begins that goes on in the next chunk adds that segment's pieces.
template <int W>
__global__ void embedding_join_kernel(float* dwte, const float* partial, const int* tokens /*sorted*/, int64_t BT, int V, int d) {
    const int64_t chunk = blockIdx.x, first = chunk * EMBEDDING_CHUNK, last = first + EMBEDDING_CHUNK - 1;
    if (last + 1 >= BT) return;
    const int t = tokens[last];
    if (tokens[last + 1] != t || (first > 0 && tokens[first - 1] == t) || t < 0 || t >= V) return;
    int64_t end = last + 1, beyond = BT;   // the segment's last position is in [end, beyond)
    while (beyond - end > 1) {
        const int64_t middle = (end + beyond) / 2;
        if (tokens[middle] <= t) end = middle;
        else beyond = middle;
    }
    const int c = (blockIdx.y * blockDim.x + threadIdx.x) * W;
    if (c >= d) return;
    auto sum = load_vec<W>(partial + (chunk * 2 + 1) * d + c);
#pragma unroll 8
    for (int64_t next = chunk + 1; next <= end / EMBEDDING_CHUNK; next++) {
        const auto piece = load_vec<W>(partial + next * 2 * d + c);
#pragma unroll
        for (int k = 0; k < W; k++) sum[k] += piece[k];
    }
    store_vec(dwte + (int64_t)t * d + c, load_vec<W>(dwte + (int64_t)t * d + c) + sum);
}

// Parts of the workspace, in bytes from its start; every part begins at a multiple of 256
struct EmbeddingWorkspace { size_t sorted_tokens, positions, sorted_positions, partial, sort, sort_bytes, total; int token_bits; };

inline EmbeddingWorkspace embedding_workspace(int64_t BT, int V, int d) {
    if (BT > INT_MAX) fail("embedding_backward of %lld tokens: a micro-batch may have 2^31-1; use a smaller --micro-batch", (long long)BT);
    EmbeddingWorkspace w{};
    for (w.token_bits = 1; w.token_bits < 31 && (1ll << w.token_bits) < V;) w.token_bits++;
    const int *in = nullptr;
    int *out = nullptr;
    CUDA_CHECK(cub::DeviceRadixSort::SortPairs(nullptr, w.sort_bytes, in, out, in, out, (int)BT, 0, w.token_bits));   // asks for the bytes only
    auto take = [&](size_t bytes) { const size_t at = w.total; w.total += (size_t)round_up((int64_t)bytes, 256); return at; };
    w.sorted_tokens = take(BT * sizeof(int));
    w.positions = take(BT * sizeof(int));
    w.sorted_positions = take(BT * sizeof(int));
    w.partial = take((size_t)ceil_div(BT, EMBEDDING_CHUNK) * 2 * d * sizeof(float));
    w.sort = take(w.sort_bytes);
    return w;
}

inline size_t embedding_backward_workspace(int64_t BT, int V, int d) { return embedding_workspace(BT, V, d).total; }

template <int W>
inline void embedding_sum(float* dwte, float* partial, ResidualGradient<floatX> dout, const int* tokens, const int* positions, int64_t BT,
                          int V, int d, Stream stream) {
    const int threads = row_threads(d / W);
    const dim3 grid((unsigned)ceil_div(BT, EMBEDDING_CHUNK), (unsigned)ceil_div(d / W, threads));
    embedding_chunk_kernel<W><<<grid, threads, 0, stream>>>(dwte, partial, dout, tokens, positions, BT, V, d);
    LAUNCH_CHECK();
    embedding_join_kernel<W><<<grid, threads, 0, stream>>>(dwte, partial, tokens, BT, V, d);
    LAUNCH_CHECK();
}

inline void embedding_backward(float* dwte /*(V,d) +=*/, ResidualGradient<floatX> dout /*(BT,d)*/, const int* tokens /*(BT)*/,
                               void* workspace /*256-byte aligned*/, int64_t BT, int V, int d, Stream stream) {
    const Operation op("embedding backward", (double)BT * d * (sizeof(floatX) + HAS_LOW_PLANE<floatX>), 0, stream);
    EmbeddingWorkspace w = embedding_workspace(BT, V, d);
    char* base = (char*)workspace;
    int *sorted = (int*)(base + w.sorted_tokens), *positions = (int*)(base + w.positions), *sorted_positions = (int*)(base + w.sorted_positions);
    float* partial = (float*)(base + w.partial);
    positions_kernel<256><<<(unsigned)ceil_div(BT, 256), 256, 0, stream>>>(positions, BT);
    LAUNCH_CHECK();
    CUDA_CHECK(cub::DeviceRadixSort::SortPairs(base + w.sort, w.sort_bytes, tokens, sorted, (const int*)positions, sorted_positions, (int)BT,
                                               0, w.token_bits, stream));
    if (d % 4 == 0 && aligned_16(dwte) && aligned_16(dout.high) && aligned_16(dout.low) && aligned_16(workspace))
        embedding_sum<4>(dwte, partial, dout, sorted, sorted_positions, BT, V, d, stream);
    else
        embedding_sum<1>(dwte, partial, dout, sorted, sorted_positions, BT, V, d, stream);
}

} // namespace gpu
