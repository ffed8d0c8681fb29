"""Reading far past the training length: perplexity against context length, in memory that does not grow with it."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from test_cli import PROGRAM, ROOT, error_line, write_shard
from test_cli import run as run_program

# As small as a model with every part can be: four million tokens take seconds
READER = {"name": "reader", "blocks": "MS", "n_embd": 16, "n_head": 1, "n_query_groups": 1, "head_size": 8, "intermediate_size": 16,
          "local_window": 64, "block_size": 1024, "padded_vocab_size": 32, "d_state": 4}


def run(*arguments):
    """One thread: so small a model has nothing to share, and other programs may want the other cores."""
    return run_program(*arguments, env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A trained model of 1,024 tokens and a text of 4.2 million."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "model.json").write_text(json.dumps(READER))
    rng = np.random.default_rng(2)
    steps = np.repeat(rng.integers(1, 4, (1 << 22) // 50 + 100), 50)
    write_shard(folder / "text.bin", np.cumsum(steps)[: (1 << 22) + 1] % 32, vocab=32)
    result = run(PROGRAM, "--model", folder / "model.json", "--data", folder / "text.bin", "--out", folder / "run", "--micro-batch", "2",
                 "--steps", "20", "--lr", "1e-2")  # fmt: skip
    assert result.returncode == 0, result.stderr
    return folder


def evaluate(folder, *options):
    out = folder / "context.json"
    result = run(PROGRAM, "eval", "--checkpoint", folder / "run", "--data", folder / "text.bin", "--json", out, *options)
    assert result.returncode == 0, result.stderr
    return json.load(open(out)), result.stdout


def by_length(report):
    return {r["length"]: r for r in report["results"]}


def test_lengths_read_the_same_tokens(reader):
    report, shown = evaluate(reader, "--lengths", "512,...,8k", "--tokens", "16384", "--last", "256")
    results = by_length(report)
    assert list(results) == [512, 1024, 2048, 4096, 8192]
    assert [r["sequences"] for r in results.values()] == [32, 16, 8, 4, 2]
    for r in results.values():
        assert r["ppl"] == pytest.approx(np.exp(r["loss"])) and r["last"] == 256
        weights = [p["to"] - p["from"] for p in r["positions"]]
        assert sum(weights) == r["length"] and np.dot(weights, [p["loss"] for p in r["positions"]]) / r["length"] == pytest.approx(r["loss"])
    assert report["protocol"].startswith("one pass") and report["window"] == 64 and report["training_length"] == 1024
    assert re.search(r"^ +8192 +2 +\d+\.\d{4} +\d", shown, re.M)


def test_chunks_and_batches_change_nothing_but_rounding(reader):
    wanted = by_length(evaluate(reader, "--lengths", "1k,2500", "--tokens", "5000", "--micro-batch", "1", "--seq-len", "5000")[0])
    for options in (("--micro-batch", "3", "--seq-len", "77"), ("--micro-batch", "5", "--seq-len", "1024")):
        got = by_length(evaluate(reader, "--lengths", "1k,2500", "--tokens", "5000", *options)[0])
        for length in wanted:
            assert got[length]["loss"] == pytest.approx(wanted[length]["loss"], rel=1e-5)
            assert got[length]["last_loss"] == pytest.approx(wanted[length]["last_loss"], rel=1e-5)


def test_one_length_is_what_validation_says(reader):
    plain = run(PROGRAM, "eval", "--checkpoint", reader / "run", "--data", reader / "text.bin", "--val-lengths", "1x,4x",
                "--micro-batch", "2", "--batches", "1")  # fmt: skip
    said = dict(re.findall(r"length (\d+) \| loss ([\d.]+)", plain.stdout))
    got = by_length(evaluate(reader, "--lengths", "4k", "--tokens", "8192")[0])[4096]
    assert got["loss"] == pytest.approx(float(said["4096"]), abs=1e-4)
    assert got["positions"][0]["loss"] == pytest.approx(float(said["1024"]), abs=1e-4)


def test_stride_protocol(reader):
    """Windows every 300 tokens: the mean of what each window says alone."""
    report, _ = evaluate(reader, "--lengths", "1k", "--stride", "300", "--windows", "3")
    tokens = np.fromfile(reader / "text.bin", dtype="<u2")[512:]
    losses = []
    for start in (0, 300, 600):
        write_shard(reader / "window.bin", tokens[start:start + 1025], vocab=32)
        out = reader / "window.json"
        result = run(PROGRAM, "eval", "--checkpoint", reader / "run", "--data", reader / "window.bin", "--lengths", "1k", "--json", out)
        assert result.returncode == 0, result.stderr
        losses.append(json.load(open(out))["results"][0]["loss"])
    assert report["results"][0]["sequences"] == 3 and report["protocol"] == "windows every 300 tokens"
    assert report["results"][0]["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    fitting, _ = evaluate(reader, "--lengths", "64k", "--stride", str((1 << 22) - 65536))
    assert fitting["results"][0]["sequences"] == 2         # the second ends with the data's last token


def test_memory_is_the_same_at_64k_and_4m(reader):
    """Each in a process of its own. Anonymous memory may differ by what malloc keeps, not by the 16 MB that a byte in four a token would be."""
    used = {}
    for length in ("64k", "4m"):
        report, _ = evaluate(reader, "--lengths", length, "--tokens", "1", "--seq-len", "4096")
        used[length] = report["results"][0]
    assert used["4m"]["length"] == 64 * used["64k"]["length"] == 1 << 22 and used["4m"]["sequences"] == 1
    assert used["4m"]["device_bytes"] == used["64k"]["device_bytes"]
    assert abs(used["4m"]["host_bytes"] - used["64k"]["host_bytes"]) < 1 << 20


def test_the_plots_are_drawn(reader, tmp_path):
    evaluate(reader, "--lengths", "512,...,4k", "--tokens", "8192", "--last", "256")
    script = os.path.join(ROOT, "scripts/plot_context.py")
    command = [sys.executable, script, f"mine={reader}/context.json", reader / "context.json", "--out", tmp_path]
    drawn = subprocess.run(command, capture_output=True, text=True)
    assert drawn.returncode == 0, drawn.stderr
    for name in ("context.png", "context_paper.png"):
        assert (tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for file, expected in ((reader / "model.json", "is not what train_samba eval"), ("/nowhere.json", "/nowhere.json")):
        bad = subprocess.run([sys.executable, script, file, "--out", tmp_path], capture_output=True, text=True)
        assert bad.returncode == 1 and expected in bad.stderr and bad.stderr.count("\n") == 1


@pytest.mark.parametrize("options,expected", [
    (["--lengths", "4x"], "--lengths 4x: write context lengths like 4k,8k,...,1m"),
    (["--lengths", "...,4k"], "\"...\" stands between two lengths"),
    (["--lengths", "0"], "--lengths 0"),
    (["--lengths", "8m"], "too short for any of --lengths"),
    (["--lengths", "1k", "--last", "0"], "--last"),
    (["--lengths", "1k", "--micro-batch", "0"], "--micro-batch 0"),
    (["--lengths", "1k", "--json", "/nowhere/x.json"], "/nowhere/x.json"),
])
def test_bad_options_get_one_clear_line(reader, options, expected):
    assert expected in error_line(run(PROGRAM, "eval", "--checkpoint", reader / "run", "--data", reader / "text.bin", *options))


# ---------------------------------------------------------------------------------------------------------- train --tbptt


@pytest.fixture(scope="module")
def chunks(tmp_path_factory):
    """Two sequences of 4 x 16 tokens: a step of --micro-batch 2 --tbptt 4 reads them all, in whatever order."""
    folder = tmp_path_factory.mktemp("chunks")
    (folder / "model.json").write_text(json.dumps({**READER, "block_size": 16, "local_window": 9}))
    write_shard(folder / "two.bin", np.random.default_rng(3).integers(0, 32, 129), vocab=32)
    write_shard(folder / "many.bin", np.cumsum(np.random.default_rng(4).integers(1, 3, 3000)) % 32, vocab=32)
    return folder


def train_in_chunks(folder, out, data, *options):
    result = run(PROGRAM, "--model", folder / "model.json", "--data", folder / data, "--out", out, "--micro-batch", "2", "--tbptt", "4",
                 "--schedule", "constant", *options)  # fmt: skip
    assert result.returncode == 0, result.stderr
    return [r for r in map(json.loads, open(f"{out}/log.jsonl")) if r["type"] == "train"]


def test_the_loss_of_a_step_is_that_of_reading_whole_sequences(chunks, tmp_path):
    loss = train_in_chunks(chunks, tmp_path / "run", "two.bin", "--steps", "1", "--lr", "0")[0]["loss"]
    out = tmp_path / "context.json"
    result = run(PROGRAM, "eval", "--checkpoint", tmp_path / "run", "--data", chunks / "two.bin", "--lengths", "64", "--tokens", "128", "--json", out)
    assert result.returncode == 0, result.stderr
    assert loss == pytest.approx(json.load(open(out))["results"][0]["loss"], rel=1e-5)


def test_tbptt_resumes_bit_for_bit(chunks, tmp_path):
    """A sequence never outlives its step: a checkpoint needs no state."""
    options = ("--global-batch", "256", "--lr", "1e-2", "--warmup-steps", "2", "--checkpoint-every", "3")
    whole = train_in_chunks(chunks, tmp_path / "whole", "many.bin", "--steps", "6", *options)
    train_in_chunks(chunks, tmp_path / "parts", "many.bin", "--steps", "3", *options)
    parts = train_in_chunks(chunks, tmp_path / "parts", "many.bin", "--steps", "6", "--resume", *options)
    assert [r["loss"] for r in parts] == [r["loss"] for r in whole] and len(parts) == 6
    for name in ("model", "optimizer"):
        a, b = ((tmp_path / run_ / f"step_00000006/{name}.safetensors").read_bytes() for run_ in ("whole", "parts"))
        assert a == b
    other = run(PROGRAM, "--model", chunks / "model.json", "--data", chunks / "many.bin", "--out", tmp_path / "parts", "--micro-batch", "2",
                "--tbptt", "2", "--global-batch", "256", "--steps", "9", "--resume")  # fmt: skip
    assert "was trained with --tbptt 4" in error_line(other)


@pytest.mark.parametrize("options,expected", [
    (["--tbptt", "0"], "--tbptt 0"),
    (["--tbptt", "4", "--global-batch", "64"], "--global-batch 64: must be a multiple"),
    (["--tbptt", "1000"], "smaller --seq-len or more data"),
])
def test_bad_tbptt_gets_one_clear_line(chunks, tmp_path, options, expected):
    arguments = [PROGRAM, "--model", chunks / "model.json", "--data", chunks / "two.bin", "--out", tmp_path / "run", "--micro-batch", "2",
                 "--steps", "1", *options]  # fmt: skip
    assert expected in error_line(run(*arguments))
