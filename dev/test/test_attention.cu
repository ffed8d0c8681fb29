// Attention: its twin against a direct evaluation and finite differences; the GPU's portable path against the twin, with every kind of
// tile edge (window, T, documents, earlier keys in the ring), and bit-identical repeats. The Hopper path: test_attention_sm90.cu.
#include "../../kernels/ops.cuh"
#include "attention_checks.h"

namespace {

// The formula with a full row of scores at hand
void direct_attention(std::vector<double>& out, std::vector<double>& lse, const std::vector<double>& qkv, const AttentionCase& c) {
    const int R = c.H / c.G;
    const std::vector<int> starts = c.starts();
    for (int b = 0; b < c.B; b++)
        for (int h = 0; h < c.H; h++)
            for (int64_t i = 0; i < c.T; i++) {
                const double* q = &qkv[(b * c.T + i) * c.row() + (h / R * (R + 2) + h % R) * c.hd];
                int64_t first = c.window > 0 ? std::max<int64_t>(0, i - c.window + 1) : 0;
                if (c.documents) first = std::max<int64_t>(first, starts[b * c.T + i]);
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
    for (const AttentionCase& c : {AttentionCase{2, 1, 2, 1, 8, 0}, {1, 130, 4, 2, 16, 17}, {2, 70, 3, 3, 8, 1}, {1, 65, 2, 1, 24, 64},
                                   {1, 200, 1, 1, 8, 0}, {2, 300, 2, 1, 8, 0, true}, {1, 500, 2, 2, 8, 70, true}}) {
        const std::vector<double> qkv = random_values(c.qkv(), 1, 2.0);
        const std::vector<int> starts = c.starts();
        const int* documents = c.documents ? starts.data() : nullptr;
        std::vector<double> out(c.out()), lse(c.lse()), want(c.out()), want_lse(c.lse());
        direct_attention(want, want_lse, qkv, c);
        cpu::attention_forward(out.data(), lse.data(), qkv.data(), nullptr, 0, 0, documents, c.B, c.T, c.H, c.G, c.hd, c.window);
        EXPECT_LT(rel_l2(out, want), 1e-12) << c.name();
        EXPECT_LT(rel_l2(lse, want_lse), 1e-12) << c.name();
        const std::vector<float> qkv32 = to_type<float>(qkv);
        std::vector<float> out32(c.out()), lse32(c.lse());
        cpu::attention_forward(out32.data(), lse32.data(), qkv32.data(), nullptr, 0, 0, documents, c.B, c.T, c.H, c.G, c.hd, c.window);
        EXPECT_LT(rel_l2(to_double(out32), want), 2e-6) << c.name();        // float inputs, float sums of hd and T terms
        EXPECT_LT(rel_l2(to_double(lse32), want_lse), 2e-6) << c.name();
    }
}

TEST(AttentionCpu, BackwardIsTheGradient) {
    for (const AttentionCase& c : {AttentionCase{2, 5, 2, 1, 8, 0}, {1, 70, 4, 2, 8, 17}, {1, 100, 2, 2, 4, 70}, {1, 33, 3, 1, 8, 2},
                                   {2, 150, 2, 1, 4, 0, true}, {1, 150, 2, 1, 4, 40, true}, {2, 40, 2, 1, 4, 30, false, 29, 100},
                                   {1, 60, 2, 2, 4, 50, true, 70, 25},
                                   {2, 40, 4, 2, 8, 17, false, 0, 0, true}, {1, 40, 2, 1, 4, 30, false, 29, 100, true}}) {
        AttentionData<double> x(c, 2);
        auto turned = [&] {                                              // what attention is given: the rope forward of x
            AttentionData<double> y = x;
            if (c.rope) cpu::rope_forward(y.qkv.data(), y.rope.data(), c.B, c.T, c.H, c.G, c.hd);
            return y;
        };
        auto loss = [&] {
            const AttentionResults y = twin_forward(c, turned());
            double sum = 0;
            for (size_t i = 0; i < y.out.size(); i++) sum += y.out[i] * x.dout[i];
            return sum;
        };
        AttentionResults y = twin_forward(c, turned());
        twin_backward(y, c, turned());
        expect_gradient(loss, x.qkv, y.dqkv, c.name().c_str());
    }
}

// With document starts, a sequence is its documents one by one: outputs and gradients
TEST(AttentionCpu, DocumentsAreSequences) {
    const AttentionCase c{1, 700, 2, 1, 8, 90, true};
    const AttentionData<double> x(c, 12);
    AttentionResults whole = twin_forward(c, x);
    twin_backward(whole, c, x);
    int documents = 0;
    for (int64_t begin = 0, end; begin < c.T; begin = end, documents++) {
        for (end = begin + 1; end < c.T && x.starts[end] == begin;) end++;
        AttentionCase one{1, end - begin, c.H, c.G, c.hd, c.window};
        AttentionData<double> part(one, 0);
        auto rows = [&](const std::vector<double>& v, int64_t row) { return std::vector<double>(v.begin() + begin * row, v.begin() + end * row); };
        part.qkv = rows(x.qkv, c.row()), part.dout = rows(x.dout, c.H * c.hd);
        AttentionResults y = twin_forward(one, part);
        twin_backward(y, one, part);
        EXPECT_LT(rel_l2(rows(whole.out, c.H * c.hd), y.out), 1e-12);
        EXPECT_LT(rel_l2(rows(whole.dqkv, c.row()), y.dqkv), 1e-12);
    }
    EXPECT_GT(documents, 3);
}

TEST(AttentionCpu, WindowOfOneCopiesTheValue) {
    const AttentionCase c{1, 9, 2, 1, 8, 1};
    const std::vector<double> qkv = random_values(c.qkv(), 4);
    std::vector<double> out(c.out()), lse(c.lse());
    cpu::attention_forward(out.data(), lse.data(), qkv.data(), nullptr, 0, 0, nullptr, c.B, c.T, c.H, c.G, c.hd, c.window);
    for (int64_t t = 0; t < c.T; t++)
        for (int h = 0; h < c.H; h++)
            for (int d = 0; d < c.hd; d++) EXPECT_DOUBLE_EQ(out[(t * c.H + h) * c.hd + d], qkv[t * c.row() + 3 * c.hd + d]);
}

TEST(AttentionCpu, RefusesOddShapes) {
    double x[64] = {};
    EXPECT_THROW(cpu::attention_forward(x, x, x, nullptr, 0, 0, nullptr, 1, 1, 3, 2, 4, 0), Error);
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
        cpu::attention_forward(want.data(), lse.data(), qkv.data(), nullptr, 0, 0, nullptr, c.B, c.T, c.H, c.G, c.hd, c.window);
        size_t piece = 0;
        for (int64_t t = 0; t < c.T;) {
            const int64_t n = std::min(pieces.lengths[std::min(piece++, pieces.lengths.size() - 1)], c.T - t);
            std::vector<double> part, out((size_t)c.B * n * c.H * c.hd), part_lse((size_t)c.B * c.H * n);
            for (int b = 0; b < c.B; b++) part.insert(part.end(), &qkv[(b * c.T + t) * c.row()], &qkv[(b * c.T + t) * c.row()] + n * c.row());
            cpu::attention_forward(out.data(), part_lse.data(), part.data(), ring.data(), pieces.capacity, t, nullptr, c.B, n, c.H, c.G, c.hd,
                                   c.window);
            cpu::ring_update(ring.data(), part.data(), pieces.capacity, t, c.B, n, c.H, c.G, c.hd);
            std::vector<double> want_part;
            for (int b = 0; b < c.B; b++) {
                const double* from = &want[(b * c.T + t) * c.H * c.hd];
                want_part.insert(want_part.end(), from, from + n * c.H * c.hd);
            }
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

// Keys of earlier calls: a ring half full, full, wrapped inside a tile, larger than the window, with documents
const AttentionCase RING_CASES[] = {
    {2, 70, 2, 1, 64, 100, false, 99, 40},      {1, 200, 2, 2, 128, 300, false, 299, 1000}, {1, 300, 2, 1, 128, 257, false, 256, 5120},
    {2, 130, 2, 1, 128, 513, false, 700, 3333}, {1, 1, 4, 2, 64, 200, false, 199, 777},     {1, 150, 2, 1, 128, 200, true, 199, 1234},
    {2, 90, 3, 3, 64, 0, true, 500, 450},       {1, 100, 2, 1, 256, 60, false, 59, 100},    {1, 140, 2, 1, 40, 100, true, 99, 230},
    {1, 600, 2, 1, 128, 1000, false, 999, 2500},
};

TEST(AttentionGpu, ForwardMatchesTwin) {
    REQUIRE_GPU();
    for (const AttentionCase& c : GPU_CASES) expect_forward<floatX>(c, {true}), expect_forward<floatX>(c.with_documents(), {true});
    for (const AttentionCase& c : RING_CASES) expect_forward<floatX>(c, {true});
}

TEST(AttentionGpu, BackwardMatchesTwin) {
    REQUIRE_GPU();
    const AttentionPath kept{true}, again{true, 0};                                          // dS kept, or made again
    for (const AttentionCase& c : GPU_CASES) expect_backward<floatX>(c, {kept, again}), expect_backward<floatX>(c.with_documents(), {kept, again});
    for (const AttentionCase& c : RING_CASES) expect_backward<floatX>(c, {kept});
}

TEST(AttentionGpu, BackwardTurnsBack) {
    REQUIRE_GPU();
    for (const AttentionCase& c : GPU_CASES)
        if (c.T > 1 && c.window != 1) expect_backward<floatX>(c.with_rope(), {{true}});
    expect_backward<floatX>(AttentionCase{1, 150, 2, 1, 128, 200, true, 199, 1234}.with_rope(), {{true}});
}

// Room for the dS of two sequences of five: three parts of the batch
TEST(AttentionGpu, BackwardInPartsOfTheBatch) {
    REQUIRE_GPU();
    const AttentionCase c{5, 200, 2, 1, 128, 90, true};
    expect_backward<floatX>(c, {{true, 2 * gpu::attn::ds_elements(c.H, c.T, (int)c.window) * 2}});
}

TEST(AttentionGpu, LongSequences) {
    REQUIRE_GPU();
    expect_long<floatX>({1, 131072, 2, 1, 64, 17}, {true});
    expect_long<floatX>({1, 131072, 1, 1, 128, 2048, true}, {true});
}

TEST(AttentionGpu, SameBitsEveryTime) {
    REQUIRE_GPU();
    expect_same_bits<floatX>({2, 700, 4, 2, 128, 300, true}, {true});
    expect_same_bits<floatX>({2, 700, 4, 2, 64, 300}, {true});
}

TEST(AttentionGpu, PiecesEqualTheWhole) {
    REQUIRE_GPU();
    for (const Pieces& pieces : PIECES) {
        const AttentionCase& c = pieces.c;
        const std::vector<double> qkv = rounded<floatX>(random_values(c.qkv(), 9, 1.5));
        std::vector<double> want(c.out()), lse(c.lse());
        cpu::attention_forward(want.data(), lse.data(), qkv.data(), nullptr, 0, 0, nullptr, c.B, c.T, c.H, c.G, c.hd, c.window);
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
            DeviceBuffer<int> drawn(std::vector<int>{0});
            gpu::attention_forward(out.ptr, part_lse.ptr, x.ptr, ring.ptr, pieces.capacity, t, nullptr, c.B, n, c.H, c.G, c.hd, c.window, drawn.ptr,
                                   Stream{});
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
    const std::vector<double> qkv = rounded<floatX>(random_values(c.qkv(), 10, 1.5));
    const std::vector<double> ring = rounded<floatX>(random_values(c.B * capacity * 2 * c.G * c.hd, 11, 1.5));
    std::vector<double> want(c.out()), lse(c.lse()), want_ring = ring;
    cpu::attention_forward(want.data(), lse.data(), qkv.data(), ring.data(), capacity, position, nullptr, c.B, c.T, c.H, c.G, c.hd, c.window);
    cpu::ring_update(want_ring.data(), qkv.data(), capacity, position, c.B, c.T, c.H, c.G, c.hd);
    DeviceBuffer<floatX> x(to_type<floatX>(qkv)), r(to_type<floatX>(ring)), out(c.out());
    DeviceBuffer<float> l(c.lse());
    DeviceBuffer<int> drawn(std::vector<int>{0});
    gpu::attention_forward(out.ptr, l.ptr, x.ptr, r.ptr, capacity, position, nullptr, c.B, c.T, c.H, c.G, c.hd, c.window, drawn.ptr, Stream{});
    gpu::ring_update(r.ptr, x.ptr, capacity, position, c.B, c.T, c.H, c.G, c.hd, Stream{});
    EXPECT_LT(rel_l2(to_double(out.host()), want), tolerance<floatX>());
    EXPECT_EQ(to_double(r.host()), want_ring);
}

TEST(AttentionGpu, RefusesHeadDims) {
    REQUIRE_GPU();
    DeviceBuffer<floatX> x(4096);
    DeviceBuffer<float> l(64);
    EXPECT_THROW(gpu::attention_forward(x.ptr, l.ptr, x.ptr, nullptr, 0, 0, nullptr, 1, 1, 1, 1, 20, 0, nullptr, Stream{}), Error);
    EXPECT_THROW(gpu::attention_forward(x.ptr, l.ptr, x.ptr, nullptr, 0, 0, nullptr, 1, 1, 1, 1, 264, 0, nullptr, Stream{}), Error);
    EXPECT_THROW(gpu::attention_forward(x.ptr, l.ptr, x.ptr, nullptr, 0, 0, nullptr, 1, 1, 3, 2, 64, 0, nullptr, Stream{}), Error);
}
#endif

} // namespace
