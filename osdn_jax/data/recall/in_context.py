"""In-context recall as in MAD: pairs that come again and again, also among noise."""

from typing import Any

import numpy as np

from osdn_jax.data.recall.arguments import (
    IGNORE,
    checked_bool,
    checked_even,
    checked_float,
    checked_int,
    generator,
)
from osdn_jax.data.recall.multi_query import Recall


def in_context_recall(
    examples: int, length: int = 128, *, vocabulary: int = 16, all_tokens: bool = False, seed: Any
) -> Recall:
    """Return in-context recall: whenever a key has occurred before, its value is asked.

    An example is k1 v1 k2 v2 ...: keys are drawn with replacement from 0..V // 2 - 1, and each has one value of
    V // 2..V - 1 throughout the example, drawn with replacement. The target at a key that has occurred before is its
    value. The last key is drawn from those before it, so that each example has a question. This is MAD's multi-query
    form, its default. MAD leaves out the last token, which nothing depends on.

    Args:
        examples: N, at least 1.
        length: L, tokens per example; even, at least 4.
        vocabulary: V, the number of tokens, at least 2.
        all_tokens: make the next token the target at every position but the last, as MAD trains (but does not test).
        seed: an integer of at least 0, or a tuple of them.

    Returns:
        tokens and targets, both [N, L] int32; -100 where nothing is asked.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument is out of range, or the length is odd.

    Source:
        Poli et al., "Mechanistic Design and Scaling of Hybrid Architectures" (https://arxiv.org/abs/2403.17844), and
        its code, https://github.com/athms/mad-lab, mad/data/instances.py.

    Example:
        >>> tokens, targets = in_context_recall(1, 12, vocabulary=8, seed=0)
        >>> tokens[0].tolist()
        [3, 7, 2, 6, 2, 6, 1, 7, 1, 7, 2, 6]
        >>> targets[0].tolist()
        [-100, -100, -100, -100, 6, -100, -100, -100, 7, -100, 6, -100]
    """
    return _pairs(examples, length, vocabulary, 0, 0.0, all_tokens, seed)


def noisy_in_context_recall(
    examples: int,
    length: int = 128,
    *,
    vocabulary: int = 32,
    noise_vocabulary: int = 16,
    noise: float = 0.2,
    all_tokens: bool = False,
    seed: Any,
) -> Recall:
    """Return noisy in-context recall: some of the pairs of `in_context_recall` are two tokens of noise instead.

    Keys and values are the halves of the first V - `noise_vocabulary` tokens; the rest is noise. Each pair but the
    last is noise with probability `noise`, except for one at random, so that there is a key to ask for. (MAD's code
    can spare the last pair, which is never noise, and then fails if all the others are noise.)

    Args:
        examples: N, at least 1.
        length: L, tokens per example; even, at least 4.
        vocabulary: V, the number of tokens including noise.
        noise_vocabulary: number of noise tokens, at least 1, at most V - 2.
        noise: probability of noise, in [0, 1].
        all_tokens: as in `in_context_recall`.
        seed: an integer of at least 0, or a tuple of them.

    Returns:
        tokens and targets, both [N, L] int32; -100 where nothing is asked.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument is out of range, or the length is odd.

    Source:
        As `in_context_recall`.

    Example:
        >>> tokens, targets = noisy_in_context_recall(1, 12, vocabulary=12, noise_vocabulary=4, noise=0.5, seed=0)
        >>> tokens[0].tolist()  # 8..11 are noise
        [8, 8, 2, 6, 2, 6, 1, 7, 1, 7, 2, 6]
        >>> targets[0].tolist()
        [-100, -100, -100, -100, 6, -100, -100, -100, 7, -100, 6, -100]
    """
    noise_vocabulary = checked_int("noise_vocabulary", noise_vocabulary, 1)
    return _pairs(examples, length, vocabulary, noise_vocabulary, noise, all_tokens, seed)


def _pairs(
    examples: Any, length: Any, vocabulary: Any, noise_vocabulary: int, noise: Any, all_tokens: Any, seed: Any
) -> Recall:
    examples, noise = checked_int("examples", examples, 1), checked_float("noise", noise, 0, 1)
    pairs = checked_even("length", checked_int("length", length, 4)) // 2
    vocabulary = checked_int("vocabulary", vocabulary, 2)
    if (size := vocabulary - noise_vocabulary) < 2:
        raise ValueError(
            f"vocabulary: got {vocabulary}, expected at least noise_vocabulary + 2 = {noise_vocabulary + 2}"
        )
    all_tokens = checked_bool("all_tokens", all_tokens)
    rng = generator(seed)
    keys = rng.integers(0, size // 2, (examples, pairs), np.int32)
    is_noise = rng.random((examples, pairs)) < noise
    rows = np.arange(examples)
    is_noise[rows, rng.integers(0, pairs - 1, examples)] = False
    is_noise[:, -1] = False
    occurred = np.zeros((examples, size // 2), bool)
    repeated = np.zeros((examples, pairs), bool)
    for pair in range(pairs - 1):
        key, real = keys[:, pair], ~is_noise[:, pair]
        repeated[:, pair] = occurred[rows, key] & real
        occurred[rows, key] |= real
    keys[:, -1] = np.where(occurred, rng.random(occurred.shape), -1).argmax(axis=1)
    repeated[:, -1] = True
    values = np.take_along_axis(rng.integers(size // 2, size, (examples, size // 2), np.int32), keys, axis=1)
    tokens = np.stack([keys, values], axis=2)
    if noise_vocabulary:
        drawn = rng.integers(size, vocabulary, tokens.shape, np.int32)
        tokens = np.where(is_noise[:, :, None], drawn, tokens)
    answers = np.where(repeated, values, np.int32(IGNORE))
    targets = np.stack([answers, np.full_like(answers, IGNORE)], axis=2)
    tokens, targets = tokens.reshape(examples, -1), targets.reshape(examples, -1)
    if all_tokens:
        targets[:, :-1] = tokens[:, 1:]
    return Recall(tokens, targets)
