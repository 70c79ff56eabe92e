"""Factors per token of a chunk, and decays of pairs of tokens; see `pallas_kernels.common.token_gates`."""

import triton
import triton.language as tl

from pallas_kernels.common import token_gates

BETA = tl.constexpr(token_gates.BETA)
FROM_START = tl.constexpr(token_gates.FROM_START)
TO_END = tl.constexpr(token_gates.TO_END)
COARSE = tl.constexpr(token_gates.COARSE)
FINE = tl.constexpr(token_gates.FINE)
SEGMENT = tl.constexpr(token_gates.SEGMENT)
GATES = tl.constexpr(token_gates.GATES)


@triton.jit
def gate(gates_ptr, WHICH: tl.constexpr, i, C: tl.constexpr):
    """Return one gate of the tokens i of the chunk whose gates begin at gates_ptr."""
    return tl.load(gates_ptr + WHICH * C + i)


@triton.jit
def pair_decay(gates_ptr, i, j, C: tl.constexpr, DECAY: tl.constexpr, RESETS: tl.constexpr):
    """Return the decay [i, j] from token j to token i; 0 where j comes after i, and between segments."""
    keep = i[:, None] >= j[None, :]
    decay = tl.where(keep, 1.0, 0.0)
    if RESETS:
        same = gate(gates_ptr, SEGMENT, i, C)[:, None] == gate(gates_ptr, SEGMENT, j, C)[None, :]
        decay = tl.where(same, decay, 0.0)
    if DECAY:
        # Differences of COARSE are exact next to resets. Above the diagonal they are positive: mask before taking exp.
        sums = gate(gates_ptr, COARSE, i, C)[:, None] - gate(gates_ptr, COARSE, j, C)[None, :]
        sums += gate(gates_ptr, FINE, i, C)[:, None] - gate(gates_ptr, FINE, j, C)[None, :]
        decay *= tl.exp(tl.where(keep, sums, 0.0))
    return decay
