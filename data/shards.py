"""Token shards, the files the trainer reads.

A shard is a header of 256 little-endian int32 (1,024 bytes), then one uint16 a token:

    word 0   20240520, the magic of llm.c's shards       word 4       id of the end-of-text token + 1
    word 1   1, the version                              words 5, 6   tokenizer fingerprint, low and high 32 bits
    word 2   number of tokens, low 32 bits               word 7       number of tokens, high 32 bits
    word 3   vocabulary size                             others       0

Words 3 to 7 are this project's; in llm.c's files they are zero, which reads as "not said".
"""

import os
from pathlib import Path

import numpy as np

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 1024
MAX_VOCAB_SIZE = 65536  # what uint16 can tell apart
MAX_SHARDS = 1000  # names have three digits, so that sorting them as text keeps their order


class PrepareError(Exception):
    """What went wrong and what to do about it, in one line."""


def fingerprint(tokenizer_model: bytes) -> int:
    """64 bits that tell one tokenizer from another: FNV-1a of its file, as fnv1a64() in data/files.h."""
    value = 14695981039346656037
    for byte in tokenizer_model:
        value = (value ^ byte) * 1099511628211 & 0xFFFFFFFFFFFFFFFF
    return value


def make_header(tokens: int, vocab_size: int, eos_id: int, tokenizer_fingerprint: int) -> bytes:
    words = np.zeros(HEADER_BYTES // 4, dtype="<u4")
    words[:5] = MAGIC, VERSION, tokens & 0xFFFFFFFF, vocab_size, eos_id + 1
    words[5:8] = tokenizer_fingerprint & 0xFFFFFFFF, tokenizer_fingerprint >> 32, tokens >> 32
    return words.tobytes()


def read_header(path) -> dict:
    with open(path, "rb") as file:
        raw = file.read(HEADER_BYTES)
    words = [int(word) for word in np.frombuffer(raw[: len(raw) // 4 * 4], dtype="<u4")]
    if len(raw) < HEADER_BYTES or words[0] != MAGIC or words[1] != VERSION:
        raise PrepareError(f"{path}: not a token shard (header {words[:2]}, expected [{MAGIC}, {VERSION}]); make it with data.prepare")
    header = {"tokens": words[2] | words[7] << 32, "vocab_size": words[3], "eos_id": words[4] - 1, "fingerprint": words[5] | words[6] << 32}
    expected = HEADER_BYTES + 2 * header["tokens"]
    if os.path.getsize(path) != expected:
        raise PrepareError(f"{path}: {os.path.getsize(path)} bytes, but its header promises {expected}; make it again")
    return header


def read_tokens(path) -> np.ndarray:
    """The tokens of a shard, mapped, not loaded."""
    count = read_header(path)["tokens"]
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,)) if count else np.zeros(0, dtype="<u2")


def sync_folder(folder) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


class ShardWriter:
    """Writes one split as FOLDER/SPLIT_000.bin, _001.bin, ... of at most shard_tokens each, and counts every token.

    A document goes on in the next shard where one is full. Another output format is another class with append() and close().
    """

    BUFFER_TOKENS = 1 << 20

    def __init__(self, folder, split: str, shard_tokens: int, vocab_size: int, eos_id: int, tokenizer_fingerprint: int):
        self.folder, self.split, self.shard_tokens = Path(folder), split, shard_tokens
        self.identity = (vocab_size, eos_id, tokenizer_fingerprint)
        self.counts = np.zeros(vocab_size, dtype=np.int64)  # how often each token was written
        self.files: list[str] = []
        self._file, self._in_shard = None, 0
        self._buffer, self._buffered = [], 0

    @property
    def tokens(self) -> int:
        return int(self.counts.sum()) + self._buffered

    def append(self, tokens: np.ndarray) -> None:
        self._buffer.append(tokens)
        self._buffered += len(tokens)
        if self._buffered >= self.BUFFER_TOKENS:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._finish_shard()

    def _flush(self) -> None:
        if not self._buffered:
            return
        tokens = np.concatenate(self._buffer).astype("<u2", copy=False)
        self._buffer, self._buffered = [], 0
        self.counts += np.bincount(tokens, minlength=len(self.counts))
        while len(tokens):
            if self._file is None:
                self._start_shard()
            now = tokens[: self.shard_tokens - self._in_shard]
            self._file.write(now.tobytes())
            self._in_shard += len(now)
            tokens = tokens[len(now) :]
            if self._in_shard == self.shard_tokens:
                self._finish_shard()

    def _start_shard(self) -> None:
        if len(self.files) == MAX_SHARDS:
            raise PrepareError(f"--shard-tokens {self.shard_tokens}: more than {MAX_SHARDS} {self.split} shards; ask for larger ones")
        self.files.append(f"{self.split}_{len(self.files):03d}.bin")
        self._file = open(self.folder / self.files[-1], "wb")
        self._file.write(bytes(HEADER_BYTES))

    def _finish_shard(self) -> None:
        if self._file is None:
            return
        self._file.seek(0)
        self._file.write(make_header(self._in_shard, *self.identity))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file, self._in_shard = None, 0
