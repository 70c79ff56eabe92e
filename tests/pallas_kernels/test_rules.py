"""Named rules with the kernels of the preconditioner and of the delta rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from osdn_jax import ops
from osdn_jax.ops import gram_recurrence, hypergradient_recurrence, mosaic_gpu, selection
from support import assert_close, random_like, value_and_gradient
from support.interpreter import assert_no_races

KERNEL = "mosaic_gpu_interpret"
LENGTH, SIZE = 70, 64


def inputs(rule):
    rng = np.random.default_rng(0)
    lead = (1, LENGTH, 1)
    k = rng.normal(size=(*lead, SIZE))
    x = {"q": rng.normal(size=(*lead, SIZE)), "k": k / np.linalg.norm(k, axis=-1, keepdims=True)}
    x["v"] = rng.normal(size=(*lead, SIZE))
    x = {name: jnp.asarray(value, jnp.bfloat16) for name, value in x.items()}
    x["beta"] = jnp.asarray(rng.uniform(size=lead), jnp.float32)
    if rule in ("os_gdn", "pgdn"):
        x["log_decay"] = jnp.asarray(-rng.uniform(0, 0.3, size=lead), jnp.float32)
    if rule == "pgdn":
        x["gram_log_decay"] = jnp.asarray(-rng.uniform(0, 0.3, size=lead), jnp.float32)
        x["gram_gain"] = jnp.asarray(rng.uniform(size=lead), jnp.float32)
    else:
        x["log_forget"] = jnp.asarray(-rng.uniform(0, 0.1, size=lead), jnp.float32)
    return x


def program(rule, implementation, packed=True):
    options = {} if rule == "pgdn" else {"eta": 0.5, "bounds": (0.9, 1.1), "initial": 1.0, "anchor": 1.0}
    ids = jnp.asarray(np.arange(LENGTH)[None] >= 40, jnp.int32) if packed else None

    def run(x):
        o, state = getattr(ops, rule)(**x, **options, segment_ids=ids, implementation=implementation)
        return {"o": o, "state": state.recurrent, "preconditioner": state.preconditioner}

    return run


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["osdn", "os_gdn", "pgdn"])
def test_rules_by_kernels(rule):
    x = inputs(rule)
    scan = program(rule, "scan")
    cotangents = random_like(jax.eval_shape(scan, x), seed=1)
    with assert_no_races():
        got = value_and_gradient(program(rule, KERNEL))(x, cotangents)
    assert_close(got, jax.jit(value_and_gradient(scan))(x, cotangents), 2e-2)


@pytest.mark.parametrize("rule", ["osdn", "os_gdn", "pgdn"])
def test_write_keys_come_from_the_kernels(rule, monkeypatch):
    def refuse(*_):
        raise AssertionError("a multiplier has left the kernels")

    jax.clear_caches()  # a call that was traced before would not be traced again
    for module in (gram_recurrence, hypergradient_recurrence):
        monkeypatch.setattr(module, "scaled", refuse)
    jax.eval_shape(program(rule, KERNEL, packed=False), inputs(rule))
    with pytest.raises(AssertionError, match="has left the kernels"):
        jax.eval_shape(program(rule, "scan", packed=False), inputs(rule))


def keys(size, dtype):
    return jnp.full((1, 8, 1, size), 0.1, dtype)


def test_unsupported_arguments_of_a_preconditioner(monkeypatch):
    for k, options, message in (
        (keys(96, jnp.bfloat16), {}, "k: got 96 channels"),
        (keys(64, jnp.bfloat16), {"chunk_size": 16}, "chunk_size: got 16"),
    ):
        with pytest.raises(NotImplementedError, match=f"implementation '{KERNEL}': {message}"):
            ops.hypergradient_preconditioner(k, eta=0.1, implementation=KERNEL, **options)
        want = ops.hypergradient_preconditioner(k, eta=0.1, implementation="scan", **options)
        monkeypatch.setattr(mosaic_gpu, "on_hopper", lambda: True)
        monkeypatch.setattr(selection, "MOSAIC_GPU_MEASURED", True)
        assert_close(ops.hypergradient_preconditioner(k, eta=0.1, **options), want, 1e-6)
        monkeypatch.undo()
    with pytest.raises(NotImplementedError, match="'mosaic_gpu': got a cpu"):
        ops.hypergradient_preconditioner(keys(64, jnp.bfloat16), eta=0.1, implementation="mosaic_gpu")
