"""The text of a continuation, up to the first stop string."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any, Protocol

from osdn_jax.generation import arguments

_ANY_TOKEN = 2**31  # a stopper does not know the vocabulary


class TextDecoder(Protocol):
    """Turns tokens that arrive one at a time into text; `osdn_jax.data.Decoder` is one."""

    def push(self, ids: int) -> str:
        """Return the text that a token completes."""
        ...

    def finish(self) -> str:
        """Return the text that was held back."""
        ...


class TextTokenizer(Protocol):
    """Converts text to tokens and back; a tokenizer of `osdn_jax.data` is one.

    Attributes:
        vocab_size: the largest token plus 1.
        bos_id: the token before every document, which also ends one.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def bos_id(self) -> int: ...

    def encode(self, text: str, *, bos: bool = False) -> Any:
        """Return the tokens of the text, after the start token if `bos`."""
        ...

    def stream_decoder(self, context: Iterable[int] = ()) -> Any:
        """Return a `TextDecoder` of tokens that follow those of `context`."""
        ...


class Stopper:
    """The text of a continuation, which ends before the first stop string, or where the next document starts.

    A stop string is found wherever it lies: in the middle of a token or over several of them.

    Args:
        tokenizer: the tokenizer of the model.
        prompt: the tokens that are continued.
        until: stop strings, or one; empty ones are ignored.
        stop_tokens: tokens that end the text and are not part of it. Default: the start of a document.

    Attributes:
        text: the text so far.
        done: the text is complete.

    Raises:
        ValueError: a token is negative.
        TypeError: an argument has another type.

    Example:
        >>> from osdn_jax.data import load_tokenizer
        >>> stopper = Stopper(load_tokenizer("bytes"), [0], ["nd"])
        >>> [stopper.push(token) for token in b"sand"], stopper.text
        ([False, False, False, True], 'sa')
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        prompt: Sequence[int],
        until: str | Sequence[str],
        stop_tokens: Collection[int] | None = None,
    ) -> None:
        """Start with an empty text."""
        needed = ("stream_decoder", "bos_id") if stop_tokens is None else ("stream_decoder",)
        tokenizer = arguments.tokenizer(tokenizer, needed=needed)
        arguments.tokens("prompt", prompt, _ANY_TOKEN, empty=True)
        ends = (tokenizer.bos_id,) if stop_tokens is None else stop_tokens
        self._ends = frozenset(arguments.token_set("stop_tokens", ends, _ANY_TOKEN).tolist())
        self._until = [stop for stop in arguments.strings("until", until) if stop]
        self._decoder: TextDecoder = tokenizer.stream_decoder(prompt)
        self._reach = max(map(len, self._until), default=1) - 1
        self._taken = 0
        self.text, self.done = "", False

    def push(self, token: int) -> bool:
        """Add a token, and return whether the text is complete."""
        if not self.done:
            if token in self._ends:
                return self.finish()
            self._add(self._decoder.push(token))
        return self.done

    def finish(self) -> bool:
        """End the text with what is left of an incomplete character; return True."""
        if not self.done:
            self._add(self._decoder.finish())
        self.done = True
        return True

    def take(self) -> str:
        """Return the text since the last call, without an end of it that may be the start of a stop string."""
        end = len(self.text)
        if not self.done:
            ends = range(max(0, end - self._reach), end)
            end = next((i for i in ends if any(stop.startswith(self.text[i:]) for stop in self._until)), end)
        taken, self._taken = self.text[self._taken : end], max(end, self._taken)
        return taken

    def _add(self, piece: str) -> None:
        start = max(0, len(self.text) - self._reach)
        self.text += piece
        places = [place for stop in self._until if (place := self.text.find(stop, start)) >= 0]
        if places:
            self.text, self.done = self.text[: min(places)], True
