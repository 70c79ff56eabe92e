"""Measure the cost of the operators under XLA:  python -m benchmarks.ops

Every figure is float32, from one process, in which the programs of a section run in turn (A B C A B C ...); the ratios
are medians of ratios within a round. It writes benchmarks/results/ops-<platform>.json and .md and prints the latter.
It takes about 15 minutes on two CPU cores; --sections repeats some sections and keeps the rest of the record. --quick
(a minute) only shows that everything runs, and writes nothing without --out. The rules of osdn_jax/ops/selection.py
come from the sections "forward" and "chunks".
"""

import contextlib
import dataclasses
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from osdn_jax import nn
from osdn_jax.command import Parser
from osdn_jax.compare import (
    Contender,
    Shape,
    contender,
    draw_cotangents,
    draw_inputs,
    environment,
    parse_shapes,
    program,
    ratio,
    take_turns,
    value_and_gradient,
)
from osdn_jax.compare.machine import load
from osdn_jax.compare.report import duration, size
from osdn_jax.nn.split import split_model
from osdn_jax.ops import chunkwise

RESULTS = Path(__file__).parent / "results"
DECAYS = {"none": "delta_net", "scalar": "gated_delta_net", "channel": "kda"}


@dataclasses.dataclass(frozen=True)
class Program:
    """A rule under an implementation ("auto" for the automatic choice), forward alone or with its gradient."""

    rule: str
    shape: Shape
    implementation: str = "auto"
    gradient: bool = True
    chunk_size: int | None = None
    anchor: float | None = None  # of the hypergradient preconditioner; default: that of compare.COMPARED_RULES
    direct_scores: bool = False  # form the channel decay of a chunk as C x C x K values
    packed: bool = False  # documents of about a hundred tokens
    checked: bool = True  # contain packed documents that are not finite (ops/containment.py)

    def __str__(self) -> str:
        parts = [self.rule, str(self.shape), self.implementation]
        parts += [f"C={self.chunk_size}"] if self.chunk_size else []
        parts += [f"anchor={self.anchor:g}"] if self.anchor is not None else []
        parts += ["direct C x C x K"] if self.direct_scores else []
        parts += ["packed"] if self.packed else []
        parts += ["unchecked"] if not self.checked else []
        return " ".join([*parts, "forward + backward" if self.gradient else "forward"])


@dataclasses.dataclass(frozen=True)
class Figure:
    """A ratio of two programs' costs, and its target if it has one."""

    what: str
    value: float
    at_most: float | None = None
    at_least: float | None = None

    def met(self) -> bool | None:
        if self.at_most is None and self.at_least is None:
            return None
        return self.value <= (self.at_most or np.inf) and self.value >= (self.at_least or 0.0)


class Bench:
    """Measures programs and collects the results."""

    def __init__(self, repeats: int, quick: bool) -> None:
        self.repeats, self.quick = repeats, quick
        self.rows: list[dict] = []
        self.figures: list[Figure] = []

    def shape(self, full: str, quick: str) -> Shape:
        return parse_shapes(quick if self.quick else full)[0]

    def run(self, programs: Sequence[Program], repeats: int | None = None) -> list[Contender]:
        """Compile the programs and time them in turn."""
        running = [_contender(p) for p in programs]
        take_turns(running, repeats or self.repeats)
        for p, c in zip(programs, running, strict=True):
            row = {
                "name": str(p),
                **dataclasses.asdict(p),
                "shape": str(p.shape),
                "sizes": p.shape.sizes(),
                "compile_seconds": c.compile_seconds,
                "median_seconds": c.median_seconds,
                "quartile_seconds": c.quartile_seconds,
                "temporary_bytes": c.temporary_bytes,
                "refusal": c.refusal,
            }
            self.rows.append(row)
            cost = c.refusal or f"{duration(row['median_seconds'])}, {size(c.temporary_bytes)}"
            print(f"  {p}: {cost}, compiled in {duration(c.compile_seconds)}", file=sys.stderr, flush=True)
        return running

    def run_models(self, running: list[Contender]) -> list[Contender]:
        """Time programs that are not single operators."""
        take_turns(running, self.repeats)
        self.rows += [
            {
                "name": c.name,
                "compile_seconds": c.compile_seconds,
                "median_seconds": c.median_seconds,
                "quartile_seconds": c.quartile_seconds,
                "temporary_bytes": c.temporary_bytes,
                "refusal": c.refusal,
            }
            for c in running
        ]
        return running

    def figure(self, what: str, value: float, *, at_most: float | None = None, at_least: float | None = None) -> None:
        if self.quick:
            at_most = at_least = None  # the targets are for the full sizes
        self.figures.append(Figure(what, value, at_most, at_least))


def _contender(p: Program) -> Contender:
    arrays = draw_inputs(p.rule, p.shape, "float32", seed=0)
    options: dict = {"chunk_size": p.chunk_size} | ({} if p.anchor is None else {"anchor": p.anchor})
    if p.packed:
        options["segment_ids"] = packed_ids(p.shape.batch, p.shape.length)
    run: Callable = program(p.rule, None if p.implementation == "auto" else p.implementation, **options)
    arguments: tuple = (arrays,)
    if p.gradient:
        arguments = (arrays, draw_cotangents(jax.eval_shape(program(p.rule, "scan"), arrays), "float32", seed=0))
        run = value_and_gradient(run)
    with contextlib.ExitStack() as patches:
        if p.direct_scores:
            patches.enter_context(mock.patch.object(chunkwise, "channel_scores", _direct_scores))
        if not p.checked:
            patches.enter_context(unchecked())
        jax.clear_caches()  # or an operator traced earlier would be reused, patched or not
        made = contender(str(p), run, jax.device_put(arguments))
    jax.clear_caches()
    return made


def packed_ids(batch: int, length: int) -> jax.Array:
    """Return segment_ids [B, T] of documents of 100 tokens on average."""
    starts = np.random.default_rng(0).random((batch, length)) < 1 / 100
    return jnp.asarray(np.cumsum(starts, axis=1), jnp.int32)


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Remove the check for packed documents that are not finite from the operators and attention."""
    with contextlib.ExitStack() as patches:
        for module in ("ops.dispatch", "nn.attention"):
            name = f"osdn_jax.{module}.contained"
            patches.enter_context(mock.patch(name, lambda fast, exact, inputs, starts: fast(inputs, starts)))
        yield


def _direct_scores(x: jax.Array, w: jax.Array, log_decay: jax.Array) -> jax.Array:
    """Compute `ops.scores.channel_scores` from the decays of all pairs of tokens: [..., C, C, K] values."""
    decayed = jnp.cumsum(log_decay, axis=-2)
    between = decayed[..., :, None, :] - decayed[..., None, :, :]
    earlier = np.tril(np.ones((w.shape[-2],) * 2, bool)).reshape((1,) * (between.ndim - 3) + (w.shape[-2],) * 2 + (1,))
    pairs = jnp.where(earlier, jnp.exp(jnp.where(earlier, between, 0.0)), 0.0) * w[..., None, :, :]
    return jnp.einsum("...mik,...ijk->...mij", x, pairs)


# --- the sections ---------------------------------------------------------------------------------------------------


def auto_against_scan(b: Bench) -> None:
    """Cost of implementation=None relative to the scan"""
    shape = b.shape("B1T4096H4D128", "B1T16H2D8")
    for rule in ("delta_net", "gated_delta_net"):
        scan, auto = b.run([Program(rule, shape, name, gradient=False) for name in ("scan", "auto")])
        b.figure(f"{rule}, forward: time of auto / scan", ratio(auto.seconds, scan.seconds), at_most=1.05)
        scan, auto = b.run([Program(rule, shape, name) for name in ("scan", "auto")])
        speed, memory = ratio(scan.seconds, auto.seconds), _memory(auto, scan)
        if rule == "delta_net":
            b.figure(f"{rule}, forward + backward: time of scan / auto", speed, at_least=8)
            b.figure(f"{rule}, forward + backward: temporary memory of auto / scan", memory, at_most=1 / 20)
        else:
            b.figure(f"{rule}, forward + backward: time of auto / scan", 1 / speed, at_most=0.09)
            b.figure(f"{rule}, forward + backward: temporary memory of auto / scan", memory, at_most=0.04)


def rules_against_each_other(b: Bench) -> None:
    """Cost of channel decay and of the preconditioners"""
    shape = b.shape("B1T4096H4D128", "B1T16H2D8")
    pairs = [("kda", "gated_delta_net", 2.0), ("osdn", "delta_net", 1.25), ("osdn_trust", "delta_net", 1.25)]
    pairs += [("os_gdn_trust", "gated_delta_net", None), ("pdn", "delta_net", None)]
    names = list(dict.fromkeys(name for new, old, _ in pairs for name in (old, new)))
    timed = dict(zip(names, b.run([Program(name, shape) for name in names]), strict=True))
    for new, old, most in pairs:
        value = ratio(timed[new].seconds, timed[old].seconds)
        b.figure(f"forward + backward: time of {new} / {old}", value, at_most=most)
    # Forgetting toward 0 in the trust region holds d at its lower bound: it is projected at almost every token.
    for implementation in ("auto", "chunk"):
        pair = [Program("delta_net", shape, implementation), Program("osdn_trust", shape, implementation, anchor=0.0)]
        plain, bound = b.run(pair)
        value = ratio(bound.seconds, plain.seconds)
        b.figure(f"{implementation}: time of osdn_trust at its lower bound / delta_net", value)
    for tokens in (8,) if b.quick else (32, 64):
        pair = [Program("kda", shape, "chunk", chunk_size=tokens, direct_scores=direct) for direct in (False, True)]
        ours, direct = b.run(pair, repeats=3)
        b.figure(
            f"kda in chunks of {tokens}: time of direct C x C x K / sub-blocks", ratio(direct.seconds, ours.seconds)
        )


def length(b: Bench) -> None:
    """Time, memory and compile time against sequence length"""
    shapes = [b.shape(f"B1T{t}H4D128", f"B1T{t // 128}H2D8") for t in (1024, 4096, 16384)]
    rules = ("delta_net", "gated_delta_net", "kda", "osdn")
    for rule in rules[: 1 if b.quick else None]:
        short, middle, long = b.run([Program(rule, shape) for shape in shapes])
        value = ratio(long.seconds, middle.seconds)
        b.figure(f"{rule}, forward + backward: time of T = {shapes[2].length} / {shapes[1].length}", value, at_most=4.4)
        compiling = [c.compile_seconds or np.nan for c in (short, long)]
        b.figure(f"{rule}: compile time of T = {shapes[2].length} / {shapes[0].length}", compiling[1] / compiling[0])


def forward(b: Bench) -> None:
    """Forward pass by scan and by chunks: the source of `selection.forward_by_scan`"""
    sizes = ((1, 1, 32), (1, 4, 64), (1, 4, 128), (4, 4, 64), (4, 4, 128), (16, 4, 128))
    lengths = (1, 64, 512, 4096)
    if b.quick:
        sizes, lengths = ((1, 2, 8),), (16,)
    for decay, rule in DECAYS.items():
        for batch, heads, dim in sizes:
            for tokens in lengths:
                shape = Shape(batch, tokens, heads, heads, dim, dim)
                big = batch * tokens * heads * dim * dim > 2**30
                scan, chunk = b.run([Program(rule, shape, n, False) for n in ("scan", "chunk")], 3 if big else None)
                b.figure(f"decay {decay}, {shape}: time of chunk / scan", ratio(chunk.seconds, scan.seconds))


def chunks(b: Bench) -> None:
    """Chunk length, forward + backward: the source of `selection.default_chunk`"""
    sizes = ("B1T2048H4D64", "B1T2048H4D128", "B4T2048H4D128")
    chunk_sizes = (16, 32, 64, 128)
    for decay, rule in DECAYS.items():
        for text in sizes[: 1 if b.quick else None]:
            shape = b.shape(text, "B1T16H2D8")
            programs = [Program(rule, shape, "chunk", chunk_size=c) for c in ((8, 16) if b.quick else chunk_sizes)]
            timed = b.run(programs, repeats=5)
            best = min(range(len(timed)), key=lambda i: np.median(timed[i].seconds))
            for p, c in zip(programs, timed, strict=True):
                value = ratio(c.seconds, timed[best].seconds)
                b.figure(f"decay {decay}, {shape}: time of C = {p.chunk_size} / the best of these", value)


def packed(b: Bench) -> None:
    """Cost of the check that contains packed documents that are not finite, forward + backward"""
    for text in ("B8T256H2D64", "B1T4096H4D128", "B4T512H8D64")[: 1 if b.quick else None]:
        shape = b.shape(text, "B2T16H2D8")
        for rule in ("delta_net", "os_gdn_trust", "pdn"):
            plain, kept = b.run([Program(rule, shape, packed=True, checked=checked) for checked in (False, True)])
            b.figure(f"{rule}, {shape}: time of checked / unchecked", ratio(kept.seconds, plain.seconds))
            b.figure(f"{rule}, {shape}: temporary memory of checked / unchecked", _memory(kept, plain))
    sizes = ((2, 16, 8),) if b.quick else ((8, 256, 128), (4, 1024, 128))
    for batch, tokens, width in sizes:
        for rule in ("delta_net", "osdn", "os_gdn", "transformer"):
            plain, kept = b.run_models([_model(rule, batch, tokens, width, checked) for checked in (False, True)])
            value = ratio(kept.seconds, plain.seconds)
            b.figure(f"gradient of a model of {rule}, {batch} x {tokens}: time of checked / unchecked", value)


def _model(rule: str, batch: int, tokens: int, width: int, checked: bool) -> Contender:
    """Compile the gradient of the loss of the demo's model."""
    mixer = nn.mixer_config(rule, width=width, heads=2, key_dim=width // 2, value_dim=width // 2)
    config = nn.ModelConfig(vocab_size=256, layers=2, mixer=mixer, mlp_dim=2 * width)
    apply, parameters = split_model(nn.CausalLM(config, rngs=nnx.Rngs(0)))
    ids, text = packed_ids(batch, tokens), np.random.default_rng(0).integers(0, 256, (batch, tokens))

    def loss(parameters: dict) -> jax.Array:
        logits, _ = apply(parameters, jnp.asarray(text, jnp.int32), segment_ids=ids)
        return -jnp.mean(jax.nn.log_softmax(logits)[..., 0])

    name = f"model of {rule}, {batch} x {tokens}, {'checked' if checked else 'unchecked'}"
    with contextlib.nullcontext() if checked else unchecked():
        jax.clear_caches()
        made = contender(name, jax.grad(loss), (parameters,))
    jax.clear_caches()
    return made


SECTIONS = {
    "auto": auto_against_scan,
    "rules": rules_against_each_other,
    "length": length,
    "forward": forward,
    "chunks": chunks,
    "packed": packed,
}


# --- the record -----------------------------------------------------------------------------------------------------


def _memory(numerator: Contender, denominator: Contender) -> float:
    return (numerator.temporary_bytes or np.nan) / (denominator.temporary_bytes or np.nan)


def markdown(record: dict) -> Iterator[str]:
    """Yield the lines of the table."""
    yield "# Cost of the operators"
    yield ""
    yield "All float32, by `python -m benchmarks.ops`. The programs of a comparison run in turn in one process; a"
    yield "ratio is the median over rounds of the ratio within a round, a time the median over rounds. Other work on"
    yield "the machine slows all programs of a round, those on several cores most: note the load average."
    for name, section in SECTIONS.items():
        if name not in record:
            continue
        about = record[name]["environment"]
        heading = (section.__doc__ or name).rstrip(".")
        yield from ("", f"## {heading}", "")
        yield f"{about['date']}, {about['device']} ({about['cpu']}, {about['cpu_cores']} cores), load average"
        yield f"{about['load_at_start']} before and {about['load_at_end']} after; jax {about['jax']}, jaxlib"
        yield f"{about['jaxlib']}, NumPy {about['numpy']}, Python {about['python']}: `{about['command']}`."
        yield from ("", "| ratio | measured | target | |", "| --- | ---: | ---: | --- |")
        for f in record[name]["figures"]:
            asked = f"≤ {f['at_most']:.3g}" if f["at_most"] else f"≥ {f['at_least']:.3g}" if f["at_least"] else ""
            met = {True: "met", False: "**missed**", None: ""}[f["met"]]
            yield f"| {f['what']} | {f['value']:.3g} | {asked} | {met} |"
        yield from ("", "| program | median | quartiles | temporary memory | compile |", "| --- " + "| ---: " * 4 + "|")
        for r in record[name]["measurements"]:
            spread = "–".join(duration(x) for x in r["quartile_seconds"] or ())
            cost = f"{duration(r['median_seconds'])} | {spread} | {size(r['temporary_bytes'])}"
            yield f"| {r['name']} | {r['refusal'] or cost} | {duration(r['compile_seconds'])} |"


def main(argv: Sequence[str] | None = None) -> dict:
    """Run the command line; return the record of the sections measured."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = Parser(prog="python -m benchmarks.ops", description=(__doc__ or "").split(":  ")[0] + ".")
    parser.add_argument(
        "--sections",
        nargs="+",
        choices=SECTIONS,
        default=list(SECTIONS),
        help="sections to measure; the record keeps the others (default all)",
    )
    parser.add_argument("--repeats", type=int, default=7, help="number of timing rounds (default 7)")
    parser.add_argument("--quick", action="store_true", help="use tiny sizes, to show that everything runs")
    folder = f"{RESULTS.parent.name}/{RESULTS.name}"
    parser.add_argument("--out", type=Path, help=f"folder of the results (default {folder}; with --quick none)")
    given = parser.parse_args(argv)
    record = {}
    for name in given.sections:
        print(f"{name}:", file=sys.stderr, flush=True)
        about = environment(shlex.join(["python", "-m", "benchmarks.ops", *argv]))
        bench = Bench(2 if given.quick else given.repeats, given.quick)
        SECTIONS[name](bench)
        record[name] = {
            "environment": {**about, "load_at_end": load()},
            "figures": [{**dataclasses.asdict(f), "met": f.met()} for f in bench.figures],
            "measurements": bench.rows,
        }
    print("\n".join(markdown(record)))
    out = given.out or (None if given.quick else RESULTS)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        file = out / f"ops-{jax.default_backend()}.json"
        kept = json.loads(file.read_text()) if file.exists() else {}
        record = {name: {**kept, **record}[name] for name in SECTIONS if name in kept or name in record}
        file.write_text(json.dumps(record, indent=1) + "\n")
        file.with_suffix(".md").write_text("\n".join(markdown(record)) + "\n")
    return record


if __name__ == "__main__":
    main()
