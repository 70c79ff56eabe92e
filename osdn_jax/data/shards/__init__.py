"""Token shards on disk: their manifest, their files, reading and encoding them. `prepare` writes them."""

from osdn_jax.data.shards.manifest import Manifest, Shard, load_manifest
from osdn_jax.data.shards.reader import PreparedTokens, is_prepared

__all__ = ["Manifest", "PreparedTokens", "Shard", "is_prepared", "load_manifest"]
