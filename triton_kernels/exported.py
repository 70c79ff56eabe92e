"""Run the kernels from programs that another machine has written: JAX alone is needed here, no Triton.

jax-triton needs Triton 3.7 or later, and a machine may have an older one that cannot be replaced.
`python -m triton_kernels.export` writes programs for calls of given shapes and types; a folder of them that
TRITON_KERNELS_PROGRAMS names is used instead of the kernels. It needs flatbuffers to read them.
"""

import contextlib
import functools
import importlib.util
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from triton_kernels.common.target import Target

VARIABLE = "TRITON_KERNELS_PROGRAMS"
INDEX = "index.json"
FORMAT = 1

# The arrays of each operator, in the order of its parameters, and its options.
ARRAYS = {
    "delta_rule": ("q", "k", "v", "beta", "write_key", "log_decay", "initial_state", "resets"),
    "hypergradient": ("k", "step", "beta", "log_forget", "resets", "initial", "after_reset", "anchor"),
    "gram": ("k", "log_decay", "gain", "center", "initial", "resets"),
}
OPTIONS = {
    "delta_rule": ("erase", "scale", "splits"),
    "hypergradient": ("bounds", "return_write_key"),
    "gram": ("squash", "return_write_key"),
}

type Results = tuple[jax.Array, jax.Array]


class Call(NamedTuple):
    """One call of an operator, without the values of its arrays.

    Attributes:
        operator: "delta_rule", "hypergradient" or "gram".
        gradient: the gradient in every array that is not boolean, from the arrays and the cotangents of both results.
        arrays: (name, shape, type) of each array that is given, in the order of `ARRAYS`.
        options: (name, value) of each option, in the order of `OPTIONS`.
    """

    operator: str
    gradient: bool
    arrays: tuple[tuple[str, tuple[int, ...], str], ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def text(self) -> str:
        """Return the call in a form for messages."""
        arrays = [f"{name} {kind}[{','.join(map(str, shape))}]" for name, shape, kind in self.arrays]
        options = [f"{name}={value}" for name, value in self.options]
        return f"{self.operator}{', gradient' if self.gradient else ''}: {', '.join([*arrays, *options])}"

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes and types of the arrays by name."""
        return {name: jax.ShapeDtypeStruct(shape, jnp.dtype(kind)) for name, shape, kind in self.arrays}

    def results(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Return the shapes and types of the results: outputs, final state."""
        arrays, options = self.shapes(), dict(self.options)
        if self.operator == "delta_rule":
            return arrays["v"], arrays["initial_state"]
        k = arrays["k"]
        return jax.ShapeDtypeStruct(k.shape, k.dtype if options["return_write_key"] else jnp.float32), arrays["initial"]

    def as_data(self) -> dict[str, Any]:
        """Return the call as the index has it."""
        arrays = {name: {"shape": list(shape), "dtype": kind} for name, shape, kind in self.arrays}
        return {
            "operator": self.operator,
            "gradient": self.gradient,
            "arrays": arrays,
            "options": dict(self.options),
        }

    @staticmethod
    def of_data(data: Mapping[str, Any]) -> "Call":
        """Return the call that an entry of an index describes.

        Raises:
            ValueError: the entry describes no call.
        """
        try:
            name, given, options = data["operator"], data["arrays"], data["options"]
            arrays = tuple(
                (array, tuple(given[array]["shape"]), str(given[array]["dtype"]))
                for array in ARRAYS[name]
                if array in given
            )
            chosen = tuple((option, _hashable(options[option])) for option in OPTIONS[name])
            return Call(name, bool(data["gradient"]), arrays, chosen)
        except (KeyError, TypeError) as error:
            raise ValueError(f"got {dict(data)!r}, expected operator, gradient, arrays and options") from error


class Programs:
    """The programs of a folder.

    Args:
        folder: that `python -m triton_kernels.export` has written.

    Raises:
        ValueError: the folder has no index, or one that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        file = folder / INDEX
        try:
            index = json.loads(file.read_text(encoding="utf-8"))
            if index["format"] != FORMAT:
                raise ValueError(f"got format {index['format']}, expected {FORMAT}")
            self.capability, self.versions = int(index["capability"]), dict(index["versions"])
            self.chunk_sizes = dict(index["chunk_sizes"])
            self.files = {Call.of_data(entry): str(entry["file"]) for entry in index["programs"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{VARIABLE}: cannot read {file}: {error}") from error
        if self.versions.get("jax") != jax.__version__:
            of = f"programs in {folder} were written with jax {self.versions.get('jax')}, this is {jax.__version__}"
            warnings.warn(f"{of}; they may not run", stacklevel=2)

    def run(self, call: Call, *arguments: Any) -> Any:
        """Run the program of a call.

        Args:
            call: what it was written for.
            arguments: the arrays by name, and for a gradient the cotangents of both results.

        Raises:
            NotImplementedError: there is no program for the call.
        """
        return self._program(call).call(*arguments)

    def chunk_size(self, operator: str, dtype: Any, *sizes: int) -> int:
        """Return the tokens of a chunk; see the modules of the kernels."""
        return int(self.chunk_sizes[operator][chunk_key(dtype, *sizes)])

    @functools.cache  # noqa: B019 (a folder of programs lives as long as the process)
    def _program(self, call: Call) -> Any:
        from jax import export

        if call not in self.files:
            raise NotImplementedError(f"no program for {call.text}; {self.folder} has {len(self.files)} others")
        return export.deserialize(bytearray((self.folder / self.files[call]).read_bytes()))


def in_use() -> bool:
    """Return True if calls are to run programs, or to be recorded, instead of the kernels."""
    return bool(_recorders or os.environ.get(VARIABLE))


def programs() -> Programs:
    """Return the programs of the folder that TRITON_KERNELS_PROGRAMS names.

    Raises:
        ValueError: it names none, or the folder has no index that can be read.
    """
    folder = os.environ.get(VARIABLE)
    if not folder:
        raise ValueError(f"{VARIABLE}: got nothing, expected a folder that python -m triton_kernels.export has written")
    return _programs(Path(folder))


@functools.cache
def _programs(folder: Path) -> Programs:
    return Programs(folder)


_recorders: list[Callable[[Call], None]] = []


@contextlib.contextmanager
def recorded() -> Iterator[list[Call]]:
    """Record the calls that are traced inside, each once; nothing is run, and results are zeros.

    A function under jit that has been traced before is not traced again: `jax.clear_caches()`.
    """
    found: dict[Call, None] = {}
    _recorders.append(lambda call: found.setdefault(call))
    calls: list[Call] = []
    try:
        yield calls
    finally:
        _recorders.pop()
        calls += found


def kernels(operator: str) -> SimpleNamespace:
    """Return what the module of an operator's kernels has, by programs: the function, chunk_size and limitation.

    Args:
        operator: "delta_rule", "hypergradient" or "gram".
    """

    def chunk_size(dtype: Any, *sizes: int) -> int | None:
        return None if _recorders else programs().chunk_size(operator, dtype, *sizes)

    return SimpleNamespace(
        **{operator: globals()[operator]}, chunk_size=chunk_size, limitation=lambda *_: _machine_limitation()
    )


def _machine_limitation() -> str | None:
    if _recorders or importlib.util.find_spec("flatbuffers") is not None:
        return None
    return f"{VARIABLE} names programs, which need flatbuffers to be read: pip install flatbuffers"


def chunk_key(dtype: Any, *sizes: int) -> str:
    """Return a type and head dimensions in the form in which an index has them, such as "bfloat16 64 64"."""
    return " ".join([jnp.dtype(dtype).name, *map(str, sizes)])


def delta_rule(*arguments: Any, target: Target, **named: Any) -> Results:
    """Run the program for a call of `triton_kernels.delta_rule.delta_rule`, which has the arguments."""
    names = ("q", "k", "v", "beta")
    defaults = {"write_key": None, "log_decay": None, "erase": True, "resets": None, "splits": None}
    return _run("delta_rule", target, defaults | dict(zip(names, arguments, strict=False)) | named)


def hypergradient(*arguments: Any, target: Target, **named: Any) -> Results:
    """Run the program for a call of `triton_kernels.hypergradient.hypergradient`, which has the arguments."""
    names = ("k", "step", "beta", "log_forget", "resets", "initial", "after_reset", "anchor", "bounds")
    given = {"return_write_key": False} | dict(zip(names, arguments, strict=False)) | named
    bounds = given["bounds"]
    return _run("hypergradient", target, given | {"bounds": None if bounds is None else tuple(map(float, bounds))})


def gram(*arguments: Any, target: Target, **named: Any) -> Results:
    """Run the program for a call of `triton_kernels.gram.gram`, which has the arguments."""
    names = ("k", "log_decay", "gain", "center", "squash", "initial", "resets")
    given = {"return_write_key": False} | dict(zip(names, arguments, strict=False)) | named
    return _run("gram", target, given | {"squash": float(given["squash"])})


def _run(operator: str, target: Target, given: Mapping[str, Any]) -> Results:
    arrays = {name: given[name] for name in ARRAYS[operator] if given[name] is not None}
    described = tuple((name, tuple(x.shape), jnp.dtype(x.dtype).name) for name, x in arrays.items())
    call = Call(operator, False, described, tuple((name, given[name]) for name in OPTIONS[operator]))
    if not _recorders and target.capability != (found := programs().capability):
        has = f"has programs for compute capability {found / 10}"
        raise NotImplementedError(f"{programs().folder} {has}, this GPU has {target.capability / 10}")
    return _differentiable(arrays, call)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _differentiable(arrays: dict[str, jax.Array], call: Call) -> Results:
    out, final = _once(call, call.results(), arrays)
    return out, final


def _forward(arrays: dict[str, jax.Array], call: Call) -> Any:
    return _differentiable(arrays, call), arrays


def _backward(call: Call, arrays: dict[str, jax.Array], cotangents: Results) -> Any:
    given = {name: x for name, x in arrays.items() if x.dtype != bool}
    found = _once(call._replace(gradient=True), given, arrays, tuple(cotangents))
    return ({name: found.get(name) for name in arrays},)


_differentiable.defvjp(_forward, _backward)


def _once(call: Call, results: Any, *arguments: Any) -> Any:
    """Run the program of a call, or record the call and return zeros in place of the results."""
    if _recorders:
        _recorders[-1](call)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), results)
    return programs().run(call, *arguments)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
