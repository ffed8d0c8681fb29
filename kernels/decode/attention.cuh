// Attention of a decode step: one query a sequence and head over the ring of keys and values. Formula: kernels/cpu/decode.h. Bytes a
// sequence: 4 min(position, window) G hd in bf16, 12.6 MB for a layer of Samba-421M; flops 4 min(position, window) H hd.
#pragma once
#include "common.cuh"

namespace gpu {
namespace decode {

// ---------------------------------------------------------------------------------------------------------------------
// Attention of one query. A block takes a part of the slots of one sequence and group; LANES lanes take a key, 8 of its values each.
// Parts are combined in order by the block that ends last. The number of parts does not depend on the batch.

template <class X> struct AttentionArgs {
    X *out, *ring;                         // (B,H,hd), (B,capacity,2,G,hd)
    float* parts;                          // (B,H,splits,2+hd): maximum, sum, weighted values
    int* ended;                            // (B,G): blocks that are through; zero between calls
    const X* qkv;                          // (B,G,H/G+2,hd): a group's queries, its key, its value
    const float* cos_sin;                  // (B,hd/2,2) or null
    const int64_t* position;               // (B)
    int64_t capacity;
    int H, G, hd, splits;
};

struct Eight {
    float v[8];
    __device__ void multiply(float by) {
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] *= by;
    }
};
template <class X> struct RawEight;
template <> struct RawEight<__nv_bfloat16> { uint4 a; };
template <> struct RawEight<float> { uint4 a, b; };
template <class X> __device__ inline RawEight<X> load_eight(const X* p, bool live) {
    RawEight<X> r{};
    if (live) {
        r.a = __ldcg((const uint4*)p);
        if constexpr (sizeof(X) == 4) r.b = __ldcg((const uint4*)p + 1);
    }
    return r;
}
__device__ inline Eight unpack(const RawEight<__nv_bfloat16>& r) {
    Eight e;
    const unsigned w[4] = {r.a.x, r.a.y, r.a.z, r.a.w};
#pragma unroll
    for (int i = 0; i < 4; i++) e.v[2 * i] = __uint_as_float(w[i] << 16), e.v[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
    return e;
}
__device__ inline Eight unpack(const RawEight<float>& r) {
    return {{__uint_as_float(r.a.x), __uint_as_float(r.a.y), __uint_as_float(r.a.z), __uint_as_float(r.a.w),
             __uint_as_float(r.b.x), __uint_as_float(r.b.y), __uint_as_float(r.b.z), __uint_as_float(r.b.w)}};
}

// Values 8 sub .. 8 sub + 7 of a query or key head after RoPE, rounded to X; zeros past the head
template <class X> __device__ inline Eight turned(const X* head, const float* cos_sin /*(hd/2,2) or null*/, int hd, int sub) {
    Eight e;
    const int half = hd / 2;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int j = sub * 8 + i;
        e.v[i] = 0;
        if (j >= hd) continue;
        e.v[i] = load_fresh(head + j);
        if (!cos_sin) continue;
        const float other = load_fresh(head + (j < half ? j + half : j - half));
        const float c = __ldcg(cos_sin + j % half * 2), s = __ldcg(cos_sin + j % half * 2 + 1);
        e.v[i] = round_to<X>(j < half ? e.v[i] * c - other * s : other * s + e.v[i] * c);
    }
    return e;
}

// q k of a head; every lane of the team gets it
template <int LANES> __device__ inline float head_dot(const Eight& q, const Eight& k) {
    float dot = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) dot += q.v[i] * k.v[i];
    return lanes_sum<LANES>(dot);
}

// Online softmax of one head: scores in units of log2
struct Softmax {
    float top, sum;
    Eight acc;
    __device__ void clear() {
        top = -INFINITY, sum = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) acc.v[i] = 0;
    }
    __device__ void rescale(float to) {    // to > -infinity
        const float shrink = exp2f(top - to);
        top = to, sum *= shrink;
        acc.multiply(shrink);
    }
    __device__ void add(float score, const Eight& v) {
        const float p = exp2f(score - top);
        sum += p;
#pragma unroll
        for (int i = 0; i < 8; i++) acc.v[i] += p * v.v[i];
    }
    __device__ void store(float* to /*(2 + hd)*/, int sub, int hd) const {       // by the lanes of a team
        if (sub == 0) to[0] = top, to[1] = sum;
        for (int i = 0; i < 8; i++)
            if (sub * 8 + i < hd) to[2 + sub * 8 + i] = acc.v[i];
    }
};

// Value j of a head from its N sums (2 + hd) in shared memory, in order
struct Joined { float top, sum, acc; };
template <int N> __device__ inline Joined join_shared(const float* parts, int stride, int j) {
    float top = -INFINITY, sum = 0, acc = 0;
#pragma unroll
    for (int i = 0; i < N; i++) top = fmaxf(top, parts[i * stride]);
#pragma unroll
    for (int i = 0; i < N; i++) {
        const float* part = parts + i * stride;
        const float shrink = part[0] == -INFINITY ? 0.f : exp2f(part[0] - top);
        sum += part[1] * shrink, acc += part[2 + j] * shrink;
    }
    return {top, sum, acc};
}

// The sums of HEADS heads from the group's `first` on over the block's keys, teams in order; one split of keys is the result already
template <class X, int TEAMS, int HEADS>
__device__ inline void join_teams(const AttentionArgs<X>& a, const float* shared_sums /*(TEAMS, HEADS, 2 + hd)*/, int first) {
    const int split = blockIdx.x, g = blockIdx.y, b = blockIdx.z, per_group = a.H / a.G, hd = a.hd, width = 2 + hd;
    const int heads_now = min(HEADS, per_group - first);
    for (int item = threadIdx.x; item < heads_now * hd; item += THREADS) {
        const int h = item / hd, j = item % hd;
        const Joined all = join_shared<TEAMS>(shared_sums + h * width, HEADS * width, j);
        const int64_t head = (int64_t)b * a.H + g * per_group + first + h;
        if (a.splits == 1) {
            a.out[head * hd + j] = from_float<X>(all.acc / all.sum);
        } else {
            float* to = a.parts + (head * a.splits + split) * width;
            if (j == 0) to[0] = all.top, to[1] = all.sum;
            to[2 + j] = all.acc;
        }
    }
}

// The sums over all splits of keys, in order, by the last of the group's blocks to come here
template <class X> __device__ inline void join_parts(const AttentionArgs<X>& a) {
    __shared__ bool last;
    const int g = blockIdx.y, b = blockIdx.z, per_group = a.H / a.G, hd = a.hd, width = 2 + hd;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(a.ended + b * a.G + g, 1) == a.splits - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    if (threadIdx.x == 0) a.ended[b * a.G + g] = 0;
    for (int item = threadIdx.x; item < per_group * hd; item += THREADS) {
        const int64_t head = (int64_t)b * a.H + g * per_group + item / hd;
        const int j = item % hd;
        const float* part = a.parts + head * a.splits * width;
        float top = -INFINITY, sum = 0, acc = 0;
#pragma unroll 8
        for (int i = 0; i < a.splits; i++) top = fmaxf(top, __ldcg(part + i * width));
#pragma unroll 4
        for (int i = 0; i < a.splits; i++) {
            const float shrink = exp2f(__ldcg(part + i * width) - top);          // 0 for a part without keys
            sum += __ldcg(part + i * width + 1) * shrink, acc += __ldcg(part + i * width + 2 + j) * shrink;
        }
        a.out[head * hd + j] = from_float<X>(acc / sum);
    }
}

// Asks L2 for keys and values of slots [begin, end) of the block's group
template <class X> __device__ inline void prefetch_slots(const AttentionArgs<X>& a, int64_t begin, int64_t end) {
    const int g = blockIdx.y, b = blockIdx.z, hd = a.hd;
    if (hd * sizeof(X) % 16 == 0)
        for (int64_t i = begin + threadIdx.x; i < min(end, begin + THREADS); i += THREADS) {
            prefetch_l2(a.ring + ((b * a.capacity + i) * 2 * a.G + g) * hd, hd * sizeof(X));
            prefetch_l2(a.ring + ((b * a.capacity + i) * 2 * a.G + a.G + g) * hd, hd * sizeof(X));
        }
}

// Values 8 sub .. 8 sub + 7 of the token's own value
template <class X> __device__ inline Eight own_value_of(const X* heads, int per_group, int hd, int sub) {
    Eight value;
#pragma unroll
    for (int i = 0; i < 8; i++) value.v[i] = sub * 8 < hd ? load_fresh(heads + (int64_t)(per_group + 1) * hd + sub * 8 + i) : 0.f;
    return value;
}

// Keys and values of the slots from, from + TEAMS, .. below `end`. keys, values: of slot 0, from this lane's on, if the head has some for it
template <int TEAMS, class X, int KEYS>
__device__ inline void load_keys(RawEight<X> (&k)[KEYS], RawEight<X> (&v)[KEYS], const X* keys, const X* values, int64_t token, bool inside,
                                 int64_t from, int64_t end) {
#pragma unroll
    for (int j = 0; j < KEYS; j++) {
        const int64_t i = from + j * TEAMS;
        k[j] = load_eight(keys + i * token, inside && i < end);
        v[j] = load_eight(values + i * token, inside && i < end);
    }
}

// One query head and the keys that load_keys() brought
template <class X, int LANES, int KEYS>
__device__ inline void attend(Softmax& soft, const Eight& q, const RawEight<X> (&k)[KEYS], const RawEight<X> (&v)[KEYS], int64_t from, int64_t end) {
    constexpr int TEAMS = THREADS / LANES;
    float score[KEYS], top = soft.top;
#pragma unroll
    for (int j = 0; j < KEYS; j++) {
        const float dot = head_dot<LANES>(q, unpack(k[j]));
        score[j] = from + j * TEAMS < end ? dot : -INFINITY;
        top = fmaxf(top, score[j]);
    }
    if (top == -INFINITY) return;
    soft.rescale(top);
#pragma unroll
    for (int j = 0; j < KEYS; j++) soft.add(score[j], unpack(v[j]));
}

// A token's 8 values of its key and of its value
template <class X> __device__ inline void put_key_value(X* to_key, X* to_value, const Eight& key, const X* value) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        to_key[i] = from_float<X>(key.v[i]);
        to_value[i] = from_float<X>(load_fresh(value + i));
    }
}

// HEADS query heads of a group at a time
template <class X, int LANES, int HEADS> __global__ void __launch_bounds__(THREADS, 2) attention_kernel(AttentionArgs<X> a) {
    constexpr int TEAMS = THREADS / LANES, KEYS = sizeof(X) == 2 ? 6 : 3;        // a team's keys under way
    extern __shared__ float shared_sums[];                                       // (TEAMS, HEADS, 2 + hd)
    const int split = blockIdx.x, g = blockIdx.y, b = blockIdx.z, sub = threadIdx.x % LANES, team = threadIdx.x / LANES;
    const int per_group = a.H / a.G, hd = a.hd, width = 2 + hd;
    const int64_t position = a.position[b], seen = min(position, a.capacity), share = (seen + a.splits - 1) / a.splits;
    const int64_t begin = split * share, end = min(seen, begin + share);
    const int64_t token = (int64_t)2 * a.G * hd;
    const X *keys = a.ring + (b * a.capacity * 2 * a.G + g) * hd + sub * 8, *values = keys + a.G * hd;
    const bool inside = sub * 8 < hd;
    RawEight<X> k[KEYS], v[KEYS];
    const auto load = [&](int64_t from) { load_keys<TEAMS>(k, v, keys, values, token, inside, from, end); };
    load(begin + team);
    prefetch_slots(a, begin + KEYS * TEAMS, end);
    wait_for_input();
    const X* heads = a.qkv + ((int64_t)b * a.G + g) * (per_group + 2) * hd;      // (per_group + 2, hd): queries, key, value
    const float *turn = a.cos_sin ? a.cos_sin + (int64_t)b * hd : nullptr, scale = LOG2E / sqrtf((float)hd);
    const Eight own_key = turned(heads + (int64_t)per_group * hd, turn, hd, sub);
    for (int first = 0; first < per_group; first += HEADS) {
        Eight q[HEADS];
        Softmax soft[HEADS];
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            soft[h].clear();
            q[h] = turned(heads + (int64_t)min(first + h, per_group - 1) * hd, turn, hd, sub);
            q[h].multiply(scale);
        }
        if (split == 0 && team / (WARP / LANES) == 0) {                           // the token itself; all of warp 0 takes part in the sums
            const Eight value = own_value_of(heads, per_group, hd, sub);
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                const float score = head_dot<LANES>(q[h], own_key);
                if (team == 0) soft[h].top = score, soft[h].add(score, value);
            }
        }
        // whole warps go round together: the bound is that of the warp's first team
        for (int64_t from = begin + team; from - team % (WARP / LANES) < end; from += KEYS * TEAMS) {
            if (first > 0 || from != begin + team) load(from);
#pragma unroll
            for (int h = 0; h < HEADS; h++) attend<X, LANES>(soft[h], q[h], k, v, from, end);
        }
        // the block's sum, teams in order
        if (first > 0) __syncthreads();
#pragma unroll
        for (int h = 0; h < HEADS; h++) soft[h].store(shared_sums + (team * HEADS + h) * width, sub, hd);
        __syncthreads();
        join_teams<X, TEAMS, HEADS>(a, shared_sums, first);
    }
    // The oldest key makes room. Its slot is in this block's part, and all of the block have read it.
    const int64_t slot = a.capacity > 0 ? position % a.capacity : 0;
    if (a.capacity > 0 && split == (position < a.capacity ? 0 : slot / share) && team == 0 && inside) {
        X* to = a.ring + ((b * a.capacity + slot) * 2 * a.G + g) * hd + sub * 8; // (B,capacity,2,G,hd)
        put_key_value(to, to + a.G * hd, own_key, heads + (int64_t)(per_group + 1) * hd + sub * 8);
    }
    if (a.splits > 1) join_parts(a);
}

inline int attention_splits(int G) { return std::clamp(gpu().sms / G, 1, 64); }

template <class X, int LANES> inline void attention(const AttentionArgs<X>& a, int B, Stream stream) {
    const dim3 grid((unsigned)a.splits, (unsigned)a.G, (unsigned)B);
    const size_t head_bytes = (size_t)THREADS / LANES * (2 + a.hd) * sizeof(float);
    if (a.H == a.G) launch(attention_kernel<X, LANES, 1>, grid, THREADS, head_bytes, stream, a);
    else launch(attention_kernel<X, LANES, 2>, grid, THREADS, 2 * head_bytes, stream, a);
}

} // namespace decode
} // namespace gpu
