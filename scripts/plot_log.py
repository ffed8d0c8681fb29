#!/usr/bin/env python3
"""Draws the log of a training run, or several to compare: scripts/plot_log.py LOG.jsonl... [--out DIR]

Writes overview.png, loss.png, validation.png, grad_norm.png and throughput.png. Of a resumed run the later steps count;
a last line cut short by a crash, and kinds of records this program does not know, are skipped and said so.
"""

import argparse
import json
import math
import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

try:
    import matplotlib
    import numpy as np
except ImportError as error:
    sys.exit(f"plot_log: Python module '{error.name}' is missing; run scripts/setup.sh and then .venv/bin/python scripts/plot_log.py")

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator  # noqa: E402

# Okabe and Ito's palette, which colour-blind readers can tell apart; without its yellow, which is too light for lines.
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"]
INK, FAINT = "#222222", "#6b6b6b"
STYLE = {
    "figure.dpi": 100, "savefig.dpi": 160, "figure.constrained_layout.use": True, "font.family": "sans-serif", "font.size": 10,
    "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 8, "axes.labelcolor": FAINT,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#b0b0b0", "axes.linewidth": 0.8,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#e6e6e6", "grid.linewidth": 0.8,
    "text.color": INK, "xtick.color": FAINT, "ytick.color": FAINT, "xtick.major.size": 0, "ytick.major.size": 0, "ytick.minor.size": 0,
}  # fmt: skip
UNITS = [(1e12, "trillions"), (1e9, "billions"), (1e6, "millions"), (1e3, "thousands")]


class PlotError(Exception):
    """What went wrong and what to do about it, in one line."""


# ----------------------------------------------------------------------------------------------------------------- log


@dataclass
class Run:
    name: str
    options: dict = field(default_factory=dict)  # the first record
    train: dict[int, dict] = field(default_factory=dict)  # by step
    val: dict[tuple[int, int], dict] = field(default_factory=dict)  # by step and length
    color: str = PALETTE[0]

    def option(self, key: str) -> str:
        """A fact of the first record, or of the options in it."""
        nested = self.options.get("options")
        return str(self.options.get(key) or (nested.get(key) if isinstance(nested, dict) else None) or "")

    def column(self, key: str) -> np.ndarray:
        return np.array([value_of(self.train[step], key) for step in sorted(self.train)], dtype=float)

    def curve(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and values, without those that are not finite."""
        x, y = self.column("tokens"), self.column(key)
        good = np.isfinite(x) & np.isfinite(y)
        return x[good], y[good]

    def tokens_at(self, steps) -> np.ndarray:
        """Tokens seen after a step that may itself not be in the log."""
        known = np.array([0, *sorted(self.train)], dtype=float)
        tokens = np.concatenate([[0.0], self.column("tokens")])
        good = np.isfinite(tokens)
        return np.interp(steps, known[good], tokens[good])

    def lengths(self) -> list[int]:
        return sorted({length for _, length in self.val})

    def val_curve(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        steps = sorted(step for step, other in self.val if other == length)
        loss = np.array([value_of(self.val[step, length], "loss") for step in steps], dtype=float)
        good = np.isfinite(loss)
        return self.tokens_at(np.array(steps, dtype=float))[good], loss[good]


def value_of(record: dict, key: str) -> float:
    value = record.get(key)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def add_record(run: Run, record: dict) -> bool:
    """False for a kind of record that is not known, or lacks its numbers."""
    kind, step = record.get("type"), record.get("step")
    if kind == "run":
        run.options = run.options or record
        return True
    if kind == "checkpoint":
        return True
    if kind not in ("train", "val") or not isinstance(step, int):
        return False
    if kind == "val":
        if not isinstance(record.get("length"), int):
            return False
        run.val[step, record["length"]] = record
        return True
    if run.train and step <= next(reversed(run.train)):  # resumed: what came after that step is void
        run.train = {old: kept for old, kept in run.train.items() if old < step}
        run.val = {key: kept for key, kept in run.val.items() if key[0] < step}
    run.train[step] = record
    return True


def read_log(path: str) -> Run:
    name = Path(path).resolve()
    run, ignored, broken = Run(name.parent.name if name.stem == "log" else name.stem), Counter(), []
    lines = name.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError
        except (ValueError, RecursionError):  # ValueError: neither JSON nor UTF-8
            broken.append(number)
            continue
        if not add_record(run, record):
            ignored[str(record.get("type"))] += 1
    if broken and broken[-1] == len(lines):
        note(f"{path}:{broken.pop()}: last line cut short, skipped")
    if broken:
        note(f"{path}:{broken[0]}: not a JSON object; {len(broken)} such lines skipped")
    for kind, count in ignored.items():
        note(f"{path}: {count} records of type '{kind}' not understood, skipped")
    return run


def note(text: str) -> None:
    print(f"plot_log: {text}", file=sys.stderr)


def read_logs(paths: list[str]) -> list[Run]:
    runs = []
    for path in paths:
        run = read_log(path)
        if not run.curve("loss")[0].size:
            if len(paths) == 1:
                raise PlotError(f"{path}: holds no training steps yet; wait for the first one or give another log")
            note(f"{path}: holds no training steps, left out")
            continue
        runs.append(run)
    if not runs:
        raise PlotError(f"{', '.join(paths)}: none holds a training step; give the log.jsonl of a run")
    names = Counter(run.name for run in runs)
    seen = Counter()
    for index, run in enumerate(runs):
        run.color = PALETTE[index % len(PALETTE)]
        seen[run.name] += 1
        if names[run.name] > 1:
            run.name = f"{run.name} ({seen[run.name]})"
    return runs


# ------------------------------------------------------------------------------------------------------------- drawing


def unit_for(largest: float) -> tuple[float, str]:
    return next(((factor, f" ({name})") for factor, name in UNITS if largest >= factor), (1.0, ""))


def short(value: float) -> str:
    """1.23 M: three digits and a suffix."""
    for factor, suffix in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= factor:
            return f"{value / factor:.3g}{suffix}" if value < 1000 * factor else f"{value / factor:.0f}{suffix}"
    return f"{value:.3g}"


def length_name(length: int) -> str:
    return f"{length // 1024}k" if length >= 1024 and length % 1024 == 0 else str(length)


def smooth(y: np.ndarray) -> np.ndarray:
    """Mean over a fiftieth of the curve around each point, over less near the start: a centred window lags behind no fall."""
    index = np.arange(len(y))
    half = np.minimum(index // 10, len(y) // 100)
    low, high = index - half, np.minimum(index + half + 1, len(y))
    total = np.concatenate([[0.0], np.cumsum(y)])
    return (total[high] - total[low]) / (high - low)


def smooth_log(y: np.ndarray) -> np.ndarray:
    """The same with the geometric mean, which a single spike moves less."""
    return np.exp(smooth(np.log(np.maximum(y, 1e-12))))


def token_axis(axes, runs: list[Run]) -> float:
    """Labels the x axis and returns what to divide tokens by."""
    largest = max(run.curve("loss")[0].max() for run in runs)
    scale, name = unit_for(largest)
    axes.set_xlabel(f"training tokens{name}")
    axes.set_xlim(0, largest / scale * 1.01)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    return scale


def label_ends(axes, labels: list[tuple[float, float, str, str]]) -> None:
    """Names of curves at their right ends (x, y, text, colour), pushed apart so that none covers another."""
    figure = axes.figure
    figure.canvas.draw()  # settles the layout, so that data and pixels correspond
    line = 1.25 * plt.rcParams["font.size"] * 0.9 * figure.dpi / 72
    to_pixels, to_data = axes.transData.transform, axes.transData.inverted().transform
    placed: list[float] = []
    x = max((label[0] for label in labels), default=0)
    for _, y, text, color in sorted(labels, key=lambda label: label[1]):
        pixel = to_pixels((x, y))[1]
        pixel = max(pixel, placed[-1] + line) if placed else pixel
        placed.append(pixel)
        axes.annotate(text, (x, to_data((0, pixel))[1]), xytext=(6, 0), textcoords="offset points", va="center", ha="left",
                      color=color, fontsize=plt.rcParams["font.size"] * 0.9, fontweight="bold", annotation_clip=False)  # fmt: skip


def draw_curves(axes, runs: list[Run], key: str, factor: float = 1.0, mean=smooth) -> float:
    """The raw values faintly, their moving average on top; returns the unit of the x axis."""
    scale = token_axis(axes, runs)
    for run in runs:
        x, y = run.curve(key)
        if x.size:
            axes.plot(x / scale, y / factor, color=run.color, linewidth=0.7, alpha=0.25)
            axes.plot(x / scale, mean(y) / factor, color=run.color, linewidth=1.8, marker="o" if x.size == 1 else "")
    return scale


def draw_loss(axes, runs: list[Run]) -> None:
    axes.set_title("Loss")
    axes.set_ylabel("cross entropy (nats per token)")
    scale = draw_curves(axes, runs, "loss")
    labels, low, high = [], [], []
    for run in runs:
        x, y = run.curve("loss")
        late = smooth(y)[x >= 0.05 * x[-1]]  # the fall of the first steps would flatten all the rest
        low.append(np.percentile(y, 0.5)), high.append(late.max())
        lengths = run.lengths()
        text = f"train {smooth(y)[-1]:.3f}" if len(runs) == 1 else f"{run.name} {smooth(y)[-1]:.3f}"
        labels.append((x[-1] / scale, smooth(y)[-1], text, run.color))
        if lengths:
            val_x, val_y = run.val_curve(lengths[0])
            color = PALETTE[1] if len(runs) == 1 else run.color
            axes.plot(val_x / scale, val_y, "o", color=color, markersize=4.5, markeredgecolor="white", markeredgewidth=0.8, zorder=3)
            if val_y.size:
                low.append(val_y.min())
                if len(runs) == 1:
                    labels.append((x[-1] / scale, val_y[-1], f"val {val_y[-1]:.3f}", color))
    margin = 0.06 * (max(high) - min(low)) or 0.1
    axes.set_ylim(min(low) - margin, max(high) + margin)
    if len(runs) > 1 and any(run.val for run in runs):
        axes.text(0.99, 0.98, "line: training   dot: validation", transform=axes.transAxes, ha="right", va="top", color=FAINT, fontsize=9)
    label_ends(axes, labels)


def draw_validation(axes, runs: list[Run]) -> None:
    runs = [run for run in runs if run.val]
    axes.set_title("Validation loss by context length")
    if not runs:
        axes.text(0.5, 0.5, "no validation in the log", transform=axes.transAxes, ha="center", va="center", color=FAINT)
        axes.set_axis_off()
    elif len(runs) == 1:
        draw_validation_over_time(axes, runs[0])
    else:
        draw_last_validation(axes, runs)


def draw_validation_over_time(axes, run: Run) -> None:
    """One run: a curve a length, short ones light, long ones dark."""
    axes.set_ylabel("loss (nats per token)")
    scale, lengths, labels, values = token_axis(axes, [run]), run.lengths(), [], []
    shades = matplotlib.colormaps["viridis"](np.linspace(0.72, 0.05, len(lengths))) if len(lengths) > 1 else [PALETTE[1]]
    for length, color in zip(lengths, shades):
        x, y = run.val_curve(length)
        if y.size:
            axes.plot(x / scale, y, "o-", color=color, linewidth=1.5, markersize=3)
            labels.append((x[-1] / scale, y[-1], f"{length_name(length)}: {y[-1]:.3f}", color))
            values += list(y[1:] if len(y) > 3 else y)  # the first may be that of the untrained model
    if values:
        margin = 0.08 * (max(values) - min(values)) or 0.1
        axes.set_ylim(min(values) - margin, max(values) + margin)
    label_ends(axes, labels)


def draw_last_validation(axes, runs: list[Run]) -> None:
    """Several runs: how the last loss of each depends on the length."""
    axes.set_title("Last validation loss by context length")
    axes.set_ylabel("loss (nats per token)")
    axes.set_xlabel("context length (tokens)")
    labels, lengths = [], sorted({length for run in runs for length in run.lengths()})
    for run in runs:
        points = [(length, run.val_curve(length)[1]) for length in run.lengths()]
        points = [(length, y[-1]) for length, y in points if y.size]
        if points:
            x, y = zip(*points)
            axes.plot(x, y, "o-", color=run.color, linewidth=1.5, markersize=4.5)
            labels.append((x[-1], y[-1], run.name, run.color))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda length, _: length_name(round(length))))
    label_ends(axes, labels)


def draw_grad_norm(axes, runs: list[Run]) -> None:
    axes.set_title("Gradient norm before clipping")
    axes.set_ylabel("L2 norm")
    scale = draw_curves(axes, runs, "grad_norm", mean=smooth_log)
    values = np.concatenate([run.curve("grad_norm")[1] for run in runs])
    values = values[values > 0]
    if values.size and values.max() > 10 * np.median(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    if len(runs) > 1:
        curves = [(run, *run.curve("grad_norm")) for run in runs]
        label_ends(axes, [(x[-1] / scale, smooth_log(y)[-1], run.name, run.color) for run, x, y in curves if x.size])


def draw_throughput(axes, runs: list[Run]) -> None:
    axes.set_title("Throughput")
    speeds = [run.curve("tok_s")[1] for run in runs]
    if not any(speed.size for speed in speeds):
        return
    fastest = max(np.percentile(speed, 99) for speed in speeds if speed.size)  # a single odd step sets no scale
    factor, name = unit_for(fastest)
    axes.set_ylabel(f"tokens/s{name}")
    scale = draw_curves(axes, runs, "tok_s", factor)
    axes.set_ylim(0, 1.2 * fastest / factor)
    labels = []
    for run, speed in zip(runs, speeds):
        if not speed.size:
            continue
        mfu = run.curve("mfu")[1]
        text = f"{short(np.median(speed))} tok/s" if len(runs) == 1 else f"{run.name} {short(np.median(speed))}"
        if len(runs) == 1:
            if mfu.size and np.median(mfu) > 0:  # the log holds a fraction
                text += f"\n{100 * np.median(mfu):.1f} % MFU"
        labels.append((run.curve("tok_s")[0][-1] / scale, smooth(speed)[-1] / factor, text, run.color))
    label_ends(axes, labels)


PANELS = {"loss": draw_loss, "validation": draw_validation, "grad_norm": draw_grad_norm, "throughput": draw_throughput}


def caption(runs: list[Run]) -> str:
    """What the first records say that holds for all runs, and how far they are."""
    facts = []
    for key in ("model", "gpu", "commit"):
        values = {run.option(key) for run in runs}
        if len(values) == 1 and (value := values.pop()):
            facts.append(f"commit {value[:8]}" if key == "commit" else value)
    facts.append(f"{short(max(run.curve('loss')[0][-1] for run in runs))} tokens")
    return "   ·   ".join(facts)


def save(figure, out: Path, name: str) -> None:
    figure.savefig(out / (name + ".partial"), format="png", facecolor="white", bbox_inches="tight", pad_inches=0.2, metadata={"Software": None})
    plt.close(figure)
    os.replace(out / (name + ".partial"), out / name)
    print(out / name)


def draw_overview(runs: list[Run], out: Path) -> None:
    """Loss large on the left, the rest in a column beside it."""
    figure = plt.figure(figsize=(13, 7.6))
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    grid = figure.add_gridspec(4, 2, width_ratios=[1.5, 1], height_ratios=[0.26, 1, 1, 1])
    heading = figure.add_subplot(grid[0, :])
    heading.set_axis_off()
    heading.text(0, 1, "   vs   ".join(run.name for run in runs), va="top", fontsize=15, fontweight="bold")
    heading.text(0, 0, caption(runs), va="bottom", color=FAINT)
    panels = [grid[1:, 0], grid[1, 1], grid[2, 1], grid[3, 1]]
    for place, draw in zip(panels, PANELS.values()):
        draw(figure.add_subplot(place), runs)
    save(figure, out, "overview.png")


def draw_all(runs: list[Run], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        draw_overview(runs, out)
        for name, draw in PANELS.items():
            figure, axes = plt.subplots(figsize=(8, 4.5))
            draw(axes, runs)
            save(figure, out, f"{name}.png")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", metavar="LOG.jsonl")
    parser.add_argument("--out", metavar="DIR", help="folder for the pictures (default: plots, beside the first log)")
    options = parser.parse_args(arguments)
    try:
        draw_all(read_logs(options.logs), Path(options.out) if options.out else Path(options.logs[0]).parent / "plots")
        return 0
    except PlotError as error:
        print(f"plot_log: {error}", file=sys.stderr)
    except OSError as error:
        print(f"plot_log: {error.filename}: {error.strerror}; check the path", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
