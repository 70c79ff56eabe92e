"""The Gram preconditioner of Preconditioned DeltaNet: `gram`, and what its kernels serve."""

from triton_kernels.gram.entry import DIMENSIONS, chunk_size, gram, limitation

__all__ = ["DIMENSIONS", "chunk_size", "gram", "limitation"]
