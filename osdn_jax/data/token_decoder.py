"""Text of token ids as they are sampled, for tokenizers where the text of a token depends on those around it."""

from collections.abc import Callable, Container, Iterable, Mapping, Sequence

import numpy as np

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_LONGEST_TAIL = 3  # bytes of a character that is not complete
_CONTEXT = 256  # tokens before the stream that are looked at
_WINDOW = 64  # tokens after which a window without new text is cut down
_KEPT = 16  # of them
_PROBE = ord("A")  # the byte of a visible character


class TokenDecoder:
    """Decodes ids one after the other: the text is that of all ids together, and every character is whole.

    New text is what the last few tokens, the window, say with the new one and did not say without it. The window is cut
    only behind a complete character: in the middle of one the tokens that are left would say something else.

    Bytes of a byte-fallback tokenizer are put together here. As in SentencePiece each byte that belongs to no character
    is U+FFFD and leaves those beside it as they are; the library `tokenizers` makes all bytes in a row U+FFFD if one of
    them is, which a stream cannot do to what it has said.

    Args:
        decode: ids to text.
        context: ids before the stream, whose text is not repeated.
        byte_tokens: {id: byte} of the tokens that stand for a single byte, as `byte_tokens` finds them.
        skipped: ids that have no text and do not separate the bytes around them.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        context: Iterable[int] | np.ndarray = (),
        *,
        byte_tokens: Mapping[int, int] | None = None,
        skipped: Container[int] = (),
    ) -> None:
        self._decode, self._bytes = decode, byte_tokens or {}
        self._skipped = skipped
        # A visible character to stand in the window for the bytes before it, which may be half of one.
        self._stand_in = [i for i, byte in self._bytes.items() if byte == _PROBE]
        self._restart()
        self.push(list(context)[-_CONTEXT:])

    def _restart(self) -> None:
        self._pending = b""  # bytes of a character that is not complete
        self._anchor: list[int] = []  # the last tokens that are more than blanks
        self._window: list[int] = []
        self._told = ""  # what is out of the window's text
        self._new = 0  # where in the window the tokens start that are not out as a whole

    def push(self, ids: int | Iterable[int] | np.ndarray) -> str:
        """The text completed by one id or several; "" while a character is incomplete. Raises as `decode` does."""
        new = np.atleast_1d(np.asarray(ids if isinstance(ids, int | np.integer | np.ndarray) else list(ids))).tolist()
        self._decode(new)  # raises for what is no id before anything has changed
        return "".join([self._push(token) for token in new])

    def finish(self) -> str:
        """What is left at the end, U+FFFD for half a character. The decoder can then be reused."""
        rest = self._held() + _REPLACEMENT * len(self._pending)
        self._restart()
        return rest

    def _push(self, token: int) -> str:
        if token in self._skipped:
            return ""
        byte = self._bytes.get(token)
        if byte is not None and byte > 127:
            return self._push_byte(byte)
        cut_short = _REPLACEMENT * len(self._pending)
        if cut_short:
            self._stand(b"")
        return cut_short + self._push_token(token)

    def _push_byte(self, byte: int) -> str:
        held = self._held()
        said, pending = _characters(self._pending + bytes([byte]))
        if held or said:
            self._stand(pending)
        self._pending = pending
        return held + said

    def _held(self) -> str:
        """The text of the window that is not out."""
        return self._decode(self._window)[len(self._told) :]

    def _stand(self, pending: bytes) -> None:
        """Goes on as after a visible character, and bytes."""
        self._pending, self._anchor = pending, self._stand_in
        self._show(self._anchor)

    def _show(self, window: Sequence[int]) -> None:
        """Takes another window, all of whose text is out."""
        self._window = list(window)
        self._told = self._decode(self._window)
        self._new = len(self._window)

    def _push_token(self, token: int) -> str:
        self._window.append(token)
        text = self._decode(self._window)
        complete = text.rstrip(_REPLACEMENT)
        whole = complete == text
        if len(self._window) > _WINDOW:  # of so many U+FFFD in a row only the last few can be half a character
            complete = text[: max(len(complete), len(text) - _LONGEST_TAIL)]
        if complete.startswith(self._told):
            said = complete[len(self._told) :]
        else:  # what is out reads otherwise by now
            said = self._decode(self._window[self._new :]) if whole else ""
        if whole and said:
            self._cut()
        elif len(self._window) > _WINDOW:
            self._show([*self._anchor, *self._window[-_KEPT:]])
            self._told = self._told[: len(self._told) - (len(text) - len(complete))]
            self._new = len(self._anchor)
        else:
            self._told += said
        return said

    def _cut(self) -> None:
        """Leaves of the window what the next tokens need: those just said, behind the last that were not blank.

        A blank token alone would not do: at the start of a text decoders leave out blanks.
        """
        new = self._window[self._new :]
        if self._decode(new).strip():
            self._anchor = new
            self._show(new)
        else:
            self._show([*self._anchor, *new])


def byte_tokens(id_of: Callable[[str], int | None], decode: Callable[[list[int]], str]) -> dict[int, int]:
    """{id: byte} of the tokens <0x00> to <0xFF> of a vocabulary; {} where the tokenizer takes them for text."""
    found = {i: byte for byte in range(256) if (i := id_of(f"<0x{byte:02X}>")) is not None}
    probe = next((i for i, byte in found.items() if byte == _PROBE), None)
    return found if probe is not None and decode([probe]) == chr(_PROBE) else {}


def _characters(data: bytes) -> tuple[str, bytes]:
    """The characters of bytes, U+FFFD for each that is in none, and the bytes of one that is not complete yet."""
    said = ""
    while data:
        try:
            return said + data.decode("utf-8"), b""
        except UnicodeDecodeError as error:
            said += data[: error.start].decode("utf-8")
            if error.reason == "unexpected end of data":
                return said, data[error.start :]
            said += _REPLACEMENT * (error.end - error.start)
            data = data[error.end :]
    return said, b""
