"""The asymmetric gated delta rule: `delta_rule`, and what its kernels serve."""

from triton_kernels.delta_rule.entry import DIMENSIONS, chunk_size, delta_rule, limitation

__all__ = ["DIMENSIONS", "chunk_size", "delta_rule", "limitation"]
