"""The chunkwise delta rule for CPUs: block by block of heads, so that the arrays of a chunk stay in the caches.

A block is read from the arguments and written to the results one chunk at a time, without a copy of a whole argument in
another layout. Its state before each chunk is saved for the gradient; the rest of a chunk is recomputed.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from osdn_jax.ops import chunk_step, sequence_parallel
from osdn_jax.ops.arguments import per_value_head
from osdn_jax.ops.calls import DeltaRuleCall
from osdn_jax.ops.chunk_step import Chunk

_BLOCK_ELEMENTS = 2**16  # of one array of a chunk: some twenty of them have to fit in the caches of the cores


_INPUTS = ("q", "k", "w", "v", "beta", "log_decay")  # fields that a call and a chunk have in common


class Blocks(NamedTuple):
    """Static options: a block is `rows` rows of the batch, or one of `per_row` equal groups of the heads of one row."""

    rows: int
    per_row: int
    size: int  # tokens per chunk
    scale: float
    erase: bool


def chunk(call: DeltaRuleCall, *, erase: bool, scale: float, size: int) -> tuple[jax.Array, jax.Array]:
    """Run the whole sequence in chunks of `size` tokens.

    Returns:
        (outputs [B, T, H, V], final state), both in the accumulator type.
    """
    batch, length, heads, value_dim = call.v.shape
    key_dim = call.k.shape[-1]
    if call.v.size == 0:
        return call.v.astype(call.state.dtype), call.state
    rows, per_row = _split(batch, call.k.shape[2], heads, size * max(key_dim, value_dim))
    padding = -length % size
    if padding:
        tokens = jax.tree.map(lambda x: _pad(x, padding), call.tokens())
        call = tokens._replace(state=call.state)
    axes = sequence_parallel.axes_of(call)
    call = sequence_parallel.vary(call, axes)  # the carries of the loops depend on all of them
    resets = None if call.resets is None else call.resets.astype(jnp.int32)
    out, state = _chunks(call._replace(resets=None), resets, Blocks(rows, per_row, size, scale, erase))
    return out[:, :length], state


def _split(batch: int, key_heads: int, heads: int, elements: int) -> tuple[int, int]:
    """Return (rows of the batch per block, blocks per row): about _BLOCK_ELEMENTS elements, of this number per head."""
    most = max(1, _BLOCK_ELEMENTS // elements)
    if heads <= most:
        return max(n for n in range(1, batch + 1) if batch % n == 0 and n * heads <= most), 1
    return 1, min(n for n in range(1, key_heads + 1) if key_heads % n == 0 and (heads // n <= most or n == key_heads))


def _pad(x: jax.Array, tokens: int) -> jax.Array:
    return jnp.pad(x, [(0, 0), (0, tokens)] + [(0, 0)] * (x.ndim - 2))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _chunks(call: DeltaRuleCall, resets: jax.Array | None, blocks: Blocks) -> tuple[jax.Array, jax.Array]:
    out, state, _ = _forward(call, resets, blocks, save=False)
    return out, state


def _chunks_fwd(call: DeltaRuleCall, resets: jax.Array | None, blocks: Blocks) -> tuple[Any, Any]:
    out, state, saved = _forward(call, resets, blocks, save=True)
    return (out, state), (call, resets, saved)


def _forward(
    call: DeltaRuleCall, resets: jax.Array | None, blocks: Blocks, *, save: bool
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Return (outputs, final state, states before the chunks of each block [block, N, X, K, V] if they are saved)."""
    dtype = call.state.dtype
    count, steps, shape = _sizes(call, blocks)
    carry = {"out": jnp.zeros(call.v.shape, dtype), "final": jnp.zeros_like(call.state)}
    if save:
        carry["saved"] = jnp.zeros((count, steps, *shape), dtype)
    carry = sequence_parallel.vary(carry, sequence_parallel.axes_of(call))

    def over_block(block: jax.Array, results: dict[str, jax.Array]) -> dict[str, jax.Array]:
        def over_chunk(step: jax.Array, carry: Any) -> Any:
            state, results = carry
            state_after, out = chunk_step.advance(state, _read(call, resets, block, step, blocks), blocks.erase)
            results = results | {"out": _write(results["out"], out, block, step, blocks)}
            if save:
                results["saved"] = lax.dynamic_update_slice(results["saved"], state[None, None], (block, step, 0, 0, 0))
            return state_after, results

        state, results = lax.fori_loop(0, steps, over_chunk, (_read_state(call.state, block, blocks), results))
        return results | {"final": _write_state(results["final"], state, block, blocks)}

    carry = lax.fori_loop(0, count, over_block, carry)
    return carry["out"], carry["final"], carry.get("saved")


def _chunks_bwd(blocks: Blocks, saved: Any, cotangents: Any) -> tuple[DeltaRuleCall, None]:
    call, resets, states = saved
    d_out, d_final = cotangents
    count, steps, shape = _sizes(call, blocks)
    zeros, d_out, d_final = sequence_parallel.vary(
        (jax.tree.map(jnp.zeros_like, call), d_out, d_final), sequence_parallel.axes_of((call, d_out, d_final))
    )

    def over_block(block: jax.Array, gradients: DeltaRuleCall) -> DeltaRuleCall:
        def over_chunk(i: jax.Array, carry: Any) -> Any:
            d_state, gradients = carry
            step = steps - 1 - i
            chunk = _read(call, resets, block, step, blocks)
            state = lax.dynamic_slice(states, (block, step, 0, 0, 0), (1, 1, *shape))[0, 0]
            residuals = chunk_step.recompute(state, chunk, blocks.erase)
            d_o = _slice(d_out, block, step, blocks)
            d_state, d_chunk = chunk_step.adjoint(d_state, d_o, chunk, residuals, blocks.erase)
            d_chunk = d_chunk._replace(q=blocks.scale * d_chunk.q)
            d_tokens = call.tokens()._replace(**{name: getattr(d_chunk, name) for name in _INPUTS})
            written = jax.tree.map(lambda x, d: _write(x, d, block, step, blocks), gradients.tokens(), d_tokens)
            return d_state, written._replace(state=gradients.state)

        d_state, gradients = lax.fori_loop(0, steps, over_chunk, (_read_state(d_final, block, blocks), gradients))
        return gradients._replace(state=_write_state(gradients.state, d_state, block, blocks))

    return lax.fori_loop(0, count, over_block, zeros), None


_chunks.defvjp(_chunks_fwd, _chunks_bwd)


def _sizes(call: DeltaRuleCall, blocks: Blocks) -> tuple[int, int, tuple[int, int, int]]:
    """Return the numbers of blocks and of chunks, and the shape of a block's state."""
    batch, heads, key_dim, value_dim = call.state.shape
    count = batch // blocks.rows * blocks.per_row
    return count, call.v.shape[1] // blocks.size, (blocks.rows * (heads // blocks.per_row), key_dim, value_dim)


def _read(call: DeltaRuleCall, resets: jax.Array | None, block: jax.Array, step: jax.Array, blocks: Blocks) -> Chunk:
    """Read a chunk of a block from the arguments; key heads are repeated, one for each value head."""
    dtype, heads = call.state.dtype, call.v.shape[2]
    independent = blocks.rows * (heads // blocks.per_row)

    def read(x: jax.Array) -> jax.Array:
        return per_value_head(_slice(x, block, step, blocks).astype(dtype), independent, axis=0)

    tokens = jax.tree.map(read, call.tokens())
    segment = None
    if resets is not None:
        row, _ = _start(block, heads, blocks)
        segment = lax.dynamic_slice(resets, (row, step * blocks.size), (blocks.rows, blocks.size))
        segment = per_value_head(jnp.cumsum(segment, axis=1), independent, axis=0)
    return Chunk(**{name: getattr(tokens, name) for name in _INPUTS}, segment=segment)._replace(
        q=blocks.scale * tokens.q
    )


def _start(block: jax.Array, heads: int, blocks: Blocks) -> tuple[jax.Array, jax.Array]:
    """Return the first row and the first of the heads of a block."""
    return block // blocks.per_row * blocks.rows, block % blocks.per_row * (heads // blocks.per_row)


def _slice(x: jax.Array, block: jax.Array, step: jax.Array, blocks: Blocks) -> jax.Array:
    """Read a chunk of a block from [B, T, heads, ...]: [X, C, ...], with X = rows times heads of the block."""
    row, head = _start(block, x.shape[2], blocks)
    shape = (blocks.rows, blocks.size, x.shape[2] // blocks.per_row, *x.shape[3:])
    x = lax.dynamic_slice(x, (row, step * blocks.size, head, *(0,) * (x.ndim - 3)), shape).swapaxes(1, 2)
    return x.reshape(-1, *x.shape[2:])


def _write(x: jax.Array, values: jax.Array, block: jax.Array, step: jax.Array, blocks: Blocks) -> jax.Array:
    """Write a chunk of a block to [B, T, heads, ...], summed over the value heads that share a key head."""
    row, head = _start(block, x.shape[2], blocks)
    heads = x.shape[2] // blocks.per_row
    shared = len(values) // (blocks.rows * heads)
    values = values.reshape(blocks.rows, heads, shared, *values.shape[1:]).sum(axis=2).swapaxes(1, 2)
    return lax.dynamic_update_slice(x, values.astype(x.dtype), (row, step * blocks.size, head, *(0,) * (x.ndim - 3)))


def _read_state(x: jax.Array, block: jax.Array, blocks: Blocks) -> jax.Array:
    """Read the states [X, K, V] of a block from [B, H, K, V]."""
    row, head = _start(block, x.shape[1], blocks)
    x = lax.dynamic_slice(x, (row, head, 0, 0), (blocks.rows, x.shape[1] // blocks.per_row, *x.shape[2:]))
    return x.reshape(-1, *x.shape[2:])


def _write_state(x: jax.Array, state: jax.Array, block: jax.Array, blocks: Blocks) -> jax.Array:
    """Write the states [X, K, V] of a block to [B, H, K, V]."""
    row, head = _start(block, x.shape[1], blocks)
    return lax.dynamic_update_slice(x, state.reshape(blocks.rows, -1, *x.shape[2:]), (row, head, 0, 0))
