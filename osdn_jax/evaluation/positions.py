"""Perplexity by position in the text, which shows how far a model reads beyond the length that it was trained on."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from osdn_jax.evaluation.scoring import token_scores
from osdn_jax.nn.split import Parameters


class Bucket(NamedTuple):
    """The likelihood of the tokens at some positions of all windows.

    Attributes:
        start: first position, counted from 0: the number of tokens before it in its window.
        stop: the position after the last one.
        nats: mean negative log-likelihood of a token.
        error: standard error of `nats`, over windows; NaN for one window.
        tokens: number of tokens that were scored.
        windows: number of windows that they are from.
    """

    start: int
    stop: int
    nats: float
    error: float
    tokens: int
    windows: int

    @property
    def perplexity(self) -> float:
        """exp(nats)."""
        return float(np.exp(self.nats))


def perplexity_by_position(
    apply: Callable[..., Any],
    parameters: Parameters,
    windows: Iterable[Int[np.ndarray, "B S"]],
    *,
    bucket: int,
    ignored: int | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> list[Bucket]:
    """Return the likelihood of tokens by their position in a window.

    A window is read from an empty state, in pieces of `bucket` tokens, each from the state after the one before it: the
    memory does not depend on the length. For a recurrent model this equals one call with the whole window; attention
    sees the max_length tokens of its state before a piece.

    Args:
        apply: the model, as returned by `nn.split_model`.
        parameters: the model's parameters.
        windows: batches of S tokens; the S - 1 after the first are scored. All have one S, and each batch has as many
            rows as the first or fewer.
        bucket: positions in a bucket; the last bucket may have fewer.
        ignored: a token that is not scored, such as the start of a document. Default: None, all are scored.
        progress: called with the number of windows that are done since its last call.

    Returns:
        The buckets, in the order of the text. A bucket in which nothing was scored is left out.

    Raises:
        ValueError: bucket is below 1, a window has fewer than two tokens, windows differ in length, or there is none.

    Example:
        >>> from flax import nnx
        >>> from osdn_jax import nn
        >>> mixer = nn.mixer_config("osdn", width=8, heads=1, key_dim=4, value_dim=4)
        >>> config = nn.ModelConfig(vocab_size=16, layers=1, mixer=mixer, mlp_dim=8)
        >>> apply, parameters = nn.split_model(nn.CausalLM(config, rngs=nnx.Rngs(0)))
        >>> tokens = np.random.default_rng(0).integers(16, size=(4, 65))
        >>> buckets = perplexity_by_position(apply, parameters, [tokens], bucket=32)
        >>> [(x.start, x.stop, x.tokens) for x in buckets]
        [(0, 32, 128), (32, 64, 128)]
    """
    if bucket < 1:
        raise ValueError(f"bucket: got {bucket}, expected at least 1")
    program = jax.jit(functools.partial(token_scores, apply))
    nats, counts = [], []  # of each window, by bucket
    size = rows = 0
    for batch in windows:
        tokens = np.asarray(batch, np.int32)
        if tokens.ndim != 2 or tokens.shape[1] < 2 or (size and tokens.shape[1] != size):
            expected = f"[B, {size}]" if size else "[B, S] with at least two tokens"
            raise ValueError(f"windows: got an array of shape {list(tokens.shape)}, expected {expected}")
        size, rows = tokens.shape[1], max(rows, len(tokens))
        padded = np.pad(tokens, [(0, rows - len(tokens)), (0, -(size - 1) % bucket)])
        states = None
        found = []
        for start in range(0, padded.shape[1] - 1, bucket):
            part = padded[:, start : start + bucket + 1]
            scores, states = program(parameters, part[:, :-1], part[:, 1:], states)
            found.append(scores.log_likelihoods)
        values = np.concatenate([np.asarray(x) for x in found], axis=1)[: len(tokens)].astype(np.float64)
        scored = np.pad(np.ones((len(tokens), size - 1), bool), [(0, 0), (0, padded.shape[1] - size)])
        if ignored is not None:
            scored &= padded[: len(tokens), 1:] != ignored
        by_bucket = (len(tokens), -1, bucket)
        nats.append(-np.where(scored, values, 0.0).reshape(by_bucket).sum(axis=2))
        counts.append(scored.reshape(by_bucket).sum(axis=2))
        progress(len(tokens))
    if not nats:
        raise ValueError("windows: got none, expected at least one")
    return _buckets(np.concatenate(nats), np.concatenate(counts), bucket, size - 1)


def _buckets(
    nats: Float[np.ndarray, "N buckets"], counts: Int[np.ndarray, "N buckets"], bucket: int, length: int
) -> list[Bucket]:
    """Return the buckets with anything scored; the error is that of a ratio of sums over windows."""
    found = []
    for i in range(nats.shape[1]):
        total = int(counts[:, i].sum())
        if not total:
            continue
        mean, windows = float(nats[:, i].sum() / total), int((counts[:, i] > 0).sum())
        residuals = nats[:, i] - mean * counts[:, i]
        spread = float(np.sqrt((residuals**2).sum() * windows / (windows - 1)) / total) if windows > 1 else float("nan")
        found.append(Bucket(i * bucket, min((i + 1) * bucket, length), mean, spread, total, windows))
    return found
