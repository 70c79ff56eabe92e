"""Settings of the preconditioners."""

import dataclasses
from typing import Any, Literal

from osdn_jax.nn.config import fields
from osdn_jax.ops import checks, hypergradient_preset

ForgetGate = Literal["token", "head", "constant"]


@dataclasses.dataclass(frozen=True)
class HypergradientConfig:
    """Settings of the hypergradient preconditioner of OSDN (arXiv 2605.13473).

    `ops.hypergradient_preconditioner` has the equations.

    Args:
        eta: step size of the preconditioner's update. Default: 1.
        bounds: (low, high) that each entry of d is clipped to, or None for no bounds. Default: (0, 1e9).
        initial: value that the learned initial preconditioner d_0 is initialised to. Default: 0.
        anchor: value that forgetting moves d toward. Default: 0.
        forget: forget d by a gate. Default: True.
        forget_gate: "token" (the default), a gate per token and head that starts near 0.999: Adaptive Preconditioner
            Forgetting; "head", a learned gate per head that starts there; "constant", `forget_constant` for all. The
            last two are of the paper's ablation.
        forget_constant: share of d - anchor that the gate "constant" keeps per token. Default: 0.999.
        learned_eta: learn eta, a number per preconditioner that starts at `eta`, which may be 0. Default: False.
        beta_aware: b_t = beta in the update instead of 1, with one preconditioner per value head. Default: False.
        normalize: divide the update by sum(k^2) + 1e-5. Default: False.

    Raises:
        ValueError: a field is out of range.
        TypeError: a field has another type.
    """

    eta: float = 1.0
    bounds: tuple[float, float] | None = (0.0, 1e9)
    initial: float = 0.0
    anchor: float = 0.0
    forget: bool = True
    beta_aware: bool = False
    normalize: bool = False
    forget_gate: ForgetGate = "token"
    forget_constant: float = 0.999
    learned_eta: bool = False

    def __post_init__(self) -> None:
        """Check the fields; bounds may be a list, as in JSON."""
        for name in ("eta", "initial", "anchor"):
            checks.number(name, getattr(self, name))
        for name in ("forget", "beta_aware", "normalize", "learned_eta"):
            checks.flag(name, getattr(self, name))
        fields.one_of("forget_gate", self.forget_gate, ("token", "head", "constant"))
        if not 0.0 < checks.number("forget_constant", self.forget_constant) <= 1.0:
            raise ValueError(f"forget_constant: got {self.forget_constant}, expected above 0 and at most 1")
        object.__setattr__(self, "bounds", checks.bounds(self.bounds))

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "HypergradientConfig":
        """Return a published setting, "paper" or "trust", with changes.

        "trust" forgets toward 1: toward 0, as in the paper, forgetting would soon hold d on its lower bound of 2/3.

        Args:
            name: "paper" or "trust".
            **changes: fields that replace those of the setting.

        Raises:
            ValueError: another name, or a field out of range.

        Example:
            >>> HypergradientConfig.preset("trust", forget=False).bounds
            (0.6666666666666666, 1.5)
        """
        anchor = {"trust": 1.0}.get(name, 0.0)
        return cls(**{"anchor": anchor, **hypergradient_preset(name), **changes})


@dataclasses.dataclass(frozen=True)
class GramConfig:
    """Settings of the Gram preconditioner of Preconditioned DeltaNet (arXiv 2604.21100).

    `ops.gram_preconditioner` has the equations.

    Args:
        center: value that the learned center, one per preconditioner, is initialised to. Default: -0.2.
        squash: x, at least 1 in the paper, so that the factors on the keys lie in [1/x, x]; 1 for no preconditioning.
            Default: 1.5.
        learned_squash: learn log(x), a number per preconditioner that starts at log(squash). Default: False.

    Raises:
        ValueError: a field is out of range.
        TypeError: a field has another type.
    """

    center: float = -0.2
    squash: float = 1.5
    learned_squash: bool = False

    def __post_init__(self) -> None:
        """Check the fields."""
        checks.number("center", self.center)
        fields.positive("squash", self.squash)
        checks.flag("learned_squash", self.learned_squash)


@dataclasses.dataclass(frozen=True)
class SquaresConfig:
    """Settings of the preconditioners of squared keys in the OSDN authors' code (github.com/Lhongpei/OSLA).

    Without `average` a sum, D_t = D_{t-1} + k_t^2, and the write key is k_t / (D_t + 1). With `average` = a, a moving
    average, e_t = a e_{t-1} + (1 - a) k_t^2, and the write key is k_t / (e_{t-1} + 1e-6): token t reads the average of
    the tokens before it.

    Args:
        average: share of the moving average that each token keeps, above 0 and below 1. Default: None, the sum.
        normalize: with `average`, divide the factors d by sum(d k^2) + 1e-6. Default: False.
        initial: value that the learned start of D or e is initialised to. Default: 0.

    Raises:
        ValueError: a field is out of range, or normalize without average.
        TypeError: a field has another type.
    """

    average: float | None = None
    normalize: bool = False
    initial: float = 0.0

    def __post_init__(self) -> None:
        """Check the fields."""
        checks.number("initial", self.initial)
        checks.flag("normalize", self.normalize)
        if self.average is not None and not 0.0 < checks.number("average", self.average) < 1.0:
            raise ValueError(f"average: got {self.average}, expected None or a number above 0 and below 1")
        if self.normalize and self.average is None:
            raise ValueError("normalize: got True with average=None, expected it with a moving average")
