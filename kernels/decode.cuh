// One token for each of up to 16 sequences: the steps of a layer, fused. Formulas: kernels/cpu/decode.h.
//
// Everything here is bound by memory: each weight is read once and used B times. Samba-421M in bf16 reads 0.84 GB of weights, and of
// each sequence 75 MB of ring and 2.4 MB of scan state (read and written): 0.22 ms a token at 4.2 TB/s, of which a step
// makes 68 kernels of 3 us. So what counts is that memory never waits for the chain of small dependent results:
//   - weights do not depend on it. A kernel starts while the one before it still runs (programmatic dependent launch), brings its
//     first weights (64 KiB an SM) into registers and asks L2 for the rest, and only then waits for its input.
//   - a kernel triggers the next one after its own wait, so at most two are under way, and what a kernel reads before its wait must
//     be older than the kernel before it: weights, its layer's own state, the position.
//   - activations go through L2 (ld.cg): the kernel before wrote them while this one was already resident.
//
// Linear layers, bf16: a block takes tiles of 8 weight rows, its 8 warps take the blocks of 32 columns in turn. mma m16n8k16 with
// the sequences as its 16 rows and the weights as its 8 columns: the dot product does not care about the order of k, so a lane's 16
// bytes of a row are its operands for two mma as they come, without shared memory. The warps' sums are added in order. float, and
// sizes that are no multiples of 32: a warp a row, fp32 FMA.
//
// RMSNorm is applied as y = r (W (x w_norm)): whoever writes x also writes xw = x w_norm and the sums of squares of each 8 columns,
// so that the reader copies xw as it is and needs r only at the end.
#pragma once
#include <algorithm>
#include <type_traits>

#include "device.cuh"
#include "random.h"
#include "rope.cuh"

namespace gpu {
namespace decode {

constexpr int MAX_BATCH = 16;
constexpr int THREADS = 256, WARPS = THREADS / WARP;
constexpr int ROWS = 8;                    // weight rows of a tile
constexpr int AHEAD = 16;                  // 16-byte loads of weights that a thread has under way
constexpr int64_t L2_AHEAD = 24 << 20;     // bytes of weights that a kernel asks L2 for before its input is there

struct Gpu { int sms, shared; bool dependent_launch; };
inline const Gpu& gpu() {
    static const Gpu g = [] {
        int device = 0, sms = 0, shared = 0, major = 0;
        CUDA_CHECK(cudaGetDevice(&device));
        CUDA_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
        CUDA_CHECK(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
        CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
        return Gpu{sms, shared, major >= 9};
    }();
    return g;
}

// ---------------------------------------------------------------------------------------------------------------------
// Dependent launches and loads

__device__ inline void wait_for_input() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ inline uint4 load_weights(const void* p) {          // read once: past L1
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
__device__ inline void prefetch_l2(const void* p, unsigned bytes /*of 16*/) {
#if __CUDA_ARCH__ >= 900
    if (bytes) asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes));
#endif
}
__device__ inline float load_fresh(const float* p) { return __ldcg(p); }
__device__ inline float load_fresh(const __nv_bfloat16* p) {
    const unsigned short bits = __ldcg((const unsigned short*)p);
    return __bfloat162float(__ushort_as_bfloat16(bits));
}
__device__ inline void copy_16(void* to_shared, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((unsigned)__cvta_generic_to_shared(to_shared)), "l"(from) : "memory");
}
__device__ inline void copies_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }
template <class X> __device__ inline float round_to(float v) { return to_float(from_float<X>(v)); }
__device__ inline float fast_sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

// A launch that may begin before the kernel in front of it has ended
template <class Kernel, class... Args> inline void launch(Kernel kernel, dim3 grid, int threads, size_t shared, Stream stream, Args... args) {
    if (shared > 48 * 1024) CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3((unsigned)threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = gpu().dependent_launch ? 1 : 0;
    CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, args...));
}

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

// ---------------------------------------------------------------------------------------------------------------------
// What comes out. A tile has RESULTS results; early() loads what the i-th needs, long before operator() gets the sums y(0..7).

struct Nothing {};

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
        float square = value * value;                  // 8 neighbouring lanes have the 8 columns
        const unsigned eight = 0xffu << (threadIdx.x % WARP / ROWS * ROWS);
#pragma unroll
        for (int o = ROWS / 2; o > 0; o /= 2) square += __shfl_xor_sync(eight, square, o);
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
        hidden[(int64_t)b * F + j] = from_float<X>(gate * fast_sigmoid(gate) * up);
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
        u[(int64_t)b * e + j] = from_float<X>(s * fast_sigmoid(s));
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// Linear layers

__device__ inline void mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

struct LinearShape { int K, B, splits, group; };       // group: tiles whose sums fit in shared memory together

// The block's results of `count` tiles from `tile` on. sums(n, b, r): of the n-th of them.
template <class Output, class Sums>
__device__ inline void write_results(const Output& out, const typename Output::Early& first, bool have_first, int tile, int stride, int count, int B, int split, Sums sums, const float* scale) {
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

// bf16, K a multiple of 32. WIDE: more than 8 sequences.
template <bool WIDE, class Output>
__global__ void __launch_bounds__(THREADS, 2) linear_kernel(const __nv_bfloat16* w, LinearShape s, Input<__nv_bfloat16> in, Output out) {
    using X = __nv_bfloat16;
    constexpr int C = WIDE ? 4 : 2;                    // of mma's four results
    extern __shared__ uint4 shared[];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    const int tiles = out.tiles(), split = blockIdx.x % s.splits, first = blockIdx.x / s.splits, stride = gridDim.x / s.splits;
    const int blocks = s.K / 32, share = (blocks + s.splits - 1) / s.splits, k0 = split * share, width = max(0, min(blocks - k0, share));   // in blocks of 32
    const int turns = (width + WARPS - 1) / WARPS, ld = width * 32 + 32;          // a row's end shifts the next by half the banks
    X* xs = (X*)shared;                                                           // (B,ld)
    float* scale = (float*)(xs + (int64_t)s.B * ld);                              // (B)
    float* partial = scale + MAX_BATCH;                                           // (group,WARPS,WARP,C)

    // The block's weights in the order in which they are used: tile after tile, and in each the warp's blocks of columns
    struct Cursor { int tile, turn; } ahead{first, 0};
    int end = tiles;
    const auto load_next = [&]() {
        uint4 v = make_uint4(0, 0, 0, 0);
        const int k = warp + WARPS * ahead.turn, row = ahead.tile < end ? out.row(ahead.tile, g) : -1;
        if (row >= 0 && k < width) v = load_weights(w + (int64_t)row * s.K + (k0 + k) * 32 + t * 8);
        if (++ahead.turn == turns) ahead.turn = 0, ahead.tile += stride;
        return v;
    };

    bool waited = false;
    typename Output::Early early{};
    for (int group = first; group < tiles; group += s.group * stride) {
        const int count = min(s.group, (tiles - group + stride - 1) / stride);
        end = min(tiles, group + s.group * stride);
        ahead = {group, 0};
        uint4 v[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) v[j] = load_next();
        if (!waited) {
            const int most = (int)min((int64_t)THREADS / ROWS, L2_AHEAD / ((int64_t)gridDim.x * ROWS * width * 64));   // tiles to ask L2 for
            const int tile = first + (int)(threadIdx.x / ROWS) * stride, row = threadIdx.x / ROWS < most && tile < tiles ? out.row(tile, threadIdx.x % ROWS) : -1;
            if (row >= 0 && (int)(threadIdx.x / ROWS) * turns >= AHEAD - turns) prefetch_l2(w + (int64_t)row * s.K + k0 * 32, width * 64);
            wait_for_input();
            early = early_operands(out, first, stride, count, s.B);
            for (int i = threadIdx.x; i < s.B * width * 4; i += THREADS) {
                const int b = i / (width * 4), j = i % (width * 4) * 8;
                copy_16(xs + b * ld + j, in.in + (int64_t)b * s.K + k0 * 32 + j);
            }
            for (int b = warp; b < s.B; b += WARPS) {
                const float r = row_scale(in, b, s.K);
                if (lane == 0) scale[b] = r;
            }
            copies_done();
            __syncthreads();
        }
        int n = 0, turn = 0;
        float acc[4] = {};
        while (n < count) {
#pragma unroll
            for (int j = 0; j < AHEAD; j++) {
                if (n < count) {
                    const int k = warp + WARPS * turn;
                    uint4 low = make_uint4(0, 0, 0, 0), high = low;
                    if (k < width) {
                        if (g < s.B) low = *(const uint4*)(xs + g * ld + k * 32 + t * 8);
                        if (WIDE && g + 8 < s.B) high = *(const uint4*)(xs + (g + 8) * ld + k * 32 + t * 8);
                    }
                    mma(acc, low.x, high.x, low.y, high.y, v[j].x, v[j].y);
                    mma(acc, low.z, high.z, low.w, high.w, v[j].z, v[j].w);
                    v[j] = load_next();
                    if (++turn == turns) {
                        float* to = partial + ((n * WARPS + warp) * WARP + lane) * C;
#pragma unroll
                        for (int c = 0; c < C; c++) to[c] = acc[c];
                        acc[0] = acc[1] = acc[2] = acc[3] = 0;
                        turn = 0, n++;
                    }
                }
            }
        }
        __syncthreads();
        const auto sums = [&](int tile, int b, int r) {                           // lane (b % 8, r / 2), result (b / 8, r % 2) of mma
            const float* from = partial + ((tile * WARPS) * WARP + b % 8 * 4 + r / 2) * C + b / 8 * 2 + r % 2;
            float sum = 0;
#pragma unroll
            for (int i = 0; i < WARPS; i++) sum += from[i * WARP * C];
            return sum;
        };
        write_results(out, early, !waited, group, stride, count, s.B, split, sums, scale);
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
    for (int b = warp; b < s.B; b += WARPS) {
        const float r = row_scale(in, b, s.K);
        if (lane == 0) scale[b] = r;
    }
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
            const LinearShape shape{K, B, splits, (int)group};
            if (B > 8) launch(linear_kernel<true, Output>, dim3((unsigned)grid), THREADS, shared, stream, w, shape, in, out);
            else launch(linear_kernel<false, Output>, dim3((unsigned)grid), THREADS, shared, stream, w, shape, in, out);
            return;
        }
    }
    launch(linear_plain_kernel<X, Output>, dim3((unsigned)grid), THREADS, 0, stream, w, LinearShape{K, B, splits, 1}, in, out);
}

// ---------------------------------------------------------------------------------------------------------------------
// The scan's step. 16 lanes take a channel of a sequence: a state each, and the dot product of dt_proj together.

constexpr int TEAM = 16, DT_AHEAD = 16;    // dt_proj's row: 16 x 16 values in registers, the rest (d_model over 4096) as it comes

__device__ inline float team_sum(float x) {
#pragma unroll
    for (int o = TEAM / 2; o > 0; o /= 2) x += __shfl_xor_sync(0xffffffffu, x, o);
    return x;
}

template <class X> struct ScanArgs {
    X* out;
    float* h;
    const float* parts;
    const X *u, *z, *dt_proj;
    const float *A_log, *D, *dt_bias;
    int B, e, N, rank, splits, channels;   // channels a block
};

template <class X> __global__ void __launch_bounds__(THREADS) scan_kernel(ScanArgs<X> a) {
    extern __shared__ float x_dbl[];       // (B, rank + 2N)
    const int sub = threadIdx.x % TEAM, team = threadIdx.x / TEAM, width = a.rank + 2 * a.N, c0 = blockIdx.x * a.channels, count = min(a.channels, a.e - c0);
    float row[DT_AHEAD], h0 = 0, A0 = 0;
    const auto load = [&](int task) {      // what does not depend on the token
        const int b = task / count, c = c0 + task % count;
        const bool live = task < a.B * count;
#pragma unroll
        for (int i = 0; i < DT_AHEAD; i++) row[i] = live && sub + i * TEAM < a.rank ? to_float(a.dt_proj[(int64_t)c * a.rank + sub + i * TEAM]) : 0.f;
        h0 = live && sub < a.N ? __ldcg(a.h + ((int64_t)b * a.e + c) * a.N + sub) : 0.f;
        A0 = live && sub < a.N ? -expf(a.A_log[(int64_t)c * a.N + sub]) : 0.f;
    };
    load(team);
    wait_for_input();
    for (int i = threadIdx.x; i < a.B * width; i += THREADS) {
        float sum = 0;
#pragma unroll 8
        for (int split = 0; split < a.splits; split++) sum += __ldcg(a.parts + (int64_t)split * a.B * width + i);
        x_dbl[i] = round_to<X>(sum);
    }
    __syncthreads();
    const int tasks = a.B * count;
    for (int task = team; task - team < tasks; task += THREADS / TEAM) {         // all lanes of a warp take part in the sums
        if (task != team) load(task);
        const bool live = task < tasks;
        const int b = live ? task / count : 0, c = c0 + (live ? task % count : 0);
        const float *xd = x_dbl + b * width, *Bn = xd + a.rank, *Cn = Bn + a.N;
        const int64_t i = (int64_t)b * a.e + c;
        float dot = 0;
#pragma unroll
        for (int k = 0; k < DT_AHEAD; k++)
            if (sub + k * TEAM < a.rank) dot += row[k] * xd[sub + k * TEAM];
        for (int k = sub + DT_AHEAD * TEAM; k < a.rank; k += TEAM) dot += to_float(a.dt_proj[(int64_t)c * a.rank + k]) * xd[k];
        const float raw = round_to<X>(team_sum(dot)) + a.dt_bias[c], dt = raw > 20.f ? raw : log1pf(expf(raw));
        const float u = load_fresh(a.u + i), z = load_fresh(a.z + i), input = dt * u;
        float y = 0;
        for (int n = sub; n < a.N; n += TEAM) {
            const float before = n == sub ? h0 : __ldcg(a.h + i * a.N + n), A = n == sub ? A0 : -expf(a.A_log[(int64_t)c * a.N + n]);
            const float h = expf(dt * A) * before + input * Bn[n];
            if (live) a.h[i * a.N + n] = h;
            y += h * Cn[n];
        }
        y = team_sum(y) + a.D[c] * u;
        if (live && sub == 0) a.out[i] = from_float<X>(y * z * fast_sigmoid(z));
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Attention of one query. A block takes a part of the slots of one sequence and group; LANES lanes take a key, 8 of its values each.
// Parts are combined in order by the block that ends last. The number of parts does not depend on the batch.

template <class X> struct AttentionArgs {
    X *out, *ring;
    float* parts;                          // (B,H,splits,2+hd): maximum, sum, weighted values
    int* ended;                            // (B,G): blocks that are through; zero between calls
    const X* qkv;
    const float* cos_sin;
    const int64_t* position;
    int64_t capacity;
    int H, G, hd, splits;
};

struct Eight { float v[8]; };
template <class X> struct RawEight;
template <> struct RawEight<__nv_bfloat16> { uint4 a; };
template <> struct RawEight<float> { uint4 a, b; };
template <class X> __device__ inline RawEight<X> load_eight(const X* p, bool live) {
    RawEight<X> r{};
    if (live) {
        r.a = __ldcg((const uint4*)p);
        if constexpr (sizeof(X) == 4) r.b = __ldcg((const uint4*)p + 1);
    }
    return r;
}
__device__ inline Eight unpack(const RawEight<__nv_bfloat16>& r) {
    Eight e;
    const unsigned w[4] = {r.a.x, r.a.y, r.a.z, r.a.w};
#pragma unroll
    for (int i = 0; i < 4; i++) e.v[2 * i] = __uint_as_float(w[i] << 16), e.v[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
    return e;
}
__device__ inline Eight unpack(const RawEight<float>& r) {
    return {{__uint_as_float(r.a.x), __uint_as_float(r.a.y), __uint_as_float(r.a.z), __uint_as_float(r.a.w), __uint_as_float(r.b.x), __uint_as_float(r.b.y),
             __uint_as_float(r.b.z), __uint_as_float(r.b.w)}};
}

// Values 8 sub .. 8 sub + 7 of a query or key head after RoPE, rounded to X; zeros past the head
template <class X> __device__ inline Eight turned(const X* head, const float* cos_sin /*(hd/2,2) or null*/, int hd, int sub) {
    Eight e;
    const int half = hd / 2;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int j = sub * 8 + i;
        e.v[i] = 0;
        if (j >= hd) continue;
        e.v[i] = load_fresh(head + j);
        if (!cos_sin) continue;
        const float other = load_fresh(head + (j < half ? j + half : j - half)), c = __ldcg(cos_sin + j % half * 2), s = __ldcg(cos_sin + j % half * 2 + 1);
        e.v[i] = round_to<X>(j < half ? e.v[i] * c - other * s : other * s + e.v[i] * c);
    }
    return e;
}

template <int LANES> __device__ inline float lanes_sum(float x) {
#pragma unroll
    for (int o = LANES / 2; o > 0; o /= 2) x += __shfl_xor_sync(0xffffffffu, x, o);
    return x;
}

// Online softmax of one head: scores in units of log2
struct Softmax {
    float top, sum;
    Eight acc;
    __device__ void clear() {
        top = -INFINITY, sum = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) acc.v[i] = 0;
    }
    __device__ void rescale(float to) {    // to > -infinity
        const float shrink = exp2f(top - to);
        top = to, sum *= shrink;
#pragma unroll
        for (int i = 0; i < 8; i++) acc.v[i] *= shrink;
    }
    __device__ void add(float score, const Eight& v) {
        const float p = exp2f(score - top);
        sum += p;
#pragma unroll
        for (int i = 0; i < 8; i++) acc.v[i] += p * v.v[i];
    }
};

// HEADS query heads of a group at a time
template <class X, int LANES, int HEADS> __global__ void __launch_bounds__(THREADS, 2) attention_kernel(AttentionArgs<X> a) {
    constexpr int TEAMS = THREADS / LANES, KEYS = sizeof(X) == 2 ? 6 : 3;        // a team's keys under way
    extern __shared__ float shared_sums[];                                       // (TEAMS, HEADS, 2 + hd)
    __shared__ bool last;
    const int split = blockIdx.x, g = blockIdx.y, b = blockIdx.z, sub = threadIdx.x % LANES, team = threadIdx.x / LANES, per_group = a.H / a.G, hd = a.hd, width = 2 + hd;
    const int64_t p = a.position[b], seen = min(p, a.capacity), share = (seen + a.splits - 1) / a.splits, k0 = split * share, k1 = min(seen, k0 + share);
    const int64_t token = (int64_t)2 * a.G * hd;
    const X *keys = a.ring + (b * a.capacity * 2 * a.G + g) * hd + sub * 8, *values = keys + a.G * hd;
    const bool inside = sub * 8 < hd;
    RawEight<X> k[KEYS], v[KEYS];
    const auto load = [&](int64_t from) {
#pragma unroll
        for (int j = 0; j < KEYS; j++) {
            const int64_t i = from + j * TEAMS;
            k[j] = load_eight(keys + i * token, inside && i < k1);
            v[j] = load_eight(values + i * token, inside && i < k1);
        }
    };
    load(k0 + team);
    if (hd * sizeof(X) % 16 == 0)
        for (int64_t i = k0 + KEYS * TEAMS + threadIdx.x; i < min(k1, k0 + KEYS * TEAMS + THREADS); i += THREADS) {
            prefetch_l2(a.ring + ((b * a.capacity + i) * 2 * a.G + g) * hd, hd * sizeof(X));
            prefetch_l2(a.ring + ((b * a.capacity + i) * 2 * a.G + a.G + g) * hd, hd * sizeof(X));
        }
    wait_for_input();
    const X* heads = a.qkv + ((int64_t)b * a.G + g) * (per_group + 2) * hd;
    const float *turn = a.cos_sin ? a.cos_sin + (int64_t)b * hd : nullptr, scale = 1.44269504f / sqrtf((float)hd);
    const Eight own_key = turned(heads + (int64_t)per_group * hd, turn, hd, sub);
    for (int first = 0; first < per_group; first += HEADS) {
        Eight q[HEADS];
        Softmax soft[HEADS];
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            soft[h].clear();
            q[h] = turned(heads + (int64_t)min(first + h, per_group - 1) * hd, turn, hd, sub);
#pragma unroll
            for (int i = 0; i < 8; i++) q[h].v[i] *= scale;
        }
        if (split == 0 && team / (WARP / LANES) == 0) {                           // the token itself; all of warp 0 takes part in the sums
            Eight value;
#pragma unroll
            for (int i = 0; i < 8; i++) value.v[i] = inside ? load_fresh(heads + (int64_t)(per_group + 1) * hd + sub * 8 + i) : 0.f;
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                float score = 0;
#pragma unroll
                for (int i = 0; i < 8; i++) score += q[h].v[i] * own_key.v[i];
                score = lanes_sum<LANES>(score);
                if (team == 0) soft[h].top = score, soft[h].add(score, value);
            }
        }
        // whole warps go round together: the bound is that of the warp's first team
        for (int64_t from = k0 + team; from - team % (WARP / LANES) < k1; from += KEYS * TEAMS) {
            if (first > 0 || from != k0 + team) load(from);
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                float score[KEYS], top = soft[h].top;
#pragma unroll
                for (int j = 0; j < KEYS; j++) {
                    const Eight key = unpack(k[j]);
                    float dot = 0;
#pragma unroll
                    for (int i = 0; i < 8; i++) dot += q[h].v[i] * key.v[i];
                    dot = lanes_sum<LANES>(dot);
                    score[j] = from + j * TEAMS < k1 ? dot : -INFINITY;
                    top = fmaxf(top, score[j]);
                }
                if (top == -INFINITY) continue;
                soft[h].rescale(top);
#pragma unroll
                for (int j = 0; j < KEYS; j++) soft[h].add(score[j], unpack(v[j]));
            }
        }
        // the block's sum, teams in order
        if (first > 0) __syncthreads();
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            float* to = shared_sums + (team * HEADS + h) * width;
            if (sub == 0) to[0] = soft[h].top, to[1] = soft[h].sum;
            for (int i = 0; i < 8; i++)
                if (sub * 8 + i < hd) to[2 + sub * 8 + i] = soft[h].acc.v[i];
        }
        __syncthreads();
        const int heads_now = min(HEADS, per_group - first);
        for (int item = threadIdx.x; item < heads_now * hd; item += THREADS) {
            const int h = item / hd, j = item % hd;
            float top = -INFINITY, sum = 0, acc = 0;
#pragma unroll
            for (int i = 0; i < TEAMS; i++) top = fmaxf(top, shared_sums[(i * HEADS + h) * width]);
#pragma unroll
            for (int i = 0; i < TEAMS; i++) {
                const float* part = shared_sums + (i * HEADS + h) * width;
                const float shrink = part[0] == -INFINITY ? 0.f : exp2f(part[0] - top);
                sum += part[1] * shrink, acc += part[2 + j] * shrink;
            }
            const int64_t head = (int64_t)b * a.H + g * per_group + first + h;
            if (a.splits == 1) {
                a.out[head * hd + j] = from_float<X>(acc / sum);
            } else {
                float* to = a.parts + (head * a.splits + split) * width;
                if (j == 0) to[0] = top, to[1] = sum;
                to[2 + j] = acc;
            }
        }
    }
    // The oldest key makes room. Its slot is in this block's part, and all of the block have read it.
    const int64_t slot = a.capacity > 0 ? p % a.capacity : 0;
    if (a.capacity > 0 && split == (p < a.capacity ? 0 : slot / share) && team == 0 && inside) {
        X* to = a.ring + ((b * a.capacity + slot) * 2 * a.G + g) * hd + sub * 8;
        const X* value = heads + (int64_t)(per_group + 1) * hd + sub * 8;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            to[i] = from_float<X>(own_key.v[i]);
            to[a.G * hd + i] = from_float<X>(load_fresh(value + i));
        }
    }
    if (a.splits == 1) return;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(a.ended + b * a.G + g, 1) == a.splits - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    if (threadIdx.x == 0) a.ended[b * a.G + g] = 0;
    for (int item = threadIdx.x; item < per_group * hd; item += THREADS) {
        const int64_t head = (int64_t)b * a.H + g * per_group + item / hd;
        const int j = item % hd;
        const float* part = a.parts + head * a.splits * width;
        float top = -INFINITY, sum = 0, acc = 0;
#pragma unroll 8
        for (int i = 0; i < a.splits; i++) top = fmaxf(top, __ldcg(part + i * width));
#pragma unroll 4
        for (int i = 0; i < a.splits; i++) {
            const float shrink = exp2f(__ldcg(part + i * width) - top);          // 0 for a part without keys
            sum += __ldcg(part + i * width + 1) * shrink, acc += __ldcg(part + i * width + 2 + j) * shrink;
        }
        a.out[head * hd + j] = from_float<X>(acc / sum);
    }
}

inline int attention_splits(int G) { return std::clamp(gpu().sms / G, 1, 64); }

template <class X, int LANES> inline void attention(const AttentionArgs<X>& a, int B, Stream stream) {
    const dim3 grid((unsigned)a.splits, (unsigned)a.G, (unsigned)B);
    const size_t head_bytes = (size_t)THREADS / LANES * (2 + a.hd) * sizeof(float);
    if (a.H == a.G) launch(attention_kernel<X, LANES, 1>, grid, THREADS, head_bytes, stream, a);
    else launch(attention_kernel<X, LANES, 2>, grid, THREADS, 2 * head_bytes, stream, a);
}

// ---------------------------------------------------------------------------------------------------------------------
// The end of a step: a token is drawn, and its embedding is the next x. One block a sequence.

constexpr int SAMPLE_THREADS = 1024;

template <class X> struct EmbedArgs {
    float* x;                              // (B,d)
    X* xw;
    float *squares, *cos_sin;              // (B,d/8), (B,hd/2,2)
    const float* norm;                     // of the first layer
    const X* embedding;
    int d, hd;
    RopeTurns turns;
};

inline RopeTurns rope_turns(int hd, double base) {
    RopeTurns turns{};
    for (int j = 0; j < hd / 2; j++) turns.turn[j] = cpu::rope_turn(j, hd, base);
    return turns;
}

// xw and squares of a sequence's x (value(i), i < d), by the whole block
template <class X, class Value> __device__ inline void norm_row(X* xw, float* squares, const float* norm, int d, Value value) {
    const int tiles = (d + ROWS - 1) / ROWS;
    for (int i = threadIdx.x; i < tiles * ROWS; i += blockDim.x) {
        const float v = i < d ? value(i) : 0.f;
        if (i < d) xw[i] = from_float<X>(v * norm[i]);
        float square = v * v;
        const unsigned eight = 0xffu << (threadIdx.x % WARP / ROWS * ROWS);
#pragma unroll
        for (int o = ROWS / 2; o > 0; o /= 2) square += __shfl_xor_sync(eight, square, o);
        if (i % ROWS == 0) squares[i / ROWS] = square;
    }
}

template <class X> __global__ void norm_kernel(X* xw, float* squares, const float* x, const float* norm, int d) {
    wait_for_input();
    const int64_t b = blockIdx.x;
    norm_row(xw + b * d, squares + b * ((d + ROWS - 1) / ROWS), norm, d, [&](int i) { return __ldcg(x + b * d + i); });
}

template <class X> __device__ inline void embed(const EmbedArgs<X>& a, int64_t b, int token, int64_t position) {
    norm_row(a.xw + b * a.d, a.squares + b * ((a.d + ROWS - 1) / ROWS), a.norm, a.d, [&](int i) {
        const float v = to_float(a.embedding[(int64_t)token * a.d + i]);
        a.x[b * a.d + i] = v;
        return v;
    });
    for (int j = threadIdx.x; j < a.hd / 2; j += blockDim.x) {
        double sine, cosine;
        sincospi((double)(int64_t)((uint64_t)position * a.turns.turn[j]) * 0x1p-63, &sine, &cosine);      // rope_table_kernel
        a.cos_sin[(b * (a.hd / 2) + j) * 2] = (float)cosine;
        a.cos_sin[(b * (a.hd / 2) + j) * 2 + 1] = (float)sine;
    }
}

template <class X> __global__ void __launch_bounds__(SAMPLE_THREADS) embed_kernel(EmbedArgs<X> a, const int* tokens, const int64_t* position) {
    wait_for_input();
    embed(a, blockIdx.x, tokens[blockIdx.x], position[blockIdx.x]);
}

template <class T> __device__ inline T block_total(T x) {                       // integers: exact in any order; every thread gets it
    __shared__ T partial[WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
    for (int o = WARP / 2; o > 0; o /= 2) x += __shfl_xor_sync(0xffffffffu, x, o);
    __syncthreads();
    if (lane == 0) partial[warp] = x;
    __syncthreads();
    x = partial[lane];
#pragma unroll
    for (int o = WARP / 2; o > 0; o /= 2) x += __shfl_xor_sync(0xffffffffu, x, o);
    return x;
}

// Of (value, index) the greatest value, the lowest index among equals: as one integer to maximise. Values in the order of their keys.
__device__ inline unsigned order_key(float x) {
    const unsigned bits = __float_as_uint(x == 0.f ? 0.f : x);                  // -0 equals 0
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ inline uint64_t ranked(float x, int i) { return (uint64_t)order_key(x) << 32 | (0xffffffffu - (unsigned)i); }

// The lowest rank so that what ranks there or above weighs at least `target`. weight(rank(i), i) of this thread's i, begin to end.
template <class Rank, class Weight> __device__ inline uint64_t cut(uint64_t target, int begin, int end, Rank rank, Weight weight) {
    uint64_t at = 0;
    for (int bit = 63; bit >= 0; bit--) {
        if (bit == 31) bit = 15, at |= 0xffff0000ull;  // indices are below 2^16: the upper half of their complement is ones
        const uint64_t candidate = at | 1ull << bit;
        uint64_t sum = 0;
        for (int i = begin; i < end; i++)
            if (rank(i) >= candidate) sum += weight(i);
        if (block_total(sum) >= target) at = candidate;
    }
    return at;
}

struct SampleArgs {
    int *tokens, *emitted;
    int64_t *position, *drawn;
    uint8_t* seen;
    const float* logits;
    const uint64_t* keys;
    SampleOptions options;
    int V, choices;
    bool in_shared;                        // the penalised logits fit in shared memory
};

template <class X> __global__ void __launch_bounds__(SAMPLE_THREADS) sample_kernel(SampleArgs a, EmbedArgs<X> e) {
    extern __shared__ float kept_logits[];
    __shared__ uint64_t warp_totals[WARP];
    __shared__ int chosen;
    wait_for_input();
    const int b = blockIdx.x, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const float* logits = a.logits + (int64_t)b * a.V;
    const uint8_t* seen = a.seen + (int64_t)b * a.V;
    const SampleOptions o = a.options;
    const auto penalised = [&](int i) {
        float x = __ldcg(logits + i);
        if (o.penalty != 1.f && seen[i]) x = x > 0 ? x / o.penalty : x * o.penalty;
        return isnan(x) ? -INFINITY : x;
    };
    // The greatest, by all threads side by side
    uint64_t best = 0;
#pragma unroll 8
    for (int i = threadIdx.x; i < a.choices; i += SAMPLE_THREADS) {
        const float x = penalised(i);
        if (a.in_shared) kept_logits[i] = x;
        best = max(best, ranked(x, i));
    }
#pragma unroll
    for (int s = WARP / 2; s > 0; s /= 2) best = max(best, __shfl_xor_sync(0xffffffffu, best, s));
    if (lane == 0) warp_totals[warp] = best;
    __syncthreads();
    best = warp_totals[lane];
#pragma unroll
    for (int s = WARP / 2; s > 0; s /= 2) best = max(best, __shfl_xor_sync(0xffffffffu, best, s));
    const int best_index = (int)(0xffffffffu - (unsigned)best);
    const auto value = [&](int i) { return a.in_shared ? kept_logits[i] : penalised(i); };
    const bool any = (unsigned)(best >> 32) > order_key(-INFINITY);
    if (threadIdx.x == 0) chosen = any ? best_index : -1;
    if (any && o.temperature > 0) {
        // A thread has neighbouring indices, an odd number of them so that shared memory's banks differ
        const int share = (a.choices + SAMPLE_THREADS - 1) / SAMPLE_THREADS | 1, begin = min(a.choices, (int)threadIdx.x * share), end = min(a.choices, begin + share);
        const float top = value(best_index), scale = 1.44269504f / o.temperature;
        const auto mass = [&](int i) { return (uint64_t)(exp2f((value(i) - top) * scale) * (float)SAMPLE_MASS); };
        const auto rank = [&](int i) { return ranked(value(i), i); };
        uint64_t lowest = 0;
        if (o.top_k > 0 && o.top_k < a.choices) lowest = cut((uint64_t)o.top_k, begin, end, rank, [](int) { return 1ull; });
        const auto my_mass = [&]() {
            uint64_t sum = 0;
            for (int i = begin; i < end; i++)
                if (lowest == 0 || rank(i) >= lowest) sum += mass(i);
            return sum;
        };
        uint64_t mine = my_mass(), total = block_total(mine);
        if (o.top_p < 1.f) {
            const uint64_t target = min(max((uint64_t)ceil((double)o.top_p * (double)total), (uint64_t)1), total);
            lowest = max(lowest, cut(target, begin, end, rank, mass));
            mine = my_mass(), total = block_total(mine);
        }
        const uint64_t drawn = min((uint64_t)(counter_uniform(a.keys[b], (uint64_t)a.drawn[b]) * (double)total), total - 1);
        uint64_t until = mine;             // of the threads up to this one
#pragma unroll
        for (int s = 1; s < WARP; s *= 2) {
            const uint64_t other = __shfl_up_sync(0xffffffffu, until, s);
            if (lane >= s) until += other;
        }
        __syncthreads();
        if (lane == WARP - 1) warp_totals[warp] = until;
        __syncthreads();
        for (int i = 0; i < warp; i++) until += warp_totals[i];
        uint64_t before = until - mine;
        if (drawn >= before && drawn < until)
            for (int i = begin; i < end; i++) {
                if (lowest > 0 && rank(i) < lowest) continue;
                before += mass(i);
                if (drawn < before) { chosen = i; break; }
            }
    }
    __syncthreads();
    const int id = chosen, token = max(id, 0);
    const int64_t position = a.position[b] + 1;
    __syncthreads();
    if (threadIdx.x == 0) {
        a.emitted[a.drawn[b] % EMIT_SLOTS * gridDim.x + b] = id;
        a.tokens[b] = token;
        a.seen[(int64_t)b * a.V + token] = 1;
        a.position[b] = position;
        a.drawn[b]++;
    }
    embed(e, b, token, position);
}

} // namespace decode

// ---------------------------------------------------------------------------------------------------------------------
// The operations (arguments: kernels/cpu/decode.h)

inline void decode_norm_linear(floatX* y, const floatX* xw, const float* squares, const floatX* w, int B, int N, int d, float eps, Stream stream) {
    decode::linear(w, B, d, 1, decode::Input<floatX>{xw, squares, eps}, decode::StoreOutput<floatX>{y, N}, stream);
}
inline void decode_norm(floatX* xw, float* squares, const float* x, const float* norm, int B, int d, Stream stream) {
    decode::launch(decode::norm_kernel<floatX>, dim3((unsigned)B), 256, 0, stream, xw, squares, x, norm, d);
}
inline void decode_head(float* logits, const floatX* xw, const float* squares, const floatX* w, int B, int N, int d, float eps, Stream stream) {
    decode::linear(w, B, d, 1, decode::Input<floatX>{xw, squares, eps}, decode::StoreOutput<float>{logits, N}, stream);
}
inline void decode_residual(float* x, floatX* xw, float* squares, const float* norm, const floatX* in, const floatX* w, int B, int N, int K, Stream stream) {
    decode::linear(w, B, K, 1, decode::Input<floatX>{in, nullptr, 0}, decode::ResidualOutput<floatX>{x, norm ? xw : nullptr, squares, norm, N}, stream);
}
inline void decode_swiglu(floatX* hidden, const floatX* xw, const float* squares, const floatX* w1, int B, int d, int F, float eps, Stream stream) {
    decode::linear(w1, B, d, 1, decode::Input<floatX>{xw, squares, eps}, decode::SwigluOutput<floatX>{hidden, F}, stream);
}
inline void decode_mamba_in(floatX* u, floatX* z, floatX* halo, const floatX* xw, const float* squares, const floatX* in_proj, const float* conv_w, const float* conv_b, int B, int d, int e,
                            float eps, Stream stream) {
    decode::linear(in_proj, B, d, 1, decode::Input<floatX>{xw, squares, eps}, decode::ConvOutput<floatX>{u, z, halo, conv_w, conv_b, e}, stream);
}
inline int decode_x_splits(int N, int e) {
    const int blocks = std::max(1, e / 32), most = std::clamp(decode::gpu().sms / (int)ceil_div(N, decode::ROWS), 1, 8), share = (int)ceil_div(blocks, most);
    return (int)ceil_div(blocks, share);   // none is empty
}
inline void decode_x_proj(float* parts, const floatX* u, const floatX* w, int B, int N, int e, Stream stream) {
    decode::linear(w, B, e, decode_x_splits(N, e), decode::Input<floatX>{u, nullptr, 0}, decode::PartOutput{parts, N, B}, stream);
}
inline void decode_scan(floatX* out, float* h, const float* parts, const floatX* u, const floatX* z, const floatX* dt_proj, const float* A_log, const float* D, const float* dt_bias, int B, int e,
                        int N, int rank, Stream stream) {
    const int channels = (int)ceil_div(e, std::min(decode::gpu().sms, e));
    decode::launch(decode::scan_kernel<floatX>, dim3((unsigned)ceil_div(e, channels)), decode::THREADS, (size_t)B * (rank + 2 * N) * sizeof(float), stream,
                   decode::ScanArgs<floatX>{out, h, parts, u, z, dt_proj, A_log, D, dt_bias, B, e, N, rank, decode_x_splits(rank + 2 * N, e), channels});
}
// Zero it before the first use
inline size_t decode_attention_workspace(int B, int H, int G, int hd) {
    return (size_t)round_up((int64_t)B * G * sizeof(int), 256) + (size_t)B * H * decode::attention_splits(G) * (2 + hd) * sizeof(float);
}
inline void decode_attention(floatX* out, floatX* ring, void* workspace, const floatX* qkv, const float* cos_sin, const int64_t* position, int64_t capacity, int B, int H, int G, int hd,
                             Stream stream) {
    const decode::AttentionArgs<floatX> a{out, ring, (float*)((char*)workspace + round_up((int64_t)B * G * sizeof(int), 256)), (int*)workspace, qkv, cos_sin, position, capacity, H, G, hd,
                                          decode::attention_splits(G)};
    if (hd <= 64) decode::attention<floatX, 8>(a, B, stream);
    else if (hd <= 128) decode::attention<floatX, 16>(a, B, stream);
    else decode::attention<floatX, 32>(a, B, stream);
}
inline void decode_embed(float* x, floatX* xw, float* squares, float* cos_sin, const int* tokens, const int64_t* position, const float* norm, const floatX* embedding, double rope_base, int B, int d,
                         int hd, Stream stream) {
    decode::launch(decode::embed_kernel<floatX>, dim3((unsigned)B), 256, 0, stream, decode::EmbedArgs<floatX>{x, xw, squares, cos_sin, norm, embedding, d, hd, decode::rope_turns(hd, rope_base)}, tokens, position);
}
inline void decode_sample(int* tokens, int* emitted, int64_t* position, int64_t* drawn, uint8_t* seen, float* x, floatX* xw, float* squares, float* cos_sin, const float* logits, const uint64_t* keys,
                          const float* norm, const floatX* embedding, double rope_base, SampleOptions options, int B, int V, int choices, int d, int hd, Stream stream) {
    const size_t bytes = (size_t)choices * sizeof(float);
    const bool in_shared = bytes + 4096 <= (size_t)decode::gpu().shared;
    decode::launch(decode::sample_kernel<floatX>, dim3((unsigned)B), decode::SAMPLE_THREADS, in_shared ? bytes : 0, stream,
                   decode::SampleArgs{tokens, emitted, position, drawn, seen, logits, keys, options, V, choices, in_shared},
                   decode::EmbedArgs<floatX>{x, xw, squares, cos_sin, norm, embedding, d, hd, decode::rope_turns(hd, rope_base)});
}

} // namespace gpu
