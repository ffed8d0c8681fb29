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

// What a block has of the work: the tiles from first_tile to before end_tile of a sequence. Grid (channel blocks, B, segments).
template <bool MANY /*groups of states*/> struct ScanWork {
    int64_t sequence, segment;                                        // segment: its number among those of all sequences
    int groups, Np;                                                   // groups of states, and the states in them, with those past the end
    int64_t tiles, first_tile, end_tile;                              // tiles: of the whole sequence
    template <class X> __device__ explicit ScanWork(const ScanInput<X>& p)
        : sequence(blockIdx.y), segment(sequence * gridDim.z + blockIdx.z),
          groups(MANY ? (p.N + SCAN_GROUP - 1) / SCAN_GROUP : 1), Np(groups * SCAN_GROUP),
          tiles((p.T + SCAN_TILE - 1) / SCAN_TILE), first_tile(blockIdx.z * p.segment_tiles), end_tile(min(first_tile + p.segment_tiles, tiles)) {}
    // Where the states of a channel before a tile are in saved (B,tiles,e,Np)
    __device__ int64_t saved_at(int64_t tile, int channel, int e) const { return ((sequence * tiles + tile) * e + channel) * Np; }
};

// A thread's 4 channels of its step of a tile; zeros past the end
template <class X, bool VEC> struct ScanRow {
    Vec<X, 4> u, dt_raw, z;
    __device__ void load(const ScanInput<X>& p, int64_t sequence, int64_t tile, int row, int channel) {
        const int64_t t = tile * SCAN_TILE + row, at = sequence * p.T + t;
        const int limit = t < p.T ? p.e : 0;
        u = scan_load<VEC>(p.u + at * p.e, channel, limit);
        dt_raw = scan_load<VEC>(p.dt_raw + at * p.e, channel, limit);
        z = scan_load<VEC>(p.z + at * p.ldz, channel, limit);
    }
};

// A lane's states from n on, of the N floats of a row; zeros past the end, and if there is no row
__device__ inline ScanStates scan_load_states(const float* row, int n, int N, bool there) {
    ScanStates h;
#pragma unroll
    for (int j = 0; j < 4; j++) h[j] = there && n + j < N ? row[n + j] : 0.f;
    return h;
}
__device__ inline void scan_store_states(float* row, int n, int N, const ScanStates& h) {
#pragma unroll
    for (int j = 0; j < 4; j++)
        if (n + j < N) row[n + j] = h[j];
}

// The recurrence over a tile. h: lane q's states of channel c, before the tile and then after it; keep(t, h) may take those of each step.
// y: what the group of states adds to C_t h_t; `add`: to what the groups before it have left there.
template <int CH>
__device__ inline ScanStates scan_walk(float (&y)[SCAN_TILE][CH + 8], const float2 (&dt_input)[SCAN_TILE][CH] /*dt and dt u*/,
                                        const ScanBC& bc, ScanStates h, const ScanStates& A2, int c, int q, bool add, auto keep) {
#pragma unroll 2
    for (int t4 = 0; t4 < SCAN_TILE; t4 += 4) {
        float part[4];                                                // of y, from the lane's states
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float2 dt = dt_input[t4 + i][c];
            const auto B = load_vec<4>(&bc[t4 + i][q * 4]), C = load_vec<4>(&bc[t4 + i][SCAN_GROUP + q * 4]);
            part[i] = 0.f;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                h[j] = fmaf(exp2_fast(dt.x * A2[j]), h[j], dt.y * B[j]);
                part[i] = fmaf(h[j], C[j], part[i]);
            }
            keep(t4 + i, h);
        }
        const float sum = scan_sum_lanes(part, q);
        y[t4 + q][c] = add ? y[t4 + q][c] + sum : sum;
    }
    return h;
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward

// What a thread does for 4 channels of a step: dt and dt u for the lanes, and out from the y that they leave
template <class X> struct ScanForwardRow {
    float D[4], bias[4];
    float skip[4], gate[4];                                           // D u and silu(z)
    __device__ ScanForwardRow(const ScanInput<X>& p, int channel) {
#pragma unroll
        for (int k = 0; k < 4; k++) {
            D[k] = channel + k < p.e ? p.D[channel + k] : 0.f;
            bias[k] = channel + k < p.e ? p.dt_bias[channel + k] : 0.f;
        }
    }
    template <bool VEC> __device__ void prepare(float2* dt_input, const ScanRow<X, VEC>& r, bool live, bool start) {
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const float u = to_float(r.u[k]), z = to_float(r.z[k]);
            const float dt = live ? scan_softplus<X>(to_float(r.dt_raw[k]) + bias[k]) : 0.f;
            dt_input[k] = make_float2(start ? SCAN_CUT : dt, dt * u);
            skip[k] = D[k] * u;
            gate[k] = z * sigmoid<X>(z);
        }
    }
    __device__ void finish(float (&out)[4], const float* y_row) const {
        const auto y = load_vec<4>(y_row);
#pragma unroll
        for (int k = 0; k < 4; k++) out[k] = (y[k] + skip[k]) * gate[k];
    }
};

// h_first (B,S,e,h_stride), or null for zeros. saved: as ScanWork has it, or null. h_out (B,e,N), or null.
template <class X, bool VEC, bool MANY>
__global__ void __launch_bounds__(SCAN_CHANNELS * SCAN_LANES, sizeof(X) == 2 && VEC && !MANY ? 6 : 4)
selective_scan_forward_kernel(X* out, X* saved, float* h_out, const float* h_first, int h_stride, ScanInput<X> p) {
    constexpr int CH = SCAN_CHANNELS, THREADS = CH * SCAN_LANES;
    __shared__ __align__(16) float2 s_dt[SCAN_TILE][CH];              // dt and dt u
    __shared__ __align__(16) ScanBC s_bc;
    __shared__ __align__(16) float s_y[SCAN_TILE][CH + 8];            // + 8: the four lanes' rows lie in different banks
    extern __shared__ float4 shared_states[];                         // MANY: h of (groups, threads)
    const ScanThread<CH> me;
    const ScanWork<MANY> work(p);
    ScanStates* s_h = (ScanStates*)shared_states + me.tid;            // group g: s_h[g * THREADS]

    ScanStates A2, h;
    for (int g = 0; g < work.groups; g++) {
        h = scan_load_states(h_first + (work.segment * p.e + me.channel) * h_stride, me.state(g), p.N, h_first && me.channel < p.e);
        if (MANY) s_h[g * THREADS] = h;
    }
    A2 = scan_load_A(p.A_log, me.channel, me.state(0), p.e, p.N);
    ScanForwardRow<X> row(p, me.first_channel);
    ScanRow<X, VEC> next;                                             // of the tile to come
    Vec<X, 4> bc;
    auto load_tile = [&](int64_t tile) {
        next.load(p, work.sequence, tile, me.row, me.first_channel);
        bc = scan_load_bc<VEC>(p, work.sequence, tile, 0);
    };
    load_tile(work.first_tile);
    for (int64_t tile = work.first_tile; tile < work.end_tile; tile++) {
        const int64_t t = tile * SCAN_TILE + me.row;
        const bool start = p.is_start(work.sequence, t);
        row.prepare(&s_dt[me.row][me.column], next, t < p.T, start);
        for (int g = 0; g < work.groups; g++) {
            if (MANY) {
                if (g > 0) __syncthreads();                           // the group before has been read
                bc = scan_load_bc<VEC>(p, work.sequence, tile, g);
                A2 = scan_load_A(p.A_log, me.channel, me.state(g), p.e, p.N);
                h = s_h[g * THREADS];
            }
            scan_put_bc(s_bc, bc);
            __syncthreads();
            if (g == work.groups - 1 && tile + 1 < work.end_tile) load_tile(tile + 1);
            if (saved && me.channel < p.e) store_vec(saved + work.saved_at(tile, me.channel, p.e) + g * SCAN_GROUP + me.q * 4, scan_round<X>(h.v));
            h = scan_walk(s_y, s_dt, s_bc, h, A2, me.c, me.q, MANY && g > 0, [](int, const ScanStates&) {});
            if (MANY) s_h[g * THREADS] = h;
        }
        __syncthreads();
        float o[4];
        row.finish(o, &s_y[me.row][me.column]);
        scan_store<VEC>(out + (work.sequence * p.T + t) * p.e, me.first_channel, t < p.T ? p.e : 0, o);
    }
    if (!h_out || work.end_tile < work.tiles || me.channel >= p.e) return;
    for (int g = 0; g < work.groups; g++) {
        if (MANY) h = s_h[g * THREADS];
        scan_store_states(h_out + (work.sequence * p.e + me.channel) * p.N, me.state(g), p.N, h);
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
    ScanBC bc;
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
template <class X, int CH>
__device__ inline void scan_remake(ScanTile<X, CH>& s, const ScanStates& A2, int c, int q, bool add) {
    const auto first = load_vec<4>(&s.stage[0][s.at(c, q)]);
    const ScanStates h = {to_float(first[0]), to_float(first[1]), to_float(first[2]), to_float(first[3])};
    scan_walk(s.y, s.dt, s.bc, h, A2, c, q, add, [&](int t, const ScanStates& h) {
        store_vec(&s.stage[t + 1][s.at(c, q)], scan_round<X>(h.v));
    });
}

// What a lane keeps of a group of states. MANY: the groups take turns, and wait in shared memory.
template <bool MANY, int THREADS> struct ScanBackwardLane {
    ScanStates A2, carry, dA;                                         // carry: a lambda of the step that was gone through last
    ScanStates *waiting_carry, *waiting_dA;                           // (groups, threads)
    __device__ void take(int g, int tid) { carry = waiting_carry[g * THREADS + tid], dA = waiting_dA[g * THREADS + tid]; }
    __device__ void leave(int g, int tid) { waiting_carry[g * THREADS + tid] = carry, waiting_dA[g * THREADS + tid] = dA; }
};

// Back through the tile. carry: a lambda of the step after the tile, then of its first step.
template <class X, int CH>
__device__ inline void scan_reverse(ScanTile<X, CH>& s, ScanStates& carry, ScanStates& dA, const ScanStates& A2, int c, int q, bool add) {
#pragma unroll 1
    for (int t4 = SCAN_TILE - 4; t4 >= 0; t4 -= 4) {
        float dinput[4], ddecay[4];                                   // the lane's parts: d(dt u), and d(dt) by way of the decay, over ln 2
#pragma unroll
        for (int i = 3; i >= 0; i--) {
            const int t = t4 + i;
            const float dt = s.dt[t][c].x, dy = s.dy[t][c];
            const auto B = load_vec<4>(&s.bc[t][q * 4]), C = load_vec<4>(&s.bc[t][SCAN_GROUP + q * 4]);
            const auto before = load_vec<4>(&s.stage[t][s.at(c, q)]); // h_(t-1)
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
        s.dinput[t4 + q][c] = add ? s.dinput[t4 + q][c] + sum : sum;
        s.ddecay[t4 + q][c] = add ? s.ddecay[t4 + q][c] + decay_sum : decay_sum;
    }
}

// Both ways through a tile with group g of the states. To dbc (channel blocks, B, T, 2 Np): the group's dB | dC, sums over the block's channels.
template <class X, int CH, bool MANY>
__device__ inline void scan_sweep(ScanTile<X, CH>& s, ScanBackwardLane<MANY, CH * SCAN_LANES>& lane, const ScanGradients<X>& out,
                                  const ScanInput<X>& p, const ScanWork<MANY>& work, const ScanThread<CH>& me, int64_t tile, int g) {
    const int64_t first_step = tile * SCAN_TILE;
    scan_remake(s, lane.A2, me.c, me.q, MANY && g > 0);
    __syncthreads();                                                  // all h are in stage
    float* dbc = out.dbc + (((int64_t)blockIdx.x * gridDim.y + work.sequence) * p.T + first_step) * 2 * work.Np + g * 2 * SCAN_GROUP;
    if constexpr (sizeof(X) == 2) scan_sum_channels<CH>(dbc + SCAN_GROUP, 2 * work.Np, p.T - first_step, s, s.dy_X);
    else scan_sum_channels<CH>(dbc + SCAN_GROUP, 2 * work.Np, p.T - first_step, s, false);
    __syncthreads();                                                  // and may be replaced
    scan_reverse(s, lane.carry, lane.dA, lane.A2, me.c, me.q, MANY && g > 0);
    __syncthreads();                                                  // all lambda are in stage
    if constexpr (sizeof(X) == 2) scan_sum_channels<CH>(dbc, 2 * work.Np, p.T - first_step, s, s.input_X);
    else scan_sum_channels<CH>(dbc, 2 * work.Np, p.T - first_step, s, true);
}

template <class X, bool VEC> struct ScanBackwardRow : ScanRow<X, VEC> {
    Vec<X, 4> dout;
    __device__ void load(const ScanInput<X>& p, const X* dout_ /*(B,T,e)*/, int64_t sequence, int64_t tile, int row, int channel) {
        ScanRow<X, VEC>::load(p, sequence, tile, row, channel);
        const int64_t t = tile * SCAN_TILE + row;
        dout = scan_load<VEC>(dout_ + (sequence * p.T + t) * p.e, channel, t < p.T ? p.e : 0);
    }
};

// What the sweeps over a tile need of its rows. live: the step is not past the end.
template <class X, int CH, bool VEC>
__device__ inline void scan_fill_tile(ScanTile<X, CH>& s, const ScanBackwardRow<X, VEC>& r, bool live, bool start, int row, int column) {
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
__device__ inline void scan_finish_tile(ScanTile<X, CH>& s, const ScanBackwardRow<X, VEC>& r, const ScanGradients<X>& out,
                                        const ScanInput<X>& p, int64_t at, bool live, bool start, int row, int column) {
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

// The block's D and dt_bias, and zeros in the sums that each thread keeps
template <class X, int CH> __device__ inline void scan_begin(ScanTile<X, CH>& s, const ScanInput<X>& p, int tid, int row, int column) {
    *(float4*)&s.dD[row][column] = *(float4*)&s.ddt_bias[row][column] = make_float4(0.f, 0.f, 0.f, 0.f);
    if (tid < CH) {
        const int channel = blockIdx.x * CH + tid;
        s.skip_weight[tid] = channel < p.e ? p.D[channel] : 0.f;
        s.dt_bias[tid] = channel < p.e ? p.dt_bias[channel] : 0.f;
    }
}
// dD and d(dt_bias) of the block's channels, the sums of the 16 rows in order, to (B,S,e,2)
template <class X, int CH> __device__ inline void scan_sum_rows(float* dD_dbias, const ScanTile<X, CH>& s, int64_t segment, int e, int tid) {
    if (tid < 2 * CH && blockIdx.x * CH + tid % CH < e) {
        float sum = 0.f;
        for (int i = 0; i < SCAN_TILE; i++) sum += tid < CH ? s.dD[i][tid] : s.ddt_bias[i][tid - CH];
        dD_dbias[(segment * e + blockIdx.x * CH + tid % CH) * 2 + tid / CH] = sum;
    }
}

// What lanes have in the end: dh_in (B,e,N), if the segment is the sequence's first, and the segment's dA_log (B,S,e,Np)
template <int CH, bool MANY, class X>
__device__ inline void scan_store_lane(const ScanGradients<X>& out, ScanBackwardLane<MANY, CH * SCAN_LANES>& lane, const ScanInput<X>& p,
                                       const ScanWork<MANY>& work, const ScanThread<CH>& me) {
    for (int g = 0; out.dh_in && work.first_tile == 0 && me.channel < p.e && g < work.groups; g++) {
        if (MANY) lane.take(g, me.tid);
        scan_store_states(out.dh_in + (work.sequence * p.e + me.channel) * p.N, me.state(g), p.N, lane.carry);
    }
    for (int g = 0; g < work.groups; g++) {
        if (MANY) {
            lane.take(g, me.tid);
            lane.A2 = scan_load_A(p.A_log, me.channel, me.state(g), p.e, p.N);
        }
        if (me.channel >= p.e) continue;
        ScanStates dA_log;                                            // dA/dA_log = A = A2 ln 2
#pragma unroll
        for (int j = 0; j < 4; j++) dA_log[j] = lane.A2[j] * SCAN_LN2 * lane.dA[j];
        store_vec(out.dA + (work.segment * p.e + me.channel) * work.Np + me.state(g), dA_log);
    }
}

// Grid (channel blocks, B, segments). Shared memory: the tile, then if MANY carry and dA of (groups, threads).
template <class X, int CH, bool VEC, bool MANY>
__global__ void __launch_bounds__(CH * SCAN_LANES, CH == 64 ? (VEC ? 3 : 2) : 1)
selective_scan_backward_kernel(ScanGradients<X> out, ScanInput<X> p) {
    constexpr int THREADS = CH * SCAN_LANES;
    extern __shared__ float4 shared_floats[];
    ScanTile<X, CH>& s = *(ScanTile<X, CH>*)shared_floats;
    const ScanThread<CH> me;
    const ScanWork<MANY> work(p);
    ScanBackwardLane<MANY, THREADS> lane;
    lane.waiting_carry = (ScanStates*)(&s + 1), lane.waiting_dA = lane.waiting_carry + work.groups * THREADS;

    lane.dA = {};
#pragma unroll 2
    for (int g = 0; g < work.groups; g++) {
        lane.carry = {};
        if (out.carry && me.channel < p.e)
            lane.carry = scan_load_states(out.carry + (work.segment * p.e + me.channel) * out.carry_stride, me.state(g),
                                          min(out.carry_stride, p.N), true);
        if (MANY) lane.leave(g, me.tid);
    }
    lane.A2 = scan_load_A(p.A_log, me.channel, me.state(0), p.e, p.N);
    scan_begin(s, p, me.tid, me.row, me.column);
    __syncthreads();
    ScanBackwardRow<X, VEC> next;                                     // of the tile to come
    Vec<X, 4> bc, before;                                             // before: the saved states
    auto load_group = [&](int64_t tile, int g) {
        if (MANY || me.tid < SCAN_BC_THREADS) bc = scan_load_bc<VEC>(p, work.sequence, tile, g);
        before = scan_load<true>(out.saved + work.saved_at(tile, me.channel, p.e), me.state(g), me.channel < p.e ? work.Np : 0);
    };
    auto load_tile = [&](int64_t tile) {
        next.load(p, out.dout, work.sequence, tile, me.row, me.first_channel);
        if (!MANY) load_group(tile, 0);
    };
    load_tile(work.end_tile - 1);
    for (int64_t tile = work.end_tile - 1; tile >= work.first_tile; tile--) {
        const int64_t t = tile * SCAN_TILE + me.row;
        const ScanBackwardRow<X, VEC> now = next;                     // next takes the next tile's
        const bool start = p.is_start(work.sequence, t);
        scan_fill_tile(s, now, t < p.T, start, me.row, me.column);
        for (int g = 0; g < work.groups; g++) {
            if (MANY) {
                if (g > 0) __syncthreads();                           // the group before has been read
                load_group(tile, g);
                lane.A2 = scan_load_A(p.A_log, me.channel, me.state(g), p.e, p.N);
                lane.take(g, me.tid);
            }
            if (me.tid < SCAN_BC_THREADS) scan_put_bc(s.bc, bc);
            store_vec(&s.stage[0][s.at(me.c, me.q)], before);         // read by this thread alone
            __syncthreads();
            if (g == work.groups - 1 && tile > work.first_tile) load_tile(tile - 1);
            scan_sweep(s, lane, out, p, work, me, tile, g);
            if (MANY) lane.leave(g, me.tid);
        }
        scan_finish_tile(s, now, out, p, work.sequence * p.T + t, t < p.T, start, me.row, me.column);
        __syncthreads();                                              // the tile has been read
    }
    scan_store_lane(out, lane, p, work, me);
    scan_sum_rows(out.dD_dbias, s, work.segment, p.e, me.tid);
}

} // namespace gpu
