"""What measures the trainer: the bench subcommand, and the PyTorch twin beside it.

Runs build/cpu/train_samba (SAMBA_PROGRAM=PATH: another build) on a model of a few thousand parameters. The twin needs PyTorch, which the
trainer does not.
"""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PROGRAM = os.environ.get("SAMBA_PROGRAM", os.path.join(ROOT, "build/cpu/train_samba"))
MODEL = {"name": "bench-test", "blocks": "MS", "n_embd": 32, "n_head": 2, "n_query_groups": 1, "head_size": 16, "intermediate_size": 48,
         "local_window": 9, "block_size": 24, "padded_vocab_size": 64}  # fmt: skip


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.json"
    path.write_text(json.dumps(MODEL))
    return path


def run(*arguments):
    return subprocess.run([str(a) for a in arguments], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("graphs", ["on", "off"])
def test_bench_measures_passes_and_steps(model, tmp_path, graphs):
    result = run(PROGRAM, "bench", "--model", model, "--micro-batch", 2, "--repeats", 3, "--accumulate", 3, "--graphs", graphs,
                 "--json", tmp_path / "bench.json")  # fmt: skip
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["graphs"] == graphs and report["seq_len"] == 24
    for key, micro_batches in [("forward_backward", 1), ("step", 1), ("accumulated_step", 3)]:
        row = report[key]
        assert 0 < row["fastest"] <= row["ms"] <= row["slowest"]
        assert row["tok_s"] == pytest.approx(2 * 24 * micro_batches / row["ms"] * 1e3)
    assert "optimizer step of 3 micro-batches" in result.stdout


def test_bench_says_what_is_wrong(model):
    result = run(PROGRAM, "bench", "--model", model, "--graphs", "maybe")
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and "--graphs" in result.stderr


def test_info_gives_the_configuration_as_json(model):
    config = json.loads(run(PROGRAM, "info", "--model", model, "--json").stdout)
    assert {key: config[key] for key in MODEL} == MODEL


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs PyTorch")
def test_the_twin_trains_as_the_trainer(model, tmp_path):
    rng = np.random.default_rng(1)
    tokens = np.cumsum(rng.integers(1, 4, 5000)) % 64
    header = np.zeros(256, dtype="<i4")
    header[:4] = 20240520, 1, len(tokens), 64
    (tmp_path / "train_0.bin").write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())
    result = run(sys.executable, os.path.join(ROOT, "dev/parity/run.py"), "parity", "--program", PROGRAM, "--model", model,
                 "--data", tmp_path / "train_*.bin", "--micro-batch", 4, "--steps", 8, "--lr", 3e-3, "--warmup", 8, "--tolerance", 1e-4)  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "ok: losses at most" in result.stdout
