"""The loop over chunks that `scan` and `scan_backward` share.

One block per batch, head and tile of values keeps [K, width] float32 of the state in registers, while the tiles of the
next chunk arrive in shared memory.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.launch import BlockIndex, launch
from pallas_kernels.common.tiles import CHUNK, along_columns, read_global, read_global_rows, smem
from pallas_kernels.common.token_gates import FROM_START, SCALES
from pallas_kernels.delta_rule.prepare import DeltaRuleOptions

_KEYS = ("q", "k", "w")  # [B, T, heads, K]
_VALUES = ("v", "d_out")  # [B, T, H, V]


def tile_width(key_dim: int) -> int:
    """Return the number of columns of the state that one block keeps in registers."""
    return 64 if key_dim <= 128 else 32


class Chunk(NamedTuple):
    """One chunk of the loop, as a block sees it."""

    batch: Any
    head: Any
    number: Any
    columns: Any  # of the values, which the block computes
    arrive: Callable[[], tuple[dict[str, Any], Any]]  # waits; returns {input: its tile}, decay of the state or None

    @property
    def rows(self) -> tuple[Any, Any, Any, Any]:
        """Index of the chunk's values in an array [B, T, H, V]."""
        return self.batch, pl.ds(self.number * CHUNK, CHUNK), self.head, self.columns

    @property
    def states(self) -> tuple[Any, Any, Any, Any, Any]:
        """Index of the chunk's state in an array [B, H, N, K, V]."""
        return self.batch, self.head, self.number, slice(None), self.columns


def chunk_loop(
    name: str,
    step: Callable[[Chunk, jax.Array, Any, Any], jax.Array],
    *,
    inputs: dict[str, jax.Array],
    carry: jax.Array | None,
    initial: jax.Array,
    out: dict[str, Any],
    scratch: dict[str, Any],
    options: DeltaRuleOptions,
    reverse: bool = False,
) -> Any:
    """Fold step(chunk, state, target, shared) over the chunks and return the results, a namespace.

    Args:
        name: of the kernel.
        step: returns the state after the chunk. `target` holds references to the results, `shared` to the scratch. The
            loop waits only at its end for the copies that the steps start.
        inputs: by the names of `Chunks`, with the values "v" or "d_out" and, optionally, the halves of the inverse
            "inverse" and "inverse_low".
        carry: decay of the state over a chunk, per channel [B, H, N, K]; None: scalar, or no decay.
        initial: state before the loop [B, H, K, V] float32.
        out: types of the results; "final", if it is among them, receives the state after the loop.
        scratch: types of the steps' shared memory.
        options: fixed options of the kernels.
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

    def body(index: BlockIndex, source: Any, target: Any, shared: Any) -> None:
        tiles, loaded = vars(shared.inputs), shared.loaded
        b, h, column = index("batch", "head", "values")
        columns = pl.ds(column * width, width)

        def load(n: Any, slot: Any) -> None:
            for name, ref in vars(source.inputs).items():
                if name in _KEYS + _VALUES:
                    head = h if name in _VALUES else lax.div(h, heads // inputs[name].shape[2])
                    rows = ref.at[b, pl.ds(n * CHUNK, CHUNK), head]
                    rows = rows.at[:, columns] if name in _VALUES else rows
                else:
                    rows = ref.at[b, h, n]
                    rows = rows.at[pl.ds(0, SCALES)] if name == "gates" else rows
                plgpu.copy_gmem_to_smem(rows, tiles[name].at[slot], loaded.at[slot])

        def number(i: Any) -> Any:
            return count - 1 - i if reverse else i

        def chunk(i: Any, state: jax.Array) -> jax.Array:
            n, slot = number(i), lax.rem(i, jnp.int32(stages))
            if stages == 1:
                # With a known slot the compiler would compute all tile addresses before the loop: too many registers.
                slot = lax.optimization_barrier(slot)
                load(n, slot)
            else:
                pl.when(i + 1 < count)(lambda: load(number(i + 1), 1 - slot))

            def arrive() -> tuple[dict[str, Any], Any]:
                plgpu.barrier_wait(loaded.at[slot])
                arrived = {name: ref.at[slot] for name, ref in tiles.items()}
                if source.carry is not None:
                    return arrived, along_columns(read_global_rows(source.carry.at[b, h, n]), state)
                return arrived, arrived["gates"][FROM_START, CHUNK - 1] if options.gated else None

            return step(Chunk(b, h, n, columns, arrive), state, target, shared.step)

        if stages > 1:
            load(number(0), 0)
        state = lax.fori_loop(0, count, chunk, read_global(source.initial.at[b, h, :, columns]))
        if "final" in out:
            target.final[b, h, :, columns] = state
        plgpu.wait_smem_to_gmem(0)

    return launch(
        body,
        name,
        inputs={"inputs": inputs, "carry": carry, "initial": initial},
        out=out,
        scratch={
            "inputs": {name: tile(name) for name in inputs},
            "step": scratch,
            "loaded": plgpu.Barrier(num_arrivals=len(inputs), num_barriers=stages),
        },
        grid={"batch": values.shape[0], "values": value_dim // width, "head": heads},
        interpret=options.interpret,
    )
