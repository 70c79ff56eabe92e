"""A Flax NNX model of your own with a `DeltaMixer` inside, trained for a few steps:  python examples/own_model.py

The task is recall: the model sees pairs of a key and a sign, then one of the keys, and has to say its sign. Only the
mixer can answer, since it alone sees more than one token.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from osdn_jax import nn

PAIRS, WIDTH = 6, 32


class Recall(nnx.Module):
    """A projection in, a norm, a mixer with a residual connection, and a projection out."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Linear(PAIRS + 1, WIDTH, rngs=rngs)
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        config = nn.mixer_config("os_gdn", width=WIDTH, heads=2, key_dim=16, value_dim=16)
        # `layers` scales the last projection's initial weights, as in a model with that many blocks.
        self.mixer = nn.DeltaMixer(config, layers=1, dtype=jnp.float32, rngs=rngs)
        self.readout = nnx.Linear(WIDTH, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = self.embed(x)
        mixed, _ = self.mixer(self.norm(hidden))  # the second result is the state, for decoding
        return self.readout(hidden + mixed)[:, -1, 0]


def batch(key: jax.Array, size: int = 64) -> tuple[jax.Array, jax.Array]:
    """Return sequences [size, PAIRS + 1, PAIRS + 1] of one-hot keys with a sign, and the sign asked for [size]."""
    order, signs, query = jax.random.split(key, 3)
    keys = jax.vmap(lambda k: jax.random.permutation(k, PAIRS))(jax.random.split(order, size))
    signs = jax.random.rademacher(signs, (size, PAIRS), jnp.float32)
    asked = jax.random.randint(query, (size, 1), 0, PAIRS)
    tokens = jax.nn.one_hot(jnp.concatenate([keys, jnp.take_along_axis(keys, asked, 1)], 1), PAIRS)
    values = jnp.pad(signs, ((0, 0), (0, 1)))  # the query has no sign
    return jnp.concatenate([tokens, values[..., None]], -1), jnp.take_along_axis(signs, asked, 1)[:, 0]


@nnx.jit
def train_step(model: Recall, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
    loss, gradient = nnx.value_and_grad(lambda m: jnp.mean(jnp.square(m(x) - y)))(model)
    optimizer.update(model, gradient)
    return loss


model = Recall(rngs=nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
losses = [float(train_step(model, optimizer, *batch(jax.random.key(step)))) for step in range(150)]
print(f"loss of the first step {losses[0]:.2f}, of the last {losses[-1]:.2f}")
