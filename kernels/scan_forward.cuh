// Forward scan on tensor cores with blocks of as many channels as fill the GPU. See scan_mma.cuh for the mathematics of the tiles.
//
// A scan warp is 8 channels of 8 states, and takes two steps at a time: rows 0 to 7 of its matrices are the channels at the first step, rows 8
// to 15 the same channels at the second. Lane (g = lane / 4, q = lane % 4) keeps channel g and two states, 2q and 2q + 1 of the eight.
//   the input:  lanes q < 2 hold the k places of the first step, the others those of the second; dt u is split in two bf16 numbers, and halved
//               as there are two lanes. These products do not wait for the state.
//   the sums:   k is the 8 states; the columns are 8 steps, of which all but the two are masked.
// The decays and the inputs do not depend on the state, so they are made while the steps before are walked.
#pragma once
#include "scan_mma.cuh"

namespace gpu::scan_mma {

// Shape of a block. CHANNELS: a multiple of 8. ROW_WARPS take the tiles of 16 steps in turns of GROUPS; each group has STAGES for its tiles between
// it and the scan warps, and SLOTS for those on their way from memory and these. Warps are dealt to the four schedulers in turn; IDLE ones after the
// first 16 do nothing, so that row warps are where fewer scan warps are.
template <int CHANNELS_, int ROW_WARPS_, int GROUPS_, int STAGES_, int SLOTS_, int IDLE_> struct ForwardShape {
    static constexpr int CHANNELS = CHANNELS_, STEPS = 16, GROUPS = GROUPS_, STAGES = STAGES_, SLOTS = SLOTS_, IDLE = IDLE_;
    static constexpr int SCAN_WARPS = CHANNELS / 4, ROW_WARPS = ROW_WARPS_, ROW_THREADS = ROW_WARPS * WARP, ALL_STAGES = GROUPS * STAGES;
    static constexpr int THREADS = (SCAN_WARPS + GROUPS * ROW_WARPS + IDLE) * WARP, ITEMS = STEPS * CHANNELS / 2 / ROW_THREADS;
    static_assert(ITEMS * ROW_THREADS * 2 == STEPS * CHANNELS && ROW_THREADS % (CHANNELS / 2) == 0 && (SLOTS & (SLOTS - 1)) == 0 && SLOTS > STAGES);
};

template <class S> struct ForwardBlock {
    struct Stage {
        float2 pair[S::STEPS / 2][S::CHANNELS][2];                    // of two steps: dt; half of dt u split
        float y[2][S::STEPS][S::CHANNELS + 4];                        // of the two halves of the states
    } stages[S::ALL_STAGES];
    uint32_t words[S::GROUPS][S::SLOTS][3][S::ITEMS][S::ROW_THREADS];  // each row thread's own
    bf16 bc[S::GROUPS][S::SLOTS][S::STEPS][32];                       // B | C
    Gate full[S::ALL_STAGES], done[S::ALL_STAGES];
};

// What a scan warp's lane is: channel c of the block, of the array; its two states n and n + 1
struct Lane {
    int c, half, g, q;
    uint32_t first, second, mine[4];                                  // masks: of lanes that hold the first and second step; of two steps of 8
    __device__ Lane() {
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
        g = lane / 4, q = lane % 4, c = warp / 2 * 8 + g, half = warp % 2;
        first = q < 2 ? ~0u : 0u, second = ~first;
#pragma unroll
        for (int k = 0; k < 4; k++) {
            mine[k] = g / 2 == k ? ~0u : 0u;
            asm volatile("" : "+r"(mine[k]));                         // kept, not made again for every use
        }
    }
};

// c (16 x 8) = a (16 x 8) b (8 x 8)
__device__ inline void product8(float (&c)[4], const uint32_t (&a)[2], uint32_t b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%7,%7,%7};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(b), "f"(0.f));
}

// A tile as a scan warp's lane sees it, in pairs of steps
struct Tile {
    float dt[8][2], a[8][2][2];                                       // a: decays
    uint32_t x[8][2], b[8], c[2];                                     // inputs; B; C of step g of the first 8 and of the last
    // Pairs from first to last - 1, all but their decays
    template <class Stage> __device__ void load(const Stage& s, const bf16 (*bc)[32], int first, int last, const Lane& l) {
#pragma unroll
        for (int k = first; k < last; k++) {
            const float4 two = *(const float4*)s.pair[k][l.c];
            dt[k][0] = two.x, x[k][0] = __float_as_uint(two.y), dt[k][1] = two.z, x[k][1] = __float_as_uint(two.w);
            b[k] = __bfloat16_as_ushort(bc[2 * k + l.q / 2][8 * l.half + l.g]) * 0x10001u;
        }
    }
    __device__ void load_c(const bf16 (*bc)[32], int k, const Lane& l) { c[k] = *(const uint32_t*)&bc[8 * k + l.g][16 + 8 * l.half + 2 * l.q]; }
    __device__ void make_decays(int k, const float (&A2)[2]) {
#pragma unroll
        for (int i = 0; i < 4; i++) a[k][i / 2][i % 2] = scan_ex2(dt[k][i / 2] * A2[i % 2]);
    }
    // h through pair k. After four pairs y[0] and y[3] are the lane's channel's sums over the half at steps 2q and 2q + 1 of the eight.
    __device__ void walk(int k, float (&h)[2], float (&y)[4], const Lane& l) const {
        float input[4];
        const uint32_t rows[2] = {x[k][0] & l.first, x[k][1] & l.second};
        product8(input, rows, b[k]);
        uint32_t now[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            h[0] = fmaf(a[k][i][0], h[0], input[2 * i]), h[1] = fmaf(a[k][i][1], h[1], input[2 * i + 1]);
            now[i] = pack(h[0], h[1]);
        }
        mma8(y, now, c[k / 4] & l.mine[k % 4]);
    }
};

template <class S> struct ScanForward {
    ForwardBlock<S>& s;
    bf16* saved;                                                      // the lane's states of the next group of 8 steps
    const int64_t stride;                                             // from a group's saved states to the next one's
    int groups;                                                       // of 8 steps, whose states are still to be saved: none if nobody wants them
    Lane l;
    float h[2] = {}, A2[2] = {}, y[4] = {};
    __device__ void save() {
        if (groups > 0) *(uint32_t*)saved = pack(h[0], h[1]);
        saved += stride, groups--;
    }
    __device__ void store(float (*to)[S::CHANNELS + 4]) {
        to[2 * l.q][l.c] = y[0], to[2 * l.q + 1][l.c] = y[3];
#pragma unroll
        for (int i = 0; i < 4; i++) y[i] = 0.f;
    }
    // Where a tile is in the rings
    struct Place {
        int stage = 0, turn = 0, group = 0, slot = 0;
        __device__ void next() {
            if (++stage == S::ALL_STAGES) stage = 0, turn ^= 1;
            if (++group == S::GROUPS) group = 0, slot = (slot + 1) % S::SLOTS;
        }
    };
    // The decays are made two pairs ahead of the walk; the first two of a tile beside the last two of the tile before.
    __device__ void run(int count) {
        Tile tile;
        Place now, next;
        s.full[0].wait(0);
        begin(tile, now, false);
        for (;; now = next) {
            auto& stage = s.stages[now.stage];
            const auto bc = s.bc[now.group][now.slot];
            next.next();
            const bool last = --count == 0, ready = last || s.full[next.stage].test(next.turn);
            tile.load(stage, bc, 2, 8, l);
            tile.load_c(bc, 1, l);
            save();
#pragma unroll
            for (int k = 0; k < 6; k++) {
                if (k == 4) store(stage.y[l.half]), save();
                tile.walk(k, h, y, l);
                tile.make_decays(k + 2, A2);
            }
            if (last) break;
            if (!ready) s.full[next.stage].wait(next.turn);
            begin(tile, next, true);
            store(stage.y[l.half] + 8);
            s.done[now.stage].arrive();
        }
        tile.walk(6, h, y, l);
        tile.walk(7, h, y, l);
        store(s.stages[now.stage].y[l.half] + 8);
        s.done[now.stage].arrive();
    }
    // The first two pairs of a tile, and the end of the one before
    __device__ void begin(Tile& tile, const Place& at, bool end) {
        const auto bc = s.bc[at.group][at.slot];
        tile.load(s.stages[at.stage], bc, 0, 2, l);
#pragma unroll
        for (int k = 0; k < 2; k++) {
            if (end) tile.walk(6 + k, h, y, l);
            tile.make_decays(k, A2);
        }
        tile.load_c(bc, 0, l);
    }
};

template <class S>
__device__ inline void scan_forward(ForwardBlock<S>& s, bf16* saved, float* h_out, const float* h_first, int h_stride, const ScanInput<bf16>& p,
                                    int64_t segment, int64_t first_tile, int count) {
    const Lane l;
    const int channel = blockIdx.x * S::CHANNELS + l.c, n = 8 * l.half + 2 * l.q;
    const int64_t groups = (p.T + 7) / 8, tiles = (p.T + S::STEPS - 1) / S::STEPS;
    const bool live = channel < p.e;
    ScanForward<S> scan{s, saved, (int64_t)p.e * 16, 0, l};
    if (saved && live) {
        scan.saved += ((blockIdx.y * groups + first_tile * 2) * p.e + channel) * 16 + n;
        scan.groups = (int)min(groups - first_tile * 2, (int64_t)2 * count);
    }
#pragma unroll
    for (int k = 0; k < 2; k++) {
        scan.A2[k] = live ? -expf(p.A_log[(int64_t)channel * 16 + n + k]) * SCAN_LOG2E : 0.f;
        if (h_first && live) scan.h[k] = h_first[(segment * p.e + channel) * h_stride + n + k];
    }
    scan.run(count);
    if (h_out && live && first_tile + count == tiles) *(float2*)(h_out + (blockIdx.y * (int64_t)p.e + channel) * 16 + n) = make_float2(scan.h[0], scan.h[1]);
}

// A row thread has one pair of neighbouring channels at ITEMS steps of every GROUPS-th tile, and copies words of B | C. i: the group's i-th tile.
template <class S, bool ALL> struct NarrowRows {
    static constexpr int PASS = S::ROW_THREADS / (S::CHANNELS / 2), NEXT = S::GROUPS * S::STEPS;   // steps from item to item, from tile to tile
    ForwardBlock<S>& s;
    const ScanInput<bf16>& p;
    const int group, thread, row, column, live;                       // live: channels from the thread's to the array's end
    int left_fetch, left_prepare, left_finish;                        // steps from the tile that is fetched (prepared, finished) next to the end
    const bf16 *from[3], *bc;                                         // of the tile that `fetch` fetches next
    bf16* out;                                                        // of the tile that `finish` finishes next
    const uint8_t* starts;                                            // of the tile that `prepare` prepares next, or null
    float2 bias = {}, D = {};

    __device__ NarrowRows(ForwardBlock<S>& s_, bf16* out_, const ScanInput<bf16>& p_, int row_warp, int64_t first_tile)
        : s(s_), p(p_), group(row_warp / S::ROW_WARPS), thread(row_warp % S::ROW_WARPS * WARP + threadIdx.x % WARP),
          row(thread / (S::CHANNELS / 2)),
          column(thread % (S::CHANNELS / 2) * 2), live(p_.e - (int)blockIdx.x * S::CHANNELS - column) {
        const int64_t first = (first_tile + group) * S::STEPS, tile = blockIdx.y * p.T + first, at = tile + row;
        const int channel = blockIdx.x * S::CHANNELS + column;
        from[0] = p.u + at * p.e + channel, from[1] = p.dt_raw + at * p.e + channel, from[2] = p.z + at * p.ldz + channel;
        bc = p.bc + (tile + thread / 16) * p.ldbc + thread % 16 * 2, out = out_ + at * p.e + channel;
        starts = p.starts ? p.starts + at : nullptr;
        left_fetch = left_prepare = left_finish = (int)min(p.T - first, (int64_t)1 << 30);
        if (live > 0) bias.x = p.dt_bias[channel], D.x = p.D[channel];
        if (live > 1) bias.y = p.dt_bias[channel + 1], D.y = p.D[channel + 1];
    }
    __device__ int stage(int i) const { return i % S::STAGES * S::GROUPS + group; }
    __device__ void fetch(int i, int count) {
        const int slot = i & (S::SLOTS - 1);
        if (i < count) {
#pragma unroll
            for (int a = 0; a < 3; a++) {
                const int64_t ld = a == 2 ? p.ldz : p.e;
#pragma unroll
                for (int k = 0; k < S::ITEMS; k++) {
                    const bool here = row + k * PASS < left_fetch;
                    const bf16* at = from[a] + k * PASS * ld;
                    uint32_t* to = &s.words[group][slot][a][k][thread];
                    if (ALL) copy_async<4>(to, at, here);
                    else *to = (here && live > 0 ? __bfloat16_as_ushort(at[0]) : 0u) |
                               (here && live > 1 ? (uint32_t)__bfloat16_as_ushort(at[1]) << 16 : 0u);
                }
                from[a] += NEXT * ld;
            }
            fetch_bc(slot);
            bc += NEXT * p.ldbc, left_fetch -= NEXT;
        }
        copy_commit();
    }
    __device__ void fetch_bc(int slot) {
#pragma unroll
        for (int w = 0; w < S::STEPS * 16; w += S::ROW_THREADS) {
            if (w + S::ROW_THREADS > S::STEPS * 16 && w + thread >= S::STEPS * 16) continue;
            const bool here = (w + thread) / 16 < left_fetch;
            const bf16* at = bc + w / 16 * p.ldbc;
            uint32_t* to = (uint32_t*)s.bc[group][slot] + w + thread;
            if (ALL) copy_async<4>(to, at, here);
            else *to = here ? __bfloat16_as_ushort(at[0]) | (uint32_t)__bfloat16_as_ushort(at[1]) << 16 : 0u;
        }
    }
    __device__ void prepare(int i) {
        auto& pair = s.stages[stage(i)].pair;
        const int slot = i & (S::SLOTS - 1);
#pragma unroll
        for (int k = 0; k < S::ITEMS; k++) {
            const uint32_t raw = s.words[group][slot][1][k][thread], us = s.words[group][slot][0][k][thread];
            const float2 dt = make_float2(scan_softplus<bf16>(low(raw) + bias.x), scan_softplus<bf16>(high(raw) + bias.y));
            const int t = row + k * PASS;
            pair[t / 2][column][t % 2] = make_float2(dt.x, __uint_as_float(split(0.5f * low(us) * dt.x)));
            pair[t / 2][column + 1][t % 2] = make_float2(dt.y, __uint_as_float(split(0.5f * high(us) * dt.y)));
        }
        if (starts || left_prepare < S::STEPS) edges(pair);
        if (starts) starts += NEXT;
        left_prepare -= NEXT;
        s.full[stage(i)].arrive();
    }
    // Past the end there is no decay and no input; before the start of a document there is nothing
    template <class Pairs> __device__ void edges(Pairs& pair) const {
        for (int k = 0; k < S::ITEMS; k++) {
            const int t = row + k * PASS;
            float2 &x = pair[t / 2][column][t % 2], &y = pair[t / 2][column + 1][t % 2];
            if (t >= left_prepare) x = y = make_float2(0.f, 0.f);
            else if (starts && starts[k * PASS]) x.x = y.x = SCAN_CUT;
        }
    }
    __device__ void finish(int i) {
        const auto& sums = s.stages[stage(i)].y;
        const int slot = i & (S::SLOTS - 1);
#pragma unroll
        for (int k = 0; k < S::ITEMS; k++)
            if (row + k * PASS < left_finish) {
                const uint32_t us = s.words[group][slot][0][k][thread], zs = s.words[group][slot][2][k][thread];
                const float2 y0 = *(const float2*)&sums[0][row + k * PASS][column];
                const float2 y1 = *(const float2*)&sums[1][row + k * PASS][column];
                const float2 y = make_float2(fmaf(D.x, low(us), y0.x + y1.x), fmaf(D.y, high(us), y0.y + y1.y));
                const float2 z = make_float2(low(zs), high(zs));
                store2<ALL>(out + k * PASS * (int64_t)p.e, live,
                            make_float2(y.x * z.x * scan_sigmoid<bf16>(z.x), y.y * z.y * scan_sigmoid<bf16>(z.y)));
            }
        out += NEXT * (int64_t)p.e, left_finish -= NEXT;
    }
    // Of `tiles` of the block. Prepared: STAGES - 1 of the group's tiles ahead of the scan warps; on their way: SLOTS - STAGES after them.
    __device__ void run(int tiles) {
        const int count = (tiles - group + S::GROUPS - 1) / S::GROUPS;
        for (int i = 0; i < S::SLOTS - 1; i++) fetch(i, count);
        copy_wait<S::SLOTS - S::STAGES>();                            // tiles 0 to STAGES - 2 are here
        for (int i = 0; i < S::STAGES - 1; i++)
            if (i < count) prepare(i);
        for (int i = 0; i < count; i++) {
            copy_wait<S::SLOTS - S::STAGES - 1>();                    // tile i + STAGES - 1 is here
            if (i + S::STAGES - 1 < count) prepare(i + S::STAGES - 1);
            fetch(i + S::SLOTS - 1, count);
            s.done[stage(i)].wait((uint32_t)(i / S::STAGES));
            finish(i);
        }
    }
};

template <class S, bool VEC>
__global__ void __launch_bounds__(S::THREADS, 1)
narrow_forward_kernel(bf16* out, bf16* saved, float* h_out, const float* h_first, int h_stride, ScanInput<bf16> p) {
    extern __shared__ float4 shared_floats[];
    ForwardBlock<S>& s = *(ForwardBlock<S>*)shared_floats;
    const int64_t segment = (int64_t)blockIdx.y * gridDim.z + blockIdx.z, first_tile = blockIdx.z * p.segment_tiles;
    const int64_t tiles = (p.T + S::STEPS - 1) / S::STEPS;
    const int count = (int)min(p.segment_tiles, tiles - first_tile), warp = threadIdx.x / WARP;
    if (threadIdx.x < S::ALL_STAGES) s.full[threadIdx.x].init(S::ROW_WARPS), s.done[threadIdx.x].init(S::SCAN_WARPS);
    __syncthreads();
    if (warp < S::SCAN_WARPS) return scan_forward(s, saved, h_out, h_first, h_stride, p, segment, first_tile, count);
    if (S::IDLE && warp >= 16 && warp < 16 + S::IDLE) return;
    const int row_warp = warp - S::SCAN_WARPS - (warp < 16 ? 0 : S::IDLE);
    if (VEC && (blockIdx.x + 1) * S::CHANNELS <= p.e) NarrowRows<S, true>(s, out, p, row_warp, first_tile).run(count);
    else NarrowRows<S, false>(s, out, p, row_warp, first_tile).run(count);
}

} // namespace gpu::scan_mma
