// Products with SwiGLU behind or before them, for Hopper (code built for sm_90a), bf16. a gate, b up, s = sigma(a):
//   forward    a|b = n (w1|w2)^T      h = a s b                                         n (M,d), w1|w2 (2F,d), a|b (M,2F), h (M,F)
//   backward   dh = dy w3             da = dh b s (1 + a (1 - s))      db = dh a s      dy (M,d), w3 (d,F); h once more where it was not kept
// a and b are rounded to bf16 before h is made of them, as they are elsewhere; dh is never rounded, nor in memory.
//
// A block is three warpgroups and has a multiprocessor to itself: one thread of the first feeds a ring of stages in shared memory through TMA,
// the other two multiply 64 rows each of a tile of 128 x 256 by wgmma, fp32 sums in registers. A stage is 64 of k: 128 rows of the left matrix
// and 256 columns of the right; forward 128 columns of a and the same of b. A pair of blocks (a cluster) works on two tiles above each other:
// each loads half of the right matrix for both. Tiles come in a fixed order that keeps what neighbouring blocks read in L2. What follows a tile:
//   forward    Three warps of the first warpgroup finish it from shared memory, where the other two put it, rounded, before they go on with the
//              next one: the tensor cores hardly wait. They store a and b too, which TMA would have to read from shared memory once more.
//   backward   The two warpgroups do it. Four more stages, 64 columns each, bring a and b, and da and db take their places (and h the third).
//              One thread of the first warpgroup has TMA store them from there, while the next columns are made and the next tile's stages are
//              filled. (Finished beside the tensor cores, like forward, it took 14.3 ms a step of Samba-421M on an H200 for 9.4; 12.0 where
//              forward left h's derivatives, so that no more than two products an element were to be made. Not the arithmetic, then; what it is
//              was not found.)
//
// Flops, Samba-421M (M 32768, d 1536, F 4096): forward 825 GFLOP, 0.83 ms at the nominal 989 TFLOP/s; backward 412, 0.42 ms. Bytes: forward
// M (2 d + 6 F) + 4 d F = 0.93 GB, 0.31 ms at 3 TB/s; backward M (2 d + 8 F) + 2 d F = 1.19 GB, 0.40 ms.
// Clocks of a backward tile on an H100: 24,600 of products, 6,500 of what follows, of which special functions (two an element, 16 a clock) 4,100.
// Alone on an H100 at its power limit: forward 1.25 ms, backward 0.78 (clusters in step, and forward's a and b stored by TMA: 1.29 and 0.84).
// In a training step on an H200, before that: forward 1.23 ms, cuBLASLt's product and the pass 1.33 (the product alone 1.14); backward 0.78,
// product and pass 0.90. At that limit it is energy that counts: backward with the next special functions made beside these results was no faster;
// forward with the halves of a tile's columns multiplied apart at its ends, one handed over beside the other's products, took 1.30 for 1.23 (H200).
#pragma once
#include <initializer_list>

#include "../hopper.cuh"
#include "../swiglu.cuh"

namespace gpu::sm90 {

constexpr int GEMM_M = 128, GEMM_N = 256, GEMM_K = 64, GEMM_CLUSTER = 2;
constexpr int GEMM_LEFT = GEMM_M * GEMM_K * 2, GEMM_RIGHT = GEMM_N * GEMM_K * 2, GEMM_STAGE = GEMM_LEFT + GEMM_RIGHT;   // bytes
constexpr int GEMM_BAND = 16;                                             // tiles above each other that are worked on before the next column
constexpr int GEMM_CHUNKS = GEMM_N / 64;                                  // of a tile: 64 columns
constexpr int SLAB = 64 * GEMM_M * 2;                                     // bytes of these: 128 rows of 128 bytes
constexpr int GEMM_FINISHERS = 3;                                         // warps that finish a tile of forward

// Shared memory: the stages, forward also a tile's results, barriers: a stage's, a result's
template <bool BACKWARD> struct GemmShared {
    static constexpr int STAGES = BACKWARD ? 4 : 3, RESULT = STAGES * GEMM_STAGE, BARRIERS = RESULT + (BACKWARD ? 0 : GEMM_CHUNKS * SLAB);
    static constexpr int BYTES = BARRIERS + (2 * STAGES + (BACKWARD ? GEMM_CHUNKS : 2)) * 8;
    uint32_t stages, result, barriers;                                    // addresses
    __device__ explicit GemmShared(uint32_t at) : stages(at), result(at + RESULT), barriers(at + BARRIERS) {}
    __device__ uint32_t result_full() const { return barriers + 2 * STAGES * 8; }
    __device__ uint32_t result_empty() const { return result_full() + 8; }
    __device__ uint32_t made(int chunk) const { return barriers + (2 * STAGES + chunk) * 8; }
    // The 16 bytes `chunk` of a row of the result
    __device__ uint32_t place(int row, int chunk) const { return result + chunk / 8 * SLAB + row * 128 + ((chunk % 8) ^ (row % 8)) * 16; }
};

struct GemmSize { int64_t M; int F, k_steps, row_tiles, column_tiles; };

// A (rows, columns) matrix as boxes of `box_rows` rows x 64 columns; what is past its ends reads as zeros and is not written
inline CUtensorMap matrix_map(const bf16* p, int64_t rows, int64_t columns, int box_rows) {
    CUtensorMap map;
    const cuuint64_t sizes[2] = {(cuuint64_t)columns, (cuuint64_t)rows}, strides[1] = {(cuuint64_t)columns * 2};
    const cuuint32_t box[2] = {64, (cuuint32_t)box_rows}, steps[2] = {1, 1};
    const CUresult status = encode_tiled()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<bf16*>(p), sizes, strides, box, steps,
                                           CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                           CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS) fail("matmul: cuTensorMapEncodeTiled says %d for %lld x %lld", (int)status, (long long)rows, (long long)columns);
    return map;
}

#ifdef SAMBA_SM90A_CODE
__device__ inline void matrix_load(uint32_t to, const CUtensorMap* map, uint32_t bar, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
                 ::"r"(to), "l"(map), "r"(bar), "r"(column), "r"(row) : "memory");
}
// To the same place of every block of the cluster, and its barrier there
__device__ inline void matrix_load_all(uint32_t to, const CUtensorMap* map, uint32_t bar, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;"
                 ::"r"(to), "l"(map), "r"(bar), "r"(column), "r"(row), "h"((uint16_t)((1 << GEMM_CLUSTER) - 1)) : "memory");
}
__device__ inline void matrix_store(const CUtensorMap* map, uint32_t from, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];"
                 ::"l"(map), "r"(from), "r"(column), "r"(row) : "memory");
}
template <int PENDING> __device__ inline void matrix_store_wait() { asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory"); }
__device__ inline int cluster_rank() { int r; asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)); return r; }
__device__ inline void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// At that barrier of a block of the cluster. What follows there are loads by TMA into memory that we have read: no fence is needed
// (with .release.cluster the compiler adds one of the whole GPU, which halved the speed).
__device__ inline void arrive_at(uint32_t bar, int rank) {
    asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [there];\n}"
                 ::"r"(bar), "r"(rank) : "memory");
}

__device__ inline uint4 load_shared(uint32_t at) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
    return v;
}

#define SM90_ACC128                                                                                                                            \
    SM90_ACC64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95," \
               "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,"        \
               "%122,%123,%124,%125,%126,%127"
// c (64 x 256) (+)= a b, 16 of k; a along rows, b along rows or columns
template <int B_COLUMNS> __device__ inline void wgmma_256(float (&c)[128], uint64_t a, uint64_t b, int add) {
    asm volatile(SM90_ADD("%130") "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" SM90_ACC128 "}, %128, %129, add, 1, 1, 0, %131;\n}"
                 : SM90_F32("+f", c, 0), SM90_F32("+f", c, 32), SM90_F32("+f", c, 64), SM90_F32("+f", c, 96)
                 : "l"(a), "l"(b), "r"(add), "n"(B_COLUMNS));
}

// Tile n of the cluster's: `row` of this block's 128 rows, `column` in units of a tile
struct GemmTile { int row, column; };
__device__ inline GemmTile gemm_tile(const GemmSize& s, int n) {
    const int pairs = (s.row_tiles + GEMM_CLUSTER - 1) / GEMM_CLUSTER, band = GEMM_BAND / GEMM_CLUSTER;
    const int first = n / (band * s.column_tiles) * band, width = min(band, pairs - first), rest = n - first * s.column_tiles;
    return {((first + rest % width) * GEMM_CLUSTER + cluster_rank()) * GEMM_M, rest / width};
}
__device__ inline int gemm_tiles(const GemmSize& s) { return (s.row_tiles + GEMM_CLUSTER - 1) / GEMM_CLUSTER * s.column_tiles; }

// Clusters in step store, and backward load a and b, all at once: more than memory gives, and the products wait for it too (backward 34,300 clocks
// a tile on an H100). So those that have a tile less than others start later, evenly over the time of a tile: 31,300, and nothing is lost.
__device__ inline void start_later(const GemmSize& s, int clocks_after_products) {
    const int cluster = blockIdx.x / GEMM_CLUSTER, clusters = gridDim.x / GEMM_CLUSTER, one_more = gemm_tiles(s) % clusters;
    if (one_more == 0 || cluster < one_more) return;
    const int tile_clocks = s.k_steps * (GEMM_M * GEMM_N * GEMM_K * 2 / 4096) + clocks_after_products;       // about: products at full speed
    const int64_t start = clock64(), delay = (int64_t)tile_clocks * cluster / clusters;
    while (clock64() - start < delay) __nanosleep(100);
}

// The stages as one goes round them
template <bool BACKWARD> struct Turn {
    using Shared = GemmShared<BACKWARD>;
    int stage = 0, parity = 0;
    __device__ uint32_t at(const Shared& shared) const { return shared.stages + stage * GEMM_STAGE; }
    __device__ uint32_t full(const Shared& shared) const { return shared.barriers + stage * 8; }
    __device__ uint32_t empty(const Shared& shared) const { return shared.barriers + (Shared::STAGES + stage) * 8; }
    __device__ void next() { if (++stage == Shared::STAGES) stage = 0, parity ^= 1; }
    // By one thread for a warpgroup: it needs the stage no more
    __device__ void release(const Shared& shared) const {
        for (int rank = 0; rank < GEMM_CLUSTER; rank++) arrive_at(empty(shared), rank);
    }
};

// right: forward (2F, d), 128 rows of w1 from one block and the same of w2 from the other; backward (d, F), two slabs of 64 x 64 from each
template <bool BACKWARD>
__device__ inline void gemm_produce(const GemmShared<BACKWARD>& shared, const CUtensorMap* left, const CUtensorMap* right, const CUtensorMap* gate_up,
                                    const GemmSize& s) {
    const int rank = cluster_rank();
    Turn<BACKWARD> turn;
    start_later(s, BACKWARD ? 7000 : 1500);
    for (int n = blockIdx.x / GEMM_CLUSTER; n < gemm_tiles(s); n += gridDim.x / GEMM_CLUSTER) {
        const GemmTile tile = gemm_tile(s, n);
        for (int k = 0; k < s.k_steps; k++, turn.next()) {
            const uint32_t to = turn.at(shared), full = turn.full(shared);
            barrier_wait(turn.empty(shared), turn.parity ^ 1);
            barrier_expect(full, GEMM_STAGE);
            matrix_load(to, left, full, k * GEMM_K, tile.row);
            if (BACKWARD)
                for (int slab = rank * 2; slab < rank * 2 + 2; slab++)
                    matrix_load_all(to + GEMM_LEFT + slab * GEMM_K * 128, right, full, tile.column * GEMM_N + slab * 64, k * GEMM_K);
            else
                matrix_load_all(to + GEMM_LEFT + rank * SLAB, right, full, k * GEMM_K, rank * s.F + tile.column * GEMM_N / 2);
        }
        for (int j = 0; BACKWARD && j < GEMM_CHUNKS; j++, turn.next()) {
            barrier_wait(turn.empty(shared), turn.parity ^ 1);
            barrier_expect(turn.full(shared), 2 * SLAB);
            for (int part = 0; part < 2; part++)
                matrix_load(turn.at(shared) + part * SLAB, gate_up, turn.full(shared), part * s.F + tile.column * GEMM_N + j * 64, tile.row);
        }
    }
}

// What the two warpgroups that multiply have in common
template <bool BACKWARD> struct GemmConsumer {
    const GemmShared<BACKWARD>& shared;
    const GemmSize& s;
    const int consumer = which_consumer(), lane = threadIdx.x % WARP;
    // Where load_blocks and store_blocks find this lane's row of 16 rows x 16 columns, but for the 16-byte chunk
    const int row = consumer * 64 + threadIdx.x / WARP % 4 * 16 + lane % 16, half = lane / 16;
    Turn<BACKWARD> turn;

    __device__ GemmConsumer(const GemmShared<BACKWARD>& shared, const GemmSize& s) : shared(shared), s(s) {}
    __device__ void release(const Turn<BACKWARD>& t) const { if (threadIdx.x % WARPGROUP == 0) t.release(shared); }
    __device__ void multiply(float (&c)[128]) {
        Turn<BACKWARD> before;
        for (int k = 0; k < s.k_steps; k++, turn.next()) {
            barrier_wait(turn.full(shared), turn.parity);
            const uint64_t a = descriptor(turn.at(shared) + consumer * 64 * 128, 0);
            const uint64_t b = descriptor(turn.at(shared) + GEMM_LEFT, BACKWARD ? GEMM_K * 128 : 0);
            wgmma_fence();
#pragma unroll
            for (int i = 0; i < GEMM_K / 16; i++) wgmma_256<BACKWARD>(c, a + i * 32 / 16, b + i * (BACKWARD ? 2048 : 32) / 16, k + i > 0);
            wgmma_commit();
            if (k > 0) {                                                 // the step before is done
                wgmma_wait<1>();
                release(before);
            }
            before = turn;
        }
        wgmma_wait<0>();
        hold(c);
        release(before);
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// Forward

struct SwigluForwardConsumer : GemmConsumer<false> {
    using GemmConsumer::GemmConsumer;
    __device__ void hand_over(const float (&c)[128]) const {
#pragma unroll
        for (int i = 0; i < GEMM_N / 16; i++) {
            uint32_t rounded[4];
#pragma unroll
            for (int r = 0; r < 4; r++) rounded[r] = pack(c[8 * i + 2 * r], c[8 * i + 2 * r + 1]);
            store_blocks(shared.place(row, 2 * i + half), rounded);
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(shared.result_full());
    }
    __device__ void run() {
        int parity = 1;
        for (int n = blockIdx.x / GEMM_CLUSTER; n < gemm_tiles(s); n += gridDim.x / GEMM_CLUSTER, parity ^= 1) {
            float c[128];
            multiply(c);
            barrier_wait(shared.result_empty(), parity);
            hand_over(c);
        }
    }
};

__device__ inline uint32_t swiglu_pair(uint32_t gate, uint32_t up) {
    const float2 a = floats(gate), b = floats(up);
    return pack(a.x * sigmoid<bf16>(a.x) * b.x, a.y * sigmoid<bf16>(a.y) * b.y);
}
// By GEMM_FINISHERS warps from the block's second one on: half a warp makes a row of 128 columns of h, and a and b leave on the way
__device__ inline void finish_forward(const GemmShared<false>& shared, bf16* gate_up, bf16* h, const GemmSize& s) {
    const int lane = threadIdx.x % WARP, finisher = threadIdx.x / WARP - 1, chunk = lane % 16;
    int parity = 0;
    for (int n = blockIdx.x / GEMM_CLUSTER; n < gemm_tiles(s); n += gridDim.x / GEMM_CLUSTER, parity ^= 1) {
        const GemmTile tile = gemm_tile(s, n);
        barrier_wait(shared.result_full(), parity);
#pragma unroll 4
        for (int pair = finisher; pair < GEMM_M / 2; pair += GEMM_FINISHERS) {
            const int row = pair * 2 + lane / 16, column = tile.column * GEMM_N / 2 + chunk * 8;
            const uint4 a = load_shared(shared.place(row, chunk)), b = load_shared(shared.place(row, GEMM_N / 16 + chunk));
            const uint4 out = make_uint4(swiglu_pair(a.x, b.x), swiglu_pair(a.y, b.y), swiglu_pair(a.z, b.z), swiglu_pair(a.w, b.w));
            if (tile.row + row >= s.M) continue;
            bf16* const ab = gate_up + (int64_t)(tile.row + row) * 2 * s.F + column;
            *(uint4*)ab = a, *(uint4*)(ab + s.F) = b;
            *(uint4*)(h + (int64_t)(tile.row + row) * s.F + column) = out;
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(shared.result_empty());
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward

struct SwigluGradient { float da, db, h; };
__device__ inline SwigluGradient swiglu_gradient(float dh, float a, float b) {
    const float s = sigmoid<bf16>(a), as = a * s;
    return {dh * b * (s + fmaf(-as, s, as)), dh * as, as * b};
}

template <bool MAKE_H> struct SwigluBackwardConsumer : GemmConsumer<true> {
    using GemmConsumer::GemmConsumer;
    __device__ uint32_t place(int i) const { return turn.at(shared) + row * 128 + ((2 * i + half) ^ (row % 8)) * 16; }   // of 16 columns 16 i ..

    // 64 columns of dh: results take their places in the stage
    __device__ void differentiate(const float* dh) const {
        uint32_t gate[4][4], up[4][4];
#pragma unroll
        for (int i = 0; i < 4; i++) load_blocks(gate[i], place(i)), load_blocks(up[i], place(i) + SLAB);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint32_t out[4];
#pragma unroll
            for (int r = 0; r < 4; r++) {
                const float2 a = floats(gate[i][r]), b = floats(up[i][r]);
                const SwigluGradient x = swiglu_gradient(dh[8 * i + 2 * r], a.x, b.x), y = swiglu_gradient(dh[8 * i + 2 * r + 1], a.y, b.y);
                gate[i][r] = pack(x.da, y.da), up[i][r] = pack(x.db, y.db), out[r] = pack(x.h, y.h);
            }
            store_blocks(place(i), gate[i]);
            store_blocks(place(i) + SLAB, up[i]);
            if (MAKE_H) store_blocks(place(i) + 2 * SLAB, out);
        }
    }
    __device__ void run() {
        for (int n = blockIdx.x / GEMM_CLUSTER; n < gemm_tiles(s); n += gridDim.x / GEMM_CLUSTER) {
            float c[128];
            multiply(c);
#pragma unroll
            for (int j = 0; j < GEMM_CHUNKS; j++, turn.next()) {
                barrier_wait(turn.full(shared), turn.parity);
                differentiate(c + 32 * j);
                fence_async();                                           // TMA will read it
                __syncwarp();
                if (lane == 0) barrier_arrive(shared.made(j));
            }
        }
    }
};

// By one thread: 64 columns that were made leave, and their stage is free again
template <bool MAKE_H>
__device__ inline void store_backward(const GemmShared<true>& shared, const CUtensorMap* dgate_up, const CUtensorMap* h, const GemmSize& s) {
    Turn<true> turn;
    int parity = 0;
    for (int n = blockIdx.x / GEMM_CLUSTER; n < gemm_tiles(s); n += gridDim.x / GEMM_CLUSTER, parity ^= 1) {
        const GemmTile tile = gemm_tile(s, n);
        turn.stage = (turn.stage + s.k_steps) % GemmShared<true>::STAGES;
        for (int j = 0; j < GEMM_CHUNKS; j++, turn.next()) {
            const int column = tile.column * GEMM_N + j * 64;
            barrier_wait(shared.made(j), parity);
            matrix_store(dgate_up, turn.at(shared), column, tile.row);
            matrix_store(dgate_up, turn.at(shared) + SLAB, s.F + column, tile.row);
            if (MAKE_H) matrix_store(h, turn.at(shared) + 2 * SLAB, column, tile.row);
            tma_store_commit();
            matrix_store_wait<0>();
            for (int warpgroup = 0; warpgroup < 2; warpgroup++) turn.release(shared);
        }
    }
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
#endif // SAMBA_SM90A_CODE

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define SM90_CLUSTER                                                      // an empty kernel, and a compiler that knows no clusters
#else
#define SM90_CLUSTER __cluster_dims__(GEMM_CLUSTER, 1, 1)
#endif
// in, out, h_map: backward's gate_up, dgate_up, and h if MAKE_H; gate_up, h: forward's
template <bool BACKWARD, bool MAKE_H>
__global__ void SM90_CLUSTER __launch_bounds__(BLOCK, 1)
swiglu_gemm_kernel(const __grid_constant__ CUtensorMap left, const __grid_constant__ CUtensorMap right, const __grid_constant__ CUtensorMap in,
                   const __grid_constant__ CUtensorMap out, const __grid_constant__ CUtensorMap h_map, bf16* gate_up, bf16* h, const GemmSize s) {
#ifdef SAMBA_SM90A_CODE
    using Shared = GemmShared<BACKWARD>;
    const Shared shared(shared_address(sm90_shared));
    if (threadIdx.x == 0) {
        for (int i = 0; i < Shared::STAGES; i++)
            barrier_init(shared.barriers + i * 8, 1), barrier_init(shared.barriers + (Shared::STAGES + i) * 8, 2 * GEMM_CLUSTER);
        if constexpr (BACKWARD)
            for (int j = 0; j < GEMM_CHUNKS; j++) barrier_init(shared.made(j), 2 * WARPGROUP / WARP);
        else
            barrier_init(shared.result_full(), 2 * WARPGROUP / WARP), barrier_init(shared.result_empty(), GEMM_FINISHERS);
        barrier_init_done();
    }
    cluster_sync();
    if (threadIdx.x < WARPGROUP) {
        registers_down<BACKWARD ? 40 : 152>();
        if (threadIdx.x == 0) gemm_produce<BACKWARD>(shared, &left, &right, &in, s);
        if constexpr (BACKWARD) {
            if (threadIdx.x == WARP) store_backward<MAKE_H>(shared, &out, &h_map, s);
        } else {
            if (threadIdx.x >= WARP) finish_forward(shared, gate_up, h, s);
        }
    } else {
        registers_up<BACKWARD ? 232 : 176>();
        if constexpr (BACKWARD) {
            SwigluBackwardConsumer<MAKE_H>(shared, s).run();
        } else {
            SwigluForwardConsumer(shared, s).run();
        }
    }
    __syncwarp();
    cluster_sync();                                                      // nobody arrives at barriers of a block that has gone
#endif
}

// Do the kernels take these sizes and addresses (null: not given) on this GPU?
inline bool swiglu_gemm_usable(std::initializer_list<const void*> arrays, int64_t M, int F, int d) {
    const bool aligned = std::all_of(arrays.begin(), arrays.end(), [](const void* p) { return (uintptr_t)p % 16 == 0; });
    return aligned && F % GEMM_N == 0 && d % 8 == 0 && M < ((int64_t)1 << 31) - GEMM_M * GEMM_CLUSTER && usable();
}

template <bool BACKWARD, bool MAKE_H>
inline void launch_swiglu_gemm(const CUtensorMap& left, const CUtensorMap& right, const CUtensorMap& in, const CUtensorMap& out,
                               const CUtensorMap& h_map, bf16* gate_up, bf16* h, int64_t M, int F, int d, Stream stream) {
    const GemmSize size{M, F, (int)ceil_div(d, GEMM_K), (int)ceil_div(M, GEMM_M), F / (BACKWARD ? GEMM_N : GEMM_N / 2)};
    const int64_t tiles = ceil_div(size.row_tiles, GEMM_CLUSTER) * size.column_tiles;
    const unsigned blocks = (unsigned)std::min<int64_t>(multiprocessors() / GEMM_CLUSTER, tiles) * GEMM_CLUSTER;
    auto kernel = swiglu_gemm_kernel<BACKWARD, MAKE_H>;
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, GemmShared<BACKWARD>::BYTES));
    kernel<<<blocks, BLOCK, GemmShared<BACKWARD>::BYTES, stream>>>(left, right, in, out, h_map, gate_up, h, size);
    LAUNCH_CHECK();
}

// gate_up (M,2F) and h (M,F) from n (M,d), w1|w2 (2F,d)
inline void swiglu_gemm_forward(bf16* h, bf16* gate_up, const bf16* n, const bf16* w12, int64_t M, int F, int d, Stream stream) {
    const CUtensorMap left = matrix_map(n, M, d, GEMM_M), right = matrix_map(w12, 2 * (int64_t)F, d, GEMM_N / 2);
    launch_swiglu_gemm<false, true>(left, right, left, left, left, gate_up, h, M, F, d, stream);
}
// dgate_up (M,2F) from dy (M,d), w3 (d,F), gate_up (M,2F); and h (M,F) if given
inline void swiglu_gemm_backward(bf16* dgate_up, bf16* h, const bf16* dy, const bf16* w3, const bf16* gate_up, int64_t M, int F, int d,
                                 Stream stream) {
    const CUtensorMap left = matrix_map(dy, M, d, GEMM_M), right = matrix_map(w3, d, F, GEMM_K);
    const CUtensorMap in = matrix_map(gate_up, M, 2 * (int64_t)F, GEMM_M), out = matrix_map(dgate_up, M, 2 * (int64_t)F, GEMM_M);
    if (h) launch_swiglu_gemm<true, true>(left, right, in, out, matrix_map(h, M, F, GEMM_M), nullptr, nullptr, M, F, d, stream);
    else launch_swiglu_gemm<true, false>(left, right, in, out, out, nullptr, nullptr, M, F, d, stream);
}

} // namespace gpu::sm90
