"""Continuations of many prompts at once, until a stop string."""

from collections.abc import Callable, Sequence
from typing import Any

from osdn_jax.data import Tokenizer
from osdn_jax.evaluation.scoring import BATCH, PIECE, check_sizes
from osdn_jax.generation import Generator, Stopper
from osdn_jax.nn.split import Parameters

__all__ = ["BatchGenerator", "Stopper"]


class BatchGenerator:
    """Generates continuations of many prompts, a batch at a time, with `osdn_jax.generation`.

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
        self._end = tokenizer.bos_id
        self._generator = Generator((apply, parameters), tokenizer, batch_size=batch_size, piece=piece)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        until: Sequence[str] = (),
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        progress: Callable[[int], object] = lambda done: None,
    ) -> list[str]:
        """Return the texts that continue the prompts, without the stop strings.

        Args:
            prompts: tokens, at least one in each.
            until: a text ends before the first of these strings.
            max_tokens: tokens of a continuation, at most. Default: 256.
            temperature: as in `osdn_jax.generation.Options`. Default: 0, the most likely token.
            top_k: as there. Default: 0, all tokens.
            top_p: as there. Default: 1.
            repetition_penalty: as there. Default: 1, none.
            seed: random seed, 0 to 2^64 - 1; a text depends on it and on the prompt's index. Default: 0.
            progress: called with the number of prompts that are done since its last call.

        Raises:
            ValueError: a prompt is empty, or max_tokens is below 1, or another option is out of range.
        """
        if max_tokens < 1:
            raise ValueError(f"max_tokens: got {max_tokens}, expected at least 1")
        for number, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"prompts: got an empty prompt {number}, expected at least one token")
        found = self._generator.generate(
            prompts,
            progress=progress,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=until,
            stop_tokens=[self._end],
        )
        return [continuation.text for continuation in found]
