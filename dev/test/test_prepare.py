"""data/prepare.py: what comes out is exactly what went in, the same every time, or a line that says why not."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from data import prepare  # noqa: E402
from data.corpus import Corpus, stdlib  # noqa: E402
from data.shards import MAGIC, Journal, ShardWriter, fingerprint, make_header, read_header, read_tokens  # noqa: E402
from data.tokenizer import SentencePieceTokenizer, load_tokenizer  # noqa: E402

TRICKY = [
    "def f(x):\n\tif x:\n\t\t  return '  two  '\n\n\n",
    "    leading, trailing   \n   \n\t\n",
    " ",
    "\n",
    "no newline at the end",
    "windows\r\nold mac\rform feed\x0cvertical\x0bnul\x00bell\x07",
    "▁ is what SentencePiece calls a space: ▁▁ x▁\n",
    "<unk><s></s><pad><0x0A><0xE2> are text, not tokens\n",
    "é e\u0301 ﬁ ½ Å 中文 \u00a0\u3000\u2028 \ufeff\u200b 😀👩‍👩‍👧 \U0010fffd",
    "a" * 5000 + " " * 3000 + "\n" * 100,
]


def run(*arguments) -> int:
    return prepare.main([str(argument) for argument in arguments])


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.startswith(".")}


def documents_in(path: Path, eos: int) -> list[list[int]]:
    tokens = np.asarray(read_tokens(path))
    assert tokens[-1] == eos
    return [part.tolist()[:-1] for part in np.split(tokens, np.flatnonzero(tokens == eos) + 1)[:-1]]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """150 files of the standard library as .txt, and the tricky texts as .jsonl."""
    folder = tmp_path_factory.mktemp("sources")
    for index, text in zip(range(150), stdlib().texts()):
        (folder / f"{index:03d}.txt").write_bytes(text[:20_000].encode())
    (folder / "tricky.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TRICKY))
    return folder


@pytest.fixture(scope="module")
def prepared(sources, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "set"
    assert run("--text", sources / "*.txt", sources / "tricky.jsonl", "--vocab-size", 1024, "--val-fraction", 0.1, "--out", out) == 0
    return out


@pytest.fixture(scope="module")
def tokenizer(prepared) -> SentencePieceTokenizer:
    return load_tokenizer(str(prepared / "tokenizer.model"))


# ----------------------------------------------------------------------------------------------------------- tokenizer


@pytest.mark.parametrize("text", TRICKY)
def test_round_trip_of_tricky_text(tokenizer, text):
    tokens = tokenizer.encode([text])[0].tolist()
    assert tokens.pop() == tokenizer.eos_id
    assert tokenizer.processor.decode(tokens) == text
    assert not {0, 1, 2} & set(tokens)  # neither unknown nor control tokens come out of text


def test_round_trip_of_python_source(tokenizer):
    texts = [text for text, _ in zip(stdlib().texts(), range(300)) if text][-60:]
    for text, tokens in zip(texts, tokenizer.encode(texts)):
        assert tokenizer.processor.decode(tokens.tolist()[:-1]) == text


def test_tokens_of_a_text_do_not_depend_on_its_neighbours(tokenizer):
    texts = [text for text in TRICKY for _ in range(2)]
    together = tokenizer.encode(texts)
    assert all(np.array_equal(tokens, tokenizer.encode([text])[0]) for text, tokens in zip(texts, together))


def test_indentation_is_a_token(tokenizer):
    assert len(tokenizer.encode([" " * 4])[0]) == 2  # four spaces and EOS


def test_special_ids(tokenizer):
    processor = tokenizer.processor
    assert (processor.unk_id(), processor.bos_id(), processor.eos_id(), processor.get_piece_size()) == (0, 1, 2, 1024)


def test_blocks_put_together_are_the_text():
    for text in [*TRICKY, "x\n" * 3000, "long line " * 400 + "\nshort\n"]:
        for size in (1, 7, 1000):
            pieces = list(prepare.blocks(text, size))
            assert "".join(pieces) == text and all(pieces)
            assert all(piece.endswith("\n") or len(piece) == 8 * size for piece in pieces[:-1])


# -------------------------------------------------------------------------------------------------------------- shards


def test_header_and_counts(prepared):
    meta = json.loads((prepared / "meta.json").read_text())
    model = (prepared / "tokenizer.model").read_bytes()
    assert fingerprint(b"foobar") == 0x85944171F73967E8     # published test vector of 64-bit FNV-1a
    for split in ("train", "val"):
        raw = (prepared / f"{split}_000.bin").read_bytes()
        words = np.frombuffer(raw[:1024], dtype="<i4")
        count = (len(raw) - 1024) // 2
        assert list(words[:5]) == [20240520, 1, count, 1024, 2 + 1]
        assert int.from_bytes(raw[20:28], "little") == fingerprint(model) and not words[7:].any()
        assert meta[split]["tokens"] == count
        assert meta[split]["documents"] == int((read_tokens(prepared / f"{split}_000.bin") == 2).sum())
    assert meta["vocab_size"] == 1024 and meta["eos_id"] == 2 and int(meta["tokenizer_fingerprint"], 16) == fingerprint(model)


def test_unigram_statistics(prepared):
    meta = json.loads((prepared / "meta.json").read_text())
    train, val = (np.bincount(read_tokens(prepared / f"{split}_000.bin"), minlength=1024) for split in ("train", "val"))
    entropy = -sum(n / train.sum() * math.log(n / train.sum()) for n in train if n)
    cross = -sum(n * math.log((m + 1) / (train.sum() + 1024)) for n, m in zip(val, train)) / val.sum()
    assert meta["unigram_entropy"] == pytest.approx(entropy) and meta["val_unigram_cross_entropy"] == pytest.approx(cross)


def test_large_counts_use_two_words():
    words = np.frombuffer(make_header(5 * 2**32 + 7, 65536, 65535, 2**64 - 2), dtype="<u4")
    assert list(words[:8]) == [MAGIC, 1, 7, 65536, 65536, 2**32 - 2, 2**32 - 1, 5] and not words[8:].any() and len(words) == 256


def test_documents_continue_in_the_next_shard(prepared, sources, tmp_path):
    whole = read_tokens(prepared / "train_000.bin")
    assert run("--text", sources / "*.txt", sources / "tricky.jsonl", "--tokenizer", prepared / "tokenizer.model",
               "--val-fraction", 0.1, "--shard-tokens", "100k", "--out", tmp_path / "cut") == 0  # fmt: skip
    shards = sorted((tmp_path / "cut").glob("train_*.bin"))
    assert [read_header(shard)["tokens"] for shard in shards[:-1]] == [100_000] * (len(whole) // 100_000) and len(shards) > 2
    assert np.array_equal(np.concatenate([read_tokens(shard) for shard in shards]), whole)


def test_shard_that_is_exactly_full(tmp_path):
    writer = ShardWriter(tmp_path, "train", 10, 100, 2, 1, Journal(tmp_path / "journal.jsonl"))
    writer.append(np.arange(20, dtype="<u2"))
    writer.close()
    assert writer.files == ["train_000.bin", "train_001.bin"] and list(read_tokens(tmp_path / "train_001.bin")) == list(range(10, 20))


# ---------------------------------------------------------------------------------------------------------- documents


def test_every_document_is_in_one_split_as_its_content_says(prepared, sources, tokenizer):
    texts = [path.read_bytes().decode() for path in sorted(sources.glob("*.txt"))] + TRICKY
    found = {split: [tokenizer.processor.decode(tokens) for tokens in documents_in(prepared / f"{split}_000.bin", 2)] for split in ("train", "val")}
    held_out = [text for text in texts if text and prepare.uniform_hash(text) < 0.1]
    assert found["val"] == held_out and 0 < len(held_out) < 40
    assert found["train"] == [text for text in texts if text and text not in held_out]


def test_hold_out_depends_on_content_alone():
    assert prepare.is_held_out("some text", 0.5) == (prepare.uniform_hash("some text") < 0.5)
    assert not prepare.is_held_out("some text", 0.0)


def test_stdlib_corpus():
    names = [name for name, _ in stdlib().sources]
    assert names == sorted(names) and len(names) > 300 and "argparse.py" in names
    assert not any({"site-packages", "test", "tests", "idle_test", "__pycache__"} & set(Path(name).parts[:-1]) for name in names)
    assert set(names) <= {name for name, _ in stdlib(with_tests=True).sources}


def test_stdlib_end_to_end(tmp_path, tokenizer, prepared, monkeypatch):
    whole = stdlib()
    small = Corpus(whole.description, whole.root, whole.sources[:80])
    monkeypatch.setattr(prepare, "stdlib", lambda with_tests: small)
    assert run("--tokenizer", prepared / "tokenizer.model", "--val-fraction", 0.1, "--out", tmp_path) == 0
    assert json.loads((tmp_path / "meta.json").read_text())["source"].startswith("Python ")


# ----------------------------------------------------------------------------------------- determinism and running again


def test_same_inputs_same_bytes(prepared, sources, tmp_path):
    assert run("--text", sources / "*.txt", sources / "tricky.jsonl", "--vocab-size", 1024, "--val-fraction", 0.1, "--out", tmp_path / "b") == 0
    assert files_of(tmp_path / "b") == files_of(prepared)


def test_running_again_does_nothing_and_a_change_is_noticed(sources, tmp_path, prepared, capsys):
    text = tmp_path / "one.txt"
    text.write_text("first version " * 50)
    command = ["--text", text, sources / "00*.txt", "--tokenizer", prepared / "tokenizer.model", "--val-fraction", 0.3, "--out", tmp_path / "out"]
    assert run(*command) == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    assert run(*command) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    text.write_text("second, longer version " * 50)
    assert run(*command) == 0 and "nothing to do" not in capsys.readouterr().out
    (tmp_path / "out" / "train_000.bin").unlink()
    assert run(*command) == 0 and (tmp_path / "out" / "train_000.bin").exists()


def test_stale_shards_go_and_foreign_ones_are_refused(sources, tmp_path, prepared, capsys):
    command = ["--text", sources / "00*.txt", "--tokenizer", prepared / "tokenizer.model", "--val-fraction", 0.3, "--out", tmp_path]
    assert run(*command, "--shard-tokens", "10k") == 0 and (tmp_path / "train_001.bin").exists()
    (tmp_path / "notes.md").write_text("mine")
    assert run(*command) == 0 and not (tmp_path / "train_001.bin").exists() and (tmp_path / "notes.md").exists()
    (tmp_path / "train_007.bin").write_bytes(b"mine too")
    capsys.readouterr()
    assert run(*command, "--shard-tokens", "10k") == 1
    assert "train_007.bin" in one_line_of(capsys) and (tmp_path / "train_007.bin").read_bytes() == b"mine too"
    assert not (tmp_path / ".partial").exists()


def test_failure_keeps_what_was_there(sources, tmp_path, prepared, monkeypatch):
    command = ["--text", sources / "00*.txt", "--tokenizer", prepared / "tokenizer.model", "--val-fraction", 0.3, "--out", tmp_path]
    assert run(*command) == 0
    before = files_of(tmp_path)
    monkeypatch.setattr(ShardWriter, "close", lambda self: (_ for _ in ()).throw(OSError(28, "No space left on device", "train_000.bin")))
    assert run(*command, "--shard-tokens", "10k") == 1
    assert files_of(tmp_path) == before
    monkeypatch.undo()
    assert run(*command, "--shard-tokens", "10k") == 0 and (tmp_path / "train_001.bin").exists() and not (tmp_path / ".partial").exists()


# ----------------------------------------------------------------------------------------------------------- bad input


def one_line_of(capsys) -> str:
    """The error: the last line on stderr; there is no traceback before it."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines and lines[-1].startswith("prepare: ") and not any("Traceback" in line for line in lines)
    return lines[-1]


def test_malformed_lines_are_counted_and_named(tmp_path, prepared, capsys):
    good = json.dumps({"text": "a good line " * 30}).encode()
    bad = [b"{not json", b'{"text": 5}', b'{"other": "x"}', b'["text"]', b'{"text": "\xff"}', b'{"text": "\\ud800"}']
    path = tmp_path / "mixed.jsonl"
    path.write_bytes(b"\n".join([good, *bad, b"", good.replace(b"good", b"fine")]))
    assert run("--text", path, "--tokenizer", prepared / "tokenizer.model", "--val-fraction", 0, "--out", tmp_path / "out") == 0
    error = capsys.readouterr().err
    assert all(f"mixed.jsonl:{number}:" in error for number in range(2, 8)) and "mixed.jsonl:8" not in error
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["documents_left_out"] == 6 and meta["train"]["documents"] == 2 and meta["val"]["tokens"] == 0
    assert "val_000.bin" in error and not (tmp_path / "out" / "val_000.bin").exists()


def test_undecodable_and_empty_files(tmp_path, prepared, capsys):
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "good.txt").write_bytes(b"good")
    assert run("--text", tmp_path / "*.txt", "--tokenizer", prepared / "tokenizer.model", "--val-fraction", 0, "--out", tmp_path / "out") == 0
    assert "latin1.txt: not UTF-8 (byte 0xe9 at offset 3)" in capsys.readouterr().err
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert (meta["documents_left_out"], meta["documents_empty"], meta["train"]["documents"]) == (1, 1, 1)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--vocab-size", "65537"], "65537"),
        (["--vocab-size", "0"], "'0'"),
        (["--vocab-size", "nan"], "'nan'"),
        (["--val-fraction", "1"], "'1'"),
        (["--text", "/nowhere/*.txt"], "/nowhere/*.txt"),
        (["--text", "{tmp}/empty"], "holds no file ending in"),
        (["--text", "-"], "--text -"),
        (["--text", "{tmp}/x.txt", "--from", "{tmp}"], "--from"),
        (["--text", "{tmp}/x.txt", "--shuffle", "-1"], "--shuffle -1"),
        (["--dataset", "slimpajama", "--from", "{tmp}"], "for split train; give a clone of"),
        (["--text", "{tmp}/x.pdf"], ".pdf"),
        (["--text", "{tmp}/x.txt", "--with-tests"], "--with-tests"),
        (["--text", "{tmp}/x.txt", "--tokenizer", "/nowhere.model"], "/nowhere.model"),
        (["--text", "{tmp}/x.txt", "--tokenizer", "{tmp}/x.txt"], "not a SentencePiece model"),
        (["--text", "{tmp}/x.txt", "--vocab-size", "100"], "--vocab-size 100"),
        (["--text", "{tmp}/x.txt", "--val-fraction", "0", "--vocab-size", "60000"], "--vocab-size 60000"),
        (["--text", "{tmp}/bad.jsonl"], "bad.jsonl:1"),
        (["--dataset", "unknown"], "unknown"),
        (["--dataset", "stdlib", "--text", "x.txt"], "not allowed with"),
        (["--vocab-size", "4096", "--tokenizer", "x.model"], "not allowed with"),
    ],
)
def test_one_line_errors(tmp_path, capsys, arguments, expected):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.pdf").write_bytes(b"x")
    (tmp_path / "x.txt").write_bytes(b"some words to train on\n" * 20)
    (tmp_path / "bad.jsonl").write_bytes(b"nonsense\n")
    assert run(*(argument.format(tmp=tmp_path) for argument in arguments), "--out", tmp_path / "out") == 1
    assert expected in one_line_of(capsys)
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_as_a_program(tmp_path):
    command = [sys.executable, "-m", "data.prepare", "--out", tmp_path / "out", "--text", tmp_path / "missing.txt"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == "" and len(result.stderr.splitlines()) == 1 and "missing.txt" in result.stderr
