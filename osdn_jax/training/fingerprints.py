"""Fingerprints of the text and tokenizer of a run: a checkpoint has them, and a run resumes only if they match."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from osdn_jax.data import Document, PreparedTokens, Tokenizer
from osdn_jax.data.recall import Recall

# Their names in a checkpoint.
TEXT, HELD_OUT, TOKENIZER = "text", "held-out text", "tokenizer"

_ALL = 1 << 22  # prepared data of at most this many tokens (16 MB) are read whole
_PIECES, _PIECE = 256, 1 << 14  # number of samples that are read of more, and tokens of each


def of_tokenizer(tokenizer: Tokenizer) -> str:
    """Return the fingerprint of a tokenizer: of its file, its number of tokens and its start token."""
    return _digest([tokenizer.fingerprint.encode(), str(tokenizer.vocab_size).encode(), str(tokenizer.bos_id).encode()])


def of_documents(documents: Iterable[Document]) -> str:
    """Return the fingerprint of the text of documents, in order, without names: about a second per gigabyte."""
    return _digest(document.text for document in documents)


def of_prepared(tokens: PreparedTokens) -> str:
    """Return the fingerprint of token shards on disk: of the tokens and the numbers of documents, tokens and bytes.

    Up to four million tokens are read, which is all of a small text. Of a larger one, 256 evenly spaced samples are
    read, from the first token to the last: another text is detected, and so are insertions and deletions, because they
    shift everything after them; a replacement between two samples by as many tokens and bytes is not.
    """
    total = len(tokens)
    numbers = (total, tokens.documents, tokens.text_tokens, tokens.text_bytes)
    starts = list(range(0, total, _PIECE))
    if total > _ALL:
        starts = [i * (total - _PIECE) // (_PIECES - 1) for i in range(_PIECES)]
    samples = (tokens.read(start, start + _PIECE).astype(np.int32).tobytes() for start in starts)
    return _digest([repr(numbers).encode(), *samples])


def of_examples(text: str, examples: Recall) -> str:
    """Return the fingerprint of a task: of its text, the number of examples and the first thousand of them."""
    tokens, targets = (np.ascontiguousarray(array[:1000]) for array in examples)
    return _digest([text.encode(), str(len(examples.tokens)).encode(), tokens.tobytes(), targets.tobytes()])


def of_several(fingerprints: Sequence[str]) -> str:
    """Return one fingerprint of several, in order; a single one is returned as it is."""
    return fingerprints[0] if len(fingerprints) == 1 else _digest(part.encode() for part in fingerprints)


def _digest(parts: Iterable[bytes]) -> str:
    hashed = hashlib.blake2b(digest_size=20)
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little"))
        hashed.update(part)
    return hashed.hexdigest()
