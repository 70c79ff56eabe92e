"""The kernels of the Gram preconditioner, interpreted, against the scan: values and every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from osdn_jax import ops
from osdn_jax.ops import mosaic_gpu, selection
from pallas_kernels import gram as kernels
from support import assert_close, random_like, value_and_gradient
from support.cases import RESETS, gram, strong_decay
from support.interpreter import assert_no_races

KERNEL = "mosaic_gpu_interpret"


def kernel_case(name, *, heads=1, key_dim=64, **more):
    return gram(name, batch=1, heads=heads, key_dim=key_dim, chunk_size=None, **more)


CASES = [
    kernel_case("nothing", length=0),
    kernel_case("one token", length=1, packed=True),
    kernel_case("two heads, packed", length=200, heads=2, packed=True),
    kernel_case("from nothing", length=63, initial=False, center=-0.2, squash=2.5),
    kernel_case("decays of 0 and -20", length=65, packed=True, change=strong_decay),
    kernel_case("K 128", length=64, key_dim=128),
    *(kernel_case(kind, length=130, change=change) for kind, change in RESETS.items()),
]


def inputs(case, dtype):
    return {name: jnp.asarray(x, dtype if name == "k" else jnp.float32) for name, x in case.arrays.items()}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_and_gradients_equal_the_scans(case, dtype):
    x = inputs(case, dtype)
    cotangents = random_like(jax.eval_shape(case.run("scan"), x), seed=1)
    with assert_no_races():
        got = value_and_gradient(case.run(KERNEL))(x, cotangents)
    want = jax.jit(value_and_gradient(case.run("scan")))(x, cotangents)
    # The gradient of k has the type of k; that of the center is a sum of terms of both signs over all tokens.
    k, center = got[1].pop("k"), got[1].pop("center", 0.0)
    assert k.dtype == dtype
    assert_close(k.astype(jnp.float32), want[1].pop("k").astype(jnp.float32), 1e-2 if dtype == jnp.bfloat16 else 1e-4)
    assert_close(center, want[1].pop("center", 0.0), 1e-3)
    assert_close(got, want, 1e-4)


def test_write_keys_at_once():
    """Write keys from the kernel equal multipliers times keys: values, gradients and the final state."""
    case = kernel_case("write keys", length=70, heads=2)
    x = inputs(case, jnp.bfloat16)

    def run(x, return_write_key):
        center, resets = x["center"], jnp.zeros((1, 70), bool).at[0, 40].set(True)
        arguments = (x["k"], x["log_decay"], x["gain"], center, 1.5, x["initial"], resets)
        out, final = kernels.gram(*arguments, return_write_key=return_write_key, interpret=True)
        return {
            "w": out if return_write_key else (out * x["k"].astype(jnp.float32)).astype(jnp.bfloat16),
            "final": final,
        }

    cotangents = random_like(jax.eval_shape(lambda x: run(x, True), x), seed=1)
    one, two = (value_and_gradient(lambda x, m=m: run(x, m))(x, cotangents) for m in (True, False))
    assert_close(jax.tree.map(lambda a: a.astype(jnp.float32), one), jax.tree.map(np.float32, two), 5e-3)


@pytest.mark.parametrize("empty", [0, 1, 2], ids=["batch", "tokens", "heads"])
def test_nothing(empty):
    """Empty inputs give empty values and gradients of the right shapes."""
    shape = [2, 3, 1]
    shape[empty] = 0
    k, rows, state = jnp.zeros((*shape, 64)), jnp.zeros(shape), jnp.ones((shape[0], shape[2], 64))

    def run(k, log_decay, gain, center, initial):
        return kernels.gram(k, log_decay, gain, center, 1.5, initial, jnp.zeros(shape[:2], bool), interpret=True)

    arguments = (k, rows, rows, jnp.zeros(shape[2:]), state)
    (out, final), pull = jax.vjp(run, *arguments)
    assert (out.shape, out.dtype) == (k.shape, jnp.float32)
    np.testing.assert_array_equal(final, state)
    *zeros, d_state = pull((out, final))
    assert [x.shape for x in zeros] == [x.shape for x in arguments[:-1]]
    assert not any(np.any(x) for x in zeros)
    np.testing.assert_array_equal(d_state, final)


def test_unsupported_arguments(monkeypatch):
    k, rows = jnp.full((1, 8, 1, 96), 0.1), jnp.zeros((1, 8, 1))
    with pytest.raises(NotImplementedError, match=f"implementation '{KERNEL}': k: got 96 channels"):
        ops.gram_preconditioner(k, rows, rows + 1, center=0.0, implementation=KERNEL)
    with pytest.raises(NotImplementedError, match="chunk_size: got 16"):
        ops.gram_preconditioner(k, rows, rows + 1, center=0.0, chunk_size=16, implementation=KERNEL)
    with pytest.raises(NotImplementedError, match="'mosaic_gpu': got a cpu"):
        ops.gram_preconditioner(k[..., :64], rows, rows + 1, center=0.0, implementation="mosaic_gpu")
    want = ops.gram_preconditioner(k, rows, rows + 1, center=0.0, implementation="scan")
    monkeypatch.setattr(mosaic_gpu, "on_hopper", lambda: True)
    monkeypatch.setattr(selection, "MOSAIC_GPU_MEASURED", True)
    assert_close(ops.gram_preconditioner(k, rows, rows + 1, center=0.0), want, 1e-6)
