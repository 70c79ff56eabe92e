"""Fingerprints of what a run is trained on: a checkpoint has them, and a run goes on only where they are the same."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from osdn_jax.data import Document, PreparedTokens, Tokenizer

# What they are of, as a checkpoint names them.
TEXT, HELD_OUT, TOKENIZER = "text", "held-out text", "tokenizer"

_ALL = 1 << 22  # tokens of prepared data that are read whole, 16 MB of them
_PIECES, _PIECE = 256, 1 << 14  # pieces that are read of more, and tokens of each


def of_tokenizer(tokenizer: Tokenizer) -> str:
    """Of a tokenizer's file, its number of tokens and its start token."""
    return _digest([tokenizer.fingerprint.encode(), str(tokenizer.vocab_size).encode(), str(tokenizer.bos_id).encode()])


def of_documents(documents: Iterable[Document]) -> str:
    """Of the whole text of documents, in order, without their names: a gigabyte takes about a second."""
    return _digest(document.text for document in documents)


def of_prepared(tokens: PreparedTokens) -> str:
    """Of token shards on disk: their numbers of documents, tokens and bytes of text, and the tokens.

    Up to four million tokens are read, which is all of a small text. Of a larger one it is 256 pieces, spread evenly
    from its first token to its last: another text shows, and so does one with something added or left out, as all that
    follows moves; some words replaced between two pieces by as many tokens and bytes do not.
    """
    total = len(tokens)
    numbers = (total, tokens.documents, tokens.text_tokens, tokens.text_bytes)
    starts = list(range(0, total, _PIECE))
    if total > _ALL:
        starts = [i * (total - _PIECE) // (_PIECES - 1) for i in range(_PIECES)]
    pieces = (tokens.read(start, start + _PIECE).astype(np.int32).tobytes() for start in starts)
    return _digest([repr(numbers).encode(), *pieces])


def of_several(fingerprints: Sequence[str]) -> str:
    """One of several, in order; of one, that itself."""
    return fingerprints[0] if len(fingerprints) == 1 else _digest(part.encode() for part in fingerprints)


def _digest(parts: Iterable[bytes]) -> str:
    hashed = hashlib.blake2b(digest_size=20)
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little"))
        hashed.update(part)
    return hashed.hexdigest()
