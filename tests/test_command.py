"""How command lines end: as processes, without JAX."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from osdn_jax import command

START = """
import os, signal, sys
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
    """(status, standard output, standard error) of a process."""
    options = {"stdout": subprocess.PIPE} | options
    line = [sys.executable, "-c", START + script]
    done = subprocess.run(line, check=False, stderr=subprocess.PIPE, text=True, timeout=60, **options)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def no_reader():
    """The end of a pipe that is written to, whose other end is closed."""
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
        ("command.start(); command.run(lambda: [print('some'), interrupt()])", 130, "some\n", ""),
        ("command.run(refuse)", 2, "", "it: error: unrecognized arguments: --no\n"),
        (
            "command.run(lambda: fail(FileNotFoundError(2, 'gone', 'x.txt')))",
            2,
            "",
            "-c: error: [Errno 2] gone: 'x.txt'\n",
        ),
    ],
)
def test_a_command_ends_with_its_status(script, status, out, err):
    assert ended(script) == (status, out, err)


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
