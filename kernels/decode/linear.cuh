// Linear layers of a decode step: y (B,N) = in (B,K) W^T for up to 16 sequences, with what comes before and after fused. Bytes: the
// weights once, 2 NK in bf16; how they stay on their way all the time: decode.cuh. Flops, 2 BNK, do not matter.
#pragma once
#include "common.cuh"

namespace gpu {
namespace decode {

constexpr int ROWS = 8;                    // weight rows of a tile
constexpr int AHEAD = 16;                  // 16-byte loads of weights that a thread has under way

// ---------------------------------------------------------------------------------------------------------------------
// What goes into a linear layer: in (B,K). With squares (B,K/8): it is x w_norm, and 1/rms of x is applied to the result.

template <class X> struct Input {
    const X* in;
    const float* squares;                  // or null
    float eps;
};

// 1/rms of sequence b, or 1; all lanes of a warp
template <class X> __device__ inline float row_scale(const Input<X>& in, int b, int K) {
    if (!in.squares) return 1.f;
    const int n = (K + ROWS - 1) / ROWS;
    float sum = 0;
#pragma unroll 8
    for (int i = threadIdx.x % WARP; i < n; i += WARP) sum += __ldcg(in.squares + (int64_t)b * n + i);
    return 1.f / sqrtf(warp_sum(sum) / K + in.eps);
}

// row_scale() of all sequences
template <class X> __device__ inline void store_scales(float* scale /*(B), shared*/, const Input<X>& in, int B, int K) {
    for (int b = threadIdx.x / WARP; b < B; b += WARPS) {
        const float r = row_scale(in, b, K);
        if (threadIdx.x % WARP == 0) scale[b] = r;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// What comes out. A tile has RESULTS results; early() loads what the i-th needs, long before operator() gets the sums y(0..7).

struct Nothing {};

// The sum over the 8 neighbouring lanes that have a tile's columns
__device__ inline float tile_sum(float x) { return lanes_sum<ROWS>(x, 0xffu << (threadIdx.x % WARP / ROWS * ROWS)); }

template <class Y> struct StoreOutput {
    Y* y;                                  // (B,N)
    int N;
    static constexpr int RESULTS = ROWS;
    using Early = Nothing;
    __host__ __device__ int tiles() const { return (N + ROWS - 1) / ROWS; }
    __device__ int row(int tile, int r) const { return tile * ROWS + r < N ? tile * ROWS + r : -1; }
    __device__ Early early(int, int, int) const { return {}; }
    template <class Sums> __device__ void operator()(int b, int tile, int i, int, const Early&, Sums sums) const {
        if (const int j = row(tile, i); j >= 0) y[(int64_t)b * N + j] = from_float<Y>(sums(i));
    }
};

struct PartOutput {                        // of a product whose K is split between blocks
    float* parts;                          // (splits,B,N)
    int N, B;
    static constexpr int RESULTS = ROWS;
    using Early = Nothing;
    __host__ __device__ int tiles() const { return (N + ROWS - 1) / ROWS; }
    __device__ int row(int tile, int r) const { return tile * ROWS + r < N ? tile * ROWS + r : -1; }
    __device__ Early early(int, int, int) const { return {}; }
    template <class Sums> __device__ void operator()(int b, int tile, int i, int split, const Early&, Sums sums) const {
        if (const int j = row(tile, i); j >= 0) parts[((int64_t)split * B + b) * N + j] = sums(i);
    }
};

template <class X> struct ResidualOutput {  // x += result, and what the next norm makes of it
    float* x;                              // (B,N)
    X* xw;                                 // (B,N)        x w_norm; null: no norm reads this x
    float* squares;                        // (B,tiles)    of the tile's 8 columns
    const float* norm;                     // (N)
    int N;
    static constexpr int RESULTS = ROWS;
    struct Early { float x, norm; };
    __host__ __device__ int tiles() const { return (N + ROWS - 1) / ROWS; }
    __device__ int row(int tile, int r) const { return tile * ROWS + r < N ? tile * ROWS + r : -1; }
    __device__ Early early(int b, int tile, int i) const {
        const int j = row(tile, i);
        return j >= 0 ? Early{__ldcg(x + (int64_t)b * N + j), xw ? norm[j] : 0.f} : Early{0.f, 0.f};
    }
    template <class Sums> __device__ void operator()(int b, int tile, int i, int, const Early& before, Sums sums) const {
        const int j = row(tile, i);
        const float value = j >= 0 ? before.x + sums(i) : 0.f;
        if (j >= 0) x[(int64_t)b * N + j] = value;
        if (!xw) return;
        if (j >= 0) xw[(int64_t)b * N + j] = from_float<X>(value * before.norm);
        const float square = tile_sum(value * value);
        if (i == 0) squares[(int64_t)b * tiles() + tile] = square;
    }
};

template <class X> struct SwigluOutput {   // a tile: 4 rows of w1 and the same 4 of w2
    X* hidden;                             // (B,F)
    int F;
    static constexpr int RESULTS = ROWS / 2;
    using Early = Nothing;
    __host__ __device__ int tiles() const { return (F + RESULTS - 1) / RESULTS; }
    __device__ int row(int tile, int r) const {
        const int j = tile * RESULTS + r % RESULTS;
        return j < F ? j + (r >= RESULTS ? F : 0) : -1;
    }
    __device__ Early early(int, int, int) const { return {}; }
    template <class Sums> __device__ void operator()(int b, int tile, int i, int, const Early&, Sums sums) const {
        const int j = row(tile, i);
        if (j < 0) return;
        const float gate = round_to<X>(sums(i)), up = round_to<X>(sums(i + RESULTS));
        hidden[(int64_t)b * F + j] = from_float<X>(gate * sigmoid<float>(gate) * up);
    }
};

template <class X> struct ConvOutput {     // rows below e: the convolution's step and SiLU; above: z
    X *u, *z, *halo;                       // (B,e), (B,e), (B,3,e)
    const float *w, *bias;                 // (e,4), (e)
    int e;
    static constexpr int RESULTS = ROWS;
    struct Early { float x[3], w[4], bias; };
    __host__ __device__ int tiles() const { return (2 * e + ROWS - 1) / ROWS; }
    __device__ int row(int tile, int r) const { return tile * ROWS + r < 2 * e ? tile * ROWS + r : -1; }
    __device__ Early early(int b, int tile, int i) const {
        Early v{};
        const int c = row(tile, i);
        if (c < 0 || c >= e) return v;
        for (int k = 0; k < 3; k++) v.x[k] = load_fresh(halo + ((int64_t)b * 3 + k) * e + c);
        for (int k = 0; k < 4; k++) v.w[k] = w[c * 4 + k];
        v.bias = bias[c];
        return v;
    }
    template <class Sums> __device__ void operator()(int b, int tile, int i, int, const Early& v, Sums sums) const {
        const int j = row(tile, i);
        if (j < 0) return;
        const float value = round_to<X>(sums(i));
        if (j >= e) { z[(int64_t)b * e + j - e] = from_float<X>(value); return; }
        const float s = v.bias + v.w[0] * v.x[0] + v.w[1] * v.x[1] + v.w[2] * v.x[2] + v.w[3] * value;
        X* to = halo + (int64_t)b * 3 * e + j;
        to[0] = from_float<X>(v.x[1]), to[e] = from_float<X>(v.x[2]), to[2 * e] = from_float<X>(value);
        u[(int64_t)b * e + j] = from_float<X>(s * sigmoid<float>(s));
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// Linear layers

__device__ inline void mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

struct LinearShape {
    int K, B, splits;                      // splits: of K, between blocks
    int group, l2_tiles;                   // tiles whose sums fit in shared memory together; tiles to ask L2 for early
};

// The block's results of `count` tiles from `tile` on. sums(n, b, r): of the n-th of them.
template <class Output, class Sums>
__device__ inline void write_results(const Output& out, const typename Output::Early& first, bool have_first, int tile, int stride, int count,
                                     int B, int split, Sums sums, const float* scale) {
    for (int i = threadIdx.x; i < count * B * Output::RESULTS; i += THREADS) {
        const int r = i % Output::RESULTS, b = i / Output::RESULTS % B, n = i / Output::RESULTS / B;
        const float factor = scale[b];
        const auto early = have_first && i < THREADS ? first : out.early(b, tile + n * stride, r);
        out(b, tile + n * stride, r, split, early, [&](int row) { return sums(n, b, row) * factor; });
    }
}

// The operands that write_results() will want first in this thread
template <class Output> __device__ inline typename Output::Early early_operands(const Output& out, int tile, int stride, int count, int B) {
    const int i = threadIdx.x, r = i % Output::RESULTS, b = i / Output::RESULTS % B, n = i / Output::RESULTS / B;
    return n < count ? out.early(b, tile + n * stride, r) : typename Output::Early{};
}

// A block's part of a product: tiles first, first + stride, .., and of the columns `width` blocks of 32 from the k0-th on
struct Work {
    int split, first, stride, k0, width;
    __device__ explicit Work(const LinearShape& s) {
        split = blockIdx.x % s.splits, first = blockIdx.x / s.splits, stride = gridDim.x / s.splits;
        const int blocks = s.K / 32, share = (blocks + s.splits - 1) / s.splits;
        k0 = split * share, width = max(0, min(blocks - k0, share));
    }
    __device__ int turns() const { return (width + WARPS - 1) / WARPS; }          // of a warp: it takes every 8th block
};

// Asks L2 for the rows of the block's first tiles, a row a thread, but for those whose loads are under way
template <class Output>
__device__ inline void prefetch_tiles(const Output& out, int tiles, const __nv_bfloat16* w, const LinearShape& s, const Work& part, int turns) {
    const int tile = part.first + (int)(threadIdx.x / ROWS) * part.stride;
    const int row = (int)(threadIdx.x / ROWS) < s.l2_tiles && tile < tiles ? out.row(tile, threadIdx.x % ROWS) : -1;
    if (row >= 0 && (int)(threadIdx.x / ROWS) * turns >= AHEAD - turns) prefetch_l2(w + (int64_t)row * s.K + part.k0 * 32, part.width * 64);
}

// The block's columns of the input and the scales into shared memory
__device__ inline void bring_input(__nv_bfloat16* xs /*(B,ld)*/, int ld, float* scale /*(B)*/, const Input<__nv_bfloat16>& in, int B, int K,
                                   const Work& part) {
    for (int i = threadIdx.x; i < B * part.width * 4; i += THREADS) {
        const int b = i / (part.width * 4), j = i % (part.width * 4) * 8;
        copy_async<16>(xs + b * ld + j, in.in + (int64_t)b * K + part.k0 * 32 + j);
    }
    store_scales(scale, in, B, K);
    copy_async_commit();
    copy_async_wait();
    __syncthreads();
}

// A block of 32 columns: low, high: the lane's 8 of sequences g and g + 8; w: of weight row g
__device__ inline void mma_k32(float (&c)[4], const uint4& low, const uint4& high, const uint4& w) {
    mma(c, low.x, high.x, low.y, high.y, w.x, w.y);
    mma(c, low.z, high.z, low.w, high.w, w.z, w.w);
}

// A warp's sums of a tile are complete: the next tile's begin at zero
template <int C> __device__ inline void keep_sums(float* to, float (&acc)[4]) {
#pragma unroll
    for (int c = 0; c < C; c++) to[c] = acc[c];
    acc[0] = acc[1] = acc[2] = acc[3] = 0;
}

// The sum of sequence b and row r of the n-th tile, over the warps in order: lane (b % 8, r / 2), result (b / 8, r % 2) of mma
template <int C> __device__ inline float sum_of_warps(const float* partial /*(group,WARPS,WARP,C)*/, int n, int b, int r) {
    const float* from = partial + ((n * WARPS) * WARP + b % 8 * 4 + r / 2) * C + b / 8 * 2 + r % 2;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) sum += from[i * WARP * C];
    return sum;
}

// The warp's sums of `count` tiles. v: the first weights; next(): those after them, in the order in which they are used
template <bool WIDE, class Next>
__device__ inline void multiply_tiles(float* partial /*(count,WARPS,WARP,C)*/, uint4 (&v)[AHEAD], const Next& next,
                                      const __nv_bfloat16* xs /*(B,ld)*/, int ld, int count, int turns, int width, int B) {
    constexpr int C = WIDE ? 4 : 2;                    // of mma's four results
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    int n = 0, turn = 0;
    float acc[4] = {};
    while (n < count) {
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            if (n < count) {
                const int k = warp + WARPS * turn;
                uint4 low = make_uint4(0, 0, 0, 0), high = low;
                if (k < width) {
                    if (g < B) low = *(const uint4*)(xs + g * ld + k * 32 + t * 8);
                    if (WIDE && g + 8 < B) high = *(const uint4*)(xs + (g + 8) * ld + k * 32 + t * 8);
                }
                mma_k32(acc, low, high, v[j]);
                v[j] = next();
                if (++turn == turns) {
                    keep_sums<C>(partial + ((n * WARPS + warp) * WARP + lane) * C, acc);
                    turn = 0, n++;
                }
            }
        }
    }
}

// bf16, K a multiple of 32. WIDE: more than 8 sequences.
template <bool WIDE, class Output>
__global__ void __launch_bounds__(THREADS, 2) linear_kernel(const __nv_bfloat16* w, LinearShape s, Input<__nv_bfloat16> in, Output out) {
    using X = __nv_bfloat16;
    constexpr int C = WIDE ? 4 : 2;                    // of mma's four results
    extern __shared__ uint4 shared[];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    const int tiles = out.tiles();
    const Work part(s);
    const int turns = part.turns(), ld = part.width * 32 + 32;                          // a row's end shifts the next by half the banks
    X* xs = (X*)shared;                                                           // (B,ld)
    float* scale = (float*)(xs + (int64_t)s.B * ld);                              // (B)
    float* partial = scale + MAX_BATCH;                                           // (group,WARPS,WARP,C)

    // The block's weights in the order in which they are used: tile after tile, and in each the warp's blocks of columns
    struct Cursor { int tile, turn; } ahead{part.first, 0};
    int end = tiles;
    const auto load_next = [&]() {
        uint4 v = make_uint4(0, 0, 0, 0);
        const int k = warp + WARPS * ahead.turn, row = ahead.tile < end ? out.row(ahead.tile, g) : -1;
        if (row >= 0 && k < part.width) v = load_weights(w + (int64_t)row * s.K + (part.k0 + k) * 32 + t * 8);
        if (++ahead.turn == turns) ahead.turn = 0, ahead.tile += part.stride;
        return v;
    };

    bool waited = false;
    typename Output::Early early{};
    for (int group = part.first; group < tiles; group += s.group * part.stride) {
        const int count = min(s.group, (tiles - group + part.stride - 1) / part.stride);
        end = min(tiles, group + s.group * part.stride);
        ahead = {group, 0};
        uint4 v[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) v[j] = load_next();
        if (!waited) {
            prefetch_tiles(out, tiles, w, s, part, turns);
            wait_for_input();
            early = early_operands(out, part.first, part.stride, count, s.B);
            bring_input(xs, ld, scale, in, s.B, s.K, part);
        }
        multiply_tiles<WIDE>(partial, v, load_next, xs, ld, count, turns, part.width, s.B);
        __syncthreads();
        const auto sums = [&](int n, int b, int r) { return sum_of_warps<C>(partial, n, b, r); };
        write_results(out, early, !waited, group, part.stride, count, s.B, part.split, sums, scale);
        waited = true;
        __syncthreads();
    }
    if (!waited) wait_for_input();
}

// Any type, any size: warp r computes row r of a tile
template <class X, class Output>
__global__ void __launch_bounds__(THREADS) linear_plain_kernel(const X* w, LinearShape s, Input<X> in, Output out) {
    __shared__ float scale[MAX_BATCH], results[ROWS][MAX_BATCH];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int tiles = out.tiles(), split = blockIdx.x % s.splits, first = blockIdx.x / s.splits, stride = gridDim.x / s.splits;
    const int share = (s.K + s.splits - 1) / s.splits, k0 = split * share, k1 = min(s.K, k0 + share);
    wait_for_input();
    store_scales(scale, in, s.B, s.K);
    for (int tile = first; tile < tiles; tile += stride) {
        float acc[MAX_BATCH] = {};
        const int row = out.row(tile, warp);
        for (int k = k0 + lane; row >= 0 && k < k1; k += WARP) {
            const float wk = to_float(w[(int64_t)row * s.K + k]);
#pragma unroll
            for (int b = 0; b < MAX_BATCH; b++)
                if (b < s.B) acc[b] += wk * load_fresh(in.in + (int64_t)b * s.K + k);
        }
#pragma unroll
        for (int b = 0; b < MAX_BATCH; b++) {
            const float sum = warp_sum(acc[b]);
            if (lane == 0) results[warp][b] = sum;
        }
        __syncthreads();
        write_results(out, {}, false, tile, stride, 1, s.B, split, [&](int, int b, int r) { return results[r][b]; }, scale);
        __syncthreads();
    }
}

template <class X, class Output> inline void linear(const X* w, int B, int K, int splits, Input<X> in, Output out, Stream stream) {
    if (B < 1 || B > MAX_BATCH) fail("decode: %d sequences at a time; from 1 to %d are possible", B, MAX_BATCH);
    const int tiles = out.tiles(), grid = std::max(1, std::min(tiles, gpu().sms / splits)) * splits, mine = (int)ceil_div(tiles, grid / splits);
    if constexpr (sizeof(X) == 2) {
        const int C = B > 8 ? 4 : 2, width = (int)ceil_div(K / 32, splits);
        const int64_t fixed = (int64_t)B * (width * 32 + 32) * sizeof(X) + MAX_BATCH * sizeof(float), tile_bytes = WARPS * WARP * C * sizeof(float);
        const int64_t group = std::min<int64_t>(mine, (gpu().shared - fixed) / tile_bytes);
        if (K % 32 == 0 && group >= 1 && (uintptr_t)w % 16 == 0) {
            const size_t shared = (size_t)(fixed + group * tile_bytes);
            const LinearShape shape{K, B, splits, (int)group, (int)std::min<int64_t>(mine, gpu().l2_ahead / ((int64_t)grid * ROWS * width * 64))};
            if (B > 8) launch(linear_kernel<true, Output>, dim3((unsigned)grid), THREADS, shared, stream, w, shape, in, out);
            else launch(linear_kernel<false, Output>, dim3((unsigned)grid), THREADS, shared, stream, w, shape, in, out);
            return;
        }
    }
    launch(linear_plain_kernel<X, Output>, dim3((unsigned)grid), THREADS, 0, stream, w, LinearShape{K, B, splits, 1, 0}, in, out);
}

} // namespace decode
} // namespace gpu
