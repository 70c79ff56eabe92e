"""The delta rule and its gated forms, without a preconditioner."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from osdn_jax.ops import checks
from osdn_jax.ops.arguments import per_value_head, scaled
from osdn_jax.ops.delta_rule_operator import delta_rule
from osdn_jax.ops.rules.entry import preconditioned_delta_rule
from osdn_jax.ops.rules.gates import beta_per_head, channel_decay, scalar_decay
from osdn_jax.ops.rules.state import InitialState, State, check_state


def delta_net(
    q: Float[Array, "B T Hk K"],
    k: Float[Array, "B T Hk K"],
    v: Float[Array, "B T H V"],
    *,
    beta: Float[Array, "B T H"],
    initial_state: InitialState = None,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    context_axis: str | None = None,
) -> tuple[Float[Array, "B T H V"], State]:
    """Apply DeltaNet, the delta rule (arXiv 2102.11174, chunkwise 2406.06484).

        e_t = v_t - S_{t-1}^T k_t,    S_t = S_{t-1} + beta_t k_t e_t^T,    o_t = scale S_t^T q_t

    Args:
        q, k: queries and keys, [B, T, Hk, K]. They are not normalised here; `osdn_jax.nn.unit_norm` does that.
        v: values, [B, T, H, V]; H is a multiple of Hk, and value head h uses key head h // (H / Hk).
        beta: step size of each write, [B, T, H], usually in (0, 1).
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
        >>> o, state = ops.delta_net(q, k, v, beta=gate)
        >>> o.shape, state.recurrent.shape
        ((1, 6, 2, 4), (1, 2, 4, 4))
    """
    return preconditioned_delta_rule(
        q,
        k,
        v,
        beta=beta_per_head(beta),
        initial_state=initial_state,
        scale=scale,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        implementation=implementation,
        context_axis=context_axis,
    )


def gated_delta_net(
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
    """Apply Gated DeltaNet: the delta rule with a scalar decay per head (arXiv 2412.06464).

        S~ = exp(log_decay_t) S_{t-1},    S_t = S~ + beta_t k_t (v_t - S~^T k_t)^T,    o_t = scale S_t^T q_t

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
        >>> o, state = ops.gated_delta_net(q, k, v, beta=gate, log_decay=-gate)
        >>> o.shape, state.recurrent.shape
        ((1, 6, 2, 4), (1, 2, 4, 4))
    """
    return preconditioned_delta_rule(
        q,
        k,
        v,
        beta=beta_per_head(beta),
        log_decay=scalar_decay(log_decay),
        initial_state=initial_state,
        scale=scale,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        implementation=implementation,
        context_axis=context_axis,
    )


def kda(
    q: Float[Array, "B T Hk K"],
    k: Float[Array, "B T Hk K"],
    v: Float[Array, "B T H V"],
    *,
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H K"],
    initial_state: InitialState = None,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    context_axis: str | None = None,
) -> tuple[Float[Array, "B T H V"], State]:
    """Apply Kimi Delta Attention: the delta rule with a decay per key channel (arXiv 2510.26692).

        S~ = exp(log_decay_t) * S_{t-1},    S_t = S~ + beta_t k_t (v_t - S~^T k_t)^T,    o_t = scale S_t^T q_t

    where log_decay_t [K] scales the rows of S.

    Args:
        q, k: queries and keys, [B, T, Hk, K]. They are not normalised here; `osdn_jax.nn.unit_norm` does that.
        v: values, [B, T, H, V]; H is a multiple of Hk, and value head h uses key head h // (H / Hk).
        beta: step size of each write, [B, T, H], usually in (0, 1).
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
        >>> gate = jnp.full((1, 6, 2), 0.5)
        >>> o, state = ops.kda(q, k, v, beta=gate, log_decay=-jnp.abs(k))
        >>> o.shape, state.recurrent.shape
        ((1, 6, 2, 4), (1, 2, 4, 4))
    """
    return preconditioned_delta_rule(
        q,
        k,
        v,
        beta=beta_per_head(beta),
        log_decay=channel_decay(log_decay),
        initial_state=initial_state,
        scale=scale,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        implementation=implementation,
        context_axis=context_axis,
    )


def gdn2(
    q: Float[Array, "B T Hk K"],
    k: Float[Array, "B T Hk K"],
    v: Float[Array, "B T H V"],
    *,
    erase_gate: Float[Array, "B T He K"],
    write_gate: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H K"],
    initial_state: InitialState = None,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    context_axis: str | None = None,
) -> tuple[Float[Array, "B T H V"], State]:
    """Apply Gated DeltaNet-2: gates per channel on the erased key and on the written value (arXiv 2605.22791).

        S~ = exp(log_decay_t) * S_{t-1},    S_t = S~ + k_t (write_gate_t * v_t - S~^T (erase_gate_t * k_t))^T

    and o_t = scale S_t^T q_t. There is no beta.

    Args:
        q, k: queries and keys, [B, T, Hk, K]. They are not normalised here; `osdn_jax.nn.unit_norm` does that.
        v: values, [B, T, H, V]; H is a multiple of Hk, and value head h uses key head h // (H / Hk).
        erase_gate: factor on the key that the correction reads the state with, [B, T, Hk or H, K].
        write_gate: factor on v, [B, T, H, V].
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
        >>> gates = {"erase_gate": jnp.full_like(k, 0.5), "write_gate": jnp.ones_like(v)}
        >>> o, state = ops.gdn2(q, k, v, **gates, log_decay=-jnp.abs(k))
        >>> o.shape, state.recurrent.shape
        ((1, 6, 2, 4), (1, 2, 4, 4))
    """
    q, k, v = checks.tokens(q, k, v)
    erase_gate = checks.floating_array("erase_gate", erase_gate, 4, "[B, T, Hk or H, K]")
    if erase_gate.shape[2] == v.shape[2] != k.shape[2]:
        q, k = (per_value_head(x, v.shape[2], axis=2) for x in (q, k))
    erase_gate = checks.shaped_array("erase_gate", erase_gate, k.shape, "[B, T, Hk or H, K]")
    write_gate = checks.shaped_array("write_gate", write_gate, v.shape, "[B, T, H, V] like v")
    state, state_class = check_state(initial_state)
    o, recurrent = delta_rule(
        q,
        scaled(k, erase_gate),
        scaled(v, write_gate),
        jnp.ones(v.shape[:3], checks.accumulator_dtype(q, k, v)),
        write_key=k,
        log_decay=channel_decay(log_decay),
        initial_state=None if state is None else state.recurrent,
        scale=scale,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        implementation=implementation,
        context_axis=context_axis,
    )
    return o, state_class(recurrent)
