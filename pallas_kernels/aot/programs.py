"""The function that a case stands for, and the shapes of its arguments."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.aot.cases import Case

BATCH, LENGTH, HEADS = 2, 1024, 4


def program(case: Case) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """(a function, its arguments as shapes and types).

    A forward program returns the results of the public function; a gradient takes their cotangents and returns the
    gradient in every array, without the forward results: with them, what only the forward pass needs would be compiled
    a second time.
    """
    arrays, results, call = _PROGRAMS[case.function](case)
    if not case.gradient:
        return call, (arrays,)
    variables = {name: x for name, x in arrays.items() if x.dtype != bool}
    rest = {name: x for name, x in arrays.items() if x.dtype == bool}

    def gradient(variables: dict[str, jax.Array], rest: dict[str, jax.Array], cotangents: Any) -> Any:
        return jax.vjp(lambda given: call(given | rest), variables)[1](cotangents)

    return gradient, (variables, rest, results)


def _array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _delta_rule(case: Case) -> tuple[dict[str, Any], Any, Callable[..., Any]]:
    from pallas_kernels.delta_rule import delta_rule

    key_dim, value_dim, dtype = case.key_dim, case.value_dim or case.key_dim, jnp.dtype(case.dtype)
    keys = _array(BATCH, LENGTH, HEADS // 2 if "grouped" in case.options else HEADS, key_dim, dtype=dtype)
    values = _array(BATCH, LENGTH, HEADS, value_dim, dtype=dtype)
    memory = _array(BATCH, HEADS, key_dim, value_dim)
    arrays = {"q": keys, "k": keys, "v": values, "beta": _array(BATCH, LENGTH, HEADS), "initial_state": memory}
    if case.decay == "scalar":
        arrays["log_decay"] = _array(BATCH, LENGTH, HEADS)
    elif case.decay == "channel":
        arrays["log_decay"] = _array(BATCH, LENGTH, HEADS, key_dim)
    if "write-key" in case.options:
        arrays["write_key"] = _array(BATCH, LENGTH, HEADS, key_dim, dtype=dtype)
    if "documents" in case.options:
        arrays["restarts"] = _array(BATCH, LENGTH, dtype=bool)
    options = {"erase": "no-erase" not in case.options, "scale": key_dim**-0.5}
    return arrays, (values, memory), lambda given: delta_rule(**given, **options)


def _hypergradient(case: Case) -> tuple[dict[str, Any], Any, Callable[..., Any]]:
    from pallas_kernels.hypergradient import hypergradient

    dtype, multiply = jnp.dtype(case.dtype), "multiply" in case.options
    keys, tokens = (BATCH, LENGTH, HEADS, case.key_dim), _array(BATCH, LENGTH, HEADS)
    state = _array(BATCH, HEADS, case.key_dim)
    arrays = {"k": _array(*keys, dtype=dtype), "step": tokens, "beta": tokens}
    arrays |= {"initial": state, "restart_state": state}
    if "forget" in case.options:
        arrays |= {"log_forget": tokens, "anchor": state}
    if "documents" in case.options:
        arrays["restart"] = _array(BATCH, LENGTH, dtype=bool)
    absent = dict.fromkeys(("log_forget", "restart", "anchor"))
    options: dict[str, Any] = {"bounds": (0.0, 2.0) if "bounds" in case.options else None, "multiply": multiply}
    out = _array(*keys, dtype=dtype if multiply else jnp.float32)
    return arrays, (out, state), lambda given: hypergradient(**(absent | given), **options)


def _gram(case: Case) -> tuple[dict[str, Any], Any, Callable[..., Any]]:
    from pallas_kernels.gram import gram

    dtype, multiply = jnp.dtype(case.dtype), "multiply" in case.options
    keys, tokens = (BATCH, LENGTH, HEADS, case.key_dim), _array(BATCH, LENGTH, HEADS)
    state = _array(BATCH, HEADS, case.key_dim)
    arrays = {"k": _array(*keys, dtype=dtype), "log_decay": tokens, "gain": tokens, "center": _array(HEADS)}
    arrays["initial"] = state
    if "documents" in case.options:
        arrays["restarts"] = _array(BATCH, LENGTH, dtype=bool)
    out = _array(*keys, dtype=dtype if multiply else jnp.float32)
    return arrays, (out, state), lambda given: gram(**({"restarts": None} | given), squash=1.5, multiply=multiply)


_PROGRAMS: dict[str, Callable[[Case], tuple[dict[str, Any], Any, Callable[..., Any]]]] = {
    "delta_rule": _delta_rule,
    "hypergradient": _hypergradient,
    "gram": _gram,
}
