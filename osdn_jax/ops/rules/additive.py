"""Rules without the erase term, which add every value under its key."""

from jaxtyping import Array, Float, Int

from osdn_jax.ops.rules.entry import preconditioned_delta_rule
from osdn_jax.ops.rules.gates import beta_per_head, channel_decay, scalar_decay
from osdn_jax.ops.rules.state import InitialState, State


def linear_attention(
    q: Float[Array, "B T Hk K"],
    k: Float[Array, "B T Hk K"],
    v: Float[Array, "B T H V"],
    *,
    initial_state: InitialState = None,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    context_axis: str | None = None,
) -> tuple[Float[Array, "B T H V"], State]:
    """Apply linear attention, without a normaliser (arXiv 2006.16236).

        S_t = S_{t-1} + k_t v_t^T,    o_t = scale S_t^T q_t

    Args:
        q, k: queries and keys, [B, T, Hk, K]. They are not normalised here; `osdn_jax.nn.unit_norm` does that.
        v: values, [B, T, H, V]; H is a multiple of Hk, and value head h uses key head h // (H / Hk).
        initial_state: the State that an earlier call returned, or S alone, [B, H, K, V]; default zeros.
        scale: factor on the output; default K^-1/2.
        segment_ids: [B, T] integers, for packed sequences: the state is reset where the id changes.
        chunk_size: tokens per chunk, for implementations with chunks; default by device.
        implementation: one of those listed under `delta_rule`; default None, the choice for this device.
        context_axis: mesh axis that the sequence is split over, inside `jax.shard_map`; see `delta_rule`.

    Returns:
        o: outputs, [B, T, H, V] in the type of v.
        state: State(recurrent=S [B, H, K, V] float32, preconditioner=None); float64 if an input is.

    Raises:
        ValueError: a shape does not fit the others, or an option is not one of its values.
        TypeError: an argument is not of the expected type.
        NotImplementedError: the named implementation does not serve these types, shapes or this device.

    Example:
        >>> import jax
        >>> from osdn_jax import nn, ops
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 6, 2, 4))
        >>> q, k = nn.unit_norm(q), nn.unit_norm(k)
        >>> o, state = ops.linear_attention(q, k, v)
        >>> o.shape, state.recurrent.shape
        ((1, 6, 2, 4), (1, 2, 4, 4))
    """
    return preconditioned_delta_rule(
        q,
        k,
        v,
        beta=None,
        erase=False,
        initial_state=initial_state,
        scale=scale,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        implementation=implementation,
        context_axis=context_axis,
    )


def mamba2(
    q: Float[Array, "B T Hk K"],
    k: Float[Array, "B T Hk K"],
    v: Float[Array, "B T H V"],
    *,
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H"],
    initial_state: InitialState = None,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    context_axis: str | None = None,
) -> tuple[Float[Array, "B T H V"], State]:
    """Apply Mamba-2's state-space duality: linear attention with a scalar decay (arXiv 2405.21060).

        S_t = exp(log_decay_t) S_{t-1} + beta_t k_t v_t^T,    o_t = scale S_t^T q_t

    In its symbols q = C, k = B, v = x, beta = dt (the step sizes) and log_decay = dt A; it has scale = 1.

    Args:
        q, k: queries and keys, [B, T, Hk, K]. They are not normalised here; `osdn_jax.nn.unit_norm` does that.
        v: values, [B, T, H, V]; H is a multiple of Hk, and value head h uses key head h // (H / Hk).
        beta: step size of each write, [B, T, H], usually in (0, 1).
        log_decay: natural log of the decay before each token, [B, T, H], at most 0; -inf resets the state.
        initial_state: the State that an earlier call returned, or S alone, [B, H, K, V]; default zeros.
        scale: factor on the output; default K^-1/2.
        segment_ids: [B, T] integers, for packed sequences: the state is reset where the id changes.
        chunk_size: tokens per chunk, for implementations with chunks; default by device.
        implementation: one of those listed under `delta_rule`; default None, the choice for this device.
        context_axis: mesh axis that the sequence is split over, inside `jax.shard_map`; see `delta_rule`.

    Returns:
        o: outputs, [B, T, H, V] in the type of v.
        state: State(recurrent=S [B, H, K, V] float32, preconditioner=None); float64 if an input is.

    Raises:
        ValueError: a shape does not fit the others, or an option is not one of its values.
        TypeError: an argument is not of the expected type.
        NotImplementedError: the named implementation does not serve these types, shapes or this device.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from osdn_jax import nn, ops
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 6, 2, 4))
        >>> q, k = nn.unit_norm(q), nn.unit_norm(k)
        >>> gate = jnp.full((1, 6, 2), 0.5)
        >>> o, state = ops.mamba2(q, k, v, beta=gate, log_decay=-gate, scale=1.0)
        >>> o.shape, state.recurrent.shape
        ((1, 6, 2, 4), (1, 2, 4, 4))
    """
    return preconditioned_delta_rule(
        q,
        k,
        v,
        beta=beta_per_head(beta),
        log_decay=scalar_decay(log_decay),
        erase=False,
        initial_state=initial_state,
        scale=scale,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        implementation=implementation,
        context_axis=context_axis,
    )


def gla(
    q: Float[Array, "B T Hk K"],
    k: Float[Array, "B T Hk K"],
    v: Float[Array, "B T H V"],
    *,
    log_decay: Float[Array, "B T H K"],
    initial_state: InitialState = None,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    context_axis: str | None = None,
) -> tuple[Float[Array, "B T H V"], State]:
    """Apply gated linear attention: linear attention with a decay per key channel (arXiv 2312.06635).

        S_t = exp(log_decay_t) * S_{t-1} + k_t v_t^T,    o_t = scale S_t^T q_t

    Args:
        q, k: queries and keys, [B, T, Hk, K]. They are not normalised here; `osdn_jax.nn.unit_norm` does that.
        v: values, [B, T, H, V]; H is a multiple of Hk, and value head h uses key head h // (H / Hk).
        log_decay: natural log of the decay before each token, [B, T, H, K], at most 0; -inf resets the channel.
        initial_state: the State that an earlier call returned, or S alone, [B, H, K, V]; default zeros.
        scale: factor on the output; default K^-1/2.
        segment_ids: [B, T] integers, for packed sequences: the state is reset where the id changes.
        chunk_size: tokens per chunk, for implementations with chunks; default by device.
        implementation: one of those listed under `delta_rule`; default None, the choice for this device.
        context_axis: mesh axis that the sequence is split over, inside `jax.shard_map`; see `delta_rule`.

    Returns:
        o: outputs, [B, T, H, V] in the type of v.
        state: State(recurrent=S [B, H, K, V] float32, preconditioner=None); float64 if an input is.

    Raises:
        ValueError: a shape does not fit the others, or an option is not one of its values.
        TypeError: an argument is not of the expected type.
        NotImplementedError: the named implementation does not serve these types, shapes or this device.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from osdn_jax import nn, ops
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 6, 2, 4))
        >>> q, k = nn.unit_norm(q), nn.unit_norm(k)
        >>> o, state = ops.gla(q, k, v, log_decay=-jnp.abs(k))
        >>> o.shape, state.recurrent.shape
        ((1, 6, 2, 4), (1, 2, 4, 4))
    """
    return preconditioned_delta_rule(
        q,
        k,
        v,
        beta=None,
        log_decay=channel_decay(log_decay),
        erase=False,
        initial_state=initial_state,
        scale=scale,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        implementation=implementation,
        context_axis=context_axis,
    )
