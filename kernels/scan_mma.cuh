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
#pragma once
#include "scan_common.cuh"

namespace gpu::scan_mma {

using bf16 = __nv_bfloat16;
constexpr int TILE = 8;                                               // steps a tile; also steps between saved states
constexpr int GROUP = 16, SCAN_WARPS = 12, ROW_WARPS = TILE;          // channels a scan warp
constexpr int CH = GROUP * SCAN_WARPS, SCAN_THREADS = SCAN_WARPS * WARP, ROW_THREADS = ROW_WARPS * WARP, THREADS = SCAN_THREADS + ROW_THREADS;
constexpr int PAIRS = CH / (2 * WARP);                                // a row thread has 3 pairs of neighbouring channels of a step

// ---------------------------------------------------------------------------------------------------------------------
// Pieces of both directions

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
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
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
    int thread, lane, row, channel, live;                             // channel: the first one, of the array; live: channels from it to the array's end
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
                else *to = (live && mine.live > k * STRIDE ? __bfloat16_as_ushort(p[0]) : 0u) | (live && mine.live > k * STRIDE + 1 ? (uint32_t)__bfloat16_as_ushort(p[1]) << 16 : 0u);
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

// ---------------------------------------------------------------------------------------------------------------------
// Forward. Grid (channel blocks, B, segments). h_first (B,S,e,h_stride), or null for zeros.
// Per (t,c): 8 bytes and 4 of saved states; 20 special functions. B 8, T 4096, d_inner 3072 on an H200: 0.698 ms, 66% of the bound of the special
// functions. Twelve row warps with four channels a thread, as here, took 0.703 ms where eight with six took 0.736.

// What both forward kernels' blocks have between row warps and scan warps. S: the kernel's sizes, and its Stage. Row warps take the tiles in turns
// of GROUPS; each group has two stages for its tiles between it and the scan warps, and SLOTS for those on their way from memory and these.
template <class S> struct ForwardBlock {
    static constexpr int QUADS = S::CHANNELS / 4, ROW_THREADS = S::STEPS * QUADS, ROW_WARPS = ROW_THREADS / WARP;   // a thread: 4 channels of a step
    static constexpr int STAGES = 2 * S::GROUPS, RING = S::GROUPS * S::SLOTS, THREADS = (S::SCAN_WARPS + S::GROUPS * ROW_WARPS) * WARP;
    static_assert(ROW_THREADS % WARP == 0 && S::SCAN_WARPS % 4 == 0 && S::GROUPS * ROW_WARPS % 4 == 0);
    typename S::Stage stages[STAGES];                                 // tile i: i % STAGES
    uint2 words[RING][3][ROW_THREADS];                                // u, dt_raw, z: each row thread's own. Tile i: i % RING
    bf16 bc[RING][S::STEPS][32];                                      // B | C
    Gate full[STAGES], done[STAGES];
    __device__ void init(int scan_warps_of_tile = S::SCAN_WARPS) {
        if (threadIdx.x < STAGES) full[threadIdx.x].init(ROW_WARPS), done[threadIdx.x].init(scan_warps_of_tile);
        __syncthreads();                                              // for racecheck, which takes a barrier's first write for one to any word
    }
};
// To be kept in its register: the compiler would make it again for every use
__device__ inline int kept(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// A row thread of a forward kernel has four neighbouring channels at a step of every GROUPS-th tile, and copies words of B | C. i: the group's i-th
// tile. ALL: all channels of the block are within the arrays and four of them may be moved at once.
template <class S, bool ALL> struct RowsForward {
    using Block = ForwardBlock<S>;
    static constexpr int NEXT = S::GROUPS * S::STEPS, CHUNKS = S::STEPS * 8;      // steps from tile to tile; fours of B | C of a tile
    Block& s;
    const ScanInput<bf16>& p;
    const int group, thread, row, column, live;                       // live: channels from the thread's to the array's end
    int left_fetch, left_prepare, left_finish;                        // steps from the thread's one of the tile that is fetched (...) next to the end
    const bf16 *from[3], *bc;                                         // of the tile that `fetch` fetches next
    bf16* out;                                                        // of the tile that `finish` finishes next
    int64_t start;                                                    // the thread's step, of (B,T), of the tile that `prepare` prepares next
    float bias[4], D[4];

    __device__ RowsForward(Block& s_, bf16* out_, const ScanInput<bf16>& p_, int row_warp, int64_t first_tile)
        : s(s_), p(p_), group(row_warp / Block::ROW_WARPS), thread(kept(row_warp % Block::ROW_WARPS * WARP + (int)threadIdx.x % WARP)),
          row(kept(thread / Block::QUADS)), column(kept(thread % Block::QUADS * 4)), live(p_.e - (int)blockIdx.x * S::CHANNELS - column) {
        const int64_t first = (first_tile + group) * S::STEPS, tile = blockIdx.y * p.T + first;
        const int channel = blockIdx.x * S::CHANNELS + column;
        start = tile + row;
        from[0] = p.u + start * p.e + channel, from[1] = p.dt_raw + start * p.e + channel, from[2] = p.z + start * p.ldz + channel;
        bc = p.bc + (tile + thread / 8) * p.ldbc + thread % 8 * 4, out = out_ + start * p.e + channel;
        left_fetch = left_prepare = left_finish = (int)min(p.T - first, (int64_t)1 << 30) - row;
#pragma unroll
        for (int k = 0; k < 4; k++) bias[k] = k < live ? p.dt_bias[channel + k] : 0.f, D[k] = k < live ? p.D[channel + k] : 0.f;
    }
    __device__ int stage(int i) const { return i % 2 * S::GROUPS + group; }
    __device__ int slot(int i) const { return i % S::SLOTS * S::GROUPS + group; }
    // Past the end: zeros
    __device__ void move(uint2* to, const bf16* at, bool here, int live) const {
        if (ALL) copy_async<8>(to, at, here);
        else *(Vec<bf16, 4>*)to = scan_load<false>(at, 0, here ? live : 0);
    }
    __device__ void fetch(int i, int count) {
        if (i < count) {
#pragma unroll
            for (int a = 0; a < 3; a++) {
                move(&s.words[slot(i)][a][thread], from[a], left_fetch > 0, live);
                from[a] += NEXT * (a == 2 ? p.ldz : (int64_t)p.e);
            }
#pragma unroll
            for (int w = 0; w < CHUNKS; w += Block::ROW_THREADS)
                if (w + Block::ROW_THREADS <= CHUNKS || w + thread < CHUNKS)
                    move((uint2*)s.bc[slot(i)] + w + thread, bc + w / 8 * p.ldbc, (w + thread) / 8 < left_fetch + row, 4);
            bc += NEXT * p.ldbc, left_fetch -= NEXT;
        }
        copy_async_commit();
    }
    __device__ void prepare(int i) {
        auto& to = s.stages[stage(i)];
        const uint2 raw = s.words[slot(i)][1][thread], us = s.words[slot(i)][0][thread];
        float dt[4];
        uint32_t input[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const uint32_t r = k < 2 ? raw.x : raw.y, u = k < 2 ? us.x : us.y;
            dt[k] = scan_softplus<bf16>((k % 2 ? high(r) : low(r)) + bias[k]);
            input[k] = split((k % 2 ? high(u) : low(u)) * dt[k]);
        }
        to.put(row, column, dt, input);
        // Past the end there is no decay, and no input as u is zero; before the start of a document there is nothing
        if (left_prepare <= 0 || (p.starts && p.starts[start])) to.put_dt(row, column, left_prepare <= 0 ? 0.f : SCAN_CUT);
#pragma unroll
        for (int w = 0; w < CHUNKS; w += Block::ROW_THREADS)
            if (w + Block::ROW_THREADS <= CHUNKS || w + thread < CHUNKS)
                to.put_bc((w + thread) / 8, thread % 8 * 4, ((const uint2*)s.bc[slot(i)])[w + thread]);
        start += NEXT, left_prepare -= NEXT;
        s.full[stage(i)].arrive();
    }
    __device__ void finish(int i) {
        if (left_finish > 0) {
            const uint2 us = s.words[slot(i)][0][thread], zs = s.words[slot(i)][2][thread];
            const float4 y = *(const float4*)&s.stages[stage(i)].y[row][column];
            float x[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const uint32_t u = k < 2 ? us.x : us.y, v = k < 2 ? zs.x : zs.y;
                const float z = k % 2 ? high(v) : low(v);
                x[k] = fmaf(D[k], k % 2 ? high(u) : low(u), x[k]) * z * sigmoid<bf16>(z);
            }
            scan_store<ALL>(out, 0, live, x);
        }
        out += NEXT * (int64_t)p.e, left_finish -= NEXT;
    }
    // Of `tiles` of the block. Prepared: one of the group's tiles ahead of the scan warps; on their way: SLOTS - 2 after it.
    __device__ void run(int tiles) {
        const int count = (tiles - group + S::GROUPS - 1) / S::GROUPS;
        for (int i = 0; i < S::SLOTS - 1; i++) fetch(i, count);
        copy_async_wait<S::SLOTS - 2>();                                    // tile 0 is here
        if (count > 0) prepare(0);
        for (int i = 0; i < count; i++) {
            copy_async_wait<S::SLOTS - 3>();                                // tile i + 1 is here
            if (i + 1 < count) prepare(i + 1);
            fetch(i + S::SLOTS - 1, count);
            s.done[stage(i)].wait((uint32_t)(i / 2));
            finish(i);
        }
    }
};
template <bool VEC, class S>
__device__ inline void rows_forward(ForwardBlock<S>& s, bf16* out, const ScanInput<bf16>& p, int64_t first_tile, int64_t count) {
    const int row_warp = threadIdx.x / WARP - S::SCAN_WARPS;
    if (VEC && (blockIdx.x + 1) * S::CHANNELS <= p.e) RowsForward<S, true>(s, out, p, row_warp, first_tile).run((int)count);
    else RowsForward<S, false>(s, out, p, row_warp, first_tile).run((int)count);
}

struct Wide {
    static constexpr int CHANNELS = CH, STEPS = TILE, GROUPS = 1, SLOTS = 4, SCAN_WARPS = scan_mma::SCAN_WARPS;
    struct Stage {                                                    // + 1, + 4: the lanes' words fall in different banks
        float4 pair[TILE][CH / 2 + 1];
        uint32_t b[TILE][16];                                         // quarters
        Diagonal c;
        float y[TILE][CH + 4];
        // dt and dt u split of four channels from c on at step t
        __device__ void put(int t, int c, const float (&dt)[4], const uint32_t (&input)[4]) {
#pragma unroll
            for (int k = 0; k < 2; k++)
                pair[t][c / 2 + k] = make_float4(dt[2 * k], dt[2 * k + 1], __uint_as_float(input[2 * k]), __uint_as_float(input[2 * k + 1]));
        }
        __device__ void put_dt(int t, int c, float dt) {
            for (int k = 0; k < 2; k++) pair[t][c / 2 + k].x = pair[t][c / 2 + k].y = dt;
        }
        // Four values from column n on of B | C at step t
        __device__ void put_bc(int t, int n, uint2 v) {
            if (n < 16) *(uint4*)&b[t][n] = make_uint4(quarter(low(v.x)), quarter(low(v.y)), quarter(high(v.x)), quarter(high(v.y)));
            else *(uint2*)&c[diagonal_row(t)][n - 16] = v;
        }
    };
};

__device__ inline void forward_tile(Wide::Stage& s, States& h, const States& A2, bf16* saved, int live) {
    const int lane = threadIdx.x % WARP, g = lane / 4, q = lane % 4, c = threadIdx.x / WARP * GROUP + 2 * g;
    uint32_t packed[4];
    if (saved) {
        pack_states(packed, h);
        store_saved(saved, packed, live);
    }
    float y[4] = {};                                                  // step t is column t
#pragma unroll
    for (int t = 0; t < TILE; t++) {
        const float4 pair = s.pair[t][c / 2];
        const uint2 B = *(const uint2*)&s.b[t][2 * g], C = diagonal_column(s.c, t, g, q);
        const uint32_t input[2] = {__float_as_uint(pair.z), __float_as_uint(pair.w)};
        decay(h, make_float2(pair.x, pair.y), A2);
        mma8(h[0], input, B.x);
        mma8(h[1], input, B.y);
        pack_states(packed, h);
        mma16(y, packed, C.x, C.y);
    }
    store_steps(&s.y[0][c], CH + 4, y);
}

__device__ inline void scan_forward(ForwardBlock<Wide>& s, bf16* saved, float* h_out, const float* h_first, int h_stride, const ScanInput<bf16>& p,
                                    int64_t segment, int64_t first_tile, int count) {
    const int lane = threadIdx.x % WARP, channel = blockIdx.x * CH + threadIdx.x / WARP * GROUP + lane / 4 * 2, n = lane % 4 * 4, live = p.e - channel;
    const int64_t tiles = (p.T + TILE - 1) / TILE;
    States h = {}, A2;
    load_decay_rates(A2, p.A_log + (int64_t)channel * 16 + n, live);
    if (h_first) load_states(h, h_first + (segment * p.e + channel) * h_stride + n, h_stride, live);
    if (saved) saved += ((blockIdx.y * tiles + first_tile) * p.e + channel) * 16 + n;
    for (int i = 0; i < count; i++) {
        s.full[i & 1].wait(i / 2);
        forward_tile(s.stages[i & 1], h, A2, saved, live);
        s.done[i & 1].arrive();
        if (saved) saved += (int64_t)p.e * 16;
    }
    if (h_out && first_tile + count == tiles) store_states(h_out + (blockIdx.y * (int64_t)p.e + channel) * 16 + n, h, 16, live);
}

template <bool VEC>
__global__ void __launch_bounds__(ForwardBlock<Wide>::THREADS, 1)
forward_kernel(bf16* out, bf16* saved, float* h_out, const float* h_first, int h_stride, ScanInput<bf16> p) {
    extern __shared__ float4 shared_floats[];
    ForwardBlock<Wide>& s = *(ForwardBlock<Wide>*)shared_floats;
    const int64_t segment = (int64_t)blockIdx.y * gridDim.z + blockIdx.z, tiles = (p.T + TILE - 1) / TILE;
    const int64_t first_tile = blockIdx.z * p.segment_tiles, count = min(p.segment_tiles, tiles - first_tile);
    s.init();
    for (auto& stage : s.stages) clear_shared(stage.c);
    __syncthreads();
    if (is_scan()) {
        SCAN_MMA_REGISTERS("inc", "104");
        scan_forward(s, saved, h_out, h_first, h_stride, p, segment, first_tile, count);
    } else {
        SCAN_MMA_REGISTERS("dec", "56");
        rows_forward<VEC>(s, out, p, first_tile, count);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward. Grid as forward. The scan warps remake the 8 states of a tile from the saved one, kept as bf16 pairs in registers, and go back:
//   lambda_t = dy_t C_t' + a_(t+1) lambda_(t+1)              the outer product by mma, as in the forward pass
//   d(dt u)_t = lambda_t B_t                                 by mma in tf32; step t is column t, here and below
//   dB_t = lambda_t' (dt u)_t     dC_t = h_t' dy_t           by mma on lambda and h as bf16
//   pull = a_t lambda_t h_(t-1)   d(dt)_t = sum_n A_n pull       dA_n = sum_t dt_t pull   one by one
// Per (t,c): 16 bytes, 4 of saved states, 1.3 of partial sums of dB and dC; 37 special functions.

struct BackwardInputs : Inputs<4> {                                   // u, dt_raw, z, dout
    bf16 saved[4][CH][16];                                            // the state before the tile
    // A row thread's 24 bytes of tile i; `from`: the tile's states of the block's channels, of which `live` are within the array
    template <bool ALL> __device__ void fetch_states(int i, const bf16* from, int live, int thread) {
        bf16* to = &saved[i & 3][0][0] + 4 * thread;
#pragma unroll
        for (int k = 0; k < CH * 4; k += ROW_THREADS) {
            const bool in = ALL || (k + thread) / 4 < live;
            copy_async<8>(to + 4 * k, from + (in ? 4 * thread + 4 * k : 0), in);
        }
    }
};

struct BackwardStage {
    using Input = BackwardInputs;
    struct Step {                                                     // 80 bytes more than a multiple of 128: steps' words fall in different banks
        float4 pair[CH / 2];
        uint2 dy[CH / 2];                                             // of channels c and c + 1: dy split
        float y[CH], dinput[CH], ddecay[CH];
        float4 gate[CH / 2];                                          // the row threads' own: silu(z) of channels c and c + 1, its derivatives
        float2 slope[CH / 2];                                         // and that of softplus
        uint2 c[WARP];                                                // C for outer_lambda
        uint32_t b4[16];                                              // quarters
        bf16 b[16];
        char apart[112];
    } steps[TILE];
    static constexpr int FLOATS = sizeof(Step) / sizeof(float);       // from step to step
    Diagonal c;
    static constexpr int PARTS = 36;                                  // apart, in words
    float dbc[SCAN_WARPS][TILE][PARTS];                               // dB | dC of a warp's channels: word 2g + j is state column g of tile j
    __device__ void clear() {
        clear_shared(c);
        for (Step& step : steps) clear_shared(step.c);
    }
};

// lambda is kept in the order in which an accumulator is operand A of the tf32 product as well, v[j][k]: channel 2g + k % 2, state 4q + 2j + k / 2.
// So rows g and g + 8 are states 2j and 2j + 1 and the columns have the channel's parity; to add dy C' with that, k places 2q and 2q + 1
// (dy's two halves) are for one parity, q % 2, and one row half, q / 2, and C has zeros where the column's parity is the other one.
__device__ inline void outer_lambda(States& lambda, uint32_t dy /*of channel 2g + q % 2*/, uint2 C, uint32_t first_rows /*all ones if q < 2*/) {
    const uint32_t a[2] = {dy & first_rows, dy & ~first_rows};
    mma8(lambda[0], a, C.x);
    mma8(lambda[1], a, C.y);
}
__device__ inline void store_outer(uint2 (&to)[WARP], int n, bf16 v) {
    const uint32_t twice = __bfloat16_as_ushort(v) * 0x10001u;
    const int lane = n / 4 * 8 + n % 2 * 2, j = n / 2 % 2;            // of parity 0; parity 1: lane + 5
    ((uint32_t*)&to[lane])[j] = twice, ((uint32_t*)&to[lane + 5])[j] = twice;
}
__device__ inline void pack_lambda(uint32_t (&a)[4], const States& v) {
    a[0] = pack(v[0][0], v[0][2]), a[1] = pack(v[0][1], v[0][3]), a[2] = pack(v[1][0], v[1][2]), a[3] = pack(v[1][1], v[1][3]);
}
// From the order of lambda to that of h and back
__device__ inline void exchange(States& v) {
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const float x = v[j][1];
        v[j][1] = v[j][2], v[j][2] = x;
    }
}

// Two bf16 numbers from the lower halves of two words
__device__ inline uint32_t lower_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }

// before[t]: h_(t-1), from before[0], as operand A. Leaves y and dC of the tile.
__device__ inline void remake_tile(BackwardStage& s, uint32_t (&before)[TILE][4], const States& A2) {
    const int lane = threadIdx.x % WARP, g = lane / 4, q = lane % 4, warp = threadIdx.x / WARP, c = warp * GROUP + 2 * g;
    const uint4 dys = *(const uint4*)&s.steps[g].dy[(warp * GROUP + 4 * q) / 2];    // channels 4q .. 4q + 3 are k = 2q, 2q + 8, 2q + 1, 2q + 9
    const uint32_t dy[2] = {lower_halves(dys.x, dys.z), lower_halves(dys.y, dys.w)};
    States h = {{low(before[0][0]), high(before[0][0]), low(before[0][1]), high(before[0][1])},
                {low(before[0][2]), high(before[0][2]), low(before[0][3]), high(before[0][3])}};
    float y[4] = {}, dC[4] = {};
#pragma unroll
    for (int t = 0; t < TILE; t++) {
        const float4 pair = s.steps[t].pair[c / 2];
        const uint2 B = *(const uint2*)&s.steps[t].b4[2 * g], C = diagonal_column(s.c, t, g, q);
        const uint32_t input[2] = {__float_as_uint(pair.z), __float_as_uint(pair.w)};
        decay(h, make_float2(pair.x, pair.y), A2);
        mma8(h[0], input, B.x);
        mma8(h[1], input, B.y);
        uint32_t now[4], turned[4];
        float column[4] = {};
        pack_states(now, h);
        mma16(y, now, C.x, C.y);
        transpose(turned, now);
        mma16(column, turned, dy[0], dy[1]);
        take_column(dC, column, t);
        if (t + 1 < TILE)
#pragma unroll
            for (int k = 0; k < 4; k++) before[t + 1][k] = now[k];
    }
    store_steps(&s.steps[0].y[c], s.FLOATS, y);
    store_steps(&s.dbc[warp][0][16 + 2 * g], s.PARTS, dC);
}

// carry, of the step after the tile, becomes a lambda of step t and gives the step's parts of dA and of d(dt), sums
__device__ inline void pull_back(States& carry, States& dA, float (&sums)[2], float2 dt, const uint32_t (&before)[4], const States& A2) {
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
        for (int k = 0; k < 4; k++) {                                 // in the order of h
            const uint32_t h = before[2 * j + k / 2];
            float& l = carry[j][k % 2 * 2 + k / 2];
            l *= exp2_fast((k < 2 ? dt.x : dt.y) * A2[j][k]);
            const float pull = l * (k % 2 ? high(h) : low(h));
            dA[j][k] = fmaf(k < 2 ? dt.x : dt.y, pull, dA[j][k]);
            sums[k / 2] = fmaf(A2[j][k], pull, sums[k / 2]);
        }
}
// carry: a lambda of the step after the tile, then of its first step
__device__ inline void reverse_tile(BackwardStage& s, const uint32_t (&before)[TILE][4], States& carry, States& dA, const States& A2) {
    const int lane = threadIdx.x % WARP, g = lane / 4, q = lane % 4, warp = threadIdx.x / WARP, c = warp * GROUP + 2 * g;
    const uint2 Bs = *(const uint2*)&s.steps[g].b[4 * q];             // of step g, states 4q .. 4q + 3
    const float4* mine = &s.steps[g].pair[(warp * GROUP + 4 * q) / 2];
    const float2 in0 = *(const float2*)&mine[0].z, in1 = *(const float2*)&mine[1].z;
    const uint32_t input[2] = {lower_halves(__float_as_uint(in0.x), __float_as_uint(in1.x)), lower_halves(__float_as_uint(in0.y), __float_as_uint(in1.y))};
    const uint32_t first_rows = q < 2 ? 0xffffffffu : 0u;
    float dinput[4] = {}, ddecay[4] = {}, dB[4] = {};
#pragma unroll
    for (int t2 = TILE - 2; t2 >= 0; t2 -= 2) {
        float sums[2][2] = {};                                        // sum_n A2 pull: steps t2, t2 + 1 of channels c, c + 1
#pragma unroll
        for (int i = 1; i >= 0; i--) {
            const int t = t2 + i;
            const auto& step = s.steps[t];
            outer_lambda(carry, ((const uint32_t*)step.dy)[c + q % 2], step.c[lane], first_rows);
            // k places q and q + 4 of tile j are states 4q + 2j and the next. In tf32: with bf16 the sum of d(dt) over time would be off by 2e-3
            float column[4] = {}, column_B[4] = {};
            mma8_tf32(column, carry[0], low(Bs.x), high(Bs.x));
            mma8_tf32(column, carry[1], low(Bs.y), high(Bs.y));
            take_column(dinput, column, t);
            uint32_t now[4], turned[4];
            pack_lambda(now, carry);
            transpose(turned, now);
            mma16(column_B, turned, input[0], input[1]);
            take_column(dB, column_B, t);
            pull_back(carry, dA, sums[i], *(const float2*)&step.pair[c / 2], before[t], A2);
        }
        const float a[4] = {sums[0][0], sums[0][1], sums[1][0], sums[1][1]};
        mma8_tf32(ddecay, a, g == t2 ? 1.f : 0.f, g == t2 + 1 ? 1.f : 0.f);
    }
    store_steps(&s.steps[0].dinput[c], s.FLOATS, dinput);
    store_steps(&s.steps[0].ddecay[c], s.FLOATS, ddecay);
    store_steps(&s.dbc[warp][0][2 * g], s.PARTS, dB);
}

// The scan warps' walk from the last tile of a segment to its first
__device__ inline void scan_back(Shared<BackwardStage>& s, const ScanGradients<bf16>& out, const ScanInput<bf16>& p, int64_t segment, int64_t first_tile, int count) {
    const int lane = threadIdx.x % WARP, channel = blockIdx.x * CH + threadIdx.x / WARP * GROUP + lane / 4 * 2, n = lane % 4 * 4, live = p.e - channel;
    const int64_t state_at = (segment * p.e + channel) * 16 + n;
    States carry = {}, dA = {}, A2;
    load_decay_rates(A2, p.A_log + (int64_t)channel * 16 + n, live);
    if (out.carry) load_states(carry, out.carry + state_at, 16, live);   // carry_stride is 16
    exchange(carry);
    for (int i = 0; i < count; i++) {
        s.full[i & 1].wait(i / 2);
        const bf16(*state)[16] = &s.inputs.saved[i & 3][threadIdx.x / WARP * GROUP + lane / 4 * 2];
        const uint2 even = *(const uint2*)&state[0][n], odd = *(const uint2*)&state[1][n];
        uint32_t before[TILE][4];
        before[0][0] = even.x, before[0][1] = odd.x, before[0][2] = even.y, before[0][3] = odd.y;
        remake_tile(s.stages[i & 1], before, A2);
        reverse_tile(s.stages[i & 1], before, carry, dA, A2);
        s.done[i & 1].arrive();
    }
    exchange(carry);
    if (out.dh_in && first_tile == 0) store_states(out.dh_in + ((int64_t)blockIdx.y * p.e + channel) * 16 + n, carry, 16, live);
#pragma unroll
    for (int i = 0; i < 8; i++) dA[i / 4][i % 4] *= A2[i / 4][i % 4] * SCAN_LN2;
    store_states(out.dA + state_at, dA, 16, live);
}

// softplus(x) and its derivative sigmoid(x). Above 20 softplus is x in fp32; below e^x = 0.01 the sum 1 + e^x would lose digits: a series.
__device__ inline float softplus_slope(float x, float& slope) {
    const float p = exp2_fast(fminf(x, 20.f) * LOG2E), sum = 1.f + p, log = scan_lg2(sum) * SCAN_LN2, series = p * (1.f - p * (0.5f - p * 0.33333333f));
    slope = p * reciprocal_fast(sum);
    return fmaxf(x, p < 1e-2f ? series : log);
}

// threadIdx.x, to be kept: the compiler would read it anew for every use, which takes long
__device__ inline int thread_index() {
    int i;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(i));
    return i;
}

// The row warps: tile i's rows to the stage (prepare), and what the scan warps leave there to the gradients (finish)
template <bool ALL> struct RowsBack {
    enum { U, DT, Z, DOUT };
    Shared<BackwardStage>& s;
    const ScanGradients<bf16>& out;
    const ScanInput<bf16>& p;
    const int64_t last_tile;                                          // of the segment, which comes first
    const Row mine;
    const bf16 *from[4], *bc, *saved;                                 // of the tile that `fetch` fetches next
    int64_t e_at, z_at, row_at;                                       // where the step that `finish` finishes is in (B,T,e), dz and (B,T)
    float2 dD[PAIRS] = {}, dbias[PAIRS] = {};

    __device__ RowsBack(Shared<BackwardStage>& s_, const ScanGradients<bf16>& out_, const ScanInput<bf16>& p_, int64_t last_tile_)
        : s(s_), out(out_), p(p_), last_tile(last_tile_), mine(thread_index(), p_.e) {
        row_at = blockIdx.y * p.T + step(0), e_at = row_at * p.e + mine.channel, z_at = row_at * out.lddz + mine.channel;
        from[U] = p.u + e_at, from[DT] = p.dt_raw + e_at, from[Z] = p.z + row_at * p.ldz + mine.channel, from[DOUT] = out.dout + e_at;
        bc = p.bc + row_at * p.ldbc;
        saved = out.saved + ((blockIdx.y * ((p.T + TILE - 1) / TILE) + last_tile) * p.e + blockIdx.x * CH) * 16;
    }
    __device__ int64_t step(int i) const { return (last_tile - i) * TILE + mine.row; }
    __device__ void fetch(int i, int count) {
        if (i < count) {
            s.inputs.template fetch<ALL>(i, from, bc, mine, step(i) < p.T);
            from[U] -= TILE * (int64_t)p.e, from[DT] -= TILE * (int64_t)p.e, from[Z] -= TILE * p.ldz, from[DOUT] -= TILE * (int64_t)p.e, bc -= TILE * p.ldbc;
            s.inputs.template fetch_states<ALL>(i, saved, p.e - (int)blockIdx.x * CH, mine.thread);
            saved -= (int64_t)p.e * 16;
        }
        copy_async_commit();
    }
    __device__ void prepare(int i) {
        BackwardStage& stage = s.stages[i & 1];
        BackwardStage::Step& to = stage.steps[mine.row];
#pragma unroll
        for (int k = 0; k < PAIRS; k++) prepare_pair(to, i, k);
        const bool past = step(i) >= p.T;                             // then dout is zeros
        if (past || p.is_start(blockIdx.y, step(i)))
            for (int k = 0; k < PAIRS; k++) {                         // finish needs dt: in place of what it does not need
                float4& pair = to.pair[mine.lane + k * WARP];
                s.inputs.word(i, DT, k, mine) = __float_as_uint(pair.x), s.inputs.word(i, Z, k, mine) = __float_as_uint(pair.y);
                edge(pair, past);
            }
        const bf16 v = s.inputs.state_value(i, mine);
        const int n = mine.lane % 16;
        if (mine.lane < 16) {
            store_quarters(to.b4, n, v);
            to.b[n] = v;
        } else {
            store_outer(to.c, n, v);
            stage.c[diagonal_row(mine.row)][n] = v;
        }
        s.full[i & 1].arrive();
    }
    __device__ void prepare_pair(BackwardStage::Step& to, int i, int k) {
        const int c2 = mine.lane + k * WARP;
        const uint32_t dts = s.inputs.word(i, DT, k, mine), zs = s.inputs.word(i, Z, k, mine), douts = s.inputs.word(i, DOUT, k, mine);
        const float2 z = make_float2(low(zs), high(zs)), gate = make_float2(sigmoid<bf16>(z.x), sigmoid<bf16>(z.y));
        const float2 silu = make_float2(z.x * gate.x, z.y * gate.y), bias = ((const float2*)s.bias)[c2];
        to.gate[c2] = make_float4(silu.x, silu.y, fmaf(silu.x, 1.f - gate.x, gate.x), fmaf(silu.y, 1.f - gate.y, gate.y));
        to.dy[c2] = split(low(douts) * silu.x, high(douts) * silu.y);
        float2 slope, dt;
        dt.x = softplus_slope(low(dts) + bias.x, slope.x), dt.y = softplus_slope(high(dts) + bias.y, slope.y);
        to.slope[c2] = slope;
        to.pair[c2] = make_pair(dt, s.inputs.word(i, U, k, mine));
    }
    __device__ void finish(int i) {
        const BackwardStage& stage = s.stages[i & 1];
        if (step(i) < p.T) {
            add_warps(stage);
            const bool start = p.is_start(blockIdx.y, step(i));
#pragma unroll
            for (int k = 0; k < PAIRS; k++) finish_pair(stage.steps[mine.row], i, k, start);
        }
        row_at -= TILE, e_at -= TILE * (int64_t)p.e, z_at -= TILE * out.lddz;
    }
    __device__ void finish_pair(const BackwardStage::Step& from, int i, int k, bool start) {
        const int c2 = mine.lane + k * WARP, live = mine.live - k * STRIDE;
        const uint32_t us = s.inputs.word(i, U, k, mine), douts = s.inputs.word(i, DOUT, k, mine);
        const float4 gate = from.gate[c2];
        const float2 D = ((const float2*)s.skip_weight)[c2], u = make_float2(low(us), high(us)), dout = make_float2(low(douts), high(douts));
        const float2 dy = make_float2(dout.x * gate.x, dout.y * gate.y);
        float2 y = ((const float2*)from.y)[c2];
        y.x = fmaf(D.x, u.x, y.x), y.y = fmaf(D.y, u.y, y.y);
        store2<ALL>(out.out + e_at + k * STRIDE, live, make_float2(y.x * gate.x, y.y * gate.y));
        store2<ALL>(out.dz + z_at + k * STRIDE, live, make_float2(dout.x * y.x * gate.z, dout.y * y.y * gate.w));
        float2 dt = *(const float2*)&from.pair[c2];
        if (start) dt = make_float2(__uint_as_float(s.inputs.word(i, DT, k, mine)), __uint_as_float(s.inputs.word(i, Z, k, mine)));
        const float2 dinput = ((const float2*)from.dinput)[c2], ddecay = ((const float2*)from.ddecay)[c2], slope = from.slope[c2];
        store2<ALL>(out.du + e_at + k * STRIDE, live, make_float2(fmaf(dinput.x, dt.x, D.x * dy.x), fmaf(dinput.y, dt.y, D.y * dy.y)));
        const float2 ddt = make_float2(fmaf(dinput.x, u.x, ddecay.x * SCAN_LN2) * slope.x, fmaf(dinput.y, u.y, ddecay.y * SCAN_LN2) * slope.y);
        store2<ALL>(out.ddt_raw + e_at + k * STRIDE, live, ddt);
        dD[k].x = fmaf(dy.x, u.x, dD[k].x), dD[k].y = fmaf(dy.y, u.y, dD[k].y);
        dbias[k].x += ddt.x, dbias[k].y += ddt.y;
    }
    // dB and dC of the step: the scan warps' sums, in order
    __device__ void add_warps(const BackwardStage& stage) const {
        const int w = mine.lane % 16, n = w / 4 * 4 + w % 2 * 2 + w / 2 % 2;
        float sum = stage.dbc[0][mine.row][mine.lane];
#pragma unroll
        for (int warp = 1; warp < SCAN_WARPS; warp++) sum += stage.dbc[warp][mine.row][mine.lane];
        out.dbc[((int64_t)blockIdx.x * gridDim.y * p.T + row_at) * 32 + mine.lane / 16 * 16 + n] = sum;
    }
    // dD and d(dt bias) of the block's channels: the sums of the eight rows, in order. The scan warps are done with the stages.
    __device__ void add_rows(float* to) {
        float4(*sums)[CH / 2] = (float4(*)[CH / 2])&s.stages[0];      // (8 rows, CH / 2)
        asm volatile("bar.sync 1, %0;" ::"n"(ROW_THREADS) : "memory");
#pragma unroll
        for (int k = 0; k < PAIRS; k++) sums[mine.row][mine.lane + k * WARP] = make_float4(dD[k].x, dbias[k].x, dD[k].y, dbias[k].y);
        asm volatile("bar.sync 1, %0;" ::"n"(ROW_THREADS) : "memory");
        const int c = mine.thread;
        if (c >= CH || (int)blockIdx.x * CH + c >= p.e) return;
        float2 sum = make_float2(0.f, 0.f);
        for (int r = 0; r < TILE; r++) {
            const float2 v = ((const float2*)sums[r])[c];
            sum.x += v.x, sum.y += v.y;
        }
        *(float2*)(to + c * 2) = sum;
    }
    __device__ void run(int64_t segment, int count) {
        for (int i = 0; i < 3; i++) fetch(i, count);
        copy_async_wait<2>();
        __syncwarp();
        prepare(0);
        for (int i = 0; i < count; i++) {
            copy_async_wait<1>();                                           // tile i + 1 is here
            __syncwarp();
            if (i + 1 < count) prepare(i + 1);
            fetch(i + 3, count);
            s.done[i & 1].wait(i / 2);
            finish(i);
        }
        add_rows(out.dD_dbias + (segment * p.e + blockIdx.x * CH) * 2);
    }
};

template <bool VEC>
__global__ void __launch_bounds__(THREADS, 1) backward_kernel(ScanGradients<bf16> out, ScanInput<bf16> p) {
    extern __shared__ float4 shared_floats[];
    Shared<BackwardStage>& s = *(Shared<BackwardStage>*)shared_floats;
    const int64_t segment = (int64_t)blockIdx.y * gridDim.z + blockIdx.z, tiles = (p.T + TILE - 1) / TILE;
    const int64_t first_tile = blockIdx.z * p.segment_tiles, count = min(p.segment_tiles, tiles - first_tile);
    s.init(p.D, p.dt_bias, p.e);
    if (is_scan()) {
        SCAN_MMA_REGISTERS("inc", "112");
        scan_back(s, out, p, segment, first_tile, count);
    } else {
        SCAN_MMA_REGISTERS("dec", "72");
        if (VEC && (blockIdx.x + 1) * CH <= p.e) RowsBack<true>(s, out, p, first_tile + count - 1).run(segment, count);
        else RowsBack<false>(s, out, p, first_tile + count - 1).run(segment, count);
    }
}

} // namespace gpu::scan_mma
