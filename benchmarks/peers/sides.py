"""The same rule by two libraries: functions of the same arguments, each in its layout, and their differences."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from osdn_jax.compare import Contender, contender
from osdn_jax.compare.measure import relative_error

Arrays = Mapping[str, Any]
STATES = ("initial_state", "state", "d_initial_state")


class NoPeer(Exception):
    """There is no peer to measure; the message says why, and how to get it."""


def _same(name: str, x: np.ndarray) -> np.ndarray:
    return x


@dataclasses.dataclass(frozen=True)
class Side:
    """A rule of a library.

    Args:
        name: of the library.
        run: arguments by name -> (outputs, final state).
        outward: (name, array) -> the array in its layout, from [B, T, H, ...] and states [B, H, K, V].
        inward: the inverse.
    """

    name: str
    run: Callable[..., tuple[jax.Array, jax.Array]]
    outward: Callable[[str, np.ndarray], np.ndarray] = _same
    inward: Callable[[str, np.ndarray], np.ndarray] = _same


def compiled(side: Side, rule: str, arrays: Arrays, cotangents: Arrays | None) -> Contender:
    """Compile the forward pass, or with cotangents that and the gradients of all arguments; layouts are not timed.

    Args:
        side: the library.
        rule: for the label.
        arrays: arguments by name, in our layout.
        cotangents: of o and state, in our layout.
    """

    def forward(given: Arrays) -> dict[str, jax.Array]:
        return dict(zip(("o", "state"), side.run(**given), strict=True))

    def both(given: Arrays, pulled: Arrays) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        results, pull = jax.vjp(forward, given)
        return results, pull(pulled)[0]

    def placed(given: Arrays) -> dict[str, jax.Array]:
        return jax.device_put({name: np.ascontiguousarray(side.outward(name, x)) for name, x in given.items()})

    if cotangents is None:
        return contender(f"{rule}, {side.name}, forward", forward, (placed(arrays),))
    return contender(f"{rule}, {side.name}, forward + backward", both, (placed(arrays), placed(cotangents)))


def results(side: Side, program: Contender) -> dict[str, np.ndarray]:
    """Run a program with gradients; return outputs and gradients (d_ and the argument) in our layout."""
    if program.compiled is None:
        raise RuntimeError(f"{program.name}: cannot run: {program.refusal}")
    outputs, gradients = program.compiled(*program.arguments)
    named = {**outputs, **{f"d_{name}": x for name, x in gradients.items()}}
    return {name: side.inward(name, np.asarray(x)) for name, x in named.items()}


def differences(ours: Arrays, theirs: Arrays) -> dict[str, float]:
    """Return ‖ours − theirs‖ / ‖theirs‖ by result."""
    return {name: relative_error(x, np.asarray(theirs[name], np.float64)) for name, x in ours.items()}
