// What the selective scan reads, in one pass over x, for Hopper (code built for sm_90a), bf16. N = 16 states; C = R + 2 N columns of x_dbl:
//   u = silu(conv(x))        x_dbl = u w_x^T, columns dt low | B | C        dt = x_dbl[:, :R] w_dt^T
// x, u, dt (B,T,e), x_dbl (B,T,C), w_x (C,e), w_dt (e,R). u and x_dbl are rounded to bf16 before they are multiplied, as they are in memory;
// u is the sum of conv1d.cuh's kernel, in its order.
//
// A block takes 128 tokens of a sequence and walks over the channels twice, 64 a stage. One thread feeds the ring of stages through TMA, two
// warpgroups of 64 tokens each work:
//   make_u    A stage is 131 rows of x, the channels' taps and their columns of w_x. A warp makes u of 16 tokens, a lane two channels of it, into
//             a buffer in shared memory. From there TMA stores it, and wgmma multiplies it: x_dbl adds up in registers.
//   make_dt   A stage is rows of w_dt. x_dbl, rounded, is in registers the left factor; dt leaves through the same buffers.
// A product runs while its warpgroup makes the next u, or stores the dt before.
//
// Bytes: 6 per (t,c), 0.604 GB at 32768 x 3072, 0.201 ms at 3.0 TB/s (H100), 0.144 at 4.2 (H200); apart they are 10. The weights, read once by
// every block, come from L2. 2 e (C + R) flops a token, 45 GFLOP: 0.046 ms. Two special functions per (t,c): 0.054 ms.
// Measured at R 96, the three operations apart in brackets: H100 0.243 ms (0.318), H200 0.197 (0.246); R 144, e 4608: 0.364 (0.483), 0.328 (0.397).
// No faster: w_x and w_dt once for two blocks (a cluster), walks that start at different channels, hints to L2, more buffers.
#pragma once
#include <algorithm>
#include <initializer_list>

#include "../conv1d.cuh"
#include "../hopper.cuh"

namespace gpu::sm90 {

constexpr int INPUTS_STATES = 16, INPUTS_ROWS = 128, INPUTS_CHANNELS = 64;
constexpr int INPUTS_X_ROWS = INPUTS_ROWS + CONV_HALO;
constexpr int INPUTS_BUFFER = 64 * 128;                                   // bytes: 64 rows of 64 channels
constexpr int INPUTS_THREADS = 2 * WARPGROUP + WARP;

// Shared memory: the ring of stages, each warpgroup's buffers, barriers. A stage: w_x or w_dt, rows of x, taps (64,4), their biases (64)
template <int R_> struct InputsShared {
    static constexpr int R = R_, C = R + 2 * INPUTS_STATES;
    static constexpr int BUFFERS = (C + 63) / 64, R_SLABS = (R + 63) / 64;                           // slabs of 64 columns
    static constexpr int X = BUFFERS * 64 * 128, TAPS = X + INPUTS_X_ROWS * 128, BIASES = TAPS + INPUTS_CHANNELS * CONV_WIDTH * 4;
    static constexpr int STAGE_BYTES = BIASES + INPUTS_CHANNELS * 4, STAGE = (STAGE_BYTES + 1023) / 1024 * 1024;
    static constexpr int STAGES = BUFFERS == 2 ? 5 : 4, BUFFER = STAGES * STAGE, BARRIERS = BUFFER + 2 * BUFFERS * INPUTS_BUFFER;
    static constexpr int BYTES = BARRIERS + 2 * STAGES * 8;
    static_assert(BYTES <= 227 * 1024);
};

struct InputsMaps { CUtensorMap x, u, x_dbl, dt, w_x, w_dt; };
struct InputsArgs {
    const bf16* halo;                                                     // (B,3,e) or null
    const float *w, *b;                                                   // (e,4), (e)
    int B, e, tiles;                                                      // tiles: of a sequence
};

#ifdef SAMBA_SM90A_CODE
// c (64 x 64) = a b, a from registers, b along rows; and c +=
__device__ inline void wgmma_rows_first(float (&c)[32], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(SM90_ADD("0") "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" SM90_ACC32 "}, {%32,%33,%34,%35}, %36, add, 1, 1, 0;\n}"
                 : SM90_F32("=f", c, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ inline void wgmma_rows(float (&c)[32], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(SM90_ADD("1") "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" SM90_ACC32 "}, {%32,%33,%34,%35}, %36, add, 1, 1, 0;\n}"
                 : SM90_F32("+f", c, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// By one thread: the stages of every tile of the block, in order
template <int R> __device__ inline void inputs_produce(const Ring<InputsShared<R>::STAGES>& ring, const InputsMaps& maps, const InputsArgs& p) {
    using S = InputsShared<R>;
    Cursor<S::STAGES> cursor;
    for (int tile = blockIdx.x; tile < p.B * p.tiles; tile += gridDim.x) {
        const int b = tile / p.tiles, t = tile % p.tiles * INPUTS_ROWS;
#pragma unroll 1
        for (int c = 0; c < p.e; c += INPUTS_CHANNELS, cursor.next()) {
            const uint32_t to = cursor.tile(ring), full = cursor.full_bar(ring);
            cursor.wait_empty(ring);
            barrier_expect(full, S::STAGE_BYTES);
            tma_load(to + S::X, &maps.x, full, c, 0, t - CONV_HALO, b);                              // rows before the sequence read as zeros
            tma_load(to, &maps.w_x, full, c, 0, 0, 0);
            bulk_load(to + S::TAPS, p.w + (int64_t)c * CONV_WIDTH, INPUTS_CHANNELS * CONV_WIDTH * 4, full);
            bulk_load(to + S::BIASES, p.b + c, INPUTS_CHANNELS * 4, full);
        }
#pragma unroll 1
        for (int c = 0; c < p.e; c += INPUTS_CHANNELS, cursor.next()) {
            cursor.wait_empty(ring);
            barrier_expect(cursor.full_bar(ring), S::R_SLABS * 64 * 128);
            for (int slab = 0; slab < S::R_SLABS; slab++)
                tma_load(cursor.tile(ring) + slab * 64 * 128, &maps.w_dt, cursor.full_bar(ring), slab * 64, 0, c, 0);
        }
    }
}

// A warpgroup: 64 tokens of each tile. Places in shared memory are in bytes from its start.
template <int R> struct InputsConsumer {
    using S = InputsShared<R>;
    const InputsMaps& maps;
    const InputsArgs& p;
    const Ring<S::STAGES>& ring;
    int group;
    Cursor<S::STAGES> now{}, last{};         // the stage that is read; that of the product which may still run
    int b = 0, t = 0;                        // of the first token
    int written = 0;                         // buffers so far: two take turns

    __device__ bool leader() const { return threadIdx.x % WARPGROUP == 0; }
    __device__ void sync() const { named_sync(1 + group, WARPGROUP); }
    __device__ int buffer(int i) const { return S::BUFFER + (group * S::BUFFERS + i) * INPUTS_BUFFER; }
    __device__ void store(const CUtensorMap& map, int from, int c) const { tma_store(&map, ring.tiles + from, c, 0, t, b); }
    // What the warpgroup wrote into a buffer is there for TMA and wgmma. What it stored before has been read: the other buffer is free.
    __device__ void publish() const {
        fence_async();
        if (leader()) tma_store_wait();
        sync();
    }

    // u of 64 channels from c on. A warp: 16 tokens, which are rows 3 .. 18 from its first row of x on
    __device__ void convolve(int to, int c) const {
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % 4;
        unsigned char *stage = sm90_shared + now.stage * S::STAGE, *in = stage + S::X + (group * 64 + warp * 16) * 128;
        const float4 w0 = ((const float4*)(stage + S::TAPS))[2 * lane], w1 = ((const float4*)(stage + S::TAPS))[2 * lane + 1];
        const float2 bias = ((const float2*)(stage + S::BIASES))[lane];
        const auto place = [&](int row) { return row * 128 + ((lane / 4) ^ row % 8) * 16 + lane % 4 * 4; };     // of the lane's channels
        if (t == 0 && warp == 0 && p.halo) {                             // the rows before the sequence: each lane what it will read
            const bf16* from = p.halo + (int64_t)b * CONV_HALO * p.e + c + 2 * lane;
            for (int i = 0; i < CONV_HALO; i++) *(uint32_t*)(in + place(i)) = *(const uint32_t*)(from + (int64_t)i * p.e);
        }
        // All rows are read before the first is written: the compiler, to whom both may be the same, would work on one after the other
        uint32_t x[16 + CONV_HALO], u[16];
#pragma unroll
        for (int i = 0; i < 16 + CONV_HALO; i++) x[i] = *(const uint32_t*)(in + place(i));
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const float2 x0 = floats(x[i]), x1 = floats(x[i + 1]), x2 = floats(x[i + 2]), x3 = floats(x[i + 3]);
            const float s0 = fmaf(w0.w, x3.x, fmaf(w0.z, x2.x, fmaf(w0.y, x1.x, fmaf(w0.x, x0.x, bias.x))));
            const float s1 = fmaf(w1.w, x3.y, fmaf(w1.z, x2.y, fmaf(w1.y, x1.y, fmaf(w1.x, x0.y, bias.y))));
            u[i] = pack(s0 * sigmoid<bf16>(s0), s1 * sigmoid<bf16>(s1));
        }
#pragma unroll
        for (int i = 0; i < 16; i++) *(uint32_t*)(sm90_shared + to + warp * 16 * 128 + place(i)) = u[i];
    }
    // x_dbl += u w_x^T over 64 channels, under way: u in a buffer, w_x in the stage
    __device__ void multiply_u(float (&x_dbl)[32 * S::BUFFERS], int u) const {
        const uint64_t left = descriptor(ring.tiles + u, 0), right = descriptor(now.tile(ring), 0);
        hold(x_dbl);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; k++) {
            wgmma_rows(*reinterpret_cast<float (*)[64]>(x_dbl), left + 2 * k, right + 2 * k);
            if constexpr (S::BUFFERS == 3)                               // columns 128 ..
                wgmma_rows(*reinterpret_cast<float (*)[32]>(x_dbl + 64), left + 2 * k, right + 128 * 128 / 16 + 2 * k);
        }
        wgmma_commit();
        hold(x_dbl);
    }
    __device__ void finish_product(float (&x_dbl)[32 * S::BUFFERS]) {
        wgmma_wait<0>();
        hold(x_dbl);
        last.release_lane(ring), last.next();
    }
    __device__ void make_u(float (&x_dbl)[32 * S::BUFFERS]) {
        for (int c = 0; c < p.e; c += INPUTS_CHANNELS, now.next()) {
            const int u = buffer(written++ % 2);
            now.wait_full(ring);
            convolve(u, c);
            if (c > 0) finish_product(x_dbl);                            // before all meet: then no warp writes where another's product still reads
            publish();
            multiply_u(x_dbl, u);
            if (leader()) store(maps.u, u, c), tma_store_commit();
        }
        finish_product(x_dbl);
    }
    __device__ void store_x_dbl(const float (&x_dbl)[32 * S::BUFFERS]) const {       // takes all buffers
        publish();
        stage_rows<64>(sm90_shared + buffer(0), x_dbl, {1.f, 1.f});
        publish();
        if (leader()) {
            for (int i = 0; i < S::BUFFERS; i++) store(maps.x_dbl, buffer(i), i * 64);
            tma_store_commit();
        }
        publish();
    }
    // dt (64 x 64) = low w_dt^T, under way; low: x_dbl[:, :R]
    __device__ void multiply(float (&dt)[32], uint32_t (&low)[R / 16][4]) {
        now.wait_full(ring);
        const uint64_t right = descriptor(now.tile(ring), 0);
        hold(low);
        wgmma_fence();
        wgmma_rows_first(dt, low[0], right);
#pragma unroll
        for (int k = 1; k < R / 16; k++) wgmma_rows(dt, low[k], right + (k / 4 * 64 * 128 + k % 4 * 32) / 16);
        wgmma_commit();
        hold(dt);
        now.next();
    }
    // dt's way to memory, when no more than PENDING later products are under way
    template <int PENDING> __device__ void finish(float (&dt)[32], int c) {
        wgmma_wait<PENDING>();
        hold(dt);
        last.release_lane(ring), last.next();
        const int to = buffer(written++ % 2);
        stage_rows<64>(sm90_shared + to, dt, {1.f, 1.f});
        publish();
        if (leader()) store(maps.dt, to, c), tma_store_commit();
    }
    __device__ void make_dt(uint32_t (&low)[R / 16][4]) {
        for (int c = 0; c < p.e; c += 2 * INPUTS_CHANNELS) {
            float dt[2][32];
            multiply(dt[0], low);
            multiply(dt[1], low);
            finish<1>(dt[0], c);
            finish<0>(dt[1], c + INPUTS_CHANNELS);
        }
    }
    __device__ void run() {
        for (int tile = blockIdx.x; tile < p.B * p.tiles; tile += gridDim.x) {
            b = tile / p.tiles, t = tile % p.tiles * INPUTS_ROWS + group * 64;
            float x_dbl[32 * S::BUFFERS] = {};
            make_u(x_dbl);
            store_x_dbl(x_dbl);
            uint32_t low[R / 16][4];
            pack_operand(low, *reinterpret_cast<float (*)[R / 2]>(x_dbl));
            make_dt(low);
        }
        if (leader()) tma_store_wait();
    }
};
#endif // SAMBA_SM90A_CODE

template <int R> __global__ void __launch_bounds__(INPUTS_THREADS, 1)
scan_inputs_kernel(const __grid_constant__ InputsMaps maps, const InputsArgs p) {
#ifdef SAMBA_SM90A_CODE
    using S = InputsShared<R>;
    const uint32_t shared = shared_address(sm90_shared);
    const Ring<S::STAGES> ring{shared, shared + S::BARRIERS, S::STAGE};
    if (threadIdx.x == 0) ring.init(2 * WARPGROUP), barrier_init_done();
    __syncthreads();
    const int group = __shfl_sync(0xffffffffu, threadIdx.x / WARPGROUP, 0);              // the compiler must see that it is one for a warp
    if (group < 2) InputsConsumer<R>{maps, p, ring, group}.run();
    else if (threadIdx.x % WARP == 0) inputs_produce<R>(ring, maps, p);
#endif
}

// (B, T, columns) in rows of ld as boxes of `rows` x 64. T is a dimension of its own: rows before and past a sequence read as zeros.
inline CUtensorMap sequences_map(const bf16* p, int B, int64_t T, int columns, int64_t ld, int rows) {
    return box_map("scan inputs", p, columns, {1, T, B}, {ld, ld, T * ld}, {1, rows, 1});
}

// Does the kernel take these sizes and addresses (null: not given) on this GPU?
inline bool scan_inputs_takes(std::initializer_list<const void*> arrays, int64_t ldx, int B, int64_t T, int e, int R, int N) {
    const bool aligned = std::all_of(arrays.begin(), arrays.end(), [](const void* p) { return (uintptr_t)p % 16 == 0; });
    const bool sizes = N == INPUTS_STATES && (R == 64 || R == 96 || R == 128 || R == 144) && e % (2 * INPUTS_CHANNELS) == 0 && ldx % 8 == 0;
    return aligned && sizes && B * T < ((int64_t)1 << 31) - INPUTS_ROWS * (int64_t)B && usable();
}
// And is it faster than the separate operations? A round of blocks takes as long with few as with all, so the last must be full enough: on an
// H100 96 tiles (0.73 full) take 0.105 ms for 0.129, 144 (0.55) 0.208 for 0.191.
inline bool scan_inputs_fill(int B, int64_t T) {
    const int64_t tiles = B * ceil_div(T, INPUTS_ROWS), processors = multiprocessors();
    return tiles >= 0.7 * (double)round_up(tiles, processors);
}

template <int R> void launch_scan_inputs(const InputsMaps& maps, const InputsArgs& args, Stream stream) {
    constexpr int BYTES = InputsShared<R>::BYTES;
    CUDA_CHECK(cudaFuncSetAttribute(scan_inputs_kernel<R>, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES));
    scan_inputs_kernel<R><<<std::min(multiprocessors(), args.B * args.tiles), INPUTS_THREADS, BYTES, stream>>>(maps, args);
    LAUNCH_CHECK();
}

inline void scan_inputs(bf16* u /*(B,T,e)*/, bf16* x_dbl /*(B,T,C)*/, bf16* dt /*(B,T,e)*/, const bf16* x /*(B,T,e), row stride ldx*/, int64_t ldx,
                        const bf16* halo /*(B,3,e) or null*/, const float* w /*(e,4)*/, const float* b /*(e)*/, const bf16* w_x /*(C,e)*/,
                        const bf16* w_dt /*(e,R)*/, int B, int64_t T, int e, int R, Stream stream) {
    const int C = R + 2 * INPUTS_STATES;
    const InputsMaps maps{.x = sequences_map(x, B, T, e, ldx, INPUTS_X_ROWS), .u = sequences_map(u, B, T, e, e, 64),
                          .x_dbl = sequences_map(x_dbl, B, T, C, C, 64), .dt = sequences_map(dt, B, T, e, e, 64),
                          .w_x = sequences_map(w_x, 1, C, e, e, (int)round_up(C, 64)), .w_dt = sequences_map(w_dt, 1, e, R, R, 64)};
    const InputsArgs args{halo, w, b, B, e, (int)ceil_div(T, INPUTS_ROWS)};
    switch (R) {
    case 64: return launch_scan_inputs<64>(maps, args, stream);
    case 96: return launch_scan_inputs<96>(maps, args, stream);
    case 128: return launch_scan_inputs<128>(maps, args, stream);
    case 144: return launch_scan_inputs<144>(maps, args, stream);
    default: fail("scan inputs: no kernel for R %d", R);
    }
}

} // namespace gpu::sm90
