"""The gradient of the demo's models."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.ops import patches
from benchmarks.ops.bench import packed_ids
from osdn_jax import nn
from osdn_jax.compare import Contender, contender
from osdn_jax.nn.split import split_model


def gradient_of_model(
    rule: str, batch: int, tokens: int, width: int, *, dtype: str = "float32", checked: bool = True
) -> Contender:
    """Compile the gradient of the loss of a model on packed documents."""
    mixer = nn.mixer_config(rule, width=width, heads=2, key_dim=width // 2, value_dim=width // 2)
    config = nn.ModelConfig(vocab_size=256, layers=2, mixer=mixer, mlp_dim=2 * width, dtype=dtype)
    apply, parameters = split_model(nn.CausalLM(config, rngs=nnx.Rngs(0)))
    ids, text = packed_ids(batch, tokens), np.random.default_rng(0).integers(0, 256, (batch, tokens))

    def loss(parameters: dict) -> jax.Array:
        logits, _ = apply(parameters, jnp.asarray(text, jnp.int32), segment_ids=ids)
        return -jnp.mean(jax.nn.log_softmax(logits.astype(jnp.float32))[..., 0])

    name = f"model of {rule}, {batch} x {tokens}, {dtype}, {'checked' if checked else 'unchecked'}"
    with contextlib.nullcontext() if checked else patches.unchecked():
        jax.clear_caches()
        made = contender(name, jax.grad(loss), (parameters,))
    jax.clear_caches()
    return made
