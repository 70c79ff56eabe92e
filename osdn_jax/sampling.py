"""Drawing text from a model, one token at a time, in constant memory."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from osdn_jax.nn.functional import Parameters


def choose(
    logits: Float[Array, " Vocab"], key: jax.Array, *, temperature: float = 1.0, top_p: float = 1.0
) -> Int[Array, ""]:
    """Draws a token: softmax(logits / temperature), cut to the smallest set of tokens that holds top_p of it.

    Temperature 0 takes the likeliest token (arXiv 1904.09751 for top_p).

    Raises:
        ValueError: temperature below 0, or top_p not in (0, 1].
    """
    if not (np.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature: got {temperature}, expected a number of at least 0")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: got {top_p}, expected more than 0 and at most 1")
    if temperature == 0:
        return jnp.argmax(logits)
    logits = logits / temperature
    if top_p < 1:
        order = jnp.argsort(-logits)
        likely = jax.nn.softmax(logits[order])
        # A token stays if what comes before it, in order of likelihood, is less than top_p: the first always does.
        kept = jnp.cumsum(likely) - likely < top_p
        logits = logits.at[order].set(jnp.where(kept, logits[order], -jnp.inf))
    return jax.random.categorical(key, logits)


def sample(
    apply: Callable[..., Any],
    parameters: Parameters,
    prompt: Int[np.ndarray, " T"],
    *,
    tokens: int,
    seed: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    forbidden: tuple[int, ...] = (),
) -> Iterator[int]:
    """Yields tokens that go on from a prompt, each as soon as it is drawn.

    Args:
        apply: (parameters, tokens [1, T], states) -> (logits [1, T, vocabulary], states), as of `nn.functional`.
        parameters: of the model.
        prompt: at least one token.
        tokens: how many to draw.
        seed: of the draws; the same seed draws the same tokens.
        temperature, top_p: as in `choose`.
        forbidden: tokens never to draw, such as the start of a document.

    Raises:
        ValueError: an empty prompt, tokens below 0, or temperature or top_p out of range; on the call itself.
    """
    if not len(prompt):
        raise ValueError("prompt: got no tokens, expected at least one (such as the start of a document)")
    if tokens < 0:
        raise ValueError(f"tokens: got {tokens}, expected at least 0")

    @jax.jit
    def step(parameters: Parameters, ids: jax.Array, states: Any, key: jax.Array) -> tuple[jax.Array, Any]:
        logits, states = apply(parameters, ids, states)
        last = logits[0, -1]
        if forbidden:
            last = last.at[jnp.asarray(forbidden)].set(-jnp.inf)
        return choose(last, key, temperature=temperature, top_p=top_p), states

    root = jax.random.key(seed)
    ids = jnp.asarray(prompt, jnp.int32)[None]
    jax.eval_shape(step, parameters, ids, None, root)  # raises for a bad temperature or top_p now, not when drawing

    def draw() -> Iterator[int]:
        states, current = None, ids
        for i in range(tokens):
            token, states = step(parameters, current, states, jax.random.fold_in(root, i))
            yield int(token)
            current = token.astype(jnp.int32)[None, None]

    return draw()
