"""Multi-query associative recall (MQAR): pairs of a key and a value, then queries for the values."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Int32

from osdn_jax.data.recall.arguments import IGNORE, checked_bool, checked_even, checked_float, checked_int, generator
from osdn_jax.data.recall.sampling import distinct, other_order, weighted_distinct


class Recall(NamedTuple):
    """Examples of a recall task.

    Attributes:
        tokens: what the model reads.
        targets: the token that the model has to predict at the same position, -100 where nothing is asked.
    """

    tokens: Int32[np.ndarray, "N L"]
    targets: Int32[np.ndarray, "N L"]


def mqar(
    examples: int,
    length: int,
    pairs: int,
    *,
    vocabulary: int = 8192,
    power: float = 0.01,
    random_gaps: bool = True,
    reads: int = 1,
    seed: Any,
) -> Recall:
    """Return multi-query associative recall (MQAR), by Zoology's definition.

    An example is k1 v1 k2 v2 ... followed by queries. Keys are tokens 1..V // 2 - 1 and values V // 2..V - 1, each
    drawn without replacement per example. After the pairs there are S = (length - 2 * pairs * reads) / 2 slots of two
    tokens. The slots of the queries are drawn without replacement, slot i = 1..S in proportion to i^(power - 1), and
    the query of pair j is at the first token of the j-th slot drawn. Its target, at the same position, is the value.

    With `reads` above 1 all pairs are repeated before the queries, each time in another order than the time before, as
    in "Just read twice" (https://arxiv.org/abs/2407.05483); the slots share the tokens that are left.

    Args:
        examples: N, at least 1.
        length: L, tokens per example; even, at least 2 * pairs * (reads + 1).
        pairs: key-value pairs per example, each queried once; at least 1.
        vocabulary: V, the number of tokens. It needs `pairs` keys and `pairs` values: V // 2 - 1 >= pairs. Zoology asks
            for V > L in addition; this function does not.
        power: in (0, 1]; 1 makes slots equally probable, 0.01 (Zoology's default) puts half of the first draws into the
            first twelve of 240 slots.
        random_gaps: fill all tokens that are neither pair nor query with random tokens of the whole vocabulary, keys
            and values among them. False leaves token 0 there.
        reads: how often the pairs are read, at least 1.
        seed: an integer of at least 0, or a tuple of them. Equal arguments give equal examples.

    Returns:
        tokens and targets, both [N, L] int32.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument is out of range, the length is odd, the pairs do not fit the length, or the vocabulary
            is too small.

    Source:
        Arora et al., "Zoology" (https://arxiv.org/abs/2312.04927), and its code,
        https://github.com/HazyResearch/zoology, zoology/data/multiquery_ar.py.

    Example:
        >>> tokens, targets = mqar(2, length=12, pairs=2, vocabulary=16, random_gaps=False, seed=0)
        >>> tokens[0].tolist()  # two pairs, then queries for both keys
        [4, 14, 3, 15, 0, 0, 3, 0, 4, 0, 0, 0]
        >>> targets[0].tolist()
        [-100, -100, -100, -100, -100, -100, 15, -100, 14, -100, -100, -100]
    """
    examples, pairs = checked_int("examples", examples, 1), checked_int("pairs", pairs, 1)
    vocabulary, reads = checked_int("vocabulary", vocabulary, 4), checked_int("reads", reads, 1)
    slots = checked_slots(length, pairs, reads)
    check_vocabulary(vocabulary, pairs)
    rng = generator(seed)
    keys = distinct(rng, examples, pairs, 1, vocabulary // 2)
    values = distinct(rng, examples, pairs, vocabulary // 2, vocabulary)
    context = read_pairs(rng, keys, values, reads)
    queries, answers = ask(rng, keys, values, slots, power)
    return assemble(rng, context, queries, answers, vocabulary if checked_bool("random_gaps", random_gaps) else None)


def checked_slots(length: Any, pairs: int, reads: int) -> int:
    """Return the number of slots after the pairs. Raises ValueError for a length that is odd or too short."""
    size = checked_even("length", checked_int("length", length, 2))
    if size < (needed := 2 * pairs * (reads + 1)):
        raise ValueError(
            f"pairs: got {pairs} with length = {size} and reads = {reads}, expected a length of at least "
            f"2 * pairs * (reads + 1) = {needed}"
        )
    return (size - 2 * pairs * reads) // 2


def check_vocabulary(vocabulary: int, pairs: int) -> None:
    """Raise ValueError if a vocabulary has fewer keys or values than pairs."""
    if vocabulary // 2 - 1 < pairs:
        raise ValueError(
            f"vocabulary: got {vocabulary}, expected at least {2 * pairs + 2}, for {pairs} different keys of "
            "1..vocabulary // 2 - 1 and as many values"
        )


def read_pairs(
    rng: np.random.Generator, keys: Int[np.ndarray, "N P"], values: Int[np.ndarray, "N P"], reads: int
) -> Int[np.ndarray, "N C"]:
    """Return the pairs, `reads` times, each time in another order than before: [N, 2 * pairs * reads]."""
    order = np.tile(np.arange(keys.shape[1]), (len(keys), 1))
    parts = []
    for read in range(reads):
        if read:
            order = other_order(rng, order)
        columns = [np.take_along_axis(x, order, axis=1) for x in (keys, values)]
        parts.append(np.stack(columns, axis=2).reshape(len(keys), -1))
    return np.concatenate(parts, axis=1)


def slot_weights(slots: int, power: Any) -> Float[np.ndarray, " S"]:
    """Return the probability of each slot at the first draw: in proportion to i^(power - 1), i = 1..slots."""
    weights = np.arange(1.0, slots + 1) ** (checked_float("power", power, 0, 1, above=True) - 1)
    return weights / weights.sum()


def ask(
    rng: np.random.Generator, keys: Int[np.ndarray, "N P"], values: Int[np.ndarray, "N P"], slots: int, power: Any
) -> tuple[Int[np.ndarray, "N Q"], Int[np.ndarray, "N Q"]]:
    """Return the query region and its targets, [N, 2 * slots]: every key once, at the first token of its slot."""
    chosen = 2 * weighted_distinct(rng, len(keys), keys.shape[1], slot_weights(slots, power))
    queries = np.zeros((len(keys), 2 * slots), np.int32)
    answers = np.full_like(queries, IGNORE)
    np.put_along_axis(queries, chosen, keys.astype(np.int32), axis=1)
    np.put_along_axis(answers, chosen, values.astype(np.int32), axis=1)
    return queries, answers


def assemble(
    rng: np.random.Generator,
    context: Int[np.ndarray, "N C"],
    queries: Int[np.ndarray, "N Q"],
    answers: Int[np.ndarray, "N Q"],
    fill: int | None,
) -> Recall:
    """Join the context and the queries; tokens 0 become random tokens below `fill`, unless it is None."""
    tokens = np.concatenate([context, queries], axis=1, dtype=np.int32, casting="same_kind")
    targets = np.full(tokens.shape, IGNORE, np.int32)
    targets[:, context.shape[1] :] = answers
    if fill is not None:
        gaps = tokens == 0
        tokens[gaps] = rng.integers(0, fill, int(gaps.sum()), np.int32)
    return Recall(tokens, targets)
