"""Text from a trained run."""

import shutil
import sys

import pytest

from osdn_jax import generate as module
from osdn_jax.generate import generate
from osdn_jax.training import CheckpointMismatchError
from support.runs import finished

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


def test_text_is_that_of_the_newest_checkpoint(run):
    pieces = list(generate(run, "the ", **OPTIONS))
    assert len(pieces) == 31  # one for each token, and what is left at the end
    text = "".join(pieces)
    assert text == "".join(generate(run, "the ", **OPTIONS))
    assert text != "".join(generate(run, "the ", tokens=30, seed=2))
    assert "\0" not in text
    # Forty steps are enough to know which letters the words are made of.
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
    ],
)
def test_a_number_out_of_range_is_one_line(run, command, arguments, said):
    status, out, err = command("--workdir", run, *arguments)
    assert (status, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


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


def test_without_a_directory_the_usage_is_shown(command):
    status, _, err = command()
    assert status == 2
    assert "--workdir" in err
