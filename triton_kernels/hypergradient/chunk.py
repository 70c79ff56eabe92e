"""A chunk of 64 tokens of the hypergradient preconditioner: its gates, its options, and where its arrays lie.

With u = k^2, o = d - anchor before the chunk and c = step * feedback, a chunk whose values stay within the bounds is

    (I + L) feedback = 1 - beta (decay <u, o> + <u, anchor>)     L_ij = beta_i E_ij <u_i, u_j> step_j,  i > j

where E_ij is the product of exp(log_forget) over the tokens between j and i, and decay_i over the tokens of the chunk
before i. Once the feedback of its tokens is known, a chunk is a recurrence over tokens in which no channel reads
another one:

    d_{t+1} = clip(g_t d_t + (1 - g_t) anchor + c_t u_t)

`expand` and `gradients` run it in registers, for all chunks at once: K multiplications per token, where a product with
the weights of a chunk would take 64 K. A chunk in which a value leaves the bounds, or with a reset after its first
token, gets its feedback token by token (`tokens.py`), and from then on is like any other.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.common.token_gates import to_chunks, two_sums
from triton_kernels.common.settings import Settings, settings
from triton_kernels.common.target import Target
from triton_kernels.common.tiles import bits_of

CHUNK = 64  # tokens
C = tl.constexpr(CHUNK)
WORDS = tl.constexpr(CHUNK // 32)  # of the bits that say where a chunk stayed within the bounds

# Rows of the gates of a chunk, [rows, 64] float32. Without forgetting there are only the first three.
STEP = tl.constexpr(0)
BETA = tl.constexpr(1)
RESET = tl.constexpr(2)  # 1 if the state is reset before the token
FORGET = tl.constexpr(3)  # exp(log_forget)
ANCHOR_WEIGHT = tl.constexpr(4)  # 1 - exp(log_forget)
DECAY_BEFORE = tl.constexpr(5)  # decay from the start of the chunk to before the token
TO_END = tl.constexpr(6)  # decay from the token to the end of the chunk
COARSE = tl.constexpr(7)  # sum of log_forget up to the token, as the two terms of `two_sums`
FINE = tl.constexpr(8)


class HypergradientOptions(NamedTuple):
    """Options that are fixed when a kernel is compiled."""

    bounds: tuple[float, float] | None
    forget: bool
    anchored: bool
    resets: bool
    return_write_key: bool  # return write keys d k, in the type of k, instead of d in float32
    target: Target

    @property
    def may_run_sequentially(self) -> bool:
        """True if a chunk may have to be computed token by token."""
        return self.bounds is not None or self.resets

    def constants(self, k: jax.Array) -> dict[str, Any]:
        """Return the constants that all kernels but `prepare` take."""
        lo, hi = self.bounds or (0.0, 0.0)
        return {
            "K": k.shape[-1],
            "ROWS": 9 if self.forget else 3,
            "FORGETS": self.forget,
            "ANCHORED": self.anchored,
            "RESETS": self.resets,
            "BOUNDED": self.bounds is not None,
            "LO": lo,
            "HI": hi,
        }

    def settings(self, kernel: str, k: jax.Array) -> Settings:
        """Return the settings of a kernel for these keys."""
        return settings(kernel, self.target, bits_of(k.dtype), k.shape[-1])


class Chunks(NamedTuple):
    """All chunks as the forward pass leaves them, for `expand` and the gradient."""

    k: jax.Array  # [B, T, P, K], T a multiple of 64
    gates: jax.Array  # [B, P, N, rows, 64] float32
    start: jax.Array  # d before each chunk, after a reset at its first token [B, P, N, K] float32
    feedback: jax.Array  # of each token [B, P, N, 64] float32
    sequential: jax.Array | None  # 1 for chunks that are computed token by token, else 0 [B, P, N] int32
    kept: jax.Array | None  # bit t % 32 of word t // 32: token t kept the channel within the bounds, or d was NaN;
    # undefined in chunks that are not sequential [B, P, N, 2, K] int32
    after_reset: jax.Array  # d after a reset [B, P, K] float32
    anchor: jax.Array  # [B, P, K] float32

    @property
    def number(self) -> int:
        """Number of chunks."""
        return self.gates.shape[2]


def make_gates(step: jax.Array, beta: jax.Array, log_forget: jax.Array | None, resets: jax.Array | None) -> jax.Array:
    """Return the gates [B, P, N, rows, 64] of all chunks, T a multiple of 64, from float32 arrays.

    Args:
        step: [B, T, P].
        beta: [B, T, P].
        log_forget: [B, T, P], or None.
        resets: [B, T], 1 or 0, or None.
    """
    step, beta = to_chunks(step, CHUNK), to_chunks(beta, CHUNK)
    reset = jnp.zeros_like(step)
    if resets is not None:
        reset = to_chunks(jnp.broadcast_to(resets[..., None], (*resets.shape, step.shape[1])), CHUNK)
    rows = [step, beta, reset]
    if log_forget is not None:
        forget = to_chunks(log_forget, CHUNK)
        coarse, fine = two_sums(forget)
        before = jnp.pad((coarse + fine)[..., :-1], [(0, 0)] * (coarse.ndim - 1) + [(1, 0)])
        to_end = (coarse[..., -1:] - coarse) + (fine[..., -1:] - fine)
        rows += [jnp.exp(forget), -jnp.expm1(forget), jnp.exp(before), jnp.exp(to_end), coarse, fine]
    return jnp.stack(rows, axis=3)


def number_and_heads(k: jax.Array) -> dict[str, int]:
    """Return the scalars that every kernel takes: the number of chunks and of heads."""
    return {"N": k.shape[1] // CHUNK, "P": k.shape[2]}


@triton.jit
def chunk_index(N, P):
    """Return (batch row, head, chunk) of a program of which there is one per chunk and head; heads vary fastest."""
    index = tl.program_id(0).to(tl.int64)
    return index // (N * P), index % P, index // P % N


@triton.jit
def head_index(P):
    """Return (batch row, head) of a program of which there is one per head."""
    index = tl.program_id(0).to(tl.int64)
    return index // P, index % P


@triton.jit
def tokens_at(ptr, b, p, n, N, P, K: tl.constexpr):
    """Return the pointer to the first token of a chunk in [B, T, P, K]; its tokens are P K elements apart."""
    return ptr + ((b * N + n) * C * P + p) * K


@triton.jit
def row(ptr, t, P, K: tl.constexpr):
    """Return token t of a chunk [K] as float32, from the pointer to its first token."""
    return tl.load(ptr + t * P * K + tl.arange(0, K)).to(tl.float32)


@triton.jit
def rows(ptr, t, P, K: tl.constexpr, COUNT: tl.constexpr):
    """Return the COUNT tokens from t on as a tuple of `row`: loads that wait together."""
    found = ()
    for i in tl.static_range(COUNT):
        found = found + (row(ptr, t + i, P, K),)  # type: ignore[assignment]
    return found


@triton.jit
def tile(ptr, P, K: tl.constexpr):
    """Return all tokens of a chunk [64, K], in their type, from the pointer to its first token."""
    return tl.load(ptr + tl.arange(0, C)[:, None] * P * K + tl.arange(0, K)[None, :])


@triton.jit
def gate(gates_ptr, index: tl.constexpr, t):
    """Return a gate of one token, or of several, from the pointer to the gates of a chunk."""
    return tl.load(gates_ptr + index * C + t)
