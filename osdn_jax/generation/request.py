"""A checked request: prompts as tokens, with the options of each."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np
from jaxtyping import Int

from osdn_jax.generation import arguments
from osdn_jax.generation.filters import Settings, divisor
from osdn_jax.generation.shapes import batches, power_of_two

PerPrompt = Sequence[float] | np.ndarray


class Options(TypedDict, total=False):
    """Options of `Generator.generate` and `Generator.stream`. Those for each prompt are one value, or one per prompt.

    The filters are applied in the order of Transformers: repetition penalty, forbidden tokens, temperature, top_k,
    top_p, min_p.

    Attributes:
        max_tokens: tokens of a continuation, at most; for each prompt. Default: 256.
        temperature: divisor of the logits, at least 0; 0 takes the most likely token; for each prompt. Default: 1.
        top_k: draw from this number of the most likely tokens, 0 for all; for each prompt. Default: 0.
        top_p: draw from the fewest most likely tokens whose probabilities sum to at least top_p (arXiv 1904.09751), in
            (0, 1]; for each prompt. Default: 1, all.
        min_p: draw from the tokens that are at least min_p times as probable as the most likely one (arXiv 2407.01082),
            0 to 1; for each prompt. Default: 0, all.
        repetition_penalty: divisor of positive logits, and factor of negative ones, of the tokens of the prompt and its
            continuation (arXiv 1909.05858), above 0; for each prompt. Default: 1, none.
        seed: random seeds from 0 to 2^64 - 1, one for each prompt; one number gives the prompts the seeds that follow
            it. A continuation depends on its own prompt, options and seed only. Default: 0.
        forbidden: tokens that are never drawn. Default: none.
        stop: strings; a text ends before the first of them. Needs a tokenizer. Default: none.
        stop_tokens: tokens that end a continuation. Default: those of the generator.
    """

    max_tokens: int | Sequence[int]
    temperature: float | PerPrompt
    top_k: int | Sequence[int]
    top_p: float | PerPrompt
    min_p: float | PerPrompt
    repetition_penalty: float | PerPrompt
    seed: int | Sequence[int]
    forbidden: Sequence[int]
    stop: str | Sequence[str]
    stop_tokens: Sequence[int]


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "temperature": arguments.temperature,
    "top_k": arguments.top_k,
    "top_p": arguments.top_p,
    "min_p": arguments.min_p,
    "repetition_penalty": arguments.repetition_penalty,
    "max_tokens": arguments.max_tokens,
}
_DEFAULTS: dict[str, Any] = {
    "max_tokens": 256,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "seed": 0,
    "forbidden": (),
    "stop": (),
    "stop_tokens": (),
}


class Batch(NamedTuple):
    """Some prompts of a request.

    Attributes:
        members: their indices in the request.
        texts: their tokens.
        settings: settings of each row; rows after the last text have no meaning and no tokens.
        longest: tokens of a continuation, at most.
    """

    members: list[int]
    texts: list[Int[np.ndarray, " T"]]
    settings: Settings
    longest: int


class Request:
    """Prompts and their options, from which batches are taken.

    Args:
        texts: the tokens of each prompt.
        vocabulary: number of logits.
        tokenizer: the tokenizer, or None.
        options: some of `Options`.

    Attributes:
        texts: the tokens of each prompt.
        stop: strings that end a text.
        stop_tokens: tokens that end a continuation.
        max_tokens: tokens of each continuation, at most.

    Raises:
        ValueError: an option is out of range, or a number of values is not that of the prompts.
        TypeError: an option is unknown or has another type.
    """

    def __init__(
        self, texts: list[Int[np.ndarray, " T"]], vocabulary: int, tokenizer: Any, options: dict[str, Any]
    ) -> None:
        """Check the options."""
        unknown = set(options) - set(_DEFAULTS)
        if unknown:
            raise TypeError(f"options: got {', '.join(sorted(unknown))}, expected some of {', '.join(_DEFAULTS)}")
        given = {**_DEFAULTS, **options}
        rows, self.texts, self._vocabulary = len(texts), texts, vocabulary
        self._values = {name: arguments.per_row(name, check, given[name], rows) for name, check in _CHECKS.items()}
        self._seeds = arguments.seeds(given["seed"], rows)
        self.max_tokens: list[int] = self._values["max_tokens"]
        self.stop = arguments.strings("stop", given["stop"])
        if self.stop and tokenizer is None:
            raise ValueError("stop: got strings without a tokenizer, expected stop_tokens")
        self.stop_tokens = arguments.token_set("stop_tokens", given["stop_tokens"], vocabulary)
        self._forbidden = arguments.forbidden(
            given["forbidden"], vocabulary, vocabulary if tokenizer is None else tokenizer.vocab_size
        )

    def batches(self, size: int, *, equal: bool) -> list[list[int]]:
        """Return the indices of the prompts of each batch of at most `size`, with `equal` all of one length."""
        lengths = {index: len(text) for index, text in enumerate(self.texts)}
        if not equal:
            return batches(lengths, size)
        groups: dict[int, dict[int, int]] = {}
        for index, length in lengths.items():
            groups.setdefault(length, {})[index] = length
        return [members for group in groups.values() for members in batches(group, size)]

    def batch(self, members: list[int]) -> Batch:
        """Return some prompts, with rows without meaning up to a power of two."""
        padding = power_of_two(len(members)) - len(members)
        values = {name: [*(found[row] for row in members), *[0] * padding] for name, found in self._values.items()}
        masks = np.zeros((2, len(members) + padding, self._vocabulary), bool)
        masks[0][:, self._forbidden] = masks[1][:, self.stop_tokens] = True
        heat = [divisor(t, np.dtype(np.float32)) if t > 0 else 0 for t in values["temperature"]]
        seeds = [divmod(self._seeds[row], 2**32) for row in members] + [(0, 0)] * padding
        arrays = (
            np.asarray(heat, np.float32),
            np.asarray(values["top_k"], np.int32),
            np.asarray(values["top_p"], np.float32),
            np.asarray(values["min_p"], np.float32),
            np.asarray(values["repetition_penalty"], np.float32),
            np.asarray(seeds, np.uint32),
            np.asarray(values["max_tokens"], np.int32),
            *masks,
        )
        settings = Settings(*arrays)
        return Batch(members, [self.texts[i] for i in members], settings, max(self.max_tokens[i] for i in members))
