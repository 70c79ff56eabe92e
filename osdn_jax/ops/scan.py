"""The asymmetric gated delta rule as a scan over tokens: the specification of every other implementation."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from osdn_jax.ops import checks
from osdn_jax.ops.arguments import call_axes, call_names, check_call, per_value_head, resolve_scale
from osdn_jax.ops.calls import DeltaRuleCall
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
    """Compute one token of `delta_rule`, for decoding with a state of constant size.

    Args:
        state: the state before the token, [B, H, K, V]; None is a state of zeros.
        q, k: query and read key, [B, Hk, K].
        v: value, [B, H, V]; H is a multiple of Hk.
        beta: step size of the write, [B, H].
        write_key: [B, Hk, K] or [B, H, K]; default k.
        log_decay: log of the factor on the state, [B, H] or per channel [B, H, K]; default no decay.
        erase: False leaves out the correction, as in linear attention; default True.
        scale: factor on the output; default K^-1/2.

    Returns:
        o: the output, [B, H, V] in the type of v.
        state: the state after the token, [B, H, K, V] float32, or float64 if an input is.

    Raises:
        ValueError: a shape does not fit the others, or scale is not finite.
        TypeError: an argument is not a floating-point array, scale is not a static number, or erase is not a bool.

    Example:
        >>> import jax.numpy as jnp
        >>> from osdn_jax import ops
        >>> state = jnp.zeros((1, 1, 2, 2))
        >>> key, value = jnp.asarray([[[1.0, 0.0]]]), jnp.asarray([[[3.0, 4.0]]])
        >>> _, state = ops.delta_rule_step(state, key, key, value, beta=jnp.ones((1, 1)))
        >>> o, _ = ops.delta_rule_step(state, key, key, 0 * value, beta=jnp.zeros((1, 1)), scale=1.0)
        >>> print(o)
        [[[3. 4.]]]
    """
    call = check_call(q, k, v, beta, write_key, log_decay, state, None, time=False)
    static = (checks.flag("erase", erase), resolve_scale(scale, call.q.shape[-1]))
    out, state = over_shards(_step, static, call, call_axes(call), ("bhv", "bhkv"), call_names(call))
    return out.astype(call.v.dtype), state


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step(erase: bool, scale: float, call: DeltaRuleCall) -> tuple[jax.Array, jax.Array]:
    return advance(call, erase=erase, scale=scale)


def scan(
    call: DeltaRuleCall, *, erase: bool, scale: float, loop: Callable[..., Any] = lax.scan
) -> tuple[jax.Array, jax.Array]:
    """Run the whole sequence with `lax.scan`.

    Args:
        call: checked arrays.
        erase, scale: options of `delta_rule`.
        loop: `lax.scan`, or a function with the same arguments (step, carry, tokens) and result.

    Returns:
        (outputs [B, T, H, V], final state), both in the accumulator type.
    """

    def step(state: jax.Array, token: DeltaRuleCall) -> tuple[jax.Array, jax.Array]:
        out, state = advance(token._replace(state=state), erase=erase, scale=scale)
        return state, out

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), call.tokens())
    state, out = loop(step, call.state, tokens)
    return jnp.moveaxis(out, 0, 1), state


def advance(token: DeltaRuleCall, *, erase: bool, scale: float) -> tuple[jax.Array, jax.Array]:
    """Compute one token, given without the time axis: (output [B, H, V], state after it)."""
    state, heads = token.state, token.v.shape[1]
    w = token.k if token.w is None else token.w
    q, k, w = (per_value_head(x.astype(state.dtype), heads, axis=1) for x in (token.q, token.k, w))
    v = token.v.astype(state.dtype)
    if token.resets is not None:
        state = jnp.where(token.resets[:, None, None, None], 0.0, state)
    if token.log_decay is not None:
        decay = jnp.exp(token.log_decay)
        state = state * (decay[..., None] if decay.ndim == 3 else decay[..., None, None])
    residual = v - jnp.einsum("bhk,bhkv->bhv", k, state) if erase else v
    state = state + w[..., :, None] * (token.beta[..., None] * residual)[..., None, :]
    return jnp.einsum("bhk,bhkv->bhv", scale * q, state), state
