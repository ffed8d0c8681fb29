// A decode step in one kernel (decode/step.cuh): attention of one query a sequence and head. Each block its parts of the keys, LANES lanes
// a key; then the sum of the parts, and the new key takes its place.
#pragma once
#include "attention.cuh"
#include "step_linear.cuh"

namespace gpu {
namespace decode {

#if __CUDA_ARCH__ >= 900
template <int LANES> struct Attend {
    using X = __nv_bfloat16;
    static constexpr int TEAMS = THREADS / LANES, TOKENS = 2 * TEAMS;
    const StepArgs& a;
    const Phase& ph;
    Scratch s;
    const int sub = threadIdx.x % LANES, team = threadIdx.x / LANES, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;

    struct Heads { RawEight<X> q, key, value; };            // of a part; its own token's key and value belong to the first split
    __device__ Heads load(int part) const {
        const int per_group = quotient(a.H, a.G), head = quotient(part, a.splits), b = quotient(head, a.H), h = head - b * a.H;
        const int group = quotient(h, per_group), hd = a.hd;
        const bool live = part < a.B * a.H * a.splits && sub * 8 < hd;
        const X* heads = ph.qkv + (b * a.G + group) * (per_group + 2) * hd + sub * 8;
        const bool own = live && part == head * a.splits && warp == 0;
        return {load_eight(heads + (h - group * per_group) * hd, live), load_eight(heads + per_group * hd, own),
                load_eight(heads + (per_group + 1) * hd, own)};
    }
    __device__ static float dot(const Eight& x, const Eight& y) {
        float even = 0, odd = 0;
#pragma unroll
        for (int i = 0; i < 8; i += 2) even += x.v[i] * y.v[i], odd += x.v[i + 1] * y.v[i + 1];
        return lanes_sum<LANES>(even + odd);
    }
    // The warp's teams become one, in all lanes
    __device__ static void merge_teams(Softmax& soft) {
#pragma unroll
        for (int o = LANES; o < WARP; o *= 2) {
            const float other = __shfl_xor_sync(0xffffffffu, soft.top, o), top = fmaxf(soft.top, other);
            const float mine = soft.top == -INFINITY ? 0.f : exp2f(soft.top - top), theirs = other == -INFINITY ? 0.f : exp2f(other - top);
            soft.top = top;
            soft.sum = soft.sum * mine + __shfl_xor_sync(0xffffffffu, soft.sum, o) * theirs;
#pragma unroll
            for (int i = 0; i < 8; i++) soft.acc.v[i] = soft.acc.v[i] * mine + __shfl_xor_sync(0xffffffffu, soft.acc.v[i], o) * theirs;
        }
    }

    __device__ void run(Ring& ring) const {
        const int hd = a.hd, width = 2 + hd, parts = a.B * a.H * a.splits;
        const bool inside = sub * 8 < hd;
        const float scale = LOG2E * rsqrtf((float)hd);
        float* sums = s.partial;
        Heads heads = load(blockIdx.x);
        for (int part = blockIdx.x; part < parts; part += gridDim.x) {
            const KeyPart k(a, part, ph.capacity, [&](int b) { return s.position[b]; });
            Eight q = unpack(heads.q);
            q.multiply(scale);
            Softmax soft;
            soft.clear();
            if (k.split == 0 && warp == 0) {                                       // the token itself
                const float score = dot(q, unpack(heads.key));
                if (team == 0) soft.top = score, soft.add(score, unpack(heads.value));
            }
            heads = load(part + gridDim.x);
            for (int64_t left = k.end - k.begin; left > 0; left -= TOKENS) {
                const int n = (int)min((int64_t)TOKENS, left);
                const unsigned keys = ring.wait_for_piece() + sub * 16, row = hd * 2;
                RawEight<X> key[2]{}, value[2]{};
#pragma unroll
                for (int j = 0; j < 2; j++)
                    if (const int i = team + j * TEAMS; i < n && inside)
                        key[j].a = load_shared(keys + i * row), value[j].a = load_shared(keys + (TOKENS + i) * row);
                ring.release();
                float score[2], top = soft.top;
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const float x = dot(q, unpack(key[j]));
                    score[j] = team + j * TEAMS < n ? x : -INFINITY;
                    top = fmaxf(top, score[j]);
                }
                if (top == -INFINITY) continue;
                soft.rescale(top);
#pragma unroll
                for (int j = 0; j < 2; j++) soft.add(score[j], unpack(value[j]));
            }
            merge_teams(soft);
            float* to = sums + warp * width;
            if (lane == 0) to[0] = soft.top, to[1] = soft.sum;
            if (lane < LANES && inside)
#pragma unroll
                for (int i = 0; i < 8; i++) to[2 + sub * 8 + i] = soft.acc.v[i];
            consumers_meet();
            if ((int)threadIdx.x < hd) {                                           // warps in order
                const Joined all = join_shared<WARPS>(sums, width, threadIdx.x);
                float* out = a.parts + (int64_t)part * width;
                if (threadIdx.x == 0) out[0] = all.top, out[1] = all.sum;
                out[2 + threadIdx.x] = all.acc;
            }
            sums = sums == s.partial ? s.partial + WARP_SUMS : s.partial;
        }
    }
};

// A value of a head from its parts: 16 under way at a time
__device__ inline float sum_of_parts(const float* part, int splits, int width, int j) {
    float top = -INFINITY, sum = 0, acc = 0;
    for (int first = 0; first < splits; first += 16) {
        float tops[16], sums[16], values[16], most = top;
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const bool live = first + i < splits;
            const float* one = part + (int64_t)(first + i) * width;
            tops[i] = live ? __ldcg(one) : -INFINITY, sums[i] = live ? __ldcg(one + 1) : 0.f, values[i] = live ? __ldcg(one + 2 + j) : 0.f;
        }
#pragma unroll
        for (int i = 0; i < 16; i++) most = fmaxf(most, tops[i]);
        const float before = top == -INFINITY ? 0.f : exp2f(top - most);           // the first part holds the token itself: most is a number
        sum *= before, acc *= before, top = most;
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const float shrink = exp2f(tops[i] - most);                            // 0 for a part without keys
            sum += sums[i] * shrink, acc += values[i] * shrink;
        }
    }
    return __fdividef(acc, sum);
}

__device__ inline void combine(const StepArgs& a, const Phase& ph, const int64_t* position) {
    using X = __nv_bfloat16;
    const int hd = a.hd, width = 2 + hd, per_group = quotient(a.H, a.G), lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int first = (warp * gridDim.x + blockIdx.x) * WARP + lane, stride = gridDim.x * THREADS;
    for (int item = first; item < a.B * a.H * hd; item += stride) {
        const int head = quotient(item, hd);
        ph.out[item] = from_float<X>(sum_of_parts(a.parts + (int64_t)head * a.splits * width, a.splits, width, item - head * hd));
    }
    const int chunks = hd / 8;
    for (int item = first; ph.capacity > 0 && item < a.B * 2 * a.G * chunks; item += stride) {       // 8 values each of (B,2,G,hd)
        const int row = quotient(item, chunks), c = (item - row * chunks) * 8;
        const int half = quotient(row, a.G), g = row - half * a.G, value = half % 2, b = half / 2;
        int64_t slot = position[b];                                                // modulo capacity
        slot -= (int64_t)((double)slot * ph.per_capacity) * ph.capacity;
        if (slot < 0) slot += ph.capacity;
        if (slot >= ph.capacity) slot -= ph.capacity;
        const uint4 v = __ldcg((const uint4*)(ph.qkv + (((int64_t)b * a.G + g) * (per_group + 2) + per_group + value) * hd + c));
        *(uint4*)(ph.ring + (((b * ph.capacity + slot) * 2 + value) * a.G + g) * hd + c) = v;
    }
}
#endif

} // namespace decode
} // namespace gpu
