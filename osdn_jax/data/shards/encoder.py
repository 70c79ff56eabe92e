"""Documents to records of token ids, in this process or in several, in order."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from types import TracebackType

from osdn_jax.data.documents import Document
from osdn_jax.data.tokenizers import Tokenizer, encode_document, load_tokenizer

type Record = tuple[bytes, int, int]  # the bytes of the ids, how many they are, bytes of text

_PIECE = 1 << 20  # bytes of text that a worker is given at a time


class Encoder:
    """Tokenises documents in `workers` processes; 1 is this process. Use as a context manager."""

    def __init__(self, tokenizer: str | os.PathLike[str], workers: int) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._ahead = 2 * workers
        if workers == 1:
            self._tokenizer = load_tokenizer(tokenizer)
        else:
            # Not forked: the parent has threads (a tokenizer's, a progress bar's).
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(tokenizer,))

    def encode(self, documents: Iterable[Document]) -> Iterator[Record]:
        """The records of documents, in their order. Raises ValueError, naming the document, for what has none."""
        if self._pool is None:
            yield from (_record(document, self._tokenizer) for document in documents)
            return
        waiting: deque[Future[list[Record]]] = deque()
        for piece in _pieces(documents):
            waiting.append(self._pool.submit(_records, piece))
            if len(waiting) > self._ahead:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()

    def __enter__(self) -> "Encoder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _pieces(documents: Iterable[Document]) -> Iterator[list[Document]]:
    piece: list[Document] = []
    size = 0
    for document in documents:
        piece.append(document)
        size += len(document.text)
        if size >= _PIECE:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def _record(document: Document, tokenizer: Tokenizer) -> Record:
    ids = encode_document(document, tokenizer)
    return ids.tobytes(), len(ids), len(document.text)


# In a worker

_workers_own: Tokenizer


def _start(tokenizer: str | os.PathLike[str]) -> None:
    global _workers_own
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _workers_own = load_tokenizer(tokenizer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # it was killed, and nobody will ask for more


def _records(documents: list[Document]) -> list[Record]:
    return [_record(document, _workers_own) for document in documents]
