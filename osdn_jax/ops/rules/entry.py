"""The delta rule with a preconditioner: the entry that the named rules and the modules of `osdn_jax.nn` call."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from osdn_jax.ops import checks, delta_rule_operator, gram, hypergradient, squares
from osdn_jax.ops.arguments import per_value_head
from osdn_jax.ops.rules.state import GramState, HypergradientState, InitialState, SquaresState, State, check_state


class Hypergradient(NamedTuple):
    """Arguments of the hypergradient preconditioner; see `hypergradient_preconditioner`.

    With beta_aware, each value head has its own preconditioner (P = H), updated with that head's beta; without, each
    key head has one (P = Hk), updated with beta = 1.
    """

    eta: jax.Array | float = hypergradient.PAPER["eta"]  # [P] or a number
    log_forget: jax.Array | None = None  # [B, T, P]
    initial: jax.Array | float | None = None  # [B, P, K], [P, K] or a number
    anchor: jax.Array | float = 0.0  # [B, P, K], [P, K] or a number
    bounds: tuple[float, float] | None = hypergradient.PAPER["bounds"]
    normalize: bool = False
    beta_aware: bool = False


class Gram(NamedTuple):
    """Arguments of the Gram preconditioner; see `gram_preconditioner`."""

    log_decay: jax.Array  # [B, T, Hk]
    gain: jax.Array  # [B, T, Hk]
    center: jax.Array | float = gram.CENTER  # [Hk] or a number
    squash: float = gram.SQUASH
    log_squash: jax.Array | None = None  # [Hk], in place of squash


class Squares(NamedTuple):
    """Arguments of a preconditioner of squared keys; see `squares_preconditioner`."""

    average: float | None = None
    normalize: bool = False
    initial: jax.Array | float | None = None  # [B, Hk, K], [Hk, K] or a number


def preconditioned_delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    beta: jax.Array | None,
    log_decay: jax.Array | None = None,
    erase: bool = True,
    preconditioner: Hypergradient | Gram | Squares | None = None,
    match_step: bool = False,
    initial_state: InitialState = None,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    context_axis: str | None = None,
) -> tuple[jax.Array, State]:
    """Apply the delta rule with the write keys of a preconditioner.

    A back end that fuses the preconditioner with the delta rule would replace the two calls here.

    Args:
        q, k, v, log_decay, erase, scale, segment_ids, chunk_size, context_axis: as for `delta_rule`.
        beta: as for `delta_rule`; None means 1 at every token.
        preconditioner: arguments of the preconditioner; None writes under k.
        match_step: True writes under k times `matched_step`, a control without the preconditioner's direction.
        initial_state: a State of such a rule, an array [B, H, K, V], or None for zeros.
        implementation: as for `delta_rule`. A preconditioner without that implementation uses its default.

    Returns:
        o: outputs, [B, T, H, V] in the type of v.
        state: a State, of the class of initial_state.

    Raises:
        ValueError, TypeError, NotImplementedError: as `delta_rule` and the preconditioners.
    """
    checks.implementation(implementation, delta_rule_operator.IMPLEMENTATIONS)
    q, k, v = checks.tokens(q, k, v)  # first: a wrong key or value is not to be reported as a wrong gate
    rows = v.shape[:3]
    if beta is None:
        beta = jnp.ones(rows, checks.accumulator_dtype(q, k, v))
    if log_decay is not None and log_decay.ndim == 3:
        log_decay = checks.shaped_array("log_decay", log_decay, rows, "[B, T, H]")
    elif log_decay is not None:
        log_decay = checks.shaped_array("log_decay", log_decay, (*rows, k.shape[3]), "[B, T, H, K]")
    shared: dict[str, Any] = {
        "segment_ids": segment_ids,
        "chunk_size": chunk_size,
        "implementation": implementation,
        "context_axis": context_axis,
    }
    write_key = final = None
    if preconditioner is None:
        state, state_class = check_state(initial_state)
    elif isinstance(preconditioner, Hypergradient):
        write_key, final, state, state_class = _by_hypergradient(k, v, beta, preconditioner, initial_state, shared)
    elif isinstance(preconditioner, Squares):
        write_key, final, state, state_class = _by_squares(k, preconditioner, initial_state, shared)
    else:
        write_key, final, state, state_class = _by_gram(k, preconditioner, initial_state, shared)
    if match_step and write_key is not None:
        keys = per_value_head(k, write_key.shape[2], axis=2)
        write_key = matched_step(write_key, keys) * keys
    recurrent = None if state is None else state.recurrent
    o, recurrent = delta_rule_operator.delta_rule(
        q,
        k,
        v,
        beta,
        write_key=write_key,
        log_decay=log_decay,
        erase=erase,
        scale=scale,
        initial_state=recurrent,
        **shared,
    )
    return o, state_class(recurrent, final)


def matched_step(write_key: jax.Array, k: jax.Array) -> jax.Array:
    """Return <w, k> / <k, k> for each token, [B, T, P, 1]: the multiple of k that makes the step of the write key w.

    Args:
        write_key: w, [B, T, P, K].
        k: keys, [B, T, P, K]; a key of zeros gives 0.
    """
    squares = jnp.sum(k * k, axis=-1, keepdims=True)
    return jnp.sum(write_key * k, axis=-1, keepdims=True) / jnp.where(squares > 0, squares, 1.0)


Keys = tuple[jax.Array, jax.Array, State | None, type[State]]  # write key, final preconditioner, state, state class


def _by_hypergradient(
    k: jax.Array, v: jax.Array, beta: jax.Array, arguments: Hypergradient, initial_state: Any, shared: dict[str, Any]
) -> Keys:
    options = arguments._asdict()
    beta_aware = checks.flag("beta_aware", options.pop("beta_aware"))
    keys = per_value_head(k, v.shape[2], axis=2) if beta_aware else k
    batch, _, heads, key_dim = keys.shape
    if arguments.log_forget is not None:
        options["log_forget"] = checks.shaped_array("log_forget", arguments.log_forget, keys.shape[:3], "[B, T, P]")
    if beta_aware:
        beta = checks.shaped_array("beta", beta, keys.shape[:3], "[B, T, H]")
    state, state_class = check_state(initial_state, HypergradientState, (batch, heads, key_dim), "[B, P, K]")
    if state is not None and state.preconditioner is not None:
        options["restart"] = 0.0 if arguments.initial is None else arguments.initial
        options["initial"] = state.preconditioner
    shared = _supported(shared, hypergradient.IMPLEMENTATIONS)
    write_key, final = hypergradient.hypergradient_write_key(keys, beta if beta_aware else None, **options, **shared)
    return write_key, final, state, state_class


def _by_gram(k: jax.Array, arguments: Gram, initial_state: Any, shared: dict[str, Any]) -> Keys:
    batch, length, heads, key_dim = k.shape
    rows = (batch, length, heads)
    arguments = arguments._replace(
        log_decay=checks.shaped_array("gram_log_decay", arguments.log_decay, rows, "[B, T, Hk]"),
        gain=checks.shaped_array("gram_gain", arguments.gain, rows, "[B, T, Hk]"),
    )
    state, state_class = check_state(initial_state, GramState, (batch, heads, key_dim), "[B, Hk, K]")
    shared = _supported(shared, gram.IMPLEMENTATIONS)
    initial = None if state is None else state.preconditioner
    write_key, final = gram.gram_write_key(k, initial=initial, **arguments._asdict(), **shared)
    return write_key, final, state, state_class


def _by_squares(k: jax.Array, arguments: Squares, initial_state: Any, shared: dict[str, Any]) -> Keys:
    batch, _, heads, key_dim = k.shape
    options = arguments._asdict()
    state, state_class = check_state(initial_state, SquaresState, (batch, heads, key_dim), "[B, Hk, K]")
    if state is not None and state.preconditioner is not None:
        options["restart"] = 0.0 if arguments.initial is None else arguments.initial
        options["initial"] = state.preconditioner
    shared = _supported(shared, squares.IMPLEMENTATIONS)
    write_key, final = squares.squares_write_key(k, **options, **shared)
    return write_key, final, state, state_class


def _supported(shared: dict[str, Any], implementations: dict[str, Any]) -> dict[str, Any]:
    """Return the shared options, with the default in place of an implementation that the preconditioner lacks."""
    known = shared["implementation"] in implementations
    return shared if known else shared | {"implementation": None}
