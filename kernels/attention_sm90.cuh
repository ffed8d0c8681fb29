// Causal sliding-window attention for Hopper (compute capability 9.0, code built for sm_90a), bf16, head_dim 64 or 128. Same
// formula, layout and results' form as attention.cuh (the portable path), ring of earlier keys and document starts included.
//
// Each block is three warpgroups: one thread of the first feeds tiles through TMA into rings in shared memory (mbarriers say
// full and empty), the other two own 64 rows each and multiply by wgmma. Blocks stay resident (one per SM) and take work items
// in a fixed order, so the next item's loads run during the last one's epilogue. Every result has one owner and a fixed order
// of sums: no atomics.
//
// Forward, per warpgroup and key tile: S' = Q K'^T and then O += P V of the tile before are issued; softmax of S' runs while
// P V does, across the ends of items too. The two warpgroups take turns at issuing (order_wait, order_pass), so that one's
// softmax runs during the other's products. Tiles that no query of the item sees are never loaded, halves that a warpgroup does not
// see not multiplied; only 64 x 64 blocks on an edge (diagonal, window, document, ring) are masked.
//
// Backward: blocks that own keys make dk and dv (S^T, dP^T, P^T dO, dS^T Q) and keep dS in memory (attention_common.cuh), blocks that
// own queries then make dq = dS K: 5 products, no atomics, no fp32 dq buffer. Where dS does not fit its workspace, keys come from the
// ring, or head_dim is 64, the second kernel makes S and dP again: 7 products. Precision as in the portable path: fp32 sums and softmax; P and dS
// rounded to bf16 for their product.
//
// Flops per visible pair: 4 hd forward, 10 hd backward. Samba-421M (B 8, T 4096, window 2048, 12 heads of 128): 309 and 773 GFLOP a
// layer, of which blocks of 64 x 64 do 319 and 797: 0.32 and 0.81 ms at the H100's nominal rate; dS is 1.25 GB written and read.
// H200: forward 0.528 ms, backward 1.61 with delta (dev/results/2026-11-25_h200_attention).
#pragma once
#include <algorithm>

#include <cuda.h>

#include "attention_common.cuh"

// wgmma and setmaxnreg exist for sm_90a only: other passes compile empty kernels, which usable() keeps from being launched.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || (defined(__CUDA_ARCH_SPECIFIC__) && __CUDA_ARCH_SPECIFIC__ == 900)
#define SAMBA_SM90A_CODE 1
#endif

namespace gpu {
namespace sm90 {

using attn::bf16, attn::Args, attn::exp2_fast, attn::pack, attn::shared_address;

// ---------------------------------------------------------------------------------------------------------------------
// Can it run?

// A mark that the sm_90a code is in this binary: that version of this kernel declares more shared memory. Never launched.
constexpr int MARK_BYTES = 4096;
template <int> __global__ void built_for_sm90a(unsigned char* p) {
#ifdef SAMBA_SM90A_CODE
    __shared__ volatile unsigned char mark[MARK_BYTES];
    mark[threadIdx.x] = p[threadIdx.x];
    p[threadIdx.x] = mark[threadIdx.x ^ 1];
#else
    (void)p;
#endif
}

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);
inline EncodeTiled encode_tiled() {                                      // from the driver, without linking to it
    static const EncodeTiled function = [] {
        void* p = nullptr;
        cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
        const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &p, 12000, cudaEnableDefault, &result);
#else
        const cudaError_t status = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &p, cudaEnableDefault, &result);
#endif
        if (status != cudaSuccess || result != cudaDriverEntryPointSuccess) cudaGetLastError(), p = nullptr;
        return (EncodeTiled)p;
    }();
    return function;
}

inline bool usable() {
    static signed char known[64] = {};                                   // per device: 0 not asked, 1 yes, -1 no; races write equal values
    int device = 0, major = 0, minor = 0;
    CUDA_CHECK(cudaGetDevice(&device));
    signed char& answer = known[device % 64];
    if (answer) return answer > 0;
    CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    cudaFuncAttributes attributes{};
    const bool present = major == 9 && minor == 0 && cudaFuncGetAttributes(&attributes, built_for_sm90a<0>) == cudaSuccess &&
                         attributes.sharedSizeBytes >= MARK_BYTES && encode_tiled();
    cudaGetLastError();
    return (answer = present ? 1 : -1) > 0;
}

// A (B, T, heads, hd) tensor seen as boxes of `rows` positions x 64 columns of one head. T is a dimension of its own: rows past
// it read as zeros and are not written, whatever the next batch holds.
inline CUtensorMap tensor_map(const bf16* p, int B, int64_t T, int64_t heads, int hd, int rows) {
    CUtensorMap map;
    const cuuint64_t sizes[4] = {(cuuint64_t)hd, (cuuint64_t)heads, (cuuint64_t)T, (cuuint64_t)B};
    const cuuint64_t strides[3] = {(cuuint64_t)hd * 2, (cuuint64_t)heads * hd * 2, (cuuint64_t)T * heads * hd * 2};
    const cuuint32_t box[4] = {64, 1, (cuuint32_t)rows, 1}, steps[4] = {1, 1, 1, 1};
    const CUresult status = encode_tiled()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<bf16*>(p), sizes, strides, box, steps,
                                           CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                           CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS)
        fail("attention: cuTensorMapEncodeTiled says %d for B %d, T %lld, %lld heads of %d", (int)status, B, (long long)T, (long long)heads, hd);
    return map;
}

// ---------------------------------------------------------------------------------------------------------------------
// Work

// Item n of the fixed order is one tile of one owner (a batch's head, or group). Owners come in sections of about a quarter of
// the blocks: inside a section the tiles with the most work come first for all its owners, so four tiles of each owner run
// at a time and share its keys in L2.
// n / value for 0 <= n < 2^31 without a division: n (1 + multiplier / 2^32) / 2^shift
struct Divisor {
    uint32_t value, multiplier;
    int shift;
    Divisor(int d = 1) : value(d), shift(0) {
        while ((uint64_t)1 << shift < value) shift++;
        multiplier = (uint32_t)((((((uint64_t)1 << shift) - value) << 32) / value) + 1);
    }
#ifdef __CUDACC__
    __device__ int quotient(int n) const { return (int)((__umulhi((uint32_t)n, multiplier) + (uint32_t)n) >> shift); }
#endif
};
struct Schedule {
    int tiles, owners, items;                                            // items = tiles * owners
    Divisor section, last_section, section_items;                        // owners in a section, in the last one; items in a section
    bool last_first;                                                     // the most work: the last tiles (queries) or the first (keys)
};
struct Work { int tile, owner; };

#ifdef __CUDACC__
__device__ inline Work work_item(const Schedule& s, int n) {
    const int begin = s.section_items.quotient(n) * (int)s.section.value, rest = n - begin * s.tiles;
    const bool whole = begin + (int)s.section.value <= s.owners;
    const int order = whole ? s.section.quotient(rest) : s.last_section.quotient(rest);
    return {s.last_first ? s.tiles - 1 - order : order, begin + rest - order * (int)(whole ? s.section.value : s.last_section.value)};
}
// The round-th item of this block: there and back again over the blocks, which evens out the falling amounts of work. Where a section
// is a whole number of rounds, the next one begins with the direction in which this one ended: its light tiles meet other blocks.
__device__ inline int item_of_round(const Schedule& s, int round) {
    const int first = round * gridDim.x;
    const bool back = (round + s.section_items.quotient(first)) & 1;
    return first + (back ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
}

extern __shared__ __align__(1024) unsigned char sm90_shared[];

constexpr int WARPGROUP = 128, BLOCK = 3 * WARPGROUP;                    // producer, two consumers
constexpr int ROWS = 128;                                                // of every tile: 64 for each consumer
template <int HD> constexpr int TILE_BYTES = ROWS * HD * 2;
constexpr int LOWER = 1, UPPER = 2, BOTH = 3;                            // halves of a tile of keys

// The ring's slots (capacity 0: there is none): position p < 0 is in slot split + p, or + capacity where that is negative
struct Prefix { int capacity, split; };

// What every kernel gets besides its tensor maps
struct Problem : Args<bf16> {
    Schedule schedule;
    Divisor heads;                                                       // owners of a sequence
    Prefix prefix;
    int padded;                                                          // lse2 and delta are (B, H, padded): infinity and 0 past T
};

#ifdef SAMBA_SM90A_CODE
// A tile of queries: the keys it sees are `count` tiles, of which the first is on the diagonal, each before the last. A tile of
// the ring that slot 0 divides comes twice, as its newer and its older part; `newer`: the last visit to the newer side of slot 0.
// first0, first1: the first key that the first and the second consumer's 64 queries see
struct QueryWork { int owner, b, h, i0, count, newer, twice, first0, first1; };
__device__ inline QueryWork query_work(const Problem& a, int item) {
    const Work work = work_item(a.schedule, item);
    const Prefix prefix = a.prefix;
    const int b = a.heads.quotient(work.owner), i0 = work.tile * ROWS, first = a.first_key(b, i0);
    const int twice = prefix.capacity > 0 && prefix.split % ROWS != 0 && first < -prefix.split;
    return {work.owner, b, work.owner - b * a.H, i0, work.tile - (first >> 7) + 1 + twice, work.tile - (-prefix.split >> 7), twice,
            first, a.first_key(b, i0 + 64)};
}
// Visit j: keys n0 .. n0 + 127, of which from .. to are there, at row t of the call's keys or of the ring
struct KeyTile { int n0, t, from, to; bool ring; };
__device__ inline KeyTile key_tile(const QueryWork& work, int j, const Prefix& prefix) {
    const bool older = work.twice && j > work.newer;
    const int n0 = work.i0 - (j - older) * ROWS;
    if (n0 >= 0) return {n0, n0, 0, INT_MAX, false};
    if (j > work.newer) return {n0, prefix.split + prefix.capacity + n0, INT_MIN, -prefix.split - 1, true};
    return {n0, prefix.split + n0, -prefix.split, INT_MAX, true};
}
// The halves of a key tile that a consumer's 64 queries may see. Half a tile is worked on like a smaller tile.
__device__ inline int parts_of(int consumer, const QueryWork& work, int n0) {
    const int first = consumer ? work.first1 : work.first0;
    return (n0 + 63 >= first ? LOWER : 0) | (n0 + 64 <= work.i0 + consumer * 64 + 63 && n0 + 127 >= first ? UPPER : 0);
}
__device__ inline int half_offset(int parts) { return parts == UPPER ? 64 * 128 : 0; }           // bytes, to its rows in each slab

// ---------------------------------------------------------------------------------------------------------------------
// Instructions

__device__ inline void barrier_init(uint32_t bar, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}
__device__ inline void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ inline void barrier_expect(uint32_t bar, int bytes) {        // one arrival, and so many bytes to come
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ inline void barrier_arrive(uint32_t bar) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory"); }
__device__ inline void barrier_wait(uint32_t bar, int parity) {
    asm volatile(
        "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra DONE;\nbra AGAIN;\nDONE:\n}"
        ::"r"(bar), "r"(parity) : "memory");
}
__device__ inline void named_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
__device__ inline void named_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

__device__ inline void tma_load(uint32_t to, const CUtensorMap* map, uint32_t bar, int column, int head, int t, int b) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
                 ::"r"(to), "l"(map), "r"(bar), "r"(column), "r"(head), "r"(t), "r"(b) : "memory");
}
__device__ inline void bulk_load(uint32_t to, const void* from, int bytes, uint32_t bar) {           // addresses and size: multiples of 16
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(to), "l"(from), "r"(bytes), "r"(bar) : "memory");
}
__device__ inline void tma_store(const CUtensorMap* map, uint32_t from, int column, int head, int t, int b) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
                 ::"l"(map), "r"(from), "r"(column), "r"(head), "r"(t), "r"(b) : "memory");
}
__device__ inline void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
__device__ inline void tma_store_wait() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }   // shared memory may be reused
__device__ inline void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }        // our stores before TMA's reads

template <int N> __device__ inline void registers_up() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> __device__ inline void registers_down() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }

// ---------------------------------------------------------------------------------------------------------------------
// Tiles and wgmma
//
// A tile of ROWS x HD bf16 is HD / 64 slabs of ROWS x 128 bytes, each written by one TMA box; in a slab the 16-byte chunk c of
// row r lies in place c ^ (r % 8) (TMA's and wgmma's 128-byte swizzle). Slabs start at multiples of 1024 bytes.
//
// A descriptor names an operand by its start, two strides and the swizzle, in units of 16 bytes:
//   along rows    the tile's columns are the product's k. 8-row groups are 1024 bytes apart; 16 columns further: + 32 bytes.
//   along columns the tile's rows are k, its columns n. 8-row groups 1024 bytes apart (second stride), slabs of 64 columns
//                 ROWS * 128 apart (first stride); 16 rows further: + 2048 bytes.

__device__ inline uint64_t descriptor(uint32_t at, uint32_t slab_bytes) {
    return (uint64_t)((at & 0x3ffff) >> 4) | (uint64_t)(slab_bytes >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }     // registers written before are operands now
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> __device__ inline void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }
// The compiler takes an asm's results for final at once; uses must not move above the wait, nor registers be reused before it.
template <int N> __device__ inline void hold(float (&c)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(c[i])::"memory");
}
template <int K> __device__ inline void hold(uint32_t (&p)[K][4]) {
#pragma unroll
    for (int k = 0; k < K; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) asm volatile("" : "+r"(p[k][i])::"memory");
}

#define SM90_ACC32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define SM90_ACC64 \
    SM90_ACC32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define SM90_ADD(yes) "{\n.reg .pred add;\nsetp.ne.b32 add, " yes ", 0;\n"
#define SM90_F8(f, c, i) f(c[i]), f(c[i + 1]), f(c[i + 2]), f(c[i + 3]), f(c[i + 4]), f(c[i + 5]), f(c[i + 6]), f(c[i + 7])
#define SM90_F32(f, c, i) SM90_F8(f, c, i), SM90_F8(f, c, i + 8), SM90_F8(f, c, i + 16), SM90_F8(f, c, i + 24)

// c (64, 8 NT) += a b, 16 of k. Lane l of warp w holds of row 16 w + l/4: c[4 n], c[4 n + 1] (columns 8 n + l%4 * 2, + 1); and
// of that row + 8: c[4 n + 2], c[4 n + 3].
// a and b along rows of tiles:
__device__ inline void wgmma_rows(float (&c)[64], uint64_t a, uint64_t b) {
    asm volatile(SM90_ADD("1") "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" SM90_ACC64 "}, %64, %65, add, 1, 1, 0, 0;\n}"
                 : SM90_F32("+f", c, 0), SM90_F32("+f", c, 32) : "l"(a), "l"(b));
}
__device__ inline void wgmma_rows(float (&c)[32], uint64_t a, uint64_t b) {
    asm volatile(SM90_ADD("1") "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" SM90_ACC32 "}, %32, %33, add, 1, 1, 0, 0;\n}"
                 : SM90_F32("+f", c, 0) : "l"(a), "l"(b));
}
// the same, c = a b: what c was is not read, so its registers are free until then
__device__ inline void wgmma_rows_first(float (&c)[64], uint64_t a, uint64_t b) {
    asm volatile(SM90_ADD("0") "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" SM90_ACC64 "}, %64, %65, add, 1, 1, 0, 0;\n}"
                 : SM90_F32("=f", c, 0), SM90_F32("=f", c, 32) : "l"(a), "l"(b));
}
__device__ inline void wgmma_rows_first(float (&c)[32], uint64_t a, uint64_t b) {
    asm volatile(SM90_ADD("0") "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" SM90_ACC32 "}, %32, %33, add, 1, 1, 0, 0;\n}"
                 : SM90_F32("=f", c, 0) : "l"(a), "l"(b));
}
// a from registers, b along columns; c = a b if not add
__device__ inline void wgmma_columns(float (&c)[64], const uint32_t (&a)[4], uint64_t b, int add) {
    asm volatile(SM90_ADD("%69") "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" SM90_ACC64 "}, {%64,%65,%66,%67}, %68, add, 1, 1, 1;\n}"
                 : SM90_F32("+f", c, 0), SM90_F32("+f", c, 32) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
__device__ inline void wgmma_columns(float (&c)[32], const uint32_t (&a)[4], uint64_t b, int add) {
    asm volatile(SM90_ADD("%37") "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" SM90_ACC32 "}, {%32,%33,%34,%35}, %36, add, 1, 1, 1;\n}"
                 : SM90_F32("+f", c, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
// a and b along columns: a's rows are k, its 64 columns the product's rows
__device__ inline void wgmma_columns(float (&c)[64], uint64_t a, uint64_t b, int add) {
    asm volatile(SM90_ADD("%66") "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" SM90_ACC64 "}, %64, %65, add, 1, 1, 1, 1;\n}"
                 : SM90_F32("+f", c, 0), SM90_F32("+f", c, 32) : "l"(a), "l"(b), "r"(add));
}
__device__ inline void wgmma_columns(float (&c)[32], uint64_t a, uint64_t b, int add) {
    asm volatile(SM90_ADD("%34") "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" SM90_ACC32 "}, %32, %33, add, 1, 1, 1, 1;\n}"
                 : SM90_F32("+f", c, 0) : "l"(a), "l"(b), "r"(add));
}

// The registers of a tile of N columns (N rows, as an operand), at the start of those of a larger one
template <int N, int NR> __device__ inline float (&part_of(float (&c)[NR]))[N / 2] { return *reinterpret_cast<float (*)[N / 2]>(c); }
template <int N, int K> __device__ inline uint32_t (&part_of(uint32_t (&p)[K][4]))[N / 16][4] {
    return *reinterpret_cast<uint32_t (*)[N / 16][4]>(p);
}

// c (64, N) = a b^T over HD columns: 64 rows of a tile of A_ROWS (a: address of the first of them) against N rows of a tile of
// B_ROWS. Products are issued and committed, not waited for.
template <int HD, int A_ROWS, int B_ROWS, int NR> __device__ inline void issue_rows(float (&c)[NR], uint32_t a, uint32_t b) {
    const uint64_t da = descriptor(a, 0), db = descriptor(b, 0);
    wgmma_fence();
    wgmma_rows_first(c, da, db);
#pragma unroll
    for (int k = 1; k < HD / 16; k++) wgmma_rows(c, da + (k / 4 * A_ROWS * 128 + k % 4 * 32) / 16, db + (k / 4 * B_ROWS * 128 + k % 4 * 32) / 16);
    wgmma_commit();
    hold(c);
}
// c (64, HD) += p b, or = p b if not add: p (64, 16 K) in registers, b 16 K rows of a tile of B_ROWS
template <int B_ROWS, int K, int NR> __device__ inline void issue_columns(float (&c)[NR], uint32_t (&p)[K][4], uint32_t b, int add = 1) {
    const uint64_t db = descriptor(b, B_ROWS * 128);
    hold(c), hold(p);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < K; k++) wgmma_columns(c, p[k], db + k * 2048 / 16, k == 0 ? add : 1);
    wgmma_commit();
    hold(c);
}
// c (64, HD) += a^T b, or = a^T b if not add: a 64 rows (k) of 64 columns, b 64 rows of a tile of B_ROWS
template <int B_ROWS, int NR> __device__ inline void issue_transposed(float (&c)[NR], uint32_t a, uint32_t b, int add) {
    const uint64_t da = descriptor(a, 0), db = descriptor(b, B_ROWS * 128);
    hold(c);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; k++) wgmma_columns(c, da + k * 2048 / 16, db + k * 2048 / 16, k == 0 ? add : 1);
    wgmma_commit();
    hold(c);
}
// A result's registers are, rounded, the a operand of the next product.
template <int K> __device__ inline void pack_operand(uint32_t (&p)[K][4], const float (&c)[8 * K]) {
#pragma unroll
    for (int k = 0; k < K; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) p[k][i] = pack(c[8 * k + 2 * i], c[8 * k + 2 * i + 1]);
}

// Scores of unseen pairs become -infinity, in 64 columns: this lane's first row sees columns from[0] .. to[0], its second from[1] .. to[1].
__device__ inline void mask(float* s, const int (&from)[2], const int (&to)[2]) {
    // How many of this lane's 16 columns, 8 n + column + e, lie before column x
    const int column = threadIdx.x % 4 * 2;
    auto before = [&](int x) {
        const int y = min(max(x - column, 0), 64);
        return y / 8 * 2 + min(y % 8, 2);
    };
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint32_t seen = ((1u << before(min(to[half], 63) + 1)) - 1) & ~((1u << before(from[half])) - 1);   // bit 2 n + e
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                if (!(seen >> (2 * n + e) & 1)) s[n * 4 + half * 2 + e] = -INFINITY;
    }
}
// The scores of a consumer's 64 queries, of which `row` is this lane's first, with N keys from n0 on. all: the first key that all 64 see
__device__ inline void
mask_keys(float* s, const Args<bf16>& a, const QueryWork& work, const KeyTile& tile, int n0, int N, int i, int least, int all) {
#pragma unroll
    for (int part = 0; part < ROWS; part += 64) {
        const int p = n0 + part;
        if (part >= N || p + 63 <= least && p >= all && p >= tile.from && p + 63 <= tile.to) continue;
        int from[2], to[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int query = i + half * 8;
            from[half] = max(a.first_key(work.b, query), tile.from) - p, to[half] = min(query, tile.to) - p;
        }
        mask(s + part / 2, from, to);
    }
}

// Gradients of turned queries or keys become those before the turn (kernels/cpu/rope.h): columns j and j + HD / 2 of a row are the same
// lane's. t: positions of this lane's two rows
template <int NR> __device__ inline void turn_back(float (&x)[NR], const Args<bf16>& a, const int (&t)[2]) {
    constexpr int HD = NR * 2, N = HD / 16;                              // column 8 (n + N) is that of n, + HD / 2
    if (!a.rope) return;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float* row = a.rope + (int64_t)min(t[half], a.T - 1) * HD + threadIdx.x % 4 * 4;
#pragma unroll
        for (int n = 0; n < N; n++) {
            const Vec<float, 4> cos_sin = load_vec<4>(row + n * 16);     // of j = 8 n + lane%4 * 2, and of j + 1
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float &x1 = x[n * 4 + half * 2 + e], &x2 = x[(n + N) * 4 + half * 2 + e];
                const float first = x1, second = x2;
                x1 = fmaf(first, cos_sin[2 * e], second * cos_sin[2 * e + 1]);
                x2 = fmaf(second, cos_sin[2 * e], -first * cos_sin[2 * e + 1]);
            }
        }
    }
}

// The warpgroup's 64 rows, rounded, into rows of a tile of TILE_ROWS in the form TMA stores; `rows`: its first row. factor: per half.
// row_of: where a row of the result belongs
struct SameRow { __device__ int operator()(int row) const { return row; } };
template <int TILE_ROWS, class F = SameRow, int NR>
__device__ inline void stage_rows(unsigned char* rows, const float (&c)[NR], const float (&factor)[2], F row_of = {}) {
    // Four 8 x 8 matrices an instruction: both halves of two 16-byte chunks; each lane names the place of one of their rows
    const int lane = threadIdx.x % WARP, r = row_of(threadIdx.x / WARP % 4 * 16 + lane % 16);
    const uint32_t row = shared_address(rows) + r * 128;
#pragma unroll
    for (int n = 0; n < NR / 4; n += 2) {
        const float* x = c + n * 4;
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::
                     "r"(row + n / 8 * TILE_ROWS * 128 + ((n % 8 + lane / 16) ^ r % 8) * 16),
                     "r"(pack(x[0] * factor[0], x[1] * factor[0])), "r"(pack(x[2] * factor[1], x[3] * factor[1])),
                     "r"(pack(x[4] * factor[0], x[5] * factor[0])), "r"(pack(x[6] * factor[1], x[7] * factor[1])) : "memory");
    }
}
// Staged rows (a box of the map) to positions t .. of a head, as far as they exist. By one thread; committed by the caller
template <int HD, int TILE_ROWS> __device__ inline void store_tile(const CUtensorMap* map, const unsigned char* rows, int head, int t, int b) {
    for (int slab = 0; slab < HD / 64; slab++) tma_store(map, shared_address(rows) + slab * TILE_ROWS * 128, slab * 64, head, t, b);
}

// A ring of tiles: position n of the sequence of loads lies in stage n % STAGES, for the (n / STAGES)-th time
template <int STAGES> struct Ring {
    uint32_t tiles, bars;                                                // addresses: of stage 0; of STAGES barriers "full", then STAGES "empty"
    int bytes;
    __device__ uint32_t tile(int n) const { return tiles + n % STAGES * bytes; }
    __device__ uint32_t full_bar(int n) const { return bars + n % STAGES * 8; }
    __device__ uint32_t empty_bar(int n) const { return bars + (STAGES + n % STAGES) * 8; }
    __device__ void wait_full(int n) const { barrier_wait(full_bar(n), n / STAGES % 2); }
    __device__ void wait_empty(int n) const { barrier_wait(empty_bar(n), n / STAGES % 2 ^ 1); }
    __device__ void release(int n) const {                               // by every consumer warp, after its products are done
        __syncwarp();                                                    // all lanes have read before one of them says so
        if (threadIdx.x % WARP == 0) barrier_arrive(empty_bar(n));
    }
    __device__ void init(int releases = 2 * WARPGROUP / WARP) const {
        for (int i = 0; i < STAGES; i++) barrier_init(full_bar(i), 1), barrier_init(empty_bar(i), releases);
    }
};
// The same stages counted as one goes: no remainders of divisions
template <int STAGES> struct Cursor {
    int stage = 0, parity = 1;
    __device__ void wait_full(const Ring<STAGES>& ring) const { barrier_wait(full_bar(ring), parity ^ 1); }
    __device__ void release(const Ring<STAGES>& ring) const { ring.release(stage); }
    __device__ void wait_empty(const Ring<STAGES>& ring) const { barrier_wait(ring.bars + (STAGES + stage) * 8, parity); }
    __device__ uint32_t full_bar(const Ring<STAGES>& ring) const { return ring.bars + stage * 8; }
    __device__ uint32_t tile(const Ring<STAGES>& ring) const { return ring.tiles + stage * ring.bytes; }
    __device__ void next() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};
// A tile of N positions from t on, by a map whose boxes have BOX rows
template <int HD, int N, int BOX> __device__ inline void load_tile(uint32_t tile, uint32_t bar, const CUtensorMap* map, int head, int t, int b) {
#pragma unroll
    for (int slab = 0; slab < HD / 64; slab++)
#pragma unroll
        for (int r = 0; r < N; r += BOX) tma_load(tile + (slab * N + r) * 128, map, bar, slab * 64, head, t + r, b);
}
// The same as position n of a ring, when its stage is empty
template <int HD, int STAGES> __device__ inline void load_stage(const Ring<STAGES>& ring, int n, const CUtensorMap* map, int head, int t, int b) {
    ring.wait_empty(n);
    barrier_expect(ring.full_bar(n), TILE_BYTES<HD>);
    load_tile<HD, ROWS, ROWS>(ring.tile(n), ring.full_bar(n), map, head, t, b);
}
// A kernel for problems without documents and ring is compiled apart: what there is not costs it nothing
template <bool EXTRAS> __device__ inline Problem simplified(const Problem& given) {
    Problem a = given;
    if (!EXTRAS) a.ring = nullptr, a.starts = a.ends = nullptr, a.prefix = {0, 0};
    return a;
}

// The maps a producer loads keys by
struct KeyMaps { const CUtensorMap *qkv, *ring; };
// Keys (value = 0) or values (1) of a visit, as position n of a ring of tiles
template <int HD, int STAGES>
__device__ inline void load_keys(const Ring<STAGES>& stages, int n, const KeyMaps& maps, const Args<bf16>& a, const QueryWork& work,
                                 const KeyTile& tile, int value) {
    const int heads = a.H / a.G, g = work.h / heads;
    load_stage<HD>(stages, n, tile.ring ? maps.ring : maps.qkv, tile.ring ? value * a.G + g : g * (heads + 2) + heads + value, tile.t, work.b);
}

// 0 or 1; the compiler must see that it is one for a warp
__device__ inline int which_consumer() { return __shfl_sync(0xffffffffu, threadIdx.x / WARPGROUP, 0) - 1; }

// Gradients of a warpgroup, when all its products with the tiles where they are staged are done: stage() by all, send() by one thread
template <class Stage, class Send> __device__ inline void store_gradients(int consumer, bool real, Stage stage, Send send) {
    named_sync(3 + consumer, WARPGROUP);
    stage();
    fence_async();
    named_sync(3 + consumer, WARPGROUP);
    if (threadIdx.x % WARPGROUP == 0 && real) send(), tma_store_commit();
}
// That store has read its tiles: they may be loaded again
template <int STAGES> __device__ inline void release_staging(const Ring<STAGES>& ring, int round) {
    if (threadIdx.x % WARPGROUP == 0) tma_store_wait(), barrier_arrive(ring.empty_bar(round));
}

// Turns at issuing products: barrier 1 is the first consumer's, 2 the second's
__device__ inline void order_wait(int consumer) { named_sync(1 + consumer, 2 * WARPGROUP); }
__device__ inline void order_pass(int consumer) { named_arrive(2 - consumer, 2 * WARPGROUP); }

// Of a lane's two rows: probabilities so far are exp2(c s - base), `sum` is the lane's own part of their sum
struct Statistics { float base[2] = {-INFINITY, -INFINITY}, sum[2] = {}; };

// s becomes exp2(c s - base). A base may be up to SLACK below the row's maximum: terms stay under 2^SLACK, as exact as with the maximum, and
// hardly a tile after an item's first raises it. If a row of the warp goes beyond, the warp's bases become its maxima; true then, and
// `shrink` is what earlier sums (done here) and outputs must be multiplied with.
constexpr float SLACK = 8;
template <int NR> __device__ inline bool online_softmax(float (&s)[NR], Statistics& stat, float (&shrink)[2], float c) {
    float top[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float a = s[half * 2], b = s[half * 2 + 1];
#pragma unroll
        for (int n = 1; n < NR / 4; n++) a = fmaxf(a, s[n * 4 + half * 2]), b = fmaxf(b, s[n * 4 + half * 2 + 1]);
        a = fmaxf(a, b);
        a = fmaxf(a, __shfl_xor_sync(0xffffffffu, a, 1));
        top[half] = fmaxf(a, __shfl_xor_sync(0xffffffffu, a, 2)) * c;
    }
    const bool raise = __any_sync(0xffffffffu, top[0] > stat.base[0] + SLACK || top[1] > stat.base[1] + SLACK);
    if (raise)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float base = fmaxf(stat.base[half], top[half]);        // finite: the first tile holds every row's own key
            shrink[half] = exp2_fast(stat.base[half] - base);
            stat.base[half] = base, stat.sum[half] *= shrink[half];
        }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float x = 0.f, y = 0.f;
#pragma unroll
        for (int n = 0; n < NR / 4; n++) {
            x += s[n * 4 + half * 2] = exp2_fast(fmaf(s[n * 4 + half * 2], c, -stat.base[half]));
            y += s[n * 4 + half * 2 + 1] = exp2_fast(fmaf(s[n * 4 + half * 2 + 1], c, -stat.base[half]));
        }
        stat.sum[half] += x + y;
    }
    return raise;
}
template <int NR> __device__ inline void rescale(float (&o)[NR], const float (&factor)[2]) {
#pragma unroll
    for (int n = 0; n < NR / 4; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) o[n * 4 + e] *= factor[e / 2];
}
#endif // SAMBA_SM90A_CODE

// ---------------------------------------------------------------------------------------------------------------------
// Forward

template <int HD> constexpr int FORWARD_STAGES = HD == 64 ? 4 : 2;
// Q ring | K ring | V ring | O staging | barriers
template <int HD> constexpr int forward_shared() { return (3 + 2 * FORWARD_STAGES<HD>) * TILE_BYTES<HD> + 32 + 32 * FORWARD_STAGES<HD>; }

#ifdef SAMBA_SM90A_CODE
template <int HD> struct ForwardRings {
    static constexpr int STAGES = FORWARD_STAGES<HD>, TILE = TILE_BYTES<HD>, STAGING = (2 + 2 * STAGES) * TILE;
    Ring<2> queries;
    Ring<STAGES> keys, values;
    __device__ ForwardRings(uint32_t shared, uint32_t bars)
        : queries{shared, bars, TILE}, keys{shared + 2 * TILE, bars + 32, TILE},
          values{shared + (2 + STAGES) * TILE, bars + 32 + 16 * STAGES, TILE} {}
};

// The order in which the consumers want tiles: an item's queries and first keys, then the last values of the item before.
template <int HD> __device__ inline void
forward_produce(const ForwardRings<HD>& rings, const CUtensorMap* qkv_map, const CUtensorMap* ring_map, const Problem& a) {
    const int heads = a.H / a.G;
    const KeyMaps maps{qkv_map, ring_map};
    QueryWork before{};
    KeyTile tile_before{};
    int n = 0;
    for (int round = 0, item; (item = item_of_round(a.schedule, round)) < a.schedule.items; round++) {
        const QueryWork work = query_work(a, item);
        load_stage<HD>(rings.queries, round, qkv_map, work.h / heads * (heads + 2) + work.h % heads, work.i0, work.b);
        for (int j = 0; j < work.count; j++, n++) {                      // the diagonal tile first; keys one ahead of values
            const KeyTile tile = key_tile(work, j, a.prefix);
            load_keys<HD>(rings.keys, n, maps, a, work, tile, 0);
            if (n > 0) load_keys<HD>(rings.values, n - 1, maps, a, before, tile_before, 1);
            before = work, tile_before = tile;
        }
    }
    load_keys<HD>(rings.values, n - 1, maps, a, before, tile_before, 1);
}

// One warpgroup's 64 rows. Key tiles of all its items form one sequence: step n issues the scores of tile n and the product with
// the values of tile n - 1, then does softmax n while the second runs; an item's results are stored in the next one's first step.
// A consumer is never idle: every instruction between its products counts, hidden are only those between the two issues, where
// the tensor cores would make it wait anyway. There the step looks ahead.
template <int HD> struct ForwardConsumer {
    const ForwardRings<HD>& rings;
    const CUtensorMap* out_map;
    const Problem& a;
    const int consumer = which_consumer();
    const int row = consumer * 64 + threadIdx.x / WARP % 4 * 16 + threadIdx.x % WARP / 4;   // of the tile: this lane's first
    const float c = rsqrtf((float)HD) * attn::LOG2E;
    float s[ROWS / 2] = {}, o[HD / 2] = {}, shrink[2];
    uint32_t p[ROWS / 16][4] = {};
    int n = 0, round = 0, j = 0;                                         // tile n of all, j of item `round`
    int parts = 0, now, coming;                                          // halves that are multiplied: of tiles n - 1 (p), n (s) and n + 1
    int all;                                                             // the first key that all 64 queries see
    QueryWork work, before, next;                                        // this item, the ones before and after it
    bool more;                                                           // whether there is one after it
    Statistics stat;

    template <int N> __device__ void issue_scores() {
        const uint32_t q_at = rings.queries.tile(round) + consumer * 64 * 128, k_at = rings.keys.tile(n) + half_offset(now);
        issue_rows<HD, ROWS, ROWS>(part_of<N>(s), q_at, k_at);
    }
    // The product with the values of tile `of`, first or not of its item
    __device__ void issue_output(int of, bool first) {
        const uint32_t v_at = rings.values.tile(of) + half_offset(parts);
        rings.values.wait_full(of);
        if (parts == BOTH) issue_columns<ROWS>(o, p, v_at, !first);
        else issue_columns<ROWS>(o, part_of<64>(p), v_at, !first);
    }
    // The halves of visit j that are multiplied: at least one
    __device__ int visible_parts(const QueryWork& of, int j) const {
        const int visible = parts_of(consumer, of, key_tile(of, j, a.prefix).n0);
        return visible ? visible : UPPER;
    }
    __device__ void look_ahead() {
        if (j == 0) {
            const int item = item_of_round(a.schedule, round + 1);
            more = item < a.schedule.items;
            if (more) next = query_work(a, item);
        }
        coming = j + 1 < work.count ? visible_parts(work, j + 1) : more ? visible_parts(next, 0) : 0;
    }
    // S is there: its tiles may go, what is unseen becomes -infinity
    template <int N> __device__ void scores_done() {
        hold(s);
        rings.keys.release(n);
        if (j == work.count - 1) rings.queries.release(round);
        const KeyTile tile = key_tile(work, j, a.prefix);
        mask_keys(s, a, work, tile, tile.n0 + (now == UPPER ? 64 : 0), N, work.i0 + row, work.i0 + consumer * 64, all);
    }
    // The first tile of all: nothing to overlap with
    template <int N> __device__ void begin() {
        rings.queries.wait_full(0);
        rings.keys.wait_full(0);
        issue_scores<N>();
        look_ahead();
        wgmma_wait<0>();
        scores_done<N>();
        online_softmax(part_of<N>(s), stat, shrink, c);
        pack_operand(part_of<N>(p), part_of<N>(s));
        parts = now;
    }
    template <int N> __device__ void step() {
        if (j == 0) rings.queries.wait_full(round);
        rings.keys.wait_full(n);
        order_wait(consumer);
        issue_scores<N>();
        look_ahead();
        issue_output(n - 1, j == 0 ? before.count == 1 : j == 1);
        order_pass(consumer);
        wgmma_wait<1>();
        scores_done<N>();
        const Statistics old = stat;
        if (j == 0) stat = Statistics{};
        const bool raised = online_softmax(part_of<N>(s), stat, shrink, c);
        wgmma_wait<0>();
        hold(o), hold(p);
        rings.values.release(n - 1);
        if (j == 0) store(before, old);
        else if (raised) rescale(o, shrink);
        pack_operand(part_of<N>(p), part_of<N>(s));
        parts = now;
    }
    __device__ void store(const QueryWork& of, const Statistics& stat) const {
        unsigned char* staging = sm90_shared + ForwardRings<HD>::STAGING + consumer * TILE_BYTES<HD> / 2;
        float sum[2], factor[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            sum[half] = stat.sum[half];
            sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 1);
            sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 2);
            factor[half] = __fdividef(1.f, sum[half]);                       // sum >= 1: the term of the key that set the base
        }
        const int first = threadIdx.x / WARP % 4 * 16, t = of.i0 + consumer * 64 + first;     // a warp stores its own 16 rows
        const bool leader = threadIdx.x % WARP == 0;
        if (leader) tma_store_wait();                                    // the last item's store has read them
        __syncwarp();
        stage_rows<64>(staging, o, factor);
        fence_async();
        __syncwarp();
        if (leader && t < a.T) {
            store_tile<HD, 64>(out_map, staging + first * 128, of.h, t, of.b);
            tma_store_commit();
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int i = of.i0 + row + half * 8;
            if (threadIdx.x % 4 == 0 && i < a.T) a.lse[(int64_t)of.owner * a.T + i] = (stat.base[half] + log2f(sum[half])) * (1 / attn::LOG2E);
        }
    }
    __device__ void begin_item(const QueryWork& item) {
        work = item;
        all = a.first_key(work.b, work.i0 + consumer * 64 + 63);
    }
    // On to the next tile, if there is one
    __device__ bool advance() {
        n++, now = coming;
        if (++j < work.count) return true;
        before = work, j = 0, round++;
        if (more) begin_item(next);
        return more;
    }
    __device__ void run() {
        begin_item(query_work(a, item_of_round(a.schedule, 0)));
        now = visible_parts(work, 0);
        if (now == BOTH) begin<128>();
        else begin<64>();
        if (consumer == 1) order_pass(1);
        while (advance())
            if (now == BOTH) step<128>();
            else step<64>();
        issue_output(n - 1, before.count == 1);
        wgmma_wait<0>();
        hold(o), hold(p);
        store(before, stat);
        if (consumer == 0) order_wait(0);                                // takes the other's last pass
        if (threadIdx.x % WARP == 0) tma_store_wait();
    }
};
#endif // SAMBA_SM90A_CODE

template <int HD, bool EXTRAS> __global__ void __launch_bounds__(BLOCK, 1)
forward(const __grid_constant__ CUtensorMap qkv_map, const __grid_constant__ CUtensorMap ring_map, const __grid_constant__ CUtensorMap out_map,
        const __grid_constant__ Problem given) {
#ifdef SAMBA_SM90A_CODE
    const Problem a = simplified<EXTRAS>(given);
    const uint32_t shared = shared_address(sm90_shared);
    const ForwardRings<HD> rings(shared, shared + ForwardRings<HD>::STAGING + TILE_BYTES<HD>);
    if (threadIdx.x == 0) {
        rings.queries.init(), rings.keys.init(), rings.values.init();
        barrier_init_done();
    }
    __syncthreads();
    if (threadIdx.x < WARPGROUP) {
        registers_down<24>();
        if (threadIdx.x == 0) forward_produce<HD>(rings, &qkv_map, &ring_map, a);
    } else {
        registers_up<240>();
        ForwardConsumer<HD>{rings, &out_map, a}.run();
    }
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward

inline int64_t padded_length(int64_t T) { return round_up(T, ROWS); }

// A block takes ROWS positions of one owner (b, h), eight lanes each.
template <int HD> __global__ void __launch_bounds__(256)
backward_statistics(const Problem a) {
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

// dq with S and dP made again: a block owns 128 queries of a head and visits the key tiles of their window, as forward does. A
// warpgroup's dq is staged in its rows of the item's query tile, and stored from there during the next item, whose queries have
// the ring's other stage.
constexpr int QUERIES_STAGES = 2;
// Q ring | dO | K ring | V ring | barriers
template <int HD> constexpr int backward_queries_shared() { return (3 + 2 * QUERIES_STAGES) * TILE_BYTES<HD> + 128; }

#ifdef SAMBA_SM90A_CODE
template <int HD> struct QueriesRings {
    static constexpr int STAGES = QUERIES_STAGES, TILE = TILE_BYTES<HD>, BARRIERS = (3 + 2 * STAGES) * TILE;
    Ring<2> queries;
    Ring<1> douts;
    Ring<STAGES> keys, values;
    __device__ QueriesRings(uint32_t shared, uint32_t bars)
        : queries{shared, bars, TILE}, douts{shared + 2 * TILE, bars + 32, TILE}, keys{shared + 3 * TILE, bars + 48, TILE},
          values{shared + (3 + STAGES) * TILE, bars + 48 + 16 * STAGES, TILE} {}
};

template <int HD> __device__ inline void
queries_produce(const QueriesRings<HD>& rings, const KeyMaps& maps, const CUtensorMap* dout_map, const Problem& a) {
    const int heads = a.H / a.G;
    for (int n = 0, round = 0, item; (item = item_of_round(a.schedule, round)) < a.schedule.items; round++) {
        const QueryWork work = query_work(a, item);
        load_stage<HD>(rings.queries, round, maps.qkv, work.h / heads * (heads + 2) + work.h % heads, work.i0, work.b);
        for (int j = 0; j < work.count; j++, n++) {
            const KeyTile tile = key_tile(work, j, a.prefix);
            load_keys<HD>(rings.keys, n, maps, a, work, tile, 0);
            load_keys<HD>(rings.values, n, maps, a, work, tile, 1);
            if (j == 0) load_stage<HD>(rings.douts, round, dout_map, work.h, work.i0, work.b);
        }
    }
}

// Queries' slot in a row of qkv
__device__ inline int query_slot(const Problem& a, int h) { return h / (a.H / a.G) * (a.H / a.G + 2) + h % (a.H / a.G); }

template <int HD> struct QueriesConsumer {
    const QueriesRings<HD>& rings;
    const CUtensorMap* dqkv_map;
    const Problem& a;
    const int consumer = which_consumer();
    const int row = consumer * 64 + threadIdx.x / WARP % 4 * 16 + threadIdx.x % WARP / 4;
    const float scale = rsqrtf((float)HD), c = scale * attn::LOG2E;
    float s[ROWS / 2] = {}, dp[ROWS / 2] = {}, dq[HD / 2] = {}, lse2[2], delta[2];
    uint32_t ds[ROWS / 16][4] = {};
    int all;                                                             // the first key that all 64 queries see

    __device__ void begin_item(const QueryWork& work) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int64_t at = (int64_t)work.owner * a.padded + work.i0 + row + half * 8;
            lse2[half] = a.lse2[at], delta[half] = a.delta[at];
        }
        all = a.first_key(work.b, work.i0 + consumer * 64 + 63);
    }
    // Tile j of item `round`, tile n of all: N columns of it. The product of the step before runs until this step's scores are issued.
    template <int N> __device__ void step(int n, int round, int j, int now, const QueryWork& work) {
        auto &st = part_of<N>(s), &dpt = part_of<N>(dp);
        const uint32_t k_at = rings.keys.tile(n) + half_offset(now), v_at = rings.values.tile(n) + half_offset(now);
        if (j == 0) rings.queries.wait_full(round);
        rings.keys.wait_full(n);
        issue_rows<HD, ROWS, ROWS>(st, rings.queries.tile(round) + consumer * 64 * 128, k_at);
        wgmma_wait<1>();
        hold(dq), hold(ds);
        if (j > 0) rings.keys.release(n - 1);
        else rings.douts.wait_full(round);
        rings.values.wait_full(n);
        issue_rows<HD, ROWS, ROWS>(dpt, rings.douts.tile(0) + consumer * 64 * 128, v_at);
        wgmma_wait<1>();
        hold(s);
        const KeyTile tile = key_tile(work, j, a.prefix);
        mask_keys(s, a, work, tile, tile.n0 + (now == UPPER ? 64 : 0), N, work.i0 + row, work.i0 + consumer * 64, all);
#pragma unroll
        for (int i = 0; i < N / 2; i++) st[i] = exp2_fast(fmaf(st[i], c, -lse2[i / 2 % 2]));
        wgmma_wait<0>();
        hold(dp);
        rings.values.release(n);
        if (j == work.count - 1) rings.douts.release(round);
#pragma unroll
        for (int i = 0; i < N / 2; i++) dpt[i] = st[i] * (dpt[i] - delta[i / 2 % 2]);
        pack_operand(part_of<N>(ds), dpt);
        issue_columns<ROWS>(dq, part_of<N>(ds), k_at, j > 0);
    }
    __device__ unsigned char* staging(int round) const { return sm90_shared + round % 2 * TILE_BYTES<HD> + consumer * 64 * 128; }
    __device__ void store(int round, const QueryWork& work) {
        const int t = work.i0 + consumer * 64;
        store_gradients(
            consumer, t < a.T,
            [&] {
                turn_back(dq, a, {work.i0 + row, work.i0 + row + 8});
                stage_rows<ROWS>(staging(round), dq, {scale, scale});
            },
            [&] { store_tile<HD, ROWS>(dqkv_map, staging(round), query_slot(a, work.h), t, work.b); });
    }
    __device__ void run() {
        int n = 0;
        for (int round = 0, item; (item = item_of_round(a.schedule, round)) < a.schedule.items; round++) {
            const QueryWork work = query_work(a, item);
            begin_item(work);
            for (int j = 0; j < work.count; j++, n++) {
                const int visible = parts_of(consumer, work, key_tile(work, j, a.prefix).n0), now = visible ? visible : UPPER;
                if (now == BOTH) step<128>(n, round, j, now, work);
                else step<64>(n, round, j, now, work);
                if (j == 0 && round > 0) release_staging(rings.queries, round - 1);
            }
            wgmma_wait<0>();
            hold(dq), hold(ds);
            rings.keys.release(n - 1);
            store(round, work);
        }
        if (threadIdx.x % WARPGROUP == 0) tma_store_wait();
    }
};
#endif // SAMBA_SM90A_CODE

template <int HD> __global__ void __launch_bounds__(BLOCK, 1)
backward_queries(const __grid_constant__ CUtensorMap qkv_map, const __grid_constant__ CUtensorMap ring_map,
                 const __grid_constant__ CUtensorMap dout_map, const __grid_constant__ CUtensorMap dqkv_map, const __grid_constant__ Problem a) {
#ifdef SAMBA_SM90A_CODE
    const uint32_t shared = shared_address(sm90_shared);
    const QueriesRings<HD> rings(shared, shared + QueriesRings<HD>::BARRIERS);
    if (threadIdx.x == 0) {
        rings.queries.init(2), rings.douts.init(), rings.keys.init(), rings.values.init();      // 2: see release_staging()
        barrier_init_done();
    }
    __syncthreads();
    if (threadIdx.x < WARPGROUP) {
        registers_down<24>();
        if (threadIdx.x == 0) queries_produce<HD>(rings, {&qkv_map, &ring_map}, &dout_map, a);
    } else {
        registers_up<240>();
        QueriesConsumer<HD>{rings, &dqkv_map, a}.run();
    }
#endif
}

// dq = dS K from the blocks that backward_keys kept: a block owns 128 queries of a head, a step is a tile of 128 keys and the up to
// four blocks of dS of it. Bound by reading dS: 32 KB for 2 x 2^20 multiply-adds at head_dim 128.
constexpr int PRODUCT_STAGES = 3;
constexpr int DS_BYTES = attn::DS_BLOCK * 2;
// ring of K | dS of consumer 0, lower and upper | of consumer 1; staging of dq; barriers
template <int HD> constexpr int backward_product_shared() {
    return PRODUCT_STAGES * (TILE_BYTES<HD> + 4 * DS_BYTES) + TILE_BYTES<HD> + 16 * PRODUCT_STAGES;
}

#ifdef SAMBA_SM90A_CODE
using ProductRing = Ring<PRODUCT_STAGES>;

template <int HD> __device__ inline void product_produce(const ProductRing& ring, const CUtensorMap* qkv_map, const Problem& a) {
    const int slots = a.H / a.G + 2;
    for (int n = 0, round = 0, item; (item = item_of_round(a.schedule, round)) < a.schedule.items; round++) {
        const QueryWork work = query_work(a, item);
        for (int j = 0; j < work.count; j++, n++) {
            const int n0 = work.i0 - j * ROWS;
            int parts[2];
#pragma unroll
            for (int c = 0; c < 2; c++) parts[c] = work.i0 + c * 64 < a.T ? parts_of(c, work, n0) : 0;
            const uint32_t bar = ring.full_bar(n);
            ring.wait_empty(n);
            barrier_expect(bar, TILE_BYTES<HD> + (__popc(parts[0]) + __popc(parts[1])) * DS_BYTES);
            load_tile<HD, ROWS, ROWS>(ring.tile(n), bar, qkv_map, work.h / (slots - 2) * slots + slots - 2, n0, work.b);
#pragma unroll
            for (int c = 0; c < 2; c++)
#pragma unroll
                for (int half = 0; half < 2; half++)
                    if (parts[c] >> half & 1)
                        bulk_load(ring.tile(n) + TILE_BYTES<HD> + (c * 2 + half) * DS_BYTES,
                                  a.ds + attn::ds_block(work.owner, work.i0 / 64 + c, n0 / 64 + half, a.T, a.window), DS_BYTES, bar);
        }
    }
}

template <int HD> struct ProductConsumer {
    static constexpr int TILE = TILE_BYTES<HD>;
    const ProductRing& ring;
    const CUtensorMap* dqkv_map;
    const Problem& a;
    const int consumer = which_consumer();
    float dq[HD / 2] = {};

    __device__ void store(const QueryWork& work) {
        unsigned char* staging = sm90_shared + PRODUCT_STAGES * (TILE + 4 * DS_BYTES) + consumer * TILE / 2;
        const float scale = rsqrtf((float)HD);
        const int t = work.i0 + consumer * 64;
        if (threadIdx.x % WARPGROUP == 0) tma_store_wait();              // the last item's store has read the staging tile
        store_gradients(
            consumer, t < a.T,
            [&] {
                const int row = threadIdx.x / WARP % 4 * 16 + threadIdx.x % WARP / 4;
                turn_back(dq, a, {t + attn::ds_query(row), t + attn::ds_query(row + 8)});
                stage_rows<64>(staging, dq, {scale, scale}, [](int position) { return attn::ds_query(position); });
            },
            [&] { store_tile<HD, 64>(dqkv_map, staging, query_slot(a, work.h), t, work.b); });
    }
    __device__ void run() {
        int n = 0;
        for (int round = 0, item; (item = item_of_round(a.schedule, round)) < a.schedule.items; round++) {
            const QueryWork work = query_work(a, item);
            int add = 0;
            for (int j = 0; j < work.count; j++, n++) {
                const int parts = work.i0 + consumer * 64 < a.T ? parts_of(consumer, work, work.i0 - j * ROWS) : 0;
                const uint32_t k_at = ring.tile(n), ds_at = k_at + TILE + consumer * 2 * DS_BYTES;
                ring.wait_full(n);
                if (parts & LOWER) issue_transposed<ROWS>(dq, ds_at, k_at, add), add = 1;
                if (parts & UPPER) issue_transposed<ROWS>(dq, ds_at + DS_BYTES, k_at + 64 * 128, add), add = 1;
                if (j > 0) {
                    if (parts == BOTH) wgmma_wait<2>();                  // the step before is done
                    else wgmma_wait<0>();
                    ring.release(n - 1);
                }
            }
            wgmma_wait<0>();
            hold(dq);
            ring.release(n - 1);
            store(work);
        }
        if (threadIdx.x % WARPGROUP == 0) tma_store_wait();
    }
};
#endif // SAMBA_SM90A_CODE

template <int HD> __global__ void __launch_bounds__(BLOCK, 1)
backward_product(const __grid_constant__ CUtensorMap qkv_map, const __grid_constant__ CUtensorMap dqkv_map, const __grid_constant__ Problem a) {
#ifdef SAMBA_SM90A_CODE
    constexpr int STAGE = TILE_BYTES<HD> + 4 * DS_BYTES;
    const uint32_t shared = shared_address(sm90_shared);
    const ProductRing ring{shared, shared + PRODUCT_STAGES * STAGE + TILE_BYTES<HD>, STAGE};
    if (threadIdx.x == 0) {
        ring.init();
        barrier_init_done();
    }
    __syncthreads();
    if (threadIdx.x < WARPGROUP) {
        if (threadIdx.x == 0) product_produce<HD>(ring, &qkv_map, a);
    } else
        ProductConsumer<HD>{ring, &dqkv_map, a}.run();
#endif
}

// dk, dv: a block owns 128 keys of a group and goes over the group's query heads and their tiles of 64 queries. Scores are formed
// transposed (keys as rows), so that P^T and dS^T come from registers. dk and dv are staged in the key and value tiles, as dq is.
constexpr int KEYS_STAGES = 3, STEP_ROWS = 64;
template <int HD> constexpr int STEP_BYTES = 2 * STEP_ROWS * HD * 2;     // Q | dO
// ring of K | V | ring of Q | dO | barriers
template <int HD> constexpr int backward_keys_shared() { return 4 * TILE_BYTES<HD> + KEYS_STAGES * STEP_BYTES<HD> + 128; }

#ifdef SAMBA_SM90A_CODE
template <int HD> struct KeysRings {
    static constexpr int STAGES = KEYS_STAGES, TILE = TILE_BYTES<HD>, BARRIERS = 4 * TILE + STAGES * STEP_BYTES<HD>;
    Ring<2> keys;
    Ring<STAGES> steps;
    __device__ KeysRings(uint32_t shared)
        : keys{shared, shared + BARRIERS, 2 * TILE}, steps{shared + 4 * TILE, shared + BARRIERS + 32, STEP_BYTES<HD>} {}
};
// A tile of keys, and the first and last tile of queries that see it
struct KeyWork { int b, g, n0, first, last; };
__device__ inline KeyWork key_work(const Problem& a, int item) {
    const Work work = work_item(a.schedule, item);
    const int n0 = work.tile * ROWS, b = a.heads.quotient(work.owner);
    return {b, work.owner - b * a.G, n0, n0 / STEP_ROWS, a.last_query(b, n0 + ROWS - 1) / STEP_ROWS};
}

template <int HD> __device__ inline void
keys_produce(const KeysRings<HD>& rings, const CUtensorMap* qkv_map, const CUtensorMap* dout_map, const Problem& a) {
    constexpr int TILE = TILE_BYTES<HD>, STEP = STEP_BYTES<HD>, N = STEP_ROWS;
    Cursor<2> keys;
    Cursor<KEYS_STAGES> steps;
    for (int round = 0, item; (item = item_of_round(a.schedule, round)) < a.schedule.items; round++, keys.next()) {
        const KeyWork work = key_work(a, item);
        const int heads = a.H / a.G, end = (work.last + 1) * N;
        const uint32_t bar = keys.full_bar(rings.keys), tile = keys.tile(rings.keys);
        keys.wait_empty(rings.keys);
        barrier_expect(bar, 2 * TILE);
        load_tile<HD, ROWS, N>(tile, bar, qkv_map, work.g * (heads + 2) + heads, work.n0, work.b);
        load_tile<HD, ROWS, N>(tile + TILE, bar, qkv_map, work.g * (heads + 2) + heads + 1, work.n0, work.b);
        for (int h = work.g * heads; h < (work.g + 1) * heads; h++)
#pragma unroll 1                                                          // unrolled, 24 registers are too few
            for (int t = work.n0; t < end; t += N, steps.next()) {
                const uint32_t bar = steps.full_bar(rings.steps), tile = steps.tile(rings.steps);
                steps.wait_empty(rings.steps);
                barrier_expect(bar, STEP);
                load_tile<HD, N, N>(tile, bar, qkv_map, h + 2 * work.g, t, work.b);
                load_tile<HD, N, N>(tile + STEP / 2, bar, dout_map, h, t, work.b);
            }
    }
}
template <int HD> struct KeysConsumer {
    static constexpr int TILE = TILE_BYTES<HD>, STEP = STEP_BYTES<HD>, N = STEP_ROWS;
    const KeysRings<HD>& rings;
    const CUtensorMap* dqkv_map;
    const Problem& a;
    const int consumer = which_consumer();
    const int row = threadIdx.x / WARP % 4 * 16 + threadIdx.x % WARP / 4;             // of our 64: this lane's first
    const float scale = rsqrtf((float)HD), c = scale * attn::LOG2E;
    float s[N / 2], dp[N / 2], dk[HD / 2] = {}, dv[HD / 2] = {};
    uint32_t p[N / 16][4] = {}, ds[N / 16][4] = {};
    Cursor<KEYS_STAGES> at, held;                                        // stages of this step and of the last one,
    bool running = false;                                                // whose products may still run
    bf16* kept = nullptr;                                                // where its dS goes

    // Rows are keys p0 + row, + 8; columns queries from i0 on. all: the last query that sees all 64 keys
    __device__ void mask_queries(const KeyWork& work, int p0, int i0, int all) {
        if (i0 >= p0 + 63 && i0 + N - 1 <= all) return;
        int from[2], to[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int key = p0 + row + half * 8;
            from[half] = key - i0, to[half] = a.last_query(work.b, key) - i0;
        }
        mask(s, from, to);
    }
    // Where dS of these 64 keys and the tile's 64 queries goes, for dq; null: nowhere
    __device__ bf16* place(const KeyWork& work, int p0, int h, int tile) const {
        const int owner = work.b * a.H + work.g * (a.H / a.G) + h;
        return a.ds && tile * N >= p0 ? a.ds + attn::ds_block(owner, tile, p0 / N, a.T, a.window) : nullptr;
    }
    // The last step's dS goes there, while products run that read the same registers
    __device__ void keep() {
        if (!kept) return;
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int k = 0; k < 4; k += 2)
                attn::ds_store(kept, row + half * 8, k / 2, ds[k][half], ds[k][2 + half], ds[k + 1][half], ds[k + 1][2 + half]);
        kept = nullptr;
    }
    // What the lane has that loaded column 8 i + l%4 * 2
    __device__ static float of_column(float x, int i) { return __shfl_sync(0xffffffffu, x, i * 4 + threadIdx.x % 4); }
    // The last step's products are done: its stage may be loaded again
    __device__ void products_done() {
        hold(dk), hold(dv), hold(p), hold(ds);
        if (running) held.release(rings.steps);
        running = false;
    }
    // One tile of queries with the keys of item `round`. What a step does besides, it does while products run.
    __device__ void step(int h, int tile, int round, bool first, int all, const KeyWork& work) {
        // A lane loads those of queries 2 l and 2 l + 1, and gets from others, by shuffles, those that its scores need
        const int64_t stat = ((int64_t)work.b * a.H + work.g * (a.H / a.G) + h) * a.padded + tile * N + threadIdx.x % WARP * 2;
        const Vec<float, 2> lse2 = load_vec<2>(a.lse2 + stat), delta = load_vec<2>(a.delta + stat);
        const uint32_t k_at = rings.keys.tile(round) + consumer * 64 * 128, q_at = at.tile(rings.steps), do_at = q_at + STEP / 2;
        const int p0 = work.n0 + consumer * 64;
        if (first) rings.keys.wait_full(round);
        at.wait_full(rings.steps);
        issue_rows<HD, ROWS, N>(s, k_at, q_at);
        keep();
        wgmma_wait<1>();
        products_done();
        issue_rows<HD, ROWS, N>(dp, k_at + TILE, do_at);
        kept = place(work, p0, h, tile);
        running = true, held = at, at.next();
        wgmma_wait<1>();
        hold(s);
        mask_queries(work, p0, tile * N, all);
#pragma unroll
        for (int i = 0; i < N / 8; i++) {
            const float l[2] = {of_column(lse2[0], i), of_column(lse2[1], i)};
#pragma unroll
            for (int e = 0; e < 4; e++) s[4 * i + e] = exp2_fast(fmaf(s[4 * i + e], c, -l[e % 2]));
        }
        pack_operand(p, s);
        issue_columns<N>(dv, p, do_at, !first);
        wgmma_wait<1>();
        hold(dp);
#pragma unroll
        for (int i = 0; i < N / 8; i++) {
            const float d[2] = {of_column(delta[0], i), of_column(delta[1], i)};
#pragma unroll
            for (int e = 0; e < 4; e++) dp[4 * i + e] = s[4 * i + e] * (dp[4 * i + e] - d[e % 2]);
        }
        pack_operand(ds, dp);
        issue_columns<N>(dk, ds, q_at, !first);
    }
    __device__ void finish() {
        keep();
        wgmma_wait<0>();
        products_done();
    }
    // A tile of queries that sees none of our 64 keys. Waiting for tiles while holding one would stop the producer.
    __device__ void skip() { finish(), at.wait_full(rings.steps), at.release(rings.steps), at.next(); }

    __device__ unsigned char* staging(int round) const { return sm90_shared + round % 2 * 2 * TILE + consumer * 64 * 128; }
    __device__ void store(int round, const KeyWork& work) {
        const int slot = work.g * (a.H / a.G + 2) + a.H / a.G, t = work.n0 + consumer * 64;
        store_gradients(
            consumer, t < a.T,
            [&] {
                turn_back(dk, a, {t + row, t + row + 8});
                stage_rows<ROWS>(staging(round), dk, {scale, scale});
                stage_rows<ROWS>(staging(round) + TILE, dv, {1.f, 1.f});
            },
            [&] {
                store_tile<HD, ROWS>(dqkv_map, staging(round), slot, t, work.b);
                store_tile<HD, ROWS>(dqkv_map, staging(round) + TILE, slot + 1, t, work.b);
            });
    }
    __device__ void run() {
        const int heads = a.H / a.G;
        for (int round = 0, item; (item = item_of_round(a.schedule, round)) < a.schedule.items; round++) {
            const KeyWork work = key_work(a, item);
            const int p0 = work.n0 + consumer * 64;
            // Tiles of queries before our keys, and behind the last that sees one of them, are skipped; one always stays
            const int mine = min(work.first + consumer, work.last), last = max(mine, a.last_query(work.b, p0 + 63) / N);
            const int all = a.last_query(work.b, p0);
            for (int h = 0; h < heads; h++)
                for (int tile = work.first; tile <= work.last; tile++) {
                    if (tile < mine || tile > last) {
                        skip();
                        continue;
                    }
                    const bool first = h == 0 && tile == mine;
                    step(h, tile, round, first, all, work);
                    if (first && round > 0) release_staging(rings.keys, round - 1);
                }
            finish();
            store(round, work);
        }
        if (threadIdx.x % WARPGROUP == 0) tma_store_wait();
    }
};
#endif // SAMBA_SM90A_CODE

template <int HD, bool EXTRAS> __global__ void __launch_bounds__(BLOCK, 1)
backward_keys(const __grid_constant__ CUtensorMap qkv_map, const __grid_constant__ CUtensorMap dout_map,
              const __grid_constant__ CUtensorMap dqkv_map, const __grid_constant__ Problem given) {
#ifdef SAMBA_SM90A_CODE
    const Problem a = simplified<EXTRAS>(given);
    const KeysRings<HD> rings(shared_address(sm90_shared));
    if (threadIdx.x == 0) {
        rings.keys.init(2), rings.steps.init();                          // 2: see release_staging()
        barrier_init_done();
    }
    __syncthreads();
    if (threadIdx.x < WARPGROUP) {
        registers_down<24>();
        if (threadIdx.x == 0) keys_produce<HD>(rings, &qkv_map, &dout_map, a);
    } else {
        registers_up<240>();
        KeysConsumer<HD>{rings, &dqkv_map, a}.run();
    }
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Launches

inline Schedule schedule(int64_t tiles, int64_t owners, int blocks, bool last_first) {
    if (tiles * owners > INT32_MAX / 2)
        fail("attention: %lld tiles of %lld heads: more than 2^30 pieces of work; use a smaller batch", (long long)tiles, (long long)owners);
    const int section = (int)std::min<int64_t>(owners, std::max(1, blocks / 4)), rest = (int)(owners % section);
    return {(int)tiles, (int)owners, (int)(tiles * owners), section, rest ? rest : section, (int)(section * tiles), last_first};
}
constexpr int SHARED_LIMIT = 227 * 1024;                                  // a block's, on compute capability 9.0
static_assert(forward_shared<128>() <= SHARED_LIMIT && backward_queries_shared<128>() <= SHARED_LIMIT && backward_keys_shared<128>() <= SHARED_LIMIT);
static_assert(backward_product_shared<128>() <= SHARED_LIMIT);
inline int multiprocessors() {
    int device = 0, count = 0;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    return count;
}
inline bool supported(const Args<bf16>& a, const void* other) {          // T * row * 2 < 2^40: a limit of tensor maps
    return (a.hd == 64 || a.hd == 128) && usable() && ((uintptr_t)a.qkv | (uintptr_t)a.ring | (uintptr_t)other) % 16 == 0 &&
           std::max<int64_t>(a.T * a.row(), a.ring ? a.capacity * 2 * a.G * a.hd : 0) < (int64_t)1 << 39;
}

// One block a multiprocessor, over tiles x heads (or groups)
template <class Kernel, class... Maps>
inline void launch_resident(Kernel kernel, Problem a, int64_t owners, bool last_first, int shared, Stream stream, const Maps&... maps) {
    const int blocks = multiprocessors();
    a.schedule = schedule(ceil_div(a.T, ROWS), owners, blocks, last_first);
    a.heads = (int)(owners / a.B);
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    kernel<<<std::min(blocks, a.schedule.items), BLOCK, shared, stream>>>(maps..., a);
    LAUNCH_CHECK();
}
inline Problem problem(const Args<bf16>& a) {
    return {a, {}, {}, a.ring ? Prefix{(int)a.capacity, (int)(a.position % a.capacity)} : Prefix{0, 0}, (int)padded_length(a.T)};
}
// Keys and queries of the call; of the ring (or, where there is none, anything)
inline CUtensorMap qkv_map(const Args<bf16>& a, int rows) { return tensor_map(a.qkv, a.B, a.T, a.H + 2 * a.G, a.hd, rows); }
inline CUtensorMap ring_map(const Args<bf16>& a) { return a.ring ? tensor_map(a.ring, a.B, a.capacity, 2 * a.G, a.hd, ROWS) : qkv_map(a, ROWS); }

template <int HD> inline void launch_forward(const Args<bf16>& a, Stream stream) {
    launch_resident(a.ring || a.starts ? forward<HD, true> : forward<HD, false>, problem(a), (int64_t)a.B * a.H, true, forward_shared<HD>(), stream,
                    qkv_map(a, ROWS), ring_map(a), tensor_map(a.out, a.B, a.T, a.H, HD, 16));
}
template <int HD> inline void launch_statistics(const Args<bf16>& a, Stream stream) {
    backward_statistics<HD><<<(unsigned)(ceil_div(a.T, ROWS) * a.B * a.H), 256, 0, stream>>>(problem(a));
    LAUNCH_CHECK();
}
inline CUtensorMap dqkv_map(const Args<bf16>& a) { return tensor_map(a.dqkv, a.B, a.T, a.H + 2 * a.G, a.hd, 64); }
// dk and dv; dS is kept if a.ds
template <int HD> inline void launch_keys(const Args<bf16>& a, Stream stream) {
    launch_resident(a.starts ? backward_keys<HD, true> : backward_keys<HD, false>, problem(a), (int64_t)a.B * a.G, false, backward_keys_shared<HD>(),
                    stream, qkv_map(a, STEP_ROWS), tensor_map(a.dout, a.B, a.T, a.H, HD, STEP_ROWS), dqkv_map(a));
}
// dq from dS; with S and dP made again
inline void launch_product(const Args<bf16>& a, Stream stream) {         // of head_dim 64 dS is not kept: DS_LIMIT in attention.cuh
    launch_resident(backward_product<128>, problem(a), (int64_t)a.B * a.H, true, backward_product_shared<128>(), stream, qkv_map(a, ROWS), dqkv_map(a));
}
template <int HD> inline void launch_queries(const Args<bf16>& a, Stream stream) {
    launch_resident(backward_queries<HD>, problem(a), (int64_t)a.B * a.H, true, backward_queries_shared<HD>(), stream, qkv_map(a, ROWS), ring_map(a),
                    tensor_map(a.dout, a.B, a.T, a.H, HD, ROWS), dqkv_map(a));
}
template <int HD> inline void launch_backward(const Args<bf16>& a, Stream stream) {
    launch_keys<HD>(a, stream);
    if (HD == 128 && a.ds) launch_product(a, stream);
    else launch_queries<HD>(a, stream);
}
#endif // __CUDACC__

// false: not for this device or shape, nothing was done. Which fields of Args are read: as in attention.cuh.
template <int = 0> inline bool forward_if_supported(const Args<bf16>& a, Stream stream) {
    if (!supported(a, a.out)) return false;
    a.hd == 64 ? launch_forward<64>(a, stream) : launch_forward<128>(a, stream);
    return true;
}
inline bool backward_supported(const Args<bf16>& a) {
    return supported(a, a.dqkv) && ((uintptr_t)a.dout | (uintptr_t)a.saved_out | (uintptr_t)a.lse2 | (uintptr_t)a.rope) % 16 == 0;
}
template <int = 0> inline void run_statistics(const Args<bf16>& a, Stream stream) {
    a.hd == 64 ? launch_statistics<64>(a, stream) : launch_statistics<128>(a, stream);
}
template <int = 0> inline void run_backward(const Args<bf16>& a, Stream stream) {
    a.hd == 64 ? launch_backward<64>(a, stream) : launch_backward<128>(a, stream);
}

} // namespace sm90
} // namespace gpu
