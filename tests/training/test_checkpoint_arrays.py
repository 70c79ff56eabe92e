"""Checksums of the arrays of a checkpoint."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from osdn_jax.training import checkpoint_arrays
from osdn_jax.training.checkpoint_arrays import checksums


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_host_and_device_compute_the_same(dtype, monkeypatch):
    monkeypatch.setattr(checkpoint_arrays, "_BLOCK", 64)
    values = jnp.asarray(100 * np.random.default_rng(0).normal(size=(8, 3, 5))).astype(dtype)
    sharded = jax.device_put(values, NamedSharding(jax.make_mesh((8,), ("x",)), P("x")))
    tree = {"host": values, "device": sharded, "scalar": values[0, 0, 0]}
    assert [checkpoint_arrays._is_on_host(x) for x in tree.values()] == [True, False, True]
    sums = checksums(tree)
    words = np.asarray(values).reshape(-1)
    words = words.view(f"u{words.itemsize}").astype(object)
    assert sums["host"] == sums["device"] == sum(words * (2 * np.arange(len(words), dtype=object) + 1)) % 2**32
    assert sums["host"] != sums["scalar"]
