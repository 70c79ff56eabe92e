"""Measured choices between implementations, all of them from benchmarks/results/ops-cpu.md (two cores, float32).

No other kind of device has been measured: what holds there is reasoned, and says so.
"""

import re
from typing import Any

import jax

from osdn_jax.ops.arguments import Call

# None picks the Mosaic GPU kernels on Hopper once this is True. No GPU has run them yet. Set it when benchmarks/results
# holds a GPU run (`python -m benchmarks.gpu_suite`) in which every check passed and the kernels were the faster.
MOSAIC_GPU_MEASURED = False

_HOPPER = re.compile(r"\b(GH200|H20|H100|H200|H800)\b")


def on_cpu() -> bool:
    """Whether the program is for a CPU: the devices of the mesh in use, or the first of this machine."""
    return _device().platform == "cpu"


def on_hopper() -> bool:
    """Likewise for a Hopper GPU."""
    device = _device()
    return device.platform == "gpu" and _HOPPER.search(device.device_kind) is not None


def _device() -> Any:
    # A mesh may be of devices that are not here: what is compiled ahead of time is for them.
    ambient = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0] if ambient is None else ambient


_CACHED = 2**18  # numbers of all memories that a core's caches hold
_WHOLE_CHUNK = 64  # tokens


def forward_by_scan(call: Call) -> bool:
    """Whether a forward pass alone is faster token by token than in chunks: on a CPU, while the caches hold the memory.

    Over 72 shapes (section "forward": T 1 to 4096, decay none, scalar and channel) chunks took 1.0 to 3.0 times the
    scan's time for memories (B H K V) of up to 2^16 numbers, whatever the length. Those of 2^18 and 2^20 leave the
    caches at every token, and chunks took 0.46 to 0.97 of the scan's time from 64 tokens on, 0.9 to 1.7 for one.

    Other devices start a program per token, so there it is chunks: reasoned, not measured.
    """
    return on_cpu() and (call.memory.size < _CACHED or call.q.shape[1] < _WHOLE_CHUNK)


def default_chunk(channel_decay: bool) -> int:
    """Tokens per chunk, by the time of the forward and backward pass (section "chunks").

    Without a decay or with a scalar one, 32 and 64 are within 10 % of each other for K = V = 128 (32 is up to 15 %
    faster for 64), 16 and 128 behind; 64 keeps half as many memories. A decay per channel costs more the longer the
    chunk, outside the products: 32 was 12 to 18 % faster than 64, and 16 and 128 were behind. Elsewhere it is 64, which
    tiles of matrix units fit: reasoned, not measured.
    """
    return 32 if channel_decay and on_cpu() else 64
