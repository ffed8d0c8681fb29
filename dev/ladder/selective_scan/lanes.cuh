// Program 4's kernel: four lanes share a channel and keep 4 of its 16 states each. Programs 5 to 7 build on it.
#pragma once
#include "tile.cuh"

namespace scan {

constexpr int LANES = 4;                               // of a channel: lane q has states 4q to 4q + 3
constexpr int CHANNELS = 32, THREADS = CHANNELS * LANES;

// v[i]: this lane's part of a sum for step i of 4. Lane q of the four gets the whole sum for step q, in 3 shuffles instead of
// the 8 of a butterfly for each step: in every round a lane gives away the half that it will not own.
__device__ inline float sum_lanes(const float (&v)[4], int q) {
    const bool odd = q & 1, high = q & 2;
    const float low = (odd ? v[1] : v[0]) + __shfl_xor_sync(0xffffffffu, odd ? v[0] : v[1], 1);      // step 0 or 1
    const float top = (odd ? v[3] : v[2]) + __shfl_xor_sync(0xffffffffu, odd ? v[2] : v[3], 1);      // step 2 or 3
    return (high ? top : low) + __shfl_xor_sync(0xffffffffu, high ? low : top, 2);
}

// Forward through a tile. keep(t, h) sees the states after every step; finish(t, y) is called by the one lane that has
// y_t = sum_n C_n h_n. UNROLL: all 16 steps, so that what keep() writes may be registers.
template <bool UNROLL, class Tile, class Keep, class Finish>
__device__ inline void scan_tile(const Tile& s, float (&h)[4], const float (&A2)[4], int c, int q, Keep keep, Finish finish) {
#pragma unroll (UNROLL ? 4 : 1)
    for (int t4 = 0; t4 < STEPS; t4 += 4) {
        float y[4] = {};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int t = t4 + i;
            const auto B = load_vec<4>(&s.bc[t][q * 4]), C = load_vec<4>(&s.bc[t][N + q * 4]);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                h[j] = fmaf(ex2(s.dt[t][c] * A2[j]), h[j], s.input[t][c] * B[j]);
                y[i] = fmaf(h[j], C[j], y[i]);
            }
            keep(t, h);
        }
        finish(t4 + q, sum_lanes(y, q));
    }
}

__device__ inline Vec<bf16, 4> pack(const float (&x)[4]) {
    Vec<bf16, 4> v;
#pragma unroll
    for (int j = 0; j < 4; j++) v[j] = from_float<bf16>(x[j]);
    return v;
}

// Grid (e / 32, B, segments of segment_tiles tiles). h_first (B,segments,e,N), or null for zeros. saved (B,T/16,e,N), or null:
// h before every tile, for the backward pass.
__global__ void __launch_bounds__(THREADS) lanes_forward_kernel(Inputs p, bf16* out, bf16* saved, const float* h_first, int64_t segment_tiles) {
    __shared__ Tile<CHANNELS, 3, THREADS> s;
    const int c = threadIdx.x / LANES, q = threadIdx.x % LANES, first_channel = blockIdx.x * CHANNELS, channel = first_channel + c;
    const int64_t tiles = p.s.T / STEPS, first_tile = blockIdx.z * segment_tiles, last_tile = min(first_tile + segment_tiles, tiles);
    const int64_t sequence = blockIdx.y, segment = sequence * gridDim.z + blockIdx.z;
    auto first_row = [&](int64_t tile) { return sequence * p.s.T + tile * STEPS; };
    float A2[4], h[4] = {};
    load_A2(A2, p.A_log, channel, q * 4);
    for (int j = 0; h_first && j < 4; j++) h[j] = h_first[(segment * p.s.e + channel) * N + q * 4 + j];
    const float D = p.D[channel];
    s.fetch(p, first_tile & 1, first_row(first_tile), first_channel);
    for (int64_t tile = first_tile; tile < last_tile; tile++) {
        const int stage = tile & 1;
        s.arrive();
        if (tile + 1 < last_tile) s.fetch(p, stage ^ 1, first_row(tile + 1), first_channel);
        s.prepare(p, stage, first_channel);
        if (saved) store_vec(saved + ((sequence * tiles + tile) * p.s.e + channel) * N + q * 4, pack(h));
        __syncthreads();
        scan_tile<false>(s, h, A2, c, q, [](int, const float (&)[4]) {}, [&](int t, float y) {
            bf16& z = s.rows[stage][Z][t][c];
            z = from_float<bf16>(fmaf(D, to_float(s.rows[stage][U][t][c]), y) * silu(to_float(z)));
        });
        __syncthreads();
        s.store(out, stage, Z, first_row(tile), first_channel, p.s.e);
    }
}
inline void lanes_forward(const Inputs& p, bf16* out, void* saved) {
    lanes_forward_kernel<<<dim3(p.s.e / CHANNELS, p.s.B), THREADS>>>(p, out, (bf16*)saved, nullptr, p.s.T / STEPS);
    LAUNCH_CHECK();
}

} // namespace scan
