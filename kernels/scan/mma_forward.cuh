// The forward pass of scan/mma.cuh. Grid (channel blocks, B, segments). h_first (B,S,e,h_stride), or null for zeros.
// Per (t,c): 8 bytes and 4 of saved states; 20 special functions. B 8, T 4096, d_inner 3072 on an H200: 0.698 ms, 66% of the bound of the special
// functions. Twelve row warps with four channels a thread, as here, took 0.703 ms where eight with six took 0.736.
#pragma once
#include "mma.cuh"

namespace gpu::scan_mma {

// What both forward kernels' blocks have between row warps and scan warps. S: the kernel's sizes, and its Stage. Row warps take the tiles in turns
// of GROUPS; each group has two stages for its tiles between it and the scan warps, and SLOTS for those on their way from memory and these.
template <class S> struct ForwardBlock {
    static constexpr int QUADS = S::CHANNELS / 4, ROW_THREADS = S::STEPS * QUADS, ROW_WARPS = ROW_THREADS / WARP;   // a thread: 4 channels of a step
    static constexpr int STAGES = 2 * S::GROUPS, RING = S::GROUPS * S::SLOTS, THREADS = (S::SCAN_WARPS + S::GROUPS * ROW_WARPS) * WARP;
    static_assert(ROW_THREADS % WARP == 0 && S::SCAN_WARPS % 4 == 0 && S::GROUPS * ROW_WARPS % 4 == 0);
    typename S::Stage stages[STAGES];                                 // tile i: i % STAGES
    uint2 words[RING][3][ROW_THREADS];                                // u, dt_raw, z: each row thread's own. Tile i: i % RING
    bf16 bc[RING][S::STEPS][32];                                      // B | C
    Gate full[STAGES], done[STAGES];
    __device__ void init(int scan_warps_of_tile = S::SCAN_WARPS) {
        if (threadIdx.x < STAGES) full[threadIdx.x].init(ROW_WARPS), done[threadIdx.x].init(scan_warps_of_tile);
        __syncthreads();                                              // for racecheck, which takes a barrier's first write for one to any word
    }
};
// To be kept in its register: the compiler would make it again for every use
__device__ inline int kept(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// A row thread of a forward kernel has four neighbouring channels at a step of every GROUPS-th tile, and copies words of B | C. i: the group's i-th
// tile. ALL: all channels of the block are within the arrays and four of them may be moved at once.
template <class S, bool ALL> struct RowsForward {
    using Block = ForwardBlock<S>;
    static constexpr int NEXT = S::GROUPS * S::STEPS, CHUNKS = S::STEPS * 8;      // steps from tile to tile; fours of B | C of a tile
    Block& s;
    const ScanInput<bf16>& p;
    const int group, thread, row, column, live;                       // live: channels from the thread's to the array's end
    int left_fetch, left_prepare, left_finish;                        // steps from the thread's one of the tile that is fetched (...) next to the end
    const bf16 *from[3], *bc;                                         // of the tile that `fetch` fetches next
    bf16* out;                                                        // of the tile that `finish` finishes next
    int64_t start;                                                    // the thread's step, of (B,T), of the tile that `prepare` prepares next
    float bias[4], D[4];

    __device__ RowsForward(Block& s_, bf16* out_, const ScanInput<bf16>& p_, int row_warp, int64_t first_tile)
        : s(s_), p(p_), group(row_warp / Block::ROW_WARPS), thread(kept(row_warp % Block::ROW_WARPS * WARP + (int)threadIdx.x % WARP)),
          row(kept(thread / Block::QUADS)), column(kept(thread % Block::QUADS * 4)), live(p_.e - (int)blockIdx.x * S::CHANNELS - column) {
        const int64_t first = (first_tile + group) * S::STEPS, tile = blockIdx.y * p.T + first;
        const int channel = blockIdx.x * S::CHANNELS + column;
        start = tile + row;
        from[0] = p.u + start * p.e + channel, from[1] = p.dt_raw + start * p.e + channel, from[2] = p.z + start * p.ldz + channel;
        bc = p.bc + (tile + thread / 8) * p.ldbc + thread % 8 * 4, out = out_ + start * p.e + channel;
        left_fetch = left_prepare = left_finish = (int)min(p.T - first, (int64_t)1 << 30) - row;
#pragma unroll
        for (int k = 0; k < 4; k++) bias[k] = k < live ? p.dt_bias[channel + k] : 0.f, D[k] = k < live ? p.D[channel + k] : 0.f;
    }
    __device__ int stage(int i) const { return i % 2 * S::GROUPS + group; }
    __device__ int slot(int i) const { return i % S::SLOTS * S::GROUPS + group; }
    // Past the end: zeros
    __device__ void move(uint2* to, const bf16* at, bool here, int live) const {
        if (ALL) copy_async<8>(to, at, here);
        else *(Vec<bf16, 4>*)to = scan_load<false>(at, 0, here ? live : 0);
    }
    __device__ void fetch(int i, int count) {
        if (i < count) {
#pragma unroll
            for (int a = 0; a < 3; a++) {
                move(&s.words[slot(i)][a][thread], from[a], left_fetch > 0, live);
                from[a] += NEXT * (a == 2 ? p.ldz : (int64_t)p.e);
            }
#pragma unroll
            for (int w = 0; w < CHUNKS; w += Block::ROW_THREADS)
                if (w + Block::ROW_THREADS <= CHUNKS || w + thread < CHUNKS)
                    move((uint2*)s.bc[slot(i)] + w + thread, bc + w / 8 * p.ldbc, (w + thread) / 8 < left_fetch + row, 4);
            bc += NEXT * p.ldbc, left_fetch -= NEXT;
        }
        copy_async_commit();
    }
    __device__ void prepare(int i) {
        auto& to = s.stages[stage(i)];
        const uint2 raw = s.words[slot(i)][1][thread], us = s.words[slot(i)][0][thread];
        float dt[4];
        uint32_t input[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const uint32_t r = k < 2 ? raw.x : raw.y, u = k < 2 ? us.x : us.y;
            dt[k] = scan_softplus<bf16>((k % 2 ? high(r) : low(r)) + bias[k]);
            input[k] = split((k % 2 ? high(u) : low(u)) * dt[k]);
        }
        to.put(row, column, dt, input);
        // Past the end there is no decay, and no input as u is zero; before the start of a document there is nothing
        if (left_prepare <= 0 || (p.starts && p.starts[start])) to.put_dt(row, column, left_prepare <= 0 ? 0.f : SCAN_CUT);
#pragma unroll
        for (int w = 0; w < CHUNKS; w += Block::ROW_THREADS)
            if (w + Block::ROW_THREADS <= CHUNKS || w + thread < CHUNKS)
                to.put_bc((w + thread) / 8, thread % 8 * 4, ((const uint2*)s.bc[slot(i)])[w + thread]);
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
                x[k] = fmaf(D[k], k % 2 ? high(u) : low(u), x[k]) * z * sigmoid<bf16>(z);
            }
            scan_store<ALL>(out, 0, live, x);
        }
        out += NEXT * (int64_t)p.e, left_finish -= NEXT;
    }
    // Of `tiles` of the block. Prepared: one of the group's tiles ahead of the scan warps; on their way: SLOTS - 2 after it.
    __device__ void run(int tiles) {
        const int count = (tiles - group + S::GROUPS - 1) / S::GROUPS;
        for (int i = 0; i < S::SLOTS - 1; i++) fetch(i, count);
        copy_async_wait<S::SLOTS - 2>();                                    // tile 0 is here
        if (count > 0) prepare(0);
        for (int i = 0; i < count; i++) {
            copy_async_wait<S::SLOTS - 3>();                                // tile i + 1 is here
            if (i + 1 < count) prepare(i + 1);
            fetch(i + S::SLOTS - 1, count);
            s.done[stage(i)].wait((uint32_t)(i / 2));
            finish(i);
        }
    }
};
template <bool VEC, class S>
__device__ inline void rows_forward(ForwardBlock<S>& s, bf16* out, const ScanInput<bf16>& p, int64_t first_tile, int64_t count) {
    const int row_warp = threadIdx.x / WARP - S::SCAN_WARPS;
    if (VEC && (blockIdx.x + 1) * S::CHANNELS <= p.e) RowsForward<S, true>(s, out, p, row_warp, first_tile).run((int)count);
    else RowsForward<S, false>(s, out, p, row_warp, first_tile).run((int)count);
}

struct Wide {
    static constexpr int CHANNELS = CH, STEPS = TILE, GROUPS = 1, SLOTS = 4, SCAN_WARPS = scan_mma::SCAN_WARPS;
    struct Stage {                                                    // + 1, + 4: the lanes' words fall in different banks
        float4 pair[TILE][CH / 2 + 1];
        uint32_t b[TILE][16];                                         // quarters
        Diagonal c;
        float y[TILE][CH + 4];
        // dt and dt u split of four channels from c on at step t
        __device__ void put(int t, int c, const float (&dt)[4], const uint32_t (&input)[4]) {
#pragma unroll
            for (int k = 0; k < 2; k++)
                pair[t][c / 2 + k] = make_float4(dt[2 * k], dt[2 * k + 1], __uint_as_float(input[2 * k]), __uint_as_float(input[2 * k + 1]));
        }
        __device__ void put_dt(int t, int c, float dt) {
            for (int k = 0; k < 2; k++) pair[t][c / 2 + k].x = pair[t][c / 2 + k].y = dt;
        }
        // Four values from column n on of B | C at step t
        __device__ void put_bc(int t, int n, uint2 v) {
            if (n < 16) *(uint4*)&b[t][n] = make_uint4(quarter(low(v.x)), quarter(low(v.y)), quarter(high(v.x)), quarter(high(v.y)));
            else *(uint2*)&c[diagonal_row(t)][n - 16] = v;
        }
    };
};

__device__ inline void forward_tile(Wide::Stage& s, States& h, const States& A2, bf16* saved, int live) {
    const int lane = threadIdx.x % WARP, g = lane / 4, q = lane % 4, c = threadIdx.x / WARP * GROUP + 2 * g;
    uint32_t packed[4];
    if (saved) {
        pack_states(packed, h);
        store_saved(saved, packed, live);
    }
    float y[4] = {};                                                  // step t is column t
#pragma unroll
    for (int t = 0; t < TILE; t++) {
        const float4 pair = s.pair[t][c / 2];
        const uint2 B = *(const uint2*)&s.b[t][2 * g], C = diagonal_column(s.c, t, g, q);
        const uint32_t input[2] = {__float_as_uint(pair.z), __float_as_uint(pair.w)};
        decay(h, make_float2(pair.x, pair.y), A2);
        mma8(h[0], input, B.x);
        mma8(h[1], input, B.y);
        pack_states(packed, h);
        mma16(y, packed, C.x, C.y);
    }
    store_steps(&s.y[0][c], CH + 4, y);
}

__device__ inline void scan_forward(ForwardBlock<Wide>& s, bf16* saved, float* h_out, const float* h_first, int h_stride, const ScanInput<bf16>& p,
                                    int64_t segment, int64_t first_tile, int count) {
    const int lane = threadIdx.x % WARP, channel = blockIdx.x * CH + threadIdx.x / WARP * GROUP + lane / 4 * 2;
    const int n = lane % 4 * 4, live = p.e - channel;
    const int64_t tiles = (p.T + TILE - 1) / TILE;
    States h = {}, A2;
    load_decay_rates(A2, p.A_log + (int64_t)channel * 16 + n, live);
    if (h_first) load_states(h, h_first + (segment * p.e + channel) * h_stride + n, h_stride, live);
    if (saved) saved += ((blockIdx.y * tiles + first_tile) * p.e + channel) * 16 + n;
    for (int i = 0; i < count; i++) {
        s.full[i & 1].wait(i / 2);
        forward_tile(s.stages[i & 1], h, A2, saved, live);
        s.done[i & 1].arrive();
        if (saved) saved += (int64_t)p.e * 16;
    }
    if (h_out && first_tile + count == tiles) store_states(h_out + (blockIdx.y * (int64_t)p.e + channel) * 16 + n, h, 16, live);
}

template <bool VEC>
__global__ void __launch_bounds__(ForwardBlock<Wide>::THREADS, 1)
forward_kernel(bf16* out, bf16* saved, float* h_out, const float* h_first, int h_stride, ScanInput<bf16> p) {
    extern __shared__ float4 shared_floats[];
    ForwardBlock<Wide>& s = *(ForwardBlock<Wide>*)shared_floats;
    const int64_t segment = (int64_t)blockIdx.y * gridDim.z + blockIdx.z, tiles = (p.T + TILE - 1) / TILE;
    const int64_t first_tile = blockIdx.z * p.segment_tiles, count = min(p.segment_tiles, tiles - first_tile);
    s.init();
    for (auto& stage : s.stages) clear_shared(stage.c);
    __syncthreads();
    if (is_scan()) {
        SCAN_MMA_REGISTERS("inc", "104");
        scan_forward(s, saved, h_out, h_first, h_stride, p, segment, first_tile, count);
    } else {
        SCAN_MMA_REGISTERS("dec", "56");
        rows_forward<VEC>(s, out, p, first_tile, count);
    }
}

} // namespace gpu::scan_mma
