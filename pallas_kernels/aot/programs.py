"""The function that a case compiles, and the shapes of its arguments."""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from pallas_kernels.aot.cases import Case


def program(case: Case, function: Callable[..., Any] | None = None) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return the function to compile and its arguments as shapes and types.

    A forward program returns the results of the public function. A gradient program takes their cotangents and returns
    the gradient in every array, but not the forward results: with them, the kernels that only the forward pass needs
    would be compiled a second time.

    Args:
        case: what to compile.
        function: the public function; default that of this package.
    """
    function = function or public_function("pallas_kernels", case.function)
    arrays, results, call = _PROGRAMS[case.function](case, function)
    if case.mapped:
        mapped = lambda x: jax.ShapeDtypeStruct((case.mapped, *x.shape), x.dtype)
        (arrays, results), call = jax.tree.map(mapped, (arrays, results)), jax.vmap(call)
    if not case.gradient:
        return call, (arrays,)
    variables = {name: x for name, x in arrays.items() if x.dtype != bool}
    constants = {name: x for name, x in arrays.items() if x.dtype == bool}

    def gradient(variables: dict[str, jax.Array], constants: dict[str, jax.Array], cotangents: Any) -> Any:
        return jax.vjp(lambda given: call(given | constants), variables)[1](cotangents)

    return gradient, (variables, constants, results)


def public_function(package: str, name: str) -> Callable[..., Any]:
    """Return an operator of a package of kernels, which imports the kernels."""
    return getattr(importlib.import_module(f"{package}.{name}"), name)


def splits(case: Case, arguments: Any, axis: str) -> Any:
    """Return a PartitionSpec for each argument of a program: its split over the GPUs of a mesh axis."""

    def split(path: tuple[Any, ...], x: Any) -> P:
        name = getattr(path[-1], "key", None) or ("out", "state")[path[-1].idx]
        if case.sharded == "batch":
            return P() if name == "center" else P(axis)
        heads = {"center": 0, "resets": None, **dict.fromkeys(_STATES, 1)}.get(name, 2)
        return P() if heads is None else P(*[None] * heads, axis)

    return jax.tree.map_with_path(split, arguments)


_STATES = ("state", "initial_state", "initial", "after_reset", "anchor")


def _array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _delta_rule(case: Case, function: Callable[..., Any]) -> tuple[dict[str, Any], Any, Callable[..., Any]]:
    key_dim, value_dim, dtype = case.key_dim, case.value_dim or case.key_dim, jnp.dtype(case.dtype)
    keys = _array(
        case.batch, case.length, case.heads // 2 if "grouped" in case.options else case.heads, key_dim, dtype=dtype
    )
    values = _array(case.batch, case.length, case.heads, value_dim, dtype=dtype)
    state = _array(case.batch, case.heads, key_dim, value_dim)
    arrays = {
        "q": keys,
        "k": keys,
        "v": values,
        "beta": _array(case.batch, case.length, case.heads),
        "initial_state": state,
    }
    if case.decay == "scalar":
        arrays["log_decay"] = _array(case.batch, case.length, case.heads)
    elif case.decay == "channel":
        arrays["log_decay"] = _array(case.batch, case.length, case.heads, key_dim)
    if "write-key" in case.options:
        arrays["write_key"] = _array(case.batch, case.length, case.heads, key_dim, dtype=dtype)
    if "documents" in case.options:
        arrays["resets"] = _array(case.batch, case.length, dtype=bool)
    options = {"erase": "no-erase" not in case.options, "scale": key_dim**-0.5}
    return arrays, (values, state), lambda given: function(**given, **options)


def _hypergradient(case: Case, function: Callable[..., Any]) -> tuple[dict[str, Any], Any, Callable[..., Any]]:
    dtype, return_write_key = jnp.dtype(case.dtype), "multiply" in case.options
    keys, tokens = (case.batch, case.length, case.heads, case.key_dim), _array(case.batch, case.length, case.heads)
    state = _array(case.batch, case.heads, case.key_dim)
    arrays = {"k": _array(*keys, dtype=dtype), "step": tokens, "beta": tokens}
    arrays |= {"initial": state, "after_reset": state}
    if "forget" in case.options:
        arrays |= {"log_forget": tokens, "anchor": state}
    if "documents" in case.options:
        arrays["resets"] = _array(case.batch, case.length, dtype=bool)
    absent = dict.fromkeys(("log_forget", "resets", "anchor"))
    bounds = (0.0, 2.0) if "bounds" in case.options else None
    options: dict[str, Any] = {"bounds": bounds, "return_write_key": return_write_key}
    out = _array(*keys, dtype=dtype if return_write_key else jnp.float32)
    return arrays, (out, state), lambda given: function(**(absent | given), **options)


def _gram(case: Case, function: Callable[..., Any]) -> tuple[dict[str, Any], Any, Callable[..., Any]]:
    dtype, return_write_key = jnp.dtype(case.dtype), "multiply" in case.options
    keys, tokens = (case.batch, case.length, case.heads, case.key_dim), _array(case.batch, case.length, case.heads)
    state = _array(case.batch, case.heads, case.key_dim)
    arrays = {"k": _array(*keys, dtype=dtype), "log_decay": tokens, "gain": tokens, "center": _array(case.heads)}
    arrays["initial"] = state
    if "documents" in case.options:
        arrays["resets"] = _array(case.batch, case.length, dtype=bool)
    out = _array(*keys, dtype=dtype if return_write_key else jnp.float32)
    options: dict[str, Any] = {"squash": 1.5, "return_write_key": return_write_key}
    return arrays, (out, state), lambda given: function(**({"resets": None} | given), **options)


_PROGRAMS: dict[str, Callable[[Case, Callable[..., Any]], tuple[dict[str, Any], Any, Callable[..., Any]]]] = {
    "delta_rule": _delta_rule,
    "hypergradient": _hypergradient,
    "gram": _gram,
}
