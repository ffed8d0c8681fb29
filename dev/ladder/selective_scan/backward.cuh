// The backward pass of one tile, used by programs 6 and 7, which differ in where the states of a tile are kept and in how
// dB and dC are summed over channels. Equation numbers: README.md.
#pragma once
#include "lanes.cuh"

namespace scan {

template <int CHANNELS> struct BackwardTile : Tile<CHANNELS, 4, CHANNELS * LANES> {
    float dy[STEPS][CHANNELS];

    __device__ void prepare(const Inputs& p, int stage, int first_channel) {
        Tile<CHANNELS, 4, CHANNELS * LANES>::prepare(p, stage, first_channel);
        each<STEPS * CHANNELS, CHANNELS * LANES>([&](int i) {
            const int t = i / CHANNELS, c = i % CHANNELS;
            dy[t][c] = to_float(this->rows[stage][DOUT][t][c]) * silu(to_float(this->rows[stage][Z][t][c]));      // (5)
        });
    }
    // du, ddt_raw, dz and out, where u, dt_raw, z and dout were
    __device__ void store_results(const Outputs& r, int stage, int64_t first_row, int first_channel, int e) const {
        this->store(r.du, stage, U, first_row, first_channel, e);
        this->store(r.ddt_raw, stage, DT_RAW, first_row, first_channel, e);
        this->store(r.dz, stage, Z, first_row, first_channel, e);
        this->store(r.out, stage, DOUT, first_row, first_channel, e);
    }
};

// What a lane keeps of its channel and 4 states from the last tile to the first
struct LaneGradients {
    float A2[4], D, dt_bias;
    float carry[4] = {};                               // a_(t+1) lambda_(t+1)
    float dA[4] = {}, dD = 0.f, ddt_bias = 0.f;        // the last two: of the steps that this lane finishes
    __device__ LaneGradients(const Inputs& p, int channel, int q) : D(p.D[channel]), dt_bias(p.dt_bias[channel]) {
        load_A2(A2, p.A_log, channel, q * 4);
    }
};

// Forward again from the saved h: keep(t, h_t) gets the states; out and dz are finished
template <bool UNROLL, class Tile, class Keep>
__device__ inline void remake_tile(Tile& s, int stage, float (&h)[4], const LaneGradients& lane, int c, int q, Keep keep) {
    scan_tile<UNROLL>(s, h, lane.A2, c, q, keep, [&](int t, float sum) {
        bf16 &z = s.rows[stage][Z][t][c], &dout = s.rows[stage][DOUT][t][c];
        const float y = fmaf(lane.D, to_float(s.rows[stage][U][t][c]), sum), zf = to_float(z), g = to_float(dout);
        dout = from_float<bf16>(y * silu(zf));                                                                    // (4)
        z = from_float<bf16>(g * y * silu_slope(zf));                                                             // (6)
    });
}

// Back through the tile. before(t): the 4 states h_(t-1). keep(t, lambda) gets the gradient of h_t.
template <bool UNROLL, class Tile, class Before, class Keep>
__device__ inline void reverse_tile(Tile& s, int stage, LaneGradients& lane, int c, int q, Before before, Keep keep) {
#pragma unroll (UNROLL ? 4 : 1)
    for (int t4 = STEPS - 4; t4 >= 0; t4 -= 4) {
        float dinput[4] = {}, ddecay[4] = {};
#pragma unroll
        for (int i = 3; i >= 0; i--) {
            const int t = t4 + i;
            const auto B = load_vec<4>(&s.bc[t][q * 4]), C = load_vec<4>(&s.bc[t][N + q * 4]), h = before(t);
            const float dt = s.dt[t][c], dy = s.dy[t][c];
            float lambda[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                lambda[j] = fmaf(C[j], dy, lane.carry[j]);                                                        // (7)
                dinput[i] = fmaf(lambda[j], B[j], dinput[i]);
                lane.carry[j] = ex2(dt * lane.A2[j]) * lambda[j];
                const float pull = lane.carry[j] * h[j];
                ddecay[i] = fmaf(lane.A2[j], pull, ddecay[i]);
                lane.dA[j] = fmaf(dt, pull, lane.dA[j]);                                                          // (13)
            }
            keep(t, lambda);
        }
        const int t = t4 + q;                                         // this lane's step of the four
        const float sum = sum_lanes(dinput, q), decay_sum = sum_lanes(ddecay, q) * LN2;                          // A2 = A log2(e)
        bf16 &u = s.rows[stage][U][t][c], &dt_raw = s.rows[stage][DT_RAW][t][c];
        const float uf = to_float(u), ddt = fmaf(uf, sum, decay_sum) * sigmoid_fast(to_float(dt_raw) + lane.dt_bias);   // (11), (12)
        lane.dD = fmaf(s.dy[t][c], uf, lane.dD);                                                                  // (14)
        lane.ddt_bias += ddt;
        u = from_float<bf16>(fmaf(s.dt[t][c], sum, lane.D * s.dy[t][c]));                                         // (10)
        dt_raw = from_float<bf16>(ddt);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Sums over blocks. Each block writes its part; a second kernel adds the parts in a fixed order.

constexpr int PARAMETERS = N + 2;                      // of a channel: dA, dD, ddt_bias
inline int64_t dbc_part_floats(const Sizes& s, int channels) { return s.e / channels * s.rows() * 2 * N; }
inline int64_t parameter_part_floats(const Sizes& s) { return (int64_t)s.B * PARAMETERS * s.e; }
inline size_t states_bytes(const Sizes& s) { return s.elements() / STEPS * N * sizeof(bf16); }

// parts (B,N+2,e)
__device__ inline void store_parameters(float* parts, const LaneGradients& lane, int sequence, int channel, int q, int e) {
    float* to = parts + (int64_t)sequence * PARAMETERS * e + channel;
#pragma unroll
    for (int j = 0; j < 4; j++) to[(int64_t)(q * 4 + j) * e] = lane.A2[j] * LN2 * lane.dA[j];                   // dA_log = A dA
    float dD = lane.dD, ddt_bias = lane.ddt_bias;
#pragma unroll
    for (int o = 1; o < LANES; o *= 2) dD += __shfl_xor_sync(0xffffffffu, dD, o), ddt_bias += __shfl_xor_sync(0xffffffffu, ddt_bias, o);
    if (q == 0) to[(int64_t)N * e] = dD, to[(int64_t)(N + 1) * e] = ddt_bias;
}
__global__ void add_parameters_kernel(Outputs r, const float* parts, int B, int e) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x, k = blockIdx.y;
    if (c >= e) return;
    float sum = 0.f;
    for (int b = 0; b < B; b++) sum += parts[((int64_t)b * PARAMETERS + k) * e + c];
    (k < N ? r.dA_log[(int64_t)c * N + k] : k == N ? r.dD[c] : r.ddt_bias[c]) += sum;
}
// dbc[i] = sum over the blocks of parts (blocks,B,T,2N)
__global__ void add_dbc_kernel(bf16* dbc, const float* parts, int64_t blocks, int64_t count) {
    const int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (i >= count) return;
    float sum[4] = {};
#pragma unroll 4
    for (int64_t k = 0; k < blocks; k++) {
        const auto v = load_vec<4>(parts + k * count + i);
#pragma unroll
        for (int j = 0; j < 4; j++) sum[j] += v[j];
    }
    store_vec(dbc + i, pack(sum));
}
inline void add_parts(const Inputs& p, const Outputs& r, const float* dbc_parts, const float* parameter_parts, int channels) {
    const int64_t count = p.s.rows() * 2 * N;
    add_dbc_kernel<<<(unsigned)ceil_div(count, 4 * 128), 128>>>(r.dbc, dbc_parts, p.s.e / channels, count);
    LAUNCH_CHECK();
    add_parameters_kernel<<<dim3((unsigned)ceil_div(p.s.e, 64), PARAMETERS), 64>>>(r, parameter_parts, p.s.B, p.s.e);
    LAUNCH_CHECK();
}

} // namespace scan
