"""Draws without replacement for many examples at once."""

import numpy as np
from jaxtyping import Float, Int

_BLOCK = 1 << 22  # random numbers that are held at a time
_DENSE = 4  # with at most this many items for each draw, all items are shuffled instead of redrawn


def distinct(rng: np.random.Generator, examples: int, count: int, low: int, high: int) -> Int[np.ndarray, "N count"]:
    """Draw `count` different integers of low..high - 1 per example, uniformly, in random order.

    Duplicates are drawn again until there are none. The procedure treats all integers alike, so every ordered choice
    of different integers is equally probable.
    """
    population = high - low
    if population <= _DENSE * count:
        return low + np.argsort(rng.random((examples, population)), axis=1)[:, :count]
    drawn = rng.integers(low, high, (examples, count))
    rows = np.arange(examples)
    while len(rows):
        part = drawn[rows]
        order = np.argsort(part, axis=1, kind="stable")
        ordered = np.take_along_axis(part, order, axis=1)
        repeated = np.zeros(part.shape, bool)
        np.put_along_axis(repeated, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
        part[repeated] = rng.integers(low, high, int(repeated.sum()))
        drawn[rows] = part
        rows = rows[repeated.any(axis=1)]
    return drawn


def weighted_distinct(
    rng: np.random.Generator, examples: int, count: int, weights: Float[np.ndarray, " S"]
) -> Int[np.ndarray, "N count"]:
    """Draw `count` different indices of `weights` per example, one after another, each in proportion to its weight.

    The order is that of the draws, as in `np.random.choice(replace=False, p=...)`. The keys log(w) + Gumbel noise,
    sorted, have this distribution (Yellott 1977, https://doi.org/10.1016/0022-2496(77)90026-8).
    """
    logits, step = np.log(weights), max(1, _BLOCK // len(weights))
    chosen = np.empty((examples, count), np.int64)
    for start in range(0, examples, step):
        rows = chosen[start : start + step]
        keys = -logits - rng.gumbel(size=(len(rows), len(weights)))
        if count < len(weights):  # only the first ones need an order
            part = np.argpartition(keys, count, axis=1)[:, :count]
            order = np.argsort(np.take_along_axis(keys, part, axis=1), axis=1)
            rows[:] = np.take_along_axis(part, order, axis=1)
        else:
            rows[:] = np.argsort(keys, axis=1)
    return chosen


def other_order(rng: np.random.Generator, before: Int[np.ndarray, "N count"]) -> Int[np.ndarray, "N count"]:
    """Shuffle every row into another order than it has. A row has different entries; one entry stays as it is."""
    after = rng.permuted(before, axis=1)
    while before.shape[1] > 1 and (same := (after == before).all(axis=1)).any():
        after[same] = rng.permuted(before[same], axis=1)
    return after
