"""Options that are fixed when the kernels of the delta rule are built, and the arrays that every chunk reads."""

from typing import Any, NamedTuple

import jax

from triton_kernels.common.target import Target
from triton_kernels.common.tiles import bits_of, precision_of


class DeltaRuleOptions(NamedTuple):
    """Static options of a call.

    Attributes:
        scale: factor on the outputs.
        erase: False omits S^T k.
        decay: scalar decay: the gates COARSE and FINE hold its sum since the start of the chunk.
        channel: decay per channel.
        resets: the gate SEGMENT counts the resets since the start of the chunk.
        chunk: tokens per chunk.
        target: what the kernels run on.
        splits: of the sequence; None: `split_count` chooses.
    """

    scale: float
    erase: bool
    decay: bool
    channel: bool
    resets: bool
    chunk: int
    target: Target
    splits: int | None = None

    @property
    def gated(self) -> bool:
        """Return True if the gates FROM_START and TO_END can differ from 1."""
        return self.decay or self.resets


class Chunks(NamedTuple):
    """Inputs of both scans: everything about every chunk that does not depend on the state.

    Arrays by chunk and head have the order [B, N, H, ...], which is that of the programs.
    """

    q: jax.Array  # [B, T, Hk, K]; under a decay per channel decayed from the start of its chunk, [B, T, H, K]
    k: jax.Array  # the same
    w: jax.Array  # [B, T, Hw, K]; under a decay per channel decayed to the end of its chunk, [B, T, H, K]
    gates: jax.Array  # [B, N, H, GATES, C] float32
    carry: jax.Array | None  # decay of the state over a chunk, per channel [B, N, H, K]; None: the last FROM_START
    scores: jax.Array  # P (I + A)^-1, or P without erase [B, N, H, C, C]
    solved: jax.Array | None  # (I + A)^-T w, decayed to the end of the chunk [B, T, H, K]; None without erase
    inverse: jax.Array | None  # (I + A)^-1 in halves [B, N, H, halves, C, C]; only for a gradient

    @property
    def written_key(self) -> jax.Array:
        """Return the key under which the residual is written."""
        return self.w if self.solved is None else self.solved


def halves_of(dtype: Any) -> int:
    """Return in how many parts of this type a float32 matrix is handed on: two of 16 bits, one of 32.

    A product of 16-bit parts runs on the tensor cores at full speed, and float32 operands of this size spill.
    """
    return 32 // bits_of(dtype)


def constants_of(q: jax.Array, heads: int, options: DeltaRuleOptions) -> dict[str, Any]:
    """Return the constants that all kernels share, for queries [B, T, Hk, K] and a number of value heads."""
    return {
        "H": heads,
        "HK": q.shape[2],
        "K": q.shape[3],
        "C": options.chunk,
        "PRECISION": precision_of(q.dtype),
        "HALVES": halves_of(q.dtype),
    }
