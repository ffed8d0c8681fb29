// 7. Sums over channels on the tensor cores. For one step, dB_n = sum_c lambda_cn input_c and dC_n = sum_c h_cn dy_c (equations 8 and 9) are a
// matrix of 16 states by 64 channels times a vector. mma.m16n8k16 multiplies 16 x 16 by 16 x 8: the vector of the i-th step fills
// column i of the second operand and the other columns are zero, so that one accumulator collects the steps of a warp. Seven
// eighths of the products are with zeros, and the tensor cores have nothing else to do.
//
// The operands are bf16 and lie in shared memory: h_t of the whole tile, then, on the way back, lambda_t in its place. That also frees
// program 6's 68 registers of history, and a block of 64 channels halves the parts to be written and added.
//
// What limits it: half is instruction issue, 35 for each update, of which 10 go forward again and 16 back (both make the decay); half is
// waiting, at five barriers a tile and for shared memory.
#include "backward.cuh"

namespace scan {

constexpr int BLOCK_CHANNELS = 64, BLOCK_THREADS = BLOCK_CHANNELS * LANES, WARP_STEPS = STEPS / (BLOCK_THREADS / WARP);

struct SumTile : BackwardTile<BLOCK_CHANNELS> {
    bf16 states[STEPS + 1][BLOCK_CHANNELS * N];                       // [t + 1]: h_t, later lambda_t
    // Where state 8 half of channel c is in a row. The halves change places in every other group of 4 channels, so that
    // ldmatrix, which reads one half of 8 channels, meets each bank once.
    __device__ static int at(int c, int half) { return c * N + (half ^ (c >> 2 & 1)) * 8; }
    __device__ bf16* of_lane(int t, int c, int q) { return &states[t + 1][at(c, q / 2) + q % 2 * 4]; }
};

// to[t * 2N + n] = sum_c weight[t][c] states[t + 1][c][n] for the 2 steps of this warp
__device__ inline void sum_channels(float* to, const SumTile& s, const float (&weight)[STEPS][BLOCK_CHANNELS]) {
    const int lane = threadIdx.x % WARP, column = lane / 4, q = lane % 4, first = threadIdx.x / WARP * WARP_STEPS;
    float sum[4] = {};
#pragma unroll
    for (int i = 0; i < WARP_STEPS; i++)
#pragma unroll
        for (int k = 0; k < BLOCK_CHANNELS; k += 16) {
            uint32_t a[4], b[2] = {};                                 // a: states (rows) by channels k to k + 15; b: the same channels by steps
            const bf16* row = &s.states[first + i + 1][s.at(k + lane / 16 * 8 + lane % 8, lane / 8 % 2)];
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                         : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"((uint32_t)__cvta_generic_to_shared(row)) : "memory");
            if (column == i) {
                const float* w = &weight[first + i][k + 2 * q];
                asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(b[0]) : "f"(w[1]), "f"(w[0]));
                asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(b[1]) : "f"(w[9]), "f"(w[8]));
            }
            asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                         : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
        }
    if (q == 0)                                                       // it holds columns 0 and 1, states column and column + 8
        for (int i = 0; i < WARP_STEPS; i++) {
            to[(first + i) * 2 * N + column] = sum[i];
            to[(first + i) * 2 * N + column + 8] = sum[2 + i];
        }
}

__global__ void __launch_bounds__(BLOCK_THREADS, 3) backward_kernel(Inputs p, Outputs r, float* dbc_parts, float* parameter_parts) {
    extern __shared__ float4 shared[];
    SumTile& s = *(SumTile*)shared;
    const int c = threadIdx.x / LANES, q = threadIdx.x % LANES, first_channel = blockIdx.x * BLOCK_CHANNELS, channel = first_channel + c;
    const int64_t sequence = blockIdx.y, tiles = p.s.T / STEPS;
    auto first_row = [&](int64_t tile) { return sequence * p.s.T + tile * STEPS; };
    auto load_state = [&](int64_t tile) { return load_vec<4>((const bf16*)r.saved + ((sequence * tiles + tile) * p.s.e + channel) * N + q * 4); };
    LaneGradients lane(p, channel, q);
    s.fetch(p, (tiles - 1) & 1, first_row(tiles - 1), first_channel);
    auto next = load_state(tiles - 1);
    for (int64_t tile = tiles - 1; tile >= 0; tile--) {
        const int stage = tile & 1;
        float* part = dbc_parts + (blockIdx.x * p.s.rows() + first_row(tile)) * 2 * N;
        float h[4] = {to_float(next[0]), to_float(next[1]), to_float(next[2]), to_float(next[3])};
        s.arrive();
        store_vec(s.of_lane(-1, c, q), next);
        if (tile > 0) {
            s.fetch(p, stage ^ 1, first_row(tile - 1), first_channel);
            next = load_state(tile - 1);
        }
        s.prepare(p, stage, first_channel);
        __syncthreads();
        remake_tile<false>(s, stage, h, lane, c, q, [&](int t, const float (&now)[4]) { store_vec(s.of_lane(t, c, q), pack(now)); });
        __syncthreads();
        sum_channels(part + N, s, s.dy);                                                                          // (8)
        __syncthreads();
        reverse_tile<false>(
            s, stage, lane, c, q,
            [&](int t) {
                const auto v = load_vec<4>(s.of_lane(t - 1, c, q));
                return Vec<float, 4>{to_float(v[0]), to_float(v[1]), to_float(v[2]), to_float(v[3])};
            },
            [&](int t, const float (&lambda)[4]) { store_vec(s.of_lane(t, c, q), pack(lambda)); });               // h_t was read at step t + 1
        __syncthreads();
        sum_channels(part, s, s.input);                                                                           // (9)
        s.store_results(r, stage, first_row(tile), first_channel, p.s.e);
    }
    store_parameters(parameter_parts, lane, (int)sequence, channel, q, p.s.e);
}

static size_t scratch_bytes(const Sizes& s) { return (dbc_part_floats(s, BLOCK_CHANNELS) + parameter_part_floats(s)) * sizeof(float); }

static void backward(const Inputs& p, const Outputs& r) {
    float *dbc_parts = (float*)r.scratch, *parameter_parts = dbc_parts + dbc_part_floats(p.s, BLOCK_CHANNELS);
    CUDA_CHECK(cudaFuncSetAttribute(backward_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)sizeof(SumTile)));
    backward_kernel<<<dim3(p.s.e / BLOCK_CHANNELS, p.s.B), BLOCK_THREADS, sizeof(SumTile)>>>(p, r, dbc_parts, parameter_parts);
    LAUNCH_CHECK();
    add_parts(p, r, dbc_parts, parameter_parts, BLOCK_CHANNELS);
}

} // namespace scan

int main() {
    using namespace scan;
    Program program{"7 dB and dC on tensor cores", [](const Inputs& p, const Outputs& r) { lanes_forward(p, r.out, r.saved); }, backward,
                    states_bytes, scratch_bytes};
    program.time_forward = false;                                     // program 6's
    return run(program);
}
