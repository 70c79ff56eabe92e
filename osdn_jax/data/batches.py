"""Batches of windows: endless and shuffled to train on, finite and in order to evaluate on."""

import dataclasses
import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any, SupportsIndex, cast

import grain
import grain.experimental
import numpy as np

from osdn_jax.data.streamed_windows import StreamedWindows
from osdn_jax.data.windows import TokenWindows, Window, WindowSource, checked_count

_LEAST = 1e-300  # weights are divided by the smallest
_LEAST_SHARE = 1e-12  # of the largest weight; less would draw no window in any training


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Sources of windows with the share of the windows that each has in training.

    Weights need not sum to 1; shares are kept to about a hundredth of the smallest. Over any stretch of training each
    source has its share: draws are interleaved, not random. A source starts again when it comes to its end, so a
    small one may be seen more often than a large one.

    Raises ValueError without sources, for another number of weights, or for one that is not positive and finite, or so
    small that it would draw nothing.
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
    """The windows of several sources one after the other: a random access source."""

    def __init__(self, sources: Sequence[WindowSource]) -> None:
        self._sources = list(sources)

    def __len__(self) -> int:
        """The number of windows of all sources."""
        return sum(len(source) for source in self._sources)

    def __getitem__(self, index: SupportsIndex) -> Window:
        """Window `index`, from 0. Raises IndexError outside the sources."""
        position = index.__index__()
        if position >= 0:
            for source in self._sources:
                if position < len(source):
                    return source[position]
                position -= len(source)
        raise IndexError(f"window {index} of {len(self)}")


def parse_mixture(text: str) -> list[tuple[str, float]]:
    """[(path, weight)] of "path:weight,path:weight". Raises ValueError, naming the part that does not read."""
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
    """Raises ValueError, naming the weight and its path if paths are given, for one that is out of range."""
    named = [("" if path is None else f"weight of {path}: ", w) for w, path in itertools.zip_longest(weights, paths)]
    for place, weight in named:
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"{place}weights of a mixture must be positive and finite; got {weight}")
    for place, weight in named:
        if weight < max(_LEAST, _LEAST_SHARE * max(weights)):
            raise ValueError(
                f"{place}weights of a mixture must be at least {_LEAST:g}, and {_LEAST_SHARE:g} of the largest, "
                f"{max(weights):g}; got {weight:g}"
            )


def _checked_shard(shard_index: int, shard_count: int) -> None:
    checked_count("shard_count", shard_count)
    if not 0 <= operator.index(shard_index) < shard_count:
        raise ValueError(f"shard_index must be in 0..{shard_count - 1}, below shard_count; got {shard_index}")


def training_batches(
    source: WindowSource | StreamedWindows | Mixture,
    *,
    batch_size: int,
    seed: int,
    shard_index: int = 0,
    shard_count: int = 1,
) -> grain.DatasetIterator[Window]:
    """Endless shuffled batches of shape [batch_size, T], the same for the same arguments, bit for bit.

    Every epoch visits each window once, in an order of its own; a batch may cross from one epoch into the next, so a
    source of fewer windows than a batch works too. With several processes each passes its own `shard_index` of
    `shard_count` and reads only its share, `batch_size` rows of a global batch of `batch_size * shard_count`; the
    windows of global step n are the same ones however many processes share a global batch of that size. A `Mixture`
    draws from its sources by weight, each shuffled and repeated for itself. `StreamedWindows` are divided by document
    between the processes, and so are mixtures that have one.

    The iterator is a grain `DatasetIterator`: `get_state` and `set_state` hold its position (not its data: rebuild it
    with the same arguments before restoring), and `grain.checkpoint.CheckpointSave` writes it with Orbax.

    Raises ValueError for a size or count below 1, a shard outside the count, a seed outside 0..2**32-1 or an empty
    source; TypeError where an integer is needed.
    """
    checked_count("batch_size", batch_size)
    _checked_shard(shard_index, shard_count)
    if isinstance(seed, bool) or not 0 <= operator.index(seed) < 2**32:
        raise ValueError(f"seed must be in 0..2**32-1; got {seed!r}")
    seed = operator.index(seed)
    mixture = source if isinstance(source, Mixture) else Mixture([source], [1.0])
    stored = [part for part in mixture.sources if not isinstance(part, StreamedWindows)]
    if len(stored) < len(mixture.sources):
        shares = [_share(part, seed + i, shard_index, shard_count) for i, part in enumerate(mixture.sources)]
        share = shares[0] if len(shares) == 1 else grain.IterDataset.mix(shares, mixture.weights)
        # One thread tokenises ahead while the model trains.
        return iter(grain.experimental.ThreadPrefetchIterDataset(share.batch(batch_size), prefetch_buffer_size=2))
    shuffled = [_shuffled(part, seed + i) for i, part in enumerate(stored)]
    windows = shuffled[0] if len(shuffled) == 1 else grain.MapDataset.mix(shuffled, mixture.weights)
    # Sharding comes after the shuffle, so that shards do not depend on how the corpus is ordered, and after the
    # repetition, so that no window is dropped where the count does not divide the corpus.
    share_of_windows = windows[shard_index::shard_count]
    # The length of a repeated source is the largest there is; batch() computes a length one too large of that by 1.
    batches = share_of_windows.map(_row) if batch_size == 1 else share_of_windows.batch(batch_size)
    return iter(batches.to_iter_dataset(_reading(stored)))


def _row(window: Window) -> Window:
    return cast(Window, {name: x[None] for name, x in cast(dict[str, Any], window).items()})


def _reading(sources: Sequence[WindowSource]) -> grain.ReadOptions:
    if any(isinstance(source, TokenWindows) and source.on_disk for source in sources):
        return grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
    # No reader threads: the windows are slices of memory, and threads would only compete for the interpreter.
    return grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


def _share(
    source: WindowSource | StreamedWindows, seed: int, shard_index: int, shard_count: int
) -> grain.IterDataset[Window]:
    """The windows of one process."""
    if isinstance(source, StreamedWindows):
        return source.dataset(seed=seed % 2**31, shard_index=shard_index, shard_count=shard_count)
    return _shuffled(source, seed)[shard_index::shard_count].to_iter_dataset(_reading([source]))


def _shuffled(source: WindowSource, seed: int) -> grain.MapDataset[Window]:
    """The windows without end, each epoch in an order of its own."""
    _checked_source(source)
    return grain.MapDataset.source(source).seed(seed % 2**32).shuffle().repeat()


def _checked_source(source: WindowSource) -> None:
    if not len(source):
        raise ValueError("the source holds no windows")


def _padding(like: Window) -> Window:
    return {
        "inputs": np.zeros_like(like["inputs"]),
        "targets": np.zeros_like(like["targets"]),
        "segment_ids": np.zeros_like(like["segment_ids"]),
        "weights": np.zeros_like(like["weights"]),
    }


@dataclasses.dataclass(frozen=True)
class ValidationBatches:
    """All windows of a source once, in order; may be iterated any number of times. Made by `validation_batches`."""

    source: WindowSource
    batch_size: int
    shard_index: int
    shard_count: int

    def __len__(self) -> int:
        """The number of batches, the same for every shard: a process without rows left still takes part."""
        global_batch = self.batch_size * self.shard_count
        return (len(self.source) + global_batch - 1) // global_batch

    def __iter__(self) -> Iterator[Window]:
        empty = _padding(self.source[0])
        for step in range(len(self)):
            first = (step * self.shard_count + self.shard_index) * self.batch_size
            rows = [
                self.source[row] if row < len(self.source) else empty for row in range(first, first + self.batch_size)
            ]
            yield {
                "inputs": np.stack([row["inputs"] for row in rows]),
                "targets": np.stack([row["targets"] for row in rows]),
                "segment_ids": np.stack([row["segment_ids"] for row in rows]),
                "weights": np.stack([row["weights"] for row in rows]),
            }


def validation_batches(
    source: WindowSource, *, batch_size: int, shard_index: int = 0, shard_count: int = 1
) -> ValidationBatches:
    """Every window once, in order, in batches of shape [batch_size, T]; rows of padding (weight 0) fill the last one.

    With several processes global batch n is the shards' n-th batches in order of `shard_index`.
    Raises ValueError for a size or count below 1, a shard outside the count or an empty source; TypeError where an
    integer is needed.
    """
    checked_count("batch_size", batch_size)
    _checked_shard(shard_index, shard_count)
    _checked_source(source)
    return ValidationBatches(source, batch_size, shard_index, shard_count)
