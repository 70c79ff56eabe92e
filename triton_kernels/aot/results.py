"""The kernels of a run, each compiled once, with the cases that use it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from pallas_kernels.aot.cases import Case
from pallas_kernels.aot.workers import in_workers
from triton_kernels.aot.compiler import Outcome, compile_kernel
from triton_kernels.aot.launches import Trace, Use, trace
from triton_kernels.aot.specialization import Specialization


@dataclass
class Result:
    """A kernel with what it is compiled for, and how that went.

    Args:
        label: unique in a run, the same in every run.
        uses: the launches of it.
        outcome: of compiling it.
    """

    label: str
    uses: list[Use]
    outcome: Outcome = field(default_factory=Outcome)

    @property
    def cases(self) -> list[str]:
        """Return the names of the cases that launch it, each once."""
        return list(dict.fromkeys(use.case for use in self.uses))


def traces(cases: Sequence[Case], capability: int, jobs: int) -> Iterator[Trace]:
    """Yield what each case launches, in order; see `compile_each` for the arguments."""
    died = lambda case, _: Trace(case.name, status="failed", message="the process that traced it ended")
    return in_workers(trace, [(case, capability) for case in cases], jobs, died)


def gather(found: Iterable[Trace]) -> dict[Specialization, list[Use]]:
    """Return the launches by kernel with what it is compiled for, each once."""
    kernels: dict[Specialization, list[Use]] = {}
    for one in found:
        for specialization, use in one.launches:
            kernels.setdefault(specialization, []).append(use)
    return kernels


def compile_each(kernels: dict[Specialization, list[Use]], capability: int, jobs: int) -> Iterator[Result]:
    """Yield the result of compiling each kernel, in order.

    Args:
        kernels: what `gather` returns.
        capability: compute capability times 10 of the GPU.
        jobs: number of worker processes.
    """
    died = lambda *_: Outcome(message="the compiler ended its process")
    outcomes = in_workers(compile_kernel, [(kernel, capability) for kernel in kernels], jobs, died)
    labels: dict[str, int] = {}
    for (specialization, uses), outcome in zip(kernels.items(), outcomes, strict=True):
        label = specialization.label
        labels[label] = labels.get(label, 0) + 1
        if labels[label] > 1:  # the same types and constants, but not of the same parameters
            label = f"{label} ({labels[label]})"
        yield Result(label, uses, outcome)
