"""The tables of scaling.md: step time of data-parallel training against the number of GPUs.

    python dev/scaling.py                   from the figures below
    python dev/scaling.py scaling.json      from what dev/bench/scaling_check.py measured, and how far the model is from it
"""

import json
import sys

MODELS = {  # parameters, FLOP a token at 4,096 tokens (train_samba info), elements of the last bucket (embedding; first layers come with it)
    "421M": (421.8e6, 2.70e9, 32000 * 1536),
    "1.3B": (1330.2e6, 8.36e9, 32000 * 2304),
    "3.8B": (3864.3e6, 24.0e9, 32064 * 2816),
}
FLOPS = 170.7e3 * 2.70e9     # a GPU: 170.7k tokens/s of 421M, measured with this trainer on one H200; the same share of the peak for the others
HBM = 4.2e12                 # bytes/s of AdamW, measured on that H200
NVLINK = (300e9, 8e-6)       # bytes/s of a ring, seconds a hop
NETWORKS = {"8 x 400 Gb/s a machine": NVLINK, "100 Gb/s a machine": (11e9, 15e-6)}
BUCKET, SEQUENCE = 64e6, 4096


def update(parameters, gpus):
    """Zero and norm of the gradients, AdamW on a part"""
    return (12 * parameters + 30 * parameters / gpus) / HBM


def step(model, gpus, tokens, network, flops_rate=FLOPS, reduce_bytes=4, overlap=True):
    """(seconds of a step, of it not hidden) with --zero 1; network: of more than 8 GPUs"""
    parameters, flops, last = MODELS[model]
    bandwidth, hop = network if gpus > 8 else NVLINK
    own = tokens / gpus
    compute = own * flops / flops_rate
    if gpus == 1:
        return compute + update(parameters, 1), 0
    window = min(own, 8 * SEQUENCE) * flops / flops_rate    # the last micro-batch, and the first
    part = (gpus - 1) / gpus
    buckets = max(1, 4 * parameters / BUCKET)
    owners = max(1.0, gpus / buckets)                       # parts that a bucket is reduced in, one after the other at the worst
    latency = buckets * owners * hop * min(gpus, 64) ** 0.5  # a chain is a pipeline: its length costs only once a piece; grows slowly
    reduce = reduce_bytes * parameters * part / bandwidth + latency
    gather = 2 * parameters * part / bandwidth + latency
    if overlap:
        exposed = max(reduce_bytes * last * part / bandwidth, reduce - 2 / 3 * window) + max(2 * last * part / bandwidth, gather - 1 / 3 * window)
    else:
        exposed = reduce + gather
    return compute + update(parameters, gpus) + exposed, exposed


def table(network, flops_rate):
    print("| model | GPUs | tokens a step | ms | not hidden, ms | tokens/s | efficiency |\n|---|---|---|---|---|---|---|")
    for model, (_, flops, _) in MODELS.items():
        for gpus in (1, 8, 64, 512, 4096):
            tokens = max(2097152, gpus * SEQUENCE)
            seconds, exposed = step(model, gpus, tokens, network, flops_rate)
            rate = tokens / seconds
            efficiency = 100 * rate * flops / flops_rate / gpus
            print(f"| {model} | {gpus:,} | {tokens / 1e6:.1f}M | {seconds * 1e3:,.0f} | {exposed * 1e3:,.0f} | "
                  f"{rate / 1e6:.2f}M | {efficiency:.0f} % |")


def measured(path):
    """Takes bandwidth, hop and computing from the file, prints model against measurement, and returns FLOP/s of a GPU"""
    global NVLINK
    result = json.load(open(path))
    most = max(result["collectives"], key=lambda r: r["ranks"])
    bandwidth = 4 * most["elements"] * (most["ranks"] - 1) / most["ranks"] / most["reduce"]
    NVLINK = (bandwidth, most["hop"] / min(most["ranks"], 64) ** 0.5)       # step() multiplies by that root
    NETWORKS["8 x 400 Gb/s a machine"] = NVLINK
    flops_rate = None
    print(f"measured: {result['machine']}, commit {result['commit']}: {NVLINK[0] / 1e9:.1f} GB/s of a sum, {NVLINK[1] * 1e6:.1f} us a hop\n")
    print("| model | GPUs | micro-batches a GPU | gradients | overlap | measured, ms | the model, ms | off by |\n|---|---|---|---|---|---|---|---|")
    for row in result["speed"]:
        model = next((name for name in MODELS if row["model"].lower().endswith(name.lower())), None)
        if model is None:
            sys.exit(f"error: {path}: {row['model']} is none of {', '.join(MODELS)}: scaling_check.py --small measures nothing")
        parameters, flops, _ = MODELS[model]
        tokens = row["tok_s"] * row["ms"] / 1e3
        if flops_rate is None and row["ranks"] == 1:
            flops_rate = tokens * flops / (row["ms"] / 1e3 - update(parameters, 1))
        seconds, _ = step(model, row["ranks"], tokens, NVLINK, flops_rate or FLOPS, 2 if row["reduce"] == "bf16" else 4, row["overlap"])
        overlap = "on" if row["overlap"] else "off"
        print(f"| {model} | {row['ranks']} | {row['accumulate']} | {row['reduce']} | {overlap} | {row['ms']:.1f} | {seconds * 1e3:.1f} | "
              f"{100 * (seconds * 1e3 / row['ms'] - 1):+.1f} % |")
    return flops_rate or FLOPS


if __name__ == "__main__":
    rate = measured(sys.argv[1]) if len(sys.argv) > 1 else FLOPS
    for name, network in NETWORKS.items():
        print(f"\n**{name}**\n")
        table(network, rate)
