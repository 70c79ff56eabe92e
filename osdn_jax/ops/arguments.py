"""The arguments of the delta rule, checked and brought to one form."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from osdn_jax.ops import checks


class Call(NamedTuple):
    """Checked arguments; without T for a single step. q, k, w and v keep their types, the rest is float32 or 64."""

    memory: jax.Array  # [B, H, K, V]
    q: jax.Array  # [B, T, Hk, K]
    k: jax.Array  # [B, T, Hk, K]
    w: jax.Array | None  # [B, T, Hk or H, K]; None where it is k
    v: jax.Array  # [B, T, H, V]
    beta: jax.Array  # [B, T, H]
    log_decay: jax.Array | None  # [B, T, H] or [B, T, H, K]
    restarts: jax.Array | None  # [B, T] bool


def call_axes(call: Call) -> Any:
    """A letter for each axis of each argument, as `shards.over_shards` reads them; without t for a single step."""
    time = "t" if call.q.ndim == 4 else ""
    keys, gates = f"b{time}gk", f"b{time}h"
    own = call.w is not None and call.w.shape[-2] == call.v.shape[-2]
    by_channel = call.log_decay is not None and call.log_decay.ndim == call.q.ndim
    letters: dict[str, str | None] = {
        "memory": "bhkv",
        "q": keys,
        "k": keys,
        "w": None if call.w is None else f"{gates}k" if own else keys,
        "v": f"{gates}v",
        "beta": gates,
        "log_decay": None if call.log_decay is None else f"{gates}k" if by_channel else gates,
        "restarts": None if call.restarts is None else "bt",
    }
    return call._replace(**letters)  # type: ignore[arg-type]  # letters in place of arrays


def call_names(call: Call) -> list[str]:
    """What a user calls the arguments that are there."""
    names = {"memory": "initial_state", "w": "write_key", "restarts": "segment_ids"}
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
) -> Call:
    """Checks shapes and types of a sequence (or, without time, of one token). Raises ValueError or TypeError."""
    lead = "B, T, " if time else "B, "
    axes = 2 if time else 1
    q = checks.floating_array("q", q, axes + 2, f"[{lead}Hk, K]")
    *batch_time, key_heads, key_dim = q.shape
    leading = tuple(batch_time)
    k = checks.shaped_array("k", k, q.shape, f"[{lead}Hk, K] like q")
    v = checks.floating_array("v", v, axes + 2, f"[{lead}H, V]")
    if v.shape[:axes] != leading:
        raise ValueError(f"v: got shape {v.shape}, expected [{lead}H, V] with the leading axes {leading} of q")
    heads, value_dim = v.shape[axes:]
    if not key_heads or heads % key_heads:
        raise ValueError(f"v: got {heads} value heads, expected a multiple of the {key_heads} key heads of q")
    for name, size in (("q", key_dim), ("v", value_dim)):
        if size < 1:
            raise ValueError(f"{name}: got a head dimension of {size}, expected at least 1")
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
    memory = jnp.zeros(shape, dtype) if initial_state is None else initial_state.astype(dtype)
    restarts = None
    if segment_ids is not None:
        restarts = checks.restarts(checks.segment_ids(segment_ids, leading), context_axis)
    return Call(
        checks.varying_like(memory, q, k, v, beta, write_key, log_decay, restarts),
        q,
        k,
        write_key,
        v,
        beta.astype(dtype),
        None if log_decay is None else checks.bounded_log(log_decay.astype(dtype)),
        restarts,
    )


def resolve_scale(scale: Any, key_dim: int) -> float:
    """The factor of the read: K^-1/2 unless given. Raises TypeError or ValueError for no finite static number."""
    return key_dim**-0.5 if scale is None else checks.number("scale", scale)
