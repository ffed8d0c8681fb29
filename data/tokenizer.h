// Text to tokens and back, by the SentencePiece library. A build without it (SAMBA_NO_SENTENCEPIECE) trains as usual, on
// shards; only what needs text fails, with a line that says what to install.
#pragma once
#include <memory>
#include <string>
#include <vector>

#ifndef SAMBA_NO_SENTENCEPIECE
#include <sentencepiece_processor.h>
#endif

#include "files.h"

// Bytes of the first UTF-8 character of `text`, 0 where it begins with none. `need` gets the length its first byte announces.
inline size_t utf8_length(const std::string& text, size_t* need) {
    const unsigned char lead = text.empty() ? 0x80 : (unsigned char)text[0];
    *need = lead < 0x80 ? 1 : lead >> 5 == 6 ? 2 : lead >> 4 == 14 ? 3 : lead >> 3 == 30 ? 4 : 1;
    if (text.size() < *need || (*need == 1 && lead >= 0x80)) return 0;
    uint32_t code = *need == 1 ? lead : lead & (0x7fu >> *need);
    for (size_t i = 1; i < *need; i++) {
        if (((unsigned char)text[i] & 0xc0) != 0x80) return 0;
        code = code << 6 | ((unsigned char)text[i] & 0x3f);
    }
    const uint32_t smallest[5] = {0, 0, 0x80, 0x800, 0x10000};
    return code >= smallest[*need] && code <= 0x10ffff && (code < 0xd800 || code > 0xdfff) ? *need : 0;
}

#ifndef SAMBA_NO_SENTENCEPIECE

class Tokenizer {
public:
    // A tokenizer.model, as SentencePiece writes it (Llama 2's, for example)
    explicit Tokenizer(const std::string& path) : path_(path), processor_(std::make_unique<sentencepiece::SentencePieceProcessor>()) {
        const MappedFile file(path);
        const auto status = file.size ? processor_->LoadFromSerializedProto({(const char*)file.data, file.size}) : sentencepiece::util::Status();
        if (file.size == 0 || !status.ok() || processor_->GetPieceSize() == 0) fail("%s is not a SentencePiece tokenizer.model", path.c_str());
        fingerprint_ = fnv1a64(file.data, file.size);
        // Pieces are decoded behind this one, so that their leading space is kept
        for (anchor_ = 0; anchor_ < vocab_size() && (processor_->IsByte(anchor_) || decode({anchor_}).empty());) anchor_++;
        if (anchor_ == vocab_size()) fail("%s holds no piece with text; it is not a usable tokenizer", path.c_str());
        anchor_text_ = decode({anchor_});
    }

    int vocab_size() const { return processor_->GetPieceSize(); }
    int eos() const { return processor_->eos_id(); }                   // -1 where the model has none
    int bos() const { return processor_->bos_id(); }
    uint64_t fingerprint() const { return fingerprint_; }              // the one in the shards' headers: fnv1a64 of the file

    std::vector<int> encode(const std::string& text) const {           // no BOS, no EOS
        std::vector<int> ids;
        const auto status = processor_->Encode(text, &ids);
        if (!status.ok()) fail("%s cannot encode a text of %zu bytes: %s", path_.c_str(), text.size(), printable(status.ToString()).c_str());
        return ids;
    }
    std::string decode(const std::vector<int>& ids) const {
        for (int id : ids)
            if (id < 0 || id >= vocab_size())
                fail("token %d is not in the vocabulary of %d of %s; use the model's own tokenizer", id, vocab_size(), path_.c_str());
        std::string text;
        const auto status = processor_->Decode(ids, &text);
        if (!status.ok()) fail("%s cannot decode %zu tokens: %s", path_.c_str(), ids.size(), printable(status.ToString()).c_str());
        return text;
    }

    // Streaming: what can be shown now that this token is known. Bytes of a character spread over several byte pieces wait for
    // the last of them, so that the text is valid UTF-8 at all times. The pieces, decode_end() included, join to decode() of all.
    std::string decode_next(int id) {
        if (id >= 0 && id < vocab_size() && processor_->IsByte(id)) {
            bytes_ += (char)std::stoi(processor_->IdToPiece(id).substr(3, 2), nullptr, 16);         // "<0xE2>"
            return take_characters(false);
        }
        std::string text = take_characters(true);
        if (started_) return text + decode({anchor_, id}).substr(anchor_text_.size());
        leading_.push_back(id);                             // until some text came, a leading space is not shown
        text += decode(leading_);
        started_ = !text.empty();
        return text;
    }
    // The end of a stream: what was still held back. The next decode_next() begins a new text.
    std::string decode_end() {
        std::string text = take_characters(true);
        started_ = false;
        leading_.clear();
        return text;
    }

private:
    // Moves whole characters out of bytes_. A byte that begins none becomes U+FFFD, as in decode(): as soon as that is certain,
    // or at once if no more bytes can follow (end_of_run).
    std::string take_characters(bool end_of_run) {
        std::string text;
        while (!bytes_.empty()) {
            size_t need;
            const size_t length = utf8_length(bytes_, &need);
            if (length == 0 && bytes_.size() < need && !end_of_run) break;
            text += length ? bytes_.substr(0, length) : "\xEF\xBF\xBD";
            bytes_.erase(0, length ? length : 1);
        }
        started_ = started_ || !text.empty();
        return text;
    }

    std::string path_;
    std::unique_ptr<sentencepiece::SentencePieceProcessor> processor_;
    uint64_t fingerprint_ = 0;
    int anchor_ = 0;                                        // an id whose text is not empty
    std::string anchor_text_;

    bool started_ = false;                                  // the stream has shown text
    std::vector<int> leading_;                              // its tokens before that
    std::string bytes_;                                     // bytes of an unfinished character
};

#else

class Tokenizer {
public:
    explicit Tokenizer(const std::string& path) {
        fail("cannot read %s: this build has no SentencePiece; install it (apt install libsentencepiece-dev, or scripts/setup.sh) "
             "and build again", path.c_str());
    }
    int vocab_size() const { return 0; }
    int eos() const { return -1; }
    int bos() const { return -1; }
    uint64_t fingerprint() const { return 0; }
    std::vector<int> encode(const std::string&) const { return {}; }
    std::string decode(const std::vector<int>&) const { return {}; }
    std::string decode_next(int) { return {}; }
    std::string decode_end() { return {}; }
};

#endif
