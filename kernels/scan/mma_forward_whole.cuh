// Forward scan on tensor cores in blocks of as many channels as fill the GPU, each block of whole sequences. See scan/mma.cuh for the mathematics of
// the tiles, and for the row warps.
//   bytes per (t,c): 8, and 4 of saved states     special functions: 20
//   B 1, T 32768, d_inner 3072 on an H200: 0.818 ms, 56% of the special functions' bound
//
// A scan warp is 8 channels of all 16 states, and takes two steps at a time: rows 0 to 7 of its matrices are the channels at the first step, rows 8
// to 15 the same channels at the second. Lane (g = lane / 4, q = lane % 4) keeps channel g and states 4q to 4q + 3.
//   the input:  lanes q = 0 hold the k places of the first step, lanes q = 2 those of the second; dt u is split in two bf16 numbers
//   the sums:   k is the 16 states; the columns are 8 steps, of which all but the two are masked
// Neither the decays nor the inputs depend on the state, and they are nearly all of the work. So four warps take units of 8 steps of the same
// channels in turns: while one walks (a multiply-add a state and step) and hands the state on to the next, the others make the decays of their
// units or the sums of those that they have walked. (1.143 ms when one warp walked through all steps of 8 channels and 8 states and made the
// decays on the way.)
#pragma once
#include "mma_forward.cuh"

namespace gpu::scan_narrow {

using namespace scan_mma;

constexpr int UNIT = 8, PAIRS = UNIT / 2, TURNS = 4;                  // steps that a scan warp takes at a time, pairs of them; warps that take turns

struct Narrow {
    static constexpr int CHANNELS = 24, STEPS = 16, GROUPS = 4, SLOTS = 4, UNIT_WARPS = CHANNELS / 8, SCAN_WARPS = TURNS * UNIT_WARPS;
    struct Stage {
        float2 pair[STEPS / 2][CHANNELS + 1][2];                      // of two steps: dt; dt u split
        float y[STEPS][CHANNELS + 4];
        __device__ void put(int t, int c, const float (&dt)[4], const uint32_t (&input)[4]) {
#pragma unroll
            for (int k = 0; k < 4; k++) pair[t / 2][c + k][t % 2] = make_float2(dt[k], __uint_as_float(input[k]));
        }
        __device__ void put_dt(int t, int c, float dt) {
            for (int k = 0; k < 4; k++) pair[t / 2][c + k][t % 2].x = dt;
        }
        __device__ void put_bc(int, int, uint2) {}                    // the scan warps read them as they came
    };
};
struct Block : ForwardBlock<Narrow> {
    float4 state[Narrow::SCAN_WARPS][WARP];                           // what a scan warp's next unit starts from
    Gate handed[Narrow::SCAN_WARPS];
};
constexpr int CHANNELS = Narrow::CHANNELS, STEPS = Narrow::STEPS, UNIT_WARPS = Narrow::UNIT_WARPS, SCAN_WARPS = Narrow::SCAN_WARPS;
constexpr int STAGES = Block::STAGES, RING = Block::RING, THREADS = Block::THREADS;
static_assert(TURNS * UNIT <= STAGES * STEPS && STAGES % (TURNS / 2) == 0 && STEPS == 2 * UNIT);

// c (16 x 8) = a (16 x 8) b (8 x 8), c by step of the two
__device__ inline void product8(float (&c)[2][2], const uint32_t (&a)[2], uint32_t b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%7,%7,%7};"
        : "=f"(c[0][0]), "=f"(c[0][1]), "=f"(c[1][0]), "=f"(c[1][1]) : "r"(a[0]), "r"(a[1]), "r"(b), "f"(0.f));
}

// A scan warp's lane. Of `count` tiles it walks every TURNS-th unit.
struct Scan {
    Block& s;
    const int warp = threadIdx.x / WARP, turn = warp / UNIT_WARPS, next = (warp + UNIT_WARPS) % SCAN_WARPS, half = turn % 2;   // half: of a tile
    const int g = threadIdx.x % WARP / 4, q = threadIdx.x % 4, c = kept(warp % UNIT_WARPS * 8 + g);       // c: channel of the block
    const int mine_at = kept((int)threadIdx.x), next_at = kept(next * WARP + (int)threadIdx.x % WARP);    // its and the next one's place in `state`
    const int b_at = kept(q / 2 * 32 + 2 * g), c_at = kept(g * 32 + 16 + 4 * q), y_at = kept(2 * q * (CHANNELS + 4) + c);
    const int first = kept(q == 0 ? -1 : 0), second = kept(q == 2 ? -1 : 0);   // masks: of lanes that hold the first and second step of a pair
    int two[PAIRS];                                                   // masks: of the columns of a pair
    float A2[4], h[4] = {};
    bf16* saved = nullptr;                                            // the lane's states before its next unit
    int64_t stride;                                                   // from a unit's saved states to the next one's
    int units = 0;                                                    // from its next one on, whose states are to be saved: none if nobody wants them

    __device__ explicit Scan(Block& s_) : s(s_) {
#pragma unroll
        for (int k = 0; k < PAIRS; k++) two[k] = kept(g / 2 == k ? -1 : 0);
    }
    // What of the unit does not depend on the state: the decays [pair][step][state], and what is added to the states. Column c of product j is state
    // 2c + j, so that the lane's are [pair][state % 2][step][state / 2].
    __device__ void prepare(float (&a)[PAIRS][2][4], float (&input)[PAIRS][2][2][2], const Narrow::Stage& stage, const bf16* bc) const {
#pragma unroll
        for (int k = 0; k < PAIRS; k++) {
            const float4 pair = *(const float4*)stage.pair[half * PAIRS + k][c];
            const uint32_t rows[2] = {__float_as_uint(pair.y) & first, __float_as_uint(pair.w) & second};
            const uint32_t B = *(const uint32_t*)(bc + b_at + 64 * k);
            product8(input[k][0], rows, __byte_perm(B, B, 0x1010));
            product8(input[k][1], rows, __byte_perm(B, B, 0x3232));
#pragma unroll
            for (int i = 0; i < 8; i++) a[k][i / 4][i % 4] = exp2_fast((i < 4 ? pair.x : pair.z) * A2[i % 4]);
        }
    }
    // From the state before the unit to the one behind it; on the way the states as operand A of the sums
    __device__ void walk(uint32_t (&states)[PAIRS][4], const float (&a)[PAIRS][2][4], const float (&input)[PAIRS][2][2][2]) {
#pragma unroll
        for (int k = 0; k < PAIRS; k++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
#pragma unroll
                for (int n = 0; n < 4; n++) h[n] = fmaf(a[k][j][n], h[n], input[k][n % 2][j][n / 2]);
                states[k][j] = pack(h[0], h[1]), states[k][j + 2] = pack(h[2], h[3]);
            }
    }
    __device__ void sum(float* to, const uint32_t (&states)[PAIRS][4], uint2 C) const {
        float y[4] = {};                                              // y[0] and y[3]: the lane's channel at steps 2q and 2q + 1
#pragma unroll
        for (int k = 0; k < PAIRS; k++) mma16(y, states[k], C.x & two[k], C.y & two[k]);
        to[y_at] = y[0], to[y_at + CHANNELS + 4] = y[3];
    }
    __device__ void hand_on(int to, int at) const {
        (&s.state[0][0])[at] = make_float4(h[0], h[1], h[2], h[3]);
        s.handed[to].arrive();
    }
    __device__ void run(int count) {
        if (turn == 0) hand_on(warp, mine_at);
        for (int i = turn / 2, stage = i, round = 0, mine = 0; i < count; i += TURNS / 2, mine++) {
            const bf16* bc = &s.bc[i % RING][half * UNIT][0];         // read until `done`: the row warps refill the slot after it
            float a[PAIRS][2][4], input[PAIRS][2][2][2];
            uint32_t states[PAIRS][4];
            s.full[stage].wait(round);
            prepare(a, input, s.stages[stage], bc);
            const uint2 C = *(const uint2*)(bc + c_at);
            s.handed[warp].look_and_wait(mine);
            const float4 from = (&s.state[0][0])[mine_at];
            h[0] = from.x, h[1] = from.y, h[2] = from.z, h[3] = from.w;
            if (units > 0) *(uint2*)saved = make_uint2(pack(h[0], h[1]), pack(h[2], h[3]));
            saved += TURNS * stride, units -= TURNS;
            walk(states, a, input);
            hand_on(next, next_at);
            sum(&s.stages[stage].y[half * UNIT][0], states, C);
            s.done[stage].arrive();
            stage += TURNS / 2;
            if (stage >= STAGES) stage -= STAGES, round++;
        }
    }
};

__device__ inline void scan_forward(Block& s, bf16* saved, float* h_out, const float* h_first, int h_stride, const ScanInput<bf16>& p,
                                    int64_t segment, int64_t first_tile, int count) {
    Scan scan(s);
    const int channel = blockIdx.x * CHANNELS + scan.c, n = 4 * scan.q;
    const int64_t units = (p.T + UNIT - 1) / UNIT, unit = first_tile * 2 + scan.turn, tiles = (p.T + STEPS - 1) / STEPS;
    const bool live = channel < p.e;
    scan.stride = (int64_t)p.e * 16;
    if (saved && live) {
        scan.saved = saved + ((blockIdx.y * units + unit) * p.e + channel) * 16 + n;
        scan.units = (int)min(units - unit, (int64_t)2 * count - scan.turn);
    }
#pragma unroll
    for (int k = 0; k < 4; k++) {
        scan.A2[k] = live ? -expf(p.A_log[(int64_t)channel * 16 + n + k]) * LOG2E : 0.f;
        if (h_first && live) scan.h[k] = h_first[(segment * p.e + channel) * h_stride + n + k];
    }
    scan.run(count);
    if (h_out && live && first_tile + count == tiles && (2 * count - 1) % TURNS == scan.turn)
        *(float4*)(h_out + (blockIdx.y * (int64_t)p.e + channel) * 16 + n) = make_float4(scan.h[0], scan.h[1], scan.h[2], scan.h[3]);
}

template <bool VEC>
__global__ void __launch_bounds__(THREADS, 1)
forward_kernel(bf16* out, bf16* saved, float* h_out, const float* h_first, int h_stride, ScanInput<bf16> p) {
    extern __shared__ float4 shared_floats[];
    Block& s = *(Block*)shared_floats;
    const int64_t segment = (int64_t)blockIdx.y * gridDim.z + blockIdx.z, first_tile = blockIdx.z * p.segment_tiles;
    const int64_t tiles = (p.T + STEPS - 1) / STEPS;
    const int count = (int)min(p.segment_tiles, tiles - first_tile);
    if (threadIdx.x < SCAN_WARPS) s.handed[threadIdx.x].init(1);
    s.init(2 * UNIT_WARPS);
    if (threadIdx.x < SCAN_WARPS * WARP) {
        SCAN_MMA_REGISTERS("inc", "104");
        scan_forward(s, saved, h_out, h_first, h_stride, p, segment, first_tile, count);
    } else {
        SCAN_MMA_REGISTERS("dec", "56");
        rows_forward<VEC>((ForwardBlock<Narrow>&)s, out, p, first_tile, count);
    }
}

} // namespace gpu::scan_narrow
