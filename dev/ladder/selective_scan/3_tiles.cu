// 3. Tiles in shared memory. The loop of program 2 waits for memory at every step. Here a block of 64 threads and channels fetches 16 steps at
// once, in pieces of 16 bytes, and while it works on these the next 16 are on their way (tile.cuh). B and C are made into
// floats once for the block instead of once for each channel: of program 2's instructions these conversions were a third.
//
// What limits it: 1.5 warps a scheduler. The 16 recurrences of a thread are independent, which hides the latency of their instructions, but
// a scheduler with one warp has nothing to do while that one waits at a barrier or for shared memory, and some have one and some two.
#include "tile.cuh"

namespace scan {

constexpr int THREADS = 64;                            // and channels of a block

__global__ void __launch_bounds__(THREADS) forward_kernel(Inputs p, bf16* out) {
    __shared__ Tile<THREADS, 3, THREADS> s;
    const int c = threadIdx.x, first_channel = blockIdx.x * THREADS;
    const int64_t first_row = blockIdx.y * p.s.T, tiles = p.s.T / STEPS;
    float A2[N], h[N] = {};
    load_A2(A2, p.A_log, first_channel + c, 0);
    const float D = p.D[first_channel + c];
    s.fetch(p, 0, first_row, first_channel);
    for (int64_t tile = 0; tile < tiles; tile++) {
        const int stage = tile & 1;
        const int64_t row = first_row + tile * STEPS;
        s.arrive();
        if (tile + 1 < tiles) s.fetch(p, stage ^ 1, row + STEPS, first_channel);
        s.prepare(p, stage, first_channel);
        __syncthreads();
#pragma unroll 1
        for (int t = 0; t < STEPS; t++) {
            const float dt = s.dt[t][c], input = s.input[t][c];
            float y = D * to_float(s.rows[stage][U][t][c]);
#pragma unroll
            for (int n = 0; n < N; n += 4) {
                const auto B = load_vec<4>(&s.bc[t][n]), C = load_vec<4>(&s.bc[t][N + n]);
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    h[n + j] = fmaf(ex2(dt * A2[n + j]), h[n + j], input * B[j]);
                    y = fmaf(h[n + j], C[j], y);
                }
            }
            bf16& z = s.rows[stage][Z][t][c];          // out takes its place, so that the tile leaves in pieces of 16 bytes too
            z = from_float<bf16>(y * silu(to_float(z)));
        }
        __syncthreads();
        s.store(out, stage, Z, row, first_channel, p.s.e);
    }
}

} // namespace scan

int main() {
    using namespace scan;
    return run({"3 tiles in shared memory", [](const Inputs& p, const Outputs& r) {
        forward_kernel<<<dim3(p.s.e / THREADS, p.s.B), THREADS>>>(p, r.out);
        LAUNCH_CHECK();
    }});
}
