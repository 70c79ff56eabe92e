"""The automatic choice between scan and chunks, over a grid of shapes."""

import dataclasses
import gc
from collections.abc import Sequence

import jax
import numpy as np

from benchmarks.ops.bench import Bench, Program, compiled, passes
from osdn_jax.compare import Contender, Shape, ratio, take_turns
from osdn_jax.compare.report import duration

DECAYS = {"none": "delta_net", "scalar": "gated_delta_net", "channel": "kda"}
MOST = 1.15  # None / the better of scan and chunks
_SPLIT = {1: (1, 1), 4: (1, 4), 16: (4, 4), 64: (8, 8), 128: (16, 8)}  # B H: B and H
_SCAN_BYTES = 2e9  # of temporary memory; a larger gradient by the scan is not measured
_SCAN_BEHIND = 2.0  # a scan that took this many times chunks' time is not measured for longer sequences
_SECONDS = 4.0  # of one program's rounds


def forward(b: Bench) -> None:
    """None against scan and chunks: the source of `selection.forward_by_scan`

    A cell is the time of the scan, that of chunks, and the time of None relative to the better of both. "=" marks
    the one that None compiles to; a third program that None may compile to is measured.
    """
    grid = {"scalar": ((32, 64, 128), tuple(_SPLIT), (64, 256, 1024, 4096))}  # D, B H and T
    fewer = ((64, 128), (4, 64), (256, 4096))
    if b.quick:
        grid, fewer = {}, ((8,), (1,), (16,))
    for decay, rule in DECAYS.items():
        sizes, products, lengths = grid.get(decay, fewer)
        for gradient in (False, True):
            cells = {
                (size, product): _row(b, rule, size, product, lengths, gradient)
                for size in sizes
                for product in products
            }
            b.tables.append(_table(f"Decay {decay}, {passes(gradient)}", cells))
            worst = max(cell.over for row in cells.values() for cell in row)
            what = f"decay {decay}, {passes(gradient)}: largest time of None / better of scan and chunks"
            b.figure(what, worst, at_most=MOST)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One shape: what is shown, and the time of None relative to the better of scan and chunks."""

    tokens: int
    text: str
    over: float


def _row(b: Bench, rule: str, size: int, product: int, lengths: Sequence[int], gradient: bool) -> list[Cell]:
    """Measure one size and number of heads at increasing lengths."""
    row, behind = [], 0.0
    for tokens in lengths:
        batch, heads = _SPLIT[product]
        shape = Shape(batch, tokens, heads, heads, size, size)
        kept = 4.0 * product * tokens * size * size  # bytes of the states that the gradient of the scan keeps
        scan = behind < _SCAN_BEHIND and not (gradient and kept > _SCAN_BYTES)
        names = ("scan", "chunk") if scan else ("chunk",)
        made, chosen = _made([Program(rule, shape, name, gradient) for name in (*names, "auto")])
        running = list(made.values())
        b.time(running, _more_rounds(b, running), [Program(rule, shape, name, gradient) for name in made])
        seconds = {name: c.seconds for name, c in made.items()}
        best = min(names, key=lambda name: float(np.median(seconds[name])))
        row.append(Cell(tokens, *_shown(seconds, chosen, best)))
        if scan and tokens >= 256:
            behind = ratio(seconds["scan"], seconds["chunk"])
        gc.collect()
    return row


def _made(programs: Sequence[Program]) -> tuple[dict[str, Contender], str]:
    """Compile scan, chunks and None; return those that differ, by name, and the name of what None compiles to."""
    made, texts = {}, {}
    for p in programs:
        run, arguments = p.function()
        text = jax.jit(run).lower(*arguments).as_text()
        same = [name for name, other in texts.items() if other == text]
        if same:
            return made, same[0]
        made[p.implementation], texts[p.implementation] = compiled(p, fresh=False), text
    return made, programs[-1].implementation


def _more_rounds(b: Bench, running: Sequence[Contender]) -> int:
    """Time one round; return the number of further ones, at least one, that fit into a few seconds."""
    take_turns(running, 1)
    longest = max(c.seconds[0] for c in running)
    return int(np.clip(_SECONDS / (2 * longest), 1, b.repeats - 1))


def _shown(seconds: dict[str, list[float]], chosen: str, best: str) -> tuple[str, float]:
    """Return the text of a cell, and the time of None relative to the best."""
    over = ratio(seconds[chosen], seconds[best])
    times = {name: duration(float(np.median(s))) for name, s in seconds.items()}
    marked = [("= " if name == chosen else "") + times[name] if name in times else "–" for name in ("scan", "chunk")]
    marked += [f"= {times['auto']}"] if chosen == "auto" else []
    text = f"{', '.join(marked)}: {over:.2f}"
    return (f"**{text}**" if over > MOST else text), over


def _table(title: str, cells: dict[tuple[int, int], list[Cell]]) -> list[str]:
    lengths = [cell.tokens for cell in next(iter(cells.values()))]
    lines = [f"| {title}: D, B·H | {' | '.join(f'T = {tokens:,}' for tokens in lengths)} |"]
    lines.append("| --- " + "| ---: " * len(lengths) + "|")
    for (size, product), row in cells.items():
        lines.append(f"| {size}, {product} | {' | '.join(cell.text for cell in row)} |")
    return lines
