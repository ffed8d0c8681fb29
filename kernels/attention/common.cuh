// What the attention paths share (attention.cuh: portable, attention_sm90.cuh: Hopper): their arguments, who sees whom, and the form
// in which score gradients pass through memory from the kernel that sums dk and dv to the one that sums dq.
#pragma once
#include <algorithm>
#include <climits>

#include "../device.cuh"

namespace gpu {
namespace attn {

using bf16 = __nv_bfloat16;

// Query i sees keys max(i - window + 1, starts[i], oldest()) .. i. Positions count from this call's t = 0, so a key of an earlier
// call (in the ring) has a negative one; they fit an int (check() sees to it: registers are short), offsets into tensors never do.
template <class X> struct Args {
    X *out, *dqkv;
    float *lse, *lse2, *delta;               // (B, H, T); lse2 = lse log2(e)
    bf16* ds;                                // score gradients kept for dq, below; null: dq makes them again
    int* drawn;                              // (1) items that blocks of a Hopper kernel have drawn (sm90_common.cuh); zero before and after
    const X *qkv, *ring, *dout, *saved_out;
    const float* rope;                       // (T, hd/2, 2): cos and sin by which queries and keys were turned; dq and dk are turned back. Or null
    const int *starts, *ends;                // (B, T) or null: of a query, its document's first key; of a key, the first query after its document
    int64_t capacity, position;
    int B, T, H, G, hd, window, ds_sequences;                            // ds_sequences: of which ds has room

    __host__ __device__ int64_t row() const { return (int64_t)(H + 2 * G) * hd; }
    __host__ __device__ int64_t out_row() const { return (int64_t)H * hd; }
    __host__ __device__ int64_t query(int b, int h) const {
        return (int64_t)b * T * row() + (int64_t)(h / (H / G) * (H / G + 2) + h % (H / G)) * hd;
    }
    __host__ __device__ int64_t key(int b, int g) const { return (int64_t)b * T * row() + (int64_t)(g * (H / G + 2) + H / G) * hd; }
    __host__ __device__ int64_t value(int b, int g) const { return key(b, g) + hd; }
    __host__ __device__ int64_t output(int b, int h) const { return ((int64_t)b * T * H + h) * hd; }
    __host__ __device__ int64_t stat(int b, int h) const { return ((int64_t)b * H + h) * T; }
    __host__ __device__ int oldest() const { return ring ? -(int)(position < capacity ? position : capacity) : 0; }   // first key there is
    __device__ const X* ring_row(int b, int g, int64_t p, int value) const {                                        // p < 0
        return ring + (((b * capacity + (position + p) % capacity) * 2 + value) * G + g) * hd;
    }
    __device__ int start(int b, int i) const { return starts ? starts[(int64_t)b * T + min(i, T - 1)] : INT_MIN; }
    __device__ int end(int b, int p) const { return ends ? ends[(int64_t)b * T + min(p, T - 1)] : INT_MAX; }
    // The first key that any query from i on sees, the last query that sees any key up to p: starts do not fall
    __device__ int first_key(int b, int i) const { return max(max(i - window + 1, oldest()), start(b, i)); }
    __device__ int last_query(int b, int p) const { return min(min(T - 1, p + window - 1), end(b, p) - 1); }

    // The same problem for `count` sequences of the batch from b on. lse2 and delta have `stride` values a head.
    Args batches(int b, int count, int64_t stride) const {
        Args a = *this;
        a.B = count;
        a.dqkv += b * T * row(), a.qkv += b * T * row(), a.dout += b * T * out_row(), a.saved_out += b * T * out_row();
        a.lse += (int64_t)b * H * T, a.lse2 += b * H * stride, a.delta += b * H * stride;
        if (ring) a.ring += b * capacity * 2 * G * hd;
        if (starts) a.starts += (int64_t)b * T, a.ends += (int64_t)b * T;
        return a;
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// Score gradients in memory
//
// dq = dS K needs what the kernel of dk and dv has in registers. Written once and read once in bf16 (the rounding that the product
// needs anyway), dS costs 4 bytes a pair instead of 4 hd flops of S and dP made a second time: at head_dim 128 and the shape
// of attention.cuh's head 1.25 GB each way, 0.3 ms at 4.2 TB/s, against 0.7 ms for two thirds of a 3-product kernel.
//
// Blocks of 64 keys x 64 queries, those on the diagonal and the `bands` - 1 before it: block (owner = b H + h, query block, query
// block - key block). A block is the image of a tile in shared memory: a row of 128 bytes is a key, the 16-byte chunk c of row r in
// place c ^ (r % 8), as ldmatrix, TMA and wgmma like it. Queries of a row are permuted so that a lane's eight results are a chunk: the
// accumulator of a 64 x 64 product gives lane l queries 8 n + l%4 * 2 + e (n < 8, e < 2), and chunk c = n/4 * 4 + l%4 holds n = c/4 * 4 .. + 3.
constexpr int DS_EDGE = 64, DS_BLOCK = DS_EDGE * DS_EDGE;                // in elements

__host__ __device__ inline int ds_bands(int64_t T, int window) {         // key blocks that a query block sees
    const int64_t all = (T + DS_EDGE - 1) / DS_EDGE, band = ((int64_t)window - 1 + DS_EDGE - 1) / DS_EDGE + 1;
    return (int)(band < all ? band : all);
}
// Query blocks are counted in pairs: the Hopper kernel reads tiles of two
__host__ __device__ inline int64_t ds_query_blocks(int64_t T) { return (T + 2 * DS_EDGE - 1) / (2 * DS_EDGE) * 2; }
inline int64_t ds_elements(int64_t owners, int64_t T, int window) { return owners * ds_query_blocks(T) * ds_bands(T, window) * DS_BLOCK; }

#ifdef __CUDACC__
__device__ inline int64_t ds_block(int owner, int query_block, int key_block, int T, int window) {
    return ((owner * ds_query_blocks(T) + query_block) * ds_bands(T, window) + query_block - key_block) * DS_BLOCK;
}
// Position 0 .. 63 in a row -> the query it stands for
__device__ inline int ds_query(int position) { return (position / 32 * 4 + position % 8 / 2) * 8 + position / 8 % 4 * 2 + position % 2; }
// A lane's eight results of row r (n = 4 half .. + 3), packed
__device__ inline void ds_store(bf16* block, int r, int half, uint32_t n0, uint32_t n1, uint32_t n2, uint32_t n3) {
    const int chunk = half * 4 + threadIdx.x % 4;
    asm volatile("st.global.L1::no_allocate.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(block + r * DS_EDGE + (chunk ^ (r % 8)) * 8), "r"(n0), "r"(n1),
                 "r"(n2), "r"(n3) : "memory");
}

// ---------------------------------------------------------------------------------------------------------------------

using ::LOG2E, ::exp2_fast;
__device__ inline uint32_t pack(float low, float high) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
}

// ends[p] = the first query i > p of the same sequence with starts[i] > p, or T: starts do not fall, so halving finds it
template <int> __global__ void document_ends(int* ends, const int* starts, int B, int T) {
    const int64_t at = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= (int64_t)B * T) return;
    const int p = (int)(at % T);
    const int* s = starts + (at - p);
    int low = p + 1, high = T;
    while (low < high) {
        const int middle = low + (high - low) / 2;
        if (s[middle] > p) high = middle;
        else low = middle + 1;
    }
    ends[at] = low;
}
#endif // __CUDACC__

} // namespace attn
} // namespace gpu
