// train_samba eval: loss and perplexity of a checkpoint at several context lengths.
#pragma once
#include "common.h"
#include "context.h"
#include "validation.h"

struct EvalOptions {
    std::string checkpoint;
    std::vector<std::string> data, val_lengths = {"1x", "2x", "3x", "4x"};
    int64_t batches = 10;
    ContextOptions context;
    int gpu = 0;
};

inline CLI::App* add_eval(CLI::App& app, EvalOptions& o) {
    CLI::App* command = app.add_subcommand("eval", "Loss and perplexity of a checkpoint at several context lengths");
    command->add_option("--checkpoint", o.checkpoint, "A checkpoint, or a run's directory")->required();
    command->add_option("--data", o.data, "Token shards")->required();
    command->add_option("--val-lengths", o.val_lengths, "Context lengths as multiples of --seq-len, as in training")
        ->delimiter(',')->capture_default_str();
    add_count(*command, "--batches", o.batches, "Batches to average over, with --val-lengths");
    ContextOptions& c = o.context;
    command->add_option("--lengths", c.lengths, "Instead: context lengths like 4k,8k,...,1m (k is 1024; ... doubles), each over the same tokens")
        ->delimiter(',');
    add_count(*command, "--tokens", c.tokens, "With --lengths: tokens to read at each length, at least one sequence of the greatest");
    add_count(*command, "--stride", c.stride, "With --lengths: windows that start every so many tokens, as in the paper (4096 there)");
    add_count(*command, "--windows", c.windows, "With --stride: at most this many windows of each length; 0: all");
    add_count(*command, "--last", c.last, "With --lengths: also the mean over this many last positions");
    command->add_option("--json", c.json, "With --lengths: write the results to this file (scripts/plot_context.py draws it)");
    add_count(*command, "--micro-batch", c.micro_batch, "Sequences at a time");
    add_count(*command, "--seq-len", c.seq_len, "Tokens in a chunk; 0: the training length");
    command->add_option("--gpu", o.gpu, "Index of the GPU to use")->capture_default_str();
    return command;
}

inline void run_eval(const EvalOptions& o) {
    const ContextOptions& context = o.context;
    if (context.micro_batch < 1 || context.seq_len < 0)
        fail("--micro-batch %lld, --seq-len %lld: at least 1 and 0", (long long)context.micro_batch, (long long)context.seq_len);
    select_gpu(o.gpu);
    const std::string dir = find_checkpoint(o.checkpoint);
    const int64_t T = context.seq_len > 0 ? context.seq_len : read_config(dir + "/model.safetensors").seq_len;
    auto m = load_for_inference(dir, context.micro_batch, T);
    const Shards shards(o.data, m->config().vocab_size);
    check_same_tokenizer(checkpoint_fingerprint(dir), "the checkpoint " + dir, shards.fingerprint(), shards.info()[0].path);
    if (!context.lengths.empty())
        return run_context(*m, shards, context, T,
                           {{"checkpoint", dir}, {"model", m->config().name}, {"parameters", m->layout.parameters()},
                            {"training_length", m->config().seq_len}, {"window", m->config().window}, {"data", o.data},
                            {"build", BUILD_NAME}, {"device", device_info().name}, {"commit", SAMBA_COMMIT}});
    const Comm alone;
    Validation validation(*m, alone, shards, length_multiples(o.val_lengths), context.micro_batch, T, o.batches);
    for (auto [length, loss] : validation.run())
        printf("length %lld | loss %.4f | perplexity %.3f\n", (long long)length, loss, std::exp(loss));
}
