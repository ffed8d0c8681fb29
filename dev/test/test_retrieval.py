"""Retrieval: the documents are what they claim to be, train_samba retrieve answers as the definition says, the scripts run.

Runs build/cpu/train_samba (SAMBA_PROGRAM=PATH: another build) on a model of a few thousand parameters.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import plot_passkey  # noqa: E402
from data import retrieval  # noqa: E402
from data.shards import PrepareError, read_header, read_tokens  # noqa: E402

PROGRAM = os.environ.get("SAMBA_PROGRAM", str(ROOT / "build/cpu/train_samba"))
MODEL = {"name": "retrieval-test", "blocks": "MS", "n_embd": 32, "n_head": 2, "n_query_groups": 1, "head_size": 16, "intermediate_size": 48,
         "local_window": 9, "block_size": 96, "padded_vocab_size": 256}
WORDS = retrieval.Words()


def run(*command, **environment):
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300, cwd=ROOT,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **environment})  # fmt: skip


def made(tmp_path, *arguments):
    assert retrieval.main([*map(str, arguments), "--out", str(tmp_path)]) == 0
    return tmp_path


# -------------------------------------------------------------------------------------------------------------- documents


@pytest.mark.parametrize("length", [76, 77, 100, 131, 512, 4096])
@pytest.mark.parametrize("depth", [0.0, 0.1, 0.37, 0.5, 1.0])
def test_a_passkey_document_has_its_length_and_its_key_at_its_depth(length, depth):
    task = retrieval.Passkey(WORDS)
    for ended in (False, True):
        if length == task.shortest and not ended:
            continue
        text = task.document(length, depth, "40917", ended)
        assert len(text) == length and text[0] == WORDS.eos_id and list(text).count(WORDS.eos_id) == 1
        spelled = WORDS.decode(text)
        assert spelled.count("4 0 9 1 7") == 3                # twice in the statement, once as the answer
        assert spelled.endswith("What is the pass key ? The pass key is 4 0 9 1 7" + " ." * ended)
        filler = length - task.room_for("40917") + (not ended)
        at = spelled.split("The pass key is")[0].count(" ") - len(task.intro)      # filler tokens before the statement
        assert abs(at - depth * filler) <= 12                 # half the longest sentence
        if depth in (0.0, 1.0):
            assert at == depth * filler


def test_a_key_stands_between_sentences():
    task = retrieval.Passkey(WORDS)
    for length in range(150, 420, 7):
        before = WORDS.decode(task.document(length, 0.6, "12345", True)).split(" The pass key is 1")[0]
        assert before.endswith(" .")


def test_a_passkey_document_without_room_is_refused():
    with pytest.raises(PrepareError, match="75 tokens.*at least 76"):
        retrieval.Passkey(WORDS).document(75, 0.5, "12345", True)


@pytest.mark.parametrize("length", [200, 1000, 4096])
def test_a_phone_book_asks_for_what_it_holds(length):
    task = retrieval.Phonebook(WORDS, queries=3)
    rng = random.Random(5)
    text = task.training_document(length, rng)
    assert len(text) == length and text[0] == WORDS.eos_id and list(text).count(WORDS.eos_id) == 1
    book, asked = WORDS.decode(text).split(" Now find these people in the phone book . \n ")
    entries = book.split("This is a phone book . \n ")[1].split(" \n ")
    entries[-1] = entries[-1].removesuffix(" \n")
    asked = asked.removesuffix(" \n").split(" \n ")
    assert len(asked) == 3 and len(set(asked)) == 3 and set(asked) <= set(entries)
    names = [entry.split(" : ")[0] for entry in entries]
    numbers = [entry.split(" : ")[1].split() for entry in entries]
    assert len(set(names)) == len(names) == (length - 1 - len(task.intro) - len(task.query)) // 14 - 3
    assert all(len(number) == 10 and number[0] in "6789" for number in numbers)


def test_documents_depend_on_nothing_but_the_seed(tmp_path):
    for task, arguments in (("passkey", ["--min-length", 80]), ("phonebook", [])):
        first, again, other = (
            made(tmp_path / f"{task}{i}", task, "train", "--documents", 6, "--length", 512, "--seed", seed, *arguments)
            for i, seed in enumerate((3, 3, 4))
        )
        assert (first / "train_000.bin").read_bytes() == (again / "train_000.bin").read_bytes() != (other / "train_000.bin").read_bytes()
        assert sorted(os.listdir(first)) == ["train_000.bin"]
    drawn = [retrieval.draw(random.Random(7), n) for n in (10, 90000)]
    assert drawn == [3, 29144]                                # the same in every version of Python


def test_training_samples_are_whole_documents(tmp_path):
    path = made(tmp_path, "passkey", "train", "--documents", 40, "--length", 512, "--min-length", 80, "--max-length", 200) / "train_000.bin"
    header, tokens = read_header(path), read_tokens(path)
    assert header["tokens"] == len(tokens) == 40 * 512 + 1 and header["vocab_size"] == WORDS.vocab_size and header["eos_id"] == 0
    starts = np.flatnonzero(tokens == WORDS.eos_id)
    assert set(range(0, len(tokens), 512)) <= set(starts)     # each sample begins with a document
    lengths = np.diff(starts)
    assert lengths.min() >= 80 and lengths.max() <= 200 + 80 and len(set(lengths)) > 30
    keys = [WORDS.decode(tokens[start : start + length]).split("The pass key is ")[1][:9] for start, length in zip(starts, lengths)]
    assert len(set(keys)) == len(keys)


def test_prompts_cover_lengths_and_depths(tmp_path):
    folder = made(tmp_path, "passkey", "prompts", "--lengths", "100,1k", "--depths", 11, "--keys", 2)
    manifest = json.loads((folder / "prompts.json").read_text())
    assert [file["length"] for file in manifest["files"]] == [100, 1024] and manifest["vocabulary"] == "words"
    for file in manifest["files"]:
        tokens = read_tokens(folder / file["file"])
        assert len(tokens) == file["length"] * 22 + 1 and tokens[-1] == WORDS.eos_id
        assert [row["depth"] for row in file["rows"]] == [i / 10 for i in range(11) for _ in range(2)]
        for row, text in zip(file["rows"], tokens[:-1].reshape(22, -1)):
            assert row["answer"] == 5 and WORDS.decode(text[-5:]).replace(" ", "") == row["key"]
            assert WORDS.decode(text).count(" ".join(row["key"])) == 3


def test_phone_book_prompts_cover_sizes(tmp_path):
    folder = made(tmp_path, "phonebook", "prompts", "--entries", "5,30", "--books", 4)
    manifest = json.loads((folder / "prompts.json").read_text())
    for file, count in zip(manifest["files"], (5, 30)):
        tokens = read_tokens(folder / file["file"])[:-1].reshape(4, file["length"])
        for row, text in zip(file["rows"], tokens):
            spelled = WORDS.decode(text)
            assert row["entries"] == count and spelled.count(":") == count + 3
            line = f"{row['name']} : {' '.join(row['number'])}"
            assert spelled.endswith(line) and spelled.split(" \n ")[1 + row["place"]] == line


def test_a_tokenizer_of_data_prepare_does_as_well(tmp_path):
    from data.tokenizer import train_tokenizer

    texts = [retrieval.FILLER, retrieval.PASSKEY_INTRO, retrieval.PASSKEY_FACT, retrieval.PASSKEY_QUERY] * 3 + [str(n) for n in range(10000, 11500)]
    (tmp_path / "tokenizer.model").write_bytes(train_tokenizer(iter(texts), 400))
    vocabulary = retrieval.vocabulary_of(str(tmp_path / "tokenizer.model"))
    text = retrieval.Passkey(vocabulary).document(600, 0.5, "10417", False)
    assert len(text) == 600 and vocabulary.decode(text[1:]).endswith("What is the pass key? The pass key is 10417")
    which = ["--lengths", 600, "--depths", 3, "--keys", 1, "--vocabulary", tmp_path / "tokenizer.model"]
    folder = made(tmp_path / "prompts", "passkey", "prompts", *which)
    file = json.loads((folder / "prompts.json").read_text())["files"][0]
    assert read_header(folder / file["file"])["fingerprint"] == vocabulary.fingerprint != 0


@pytest.mark.parametrize("arguments, says", [
    (["passkey", "train", "--length", "60"], "60 tokens"),
    (["passkey", "train", "--length", "512", "--min-length", "20"], "--min-length 20: must be from 76"),
    (["passkey", "train", "--length", "512", "--min-length", "80", "--max-length", "600"], "--max-length 600"),
    (["passkey", "train", "--length", "512", "--max-length", "100"], "--max-length 100"),
    (["passkey", "prompts", "--lengths", "4k,50"], "50 tokens"),
    (["phonebook", "train", "--length", "60"], "60 tokens"),
    (["phonebook", "prompts", "--entries", "5000"], "5000 entries: there are 4096 names"),
    (["passkey", "train", "--vocabulary", "/nowhere.model"], "/nowhere.model"),
])  # fmt: skip
def test_bad_input_gets_one_line(tmp_path, capsys, arguments, says):
    assert retrieval.main([*arguments, "--out", str(tmp_path / "out")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0]
    assert not [path.name for path in tmp_path.glob("out/*") if path.name.endswith((".tmp", ".json")) or path.name == "train_000.bin"]


# --------------------------------------------------------------------------------------------------------------- retrieve


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model that has seen a few hundred documents, and prompts of three lengths with answers of unequal length."""
    assert os.path.exists(PROGRAM), f"{PROGRAM} is missing: make CPU=1 builds it"
    folder = tmp_path_factory.mktemp("world")
    (folder / "model.json").write_text(json.dumps(MODEL))
    made(folder / "data", "passkey", "train", "--documents", 256, "--length", 96, "--min-length", 80)
    result = run(PROGRAM, "--model", folder / "model.json", "--data", f"{folder}/data/*.bin", "--out", folder / "run", "--micro-batch", 16,
                 "--steps", 40, "--lr", "1e-2", "--warmup-steps", 2, "--schedule", "constant")  # fmt: skip
    assert result.returncode == 0, result.stderr
    made(folder / "prompts", "passkey", "prompts", "--lengths", "80,133", "--depths", 3, "--keys", 2)
    manifest = json.loads((folder / "prompts/prompts.json").read_text())
    for i, row in enumerate(manifest["files"][1]["rows"]):
        row["answer"] = 2 + 3 * (i % 3)
    (folder / "prompts/prompts.json").write_text(json.dumps(manifest))
    return folder


def ask(world, *options, prompts="prompts"):
    out = world / "answers.json"
    result = run(PROGRAM, "retrieve", "--checkpoint", world / "run", "--prompts", world / prompts, "--out", out, *options)
    assert result.returncode == 0, result.stderr
    return json.loads(out.read_text()), result.stdout


def without_times(report):
    return {**report, "files": [{**file, "seconds": 0} for file in report["files"]]}


def test_answers_do_not_depend_on_chunks_and_batches(world):
    whole, screen = ask(world, "--seq-len", 200, "--micro-batch", 6)
    assert whole["task"] == "passkey" and whole["trained_length"] == 96 and whole["blocks"] == "MS" and whole["step"] == 40
    for options in (("--seq-len", 7, "--micro-batch", 6), ("--micro-batch", 4), ("--seq-len", 1, "--micro-batch", 1)):
        assert without_times(ask(world, *options)[0]) == without_times(whole)
    lines = screen.splitlines()
    assert len(lines) == 2
    for file, line in zip(whole["files"], lines):
        right = [row["expected"] == row["answered"] for row in file["rows"]]
        assert right == [row["correct"] for row in file["rows"]] and file["accuracy"] == pytest.approx(np.mean(right))
        assert all(len(row["expected"]) == len(row["answered"]) == row["answer"] for row in file["rows"])
        assert f"right {100 * file['accuracy']:6.2f}%" in line
    tokens = read_tokens(world / "prompts" / whole["files"][1]["file"])[:-1].reshape(6, 133)
    for row, text in zip(whole["files"][1]["rows"], tokens):
        assert row["expected"] == list(text[-row["answer"] :])


def test_the_first_answer_is_the_most_likely_token(world):
    """Of a row that asks for one token: loss of `eval` on each candidate as the last target, the smallest wins."""
    made(world / "one", "passkey", "prompts", "--lengths", "80", "--depths", 1, "--keys", 1)
    manifest = json.loads((world / "one/prompts.json").read_text())
    manifest["files"][0]["rows"][0]["answer"] = 1
    (world / "one/prompts.json").write_text(json.dumps(manifest))
    answer = ask(world, prompts="one")[0]["files"][0]["rows"][0]["answered"]
    shard = world / "one/length_00000080.bin"
    raw, losses = bytearray(shard.read_bytes()), {}
    for candidate in [*range(8, 18), *answer]:
        raw[-4:-2] = int(candidate).to_bytes(2, "little")
        header = bytes(raw[:1024]).replace((81).to_bytes(4, "little"), (80).to_bytes(4, "little"), 1)
        (world / "candidate.bin").write_bytes(header + bytes(raw[1024:-2]))
        which = ["--data", world / "candidate.bin", "--seq-len", 79, "--val-lengths", "1x", "--batches", 1]
        result = run(PROGRAM, "eval", "--checkpoint", world / "run", *which)
        assert result.returncode == 0, result.stderr
        losses[int(candidate)] = float(result.stdout.split("loss ")[1].split()[0])
    assert losses[answer[0]] == min(losses.values())


def test_bad_prompts_get_one_line(world, tmp_path):
    made(tmp_path, "passkey", "prompts", "--lengths", "80", "--depths", 2, "--keys", 1)
    good = (tmp_path / "prompts.json").read_text()

    def refusal(text):
        (tmp_path / "prompts.json").write_text(text)
        result = run(PROGRAM, "retrieve", "--checkpoint", world / "run", "--prompts", tmp_path)
        lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert result.returncode == 1 and len(lines) == 1, (result.returncode, result.stderr)
        return lines[0]

    assert "prompts.json: not a list of prompts" in refusal("{")
    assert "prompts.json: not a list of prompts" in refusal("[]")
    assert "names no files" in refusal(json.dumps({**json.loads(good), "files": []}))
    assert "2 rows of 80 tokens" in refusal(json.dumps({**json.loads(good), "files": [{**json.loads(good)["files"][0], "rows": [{"answer": 5}]}]}))
    assert "an answer of 80 tokens in a row of 80" in refusal(good.replace('"answer": 5', '"answer": 80'))
    assert "an answer of 0 tokens" in refusal(good.replace('"answer": 5', '"answer": 0'))
    assert "rows of 0 tokens" in refusal(good.replace('"length": 80,\n   "rows"', '"length": 0,\n   "rows"'))
    os.remove(tmp_path / "length_00000080.bin")
    assert "length_00000080.bin" in refusal(good)


# ---------------------------------------------------------------------------------------------------------------- scripts


def test_the_heat_map_counts_answers(tmp_path):
    rows = [{"length": length, "depth": depth, "correct": right} for length in (64, 128) for depth in (0.0, 1.0) for right in (True, length == 64)]
    result = {"task": "passkey", "model": "m", "parameters": 1e6, "window": 9, "trained_length": 64, "files": [{"rows": rows}]}
    (tmp_path / "a.json").write_text(json.dumps(result))
    read = plot_passkey.read_result(str(tmp_path / "a.json"), "passkey")
    assert plot_passkey.accuracy(read["rows"], "length", "depth") == {(64, 0.0): 1.0, (64, 1.0): 1.0, (128, 0.0): 0.5, (128, 1.0): 0.5}
    assert plot_passkey.run("", "passkey", plot_passkey.draw_all, [str(tmp_path / "a.json")] * 2 + ["--out", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("content, says", [
    ("{", "not what train_samba retrieve"), ('{"task": "phonebook", "files": []}', "answers to phonebook prompts"), (None, "No such file"),
])  # fmt: skip
def test_the_heat_map_refuses_with_one_line(tmp_path, capsys, content, says):
    if content:
        (tmp_path / "a.json").write_text(content)
    assert plot_passkey.run("", "passkey", plot_passkey.draw_all, [str(tmp_path / "a.json"), "--out", str(tmp_path / "a.png")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "a.json" in lines[0] and says in lines[0]


@pytest.mark.parametrize("task", ["passkey", "phonebook"])
def test_the_scripts_train_ask_and_draw(world, tmp_path, task):
    for start in (world / "model.json", world / "run"):
        out = tmp_path / start.name
        result = run(f"scripts/{task}.sh", "cpu", out, start, PROGRAM=PROGRAM, PYTHON=sys.executable)
        assert result.returncode == 0, result.stderr
        assert (out / f"{task}.png").read_bytes()[:4] == b"\x89PNG"
        report = json.loads((out / f"{task}.json").read_text())
        assert report["task"] == task and report["step"] == 8
        assert sum(len(file["rows"]) for file in report["files"]) == (18 if task == "passkey" else 8)
        assert not (out / "short/documents").exists() and not (out / "prompts").exists()  # nothing kept that can be made again
        options = json.loads((out / "short/log.jsonl").read_text().splitlines()[0])["options"]
        assert options["init-from"] == (f"{start}/latest" if start.name == "run" else "")
    result = run(f"scripts/{task}.sh", "tpu", tmp_path / "x", "tiny")
    assert result.returncode == 1 and result.stderr == "error: recipe tpu: choose paper, gpu or cpu\n"
