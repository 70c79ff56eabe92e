"""Registries of implementations, and the choice for `implementation=None`.

The choices for a CPU were measured (benchmarks/results/ops-cpu.md, two cores, float32). No other type of device has
been measured; choices for those are marked as unmeasured.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from osdn_jax.ops.calls import DeltaRuleCall
from triton_kernels.common import target

# If True, None picks the Mosaic GPU kernels on Hopper. No GPU has run them yet. Set it when benchmarks/results holds a
# GPU run (`python -m benchmarks.gpu_suite`) in which every check passed and the kernels were the fastest.
MOSAIC_GPU_MEASURED = False

# The same for the Triton kernels, on NVIDIA GPUs of compute capability 8.0 or later. No GPU has run them yet.
TRITON_MEASURED = False

_HOPPER = re.compile(r"\b(GH200|H20|H100|H200|H800)\b")

Results = tuple[jax.Array, jax.Array]


class Implementation(NamedTuple):
    """One way to compute an operator: an entry of its IMPLEMENTATIONS.

    A new back end is one function and one such entry, placed before the entries that it takes precedence over.

    Attributes:
        run: (call, options) -> (outputs, final state), both in the accumulator type. A preconditioner with
            options.write_key returns write keys in the type of k. The scan has a third argument, loop, by default
            `lax.scan`.
        limitation: (call, options) -> why run cannot serve the call on this device, beginning with the argument's
            name, or None if it can.
        preferred: (call, gradient) -> True if None should pick this entry, by measurement; gradient is True for a call
            that is differentiated. The first preferred entry without a limitation is picked.
        mixes_segments: True if a non-finite value may leave its packed segment, as in masked matrix products (0 * NaN
            is NaN). `dispatch` then recomputes such calls with the scan.
        by_default: what None runs in place of run, if not None: the same results, faster, but without forward-mode
            differentiation.
    """

    run: Callable[..., Results]
    limitation: Callable[[Any, Any], str | None] = lambda call, options: None
    preferred: Callable[[Any, bool], bool] = lambda call, gradient: False
    mixes_segments: bool = True
    by_default: Callable[..., Results] | None = None


Registry = Mapping[str, Implementation]
Items = tuple[tuple[str, Implementation], ...]  # items of a registry: hashable, so they can be static under jit


def choose(implementations: Registry, call: Any, options: Any, *, gradient: bool = False) -> str:
    """Return the name of the default implementation: the first preferred one without a limitation.

    Args:
        implementations: the operator's registry, in order of preference.
        call: checked arrays, a NamedTuple of `osdn_jax.ops.calls`.
        options: its static options.
        gradient: True if the call is differentiated.

    Raises:
        NotImplementedError: there is none.
    """
    for name, entry in implementations.items():
        if entry.preferred(call, gradient) and entry.limitation(call, options) is None:
            return name
    raise NotImplementedError("implementation: got None, but no implementation serves this call; name one")


def on_cpu() -> bool:
    """Return True if the devices of the mesh in use, or else the first device of this process, are CPUs."""
    return _device().platform == "cpu"


def on_hopper() -> bool:
    """Return True if the devices of the mesh in use, or else the first device of this process, are Hopper GPUs."""
    device = _device()
    return device.platform == "gpu" and _HOPPER.search(device.device_kind) is not None


def on_triton_gpu() -> bool:
    """Return True if the devices of the mesh in use, or else the first device, can run the Triton kernels."""
    return target.limitation() is None


def _device() -> Any:
    # In ahead-of-time compilation the mesh in use describes devices that are absent.
    ambient = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0] if ambient is None else ambient


_SMALL_STATE = 64 * 64  # elements of one head's state, 16 KB: half of a small L1 cache
_FEW_HEADS = 8
_FEW_TOKENS = 16


def forward_by_scan(call: DeltaRuleCall) -> bool:
    """Return True if the scan is faster than chunks for a forward pass alone: on a CPU, for few and small heads.

    At every token the scan reads and writes all states. For a few heads whose states fit in the L1 cache, that takes
    K V operations per head at the speed of the vector units, and XLA compiles a token to a few loops. A chunk has a
    fixed cost of many small operations, but its work per token and head grows with K + V more than with K V, and most
    of it runs at the higher speed of matrix products. So chunks win as soon as a state is larger than 64 x 64, and for
    smaller ones from about 8 heads on, over all rows of the batch. With a decay per channel a chunk has more to do, and
    it is 16 heads. A sequence of less than 16 tokens takes less than one chunk's fixed time.

    Measured over the grid of the section "forward" (K = V = 32 to 128, 1 to 128 heads, 64 to 4,096 tokens). Other
    devices launch a program per token, so chunks are picked there (unmeasured).
    """
    batch, heads, key_dim, value_dim = call.state.shape
    few = batch * heads <= _FEW_HEADS * (2 if call.channel_decay else 1)
    return on_cpu() and ((few and key_dim * value_dim <= _SMALL_STATE) or call.q.shape[1] < _FEW_TOKENS)


def default_chunk(call: DeltaRuleCall) -> int:
    """Return the tokens per chunk of the delta rule, by the time of forward and backward (section "chunks").

    On a CPU 32 and 64 are within 10 % of each other without a decay or with a scalar one; with heads of at most 64 the
    products of a chunk of 32 are a third fewer. But the gradient saves twice as many states, which dominate its memory
    if the batch is a single row. With a decay per channel the work outside the products grows with the chunk.

    Other devices get 64, which fits the tiles of matrix units (unmeasured).
    """
    if not on_cpu():
        return 64
    batch, _, *head = call.state.shape
    return 32 if call.channel_decay or (batch > 1 and max(head) <= 64) else 64


DEFAULT_PRECONDITIONER_CHUNK = 64  # tokens
