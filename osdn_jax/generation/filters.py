"""Draws of tokens from logits, with settings per row that are arrays, so that other settings compile nothing new.

The filters are applied in the order of Transformers: repetition penalty, forbidden tokens, temperature, top_k, top_p,
min_p. Each sees the distribution that those before it leave.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

_INFINITE = 0x7F800000  # the bits of an infinite float32


class Settings(NamedTuple):
    """Settings of each of B rows; a pytree of arrays.

    Attributes:
        temperature: [B], at least 0; 0 takes the most likely token.
        top_k: [B], number of the most likely tokens that are kept; 0 for all.
        top_p: [B], smallest total probability of the most likely tokens that are kept; 1 for all.
        min_p: [B], probability relative to the largest one below which tokens are dropped; 0 for none.
        repetition_penalty: [B], divisor of positive logits and factor of negative ones of tokens seen before; 1: none.
        seed: [B, 2], the high and low 32 bits of a random seed.
        max_tokens: [B], number of tokens of the continuation, at most.
        forbidden: [B, vocabulary], tokens that are never drawn.
        stop: [B, vocabulary], tokens that end a continuation.
    """

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    repetition_penalty: Float[Array, " B"]
    seed: UInt32[Array, "B 2"]
    max_tokens: Int[Array, " B"]
    forbidden: Bool[Array, "B Vocab"]
    stop: Bool[Array, "B Vocab"]


def draw(
    logits: Float[Array, "B Vocab"], seen: Bool[Array, "B Vocab"], settings: Settings, number: Int[Array, ""]
) -> Int[Array, " B"]:
    """Return a token for each row, or -1 where none can be drawn: logits of NaN, or -inf for all allowed tokens.

    A row's token depends on its own logits, settings and seed and on `number` only.

    Args:
        logits: of the next token.
        seen: tokens of the prompt and of its continuation so far.
        settings: settings of each row.
        number: index of the token in its continuation, which selects the random numbers.
    """
    logits = allowed_logits(logits, seen, settings)
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def sampled() -> jax.Array:
        below = filtered(logits, settings)
        keys = jax.random.wrap_key_data(settings.seed, impl="threefry2x32")  # for the low 32 bits: random.key(seed)
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
        drawn = jax.vmap(jax.random.categorical)(keys, below).astype(jnp.int32)
        return jnp.where(settings.temperature > 0, drawn, likeliest)

    token = jax.lax.cond(jnp.any(settings.temperature > 0), sampled, lambda: likeliest)
    return jnp.where(jnp.max(logits, axis=-1) > -jnp.inf, token, -1)


def allowed_logits(
    logits: Float[Array, "B Vocab"], seen: Bool[Array, "B Vocab"], settings: Settings
) -> Float[Array, "B Vocab"]:
    """Return the logits after the repetition penalty (arXiv 1909.05858), -inf for forbidden tokens."""
    penalty = settings.repetition_penalty[:, None].astype(logits.dtype)
    penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
    # A penalty of 1 also leaves infinite logits as they are.
    logits = jnp.where(seen & (penalty != 1), penalised, logits)
    return jnp.where(settings.forbidden, -jnp.inf, logits)


def filtered(logits: Float[Array, "B Vocab"], settings: Settings) -> Float[Array, "B Vocab"]:
    """Return logits / temperature up to a constant per row, -inf for the tokens that top_k, top_p or min_p drop."""
    # A row of temperature 0 takes the most likely token whatever this returns for it.
    below = tempered(logits, jnp.where(settings.temperature > 0, settings.temperature, 1))
    ranked = (settings.top_k > 0) | (settings.top_p < 1)

    def kept() -> jax.Array:
        return most_likely(below, settings.top_k, settings.top_p)

    keep = jax.lax.cond(jnp.any(ranked), kept, lambda: jnp.ones(below.shape, bool))
    # The largest of a row is 0, so exp(below) is the probability relative to the largest one.
    keep &= below >= jnp.log(settings.min_p.astype(below.dtype))[:, None]
    return jnp.where(keep, below, -jnp.inf)


def tempered(logits: Float[Array, "B Vocab"], temperature: Float[Array, " B"]) -> Float[Array, "B Vocab"]:
    """Return logits / temperature, minus a constant per row that makes the largest 0, for temperatures above 0.

    Dividing first could overflow to inf and give inf - inf.
    """
    logits = logits.astype(jnp.float64 if logits.dtype == jnp.float64 else jnp.float32)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    below = jnp.where(logits == largest, 0, logits - largest) / temperature[:, None].astype(logits.dtype)
    return jnp.where(logits == -jnp.inf, -jnp.inf, below)


def divisor(temperature: float, dtype: np.dtype) -> np.ndarray:
    """Return a temperature above 0 as a positive finite number of a dtype, in whose range it may not be."""
    limits = jnp.finfo(dtype)
    return np.clip(temperature, float(limits.tiny), float(limits.max)).astype(dtype)


def most_likely(
    below: Float[Array, "B Vocab"], top_k: Int[Array, " B"], top_p: Float[Array, " B"]
) -> Bool[Array, "B Vocab"]:
    """Return a mask of the top_k most likely tokens (0: all), and of these of the fewest that sum to top_p.

    Of equally likely tokens those with the lower index are kept. At least one token is kept.

    Args:
        below: logits, of which the largest of each row is 0.
        top_k: as in `Settings`.
        top_p: as in `Settings`.
    """
    below = below.astype(jnp.float32)
    vocabulary = below.shape[-1]
    count = jnp.where(top_k > 0, jnp.minimum(top_k, vocabulary), vocabulary).astype(jnp.float32)
    keep = _fewest(below, jnp.ones_like(below), count)
    likely = jax.nn.softmax(jnp.where(keep, below, -jnp.inf), axis=-1)
    # float32 may round top_p to 0. Rounding of the sum must not drop a token if all are wanted.
    share = jnp.where(top_p < 1, jnp.maximum(top_p, jnp.finfo(jnp.float32).tiny), jnp.inf).astype(jnp.float32)
    return keep & _fewest(below, likely, share)


def _fewest(
    below: Float[Array, "B Vocab"], weight: Float[Array, "B Vocab"], target: Float[Array, " B"]
) -> Bool[Array, "B Vocab"]:
    """Return a mask of the fewest most likely tokens whose weights sum to the target, all if none do.

    The last one of them is found by bisection, first its logit, then its index: on a CPU that is several times as fast
    as a sort, and compiles faster.
    """
    distance = jax.lax.bitcast_convert_type(jnp.abs(below), jnp.int32)  # as integers, in the same order
    index = jnp.broadcast_to(jnp.arange(below.shape[-1], dtype=jnp.int32), below.shape)

    def enough(mask: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(mask, weight, 0), axis=-1) >= target

    def first(largest: int, mask: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """Return the smallest number from 0 to largest whose mask is enough, [B, 1]; largest if there is none."""

        def halve(_: jax.Array, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            low, high = ends
            middle = low + (high - low) // 2
            here = enough(mask(middle))[:, None]
            return jnp.where(here, low, middle + 1), jnp.where(here, middle, high)

        ends = (jnp.zeros_like(index[:, :1]), jnp.full_like(index[:, :1], largest))
        return jax.lax.fori_loop(0, largest.bit_length(), halve, ends)[1]

    farthest = first(_INFINITE, lambda x: distance <= x)
    last = first(below.shape[-1] - 1, lambda x: (distance < farthest) | ((distance == farthest) & (index <= x)))
    return (distance < farthest) | ((distance == farthest) & (index <= last))
