"""The fixed settings of every kernel, as one table: no user waits for an autotuner, and every run is the same.

Chosen by what the assembler says (`python -m triton_kernels.aot`): no spills in inner loops and as few registers as
that takes. No GPU has timed them.
"""

from typing import NamedTuple

from triton_kernels.common.target import Target


class Settings(NamedTuple):
    """Settings of one kernel.

    Attributes:
        block: channels that a program holds at once, of keys or of values; what it means is the kernel's.
        warps: per program.
        stages: of the software pipeline of its loop.
        slab: key channels of one product in a scan; a product of float32 matrices holds its operands in registers.
    """

    block: int
    warps: int = 4
    stages: int = 1
    slab: int = 128


# By kernel, then by (bits of the inputs, K).
TABLE: dict[str, dict[tuple[int, int], Settings]] = {
    # block: key channels per step of a loop
    "delta_rule_prepare": {
        (16, 32): Settings(32),
        (16, 64): Settings(64),
        (16, 128): Settings(128),
        (16, 256): Settings(128),
        (32, 32): Settings(32),
        (32, 64): Settings(32),
        (32, 128): Settings(32),
        (32, 256): Settings(32),
    },
    # block: key channels per step of a loop
    "delta_rule_decay": {(bits, size): Settings(16) for bits in (16, 32) for size in (32, 64, 128, 256)},
    # block: values, of which a program keeps the columns of the state in registers
    "delta_rule_scan": {
        (16, 32): Settings(32, stages=3),
        (16, 64): Settings(32, stages=3),
        (16, 128): Settings(32, warps=8, stages=2),
        (16, 256): Settings(32, warps=8, stages=3),
        (32, 32): Settings(16),
        (32, 64): Settings(16),
        (32, 128): Settings(8, slab=64),
        (32, 256): Settings(8, warps=8, slab=32),
    },
    "delta_rule_scan_backward": {
        (16, 32): Settings(32),
        (16, 64): Settings(32, warps=8, stages=2),
        (16, 128): Settings(32, warps=8, stages=2),
        (16, 256): Settings(32, warps=8, stages=2),
        (32, 32): Settings(16),
        (32, 64): Settings(16),
        (32, 128): Settings(8, slab=64),
        (32, 256): Settings(8, slab=64),
    },
    # block: values per step of a loop
    "delta_rule_pairs": {(bits, size): Settings(32) for bits in (16, 32) for size in (32, 64, 128, 256)},
    # block: key channels of a program
    "delta_rule_keys": {(bits, size): Settings(16) for bits in (16, 32) for size in (32, 64, 128, 256)},
    "delta_rule_decay_backward": {
        (bits, size): Settings(256 // bits) for bits in (16, 32) for size in (32, 64, 128, 256)
    },
    # block: key channels per step of a loop
    "hypergradient_prepare": {(bits, size): Settings(32, warps=2) for bits in (16, 32) for size in (32, 64, 128, 256)},
    # block: tokens that are loaded at once
    "hypergradient_expand": {(bits, size): Settings(8, warps=1) for bits in (16, 32) for size in (32, 64, 128, 256)},
    "hypergradient_prepare_backward": {
        (bits, size): Settings(4 if size == 256 else 8, warps=1) for bits in (16, 32) for size in (32, 64, 128, 256)
    },
    "hypergradient_gradients": {
        (bits, size): Settings(8 if size < 128 else 4, warps=2 if size == 256 else 1)
        for bits in (16, 32)
        for size in (32, 64, 128, 256)
    },
    # block: tokens of a chunk. Two stages: the next chunk is loaded into registers while one is computed.
    "hypergradient_scan": {
        (16, 32): Settings(64, stages=2),
        (16, 64): Settings(64, stages=2),
        (16, 128): Settings(64, warps=8, stages=2),
        (16, 256): Settings(64, warps=8, stages=2),
        (32, 32): Settings(64, stages=2),
        (32, 64): Settings(64, warps=8, stages=2),
        (32, 128): Settings(64, warps=8, stages=2),
        (32, 256): Settings(64, warps=8),
    },
    "hypergradient_scan_backward": {
        (16, 32): Settings(64, stages=2),
        (16, 64): Settings(64, stages=2),
        (16, 128): Settings(64, warps=8, stages=2),
        (16, 256): Settings(64, warps=8),
        (32, 32): Settings(64, stages=2),
        (32, 64): Settings(64, warps=8, stages=2),
        (32, 128): Settings(64, warps=8, stages=2),
        (32, 256): Settings(64, warps=8),
    },
    # block: key channels of a program
    "gram_scan": {
        **{(bits, 32): Settings(32, warps=8) for bits in (16, 32)},
        **{(bits, size): Settings(64, warps=8, stages=2) for bits in (16, 32) for size in (64, 128, 256)},
    },
    "gram_scan_backward": {
        **{(bits, 32): Settings(32, warps=8) for bits in (16, 32)},
        **{(bits, size): Settings(64, warps=8, stages=2) for bits in (16, 32) for size in (64, 128, 256)},
    },
}

# What differs on some GPUs, by compute capability times 10.
OVERRIDES: dict[int, dict[str, dict[tuple[int, int], Settings]]] = {}


def settings(kernel: str, target: Target, bits: int, size: int) -> Settings:
    """Return the settings of a kernel.

    Args:
        kernel: its name.
        target: what it runs on.
        bits: of the type of the inputs, 16 or 32.
        size: the head dimension that the kernel's entry is keyed by.
    """
    special = OVERRIDES.get(target.capability, {}).get(kernel, {})
    return special.get((bits, size)) or TABLE[kernel][bits, size]
