"""Shakespeare's works, one xz file inside the package: see PROVENANCE.md for what the text is and where it is from."""

import functools
import lzma
from importlib import resources
from typing import Literal

from osdn_jax.data.documents import Document

# Whole plays, one of each kind: history, tragedy, comedy, romance.
VALIDATION_PLAYS = ("john", "julius_caesar", "taming_of_the_shrew", "winters_tale")

_FILE = "shakespeare_works.xz"


@functools.cache
def _works() -> tuple[Document, ...]:
    data = lzma.decompress(resources.files("osdn_jax.data").joinpath(_FILE).read_bytes())
    # The file is `name \n text` joined by NUL, which neither part can hold.
    records = (record.partition(b"\n") for record in data.split(b"\0"))
    return tuple(Document(name.decode("ascii"), text) for name, _, text in records)


def shakespeare(split: Literal["train", "validation"]) -> list[Document]:
    """Plays and poems in alphabetical order: 38 documents (4.5 MB) to train on, 4 whole plays (0.5 MB) held out.

    The text is ASCII with "\\n" line ends. Raises ValueError for any other `split`.
    """
    if split not in ("train", "validation"):
        raise ValueError(f'split must be "train" or "validation"; got {split!r}')
    return [work for work in _works() if (work.name in VALIDATION_PLAYS) == (split == "validation")]
