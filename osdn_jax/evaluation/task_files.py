"""Code that a task file of lm-evaluation-harness names, found without running it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from osdn_jax._errors import joined_lines
from osdn_jax._optional import needs_extra

with needs_extra("eval", "osdn_jax.evaluation.task_files"):
    import yaml

_PLAIN = "tag:yaml.org,2002:"
_DATA = {f"{_PLAIN}{name}" for name in "null bool int float str binary timestamp seq map merge value omap set".split()}


class Code(NamedTuple):
    """A place in a task file that names code.

    Attributes:
        file: the task file, or one that it includes.
        key: where it stands, such as "process_results" or "metric_list[0].aggregation".
        code: what would run.
    """

    file: Path
    key: str
    code: str

    def __str__(self) -> str:
        """Return "file: key: code"."""
        return f"{self.file}: {self.key}: {self.code}"


class TaskFileError(ValueError):
    """A task file that cannot be used; the message is one line that names it."""


def code_in_file(path: str | Path) -> list[Code]:
    """Return the places that name code, in a task file and in those that it includes.

    These are tags such as `!function module.name`, which import a module when the file is loaded, and metrics with
    `hf_evaluate: true`, which may be a local script. The file is parsed, not loaded: nothing of it is executed.

    Args:
        path: a YAML file.

    Raises:
        TaskFileError: a file is missing, is no YAML, or has no mapping at its top.
    """
    return list(_code(Path(path), set()))


def _code(path: Path, seen: set[Path]) -> Iterator[Code]:
    path = path.expanduser().resolve()
    if path in seen:
        return
    seen.add(path)
    try:
        root = yaml.compose(path.read_bytes(), Loader=yaml.SafeLoader)
    except OSError as error:
        raise TaskFileError(f"{path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TaskFileError(f"{path} is not YAML: {joined_lines(error)}") from error
    if not isinstance(root, yaml.MappingNode):
        raise TaskFileError(f"{path}: expected a mapping of keys, such as task: NAME")
    yield from _tagged(path, root, "", set())
    for included in _included(root):
        yield from _code(path.parent / included, seen)


def _tagged(path: Path, node: Any, key: str, seen: set[int]) -> Iterator[Code]:
    """Yield the nodes that are not plain data, with the keys that lead to them."""
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if node.tag not in _DATA:
        name = node.tag.removeprefix(_PLAIN) if node.tag.startswith(_PLAIN) else node.tag
        yield Code(path, key or "(top)", f"{name} {node.value}" if isinstance(node, yaml.ScalarNode) else name)
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            label = f"{key}.{name.value}" if key else str(name.value)
            if isinstance(name, yaml.ScalarNode) and name.value == "hf_evaluate" and _true(value):
                yield Code(path, label, "a metric of the library evaluate, which is a script")
            yield from _tagged(path, name, label, seen)
            yield from _tagged(path, value, label, seen)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield from _tagged(path, value, f"{key}[{number}]", seen)


def _true(node: Any) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.value.lower() in ("true", "yes", "on")


def _included(root: yaml.MappingNode) -> list[str]:
    for name, value in root.value:
        if name.value == "include":
            nodes = value.value if isinstance(value, yaml.SequenceNode) else [value]
            return [str(node.value) for node in nodes]
    return []
