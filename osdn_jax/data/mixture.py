"""Several sources of windows, drawn from by weight."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import SupportsIndex

from osdn_jax.data.streamed import StreamedWindows
from osdn_jax.data.windows import Window, WindowSource

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
