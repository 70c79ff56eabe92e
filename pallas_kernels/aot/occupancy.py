"""How many blocks of a kernel one multiprocessor holds at once.

The rules are those of CUDA's occupancy calculator for compute capability 9.0, which is that of the H100 and the H200
("Compute Capabilities" in the CUDA C++ Programming Guide).
"""

WARP = 32  # threads
WARPS = 64  # per multiprocessor
BLOCKS = 32
REGISTERS = 65536
PARTITIONS = 4  # of the registers and warps: a warp is in one
REGISTER_UNIT = 256  # per warp: 8 per thread
SHARED_MEMORY = 233472  # bytes
SHARED_MEMORY_UNIT = 128
RESERVED = 1024  # bytes of shared memory per block, for the system


def blocks(registers: int, threads: int, shared_memory: int) -> int:
    """Blocks that a multiprocessor has room for; 0 where there is none for one.

    Args:
        registers: per thread.
        threads: per block.
        shared_memory: bytes per block, without those that the system reserves.
    """
    per_warp = _up(max(registers, 1) * WARP, REGISTER_UNIT)
    warps = min(WARPS, PARTITIONS * (REGISTERS // PARTITIONS // per_warp))
    by_memory = SHARED_MEMORY // _up(shared_memory + RESERVED, SHARED_MEMORY_UNIT)
    return min(BLOCKS, warps // (_up(threads, WARP) // WARP), by_memory)


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
