// Forward scan on tensor cores with blocks of as many channels as fill the GPU, each of whole sequences. See scan_mma.cuh for the mathematics of the tiles.
//   bytes per (t,c): 8, and 4 of saved states     special functions: 20
//   B 1, T 32768, d_inner 3072: 0.856 ms on an H200
//
// A scan warp is 8 channels of all 16 states, and takes two steps at a time: rows 0 to 7 of its matrices are the channels at the first step, rows 8
// to 15 the same channels at the second. Lane (g = lane / 4, q = lane % 4) keeps channel g and states 4q to 4q + 3.
//   the input:  lanes q = 0 hold the k places of the first step, lanes q = 2 those of the second; dt u is split in two bf16 numbers
//   the sums:   k is the 16 states; the columns are 8 steps, of which all but the two are masked.
// Neither the decays nor the inputs depend on the state, and they are nearly all of the work. So four warps take units of 8 steps of the same channels
// in turns: while one walks (one multiply-add a state and step) and hands the state on to the next, the others make the decays of their units or the
// sums of those that they have walked.
#pragma once
#include "scan_mma.cuh"

namespace gpu::scan_narrow {

using namespace scan_mma;

constexpr int CHANNELS = 24, STEPS = 16, UNIT = 8, PAIRS = UNIT / 2;  // of a block; steps of a tile; of what a scan warp takes at a time, in pairs of steps
constexpr int TURNS = 4, UNIT_WARPS = CHANNELS / 8, SCAN_WARPS = TURNS * UNIT_WARPS;
constexpr int QUADS = CHANNELS / 4, ROW_THREADS = STEPS * QUADS, ROW_WARPS = ROW_THREADS / WARP;      // a row thread has 4 channels of a step
// Row warps take the tiles in turns of GROUPS; each group has two stages for its tiles between it and the scan warps, and SLOTS for those on their way
// from memory and these.
constexpr int GROUPS = 4, STAGES = 2 * GROUPS, SLOTS = 4, RING = GROUPS * SLOTS;
constexpr int THREADS = (SCAN_WARPS + GROUPS * ROW_WARPS) * WARP;
static_assert(ROW_THREADS % WARP == 0 && SCAN_WARPS % 4 == 0 && GROUPS * ROW_WARPS % 4 == 0 && TURNS * UNIT <= STAGES * STEPS);

struct Stage {
    float2 pair[STEPS / 2][CHANNELS + 1][2];                          // of two steps: dt; dt u split
    float y[STEPS][CHANNELS + 4];
};
struct Block {
    Stage stages[STAGES];                                             // tile i: i % STAGES
    float4 state[SCAN_WARPS][WARP];                                   // what a scan warp's next unit starts from
    uint2 words[RING][3][ROW_THREADS];                                // each row thread's own. Tile i: i % RING
    bf16 bc[RING][STEPS][32];                                         // B | C
    Gate full[STAGES], done[STAGES], handed[SCAN_WARPS];
};

// c (16 x 8) = a (16 x 8) b (8 x 8), c by step of the two
__device__ inline void product8(float (&c)[2][2], const uint32_t (&a)[2], uint32_t b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%7,%7,%7};"
        : "=f"(c[0][0]), "=f"(c[0][1]), "=f"(c[1][0]), "=f"(c[1][1]) : "r"(a[0]), "r"(a[1]), "r"(b), "f"(0.f));
}
// To be kept in its register: the compiler would make it again for every use
template <class T> __device__ inline T kept(T x) {
    asm volatile("" : "+r"(x));
    return x;
}

// A scan warp's lane. Of `count` tiles it walks every TURNS-th unit.
struct Scan {
    Block& s;
    const int warp = threadIdx.x / WARP, turn = warp / UNIT_WARPS, next = (warp + UNIT_WARPS) % SCAN_WARPS, half = turn % 2;   // half: of a tile
    const int g = threadIdx.x % WARP / 4, q = threadIdx.x % 4, c = kept(warp % UNIT_WARPS * 8 + g);       // c: channel of the block
    const int mine_at = kept((int)threadIdx.x), next_at = kept(next * WARP + (int)threadIdx.x % WARP);    // its and the next one's place in `state`
    const int b_at = kept(q / 2 * 32 + 2 * g), c_at = kept(g * 32 + 16 + 4 * q), y_at = kept(2 * q * (CHANNELS + 4) + c);
    const uint32_t first = kept(q == 0 ? ~0u : 0u), second = kept(q == 2 ? ~0u : 0u);   // masks: of lanes that hold the first and second step of a pair
    uint32_t two[PAIRS];                                              // masks: of the columns of a pair
    float A2[4], h[4] = {};
    bf16* saved = nullptr;                                            // the lane's states before its next unit
    int64_t stride;                                                   // from a unit's saved states to the next one's
    int units = 0;                                                    // from its next one on, whose states are to be saved: none if nobody wants them

    __device__ explicit Scan(Block& s_) : s(s_) {
#pragma unroll
        for (int k = 0; k < PAIRS; k++) two[k] = kept(g / 2 == k ? ~0u : 0u);
    }
    // What of the unit does not depend on the state: the decays [pair][step][state], and what is added to the states. Column c of product j is state
    // 2c + j, so that the lane's are [pair][state % 2][step][state / 2].
    __device__ void prepare(float (&a)[PAIRS][2][4], float (&input)[PAIRS][2][2][2], const Stage& stage, const bf16* bc) const {
#pragma unroll
        for (int k = 0; k < PAIRS; k++) {
            const float4 pair = *(const float4*)stage.pair[half * PAIRS + k][c];
            const uint32_t rows[2] = {__float_as_uint(pair.y) & first, __float_as_uint(pair.w) & second};
            const uint32_t B = *(const uint32_t*)(bc + b_at + 64 * k);
            product8(input[k][0], rows, __byte_perm(B, B, 0x1010));
            product8(input[k][1], rows, __byte_perm(B, B, 0x3232));
#pragma unroll
            for (int i = 0; i < 8; i++) a[k][i / 4][i % 4] = scan_ex2((i < 4 ? pair.x : pair.z) * A2[i % 4]);
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
            const bf16* bc = &s.bc[i % RING][half * UNIT][0];
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

__device__ inline void scan_forward(Block& s, bf16* saved, float* h_out, const float* h_first, int h_stride, const ScanInput<bf16>& p, int64_t segment,
                                    int64_t first_tile, int count) {
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
        scan.A2[k] = live ? -expf(p.A_log[(int64_t)channel * 16 + n + k]) * SCAN_LOG2E : 0.f;
        if (h_first && live) scan.h[k] = h_first[(segment * p.e + channel) * h_stride + n + k];
    }
    scan.run(count);
    if (h_out && live && first_tile + count == tiles && (2 * count - 1) % TURNS == scan.turn)
        *(float4*)(h_out + (blockIdx.y * (int64_t)p.e + channel) * 16 + n) = make_float4(scan.h[0], scan.h[1], scan.h[2], scan.h[3]);
}

// A row thread has four neighbouring channels at a step of every GROUPS-th tile, and copies words of B | C. i: the group's i-th tile.
// ALL: all channels of the block are within the arrays and four of them may be moved at once.
template <bool ALL> struct Rows {
    static constexpr int NEXT = GROUPS * STEPS;                       // steps from tile to tile
    Block& s;
    const ScanInput<bf16>& p;
    const int group, thread, row, column, live;                       // live: channels from the thread's to the array's end
    int left_fetch, left_prepare, left_finish;                        // steps from the thread's one of the tile that is fetched (...) next to the end
    const bf16 *from[3], *bc;                                         // of the tile that `fetch` fetches next
    bf16* out;                                                        // of the tile that `finish` finishes next
    int64_t start;                                                    // the thread's step, of (B,T), of the tile that `prepare` prepares next
    float bias[4], D[4];

    __device__ Rows(Block& s_, bf16* out_, const ScanInput<bf16>& p_, int row_warp, int64_t first_tile)
        : s(s_), p(p_), group(row_warp / ROW_WARPS), thread(kept(row_warp % ROW_WARPS * WARP + (int)threadIdx.x % WARP)), row(kept(thread / QUADS)),
          column(kept(thread % QUADS * 4)), live(p_.e - (int)blockIdx.x * CHANNELS - column) {
        const int64_t first = (first_tile + group) * STEPS, tile = blockIdx.y * p.T + first;
        const int channel = blockIdx.x * CHANNELS + column;
        start = tile + row;
        from[0] = p.u + start * p.e + channel, from[1] = p.dt_raw + start * p.e + channel, from[2] = p.z + start * p.ldz + channel;
        bc = p.bc + (tile + thread / 8) * p.ldbc + thread % 8 * 4, out = out_ + start * p.e + channel;
        left_fetch = left_prepare = left_finish = (int)min(p.T - first, (int64_t)1 << 30) - row;
#pragma unroll
        for (int k = 0; k < 4; k++) bias[k] = k < live ? p.dt_bias[channel + k] : 0.f, D[k] = k < live ? p.D[channel + k] : 0.f;
    }
    __device__ int stage(int i) const { return i % 2 * GROUPS + group; }
    __device__ int slot(int i) const { return i % SLOTS * GROUPS + group; }
    // Past the end: zeros
    __device__ void fetch(int i, int count) {
        if (i < count) {
#pragma unroll
            for (int a = 0; a < 3; a++) {
                uint2* to = &s.words[slot(i)][a][thread];
                if (ALL) copy_async<8>(to, from[a], left_fetch > 0);
                else *to = load(from[a], left_fetch > 0, live);
                from[a] += NEXT * (a == 2 ? p.ldz : (int64_t)p.e);
            }
            fetch_bc(slot(i));
            bc += NEXT * p.ldbc, left_fetch -= NEXT;
        }
        copy_commit();
    }
    __device__ uint2 load(const bf16* at, bool here, int live) const {
        uint32_t v[4];
#pragma unroll
        for (int k = 0; k < 4; k++) v[k] = here && k < live ? __bfloat16_as_ushort(at[k]) : 0u;
        return make_uint2(v[0] | v[1] << 16, v[2] | v[3] << 16);
    }
    __device__ void fetch_bc(int slot) {
#pragma unroll
        for (int w = 0; w < STEPS * 8; w += ROW_THREADS) {
            if (w + ROW_THREADS > STEPS * 8 && w + thread >= STEPS * 8) continue;
            const bool here = (w + thread) / 8 < left_fetch + row;
            const bf16* at = bc + w / 8 * p.ldbc;
            uint2* to = (uint2*)s.bc[slot] + w + thread;
            if (ALL) copy_async<8>(to, at, here);
            else *to = load(at, here, 4);
        }
    }
    __device__ void prepare(int i) {
        auto* pair = &s.stages[stage(i)].pair[row / 2][column];
        const uint2 raw = s.words[slot(i)][1][thread], us = s.words[slot(i)][0][thread];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const uint32_t r = k < 2 ? raw.x : raw.y, u = k < 2 ? us.x : us.y;
            const float dt = scan_softplus<bf16>((k % 2 ? high(r) : low(r)) + bias[k]);
            pair[k][row % 2] = make_float2(dt, __uint_as_float(split((k % 2 ? high(u) : low(u)) * dt)));
        }
        // Past the end there is no decay, and no input as u is zero; before the start of a document there is nothing
        if (left_prepare <= 0 || (p.starts && p.starts[start]))
            for (int k = 0; k < 4; k++) pair[k][row % 2].x = left_prepare <= 0 ? 0.f : SCAN_CUT;
        start += NEXT, left_prepare -= NEXT;
        s.full[stage(i)].arrive();
    }
    __device__ void finish(int i) {
        if (left_finish > 0) {
            const uint2 us = s.words[slot(i)][0][thread], zs = s.words[slot(i)][2][thread];
            const float4 y = *(const float4*)&s.stages[stage(i)].y[row][column];
            float x[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const uint32_t u = k < 2 ? us.x : us.y, v = k < 2 ? zs.x : zs.y;
                const float z = k % 2 ? high(v) : low(v);
                x[k] = fmaf(D[k], k % 2 ? high(u) : low(u), x[k]) * z * scan_sigmoid<bf16>(z);
            }
            scan_store<ALL>(out, 0, live, x);
        }
        out += NEXT * (int64_t)p.e, left_finish -= NEXT;
    }
    // Of `tiles` of the block. Prepared: one of the group's tiles ahead of the scan warps; on their way: SLOTS - 2 after it.
    __device__ void run(int tiles) {
        const int count = (tiles - group + GROUPS - 1) / GROUPS;
        for (int i = 0; i < SLOTS - 1; i++) fetch(i, count);
        copy_wait<SLOTS - 2>();                                       // tile 0 is here
        if (count > 0) prepare(0);
        for (int i = 0; i < count; i++) {
            copy_wait<SLOTS - 3>();                                   // tile i + 1 is here
            if (i + 1 < count) prepare(i + 1);
            fetch(i + SLOTS - 1, count);
            s.done[stage(i)].wait((uint32_t)(i / 2));
            finish(i);
        }
    }
};

template <bool VEC>
__global__ void __launch_bounds__(THREADS, 1)
forward_kernel(bf16* out, bf16* saved, float* h_out, const float* h_first, int h_stride, ScanInput<bf16> p) {
    extern __shared__ float4 shared_floats[];
    Block& s = *(Block*)shared_floats;
    const int64_t segment = (int64_t)blockIdx.y * gridDim.z + blockIdx.z, first_tile = blockIdx.z * p.segment_tiles;
    const int64_t tiles = (p.T + STEPS - 1) / STEPS;
    const int count = (int)min(p.segment_tiles, tiles - first_tile), warp = threadIdx.x / WARP;
    if (threadIdx.x < STAGES) s.full[threadIdx.x].init(ROW_WARPS), s.done[threadIdx.x].init(2 * UNIT_WARPS);
    if (threadIdx.x < SCAN_WARPS) s.handed[threadIdx.x].init(1);
    __syncthreads();
    if (warp < SCAN_WARPS) {
        SCAN_MMA_REGISTERS("inc", "104");
        scan_forward(s, saved, h_out, h_first, h_stride, p, segment, first_tile, count);
    } else {
        SCAN_MMA_REGISTERS("dec", "56");
        if (VEC && (blockIdx.x + 1) * CHANNELS <= p.e) Rows<true>(s, out, p, warp - SCAN_WARPS, first_tile).run(count);
        else Rows<false>(s, out, p, warp - SCAN_WARPS, first_tile).run(count);
    }
}

} // namespace gpu::scan_narrow
