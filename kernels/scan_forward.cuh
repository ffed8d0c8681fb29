// Forward scan on tensor cores with blocks of as many channels as fill the GPU. See scan_mma.cuh for the mathematics of the tiles.
//
// A scan warp is 8 channels of 8 states, and takes two steps at a time: rows 0 to 7 of its matrices are the channels at the first step, rows 8
// to 15 the same channels at the second. Lane (g = lane / 4, q = lane % 4) keeps channel g and two states, 2q and 2q + 1 of the eight.
//   the input:  lanes q < 2 hold the k places of the first step, the others those of the second; each number is split in two bf16 and there
//               are two lanes, so B is halved. These products do not wait for the state.
//   the sums:   k is the 8 states; the columns are 8 steps, of which all but the two are masked.
// The decays of 8 steps and their inputs do not depend on the state, so they are made while the 8 before are walked.
#pragma once
#include "scan_mma.cuh"

namespace gpu::scan_mma {

// Shape of a block: CHANNELS, a multiple of 8; row warps; stages that they are ahead of the scan warps (plus one); tiles of memory's in all
template <int CHANNELS_, int ROW_WARPS_, int STAGES_, int SLOTS_> struct ForwardShape {
    static constexpr int CHANNELS = CHANNELS_, STEPS = 16, STAGES = STAGES_, SLOTS = SLOTS_;
    static constexpr int SCAN_WARPS = CHANNELS / 4, ROW_WARPS = ROW_WARPS_, SCAN_THREADS = SCAN_WARPS * WARP, ROW_THREADS = ROW_WARPS * WARP;
    static constexpr int THREADS = SCAN_THREADS + ROW_THREADS, ITEMS = STEPS * CHANNELS / 2 / ROW_THREADS;
    static constexpr int WORDS = (STEPS * 16 + ROW_THREADS - 1) / ROW_THREADS;
    static_assert(ITEMS * ROW_THREADS * 2 == STEPS * CHANNELS && (SLOTS & (SLOTS - 1)) == 0 && SLOTS > STAGES);
};

template <class S> struct ForwardBlock {
    struct Stage {
        float2 pair[S::STEPS / 2][S::CHANNELS][2];                    // of two steps: dt; dt u split
        uint32_t b[S::STEPS][16];                                     // halves, twice
        bf16 c[S::STEPS][16];
        float y[2][S::STEPS][S::CHANNELS + 4];                        // of the two halves of the states
    } stages[S::STAGES];
    uint32_t words[S::SLOTS][3][S::ITEMS][S::ROW_THREADS], bc[S::SLOTS][S::WORDS][S::ROW_THREADS];   // each row thread's own
    float skip_weight[S::CHANNELS], bias[S::CHANNELS];
    Gate full[S::STAGES], done[S::STAGES];
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

// 8 steps as a scan warp's lane sees them
struct Steps {
    float a[8][2];                                                    // decays
    uint32_t x[8], b[4], c;                                           // inputs; B of pairs of steps; C of step g
    template <class Stage> __device__ void load(const Stage& s, int first, const Lane& l, const float (&A2)[2]) {
        c = *(const uint32_t*)&s.c[first + l.g][8 * l.half + 2 * l.q];
#pragma unroll
        for (int t = 0; t < 8; t += 2) {
            const float4 two = *(const float4*)s.pair[(first + t) / 2][l.c];
            x[t] = __float_as_uint(two.y), x[t + 1] = __float_as_uint(two.w);
            b[t / 2] = s.b[first + t + l.q / 2][8 * l.half + l.g];
#pragma unroll
            for (int k = 0; k < 2; k++) a[t][k] = scan_ex2(two.x * A2[k]), a[t + 1][k] = scan_ex2(two.z * A2[k]);
        }
    }
    // h through the 8 steps; the lane's channel's sums over the half, of steps 2q and 2q + 1 in y[0] and y[3]
    __device__ void walk(float (&h)[2], float (&y)[4], const Lane& l) const {
#pragma unroll
        for (int t = 0; t < 8; t += 2) {
            float input[4];
            const uint32_t rows[2] = {x[t] & l.first, x[t + 1] & l.second};
            product8(input, rows, b[t / 2]);
            uint32_t now[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                h[0] = fmaf(a[t + i][0], h[0], input[2 * i]), h[1] = fmaf(a[t + i][1], h[1], input[2 * i + 1]);
                now[i] = pack(h[0], h[1]);
            }
            mma8(y, now, c & l.mine[t / 2]);
        }
    }
};

template <class S> struct ScanForward {
    ForwardBlock<S>& s;
    bf16* saved;                                                      // the lane's states of the next group of 8 steps, or null
    const int channel;
    const bool live;
    const int64_t next;                                               // from a group's saved states to the next one's
    int groups;                                                       // of 8 steps, to the end of the sequence
    Lane l;
    float h[2] = {}, A2[2];
    __device__ void walk(const Steps& steps, float (*y)[S::CHANNELS + 4]) {
        if (saved) {
            if (live && groups > 0) *(uint32_t*)saved = pack(h[0], h[1]);
            saved += next, groups--;
        }
        float sums[4] = {};
        steps.walk(h, sums, l);
        y[2 * l.q][l.c] = sums[0], y[2 * l.q + 1][l.c] = sums[3];
    }
    __device__ void run(int count) {
        Steps even, odd;
        s.full[0].wait(0);
        even.load(s.stages[0], 0, l, A2);
        for (int i = 0; i < count; i++) {
            auto& stage = s.stages[i % S::STAGES];
            odd.load(stage, 8, l, A2);
            walk(even, stage.y[l.half]);
            if (i + 1 < count) {
                s.full[(i + 1) % S::STAGES].wait((uint32_t)((i + 1) / S::STAGES));
                even.load(s.stages[(i + 1) % S::STAGES], 0, l, A2);
            }
            walk(odd, stage.y[l.half] + 8);
            s.done[i % S::STAGES].arrive();
        }
    }
};

template <class S>
__device__ inline void scan_forward(ForwardBlock<S>& s, bf16* saved, float* h_out, const float* h_first, int h_stride, const ScanInput<bf16>& p,
                                    int64_t segment, int64_t first_tile, int count) {
    const Lane l;
    const int channel = blockIdx.x * S::CHANNELS + l.c, n = 8 * l.half + 2 * l.q;
    const int64_t groups = (p.T + 7) / 8, tiles = (p.T + S::STEPS - 1) / S::STEPS;
    const bool live = channel < p.e;
    ScanForward<S> scan{s, nullptr, channel, live, (int64_t)p.e * 16, (int)min(groups - first_tile * 2, (int64_t)1 << 30), l, {}, {}};
    if (saved) scan.saved = saved + ((blockIdx.y * groups + first_tile * 2) * p.e + channel) * 16 + n;
#pragma unroll
    for (int k = 0; k < 2; k++) {
        scan.A2[k] = live ? -expf(p.A_log[(int64_t)channel * 16 + n + k]) * SCAN_LOG2E : 0.f;
        if (h_first && live) scan.h[k] = h_first[(segment * p.e + channel) * h_stride + n + k];
    }
    scan.run(count);
    if (h_out && live && first_tile + count == tiles) *(float2*)(h_out + (blockIdx.y * (int64_t)p.e + channel) * 16 + n) = make_float2(scan.h[0], scan.h[1]);
}

// A row thread has ITEMS pairs of channels of steps of every tile, and words of B | C
template <class S, bool ALL> struct RowsForward2 {
    // Either all items of one pair of channels, PASS steps apart, or all of one step, 64 channels apart
    static constexpr bool ONE_PAIR = S::ROW_THREADS % (S::CHANNELS / 2) == 0;
    static constexpr int PASS = ONE_PAIR ? S::ROW_THREADS / (S::CHANNELS / 2) : 0, NEXT = ONE_PAIR ? 0 : 2 * WARP;
    static_assert(ONE_PAIR || (S::ROW_WARPS == S::STEPS && S::CHANNELS % (2 * WARP) == 0));
    ForwardBlock<S>& s;
    const ScanInput<bf16>& p;
    const int thread, row, column;                                    // of item 0
    const int left_channels;
    int left_fetch, left_prepare, left_finish;                        // steps from the tile that is fetched (prepared, finished) next to the end
    const bf16 *from[3], *bc;                                         // of item 0 of the tile that `fetch` fetches next
    bf16* out;                                                        // of item 0 of the tile that `finish` finishes next
    const uint8_t* starts;                                            // of the tile that `prepare` prepares next

    __device__ RowsForward2(ForwardBlock<S>& s_, bf16* out_, const ScanInput<bf16>& p_, int64_t first_tile)
        : s(s_), p(p_), thread(threadIdx.x - S::SCAN_THREADS), row(ONE_PAIR ? thread / (S::CHANNELS / 2) : thread / WARP),
          column(ONE_PAIR ? thread % (S::CHANNELS / 2) * 2 : thread % WARP * 2), left_channels(p_.e - (int)blockIdx.x * S::CHANNELS - column) {
        const int64_t tile = blockIdx.y * p.T + first_tile * S::STEPS, at = tile + row;
        const int channel = blockIdx.x * S::CHANNELS + column;
        from[0] = p.u + at * p.e + channel, from[1] = p.dt_raw + at * p.e + channel, from[2] = p.z + at * p.ldz + channel;
        bc = p.bc + (tile + thread / 16) * p.ldbc + thread % 16 * 2, out = out_ + at * p.e + channel;
        starts = p.starts ? p.starts + at : nullptr;
        left_fetch = left_prepare = left_finish = (int)min(p.T - first_tile * S::STEPS, (int64_t)1 << 30);
    }
    __device__ bool word_is_mine(int k) const { return (k + 1) * S::ROW_THREADS <= S::STEPS * 16 || thread + k * S::ROW_THREADS < S::STEPS * 16; }
    __device__ void fetch(int i, int count) {
        const int slot = i & (S::SLOTS - 1);
        if (i < count) {
#pragma unroll
            for (int a = 0; a < 3; a++) {
                const int64_t ld = a == 2 ? p.ldz : p.e;
#pragma unroll
                for (int k = 0; k < S::ITEMS; k++) {
                    const bool live = row + k * PASS < left_fetch;
                    const bf16* at = from[a] + k * (PASS * ld + NEXT);
                    uint32_t* to = &s.words[slot][a][k][thread];
                    if (ALL) copy_async<4>(to, at, live);
                    else *to = (live && left_channels > k * NEXT ? __bfloat16_as_ushort(at[0]) : 0u) |
                               (live && left_channels > k * NEXT + 1 ? (uint32_t)__bfloat16_as_ushort(at[1]) << 16 : 0u);
                }
                from[a] += S::STEPS * ld;
            }
#pragma unroll
            for (int k = 0; k < S::WORDS; k++)
                if (word_is_mine(k)) {
                    const bool live = thread / 16 + k * (S::ROW_THREADS / 16) < left_fetch;
                    const bf16* at = bc + k * (S::ROW_THREADS / 16) * p.ldbc;
                    if (ALL) copy_async<4>(&s.bc[slot][k][thread], at, live);
                    else s.bc[slot][k][thread] = live ? __bfloat16_as_ushort(at[0]) | (uint32_t)__bfloat16_as_ushort(at[1]) << 16 : 0u;
                }
            bc += S::STEPS * p.ldbc, left_fetch -= S::STEPS;
        }
        copy_commit();
    }
    __device__ void prepare(int i) {
        auto& stage = s.stages[i % S::STAGES];
        const int slot = i & (S::SLOTS - 1);
#pragma unroll
        for (int k = 0; k < S::ITEMS; k++) {
            const float2 bias = *(const float2*)&s.bias[column + k * NEXT];
            const uint32_t raw = s.words[slot][1][k][thread], us = s.words[slot][0][k][thread];
            const float2 dt = make_float2(scan_softplus<bf16>(low(raw) + bias.x), scan_softplus<bf16>(high(raw) + bias.y));
            float2(*pair)[2] = &stage.pair[(row + k * PASS) / 2][column + k * NEXT];
            const int odd = (row + k * PASS) % 2;
            pair[0][odd] = make_float2(dt.x, __uint_as_float(split(dt.x * low(us))));
            pair[1][odd] = make_float2(dt.y, __uint_as_float(split(dt.y * high(us))));
        }
        if (starts || left_prepare < S::STEPS) edges(stage);
        if (starts) starts += S::STEPS;
        left_prepare -= S::STEPS;
#pragma unroll
        for (int k = 0; k < S::WORDS; k++)
            if (word_is_mine(k)) {
                const int t = thread / 16 + k * (S::ROW_THREADS / 16), j = thread % 16;
                const uint32_t v = s.bc[slot][k][thread];             // states 2j, 2j + 1 of B, or of C if j > 7
                const float x = 0.5f * low(v), y = 0.5f * high(v);
                if (j < 8) *(uint2*)&stage.b[t][2 * j] = make_uint2(pack(x, x), pack(y, y));
                else *(uint32_t*)&stage.c[t][2 * j - 16] = v;
            }
        s.full[i % S::STAGES].arrive();
    }
    // Past the end there is no decay and no input; before the start of a document there is nothing
    template <class Stage> __device__ void edges(Stage& stage) const {
        for (int k = 0; k < S::ITEMS; k++) {
            float2(*pair)[2] = &stage.pair[(row + k * PASS) / 2][column + k * NEXT];
            const int odd = (row + k * PASS) % 2;
            if (row + k * PASS >= left_prepare) pair[0][odd] = pair[1][odd] = make_float2(0.f, 0.f);
            else if (starts && starts[k * PASS]) pair[0][odd].x = pair[1][odd].x = SCAN_CUT;
        }
    }
    __device__ void finish(int i) {
        const auto& stage = s.stages[i % S::STAGES];
        const int slot = i & (S::SLOTS - 1);
#pragma unroll
        for (int k = 0; k < S::ITEMS; k++)
            if (row + k * PASS < left_finish) {
                const int c = column + k * NEXT;
                const uint32_t us = s.words[slot][0][k][thread], zs = s.words[slot][2][k][thread];
                const float2 y0 = *(const float2*)&stage.y[0][row + k * PASS][c], y1 = *(const float2*)&stage.y[1][row + k * PASS][c];
                const float2 y = make_float2(y0.x + y1.x, y0.y + y1.y), D = *(const float2*)&s.skip_weight[c], z = make_float2(low(zs), high(zs));
                store2<ALL>(out + k * (PASS * (int64_t)p.e + NEXT), left_channels - k * NEXT,
                            make_float2(fmaf(D.x, low(us), y.x) * z.x * scan_sigmoid<bf16>(z.x), fmaf(D.y, high(us), y.y) * z.y * scan_sigmoid<bf16>(z.y)));
            }
        out += S::STEPS * (int64_t)p.e, left_finish -= S::STEPS;
    }
    // Prepared: STAGES - 1 tiles ahead of the scan warps; on their way: the SLOTS - STAGES tiles after them
    __device__ void run(int count) {
        static_assert(S::STAGES <= 4 && S::ROW_THREADS % 16 == 0);
        for (int i = 0; i < S::SLOTS - 1; i++) fetch(i, count);
        copy_wait<S::SLOTS - S::STAGES>();                            // tiles 0 to STAGES - 2 are here
        for (int i = 0; i < S::STAGES - 1; i++)
            if (i < count) prepare(i);
        for (int i = 0; i < count; i++) {
            copy_wait<S::SLOTS - S::STAGES - 1>();                    // tile i + STAGES - 1 is here
            if (i + S::STAGES - 1 < count) prepare(i + S::STAGES - 1);
            fetch(i + S::SLOTS - 1, count);
            s.done[i % S::STAGES].wait((uint32_t)(i / S::STAGES));
            finish(i);
        }
    }
};

template <class S, bool VEC>
__global__ void __launch_bounds__(S::THREADS, 1) narrow_forward_kernel(bf16* out, bf16* saved, float* h_out, const float* h_first, int h_stride, ScanInput<bf16> p) {
    extern __shared__ float4 shared_floats[];
    ForwardBlock<S>& s = *(ForwardBlock<S>*)shared_floats;
    const int64_t segment = (int64_t)blockIdx.y * gridDim.z + blockIdx.z, tiles = (p.T + S::STEPS - 1) / S::STEPS;
    const int64_t first_tile = blockIdx.z * p.segment_tiles;
    const int count = (int)min(p.segment_tiles, tiles - first_tile);
    for (int c = threadIdx.x; c < S::CHANNELS; c += S::THREADS) {
        const int channel = blockIdx.x * S::CHANNELS + c;
        s.skip_weight[c] = channel < p.e ? p.D[channel] : 0.f;
        s.bias[c] = channel < p.e ? p.dt_bias[channel] : 0.f;
    }
    if (threadIdx.x < S::STAGES) s.full[threadIdx.x].init(S::ROW_WARPS), s.done[threadIdx.x].init(S::SCAN_WARPS);
    __syncthreads();
    if (threadIdx.x < S::SCAN_THREADS) scan_forward(s, saved, h_out, h_first, h_stride, p, segment, first_tile, count);
    else if (VEC && (blockIdx.x + 1) * S::CHANNELS <= p.e) RowsForward2<S, true>(s, out, p, first_tile).run(count);
    else RowsForward2<S, false>(s, out, p, first_tile).run(count);
}

} // namespace gpu::scan_mma
