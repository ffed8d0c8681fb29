// train_samba eval: loss and perplexity of a checkpoint at several context lengths.
#pragma once
#include "common.h"
#include "validation.h"

struct EvalOptions {
    std::string checkpoint;
    std::vector<std::string> data, val_lengths = {"1x", "2x", "3x", "4x"};
    int64_t micro_batch = 4, seq_len = 0, batches = 10;
    int gpu = 0;
};

inline CLI::App* add_eval(CLI::App& app, EvalOptions& o) {
    CLI::App* command = app.add_subcommand("eval", "Loss and perplexity of a checkpoint at several context lengths");
    command->add_option("--checkpoint", o.checkpoint, "A checkpoint, or a run's directory")->required();
    command->add_option("--data", o.data, "Token shards")->required();
    command->add_option("--val-lengths", o.val_lengths, "Context lengths as multiples of --seq-len")->delimiter(',')->capture_default_str();
    add_count(*command, "--micro-batch", o.micro_batch, "Sequences at a time");
    add_count(*command, "--seq-len", o.seq_len, "Tokens in a chunk; 0: the training length");
    add_count(*command, "--batches", o.batches, "Batches to average over");
    command->add_option("--gpu", o.gpu, "Index of the GPU to use")->capture_default_str();
    return command;
}

inline void run_eval(const EvalOptions& o) {
    select_gpu(o.gpu);
    const std::string dir = find_checkpoint(o.checkpoint);
    const int64_t T = o.seq_len > 0 ? o.seq_len : read_config(dir + "/model.safetensors").seq_len;
    auto m = load_for_inference(dir, o.micro_batch, T);
    const Shards shards(o.data, m->config().vocab_size);
    check_same_tokenizer(checkpoint_fingerprint(dir), "the checkpoint " + dir, shards.fingerprint(), shards.info()[0].path);
    const Comm alone;
    Validation validation(*m, alone, shards, length_multiples(o.val_lengths), o.micro_batch, T, o.batches);
    for (auto [length, loss] : validation.run()) printf("length %lld | loss %.4f | perplexity %.3f\n", (long long)length, loss, std::exp(loss));
}
