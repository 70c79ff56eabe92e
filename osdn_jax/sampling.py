"""Sampling of tokens from a model, one at a time, in constant memory."""

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from osdn_jax.nn.split import Parameters


def sample_token(
    logits: Float[Array, " Vocab"], key: jax.Array, *, temperature: float = 1.0, top_p: float = 1.0
) -> Int[Array, ""]:
    """Sample a token from softmax(logits / temperature), restricted to the most likely tokens (arXiv 1904.09751).

    Args:
        logits: [vocabulary]; a token with a logit of -inf is never sampled.
        key: a random key.
        temperature: at least 0; 0 returns the most likely token. Default: 1.
        top_p: restrict sampling to the smallest set of tokens whose probabilities sum to at least top_p, in (0, 1].
            Default: 1, all tokens.

    Returns:
        The index of the token.

    Raises:
        ValueError: temperature is negative or not finite, or top_p is not in (0, 1].
        TypeError: one of them is not a number.

    Example:
        >>> logits = jnp.log(jnp.asarray([0.5, 0.3, 0.2]))
        >>> int(sample_token(logits, jax.random.key(0), temperature=0.0))
        0
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
        # A token stays if the more likely ones sum to less than top_p. The most likely one always stays, even if
        # float32 rounds top_p to 0.
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
    """Return logits / temperature, minus a constant that makes the largest 0, for any temperature above 0.

    Dividing first could overflow to inf and give inf - inf; a temperature out of the dtype's range would be 0 or inf.
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
    """Yield tokens that continue a prompt, each as soon as it is sampled.

    Args:
        apply: (parameters, tokens [1, T], states) -> (logits [1, T, vocabulary], states), as `nn.split_model` returns
            it for a `CausalLM`.
        parameters: the model's parameters.
        prompt: [T] integers, at least one token.
        tokens: number of tokens to generate.
        seed: random seed, 0 to 2^64 - 1; the same seed gives the same tokens.
        temperature: as in `sample_token`. Default: 1.
        top_p: as in `sample_token`. Default: 1.
        forbidden: tokens that are never sampled, such as the start of a document. Default: none.

    Raises:
        ValueError: the prompt is empty; tokens, seed, temperature or top_p is out of range; a token of `prompt` or
            `forbidden` is outside the vocabulary, or all of it is forbidden. Raised by the call itself. During
            iteration: the logits of the next token are NaN, or -inf for all tokens that are allowed.
        TypeError: an argument is not an integer or not a number; raised by the call itself.

    Example:
        >>> from flax import nnx
        >>> from osdn_jax import nn
        >>> mixer = nn.mixer_config("delta_net", width=8, heads=1, key_dim=4, value_dim=4)
        >>> config = nn.ModelConfig(vocab_size=16, layers=1, mixer=mixer, mlp_dim=8)
        >>> apply, parameters = nn.split_model(nn.CausalLM(config, rngs=nnx.Rngs(0)))
        >>> generated = list(sample(apply, parameters, np.asarray([1, 2, 3]), tokens=4, seed=0))
        >>> len(generated), all(0 <= token < 16 for token in generated)
        (4, True)
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
        token = sample_token(last, key, temperature=temperature, top_p=top_p)
        return jnp.where(jnp.max(last) > -jnp.inf, token, -1), states

    ids = jnp.asarray(text, jnp.int32)[None]
    jax.eval_shape(step, parameters, ids, None, root)  # raises errors of the arguments now, not during iteration

    def generated() -> Iterator[int]:
        states, current = None, ids
        for i in range(tokens):
            token, states = step(parameters, current, states, jax.random.fold_in(root, i))
            if int(token) < 0:
                raise ValueError(
                    f"token {i} cannot be drawn: the model's logits are NaN, or -inf for all allowed tokens"
                )
            yield int(token)
            current = token.astype(jnp.int32)[None, None]

    return generated()


def _integer(name: str, value: SupportsIndex) -> int:
    try:
        return operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name}: got {value!r}, expected an integer") from error


def _key(seed: SupportsIndex) -> jax.Array:
    """Return the random key of a 64-bit seed; `jax.random.key` alone would use 32 bits of it."""
    number = _integer("seed", seed)
    if not 0 <= number < 2**64:
        raise ValueError(f"seed: got {number}, expected an integer from 0 to 2**64 - 1")
    high, low = divmod(number, 2**32)
    key = jax.random.key(low)
    return jax.random.fold_in(key, np.uint32(high)) if high else key


def _check_tokens(prompt: np.ndarray, forbidden: np.ndarray, vocabulary: int) -> None:
    """Raise a ValueError that names the argument if a token is not in the vocabulary, or if all of it is forbidden."""
    for name, tokens in (("prompt", prompt), ("forbidden", forbidden)):
        outside = tokens[(tokens < 0) | (tokens >= vocabulary)]
        if outside.size:
            raise ValueError(
                f"{name}: got token {outside[0]}, expected tokens of the vocabulary, 0 to {vocabulary - 1}"
            )
    if len(np.unique(forbidden)) == vocabulary:
        raise ValueError(f"forbidden: got all {vocabulary} tokens of the vocabulary, expected at most {vocabulary - 1}")
