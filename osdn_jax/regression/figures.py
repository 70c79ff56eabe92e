"""Figures of the bench's results, for those of the conditions and rules that were measured."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from osdn_jax.plotting import COLOURS, GREY, INK, label_ends, new_canvas, png, spread, style_axes
from osdn_jax.regression.bench import Results, Row
from osdn_jax.regression.conditions import Condition

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg

_SHOWN = {
    "osdn_paper": "OSDN, d₀ = 0",
    "osdn_ones": "OSDN, d₀ = 1",
    "pdn_2": "PDN, x = 2",
    "matched_2": "DeltaNet, PDN's step",
    "told_diagonal": "fixed d, told",
    "exact_gram": "exact Gram",
}
_SCALE = {
    "delta_net": "DeltaNet",
    "osdn_ones": "OSDN, d₀ = 1",
    "pdn_2": "PDN, x = 2",
    "write_feedback_0.1": "d ⊙ m (vector)",
    "scale_feedback_0.1": "s m (scalar)",
    "pdn_mean_step": "PDN / mean step",
    "told_diagonal": "fixed d, told",
}
_RECALL = {
    "delta_net": "DeltaNet",
    "osdn_paper": "OSDN, d₀ = 0",
    "matched_2": "DeltaNet, PDN's step",
    "pdn_2": "PDN, x = 2",
    "pdn_4": "PDN, x = 4",
    "told_diagonal": "fixed d, told",
}
_RATIO = {
    "delta_net": "DeltaNet",
    "osdn_paper": "OSDN, d₀ = 0",
    "osdn_ones_beta": "OSDN, d₀ = 1, with β",
    "apf_0": "APF toward 0",
    "pdn_2": "PDN, x = 2",
    "matched_2": "DeltaNet, PDN's step",
    "told_diagonal": "fixed d, told",
    "exact_gram": "exact Gram",
}
_LEAST_SHOWN = 1e-5
Line = Callable[[str], list[tuple[float, float, float, float]]]  # of a rule: (x, y, lowest, highest)


def figures(results: Results, note: str) -> Iterator[tuple[str, bytes]]:
    """Yield (name, PNG) of every figure whose conditions were measured.

    Args:
        results: what `run_bench` returns.
        note: printed below each figure, small: the machine and the command.
    """
    drawn = (
        ("condition-number", "stationary", _condition_number),
        ("ratio", "stationary", _ratio),
        ("scale", "scale", _scale),
        ("repeated", "repeated", _repeated),
    )
    for name, family, draw in drawn:
        canvas = draw(results)
        if canvas is not None:
            c = results.conditions(family)[0]
            size = f"K = V = {c.width}" + ("" if c.pairs else f", {c.length:,} tokens")
            errors = f"Mean of {results.seeds} seeds; bars: ± 1 standard error. {size}, float64. "
            canvas.figure.text(0.04, 0.025, errors + note, fontsize=9.5, color=GREY, va="center")
            yield f"regression-{name}.png", png(canvas)


def _panels(title: str, count: int, margin: float = 0.125) -> "tuple[FigureCanvasAgg, list[Axes]]":
    """Return a figure of panels side by side; `margin` is left free at the right of each for its labels."""
    canvas = new_canvas(15.5, 6.0)
    canvas.figure.text(0.04, 0.94, title, fontsize=16, fontweight="bold", color=INK, va="center")
    width = 0.95 / count
    return canvas, [canvas.figure.add_axes((0.055 + width * i, 0.17, width - margin, 0.62)) for i in range(count)]


def _lines(axes: "Axes", names: dict[str, str], line: Line, *, log: bool) -> None:
    ends = []
    for i, (name, label) in enumerate(names.items()):
        points = np.array([p for p in line(name) if np.isfinite(p[1])]).reshape(-1, 4)
        if len(points):
            x, y, low, high = points.T
            colour = COLOURS[i % len(COLOURS)]
            bars = np.abs(np.stack([y - low, high - y]))
            bars = np.where(np.isnan(bars), 0.0, bars)  # one seed has no spread
            axes.errorbar(x, y, bars, marker="o", markersize=5, linewidth=1.6, capsize=2, color=colour)
            ends.append((float(y[-1]), label, colour))
    if log:
        _logarithmic(axes)
    axes.margins(y=0.08)
    label_ends(axes, ends, gap=0.075, fontsize=10)


def _logarithmic(axes: "Axes") -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0) if high / low < 1e3 else (1.0,), numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")


def _style(axes: "Axes", title: str, xlabel: str, ylabel: str) -> None:
    style_axes(axes, xlabel=xlabel)
    axes.set_xlabel(xlabel, fontsize=11.5)
    axes.set_title(f"{title}\n{ylabel}", fontsize=11.5, color=INK, loc="left", pad=10)
    axes.tick_params(labelsize=10.5)


def _relative(results: Results, row: Row) -> tuple[float, float, float]:
    mean, error = results.relative(row)
    return mean, mean / error, mean * error


def _rows(results: Results, rule: str, keep: Callable[[Condition], bool]) -> list[Row]:
    return [row for row in results.rows if row.rule == rule and keep(row.condition)]


def _condition_number(results: Results) -> "FigureCanvasAgg | None":
    """Loss relative to DeltaNet's against the condition number: stationary, rotated, noisy."""
    kinds: Sequence[tuple[str, Callable[[Condition], bool]]] = (
        ("Axis-aligned spectrum", lambda c: c.family == "stationary"),
        ("Rotated spectrum", lambda c: c.family == "rotated" and not c.noise),
        ("Axis-aligned, noise 0.3", lambda c: c.family == "noisy"),
    )
    if any(len({row.condition for row in results.rows if keep(row.condition)}) < 2 for _, keep in kinds):
        return None
    canvas, panels = _panels("Unit keys: prediction error relative to DeltaNet's, each rule at its best β", len(kinds))
    for axes, (title, keep) in zip(panels, kinds, strict=True):

        def line(name: str, keep: Callable[[Condition], bool] = keep) -> list[tuple[float, float, float, float]]:
            rows = _rows(results, name, keep)
            return [(row.condition.condition_number, *_relative(results, row)) for row in rows]

        axes.set_xscale("log")
        axes.axhline(1.0, color=INK, linewidth=1.0)
        _style(axes, title, "condition number of the keys' covariance", "loss / DeltaNet's loss")
        _lines(axes, _SHOWN, line, log=True)
    return canvas


def _ratio(results: Results) -> "FigureCanvasAgg | None":
    """Residual ratio against loss at one beta: a lower ratio is no lower loss."""
    wanted = (("stationary", 0.5), ("noisy", 0.5), ("noisy", 1.0))
    found = {(c.family, c.condition_number): c for c in results.conditions()}
    if any((family, 100) not in found for family, _ in wanted):
        return None
    if any(beta not in row.betas for row in results.rows for _, beta in wanted):
        return None
    canvas, panels = _panels(
        "A lower residual ratio is no lower loss (condition number 100, one β for every rule)", 3, 0.05
    )
    for axes, (family, beta) in zip(panels, wanted, strict=True):
        axes.set_xscale("log")
        xlabel = f"residual ratio, geometric mean (drawn at {_LEAST_SHOWN:g} if lower)"
        _style(axes, f"{family.capitalize()}, β = {beta:g}", xlabel, "loss along the sequence")
        points: dict[tuple[float, float], str] = {}
        for i, (name, label) in enumerate(_RATIO.items()):
            for row in _rows(results, name, lambda c, wanted=found[(family, 100)]: c == wanted):  # type: ignore[misc]
                x, y = row.value("ratio", row.at(beta)).mean, row.value("loss", row.at(beta))
                colour = INK if name == "exact_gram" else COLOURS[i % len(COLOURS)]
                axes.errorbar(max(x, _LEAST_SHOWN), y.mean, y.error, marker="o", capsize=2, color=colour, markersize=6)
                point = (max(x, _LEAST_SHOWN), float(f"{y.mean:.3g}"))  # rules that are the same share a label
                points[point] = f"{points[point]}; {label}" if point in points else label
        low, high = axes.get_xlim()
        axes.set_xlim(low / 2, high * (high / low) ** 0.45)
        axes.margins(y=0.1)
        _logarithmic(axes)
        _label_points(axes, points)
    return canvas


def _label_points(axes: "Axes", points: dict[tuple[float, float], str]) -> None:
    """Write a label at the right of each point, moved up or down so that no two overlap."""
    to_axes = axes.transData + axes.transAxes.inverted()
    placed: list[tuple[float, float, str]] = []
    for point, label in points.items():
        x, y = to_axes.transform(point)
        placed.append((float(y), float(x), label))
    placed.sort()
    for (_, x, label), y in zip(placed, spread([height for height, _, _ in placed], 0.05), strict=True):
        axes.annotate(
            label, (x, y), xytext=(8, 0), xycoords="axes fraction", textcoords="offset points", fontsize=9, va="center"
        )


def _scale(results: Results) -> "FigureCanvasAgg | None":
    """Loss against the expected squared norm of the keys, for beta = 1 and the best beta."""
    found = [c for c in results.conditions("scale") if c.path == "constant" and not c.noise]
    kinds = [(100, False), (100, True), (1, False)]
    if any(len([c for c in found if c.condition_number == kappa]) < 2 for kappa, _ in kinds):
        return None
    canvas, panels = _panels("Keys without a fixed norm: prediction error (1: no memory; above 10: not drawn)", 3)
    for axes, (kappa, best) in zip(panels, kinds, strict=True):

        def line(name: str, kappa: float = kappa, best: bool = best) -> list[tuple[float, float, float, float]]:
            points = []
            for row in _rows(results, name, lambda c: c in found and c.condition_number == kappa):
                y, error = row.value("loss", row.best if best else row.at(1.0))
                if y < 10:
                    points.append(((row.condition.scale or (1.0, 1.0))[0], y, y - error, y + error))
            return points

        axes.set_xscale("log")
        beta = "each at its best β" if best else "β = 1"
        _style(
            axes, f"Condition number {kappa}, {beta}", "expected squared norm of the keys", "loss along the sequence"
        )
        _lines(axes, _SCALE, line, log=True)
    return canvas


def _repeated(results: Results) -> "FigureCanvasAgg | None":
    """Recall against the number of pairs, after one, two and four reads."""
    found = [c for c in results.conditions("repeated") if c.condition_number == 100 and not c.rotated]
    if len({c.pairs for c in found}) < 2 or {c.reads for c in found} != {1, 2, 4}:
        return None
    canvas, panels = _panels("Recall of pairs, condition number 100, K = 64, each rule at its best β", 3)
    for axes, reads in zip(panels, (1, 2, 4), strict=True):

        def line(name: str, reads: int = reads) -> list[tuple[float, float, float, float]]:
            points = []
            for row in _rows(results, name, lambda c: c in found and c.reads == reads):
                y, error = (100 * x for x in row.value("recall", row.best))
                points.append((float(row.condition.pairs), y, y - error, y + error))
            return points

        axes.set_xscale("log", base=2)
        axes.set_ylim(0, 104)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        _style(axes, f"{reads} read{'s' if reads > 1 else ''}", "pairs", "nearest value is right, %")
        _lines(axes, _RECALL, line, log=False)
    return canvas
