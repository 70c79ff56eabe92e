"""Diagnostics as tables in Markdown, and as JSON."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from osdn_jax.evaluation.diagnostics import Diagnostics
from osdn_jax.evaluation.layer_diagnostics import WRITES, LayerDiagnostics

_COLUMNS = (
    "write key",
    "q (geometric)",
    "loss before",
    "loss after",
    "after / before",
    "⟨d, u⟩",
    "β⟨d, u⟩",
    "outside [0, 2]",
    "d on a bound",
    "regret",
    "regret, %",
)
_DIGITS = 6  # significant digits in the JSON file


def markdown(found: Diagnostics, about: Mapping[str, Any]) -> str:
    """Return a page with a table for the whole model and one for each layer.

    Args:
        found: the diagnostics.
        about: what was looked at, as in `RunDiagnostics`.
    """
    searched = found.layers[0].best_multipliers is not None
    lines = [f"# Diagnostics of {about['run']}", "", setting(about) + "."]
    lines += [
        "",
        "Means over valid tokens and heads. Loss: |Sᵀk − v|² / 2 of each token, before and after its write. q: "
        "geometric mean of (1 − β⟨d, u⟩)². Outside: share of tokens whose β⟨d, u⟩ is outside of [0, 2]. Every row but "
        "the first repeats the recurrence on the same inputs with another write key.",
    ]
    if searched:
        lines += [
            "",
            "Regret: mean loss before the write above that of the best fixed d in hindsight, found for each head by "
            f"{about['hindsight_steps']} steps of Adam; the percentage is of that loss. The best fixed c is d = c, one "
            "number per head: damping alone.",
        ]
    lines += ["", "## All layers", "", *table(found.layers)]
    for number, layer in enumerate(found.layers, 1):
        lines += ["", f"## Layer {number}", "", *table([layer]), "", *_facts(layer)]
    return "\n".join(lines) + "\n"


def setting(about: Mapping[str, Any]) -> str:
    """Return what was looked at, in one line without a full stop."""
    return (
        f"{about['rule']}, step {about['step']:,}, seed {about['seed']}; {about['windows']} held-out windows of "
        f"{about['length']:,} tokens ({about['valid_tokens']:,} in all), {about['layers']} layers of {about['heads']} "
        f"heads, K = {about['key_dim']}, V = {about['value_dim']}"
    )


def table(layers: Sequence[LayerDiagnostics]) -> list[str]:
    """Return the lines of the table of some layers, a row for each kind of write key.

    Args:
        layers: at least one; means are over all of their heads.
    """
    lines = [" | ".join(("", *_COLUMNS, "")).strip(), "| --- |" + " ---: |" * (len(_COLUMNS) - 1)]
    for name, row in rows(layers).items():
        values = [
            WRITES[name],
            *(_number(row[key]) for key in ("ratio", "loss_before", "loss_after", "loss_ratio", "factor", "step")),
            _percent(row["outside"]),
            _percent(row["on_bound"]),
            _number(row["regret"]),
            _percent(row["relative_regret"]),
        ]
        lines.append(" | ".join(("", *values, "")).strip())
    return lines


def rows(layers: Sequence[LayerDiagnostics]) -> dict[str, dict[str, float | None]]:
    """Return {name of the write keys: {quantity: its mean over layers and heads}}.

    The mean of "ratio" is geometric; "loss_ratio" is the ratio of the mean losses, and "relative_regret" that of the
    mean regret and the mean loss with the best fixed d. None: not defined, or not computed.
    """
    found: dict[str, dict[str, float | None]] = {}
    for name in layers[0].writes:
        writes = [layer.writes[name] for layer in layers]
        mean = {
            key: float(np.mean([getattr(x, key) for x in writes]))
            for key in ("mean_ratio", "loss_before", "loss_after", "factor", "step", "outside")
        }
        ratios = np.concatenate([x.ratio for x in writes])
        regrets = [layer.regret(name) for layer in layers]
        regret = None if regrets[0] is None else float(np.mean([x for x in regrets if x is not None]))
        best = None if regret is None else mean["loss_before"] - regret
        on_bound = [layer.multipliers.share_on_bound for layer in layers] if name == "actual" else [None]
        found[name] = {
            "ratio": float(np.exp(np.mean(np.log(ratios)))),
            **mean,
            "loss_ratio": mean["loss_after"] / mean["loss_before"] if mean["loss_before"] else None,
            "on_bound": None if on_bound[0] is None else float(np.mean([x for x in on_bound if x is not None])),
            "regret": regret,
            "relative_regret": regret / best if regret is not None and best else None,
        }
    return found


def _facts(layer: LayerDiagnostics) -> list[str]:
    """Return lines about a layer's d and keys."""
    d, gram = layer.multipliers, layer.gram
    low, mean, high = np.min(d.minimum), np.mean(d.mean), np.max(d.maximum)
    lines = [
        f"- d from {_number(low)} to {_number(high)}, mean {_number(mean)}; slope of log d on log channel energy by "
        f"head: {_numbers(d.slope)} (−1: Newton's method on a diagonal Gram).",
        f"- Σ maxᵢ |log d(t+1)ᵢ − log d(t)ᵢ| over a window, mean by head: {_numbers(np.mean(d.path, axis=0))}; largest "
        f"{_number(np.max(d.path))}.",
    ]
    if np.max(d.undefined) > 0:
        shares = ", ".join(_percent(x) for x in d.undefined)
        lines.append(f"- In {shares} of the steps, by head, some d is not positive, which that sum leaves out.")
    lines += [
        f"- Gram of the keys, by key head: alignment with the axes {_numbers(gram.alignment)}, of its inverse "
        f"{_numbers(gram.inverse_alignment)} (1: the axes; {_number(gram.random_alignment)}: random directions; least "
        f"possible {_number(layer.gram.eigenvalues.shape[1] ** -0.5)}); condition number {_numbers(gram.condition)}, "
        f"after scaling by channel energy {_numbers(gram.scaled_condition)}.",
        f"- Identity e′ = (1 − β⟨d, u⟩) e: largest error {layer.identity_error:.1e} of the largest residual.",
    ]
    return lines


def record(found: Diagnostics, about: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything in a form for JSON: lists in place of arrays, null for what is not defined or infinite.

    Args:
        found: the diagnostics.
        about: what was looked at, as in `RunDiagnostics`.
    """
    layers = [
        {
            "writes": {name: plain(x._asdict()) for name, x in layer.writes.items()},
            "regret": {name: plain(layer.regret(name)) for name in layer.writes},
            "multipliers": plain(layer.multipliers._asdict()),
            "gram": plain(layer.gram._asdict()),
            "best_multipliers": plain(layer.best_multipliers),
            "identity_error": plain(layer.identity_error),
        }
        for layer in found.layers
    ]
    return {
        "about": dict(about),
        "write_keys": {name: WRITES[name] for name in found.layers[0].writes},
        "position_of_bin": found.positions.tolist(),
        "all_layers": plain(rows(found.layers)),
        "layers": layers,
    }


def plain(value: Any) -> Any:
    """Return a value in a form for JSON, numbers to 6 significant digits and null for those that are not finite."""
    if isinstance(value, dict):
        return {name: plain(x) for name, x in value.items()}
    if isinstance(value, (np.ndarray, list, tuple)):
        return [plain(x) for x in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    return value


def _number(x: float | None) -> str:
    return "–" if x is None or math.isnan(x) else f"{x:.3g}".replace("-", "−") if abs(x) < 1e4 else f"{x:.2e}"


def _numbers(x: np.ndarray) -> str:
    return ", ".join(_number(float(y)) for y in x)


def _percent(x: float | None) -> str:
    return "–" if x is None else f"{_number(100 * x)} %"
