// A decode step in one kernel (decode/step.cuh): the ring in shared memory through which weights, keys and states come, and the producer
// warps that fill it. One warp that issues bulk copies of 1 KB does 60 clocks a copy, whatever their size below that.
#pragma once
#include "step_common.cuh"

namespace gpu {
namespace decode {

constexpr int PIECE = 512;                                 // columns of a piece: two blocks of 32 for each warp
constexpr int PITCH = PIECE * 2 + 64;                      // bytes of a row in the ring; the end shifts the next row by half the banks
constexpr int STAGE = TILE * PITCH, STAGES = 12;

// ---------------------------------------------------------------------------------------------------------------------
// Barriers and copies

__device__ inline void mbarrier_init(unsigned bar, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}
__device__ inline void mbarrier_arrive(unsigned bar) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory"); }
#if __CUDA_ARCH__ >= 900
__device__ inline void mbarrier_expect(unsigned bar, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ inline void mbarrier_wait(unsigned bar, unsigned parity) {
    asm volatile("{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra DONE;\nbra AGAIN;\nDONE:\n}"
                 ::"r"(bar), "r"(parity)
                 : "memory");
}
__device__ inline void bulk_copy(unsigned to, const void* from, unsigned bytes, unsigned bar) {              // addresses and size: multiples of 16
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes), "r"(bar)
                 : "memory");
}
// Counts as an arrival when this thread's cp.async are through, and as one to wait for from now on
__device__ inline void copies_arrive(unsigned bar) { asm volatile("cp.async.mbarrier.arrive.shared::cta.b64 [%0];" ::"r"(bar) : "memory"); }
#endif
__device__ inline uint4 load_shared(unsigned at) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
    return v;
}

__device__ inline float4 load_shared4(unsigned at) {
    const uint4 v = load_shared(at);
    return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w));
}

// ---------------------------------------------------------------------------------------------------------------------
// The ring and its producers

#if __CUDA_ARCH__ >= 900
struct RingPlace {
    int stage = 0;
    unsigned parity = 0;
    __device__ void next() { if (++stage == STAGES) stage = 0, parity ^= 1; }
};

struct Ring {
    unsigned data, full, empty;            // shared addresses
    RingPlace at;
    __device__ unsigned stage() const { return data + at.stage * STAGE; }
    __device__ unsigned full_bar() const { return full + at.stage * 8; }
    // producer: all lanes
    __device__ void wait_for_room() { mbarrier_wait(empty + at.stage * 8, at.parity ^ 1); }
    // consumers: all lanes
    __device__ unsigned wait_for_piece() { mbarrier_wait(full_bar(), at.parity); return stage(); }
    __device__ void release() {
        __syncwarp();
        if (threadIdx.x % WARP == 0) mbarrier_arrive(empty + at.stage * 8);
        at.next();
    }
};

// The four producer warps: each brings a quarter of every piece
struct Producer {
    const StepArgs& a;
    Ring ring;
    RingPlace landed{};
    int issued = 0;
    const int lane = threadIdx.x % WARP, warp = (threadIdx.x - THREADS) / WARP;

    __device__ void begin_piece() {
        ring.wait_for_room();
        if (issued++ >= a.depth) {                                                 // more under way would only make the consumers' loads wait
            mbarrier_wait(ring.full + landed.stage * 8, landed.parity);
            landed.next();
        }
    }
    // Row r of a piece: `bytes` from `from` to offset `to`
    __device__ void copy_rows(int rows, unsigned bytes, const void* from, unsigned to) {      // from, to: of row 4 lane + warp
        begin_piece();
        const int mine = (rows - warp + 3) / 4;
        if (lane == 0) {
            if (mine > 0) mbarrier_expect(ring.full_bar(), mine * bytes);
            else mbarrier_arrive(ring.full_bar());
        }
        __syncwarp();
        if (lane < mine) bulk_copy(ring.stage() + to, from, bytes, ring.full_bar());
        ring.at.next();
    }
    __device__ void prefetch(const float* p, int n) const {                        // to L2
        for (int i = lane * 32; i < n + 31; i += WARP * 32) asm volatile("prefetch.global.L2 [%0];" ::"l"(p + min(i, n - 1)));
    }

    __device__ void linear(const Phase& ph, Task task, const Share& share, int results, int K, const __nv_bfloat16* w) {
        if (warp == 3 && share.count > 0) {                                        // small operands of the results
            const int c0 = share.begin, n = share.count;
            if (task == Task::residual && ph.norm) prefetch(ph.norm + c0, n);
            if (task == Task::scan) prefetch(ph.D + c0, n), prefetch(ph.dt_bias + c0, n);
            if (task == Task::conv && c0 < a.e) prefetch(ph.conv_w + c0 * 4, min(n, a.e - c0) * 4), prefetch(ph.conv_b + c0, min(n, a.e - c0));
        }
        const int row = 4 * lane + warp;
        for (int t = 0; t < share.tiles; t++) {
            const int first = share.tile_begin(t), n = share.tile_begin(t + 1) - first, slots = in_pairs(task) ? 2 * n : n;
            const __nv_bfloat16* from = w + (int64_t)weight_row(task, results, a.hd, first, n, min(row, slots - 1)) * K;
            for (int k = 0; k < K; k += PIECE) copy_rows(slots, min(PIECE, K - k) * 2, from + k, row * PITCH);
            if (task == Task::scan) {                                              // A_log, then each sequence's h
                const int r = min(row, a.B), bytes = n * a.N * 4;
                copy_rows(a.B + 1, bytes, r == 0 ? ph.A_log + (int64_t)first * a.N : ph.h + ((int64_t)(r - 1) * a.e + first) * a.N, r * bytes);
            }
        }
    }

    // Keys and values come as 16-byte copies: a bulk copy of 256 bytes costs as much as one of 1,024
    template <int LANES> __device__ void keys(const Phase& ph, int64_t position /*of sequence `lane`*/) {
        constexpr int TOKENS = 2 * THREADS / LANES;
        const int row = a.hd * 2, chunks = row / 16, per_group = a.H / a.G;        // bytes of a key
        const int64_t token = (int64_t)2 * a.G * row, capacity = ph.capacity;
        for (int part = blockIdx.x; part < a.B * a.H * a.splits; part += gridDim.x) {
            const KeyPart k(a, part, capacity, [&](int b) { return __shfl_sync(0xffffffffu, position, b); });
            const char* from = (const char*)ph.ring + (k.b * capacity + k.begin) * token + (int64_t)(k.h / per_group) * row;
            for (int64_t left = k.end - k.begin; left > 0; left -= TOKENS, from += TOKENS * token) {
                const int n = (int)min((int64_t)TOKENS, left);
                begin_piece();
                for (int i = warp * WARP + lane; i < n * chunks; i += PRODUCERS) {
                    const int key = quotient(i, chunks), c = (i - key * chunks) * 16;
                    const char* src = from + key * token + c;
                    copy_async<16>(ring.stage() + key * row + c, src);
                    copy_async<16>(ring.stage() + (TOKENS + key) * row + c, src + a.G * row);
                }
                copies_arrive(ring.full_bar());
                __syncwarp();
                if (lane == 0) mbarrier_arrive(ring.full_bar());
                ring.at.next();
            }
        }
    }

    template <int LANES> __device__ void run() {
        bool waited = false;
        int64_t position = 0;
        Task task = a.phases->task;
        int results = a.phases->results, K = a.phases->K;
        const __nv_bfloat16* w = a.phases->w;
        int4 share = a.shares[blockIdx.x];
        for (int p = 0; p < a.count; p++) {
            const Phase &ph = a.phases[p], &next = a.phases[min(p + 1, a.count - 1)];
            const Task next_task = next.task;                                      // before they are needed
            const int next_results = next.results, next_K = next.K;
            const int4 next_share = a.shares[min(p + 1, a.count - 1) * gridDim.x + blockIdx.x];
            const __nv_bfloat16* next_w = next.w;
            if (task == Task::attend) {
                if (!waited) {                                                     // the position is the sampler's
                    asm volatile("griddepcontrol.wait;" ::: "memory");
                    if (lane < a.B) position = __ldcg((const long long*)a.position + lane);
                    waited = true;
                }
                keys<LANES>(ph, position);
            } else if (task != Task::combine) {
                linear(ph, task, Share(share), results, K, w);
            }
            task = next_task, results = next_results, K = next_K, w = next_w, share = next_share;
        }
    }
};
#endif

} // namespace decode
} // namespace gpu
