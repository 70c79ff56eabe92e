"""Windows over a document stream, tokenised while it is read, with a position that can be saved."""

import hashlib
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from osdn_jax.data.documents import Document
from osdn_jax.data.streams import DocumentStream
from osdn_jax.data.tokenizers import Tokenizer
from osdn_jax.data.windows import Window, checked_count

if TYPE_CHECKING:
    import grain


def digest(document: Document) -> bytes:
    """Return the hash that identifies a held-out document by its text."""
    return hashlib.blake2b(document.text, digest_size=16).digest()


class StreamedWindows:
    """Windows over the documents of a stream, a source for `training_batches`. Endless: at its end the stream restarts.

    Args:
        open: (shard_index, shard_count) -> the stream of one process's share of the documents.
        tokenizer: as `load_tokenizer` returns it.
        sequence_length: T, at least 1.
        held_out: the `digest`s of documents to leave out.
        shuffle: the number of windows that are shuffled together; 1 keeps the order of the stream. When training is
            resumed, up to this many windows are tokenised again.

    Raises:
        TypeError: `sequence_length` or `shuffle` is not an integer.
        ValueError: `sequence_length` or `shuffle` is below 1.

    Example:
        >>> from osdn_jax.data import ByteTokenizer, HubStream, training_batches
        >>> def open_share(index, count):
        ...     return HubStream("hf:HuggingFaceFW/fineweb-edu", shard_index=index, shard_count=count)
        >>> windows = StreamedWindows(open_share, ByteTokenizer(), 1024, shuffle=256)

        `training_batches(windows, batch_size=8, seed=0)` then connects to the hub.
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

    def dataset(self, *, seed: int, shard_index: int = 0, shard_count: int = 1) -> "grain.IterDataset[Window]":
        """Return the windows of one process, shuffled by `seed`."""
        from osdn_jax.data.stream_dataset import shuffled_windows

        return shuffled_windows(self, self._open(shard_index, shard_count), window_size=self._shuffle, seed=seed)
