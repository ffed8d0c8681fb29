"""Tokenizers: SentencePiece .model, Hugging Face tokenizer.json, tiktoken's gpt2; and training a new SentencePiece model.

Each is a Tokenizer: the bytes of its file, which are stored beside the shards and whose fingerprint is in them, and encode(),
from texts to token arrays that end with EOS and begin with no BOS. A text that spells a special token is text all the same.
"""

import io
import itertools
import json
import re
import struct
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sentencepiece

from data.shards import MAX_VOCAB_SIZE, PrepareError, fingerprint

BLOCK = 1 << 20  # characters encoded at once
SMALL_BLOCK = 256  # the same where cutting after a newline changes nothing: short texts are encoded a fifth faster


def blocks(text: str, size: int, longest_line: int = 0) -> Iterator[str]:
    """Consecutive pieces of text that end after a newline and, where lines allow, hold at most size characters.

    A line of more than longest_line (8 * size where 0) is cut where it stands, so that memory is bounded.
    """
    start, longest_line = 0, longest_line or 8 * size
    while start < len(text):
        end = len(text)
        if start + size < end:
            end = text.rfind("\n", start, start + size) + 1 or text.find("\n", start, start + longest_line) + 1 or min(start + longest_line, end)
        yield text[start:end]
        start = end


class Tokenizer:
    """vocab_size and eos_id; encode() adds EOS. Subclasses give encode_ids() and id_bytes()."""

    file_name: str

    def __init__(self, model: bytes, name: str, vocab_size: int, eos_id: int):
        self.model, self.name, self.vocab_size, self.eos_id = model, name, vocab_size, eos_id
        if vocab_size > MAX_VOCAB_SIZE:
            raise PrepareError(f"{name}: vocabulary of {vocab_size}, but shards store uint16 tokens; use one of at most {MAX_VOCAB_SIZE}")
        if not 0 <= eos_id < vocab_size:
            raise PrepareError(f"{name}: has no end-of-text token (eos); use a tokenizer that has one, or name it with --eos TOKEN")

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """A text of over BLOCK characters goes in blocks, so that memory is bounded; there a token at a cut may be two."""
        short, arrays = iter(self.encode_ids([text for text in texts if len(text) <= BLOCK], False)), []
        for text in texts:
            if len(text) <= BLOCK:
                ids = array("H", next(short))
            else:
                ids = array("H")
                for i, block in enumerate(blocks(text, BLOCK, 2 * BLOCK)):
                    ids.extend(array("H", self.encode_ids([block], i > 0)[0]))
            ids.append(self.eos_id)
            arrays.append(np.frombuffer(ids, dtype="<u2"))
        return arrays

    def encode_ids(self, texts: list[str], goes_on: bool) -> list[list[int]]:
        """Without EOS. goes_on: the texts are not the beginnings of their documents."""
        raise NotImplementedError

    def decode(self, ids: list[int]) -> str:
        raise NotImplementedError

    def id_bytes(self) -> list[bytes]:
        """What each token stands for; nothing for control tokens."""
        raise NotImplementedError


# ------------------------------------------------------------------------------------------------------- SentencePiece


class SentencePieceTokenizer(Tokenizer):
    file_name = "tokenizer.model"

    def __init__(self, model: bytes, name: str):
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, TypeError):
            raise PrepareError(f"{name}: not a SentencePiece model; give a tokenizer.model file") from None
        super().__init__(model, name, self.processor.get_piece_size(), self.processor.eos_id())
        self.has_prefix = self.processor.encode_as_pieces("a")[0].startswith("▁")
        # A text is encoded in blocks. Where no token goes on behind a newline, as in Llama 2's vocabulary, they give what the whole
        # would, and small ones are quicker. Only the first may get a prefix: an appended protobuf field overrides an earlier one,
        # so this turns it off.
        self.tail = sentencepiece.SentencePieceProcessor(model_proto=model + b"\x1a\x02\x18\x00") if self.has_prefix else self.processor
        crosses = any("\n" in piece[:-1] for piece in map(self.processor.id_to_piece, range(self.vocab_size)))
        exact = not crosses and self.processor.decode(self.processor.encode("a\n  a ")) == "a\n  a "
        self.block = SMALL_BLOCK if exact else BLOCK
        escape = [self.processor.piece_to_id(piece) for piece in ("<0xE2>", "<0x96>", "<0x81>")]
        self.escape = escape if not self.has_prefix and self.processor.unk_id() not in escape else None

    def encode_ids(self, texts: list[str], goes_on: bool) -> list[list[int]]:
        heads, tails, counts = [], [], []  # of each text its first block, the others, and how many these are
        for text in texts:
            first, *others = blocks(text, self.block, 2 * BLOCK) if text else [""]
            heads.append(first)
            tails += others
            counts.append(len(others))
        result, rest = self._encode(self.tail if goes_on else self.processor, heads), iter(self._encode(self.tail, tails))
        for ids, count in zip(result, counts):
            for more in itertools.islice(rest, count):
                ids += more
        return result

    def _encode(self, processor: sentencepiece.SentencePieceProcessor, texts: list[str]) -> list[list[int]]:
        """SentencePiece writes a space as ▁ (U+2581), so a ▁ of the text would come back as a space. Its three UTF-8 bytes as
        byte tokens come back as themselves. (A tokenizer with a prefix is another project's: it is used as it is.)"""
        marked = [i for i, text in enumerate(texts) if "▁" in text] if self.escape else []
        result = processor.encode(texts, num_threads=1) if texts else []
        for i in marked:
            first, *others = texts[i].split("▁")
            result[i] = processor.encode(first)
            for part in others:
                result[i] += self.escape + processor.encode(part)
        return result

    def decode(self, ids: list[int]) -> str:
        return self.processor.decode(ids)

    def id_bytes(self) -> list[bytes]:
        p = self.processor
        return [b"" if p.is_control(i) or p.is_unknown(i) else bytes([int(p.id_to_piece(i)[3:5], 16)]) if p.is_byte(i)
                else p.id_to_piece(i).replace("▁", " ").encode() for i in range(self.vocab_size)]  # fmt: skip


# -------------------------------------------------------------------------------------------- Hugging Face tokenizer.json

USUAL_EOS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|im_end|>", "[EOS]", "[SEP]")


def gpt2_byte_alphabet() -> dict[str, int]:
    """The printable characters that GPT-2's vocabulary writes bytes as."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class HuggingFaceTokenizer(Tokenizer):
    file_name = "tokenizer.json"

    def __init__(self, model: bytes, name: str, eos: str | None = None):
        tokenizers = need("tokenizers", name)
        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(model.decode("utf-8"))
        except Exception:  # the library raises plain Exception
            raise PrepareError(f"{name}: not a tokenizer.json of Hugging Face's tokenizers") from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        if not hasattr(self.tokenizer, "encode_special_tokens"):
            raise PrepareError(f"{name}: needs a newer Python module 'tokenizers'; run scripts/setup.sh")
        self.tokenizer.encode_special_tokens = True  # "</s>" in a text is text
        ids = (self.tokenizer.token_to_id(token) for token in ([eos] if eos else USUAL_EOS))
        eos_id = next((i for i in ids if i is not None), -1)
        # The largest id counts: some files have holes
        super().__init__(model, name, max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1, eos_id)

    def encode_ids(self, texts: list[str], goes_on: bool) -> list[list[int]]:
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def id_bytes(self) -> list[bytes]:
        special = self.tokenizer.get_added_tokens_decoder()
        byte_level = '"ByteLevel"' in json.dumps(json.loads(self.model).get("decoder"))
        alphabet = gpt2_byte_alphabet()
        result = []
        for i in range(self.vocab_size):
            token = self.tokenizer.id_to_token(i) or ""
            if i in special:
                result.append(b"" if special[i].special else token.encode())
            elif byte_level and all(c in alphabet for c in token):
                result.append(bytes(alphabet[c] for c in token))
            elif match := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
                result.append(bytes([int(match[1], 16)]))
            else:
                result.append(token.replace("▁", " ").encode())
        return result


# ------------------------------------------------------------------------------------------------------------ tiktoken


class TiktokenTokenizer(Tokenizer):
    """GPT-2's splitting pattern and <|endoftext|> with the merges of a .tiktoken file: base64 of a token and its rank, a line each."""

    file_name = "tokenizer.tiktoken"

    def __init__(self, model: bytes, name: str):
        import base64
        import binascii

        tiktoken = need("tiktoken", name)
        try:
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in (line.split() for line in model.splitlines() if line)}
            if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([byte]) in ranks for byte in range(256)):
                raise ValueError
        except (ValueError, binascii.Error):
            raise PrepareError(f"{name}: not a .tiktoken file (lines of base64 and rank, ranks from 0, every byte a token)") from None
        self.encoding = tiktoken.Encoding(
            name="gpt2", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)},
            pat_str=r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
        )  # fmt: skip
        super().__init__(model, name, len(ranks) + 1, len(ranks))

    def encode_ids(self, texts: list[str], goes_on: bool) -> list[list[int]]:
        return [self.encoding.encode_ordinary(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return self.encoding.decode(ids, errors="replace")

    def id_bytes(self) -> list[bytes]:
        return [self.encoding.decode_single_token_bytes(i) for i in range(self.eos_id)] + [b""]


def gpt2_from_tiktoken() -> bytes:
    """tiktoken's own gpt2 as a .tiktoken file; it downloads the merges, or finds them in TIKTOKEN_CACHE_DIR."""
    import base64

    tiktoken = need("tiktoken", "--tokenizer gpt2")
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:  # whatever its HTTP library raises
        why = type(error).__name__
        raise PrepareError(f"--tokenizer gpt2: tiktoken cannot get its file ({why}); check the network, or give a .tiktoken file") from None
    return b"".join(base64.b64encode(encoding.decode_single_token_bytes(i)) + b" %d\n" % i for i in range(encoding.eot_token))


# ------------------------------------------------------------------------------------------------------------- loading


def need(module: str, what: str):
    try:
        return __import__(module)
    except ImportError:
        raise PrepareError(f"{what}: Python module '{module}' is missing; run scripts/setup.sh") from None


def tokenizer_of(model: bytes, file_name: str, eos: str | None = None) -> Tokenizer:
    """By the ending of the file's name."""
    if file_name.endswith(".json"):
        return HuggingFaceTokenizer(model, file_name, eos)
    if file_name.endswith(".tiktoken"):
        return TiktokenTokenizer(model, file_name)
    return SentencePieceTokenizer(model, file_name)


def load_tokenizer(name: str, eos: str | None = None) -> Tokenizer:
    """A file, or a folder that holds one (tokenizer.model first, as the reference looks), or gpt2."""
    if name == "gpt2" and not Path(name).exists():
        return TiktokenTokenizer(gpt2_from_tiktoken(), name)
    path = Path(name)
    if path.is_dir():
        names = ("tokenizer.model", "tokenizer.json", "tokenizer.tiktoken")
        path = next((path / name for name in names if (path / name).exists()), path / names[0])
    if not path.is_file():
        raise PrepareError(f"--tokenizer {path}: no such file; give a tokenizer.model, tokenizer.json or .tiktoken file, or gpt2")
    return tokenizer_of(path.read_bytes(), str(path), eos)


# What each id stands for, flat, for programs without a tokenizer library: a header of 8 little-endian int32 (magic, version 1,
# vocabulary size, EOS id + 1, fingerprint low and high, 0, 0), then vocabulary size + 1 uint32 offsets, then the bytes.
# Token i is bytes [offset i, offset i+1) behind the table.
ID_BYTES_MAGIC = 20260320


def id_bytes_file(tokenizer: Tokenizer) -> bytes:
    tokens = tokenizer.id_bytes()
    offsets = np.concatenate([[0], np.cumsum([len(token) for token in tokens])]).astype("<u4")
    mark = fingerprint(tokenizer.model)
    header = struct.pack("<8I", ID_BYTES_MAGIC, 1, tokenizer.vocab_size, tokenizer.eos_id + 1, mark & 0xFFFFFFFF, mark >> 32, 0, 0)
    return header + offsets.tobytes() + b"".join(tokens)


def read_id_bytes(path) -> list[bytes]:
    raw = Path(path).read_bytes()
    magic, version, size = struct.unpack_from("<3I", raw)
    if (magic, version) != (ID_BYTES_MAGIC, 1):
        raise PrepareError(f"{path}: not a table of token bytes; make it with data.prepare")
    offsets = np.frombuffer(raw, dtype="<u4", count=size + 1, offset=32)
    table = raw[32 + 4 * (size + 1) :]
    return [table[a:b] for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist())]


# ------------------------------------------------------------------------------------------------------------ training


def train_tokenizer(sample: Iterator[str], vocab_size: int) -> bytes:
    """A byte-pair model that gives every text back exactly. The sample must hold some text.

    Identity normalisation, no dummy prefix and all white space kept: what goes in comes out. Runs of spaces may be tokens
    (indentation), characters that are not in the vocabulary become UTF-8 bytes. No text turns into <s> or </s>.
    """
    model = io.BytesIO()

    def sentences():
        yield from sample
        print(f"training a tokenizer of {vocab_size} tokens", file=sys.stderr)

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            unk_id=0, bos_id=1, eos_id=2, pad_id=-1, byte_fallback=True, character_coverage=0.9999,
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True, max_sentence_length=1 << 20,
            num_threads=4, minloglevel=2)  # num_threads is written into the model: fixed, for the same bytes everywhere
    except RuntimeError as error:
        reason = " ".join(str(error).split())[-200:]
        raise PrepareError(f"--vocab-size {vocab_size}: does not fit this text, give another (SentencePiece: {reason})") from None
    return model.getvalue()
