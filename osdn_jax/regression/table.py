"""The results as Markdown tables and as a record for JSON."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from osdn_jax.regression.bench import Results, Row, Value
from osdn_jax.regression.conditions import FAMILIES, Condition

_WIDEST = 8  # columns of a table; more conditions are split by their spectrum and noise
_DIVERGES = "diverges"
Cell = Callable[[Row], str]


def markdown(results: Results, about: Mapping[str, Any] | None = None) -> Iterator[str]:
    """Yield the lines of a page: for every family of conditions, a table for each score.

    Args:
        results: what `run_bench` returns.
        about: where and how it was measured (`osdn_jax.compare.environment`), for the head of the page.
    """
    yield from ("# Online regression", "")
    if about is not None:
        yield f"`{about['command']}`, {about['date']}, {about['cpu']} ({about['cpu_cores']} cores),"
        yield f"{about['cpu_seconds']:.0f} CPU seconds, jax {about['jax']}, jaxlib {about['jaxlib']},"
        yield f"NumPy {about['numpy']}, Python {about['python']}, float64."
    yield f"Seeds 0 to {results.seeds - 1}; ± is the standard error over seeds, × the factor of a geometric mean's."
    yield "What the columns and rules mean: [docs/regression.md](../../docs/regression.md)."
    yield from ("", "| rule | |", "| --- | --- |")
    yield from (f"| `{name}` | {rule.about or 'passed to the bench'} |" for name, rule in results.rules.items())
    for family in dict.fromkeys(c.family for c in results.conditions()):
        yield from ("", f"## {family.capitalize()}", "")
        if family in FAMILIES:
            yield (FAMILIES[family].__doc__ or "").strip()
        for heading, cell in _tables(results, results.conditions(family)):
            for columns in _split(results.conditions(family)):
                yield from ("", f"**{heading}**", "", *table(results, columns, cell))


def table(results: Results, columns: Iterable[Condition], cell: Cell) -> Iterator[str]:
    """Yield the lines of one Markdown table: a row for each rule, a column for each condition."""
    columns = list(columns)
    rows = {(row.rule, row.condition): row for row in results.rows}
    yield "| rule | " + " | ".join(c.name for c in columns) + " |"
    yield "| --- " + "| ---: " * len(columns) + "|"
    for name in results.rules:
        found = [rows.get((name, c)) for c in columns]
        if any(found):
            yield f"| `{name}` | " + " | ".join("" if row is None else cell(row) for row in found) + " |"


def best_loss(row: Row) -> str:
    """Return the cell of the main table: the loss, or with pairs the recall, at the best beta."""
    i = row.best
    if row.condition.pairs:
        return f"{_percent(row.value('recall', i))} ({row.betas[i]:g})"
    value = row.value("loss", i)
    return f"{plus_minus(value)} ({row.betas[i]:g})" if math.isfinite(value.mean) else _DIVERGES


def _tables(results: Results, conditions: list[Condition]) -> Iterator[tuple[str, Cell]]:
    def one(row: Row) -> int:
        return row.at(1.0)

    if conditions[0].pairs:
        yield "Recall in %, at the beta of the highest (beta in brackets)", best_loss
        yield "Recall in %, beta = 1", lambda row: _percent(row.value("recall", one(row)))
        yield "Squared error of the recalled values, at the best beta", lambda row: factor(row.value("end", row.best))
        yield "Residual ratio, at the best beta", lambda row: factor(row.value("ratio", row.best))
        return
    yield "Loss along the sequence, at the best beta (in brackets)", best_loss
    yield "Loss divided by DeltaNet's, each at its best beta", lambda row: factor(results.relative(row))
    yield "Loss at the end, at the same beta", lambda row: factor(row.value("end", row.best))
    yield "Lowest loss at the end (its beta in brackets)", _lowest_end
    yield (
        "Residual ratio, at the beta of the lowest loss along the sequence",
        lambda row: factor(row.value("ratio", row.best)),
    )
    yield "Loss along the sequence, beta = 1", lambda row: plus_minus(row.value("loss", one(row)))
    yield "Loss at the end, beta = 1", lambda row: factor(row.value("end", one(row)))
    yield "Residual ratio, beta = 1", lambda row: factor(row.value("ratio", one(row)))


def _lowest_end(row: Row) -> str:
    i = row.lowest_end
    return f"{factor(row.value('end', i))} ({row.betas[i]:g})"


def _split(conditions: list[Condition]) -> list[list[Condition]]:
    if len(conditions) <= _WIDEST:
        return [conditions]
    groups: dict[Any, list[Condition]] = {}
    for c in conditions:
        groups.setdefault((c.condition_number, c.rotated, c.noise), []).append(c)
    return list(groups.values())


def plus_minus(value: Value) -> str:
    """Return "0.0316 ± 0.0004"."""
    if not math.isfinite(value.mean):
        return _DIVERGES
    return f"{value.mean:.3g}" + ("" if math.isnan(value.error) else f" ± {value.error:.1g}")


def factor(value: Value) -> str:
    """Return "0.000378 ×1.04"; the factor is left out where the mean is below every float64 rounding error."""
    if math.isnan(value.mean):
        return ""
    if not math.isfinite(value.mean):
        return _DIVERGES
    if value.mean < 1e-25:
        return "0"
    return f"{value.mean:.3g}" + ("" if math.isnan(value.error) else f" ×{value.error:.3g}")


def _percent(value: Value) -> str:
    return f"{100 * value.mean:.1f}" + ("" if math.isnan(value.error) else f" ± {100 * value.error:.1f}")


def record(results: Results, about: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything that JSON can hold: conditions, rules, and for each row the mean scores at every beta.

    A score that diverges is null. `best` and `one` have the mean and the standard error at the best beta and at
    beta = 1, of `end`, `ratio` and `relative` the geometric mean and the factor; `lowest_end` is a beta and the loss
    there.
    """
    conditions = results.conditions()
    betas = results.rows[0].betas if results.rows else ()
    rows = [_row_record(results, row, conditions.index(row.condition)) for row in results.rows]
    return {
        "environment": dict(about),
        "seeds": results.seeds,
        "betas": list(betas),
        "rules": {name: rule.about for name, rule in results.rules.items()},
        "conditions": [{"name": c.name, **dataclasses.asdict(c)} for c in conditions],
        "rows": rows,
    }


def _row_record(results: Results, row: Row, condition: int) -> dict[str, Any]:
    names = ("loss", "end", "ratio", "recall") if row.condition.pairs else ("loss", "end", "ratio")
    curves = ("recall", "ratio") if row.condition.pairs else ("loss", "ratio")

    def at(index: int, beta: float | None) -> dict[str, Any]:
        found: dict[str, Any] = {"beta": row.betas[index]}
        found |= {name: [_short(x) for x in row.value(name, index)] for name in names}
        found["relative"] = [_short(x) for x in results.relative(row, beta=beta)]
        return found

    return {
        "condition": condition,
        "rule": row.rule,
        **{name: [_short(row.value(name, i).mean) for i in range(len(row.betas))] for name in curves},
        "best": at(row.best, None),
        "one": at(row.at(1.0), 1.0),
        "lowest_end": [row.betas[row.lowest_end], _short(row.value("end", row.lowest_end).mean)],
    }


def _short(x: float) -> float | None:
    return float(f"{x:.3g}") if math.isfinite(x) else None
