"""Pictures of runs."""

import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from osdn_jax.training.config import write_atomically

# Okabe and Ito's colours, which stay apart for colour-blind readers; their yellow is too pale for a line on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LEFT, BOTTOM = 0.06, 0.1  # the corner of the axes, as parts of the figure
INK, GREY, PALE = "#222222", "#767676", "#E4E4E4"
GAP = 0.036  # least distance of two labels, as a part of the axes' height


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
) -> None:
    """Draws the bits per byte of runs, 1200 × 750 pixels, as a PNG, written atomically.

    Training is a thin line, smoothed; validation is marked by circles; each run's name stands at the end of its curve.

    Args:
      runs: {label: rows of metrics.jsonl}. Rows without a key, or with null for it, are skipped.
      path: the PNG file.
      x: the key on the horizontal axis.
      lines: {name: bits per byte} of horizontal lines to compare with, such as {"xz -9": 2.1}.
      title: stands above the picture.
      train_key, validation_key: the rows' keys of the two curves.
      smoothing: the width of the Gaussian that training is averaged with, as a part of the length of the run.

    Raises:
      ValueError: no runs, or one that has neither curve; then no file is written.
    """
    if not runs:
        raise ValueError("there are no runs to plot")
    figure = Figure(figsize=(12, 7.5), dpi=100, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((LEFT, BOTTOM, 0.8, (0.86 if title else 0.92) - BOTTOM))
    _style(axes, "Training tokens" if x == "tokens" else "Training step")

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
    _label_ends(axes, ends)
    if title:
        figure.text(LEFT, 0.945, title, fontsize=18, fontweight="bold", color=INK, va="center")
    _legend(axes, validated)
    widest = max(text.get_window_extent(canvas.get_renderer()).width for text in axes.texts)
    place = axes.get_position()
    axes.set_position((LEFT, BOTTOM, 1 - LEFT - (widest + 24) / figure.bbox.width, place.height))

    buffer = io.BytesIO()
    canvas.print_png(buffer)
    write_atomically(Path(path), buffer.getvalue())


def _curve(rows: Sequence[Mapping[str, Any]], x: str, key: str) -> np.ndarray:
    """[N, 2]: the finite points of one key, by x."""
    points = [
        (row[x], row[key])
        for row in rows
        if row.get(x) is not None and row.get(key) is not None and math.isfinite(row[key])
    ]
    return np.array(sorted(points), dtype=np.float64).reshape(-1, 2)


def _smooth(points: np.ndarray, width: float) -> np.ndarray:
    """A running straight line through points [N, 2], Gaussian weights over x, read at each point: [N].

    A line, because an average would lag at the ends; narrower near the start, where the loss falls fast.
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


def _style(axes: Axes, xlabel: str) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    axes.grid(axis="y", color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="both", colors=GREY, labelcolor=INK, labelsize=12, length=0, pad=7)
    axes.tick_params(axis="x", length=4)
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    axes.set_xlabel(xlabel, fontsize=13, color=INK, labelpad=8)
    axes.set_title("bits per byte", fontsize=13, color=INK, loc="left", pad=12)


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Writes each curve's name beside its end in the right margin, apart even where the curves meet."""
    low, high = axes.get_ylim()
    wanted = sorted(((value - low) / (high - low), text, colour) for value, text, colour in ends)
    places = _apart([place for place, _, _ in wanted], GAP)
    for place, (_, text, colour) in zip(places, wanted, strict=True):
        axes.annotate(
            text,
            (1.0, place),
            xytext=(10, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            va="center",
            fontsize=12.5,
            color=colour,
            fontweight="normal" if colour == GREY else "bold",
            annotation_clip=False,
        )


def _apart(places: Sequence[float], gap: float) -> list[float]:
    """Sorted places moved as little as can be (least squares) to be `gap` apart: isotonic regression by pooling."""
    pools: list[list[float]] = []  # of the places less their share of gaps, which only have to be in order
    for i, place in enumerate(places):
        pools.append([place - i * gap])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    level = [float(np.mean(pool)) for pool in pools for _ in pool]
    return [place + i * gap for i, place in enumerate(level)]


def _legend(axes: Axes, validation: bool) -> None:
    """Says once what a line and what a circle is; the colours are named at the curves."""
    axes.plot([], [], color=GREY, linewidth=1.1, label="training")
    if validation:
        axes.plot([], [], "o", color=GREY, markersize=6, label="validation")
    axes.legend(loc="upper right", frameon=False, fontsize=12, labelcolor=INK, ncols=2, borderaxespad=0.2)
