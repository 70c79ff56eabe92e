"""A training state with every kind of leaf, and its checkpoints."""

from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

from osdn_jax.training import Checkpoints


def state_at(step, width=64):
    """A training state with every kind of leaf and container; incompressible, and another one at each step."""
    key = jax.random.key(step)
    params = {
        "embed": jax.random.normal(key, (width, 32), jnp.float32),
        "layers": [{"kernel": jax.random.normal(key, (32, 8), jnp.bfloat16)}, {"kernel": jnp.ones((2, 3))}],
    }
    return {
        "params": params,
        "opt_state": optax.adamw(1e-3).init(params),
        "step": jnp.int32(step),
        "rng": jax.random.key_data(key),
        "mask": jnp.arange(7) % 2 == 0,
        "nan": jnp.array([jnp.nan, -0.0, jnp.inf], jnp.float32),
        "half": jnp.array([[1.5]], jnp.float16),
        "byte": jnp.array([-3], jnp.int8),
    }


def new_iterator():
    return iter(grain.MapDataset.range(1000).shuffle(seed=3).repeat().to_iter_dataset())


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def assert_same_bits(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert isinstance(x, jax.Array)
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def save(folder, *steps, **options):
    with Checkpoints(folder, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_at(step), new_iterator(), {"step": step})


def names(folder):
    return sorted(entry.name for entry in Path(folder).iterdir())


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    if content:
        content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def array_file(folder):
    """The file that holds most of the arrays."""
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
