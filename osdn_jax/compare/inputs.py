"""Random inputs for every rule, in the ranges of the papers, and rules as functions from dict to dict."""

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

Arrays = dict[str, Any]  # NumPy or JAX arrays, by the name of the argument or output

_SIZES = {"B": "batch", "T": "length", "H": "heads", "Hk": "key_heads", "K": "key_dim", "V": "value_dim"}
SHAPE_SYNTAX = "B1T4096H4D128 or B=1,T=4096,H=4,K=128,V=128; Hk is optional (default H), D sets K and V"


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a call: q and k are [B, T, Hk, K], v is [B, T, H, V].

    Args:
        batch: B, number of sequences.
        length: T, tokens per sequence.
        heads: H, number of value heads.
        key_heads: Hk, number of key heads; divides H.
        key_dim: K.
        value_dim: V.

    Example:
        >>> str(Shape(1, 4096, 4, 2, 128, 128))
        'B1T4096H4Hk2D128'
    """

    batch: int
    length: int
    heads: int
    key_heads: int
    key_dim: int
    value_dim: int

    def __str__(self) -> str:
        """Format it as the command line reads it."""
        sizes = [("B", self.batch), ("T", self.length), ("H", self.heads)]
        if self.key_heads != self.heads:
            sizes.append(("Hk", self.key_heads))
        same = self.key_dim == self.value_dim
        sizes += [("D", self.key_dim)] if same else [("K", self.key_dim), ("V", self.value_dim)]
        return "".join(f"{name}{size}" for name, size in sizes)

    def sizes(self) -> dict[str, int]:
        """Return the sizes by the letters of the layouts."""
        return {letter: getattr(self, field) for letter, field in _SIZES.items()}


def parse_shapes(text: str) -> list[Shape]:
    """Parse one or more shapes.

    Args:
        text: shapes in the syntax of SHAPE_SYNTAX, separated by commas; each begins with B.

    Returns:
        The shapes, in order.

    Raises:
        ValueError: the text is not a shape; the message says why.

    Example:
        >>> [str(shape) for shape in parse_shapes("B1T64H4D32,B=2,T=8,H=4,Hk=2,K=16,V=32")]
        ['B1T64H4D32', 'B2T8H4Hk2K16V32']
    """
    return [_parse_shape(shape) for shape in re.split(r",(?=B)", text)]


def _parse_shape(text: str) -> Shape:
    found: dict[str, int] = {}
    for field in re.findall(r"Hk=?\d+,?|[A-Z]=?\d+,?|.+", text) or [""]:
        match = re.fullmatch(r"(Hk|[BTHKVD])=?(\d{1,18}),?", field)
        if match is None:
            raise ValueError(f"got {text!r}, cannot read {field!r} in it; expected e.g. {SHAPE_SYNTAX}")
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


# --- the distribution of each argument ------------------------------------------------------------------------------

Draw = Callable[[np.random.Generator, Shape], np.ndarray]


def _unit_keys(rng: np.random.Generator, s: Shape) -> np.ndarray:
    x = rng.normal(size=(s.batch, s.length, s.key_heads, s.key_dim))
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _values(rng: np.random.Generator, s: Shape) -> np.ndarray:
    return rng.normal(size=(s.batch, s.length, s.heads, s.value_dim))


def _state(rng: np.random.Generator, s: Shape) -> np.ndarray:
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
    """Return softplus(token + bias), softplus(bias) log-uniform in (0.001, 0.1): the initialisation of Mamba-2."""
    start = np.exp(rng.uniform(np.log(0.001), np.log(0.1), size=features))
    bias = start + np.log(-np.expm1(-start))
    return np.logaddexp(0, rng.normal(size=(*lead, *features)) + bias)


def _log_decay(rng: np.random.Generator, lead: tuple[int, ...], heads: int, channels: tuple[int, ...]) -> np.ndarray:
    """Return -A dt, A uniform in (1, 16) per head (arXiv 2412.06464, 2510.26692)."""
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
    """Sample log sigmoid(6.9 + token), about log 0.999: Adaptive Preconditioner Forgetting at its initialisation.

    Source: arXiv 2605.13473.
    """

    def draw(rng: np.random.Generator, s: Shape) -> np.ndarray:
        heads = s.heads if of_value_heads else s.key_heads
        return -np.logaddexp(0, -6.9 - 0.5 * rng.normal(size=(s.batch, s.length, heads)))

    return draw


def _initial(of_value_heads: bool, around: float) -> Draw:
    """Sample d_0 near its initial value in training, inside the bounds of its preset."""

    def draw(rng: np.random.Generator, s: Shape) -> np.ndarray:
        heads = s.heads if of_value_heads else s.key_heads
        return around + 0.1 * rng.uniform(size=(heads, s.key_dim))

    return draw


# --- the rules ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ComparedRule:
    """A rule to compare.

    Args:
        function: the rule.
        arguments: the distribution of each array argument.
        options: its static options.
    """

    function: Callable[..., tuple[jax.Array, ops.State]]
    arguments: Mapping[str, Draw]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_READ = {"initial_state": _state, "q": _unit_keys, "k": _unit_keys, "v": _values}
_DELTA = {**_READ, "beta": _gate}
_GATED = {**_DELTA, "log_decay": _scalar_decay}
_CHANNELS = {**_DELTA, "log_decay": _channel_decay}
_GRAM = {"gram_log_decay": _gram_decay, "gram_gain": _key_gate, "center": _center}


def _scaled(function: Callable, arguments: Mapping[str, Draw], preset: str, of_value_heads: bool) -> ComparedRule:
    options = {name: value for name, value in ops.hypergradient_preset(preset).items() if name != "initial"}
    around = 0.0
    if preset == "trust":
        # Forgetting toward 0 would soon hold d at its lower bound, and there a gradient depends only on which token
        # crossed it.
        around = options["anchor"] = 1.0
    draws = {"log_forget": _forget(of_value_heads), "initial": _initial(of_value_heads, around)}
    return ComparedRule(function, {**arguments, **draws}, options)


# exact_pdn is missing: it is a reference itself, in float64 only.
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
_ACTIVATIONS = ("q", "k", "v", "erase_gate", "write_gate")  # in the type of the model; others are at least float32


def has_time(name: str) -> bool:
    """Return True for an argument of shape [B, T, ...]."""
    return name not in _WITHOUT_TIME


def dtype_of(name: str, dtype: str) -> np.dtype:
    """Return the type of an argument or output if the model's type is `dtype`."""
    narrow = dtype == "bfloat16" and name not in (*_ACTIVATIONS, "o")
    return jnp.dtype("float32" if narrow else dtype)


def draw_inputs(rule: str, shape: Shape, dtype: str, seed: int) -> Arrays:
    """Draw the arguments of a rule.

    Args:
        rule: a key of `COMPARED_RULES`.
        shape: the sizes.
        dtype: float64, float32 or bfloat16; with bfloat16, gates and states are float32.
        seed: random seed.

    Returns:
        NumPy arrays by argument, rounded to their types; `initial_state` is the recurrent state alone.

    Example:
        >>> {name: x.shape for name, x in draw_inputs("delta_net", Shape(1, 8, 2, 1, 4, 4), "float32", 0).items()}
        {'initial_state': (1, 2, 4, 4), 'q': (1, 8, 1, 4), 'k': (1, 8, 1, 4), 'v': (1, 8, 2, 4), 'beta': (1, 8, 2)}
    """
    rng = np.random.default_rng(seed)
    return {
        name: draw(rng, shape).astype(dtype_of(name, dtype)) for name, draw in COMPARED_RULES[rule].arguments.items()
    }


_MARKED = {"B": 2, "T": 3, "H": 20, "Hk": 5, "K": 7, "V": 11}  # distinct, so that a size identifies its axis


def input_bytes(rule: str, shape: Shape, dtype: str) -> int:
    """Return the bytes of the arrays that `draw_inputs` would return, without drawing them."""
    sizes = {_MARKED[letter]: size for letter, size in shape.sizes().items()}
    return sum(math.prod(sizes[n] for n in axes) * width for axes, width in _marked_inputs(rule, dtype))


@functools.cache
def _marked_inputs(rule: str, dtype: str) -> list[tuple[tuple[int, ...], int]]:
    marked = Shape(**{field: _MARKED[letter] for letter, field in _SIZES.items()})
    return [(x.shape, x.itemsize) for x in draw_inputs(rule, marked, dtype, 0).values()]


def draw_cotangents(outputs: Mapping[str, Any], dtype: str, seed: int) -> Arrays:
    """Draw cotangents from a normal distribution.

    Args:
        outputs: arrays or shapes by output.
        dtype: type of the model.
        seed: random seed.

    Returns:
        NumPy arrays by output.
    """
    rng = np.random.default_rng([seed, 1])
    return {name: rng.normal(size=x.shape).astype(dtype_of(name, dtype)) for name, x in outputs.items()}


def program(rule: str, implementation: str | None, **options: Any) -> Callable[[Arrays], dict[str, jax.Array]]:
    """Return a rule as a function of a dict of arguments.

    Args:
        rule: a key of `COMPARED_RULES`.
        implementation: its name; None for the automatic choice.
        options: further options of the rule; they override those of `COMPARED_RULES`.

    Returns:
        A function from the arguments to the outputs by name: o, state and, if the rule has one, preconditioner.
        Without `initial_state` among the arguments, it starts from zeros.
    """

    def run(arrays: Arrays) -> dict[str, jax.Array]:
        state = ops.State(arrays["initial_state"]) if "initial_state" in arrays else None
        return call(rule, arrays, state, implementation=implementation, **options)[0]

    return run


def call(rule: str, arrays: Arrays, state: ops.State | None, **options: Any) -> tuple[dict[str, jax.Array], ops.State]:
    """Call a rule; return the outputs by name, and the final state."""
    spec = COMPARED_RULES[rule]
    arguments = {name: x for name, x in arrays.items() if name != "initial_state"}
    o, state = spec.function(**arguments, **{**spec.options, **options}, initial_state=state)
    outputs = {"o": o, "state": state.recurrent}
    if state.preconditioner is not None:
        outputs["preconditioner"] = state.preconditioner
    return outputs, state


def value_and_gradient(run: Callable[[Arrays], Any]) -> Callable[[Arrays, Arrays], tuple[Any, Arrays]]:
    """Return the function (arguments, cotangents of the outputs) -> (outputs, gradients by argument)."""

    def both(arrays: Arrays, cotangents: Arrays) -> tuple[Any, Arrays]:
        outputs, pull = jax.vjp(run, arrays)
        return outputs, pull(cotangents)[0]

    return both
