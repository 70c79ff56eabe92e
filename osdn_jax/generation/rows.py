"""One row of a batch on the host: its tokens so far, its text, and whether it has ended."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from osdn_jax.generation.request import Request
from osdn_jax.generation.stopper import Stopper, TextTokenizer

Finish = Literal["length", "stop_token", "stop_string"]


class Chunk(NamedTuple):
    """A new token of one continuation.

    Attributes:
        prompt: index of the prompt.
        token: the token, which may be a stop token; None only for a continuation of no tokens.
        text: the text that it completes, without a stop string; "" without a tokenizer. Text that may become a stop
            string, and half a character, come with a later token.
        finish: None, or why the continuation has ended: "length" (max_tokens), "stop_token" or "stop_string".
    """

    prompt: int
    token: int | None
    text: str
    finish: Finish | None


class Row:
    """The continuation of one prompt, as its tokens arrive.

    Args:
        index: index of the prompt.
        prompt: the tokens that are continued.
        request: the options of all prompts.
        tokenizer: the tokenizer of its text, or None.

    Attributes:
        finish: None, or why it has ended.
    """

    def __init__(self, index: int, prompt: Sequence[int], request: Request, tokenizer: TextTokenizer | None) -> None:
        """Start without tokens."""
        self._index, self._ends = index, frozenset(request.stop_tokens.tolist())
        self._most, self._count = request.max_tokens[index], 0
        self._stopper = None if tokenizer is None else Stopper(tokenizer, prompt, request.stop, self._ends)
        self.finish: Finish | None = None if self._most else "length"

    def chunk(self, token: int | None) -> Chunk:
        """Add a token and return what it adds.

        Raises:
            ValueError: the token is -1, which stands for one that could not be drawn.
        """
        if token is not None:
            if token < 0:
                raise ValueError(
                    f"token {self._count} of prompt {self._index} cannot be drawn: the model's logits are NaN, or -inf "
                    "for all allowed tokens"
                )
            self._count += 1
            self.finish = self._ended_by(token)
        return Chunk(self._index, token, self._text(), self.finish)

    def _ended_by(self, token: int) -> Finish | None:
        stopped = self._stopper is not None and self._stopper.push(token)
        if token in self._ends:
            return "stop_token"
        if stopped:
            return "stop_string"
        return "length" if self._count >= self._most else None

    def _text(self) -> str:
        if self._stopper is None:
            return ""
        if self.finish is not None:
            self._stopper.finish()
        return self._stopper.take()
