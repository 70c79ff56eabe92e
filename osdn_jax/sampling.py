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
        index = jnp.arange(len(logits), dtype=jnp.int32)
        below, order = jax.lax.sort((-logits, index), num_keys=1, is_stable=True)
        likely = jax.nn.softmax(-below)
        # A token stays if the more likely ones sum to less than top_p. The most likely one always stays, even if
        # float32 rounds top_p to 0.
        last = jnp.maximum(jnp.sum(jnp.cumsum(likely) - likely < top_p, dtype=jnp.int32), 1) - 1
        least = -below[last]
        kept = (logits > least) | ((logits == least) & (index <= order[last]))
        logits = jnp.where(kept, logits, -jnp.inf)
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
    sampler: "Sampler | None" = None,
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
        sampler: a `Sampler` of the same arguments, to use its compiled programs. Default: a new one.

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
    options: dict[str, Any] = {"tokens": tokens, "seed": seed, "temperature": temperature, "top_p": top_p}
    if sampler is None:
        sampler = Sampler(apply, parameters, prompt, **options, forbidden=forbidden)
    return sampler.draw(parameters)


class Sampler:
    """The programs of `sample`, which can be compiled while the parameters are still being read.

    Args:
        apply: as in `sample`, and so are `prompt`, `tokens`, `seed`, `temperature`, `top_p` and `forbidden`.
        parameters: the model's parameters, or their shapes.
        token_by_token: the longest prompt to be read token by token: the program that draws does it, and no other has
            to be compiled. Default: 0, every prompt is read at once.

    Raises:
        ValueError, TypeError: as `sample`.
    """

    def __init__(
        self,
        apply: Callable[..., Any],
        parameters: Any,
        prompt: Int[np.ndarray, " T"],
        *,
        tokens: int,
        seed: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        forbidden: Sequence[int] = (),
        token_by_token: int = 0,
    ) -> None:
        """Check the arguments. Nothing is compiled yet."""
        text = np.asarray(prompt)
        if not text.size:
            raise ValueError("prompt: got no tokens, expected at least one (such as the start of a document)")
        if text.ndim != 1 or not np.issubdtype(text.dtype, np.integer):
            raise TypeError(f"prompt: got {text.dtype} of shape {list(text.shape)}, expected integers [T]")
        if (tokens := _integer("tokens", tokens)) < 0:
            raise ValueError(f"tokens: got {tokens}, expected at least 0")
        words, banned = _words(seed), np.asarray([_integer("forbidden", token) for token in forbidden], np.int64)

        def step(parameters: Parameters, ids: jax.Array, states: Any, index: jax.Array) -> tuple[Any, ...]:
            logits, states = apply(parameters, ids, states)
            last = logits[0, -1]
            _check_tokens(text, banned, len(last))
            if banned.size:
                last = last.at[banned].set(-jnp.inf)
            key = jax.random.fold_in(_key(*words), index)
            token = sample_token(last, key, temperature=temperature, top_p=top_p)
            token = jnp.where(jnp.max(last) > -jnp.inf, token, -1).astype(jnp.int32)
            return token[None, None], states, index + 1

        self._tokens, size = tokens, len(text)
        self._read: Any = jax.jit(step)  # reads a part of the prompt
        self._step: Any = self._read  # reads a token that was drawn
        self._start: Any = None  # gives the states before a prompt that is read token by token
        if size <= token_by_token:
            size, self._start = 1, jax.jit(lambda parameters: apply(parameters, jnp.zeros((1, 0), jnp.int32), None)[1])
        self._parts = [text[None, i : i + size].astype(np.int32) for i in range(0, len(text), size)]
        self._index = np.int32(1 - len(self._parts))  # of the draw after the first part, so that the last one's is 0
        jax.eval_shape(self._read, *self._first(parameters))  # raises errors of the arguments now, not during iteration

    def _first(self, parameters: Any) -> tuple[Any, ...]:
        """Return the arguments of the first call of a program, the states as shapes."""
        states = None if self._start is None else jax.eval_shape(self._start, parameters)
        return parameters, self._parts[0], states, self._index

    def compile(self, parameters: Any) -> None:
        """Compile what the first token needs, for parameters of these shapes on one device; `draw` compiles the rest.

        For a prompt that is read token by token there is no rest.
        """
        self._read = self._read.lower(*self._first(parameters)).compile()
        if self._start is not None:
            self._step, self._start = self._read, self._start.lower(parameters).compile()

    def draw(self, parameters: Parameters) -> Iterator[int]:
        """Yield the tokens, each as soon as it is sampled."""
        states, index, token = None, self._index, None
        for i in range(self._tokens):
            if token is not None:
                token, states, index = self._step(parameters, token, states, index)
            else:
                states = None if self._start is None else self._start(parameters)
                for part in self._parts:
                    token, states, index = self._read(parameters, part, states, index)
            drawn = int(np.asarray(token)[0, 0])
            if drawn < 0:
                raise ValueError(
                    f"token {i} cannot be drawn: the model's logits are NaN, or -inf for all allowed tokens"
                )
            yield drawn


def _integer(name: str, value: SupportsIndex) -> int:
    try:
        return operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name}: got {value!r}, expected an integer") from error


def _words(seed: SupportsIndex) -> tuple[int, int]:
    """Return the (high, low) 32 bits of a seed."""
    number = _integer("seed", seed)
    if not 0 <= number < 2**64:
        raise ValueError(f"seed: got {number}, expected an integer from 0 to 2**64 - 1")
    return divmod(number, 2**32)


def _key(high: int, low: int) -> jax.Array:
    """Return the random key of a 64-bit seed; `jax.random.key` alone would use 32 bits of it."""
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
