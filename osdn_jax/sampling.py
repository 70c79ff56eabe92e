"""Sampling of tokens from a model, one at a time, in constant memory."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from osdn_jax.generation import arguments
from osdn_jax.generation.engine import Engine, Run
from osdn_jax.generation.filters import divisor, most_likely, tempered
from osdn_jax.generation.functions import of_logits, vocabulary_of
from osdn_jax.generation.programs import BLOCK, Programs
from osdn_jax.generation.request import Request
from osdn_jax.generation.shapes import PIECE
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
    temperature, top_p = arguments.temperature(temperature), arguments.top_p(top_p)
    if temperature == 0:
        return jnp.argmax(logits)
    dtype = jnp.dtype(jnp.float64 if logits.dtype == jnp.float64 else jnp.float32)
    below = tempered(logits[None], jnp.asarray(divisor(temperature, dtype))[None])
    if top_p < 1:
        kept = most_likely(below, jnp.zeros(1, jnp.int32), jnp.asarray([top_p], jnp.float32))
        below = jnp.where(kept, below, -jnp.inf)
    return jax.random.categorical(key, below[0])


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

    `osdn_jax.generation` continues many prompts at once, with more options.

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
        token_by_token: the longest prompt to be read token by token, at most 64: the program that draws does it, and no
            other has to be compiled. Default: 0, every prompt is read at once.

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
        arguments.tokens("prompt", prompt, 2**31 - 1, empty=True)  # the type, before the model is traced
        functions = of_logits(apply)
        vocabulary = vocabulary_of(functions, parameters)
        text = arguments.tokens("prompt", prompt, vocabulary)
        if (tokens := arguments.integer("tokens", tokens)) < 0:
            raise ValueError(f"tokens: got {tokens}, expected at least 0")
        options = {"max_tokens": tokens, "seed": seed, "temperature": temperature, "top_p": top_p}
        request = Request([text], vocabulary, None, {**options, "forbidden": forbidden})
        self._text, self._settings = text, request.batch([0]).settings
        self._engine = Engine(Programs(functions), vocabulary, PIECE)
        self._in_loop = len(text) <= max(1, arguments.integer_between("token_by_token", token_by_token, 0, BLOCK))

    def compile(self, parameters: Any) -> None:
        """Compile everything that `draw` runs, for parameters of these shapes on one device."""
        programs = self._engine.programs
        if self._in_loop:
            blocks = programs.start.compile(parameters, 1)
        else:
            blocks = programs.read.compile(parameters, self._text[None, :-1], None, None, None)
        self._engine.compile_loop(parameters, blocks, self._settings)

    def draw(self, parameters: Parameters) -> Iterator[int]:
        """Yield the tokens, each as soon as it is sampled."""
        engine, forced = self._engine, None
        if self._in_loop:
            state, forced = engine.start(parameters, [self._text]), self._text[None, 1:]
        else:
            blocks = engine.programs.read(parameters, self._text[None, :-1], None, None, None)
            state = engine.state(blocks, [self._text], 1)
        place = 0
        for block in Run(engine, parameters, state, self._settings, forced):
            for token in block[0].tolist():
                if token < 0:
                    raise ValueError(
                        f"token {place} cannot be drawn: the model's logits are NaN, or -inf for all allowed tokens"
                    )
                place += 1
                yield token
