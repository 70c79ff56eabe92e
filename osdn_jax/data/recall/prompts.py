"""Prompts whose answer is to be found in what a model writes, and the score for them."""

import re
from collections.abc import Sequence
from typing import NamedTuple


class Prompt(NamedTuple):
    """A prompt and its answer.

    Attributes:
        text: what the model reads.
        answer: what it should write.
        new_tokens: how many tokens it may write.
        stop: what ends its output; None if only `new_tokens` does.
    """

    text: str
    answer: str
    new_tokens: int
    stop: str | None


def contains(output: str, answer: str) -> bool:
    """Tell whether an answer is part of an output; upper and lower case are the same.

    Args:
        output: what the model wrote after the prompt.
        answer: the answer.

    Example:
        >>> contains(" is 42, of course", "42"), contains(" Venice", "venice"), contains("Rome", "Venice")
        (True, True, False)
    """
    return re.search(re.escape(answer), output, re.IGNORECASE) is not None


def contains_accuracy(prompts: Sequence[Prompt], outputs: Sequence[str]) -> float:
    r"""Return the share of prompts whose answer is in the output, up to the prompt's `stop`.

    Args:
        prompts: of `s_niah` or `read_completions`, at least one.
        outputs: what the model wrote after each prompt.

    Raises:
        ValueError: there are no prompts, or another number of outputs.

    Example:
        >>> prompts = [Prompt("Capital: Venice. Capital:", "Venice", 48, "\n")] * 2
        >>> contains_accuracy(prompts, [" venice.", " Rome\nVenice"])
        0.5
    """
    if not prompts or len(prompts) != len(outputs):
        raise ValueError(f"outputs: got {len(outputs)} for {len(prompts)} prompts, expected one for each, at least one")
    cut = lambda output, stop: output.split(stop)[0] if stop else output
    right = [contains(cut(output, prompt.stop), prompt.answer) for prompt, output in zip(prompts, outputs, strict=True)]
    return sum(right) / len(prompts)
