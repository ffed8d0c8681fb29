// Selective scan for any number of states up to 256, in float and bf16.
//
// A block is 32 (backward, bf16: 64) neighbouring channels of one sequence and walks along it in tiles of 16 steps. Four lanes share a
// channel and keep 4 of its 16 states each in registers; more states than 16 are taken in groups of 16, tile by tile. What does not depend on
// the state (softplus, gate) is computed by one thread for 4 channels of a step and passed through shared memory.
// The backward pass keeps the remade states of a tile in shared memory as X. dB and dC: on tensor cores with bf16 operands (bf16 build) or fp32.
//
// Cost per (t,c) in bf16, N = 16: forward 8 bytes + 2 saved, 19 special-function results (16 of them the decays); backward 16 bytes + 2 + 4
// for the partial sums of dB and dC, 37 special-function results.
#pragma once
#include "common.cuh"

namespace gpu {

// ---------------------------------------------------------------------------------------------------------------------
// Forward. Grid (channel blocks, B, segments). h_first (B,S,e,h_stride), or null for zeros.

template <class X, bool VEC, bool MANY /*groups of states*/>
__global__ void __launch_bounds__(SCAN_CHANNELS * SCAN_LANES, sizeof(X) == 2 && VEC && !MANY ? 6 : 4)
selective_scan_forward_kernel(X* out, X* saved, float* h_out, const float* h_first, int h_stride, ScanInput<X> p) {
    constexpr int CH = SCAN_CHANNELS, THREADS = CH * SCAN_LANES;
    __shared__ __align__(16) float2 s_dt[SCAN_TILE][CH];              // dt and dt u
    __shared__ __align__(16) float s_bc[SCAN_TILE][2 * SCAN_GROUP];   // B | C
    __shared__ __align__(16) float s_y[SCAN_TILE][CH + 8];            // + 8: the four lanes' rows lie in different banks
    extern __shared__ float4 s_h[];                                   // MANY: (groups, threads)

    const int tid = threadIdx.x, c = tid / SCAN_LANES, q = tid % SCAN_LANES, channel = blockIdx.x * CH + c;
    const int row = tid / (CH / 4), column = tid % (CH / 4) * 4, first_channel = blockIdx.x * CH + column;   // for work without states
    const int64_t sequence = blockIdx.y, segment = sequence * gridDim.z + blockIdx.z;
    const int groups = MANY ? (p.N + SCAN_GROUP - 1) / SCAN_GROUP : 1, Np = groups * SCAN_GROUP;
    const int64_t tiles = (p.T + SCAN_TILE - 1) / SCAN_TILE, first_tile = blockIdx.z * p.segment_tiles;
    const int64_t last_tile = min(first_tile + p.segment_tiles, tiles);

    float A2[4], h[4], skip_weight[4], bias[4];
    for (int g = 0; g < groups; g++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int n = g * SCAN_GROUP + q * 4 + j;
            h[j] = h_first && channel < p.e && n < p.N ? h_first[(segment * p.e + channel) * h_stride + n] : 0.f;
        }
        if (MANY) s_h[g * THREADS + tid] = make_float4(h[0], h[1], h[2], h[3]);
    }
    scan_load_A(A2, p.A_log, channel, q * 4, p.e, p.N);
#pragma unroll
    for (int k = 0; k < 4; k++) {
        skip_weight[k] = first_channel + k < p.e ? p.D[first_channel + k] : 0.f;
        bias[k] = first_channel + k < p.e ? p.dt_bias[first_channel + k] : 0.f;
    }
    Vec<X, 4> us, dts, zs, bcs;
    auto load_tile = [&](int64_t tile) {
        const int64_t t = tile * SCAN_TILE + row, at = sequence * p.T + t;
        const int limit = t < p.T ? p.e : 0;
        us = scan_load<VEC>(p.u + at * p.e, first_channel, limit);
        dts = scan_load<VEC>(p.dt_raw + at * p.e, first_channel, limit);
        zs = scan_load<VEC>(p.z + at * p.ldz, first_channel, limit);
        bcs = scan_load_bc<VEC>(p, sequence, tile, 0);
    };
    load_tile(first_tile);
    for (int64_t tile = first_tile; tile < last_tile; tile++) {
        const int64_t t = tile * SCAN_TILE + row;
        const bool start = p.is_start(sequence, t);
        float skip[4], gate[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const float x = to_float(us[k]), z = to_float(zs[k]);
            const float dt = t < p.T ? scan_softplus<X>(to_float(dts[k]) + bias[k]) : 0.f;
            s_dt[row][column + k] = make_float2(start ? SCAN_CUT : dt, dt * x);
            skip[k] = skip_weight[k] * x;
            gate[k] = z * sigmoid<X>(z);
        }
        for (int g = 0; g < groups; g++) {
            if (MANY) {
                if (g > 0) __syncthreads();                           // the group before has been read
                bcs = scan_load_bc<VEC>(p, sequence, tile, g);
                scan_load_A(A2, p.A_log, channel, g * SCAN_GROUP + q * 4, p.e, p.N);
                const float4 v = s_h[g * THREADS + tid];
                h[0] = v.x, h[1] = v.y, h[2] = v.z, h[3] = v.w;
            }
            *(float4*)&s_bc[tid / 8][tid % 8 * 4] = scan_floats(bcs);
            __syncthreads();
            if (g == groups - 1 && tile + 1 < last_tile) load_tile(tile + 1);
            if (saved && channel < p.e) {
                Vec<X, 4> v;
#pragma unroll
                for (int j = 0; j < 4; j++) v[j] = from_float<X>(h[j]);
                store_vec(saved + ((sequence * tiles + tile) * p.e + channel) * Np + g * SCAN_GROUP + q * 4, v);
            }
#pragma unroll 2
            for (int t4 = 0; t4 < SCAN_TILE; t4 += 4) {
                float y[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float2 dt = s_dt[t4 + i][c];
                    const auto B = load_vec<4>(&s_bc[t4 + i][q * 4]), C = load_vec<4>(&s_bc[t4 + i][SCAN_GROUP + q * 4]);
                    y[i] = 0.f;
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        h[j] = fmaf(exp2_fast(dt.x * A2[j]), h[j], dt.y * B[j]);
                        y[i] = fmaf(h[j], C[j], y[i]);
                    }
                }
                const float sum = scan_sum_lanes(y, q);
                s_y[t4 + q][c] = MANY && g > 0 ? s_y[t4 + q][c] + sum : sum;
            }
            if (MANY) s_h[g * THREADS + tid] = make_float4(h[0], h[1], h[2], h[3]);
        }
        __syncthreads();
        const auto y = load_vec<4>(&s_y[row][column]);
        const float o[4] = {(y[0] + skip[0]) * gate[0], (y[1] + skip[1]) * gate[1], (y[2] + skip[2]) * gate[2], (y[3] + skip[3]) * gate[3]};
        scan_store<VEC>(out + (sequence * p.T + t) * p.e, first_channel, t < p.T ? p.e : 0, o);
    }
    if (!h_out || last_tile < tiles || channel >= p.e) return;
    for (int g = 0; g < groups; g++) {
        if (MANY) {
            const float4 v = s_h[g * THREADS + tid];
            h[0] = v.x, h[1] = v.y, h[2] = v.z, h[3] = v.w;
        }
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (const int n = g * SCAN_GROUP + q * 4 + j; n < p.N) h_out[(sequence * p.e + channel) * p.N + n] = h[j];
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward

// Shared memory of a tile. stage holds a value for every step, channel and state of the group: first h_t, then, on the way back, lambda_t.
// Step t is in row t + 1; row 0 is the state before the tile.
template <class X, int CH> struct alignas(16) ScanTile {
    static constexpr int PAIR_STEPS = sizeof(X) == 2 ? SCAN_TILE : 1;
    X stage[SCAN_TILE + 1][CH * SCAN_GROUP];
    float2 dt[SCAN_TILE][CH];                                         // dt and dt u
    float dy[SCAN_TILE][CH];
    float bc[SCAN_TILE][2 * SCAN_GROUP];                              // B | C
    float y[SCAN_TILE][CH + 8], dinput[SCAN_TILE][CH + 8], ddecay[SCAN_TILE][CH + 8];   // + 8: as in the forward kernel
    float skip_weight[CH], dt_bias[CH];
    float dD[SCAN_TILE][CH], ddt_bias[SCAN_TILE][CH];                 // sums over the tiles, each thread its own: registers are short
    X input_X[PAIR_STEPS][CH], dy_X[PAIR_STEPS][CH];                  // bf16: dt u and dy as operands of the tensor cores

    // Where lane q of channel c keeps its 4 states in a row of stage. bf16: the two 16-byte halves of a channel change places in
    // every other group of 4 channels, so that ldmatrix, which reads one half of 8 channels, meets every bank once.
    __device__ static int at(int c, int q) {
        if constexpr (sizeof(X) == 2) return c * SCAN_GROUP + (((q >> 1) ^ (c >> 2 & 1)) << 3) + (q & 1) * 4;
        else return c * SCAN_GROUP + q * 4;
    }
};

__device__ inline void scan_ldmatrix_transposed(uint32_t (&a)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"((uint32_t)__cvta_generic_to_shared(row)) : "memory");
}
__device__ inline void scan_mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// sum_c weight[t][c] stage[t+1][c][n] for the steps of the tile and the 16 states: to[t * stride + n], t < steps.
// bf16: one product m16 n8 k16 a step and 16 channels: rows are states, k the channels, and the weights of the warp's i-th step fill
// column i and leave the others zero, so that one accumulator collects all steps of the warp.
template <int CH>
__device__ inline void scan_sum_channels(float* to, int64_t stride, int64_t steps, const ScanTile<__nv_bfloat16, CH>& s,
                                         const __nv_bfloat16 (&weight)[SCAN_TILE][CH]) {
    constexpr int STEPS = SCAN_TILE / (CH / 8);                       // a block has CH / 8 warps
    const int lane = threadIdx.x % WARP, g = lane / 4, q = lane % 4, first = threadIdx.x / WARP * STEPS;
    float sum[4] = {};
#pragma unroll
    for (int i = 0; i < STEPS; i++)
#pragma unroll
        for (int k = 0; k < CH; k += 16) {
            const int c = k + lane / 16 * 8 + lane % 8, half = lane / 8 % 2;
            uint32_t a[4];
            scan_ldmatrix_transposed(a, &s.stage[first + i + 1][s.at(c, 2 * half)]);
            const uint32_t* w = (const uint32_t*)&weight[first + i][k + 2 * q];
            scan_mma_bf16(sum, a, g == i ? w[0] : 0u, g == i ? w[4] : 0u);
        }
#pragma unroll
    for (int j = 0; j < 2; j++)                                       // lane q holds columns 2q and 2q + 1, rows g and g + 8
        if (const int i = 2 * q + j; i < STEPS && first + i < steps) {
            to[(first + i) * stride + g] = sum[j];
            to[(first + i) * stride + g + 8] = sum[2 + j];
        }
}
// float: a thread adds two states of one step; neighbouring steps start at different channels, for the banks' sake.
template <int CH>
__device__ inline void scan_sum_channels(float* to, int64_t stride, int64_t steps, const ScanTile<float, CH>& s, bool input) {
    static_assert(CH * SCAN_LANES == SCAN_TILE * SCAN_GROUP / 2);
    const int t = threadIdx.x / 8, n = threadIdx.x % 8 * 2;
    float sum0 = 0.f, sum1 = 0.f;
#pragma unroll 8
    for (int i = 0; i < CH; i++) {
        const int c = (i + t) % CH;
        const float weight = input ? s.dt[t][c].y : s.dy[t][c];
        const auto v = load_vec<2>(&s.stage[t + 1][c * SCAN_GROUP + n]);
        sum0 = fmaf(weight, v[0], sum0);
        sum1 = fmaf(weight, v[1], sum1);
    }
    if (t < steps) to[t * stride + n] = sum0, to[t * stride + n + 1] = sum1;
}

// Forward through a tile from the state in row 0 of stage: fills the other rows and adds to y
template <class X, int CH, bool MANY>
__device__ inline void scan_remake(ScanTile<X, CH>& s, const float (&A2)[4], int c, int q, bool add) {
    const auto first = load_vec<4>(&s.stage[0][s.at(c, q)]);
    float h[4] = {to_float(first[0]), to_float(first[1]), to_float(first[2]), to_float(first[3])};
#pragma unroll 2
    for (int t4 = 0; t4 < SCAN_TILE; t4 += 4) {
        float y[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float2 dt = s.dt[t4 + i][c];
            const auto B = load_vec<4>(&s.bc[t4 + i][q * 4]), C = load_vec<4>(&s.bc[t4 + i][SCAN_GROUP + q * 4]);
            Vec<X, 4> kept;
            y[i] = 0.f;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                h[j] = fmaf(exp2_fast(dt.x * A2[j]), h[j], dt.y * B[j]);
                y[i] = fmaf(h[j], C[j], y[i]);
                kept[j] = from_float<X>(h[j]);
            }
            store_vec(&s.stage[t4 + i + 1][s.at(c, q)], kept);
        }
        const float sum = scan_sum_lanes(y, q);
        s.y[t4 + q][c] = MANY && add ? s.y[t4 + q][c] + sum : sum;
    }
}

// Back through the tile. carry: a lambda of the step after the tile, then of its first step.
template <class X, int CH, bool MANY>
__device__ inline void scan_reverse(ScanTile<X, CH>& s, float (&carry)[4], float (&dA)[4], const float (&A2)[4], int c, int q, bool add) {
#pragma unroll 1
    for (int t4 = SCAN_TILE - 4; t4 >= 0; t4 -= 4) {
        float dinput[4], ddecay[4];
#pragma unroll
        for (int i = 3; i >= 0; i--) {
            const int t = t4 + i;
            const float dt = s.dt[t][c].x, dy = s.dy[t][c];
            const auto B = load_vec<4>(&s.bc[t][q * 4]), C = load_vec<4>(&s.bc[t][SCAN_GROUP + q * 4]);
            const auto before = load_vec<4>(&s.stage[t][s.at(c, q)]);
            Vec<X, 4> kept;
            dinput[i] = ddecay[i] = 0.f;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float lambda = fmaf(dy, C[j], carry[j]);
                dinput[i] = fmaf(lambda, B[j], dinput[i]);
                carry[j] = exp2_fast(dt * A2[j]) * lambda;
                const float pull = carry[j] * to_float(before[j]);
                ddecay[i] = fmaf(A2[j], pull, ddecay[i]);
                dA[j] = fmaf(dt, pull, dA[j]);
                kept[j] = from_float<X>(lambda);
            }
            store_vec(&s.stage[t + 1][s.at(c, q)], kept);             // h_t has been read, at step t + 1
        }
        const float sum = scan_sum_lanes(dinput, q), decay_sum = scan_sum_lanes(ddecay, q);
        s.dinput[t4 + q][c] = MANY && add ? s.dinput[t4 + q][c] + sum : sum;
        s.ddecay[t4 + q][c] = MANY && add ? s.ddecay[t4 + q][c] + decay_sum : decay_sum;
    }
}

// 4 neighbouring channels of one step
template <class X> struct ScanRow { Vec<X, 4> u, dt_raw, z, dout; };

// What the sweeps over a tile need of its rows. live: the step is not past the end.
template <class X, int CH>
__device__ inline void scan_fill_tile(ScanTile<X, CH>& s, const ScanRow<X>& r, bool live, bool start, int row, int column) {
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const float u = to_float(r.u[k]), z = to_float(r.z[k]), dy = to_float(r.dout[k]) * z * sigmoid<X>(z);
        const float dt = live ? scan_softplus<X>(to_float(r.dt_raw[k]) + s.dt_bias[column + k]) : 0.f;
        s.dt[row][column + k] = make_float2(start ? SCAN_CUT : dt, dt * u);
        s.dy[row][column + k] = dy;
        if constexpr (sizeof(X) == 2) {
            s.input_X[row][column + k] = from_float<X>(dt * u);
            s.dy_X[row][column + k] = from_float<X>(dy);
        }
    }
}

// What the sweeps leave becomes gradients. at: the row of (B,T).
template <class X, int CH, bool VEC>
__device__ inline void scan_finish_tile(ScanTile<X, CH>& s, const ScanRow<X>& r, const ScanGradients<X>& out, const ScanInput<X>& p, int64_t at,
                                        bool live, bool start, int row, int column) {
    const int first_channel = blockIdx.x * CH + column, limit = live ? p.e : 0;
    float o[4], dz[4], du[4], ddt[4];
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const float u = to_float(r.u[k]), z = to_float(r.z[k]);
        const float gate = sigmoid<X>(z), slope = sigmoid<X>(to_float(r.dt_raw[k]) + s.dt_bias[column + k]);
        const float D = s.skip_weight[column + k], y = fmaf(D, u, s.y[row][column + k]);
        const float dinput = s.dinput[row][column + k], dy = s.dy[row][column + k];
        o[k] = y * z * gate;
        dz[k] = to_float(r.dout[k]) * y * gate * (1.f + z * (1.f - gate));
        const float dt = start ? scan_softplus<X>(to_float(r.dt_raw[k]) + s.dt_bias[column + k]) : s.dt[row][column + k].x;
        du[k] = fmaf(dinput, dt, D * dy);
        ddt[k] = live ? fmaf(dinput, u, s.ddecay[row][column + k] * SCAN_LN2) * slope : 0.f;
        s.dD[row][column + k] = fmaf(dy, u, s.dD[row][column + k]);
        s.ddt_bias[row][column + k] += ddt[k];
    }
    scan_store<VEC>(out.out + at * p.e, first_channel, limit, o);
    scan_store<VEC>(out.dz + at * out.lddz, first_channel, limit, dz);
    scan_store<VEC>(out.du + at * p.e, first_channel, limit, du);
    scan_store<VEC>(out.ddt_raw + at * p.e, first_channel, limit, ddt);
}

// Values n to n + 3 of a row; zeros from N on
__device__ inline float4 scan_load_carry(const float* row, int n, int N) {
    return make_float4(n < N ? row[n] : 0.f, n + 1 < N ? row[n + 1] : 0.f, n + 2 < N ? row[n + 2] : 0.f, n + 3 < N ? row[n + 3] : 0.f);
}

// Grid (channel blocks, B, segments). Shared memory: the tile, then if MANY carry and dA of (groups, threads).
template <class X, int CH, bool VEC, bool MANY>
__global__ void __launch_bounds__(CH * SCAN_LANES, CH == 64 ? (VEC ? 3 : 2) : 1)
selective_scan_backward_kernel(ScanGradients<X> out, ScanInput<X> p) {
    constexpr int THREADS = CH * SCAN_LANES;
    extern __shared__ float4 shared_floats[];
    ScanTile<X, CH>& s = *(ScanTile<X, CH>*)shared_floats;
    float4* s_carry = (float4*)(&s + 1);
    const int tid = threadIdx.x, c = tid / SCAN_LANES, q = tid % SCAN_LANES, channel = blockIdx.x * CH + c;
    const int row = tid / (CH / 4), column = tid % (CH / 4) * 4, first_channel = blockIdx.x * CH + column;
    const int64_t sequence = blockIdx.y, segment = sequence * gridDim.z + blockIdx.z;
    const int groups = MANY ? (p.N + SCAN_GROUP - 1) / SCAN_GROUP : 1, Np = groups * SCAN_GROUP;
    float4* s_dA = s_carry + groups * THREADS;
    const int64_t tiles = (p.T + SCAN_TILE - 1) / SCAN_TILE, first_tile = blockIdx.z * p.segment_tiles;
    const int64_t last_tile = min(first_tile + p.segment_tiles, tiles);

    float A2[4], carry[4] = {}, dA[4] = {};
    for (int g = 0; g < groups; g++) {
        float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
        if (out.carry && channel < p.e)
            v = scan_load_carry(out.carry + (segment * p.e + channel) * out.carry_stride, g * SCAN_GROUP + q * 4, min(out.carry_stride, p.N));
        carry[0] = v.x, carry[1] = v.y, carry[2] = v.z, carry[3] = v.w;
        if (MANY) s_carry[g * THREADS + tid] = v, s_dA[g * THREADS + tid] = make_float4(0.f, 0.f, 0.f, 0.f);
    }
    scan_load_A(A2, p.A_log, channel, q * 4, p.e, p.N);
    *(float4*)&s.dD[row][column] = *(float4*)&s.ddt_bias[row][column] = make_float4(0.f, 0.f, 0.f, 0.f);
    if (tid < CH) {
        const int i = blockIdx.x * CH + tid;
        s.skip_weight[tid] = i < p.e ? p.D[i] : 0.f;
        s.dt_bias[tid] = i < p.e ? p.dt_bias[i] : 0.f;
    }
    __syncthreads();
    ScanRow<X> next;
    Vec<X, 4> bcs, hs;
    auto load_state = [&](int64_t tile, int g) {
        const X* states = out.saved + ((sequence * tiles + tile) * p.e + channel) * Np;
        return scan_load<true>(states, g * SCAN_GROUP + q * 4, channel < p.e ? Np : 0);
    };
    auto load_tile = [&](int64_t tile) {
        const int64_t t = tile * SCAN_TILE + row, at = sequence * p.T + t;
        const int limit = t < p.T ? p.e : 0;
        next.u = scan_load<VEC>(p.u + at * p.e, first_channel, limit);
        next.dt_raw = scan_load<VEC>(p.dt_raw + at * p.e, first_channel, limit);
        next.z = scan_load<VEC>(p.z + at * p.ldz, first_channel, limit);
        next.dout = scan_load<VEC>(out.dout + at * p.e, first_channel, limit);
        if (!MANY && tid < 128) bcs = scan_load_bc<VEC>(p, sequence, tile, 0);
        if (!MANY) hs = load_state(tile, 0);
    };
    load_tile(last_tile - 1);
    for (int64_t tile = last_tile - 1; tile >= first_tile; tile--) {
        const int64_t first_step = tile * SCAN_TILE, t = first_step + row;
        const ScanRow<X> now = next;                                  // next takes the next tile's
        const bool start = p.is_start(sequence, t);
        scan_fill_tile(s, now, t < p.T, start, row, column);
        for (int g = 0; g < groups; g++) {
            if (MANY) {
                if (g > 0) __syncthreads();                           // the group before has been read
                bcs = scan_load_bc<VEC>(p, sequence, tile, g);
                hs = load_state(tile, g);
                scan_load_A(A2, p.A_log, channel, g * SCAN_GROUP + q * 4, p.e, p.N);
                const float4 v = s_carry[g * THREADS + tid], w = s_dA[g * THREADS + tid];
                carry[0] = v.x, carry[1] = v.y, carry[2] = v.z, carry[3] = v.w;
                dA[0] = w.x, dA[1] = w.y, dA[2] = w.z, dA[3] = w.w;
            }
            if (tid < 128) *(float4*)&s.bc[tid / 8][tid % 8 * 4] = scan_floats(bcs);
            store_vec(&s.stage[0][s.at(c, q)], hs);                   // read by this thread alone
            __syncthreads();
            if (g == groups - 1 && tile > first_tile) load_tile(tile - 1);
            scan_remake<X, CH, MANY>(s, A2, c, q, g > 0);
            __syncthreads();                                          // all h are in stage
            float* part = out.dbc + (((int64_t)blockIdx.x * gridDim.y + sequence) * p.T + first_step) * 2 * Np + g * 2 * SCAN_GROUP;
            if constexpr (sizeof(X) == 2) scan_sum_channels<CH>(part + SCAN_GROUP, 2 * Np, p.T - first_step, s, s.dy_X);
            else scan_sum_channels<CH>(part + SCAN_GROUP, 2 * Np, p.T - first_step, s, false);
            __syncthreads();                                          // and may be replaced
            scan_reverse<X, CH, MANY>(s, carry, dA, A2, c, q, g > 0);
            __syncthreads();                                          // all lambda are in stage
            if constexpr (sizeof(X) == 2) scan_sum_channels<CH>(part, 2 * Np, p.T - first_step, s, s.input_X);
            else scan_sum_channels<CH>(part, 2 * Np, p.T - first_step, s, true);
            if (MANY) {
                s_carry[g * THREADS + tid] = make_float4(carry[0], carry[1], carry[2], carry[3]);
                s_dA[g * THREADS + tid] = make_float4(dA[0], dA[1], dA[2], dA[3]);
            }
        }
        scan_finish_tile<X, CH, VEC>(s, now, out, p, sequence * p.T + t, t < p.T, start, row, column);
        __syncthreads();                                              // the tile has been read
    }
    for (int g = 0; out.dh_in && first_tile == 0 && channel < p.e && g < groups; g++) {
        if (MANY) {
            const float4 v = s_carry[g * THREADS + tid];
            carry[0] = v.x, carry[1] = v.y, carry[2] = v.z, carry[3] = v.w;
        }
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (const int n = g * SCAN_GROUP + q * 4 + j; n < p.N) out.dh_in[(sequence * p.e + channel) * p.N + n] = carry[j];
    }
    for (int g = 0; g < groups; g++) {
        if (MANY) {
            const float4 w = s_dA[g * THREADS + tid];
            dA[0] = w.x, dA[1] = w.y, dA[2] = w.z, dA[3] = w.w;
            scan_load_A(A2, p.A_log, channel, g * SCAN_GROUP + q * 4, p.e, p.N);
        }
        if (channel < p.e)
            *(float4*)(out.dA + (segment * p.e + channel) * Np + g * SCAN_GROUP + q * 4) =
                make_float4(A2[0] * SCAN_LN2 * dA[0], A2[1] * SCAN_LN2 * dA[1], A2[2] * SCAN_LN2 * dA[2], A2[3] * SCAN_LN2 * dA[3]);
    }
    if (tid < 2 * CH && blockIdx.x * CH + tid % CH < p.e) {
        float sum = 0.f;
        for (int i = 0; i < SCAN_TILE; i++) sum += tid < CH ? s.dD[i][tid] : s.ddt_bias[i][tid - CH];
        out.dD_dbias[(segment * p.e + blockIdx.x * CH + tid % CH) * 2 + tid / CH] = sum;
    }
}

} // namespace gpu
