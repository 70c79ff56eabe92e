"""The list of cases to compile: each kernel, through the public functions, forward and gradient."""

import fnmatch
from dataclasses import dataclass

DIMENSIONS = ((64, 64), (128, 128), (256, 256), (64, 256), (256, 64), (128, 256))


@dataclass(frozen=True)
class Case:
    """One program to compile.

    Args:
        function: "delta_rule", "hypergradient" or "gram".
        gradient: compile the gradient instead of the forward pass.
        key_dim: K.
        value_dim: V; None for a preconditioner, which has no V.
        decay: "none", "scalar" or "channel" for the delta rule; None for a preconditioner.
        options: differences from the defaults: "documents" (packed documents: the state is reset), "grouped" (half as
            many key heads), "write-key" and "no-erase" for the delta rule; "forget" (with an anchor), "bounds" and
            "documents" for a hypergradient; "documents" for a Gram preconditioner; "multiply" (write keys instead of
            multipliers) for both preconditioners.
        dtype: of q, k, v.
        length: tokens of a sequence.
        batch: sequences.
        heads: of values.
        mapped: size of a vmap around the call; 0 for no vmap.
        sharded: "batch" or "heads" to split that axis over two GPUs; the program may then gather nothing. None for
            one GPU.
    """

    function: str
    gradient: bool
    key_dim: int
    value_dim: int | None = None
    decay: str | None = None
    options: tuple[str, ...] = ()
    dtype: str = "bfloat16"
    length: int = 1024
    batch: int = 2
    heads: int = 4
    mapped: int = 0
    sharded: str | None = None

    @property
    def name(self) -> str:
        """Unique name, such as delta_rule/gradient/channel/K128V256/documents+write-key/float16."""
        size = f"K{self.key_dim}" + ("" if self.value_dim is None else f"V{self.value_dim}")
        direction = "gradient" if self.gradient else "forward"
        fields = [self.function, direction, self.decay, size, "+".join(self.options), self.dtype]
        fields.append(f"B{self.batch}H{self.heads}" if (self.batch, self.heads) != (2, 4) else "")
        fields.append(f"T{self.length}" if self.length != 1024 else "")
        fields.append(f"vmap{self.mapped}" if self.mapped else "")
        fields.append(f"two-gpus-{self.sharded}" if self.sharded else "")
        return "/".join(field for field in fields if field)


def all_cases() -> list[Case]:
    """Return the list of cases in the order of compilation."""
    cases = []
    for gradient in (False, True):
        for dims in ((64, 64), (128, 128), (256, 256)):
            cases.append(Case("delta_rule", gradient, *dims, "none"))
        cases.append(Case("delta_rule", gradient, 128, 128, "none", ("no-erase",)))
    for decay in ("scalar", "channel"):
        for gradient in (False, True):
            for dims in DIMENSIONS:
                cases.append(Case("delta_rule", gradient, *dims, decay))
            for options in (("no-erase",), ("documents",)):
                cases.append(Case("delta_rule", gradient, 128, 128, decay, options))
        cases.append(Case("delta_rule", True, 128, 128, decay, ("grouped", "write-key")))
        cases.append(Case("delta_rule", True, 128, 128, decay, dtype="float16"))
        cases.append(Case("delta_rule", True, 256, 256, decay, ("no-erase",)))
        cases.append(Case("delta_rule", True, 256, 256, decay, ("documents", "grouped", "write-key")))
    all_options = ("forget", "bounds", "documents")
    write_keys = (*all_options, "multiply")
    cases.append(Case("hypergradient", False, 128))
    for size in (64, 128, 256):
        cases.append(Case("hypergradient", False, size, options=write_keys))
        cases.append(Case("hypergradient", True, size, options=("multiply",)))
        cases.append(Case("hypergradient", True, size, options=all_options))
        cases.append(Case("hypergradient", True, size, options=write_keys))
    for option in all_options:
        cases.append(Case("hypergradient", True, 128, options=(option, "multiply")))
    for size in (64, 128, 256):
        cases.append(Case("gram", True, size, options=("multiply",)))
    for option in ("multiply", "documents"):
        cases.append(Case("gram", False, 128, options=(option,)))
    cases.append(Case("gram", True, 128, options=("documents",), dtype="float32"))
    cases.append(Case("gram", True, 128, options=("documents", "multiply"), dtype="float16"))
    for dtype in ("float16", "float32"):
        cases.append(Case("hypergradient", True, 128, options=write_keys, dtype=dtype))
    return cases + _many_blocks() + _sharded()


def _many_blocks() -> list[Case]:
    """Return cases with more chunks than the 65,535 blocks that a launch takes along y and z."""
    cases = [Case("delta_rule", False, 64, 64, "scalar", length=2**22)]
    cases += [Case("delta_rule", True, 256, 256, decay, length=2**20) for decay in ("scalar", "channel")]
    cases += [Case("hypergradient", True, 64, options=("bounds",), length=2**22)]
    cases += [Case("delta_rule", gradient, 64, 64, "scalar", length=2**14, mapped=256) for gradient in (False, True)]
    cases += [Case(name, True, 64, length=2**14, mapped=2**17) for name in ("hypergradient", "gram")]
    return cases


def _sharded() -> list[Case]:
    """Return cases that are split over two GPUs, each of which works alone."""
    cases = []
    for split in ("batch", "heads"):
        for gradient in (False, True):
            cases.append(Case("delta_rule", gradient, 64, 64, "scalar", ("grouped", "documents"), sharded=split))
            for name in ("hypergradient", "gram"):
                cases.append(Case(name, gradient, 64, options=("documents", "multiply"), sharded=split))
        cases.append(Case("delta_rule", True, 64, 64, "channel", sharded=split))
    return cases


def matching(pattern: str) -> list[Case]:
    """Return the cases whose name contains the pattern; * matches any characters and ? any one character."""
    return [case for case in all_cases() if fnmatch.fnmatchcase(case.name, f"*{pattern}*")]
