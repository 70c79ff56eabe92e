"""Three synthetic tasks of the mechanistic architecture design (MAD): selective copying, memorisation, compression."""

from typing import Any

import numpy as np

from osdn_jax.data.recall.arguments import IGNORE, checked_bool, checked_even, checked_int, generator
from osdn_jax.data.recall.multi_query import Recall


def selective_copying(examples: int, length: int = 256, *, copies: int = 16, vocabulary: int = 16, seed: Any) -> Recall:
    """Return selective copying: repeat the tokens between blanks, in order, after the copy token.

    `copies` tokens of 0..V - 3 are drawn with replacement, and length - 2 * copies - 1 blanks (token V - 2) are
    inserted, each before a random one of them, never after the last. Then follow the copy token V - 1 and `copies`
    blanks, where the tokens are the targets. MAD draws the positions of the blanks from NumPy's global generator; here
    they follow from the seed.

    Args:
        examples: N, at least 1.
        length: L, tokens per example, at least 2 * copies + 2.
        copies: tokens to copy, at least 1.
        vocabulary: V, the number of tokens, at least 3.
        seed: an integer of at least 0, or a tuple of them.

    Returns:
        tokens and targets, both [N, L] int32; -100 where nothing is asked.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument is out of range.

    Source:
        Poli et al., "Mechanistic Design and Scaling of Hybrid Architectures" (https://arxiv.org/abs/2403.17844), and
        its code, https://github.com/athms/mad-lab, mad/data/instances.py.

    Example:
        >>> tokens, targets = selective_copying(1, 12, copies=3, vocabulary=8, seed=0)
        >>> tokens[0].tolist()  # 6 is blank, 7 asks for the copy
        [6, 6, 6, 6, 6, 5, 3, 3, 7, 6, 6, 6]
        >>> targets[0, -3:].tolist()
        [5, 3, 3]
    """
    examples, copies = checked_int("examples", examples, 1), checked_int("copies", copies, 1)
    vocabulary, length = checked_int("vocabulary", vocabulary, 3), checked_int("length", length, 2)
    if length < 2 * copies + 2:
        raise ValueError(f"length: got {length}, expected at least 2 * copies + 2 = {2 * copies + 2}")
    rng = generator(seed)
    blanks = length - 2 * copies - 1
    content = rng.integers(0, vocabulary - 2, (examples, copies), np.int32)
    before = rng.integers(0, copies, (examples, blanks)) + copies * np.arange(examples)[:, None]
    counts = np.bincount(before.ravel(), minlength=examples * copies).reshape(examples, copies)
    positions = np.cumsum(counts, axis=1) + np.arange(copies)
    tokens = np.full((examples, length), vocabulary - 2, np.int32)
    np.put_along_axis(tokens, positions, content, axis=1)
    tokens[:, copies + blanks] = vocabulary - 1
    targets = np.full_like(tokens, IGNORE)
    targets[:, -copies:] = content
    return Recall(tokens, targets)


def memorization(examples: int, length: int = 32, *, vocabulary: int = 256, map_seed: int = 12345, seed: Any) -> Recall:
    """Return memorisation: the value of each key is fixed for all examples and never shown.

    An example is key, insert token, key, insert token ...; the target at the insert token V - 1 is the value of the
    key before it. Keys are 0..n // 2 - 1 and values n // 2..n - 1 with n = V - 1; every key has its own value, by a
    random map of `map_seed`. Only the parameters of a model can hold the map: it is the same for any `seed`. As MAD's,
    up to the map itself, which comes from another sequence of random numbers.

    Args:
        examples: N, at least 1.
        length: L, tokens per example, even.
        vocabulary: V, the number of tokens, at least 3.
        map_seed: of the map from keys to values.
        seed: of the keys in the examples; an integer of at least 0, or a tuple of them.

    Returns:
        tokens and targets, both [N, L] int32; -100 where nothing is asked.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument is out of range, or the length is odd.

    Source:
        As `selective_copying`.

    Example:
        >>> tokens, targets = memorization(1, 8, vocabulary=8, seed=0)
        >>> tokens[0].tolist(), targets[0].tolist()
        ([2, 7, 1, 7, 1, 7, 0, 7], [-100, 6, -100, 3, -100, 3, -100, 5])
    """
    examples, vocabulary = checked_int("examples", examples, 1), checked_int("vocabulary", vocabulary, 3)
    length = checked_even("length", checked_int("length", length, 2))
    values = memorized_map(vocabulary, map_seed)
    keys = generator(seed).integers(0, len(values), (examples, length // 2))
    tokens = np.full((examples, length), vocabulary - 1, np.int32)
    targets = np.full_like(tokens, IGNORE)
    tokens[:, ::2], targets[:, 1::2] = keys, values[keys]
    return Recall(tokens, targets)


def memorized_map(vocabulary: int, map_seed: int = 12345) -> np.ndarray:
    """Return the map of `memorization`: the value of every key, in the order of the keys."""
    size = vocabulary - 1
    values = np.arange(size // 2, size)
    return generator(checked_int("map_seed", map_seed, 0)).permutation(values)[: size // 2].astype(np.int32)


def compression(
    examples: int, length: int = 32, *, vocabulary: int = 16, autoencoder: bool = False, seed: Any
) -> Recall:
    """Return compression: reproduce random tokens from what is known after the last of them.

    MAD's model is an auto-encoder: `length` - 1 random tokens of 0..V - 2 and the compression token V - 1 go in, and a
    decoder reconstructs all of them from the model's output at the compression token. `autoencoder=True` returns these
    inputs, and the same tokens as targets; a causal language model would only have to repeat its input there.

    The default is a form for causal language models, and differs from MAD: (length - 1) // 2 random tokens, the
    compression token, and then only compression tokens, at which the random tokens are the targets, in order. The
    model answers from its state after the tokens instead of from one vector. An even length leaves one more
    compression token at the end, where nothing is asked.

    Args:
        examples: N, at least 1.
        length: L, tokens per example, at least 3.
        vocabulary: V, the number of tokens, at least 2.
        autoencoder: whether to return MAD's form.
        seed: an integer of at least 0, or a tuple of them.

    Returns:
        tokens and targets, both [N, L] int32; -100 where nothing is asked.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument is out of range.

    Source:
        As `selective_copying`.

    Example:
        >>> tokens, targets = compression(1, 7, vocabulary=8, seed=0)
        >>> tokens[0].tolist(), targets[0].tolist()
        ([5, 4, 3, 7, 7, 7, 7], [-100, -100, -100, -100, 5, 4, 3])
    """
    examples, vocabulary = checked_int("examples", examples, 1), checked_int("vocabulary", vocabulary, 2)
    length = checked_int("length", length, 3)
    whole = checked_bool("autoencoder", autoencoder)
    count = length - 1 if whole else (length - 1) // 2
    content = generator(seed).integers(0, vocabulary - 1, (examples, count), np.int32)
    tokens = np.full((examples, length), vocabulary - 1, np.int32)
    tokens[:, :count] = content
    if whole:
        return Recall(tokens, tokens.copy())
    targets = np.full_like(tokens, IGNORE)
    targets[:, count + 1 : 2 * count + 1] = content
    return Recall(tokens, targets)
