"""Operations of training per token, by formula: products alone, a multiplication and an addition each.

Model FLOPs are those of the mathematics, whatever the implementation, as in the definition of MFU (PaLM, 2204.02311,
appendix B). A step does more: the chunkwise form's products inside of a chunk, and what rematerialisation computes
again. A gradient costs two forward passes. Of a forward pass, per token and block but for the head:

    matrices     2 for each number of the kernels, convolutions included
    head         2 for each number of the head, or of the embedding that is tied to it
    delta rule   6 H K V, for S^T k, w e^T and S^T q (2102.11174); 4 H K V where nothing is erased
      in chunks  4 H C (K + V) besides, for chunks of C tokens (2406.06484): k w^T, q w^T, and two products with R
    attention    2 (T + 1) / 2 H (K + V), for q k^T and p v: causal, without documents (2205.14135)

Elementwise work is left out, and with it the preconditioners, whose states are vectors.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from osdn_jax.nn.config import AttentionConfig, ModelConfig

CHUNK = 64  # tokens, of the kernels


@dataclasses.dataclass(frozen=True)
class Flops:
    """Per token, of the forward pass.

    Args:
        matrices: products with the blocks' parameters.
        head: products with the matrix of the head.
        mixing: the recurrences or attention.
        chunks: what their chunkwise form does besides.
    """

    matrices: float
    head: float
    mixing: float
    chunks: float

    @property
    def training(self) -> float:
        """Model FLOPs of a training step per token."""
        return 3 * (self.matrices + self.head + self.mixing)

    def executed(self, remat: str) -> float:
        """What a training step does per token, with the rematerialisation of `ModelConfig.remat`.

        The head's logits are computed once more whatever it is, as they are never kept.
        """
        again = {"none": 0.0, "blocks": self.mixing + self.chunks, "full": self.matrices + self.mixing + self.chunks}
        return self.training + 3 * self.chunks + self.head + again[remat]


def per_token(config: ModelConfig, parameters: Mapping[str, Any], length: int) -> Flops:
    """FLOPs per token of a model.

    Args:
        config: of the model.
        parameters: its arrays or their shapes by name, as of `nn.split_model`.
        length: T, tokens of a sequence.
    """
    sizes = {name: math.prod(x.shape) for name, x in parameters.items()}
    kernels = sum(size for name, size in sizes.items() if name.endswith("/kernel") and name.startswith("blocks/"))
    mixer = config.mixer
    heads, states = mixer.heads, mixer.key_dim * mixer.value_dim
    both = mixer.key_dim + mixer.value_dim
    if isinstance(mixer, AttentionConfig):
        mixing, chunks = (length + 1) * heads * both, 0
    else:
        chunk = CHUNK if mixer.chunk_size is None else mixer.chunk_size
        mixing, chunks = (6 if mixer.erase else 4) * heads * states, 4 * heads * min(chunk, length) * both
    return Flops(
        matrices=2.0 * kernels,
        head=2.0 * sizes["embedding/embedding" if config.tied_embeddings else "head/kernel"],
        mixing=float(config.layers * mixing),
        chunks=float(config.layers * chunks),
    )
