// train_samba generate: continues one prompt or several together, or talks with its user line by line.
#pragma once
#include <unistd.h>

#include <chrono>
#include <fstream>
#include <iostream>
#include <iterator>

#include "../data/tokenizer.h"
#include "../kernels/decoder.cuh"
#include "common.h"

struct GenerateOptions {
    std::string checkpoint, prompt_file, tokenizer;
    std::vector<std::string> prompts, stops;
    bool lines = false, interactive = false;
    int64_t max_tokens = 200, top_k = 0, chunk = 2048;
    double temperature = 0.8, top_p = 1.0, penalty = 1.0;
    uint64_t seed = 1;
    int gpu = 0;
};

inline CLI::App* add_generate(CLI::App& app, GenerateOptions& o) {
    CLI::App* command = app.add_subcommand("generate", "Continue a prompt, or several together");
    command->add_option("--checkpoint", o.checkpoint, "A checkpoint, or a run's directory")->required();
    // one word each: a list in brackets is text like any other
    command->add_option("--prompt", o.prompts, "Text to continue; given several times, the texts are continued together")
        ->expected(1)->allow_extra_args(false)->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
    command->add_option("--prompt-file", o.prompt_file, "Take the prompt from this file; - is standard input");
    command->add_flag("--lines", o.lines, "Each line of --prompt-file is a prompt");
    command->add_flag("--interactive", o.interactive,
                      "Read prompts line by line from standard input; what was said before stays in the model's state");
    command->add_option("--tokenizer", o.tokenizer, "tokenizer.model; default: the checkpoint's own");
    add_count(*command, "--max-tokens", o.max_tokens, "Tokens to generate for a prompt at the most");
    command->add_option("--temperature", o.temperature, "Softmax temperature; 0: always the most likely token")
        ->check(CLI::NonNegativeNumber)->capture_default_str();
    add_count(*command, "--top-k", o.top_k, "Choose among the k most likely tokens; 0: all");
    command->add_option("--top-p", o.top_p, "Choose among the most likely tokens that reach this probability")
        ->check(CLI::Range(0.0, 1.0))->capture_default_str();
    command->add_option("--repetition-penalty", o.penalty,
                        "Positive logits of tokens that came before are divided by this, negative ones multiplied")
        ->check(CLI::PositiveNumber)->capture_default_str();
    command->add_option("--stop", o.stops, "End where this text appears, without it; may be given several times")
        ->expected(1)->allow_extra_args(false)->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
    command->add_option("--seed", o.seed, "Of the random draws; the n-th prompt of several draws with seed + n")->capture_default_str();
    add_count(*command, "--chunk", o.chunk, "Tokens of a prompt to read at a time");
    command->add_option("--gpu", o.gpu, "Index of the GPU to use")->capture_default_str();
    return command;
}

// The text of one continuation as its tokens come: whole characters, nothing past a stop string, and nothing yet that could
// turn out to be the beginning of one.
class Continuation {
public:
    Continuation(const std::string& tokenizer, const std::vector<std::string>& stops, int64_t max_tokens)
        : tokenizer(tokenizer), stops(stops), max_tokens(max_tokens) {}

    // What the prompt ends with decides whether a space at the front of the first piece is shown.
    void begin(const std::vector<int>& prompt) {
        tokenizer.decode_end();
        for (int id : prompt)
            if (id != tokenizer.eos()) tokenizer.decode_next(id);
        held.clear();
        done = false;
        count = 0;
    }
    // Text that can be shown now that this token is known
    std::string add(int id) {
        if (done) return "";
        if (id == tokenizer.eos()) return finish();
        held += tokenizer.decode_next(id);
        if (cut_at_stop()) return finish();
        if (++count >= max_tokens) return finish();
        size_t keep = 0;                                  // the longest end that begins a stop string
        for (const std::string& stop : stops)
            for (size_t n = std::min(held.size(), stop.size() - 1); n > keep; n--)
                if (held.compare(held.size() - n, n, stop, 0, n) == 0) keep = n;
        std::string text = held.substr(0, held.size() - keep);
        held.erase(0, held.size() - keep);
        return text;
    }
    bool done = false;
    int64_t count = 0;                                    // tokens
    Tokenizer tokenizer;

private:
    bool cut_at_stop() {
        size_t first = std::string::npos;
        for (const std::string& stop : stops) first = std::min(first, held.find(stop));
        if (first == std::string::npos) return false;
        held.erase(first);
        tokenizer.decode_end();                           // bytes of a character after the stop string
        return true;
    }
    std::string finish() {
        done = true;
        held += tokenizer.decode_end();
        cut_at_stop();
        std::string text;
        text.swap(held);
        return text;
    }
    const std::vector<std::string>& stops;
    int64_t max_tokens;
    std::string held;
};

inline void show(const std::string& text) {
    fwrite(text.data(), 1, text.size(), stdout);
    fflush(stdout);
}

// Several continuations are shown one after the other: the first that is not complete as it comes, the later ones wait.
class Screen {
public:
    explicit Screen(const std::vector<std::string>& prompts) : waiting(prompts), complete(prompts.size()) {
        if (waiting.size() > 1)
            for (size_t b = 0; b < waiting.size(); b++)
                waiting[b] = (b ? "\n" : "") + std::string("--- ") + std::to_string(b + 1) + "\n" + waiting[b];
    }
    void add(size_t b, const std::string& text, bool done) {
        waiting[b] += text;
        if (done && !complete[b]) waiting[b] += "\n", complete[b] = true;
        while (current < waiting.size()) {
            if (!waiting[current].empty()) show(waiting[current]);
            waiting[current].clear();
            if (!complete[current]) break;
            current++;
        }
    }

private:
    std::vector<std::string> waiting;
    std::vector<bool> complete;
    size_t current = 0;
};

inline std::string read_all(const std::string& path) {
    if (path != "-") return std::string(MappedFile(path).text());
    return std::string(std::istreambuf_iterator<char>(std::cin), {});
}

inline std::vector<std::string> all_prompts(const GenerateOptions& o) {
    std::vector<std::string> prompts = o.prompts;
    if (o.lines && o.prompt_file.empty()) fail("--lines needs --prompt-file");
    if (o.interactive && (!prompts.empty() || !o.prompt_file.empty()))
        fail("--interactive reads its prompts from standard input: leave --prompt and --prompt-file out");
    if (!o.prompt_file.empty()) {
        const std::string text = read_all(o.prompt_file);
        if (!o.lines) prompts.push_back(text);
        std::istringstream stream(text);
        for (std::string line; o.lines && std::getline(stream, line);) prompts.push_back(line);
        if (prompts.empty()) fail("--prompt-file %s: there is no line in it", o.prompt_file.c_str());
    }
    if (prompts.empty()) prompts.push_back("");
    if (prompts.size() > (size_t)Decoder::MAX_BATCH) fail("%zu prompts: up to %d can be continued together", prompts.size(), Decoder::MAX_BATCH);
    return prompts;
}

// Seconds since construction
struct Clock {
    std::chrono::steady_clock::time_point start = std::chrono::steady_clock::now();
    double seconds() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); }
};

struct Speed {
    int64_t read = 0, written = 0;
    double read_seconds = 0, written_seconds = 0;
    void report(size_t batch) const {
        fprintf(stderr, "read %lld tokens in %.3f s (%.0f tok/s), wrote %lld in %.3f s (%.0f tok/s, batch %zu)\n",
                (long long)read, read_seconds, (double)read / std::max(read_seconds, 1e-9),
                (long long)written, written_seconds, (double)written / std::max(written_seconds, 1e-9), batch);
    }
};

// Tokens of a text; a new document begins after an EOS where the tokenizer has one and the text has no token
inline std::vector<int> prompt_tokens(const Tokenizer& tokenizer, const std::string& text, int V) {
    std::vector<int> ids = tokenizer.encode(text);
    if (ids.empty()) ids.push_back(std::max(0, tokenizer.eos()));
    for (int id : ids)
        if (id < 0 || id >= V)
            fail("the tokenizer gave token %d and the model's vocabulary has %d; use the tokenizer that the data was prepared with", id, V);
    return ids;
}

// Writes until every continuation is complete, with up to `ahead` steps launched before the oldest is read. Returns the last
// tokens, which no step has read.
template <class Show>
inline std::vector<int> write_out(Decoder& decoder, std::vector<std::unique_ptr<Continuation>>& texts, int ahead, Speed& speed, Show shown) {
    const Clock clock;
    std::vector<int> ids;
    decoder.start();
    for (;;) {
        while (decoder.ahead() < 1 + ahead) decoder.step();
        ids = decoder.read();
        bool all = true;
        for (size_t b = 0; b < texts.size(); b++) {
            if (texts[b]->done) continue;
            const std::string text = texts[b]->add(ids[b]);
            speed.written++;
            shown(b, text, texts[b]->done);
            all = all && texts[b]->done;
        }
        if (all) break;
    }
    while (decoder.ahead() > 0) decoder.read();
    speed.written_seconds += clock.seconds();
    return ids;
}

inline void continue_prompts(const GenerateOptions& o, const std::string& dir, const std::string& tokenizer_path, const SampleOptions& sampling) {
    const std::vector<std::string> prompts = all_prompts(o);
    const int V = read_config(dir + "/model.safetensors").vocab_size;
    std::vector<std::unique_ptr<Continuation>> texts;
    std::vector<std::vector<int>> tokens;
    int64_t longest = 0;
    for (const std::string& prompt : prompts) {
        texts.push_back(std::make_unique<Continuation>(tokenizer_path, o.stops, o.max_tokens));
        tokens.push_back(prompt_tokens(texts.back()->tokenizer, prompt, V));
        texts.back()->begin(tokens.back());
        longest = std::max<int64_t>(longest, (int64_t)tokens.back().size());
    }
    auto m = load_for_inference(dir, 1, std::min(longest, o.chunk));
    constexpr int AHEAD = 3;
    Decoder decoder(*m, (int)prompts.size(), sampling, o.seed, std::min(V, texts[0]->tokenizer.vocab_size()), longest + o.max_tokens + AHEAD);
    Speed speed;
    const Clock clock;
    for (size_t b = 0; b < prompts.size(); b++) decoder.prefill((int)b, tokens[b]), speed.read += (int64_t)tokens[b].size();
    speed.read_seconds = clock.seconds();
    Screen screen(prompts);
    screen.add(0, "", false);
    write_out(decoder, texts, AHEAD, speed, [&](size_t b, const std::string& text, bool done) { screen.add(b, text, done); });
    speed.report(prompts.size());
}

// Every line continues where the last answer ended. No step runs ahead: the state has seen exactly what was shown, and the end
// of what was drawn with it.
inline void converse(const GenerateOptions& o, const std::string& dir, const std::string& tokenizer_path, const SampleOptions& sampling) {
    auto m = load_for_inference(dir, 1, std::min<int64_t>(o.chunk, 512));
    std::vector<std::unique_ptr<Continuation>> texts;
    texts.push_back(std::make_unique<Continuation>(tokenizer_path, o.stops, o.max_tokens));
    const Tokenizer& tokenizer = texts[0]->tokenizer;
    Decoder decoder(*m, 1, sampling, o.seed, std::min(m->config().vocab_size, tokenizer.vocab_size()));
    Speed speed;
    int last = -1;                                        // drawn, and not yet seen by the model
    const bool person = isatty(0);
    if (person) fprintf(stderr, "a line is a prompt; end with Ctrl-D\n");
    const auto next_line = [&](std::string& line) {
        if (person) fprintf(stderr, "> ");
        return (bool)std::getline(std::cin, line);
    };
    for (std::string line; next_line(line);) {
        std::vector<int> ids = prompt_tokens(tokenizer, (last < 0 ? "" : "\n") + line, m->config().vocab_size);
        texts[0]->begin(ids);
        if (last >= 0) ids.insert(ids.begin(), last);
        const Clock clock;
        decoder.prefill(0, ids);
        speed.read += (int64_t)ids.size();
        speed.read_seconds += clock.seconds();
        last = write_out(decoder, texts, 0, speed, [](size_t, const std::string& text, bool) { show(text); })[0];
        show("\n");
    }
    speed.report(1);
}

inline void run_generate(const GenerateOptions& o) {
    select_gpu(o.gpu);
    if (o.max_tokens < 1) fail("--max-tokens %lld: must be at least 1", (long long)o.max_tokens);
    if (o.chunk < 1) fail("--chunk %lld: must be at least 1", (long long)o.chunk);
    if (o.top_k < 0) fail("--top-k %lld: must be at least 1, or 0 for all", (long long)o.top_k);
    for (const std::string& stop : o.stops)
        if (stop.empty()) fail("--stop: an empty text would end before the first token");
    const std::string dir = find_checkpoint(o.checkpoint), tokenizer = !o.tokenizer.empty() ? o.tokenizer : dir + "/tokenizer.model";
    const SampleOptions sampling{(float)o.temperature, (int)std::min<int64_t>(o.top_k, 1 << 30), (float)o.top_p, (float)o.penalty};
    if (o.interactive) {
        all_prompts(o);
        converse(o, dir, tokenizer, sampling);
    } else {
        continue_prompts(o, dir, tokenizer, sampling);
    }
}
