"""The note in a model of the folder that it was loaded from: what is needed to write the same layout again."""

import dataclasses
import hashlib
from collections.abc import Mapping

from osdn_jax.interop.mapping import Shape


@dataclasses.dataclass(frozen=True, eq=False)
class Origin:
    """The folder that a model was loaded from.

    Two are equal if they say the same. Models carry one as a static attribute, so it is compared by a digest.

    Args:
        family: name of the family.
        folder: path of the folder.
        config: text of its config.json.
        tensors: {name in the files: (type such as "BF16", shape)} of the tensors that were loaded.
        left_out: names of tensors of the files that were not loaded.
        metadata: metadata of the files.
    """

    family: str
    folder: str
    config: str
    tensors: Mapping[str, tuple[str, Shape]]
    left_out: tuple[str, ...] = ()
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    digest: str = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Compute the digest of the fields."""
        parts = (self.family, self.folder, self.config, list(self.tensors.items()), self.left_out, dict(self.metadata))
        object.__setattr__(self, "digest", hashlib.sha256(repr(parts).encode()).hexdigest())

    def __eq__(self, other: object) -> bool:
        """Return whether the other says the same."""
        return isinstance(other, Origin) and other.digest == self.digest

    def __hash__(self) -> int:
        """Return the hash of the digest."""
        return hash(self.digest)
