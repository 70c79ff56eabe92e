"""Launch a kernel over a grid of any size, under vmap and shard_map, or interpret it."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.shard_map import match_varying_axes

_MOST_BLOCKS = 2**31 - 1  # of one launch


class Place:
    """Where a block is in its grid: `at("batch", "head")` are its indices along these axes."""

    def __init__(self, grid: dict[Any, int], number: jax.Array) -> None:
        self._indices: dict[Any, jax.Array] = {}
        for axis, size in reversed(grid.items()):
            self._indices[axis] = lax.rem(number, jnp.int32(size))
            number = lax.div(number, jnp.int32(size))

    def __call__(self, *axes: Any) -> list[jax.Array]:
        return [self._indices[axis] for axis in axes]


def launch(
    body: Callable[..., None],
    name: str,
    out: Any,
    grid: dict[Any, int],
    scratch: Sequence[Any],
    interpret: bool,
    arguments: Sequence[jax.Array],
    *,
    automatic_barriers: bool = False,
) -> Any:
    """Runs body(at, *inputs, *outputs, *scratch) over the grid, one warpgroup each, or interprets it on any machine.

    `at` is the block's `Place` in the grid, whose last axis goes fastest. All axes, those of vmap too, are one axis of
    the launch: CUDA takes 2^31 - 1 blocks along x, and 65,535 along the two others, which sequences of 4 million tokens
    exceed. Pallas makes the last axis x.

    With automatic_barriers Pallas puts barriers around every store to shared memory and before every copy into it.
    Without, only those of the body are there: one, `commit_smem`, must come between any two accesses to overlapping
    shared memory of which one is a write. `tests/support/barriers.py` checks a kernel for it; the interpreter cannot.
    """
    count, blocks = len(arguments) + len(jax.tree.leaves(out)), math.prod(grid.values())
    if blocks > _MOST_BLOCKS:
        raise ValueError(f"{name}: {blocks:,} blocks, a launch takes at most {_MOST_BLOCKS:,}")
    if blocks == 0:  # by a vmap over nothing, say; all results are empty
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out)

    def entry(*refs: Any) -> None:
        at = Place(grid, lax.axis_index("block"))
        pl.run_scoped(lambda *scoped: body(at, *refs[:count], *scoped), *scratch)

    options: dict[str, Any] = {"interpret": plgpu.InterpretGPUParams(detect_races=True)} if interpret else {}

    @jax.custom_batching.custom_vmap
    def run(*arguments: jax.Array) -> Any:
        return plgpu.kernel(
            entry,
            out_type=out,
            grid=(blocks,),
            grid_names=("block",),
            kernel_name=name,
            compiler_params=plgpu.CompilerParams(approx_math=False, unsafe_no_auto_barriers=not automatic_barriers),
            **options,
        )(*arguments)

    @run.def_vmap
    def _(size: int, batched: Sequence[bool], *arguments: jax.Array) -> tuple[Any, Any]:
        axis = object()

        def one(at: Place, *refs: Any) -> None:
            (i,) = at(axis)
            mapped = [*batched, *[True] * (count - len(batched))]
            ours = [ref.at[i] if each else ref for ref, each in zip(refs[:count], mapped, strict=True)]
            body(at, *ours, *refs[count:])

        many = jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape), x.dtype), out)
        results = launch(
            one, name, many, {axis: size, **grid}, scratch, interpret, arguments, automatic_barriers=automatic_barriers
        )
        return results, jax.tree.map(lambda _: True, out)

    # Under shard_map the results vary over what the arguments do, which a kernel does not say.
    return match_varying_axes((*arguments, run(*arguments)))[-1]
