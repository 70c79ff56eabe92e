"""The named rules: a few lines each over `delta_rule` and its preconditioners.

All take q, k [B, T, Hk, K] and v [B, T, H, V] as `delta_rule` does, and return (o [B, T, H, V], State). Every rule also
takes the keyword arguments of `RuleOptions`. None of them normalises q or k. Shapes and types are checked, and
ValueError and TypeError raised, by the functions that they call.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from osdn_jax.ops import checks, gram, hypergradient
from osdn_jax.ops.delta_rule import delta_rule
from osdn_jax.ops.gram import exact_gram_write_key, write_key
from osdn_jax.ops.recurrence import per_value_head

Queries = Float[Array, "B T Hk K"]
Values = Float[Array, "B T H V"]
PerHead = Float[Array, "B T H"]
PerKeyHead = Float[Array, "B T P"]
PerChannel = Float[Array, "B T H K"]


class State(NamedTuple):
    """What a rule carries from one piece of a sequence to the next; a pytree.

    Rules with a preconditioner return a kind of their own, so that a state of another rule is refused by name. One that
    is made by hand, `State(memory, preconditioner)`, is taken by any rule and comes back as a plain State.
    """

    memory: Float[Array, "B H K V"]
    preconditioner: Float[Array, "B P ..."] | None = None  # d (hypergradient) or A (Gram), where the rule has one


class HypergradientState(State):
    """The state of osdn, os_gdn and os_kda, which no other rule goes on from: its preconditioner is d."""

    __slots__ = ()


class GramState(State):
    """The state of pdn, pgdn and pkda, likewise: its preconditioner is the running sum A."""

    __slots__ = ()


class ExactGramState(State):
    """The state of exact_pdn, likewise: its preconditioner is the matrix P."""

    __slots__ = ()


class RuleOptions(TypedDict, total=False):
    """Keyword arguments of every rule."""

    initial_state: State | None  # default: nothing remembered
    scale: float | None
    segment_ids: Int[Array, "B T"] | None
    chunk_size: int | None
    implementation: str | None
    context_axis: str | None


# --- without a preconditioner ---------------------------------------------------------------------------------------


def delta_net(q: Queries, k: Queries, v: Values, beta: PerHead, **options: Unpack[RuleOptions]) -> tuple[Values, State]:
    """DeltaNet: the delta rule (arXiv 2102.11174, 2406.06484)."""
    return _run(q, k, v, beta, options)


def gated_delta_net(
    q: Queries, k: Queries, v: Values, beta: PerHead, log_decay: PerHead, **options: Unpack[RuleOptions]
) -> tuple[Values, State]:
    """Gated DeltaNet: a scalar decay per head (arXiv 2412.06464)."""
    return _run(q, k, v, beta, options, log_decay=_scalar_decay(log_decay))


def kda(
    q: Queries, k: Queries, v: Values, beta: PerHead, log_decay: PerChannel, **options: Unpack[RuleOptions]
) -> tuple[Values, State]:
    """Kimi Delta Attention: a decay per channel of the key (arXiv 2510.26692)."""
    return _run(q, k, v, beta, options, log_decay=_channel_decay(log_decay))


def gdn2(
    q: Queries,
    k: Queries,
    v: Values,
    erase_gate: Float[Array, "B T He K"],
    write_gate: Values,
    log_decay: PerChannel,
    **options: Unpack[RuleOptions],
) -> tuple[Values, State]:
    """Gated DeltaNet-2: gates per channel on what is erased and on what is written (arXiv 2605.22791).

    The memory is read for erase_gate * k, and write_gate * v is written under k. erase_gate is [B, T, Hk or H, K] and
    write_gate [B, T, H, V].
    """
    erase_gate = checks.floating_array("erase_gate", erase_gate, 4, "[B, T, Hk or H, K]")
    q, k, v = (checks.floating_array(n, x, 4, "[B, T, heads, size]") for n, x in (("q", q), ("k", k), ("v", v)))
    if erase_gate.shape[2] == v.shape[2] != k.shape[2] and k.shape[2] and v.shape[2] % k.shape[2] == 0:
        q, k = (per_value_head(x, v.shape[2], axis=2) for x in (q, k))
    erase_gate = checks.shaped_array("erase_gate", erase_gate, k.shape, "[B, T, Hk or H, K]")
    write_gate = checks.shaped_array("write_gate", write_gate, v.shape, "[B, T, H, V] like v")
    read_key = write_key(erase_gate, k)
    ones = jnp.ones(v.shape[:3], checks.accumulator_dtype(q, k, v))
    return _run(q, read_key, write_key(write_gate, v), ones, options, write_key=k, log_decay=_channel_decay(log_decay))


# --- without the erase term -----------------------------------------------------------------------------------------


def linear_attention(q: Queries, k: Queries, v: Values, **options: Unpack[RuleOptions]) -> tuple[Values, State]:
    """Linear attention: every value is added under its key (arXiv 2006.16236), without a normaliser."""
    return _run(q, k, v, _ones(q, k, v), options, erase=False)


def mamba2(
    q: Queries, k: Queries, v: Values, beta: PerHead, log_decay: PerHead, **options: Unpack[RuleOptions]
) -> tuple[Values, State]:
    """Mamba-2's state-space duality: linear attention under a scalar decay (arXiv 2405.21060).

    In its symbols q = C, k = B, v = x, beta = the step sizes dt, log_decay = dt A.
    """
    return _run(q, k, v, beta, options, log_decay=_scalar_decay(log_decay), erase=False)


def gla(
    q: Queries, k: Queries, v: Values, log_decay: PerChannel, **options: Unpack[RuleOptions]
) -> tuple[Values, State]:
    """Gated linear attention: a decay per channel (arXiv 2312.06635)."""
    return _run(q, k, v, _ones(q, k, v), options, log_decay=_channel_decay(log_decay), erase=False)


# --- hypergradient preconditioner (OSDN) ----------------------------------------------------------------------------


class Hypergradient(TypedDict, total=False):
    """Keyword arguments of the rules with the hypergradient preconditioner; see `hypergradient_preconditioner`.

    P, the heads of the preconditioner, is H where it is beta-aware (each value head then has its own) and Hk otherwise.
    The defaults of eta, bounds and initial are the preset "paper" of `hypergradient_preset`.
    """

    eta: float
    log_forget: PerKeyHead | None
    initial: Float[Array, "P K"] | Float[Array, "B P K"] | float | None  # of every document; initial_state goes before
    anchor: Float[Array, "P K"] | float
    bounds: tuple[float, float] | None
    normalize: bool
    beta_aware: bool
    initial_state: State | None
    scale: float | None
    segment_ids: Int[Array, "B T"] | None
    chunk_size: int | None
    implementation: str | None
    context_axis: str | None


def osdn(q: Queries, k: Queries, v: Values, beta: PerHead, **options: Unpack[Hypergradient]) -> tuple[Values, State]:
    """Online Scaled DeltaNet: DeltaNet with a hypergradient preconditioner (arXiv 2605.13473)."""
    return _hypergradient(q, k, v, beta, None, {"beta_aware": False, **options})


def os_gdn(
    q: Queries, k: Queries, v: Values, beta: PerHead, log_decay: PerHead, **options: Unpack[Hypergradient]
) -> tuple[Values, State]:
    """Gated DeltaNet with a beta-aware hypergradient preconditioner (arXiv 2605.13473)."""
    return _hypergradient(q, k, v, beta, _scalar_decay(log_decay), {"beta_aware": True, **options})


def os_kda(
    q: Queries, k: Queries, v: Values, beta: PerHead, log_decay: PerChannel, **options: Unpack[Hypergradient]
) -> tuple[Values, State]:
    """Kimi Delta Attention with a beta-aware hypergradient preconditioner (arXiv 2605.13473)."""
    return _hypergradient(q, k, v, beta, _channel_decay(log_decay), {"beta_aware": True, **options})


# --- Gram preconditioner (Preconditioned DeltaNet) ------------------------------------------------------------------


class Gram(RuleOptions, total=False):
    """Keyword arguments of the rules with the Gram preconditioner; see `gram_preconditioner`."""

    center: Float[Array, " Hk"] | float  # default -0.2, the paper's initial value
    squash: float


def pdn(
    q: Queries,
    k: Queries,
    v: Values,
    beta: PerHead,
    gram_log_decay: PerKeyHead,
    gram_gain: PerKeyHead,
    **options: Unpack[Gram],
) -> tuple[Values, State]:
    """Preconditioned DeltaNet (arXiv 2604.21100); gram_log_decay and gram_gain are [B, T, Hk]."""
    return _gram(q, k, v, beta, None, gram_log_decay, gram_gain, options)


def pgdn(
    q: Queries,
    k: Queries,
    v: Values,
    beta: PerHead,
    log_decay: PerHead,
    gram_log_decay: PerKeyHead,
    gram_gain: PerKeyHead,
    **options: Unpack[Gram],
) -> tuple[Values, State]:
    """Preconditioned Gated DeltaNet (arXiv 2604.21100)."""
    return _gram(q, k, v, beta, _scalar_decay(log_decay), gram_log_decay, gram_gain, options)


def pkda(
    q: Queries,
    k: Queries,
    v: Values,
    beta: PerHead,
    log_decay: PerChannel,
    gram_log_decay: PerKeyHead,
    gram_gain: PerKeyHead,
    **options: Unpack[Gram],
) -> tuple[Values, State]:
    """Preconditioned Kimi Delta Attention (arXiv 2604.21100)."""
    return _gram(q, k, v, beta, _channel_decay(log_decay), gram_log_decay, gram_gain, options)


def exact_pdn(
    q: Queries, k: Queries, v: Values, *, ridge: float = 1.0, **options: Unpack[RuleOptions]
) -> tuple[Values, State]:
    """The delta rule under the exact Gram preconditioner, float64 only: S_t = (ridge I + K^T K)^-1 K^T V.

    The theorem of arXiv 2604.21100: with beta = 1 the memory is the ridge regression of the values on the keys.
    """
    k = checks.floating_array("k", k, 4, "[B, T, Hk, K]")
    batch, _, heads, key_dim = k.shape
    state = _state(options, ExactGramState, (batch, heads, key_dim, key_dim), "[B, Hk, K, K]")
    write_key, inverse = exact_gram_write_key(k, ridge=ridge, initial=state.preconditioner if state else None)
    if options.get("segment_ids") is not None:
        raise ValueError("segment_ids: got an array, expected None; the exact Gram rule has no packed form")
    if options.get("context_axis") is not None:
        raise ValueError("context_axis: got a name, expected None; the exact Gram rule is a reference for one device")
    return _run(q, k, v, _ones(q, k, v), options, write_key=write_key, after=_after(state, ExactGramState, inverse))


# --- shared ---------------------------------------------------------------------------------------------------------


def _run(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    options: Mapping[str, Any],
    *,
    write_key: jax.Array | None = None,
    log_decay: jax.Array | None = None,
    erase: bool = True,
    after: Callable[[jax.Array], State] = State,
) -> tuple[jax.Array, State]:
    """The delta rule; after(memory) is the state that is returned. A rule with a preconditioner has checked its own."""
    state = _state(options) if after is State else options.get("initial_state")
    rest: dict[str, Any] = {name: value for name, value in options.items() if name != "initial_state"}
    memory = None if state is None else state.memory
    o, memory = delta_rule(
        q, k, v, beta, write_key=write_key, log_decay=log_decay, erase=erase, initial_state=memory, **rest
    )
    return o, after(memory)


def _hypergradient(
    q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array, log_decay: jax.Array | None, options: dict[str, Any]
) -> tuple[jax.Array, State]:
    beta_aware = checks.flag("beta_aware", options.pop("beta_aware"))
    names = ("log_forget", "initial", "anchor", "normalize")
    own = {name: options.pop(name) for name in names if name in options}
    own["eta"], own["bounds"] = options.pop("eta", 1.0), options.pop("bounds", (0.0, 1e9))
    k = checks.floating_array("k", k, 4, "[B, T, Hk, K]")
    keys = k
    if beta_aware:
        v = checks.floating_array("v", v, 4, "[B, T, H, V]")
        if k.shape[2] and v.shape[2] % k.shape[2] == 0:
            keys = per_value_head(k, v.shape[2], axis=2)
    batch, _, heads, key_dim = keys.shape
    state = _state(options, HypergradientState, (batch, heads, key_dim), "[B, P, K]")
    if state is not None and state.preconditioner is not None:
        fresh = own.get("initial")
        own["restart"], own["initial"] = 0.0 if fresh is None else fresh, state.preconditioner
    written, final = hypergradient.preconditioned(
        keys,
        beta if beta_aware else None,
        **own,
        **_shared(options, hypergradient.IMPLEMENTATIONS),
        multiply=True,
    )
    after = _after(state, HypergradientState, final)
    return _run(q, k, v, beta, options, write_key=written, log_decay=log_decay, after=after)


def _gram(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    log_decay: jax.Array | None,
    gram_log_decay: jax.Array,
    gram_gain: jax.Array,
    options: Mapping[str, Any],
) -> tuple[jax.Array, State]:
    rest = dict(options)
    center, squash = rest.pop("center", -0.2), rest.pop("squash", 1.5)
    k = checks.floating_array("k", k, 4, "[B, T, Hk, K]")
    batch, _, heads, key_dim = k.shape
    state = _state(rest, GramState, (batch, heads, key_dim), "[B, Hk, K]")
    key, final = gram.preconditioned(
        k,
        gram_log_decay,
        gram_gain,
        center=center,
        squash=squash,
        initial=None if state is None else state.preconditioner,
        multiply=True,
        **_shared(rest, gram.IMPLEMENTATIONS),
    )
    after = _after(state, GramState, final)
    return _run(q, k, v, beta, rest, write_key=key, log_decay=log_decay, after=after)


def _shared(options: Mapping[str, Any], implementations: Collection[str]) -> dict[str, Any]:
    """What a preconditioner takes of the options. One that has not the delta rule's kernels chooses for itself."""
    shared = {name: options[name] for name in ("segment_ids", "chunk_size", "context_axis") if name in options}
    if options.get("implementation") in implementations:
        shared["implementation"] = options["implementation"]
    return shared


def _state(
    options: Mapping[str, Any], kind: type[State] = State, shape: tuple[int, ...] | None = None, layout: str = ""
) -> State | None:
    """The initial state, of this kind of rule or made by hand. Raises TypeError or ValueError, naming initial_state.

    shape, layout: of the preconditioner; None where the rule has none.
    """
    state = options.get("initial_state")
    if state is None:
        return None
    if not isinstance(state, State):
        raise TypeError(f"initial_state: got {type(state).__name__}, expected an ops.State or None")
    if type(state) not in (State, kind):
        raise ValueError(f"initial_state: got the {type(state).__name__} of another rule, expected a {kind.__name__}")
    if state.preconditioner is not None:
        if shape is None:
            raise ValueError("initial_state: got a preconditioner, expected the state of a rule without one")
        name = "initial_state.preconditioner"
        return state._replace(preconditioner=checks.shaped_array(name, state.preconditioner, shape, layout))
    return state


def _after(state: State | None, kind: type[State], preconditioner: jax.Array) -> Callable[[jax.Array], State]:
    """Makes the state after a call: of the type that came in, as `lax.scan` asks of a carry."""
    made = kind if state is None else type(state)
    return lambda memory: made(memory, preconditioner)


def _ones(*arrays: jax.Array) -> jax.Array:
    *_, v = (checks.floating_array("q, k and v", x, 4, "[B, T, heads, size]") for x in arrays)
    return jnp.ones(v.shape[:3], checks.accumulator_dtype(*arrays))


def _scalar_decay(log_decay: jax.Array) -> jax.Array:
    return checks.floating_array("log_decay", log_decay, 3, "[B, T, H]")


def _channel_decay(log_decay: jax.Array) -> jax.Array:
    return checks.floating_array("log_decay", log_decay, 4, "[B, T, H, K]")
