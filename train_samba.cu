// train_samba: trains a Samba language model, evaluates it, and writes with it. The file reads in the order of a run:
// options, set-up, the training loop with its checkpoints and validation, then the other subcommands.
//
//   train_samba [train] --model samba-421m --data 'data/slim/train_*.bin' --val 'data/slim/val_*.bin' --out out/421m
//   train_samba eval     --checkpoint out/421m --data 'data/slim/val_*.bin'
//   train_samba generate --checkpoint out/421m --prompt "import os"
//   train_samba score    --checkpoint out/421m --requests requests.jsonl
//   train_samba retrieve --checkpoint out/421m --prompts out/prompts
//   train_samba info     --model samba-421m
#include <csignal>
#include <cstdlib>
#include <numeric>

#include <CLI/CLI.hpp>

#include "samba.cuh"
#include "kernels/data_parallel.cuh"

#include "data/checkpoint.h"
#include "data/loader.h"
#include "data/model_io.h"
#include "data/run_log.h"
#include "data/tokenizer.h"

#include "commands/bench.h"
#include "commands/eval.h"
#include "commands/generate.h"
#include "commands/plans.h"
#include "commands/retrieve.h"
#include "commands/score.h"
#include "commands/validation.h"

using json = nlohmann::ordered_json;

const double launched = now_seconds();     // of the program, but for the time it took to load

// ---------------------------------------------------------------------------------------------------------------------
// Options. Help, command line and --config all come from the one table in add_train_options().

struct TrainOptions {
    std::string model = "tiny", preset;
    std::vector<std::string> data, val;
    std::string out = "out/run";
    int64_t micro_batch = 8, seq_len = 0, tbptt = 1, global_batch = 0, steps = 0, tokens = 0, warmup_steps = -1;
    double lr = 4e-4, min_lr = -1;
    std::string schedule = "cosine", decay = "all", recompute = "auto", tokenizer, resume, init_from;
    double decay_fraction = 0.1, weight_decay = 0.1, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, clip = 1.0;
    uint64_t seed = 3407;
    int64_t val_every = 0, val_batches = 10, checkpoint_every = 1000, keep = 3, log_every = 1, max_skips = 10;
    std::vector<std::string> val_lengths = {"1x", "2x", "3x", "4x"};
    int gpu = 0, zero = 1;
    std::string collectives = "auto", reduce = "fp32", graphs = "on", matmul = "bf16", plans;
    int64_t bucket = 0;
    double rank_timeout = 45;
    bool resuming = false;                 // --resume was given, with or without a directory

    int64_t sequence() const { return seq_len * tbptt; }   // tokens of a sequence of the data, which one step reads whole
};

// Why --zero has no more levels: dev/scaling.md
inline std::string refuse_zero(const std::string& level) {
    if (level == "0" || level == "1") return "";
    if (level == "2")
        return "2 is not built: it would save 4 bytes a parameter and sum gradients in every micro-batch instead of once a step (dev/scaling.md); "
               "use --zero 1";
    return level + " is neither 0 nor 1";
}

inline void add_train_options(CLI::App& app, TrainOptions& o) {
    app.option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);      // given twice, the later counts
    app.set_config("--config", "", "Read options from this file: lines of  name = value");
    app.add_option("--model", o.model, "A named configuration (train_samba info lists them) or a .json file")->capture_default_str();
    app.add_option("--preset", o.preset, "The reference's recipe; options given beside it win: 20b or 100b tokens at 2,097,152 tokens a step")
        ->check(CLI::IsMember({"20b", "100b"}));
    app.add_option("--data", o.data, "Token shards to train on: paths, quoted patterns or folders; a mixture with weights: a:0.7 b:0.3");
    app.add_option("--val", o.val, "Token shards to validate on");
    app.add_option("--out", o.out, "Directory of this run: checkpoints and log.jsonl")->capture_default_str();
    add_count(app, "--micro-batch", o.micro_batch, "Sequences in one forward and backward pass");
    add_count(app, "--seq-len", o.seq_len, "Tokens in a sequence; 0: the model's training length");
    add_count(app, "--tbptt", o.tbptt, "Sequences of this many times --seq-len, in chunks that begin with the state the last one left (a constant)");
    add_count(app, "--global-batch", o.global_batch, "Tokens in one optimizer step; 0: one micro-batch");
    add_count(app, "--steps", o.steps, "Optimizer steps to train");
    add_count(app, "--tokens", o.tokens, "Tokens to train on, instead of --steps");
    app.add_option("--lr", o.lr, "Peak learning rate")->check(CLI::NonNegativeNumber)->capture_default_str();
    app.add_option("--min-lr", o.min_lr, "Learning rate at the end; below 0: a tenth of --lr")->capture_default_str();
    add_count(app, "--warmup-steps", o.warmup_steps, "Steps of linear warm-up; -1: one in a hundred");
    app.add_option("--schedule", o.schedule, "Learning rate after the warm-up; wsd is constant, then linear to --min-lr")
        ->check(CLI::IsMember({"cosine", "linear", "constant", "wsd"}))->capture_default_str();
    app.add_option("--decay-fraction", o.decay_fraction, "Last part of the steps in which wsd decays")
        ->check(CLI::Range(0.0, 1.0))->capture_default_str();
    app.add_option("--weight-decay", o.weight_decay, "AdamW weight decay")->check(CLI::NonNegativeNumber)->capture_default_str();
    app.add_option("--decay", o.decay, "Decay every parameter, as the reference does, or only matrices")
        ->check(CLI::IsMember({"all", "matrices"}))->capture_default_str();
    app.add_option("--beta1", o.beta1, "AdamW first moment")->check(CLI::Range(0.0, 0.999999))->capture_default_str();
    app.add_option("--beta2", o.beta2, "AdamW second moment")->check(CLI::Range(0.0, 0.99999999))->capture_default_str();
    app.add_option("--eps", o.eps, "AdamW epsilon")->check(CLI::PositiveNumber)->capture_default_str();
    app.add_option("--clip", o.clip, "Largest global gradient norm; 0: no clipping")->check(CLI::NonNegativeNumber)->capture_default_str();
    app.add_option("--seed", o.seed, "Of the initial weights and the data order")->capture_default_str();
    add_count(app, "--val-every", o.val_every, "Steps between validations; 0: only at the end");
    add_count(app, "--val-batches", o.val_batches, "Batches of --micro-batch sequences in a validation");
    app.add_option("--val-lengths", o.val_lengths, "Context lengths to validate at, as multiples of --seq-len")
        ->delimiter(',')->capture_default_str();
    add_count(app, "--checkpoint-every", o.checkpoint_every,
              "Steps between checkpoints; one is always written at the end. -1: none at all, for measurements");
    add_count(app, "--keep", o.keep, "Checkpoints to keep, the newest; 0: all");
    app.add_option("--resume", o.resume, "Continue from the newest whole checkpoint of --out, or of this directory")->expected(0, 1)->default_str("");
    app.add_option("--init-from", o.init_from, "Start from this checkpoint's weights, with a fresh optimizer and data order");
    app.add_option("--recompute", o.recompute, "What backward computes again to save memory; auto: as little as fits")
        ->check(CLI::IsMember({"auto", "none", "light", "full"}))->capture_default_str();
    app.add_option("--graphs", o.graphs, "Replay a micro-batch as one CUDA graph; the same numbers either way")
        ->check(CLI::IsMember({"on", "off"}))->capture_default_str();
    add_matmul(app, o.matmul);
    app.add_option("--plans", o.plans, PLANS_HELP);
    app.add_option("--tokenizer", o.tokenizer, "tokenizer.model to keep with the checkpoints; default: the one beside the data, if there is one");
    add_count(app, "--log-every", o.log_every, "Steps between lines on the screen; the log has every step");
    add_count(app, "--max-skips", o.max_skips, "Steps in a row with a gradient that is not finite before the run stops");
    app.add_option("--gpu", o.gpu, "Index of the GPU to use; with several processes each takes its own")->capture_default_str();
    app.add_option("--zero", o.zero, "With several processes: 1 = each keeps its part of master weights and moments, 0 = each keeps all")
        ->check(CLI::Validator([](std::string& level) { return refuse_zero(level); }, "{0,1}"))->capture_default_str();
    app.add_option("--collectives", o.collectives, "Between processes: nccl between GPUs, host through host memory, auto chooses")
        ->check(CLI::IsMember({"auto", "nccl", "host"}))->capture_default_str();
    app.add_option("--reduce", o.reduce, "Precision in which gradients travel between processes: bf16 is half the bytes, and rounds")
        ->check(CLI::IsMember({"fp32", "bf16"}))->capture_default_str();
    add_count(app, "--bucket", o.bucket, "Bytes of gradients that travel together while backward goes on; 0: 64m with NCCL, all through host memory");
    app.add_option("--rank-timeout", o.rank_timeout,
                   "Seconds without a sign of life or progress after which a process counts as dead and the job ends; 0: never")
        ->check(CLI::NonNegativeNumber)->capture_default_str();
}

// The options as the table has them, with the values that their variables hold now: for the log and the checkpoints.
inline json options_to_json(CLI::App& app) {
    json all = json::object();
    for (CLI::Option* option : app.get_options()) {
        const std::string name = option->get_single_name();
        if (name == "help" || name == "config") continue;
        option->capture_default_str();                     // reads the variable
        all[name] = option->get_default_str();
    }
    return all;
}

// Sets what the command line left open and checks what no single option can check.
inline void resolve(TrainOptions& o, const CLI::App& app, Config& config, int world) {
    config = load_config(o.model);
    if (o.seq_len == 0) o.seq_len = config.seq_len;
    config.seq_len = o.seq_len;
    const auto open = [&](const char* name) { return app.get_option(name)->count() == 0; };
    if (!o.preset.empty()) {
        if (open("--tokens") && open("--steps")) o.tokens = o.preset == "20b" ? 20000000000 : 100000000000;
        if (open("--global-batch")) o.global_batch = 2097152;
    }
    if (o.micro_batch < 1) fail("--micro-batch %lld: must be at least 1", (long long)o.micro_batch);
    if (o.seq_len < 1) fail("--seq-len %lld: must be at least 1", (long long)o.seq_len);
    if (o.tbptt < 1) fail("--tbptt %lld: must be at least 1", (long long)o.tbptt);
    const int64_t micro_tokens = o.micro_batch * o.sequence() * world;
    if (o.global_batch == 0) o.global_batch = micro_tokens;
    if (o.global_batch < 0 || o.global_batch % micro_tokens)
        fail("--global-batch %lld: must be a multiple of --micro-batch %lld times --seq-len %lld times --tbptt %lld "
             "times the number of processes, %d",
             (long long)o.global_batch, (long long)o.micro_batch, (long long)o.seq_len, (long long)o.tbptt, world);
    if (o.steps > 0 && o.tokens > 0) fail("--steps and --tokens are both given: leave one out");
    if (o.tokens > 0) o.steps = o.tokens / o.global_batch;
    if (o.steps < 1) fail("nothing to do: give --steps N or --tokens N (at least one --global-batch of %lld)", (long long)o.global_batch);
    if (o.min_lr < 0) o.min_lr = o.lr / 10;
    if (o.warmup_steps < 0) o.warmup_steps = o.steps / 100;
    if (o.data.empty()) fail("--data is missing: name token shards, for example --data 'data/stdlib/train_*.bin' (make data writes those)");
    if (o.val_batches < 1) fail("--val-batches %lld: must be at least 1", (long long)o.val_batches);
    if (o.log_every < 1) fail("--log-every %lld: must be at least 1", (long long)o.log_every);
    if (!o.init_from.empty() && o.resuming) fail("--init-from and --resume are both given: leave one out");
}

// Learning rate of the update numbered `step` from 1. The reference counts micro-batches from 0; this is its value within
// one micro-batch, and never 0.
inline double learning_rate(const TrainOptions& o, int64_t step) {
    if (step <= o.warmup_steps) return o.lr * (double)step / (double)o.warmup_steps;
    const double part = std::min(1.0, (double)(step - o.warmup_steps) / (double)std::max<int64_t>(1, o.steps - o.warmup_steps));
    if (o.schedule == "constant") return o.lr;
    if (o.schedule == "linear") return o.lr + (o.min_lr - o.lr) * part;
    if (o.schedule == "cosine") return o.min_lr + 0.5 * (1 + std::cos(M_PI * part)) * (o.lr - o.min_lr);
    const double decay_from = (double)o.steps * (1 - o.decay_fraction);                                    // wsd
    return (double)step <= decay_from ? o.lr : o.lr + (o.min_lr - o.lr) * ((double)step - decay_from) / ((double)o.steps - decay_from);
}

// ---------------------------------------------------------------------------------------------------------------------
// Signals: the first asks to finish the step, save and leave; a second leaves at once, if it comes a second later or more: timeout and
// other launchers send one to the process and one to its group. Of several processes any may get it.

inline volatile std::sig_atomic_t stop_requested = 0;
inline timespec stop_requested_at;
inline void on_stop_signal(int) {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    const double since = (double)(now.tv_sec - stop_requested_at.tv_sec) + 1e-9 * (double)(now.tv_nsec - stop_requested_at.tv_nsec);
    if (stop_requested && since > 1) _exit(130);
    if (!stop_requested) stop_requested_at = now;
    stop_requested = 1;
}
inline void catch_stop_signals() {
    struct sigaction action{};
    action.sa_handler = on_stop_signal;
    sigaction(SIGINT, &action, nullptr);
    sigaction(SIGTERM, &action, nullptr);
    sigaction(SIGUSR1, &action, nullptr);  // what mpirun passes on, and Slurm sends before the time is up
    std::signal(SIGXFSZ, SIG_IGN);         // a file over the size limit is a failed write with an error line, not a death
}

// ---------------------------------------------------------------------------------------------------------------------
// A run and its checkpoints

struct RunState {
    int64_t step = 0;                      // optimizer steps made
    int64_t updates = 0;                   // of them, those not skipped: AdamW's bias correction counts these
    int64_t tokens = 0;
    int64_t sample = 0;                    // global index of the next sample: the whole state of the data
    int64_t skipped = 0;                   // steps skipped because a gradient was not finite
};

// Names and lengths of shards, hashed on top of `h`
inline uint64_t shards_identity(const std::vector<ShardInfo>& shards, uint64_t h) {
    for (const ShardInfo& s : shards) {
        const std::string file = std::filesystem::path(s.path).filename().string();
        const std::string line = file + " " + std::to_string(s.tokens) + " " + std::to_string(s.fingerprint) + "\n";
        h = fnv1a64(line.data(), line.size(), h);
    }
    return h;
}
// Of the whole mixture: resuming on other data must not go unnoticed.
inline uint64_t data_identity(const Mixture& data) {
    uint64_t h = fnv1a64("", 0);
    for (size_t i = 0; data.weights().size() > 1 && i < data.weights().size(); i++) {
        const std::string line = std::to_string(data.sets()[i]->info().size()) + " shards of weight " + std::to_string(data.share(i)) + "\n";
        h = fnv1a64(line.data(), line.size(), h);
    }
    return shards_identity(data.info(), h);
}

// All processes together: the main one writes the model and what makes the directory a checkpoint, each its own moments.
inline std::string save_checkpoint(const Model& m, DataParallel& parallel, const RunState& run, const TrainOptions& o, const json& options,
                                   uint64_t identity, uint64_t fingerprint) {
    const Comm& comm = parallel.comm;
    const Comm::During during(comm, Guard::busy, "writing a checkpoint");
    const bool shared = parallel.sharded && comm.world > 1;
    std::unique_ptr<CheckpointWriter> writer;
    if (comm.main()) writer = std::make_unique<CheckpointWriter>(o.out, run.step);
    const std::string dir = comm.broadcast(writer ? writer->directory() : "");
    const double bytes = 4.0 * (double)m.layout.parameters(), moment_bytes = shared ? 8.0 * (double)m.w.own.size() : 2 * bytes;
    ProgressBar bar("checkpoint", bytes + moment_bytes);
    const Collect collect = [&](float* host, const Tensor& t) { parallel.collect(host, t); };
    const auto show = [&](double done) { bar.set(done); comm.tick(); };
    if (comm.main()) save_parameters(m, dir + "/model.safetensors", [&](int64_t done) { show((double)done); }, shared ? collect : nullptr);
    else if (shared) for (const Tensor& t : m.layout.tensors) parallel.collect(nullptr, t);
    if (comm.main() || shared)
        save_moments(m, dir + "/" + moments_file(shared, comm.rank, comm.world), [&](int64_t done) { show(bytes + (double)done); });
    comm.wait_for_all("writing a checkpoint");
    if (!comm.main()) return o.out + "/" + checkpoint_name(run.step);
    for (int r = 0; r < comm.world; r++)
        if (const std::string file = moments_file(shared, r, comm.world); access(writer->path(file).c_str(), F_OK) != 0)
            fail("%s of rank %d on %s is not there: --out must be in a file system that all hosts share", writer->path(file).c_str(), r,
                 comm.hosts[r].c_str());
    if (!o.tokenizer.empty()) write_file_durably(writer->path("tokenizer.model"), MappedFile(o.tokenizer).text());
    writer->commit({{"step", run.step}, {"updates", run.updates}, {"tokens", run.tokens}, {"sample", run.sample}, {"skipped", run.skipped},
                    {"seq_len", o.seq_len}, {"tbptt", o.tbptt}, {"seed", o.seed}, {"data_identity", std::to_string(identity)},
                     {"tokenizer_fingerprint", std::to_string(fingerprint)}, {"build", BUILD_NAME},
                    {"commit", SAMBA_COMMIT}, {"ranks", comm.world}, {"options", options}});
    prune_checkpoints(o.out, (int)o.keep);
    return o.out + "/" + checkpoint_name(run.step);
}

inline RunState load_checkpoint(Model& m, const std::string& dir, const TrainOptions& o, uint64_t identity) {
    const nlohmann::json state = read_state(dir);
    RunState run;
    try {
        if (state.at("seq_len") != o.seq_len)
            fail("%s was trained with --seq-len %lld, which fixes its data order; resume with that, or start anew with --init-from",
                 dir.c_str(), (long long)state.at("seq_len"));
        if (const int64_t tbptt = state.value("tbptt", (int64_t)1); tbptt != o.tbptt)
            fail("%s was trained with --tbptt %lld, which fixes its data order; resume with that, or start anew with --init-from", dir.c_str(),
                 (long long)tbptt);
        if (state.at("seed") != o.seed)
            fail("%s was trained with --seed %lld, which fixes its data order; resume with that, or start anew with --init-from",
                 dir.c_str(), (long long)state.at("seed"));
        if (state.at("data_identity") != std::to_string(identity))
            fail("%s was trained on other data than --data names now; resume with the same shards, or start anew with --init-from", dir.c_str());
        run = {state.at("step"), state.at("updates"), state.at("tokens"), state.at("sample"), state.at("skipped")};
    } catch (const nlohmann::json::exception& e) {
        fail("%s/state.json: %s; remove this checkpoint to resume from an older one", dir.c_str(), e.what());
    }
    load_parameters(m, dir + "/model.safetensors");
    load_checkpoint_moments(m, dir);
    return run;
}

inline bool has_checkpoint(const std::string& out) {
    if (!std::filesystem::is_directory(out)) return false;
    for (const std::string& name : list_checkpoints(out))
        if (checkpoint_defect(out + "/" + name).empty()) return true;
    return false;
}

// ---------------------------------------------------------------------------------------------------------------------
// Set-up

// Who takes part, a line for each host
inline void print_ranks(const Comm& comm, const DataParallel& parallel) {
    std::map<std::string, std::string> hosts;
    for (int r = 0; r < comm.world; r++)
        hosts[comm.hosts[r]] += " " + std::to_string(r) + (comm.devices[r].empty() ? "" : " (" + comm.devices[r] + ")");
    printf("  ranks    %d on %zu hosts, zero %d, gradients as %s in %zu buckets by %s\n", comm.world, hosts.size(), (int)parallel.sharded,
           comm.as_bf16() ? "bf16" : "fp32", parallel.buckets.size(), comm.describe().c_str());
    for (auto& [host, ranks] : hosts) printf("           %s:%s\n", host.c_str(), ranks.c_str());
}

inline void print_run(const TrainOptions& o, const Model& m, const DeviceInfo& device, const Mixture& data, int64_t accumulate,
                      const DataParallel& parallel) {
    const Config& c = m.config();
    const Comm& comm = parallel.comm;
    printf("%s on %s (%s)\n", c.name.c_str(), device.name.c_str(), BUILD_NAME);
    printf("  model    %s parameters, blocks %s, d_model %d, window %lld\n", human((double)m.layout.parameters()).c_str(), c.blocks.c_str(),
           c.d_model, (long long)c.window);
    const double tokens = (double)o.steps * (double)o.global_batch;
    printf("  data     %s tokens in %zu shards, %.2f epochs\n", human((double)data.total_tokens()).c_str(), data.info().size(),
           tokens / (double)data.total_tokens());
    for (size_t i = 0; i < data.sets().size() && data.sets().size() > 1; i++) {
        const double in_set = (double)data.sets()[i]->total_tokens();
        printf("           %5.1f%% of %s, %s tokens, %.2f epochs\n", 100 * data.share(i), data.names()[i].c_str(), human(in_set).c_str(),
               data.share(i) * tokens / in_set);
    }
    const std::string processes = comm.world > 1 ? " x " + std::to_string(comm.world) : "";
    printf("  step     %s tokens = %lld x %lld x %lld%s (sequences, tokens, micro-batches%s); %lld steps, %s tokens\n",
           human((double)o.global_batch).c_str(), (long long)o.micro_batch, (long long)o.seq_len, (long long)(accumulate * o.tbptt),
           processes.c_str(), comm.world > 1 ? ", processes" : "", (long long)o.steps, human(tokens).c_str());
    printf("  memory   %s parameters and optimizer%s, %s activations (recompute %s)\n", human_bytes((double)m.w.arena.bytes()).c_str(),
           parallel.sharded ? " a rank" : "", human_bytes((double)m.acts.bytes()).c_str(), recompute_name(m.acts.recompute));
    if (m.acts.fp8) printf("  products large ones in fp8, but for those of weight gradients\n");
    if (o.tbptt > 1)
        printf("  tbptt    sequences of %lld tokens in %lld chunks, the state carried and held constant\n", (long long)o.sequence(),
               (long long)o.tbptt);
    if (comm.active()) print_ranks(comm, parallel);
    fflush(stdout);
}

// The tokenizer that the data was made with lies beside it.
inline std::string find_tokenizer(const TrainOptions& o, const Mixture& data) {
    if (!o.tokenizer.empty()) return o.tokenizer;
    const std::string beside = parent_directory(data.info()[0].path) + "/tokenizer.model";
    return access(beside.c_str(), R_OK) == 0 ? beside : "";
}

// ---------------------------------------------------------------------------------------------------------------------
// The training loop

using StepResult = DataParallel::Result;

// The next `count` batches of the loader: each is B sequences of tbptt * T tokens, which go in chunks of T, the state carried from one
// to the next, as micro-batches. compute(number of the micro-batch), its tokens on their way
template <class F>
void for_micro_batches(Model& m, const Comm& comm, DataLoader& loader, const TrainOptions& o, int64_t count, SequenceState* state, F compute) {
    const auto next = [&] {
        const Comm::During during(comm, Guard::busy, "reading training data");
        return loader.next();
    };
    for (int64_t i = 0; i < count; i++) {
        const Batch batch = next();                                                                        // (B,tbptt*T)
        if (state) state->reset(m.layout, m.stream);
        for (int64_t k = 0; k < o.tbptt; k++) {
            upload_chunk(m, batch.tokens + k * o.seq_len, batch.targets + k * o.seq_len, o.micro_batch, o.seq_len, o.sequence());
            compute(i * o.tbptt + k);
        }
    }
}

inline StepResult train_step(Model& m, DataParallel& parallel, DataLoader& loader, const TrainOptions& o, int64_t accumulate, SequenceState* state,
                             RunState& run, double lr) {
    const int64_t micro_batches = accumulate * o.tbptt;
    for_micro_batches(m, parallel.comm, loader, o, accumulate, state, [&](int64_t micro) {
        parallel.micro_batch(micro == micro_batches - 1);
        const bool with_others = parallel.comm.active() && (micro == 0 || micro == micro_batches - 1);     // weights on their way, gradients
        const auto pass = o.graphs == "on" && !with_others ? forward_backward_graph : forward_backward;
        const float weight = 1.0f / (float)(micro_batches * parallel.comm.world);
        if (state) forward_backward_from(state, m, (int)o.micro_batch, o.seq_len, weight, micro == 0);     // its position moves: no graph
        else pass(m, (int)o.micro_batch, o.seq_len, weight, micro == 0);
        parallel.comm.tick();
    });
    const AdamW adamw{(float)lr, (float)o.beta1, (float)o.beta2, (float)o.eps, (float)o.weight_decay, run.updates + 1};
    parallel.update(adamw, (float)o.clip, o.decay == "all", stop_requested);
    const StepResult result = parallel.result(stop_requested);
    run.step++;
    run.updates += result.applied;
    run.tokens += o.global_batch;
    run.sample = loader.position();
    return result;
}

inline void print_step(const TrainOptions& o, const RunState& run, const StepResult& r, double lr, double ms, double tok_s, double mfu, double eta) {
    char peak[32] = "";
    if (mfu > 0) snprintf(peak, sizeof peak, " | %4.1f%% of bf16 peak", 100 * mfu);
    printf("step %*lld/%lld | %s tokens | loss %.4f | norm %.3f | lr %.2e | %.1f ms | %s tok/s%s | ETA %s%s\n",
           (int)std::to_string(o.steps).size(), (long long)run.step, (long long)o.steps, human((double)run.tokens).c_str(), r.loss, r.norm, lr,
           ms, human(tok_s).c_str(), peak, human_time(eta).c_str(), r.applied ? "" : " | SKIPPED: not finite");
    fflush(stdout);
}

inline void validate_and_log(Validation& validation, RunLog& log, int64_t step) {
    std::string line;
    for (auto [length, loss] : validation.run()) {
        log.write({{"type", "val"}, {"step", step}, {"length", length}, {"loss", loss}, {"ppl", std::exp(loss)}});
        char text[96];
        snprintf(text, sizeof text, "  %lld: %.4f (ppl %.2f)", (long long)length, loss, std::exp(loss));
        line += text;
    }
    printf("validation loss by context length%s\n", line.c_str());
    fflush(stdout);
}

// What a run consists of besides the model
struct Trainer {
    Comm& comm;
    TrainOptions& o;
    CLI::App& app;                         // the table of the options
    json options;
    Config config;
    DeviceInfo device;
    std::unique_ptr<Mixture> data;
    std::unique_ptr<Shards> val;
    std::unique_ptr<Model> m;
    std::unique_ptr<DataParallel> parallel;
    std::unique_ptr<DataLoader> loader;
    std::unique_ptr<Validation> validation;
    std::unique_ptr<RunLog> log;
    RunState run;
    uint64_t identity = 0, fingerprint = 0; // of the data, of its tokenizer
    int64_t accumulate = 1;                // batches of the loader in a step and process
    SequenceState carried;                 // with --tbptt: from chunk to chunk

    SequenceState* tbptt_state() { return o.tbptt > 1 ? &carried : nullptr; }
    Trainer(Comm& comm, TrainOptions& o, CLI::App& app) : comm(comm), o(o), app(app) {}

    // Everything is allocated here: after this the loop only computes.
    void set_up() {
        select_gpu(comm.world > 1 ? comm.local_rank % std::max(1, device_count()) : o.gpu);
        device = device_info();
        const bool fp8 = use_fp8(o.matmul);
        data = std::make_unique<Mixture>(o.data, config.vocab_size);
        if (!o.val.empty()) val = std::make_unique<Shards>(o.val, config.vocab_size);
        identity = data_identity(*data);
        o.tokenizer = find_tokenizer(o, *data);
        check_agreement();
        const std::string from = comm.broadcast(comm.main() ? start_point() : "");
        check_tokenizers(from);

        m = std::make_unique<Model>(config);
        comm.use_device(o.collectives == "nccl" ? Comm::Mode::nccl : o.collectives == "host" ? Comm::Mode::host : Comm::Mode::automatic, m->stream);
        accumulate = o.global_batch / (o.micro_batch * o.sequence() * comm.world);
        const Range own = DataParallel::own_range(m->layout, comm, o.zero);
        const std::vector<int64_t> multiples = length_multiples(o.val_lengths);
        const size_t val_bytes = val ? state_bytes(m->layout, o.micro_batch, multiples.back() * o.seq_len) : 0;
        const size_t staging = (size_t)DataParallel::staging_bytes(m->layout, comm, o.bucket, o.reduce == "bf16");
        const size_t carried_bytes = o.tbptt > 1 ? state_bytes(m->layout, o.micro_batch, o.sequence(), true) : 0;
        const size_t other_bytes = val_bytes + carried_bytes + (size_t)parameter_bytes(m->layout, true, own, fp8) + staging;
        const Recompute level = choose_recompute(o.recompute, m->layout, o.micro_batch, o.seq_len, other_bytes, fp8);
        o.recompute = recompute_name(level);
        options = options_to_json(app);
        m->w.create(m->layout, true, own, fp8);
        m->acts.create(m->layout, o.micro_batch, o.seq_len, true, level, fp8);
        if (o.tbptt > 1) carried.create(m->layout, o.micro_batch, o.sequence(), m->stream, true);
        parallel = std::make_unique<DataParallel>(comm, *m, o.zero, o.bucket, o.reduce == "bf16");
        if (val) validation = std::make_unique<Validation>(*m, comm, *val, multiples, o.micro_batch, o.seq_len, o.val_batches);
        initialise(*m, o.seed, [&] { comm.tick(); });
        if (!from.empty()) {
            const Comm::During during(comm, Guard::busy, "reading a checkpoint");
            if (o.resuming) run = load_checkpoint(*m, from, o, identity);
            else load_parameters(*m, from + "/model.safetensors");
        }
        loader = std::make_unique<DataLoader>(*data, o.micro_batch, o.sequence(), o.global_batch / o.sequence(), comm.rank, comm.world, o.seed, true);
        loader->seek(run.sample);

        std::filesystem::create_directories(o.out);
        log = std::make_unique<RunLog>(comm.main() ? o.out + "/log.jsonl" : "");
        log->write({{"type", "run"}, {"options", options}, {"config", config_to_json(config)}, {"commit", SAMBA_COMMIT}, {"build", BUILD_NAME},
                    {"gpu", device.name}, {"parameters", m->layout.parameters()}, {"flops_per_token", flops_per_token(m->layout, o.seq_len)},
                    {"ranks", comm.world}, {"step", run.step}});
        print_run(o, *m, device, *data, accumulate, *parallel);
        if (!from.empty()) printf("  %s %s at step %lld\n", o.resuming ? "resumed " : "weights of", from.c_str(), (long long)run.step);
        plan_matmuls(*m, comm, o.plans, (int)o.micro_batch, o.seq_len, accumulate > 1);
    }

    // One tokenizer for the checkpoint, the data, the validation data and the file that the checkpoints will hold
    void check_tokenizers(const std::string& from) {
        fingerprint = data->fingerprint() ? data->fingerprint() : file_fingerprint(o.tokenizer);
        const std::string first = data->info()[0].path;
        if (!from.empty()) check_same_tokenizer(checkpoint_fingerprint(from), "the checkpoint " + from, fingerprint, first);
        if (!o.tokenizer.empty()) check_same_tokenizer(file_fingerprint(o.tokenizer), o.tokenizer, fingerprint, first);
        if (val) check_same_tokenizer(fingerprint, first, val->fingerprint(), val->info()[0].path);
        if (!fingerprint && !from.empty()) fingerprint = checkpoint_fingerprint(from);
    }

    // Refuses to start where a process has another program, configuration or data than the first one.
    void check_agreement() const {
        if (comm.world == 1) return;
        const MappedFile program("/proc/self/exe");
        const std::string fingerprint_of_program = std::to_string(fnv1a64(program.data, program.size));
        std::vector<Comm::Item> items = {
            {"program", std::string(SAMBA_COMMIT) + " " + BUILD_NAME + " " + fingerprint_of_program, "build once and copy that file to every host"},
            {"model configuration", config_to_json(config).dump(), "copy that file to every host"}};
        const json given = options_to_json(app);
        for (const auto& [name, value] : given.items())
            if (name != "data" && name != "val" && name != "tokenizer" && name != "gpu" && name != "plans")
                items.push_back({"--" + name, value.get<std::string>(), "start all ranks with the same options"});
        std::string samples;
        for (const Shards* set : data->sets()) {
            samples += data_sample(*set) + " ";
            comm.tick();
        }
        items.push_back({"content of --data", samples, "copy the same shards to every host"});
        if (val) items.push_back({"content of --val", data_sample(*val), "copy the same shards to every host"});
        comm.agree(items);
    }
    // Names and lengths of the shards, and what a few samples all over them hold
    std::string data_sample(const Shards& shards) const {
        const int64_t T = std::min<int64_t>(o.seq_len, 1024), samples = shards.samples(T), count = std::min<int64_t>(samples, 64);
        std::vector<int> tokens(2 * T);
        uint64_t h = fnv1a64("", 0);
        for (int64_t i = 0; i < count; i++) {
            shards.read(i * samples / count, T, tokens.data(), tokens.data() + T);
            h = fnv1a64(tokens.data(), tokens.size() * sizeof(int), h);
        }
        return "shards " + std::to_string(shards_identity(shards.info(), fnv1a64("", 0))) + ", tokens " + std::to_string(h);
    }

    // The checkpoint directory to load before the first step; "" for none. Refuses to mix two runs in one directory.
    std::string start_point() const {
        if (!o.init_from.empty()) {
            const std::string dir = find_checkpoint(o.init_from);
            return dir;
        }
        const bool some = has_checkpoint(o.out);
        if (o.resuming) return !o.resume.empty() ? find_checkpoint(o.resume) : some ? find_checkpoint(o.out) : "";
        if (some) fail("--out %s already holds checkpoints; add --resume to continue that run, or choose another directory", o.out.c_str());
        return "";
    }

    void checkpoint() {
        const std::string dir = save_checkpoint(*m, *parallel, run, o, options, identity, fingerprint);
        log->write({{"type", "checkpoint"}, {"step", run.step}, {"dir", dir}});
        printf("checkpoint %s\n", dir.c_str());
        fflush(stdout);
    }

    // Goes through the last step again, which was skipped and left the weights as they were, and looks at every layer.
    std::string where_not_finite() {
        std::string own;
        loader->seek(run.sample - o.global_batch / o.sequence());
        for_micro_batches(*m, comm, *loader, o, accumulate, tbptt_state(), [&](int64_t) {
            if (!own.empty()) return;
            parallel->micro_batch(false);
            forward_backward_from(tbptt_state(), *m, (int)o.micro_batch, o.seq_len, 1.0f, true);
            own = first_not_finite(*m, (int)o.micro_batch, o.seq_len);
        });
        const std::vector<std::string> found = comm.all_texts(own);
        for (int r = 0; r < comm.world; r++)
            if (!found[r].empty()) return found[r] + (comm.world > 1 ? " on rank " + std::to_string(r) : "");
        return "the sum of all gradients";
    }

    void loop() {
        const double flops = flops_per_token(m->layout, o.seq_len), start = now_seconds();
        const int64_t start_step = run.step;
        int64_t saved_at = run.step, skips = 0;
        bool stop = false;
        const Comm::During during(comm, Guard::busy, "training");
        while (run.step < o.steps && !stop) {
            const double before = now_seconds(), lr = learning_rate(o, run.step + 1);
            const StepResult r = train_step(*m, *parallel, *loader, o, accumulate, tbptt_state(), run, lr);
            stop = r.stop;
            if (run.step == start_step + 1) printf("  the first step was done %.1f s after the launch\n", now_seconds() - launched);
            const double seconds = now_seconds() - before, tok_s = (double)o.global_batch / seconds;
            const double mfu = device.peak_bf16 > 0 ? tok_s * flops / device.peak_bf16 : 0;
            log->write({{"type", "train"}, {"step", run.step}, {"tokens", run.tokens}, {"loss", r.loss}, {"grad_norm", r.norm}, {"lr", lr},
                        {"ms", seconds * 1e3}, {"tok_s", tok_s}, {"mfu", mfu}, {"skipped", !r.applied}});
            const double eta = (now_seconds() - start) / (double)(run.step - start_step) * (double)(o.steps - run.step);
            if (run.step % o.log_every == 0 || run.step == o.steps || !r.applied) print_step(o, run, r, lr, seconds * 1e3, tok_s, mfu, eta);
            skips = r.applied ? 0 : skips + 1;
            run.skipped += !r.applied;
            if (skips >= o.max_skips && o.max_skips > 0)
                fail("%lld steps in a row had a gradient that is not finite (loss %f at step %lld), first %s; "
                     "lower --lr, or resume from an older checkpoint",
                     (long long)skips, r.loss, (long long)run.step, where_not_finite().c_str());
            if (validation && o.val_every > 0 && run.step % o.val_every == 0 && run.step < o.steps) validate_and_log(*validation, *log, run.step);
            if (o.checkpoint_every > 0 && run.step % o.checkpoint_every == 0 && run.step < o.steps) {
                checkpoint();
                saved_at = run.step;
            }
        }
        if (validation && run.step >= o.steps && run.step > start_step) validate_and_log(*validation, *log, run.step);
        if (run.step > saved_at && o.checkpoint_every >= 0) checkpoint();
        if (stop) printf("stopped by a signal after step %lld; continue with --resume\n", (long long)run.step);
        if (ON_GPU) printf("GPU memory in use: %s\n", human_bytes((double)device.total_bytes - (double)device_free_bytes()).c_str());
    }
};

inline void run_train(TrainOptions& o, CLI::App& app, Comm& comm) {
    catch_stop_signals();
    comm.start();
    comm.watch(o.rank_timeout, file_progress);
    if (!comm.main() && !freopen("/dev/null", "w", stdout)) fail("cannot open /dev/null");     // the main process speaks for all
    Trainer t(comm, o, app);
    try {
        o.resuming = app.get_option("--resume")->count() > 0;
        resolve(o, app, t.config, comm.world);
        t.set_up();
        t.loop();
        comm.finish();
    } catch (const std::exception& e) {
        if (comm.world > 1) comm.give_up(e.what());        // before t goes: it would wait for the others
        throw;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The other subcommands

struct InfoOptions {
    std::string model;
    int64_t micro_batch = 8, seq_len = 0, ranks = 1;
    bool device = false, json = false;
};

// "gpu NVIDIA H100 80GB HBM3" or "cpu CPU, 8 threads": what this build would run on, for scripts
inline void print_device() {
    select_gpu(0);
    printf("%s %s\n", ON_GPU ? "gpu" : "cpu", device_info().name.c_str());
}

inline void print_models() {
    printf("%-28s %15s  %-6s %7s %6s %9s %7s %7s\n", "model", "parameters", "blocks", "d_model", "d_ff", "heads", "window", "length");
    for (const NamedConfig& n : named_configs()) {
        const Config c = config_from_name(n.name);
        char heads[32] = "-";
        if (n.n_head) snprintf(heads, sizeof heads, "%d/%dx%d", n.n_head, n.n_kv_head, n.head_dim);
        printf("%-28s %15lld  %-6d %7d %6d %9s %7s %7d\n", n.name, (long long)Layout(c).parameters(), n.n_block, n.d_model, n.d_ff, heads,
               n.window ? std::to_string(n.window).c_str() : "-", n.seq_len);
    }
}

inline void run_info(const InfoOptions& o) {
    if (o.device) return print_device();
    if (o.model.empty()) return print_models();
    const Config c = load_config(o.model);
    if (o.json) {
        printf("%s\n", config_to_json(c).dump().c_str());
        return;
    }
    const Layout layout(c);
    const int64_t T = o.seq_len > 0 ? o.seq_len : c.seq_len, B = o.micro_batch;
    printf("%s: %lld parameters, blocks %s\n", c.name.c_str(), (long long)layout.parameters(), c.blocks.c_str());
    printf("  d_model %d, d_inner %d, d_state %d, dt_rank %d, d_ff %d, heads %d/%dx%d, window %lld, %s, vocabulary %d%s\n\n",
           c.d_model, c.d_inner(), c.d_state, c.dt_rank(), c.d_ff, c.n_head, c.n_kv_head, c.head_dim, (long long)c.window,
           c.rope ? "RoPE" : "NoPE", c.vocab_size, c.tied ? " (tied)" : "");
    std::map<std::string, int64_t> by_kind;
    for (const Layer& layer : layout.layers) by_kind[kind_name(layer.kind)]++;
    for (auto& [kind, count] : by_kind) printf("  %-10s %4lld layers\n", kind.c_str(), (long long)count);
    std::map<std::string, std::pair<int64_t, int64_t>> by_name;        // last two parts of the name -> count, elements
    for (const Tensor& t : layout.tensors) {
        std::string name = t.name;
        if (name.rfind("transformer.h.", 0) == 0) name = name.substr(name.find('.', 14) + 1);
        by_name[name].first++;
        by_name[name].second += t.size;
    }
    printf("\n  parameters\n");
    for (auto& [name, n] : by_name) printf("    %-28s x%-4lld %15lld\n", name.c_str(), (long long)n.first, (long long)n.second);
    printf("\n  memory at micro-batch %lld, %lld tokens a sequence (%s)\n", (long long)B, (long long)T, BUILD_NAME);
    printf("    parameters, gradients, moments   %s\n", human_bytes((double)parameter_bytes(layout, true)).c_str());
    if (o.ranks > 1) {
        const std::vector<int64_t> bounds = DataParallel::shards(layout, (int)o.ranks);
        const double all = (double)parameter_bytes(layout, true), part = (double)parameter_bytes(layout, true, {bounds[0], bounds[1]});
        printf("    the same on each of %-5lld ranks    %s with --zero 1 (%s without); of it gradients %s\n", (long long)o.ranks,
               human_bytes(part).c_str(), human_bytes(all).c_str(), human_bytes(4.0 * (double)layout.elements()).c_str());
    }
    for (Recompute level : {Recompute::none, Recompute::light, Recompute::full})
        printf("    activations, recompute %-6s    %s; in use altogether %s\n", recompute_name(level),
               human_bytes((double)activation_bytes(layout, B, T, true, level)).c_str(),
               human_bytes((double)memory_in_use(layout, B, T, level)).c_str());
    const int64_t fp8_bytes = memory_in_use(layout, B, T, Recompute::none, true) - memory_in_use(layout, B, T, Recompute::none);
    if (HAS_FP8) printf("    --matmul fp8                     %s more\n", human_bytes((double)fp8_bytes).c_str());
    printf("    sequence state of generation     %s\n", human_bytes((double)state_bytes(layout, 1, T)).c_str());
    printf("\n  training flops a token at length %lld: %s\n", (long long)T, human(flops_per_token(layout, T)).c_str());
}

// ---------------------------------------------------------------------------------------------------------------------

inline int run_main(int argc, char** argv, Comm& comm) {
    // `train` is what the program does; the word may be written or not
    std::vector<char*> args(argv, argv + argc);
    if (args.size() > 1 && std::string(args[1]) == "train") args.erase(args.begin() + 1);

    CLI::App app{"Trains Samba language models (Mamba + sliding-window attention) in pure C++/CUDA."};
    app.failure_message(CLI::FailureMessage::simple);
    TrainOptions train;
    add_train_options(app, train);

    EvalOptions eval;
    CLI::App* eval_app = add_eval(app, eval);

    ScoreOptions score;
    CLI::App* score_app = add_score(app, score);

    RetrieveOptions retrieve;
    CLI::App* retrieve_app = add_retrieve(app, retrieve);

    GenerateOptions generate;
    CLI::App* generate_app = add_generate(app, generate);

    BenchOptions bench;
    CLI::App* bench_app = add_bench(app, bench);

    InfoOptions info;
    CLI::App* info_app = app.add_subcommand("info", "What a model consists of and costs; without --model, the list of models");
    info_app->add_option("--model", info.model, "A named configuration or a .json file");
    add_count(*info_app, "--micro-batch", info.micro_batch, "Sequences in a pass");
    add_count(*info_app, "--seq-len", info.seq_len, "Tokens in a sequence; 0: the model's training length");
    add_count(*info_app, "--ranks", info.ranks, "Processes that share the optimizer's memory");
    info_app->add_flag("--json", info.json, "Only the model's configuration, as JSON");
    info_app->add_flag("--device", info.device, "Only name the device that this build runs on");
    app.require_subcommand(0, 1);

    try {
        app.parse((int)args.size(), args.data());
    } catch (const CLI::ParseError& e) {
        if (e.get_exit_code() == 0) return app.exit(e);
        fprintf(stderr, "error: %s; train_samba --help lists the options\n", e.what());
        return 1;
    }
    if (*eval_app) run_eval(eval);
    else if (*score_app) run_score(score);
    else if (*retrieve_app) run_retrieve(retrieve);
    else if (*generate_app) run_generate(generate);
    else if (*info_app) run_info(info);
    else if (*bench_app) run_bench(bench);
    else run_train(train, app, comm);
    return 0;
}

int main(int argc, char** argv) {
    Comm comm;
    try {
        return run_main(argc, argv, comm);
    } catch (const std::exception& e) {
        return comm.give_up(e.what());
    }
}
