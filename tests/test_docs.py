"""Every code block of README.md, CONTRIBUTING.md, CHANGELOG.md and docs/ does what it says.

Python runs, page by page in one namespace; a text block directly after it is what it prints. Command lines are checked
by the argument parser of the program that they start, or by their form. A block of any other language is an error.
"""

import argparse
import contextlib
import functools
import importlib
import importlib.util
import inspect
import io
import os
import re
import shlex
import sys
import tempfile
import tomllib
from pathlib import Path

import jax
import pytest

from support.forks import Forks
from support.pages import LANGUAGES, PAGES, ROOT, blocks, commands

pytestmark = pytest.mark.slow

# The programs of the repository whose argument parsers read the lines that start them.
MODULES = (
    "benchmarks.generation",
    "benchmarks.gpu_suite",
    "benchmarks.interop_peers",
    "benchmarks.load_memory",
    "benchmarks.ops",
    "benchmarks.peers_cpu",
    "benchmarks.seeds",
    "benchmarks.state_growth",
    "benchmarks.step",
    "osdn_jax.compare",
    "osdn_jax.convert",
    "osdn_jax.data.prepare",
    "osdn_jax.diagnose",
    "osdn_jax.evaluate",
    "osdn_jax.generate",
    "osdn_jax.interop",
    "osdn_jax.regression",
    "osdn_jax.sweep",
    "pallas_kernels.aot",
    "triton_kernels.aot",
    "triton_kernels.export",
)
# Programs of others: their lines have no more of ours than files, which must exist.
OTHERS = ("pytest", "ruff", "mypy")

# Runs train.py as far as its flags, and builds the model that they describe.
PARSE_TRAIN = f"""
import runpy, sys
from absl import app, flags
from osdn_jax.training import build_model_config, check_ranges

def parse(main, flags_parser):
    flags_parser(sys.argv)
    config = flags.FLAGS.config
    config.data.tokenizer = "bytes"  # the file of another one is the reader's
    check_ranges(config)
    build_model_config(config)

app.run = parse
sys.argv[0] = {str(ROOT / "train.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def _id(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_blocks_are_of_known_languages(page):
    assert [f"{block}: {block.language!r}" for block in blocks(page) if block.language not in LANGUAGES] == []


# The one example of README.md runs in tests/test_readme.py, in a separate process.
@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "README.md"], ids=_id)
@pytest.mark.usefixtures("our_checks")
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__page__"}
    printed = ""
    # As a reader has it, not with the strict settings of the tests.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        for block in blocks(page):
            if block.language == "text" and block.follows and printed:
                assert printed == block.text, block
            printed = ""
            if block.language == "python":
                # Line numbers are those of the page.
                code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    exec(code, namespace)
                printed = out.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_command_lines_are_accepted(page):
    for block in blocks(page):
        if block.language == "sh":
            for words in commands(block):
                try:
                    check_command(words)
                except (AssertionError, SystemExit, ValueError) as error:
                    pytest.fail(f"{block}: {shlex.join(words)}\n{error}")


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_links_lead_somewhere(page):
    broken = []
    for link in re.findall(r"\]\(([^)]+)\)", _prose(page)):
        path, _, heading = link.partition("#")
        if path.startswith("https://"):
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (heading and heading not in _headings(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_files_that_are_named_exist(page):
    files = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if ".venv" not in str(path.relative_to(ROOT))]
    named = set(re.findall(r"`([\w/]+\.py)`", _prose(page)))
    assert sorted(name for name in named if not any(f"/{file}".endswith(f"/{name}") for file in files)) == []


@pytest.mark.parametrize("package", ["ops", "nn", "training"])
def test_architecture_lists_every_file(package):
    page = (ROOT / "docs" / "architecture.md").read_text()
    files = [path.name for path in (ROOT / "osdn_jax" / package).glob("*.py") if path.name != "__init__.py"]
    assert sorted(name for name in files if f"`{name}`" not in page) == []


def test_changelog_names_what_exists():
    rows = re.findall(
        r"^\| `(osdn_jax[\w.]+)`( \(module\))? \| `(osdn_jax[\w.]+)` \|$", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
    assert len(rows) > 10
    assert [new for _, _, new in rows if not _resolves(new)] == []
    assert [old for old, module, _ in rows if not module and _resolves(old)] == []


def _prose(page):
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def _headings(page):
    """The anchors of a page's headings, as GitHub and MkDocs form them."""
    titles = re.findall(r"^#+ (.+)$", _prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def _resolves(name):
    parts = name.split(".")
    for size in range(len(parts), 0, -1):
        with contextlib.suppress(ModuleNotFoundError):
            found = importlib.import_module(".".join(parts[:size]))
            return functools.reduce(lambda x, part: getattr(x, part, None), parts[size:], found) is not None
    return False


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_commands_in_sentences_are_accepted(page):
    """Those of make and pip are checked as in a block; `python -m MODULE` may lack arguments, so only its module is."""
    for line in re.findall(r"`((?:\.venv/bin/)?(?:make|pip|python -m) [^`]+)`", _prose(page)):
        words = shlex.split(line)
        if words[1] == "-m" and words[2] in (*MODULES, *OTHERS):
            continue
        try:
            check_command(words)
        except (AssertionError, SystemExit, ValueError) as error:
            pytest.fail(f"{_id(page)}: {line}\n{error}")


@pytest.mark.parametrize(
    "line",
    [
        "make tset",
        "make demo ARGS='--step 300'",
        "make test ARGS='tests/test_nothing.py'",
        "python -m osdn_jax.generate --workdir runs/mine --temprature 1",
        "python -m osdn_jax.generate --prompt text",
        "python -m osdn_jax.nothing",
        "python train.py --config=configs/demo.py --config.model.widht=8",
        "python train.py --config=configs/demo.py --config.steps=-1",
        "python train.py --config=configs/nothing.py",
        "pip install 'osdn-jax[gpu]'",
        "pip install '.[gpus]'",
        "git push",
        "curl https://example.org",
    ],
)
def test_wrong_command_lines_are_refused(line):
    with pytest.raises((AssertionError, SystemExit, ValueError)):
        check_command(shlex.split(line))


@pytest.mark.parametrize("text", ["Text.\n\n    x = 1\n", "```python\nx = 1\n"])
def test_blocks_that_cannot_be_told_are_refused(text, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match="fence"):
        blocks(page)


@pytest.fixture(autouse=True, scope="module")
def _train_parser(tmp_path_factory):
    """Ends the process that reads the lines of train.py, where a test has started one."""
    yield
    if _forks.cache_info().currsize:
        _forks().__exit__()
        _forks.cache_clear()


# --- command lines ---------------------------------------------------------------------------------------------------


def check_command(words):
    """Raise AssertionError, SystemExit or ValueError for a command line that would be refused."""
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    program, rest = re.sub(r"^\.venv(?:-aot|-triton)?/bin/", "", words[0]), words[1:]
    check = {"make": _make, "pip": _pip, "git": _git, "export": _export, "cd": _cd, "python": _python}.get(program)
    if check is not None:
        check(rest)
    else:
        assert os.access(ROOT / program, os.X_OK), "an unknown program"


def _python(words):
    if words[0] == "-m" and words[1] == "pip":
        _pip(words[2:])
    elif words[0] == "-m" and words[1] == "venv":
        assert len(words) == 3
    elif words[0] == "-m" and words[1] in OTHERS:
        _files(words[2:])
    elif words[0] == "-m":
        assert words[1] in MODULES, "an unknown module"
        _parse(words[1], words[2:])
    elif words[0] == "train.py":
        _train(words[1:])
    else:  # the examples run in tests/test_examples.py
        assert words[0].startswith("examples/")
        _parse(words[0], words[1:])


def _make(words):
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    arguments = [word.removeprefix("ARGS=") for word in words if word.startswith("ARGS=")]
    goals = [word for word in words if "=" not in word]
    assert len(goals) <= 1
    assert set(goals) <= targets, f"the targets are {', '.join(sorted(targets))}"
    for text in arguments:
        given = shlex.split(text)
        match goals[0]:
            case "demo":
                _parse(DEMO, given)
            case "aot":
                _parse("pallas_kernels.aot", given)
            case "aot-triton":
                _parse("triton_kernels.aot", given)
            case _:
                _files(given)


def _files(words):
    """The arguments of a program that is not ours: what looks like a path in the repository exists."""
    missing = [word for word in words if re.match(r"(tests|osdn_jax|docs)/", word) and not (ROOT / word).exists()]
    assert not missing, f"{missing[0]} does not exist"


def _pip(words):
    assert words[0] == "install"
    for word in words[1:]:
        if word in ("-e", "--no-deps", "-U", "--upgrade"):
            continue
        ours = re.fullmatch(r"(?:\.|osdn-jax)(?:\[([a-z,]+)\])?( @ git\+https://\S+)?", word)
        if ours is None:
            assert re.fullmatch(r"[a-z0-9-]+(\[[a-z0-9,]+\])?", word), f"cannot read {word}"
            continue
        assert word.startswith(".") or ours[2], "osdn-jax is on no package index: install a checkout or from git"
        unknown = set(filter(None, (ours[1] or "").split(","))) - _extras()
        assert not unknown, f"no extra {unknown}"


def _git(words):
    assert words[0] == "clone", "an unknown command of git"
    assert re.fullmatch(r"https://\S+", words[1])


def _export(words):
    assert re.fullmatch(r"[A-Z_]+=\S+", words[0])


def _cd(words):
    assert len(words) == 1


@functools.cache
def _extras():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text()).get("project")
    if project is None:
        return set(re.findall(r'^        "([a-z]+)": \[', (ROOT / "setup.py").read_text(), flags=re.MULTILINE))
    return set(project["optional-dependencies"])


class Parsed(Exception):
    """The arguments were read and accepted."""


DEMO = "examples/demo.py" if (ROOT / "examples" / "demo.py").exists() else "osdn_jax.demo"


@functools.cache
def _program(name):
    """The module that a program's main function is in."""
    if name.endswith(".py"):
        spec = importlib.util.spec_from_file_location(
            f"program_{name.removesuffix('.py').replace('/', '_')}", ROOT / name
        )
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    if hasattr(importlib.import_module(name), "__path__"):
        name = f"{name}.__main__"
    return importlib.import_module(name)


def _parse(name, words):
    """Has a program read its arguments, and stops it there."""
    main = _program(name).main
    read = argparse.ArgumentParser.parse_known_args

    def parse(self, args=None, namespace=None):
        rest = read(self, args, namespace)[1]
        assert not rest, f"{rest[0]}: not a flag of {name}"
        raise Parsed

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as said:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
        patch.setattr(sys, "argv", [name, *words])
        try:
            main(*([words] if inspect.signature(main).parameters else []))
        except Parsed:
            return
        except SystemExit as end:
            raise AssertionError(said.getvalue()) from end
    raise AssertionError(f"{name} has read no arguments")


@functools.cache
def _forks():
    return Forks(env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}, cwd=ROOT)


def _train(words):
    with tempfile.TemporaryDirectory() as folder:
        script, said = Path(folder, "parse.py"), Path(folder, "said")
        script.write_text(PARSE_TRAIN)
        _forks().start([str(script), *words], out=said, err=said)
        assert _forks().wait() == 0, said.read_text()
