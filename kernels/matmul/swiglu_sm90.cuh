// SwiGLU behind or before a product, for Hopper (gemm_sm90.cuh has the product). a gate, b up, s = sigma(a):
//   forward    a|b = n (w1|w2)^T      h = a s b                                         n (M,d), w1|w2 (2F,d), a|b (M,2F), h (M,F)
//   backward   dh = dy w3             da = dh b s (1 + a (1 - s))      db = dh a s      dy (M,d), w3 (d,F); h once more where it was not kept
// a and b are rounded to bf16 before h is made of them, as they are elsewhere; dh is never rounded, nor in memory.
//
// What follows a tile:
//   forward    A tile is 128 columns of a and the same of b. The warps that finish it make h, and a and b leave on the way.
//   backward   a and b come through the stages, 64 columns at a time, and da and db take their places (and h the third). Finished beside the tensor
//              cores, like forward, it took 14.3 ms a step of Samba-421M on an H200 for 9.4; 12.0 where forward left h's derivatives, so that no
//              more than two products an element were to be made. Not the arithmetic, then; what it is was not found.
//
// Flops, Samba-421M (M 32768, d 1536, F 4096): forward 825 GFLOP, 0.83 ms at the nominal 989 TFLOP/s; backward 412, 0.42 ms. Bytes: forward
// M (2 d + 6 F) + 4 d F = 0.93 GB, 0.31 ms at 3 TB/s; backward M (2 d + 8 F) + 2 d F = 1.19 GB, 0.40 ms.
// Clocks of a backward tile on an H100: 24,600 of products, 6,500 of what follows, of which special functions (two an element, 16 a clock) 4,100.
// Alone on an H100 at its power limit: forward 1.25 ms, backward 0.78 (clusters in step, and forward's a and b stored by TMA: 1.29 and 0.84).
// In a training step on an H200, before that: forward 1.23 ms, cuBLASLt's product and the pass 1.33 (the product alone 1.14); backward 0.78,
// product and pass 0.90. At that limit it is energy that counts: backward with the next special functions made beside these results was no faster;
// forward with the halves of a tile's columns multiplied apart at its ends, one handed over beside the other's products, took 1.30 for 1.23 (H200).
#pragma once
#include "../swiglu.cuh"
#include "gemm_sm90.cuh"

namespace gpu::sm90 {

// ---------------------------------------------------------------------------------------------------------------------
// Forward

#ifdef SAMBA_SM90A_CODE
__device__ inline uint32_t swiglu_pair(uint32_t gate, uint32_t up) {
    const float2 a = floats(gate), b = floats(up);
    return pack(a.x * sigmoid<bf16>(a.x) * b.x, a.y * sigmoid<bf16>(a.y) * b.y);
}
#endif
struct SwigluForward {
    static constexpr bool BACKWARD = false;
    static constexpr int CLOCKS = 1500;
    bf16 *gate_up, *h;
#ifdef SAMBA_SM90A_CODE
    // w1 from one block of the cluster and w2 from the other
    __device__ static int right_row(const GemmTile& tile, int rank, const GemmSize& s) { return rank * s.columns + tile.column * GEMM_N / 2; }
    // Half a warp makes a row of 128 columns of h, and a and b leave on the way
    __device__ void finish(const GemmShared<false>& shared, const GemmTile& tile, const GemmSize& s, int finisher, int lane) const {
        const int chunk = lane % 16, F = s.columns;
#pragma unroll 4
        for (int pair = finisher; pair < GEMM_M / 2; pair += GEMM_FINISHERS) {
            const int row = pair * 2 + lane / 16, column = tile.column * GEMM_N / 2 + chunk * 8;
            const uint4 a = load_shared(shared.place(row, chunk)), b = load_shared(shared.place(row, GEMM_N / 16 + chunk));
            const uint4 out = make_uint4(swiglu_pair(a.x, b.x), swiglu_pair(a.y, b.y), swiglu_pair(a.z, b.z), swiglu_pair(a.w, b.w));
            if (tile.row + row >= s.M) continue;
            bf16* const ab = gate_up + (int64_t)(tile.row + row) * 2 * F + column;
            *(uint4*)ab = a, *(uint4*)(ab + F) = b;
            *(uint4*)(h + (int64_t)(tile.row + row) * F + column) = out;
        }
    }
#endif
};

// ---------------------------------------------------------------------------------------------------------------------
// Backward

#ifdef SAMBA_SM90A_CODE
struct SwigluGradient { float da, db, h; };
__device__ inline SwigluGradient swiglu_gradient(float dh, float a, float b) {
    const float s = sigmoid<bf16>(a), as = a * s;
    return {dh * b * (s + fmaf(-as, s, as)), dh * as, as * b};
}

template <bool MAKE_H> struct SwigluBackwardConsumer : GemmConsumer<true> {
    using GemmConsumer::GemmConsumer;
    __device__ uint32_t place(int i) const { return turn.at(shared) + row * 128 + ((2 * i + half) ^ (row % 8)) * 16; }   // of 16 columns 16 i ..

    // 64 columns of dh: results take their places in the stage
    __device__ void differentiate(const float* dh) const {
        uint32_t gate[4][4], up[4][4];
#pragma unroll
        for (int i = 0; i < 4; i++) load_blocks(gate[i], place(i)), load_blocks(up[i], place(i) + SLAB);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint32_t out[4];
#pragma unroll
            for (int r = 0; r < 4; r++) {
                const float2 a = floats(gate[i][r]), b = floats(up[i][r]);
                const SwigluGradient x = swiglu_gradient(dh[8 * i + 2 * r], a.x, b.x), y = swiglu_gradient(dh[8 * i + 2 * r + 1], a.y, b.y);
                gate[i][r] = pack(x.da, y.da), up[i][r] = pack(x.db, y.db), out[r] = pack(x.h, y.h);
            }
            store_blocks(place(i), gate[i]);
            store_blocks(place(i) + SLAB, up[i]);
            if (MAKE_H) store_blocks(place(i) + 2 * SLAB, out);
        }
    }
    __device__ void run() {
        for (int n = blockIdx.x / GEMM_CLUSTER; n < gemm_tiles(s); n += gridDim.x / GEMM_CLUSTER) {
            float c[128];
            multiply(c);
#pragma unroll
            for (int j = 0; j < GEMM_CHUNKS; j++, turn.next()) {
                barrier_wait(turn.full(shared), turn.parity);
                differentiate(c + 32 * j);
                fence_async();                                           // TMA will read it
                __syncwarp();
                if (lane == 0) barrier_arrive(shared.made(j));
            }
        }
    }
};
#endif

template <bool MAKE_H> struct SwigluBackward {
    static constexpr bool BACKWARD = true;
    static constexpr int CLOCKS = 7000;
    CUtensorMap gate_up, dgate_up, h;                                     // h: only if it is made
#ifdef SAMBA_SM90A_CODE
    using Consumer = SwigluBackwardConsumer<MAKE_H>;
    __device__ void load(const GemmShared<true>& shared, Turn<true>& turn, const GemmTile& tile, const GemmSize& s) const {
        for (int j = 0; j < GEMM_CHUNKS; j++, turn.next()) {
            barrier_wait(turn.empty(shared), turn.parity ^ 1);
            barrier_expect(turn.full(shared), 2 * SLAB);
            for (int part = 0; part < 2; part++)
                matrix_load(turn.at(shared) + part * SLAB, &gate_up, turn.full(shared), part * s.columns + tile.column * GEMM_N + j * 64, tile.row);
        }
    }
    // 64 columns that were made leave, and their stage is free again
    __device__ void store(const GemmShared<true>& shared, const GemmSize& s) const {
        Turn<true> turn;
        int parity = 0;
        for (int n = blockIdx.x / GEMM_CLUSTER; n < gemm_tiles(s); n += gridDim.x / GEMM_CLUSTER, parity ^= 1) {
            const GemmTile tile = gemm_tile(s, n);
            turn.stage = (turn.stage + s.k_steps) % GemmShared<true>::STAGES;
            for (int j = 0; j < GEMM_CHUNKS; j++, turn.next()) {
                const int column = tile.column * GEMM_N + j * 64;
                barrier_wait(shared.made(j), parity);
                matrix_store(&dgate_up, turn.at(shared), column, tile.row);
                matrix_store(&dgate_up, turn.at(shared) + SLAB, s.columns + column, tile.row);
                if (MAKE_H) matrix_store(&h, turn.at(shared) + 2 * SLAB, column, tile.row);
                tma_store_commit();
                matrix_store_wait<0>();
                for (int warpgroup = 0; warpgroup < 2; warpgroup++) turn.release(shared);
            }
        }
        asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    }
#endif
};

// ---------------------------------------------------------------------------------------------------------------------

// Do the kernels take these sizes and addresses (null: not given) on this GPU?
inline bool swiglu_gemm_usable(std::initializer_list<const void*> arrays, int64_t M, int F, int d) {
    return F % GEMM_N == 0 && gemm_usable(arrays, M, d);
}

// gate_up (M,2F) and h (M,F) from n (M,d), w1|w2 (2F,d)
inline void swiglu_gemm_forward(bf16* h, bf16* gate_up, const bf16* n, const bf16* w12, int64_t M, int F, int d, Stream stream) {
    const CUtensorMap left = matrix_map(n, M, d, GEMM_M), right = matrix_map(w12, 2 * (int64_t)F, d, GEMM_N / 2);
    launch_gemm(left, right, SwigluForward{gate_up, h}, M, F, d, F / (GEMM_N / 2), stream);
}
// dgate_up (M,2F) from dy (M,d), w3 (d,F), gate_up (M,2F); and h (M,F) if given
inline void swiglu_gemm_backward(bf16* dgate_up, bf16* h, const bf16* dy, const bf16* w3, const bf16* gate_up, int64_t M, int F, int d,
                                 Stream stream) {
    const CUtensorMap left = matrix_map(dy, M, d, GEMM_M), right = matrix_map(w3, d, F, GEMM_K);
    const CUtensorMap in = matrix_map(gate_up, M, 2 * (int64_t)F, GEMM_M), out = matrix_map(dgate_up, M, 2 * (int64_t)F, GEMM_M);
    if (h) launch_gemm(left, right, SwigluBackward<true>{in, out, matrix_map(h, M, F, GEMM_M)}, M, F, d, F / GEMM_N, stream);
    else launch_gemm(left, right, SwigluBackward<false>{in, out, out}, M, F, d, F / GEMM_N, stream);
}

} // namespace gpu::sm90
