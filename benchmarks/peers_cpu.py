"""Compare the operators with other libraries' on a CPU:  python -m benchmarks.peers_cpu --maxtext maxtext

KDA against tokamax's, Gated DeltaNet against MaxText's, and DeltaNet's arithmetic rate against that of batched
products; float32, forward alone and with the gradients of all arguments. The two programs of a ratio run in turn in
one process. It writes benchmarks/results/peers-cpu.json and .md and prints the latter. A library that is not here is
left out, with a line that says how to get it: tokamax goes into a separate environment. The exit status is 1 if
outputs or gradients differ by more than 1e-5. It takes about 5 minutes on two CPU cores.
"""

import dataclasses
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

# MaxText solves triangular systems with LAPACK. On two cores OpenBLAS's threads and XLA's wait for each other: its
# forward pass took 5 ms with one thread in OpenBLAS, and up to 500 ms with two. The library reads this when it loads.
if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import numpy as np

from benchmarks.ops.bench import Bench, memory, passes
from benchmarks.ops.record import machine, programs, ratios, write
from benchmarks.peers import maxtext_gdn, rate, tokamax_kda
from benchmarks.peers.sides import Arrays, NoPeer, Side, compiled, differences, results
from osdn_jax import command
from osdn_jax.compare import Shape, draw_cotangents, environment, parse_shapes, ratio
from osdn_jax.compare.inputs import SHAPE_SYNTAX
from osdn_jax.compare.machine import load

RESULTS = Path(__file__).parent / "results"
SHAPES = "B8T256H2D64,B1T4096H4D128,B16T512H8D64,B1T2048H4D64"
TOLERANCE = 1e-5  # of ‖ours − theirs‖ / ‖theirs‖
LENGTHS = 64  # tokamax takes multiples of this only
# The most that ours may take of another library's time, for some shapes, forward and forward + backward.
_TARGETS = {"gated_delta_net": (SHAPES.split(",")[:3], 0.5, 0.5), "kda": (SHAPES.split(","), None, 0.35)}
_RATE = 0.5  # the least of the products' rate that DeltaNet reaches, forward + backward


@dataclasses.dataclass(frozen=True)
class Pair:
    """A rule by us and by another library, and its arguments for a shape."""

    ours: Side
    theirs: Side
    arrays: Callable[[Shape], Arrays]


def pairs(maxtext: Path | None) -> tuple[dict[str, Pair], list[str]]:
    """Return, by rule, the pairs of which both sides are here, and a line for each library that is not."""
    loaders: dict[str, tuple[Side, Callable[[], Side], Callable[[Shape], Arrays]]] = {
        "gated_delta_net": (maxtext_gdn.ours(), lambda: maxtext_gdn.maxtext(maxtext), maxtext_gdn.arrays),
        "kda": (tokamax_kda.ours(), tokamax_kda.tokamax, tokamax_kda.arrays),
    }
    found, missing = {}, []
    for rule, (ours, theirs, arrays) in loaders.items():
        try:
            found[rule] = Pair(ours, theirs(), arrays)
        except NoPeer as reason:
            missing.append(str(reason))
    return found, missing


def measure(b: Bench, shape: Shape, found: Mapping[str, Pair]) -> dict[str, dict[str, float]]:
    """Measure one shape; return the differences by rule and result."""
    drawn = {rule: pair.arrays(shape) for rule, pair in found.items()}
    differ = {}
    for gradient in (False, True):
        pulled = _cotangents(shape) if gradient else None
        products, delta_net = rate.products(), compiled(rate.DELTA_NET, "delta_net", rate.arrays(shape), pulled)
        both = {
            rule: [compiled(side, rule, drawn[rule], pulled) for side in (pair.ours, pair.theirs)]
            for rule, pair in found.items()
        }
        for running in ([products, delta_net], *both.values()):
            for c in running:
                c.name = f"{shape}: {c.name}"
            b.time(running)
        for rule, (ours, theirs) in both.items():
            pair, (where, *most) = found[rule], _TARGETS[rule]
            what = f"{shape}, {passes(gradient)}: {{}} of {rule}, ours / {pair.theirs.name}"
            target = most[gradient] if str(shape) in where else None
            b.figure(what.format("time"), ratio(ours.seconds, theirs.seconds), at_most=target)
            b.figure(what.format("temporary memory"), memory(ours, theirs))
            if gradient:
                differ[rule] = differences(results(pair.ours, ours), results(pair.theirs, theirs))
        # Both rates are of one round each, so that their ratio is.
        speeds = rate.operations(shape, gradient) / np.asarray(delta_net.seconds)
        reached = rate.PRODUCTS / np.asarray(products.seconds)
        words = f"{np.median(speeds) / 1e9:.0f} and {np.median(reached) / 1e9:.0f} GFLOP/s"
        what = f"{shape}, {passes(gradient)}: rate of delta_net / products, {words}"
        b.figure(what, ratio(speeds, reached), at_least=_RATE if gradient else None)
    return differ


def _cotangents(shape: Shape) -> Arrays:
    batch, tokens, heads, size = shape.batch, shape.length, shape.heads, shape.value_dim
    o = jax.ShapeDtypeStruct((batch, tokens, heads, size), "float32")
    state = jax.ShapeDtypeStruct((batch, heads, shape.key_dim, size), "float32")
    return draw_cotangents({"o": o, "state": state}, "float32", seed=0)


def markdown(record: Mapping) -> Iterator[str]:
    """Yield the lines of the page."""
    yield "# The operators and other libraries' on a CPU"
    yield ""
    yield "Float32, by `python -m benchmarks.peers_cpu`: forward, and forward + backward with the gradients of all"
    yield "arguments. The two programs of a ratio run in turn in one process; a ratio is the median over rounds of the"
    yield "ratio within a round. Each library gets the arguments in its layout; transposing them is not timed."
    yield "LAPACK, which MaxText uses, has one thread: more of them wait for XLA's threads and it becomes slower."
    yield f"The rate of DeltaNet counts {rate.FORMULA} operations per token and head, C = 64, and with the"
    yield "gradient 3.5 times that; the products are 256 of [64, 128] · [128, 128]."
    yield ""
    yield from machine(record["environment"])
    for line in record["missing"]:
        yield from ("", line)
    yield from ("", *ratios(record["figures"]))
    if record["differences"]:
        names = sorted(
            {name for row in record["differences"] for name in row["errors"]}, key=lambda n: (n[:2] == "d_", n)
        )
        yield from ("", f"Differences, ‖ours − theirs‖ / ‖theirs‖; the tolerance is {TOLERANCE:.0e}:", "")
        yield f"| | {' | '.join(names)} |"
        yield "| --- " + "| ---: " * len(names) + "|"
        for row in record["differences"]:
            cells = [f"{row['errors'][name]:.1e}" if name in row["errors"] else "" for name in names]
            yield f"| {row['shape']}, {row['rule']}, {row['library']} | {' | '.join(cells)} |"
    yield from ("", *programs(record["measurements"]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = command.Parser(prog="python -m benchmarks.peers_cpu", description=(__doc__ or "").split(":  ")[0] + ".")
    parser.add_argument("--maxtext", metavar="FOLDER", type=Path, help="a checkout of MaxText (default: left out)")
    parser.add_argument("--shapes", default=SHAPES, help=f"{SHAPE_SYNTAX} (default {SHAPES})")
    parser.add_argument("--repeats", type=int, default=7, help="number of timing rounds (default 7)")
    parser.add_argument(
        "--out", type=Path, help=f"folder of the results (default {RESULTS.parent.name}/{RESULTS.name})"
    )
    given = parser.parse_args(argv)
    try:
        shapes = parse_shapes(given.shapes)
    except ValueError as error:
        parser.error(f"--shapes: {error}")
    if any(s.length % LENGTHS or s.heads != s.key_heads or s.key_dim != s.value_dim for s in shapes):
        parser.error(f"--shapes: expected T a multiple of {LENGTHS}, and D in place of K and V, without Hk")
    found, missing = pairs(given.maxtext)
    for line in missing:
        print(line, file=sys.stderr)
    about = environment(shlex.join(["python", "-m", "benchmarks.peers_cpu", *argv]))
    bench, rows = Bench(given.repeats, quick=False), []
    for shape in shapes:
        for rule, errors in measure(bench, shape, found).items():
            rows.append({"shape": str(shape), "rule": rule, "library": found[rule].theirs.name, "errors": errors})
    record = {
        "environment": {**about, "load_at_end": load()},
        "missing": missing,
        "figures": [{**dataclasses.asdict(f), "met": f.met()} for f in bench.figures],
        "differences": rows,
        "measurements": bench.rows,
    }
    page = list(markdown(record))
    print("\n".join(page))
    write(given.out or RESULTS, "peers-cpu", record, page)
    beyond = [f"{r['shape']} {r['rule']} {n}: {e:.1e}" for r in rows for n, e in r["errors"].items() if e > TOLERANCE]
    for line in beyond:
        print(f"beyond {TOLERANCE:.0e}: {line}", file=sys.stderr)
    return int(bool(beyond))


if __name__ == "__main__":
    command.run(main)
