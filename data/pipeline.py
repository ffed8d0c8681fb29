"""From documents to shards, on all cores, so that a crash at any instant loses and doubles nothing.

The corpus is cut into numbered parts by sizes alone. A process turns one part into files in WORK/parts:

    00000012.train  00000012.val          the tokens of its documents, EOS after each, in order
    00000012.train.lengths  ...           tokens of each document, where documents are shuffled
    00000012.json                         what it holds; written last, and renamed, so that it says "whole"

One process strings the parts together in order (with --shuffle, the documents in an order drawn by the seed) and writes the
shards; a finished shard enters the journal. So the shards depend on neither the number of processes nor on when one died: a
new run keeps whole parts and finished shards and makes the rest. Tokens are removed from parts once they are in such a shard.
"""

import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.shards import ResumableError, ShardWriter, sync_folder, write_synced
from data.sources import Piece, Tally, read_piece
from data.tokenizer import Tokenizer, tokenizer_of

SPLITS = ("train", "val")
BATCH = 1 << 18  # characters encoded in one call
STREAM_PART = 1 << 22  # characters of a part that is read from a stream
CHUNK = 1 << 20  # tokens copied at once


def uniform_hash(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "little") / 2**64


def is_held_out(text: str, val_fraction: float) -> bool:
    """By content, so that copies of a document never land on both sides."""
    return val_fraction > 0 and uniform_hash(text) < val_fraction


@dataclass
class Settings:
    """What a process needs to make parts"""

    work: str
    tokenizer_file: str
    eos: str | None
    val_fraction: float
    keep_empty: bool  # the official script writes an EOS for an empty text
    lengths: bool  # for --shuffle


@dataclass
class StreamPart:
    """Texts that were read already, because only one process can read a stream"""

    source: str
    texts: list[str]
    tally: Tally
    digest: str


Job = list[Piece] | StreamPart


# --------------------------------------------------------------------------------------------------------- one part


class PartWriter:
    """The files of a part but the .json"""

    def __init__(self, stem: str, lengths: bool):
        self.stem, self.lengths = stem, lengths
        kinds = [kind for split in SPLITS for kind in ([split, f"{split}.lengths"] if lengths else [split])]
        self.files = {kind: open(f"{stem}.{kind}", "wb", buffering=1 << 20) for kind in kinds}
        self.totals = {kind: dict.fromkeys(SPLITS, 0) for kind in ("documents", "characters", "tokens")}

    def add(self, split: str, characters: int, tokens: np.ndarray) -> None:
        self.files[split].write(tokens.data)
        if self.lengths:
            self.files[f"{split}.lengths"].write(len(tokens).to_bytes(4, "little"))
        self.totals["documents"][split] += 1
        self.totals["characters"][split] += characters
        self.totals["tokens"][split] += len(tokens)

    def close(self) -> None:
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()


def texts_of(job: Job, tallies: list[tuple[str, Tally]]) -> Iterator[str]:
    if isinstance(job, StreamPart):
        tallies.append((job.source, job.tally))
        yield from job.texts
        return
    for piece in job:
        tallies.append((piece.source, Tally()))
        yield from read_piece(piece, tallies[-1][1])


def make_part(number: int, job: Job, settings: Settings, tokenizer: Tokenizer) -> dict:
    """Writes a part and returns what its .json says."""
    stem = f"{settings.work}/parts/{number:08d}"
    writer = PartWriter(stem, settings.lengths)
    tallies, batch, size, empty = [], [], 0, 0

    def flush() -> None:
        for text, tokens in zip(batch, tokenizer.encode(batch)):
            writer.add("val" if is_held_out(text, settings.val_fraction) else "train", len(text), tokens)

    for text in texts_of(job, tallies):
        if not text:
            empty += 1
            if not settings.keep_empty:
                continue
        batch.append(text)
        size += len(text)
        if size >= BATCH:
            flush()
            batch, size = [], 0
    flush()
    writer.close()
    record = writer.totals | {
        "empty": empty, "left_out": sum(tally.count for _, tally in tallies), "digest": getattr(job, "digest", None),
        "bytes": 0 if isinstance(job, StreamPart) else sum(piece.bytes for piece in job),
        "items": job.tally.lines if isinstance(job, StreamPart) else 0,
        # line numbers are the piece's; with the lines of all pieces before it they become the file's
        "pieces": [[source, tally.lines, tally.problems] for source, tally in tallies if tally.lines or tally.problems],
    }  # fmt: skip
    write_synced(f"{stem}.json.new", json.dumps(record).encode())
    os.replace(f"{stem}.json.new", f"{stem}.json")
    return record


# ----------------------------------------------------------------------------------------------------------- processes

worker: tuple[Settings, Tokenizer] | None = None  # of a pool's process


def start_worker(settings: Settings) -> None:
    global worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes already share the work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent = multiprocessing.parent_process()

    def leave_with_parent() -> None:  # however it ended; a worker alone would wait for ever
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    worker = settings, tokenizer_of(Path(settings.tokenizer_file).read_bytes(), settings.tokenizer_file, settings.eos)


def work(number: int, job: Job) -> dict:
    return make_part(number, job, *worker)


def parts_in_order(jobs: Iterator[tuple[int, Job | dict]], settings: Settings, tokenizer: Tokenizer, processes: int, ahead: int) -> Iterator[dict]:
    """The records of all parts by number; a job that is a record is a part made earlier."""
    if processes == 1:
        for number, job in jobs:
            yield job if isinstance(job, dict) else make_part(number, job, settings, tokenizer)
        return
    context = multiprocessing.get_context("forkserver")  # fork alone could copy a lock that a library's thread holds
    context.set_forkserver_preload(["data.pipeline"])
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=start_worker, initargs=(settings,))
    try:
        pending = deque()
        for number, job in jobs:
            pending.append(job if isinstance(job, dict) else pool.submit(work, number, job))
            while pending and (len(pending) >= ahead or isinstance(pending[0], dict) or pending[0].done()):
                first = pending.popleft()
                yield first if isinstance(first, dict) else first.result()
        while pending:
            first = pending.popleft()
            yield first if isinstance(first, dict) else first.result()
    except BrokenProcessPool:
        raise ResumableError(
            "a process that tokenizes was killed (out of memory? try fewer --processes); run the same command again to go on"
        ) from None
    except BaseException:  # nobody wants the parts that are being made
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# --------------------------------------------------------------------------------------------------------------- parts


def read_record(settings: Settings, number: int) -> dict | None:
    try:
        return json.loads(Path(f"{settings.work}/parts/{number:08d}.json").read_bytes()) | {"earlier": True}
    except FileNotFoundError:
        return None


def jobs_of_files(parts: list[list[Piece]], settings: Settings) -> Iterator[tuple[int, Job | dict]]:
    for number, pieces in enumerate(parts):
        yield number, read_record(settings, number) or pieces


def jobs_of_stream(stream, settings: Settings) -> Iterator[tuple[int, Job | dict]]:
    """Cuts a stream by the number of characters. What an earlier run made of it is skipped where it can be, and compared else."""
    number, skip = 0, 0
    while stream.can_reread and (record := read_record(settings, number)):
        yield number, record
        number += 1
        skip += record["items"]
    total = Tally()
    texts, size, base, digest, items = [], 0, 0, hashlib.sha256(), stream.read(skip, total)
    while True:
        text = next(items, items)  # the iterator itself marks the end
        ended = text is items
        if isinstance(text, str):
            texts.append(text)
            size += len(text)
            digest.update(text.encode() + b"\0")
        if size >= STREAM_PART or len(texts) >= 1 << 16 or (ended and (texts or total.lines > base or number == 0)):
            tally = Tally(total.lines - base, total.count, [(line - base, what) for line, what in total.problems])
            record = read_record(settings, number)
            if record and record["digest"] != digest.hexdigest():
                raise ResumableError(f"{stream.name}: is not what an earlier, unfinished run read; remove {settings.work} to start again")
            yield number, record or StreamPart(stream.name, texts, tally, digest.hexdigest())
            number, base, texts, size, digest = number + 1, total.lines, [], 0, hashlib.sha256()
            total.count, total.problems = 0, []
        if ended:
            return


def named_problems(records: list[dict]) -> Iterator[str]:
    """FILE:LINE: what is wrong, for each that a part named"""
    before: dict[str, int] = {}  # lines of the pieces so far
    for record in records:
        for source, lines, problems in record["pieces"]:
            for line, what in problems:
                yield f"{source}:{before.get(source, 0) + line}: {what}; left out" if line else f"{source}: {what}; left out"
            before[source] = before.get(source, 0) + lines


# ------------------------------------------------------------------------------------------------------------ in order


def read_tokens_of(path: Path, first: int = 0) -> Iterator[np.ndarray]:
    with open(path, "rb") as file:
        file.seek(2 * first)
        while raw := file.read(2 * CHUNK):
            yield np.frombuffer(raw, dtype="<u2")


class InOrder:
    """Parts go to the shards as they come. Tokens are removed once a finished shard holds them."""

    def __init__(self, settings: Settings, writers: dict[str, ShardWriter]):
        self.parts, self.writers = Path(settings.work) / "parts", writers
        self.at = dict.fromkeys(SPLITS, 0)  # tokens of the parts so far
        self.waiting = {split: deque() for split in SPLITS}  # (end, file) of parts not yet in finished shards
        self.kept = {split: writer.durable for split, writer in writers.items()}  # what an earlier run wrote

    def add(self, number: int, record: dict) -> None:
        for split, writer in self.writers.items():
            path, tokens = self.parts / f"{number:08d}.{split}", record["tokens"][split]
            start, self.at[split] = self.at[split], self.at[split] + tokens
            if self.at[split] > self.kept[split]:
                for chunk in read_tokens_of(path, max(0, self.kept[split] - start)):
                    writer.append(chunk)
            self.waiting[split].append((self.at[split], path))
            while self.waiting[split] and self.waiting[split][0][0] <= writer.durable:
                self.waiting[split].popleft()[1].unlink(missing_ok=True)

    def finish(self) -> None:
        pass


class Shuffled:
    """All documents in an order drawn by the seed, in bounded memory: dealt into buckets by a random key, each sorted in memory."""

    BUCKET = 1 << 24  # tokens, about

    def __init__(self, settings: Settings, writers: dict[str, ShardWriter], seed: int):
        self.parts, self.folder, self.writers, self.seed = Path(settings.work) / "parts", Path(settings.work) / "shuffle", writers, seed
        self.records: list[dict] = []

    def add(self, number: int, record: dict) -> None:
        self.records.append(record)

    def finish(self) -> None:
        for split, writer in self.writers.items():
            buckets = 1 + sum(record["tokens"][split] for record in self.records) // self.BUCKET
            if not (self.folder / f"{split}.dealt").exists():
                self._deal(split, buckets)
            kept, at = writer.durable, 0
            for bucket in range(buckets):
                for document in self._sorted(split, bucket):
                    start, at = at, at + len(document)
                    if at > kept:
                        writer.append(document[max(0, kept - start) :])

    def _keys(self, number: int, count: int) -> np.ndarray:
        """splitmix64 of seed, part and document: one draw each, whatever process made the part"""
        with np.errstate(over="ignore"):
            z = np.uint64(self.seed) * np.uint64(0xD1342543DE82EF95) + (np.uint64(number) << np.uint64(32)) + np.arange(1, count + 1, dtype=np.uint64)
            for _ in range(2):
                z = z * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x2545F4914F6CDD1D)
                z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
                z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
                z = z ^ (z >> np.uint64(31))
        return z

    def _deal(self, split: str, buckets: int) -> None:
        self.folder.mkdir(exist_ok=True)
        for path in self.folder.glob(f"{split}.*"):
            path.unlink()
        for number in range(len(self.records)):
            lengths = np.fromfile(self.parts / f"{number:08d}.{split}.lengths", dtype="<u4").astype(np.int64)
            if not len(lengths):
                continue
            ends, keys = np.cumsum(lengths), self._keys(number, len(lengths))
            tokens = np.memmap(self.parts / f"{number:08d}.{split}", dtype="<u2", mode="r")
            home = (keys >> np.uint64(32)) * np.uint64(buckets) >> np.uint64(32)
            for bucket in np.unique(home).tolist():
                chosen = np.flatnonzero(home == bucket)
                with open(self.folder / f"{split}.{bucket}", "ab") as file, open(self.folder / f"{split}.{bucket}.index", "ab") as index:
                    for i in chosen.tolist():
                        file.write(tokens[ends[i] - lengths[i] : ends[i]].tobytes())
                    index.write(np.stack([keys[chosen], lengths[chosen].astype(np.uint64)], axis=1).tobytes())
        for path in self.folder.glob(f"{split}.*"):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        write_synced(self.folder / f"{split}.dealt", b"")
        sync_folder(self.folder)
        for number in range(len(self.records)):
            (self.parts / f"{number:08d}.{split}").unlink(missing_ok=True)

    def _sorted(self, split: str, bucket: int) -> Iterator[np.ndarray]:
        path = self.folder / f"{split}.{bucket}"
        if not path.exists():
            return
        tokens = np.fromfile(path, dtype="<u2")
        index = np.fromfile(f"{path}.index", dtype="<u8").reshape(-1, 2)
        lengths = index[:, 1].astype(np.int64)
        ends = np.cumsum(lengths)
        order = np.argsort(index[:, 0], kind="stable")
        gathered, size = [], 0
        for i in order.tolist():  # gathered, because a document at a time would be slow to write
            gathered.append(tokens[ends[i] - lengths[i] : ends[i]])
            size += len(gathered[-1])
            if size >= CHUNK:
                yield np.concatenate(gathered)
                gathered, size = [], 0
        if gathered:
            yield np.concatenate(gathered)


def write_shards(
    corpus,
    settings: Settings,
    tokenizer: Tokenizer,
    writers: dict[str, ShardWriter],
    processes: int,
    seed: int | None,
    advance: Callable,
) -> list[dict]:
    """All shards of both splits; returns the parts' records."""
    Path(settings.work, "parts").mkdir(exist_ok=True)
    assembly = InOrder(settings, writers) if seed is None else Shuffled(settings, writers, seed)
    if corpus.stream:
        jobs, ahead = jobs_of_stream(corpus.stream, settings), 2 * processes
    else:
        parts = corpus.parts()
        jobs, ahead, processes = jobs_of_files(parts, settings), 4096, min(processes, len(parts))
    records = []
    for record in parts_in_order(jobs, settings, tokenizer, processes, ahead):
        assembly.add(len(records), record)
        records.append(record)
        advance(record["bytes"], sum(record["tokens"].values()), "earlier" in record)
    assembly.finish()
    for writer in writers.values():
        writer.close()
    return records
