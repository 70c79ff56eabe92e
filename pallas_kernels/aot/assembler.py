"""Reads what the assembler and Mosaic print of each kernel while it is compiled."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from pallas_kernels.aot import occupancy

_ENTRY = re.compile(r"Compiling entry function '(\w+?)(?:_mosaic_gpu_kernel)?' for")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"ptxas info\s*: Used (\d+) registers(?:, used (\d+) barriers)?")
_LAUNCH = re.compile(r"call .*@mosaic_gpu_(?:build_kernel_spec|launch_kernel)\(ptr %\w+((?:, i32 -?\d+)+), ptr")
# Of the numbers of a launch: first three each of the grid, the cluster and the block.
_GRID, _BLOCK, _SHARED_MEMORY = slice(0, 3), slice(6, 9), 9
_REMARK = re.compile(r"(?:ptxas )?(?:.*; )?(?:warning|info)\s*: (.*)")
_REMARKS = re.compile(r"\bwarning\s*:|\(C\d+\)|Potential ")
_CALL = re.compile(
    r'custom_call_target="mosaic_gpu_v2".*?op_name="([^"]*)".*?kernel_hash = "((?:[^"\\]|\\.)*)"'
    r'(?:, module = "((?:[^"\\]|\\.)*)")?'
)
_NAME = re.compile(
    r"\\00(?!stable_)(\w+)_mosaic_gpu\\00"
)  # in the module; a program for several GPUs names it only here
_LARGEST_GRID = (2**31 - 1, 65535, 65535)  # along x, y and z; a launch of more ends the process
_LARGEST_BLOCK = (1024, 1024, 64)
_SPILLED = "Registers are spilled to local memory"  # the same again, as a warning


@dataclass
class Kernel:
    """What one kernel needs on the GPU.

    Args:
        name: as given to Pallas.
        registers: per thread.
        stack, spill_stores, spill_loads: bytes per thread.
        barriers: named barriers per block.
        grid, block: blocks, and threads of a block, along x, y and z; None where no launch was printed.
        shared_memory: bytes per block that its launch asks for; None where no launch was printed.
        remarks: the assembler's warnings (C7514, say: products on the tensor cores that wait for each other).
    """

    name: str
    registers: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    barriers: int = 0
    grid: tuple[int, ...] | None = None
    block: tuple[int, ...] | None = None
    shared_memory: int | None = None
    remarks: list[str] = field(default_factory=list)

    @property
    def spill(self) -> int:
        """Bytes per thread that have no place in registers: the larger of stores and loads."""
        return max(self.spill_stores, self.spill_loads)

    @property
    def threads(self) -> int | None:
        """Threads per block; None where no launch was printed."""
        return None if self.block is None else math.prod(self.block)

    @property
    def refusals(self) -> list[str]:
        """Why CUDA would not launch it, in words: what is above its limits along an axis."""
        found = []
        for what, sizes, limits in (("blocks", self.grid, _LARGEST_GRID), ("threads", self.block, _LARGEST_BLOCK)):
            for axis, size, limit in zip("xyz", sizes or (), limits, strict=False):
                if size > limit:
                    found.append(f"{self.name} has {size:,} {what} along {axis}, a launch takes at most {limit:,}")
        return found

    @property
    def blocks(self) -> int | None:
        """Blocks that one multiprocessor holds at once; None where no launch was printed."""
        if self.threads is None or self.shared_memory is None:
            return None
        return occupancy.blocks(self.registers, self.threads, self.shared_memory)


def parse(text: str) -> list[Kernel]:
    """The kernels in the order in which they were assembled.

    Args:
        text: what the compiler printed with MOSAIC_GPU_DUMP_PTXAS and MOSAIC_GPU_DUMP_HOST_LLVM set. For every kernel
            that is first the assembler's report and then the host's code, which holds the call that launches it.
    """
    kernels: list[Kernel] = []
    remarks: list[str] = []  # a kernel's may come before the line that names it
    for line in text.splitlines():
        if entry := _ENTRY.search(line):
            kernels.append(Kernel(entry[1], remarks=remarks))
            remarks = []
        elif _REMARKS.search(line):
            remark = _REMARK.match(line)
            started = kernels and kernels[-1].shared_memory is None
            if _SPILLED not in line:
                (kernels[-1].remarks if started else remarks).append((remark[1] if remark else line).strip())
        elif kernels:
            _read(line, kernels[-1])
    return kernels


def of_program(program: str, printed: Sequence[Kernel], known: dict[str, Kernel]) -> list[Kernel]:
    """The kernels that a program runs, each once.

    A kernel that has been compiled in this process is not compiled again, and nothing is printed of it.

    Args:
        program: the compiled HLO, in the order of execution, which is that of compilation.
        printed: what was printed while it was compiled.
        known: the kernels of earlier programs by the hash of their code; those of this one are added.

    Raises:
        LookupError: there is no kernel, or nothing was printed of one that is not known.
    """
    left, hashes = list(printed), []
    for path, identity, module in _CALL.findall(program):
        if identity not in known:
            named = _NAME.search(module)
            name = named[1] if named else path.split("/")[-2]
            found = next((kernel for kernel in left if kernel.name == name), None)
            if found is None:
                raise LookupError(f"the assembler printed nothing of {name}")
            left.remove(found)
            known[identity] = found
        if identity not in hashes:
            hashes.append(identity)
    if not hashes:
        raise LookupError("there is no kernel in the program")
    return [known[identity] for identity in hashes]


def _read(line: str, kernel: Kernel) -> None:
    if found := _SPILLS.search(line):
        kernel.stack, kernel.spill_stores, kernel.spill_loads = (int(number) for number in found.groups())
    elif found := _USED.search(line):
        kernel.registers, kernel.barriers = int(found[1]), int(found[2] or 0)
    elif found := _LAUNCH.search(line):
        numbers = [int(number) for number in re.findall(r"i32 (-?\d+)", found[1])]
        kernel.grid, kernel.block = tuple(numbers[_GRID]), tuple(numbers[_BLOCK])
        kernel.shared_memory = numbers[_SHARED_MEMORY]
