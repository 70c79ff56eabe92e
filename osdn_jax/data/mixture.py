"""Several sources of windows, drawn from by weight."""

import dataclasses
import math
from collections.abc import Sequence
from typing import SupportsIndex

from osdn_jax.data.streamed import StreamedWindows
from osdn_jax.data.windows import Window, WindowSource


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Sources of windows with the share of the windows that each has in training.

    Weights need not sum to 1; shares are kept to about a hundredth of the smallest. Over any stretch of training each
    source has its share: draws are interleaved, not random. A source starts again when it comes to its end, so a
    small one may be seen more often than a large one.

    Raises ValueError without sources, for another number of weights, or for one that is not positive and finite.
    """

    sources: Sequence[WindowSource | StreamedWindows]
    weights: Sequence[float]

    def __post_init__(self) -> None:
        if not self.sources or len(self.sources) != len(self.weights):
            raise ValueError(
                f"a mixture needs sources and a weight for each; got {len(self.sources)}, {len(self.weights)} weights"
            )
        for weight in self.weights:
            _checked_weight(weight)


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
        found.append((path, _checked_weight(weight)))
    return found


def _checked_weight(weight: float) -> float:
    if not (weight > 0 and math.isfinite(weight)):
        raise ValueError(f"weights of a mixture must be positive and finite; got {weight}")
    return weight
