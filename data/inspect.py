"""What a token shard holds: python -m data.inspect SHARD... [--samples N] [--png FILE]

Prints header, counts, documents and decoded samples, draws how often tokens occur, and compares the file with the checksum in
the manifest.json beside it. Reads this project's, llm.c's and LITPKDS shards; the tokenizer is the one beside the shard.
The exit status is 1 if a shard is damaged.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from data.shards import PrepareError, fingerprint, read_header, read_tokens, sha256_of
from data.tokenizer import Tokenizer, load_tokenizer

CHUNK = 1 << 24  # tokens counted at once


def find_tokenizer(path: Path, given: str | None, header: dict) -> Tokenizer | None:
    beside = [path.parent / name for name in ("tokenizer.model", "tokenizer.json", "tokenizer.tiktoken")]
    name = given or next((str(file) for file in beside if file.exists()), None)
    if name is None:
        return None
    tokenizer = load_tokenizer(name)
    if header["fingerprint"] and header["fingerprint"] != fingerprint(tokenizer.model):
        fingerprints = f"fingerprint {fingerprint(tokenizer.model):016x}, in the header {header['fingerprint']:016x}"
        raise PrepareError(f"{name}: is not the tokenizer that {path} was made with ({fingerprints})")
    return tokenizer


def check_sum(path: Path) -> tuple[str, bool]:
    """What to say, and whether the file is as it was made."""
    manifest = path.parent / "manifest.json"
    entry = json.loads(manifest.read_bytes())["shards"].get(path.name) if manifest.exists() else None
    if entry is None:
        return "no manifest.json beside it has it", True
    if sha256_of(path) == entry["sha256"]:
        return "SHA-256 as in manifest.json", True
    return "DAMAGED: SHA-256 is not the one in manifest.json; make it again", False


def statistics(tokens: np.ndarray, eos: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each token occurs, and where documents end; in bounded memory."""
    counts, ends = np.zeros(65536, dtype=np.int64), []
    for start in range(0, len(tokens), CHUNK):
        chunk = np.asarray(tokens[start : start + CHUNK])
        counts += np.bincount(chunk, minlength=len(counts))
        ends.append(np.flatnonzero(chunk == eos) + start)
    return counts, np.concatenate([np.zeros(0, dtype=np.int64), *ends])


def draw(counts: np.ndarray, path: Path, png: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_rank = np.sort(counts[counts > 0])[::-1]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    left.loglog(np.arange(1, len(by_rank) + 1), by_rank)
    left.set(title="by rank", xlabel="rank of the token", ylabel="occurrences")
    ids = np.flatnonzero(counts)
    right.semilogy(ids, counts[ids], ".", markersize=2)
    right.set(title="by id", xlabel="token id", ylabel="occurrences")
    figure.suptitle(f"{path.name}: {counts.sum():,} tokens, {len(ids):,} different", fontsize=11)
    figure.savefig(png, dpi=120)
    pyplot.close(figure)


def show(text: str, limit: int = 160) -> str:
    return json.dumps(text[:limit] + ("…" if len(text) > limit else ""), ensure_ascii=False)


def print_samples(tokens: np.ndarray, ends: np.ndarray, tokenizer: Tokenizer, samples: int) -> None:
    """Beginnings of documents spread over the shard"""
    starts = np.concatenate([[0], ends + 1])
    starts = starts[starts < len(tokens)]
    for start in starts[np.unique(np.linspace(0, len(starts) - 1, min(samples, len(starts))).astype(int))].tolist():
        ids = np.asarray(tokens[start : start + 64]).tolist()
        if tokenizer.eos_id in ids:
            ids = ids[: ids.index(tokenizer.eos_id)]
        print(f"  at {start:>12,}  {show(tokenizer.decode(ids))}")


def inspect(path: Path, options: argparse.Namespace) -> bool:
    header = read_header(path)
    tokens = read_tokens(path)
    tokenizer = find_tokenizer(path, options.tokenizer, header)
    eos = header["eos_id"] if header["eos_id"] >= 0 else tokenizer.eos_id if tokenizer else -1
    counts, ends = statistics(tokens, eos)
    said = lambda value, none: "not said" if value == none else value  # noqa: E731
    print(f"{path}: {header['format']}, {path.stat().st_size:,} bytes")
    print(f"  tokens       {header['tokens']:,}, {np.count_nonzero(counts):,} different, largest {int(np.flatnonzero(counts).max(initial=0))}")
    tokenizer_said = said(format(header["fingerprint"], "016x"), "0" * 16)
    print(f"  vocabulary   {said(header['vocab_size'], 0)}   EOS {said(header['eos_id'], -1)}   tokenizer fingerprint {tokenizer_said}")
    lengths = np.diff(np.concatenate([[-1], ends]))
    if len(ends):
        lengths_said = f"median {int(np.median(lengths)):,}, mean {lengths.mean():,.1f}, longest {lengths.max():,}"
        print(f"  documents    {len(ends):,} end here; tokens of each with EOS: {lengths_said}")
    outside = int(counts[header["vocab_size"] :].sum()) if header["vocab_size"] else 0
    if outside:
        print(f"  DAMAGED: {outside:,} tokens outside the vocabulary")
    message, good = check_sum(path)
    print(f"  checksum     {message}")
    if tokenizer:
        print_samples(tokens, ends, tokenizer, options.samples)
    if options.png:
        draw(counts, path, Path(options.png))
        print(f"  histogram    {options.png}")
    return good and not outside


def main(arguments: list[str] | None = None) -> int:
    description = "What a token shard holds, and whether it is whole."
    parser = argparse.ArgumentParser(prog="python -m data.inspect", description=description, allow_abbrev=False)
    parser.add_argument("shards", nargs="+", metavar="SHARD")
    parser.add_argument("--samples", type=int, default=5, metavar="N", help="beginnings of documents to show (default 5)")
    parser.add_argument("--tokenizer", metavar="FILE", help="default: the one beside the shard")
    parser.add_argument("--png", metavar="FILE", help="draw how often tokens occur (of the last shard, if there are several)")
    options = parser.parse_args(arguments)
    try:
        return 0 if all([inspect(Path(name), options) for name in options.shards]) else 1
    except PrepareError as error:
        print(f"inspect: {error}", file=sys.stderr)
    except OSError as error:
        print(f"inspect: {error.filename}: {error.strerror}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
