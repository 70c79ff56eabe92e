"""Figures of diagnostics: a panel for each layer, or all layers side by side."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from osdn_jax.diagnose.report import setting
from osdn_jax.evaluation.diagnostics import Diagnostics
from osdn_jax.evaluation.layer_diagnostics import BEST, WRITES, LayerDiagnostics
from osdn_jax.plotting import COLOURS, GREY, INK, new_canvas, png, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDE, _HIGH, _HEAD, _FOOT = 4.6, 3.75, 1.15, 0.4  # a panel, title and legend, the note, in hundreds of pixels
_LEFT, _ABOVE, _BELOW = 0.75, 0.45, 0.75  # margins of the axes in their panel
_COLUMNS = 4
_COLOURS = dict(zip(WRITES, ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000"), strict=True))
_QUARTERS = ("weakest quarter of the channels", "second", "third", "strongest")
_QUARTER_COLOURS = ("#9ECAE1", "#4292C6", "#2171B5", "#08306B")  # light to dark: by energy

Draw = Callable[["Axes", LayerDiagnostics], Any]  # returns text for the panel's title, or None


def loss_by_position(found: Diagnostics, about: Mapping[str, Any]) -> bytes:
    """Draw the loss before and after the write against the position, as a PNG."""

    def draw(axes: "Axes", layer: LayerDiagnostics) -> None:
        for name, writes in layer.writes.items():
            _curve(axes, found, writes.loss_before_by_position, name, band=name == "actual")
        for name in ("actual", "one"):
            _curve(axes, found, layer.writes[name].loss_after_by_position, name, linestyle=(0, (1, 1.2)))
        _log(axes)

    return _panels(
        found,
        about,
        draw,
        title="Loss |Sᵀk − v|² / 2 before the write (lines) and after it (dots)",
        xlabel="Position in its segment (tokens)",
        legend=_write_legend(found),
        note="Mean over tokens and heads; shaded: the range of the heads of the model's own writes.",
    )


def ratio_by_position(found: Diagnostics, about: Mapping[str, Any]) -> bytes:
    """Draw the residual ratio against the position, as a PNG."""

    def draw(axes: "Axes", layer: LayerDiagnostics) -> None:
        for name, writes in layer.writes.items():
            logs = np.log(writes.ratio_by_position)
            _curve(axes, found, logs, name, band=name == "actual", of_mean=np.exp)
        _log(axes)

    return _panels(
        found,
        about,
        draw,
        title="Residual ratio q = (1 − β⟨d, u⟩)² of each write",
        xlabel="Position in its segment (tokens)",
        legend=_write_legend(found),
        note="Geometric mean over tokens and heads; shaded: range of the heads. A lower ratio is no lower loss.",
    )


def factor_by_position(found: Diagnostics, about: Mapping[str, Any]) -> bytes:
    """Draw <d, u> against the position, as a PNG."""

    def draw(axes: "Axes", layer: LayerDiagnostics) -> None:
        for name, writes in layer.writes.items():
            _curve(axes, found, writes.factor_by_position, name, band=name == "actual")

    return _panels(
        found,
        about,
        draw,
        title="⟨d, u⟩ = ⟨w, k⟩, the step of a write for β = 1 (u = k²)",
        xlabel="Position in its segment (tokens)",
        legend=_write_legend(found),
        note="Mean over tokens and heads; shaded: the range of the heads of the model's own writes.",
    )


def multipliers_by_energy(found: Diagnostics, about: Mapping[str, Any]) -> bytes:
    """Draw d against the energy of its channel, as a PNG."""

    def draw(axes: "Axes", layer: LayerDiagnostics) -> str:
        d = layer.multipliers
        for head, (energy, mean) in enumerate(zip(d.channel_energy, d.channel_mean, strict=True)):
            axes.plot(energy, mean, "o", color=COLOURS[head % len(COLOURS)], markersize=4, alpha=0.7, markeredgewidth=0)
            if layer.best_multipliers is not None:
                best = layer.best_multipliers[head]
                axes.plot(energy, best, "o", color=COLOURS[head % len(COLOURS)], markersize=4, fillstyle="none")
        axes.set_xscale("log")
        _log(axes)
        return "slope of the dots " + ", ".join(f"{x:+.2f}" for x in d.slope[:4]) + (" …" if len(d.slope) > 4 else "")

    searched = found.layers[0].best_multipliers is not None
    circles = " Circles: the best fixed d in hindsight." if searched else ""
    return _panels(
        found,
        about,
        draw,
        title="d of each channel by the energy of its keys",
        xlabel="Mean of k² in the channel",
        legend=[(f"head {h + 1}", COLOURS[h % len(COLOURS)]) for h in range(min(about["heads"], len(COLOURS)))],
        note=f"Dots: mean over tokens.{circles} Newton's method on a diagonal Gram has slope −1.",
    )


def multipliers_by_position(found: Diagnostics, about: Mapping[str, Any]) -> bytes:
    """Draw d against the position, for the channels of each quarter by energy, as a PNG."""

    def draw(axes: "Axes", layer: LayerDiagnostics) -> None:
        for quarter, colour in enumerate(_QUARTER_COLOURS):
            values = layer.multipliers.by_position[:, quarter]
            if np.any(np.isfinite(values)):
                axes.plot(found.positions, np.mean(values, axis=0), color=colour, linewidth=1.6)

    return _panels(
        found,
        about,
        draw,
        title="d by position, for channels of weak and strong keys",
        xlabel="Position in its segment (tokens)",
        legend=list(zip(_QUARTERS, _QUARTER_COLOURS, strict=True)),
        note="Mean over tokens, heads and the channels of each quarter by mean k², head by head.",
    )


def key_spectrum(found: Diagnostics, about: Mapping[str, Any]) -> bytes:
    """Draw the spectrum of the keys' Gram matrix, as a PNG."""

    def draw(axes: "Axes", layer: LayerDiagnostics) -> str:
        gram = layer.gram
        ranks = np.arange(1, gram.eigenvalues.shape[1] + 1)
        for head, values in enumerate(gram.eigenvalues):
            axes.plot(ranks, values / np.sum(values), color=COLOURS[head % len(COLOURS)], linewidth=1.4)
        _log(axes)
        return f"alignment {np.mean(gram.alignment):.2f} (random {gram.random_alignment:.2f})"

    heads = range(min(about["key_heads"], len(COLOURS)))
    return _panels(
        found,
        about,
        draw,
        title="Spectrum of the keys' Gram matrix, as shares of its trace",
        xlabel="Rank of the eigenvalue",
        legend=[(f"key head {h + 1}", COLOURS[h % len(COLOURS)]) for h in heads],
        note="Alignment: eigenvalue-weighted mean of the eigenvectors' largest entry, mean over heads; 1 is the axes.",
    )


def by_layer(found: Diagnostics, about: Mapping[str, Any]) -> bytes:
    """Draw the residual ratio, the loss and the regret of each layer, as a PNG."""
    searched = found.layers[0].best_multipliers is not None
    panels: list[tuple[str, Callable[[LayerDiagnostics, str], Any], bool]] = [
        ("Residual ratio q, geometric mean", lambda layer, name: _logs(layer.writes[name].ratio), True),
        ("Loss before the write", lambda layer, name: _logs(layer.writes[name].loss_before), True),
    ]
    if searched:
        panels.append(("Loss above the best fixed d, %", _relative_regret, False))
    canvas, axes = _canvas(len(panels), "The delta rules layer by layer, with other write keys", about)
    numbers = np.arange(1, len(found.layers) + 1)
    names = list(found.layers[0].writes)
    for axis, (label, value, logarithmic) in zip(axes, panels, strict=True):
        for place, name in enumerate(names):
            heads = np.array([value(layer, name) for layer in found.layers])  # [L, H]
            middle, low, high = heads.mean(axis=1), heads.min(axis=1), heads.max(axis=1)
            if logarithmic:
                middle, low, high = np.exp(middle), np.exp(low), np.exp(high)
            x = numbers + 0.5 * (place - (len(names) - 1) / 2) / len(names)
            axis.vlines(x, low, high, color=_COLOURS[name], linewidth=1.2, alpha=0.6)
            axis.plot(x, middle, "o", color=_COLOURS[name], markersize=5)
        style_axes(axis, xlabel="Layer")
        axis.set_xticks(numbers if len(numbers) <= 12 else numbers[:: math.ceil(len(numbers) / 12)])
        axis.set_title(label, fontsize=13, color=INK, loc="left")
        if logarithmic:
            _log(axis)
    note = "Dots: mean over heads (of q and the loss: geometric); lines: from the lowest to the highest head."
    return _finish(canvas, _write_legend(found), note)


def _logs(x: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(x, 1e-30))


def _relative_regret(layer: LayerDiagnostics, name: str) -> Any:
    return 100 * (layer.writes[name].loss_before / layer.writes[BEST].loss_before - 1)


FIGURES: dict[str, Callable[[Diagnostics, Mapping[str, Any]], bytes]] = {
    "by_layer": by_layer,
    "loss_by_position": loss_by_position,
    "ratio_by_position": ratio_by_position,
    "factor_by_position": factor_by_position,
    "multipliers_by_energy": multipliers_by_energy,
    "multipliers_by_position": multipliers_by_position,
    "key_spectrum": key_spectrum,
}
"""{name of the file: function that draws it}."""


def _write_legend(found: Diagnostics) -> list[tuple[str, str]]:
    return [(WRITES[name], _COLOURS[name]) for name in found.layers[0].writes]


def _curve(
    axes: "Axes",
    found: Diagnostics,
    heads: np.ndarray,
    name: str,
    *,
    band: bool = False,
    of_mean: Callable[[np.ndarray], np.ndarray] = lambda x: x,
    **style: Any,
) -> None:
    """Draw the mean of heads [H, bins], and their range if `band` is True."""
    colour = _COLOURS[name]
    width = 2.0 if name == "actual" else 1.3
    axes.plot(found.positions, of_mean(np.mean(heads, axis=0)), color=colour, linewidth=width, **style)
    if band:
        low, high = of_mean(np.min(heads, axis=0)), of_mean(np.max(heads, axis=0))
        axes.fill_between(found.positions, low, high, color=colour, alpha=0.15, linewidth=0)


def _log(axes: "Axes") -> None:
    """Make the vertical axis logarithmic, with numbers in place of powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log", nonpositive="mask")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if high < 50 * low else (1,), numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _panels(
    found: Diagnostics,
    about: Mapping[str, Any],
    draw: Draw,
    *,
    title: str,
    xlabel: str,
    legend: Sequence[tuple[str, str]],
    note: str,
) -> bytes:
    """Draw a panel for each layer."""
    canvas, axes = _canvas(len(found.layers), title, about)
    for number, (axis, layer) in enumerate(zip(axes, found.layers, strict=True), 1):
        more = draw(axis, layer)
        style_axes(axis, xlabel=xlabel)
        axis.set_title(f"Layer {number}" + (f": {more}" if more else ""), fontsize=12, color=INK, loc="left")
    return _finish(canvas, legend, note)


def _canvas(count: int, title: str, about: Mapping[str, Any]) -> tuple[Any, list["Axes"]]:
    """Return the canvas of a figure with this title, and its panels."""
    columns = min(count, _COLUMNS)
    lines = math.ceil(count / columns)
    width, height = max(columns * _WIDE, 9.2), lines * _HIGH + _HEAD + _FOOT
    canvas = new_canvas(width, height)
    figure = canvas.figure
    figure.text(0.2 / width, 1 - 0.3 / height, title, fontsize=15, fontweight="bold", color=INK, va="center")
    figure.text(0.2 / width, 1 - 0.62 / height, setting(about), fontsize=10, color=GREY, va="center")
    axes = []
    for place in range(count):
        line, column = divmod(place, columns)
        left, bottom = column * width / columns + _LEFT, height - _HEAD - (line + 1) * _HIGH + _BELOW
        size = (width / columns - _LEFT - 0.2, _HIGH - _ABOVE - _BELOW)
        axes.append(figure.add_axes((left / width, bottom / height, size[0] / width, size[1] / height)))
    return canvas, axes


def _finish(canvas: Any, legend: Sequence[tuple[str, str]], note: str) -> bytes:
    """Add the legend and the note, and return the PNG."""
    from matplotlib.lines import Line2D

    figure = canvas.figure
    width, height = figure.get_size_inches()
    handles = [Line2D([], [], color=colour, linewidth=3, label=label) for label, colour in legend]
    figure.legend(
        handles=handles,
        loc="center left",
        bbox_to_anchor=(0.1 / width, 1 - 0.97 / height),
        ncols=len(handles),
        frameon=False,
        fontsize=10.5,
        labelcolor=INK,
        handlelength=1.2,
        columnspacing=1.2,
    )
    figure.text(0.2 / width, 0.25 / height, note, fontsize=10, color=GREY, va="center")
    return png(canvas)
