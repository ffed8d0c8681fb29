// Matrix products for Hopper (code built for sm_90a), bf16, with an epilogue: what becomes of a tile of the product before it goes to memory.
//   forward    x w^T     x (M,K), w (N,K)     rounded to bf16 and handed over: SwiGLU (swiglu_sm90.cuh), RoPE (rope_sm90.cuh)
//   backward   x w       x (M,K), w (K,N)     never rounded, finished where the sums are: SwiGLU's gradient
//
// A block is three warpgroups and has a multiprocessor to itself: one thread of the first feeds a ring of stages in shared memory through TMA,
// the other two multiply 64 rows each of a tile of 128 x 256 by wgmma, fp32 sums in registers. A stage is 64 of k: 128 rows of the left matrix
// and 256 columns of the right; forward two times 128, wherever the epilogue wants them from. A pair of blocks (a cluster) works on two tiles above
// each other: each loads half of the right matrix for both. Tiles come in a fixed order that keeps what neighbouring blocks read in L2. What is past
// the ends of a matrix reads as zeros. What follows a tile:
//   forward    Three warps of the first warpgroup finish it from shared memory, where the other two put it, rounded, before they go on with the
//              next one: the tensor cores hardly wait. They store all results, which TMA would have to read from shared memory once more.
//   backward   The two warpgroups do it. Four more stages, 64 columns each, bring what the epilogue reads, and results take its places. One thread
//              of the first warpgroup has TMA store them from there, while the next columns are made and the next tile's stages are filled.
#pragma once
#include <algorithm>
#include <initializer_list>

#include "../hopper.cuh"

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

// columns: of a row of each result
struct GemmSize { int64_t M; int columns, k_steps, row_tiles, column_tiles; };

// (rows, columns) as boxes of `box_rows` rows x 64 columns
inline CUtensorMap matrix_map(const bf16* p, int64_t rows, int64_t columns, int box_rows) {
    return box_map("matmul", p, columns, {rows}, {columns}, {box_rows});
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
               "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121," \
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

// right: forward (N,K), 128 rows from one block and 128 from the other; backward (K,N), two slabs of 64 x 64 from each
template <class Epilogue>
__device__ inline void gemm_produce(const GemmShared<Epilogue::BACKWARD>& shared, const CUtensorMap* left, const CUtensorMap* right,
                                    const Epilogue& epilogue, const GemmSize& s) {
    const int rank = cluster_rank();
    Turn<Epilogue::BACKWARD> turn;
    start_later(s, Epilogue::CLOCKS);
    for (int n = blockIdx.x / GEMM_CLUSTER; n < gemm_tiles(s); n += gridDim.x / GEMM_CLUSTER) {
        const GemmTile tile = gemm_tile(s, n);
        for (int k = 0; k < s.k_steps; k++, turn.next()) {
            const uint32_t to = turn.at(shared), full = turn.full(shared);
            barrier_wait(turn.empty(shared), turn.parity ^ 1);
            barrier_expect(full, GEMM_STAGE);
            matrix_load(to, left, full, k * GEMM_K, tile.row);
            if constexpr (Epilogue::BACKWARD)
                for (int slab = rank * 2; slab < rank * 2 + 2; slab++)
                    matrix_load_all(to + GEMM_LEFT + slab * GEMM_K * 128, right, full, tile.column * GEMM_N + slab * 64, k * GEMM_K);
            else
                matrix_load_all(to + GEMM_LEFT + rank * SLAB, right, full, k * GEMM_K, Epilogue::right_row(tile, rank, s));
        }
        if constexpr (Epilogue::BACKWARD) epilogue.load(shared, turn, tile, s);
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

struct GemmForwardConsumer : GemmConsumer<false> {
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

// The other side, by GEMM_FINISHERS warps from the block's second one on
template <class Epilogue> __device__ inline void gemm_finish(const GemmShared<false>& shared, const Epilogue& epilogue, const GemmSize& s) {
    const int lane = threadIdx.x % WARP, finisher = threadIdx.x / WARP - 1;
    int parity = 0;
    for (int n = blockIdx.x / GEMM_CLUSTER; n < gemm_tiles(s); n += gridDim.x / GEMM_CLUSTER, parity ^= 1) {
        const GemmTile tile = gemm_tile(s, n);
        barrier_wait(shared.result_full(), parity);
        epilogue.finish(shared, tile, s, finisher, lane);
        __syncwarp();
        if (lane == 0) barrier_arrive(shared.result_empty());
    }
}
#endif // SAMBA_SM90A_CODE

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define SM90_CLUSTER                                                      // an empty kernel, and a compiler that knows no clusters
#else
#define SM90_CLUSTER __cluster_dims__(GEMM_CLUSTER, 1, 1)
#endif

// An epilogue is a struct: what its launcher gives it, and
//   BACKWARD                                             which product
//   CLOCKS                                               that a tile takes after its products, about
//   forward    right_row(tile, rank, s)                  the first of the 128 rows of the right matrix that a block of the cluster loads
//              finish(shared, tile, s, finisher, lane)   a warp's part of a tile that lies in shared memory
//   backward   load(shared, turn, tile, s)               by the thread that feeds the stages: what the epilogue reads
//              Consumer                                  what the two warpgroups that multiply do
//              store(shared, s)                          by one thread: what they made leaves, and the stages are free again
template <class Epilogue>
__global__ void SM90_CLUSTER __launch_bounds__(BLOCK, 1)
gemm_kernel(const __grid_constant__ CUtensorMap left, const __grid_constant__ CUtensorMap right, const __grid_constant__ Epilogue epilogue,
            const GemmSize s) {
#ifdef SAMBA_SM90A_CODE
    constexpr bool BACKWARD = Epilogue::BACKWARD;
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
        if (threadIdx.x == 0) gemm_produce(shared, &left, &right, epilogue, s);
        if constexpr (BACKWARD) {
            if (threadIdx.x == WARP) epilogue.store(shared, s);
        } else {
            if (threadIdx.x >= WARP) gemm_finish(shared, epilogue, s);
        }
    } else {
        registers_up<BACKWARD ? 232 : 176>();
        if constexpr (BACKWARD) {
            typename Epilogue::Consumer(shared, s).run();
        } else {
            GemmForwardConsumer(shared, s).run();
        }
    }
    __syncwarp();
    cluster_sync();                                                      // nobody arrives at barriers of a block that has gone
#endif
}

// Does the kernel take products of these sizes and addresses (null: not given) on this GPU?
inline bool gemm_usable(std::initializer_list<const void*> arrays, int64_t M, int K) {
    const bool aligned = std::all_of(arrays.begin(), arrays.end(), [](const void* p) { return (uintptr_t)p % 16 == 0; });
    return aligned && K % 8 == 0 && M < ((int64_t)1 << 31) - GEMM_M * GEMM_CLUSTER && usable();
}

template <class Epilogue>
inline void launch_gemm(const CUtensorMap& left, const CUtensorMap& right, const Epilogue& epilogue, int64_t M, int columns, int K, int column_tiles,
                        Stream stream) {
    const GemmSize size{M, columns, (int)ceil_div(K, GEMM_K), (int)ceil_div(M, GEMM_M), column_tiles};
    const int64_t tiles = ceil_div(size.row_tiles, GEMM_CLUSTER) * size.column_tiles;
    const unsigned blocks = (unsigned)std::min<int64_t>(multiprocessors() / GEMM_CLUSTER, tiles) * GEMM_CLUSTER;
    constexpr int BYTES = GemmShared<Epilogue::BACKWARD>::BYTES;
    CUDA_CHECK(cudaFuncSetAttribute(gemm_kernel<Epilogue>, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES));
    gemm_kernel<Epilogue><<<blocks, BLOCK, BYTES, stream>>>(left, right, epilogue, size);
    LAUNCH_CHECK();
}

} // namespace gpu::sm90
