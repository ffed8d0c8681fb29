"""Token shards, the files the trainer reads.

A shard is a header of 256 little-endian int32 (1,024 bytes), then one uint16 a token:

    word 0   20240520, the magic of llm.c's shards       word 4       id of the end-of-text token + 1
    word 1   1, the version                              words 5, 6   tokenizer fingerprint, low and high 32 bits
    word 2   number of tokens, low 32 bits               word 7       number of tokens, high 32 bits
    word 3   vocabulary size                             others       0

Words 3 to 7 are this project's; in llm.c's files they are zero, which reads as "not said".

The official trainer's files, LITPKDS: a header of 24 bytes (magic, u64 version 1, u8 dtype, u64 token count), then the tokens;
all of one size, what fills no file is left out.
"""

import functools
import hashlib
import json
import os
import struct
from pathlib import Path

import numpy as np

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 1024
MAX_VOCAB_SIZE = 65536  # what uint16 can tell apart
LITPKDS_CHUNK = 2049 * 1024  # tokens a file, as the official script has it


class PrepareError(Exception):
    """What went wrong and what to do about it, in one line."""


class ResumableError(PrepareError):
    """What is done so far is kept, and running again goes on from there."""


@functools.lru_cache(maxsize=4)
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


LITPKDS_DTYPES = {4: "<i4", 8: "<u2"}


def litpkds_header(tokens: int, vocab_size: int) -> bytes:
    return b"LITPKDS" + struct.pack("<QBQ", 1, 8 if vocab_size < 65500 else 4, tokens)


def read_header(path) -> dict:
    """format, dtype, header bytes, tokens; and vocab_size, eos_id, fingerprint, which are 0, -1, 0 where not said."""
    with open(path, "rb") as file:
        raw = file.read(HEADER_BYTES)
    words = [int(word) for word in np.frombuffer(raw[: len(raw) // 4 * 4], dtype="<u4")]
    if raw[:7] == b"LITPKDS" and len(raw) >= 24:
        version, dtype, tokens = struct.unpack_from("<QBQ", raw, 7)
        if version != 1 or dtype not in LITPKDS_DTYPES:
            raise PrepareError(f"{path}: LITPKDS version {version}, dtype code {dtype}; read are version 1 and dtypes 4 and 8")
        header = {"format": "litpkds", "dtype": LITPKDS_DTYPES[dtype], "header_bytes": 24, "tokens": tokens}
        header |= {"vocab_size": 0, "eos_id": -1, "fingerprint": 0}
    elif len(raw) < HEADER_BYTES or words[0] != MAGIC or words[1] != VERSION:
        raise PrepareError(f"{path}: not a token shard (header {words[:2]}, expected [{MAGIC}, {VERSION}]); make it with data.prepare")
    else:
        header = {"format": "shard", "dtype": "<u2", "header_bytes": HEADER_BYTES, "tokens": words[2] | words[7] << 32,
                  "vocab_size": words[3], "eos_id": words[4] - 1, "fingerprint": words[5] | words[6] << 32}  # fmt: skip
    expected = header["header_bytes"] + np.dtype(header["dtype"]).itemsize * header["tokens"]
    if os.path.getsize(path) != expected:
        raise PrepareError(f"{path}: {os.path.getsize(path)} bytes, but its header promises {expected}; make it again")
    return header


def read_tokens(path) -> np.ndarray:
    """The tokens of a shard, mapped, not loaded."""
    header = read_header(path)
    count, dtype = header["tokens"], header["dtype"]
    return np.memmap(path, dtype=dtype, mode="r", offset=header["header_bytes"], shape=(count,)) if count else np.zeros(0, dtype=dtype)


def sha256_of(path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


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


class Journal:
    """The finished shards, a line of JSON each: what a run that goes on after a crash may build on. A torn last line never was."""

    def __init__(self, path):
        self.path, self.entries = Path(path), []
        raw = self.path.read_bytes() if self.path.exists() else b""
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            with open(self.path, "r+b") as file:
                file.truncate(len(whole))
        self.entries = [json.loads(line) for line in whole.splitlines()]

    def add(self, entry: dict) -> None:
        with open(self.path, "ab") as file:
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.entries.append(entry)


class ShardWriter:
    """Writes one split as FOLDER/SPLIT_000.bin, _001.bin, ... of shard_tokens each, the last of what is left, and counts tokens.

    A document goes on in the next shard where one is full. A shard that the journal has is kept: tokens up to `durable` were
    written by an earlier run, and the caller appends those behind.
    """

    keep_tail = True  # a last shard that is not full is written
    split_names = {"train": "train", "val": "val"}

    def __init__(self, folder, split: str, shard_tokens: int, vocab_size: int, eos_id: int, tokenizer_fingerprint: int, journal: Journal,
                 digits: int = 3):  # fmt: skip
        self.folder, self.split, self.shard_tokens, self.digits, self.journal = Path(folder), split, shard_tokens, digits, journal
        self.identity = (vocab_size, eos_id, tokenizer_fingerprint)
        self.dtype = np.dtype("<u2")
        self.counts = np.zeros(vocab_size, dtype=np.int64)  # how often each token was written
        self.files: list[str] = []
        self.dropped = 0  # tokens at the end that no shard holds
        self._file, self._in_shard, self._digest, self._shard_counts = None, 0, None, None
        for entry in journal.entries:
            if entry["split"] == split:
                self._take_over(entry)

    @property
    def tokens(self) -> int:
        return int(self.counts.sum())

    @property
    def durable(self) -> int:
        """Tokens in finished shards."""
        return self.tokens

    def append(self, tokens: np.ndarray) -> None:
        while len(tokens):
            # A full shard is finished when more comes, as the official script does it
            if self._file is not None and self._in_shard == self.shard_tokens:
                self._finish_shard()
            if self._file is None:
                self._start_shard()
            now = tokens[: self.shard_tokens - self._in_shard]
            raw = now.astype(self.dtype, copy=False).data.cast("B")
            self._file.write(raw)
            self._digest.update(raw)
            self._shard_counts += np.bincount(now, minlength=len(self.counts))
            self._in_shard += len(now)
            tokens = tokens[len(now) :]

    def close(self) -> None:
        if self._file is None:
            return
        if self.keep_tail:
            self._finish_shard()
        else:
            self.dropped = self._in_shard
            self._file.close()
            self._file = None
            (self.folder / self.files.pop()).unlink()

    def header(self, tokens: int) -> bytes:
        return make_header(tokens, *self.identity)

    def name(self, number: int) -> str:
        return f"{self.split}_{number:0{self.digits}d}.bin"

    def _take_over(self, entry: dict) -> None:
        path = self.folder / entry["file"]
        if not path.exists() or sha256_of(path) != entry["sha256"]:
            raise ResumableError(f"{path}: an earlier run wrote it and it has changed since; remove {self.folder} to start again")
        self.files.append(entry["file"])
        self.counts += np.bincount(read_tokens(path), minlength=len(self.counts))

    def _start_shard(self) -> None:
        if self.digits == 3 and len(self.files) == 1000:
            raise PrepareError(f"--shard-tokens {self.shard_tokens}: more than 1000 {self.split} shards; ask for larger ones")
        self.files.append(self.name(len(self.files)))
        self._file = open(self.folder / self.files[-1], "wb", buffering=1 << 20)
        header = self.header(self.shard_tokens)
        self._file.write(header)
        self._digest, self._in_shard, self._shard_counts = hashlib.sha256(header), 0, np.zeros_like(self.counts)

    def _finish_shard(self) -> None:
        path = self.folder / self.files[-1]
        if self._in_shard < self.shard_tokens:
            self._file.seek(0)
            self._file.write(self.header(self._in_shard))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        sync_folder(self.folder)
        digest = self._digest.hexdigest() if self._in_shard == self.shard_tokens else sha256_of(path)
        self.journal.add({"split": self.split, "file": self.files[-1], "tokens": self._in_shard, "bytes": path.stat().st_size, "sha256": digest})
        self.counts += self._shard_counts
        self._file = None


class LitpkdsWriter(ShardWriter):
    """What the official script's first process writes, byte for byte: whole files only, the unfilled last one is left out."""

    keep_tail = False
    split_names = {"train": "train", "val": "validation"}

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.dtype = np.dtype("<u2" if self.identity[0] < 65500 else "<i4")

    def header(self, tokens: int) -> bytes:
        return litpkds_header(tokens, self.identity[0])

    def name(self, number: int) -> str:
        return f"{self.split_names[self.split]}_slimpajama_0_{number:010d}.bin"


WRITERS = {"shard": ShardWriter, "litpkds": LitpkdsWriter}
