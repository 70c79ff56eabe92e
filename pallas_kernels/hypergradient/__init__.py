"""The hypergradient preconditioner of OSDN: `hypergradient` runs its kernels, `limitation` names what they refuse."""

from pallas_kernels.hypergradient.entry import hypergradient, limitation

__all__ = ["hypergradient", "limitation"]
