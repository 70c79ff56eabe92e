"""Device time of ours, of its peer and of the XLA form, by one method for both frameworks.

A batch is several calls started one after the other, without waiting, and a wait for the last; its time over the calls
is one measurement. Batches of the programs alternate, A B C A B C ..., with nothing else on the device. Where starting
a call takes the host about as long as the whole call, the row says `host_bound`: the device waited.
"""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu import floors, peers
from benchmarks.gpu.check import words
from benchmarks.gpu.plan import OUT_OF_TIME, PROGRAMS
from osdn_jax.comparison import RULES, Shape, draw_inputs, parse_shapes
from osdn_jax.comparison.inputs import Arrays, has_time
from osdn_jax.comparison.measure import quartiles, relative_error

BATCH_SECONDS, ROUNDS = 0.05, 7
CACHE = 100_000_000  # bytes of inputs that no cache holds
_POOL = 1024  # tokens that are drawn; those of the inputs are picked among them at random
_TAIL = 256  # tokens of the output that contenders are compared on
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


def take_turns(contenders: Sequence[Contender], rounds: int) -> None:
    """Times a batch of each, and again."""
    for _ in range(rounds):
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


def program(rule: str, implementation: str, gradient: bool) -> Callable[..., Any]:
    """arguments -> outputs, or (arguments, cotangent) -> (outputs, gradients); preconditioner included."""
    spec = RULES[rule]

    def forward(x: Arrays) -> jax.Array:
        return spec.function(**x, **spec.options, implementation=implementation)[0]

    def both(x: Arrays, cotangent: jax.Array) -> tuple[jax.Array, Arrays]:
        out, pull = jax.vjp(forward, x)
        return out, pull(cotangent)[0]

    return both if gradient else forward


class Race:
    """Contenders on one rule and shape: prepared side by side with other races, timed alone."""

    def __init__(self, spec: dict[str, Any], emit: Emit) -> None:
        self.spec, self.rule, self.emit = spec, spec["rule"], emit
        self.shape = parse_shapes(spec["shape"])[0]
        self.ready: dict[tuple[str, bool], Any] = {}
        self.compile_seconds: dict[tuple[str, bool], float] = {}
        self.tuned = False  # whether the peer's kernels were chosen alone on the device
        self.arguments = abstract(self.rule, self.shape)
        self.sizes = {name: x.size * x.dtype.itemsize for name, x in self.arguments.items()}
        self.sets = 2 if spec["dry"] else min(4, -(-CACHE // sum(self.sizes.values())))

    def prepare(self, until: float) -> None:
        make = {
            "ours": lambda gradient: self._compile(self.spec["implementation"], gradient),
            "peer": self._compile_peer,
            "xla": lambda gradient: self._compile("chunk", gradient),
        }
        self.pools = pools(self.rule, self.shape, self.sets)
        self.fill = jax.jit(lambda pool, seed: fill(pool, self.shape, seed)).lower(self.pools[0], 0).compile()
        for name in self.spec["contenders"]:
            for gradient in (False, True):
                self._attempt(name, gradient, make[name], until)

    def race(self, until: float) -> None:
        drawn = [self.fill(pool, seed) for seed, pool in enumerate(self.pools)] if self.ready else []
        for gradient in (False, True):
            running, differences = [], {}
            for name in self.spec["contenders"]:
                if (name, gradient) not in self.ready:
                    continue
                if time.time() > until:
                    self._say(name, gradient, "left out", OUT_OF_TIME)
                    continue
                try:
                    new = self._contender(name, gradient, drawn)
                    out = new.call(0)
                    new.wait(out)
                    differences[name] = self._difference(name, gradient, _tail(out))
                    del out
                    new.settle(0.0 if self.spec["dry"] else BATCH_SECONDS)
                    running.append(new)
                except Exception as error:  # noqa: BLE001 - whatever a contender raises is its result
                    self._say(name, gradient, "raised", words(error))
            take_turns(running, 2 if self.spec["dry"] else ROUNDS)
            for c in running:
                more = {
                    "compile_seconds": self.compile_seconds[c.name, gradient],
                    "difference": differences[c.name],
                    "bytes": floors.least_bytes(self.sizes, 2 * int(np.prod(output_shape(self.shape))), gradient),
                    "flops": floors.least_flops(self.shape, gradient),
                    "input_sets": self.sets,
                }
                self._say(c.name, gradient, **c.row(), **more)

    def _difference(self, name: str, gradient: bool, tail: np.ndarray) -> float | None:
        """Of the last outputs from those of ours, which ours leaves for the others, in this process or another."""
        file = Path(self.spec["folder"]) / f"{self.shape} {self.rule} {gradient}.npy"
        if name == "ours":
            np.save(file, tail)
        return None if name == "ours" or not file.exists() else relative_error(tail, np.load(file).astype(np.float64))

    def _contender(self, name: str, gradient: bool, drawn: list[tuple[Arrays, jax.Array]]) -> Contender:
        run = self.ready[name, gradient]
        if name != "peer":
            sets = drawn if gradient else [(x,) for x, _ in drawn]
            return Contender(name, lambda i: run(*sets[i % len(sets)]), jax.block_until_ready)
        run = peers.program(run, drawn[0][1], gradient)
        leaves = [peers.tensors(self.rule, x) for x, _ in drawn]
        with peers.tuning(peers.TUNING, anew=not self.tuned):
            peers.synchronize(run(leaves[0]))
        self.tuned = True
        return Contender(name, lambda i: run(leaves[i % len(leaves)]), peers.synchronize)

    def _compile(self, implementation: str, gradient: bool) -> Any:
        cotangent = jax.ShapeDtypeStruct(output_shape(self.shape), jnp.bfloat16)
        arguments = (self.arguments, cotangent) if gradient else (self.arguments,)
        return jax.jit(program(self.rule, implementation, gradient)).lower(*arguments).compile()

    def _compile_peer(self, gradient: bool) -> Any:
        """By a process first, which can be ended when it takes too long; it leaves what it compiled on disk."""
        run = peers.load(self.rule)
        rows = Path(self.spec["folder"]) / f"{self.shape} {self.rule} warm {gradient}.jsonl"
        spec = json.dumps({**self.spec, "kind": "warm", "gradient": gradient})
        command = [sys.executable, "-m", "benchmarks.gpu.worker", spec, str(rows)]
        left = max(0.0, self.spec["prepare_until"] - time.time())
        subprocess.run(command, stdin=subprocess.DEVNULL, timeout=left, check=False)
        warm(self.rule, self.shape, gradient)
        return run

    def _attempt(self, name: str, gradient: bool, make: Callable[[bool], Any], until: float) -> None:
        start = time.time()
        try:
            if start > until:
                raise TimeoutError
            self.ready[name, gradient] = make(gradient)
            self.compile_seconds[name, gradient] = round(time.time() - start, 2)
        except (TimeoutError, subprocess.TimeoutExpired):
            self._say(name, gradient, "left out", OUT_OF_TIME)
        except peers.NoPeer as reason:
            self._say(name, gradient, "missing", str(reason))
        except Exception as error:  # noqa: BLE001 - whatever a contender raises is its result
            self._say(name, gradient, "raised", words(error))

    def _say(self, name: str, gradient: bool, status: str, reason: str | None = None, **more: Any) -> None:
        key = {"section": "time", "shape": self.spec["shape"], "rule": self.rule}
        which = {"program": PROGRAMS[gradient], "contender": name}
        self.emit({**key, **which, "status": status, **({"reason": reason} if reason else {}), **more})


def warm(rule: str, shape: Shape, gradient: bool) -> None:
    """Compiles a peer's kernels by running them on a short sequence: they do not depend on its length."""
    run = peers.load(rule)
    short = dataclasses.replace(shape, length=min(_POOL, shape.length))
    arguments, cotangent = jax.jit(lambda pool: fill(pool, short, 0))(pools(rule, short, 1)[0])
    with peers.tuning(peers.PREPARING):
        peers.synchronize(peers.program(run, cotangent, gradient)(peers.tensors(rule, arguments)))
    peers.release()


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


def _tail(out: Any) -> np.ndarray:
    """The last tokens of a program's outputs, from either framework."""
    if isinstance(out, tuple):
        out = out[0]
    last = out[-1, -_TAIL:]
    return np.asarray(last.float().cpu().numpy() if hasattr(last, "cpu") else last).astype(np.float32)
