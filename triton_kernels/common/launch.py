"""Launch a kernel: through jax-triton on a GPU, or in Triton's interpreter on any machine."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common.shard_map import match_varying_axes
from triton_kernels.common.target import Target

_MOST_PROGRAMS = 2**31 - 1  # of one launch along axis 0; along axes 1 and 2 it would be 65,535
# PTX that an assembler of CUDA 12.8 or later reads; Triton 3.7 brings that one. Triton 3.9 would write 9.4 for Hopper,
# and XLA takes the first assembler on PATH, which may be older.
PTX_VERSION = 87


class Launch(NamedTuple):
    """One kernel and everything that it is compiled from. All arrays have the batch as their first axis.

    Attributes:
        kernel: the function with `triton.jit`.
        inputs: by parameter, in order; None is replaced by any array, which the kernel must not read.
        outputs: shape and type by parameter, in order; None becomes an array of one element per batch row, which the
            kernel must not write.
        scalars: parameters known at run time, by name.
        constants: parameters with `tl.constexpr`, by name.
        programs: number of programs per batch row; the batch varies slowest.
        warps: per program.
        stages: of the software pipeline.
        target: what it runs on.
    """

    kernel: Any
    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]
    scalars: Mapping[str, int | float]
    constants: Mapping[str, Any]
    programs: int
    warps: int
    stages: int
    target: Target

    @property
    def name(self) -> str:
        """Return the name of the kernel, in profiles and messages."""
        return str(self.kernel.__name__)


_recorders: list[Callable[[Launch], None]] = []


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Record the launches that are traced inside, with the shapes of their arrays; nothing is compiled or run.

    Under vmap the launch for one element is traced too, before the one for the batch. A function under jit that has
    been traced before is not traced again: `jax.clear_caches()`.
    """
    found: list[Launch] = []
    _recorders.append(found.append)
    try:
        yield found
    finally:
        _recorders.pop()


def launch(
    kernel: Any,
    *,
    inputs: Mapping[str, jax.Array | None],
    outputs: Mapping[str, jax.ShapeDtypeStruct | None],
    constants: Mapping[str, Any],
    programs: int,
    target: Target,
    scalars: Mapping[str, int | float] | None = None,
    warps: int = 4,
    stages: int = 1,
) -> Any:
    """Run a kernel and return a namespace of its outputs; see `Launch` for the arguments.

    A kernel finds its batch row as `tl.program_id(0) // programs`. So vmap only has to make the batch larger, and all
    programs lie on axis 0 of the grid. An index that is multiplied by the size of an array has to be int64.

    Raises:
        ValueError: there are more programs than CUDA launches.
        NotImplementedError: on lowering, the kernel needs more shared memory than the GPU has.
    """
    batch = next(x.shape[0] for x in inputs.values() if x is not None)
    blank = jax.ShapeDtypeStruct((batch, 1), jnp.float32)
    made = {name: blank if x is None else x for name, x in outputs.items()}
    if batch * programs > _MOST_PROGRAMS:
        raise ValueError(f"{kernel.__name__}: {batch * programs:,} programs, a launch takes at most {_MOST_PROGRAMS:,}")
    if batch * programs == 0:  # e.g. under a vmap over an empty axis; all results are empty
        return SimpleNamespace(**{name: jnp.zeros(x.shape, x.dtype) for name, x in made.items()})
    plan = Launch(kernel, inputs, made, scalars or {}, constants, programs, warps, stages, target)
    present = [name for name, x in inputs.items() if x is not None]
    results = _batched(plan, present)(*[inputs[name] for name in present])
    # Under shard_map the results vary over the mesh axes of the arguments, which a kernel does not declare.
    results = match_varying_axes((*(inputs[name] for name in present), list(results)))[-1]
    return SimpleNamespace(**dict(zip(made, results, strict=True)))


def _batched(plan: Launch, present: Sequence[str]) -> Callable[..., Sequence[jax.Array]]:
    """Return a function of the arrays that are present; under vmap it launches once, for a larger batch."""

    @jax.custom_batching.custom_vmap
    def run(*arrays: jax.Array) -> Sequence[jax.Array]:
        given = dict(zip(present, arrays, strict=True))
        return _run(plan._replace(inputs={name: given.get(name, arrays[0]) for name in plan.inputs}))

    @run.def_vmap
    def _(size: int, mapped: Sequence[bool], *arrays: jax.Array) -> tuple[Sequence[jax.Array], list[bool]]:
        def flat(x: jax.Array, is_mapped: bool) -> jax.Array:
            x = x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(size * x.shape[1], *x.shape[2:])

        larger = {
            name: jax.ShapeDtypeStruct((size * x.shape[0], *x.shape[1:]), x.dtype) for name, x in plan.outputs.items()
        }
        merged = [flat(*pair) for pair in zip(arrays, mapped, strict=True)]
        found = launch(
            plan.kernel,
            inputs=dict.fromkeys(plan.inputs) | dict(zip(present, merged, strict=True)),
            outputs=larger,
            **{name: getattr(plan, name) for name in ("constants", "programs", "target", "scalars", "warps", "stages")},
        )
        parts = [getattr(found, name).reshape(size, *x.shape) for name, x in plan.outputs.items()]
        return parts, [True] * len(parts)

    return run


def _run(plan: Launch) -> list[jax.Array]:
    if _recorders:
        shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in plan.inputs.items()}
        _recorders[-1](plan._replace(inputs=shapes))
        return [jnp.zeros(x.shape, x.dtype) for x in plan.outputs.values()]
    if plan.target.interpret:
        from triton_kernels.common.interpreter import interpret

        return list(interpret(plan))

    import jax_triton

    from triton_kernels.common.mend import mend

    mend()
    batch = next(iter(plan.inputs.values())).shape[0]
    found = jax_triton.triton_call(
        **plan.inputs,
        **plan.scalars,
        **plan.constants,
        kernel=plan.kernel,
        out_type=list(plan.outputs.values()),
        grid=(batch * plan.programs,),
        name=plan.name,
        num_warps=plan.warps,
        num_stages=plan.stages,
        compute_capability=plan.target.capability,
        backend_options={"ptx_version": PTX_VERSION, "enable_fp_fusion": True},
    )
    return list(found)
