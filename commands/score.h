// train_samba score: log-likelihoods for evaluation harnesses. Requests are JSON lines, answers too, in the same order:
//
//   {"context": "The sky is", "continuation": " blue"}           or {"context_tokens": [1, 2], "continuation_tokens": [3]}; "id" is handed on
//   {"id": null, "logprob": -1.25, "greedy": true, "context_tokens": 3, "tokens": 1}
//
// logprob is the sum over the continuation's tokens, in nats; greedy says whether greedy decoding would have written it. Context and
// continuation are tokenised as one text and cut where the context's own tokens end, as lm-evaluation-harness does. An empty context
// is the beginning of a document. A blank line asks for the answers to everything before it, so that one process can serve many
// rounds. Contexts may be of any length: they are read in chunks.
#pragma once
#include <fstream>
#include <iostream>
#include <numeric>

#include "../data/run_log.h"
#include "../data/tokenizer.h"
#include "common.h"
#include "long_reader.h"

struct ScoreOptions : ReadingOptions {
    std::string requests = "-", out = "-", tokenizer;
    ScoreOptions() : ReadingOptions{"", 16, 1024} {}
};

inline CLI::App* add_score(CLI::App& app, ScoreOptions& o) {
    CLI::App* command = app.add_subcommand("score", "Log-likelihoods of continuations, for evaluation harnesses: JSON lines in and out");
    add_reading_options(*command, o, "Requests");
    command->add_option("--requests", o.requests, "File of JSON lines with context and continuation; -: standard input")->capture_default_str();
    command->add_option("--out", o.out, "File for the answers; -: standard output")->capture_default_str();
    command->add_option("--tokenizer", o.tokenizer, "tokenizer.model; default: the checkpoint's own");
    return command;
}

struct ScoreRequest {
    nlohmann::ordered_json id;
    std::vector<int> tokens;               // context, then continuation
    int64_t context = 0;
    double logprob = 0;
    bool greedy = true;

    int64_t length() const { return (int64_t)tokens.size() - 1; }     // of what is read: the last token is only a target
    nlohmann::ordered_json answer() const {
        return {{"id", id}, {"logprob", logprob}, {"greedy", greedy}, {"context_tokens", context}, {"tokens", (int64_t)tokens.size() - context}};
    }
};

// Turns lines into tokens. The tokenizer is opened when the first text comes: requests of tokens need none.
class RequestParser {
public:
    RequestParser(std::string source, std::string tokenizer, int vocab_size)
        : source_(std::move(source)), path_(std::move(tokenizer)), vocab_size_(vocab_size) {}

    ScoreRequest parse(const std::string& line, int64_t number) {
        const nlohmann::ordered_json j = nlohmann::ordered_json::parse(line, nullptr, false);
        if (!j.is_object()) fail("%s, line %lld: not a JSON object: %s", source_.c_str(), (long long)number, printable(line, 60).c_str());
        ScoreRequest r;
        r.id = j.value("id", nlohmann::ordered_json());
        try {
            if (j.contains("continuation_tokens"))
                take_tokens(r, j.value("context_tokens", std::vector<int>()), j["continuation_tokens"].get<std::vector<int>>());
            else take_text(r, j.value("context", ""), j.at("continuation").get<std::string>());
        } catch (const nlohmann::json::exception&) {
            fail("%s, line %lld: needs \"context\" and \"continuation\" as text, or \"context_tokens\" and \"continuation_tokens\" as numbers",
                 source_.c_str(), (long long)number);
        }
        for (int id : r.tokens)
            if (id < 0 || id >= vocab_size_)
                fail("%s, line %lld: token %d is outside the model's vocabulary of %d", source_.c_str(), (long long)number, id, vocab_size_);
        return r;
    }

private:
    void take_tokens(ScoreRequest& r, std::vector<int> context, const std::vector<int>& continuation) {
        if (context.empty()) context.push_back(beginning());
        r.context = (int64_t)context.size();
        r.tokens = std::move(context);
        r.tokens.insert(r.tokens.end(), continuation.begin(), continuation.end());
    }
    // Spaces at the context's end belong to the continuation's first token.
    void take_text(ScoreRequest& r, std::string context, std::string continuation) {
        const size_t end = context.find_last_not_of(" \t\n\r\f\v") + 1;
        continuation = context.substr(end) + continuation;
        context.resize(end);
        const std::vector<int> first = tokenizer().encode(context), whole = tokenizer().encode(context + continuation);
        const bool cut = whole.size() > first.size() || continuation.empty();              // else both have merged into one token
        take_tokens(r, first, cut ? std::vector<int>(whole.begin() + (ptrdiff_t)first.size(), whole.end()) : tokenizer().encode(continuation));
    }
    int beginning() {
        if (eos_ < 0) eos_ = tokenizer().eos() >= 0 ? tokenizer().eos() : tokenizer().bos();
        if (eos_ < 0) fail("%s knows no token that begins a document; give every request a context", path_.c_str());
        return eos_;
    }
    Tokenizer& tokenizer() {
        if (!tokenizer_) tokenizer_ = std::make_unique<Tokenizer>(path_);
        return *tokenizer_;
    }
    std::string source_, path_;
    int vocab_size_, eos_ = -1;
    std::unique_ptr<Tokenizer> tokenizer_;
};

// Answers requests a batch at a time, those of similar length together.
class Scorer {
public:
    Scorer(Model& m, int64_t B, int64_t T) : m_(m), B_(B), T_(T) {
        for (const Layer& layer : m.layout.layers) full_attention_ = full_attention_ || (layer.kind == Kind::attention && layer.window == 0);
    }

    void answer(std::vector<ScoreRequest>& requests) {
        std::vector<size_t> order(requests.size());
        std::iota(order.begin(), order.end(), (size_t)0);
        std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return requests[a].length() > requests[b].length(); });
        if (order.empty()) return;
        make_room(requests[order[0]].length());
        ProgressBar bar("requests", (double)order.size());
        for (size_t at = 0; at < order.size(); at += (size_t)B_) {
            std::vector<ScoreRequest*> rows;
            for (size_t i = at; i < std::min(order.size(), at + (size_t)B_); i++) rows.push_back(&requests[order[i]]);
            answer_batch(rows);
            bar.add((double)rows.size());
        }
    }

private:
    // Memory does not depend on the length, but for full attention
    void make_room(int64_t length) {
        if (reader_ && (!full_attention_ || length <= room_)) return;
        room_ = length;
        reader_.reset();
        reader_ = std::make_unique<LongReader>(m_, B_, T_, full_attention_ ? std::max<int64_t>(length, 1) : INT64_MAX);
    }

    // Rows end at different places: behind its end a row reads zeros, which nothing before them sees.
    void answer_batch(const std::vector<ScoreRequest*>& rows) {
        const auto fetch = [&](int64_t first, int64_t n, int* tokens, int* targets) {
            for (int64_t i = 0; i < (int64_t)rows.size() * n; i++) {
                const ScoreRequest& r = *rows[(size_t)(i / n)];
                const int64_t p = first + i % n;
                tokens[i] = p < r.length() ? r.tokens[(size_t)p] : 0;
                targets[i] = p < r.length() ? r.tokens[(size_t)p + 1] : 0;
            }
        };
        const auto see = [&](int64_t first, int64_t n, const float* losses, const uint8_t* greedy) {
            for (int64_t i = 0; i < (int64_t)rows.size() * n; i++) {
                ScoreRequest& r = *rows[(size_t)(i / n)];
                const int64_t p = first + i % n;
                if (p + 1 < r.context || p >= r.length()) continue;
                r.logprob -= losses[i];
                r.greedy = r.greedy && greedy[i];
            }
        };
        reader_->read((int64_t)rows.size(), rows[0]->length(), fetch, see);
        for (const ScoreRequest* r : rows)
            if (!std::isfinite(r->logprob)) fail("a log-likelihood is not finite; this model is broken, use an older checkpoint");
    }

    Model& m_;
    const int64_t B_, T_;
    bool full_attention_ = false;
    int64_t room_ = 0;
    std::unique_ptr<LongReader> reader_;
};

inline void run_score(const ScoreOptions& o) {
    constexpr size_t ROUND = 4096;         // requests that are sorted by length together
    if (o.micro_batch < 1 || o.seq_len < 1)
        fail("--micro-batch %lld, --seq-len %lld: must be at least 1", (long long)o.micro_batch, (long long)o.seq_len);
    select_gpu(o.gpu);
    std::ifstream file;
    if (o.requests != "-") file.open(o.requests);
    if (o.requests != "-" && !file) fail("cannot open --requests %s: %s", o.requests.c_str(), strerror(errno));
    std::istream& in = o.requests == "-" ? std::cin : file;
    FILE* out = o.out == "-" ? stdout : fopen(o.out.c_str(), "w");
    if (!out) fail("cannot write --out %s: %s", o.out.c_str(), strerror(errno));
    const std::string dir = find_checkpoint(o.checkpoint), source = o.requests == "-" ? "standard input" : o.requests;
    auto m = load_for_inference(dir, o.micro_batch, o.seq_len);
    RequestParser parser(source, !o.tokenizer.empty() ? o.tokenizer : dir + "/tokenizer.model", m->config().vocab_size);
    Scorer scorer(*m, o.micro_batch, o.seq_len);
    std::vector<ScoreRequest> round;
    const auto flush = [&] {
        scorer.answer(round);
        for (const ScoreRequest& r : round) fprintf(out, "%s\n", r.answer().dump().c_str());
        if (fflush(out) != 0 || ferror(out)) fail("cannot write %s: %s", o.out.c_str(), strerror(errno));
        round.clear();
    };
    int64_t number = 0;
    for (std::string line; std::getline(in, line);) {
        number++;
        const bool blank = line.find_first_not_of(" \t\r") == std::string::npos;
        if (!blank) round.push_back(parser.parse(line, number));
        if (blank || round.size() == ROUND) flush();
    }
    if (in.bad()) fail("cannot read %s: %s", source.c_str(), strerror(errno));
    flush();
    if (out != stdout && fclose(out) != 0) fail("cannot write %s: %s", o.out.c_str(), strerror(errno));
}
