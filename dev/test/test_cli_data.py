"""The trainer and its data: weighted mixtures, and no step on data of another tokenizer than the checkpoint's."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = os.environ.get("SAMBA_PROGRAM", str(ROOT / "build/cpu/train_samba"))
MODEL = {"name": "cli-test", "blocks": "MS", "n_embd": 32, "n_head": 2, "n_query_groups": 1, "head_size": 16, "intermediate_size": 48,
         "local_window": 9, "block_size": 16, "padded_vocab_size": 64}  # fmt: skip


def write_shard(path: Path, size: int, seed: int, fingerprint: int = 0) -> None:
    header = np.zeros(256, dtype="<u4")
    header[:7] = 20240520, 1, size, 64, 3, fingerprint & 0xFFFFFFFF, fingerprint >> 32
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(header.tobytes() + np.random.default_rng(seed).integers(0, 64, size).astype("<u2").tobytes())


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    assert os.path.exists(PROGRAM), f"{PROGRAM} is missing: make CPU=1 builds it"
    folder = tmp_path_factory.mktemp("world")
    (folder / "model.json").write_text(json.dumps(MODEL))
    for name, size, mark in (("a", 3000, 7 << 40), ("b", 900, 7 << 40), ("other", 900, 9 << 40), ("silent", 900, 0)):
        write_shard(folder / name / "train_000.bin", size, size, mark)
    return folder


def run(*arguments):
    return subprocess.run([str(a) for a in arguments], capture_output=True, text=True, timeout=120)


def train(world: Path, out: Path, *extra, steps=8):
    return run(PROGRAM, "--model", world / "model.json", "--out", out, "--micro-batch", 2, "--global-batch", 64, "--steps", steps, "--lr", "1e-2",
               "--schedule", "constant", "--checkpoint-every", 4, "--keep", 0, *extra)  # fmt: skip


def error_of(result) -> str:
    assert result.returncode == 1, (result.stdout, result.stderr)
    return next(line for line in result.stderr.splitlines() if line.startswith("error: "))


def losses(out: Path) -> list:
    return [r["loss"] for r in map(json.loads, open(out / "log.jsonl")) if r["type"] == "train"]


def weights(out: Path, step: int) -> bytes:
    return (out / f"step_{step:08d}" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def mixed(world, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("mixed") / "run"
    result = train(world, out, "--data", f"{world}/a:0.7", f"{world}/b/train_*.bin:0.3")
    assert result.returncode == 0, result.stderr
    assert "70.0% of" in result.stdout and "30.0% of" in result.stdout
    return out


def test_a_mixture_resumes_bit_for_bit(world, mixed, tmp_path):
    data = ["--data", f"{world}/a:7", f"{world}/b:3"]  # the same shares
    assert train(world, tmp_path / "run", *data, steps=4).returncode == 0
    assert train(world, tmp_path / "run", *data, "--resume").returncode == 0
    assert losses(tmp_path / "run") == losses(mixed) and weights(tmp_path / "run", 8) == weights(mixed, 8)
    other = error_of(train(world, tmp_path / "run", "--data", f"{world}/a:0.5", f"{world}/b:0.5", "--resume", steps=9))
    assert "was trained on other data" in other


def test_a_mixture_is_not_the_sets_put_together(world, mixed, tmp_path):
    assert train(world, tmp_path / "run", "--data", f"{world}/a", f"{world}/b").returncode == 0
    assert losses(tmp_path / "run") != losses(mixed)


def test_defects_of_weights_are_named(world, tmp_path):
    assert "'x' is not a weight" in error_of(train(world, tmp_path, "--data", f"{world}/a:x"))
    assert "has no weight and others have" in error_of(train(world, tmp_path, "--data", f"{world}/a:0.7", f"{world}/b"))
    assert "different tokenizers" in error_of(train(world, tmp_path, "--data", f"{world}/a:0.7", f"{world}/other:0.3"))


def test_checkpoint_and_data_must_share_a_tokenizer(world, mixed, tmp_path):
    assert json.loads((mixed / "step_00000008" / "state.json").read_text())["tokenizer_fingerprint"] == str(7 << 40)
    for arguments in (["--data", f"{world}/other", "--init-from", mixed], ["--data", f"{world}/other", "--resume", mixed]):
        line = error_of(train(world, tmp_path / "run", *arguments))
        assert "made with another tokenizer (fingerprint 0000090000000000) than the checkpoint" in line and "other/train_000.bin" in line
    line = error_of(run(PROGRAM, "eval", "--checkpoint", mixed, "--data", f"{world}/other/train_000.bin", "--val-lengths", "1x", "--batches", 1))
    assert "made with another tokenizer" in line
    line = error_of(train(world, tmp_path / "run", "--data", f"{world}/a", "--val", f"{world}/other/train_000.bin"))
    assert "made with another tokenizer" in line
    (tmp_path / "tokenizer.model").write_bytes(b"another tokenizer")
    line = error_of(train(world, tmp_path / "run", "--data", f"{world}/a", "--tokenizer", tmp_path / "tokenizer.model"))
    assert "made with another tokenizer" in line and "tokenizer.model" in line
    assert not (tmp_path / "run").exists()


def test_data_that_does_not_say_its_tokenizer_is_taken(world, mixed, tmp_path):
    assert train(world, tmp_path / "run", "--data", f"{world}/silent", "--init-from", mixed).returncode == 0
    state = json.loads((tmp_path / "run" / "step_00000008" / "state.json").read_text())
    assert state["tokenizer_fingerprint"] == str(7 << 40)  # passed on
    evaluate = [PROGRAM, "eval", "--checkpoint", mixed, "--data", f"{world}/silent/train_000.bin"]
    assert run(*evaluate, "--val-lengths", "1x", "--batches", 1).returncode == 0
