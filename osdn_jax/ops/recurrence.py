"""The asymmetric gated delta rule one token at a time: the specification of every other form."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from osdn_jax.ops import checks
from osdn_jax.ops.arguments import Call, call_axes, call_names, check_call, resolve_scale
from osdn_jax.ops.shards import over_shards


def delta_rule_step(
    state: Float[Array, "B H K V"] | None,
    q: Float[Array, "B Hk K"],
    k: Float[Array, "B Hk K"],
    v: Float[Array, "B H V"],
    beta: Float[Array, "B H"],
    *,
    write_key: Float[Array, "B Hw K"] | None = None,
    log_decay: Float[Array, "B H"] | Float[Array, "B H K"] | None = None,
    erase: bool = True,
    scale: float | None = None,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
    """One token of `delta_rule`: decoding in constant memory.

    Args:
        state: the memory before the token, [B, H, K, V]; None is an empty memory.
        q, k, v, beta, write_key, log_decay: one token of the arguments of `delta_rule`, without the time axis.
        erase, scale: as in `delta_rule`.

    Returns:
        (o [B, H, V] in the type of v, the memory after the token [B, H, K, V] float32, or float64 for float64 inputs).

    Raises:
        ValueError: a shape does not fit the others.
        TypeError: an argument is not a floating-point array, or scale is no static number.
    """
    call = check_call(q, k, v, beta, write_key, log_decay, state, None, time=False)
    static = (checks.flag("erase", erase), resolve_scale(scale, call.q.shape[-1]))
    out, memory = over_shards(_step, static, call, call_axes(call), ("bhv", "bhkv"), call_names(call))
    return out.astype(call.v.dtype), memory


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step(erase: bool, scale: float, call: Call) -> tuple[jax.Array, jax.Array]:
    return advance(call, erase=erase, scale=scale)


def scan(call: Call, *, erase: bool, scale: float, loop: Callable[..., Any] = lax.scan) -> tuple[jax.Array, jax.Array]:
    """The whole sequence as `lax.scan`: (outputs [B, T, H, V], final memory), both in the accumulator type.

    loop: `lax.scan`, or what takes its arguments (step, carry, tokens) and computes the same.
    """

    def step(memory: jax.Array, token: Call) -> tuple[jax.Array, jax.Array]:
        out, memory = advance(token._replace(memory=memory), erase=erase, scale=scale)
        return memory, out

    without_memory = call._replace(memory=None)  # type: ignore[arg-type]  # it is the carry
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), without_memory)
    memory, out = loop(step, call.memory, tokens)
    return jnp.moveaxis(out, 0, 1), memory


def advance(token: Call, *, erase: bool, scale: float) -> tuple[jax.Array, jax.Array]:
    """One token, arguments without the time axis: (output [B, H, V], memory after it)."""
    memory, heads = token.memory, token.v.shape[1]
    w = token.k if token.w is None else token.w
    q, k, w = (per_value_head(x.astype(memory.dtype), heads, axis=1) for x in (token.q, token.k, w))
    v = token.v.astype(memory.dtype)
    if token.restarts is not None:
        memory = jnp.where(token.restarts[:, None, None, None], 0.0, memory)
    if token.log_decay is not None:
        decay = jnp.exp(token.log_decay)
        memory = memory * (decay[..., None] if decay.ndim == 3 else decay[..., None, None])
    residual = v - jnp.einsum("bhk,bhkv->bhv", k, memory) if erase else v
    memory = memory + w[..., :, None] * (token.beta[..., None] * residual)[..., None, :]
    return jnp.einsum("bhk,bhkv->bhv", scale * q, memory), memory


def per_value_head(x: jax.Array, heads: int, axis: int) -> jax.Array:
    """Repeats key heads: key head h serves the value heads from h * H / Hk to (h + 1) * H / Hk - 1."""
    return x if x.shape[axis] == heads else jnp.repeat(x, heads // x.shape[axis], axis=axis)
