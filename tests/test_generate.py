"""Text from a trained run."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from osdn_jax import generate as module
from osdn_jax.command import run as run_command
from osdn_jax.generate import generate
from osdn_jax.training import CheckpointMismatchError
from support import runs
from support.forks import Forks
from support.runs import finished

pytestmark = pytest.mark.slow

OPTIONS = {"tokens": 30, "seed": 1}


@pytest.fixture(scope="module")
def run():
    return finished()[0]


@pytest.fixture
def command(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments)])
        status = 0
        try:
            module.main()
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return call


def test_importing_it_imports_nothing_that_only_training_needs():
    """These take longer to import than JAX; Orbax is imported while the model is compiled."""
    heavy = ("grain", "jax.experimental.pallas", "matplotlib", "orbax", "tensorstore")
    script = f"import sys, osdn_jax.generate; print([name for name in {heavy} if name in sys.modules])"
    _, keywords = runs.command(None)
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=keywords["env"],
        cwd=keywords["cwd"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"


def test_text_is_that_of_the_newest_checkpoint(run):
    pieces = list(generate(run, "the ", **OPTIONS))
    assert len(pieces) == 31  # one for each token, and one for the rest at the end
    text = "".join(pieces)
    assert text == "".join(generate(run, "the ", **OPTIONS))
    assert text != "".join(generate(run, "the ", tokens=30, seed=2))
    assert "\0" not in text
    # Forty steps are enough to learn the letters of the training text.
    known = sum(letter in "thememorywritesvaluerecallunderdecayqueriesbackagain .\n" for letter in text)
    assert known > len(text) * 0.6


def test_the_prompt_counts_and_may_be_empty(run):
    cold = OPTIONS | {"temperature": 0.0}
    assert "".join(generate(run, "", **cold)) == "".join(generate(run, **cold))
    first = "".join(generate(run, "memory", **cold))
    again = "".join(generate(run, f"memory{first[:10]}", tokens=20, temperature=0.0))
    assert first[10:30] == again


def test_the_run_is_left_as_it_was(run):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    list(generate(run, **OPTIONS))
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_the_command_line_writes_prompt_and_text(run, command):
    status, out, err = command("--workdir", run, "--prompt", "what ", "--tokens", 20, "--seed", 3)
    assert (status, err) == (0, "")
    assert out == "what " + "".join(generate(run, "what ", tokens=20, seed=3)) + "\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--temperature", "-1"], "temperature: got -1.0"),
        (["--top_p", "0"], "top_p: got 0.0"),
        (["--tokens", "-3"], "tokens: got -3"),
        (["--tokens", "many"], "--tokens: invalid int value: 'many'"),
        (["--temperature", "nan"], "temperature: got nan"),
        (["--temperature", "1e999"], "temperature: got inf"),
        (["--top_p", "nan"], "top_p: got nan"),
        (["--seed", "-1"], "seed: got -1, expected an integer from 0"),
        (["--seed", str(2**70)], f"seed: got {2**70}, expected an integer from 0"),
        (["--prompt", "a\udcff"], "unpaired surrogate at character 1"),
        (["--prompt", "a\0"], "NUL"),
        (["--temp", "1"], "unrecognized arguments: --temp 1"),
    ],
)
def test_a_number_out_of_range_is_one_line(run, command, arguments, said):
    status, out, err = command("--workdir", run, *arguments)
    assert (status, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("workdir", ["", "gs://bucket/run", "s3://bucket"])
def test_what_is_no_directory_is_one_line(command, workdir):
    status, out, err = command("--workdir", workdir)
    assert (status, out) == (2, "")
    assert err == f"generate: error: --workdir: got {workdir!r}, expected a directory of this machine\n"


def test_the_home_directory_may_be_abbreviated(run, command, monkeypatch):
    monkeypatch.setenv("HOME", str(run.parent))
    assert command("--workdir", f"~/{run.name}", "--tokens", 3)[0] == 0


@pytest.mark.parametrize(("raised", "said", "ends_with"), [(KeyboardInterrupt, "", 130), (ValueError("no"), "no", 2)])
def test_text_that_is_cut_short_ends_its_line(run, command, monkeypatch, raised, said, ends_with):
    def pieces(*_, **__):
        yield "and"
        raise raised

    monkeypatch.setattr(module, "generate", pieces)
    monkeypatch.setattr(module, "main", lambda main=module.main: run_command(main))
    status, out, err = command("--workdir", run, "--prompt", "this ")
    assert (status, out) == (ends_with, "this and\n")
    assert said in err
    assert err.count("\n") == (ends_with == 2)


def test_ctrl_c_and_a_reader_that_leaves(tmp_path, run):
    """As processes: `generate` itself sets the exit status."""
    _, keywords = runs.command(None)
    line = [str(Path(module.__file__)), "--workdir", str(run), "--prompt", "this ", "--tokens", "1000000"]
    pipe, errors = tmp_path / "pipe", tmp_path / "errors"
    os.mkfifo(pipe)
    with Forks(env=keywords["env"], cwd=keywords["cwd"]) as forks:
        forks.start(line, out=pipe, err=errors)
        with pipe.open() as reader:
            assert reader.read(10).startswith("this ")
        assert forks.wait() == 141
        assert errors.read_text() == ""

        forks.start(line, out=pipe, err=errors)
        with pipe.open() as reader:
            text = reader.read(10)
            forks.signal(signal.SIGINT)
            text += reader.read()
        assert forks.wait() == 130
        assert errors.read_text() == ""
        assert text.endswith("\n")


def test_a_directory_without_a_run_is_one_line(tmp_path, run, command):
    status, _, err = command("--workdir", tmp_path / "nothing")
    assert status == 2
    assert "nothing/config.json does not exist: is this the working directory of a run?" in err
    assert err.count("\n") == 1
    (tmp_path / "started").mkdir()
    shutil.copy(run / "config.json", tmp_path / "started")
    status, _, err = command("--workdir", tmp_path / "started")
    assert status == 2
    assert "no folder of checkpoints" in err


def test_a_checkpoint_of_another_model_is_refused(tmp_path, run, command):
    other = shutil.copytree(run, tmp_path / "run")
    file = other / "config.json"
    file.write_text(file.read_text().replace('"width": 16', '"width": 32'))
    with pytest.raises(CheckpointMismatchError, match="of another model"):
        generate(other)
    status, out, err = command("--workdir", other)
    assert (status, out) == (2, "")
    assert "of another model" in err


def test_without_a_directory_is_one_line(command):
    status, _, err = command()
    assert status == 2
    assert "--workdir" in err
    assert err.count("\n") == 1
