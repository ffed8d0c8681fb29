// Attention: its twin against a direct evaluation and finite differences; the GPU against the twin, with every kind of tile
// edge (window, T, prefix in the ring), and bit-identical repeats.
#include "../../kernels/ops.cuh"
#include "test_util.h"

namespace {

struct AttentionCase {
    int B;
    int64_t T;
    int H, G, hd;
    int64_t window;
    int64_t row() const { return (int64_t)(H + 2 * G) * hd; }
    size_t qkv() const { return (size_t)(B * T * row()); }
    size_t out() const { return (size_t)(B * T * H * hd); }
    size_t lse() const { return (size_t)(B * H * T); }
    std::string name() const {
        return "B " + std::to_string(B) + " T " + std::to_string(T) + " H " + std::to_string(H) + " G " + std::to_string(G) + " hd " +
               std::to_string(hd) + " window " + std::to_string(window);
    }
};

// The formula with a full row of scores at hand
void direct_attention(std::vector<double>& out, std::vector<double>& lse, const std::vector<double>& qkv, const AttentionCase& c) {
    const int R = c.H / c.G;
    for (int b = 0; b < c.B; b++)
        for (int h = 0; h < c.H; h++)
            for (int64_t i = 0; i < c.T; i++) {
                const double* q = &qkv[(b * c.T + i) * c.row() + (h / R * (R + 2) + h % R) * c.hd];
                const int64_t first = c.window > 0 ? std::max<int64_t>(0, i - c.window + 1) : 0;
                std::vector<double> s, o(c.hd, 0.0);
                double sum = 0;
                for (int64_t p = first; p <= i; p++) {
                    const double* k = &qkv[(b * c.T + p) * c.row() + (h / R * (R + 2) + R) * c.hd];
                    double dot = 0;
                    for (int d = 0; d < c.hd; d++) dot += q[d] * k[d];
                    s.push_back(std::exp(dot / std::sqrt((double)c.hd)));
                    sum += s.back();
                    for (int d = 0; d < c.hd; d++) o[d] += s.back() * k[c.hd + d];
                }
                lse[(b * c.H + h) * c.T + i] = std::log(sum);
                for (int d = 0; d < c.hd; d++) out[((b * c.T + i) * c.H + h) * c.hd + d] = o[d] / sum;
            }
}

TEST(AttentionCpu, ForwardIsTheFormula) {
    for (const AttentionCase& c : {AttentionCase{2, 1, 2, 1, 8, 0}, {1, 130, 4, 2, 16, 17}, {2, 70, 3, 3, 8, 1}, {1, 65, 2, 1, 24, 64}, {1, 200, 1, 1, 8, 0}}) {
        const std::vector<double> qkv = random_values(c.qkv(), 1, 2.0);
        std::vector<double> out(c.out()), lse(c.lse()), want(c.out()), want_lse(c.lse());
        direct_attention(want, want_lse, qkv, c);
        cpu::attention_forward(out.data(), lse.data(), qkv.data(), nullptr, 0, 0, c.B, c.T, c.H, c.G, c.hd, c.window);
        EXPECT_LT(rel_l2(out, want), 1e-12) << c.name();
        EXPECT_LT(rel_l2(lse, want_lse), 1e-12) << c.name();
        const std::vector<float> qkv32 = to_type<float>(qkv);
        std::vector<float> out32(c.out()), lse32(c.lse());
        cpu::attention_forward(out32.data(), lse32.data(), qkv32.data(), nullptr, 0, 0, c.B, c.T, c.H, c.G, c.hd, c.window);
        EXPECT_LT(rel_l2(to_double(out32), want), 2e-6) << c.name();        // float inputs, float sums of hd and T terms
        EXPECT_LT(rel_l2(to_double(lse32), want_lse), 2e-6) << c.name();
    }
}

TEST(AttentionCpu, BackwardIsTheGradient) {
    for (const AttentionCase& c : {AttentionCase{2, 5, 2, 1, 8, 0}, {1, 70, 4, 2, 8, 17}, {1, 100, 2, 2, 4, 70}, {1, 33, 3, 1, 8, 2}}) {
        std::vector<double> qkv = random_values(c.qkv(), 2, 1.5);
        const std::vector<double> weight = random_values(c.out(), 3);
        std::vector<double> out(c.out()), lse(c.lse()), dqkv(c.qkv(), NAN), workspace(cpu::attention_backward_workspace(c.B, c.T, c.H, c.G, c.hd) / 8);
        auto loss = [&] {
            cpu::attention_forward(out.data(), lse.data(), qkv.data(), nullptr, 0, 0, c.B, c.T, c.H, c.G, c.hd, c.window);
            double sum = 0;
            for (size_t i = 0; i < out.size(); i++) sum += out[i] * weight[i];
            return sum;
        };
        loss();
        cpu::attention_backward(dqkv.data(), weight.data(), out.data(), qkv.data(), lse.data(), workspace.data(), c.B, c.T, c.H, c.G, c.hd, c.window);
        expect_gradient(loss, qkv, dqkv, c.name().c_str());
    }
}

TEST(AttentionCpu, WindowOfOneCopiesTheValue) {
    const AttentionCase c{1, 9, 2, 1, 8, 1};
    const std::vector<double> qkv = random_values(c.qkv(), 4);
    std::vector<double> out(c.out()), lse(c.lse());
    cpu::attention_forward(out.data(), lse.data(), qkv.data(), nullptr, 0, 0, c.B, c.T, c.H, c.G, c.hd, c.window);
    for (int64_t t = 0; t < c.T; t++)
        for (int h = 0; h < c.H; h++)
            for (int d = 0; d < c.hd; d++) EXPECT_DOUBLE_EQ(out[(t * c.H + h) * c.hd + d], qkv[t * c.row() + 3 * c.hd + d]);
}

TEST(AttentionCpu, RefusesOddShapes) {
    double x[64] = {};
    EXPECT_THROW(cpu::attention_forward(x, x, x, nullptr, 0, 0, 1, 1, 3, 2, 4, 0), Error);
}

// A sequence in pieces, with the keys and values of earlier pieces in the ring, is the whole sequence.
struct Pieces { AttentionCase c; int64_t capacity; std::vector<int64_t> lengths; };    // the last length repeats
const Pieces PIECES[] = {
    {{2, 60, 4, 2, 16, 17}, 16, {1}},                       // window - 1, wraps, one token at a time
    {{1, 150, 2, 1, 16, 17}, 16, {40, 1, 1, 7, 33}},
    {{1, 150, 2, 1, 64, 100}, 99, {70, 3, 1}},
    {{2, 90, 3, 3, 64, 0}, 90, {50, 1, 13}},                // full attention: the ring holds everything
    {{1, 260, 4, 1, 128, 140}, 150, {130, 129, 1}},         // room to spare
    {{1, 130, 2, 1, 40, 1}, 0, {64, 1, 65}},                // window 1 needs no ring
    {{1, 100, 1, 1, 256, 30}, 29, {33}},
};

TEST(AttentionCpu, PiecesEqualTheWhole) {
    for (const Pieces& pieces : PIECES) {
        const AttentionCase& c = pieces.c;
        const std::vector<double> qkv = random_values(c.qkv(), 5, 1.5);
        std::vector<double> want(c.out()), lse(c.lse()), ring((size_t)c.B * pieces.capacity * 2 * c.G * c.hd + 1, NAN);
        cpu::attention_forward(want.data(), lse.data(), qkv.data(), nullptr, 0, 0, c.B, c.T, c.H, c.G, c.hd, c.window);
        size_t piece = 0;
        for (int64_t t = 0; t < c.T;) {
            const int64_t n = std::min(pieces.lengths[std::min(piece++, pieces.lengths.size() - 1)], c.T - t);
            std::vector<double> part, out((size_t)c.B * n * c.H * c.hd), part_lse((size_t)c.B * c.H * n);
            for (int b = 0; b < c.B; b++) part.insert(part.end(), &qkv[(b * c.T + t) * c.row()], &qkv[(b * c.T + t) * c.row()] + n * c.row());
            cpu::attention_forward(out.data(), part_lse.data(), part.data(), ring.data(), pieces.capacity, t, c.B, n, c.H, c.G, c.hd, c.window);
            cpu::ring_update(ring.data(), part.data(), pieces.capacity, t, c.B, n, c.H, c.G, c.hd);
            std::vector<double> want_part;
            for (int b = 0; b < c.B; b++) want_part.insert(want_part.end(), &want[(b * c.T + t) * c.H * c.hd], &want[(b * c.T + t) * c.H * c.hd] + n * c.H * c.hd);
            EXPECT_LT(rel_l2(out, want_part), 1e-12) << c.name() << " t " << t << " n " << n;
            t += n;
        }
    }
}

#ifndef SAMBA_CPU
const AttentionCase GPU_CASES[] = {
    {1, 1, 2, 1, 64, 0},     {2, 1, 2, 2, 128, 2048},  {1, 64, 2, 2, 64, 0},     {1, 128, 2, 2, 128, 0},   {2, 130, 4, 2, 64, 17},
    {1, 300, 3, 1, 128, 1},  {1, 300, 4, 2, 128, 100}, {2, 257, 2, 2, 128, 64},  {1, 513, 2, 1, 128, 0},   {1, 700, 2, 1, 128, 257},
    {1, 700, 2, 2, 64, 300}, {1, 333, 2, 1, 256, 65},  {1, 200, 2, 2, 256, 0},   {2, 77, 2, 1, 256, 17},   {1, 100, 2, 1, 16, 30},
    {2, 99, 3, 3, 40, 0},    {1, 97, 6, 2, 96, 17},    {1, 65, 2, 1, 248, 40},   {1, 1000, 1, 1, 128, 5000}, {1, 129, 8, 1, 64, 129},
    {3, 33, 2, 2, 8, 1},     {1, 190, 5, 5, 192, 63},
};

TEST(AttentionGpu, ForwardMatchesTwin) {
    REQUIRE_GPU();
    for (const AttentionCase& c : GPU_CASES) {
        const std::vector<double> qkv = rounded<floatX>(random_values(c.qkv(), 6, 2.0));
        std::vector<double> want(c.out()), want_lse(c.lse());
        cpu::attention_forward(want.data(), want_lse.data(), qkv.data(), nullptr, 0, 0, c.B, c.T, c.H, c.G, c.hd, c.window);
        DeviceBuffer<floatX> x(to_type<floatX>(qkv)), out(c.out()), again(c.out());
        DeviceBuffer<float> lse(c.lse());
        gpu::attention_forward(out.ptr, lse.ptr, x.ptr, nullptr, 0, 0, c.B, c.T, c.H, c.G, c.hd, c.window, Stream{}, true);
        gpu::attention_forward(again.ptr, lse.ptr, x.ptr, nullptr, 0, 0, c.B, c.T, c.H, c.G, c.hd, c.window, Stream{}, true);
        const std::vector<floatX> got = out.host(), got_again = again.host();
        EXPECT_LT(rel_l2(to_double(got), want), tolerance<floatX>()) << c.name();
        EXPECT_LT(rel_l2(to_double(lse.host()), want_lse), 1e-5) << c.name();               // fp32 in both builds
        EXPECT_EQ(memcmp(got.data(), got_again.data(), got.size() * sizeof(floatX)), 0) << c.name();
    }
}

// The part of qkv that holds queries (0), keys (1) or values (2)
std::vector<double> attention_part(const std::vector<double>& qkv, const AttentionCase& c, int part) {
    std::vector<double> out;
    const int R = c.H / c.G;
    for (int64_t i = 0; i < (int64_t)qkv.size(); i++) {
        const int slot = i / c.hd % (R + 2);
        if ((slot < R ? 0 : slot - R + 1) == part) out.push_back(qkv[i]);
    }
    return out;
}

TEST(AttentionGpu, BackwardMatchesTwin) {
    REQUIRE_GPU();
    for (const AttentionCase& c : GPU_CASES) {
        const std::vector<double> qkv = rounded<floatX>(random_values(c.qkv(), 7, 2.0)), dout = rounded<floatX>(random_values(c.out(), 8));
        std::vector<double> out(c.out()), lse(c.lse()), want(c.qkv()), workspace64(c.lse());
        cpu::attention_forward(out.data(), lse.data(), qkv.data(), nullptr, 0, 0, c.B, c.T, c.H, c.G, c.hd, c.window);
        out = rounded<floatX>(out);
        lse = rounded<float>(lse);
        cpu::attention_backward(want.data(), dout.data(), out.data(), qkv.data(), lse.data(), workspace64.data(), c.B, c.T, c.H, c.G, c.hd, c.window);
        DeviceBuffer<floatX> x(to_type<floatX>(qkv)), g(to_type<floatX>(dout)), o(to_type<floatX>(out)), dx(c.qkv()), again(c.qkv());
        DeviceBuffer<float> l(to_type<float>(lse));
        DeviceBuffer<char> workspace(gpu::attention_backward_workspace(c.B, c.T, c.H, c.G, c.hd));
        gpu::attention_backward(dx.ptr, g.ptr, o.ptr, x.ptr, l.ptr, workspace.ptr, c.B, c.T, c.H, c.G, c.hd, c.window, Stream{}, true);
        gpu::attention_backward(again.ptr, g.ptr, o.ptr, x.ptr, l.ptr, workspace.ptr, c.B, c.T, c.H, c.G, c.hd, c.window, Stream{}, true);
        const std::vector<floatX> got = dx.host(), got_again = again.host();
        EXPECT_LT(rel_l2(to_double(got), want), tolerance<floatX>()) << c.name();
        EXPECT_EQ(memcmp(got.data(), got_again.data(), got.size() * sizeof(floatX)), 0) << c.name();
        if (c.T == 1 || c.window == 1) continue;                                             // one key: dq = dk = 0 up to rounding
        for (int part = 0; part < 3; part++)
            EXPECT_LT(rel_l2(attention_part(to_double(got), c, part), attention_part(want, c, part)), tolerance<floatX>()) << c.name() << " part " << "qkv"[part];
    }
}

TEST(AttentionGpu, PiecesEqualTheWhole) {
    REQUIRE_GPU();
    for (const Pieces& pieces : PIECES) {
        const AttentionCase& c = pieces.c;
        const std::vector<double> qkv = rounded<floatX>(random_values(c.qkv(), 9, 1.5));
        std::vector<double> want(c.out()), lse(c.lse());
        cpu::attention_forward(want.data(), lse.data(), qkv.data(), nullptr, 0, 0, c.B, c.T, c.H, c.G, c.hd, c.window);
        DeviceBuffer<floatX> ring((size_t)c.B * pieces.capacity * 2 * c.G * c.hd);           // poisoned: a slot read before it is written is seen
        size_t piece = 0;
        for (int64_t t = 0; t < c.T;) {
            const int64_t n = std::min(pieces.lengths[std::min(piece++, pieces.lengths.size() - 1)], c.T - t);
            std::vector<double> part, want_part;
            for (int b = 0; b < c.B; b++) {
                part.insert(part.end(), &qkv[(b * c.T + t) * c.row()], &qkv[(b * c.T + t) * c.row()] + n * c.row());
                want_part.insert(want_part.end(), &want[(b * c.T + t) * c.H * c.hd], &want[(b * c.T + t) * c.H * c.hd] + n * c.H * c.hd);
            }
            DeviceBuffer<floatX> x(to_type<floatX>(part)), out(want_part.size());
            DeviceBuffer<float> part_lse((size_t)c.B * c.H * n);
            gpu::attention_forward(out.ptr, part_lse.ptr, x.ptr, ring.ptr, pieces.capacity, t, c.B, n, c.H, c.G, c.hd, c.window, Stream{});
            gpu::ring_update(ring.ptr, x.ptr, pieces.capacity, t, c.B, n, c.H, c.G, c.hd, Stream{});
            EXPECT_LT(rel_l2(to_double(out.host()), want_part), tolerance<floatX>()) << c.name() << " t " << t << " n " << n;
            t += n;
        }
    }
}

// A decoder 13 billion tokens in: positions need 64 bits, the ring has wrapped many times.
TEST(AttentionGpu, FarPositions) {
    REQUIRE_GPU();
    const int64_t position = (int64_t)3 << 32, capacity = 99;
    const AttentionCase c{2, 70, 4, 2, 128, 100};
    const std::vector<double> qkv = rounded<floatX>(random_values(c.qkv(), 10, 1.5)), ring = rounded<floatX>(random_values(c.B * capacity * 2 * c.G * c.hd, 11, 1.5));
    std::vector<double> want(c.out()), lse(c.lse()), want_ring = ring;
    cpu::attention_forward(want.data(), lse.data(), qkv.data(), ring.data(), capacity, position, c.B, c.T, c.H, c.G, c.hd, c.window);
    cpu::ring_update(want_ring.data(), qkv.data(), capacity, position, c.B, c.T, c.H, c.G, c.hd);
    DeviceBuffer<floatX> x(to_type<floatX>(qkv)), r(to_type<floatX>(ring)), out(c.out());
    DeviceBuffer<float> l(c.lse());
    gpu::attention_forward(out.ptr, l.ptr, x.ptr, r.ptr, capacity, position, c.B, c.T, c.H, c.G, c.hd, c.window, Stream{});
    gpu::ring_update(r.ptr, x.ptr, capacity, position, c.B, c.T, c.H, c.G, c.hd, Stream{});
    EXPECT_LT(rel_l2(to_double(out.host()), want), tolerance<floatX>());
    EXPECT_EQ(to_double(r.host()), want_ring);
}

TEST(AttentionGpu, RefusesHeadDims) {
    REQUIRE_GPU();
    DeviceBuffer<floatX> x(4096);
    DeviceBuffer<float> l(64);
    EXPECT_THROW(gpu::attention_forward(x.ptr, l.ptr, x.ptr, nullptr, 0, 0, 1, 1, 1, 1, 20, 0, Stream{}), Error);
    EXPECT_THROW(gpu::attention_forward(x.ptr, l.ptr, x.ptr, nullptr, 0, 0, 1, 1, 1, 1, 264, 0, Stream{}), Error);
    EXPECT_THROW(gpu::attention_forward(x.ptr, l.ptr, x.ptr, nullptr, 0, 0, 1, 1, 3, 2, 64, 0, Stream{}), Error);
}
#endif

} // namespace
