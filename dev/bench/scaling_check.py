"""Everything there is to measure about several GPUs of one machine, in one command:

    make bench-scaling            or  python dev/bench/scaling_check.py [--ranks 1,2,4,8] [--out dev/results/NAME]

  right   20 steps with the same global batch on 1, 2, 4, ... GPUs: the same losses; --zero 0 and 1; twice, bit for bit; a run saved on
          the most goes on with each of the others
  fast    tokens/s and efficiency against one GPU in the same session, with 8 accumulations and with none, gradients overlapped or
          not, as fp32 and as bf16
  alone   the collectives without training, against the bandwidth of the link (dev/bench/bench_comm.cu)

Writes scaling.json, README.md with the tables and scaling.png into --out; `python dev/scaling.py scaling.json` then predicts from what
was measured. --parts right,fast,alone and --models choose; --short leaves out repetitions that need checkpoints and the less telling
ways, so that two GPUs are through in two or three minutes. --small: a model of a few thousand parameters, which CPU ranks can train:
a test of this script, not a measurement.
"""

import argparse
import hashlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SMALL = {"name": "scaling-check", "blocks": "MS", "n_embd": 32, "n_head": 2, "n_query_groups": 1, "head_size": 16, "intermediate_size": 48,
         "local_window": 9, "block_size": 16, "padded_vocab_size": 64}
WAYS = ((), ("--reduce", "bf16"), ("--bucket", "1000b"), ("--reduce", "bf16", "--bucket", "1000b"))     # of a bucket that holds all: no overlap
SHORT_WAYS = {8: WAYS[:1], 1: WAYS[:3]}
ROUNDING = {True: 1e-4, False: 2e-2}       # of a loss after 20 steps, sums in another order: fp32 working weights, bf16 ones


def gpu_count():
    if not shutil.which("nvidia-smi"):
        return 0
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.count("GPU ")


def launch(ranks, arguments, log):
    """One process a rank, which meet by the environment; ends with the output of rank 0"""
    with socket.socket() as s:
        s.bind(("", 0))
        port = s.getsockname()[1]
    rendezvous = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)} if ranks > 1 else {}
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    processes = []
    with open(log, "w") as errors:
        for r in range(ranks):
            environment = {**os.environ, "OMP_NUM_THREADS": threads, **rendezvous, **({"RANK": str(r), "LOCAL_RANK": str(r)} if ranks > 1 else {})}
            stdout = subprocess.PIPE if r == 0 else subprocess.DEVNULL
            processes.append(subprocess.Popen(arguments, stdout=stdout, stderr=errors, text=True, env=environment))
        output = processes[0].communicate()[0]
        codes = [p.wait() for p in processes]
    if any(codes):
        sys.exit(f"error: {ranks} ranks ended with {codes}: {open(log).read().strip()[-600:]}\n  {' '.join(arguments)}")
    return output


class Check:
    def __init__(self, options, work, machine):
        self.o, self.work = options, work
        self.runs = 0
        command = " ".join(["python dev/bench/scaling_check.py", *sys.argv[1:]])
        self.result = {"machine": machine, "commit": "", "date": time.strftime("%Y-%m-%d"), "command": command,
                       "correctness": [], "speed": [], "collectives": []}
        self.failed = []
        self.settings = [dict(model="samba-421m", micro_batch=8, seq_len=4096, vocab=32000, tokens=24_000_000),
                         dict(model="samba-1.3b", micro_batch=4, seq_len=4096, vocab=32000, tokens=24_000_000)]
        self.settings = [s for s in self.settings if s["model"] in options.models]
        if options.small:
            self.settings = [dict(model=f"{work}/model.json", micro_batch=2, seq_len=16, vocab=64, tokens=20000)]
            json.dump(SMALL, open(f"{work}/model.json", "w"))
        self.setting = self.settings[0]
        self.write_data()

    def write_data(self):
        """Runs of consecutive tokens: something to learn, and no download"""
        vocab, size = self.setting["vocab"], self.setting["tokens"]
        starts = np.random.default_rng(1).integers(0, vocab, size // 10 + 1)
        header = np.zeros(256, "<i4")
        header[:5] = 20240520, 1, size, vocab, 3
        with open(f"{self.work}/train.bin", "wb") as file:
            file.write(header.tobytes() + ((np.repeat(starts, 10)[:size] + np.arange(size) % 10) % vocab).astype("<u2").tobytes())

    def train(self, ranks, steps, micro_batches, *extra, out=None, micro_batch=None, save=False):
        """micro_batches: of all ranks in a step. Returns the log's steps and the folder."""
        s = self.setting
        self.runs += 1
        out = out or f"{self.work}/run_{self.runs}"
        micro_batch = micro_batch or s["micro_batch"]
        tokens = micro_batch * s["seq_len"] * micro_batches
        arguments = [self.o.program, "--model", s["model"], "--data", f"{self.work}/train.bin", "--out", out, "--micro-batch", micro_batch,
                     "--seq-len", s["seq_len"], "--global-batch", tokens, "--steps", steps, "--lr", "4e-4", "--warmup-steps", 0,
                     "--schedule", "constant", "--checkpoint-every", 0 if save else -1, *extra]
        started = time.time()
        launch(ranks, [str(a) for a in arguments], f"{self.work}/errors.txt")
        records = [json.loads(line) for line in open(f"{out}/log.jsonl")]
        log = [r for r in records if r["type"] == "train"]
        self.result["commit"] = records[0]["commit"]
        ms = statistics.median(r["ms"] for r in log[-8:])
        how = " ".join(map(str, extra))
        result = f"loss {log[-1]['loss']:.4f}, {ms:.1f} ms a step; {time.time() - started:.1f} s"
        print(f"  {ranks} ranks, {micro_batches} micro-batches {how}: {result}", flush=True)
        return log, out

    def bits(self, out):
        digest = hashlib.sha256()
        with open(f"{out}/latest/model.safetensors", "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
        return digest.hexdigest()

    def say(self, right, what):
        print(("ok      " if right else "FAILED  ") + what, flush=True)
        if not right:
            self.failed.append(what)

    def correctness(self):
        """Micro-batches of 2 sequences, two of them for each of the most ranks, and learning rates at which a difference in rounding stays
        one. --short knows repeated bits by losses and norms alone."""
        most, tolerance, save = max(self.o.ranks), ROUNDING[self.o.small], not self.o.short
        gentle = ("--lr", "1e-4", "--warmup-steps", 20)
        run = lambda ranks, *extra, steps=20, **more: self.train(ranks, steps, 2 * most, *gentle, *extra, micro_batch=2, **more)
        bits = lambda log, out: ([(r["loss"], r["grad_norm"]) for r in log], self.bits(out) if save else "")
        reference = None
        for ranks in self.o.ranks:
            log, out = run(ranks, save=save)
            losses, first = [r["loss"] for r in log], bits(log, out)
            reference = reference or losses
            shutil.rmtree(out)
            again = run(ranks, save=save) if save or ranks == most else None
            same = again is None or bits(*again) == first
            if again:
                shutil.rmtree(again[1])
            worst = max(abs(a - b) for a, b in zip(losses, reference))
            self.result["correctness"].append({"ranks": ranks, "worst": worst, "repeated": same if again else None})
            self.say(worst < tolerance, f"{ranks} ranks: 20 losses at most {worst:.1e} from those of {self.o.ranks[0]}")
            if again:
                self.say(same, f"{ranks} ranks: a repetition is the same bits")
        log, out = run(most, "--zero", 0)
        shutil.rmtree(out)
        worst = max(abs(r["loss"] - b) for r, b in zip(log, reference))
        self.say(worst < tolerance, f"{most} ranks with --zero 0: at most {worst:.1e} away")
        if save:
            self.resume(run, reference)

    def resume(self, run, reference):
        most, tolerance = max(self.o.ranks), ROUNDING[self.o.small]
        saved = run(most, steps=10, save=True)[1]
        for ranks in self.o.ranks:
            copy = f"{self.work}/resumed"
            shutil.copytree(saved, copy, symlinks=True)
            log = run(ranks, "--resume", out=copy)[0]
            worst = max(abs(r["loss"] - reference[r["step"] - 1]) for r in log)
            self.say(len(log) == 20 and worst < tolerance, f"saved at step 10 of {most} ranks, resumed on {ranks}: at most {worst:.1e} away")
            shutil.rmtree(copy)
        shutil.rmtree(saved)

    def speed(self):
        for self.setting in self.settings:
            for accumulate in (8, 1):
                self.speed_of(accumulate)

    def speed_of(self, accumulate):
        alone = None
        steps, left_out = (self.o.steps, 4) if accumulate == 1 else (max(4, self.o.steps // 2), 2)
        ways = SHORT_WAYS[accumulate] if self.o.short else WAYS
        for ranks in sorted({1, *self.o.ranks}):
            for extra in ways if ranks > 1 else WAYS[:1]:
                log, out = self.train(ranks, steps, accumulate * ranks, *extra)
                shutil.rmtree(out)
                ms = statistics.median(r["ms"] for r in log[left_out:])
                tok_s = accumulate * ranks * self.setting["micro_batch"] * self.setting["seq_len"] / ms * 1e3
                alone = alone or tok_s
                self.result["speed"].append({"model": os.path.basename(self.setting["model"]), "ranks": ranks, "accumulate": accumulate,
                                             "reduce": "bf16" if "bf16" in extra else "fp32", "overlap": "--bucket" not in extra,
                                             "ms": ms, "tok_s": tok_s, "efficiency": tok_s / alone / ranks})
                self.save()

    def collectives(self):
        elements = 100_000 if self.o.small else 421_000_000
        outputs = [launch(ranks, [self.o.bench, str(elements)], f"{self.work}/errors.txt") for ranks in self.o.ranks if ranks > 1]
        self.result["collectives"] = [json.loads(output.splitlines()[-1]) for output in outputs]

    def save(self):
        """What there is: should a later run fail, it is not lost"""
        json.dump({**self.result, "failed": self.failed}, open(f"{self.o.out}/scaling.json", "w"), indent=1)


REPEATED = {True: "the same bits", False: "OTHER BITS", None: "not made"}


def tables(result):
    lines = [f"# Several GPUs: {result['machine']}", "", f"Commit {result['commit']}, {result['date']}. Command: `{result['command']}`."]
    if result["speed"]:
        lines += ["", "## Speed", "", "| model | GPUs | micro-batches a GPU | gradients | overlap | ms a step | tokens/s | efficiency |",
                  "|---|---|---|---|---|---|---|---|"]
    for r in result["speed"]:
        lines.append(f"| {r['model']} | {r['ranks']} | {r['accumulate']} | {r['reduce']} | {'on' if r['overlap'] else 'off'} | {r['ms']:.1f} | "
                     f"{r['tok_s']:,.0f} | {100 * r['efficiency']:.1f} % |")
    if result["collectives"]:
        lines += ["", "## Collectives alone", "", "| GPUs | link, GB/s | sum fp32, ms | of the link | sum bf16, ms | of the link | weights, ms |",
                  "|---|---|---|---|---|---|---|"]
    for r in result["collectives"]:
        share = (r["ranks"] - 1) / r["ranks"] * r["elements"] / r["link"]
        lines.append(f"| {r['ranks']} | {r['link'] / 1e9:.1f} | {r['reduce'] * 1e3:.2f} | {400 * share / r['reduce']:.0f} % | "
                     f"{r['reduce_bf16'] * 1e3:.2f} | {200 * share / r['reduce_bf16']:.0f} % | {r['gather'] * 1e3:.2f} |")
    if result["correctness"]:
        lines += ["", "## The same training on any number", "", "| GPUs | 20 losses, at most from those of one | a repetition |", "|---|---|---|"]
    for r in result["correctness"]:
        lines.append(f"| {r['ranks']} | {r['worst']:.1e} | {REPEATED[r['repeated']]} |")
    return "\n".join([*lines, "", "Failed: " + ("; ".join(result["failed"]) or "nothing") + ".", ""])


def draw(result, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    models = list(dict.fromkeys(r["model"] for r in result["speed"]))
    figure, all_axes = plt.subplots(1, len(models), figsize=(6 * len(models), 4), squeeze=False)
    for model, axes in zip(models, all_axes[0]):
        draw_model(axes, model, [r for r in result["speed"] if r["model"] == model])
    figure.savefig(path, dpi=130, bbox_inches="tight")


def draw_model(axes, model, rows):
    for accumulate, style in ((8, "-"), (1, "--")):
        for reduce, colour in (("fp32", "C0"), ("bf16", "C1")):
            chosen = [r for r in rows if r["accumulate"] == accumulate and r["overlap"] and (r["reduce"] == reduce or r["ranks"] == 1)]
            points = [(r["ranks"], 100 * r["efficiency"]) for r in chosen]
            if len(points) < 2:
                continue
            axes.plot(*zip(*points), style, color=colour, marker="o", label=f"{accumulate} micro-batches a GPU, {reduce}")
    axes.set(xlabel="GPUs", ylabel="efficiency against one GPU, %", xticks=sorted({r["ranks"] for r in rows}), title=model)
    axes.grid(alpha=0.3)
    axes.legend()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="", help="numbers of processes, for example 1,2,4,8; default: powers of two up to the number of GPUs")
    parser.add_argument("--program", default=f"{ROOT}/train_samba")
    parser.add_argument("--bench", default="", help="bench_comm; default: beside the program")
    parser.add_argument("--steps", type=int, default=12,
                        help="of a measurement of speed, half as many with 8 accumulations; the first four, or two, are left out")
    parser.add_argument("--parts", default="right,fast,alone")
    parser.add_argument("--models", default="samba-421m,samba-1.3b")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", default="")
    o = parser.parse_args()
    gpus = gpu_count()
    o.ranks = sorted({int(n) for n in o.ranks.split(",")} if o.ranks else {n for n in (1, 2, 4, 8, 16) if n <= gpus})
    if not o.small and gpus < max([2, *o.ranks]):
        sys.exit(f"error: this machine has {gpus} GPUs; {max([2, *o.ranks])} are needed. --small --ranks 1,2,4 tries the command on CPUs")
    o.parts, o.models = o.parts.split(","), o.models.split(",")
    o.program = os.path.realpath(o.program)
    o.bench = o.bench or os.path.join(os.path.dirname(o.program), "bench_comm")
    if o.small and not os.path.exists(o.bench):
        print("bench_comm is not built: without the collectives alone")
        o.bench = ""
    for path in (o.program, o.bench):
        if path and not os.path.exists(path):
            sys.exit(f"error: {path} is missing: make bench-scaling builds it")
    device = subprocess.run([o.program, "info", "--device"], capture_output=True, text=True).stdout.strip()
    o.out = out = o.out or f"{ROOT}/dev/results/{time.strftime('%Y-%m-%d')}_scaling"
    os.makedirs(out, exist_ok=True)
    # Checkpoints of 5 GB come and go: in memory where there is some
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as work:
        check = Check(o, work, f"{max(gpus, 1)} x {device}")
        for name, part in (("alone", check.collectives), ("right", check.correctness), ("fast", check.speed)):
            if name in o.parts and (name != "alone" or o.bench):
                part()
                check.save()
    result = {**check.result, "failed": check.failed}
    open(f"{out}/README.md", "w").write(tables(result))
    if result["speed"]:
        draw(result, f"{out}/scaling.png")
    print(tables(result) + f"\nwritten to {out}")
    for r in result["speed"]:
        goal = {8: 0.97, 1: 0.90}[r["accumulate"]]
        if not o.small and r["ranks"] == max(o.ranks) and r["reduce"] == "fp32" and r["overlap"]:
            print(f"goal of {r['model']} on {r['ranks']} GPUs, {r['accumulate']} micro-batches each: {100 * goal:.0f} %, "
                  f"measured {100 * r['efficiency']:.1f} %")
    sys.exit(1 if check.failed else 0)


main()
