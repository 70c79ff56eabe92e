"""Shakespeare's works, an xz file inside the package; PROVENANCE.md describes the text and its source."""

import functools
import lzma
from importlib import resources
from typing import Literal

from osdn_jax.data.documents import Document

# Whole plays: a history, a tragedy, a comedy and a romance.
VALIDATION_PLAYS = ("john", "julius_caesar", "taming_of_the_shrew", "winters_tale")

_FILE = "shakespeare_works.xz"


@functools.cache
def _works() -> tuple[Document, ...]:
    data = lzma.decompress(resources.files("osdn_jax.data").joinpath(_FILE).read_bytes())
    # The file is `name \n text` joined by NUL, which neither a name nor a text can hold.
    records = (record.partition(b"\n") for record in data.split(b"\0"))
    return tuple(Document(name.decode("ascii"), text) for name, _, text in records)


def shakespeare(split: Literal["train", "validation"]) -> list[Document]:
    r"""Return plays and poems in alphabetical order, as ASCII with "\n" line ends.

    Args:
        split: "train" for 38 documents (4.5 MB), "validation" for 4 whole plays (0.5 MB), `VALIDATION_PLAYS`.

    Returns:
        The documents; each call returns a new list.

    Raises:
        ValueError: `split` is neither of the two.

    Example:
        >>> [work.name for work in shakespeare("validation")]
        ['john', 'julius_caesar', 'taming_of_the_shrew', 'winters_tale']
    """
    if split not in ("train", "validation"):
        raise ValueError(f'split must be "train" or "validation"; got {split!r}')
    return [work for work in _works() if (work.name in VALIDATION_PLAYS) == (split == "validation")]
