"""From text to token shards: python -m data.prepare --out DIR [--dataset NAME | --text FILE...] [--vocab-size N | --tokenizer FILE]

Reads documents (data/corpus.py, data/sources.py), trains a tokenizer on those that are not held out or takes one
(data/tokenizer.py), and turns each document into tokens and an end-of-text token on all cores (data/pipeline.py). DIR then holds

    train_000.bin ...  val_000.bin ...   token shards (data/shards.py)
    tokenizer.model                      or tokenizer.json, tokenizer.tiktoken; and tokenizer.bytes, what each token stands for
    meta.json                            sizes, and in nats what token frequencies alone achieve
    manifest.json                        size and SHA-256 of each shard
    left_out.txt                         inputs that had to be left out, if any: FILE:LINE: why

The same inputs and options give the same bytes, whatever the number of processes. Everything is written to DIR/.partial, synced
and then renamed, so DIR never shows half a result. After a crash the same command goes on where it was. DIR/.prepared.json
remembers what DIR was made from, so that asking again costs nothing.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import numpy as np
    from tqdm import tqdm

    from data.corpus import RECIPES, Corpus, Stream, hub, open_recipe, standard_input, stdlib, text_files
    from data.pipeline import SPLITS, Settings, is_held_out, named_problems, uniform_hash, write_shards
    from data.result_folder import WORK, begin, is_done, is_ready, lock, publish, ready, refuse_foreign_shards, remove_leftovers
    from data.shards import LITPKDS_CHUNK, MAX_VOCAB_SIZE, WRITERS, Journal, PrepareError, ResumableError, fingerprint, write_synced
    from data.sources import FORMS, Tally
    from data.tokenizer import Tokenizer, blocks, id_bytes_file, load_tokenizer, tokenizer_of, train_tokenizer
except ImportError as error:
    sys.exit(f"prepare: Python module '{error.name}' is missing; run scripts/setup.sh and then .venv/bin/python -m data.prepare")

RECIPE = 3  # raise it when the same options begin to give other bytes

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


EXAMPLES = """examples:
  python -m data.prepare --out data/stdlib --vocab-size 4096
  python -m data.prepare --out data/mine --text corpus/ 'more/*.jsonl.zst' --tokenizer llama2/tokenizer.model
  python -m data.prepare --out data/slim --dataset slimpajama --from /data/SlimPajama-627B --tokenizer llama2/tokenizer.model
  python -m data.prepare --out data/wiki --dataset wikimedia/wikipedia --config 20231101.en --tokenizer gpt2
  zcat dump.jsonl.gz | python -m data.prepare --out data/dump --text - --tokenizer tokenizer.json
"""


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m data.prepare", epilog=EXAMPLES, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                    description="Turns text into token shards for train_samba. After a crash or Ctrl-C, the same command goes on.")  # fmt: skip
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the result")
    inputs = parser.add_argument_group("what to read")
    source = inputs.add_mutually_exclusive_group()
    names = f"stdlib (default: the Python standard library), {', '.join(RECIPES)}; or OWNER/NAME of the Hugging Face hub, streamed"
    source.add_argument("--dataset", metavar="NAME", help=names)
    source.add_argument("--text", nargs="+", metavar="GLOB", help=f"files or folders of {', '.join(FORMS)}; - reads JSON lines from standard input")
    inputs.add_argument("--from", dest="clone", metavar="DIR", help="a named dataset's local clone, instead of the hub")
    inputs.add_argument("--config", metavar="NAME", help="configuration of a hub dataset")
    inputs.add_argument("--split", default="train", metavar="NAME", help="split of a dataset (default train)")
    inputs.add_argument("--field", metavar="NAME", help="field or column that holds the document (default text)")
    inputs.add_argument("--separator", metavar="LINE",
                        help=".txt files: lines that equal this end a document ('' for blank lines); default: a file is one")  # fmt: skip
    inputs.add_argument("--with-tests", action="store_true", help="stdlib: its test folders too")
    tokens = parser.add_argument_group("how to tokenize")
    tokenizer = tokens.add_mutually_exclusive_group()
    tokenizer.add_argument("--vocab-size", type=number, metavar="N", help="train a SentencePiece tokenizer of N tokens (default 4096)")
    tokenizer.add_argument("--tokenizer", metavar="FILE",
                           help="use this instead: SentencePiece .model, Hugging Face tokenizer.json, .tiktoken, or gpt2")  # fmt: skip
    tokens.add_argument("--eos", metavar="TOKEN", help="end-of-text token of a tokenizer.json, where it is not one of the usual")
    tokens.add_argument("--tokenizer-sample", type=number, default=64_000_000, metavar="CHARS", help="text to train the tokenizer on (default 64m)")
    result = parser.add_argument_group("what to write")
    result.add_argument("--val-fraction", type=fraction, default=0.02, metavar="F",
                        help="share of the documents held out, by a hash of their text (default 0.02)")  # fmt: skip
    result.add_argument("--shuffle", type=int, metavar="SEED", help="documents in an order drawn by SEED (default: as they come)")
    result.add_argument("--shard-tokens", type=number, metavar="N", help="largest shard (default 100m; litpkds 2,098,176)")
    result.add_argument("--format", choices=sorted(WRITERS), default="shard",
                        help="litpkds: the files of the official trainer (a last, unfilled file is left out, as there)")  # fmt: skip
    result.add_argument("--processes", type=number, metavar="N", help="default: as many as there are cores; the result is the same")
    options = parser.parse_args(arguments)
    # Defaults come after parsing: argparse would not see a default value that is spelt out as excluding the other option.
    options.dataset = options.dataset or (None if options.text else "stdlib")
    options.vocab_size = options.vocab_size or (None if options.tokenizer else 4096)
    options.shard_tokens = options.shard_tokens or (LITPKDS_CHUNK if options.format == "litpkds" else 100_000_000)
    options.processes = options.processes or len(os.sched_getaffinity(0))
    check_options(options)
    return options


def check_options(options: argparse.Namespace) -> None:
    if options.vocab_size and options.vocab_size > MAX_VOCAB_SIZE:
        raise PrepareError(f"--vocab-size {options.vocab_size}: shards store uint16 tokens; ask for at most {MAX_VOCAB_SIZE}")
    if options.shuffle is not None and not 0 <= options.shuffle < 2**63:
        raise PrepareError(f"--shuffle {options.shuffle}: give a seed from 0 to 2^63 - 1")
    if options.dataset and options.dataset not in ("stdlib", *RECIPES) and "/" not in options.dataset:
        raise PrepareError(f"--dataset {options.dataset}: unknown; choose stdlib, {', '.join(RECIPES)}, or OWNER/NAME of the hub")
    misplaced = [
        ("--with-tests", options.with_tests and options.dataset != "stdlib", "--dataset stdlib"),
        ("--from", options.clone and options.dataset not in RECIPES, "a named --dataset"),
        ("--config", options.config and not options.dataset, "--dataset"),
        ("--separator", options.separator is not None and not options.text, "--text"),
        ("--eos", options.eos and not options.tokenizer, "--tokenizer tokenizer.json"),
    ]
    for option, wrong, owner in misplaced:
        if wrong:
            raise PrepareError(f"{option} belongs to {owner}; leave it out, or see python -m data.prepare --help")
    if options.text and "-" in options.text and (len(options.text) > 1 or not options.tokenizer):
        raise PrepareError("--text -: standard input is read once, alone and with a ready tokenizer; give --tokenizer FILE and no other file")


def open_corpus(options: argparse.Namespace) -> Corpus | Stream:
    field = options.field or "text"
    if options.text:
        return standard_input(field) if options.text == ["-"] else text_files(options.text, field, options.separator)
    if options.dataset == "stdlib":
        return stdlib(with_tests=options.with_tests)
    if options.dataset in RECIPES:
        return open_recipe(options.dataset, options.clone, options.config, options.split, options.field, Path(options.out) / ".downloads")
    return hub(options.dataset, options.config, options.split, field)


# ------------------------------------------------------------------------------------------------------------ progress


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f}s"
    if seconds < 3600:
        return f"{seconds // 60:.0f}m{seconds % 60:02.0f}s"
    return f"{seconds // 3600:.0f}h{seconds % 3600 // 60:02.0f}m"


class Progress:
    """A bar on a terminal; elsewhere (a log file, CI) at most a line every ten seconds. Both on stderr."""

    def __init__(self, what: str, total: int):
        self.what, self.total, self.done, self.earlier, self.tokens, self.started = what, total, 0, 0, 0, time.monotonic()
        self.bar = tqdm(desc=what, total=total or None, unit="B", unit_scale=True, file=sys.stderr) if sys.stderr.isatty() else None
        self.next_line = time.monotonic() + 10

    def __enter__(self) -> "Progress":
        if not self.bar:
            print(f"{self.what}: {self.total / 1e6:.1f} MB" if self.total else f"{self.what}: a stream", file=sys.stderr)
        return self

    def __exit__(self, *_):
        if self.bar:
            self.bar.close()

    def advance(self, amount: int, tokens: int = 0, earlier: bool = False) -> None:
        """earlier: an earlier run did it, so it says nothing about speed."""
        self.done += amount
        self.earlier += amount if earlier else 0
        self.tokens += 0 if earlier else tokens
        seconds = max(time.monotonic() - self.started, 1e-3)
        rate = f"{self.tokens / seconds / 1e6:.2f}M tokens/s" if self.tokens else ""
        if self.bar:
            if earlier:
                self.bar.initial += amount
            self.bar.set_postfix_str(rate, refresh=False)
            self.bar.update(amount)
        elif time.monotonic() >= self.next_line:
            share = f" {100 * self.done / self.total:.0f} %" if self.total else f" {self.tokens / 1e6:.1f}M tokens"
            fresh = self.done - self.earlier
            left = f"ETA {duration(seconds * (self.total - self.done) / fresh)}" if self.total and fresh else ""
            print(f"{self.what}:{share}", *filter(None, [rate, left]), sep=", " if rate or left else "", file=sys.stderr)
            self.next_line = time.monotonic() + 10


# ----------------------------------------------------------------------------------------------------------- tokenizer


def sample_for_tokenizer(corpus: Corpus | Stream, options: argparse.Namespace, tally: Tally) -> Iterator[str]:
    """Blocks of the training documents: all of a small corpus, an even and reproducible sample of a large one, a stream's beginning.

    Blocks, because SentencePiece drops "sentences" that are too long; with their newlines, because those are learnt too.
    """
    wanted, taken = options.tokenizer_sample, 0
    if corpus.stream:
        texts, keep = (text for text in corpus.stream.read(0, tally) if text is not None), 1.0
    else:
        parts, size = corpus.parts(), unpacked_size(corpus)
        step = max(1, size // (4 * wanted))  # a large corpus is not read twice
        texts, keep = corpus.texts(parts[::step], tally), wanted * step / max(size, 1)
    print("reading text to train the tokenizer on", file=sys.stderr)
    for text in texts:
        if not is_held_out(text, options.val_fraction):
            for index, block in enumerate(blocks(text, 1000)):
                if keep >= 1 or uniform_hash(f"{index} {block}") < keep:
                    taken += len(block)
                    yield block
        if taken >= (wanted if corpus.stream else 2 * wanted):
            return


def unpacked_size(corpus: Corpus) -> int:
    """About: what text compresses to is a quarter or less."""
    return sum(os.path.getsize(corpus.root / name) * (1 if form in (".txt", ".jsonl") else 4) for name, form in corpus.sources)


def new_tokenizer(corpus: Corpus | Stream, options: argparse.Namespace) -> Tokenizer:
    tally = Tally()
    sample = sample_for_tokenizer(corpus, options, tally)
    first = next((block for block in sample if block.strip()), None)
    if first is None:
        why = f" ({tally.count} left out, the first: {first_problem(corpus, tally)})" if tally.count else ""
        raise PrepareError(f"{corpus.description}: no text to train a tokenizer on{why}; give other files or --tokenizer FILE")

    def sentences():
        yield first
        yield from sample

    return tokenizer_of(train_tokenizer(sentences(), options.vocab_size), "tokenizer.model")


def first_problem(corpus: Corpus | Stream, tally: Tally) -> str:
    line, what = tally.problems[0]
    source = corpus.sources[0].name if not corpus.stream and len(corpus.sources) == 1 else corpus.description
    return f"{source}:{line}: {what}" if line else f"{source}: {what}"


def stored_tokenizer(work: Path, corpus: Corpus | Stream, options: argparse.Namespace) -> tuple[Tokenizer, Path]:
    """A run that goes on takes the tokenizer that it began with."""
    for path in work.glob("tokenizer.*"):
        if path.suffix in (".model", ".json", ".tiktoken"):
            return tokenizer_of(path.read_bytes(), str(path), options.eos), path
    tokenizer = load_tokenizer(options.tokenizer, options.eos) if options.tokenizer else new_tokenizer(corpus, options)
    path = work / tokenizer.file_name
    write_synced(work / "tokenizer.new", tokenizer.model)
    os.replace(work / "tokenizer.new", path)
    return tokenizer, path


# -------------------------------------------------------------------------------------------------------------- result


def make_result(corpus: Corpus | Stream, options: argparse.Namespace, work: Path) -> dict:
    """Writes everything that DIR will hold; returns meta.json."""
    tokenizer, tokenizer_path = stored_tokenizer(work, corpus, options)
    identity = (tokenizer.vocab_size, tokenizer.eos_id, fingerprint(tokenizer.model))
    # More than a thousand shards get longer names from the start, because names are sorted as text
    few = not corpus.stream and 5 * unpacked_size(corpus) < 1000 * options.shard_tokens
    journal = Journal(work / "journal.jsonl")
    writers = {split: WRITERS[options.format](work, split, options.shard_tokens, *identity, journal, 3 if few else 6) for split in SPLITS}
    settings = Settings(str(work), str(tokenizer_path), options.eos, options.val_fraction, options.format == "litpkds", options.shuffle is not None)
    with Progress("tokenizing", corpus.size) as progress:
        records = write_shards(corpus, settings, tokenizer, writers, options.processes, options.shuffle, progress.advance)
    meta = summary(corpus, options, tokenizer, writers, records)
    check_result(corpus, options, writers, meta, next(named_problems(records), ""))
    manifest = {entry["file"]: {key: entry[key] for key in ("tokens", "bytes", "sha256")} for entry in journal.entries}
    write_synced(work / "manifest.json", (json.dumps({"tokenizer_fingerprint": f"{identity[2]:016x}", "shards": manifest}, indent=1) + "\n").encode())
    write_synced(work / "tokenizer.bytes", id_bytes_file(tokenizer))
    write_synced(work / "meta.json", (json.dumps(meta, indent=2) + "\n").encode())
    if meta["documents_left_out"]:
        named = list(named_problems(records))
        unnamed = meta["documents_left_out"] - len(named)
        write_synced(work / "left_out.txt", "".join(f"{line}\n" for line in [*named, *([f"and {unnamed} more"] if unnamed else [])]).encode())
    return meta


def summary(corpus: Corpus | Stream, options: argparse.Namespace, tokenizer: Tokenizer, writers: dict, records: list[dict]) -> dict:
    entropy, cross_entropy = unigram_statistics(writers["train"].counts, writers["val"].counts)
    splits = {
        split: {kind: sum(record[kind][split] for record in records) for kind in ("documents", "characters")}
        | {"tokens": writer.tokens, "shards": writer.files}
        for split, writer in writers.items()
    }
    return {
        "source": corpus.description, "vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id,
        "tokenizer_fingerprint": f"{fingerprint(tokenizer.model):016x}", "val_fraction": options.val_fraction, **splits,
        "documents_left_out": sum(record["left_out"] for record in records), "documents_empty": sum(record["empty"] for record in records),
        "tokens_dropped": sum(writer.dropped for writer in writers.values()),
        "unigram_entropy": entropy, "val_unigram_cross_entropy": cross_entropy,
    }  # fmt: skip


def check_result(corpus: Corpus | Stream, options: argparse.Namespace, writers: dict, meta: dict, first: str) -> None:
    if not meta["train"]["documents"]:
        why = f" ({meta['documents_left_out']} left out, the first: {first})" if first else ""
        raise PrepareError(f"{corpus.description}: no documents to train on{why}; give other files or a smaller --val-fraction")
    if not meta["train"]["shards"]:
        dropped = writers["train"].dropped
        raise PrepareError(
            f"{corpus.description}: {dropped} tokens fill no file of {options.shard_tokens}; give more text or a smaller --shard-tokens"
        )


def unigram_statistics(train: np.ndarray, val: np.ndarray) -> tuple[float, float | None]:
    """What token frequencies alone achieve, in nats per token; a model that has learnt anything is below it.

    Entropy of the training tokens, and cross entropy of the held-out tokens under q = (count + 1) / (total + vocabulary).
    """
    if not train.any():
        return 0.0, None
    p = train[train > 0] / train.sum()
    log_q = np.log((train + 1) / (train.sum() + len(train)))
    return float(-(p * np.log(p)).sum()), float(-(val * log_q).sum() / val.sum()) if val.any() else None


# ----------------------------------------------------------------------------------------------------------------- run


def describe_inputs(corpus: Corpus | Stream, options: argparse.Namespace) -> str:
    relevant = {name: value for name, value in vars(options).items() if name not in ("out", "text", "processes")}
    if options.tokenizer and Path(options.tokenizer).exists():
        relevant["tokenizer"] = hashlib.sha256(load_tokenizer(options.tokenizer, options.eos).model).hexdigest()
        del relevant["tokenizer_sample"]
    return hashlib.sha256(json.dumps([RECIPE, relevant, corpus.description, corpus.identity()]).encode()).hexdigest()


def prepare(options: argparse.Namespace) -> None:
    started = time.monotonic()
    out = Path(options.out)
    corpus = open_corpus(options)
    inputs = describe_inputs(corpus, options)
    if is_done(out, inputs if not corpus.stream or corpus.stream.can_reread else None):
        remove_leftovers(out, inputs)
        print(f"{out}: already prepared from {corpus.description} with these options, nothing to do")
        return
    out.mkdir(parents=True, exist_ok=True)
    descriptor = lock(out)
    work = out / WORK
    try:
        refuse_foreign_shards(out, work)
        begin(out, work, inputs)
        if not is_ready(work):
            meta = make_result(corpus, options, work)
            ready(work, published(meta))
        publish(work, out, inputs)
    except ResumableError:
        raise
    except PrepareError:  # the same command would come to the same end
        shutil.rmtree(work, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)
    report(corpus, out, time.monotonic() - started)


def published(meta: dict) -> set[str]:
    shards = [name for split in SPLITS for name in meta[split]["shards"]]
    return {*shards, "meta.json", "manifest.json", "left_out.txt", "tokenizer.bytes", "tokenizer.model", "tokenizer.json", "tokenizer.tiktoken"}


def report(corpus: Corpus | Stream, out: Path, seconds: float) -> None:
    meta = json.loads((out / "meta.json").read_bytes())
    if meta["documents_left_out"]:
        lines = (out / "left_out.txt").read_text().splitlines()
        for line in lines[:10]:
            print(f"warning: {line}", file=sys.stderr)
        if meta["documents_left_out"] > 10:
            print(f"warning: {meta['documents_left_out']} left out in all; {out}/left_out.txt has them", file=sys.stderr)
    print(f"{out}: prepared from {corpus.description} in {seconds:.0f} s;", end=" ")
    print(f"vocabulary {meta['vocab_size']}, {meta['documents_left_out']} documents left out")
    for split in SPLITS:
        one = meta[split]
        counts = f"{one['documents']:>9,} documents {one['characters']:>13,} characters {one['tokens']:>12,} tokens"
        print(f"  {split:5} {counts} {len(one['shards']):>4} shards")
    print(f"  unigram entropy {meta['unigram_entropy']:.4f} nats per token", end="")
    print(f", on val {meta['val_unigram_cross_entropy']:.4f}" if meta["val"]["tokens"] else "")
    if meta["tokens_dropped"]:
        print(f"  {meta['tokens_dropped']:,} tokens at the end fill no file and are left out, as the official script does it")
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
        what = f"{error.filename or 'output'}: {error.strerror}"
        print(f"prepare: {what}; check path, permissions and free space, and run again to go on", file=sys.stderr)
    except KeyboardInterrupt:
        print("prepare: interrupted; run the same command to go on", file=sys.stderr)
        return 130
    return 1


if __name__ == "__main__":
    sys.exit(main())
