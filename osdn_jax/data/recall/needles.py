"""Single needles in a haystack, S-NIAH 1 to 3, by RULER's definition."""

import functools
import re
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from osdn_jax.data.byte_tokenizer import ByteTokenizer
from osdn_jax.data.recall.arguments import checked_int, generator
from osdn_jax.data.recall.needle_words import ADJECTIVES, NOUNS
from osdn_jax.data.recall.prompts import Prompt
from osdn_jax.data.shakespeare_works import shakespeare
from osdn_jax.data.tokenizers import Tokenizer

_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
_TEMPLATE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards.\n{context}\nWhat is the special magic {kind} for {key} mentioned in the provided text? The "
    "special magic {kind} for {key} mentioned in the provided text is"
)
_DEPTHS = np.round(np.linspace(0, 100, 40)).astype(int)  # in percent of the sentences
_SENTENCE_END = re.compile(r"[.!?][\"')\]]* ")
_KINDS = {1: "number", 2: "number", 3: "uuid"}


def s_niah(
    variant: int,
    examples: int,
    length: int,
    *,
    tokenizer: Tokenizer | None = None,
    text: str | None = None,
    answer_tokens: int = 128,
    seed: Any = 42,
) -> list[Prompt]:
    """Return prompts with a single needle in a haystack, S-NIAH 1, 2 or 3 of RULER.

    The needle is "One of the special magic numbers for KEY is: VALUE."; the prompt asks for the value after the
    haystack. Keys are an adjective and a noun, such as amber-harbour.

    | variant | haystack | value |
    | --- | --- | --- |
    | 1 | lines "The grass is green. The sky is blue. ..."; the needle is one more line | 7 digits |
    | 2 | the first words of a text; the needle is between two sentences, at one of 40 depths | 7 digits |
    | 3 | as 2 | a UUID |

    The number of lines or words is the largest with which the first prompt and `answer_tokens` fit into `length`, by
    binary search; a prompt that would be longer has fewer. A text that is too short is used whole. RULER reads essays
    of Paul Graham, draws keys from longer lists of words, and splits sentences with NLTK; here the text is Shakespeare
    (or yours), and a sentence ends with ".", "!" or "?" before a blank.

    Args:
        variant: 1, 2 or 3.
        examples: prompts, at least 1.
        length: tokens of a prompt, its start token included, and of its answer.
        tokenizer: counts the tokens. Default: bytes.
        text: the haystack of variants 2 and 3. Default: Shakespeare's works, first the plays that are held out from
            training, 90,000 words.
        answer_tokens: tokens that are left for the answer.
        seed: an integer of at least 0, or a tuple of them.

    Returns:
        The prompts; `contains` scores an output.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument is out of range, the text is blank, or not even one line or word fits the length.

    Source:
        Hsieh et al., "RULER" (https://arxiv.org/abs/2404.06654), and its code, https://github.com/NVIDIA/RULER,
        scripts/data/synthetic/niah.py.

    Example:
        >>> prompt = s_niah(1, 10, 1024)[0]
        >>> len(prompt.text) + 1 + 128  # bytes, the start token and the answer
        1017
        >>> prompt.answer, prompt.answer in prompt.text
        ('6891143', True)
    """
    if variant not in _KINDS or isinstance(variant, bool):
        raise ValueError(f"variant: got {variant!r}, expected 1, 2 or 3")
    examples, length = checked_int("examples", examples, 1), checked_int("length", length, 1)
    answer_tokens = checked_int("answer_tokens", answer_tokens, 0)
    if text is not None and not isinstance(text, str):
        raise TypeError(f"text: got {type(text).__name__}, expected a str or None")
    rng = generator(seed)
    haystack = _Noise() if variant == 1 else _essay(_shakespeare() if text is None else text)
    kind = _KINDS[variant]
    tokens = ByteTokenizer() if tokenizer is None else tokenizer
    found: list[Prompt] = []
    size = None
    for _ in range(examples):
        key = f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
        value = str(rng.integers(10**6, 10**7)) if kind == "number" else str(uuid.UUID(bytes=rng.bytes(16), version=4))
        write = functools.partial(_write, haystack, kind, key, value, rng.random())
        measure = functools.partial(_measure, write, tokens, answer_tokens)
        if size is None:
            size = _largest(measure, length, haystack.units)
        units = size
        while units and measure(units) > length:
            units -= 1
        if not units:
            raise ValueError(f"length: got {length}, expected at least {measure(1)} with this tokenizer")
        found.append(Prompt(write(units), value, answer_tokens, None))
    return found


def _write(haystack: "_Noise | _Essay", kind: str, key: str, value: str, place: float, units: int) -> str:
    """Return the prompt with `units` lines or words of the haystack."""
    context = haystack.with_needle(units, _NEEDLE.format(kind=kind, key=key, value=value), place)
    return _TEMPLATE.format(kind=kind, key=key, context=context)


def _measure(write: Callable[[int], str], tokenizer: Tokenizer, answer_tokens: int, units: int) -> int:
    """Return the tokens of a prompt and its answer."""
    return len(tokenizer.encode(write(units), bos=True)) + answer_tokens


def _largest(measure: Callable[[int], int], length: int, most: int | None) -> int:
    """Return the largest number up to `most` that fits, by doubling and bisection; 0 if not even 1 does."""
    fits = lambda units: measure(units) <= length
    low, high = 0, 1
    while (most is None or high <= most) and fits(high):
        low, high = high, 2 * high
    if most is not None:
        high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


class _Noise:
    """Lines of noise."""

    units = None  # any number of lines

    def with_needle(self, units: int, needle: str, place: float) -> str:
        """Return `units` lines with the needle before one of them; place: 0 to below 1."""
        lines = [_NOISE] * units
        lines.insert(int(place * units), needle)
        return "\n".join(lines)


class _Essay(NamedTuple):
    """The first words of a text.

    Attributes:
        text: the words, with a blank between them.
        word_ends: the end of each word in the text.
        starts: of each sentence.
    """

    text: str
    word_ends: Int[np.ndarray, " W"]
    starts: Int[np.ndarray, " S"]

    @property
    def units(self) -> int:
        """The number of words."""
        return len(self.word_ends)

    def with_needle(self, units: int, needle: str, place: float) -> str:
        """Return `units` words with the needle between two sentences; place: 0 to below 1, of the depths."""
        end = int(self.word_ends[units - 1])
        sentences = int(np.searchsorted(self.starts, end))
        before = int(sentences * (_DEPTHS[int(place * len(_DEPTHS))] / 100))
        start = int(self.starts[before]) if before < sentences else end
        return " ".join(filter(None, (self.text[:start].rstrip(), needle, self.text[start:end])))


@functools.lru_cache(2)
def _essay(text: str) -> _Essay:
    words = text.split()
    if not words:
        raise ValueError("text: got nothing but blanks, expected words")
    joined = " ".join(words)
    starts = [0, *(match.end() for match in _SENTENCE_END.finditer(joined))]
    return _Essay(joined, np.cumsum([len(word) + 1 for word in words]) - 1, np.array(starts))


@functools.cache
def _shakespeare() -> str:
    documents = [*shakespeare("validation"), *shakespeare("train")]
    return "\n".join(document.text.decode("ascii") for document in documents)
