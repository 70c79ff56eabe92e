"""Other forms of parts of the operators, to measure the difference."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from osdn_jax.ops import chunk_step


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Remove the check for packed documents that are not finite from the operators and attention."""
    with contextlib.ExitStack() as stack:
        for module in ("ops.dispatch", "nn.softmax"):
            name = f"osdn_jax.{module}.contained"
            stack.enter_context(mock.patch(name, lambda fast, exact, inputs, starts: fast(inputs, starts)))
        yield


def direct_scores() -> contextlib.AbstractContextManager:
    """Replace the scores of a chunk under a decay per channel by `_direct_scores`."""
    return mock.patch.object(chunk_step, "channel_scores", _direct_scores)


def _direct_scores(x: jax.Array, w: jax.Array, log_decay: jax.Array) -> jax.Array:
    """Compute `ops.scores.channel_scores` from the decays of all pairs of tokens: [..., C, C, K] values."""
    decayed = jnp.cumsum(log_decay, axis=-2)
    between = decayed[..., :, None, :] - decayed[..., None, :, :]
    earlier = np.tril(np.ones((w.shape[-2],) * 2, bool)).reshape((1,) * (between.ndim - 3) + (w.shape[-2],) * 2 + (1,))
    pairs = jnp.where(earlier, jnp.exp(jnp.where(earlier, between, 0.0)), 0.0) * w[..., None, :, :]
    return jnp.einsum("...mik,...ijk->...mij", x, pairs)
