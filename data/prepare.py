"""From text to token shards: python -m data.prepare --out DIR [--dataset NAME | --text FILE...] [--vocab-size N | --tokenizer FILE]

Reads the documents (data/corpus.py) twice: once to train a SentencePiece model on those that are not held out, once
to turn each into tokens and an end-of-text token (data/shards.py). DIR then holds

    train_000.bin ...   val_000.bin ...   tokenizer.model   meta.json (sizes, and in nats what token frequencies alone achieve)

The same inputs and options give the same bytes. Everything is written to DIR/.partial, synced and then renamed, so DIR
never shows half a result; DIR/.prepared.json remembers what it was made from, so that asking again costs nothing.
"""

import argparse
import fcntl
import glob
import hashlib
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import numpy as np
    import sentencepiece
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"prepare: Python module '{error.name}' is missing; run scripts/setup.sh and then .venv/bin/python -m data.prepare")

from data.corpus import DATASETS, Corpus, Document, text_files
from data.shards import MAX_VOCAB_SIZE, PrepareError, ShardWriter, fingerprint, sync_folder, write_synced

RECIPE = 2  # raise it when the same options begin to give other bytes
STAMP = ".prepared.json"
SPLITS = ("train", "val")

# ------------------------------------------------------------------------------------------------------------- options


def number(text: str) -> int:
    """100, 64k, 100m, 1.5b: the suffixes of train_samba."""
    factor = {"k": 10**3, "m": 10**6, "b": 10**9}.get(text[-1:].lower(), 1)
    try:
        value = float(text[:-1] if factor > 1 else text) * factor
        if value < 1 or value != int(value):
            raise ValueError
        return int(value)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1 (suffixes k, m, b)") from None


def fraction(text: str) -> float:
    try:
        value = float(text)
        if not 0 <= value < 1:
            raise ValueError
        return value
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 0 up to, but not including, 1") from None


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise PrepareError(f"{message}; see python -m data.prepare --help")


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m data.prepare", description="Turns text into token shards for train_samba.", allow_abbrev=False)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the result")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--dataset", choices=sorted(DATASETS), help="built-in corpus (default: stdlib, the Python standard library)")
    source.add_argument("--text", nargs="+", metavar="GLOB", help=".txt files (a document each) and .jsonl files (field text, a document a line)")
    parser.add_argument("--with-tests", action="store_true", help="stdlib: its test folders too")
    tokenizer = parser.add_mutually_exclusive_group()
    tokenizer.add_argument("--vocab-size", type=number, metavar="N", help="train a tokenizer of N tokens (default 4096)")
    tokenizer.add_argument("--tokenizer", metavar="FILE", help="use this SentencePiece model instead")
    parser.add_argument("--tokenizer-sample", type=number, default=64_000_000, metavar="CHARS", help="text to train the tokenizer on (default 64m)")
    parser.add_argument("--val-fraction", type=fraction, default=0.02, metavar="F", help="share of the documents held out (default 0.02)")
    parser.add_argument("--shard-tokens", type=number, default=100_000_000, metavar="N", help="largest shard (default 100m)")
    options = parser.parse_args(arguments)
    # Defaults come after parsing: argparse would not see a default value that is spelt out as excluding the other option.
    options.dataset = options.dataset or (None if options.text else "stdlib")
    options.vocab_size = options.vocab_size or (None if options.tokenizer else 4096)
    if options.with_tests and options.text:
        parser.error("--with-tests belongs to --dataset stdlib, not to --text")
    if options.vocab_size and options.vocab_size > MAX_VOCAB_SIZE:
        raise PrepareError(f"--vocab-size {options.vocab_size}: shards store uint16 tokens; ask for at most {MAX_VOCAB_SIZE}")
    return options


def open_corpus(options: argparse.Namespace) -> Corpus:
    return text_files(options.text) if options.text else DATASETS[options.dataset](with_tests=options.with_tests)


# ------------------------------------------------------------------------------------------------------------ progress


class Progress:
    """A bar on a terminal; elsewhere (a log file, CI) at most a line every ten seconds. Both on stderr."""

    def __init__(self, what: str, total: int):
        self.what, self.total, self.done = what, total, 0
        self.bar = tqdm(desc=what, total=total, unit="B", unit_scale=True, file=sys.stderr) if sys.stderr.isatty() else None
        self.next_line = time.monotonic() + 10

    def __enter__(self) -> "Progress":
        if not self.bar:
            print(f"{self.what}: {self.total / 1e6:.1f} MB", file=sys.stderr)
        return self

    def __exit__(self, *_):
        if self.bar:
            self.bar.close()

    def advance(self, amount: int) -> None:
        self.done += amount
        if self.bar:
            self.bar.update(amount)
        elif time.monotonic() >= self.next_line:
            print(f"{self.what}: {100 * self.done / max(self.total, 1):.0f} %", file=sys.stderr)
            self.next_line = time.monotonic() + 10


# ----------------------------------------------------------------------------------------------------------- tokenizer


def uniform_hash(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "little") / 2**64


def is_held_out(document: Document, val_fraction: float) -> bool:
    """By content, so that copies of a document never land on both sides."""
    return uniform_hash(document.text) < val_fraction


def blocks(text: str, size: int) -> Iterator[str]:
    """Consecutive pieces of text that end after a newline and, where lines allow, hold at most size characters."""
    start = 0
    while start < len(text):
        end = text.rfind("\n", start, start + size) + 1 or text.find("\n", start) + 1 or len(text)
        yield text[start : len(text) if start + size >= len(text) else end]
        start = len(text) if start + size >= len(text) else end


def sample_for_tokenizer(corpus: Corpus, options: argparse.Namespace) -> Iterator[str]:
    """Blocks of the training documents: all of a small corpus, an even and reproducible sample of a large one.

    Blocks, because the trainer drops "sentences" that are too long; with their newlines, because those are learnt too.
    """
    keep = options.tokenizer_sample / max(corpus.size, 1)
    with Progress("reading text to train the tokenizer on", corpus.size) as progress:
        for document in corpus.documents():
            progress.advance(document.source_bytes)
            if not is_held_out(document, options.val_fraction):
                for index, block in enumerate(blocks(document.text, 1000)):
                    if keep >= 1 or uniform_hash(f"{index} {block}") < keep:
                        yield block


def train_tokenizer(corpus: Corpus, options: argparse.Namespace) -> bytes:
    """A byte-pair model that gives every text back exactly.

    Identity normalisation, no dummy prefix and all white space kept: what goes in comes out. Runs of spaces may be tokens
    (indentation), characters that are not in the vocabulary become UTF-8 bytes. No text turns into <s> or </s>.
    """
    model = io.BytesIO()
    sample = sample_for_tokenizer(corpus, options)
    first = next((block for block in sample if block.strip()), None)
    if first is None:
        raise PrepareError(f"{corpus.description}: no text to train a tokenizer on{why_no_documents(corpus)}; give other files or --tokenizer FILE")

    def sentences():
        yield first
        yield from sample
        print(f"training a tokenizer of {options.vocab_size} tokens", file=sys.stderr)

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(), model_writer=model, model_type="bpe", vocab_size=options.vocab_size,
            unk_id=0, bos_id=1, eos_id=2, pad_id=-1, byte_fallback=True, character_coverage=0.9999,
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True, max_sentence_length=1 << 20,
            num_threads=4, minloglevel=2)  # num_threads is written into the model: fixed, for the same bytes everywhere
    except RuntimeError as error:
        reason = " ".join(str(error).split())[-200:]
        raise PrepareError(f"--vocab-size {options.vocab_size}: does not fit this text, give another (SentencePiece: {reason})") from None
    return model.getvalue()


class Tokenizer:
    def __init__(self, model: bytes, name: str):
        self.model, self.name = model, name
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, TypeError):
            raise PrepareError(f"{name}: not a SentencePiece model; give a tokenizer.model file") from None
        self.vocab_size, self.eos_id = self.processor.get_piece_size(), self.processor.eos_id()
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise PrepareError(f"{name}: vocabulary of {self.vocab_size}, but shards store uint16 tokens; use one of at most {MAX_VOCAB_SIZE}")
        if self.eos_id < 0:
            raise PrepareError(f"{name}: has no end-of-text token (eos); use a model trained with one")
        # Without a dummy prefix a text may be cut anywhere and its parts encoded one by one.
        self.may_cut = not self.processor.encode_as_pieces("a")[0].startswith("▁")
        escape = [self.processor.piece_to_id(piece) for piece in ("<0xE2>", "<0x96>", "<0x81>")]
        self.escape = escape if self.may_cut and self.processor.unk_id() not in escape else None

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """The tokens of each text and EOS. SentencePiece threads share the parts of all texts."""
        parts = [list(self._parts(text)) for text in texts]
        encoded = iter(self.processor.encode([part for some in parts for part in some if isinstance(part, str)], num_threads=os.cpu_count() or 1))
        result = []
        for some in parts:
            ids = [next(encoded) if isinstance(part, str) else part for part in some]
            result.append(np.concatenate([np.asarray(piece, dtype="<u2") for piece in [*ids, [self.eos_id]]]))
        return result

    def _parts(self, text: str) -> Iterator[str | list[int]]:
        """Text of bounded length, and the tokens of ▁ (U+2581) where it occurs.

        SentencePiece writes a space as that very character, so a ▁ of the text would come back as a space. Its three UTF-8
        bytes as byte tokens come back as themselves.
        """
        for block in blocks(text, 1 << 20) if self.may_cut else [text]:
            for index, part in enumerate(block.split("▁") if self.escape else [block]):
                if index:
                    yield self.escape
                if part:
                    yield part


def load_tokenizer(path: str) -> Tokenizer:
    return Tokenizer(Path(path).read_bytes(), path)


# -------------------------------------------------------------------------------------------------------------- shards


def why_no_documents(corpus: Corpus) -> str:
    return f" ({corpus.problems.count} left out, the first: {corpus.problems.named[0]})" if corpus.problems.count else ""


def batches(documents: Iterator[Document], characters: int = 1 << 22) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def tokenized(corpus: Corpus, tokenizer: Tokenizer) -> Iterator[tuple[Document, np.ndarray]]:
    """Every document with its tokens, in order. The place for several processes, should threads not do."""
    with Progress("tokenizing", corpus.size) as progress:
        for batch in batches(corpus.documents()):
            yield from zip(batch, tokenizer.encode([document.text for document in batch]))
            progress.advance(sum(document.source_bytes for document in batch))


def write_shards(corpus: Corpus, tokenizer: Tokenizer, options: argparse.Namespace, folder: Path) -> dict:
    """All shards of both splits; returns meta.json."""
    identity = (tokenizer.vocab_size, tokenizer.eos_id, fingerprint(tokenizer.model))
    writers = {split: ShardWriter(folder, split, options.shard_tokens, *identity) for split in SPLITS}
    totals = {split: {"documents": 0, "characters": 0} for split in SPLITS}
    empty = 0
    for document, tokens in tokenized(corpus, tokenizer):
        if not document.text:
            empty += 1
            continue
        split = "val" if is_held_out(document, options.val_fraction) else "train"
        writers[split].append(tokens)
        totals[split]["documents"] += 1
        totals[split]["characters"] += len(document.text)
    for split, writer in writers.items():
        writer.close()
        totals[split] |= {"tokens": writer.tokens, "shards": writer.files}
    if not totals["train"]["documents"]:
        raise PrepareError(f"{corpus.description}: no documents to train on{why_no_documents(corpus)}; give other files or a smaller --val-fraction")
    entropy, cross_entropy = unigram_statistics(writers["train"].counts, writers["val"].counts)
    return {
        "source": corpus.description, "vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id,
        "tokenizer_fingerprint": f"{identity[2]:016x}", "val_fraction": options.val_fraction, **totals,
        "documents_left_out": corpus.problems.count, "documents_empty": empty,
        "unigram_entropy": entropy, "val_unigram_cross_entropy": cross_entropy,
    }  # fmt: skip


def unigram_statistics(train: np.ndarray, val: np.ndarray) -> tuple[float, float | None]:
    """What token frequencies alone achieve, in nats per token; a model that has learnt anything is below it.

    Entropy of the training tokens, and cross entropy of the held-out tokens under q = (count + 1) / (total + vocabulary).
    """
    p = train[train > 0] / train.sum()
    log_q = np.log((train + 1) / (train.sum() + len(train)))
    return float(-(p * np.log(p)).sum()), float(-(val * log_q).sum() / val.sum()) if val.any() else None


# -------------------------------------------------------------------------------------------------------------- output


def read_stamp(out: Path) -> dict:
    """What DIR was made from and which files (name: size) this program put there."""
    try:
        return json.loads((out / STAMP).read_bytes())
    except (FileNotFoundError, ValueError):
        return {"inputs": None, "files": {}}


def write_stamp(out: Path, inputs: str | None, files: dict) -> None:
    write_synced(out / (STAMP + ".new"), json.dumps({"inputs": inputs, "files": files}, indent=1).encode())
    os.replace(out / (STAMP + ".new"), out / STAMP)
    sync_folder(out)


def describe_inputs(corpus: Corpus, options: argparse.Namespace) -> str:
    relevant = {name: value for name, value in vars(options).items() if name not in ("out", "text")}
    if options.tokenizer:
        relevant["tokenizer"] = hashlib.sha256(Path(options.tokenizer).read_bytes()).hexdigest()
        del relevant["tokenizer_sample"]
    return hashlib.sha256(json.dumps([RECIPE, relevant, corpus.description, corpus.identity()]).encode()).hexdigest()


def is_done(out: Path, inputs: str) -> bool:
    stamp = read_stamp(out)
    return stamp["inputs"] == inputs and all(
        (out / name).is_file() and (out / name).stat().st_size == size for name, size in stamp["files"].items())  # fmt: skip


def refuse_foreign_shards(out: Path) -> None:
    """Shards that this program did not write are neither replaced nor left to be trained on by mistake."""
    own = read_stamp(out)["files"]
    for split in SPLITS:
        for path in sorted(glob.glob(f"{glob.escape(str(out))}/{split}_*.bin")):
            if os.path.basename(path) not in own:
                raise PrepareError(f"{path}: exists, and data.prepare did not write it; move it away or choose another --out")


def lock(out: Path) -> int:
    descriptor = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PrepareError(f"--out {out}: another data.prepare is writing there; wait for it or choose another folder") from None
    except OSError:
        pass  # a file system without locks
    return descriptor


def publish(partial: Path, out: Path, inputs: str) -> None:
    """Renames everything into place. The stamp owns old and new files meanwhile, so a crash leaves nothing unaccounted for."""
    old = read_stamp(out)["files"]
    new = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
    sync_folder(partial)
    write_stamp(out, None, old | new)
    for name in new:
        os.replace(partial / name, out / name)
    for name in old.keys() - new.keys():
        (out / name).unlink(missing_ok=True)
    write_stamp(out, inputs, new)
    partial.rmdir()


def prepare(options: argparse.Namespace) -> None:
    started = time.monotonic()
    out = Path(options.out)
    corpus = open_corpus(options)
    inputs = describe_inputs(corpus, options)
    if is_done(out, inputs):
        print(f"{out}: already prepared from {corpus.description} with these options, nothing to do")
        return
    out.mkdir(parents=True, exist_ok=True)
    descriptor = lock(out)
    partial = out / ".partial"
    try:
        refuse_foreign_shards(out)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else Tokenizer(train_tokenizer(corpus, options), "tokenizer.model")
        meta = write_shards(corpus, tokenizer, options, partial)
        write_synced(partial / "tokenizer.model", tokenizer.model)
        write_synced(partial / "meta.json", (json.dumps(meta, indent=2) + "\n").encode())
        publish(partial, out, inputs)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(descriptor)
    report(corpus, meta, out, time.monotonic() - started)


def report(corpus: Corpus, meta: dict, out: Path, seconds: float) -> None:
    for line in corpus.problems.lines():
        print(f"warning: {line}", file=sys.stderr)
    print(f"{out}: prepared from {corpus.description} in {seconds:.0f} s; vocabulary {meta['vocab_size']}, {corpus.problems.count} documents left out")
    for split in SPLITS:
        one = meta[split]
        print(f"  {split:5} {one['documents']:>9,} documents {one['characters']:>13,} characters {one['tokens']:>12,} tokens {len(one['shards']):>4} shards")
    print(f"  unigram entropy {meta['unigram_entropy']:.4f} nats per token", end="")
    print(f", on val {meta['val_unigram_cross_entropy']:.4f}" if meta["val"]["tokens"] else "")
    if not meta["val"]["documents"]:
        print(f"warning: none of the {meta['train']['documents']} documents is held out, so there is no val_000.bin; "
              "give more files (or split a long one) or a larger --val-fraction", file=sys.stderr)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    try:
        prepare(parse_options(arguments))
        return 0
    except PrepareError as error:
        print(f"prepare: {error}", file=sys.stderr)
    except OSError as error:
        print(f"prepare: {error.filename or 'output'}: {error.strerror}; check path, permissions and free space", file=sys.stderr)
    except KeyboardInterrupt:
        print("prepare: interrupted; run the same command to start again", file=sys.stderr)
        return 130
    return 1


if __name__ == "__main__":
    sys.exit(main())
