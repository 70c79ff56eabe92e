"""Tokenises documents into records of token ids, in order, in this process or in several."""

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

type Record = tuple[bytes, int, int]  # the ids as bytes, the number of ids, bytes of text

_CHUNK_BYTES = 1 << 20  # text that a worker is given at a time


class Encoder:
    """Tokenises documents in `workers` processes; 1 means this process. Use it as a context manager.

    Args:
        tokenizer: as `load_tokenizer` takes it; every worker loads its own.
        workers: the number of processes.
    """

    def __init__(self, tokenizer: str | os.PathLike[str], workers: int) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._max_pending = 2 * workers
        if workers == 1:
            self._tokenizer = load_tokenizer(tokenizer)
        else:
            # Spawned, not forked: the parent has threads (of the tokenizer and of the progress bar).
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(tokenizer,))

    def encode(self, documents: Iterable[Document]) -> Iterator[Record]:
        """Yield the record of each document, in order. Raises ValueError, naming the document, if it has none."""
        if self._pool is None:
            yield from (_record(document, self._tokenizer) for document in documents)
            return
        pending: deque[Future[list[Record]]] = deque()
        for chunk in _chunks(documents):
            pending.append(self._pool.submit(_records, chunk))
            if len(pending) > self._max_pending:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()

    def __enter__(self) -> "Encoder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Group documents until each group has `_CHUNK_BYTES` of text."""
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document.text)
        if size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _record(document: Document, tokenizer: Tokenizer) -> Record:
    ids = encode_document(document, tokenizer)
    return ids.tobytes(), len(ids), len(document.text)


# In a worker process

_worker_tokenizer: Tokenizer


def _start_worker(tokenizer: str | os.PathLike[str]) -> None:
    global _worker_tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the parent ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _worker_tokenizer = load_tokenizer(tokenizer)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # the parent was killed, so no more work will arrive


def _records(documents: list[Document]) -> list[Record]:
    return [_record(document, _worker_tokenizer) for document in documents]
