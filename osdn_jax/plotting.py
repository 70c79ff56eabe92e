"""Colours, style and label placement of the package's figures."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from osdn_jax._optional import check_installed, needs_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg

with needs_extra("train", "osdn_jax.plotting"):
    check_installed("matplotlib")  # which `new_canvas` imports: it takes 0.3 s

# The Okabe-Ito palette, which colour-blind readers can tell apart; its yellow is too pale for a line on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
INK, GREY, PALE = "#222222", "#767676", "#E4E4E4"


def new_canvas(width: float, height: float) -> "FigureCanvasAgg":
    """Return the canvas of an empty white figure, `width` by `height` in hundreds of pixels.

    It belongs to no window and no global state of pyplot; `canvas.figure` is the figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    return FigureCanvasAgg(Figure(figsize=(width, height), dpi=100, facecolor="white"))


def png(canvas: "FigureCanvasAgg") -> bytes:
    """Return the figure as a PNG file."""
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()


def style_axes(axes: "Axes", *, xlabel: str) -> None:
    """Apply the common style: a grid of horizontal lines, no frame but the axis below."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    axes.grid(axis="y", color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="both", which="both", colors=GREY, labelcolor=INK, labelsize=12, length=0, pad=7)
    axes.tick_params(axis="x", length=4)
    axes.set_xlabel(xlabel, fontsize=13, color=INK, labelpad=8)


def label_ends(axes: "Axes", ends: Sequence[tuple[float, str, str]], *, gap: float, fontsize: float = 12.5) -> None:
    """Write each curve's label in the right margin, at the height of the curve's end, so that no two overlap.

    Call it when the limits and scale of the vertical axis are final.

    Args:
        axes: the axes of the curves.
        ends: (last value, label, colour) of each curve; a label in GREY is not bold.
        gap: minimum distance between two labels, as a fraction of the axes' height.
        fontsize: of the labels, in points.
    """
    to_axes = axes.transData + axes.transAxes.inverted()
    x = axes.get_xlim()[1]  # any x that the scale can show
    wanted = sorted((float(to_axes.transform((x, value))[1]), label, colour) for value, label, colour in ends)
    places = spread([place for place, _, _ in wanted], gap)
    for place, (_, label, colour) in zip(places, wanted, strict=True):
        axes.annotate(
            label,
            (1.0, place),
            xytext=(10, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            va="center",
            fontsize=fontsize,
            color=colour,
            fontweight="normal" if colour == GREY else "bold",
            annotation_clip=False,
        )


def spread(places: Sequence[float], gap: float, low: float = 0.0, high: float = 1.0) -> list[float]:
    """Move sorted places as little as possible (least squares) so that they are `gap` apart and within the bounds.

    If they do not all fit between the bounds, they start at `low` and exceed `high`. Isotonic regression by pooling
    adjacent violators; clipping its result solves the bounded problem.

    Example:
        >>> spread([0.25, 0.25, 0.75], 0.5)
        [0.0, 0.5, 1.0]
    """
    pools: list[list[float]] = []  # places minus their share of the gaps, which only have to be in order
    for i, place in enumerate(places):
        pools.append([place - i * gap])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    most = max(low, high - gap * (len(places) - 1))
    level = [min(max(float(np.mean(pool)), low), most) for pool in pools for _ in pool]
    return [place + i * gap for i, place in enumerate(level)]


def widest_label(axes: "Axes", canvas: "FigureCanvasAgg") -> float:
    """Return the width in pixels of the widest text written into the axes; 0 without any."""
    return max((text.get_window_extent(canvas.get_renderer()).width for text in axes.texts), default=0.0)
