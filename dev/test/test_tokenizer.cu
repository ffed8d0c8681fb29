// The tokenizer, on small SentencePiece models trained here: round trips, and streaming that equals decoding the whole.
#include "../../data/tokenizer.h"
#include "test_files.h"
#include "test_util.h"

#ifdef SAMBA_NO_SENTENCEPIECE

TEST(Tokenizer, MissingLibraryIsNamed) { EXPECT_ERROR(Tokenizer("x.model"), "no SentencePiece; install it"); }

#else
#include <sentencepiece_trainer.h>

namespace {

// Trains a model once per set of options and process
const std::string& trained(const std::string& options) {
    static TempFolder folder;
    static std::map<std::string, std::string> models;
    auto& path = models[options];
    if (!path.empty()) return path;
    const std::string corpus = folder.path("corpus.txt"), prefix = folder.path("model" + std::to_string(models.size()));
    std::string text;
    const char* words[] = {"the", "samba", "is", "a", "dance", "of", "two", "layers", "state", "space", "and", "window", "attention",
                           "mixes", "well", "naïve", "café"};
    for (int line = 0; line < 400; line++) {
        for (int i = 0; i < 12; i++) text += std::string(words[(line * 7 + i * i * 3 + line * i) % 17]) + " ";
        text += std::to_string(line * line) + "\n";
    }
    write_text(corpus, text);
    const auto status = sentencepiece::SentencePieceTrainer::Train("--input=" + corpus + " --model_prefix=" + prefix + " --minloglevel=2 " + options);
    if (!status.ok()) fail("training failed: %s", status.ToString().c_str());
    return path = prefix + ".model";
}
// As Llama 2's: BPE, bytes for unknown characters, spaces kept
const char* LLAMA = "--model_type=bpe --vocab_size=420 --byte_fallback=true --normalization_rule_name=identity "
                    "--remove_extra_whitespaces=false --split_digits=true --allow_whitespace_only_pieces=true";
const char* UNIGRAM = "--model_type=unigram --vocab_size=360 --byte_fallback=true";                    // normalises, strips spaces
const char* NO_BYTES = "--model_type=bpe --vocab_size=150 --add_dummy_prefix=false --eos_id=-1";

std::string streamed(Tokenizer& tokenizer, const std::vector<int>& ids) {
    std::string text;
    for (int id : ids) text += tokenizer.decode_next(id);
    return text + tokenizer.decode_end();
}
const std::vector<std::string> TEXTS = {
    "the samba is a dance", " leading space", "  two  spaces  ", "naïve café", "日本語のテキスト", "emoji 🎉🎊 and é",
    "line\nbreak\ttab", "12345 67", "", " ", "a", "🎉", "�", std::string("nul\0byte", 8),
    "ä ö ü ß € 한국어 \xF0\x9F\x91\xA9\xE2\x80\x8D\xF0\x9F\x9A\x80"};

} // namespace

TEST(Tokenizer, RoundTrip) {
    Tokenizer tokenizer(trained(LLAMA));
    EXPECT_EQ(tokenizer.vocab_size(), 420);
    EXPECT_EQ(tokenizer.eos(), 2);
    EXPECT_EQ(tokenizer.bos(), 1);
    for (const std::string& text : TEXTS) {
        const auto ids = tokenizer.encode(text);
        for (int id : ids) EXPECT_TRUE(id >= 3 && id < 420) << id;                        // no BOS, no EOS, nothing unknown
        EXPECT_EQ(tokenizer.decode(ids), text);
    }
    EXPECT_GT(tokenizer.encode("samba").size(), 0u);
    EXPECT_LT(tokenizer.encode("the samba is").size(), 8u);                               // pieces, not bytes
    EXPECT_EQ(Tokenizer(trained(NO_BYTES)).eos(), -1);
}

TEST(Tokenizer, StreamingEqualsWhole) {
    for (const char* options : {LLAMA, UNIGRAM, NO_BYTES}) {
        Tokenizer tokenizer(trained(options));
        for (const std::string& text : TEXTS) {
            const auto ids = tokenizer.encode(text);
            EXPECT_EQ(streamed(tokenizer, ids), tokenizer.decode(ids)) << options << ": " << text;
        }
    }
}

// Random tokens, as an untrained model makes them: control pieces, unknowns, broken bytes
TEST(Tokenizer, StreamingEqualsWholeOnRandomTokens) {
    uint64_t state = 1;
    const auto random = [&] { return (int)((state = state * 6364136223846793005ull + 1442695040888963407ull) >> 40); };
    for (const char* options : {LLAMA, UNIGRAM, NO_BYTES}) {
        Tokenizer tokenizer(trained(options));
        const int V = tokenizer.vocab_size();
        for (int trial = 0; trial < 4000; trial++) {
            std::vector<int> ids;
            const int kind = trial % 4;
            for (int i = random() % 24; i >= 0; i--) {
                const bool byte = kind == 0 || (kind == 1 && random() % 2);
                ids.push_back(byte ? std::min(V - 1, 3 + random() % 256) : kind == 2 ? random() % std::min(V, 12) : random() % V);
            }
            ASSERT_EQ(streamed(tokenizer, ids), tokenizer.decode(ids)) << options << " trial " << trial;
        }
    }
}

TEST(Tokenizer, StreamedPiecesAreWholeCharacters) {
    Tokenizer tokenizer(trained(LLAMA));
    const auto is_utf8 = [](std::string text) {
        size_t need;
        while (!text.empty()) {
            const size_t n = utf8_length(text, &need);
            if (n == 0) return false;
            text.erase(0, n);
        }
        return true;
    };
    EXPECT_TRUE(is_utf8("aé€🎉"));
    for (const char* bad : {"\x80", "\xC3", "\xC0\x80", "\xE0\x80\x80", "\xED\xA0\x80", "\xF4\x90\x80\x80", "\xF8", "\xE2\x82z"})
        EXPECT_FALSE(is_utf8(bad));
    const auto ids = tokenizer.encode("x 🎉 y");
    std::vector<std::string> pieces;
    for (int id : ids) pieces.push_back(tokenizer.decode_next(id));
    for (const std::string& piece : pieces) EXPECT_TRUE(is_utf8(piece)) << piece;
    EXPECT_NE(std::find(pieces.begin(), pieces.end(), "🎉"), pieces.end());                // at once with its fourth byte
    EXPECT_EQ(tokenizer.decode_end(), "");
    const int first_byte = 3 + 0xF0;                                                      // cut inside a character
    EXPECT_EQ(tokenizer.decode_next(first_byte), "");
    EXPECT_EQ(tokenizer.decode_end(), "\xEF\xBF\xBD");
    EXPECT_EQ(tokenizer.decode_end(), "");
    const auto again = tokenizer.encode("the samba");                                     // a new text: no leading space
    EXPECT_EQ(streamed(tokenizer, again), "the samba");
}

TEST(Tokenizer, BadInputIsNamed) {
    TempFolder folder;
    EXPECT_ERROR(Tokenizer(folder.path("none.model")), "cannot open " + folder.path("none.model"));
    write_text(folder.path("empty.model"), "");
    EXPECT_ERROR(Tokenizer(folder.path("empty.model")), "is not a SentencePiece tokenizer.model");
    write_text(folder.path("text.model"), "this is no model, it is a text that someone saved");
    EXPECT_ERROR(Tokenizer(folder.path("text.model")), "is not a SentencePiece tokenizer.model");
    write_text(folder.path("json.model"), "{\"model\": {\"type\": \"BPE\"}}");
    EXPECT_ERROR(Tokenizer(folder.path("json.model")), "is not a SentencePiece tokenizer.model");
    const std::string good = read_text(trained(LLAMA));
    write_text(folder.path("cut.model"), good.substr(0, good.size() / 2));
    EXPECT_ERROR(Tokenizer(folder.path("cut.model")), "is not a SentencePiece tokenizer.model");
    EXPECT_ERROR(Tokenizer{folder.root}, "is a directory");
    Tokenizer tokenizer(trained(LLAMA));
    EXPECT_ERROR(tokenizer.decode({5, 420}), "token 420 is not in the vocabulary of 420");
    EXPECT_ERROR(tokenizer.decode({-1}), "token -1");
    EXPECT_ERROR(tokenizer.decode_next(100000), "token 100000");
}

TEST(Tokenizer, Fingerprint) {
    Tokenizer a(trained(LLAMA)), b(trained(UNIGRAM));
    const std::string bytes = read_text(trained(LLAMA));
    EXPECT_EQ(a.fingerprint(), fnv1a64(bytes.data(), bytes.size()));
    EXPECT_NE(a.fingerprint(), b.fingerprint());
}

#endif
