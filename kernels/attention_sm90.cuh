// Causal sliding-window attention for Hopper (compute capability 9.0, code built for sm_90a), bf16, head_dim 64 or 128. Same
// formula, layout and results' form as attention.cuh (the portable path); no ring, t = 0 is position 0.
//
// Each block is three warpgroups: one thread of the first feeds tiles through TMA into rings in shared memory (mbarriers say
// full and empty), the other two own 64 rows each and multiply by wgmma. Blocks stay resident (one per SM) and take work items
// in a fixed order, so the next item's loads run during the last one's epilogue. Every result has one owner and a fixed order
// of sums: no atomics.
//
// Forward, per warpgroup and key tile: S' = Q K'^T and then O += P V of the tile before are issued; softmax of S' runs while
// P V does, across the ends of items too. The two warpgroups take turns at issuing (order_wait, order_pass), so that one's
// softmax runs during the other's products. Backward: one kernel whose blocks own queries (dq: S, dP, dS K) and one whose
// blocks own keys (dk, dv: S^T, dP^T, P^T dO, dS^T Q): 7 products instead of 5, no fp32 dq buffer. Tiles outside the window are
// never loaded, halves that a warpgroup does not see not multiplied; only tiles on the window's edges are masked. Precision as
// in the portable path: fp32 sums and softmax; P and dS rounded to bf16 for their product.
//
// Flops per visible pair: 4 hd forward, 10 hd backward (14 hd done). Samba-421M (B 8, T 4096, window 2048, 12 heads of 128):
// 309 and 773 GFLOP a layer, of which tiles of 64 x 128 do 319 and 1116: 0.32 and 1.13 ms at the H100's nominal rate.
#pragma once
#include <algorithm>

#include <cuda.h>

#include "device.cuh"

// wgmma and setmaxnreg exist for sm_90a only: other passes compile empty kernels, which usable() keeps from being launched.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || (defined(__CUDA_ARCH_SPECIFIC__) && __CUDA_ARCH_SPECIFIC__ == 900)
#define SAMBA_SM90A_CODE 1
#endif

namespace gpu {
namespace sm90 {

using bf16 = __nv_bfloat16;

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
struct Schedule {
    int tiles, owners, section, items;                                   // items = tiles * owners
    bool last_first;                                                     // the most work: the last tiles (queries) or the first (keys)
};
struct Work { int tile, owner; };

#ifdef __CUDACC__
__device__ inline Work work_item(const Schedule& s, int n) {
    const int begin = n / (s.section * s.tiles) * s.section, rest = n % (s.section * s.tiles), width = min(s.section, s.owners - begin);
    const int order = rest / width;
    return {s.last_first ? s.tiles - 1 - order : order, begin + rest % width};
}
// The round-th item of this block: there and back again over the blocks, which evens out the falling amounts of work
__device__ inline int item_of_round(int round) { return round * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x); }

extern __shared__ __align__(1024) unsigned char sm90_shared[];

constexpr int WARPGROUP = 128, BLOCK = 3 * WARPGROUP;                    // producer, two consumers
constexpr int ROWS = 128;                                                // of every tile: 64 for each consumer
template <int HD> constexpr int TILE_BYTES = ROWS * HD * 2;
constexpr int LOWER = 1, UPPER = 2, BOTH = 3;                            // halves of a tile of keys

#ifdef SAMBA_SM90A_CODE
// A tile of queries: the keys it sees are `count` tiles, of which the first is on the diagonal, each before the last
struct QueryWork { int owner, b, h, i0, count; };
__device__ inline QueryWork query_work(const Schedule& s, int item, int H, int window) {
    const Work work = work_item(s, item);
    const int i0 = work.tile * ROWS;
    return {work.owner, work.owner / H, work.owner % H, i0, work.tile - max(0, i0 - window + 1) / ROWS + 1};
}
// The halves of key tile j that a consumer's 64 queries may see: not the diagonal tile's upper one, if theirs is the lower; not
// one before the first query's window. Half a tile is worked on like a smaller tile.
__device__ inline int parts_of(int consumer, int j, int window) {
    if (j == 0) return consumer == 0 ? LOWER : BOTH;
    return j * ROWS + 1 - window + consumer * 64 >= 64 ? UPPER : BOTH;
}
__device__ inline int half_offset(int parts) { return parts == UPPER ? 64 * 128 : 0; }           // bytes, to its rows in each slab

// ---------------------------------------------------------------------------------------------------------------------
// Instructions

__device__ inline uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ inline float exp2_fast(float x) {                             // ex2.approx: 2 ulp, exp2(-inf) = 0
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ inline uint32_t pack(float low, float high) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
}

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
// A result's registers are, rounded, the a operand of the next product.
template <int K> __device__ inline void pack_operand(uint32_t (&p)[K][4], const float (&c)[8 * K]) {
#pragma unroll
    for (int k = 0; k < K; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) p[k][i] = pack(c[8 * k + 2 * i], c[8 * k + 2 * i + 1]);
}

// Scores of unseen pairs become -infinity: row r of the tile sees columns first + r .. last + r. row: this lane's first.
template <int NR> __device__ inline void mask(float (&s)[NR], int row, int first, int last) {
    const int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int from = first + row + half * 8 - column, to = last + row + half * 8 - column;
#pragma unroll
        for (int n = 0; n < NR / 4; n++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                if (n * 8 + e < from || n * 8 + e > to) s[n * 4 + half * 2 + e] = -INFINITY;
    }
}

// The warpgroup's 64 rows, rounded, into rows of a tile of TILE_ROWS in the form TMA stores; `rows`: its first row. factor: per half
template <int TILE_ROWS, int NR> __device__ inline void stage_rows(unsigned char* rows, const float (&c)[NR], const float (&factor)[2]) {
    const int lane = threadIdx.x % WARP, row0 = threadIdx.x / WARP % 4 * 16 + lane / 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        unsigned char* row = rows + (row0 + half * 8) * 128 + lane % 4 * 4;
#pragma unroll
        for (int n = 0; n < NR / 4; n++)
            *reinterpret_cast<uint32_t*>(row + n / 8 * TILE_ROWS * 128 + (n % 8 ^ lane / 4) * 16) =
                pack(c[n * 4 + half * 2] * factor[half], c[n * 4 + half * 2 + 1] * factor[half]);
    }
}
// The staged 64 rows to positions t .. of a head, as far as they exist. By one thread; committed by the caller
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
        if (threadIdx.x % WARP == 0) barrier_arrive(empty_bar(n));
    }
    __device__ void init(int releases = 2 * WARPGROUP / WARP) const {
        for (int i = 0; i < STAGES; i++) barrier_init(full_bar(i), 1), barrier_init(empty_bar(i), releases);
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

// Turns at issuing products: barrier 1 is the first consumer's, 2 the second's
__device__ inline void order_wait(int consumer) { named_sync(1 + consumer, 2 * WARPGROUP); }
__device__ inline void order_pass(int consumer) { named_arrive(2 - consumer, 2 * WARPGROUP); }

struct Statistics { float top[2] = {-INFINITY, -INFINITY}, sum[2] = {}; };                             // of a lane's two rows; sums are its own part

// s becomes exp2(c s - c max); returns in `shrink` what earlier sums and outputs must be multiplied with
template <int NR> __device__ inline void online_softmax(float (&s)[NR], Statistics& stat, float (&shrink)[2], float c) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float a = stat.top[half], b = s[half * 2 + 1];
#pragma unroll
        for (int n = 0; n < NR / 4; n++) a = fmaxf(a, s[n * 4 + half * 2]), b = fmaxf(b, s[n * 4 + half * 2 + 1]);
        a = fmaxf(a, b);
        a = fmaxf(a, __shfl_xor_sync(0xffffffffu, a, 1));
        a = fmaxf(a, __shfl_xor_sync(0xffffffffu, a, 2));
        const float base = a * c;                                        // finite: the first tile holds every row's own key
        shrink[half] = exp2_fast(fmaf(stat.top[half], c, -base));
        stat.top[half] = a;
        float x = stat.sum[half] * shrink[half], y = 0.f;
#pragma unroll
        for (int n = 0; n < NR / 4; n++) {
            x += s[n * 4 + half * 2] = exp2_fast(fmaf(s[n * 4 + half * 2], c, -base));
            y += s[n * 4 + half * 2 + 1] = exp2_fast(fmaf(s[n * 4 + half * 2 + 1], c, -base));
        }
        stat.sum[half] = x + y;
    }
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

struct ForwardArgs {
    float* lse;                                                          // (B, H, T)
    int T, H, G, window;
    Schedule schedule;
};
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
template <int HD> __device__ inline void forward_produce(const ForwardRings<HD>& rings, const CUtensorMap* qkv_map, const ForwardArgs& a) {
    const int heads = a.H / a.G;
    int n = 0, value_slot = 0, value_t = 0, value_b = 0;
    for (int round = 0, item; (item = item_of_round(round)) < a.schedule.items; round++) {
        const QueryWork work = query_work(a.schedule, item, a.H, a.window);
        const int slot = work.h / heads * (heads + 2);
        load_stage<HD>(rings.queries, round, qkv_map, slot + work.h % heads, work.i0, work.b);
        for (int j = 0; j < work.count; j++, n++) {                      // the diagonal tile first; keys one ahead of values
            load_stage<HD>(rings.keys, n, qkv_map, slot + heads, work.i0 - j * ROWS, work.b);
            if (n > 0) load_stage<HD>(rings.values, n - 1, qkv_map, value_slot, value_t, value_b);
            value_slot = slot + heads + 1, value_t = work.i0 - j * ROWS, value_b = work.b;
        }
    }
    load_stage<HD>(rings.values, n - 1, qkv_map, value_slot, value_t, value_b);
}

// One warpgroup's 64 rows. Key tiles of all its items form one sequence: step n issues the scores of tile n and the product with
// the values of tile n - 1, then does softmax n while the second runs; an item's results are stored in the next one's first step.
template <int HD> struct ForwardConsumer {
    const ForwardRings<HD>& rings;
    const CUtensorMap* out_map;
    const ForwardArgs& a;
    const int consumer = __shfl_sync(0xffffffffu, threadIdx.x / WARPGROUP, 0) - 1;     // the compiler must see it is one for a warp
    const int row = consumer * 64 + threadIdx.x / WARP % 4 * 16 + threadIdx.x % WARP / 4;   // of the tile: this lane's first
    const float scale = rsqrtf((float)HD), c = scale * 1.44269504f;
    float s[ROWS / 2] = {}, o[HD / 2] = {}, shrink[2];
    uint32_t p[ROWS / 16][4] = {};
    int parts, add = 0;                                                  // of the tile that p comes from; whether o holds earlier ones of its item
    Statistics stat;

    // S of tile n: N columns, of one half or both
    template <int N> __device__ void issue_scores(int n, int round, int now) {
        issue_rows<HD, ROWS, ROWS>(part_of<N>(s), rings.queries.tile(round) + consumer * 64 * 128, rings.keys.tile(n) + half_offset(now));
    }
    template <int N> __device__ void issue_output(int n) {
        rings.values.wait_full(n);
        issue_columns<ROWS>(o, part_of<N>(p), rings.values.tile(n) + half_offset(parts), add);
    }
    // S is there: its tiles may go, what is unseen becomes -infinity
    template <int N> __device__ void scores_done(int n, int round, int j, int now, const QueryWork& work) {
        hold(s);
        rings.keys.release(n);
        if (j == work.count - 1) rings.queries.release(round);
        const int shift = j * ROWS - (now == UPPER ? 64 : 0);
        if (j == 0 || (j + 1) * ROWS > a.window) mask(part_of<N>(s), row, shift + 1 - a.window, shift);
    }
    // The first tile of all: nothing to overlap with
    template <int N> __device__ void begin(const QueryWork& work) {
        rings.queries.wait_full(0);
        rings.keys.wait_full(0);
        issue_scores<N>(0, 0, parts);
        wgmma_wait<0>();
        scores_done<N>(0, 0, 0, parts, work);
        online_softmax(part_of<N>(s), stat, shrink, c);
        pack_operand(part_of<N>(p), part_of<N>(s));
    }
    // Tile j of item `round`, tile n of all; `before`: the item before this one
    template <int N, int N_BEFORE> __device__ void step(int n, int round, int j, int now, const QueryWork& work, const QueryWork& before) {
        if (j == 0) rings.queries.wait_full(round);
        rings.keys.wait_full(n);
        order_wait(consumer);
        issue_scores<N>(n, round, now);
        issue_output<N_BEFORE>(n - 1);
        order_pass(consumer);
        wgmma_wait<1>();
        scores_done<N>(n, round, j, now, work);
        const Statistics old = stat;
        if (j == 0) stat = Statistics{};
        online_softmax(part_of<N>(s), stat, shrink, c);
        wgmma_wait<0>();
        hold(o), hold(p);
        rings.values.release(n - 1);
        if (j == 0) store(before, old);
        else rescale(o, shrink);
        pack_operand(part_of<N>(p), part_of<N>(s));
    }
    __device__ void store(const QueryWork& work, const Statistics& of) {
        unsigned char* staging = sm90_shared + ForwardRings<HD>::STAGING + consumer * TILE_BYTES<HD> / 2;
        float factor[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = of.sum[half];
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            factor[half] = __fdividef(1.f, sum);                              // sum >= 1: its largest term
            const int i = work.i0 + row + half * 8;
            if (threadIdx.x % 4 == 0 && i < a.T) a.lse[(int64_t)work.owner * a.T + i] = of.top[half] * scale + logf(sum);
        }
        if (threadIdx.x % WARPGROUP == 0) tma_store_wait();
        named_sync(3 + consumer, WARPGROUP);                             // the last item's store has read the staging tile
        stage_rows<64>(staging, o, factor);
        fence_async();
        named_sync(3 + consumer, WARPGROUP);
        if (threadIdx.x % WARPGROUP == 0 && work.i0 + consumer * 64 < a.T) {
            store_tile<HD, 64>(out_map, staging, work.h, work.i0 + consumer * 64, work.b);
            tma_store_commit();
        }
    }
    __device__ void run() {
        QueryWork work = query_work(a.schedule, item_of_round(0), a.H, a.window), before = work;
        parts = parts_of(consumer, 0, a.window);
        if (parts == BOTH) begin<128>(work);
        else begin<64>(work);
        if (consumer == 1) order_pass(1);
        int n = 1;
        for (int round = 0, j = 1;; n++, j++) {
            if (j == work.count) {
                const int item = item_of_round(++round);
                if (item >= a.schedule.items) break;
                before = work, work = query_work(a.schedule, item, a.H, a.window), j = 0;
            }
            const int now = parts_of(consumer, j, a.window);
            if (now == BOTH && parts == BOTH) step<128, 128>(n, round, j, now, work, before);
            else if (now == BOTH) step<128, 64>(n, round, j, now, work, before);
            else if (parts == BOTH) step<64, 128>(n, round, j, now, work, before);
            else step<64, 64>(n, round, j, now, work, before);
            parts = now, add = j > 0;
        }
        if (parts == BOTH) issue_output<128>(n - 1);
        else issue_output<64>(n - 1);
        wgmma_wait<0>();
        hold(o), hold(p);
        store(work, stat);
        if (consumer == 0) order_wait(0);                                // takes the other's last pass
        if (threadIdx.x % WARPGROUP == 0) tma_store_wait();
    }
};
#endif // SAMBA_SM90A_CODE

template <int HD> __global__ void __launch_bounds__(BLOCK, 1)
forward(const __grid_constant__ CUtensorMap qkv_map, const __grid_constant__ CUtensorMap out_map, const ForwardArgs a) {
#ifdef SAMBA_SM90A_CODE
    const uint32_t shared = shared_address(sm90_shared);
    const ForwardRings<HD> rings(shared, shared + ForwardRings<HD>::STAGING + TILE_BYTES<HD>);
    if (threadIdx.x == 0) {
        rings.queries.init(), rings.keys.init(), rings.values.init();
        barrier_init_done();
    }
    __syncthreads();
    if (threadIdx.x < WARPGROUP) {
        registers_down<24>();
        if (threadIdx.x == 0) forward_produce<HD>(rings, &qkv_map, a);
    } else {
        registers_up<240>();
        ForwardConsumer<HD>{rings, &out_map, a}.run();
    }
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward

struct BackwardArgs {
    float *lse2, *delta;                                                 // (B, H, padded): lse log2(e), infinity past T; dout . out, 0 past T
    int T, H, G, window, padded;
    Schedule schedule;
};
inline int64_t padded_length(int64_t T) { return round_up(T, ROWS); }

// A block takes ROWS positions of one owner (b, h), eight lanes each.
template <int HD> __global__ void __launch_bounds__(256)
backward_statistics(const BackwardArgs a, const bf16* dout, const bf16* out, const float* lse) {
    constexpr int LANES = 8, STEP = 256 / LANES;
    const int tiles = a.padded / ROWS, owner = blockIdx.x / tiles, t0 = blockIdx.x % tiles * ROWS + threadIdx.x / LANES;
    const int64_t first = ((int64_t)(owner / a.H) * a.T * a.H + owner % a.H) * HD + threadIdx.x % LANES * 8, stride = (int64_t)a.H * HD;
#pragma unroll
    for (int t = t0; t < t0 + ROWS; t += STEP) {
        float sum = 0.f;
        if (t < a.T)
#pragma unroll
            for (int d = 0; d < HD; d += LANES * 8) {
                const Vec<bf16, 8> x = load_vec<8>(dout + first + t * stride + d), y = load_vec<8>(out + first + t * stride + d);
#pragma unroll
                for (int i = 0; i < 8; i++) sum += to_float(x[i]) * to_float(y[i]);
            }
#pragma unroll
        for (int o = LANES / 2; o > 0; o /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, o);
        if (threadIdx.x % LANES != 0) continue;
        const int64_t at = (int64_t)owner * a.padded + t;
        a.delta[at] = sum;
        a.lse2[at] = t < a.T ? lse[(int64_t)owner * a.T + t] * 1.44269504f : INFINITY;
    }
}

// dq: a block owns 128 queries of a head and visits the key tiles of their window, as forward does. A warpgroup's dq is staged in
// its rows of the item's query tile, and stored from there during the next item, whose queries have the ring's other stage.
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
queries_produce(const QueriesRings<HD>& rings, const CUtensorMap* qkv_map, const CUtensorMap* dout_map, const BackwardArgs& a) {
    const int heads = a.H / a.G;
    for (int n = 0, round = 0, item; (item = item_of_round(round)) < a.schedule.items; round++) {
        const QueryWork work = query_work(a.schedule, item, a.H, a.window);
        const int slot = work.h / heads * (heads + 2);
        load_stage<HD>(rings.queries, round, qkv_map, slot + work.h % heads, work.i0, work.b);
        for (int j = 0; j < work.count; j++, n++) {
            load_stage<HD>(rings.keys, n, qkv_map, slot + heads, work.i0 - j * ROWS, work.b);
            load_stage<HD>(rings.values, n, qkv_map, slot + heads + 1, work.i0 - j * ROWS, work.b);
            if (j == 0) load_stage<HD>(rings.douts, round, dout_map, work.h, work.i0, work.b);
        }
    }
}

template <int HD> struct QueriesConsumer {
    const QueriesRings<HD>& rings;
    const CUtensorMap* dqkv_map;
    const BackwardArgs& a;
    const int consumer = __shfl_sync(0xffffffffu, threadIdx.x / WARPGROUP, 0) - 1;     // the compiler must see it is one for a warp
    const int row = consumer * 64 + threadIdx.x / WARP % 4 * 16 + threadIdx.x % WARP / 4;
    const float scale = rsqrtf((float)HD), c = scale * 1.44269504f;
    float s[ROWS / 2] = {}, dp[ROWS / 2] = {}, dq[HD / 2] = {}, lse2[2], delta[2];
    uint32_t ds[ROWS / 16][4] = {};

    __device__ void load_statistics(const QueryWork& work) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int64_t at = (int64_t)work.owner * a.padded + work.i0 + row + half * 8;
            lse2[half] = a.lse2[at], delta[half] = a.delta[at];
        }
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
        const int shift = j * ROWS - (now == UPPER ? 64 : 0);
        if (j == 0 || (j + 1) * ROWS > a.window) mask(st, row, shift + 1 - a.window, shift);
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
        named_sync(3 + consumer, WARPGROUP);                             // all our products with these queries are done
        stage_rows<ROWS>(staging(round), dq, {scale, scale});
        fence_async();
        named_sync(3 + consumer, WARPGROUP);
        if (threadIdx.x % WARPGROUP == 0 && work.i0 + consumer * 64 < a.T) {
            const int heads = a.H / a.G;
            store_tile<HD, ROWS>(dqkv_map, staging(round), work.h / heads * (heads + 2) + work.h % heads, work.i0 + consumer * 64, work.b);
            tma_store_commit();
        }
    }
    __device__ void stored(int round) {                                  // the store has read its tile: that may be loaded again
        if (threadIdx.x % WARPGROUP == 0) tma_store_wait(), barrier_arrive(rings.queries.empty_bar(round));
    }
    __device__ void run() {
        int n = 0;
        for (int round = 0, item; (item = item_of_round(round)) < a.schedule.items; round++) {
            const QueryWork work = query_work(a.schedule, item, a.H, a.window);
            load_statistics(work);
            for (int j = 0; j < work.count; j++, n++) {
                const int now = parts_of(consumer, j, a.window);
                if (now == BOTH) step<128>(n, round, j, now, work);
                else step<64>(n, round, j, now, work);
                if (j == 0 && round > 0) stored(round - 1);
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
backward_queries(const __grid_constant__ CUtensorMap qkv_map, const __grid_constant__ CUtensorMap dout_map,
              const __grid_constant__ CUtensorMap dqkv_map, const BackwardArgs a) {
#ifdef SAMBA_SM90A_CODE
    const uint32_t shared = shared_address(sm90_shared);
    const QueriesRings<HD> rings(shared, shared + QueriesRings<HD>::BARRIERS);
    if (threadIdx.x == 0) {
        rings.queries.init(2), rings.douts.init(), rings.keys.init(), rings.values.init();      // 2: see stored()
        barrier_init_done();
    }
    __syncthreads();
    if (threadIdx.x < WARPGROUP) {
        registers_down<24>();
        if (threadIdx.x == 0) queries_produce<HD>(rings, &qkv_map, &dout_map, a);
    } else {
        registers_up<240>();
        QueriesConsumer<HD>{rings, &dqkv_map, a}.run();
    }
#endif
}

// dk, dv: a block owns 128 keys of a group and goes over the group's query heads and their tiles of 64 queries. Scores are formed
// transposed (keys as rows), so that P^T and dS^T come from registers. dk and dv are staged in the key and value tiles, as dq is.
constexpr int KEYS_STAGES = 3, STEP_ROWS = 64;
template <int HD> constexpr int STEP_BYTES = 2 * STEP_ROWS * HD * 2;     // Q | dO
// ring of K | V | ring of Q | dO | ring of lse2 | delta | barriers
template <int HD> constexpr int backward_keys_shared() { return 4 * TILE_BYTES<HD> + KEYS_STAGES * (STEP_BYTES<HD> + 2 * STEP_ROWS * 4) + 128; }

#ifdef SAMBA_SM90A_CODE
template <int HD> struct KeysRings {
    static constexpr int STAGES = KEYS_STAGES, TILE = TILE_BYTES<HD>, STATISTICS = 4 * TILE + STAGES * STEP_BYTES<HD>,
                         BARRIERS = STATISTICS + STAGES * 2 * STEP_ROWS * 4;
    Ring<2> keys;
    Ring<STAGES> steps;
    __device__ KeysRings(uint32_t shared)
        : keys{shared, shared + BARRIERS, 2 * TILE}, steps{shared + 4 * TILE, shared + BARRIERS + 32, STEP_BYTES<HD>} {}
    __device__ static int statistics(int n) { return STATISTICS + n % STAGES * 2 * STEP_ROWS * 4; }
};
// A tile of keys, and the first and last tile of queries that see it
struct KeyWork { int b, g, n0, first, last; };
__device__ inline KeyWork key_work(const BackwardArgs& a, int item) {
    const Work work = work_item(a.schedule, item);
    const int n0 = work.tile * ROWS;
    return {work.owner / a.G, work.owner % a.G, n0, n0 / STEP_ROWS, min(a.T - 1, n0 + ROWS - 1 + a.window - 1) / STEP_ROWS};
}

template <int HD> __device__ inline void
keys_produce(const KeysRings<HD>& rings, const CUtensorMap* qkv_map, const CUtensorMap* dout_map, const BackwardArgs& a) {
    constexpr int TILE = TILE_BYTES<HD>, STEP = STEP_BYTES<HD>, N = STEP_ROWS;
    const int heads = a.H / a.G;
    for (int n = 0, round = 0, item; (item = item_of_round(round)) < a.schedule.items; round++) {
        const KeyWork work = key_work(a, item);
        const int slot = work.g * (heads + 2);
        const uint32_t keys_bar = rings.keys.full_bar(round);
        rings.keys.wait_empty(round);
        barrier_expect(keys_bar, 2 * TILE);
        load_tile<HD, ROWS, N>(rings.keys.tile(round), keys_bar, qkv_map, slot + heads, work.n0, work.b);
        load_tile<HD, ROWS, N>(rings.keys.tile(round) + TILE, keys_bar, qkv_map, slot + heads + 1, work.n0, work.b);
        for (int h = 0; h < heads; h++)
            for (int tile = work.first; tile <= work.last; tile++, n++) {
                const uint32_t bar = rings.steps.full_bar(n), statistics = shared_address(sm90_shared) + rings.statistics(n);
                const int64_t at = ((int64_t)work.b * a.H + work.g * heads + h) * a.padded + tile * N;
                rings.steps.wait_empty(n);
                barrier_expect(bar, STEP + 2 * N * 4);
                load_tile<HD, N, N>(rings.steps.tile(n), bar, qkv_map, slot + h, tile * N, work.b);
                load_tile<HD, N, N>(rings.steps.tile(n) + STEP / 2, bar, dout_map, work.g * heads + h, tile * N, work.b);
                bulk_load(statistics, a.lse2 + at, N * 4, bar);
                bulk_load(statistics + N * 4, a.delta + at, N * 4, bar);
            }
    }
}

template <int HD> struct KeysConsumer {
    static constexpr int TILE = TILE_BYTES<HD>, STEP = STEP_BYTES<HD>, N = STEP_ROWS;
    const KeysRings<HD>& rings;
    const CUtensorMap* dqkv_map;
    const BackwardArgs& a;
    const int consumer = __shfl_sync(0xffffffffu, threadIdx.x / WARPGROUP, 0) - 1;     // the compiler must see it is one for a warp
    const int row = consumer * 64 + threadIdx.x / WARP % 4 * 16 + threadIdx.x % WARP / 4;
    const float scale = rsqrtf((float)HD), c = scale * 1.44269504f;
    float s[N / 2], dp[N / 2], dk[HD / 2] = {}, dv[HD / 2] = {};
    uint32_t p[N / 16][4] = {}, ds[N / 16][4] = {};
    int unreleased = -1;                                                 // the step whose products may still run

    // One tile of queries, n of all, with the keys of item `round`
    __device__ void step(int n, int tile, int round, bool first, const KeyWork& work) {
        const float* lse2 = reinterpret_cast<const float*>(sm90_shared + rings.statistics(n)) + threadIdx.x % 4 * 2;
        const int i0 = tile * N;
        const uint32_t k_at = rings.keys.tile(round) + consumer * 64 * 128, q_at = rings.steps.tile(n), do_at = q_at + STEP / 2;
        if (first) rings.keys.wait_full(round);
        rings.steps.wait_full(n);
        issue_rows<HD, ROWS, N>(s, k_at, q_at);
        wgmma_wait<1>();                                                 // the last step's products are done
        hold(dk), hold(dv), hold(p), hold(ds);
        if (unreleased >= 0) rings.steps.release(unreleased);
        unreleased = n;
        issue_rows<HD, ROWS, N>(dp, k_at + TILE, do_at);
        wgmma_wait<1>();
        hold(s);
        if (i0 < work.n0 + ROWS - 1 || i0 + N - 1 >= work.n0 + a.window) mask(s, row, work.n0 - i0, work.n0 - i0 + a.window - 1);
#pragma unroll
        for (int i = 0; i < N / 8; i++) {
            const Vec<float, 2> l = load_vec<2>(lse2 + i * 8);
#pragma unroll
            for (int e = 0; e < 4; e++) s[4 * i + e] = exp2_fast(fmaf(s[4 * i + e], c, -l[e % 2]));
        }
        pack_operand(p, s);
        issue_columns<N>(dv, p, do_at, !first);
        wgmma_wait<1>();
        hold(dp);
#pragma unroll
        for (int i = 0; i < N / 8; i++) {
            const Vec<float, 2> d = load_vec<2>(lse2 + N + i * 8);
#pragma unroll
            for (int e = 0; e < 4; e++) dp[4 * i + e] = s[4 * i + e] * (dp[4 * i + e] - d[e % 2]);
        }
        pack_operand(ds, dp);
        issue_columns<N>(dk, ds, q_at, !first);
    }
    // A tile of queries that sees none of our 64 keys
    __device__ void skip(int n) { rings.steps.wait_full(n), rings.steps.release(n); }

    __device__ unsigned char* staging(int round) const { return sm90_shared + round % 2 * 2 * TILE + consumer * 64 * 128; }
    __device__ void store(int round, const KeyWork& work) {
        named_sync(3 + consumer, WARPGROUP);                             // all our products with these keys and values are done
        stage_rows<ROWS>(staging(round), dk, {scale, scale});
        stage_rows<ROWS>(staging(round) + TILE, dv, {1.f, 1.f});
        fence_async();
        named_sync(3 + consumer, WARPGROUP);
        if (threadIdx.x % WARPGROUP == 0 && work.n0 + consumer * 64 < a.T) {
            const int slot = work.g * (a.H / a.G + 2) + a.H / a.G, t = work.n0 + consumer * 64;
            store_tile<HD, ROWS>(dqkv_map, staging(round), slot, t, work.b);
            store_tile<HD, ROWS>(dqkv_map, staging(round) + TILE, slot + 1, t, work.b);
            tma_store_commit();
        }
    }
    __device__ void stored(int round) {                                  // the store has read its tiles: they may be loaded again
        if (threadIdx.x % WARPGROUP == 0) tma_store_wait(), barrier_arrive(rings.keys.empty_bar(round));
    }
    __device__ void run() {
        const int heads = a.H / a.G;
        int n = 0;
        for (int round = 0, item; (item = item_of_round(round)) < a.schedule.items; round++) {
            const KeyWork work = key_work(a, item);
            // The second warpgroup's keys come after the first tile of queries; the first's may leave the window before the last tile.
            const bool several = work.first < work.last, late = several && consumer == 1;
            const bool early = several && consumer == 0 && work.last * N >= work.n0 + 63 + a.window;
            for (int h = 0; h < heads; h++) {
                if (late) skip(n++);
                for (int tile = work.first + late; tile <= work.last - early; tile++, n++) {
                    const bool first = h == 0 && tile == work.first + late;
                    step(n, tile, round, first, work);
                    if (first && round > 0) stored(round - 1);
                }
                if (early) skip(n++);
            }
            wgmma_wait<0>();
            hold(dk), hold(dv), hold(p), hold(ds);
            rings.steps.release(unreleased);
            unreleased = -1;
            store(round, work);
        }
        if (threadIdx.x % WARPGROUP == 0) tma_store_wait();
    }
};
#endif // SAMBA_SM90A_CODE

template <int HD> __global__ void __launch_bounds__(BLOCK, 1)
backward_keys(const __grid_constant__ CUtensorMap qkv_map, const __grid_constant__ CUtensorMap dout_map,
              const __grid_constant__ CUtensorMap dqkv_map, const BackwardArgs a) {
#ifdef SAMBA_SM90A_CODE
    const KeysRings<HD> rings(shared_address(sm90_shared));
    if (threadIdx.x == 0) {
        rings.keys.init(2), rings.steps.init();                          // 2: see stored()
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
    return {(int)tiles, (int)owners, (int)std::min<int64_t>(owners, std::max(1, blocks / 4)), (int)(tiles * owners), last_first};
}
constexpr int SHARED_LIMIT = 227 * 1024;                                  // a block's, on compute capability 9.0
static_assert(forward_shared<128>() <= SHARED_LIMIT && backward_queries_shared<128>() <= SHARED_LIMIT && backward_keys_shared<128>() <= SHARED_LIMIT);
inline int multiprocessors() {
    int device = 0, count = 0;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    return count;
}
inline bool supported(const void* qkv, const void* out, int64_t T, int H, int G, int hd) {          // T * row * 2 < 2^40: a limit of tensor maps
    return (hd == 64 || hd == 128) && usable() && ((uintptr_t)qkv | (uintptr_t)out) % 16 == 0 && T * (H + 2 * G) * hd < (int64_t)1 << 39;
}

template <int HD> inline void launch_forward(bf16* out, float* lse, const bf16* qkv, int B, int64_t T, int H, int G, int64_t window, Stream stream) {
    const int blocks = multiprocessors();
    const ForwardArgs a{lse, (int)T, H, G, (int)(window <= 0 ? T : std::min(window, T)), schedule(ceil_div(T, ROWS), (int64_t)B * H, blocks, true)};
    CUDA_CHECK(cudaFuncSetAttribute(forward<HD>, cudaFuncAttributeMaxDynamicSharedMemorySize, forward_shared<HD>()));
    forward<HD><<<std::min(blocks, a.schedule.items), BLOCK, forward_shared<HD>(), stream>>>(
        tensor_map(qkv, B, T, H + 2 * G, HD, ROWS), tensor_map(out, B, T, H, HD, 64), a);
    LAUNCH_CHECK();
}

template <int HD> inline void launch_backward(bf16* dqkv, const bf16* dout, const bf16* out, const bf16* qkv, const float* lse, void* workspace,
                                              int B, int64_t T, int H, int G, int64_t window, Stream stream) {
    const int blocks = multiprocessors();
    const int64_t padded = padded_length(T), rows = (int64_t)B * padded * H;
    BackwardArgs a{(float*)workspace, (float*)workspace + rows, (int)T, H, G, (int)(window <= 0 ? T : std::min(window, T)), (int)padded,
                   schedule(ceil_div(T, ROWS), (int64_t)B * H, blocks, true)};
    backward_statistics<HD><<<a.schedule.items, 256, 0, stream>>>(a, dout, out, lse);
    LAUNCH_CHECK();
    const CUtensorMap dqkv_map = tensor_map(dqkv, B, T, H + 2 * G, HD, 64);
    CUDA_CHECK(cudaFuncSetAttribute(backward_queries<HD>, cudaFuncAttributeMaxDynamicSharedMemorySize, backward_queries_shared<HD>()));
    backward_queries<HD><<<std::min(blocks, a.schedule.items), BLOCK, backward_queries_shared<HD>(), stream>>>(
        tensor_map(qkv, B, T, H + 2 * G, HD, ROWS), tensor_map(dout, B, T, H, HD, ROWS), dqkv_map, a);
    LAUNCH_CHECK();
    a.schedule = schedule(ceil_div(T, ROWS), (int64_t)B * G, blocks, false);
    CUDA_CHECK(cudaFuncSetAttribute(backward_keys<HD>, cudaFuncAttributeMaxDynamicSharedMemorySize, backward_keys_shared<HD>()));
    backward_keys<HD><<<std::min(blocks, a.schedule.items), BLOCK, backward_keys_shared<HD>(), stream>>>(
        tensor_map(qkv, B, T, H + 2 * G, HD, STEP_ROWS), tensor_map(dout, B, T, H, HD, STEP_ROWS), dqkv_map, a);
    LAUNCH_CHECK();
}
#endif // __CUDACC__

// The arguments of gpu::attention_forward without the ring. false: not for this device or shape, nothing was done.
inline bool attention_forward(bf16* out, float* lse, const bf16* qkv, int B, int64_t T, int H, int G, int hd, int64_t window, Stream stream = {}) {
    if (!supported(qkv, out, T, H, G, hd)) return false;
    if (hd == 64) launch_forward<64>(out, lse, qkv, B, T, H, G, window, stream);
    else launch_forward<128>(out, lse, qkv, B, T, H, G, window, stream);
    return true;
}

// lse2 and delta
inline size_t attention_backward_workspace(int B, int64_t T, int H, int, int) { return (size_t)B * H * padded_length(T) * 2 * sizeof(float); }

// The arguments of gpu::attention_backward. workspace: at least attention_backward_workspace bytes of this namespace, aligned to 16
inline bool attention_backward(bf16* dqkv, const bf16* dout, const bf16* out, const bf16* qkv, const float* lse, void* workspace, int B,
                               int64_t T, int H, int G, int hd, int64_t window, Stream stream = {}) {
    if (!supported(qkv, out, T, H, G, hd) || !supported(dqkv, dout, T, H, G, hd) || (uintptr_t)workspace % 16 != 0) return false;
    if (hd == 64) launch_backward<64>(dqkv, dout, out, qkv, lse, workspace, B, T, H, G, window, stream);
    else launch_backward<128>(dqkv, dout, out, qkv, lse, workspace, B, T, H, G, window, stream);
    return true;
}

} // namespace sm90
} // namespace gpu
