// What Hopper (compute capability 9.0, code built for sm_90a) has and C++ has not: mbarriers, TMA, wgmma, registers that warps give each
// other, as functions of one instruction each; above them tiles and rings of tiles in shared memory, in the form that both engines want.
#pragma once
#include <cuda.h>

#include <string>

#include "attention/common.cuh"

// wgmma and setmaxnreg exist for sm_90a only: other passes compile empty kernels, which usable() keeps from being launched.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || (defined(__CUDA_ARCH_SPECIFIC__) && __CUDA_ARCH_SPECIFIC__ == 900)
#define SAMBA_SM90A_CODE 1
#endif

namespace gpu {
namespace sm90 {

using attn::bf16, attn::pack;

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

// An array as boxes: 64 columns, then N dimensions of sizes[] elements, strides[] elements apart, `box` of each. What is past the end of a dimension
// reads as zeros and is not written. operation: whose array it is, for the error
template <int N>
inline CUtensorMap box_map(const char* operation, const bf16* p, int64_t columns, const int64_t (&sizes)[N], const int64_t (&strides)[N],
                           const int (&box)[N]) {
    CUtensorMap map;
    cuuint64_t size[N + 1] = {(cuuint64_t)columns}, bytes[N];
    cuuint32_t edge[N + 1] = {64}, steps[N + 1] = {1};
    for (int i = 0; i < N; i++) size[i + 1] = sizes[i], bytes[i] = strides[i] * sizeof(bf16), edge[i + 1] = box[i], steps[i + 1] = 1;
    const CUresult status = encode_tiled()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, N + 1, const_cast<bf16*>(p), size, bytes, edge, steps,
                                           CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                           CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status == CUDA_SUCCESS) return map;
    std::string shape = std::to_string(columns);
    for (const int64_t n : sizes) shape = std::to_string(n) + " x " + shape;
    fail("%s: cuTensorMapEncodeTiled says %d for an array of %s", operation, (int)status, shape.c_str());
}
// (B, T, heads, hd) as boxes of `rows` positions x 64 columns of one head. T is a dimension of its own: no box runs into the next sequence.
inline CUtensorMap tensor_map(const bf16* p, int B, int64_t T, int64_t heads, int hd, int rows) {
    return box_map("attention", p, hd, {heads, T, B}, {hd, heads * hd, T * heads * hd}, {1, rows, 1});
}

constexpr int WARPGROUP = 128, BLOCK = 3 * WARPGROUP;                      // producer, two consumers

#ifdef __CUDACC__
extern __shared__ __align__(1024) unsigned char sm90_shared[];

// The next kernel may start its blocks, if it is launched so; the kernel before has ended, and its results are there
__device__ inline void results_allow_next() {
#ifdef SAMBA_SM90A_CODE
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ inline void results_wait() {
#ifdef SAMBA_SM90A_CODE
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#ifdef SAMBA_SM90A_CODE
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
// Two neighbouring bf16
__device__ inline float2 floats(uint32_t v) { return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u)); }
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

// Four 8 x 8 blocks of bf16: lane l names row l % 8 of block l / 8, and has of each block two neighbours of row l / 4
__device__ inline void load_blocks(uint32_t (&v)[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(at) : "memory");
}
__device__ inline void load_shared(uint32_t (&v)[4], uint32_t at) {          // 16 bytes
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(at) : "memory");
}
__device__ inline void store_blocks(uint32_t at, const uint32_t (&v)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
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
        const uint32_t rounded[4] = {pack(x[0] * factor[0], x[1] * factor[0]), pack(x[2] * factor[1], x[3] * factor[1]),
                                     pack(x[4] * factor[0], x[5] * factor[0]), pack(x[6] * factor[1], x[7] * factor[1])};
        store_blocks(row + n / 8 * TILE_ROWS * 128 + ((n % 8 + lane / 16) ^ r % 8) * 16, rounded);
    }
}
// Staged rows (a box of the map) to positions t .. of a head, as far as they exist. By one thread; committed by the caller
template <int HD, int TILE_ROWS> __device__ inline void store_tile(const CUtensorMap* map, const unsigned char* rows, int head, int t, int b) {
    for (int slab = 0; slab < HD / 64; slab++) tma_store(map, shared_address(rows) + slab * TILE_ROWS * 128, slab * 64, head, t, b);
}

// ---------------------------------------------------------------------------------------------------------------------
// Rings of tiles

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
    __device__ void release(const Ring<STAGES>& ring) const {
        __syncwarp();
        if (threadIdx.x % WARP == 0) release_lane(ring);
    }
    // Each lane for itself, where lanes have read the stage themselves: compute-sanitizer's racecheck sees the order of the arriving lane only
    __device__ void release_lane(const Ring<STAGES>& ring) const { barrier_arrive(ring.bars + (STAGES + stage) * 8); }
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

// The block's first warpgroup is the producer; 0, 1 .. for the consumers after it. The compiler must see that it is one for a warp
__device__ inline int which_consumer() { return __shfl_sync(0xffffffffu, threadIdx.x / WARPGROUP, 0) - 1; }
#endif // SAMBA_SM90A_CODE
#endif // __CUDACC__

} // namespace sm90
} // namespace gpu
