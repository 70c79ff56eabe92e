"""Batches of windows: endless and shuffled for training, finite and in order for validation.

Grain takes 0.2 s to import. Only training needs it, so the functions that do import it.
"""

import dataclasses
import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex, cast

import numpy as np

from osdn_jax.data.streamed_windows import StreamedWindows
from osdn_jax.data.windows import TokenWindows, Window, WindowSource, checked_count

if TYPE_CHECKING:
    import grain

_MIN_WEIGHT = 1e-300  # grain divides weights by the smallest
_MIN_RELATIVE_WEIGHT = 1e-12  # of the largest weight; a smaller one would sample no window in any training run


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Sources of windows, sampled by weight in `training_batches`.

    The sources are interleaved, not sampled at random: each has its share of the windows over any stretch of training,
    exact to about a hundredth of the smallest share. A source restarts at its end, so a small one may be seen more
    often than a large one.

    Args:
        sources: `TokenWindows`, `StreamedWindows` or any `WindowSource`, at least one.
        weights: a positive number per source; they need not sum to 1.

    Raises:
        ValueError: there is no source, another number of weights, or a weight that is not positive and finite, or so
            small that it would sample nothing.

    Example:
        >>> from osdn_jax.data import Document, PackedWindows
        >>> sources = [PackedWindows([Document("", text)], 4) for text in (b"a" * 40, b"b" * 40)]
        >>> batch = next(training_batches(Mixture(sources, [3, 1]), batch_size=8, seed=0))
        >>> "".join(map(chr, batch["targets"][:, 0]))
        'aaabaaab'
    """

    sources: Sequence[WindowSource | StreamedWindows]
    weights: Sequence[float]

    def __post_init__(self) -> None:
        if not self.sources or len(self.sources) != len(self.weights):
            raise ValueError(
                f"a mixture needs sources and a weight for each; got {len(self.sources)}, {len(self.weights)} weights"
            )
        _check_weights(self.weights)


class JoinedWindows:
    """The windows of several sources, one source after the other: a `WindowSource`."""

    def __init__(self, sources: Sequence[WindowSource]) -> None:
        self._sources = list(sources)

    def __len__(self) -> int:
        """Return the number of windows of all sources."""
        return sum(len(source) for source in self._sources)

    def __getitem__(self, index: SupportsIndex) -> Window:
        """Return window `index`, counted from 0. Raises IndexError outside the sources."""
        position = index.__index__()
        if position >= 0:
            for source in self._sources:
                if position < len(source):
                    return source[position]
                position -= len(source)
        raise IndexError(f"window {index} of {len(self)}")


def parse_mixture(text: str) -> list[tuple[str, float]]:
    """Parse "path:weight,path:weight", the value of `data.mixture`.

    Args:
        text: the paths and weights. A path may hold colons, as hf:NAME does, but no comma.

    Returns:
        (path, weight) per source.

    Raises:
        ValueError: an item is malformed or its weight is out of range; the message names the item.

    Example:
        >>> parse_mixture("notes:1, hf:org/name:0.5")
        [('notes', 1.0), ('hf:org/name', 0.5)]
    """
    found = []
    for item in text.split(","):
        path, colon, number = item.strip().rpartition(":")
        if not colon or not path:
            raise ValueError(f"expected path:weight,path:weight; got {item.strip()!r} in {text!r}")
        try:
            weight = float(number)
        except ValueError as error:
            raise ValueError(f"weight of {path}: got {number!r}, expected a number") from error
        found.append((path, weight))
    _check_weights([weight for _, weight in found], [path for path, _ in found])
    return found


def _check_weights(weights: Sequence[float], paths: Sequence[str] = ()) -> None:
    """Raise ValueError for a weight that is out of range, naming it and its path (if paths are given)."""
    named = [("" if path is None else f"weight of {path}: ", w) for w, path in itertools.zip_longest(weights, paths)]
    for place, weight in named:
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"{place}weights of a mixture must be positive and finite; got {weight}")
    for place, weight in named:
        if weight < max(_MIN_WEIGHT, _MIN_RELATIVE_WEIGHT * max(weights)):
            raise ValueError(
                f"{place}weights of a mixture must be at least {_MIN_WEIGHT:g}, and {_MIN_RELATIVE_WEIGHT:g} of the "
                f"largest, {max(weights):g}; got {weight:g}"
            )


def training_batches(
    source: WindowSource | StreamedWindows | Mixture,
    *,
    batch_size: int,
    seed: int,
    shard_index: int = 0,
    shard_count: int = 1,
) -> "grain.DatasetIterator[Window]":
    """Return endless shuffled batches of shape [batch_size, T], the same for the same arguments, bit for bit.

    Every epoch visits each window once, in a new order. A batch may cross from one epoch into the next, so a source
    with fewer windows than a batch works too. A `Mixture` takes windows from its sources by weight, each shuffled and
    repeated separately.

    With several processes, each passes its own `shard_index` and reads only its rows of a global batch of
    `batch_size * shard_count` rows. The windows of global step n are the same for any number of processes that share a
    global batch of that size. `StreamedWindows`, and mixtures with one, are divided by document between the processes
    instead.

    Args:
        source: the windows.
        batch_size: rows per batch of this process, at least 1.
        seed: an integer in 0..2**32-1.
        shard_index: the index of this process, in 0..shard_count - 1.
        shard_count: the number of processes.

    Returns:
        A grain `DatasetIterator`. `get_state` and `set_state` hold its position, not its data: rebuild it with the
        same arguments before restoring. `grain.checkpoint.CheckpointSave` writes the position with Orbax.

    Raises:
        TypeError: an argument is not an integer.
        ValueError: a size or count is below 1, `shard_index` or `seed` is out of range, or the source is empty.

    Example:
        >>> from osdn_jax.data import PackedWindows, shakespeare
        >>> windows = PackedWindows(shakespeare("validation"), 128)
        >>> batches = training_batches(windows, batch_size=4, seed=0)
        >>> batch = next(batches)
        >>> {name: array.shape for name, array in batch.items()}
        {'inputs': (4, 128), 'segment_ids': (4, 128), 'targets': (4, 128), 'weights': (4, 128)}
        >>> resumed = training_batches(windows, batch_size=4, seed=0)
        >>> resumed.set_state(batches.get_state())
        >>> (next(resumed)["inputs"] == next(batches)["inputs"]).all().item()
        True
    """
    import grain
    import grain.experimental

    checked_count("batch_size", batch_size)
    _check_shard(shard_index, shard_count)
    if isinstance(seed, bool) or not 0 <= operator.index(seed) < 2**32:
        raise ValueError(f"seed must be in 0..2**32-1; got {seed!r}")
    seed = operator.index(seed)
    mixture = source if isinstance(source, Mixture) else Mixture([source], [1.0])
    indexed = [member for member in mixture.sources if not isinstance(member, StreamedWindows)]
    if len(indexed) < len(mixture.sources):
        shares = [
            _process_share(member, seed + i, shard_index, shard_count) for i, member in enumerate(mixture.sources)
        ]
        share = shares[0] if len(shares) == 1 else grain.IterDataset.mix(shares, mixture.weights)
        # One thread tokenises ahead while the model trains.
        return iter(grain.experimental.ThreadPrefetchIterDataset(share.batch(batch_size), prefetch_buffer_size=2))
    shuffled = [_shuffled(member, seed + i) for i, member in enumerate(indexed)]
    windows = shuffled[0] if len(shuffled) == 1 else grain.MapDataset.mix(shuffled, mixture.weights)
    # Shard after the shuffle, so that shards do not depend on how the corpus is ordered, and after the repetition, so
    # that no window is dropped if the shard count does not divide their number.
    own_windows = windows[shard_index::shard_count]
    # A repeated source has the largest possible length, and batch(1) computes a length that is one too large of it.
    batches = own_windows.map(_add_batch_axis) if batch_size == 1 else own_windows.batch(batch_size)
    return iter(batches.to_iter_dataset(_read_options(indexed)))


def _check_shard(shard_index: int, shard_count: int) -> None:
    checked_count("shard_count", shard_count)
    if not 0 <= operator.index(shard_index) < shard_count:
        raise ValueError(f"shard_index must be in 0..{shard_count - 1}, below shard_count; got {shard_index}")


def _check_source(source: WindowSource) -> None:
    if not len(source):
        raise ValueError("the source holds no windows")


def _add_batch_axis(window: Window) -> Window:
    return cast(Window, {name: x[None] for name, x in cast(dict[str, Any], window).items()})


def _read_options(sources: Sequence[WindowSource]) -> "grain.ReadOptions":
    import grain

    if any(isinstance(source, TokenWindows) and source.on_disk for source in sources):
        return grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
    # No reader threads: the windows are slices of memory, and threads would only compete for the interpreter.
    return grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


def _process_share(
    source: WindowSource | StreamedWindows, seed: int, shard_index: int, shard_count: int
) -> "grain.IterDataset[Window]":
    """Return the windows of one process."""
    if isinstance(source, StreamedWindows):
        return source.dataset(seed=seed % 2**31, shard_index=shard_index, shard_count=shard_count)
    return _shuffled(source, seed)[shard_index::shard_count].to_iter_dataset(_read_options([source]))


def _shuffled(source: WindowSource, seed: int) -> "grain.MapDataset[Window]":
    """Return the windows repeated without end, each epoch in a new order."""
    import grain

    _check_source(source)
    return grain.MapDataset.source(source).seed(seed % 2**32).shuffle().repeat()


@dataclasses.dataclass(frozen=True)
class ValidationBatches:
    """Every window of a source once, in order. Can be iterated any number of times; `validation_batches` creates it."""

    source: WindowSource
    batch_size: int
    shard_index: int
    shard_count: int

    def __len__(self) -> int:
        """Return the number of batches. It is the same for every shard: one without rows left yields padding."""
        global_batch = self.batch_size * self.shard_count
        return (len(self.source) + global_batch - 1) // global_batch

    def __iter__(self) -> Iterator[Window]:
        padding = _padding(self.source[0])
        for step in range(len(self)):
            first = (step * self.shard_count + self.shard_index) * self.batch_size
            rows = [
                self.source[row] if row < len(self.source) else padding for row in range(first, first + self.batch_size)
            ]
            yield {
                "inputs": np.stack([row["inputs"] for row in rows]),
                "targets": np.stack([row["targets"] for row in rows]),
                "segment_ids": np.stack([row["segment_ids"] for row in rows]),
                "weights": np.stack([row["weights"] for row in rows]),
            }


def _padding(like: Window) -> Window:
    return {
        "inputs": np.zeros_like(like["inputs"]),
        "targets": np.zeros_like(like["targets"]),
        "segment_ids": np.zeros_like(like["segment_ids"]),
        "weights": np.zeros_like(like["weights"]),
    }


def validation_batches(
    source: WindowSource, *, batch_size: int, shard_index: int = 0, shard_count: int = 1
) -> ValidationBatches:
    """Return every window once, in order, in batches of shape [batch_size, T].

    Rows of padding (weight 0) fill the last batch. With several processes, global batch n is the n-th batch of every
    shard, concatenated in order of `shard_index`.

    Args:
        source: the windows.
        batch_size: rows per batch of this process, at least 1.
        shard_index: the index of this process, in 0..shard_count - 1.
        shard_count: the number of processes.

    Returns:
        The batches, which have a length and can be iterated any number of times.

    Raises:
        TypeError: an argument is not an integer.
        ValueError: a size or count is below 1, `shard_index` is out of range, or the source is empty.

    Example:
        >>> from osdn_jax.data import PackedWindows, shakespeare
        >>> windows = PackedWindows(shakespeare("validation"), 128)
        >>> batches = validation_batches(windows, batch_size=32)
        >>> len(batches), len(windows) / 32
        (126, 125.34375)
        >>> round(sum(batch["weights"].sum() for batch in batches)) == windows.text_bytes
        True
    """
    checked_count("batch_size", batch_size)
    _check_shard(shard_index, shard_count)
    _check_source(source)
    return ValidationBatches(source, batch_size, shard_index, shard_count)
