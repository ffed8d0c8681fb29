"""The twin beside the trainer, on the same GPU, one after the other.

    python dev/parity/run.py bench  --program ./train_samba --model samba-421m --micro-batch 8      tokens/s of both, and the ratio
    python dev/parity/run.py parity --program ./train_samba --model samba-421m --micro-batch 8 --data 'data/x/train_*.bin' --steps 50
                                                    the same weights and batches through both: losses and gradient norms, step by step

`--ours FILE.json` reads what the trainer measured before. Needs PyTorch; mamba_ssm and causal_conv1d for times that mean something.
"""

import argparse
import contextlib
import glob
import json
import os
import statistics
import subprocess
import sys
import tempfile

import numpy as np
import torch

import twin

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


# The batches of train_samba: data/shards.h cuts shards into samples, data/mixture.h permutes them


def mix(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def permutation(n, seed, epoch):
    """index -> index, below n"""
    half = 0
    while half < 32 and 1 << (2 * half) < n:
        half += 1
    state, keys = mix(seed ^ mix((epoch + GOLDEN) & MASK)), []
    for _ in range(8):
        state = (state + GOLDEN) & MASK
        keys.append(mix(state))

    def network(x):
        left, right = x >> half, x & ((1 << half) - 1)
        for key in keys:
            left, right = right, left ^ (mix(key ^ right) & ((1 << half) - 1))
        return left << half | right

    def at(index):
        index = network(index)
        while index >= n:
            index = network(index)
        return index

    return at


class Batches:
    def __init__(self, pattern, T, seed):
        self.T, self.seed = T, seed
        self.shards = [np.memmap(path, dtype="<u2", mode="r", offset=1024) for path in sorted(glob.glob(pattern))]
        if not self.shards:
            sys.exit(f"error: no file matches {pattern}")
        self.ends = np.cumsum([(len(shard) - 1) // T for shard in self.shards])

    def sample(self, g):
        N = int(self.ends[-1])
        k = permutation(N, self.seed, g // N)(g % N)
        s = int(np.searchsorted(self.ends, k, side="right"))
        at = (k - (int(self.ends[s - 1]) if s else 0)) * self.T
        return torch.from_numpy(self.shards[s][at : at + self.T + 1].astype(np.int64))

    def batch(self, first, B):
        """tokens, targets (B,T) of global samples first .. first + B - 1"""
        rows = torch.stack([self.sample(first + b) for b in range(B)]).to(twin.device)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


# The twin


def autocast():
    """bf16 on a GPU; float elsewhere, as train_samba's CPU build"""
    return torch.autocast("cuda", dtype=torch.bfloat16) if twin.device == "cuda" else contextlib.nullcontext()


def optimizer(model, lr):
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=twin.device == "cuda")


def forward_backward(model, tokens, targets, rope, share=1.0):
    with autocast():
        loss = model(tokens, targets, rope)
    (loss * share).backward()
    return loss.detach()


def milliseconds(work, repeats):
    """The median of `repeats` runs after two that are not counted"""
    for _ in range(2):
        work()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        times.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in times)


def bench_twin(config, B, accumulate, repeats):
    torch.manual_seed(1)
    model = twin.Samba(config).to(twin.device)
    torch.nn.init.normal_(model.lm_head.weight, std=0.02)  # PyTorch's own for the rest: values that train
    for name, p in model.named_parameters():
        if name.endswith("A_log"):
            p.data = torch.log(torch.arange(1, 17, device=p.device, dtype=torch.float32)).repeat(p.shape[0], 1)
    T = config["block_size"]
    tokens, targets = (torch.randint(config["padded_vocab_size"], (B, T), device=twin.device) for _ in range(2))
    rope = model.rope(T)
    adamw = optimizer(model, 1e-5)

    def passes():
        adamw.zero_grad(set_to_none=True)
        forward_backward(model, tokens, targets, rope)

    def step(micro_batches):
        adamw.zero_grad(set_to_none=True)
        for _ in range(micro_batches):
            forward_backward(model, tokens, targets, rope, 1 / micro_batches)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        adamw.step()

    result = {"forward_backward": {"ms": milliseconds(passes, repeats)}}
    result["memory_of_passes"] = torch.cuda.max_memory_allocated()
    result["step"] = {"ms": milliseconds(lambda: step(1), repeats)}
    result["accumulated_step"] = {"ms": milliseconds(lambda: step(accumulate), max(1, repeats // accumulate)), "micro_batches": accumulate}
    result["memory_allocated"] = torch.cuda.max_memory_allocated()
    free, total = torch.cuda.mem_get_info()
    result["memory_bytes"] = total - free
    return result


# The trainer


def run_program(arguments, **options):
    done = subprocess.run(arguments, text=True, **options)
    if done.returncode != 0:
        sys.exit(f"error: {' '.join(arguments)} ended with status {done.returncode}")
    return done


def start_checkpoint(o, folder):
    """The trainer's initial weights: a step with learning rate 0 changes nothing"""
    run_program([o.program, "--model", o.model, "--data", o.data, "--out", folder, "--micro-batch", "1", "--steps", "1", "--lr", "0",
                 "--seq-len", "64"], stdout=subprocess.DEVNULL)  # fmt: skip
    return folder + "/step_00000001"


def compare_bench(ours, theirs, tokens):
    print(f"\n{'':34}{'train_samba':>14}{'PyTorch twin':>14}{'ratio':>8}")
    names = {"forward_backward": "forward and backward", "step": "step of 1 micro-batch", "accumulated_step": "step of {} micro-batches"}
    for key, what in names.items():
        if key not in ours:
            continue
        n = ours[key].get("micro_batches", 1)
        a, b = ours[key]["ms"], theirs[key]["ms"]
        print(f"{what.format(n):26}ms      {a:14.2f}{b:14.2f}{b / a:8.3f}")
        print(f"{'':26}tokens/s{n * tokens / a * 1e3:14.0f}{n * tokens / b * 1e3:14.0f}")
    print(f"{'GPU memory in use':26}GiB     {ours['memory_bytes'] / 2**30:14.2f}{theirs['memory_bytes'] / 2**30:14.2f}")
    print(f"{'   of it allocated tensors':26}GiB     {'':14}{theirs['memory_allocated'] / 2**30:14.2f}")


def bench(o):
    if not twin.fast:
        print("mamba_ssm or a GPU is missing: no comparison of times is possible here")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        path = o.ours or folder + "/ours.json"
        if not o.ours:
            run_program([o.program, "bench", "--model", o.model, "--micro-batch", str(o.micro_batch), "--accumulate", str(o.accumulate),
                         "--recompute", o.recompute, "--json", path])  # fmt: skip
        ours = json.load(open(path, encoding="utf-8"))
    config = json.loads(run_program([o.program, "info", "--model", o.model, "--json"], capture_output=True).stdout)
    theirs = bench_twin(config, o.micro_batch, o.accumulate, o.repeats)
    print(json.dumps(theirs))
    compare_bench(ours, theirs, o.micro_batch * config["block_size"])
    return 0


def parity(o):
    with tempfile.TemporaryDirectory() as folder:
        start = start_checkpoint(o, folder + "/start")
        T = o.seq_len or json.loads(run_program([o.program, "info", "--model", o.model, "--json"], capture_output=True).stdout)["block_size"]
        # The rate rises as in the reference's recipe. With more, fresh weights on batches this small blow up now and then, and after that
        # roundings decide
        schedule = ["--lr", str(o.lr), "--schedule", "constant", "--warmup-steps", str(o.warmup), "--seed", "3407"]
        run_program([o.program, "--model", o.model, "--data", o.data, "--init-from", start, "--out", folder + "/run",
                     "--micro-batch", str(o.micro_batch), "--seq-len", str(T), "--steps", str(o.steps), "--log-every", "10",
                     "--checkpoint-every", "0", *schedule])  # fmt: skip
        log = [json.loads(line) for line in open(folder + "/run/log.jsonl", encoding="utf-8")]
        ours = [(line["loss"], line["grad_norm"]) for line in log if line["type"] == "train"]
        model = twin.load(start + "/model.safetensors")
    return compare_parity(o, ours, train_twin(model, o, T))


def train_twin(model, o, T):
    """(loss, gradient norm) of each step"""
    batches, rope, adamw = Batches(o.data, T, 3407), model.rope(T), optimizer(model, o.lr)
    history = []
    for step in range(o.steps):
        for group in adamw.param_groups:
            group["lr"] = o.lr * min(1, (step + 1) / o.warmup)
        adamw.zero_grad(set_to_none=True)
        loss = forward_backward(model, *batches.batch(step * o.micro_batch, o.micro_batch), rope)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        history.append((loss.item(), norm.item()))
    return history


def compare_parity(o, ours, theirs):
    print(f"{'fused kernels' if twin.fast else 'plain PyTorch scan'}; {len(ours)} steps")
    print(f"{'step':>4}{'loss':>10}{'twin':>10}{'apart':>9}{'norm':>10}{'twin':>10}{'apart':>9}")
    worst_loss = worst_norm = 0.0
    for step, ((a, an), (b, bn)) in enumerate(zip(ours, theirs, strict=True)):
        worst_loss, worst_norm = max(worst_loss, abs(a / b - 1)), max(worst_norm, abs(an / bn - 1))
        print(f"{step + 1:4}{a:10.4f}{b:10.4f}{a / b - 1:9.2%}{an:10.4f}{bn:10.4f}{an / bn - 1:9.2%}")
    good = worst_loss <= o.tolerance
    print(f"{'ok' if good else 'FAILED'}: losses at most {worst_loss:.3%} apart (limit {o.tolerance:.1%}), gradient norms {worst_norm:.2%}")
    return 0 if good else 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, function in [("bench", bench), ("parity", parity)]:
        p = commands.add_parser(name)
        p.set_defaults(function=function)
        p.add_argument("--program", default=os.path.join(os.path.dirname(__file__), "../../train_samba"))
        p.add_argument("--model", default="samba-421m")
        p.add_argument("--micro-batch", type=int, default=8)
        if name == "bench":
            p.add_argument("--accumulate", type=int, default=8)
            p.add_argument("--repeats", type=int, default=16)
            p.add_argument("--recompute", default="auto")
            p.add_argument("--ours", help="what `train_samba bench --json` wrote, instead of running it")
        else:
            p.add_argument("--data", required=True)
            p.add_argument("--steps", type=int, default=50)
            p.add_argument("--seq-len", type=int, default=0)
            p.add_argument("--lr", type=float, default=4e-4, help="after the warm-up")
            p.add_argument("--warmup", type=int, default=762,
                           help="steps in which the rate rises from 0; the reference's 20B recipe: 762 micro-batches of this size")  # fmt: skip
            p.add_argument("--tolerance", type=float, default=0.005)
    o = parser.parse_args()
    sys.exit(o.function(o))


if __name__ == "__main__":
    main()
