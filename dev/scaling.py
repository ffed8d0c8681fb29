"""The tables of scaling.md: step time of data-parallel training against the number of GPUs.

    python dev/scaling.py                   from the figures below
    python dev/scaling.py scaling.json      from what dev/bench/scaling_check.py measured, and how far the model is from it
    python dev/scaling.py --write           puts the tables into scaling.md, and the cost of a run into the scripts that start it

What one GPU was measured at stands here and nowhere else.
"""

import json
import os
import re
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GPU, WHERE = "H200", "dev/results/2026-11-27_h200_step"
TOKENS_S = {"421M": 185.8e3, "1.3B": 62.1e3}   # of one GPU, a whole step of 8 x 4,096 and 4 x 4,096 tokens
RUNS = {"scripts/run_421m_8gpu.sh": ("421M", 20e9, 8), "scripts/run_1.3b_64gpu.sh": ("1.3B", 100e9, 64), "scripts/slurm.sbatch": ("1.3B", 100e9, 64)}

MODELS = {  # parameters, FLOP a token at 4,096 tokens (train_samba info), elements of the last bucket (embedding; first layers come with it)
    "421M": (421.8e6, 2.70e9, 32000 * 1536),
    "1.3B": (1330.2e6, 8.36e9, 32000 * 2304),
    "3.8B": (3864.3e6, 24.0e9, 32064 * 2816),
}
FLOPS = {model: TOKENS_S[model] * MODELS[model][1] for model in TOKENS_S}      # a GPU
FLOPS["3.8B"] = FLOPS["1.3B"]                  # not measured
HBM = 4.2e12                 # bytes/s of AdamW, measured on that H200
NVLINK = (300e9, 8e-6)       # bytes/s of a ring, seconds a hop
NETWORKS = {"8 x 400 Gb/s a machine": (300e9, 8e-6), "100 Gb/s a machine": (11e9, 15e-6)}
BUCKET, SEQUENCE = 64e6, 4096


def update(parameters, gpus):
    """Zero and norm of the gradients, AdamW on a part"""
    return (12 * parameters + 30 * parameters / gpus) / HBM


def step(model, gpus, tokens, network, rates=FLOPS, reduce_bytes=4, overlap=True):
    """(seconds of a step, of it not hidden) with --zero 1; network: of more than 8 GPUs; rates: FLOP/s of a GPU"""
    parameters, flops, last = MODELS[model]
    flops_rate = rates[model]
    bandwidth, hop = network if gpus > 8 else NVLINK
    own = tokens / gpus
    compute = own * flops / flops_rate
    if gpus == 1:
        return compute + update(parameters, 1), 0
    window = min(own, 8 * SEQUENCE) * flops / flops_rate    # the last micro-batch, and the first
    buckets = max(1, 4 * parameters / BUCKET)
    owners = max(1.0, gpus / buckets)                       # parts that a bucket is reduced in, one after the other at the worst
    latency = buckets * owners * hop * min(gpus, 64) ** 0.5  # a chain is a pipeline: its length costs only once a piece; grows slowly
    reduce = reduce_bytes * parameters / bandwidth + latency    # all of it along one chain: the owners of neighbouring buckets are one rank
    gather = 2 * parameters / bandwidth + latency
    if overlap:
        exposed = max(reduce_bytes * last / bandwidth, reduce - 2 / 3 * window) + max(2 * last / bandwidth, gather - 1 / 3 * window)
    else:
        exposed = reduce + gather
    return compute + update(parameters, gpus) + exposed, exposed


def table(network, rates):
    lines = ["| model | GPUs | tokens a step | ms | not hidden, ms | tokens/s | efficiency |", "|---|---|---|---|---|---|---|"]
    for model, (_, flops, _) in MODELS.items():
        for gpus in (1, 8, 64, 512, 4096):
            tokens = max(2097152, gpus * SEQUENCE)
            seconds, exposed = step(model, gpus, tokens, network, rates)
            rate = tokens / seconds
            efficiency = 100 * rate * flops / rates[model] / gpus
            lines.append(f"| {model} | {gpus:,} | {tokens / 1e6:.1f}M | {seconds * 1e3:,.0f} | {exposed * 1e3:,.0f} | "
                         f"{rate / 1e6:.2f}M | {efficiency:.0f} % |")
    return "\n".join(lines)


def tables(rates=FLOPS):
    return "\n\n".join(f"**{name}**\n\n{table(network, rates)}" for name, network in NETWORKS.items())


def cost(model, tokens, gpus):
    """The line at the top of a script"""
    hours = tokens / TOKENS_S[model] / 3600
    time, rate = f"{hours:.0f} GPU hours ({hours / gpus:.1f} hours on {gpus} {GPU})", f"{TOKENS_S[model] / 1e3:.1f}k tokens/s"
    return f"# Cost: {time} at the measured {rate} of one ({WHERE}); of many: dev/scaling.md"


def write():
    """Whatever follows from the figures above, into the files that state it"""
    for path, run in RUNS.items():
        rewrite(path, r"# Cost: .*", cost(*run))
    rewrite("dev/scaling.md", r"\*\*8 x 400 Gb/s a machine\*\*.*?(?=\n\n## )", tables())


def rewrite(path, pattern, text):
    with open(f"{ROOT}/{path}", encoding="utf-8") as file:
        content, count = re.subn(pattern, lambda _: text, file.read(), flags=re.DOTALL if "\n" in text else 0)
    if count != 1:
        sys.exit(f"error: {path}: {count} places look like {pattern}, one was expected")
    with open(f"{ROOT}/{path}", "w", encoding="utf-8") as file:
        file.write(content)


def measured(path):
    """Takes bandwidth, hop and computing from the file, prints model against measurement, and returns the FLOP/s of a GPU by model"""
    global NVLINK
    result = json.load(open(path))
    most = max(result["collectives"], key=lambda r: r["ranks"])
    bandwidth = 4 * most["elements"] / most["reduce"]
    NVLINK = (bandwidth, most["hop"] / min(most["ranks"], 64) ** 0.5)       # step() multiplies by that root
    rates, known = dict(FLOPS), set()
    print(f"measured: {result['machine']}, commit {result['commit']}: {NVLINK[0] / 1e9:.1f} GB/s of a sum, {NVLINK[1] * 1e6:.1f} us a hop\n")
    print("| model | GPUs | micro-batches a GPU | gradients | overlap | measured, ms | the model, ms | off by |\n|---|---|---|---|---|---|---|---|")
    for row in result["speed"]:
        model = next((name for name in MODELS if row["model"].lower().endswith(name.lower())), None)
        if model is None:
            sys.exit(f"error: {path}: {row['model']} is none of {', '.join(MODELS)}: scaling_check.py --small measures nothing")
        parameters, flops, _ = MODELS[model]
        tokens = row["tok_s"] * row["ms"] / 1e3
        if row["ranks"] == 1 and model not in known:
            known.add(model)
            rates[model] = tokens * flops / (row["ms"] / 1e3 - update(parameters, 1))
        seconds, _ = step(model, row["ranks"], tokens, NVLINK, rates, 2 if row["reduce"] == "bf16" else 4, row["overlap"])
        overlap = "on" if row["overlap"] else "off"
        print(f"| {model} | {row['ranks']} | {row['accumulate']} | {row['reduce']} | {overlap} | {row['ms']:.1f} | {seconds * 1e3:.1f} | "
              f"{100 * (seconds * 1e3 / row['ms'] - 1):+.1f} % |")
    return rates


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        write()
    else:
        print("\n" + tables(measured(sys.argv[1]) if len(sys.argv) > 1 else FLOPS))
