"""Check the arguments of the delta rule and convert them to a `DeltaRuleCall`."""

from typing import Any

import jax
import jax.numpy as jnp

from osdn_jax.ops import checks
from osdn_jax.ops.calls import DeltaRuleCall


def call_axes(call: DeltaRuleCall) -> Any:
    """Return a letter for each axis of each argument, for `shards.over_shards`; without t for a single step."""
    time = "t" if call.q.ndim == 4 else ""
    keys, gates = f"b{time}gk", f"b{time}h"
    per_value_head = call.w is not None and call.w.shape[-2] == call.v.shape[-2]
    by_channel = call.log_decay is not None and call.log_decay.ndim == call.q.ndim
    letters: dict[str, str | None] = {
        "state": "bhkv",
        "q": keys,
        "k": keys,
        "w": None if call.w is None else f"{gates}k" if per_value_head else keys,
        "v": f"{gates}v",
        "beta": gates,
        "log_decay": None if call.log_decay is None else f"{gates}k" if by_channel else gates,
        "resets": None if call.resets is None else "bt",
    }
    return call._replace(**letters)  # type: ignore[arg-type]  # letters in place of arrays


def call_names(call: DeltaRuleCall) -> list[str]:
    """Return the public names of the arguments that are not None, in the order of the call's leaves."""
    state = "initial_state" if call.q.ndim == 4 else "state"  # of `delta_rule` or `delta_rule_step`
    names = {"state": state, "w": "write_key", "resets": "segment_ids"}
    return [names.get(field, field) for field, x in call._asdict().items() if x is not None]


def check_call(
    q: Any,
    k: Any,
    v: Any,
    beta: Any,
    write_key: Any,
    log_decay: Any,
    initial_state: Any,
    segment_ids: Any,
    *,
    time: bool = True,
    context_axis: str | None = None,
) -> DeltaRuleCall:
    """Check shapes and types of a sequence, or of one token if time is False.

    Raises:
        ValueError: a shape does not fit the others.
        TypeError: an argument is not an array of the expected type.
    """
    lead, axes = ("B, T, ", 2) if time else ("B, ", 1)
    q, k, v = checks.tokens(q, k, v, time=time)
    leading, (key_heads, key_dim), (heads, value_dim) = q.shape[:axes], q.shape[axes:], v.shape[axes:]
    beta = checks.shaped_array("beta", beta, (*leading, heads), f"[{lead}H]")
    if write_key is not None:
        shapes = [(*leading, n, key_dim) for n in (key_heads, heads)]
        write_key = checks.shaped_array("write_key", write_key, shapes, f"[{lead}Hk or H, K]")
    if log_decay is not None:
        shapes = [(*leading, heads), (*leading, heads, key_dim)]
        log_decay = checks.shaped_array("log_decay", log_decay, shapes, f"[{lead}H] or [{lead}H, K]")
    shape = (leading[0], heads, key_dim, value_dim)
    if initial_state is not None:
        name = "initial_state" if time else "state"
        initial_state = checks.shaped_array(name, initial_state, shape, "[B, H, K, V]")
    dtype = checks.accumulator_dtype(q, k, v, beta, write_key, log_decay, initial_state)
    state = jnp.zeros(shape, dtype) if initial_state is None else initial_state.astype(dtype)
    resets = None
    if segment_ids is not None:
        resets = checks.resets(checks.segment_ids(segment_ids, leading), context_axis)
    return DeltaRuleCall(
        checks.varying_like(state, q, k, v, beta, write_key, log_decay, resets),
        q,
        k,
        write_key,
        v,
        beta.astype(dtype),
        None if log_decay is None else log_decay.astype(dtype),
        resets,
    )


def resolve_scale(scale: Any, key_dim: int) -> float:
    """Return the factor on the output, K^-1/2 if scale is None.

    Raises:
        TypeError, ValueError: scale is not a finite static number.
    """
    return key_dim**-0.5 if scale is None else checks.number("scale", scale)


def per_value_head(x: jax.Array, heads: int, axis: int) -> jax.Array:
    """Repeat key heads so that key head h serves value heads h * H / Hk to (h + 1) * H / Hk - 1."""
    return x if x.shape[axis] == heads else jnp.repeat(x, heads // x.shape[axis], axis=axis)


def scaled(x: jax.Array, by: jax.Array) -> jax.Array:
    """Return by * x, computed in the accumulator type and cast to the type of x."""
    dtype = checks.accumulator_dtype(by, x)
    return (by.astype(dtype) * x.astype(dtype)).astype(x.dtype)
