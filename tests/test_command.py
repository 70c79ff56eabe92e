"""Exit statuses of command lines, as processes, without JAX."""

import ctypes
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from osdn_jax import command

START = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # background processes of a script ignore it
from osdn_jax import command

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()

def write(text):
    sys.stdout.write(text)
    sys.stdout.flush()

def fail(error):
    raise error

def refuse():
    command.Parser(prog="it").parse_args(["--no"])

def console():
    from osdn_jax.console import PipedConsole
    PipedConsole().print("x" * 200)
"""


def ended(script, **options):
    """Return (status, standard output, standard error) of a process."""
    options = {"stdout": subprocess.PIPE} | options
    line = [sys.executable, "-c", START + script]
    done = subprocess.run(line, check=False, stderr=subprocess.PIPE, text=True, timeout=60, **options)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def no_reader():
    """Return the writing end of a pipe whose reading end is closed."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.mark.parametrize(
    ("script", "status", "out", "err"),
    [
        ("command.run(lambda: print('all'))", 0, "all\n", ""),
        ("command.run(lambda: 1)", 1, "", ""),
        ("command.run(lambda: sys.exit(2))", 2, "", ""),
        ("command.start(); interrupt()", 130, "", ""),
        ("import gc; command.start(); print(gc.isenabled())", 0, "False\n", ""),
        ("import gc; command.start(); command.run(lambda: print(gc.isenabled()))", 0, "True\n", ""),
        ("command.start(); command.run(lambda: [print('some'), interrupt()])", 130, "some\n", ""),
        ("command.run(refuse)", 2, "", "it: error: unrecognized arguments: --no\n"),
        (
            "command.run(lambda: fail(FileNotFoundError(2, 'gone', 'x.txt')))",
            2,
            "",
            "-c: error: [Errno 2] gone: 'x.txt'\n",
        ),
        (
            "command.run(lambda: fail(ConnectionRefusedError(111, 'refused')))",
            2,
            "",
            "-c: error: [Errno 111] refused\n",
        ),
    ],
)
def test_a_command_ends_with_its_status(script, status, out, err):
    assert ended(script) == (status, out, err)


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("osdn_jax.diagnose.__main__", "python -m osdn_jax.diagnose"),
        ("osdn_jax.generate", "python -m osdn_jax.generate"),
        (None, "train.py"),
    ],
)
def test_a_program_is_named_as_it_was_started(module, said, monkeypatch):
    started = types.SimpleNamespace(__spec__=module and types.SimpleNamespace(name=module))
    monkeypatch.setitem(sys.modules, "__main__", started)
    monkeypatch.setattr(sys, "argv", ["folder/train.py"])
    assert command.program() == said


@pytest.mark.parametrize(
    "script", ["lambda: write('all')", "lambda: print('all')", "lambda: print('all') or 1", "console"]
)
def test_a_reader_that_has_left(no_reader, script):
    assert ended(f"command.run({script})", stdout=no_reader) == (command.READER_LEFT, None, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("script", ["lambda: write('all')", "lambda: print('all')"])
def test_output_that_cannot_be_written(script):
    with open("/dev/full", "w") as full:
        status, _, err = ended(f"command.run({script})", stdout=full)
    assert (status, err) == (2, "-c: error: standard output: [Errno 28] No space left on device\n")


def test_errors_of_the_program_keep_their_traceback():
    status, _, err = ended("command.run(lambda: fail(ZeroDivisionError()))")
    assert status == 1
    assert "Traceback" in err


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_to_write_is_checked_before_the_work(tmp_path, monkeypatch, replaced):
    (tmp_path / "there").write_text("old")
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in (f"{tmp_path}/new", f"{tmp_path}/there", "~/new"):
        path = command.output_file("json", value, replaced=replaced)
        assert path.parent == tmp_path
    for value, said in (
        ("", "got '', expected a file"),
        (".", "got '.', expected a file"),
        (str(tmp_path), f"got '{tmp_path}', expected a file"),
        (f"{tmp_path}/no/new", f"got '{tmp_path}/no/new', but there is no folder '{tmp_path}/no'"),
        (f"{tmp_path}/there/new", f"but there is no folder '{tmp_path}/there'"),
    ):
        with pytest.raises(ValueError, match=f"^--json: .*{re.escape(said)}"):
            command.output_file("json", value, replaced=replaced)
    assert sorted(os.listdir(tmp_path)) == ["there"]


def test_a_device_takes_what_is_written_but_is_not_replaced():
    assert command.output_file("json", os.devnull) == Path(os.devnull)
    with pytest.raises(ValueError, match="expected a file"):
        command.output_file("plan_json", os.devnull, replaced=True)


def test_a_file_that_may_not_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(ValueError, match="--json: got .*new', which may not be written"):
        command.output_file("json", str(tmp_path / "new"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "an empty name"),
        (" ", "an empty name"),
        ("gs://bucket", "an address"),
        ("gs:/bucket", "an address"),
        ("hdfs+x://a", "an address"),
        ("a\0b", "a NUL character"),
        ("~nobody-of-that-name/run", "home"),
    ],
)
def test_what_is_no_directory_of_this_machine_is_refused(name, reason):
    with pytest.raises(ValueError, match=reason):
        command.local_directory(name)
    with pytest.raises(ValueError, match=f"^--output: got {re.escape(repr(name))}, expected a directory of this mac"):
        command.directory("output", name)


def test_a_directory_does_not_have_to_exist(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert command.directory("output", "~/a:b/c~") == tmp_path / "a:b" / "c~"
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="^--output: got '~/file/run', but .*/file is no directory"):
        command.directory("output", "~/file/run")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="only glibc has mallopt")
def test_freed_memory_is_kept():
    """The second array is where the first was: the system does not have to supply its 16,384 pages again."""
    script = """
import resource
def pages():
    bytearray(1 << 26)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
"""
    assert ended(f"{script}first = pages(); print(pages() - first > 8000)") == (0, "True\n", "")
    assert ended(f"{script}command.start(); first = pages(); print(pages() - first < 100)") == (0, "True\n", "")


def test_an_input_file_is_named_with_its_flag(tmp_path):
    (tmp_path / "file").touch()
    assert command.input_file("prompts", str(tmp_path / "file")) == tmp_path / "file"
    for name, said in ((tmp_path / "nothing", "which does not exist"), (tmp_path, "which is a folder")):
        with pytest.raises(ValueError, match=re.escape(f"--prompts: got {str(name)!r}, {said}")):
            command.input_file("prompts", str(name))


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("path: got 'path'", "SOURCE: got 'path'"),
        ("tokens[3]: got 1", "--ids[3]: got 1"),
        ("tokens of path: got 1", "tokens of path: got 1"),
        ("a: b (path=True)", "a: b (SOURCE)"),
        ("a: or tokens='x'", "a: or --ids 'x'"),
    ],
)
def test_arguments_of_functions_are_said_as_flags(message, said):
    assert command.naming_flags(message, {"path": "SOURCE", "tokens": "--ids"}) == said
