// A tile: 16 steps of CHANNELS neighbouring channels of one sequence, in shared memory. Introduced by program 3, used by all after it.
// Rows come in pieces of 16 bytes by cp.async, which passes by the registers: while one tile is worked on the next is on its way.
#pragma once
#include <cuda_pipeline.h>

#include "scan.cuh"

namespace scan {

enum { U, DT_RAW, Z, DOUT };                           // the arrays of a tile; forward has no DOUT

template <int CHANNELS, int ARRAYS, int THREADS> struct alignas(16) Tile {
    bf16 rows[2][ARRAYS][STEPS][CHANNELS];             // as they come; results take the place of what they were made from
    bf16 bc_rows[2][STEPS][2 * N];
    float dt[STEPS][CHANNELS], input[STEPS][CHANNELS]; // dt and dt u
    float bc[STEPS][2 * N];                            // B | C

    // Starts the copy of the tile whose first step is first_row of (B T)
    __device__ void fetch(const Inputs& p, int stage, int64_t first_row, int first_channel) {
        const bf16* from[4] = {p.u, p.dt_raw, p.z, p.dout};
#pragma unroll
        for (int a = 0; a < ARRAYS; a++)
            each<STEPS * CHANNELS / 8, THREADS>([&](int i) {
                const int t = i / (CHANNELS / 8), c = i % (CHANNELS / 8) * 8;
                __pipeline_memcpy_async(&rows[stage][a][t][c], from[a] + (first_row + t) * p.s.e + first_channel + c, 16);
            });
        each<STEPS * 2 * N / 8, THREADS>(
            [&](int i) { __pipeline_memcpy_async(&bc_rows[stage][i / 4][i % 4 * 8], p.bc + first_row * 2 * N + i * 8, 16); });
        __pipeline_commit();
    }
    // The tile is there, and all threads have left the one before
    __device__ void arrive() {
        __pipeline_wait_prior(0);
        __syncthreads();
    }
    // What no state is needed for: once for each (t, c), not once for each state
    __device__ void prepare(const Inputs& p, int stage, int first_channel) {
        each<STEPS * CHANNELS, THREADS>([&](int i) {
            const int t = i / CHANNELS, c = i % CHANNELS;
            const float step = softplus_fast(to_float(rows[stage][DT_RAW][t][c]) + p.dt_bias[first_channel + c]);
            dt[t][c] = step;
            input[t][c] = step * to_float(rows[stage][U][t][c]);
        });
        each<STEPS * 2 * N, THREADS>([&](int i) { bc[i / (2 * N)][i % (2 * N)] = to_float(bc_rows[stage][i / (2 * N)][i % (2 * N)]); });
    }
    // One array of the tile to the same rows of `to`
    __device__ void store(bf16* to, int stage, int array, int64_t first_row, int first_channel, int e) const {
        each<STEPS * CHANNELS / 8, THREADS>([&](int i) {
            const int t = i / (CHANNELS / 8), c = i % (CHANNELS / 8) * 8;
            store_vec(to + (first_row + t) * e + first_channel + c, load_vec<8>(&rows[stage][array][t][c]));
        });
    }
};

} // namespace scan
