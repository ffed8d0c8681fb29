// Writing with a model: up to 16 sequences, each at a position of its own. A prompt goes through the forward pass in chunks; from
// there on every step makes one token for each sequence, with the fused kernels of decode.cuh, recorded once and replayed as one
// graph. The token is drawn on the device and feeds the next step there; the host reads it when it has arrived.
#pragma once
#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "../samba.cuh"

// Sequence b of `all` as a state of its own, in the same memory
inline void one_sequence(SequenceState& one, const SequenceState& all, const Layout& layout, int64_t b, int64_t position) {
    const Config& c = layout.config;
    const int64_t e = c.d_inner(), N = c.d_state, token = 2 * (int64_t)c.n_kv_head * c.head_dim;
    one.B = 1;
    one.position = position;
    one.layers = all.layers;
    for (LayerState& s : one.layers) {
        if (s.halo) s.halo += b * 3 * e;
        if (s.h) s.h += b * e * N;
        if (s.ring) s.ring += b * s.capacity * token;
    }
}

class Decoder {
public:
    static constexpr int MAX_BATCH = 16;
    static constexpr int64_t FIRST_ROOM = 4096;           // tokens that full attention has room for at first

    // m: with activations for one sequence. Tokens up to `choices` may be drawn. Sequence b draws from the stream of seed + b.
    // `room`: tokens a sequence will have, where that is known; full attention makes more room when it runs out.
    Decoder(Model& m, int B, const SampleOptions& options, uint64_t seed, int choices, int64_t room = FIRST_ROOM)
        : m(m), B(B), options(options), choices(choices), positions(B) {
        if (B < 1 || B > MAX_BATCH) fail("%d prompts: from 1 to %d can be continued together", B, MAX_BATCH);
        const Layout& layout = m.layout;
        for (const Layer& layer : layout.layers) unlimited = unlimited || (layer.kind == Kind::attention && layer.window == 0);
        this->room = unlimited ? room : INT64_MAX;
        state = std::make_unique<SequenceState>();
        state->create(layout, B, this->room, m.stream);
        plan();
        arena.allocate("the buffers of generation");
        plan();
        emitted = (int*)pinned_alloc((size_t)EMIT_SLOTS * B * sizeof(int));
        for (Event& e : drawn_events) e = event_create();
        host_seen.resize((size_t)B * layout.config.vocab_size);
        std::vector<uint64_t> key(B);
        for (int b = 0; b < B; b++) key[b] = stream_key(seed + (uint64_t)b, "generate");
        copy_to_device(keys, key.data(), B * sizeof(uint64_t), m.stream);
        device_zero(drawn, B * sizeof(int64_t), m.stream);
        device_zero(seen, host_seen.size(), m.stream);
        const Config& c = layout.config;
        device_zero(workspace, ops::decode_attention_workspace(B, c.n_head, std::max(1, c.n_kv_head), c.head_dim), m.stream);
        stream_sync(m.stream);
        make_whole();
    }
    Decoder(const Decoder&) = delete;
    Decoder& operator=(const Decoder&) = delete;
    ~Decoder() {
        try {
            stream_sync(m.stream);
            forget_graph();
            for (Event& e : drawn_events) event_destroy(e);
            pinned_free(emitted);
        } catch (const std::exception& e) {
            fprintf(stderr, "error: %s\n", e.what());
        }
    }

    // Sequence b continues with these tokens, in chunks of as many as the model's activations hold.
    void prefill(int b, const std::vector<int>& tokens) {
        const int64_t n = (int64_t)tokens.size(), d = m.config().d_model;
        if (n == 0) return;
        make_room(positions[b] + n);
        SequenceState one;
        one_sequence(one, *state, m.layout, b, positions[b]);
        for (int64_t at = 0; at < n; at += m.acts.T) {
            const int64_t T = std::min(m.acts.T, n - at);
            upload_tokens(m, tokens.data() + at, nullptr, T);
            forward_layers(m, 1, T, &one);
            if (at + T == n) copy_on_device(x + b * d, m.acts.x.back() + (T - 1) * d, (size_t)d * sizeof(float), m.stream);
        }
        stream_sync(m.stream);                            // the host's tokens have been read
        positions[b] += n;
        uint8_t* row = host_seen.data() + (int64_t)b * m.config().vocab_size;
        for (int id : tokens) row[id] = 1;
        copy_to_device(seen + (int64_t)b * m.config().vocab_size, row, m.config().vocab_size, m.stream);
        stream_sync(m.stream);
    }

    // After the prompts of all sequences: the first token of each
    void start() {
        upload_positions(-1);
        ops::decode_norm(xw, squares, x, m.w(m.layout.network.norm_f), B, m.config().d_model, m.stream);
        head();
        sample();
        launched();
    }

    // The next token of each. Not more than EMIT_SLOTS ahead of read().
    void step() {
        for (int64_t& p : positions) p++;
        make_room(*std::max_element(positions.begin(), positions.end()));
        if (as_graph && !recorded) {
            graph = graph_capture(m.stream, [this] { layers_and_head(), sample(); });
            recorded = true;
        }
        if (as_graph) graph_launch(graph, m.stream);
        else layers_and_head(), sample();
        launched();
    }

    // The tokens of the oldest start() or step() that was not read yet
    std::vector<int> read() {
        const int slot = (int)(reads++ % EMIT_SLOTS);
        event_sync(drawn_events[slot]);
        std::vector<int> ids(emitted + slot * B, emitted + (slot + 1) * B);
        for (int b = 0; b < B; b++) {
            if (ids[b] < 0)
                fail("the model's logits are not numbers after %lld tokens of sequence %d; the checkpoint is damaged or its training diverged",
                     (long long)positions[b], b);
            host_seen[(size_t)b * m.config().vocab_size + ids[b]] = 1;
        }
        return ids;
    }
    int64_t ahead() const { return launches - reads; }

    // One step with given tokens instead of drawn ones: leaves their logits (B,V)
    void step_with(const std::vector<int>& given) {
        const Config& c = m.config();
        make_room(*std::max_element(positions.begin(), positions.end()) + 1);
        upload_positions(0);
        copy_to_device(tokens, given.data(), B * sizeof(int), m.stream);
        const floatX* embedding = m.w(m.layout.network.embedding);
        ops::decode_embed(x, xw, squares, cos_sin, tokens, position, norm_of(0), embedding, c.rope_base, B, c.d_model, rope_dim(), m.stream);
        layers_and_head();
        stream_sync(m.stream);
        for (int64_t& p : positions) p++;
    }

    // For measurements: as if each sequence had `tokens` behind it. What the state holds is not touched.
    void set_position(int64_t tokens) {
        make_room(tokens);
        std::fill(positions.begin(), positions.end(), tokens);
        upload_positions(0);
    }

    Model& m;
    const int B;
    const SampleOptions options;
    const int choices;
    std::vector<int64_t> positions;                       // tokens that the state of each sequence has seen, or will when the launched steps are done
    std::unique_ptr<SequenceState> state;
    float* logits = nullptr;                              // (B,V)
    bool as_graph = true;
    bool want_one_kernel = true;                          // for a step, where that is possible
    bool one_kernel() const { return want_one_kernel && whole_possible; }
    ops::DecodeStep whole;

private:
    void plan() {
        const Config& c = m.config();
        const int64_t d = c.d_model, e = c.d_inner(), V = c.vocab_size;
        int64_t F = 1;
        for (const Layer& layer : m.layout.layers) F = std::max<int64_t>(F, layer.d_ff);
        arena.rewind();
        x = arena.take<float>(B * d);
        xw = arena.take<floatX>(B * d);
        squares = arena.take<float>(B * ceil_div(d, 8));
        cos_sin = arena.take<float>(B * std::max(2, c.head_dim));
        u = arena.take<floatX>(B * e);
        z = arena.take<floatX>(B * e);
        parts = arena.take<float>(ops::decode_x_splits(c.dt_rank() + 2 * c.d_state, (int)e) * B * (c.dt_rank() + 2 * c.d_state));
        out = arena.take<floatX>(B * std::max({e, (int64_t)c.q_dim(), F}));
        qkv = arena.take<floatX>(B * std::max(1, c.qkv_dim()));
        logits = arena.take<float>(B * V);
        tokens = arena.take<int>(B);
        position = arena.take<int64_t>(B);
        drawn = arena.take<int64_t>(B);
        keys = arena.take<uint64_t>(B);
        seen = arena.take<uint8_t>(B * V);
        workspace = arena.take<char>((int64_t)ops::decode_attention_workspace(B, c.n_head, std::max(1, c.n_kv_head), c.head_dim));
    }

    int rope_dim() const { return m.config().rope ? m.config().head_dim : 0; }
    // The norm that reads x after layer l - 1; null where none does: a parallel MLP reads what the attention before it read
    const float* norm_of(size_t l) const {
        if (l == m.layout.layers.size()) return m.w(m.layout.network.norm_f);
        const Layer& layer = m.layout.layers[l];
        if (layer.parallel) return nullptr;
        return m.w(layer.kind == Kind::mamba ? layer.mamba.norm : layer.kind == Kind::attention ? layer.attention.norm : layer.mlp.norm);
    }

    void layers() {
        const Config& c = m.config();
        const Parameters& w = m.w;
        const Stream s = m.stream;
        const int d = c.d_model, e = c.d_inner(), N = c.d_state, R = c.dt_rank(), H = c.n_head, G = c.n_kv_head, hd = c.head_dim;
        const float eps = c.norm_eps;
        for (size_t l = 0; l < m.layout.layers.size(); l++) {
            const Layer& layer = m.layout.layers[l];
            LayerState& own = state->layers[l];
            const float* next = norm_of(l + 1);
            if (layer.kind == Kind::mamba) {
                const MambaTensors& t = layer.mamba;
                ops::decode_mamba_in(u, z, own.halo, xw, squares, w(t.in_proj), w(t.conv_w), w(t.conv_b), B, d, e, eps, s);          // (B,e) each
                ops::decode_x_proj(parts, u, w(t.x_proj), B, R + 2 * N, e, s);                                                      // (splits,B,R+2N)
                ops::decode_scan(out, own.h, parts, u, z, w(t.dt_proj), w(t.A_log), w(t.D), w(t.dt_bias), B, e, N, R, s);           // (B,e)
                ops::decode_residual(x, xw, squares, next, out, w(t.out_proj), B, d, e, s);                                         // (B,d)
            } else if (layer.kind == Kind::attention) {
                const AttentionTensors& t = layer.attention;
                ops::decode_norm_linear(qkv, xw, squares, w(t.qkv), B, c.qkv_dim(), d, eps, s);                                     // (B,(H+2G)hd)
                const float* turns = c.rope ? cos_sin : nullptr;
                ops::decode_attention(out, own.ring, workspace, qkv, turns, position, own.capacity, B, H, G, hd, s);                // (B,H hd)
                ops::decode_residual(x, xw, squares, next, out, w(t.proj), B, d, c.q_dim(), s);                                     // (B,d)
            } else {
                const MlpTensors& t = layer.mlp;
                ops::decode_swiglu(out, xw, squares, w(t.w1), B, d, layer.d_ff, eps, s);                                            // (B,F)
                ops::decode_residual(x, xw, squares, next, out, w(t.w3), B, d, layer.d_ff, s);                                      // (B,d)
            }
        }
    }

    void layers_and_head() {
        if (one_kernel()) whole.run(m.stream);
        else layers(), head();
    }
    // What a step reads and writes, for the kernel that does all of it. It holds the addresses of the state.
    void make_whole() {
        const Config& c = m.config();
        const Parameters& w = m.w;
        DecodeModel all{B, c.d_model, c.d_inner(), c.d_state, c.dt_rank(), c.n_head, c.n_kv_head, c.head_dim, c.vocab_size, c.rope, c.norm_eps,
                        w(m.layout.network.head), {}, x, squares, cos_sin, xw, position, logits};
        for (size_t l = 0; l < m.layout.layers.size(); l++) {
            const Layer& layer = m.layout.layers[l];
            const LayerState& own = state->layers[l];
            DecodeLayer one;
            one.next_norm = norm_of(l + 1);
            if (layer.kind == Kind::mamba) {
                const MambaTensors& t = layer.mamba;
                one.kind = DecodeLayer::mamba;
                one.in_proj = w(t.in_proj), one.x_proj = w(t.x_proj), one.dt_proj = w(t.dt_proj), one.out_proj = w(t.out_proj);
                one.conv_w = w(t.conv_w), one.conv_b = w(t.conv_b), one.A_log = w(t.A_log), one.D = w(t.D), one.dt_bias = w(t.dt_bias);
                one.halo = own.halo, one.h = own.h;
            } else if (layer.kind == Kind::attention) {
                one.kind = DecodeLayer::attention;
                one.qkv = w(layer.attention.qkv), one.proj = w(layer.attention.proj), one.ring = own.ring, one.capacity = own.capacity;
            } else {
                one.kind = DecodeLayer::mlp;
                one.w1 = w(layer.mlp.w1), one.w3 = w(layer.mlp.w3), one.F = layer.d_ff;
            }
            all.layers.push_back(one);
        }
        whole_possible = ops::DecodeStep::possible(all);
        if (whole_possible) whole.create(all, m.stream);
    }

    void head() {
        const Config& c = m.config();
        ops::decode_head(logits, xw, squares, m.w(m.layout.network.head), B, c.vocab_size, c.d_model, c.norm_eps, m.stream);        // (B,V)
    }
    void sample() {
        const Config& c = m.config();
        ops::decode_sample(tokens, emitted, position, drawn, seen, x, xw, squares, cos_sin, logits, keys, norm_of(0),
                           m.w(m.layout.network.embedding), c.rope_base, options, B, c.vocab_size, choices, c.d_model, rope_dim(),
                           m.stream);                                                                                               // (B)
    }
    void launched() {
        event_record(drawn_events[launches % EMIT_SLOTS], m.stream);
        launches++;
        if (ahead() > EMIT_SLOTS) fail("generation is %lld steps ahead of what was read; at most %d are kept", (long long)ahead(), EMIT_SLOTS);
    }
    void upload_positions(int64_t shift) {
        std::vector<int64_t> p = positions;
        for (int64_t& i : p) i += shift;
        copy_to_device(position, p.data(), B * sizeof(int64_t), m.stream);
        stream_sync(m.stream);
    }

    // Full attention: twice the room where `tokens` do not fit. The recorded graph holds the old addresses.
    void make_room(int64_t tokens_wanted) {
        if (tokens_wanted <= room) return;
        while (room < tokens_wanted) room *= 2;
        const int64_t token = 2 * (int64_t)m.config().n_kv_head * m.config().head_dim, e = m.config().d_inner(), N = m.config().d_state;
        auto larger = std::make_unique<SequenceState>();
        larger->create(m.layout, B, room, m.stream);
        for (size_t l = 0; l < state->layers.size(); l++) {
            const LayerState &from = state->layers[l], &to = larger->layers[l];
            if (from.halo) copy_on_device(to.halo, from.halo, B * 3 * e * sizeof(floatX), m.stream);
            if (from.h) copy_on_device(to.h, from.h, B * e * N * sizeof(float), m.stream);
            for (int64_t b = 0; from.ring && b < B; b++)
                copy_on_device(to.ring + b * to.capacity * token, from.ring + b * from.capacity * token,
                               (size_t)(from.capacity * token) * sizeof(floatX), m.stream);
        }
        stream_sync(m.stream);
        state = std::move(larger);
        forget_graph();
        make_whole();
    }

    void forget_graph() {
        if (recorded) graph_destroy(graph);
        recorded = false;
    }

    float *x = nullptr, *squares = nullptr, *cos_sin = nullptr, *parts = nullptr;
    floatX *xw = nullptr, *u = nullptr, *z = nullptr, *out = nullptr, *qkv = nullptr;
    int *tokens = nullptr, *emitted = nullptr;
    int64_t *position = nullptr, *drawn = nullptr;
    uint64_t* keys = nullptr;
    uint8_t* seen = nullptr;
    void* workspace = nullptr;
    Arena arena;
    bool unlimited = false, recorded = false, whole_possible = false;
    int64_t room = 0, launches = 0, reads = 0;
    Graph graph{};
    Event drawn_events[EMIT_SLOTS];
    std::vector<uint8_t> host_seen;                       // (B,V)
};
