#!/usr/bin/env python3
"""Draws what `train_samba eval --lengths … --json FILE` found, of one model or several: scripts/plot_context.py FILE.json... [--out DIR]

Writes context.png (perplexity against context length: over all positions, over the last, and by position in the longest text;
speed and memory) and context_paper.png (the paper's figure: one curve a model). NAME=FILE.json gives a curve its name.
"""

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

try:
    from plot_log import PALETTE, STYLE, plt
except ImportError as error:
    sys.exit(f"plot_context: Python module '{error.name}' is missing; run scripts/setup.sh and then .venv/bin/python scripts/plot_context.py")
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator


class PlotError(Exception):
    """What went wrong and what to do about it, in one line."""


@dataclass
class Report:
    name: str
    about: dict
    results: list[dict]  # by length, ascending
    color: str = PALETTE[0]

    def column(self, key):
        return [r[key] for r in self.results]


def short(length: float) -> str:
    """4096 -> 4K, 1048576 -> 1M, 2500 -> 2500"""
    for unit, letter in ((1 << 20, "M"), (1 << 10, "K")):
        if length >= unit and length % unit == 0:
            return f"{length / unit:.0f}{letter}"
    return f"{length:.0f}"


def read_report(argument: str) -> Report:
    name, _, path = argument.rpartition("=") if not Path(argument).exists() else ("", "", argument)
    try:
        about = json.loads(Path(path).read_text(encoding="utf-8"))
        results = sorted(about["results"], key=lambda r: r["length"])
        for r in results:
            for key in ("length", "ppl", "last", "last_ppl", "tok_s", "device_bytes", "positions"):
                r[key]
    except (ValueError, KeyError, TypeError):
        raise PlotError(f"{path} is not what train_samba eval --lengths … --json writes") from None
    if not results:
        raise PlotError(f"{path} holds no results")
    return Report(name or f"{about.get('model', Path(path).stem)}", about, results)


def length_axis(axis, reports):
    lengths = sorted({length for report in reports for length in report.column("length")})
    axis.set_xscale("log", base=2)
    axis.set_xlabel("context length (tokens)")
    axis.xaxis.set_major_locator(LogLocator(base=2, numticks=20))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
    axis.set_xlim(lengths[0] / 1.2, lengths[-1] * 1.2)


def mark_training_length(axis, reports):
    for length in {report.about.get("training_length") for report in reports} - {None}:
        axis.axvline(length, color="#b0b0b0", linewidth=1, linestyle=":")
        axis.annotate("trained at", (length, 1), xycoords=("data", "axes fraction"), xytext=(3, -10), textcoords="offset points",
                      fontsize=8, color="#6b6b6b")  # fmt: skip


def draw_paper(reports, path):
    """Perplexity over all positions against context length, as in the paper's figure 2a."""
    figure, axis = plt.subplots(figsize=(6, 4))
    for report in reports:
        axis.plot(report.column("length"), report.column("ppl"), marker="o", markersize=4, color=report.color, label=report.name)
    length_axis(axis, reports)
    mark_training_length(axis, reports)
    axis.set_ylabel("perplexity")
    axis.legend(frameon=False)
    figure.savefig(path)
    plt.close(figure)


def draw_means(axis, reports):
    for report in reports:
        x = report.column("length")
        axis.plot(x, report.column("ppl"), marker="o", markersize=3.5, color=report.color, label=f"{report.name}, all positions")
        axis.plot(x, report.column("last_ppl"), marker="s", markersize=3.5, linestyle="--", color=report.color,
                  label=f"{report.name}, last {short(max(report.column('last')))}")  # fmt: skip
    length_axis(axis, reports)
    mark_training_length(axis, reports)
    axis.set_title("Perplexity by context length")
    axis.legend(frameon=False, fontsize=8)


def draw_positions(axis, reports):
    for report in reports:
        positions = report.results[-1]["positions"]
        edges = [p["from"] for p in positions] + [positions[-1]["to"]]
        axis.stairs([math.exp(p["loss"]) for p in positions], [max(e, 512) for e in edges], color=report.color, linewidth=1.8, baseline=None)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("position in the text (tokens)")
    axis.set_title(f"Perplexity by position, texts of {short(max(r.results[-1]['length'] for r in reports))}")


def draw_cost(axes, reports):
    speed, memory = axes
    for report in reports:
        speed.plot(report.column("length"), [t / 1e3 for t in report.column("tok_s")], marker="o", markersize=3.5, color=report.color)
        memory.plot(report.column("length"), [b / (1 << 30) for b in report.column("device_bytes")], marker="o", markersize=3.5, color=report.color)
    speed.set_title("Thousand tokens a second")
    memory.set_title("Memory of weights, activations and state (GiB)")
    for axis in axes:
        length_axis(axis, reports)
        axis.set_ylim(bottom=0)
        axis.yaxis.set_major_locator(MaxNLocator(5))


def draw_all(reports, folder: Path):
    folder.mkdir(parents=True, exist_ok=True)
    for i, report in enumerate(reports):
        report.color = PALETTE[i % len(PALETTE)]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(11, 7.5))
        draw_means(axes[0][0], reports)
        draw_positions(axes[0][1], reports)
        draw_cost(axes[1], reports)
        about = reports[0].about
        figure.suptitle(f"{about.get('device', '')}, {about.get('build', '')}; {about.get('protocol', '')}", fontsize=9, color="#6b6b6b")
        figure.savefig(folder / "context.png")
        plt.close(figure)
        draw_paper(reports, folder / "context_paper.png")


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="[NAME=]FILE.json")
    parser.add_argument("--out", metavar="DIR", help="folder for the pictures (default: beside the first file)")
    options = parser.parse_args(arguments)
    try:
        reports = [read_report(argument) for argument in options.files]
        draw_all(reports, Path(options.out) if options.out else Path(options.files[0].rpartition("=")[2]).parent)
        return 0
    except PlotError as error:
        print(f"plot_context: {error}", file=sys.stderr)
    except OSError as error:
        print(f"plot_context: {error.filename}: {error.strerror}; check the path", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
