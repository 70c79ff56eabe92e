"""Run kernels in Triton's interpreter through a callback, so that they work inside any JAX program on any machine."""

import threading
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from triton_kernels.common import interpreter_repair, interpreter_watch
from triton_kernels.common.launch import Launch

_TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int32": "i32"}
_LOCK = threading.Lock()  # the interpreter keeps the index of the program in a global


class _Pointer:
    """A NumPy array in the form in which the interpreter takes tensors, without copies."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.dtype = _TYPES[array.dtype.name]

    def data_ptr(self) -> int:
        return int(self.array.ctypes.data)

    def _same(self, *_: Any, **__: Any) -> "_Pointer":
        return self

    def _nothing(self, *_: Any, **__: Any) -> None:
        return None

    # The interpreter copies storages to the host and back. Ours are on the host.
    untyped_storage = cpu = new_empty = _same
    storage_offset = size = stride = set_ = copy_ = _nothing


def interpret(plan: Launch) -> Sequence[jax.Array]:
    """Return the outputs of a launch, whose inputs are arrays."""
    interpreter_repair.repair()

    def call(*arrays: Any) -> list[np.ndarray]:
        return run(plan, [np.ascontiguousarray(x) for x in arrays])

    shapes = list(plan.outputs.values())
    return list(jax.pure_callback(call, shapes, *plan.inputs.values(), vmap_method="sequential"))


def run(plan: Launch, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Run a launch on NumPy arrays and return its outputs, NaN where the kernel wrote nothing.

    Raises:
        RuntimeError: two programs touch an element that one of them writes, if `interpreter_watch` is on.
        IndexError: a program touches memory outside of the arrays, if it is on.
    """
    results = [np.full(x.shape, np.nan if x.dtype != np.int32 else -1, x.dtype) for x in plan.outputs.values()]
    pointers = dict(zip((*plan.inputs, *plan.outputs), map(_Pointer, (*arrays, *results)), strict=True))
    programs = results[0].shape[0] * plan.programs
    from triton.runtime.errors import InterpreterError

    with _LOCK, np.errstate(all="ignore"), interpreter_watch.watching(plan.name, [*arrays, *results]):
        try:
            plan.kernel[(programs,)](**pointers, **plan.scalars, **plan.constants)
        except InterpreterError as error:
            cause: BaseException | None = error
            while isinstance(cause, InterpreterError):  # one for every function that the kernel was in
                cause = cause.__cause__
            raise cause or error from None
    return results
