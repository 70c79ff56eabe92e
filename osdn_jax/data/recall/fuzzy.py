"""Fuzzy in-context recall as in MAD: keys and values of several tokens."""

from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Int32

from osdn_jax.data.recall.arguments import IGNORE, checked_bool, checked_int, generator
from osdn_jax.data.recall.multi_query import Recall

_BLOCK = 8192  # examples that are made at a time


def fuzzy_in_context_recall(
    examples: int,
    length: int = 128,
    *,
    vocabulary: int = 16,
    key_size: int = 3,
    value_size: int = 3,
    varied_keys: bool = True,
    all_tokens: bool = False,
    seed: Any,
) -> Recall:
    """Return fuzzy in-context recall: keys and values are motifs of one to three tokens.

    Token V - 1 pads the start of an example; of the others, the lower half is for keys and the rest for values. A motif
    has different tokens; its size is drawn first, then its tokens. Every key has one value throughout the example.
    Whenever a key has occurred before, all tokens of its value are targets, each at the position before it. The last
    pair is a probe: its key and value have been put in at a random place before it.

    As in MAD, with two differences. MAD's probe can fail to be put in, if its random place is too far back; here it
    always is. And MAD tests with keys of full size only: `varied_keys=False`.

    Args:
        examples: N, at least 1.
        length: L, tokens per example, at least 2 * (key_size + value_size) + 1.
        vocabulary: V, the number of tokens; its halves need key_size and value_size tokens.
        key_size: most tokens of a key, at least 1.
        value_size: most tokens of a value, at least 1.
        varied_keys: draw the sizes of keys from 1..key_size; False: all keys have key_size tokens.
        all_tokens: make the next token, padding too, the target at every position, as MAD trains (but does not test).
        seed: an integer of at least 0, or a tuple of them.

    Returns:
        tokens and targets, both [N, L] int32; -100 where nothing is asked.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument is out of range, or the vocabulary is too small.

    Source:
        Poli et al., "Mechanistic Design and Scaling of Hybrid Architectures" (https://arxiv.org/abs/2403.17844), and
        its code, https://github.com/athms/mad-lab, mad/data/instances.py.

    Example:
        >>> tokens, targets = fuzzy_in_context_recall(1, 20, vocabulary=12, key_size=2, value_size=2, seed=0)
        >>> tokens[0].tolist()
        [11, 11, 11, 11, 11, 4, 0, 5, 7, 3, 0, 5, 8, 1, 4, 7, 9, 1, 4, 7]
        >>> targets[0].tolist()[-5:]  # the key 1 4 has the value 7 9
        [-100, -100, -100, 7, 9]
    """
    examples, length = checked_int("examples", examples, 1), checked_int("length", length, 1)
    key_size, value_size = checked_int("key_size", key_size, 1), checked_int("value_size", value_size, 1)
    vocabulary = checked_int("vocabulary", vocabulary, 3)
    varied_keys, all_tokens = checked_bool("varied_keys", varied_keys), checked_bool("all_tokens", all_tokens)
    most = key_size + value_size
    if length <= 2 * most:
        raise ValueError(f"length: got {length}, expected at least 2 * (key_size + value_size) + 1 = {2 * most + 1}")
    first_value = (vocabulary - 1) // 2
    if first_value < key_size or vocabulary - 1 - first_value < value_size:
        least = max(2 * key_size, 2 * value_size - 1) + 1
        raise ValueError(f"vocabulary: got {vocabulary}, expected at least {least} for such keys and values")
    rng = generator(seed)
    # In blocks, because every token of every motif exists at the same time.
    blocks = [
        _fuzzy(
            rng, min(_BLOCK, examples - start), length, first_value, vocabulary - 1, key_size, value_size, varied_keys
        )
        for start in range(0, examples, _BLOCK)
    ]
    line, answers = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    return Recall(line[:, :-1].copy(), (line if all_tokens else answers)[:, 1:].copy())


def _fuzzy(
    rng: np.random.Generator,
    examples: int,
    length: int,
    first_value: int,
    padding: int,
    key_size: int,
    value_size: int,
    varied_keys: bool,
) -> tuple[Int32[np.ndarray, "N L1"], Int32[np.ndarray, "N L1"]]:
    """Return the length + 1 tokens of each example, and those of them that are asked, IGNORE elsewhere."""
    most = key_size + value_size
    steps = (length - most) // 2 + 2  # step 0 is the probe; the others would fill an example with the shortest pairs
    shape = (examples, steps)
    key_sizes = rng.integers(1 if varied_keys else key_size, key_size + 1, shape, np.int32)
    value_sizes = rng.integers(1, value_size + 1, shape, np.int32)
    keys = _motifs(rng, shape, key_size, 0, first_value)
    values = _motifs(rng, shape, value_size, first_value, padding)
    codes = _codes(keys, key_sizes, first_value)
    first = _first_occurrence(codes)
    value_sizes = np.take_along_axis(value_sizes, first, axis=1)
    values = np.take_along_axis(values, first[:, :, None], axis=1)

    sizes = key_sizes + value_sizes
    order, count = _with_probe(rng, sizes, length - most)
    at = np.arange(steps + 1)
    codes = np.take_along_axis(codes, order, axis=1)
    asked = (_first_occurrence(codes) < at) & (at < count[:, None])
    used = at < count[:, None]
    # The probe comes last, whatever order[:, count] is.
    rows = np.arange(examples)
    order[rows, count], asked[rows, count], used[rows, count] = 0, True, True

    motif = np.concatenate([keys, values], axis=2)
    motif = np.take_along_axis(motif, order[:, :, None], axis=1)
    within = np.arange(most)
    key_sizes, value_sizes = (np.take_along_axis(x, order, axis=1)[:, :, None] for x in (key_sizes, value_sizes))
    is_value = (within >= key_size) & (within < key_size + value_sizes)
    present = ((within < key_sizes) | is_value) & used[:, :, None]
    total = present.sum(axis=(1, 2))
    line = np.full((examples, length + 1), padding, np.int32)
    filled = np.arange(length + 1) >= length + 1 - total[:, None]
    line[filled] = motif[present]
    answers = np.full_like(line, IGNORE)
    answers[filled] = np.where(is_value & asked[:, :, None], motif, np.int32(IGNORE))[present]
    return line, answers


def _motifs(
    rng: np.random.Generator, shape: tuple[int, int], size: int, low: int, high: int
) -> Int32[np.ndarray, "N S size"]:
    """Draw `size` different tokens of low..high - 1, in order, for each of [N, S]."""
    motif = np.empty((*shape, size), np.int32)
    for i in range(size):
        # One of the tokens that are left, counted without those before it, which are passed in ascending order.
        token = rng.integers(low, high - i, shape, np.int32)
        for other in np.moveaxis(np.sort(motif[:, :, :i], axis=2), 2, 0):
            token += token >= other
        motif[:, :, i] = token
    return motif


def _codes(
    keys: Int32[np.ndarray, "N S size"], sizes: Int32[np.ndarray, "N S"], vocabulary: int
) -> Int[np.ndarray, "N S"]:
    """Return a number for each key, its first tokens; different keys have different numbers."""
    size = keys.shape[2]
    digits = np.where(np.arange(size) < sizes[:, :, None], keys + 1, 0)
    if (vocabulary + 1) ** size < 2**62:
        return digits @ (vocabulary + 1) ** np.arange(size, dtype=np.int64)
    unique = np.unique(digits.reshape(-1, size), axis=0, return_inverse=True)[1]
    return unique.reshape(sizes.shape)


def _first_occurrence(codes: Int[np.ndarray, "N S"]) -> Int[np.ndarray, "N S"]:
    """Return for each code the index of the first equal one in its row."""
    order = np.argsort(codes, axis=1, kind="stable")
    ordered = np.take_along_axis(codes, order, axis=1)
    new: Bool[np.ndarray, "N S"] = np.ones(codes.shape, bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    start = np.maximum.accumulate(np.where(new, np.arange(codes.shape[1]), 0), axis=1)
    first = np.empty_like(order)
    np.put_along_axis(first, order, np.take_along_axis(order, start, axis=1), axis=1)
    return first


def _with_probe(
    rng: np.random.Generator, sizes: Int[np.ndarray, "N S"], most: int
) -> tuple[Int[np.ndarray, "N S1"], Int[np.ndarray, " N"]]:
    """Put the probe, step 0, among the other steps.

    sizes: tokens of each step. A step is part of an example if it starts before position `most` minus the size of the
    probe that ends the example.

    Returns:
        (order, count): the steps in order, and how many of them are part of the example.
    """
    examples, steps = sizes.shape
    limit = most - sizes[:, 0]
    starts = np.cumsum(sizes[:, 1:], axis=1) - sizes[:, 1:]
    wanted = np.floor(rng.random(examples) * limit)
    place = np.minimum((starts < wanted[:, None]).sum(axis=1), (starts < limit[:, None]).sum(axis=1) - 1)
    at = np.arange(steps)
    order = np.where(at < place[:, None], at + 1, np.where(at == place[:, None], 0, at))
    starts = np.cumsum(ordered := np.take_along_axis(sizes, order, axis=1), axis=1) - ordered
    order = np.concatenate([order, np.zeros((examples, 1), order.dtype)], axis=1)
    return order, (starts < limit[:, None]).sum(axis=1)
