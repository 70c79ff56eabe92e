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

    Over 72 shapes (section "forward": T 1 to 4096, decay none, scalar and channel) chunks took 1.03 to 3.3 times the
    scan's time for memories (B H K V) of up to 2^16 numbers. For 2^18 and 2^20, which leave the cores' caches, it was
    0.92 to 0.99 times with a scalar decay beyond one token, 1.3 to 1.6 times with one per channel, and 1.0 to 1.5 times
    without (but for one shape, 0.75, between its neighbours' 1.02 and 1.26): never enough to choose by shape, for a
    program that takes ten times as long to compile. Many cores would favour chunks: measure before choosing for them.

    Other devices start a program per token, so there it is chunks: reasoned, not measured.
    """
    del call  # so far no shape decides otherwise
    return on_cpu()


def default_chunk(channel_decay: bool) -> int:
    """Tokens per chunk, by the time of the forward and backward pass (section "chunks").

    Without a decay or with a scalar one, 32 and 64 are within 10 % of each other for K = V = 128 (32 is up to 15 %
    faster for 64), 16 and 128 behind; 64 keeps half as many memories. A decay per channel costs more the longer the
    chunk, outside the products: 32 was 5 to 15 % faster than 64, and half again as fast as 128, when `scores` formed
    blocks of 8 elementwise; with blocks of 4, as now, 32 and 64 are level. Elsewhere it is 64, which
    tiles of matrix units fit: reasoned, not measured.
    """
    return 32 if channel_decay and on_cpu() else 64
