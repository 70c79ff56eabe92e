"""Multi-query recall in which something changes: the value of a key, or which keys occur."""

from typing import Any

import numpy as np
from jaxtyping import Int

from osdn_jax.data.recall.arguments import checked_bool, checked_even, checked_int, generator
from osdn_jax.data.recall.multi_query import Recall, ask, assemble, check_vocabulary, checked_slots, read_pairs
from osdn_jax.data.recall.sampling import distinct


def forgetting_mqar(
    examples: int,
    length: int,
    pairs: int,
    *,
    updates: int,
    vocabulary: int = 8192,
    power: float = 0.01,
    random_gaps: bool = True,
    seed: Any,
) -> Recall:
    """Return multi-query recall in which some keys get a second value; the answer is the last one.

    The pairs of `mqar` are followed by `updates` more, whose keys are drawn from the first ones without replacement.
    Their values are drawn from all values but the key's first one, so that an update always changes the answer. (In
    Zoology's code they differ from the first value of another key, and can repeat the key's own.) Then every key is
    queried once, in slots as of `mqar`.

    Args:
        examples: N, at least 1.
        length: L, tokens per example; even, at least 4 * pairs + 2 * updates.
        pairs: different keys per example, at least 1.
        updates: keys that get a second value, 0 to `pairs`.
        vocabulary: V, the number of tokens, at least 2 * pairs + 2.
        power: in (0, 1], as in `mqar`.
        random_gaps: as in `mqar`.
        seed: an integer of at least 0, or a tuple of them.

    Returns:
        tokens and targets, both [N, L] int32; -100 where nothing is asked.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument is out of range, the length is odd, the pairs do not fit the length, or the vocabulary
            is too small.

    Source:
        https://github.com/HazyResearch/zoology, zoology/data/forgetting_mqar.py.

    Example:
        >>> tokens, targets = forgetting_mqar(1, 12, 2, updates=1, vocabulary=16, random_gaps=False, seed=0)
        >>> tokens[0].tolist()  # key 4 gets another value
        [4, 12, 3, 14, 4, 13, 3, 0, 0, 0, 4, 0]
        >>> targets[0].tolist()
        [-100, -100, -100, -100, -100, -100, 14, -100, -100, -100, 13, -100]
    """
    examples, pairs = checked_int("examples", examples, 1), checked_int("pairs", pairs, 1)
    vocabulary, updates = checked_int("vocabulary", vocabulary, 4), checked_int("updates", updates, 0)
    size = checked_even("length", checked_int("length", length, 2))
    if updates > pairs:
        raise ValueError(f"updates: got {updates}, expected at most pairs = {pairs}")
    if size < (needed := 4 * pairs + 2 * updates):
        raise ValueError(
            f"pairs: got {pairs} with length = {size} and updates = {updates}, expected a length of at least "
            f"4 * pairs + 2 * updates = {needed}"
        )
    check_vocabulary(vocabulary, pairs)
    rng = generator(seed)
    first_value, count = vocabulary // 2, vocabulary - vocabulary // 2
    keys = distinct(rng, examples, pairs, 1, first_value)
    values = distinct(rng, examples, pairs, first_value, vocabulary)
    updated = distinct(rng, examples, updates, 0, pairs)
    old = np.take_along_axis(values, updated, axis=1)
    new = first_value + (old - first_value + rng.integers(1, count, old.shape)) % count
    final = values.copy()
    np.put_along_axis(final, updated, new, axis=1)
    context = [
        read_pairs(rng, keys, values, 1),
        read_pairs(rng, np.take_along_axis(keys, updated, axis=1), new, 1),
    ]
    slots = size // 2 - pairs - updates
    queries, answers = ask(rng, keys, final, slots, power)
    fill = vocabulary if checked_bool("random_gaps", random_gaps) else None
    return assemble(rng, np.concatenate(context, axis=1), queries, answers, fill)


def drifting_mqar(
    examples: int,
    length: int,
    pairs: int,
    *,
    vocabulary: int = 8192,
    power: float = 0.01,
    random_gaps: bool = True,
    reads: int = 1,
    drift: bool = True,
    seed: Any,
) -> Recall:
    """Return multi-query recall in which the keys change half-way, to test what adapts to the statistics of keys.

    The first half of an example is an `mqar` of pairs / 2 pairs, and so is the second. With `drift` the keys of the
    first half are drawn from the lower half of the keys, 1..m with m = (V // 2 - 1) // 2, and those of the second half
    from the rest, m + 1..V // 2 - 1; random gaps have no key of the other half either. So all tokens that are written
    or read as keys, and with them the statistics of the model's keys, change at L / 2. A preconditioner that has
    adapted to the first half meets keys that it has not seen. Without `drift`, the control, both halves draw from all
    keys. No key occurs twice among the pairs of an example, and every query is in the half of its pair.

    Args:
        examples: N, at least 1.
        length: L, tokens per example; a multiple of 4, at least 2 * pairs * (reads + 1).
        pairs: key-value pairs per example; even, at least 2.
        vocabulary: V, the number of tokens; it needs pairs / 2 keys in each half of the keys, `pairs` without `drift`.
        power: in (0, 1], as in `mqar`.
        random_gaps: as in `mqar`.
        reads: as in `mqar`, in each half.
        drift: whether the keys of the halves come from different parts of the vocabulary.
        seed: an integer of at least 0, or a tuple of them.

    Returns:
        tokens and targets, both [N, L] int32; -100 where nothing is asked.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument is out of range, the length is no multiple of 4, the number of pairs is odd, the pairs
            do not fit the length, or the vocabulary is too small.

    Source:
        This repository's own; the halves are those of `mqar`.

    Example:
        >>> tokens, targets = drifting_mqar(1, 16, 4, vocabulary=18, random_gaps=False, seed=0)
        >>> tokens[0].reshape(2, 8).tolist()  # keys 1..4, then 5..8
        [[4, 12, 3, 14, 3, 0, 4, 0], [7, 16, 8, 9, 8, 0, 7, 0]]
        >>> targets[0, :8].tolist()
        [-100, -100, -100, -100, 14, -100, 12, -100]
    """
    examples, pairs = checked_int("examples", examples, 1), checked_even("pairs", checked_int("pairs", pairs, 2))
    vocabulary, reads = checked_int("vocabulary", vocabulary, 4), checked_int("reads", reads, 1)
    size = checked_int("length", length, 4)
    if size % 4:
        raise ValueError(f"length: got {size}, expected a multiple of 4")
    slots = checked_slots(size, pairs, reads) // 2
    half, keys_end = pairs // 2, vocabulary // 2
    middle = 1 + (keys_end - 1) // 2
    drift = checked_bool("drift", drift)
    if drift and middle - 1 < half:
        raise ValueError(
            f"vocabulary: got {vocabulary}, expected at least {2 * pairs + 2}, for {half} different keys in each half "
            "of the keys"
        )
    if not drift:
        check_vocabulary(vocabulary, pairs)
    rng = generator(seed)
    if drift:
        keys = [distinct(rng, examples, half, *part) for part in ((1, middle), (middle, keys_end))]
    else:
        keys = np.split(distinct(rng, examples, pairs, 1, keys_end), 2, axis=1)
    values = np.split(distinct(rng, examples, pairs, keys_end, vocabulary), 2, axis=1)
    random_gaps = checked_bool("random_gaps", random_gaps)
    halves = []
    for number in (0, 1):
        context = read_pairs(rng, keys[number], values[number], reads)
        queries, answers = ask(rng, keys[number], values[number], slots, power)
        tokens, targets = assemble(rng, context, queries, answers, None)
        if random_gaps:
            others = (middle, keys_end) if number == 0 else (1, middle)
            _fill(rng, tokens, vocabulary, others if drift else (0, 0))
        halves.append(Recall(tokens, targets))
    return Recall(*(np.concatenate(parts, axis=1) for parts in zip(*halves, strict=True)))


def _fill(rng: np.random.Generator, tokens: Int[np.ndarray, "N L"], vocabulary: int, without: tuple[int, int]) -> None:
    """Replace tokens 0 by random tokens of the vocabulary without start..end - 1, in place."""
    start, end = without
    gaps = tokens == 0
    drawn = rng.integers(0, vocabulary - (end - start), int(gaps.sum()), np.int32)
    tokens[gaps] = np.where(drawn >= start, drawn + (end - start), drawn)
