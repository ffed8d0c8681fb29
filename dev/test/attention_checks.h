// What the attention tests share: a case, its data, the twin in double, and the GPU's paths checked against it.
#pragma once
#include "../../kernels/cpu/attention.h"
#ifndef SAMBA_CPU
#include "../../kernels/attention.cuh"
#endif
#include "test_util.h"

struct AttentionCase {
    int B;
    int64_t T;
    int H, G, hd;
    int64_t window;
    bool documents = false;                                              // several in a sequence
    int64_t capacity = 0, position = 0;                                  // of the ring of earlier keys, if position > 0
    bool rope = false;                                                   // queries and keys were turned: backward turns back
    int64_t row() const { return (int64_t)(H + 2 * G) * hd; }
    size_t qkv() const { return (size_t)(B * T * row()); }
    size_t out() const { return (size_t)(B * T * H * hd); }
    size_t lse() const { return (size_t)(B * H * T); }
    size_t ring() const { return (size_t)(B * capacity * 2 * G * hd); }
    std::string name() const {
        return "B " + std::to_string(B) + " T " + std::to_string(T) + " H " + std::to_string(H) + " G " + std::to_string(G) + " hd " +
               std::to_string(hd) + " window " + std::to_string(window) + (documents ? " documents" : "") +
               (position > 0 ? " capacity " + std::to_string(capacity) + " position " + std::to_string(position) : "") +
               (rope ? " rope" : "");
    }
    // Documents of 1 token and more; the first began in an earlier call where there is one
    std::vector<int> starts() const {
        std::vector<int> s;
        unsigned h = 12345;
        for (int b = 0; b < B && documents; b++) {
            int start = position > 0 ? -(int)std::min<int64_t>(position, 20) : 0, next = 0;
            for (int t = 0; t < (int)T; t++) {
                if (t == next) start = t == 0 ? start : t, h = h * 1664525u + 1013904223u, next = t + 1 + (int)((h >> 8) % (h >> 30 ? 90 : 400));
                s.push_back(start);
            }
        }
        return s;
    }
    AttentionCase with_documents() const { AttentionCase c = *this; c.documents = true; return c; }
    AttentionCase with_rope() const { AttentionCase c = *this; c.rope = true; return c; }
    std::vector<double> rope_table() const {                             // rounded as the device gets it
        std::vector<double> table(rope ? (size_t)(T * hd) : 0);
        if (rope) cpu::rope_table(table.data(), position, T, hd, 10000.0);
        return rounded<float>(table);
    }
};

// Inputs as the GPU sees them, rounded to X, and what the twin makes of them in double
template <class X> struct AttentionData {
    std::vector<double> qkv, dout, ring, rope;
    std::vector<int> starts;
    AttentionData(const AttentionCase& c, uint64_t seed)
        : qkv(rounded<X>(random_values(c.qkv(), seed, 2.0))), dout(rounded<X>(random_values(c.out(), seed + 1))),
          ring(rounded<X>(random_values(c.ring(), seed + 2, 2.0))), rope(c.rope_table()), starts(c.starts()) {}
    const int* starts_pointer() const { return starts.empty() ? nullptr : starts.data(); }
};
struct AttentionResults { std::vector<double> out, lse, dqkv; };

template <class X> AttentionResults twin_forward(const AttentionCase& c, const AttentionData<X>& x) {
    AttentionResults r{std::vector<double>(c.out()), std::vector<double>(c.lse()), {}};
    cpu::attention_forward(r.out.data(), r.lse.data(), x.qkv.data(), c.position > 0 ? x.ring.data() : nullptr, c.capacity, c.position,
                           x.starts_pointer(), c.B, c.T, c.H, c.G, c.hd, c.window);
    return r;
}
// r: of forward, and already rounded where the GPU is given them rounded
template <class X> void twin_backward(AttentionResults& r, const AttentionCase& c, const AttentionData<X>& x) {
    std::vector<double> workspace(c.lse());
    r.dqkv.assign(c.qkv(), NAN);
    cpu::attention_backward(r.dqkv.data(), x.dout.data(), r.out.data(), x.qkv.data(), r.lse.data(), c.position > 0 ? x.ring.data() : nullptr,
                            c.capacity, c.position, x.starts_pointer(), workspace.data(), c.B, c.T, c.H, c.G, c.hd, c.window,
                            c.rope ? x.rope.data() : nullptr);
}

// The part of qkv that holds queries (0), keys (1) or values (2)
inline std::vector<double> attention_part(const std::vector<double>& qkv, const AttentionCase& c, int part) {
    std::vector<double> out;
    const int R = c.H / c.G;
    for (int64_t i = 0; i < (int64_t)qkv.size(); i++) {
        const int slot = i / c.hd % (R + 2);
        if ((slot < R ? 0 : slot - R + 1) == part) out.push_back(qkv[i]);
    }
    return out;
}

#ifndef SAMBA_CPU
// A path of the GPU: the portable kernels or the device's best, and how much memory dS may take (0: it is made again)
struct AttentionPath { bool portable; int64_t limit = gpu::attn::DS_LIMIT; };

// One problem on the device. Results and workspace are poisoned before every run.
template <class X> struct AttentionOnGpu {
    AttentionCase c;
    AttentionPath path;
    DeviceBuffer<X> qkv, dout, ring, out, dqkv;
    DeviceBuffer<int> starts, drawn;
    DeviceBuffer<float> lse, rope;
    gpu::attn::Workspace sizes;
    DeviceBuffer<char> workspace;

    AttentionOnGpu(const AttentionCase& c, const AttentionData<X>& x, AttentionPath path)
        : c(c), path(path), qkv(to_type<X>(x.qkv)), dout(to_type<X>(x.dout)), ring(to_type<X>(x.ring)), out(c.out()), dqkv(c.qkv()), starts(x.starts),
          drawn(std::vector<int>{0}), lse(c.lse()), rope(to_type<float>(x.rope)),
          sizes(c.B, c.T, c.H, c.hd, c.window <= 0 ? c.T : std::min(c.window, c.T), sizeof(X) == 2, path.limit),
          workspace((size_t)sizes.bytes()) {}
    gpu::attn::Args<X> args() {
        gpu::attn::Args<X> a = gpu::attention_args<X>(qkv.ptr, ring.ptr, c.capacity, c.position, c.documents ? starts.ptr : nullptr, c.B, c.T, c.H,
                                                      c.G, c.hd, c.window);
        a.out = out.ptr, a.lse = lse.ptr, a.dqkv = dqkv.ptr, a.dout = dout.ptr, a.saved_out = out.ptr, a.drawn = drawn.ptr;
        if (c.rope) a.rope = rope.ptr;
        sizes.give(a, workspace.ptr);
        return a;
    }
    void forward() {
        out.poison(), lse.poison();
        gpu::attn::forward(args(), path.portable, Stream{});
    }
    void backward() {
        dqkv.poison(), workspace.poison();
        gpu::attn::backward(args(), path.portable, Stream{});
    }
};

template <class X> bool same_bits(const std::vector<X>& a, const std::vector<X>& b) { return memcmp(a.data(), b.data(), a.size() * sizeof(X)) == 0; }

template <class X> void expect_forward(const AttentionCase& c, AttentionPath path) {
    const AttentionData<X> x(c, 6);
    const AttentionResults want = twin_forward(c, x);
    AttentionOnGpu<X> on_gpu(c, x, path);
    on_gpu.forward();
    const std::vector<X> got = on_gpu.out.host();
    EXPECT_LT(rel_l2(to_double(got), want.out), tolerance<X>()) << c.name();
    EXPECT_LT(rel_l2(to_double(on_gpu.lse.host()), want.lse), 1e-5) << c.name();              // fp32 in both builds
    on_gpu.forward();
    EXPECT_TRUE(same_bits(got, on_gpu.out.host())) << c.name();
    EXPECT_EQ(on_gpu.drawn.host()[0], 0) << c.name();
}

// The twin once, for several paths
template <class X> void expect_backward(const AttentionCase& c, std::initializer_list<AttentionPath> paths) {
    const AttentionData<X> x(c, 7);
    AttentionResults want = twin_forward(c, x);
    want.out = rounded<X>(want.out), want.lse = rounded<float>(want.lse);
    twin_backward(want, c, x);
    for (const AttentionPath& path : paths) {
        const std::string name = c.name() + (path.limit == 0 ? ", dS made again" : "");
        AttentionOnGpu<X> on_gpu(c, x, path);
        on_gpu.out.set(to_type<X>(want.out)), on_gpu.lse.set(to_type<float>(want.lse));
        on_gpu.backward();
        const std::vector<X> got = on_gpu.dqkv.host();
        EXPECT_LT(rel_l2(to_double(got), want.dqkv), tolerance<X>()) << name;
        on_gpu.backward();
        EXPECT_TRUE(same_bits(got, on_gpu.dqkv.host())) << name;
        EXPECT_EQ(on_gpu.drawn.host()[0], 0) << name;
        if (c.position == 0 && (c.T == 1 || c.window == 1)) continue;                        // one key: dq = dk = 0 up to rounding
        for (int part = 0; part < 3; part++)
            EXPECT_LT(rel_l2(attention_part(to_double(got), c, part), attention_part(want.dqkv, c, part)), tolerance<X>())
                << name << " part " << "qkv"[part];
    }
}

// Chosen rows of a long sequence against the formula: T up to 2^17 is too long for the twin. Backward uses the GPU's own out and lse, of
// which the chosen rows have been checked.
template <class X> void expect_long(const AttentionCase& c, AttentionPath path) {
    const AttentionData<X> x(c, 9);
    AttentionOnGpu<X> on_gpu(c, x, path);
    on_gpu.forward();
    on_gpu.backward();
    const std::vector<double> out = to_double(on_gpu.out.host()), lse = to_double(on_gpu.lse.host()), dqkv = to_double(on_gpu.dqkv.host());
    const cpu::AttentionShape shape = cpu::attention_shape(c.T, c.H, c.G, c.hd, c.window, false, 0, 0, x.starts_pointer());
    const double scale = 1 / std::sqrt((double)c.hd);
    auto dot = [&](const double* a, const double* b) {
        double sum = 0;
        for (int d = 0; d < c.hd; d++) sum += a[d] * b[d];
        return sum;
    };
    auto slice = [&](const std::vector<double>& v, int64_t at) { return std::vector<double>(v.begin() + at, v.begin() + at + c.hd); };
    struct Pair { double probability, dp, delta, ds; };
    auto pair = [&](int64_t i, int64_t p, int h) {                                           // of sequence 0
        const double *go = &x.dout[shape.output(0, i, h)], *o = &out[shape.output(0, i, h)];
        Pair r{std::exp(dot(&x.qkv[shape.query(0, i, h)], &x.qkv[shape.key(0, p, shape.group(h))]) * scale - lse[h * c.T + i]),
               dot(go, &x.qkv[shape.value(0, p, shape.group(h))]), dot(go, o), 0};
        r.ds = r.probability * (r.dp - r.delta) * scale;
        return r;
    };
    auto distance = [&](const std::vector<double>& a, const std::vector<double>& b) {
        double sum = 0;
        for (int d = 0; d < c.hd; d++) sum += (a[d] - b[d]) * (a[d] - b[d]);
        return std::sqrt(sum);
    };
    for (int64_t t : {(int64_t)0, (int64_t)1, c.T / 3, c.T / 2 + 63, c.T - 129, c.T - 1})
        for (int h = 0; h < c.H; h++) {
            const int g = shape.group(h);
            std::vector<double> o(c.hd, 0.0), dq(c.hd, 0.0), dk(c.hd, 0.0), dv(c.hd, 0.0);
            double sum = 0, terms = 0;                                   // terms: what dq's addends would be if dP and delta did not cancel
            for (int64_t p = shape.first_key(0, t); p <= t; p++) {
                const double e = std::exp(dot(&x.qkv[shape.query(0, t, h)], &x.qkv[shape.key(0, p, g)]) * scale);
                sum += e;
                for (int d = 0; d < c.hd; d++) o[d] += e * x.qkv[shape.value(0, p, g) + d];
            }
            for (double& v : o) v /= sum;
            EXPECT_NEAR(lse[h * c.T + t], std::log(sum), 1e-5 * std::max(1.0, std::abs(std::log(sum)))) << c.name() << " t " << t;
            EXPECT_LT(rel_l2(slice(out, shape.output(0, t, h)), o), 2 * tolerance<X>()) << c.name() << " t " << t;   // one row: no average
            for (int64_t p = shape.first_key(0, t); p <= t; p++) {
                const Pair r = pair(t, p, h);
                const double* k = &x.qkv[shape.key(0, p, g)];
                for (int d = 0; d < c.hd; d++) dq[d] += r.ds * k[d];
                terms += std::pow(r.probability * (std::abs(r.dp) + std::abs(r.delta)) * scale, 2) * dot(k, k);
            }
            // A query that sees one key or two may have a dq of almost 0: the difference of numbers that are each exact to the tolerance
            EXPECT_LT(distance(slice(dqkv, shape.query(0, t, h)), dq), tolerance<X>() * std::sqrt(terms)) << c.name() << " t " << t;
            if (h % (c.H / c.G) != 0) continue;
            for (int other = h; other < h + c.H / c.G; other++)
                for (int64_t i = t; i < std::min(c.T, t + shape.window) && shape.first_key(0, i) <= t; i++) {
                    const Pair r = pair(i, t, other);
                    for (int d = 0; d < c.hd; d++) {
                        dk[d] += r.ds * x.qkv[shape.query(0, i, other) + d];
                        dv[d] += r.probability * x.dout[shape.output(0, i, other) + d];
                    }
                }
            EXPECT_LT(rel_l2(slice(dqkv, shape.key(0, t, g)), dk), 2 * tolerance<X>()) << c.name() << " key " << t;
            EXPECT_LT(rel_l2(slice(dqkv, shape.value(0, t, g)), dv), 2 * tolerance<X>()) << c.name() << " value " << t;
        }
}

// A hundred runs of forward and backward have the same bits
template <class X> void expect_same_bits(const AttentionCase& c, AttentionPath path) {
    AttentionOnGpu<X> on_gpu(c, AttentionData<X>(c, 8), path);
    on_gpu.forward(), on_gpu.backward();
    const std::vector<X> out = on_gpu.out.host(), dqkv = on_gpu.dqkv.host();
    for (int run = 1; run < 100; run++) {
        on_gpu.forward(), on_gpu.backward();
        ASSERT_TRUE(same_bits(out, on_gpu.out.host())) << c.name() << " run " << run;
        ASSERT_TRUE(same_bits(dqkv, on_gpu.dqkv.host())) << c.name() << " run " << run;
    }
}
#endif
