"""The rules of Preconditioned DeltaNet: the delta rule with the Gram preconditioner (arXiv 2604.21100)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from osdn_jax.ops import checks
from osdn_jax.ops.delta_rule_operator import delta_rule
from osdn_jax.ops.exact_gram import exact_gram_write_key
from osdn_jax.ops.gram import CENTER, SQUASH
from osdn_jax.ops.rules.entry import Gram, preconditioned_delta_rule
from osdn_jax.ops.rules.gates import beta_per_head, channel_decay, scalar_decay
from osdn_jax.ops.rules.state import ExactGramState, InitialState, State, check_state


def pdn(
    q: Float[Array, "B T Hk K"],
    k: Float[Array, "B T Hk K"],
    v: Float[Array, "B T H V"],
    *,
    beta: Float[Array, "B T H"],
    gram_log_decay: Float[Array, "B T Hk"],
    gram_gain: Float[Array, "B T Hk"],
    center: Float[Array, " Hk"] | float = CENTER,
    squash: float = SQUASH,
    initial_state: InitialState = None,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    context_axis: str | None = None,
) -> tuple[Float[Array, "B T H V"], State]:
    """Apply Preconditioned DeltaNet: DeltaNet with the Gram preconditioner (arXiv 2604.21100).

        A_t = exp(gram_log_decay_t) A_{t-1} + gram_gain_t k_t^2,    r = log(A_t + 1e-6) - center
        w_t = exp(-log(squash) r / (1 + |r|)) * k_t

    w_t is the write key of the delta rule.

    Args:
        q, k: queries and keys, [B, T, Hk, K]. They are not normalised here; `osdn_jax.nn.unit_norm` does that.
        v: values, [B, T, H, V]; H is a multiple of Hk, and value head h uses key head h // (H / Hk).
        beta: step size of each write, [B, T, H], usually in (0, 1).
        gram_log_decay: natural log of the decay of A, [B, T, Hk], at most 0.
        gram_gain: weight of each token in A, [B, T, Hk], at least 0.
        center: value of log A at which the multiplier is 1, [Hk] or a number; default -0.2 (initial in the paper).
        squash: x, at least 1 in the paper: the multiplier stays within [1/x, x], and is inverted below 1; default 1.5.
        initial_state: the State that an earlier call returned, or S alone, [B, H, K, V] (A then starts from zeros);
            default zeros.
        scale: factor on the output; default K^-1/2.
        segment_ids: [B, T] integers, for packed sequences: the state is reset where the id changes.
        chunk_size: tokens per chunk, for implementations with chunks; default by device.
        implementation: one of those listed under `delta_rule`; default None, the choice for this device.
        context_axis: mesh axis that the sequence is split over, inside `jax.shard_map`; see `delta_rule`.

    Returns:
        o: outputs, [B, T, H, V] in the type of v.
        state: State(recurrent=S [B, H, K, V], preconditioner=A [B, Hk, K]), float32, or float64 if an input is.

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
        >>> o, state = ops.pdn(q, k, v, beta=gate, gram_log_decay=-gate, gram_gain=gate)
        >>> o.shape, state.recurrent.shape
        ((1, 6, 2, 4), (1, 2, 4, 4))
    """
    return preconditioned_delta_rule(
        q,
        k,
        v,
        beta=beta_per_head(beta),
        preconditioner=Gram(gram_log_decay, gram_gain, center, squash),
        initial_state=initial_state,
        scale=scale,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        implementation=implementation,
        context_axis=context_axis,
    )


def pgdn(
    q: Float[Array, "B T Hk K"],
    k: Float[Array, "B T Hk K"],
    v: Float[Array, "B T H V"],
    *,
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H"],
    gram_log_decay: Float[Array, "B T Hk"],
    gram_gain: Float[Array, "B T Hk"],
    center: Float[Array, " Hk"] | float = CENTER,
    squash: float = SQUASH,
    initial_state: InitialState = None,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    context_axis: str | None = None,
) -> tuple[Float[Array, "B T H V"], State]:
    """Apply Preconditioned Gated DeltaNet: a scalar decay and the Gram preconditioner (arXiv 2604.21100).

        A_t = exp(gram_log_decay_t) A_{t-1} + gram_gain_t k_t^2,    r = log(A_t + 1e-6) - center
        w_t = exp(-log(squash) r / (1 + |r|)) * k_t

    w_t is the write key of `gated_delta_net`.

    Args:
        q, k: queries and keys, [B, T, Hk, K]. They are not normalised here; `osdn_jax.nn.unit_norm` does that.
        v: values, [B, T, H, V]; H is a multiple of Hk, and value head h uses key head h // (H / Hk).
        beta: step size of each write, [B, T, H], usually in (0, 1).
        log_decay: natural log of the decay before each token, [B, T, H], at most 0; -inf resets the state.
        gram_log_decay: natural log of the decay of A, [B, T, Hk], at most 0.
        gram_gain: weight of each token in A, [B, T, Hk], at least 0.
        center: value of log A at which the multiplier is 1, [Hk] or a number; default -0.2 (initial in the paper).
        squash: x, at least 1 in the paper: the multiplier stays within [1/x, x], and is inverted below 1; default 1.5.
        initial_state: the State that an earlier call returned, or S alone, [B, H, K, V] (A then starts from zeros);
            default zeros.
        scale: factor on the output; default K^-1/2.
        segment_ids: [B, T] integers, for packed sequences: the state is reset where the id changes.
        chunk_size: tokens per chunk, for implementations with chunks; default by device.
        implementation: one of those listed under `delta_rule`; default None, the choice for this device.
        context_axis: mesh axis that the sequence is split over, inside `jax.shard_map`; see `delta_rule`.

    Returns:
        o: outputs, [B, T, H, V] in the type of v.
        state: State(recurrent=S [B, H, K, V], preconditioner=A [B, Hk, K]), float32, or float64 if an input is.

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
        >>> o, state = ops.pgdn(q, k, v, beta=gate, log_decay=-gate, gram_log_decay=-gate, gram_gain=gate)
        >>> o.shape, state.recurrent.shape
        ((1, 6, 2, 4), (1, 2, 4, 4))
    """
    return preconditioned_delta_rule(
        q,
        k,
        v,
        beta=beta_per_head(beta),
        log_decay=scalar_decay(log_decay),
        preconditioner=Gram(gram_log_decay, gram_gain, center, squash),
        initial_state=initial_state,
        scale=scale,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        implementation=implementation,
        context_axis=context_axis,
    )


def pkda(
    q: Float[Array, "B T Hk K"],
    k: Float[Array, "B T Hk K"],
    v: Float[Array, "B T H V"],
    *,
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H K"],
    gram_log_decay: Float[Array, "B T Hk"],
    gram_gain: Float[Array, "B T Hk"],
    center: Float[Array, " Hk"] | float = CENTER,
    squash: float = SQUASH,
    initial_state: InitialState = None,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    context_axis: str | None = None,
) -> tuple[Float[Array, "B T H V"], State]:
    """Apply Preconditioned KDA: a decay per channel and the Gram preconditioner (arXiv 2604.21100).

        A_t = exp(gram_log_decay_t) A_{t-1} + gram_gain_t k_t^2,    r = log(A_t + 1e-6) - center
        w_t = exp(-log(squash) r / (1 + |r|)) * k_t

    w_t is the write key of `kda`.

    Args:
        q, k: queries and keys, [B, T, Hk, K]. They are not normalised here; `osdn_jax.nn.unit_norm` does that.
        v: values, [B, T, H, V]; H is a multiple of Hk, and value head h uses key head h // (H / Hk).
        beta: step size of each write, [B, T, H], usually in (0, 1).
        log_decay: natural log of the decay before each token, [B, T, H, K], at most 0; -inf resets the channel.
        gram_log_decay: natural log of the decay of A, [B, T, Hk], at most 0.
        gram_gain: weight of each token in A, [B, T, Hk], at least 0.
        center: value of log A at which the multiplier is 1, [Hk] or a number; default -0.2 (initial in the paper).
        squash: x, at least 1 in the paper: the multiplier stays within [1/x, x], and is inverted below 1; default 1.5.
        initial_state: the State that an earlier call returned, or S alone, [B, H, K, V] (A then starts from zeros);
            default zeros.
        scale: factor on the output; default K^-1/2.
        segment_ids: [B, T] integers, for packed sequences: the state is reset where the id changes.
        chunk_size: tokens per chunk, for implementations with chunks; default by device.
        implementation: one of those listed under `delta_rule`; default None, the choice for this device.
        context_axis: mesh axis that the sequence is split over, inside `jax.shard_map`; see `delta_rule`.

    Returns:
        o: outputs, [B, T, H, V] in the type of v.
        state: State(recurrent=S [B, H, K, V], preconditioner=A [B, Hk, K]), float32, or float64 if an input is.

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
        >>> o, state = ops.pkda(q, k, v, beta=gate, log_decay=-jnp.abs(k), gram_log_decay=-gate, gram_gain=gate)
        >>> o.shape, state.recurrent.shape
        ((1, 6, 2, 4), (1, 2, 4, 4))
    """
    return preconditioned_delta_rule(
        q,
        k,
        v,
        beta=beta_per_head(beta),
        log_decay=channel_decay(log_decay),
        preconditioner=Gram(gram_log_decay, gram_gain, center, squash),
        initial_state=initial_state,
        scale=scale,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        implementation=implementation,
        context_axis=context_axis,
    )


def exact_pdn(
    q: Float[Array, "B T Hk K"],
    k: Float[Array, "B T Hk K"],
    v: Float[Array, "B T H V"],
    *,
    ridge: float = 1.0,
    initial_state: InitialState = None,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    context_axis: str | None = None,
) -> tuple[Float[Array, "B T H V"], State]:
    """Apply the delta rule under the exact Gram preconditioner, in float64 only.

        S_t = (ridge I + K^T K)^-1 K^T V,    o_t = scale S_t^T q_t

    with the keys and values up to token t as rows of K and V: ridge regression, by the theorem of arXiv 2604.21100. A
    reference for small sizes: it costs T K^2 per head.

    Args:
        q, k: queries and keys, [B, T, Hk, K] float64. They are not normalised here; `osdn_jax.nn.unit_norm` does that.
        v: values, [B, T, H, V]; H is a multiple of Hk, and value head h uses key head h // (H / Hk).
        ridge: weight of the identity, positive; default 1.
        initial_state: the State that an earlier call returned, or S alone, [B, H, K, V]; default zeros.
        scale: factor on the output; default K^-1/2.
        segment_ids: must be None; the exact rule has no form for packed sequences.
        chunk_size: tokens per chunk, for implementations with chunks; default by device.
        implementation: one of those listed under `delta_rule`; default None, the choice for this device.
        context_axis: must be None; the exact rule is a reference for one device.

    Returns:
        o: outputs, [B, T, H, V] in the type of v.
        state: State(recurrent=S [B, H, K, V], preconditioner=P [B, Hk, K, K]), float64.

    Raises:
        ValueError: a shape does not fit the others, or an option is not one of its values.
        TypeError: an argument is not of the expected type, or k is not float64.
        NotImplementedError: the named implementation does not serve these types, shapes or this device.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from osdn_jax import ops
        >>> with jax.enable_x64(True):
        ...     q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 6, 2, 4), jnp.float64)
        ...     o, state = ops.exact_pdn(q, k, v, ridge=0.1)
        >>> state.recurrent.shape, state.preconditioner.shape
        ((1, 2, 4, 4), (1, 2, 4, 4))
    """
    k = checks.floating_array("k", k, 4, "[B, T, Hk, K]")
    batch, _, heads, key_dim = k.shape
    state, state_class = check_state(initial_state, ExactGramState, (batch, heads, key_dim, key_dim), "[B, Hk, K, K]")
    if segment_ids is not None:
        raise ValueError("segment_ids: got an array, expected None; the exact Gram rule has no packed form")
    if context_axis is not None:
        raise ValueError("context_axis: got a name, expected None; the exact Gram rule is a reference for one device")
    write_key, final = exact_gram_write_key(k, ridge=ridge, initial=state.preconditioner if state else None)
    v = checks.floating_array("v", v, 4, "[B, T, H, V]")
    o, recurrent = delta_rule(
        q,
        k,
        v,
        jnp.ones(v.shape[:3], checks.accumulator_dtype(k)),
        write_key=write_key,
        initial_state=None if state is None else state.recurrent,
        scale=scale,
        chunk_size=chunk_size,
        implementation=implementation,
    )
    return o, state_class(recurrent, final)
