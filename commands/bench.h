// train_samba bench: a training step on random tokens, as a whole and operation by operation.
#pragma once
#include <map>

#include <nlohmann/json.hpp>

#include "common.h"
#include "plans.h"

struct BenchOptions {
    std::string model = "samba-421m", recompute = "auto", graphs = "on", matmul = "bf16", plans, json;
    int64_t micro_batch = 8, seq_len = 0, accumulate = 8, repeats = 20;
    int gpu = 0;
};

inline CLI::App* add_bench(CLI::App& app, BenchOptions& o) {
    CLI::App* command = app.add_subcommand("bench", "A training step on random tokens: tokens/s, memory, and what each operation costs");
    command->add_option("--model", o.model, "A named configuration or a .json file")->capture_default_str();
    add_count(*command, "--micro-batch", o.micro_batch, "Sequences in a pass");
    add_count(*command, "--seq-len", o.seq_len, "Tokens in a sequence; 0: the model's training length");
    add_count(*command, "--accumulate", o.accumulate, "Micro-batches of the accumulated step");
    add_count(*command, "--repeats", o.repeats, "Passes and steps to time; the median counts");
    command->add_option("--recompute", o.recompute, "As in training")->check(CLI::IsMember({"auto", "none", "light", "full"}))->capture_default_str();
    command->add_option("--graphs", o.graphs, "As in training")->check(CLI::IsMember({"on", "off"}))->capture_default_str();
    add_matmul(*command, o.matmul);
    command->add_option("--plans", o.plans, PLANS_HELP);
    command->add_option("--json", o.json, "Also write the results to this file");
    command->add_option("--gpu", o.gpu, "Index of the GPU to use")->capture_default_str();
    return command;
}

// ms of each of `repeats` runs of work(), sorted. Between them the host does not wait.
inline std::vector<double> time_runs(Stream stream, int64_t repeats, const std::function<void()>& work) {
    std::vector<Timer> marks(repeats + 1);
    for (Timer& mark : marks) mark = timer_create();
    work();                                                // not counted: fills the queue
    timer_record(marks[0], stream);
    for (int64_t i = 0; i < repeats; i++) {
        work();
        timer_record(marks[i + 1], stream);
    }
    stream_sync(stream);
    std::vector<double> ms(repeats);
    for (int64_t i = 0; i < repeats; i++) ms[i] = timer_ms(marks[i], marks[i + 1]);
    for (Timer& mark : marks) timer_destroy(mark);
    std::sort(ms.begin(), ms.end());
    return ms;
}

struct OperationCost {
    int64_t calls = 0;
    double ms = 0, bytes = 0, flops = 0, bound = 0;
    std::string bound_by;
};

// "wgrad 6144x1536" -> "in_proj wgrad"; other operations' names as they are
inline std::string readable_operation(const std::string& name, const Layout& layout) {
    const size_t space = name.find(' ');
    if (space == std::string::npos || !isdigit((unsigned char)name[space + 1])) return name;
    const std::string shape = name.substr(space + 1), pass = name.substr(0, space);
    for (const Layer& layer : layout.layers)
        if (layer.kind == Kind::mlp && shape == std::to_string(2 * layer.d_ff) + "x" + std::to_string(layout.config.d_model)) return "w1|w2 " + pass;
    for (const Tensor& t : layout.tensors) {
        if (!t.is_matrix || shape != std::to_string(t.shape[0]) + "x" + std::to_string(t.shape[1])) continue;
        const std::string stem = t.name.substr(0, t.name.rfind('.'));
        return stem.substr(stem.rfind('.') + 1) + " " + pass;
    }
    return name;
}

inline std::map<std::string, OperationCost> add_up(const Recorder& recorder, const Layout& layout, const DeviceInfo& device, int64_t steps) {
    std::map<std::string, OperationCost> costs;
    for (const Recorder::Call& call : recorder.calls) {
        const bool fp8 = call.name.find("-fp8") != std::string::npos;      // twice the rate
        OperationCost& cost = costs[readable_operation(call.name, layout)];
        const std::pair<double, const char*> bounds[] = {{device.bandwidth > 0 ? call.bytes / device.bandwidth : 0, "memory"},
                                                         {device.peak_bf16 > 0 ? call.flops / (fp8 ? 2 : 1) / device.peak_bf16 : 0, "tensor cores"},
                                                         {device.special_rate > 0 ? call.special / device.special_rate : 0, "special functions"}};
        const auto& bound = *std::max_element(std::begin(bounds), std::end(bounds));
        cost.calls++;
        cost.ms += timer_ms(call.begin, call.end) / (double)steps;
        cost.bytes += call.bytes / (double)steps;
        cost.flops += call.flops / (double)steps;
        cost.bound += bound.first * 1e3 / (double)steps;
        cost.bound_by = bound.second;
    }
    for (auto& [name, cost] : costs) cost.calls /= steps;
    return costs;
}

// Sorted by ms. `step_ms`: of a whole step with one micro-batch
inline nlohmann::ordered_json print_operations(const std::map<std::string, OperationCost>& costs, double step_ms) {
    std::vector<std::pair<double, std::string>> order;
    for (const auto& [name, cost] : costs) order.push_back({-cost.ms, name});
    std::sort(order.begin(), order.end());
    nlohmann::ordered_json rows = nlohmann::ordered_json::array();
    double sum = 0, bound = 0;
    printf("\n%-24s %6s %9s %7s %9s %10s %9s %8s  %s\n", "operation", "calls", "ms", "step", "GB", "GFLOP", "bound ms", "of it", "bound by");
    for (const auto& [minus_ms, name] : order) {
        const OperationCost& c = costs.at(name);
        printf("%-24s %6lld %9.3f %6.1f%% %9.2f %10.1f %9.3f %7.1f%%  %s\n", name.c_str(), (long long)c.calls, c.ms, 100 * c.ms / step_ms,
               c.bytes * 1e-9, c.flops * 1e-9, c.bound, 100 * c.bound / c.ms, c.bound_by.c_str());
        rows.push_back({{"operation", name}, {"calls", c.calls}, {"ms", c.ms}, {"bytes", c.bytes}, {"flops", c.flops}, {"bound_ms", c.bound},
                        {"bound_by", c.bound_by}});
        sum += c.ms;
        bound += c.bound;
    }
    printf("%-24s %6s %9.3f %6.1f%% %9s %10s %9.3f %7.1f%%\n", "all of them", "", sum, 100 * sum / step_ms, "", "", bound, 100 * bound / sum);
    return rows;
}

// A model ready to train on the same random tokens again and again
struct Bench {
    const BenchOptions& o;
    const DeviceInfo device;
    const Config config;
    const int64_t B, T;
    const bool fp8;
    Model m;
    Recompute level = Recompute::none;
    std::vector<int> tokens, targets;      // (B,T)
    int64_t updates = 0;
    nlohmann::ordered_json report;

    explicit Bench(const BenchOptions& o)
        : o(o), device(device_info()), config(load_config(o.model)), B(o.micro_batch), T(o.seq_len > 0 ? o.seq_len : config.seq_len),
          fp8(use_fp8(o.matmul)), m(config), tokens(B * T), targets(B * T) {
        level = choose_recompute(o.recompute, m.layout, B, T, (size_t)parameter_bytes(m.layout, true, fp8), fp8);
        m.w.create(m.layout, true, {0, m.layout.elements()}, fp8);
        m.acts.create(m.layout, B, T, true, level, fp8);
        initialise(m, 1);
        for (int64_t i = 0; i < B * T; i++) {
            tokens[i] = (int)(counter_uniform(7, i) * config.vocab_size);
            targets[i] = (int)(counter_uniform(8, i) * config.vocab_size);
        }
        report = {{"model", config.name}, {"device", device.name}, {"build", BUILD_NAME}, {"commit", SAMBA_COMMIT},
                  {"micro_batch", B}, {"seq_len", T}, {"recompute", recompute_name(level)}, {"graphs", o.graphs}, {"matmul", o.matmul},
                  {"flops_per_token", flops_per_token(m.layout, T)}};
        printf("%s on %s (%s), %lld x %lld tokens, recompute %s, graphs %s%s\n", config.name.c_str(), device.name.c_str(), BUILD_NAME,
               (long long)B, (long long)T, recompute_name(level), o.graphs.c_str(), fp8 ? ", large products in fp8" : "");
        plan_matmuls(m, Comm(), o.plans, (int)B, T, o.accumulate > 1);
    }

    void pass(bool graphs, bool first, int64_t micro_batches) {
        upload_tokens(m, tokens.data(), targets.data(), B * T);
        (graphs ? forward_backward_graph : forward_backward)(m, (int)B, T, 1.0f / (float)micro_batches, first);
    }
    void step(bool graphs, int64_t micro_batches) {
        for (int64_t i = 0; i < micro_batches; i++) pass(graphs, i == 0, micro_batches);
        update(m, AdamW{1e-5f, 0.9f, 0.95f, 1e-8f, 0.1f, ++updates}, 1.0f, true);
    }

    // Times work(), prints and reports it; the median in ms
    double show(const std::string& what, const char* key, int64_t repeats, int64_t micro_batches, const std::function<void()>& work) {
        const std::vector<double> ms = time_runs(m.stream, repeats, work);
        const double median = ms[ms.size() / 2], tok_s = (double)(B * T * micro_batches) / median * 1e3;
        const double mfu = device.peak_bf16 > 0 ? tok_s * flops_per_token(m.layout, T) / device.peak_bf16 : 0;
        printf("%-40s %9.2f ms (%.2f to %.2f)  %.0f tok/s", what.c_str(), median, ms.front(), ms.back(), tok_s);
        printf(mfu > 0 ? "  %.1f%% of bf16 peak\n" : "\n", 100 * mfu);
        report[key] = {{"ms", median}, {"fastest", ms.front()}, {"slowest", ms.back()}, {"tok_s", tok_s}, {"mfu", mfu},
                       {"micro_batches", micro_batches}};
        return median;
    }

    void show_memory() {
        const double used = (double)device.total_bytes - (double)device_free_bytes(), predicted = (double)memory_in_use(m.layout, B, T, level, fp8);
        printf("GPU memory in use %s, predicted %s (%+.1f%%)\n", human_bytes(used).c_str(), human_bytes(predicted).c_str(),
               100 * (predicted / used - 1));
        report["memory_bytes"] = used;
        report["predicted_bytes"] = predicted;
    }

    void show_operations(double step_ms) {
        constexpr int64_t RECORDED = 3;
        Recorder recorder;
        Recorder::active = &recorder;
        for (int64_t i = 0; i < RECORDED; i++) step(false, 1);
        stream_sync(m.stream);
        Recorder::active = nullptr;
        if (recorder.calls.empty()) return;                // the CPU's operations are not timed
        report["operations"] = print_operations(add_up(recorder, m.layout, device, RECORDED), step_ms);
    }

    // Numbers that are not finite take another time than those of training.
    void check_loss() const {
        float loss = 0;
        copy_to_host(&loss, m.acts.loss, sizeof loss, m.stream);
        stream_sync(m.stream);
        if (!std::isfinite(loss)) fail("the loss became %f: these times are not those of training", loss);
    }
};

inline void run_bench(const BenchOptions& o) {
    select_gpu(o.gpu);
    Bench bench(o);
    const bool graphs = o.graphs == "on";
    bench.show("forward and backward", "forward_backward", o.repeats, 1, [&] { bench.pass(graphs, true, 1); });
    const double step_ms = bench.show("optimizer step of one micro-batch", "step", o.repeats, 1, [&] { bench.step(graphs, 1); });
    if (o.accumulate > 1)
        bench.show("optimizer step of " + std::to_string(o.accumulate) + " micro-batches", "accumulated_step",
                   std::max<int64_t>(1, o.repeats / o.accumulate), o.accumulate, [&] { bench.step(graphs, o.accumulate); });
    if (ON_GPU) bench.show_memory();
    bench.show_operations(step_ms);
    bench.check_loss();
    if (!o.json.empty()) write_file_durably(o.json, bench.report.dump(1) + "\n");
}
