"""Plot of time and memory against sequence length, log-log."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from osdn_jax.compare.measure import AUTO, Result
from osdn_jax.compare.report import duration, size
from osdn_jax.plotting import COLOURS, GREY, INK, label_ends, new_canvas, png, style_axes, widest_label

_LEFT = 0.055  # edge of the first panel, as a fraction of the figure
_GAP = 0.062  # minimum distance between two labels, as a fraction of the axes' height
_MARKERS = "oDs^vPX"


def plot_results(results: Sequence[Result], path: str | Path, *, title: str, note: str = "") -> None:
    """Plot the median time and the temporary memory of every series as a PNG of 1500 × 675 pixels.

    A series is a rule, an implementation, a type and all sizes except the length; a label names what differs between
    them. Implementations have colours, rules (with everything else that differs) have markers.

    Args:
        results: what was measured; cases that were not served are left out.
        path: the PNG file.
        title: printed above the panels.
        note: printed below them, small: where and how it was measured.

    Raises:
        ValueError: nothing was measured.
    """
    measured = [r for r in results if r.median_seconds is not None]
    if not measured:
        raise ValueError("there is nothing to plot: no case was served")
    canvas = new_canvas(15, 6.75)
    figure = canvas.figure
    panels = [figure.add_axes((x, 0.15, 0.30, 0.66)) for x in (_LEFT, _LEFT + 0.5)]
    gradient = measured[0].gradient
    kind = "Forward and backward pass" if gradient else "Forward pass"
    _panel(panels[0], measured, lambda r: r.median_seconds, duration, f"{kind}: median time")
    _panel(panels[1], measured, lambda r: r.temporary_bytes, size, f"{kind}: temporary memory")
    for axes in panels:
        margin = (widest_label(axes, canvas) + 20) / figure.bbox.width
        place = axes.get_position()
        axes.set_position((place.x0, place.y0, 0.485 - _LEFT - margin, place.height))
    figure.text(_LEFT, 0.935, title, fontsize=18, fontweight="bold", color=INK, va="center")
    if note:
        figure.text(_LEFT, 0.025, note, fontsize=11, color=GREY, va="center")
    Path(path).write_bytes(png(canvas))


def _panel(
    axes: Axes,
    results: Sequence[Result],
    value: Callable[[Result], float | None],
    text: Callable[[float], str],
    title: str,
) -> None:
    implementations = list(dict.fromkeys(r.implementation for r in results))
    groups = list(dict.fromkeys(_group(r) for r in results))
    names = _distinct(groups)
    lengths = sorted({r.sizes["T"] for r in results})
    ends: list[tuple[float, str, str]] = []
    for series in dict.fromkeys((r.implementation, _group(r)) for r in results):
        points = [(r.sizes["T"], value(r)) for r in results if (r.implementation, _group(r)) == series]
        x, y = np.array(sorted((t, v) for t, v in points if v), dtype=np.float64).reshape(-1, 2).T
        if not len(x):
            continue
        colour = INK if series[0] == AUTO else COLOURS[implementations.index(series[0]) % len(COLOURS)]
        marker = _MARKERS[groups.index(series[1]) % len(_MARKERS)]
        axes.plot(x, y, marker=marker, color=colour, markersize=7, markeredgewidth=0.9, **_line(series[0]))
        label = "  ".join(part for part in (names[groups.index(series[1])], series[0], text(float(y[-1]))) if part)
        ends.append((float(y[-1]), label, colour))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    _style(axes, lengths, text, title)
    label_ends(axes, ends, gap=_GAP, fontsize=12)


def _line(implementation: str) -> dict[str, Any]:
    """Return the line style; that of "auto" leaves the implementation it chose visible underneath."""
    if implementation == AUTO:
        return {"linewidth": 1.2, "linestyle": (0, (5, 3)), "markerfacecolor": "none", "zorder": 3}
    return {"linewidth": 1.8, "markeredgecolor": "white"}


def _group(r: Result) -> tuple[str, ...]:
    """Return everything that identifies a series except the implementation."""
    return r.rule, r.dtype, *(f"{name}{size}" for name, size in r.sizes.items() if name != "T")


def _distinct(groups: Sequence[tuple[str, ...]]) -> list[str]:
    """Return, for each group, the fields that are not the same in all of them."""
    differ = [len(set(field)) > 1 for field in zip(*groups, strict=True)]
    return [" ".join(field for field, keep in zip(group, differ, strict=True) if keep) for group in groups]


def _style(axes: Axes, lengths: Sequence[int], text: Callable[[float], str], title: str) -> None:
    style_axes(axes, xlabel="Sequence length (tokens)")
    axes.xaxis.set_major_locator(FixedLocator(list(lengths)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda t, _: f"{t:,.0f}"))
    low, high = axes.get_ylim()
    narrow = math.log10(high / low) < 1.5
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0) if narrow else (1.0,), numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: text(y)))
    axes.set_title(title, fontsize=14, color=INK, loc="left", pad=14)
