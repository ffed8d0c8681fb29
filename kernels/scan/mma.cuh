// Selective scan in bf16 with 16 states, the case that training runs in. The sums and the outer products of the recurrence are small
// matrices, so they go to the tensor cores, and what is left to the ordinary pipes is the decay itself:
//   a_tn = ex2(dt_t A_n log2 e)                    1 multiplication, 1 special function
//   h_t  = a_t h_(t-1) + (dt u)_t B_t'             1 multiplication; the outer product is added by mma.m16n8k8
//   y_t  = h_t C_t                                 mma.m16n8k16 on h_t as bf16
// A warp is 16 channels (rows of the matrices) of all 16 states. Lane (g = lane / 4, q = lane % 4) keeps, in the layout of an mma accumulator,
// channels 2g and 2g + 1 and states 4q to 4q + 3: the order of rows and columns is ours to choose, and this one makes its 4 states neighbours.
// dt u is split in two bf16 numbers, high and low, in the two k places of a lane, so the product with B, which is bf16 already, has 16 bits.
// All four lanes q hold the same two numbers, and a quarter of B: the sum over their eight k places is the product.
//
// A block is 192 channels of one sequence and has a multiprocessor to itself: twelve warps walk through time ("scan warps") and others do what does
// not depend on the state ("row warps": loads, softplus, gate, stores), a tile of 8 steps ahead of the scan warps and a tile behind. Two stages of
// shared memory pass between them.
//
// Here are the pieces of both directions; scan/mma_forward.cuh and scan/mma_backward.cuh are the kernels.
#pragma once
#include "common.cuh"

namespace gpu::scan_mma {

using bf16 = __nv_bfloat16;
constexpr int TILE = 8;                                               // steps a tile; also steps between saved states
constexpr int GROUP = 16, SCAN_WARPS = 12, ROW_WARPS = TILE;          // channels a scan warp
constexpr int CH = GROUP * SCAN_WARPS, SCAN_THREADS = SCAN_WARPS * WARP, ROW_THREADS = ROW_WARPS * WARP, THREADS = SCAN_THREADS + ROW_THREADS;
constexpr int PAIRS = CH / (2 * WARP);                                // a row thread has 3 pairs of neighbouring channels of a step

__device__ inline uint32_t pack(float low, float high) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
__device__ inline float low(uint32_t v) { return __uint_as_float(v << 16); }
__device__ inline float high(uint32_t v) { return __uint_as_float(v & 0xffff0000u); }
// x as two bf16 numbers: x cut off, and the rest
__device__ inline uint32_t split(float x) {
    const float cut = high(__float_as_uint(x));
    return pack(cut, x - cut);
}
// Two numbers as two bf16 numbers each: rounded, so that the first is of use alone, and the rest
__device__ inline uint2 split(float x, float y) {
    const uint32_t rounded = pack(x, y);
    return make_uint2(pack(low(rounded), x - low(rounded)), pack(high(rounded), y - high(rounded)));
}
// c (16 x 8) += a (16 x 8) b (8 x 8)
__device__ inline void mma8(float (&c)[4], const uint32_t (&a)[2], uint32_t b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(b));
}
// c (16 x 8) += a (16 x 16) b (16 x 8)
__device__ inline void mma16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// c (16 x 8) += a (16 x 8) b (8 x 8), of floats cut to 10 bits of mantissa
__device__ inline void mma8_tf32(float (&c)[4], const float (&a)[4], float b0, float b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
          "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}
__device__ inline uint32_t transpose(uint32_t m) {                   // of an 8 x 8 matrix of bf16 spread over the warp
    uint32_t r;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(m));
    return r;
}
// Operand A with rows and k exchanged: rows are states then, k the channels
__device__ inline void transpose(uint32_t (&to)[4], const uint32_t (&a)[4]) {
    to[0] = transpose(a[0]), to[1] = transpose(a[2]), to[2] = transpose(a[1]), to[3] = transpose(a[3]);
}
// Where one kind of warps waits for all warps of the other kind. Turn k of a gate opens when `warps` have arrived k + 1 times. Each lane arrives
// for itself: one for its warp after __syncwarp() would do, but compute-sanitizer's racecheck sees the order of the arriving lane only.
struct Gate {
    uint64_t barrier;
    __device__ uint32_t address() { return (uint32_t)__cvta_generic_to_shared(&barrier); }
    __device__ void init(int warps) { asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address()), "r"(warps * WARP) : "memory"); }
    __device__ void arrive() { asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(address()) : "memory"); }
    __device__ bool look(uint32_t turn) {
        uint32_t open;
        asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(open) : "r"(address()), "r"(turn & 1) : "memory");
        return open;
    }
    __device__ bool test(uint32_t turn) {                             // may wait a little
#if __CUDA_ARCH__ >= 900
        uint32_t open;
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(open) : "r"(address()), "r"(turn & 1) : "memory");
        return open;
#else
        return look(turn);
#endif
    }
    __device__ void wait(uint32_t turn) {
        while (!test(turn)) {}
    }
    // Where there is work to do before the gate is passed: the compiler moves its first instruction up, and this one does not hold the warp there
    __device__ void look_and_wait(uint32_t turn) {
        if (!look(turn)) wait(turn);
    }
};
// On Hopper the row warps hand registers to the scan warps.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define SCAN_MMA_REGISTERS(change, count) asm volatile("setmaxnreg." change ".sync.aligned.u32 " count ";")
#else
#define SCAN_MMA_REGISTERS(change, count)
#endif

// Shared memory to zeros, by all threads of the block
template <class T> __device__ inline void clear_shared(T& v) {
    for (int i = threadIdx.x; i < (int)(sizeof(T) / 4); i += blockDim.x) ((uint32_t*)&v)[i] = 0u;
}
template <class Stage> struct Shared {
    Stage stages[2];
    typename Stage::Input inputs;
    float skip_weight[CH], bias[CH];                                  // D and dt_bias of the block's channels
    Gate full[2], done[2];                                            // of the stages
    // By all threads, before anything else
    __device__ void init(const float* D, const float* dt_bias, int e) {
        if (threadIdx.x < 2) full[threadIdx.x].init(ROW_WARPS), done[threadIdx.x].init(SCAN_WARPS);
        __syncthreads();                                              // for racecheck, which takes a barrier's first write for one to any word
        stages[0].clear(), stages[1].clear();
        for (int c = threadIdx.x; c < CH; c += THREADS) {
            const int channel = blockIdx.x * CH + c;
            skip_weight[c] = channel < e ? D[channel] : 0.f;
            bias[c] = channel < e ? dt_bias[channel] : 0.f;
        }
        __syncthreads();
    }
};

__device__ inline bool is_scan() { return threadIdx.x < SCAN_THREADS; }

// A lane's part of the states of 16 channels, v[j][k]: channel 2g + k / 2, state 4q + 2j + k % 2
using States = float[2][4];

// from: channel 2g's 4 states of an array (.., stride) of floats; channels past `live` of the two are zeros
__device__ inline void load_states(States& v, const float* from, int64_t stride, int live) {
#pragma unroll
    for (int c = 0; c < 2; c++) {
        const float4 x = c < live ? *(const float4*)(from + c * stride) : make_float4(0.f, 0.f, 0.f, 0.f);
        v[0][2 * c] = x.x, v[0][2 * c + 1] = x.y, v[1][2 * c] = x.z, v[1][2 * c + 1] = x.w;
    }
}
__device__ inline void store_states(float* to, const States& v, int64_t stride, int live) {
#pragma unroll
    for (int c = 0; c < 2; c++)
        if (c < live) *(float4*)(to + c * stride) = make_float4(v[0][2 * c], v[0][2 * c + 1], v[1][2 * c], v[1][2 * c + 1]);
}
// The lane's states as operand A of mma16: rows are channels, k the states
__device__ inline void pack_states(uint32_t (&a)[4], const States& v) {
    a[0] = pack(v[0][0], v[0][1]), a[1] = pack(v[0][2], v[0][3]), a[2] = pack(v[1][0], v[1][1]), a[3] = pack(v[1][2], v[1][3]);
}
__device__ inline void load_decay_rates(States& A2, const float* A_log, int live) {
    load_states(A2, A_log, 16, live);
#pragma unroll
    for (int i = 0; i < 8; i++) A2[i / 4][i % 4] = i % 4 / 2 < live ? -expf(A2[i / 4][i % 4]) * LOG2E : 0.f;
}
// v *= a, with a = ex2(dt A2) of the step: dt of channels 2g and 2g + 1
__device__ inline void decay(States& v, float2 dt, const States& A2) {
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
        for (int k = 0; k < 4; k++) v[j][k] *= exp2_fast((k < 2 ? dt.x : dt.y) * A2[j][k]);
}
// Saved states of channels 2g and 2g + 1 as bf16: 8 bytes each, 16 states a channel
__device__ inline void store_saved(bf16* to, const uint32_t (&a)[4], int live) {
    if (live > 0) *(uint2*)to = make_uint2(a[0], a[2]);
    if (live > 1) *(uint2*)(to + 16) = make_uint2(a[1], a[3]);
}

// What a row thread has of every tile: of one step (`row`) the pairs `lane`, `lane` + 32 and `lane` + 64 of the block's neighbouring channels
struct Row {
    int thread, lane, row;
    int channel, live;                                                // the first channel, of the array; channels from it to the array's end
    __device__ Row(int thread_, int e) {
        thread = thread_ - SCAN_THREADS, lane = thread % WARP, row = thread / WARP, channel = blockIdx.x * CH + 2 * lane, live = e - channel;
    }
};
constexpr int STRIDE = 2 * WARP;                                      // channels from pair to pair

template <bool ALL> __device__ inline void store2(bf16* p, int live, float2 x) {
    if (ALL) {
        *(uint32_t*)p = pack(x.x, x.y);
    } else {
        if (live > 0) p[0] = from_float<bf16>(x.x);
        if (live > 1) p[1] = from_float<bf16>(x.y);
    }
}

// The row threads' inputs on their way: 4 tiles of shared memory, each thread's words its own, B and C each warp's. ALL: all channels of the
// block are within the arrays and pairs of them may be moved at once.
template <int ARRAYS> struct Inputs {
    uint32_t words[4][ARRAYS][PAIRS][ROW_THREADS], bc[4][TILE][16];
    // Tile i, the thread's step `at` of (B,T); a step past the end is zeros. `next` of the four: nothing to wait for if there is no tile.
    template <bool ALL> __device__ void fetch(int i, const bf16* const (&from)[ARRAYS], const bf16* bc_from, const Row& mine, bool live) {
        const int slot = i & 3;
#pragma unroll
        for (int a = 0; a < ARRAYS; a++)
#pragma unroll
            for (int k = 0; k < PAIRS; k++) {
                const bf16* p = from[a] + k * STRIDE;
                uint32_t* to = &words[slot][a][k][mine.thread];
                if (ALL) copy_async<4>(to, p, live);
                else *to = (live && mine.live > k * STRIDE ? __bfloat16_as_ushort(p[0]) : 0u)
                         | (live && mine.live > k * STRIDE + 1 ? (uint32_t)__bfloat16_as_ushort(p[1]) << 16 : 0u);
            }
        if (mine.lane < 16) {
            const bf16* p = bc_from + 2 * mine.lane;
            if (ALL) copy_async<4>(&bc[slot][mine.row][mine.lane], p, live);
            else bc[slot][mine.row][mine.lane] = live ? __bfloat16_as_ushort(p[0]) | (uint32_t)__bfloat16_as_ushort(p[1]) << 16 : 0u;
        }
    }
    __device__ uint32_t& word(int i, int array, int k, const Row& mine) { return words[i & 3][array][k][mine.thread]; }
    __device__ bf16 state_value(int i, const Row& mine) const { return ((const bf16*)bc[i & 3][mine.row])[mine.lane]; }   // of B | C
};
// As operand B of mma8: word 2g + j is a quarter of the value of state column g of tile j, in both k places
__device__ inline uint32_t quarter(float x) { return pack(0.25f * x, 0.25f * x); }
__device__ inline void store_quarters(uint32_t (&row)[16], int n, bf16 v) { row[n / 4 * 4 + n % 2 * 2 + n / 2 % 2] = quarter(to_float(v)); }

// As operand B of mma16, the column of a step t and zeros beside it: lane g reads row 7t + 7 + g, which is row 8t + 7, where the step's
// values are, if g = t. The others stay zeros.
using Diagonal = bf16[8 * TILE][16];
__device__ constexpr int diagonal_row(int t) { return 8 * t + 7; }
__device__ inline uint2 diagonal_column(const Diagonal& d, int t, int g, int q) { return *(const uint2*)&d[diagonal_row(t) - t + g][4 * q]; }

// What the scan warps need of channels c and c + 1 at a step: dt, dt, dt u split, dt u split
__device__ inline float4 make_pair(float2 dt, uint32_t u) {
    const uint2 input = split(dt.x * low(u), dt.y * high(u));
    return make_float4(dt.x, dt.y, __uint_as_float(input.x), __uint_as_float(input.y));
}
// Past the end there is no decay and no input; before the start of a document there is nothing
__device__ inline void edge(float4& pair, bool past) {
    if (past) pair = make_float4(0.f, 0.f, 0.f, 0.f);
    else pair.x = pair.y = SCAN_CUT;
}

// Accumulator (rows: 16 of something, columns: 8 steps) to two words of each step's, which are `stride` floats apart
__device__ inline void store_steps(float* to, int stride, const float (&sum)[4]) {
    to += threadIdx.x % 4 * 2 * stride;
    *(float2*)to = make_float2(sum[0], sum[2]);
    *(float2*)(to + stride) = make_float2(sum[1], sum[3]);
}
// Column t of 8 from another accumulator: four of the eight columns that a product makes are in no one's way
__device__ inline void take_column(float (&to)[4], const float (&from)[4], int t) {
    if ((int)threadIdx.x % 4 == t / 2) to[t % 2] = from[t % 2], to[2 + t % 2] = from[2 + t % 2];
}

} // namespace gpu::scan_mma
