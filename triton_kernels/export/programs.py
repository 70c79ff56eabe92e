"""Programs of calls, written by `jax.export` for a GPU that is not present."""

import functools
import importlib.metadata
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from pallas_kernels.aot.programs import public_function
from triton_kernels.common.target import Target
from triton_kernels.exported import ARRAYS, FORMAT, INDEX, Call, chunk_key

_CUSTOM_CALL = "triton_kernel_call_ffi"  # of jax-triton; JAX promises nothing of it from one version to the next
_VERSIONS = ("jax", "jaxlib", "jax-triton", "triton")
_TYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
_SIZES = (32, 64, 128, 256)


def serialized(
    call: Call, capability: int, function: Callable[..., Any] | None = None, platform: str = "cuda"
) -> bytes:
    """Return the program of a call.

    Args:
        call: to write.
        capability: compute capability times 10 of the GPU.
        function: the operator; default that of the kernels.
        platform: that the program is for; default "cuda".

    Raises:
        NotImplementedError: the kernels refuse the call.
    """
    if function is None:
        function = functools.partial(public_function("triton_kernels", call.operator), target=Target(capability))
    shapes = call.shapes()
    absent = dict.fromkeys(set(ARRAYS[call.operator]) - shapes.keys())

    def forward(arrays: dict[str, jax.Array]) -> Any:
        return function(**absent, **arrays, **dict(call.options))

    def gradient(arrays: dict[str, jax.Array], cotangents: Any) -> dict[str, jax.Array]:
        flags = {name: x for name, x in arrays.items() if x.dtype == bool}
        others = {name: x for name, x in arrays.items() if x.dtype != bool}
        _, pull_back = jax.vjp(lambda given: forward(given | flags), others)
        (found,) = pull_back(cotangents)
        return found

    checks = [export.DisabledSafetyCheck.custom_call(_CUSTOM_CALL)]
    chosen: Callable[..., Any] = gradient if call.gradient else forward
    arguments = (shapes, call.results()) if call.gradient else (shapes,)
    written = export.export(jax.jit(chosen), platforms=(platform,), disabled_checks=checks)(*arguments)
    return bytes(written.serialize())


def write(
    folder: Path,
    calls: Iterable[Call],
    capability: int,
    progress: Callable[[Call], None] = lambda _: None,
    make: Callable[[Call, int], bytes] = serialized,
) -> list[tuple[Call, str]]:
    """Write programs of calls and their index, and return the calls that are refused with the reason.

    Args:
        folder: to write to; made if it does not exist.
        calls: to write.
        capability: compute capability times 10 of the GPU.
        progress: called after each program.
        make: returns the program of a call.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries, refused = [], []
    for number, call in enumerate(dict.fromkeys(calls)):
        try:
            program = make(call, capability)
        except NotImplementedError as error:
            refused.append((call, str(error)))
            continue
        name = f"{number:04}-{call.operator}{'-gradient' if call.gradient else ''}.jaxexport"
        (folder / name).write_bytes(program)
        entries.append({"file": name, **call.as_data()})
        progress(call)
    index = {
        "format": FORMAT,
        "capability": capability,
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
        "chunk_sizes": _chunk_sizes({str(entry["operator"]) for entry in entries}),
        "programs": entries,
    }
    temporary = folder / f".{INDEX}"
    temporary.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    temporary.replace(folder / INDEX)
    return refused


def _chunk_sizes(operators: Iterable[str]) -> dict[str, dict[str, int]]:
    """Return the tokens of a chunk by operator, and by type and head dimensions."""
    found: dict[str, dict[str, int]] = {}
    for operator in sorted(operators):
        module = importlib.import_module(f"triton_kernels.{operator}")
        dims = [(k, v) for k in _SIZES for v in _SIZES] if operator == "delta_rule" else [(k,) for k in _SIZES]
        found[operator] = {
            chunk_key(dtype, *sizes): module.chunk_size(dtype, *sizes) for dtype in _TYPES for sizes in dims
        }
    return found
