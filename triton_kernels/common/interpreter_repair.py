"""Make Triton's interpreter compute as a GPU does.

As it comes (3.9), it multiplies bfloat16 matrices by their bit patterns, rounds float32 to bfloat16 by truncation and
ignores the precision that a product asks for. `repair` keeps bfloat16 as the type of ml_dtypes, and imitates the
products of tensor cores: tf32, and sums of products of parts (tf32x3, bf16x3, bf16x6).

It also spends half of its time on replacing the functions of `triton.language` again at every call of one kernel
function by another; `repair` has them replaced once per launch.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@functools.cache
def repair() -> None:
    """Repair the interpreter of this process, once."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    numpy_type = interpreter._get_np_dtype
    load, store = builder.create_masked_load, builder.create_masked_store
    handle = interpreter.TensorHandle
    parts = _parts_of(interpreter)

    def numpy_type_of(dtype: Any) -> np.dtype:
        if not isinstance(dtype, tl.pointer_type) and dtype.scalar == tl.bfloat16:
            return _BFLOAT16
        return numpy_type(dtype)

    def cast(self: Any, source: Any, target: Any) -> Any:
        return handle(source.data.astype(numpy_type_of(target)), target.scalar)

    def masked_load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any, **options: Any) -> Any:
        if pointers.get_element_ty() != tl.bfloat16:
            return load(self, pointers, mask, other, *rest, **options)
        filling = np.zeros(pointers.data.shape, np.uint16)
        if other is not None:
            filling[...] = other.data.astype(_BFLOAT16).view(np.uint16)
        bits = interpreter._interpreter.load(pointers.data, mask.data, filling, np.dtype(np.uint16))
        return handle(bits.view(_BFLOAT16), tl.bfloat16)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        if value.dtype.scalar == tl.bfloat16:
            value = handle(value.data.view(np.uint16), tl.uint16)
        return store(self, pointers, value, mask, *rest)

    def dot(self: Any, a: Any, b: Any, c: Any, precision: Any, *_: Any) -> Any:
        x, y = (np.ascontiguousarray(side.data, c.data.dtype) for side in (a, b))
        split = parts.get(precision) if a.dtype.scalar == tl.float32 else None
        product = x @ y if split is None else _sum_of_products(split(x), split(y))
        return handle(product + c.data, c.dtype.scalar)

    def bfloat16_constant(self: Any, value: float) -> Any:  # Triton 3.7 has none
        return handle(np.array([value], _BFLOAT16), tl.bfloat16)

    interpreter._get_np_dtype = numpy_type_of
    builder.get_bf16 = bfloat16_constant
    builder.cast_impl, builder.create_dot = cast, dot
    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
    allowed = ("tf32", "tf32x3", "ieee", "bf16x3", "bf16x6")
    options = dataclasses.replace(interpreter.interpreter_builder.options, allowed_dot_input_precisions=allowed)
    interpreter.interpreter_builder.options = options
    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = _once_per_launch(interpreter._patch_lang, interpreter._LangPatchScope)


def _once_per_launch(patch: Callable[[Any], Any], scope_type: type) -> Callable[[Any], Any]:
    """Return `patch`, which replaces the functions of the modules that a function sees, without repetition in a launch.

    Args:
        patch: called for the kernel, and again for every function that it calls; returns what it has replaced.
        scope_type: of that; its method `restore` ends a launch, and is not called for functions that a kernel calls.
    """
    import triton.language as tl

    replaced: set[int] = set()

    @functools.cache
    def seen_by(fn: Any) -> frozenset[int]:
        modules = [x for x in fn.__globals__.values() if inspect.ismodule(x)]
        return frozenset(id(x) for x in modules if x in (tl, tl.core))

    def patch_once(fn: Any) -> Any:
        if seen_by(fn) and seen_by(fn) <= replaced:
            return scope_type()
        scope = patch(fn)
        replaced.update(seen_by(fn))
        restore = scope.restore

        def restore_all() -> None:
            restore()
            replaced.clear()

        scope.restore = restore_all
        return scope

    return patch_once


def _parts_of(interpreter: Any) -> dict[Any, Callable[[np.ndarray], list[np.ndarray]]]:
    """Return, by the precision of a product, the function that splits an operand as the GPU does."""
    precision = interpreter._ir.INPUT_PRECISION

    def round_to_tf32(x: np.ndarray) -> np.ndarray:  # to the nearest even; Triton 3.7 has no function for it
        bits = x.view(np.uint32)
        rounded = (bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000)
        return np.where(np.isfinite(x), rounded.view(np.float32), x)

    def truncate_to_tf32(x: np.ndarray) -> np.ndarray:  # the tensor core ignores the low bits
        return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)

    def round_to_bfloat16(x: np.ndarray) -> np.ndarray:
        return x.astype(_BFLOAT16).astype(np.float32)

    def splitting(rounded: Callable[[np.ndarray], np.ndarray], count: int) -> Callable[[np.ndarray], list[np.ndarray]]:
        def split(x: np.ndarray) -> list[np.ndarray]:
            found: list[np.ndarray] = []
            for _ in range(count):
                found.append(rounded(x))
                x = x - found[-1]
            return found

        return split

    return {
        precision.TF32: splitting(truncate_to_tf32, 1),
        precision.TF32x3: splitting(round_to_tf32, 2),
        precision.BF16x3: splitting(round_to_bfloat16, 2),
        precision.BF16x6: splitting(round_to_bfloat16, 3),
    }


def _sum_of_products(left: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> np.ndarray:
    """Return the sum of the products of parts, without those that are below the rounding of the last part."""
    count = len(left)
    total = left[0] @ right[0]
    for i in range(count):
        for j in range(count - i):
            if i or j:
                total = total + left[i] @ right[j]
    return total
