"""Log-likelihood of given tokens, in batches of a few shapes, with the state carried through long texts."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from osdn_jax.nn.split import Parameters

SHORTEST = 16  # tokens; shorter rows are padded to this length
PIECE = 2048  # tokens of a row that are computed at a time, by default
BATCH = 16  # rows at a time, by default
_LOGITS = 2**25  # logits that exist at a time: 128 MB in float32


class Score(NamedTuple):
    """Log-likelihood of a continuation.

    Attributes:
        log_likelihood: sum of the natural logarithms of its tokens' probabilities.
        greedy: every token of it is the most likely one.
    """

    log_likelihood: float
    greedy: bool


class TokenScores(NamedTuple):
    """Scores of single tokens.

    Attributes:
        log_likelihoods: natural logarithms of the targets' probabilities.
        greedy: the target is the most likely token.
    """

    log_likelihoods: Float[Array, "B T"]
    greedy: Bool[Array, "B T"]


def token_scores(
    apply: Callable[..., Any],
    parameters: Parameters,
    inputs: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    states: Any = None,
) -> tuple[TokenScores, Any]:
    """Return the scores of targets, and the states after the inputs.

    Logits are float32, over the model's whole vocabulary, and exist for a part of the sequence at a time.

    Args:
        apply: (parameters, ...) -> ..., as `nn.split_model` returns it for a `CausalLM`.
        parameters: the model's parameters.
        inputs: [B, T] tokens.
        targets: [B, T], the tokens after them.
        states: as returned by an earlier call, to continue its sequences. Default: None, start sequences.
    """
    hidden, states = apply(parameters, inputs, states, method="features")
    unembedding = apply(parameters, method="unembedding").astype(hidden.dtype)
    (batch, length), vocabulary = inputs.shape, unembedding.shape[0]
    size = max(1, min(length, _LOGITS // (batch * vocabulary)))
    count = -(-length // size)

    def chunks(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, [(0, 0), (0, count * size - length), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(padded.reshape(batch, count, size, *x.shape[2:]), 1, 0)

    def score(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, target = chunk
        logits = _logits(x, unembedding)
        chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1).astype(target.dtype) == target

    def whole(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(batch, count * size)[:, :length]

    log_likelihoods, greedy = jax.lax.map(score, (chunks(hidden), chunks(targets)))
    return TokenScores(whole(log_likelihoods), whole(greedy)), states


def _logits(hidden: jax.Array, unembedding: jax.Array) -> jax.Array:
    wide = jnp.float64 if hidden.dtype == jnp.float64 else jnp.float32
    return jnp.matmul(hidden, unembedding.T, preferred_element_type=wide)


class TokenScorer:
    """Scores continuations in batches.

    Rows are padded at their end to a power of two, so that few programs are compiled; no token sees what follows it, so
    padding changes no score but by rounding. A row longer than `piece` is computed in pieces, each from the state
    after the one before it: in memory that does not depend on its length, and equal to one call for a recurrent model.
    Attention sees the `max_length` tokens of its state before a piece.

    Args:
        apply: as in `token_scores`.
        parameters: the model's parameters.
        batch_size: rows at a time, at most. Default: 16.
        piece: tokens of a row at a time, a power of two of at least 16. Default: 2048.

    Raises:
        ValueError: batch_size or piece is out of range.

    Example:
        >>> from flax import nnx
        >>> from osdn_jax import nn
        >>> mixer = nn.mixer_config("osdn", width=8, heads=1, key_dim=4, value_dim=4)
        >>> config = nn.ModelConfig(vocab_size=16, layers=1, mixer=mixer, mlp_dim=8)
        >>> scorer = TokenScorer(*nn.split_model(nn.CausalLM(config, rngs=nnx.Rngs(0))))
        >>> [score] = scorer.score([([1, 2, 3], [4, 5])])
        >>> score.log_likelihood < 0, score.greedy
        (True, False)
    """

    def __init__(
        self, apply: Callable[..., Any], parameters: Parameters, *, batch_size: int = BATCH, piece: int = PIECE
    ) -> None:
        """Check the arguments. Nothing is compiled yet."""
        check_sizes(batch_size, piece)
        self.apply, self.parameters, self.batch_size, self.piece = apply, parameters, batch_size, piece
        self._program: Any = jax.jit(functools.partial(token_scores, apply))

    def score(
        self,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        progress: Callable[[int], object] = lambda done: None,
    ) -> list[Score]:
        """Return the score of the second part of each pair, after the first, in the order of the pairs.

        Args:
            pairs: (context, continuation) as tokens; a context has at least one token, such as the start of a document.
            progress: called with the number of pairs that are done since its last call.

        Raises:
            ValueError: a context is empty.
        """
        for number, (context, _) in enumerate(pairs):
            if not len(context):
                raise ValueError(f"pairs: got an empty context in pair {number}, expected at least one token")
        rows = [np.asarray([*context, *continuation], np.int32) for context, continuation in pairs]
        scores: list[Score] = [Score(0.0, True)] * len(rows)
        empty = [i for i, (_, continuation) in enumerate(pairs) if not len(continuation)]
        progress(len(empty))
        lengths = {i: len(row) - 1 for i, row in enumerate(rows) if len(pairs[i][1])}
        for indices, shape in batches(lengths, self.batch_size, self.piece):
            tokens = np.zeros((shape[0], shape[1] + 1), np.int32)
            for place, i in enumerate(indices):
                tokens[place, : len(rows[i])] = rows[i]
            log_likelihoods, greedy = self.tokens(tokens)
            for place, i in enumerate(indices):
                scored = slice(len(pairs[i][0]) - 1, len(rows[i]) - 1)
                scores[i] = Score(
                    float(log_likelihoods[place, scored].sum(dtype=np.float64)), bool(greedy[place, scored].all())
                )
            progress(len(indices))
        return scores

    def tokens(self, tokens: Int[np.ndarray, "B S"]) -> tuple[Float[np.ndarray, "B T"], np.ndarray]:
        """Return (log-likelihoods, greedy) [B, S - 1] of the tokens after the first, computed in pieces."""
        states, found = None, []
        for start in range(0, tokens.shape[1] - 1, self.piece):
            part = tokens[:, start : start + self.piece + 1]
            scores, states = self._program(self.parameters, part[:, :-1], part[:, 1:], states)
            found.append(scores)
        return (
            np.concatenate([np.asarray(x.log_likelihoods) for x in found], axis=1),
            np.concatenate([np.asarray(x.greedy) for x in found], axis=1),
        )


def check_sizes(batch_size: int, piece: int) -> None:
    """Raise ValueError unless batch_size is at least 1 and piece a power of two of at least 16."""
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
    if piece < SHORTEST or piece & (piece - 1):
        raise ValueError(f"piece: got {piece}, expected a power of two of at least {SHORTEST}")


def batches(lengths: dict[int, int], batch_size: int, piece: int) -> Iterator[tuple[list[int], tuple[int, int]]]:
    """Yield (indices, (rows, length)) of batches of few shapes, the longest first.

    A length is a power of two up to `piece`, or a multiple of it. Rows are `batch_size`, or fewer (a power of two) if
    there are not as many of a length.

    Args:
        lengths: {index: number of tokens}.
        batch_size: rows of a batch, at most.
        piece: as in `TokenScorer`.

    Example:
        >>> list(batches({0: 3, 1: 40, 2: 12, 3: 16}, 2, 32))
        [([1], (1, 64)), ([3, 2], (2, 16)), ([0], (2, 16))]
    """
    groups: dict[int, list[int]] = {}
    for i in sorted(lengths, key=lambda i: -lengths[i]):
        groups.setdefault(padded_length(lengths[i], piece), []).append(i)
    for length, members in groups.items():
        rows = min(batch_size, 1 << (len(members) - 1).bit_length())
        for start in range(0, len(members), rows):
            yield members[start : start + rows], (rows, length)


def padded_length(length: int, piece: int) -> int:
    """Return the next power of two of at least 16, or above `piece` the next multiple of it."""
    if length > piece:
        return -(-length // piece) * piece
    return max(SHORTEST, 1 << (length - 1).bit_length())
