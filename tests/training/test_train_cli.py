"""The command line of train.py: any mistake ends in one clear line and status 2."""

import json
import os
import select

import pytest

from osdn_jax.training import train
from support.runs import command, run, scratch, text, tiny_config, write_text

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "empty").mkdir()
    (folder / "binary.txt").write_bytes(bytes(range(256)))
    train(tiny_config(text()), folder / "run", stop_at=1)
    return folder


MISTAKES = {
    "unknown key": (["--config.model.widht=8"], ["no key 'model.widht'", "did you mean model.width"]),
    "value of another type": (["--config.steps=many"], ["--config.steps=many: expected an int"]),
    "address": (["--workdir=gs://bucket/run"], ["--workdir=gs://bucket/run: got an address, expected a directory"]),
    "empty workdir": (["--workdir="], ["--workdir=: got an empty name, expected a directory"]),
    "negative rate": (["--config.optimizer.final_fraction=-1"], ["optimizer.final_fraction: got -1.0"]),
    "no number": (["--config.optimizer.weight_decay=nan"], ["optimizer.weight_decay: got nan, expected at least 0"]),
    "infinite": (["--config.optimizer.learning_rate=inf", "--plan=1x1"], ["optimizer.learning_rate: got inf"]),
    "none": (["--config.steps=None"], ["--config.steps=None: expected an int, such as 40"]),
    "no workdir": (None, ["give the run a directory: --workdir=runs/NAME"]),
    "topology": (["--plan=8"], ["plan: got '8', expected HOSTSxGPUS, such as 1x8 or 8x8"]),
    "gpu": (["--plan=1x1", "--gpu=v100"], ["gpu: got 'v100', expected one of a100, a100-40gb, a6000, h100,"]),
    "gpu without a plan": (["--gpu=h200"], ["--gpu: got 'h200' without a plan, expected --plan=HOSTSxGPUS too"]),
    "devices left over": (["--plan=1x3"], ["1 in all, expected the 3 devices of the plan; --config.mesh.fsdp=-1"]),
    "no such file": (["--config=configs/shakespear.py"], ["no configuration file 'configs/shakespear.py'"]),
    "missing data": (["--config.data.path={folder}/nothing.txt"], ["no such file or folder: {folder}/nothing.txt"]),
    "empty folder": (["--config.data.path={folder}/empty"], ["{folder}/empty holds no supported file"]),
    "binary file": (["--config.data.path={folder}/binary.txt"], ["binary.txt is not text: NUL byte at byte offset 0"]),
    "sequence length": (["--config.sequence_length=0"], ["sequence length must be at least 1; got 0"]),
    "heads": (["--config.model.heads=3"], ["model.heads: got 3, expected a divisor of model.width = 16"]),
    "rule": (["--config.model.rule=osnd"], ["rule: got 'osnd', expected one of delta_net"]),
    "implementation": (["--config.model.implementation=magic"], ["implementation: got 'magic'"]),
    "steps": (["--config.steps=0"], ["steps: got 0, expected at least 1"]),
    "warm-up": (["--config.steps=4"], ["optimizer.warmup_steps: got 4, expected from 0 to below steps = 4"]),
    "stop_at": (["--stop_at=0"], ["stop_at"]),
    "profile": (["--profile=4:3"], ["profile: got '4:3', expected FIRST:LAST"]),
    "argument": (["steps=3"], ["unexpected argument 'steps=3'"]),
    "another run": (
        ["--workdir={folder}/run", "--config.seed=1"],
        ["{folder}/run holds a run with another configuration", "seed: 0 there, 1 now"],
    ),
    "diverging": (
        [
            "--config.model.rule=linear_attention",
            "--config.optimizer.learning_rate=1e30",
            "--config.optimizer.warmup_steps=1",
            "--config.checkpoint.every=1",
        ],
        [
            "error: step 12: update_norm is inf, which makes 11 skipped",
            "checkpoint of step 11 is kept",
            "--config.optimizer.learning_rate",
        ],
    ),
}


@pytest.fixture(scope="module")
def answers(forks, folder):
    said = {}
    for name, (arguments, _) in MISTAKES.items():
        line, _ = command(None if arguments is None else folder / name)
        given = [argument.format(folder=folder) for argument in arguments or []]
        flags = {argument.split("=")[0] for argument in given}
        line = [item for item in line[1:] if item.split("=")[0] not in flags]
        out, err = (folder / f"{name}.{kind}" for kind in ("out", "err"))
        forks.start([*line, *given], out=out, err=err)
        said[name] = {"status": forks.wait(), "out": out.read_text(), "err": err.read_text()}
    return said


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_in_one_line_that_names_it(name, answers, folder):
    answer = answers[name]
    assert answer["status"] == 2, answer
    assert answer["err"].startswith("train.py: error: ")
    assert "Traceback" not in answer["err"] + answer["out"]
    for words in MISTAKES[name][1]:
        assert words.format(folder=folder) in answer["err"]
    if name == "another run":
        assert len(answer["err"].splitlines()) == 3  # the difference, and advice
    else:
        assert len(answer["err"].splitlines()) == 1
    if name not in ("another run", "diverging"):
        assert answer["out"] == ""
        assert not (folder / name).exists()


def test_an_address_and_an_empty_name_make_nothing(answers):
    assert not (scratch() / "gs:").exists()
    assert not (scratch() / "config.json").exists()
    assert not (scratch() / "checkpoints").exists()


def test_the_run_of_another_configuration_is_untouched(answers, folder):
    assert train(tiny_config(text()), folder / "run", stop_at=1).step == 1


def test_a_reader_that_leaves_does_not_stop_training(forks, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    forks.start(command(tmp_path / "run", "--stop_at=4")[0][1:], out=tmp_path / "pipe", err=tmp_path / "err")
    assert select.select([reader], [], [], 60)[0]  # the first line has arrived
    os.close(reader)
    assert forks.wait() == 0
    for warning in (tmp_path / "err").read_text().splitlines():
        assert "no more progress is shown: standard output: [Errno 32] Broken pipe" in warning
    assert (tmp_path / "run" / "checkpoints" / "4").is_dir()


def test_the_help_into_a_full_disk_is_one_line(forks, tmp_path):
    forks.start([command(None)[0][1], "--help"], out="/dev/full", err=tmp_path / "err")
    assert forks.wait() == 2
    said = "train.py: error: standard output: [Errno 28] No space left on device\n"
    assert (tmp_path / "err").read_text() == said


def test_the_help_ends_with_status_0(forks, tmp_path):
    forks.start([command(None)[0][1], "--help"], out=tmp_path / "out", err=tmp_path / "err")
    assert forks.wait() == 0
    assert "--workdir" in (tmp_path / "out").read_text()
    assert (tmp_path / "err").read_text() == ""


def test_a_log_on_a_full_disk_does_not_stop_training(forks, tmp_path):
    forks.start(command(tmp_path / "run", "--stop_at=4")[0][1:], out="/dev/full", err=tmp_path / "err")
    assert forks.wait() == 0
    (warning,) = (tmp_path / "err").read_text().splitlines()
    assert "no more progress is shown: standard output: [Errno 28] No space left on device" in warning
    assert (tmp_path / "run" / "checkpoints" / "4").is_dir()


def test_a_process_of_its_own_ends_with_status_2(tmp_path):
    done = run(tmp_path / "run", "--config.model.widht=8")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("train.py: error: ")
    assert done.stderr.count("\n") == 1


def test_trains_on_the_file_of_the_command_line(tmp_path):
    path = write_text(tmp_path / "mine.txt", words=200, seed=5)
    given = [f"--config.data.path={path}", "--stop_at=2", "--config.log_every=2", "--config.checkpoint.keep_every=None"]
    done = run(tmp_path / "run", *given)
    assert (done.returncode, done.stderr) == (0, "")
    assert "stopped after step 2; the same command goes on from there" in done.stdout
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    assert recorded["data"]["path"] == str(path)
    assert recorded["log_every"] == 2
    assert recorded["checkpoint"]["keep_every"] is None
    assert scratch().is_dir()
