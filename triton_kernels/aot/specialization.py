"""A kernel with the types and constants that it is compiled for, as jax-triton specialises it."""

import importlib
from typing import Any, NamedTuple

import numpy as np

from triton_kernels.common.launch import PTX_VERSION, Launch

_ALIGNED = (("tt.divisibility", 16),)  # every array of XLA begins at a multiple of 16 bytes or more
_TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int32": "i32", "bool": "i1"}


class Specialization(NamedTuple):
    """Everything that the code of a kernel depends on; can be pickled and hashed.

    Attributes:
        module: that has the kernel.
        kernel: its name there.
        signature: type by parameter, in order: "*bf16" for an array, "i32" for a scalar, "constexpr" for a constant.
        constants: value by parameter.
        warps: per program.
        stages: of the software pipeline.
    """

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    warps: int
    stages: int

    @property
    def label(self) -> str:
        """Return the kernel with what it is compiled for, such as `solve bf16 fp32 K=64 ERASE, 4 warps, 1 stage`."""
        types = dict.fromkeys(kind[1:] for _, kind in self.signature if kind.startswith("*"))
        values = [name if value is True else f"{name}={value}" for name, value in self.constants if _is_told(value)]
        stages = f"{self.stages} stage{'s' if self.stages > 1 else ''}"
        return f"{' '.join([self.kernel, *types, *values])}, {self.warps} warps, {stages}"

    def source(self) -> Any:
        """Return the source that Triton compiles."""
        from triton.compiler import ASTSource

        kernel = getattr(importlib.import_module(self.module), self.kernel)
        kinds = [kind for _, kind in self.signature]
        attributes = {(i,): [list(x) for x in _ALIGNED] for i, kind in enumerate(kinds) if kind.startswith("*")}
        return ASTSource(kernel, dict(self.signature), dict(self.constants), attributes)

    def options(self) -> dict[str, Any]:
        """Return the options that Triton compiles with."""
        return {
            "num_warps": self.warps,
            "num_stages": self.stages,
            "num_ctas": 1,
            "ptx_version": PTX_VERSION,
            "enable_fp_fusion": True,
            "debug": False,
        }


def specialize(launch: Launch) -> Specialization:
    """Return the specialization that a launch runs.

    Arrays are divisible by 16, integers are not even if they are, and scalars that equal 1 are constants:
    `KernelSpecialization.build` of jax-triton 0.4.1.

    Args:
        launch: with the shapes of its arrays.
    """
    arrays = {**launch.inputs, **launch.outputs}
    constants = dict(launch.constants)
    signature = {}
    for parameter in launch.kernel.params:
        name = parameter.name
        if parameter.is_constexpr:
            signature[name] = "constexpr"
            if name not in constants:
                constants[name] = parameter.default
        elif name in arrays:
            signature[name] = f"*{_TYPES[arrays[name].dtype.name]}"
        elif launch.scalars[name] == 1:
            constants[name], signature[name] = 1, "constexpr"
        else:
            signature[name] = _scalar_type(launch.scalars[name])
    constants = {name: constants[name] for name in signature if name in constants}
    kernel = launch.kernel.fn
    pairs = tuple(signature.items()), tuple(constants.items())
    return Specialization(kernel.__module__, kernel.__name__, *pairs, launch.warps, launch.stages)


def _scalar_type(value: float) -> str:
    if isinstance(value, int | np.integer):
        return "i32"  # JAX refuses larger ones
    return "fp32"


def _is_told(value: Any) -> bool:
    return value is not None and value is not False
