"""data/prepare.py: the same bytes from any number of processes, and after a crash anywhere, any number of times."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zstandard

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from data import corpus as corpora  # noqa: E402
from data import pipeline, prepare  # noqa: E402
from data.shards import read_tokens  # noqa: E402
from data.tokenizer import load_tokenizer  # noqa: E402

RANDOM = random.Random(7)
WORDS = [f"word{i}" for i in range(300)]
TEXTS = [f"{i}: " + " ".join(RANDOM.choices(WORDS, k=RANDOM.randrange(1, 120))) + "\n" for i in range(1200)]


def run(*arguments) -> int:
    return prepare.main([str(argument) for argument in arguments])


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.startswith(".")}


def json_lines(texts) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    (folder / "a.jsonl").write_bytes(json_lines(TEXTS[:700]) + b"bad line\n" + json_lines(TEXTS[700:800]))
    (folder / "b.jsonl.zst").write_bytes(zstandard.compress(json_lines(TEXTS[800:1000])))
    for i, text in enumerate(TEXTS[1000:]):
        (folder / f"c{i:03d}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def model(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("model")
    assert run("--text", source / "a.jsonl", "--vocab-size", 400, "--out", out) == 0
    return out / "tokenizer.model"


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(corpora, "PART_BYTES", 20_000)
    monkeypatch.setattr(pipeline, "STREAM_PART", 20_000)
    monkeypatch.setattr(pipeline.Shuffled, "BUCKET", 10_000)


VARIANTS = {"plain": [], "shuffled": ["--shuffle", 3], "litpkds": ["--format", "litpkds"]}


def command_of(variant: str, source: Path, model: Path) -> list:
    return ["--text", source, "--tokenizer", model, "--val-fraction", 0.1, "--shard-tokens", 7000, *VARIANTS[variant]]


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def expected(request, source, model, tmp_path_factory):
    """(variant, the result of an undisturbed run)"""
    out = tmp_path_factory.mktemp("expected")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "PART_BYTES", 20_000)
        patch.setattr(pipeline.Shuffled, "BUCKET", 10_000)
        assert run(*command_of(request.param, source, model), "--processes", 1, "--out", out) == 0
    assert len(list(out.glob("train*.bin"))) > 4
    return request.param, files_of(out)


@pytest.mark.parametrize("processes", [2, 5])
def test_many_processes_write_the_same_bytes(expected, processes, source, model, tmp_path):
    assert run(*command_of(expected[0], source, model), "--processes", processes, "--out", tmp_path) == 0
    assert files_of(tmp_path) == expected[1]
    assert not (tmp_path / ".partial").exists()


def test_every_document_is_there_once_shuffled_or_not(source, model, tmp_path):
    tokenizer = load_tokenizer(str(model))
    found = {}
    for name, options in (("plain", []), ("a", ["--shuffle", 1]), ("b", ["--shuffle", 2])):
        assert run("--text", source, "--tokenizer", model, "--val-fraction", 0, *options, "--processes", 1, "--out", tmp_path / name) == 0
        tokens = np.asarray(read_tokens(tmp_path / name / "train_000.bin"))
        found[name] = [tokenizer.decode(part.tolist()[:-1]) for part in np.split(tokens, np.flatnonzero(tokens == 2) + 1)[:-1]]
    assert found["plain"] == TEXTS
    assert sorted(found["a"]) == sorted(found["b"]) == sorted(TEXTS)
    assert found["a"] != TEXTS and found["a"] != found["b"]
    place = {text: i for i, text in enumerate(TEXTS)}
    moved = np.array([place[text] for text in found["a"]])
    assert abs(np.corrcoef(moved, np.arange(len(moved)))[0, 1]) < 0.15  # 5 sigma of 1/sqrt(1200)


# ------------------------------------------------------------------------------------------------------------- crashes


class Crash:
    """Ends a forked process, as kill -9 would, at its n-th step towards the disk: before it is made, or after."""

    def __init__(self, at: int, after: bool):
        self.at, self.after, self.count = at, after, 0

    def wrap(self, function):
        def step(*arguments, **named):
            self.count += 1
            if self.count == self.at and not self.after:
                os._exit(9)
            result = function(*arguments, **named)
            if self.count == self.at:
                os._exit(9)
            return result

        return step

    def install(self) -> None:
        os.fsync, os.replace, os.unlink, os.rmdir = map(self.wrap, (os.fsync, os.replace, os.unlink, os.rmdir))


def run_and_crash(command: list, at: int, after: bool, stdin: bytes | None = None) -> int:
    """Exit status: 9 if it came to step `at`; 0 if it finished before."""
    child = os.fork()
    if child == 0:
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            if stdin is not None:
                sys.stdin = io.TextIOWrapper(io.BytesIO(stdin))
            Crash(at, after).install()
            os._exit(run(*command, "--processes", 1))
        finally:
            os._exit(77)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_crashes_at_random_points_lose_and_double_nothing(expected, source, model, tmp_path):
    variant, whole = expected
    chance, crashes, resumed = random.Random(variant), 0, 0
    for trial in range(4):
        out = tmp_path / str(trial)
        command = [*command_of(variant, source, model), "--out", out]
        step = 1
        for _ in range(200):  # the same run dies again and again until it is through
            code = run_and_crash(command, chance.randrange(step, 60 * step), chance.random() < 0.5)
            assert code in (0, 9)
            if code == 0:
                break
            crashes += 1
            resumed += (out / ".partial" / "journal.jsonl").exists()
            step = min(12, step + 1)
        assert files_of(out) == whole, trial
        hidden = [path.name for path in out.glob(".*")]
        assert hidden == [".prepared.json"] or run(*command) == 0 and [path.name for path in out.glob(".*")] == [".prepared.json"]
    assert crashes > 8 and resumed > 3


def test_leftovers_of_a_crash_do_not_count(expected, source, model, tmp_path):
    variant, whole = expected
    command = [*command_of(variant, source, model), "--out", tmp_path]
    assert run_and_crash(command, 150, False) == 9
    work = tmp_path / ".partial"
    with open(work / "journal.jsonl", "ab") as file:
        file.write(b'{"split": "train", "file": "train_9')  # torn
    (work / "parts" / "00000055.train").write_bytes(b"half a part")
    (work / "parts" / "00000055.json.new").write_bytes(b'{"tok')
    (work / "train_000099.bin").write_bytes(b"half a shard")
    assert run(*command) == 0 and files_of(tmp_path) == whole


def test_a_finished_shard_that_changed_is_noticed(source, model, tmp_path, capsys):
    command = [*command_of("plain", source, model), "--out", tmp_path]
    at = 150
    while run_and_crash(command, at, False) == 9 and len(list((tmp_path / ".partial").glob("train_*.bin"))) < 3:
        at += 20
    shard = tmp_path / ".partial" / "train_000.bin"
    raw = bytearray(shard.read_bytes())
    raw[2000] ^= 1
    shard.write_bytes(bytes(raw))
    assert run(*command) == 1 and "it has changed since; remove" in capsys.readouterr().err


def test_other_options_or_inputs_start_again(source, model, tmp_path):
    assert run_and_crash([*command_of("plain", source, model), "--out", tmp_path / "out"], 150, False) == 9
    assert run(*command_of("shuffled", source, model), "--out", tmp_path / "out") == 0
    assert run(*command_of("shuffled", source, model), "--out", tmp_path / "fresh") == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


def test_a_new_tokenizer_is_trained_once(source, tmp_path):
    command = ["--text", source, "--vocab-size", 400, "--shard-tokens", 7000]
    assert run(*command, "--out", tmp_path / "whole") == 0
    for at in (2, 60):
        out = tmp_path / str(at)
        assert run_and_crash([*command, "--out", out], at, True) == 9
        assert run(*command, "--out", out) == 0
        assert files_of(out) == files_of(tmp_path / "whole")


def test_standard_input_goes_on_where_it_was(model, tmp_path, monkeypatch, capsys):
    lines = json_lines(TEXTS[:600]) + b"bad\n" + json_lines(TEXTS[600:])
    command = ["--text", "-", "--tokenizer", model, "--val-fraction", 0.1, "--shard-tokens", 7000]
    def feed(content):  # noqa: E306
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    feed(lines)
    assert run(*command, "--processes", 1, "--out", tmp_path / "whole") == 0
    for trial in range(4):
        out = tmp_path / str(trial)
        run_and_crash([*command, "--out", out], 10 + 40 * trial, trial % 2 == 0, lines)
        if trial == 3:
            feed(lines.replace(b"word7", b"word8"))
            assert run(*command, "--out", out) == 1 and "is not what an earlier, unfinished run read" in capsys.readouterr().err
        feed(lines)
        assert run(*command, "--processes", 1 + trial % 2, "--out", out) == 0
        assert files_of(out) == files_of(tmp_path / "whole")


def processes_with(text: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if text.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            pass
    return found


def test_killed_and_interrupted_runs_of_several_processes(model, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(json_lines(TEXTS * 12))
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "  # a background shell's children ignore it
        "from data import corpus, prepare; corpus.PART_BYTES = 20_000; sys.exit(prepare.main(sys.argv[1:]))"
    )
    arguments = ["--text", tmp_path / "x.jsonl", "--tokenizer", model, "--val-fraction", 0.1, "--shard-tokens", 70_000, "--processes", 2]
    command = [str(a) for a in arguments]
    assert run(*command, "--out", tmp_path / "whole") == 0
    mark = f"SAMBA_TEST_MARK={tmp_path}"
    chance, stopped = random.Random(5), 0
    for trial in range(5):
        process = subprocess.Popen([sys.executable, "-c", program, *command, "--out", str(tmp_path / "out")], cwd=ROOT, text=True,
                                   stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=os.environ | dict([mark.split("=", 1)]))  # fmt: skip
        deadline, wanted = time.time() + 30, 50 * trial  # once some parts are there, at a random moment
        while time.time() < deadline and process.poll() is None and len(list((tmp_path / "out" / ".partial" / "parts").glob("*.json"))) < wanted:
            time.sleep(0.005)
        time.sleep(chance.random() * 0.05)
        process.send_signal(signal.SIGINT if trial % 2 else signal.SIGKILL)
        error = process.communicate(timeout=60)[1]
        stopped += process.returncode != 0
        if process.returncode == 130:
            assert error.strip().splitlines()[-1] == "prepare: interrupted; run the same command to go on"
        deadline = time.time() + 20
        while processes_with(mark) and time.time() < deadline:
            time.sleep(0.05)
        assert not processes_with(mark)  # no worker outlives its parent
        if process.returncode == 0:
            break
    assert stopped >= 2
    assert run(*command, "--out", tmp_path / "out") == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
