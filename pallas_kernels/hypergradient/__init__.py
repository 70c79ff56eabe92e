"""The hypergradient preconditioner of OSDN: `hypergradient` runs its kernels, `limitation` reports unsupported keys."""

from pallas_kernels.hypergradient.entry import hypergradient, limitation

__all__ = ["hypergradient", "limitation"]
