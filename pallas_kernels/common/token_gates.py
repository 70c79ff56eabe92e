"""Per-token scale factors of a chunk, in the layout that the kernels read. XLA computes them, for every back end."""

import jax
import jax.numpy as jnp

CHUNK = 64  # tokens of a chunk unless a function is told otherwise

# Rows of the gates of a chunk, [GATES, chunk] float32. The scans read the first three only.
BETA = 0
FROM_START = 1  # decay from the start of the chunk to a token: the factor on the state
TO_END = 2  # decay from a token to the end of the chunk: the factor on its write
SCALES = 3
# The last three are also read along columns, for the decay of each pair of tokens. The sum of the log decays since the
# start of the chunk is kept as a multiple of 1/256 plus a remainder: differences of the former stay exact next to
# resets, and those of the latter are small.
COARSE, FINE = 3, 4
SEGMENT = 5  # number of resets since the start of the chunk
GATES = 6

# The smallest log decay that kernels receive. Its exp is 0, like that of anything below -104. With this bound the sums
# over 64 tokens stay within 2^16, up to which multiples of 1/256 are exact, so it adds no error to its neighbours.
LOWEST = -1000.0


def to_chunks(x: jax.Array, chunk: int = CHUNK) -> jax.Array:
    """Reshape [B, T, H] to [B, H, N, chunk]."""
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1, chunk)


def from_chunks(x: jax.Array) -> jax.Array:
    """Reshape [B, H, N, chunk] to [B, T, H]."""
    return x.reshape(*x.shape[:2], -1).swapaxes(1, 2)


def pad_to_multiple(x: jax.Array, multiple: int = CHUNK) -> jax.Array:
    """Pad [B, T, ...] with zeros after the last token, to a multiple of tokens."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % multiple)] + [(0, 0)] * (x.ndim - 2))


def segments_of(resets: jax.Array, chunk: int = CHUNK) -> jax.Array:
    """Return the number of resets since the start of the chunk [B, N, chunk] float32, from resets [B, T] bool."""
    in_chunks = resets.astype(jnp.int32).reshape(resets.shape[0], -1, chunk)
    return jnp.cumsum(in_chunks, axis=-1).astype(jnp.float32)


def clamped(log_decay: jax.Array) -> jax.Array:
    """Raise log decays below `LOWEST`, down to -inf, to it; those get no gradient. NaN stays NaN."""
    return jnp.where(log_decay < LOWEST, LOWEST, log_decay)


def two_sums(log_decay: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the sums of log decays [..., chunk] since the start as a multiple of 1/256 and a remainder."""
    coarse = jnp.round(log_decay * 256.0) / 256.0
    return jnp.cumsum(coarse, axis=-1), jnp.cumsum(log_decay - coarse, axis=-1)


def gates_of(beta: jax.Array, log_decay: jax.Array | None, segment: jax.Array | None, chunk: int = CHUNK) -> jax.Array:
    """Return the gates [B, H, N, GATES, chunk].

    Args:
        beta: [B, T, H].
        log_decay: scalar log decay [B, T, H], or None.
        segment: of each token, from `segments_of` [B, N, chunk] float32, or None without resets.
        chunk: tokens per chunk.
    """
    beta = to_chunks(beta, chunk)
    ones, zeros = jnp.ones_like(beta), jnp.zeros_like(beta)
    rows = [beta, ones, ones, zeros, zeros, zeros]
    if log_decay is not None:
        coarse, fine = two_sums(to_chunks(log_decay, chunk))
        rows[COARSE], rows[FINE] = coarse, fine
        rows[FROM_START] = jnp.exp(coarse + fine)
        rows[TO_END] = jnp.exp((coarse[..., -1:] - coarse) + (fine[..., -1:] - fine))
    if segment is not None:
        rows[SEGMENT] = jnp.broadcast_to(segment[:, None], beta.shape)
        rows[FROM_START] = jnp.where(rows[SEGMENT] == 0, rows[FROM_START], 0.0)
        rows[TO_END] = jnp.where(rows[SEGMENT] == rows[SEGMENT][..., -1:], rows[TO_END], 0.0)
    return jnp.stack(rows, axis=3)
