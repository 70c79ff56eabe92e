"""The number of blocks of a kernel that one multiprocessor holds at once.

The rules are those of CUDA's occupancy calculator for compute capability 8.0 to 9.0 ("Compute Capabilities" in the CUDA
C++ Programming Guide).
"""

from typing import NamedTuple


class Multiprocessor(NamedTuple):
    """The most that one multiprocessor holds.

    Attributes:
        warps: at once.
        blocks: at once.
        shared_memory: bytes.
    """

    warps: int
    blocks: int
    shared_memory: int


HOPPER = Multiprocessor(warps=64, blocks=32, shared_memory=233472)  # the H100 and the H200
WARP = 32  # threads
REGISTERS = 65536  # per multiprocessor
PARTITIONS = 4  # of the registers and warps: each warp lies in one partition
REGISTER_UNIT = 256  # allocation unit per warp: 8 registers per thread
SHARED_MEMORY_UNIT = 128  # allocation unit in bytes
RESERVED = 1024  # bytes of shared memory per block that the system reserves


def blocks(registers: int, threads: int, shared_memory: int, of: Multiprocessor = HOPPER) -> int:
    """Return the number of blocks that fit on a multiprocessor, 0 if not even one does.

    Args:
        registers: per thread.
        threads: per block.
        shared_memory: bytes per block, without those that the system reserves.
        of: the multiprocessor; default that of Hopper.
    """
    registers_per_warp = _round_up(max(registers, 1) * WARP, REGISTER_UNIT)
    warps = min(of.warps, PARTITIONS * (REGISTERS // PARTITIONS // registers_per_warp))
    by_shared_memory = of.shared_memory // _round_up(shared_memory + RESERVED, SHARED_MEMORY_UNIT)
    return min(of.blocks, warps // (_round_up(threads, WARP) // WARP), by_shared_memory)


def _round_up(size: int, unit: int) -> int:
    """Return the smallest multiple of unit that is at least size."""
    return -(-size // unit) * unit
