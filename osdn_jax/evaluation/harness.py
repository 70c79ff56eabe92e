"""Tasks of lm-evaluation-harness: found by name, checked for code, loaded and run."""

import contextlib
import difflib
import io
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from osdn_jax._errors import first_line, joined_lines
from osdn_jax._optional import needs_extra, require
from osdn_jax.evaluation.hub import unreachable
from osdn_jax.evaluation.results import Result
from osdn_jax.evaluation.task_files import Code, TaskFileError, code_in_file

with needs_extra("eval", "osdn_jax.evaluation.harness"):
    import jinja2
    import jinja2.sandbox

_PURPOSE = "evaluation on tasks of lm-evaluation-harness"


class TaskError(ValueError):
    """A task that cannot be used; the message is one line that names it."""


class Found(NamedTuple):
    """Tasks that were found by name and checked for code, not loaded yet.

    Attributes:
        names: the tasks, groups, tags or files that were asked for.
        manager: the `lm_eval.tasks.TaskManager` that has them.
        allow_code: they may run code.
    """

    names: list[str]
    manager: Any
    allow_code: bool


def find_tasks(names: Sequence[str], *, include_path: Sequence[str | Path] = (), allow_code: bool = False) -> Found:
    """Return tasks by name, after a check that no file of theirs names code.

    Task files are parsed here, and no code of theirs runs. The tasks that lm_eval brings are part of an installed
    library and are not checked.

    Args:
        names: tasks, groups or tags of lm_eval or of `include_path`, or paths of YAML files.
        include_path: folders of task files; they replace tasks of lm_eval with the same name.
        allow_code: task files may name code.

    Raises:
        TaskError: there is no such task or folder, or a file names code and `allow_code` is not set.
        TaskFileError: a file cannot be read.
        ImportError: lm_eval is not installed.
    """
    tasks = require("lm_eval.tasks", "eval", _PURPOSE)
    folders = [Path(folder).expanduser() for folder in include_path]
    for folder in folders:
        if not folder.is_dir():
            raise TaskError(f"--include_path: got {str(folder)!r}, which is no directory")
    manager = tasks.TaskManager(include_path=folders or None, include_defaults=False)
    if not all(_known(manager, name) for name in _mentioned(manager, names)):
        manager = tasks.TaskManager(include_path=folders or None)  # 15,000 files: 20 seconds
    for name in names:
        if not _known(manager, name):
            raise TaskError(_unknown(manager, name, folders))
    if not allow_code:
        library = _library()
        for name in _mentioned(manager, names):
            for code in _code_of(manager, name, library):
                raise TaskError(f"{code} would run; --allow_code allows it")
    return Found(list(names), manager, allow_code)


def _library() -> Path:
    """Return the folder of lm_eval's own task files."""
    return Path(str(require("lm_eval.tasks", "eval", _PURPOSE).__file__)).resolve().parent


def _known(manager: Any, name: str) -> bool:
    return name in manager.task_index or _is_file(name)


def _is_file(name: str) -> bool:
    return name.endswith(".yaml") and Path(name).expanduser().is_file()


def _mentioned(manager: Any, names: Iterable[str]) -> list[str]:
    """Return the names, and those that their groups and tags stand for."""
    pending, found = list(names), list[str]()
    while pending:
        name = pending.pop(0)
        if name in found:
            continue
        found.append(name)
        entry = manager.task_index.get(name)
        if entry is not None:
            pending += sorted(entry.tags) if entry.yaml_path is None else _members(entry.cfg)
    return found


def _members(config: dict[str, Any] | None) -> list[str]:
    members = (config or {}).get("task")
    found: list[Any] = []
    for member in members if isinstance(members, list) else []:
        if isinstance(member, dict):
            inner = member.get("task")
            found += _members(member) if isinstance(inner, list) else [inner]
            found.append(member.get("group"))
        else:
            found.append(member)
    return [name for name in found if isinstance(name, str)]


def _code_of(manager: Any, name: str, library: Path) -> Iterator[Code]:
    entry = manager.task_index.get(name)
    path = Path(name).expanduser() if entry is None else entry.yaml_path
    if path is None or (entry is None and not _is_file(name)) or path.resolve().is_relative_to(library):
        return
    yield from code_in_file(path)
    if entry is not None:
        yield from _unregistered_metrics(path, entry.cfg or {})


def _unregistered_metrics(path: Path, config: dict[str, Any]) -> Iterator[Code]:
    """Yield the metrics that lm_eval does not have: it would load a script of that name."""
    require("lm_eval.api.metrics", "eval", _PURPOSE)
    known = require("lm_eval.api.registry", "eval", _PURPOSE).metric_registry
    if config.get("process_results") is not None:
        return
    metrics = config.get("metric_list")
    for number, metric in enumerate(metrics if isinstance(metrics, list) else []):
        name = metric.get("metric") if isinstance(metric, dict) else None
        if isinstance(name, str) and name not in known:
            yield Code(path, f"metric_list[{number}].metric", f"{name}, a script, since lm_eval has no such metric,")


def _unknown(manager: Any, name: str, folders: Sequence[Path]) -> str:
    near = difflib.get_close_matches(name, manager.all_tasks, n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    for folder in folders:
        for path in sorted(folder.rglob("*.yaml")):
            try:
                code_in_file(path)
            except TaskFileError as error:
                hint += f"; {error}"
    where = f" or in {', '.join(map(str, folders))}" if folders else ""
    return f"--tasks: no task {name!r} in lm_eval{where}{hint}"


def load_tasks(found: Found) -> tuple[list[Any], dict[str, str]]:
    """Load tasks with their data.

    Returns:
        (the tasks of lm_eval, {name: why it cannot be loaded, in one line}).
    """
    loaded: list[Any] = []
    failed: dict[str, str] = {}
    errors = require("datasets.exceptions", "eval", _PURPOSE)
    kinds = (OSError, ValueError, LookupError, ImportError, TypeError, AttributeError, jinja2.TemplateError)
    with _templates(found.allow_code):
        for name in found.names:
            try:
                tasks = found.manager.load([name])
            except (*kinds, errors.DatasetsError) as error:
                failed[name] = _why(found.manager, name, error)
            else:
                groups = list(tasks.get("groups", {}).values())  # a group comes before those inside it
                loaded += groups[:1] or list(tasks["tasks"].values())
    return loaded, failed


def _why(manager: Any, name: str, error: BaseException) -> str:
    entry = manager.task_index.get(name)
    config = (entry.cfg if entry is not None else None) or {}
    file = getattr(entry, "yaml_path", None) or name
    if isinstance(error, jinja2.exceptions.SecurityError):
        return f"a template of {file} reaches into Python: {first_line(error)}; --allow_code allows it"
    if isinstance(error, jinja2.UndefinedError):
        fields = _fields(config)
        has = f"; its fields are {', '.join(fields)}" if fields else ""
        return f"its data lacks a field that {file} names: {first_line(error)}{has}"
    data = config.get("dataset_path")
    if isinstance(error, ConnectionError) or (isinstance(error, OSError) and "Hub" in str(error)):
        return f"{unreachable(data)}, or name a task file for local data"
    if isinstance(error, ModuleNotFoundError):
        return f"it needs the library {error.name}, which is not installed"
    if isinstance(error, ImportError):
        return joined_lines(error)
    return f"{type(error).__name__}: {first_line(error)} ({file})"


def _fields(config: dict[str, Any]) -> list[str]:
    """Return the fields of a task's data; none if they cannot be read."""
    load = require("datasets", "eval", _PURPOSE).load_dataset
    with contextlib.suppress(Exception):
        splits = load(config["dataset_path"], config.get("dataset_name"), **config.get("dataset_kwargs", {}))
        return list(next(iter(splits.values())).features)
    return []


@contextlib.contextmanager
def _templates(allow_code: bool) -> Iterator[None]:
    """Let templates inside read data only: in Jinja's own environment they can reach any Python function."""
    utils: Any = require("lm_eval.utils", "eval", _PURPOSE)
    before = utils.env
    if not allow_code:
        utils.env = jinja2.sandbox.SandboxedEnvironment(
            loader=before.loader, undefined=before.undefined, keep_trailing_newline=before.keep_trailing_newline
        )
        utils.env.filters.update(before.filters)
    try:
        yield
    finally:
        utils.env = before


def run_tasks(
    model: Any,
    tasks: Sequence[Any],
    found: Found,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    bootstrap: int = 1000,
) -> tuple[list[Result], dict[str, Any]]:
    """Evaluate a model on loaded tasks.

    Args:
        model: an `LmEvalModel`.
        tasks: as `load_tasks` returns them.
        found: as `find_tasks` returned it.
        limit: documents of each task, at most. Default: all.
        num_fewshot: examples before each question. Default: the task's own number.
        bootstrap: resamples for standard errors of metrics that are no mean. Default: 1000.

    Returns:
        (results, what lm_eval says of them: versions, examples, settings).

    Raises:
        TaskError: a document lacks a field, or the evaluation of a document fails.
    """
    lm_eval = require("lm_eval", "eval", _PURPOSE)
    options = {"limit": limit, "num_fewshot": num_fewshot, "bootstrap_iters": bootstrap}
    try:
        with _templates(found.allow_code), contextlib.redirect_stdout(io.StringIO()):  # lm_eval prints what it does
            about = lm_eval.simple_evaluate(
                model=model,
                tasks=list(tasks),
                task_manager=found.manager,
                log_samples=False,
                confirm_run_unsafe_code=found.allow_code,
                **options,
            )
    except (jinja2.TemplateError, KeyError) as error:
        raise TaskError(f"--tasks: a document cannot be read: {type(error).__name__}: {first_line(error)}") from error
    version = metadata.version("lm_eval")
    sources = {name: _source(found.manager, name, f"lm_eval {version}") for name in about["results"]}
    results = list(_results(about, sources))
    kept = ("versions", "n-shot", "n-samples", "higher_is_better", "group_subtasks")
    return results, {"lm_eval": version, **{name: about[name] for name in kept if name in about}, "options": options}


def _source(manager: Any, name: str, library: str) -> str:
    entry = manager.task_index.get(name)
    path = getattr(entry, "yaml_path", None)
    return library if path is None or Path(path).resolve().is_relative_to(_library()) else str(path)


def _results(about: dict[str, Any], sources: dict[str, str]) -> Iterator[Result]:
    for task, values in about["results"].items():
        samples = about["n-samples"].get(task, {}).get("effective", 0) or values.get("sample_len", 0)
        for key, value in values.items():
            metric, comma, filtered = key.rpartition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            yield Result(
                task,
                metric if filtered == "none" else f"{metric} ({filtered})",
                _float(value),
                _float(error),
                int(samples),
                str(about["versions"].get(task, "")),
                sources[task],
            )


def _float(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
