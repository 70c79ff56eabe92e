"""The Gram preconditioner's options, and the values of a chunk that both of its kernels compute."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.common import token_gates
from triton_kernels.common.gates import FROM_START, gate, pair_decay
from triton_kernels.common.settings import Settings, settings
from triton_kernels.common.target import Target
from triton_kernels.common.tiles import bits_of, precision_of

CHUNK = 32  # tokens: the decays of all pairs and the sums of a chunk stay in registers
GAIN = tl.constexpr(token_gates.BETA)  # the row of the gates that holds the gain
EPSILON = tl.constexpr(1e-6)


class GramOptions(NamedTuple):
    """Static options of a call.

    Attributes:
        squash: the largest multiplier.
        return_write_key: return write keys, in the type of k, instead of multipliers in float32.
        resets: the gate SEGMENT counts the resets since the start of the chunk.
        target: what the kernels run on.
        splits: of the sequence; None: `split_count` chooses.
    """

    squash: float
    return_write_key: bool
    resets: bool
    target: Target
    splits: int | None = None


class Chunks(NamedTuple):
    """Inputs of both kernels. Arrays by chunk and head have the order [B, N, P, ...]."""

    k: jax.Array  # [B, T, P, K]
    gates: jax.Array  # [B, N, P, GATES, C] float32
    center: jax.Array  # [B, P] float32


def settings_of(kernel: str, k: jax.Array, options: GramOptions) -> Settings:
    """Return the settings of a kernel for keys of this type and size."""
    chosen = settings(kernel, options.target, bits_of(k.dtype), k.shape[3])
    return chosen._replace(block=min(chosen.block, k.shape[3]))


def scalars_of(k: jax.Array, options: GramOptions) -> dict[str, int | float]:
    """Return the parameters known at run time."""
    return {"log_squash": math.log(options.squash), "N": k.shape[1] // CHUNK}


def constants_of(k: jax.Array, options: GramOptions, chosen: Settings) -> dict[str, Any]:
    """Return the constants that both kernels share."""
    return {
        "P": k.shape[2],
        "K": k.shape[3],
        "C": CHUNK,
        "BLOCK": chosen.block,
        "WRITE_KEY": options.return_write_key,
        "RESETS": options.resets,
        "PRECISION": precision_of(k.dtype),
        "STAGES": chosen.stages,
    }


def out_type(k: jax.Array, options: GramOptions) -> Any:
    """Return the type of the outputs."""
    return k.dtype if options.return_write_key else jnp.float32


@triton.jit
def decay_before(gates_ptr, C: tl.constexpr, RESETS: tl.constexpr):
    """Return the decay [i, j] from token j to a later token i, else 0."""
    i = tl.arange(0, C)
    decay = pair_decay(gates_ptr, i, i, C, True, RESETS)
    return tl.where(i[:, None] > i[None, :], decay, 0.0)


@triton.jit
def sums_before(decay, added, gates_ptr, start, C: tl.constexpr, PRECISION: tl.constexpr):
    """Return exp(log_decay) times A of the previous token, for each token of the chunk [C, BLOCK]."""
    before = tl.dot(decay, added, input_precision=PRECISION)
    return before + gate(gates_ptr, FROM_START, tl.arange(0, C), C)[:, None] * start[None, :]


@triton.jit
def multiplier_of(running, center, log_squash):
    """Return r and the multiplier for the running sums A."""
    r = tl.log(running + EPSILON) - center
    return r, tl.exp(-log_squash * r / (1.0 + tl.abs(r)))
