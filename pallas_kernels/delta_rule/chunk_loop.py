"""The loop over chunks that the scan and its gradient share.

One block per batch, head and tile of values holds [K, width] float32 in registers, while the tiles of the next chunk
arrive in shared memory.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.gates import FROM_START, SCALES
from pallas_kernels.common.launch import launch_flat
from pallas_kernels.common.tiles import CHUNK, along_columns, read_global, read_global_rows, smem
from pallas_kernels.delta_rule.prepare import DeltaRuleOptions

_KEYS = ("q", "k", "w")  # [B, T, heads, K]
_VALUES = ("v", "d_out")  # [B, T, H, V]


def tile_width(key_dim: int) -> int:
    """Columns of the memory that one block keeps in its registers."""
    return 64 if key_dim <= 128 else 32


class Chunk(NamedTuple):
    """One chunk of the loop, as seen by a block."""

    batch: Any
    head: Any
    number: Any
    columns: Any  # of the values, that the block keeps
    arrive: Callable[[], tuple[dict[str, Any], Any]]  # waits: ({input: its tile}, what is kept of the memory or None)

    @property
    def rows(self) -> tuple[Any, Any, Any, Any]:
        """Where the tokens' values are in an array [B, T, H, V]."""
        return self.batch, pl.ds(self.number * CHUNK, CHUNK), self.head, self.columns

    @property
    def states(self) -> tuple[Any, Any, Any, Any, Any]:
        """Where the memory is in an array [B, H, N, K, V]."""
        return self.batch, self.head, self.number, slice(None), self.columns


def chunk_loop(
    name: str,
    inputs: dict[str, jax.Array],
    carry: jax.Array | None,
    initial: jax.Array,
    out: Sequence[jax.ShapeDtypeStruct],
    scratch: Sequence[Any],
    step: Callable[[Chunk, jax.Array, Sequence[Any], Sequence[Any]], jax.Array],
    options: DeltaRuleOptions,
    *,
    returns: bool = True,
    reverse: bool = False,
) -> list[jax.Array]:
    """Folds step(chunk, memory, outputs, scratch) over the chunks; the results, `out`.

    Args:
        name: of the kernel.
        inputs: by the names of `Chunks`, with values "v" or "d_out" and the halves of the inverse "inverse", "rest".
        carry: per channel what is left of the memory at the end of a chunk [B, H, N, K]; None for a scalar, or none.
        initial: what the loop starts from [B, H, K, V] float32.
        out: results that the steps write, and last, if it returns one, the memory after the loop.
        scratch: shared memory for the steps.
        step: returns the memory after the chunk; the loop waits for the copies that it starts at its end only.
        options: fixed options of the kernels.
        returns: whether the memory after the loop is a result.
        reverse: from the last chunk to the first.
    """
    _, heads, key_dim, value_dim = initial.shape
    (values,) = (inputs[name] for name in _VALUES if name in inputs)
    count, dtype, width = values.shape[1] // CHUNK, values.dtype, tile_width(key_dim)
    stages = 2 if key_dim <= 128 else 1

    def tile(name: str) -> Any:
        if name == "gates":
            return plgpu.SMEM((stages, SCALES, CHUNK), jnp.float32)
        columns = key_dim if name in _KEYS else width if name in _VALUES else CHUNK
        return smem(stages, CHUNK, columns, dtype=dtype, swizzle=2 * width)

    carries = [] if carry is None else [carry]

    def body(at: Any, *refs: Any) -> None:
        left, sizes = iter(refs), (len(inputs), len(carries), 1, len(out), len(inputs), len(scratch), 1)
        parts = [list(itertools.islice(left, size)) for size in sizes]
        sources, carry_refs, (initial_ref,), out_refs, tiles, scratch_refs, (loaded,) = parts
        source, buffer = (dict(zip(inputs, part, strict=True)) for part in (sources, tiles))
        b, h, column = at("batch", "head", "values")
        columns = pl.ds(column * width, width)

        def load(n: Any, slot: Any) -> None:
            for name, ref in source.items():
                if name in _KEYS + _VALUES:
                    head = h if name in _VALUES else lax.div(h, heads // inputs[name].shape[2])
                    part = ref.at[b, pl.ds(n * CHUNK, CHUNK), head]
                    part = part.at[:, columns] if name in _VALUES else part
                else:
                    part = ref.at[b, h, n]
                    part = part.at[pl.ds(0, SCALES)] if name == "gates" else part
                plgpu.copy_gmem_to_smem(part, buffer[name].at[slot], loaded.at[slot])

        def number(i: Any) -> Any:
            return count - 1 - i if reverse else i

        def chunk(i: Any, memory: jax.Array) -> jax.Array:
            n, slot = number(i), lax.rem(i, jnp.int32(stages))
            if stages == 1:
                # Were it known, all addresses of tiles would be computed before the loop, too many for the registers.
                slot = lax.optimization_barrier(slot)
                load(n, slot)
            else:
                pl.when(i + 1 < count)(lambda: load(number(i + 1), 1 - slot))

            def arrive() -> tuple[dict[str, Any], Any]:
                plgpu.barrier_wait(loaded.at[slot])
                now = {name: ref.at[slot] for name, ref in buffer.items()}
                if carry_refs:
                    return now, along_columns(read_global_rows(carry_refs[0].at[b, h, n]), memory)
                return now, now["gates"][FROM_START, CHUNK - 1] if options.gated else None

            return step(Chunk(b, h, n, columns, arrive), memory, out_refs, scratch_refs)

        if stages > 1:
            load(number(0), 0)
        memory = lax.fori_loop(0, count, chunk, read_global(initial_ref.at[b, h, :, columns]))
        if returns:
            out_refs[-1][b, h, :, columns] = memory
        plgpu.wait_smem_to_gmem(0)

    barrier = plgpu.Barrier(num_arrivals=len(inputs), num_barriers=stages)
    grid = {"batch": values.shape[0], "values": value_dim // width, "head": heads}
    arguments = [*inputs.values(), *carries, initial]
    shared = [*(tile(name) for name in inputs), *scratch, barrier]
    return launch_flat(body, name, list(out), grid, shared, options.interpret, arguments)
