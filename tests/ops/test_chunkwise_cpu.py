"""The chunkwise form for a CPU: blocks of heads, shared key heads, padding, resets, and its memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from osdn_jax import ops
from osdn_jax.ops import chunkwise_cpu
from support import jit

pytestmark = pytest.mark.usefixtures("float64")


def arguments(batch, length, key_heads, heads, size, decay, write_heads, seed=0):
    """Return random arguments of `delta_rule` in float64, with some strong decays."""
    draw = np.random.default_rng(seed)
    keys, values = (batch, length, key_heads, size), (batch, length, heads, size)
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (draw.normal(size=keys), draw.normal(size=keys)))
    given = {"q": q, "k": k, "v": draw.normal(size=values), "beta": draw.uniform(size=values[:3])}
    given["initial_state"] = draw.normal(size=(batch, heads, size, size))
    if decay:
        shape = values if decay == "channel" else values[:3]
        given["log_decay"] = -draw.exponential(size=shape) * np.where(draw.random(shape) < 0.1, 30.0, 0.2)
    if write_heads:
        given["write_key"] = 0.3 * draw.normal(size=(batch, length, write_heads, size))
    return {name: jnp.asarray(x) for name, x in given.items()}


@pytest.mark.parametrize(
    ("heads", "decay", "erase", "write_heads", "packed"),
    [
        (2, None, True, 0, True),
        (4, "scalar", True, 2, False),
        (4, "channel", True, 4, True),
        (4, "scalar", False, 0, True),
    ],
)
def test_blocks_agree_with_the_scan(monkeypatch, heads, decay, erase, write_heads, packed):
    """Two rows, split into blocks of one row, and its heads into blocks of one key head: values and gradients."""
    given = arguments(2, 37, 2, heads, 8, decay, write_heads)
    ids = jnp.asarray(np.cumsum(np.random.default_rng(1).random((2, 37)) < 0.1, axis=1)) if packed else None

    def run(implementation):
        def function(given):
            return ops.delta_rule(**given, erase=erase, segment_ids=ids, implementation=implementation, chunk_size=8)

        out, pull = jax.vjp(function, given)
        return out, pull(jax.tree.map(jnp.cos, out))

    whole, by_scan = run("chunk"), run("scan")
    monkeypatch.setattr(chunkwise_cpu, "_BLOCK_ELEMENTS", 1)
    jax.clear_caches()
    split = run("chunk")
    jax.clear_caches()
    for other in (whole, split):
        for x, y in zip(jax.tree.leaves(other), jax.tree.leaves(by_scan), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("batch", "key_heads", "heads", "elements", "blocks"),
    [
        (8, 2, 2, 2**12, (8, 1)),  # everything fits
        (16, 8, 8, 2**12, (2, 1)),
        (7, 8, 8, 2**12, (1, 1)),  # two rows do not divide the batch
        (3, 4, 64, 2**12, (1, 4)),  # the heads of a row do not fit; a key head stays with its value heads
        (1, 1, 3, 2**20, (1, 1)),
    ],
)
def test_split(batch, key_heads, heads, elements, blocks):
    assert chunkwise_cpu._split(batch, key_heads, heads, elements) == blocks


def test_a_gradient_holds_no_copy_of_its_arguments():
    """Its temporary arrays are the states and those of one chunk, however long the batch."""

    def gradient(q, k, v, beta):
        out, pull = jax.vjp(functools.partial(ops.delta_rule, implementation="chunk"), q, k, v, beta)
        return pull(out)

    batch, length, heads, size = 16, 512, 4, 64
    keys = jax.ShapeDtypeStruct((batch, length, heads, size), jnp.float32)
    gates = jax.ShapeDtypeStruct((batch, length, heads), jnp.float32)
    used = jit(gradient).lower(keys, keys, keys, gates).compile().memory_analysis().temp_size_in_bytes
    states = batch * heads * length // 32 * size * size * 4
    outputs = batch * length * heads * size * 4
    assert used < states + outputs + 12 * 2**20
