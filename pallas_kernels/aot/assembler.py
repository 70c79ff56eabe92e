"""Parser of the output that the assembler and Mosaic GPU print while a kernel is compiled."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from pallas_kernels.aot import occupancy

_ENTRY = re.compile(r"Compiling entry function '(\w+?)(?:_mosaic_gpu_kernel)?' for")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"ptxas info\s*: Used (\d+) registers(?:, used (\d+) barriers)?")
_LAUNCH = re.compile(r"call .*@mosaic_gpu_(?:build_kernel_spec|launch_kernel)\(ptr %\w+((?:, i32 -?\d+)+), ptr")
# Places in the arguments of a launch: three each for the grid, the cluster and the block, then the shared memory.
_GRID, _BLOCK, _SHARED_MEMORY = slice(0, 3), slice(6, 9), 9
_REMARK_TEXT = re.compile(r"(?:ptxas )?(?:.*; )?(?:warning|info)\s*: (.*)")
_IS_REMARK = re.compile(r"\bwarning\s*:|\(C\d+\)|Potential ")
_CALL = re.compile(
    r'custom_call_target="mosaic_gpu_v2".*?op_name="([^"]*)".*?kernel_hash = "((?:[^"\\]|\\.)*)"'
    r'(?:, module = "((?:[^"\\]|\\.)*)")?'
)
# The name of a kernel inside its module: the only place that has it in a program for several GPUs.
_NAME = re.compile(r"\\00(?!stable_)(\w+)_mosaic_gpu\\00")
_LARGEST_GRID = (2**31 - 1, 65535, 65535)  # along x, y and z; a larger launch aborts the process
_LARGEST_BLOCK = (1024, 1024, 64)
_SPILLED = "Registers are spilled to local memory"  # a warning that repeats the figures of _SPILLS


@dataclass
class Kernel:
    """Resources that one kernel needs on the GPU.

    Args:
        name: as passed to Pallas.
        registers: per thread.
        stack: bytes per thread of the stack frame.
        spill_stores: bytes per thread that are stored because the registers do not hold them.
        spill_loads: bytes per thread that are loaded back.
        barriers: named barriers per block.
        grid: number of blocks along x, y and z; None if no launch was printed.
        block: number of threads of a block along x, y and z; None if no launch was printed.
        shared_memory: bytes per block that the launch requests; None if no launch was printed.
        remarks: warnings of the assembler, such as C7514 (products on the tensor cores wait for each other).
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
        """Spilled bytes per thread: the larger of stores and loads."""
        return max(self.spill_stores, self.spill_loads)

    @property
    def threads(self) -> int | None:
        """Threads per block; None if no launch was printed."""
        return None if self.block is None else math.prod(self.block)

    @property
    def refusals(self) -> list[str]:
        """A message for each axis along which the launch exceeds the limits of CUDA."""
        messages = []
        for unit, sizes, limits in (("blocks", self.grid, _LARGEST_GRID), ("threads", self.block, _LARGEST_BLOCK)):
            for axis, size, limit in zip("xyz", sizes or (), limits, strict=False):
                if size > limit:
                    messages.append(f"{self.name} has {size:,} {unit} along {axis}, a launch takes at most {limit:,}")
        return messages

    @property
    def blocks(self) -> int | None:
        """Blocks that one multiprocessor holds at once; None if no launch was printed."""
        if self.threads is None or self.shared_memory is None:
            return None
        return occupancy.blocks(self.registers, self.threads, self.shared_memory)


def parse(text: str) -> list[Kernel]:
    """Return the kernels in the order in which they were assembled.

    Args:
        text: output of the compiler with MOSAIC_GPU_DUMP_PTXAS and MOSAIC_GPU_DUMP_HOST_LLVM set: for every kernel
            the assembler's report, then the host code with the call that launches the kernel.
    """
    kernels: list[Kernel] = []
    remarks: list[str] = []  # may come before the line that names their kernel
    for line in text.splitlines():
        if entry := _ENTRY.search(line):
            kernels.append(Kernel(entry[1], remarks=remarks))
            remarks = []
        elif _IS_REMARK.search(line):
            remark = _REMARK_TEXT.match(line)
            launched = not kernels or kernels[-1].shared_memory is not None
            if _SPILLED not in line:
                (remarks if launched else kernels[-1].remarks).append((remark[1] if remark else line).strip())
        elif kernels:
            _read_figures(line, kernels[-1])
    return kernels


def of_program(program: str, printed: Sequence[Kernel], known: dict[str, Kernel]) -> list[Kernel]:
    """Return the kernels that a program runs, each once.

    A kernel that this process has compiled before is not compiled again, so the compiler prints nothing about it.

    Args:
        program: the compiled HLO, in the order of execution, which is also the order of compilation.
        printed: kernels that were printed while it was compiled.
        known: kernels of earlier programs by the hash of their code; new ones are added.

    Raises:
        LookupError: the program has no kernel, or nothing was printed about one that is not known.
    """
    unmatched, hashes = list(printed), []
    for path, identity, module in _CALL.findall(program):
        if identity not in known:
            named = _NAME.search(module)
            name = named[1] if named else path.split("/")[-2]
            found = next((kernel for kernel in unmatched if kernel.name == name), None)
            if found is None:
                raise LookupError(f"the assembler printed nothing of {name}")
            unmatched.remove(found)
            known[identity] = found
        if identity not in hashes:
            hashes.append(identity)
    if not hashes:
        raise LookupError("there is no kernel in the program")
    return [known[identity] for identity in hashes]


def _read_figures(line: str, kernel: Kernel) -> None:
    """Enter the figures of a line into a kernel."""
    if found := _SPILLS.search(line):
        kernel.stack, kernel.spill_stores, kernel.spill_loads = (int(number) for number in found.groups())
    elif found := _USED.search(line):
        kernel.registers, kernel.barriers = int(found[1]), int(found[2] or 0)
    elif found := _LAUNCH.search(line):
        arguments = [int(number) for number in re.findall(r"i32 (-?\d+)", found[1])]
        kernel.grid, kernel.block = tuple(arguments[_GRID]), tuple(arguments[_BLOCK])
        kernel.shared_memory = arguments[_SHARED_MEMORY]
