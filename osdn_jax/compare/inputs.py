"""Random inputs for every rule, in the ranges of the papers, and each rule as a function from one dict to another."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from osdn_jax import ops

Arrays = dict[str, Any]  # of NumPy or JAX arrays, by the name of the rule's argument (or output)

_SIZES = {"B": "batch", "T": "length", "H": "heads", "Hk": "key_heads", "K": "key_dim", "V": "value_dim"}
SHAPE_SYNTAX = "B1T4096H4D128 or B=1,T=4096,H=4,K=128,V=128, Hk (default H) at will, D for K = V"


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a call: q and k are [B, T, Hk, K], v is [B, T, H, V]."""

    batch: int
    length: int
    heads: int
    key_heads: int
    key_dim: int
    value_dim: int

    def __str__(self) -> str:
        """As the command line takes it."""
        sizes = [("B", self.batch), ("T", self.length), ("H", self.heads)]
        if self.key_heads != self.heads:
            sizes.append(("Hk", self.key_heads))
        same = self.key_dim == self.value_dim
        sizes += [("D", self.key_dim)] if same else [("K", self.key_dim), ("V", self.value_dim)]
        return "".join(f"{name}{size}" for name, size in sizes)

    def sizes(self) -> dict[str, int]:
        """By the letters of the layouts."""
        return {letter: getattr(self, field) for letter, field in _SIZES.items()}


def parse_shapes(text: str) -> list[Shape]:
    """Shapes from text, several of them separated by commas, each from its B on: see SHAPE_SYNTAX.

    Raises:
        ValueError: the text is no shape; the message says what is wrong with it.
    """
    return [_parse_shape(part) for part in re.split(r",(?=B)", text)]


def _parse_shape(text: str) -> Shape:
    found: dict[str, int] = {}
    for part in re.findall(r"Hk=?\d+,?|[A-Z]=?\d+,?|.+", text) or [""]:
        match = re.fullmatch(r"(Hk|[BTHKVD])=?(\d{1,18}),?", part)
        if match is None:
            raise ValueError(f"got {text!r}, cannot read {part!r} in it; expected e.g. {SHAPE_SYNTAX}")
        name, size = match[1], int(match[2])
        if name in found:
            raise ValueError(f"got {text!r}, which gives {name} twice")
        if size < 1:
            raise ValueError(f"got {text!r} with {name} = {size}, expected at least 1")
        found[name] = size
    if "D" in found:
        if "K" in found or "V" in found:
            raise ValueError(f"got {text!r}, expected either D or K and V")
        found["K"] = found["V"] = found.pop("D")
    missing = [name for name in ("B", "T", "H", "K", "V") if name not in found]
    if missing:
        raise ValueError(f"got {text!r}, without {', '.join(missing)}; expected e.g. {SHAPE_SYNTAX}")
    found.setdefault("Hk", found["H"])
    if found["H"] % found["Hk"]:
        raise ValueError(f"got {text!r}, expected an H that is a multiple of Hk")
    return Shape(**{field: found[letter] for letter, field in _SIZES.items()})


# --- what each argument is drawn from -------------------------------------------------------------------------------

Draw = Callable[[np.random.Generator, Shape], np.ndarray]


def _unit_keys(rng: np.random.Generator, s: Shape) -> np.ndarray:
    x = rng.normal(size=(s.batch, s.length, s.key_heads, s.key_dim))
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _values(rng: np.random.Generator, s: Shape) -> np.ndarray:
    return rng.normal(size=(s.batch, s.length, s.heads, s.value_dim))


def _memory(rng: np.random.Generator, s: Shape) -> np.ndarray:
    return rng.normal(size=(s.batch, s.heads, s.key_dim, s.value_dim))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _gate(rng: np.random.Generator, s: Shape) -> np.ndarray:
    return _sigmoid(rng.normal(size=(s.batch, s.length, s.heads)))


def _key_gate(rng: np.random.Generator, s: Shape) -> np.ndarray:
    return _sigmoid(rng.normal(size=(s.batch, s.length, s.key_heads)))


def _erase_gate(rng: np.random.Generator, s: Shape) -> np.ndarray:
    return _sigmoid(rng.normal(size=(s.batch, s.length, s.key_heads, s.key_dim)))


def _write_gate(rng: np.random.Generator, s: Shape) -> np.ndarray:
    return _sigmoid(rng.normal(size=(s.batch, s.length, s.heads, s.value_dim)))


def _time_steps(rng: np.random.Generator, lead: tuple[int, ...], features: tuple[int, ...]) -> np.ndarray:
    """softplus(token + bias), softplus(bias) being log-uniform in (0.001, 0.1): as Mamba-2 and its heirs start."""
    start = np.exp(rng.uniform(np.log(0.001), np.log(0.1), size=features))
    bias = start + np.log(-np.expm1(-start))
    return np.logaddexp(0, rng.normal(size=(*lead, *features)) + bias)


def _log_decay(rng: np.random.Generator, lead: tuple[int, ...], heads: int, channels: tuple[int, ...]) -> np.ndarray:
    """-A dt, A uniform in (1, 16) per head (arXiv 2412.06464, 2510.26692)."""
    rate = rng.uniform(1, 16, size=(heads, *[1] * len(channels)))
    return -rate * _time_steps(rng, lead, (heads, *channels))


def _time_step(rng: np.random.Generator, s: Shape) -> np.ndarray:
    return _time_steps(rng, (s.batch, s.length), (s.heads,))


def _scalar_decay(rng: np.random.Generator, s: Shape) -> np.ndarray:
    return _log_decay(rng, (s.batch, s.length), s.heads, ())


def _channel_decay(rng: np.random.Generator, s: Shape) -> np.ndarray:
    return _log_decay(rng, (s.batch, s.length), s.heads, (s.key_dim,))


def _gram_decay(rng: np.random.Generator, s: Shape) -> np.ndarray:
    return _log_decay(rng, (s.batch, s.length), s.key_heads, ())


def _center(rng: np.random.Generator, s: Shape) -> np.ndarray:
    return -0.2 + 0.1 * rng.normal(size=(s.key_heads,))


def _forget(of_value_heads: bool) -> Draw:
    """log sigmoid(6.9 + token): 0.999, as Adaptive Preconditioner Forgetting starts (arXiv 2605.13473)."""

    def draw(rng: np.random.Generator, s: Shape) -> np.ndarray:
        heads = s.heads if of_value_heads else s.key_heads
        return -np.logaddexp(0, -6.9 - 0.5 * rng.normal(size=(s.batch, s.length, heads)))

    return draw


def _start(of_value_heads: bool, around: float) -> Draw:
    """d_0 near what it is learned from, and inside the bounds of its preset."""

    def draw(rng: np.random.Generator, s: Shape) -> np.ndarray:
        heads = s.heads if of_value_heads else s.key_heads
        return around + 0.1 * rng.uniform(size=(heads, s.key_dim))

    return draw


# --- the rules ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ComparedRule:
    """A rule, what its array arguments are drawn from, and its static options."""

    function: Callable[..., tuple[jax.Array, ops.State]]
    arguments: Mapping[str, Draw]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_READ = {"initial_state": _memory, "q": _unit_keys, "k": _unit_keys, "v": _values}
_DELTA = {**_READ, "beta": _gate}
_GATED = {**_DELTA, "log_decay": _scalar_decay}
_CHANNELS = {**_DELTA, "log_decay": _channel_decay}
_GRAM = {"gram_log_decay": _gram_decay, "gram_gain": _key_gate, "center": _center}


def _scaled(function: Callable, arguments: Mapping[str, Draw], preset: str, of_value_heads: bool) -> ComparedRule:
    options = {name: value for name, value in ops.hypergradient_preset(preset).items() if name != "initial"}
    around = 0.0
    if preset == "trust":
        # Forgetting toward 0 would soon hold d at its lower bound, where a gradient compares nothing but which token
        # crossed it.
        around = options["anchor"] = 1.0
    draws = {"log_forget": _forget(of_value_heads), "initial": _start(of_value_heads, around)}
    return ComparedRule(function, {**arguments, **draws}, options)


# The float64-only exact_pdn is not here: it is a reference itself.
COMPARED_RULES: dict[str, ComparedRule] = {
    "delta_net": ComparedRule(ops.delta_net, _DELTA),
    "gated_delta_net": ComparedRule(ops.gated_delta_net, _GATED),
    "kda": ComparedRule(ops.kda, _CHANNELS),
    "gdn2": ComparedRule(
        ops.gdn2, {**_READ, "erase_gate": _erase_gate, "write_gate": _write_gate, "log_decay": _channel_decay}
    ),
    "linear_attention": ComparedRule(ops.linear_attention, _READ),
    "mamba2": ComparedRule(ops.mamba2, {**_READ, "beta": _time_step, "log_decay": _scalar_decay}),
    "gla": ComparedRule(ops.gla, {**_READ, "log_decay": _channel_decay}),
    "osdn": _scaled(ops.osdn, _DELTA, "paper", False),
    "os_gdn": _scaled(ops.os_gdn, _GATED, "paper", True),
    "os_kda": _scaled(ops.os_kda, _CHANNELS, "paper", True),
    "osdn_trust": _scaled(ops.osdn, _DELTA, "trust", False),
    "os_gdn_trust": _scaled(ops.os_gdn, _GATED, "trust", True),
    "os_kda_trust": _scaled(ops.os_kda, _CHANNELS, "trust", True),
    "pdn": ComparedRule(ops.pdn, {**_DELTA, **_GRAM}),
    "pgdn": ComparedRule(ops.pgdn, {**_GATED, **_GRAM}),
    "pkda": ComparedRule(ops.pkda, {**_CHANNELS, **_GRAM}),
}

_WITHOUT_TIME = ("initial_state", "initial", "center")
_ACTIVATIONS = ("q", "k", "v", "erase_gate", "write_gate")  # in the type of the model; all else at least float32


def has_time(name: str) -> bool:
    """Whether an argument is [B, T, ...]."""
    return name not in _WITHOUT_TIME


def dtype_of(name: str, dtype: str) -> np.dtype:
    """The type of an argument, or of an output, in a call of a type."""
    narrow = dtype == "bfloat16" and name not in (*_ACTIVATIONS, "o")
    return jnp.dtype("float32" if narrow else dtype)


def draw_inputs(rule: str, shape: Shape, dtype: str, seed: int) -> Arrays:
    """NumPy arrays by argument, rounded to their types. `initial_state` is the memory alone."""
    rng = np.random.default_rng(seed)
    return {
        name: draw(rng, shape).astype(dtype_of(name, dtype)) for name, draw in COMPARED_RULES[rule].arguments.items()
    }


_MARKED = {"B": 2, "T": 3, "H": 20, "Hk": 5, "K": 7, "V": 11}  # sizes that tell which of them an axis has


def input_bytes(rule: str, shape: Shape, dtype: str) -> int:
    """Bytes of what `draw_inputs` draws, without drawing it."""
    sizes = {_MARKED[letter]: size for letter, size in shape.sizes().items()}
    return sum(math.prod(sizes[n] for n in axes) * width for axes, width in _marked_inputs(rule, dtype))


@functools.cache
def _marked_inputs(rule: str, dtype: str) -> list[tuple[tuple[int, ...], int]]:
    marked = Shape(**{field: _MARKED[letter] for letter, field in _SIZES.items()})
    return [(x.shape, x.itemsize) for x in draw_inputs(rule, marked, dtype, 0).values()]


def draw_cotangents(outputs: Mapping[str, Any], dtype: str, seed: int) -> Arrays:
    """Normal numbers in the shapes of the outputs."""
    rng = np.random.default_rng([seed, 1])
    return {name: rng.normal(size=x.shape).astype(dtype_of(name, dtype)) for name, x in outputs.items()}


def program(rule: str, implementation: str | None, **options: Any) -> Callable[[Arrays], dict[str, jax.Array]]:
    """A rule as a function from a dict of arguments to the dict of its outputs: o, memory and preconditioner.

    Further options of the rule go before those of COMPARED_RULES.
    """

    def run(arrays: Arrays) -> dict[str, jax.Array]:
        state = ops.State(arrays["initial_state"])
        return call(rule, arrays, state, implementation=implementation, **options)[0]

    return run


def call(rule: str, arrays: Arrays, state: ops.State, **options: Any) -> tuple[dict[str, jax.Array], ops.State]:
    """The outputs by name, and the state to go on from."""
    spec = COMPARED_RULES[rule]
    arguments = {name: x for name, x in arrays.items() if name != "initial_state"}
    o, state = spec.function(**arguments, **{**spec.options, **options}, initial_state=state)
    outputs = {"o": o, "memory": state.memory}
    if state.preconditioner is not None:
        outputs["preconditioner"] = state.preconditioner
    return outputs, state


def value_and_gradient(run: Callable[[Arrays], Any]) -> Callable[[Arrays, Arrays], tuple[Any, Arrays]]:
    """A program (arguments, cotangents of the outputs) -> (outputs, gradients by argument)."""

    def both(arrays: Arrays, cotangents: Arrays) -> tuple[Any, Arrays]:
        outputs, pull = jax.vjp(run, arrays)
        return outputs, pull(cotangents)[0]

    return both
