"""Products of tokens with the matrices of the experts that they are sent to, without dropping tokens.

Assignments are sorted by expert and padded to blocks of one expert each. A loop multiplies the blocks that exist, one
after another, so the work is that of the assignments, whatever the number of experts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from osdn_jax.ops import sequence_parallel

_LARGEST = 256  # rows of a block, at most


class Blocks(NamedTuple):
    """The blocks of sorted assignments, N x b rows.

    Attributes:
        expert: expert of each block, [N].
        number: number of blocks that exist; the others are empty.
        row: assignment in each row, [N b]; the number of assignments for a row without one.
        place: row of each assignment, [A]; N b for an assignment to no expert.
    """

    expert: Int[Array, " N"]
    number: Int[Array, ""]
    row: Int[Array, " Nb"]
    place: Int[Array, " A"]


def block_size(assignments: int, experts: int) -> int:
    """Return the rows of a block: about half of an expert's share, a power of two up to 256."""
    share = max(1, assignments // (2 * experts))
    return min(_LARGEST, 1 << (share.bit_length() - 1))


def blocks_of(experts: Int[Array, " A"], count: int, size: int) -> Blocks:
    """Sort assignments into blocks of one expert.

    Args:
        experts: expert of each assignment; `count` for none.
        count: E, number of experts.
        size: b, rows of a block.
    """
    assignments = experts.shape[0]
    limit = assignments // size + min(count, assignments)  # each expert has at most one block that is not full
    order = jnp.argsort(experts, stable=True).astype(jnp.int32)
    sorted_experts = experts[order]
    sizes = jnp.sum(experts[:, None] == jnp.arange(count, dtype=experts.dtype)[None], axis=0, dtype=jnp.int32)
    ends = jnp.cumsum(-(-sizes // size), dtype=jnp.int32)  # blocks up to and including each expert's
    before = jnp.cumsum(sizes, dtype=jnp.int32) - sizes
    own = jnp.minimum(sorted_experts, count - 1)
    first = (ends - -(-sizes // size))[own] * size
    places = first + jnp.arange(assignments, dtype=jnp.int32) - before[own]
    places = jnp.where(sorted_experts < count, places, limit * size)
    row = jnp.full((limit * size,), assignments, jnp.int32).at[places].set(order, mode="drop")
    place = jnp.zeros(assignments, jnp.int32).at[order].set(places)
    expert = jnp.searchsorted(ends, jnp.arange(limit, dtype=jnp.int32), side="right").astype(jnp.int32)
    return Blocks(jnp.minimum(expert, count - 1), ends[-1], row, place)


def expert_product(
    x: Float[Array, "N b D"], matrices: Float[Array, "E D F"], expert: Int[Array, " N"], count: Int[Array, ""]
) -> Float[Array, "N b F"]:
    """Return x[n] @ matrices[expert[n]] for the first `count` blocks, and zeros for the others.

    Matrix products are in the dtype of x. Gradients exist in reverse mode only.
    """
    axes = sequence_parallel.axes_of((x, matrices, expert, count))  # of an enclosing jax.shard_map
    x, matrices, expert, count = (sequence_parallel.vary(y, axes) for y in (x, matrices, expert, count))
    return _expert_product(x, matrices, expert, count)


@jax.custom_vjp
def _expert_product(x: jax.Array, matrices: jax.Array, expert: jax.Array, count: jax.Array) -> jax.Array:
    return _product(x, matrices, expert, count)


def _product(x: jax.Array, matrices: jax.Array, expert: jax.Array, count: jax.Array) -> jax.Array:
    def block(n: jax.Array, out: jax.Array) -> jax.Array:
        return out.at[n].set(x[n] @ matrices[expert[n]].astype(x.dtype))

    start = jnp.zeros((*x.shape[:2], matrices.shape[2]), x.dtype)
    return jax.lax.fori_loop(0, count, block, sequence_parallel.vary(start, sequence_parallel.axes_of(x)))


type _Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def _forward(x: jax.Array, matrices: jax.Array, expert: jax.Array, count: jax.Array) -> tuple[jax.Array, _Residuals]:
    return _product(x, matrices, expert, count), (x, matrices, expert, count)


def _backward(residuals: _Residuals, d_out: jax.Array) -> tuple[jax.Array, jax.Array, None, None]:
    x, matrices, expert, count = residuals
    wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32

    def block(n: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        d_x, d_matrices = carry
        d_x = d_x.at[n].set(d_out[n] @ matrices[expert[n]].astype(x.dtype).T)
        own = jnp.einsum("bd,bf->df", x[n], d_out[n], preferred_element_type=wide)
        return d_x, d_matrices.at[expert[n]].add(own)

    start = (jnp.zeros_like(x), jnp.zeros(matrices.shape, wide))
    start = sequence_parallel.vary(start, sequence_parallel.axes_of(x))
    d_x, d_matrices = jax.lax.fori_loop(0, count, block, start)
    return d_x, d_matrices.astype(matrices.dtype), None, None


_expert_product.defvjp(_forward, _backward)
