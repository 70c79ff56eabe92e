"""The figure of a sweep: accuracy by step, and the plateau of every seed."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from osdn_jax._files import write_atomically
from osdn_jax.plotting import COLOURS, GREY, INK, PALE, label_ends, new_canvas, png, style_axes
from osdn_jax.sweep.summary import Row
from osdn_jax.sweep.table import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))  # after all colours are used
_MOST_BANDS = 5  # more of them hide each other
_GAP = 0.045  # minimum distance between two labels, as a fraction of the axes' height


def plot_sweep(summary: Summary, path: str | Path, *, title: str = "", note: str = "") -> None:
    """Plot a sweep as a PNG, written atomically.

    Left: mean test accuracy over seeds by training step, for up to five variants with a band from the lowest to the
    highest seed. Right: the plateau of every seed, and their mean. Of a variant with several learning rates, that with
    the best mean plateau is shown.

    Args:
        summary: of `summarise_plan`.
        path: the PNG file.
        title: above the panels.
        note: below them, small.

    Raises:
        ValueError: there are no runs.
    """
    rows = _best(summary.rows)
    if not rows:
        raise ValueError("there is nothing to plot: no run has finished")
    height = max(6.5, 3.2 + 0.42 * len(rows))
    canvas = new_canvas(17.5, height)
    figure = canvas.figure
    bottom, top = 1.15 / height, 1 - 1.05 / height
    curves = figure.add_axes((0.05, bottom, 0.38, top - bottom))
    dots = figure.add_axes((0.745, bottom, 0.24, top - bottom))
    _curves(curves, rows, summary)
    _dots(dots, rows)
    if title:
        figure.text(0.05, 1 - 0.4 / height, title, fontsize=17, fontweight="bold", color=INK, va="center")
    if note:
        figure.text(0.05, 0.25 / height, note, fontsize=10.5, color=GREY, va="center")
    write_atomically(path, png(canvas))


def _best(rows: list[Row]) -> list[Row]:
    best: dict[str, Row] = {}
    for row in rows:
        if row.label not in best or row.mean > best[row.label].mean:
            best[row.label] = row
    return list(best.values())


def _curves(axes: "Axes", rows: list[Row], summary: Summary) -> None:
    ends = []
    banded = len(rows) <= _MOST_BANDS
    for number, row in enumerate(rows):
        steps, values = _aligned(row)
        mean = values.mean(axis=0)
        colour, style = COLOURS[number % len(COLOURS)], _STYLES[number // len(COLOURS) % len(_STYLES)]
        if banded:
            axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.13, linewidth=0)
        axes.plot(steps, mean, color=colour, linewidth=1.8, linestyle=style)
        ends.append((float(mean[-1]), f"{row.label}  (lr {row.learning_rate:g}, n = {len(row.seeds)})", colour))
    axes.axhline(100 * summary.threshold, color=GREY, linewidth=1.0, linestyle=(0, (5, 4)), zorder=1)
    ends.append((100 * summary.threshold, "threshold of the transition", GREY))
    axes.set_ylim(-2, 102)
    axes.set_xlim(left=0, right=max(record["steps"][-1] for row in rows for record in row.records))
    style_axes(axes, xlabel="Training step")
    bands = ", band from the lowest to the highest" if banded else ""
    axes.set_title(f"Test accuracy, %: mean over seeds{bands}", fontsize=12, color=INK, loc="left", pad=12)
    label_ends(axes, ends, gap=_GAP, fontsize=11)


def _aligned(row: Row) -> tuple[np.ndarray, np.ndarray]:
    """Return (steps [E], accuracy in % [n, E]); a run that ended early keeps its last accuracy."""
    longest = max((record["steps"] for record in row.records), key=len)
    values = [r["accuracy"] + r["accuracy"][-1:] * (len(longest) - len(r["accuracy"])) for r in row.records]
    return np.asarray(longest), 100 * np.asarray(values, dtype=np.float64)


def _dots(axes: "Axes", rows: list[Row]) -> None:
    for number, row in enumerate(rows):
        colour = COLOURS[number % len(COLOURS)]
        height = len(rows) - 1 - number
        shifts = np.linspace(-0.18, 0.18, len(row.plateaus)) if len(row.plateaus) > 1 else np.zeros(1)
        values = [100 * value for value in row.plateaus]
        axes.plot(values, height + shifts, "o", color=colour, markersize=6, markeredgecolor="white", alpha=0.9)
        axes.plot([100 * row.mean] * 2, [height - 0.32, height + 0.32], color=colour, linewidth=2.2)
    style_axes(axes, xlabel="Plateau of test accuracy, %")
    axes.set_title("A dot per seed, a line at the mean", fontsize=12, color=INK, loc="left", pad=12)
    axes.grid(axis="x", color=PALE, linewidth=0.8)
    shown = [100 * value for row in rows for value in row.plateaus]
    room = max(0.06 * (max(shown) - min(shown)), 2.0 - 0.5 * (max(shown) - min(shown)), 0.5)
    axes.set_xlim(min(shown) - room, max(shown) + room)
    axes.set_yticks(range(len(rows)), [row.label for row in reversed(rows)])
    axes.set_ylim(-0.6, len(rows) - 0.4)
