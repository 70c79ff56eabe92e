"""Drawing text from a model, one token at a time, in constant memory."""

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from osdn_jax.nn.split import Parameters


def choose(
    logits: Float[Array, " Vocab"], key: jax.Array, *, temperature: float = 1.0, top_p: float = 1.0
) -> Int[Array, ""]:
    """Draws a token: softmax(logits / temperature), cut to the smallest set of tokens that holds top_p of it.

    Temperature 0 takes the likeliest token (arXiv 1904.09751 for top_p). A token with a logit of -inf is never drawn.

    Raises:
        ValueError: temperature below 0 or not finite, or top_p not in (0, 1].
        TypeError: one of them is no number.
    """
    temperature, top_p = _number("temperature", temperature), _number("top_p", top_p)
    if not (np.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature: got {temperature}, expected a number of at least 0")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: got {top_p}, expected more than 0 and at most 1")
    if temperature == 0:
        return jnp.argmax(logits)
    logits = _tempered(logits, temperature)
    if top_p < 1:
        order = jnp.argsort(-logits)
        likely = jax.nn.softmax(logits[order])
        # A token stays if what comes before it, in order of likelihood, is less than top_p. The first always does, also
        # where float32 rounds top_p to 0.
        kept = (jnp.cumsum(likely) - likely < top_p).at[0].set(True)
        logits = logits.at[order].set(jnp.where(kept, logits[order], -jnp.inf))
    return jax.random.categorical(key, logits)


def _number(name: str, value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return np.inf if value > 0 else -np.inf
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: got {value!r}, expected a number") from error


def _tempered(logits: Float[Array, " Vocab"], temperature: float) -> Float[Array, " Vocab"]:
    """logits / temperature for any temperature above 0, less a constant that makes the largest 0.

    Dividing first could overflow to inf and leave inf - inf; a temperature that the type cannot hold would be 0 or inf.
    """
    logits = logits.astype(jnp.float64 if logits.dtype == jnp.float64 else jnp.float32)
    limits = jnp.finfo(logits.dtype)
    divisor = np.clip(temperature, float(limits.tiny), float(limits.max)).astype(logits.dtype)
    largest = jnp.max(logits)
    below = jnp.where(logits == largest, 0, logits - largest) / divisor
    return jnp.where(logits == -jnp.inf, -jnp.inf, below)


def sample(
    apply: Callable[..., Any],
    parameters: Parameters,
    prompt: Int[np.ndarray, " T"],
    *,
    tokens: int,
    seed: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    forbidden: Sequence[int] = (),
) -> Iterator[int]:
    """Yields tokens that go on from a prompt, each as soon as it is drawn.

    Args:
        apply: (parameters, tokens [1, T], states) -> (logits [1, T, vocabulary], states), as of `nn.split_model`.
        parameters: of the model.
        prompt: at least one token.
        tokens: how many to draw.
        seed: of the draws, 0 to 2^64 - 1; the same seed draws the same tokens, and another one others.
        temperature, top_p: as in `choose`.
        forbidden: tokens never to draw, such as the start of a document.

    Raises:
        ValueError: an empty prompt, tokens below 0, a seed, temperature or top_p out of range, a token of prompt or
            forbidden outside the vocabulary, or all of it forbidden; on the call itself. While drawing: the logits of
            the next token are NaN, or -inf for all tokens that are allowed.
        TypeError: an argument that is no integer or no number; on the call itself.
    """
    text = np.asarray(prompt)
    if not text.size:
        raise ValueError("prompt: got no tokens, expected at least one (such as the start of a document)")
    if text.ndim != 1 or not np.issubdtype(text.dtype, np.integer):
        raise TypeError(f"prompt: got {text.dtype} of shape {list(text.shape)}, expected integers [T]")
    if (tokens := _integer("tokens", tokens)) < 0:
        raise ValueError(f"tokens: got {tokens}, expected at least 0")
    root, banned = _key(seed), np.asarray([_integer("forbidden", token) for token in forbidden], np.int64)

    @jax.jit
    def step(parameters: Parameters, ids: jax.Array, states: Any, key: jax.Array) -> tuple[jax.Array, Any]:
        logits, states = apply(parameters, ids, states)
        last = logits[0, -1]
        _check_tokens(text, banned, len(last))
        if banned.size:
            last = last.at[banned].set(-jnp.inf)
        token = choose(last, key, temperature=temperature, top_p=top_p)
        return jnp.where(jnp.max(last) > -jnp.inf, token, -1), states

    ids = jnp.asarray(text, jnp.int32)[None]
    jax.eval_shape(step, parameters, ids, None, root)  # raises for what is out of range now, not when drawing

    def draw() -> Iterator[int]:
        states, current = None, ids
        for i in range(tokens):
            token, states = step(parameters, current, states, jax.random.fold_in(root, i))
            if int(token) < 0:
                raise ValueError(
                    f"token {i} cannot be drawn: the model's logits are NaN, or -inf for all allowed tokens"
                )
            yield int(token)
            current = token.astype(jnp.int32)[None, None]

    return draw()


def _integer(name: str, value: SupportsIndex) -> int:
    try:
        return operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name}: got {value!r}, expected an integer") from error


def _key(seed: SupportsIndex) -> jax.Array:
    """The key of a seed of 64 bits, of which JAX would take 32."""
    number = _integer("seed", seed)
    if not 0 <= number < 2**64:
        raise ValueError(f"seed: got {number}, expected an integer from 0 to 2**64 - 1")
    high, low = divmod(number, 2**32)
    key = jax.random.key(low)
    return jax.random.fold_in(key, np.uint32(high)) if high else key


def _check_tokens(prompt: np.ndarray, forbidden: np.ndarray, vocabulary: int) -> None:
    """Raises ValueError, naming the argument, for a token outside the vocabulary, or a whole vocabulary forbidden."""
    for name, tokens in (("prompt", prompt), ("forbidden", forbidden)):
        outside = tokens[(tokens < 0) | (tokens >= vocabulary)]
        if outside.size:
            raise ValueError(
                f"{name}: got token {outside[0]}, expected tokens of the vocabulary, 0 to {vocabulary - 1}"
            )
    if len(np.unique(forbidden)) == vocabulary:
        raise ValueError(f"forbidden: got all {vocabulary} tokens of the vocabulary, expected one less at most")
