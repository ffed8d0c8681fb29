"""The program as its user meets it: whole runs, interrupted runs, and what it says to bad input.

Runs build/cpu/train_samba (SAMBA_PROGRAM=PATH: another build) on a model of a few thousand parameters.
"""

import json
import os
import re
import resource
import signal
import subprocess
import time

import numpy as np
import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PROGRAM = os.environ.get("SAMBA_PROGRAM", os.path.join(ROOT, "build/cpu/train_samba"))
VOCAB, STEPS = 64, 12
MODEL = {"name": "cli-test", "blocks": "MS", "n_embd": 32, "n_head": 2, "n_query_groups": 1, "head_size": 16, "intermediate_size": 48,
         "local_window": 9, "block_size": 16, "padded_vocab_size": VOCAB}


def write_shard(path, tokens, vocab=VOCAB):
    header = np.zeros(256, dtype="<i4")
    header[:5] = 20240520, 1, len(tokens), vocab, 3
    with open(path, "wb") as file:
        file.write(header.tobytes())
        file.write(np.asarray(tokens, dtype="<u2").tobytes())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model file and shards whose tokens can be predicted: runs of consecutive numbers."""
    assert os.path.exists(PROGRAM), f"{PROGRAM} is missing: make CPU=1 builds it"
    folder = tmp_path_factory.mktemp("world")
    (folder / "model.json").write_text(json.dumps(MODEL))
    rng = np.random.default_rng(1)
    for name, size in (("train_000", 3000), ("train_001", 1711), ("val_000", 900)):
        starts = rng.integers(0, VOCAB, size // 10 + 1)
        tokens = (np.repeat(starts, 10)[:size] + np.arange(size) % 10) % VOCAB
        write_shard(folder / f"{name}.bin", tokens)
    return folder


def command(world, out, *extra, steps=STEPS):
    return [PROGRAM, "--model", world / "model.json", "--data", f"{world}/train_*.bin", "--out", out,
            "--micro-batch", "2", "--global-batch", "64", "--steps", str(steps), "--lr", "1e-2", "--warmup-steps", "2", "--schedule", "constant",
            "--checkpoint-every", "3", "--keep", "0", *map(str, extra)]  # fmt: skip


def run(*arguments, **options):
    return subprocess.run([str(a) for a in arguments], capture_output=True, text=True, timeout=120, **options)


def train(world, out, *extra, steps=STEPS):
    result = run(*command(world, out, *extra, steps=steps))
    assert result.returncode == 0, result.stderr
    return result


def error_line(result):
    assert result.returncode == 1, (result.returncode, result.stdout, result.stderr)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


def weights(out, step=STEPS):
    folder = f"{out}/step_{step:08d}"
    return [open(f"{folder}/{name}.safetensors", "rb").read() for name in ("model", "optimizer")]


def records(out, kind):
    return [r for r in map(json.loads, open(f"{out}/log.jsonl")) if r["type"] == kind]


@pytest.fixture(scope="module")
def reference(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference") / "run"
    train(world, out)
    return out


def test_a_run_learns_and_logs_every_step(world, tmp_path):
    result = train(world, tmp_path / "run", "--val", f"{world}/val_*.bin", "--val-every", "50", "--checkpoint-every", "100", steps=150)
    steps = records(tmp_path / "run", "train")
    assert [r["step"] for r in steps] == list(range(1, 151))
    assert [r["tokens"] for r in steps] == [64 * s for s in range(1, 151)]
    assert steps[0]["loss"] == pytest.approx(np.log(VOCAB), abs=0.5) and steps[-1]["loss"] < 2.0
    val = records(tmp_path / "run", "val")
    assert sorted({(r["step"], r["length"]) for r in val}) == [(s, n * 16) for s in (50, 100, 150) for n in (1, 2, 3, 4)]
    assert val[-1]["loss"] < val[3]["loss"]                 # both at the greatest length
    assert all(r["ppl"] == pytest.approx(np.exp(r["loss"])) for r in val)
    assert [r["step"] for r in records(tmp_path / "run", "checkpoint")] == [100, 150]
    first = json.loads(open(tmp_path / "run/log.jsonl").readline())
    assert first["type"] == "run" and first["config"]["blocks"] == "MS" and first["commit"]
    options = {"lr": "0.01", "min-lr": "0.001", "seq-len": "16", "recompute": "none"}
    assert {name: first["options"][name] for name in options} == options
    assert json.load(open(tmp_path / "run/latest/state.json"))["options"] == first["options"]
    assert re.search(r"step +1/150 \| .* tokens \| loss \d+\.\d{4} \| norm .* \| lr .* ms \| .* tok/s.* ETA", result.stdout)


def test_two_runs_are_the_same_bits(world, tmp_path, reference):
    train(world, tmp_path / "again")
    assert weights(tmp_path / "again") == weights(reference)


def test_recompute_levels_are_the_same_bits(world, tmp_path, reference):
    train(world, tmp_path / "full", "--recompute", "full")
    assert weights(tmp_path / "full") == weights(reference)


def test_graphs_on_and_off_are_the_same_bits(world, tmp_path, reference):
    train(world, tmp_path / "off", "--graphs", "off")
    assert weights(tmp_path / "off") == weights(reference)


def test_resumed_equals_uninterrupted(world, tmp_path, reference):
    """Killed outright at several moments, then resumed from whatever checkpoint was whole."""
    out = tmp_path / "run"
    for delay in (0.05, 0.15, 0.3):
        arguments = [str(a) for a in command(world, out, "--resume", "--checkpoint-every", "1")]
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
    train(world, out, "--resume", "--checkpoint-every", "1")
    assert weights(out) == weights(reference)


def test_a_signal_saves_and_leaves(world, tmp_path, reference):
    out = tmp_path / "run"
    process = subprocess.Popen([str(a) for a in command(world, out, "--checkpoint-every", "0", steps=100000)], stdout=subprocess.PIPE, text=True)
    while "step " not in (line := process.stdout.readline()) or "|" not in line:
        assert line or process.poll() is None
    process.send_signal(signal.SIGTERM)
    rest = process.stdout.read()
    assert process.wait(timeout=60) == 0
    assert "continue with --resume" in rest
    stopped_at = records(out, "checkpoint")[-1]["step"]
    assert records(out, "train")[-1]["step"] == stopped_at
    result = train(world, out, "--resume", steps=stopped_at + 2)
    assert [r["step"] for r in records(out, "train")[-2:]] == [stopped_at + 1, stopped_at + 2]
    assert f"at step {stopped_at}" in result.stdout


def test_a_run_directory_is_not_overwritten(world, reference):
    assert "already holds checkpoints; add --resume" in error_line(run(*command(world, reference)))


def test_a_damaged_newest_checkpoint_is_passed_over(world, tmp_path, reference):
    out = tmp_path / "run"
    train(world, out)
    newest = out / f"step_{STEPS:08d}/optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-7])
    result = train(world, out, "--resume")
    assert "skipped checkpoint" in result.stderr and f"resumed  {out}/step_00000009 at step 9" in result.stdout
    assert weights(out) == weights(reference)


def test_a_full_disk_harms_no_older_checkpoint(world, tmp_path, reference):
    out = tmp_path / "run"
    train(world, out, steps=3)
    before = weights(out, 3)
    def small_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before[0]) // 2, len(before[0]) // 2))
    line = error_line(run(*command(world, out, "--resume"), preexec_fn=small_files))
    assert "model.safetensors" in line
    assert sorted(os.listdir(out)) == ["latest", "log.jsonl", "step_00000003"]
    assert weights(out, 3) == before
    train(world, out, "--resume")
    assert weights(out) == weights(reference)


@pytest.mark.parametrize("change,expected", [
    (["--seed", "7"], "trained with --seed 3407"),
    (["--seq-len", "32"], "trained with --seq-len 16"),
    (["--data", "OTHER"], "other data"),
])
def test_resuming_another_run_is_refused(world, reference, change, expected):
    change = [f"{world}/train_000.bin" if c == "OTHER" else c for c in change]
    arguments = command(world, reference, "--resume", *change)
    if change[0] == "--data":
        del arguments[arguments.index("--data"):arguments.index("--data") + 2]
    assert expected in error_line(run(*arguments))


def test_a_checkpoint_of_another_model_is_refused(world, tmp_path, reference):
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**MODEL, "intermediate_size": 64}))
    arguments = command(world, reference, "--resume")
    arguments[arguments.index("--model") + 1] = other
    assert "another model" in error_line(run(*arguments))


def test_config_file_and_command_line_say_the_same(world, tmp_path, reference):
    options = tmp_path / "run.toml"
    options.write_text(f'model = "{world}/model.json"\ndata = "{world}/train_*.bin"\nmicro-batch = 2\nglobal-batch = 64\nsteps = 12\nlr = 1e-2\n'
                       "warmup-steps = 2\nschedule = constant\ncheckpoint-every = 3\nkeep = 0\n")
    result = run(PROGRAM, "train", "--config", options, "--out", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert weights(tmp_path / "run") == weights(reference)


def test_keep_removes_older_checkpoints(world, tmp_path):
    train(world, tmp_path / "run", "--keep", "2")
    assert sorted(p for p in os.listdir(tmp_path / "run") if p.startswith("step")) == ["step_00000009", "step_00000012"]
    assert os.readlink(tmp_path / "run/latest") == "step_00000012"


def test_eval_repeats_the_last_validation(world, tmp_path):
    out = tmp_path / "run"
    train(world, out, "--val", f"{world}/val_*.bin", "--val-batches", "3")
    result = run(PROGRAM, "eval", "--checkpoint", out, "--data", f"{world}/val_*.bin", "--micro-batch", "2", "--batches", "3")
    assert result.returncode == 0, result.stderr
    got = {int(n): float(loss) for n, loss in re.findall(r"length (\d+) \| loss ([\d.]+)", result.stdout)}
    assert got == {r["length"]: pytest.approx(r["loss"], abs=1e-4) for r in records(out, "val")}


def test_init_from_takes_the_weights_alone(world, tmp_path, reference):
    out = tmp_path / "run"
    train(world, out, "--init-from", reference, "--lr", "1e-3", "--seed", "5", steps=3)
    assert records(out, "train")[0]["step"] == 1
    assert records(out, "train")[0]["loss"] < records(reference, "train")[0]["loss"] - 0.3


BAD_RUNS = {
    "no such shard": (["--data", "/nowhere/*.bin"], "no file matches '/nowhere/*.bin'"),
    "no such model": (["--model", "samba-9b"], "no such model"),
    "a word for a number": (["--steps", "many"], "many is not a whole number"),
    "a number out of range": (["--beta1", "1.5"], "--beta1"),
    "an unknown option": (["--learning-rate", "1"], "--learning-rate"),
    "a batch that does not divide": (["--global-batch", "50"], "--global-batch 50: must be a multiple"),
    "no steps": (["--steps", "0"], "give --steps N or --tokens N"),
    "both lengths": (["--tokens", "1m"], "--steps and --tokens are both given"),
    "a sequence longer than the data": (["--seq-len", "100k", "--global-batch", "0"], "smaller --seq-len or more data"),
    "a bad validation length": (["--val-lengths", "1x,half"], "--val-lengths half"),
    "a precision that does not exist": (["--matmul", "int8"], "--matmul"),
    "a config file that is not there": (["--config", "/nowhere.toml"], "/nowhere.toml"),
}


@pytest.mark.parametrize("name", BAD_RUNS)
def test_bad_options_get_one_clear_line(world, tmp_path, name):
    change, expected = BAD_RUNS[name]
    arguments = command(world, tmp_path / "run")
    if change[0] in arguments:
        at = arguments.index(change[0])
        del arguments[at:at + 2]
    assert expected in error_line(run(*arguments, *change))


def test_fp8_is_refused_where_there_is_none(world, tmp_path, reference):
    if run(PROGRAM, "info", "--device").stdout.startswith("gpu"):
        pytest.skip("only a CPU build must refuse fp8: this GPU build may have such products")
    for arguments in (command(world, tmp_path / "run"), [PROGRAM, "bench", "--model", "tiny"]):
        assert "--matmul fp8: the build" in error_line(run(*arguments, "--matmul", "fp8"))
    assert not (tmp_path / "run").exists()
    assert records(reference, "run")[0]["options"]["matmul"] == "bf16"


def test_a_token_outside_the_vocabulary_is_named(world, tmp_path):
    tokens = np.arange(3000) % VOCAB
    tokens[1234] = VOCAB + 5
    write_shard(tmp_path / "bad.bin", tokens, vocab=0)
    arguments = command(world, tmp_path / "run", steps=100)
    arguments[arguments.index("--data") + 1] = tmp_path / "bad.bin"
    line = error_line(run(*arguments))
    assert "bad.bin: token 69 at position 1234" in line and "vocabulary of 64" in line


def test_a_cut_off_shard_is_named(world, tmp_path):
    shard = tmp_path / "cut.bin"
    shard.write_bytes((world / "train_000.bin").read_bytes()[:-100])
    arguments = command(world, tmp_path / "run")
    arguments[arguments.index("--data") + 1] = shard
    assert "cut.bin is cut off" in error_line(run(*arguments))


def test_help_and_info_come_without_a_run():
    helped = run(PROGRAM, "--help")
    assert helped.returncode == 0
    for option in ("--model", "--global-batch", "--resume", "--recompute", "--val-lengths", "--config"):
        assert option in helped.stdout
    listed = run(PROGRAM, "info")
    assert listed.returncode == 0 and "samba-421m" in listed.stdout and "421793280" in listed.stdout
    info = run(PROGRAM, "info", "--model", "samba-1.3b", "--micro-batch", "4")
    assert info.returncode == 0 and "1330207488 parameters" in info.stdout and "recompute light" in info.stdout
    assert "no such model" in error_line(run(PROGRAM, "info", "--model", "nothing"))


def test_generate_without_a_tokenizer_says_so(reference):
    assert "tokenizer.model" in error_line(run(PROGRAM, "generate", "--checkpoint", reference, "--prompt", "x"))
