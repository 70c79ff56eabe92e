"""The asymmetric gated delta rule: `delta_rule` runs its kernels, `limitation` names what they do not support."""

from pallas_kernels.delta_rule.entry import DIMENSIONS, delta_rule, limitation

__all__ = ["DIMENSIONS", "delta_rule", "limitation"]
