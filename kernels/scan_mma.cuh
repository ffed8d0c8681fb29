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
// A block is 192 channels of one sequence and has a multiprocessor to itself: twelve warps walk through time ("scan warps") and eight do what does
// not depend on the state ("row warps": loads, softplus, gate, stores), each for one step of every tile of 8, a tile ahead of the scan warps
// and a tile behind. Two stages of shared memory pass between them.
#pragma once
#include "scan_common.cuh"

#ifndef SCAN_FMA
#define SCAN_FMA false
#endif
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
// x as two bf16 numbers: x rounded, and the rest
__device__ inline uint32_t split(float x) {
    const float rounded = low(pack(x, 0.f));
    return pack(rounded, x - rounded);
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
// Where one kind of warps waits for all warps of the other kind. Turn k of a gate opens when `warps` have arrived k + 1 times.
struct Gate {
    uint64_t barrier;
    __device__ uint32_t address() { return (uint32_t)__cvta_generic_to_shared(&barrier); }
#ifdef SCAN_ALL_ARRIVE
    static constexpr int ARRIVALS = WARP;
#else
    static constexpr int ARRIVALS = 1;
#endif
    __device__ void init(int warps) { asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address()), "r"(warps * ARRIVALS) : "memory"); }
    __device__ void arrive() {                                        // by all lanes of a warp
        if (ARRIVALS == 1) __syncwarp();
        if (ARRIVALS > 1 || threadIdx.x % WARP == 0) asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(address()) : "memory");
    }
    __device__ void wait(uint32_t turn) {
        uint32_t open = 0;
        while (!open)
#if __CUDA_ARCH__ >= 900
            asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(open) : "r"(address()), "r"(turn & 1) : "memory");
#else
            asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(open) : "r"(address()), "r"(turn & 1) : "memory");
#endif
    }
};
template <class Stage> struct Shared {
    Stage stages[2];
    typename Stage::Input inputs;
    float skip_weight[CH], bias[CH];                                  // D and dt_bias of the block's channels
    Gate full[2], done[2];                                            // of the stages
    // By all threads, before anything else
    __device__ void init(const float* D, const float* dt_bias, int e) {
        for (int c = threadIdx.x; c < CH; c += THREADS) {
            const int channel = blockIdx.x * CH + c;
            skip_weight[c] = channel < e ? D[channel] : 0.f;
            bias[c] = channel < e ? dt_bias[channel] : 0.f;
        }
        if (threadIdx.x < 2) full[threadIdx.x].init(ROW_WARPS), done[threadIdx.x].init(SCAN_WARPS);
        __syncthreads();
    }
};

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
    for (int i = 0; i < 8; i++) A2[i / 4][i % 4] = i % 4 / 2 < live ? -expf(A2[i / 4][i % 4]) * SCAN_LOG2E : 0.f;
}
// v *= a, with a = ex2(dt A2) of the step: dt of channels 2g and 2g + 1
__device__ inline void decay(States& v, float2 dt, const States& A2) {
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
        for (int k = 0; k < 4; k++) v[j][k] *= scan_ex2((k < 2 ? dt.x : dt.y) * A2[j][k]);
}
// a (16 x 8) b (8 x 8)
__device__ inline void product8(float (&c)[4], const uint32_t (&a)[2], uint32_t b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%7,%7,%7};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(b), "f"(0.f));
}
// h = a h + (dt u) B of a step
template <bool FMA> __device__ inline void advance(States& h, float2 dt, const States& A2, const uint32_t (&input)[2], uint2 B) {
    if (FMA) {                                                        // the product does not wait for h
        float added[2][4];
        product8(added[0], input, B.x);
        product8(added[1], input, B.y);
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int k = 0; k < 4; k++) h[j][k] = fmaf(scan_ex2((k < 2 ? dt.x : dt.y) * A2[j][k]), h[j][k], added[j][k]);
    } else {
        decay(h, dt, A2);
        mma8(h[0], input, B.x);
        mma8(h[1], input, B.y);
    }
}
// Saved states of channels 2g and 2g + 1 as bf16: 8 bytes each, 16 states a channel
__device__ inline void store_saved(bf16* to, const uint32_t (&a)[4], int live) {
    if (live > 0) *(uint2*)to = make_uint2(a[0], a[2]);
    if (live > 1) *(uint2*)(to + 16) = make_uint2(a[1], a[3]);
}

// What a row thread has of every tile: of one step the channels `column` and the next one of the block, and those 64 and 128 further
struct Row {
    int row, column, channel, live;                                   // channel: of the array; live: channels from it to the array's end
    __device__ explicit Row(int e) { row = threadIdx.x / WARP - SCAN_WARPS, column = threadIdx.x % WARP * 2, channel = blockIdx.x * CH + column, live = e - channel; }
};
constexpr int STRIDE = 2 * WARP;                                      // from pair to pair

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
    template <bool ALL> __device__ void fetch(int64_t i, const bf16* const (&from)[ARRAYS], const bf16* bc_from, const Row& mine, bool live) {
        const int slot = (int)(i & 3), thread = threadIdx.x - SCAN_THREADS, lane = threadIdx.x % WARP;
#pragma unroll
        for (int a = 0; a < ARRAYS; a++)
#pragma unroll
            for (int k = 0; k < PAIRS; k++) {
                const bf16* p = from[a] + k * STRIDE;
                uint32_t* to = &words[slot][a][k][thread];
                if (ALL) copy_async<4>(to, p, live);
                else *to = (live && mine.live > k * STRIDE ? __bfloat16_as_ushort(p[0]) : 0u) | (live && mine.live > k * STRIDE + 1 ? (uint32_t)__bfloat16_as_ushort(p[1]) << 16 : 0u);
            }
        if (lane < 16) {
            if (ALL) copy_async<4>(&bc[slot][mine.row][lane], bc_from, live);
            else bc[slot][mine.row][lane] = live ? __bfloat16_as_ushort(bc_from[0]) | (uint32_t)__bfloat16_as_ushort(bc_from[1]) << 16 : 0u;
        }
    }
    __device__ uint32_t word(int64_t i, int array, int k) const { return words[i & 3][array][k][threadIdx.x - SCAN_THREADS]; }
    __device__ bf16 state_value(int64_t i, int row) const { return ((const bf16*)bc[i & 3][row])[threadIdx.x % WARP]; }   // of B | C
};
// As operand B of mma8: word 2g + j is a quarter of the value of state column g of tile j, in both k places
__device__ inline void store_quarters(uint32_t (&row)[16], bf16 v) {
    const int n = threadIdx.x % 16;
    const float x = 0.25f * to_float(v);
    row[n / 4 * 4 + n % 2 * 2 + n / 2 % 2] = pack(x, x);
}

// What the scan warps need of channels c and c + 1 at a step: dt, dt, dt u split, dt u split
using Pairs = float4[TILE][CH / 2 + 2];
__device__ inline float4 make_pair(float2 dt, uint32_t u) { return make_float4(dt.x, dt.y, __uint_as_float(split(dt.x * low(u))), __uint_as_float(split(dt.y * high(u)))); }
// Past the end there is no decay and no input; before the start of a document there is nothing
__device__ inline void edge(float4& pair, bool past) {
    if (past) pair = make_float4(0.f, 0.f, 0.f, 0.f);
    else pair.x = pair.y = SCAN_CUT;
}

// Accumulator (rows: 16 of something, columns: 8 steps) to words `first` and `first` + 1 of the steps' rows
template <int STRIDE> __device__ inline void store_steps(float (*to)[STRIDE], const float (&sum)[4], int first) {
    const int q = threadIdx.x % 4;
    *(float2*)&to[2 * q][first] = make_float2(sum[0], sum[2]);
    *(float2*)&to[2 * q + 1][first] = make_float2(sum[1], sum[3]);
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward, of whole sequences. Grid (channel blocks, B). h_in (B,e,16), or null for zeros.
// Per (t,c): 8 bytes and 4 of saved states; 20 special functions.

struct ForwardStage {                                                 // + 1, + 4: the lanes' words fall in different banks
    using Input = Inputs<3>;                                          // u, dt_raw, z
    Pairs pair;
    uint32_t b[TILE][16];                                             // quarters
    bf16 c[TILE][16];
    float y[TILE][CH + 4];
};

__device__ inline void forward_tile(ForwardStage& s, States& h, const States& A2, bf16* saved, int live) {
    const int lane = threadIdx.x % WARP, g = lane / 4, q = lane % 4, c = threadIdx.x / WARP * GROUP + 2 * g;
    uint32_t packed[4];
    if (saved) {
        pack_states(packed, h);
        store_saved(saved, packed, live);
    }
    const uint2 C = *(const uint2*)&s.c[g][4 * q];                    // step g is column g of y
    float y[4] = {};
#pragma unroll
    for (int t = 0; t < TILE; t++) {
        const float4 pair = s.pair[t][c / 2];
        const uint2 B = *(const uint2*)&s.b[t][2 * g];
        const uint32_t input[2] = {__float_as_uint(pair.z), __float_as_uint(pair.w)};
        advance<true>(h, make_float2(pair.x, pair.y), A2, input, B);
        pack_states(packed, h);
        mma16(y, packed, g == t ? C.x : 0u, g == t ? C.y : 0u);
    }
    store_steps(s.y, y, c);
}

__device__ inline void scan_forward(Shared<ForwardStage>& s, bf16* saved, float* h_out, const float* h_in, const ScanInput<bf16>& p, int64_t tiles) {
    const int lane = threadIdx.x % WARP, channel = blockIdx.x * CH + threadIdx.x / WARP * GROUP + lane / 4 * 2, n = lane % 4 * 4, live = p.e - channel;
    const int64_t state_at = (blockIdx.y * (int64_t)p.e + channel) * 16 + n;
    States h = {}, A2;
    load_decay_rates(A2, p.A_log + (int64_t)channel * 16 + n, live);
    if (h_in) load_states(h, h_in + state_at, 16, live);
    if (saved) saved += (blockIdx.y * tiles * p.e + channel) * 16 + n;
    for (int64_t i = 0; i < tiles; i++) {
        s.full[i & 1].wait(i / 2);
        forward_tile(s.stages[i & 1], h, A2, saved, live);
        s.done[i & 1].arrive();
        if (saved) saved += (int64_t)p.e * 16;
    }
    if (h_out) store_states(h_out + state_at, h, 16, live);
}

template <bool ALL> struct RowsForward {
    Shared<ForwardStage>& s;
    const ScanInput<bf16>& p;
    const Row mine;
    const int pair;                                                   // where the thread's first pair of channels is in all arrays of pairs
    const int tail;                                                   // tiles in which the thread's step is within the sequence
    const uint8_t* starts;                                            // the thread's of the tile that `prepare` prepares next, or null
    const bf16* bc;                                                   // from here on: of the tile that `fetch` fetches next
    int64_t e_at, z_at;                                               // in (B,T,e) and z
    bf16* out;                                                        // of the tile that `finish` finishes next

    __device__ RowsForward(Shared<ForwardStage>& s_, bf16* out_, const ScanInput<bf16>& p_)
        : s(s_), p(p_), mine(p_.e), pair(mine.row * (CH / 2 + 2) + mine.column / 2), tail((int)((p_.T - mine.row + TILE - 1) / TILE)) {
        const int64_t row_at = blockIdx.y * p.T + mine.row;
        starts = p.starts ? p.starts + row_at : nullptr;
        bc = p.bc + row_at * p.ldbc + threadIdx.x % 16 * 2;
        e_at = row_at * p.e + mine.channel, z_at = row_at * p.ldz + mine.channel, out = out_ + e_at;
    }
    __device__ void fetch(int i, int count) {
        if (i < count) {
            const bf16* const from[3] = {p.u + e_at, p.dt_raw + e_at, p.z + z_at};
            s.inputs.template fetch<ALL>(i, from, bc, mine, i < tail);
            e_at += TILE * (int64_t)p.e, z_at += TILE * p.ldz, bc += TILE * p.ldbc;
        }
        copy_commit();
    }
    __device__ void prepare(int i) {
        ForwardStage& stage = s.stages[i & 1];
#pragma unroll
        for (int k = 0; k < PAIRS; k++) {
            const float2 bias = *(const float2*)&s.bias[mine.column + k * STRIDE];
            const uint32_t raw = s.inputs.word(i, 1, k);
            stage.pair[0][pair + k * WARP] = make_pair(make_float2(scan_softplus<bf16>(low(raw) + bias.x), scan_softplus<bf16>(high(raw) + bias.y)), s.inputs.word(i, 0, k));
        }
        if (i >= tail || (starts && *starts))
            for (int k = 0; k < PAIRS; k++) edge(stage.pair[0][pair + k * WARP], i >= tail);
        if (starts) starts += TILE;
        const bf16 v = s.inputs.state_value(i, mine.row);
        if (threadIdx.x % WARP < 16) store_quarters(stage.b[mine.row], v);
        else stage.c[mine.row][threadIdx.x % 16] = v;
        s.full[i & 1].arrive();
    }
    __device__ void finish(int i) {
        const ForwardStage& stage = s.stages[i & 1];
        if (i < tail) {
#pragma unroll
            for (int k = 0; k < PAIRS; k++) {
                const uint32_t us = s.inputs.word(i, 0, k), zs = s.inputs.word(i, 2, k);
                const float2 y = ((const float2*)stage.y)[pair + k * WARP], D = *(const float2*)&s.skip_weight[mine.column + k * STRIDE], z = make_float2(low(zs), high(zs));
                store2<ALL>(out + k * STRIDE, mine.live - k * STRIDE,
                            make_float2(fmaf(D.x, low(us), y.x) * z.x * scan_sigmoid<bf16>(z.x), fmaf(D.y, high(us), y.y) * z.y * scan_sigmoid<bf16>(z.y)));
            }
        }
        out += TILE * (int64_t)p.e;
    }
    __device__ void run(int count) {
        for (int i = 0; i < 3; i++) fetch(i, count);
        copy_wait<2>();
        __syncwarp();
        prepare(0);
        for (int i = 0; i < count; i++) {
            copy_wait<1>();                                           // tile i + 1 is here
            __syncwarp();
            if (i + 1 < count) prepare(i + 1);
            fetch(i + 3, count);
            s.done[i & 1].wait(i / 2);
            finish(i);
        }
    }
};

template <bool VEC>
__global__ void __launch_bounds__(THREADS, 1) forward_kernel(bf16* out, bf16* saved, float* h_out, const float* h_in, ScanInput<bf16> p) {
    extern __shared__ float4 shared_floats[];
    Shared<ForwardStage>& s = *(Shared<ForwardStage>*)shared_floats;
    const int64_t tiles = (p.T + TILE - 1) / TILE;
    s.init(p.D, p.dt_bias, p.e);
    if (threadIdx.x < SCAN_THREADS) scan_forward(s, saved, h_out, h_in, p, tiles);
    else if (VEC && (blockIdx.x + 1) * CH <= p.e) RowsForward<true>(s, out, p).run((int)tiles);
    else RowsForward<false>(s, out, p).run((int)tiles);
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
    // A row thread's 24 bytes of tile i, 8 of every 2048. `from`: the first of them; of all bytes of the block, `live` are within the array.
    __device__ void fetch_states(int64_t i, const bf16* from, int live) {
        const int thread = threadIdx.x - SCAN_THREADS;
        bf16* to = &saved[i & 3][0][0] + thread * 4;
#pragma unroll
        for (int k = 0; k < CH * 16; k += ROW_THREADS * 4) copy_async<8>(to + k, from + k, k + thread * 4 < live);
    }
};

struct BackwardStage {
    using Input = BackwardInputs;
    Pairs pair;
    uint2 dy[TILE][CH / 2 + 2];                                       // of channels c and c + 1: dy split
    uint32_t b4[TILE][16];                                            // quarters
    bf16 c[TILE][16];
    float4 b[TILE][TILE][4];                                          // [t][t]: 16 states of step t; zeros elsewhere, for ever
    uint32_t cs[TILE][20];                                            // word 4 a + 2 h + j: state 4 a + 2 j + h, twice; the last four zeros
    float y[TILE][CH + 4], dinput[TILE][CH + 4], ddecay[TILE][CH + 4];
    float db[SCAN_WARPS][TILE][20], dc[SCAN_WARPS][TILE][20];         // of a warp's channels: word 2g + j is state column g of tile j
    float2 dt[TILE][CH / 2 + 2], slope[TILE][CH / 2 + 2], gate[TILE][CH / 2 + 2];   // the row threads' own: softplus, its derivative, sigmoid(z)
};

// Two bf16 numbers from the lower halves of two words
__device__ inline uint32_t lower_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }

// before[t]: h_(t-1), from before[0], as operand A. Leaves y and dC of the tile.
__device__ inline void remake_tile(BackwardStage& s, uint32_t (&before)[TILE][4], const States& A2) {
    const int lane = threadIdx.x % WARP, g = lane / 4, q = lane % 4, warp = threadIdx.x / WARP, c = warp * GROUP + 2 * g;
    const uint2 C = *(const uint2*)&s.c[g][4 * q];
    const uint4 dys = *(const uint4*)&s.dy[g][(warp * GROUP + 4 * q) / 2];          // channels 4q .. 4q + 3 are k = 2q, 2q + 8, 2q + 1, 2q + 9
    const uint32_t dy[2] = {lower_halves(dys.x, dys.z), lower_halves(dys.y, dys.w)};
    States h = {{low(before[0][0]), high(before[0][0]), low(before[0][1]), high(before[0][1])},
                {low(before[0][2]), high(before[0][2]), low(before[0][3]), high(before[0][3])}};
    float y[4] = {}, dC[4] = {};
#pragma unroll
    for (int t = 0; t < TILE; t++) {
        const float4 pair = s.pair[t][c / 2];
        const uint2 B = *(const uint2*)&s.b4[t][2 * g];
        const uint32_t input[2] = {__float_as_uint(pair.z), __float_as_uint(pair.w)};
        advance<SCAN_FMA>(h, make_float2(pair.x, pair.y), A2, input, B);
        uint32_t now[4], turned[4];
        pack_states(now, h);
        mma16(y, now, g == t ? C.x : 0u, g == t ? C.y : 0u);
        transpose(turned, now);
        mma16(dC, turned, g == t ? dy[0] : 0u, g == t ? dy[1] : 0u);
        if (t + 1 < TILE)
#pragma unroll
            for (int k = 0; k < 4; k++) before[t + 1][k] = now[k];
    }
    store_steps(s.y, y, c);
    store_steps(s.dc[warp], dC, 2 * g);
}

// The reverse walk keeps its states with the middle two of four exchanged: v[j][k]: channel 2g + k % 2, state 4q + 2j + k / 2. That is the order of
// operand A of mma8_tf32 (rows channels 2g and 2g + 1, k the states), so lambda goes from product to product without a move.
__device__ inline void exchange(States& v) {
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const float x = v[j][1];
        v[j][1] = v[j][2], v[j][2] = x;
    }
}
__device__ inline void pack_exchanged(uint32_t (&a)[4], const States& v) {
    a[0] = pack(v[0][0], v[0][2]), a[1] = pack(v[0][1], v[0][3]), a[2] = pack(v[1][0], v[1][2]), a[3] = pack(v[1][1], v[1][3]);
}
// v += dy C'. In that order columns are (states 4a.., channel 2g or 2g + 1) and rows (channels of lane group g, first or second of two states), so the
// k places of lane q = 2 h + i are for channel 2g + i and state h of the two: dy of that channel in rows g (h = 0) or g + 8 (h = 1), and C in
// columns of that channel.
__device__ inline void add_product(States& v, const BackwardStage& s, int t, int c) {
    const int lane = threadIdx.x % WARP, g = lane / 4, q = lane % 4;
    const uint32_t dy = ((const uint32_t*)s.dy[t])[c + q % 2], first = q < 2 ? ~0u : 0u;
    const uint2 C = *(const uint2*)&s.cs[t][q % 2 == g % 2 ? g / 2 * 4 + q / 2 * 2 : 16];
    const uint32_t rows[2] = {dy & first, dy & ~first};
    mma8(v[0], rows, C.x);
    mma8(v[1], rows, C.y);
}

// carry: a lambda of the step after the tile, then of its first step; carry and dA exchanged
__device__ inline void reverse_tile(BackwardStage& s, const uint32_t (&before)[TILE][4], States& carry, States& dA, const States& A2) {
    const int lane = threadIdx.x % WARP, g = lane / 4, q = lane % 4, warp = threadIdx.x / WARP, c = warp * GROUP + 2 * g;
    const float4* mine = &s.pair[g][(warp * GROUP + 4 * q) / 2];
    const float2 in0 = *(const float2*)&mine[0].z, in1 = *(const float2*)&mine[1].z;
    const uint32_t input[2] = {lower_halves(__float_as_uint(in0.x), __float_as_uint(in1.x)), lower_halves(__float_as_uint(in0.y), __float_as_uint(in1.y))};
    float dinput[4] = {}, ddecay[4] = {}, dB[4] = {};
#pragma unroll
    for (int t2 = TILE - 2; t2 >= 0; t2 -= 2) {
        float sums[4] = {};                                           // sum_n A2 pull: steps t2, t2 + 1 of channels c, c + 1
#pragma unroll
        for (int i = 1; i >= 0; i--) {
            const int t = t2 + i;
            const float2 dt = *(const float2*)&s.pair[t][c / 2];
            const float4 B = s.b[t][g][q];                            // of states 4q .. 4q + 3 if g == t, else zeros
            add_product(carry, s, t, c);                              // lambda
            mma8_tf32(dinput, carry[0], B.x, B.y);                    // in tf32: with bf16 the sum of d(dt) over time would be off by 2e-3
            mma8_tf32(dinput, carry[1], B.z, B.w);
            uint32_t now[4], turned[4];
            pack_exchanged(now, carry);
            transpose(turned, now);
            mma16(dB, turned, g == t ? input[0] : 0u, g == t ? input[1] : 0u);
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    const int old = k % 2 * 2 + k / 2;                // in A2
                    const uint32_t pair = before[t][2 * j + k % 2];
                    carry[j][k] *= scan_ex2((k % 2 ? dt.y : dt.x) * A2[j][old]);
                    const float pull = carry[j][k] * (k / 2 ? high(pair) : low(pair));
                    dA[j][k] = fmaf(k % 2 ? dt.y : dt.x, pull, dA[j][k]);
                    sums[2 * i + k % 2] = fmaf(A2[j][old], pull, sums[2 * i + k % 2]);
                }
        }
        mma8_tf32(ddecay, sums, g == t2 ? 1.f : 0.f, g == t2 + 1 ? 1.f : 0.f);
    }
    store_steps(s.dinput, dinput, c);
    store_steps(s.ddecay, ddecay, c);
    store_steps(s.db[warp], dB, 2 * g);
}

// The scan warps' walk from the last tile of a segment to its first
__device__ inline void scan_back(Shared<BackwardStage>& s, const ScanGradients<bf16>& out, const ScanInput<bf16>& p, int64_t segment, int64_t first_tile, int64_t count) {
    const int lane = threadIdx.x % WARP, channel = blockIdx.x * CH + threadIdx.x / WARP * GROUP + lane / 4 * 2, n = lane % 4 * 4, live = p.e - channel;
    const int64_t state_at = (segment * p.e + channel) * 16 + n;
    States carry = {}, dA = {}, A2;
    load_decay_rates(A2, p.A_log + (int64_t)channel * 16 + n, live);
    if (out.carry) load_states(carry, out.carry + state_at, 16, live);   // carry_stride is 16
    exchange(carry);
    for (int64_t i = 0; i < count; i++) {
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
    exchange(dA);
    if (out.dh_in && first_tile == 0) store_states(out.dh_in + ((int64_t)blockIdx.y * p.e + channel) * 16 + n, carry, 16, live);
#pragma unroll
    for (int i = 0; i < 8; i++) dA[i / 4][i % 4] *= A2[i / 4][i % 4] * SCAN_LN2;
    store_states(out.dA + state_at, dA, 16, live);
}

// softplus(x) and its derivative sigmoid(x)
__device__ inline float softplus_slope(float x, float& slope) {
    const float p = scan_ex2(x * SCAN_LOG2E), sum = 1.f + p, log = scan_lg2(sum) * SCAN_LN2, series = p * (1.f - p * (0.5f - p * 0.33333333f));
    slope = x > 20.f ? 1.f : p * scan_rcp(sum);
    return x > 20.f ? x : p < 1e-2f ? series : log;
}

// The row warps: tile i's rows to the stage (prepare), and what the scan warps leave there to the gradients (finish)
template <bool ALL> struct RowsBack {
    enum { U, DT, Z, DOUT };
    Shared<BackwardStage>& s;
    const ScanGradients<bf16>& out;
    const ScanInput<bf16>& p;
    const Row mine;
    const int pair;                                                   // where the thread's first pair of channels is in all arrays of pairs
    const bool past;                                                  // the thread's step of tile 0 is past the end
    const uint8_t* starts;                                            // the thread's of the tile that `prepare` prepares next, or null
    const bf16 *bc, *saved;                                           // from here on: of the tile that `fetch` fetches next
    int64_t e_at, z_at;                                               // in (B,T,e) and z
    int64_t e_done, z_done;                                           // of the step that `finish` finishes next, in (B,T,e) and dz
    float* dbc;
    float2 dD[PAIRS] = {}, dbias[PAIRS] = {};

    __device__ RowsBack(Shared<BackwardStage>& s_, const ScanGradients<bf16>& out_, const ScanInput<bf16>& p_, int64_t last_tile)
        : s(s_), out(out_), p(p_), mine(p_.e), pair(mine.row * (CH / 2 + 2) + mine.column / 2), past(last_tile * TILE + mine.row >= p_.T) {
        const int64_t row_at = blockIdx.y * p.T + last_tile * TILE + mine.row;
        const int w = threadIdx.x % 16, n = w / 4 * 4 + w % 2 * 2 + w / 2 % 2;      // word w of the scan warps' sums of dB and dC is state n
        starts = p.starts ? p.starts + row_at : nullptr;
        e_at = e_done = row_at * p.e + mine.channel, z_at = row_at * p.ldz + mine.channel, z_done = row_at * out.lddz + mine.channel;
        bc = p.bc + row_at * p.ldbc + threadIdx.x % 16 * 2;
        saved = out.saved + ((blockIdx.y * ((p.T + TILE - 1) / TILE) + last_tile) * p.e + blockIdx.x * CH) * 16 + (threadIdx.x - SCAN_THREADS) * 4;
        dbc = out.dbc + (blockIdx.x * (int64_t)gridDim.y * p.T + row_at) * 32 + (threadIdx.x % WARP < 16 ? 0 : 16) + n;
    }
    __device__ bool is_past(int i) const { return i == 0 && past; }
    __device__ void fetch(int i, int count) {
        if (i < count) {
            const bf16* const from[4] = {p.u + e_at, p.dt_raw + e_at, p.z + z_at, out.dout + e_at};
            s.inputs.template fetch<ALL>(i, from, bc, mine, !is_past(i));
            s.inputs.fetch_states(i, saved, (p.e - (int)blockIdx.x * CH) * 16);
            e_at -= TILE * (int64_t)p.e, z_at -= TILE * p.ldz, bc -= TILE * p.ldbc, saved -= (int64_t)p.e * 16;
        }
        copy_commit();
    }
    __device__ void prepare(int i) {
        BackwardStage& stage = s.stages[i & 1];
#pragma unroll
        for (int k = 0; k < PAIRS; k++) {
            const int at = pair + k * WARP;
            const uint32_t dts = s.inputs.word(i, DT, k), zs = s.inputs.word(i, Z, k), douts = s.inputs.word(i, DOUT, k);
            const float2 bias = *(const float2*)&s.bias[mine.column + k * STRIDE], gate = make_float2(scan_sigmoid<bf16>(low(zs)), scan_sigmoid<bf16>(high(zs)));
            stage.gate[0][at] = gate;
            stage.dy[0][at] = make_uint2(split(low(douts) * low(zs) * gate.x), split(high(douts) * high(zs) * gate.y));
            float2 slope, dt;
            dt.x = softplus_slope(low(dts) + bias.x, slope.x), dt.y = softplus_slope(high(dts) + bias.y, slope.y);
            stage.dt[0][at] = dt, stage.slope[0][at] = slope;
            stage.pair[0][at] = make_pair(dt, s.inputs.word(i, U, k));
        }
        if (is_past(i) || (starts && *starts))                        // past the end dout is zeros
            for (int k = 0; k < PAIRS; k++) edge(stage.pair[0][pair + k * WARP], is_past(i));
        if (starts) starts -= TILE;
        const bf16 v = s.inputs.state_value(i, mine.row);
        const bool is_B = threadIdx.x % WARP < 16;
        const int n = threadIdx.x % 16;
        if (is_B) {
            store_quarters(stage.b4[mine.row], v);
            ((float*)stage.b[mine.row][mine.row])[n] = to_float(v);
        } else {
            stage.cs[mine.row][n / 4 * 4 + n % 2 * 2 + n / 2 % 2] = pack(to_float(v), to_float(v));
            stage.c[mine.row][n] = v;
        }
        s.full[i & 1].arrive();
    }
    __device__ void finish(int i) {
        const BackwardStage& stage = s.stages[i & 1];
        if (!is_past(i)) {
            add_warps(stage);
#pragma unroll
            for (int k = 0; k < PAIRS; k++) finish_pair(stage, i, k);
        }
        dbc -= TILE * 32, e_done -= TILE * (int64_t)p.e, z_done -= TILE * out.lddz;
    }
    __device__ void finish_pair(const BackwardStage& stage, int i, int k) {
        const int at = pair + k * WARP, live = mine.live - k * STRIDE;
        auto two = [&](const float* array) { return ((const float2*)array)[at]; };
        const uint32_t us = s.inputs.word(i, U, k), zs = s.inputs.word(i, Z, k), douts = s.inputs.word(i, DOUT, k);
        const float2 gate = stage.gate[0][at], D = *(const float2*)&s.skip_weight[mine.column + k * STRIDE], u = make_float2(low(us), high(us)), dout = make_float2(low(douts), high(douts));
        const float2 silu = make_float2(low(zs) * gate.x, high(zs) * gate.y), dy = make_float2(dout.x * silu.x, dout.y * silu.y);
        float2 y = two(stage.y[0]);
        y.x = fmaf(D.x, u.x, y.x), y.y = fmaf(D.y, u.y, y.y);
        store2<ALL>(out.out + e_done + k * STRIDE, live, make_float2(y.x * silu.x, y.y * silu.y));
        store2<ALL>(out.dz + z_done + k * STRIDE, live, make_float2(dout.x * y.x * fmaf(silu.x, 1.f - gate.x, gate.x), dout.y * y.y * fmaf(silu.y, 1.f - gate.y, gate.y)));
        const float2 dinput = two(stage.dinput[0]), dt = stage.dt[0][at];
        store2<ALL>(out.du + e_done + k * STRIDE, live, make_float2(fmaf(dinput.x, dt.x, D.x * dy.x), fmaf(dinput.y, dt.y, D.y * dy.y)));
        const float2 ddecay = two(stage.ddecay[0]), slope = stage.slope[0][at];
        const float2 ddt = make_float2(fmaf(dinput.x, u.x, ddecay.x * SCAN_LN2) * slope.x, fmaf(dinput.y, u.y, ddecay.y * SCAN_LN2) * slope.y);
        store2<ALL>(out.ddt_raw + e_done + k * STRIDE, live, ddt);
        dD[k].x = fmaf(dy.x, u.x, dD[k].x), dD[k].y = fmaf(dy.y, u.y, dD[k].y);
        dbias[k].x += ddt.x, dbias[k].y += ddt.y;
    }
    // dB and dC of the step: word w is the scan warps' sum, in order
    __device__ void add_warps(const BackwardStage& stage) const {
        const int w = threadIdx.x % 16;
        const float(*from)[TILE][20] = threadIdx.x % WARP < 16 ? stage.db : stage.dc;
        float sum = from[0][mine.row][w];
#pragma unroll
        for (int warp = 1; warp < SCAN_WARPS; warp++) sum += from[warp][mine.row][w];
        *dbc = sum;
    }
    // dD and d(dt bias) of the block's channels: the sums of the eight rows, in order. The scan warps are done with the stages.
    __device__ void add_rows(float* to) {
        float4(*sums)[CH / 2] = (float4(*)[CH / 2])&s.stages[0];      // (8 rows, CH / 2)
        asm volatile("bar.sync 1, %0;" ::"n"(ROW_THREADS) : "memory");
#pragma unroll
        for (int k = 0; k < PAIRS; k++) sums[mine.row][(mine.column + k * STRIDE) / 2] = make_float4(dD[k].x, dbias[k].x, dD[k].y, dbias[k].y);
        asm volatile("bar.sync 1, %0;" ::"n"(ROW_THREADS) : "memory");
        const int c = threadIdx.x - SCAN_THREADS;
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
        copy_wait<2>();
        __syncwarp();
        prepare(0);
        for (int i = 0; i < count; i++) {
            copy_wait<1>();                                           // tile i + 1 is here
            __syncwarp();
            if (i + 1 < count) prepare(i + 1);
            fetch(i + 3, count);
            s.done[i & 1].wait(i / 2);
            finish(i);
        }
        add_rows(out.dD_dbias + (segment * p.e + blockIdx.x * CH) * 2);
    }
};

#ifndef SCAN_REGS_A
#define SCAN_REGS_A "128"
#define SCAN_REGS_B "48"
#endif
// On Hopper the row warps hand registers to the scan warps.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define SCAN_MMA_REGISTERS(change, count) asm volatile("setmaxnreg." change ".sync.aligned.u32 " count ";")
#else
#define SCAN_MMA_REGISTERS(change, count)
#endif

template <bool VEC>
__global__ void __launch_bounds__(THREADS, 1) backward_kernel(ScanGradients<bf16> out, ScanInput<bf16> p) {
    extern __shared__ float4 shared_floats[];
    Shared<BackwardStage>& s = *(Shared<BackwardStage>*)shared_floats;
    const int64_t segment = (int64_t)blockIdx.y * gridDim.z + blockIdx.z, tiles = (p.T + TILE - 1) / TILE;
    const int64_t first_tile = blockIdx.z * p.segment_tiles, count = min(p.segment_tiles, tiles - first_tile);
    for (int i = threadIdx.x; i < (int)(sizeof(s.stages) / 16); i += THREADS) ((float4*)s.stages)[i] = make_float4(0.f, 0.f, 0.f, 0.f);
    s.init(p.D, p.dt_bias, p.e);
    if (threadIdx.x < SCAN_THREADS) {
        SCAN_MMA_REGISTERS("inc", SCAN_REGS_A);
        scan_back(s, out, p, segment, first_tile, count);
    } else {
        SCAN_MMA_REGISTERS("dec", SCAN_REGS_B);
        if (VEC && (blockIdx.x + 1) * CH <= p.e) RowsBack<true>(s, out, p, first_tile + count - 1).run(segment, (int)count);
        else RowsBack<false>(s, out, p, first_tile + count - 1).run(segment, (int)count);
    }
}

} // namespace gpu::scan_mma
