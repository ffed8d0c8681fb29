"""Draws what bench_generate measured: tokens/s of writing against the tokens behind, and of reading a prompt against its length."""

import argparse
import json

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter


def size(n, _=None):
    for unit, name in ((2**20, "M"), (2**10, "K")):
        if n >= unit:
            return f"{n / unit:g}{name}"
    return f"{n:g}"


def draw_series(axes, entries, key, label):
    entries = sorted(entries, key=lambda e: e[key])
    if entries:
        axes.plot([e[key] for e in entries], [e["tok_s"] for e in entries], marker="o", markersize=4, label=label)


def finish(axes, title, xlabel):
    axes.set(title=title, xlabel=xlabel, ylabel="tokens/s", xscale="log")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(size))
    axes.grid(alpha=0.3, which="both")
    axes.legend()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", nargs="+", help="files of bench_generate --out; drawn together")
    parser.add_argument("--out", default="generate.png")
    options = parser.parse_args()
    runs = [json.load(open(path)) for path in options.json]
    decode = [e for run in runs for e in run["decode"]]
    prefill = [e for run in runs for e in run["prefill"]]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5))
    for model in dict.fromkeys(e["model"] for e in decode):
        for batch in sorted({e["batch"] for e in decode}):
            draw_series(left, [e for e in decode if e["model"] == model and e["batch"] == batch], "context", f"{model}, batch {batch}")
    for model in dict.fromkeys(e["model"] for e in prefill):
        draw_series(right, [e for e in prefill if e["model"] == model], "prompt", model)
    finish(left, "Writing", "tokens behind")
    finish(right, "Reading a prompt", "prompt length")
    figure.suptitle(", ".join(dict.fromkeys(f"{run['device']}, {run['build']}" for run in runs)))
    figure.tight_layout()
    figure.savefig(options.out, dpi=110)
    print("wrote", options.out)


if __name__ == "__main__":
    main()
