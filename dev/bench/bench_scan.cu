// Selective scan and convolution: every variant tried, timed and checked.   build/gpu-bf16/bench_scan [quick]
#include "bench.cuh"

using namespace bench;

#ifndef SAMBA_FP32
namespace gpu {

// =====================================================================================================================
// "Warp" variants of the scan, bf16, N = 16. A warp is 16 channels, on its own: no block barrier (backward: one exchange a tile). A thread is
// channels g = lane / 4 and g + 8, and states 2q, 2q+1, 2q+8, 2q+9, q = lane % 4: as bf16 pairs its 8 states are just operand A of mma.m16n8k16,
// so that sums over states are products with a column of C or B, and, transposed (movmatrix), sums over channels are products with a column of dy or dt u.
// Step t of 8 uses column t; the others are zeros, so one accumulator collects 8 steps.

using bf16 = __nv_bfloat16;

__device__ inline uint32_t scan_pack(float low, float high) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
__device__ inline float scan_low(uint32_t v) { return __uint_as_float(v << 16); }
__device__ inline float scan_high(uint32_t v) { return __uint_as_float(v & 0xffff0000u); }
__device__ inline uint32_t scan_transpose(uint32_t m) {
    uint32_t r;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(m));
    return r;
}
__device__ inline void scan_mma_tf32(float (&c)[4], const float (&a)[4], float b0, float b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}
__device__ inline void scan_mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// BYTES (8, 16) from global to shared memory in the background; zeros where !live
template <int BYTES> __device__ inline void scan_copy(void* to, const void* from, bool live) {
    const uint32_t address = (uint32_t)__cvta_generic_to_shared(to);
    if constexpr (BYTES == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(live ? 16 : 0) : "memory");
    else asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(address), "l"(from), "r"(live ? BYTES : 0), "n"(BYTES) : "memory");
}
__device__ inline void scan_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ inline void scan_wait() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

// Shared by both directions. B | C of a step as they come (40: rows in different banks), and as floats in the order of the threads' states
template <int TT> struct WarpBC {
    bf16 rows[2][TT][40];
    float floats[TT][36];
};
template <int TT> __device__ inline void warp_fetch_bc(WarpBC<TT>& s, int stage, const ScanInput<bf16>& p, int64_t sequence, int64_t tile, int lane) {
#pragma unroll
    for (int i = 0; i < TT / 8; i++) {                                // a row is 4 pieces of 16 bytes
        const int k = lane + 32 * i, row = k / 4, piece = k % 4;
        const int64_t t = tile * TT + row, at = sequence * p.T + min(t, p.T - 1);
        scan_copy<16>(&s.rows[stage][row][piece * 8], p.bc + at * p.ldbc + piece * 8, t < p.T);
    }
}
template <int TT> __device__ inline void warp_convert_bc(WarpBC<TT>& s, int stage, int lane) {
    if (lane >= 2 * TT) return;
    const int t = lane / 2, side = lane % 2 * 16;                     // B or C
    const uint4 low = *(const uint4*)&s.rows[stage][t][side], high = *(const uint4*)&s.rows[stage][t][side + 8];
    const uint32_t a[4] = {low.x, low.y, low.z, low.w}, b[4] = {high.x, high.y, high.z, high.w};
#pragma unroll
    for (int q = 0; q < 4; q++) *(float4*)&s.floats[t][side + q * 4] = make_float4(scan_low(a[q]), scan_high(a[q]), scan_low(b[q]), scan_high(b[q]));
}

// The thread's 2 x 4 values of an (e, 16) or (e, stride) array of floats; null: zeros
__device__ inline void warp_load_states(float (&h)[2][4], const float* from, int64_t stride, int channel, int q) {
#pragma unroll
    for (int c = 0; c < 2; c++)
#pragma unroll
        for (int j = 0; j < 4; j++) h[c][j] = from ? from[(int64_t)(channel + 8 * c) * stride + 2 * q + j % 2 + j / 2 * 8] : 0.f;
}
__device__ inline void warp_store_states(float* to, const float (&h)[2][4], int64_t stride, int channel, int q) {
#pragma unroll
    for (int c = 0; c < 2; c++)
#pragma unroll
        for (int j = 0; j < 4; j++) to[(int64_t)(channel + 8 * c) * stride + 2 * q + j % 2 + j / 2 * 8] = h[c][j];
}
// Accumulators of 8 steps (columns) and 16 channels (rows) to rows of shared memory
template <int STRIDE> __device__ inline void warp_store_steps(float (*to)[STRIDE], const float (&sum)[4], int g, int q) {
    to[2 * q][g] = sum[0], to[2 * q + 1][g] = sum[1], to[2 * q][g + 8] = sum[2], to[2 * q + 1][g + 8] = sum[3];
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward. Y_MMA: y from bf16 states on the tensor cores; otherwise fp32 products, and the 4 lanes added by a tf32 product with ones

template <int TT> struct alignas(16) WarpForwardTile {
    bf16 raw[2][3][TT][16];                                           // u, dt_raw, z
    WarpBC<TT> bc;
    float4 pair[TT][9];                                               // of channels c and c + 8: dt, dt, dt u, dt u
    float y[TT][20];
};

template <int TT, bool Y_MMA>
__device__ inline void warp_forward_steps(WarpForwardTile<TT>& s, int stage, float (&h)[2][4], const float (&A2)[2][4], int g, int q) {
#pragma unroll
    for (int t8 = 0; t8 < TT; t8 += 8) {
        float sum[4] = {}, part[4];
        const uint32_t c0 = *(const uint32_t*)&s.bc.rows[stage][t8 + g][16 + 2 * q], c1 = *(const uint32_t*)&s.bc.rows[stage][t8 + g][24 + 2 * q];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float4 v = s.pair[t8 + i][g];
            const auto B = load_vec<4>(&s.bc.floats[t8 + i][q * 4]);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                h[0][j] = fmaf(scan_ex2(v.x * A2[0][j]), h[0][j], v.z * B[j]);
                h[1][j] = fmaf(scan_ex2(v.y * A2[1][j]), h[1][j], v.w * B[j]);
            }
            if constexpr (Y_MMA) {
                const uint32_t a[4] = {scan_pack(h[0][0], h[0][1]), scan_pack(h[1][0], h[1][1]), scan_pack(h[0][2], h[0][3]), scan_pack(h[1][2], h[1][3])};
                scan_mma(sum, a, g == i ? c0 : 0u, g == i ? c1 : 0u);
            } else {
                const auto C = load_vec<4>(&s.bc.floats[t8 + i][16 + q * 4]);
                part[i % 2 * 2] = part[i % 2 * 2 + 1] = 0.f;
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    part[i % 2 * 2] = fmaf(h[0][j], C[j], part[i % 2 * 2]);
                    part[i % 2 * 2 + 1] = fmaf(h[1][j], C[j], part[i % 2 * 2 + 1]);
                }
                if (i % 2) scan_mma_tf32(sum, part, g == i - 1 ? 1.f : 0.f, g == i ? 1.f : 0.f);
            }
        }
        warp_store_steps(&s.y[t8], sum, g, q);
    }
}

template <int WARPS, int MIN_BLOCKS, bool Y_MMA, int TT>
__global__ void __launch_bounds__(WARPS * 32, MIN_BLOCKS)
warp_forward_kernel(bf16* out, bf16* saved, float* h_out, const float* h_first, int h_stride, ScanInput<bf16> p) {
    extern __shared__ float4 shared_floats[];
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4, first_channel = (blockIdx.x * WARPS + threadIdx.x / 32) * 16;
    constexpr int CPL = TT / 2, LPR = 16 / CPL, HALF = CPL / 2;       // channels a lane and lanes a row, for work without states: HALF at r * HALF and HALF 8 further
    WarpForwardTile<TT>& s = ((WarpForwardTile<TT>*)shared_floats)[threadIdx.x / 32];
    if (first_channel >= p.e) return;
    const int64_t sequence = blockIdx.y, segment = sequence * gridDim.z + blockIdx.z, tiles = ceil_div(p.T, TT), first_tile = blockIdx.z * p.segment_tiles;
    const int64_t last_tile = min(first_tile + p.segment_tiles, tiles);
    const int row = lane / LPR, r = lane % LPR, channel = first_channel + g;
    float A2[2][4], h[2][4], D[2][HALF], bias[2][HALF];
    warp_load_states(A2, p.A_log, 16, channel, q);
#pragma unroll
    for (int j = 0; j < 8; j++) A2[j / 4][j % 4] = -expf(A2[j / 4][j % 4]) * SCAN_LOG2E;
    warp_load_states(h, h_first ? h_first + segment * p.e * h_stride : nullptr, h_stride, channel, q);
#pragma unroll
    for (int k = 0; k < CPL; k++) {
        const int c = first_channel + k / HALF * 8 + r * HALF + k % HALF;
        D[k / HALF][k % HALF] = p.D[c], bias[k / HALF][k % HALF] = p.dt_bias[c];
    }
    auto fetch = [&](int64_t tile, int stage) {
        const int64_t t = tile * TT + row, at = sequence * p.T + min(t, p.T - 1);
        const int c = r * CPL;
        scan_copy<CPL * 2>(&s.raw[stage][0][row][c], p.u + at * p.e + first_channel + c, t < p.T);
        scan_copy<CPL * 2>(&s.raw[stage][1][row][c], p.dt_raw + at * p.e + first_channel + c, t < p.T);
        scan_copy<CPL * 2>(&s.raw[stage][2][row][c], p.z + at * p.ldz + first_channel + c, t < p.T);
        warp_fetch_bc<TT>(s.bc, stage, p, sequence, tile, lane);
        scan_commit();
    };
    fetch(first_tile, 0);
    for (int64_t tile = first_tile; tile < last_tile; tile++) {
        const int stage = (int)(tile - first_tile) & 1;
        const int64_t t = tile * TT + row;
        scan_wait();
        __syncwarp();
        if (tile + 1 < last_tile) fetch(tile + 1, stage ^ 1);
        if (saved) {
            uint32_t* to = (uint32_t*)(saved + ((sequence * tiles + tile) * p.e + channel) * 16 + 2 * q);
            to[0] = scan_pack(h[0][0], h[0][1]), to[4] = scan_pack(h[0][2], h[0][3]);
            to[64] = scan_pack(h[1][0], h[1][1]), to[68] = scan_pack(h[1][2], h[1][3]);
        }
#pragma unroll
        for (int k = 0; k < HALF; k++) {
            const int c = r * HALF + k;
            const float dt0 = t < p.T ? scan_softplus<bf16>(to_float(s.raw[stage][1][row][c]) + bias[0][k]) : 0.f;
            const float dt1 = t < p.T ? scan_softplus<bf16>(to_float(s.raw[stage][1][row][c + 8]) + bias[1][k]) : 0.f;
            s.pair[row][c] = make_float4(dt0, dt1, dt0 * to_float(s.raw[stage][0][row][c]), dt1 * to_float(s.raw[stage][0][row][c + 8]));
        }
        warp_convert_bc<TT>(s.bc, stage, lane);
        __syncwarp();
        warp_forward_steps<TT, Y_MMA>(s, stage, h, A2, g, q);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int c = r * HALF + 8 * i;
            const auto u = load_vec<HALF>(&s.raw[stage][0][row][c]), zs = load_vec<HALF>(&s.raw[stage][2][row][c]);
            const auto y = load_vec<HALF>(&s.y[row][c]);
            Vec<bf16, HALF> o;
#pragma unroll
            for (int k = 0; k < HALF; k++) {
                const float z = to_float(zs[k]);
                o[k] = from_float<bf16>(fmaf(D[i][k], to_float(u[k]), y[k]) * z * scan_sigmoid<bf16>(z));
            }
            if (t < p.T) store_vec(out + (sequence * p.T + t) * p.e + first_channel + c, o);
        }
    }
    if (h_out && last_tile == tiles) warp_store_states(h_out + sequence * p.e * 16, h, 16, channel, q);
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward. The states of a tile stay in registers, as bf16 pairs. KEEP: the decays too, in fp32; otherwise they are made again.

template <int TT> struct alignas(16) WarpBackwardTile {
    bf16 raw[2][4][TT][16];                                           // u, dt_raw, z, dout
    WarpBC<TT> bc;
    float4 forward[TT][9], reverse[TT][9];                            // of channels c and c + 8: dt, dt, dt u, dt u; dt, dt, dy, dy
    float dinput[TT][20], ddecay[TT][20];
    float dbc[TT][36];                                                // the warp's sum over its channels
    __device__ float (*y())[20] { return (float (*)[20])forward; }    // in the place of forward, 8 steps at a time when these have been used
};

// Transposes of the four 8 x 8 matrices of a 16 x 16 operand
__device__ inline void warp_transpose(uint32_t (&to)[4], const uint32_t (&a)[4]) {
    to[0] = scan_transpose(a[0]), to[1] = scan_transpose(a[2]), to[2] = scan_transpose(a[1]), to[3] = scan_transpose(a[3]);
}
// The dy (or dt u) of 16 channels at the lane's step, as operand B: channels 2q, 2q+1 and 2q+8, 2q+9
__device__ inline void warp_weights(uint32_t (&b)[2], const float4* row, int q) {
    const float2 v = *(const float2*)&row[2 * q].z, w = *(const float2*)&row[2 * q + 1].z;
    b[0] = scan_pack(v.x, w.x), b[1] = scan_pack(v.y, w.y);
}

template <int TT, bool KEEP> struct WarpHistory {
    uint32_t h[TT + 1][4];
    float a[KEEP ? TT : 1][2][4];
};

// From the state in history.h[0]; fills the rest, y, and dC of the tile
template <int TT, bool KEEP>
__device__ inline void warp_remake(WarpBackwardTile<TT>& s, int stage, WarpHistory<TT, KEEP>& history, const float (&A2)[2][4], int g, int q) {
    float h[2][4];
#pragma unroll
    for (int k = 0; k < 4; k++) h[k % 2][k / 2 * 2] = scan_low(history.h[0][k]), h[k % 2][k / 2 * 2 + 1] = scan_high(history.h[0][k]);
#pragma unroll
    for (int t8 = 0; t8 < TT; t8 += 8) {
        float y[4] = {}, dC[4] = {};
        uint32_t dy[2];
        warp_weights(dy, s.reverse[t8 + g], q);
        const uint32_t c0 = *(const uint32_t*)&s.bc.rows[stage][t8 + g][16 + 2 * q], c1 = *(const uint32_t*)&s.bc.rows[stage][t8 + g][24 + 2 * q];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float4 v = s.forward[t8 + i][g];
            const auto B = load_vec<4>(&s.bc.floats[t8 + i][q * 4]);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float a0 = scan_ex2(v.x * A2[0][j]), a1 = scan_ex2(v.y * A2[1][j]);
                if constexpr (KEEP) history.a[t8 + i][0][j] = a0, history.a[t8 + i][1][j] = a1;
                h[0][j] = fmaf(a0, h[0][j], v.z * B[j]);
                h[1][j] = fmaf(a1, h[1][j], v.w * B[j]);
            }
            uint32_t (&now)[4] = history.h[t8 + i + 1];
            now[0] = scan_pack(h[0][0], h[0][1]), now[1] = scan_pack(h[1][0], h[1][1]), now[2] = scan_pack(h[0][2], h[0][3]), now[3] = scan_pack(h[1][2], h[1][3]);
            scan_mma(y, now, g == i ? c0 : 0u, g == i ? c1 : 0u);
            uint32_t turned[4];
            warp_transpose(turned, now);
            scan_mma(dC, turned, g == i ? dy[0] : 0u, g == i ? dy[1] : 0u);
        }
        __syncwarp();                                                 // the 8 steps of `forward` have been read
        warp_store_steps(s.y() + t8, y, g, q);
        float (*to)[36] = s.dbc + t8;
        to[2 * q][16 + g] = dC[0], to[2 * q + 1][16 + g] = dC[1], to[2 * q][24 + g] = dC[2], to[2 * q + 1][24 + g] = dC[3];
    }
}

// Back through the tile: dinput, ddecay, dB. carry, dA: as in scan_reverse. input: dt u as operand B, for every 8 steps
template <int TT, bool KEEP>
__device__ inline void warp_reverse(WarpBackwardTile<TT>& s, int stage, const WarpHistory<TT, KEEP>& history, const uint32_t (&input)[TT / 8][2],
                                    float (&carry)[2][4], float (&dA)[2][4], const float (&A2)[2][4], int g, int q) {
#pragma unroll
    for (int t8 = TT - 8; t8 >= 0; t8 -= 8) {
        float dinput[4] = {}, ddecay[4] = {}, dB[4] = {}, part[4];
        const uint32_t b0 = *(const uint32_t*)&s.bc.rows[stage][t8 + g][2 * q], b1 = *(const uint32_t*)&s.bc.rows[stage][t8 + g][8 + 2 * q];
#pragma unroll
        for (int i = 7; i >= 0; i--) {
            const float4 v = s.reverse[t8 + i][g];
            const auto C = load_vec<4>(&s.bc.floats[t8 + i][16 + q * 4]);
            float lambda[2][4], decay_sum[2] = {};
#pragma unroll
            for (int c = 0; c < 2; c++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float dt = c ? v.y : v.x, dy = c ? v.w : v.z;
                    const uint32_t before2 = history.h[t8 + i][j / 2 * 2 + c];
                    const float before = j % 2 ? scan_high(before2) : scan_low(before2);
                    lambda[c][j] = fmaf(dy, C[j], carry[c][j]);
                    carry[c][j] = (KEEP ? history.a[KEEP ? t8 + i : 0][c][j] : scan_ex2(dt * A2[c][j])) * lambda[c][j];
                    const float pull = carry[c][j] * before;
                    dA[c][j] = fmaf(dt, pull, dA[c][j]);
                    decay_sum[c] = fmaf(A2[c][j], pull, decay_sum[c]);
                }
            const uint32_t a[4] = {scan_pack(lambda[0][0], lambda[0][1]), scan_pack(lambda[1][0], lambda[1][1]), scan_pack(lambda[0][2], lambda[0][3]), scan_pack(lambda[1][2], lambda[1][3])};
            scan_mma(dinput, a, g == i ? b0 : 0u, g == i ? b1 : 0u);
            uint32_t turned[4];
            warp_transpose(turned, a);
            scan_mma(dB, turned, g == i ? input[t8 / 8][0] : 0u, g == i ? input[t8 / 8][1] : 0u);
            part[i % 2 * 2] = decay_sum[0], part[i % 2 * 2 + 1] = decay_sum[1];
            if (i % 2 == 0) scan_mma_tf32(ddecay, part, g == i ? 1.f : 0.f, g == i + 1 ? 1.f : 0.f);
        }
        warp_store_steps(s.dinput + t8, dinput, g, q);
        warp_store_steps(s.ddecay + t8, ddecay, g, q);
        float (*to)[36] = s.dbc + t8;
        to[2 * q][g] = dB[0], to[2 * q + 1][g] = dB[1], to[2 * q][8 + g] = dB[2], to[2 * q + 1][8 + g] = dB[3];
    }
}

// The rows' part of the gradients, for the lane's HALF channels from c on and those 8 further
template <int TT, int HALF>
__device__ inline void warp_finish(WarpBackwardTile<TT>& s, int stage, const ScanGradients<bf16>& out, const ScanInput<bf16>& p, int64_t at, bool live, int row, int c0, int first_channel,
                                   const float (&D)[2][HALF], const float (&bias)[2][HALF], float (&dD)[2][HALF], float (&ddt_bias)[2][HALF]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int c = c0 + 8 * i;
        const auto us = load_vec<HALF>(&s.raw[stage][0][row][c]), dts = load_vec<HALF>(&s.raw[stage][1][row][c]), zs = load_vec<HALF>(&s.raw[stage][2][row][c]),
                   gs = load_vec<HALF>(&s.raw[stage][3][row][c]);
        const auto ys = load_vec<HALF>(&s.y()[row][c]), dinput = load_vec<HALF>(&s.dinput[row][c]), ddecay = load_vec<HALF>(&s.ddecay[row][c]);
        Vec<bf16, HALF> o, dz, du, ddt;
#pragma unroll
        for (int k = 0; k < HALF; k++) {
            const float4 v = s.reverse[row][c0 + k];
            const float u = to_float(us[k]), z = to_float(zs[k]), gate = scan_sigmoid<bf16>(z), slope = scan_sigmoid<bf16>(to_float(dts[k]) + bias[i][k]);
            const float y = fmaf(D[i][k], u, ys[k]), dt = i ? v.y : v.x, dy = i ? v.w : v.z;
            const float ddt_k = live ? fmaf(dinput[k], u, ddecay[k] * SCAN_LN2) * slope : 0.f;
            o[k] = from_float<bf16>(y * z * gate);
            dz[k] = from_float<bf16>(to_float(gs[k]) * y * gate * (1.f + z * (1.f - gate)));
            du[k] = from_float<bf16>(fmaf(dinput[k], dt, D[i][k] * dy));
            ddt[k] = from_float<bf16>(ddt_k);
            dD[i][k] = fmaf(dy, u, dD[i][k]);
            ddt_bias[i][k] += ddt_k;
        }
        if (!live) continue;
        store_vec(out.out + at * p.e + first_channel + c, o);
        store_vec(out.dz + at * out.lddz + first_channel + c, dz);
        store_vec(out.du + at * p.e + first_channel + c, du);
        store_vec(out.ddt_raw + at * p.e + first_channel + c, ddt);
    }
}
template <int TT, int HALF>
__device__ inline void warp_prepare(WarpBackwardTile<TT>& s, int stage, bool live, int row, int c0, const float (&bias)[2][HALF]) {
    Vec<bf16, HALF> u[2], dt_raw[2], z[2], dout[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        u[i] = load_vec<HALF>(&s.raw[stage][0][row][c0 + 8 * i]), dt_raw[i] = load_vec<HALF>(&s.raw[stage][1][row][c0 + 8 * i]);
        z[i] = load_vec<HALF>(&s.raw[stage][2][row][c0 + 8 * i]), dout[i] = load_vec<HALF>(&s.raw[stage][3][row][c0 + 8 * i]);
    }
#pragma unroll
    for (int k = 0; k < HALF; k++) {
        float dt[2], dy[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            dt[i] = live ? scan_softplus<bf16>(to_float(dt_raw[i][k]) + bias[i][k]) : 0.f;
            dy[i] = to_float(dout[i][k]) * to_float(z[i][k]) * scan_sigmoid<bf16>(to_float(z[i][k]));
        }
        s.forward[row][c0 + k] = make_float4(dt[0], dt[1], dt[0] * to_float(u[0][k]), dt[1] * to_float(u[1][k]));
        s.reverse[row][c0 + k] = make_float4(dt[0], dt[1], dy[0], dy[1]);
    }
}

template <int WARPS, int MIN_BLOCKS, int TT, bool KEEP>
__global__ void __launch_bounds__(WARPS * 32, MIN_BLOCKS) warp_backward_kernel(ScanGradients<bf16> out, ScanInput<bf16> p) {
    extern __shared__ float4 shared_floats[];
    constexpr int CPL = TT / 2, LPR = 16 / CPL, HALF = CPL / 2;
    WarpBackwardTile<TT>* tiles_of_block = (WarpBackwardTile<TT>*)shared_floats;
    WarpBackwardTile<TT>& s = tiles_of_block[threadIdx.x / 32];
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4, first_channel = (blockIdx.x * WARPS + threadIdx.x / 32) * 16, channel = first_channel + g;
    const bool active = first_channel < p.e;
    const int64_t sequence = blockIdx.y, segment = sequence * gridDim.z + blockIdx.z, tiles = ceil_div(p.T, TT), first_tile = blockIdx.z * p.segment_tiles;
    const int64_t last_tile = min(first_tile + p.segment_tiles, tiles);
    const int row = lane / LPR, r = lane % LPR;
    float A2[2][4] = {}, carry[2][4] = {}, dA[2][4] = {}, D[2][HALF], bias[2][HALF], dD[2][HALF] = {}, ddt_bias[2][HALF] = {};
    if (active) {
        warp_load_states(A2, p.A_log, 16, channel, q);
        warp_load_states(carry, out.carry ? out.carry + segment * p.e * 16 : nullptr, 16, channel, q);
#pragma unroll
        for (int k = 0; k < CPL; k++) {
            const int c = first_channel + k / HALF * 8 + r * HALF + k % HALF;
            D[k / HALF][k % HALF] = p.D[c], bias[k / HALF][k % HALF] = p.dt_bias[c];
        }
    } else {
        for (int i = lane; i < TT * 36; i += 32) s.dbc[0][i] = 0.f;
    }
#pragma unroll
    for (int j = 0; j < 8; j++) A2[j / 4][j % 4] = -expf(A2[j / 4][j % 4]) * SCAN_LOG2E;
    uint32_t state[4];
    auto fetch = [&](int64_t tile, int stage) {
        const int64_t t = tile * TT + row, at = sequence * p.T + min(t, p.T - 1);
        const int c = r * CPL;
        const bool live = t < p.T;
        scan_copy<CPL * 2>(&s.raw[stage][0][row][c], p.u + at * p.e + first_channel + c, live);
        scan_copy<CPL * 2>(&s.raw[stage][1][row][c], p.dt_raw + at * p.e + first_channel + c, live);
        scan_copy<CPL * 2>(&s.raw[stage][2][row][c], p.z + at * p.ldz + first_channel + c, live);
        scan_copy<CPL * 2>(&s.raw[stage][3][row][c], out.dout + at * p.e + first_channel + c, live);
        warp_fetch_bc<TT>(s.bc, stage, p, sequence, tile, lane);
        scan_commit();
        const uint32_t* from = (const uint32_t*)(out.saved + ((sequence * tiles + tile) * p.e + channel) * 16 + 2 * q);
        state[0] = from[0], state[1] = from[64], state[2] = from[4], state[3] = from[68];
    };
    if (active) fetch(last_tile - 1, 0);
    int stage = 0;
    for (int64_t tile = last_tile - 1; tile >= first_tile; tile--, stage ^= 1) {
        const int64_t t = tile * TT + row;
        WarpHistory<TT, KEEP> history;
        if (active) {
            scan_wait();
            __syncwarp();
#pragma unroll
            for (int k = 0; k < 4; k++) history.h[0][k] = state[k];
            if (tile > first_tile) fetch(tile - 1, stage ^ 1);
            warp_prepare<TT, HALF>(s, stage, t < p.T, row, r * HALF, bias);
            warp_convert_bc<TT>(s.bc, stage, lane);
        }
        __syncthreads();                                              // dbc of the tile before has been read
        if (active) {
            uint32_t input[TT / 8][2];
#pragma unroll
            for (int i = 0; i < TT / 8; i++) warp_weights(input[i], s.forward[8 * i + g], q);
            warp_remake<TT, KEEP>(s, stage, history, A2, g, q);
            warp_reverse<TT, KEEP>(s, stage, history, input, carry, dA, A2, g, q);
        }
        __syncthreads();
        for (int i = threadIdx.x; i < TT * 8; i += WARPS * 32) {
            float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                const float4 v = *(const float4*)&tiles_of_block[w].dbc[i / 8][i % 8 * 4];
                sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
            }
            const int64_t step = tile * TT + i / 8;
            if (step < p.T) *(float4*)(out.dbc + (((int64_t)blockIdx.x * gridDim.y + sequence) * p.T + step) * 32 + i % 8 * 4) = sum;
        }
        if (active) warp_finish<TT, HALF>(s, stage, out, p, sequence * p.T + t, t < p.T, row, r * HALF, first_channel, D, bias, dD, ddt_bias);
    }
    if (!active) return;
#pragma unroll
    for (int j = 0; j < 8; j++) dA[j / 4][j % 4] *= A2[j / 4][j % 4] * SCAN_LN2;
    warp_store_states(out.dA + segment * p.e * 16, dA, 16, channel, q);
#pragma unroll
    for (int k = 0; k < CPL; k++) {
        float a = dD[k / HALF][k % HALF], b = ddt_bias[k / HALF][k % HALF];
#pragma unroll
        for (int o = 16; o >= LPR; o /= 2) a += __shfl_xor_sync(0xffffffffu, a, o), b += __shfl_xor_sync(0xffffffffu, b, o);
        if (row == 0) *(float2*)(out.dD_dbias + (segment * p.e + first_channel + k / HALF * 8 + r * HALF + k % HALF) * 2) = make_float2(a, b);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Convolution: W channels a thread, rows kept as they come (packed), the next BATCH rows loaded before the present ones are used.

template <int W> __device__ inline Vec<bf16, W> conv_row(const ConvInput<bf16>& p, int64_t sequence, int64_t t, int c) {
    Vec<bf16, W> zero;
#pragma unroll
    for (int k = 0; k < W; k++) zero[k] = from_float<bf16>(0.f);
    if (t >= p.T || (t < 0 && !p.halo)) return zero;
    return load_vec<W>(t < 0 ? p.halo + (sequence * CONV_HALO + t + CONV_HALO) * p.e + c : p.x + (sequence * p.T + t) * p.ldx + c);
}
template <int W, int ROWS, int BATCH, int THREADS, int MIN_BLOCKS>
__global__ void __launch_bounds__(THREADS, MIN_BLOCKS) conv_forward_variant(bf16* u, ConvInput<bf16> p) {
    const int c = (blockIdx.x * THREADS + threadIdx.x) * W;
    const int64_t sequence = blockIdx.z, first = (int64_t)blockIdx.y * ROWS;
    if (c >= p.e) return;
    float w[CONV_WIDTH][W], b[W], x[3][W];
    Vec<bf16, W> next[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; i++) next[i] = conv_row<W>(p, sequence, first + i, c);
#pragma unroll
    for (int i = 0; i < CONV_HALO; i++) {
        const auto v = conv_row<W>(p, sequence, first - CONV_HALO + i, c);
#pragma unroll
        for (int j = 0; j < W; j++) x[i][j] = to_float(v[j]);
    }
#pragma unroll
    for (int j = 0; j < W; j++) {
        const auto v = load_vec<4>(p.w + (int64_t)(c + j) * CONV_WIDTH);
        b[j] = p.b[c + j], w[0][j] = v[0], w[1][j] = v[1], w[2][j] = v[2], w[3][j] = v[3];
    }
#pragma unroll 1
    for (int64_t t0 = first; t0 < first + ROWS && t0 < p.T; t0 += BATCH) {
        Vec<bf16, W> now[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; i++) now[i] = next[i];
        if (t0 + BATCH < first + ROWS)
#pragma unroll
            for (int i = 0; i < BATCH; i++) next[i] = conv_row<W>(p, sequence, t0 + BATCH + i, c);
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            Vec<bf16, W> y;
#pragma unroll
            for (int j = 0; j < W; j++) {
                const float here = to_float(now[i][j]);
                const float s = fmaf(w[3][j], here, fmaf(w[2][j], x[2][j], fmaf(w[1][j], x[1][j], fmaf(w[0][j], x[0][j], b[j]))));
                y[j] = from_float<bf16>(s * scan_sigmoid<bf16>(s));
                x[0][j] = x[1][j], x[1][j] = x[2][j], x[2][j] = here;
            }
            if (t0 + i < p.T) store_vec(u + (sequence * p.T + t0 + i) * p.e + c, y);
        }
    }
}

template <int W, int ROWS, int THREADS, int MIN_BLOCKS>
__global__ void __launch_bounds__(THREADS, MIN_BLOCKS) conv_backward_variant(bf16* dx, int64_t lddx, float* part, const bf16* du, ConvInput<bf16> p) {
    constexpr int BATCH = 4;
    const int c = (blockIdx.x * THREADS + threadIdx.x) * W;
    const int64_t sequence = blockIdx.z, first = (int64_t)blockIdx.y * ROWS;
    if (c >= p.e) return;
    float w[CONV_WIDTH][W], b[W], x[3][W], ds[3][W] = {}, dw[CONV_WIDTH][W] = {}, db[W] = {};
    Vec<bf16, W> next_x[BATCH], next_g[BATCH];
    const ConvInput<bf16> grad{du, nullptr, p.e, p.w, p.b, p.T, p.e};
#pragma unroll
    for (int i = 0; i < BATCH; i++) next_x[i] = conv_row<W>(p, sequence, first + i, c), next_g[i] = conv_row<W>(grad, sequence, first + i, c);
#pragma unroll
    for (int i = 0; i < CONV_HALO; i++) {
        const auto v = conv_row<W>(p, sequence, first - CONV_HALO + i, c);
#pragma unroll
        for (int j = 0; j < W; j++) x[i][j] = to_float(v[j]);
    }
#pragma unroll
    for (int j = 0; j < W; j++) {
        const auto v = load_vec<4>(p.w + (int64_t)(c + j) * CONV_WIDTH);
        b[j] = p.b[c + j], w[0][j] = v[0], w[1][j] = v[1], w[2][j] = v[2], w[3][j] = v[3];
    }
#pragma unroll 1
    for (int i4 = 0; i4 <= ROWS; i4 += BATCH) {
        if (first + i4 - CONV_HALO >= p.T) break;
        Vec<bf16, W> now_x[BATCH], now_g[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; i++) now_x[i] = next_x[i], now_g[i] = next_g[i];
        if (i4 < ROWS)
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                next_x[i] = conv_row<W>(p, sequence, first + i4 + BATCH + i, c);
                next_g[i] = conv_row<W>(grad, sequence, first + i4 + BATCH + i, c);
            }
        const bool own = i4 < ROWS;                                   // otherwise the rows after the block's
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            Vec<bf16, W> y;
#pragma unroll
            for (int j = 0; j < W; j++) {
                const float here = to_float(now_x[i][j]);
                const float s = fmaf(w[3][j], here, fmaf(w[2][j], x[2][j], fmaf(w[1][j], x[1][j], fmaf(w[0][j], x[0][j], b[j]))));
                const float gate = scan_sigmoid<bf16>(s), d = to_float(now_g[i][j]) * gate * (1.f + s * (1.f - gate)), mine = own ? d : 0.f;
                y[j] = from_float<bf16>(fmaf(w[0][j], d, fmaf(w[1][j], ds[2][j], fmaf(w[2][j], ds[1][j], w[3][j] * ds[0][j]))));
                dw[0][j] = fmaf(mine, x[0][j], dw[0][j]), dw[1][j] = fmaf(mine, x[1][j], dw[1][j]);
                dw[2][j] = fmaf(mine, x[2][j], dw[2][j]), dw[3][j] = fmaf(mine, here, dw[3][j]);
                db[j] += mine;
                x[0][j] = x[1][j], x[1][j] = x[2][j], x[2][j] = here;
                ds[0][j] = ds[1][j], ds[1][j] = ds[2][j], ds[2][j] = d;
            }
            const int64_t done = first + i4 + i - CONV_HALO;
            if (done >= first && done < first + ROWS && done < p.T) store_vec(dx + (sequence * p.T + done) * lddx + c, y);
        }
    }
    float* to = part + (sequence * gridDim.y + blockIdx.y) * (CONV_WIDTH + 1) * p.e + c;
#pragma unroll
    for (int k = 0; k < CONV_WIDTH; k++) conv_store<W>(to + (int64_t)k * p.e, dw[k]);
    conv_store<W>(to + (int64_t)CONV_WIDTH * p.e, db);
}
} // namespace gpu
#endif

// =====================================================================================================================
// The benchmark

struct Problem {
    int B;
    int64_t T;
    int e;
    int64_t BT() const { return B * T; }
    double elements() const { return (double)BT() * e; }
};
constexpr int N = 16, GAP = 96, LDBC = GAP + 2 * N;

// Inputs and outputs of one layer, `copies` of the activations
struct Layer {
    Problem s;
    Rotating<floatX> xz, u, dt, bc, out, dout, du, ddt, dxz, dbc;
    Rotating<float> A_log, D, dt_bias, dA, dD, ddt_bias, conv_w, conv_b, dw, db;
    std::vector<void*> saved;
    void* workspace;
    static constexpr int S = 2;                                       // saved bytes as for tiles of 8
    Layer(const Problem& p, int copies)
        : s(p), xz(p.BT() * 2 * p.e, copies, 2.f), u(p.BT() * p.e, copies), dt(p.BT() * p.e, copies, 2.f), bc(p.BT() * LDBC, copies), out(p.BT() * p.e, copies), dout(p.BT() * p.e, copies),
          du(p.BT() * p.e, 2), ddt(p.BT() * p.e, 2), dxz(p.BT() * 2 * p.e, 2), dbc(p.BT() * LDBC, 2), A_log(p.e * N, 1, 2.f), D(p.e, 1), dt_bias(p.e, 1, 3.f), dA(p.e * N, 1, 0.f),
          dD(p.e, 1, 0.f), ddt_bias(p.e, 1, 0.f), conv_w(p.e * 4, 1, 0.5f), conv_b(p.e, 1, 0.5f), dw(p.e * 4, 1, 0.f), db(p.e, 1, 0.f) {
        for (int i = 0; i < copies; i++) saved.push_back(device_alloc(S * gpu::selective_scan_saved(p.B, p.T + 16, p.e, N), "states"));
        workspace = device_alloc(std::max(gpu::selective_scan_workspace(p.B, p.T, p.e, N), gpu::conv1d_backward_workspace(p.B, p.T, p.e)) * 2 + (64 << 20), "workspace");
    }
    ~Layer() {
        for (void* v : saved) cudaFree(v);
        cudaFree(workspace);
    }
    floatX* state(int i) const { return (floatX*)saved[i % saved.size()]; }
    gpu::ScanInput<floatX> input(int i) const { return {u[i], dt[i], bc[i] + GAP, xz[i] + s.e, LDBC, 2 * s.e, A_log[0], D[0], dt_bias[0], s.T, s.e, N, 0}; }
    gpu::ConvInput<floatX> conv(int i) const { return {xz[i], nullptr, 2 * s.e, conv_w[0], conv_b[0], s.T, s.e}; }
};
using Run = std::function<void(const Layer&, int)>;
struct Variant {
    std::string name;
    Run run, before;                                                  // before: what must have run on the same buffers
};

static const float* NO_H = nullptr;
static void forward_default(const Layer& l, int i) {
    const Problem& s = l.s;
    gpu::selective_scan_forward(l.out[i], l.state(i), nullptr, l.u[i], l.dt[i], l.bc[i] + GAP, LDBC, l.xz[i] + s.e, 2 * s.e, l.A_log[0], l.D[0], l.dt_bias[0], NO_H, l.workspace, s.B, s.T, s.e, N, 0);
}
static void backward_default(const Layer& l, int i) {
    const Problem& s = l.s;
    gpu::selective_scan_backward(l.du[i], l.ddt[i], l.dxz[i] + s.e, 2 * s.e, l.dbc[i] + GAP, LDBC, l.out[i], l.dA[0], l.dD[0], l.ddt_bias[0], l.dout[i], l.u[i], l.dt[i], l.bc[i] + GAP, LDBC,
                                 l.xz[i] + s.e, 2 * s.e, l.A_log[0], l.D[0], l.dt_bias[0], NO_H, l.state(i), l.workspace, s.B, s.T, s.e, N, 0);
}
static void conv_forward_default(const Layer& l, int i) {
    gpu::conv1d_forward(l.u[i], nullptr, l.xz[i], 2 * l.s.e, nullptr, l.conv_w[0], l.conv_b[0], l.s.B, l.s.T, l.s.e, 0);
}
static void conv_backward_default(const Layer& l, int i) {
    gpu::conv1d_backward(l.dxz[i], 2 * l.s.e, l.dw[0], l.db[0], l.dout[i], l.xz[i], 2 * l.s.e, nullptr, l.conv_w[0], l.conv_b[0], l.workspace, l.s.B, l.s.T, l.s.e, 0);
}

#ifndef SAMBA_FP32
// Segments (in tiles of `tile` steps) that fill `slots` resident blocks a multiprocessor
static gpu::ScanSegments variant_segments(const Problem& s, int64_t blocks, int slots, int tile) {
    const int64_t places = (int64_t)device_info().sm_count * slots, tiles = ceil_div(s.T, 16);
    int64_t count = blocks * s.B * 2 > places ? 1 : places / (blocks * s.B);
    count = std::max<int64_t>(1, std::min(count, tiles / 8));
    int64_t length = ceil_div(tiles, count);
    count = ceil_div(tiles, length);
    (void)tile;
    return {count, length};                                           // of 16 steps
}
// Where the segments' states and partial sums are: after each other in the workspace
struct Space {
    float *end, *time, *dbc, *dA, *dD;
    Space(const Layer& l, int64_t count, int64_t blocks) {
        float* at = (float*)l.workspace;
        auto take = [&](int64_t n) { float* p = at; at += round_up(n, 64); return p; };
        const int64_t chains = l.s.B * count * l.s.e;
        end = take(chains * 16), time = take(chains), dA = take(chains * 16), dD = take(chains * 2), dbc = take(blocks * l.s.BT() * 32);
    }
};
template <int WARPS, int MIN_BLOCKS, bool Y_MMA, int TT> static void forward_warp(const Layer& l, int i) {
    using namespace gpu;
    const int64_t blocks = ceil_div(l.s.e, WARPS * 16);
    const ScanSegments segments = variant_segments(l.s, blocks, MIN_BLOCKS, TT);
    const Space space(l, segments.count, 0);
    ScanInput<floatX> p = l.input(i);
    p.segment_tiles = segments.tiles;
    if (segments.count > 1) scan_chain_segments<floatX, true, false>(space.end, space.time, nullptr, nullptr, p, l.s.B, segments, 0);
    p.segment_tiles = segments.tiles * 16 / TT;
    const size_t shared = WARPS * sizeof(WarpForwardTile<TT>);
    auto kernel = warp_forward_kernel<WARPS, MIN_BLOCKS, Y_MMA, TT>;
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    kernel<<<dim3((unsigned)blocks, l.s.B, (unsigned)segments.count), WARPS * 32, shared>>>(l.out[i], l.state(i), nullptr, segments.count > 1 ? space.end : nullptr, 16, p);
    LAUNCH_CHECK();
}
static void forward_merge(const Layer& l, int i) {
    using namespace gpu;
    const ScanSegments segments = scan_segments(l.s.B, l.s.T, l.s.e);
    const Space space(l, segments.count, 0);
    ScanInput<floatX> p = l.input(i);
    p.segment_tiles = segments.tiles;
    if (segments.count > 1) scan_chain_segments<floatX, true, false>(space.end, space.time, nullptr, nullptr, p, l.s.B, segments, 0);
    selective_scan_forward_kernel<floatX, true, false, true><<<dim3((unsigned)ceil_div(l.s.e, 32), l.s.B, (unsigned)segments.count), 128>>>(
        l.out[i], l.state(i), nullptr, segments.count > 1 ? space.end : nullptr, 16, p);
    LAUNCH_CHECK();
}
template <class Kernel> static void backward_any(Kernel kernel, int channels, int threads, size_t shared, int slots, int tile, const Layer& l, int i) {
    using namespace gpu;
    const int64_t blocks = ceil_div(l.s.e, channels);
    const ScanSegments segments = variant_segments(l.s, blocks, slots, tile);
    const Space space(l, segments.count, blocks);
    ScanInput<floatX> p = l.input(i);
    p.segment_tiles = segments.tiles;
    ScanGradients<floatX> out{l.du[i], l.ddt[i], l.dxz[i] + l.s.e, l.out[i], 2 * l.s.e, l.dout[i], l.state(i), nullptr, space.dbc, space.dA, space.dD};
    if (segments.count > 1) {
        scan_chain_segments<floatX, true, true>(space.end, space.time, nullptr, out.dout, p, l.s.B, segments, 0);
        out.carry = space.end;
    }
    p.segment_tiles = segments.tiles * 16 / tile;
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    kernel<<<dim3((unsigned)blocks, l.s.B, (unsigned)segments.count), threads, shared>>>(out, p);
    LAUNCH_CHECK();
    const int64_t rows = l.s.BT();
    scan_add_dbc_kernel<<<(unsigned)ceil_div(rows * 8, 256), 256>>>(l.dbc[i] + GAP, LDBC, space.dbc, blocks, rows, N, 16);
    scan_add_parameters_kernel<256><<<(unsigned)ceil_div((int64_t)l.s.e * 16, 256), 256>>>(l.dA[0], l.dD[0], l.ddt_bias[0], space.dA, space.dD, l.s.B * segments.count, l.s.e, N, 16);
    LAUNCH_CHECK();
}
template <int WARPS, int MIN_BLOCKS, int TT, bool KEEP> static void backward_warp(const Layer& l, int i) {
    backward_any(gpu::warp_backward_kernel<WARPS, MIN_BLOCKS, TT, KEEP>, WARPS * 16, WARPS * 32, WARPS * sizeof(gpu::WarpBackwardTile<TT>), MIN_BLOCKS, TT, l, i);
}
static void backward_merge(const Layer& l, int i) {
    backward_any(gpu::selective_scan_backward_kernel<floatX, 64, true, false, true>, 64, 256, sizeof(gpu::ScanTile<floatX, 64>), 3, 16, l, i);
}
template <int W, int ROWS, int BATCH, int THREADS, int MIN_BLOCKS> static void conv_forward(const Layer& l, int i) {
    gpu::conv_forward_variant<W, ROWS, BATCH, THREADS, MIN_BLOCKS><<<dim3((unsigned)ceil_div(l.s.e, W * THREADS), (unsigned)ceil_div(l.s.T, ROWS), l.s.B), THREADS>>>(l.u[i], l.conv(i));
    LAUNCH_CHECK();
}
template <int W, int ROWS, int THREADS, int MIN_BLOCKS> static void conv_backward(const Layer& l, int i) {
    const int64_t parts = ceil_div(l.s.T, ROWS);
    gpu::conv_backward_variant<W, ROWS, THREADS, MIN_BLOCKS>
        <<<dim3((unsigned)ceil_div(l.s.e, W * THREADS), (unsigned)parts, l.s.B), THREADS>>>(l.dxz[i], 2 * l.s.e, (float*)l.workspace, l.dout[i], l.conv(i));
    gpu::conv1d_add_parts_kernel<32><<<dim3((unsigned)ceil_div(l.s.e, WARP), 5), dim3(WARP, 32)>>>(l.dw[0], l.db[0], (float*)l.workspace, l.s.B * parts, l.s.e);
    LAUNCH_CHECK();
}
#endif

static std::vector<double> read(const void* p, int64_t n, bool is_float) {
    std::vector<double> to(n);
    if (is_float) {
        std::vector<float> v(n);
        CUDA_CHECK(cudaMemcpy(v.data(), p, n * 4, cudaMemcpyDeviceToHost));
        for (int64_t i = 0; i < n; i++) to[i] = v[i];
    } else {
        std::vector<floatX> v(n);
        CUDA_CHECK(cudaMemcpy(v.data(), p, n * sizeof(floatX), cudaMemcpyDeviceToHost));
        for (int64_t i = 0; i < n; i++) to[i] = to_float(v[i]);
    }
    return to;
}
static double distance(const std::vector<double>& a, const std::vector<double>& b) {
    double d = 0, n = 0;
    for (size_t i = 0; i < a.size(); i++) {
        if (!std::isfinite(a[i])) return INFINITY;
        d += (a[i] - b[i]) * (a[i] - b[i]), n += b[i] * b[i];
    }
    return std::sqrt(d / (n > 0 ? n : 1));
}
static std::vector<double> columns(const std::vector<double>& v, int64_t ld, int64_t first, int64_t count) {
    std::vector<double> to;
    for (size_t i = 0; i < v.size(); i++)
        if ((int64_t)i % ld >= first && (int64_t)i % ld < first + count) to.push_back(v[i]);
    return to;
}

// The results of one run on buffers 0, parameters' gradients from zero. kind: 0 scan forward, 1 scan backward, 2 conv forward, 3 conv backward
using Results = std::vector<std::pair<std::string, std::vector<double>>>;
static Results results(const Layer& l, const Variant& v, int kind) {
    const int64_t BT = l.s.BT(), e = l.s.e, rows = std::min<int64_t>(BT, 600), first = BT - rows;      // of long arrays the last rows
    for (float* p : {l.dD[0], l.ddt_bias[0], l.db[0]}) CUDA_CHECK(cudaMemset(p, 0, e * 4));
    CUDA_CHECK(cudaMemset(l.dA[0], 0, e * N * 4));
    CUDA_CHECK(cudaMemset(l.dw[0], 0, e * 4 * 4));
    if (v.before) v.before(l, 0);
    for (floatX* p : {l.du[0], l.ddt[0]}) CUDA_CHECK(cudaMemset(p, 255, BT * e * sizeof(floatX)));
    CUDA_CHECK(cudaMemset(l.out[0], 255, BT * e * sizeof(floatX)));
    CUDA_CHECK(cudaMemset(l.dbc[0], 255, BT * LDBC * sizeof(floatX)));
    CUDA_CHECK(cudaMemset(l.dxz[0], 255, BT * 2 * e * sizeof(floatX)));
    v.run(l, 0);
    CUDA_CHECK(cudaDeviceSynchronize());
    if (kind == 0) return {{"out", read(l.out[0] + first * e, rows * e, false)}};
    if (kind == 2) return {{"u", read(l.u[0] + first * e, rows * e, false)}};
    if (kind == 3) return {{"dx", columns(read(l.dxz[0] + first * 2 * e, rows * 2 * e, false), 2 * e, 0, e)}, {"dw", read(l.dw[0], e * 4, true)}, {"db", read(l.db[0], e, true)}};
    return {{"out", read(l.out[0] + first * e, rows * e, false)}, {"du", read(l.du[0] + first * e, rows * e, false)}, {"ddt", read(l.ddt[0] + first * e, rows * e, false)},
            {"dz", columns(read(l.dxz[0] + first * 2 * e, rows * 2 * e, false), 2 * e, e, e)}, {"dbc", columns(read(l.dbc[0] + first * LDBC, rows * LDBC, false), LDBC, GAP, 2 * N)}, {"dA", read(l.dA[0], e * N, true)},
            {"dD", read(l.dD[0], e, true)}, {"dbias", read(l.ddt_bias[0], e, true)}};
}
// The twin in double on the same inputs
static Results twin(const Layer& l, int kind) {
    const auto& [B, T, e] = l.s;
    const int64_t BT = B * T;
    const auto xz = read(l.xz[0], BT * 2 * e, false), u = read(l.u[0], BT * e, false), dt = read(l.dt[0], BT * e, false), bc = read(l.bc[0], BT * LDBC, false), dout = read(l.dout[0], BT * e, false);
    const auto A_log = read(l.A_log[0], e * N, true), D = read(l.D[0], e, true), bias = read(l.dt_bias[0], e, true), w = read(l.conv_w[0], e * 4, true), b = read(l.conv_b[0], e, true);
    std::vector<double> out(BT * e), du(BT * e), ddt(BT * e), dxz(BT * 2 * e), dbc(BT * LDBC), dA(e * N), dD(e), dbias(e), dw(e * 4), db(e);
    const double* none = nullptr;
    double* nowhere = nullptr;
    std::vector<char> saved(cpu::selective_scan_saved(B, T, e, N)), space(std::max(cpu::selective_scan_workspace(B, T, e, N), cpu::conv1d_backward_workspace(B, T, e)) * 2);
    if (kind == 2) {
        cpu::conv1d_forward(out.data(), nowhere, xz.data(), 2 * e, none, w.data(), b.data(), B, T, e);
        return {{"u", out}};
    }
    if (kind == 3) {
        cpu::conv1d_backward(dxz.data(), 2 * e, dw.data(), db.data(), dout.data(), xz.data(), 2 * e, none, w.data(), b.data(), space.data(), B, T, e);
        return {{"dx", columns(dxz, 2 * e, 0, e)}, {"dw", dw}, {"db", db}};
    }
    cpu::selective_scan_forward(out.data(), saved.data(), nowhere, u.data(), dt.data(), bc.data() + GAP, LDBC, xz.data() + e, 2 * e, A_log.data(), D.data(), bias.data(), none, space.data(), B, T, e, N);
    if (kind == 0) return {{"out", out}};
    cpu::selective_scan_backward(du.data(), ddt.data(), dxz.data() + e, 2 * e, dbc.data() + GAP, LDBC, out.data(), dA.data(), dD.data(), dbias.data(), dout.data(), u.data(), dt.data(),
                                 bc.data() + GAP, LDBC, xz.data() + e, 2 * e, A_log.data(), D.data(), bias.data(), none, saved.data(), space.data(), B, T, e, N);
    return {{"out", out}, {"du", du}, {"ddt", ddt}, {"dz", columns(dxz, 2 * e, e, e)}, {"dbc", columns(dbc, LDBC, GAP, 2 * N)}, {"dA", dA}, {"dD", dD}, {"dbias", dbias}};
}
static void compare(const std::string& name, const Results& got, const Results& want) {
    printf("  %-40s", name.c_str());
    for (size_t i = 0; i < got.size(); i++) printf(" %s %.1e", got[i].first.c_str(), distance(got[i].second, want[i].second));
    printf("\n");
    fflush(stdout);
}

static std::vector<Variant> variants(int kind) {
    std::vector<Variant> v;
    if (kind == 0) v.push_back({"scan forward: default", forward_default, {}});
    if (kind == 1) v.push_back({"scan backward: default", backward_default, forward_default});
    if (kind == 2) v.push_back({"conv forward: default", conv_forward_default, {}});
    if (kind == 3) v.push_back({"conv backward: default", conv_backward_default, {}});
#ifndef SAMBA_FP32
    if (kind == 0) {
        v.push_back({"merged shared-memory reads", forward_merge, {}});
        v.push_back({"warp, y by bf16 mma, 3 blocks", forward_warp<4, 3, true, 16>, {}});
        v.push_back({"warp, y fp32 + tf32 lanes, 3 blocks", forward_warp<4, 3, false, 16>, {}});
        v.push_back({"warp, y fp32 + tf32 lanes, 1 warp x 12", forward_warp<1, 12, false, 16>, {}});
        v.push_back({"warp, y by bf16 mma, tile of 8", forward_warp<4, 3, true, 8>, {}});
    }
    if (kind == 1) {
        v.push_back({"merged shared-memory reads", backward_merge, forward_default});
        v.push_back({"warp, tile 16, decay remade, 64 ch x 3", backward_warp<4, 3, 16, false>, forward_default});
        v.push_back({"warp, tile 16, decay remade, 32 ch x 6", backward_warp<2, 6, 16, false>, forward_default});
        v.push_back({"warp, tile 16, decay remade, 64 ch x 2", backward_warp<4, 2, 16, false>, forward_default});
        v.push_back({"warp, tile 8, decay kept, 64 ch x 3", backward_warp<4, 3, 8, true>, forward_warp<4, 3, true, 8>});
        v.push_back({"warp, tile 8, decay remade, 64 ch x 4", backward_warp<4, 4, 8, false>, forward_warp<4, 3, true, 8>});
    }
    if (kind == 2) {
        v.push_back({"8 channels, 16 rows, 2 ahead", conv_forward<8, 16, 2, 128, 4>, {}});
        v.push_back({"4 channels, 16 rows, 4 ahead", conv_forward<4, 16, 4, 128, 6>, {}});
        v.push_back({"4 channels, 32 rows, 4 ahead", conv_forward<4, 32, 4, 256, 3>, {}});
        v.push_back({"4 channels, 64 rows, 8 ahead", conv_forward<4, 64, 8, 128, 4>, {}});
        v.push_back({"2 channels, 32 rows, 8 ahead", conv_forward<2, 32, 8, 256, 3>, {}});
    }
    if (kind == 3) {
        v.push_back({"4 channels, 64 rows, 4 blocks", conv_backward<4, 64, 128, 4>, {}});
        v.push_back({"4 channels, 32 rows, 4 blocks", conv_backward<4, 32, 128, 4>, {}});
        v.push_back({"2 channels, 64 rows, 6 blocks", conv_backward<2, 64, 128, 6>, {}});
        v.push_back({"2 channels, 128 rows, 6 blocks", conv_backward<2, 128, 128, 6>, {}});
    }
#endif
    return v;
}

static void check(const Problem& s) {
    Layer l(s, 1);
    printf("relative L2 distance from the twin in double, B=%d T=%lld e=%d\n", s.B, (long long)s.T, s.e);
    for (int kind : {0, 1, 3, 2}) {                                   // conv forward last: it writes u
        const Results want = twin(l, kind);
        for (const Variant& v : variants(kind)) compare(v.name, results(l, v, kind), want);
    }
}
// % of the bound that binds: kernels.md 1.2, clock 1.755 GHz assumed: special functions forward, instruction issue (20 a state) backward, memory (4.2 TB/s) for conv
static void time_all(const Problem& s) {
    const double processors = device_info().sm_count, states = s.elements() * 16;
    const double bound[4] = {states * 19 / 16 / (processors * 16 * 1.755e9) * 1e3, states * 20 / (processors * 128 * 1.755e9) * 1e3, s.elements() * 2 * sizeof(floatX) / 4.2e12 * 1e3,
                             s.elements() * 3 * sizeof(floatX) / 4.2e12 * 1e3};
    const double bytes[4] = {s.elements() * sizeof(floatX) * 5, s.elements() * sizeof(floatX) * 9, s.elements() * sizeof(floatX) * 2, s.elements() * sizeof(floatX) * 3};
    Layer l(s, 3);
    printf("\nB=%d T=%lld e=%d\n%-44s %8s %8s %8s %8s %8s  difference from the default\n", s.B, (long long)s.T, s.e, "", "ms", "fastest", "slowest", "% bound", "GB/s");
    for (int kind : {0, 1, 3, 2}) {
        const auto all = variants(kind);
        Results first;
        for (const Variant& v : all) {
            for (int i = 0; i < 3 && v.before; i++) v.before(l, i);
            const Time t = time_ms([&](int i) { v.run(l, i); }, 20, 4);
            Results got = results(l, v, kind);
            if (first.empty()) first = got;
            double worst = 0;
            for (size_t i = 0; i < got.size(); i++) worst = std::max(worst, distance(got[i].second, first[i].second));
            printf("%-44s %8.4f %8.4f %8.4f %7.1f%% %8.0f  %.1e\n", v.name.c_str(), t.median, t.fastest, t.slowest, 100 * bound[kind] / t.median, bytes[kind] / t.median * 1e-6, worst);
            fflush(stdout);
        }
    }
}

int main(int argc, char** argv) {
    try {
        printf("%s, %s\n", device_info().name.c_str(), BUILD_NAME);
        check({2, 300, 208});
        time_all({8, 4096, 3072});
        if (argc > 1) return 0;
        time_all({1, 32768, 3072});
        time_all({4, 4096, 4608});
        time_all({64, 512, 3072});
    } catch (const std::exception& error) {
        fprintf(stderr, "error: %s\n", error.what());
        return 1;
    }
}
