"""flash-linear-attention's functions beside the rules, where it is installed."""

import contextlib
import dataclasses
import gc
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax

from osdn_jax.comparison.inputs import Arrays

_DELTA = {"q": "q", "k": "k", "v": "v", "beta": "beta"}
_GRAM = {"g_atk": "gram_log_decay", "beta_atk": "gram_gain", "log_atk_scale": "center"}

# Milliseconds of warm-up and of measurement for each configuration that Triton's autotuner tries.
PREPARING, TUNING = (1, 1), (5, 20)


@dataclasses.dataclass(frozen=True)
class Peer:
    """A function, which of our arguments each of its own is, and its static options."""

    module: str
    function: str
    arguments: Mapping[str, str]
    options: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"use_qk_l2norm_in_kernel": False})
    note: str = ""


PEERS = {
    "delta_net": Peer("fla.ops.delta_rule", "chunk_delta_rule", _DELTA),
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
    ),
}


class NoPeer(Exception):
    """There is nothing to measure; the message says why."""


def load(rule: str) -> Callable[[dict[str, Any]], Any]:
    """The peer of a rule as a function from our arguments, as PyTorch tensors, to its outputs [B, T, H, V].

    Raises:
        NoPeer: the rule has none, it is not installed, or it takes other arguments than those known here.
    """
    if rule not in PEERS:
        raise NoPeer("flash-linear-attention has no such rule")
    peer = PEERS[rule]
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
    """Our arguments as leaves of PyTorch's autograd, over the same device memory."""
    torch = importlib.import_module("torch")
    jax.block_until_ready(arrays)
    names = PEERS[rule].arguments.values()
    return {name: torch.from_dlpack(arrays[name]).detach().requires_grad_() for name in names}


def program(run: Callable[[dict[str, Any]], Any], cotangent: jax.Array, gradient: bool) -> Callable[[Any], Any]:
    """A forward pass without autograd, or a forward and backward pass to every argument."""
    torch = importlib.import_module("torch")
    pulled = torch.from_dlpack(cotangent)

    def forward(x: dict[str, Any]) -> Any:
        with torch.no_grad():
            return run(x)

    def both(x: dict[str, Any]) -> Any:
        out = run(x)
        torch.autograd.grad(out, list(x.values()), pulled, allow_unused=True)
        return out.detach()

    return both if gradient else forward


def synchronize(out: Any) -> None:
    """Waits for the device."""
    if out.is_cuda:
        importlib.import_module("torch").cuda.synchronize()


def release() -> None:
    """Gives PyTorch's unused device memory back: other processes need it."""
    importlib.import_module("torch").cuda.empty_cache()


@contextlib.contextmanager
def tuning(milliseconds: tuple[int, int], *, anew: bool = False):
    """Triton's autotuner takes so much time for each configuration inside (its own: 25 and 100 ms).

    anew forgets what it chose before, without compiling again: a choice made while other programs used the device
    would be unfair to the peer.
    """
    try:
        testing, autotuner = (importlib.import_module(n) for n in ("triton.testing", "triton.runtime.autotuner"))
    except ImportError:
        yield
        return
    for thing in gc.get_objects():
        if issubclass(type(thing), autotuner.Autotuner):
            thing.__dict__.pop("do_bench", None)  # it keeps the function that is replaced here
            if anew:
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
