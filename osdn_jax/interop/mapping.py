"""One table from the tensors of a file to our parameters, which both directions of the conversion read.

Files of PyTorch store a projection as [outputs, inputs] and this package as [inputs, outputs], and both fuse several
projections into one tensor, in different ways. A `Row` names the pieces that its tensors and its parameters consist of:

    Row(
        keys=(Key("q.weight", {"query": 64}), Key("k.weight", {"key": 16}), Key("v.weight", {"value": 16})),
        parameters={"project/kernel": ("query", "key", "value")},
    )

Loading cuts the tensors into pieces along the outputs and joins the pieces of each parameter; saving does the inverse.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Key:
    """A tensor of a file, [..., outputs, inputs] or [outputs].

    Args:
        name: its name in the file; with "{expert}" it stands for one tensor per expert, which are stacked.
        pieces: {name: number of outputs in each group}, in their order in the tensor; None for one piece, which is a
            whole parameter.
        groups: number of groups that the outputs are divided into, each with every piece, as in tensors that are
            grouped by heads. Default: 1.
        also: other names that the tensor may have in a file.
        copies: names under which a file may hold the same values again, as a head tied to the embedding.
        shape: shape in the file of a vector with further axes of length 1, or of a tensor without elements. Default:
            None, the natural one.
    """

    name: str
    pieces: Mapping[str, int] | None = None
    groups: int = 1
    also: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()
    shape: Shape | None = None

    @property
    def outputs(self) -> int:
        """Number of outputs of a tensor whose pieces are named."""
        return self.groups * sum((self.pieces or {}).values())


@dataclasses.dataclass(frozen=True)
class Row:
    """Tensors of a file and the parameters with the same elements.

    Args:
        keys: the tensors.
        parameters: {path of the parameter: its pieces, in their order along its last axis}. Empty for tensors without
            elements, whose keys have a shape.
        experts: number of experts that "{expert}" in the names of keys runs over. Default: None, no such names.
        transpose: the parameters are [..., inputs, outputs]. Default: True; False for vectors and tables, whose
            parameter is the tensor itself.
        convolution: the tensors are [channels, 1, taps]. Default: False.
        any_widths: each tensor may have another share of the outputs than its own, as long as their concatenation is
            the same: Transformers saves the fused convolution of OLMo Hybrid in equal parts. Default: False.
    """

    keys: tuple[Key, ...]
    parameters: Mapping[str, tuple[str, ...]]
    experts: int | None = None
    transpose: bool = True
    convolution: bool = False
    any_widths: bool = False

    def shapes(self, parameters: Mapping[str, Shape]) -> list[Shape]:
        """Return the shape of each key's tensor, without the axis of experts, from the shapes of the parameters."""
        if not self.parameters:
            return [key.shape or (0,) for key in self.keys]
        name, *_ = self.parameters
        shape = parameters[name]
        if self.experts is not None:
            shape = shape[1:]
        if not self.transpose:
            return [key.shape or ((*shape[:-1], key.outputs) if key.pieces else shape) for key in self.keys]
        *rest, inputs, outputs = shape
        middle = (1,) if self.convolution else ()
        return [key.shape or (*rest, key.outputs if key.pieces else outputs, *middle, inputs) for key in self.keys]

    def load(self, tensors: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Return the parameters of the keys' tensors; those of experts are stacked along their first axis."""
        axis = -2 if self.transpose else -1
        arrays = [self._natural(key, tensor) for key, tensor in zip(self.keys, tensors, strict=True)]
        if self.any_widths:
            borders = np.cumsum([key.outputs for key in self.keys])[:-1]
            arrays = np.split(np.concatenate(arrays, axis), borders, axis)
        pieces: dict[str, np.ndarray] = {}
        for key, array in zip(self.keys, arrays, strict=True):
            pieces |= _cut(key, array, axis)
        loaded = {}
        for name, parts in self.parameters.items():
            joined = pieces[parts[0]] if len(parts) == 1 else np.concatenate([pieces[part] for part in parts], axis)
            loaded[name] = np.swapaxes(joined, -1, -2) if self.transpose else joined
        return loaded

    def save(self, parameters: Mapping[str, np.ndarray], shapes: Sequence[Shape]) -> list[np.ndarray]:
        """Return the tensors of the keys, in these shapes; those of experts are stacked along their first axis."""
        if not self.parameters:
            return [np.zeros(shape, np.float32) for shape in shapes]
        axis = -2 if self.transpose else -1
        pieces: dict[str, np.ndarray] = {}
        widths = {name: width * key.groups for key in self.keys for name, width in (key.pieces or {}).items()}
        for name, parts in self.parameters.items():
            array = np.swapaxes(parameters[name], -1, -2) if self.transpose else parameters[name]
            borders = np.cumsum([widths[part] for part in parts[:-1]], dtype=int)
            pieces |= dict(zip(parts, np.split(array, borders, axis), strict=True))
        arrays = [_join(key, pieces, axis) for key in self.keys]
        if self.any_widths:
            borders = np.cumsum([shape[0] for shape in shapes])[:-1]
            arrays = np.split(np.concatenate(arrays, axis), borders, axis)
        stacked = () if self.experts is None else (self.experts,)
        return [array.reshape(*stacked, *shape) for array, shape in zip(arrays, shapes, strict=True)]

    def _natural(self, key: Key, tensor: np.ndarray) -> np.ndarray:
        if self.convolution:
            return tensor.reshape(tensor.shape[0], tensor.shape[-1])
        return tensor.reshape(-1) if key.shape is not None else tensor


def _cut(key: Key, array: np.ndarray, axis: int) -> dict[str, np.ndarray]:
    """Return the pieces of a tensor, [..., outputs, inputs] or [outputs]."""
    if key.pieces is None:
        return {key.name: array}
    grouped = _grouped(array, axis, key.groups)
    parts = np.split(grouped, np.cumsum(list(key.pieces.values()))[:-1], axis)
    return {name: _flat(part, axis) for name, part in zip(key.pieces, parts, strict=True)}


def _join(key: Key, pieces: Mapping[str, np.ndarray], axis: int) -> np.ndarray:
    """Return the tensor of pieces; the inverse of `_cut`."""
    if key.pieces is None:
        return pieces[key.name]
    parts = [_grouped(pieces[name], axis, key.groups) for name in key.pieces]
    return _flat(parts[0] if len(parts) == 1 else np.concatenate(parts, axis), axis)


def _grouped(array: np.ndarray, axis: int, groups: int) -> np.ndarray:
    """Split an axis, counted from the end, into groups; the groups' axis is put before it."""
    at = array.ndim + axis
    return array.reshape(*array.shape[:at], groups, array.shape[at] // groups, *array.shape[at + 1 :])


def _flat(array: np.ndarray, axis: int) -> np.ndarray:
    """Merge an axis, counted from the end, with the groups' axis before it."""
    at = array.ndim + axis
    return array.reshape(*array.shape[: at - 1], array.shape[at - 1] * array.shape[at], *array.shape[at + 1 :])


def same(
    key: str, parameter: str, *, also: tuple[str, ...] = (), copies: tuple[str, ...] = (), shape: Shape | None = None
) -> Row:
    """Return the row of a tensor that is the parameter itself: a norm's scale, a bias, an embedding.

    Args:
        key: the tensor's name.
        parameter: the parameter's path.
        also: other names that the tensor may have.
        copies: names under which a file may hold the same values again.
        shape: the tensor's shape, if the parameter is a vector and the tensor has further axes of length 1.
    """
    return Row((Key(key, also=also, copies=copies, shape=shape),), {parameter: (key,)}, transpose=False)


def empty(shapes: Mapping[str, Shape]) -> Row:
    """Return the row of tensors without elements, which no parameter has: {name: shape}."""
    return Row(tuple(Key(name, shape=shape) for name, shape in shapes.items()), {})


def linear(key: str, parameter: str, *, also: tuple[str, ...] = ()) -> Row:
    """Return the row of a projection: the parameter is the transposed tensor.

    Args:
        key: the tensor's name.
        parameter: the parameter's path.
        also: other names that the tensor may have.
    """
    return Row((Key(key, also=also),), {parameter: (key,)})


def fused(keys: Mapping[str, int], parameter: str, **options: bool) -> Row:
    """Return the row of tensors whose outputs lie side by side in one parameter.

    Args:
        keys: {name of the tensor: its outputs}.
        parameter: the parameter's path.
        options: `transpose`, `convolution` and `any_widths` of the `Row`.
    """
    return Row(tuple(Key(name, {name: width}) for name, width in keys.items()), {parameter: tuple(keys)}, **options)


def stored_names(key: Key, experts: int | None, name: str | None = None) -> list[str]:
    """Return the names in the file of one key: a name for each expert if it has them, else one.

    Args:
        key: the key.
        experts: number of experts, or None.
        name: one of the names of the key. Default: its own.
    """
    name = key.name if name is None else name
    if experts is None or "{expert}" not in name:
        return [name]
    return [name.replace("{expert}", str(expert)) for expert in range(experts)]
