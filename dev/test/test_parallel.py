"""Several processes of the CPU build: the same training as one, and a job that ends with a reason when one of them fails.

Runs build/cpu/train_samba (SAMBA_PROGRAM=PATH: another build) on a model of a few thousand parameters, under mpirun and by
RANK, WORLD_SIZE and MASTER_ADDR. Every rank computes with one thread: the machine may have fewer cores than ranks.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from test_cli import MODEL, PROGRAM, ROOT, VOCAB, error_line, records, run, world, write_shard  # noqa: F401  world is a fixture

OF_LAUNCHERS = ("OMPI_", "PMIX_", "PMI_", "SLURM_", "RANK", "WORLD_SIZE", "MASTER_")
ENVIRONMENT = {**{k: v for k, v in os.environ.items() if not k.startswith(OF_LAUNCHERS)}, "OMP_NUM_THREADS": "1"}
needs_mpi = pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not installed")


def options(world, out, *extra, steps=6, micro_batch=1):
    """12 sequences of 16 tokens a step: 1, 2, 3 and 4 ranks divide it"""
    return [str(a) for a in (PROGRAM, "--model", world / "model.json", "--data", f"{world}/train_*.bin", "--out", out, "--micro-batch", micro_batch,
                             "--global-batch", 192, "--steps", steps, "--lr", "3e-3", "--warmup-steps", 0, "--schedule", "constant",
                             "--checkpoint-every", 0, "--keep", 0, *extra)]


def mpirun(ranks, arguments):
    return ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", str(ranks), *arguments]


def start(*arguments, **environment):
    """A process whose output can be read while it runs"""
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**ENVIRONMENT, **environment})


def launch(ranks, arguments):
    return run(*(mpirun(ranks, arguments) if ranks > 1 else arguments), env=ENVIRONMENT)


def train(ranks, world, out, *extra, **more):
    result = launch(ranks, options(world, out, *extra, **more))
    assert result.returncode == 0, result.stderr
    return result


def losses(out):
    return [r["loss"] for r in records(out, "train")]


def tensors(path):
    """{name: flat array} of a safetensors file, and its metadata"""
    data = open(path, "rb").read()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    metadata = header.pop("__metadata__", {})
    values = np.frombuffer(data[8 + size :], "<f4")
    return {name: values[t["data_offsets"][0] // 4 : t["data_offsets"][1] // 4] for name, t in header.items()}, metadata


def moments(folder):
    """The optimizer's state of a checkpoint, whatever number of processes wrote it"""
    pieces = {}
    for name in os.listdir(folder):
        if name.startswith("optimizer"):
            values, metadata = tensors(f"{folder}/{name}")
            begins = json.loads(metadata.get("begin", "{}"))
            for key, value in values.items():
                pieces.setdefault(key, []).append((begins.get(key.split(".", 1)[1], 0), value))
    return {key: np.concatenate([v for _, v in sorted(parts, key=lambda p: p[0])]) for key, parts in pieces.items()}


def state(out, step):
    """Everything that a resumed run begins with"""
    folder = f"{out}/step_{step:08d}"
    return {**tensors(f"{folder}/model.safetensors")[0], **moments(folder)}


def same_bits(a, b):
    return a.keys() == b.keys() and all(a[k].tobytes() == b[k].tobytes() for k in a)


def assert_close(a, b, tolerance):
    assert a.keys() == b.keys()
    for key in a:
        assert np.linalg.norm(a[key] - b[key]) <= tolerance * np.linalg.norm(b[key]) + 1e-12, key


@pytest.fixture(scope="module")
def single(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("single") / "run"
    train(1, world, out, "--val", f"{world}/val_*.bin", steps=20)
    return out


class WaitedFor:
    """A job that is left to itself: how long it still lives from now on, and the last words of its rank 0"""

    def __init__(self, processes):
        self.processes, self.started, self.seconds = processes, time.time(), None
        self.thread = threading.Thread(target=self.wait)
        self.thread.start()

    def wait(self):
        _, self.error = self.processes[0].communicate()
        self.seconds = time.time() - self.started

    def end(self):
        for process in self.processes:
            process.kill()
        self.thread.join()
        for process in self.processes[1:]:
            process.communicate()


@pytest.fixture(scope="module")
def lost_jobs(world, tmp_path_factory, disk):
    """Two ranks of which one is stopped, and two of which one hangs in the checkpoint of step 4, with the timeout as it is: left to
    themselves while other tests run"""
    out = tmp_path_factory.mktemp("stopped") / "run"
    processes = start_by_environment(2, lambda r: options(world, out, steps=100000))
    until_step(processes[0])
    processes[1].send_signal(signal.SIGSTOP)
    stopped = WaitedFor(processes)
    out = tmp_path_factory.mktemp("hanging") / "run"
    processes = start_by_environment(2, lambda r: options(world, out, "--checkpoint-every", 2, steps=100000),
                                     more_of=lambda r: disk("hang write */.tmp_step_00000004*") if r == 1 else {})
    until_step(processes[0], 4)
    hanging = WaitedFor(processes)
    yield stopped, hanging, out
    stopped.end()
    hanging.end()


def test_ranks_are_lost_and_the_timeout_begins(lost_jobs):
    """The last tests of this file see how long it took."""
    assert all(job.thread.is_alive() and job.seconds is None for job in lost_jobs[:2])


# Float rounding of sums in another order, through 20 AdamW steps: 1e-4 in a loss of 4 is a hundred times the unit in the last place.
@needs_mpi
@pytest.mark.parametrize("ranks,extra", [(2, ["--zero", "0"]), (2, ["--bucket", "1"]), (3, ["--zero", "1", "--bucket", "8k"]), (4, []),
                                         (4, ["--zero", "0", "--bucket", "8k"])])
def test_losses_do_not_depend_on_the_number_of_ranks(world, tmp_path, single, ranks, extra):
    result = train(ranks, world, tmp_path / "run", "--val", f"{world}/val_*.bin", *extra, steps=20)
    assert losses(tmp_path / "run") == pytest.approx(losses(single), abs=1e-4)
    assert [r["loss"] for r in records(tmp_path / "run", "val")] == pytest.approx([r["loss"] for r in records(single, "val")], abs=1e-4)
    assert_close(state(tmp_path / "run", 20), state(single, 20), 1e-2)
    assert result.stdout.count(f"ranks    {ranks} on 1 hosts") == 1 and "MPI through host memory" in result.stdout


# A gradient that travels as bf16 is off by 1/256 at the most (the sums themselves: test_parallel.cu), and its rounding errors are
# as often up as down: the norm of the first step's gradient is right to 1/256 of itself, losses follow those of fp32, and a
# repetition is the same bits.
@needs_mpi
@pytest.mark.parametrize("zero", ["0", "1"])
def test_gradients_that_travel_as_bf16(world, tmp_path, single, zero):
    def by_environment(out):
        ended = finish(start_by_environment(3, lambda r: options(world, out, "--reduce", "bf16", "--zero", zero, steps=20)))
        assert all(code == 0 for _, _, code in ended), ended
        return ended[0][0]

    outputs = [train(3, world, tmp_path / "mpi", "--reduce", "bf16", "--zero", zero, steps=20).stdout, by_environment(tmp_path / "tcp")]
    for output, transport in zip(outputs, ("MPI", "TCP")):
        assert f"gradients as bf16 in 1 buckets by {transport} through host memory" in output
    assert same_bits(state(tmp_path / "mpi", 20), state(tmp_path / "tcp", 20))
    exact, rounded = [records(out, "train")[0]["grad_norm"] for out in (single, tmp_path / "mpi")]
    assert 0 < abs(rounded / exact - 1) < 1 / 256
    difference = np.abs(np.array(losses(tmp_path / "mpi")) - np.array(losses(single)))
    assert 0 < difference.max() < 0.02 and difference[0] < 1e-4


@needs_mpi
def test_two_runs_on_as_many_ranks_are_the_same_bits(world, tmp_path):
    for out, extra in (("a", []), ("b", []), ("buckets", ["--bucket", "4k"]), ("delays", ["--bucket", "4k"])):
        environment = {**ENVIRONMENT, **({"SAMBA_TEST_DELAY": "100"} if out == "delays" else {})}
        result = run(*mpirun(3, options(world, tmp_path / out, *extra)), env=environment)
        assert result.returncode == 0, result.stderr
    for other in ("b", "buckets", "delays"):
        assert same_bits(state(tmp_path / "a", 6), state(tmp_path / other, 6))


@needs_mpi
def test_a_run_of_4_ranks_goes_on_with_3_and_with_1(world, tmp_path):
    """Saved at 4, resumed at 3 and at 1: the same state read, the same data following."""
    train(4, world, tmp_path / "run")
    files = sorted(f for f in os.listdir(tmp_path / "run/step_00000006") if "optimizer" in f)
    assert files == [f"optimizer.0000{r}-of-00004.safetensors" for r in range(4)]
    outs = {}
    for ranks in (4, 3, 1):
        outs[ranks] = tmp_path / f"resumed_{ranks}"
        shutil.copytree(tmp_path / "run", outs[ranks], symlinks=True)
        train(ranks, world, outs[ranks], "--resume", steps=10)
    whole = tmp_path / "whole"
    train(4, world, whole, steps=10)
    assert same_bits(state(outs[4], 10), state(whole, 10))
    for ranks in (3, 1):
        assert losses(outs[ranks]) == pytest.approx(losses(whole), abs=1e-4)
        assert_close(state(outs[ranks], 10), state(whole, 10), 1e-2)
    # and back: one process wrote it, four read it
    train(4, world, outs[1], "--resume", steps=12)
    assert len(losses(outs[1])) == 12


@needs_mpi
def test_a_checkpoint_passes_unchanged_through_any_number_of_ranks(world, tmp_path):
    """With a learning rate of 0 a step keeps the weights: what was saved at 4 is saved again at 3 and 1, bit for bit."""
    out = tmp_path / "run"
    train(4, world, out)
    for ranks, step in ((3, 7), (1, 8)):
        train(ranks, world, out, "--resume", "--lr", "0", steps=step)
        assert same_bits(tensors(f"{out}/step_{step:08d}/model.safetensors")[0], tensors(f"{out}/step_00000006/model.safetensors")[0])


def free_port():
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


def listener_before_a_free_port():
    while True:
        listener = socket.create_server(("127.0.0.1", 0))
        try:
            socket.create_server(("", listener.getsockname()[1] + 1)).close()
            return listener
        except OSError:
            listener.close()


def start_by_environment(ranks, arguments_of, prefix_of=lambda rank: [], master="127.0.0.1", more_of=lambda rank: {}):
    port = free_port()
    rendezvous = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": master, "MASTER_PORT": str(port)}
    return [start(*prefix_of(r), *arguments_of(r), **{"RANK": str(r), **rendezvous, **more_of(r)}) for r in range(ranks)]


def finish(processes, timeout=60):
    """Standard output, standard error and status of each; what all have said where one does not end"""
    try:
        return [(*p.communicate(timeout=timeout), p.returncode) for p in processes]
    except subprocess.TimeoutExpired:
        for p in processes:
            p.kill()
        raise AssertionError(f"not ended after {timeout} s: {[(*p.communicate(), p.returncode) for p in processes]}") from None


def test_ranks_meet_by_the_environment_alone(world, tmp_path, single):
    ended = finish(start_by_environment(3, lambda r: options(world, tmp_path / "run", steps=20)))
    assert all(code == 0 for _, _, code in ended), ended
    assert "TCP through host memory" in ended[0][0] and ended[1][0] == ""
    assert losses(tmp_path / "run") == pytest.approx(losses(single), abs=1e-4)


def test_the_variables_that_torchrun_sets(world, tmp_path, single):
    """All of them, as its documentation lists them; MASTER_PORT is where its own store listens, when it says so."""
    with listener_before_a_free_port() as store:
        port = store.getsockname()[1]
        of_agent = {"MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1", "ROLE_NAME": "default",
                    "ROLE_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0",
                    "TORCHELASTIC_USE_AGENT_STORE": "True"}
        ended = finish(start_by_environment(2, lambda r: options(world, tmp_path / "run", steps=20),
                                            more_of=lambda r: {**of_agent, "LOCAL_RANK": str(r), "ROLE_RANK": str(r)}))
    assert all(code == 0 for _, _, code in ended), ended
    assert losses(tmp_path / "run") == pytest.approx(losses(single), abs=1e-4)


def test_a_rank_that_never_comes_is_named(world, tmp_path):
    """The ones that came wait 60 s; here only the message of a wrong world size, at once."""
    arguments = options(world, tmp_path / "run")
    port = str(free_port())
    first, second = [start(*arguments, RANK=str(r), WORLD_SIZE=str(n), MASTER_ADDR="localhost", MASTER_PORT=port) for r, n in ((0, 2), (1, 3))]
    assert second.wait(timeout=60) == 1 and "set the same WORLD_SIZE everywhere" in second.stderr.read()
    first.kill()
    first.communicate()


@pytest.mark.parametrize("change,expected", [
    (["--lr", "1e-3"], r"rank 1 on \S+ has another --lr than rank 0 on \S+: 0.001, not 0.003"),
    (["--model", "OTHER"], "has another model configuration"),
    (["--data", "OTHER"], "has another content of --data"),
])
def test_ranks_that_disagree_are_refused(world, tmp_path, change, expected):
    if change[0] == "--model":
        (tmp_path / "model.json").write_text(json.dumps({**MODEL, "intermediate_size": 64}))
        change = ["--model", tmp_path / "model.json"]
    if change[0] == "--data":                               # the same names and lengths, another content
        for name in ("train_000", "train_001"):
            raw = bytearray((world / f"{name}.bin").read_bytes())
            raw[1024:] = (np.frombuffer(bytes(raw[1024:]), "<u2") ^ 1).astype("<u2").tobytes()
            (tmp_path / f"{name}.bin").write_bytes(bytes(raw))
        change = []
    folder = lambda r: tmp_path if r == 1 and not change else world
    own_options = lambda r: options(world, tmp_path / "run", *(change if r == 1 else []))
    ended = finish(start_by_environment(2, lambda r: [a.replace(f"{world}/train", f"{folder(r)}/train") for a in own_options(r)]))
    assert [code for _, _, code in ended] == [1, 1]
    assert re.search(expected, ended[0][1]), ended[0][1]


def test_a_rank_with_another_program_is_refused(world, tmp_path):
    """The same source and options, another file: built elsewhere, or not copied."""
    other = tmp_path / "train_samba"
    other.write_bytes(open(PROGRAM, "rb").read() + b"0")
    other.chmod(0o755)
    ended = finish(start_by_environment(2, lambda r: [str(other) if r == 1 else PROGRAM, *options(world, tmp_path / "run")[1:]]))
    assert [code for _, _, code in ended] == [1, 1]
    expected = r"rank 1 on \S+ has another program than rank 0 on \S+: .* \d+, not .* \d+; build once and copy that file to every host"
    assert re.search(expected, ended[0][1]), ended[0][1]
    assert not (tmp_path / "run").exists()


def test_zero_2_is_refused_with_the_reason(world, tmp_path):
    line = error_line(run(*options(world, tmp_path / "run", "--zero", "2")))
    assert "--zero: 2 is not built" in line and "use --zero 1" in line


def until_step(process, step=2):
    while not re.match(rf"step +{step}/", line := process.stdout.readline()):
        assert line, process.stderr.read()


def test_a_killed_rank_ends_the_job_with_its_name(world, tmp_path):
    processes = start_by_environment(3, lambda r: options(world, tmp_path / "run", steps=100000))
    until_step(processes[0])
    started = time.time()
    processes[2].kill()
    ended = finish(processes)
    assert time.time() - started < 20
    assert ended[0][2] == 1 and ended[1][2] == 1
    assert re.search(r"error: rank 2 on \S+: it died", ended[0][1]), ended[0][1]


def test_the_loss_of_rank_0_ends_the_job_too(world, tmp_path):
    processes = start_by_environment(2, lambda r: options(world, tmp_path / "run", steps=100000))
    until_step(processes[0])
    processes[0].kill()
    ended = finish(processes)
    assert ended[1][2] == 1 and re.search(r"error: rank 0 on \S+: it died", ended[1][1])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_ends_the_job_with_its_name(world, tmp_path, rank):
    processes = start_by_environment(2, lambda r: options(world, tmp_path / "run", "--rank-timeout", "4", steps=100000))
    until_step(processes[0])
    processes[rank].send_signal(signal.SIGSTOP)
    started = time.time()
    other = processes[1 - rank]
    _, err = other.communicate(timeout=30)
    assert other.returncode == 1 and time.time() - started < 15
    assert re.search(rf"error: rank {rank} on \S+: no sign of life for \d+ s", err), err
    processes[rank].kill()
    processes[rank].communicate()


def child_pids(pid):
    return [int(c) for c in subprocess.run(["pgrep", "-P", str(pid), "-f", "train_samba"], capture_output=True, text=True).stdout.split()]


@needs_mpi
def test_killed_under_mpirun_and_resumed(world, tmp_path, single):
    """A rank killed at several moments, some of them while a checkpoint is written: what `latest` names is whole each time."""
    out = tmp_path / "run"
    in_checkpoint = 0
    for attempt in range(4):
        process = start(*mpirun(3, options(world, out, "--resume", "--checkpoint-every", 1, steps=100000)))
        while not (line := process.stdout.readline()).startswith("checkpoint "):
            assert line, process.stderr.read()
        while attempt % 2 and not any(n.startswith(".tmp_step") for n in os.listdir(out)):
            pass
        in_checkpoint += attempt % 2
        os.kill(child_pids(process.pid)[attempt % 3], signal.SIGKILL)
        _, err = process.communicate(timeout=60)
        assert process.returncode != 0 and ("it died" in err or "exited on signal 9" in err), err
        newest = os.readlink(out / "latest")
        saved = json.load(open(out / newest / "state.json"))
        assert all(os.path.getsize(out / newest / f) == size for f, size in saved["files"].items()) and len(saved["files"]) == 4
    assert in_checkpoint == 2
    step = int(newest[5:])
    for name in os.listdir(out):                            # half-written checkpoints go when their process has really left
        while name.startswith(".tmp_step") and os.path.exists(f"/proc/{name.rsplit('.', 1)[1]}"):
            time.sleep(0.1)
    train(3, world, out, "--resume", steps=step + 3)
    assert not [n for n in os.listdir(out) if n.startswith(".tmp_step")]
    seen = {r["step"]: r["loss"] for r in records(out, "train")}
    assert [seen[s] for s in range(1, min(step, 20) + 1)] == pytest.approx(losses(single)[:min(step, 20)], abs=1e-4)


@needs_mpi
def test_a_signal_to_any_rank_saves_and_leaves(world, tmp_path):
    out = tmp_path / "run"
    process = start(*mpirun(2, options(world, out, steps=100000)))
    until_step(process)
    os.kill(child_pids(process.pid)[1], signal.SIGTERM)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "continue with --resume" in rest
    assert records(out, "checkpoint")[-1]["step"] == records(out, "train")[-1]["step"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_of_one_rank_ends_the_job_and_harms_nothing(world, tmp_path, rank):
    out = tmp_path / "run"
    arguments = lambda r: options(world, out, "--resume", "--checkpoint-every", 3)
    assert all(code == 0 for _, _, code in finish(start_by_environment(2, lambda r: options(world, out, steps=3))))
    before = state(out, 3)
    limited = lambda r: ["bash", "-c", 'ulimit -f 8; exec "$@"', "limited"] if r == rank else []
    ended = finish(start_by_environment(2, arguments, limited))
    assert [code for _, _, code in ended] == [1, 1]
    assert re.search(rf"error: rank {rank} on \S+: cannot write \S+/(model|optimizer\.00001-of-00002)\.safetensors", ended[0][1]), ended
    assert same_bits(before, state(out, 3)) and os.readlink(out / "latest") == "step_00000003"
    assert all(code == 0 for _, _, code in finish(start_by_environment(2, arguments)))
    assert os.readlink(out / "latest") == "step_00000006"


def test_a_rank_that_hangs_is_named(world, tmp_path):
    """Alive, with its threads running, and not a step forward: SAMBA_TEST_HANG makes rank 1 sleep for ever."""
    ended = finish(start_by_environment(3, lambda r: options(world, tmp_path / "run", "--rank-timeout", 4, steps=100000),
                                        more_of=lambda r: {"SAMBA_TEST_HANG": "1"}))
    assert [code for _, _, code in ended] == [1, 1, 1]
    assert re.search(r"error: rank 1 on \S+: it hangs: \d+ s without progress", ended[0][1]), ended[0][1]


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """The environment of a process whose disk behaves as stuck_disk.c says"""
    library = tmp_path_factory.mktemp("disk") / "stuck_disk.so"
    if not shutil.which("cc"):
        pytest.skip("needs a C compiler")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, os.path.join(os.path.dirname(os.path.abspath(__file__)), "stuck_disk.c")], check=True)
    return lambda how: {"LD_PRELOAD": str(library), "DISK": how}


@pytest.mark.parametrize("rank,call,file,doing", [
    (0, "write", "*/.tmp_step_00000004*/*model*", "writing a checkpoint"),
    (1, "write", "*/.tmp_step_00000004*/*optimizer*", "writing a checkpoint"),
    (0, "fsync", "*/.tmp_step_00000004*/*state*", "writing a checkpoint"),
    (0, "write", "*/log.jsonl", "(starting|training)"),
    (1, "open", "*/step_00000002/optimizer*", "reading a checkpoint"),
    (1, "open", "*/train_*.bin", "starting"),
])
def test_a_rank_that_hangs_in_its_files_is_named(world, tmp_path, disk, rank, call, file, doing):
    out = tmp_path / "run"
    arguments = lambda r: options(world, out, "--resume", "--checkpoint-every", 2, "--rank-timeout", 2, steps=6)
    assert all(code == 0 for _, _, code in finish(start_by_environment(2, lambda r: options(world, out, steps=2))))
    before = state(out, 2)
    started = time.time()
    ended = finish(start_by_environment(2, arguments, more_of=lambda r: disk(f"hang {call} {file}") if r == rank else {}))
    assert [code for _, _, code in ended] == [1, 1] and time.time() - started < 8
    assert re.search(rf"error: rank {rank} on \S+: it hangs: \d+ s without progress while {doing}", ended[0][1]), ended[0][1]
    assert os.readlink(out / "latest") == "step_00000002" and same_bits(before, state(out, 2))
    assert all(code == 0 for _, _, code in finish(start_by_environment(2, arguments)))
    assert os.readlink(out / "latest") == "step_00000006" and not [n for n in os.listdir(out) if n.startswith(".tmp_step")]


def test_a_slow_disk_is_waited_for(world, tmp_path, disk):
    """Half a second for each piece of every file of a checkpoint, several times the timeout altogether"""
    started = time.time()
    ended = finish(start_by_environment(2, lambda r: options(world, tmp_path / "run", "--rank-timeout", 2),
                                        more_of=lambda r: disk("slow write */.tmp_step_*")))
    assert all(code == 0 for _, _, code in ended), ended
    assert time.time() - started > 5


def test_two_signals_at_once_count_as_one(world, tmp_path):
    """timeout sends one to the program and one to its group, which the program is in."""
    out = tmp_path / "run"
    result = run("timeout", "-s", "TERM", "2", *options(world, out, steps=100000), env=ENVIRONMENT)
    assert result.returncode == 124 and "continue with --resume" in result.stdout
    assert records(out, "checkpoint")[-1]["step"] == records(out, "train")[-1]["step"]
    process = start(*options(world, tmp_path / "twice", steps=100000))
    until_step(process)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=60)
    assert "continue with --resume" in rest and process.returncode == 0


def test_a_second_signal_leaves_at_once(world, tmp_path, disk):
    process = start(*options(world, tmp_path / "run", steps=100000), **disk("hang write */.tmp_step_*"))
    until_step(process)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == 130


@needs_mpi
def test_a_stopped_rank_under_mpirun(world, tmp_path):
    process = start(*mpirun(2, options(world, tmp_path / "run", "--rank-timeout", "3", steps=100000)))
    until_step(process)
    pids = child_pids(process.pid)
    os.kill(pids[1], signal.SIGSTOP)
    _, err = process.communicate(timeout=50)
    assert process.returncode != 0 and re.search(r"error: rank 1 on \S+: no sign of life", err), err
    assert not any(os.path.exists(f"/proc/{p}/exe") for p in pids)


@needs_mpi
def test_the_run_script_starts_again_from_latest(world, tmp_path):
    """scripts/run_421m_8gpu.sh with two ranks and a small model; one of them is killed, and the script finishes the run"""
    out = tmp_path / "run"
    shards = {"DATA": f"{world}/train_*.bin", "OUT": str(out), "RANKS": "2", "PROGRAM": PROGRAM, "RESTART_WAIT": "0"}
    recipe = options(world, out, "--checkpoint-every", 20, "--log-every", 1, steps=300)[1:]
    process = start(os.path.join(ROOT, "scripts/run_421m_8gpu.sh"), *recipe, **shards)
    while not (line := process.stdout.readline()).startswith("checkpoint "):
        assert line, process.stderr.read()
    mpi = int(subprocess.run(["pgrep", "-P", str(process.pid), "mpirun"], capture_output=True, text=True).stdout)
    os.kill(child_pids(mpi)[1], signal.SIGKILL)
    rest, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert "starting again from step_" in err and re.search(r"resumed  \S+ at step \d+0\n", rest)
    assert records(out, "train")[-1]["step"] == 300
    assert os.readlink(out / "latest") == "step_00000300"


def test_the_check_of_several_gpus_in_small(tmp_path):
    """make bench-scaling, with two ranks of this build and a small model: everything but the speed of GPUs"""
    check = os.path.join(ROOT, "dev/bench/scaling_check.py")
    result = run(sys.executable, check, "--small", "--ranks", "1,2", "--steps", "6", "--program", PROGRAM, "--out", tmp_path, env=ENVIRONMENT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("ok      ") == 7 and "FAILED" not in result.stdout
    measured = json.load(open(tmp_path / "scaling.json"))
    assert [(r["ranks"], r["accumulate"], r["reduce"], r["overlap"]) for r in measured["speed"]] == [
        (ranks, accumulate, *way) for accumulate in (8, 1)
        for ranks, *way in ((1, "fp32", True), (2, "fp32", True), (2, "bf16", True), (2, "fp32", False), (2, "bf16", False))]
    assert (tmp_path / "scaling.png").stat().st_size > 10000 and "| 2 |" in (tmp_path / "README.md").read_text()


def test_what_follows_from_measured_throughput_is_stated_as_it_is():
    """The tables of the scaling page, and the cost at the top of each script: dev/scaling.py --write puts both there."""
    tables = run(sys.executable, os.path.join(ROOT, "dev/scaling.py"))
    assert tables.returncode == 0 and tables.stdout.strip() in open(os.path.join(ROOT, "dev/scaling.md")).read()
    spec = importlib.util.spec_from_file_location("scaling", os.path.join(ROOT, "dev/scaling.py"))
    scaling = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scaling)
    for path, of in scaling.RUNS.items():
        assert f"\n{scaling.cost(*of)}\n" in open(os.path.join(ROOT, path)).read(), path


# ---------------------------------------------------------------------------------------------------------------------
# What is not finite

def shard_with_a_rare_token(path):
    """64 samples of 16 tokens, of which the 10th, 31st and 50th hold the token 63"""
    tokens = np.random.default_rng(2).integers(0, 60, 64 * 16 + 1)
    tokens[[10 * 16 + 5, 31 * 16 + 5, 50 * 16 + 5]] = 63
    write_shard(path, tokens)


def poison(path, name, row):
    """Makes one row of a tensor NaN in a safetensors file"""
    raw = bytearray(open(path, "rb").read())
    size = int.from_bytes(raw[:8], "little")
    tensor = json.loads(raw[8 : 8 + size])[name]
    begin, width = 8 + size + tensor["data_offsets"][0], 4 * tensor["shape"][1]
    raw[begin + row * width : begin + (row + 1) * width] = np.full(tensor["shape"][1], np.nan, "<f4").tobytes()
    open(path, "wb").write(bytes(raw))


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    """A model whose embedding of token 63 is not a number, and data in which three samples of 64 hold that token"""
    folder = tmp_path_factory.mktemp("poisoned")
    (folder / "model.json").write_text(json.dumps({**MODEL, "tied": False}))
    shard_with_a_rare_token(folder / "train_000.bin")
    assert launch(1, options(folder, folder / "run", steps=1)).returncode == 0
    poison(folder / "run/step_00000001/model.safetensors", "transformer.wte.weight", 63)
    return folder


@needs_mpi
def test_what_is_not_finite_on_one_rank_skips_the_step_on_all(poisoned, tmp_path):
    outs = [tmp_path / "one", tmp_path / "three"]
    for ranks, out in zip((1, 3), outs):
        result = launch(ranks, options(poisoned, out, "--init-from", poisoned / "run", "--global-batch", 48, steps=20))
        assert result.returncode == 0, result.stderr
    skipped = [[r["skipped"] for r in records(out, "train")] for out in outs]
    assert skipped[0] == skipped[1] and skipped[0][:20].count(True) in (2, 3)
    finite = [[r["loss"] for r in records(out, "train") if not r["skipped"]] for out in outs]
    assert finite[1] == pytest.approx(finite[0], abs=1e-4)
    assert f"{skipped[1].count(True)}" == str(json.load(open(outs[1] / "step_00000020/state.json"))["skipped"])


@needs_mpi
def test_a_run_that_stays_not_finite_stops_and_names_the_layer(poisoned, tmp_path):
    result = launch(2, options(poisoned, tmp_path / "run", "--init-from", poisoned / "run", "--global-batch", 64 * 16, "--max-skips", 3, steps=20))
    assert result.returncode != 0
    expected = r"error: rank 0 on \S+: 3 steps in a row had a gradient that is not finite .* first the output of the embedding on rank [01]"
    assert re.search(expected, result.stderr), result.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Machines: network namespaces, each with an address and a host name of its own

class Hosts:
    """Two namespaces with a cable between them. In each its name and address are those of a host, and both names are in /etc/hosts."""

    names, addresses = ["node1", "node2"], ["10.66.0.1", "10.66.0.2"]

    def __init__(self, namespaces, folder):
        self.namespaces, self.folder = namespaces, folder
        (folder / "etc_hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for a, n in zip(self.addresses, self.names)))
        cases = "".join(f"{self.names[i]} | {self.addresses[i]}) exec {shlex.join(self.inside(i))} bash -c \"$*\" ;;\n" for i in range(2))
        (folder / "agent.sh").write_text(f"#!/bin/bash\n# what ssh is elsewhere: HOST COMMAND...\nhost=$1; shift\ncase $host in\n{cases}esac\n")
        (folder / "agent.sh").chmod(0o755)

    def inside(self, i):
        """What stands before a command that runs on host i"""
        setup = f'hostname {self.names[i]}; mount --bind {self.folder}/etc_hosts /etc/hosts; exec "$@"'
        return ["ip", "netns", "exec", self.namespaces[i], "unshare", "--uts", "--mount", "bash", "-c", setup, "inside"]

    def mpi_environment(self):
        """How to reach a host, which elsewhere is ssh, and that this is root"""
        as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        return {**ENVIRONMENT, **as_root, "OMPI_MCA_plm_rsh_agent": str(self.folder / "agent.sh")}


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory):
    names, addresses = [f"samba{os.getpid()}{side}" for side in "ab"], Hosts.addresses
    ip = lambda *a: subprocess.run(["ip", *a], capture_output=True, text=True, check=True)
    if not shutil.which("ip") or not shutil.which("unshare") or os.geteuid() != 0:
        pytest.skip("network namespaces need root, ip and unshare")
    try:
        try:
            for name in names:
                ip("netns", "add", name)
                ip("-n", name, "link", "set", "lo", "up")
            ip("-n", names[0], "link", "add", "eth0", "type", "veth", "peer", "name", "eth1")
            ip("-n", names[0], "link", "set", "eth1", "netns", names[1])
            for name, address, device in zip(names, addresses, ("eth0", "eth1")):
                ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
                ip("-n", name, "link", "set", device, "up")
            subprocess.run(["ip", "netns", "exec", names[0], "true"], check=True, capture_output=True)
        except (subprocess.CalledProcessError, OSError) as error:
            pytest.skip(f"this machine does not allow network namespaces: {getattr(error, 'stderr', error)}")
        yield Hosts(names, tmp_path_factory.mktemp("hosts"))
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def readme_commands():
    """The indented lines of README's section on several machines, without comments"""
    section = open(os.path.join(ROOT, "README.md"), encoding="utf-8").read().split("## Several GPUs, several machines\n")[1].split("\n## ")[0]
    return [line.strip() for line in section.splitlines() if line.startswith("    ")]


@pytest.fixture
def checkout(tmp_path):
    """A folder in which README's commands find what they name: the program and the quick start's data"""
    (tmp_path / "train_samba").symlink_to(PROGRAM)
    (tmp_path / "data/stdlib").mkdir(parents=True)
    starts = np.random.default_rng(3).integers(0, 4096, 2000)
    write_shard(tmp_path / "data/stdlib/train_00000.bin", (np.repeat(starts, 10) + np.tile(np.arange(10), 2000)) % 4096, 4096)
    return tmp_path


@needs_mpi
def test_the_rehearsal_of_the_readme_as_it_stands_there(checkout, two_hosts):
    commands = readme_commands()
    (checkout / "hosts").write_text("".join(f"{line}\n" for line in commands if re.fullmatch(r"node\d slots=\d", line)))
    rehearsal = [line for line in commands if "data/stdlib" in line]
    with_mpi, by_hand = [line for line in rehearsal if line.startswith("mpirun")], [line for line in rehearsal if line.startswith("RANK=")]
    assert len(with_mpi) == 3 and len(by_hand) == 2 and len(rehearsal) == 5
    for line, ranks in zip(with_mpi, ("2 on 1 hosts", "4 on 2 hosts", "2 on 1 hosts")):
        result = run(*two_hosts.inside(0), "bash", "-c", line, env=two_hosts.mpi_environment(), cwd=checkout)
        assert result.returncode == 0 and f"ranks    {ranks}" in result.stdout, result.stdout + result.stderr
    ended = finish([start(*two_hosts.inside(i), "bash", "-c", f"cd {checkout}; {line}") for i, line in enumerate(by_hand)])
    assert all(code == 0 for _, _, code in ended), ended
    two, four, hand = [losses(checkout / "out" / name) for name in ("two", "four", "hand")]
    assert (len(two), len(four), len(hand)) == (5, 10, 5)
    assert four[:5] == pytest.approx(two, abs=1e-3) and hand == pytest.approx(two, abs=1e-3)


@needs_mpi
def test_the_full_size_commands_of_the_readme_are_well_formed(checkout, two_hosts):
    """With as many processes as they name, up to the data, which is missing: options, recipe and batch are accepted."""
    full = [line for line in readme_commands() if "data/mine" in line]
    assert len(full) == 2
    (checkout / "hosts").write_text("node1 slots=32\nnode2 slots=32\n")
    environment = {**two_hosts.mpi_environment(), "OMPI_MCA_rmaps_base_oversubscribe": "1"}
    for line in full:
        result = run(*two_hosts.inside(0), "bash", "-c", line, env=environment, cwd=checkout)
        assert result.returncode != 0
        assert re.search(r"error: (rank \d+ on \S+: )?no file matches 'data/mine/train_\*.bin'", result.stderr), result.stderr


def test_two_hosts_by_the_environment(world, tmp_path, single, two_hosts):
    arguments = options(world, tmp_path / "run", steps=20)
    ended = finish(start_by_environment(4, lambda r: arguments, lambda r: two_hosts.inside(r // 2), two_hosts.addresses[0]))
    assert all(code == 0 for _, _, code in ended), ended
    assert "node1: 0 1\n" in ended[0][0] and "node2: 2 3\n" in ended[0][0]
    assert losses(tmp_path / "run") == pytest.approx(losses(single), abs=1e-4)


def test_a_host_whose_cable_is_cut_ends_the_job(world, tmp_path, two_hosts):
    arguments = options(world, tmp_path / "run", "--rank-timeout", "4", steps=100000)
    processes = start_by_environment(2, lambda r: arguments, two_hosts.inside, two_hosts.addresses[0])
    until_step(processes[0])
    subprocess.run(["ip", "-n", two_hosts.namespaces[1], "link", "set", "eth1", "down"], check=True)
    try:
        ended = finish(processes)
        assert [code for _, _, code in ended] == [1, 1]
        assert "error: rank 1 on node2: no sign of life" in ended[0][1] and "error: rank 0 on node1: no sign of life" in ended[1][1]
    finally:
        subprocess.run(["ip", "-n", two_hosts.namespaces[1], "link", "set", "eth1", "up"], check=True)


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU: the float build, whose numbers are those of the CPU to rounding

GPU_PROGRAM = os.environ.get("SAMBA_GPU_PROGRAM", os.path.join(ROOT, "build/gpu-fp32/train_samba"))
GPUS = 0
if shutil.which("nvidia-smi") and os.path.exists(GPU_PROGRAM):
    GPUS = subprocess.run(["nvidia-smi", "-L"], capture_output=True).stdout.count(b"GPU ")
needs_gpu = pytest.mark.skipif(GPUS < 1, reason="needs a GPU and build/gpu-fp32/train_samba")
needs_gpus = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs and build/gpu-fp32/train_samba")


def on_gpu(arguments):
    return [GPU_PROGRAM, *arguments[1:]]


@pytest.fixture(scope="module")
def single_gpu(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("single_gpu") / "run"
    result = run(*on_gpu(options(world, out, steps=20)), env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr
    return out


# Each event, and how late collectives and computing must be, in microseconds, for its absence to show. One rank's collectives move nothing: what
# shows is that their data cannot be read meanwhile, and that what is written meanwhile is undone. What is read or written once a step needs a
# collective that has begun before the late computing comes, and lasts longer.
EARLY, LATE, AROUND = ("1", "2000"), ("2000", "0"), ("4000", "2000")
EVENTS = {
    "gradients": EARLY,
    "own numbers": AROUND,
    "own weights": AROUND,
    "summed gradients": LATE,
    "everybody's numbers": AROUND,
    "new weights": LATE,
}


@needs_gpu
@pytest.mark.parametrize("zero", [0, 1])
def test_nccl_with_one_rank_changes_no_bit(world, tmp_path, single_gpu, zero):
    """Every collective, bucket and event of a run on many GPUs, with one; and once more with delays, which show an event that is missing."""
    for collectives, compute in sorted({("0", "0"), *EVENTS.values()}):
        out = tmp_path / f"delay_{collectives}_{compute}"
        result = run(*on_gpu(options(world, out, "--collectives", "nccl", "--zero", zero, "--bucket", "8k", steps=20)),
                     env={**ENVIRONMENT, "SAMBA_TEST_DELAY": collectives, "SAMBA_TEST_DELAY_COMPUTE": compute})
        assert result.returncode == 0, result.stderr
        assert "by NCCL" in result.stdout
        assert same_bits(state(out, 20), state(single_gpu, 20))


# Each event is needed, and the test above would see that it is missing: without it the bits are others, or the run fails.
@needs_gpu
@pytest.mark.parametrize("event", EVENTS)
def test_without_an_event_the_bits_are_others(world, tmp_path, single_gpu, event):
    collectives, compute = EVENTS[event]
    result = run(*on_gpu(options(world, tmp_path / "run", "--collectives", "nccl", "--bucket", "8k", steps=20)),
                 env={**ENVIRONMENT, "SAMBA_TEST_DROP": event, "SAMBA_TEST_DELAY": collectives, "SAMBA_TEST_DELAY_COMPUTE": compute})
    stopped = not (tmp_path / "run/step_00000020").exists()            # a word read too early may also be the one that asks to stop
    assert result.returncode != 0 or stopped or not same_bits(state(tmp_path / "run", 20), state(single_gpu, 20))


@needs_gpu
@pytest.mark.parametrize("zero", [0, 1])
def test_two_ranks_that_share_a_gpu(world, tmp_path, single_gpu, zero):
    arguments = on_gpu(options(world, tmp_path / "run", "--zero", zero, steps=20))
    ended = finish(start_by_environment(2, lambda r: arguments, more_of=lambda r: {"CUDA_VISIBLE_DEVICES": "0"}), timeout=120)
    assert all(code == 0 for _, _, code in ended), ended
    assert "ranks 0 and 1 share a GPU, which NCCL refuses: gradients go through host memory" in ended[0][0]
    assert losses(tmp_path / "run") == pytest.approx(losses(single_gpu), abs=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# On two GPUs, one process each: NCCL between them

def start_on_gpus(ranks, arguments, **environment):
    return start_by_environment(ranks, lambda r: on_gpu(arguments), more_of=lambda r: environment)


def train_on_gpus(ranks, arguments, **environment):
    """The output of rank 0"""
    ended = finish(start_on_gpus(ranks, arguments, **environment) if ranks > 1 else [start(*on_gpu(arguments), **environment)], timeout=120)
    assert all(code == 0 for _, _, code in ended), ended
    return ended[0][0]


@needs_gpus
@pytest.mark.parametrize("zero", [0, 1])
def test_two_gpus_train_as_one(world, tmp_path, single_gpu, zero):
    """1 rank x 12 micro-batches and 2 x 6, the same again with other buckets, and with either stream late: rounding apart, and the same bits"""
    outs = [tmp_path / name for name in ("run", "again", "collectives_late", "computing_late")]
    delays = [{}, {}, {"SAMBA_TEST_DELAY": "2000"}, {"SAMBA_TEST_DELAY": "1", "SAMBA_TEST_DELAY_COMPUTE": "2000"}]
    for out, late in zip(outs, delays):
        output = train_on_gpus(2, options(world, out, "--zero", zero, "--bucket", "8k" if out != outs[1] else "1000b", steps=20), **late)
        assert "by NCCL, in a ring" in output and "ranks    2 on 1 hosts" in output
    assert losses(outs[0]) == pytest.approx(losses(single_gpu), abs=1e-4)
    assert_close(state(outs[0], 20), state(single_gpu, 20), 1e-2)
    for out in outs[1:]:
        assert same_bits(state(out, 20), state(outs[0], 20)), out


@needs_gpus
def test_two_gpus_with_gradients_as_bf16(world, tmp_path, single_gpu):
    outs = [tmp_path / name for name in ("run", "again")]
    for out in outs:
        assert "gradients as bf16" in train_on_gpus(2, options(world, out, "--reduce", "bf16", "--bucket", "8k", steps=20))
    assert same_bits(state(outs[0], 20), state(outs[1], 20))
    exact, rounded = [records(out, "train")[0]["grad_norm"] for out in (single_gpu, outs[0])]
    assert 0 < abs(rounded / exact - 1) < 1 / 256
    difference = np.abs(np.array(losses(outs[0])) - np.array(losses(single_gpu)))
    assert 0 < difference.max() < 0.02 and difference[0] < 1e-4


@needs_gpus
def test_a_run_of_two_gpus_goes_on_with_one_and_back(world, tmp_path):
    train_on_gpus(2, options(world, tmp_path / "run"))
    train_on_gpus(2, options(world, tmp_path / "whole", steps=12))
    for path in ((2,), (1, 2)):
        out = tmp_path / f"resumed_{len(path)}"
        shutil.copytree(tmp_path / "run", out, symlinks=True)
        for ranks, steps in zip(path, (12,) if len(path) == 1 else (9, 12)):
            train_on_gpus(ranks, options(world, out, "--resume", steps=steps))
        assert losses(out) == pytest.approx(losses(tmp_path / "whole"), abs=1e-4)
        assert_close(state(out, 12), state(tmp_path / "whole", 12), 1e-2)
    assert same_bits(state(tmp_path / "resumed_1", 12), state(tmp_path / "whole", 12))


@needs_gpus
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("sent,reason", [(signal.SIGKILL, "it died"), (signal.SIGSTOP, "no sign of life")])
def test_a_lost_rank_of_two_gpus_ends_the_job(world, tmp_path, sent, reason, rank):
    """The other one waits in NCCL."""
    out = tmp_path / "run"
    processes = start_on_gpus(2, options(world, out, "--rank-timeout", 6, "--checkpoint-every", 20, steps=1000000))
    until_step(processes[0], 50)
    processes[rank].send_signal(sent)
    started = time.time()
    _, err = processes[1 - rank].communicate(timeout=60)
    assert processes[1 - rank].returncode == 1 and time.time() - started < 15
    assert re.search(rf"error: rank {rank} on \S+: {reason}", err), err
    processes[rank].kill()
    processes[rank].communicate()
    newest = os.readlink(out / "latest")
    saved = json.load(open(out / newest / "state.json"))
    assert all(os.path.getsize(out / newest / f) == size for f, size in saved["files"].items())


# ---------------------------------------------------------------------------------------------------------------------
# The jobs of which a rank was lost above

def test_a_stopped_rank_ends_the_job_within_a_minute(lost_jobs):
    stopped, _, _ = lost_jobs
    stopped.thread.join(timeout=70)
    assert 44 < stopped.seconds < 60
    assert re.search(r"error: rank 1 on \S+: no sign of life for 45 s", stopped.error), stopped.error


def test_a_rank_that_hangs_in_its_files_ends_the_job_within_a_minute(lost_jobs):
    _, hanging, out = lost_jobs
    hanging.thread.join(timeout=70)
    assert 44 < hanging.seconds < 60
    assert re.search(r"error: rank 1 on \S+: it hangs: 45 s without progress while writing a checkpoint", hanging.error), hanging.error
    newest = os.readlink(out / "latest")
    saved = json.load(open(out / newest / "state.json"))
    assert newest == "step_00000002" and all(os.path.getsize(out / newest / f) == size for f, size in saved["files"].items())
