#!/usr/bin/env python3
"""Passkey retrieval as heat maps: scripts/plot_passkey.py RESULT.json... --out PICTURE.png

The files are what `train_samba retrieve --out` wrote for passkey prompts; one panel each, context length across, depth of the
key down, the share of keys answered right in each cell. A line marks the length that the model was trained at.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from plot_log import FAINT, STYLE, PlotError, length_name, plt, save  # noqa: E402


def read_result(path: str, task: str) -> dict:
    """A report of that task, with all its rows in one list"""
    try:
        result = json.loads(Path(path).read_text())
        rows = [row for file in result["files"] for row in file["rows"]]
        if result["task"] != task:
            raise PlotError(f"{path}: answers to {result['task']} prompts; this draws those to {task} prompts")
        return {**result, "rows": rows}
    except (ValueError, KeyError, TypeError) as error:
        raise PlotError(f"{path}: not what train_samba retrieve --out writes ({error})") from None


def accuracy(rows: list[dict], *labels: str) -> dict[tuple, float]:
    """Share of rows answered right, for every combination of these labels"""
    answers = defaultdict(list)
    for row in rows:
        answers[tuple(row[label] for label in labels)].append(bool(row["correct"]))
    return {key: sum(values) / len(values) for key, values in answers.items()}


def title(result: dict) -> str:
    return f"{result['model']} ({result['parameters'] / 1e6:.3g}M, window {result['window']}, trained at {result['trained_length']:,})"


def draw(axes, result: dict):
    share = accuracy(result["rows"], "length", "depth")
    lengths, depths = sorted({length for length, _ in share}), sorted({depth for _, depth in share})
    cells = [[share.get((length, depth), float("nan")) for length in lengths] for depth in depths]
    image = axes.imshow(cells, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    for y, row in enumerate(cells):
        for x, value in enumerate(row):
            if value == value:
                axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=7.5)
    seen = sum(length <= result["trained_length"] for length in lengths)
    if 0 < seen < len(lengths):
        axes.axvline(seen - 0.5, color="black", linewidth=1.5)
    axes.set_xticks(range(len(lengths)), [length_name(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.1f}" for depth in depths])
    axes.set_xlabel("context length (tokens)")
    axes.set_ylabel("depth of the key")
    axes.set_title(title(result), fontsize=10)
    axes.grid(False)
    return image


def draw_all(results: list[dict], out: Path) -> None:
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, len(results), figsize=(6.4 * len(results), 4.4), squeeze=False)
        for axes, result in zip(panels[0], results):
            image = draw(axes, result)
        bar = figure.colorbar(image, ax=list(panels[0]), shrink=0.85, pad=0.01)
        bar.set_label("keys answered right", color=FAINT)
        bar.outline.set_visible(False)
        save(figure, out.parent, out.name)


def run(description: str, task: str, draw_all, arguments: list[str] | None) -> int:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", metavar="RESULT.json")
    parser.add_argument("--out", required=True, type=Path, metavar="PICTURE.png")
    options = parser.parse_args(arguments)
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        draw_all([read_result(path, task) for path in options.results], options.out)
        return 0
    except PlotError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}; check the path", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(run(__doc__, "passkey", draw_all, None))
