// Quantising to 8-bit floating point, for the products of --matmul fp8.
//   scale_i = the smallest power of two with max_j |x_ij| <= 448 scale_i, but at least 2^-108        q_ij = e4m3(x_ij / scale_i)
// e4m3: a sign, 4 bits of exponent, 3 of mantissa; 2^-9 to 448, no infinity. Rounded to nearest, ties to even. Dividing by a power of two
// is exact: q is x rounded once. A row with an infinity or NaN has the scale NaN, so that whatever is multiplied with it becomes NaN.
// No state and no history: a row's scale is its own, so the same values always give the same bits.
//
// Rows: a row in the registers of 1 to 8 warps, read once: 2 + 1 bytes a value; 32768 x 8192: 805 MB, 0.27 ms at 3 TB/s. RMSNorm and SwiGLU
// quantise the rows that they write while they have them (rmsnorm.cuh, swiglu.cuh): 1 byte instead of 3.
// Columns (the transpose of weights, once a step): a pass for the maxima of chunks of rows, a pass that turns tiles in shared memory.
#pragma once
#include <cuda_fp8.h>

#include "device.cuh"
#include "measure.cuh"
#include "quantised.h"

namespace gpu {

using bf16 = __nv_bfloat16;

constexpr uint32_t SMALLEST_SCALED = (127 - 100) << 23;     // 2^-100 as bits: rows below are scaled as if they reached it
constexpr uint32_t NOT_FINITE = 0x7f800000;

__device__ inline float power_of_two(int exponent) { return __uint_as_float((uint32_t)(exponent + 127) << 23); }
// Of a row's largest magnitude, as the bits of a float: these are ordered like the numbers, and NaN is above infinity
__device__ inline int scale_exponent(uint32_t most) {
    const uint32_t bits = max(most, SMALLEST_SCALED);
    return (int)(bits >> 23) - 127 - 8 + ((bits & 0x7fffff) > 0x600000);       // 448 = 1.75 2^8
}
__device__ inline float scale_of(uint32_t most) { return most >= NOT_FINITE ? __uint_as_float(0x7fffffff) : power_of_two(scale_exponent(most)); }
__device__ inline float inverse_scale(uint32_t most) { return most >= NOT_FINITE ? 0.f : power_of_two(-scale_exponent(most)); }

// The larger magnitude of each half: of two bf16 in a word
__device__ inline uint32_t larger_halves(uint32_t most, uint32_t two) { return __vmaxu2(most, two & 0x7fff7fffu); }
__device__ inline uint32_t larger_half(uint32_t most) { return max(most << 16, most & 0xffff0000u); }

__device__ inline uint32_t four_e4m3(float a, float b, float c, float d) {
    return __nv_cvt_float2_to_fp8x2({a, b}, __NV_SATFINITE, __NV_E4M3) | (uint32_t)__nv_cvt_float2_to_fp8x2({c, d}, __NV_SATFINITE, __NV_E4M3) << 16;
}
// 0 times infinity or NaN is NaN: a row that is not finite has 0s instead, as its twin does
__device__ inline float scaled(float x, float inverse) { return inverse == 0 ? 0.f : x * inverse; }
__device__ inline uint32_t quantise_four(uint32_t two, uint32_t next_two, float inverse) {
    return four_e4m3(scaled(__uint_as_float(two << 16), inverse), scaled(__uint_as_float(two & 0xffff0000u), inverse),
                     scaled(__uint_as_float(next_two << 16), inverse), scaled(__uint_as_float(next_two & 0xffff0000u), inverse));
}

// Values of bf16 that a kernel has just made, two in a word
template <class X> __device__ inline uint2 words_of(const Vec<X, 4>& v) {
    static_assert(sizeof(X) == 2);
    return *reinterpret_cast<const uint2*>(&v);
}
template <class X> __device__ inline uint4 words_of(const Vec<X, 8>& v) {
    static_assert(sizeof(X) == 2);
    return *reinterpret_cast<const uint4*>(&v);
}
__device__ inline uint32_t larger_halves(uint32_t most, const uint4& eight) {
    return larger_halves(larger_halves(larger_halves(larger_halves(most, eight.x), eight.y), eight.z), eight.w);
}
__device__ inline uint2 quantise_eight(const uint4& x, float inverse) { return {quantise_four(x.x, x.y, inverse), quantise_four(x.z, x.w, inverse)}; }

// The largest magnitude of a row that WARPS neighbouring warps hold, from each thread's halves; the block has BLOCK warps. All its threads must
// call it, once. A warp's maximum is one instruction, because the bits of magnitudes are ordered like the magnitudes.
template <int WARPS, int BLOCK = WARPS> __device__ inline uint32_t row_most(uint32_t halves) {
    const uint32_t of_warp = __reduce_max_sync(0xffffffffu, larger_half(halves));
    if constexpr (WARPS == 1) return of_warp;
    __shared__ uint32_t parts[BLOCK];
    const int warp = threadIdx.x / WARP, first = BLOCK == WARPS ? 0 : warp / WARPS * WARPS;
    if (threadIdx.x % WARP == 0) parts[warp] = of_warp;
    __syncthreads();
    uint32_t most = parts[first];
    for (int i = 1; i < WARPS; i++) most = max(most, parts[first + i]);
    return most;
}

constexpr int QUANTISE_WARPS = 8;          // of a block: that many warps share 8 / WARPS rows
template <int WARPS, int ITEMS>            // warps a row, loads of 16 bytes a lane
__global__ void __launch_bounds__(QUANTISE_WARPS * WARP) quantise_rows_kernel(uint8_t* q, float* scale, const bf16* x, int64_t M, int64_t K) {
    const int warp = threadIdx.x / WARP, first = warp % WARPS * WARP + threadIdx.x % WARP, vectors = (int)(K / 8);
    const int64_t row = blockIdx.x * (int64_t)(QUANTISE_WARPS / WARPS) + warp / WARPS;
    const uint4* in = (const uint4*)(x + row * K);
    uint4 xs[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int at = first + i * WARPS * WARP;
        xs[i] = row < M && at < vectors ? in[at] : uint4{};
    }
    uint32_t halves = 0;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) halves = larger_halves(halves, xs[i]);
    const uint32_t most = row_most<WARPS, QUANTISE_WARPS>(halves);
    if (row >= M) return;
    if (first == 0) scale[row] = scale_of(most);
    const float inverse = inverse_scale(most);
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int at = first + i * WARPS * WARP;
        if (at < vectors) ((uint2*)(q + row * K))[at] = quantise_eight(xs[i], inverse);
    }
}

template <int WARPS> void launch_quantise_rows(Quantised out, const bf16* x, int64_t M, int64_t K, Stream stream) {
    const int64_t items = ceil_div(K, 8 * WARPS * WARP);
    const unsigned blocks = (unsigned)ceil_div(M, QUANTISE_WARPS / WARPS);
    const auto kernel = items <= 6 ? quantise_rows_kernel<WARPS, 6> : items <= 8 ? quantise_rows_kernel<WARPS, 8> : quantise_rows_kernel<WARPS, 12>;
    kernel<<<blocks, QUANTISE_WARPS * WARP, 0, stream>>>(out.q, out.scale, x, M, K);
    LAUNCH_CHECK();
}

constexpr int64_t QUANTISE_MOST = 12 * 8 * QUANTISE_WARPS * WARP;              // values in a row

inline void quantise_rows(Quantised out /*(M,K), (M)*/, const bf16* x /*(M,K)*/, int64_t M, int64_t K, Stream stream) {
    const Operation op("quantise", 3.0 * M * K, 0, stream);
    if (K % 16 || K > QUANTISE_MOST) fail("fp8: rows of %lld values: must be a multiple of 16 up to %lld", (long long)K, (long long)QUANTISE_MOST);
    if (K <= 12 * 256) launch_quantise_rows<1>(out, x, M, K, stream);
    else if (K <= 12 * 512) launch_quantise_rows<2>(out, x, M, K, stream);
    else if (K <= 12 * 1024) launch_quantise_rows<4>(out, x, M, K, stream);
    else launch_quantise_rows<8>(out, x, M, K, stream);
}

// Columns. partial (chunks,K): the largest magnitudes of COLUMN_CHUNK rows each. A thread has two columns.
constexpr int COLUMN_CHUNK = 256;
inline size_t quantise_columns_workspace(int64_t N, int64_t K) { return (size_t)(ceil_div(N, COLUMN_CHUNK) * K) * sizeof(uint32_t); }

template <class X> __global__ void column_maxima_kernel(uint32_t* partial, const X* w, int64_t N, int64_t K) {
    __shared__ uint32_t parts[8][WARP];
    const int64_t column = (blockIdx.x * WARP + threadIdx.x) * 2, begin = blockIdx.y * (int64_t)COLUMN_CHUNK, end = min(N, begin + COLUMN_CHUNK);
    uint32_t halves = 0;
    if (column < K)
        for (int64_t row = begin + threadIdx.y; row < end; row += 8) halves = larger_halves(halves, *(const uint32_t*)(w + row * K + column));
    parts[threadIdx.y][threadIdx.x] = halves;
    __syncthreads();
    if (threadIdx.y != 0 || column >= K) return;
    for (int i = 1; i < 8; i++) halves = __vmaxu2(halves, parts[i][threadIdx.x]);
    partial[blockIdx.y * K + column] = halves << 16;
    partial[blockIdx.y * K + column + 1] = halves & 0xffff0000u;
}

// A tile of 128 rows x 64 columns of w becomes 64 rows of 128 bytes of q (K,N)
constexpr int TURN_ROWS = 128, TURN_COLUMNS = 64;
template <class X> __global__ void __launch_bounds__(256)
quantise_columns_kernel(Quantised out, const X* w, const uint32_t* partial, int64_t N, int64_t K) {
    __shared__ uint8_t tile[TURN_COLUMNS][TURN_ROWS + 4];
    __shared__ float inverse[TURN_COLUMNS];
    const int64_t first_column = blockIdx.x * TURN_COLUMNS, first_row = blockIdx.y * TURN_ROWS;
    if (threadIdx.x < TURN_COLUMNS && first_column + threadIdx.x < K) {
        const int64_t column = first_column + threadIdx.x;
        uint32_t most = 0;
        for (int64_t chunk = 0; chunk * COLUMN_CHUNK < N; chunk++) most = max(most, partial[chunk * K + column]);
        inverse[threadIdx.x] = inverse_scale(most);
        if (blockIdx.y == 0) out.scale[column] = scale_of(most);
    }
    __syncthreads();
    const int c = threadIdx.x % 8 * 8;
    for (int r = threadIdx.x / 8; r < TURN_ROWS; r += 32) {
        if (first_row + r >= N || first_column + c >= K) continue;
        const auto values = load_vec<8>(w + (first_row + r) * K + first_column + c);
#pragma unroll
        for (int i = 0; i < 8; i++) tile[c + i][r] = __nv_cvt_float_to_fp8(scaled(to_float(values[i]), inverse[c + i]), __NV_SATFINITE, __NV_E4M3);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < TURN_COLUMNS * TURN_ROWS / 4; i += 256) {
        const int c = i / (TURN_ROWS / 4), r = i % (TURN_ROWS / 4) * 4;
        if (first_row + r >= N || first_column + c >= K) continue;
        *(uint32_t*)(out.q + (first_column + c) * N + first_row + r) = *(const uint32_t*)&tile[c][r];
    }
}

// The rows of the transpose
inline void quantise_columns(Quantised out /*(K,N), (K)*/, const bf16* w /*(N,K)*/, void* workspace, int64_t N, int64_t K, Stream stream) {
    const Operation op("quantise transposed", 5.0 * N * K, 0, stream);
    if (N % 16 || K % 16) fail("fp8: weights of %lld x %lld: both must be multiples of 16", (long long)N, (long long)K);
    uint32_t* partial = (uint32_t*)workspace;
    const dim3 chunks((unsigned)ceil_div(K, 2 * WARP), (unsigned)ceil_div(N, COLUMN_CHUNK));
    const dim3 tiles((unsigned)ceil_div(K, TURN_COLUMNS), (unsigned)ceil_div(N, TURN_ROWS));
    column_maxima_kernel<<<chunks, dim3(WARP, 8), 0, stream>>>(partial, w, N, K);
    LAUNCH_CHECK();
    quantise_columns_kernel<<<tiles, 256, 0, stream>>>(out, w, partial, N, K);
    LAUNCH_CHECK();
}

// The float build has no fp8 products, and compiles what calls these.
inline void quantise_rows(Quantised, const float*, int64_t, int64_t, Stream) { fail("fp8: only from bf16"); }
inline void quantise_columns(Quantised, const float*, void*, int64_t, int64_t, Stream) { fail("fp8: only from bf16"); }

} // namespace gpu
