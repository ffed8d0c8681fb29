// 6. Saved states and recomputation. The backward pass runs from the last step to the first and needs h_(t-1) at every step. To keep all of
// them would be 32 bytes for each (t, c) in bf16, four times what the forward pass moves at all; to invert the recurrence would
// divide by decays that may be e^-50. So forward saves every 16th state, 2 bytes for each (t, c), and backward takes the tiles from the last
// to the first, runs each forward again from its saved state, keeps the 16 states of its 4 in registers, and goes back through them.
//
// dB and dC are sums over all channels (equations 8 and 9). A butterfly of shuffles adds the 8 channels of a warp, shared memory the 4
// warps of a block, and a second kernel the 96 blocks, in a fixed order: two runs give the same bits. (mamba_ssm adds each product
// to memory with an atomic instruction, 3.2 billion of them at this size, in whatever order they come.)
//
// What limits it: the shuffles. Three for each state in dB and three in dC: 6 for each update of a unit that does 32 lanes a clock,
// 1.3 ms, and each comes with an add: with them an update takes 41 instructions.
#include "backward.cuh"

namespace scan {

// Over the 8 channels of a warp: lanes that differ in bits 2 to 4
__device__ inline float sum_channels_of_warp(float x) {
#pragma unroll
    for (int o = LANES; o < WARP; o *= 2) x += __shfl_xor_sync(0xffffffffu, x, o);
    return x;
}

__global__ void __launch_bounds__(THREADS) backward_kernel(Inputs p, Outputs r, float* dbc_parts, float* parameter_parts) {
    __shared__ BackwardTile<CHANNELS> s;
    __shared__ __align__(16) float sums[THREADS / WARP][STEPS][2 * N];                   // dB | dC over the channels of a warp
    const int c = threadIdx.x / LANES, q = threadIdx.x % LANES, first_channel = blockIdx.x * CHANNELS, channel = first_channel + c;
    const int64_t sequence = blockIdx.y, tiles = p.s.T / STEPS;
    auto first_row = [&](int64_t tile) { return sequence * p.s.T + tile * STEPS; };
    auto load_state = [&](int64_t tile) { return load_vec<4>((const bf16*)r.saved + ((sequence * tiles + tile) * p.s.e + channel) * N + q * 4); };
    LaneGradients lane(p, channel, q);
    s.fetch(p, (tiles - 1) & 1, first_row(tiles - 1), first_channel);
    auto next = load_state(tiles - 1);
    for (int64_t tile = tiles - 1; tile >= 0; tile--) {
        const int stage = tile & 1;
        const auto state = next;
        s.arrive();
        if (tile > 0) {
            s.fetch(p, stage ^ 1, first_row(tile - 1), first_channel);
            next = load_state(tile - 1);
        }
        s.prepare(p, stage, first_channel);
        __syncthreads();
        float h[4] = {to_float(state[0]), to_float(state[1]), to_float(state[2]), to_float(state[3])};
        Vec<float, 4> history[STEPS + 1];                             // [t + 1]: h_t; registers, since all loops over t are unrolled
        history[0] = {h[0], h[1], h[2], h[3]};
        remake_tile<true>(s, stage, h, lane, c, q, [&](int t, const float (&now)[4]) { history[t + 1] = {now[0], now[1], now[2], now[3]}; });
        reverse_tile<true>(s, stage, lane, c, q, [&](int t) { return history[t]; }, [&](int t, const float (&lambda)[4]) {
            Vec<float, 4> dB, dC;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                dB[j] = sum_channels_of_warp(lambda[j] * s.input[t][c]);                                          // (9)
                dC[j] = sum_channels_of_warp(history[t + 1][j] * s.dy[t][c]);                                     // (8)
            }
            if (threadIdx.x % WARP < LANES) {
                store_vec(&sums[threadIdx.x / WARP][t][q * 4], dB);
                store_vec(&sums[threadIdx.x / WARP][t][N + q * 4], dC);
            }
        });
        __syncthreads();
        each<STEPS * 2 * N, THREADS>([&](int i) {
            const int t = i / (2 * N), n = i % (2 * N);
            dbc_parts[(blockIdx.x * p.s.rows() + first_row(tile) + t) * 2 * N + n] =
                (sums[0][t][n] + sums[1][t][n]) + (sums[2][t][n] + sums[3][t][n]);
        });
        s.store_results(r, stage, first_row(tile), first_channel, p.s.e);
    }
    store_parameters(parameter_parts, lane, (int)sequence, channel, q, p.s.e);
}

static size_t scratch_bytes(const Sizes& s) { return (dbc_part_floats(s, CHANNELS) + parameter_part_floats(s)) * sizeof(float); }

} // namespace scan

int main() {
    using namespace scan;
    return run({"6 saved states, recomputed",
                [](const Inputs& p, const Outputs& r) { lanes_forward(p, r.out, r.saved); },
                [](const Inputs& p, const Outputs& r) {
                    float *dbc_parts = (float*)r.scratch, *parameter_parts = dbc_parts + dbc_part_floats(p.s, CHANNELS);
                    backward_kernel<<<dim3(p.s.e / CHANNELS, p.s.B), THREADS>>>(p, r, dbc_parts, parameter_parts);
                    LAUNCH_CHECK();
                    add_parts(p, r, dbc_parts, parameter_parts, CHANNELS);
                },
                states_bytes, scratch_bytes});
}
