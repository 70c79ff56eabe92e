"""Batches of a recall task: what the model reads, and the tokens at which it is asked for something."""

import numpy as np

from osdn_jax.data.recall import IGNORE

type Batch = dict[str, np.ndarray]
"""Arrays for `nn.likelihood_sums`: inputs and segment_ids [B, T]; positions, targets and weights [B, N]."""


def asked(tokens: np.ndarray, targets: np.ndarray, count: int) -> Batch:
    """Return examples with the asked tokens gathered, so that no other token needs logits.

    Args:
        tokens: [B, T] integers.
        targets: [B, T] integers, -100 where nothing is asked.
        count: N, the number of positions per example, at least `most_asked(targets)`; the rest have weight 0.

    Example:
        >>> batch = asked(np.array([[5, 6, 7]]), np.array([[-100, 9, -100]]), 2)
        >>> batch["positions"][0].tolist(), batch["targets"][0].tolist(), batch["weights"][0].tolist()
        ([1, 0], [9, 0], [1.0, 0.0])
    """
    wanted = targets != IGNORE
    positions = np.argsort(~wanted, axis=1, kind="stable")[:, :count].astype(np.int32)
    weights = np.take_along_axis(wanted, positions, axis=1)
    labels = np.where(weights, np.take_along_axis(targets, positions, axis=1), 0)
    return {
        "inputs": tokens.astype(np.int32),
        "segment_ids": np.ones(tokens.shape, np.int32),
        "positions": positions,
        "targets": labels.astype(np.int32),
        "weights": weights.astype(np.float32),
    }


def most_asked(targets: np.ndarray) -> int:
    """Return the largest number of asked tokens in an example, at least 1."""
    return max(1, int((targets != IGNORE).sum(axis=1).max()))


def same_asked(targets: np.ndarray) -> int | None:
    """Return the number of asked tokens per example; None if it differs between the examples."""
    counts = (targets != IGNORE).sum(axis=1)
    return int(counts[0]) if counts[0] and (counts == counts[0]).all() else None


def in_blocks(batch: Batch, size: int) -> Batch:
    """Return arrays [N // size, size, ...] of a batch [N, ...]; examples of weight 0 complete the last block."""
    missing = -len(batch["inputs"]) % size
    padded = {name: np.concatenate([x, np.repeat(x[-1:], missing, axis=0)]) for name, x in batch.items()}
    if missing:
        padded["weights"][-missing:] = 0.0
    return {name: x.reshape(-1, size, *x.shape[1:]) for name, x in padded.items()}
