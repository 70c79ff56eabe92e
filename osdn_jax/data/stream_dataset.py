"""The windows of `StreamedWindows` as a grain data set."""

from typing import Any

import grain
import grain.experimental
import numpy as np

from osdn_jax.data.streamed_windows import StreamedWindows, digest
from osdn_jax.data.streams import DocumentStream
from osdn_jax.data.tokenizers import encode_document
from osdn_jax.data.windows import Window, cut_window


def shuffled_windows(
    source: StreamedWindows, stream: DocumentStream, *, window_size: int, seed: int
) -> grain.IterDataset[Window]:
    """Return the windows over a stream, `window_size` of them shuffled together by `seed`; 1 keeps their order."""
    windows: grain.IterDataset[Window] = _WindowDataset(source, stream)
    if window_size > 1:
        windows = grain.experimental.WindowShuffleIterDataset(windows, window_size=window_size, seed=seed)
    return windows


class _WindowDataset(grain.IterDataset[Window]):
    def __init__(self, source: StreamedWindows, stream: DocumentStream) -> None:
        super().__init__()
        self._source, self._stream = source, stream

    def __iter__(self) -> "_WindowIterator":
        self._stream.set_state(None)
        return _WindowIterator(self._source, self._stream)


class _WindowIterator(grain.DatasetIterator[Window]):
    """Cuts windows from the stream.

    A window uses the first tokens of its last document; the next window starts with the remaining ones. The state is
    the stream's position before that document and the number of its tokens that are used.
    """

    def __init__(self, source: StreamedWindows, stream: DocumentStream) -> None:
        super().__init__()
        self._source, self._stream = source, stream
        self._restart()

    def _restart(self) -> None:
        self._remaining = np.empty(0, np.int32)  # tokens of the last document read that are in no window yet
        self._document_position = self._stream.get_state()  # where that document starts
        self._used = 0  # its tokens, start token included, that are in a window

    def __next__(self) -> Window:
        length = self._source.sequence_length
        parts, missing = [self._remaining], length + 1 - len(self._remaining)
        used = self._used
        document = self._remaining
        while missing > 0:
            self._document_position, document = self._next_document()
            used = 0
            parts.append(document)
            missing -= len(document)
        # The last token of this window's targets is the first of the next one's inputs.
        left_over = 1 - missing
        self._used = used + len(document) - left_over
        self._remaining = document[len(document) - left_over :]
        tokens = np.concatenate(parts)[: length + 1]
        return cut_window(tokens, length, self._source.tokenizer.bos_id)

    def _next_document(self) -> tuple[dict[str, Any], np.ndarray]:
        """Return (the stream's position before the next document, its start token and tokens)."""
        source, restarted = self._source, False
        while True:
            position = self._stream.get_state()
            document = next(self._stream, None)
            if document is None:
                if restarted:
                    raise ValueError("the stream holds no documents to train on")
                restarted = True
                self._stream.set_state(None)
            elif digest(document) not in source.held_out:
                ids = encode_document(document, source.tokenizer).astype(np.int32)
                return position, np.concatenate([np.full(1, source.tokenizer.bos_id, np.int32), ids])

    def get_state(self) -> dict[str, Any]:
        return {"before": self._document_position, "used": self._used}

    def set_state(self, state: dict[str, Any]) -> None:
        self._stream.set_state(state["before"])
        self._restart()
        if state["used"]:
            self._document_position, document = self._next_document()
            self._used = state["used"]
            self._remaining = document[self._used :]
