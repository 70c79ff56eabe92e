"""Token shards on disk: the manifest, the files, the reader and the encoder. `osdn_jax.data.prepare` writes them."""

from osdn_jax.data.shards.manifest import Manifest, Shard, load_manifest
from osdn_jax.data.shards.reader import PreparedTokens, is_prepared

__all__ = ["Manifest", "PreparedTokens", "Shard", "is_prepared", "load_manifest"]
