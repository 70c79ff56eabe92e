"""The rules of OSDN: the delta rule with the hypergradient preconditioner (arXiv 2605.13473)."""

from jaxtyping import Array, Float, Int

from osdn_jax.ops.hypergradient import PAPER
from osdn_jax.ops.rules.entry import Hypergradient, preconditioned_delta_rule
from osdn_jax.ops.rules.gates import beta_per_head, channel_decay, scalar_decay
from osdn_jax.ops.rules.state import InitialState, State


def osdn(
    q: Float[Array, "B T Hk K"],
    k: Float[Array, "B T Hk K"],
    v: Float[Array, "B T H V"],
    *,
    beta: Float[Array, "B T H"],
    eta: float = PAPER["eta"],
    log_forget: Float[Array, "B T P"] | None = None,
    initial: Float[Array, "P K"] | Float[Array, "B P K"] | float | None = None,
    anchor: Float[Array, "P K"] | Float[Array, "B P K"] | float = 0.0,
    bounds: tuple[float, float] | None = PAPER["bounds"],
    normalize: bool = False,
    beta_aware: bool = False,
    initial_state: InitialState = None,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    context_axis: str | None = None,
) -> tuple[Float[Array, "B T H V"], State]:
    """Apply Online Scaled DeltaNet: DeltaNet with a hypergradient preconditioner (arXiv 2605.13473).

        w_t = d_t * k_t,    d_{t+1} = clip(g_t d_t + (1 - g_t) anchor + eta b_t (1 - b_t <d_t, k_t^2>) k_t^2)

    with g_t = exp(log_forget_t) and b_t = 1 (beta_t if beta_aware); w_t is the write key of the delta rule. The two
    published settings of eta, bounds and initial are in `hypergradient_preset`; the defaults here are "paper".
    There are P preconditioners per sequence: one per value head (P = H) if beta_aware, else one per key head (P = Hk).

    Args:
        q, k: queries and keys, [B, T, Hk, K]. They are not normalised here; `osdn_jax.nn.unit_norm` does that.
        v: values, [B, T, H, V]; H is a multiple of Hk, and value head h uses key head h // (H / Hk).
        beta: step size of each write, [B, T, H], usually in (0, 1).
        eta: step size of the preconditioner; default 1, as in the preset "paper".
        log_forget: natural log of the forgetting of d, [B, T, P], at most 0; default none.
        initial: d at the start of every segment, [P, K], [B, P, K] or a number; default 0, the preset "paper". For the
            first segment, the d of initial_state takes precedence.
        anchor: the value that forgetting moves d toward, [P, K], [B, P, K] or a number; default 0.
        bounds: (lo, hi) that d is clipped to after every update, or None; default (0, 1e9), the preset "paper".
        normalize: True divides the update of d by sum(k^2) + 1e-5; default False.
        beta_aware: True updates d with b_t = beta_t, per value head (P = H); False with b_t = 1, per key head (P = Hk).
            Default False.
        initial_state: the State that an earlier call returned, or S alone, [B, H, K, V] (d then starts from initial);
            default zeros.
        scale: factor on the output; default K^-1/2.
        segment_ids: [B, T] integers, for packed sequences: the state is reset where the id changes.
        chunk_size: tokens per chunk, for implementations with chunks; default by device.
        implementation: one of those listed under `delta_rule`; default None, the choice for this device.
        context_axis: mesh axis that the sequence is split over, inside `jax.shard_map`; see `delta_rule`.

    Returns:
        o: outputs, [B, T, H, V] in the type of v.
        state: State(recurrent=S [B, H, K, V], preconditioner=d [B, P, K]), float32, or float64 if an input is.

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
        >>> o, state = ops.osdn(q, k, v, beta=gate)
        >>> o.shape, state.recurrent.shape
        ((1, 6, 2, 4), (1, 2, 4, 4))
    """
    return preconditioned_delta_rule(
        q,
        k,
        v,
        beta=beta_per_head(beta),
        preconditioner=Hypergradient(eta, log_forget, initial, anchor, bounds, normalize, beta_aware),
        initial_state=initial_state,
        scale=scale,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        implementation=implementation,
        context_axis=context_axis,
    )


def os_gdn(
    q: Float[Array, "B T Hk K"],
    k: Float[Array, "B T Hk K"],
    v: Float[Array, "B T H V"],
    *,
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H"],
    eta: float = PAPER["eta"],
    log_forget: Float[Array, "B T P"] | None = None,
    initial: Float[Array, "P K"] | Float[Array, "B P K"] | float | None = None,
    anchor: Float[Array, "P K"] | Float[Array, "B P K"] | float = 0.0,
    bounds: tuple[float, float] | None = PAPER["bounds"],
    normalize: bool = False,
    beta_aware: bool = True,
    initial_state: InitialState = None,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    context_axis: str | None = None,
) -> tuple[Float[Array, "B T H V"], State]:
    """Apply Gated DeltaNet with a beta-aware hypergradient preconditioner (arXiv 2605.13473).

        w_t = d_t * k_t,    d_{t+1} = clip(g_t d_t + (1 - g_t) anchor + eta b_t (1 - b_t <d_t, k_t^2>) k_t^2)

    with g_t = exp(log_forget_t) and b_t = beta_t (1 if not beta_aware); w_t is the write key of `gated_delta_net`. The
    two published settings of eta, bounds and initial are in `hypergradient_preset`; the defaults here are "paper".
    There are P preconditioners per sequence: one per value head (P = H) if beta_aware, else one per key head (P = Hk).

    Args:
        q, k: queries and keys, [B, T, Hk, K]. They are not normalised here; `osdn_jax.nn.unit_norm` does that.
        v: values, [B, T, H, V]; H is a multiple of Hk, and value head h uses key head h // (H / Hk).
        beta: step size of each write, [B, T, H], usually in (0, 1).
        log_decay: natural log of the decay before each token, [B, T, H], at most 0; -inf resets the state.
        eta: step size of the preconditioner; default 1, as in the preset "paper".
        log_forget: natural log of the forgetting of d, [B, T, P], at most 0; default none.
        initial: d at the start of every segment, [P, K], [B, P, K] or a number; default 0, the preset "paper". For the
            first segment, the d of initial_state takes precedence.
        anchor: the value that forgetting moves d toward, [P, K], [B, P, K] or a number; default 0.
        bounds: (lo, hi) that d is clipped to after every update, or None; default (0, 1e9), the preset "paper".
        normalize: True divides the update of d by sum(k^2) + 1e-5; default False.
        beta_aware: True updates d with b_t = beta_t, per value head (P = H); False with b_t = 1, per key head (P = Hk).
            Default True.
        initial_state: the State that an earlier call returned, or S alone, [B, H, K, V] (d then starts from initial);
            default zeros.
        scale: factor on the output; default K^-1/2.
        segment_ids: [B, T] integers, for packed sequences: the state is reset where the id changes.
        chunk_size: tokens per chunk, for implementations with chunks; default by device.
        implementation: one of those listed under `delta_rule`; default None, the choice for this device.
        context_axis: mesh axis that the sequence is split over, inside `jax.shard_map`; see `delta_rule`.

    Returns:
        o: outputs, [B, T, H, V] in the type of v.
        state: State(recurrent=S [B, H, K, V], preconditioner=d [B, P, K]), float32, or float64 if an input is.

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
        >>> o, state = ops.os_gdn(q, k, v, beta=gate, log_decay=-gate, **ops.hypergradient_preset("trust"))
        >>> o.shape, state.recurrent.shape
        ((1, 6, 2, 4), (1, 2, 4, 4))
    """
    return preconditioned_delta_rule(
        q,
        k,
        v,
        beta=beta_per_head(beta),
        log_decay=scalar_decay(log_decay),
        preconditioner=Hypergradient(eta, log_forget, initial, anchor, bounds, normalize, beta_aware),
        initial_state=initial_state,
        scale=scale,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        implementation=implementation,
        context_axis=context_axis,
    )


def os_kda(
    q: Float[Array, "B T Hk K"],
    k: Float[Array, "B T Hk K"],
    v: Float[Array, "B T H V"],
    *,
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H K"],
    eta: float = PAPER["eta"],
    log_forget: Float[Array, "B T P"] | None = None,
    initial: Float[Array, "P K"] | Float[Array, "B P K"] | float | None = None,
    anchor: Float[Array, "P K"] | Float[Array, "B P K"] | float = 0.0,
    bounds: tuple[float, float] | None = PAPER["bounds"],
    normalize: bool = False,
    beta_aware: bool = True,
    initial_state: InitialState = None,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    context_axis: str | None = None,
) -> tuple[Float[Array, "B T H V"], State]:
    """Apply Kimi Delta Attention with a beta-aware hypergradient preconditioner (arXiv 2605.13473).

        w_t = d_t * k_t,    d_{t+1} = clip(g_t d_t + (1 - g_t) anchor + eta b_t (1 - b_t <d_t, k_t^2>) k_t^2)

    with g_t = exp(log_forget_t) and b_t = beta_t (1 if not beta_aware); w_t is the write key of `kda`. The two
    published settings of eta, bounds and initial are in `hypergradient_preset`; the defaults here are "paper".
    There are P preconditioners per sequence: one per value head (P = H) if beta_aware, else one per key head (P = Hk).

    Args:
        q, k: queries and keys, [B, T, Hk, K]. They are not normalised here; `osdn_jax.nn.unit_norm` does that.
        v: values, [B, T, H, V]; H is a multiple of Hk, and value head h uses key head h // (H / Hk).
        beta: step size of each write, [B, T, H], usually in (0, 1).
        log_decay: natural log of the decay before each token, [B, T, H, K], at most 0; -inf resets the channel.
        eta: step size of the preconditioner; default 1, as in the preset "paper".
        log_forget: natural log of the forgetting of d, [B, T, P], at most 0; default none.
        initial: d at the start of every segment, [P, K], [B, P, K] or a number; default 0, the preset "paper". For the
            first segment, the d of initial_state takes precedence.
        anchor: the value that forgetting moves d toward, [P, K], [B, P, K] or a number; default 0.
        bounds: (lo, hi) that d is clipped to after every update, or None; default (0, 1e9), the preset "paper".
        normalize: True divides the update of d by sum(k^2) + 1e-5; default False.
        beta_aware: True updates d with b_t = beta_t, per value head (P = H); False with b_t = 1, per key head (P = Hk).
            Default True.
        initial_state: the State that an earlier call returned, or S alone, [B, H, K, V] (d then starts from initial);
            default zeros.
        scale: factor on the output; default K^-1/2.
        segment_ids: [B, T] integers, for packed sequences: the state is reset where the id changes.
        chunk_size: tokens per chunk, for implementations with chunks; default by device.
        implementation: one of those listed under `delta_rule`; default None, the choice for this device.
        context_axis: mesh axis that the sequence is split over, inside `jax.shard_map`; see `delta_rule`.

    Returns:
        o: outputs, [B, T, H, V] in the type of v.
        state: State(recurrent=S [B, H, K, V], preconditioner=d [B, P, K]), float32, or float64 if an input is.

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
        >>> o, state = ops.os_kda(q, k, v, beta=gate, log_decay=-jnp.abs(k), **ops.hypergradient_preset("trust"))
        >>> o.shape, state.recurrent.shape
        ((1, 6, 2, 4), (1, 2, 4, 4))
    """
    return preconditioned_delta_rule(
        q,
        k,
        v,
        beta=beta_per_head(beta),
        log_decay=channel_decay(log_decay),
        preconditioner=Hypergradient(eta, log_forget, initial, anchor, bounds, normalize, beta_aware),
        initial_state=initial_state,
        scale=scale,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        implementation=implementation,
        context_axis=context_axis,
    )
