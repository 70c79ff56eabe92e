"""Functions of flash-linear-attention that correspond to our rules (all of them are in the package fla-core)."""

import contextlib
import dataclasses
import gc
import importlib
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from osdn_jax._errors import joined_lines
from osdn_jax.compare import Shape
from osdn_jax.compare.inputs import Arrays

_DELTA = {"q": "q", "k": "k", "v": "v", "beta": "beta"}
_GRAM = {"g_atk": "gram_log_decay", "beta_atk": "gram_gain", "log_atk_scale": "center"}

# Milliseconds of warm-up and measurement for each configuration that Triton's autotuner tries.
PREPARING, TUNING = (1, 1), (5, 20)


@dataclasses.dataclass(frozen=True)
class Peer:
    """A function, our name for each of its arguments, and its static options."""

    module: str
    function: str
    arguments: Mapping[str, str]
    options: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"use_qk_l2norm_in_kernel": False})
    note: str = ""
    groups: bool = True  # supports fewer key heads than value heads
    normalizes: bool = False  # q and k, regardless of the options


PEERS = {
    "delta_net": Peer("fla.ops.delta_rule", "chunk_delta_rule", _DELTA, groups=False),
    "gated_delta_net": Peer("fla.ops.gated_delta_rule", "chunk_gated_delta_rule", {**_DELTA, "g": "log_decay"}),
    "kda": Peer(
        "fla.ops.kda", "chunk_kda", {**_DELTA, "g": "log_decay"}, note="safe_gate off: the decays have no bound"
    ),
    "pgdn": Peer(
        "fla.ops.precond_gated_delta_rule", "chunk_precond_gated_delta_rule", {**_DELTA, **_GRAM, "g": "log_decay"}
    ),
    "pkda": Peer(
        "fla.ops.precond_kda",
        "chunk_precond_kda",
        {**_DELTA, **_GRAM, "g": "log_decay"},
        options={},
        note="it always normalises q and k, which ours are already",
        groups=False,
        normalizes=True,
    ),
}


_CACHE = "TRITON_CACHE_DIR"
_CACHE_AT_START = os.environ.get(_CACHE)  # jax-triton deletes it as it is imported

NO_PEER = "flash-linear-attention has no such rule"
# The message of version 0.6.0 in the backward pass of its gated rules, and its meaning in one line.
_REFUSAL = "on Hopper GPUs produces incorrect results for gated chunk_bwd_dqkwg"
_WHY_REFUSED = (
    "flash-linear-attention refuses its gated backward pass on Hopper with Triton 3.4 to 3.7.0 (here {triton}) "
    "without tilelang"
)


class NoPeer(Exception):
    """There is no peer to measure; the message says why."""


def load(rule: str, shape: Shape | None = None) -> Callable[[dict[str, Any]], Any]:
    """Return the peer of a rule as a function from our arguments, as PyTorch tensors, to its outputs [B, T, H, V].

    Raises:
        NoPeer: the rule has none, it is not installed, or it has other arguments than those listed in PEERS.
    """
    if rule not in PEERS:
        raise NoPeer(NO_PEER)
    peer = PEERS[rule]
    if _CACHE_AT_START is not None:  # the stage that compiled the peers had it
        os.environ[_CACHE] = _CACHE_AT_START
    if shape is not None and shape.heads != shape.key_heads and not peer.groups:
        raise NoPeer(f"{peer.module}.{peer.function} takes as many key heads as value heads only")
    try:
        function = getattr(importlib.import_module(peer.module), peer.function)
        importlib.import_module("torch")
    except (ImportError, AttributeError) as error:
        raise NoPeer(f"{peer.module}.{peer.function}: {type(error).__name__}: {error}") from error
    options = {**peer.options, "output_final_state": False}
    parameters = inspect.signature(function).parameters
    unknown = sorted({*peer.arguments, *options} - set(parameters))
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise NoPeer(f"{peer.module}.{peer.function} takes no {', '.join(unknown)}")
    return lambda x: function(**{theirs: x[ours] for theirs, ours in peer.arguments.items()}, **options)[0]


def tensors(rule: str, arrays: Arrays) -> dict[str, Any]:
    """Return our arguments as leaves of PyTorch's autograd that share the device memory."""
    torch = importlib.import_module("torch")
    jax.block_until_ready(arrays)
    names = PEERS[rule].arguments.values()
    return {name: torch.from_dlpack(arrays[name]).detach().requires_grad_() for name in names}


def program(run: Callable[[dict[str, Any]], Any], cotangent: jax.Array, gradient: bool) -> Callable[[Any], Any]:
    """Return a forward pass without autograd -> outputs, or forward and backward -> (outputs, gradients by name)."""
    torch = importlib.import_module("torch")
    pulled = torch.from_dlpack(cotangent)

    def forward(x: dict[str, Any]) -> Any:
        with torch.no_grad():
            return run(x)

    def both(x: dict[str, Any]) -> Any:
        out = run(x)
        gradients = torch.autograd.grad(out, list(x.values()), pulled, allow_unused=True)
        return out.detach(), dict(zip(x, gradients, strict=True))

    return both if gradient else forward


def as_jax(x: Any) -> jax.Array | None:
    """Return a PyTorch tensor as an array that shares its memory; None for a missing gradient."""
    return None if x is None else jnp.from_dlpack(x.detach().contiguous())


def along_sphere(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """Return the gradient with respect to x of a function of x / ‖x‖, given that with respect to x / ‖x‖."""
    x, gradient = x.astype(jnp.float32), gradient.astype(jnp.float32)
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    unit = x / norm
    return (gradient - unit * jnp.sum(unit * gradient, axis=-1, keepdims=True)) / norm


def refusal(error: BaseException) -> str | None:
    """Return a short reason if an exception is the peer's refusal to give wrong results on this device, else None."""
    if not isinstance(error, RuntimeError) or _REFUSAL not in joined_lines(error):
        return None
    return _WHY_REFUSED.format(triton=importlib.import_module("triton").__version__)


def synchronize(out: Any) -> None:
    """Wait for the device."""
    if (out[0] if isinstance(out, tuple) else out).is_cuda:
        importlib.import_module("torch").cuda.synchronize()


def release() -> None:
    """Free PyTorch's unused device memory, which other processes need."""
    importlib.import_module("torch").cuda.empty_cache()


@contextlib.contextmanager
def tuning(milliseconds: tuple[int, int], *, forget: bool = False):
    """Set the time that Triton's autotuner spends on each configuration.

    Args:
        milliseconds: of warm-up and of measurement; Triton's defaults are 25 and 100.
        forget: drop earlier choices, without compiling again: a choice made while other programs used the device would
            be unfair to the peer.
    """
    try:
        testing, autotuner = (importlib.import_module(n) for n in ("triton.testing", "triton.runtime.autotuner"))
    except ImportError:
        yield
        return
    for thing in gc.get_objects():
        if issubclass(type(thing), autotuner.Autotuner):
            thing.__dict__.pop("do_bench", None)  # a cached reference to the function that is replaced below
            if forget:
                thing.cache.clear()
    original = testing.do_bench
    warmup, rep = milliseconds

    def do_bench(fn: Callable, quantiles: Any = None, **rest: Any) -> Any:
        return original(fn, **{**rest, "warmup": warmup, "rep": rep}, quantiles=quantiles)

    testing.do_bench = do_bench
    try:
        yield
    finally:
        testing.do_bench = original
