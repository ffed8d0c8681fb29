// The backward pass of scan/mma.cuh. Grid as forward. The scan warps remake the 8 states of a tile from the saved one, kept as bf16 pairs in
// registers, and go back:
//   lambda_t = dy_t C_t' + a_(t+1) lambda_(t+1)              the outer product by mma, as in the forward pass
//   d(dt u)_t = lambda_t B_t                                 by mma in tf32; step t is column t, here and below
//   dB_t = lambda_t' (dt u)_t     dC_t = h_t' dy_t           by mma on lambda and h as bf16
//   pull = a_t lambda_t h_(t-1)   d(dt)_t = sum_n A_n pull       dA_n = sum_t dt_t pull   one by one
// Per (t,c): 16 bytes, 4 of saved states, 1.3 of partial sums of dB and dC; 37 special functions. B 8, T 4096, d_inner 3072 on an H100: 1.82 ms. What
// bounds it is the issue of instructions, not latency (dev/results/2026-11-27_h100_night).
#pragma once
#include "mma.cuh"

namespace gpu::scan_mma {

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
    const uint32_t input[2] = {lower_halves(__float_as_uint(in0.x), __float_as_uint(in1.x)),
                               lower_halves(__float_as_uint(in0.y), __float_as_uint(in1.y))};
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
__device__ inline void scan_back(Shared<BackwardStage>& s, const ScanGradients<bf16>& out, const ScanInput<bf16>& p, int64_t segment,
                                 int64_t first_tile, int count) {
    const int lane = threadIdx.x % WARP, channel = blockIdx.x * CH + threadIdx.x / WARP * GROUP + lane / 4 * 2;
    const int n = lane % 4 * 4, live = p.e - channel;
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
    const float p = exp2_fast(fminf(x, 20.f) * LOG2E), sum = 1.f + p;
    const float log = scan_lg2(sum) * SCAN_LN2, series = p * (1.f - p * (0.5f - p * 0.33333333f));
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
            const int64_t rows = TILE * (int64_t)p.e;
            from[U] -= rows, from[DT] -= rows, from[Z] -= TILE * p.ldz, from[DOUT] -= rows, bc -= TILE * p.ldbc;
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
