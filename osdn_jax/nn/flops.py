"""FLOPs per token of training, by formula: matrix products only, with a multiplication and an addition as two.

Model FLOPs are those of the mathematics, whatever the implementation, as in the definition of MFU (PaLM, 2204.02311,
appendix B). A training step executes more: the chunkwise form's products inside a chunk, and whatever rematerialisation
recomputes. A gradient costs two forward passes. The forward pass, per token and (except for the head) per block:

    matrices     2 per weight of the kernels, convolutions included
    head         2 per weight of the head, or of the embedding tied to it
    delta rule   6 H K V, for S^T k, w e^T and S^T q (2102.11174); 4 H K V without the erase term
      in chunks  plus 4 H C (K + V) for chunks of C tokens (2406.06484): k w^T, q w^T, and two products with R
    attention    2 (T + 1) / 2 H (K + V), for q k^T and p v: causal, one segment per sequence (2205.14135)

    window       no more than the window in place of (T + 1) / 2
    latent       attention with heads of K + shared channels
    mixture      the experts that a token is sent to, of all

Elementwise work is not counted, and so neither are the preconditioners, whose states are vectors.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from osdn_jax.nn.config import AttentionConfig, LatentAttentionConfig, Mixer, MixtureConfig, ModelConfig

CHUNK = 64  # tokens in a chunk of the kernels


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs per token of the forward pass.

    Attributes:
        matrices: products with the blocks' parameters.
        head: products with the matrix of the head.
        mixing: the recurrences or attention.
        chunks: what their chunkwise form adds to `mixing`.
    """

    matrices: float
    head: float
    mixing: float
    chunks: float

    @property
    def training(self) -> float:
        """Model FLOPs per token of a training step."""
        return 3 * (self.matrices + self.head + self.mixing)

    def executed(self, remat: str) -> float:
        """Return the FLOPs per token that a training step executes, with rematerialisation.

        Args:
            remat: as in `ModelConfig.remat`. The head's logits are recomputed in any case, as they are never kept.
        """
        recomputed = {
            "none": 0.0,
            "blocks": self.mixing + self.chunks,
            "full": self.matrices + self.mixing + self.chunks,
        }
        return self.training + 3 * self.chunks + self.head + recomputed[remat]


def per_token(config: ModelConfig, parameters: Mapping[str, Any], length: int) -> Flops:
    """Return the FLOPs per token of a model.

    Args:
        config: the model's configuration.
        parameters: {name: array or shape}, as returned by `nn.split_model`.
        length: T, tokens in a sequence.
    """
    sizes = {name: math.prod(x.shape) for name, x in parameters.items()}
    kernels = sum(size for name, size in sizes.items() if name.endswith("/kernel") and name.startswith("blocks/"))
    for block, count in config.counted:
        if isinstance(block.mlp, MixtureConfig):
            kernels += count * 3 * config.width * block.mlp.active * block.mlp.hidden
    mixing = chunks = 0.0
    for block, count in config.counted:
        recurrence, added = _mixing(block.mixer, length)
        mixing, chunks = mixing + count * recurrence, chunks + count * added
    return Flops(
        matrices=2.0 * kernels,
        head=2.0 * sizes["embedding/embedding" if config.tied_embeddings else "head/kernel"],
        mixing=float(mixing),
        chunks=float(chunks),
    )


def _mixing(mixer: Mixer, length: int) -> tuple[float, float]:
    """Return the FLOPs per token of a recurrence or attention, and what its chunkwise form adds."""
    heads, key_and_value = mixer.heads, mixer.key_dim + mixer.value_dim
    if isinstance(mixer, LatentAttentionConfig):
        return (length + 1) * heads * (key_and_value + mixer.shared_key_dim), 0
    if isinstance(mixer, AttentionConfig):
        seen = min(mixer.window or length, length)  # tokens; those at the start of a sequence see fewer
        mean = (seen * (seen + 1) / 2 + (length - seen) * seen) / length
        return 2 * mean * heads * key_and_value, 0
    chunk = CHUNK if mixer.chunk_size is None else mixer.chunk_size
    recurrence = (6 if mixer.erase else 4) * heads * mixer.key_dim * mixer.value_dim
    return recurrence, 4 * heads * min(chunk, length) * key_and_value
