"""Windows over a stream of documents that is tokenised as it is read, at a position that is saved."""

import hashlib
from collections.abc import Callable, Collection
from typing import Any

import grain
import grain.experimental
import numpy as np

from osdn_jax.data.documents import Document
from osdn_jax.data.streams import DocumentStream
from osdn_jax.data.tokenizers import Tokenizer, encode_document
from osdn_jax.data.windows import Window, checked_count, cut_window


def digest(document: Document) -> bytes:
    """What a document is known by among those held out."""
    return hashlib.blake2b(document.text, digest_size=16).digest()


class StreamedWindows:
    """Windows over the documents of a stream, for `training_batches`; endless: the stream starts again at its end.

    open: (shard_index, shard_count) -> the stream of a process's share of the documents.
    held_out: the `digest`s of documents to leave out.
    shuffle: how many windows are shuffled together; they are tokenised again when training is resumed. 1 is no shuffle.

    Raises TypeError for a length or shuffle that is no integer, ValueError for one below 1.
    """

    def __init__(
        self,
        open: Callable[[int, int], DocumentStream],
        tokenizer: Tokenizer,
        sequence_length: int,
        *,
        held_out: Collection[bytes] = (),
        shuffle: int = 1,
    ) -> None:
        self.sequence_length = checked_count("sequence length", sequence_length)
        self.tokenizer = tokenizer
        self.held_out = frozenset(held_out)
        self._open, self._shuffle = open, checked_count("shuffle", shuffle)

    def dataset(self, *, seed: int, shard_index: int = 0, shard_count: int = 1) -> grain.IterDataset[Window]:
        """The windows of one process."""
        windows: grain.IterDataset[Window] = _Windows(self, self._open(shard_index, shard_count))
        if self._shuffle > 1:
            windows = grain.experimental.WindowShuffleIterDataset(windows, window_size=self._shuffle, seed=seed)
        return windows


class _Windows(grain.IterDataset[Window]):
    def __init__(self, source: StreamedWindows, stream: DocumentStream) -> None:
        super().__init__()
        self._source, self._stream = source, stream

    def __iter__(self) -> "_Iterator":
        self._stream.set_state(None)
        return _Iterator(self._source, self._stream)


class _Iterator(grain.DatasetIterator[Window]):
    """Its state: the stream's position before the document that the next window starts in, and how far into it.

    Of the tokens read, a window leaves the rest of its last document, and the next window begins with that.
    """

    def __init__(self, source: StreamedWindows, stream: DocumentStream) -> None:
        super().__init__()
        self._source, self._stream = source, stream
        self._restart()

    def _restart(self) -> None:
        self._tokens = np.empty(0, np.int32)  # those of the last document read that are not in a window yet
        self._before = self._stream.get_state()  # where that document starts
        self._used = 0  # tokens of it, start token included, that are in a window

    def __next__(self) -> Window:
        length = self._source.sequence_length
        parts, missing = [self._tokens], length + 1 - len(self._tokens)
        used = self._used
        document = self._tokens
        while missing > 0:
            self._before, document = self._next_document()
            used = 0
            parts.append(document)
            missing -= len(document)
        # The last token of this window's targets is the first of the next one's inputs.
        rest = 1 - missing
        self._used = used + len(document) - rest
        self._tokens = document[len(document) - rest :]
        tokens = np.concatenate(parts)[: length + 1]
        return cut_window(tokens, length, self._source.tokenizer.bos_id)

    def _next_document(self) -> tuple[dict[str, Any], np.ndarray]:
        """(the stream's position before it, the start token and the tokens of the next document)."""
        source, ended = self._source, False
        while True:
            before = self._stream.get_state()
            document = next(self._stream, None)
            if document is None:
                if ended:
                    raise ValueError("the stream holds no documents to train on")
                ended = True
                self._stream.set_state(None)
            elif digest(document) not in source.held_out:
                ids = encode_document(document, source.tokenizer).astype(np.int32)
                return before, np.concatenate([np.full(1, source.tokenizer.bos_id, np.int32), ids])

    def get_state(self) -> dict[str, Any]:
        return {"before": self._before, "used": self._used}

    def set_state(self, state: dict[str, Any]) -> None:
        self._stream.set_state(state["before"])
        self._restart()
        if state["used"]:
            self._before, document = self._next_document()
            self._used = state["used"]
            self._tokens = document[self._used :]
