"""Device time of ours, of its peer and of the XLA form, by one method for both frameworks.

Before it is timed each is compared with the XLA form: outputs, and every gradient.

A batch is several calls started one after the other, without waiting, and a wait for the last; its time over the calls
is one measurement. Batches of the programs alternate, A B C A B C ..., with nothing else on the device. Where starting
a call takes the host about as long as the whole call, the row says `host_bound`: the device waited.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu import peers, roofline
from benchmarks.gpu.check import words
from benchmarks.gpu.plan import BOTH, CONTENDERS, NOT_RUN, OUT_OF_TIME, PROGRAMS
from osdn_jax.compare import COMPARED_RULES, Shape, draw_inputs, parse_shapes
from osdn_jax.compare.inputs import Arrays, has_time
from osdn_jax.compare.timing import quartiles

BATCH_SECONDS, ROUNDS = 0.05, 7
CACHE = 100_000_000  # bytes of inputs that no cache holds
_POOL = 1024  # tokens that are drawn; those of the inputs are picked among them at random
_MOST_CALLS = 4096

Emit = Callable[[dict[str, Any]], None]


@dataclasses.dataclass
class Contender:
    """A program that is ready to run on any of the sets of inputs."""

    name: str
    call: Callable[[int], Any]  # starts it on a set and returns its output
    wait: Callable[[Any], None]
    calls: int = 1
    host_seconds: float | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)

    def batch(self, calls: int) -> tuple[float, float]:
        """Seconds per call: to start them, and altogether."""
        start = time.perf_counter()
        for i in range(calls):
            out = self.call(i)
        started = time.perf_counter()
        self.wait(out)
        return (started - start) / calls, (time.perf_counter() - start) / calls

    def settle(self, batch_seconds: float) -> None:
        """Warms up and finds how many calls fill a batch, one where that is to last no time."""
        if not batch_seconds:
            return
        self.batch(2)
        self.host_seconds = min(self.batch(1)[0] for _ in range(3))
        while True:
            seconds = self.batch(self.calls)[1]
            wanted = min(_MOST_CALLS, int(np.ceil(batch_seconds / max(seconds, 1e-9))))
            if wanted <= 1.25 * self.calls:
                self.calls = max(self.calls, wanted)
                return
            self.calls = wanted

    def row(self) -> dict[str, Any]:
        median = float(np.median(self.seconds))
        return {
            "status": "measured",
            "median_seconds": median,
            "quartile_seconds": quartiles(self.seconds),
            "batches": len(self.seconds),
            "calls": self.calls,
            "host_seconds": self.host_seconds,
            "host_bound": self.host_seconds is not None and self.host_seconds > 0.8 * median,
        }


def take_turns(contenders: Sequence[Contender], rounds: int, alive: Callable[[], None] = lambda: None) -> None:
    """Times a batch of each, and again."""
    for _ in range(rounds):
        alive()
        for c in contenders:
            c.seconds.append(c.batch(c.calls)[1])


def abstract(rule: str, shape: Shape) -> Arrays:
    """Shapes and types of a rule's arguments, without a memory to start from."""
    small = _pool(rule, dataclasses.replace(shape, length=1))
    return {
        name: jax.ShapeDtypeStruct((shape.batch, shape.length, *x.shape[2:]) if has_time(name) else x.shape, x.dtype)
        for name, x in small.items()
    }


def pools(rule: str, shape: Shape, sets: int) -> list[Arrays]:
    """What the inputs are picked from, as NumPy arrays: tokens drawn as everywhere in the package."""
    return [_pool(rule, dataclasses.replace(shape, length=min(_POOL, shape.length)), seed) for seed in range(sets)]


def fill(pool: Arrays, shape: Shape, seed: jax.Array) -> tuple[Arrays, jax.Array]:
    """Arguments and a cotangent: each token of an argument is picked at random from its pool."""
    out = {}
    for i, (name, x) in enumerate(pool.items()):
        if has_time(name):
            key = jax.random.fold_in(jax.random.key(seed), i)
            picked = jax.random.randint(key, (shape.batch, shape.length), 0, x.shape[1])
            x = jnp.take(x[0], picked, axis=0)
        out[name] = x
    return out, jax.random.normal(jax.random.key(seed), output_shape(shape), jnp.bfloat16)


def output_shape(shape: Shape) -> tuple[int, ...]:
    return (shape.batch, shape.length, shape.heads, shape.value_dim)


def _pool(rule: str, shape: Shape, seed: int = 0) -> Arrays:
    drawn = draw_inputs(rule, dataclasses.replace(shape, batch=1), "bfloat16", seed)
    return {name: x for name, x in drawn.items() if name != "initial_state"}


def program_of(rule: str, implementation: str, gradient: bool) -> Callable[..., Any]:
    """arguments -> outputs, or (arguments, cotangent) -> (outputs, gradients); preconditioner included."""
    spec = COMPARED_RULES[rule]

    def forward(x: Arrays) -> jax.Array:
        return spec.function(**x, **spec.options, implementation=implementation)[0]

    def both(x: Arrays, cotangent: jax.Array) -> tuple[jax.Array, Arrays]:
        out, pull = jax.vjp(forward, x)
        return out, pull(cotangent)[0]

    return both if gradient else forward


class Race:
    """Contenders on one rule and shape: prepared side by side with other races, timed alone.

    The spec names those that are timed and owe a row, and those that run beside them, as [contender, program].
    """

    def __init__(self, spec: dict[str, Any], emit: Emit) -> None:
        self.spec, self.rule, self.emit = spec, spec["rule"], emit
        self.shape = parse_shapes(spec["shape"])[0]
        self.timed = {(name, program) for name, program in spec["timed"]}
        self.running = self.timed | {(name, program) for name, program in spec["beside"]}
        self.ready: dict[tuple[str, str], Any] = {}
        self.compile_seconds: dict[tuple[str, str], float] = {}
        self.tuned = False  # whether the peer's kernels were chosen alone on the device
        self.arguments = abstract(self.rule, self.shape)
        self.sizes = {name: x.size * x.dtype.itemsize for name, x in self.arguments.items()}
        self.sets = 2 if spec["dry"] else min(4, -(-CACHE // sum(self.sizes.values())))

    def prepare(self, until: float) -> None:
        make = {
            "ours": lambda program: self._compile(self.spec["implementation"], program),
            "peer": self._compile_peer,
            "xla": lambda program: self._compile("chunk", program),
        }
        self.pools = pools(self.rule, self.shape, self.sets)
        self.fill = jax.jit(lambda pool, seed: fill(pool, self.shape, seed)).lower(self.pools[0], 0).compile()
        for name, program in sorted(self.timed, key=lambda key: (CONTENDERS.index(key[0]), PROGRAMS.index(key[1]))):
            self._attempt(name, program, make[name], until)
        # What runs beside them, and the XLA form, which all are compared with, is of use to a program that is there.
        programs = [program for program in PROGRAMS if any(p == program for _, p in self.ready)]
        for key in [(name, program) for program in programs for name in ("ours", "xla")]:
            if key not in self.timed and (key in self.running or key[0] == "xla"):
                self._attempt(*key, make[key[0]], until)

    def race(self, until: float) -> None:
        drawn = [self.fill(pool, seed) for seed, pool in enumerate(self.pools)] if self.ready else []
        for program in PROGRAMS:
            expected = self._expected(program, drawn)
            running, differences = [], {}
            for name in CONTENDERS:
                if (name, program) not in self.ready or (name, program) not in self.running:
                    continue
                if time.time() > until:
                    self._say(name, program, NOT_RUN, OUT_OF_TIME)
                    continue
                try:
                    new = self._contender(name, program, drawn)
                    out = new.call(0)
                    new.wait(out)
                    self._alive()
                    differences[name] = self._differences(name, out, expected, drawn[0][0])
                    del out
                    new.settle(0.0 if self.spec["dry"] else BATCH_SECONDS)
                    self._alive()
                    running.append(new)
                except Exception as error:  # noqa: BLE001 - whatever a contender raises is its result
                    self._raised(name, program, error)
            del expected
            take_turns(running, 2 if self.spec["dry"] else ROUNDS, self._alive)
            ours = next(({"ours_seconds": c.row()["median_seconds"]} for c in running if c.name == "ours"), {})
            for c in running:
                more = {
                    "compile_seconds": self.compile_seconds[c.name, program],
                    **worst(differences[c.name]),
                    "bytes": roofline.least_bytes(
                        self.sizes, 2 * int(np.prod(output_shape(self.shape))), program == BOTH
                    ),
                    "flops": roofline.least_flops(self.shape, program == BOTH),
                    "input_sets": self.sets,
                }
                self._say(c.name, program, **c.row(), **more, **(ours if c.name != "ours" else {}))

    def _expected(self, program: str, drawn: list[tuple[Arrays, jax.Array]]) -> dict[str, jax.Array]:
        """What the XLA form makes of the first inputs; nothing where it cannot."""
        if ("xla", program) not in self.ready:
            return {}
        run = self.ready["xla", program]
        try:
            out = jax.block_until_ready(run(*drawn[0]) if program == BOTH else run(drawn[0][0]))
        except Exception as error:  # noqa: BLE001 - the others go on without it
            self._raised("xla", program, error)
            del self.ready["xla", program]
            return {}
        self._alive()
        return named(out)

    def _differences(self, name: str, out: Any, expected: dict[str, jax.Array], arguments: Arrays) -> dict[str, float]:
        """Of the outputs and of every gradient from those of the XLA form."""
        if name == "xla":
            return {}
        got = named(out)
        if name == "peer":
            got = {key: peers.as_jax(x) for key, x in got.items()}
            if peers.PEERS[self.rule].normalizes:
                sphere = {f"d_{key}": arguments[key] for key in ("q", "k")}
                expected = expected | {
                    key: peers.along_sphere(x, expected[key]) for key, x in sphere.items() if key in expected
                }
        return {key: difference(got[key], want) for key, want in expected.items()}

    def _contender(self, name: str, program: str, drawn: list[tuple[Arrays, jax.Array]]) -> Contender:
        run, gradient = self.ready[name, program], program == BOTH
        if name != "peer":
            sets = drawn if gradient else [(x,) for x, _ in drawn]
            return Contender(name, lambda i: run(*sets[i % len(sets)]), jax.block_until_ready)
        run = peers.program(run, drawn[0][1], gradient)
        leaves = [peers.tensors(self.rule, x) for x, _ in drawn]
        with peers.tuning(peers.TUNING, forget=not self.tuned):
            peers.synchronize(run(leaves[0]))
        self.tuned = True
        return Contender(name, lambda i: run(leaves[i % len(leaves)]), peers.synchronize)

    def _compile(self, implementation: str, program: str) -> Any:
        cotangent = jax.ShapeDtypeStruct(output_shape(self.shape), jnp.bfloat16)
        arguments = (self.arguments, cotangent) if program == BOTH else (self.arguments,)
        return jax.jit(program_of(self.rule, implementation, program == BOTH)).lower(*arguments).compile()

    def _compile_peer(self, program: str) -> Any:
        run = peers.load(self.rule, self.shape)
        warm(self.rule, self.shape, program == BOTH)
        return run

    def _attempt(self, name: str, program: str, make: Callable[[str], Any], until: float) -> None:
        start = time.time()
        self._alive()
        try:
            if start > until:
                raise TimeoutError
            self.ready[name, program] = make(program)
            self.compile_seconds[name, program] = round(time.time() - start, 2)
        except TimeoutError:
            self._say(name, program, NOT_RUN, OUT_OF_TIME)
        except Exception as error:  # noqa: BLE001 - whatever a contender raises is its result
            self._raised(name, program, error)

    def _alive(self) -> None:
        self.emit({"event": "alive"})

    def _raised(self, name: str, program: str, error: Exception) -> None:
        self._say(name, program, *why(error))

    def _say(self, name: str, program: str, status: str, reason: str | None = None, **more: Any) -> None:
        if (name, program) not in self.timed:
            return
        key = {"section": "time", "shape": self.spec["shape"], "rule": self.rule}
        which = {"program": program, "contender": name}
        self.emit({**key, **which, "status": status, **({"reason": reason} if reason else {}), **more})


def named(out: Any) -> dict[str, Any]:
    """The outputs of a program, o, or o and the gradients as d_ARGUMENT."""
    if not isinstance(out, tuple):
        return {"o": out}
    return {"o": out[0], **{f"d_{name}": x for name, x in out[1].items()}}


def difference(got: jax.Array | None, want: jax.Array) -> float:
    """‖got − want‖ / ‖want‖ on the device; infinite where a number, or the array, is missing."""
    if got is None or got.shape != want.shape:
        return float("inf")
    error, norm = (float(x) for x in _distance(got, want))
    relative = error / (norm if norm > 0 else 1.0)
    return relative if np.isfinite(relative) else float("inf")


@jax.jit
def _distance(got: jax.Array, want: jax.Array) -> tuple[jax.Array, jax.Array]:
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    return jnp.sqrt(jnp.sum(jnp.square(got - want))), jnp.sqrt(jnp.sum(jnp.square(want)))


def worst(differences: dict[str, float]) -> dict[str, Any]:
    """The largest difference, in which array it is, and all of them."""
    if not differences:
        return {"difference": None}
    name = max(differences, key=differences.__getitem__)
    return {"difference": differences[name], "in": name, "differences": differences}


def why(error: Exception) -> tuple[str, str]:
    """The status and the reason of a row that an exception is in the place of."""
    if isinstance(error, peers.NoPeer):
        return "missing", str(error)
    refusal = peers.refusal(error)
    return ("refused", refusal) if refusal else ("raised", words(error))


def warm(rule: str, shape: Shape, gradient: bool) -> None:
    """Compiles a peer's kernels by running them on a short sequence: they do not depend on its length."""
    run = peers.load(rule, shape)
    short = dataclasses.replace(shape, length=min(_POOL, shape.length))
    arguments, cotangent = jax.jit(lambda pool: fill(pool, short, 0))(pools(rule, short, 1)[0])
    with peers.tuning(peers.PREPARING):
        peers.synchronize(peers.program(run, cotangent, gradient)(peers.tensors(rule, arguments)))
    peers.release()


def compile_peer(spec: dict[str, Any], emit: Emit) -> None:
    """A row for each program of a peer: its kernels are on disk afterwards, where another process finds them."""
    shape = parse_shapes(spec["shape"])[0]
    for program in spec["programs"]:
        start = time.time()
        try:
            warm(spec["rule"], shape, program == BOTH)
            found = {"status": "compiled", "seconds": round(time.time() - start, 1)}
        except Exception as error:  # noqa: BLE001 - whatever a peer raises is its result
            found = dict(zip(("status", "reason"), why(error), strict=True))
        key = {name: spec[name] for name in ("section", "shape", "rule")}
        emit({**key, "program": program, **found})


def job(spec: dict[str, Any], emit: Emit, turn: Callable[[], None]) -> None:
    """A row for each program of each contender."""
    race = Race(spec, emit)
    race.prepare(spec["prepare_until"])
    turn()
    race.race(spec["until"])


def ceilings(spec: dict[str, Any], emit: Emit, turn: Callable[[], None]) -> None:
    """The rates of a copy in device memory and of a bfloat16 matrix product."""
    numbers, size = (1 << 12, 64) if spec["dry"] else (1 << 28, 8192)
    keys = jax.random.split(jax.random.key(0), 3)
    source = jax.random.bits(keys[0], (numbers,), jnp.uint32)
    a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys[1:])
    copy, matmul = jax.jit(jnp.invert), jax.jit(jnp.matmul)
    running = [
        Contender("copy", lambda i: copy(source), jax.block_until_ready),
        Contender("matmul", lambda i: matmul(a, b), jax.block_until_ready),
    ]
    for c in running:
        c.wait(c.call(0))
    turn()
    for c in running:
        c.settle(0.0 if spec["dry"] else BATCH_SECONDS)
    take_turns(running, 2 if spec["dry"] else ROUNDS)
    moved, done = 2 * source.nbytes, 2 * size**3
    rates = {"bytes_per_second": moved / np.median(running[0].seconds)}
    rates["flops_per_second"] = done / np.median(running[1].seconds)
    emit({"section": "ceilings", "status": "measured", **{name: float(x) for name, x in rates.items()}})
