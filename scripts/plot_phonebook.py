#!/usr/bin/env python3
"""Phone-book retrieval as curves: scripts/plot_phonebook.py RESULT.json... --out PICTURE.png

The files are what `train_samba retrieve --out` wrote for phone-book prompts; one curve each: the share of numbers answered
right (all ten digits) against the number of entries in the book.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from plot_log import PALETTE, STYLE, PlotError, plt, save  # noqa: E402
from plot_passkey import accuracy, run, title  # noqa: E402


def draw_all(results: list[dict], out: Path) -> None:
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 4.5))
        for result, color in zip(results, PALETTE * len(results)):
            share = accuracy(result["rows"], "entries")
            entries = sorted(count for (count,) in share)
            axes.plot(entries, [100 * share[count,] for count in entries], "o-", color=color, markersize=4, label=title(result))
        axes.set_ylim(-3, 103)
        axes.set_xlabel("entries in the phone book")
        axes.set_ylabel("numbers answered right (%)")
        axes.set_title("Phone book")
        axes.legend(frameon=False, fontsize=9)
        save(figure, out.parent, out.name)


if __name__ == "__main__":
    sys.exit(run(__doc__, "phonebook", draw_all, None))
