"""Plot of perplexity by position."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from osdn_jax._files import write_atomically
from osdn_jax.evaluation.positions import Bucket
from osdn_jax.plotting import COLOURS, GREY, INK, label_ends, new_canvas, png, style_axes, widest_label


def plot_positions(
    models: Mapping[str, Sequence[Bucket]],
    path: str | os.PathLike[str],
    *,
    title: str,
    note: str = "",
    trained: int | None = None,
) -> None:
    """Plot perplexity against position as a PNG of 1200 × 750 pixels, with bands of one standard error.

    Args:
        models: {label: what `perplexity_by_position` returned}.
        path: the PNG file.
        title: printed above the plot.
        note: printed below it, small: text, number of windows.
        trained: length of the training windows, marked by a vertical line. Default: no line.

    Raises:
        ValueError: there is no model, or one without buckets.
    """
    if not models or not all(models.values()):
        raise ValueError("models: got none, or one without buckets")
    canvas = new_canvas(12, 7.5)
    figure = canvas.figure
    axes = figure.add_axes((0.06, 0.15, 0.8, 0.7))
    style_axes(axes, xlabel="tokens before, at the middle of the bucket")
    axes.set_title("perplexity", fontsize=13, color=INK, loc="left", pad=12)
    ends: list[tuple[float, str, str]] = []
    last = 0
    for number, (label, buckets) in enumerate(models.items()):
        colour = COLOURS[number % len(COLOURS)]
        middle = np.array([(x.start + x.stop) / 2 for x in buckets])
        nats, error = (np.array([getattr(x, name) for x in buckets]) for name in ("nats", "error"))
        axes.plot(middle, np.exp(nats), "-o", color=colour, markersize=6, linewidth=1.6)
        if np.isfinite(error).all():
            axes.fill_between(middle, np.exp(nats - error), np.exp(nats + error), color=colour, alpha=0.18, linewidth=0)
        ends.append((float(np.exp(nats[-1])), f"{label}  {np.exp(nats[-1]):.4g}", colour))
        last = max(last, buckets[-1].stop)
    axes.set_xlim(0, last)
    if trained is not None and trained < last:
        axes.axvline(trained, color=GREY, linewidth=1.0, linestyle=(0, (5, 4)), zorder=1)
        axes.annotate(
            "training length",
            (trained, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(4, -14),
            textcoords="offset points",
            color=GREY,
            fontsize=11,
        )
    label_ends(axes, ends, gap=0.04)
    figure.text(0.06, 0.94, title, fontsize=18, fontweight="bold", color=INK, va="center")
    if note:
        figure.text(0.06, 0.03, note, fontsize=11, color=GREY, va="center")
    place = axes.get_position()
    margin = (widest_label(axes, canvas) + 24) / figure.bbox.width
    axes.set_position((0.06, place.y0, 1 - 0.06 - margin, place.height))
    write_atomically(Path(path), png(canvas))
