"""A model and its tokenizer as an evaluation harness sees them: texts in; log-likelihoods and texts out."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from osdn_jax.data import Tokenizer
from osdn_jax.evaluation.generation import BatchGenerator
from osdn_jax.evaluation.scoring import BATCH, PIECE, Score, TokenScorer, padded_length
from osdn_jax.nn.split import Parameters

type Long = Literal["carried", "windows"]
LONG: tuple[Long, ...] = ("carried", "windows")

_MAX_GENERATED = 256  # tokens of a continuation, if a request does not say
# Settings of a generation that change nothing if they have these values, which other libraries write out.
_NEUTRAL: dict[str, tuple[Any, ...]] = {"num_beams": (1,)}


class TextModel:
    """Scores and continues texts with a model.

    Texts are read as the documents of the training data: the tokenizer's start token is put first.

    Args:
        apply: the model, as returned by `nn.split_model`.
        parameters: the model's parameters.
        tokenizer: the tokenizer of the run.
        max_length: tokens of a window if `long` is "windows": those of the training, usually.
        long: "carried": texts of any length are read from beginning to end, with the state carried. "windows": at most
            max_length tokens are read; a longer context loses its beginning, and a text whose likelihood is wanted is
            split into windows that start from an empty state, each token in one of them. Default: "carried".
        start_token: put the start token first. Default: True. A text without any context has it in any case.
        batch_size: rows at a time, at most. Default: 16.
        piece: tokens of a row at a time, a power of two of at least 16; with windows at least a window. Default: 2048.
        seed: of sampled continuations. Default: 0.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from flax import nnx
        >>> from osdn_jax import nn
        >>> from osdn_jax.data import load_tokenizer
        >>> mixer = nn.mixer_config("osdn", width=8, heads=1, key_dim=4, value_dim=4)
        >>> config = nn.ModelConfig(vocab_size=256, layers=1, mixer=mixer, mlp_dim=8)
        >>> model = nn.CausalLM(config, rngs=nnx.Rngs(0))
        >>> text_model = TextModel(*nn.split_model(model), load_tokenizer("bytes"), max_length=32)
        >>> [score] = text_model.score([("To be, or not", " to be")])
        >>> score.log_likelihood < -6
        True
    """

    def __init__(
        self,
        apply: Callable[..., Any],
        parameters: Parameters,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        long: Long = "carried",
        start_token: bool = True,
        batch_size: int = BATCH,
        piece: int = PIECE,
        seed: int = 0,
    ) -> None:
        """Check the arguments. Nothing is compiled yet."""
        if max_length < 2:
            raise ValueError(f"max_length: got {max_length}, expected at least 2")
        if long not in LONG:
            raise ValueError(f"long: got {long!r}, expected one of {', '.join(map(repr, LONG))}")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed: got {seed}, expected an integer from 0 to 2**32 - 1")
        self.tokenizer, self.max_length, self.long, self.seed = tokenizer, max_length, long, seed
        self.start_token = start_token
        if long == "windows":
            piece = max(piece, padded_length(max_length, 1 << max_length.bit_length()))
        self._scorer = TokenScorer(apply, parameters, batch_size=batch_size, piece=piece)
        self._generator = BatchGenerator(apply, parameters, tokenizer, batch_size=batch_size, piece=piece)

    def encode(self, text: str, *, start_token: bool | None = None) -> list[int]:
        """Return the tokens of a text; `start_token` replaces the model's own setting. Raises as `Tokenizer.encode`."""
        ids = self.tokenizer.encode(text, bos=self.start_token if start_token is None else start_token)
        return [int(i) for i in ids]

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a context, at least one, and those of what follows it.

        Both are encoded together, because the last token of the one may reach into the other; blanks at the end of the
        context belong to the continuation. This is how lm-evaluation-harness splits them.
        """
        if not context:
            return [self.tokenizer.bos_id], self.encode(continuation, start_token=False)
        kept = context.rstrip()
        whole, before = self.encode(context + continuation), self.encode(kept)
        if not before:  # blanks alone, without a start token
            return [self.tokenizer.bos_id], whole
        return before, whole[len(before) :]

    def score(
        self, pairs: Sequence[tuple[str, str]], progress: Callable[[int], object] = lambda done: None
    ) -> list[Score]:
        """Return the score of each continuation, for pairs of (context, continuation).

        Raises:
            ValueError: with windows, a continuation has more than max_length tokens.
        """
        return self.score_tokens([self.encode_pair(*pair) for pair in pairs], progress)

    def score_tokens(
        self,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        progress: Callable[[int], object] = lambda done: None,
    ) -> list[Score]:
        """Return the scores of pairs of tokens; see `score`."""
        if self.long == "carried":
            return self._scorer.score(pairs, progress)
        shortened = []
        for number, (context, continuation) in enumerate(pairs):
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"pair {number}: the continuation has {len(continuation)} tokens, but a window {self.max_length}; "
                    "carry the state"
                )
            room = self.max_length + 1 - len(continuation)
            shortened.append((context[max(0, len(context) - room) :], continuation))
        return self._scorer.score(shortened, progress)

    def score_rolling(self, texts: Sequence[str], progress: Callable[[int], object] = lambda done: None) -> list[float]:
        """Return the log-likelihood of each whole text, each of its tokens once; the start token has none."""
        start, owners, pairs = self.tokenizer.bos_id, [], []
        for number, text in enumerate(texts):
            tokens = self.encode(text, start_token=False)
            windows = [([start], tokens)] if self.long == "carried" else rolling_windows(tokens, start, self.max_length)
            for pair in windows:
                owners.append(number)
                pairs.append(pair)
        totals = [0.0] * len(texts)
        for number, score in zip(owners, self._scorer.score(pairs, progress), strict=True):
            totals[number] += score.log_likelihood
        return totals

    def generate(
        self,
        requests: Sequence[tuple[str, Mapping[str, Any]]],
        progress: Callable[[int], object] = lambda done: None,
    ) -> list[str]:
        """Return a continuation for each (context, settings), without its stop string.

        Args:
            requests: the settings are `until` (a string or several), `max_gen_toks` (256), `repetition_penalty` (1),
                and for sampling `do_sample` (True), `temperature` (1), `top_k` (0, all) and `top_p` (1). Without
                do_sample the most likely token is taken.
            progress: called with the number of requests that are done since its last call.

        Raises:
            ValueError: a setting is unknown or out of range, or with windows there is no room for the prompt.
        """
        groups: dict[str, list[int]] = {}
        options = [_generation(settings) for _, settings in requests]
        for number, option in enumerate(options):
            groups.setdefault(json.dumps(option), []).append(number)
        texts = [""] * len(requests)
        for members in groups.values():
            option = options[members[0]]
            prompts = [self._prompt(requests[number][0], option["max_tokens"]) for number in members]
            done = self._generator.generate(prompts, **option, seed=self.seed, progress=progress)
            for number, text in zip(members, done, strict=True):
                texts[number] = text
        return texts

    def _prompt(self, context: str, generated: int) -> list[int]:
        tokens = self.encode(context) or [self.tokenizer.bos_id]
        if self.long == "carried":
            return tokens
        if generated >= self.max_length:
            raise ValueError(
                f"max_gen_toks: got {generated}, expected fewer than the {self.max_length} tokens of a window; "
                "carry the state"
            )
        return tokens[-(self.max_length - generated) :]


def rolling_windows(
    tokens: Sequence[int], start: int, max_length: int
) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """Yield (context, continuation) of the windows of a text, as lm-evaluation-harness splits it.

    Each token is in one continuation. The last window is moved back so that its inputs are max_length tokens too: what
    it repeats is its context.

    Args:
        tokens: the text.
        start: the token before the first one.
        max_length: inputs of a window.

    Example:
        >>> list(rolling_windows([1, 2, 3, 4, 5], 0, 2))
        [([0], [1, 2]), ([2], [3, 4]), ([3, 4], [5])]
    """
    before = [start, *tokens]  # before[i] is the input whose target is tokens[i]
    for first in range(0, len(tokens), max_length):
        last = min(first + max_length, len(tokens))
        yield before[(max(0, last - max_length) if first else 0) : first + 1], tokens[first:last]


def _generation(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `BatchGenerator.generate` for the settings of a request. Raises ValueError."""
    left = dict(settings)
    until = left.pop("until", None) or []
    limits = [left.pop(name) for name in ("max_gen_toks", "max_new_tokens", "max_tokens") if name in left]
    sampled, temperature, top_p = left.pop("do_sample", False), left.pop("temperature", 1.0), left.pop("top_p", 1.0)
    top_k, penalty = left.pop("top_k", 0), left.pop("repetition_penalty", 1.0)
    for name, neutral in _NEUTRAL.items():
        if name in left and (value := left.pop(name)) not in neutral:
            raise ValueError(f"generation_kwargs: got {name}={value!r}, which is not supported")
    if left:
        raise ValueError(f"generation_kwargs: got {', '.join(left)}, which is not supported")
    return {
        "until": [until] if isinstance(until, str) else list(until),
        "max_tokens": int(limits[0]) if limits else _MAX_GENERATED,
        "temperature": float(temperature) if sampled else 0.0,
        "top_k": int(top_k or 0) if sampled else 0,
        "top_p": float(top_p) if sampled else 1.0,
        "repetition_penalty": float(penalty),
    }
