"""The arithmetic rate of DeltaNet, and of products of the sizes that it consists of."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers.sides import Arrays, Side
from osdn_jax import ops
from osdn_jax.compare import Contender, Shape, contender, draw_inputs

FORMULA = "4 C D + 2/3 C² + 4 C D + 6 D²"
_CHUNK = 64
_GRADIENT = 3.5  # forward and backward, in forward passes
_BATCH, _ROWS, _SIZE = 256, 64, 128
PRODUCTS = 2.0 * _BATCH * _ROWS * _SIZE * _SIZE  # operations of `products`


def operations(shape: Shape, gradient: bool) -> float:
    """Count the operations of DeltaNet in chunks, FORMULA for each token and head; with the gradient 3.5 times that."""
    size, tokens = shape.key_dim, shape.batch * shape.length * shape.heads
    return tokens * (8 * _CHUNK * size + 2 * _CHUNK**2 / 3 + 6 * size**2) * (_GRADIENT if gradient else 1)


def products() -> Contender:
    """Compile a batch of 256 products [64, 128] · [128, 128]."""
    rng = np.random.default_rng(0)
    pair = (jnp.asarray(rng.normal(size=(_BATCH, rows, _SIZE)), jnp.float32) for rows in (_ROWS, _SIZE))
    return contender(f"{_BATCH} products [{_ROWS}, {_SIZE}] · [{_SIZE}, {_SIZE}]", jnp.matmul, tuple(pair))


def _delta_net(initial_state: jax.Array, **rest: jax.Array) -> tuple[jax.Array, jax.Array]:
    o, state = ops.delta_net(**rest, initial_state=initial_state)
    return o, state.recurrent


DELTA_NET = Side("osdn-jax", _delta_net)


def arrays(shape: Shape) -> Arrays:
    """Draw the arguments of DeltaNet."""
    return draw_inputs("delta_net", shape, "float32", seed=0)
