"""A streaming decoder of token ids, for tokenizers in which the text of a token depends on its neighbours."""

from collections.abc import Callable, Container, Iterable, Mapping, Sequence

import numpy as np

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_INCOMPLETE_BYTES = 3  # of a UTF-8 character
_MAX_CONTEXT = 256  # tokens before the stream that are decoded
_MAX_WINDOW = 64  # tokens; a longer window that yields no new text is shortened
_KEPT_TOKENS = 16  # of a window that is shortened
_PROBE = ord("A")  # the byte of a visible character


class TokenDecoder:
    """Decodes ids one at a time: the pieces join to the text of all ids together, and every character is whole.

    The decoder keeps a window of the last few tokens. New text is the window's text with the new token minus its text
    without it. The window is shortened only after a complete character: inside one, the remaining tokens would decode
    to something else.

    The bytes of a byte-fallback tokenizer are joined here. As in SentencePiece, each byte that belongs to no character
    becomes U+FFFD and leaves its neighbours unchanged. The library `tokenizers` turns a whole run of bytes into U+FFFD
    if one of them is invalid, which a stream cannot do to text that it has already emitted.

    Args:
        decode: converts ids to text.
        context: ids before the stream, whose text is not repeated.
        byte_tokens: {id: byte} of the tokens that stand for single bytes, as `find_byte_tokens` returns them.
        skipped: ids that have no text and do not separate the bytes around them.

    Example:
        >>> decoder = TokenDecoder(lambda ids: bytes(ids).decode("utf-8", errors="replace"))
        >>> [decoder.push(token) for token in "né".encode()], decoder.finish()
        (['n', '', 'é'], '')
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
        # A visible character that replaces bytes in the window, which may be half of a character.
        self._placeholder = [i for i, byte in self._bytes.items() if byte == _PROBE]
        self._restart()
        self.push(list(context)[-_MAX_CONTEXT:])

    def _restart(self) -> None:
        self._pending_bytes = b""  # of an incomplete character
        self._anchor: list[int] = []  # the last emitted tokens that are not only blanks
        self._window: list[int] = []
        self._emitted = ""  # the part of the window's text that has been returned
        self._first_new = 0  # index in the window of the first token whose text has not been returned completely

    def push(self, ids: int | Iterable[int] | np.ndarray) -> str:
        """Return the text completed by one or several ids, "" inside a character. Raises as `decode` does."""
        new = np.atleast_1d(np.asarray(ids if isinstance(ids, int | np.integer | np.ndarray) else list(ids))).tolist()
        self._decode(new)  # raises for an invalid id before the state changes
        return "".join([self._push_one(token) for token in new])

    def finish(self) -> str:
        """End the text: return what is pending, U+FFFD for each byte of half a character. The decoder can be reused."""
        pending = self._pending_text() + _REPLACEMENT * len(self._pending_bytes)
        self._restart()
        return pending

    def _push_one(self, token: int) -> str:
        if token in self._skipped:
            return ""
        byte = self._bytes.get(token)
        if byte is not None and byte > 127:
            return self._push_byte(byte)
        replaced = _REPLACEMENT * len(self._pending_bytes)  # the character they began is never completed
        if replaced:
            self._restart_window(b"")
        return replaced + self._push_token(token)

    def _push_byte(self, byte: int) -> str:
        pending_text = self._pending_text()
        characters, pending_bytes = _split_characters(self._pending_bytes + bytes([byte]))
        if pending_text or characters:
            self._restart_window(pending_bytes)
        self._pending_bytes = pending_bytes
        return pending_text + characters

    def _pending_text(self) -> str:
        """Return the text of the window that has not been returned yet."""
        return self._decode(self._window)[len(self._emitted) :]

    def _restart_window(self, pending_bytes: bytes) -> None:
        """Continue as if after a visible character and `pending_bytes`."""
        self._pending_bytes, self._anchor = pending_bytes, self._placeholder
        self._set_window(self._anchor)

    def _set_window(self, window: Sequence[int]) -> None:
        """Replace the window by one whose text has been returned completely."""
        self._window = list(window)
        self._emitted = self._decode(self._window)
        self._first_new = len(self._window)

    def _push_token(self, token: int) -> str:
        self._window.append(token)
        text = self._decode(self._window)
        complete = text.rstrip(_REPLACEMENT)
        ends_whole = complete == text
        if len(self._window) > _MAX_WINDOW:  # of a long run of U+FFFD only the last few can be half a character
            complete = text[: max(len(complete), len(text) - _MAX_INCOMPLETE_BYTES)]
        if complete.startswith(self._emitted):
            new_text = complete[len(self._emitted) :]
        else:  # the new token changed how the emitted ones decode
            new_text = self._decode(self._window[self._first_new :]) if ends_whole else ""
        if ends_whole and new_text:
            self._shorten_window()
        elif len(self._window) > _MAX_WINDOW:
            self._set_window([*self._anchor, *self._window[-_KEPT_TOKENS:]])
            self._emitted = self._emitted[: len(self._emitted) - (len(text) - len(complete))]
            self._first_new = len(self._anchor)
        else:
            self._emitted += new_text
        return new_text

    def _shorten_window(self) -> None:
        """Keep only what later tokens need: those just emitted, after the last ones that were not only blanks.

        A blank token is not enough by itself: decoders drop blanks at the start of a text.
        """
        new = self._window[self._first_new :]
        if self._decode(new).strip():
            self._anchor = new
            self._set_window(new)
        else:
            self._set_window([*self._anchor, *new])


def find_byte_tokens(id_of: Callable[[str], int | None], decode: Callable[[list[int]], str]) -> dict[int, int]:
    """Return {id: byte} of the tokens <0x00> to <0xFF>; {} if the tokenizer decodes them as the text of their names."""
    bytes_of_ids = {i: byte for byte in range(256) if (i := id_of(f"<0x{byte:02X}>")) is not None}
    probe = next((i for i, byte in bytes_of_ids.items() if byte == _PROBE), None)
    return bytes_of_ids if probe is not None and decode([probe]) == chr(_PROBE) else {}


def _split_characters(data: bytes) -> tuple[str, bytes]:
    """Split bytes into characters (U+FFFD for each byte that is in none) and the bytes of an incomplete last one."""
    characters = ""
    while data:
        try:
            return characters + data.decode("utf-8"), b""
        except UnicodeDecodeError as error:
            characters += data[: error.start].decode("utf-8")
            if error.reason == "unexpected end of data":
                return characters, data[error.start :]
            characters += _REPLACEMENT * (error.end - error.start)
            data = data[error.end :]
    return characters, b""
