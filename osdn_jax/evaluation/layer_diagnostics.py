"""Diagnostics of one layer's delta rule: its own writes next to those of its shadows and of the best fixed d."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from osdn_jax.evaluation.hindsight import STEPS, best_fixed_multipliers
from osdn_jax.evaluation.key_gram import KeyGram, gram_of_keys
from osdn_jax.evaluation.multiplier_statistics import MultiplierStatistics, describe_multipliers
from osdn_jax.evaluation.residuals import (
    SHADOWS,
    log_ratio,
    per_value_head,
    residual_ratio,
    write_keys,
    write_residuals,
)
from osdn_jax.nn.mixer import WriteInputs

BEST_SCALAR, BEST = "best_scalar", "best"
WRITES = {**SHADOWS, BEST_SCALAR: "best fixed c", BEST: "best fixed d"}
"""{name: label} of the write keys in `LayerDiagnostics.writes`: those of `SHADOWS`, and the best ones in hindsight."""

_MINIMUM_D = 1e-3  # where the search for the best fixed d starts, for a channel whose mean d is below


class Writes(NamedTuple):
    """The recurrence of a layer with one kind of write key, by value head and position.

    Attributes:
        ratio: geometric mean of the residual ratio q over valid tokens, [H].
        mean_ratio: arithmetic mean of q, [H].
        loss_before, loss_after: mean of f_t before and after the write of token t, [H].
        factor: mean of <d, u> = <w, k>, [H].
        step: mean of beta <d, u>, [H].
        outside: share of tokens with beta <d, u> outside of [0, 2], which increase their own residual, [H].
        ratio_by_position, loss_before_by_position, loss_after_by_position, factor_by_position: the same means over the
            tokens of each bin of positions, [H, bins]; NaN where no token is.
    """

    ratio: Float[np.ndarray, " H"]
    mean_ratio: Float[np.ndarray, " H"]
    loss_before: Float[np.ndarray, " H"]
    loss_after: Float[np.ndarray, " H"]
    factor: Float[np.ndarray, " H"]
    step: Float[np.ndarray, " H"]
    outside: Float[np.ndarray, " H"]
    ratio_by_position: Float[np.ndarray, "H bins"]
    loss_before_by_position: Float[np.ndarray, "H bins"]
    loss_after_by_position: Float[np.ndarray, "H bins"]
    factor_by_position: Float[np.ndarray, "H bins"]


class LayerDiagnostics(NamedTuple):
    """Diagnostics of one layer.

    Attributes:
        writes: {name in `WRITES`: the recurrence with these write keys}; the best ones only after a search.
        multipliers: statistics of the layer's own d.
        gram: spectrum and alignment of its keys, by key head.
        best_multipliers: the best fixed d in hindsight that was found, [H, K]; None without a search.
        identity_error: largest |e' - (1 - beta <w, k>) e| over the largest |e| of a token, e and e' both read from the
            state; a check of the identity behind the ratio, in the arithmetic of the diagnostics.
    """

    writes: dict[str, Writes]
    multipliers: MultiplierStatistics
    gram: KeyGram
    best_multipliers: Float[np.ndarray, "H K"] | None
    identity_error: float

    def regret(self, name: str) -> Float[np.ndarray, " H"] | None:
        """Return the mean loss before the write above that of the best fixed d, by head; None without a search."""
        if BEST not in self.writes:
            return None
        return self.writes[name].loss_before - self.writes[BEST].loss_before


class Positions(NamedTuple):
    """Position of each token from the start of its segment, in bins of equal width over the length T.

    Attributes:
        bins: the bin of each token, [B, T].
        first: the first position of each bin, [bins].
    """

    bins: Int[np.ndarray, "B T"]
    first: Int[np.ndarray, " bins"]


def bin_positions(segment_ids: Int[np.ndarray, "B T"], bins: int) -> Positions:
    """Return the bins of positions for packed sequences; there are min(bins, T) of them.

    Example:
        >>> bin_positions(np.array([[1, 1, 1, 1, 2, 2]]), bins=3).bins.tolist()
        [[0, 0, 1, 1, 0, 0]]
    """
    length = segment_ids.shape[1]
    bins, at = min(bins, length), np.arange(length)
    starts = np.concatenate([np.ones_like(segment_ids[:, :1], bool), np.diff(segment_ids, axis=1) != 0], axis=1)
    position = at - np.maximum.accumulate(np.where(starts, at, 0), axis=1)
    return Positions(position * bins // length, -(-np.arange(bins) * length // bins))


def diagnose_layer(
    inputs: WriteInputs,
    segment_ids: Int[np.ndarray, "B T"] | None = None,
    valid: Bool[np.ndarray, "B T"] | None = None,
    *,
    bounds: tuple[float, float] | None = None,
    bins: int = 64,
    hindsight_steps: int = STEPS,
) -> LayerDiagnostics:
    """Compute the diagnostics of a delta rule from what its recurrence is computed from.

    Args:
        inputs: of the layer, as `DeltaMixer.write_inputs` returns them; the arithmetic is in float32, or in float64 if
            they are.
        segment_ids: [B, T] integers, for packed sequences: the state is reset where the id changes. Default: one
            segment per sequence.
        valid: [B, T], which tokens count. Default: all.
        bounds: the smallest and the largest d that the preconditioner allows; None without bounds.
        bins: number of bins of positions. Default: 64.
        hindsight_steps: gradient steps of each search for the best fixed c and d; 0 for none. Default: 100.

    Example:
        >>> k = v = jnp.full((1, 4, 1, 1), 0.5)
        >>> inputs = WriteInputs(k, k, v, jnp.ones((1, 4, 1)), None, jnp.full((1, 4, 1, 1), 2.0))
        >>> found = diagnose_layer(inputs, hindsight_steps=0)
        >>> found.writes["actual"].ratio.tolist(), found.writes["one"].ratio.tolist()
        ([0.25], [0.5625])
    """
    shape = inputs.v.shape[:2]
    ids = np.ones(shape, np.int32) if segment_ids is None else np.asarray(segment_ids)
    valid = np.ones(shape, bool) if valid is None else np.asarray(valid, bool)
    positions = bin_positions(ids, bins)
    heads = per_value_head(inputs)
    keys = _write_keys(heads)
    packed = None if segment_ids is None else jnp.asarray(ids)
    tokens = {name: _replay(heads, keys[name], packed) for name in SHADOWS}  # jit returns dicts in another order
    statistics = describe_multipliers(
        np.asarray(heads.k),
        np.asarray(heads.multipliers),
        segment_ids=ids,
        valid=valid,
        position_bins=positions.bins,
        bins=len(positions.first),
        bounds=bounds,
    )
    best = None
    if hindsight_steps:
        found, best = _in_hindsight(heads, packed, valid, statistics.channel_mean, tokens["one"], hindsight_steps)
        tokens |= found
    return LayerDiagnostics(
        writes={name: _writes(found, heads.beta, valid, positions) for name, found in tokens.items()},
        multipliers=statistics,
        gram=gram_of_keys(np.asarray(heads.k[:, :, :: inputs.v.shape[2] // inputs.k.shape[2]]), valid),
        best_multipliers=None if best is None else np.asarray(best, np.float64),
        identity_error=float(tokens["actual"].identity_error),
    )


class _Tokens(NamedTuple):
    """Results of a recurrence: numbers per token and head, [B, T, H]."""

    loss_before: Array
    loss_after: Array
    factor: Array  # <w, k>
    identity_error: Array  # one number


_write_keys = jax.jit(lambda inputs: write_keys(inputs.k, inputs.multipliers))


@jax.jit
def _replay(inputs: WriteInputs, write_key: Array, segment_ids: Array | None) -> _Tokens:
    """Run the recurrence of a layer, with its queries, keys, values and gates, with other write keys."""
    before, after = write_residuals(
        inputs.k, inputs.v, inputs.beta, write_key, log_decay=inputs.log_decay, segment_ids=segment_ids
    )
    factor = jnp.sum(write_key * inputs.k, axis=-1)
    deviation = after - (1.0 - (inputs.beta * factor)[..., None]) * before
    norms = [jnp.max(jnp.linalg.norm(x, axis=-1)) for x in (deviation, before)]
    loss_before, loss_after = (0.5 * jnp.sum(jnp.square(x), axis=-1) for x in (before, after))
    return _Tokens(loss_before, loss_after, factor, norms[0] / norms[1])


def _in_hindsight(
    inputs: WriteInputs,
    segment_ids: Array | None,
    valid: np.ndarray,
    channel_mean: np.ndarray,
    unit: _Tokens,
    steps: int,
) -> tuple[dict[str, _Tokens], Array]:
    """Return the recurrences with the best fixed c and d, and that d.

    Each search starts, head by head, from the better of two: d = 1 (then: the best c) and the mean of the layer's own d
    over tokens and channels (then: over tokens).
    """
    k, found = inputs.k, {}
    mean = np.maximum(channel_mean, _MINIMUM_D)
    best, best_tokens = jnp.ones(k.shape[2:], k.dtype), unit
    for name, other in ((BEST_SCALAR, np.broadcast_to(mean.mean(axis=1, keepdims=True), mean.shape)), (BEST, mean)):
        other = jnp.asarray(other, k.dtype)
        losses = [_mean_loss(x, valid) for x in (best_tokens, _replay(inputs, other[None, None] * k, segment_ids))]
        better = np.isfinite(losses[1]) & ~(losses[1] >= losses[0])  # the first may have overflowed
        best = best_fixed_multipliers(
            k,
            inputs.v,
            inputs.beta,
            log_decay=inputs.log_decay,
            segment_ids=segment_ids,
            valid=jnp.asarray(valid),
            start=jnp.where(jnp.asarray(better)[:, None], other, best),
            per_channel=name == BEST,
            steps=steps,
        ).multipliers
        found[name] = best_tokens = _replay(inputs, best[None, None] * k, segment_ids)
    return found, best


def _mean_loss(tokens: _Tokens, valid: np.ndarray) -> np.ndarray:
    return np.mean(np.asarray(tokens.loss_before, np.float64)[valid], axis=0)


def _writes(tokens: _Tokens, beta: Array, valid: np.ndarray, positions: Positions) -> Writes:
    """Return the means over valid tokens; sums are in float64."""
    before, after, factor = (np.asarray(x, np.float64) for x in tokens[:3])
    step = np.asarray(beta, np.float64) * factor
    logs = log_ratio(step, before)
    bins = positions.bins[valid]
    counts = np.bincount(bins, minlength=len(positions.first))

    def mean(x: np.ndarray) -> Any:
        return np.mean(x[valid], axis=0)

    def by_position(x: np.ndarray) -> Any:
        sums = np.stack([np.bincount(bins, weights=row, minlength=len(counts)) for row in x[valid].T])
        return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)

    return Writes(
        ratio=np.exp(mean(logs)),
        mean_ratio=mean(residual_ratio(step, before)),
        loss_before=mean(before),
        loss_after=mean(after),
        factor=mean(factor),
        step=mean(step),
        outside=mean(((step < 0) | (step > 2)).astype(np.float64)),
        ratio_by_position=np.exp(by_position(logs)),
        loss_before_by_position=by_position(before),
        loss_after_by_position=by_position(after),
        factor_by_position=by_position(factor),
    )
