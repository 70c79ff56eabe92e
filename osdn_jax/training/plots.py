"""Plots of runs."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from osdn_jax._files import write_atomically
from osdn_jax.plotting import COLOURS, GREY, INK, label_ends, new_canvas, png, style_axes, widest_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEFT, BOTTOM = 0.06, 0.1  # lower left corner of the axes, as fractions of the figure
GAP = 0.036  # minimum distance between two labels, as a fraction of the axes' height


def plot_loss(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    path: str | os.PathLike[str],
    *,
    x: Literal["tokens", "step"] = "tokens",
    lines: Mapping[str, float] | None = None,
    title: str | None = None,
    train_key: str = "train/bits_per_byte",
    validation_key: str = "validation/bits_per_byte",
    smoothing: float = 0.025,
    unit: str = "byte",
) -> None:
    """Plot the bits per byte of runs as a PNG of 1200 × 750 pixels, written atomically.

    Training is a thin smoothed line; validation is marked by circles; each run's name is at the end of its curve.

    Args:
        runs: {label: rows of metrics.jsonl}. Rows without a key, or with null for it, are skipped.
        path: the PNG file.
        x: the key on the horizontal axis.
        lines: {name: bits per byte} of horizontal lines to compare with, such as {"xz -9": 2.1}.
        title: above the plot; default: none.
        train_key: the rows' key of the training curve.
        validation_key: the rows' key of the validation curve.
        smoothing: width of the Gaussian kernel that smooths the training curve, as a fraction of the run's length.
        unit: what the bits are counted by; "answer" for a run on a recall task.

    Raises:
        ValueError: no runs, or one that has neither curve; then no file is written.

    Example:
        >>> import tempfile
        >>> from osdn_jax.training import plot_loss
        >>> rows = [{"step": step, "tokens": 64 * step, "train/bits_per_byte": 8 - step} for step in range(1, 6)]
        >>> plot_loss({"osdn": rows}, f"{tempfile.mkdtemp()}/loss.png", x="step", lines={"xz -9": 2.1})
    """
    if not runs:
        raise ValueError("there are no runs to plot")
    canvas = new_canvas(12, 7.5)
    figure = canvas.figure
    axes = figure.add_axes((LEFT, BOTTOM, 0.8, (0.86 if title else 0.92) - BOTTOM))
    _style(axes, "Training tokens" if x == "tokens" else "Training step", unit)

    ends: list[tuple[float, str, str]] = []  # (bits per byte, text, colour) of the labels in the right margin
    shown: list[float] = []  # what the vertical axis has to show
    right, validated = 0.0, False
    for number, (label, rows) in enumerate(runs.items()):
        colour = COLOURS[number % len(COLOURS)]
        train, validation = _curve(rows, x, train_key), _curve(rows, x, validation_key)
        if not len(train) and not len(validation):
            raise ValueError(f"run {label!r} has neither {train_key!r} nor {validation_key!r} with {x!r}")
        right = max(right, *train[-1:, 0], *validation[-1:, 0])
        validated |= len(validation) > 0
        if len(train):
            smooth = _smooth(train, smoothing)
            axes.plot(train[:, 0], smooth, color=colour, linewidth=1.1, alpha=0.8 if len(validation) else 1.0)
            shown += [float(smooth.min()), float(np.quantile(smooth, 0.96))]
        if len(validation):
            axes.plot(*validation.T, "o", color=colour, markersize=6, markeredgecolor="white", markeredgewidth=1.0)
            shown += [float(validation[:, 1].min())]
        last = float(validation[-1, 1]) if len(validation) else float(smooth[-1])
        ends.append((last, f"{label}  {last:.3f}", colour))
    for name, value in (lines or {}).items():
        axes.axhline(value, color=GREY, linewidth=1.0, linestyle=(0, (5, 4)), zorder=1)
        ends.append((value, f"{name}  {value:.3f}", GREY))
        shown.append(value)

    low, high = min(shown), max(shown)
    room = 0.05 * (high - low) or 0.1
    axes.set_ylim(low - room, high + room)
    axes.set_xlim(0, right * 1.01)
    label_ends(axes, ends, gap=GAP)
    if title:
        figure.text(LEFT, 0.945, title, fontsize=18, fontweight="bold", color=INK, va="center")
    _legend(axes, validated)
    margin = (widest_label(axes, canvas) + 24) / figure.bbox.width
    axes.set_position((LEFT, BOTTOM, 1 - LEFT - margin, axes.get_position().height))
    write_atomically(Path(path), png(canvas))


def _curve(rows: Sequence[Mapping[str, Any]], x: str, key: str) -> np.ndarray:
    """[N, 2]: the finite points of one key, by x."""
    points = [
        (row[x], row[key])
        for row in rows
        if row.get(x) is not None and row.get(key) is not None and math.isfinite(row[key])
    ]
    return np.array(sorted(points), dtype=np.float64).reshape(-1, 2)


def _smooth(points: np.ndarray, width: float) -> np.ndarray:
    """Smooth points [N, 2] with a local line fit of Gaussian weights over x, evaluated at each point: [N].

    A line, because an average would be biased at the ends; narrower near the start, where the loss falls fast.
    """
    x, y = points.T
    sigma = np.maximum(np.minimum(width * (x[-1] - x[0]), 0.1 * (x - x[0])), 1e-9)
    out = np.empty_like(y)
    for i in range(len(x)):
        first, last = np.searchsorted(x, [x[i] - 4 * sigma[i], x[i] + 4 * sigma[i] + 1e-9])
        near, values = x[first : last + 1] - x[i], y[first : last + 1]
        weight = np.exp(-0.5 * (near / sigma[i]) ** 2)
        weight /= weight.sum()
        centre, level = weight @ near, weight @ values
        spread = weight @ (near - centre) ** 2
        slope = (weight * (near - centre)) @ values / spread if spread > 0 else 0.0
        out[i] = level - slope * centre
    return out


def _style(axes: "Axes", xlabel: str, unit: str) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    style_axes(axes, xlabel=xlabel)
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    axes.set_title(f"bits per {unit}", fontsize=13, color=INK, loc="left", pad=12)


def _legend(axes: "Axes", validation: bool) -> None:
    """Says once what a line and what a circle is; the colours are named at the curves."""
    axes.plot([], [], color=GREY, linewidth=1.1, label="training")
    if validation:
        axes.plot([], [], "o", color=GREY, markersize=6, label="validation")
    axes.legend(loc="upper right", frameon=False, fontsize=12, labelcolor=INK, ncols=2, borderaxespad=0.2)
