"""Device time of ours, of its peer and of the XLA form, by the same method for both frameworks.

Before they are timed, their outputs and gradients are compared with those of the XLA form.

A batch is several calls, started without waiting, and a wait for the last; its time divided by the number of calls is
one measurement. Batches of the programs alternate, A B C A B C ..., with nothing else on the device. A row is
`host_bound` if the host takes about as long to start a call as the whole call takes: the device was idle.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu import peers, roofline
from benchmarks.gpu.check import words
from benchmarks.gpu.plan import BOTH, CONTENDERS, NOT_RUN, OUT_OF_TIME, PROGRAMS, Emit, rank
from osdn_jax import compare
from osdn_jax.compare import Shape, draw_inputs, parse_shapes
from osdn_jax.compare.inputs import Arrays, has_time
from osdn_jax.compare.timing import Timed, take_turns

BATCH_SECONDS, ROUNDS = 0.05, 7
CACHE = 150_000_000  # bytes of inputs that exceed every cache
_POOL = 1024  # tokens drawn on the host; the inputs repeat them in random order
_MOST_CALLS = 4096


@dataclasses.dataclass
class QueuedContender(Timed):
    """A program that runs on any of several sets of inputs; its calls are queued on the device, without waiting.

    Args:
        call: starts it on a set, given its number, and returns the output.
        wait: waits for an output.
        calls: calls per batch.
        host_seconds: the time it takes the host to start a call.
    """

    call: Callable[[int], Any]
    wait: Callable[[Any], None]
    calls: int = 1
    host_seconds: float | None = None

    def batch(self, calls: int) -> tuple[float, float]:
        """Return the seconds per call of starting them, and in total."""
        start = time.perf_counter()
        for i in range(calls):
            out = self.call(i)
        started = time.perf_counter()
        self.wait(out)
        return (started - start) / calls, (time.perf_counter() - start) / calls

    def settle(self, batch_seconds: float = BATCH_SECONDS) -> None:
        """Warm up and find the number of calls that fill a batch; 1 if batch_seconds is 0."""
        self.settled = True
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

    def measure(self) -> float:
        """Return the seconds per call of one batch."""
        return self.batch(self.calls)[1]

    def row(self) -> dict[str, Any]:
        """Return the fields of its row."""
        return {
            "status": "measured",
            "median_seconds": self.median_seconds,
            "quartile_seconds": self.quartile_seconds,
            "batches": len(self.seconds),
            "calls": self.calls,
            "host_seconds": self.host_seconds,
            "host_bound": self.host_seconds is not None and self.host_seconds > 0.8 * (self.median_seconds or 0.0),
        }


def abstract(rule: str, shape: Shape) -> Arrays:
    """Return the shapes and types of a rule's arguments, without an initial state."""
    small = _pool(rule, dataclasses.replace(shape, length=1))
    return {
        name: jax.ShapeDtypeStruct((shape.batch, shape.length, *x.shape[2:]) if has_time(name) else x.shape, x.dtype)
        for name, x in small.items()
    }


def pools(rule: str, shape: Shape, sets: int) -> list[Arrays]:
    """Return the NumPy arrays whose tokens the inputs repeat, drawn as in `osdn_jax.compare`."""
    return [_pool(rule, dataclasses.replace(shape, length=min(_POOL, shape.length)), seed) for seed in range(sets)]


def fill(pool: Arrays, shape: Shape, seed: jax.Array) -> tuple[Arrays, jax.Array]:
    """Return arguments and a cotangent; each token of an argument is one of its pool, at random."""
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
    """Return arguments -> outputs, or (arguments, cotangent) -> (outputs, gradients); preconditioner included."""
    run = compare.program(rule, implementation)

    def forward(x: Arrays) -> jax.Array:
        return run(x)["o"]

    return compare.value_and_gradient(forward) if gradient else forward


class Race:
    """Contenders on one rule and shape: prepared in parallel with other races, timed alone.

    The spec lists those that are timed and owe a row, and others that run in the same rounds, as [contender, program].
    """

    def __init__(self, spec: dict[str, Any], emit: Emit) -> None:
        self.spec, self.rule, self.emit = spec, spec["rule"], emit
        self.shape = parse_shapes(spec["shape"])[0]
        self.timed = {(name, program) for name, program in spec["timed"]}
        self.running = self.timed | {(name, program) for name, program in spec["beside"]}
        self.ready: dict[tuple[str, str], Any] = {}
        self.compile_seconds: dict[tuple[str, str], float] = {}
        self.tuned = False  # True once the peer's kernels were tuned with the device to themselves
        self.arguments = abstract(self.rule, self.shape)
        self.sizes = {name: x.size * x.dtype.itemsize for name, x in self.arguments.items()}
        self.sets = 2 if spec["dry"] else min(4, -(-CACHE // sum(self.sizes.values())))

    def prepare(self, until: float) -> None:
        make = {
            "ours": lambda program: self._compile(self.spec["implementation"], program),
            "peer": self._compile_peer,
            "xla": lambda program: self._compile("chunk", program),
        }
        make |= {name: partial(self._compile, name) for name, _ in self.timed if name not in CONTENDERS}
        self.pools = pools(self.rule, self.shape, self.sets)
        self.fill = jax.jit(lambda pool, seed: fill(pool, self.shape, seed)).lower(self.pools[0], 0).compile()
        for name, program in sorted(self.timed, key=lambda key: (rank(key[0]), PROGRAMS.index(key[1]))):
            self._attempt(name, program, make[name], until)
        # The others, and the XLA form that all are compared with, are only needed for programs that compiled.
        programs = [program for program in PROGRAMS if any(p == program for _, p in self.ready)]
        for key in [(name, program) for program in programs for name in ("ours", "xla")]:
            if key not in self.timed and (key in self.running or key[0] == "xla"):
                self._attempt(*key, make[key[0]], until)

    def race(self, until: float) -> None:
        drawn = [self.fill(pool, seed) for seed, pool in enumerate(self.pools)] if self.ready else []
        for program in PROGRAMS:
            expected = self._expected(program, drawn)
            running, differences = [], {}
            for name in sorted({name for name, _ in self.ready}, key=rank):
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
                except Exception as error:  # noqa: BLE001 - any exception of a contender is its result
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
        """Return the outputs of the XLA form for the first inputs; empty if it fails."""
        if ("xla", program) not in self.ready:
            return {}
        run = self.ready["xla", program]
        try:
            out = jax.block_until_ready(run(*drawn[0]) if program == BOTH else run(drawn[0][0]))
        except Exception as error:  # noqa: BLE001 - the others run without it
            self._raised("xla", program, error)
            del self.ready["xla", program]
            return {}
        self._alive()
        return named(out)

    def _differences(self, name: str, out: Any, expected: dict[str, jax.Array], arguments: Arrays) -> dict[str, float]:
        """Return the differences of the outputs and of every gradient from those of the XLA form."""
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

    def _contender(self, name: str, program: str, drawn: list[tuple[Arrays, jax.Array]]) -> QueuedContender:
        run, gradient = self.ready[name, program], program == BOTH
        if name != "peer":
            sets = drawn if gradient else [(x,) for x, _ in drawn]
            return QueuedContender(name, lambda i: run(*sets[i % len(sets)]), jax.block_until_ready)
        run = peers.program(run, drawn[0][1], gradient)
        leaves = [peers.tensors(self.rule, x) for x, _ in drawn]
        with peers.tuning(peers.TUNING, forget=not self.tuned):
            peers.synchronize(run(leaves[0]))
        self.tuned = True
        return QueuedContender(name, lambda i: run(leaves[i % len(leaves)]), peers.synchronize)

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
        except Exception as error:  # noqa: BLE001 - any exception of a contender is its result
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
    """Return the outputs of a program by name: o, and gradients as d_ARGUMENT."""
    if not isinstance(out, tuple):
        return {"o": out}
    return {"o": out[0], **{f"d_{name}": x for name, x in out[1].items()}}


def difference(got: jax.Array | None, want: jax.Array) -> float:
    """Return ‖got − want‖ / ‖want‖, computed on the device; infinity if got is missing or not finite."""
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
    """Return the largest difference, the name of its array, and all differences."""
    if not differences:
        return {"difference": None}
    name = max(differences, key=differences.__getitem__)
    return {"difference": differences[name], "in": name, "differences": differences}


def why(error: Exception) -> tuple[str, str]:
    """Return the status and the reason of a row whose measurement raised an exception."""
    if isinstance(error, peers.NoPeer):
        return "missing", str(error)
    refusal = peers.refusal(error)
    return ("refused", refusal) if refusal else ("raised", words(error))


def warm(rule: str, shape: Shape, gradient: bool) -> None:
    """Compile a peer's kernels by running them on a short sequence: they do not depend on its length."""
    run = peers.load(rule, shape)
    short = dataclasses.replace(shape, length=min(_POOL, shape.length))
    arguments, cotangent = jax.jit(lambda pool: fill(pool, short, 0))(pools(rule, short, 1)[0])
    with peers.tuning(peers.PREPARING):
        peers.synchronize(peers.program(run, cotangent, gradient)(peers.tensors(rule, arguments)))
    peers.release()


def compile_peer(spec: dict[str, Any], emit: Emit) -> None:
    """Emit a row for each program of a peer; its kernels are then in Triton's cache for other processes."""
    shape = parse_shapes(spec["shape"])[0]
    for program in spec["programs"]:
        start = time.time()
        try:
            warm(spec["rule"], shape, program == BOTH)
            found = {"status": "compiled", "seconds": round(time.time() - start, 1)}
        except Exception as error:  # noqa: BLE001 - any exception of a peer is its result
            found = dict(zip(("status", "reason"), why(error), strict=True))
        key = {name: spec[name] for name in ("section", "shape", "rule")}
        emit({**key, "program": program, **found})


def job(spec: dict[str, Any], emit: Emit, turn: Callable[[], None]) -> None:
    """Emit a row for each program of each contender."""
    race = Race(spec, emit)
    race.prepare(spec["prepare_until"])
    turn()
    race.race(spec["until"])


def ceilings(spec: dict[str, Any], emit: Emit, turn: Callable[[], None]) -> None:
    """Emit the rates of a copy in device memory and of a bfloat16 matrix product."""
    words, size = (1 << 12, 64) if spec["dry"] else (1 << 28, 8192)
    keys = jax.random.split(jax.random.key(0), 3)
    source = jax.random.bits(keys[0], (words,), jnp.uint32)
    a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys[1:])
    copy, matmul = jax.jit(jnp.invert), jax.jit(jnp.matmul)
    running = [
        QueuedContender("copy", lambda i: copy(source), jax.block_until_ready),
        QueuedContender("matmul", lambda i: matmul(a, b), jax.block_until_ready),
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
