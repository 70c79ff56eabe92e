"""The hypergradient preconditioner of OSDN: `hypergradient` runs its kernels, `limitation` reports unsupported keys."""

from triton_kernels.hypergradient.entry import chunk_size, hypergradient, limitation

__all__ = ["chunk_size", "hypergradient", "limitation"]
