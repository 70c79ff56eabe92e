"""Continuations of many prompts at once, until a stop string."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from osdn_jax.data import Tokenizer
from osdn_jax.evaluation.scoring import BATCH, PIECE, batches, check_sizes, last_logits
from osdn_jax.nn.split import Parameters
from osdn_jax.sampling import sample_token

_STEPS = 16  # tokens generated between two looks at the text


class Stopper:
    """The text of a continuation, which ends before the first stop string, or where the next document starts.

    A stop string is found wherever it lies: in the middle of a token or over several of them.

    Args:
        tokenizer: the tokenizer of the run.
        prompt: the tokens that are continued.
        until: stop strings; empty ones are ignored.

    Example:
        >>> from osdn_jax.data import load_tokenizer
        >>> stopper = Stopper(load_tokenizer("bytes"), [0], ["nd"])
        >>> [stopper.push(token) for token in b"sand"], stopper.text
        ([False, False, False, True], 'sa')
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], until: Sequence[str]) -> None:
        """Start with an empty text."""
        self._end, self._decoder = tokenizer.bos_id, tokenizer.stream_decoder(prompt)
        self._until = [stop for stop in until if stop]
        self._reach = max(map(len, self._until), default=1) - 1
        self.text, self.done = "", False

    def push(self, token: int) -> bool:
        """Add a token, and return whether the text is complete."""
        if not self.done:
            if token == self._end:
                return self.finish()
            self._add(self._decoder.push(token))
        return self.done

    def finish(self) -> bool:
        """End the text with what is left of an incomplete character; return True."""
        if not self.done:
            self._add(self._decoder.finish())
        self.done = True
        return True

    def _add(self, piece: str) -> None:
        start = max(0, len(self.text) - self._reach)
        self.text += piece
        places = [place for stop in self._until if (place := self.text.find(stop, start)) >= 0]
        if places:
            self.text, self.done = self.text[: min(places)], True


class BatchGenerator:
    """Generates continuations of many prompts, a batch at a time.

    Prompts are padded at their start, as a packed document before them, so that all prompts of a batch end
    at the same place; a continuation is that of the prompt alone, up to rounding. Long prompts are read in pieces.

    Args:
        apply: as in `token_scores`.
        parameters: the model's parameters.
        tokenizer: the tokenizer of the run. Vocabulary entries beyond its own are never generated.
        batch_size: prompts at a time, at most. Default: 16.
        piece: tokens of a prompt at a time, a power of two of at least 16. Default: 2048.

    Raises:
        ValueError: batch_size or piece is out of range.
    """

    def __init__(
        self,
        apply: Callable[..., Any],
        parameters: Parameters,
        tokenizer: Tokenizer,
        *,
        batch_size: int = BATCH,
        piece: int = PIECE,
    ) -> None:
        """Check the arguments. Nothing is compiled yet."""
        check_sizes(batch_size, piece)
        self.parameters, self.tokenizer, self.batch_size, self.piece = parameters, tokenizer, batch_size, piece
        self._read: Any = jax.jit(functools.partial(_read, apply))
        self._draw: Any = jax.jit(
            functools.partial(_draw, apply, tokenizer.vocab_size), static_argnames=("temperature", "top_p")
        )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        until: Sequence[str] = (),
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        progress: Callable[[int], object] = lambda done: None,
    ) -> list[str]:
        """Return the texts that continue the prompts, without the stop strings.

        Args:
            prompts: tokens, at least one in each.
            until: a text ends before the first of these strings.
            max_tokens: tokens of a continuation, at most. Default: 256.
            temperature: as in `sample_token`. Default: 0, the most likely token.
            top_p: as in `sample_token`. Default: 1.
            seed: random seed, 0 to 2^32 - 1; a text depends on it and on the prompt's index. Default: 0.
            progress: called with the number of prompts that are done since its last call.

        Raises:
            ValueError: a prompt is empty, or max_tokens is below 1, or temperature or top_p is out of range.
        """
        if max_tokens < 1:
            raise ValueError(f"max_tokens: got {max_tokens}, expected at least 1")
        for number, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"prompts: got an empty prompt {number}, expected at least one token")
        texts = [""] * len(prompts)
        lengths = {i: len(prompt) for i, prompt in enumerate(prompts)}
        for indices, shape in batches(lengths, self.batch_size, self.piece):
            stoppers = [Stopper(self.tokenizer, prompts[i], until) for i in indices]
            logits, states = self._prefill([prompts[i] for i in indices], shape)
            keys = jnp.asarray([*indices, *[0] * (shape[0] - len(indices))], jnp.uint32)
            for start in range(0, max_tokens, _STEPS):
                drawn, logits, states = self._draw(
                    self.parameters,
                    logits,
                    states,
                    (np.uint32(seed), keys, np.uint32(start)),
                    temperature=temperature,
                    top_p=top_p,
                )
                tokens = np.asarray(drawn)[:, : max_tokens - start]
                if (tokens < 0).any():
                    raise ValueError("no token can be drawn: the model's logits are NaN, or -inf for all tokens")
                for stopper, row in zip(stoppers, tokens.tolist(), strict=False):
                    any(stopper.push(token) for token in row)
                if all(stopper.done for stopper in stoppers):
                    break
            for i, stopper in zip(indices, stoppers, strict=True):
                stopper.finish()
                texts[i] = stopper.text
            progress(len(indices))
        return texts

    def _prefill(self, prompts: Sequence[Sequence[int]], shape: tuple[int, int]) -> tuple[Any, Any]:
        """Return the logits and the states after the prompts."""
        length = shape[1]
        tokens, ids = np.zeros(shape, np.int32), np.ones(shape, np.int32)
        for place, prompt in enumerate(prompts):
            tokens[place, length - len(prompt) :] = prompt
            ids[place, : length - len(prompt)] = 0
        logits = states = None
        # Padding is shorter than a piece, so every prompt starts in the first one.
        for start in range(0, length, self.piece):
            part = slice(start, start + self.piece)
            logits, states = self._read(self.parameters, tokens[:, part], ids[:, part] if start == 0 else None, states)
        return logits, states


def _read(apply: Callable[..., Any], parameters: Any, tokens: jax.Array, ids: jax.Array | None, states: Any) -> Any:
    hidden, states = apply(parameters, tokens, states, ids, method="features")
    return last_logits(apply, parameters, hidden), states


def _draw(
    apply: Callable[..., Any],
    vocabulary: int,
    parameters: Any,
    logits: jax.Array,
    states: Any,
    random: tuple[jax.Array, jax.Array, jax.Array],
    *,
    temperature: float,
    top_p: float,
) -> tuple[jax.Array, jax.Array, Any]:
    """Return the next tokens [B, steps], and the logits and states after them."""
    seed, indices, start = random
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(indices)

    def step(carry: tuple[jax.Array, Any], number: jax.Array) -> tuple[tuple[jax.Array, Any], jax.Array]:
        logits, states = carry
        allowed = logits.at[:, vocabulary:].set(-jnp.inf)

        def draw(row: jax.Array, key: jax.Array) -> jax.Array:
            token = sample_token(row, jax.random.fold_in(key, number), temperature=temperature, top_p=top_p)
            return jnp.where(jnp.max(row) > -jnp.inf, token, -1).astype(jnp.int32)

        token = jax.vmap(draw)(allowed, keys)
        hidden, states = apply(parameters, jnp.maximum(token, 0)[:, None], states, method="features")
        return (last_logits(apply, parameters, hidden), states), token

    numbers = start + jnp.arange(_STEPS, dtype=jnp.uint32)
    (logits, states), tokens = jax.lax.scan(step, (logits, states), numbers)
    return tokens.T, logits, states
