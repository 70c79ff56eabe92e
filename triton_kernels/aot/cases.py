"""The list of cases to compile: each kernel, through the public functions, forward and gradient."""

import dataclasses
import fnmatch

from pallas_kernels.aot.cases import Case

BATCH, HEADS, LENGTH = 1, 2, 32768  # few heads and a long sequence, which must still fill the GPU
_ALL = ("documents", "grouped", "write-key")
_MODES = ((), _ALL, ("no-erase",), ("no-erase", *_ALL))  # every option once with and once without the others
_DECAYS = ("none", "scalar", "channel")


def all_cases() -> list[Case]:
    """Return the list of cases in the order of compilation."""
    return [*_delta_rule(), *_preconditioners()]


def _delta_rule() -> list[Case]:
    cases = []
    for decay in _DECAYS:
        for gradient in (False, True):
            for size in (64, 128):
                for options in _MODES:
                    cases.append(Case("delta_rule", gradient, size, size, decay, options))
        for size in (32, 256):
            cases.append(Case("delta_rule", True, size, size, decay, _ALL))
        cases.append(Case("delta_rule", True, 128, 128, decay, _ALL, dtype="float16"))
        for size in (32, 64, 128, 256):
            cases.append(Case("delta_rule", True, size, size, decay, _ALL, dtype="float32"))
        for size in (64, 128):
            cases.append(_split(Case("delta_rule", True, size, size, decay)))
        # Triton makes constants of the sizes that are 1.
        cases.append(Case("delta_rule", True, 64, 64, decay, batch=1, heads=1, length=1))
    for dims in ((64, 128), (128, 64), (32, 256), (256, 32)):
        cases.append(Case("delta_rule", True, *dims, "scalar"))
    for dtype in ("bfloat16", "float32"):
        cases.append(Case("delta_rule", False, 64, 64, "scalar", dtype=dtype, length=2**22))
    return cases


def _preconditioners() -> list[Case]:
    cases = []
    all_options = ("forget", "bounds", "documents")
    write_keys = (*all_options, "multiply")
    for size in (32, 64, 128, 256):
        for gradient in (False, True):
            for hypergradient in ((), all_options, ("multiply",), write_keys):
                cases.append(Case("hypergradient", gradient, size, options=hypergradient))
            for gram in ((), ("documents", "multiply")):
                cases.append(Case("gram", gradient, size, options=gram))
    for dtype in ("float16", "float32"):
        for size in (64, 128):
            cases.append(Case("hypergradient", True, size, options=write_keys, dtype=dtype))
            cases.append(Case("gram", True, size, options=("documents", "multiply"), dtype=dtype))
    for size in (64, 128):
        cases.append(_split(Case("hypergradient", True, size, options=("bounds", "multiply"))))
        cases.append(_split(Case("gram", True, size, options=("multiply",))))
    cases.append(Case("hypergradient", True, 64, options=("bounds", "multiply"), batch=1, heads=1, length=1))
    cases.append(Case("gram", True, 64, options=("multiply",), batch=1, heads=1, length=1))
    return cases


def fills_the_gpu(case: Case) -> bool:
    """Return True for a case whose kernels must have at least as many programs as the GPU has multiprocessors."""
    return (case.batch, case.heads, case.length) == (BATCH, HEADS, LENGTH)


def _split(case: Case) -> Case:
    return dataclasses.replace(case, batch=BATCH, heads=HEADS, length=LENGTH)


def matching(pattern: str) -> list[Case]:
    """Return the cases whose name contains the pattern; * matches any characters and ? any one character."""
    return [case for case in all_cases() if fnmatch.fnmatchcase(case.name, f"*{pattern}*")]
