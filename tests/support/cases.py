"""The cases that every implementation of every operator is tested on."""

import dataclasses
import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from osdn_jax import ops
from support import jit, oracle, random_like, value_and_gradient

IMPLEMENTATIONS = ("scan", "chunk", None)

# Starts of segments, per row: segments of one token, several in a chunk of 16, and some that start with a chunk.
STARTS = ((5, 6, 16, 23, 25, 48), (1, 32, 33, 50, 63, 64, 120))


@dataclasses.dataclass(frozen=True, eq=False)
class Operator:
    """An operator of the package and its oracle, both called by keyword."""

    function: Callable
    oracle: Callable
    outputs: tuple[str, str]  # names of the per-token output and of the state after the last token
    state_argument: str  # name of the argument that takes the state of an earlier call


DELTA = Operator(ops.delta_rule, oracle.delta_rule, ("o", "state"), "initial_state")
HYPERGRADIENT = Operator(ops.hypergradient_preconditioner, oracle.hypergradient, ("d", "final"), "initial")
GRAM = Operator(ops.gram_preconditioner, oracle.gram, ("multiplier", "final"), "initial")
SQUARES = Operator(ops.squares_preconditioner, oracle.squares, ("multiplier", "final"), "initial")


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """Inputs (NumPy, float64) and static options of one call."""

    name: str
    operator: Operator
    arrays: dict
    options: dict
    segment_ids: np.ndarray | None = None
    chunk_size: int | None = 16

    def run(self, implementation, **more):
        """Return a function from the arrays to a dict of the outputs."""
        ids = None if self.segment_ids is None else jnp.asarray(self.segment_ids)
        options = {"segment_ids": ids, "chunk_size": self.chunk_size, **self.options, **more}

        def outputs(x):
            results = self.operator.function(**x, **options, implementation=implementation)
            return dict(zip(self.operator.outputs, results, strict=True))

        return outputs

    def by_oracle(self, **arrays):
        results = self.operator.oracle(**arrays, segment_ids=self.segment_ids, **self.options)
        return dict(zip(self.operator.outputs, results, strict=True))

    @functools.cached_property
    def expected(self):
        return self.by_oracle(**self.arrays)

    @functools.cached_property
    def cotangents(self):
        return random_like(self.expected, seed=1)

    def value_and_gradient(self, implementation, **more):
        return jit(value_and_gradient(self.run(implementation, **more)))(self.arrays, self.cotangents)

    @functools.cached_property
    def by_scan(self):
        """Outputs and gradients of the specification, in float64."""
        return self.value_and_gradient("scan")


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def ids(starts, batch, length):
    """Return segment ids [batch, length]; segments start at token 0 and at the given tokens of each row."""
    marks = np.zeros((batch, length), np.int32)
    for row, tokens in enumerate(starts[i % len(starts)] for i in range(batch)):
        marks[row, [t for t in tokens if t < length]] = 1
    return np.cumsum(marks, axis=1, dtype=np.int32)


def strong_decay(x, rng):
    """Set a third of the log decays to 0 and a third to −20."""
    third = rng.integers(3, size=x["log_decay"].shape)
    x["log_decay"] = np.select([third == 0, third == 1], [0.0, -20.0], x["log_decay"])


def resets(x, rng):
    """Set small log decays with a few full resets among them, in every form that a reset can be written."""
    small = -0.01 * rng.uniform(0.5, 1.5, size=x["log_decay"].shape)
    for token, value in {10: -np.inf, 11: -1e9, 30: -1e6, 40: np.finfo(np.float32).min}.items():
        small[:, token] = value
    x["log_decay"] = small


def many_resets(x, rng):
    """Reset at the first 50 of every 64 tokens (scalar decay) or at 30 % of the elements (channel decay)."""
    log_decay = x["log_decay"]
    small = -0.01 * rng.uniform(0.5, 1.5, size=log_decay.shape)
    reset = rng.uniform(size=log_decay.shape) < 0.3 if log_decay.ndim == 4 else np.zeros(log_decay.shape, bool)
    if log_decay.ndim == 3:
        reset[:, np.arange(log_decay.shape[1]) % 64 < 50] = True
    x["log_decay"] = np.where(reset, -np.inf, small)


def only_resets(x, rng):
    x["log_decay"] = np.full(x["log_decay"].shape, -np.inf)


RESETS = {"a few resets": resets, "many resets": many_resets, "only resets": only_resets}


def growth(x, rng):
    x["log_decay"] = rng.uniform(-0.2, 0.1, size=x["log_decay"].shape)


def delta(
    name,
    *,
    length=57,
    key_heads=2,
    heads=4,
    decay=None,
    write_key=None,
    packed=False,
    initial=True,
    change=None,
    chunk_size=16,
    batch=2,
    key_dim=8,
    value_dim=6,
    seed=0,
    **options,
):
    """Return a case of the delta rule.

    decay is None, "scalar" or "channel"; write_key is None or the heads it has, "key" or "value"; change edits the
    arrays.
    """
    rng = np.random.default_rng(seed)
    lead = (batch, length)
    x = {
        "q": rng.normal(size=(*lead, key_heads, key_dim)),
        "k": unit(rng.normal(size=(*lead, key_heads, key_dim))),
        "v": rng.normal(size=(*lead, heads, value_dim)),
        "beta": rng.uniform(size=(*lead, heads)),
    }
    if write_key is not None:
        shape = (*lead, key_heads if write_key == "key" else heads, key_dim)
        x["write_key"] = rng.uniform(0.5, 1.5, size=shape) * np.repeat(x["k"], shape[2] // key_heads, axis=2)
    if decay is not None:
        x["log_decay"] = -rng.uniform(0, 0.3, size=(*lead, heads) if decay == "scalar" else (*lead, heads, key_dim))
    if initial:
        x["initial_state"] = rng.normal(size=(batch, heads, key_dim, value_dim))
    if change is not None:
        change(x, rng)
    return Case(name, DELTA, x, options, ids(STARTS, batch, length) if packed else None, chunk_size)


def hypergradient(
    name,
    *,
    eta,
    length=57,
    beta=False,
    forget=False,
    initial=None,
    anchor=None,
    restart=None,
    packed=False,
    key_norm=1.0,
    chunk_size=16,
    batch=2,
    heads=3,
    key_dim=8,
    seed=0,
    **options,
):
    """Return a case of the hypergradient preconditioner.

    initial, anchor and restart are None, a number, or ("head" or "batch", lowest, highest) for random arrays; eta is a
    number, or (lowest, highest) for an array.
    """
    rng = np.random.default_rng(seed)
    x = {"k": key_norm * unit(rng.normal(size=(batch, length, heads, key_dim)))}
    if beta:
        x["beta"] = rng.uniform(size=(batch, length, heads))
    if forget:
        x["log_forget"] = -rng.uniform(0, 0.1, size=(batch, length, heads))
    starts = {"initial": initial, "anchor": anchor, "restart": restart}
    add_starts(x, options, rng, starts, (batch, heads, key_dim))
    if isinstance(eta, tuple):
        x["eta"] = rng.uniform(*eta, size=heads)
    else:
        options["eta"] = eta
    return Case(name, HYPERGRADIENT, x, options, ids(STARTS, batch, length) if packed else None, chunk_size)


def gram(
    name,
    *,
    length=57,
    initial=True,
    center=None,
    log_squash=None,
    packed=False,
    change=None,
    chunk_size=16,
    batch=2,
    heads=3,
    key_dim=8,
    seed=0,
    **options,
):
    """Return a case of the Gram preconditioner.

    center is a number, or None for an array; log_squash None, or (lowest, highest) for an array.
    """
    rng = np.random.default_rng(seed)
    x = {
        "k": rng.normal(size=(batch, length, heads, key_dim)),
        "log_decay": -rng.uniform(0, 0.3, size=(batch, length, heads)),
        "gain": rng.uniform(size=(batch, length, heads)),
    }
    if center is None:
        x["center"] = rng.normal(size=heads)
    else:
        options["center"] = center
    if initial:
        x["initial"] = rng.uniform(0, 2, size=(batch, heads, key_dim))
    if log_squash is not None:
        x["log_squash"] = rng.uniform(*log_squash, size=heads)
    if change is not None:
        change(x, rng)
    return Case(name, GRAM, x, options, ids(STARTS, batch, length) if packed else None, chunk_size)


def squares(name, *, length=57, initial=None, restart=None, packed=False, chunk_size=16, batch=2, heads=3, key_dim=8,
            seed=0, **options):  # fmt: skip
    """Return a case of a preconditioner of squared keys; initial and restart as for `hypergradient`."""
    rng = np.random.default_rng(seed)
    x = {"k": unit(rng.normal(size=(batch, length, heads, key_dim)))}
    add_starts(x, options, rng, {"initial": initial, "restart": restart}, (batch, heads, key_dim))
    return Case(name, SQUARES, x, options, ids(STARTS, batch, length) if packed else None, chunk_size)


def add_starts(x, options, rng, values, shape):
    """Add random arrays to x, for values ("head" or "batch", lowest, highest), and numbers to options."""
    for argument, value in values.items():
        if isinstance(value, tuple):
            x[argument] = rng.uniform(*value[1:], size=shape if value[0] == "batch" else shape[1:])
        elif value is not None:
            options[argument] = value


TRUST = {"beta": True, "forget": True, "eta": 0.5, "bounds": (2 / 3, 3 / 2), "initial": ("batch", 0.7, 1.4)}

CASES = [
    delta("delta: no tokens", length=0, decay="channel", packed=True),
    delta("delta: one token", length=1, decay="scalar", write_key="value", packed=True),
    delta("delta: no options", length=63, key_heads=2, heads=2, initial=False),
    delta("delta: write key per value head", length=200, write_key="value", packed=True),
    delta("delta: scalar decay, defaults", length=64, decay="scalar", initial=False, chunk_size=None),
    delta("delta: scalar decay, write key per key head", length=65, decay="scalar", write_key="key", packed=True),
    delta("delta: scalar decay, write key per value head", decay="scalar", write_key="value", scale=0.7, chunk_size=24),
    delta("delta: channel decay", length=65, decay="channel", key_heads=1, heads=3, packed=True, chunk_size=None),
    delta("delta: channel decay, write key per value head", decay="channel", write_key="value", packed=True),
    delta("delta: channel growth", length=63, decay="channel", key_heads=2, heads=2, change=growth, chunk_size=7),
    delta("delta: no erase, scalar decay", length=64, decay="scalar", erase=False, packed=True, chunk_size=24),
    delta("delta: no erase, channel decay, write key", length=200, decay="channel", write_key="key", erase=False),
    delta("delta: scalar decays of 0 and -20", decay="scalar", packed=True, change=strong_decay, chunk_size=100),
    delta("delta: channel decays of 0 and -20", decay="channel", write_key="key", packed=True, change=strong_decay),
    hypergradient("hypergradient: no tokens", length=0, packed=True, **TRUST),
    hypergradient("hypergradient: one token", length=1, packed=True, **TRUST),
    hypergradient("hypergradient: paper", length=63, eta=1.0, bounds=(0.0, 1e9)),
    hypergradient("hypergradient: unbounded", length=200, beta=True, eta=0.5, initial=("head", 0.5, 1.5), packed=True),
    hypergradient("hypergradient: trust", length=64, chunk_size=None, **TRUST),
    hypergradient(
        "hypergradient: all options", length=65, **TRUST, anchor=("head", 0.5, 1.5), restart=("batch", 0.3, 2),
        packed=True, normalize=True,
    ),
    hypergradient("hypergradient: eta per head", length=65, **TRUST | {"eta": (0.1, 0.6)}, packed=True),
    hypergradient(
        "hypergradient: scalar options", forget=True, anchor=1.0, restart=0.3, initial=0.1, eta=0.3, packed=True,
        chunk_size=24,
    ),
    gram("gram: no tokens", length=0, packed=True),
    gram("gram: one token", length=1, packed=True),
    gram("gram: packed", length=200, packed=True),
    gram("gram: from zeros", length=63, initial=False, center=-0.2, squash=2.5, chunk_size=7),
    gram("gram: defaults", length=64, chunk_size=None),
    gram("gram: decays of 0 and -20", length=65, packed=True, change=strong_decay),
    gram("gram: squash per head", length=65, packed=True, log_squash=(-0.3, 0.7)),
    squares("squares: no tokens", length=0, packed=True),
    squares("squares: one token", length=1, packed=True, initial=("head", 0.5, 1.5)),
    squares("squares: sum", length=65, packed=True, initial=("batch", 0.5, 1.5), restart=("head", 0.5, 1.5)),
    squares("squares: sum from zeros", length=63, chunk_size=None),
    squares("squares: average", length=200, packed=True, average=0.9, initial=("batch", 0.1, 0.3), restart=0.2),
    squares("squares: normalized average", length=64, average=0.5, normalize=True, initial=0.1, packed=True),
]  # fmt: skip
NAMED = {case.name: case for case in CASES}
