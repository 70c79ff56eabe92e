"""Measured choices between implementations, all of them from benchmarks/results/ops-cpu.md (two cores, float32).

No other kind of device has been measured: what holds there is reasoned, and says so.
"""

import jax

from osdn_jax.ops.arguments import Call


def on_cpu() -> bool:
    """Whether programs run on the CPU unless told otherwise."""
    return jax.default_backend() == "cpu"


def forward_by_scan(call: Call) -> bool:
    """Whether a forward pass alone is faster token by token than in chunks: on a CPU, whatever the shape.

    Over 72 shapes (section "forward": T 1 to 4096, B H K V from 2^10 to 2^20 numbers, decay none, scalar and channel)
    chunks took 1.0 to 3.3 times the scan's time while the memories fit the cores' caches. Above 2^20 numbers they came
    level (0.92 to 1.3 times) without a decay or with a scalar one, and stayed behind (1.3 to 1.6) with one per channel:
    never enough to choose by shape, and their program takes ten times as long to compile. Many cores would favour
    chunks: measure before changing this for them.

    Other devices start a program per token, so there it is chunks: reasoned, not measured.
    """
    del call  # so far no shape decides otherwise
    return on_cpu()


def default_chunk(channel_decay: bool) -> int:
    """Tokens per chunk, by the time of the forward and backward pass (section "chunks").

    Without a decay or with a scalar one, 32 and 64 are within 10 % of each other for K = V = 128 (32 is up to 15 %
    faster for 64), 16 and 128 behind; 64 keeps half as many memories. A decay per channel costs more the longer the
    chunk, outside the products: 32 is 5 to 15 % faster than 64 and half again as fast as 128. Elsewhere it is 64, which
    tiles of matrix units fit: reasoned, not measured.
    """
    return 32 if channel_decay and on_cpu() else 64
