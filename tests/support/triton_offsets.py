"""Addresses that kernels compute for arrays larger than any memory: programs run on arrays that are not there."""

from contextlib import contextmanager
from unittest import mock

import numpy as np
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from triton_kernels.common.interpreter_repair import repair

_TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int32": "i32"}
_FAR = 1 << 44  # bytes between arrays
_LONG = 8  # iterations; of longer loops the first and the last are run


class _Absent:
    """An array without memory."""

    def __init__(self, address, dtype):
        self.address, self.dtype = address, _TYPES[dtype.name]

    def data_ptr(self):
        return self.address

    def _same(self, *_, **__):
        return self

    untyped_storage = cpu = new_empty = _same
    storage_offset = size = stride = set_ = copy_ = lambda self, *_, **__: None


def check_offsets(launch, programs):
    """Raise IndexError where a program of a launch touches memory outside of its arrays, however large they are.

    Loads give zeros. launch: as `recorded` finds it. programs: their numbers along axis 0.
    """
    repair()
    arrays = {**launch.inputs, **launch.outputs}
    starts = {name: _FAR * (i + 1) for i, name in enumerate(arrays)}
    sizes = {name: int(np.prod(x.shape, dtype=object)) * x.dtype.itemsize for name, x in arrays.items()}
    assert max(sizes.values()) < _FAR // 2
    spans = [(start, start + sizes[name], name) for name, start in starts.items()]
    pointers = {name: _Absent(start, np.dtype(arrays[name].dtype)) for name, start in starts.items()}
    for program in programs:
        with _without_memory(program, spans):
            try:
                launch.kernel[(1,)](**pointers, **launch.scalars, **launch.constants)
            except InterpreterError as error:
                raise IndexError(f"{launch.name}, program {program}: {error}") from error


@contextmanager
def _without_memory(program, spans):
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

    def check(pointers, mask):
        addresses, active = np.broadcast_arrays(pointers.data, mask.data)
        found = addresses[active].astype(np.uint64)
        if found.size and not any(start <= found.min() and found.max() < end for start, end, _ in spans):
            low, high = int(found.min()), int(found.max())
            near = min(spans, key=lambda span: abs(span[0] - low))
            raise IndexError(f"{near[2]}: bytes {low - near[0]} to {high - near[0]} of {near[1] - near[0]}")

    def load(self, pointers, mask, *_, **__):
        check(pointers, mask)
        kind = pointers.get_element_ty()
        return handle(np.zeros(pointers.data.shape, interpreter._get_np_dtype(kind)), kind)

    def store(self, pointers, value, mask, *_):
        check(pointers, mask)

    def program_id(self, axis):
        return handle(np.array([program if axis == 0 else 0], np.int32), interpreter.tl.int32)

    def ends(*arguments):
        steps = range(*map(int, arguments))
        return steps if len(steps) <= _LONG else (steps[0], steps[-1])

    patched = {"create_masked_load": load, "create_masked_store": store, "create_get_program_id": program_id}
    with mock.patch.multiple(builder, **patched), mock.patch.object(interpreter, "range", ends, create=True):
        yield
