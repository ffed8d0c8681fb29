"""Every form of input and every tokenizer of data/prepare.py, malformed input of every kind, and the official file layout."""

import gzip
import io
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
import tokenizers
import zstandard

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from data import inspect, prepare, sources  # noqa: E402
from data import corpus as corpora  # noqa: E402
from data import tokenizer as tokenizer_module  # noqa: E402
from data.corpus import stdlib  # noqa: E402
from data.shards import Journal, LitpkdsWriter, fingerprint, litpkds_header, read_header, read_tokens  # noqa: E402
from data.sources import Piece, Tally, cut, read_piece  # noqa: E402
from data.tokenizer import load_tokenizer, read_id_bytes  # noqa: E402

TEXTS = [f"document {i}\nwith a second line, {'and more words ' * (i % 7)}é中😀▁\n" for i in range(200)] + ["", "the same", "the same"]


def run(*arguments) -> int:
    return prepare.main([str(argument) for argument in arguments])


def meta_of(out: Path) -> dict:
    return json.loads((out / "meta.json").read_text())


def texts_in(out: Path, split: str = "train") -> list[str]:
    """Every document of the shards, decoded"""
    meta = meta_of(out)
    tokenizer = load_tokenizer(str(out))
    names = meta[split]["shards"]
    tokens = np.concatenate([np.asarray(read_tokens(out / name)) for name in names]) if names else np.zeros(0, dtype="<u2")
    return [tokenizer.decode(part.tolist()[:-1]) for part in np.split(tokens, np.flatnonzero(tokens == meta["eos_id"]) + 1)[:-1]]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A small SentencePiece model of this project's kind"""
    folder = tmp_path_factory.mktemp("model")
    (folder / "x.txt").write_text("".join(text for text, _ in zip(stdlib().texts(), range(20))) + "".join(TEXTS[:50]))
    assert run("--text", folder / "x.txt", "--vocab-size", 600, "--val-fraction", 0, "--out", folder / "out") == 0
    return folder / "out" / "tokenizer.model"


def json_lines(texts, field="text") -> bytes:
    return b"".join(json.dumps({"meta": {"n": 1}, field: text}).encode() + b"\n" for text in texts)


def write_parquet(path: Path, texts, field="text", group=50) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(texts))), field: texts}), path, row_group_size=group)


# --------------------------------------------------------------------------------------------------------------- forms


def make_input(form: str, folder: Path) -> list:
    lines = json_lines(TEXTS)
    if form == "jsonl":
        (folder / "x.jsonl").write_bytes(lines)
    elif form == "jsonl.gz":
        (folder / "x.jsonl.gz").write_bytes(gzip.compress(lines[:1000]) + gzip.compress(lines[1000:]))  # two members
    elif form == "jsonl.zst":
        compress = zstandard.ZstdCompressor().compress
        (folder / "x.jsonl.zst").write_bytes(compress(lines[:1000]) + compress(lines[1000:]))  # two frames
    elif form == "parquet":
        write_parquet(folder / "x.parquet", TEXTS)
    elif form == "txt":
        for i, text in enumerate(TEXTS):
            (folder / f"{i:04d}.txt").write_bytes(text.encode())
        (folder / "notes.md").write_text("not read")
    elif form == "separator":
        (folder / "x.txt").write_bytes("<|end|>\n".join(TEXTS[:200]).encode() + b"<|end|>\n<|end|>\nthe same\n<|end|>\nthe same")
    return ["--text", folder]


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "txt", "separator"])
def test_form(form, tmp_path, model):
    (tmp_path / "in").mkdir()
    arguments = make_input(form, tmp_path / "in") + (["--separator", "<|end|>"] if form == "separator" else [])
    assert run(*arguments, "--tokenizer", model, "--val-fraction", 0, "--out", tmp_path / "out") == 0
    expected = [text for text in TEXTS if text]
    if form == "separator":
        expected[-2] = "the same\n"
    assert texts_in(tmp_path / "out") == expected
    meta = meta_of(tmp_path / "out")
    assert meta["documents_left_out"] == 0 and meta["documents_empty"] == (form != "separator")


def test_standard_input(tmp_path, model, monkeypatch):
    lines = json_lines(TEXTS) + b"nonsense\n" + json_lines(["last"])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    assert run("--text", "-", "--tokenizer", model, "--val-fraction", 0, "--out", tmp_path) == 0
    assert texts_in(tmp_path) == [*filter(None, TEXTS), "last"]
    assert (tmp_path / "left_out.txt").read_text().startswith("standard input:204: not JSON")


def test_hub_client_streams_a_folder_of_the_same_form(tmp_path, model, monkeypatch):
    """The real `datasets` client; a dataset on the hub is such a folder too."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "set" / "data").mkdir(parents=True)
    write_parquet(tmp_path / "set" / "data" / "train-00000-of-00002.parquet", TEXTS[:120])
    write_parquet(tmp_path / "set" / "data" / "train-00001-of-00002.parquet", TEXTS[120:] + [None])
    command = ["--dataset", tmp_path / "set", "--tokenizer", model, "--val-fraction", 0, "--out", tmp_path / "out"]
    assert run(*command) == 0
    assert texts_in(tmp_path / "out") == [text for text in TEXTS if text]
    assert (tmp_path / "out" / "left_out.txt").read_text() == f'{tmp_path}/set//train/text:204: no field "text" holding a string; left out\n'
    assert run(*command[:2], "--split", "nothing", *command[2:]) == 1


@pytest.mark.parametrize("name", sorted(corpora.RECIPES))
def test_recipe_on_a_local_clone(name, tmp_path, model):
    clone, lines = tmp_path / "clone", json_lines(TEXTS)
    if name == "slimpajama":
        for i, part in enumerate((TEXTS[:70], TEXTS[70:])):
            (clone / "train" / f"chunk{i + 1}").mkdir(parents=True)
            (clone / "train" / f"chunk{i + 1}" / f"example_train_{i}.jsonl.zst").write_bytes(zstandard.compress(json_lines(part)))
        (clone / "validation" / "chunk1").mkdir(parents=True)
        (clone / "validation" / "chunk1" / "example_holdout_0.jsonl.zst").write_bytes(zstandard.compress(lines))
    elif name == "fineweb-edu":
        (clone / "sample" / "10BT").mkdir(parents=True)
        write_parquet(clone / "sample" / "10BT" / "000_00000.parquet", TEXTS)
    elif name == "tinystories":
        clone.mkdir()
        text = "<|endoftext|>\n".join(filter(None, TEXTS[:200])) + "<|endoftext|>\nthe same<|endoftext|>"
        (clone / "TinyStories-train.txt").write_bytes(text.encode())
    elif name == "tinyshakespeare":
        clone.mkdir()
        (clone / "input.txt").write_bytes("\n".join(TEXTS[:200]).encode())
    elif name == "starcoder":
        (clone / "python").mkdir(parents=True)
        write_parquet(clone / "python" / "train-00000-of-00059.parquet", TEXTS, field="content")
    assert run("--dataset", name, "--from", clone, "--tokenizer", model, "--val-fraction", 0, "--out", tmp_path / "out") == 0
    assert texts_in(tmp_path / "out")[:200] == TEXTS[:200]
    assert meta_of(tmp_path / "out")["source"].startswith(name)


def test_recipe_downloads_with_the_real_client(tmp_path, model, monkeypatch):
    (tmp_path / "served.txt").write_text("First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n")
    recipe = corpora.RECIPES["tinyshakespeare"]
    monkeypatch.setitem(corpora.RECIPES, "tinyshakespeare", recipe._replace(url=(tmp_path / "served.txt").as_uri()))
    assert run("--dataset", "tinyshakespeare", "--tokenizer", model, "--val-fraction", 0, "--out", tmp_path / "out") == 0
    assert texts_in(tmp_path / "out") == ["First Citizen:\nBefore we proceed any further, hear me speak.\n", "All:\nSpeak, speak.\n"]
    monkeypatch.setitem(corpora.RECIPES, "tinyshakespeare", recipe._replace(url=(tmp_path / "nowhere").as_uri()))
    assert run("--dataset", "tinyshakespeare", "--tokenizer", model, "--out", tmp_path / "other") == 1
    assert not (tmp_path / "other" / ".downloads" / "input.txt").exists()


@pytest.mark.parametrize("form", [".jsonl", ".txt", ".parquet"])
def test_any_cut_gives_the_same_documents_and_lines(form, tmp_path):
    path = tmp_path / f"x{form}"
    if form == ".jsonl":
        path.write_bytes(json_lines(TEXTS[:40]) + b"bad\n\n" + json_lines(TEXTS[40:60])[:-1])  # no newline at the end
    elif form == ".txt":
        path.write_bytes("--\n".join(TEXTS[:60]).encode() + b"--\n--\n\n--\nend")
    else:
        write_parquet(path, TEXTS[:60], group=7)
    def read(target):  # noqa: E306
        texts, lines, problems = [], 0, []
        pieces = cut("x", str(path), form, target, "text", "--")
        for piece in pieces:
            tally = Tally()
            texts += read_piece(piece, tally)
            problems += [(lines + line, what) for line, what in tally.problems]
            lines += tally.lines
        return (texts, lines, problems), len(pieces)
    whole, _ = read(1 << 40)
    assert len(whole[0]) >= 60
    several = 0
    for target in [1, 2, 3, 7, 50, 64, 99, 100, 101, 333, 1000, 5000]:
        result, pieces = read(target)
        assert result == whole, target
        several += pieces > 1
    assert several >= 7


# ------------------------------------------------------------------------------------------------------- malformed input


def problems_of(path: Path, form: str, **options) -> tuple[int, list]:
    tally = Tally()
    piece = Piece("x", str(path), form, 0, 1 << 62, 1, options.get("field", "text"), options.get("separator"))
    return len(list(read_piece(piece, tally))), tally.problems


def test_damaged_compressed_files(tmp_path):
    lines = json_lines(TEXTS * 20)
    for form, whole in ((".jsonl.gz", gzip.compress(lines)), (".jsonl.zst", zstandard.compress(lines))):
        path = tmp_path / f"x{form}"
        path.write_bytes(whole[: len(whole) * 2 // 3])
        count, problems = problems_of(path, form)
        assert count < len(TEXTS * 20) and len(problems) == 1 and "damaged after this line" in problems[0][1] and problems[0][0] == count, form
        path.write_bytes(b"not compressed at all\n" * 10)
        assert problems_of(path, form)[0] == 0 and "damaged" in problems_of(path, form)[1][0][1]
        flipped = bytearray(whole)
        flipped[len(flipped) // 2] ^= 0xFF
        path.write_bytes(bytes(flipped))
        assert len(problems_of(path, form)[1]) >= 1
        path.write_bytes(b"")
        assert problems_of(path, form) == (0, [])


def test_damaged_parquet_files(tmp_path):
    path = tmp_path / "x.parquet"
    write_parquet(path, [None, "good", None])
    assert problems_of(path, ".parquet") == (1, [(1, "no text (null)"), (3, "no text (null)")])
    assert "no column 'content' (it has id, text)" in problems_of(path, ".parquet", field="content")[1][0][1]
    assert "column 'id' holds int64" in problems_of(path, ".parquet", field="id")[1][0][1]
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), path, row_group_size=50)
    whole = path.read_bytes()
    middle = len(whole) // 3
    for damage in (b"", b"PAR1", whole[:-20], b"x" * 100, whole[:middle] + b"\xff" * 300 + whole[middle + 300 :]):
        path.write_bytes(damage)
        assert len(problems_of(path, ".parquet")[1]) == 1, damage[:10]
    bad = pyarrow.array([b"good", b"\xff\xfe"]).view(pyarrow.binary())
    pyarrow.parquet.write_table(pyarrow.table({"text": bad}), path)
    assert problems_of(path, ".parquet") == (1, [(2, "not UTF-8 (byte 0xff at offset 0)")])


def test_documents_over_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_DOCUMENT", 1000)
    path = tmp_path / "x.jsonl"
    path.write_bytes(json_lines(["a", "b" * 5000, "c", "d" * 980]) + b"e" * 3000)
    count, problems = problems_of(path, ".jsonl")
    assert count == 2 and [line for line, _ in problems] == [2, 4, 5] and all("over 1000 bytes" in what for _, what in problems)
    (tmp_path / "x.txt").write_bytes(b"x" * 1001)
    assert "over 1000" in problems_of(tmp_path / "x.txt", ".txt")[1][0][1]
    (tmp_path / "x.txt").write_bytes(b"a\n--\n" + b"b\n" * 600 + b"--\nc\n")
    assert problems_of(tmp_path / "x.txt", ".txt", separator="--") == (2, [(602, "the document before this line is over 1000 bytes")])


def test_line_numbers_are_the_files_own_across_pieces_and_processes(tmp_path, model, capsys):
    bad = [3, 17_000, 39_999]
    lines = [json_lines([f"line {i} " * 30]) for i in range(40_000)]
    for i in bad:
        lines[i - 1] = b"nonsense\n"
    (tmp_path / "x.jsonl").write_bytes(b"".join(lines))
    assert run("--text", tmp_path / "x.jsonl", "--tokenizer", model, "--processes", 2, "--out", tmp_path / "out") == 0
    named = (tmp_path / "out" / "left_out.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in named] == [f"{tmp_path}/x.jsonl:{i}" for i in bad]
    assert "x.jsonl:17000: not JSON" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- tokenizers


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory) -> Path:
    """tokenizer.json of a byte-level BPE, and the same merges as a .tiktoken file"""
    import base64

    folder = tmp_path_factory.mktemp("bpe")
    t = tokenizers.Tokenizer(tokenizers.models.BPE())
    t.pre_tokenizer, t.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=700, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    t.train_from_iterator(TEXTS[:200] + [text for text, _ in zip(stdlib().texts(), range(10))], trainer)
    alphabet = tokenizer_module.gpt2_byte_alphabet()
    ranks = sorted((i, bytes(alphabet[c] for c in token)) for token, i in t.get_vocab().items())
    # single bytes first in a .tiktoken file of gpt2's form, as their rank is their merge order
    (folder / "x.tiktoken").write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, (_, token) in enumerate(ranks)))
    t.add_special_tokens(["<|endoftext|>"])
    t.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("kind", ["model", "json", "tiktoken"])
def test_tokenizer(kind, tmp_path, model, byte_level):
    file = {"model": model, "json": byte_level / "tokenizer.json", "tiktoken": byte_level / "x.tiktoken"}[kind]
    texts = [text for text in TEXTS if text] + ["</s> <|endoftext|> are text"]
    (tmp_path / "x.jsonl").write_bytes(json_lines(texts))
    out = tmp_path / "out"
    assert run("--text", tmp_path / "x.jsonl", "--tokenizer", file, "--val-fraction", 0, "--out", out) == 0
    assert texts_in(out) == texts
    meta, header = meta_of(out), read_header(out / "train_000.bin")
    stored = next(path for path in out.glob("tokenizer.*") if path.suffix != ".bytes")
    assert stored.read_bytes() == file.read_bytes() and stored.suffix == f".{kind}"
    assert header["fingerprint"] == fingerprint(file.read_bytes()) == int(meta["tokenizer_fingerprint"], 16)
    assert (header["vocab_size"], header["eos_id"]) == (meta["vocab_size"], meta["eos_id"])
    table = read_id_bytes(out / "tokenizer.bytes")
    assert len(table) == meta["vocab_size"] and table[meta["eos_id"]] == b""
    tokens = np.asarray(read_tokens(out / "train_000.bin"))
    assert b"".join(table[i] for i in tokens.tolist()).decode() == "".join(texts)


def test_llama_style_tokenizer_is_used_as_the_reference_does(tmp_path, monkeypatch):
    """A dummy prefix and no cut: every document's ids are those of one plain call, also of one that is encoded in blocks."""
    model = io.BytesIO()
    lines = (line for text, _ in zip(stdlib().texts(), range(20)) for line in text.splitlines())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, model_type="bpe", vocab_size=500, byte_fallback=True, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2)  # fmt: skip
    (tmp_path / "llama.model").write_bytes(model.getvalue())
    monkeypatch.setattr(tokenizer_module, "SMALL_BLOCK", 50)
    ours = load_tokenizer(str(tmp_path / "llama.model"))
    assert ours.has_prefix and ours.block == 50 and (ours.vocab_size, ours.eos_id) == (500, 2)
    plain = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    texts = [*TEXTS, "".join(TEXTS), "\n\n  x\n" * 100, "\n", " \n ", "long line " * 1000, *(text for text, _ in zip(stdlib().texts(), range(40)))]
    for block in (1 << 20, 100):
        monkeypatch.setattr(tokenizer_module, "BLOCK", block)
        for text, tokens in zip(texts, ours.encode(texts)):
            if block > 100 or "\n" in text:  # a line of over 200 characters would be cut
                assert tokens.tolist() == plain.encode(text) + [2]


def test_tokenizers_that_cannot_be_used(tmp_path, byte_level, capsys, monkeypatch):
    (tmp_path / "x.txt").write_text("text")
    good = json.loads((byte_level / "tokenizer.json").read_text())
    no_eos = dict(good, added_tokens=[])
    large = dict(good, added_tokens=[dict(good["added_tokens"][0], id=65536)])
    for name, content, expected in (
        ("a.json", "{}", "not a tokenizer.json"), ("b.json", json.dumps(no_eos), "--eos TOKEN"), ("d.tiktoken", "eA== 0\n", "not a .tiktoken file"),
        ("e.tiktoken", "nonsense", "not a .tiktoken file"), ("f.model", "nonsense", "not a SentencePiece model"), ("g.json", json.dumps(large), None),
    ):  # fmt: skip
        (tmp_path / name).write_text(content)
        code = run("--text", tmp_path / "x.txt", "--tokenizer", tmp_path / name, "--val-fraction", 0, "--out", tmp_path / "out")
        if expected:
            assert code == 1 and expected in capsys.readouterr().err, name
    assert run("--text", tmp_path / "x.txt", "--tokenizer", byte_level / "tokenizer.json", "--eos", "<nothing>", "--out", tmp_path / "out") == 1
    assert "--eos TOKEN" in capsys.readouterr().err
    tiktoken = pytest.importorskip("tiktoken")
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: (_ for _ in ()).throw(OSError("no network")))
    assert run("--text", tmp_path / "x.txt", "--tokenizer", "gpt2", "--out", tmp_path / "out") == 1
    assert "tiktoken cannot get its file" in capsys.readouterr().err


def test_gpt2_by_name_goes_through_tiktoken(tmp_path, byte_level, monkeypatch):
    import tiktoken

    local = load_tokenizer(str(byte_level / "x.tiktoken"))
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: {"gpt2": local.encoding}[name])
    assert load_tokenizer("gpt2").model == (byte_level / "x.tiktoken").read_bytes()


def test_vocabularies_over_16_bits_are_refused(monkeypatch, model):
    monkeypatch.setattr(tokenizer_module, "MAX_VOCAB_SIZE", 599)
    with pytest.raises(prepare.PrepareError, match="vocabulary of 600, but shards store uint16"):
        load_tokenizer(str(model))


# ------------------------------------------------------------------------------------------------------ official layout


def test_litpkds_files_are_the_official_scripts(tmp_path):
    golden = ROOT / "dev/test/golden/litpkds"
    documents = [np.array(line.split(), dtype="<u2") for line in (golden / "documents.txt").read_text().splitlines()]
    for step in (1, 3, len(documents)):  # however the documents are handed over
        folder = tmp_path / str(step)
        folder.mkdir()
        writer = LitpkdsWriter(folder, "train", 8294, 32000, 2, 0, Journal(folder / "journal.jsonl"))
        for i in range(0, len(documents), step):
            writer.append(np.concatenate(documents[i : i + step]))
        writer.close()
        expected = sorted(path.name for path in golden.glob("*.bin"))
        assert writer.files == expected and sorted(path.name for path in folder.glob("*.bin")) == expected
        for name in expected:
            assert (folder / name).read_bytes() == (golden / name).read_bytes()
        assert writer.dropped == sum(map(len, documents)) - 2 * 8294


def test_litpkds_end_to_end(tmp_path, model):
    (tmp_path / "x.jsonl").write_bytes(json_lines(TEXTS))
    command = ["--text", tmp_path / "x.jsonl", "--tokenizer", model, "--format", "litpkds", "--shard-tokens", 500, "--val-fraction", 0.3]
    assert run(*command, "--out", tmp_path / "out") == 0
    meta = meta_of(tmp_path / "out")
    tokenizer = load_tokenizer(str(model))
    for split, prefix in (("train", "train_slimpajama_0_"), ("val", "validation_slimpajama_0_")):
        texts = [text for text in TEXTS if prepare.is_held_out(text, 0.3) == (split == "val")]
        stream = np.concatenate([tokens for text in texts for tokens in tokenizer.encode([text])])
        files = (len(stream) - 1) // 500  # one that is exactly full waits for more
        assert meta[split]["shards"] == [f"{prefix}{i:010d}.bin" for i in range(files)] and files > 2
        for i, name in enumerate(meta[split]["shards"]):
            assert (tmp_path / "out" / name).read_bytes() == litpkds_header(500, 600) + stream[500 * i : 500 * i + 500].tobytes()
    assert meta["tokens_dropped"] > 0 and inspect.main([str(tmp_path / "out" / meta["train"]["shards"][0])]) == 0


# ------------------------------------------------------------------------------------------------------------- inspect


def test_inspect(tmp_path, model, capsys):
    (tmp_path / "x.jsonl").write_bytes(json_lines(TEXTS))
    assert run("--text", tmp_path / "x.jsonl", "--tokenizer", model, "--val-fraction", 0, "--out", tmp_path / "out") == 0
    capsys.readouterr()
    shard = tmp_path / "out" / "train_000.bin"
    assert inspect.main([str(shard), "--png", str(tmp_path / "h.png"), "--samples", "3"]) == 0
    printed = capsys.readouterr().out
    tokens = meta_of(tmp_path / "out")["train"]["tokens"]
    assert f"tokens       {tokens:,}" in printed and "202 end here" in printed and "SHA-256 as in manifest.json" in printed
    assert printed.count("  at ") == 3 and 'document 0\\nwith a second line' in printed
    assert (tmp_path / "h.png").read_bytes().startswith(b"\x89PNG")
    raw = bytearray(shard.read_bytes())
    raw[-3] ^= 1
    shard.write_bytes(bytes(raw))
    assert inspect.main([str(shard)]) == 1 and "DAMAGED" in capsys.readouterr().out
    assert inspect.main([str(tmp_path / "x.jsonl")]) == 1 and "not a token shard" in capsys.readouterr().err
    assert inspect.main([str(ROOT / "dev/test/golden/litpkds/train_slimpajama_0_0000000000.bin")]) == 0
    assert "litpkds" in capsys.readouterr().out
