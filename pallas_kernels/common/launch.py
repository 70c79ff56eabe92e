"""Launch a kernel over a grid of any size, also under vmap and shard_map, or interpret it on any machine."""

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.shard_map import match_varying_axes

_MOST_BLOCKS = 2**31 - 1  # of one launch


class Phases(dict[str, Any]):
    """Groups of scratch that share the same memory, because a kernel uses one group after the other."""


class BlockIndex:
    """Index of a block in its grid: `index("batch", "head")` returns those along these axes."""

    def __init__(self, grid: dict[Any, int], number: jax.Array) -> None:
        self._indices: dict[Any, jax.Array] = {}
        for axis, size in reversed(grid.items()):
            self._indices[axis] = lax.rem(number, jnp.int32(size))
            number = lax.div(number, jnp.int32(size))

    def __call__(self, *axes: Any) -> list[jax.Array]:
        return [self._indices[axis] for axis in axes]


def launch(
    body: Callable[[BlockIndex, Any, Any, Any], None],
    name: str,
    *,
    inputs: dict[str, Any],
    out: dict[str, Any],
    scratch: dict[str, Any],
    grid: dict[str, int],
    interpret: bool,
    automatic_barriers: bool = False,
) -> Any:
    """Run body(index, source, target, shared) for every block of the grid, one warpgroup each.

    `source`, `target` and `shared` are namespaces of references: to the inputs and the results in global memory, and to
    the scratch in shared memory, each under the name it has in the dict. An entry may be a list, or a dict, which
    becomes a namespace inside the namespace; an entry None stays None and occupies nothing.

    All axes of the grid, including those that vmap adds, become one axis of the launch, in which the last axis of the
    grid varies fastest. CUDA allows 2^31 - 1 blocks along x but only 65,535 along y and z, which sequences of 4 million
    tokens exceed; Pallas maps the last axis to x.

    With automatic_barriers Pallas puts barriers around every store to shared memory and before every copy into it.
    Without, only those of the body exist: one, `commit_smem`, must separate any two accesses to overlapping shared
    memory if either is a write. `tests/support/barriers.py` checks kernels for it; the interpreter cannot.

    Args:
        body: the kernel.
        name: of the kernel, in error messages, profiles and the record of spills.
        inputs: arrays, or lists of arrays, by name.
        out: the shape and type of every result, by name.
        scratch: types of shared memory and barriers, by name; groups that share memory are `Phases`.
        grid: number of blocks along each axis, by name.
        interpret: run in the interpreter, which detects races.
        automatic_barriers: see above.

    Returns:
        A namespace of the results, under the names of `out`.

    Raises:
        ValueError: the grid has more blocks than CUDA launches.
    """
    arguments, inputs_tree = jax.tree.flatten(_ordered(inputs))
    results, results_tree = jax.tree.flatten(_ordered(out))

    def flat_body(index: BlockIndex, *refs: Any) -> None:
        given, written = refs[: len(arguments)], refs[len(arguments) :][: len(results)]
        source = _named(inputs, jax.tree.unflatten(inputs_tree, given))
        target = _named(out, jax.tree.unflatten(results_tree, written))
        body(index, source, target, _named(scratch, refs[len(arguments) + len(results) :]))

    found = _launch(
        flat_body, name, results, grid, _ordered(scratch), interpret, arguments, automatic_barriers=automatic_barriers
    )
    return _named(out, jax.tree.unflatten(results_tree, found))


def _ordered(spec: Any) -> Any:
    """Return the tree with lists in place of dicts: JAX sorts the keys of a dict, and so the scratch in memory."""
    if isinstance(spec, Phases):
        return plgpu.RefUnion(*map(_ordered, spec.values()))
    if isinstance(spec, dict):
        return [_ordered(entry) for entry in spec.values()]
    return [_ordered(entry) for entry in spec] if isinstance(spec, list | tuple) else spec


def _named(spec: Any, refs: Any) -> Any:
    """Return references in the order of `_ordered(spec)` as namespaces with the names of spec."""
    if isinstance(spec, dict):
        return SimpleNamespace(**{name: _named(x, ref) for (name, x), ref in zip(spec.items(), refs, strict=True)})
    if isinstance(spec, list | tuple):
        return [_named(entry, ref) for entry, ref in zip(spec, refs, strict=True)]
    return refs


def _launch(
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
    """Run body(index, *inputs, *results, *scratch), all of them flat lists; see `launch`."""
    count, blocks = len(arguments) + len(jax.tree.leaves(out)), math.prod(grid.values())
    if blocks > _MOST_BLOCKS:
        raise ValueError(f"{name}: {blocks:,} blocks, a launch takes at most {_MOST_BLOCKS:,}")
    if blocks == 0:  # e.g. under a vmap over an empty axis; all results are empty
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out)

    def entry(*refs: Any) -> None:
        index = BlockIndex(grid, lax.axis_index("block"))
        pl.run_scoped(lambda *scoped: body(index, *refs[:count], *scoped), *scratch)

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

        def mapped_body(index: BlockIndex, *refs: Any) -> None:
            (i,) = index(axis)
            mapped = [*batched, *[True] * (count - len(batched))]
            ours = [ref.at[i] if each else ref for ref, each in zip(refs[:count], mapped, strict=True)]
            body(index, *ours, *refs[count:])

        results = _launch(
            mapped_body,
            name,
            jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape), x.dtype), out),
            {axis: size, **grid},
            scratch,
            interpret,
            arguments,
            automatic_barriers=automatic_barriers,
        )
        return results, jax.tree.map(lambda _: True, out)

    # Under shard_map the results vary over the mesh axes of the arguments, which a kernel does not declare.
    return match_varying_axes((*arguments, run(*arguments)))[-1]
