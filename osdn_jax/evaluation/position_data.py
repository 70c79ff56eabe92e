"""Windows of equal length for perplexity by position."""

import itertools
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Int32

from osdn_jax.data import Document, Tokenizer


def position_windows(
    documents: Iterable[Document], tokenizer: Tokenizer, *, length: int, batch_size: int, limit: int | None = None
) -> Iterator[Int32[np.ndarray, "B S"]]:
    """Yield batches of windows of length + 1 tokens, cut from documents one after another.

    The token that starts a document stands between two of them, and the state is not reset there: a window of short
    documents shows how a model copes with its own past, one of a long document how it uses it. What is left at the end
    of the text is dropped.

    Args:
        documents: the text.
        tokenizer: the tokenizer of the run.
        length: tokens that are scored in a window.
        batch_size: windows in a batch; the last batch may have fewer.
        limit: windows, at most. Default: all.

    Raises:
        ValueError: length or batch_size is below 1, or the text is shorter than a window.

    Example:
        >>> from osdn_jax.data import load_tokenizer
        >>> text = [Document("a", b"To be, or not to be")]
        >>> [batch.shape for batch in position_windows(text, load_tokenizer(), length=6, batch_size=2)]
        [(2, 7), (1, 7)]
    """
    for name, value in (("length", length), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    windows = itertools.islice(_windows(documents, tokenizer, length), limit)
    first = next(windows, None)
    if first is None:
        raise ValueError(f"length: got {length}, but the text has no window of {length + 1} tokens")
    for batch in itertools.batched(itertools.chain([first], windows), batch_size):
        yield np.stack(batch)


def _windows(documents: Iterable[Document], tokenizer: Tokenizer, length: int) -> Iterator[Int32[np.ndarray, " S"]]:
    """Yield windows whose first token is the last one of the window before it."""
    left = np.zeros(0, np.int32)
    for document in documents:
        try:
            tokens = tokenizer.encode(document.text.decode("utf-8", errors="replace"), bos=True)
        except ValueError as error:
            raise ValueError(f"document {document.name!r}: {error}") from error
        left = np.concatenate([left, tokens])
        while len(left) > length:
            yield left[: length + 1]
            left = left[length:]
