// Speed of writing and of reading a prompt, for Samba and for full attention of the same size:
//   decode     tokens/s against the tokens behind, batch 1 and 16, as a share of what the memory can do: the weights once and each
//              sequence's state, at the bandwidth that a device copy reaches in the same run
//   prefill    tokens/s of a prompt against its length
//   --parts    each operation of a decode step alone, its launches of all layers as one graph
// Weights are random, and so are the keys of the tokens behind; what is timed is the real step. JSON for dev/bench/plot_generate.py.
#include <chrono>
#include <fstream>
#include <map>

#include <CLI/CLI.hpp>

#include "../../kernels/decoder.cuh"

using json = nlohmann::ordered_json;

struct Options {
    std::vector<std::string> models = {"samba-421m", "llama-438m"};
    std::vector<int> batches = {1, 16};
    std::vector<int64_t> contexts, prompts;
    std::string out;
    int64_t chunk = 4096;
    double seconds = 0.3;                  // a measurement, at least
    bool parts = false, graph = true, one_kernel = true, probe = false;
};

static double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Seconds of one call in a run of at least `seconds`
template <class Work> static double seconds_per_call(Stream s, double seconds, Work work, int64_t calls = 3) {
    for (;;) {
        stream_sync(s);
        const double before = now();
        for (int64_t i = 0; i < calls; i++) work();
        stream_sync(s);
        const double each = (now() - before) / (double)calls;
        if (each * (double)calls >= seconds || calls > 1000000) return each;
        calls = (int64_t)(1.2 * seconds / each) + 1;
    }
}

// Bytes read and written per second by a copy that no cache holds
static double copy_bandwidth(Stream s) {
    const size_t bytes = (size_t)(ON_GPU ? 2048 : 256) << 20;
    char *from = (char*)device_alloc(bytes, "a copy"), *to = (char*)device_alloc(bytes, "a copy");
    device_fill(from, 1, bytes, s);
    const double t = seconds_per_call(s, 0.2, [&] { copy_on_device(to, from, bytes, s); });
    device_free(from);
    device_free(to);
    return 2.0 * (double)bytes / t;
}

// What a step must move: all weights but an untied embedding, keys and values of the tokens behind, scan states read and written
static double step_bytes(const Model& m, int B, int64_t context) {
    const Config& c = m.config();
    double bytes = 0;
    for (const Tensor& t : m.layout.tensors)
        if (t.name != "transformer.wte.weight") bytes += (double)t.size * (t.is_matrix ? sizeof(floatX) : sizeof(float));
    for (const Layer& layer : m.layout.layers) {
        if (layer.kind == Kind::mamba) bytes += B * 2.0 * (c.d_inner() * c.d_state * sizeof(float) + 3.0 * c.d_inner() * sizeof(floatX));
        const double keys = layer.kind != Kind::attention ? 0 : (double)(layer.window > 0 ? std::min(context, layer.window - 1) : context);
        bytes += B * 2.0 * keys * c.n_kv_head * c.head_dim * sizeof(floatX);
    }
    return bytes;
}

static std::vector<int> random_prompt(int64_t n, int V) {
    std::vector<int> tokens((size_t)n);
    for (int64_t i = 0; i < n; i++) tokens[(size_t)i] = (int)(counter_uniform(3, (uint64_t)i) * V);
    return tokens;
}

static int hidden_size(const Model& m) {                              // of the widest MLP
    int F = 1;
    for (const Layer& layer : m.layout.layers) F = std::max(F, layer.d_ff);
    return F;
}

// Keys and values like those of activations: uniform in [-1, 1]
static void fill_rings(const Model& m, const SequenceState& state) {
    const size_t n = (size_t)1 << 22;
    std::vector<floatX> host(n);
#pragma omp parallel for
    for (size_t i = 0; i < n; i++) host[i] = (floatX)(float)(2 * counter_uniform(5, i) - 1);
    floatX* from = (floatX*)device_alloc(n * sizeof(floatX), "random keys");
    copy_to_device(from, host.data(), n * sizeof(floatX), m.stream);
    for (const LayerState& s : state.layers) {
        const int64_t values = s.ring ? state.B * s.capacity * 2 * m.config().n_kv_head * m.config().head_dim : 0;
        for (int64_t at = 0; at < values; at += (int64_t)n)
            copy_on_device(s.ring + at, from, (size_t)std::min<int64_t>((int64_t)n, values - at) * sizeof(floatX), m.stream);
    }
    stream_sync(m.stream);
    device_free(from);
}

static json bench_decode(Model& m, const Options& o, int B, int64_t context, double bandwidth) {
    const int V = m.config().vocab_size;
    const int64_t room = context + 8192;
    SequenceState dry;
    dry.B = B;
    dry.plan(m.layout, room);
    if ((double)dry.arena.bytes() > 0.95 * (double)device_free_bytes()) {
        printf("%-12s batch %2d  %8lld tokens behind: its state of %.1f GB does not fit\n", m.config().name.c_str(), B, (long long)context,
               (double)dry.arena.bytes() * 1e-9);
        return nullptr;
    }
    Decoder decoder(m, B, {1, 0, 1, 1}, 1, V, room);
    decoder.as_graph = o.graph;
    decoder.want_one_kernel = o.one_kernel;
    fill_rings(m, *decoder.state);
    for (int b = 0; b < B; b++) decoder.prefill(b, random_prompt(64, V));
    decoder.start();
    decoder.set_position(context);
    int64_t left = 7000;                   // steps before the room is used up
    const auto step = [&] {
        if (left-- == 0) decoder.set_position(context), left = 7000;
        decoder.step();
        if (decoder.ahead() > 4) decoder.read();
    };
    step();
    const double t = seconds_per_call(m.stream, o.seconds, step), bytes = step_bytes(m, B, context);
    const double share = bytes / bandwidth / t;
    printf("%-12s batch %2d  %8lld tokens behind  %8.4f ms  %9.0f tok/s  %7.3f GB a step  %6.0f GB/s  %5.1f%% of a copy\n",
           m.config().name.c_str(), B, (long long)context, t * 1e3, B / t, bytes * 1e-9, bytes / t * 1e-9, 100 * share);
    fflush(stdout);
    return {{"model", m.config().name}, {"batch", B}, {"context", context}, {"ms", t * 1e3}, {"tok_s", B / t}, {"bytes", bytes}, {"share", share}};
}

static json bench_prefill(Model& m, const Options& o, int64_t prompt) {
    const std::vector<int> tokens = random_prompt(prompt, m.config().vocab_size);
    SequenceState state;
    state.create(m.layout, 1, prompt, m.stream);
    const auto read_all = [&] {
        state.reset(m.layout, m.stream);
        for (int64_t at = 0; at < prompt; at += o.chunk) {
            const int64_t T = std::min(o.chunk, prompt - at);
            upload_tokens(m, tokens.data() + at, nullptr, T);
            forward_layers(m, 1, T, &state);
        }
    };
    // A long prompt takes its time; the first reading of a short one is not counted
    const double t = seconds_per_call(m.stream, o.seconds, read_all, 1);
    printf("%-12s prompt of %7lld tokens  %9.2f ms  %9.0f tok/s\n", m.config().name.c_str(), (long long)prompt, t * 1e3, (double)prompt / t);
    fflush(stdout);
    return {{"model", m.config().name}, {"prompt", prompt}, {"ms", t * 1e3}, {"tok_s", (double)prompt / t}};
}

#ifndef SAMBA_CPU
// The step's kernel alone: as it is, without the blocks' waiting for each other (wrong results), and its stream without any work
static void bench_probe(Model& m, const Options& o, int B, int64_t context, double bandwidth) {
    Decoder decoder(m, B, {1, 0, 1, 1}, 1, m.config().vocab_size, context + 64);
    if (!decoder.one_kernel()) return;
    fill_rings(m, *decoder.state);
    for (int b = 0; b < B; b++) decoder.prefill(b, random_prompt(64, m.config().vocab_size));
    decoder.start();
    decoder.read();
    decoder.set_position(context);
    gpu::decode::StepArgs& args = decoder.whole.args;
    const double bytes = step_bytes(m, B, context);
    const auto time = [&](const char* name) {
        Graph graph = graph_capture(m.stream, [&] { for (int i = 0; i < 4; i++) decoder.whole.run(m.stream); });
        const double t = seconds_per_call(m.stream, o.seconds, [&] { graph_launch(graph, m.stream); }) / 4;
        graph_destroy(graph);
        printf("  %-44s %8.4f ms %6.0f GB/s %5.1f%% of a copy\n", name, t * 1e3, bytes / t * 1e-9, 100 * bytes / t / bandwidth);
        fflush(stdout);
    };
    printf("%s, batch %d, %lld tokens behind: the step's kernel alone\n", m.config().name.c_str(), B, (long long)context);
    const int depth = args.depth;
    for (int pieces : {12, 4, 2}) {
        args.depth = pieces;
        time(("at most " + std::to_string(pieces) + " pieces under way").c_str());
    }
    args.depth = depth;
    args.probe = 1, time("without barriers");
    args.probe = 2, time("the stream alone");
    args.probe = 0;
    // Where the time goes: means over blocks and phases of a task, in clocks
    const int blocks = gpu::decode::gpu().sms, count = args.count;
    long long* trace = (long long*)device_alloc((size_t)count * blocks * 4 * sizeof(long long), "the trace");
    args.trace = trace;
    for (int i = 0; i < 2; i++) decoder.whole.run(m.stream);
    std::vector<long long> clocks((size_t)count * blocks * 4);
    copy_to_host(clocks.data(), trace, clocks.size() * sizeof(long long), m.stream);
    stream_sync(m.stream);
    args.trace = nullptr;
    device_free(trace);
    const char* names[] = {"in_proj, conv", "x_proj", "dt_proj, scan", "residual", "qkv, rope", "attention", "its sum", "w1|w2, swiglu", "head"};
    printf("  %-14s %5s %12s %12s %12s %12s   clocks, mean of blocks\n", "task", "times", "first piece", "work", "last block", "barrier");
    for (int task = 0; task < 9; task++) {
        double first = 0, work = 0, slowest = 0, barrier = 0;
        int times = 0;
        for (int p = 0; p < count; p++) {
            if ((int)decoder.whole.tasks[p].task != task) continue;
            times++;
            long long most = 0;
            double sum = 0;
            for (int b = 0; b < blocks; b++) {
                const long long* c = &clocks[((size_t)p * blocks + b) * 4];
                first += (double)(c[1] - c[0]) / blocks, work += (double)(c[2] - c[0]) / blocks;
                most = std::max(most, c[2] - c[0]);
                if (p + 1 < count) sum += (double)(clocks[((size_t)(p + 1) * blocks + b) * 4] - c[2]) / blocks;
            }
            slowest += (double)most, barrier += sum;
        }
        if (!times) continue;
        printf("  %-14s %5d %12.0f %12.0f %12.0f %12.0f\n", names[task], times, first / times, work / times, slowest / times, barrier / times);
    }
    fflush(stdout);
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Each operation of a step alone

// What the operations read and write between them
struct StepBuffers {
    float *x = nullptr, *squares = nullptr, *cos_sin = nullptr;       // (B,d), (B,d/8), (B,hd/2,2)
    float *parts = nullptr, *logits = nullptr;                        // (splits,B,rank+2N), (B,V)
    floatX *xw = nullptr, *u = nullptr, *z = nullptr;                 // (B,d), (B,e), (B,e)
    floatX *out = nullptr, *qkv = nullptr;                            // (B, e | H hd | F), (B,qkv_dim)
    char* workspace = nullptr;
    int64_t* position = nullptr;                                      // (B)

    StepBuffers(const Model& m, int B, int64_t context) {
        const Config& c = m.config();
        const int64_t d = c.d_model, e = c.d_inner(), hd = c.head_dim;
        const size_t workspace_bytes = ops::decode_attention_workspace(B, c.n_head, std::max(1, c.n_kv_head), c.head_dim);
        plan(m, B, workspace_bytes);
        arena.allocate("the benchmark's buffers");
        plan(m, B, workspace_bytes);
        for (auto [p, bytes] : {std::pair<void*, size_t>{x, B * d * 4}, {squares, B * d * 4}, {cos_sin, B * hd * 4}, {xw, B * d * sizeof(floatX)},
                                {u, B * e * sizeof(floatX)}, {z, B * e * sizeof(floatX)}, {out, B * e * sizeof(floatX)},
                                {qkv, (size_t)B * c.qkv_dim() * sizeof(floatX)}, {workspace, workspace_bytes}})
            device_fill(p, 0, bytes, m.stream);
        std::vector<int64_t> positions(B, context);
        copy_to_device(position, positions.data(), B * sizeof(int64_t), m.stream);
        stream_sync(m.stream);
    }

private:
    void plan(const Model& m, int B, size_t workspace_bytes) {
        const Config& c = m.config();
        const int d = c.d_model, e = c.d_inner(), x_dbl = c.dt_rank() + 2 * c.d_state;
        arena.rewind();
        x = arena.take<float>(B * d), squares = arena.take<float>(B * d), cos_sin = arena.take<float>(B * std::max(2, c.head_dim));
        logits = arena.take<float>((int64_t)B * c.vocab_size), position = arena.take<int64_t>(B);
        parts = arena.take<float>((int64_t)ops::decode_x_splits(x_dbl, e) * B * x_dbl);
        xw = arena.take<floatX>(B * d), u = arena.take<floatX>(B * e), z = arena.take<floatX>(B * e);
        out = arena.take<floatX>((int64_t)B * std::max({e, c.n_head * c.head_dim, hidden_size(m)})), qkv = arena.take<floatX>(B * c.qkv_dim());
        workspace = arena.take<char>((int64_t)workspace_bytes);
    }
    Arena arena;
};

// An operation, and the bytes that it must move in a layer
struct Part {
    const char* name;
    Kind kind;
    double bytes;
    std::function<void(const Layer&, LayerState&)> run;
};
static double matrix_bytes(double rows, double columns) { return rows * columns * sizeof(floatX); }

static std::vector<Part> mamba_parts(const Model& m, const StepBuffers& b, int B) {
    const Config& c = m.config();
    const int d = c.d_model, e = c.d_inner(), N = c.d_state, R = c.dt_rank();
    return {
        {"in_proj, conv", Kind::mamba, matrix_bytes(2 * e, d), [=, &m, &b](const Layer& l, LayerState& own) {
             const MambaTensors& t = l.mamba;
             ops::decode_mamba_in(b.u, b.z, own.halo, b.xw, b.squares, m.w(t.in_proj), m.w(t.conv_w), m.w(t.conv_b), B, d, e, m.config().norm_eps,
                                  m.stream);
         }},
        {"x_proj", Kind::mamba, matrix_bytes(R + 2 * N, e), [=, &m, &b](const Layer& l, LayerState&) {
             ops::decode_x_proj(b.parts, b.u, m.w(l.mamba.x_proj), B, R + 2 * N, e, m.stream);
         }},
        {"dt_proj, scan", Kind::mamba, matrix_bytes(e, R) + 4.0 * e * N * (1 + 2 * B), [=, &m, &b](const Layer& l, LayerState& own) {
             const MambaTensors& t = l.mamba;
             ops::decode_scan(b.out, own.h, b.parts, b.u, b.z, m.w(t.dt_proj), m.w(t.A_log), m.w(t.D), m.w(t.dt_bias), B, e, N, R, m.stream);
         }},
        {"out_proj", Kind::mamba, matrix_bytes(d, e), [=, &m, &b](const Layer& l, LayerState&) {
             ops::decode_residual(b.x, b.xw, b.squares, m.w(l.mamba.norm), b.out, m.w(l.mamba.out_proj), B, d, e, m.stream);
         }},
    };
}

static std::vector<Part> attention_parts(const Model& m, const StepBuffers& b, int B, int64_t context) {
    const Config& c = m.config();
    const int d = c.d_model, H = c.n_head, G = c.n_kv_head, hd = c.head_dim, qkv_dim = c.qkv_dim();
    const double keys = (double)(c.window > 0 ? c.window - 1 : context);
    return {
        {"qkv", Kind::attention, matrix_bytes(qkv_dim, d), [=, &m, &b](const Layer& l, LayerState&) {
             ops::decode_norm_linear(b.qkv, b.xw, b.squares, m.w(l.attention.qkv), B, qkv_dim, d, m.config().norm_eps, m.stream);
         }},
        {"attention", Kind::attention, 2.0 * B * keys * G * hd * sizeof(floatX), [=, &m, &b](const Layer&, LayerState& own) {
             const float* turns = m.config().rope ? b.cos_sin : nullptr;
             ops::decode_attention(b.out, own.ring, b.workspace, b.qkv, turns, b.position, own.capacity, B, H, G, hd, m.stream);
         }},
        {"proj", Kind::attention, matrix_bytes(d, H * hd), [=, &m, &b](const Layer& l, LayerState&) {
             ops::decode_residual(b.x, b.xw, b.squares, m.w(l.attention.norm), b.out, m.w(l.attention.proj), B, d, H * hd, m.stream);
         }},
    };
}

static std::vector<Part> mlp_parts(const Model& m, const StepBuffers& b, int B) {
    const int d = m.config().d_model, F = hidden_size(m);
    return {
        {"w1|w2, swiglu", Kind::mlp, matrix_bytes(2 * F, d), [=, &m, &b](const Layer& l, LayerState&) {
             ops::decode_swiglu(b.out, b.xw, b.squares, m.w(l.mlp.w1), B, d, F, m.config().norm_eps, m.stream);
         }},
        {"w3", Kind::mlp, matrix_bytes(d, F), [=, &m, &b](const Layer& l, LayerState&) {
             ops::decode_residual(b.x, b.xw, b.squares, m.w(l.mlp.norm), b.out, m.w(l.mlp.w3), B, d, F, m.stream);
         }},
    };
}

// The graph holds an operation's launch of every layer that has it, so that weights come from memory.
static void bench_parts(const Model& m, int B, double bandwidth) {
    const Config& c = m.config();
    const Stream s = m.stream;
    const int64_t context = 100000;
    const StepBuffers b(m, B, context);
    SequenceState state;
    state.create(m.layout, B, context + 1, s);
    fill_rings(m, state);
    printf("%s, batch %d, each operation alone\n", c.name.c_str(), B);
    double sum = 0;
    const auto report = [&](const char* name, int count, double bytes, const std::function<void()>& work) {
        Graph graph = graph_capture(s, work);
        const double t = seconds_per_call(s, 0.05, [&] { graph_launch(graph, s); }) / count;
        graph_destroy(graph);
        sum += t * count;
        printf("  %-16s x%-3d %8.2f us %7.0f GB/s %6.1f%% of a copy\n", name, count, t * 1e6, bytes / t * 1e-9, 100 * bytes / t / bandwidth);
        fflush(stdout);
    };
    for (const std::vector<Part>& parts : {mamba_parts(m, b, B), attention_parts(m, b, B, context), mlp_parts(m, b, B)})
        for (const Part& part : parts) {
            int count = 0;
            for (const Layer& layer : m.layout.layers) count += layer.kind == part.kind;
            if (!count) continue;
            report(part.name, count, part.bytes, [&] {
                for (size_t l = 0; l < m.layout.layers.size(); l++)
                    if (m.layout.layers[l].kind == part.kind) part.run(m.layout.layers[l], state.layers[l]);
            });
        }
    report("head", 1, matrix_bytes(c.vocab_size, c.d_model), [&] {
        ops::decode_head(b.logits, b.xw, b.squares, m.w(m.layout.network.head), B, c.vocab_size, c.d_model, c.norm_eps, s);
    });
    printf("  %-16s      %8.2f us\n", "sum", sum * 1e6);
}

static void run(const Options& o) {
    const DeviceInfo device = device_info();
    json result = {{"device", device.name}, {"build", BUILD_NAME}};
    {
        const Stream s = stream_create();
        result["copy_bytes_s"] = copy_bandwidth(s);
        stream_destroy(s);
    }
    const double bandwidth = result["copy_bytes_s"];
    printf("%s, %s; a copy moves %.0f GB/s\n", device.name.c_str(), BUILD_NAME, bandwidth * 1e-9);
    result["decode"] = json::array();
    result["prefill"] = json::array();
    for (const std::string& name : o.models) {
        Model m(config_from_name(name));
        m.w.create(m.layout, false);
        m.acts.create(m.layout, 1, o.chunk, false, Recompute::full);
        initialise(m, 1);
        stream_sync(m.stream);
        const auto keep = [](json& list, const json& entry) { if (!entry.is_null()) list.push_back(entry); };
        for (int B : o.batches) {
            if (o.parts) bench_parts(m, B, bandwidth);
#ifndef SAMBA_CPU
            if (o.probe) bench_probe(m, o, B, 65536, bandwidth);
#endif
            for (int64_t context : o.contexts) keep(result["decode"], bench_decode(m, o, B, context, bandwidth));
        }
        for (int64_t prompt : o.prompts) keep(result["prefill"], bench_prefill(m, o, prompt));
    }
    if (o.out.empty()) return;
    std::ofstream(o.out) << result.dump(1) << "\n";
    printf("wrote %s\n", o.out.c_str());
}

int main(int argc, char** argv) {
    CLI::App app{"Decode and prefill speed against context length."};
    Options o;
    app.add_option("--models", o.models, "Configurations")->delimiter(',');
    app.add_option("--batches", o.batches, "Sequences written together")->delimiter(',');
    app.add_option("--contexts", o.contexts, "Tokens behind when decoding is timed")->delimiter(',')->transform(CLI::AsSizeValue(false));
    app.add_option("--prompts", o.prompts, "Lengths of prompts")->delimiter(',')->transform(CLI::AsSizeValue(false));
    app.add_option("--out", o.out, "JSON file");
    app.add_option("--chunk", o.chunk, "Tokens of a prompt at a time");
    app.add_option("--seconds", o.seconds, "Least time of a measurement");
    app.add_flag("--parts", o.parts, "Each operation alone");
    app.add_flag("--probe", o.probe, "The kernel of a step: without barriers, without work, and a table of its phases");
    app.add_flag("!--many-kernels", o.one_kernel, "Decode with a kernel for each operation");
    app.add_flag("!--no-graph", o.graph, "Launch each kernel of a step by itself");
#ifndef SAMBA_CPU
    app.add_flag("!--no-dependent-launch", gpu::decode::gpu().dependent_launch, "A kernel starts when the one before it has ended");
    app.add_option("--l2-ahead", gpu::decode::gpu().l2_ahead, "Bytes of weights that a kernel asks L2 for before its input is there");
#endif
    CLI11_PARSE(app, argc, argv);
    try {
        run(o);
    } catch (const std::exception& e) {
        fprintf(stderr, "error: %s\n", e.what());
        return 1;
    }
}
