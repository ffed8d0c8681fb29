"""scripts/: setup.sh reports and never half-installs when only asked, plot_log.py draws whatever a run has left behind."""

import importlib.util
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SETUP = ROOT / "scripts" / "setup.sh"

spec = importlib.util.spec_from_file_location("plot_log", ROOT / "scripts" / "plot_log.py")
plot_log = importlib.util.module_from_spec(spec)
sys.modules["plot_log"] = plot_log
spec.loader.exec_module(plot_log)

PICTURES = {"overview.png", "loss.png", "validation.png", "grad_norm.png", "throughput.png"}

# ------------------------------------------------------------------------------------------------------------ setup.sh


def test_setup_parses_and_is_executable():
    assert subprocess.run(["bash", "-n", SETUP], capture_output=True).returncode == 0
    assert SETUP.stat().st_mode & stat.S_IXUSR
    text = SETUP.read_text()
    assert text.startswith("#!/usr/bin/env bash\n") and "set -euo pipefail" in text
    assert not re.search(r"https?://|\.(com|org|net|io)\b", text)  # packages come from wherever the machine is set up to get them


def test_setup_shellcheck():
    if not shutil.which("shellcheck"):
        pytest.skip("needs shellcheck")
    result = subprocess.run(["shellcheck", SETUP], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def checkout(tmp_path: Path) -> Path:
    """A repository with nothing in it but the script, so that .venv is missing."""
    (tmp_path / "repo" / "scripts").mkdir(parents=True)
    for name in ("setup.sh", "requirements.txt"):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "repo" / "scripts" / name)
    return tmp_path / "repo" / "scripts" / "setup.sh"


def fake_commands(folder: Path, **bodies: str) -> dict:
    """An environment in which these commands are scripts of the test's own."""
    folder.mkdir()
    for name, body in bodies.items():
        path = folder / name.replace("_", "-")
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


def test_setup_check_only_reports(tmp_path):
    script = checkout(tmp_path)
    environment = fake_commands(tmp_path / "bin", apt_get="touch installed; exit 1", dpkg_query="exit 1")
    result = subprocess.run([script, "--check"], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1 and result.stderr == ""
    packages = ["g++", "make", "libopenblas-dev", "libcli11-dev", "nlohmann-json3-dev", "libsentencepiece-dev", "libgtest-dev"]
    for name in packages + ["libopenmpi-dev", "openmpi-bin"]:
        assert re.search(rf"✗ {re.escape(name)}\s+\w", result.stdout), name
    assert re.search(r"✗ \.venv .*numpy.*pytest", result.stdout) and "nvcc" in result.stdout
    assert not (tmp_path / "installed").exists() and not (tmp_path / "repo" / ".venv").exists()


def test_setup_prints_one_command_where_it_may_not_install():
    user = []
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("needs setpriv to stop being root")
        user = ["setpriv", "--reuid", "65534", "--clear-groups"]
    with tempfile.TemporaryDirectory() as name:  # not tmp_path, which only its owner may enter
        folder = Path(name)
        folder.chmod(0o755)
        script = checkout(folder)
        environment = fake_commands(folder / "bin", apt_get="exit 1", dpkg_query="echo make installed", sudo="exit 1")
        result = subprocess.run([*user, script], env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    commands = [line for line in result.stderr.splitlines() if line.startswith("sudo ")]
    assert result.returncode == 1 and len(commands) == 1, result.stderr
    assert "apt-get install -y" in commands[0] and "libcli11-dev" in commands[0] and " make" not in commands[0]


def test_setup_names_packages_without_apt(tmp_path):
    script = checkout(tmp_path)
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "dirname", "sed", "cut", "grep", "sha256sum", "tr", "find"):
        (folder / name).symlink_to(shutil.which(name))
    result = subprocess.run(["/bin/bash", script], env={"PATH": str(folder)}, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "no apt here" in result.stderr and "libcli11-dev" in result.stderr and "g++" in result.stderr


def test_setup_retries_once(tmp_path):
    script = checkout(tmp_path)
    environment = fake_commands(tmp_path / "bin", apt_get='echo "$*" >>calls; exit 1', dpkg_query="exit 1", sudo='shift; exec "$@"', id="echo 0")
    result = subprocess.run([script], env=environment, capture_output=True, text=True, cwd=tmp_path, stdin=subprocess.DEVNULL)
    if not (tmp_path / "calls").exists():
        pytest.skip("needs root or sudo")
    calls = (tmp_path / "calls").read_text().splitlines()
    assert result.returncode == 1 and sum(" install " in call for call in calls) == 2 and any("update" in call for call in calls)
    assert "could not install" in result.stderr.splitlines()[-1]


def test_setup_refuses_unknown_options():
    result = subprocess.run([SETUP, "--chekc"], capture_output=True, text=True)
    assert result.returncode == 1 and "--chekc" in result.stderr and len(result.stderr.splitlines()) == 1


# ---------------------------------------------------------------------------------------------------------- plot_log.py


def train(step: int, loss: float, **other) -> dict:
    line = {"type": "train", "step": step, "tokens": step * 1000, "loss": loss, "grad_norm": 1.0, "lr": 1e-3, "ms": 10}
    return {**line, "tok_s": 1e5, "mfu": 0.4, **other}


def val(step: int, length: int, loss: float) -> dict:
    return {"type": "val", "step": step, "length": length, "loss": loss, "ppl": 2.0}


def write_log(path: Path, records: list[dict], tail: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return path


def a_run(steps: int = 60, offset: float = 0.0) -> list[dict]:
    records = [{"type": "run", "model": "tiny", "commit": "0123456789", "gpu": "none"}]
    for step in range(1, steps + 1):
        records.append(train(step, offset + 9 / step**0.3))
        if step % 20 == 0:
            records += [val(step, length, offset + 9 / step**0.3) for length in (256, 512)] + [{"type": "checkpoint", "step": step, "dir": "x"}]
    return records


def plot(capsys, *arguments) -> tuple[int, list[str]]:
    status = plot_log.main([str(argument) for argument in arguments])
    return status, capsys.readouterr().err.splitlines()


def assert_pictures(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == PICTURES
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 2000 for path in folder.iterdir())


def test_plots_of_a_log_cut_short(tmp_path, capsys):
    log = write_log(tmp_path / "run" / "log.jsonl", a_run(), tail='{"type":"train","step":61,"lo')
    status, errors = plot(capsys, log)
    assert status == 0 and len(errors) == 1 and "cut short" in errors[0]
    assert_pictures(tmp_path / "run" / "plots")


def test_plots_of_several_runs(tmp_path, capsys):
    logs = [write_log(tmp_path / name / "log.jsonl", a_run(steps, 0.1 * steps / 60)) for name, steps in (("a", 60), ("b", 30), ("c", 5))]
    empty = write_log(tmp_path / "d" / "log.jsonl", [])
    status, errors = plot(capsys, *logs, empty, "--out", tmp_path / "pictures")
    assert status == 0 and len(errors) == 1 and "left out" in errors[0]
    assert_pictures(tmp_path / "pictures")
    assert [run.name for run in plot_log.read_logs([logs[0], logs[0]])] == ["a (1)", "a (2)"]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_plots_of_a_run_that_just_began(tmp_path, capsys, steps):
    status, errors = plot(capsys, write_log(tmp_path / "log.jsonl", a_run(steps)), "--out", tmp_path / "out")
    assert status == 0 and errors == []
    assert_pictures(tmp_path / "out")


def test_a_resumed_run_continues_where_it_was_resumed(tmp_path):
    first = [train(step, 5.0) for step in range(1, 11)] + [val(10, 256, 5.0)]
    second = [train(step, 4.0) for step in range(7, 9)] + [val(8, 256, 4.0)]
    run = plot_log.read_log(write_log(tmp_path / "log.jsonl", [*first, {"type": "run"}, *second]))
    assert sorted(run.train) == list(range(1, 9)) and [run.train[step]["loss"] for step in (6, 7, 8)] == [5.0, 4.0, 4.0]
    assert set(run.val) == {(8, 256)} and run.tokens_at([8]) == [8000]


def test_odd_records_are_named_and_skipped(tmp_path, capsys):
    odd = [{"type": "surprise"}, {"type": "train"}, train(2, None), train(3, float("nan")), {"no": "type"}]
    log = write_log(tmp_path / "log.jsonl", [train(1, 3.0), *odd], tail='garbage\n[1]\n"x"\n' + json.dumps(train(4, 2.0)) + "\n")
    status, errors = plot(capsys, log, "--out", tmp_path / "out")
    assert status == 0 and any("surprise" in error for error in errors) and any(":7: not a JSON object; 3 such lines" in error for error in errors)
    assert list(plot_log.read_log(log).curve("loss")[1]) == [3.0, 2.0]


@pytest.mark.parametrize("content", ["", "\n", '{"type":"run"}\n', "not json at all", None])
def test_nothing_to_plot_is_one_line(tmp_path, capsys, content):
    log = tmp_path / "log.jsonl"
    if content is not None:
        log.write_text(content)
    status, errors = plot(capsys, log)
    assert status == 1 and str(log) in errors[-1] and not (tmp_path / "plots").exists()


def test_caption_says_what_all_runs_share(tmp_path):
    runs = [plot_log.Run("a", {"gpu": "none", "options": {"model": "tiny"}}), plot_log.Run("b", {"gpu": "none", "options": {"model": "small"}})]
    for run in runs:
        run.train = {1: train(1, 3.0)}
    assert [plot_log.caption(runs), plot_log.caption(runs[:1])] == ["none   ·   1 k tokens", "tiny   ·   none   ·   1 k tokens"]


def test_smoothing_keeps_a_constant_and_lags_behind_no_line():
    np = plot_log.np
    assert np.allclose(plot_log.smooth(np.full(1000, 3.0)), 3)
    line = np.arange(1000.0)
    assert np.allclose(plot_log.smooth(line)[:990], line[:990])


def test_the_quick_start_in_small(tmp_path):
    """scripts/quickstart.sh from text to a sample, a checkpoint and pictures, as `make train` runs it after the build."""
    program = ROOT / "build/cpu/train_samba"
    assert program.exists(), f"{program} is missing: make CPU=1 builds it"
    library = Path(subprocess.__file__).parent
    for name in ("subprocess", "argparse", "shutil", "zipfile", "tarfile", "typing", "inspect", "datetime", "decimal", "ast", "pickle", "socket"):
        source = library / f"{name}.py"
        (tmp_path / f"{name}.txt").write_text(source.read_text() if source.exists() else "x = 1\n" * 500)
    data, out = tmp_path / "data", tmp_path / "out"
    run = lambda *command: subprocess.run([str(c) for c in command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    prepared = run(sys.executable, "-m", "data.prepare", "--text", tmp_path / "*.txt", "--vocab-size", 512, "--val-fraction", 0.2, "--out", data)
    assert prepared.returncode == 0, prepared.stderr
    model = tmp_path / "model.json"
    config = {"blocks": "MS", "n_embd": 32, "n_head": 2, "head_size": 16, "intermediate_size": 64, "local_window": 16, "block_size": 32}
    model.write_text(json.dumps(config | {"padded_vocab_size": 512}))
    result = run("bash", "scripts/quickstart.sh", program, data, out, "--model", model, "--steps", 30, "--warmup-steps", 2, "--val-every", 0)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "validation loss" in result.stdout and "import os" in result.stdout and "checkpoint    " in result.stdout
    assert (out / "overview.png").exists() and (out / "latest/tokenizer.model").exists() and (out / "log.jsonl").exists()
