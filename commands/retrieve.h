// train_samba retrieve: what a checkpoint answers to prompts that hide the answer far back (passkey, phone book). The prompts
// come from data/retrieval.py. Each is read in chunks with the state carried along, then the answer is decoded greedily, a
// token at a time, and compared token by token: it is right if all of it is.
#pragma once
#include "../data/run_log.h"
#include "../data/shards.h"
#include "common.h"

struct RetrieveOptions : ReadingOptions {
    std::string prompts, out;
    RetrieveOptions() : ReadingOptions{"", 8, 0} {}
};

inline CLI::App* add_retrieve(CLI::App& app, RetrieveOptions& o) {
    CLI::App* command = app.add_subcommand("retrieve", "Answers to prompts that hide them far back: passkey and phone book");
    add_reading_options(*command, o, "Prompts");
    command->add_option("--prompts", o.prompts, "Folder that python -m data.retrieval TASK prompts wrote")->required();
    command->add_option("--out", o.out, "JSON file for the answers; default: only the summary on the screen");
    return command;
}

// Rows of one length, a prompt and its answer each.
struct PromptFile {
    std::string name;
    Shards rows;                           // sample k at T = length is row k
    int64_t length;
    nlohmann::ordered_json labels;         // of each row; "answer" is how many tokens at its end are the answer

    int64_t count() const { return (int64_t)labels.size(); }
    int64_t answer(int64_t row) const { return labels[(size_t)row]["answer"].get<int64_t>(); }
};

inline PromptFile open_prompts(const std::string& folder, const nlohmann::ordered_json& entry, int vocab_size) {
    const std::string name = entry.at("file"), path = folder + "/" + name;
    PromptFile file{name, Shards({path}, vocab_size), entry.at("length"), entry.at("rows")};
    if (file.length < 2)
        fail("%s: rows of %lld tokens; at least a token of prompt and one of answer are needed", path.c_str(), (long long)file.length);
    if (file.rows.samples(file.length) != file.count())
        fail("%s holds %lld rows of %lld tokens and prompts.json has %lld; make the prompts again", path.c_str(),
             (long long)file.rows.samples(file.length), (long long)file.length, (long long)file.count());
    for (const auto& label : file.labels)
        if (const int64_t answer = label.at("answer"); answer < 1 || answer >= file.length)
            fail("%s: an answer of %lld tokens in a row of %lld; make the prompts again", path.c_str(), (long long)answer, (long long)file.length);
    return file;
}

// Greedy answers of one model to rows of one length, B at a time.
struct Retriever {
    Model& m;
    const int64_t B, chunk;
    SequenceState state;
    std::vector<int> tokens, ignored;      // (B,L), (L)
    std::vector<int> piece;                // (B,chunk) of them
    std::vector<float> logits;             // (B,V)

    Retriever(Model& m, int64_t B, int64_t chunk, int64_t longest) : m(m), B(B), chunk(chunk), piece(B * chunk), logits(B * m.config().vocab_size) {
        state.create(m.layout, B, longest, m.stream);
    }

    // Tokens [from, from + T) of all rows; leaves the logits of what comes next, (B,V)
    void read(int64_t L, int64_t from, int64_t T) {
        for (int64_t b = 0; b < B; b++) std::copy_n(tokens.data() + b * L + from, T, piece.data() + b * T);
        upload_tokens(m, piece.data(), nullptr, B * T);
        forward_layers(m, (int)B, T, &state);
    }

    int most_likely(int64_t b) const {
        const int V = m.config().vocab_size;
        const float* row = logits.data() + b * V;
        return (int)(std::max_element(row, row + V) - row);
    }

    // What the model says in place of the answers of rows first, first + 1, …, at most B of them
    std::vector<std::vector<int>> answer(const PromptFile& file, int64_t first) {
        const int64_t L = file.length, rows = std::min(B, file.count() - first);
        tokens.resize(B * L);
        ignored.resize(L);
        int64_t longest = 0;
        for (int64_t b = 0; b < B; b++) {                            // places to spare read the last row again
            file.rows.read(first + std::min(b, rows - 1), L, tokens.data() + b * L, ignored.data());
            longest = std::max(longest, file.answer(first + std::min(b, rows - 1)));
        }
        state.reset(m.layout, m.stream);
        int64_t last_T = 0;
        for (int64_t at = 0; at < L - longest; at += last_T) read(L, at, last_T = std::min(chunk, L - longest - at));
        std::vector<std::vector<int>> answers(rows);
        for (int64_t t = L - longest; t < L; t++) {
            read_logits(m, logits.data(), last_T - 1, B, last_T);
            for (int64_t b = 0; b < rows; b++) {
                if (t < L - file.answer(first + b)) continue;        // still this row's prompt
                tokens[b * L + t] = most_likely(b);                  // goes on from its own answer, right or wrong
                answers[b].push_back(tokens[b * L + t]);
            }
            if (t + 1 < L) read(L, t, last_T = 1);
        }
        return answers;
    }
};

// Answers to all rows of a file beside what was expected, and a line on the screen.
inline nlohmann::ordered_json retrieve_file(Retriever& retriever, const PromptFile& file) {
    nlohmann::ordered_json results = nlohmann::ordered_json::array();
    std::vector<int> row(file.length), next(file.length);
    int64_t right = 0, tokens = 0, right_tokens = 0;
    ProgressBar bar(file.name, (double)file.count());
    const double begin = now_seconds();
    for (int64_t first = 0; first < file.count(); first += retriever.B) {
        const std::vector<std::vector<int>> answers = retriever.answer(file, first);
        for (size_t b = 0; b < answers.size(); b++) {
            const int64_t k = first + (int64_t)b;
            file.rows.read(k, file.length, row.data(), next.data());
            const std::vector<int> expected(row.end() - file.answer(k), row.end());
            for (size_t i = 0; i < expected.size(); i++) right_tokens += answers[b][i] == expected[i];
            tokens += (int64_t)expected.size();
            right += answers[b] == expected;
            nlohmann::ordered_json result = file.labels[(size_t)k];
            result.update({{"expected", expected}, {"answered", answers[b]}, {"correct", answers[b] == expected}});
            results.push_back(std::move(result));
        }
        bar.add((double)answers.size());
    }
    const double seconds = now_seconds() - begin;
    printf("%-24s | %8lld tokens | %4lld prompts | right %6.2f%% | answer tokens right %6.2f%% | %s tok/s\n", file.name.c_str(),
           (long long)file.length, (long long)file.count(), 100.0 * (double)right / (double)file.count(),
           100.0 * (double)right_tokens / (double)tokens, human((double)(file.count() * file.length) / seconds).c_str());
    fflush(stdout);
    return {{"file", file.name}, {"length", file.length}, {"accuracy", (double)right / (double)file.count()},
            {"token_accuracy", (double)right_tokens / (double)tokens}, {"seconds", seconds}, {"rows", results}};
}

inline void run_retrieve(const RetrieveOptions& o) {
    if (o.micro_batch < 1) fail("--micro-batch %lld: must be at least 1", (long long)o.micro_batch);
    if (o.seq_len < 0) fail("--seq-len %lld: must be at least 1", (long long)o.seq_len);
    const std::string dir = find_checkpoint(o.checkpoint), path = o.prompts + "/prompts.json";
    const Config config = read_config(dir + "/model.safetensors");
    const auto manifest = nlohmann::ordered_json::parse(MappedFile(path).text(), nullptr, false);
    std::vector<PromptFile> files;
    nlohmann::ordered_json report;
    try {
        report = {{"task", manifest.at("task")}, {"vocabulary", manifest.at("vocabulary")}, {"checkpoint", o.checkpoint}, {"model", config.name},
                  {"blocks", config.blocks}, {"window", config.window}, {"parameters", Layout(config).parameters()},
                  {"trained_length", config.seq_len}, {"build", BUILD_NAME}};
        for (const auto& entry : manifest.at("files")) files.push_back(open_prompts(o.prompts, entry, config.vocab_size));
    } catch (const nlohmann::json::exception& e) {
        fail("%s: not a list of prompts (%s); make it with python -m data.retrieval", path.c_str(), e.what());
    }
    if (files.empty()) fail("%s names no files; make it with python -m data.retrieval", path.c_str());
    int64_t longest = 0;
    for (const PromptFile& file : files) {
        check_same_tokenizer(checkpoint_fingerprint(dir), "the checkpoint " + dir, file.rows.fingerprint(), file.name);
        longest = std::max(longest, file.length);
    }
    select_gpu(o.gpu);
    const int64_t chunk = std::min(longest, o.seq_len > 0 ? o.seq_len : config.seq_len);
    auto m = load_for_inference(dir, o.micro_batch, chunk);
    report["step"] = read_state(dir).value("step", 0);
    report["device"] = device_info().name;
    Retriever retriever(*m, o.micro_batch, chunk, longest);
    for (const PromptFile& file : files) report["files"].push_back(retrieve_file(retriever, file));
    if (!o.out.empty()) write_file_durably(o.out, report.dump(1) + "\n");
}
