"""The conditions of the bench: how the keys of a sequence are distributed, and what is asked of the memory."""

import dataclasses
import math
from collections.abc import Callable, Iterable

SCALE_PATHS = ("constant", "step", "ramp", "random")
DRIFTS = ("none", "keys", "map")


@dataclasses.dataclass(frozen=True)
class Condition:
    """One condition of the bench: sequences of keys and values, and how they are drawn.

    Values are v = W^T k + noise with a map W for each seed; with `pairs`, they are random unit vectors, one for each
    key, and the pairs are read `reads` times.

    Attributes:
        family: the group of conditions that it is reported in.
        condition_number: largest over smallest eigenvalue of the covariance of the keys before their norm is set; the
            eigenvalues fall geometrically from channel to channel.
        noise: norm (root mean square) of the noise on a value; the clean value of a unit key has norm 1.
        rotated: the eigenvectors are random, not the channels.
        scale: None for keys of norm 1; otherwise (first, last), the expected squared norm of keys without a fixed norm.
        path: between the two scales: "constant" (first only), "step" (last from the middle on), "ramp" (geometric),
            "random" (each token log-uniform between them).
        drift: "none", "keys" (the spectrum is reversed half-way) or "map" (another W from half-way on).
        width: number of channels of keys and of values, K = V.
        length: tokens in a sequence; with `pairs`, pairs times reads.
        pairs: number of pairs that are read; 0 for a stream of new keys.
        reads: how many times the pairs are read, in the same order.

    Raises:
        ValueError: a number is out of range, or `path` or `drift` is unknown.

    Example:
        >>> from osdn_jax.regression import Condition
        >>> print(Condition("mine", condition_number=100, noise=0.3).name)
        kappa 100, noise 0.3
    """

    family: str
    condition_number: float = 1.0
    noise: float = 0.0
    rotated: bool = False
    scale: tuple[float, float] | None = None
    path: str = "constant"
    drift: str = "none"
    width: int = 32
    length: int = 1000
    pairs: int = 0
    reads: int = 1

    def __post_init__(self) -> None:
        """Check the ranges."""
        _at_least("condition_number", self.condition_number, 1)
        _at_least("noise", self.noise, 0)
        for name, least in (("width", 2), ("length", 2), ("pairs", 0), ("reads", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name}: got {value!r}, expected an integer")
            _at_least(name, value, least)
        if self.scale is not None and not (
            isinstance(self.scale, tuple) and len(self.scale) == 2 and all(0 < s < math.inf for s in self.scale)
        ):
            raise ValueError(f"scale: got {self.scale!r}, expected None or two numbers above 0")
        if self.path not in SCALE_PATHS:
            raise ValueError(f"path: got {self.path!r}, expected one of {', '.join(SCALE_PATHS)}")
        if self.drift not in DRIFTS:
            raise ValueError(f"drift: got {self.drift!r}, expected one of {', '.join(DRIFTS)}")
        if self.pairs and (self.drift != "none" or self.noise or self.path != "constant"):
            raise ValueError("pairs: got pairs together with drift, noise or a changing scale, expected one of them")

    @property
    def tokens(self) -> int:
        """The number of tokens in a sequence."""
        return self.pairs * self.reads or self.length

    @property
    def name(self) -> str:
        """The name in tables and figures, within its family."""
        parts = [f"kappa {self.condition_number:g}"]
        if self.pairs:
            parts.append(f"{self.pairs} pairs, {self.reads} read{'s' if self.reads > 1 else ''}")
        if self.rotated:
            parts.append("rotated")
        if self.scale is not None:
            first, last = (f"{s:g}" for s in self.scale)
            between = {
                "constant": "",
                "step": f", then {last}",
                "ramp": f" to {last}",
                "random": f" to {last} at random",
            }
            parts.append(f"scale {first}{between[self.path]}")
        if self.drift != "none":
            parts.append(f"{self.drift} change")
        if self.noise:
            parts.append(f"noise {self.noise:g}")
        return ", ".join(parts)


def _at_least(name: str, value: float, least: float) -> None:
    if not (isinstance(value, int | float) and least <= value < math.inf):
        raise ValueError(f"{name}: got {value!r}, expected a number of at least {least}")


def _stationary() -> Iterable[Condition]:
    """Keys of norm 1, axis-aligned, without noise."""
    return (Condition("stationary", kappa) for kappa in (1, 10, 100, 1000))


def _noisy() -> Iterable[Condition]:
    """Keys as in the stationary family, values with noise of norm 0.3."""
    return (Condition("noisy", kappa, noise=0.3) for kappa in (1, 10, 100, 1000))


def _rotated() -> Iterable[Condition]:
    """Keys of norm 1 whose covariance has random eigenvectors."""
    return (Condition("rotated", kappa, noise=noise, rotated=True) for noise in (0, 0.3) for kappa in (10, 100, 1000))


def _drifting() -> Iterable[Condition]:
    """Keys of norm 1 and a change half-way: the keys' spectrum is reversed, or the map is another."""
    for drift in ("keys", "map"):
        yield Condition("drifting", 100, drift=drift, width=64, length=4000)


def _scale() -> Iterable[Condition]:
    """Keys without a fixed norm: small, large, and changing inside the sequence."""
    for kappa in (1, 100):
        for s in (0.1, 0.5, 1.0, 2.0, 4.0):
            yield Condition("scale", kappa, scale=(s, s))
        yield Condition("scale", kappa, scale=(0.05, 2.0), path="step")
        yield Condition("scale", kappa, scale=(0.1, 4.0), path="ramp")
        yield Condition("scale", kappa, scale=(0.1, 4.0), path="random")
    yield Condition("scale", 100, noise=0.3, scale=(0.1, 0.1))
    for path in ("ramp", "random"):
        yield Condition("scale", 100, noise=0.3, scale=(0.1, 4.0), path=path)


def _repeated() -> Iterable[Condition]:
    """Random pairs that are read once, twice and four times, then recalled."""
    for kappa, rotated in ((1, False), (100, False), (100, True)):
        for pairs in (32, 64, 128, 256):
            for reads in (1, 2, 4):
                yield Condition("repeated", kappa, rotated=rotated, width=64, pairs=pairs, reads=reads)


FAMILIES: dict[str, Callable[[], Iterable[Condition]]] = {
    "stationary": _stationary,
    "noisy": _noisy,
    "rotated": _rotated,
    "drifting": _drifting,
    "scale": _scale,
    "repeated": _repeated,
}


def standard_conditions(families: Iterable[str] | None = None, *, quick: bool = False) -> list[Condition]:
    """Return the conditions of some families.

    Args:
        families: names among `FAMILIES`; default all.
        quick: a few small conditions of each family, to try a rule or the program in seconds; they are no results.

    Raises:
        ValueError: a family is unknown.
    """
    chosen = list(FAMILIES) if families is None else list(families)
    for name in chosen:
        if name not in FAMILIES:
            raise ValueError(f"families: got {name!r}, expected some of {', '.join(FAMILIES)}")
    found = [condition for name in chosen for condition in FAMILIES[name]()]
    return [_smaller(c) for c in found if _is_quick(c)] if quick else found


def _is_quick(c: Condition) -> bool:
    if c.pairs:
        return c.pairs == 32 and c.reads < 4 and not c.rotated
    return c.condition_number == 100 and c.scale in (None, (0.1, 0.1), (0.1, 4.0)) and c.path != "random"


def _smaller(c: Condition) -> Condition:
    return dataclasses.replace(c, width=16, length=200, pairs=c.pairs // 2)
