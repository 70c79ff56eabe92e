"""Measured choices between implementations: `benchmarks/ops.py` is where the numbers come from."""

import jax

from osdn_jax.ops.arguments import Call


def on_cpu() -> bool:
    """Whether programs run on the CPU unless told otherwise."""
    return jax.default_backend() == "cpu"


def forward_by_scan(call: Call) -> bool:
    """Whether a forward pass alone is faster token by token than in chunks."""
    return on_cpu()


def default_chunk(channel_decay: bool) -> int:
    """Tokens per chunk: decay per channel costs more the longer the chunk, outside the products."""
    return 32 if channel_decay and on_cpu() else 64
