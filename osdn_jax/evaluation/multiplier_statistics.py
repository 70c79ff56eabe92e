"""Statistics of the factors d that preconditioners multiply keys by: by channel energy, by position, over time."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

QUARTERS = 4
"""Groups of channels by energy in `MultiplierStatistics.by_position`, the weakest first."""


class MultiplierStatistics(NamedTuple):
    """Statistics of d by value head.

    Attributes:
        channel_energy: mean of u = k^2 over valid tokens, [H, K].
        channel_mean: mean of d over valid tokens, [H, K].
        slope: [H], of the line fitted to log channel_mean against log channel_energy; -1 for Newton's method on a
            diagonal Gram, positive if strong channels get the larger factors. NaN without two channels above zero.
        by_position: mean of d over valid tokens and the channels of a quarter by energy, [H, 4, bins], weakest quarter
            first; NaN where no token is.
        mean, minimum, maximum: over valid tokens and channels, [H].
        share_on_bound: [H], share of d, over valid tokens and channels, on one of the bounds; None without bounds.
        path: sum over tokens of max_i |log d_{t+1,i} - log d_{t,i}|, by sequence, [B, H]. With 0 <= beta <d, u> <= 2
            and a fixed d, no token amplifies what is stored, in the norm of D^-1/2 S; with a d that changes, all tokens
            together amplify it by no more than exp(path / 2). Steps to another segment are left out: the state starts
            again there.
        undefined: share of these steps, over all sequences, at which a channel's d is not positive before or after,
            [H]; that channel is left out of the maximum, so path is then a lower bound of an infinite sum.
    """

    channel_energy: Float[np.ndarray, "H K"]
    channel_mean: Float[np.ndarray, "H K"]
    slope: Float[np.ndarray, " H"]
    by_position: Float[np.ndarray, "H Q bins"]
    mean: Float[np.ndarray, " H"]
    minimum: Float[np.ndarray, " H"]
    maximum: Float[np.ndarray, " H"]
    share_on_bound: Float[np.ndarray, " H"] | None
    path: Float[np.ndarray, "B H"]
    undefined: Float[np.ndarray, " H"]


def describe_multipliers(
    k: Float[np.ndarray, "B T H K"],
    d: Float[np.ndarray, "B T H K"],
    *,
    segment_ids: Int[np.ndarray, "B T"],
    valid: Bool[np.ndarray, "B T"],
    position_bins: Int[np.ndarray, "B T"],
    bins: int,
    bounds: tuple[float, float] | None = None,
) -> MultiplierStatistics:
    """Compute the statistics of a preconditioner's factors.

    Args:
        k: keys, [B, T, H, K].
        d: factors on the keys, [B, T, H, K].
        segment_ids: [B, T] integers; d starts again where the id changes.
        valid: [B, T], which tokens count.
        position_bins: [B, T], the bin of each token's position, from 0 to below `bins`.
        bins: number of bins.
        bounds: the smallest and the largest d that the preconditioner allows; None without bounds.
    """
    k, d = np.asarray(k, np.float64), np.asarray(d, np.float64)
    used, binned = d[valid], position_bins[valid]
    energy, mean = np.mean(np.square(k[valid]), axis=0), np.mean(used, axis=0)
    order = np.argsort(energy, axis=1, kind="stable")
    groups = np.array_split(order, QUARTERS, axis=1)  # of [H, about K / 4] channels each
    counts = np.bincount(binned, minlength=bins)
    by_position = np.full((d.shape[2], QUARTERS, bins), np.nan)
    for quarter, channels in enumerate(groups):
        if channels.shape[1]:  # fewer than four channels
            level = np.mean(np.take_along_axis(used, channels[None], axis=2), axis=2)
            sums = np.zeros((bins, d.shape[2]))
            np.add.at(sums, binned, level)
            by_position[:, quarter] = np.where(counts > 0, sums.T / np.maximum(counts, 1), np.nan)
    steps, undefined = _path_steps(d, segment_ids, valid)
    on_bound = None if bounds is None else np.mean((used <= bounds[0]) | (used >= bounds[1]), axis=(0, 2))
    return MultiplierStatistics(
        channel_energy=energy,
        channel_mean=mean,
        slope=np.array([_slope(e, m) for e, m in zip(energy, mean, strict=True)]),
        by_position=by_position,
        mean=np.mean(used, axis=(0, 2)),
        minimum=np.min(used, axis=(0, 2)),
        maximum=np.max(used, axis=(0, 2)),
        share_on_bound=on_bound,
        path=np.sum(steps, axis=1),
        undefined=undefined,
    )


def _path_steps(d: np.ndarray, segment_ids: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return max_i |log d_{t+1,i} - log d_{t,i}| by step, [B, T - 1, H], and the share of undefined steps, [H]."""
    positive = d > 0
    log_d = np.log(np.where(positive, d, 1.0))
    counted = (segment_ids[:, 1:] == segment_ids[:, :-1]) & valid[:, 1:] & valid[:, :-1]
    defined = positive[:, 1:] & positive[:, :-1]
    changes = np.where(defined, np.abs(np.diff(log_d, axis=1)), 0.0)
    steps = np.where(counted[:, :, None], np.max(changes, axis=3), 0.0)
    lacking = ~np.all(defined, axis=3)[counted]
    return steps, np.mean(lacking, axis=0) if len(lacking) else np.zeros(d.shape[2])


def _slope(energy: np.ndarray, mean: np.ndarray) -> float:
    """Return the least-squares slope of log mean against log energy over channels where both are positive."""
    both = (energy > 0) & (mean > 0)
    if np.sum(both) < 2:
        return float("nan")
    x, y = np.log(energy[both]), np.log(mean[both])
    x = x - np.mean(x)
    spread = float(np.sum(x * x))
    return float(np.sum(x * y)) / spread if spread > 0 else float("nan")
