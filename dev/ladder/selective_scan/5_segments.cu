// 5. Segments of time. With one long sequence instead of eight, program 4 has an eighth of its blocks, and most of the chip is idle. Time has to be
// split, though step t needs step t - 1. It can be, because a run of steps is an affine map of the state it starts from:
//
//     h_last = exp(A (dt_first + ... + dt_last)) h_before + (h_last from a zero state)
//
// (a) every segment from a zero state, keeping its last state and its sum of dt; (b) the segments chained, a few operations each;
// (c) program 4's kernel on every segment, now from the right state. (a) repeats most of (c)'s work, all but y: about 1.7 times the
// instructions for as many times the blocks as there are segments. It pays only where blocks are short.
#include "lanes.cuh"

namespace scan {

constexpr int SEGMENTS = 8;

// (a) ends (B,S,e,N), time (B,S,e): the sum of dt
__global__ void __launch_bounds__(THREADS) segment_kernel(Inputs p, float* ends, float* time, int64_t segment_tiles) {
    __shared__ Tile<CHANNELS, 2, THREADS> s;
    const int c = threadIdx.x / LANES, q = threadIdx.x % LANES, first_channel = blockIdx.x * CHANNELS, channel = first_channel + c;
    const int64_t segment = blockIdx.y * gridDim.z + blockIdx.z, first_row = blockIdx.y * p.s.T + blockIdx.z * segment_tiles * STEPS;
    float A2[4], h[4] = {}, total = 0.f;
    load_A2(A2, p.A_log, channel, q * 4);
    s.fetch(p, 0, first_row, first_channel);
    for (int64_t tile = 0; tile < segment_tiles; tile++) {
        s.arrive();
        if (tile + 1 < segment_tiles) s.fetch(p, (tile + 1) & 1, first_row + (tile + 1) * STEPS, first_channel);
        s.prepare(p, tile & 1, first_channel);
        __syncthreads();
#pragma unroll
        for (int t = 0; t < STEPS; t++) {
            const auto B = load_vec<4>(&s.bc[t][q * 4]);
            total += s.dt[t][c];
#pragma unroll
            for (int j = 0; j < 4; j++) h[j] = fmaf(ex2(s.dt[t][c] * A2[j]), h[j], s.input[t][c] * B[j]);
        }
    }
    store_vec(ends + (segment * p.s.e + channel) * N + q * 4, Vec<float, 4>{h[0], h[1], h[2], h[3]});
    if (q == 0) time[segment * p.s.e + channel] = total;
}

// (b) In place: what a segment ends with becomes what it starts from. A thread is one state of one channel of one sequence.
__global__ void chain_kernel(Inputs p, float* ends, const float* time) {
    const int channel = (blockIdx.x * blockDim.x + threadIdx.x) / N, n = threadIdx.x % N;
    float A2[1], h = 0.f;
    load_A2(A2, p.A_log, channel, n);
    for (int k = 0; k < SEGMENTS; k++) {
        const int64_t at = ((int64_t)blockIdx.y * SEGMENTS + k) * p.s.e + channel;
        const float local = ends[at * N + n];
        ends[at * N + n] = h;
        h = fmaf(ex2(A2[0] * time[at]), h, local);
    }
}

static size_t scratch_bytes(const Sizes& s) { return (size_t)s.B * SEGMENTS * s.e * (N + 1) * sizeof(float); }

static void forward_in_segments(const Inputs& p, const Outputs& r) {
    float *ends = (float*)r.scratch, *time = ends + (int64_t)p.s.B * SEGMENTS * p.s.e * N;
    const int64_t segment_tiles = p.s.T / STEPS / SEGMENTS;
    const dim3 grid(p.s.e / CHANNELS, p.s.B, SEGMENTS);
    segment_kernel<<<grid, THREADS>>>(p, ends, time, segment_tiles);
    LAUNCH_CHECK();
    chain_kernel<<<dim3(p.s.e * N / 128, p.s.B), 128>>>(p, ends, time);
    LAUNCH_CHECK();
    lanes_forward_kernel<<<grid, THREADS>>>(p, r.out, nullptr, ends, segment_tiles);
    LAUNCH_CHECK();
}

} // namespace scan

int main() {
    using namespace scan;
    const Sizes timed{1, 32768, 3072}, checked{1, 2048, 64};
    Program whole{"5 one sequence of 32,768, in one piece", [](const Inputs& p, const Outputs& r) { lanes_forward(p, r.out, nullptr); }};
    Program split{"5 the same in 8 segments", forward_in_segments};
    split.scratch_bytes = scratch_bytes;
    for (Program* program : {&whole, &split}) {
        program->timed = timed, program->checked = checked;
        if (const int status = run(*program)) return status;
    }
}
