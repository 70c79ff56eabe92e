"""`python -m osdn_jax.convert`: a run and a folder as folders in another layout."""

import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from osdn_jax import convert, interop
from osdn_jax.nn import CausalLM
from osdn_jax.training import load_trained, train
from support.models import model_config, tokens
from support.pretrained import read_folder
from support.runs import finished, tiny_config


def run(capsys, *arguments):
    status = 0
    try:
        convert.main([str(argument) for argument in arguments])
    except SystemExit as end:
        status = end.code
    return status, *capsys.readouterr()


@pytest.mark.slow
def test_a_run_becomes_a_folder(tmp_path, capsys):
    workdir = finished()[0]
    capsys.readouterr()  # of the training
    assert run(capsys, workdir, tmp_path / "m") == (0, f"{tmp_path / 'm'}: osdn_jax\n", "")
    trained = load_trained(workdir)
    model = interop.load_pretrained(tmp_path / "m")
    ids = np.arange(12).reshape(1, 12)
    expected = trained.apply(trained.parameters, jnp.asarray(ids))[0]
    np.testing.assert_allclose(interop.logits(model, ids), expected, atol=1e-5)


@pytest.mark.slow
def test_a_run_that_started_from_another_librarys_folder_becomes_one(tmp_path, capsys):
    """Not so if its rule was changed: then the folder is in our own layout."""
    model = CausalLM(model_config("gated_delta_net", value_dim=6, norm_epsilon=1e-6), rngs=nnx.Rngs(0))
    start = tmp_path / "start"
    interop.save_pretrained(model, start, layout="gated_deltanet", dtype=jnp.bfloat16)
    task = {"data__path": "", "data__task": "mqar:length=16,pairs=2,vocabulary=16", "data__task_examples": 8}
    task |= {"data__validation_examples": 2, "init": str(start)}
    train(tiny_config("", **task), tmp_path / "run", stop_at=2)
    train(tiny_config("", **task, surgery__preconditioner="hypergradient"), tmp_path / "changed", stop_at=1)
    capsys.readouterr()
    assert run(capsys, tmp_path / "run", tmp_path / "back")[1] == f"{tmp_path / 'back'}: gated_deltanet\n"
    assert (tmp_path / "back/config.json").read_text() == (start / "config.json").read_text()
    before, after = read_folder(start), read_folder(tmp_path / "back")
    assert {name: (x.shape, x.dtype) for name, x in before.items()} == {
        name: (x.shape, x.dtype) for name, x in after.items()
    }
    assert any((before[name] != after[name]).any() for name in before)
    assert run(capsys, tmp_path / "changed", tmp_path / "ours")[1] == f"{tmp_path / 'ours'}: osdn_jax\n"


def test_layouts_and_types(tmp_path, capsys):
    model = CausalLM(model_config("gated_delta_net", value_dim=6, norm_epsilon=1e-6), rngs=nnx.Rngs(0))
    interop.save_pretrained(model, tmp_path / "m")
    arguments = ("--layout", "gated_deltanet", "--dtype", "bfloat16")
    assert run(capsys, tmp_path / "m", tmp_path / "n", *arguments)[0] == 0
    assert json.loads((tmp_path / "n" / "config.json").read_text())["model_type"] == "gated_deltanet"
    assert {str(x.dtype) for x in read_folder(tmp_path / "n").values()} == {"bfloat16"}
    again = interop.load_pretrained(tmp_path / "n", dtype="float32")
    error = np.abs(interop.logits(again, tokens()) - interop.logits(model, tokens()))
    assert 0 < np.median(error) < 0.05


def test_a_run_over_the_folder_that_it_started_from(tmp_path, capsys, monkeypatch):
    """The tokenizer is there already; and a link to a file elsewhere is replaced, not the file."""
    model = CausalLM(model_config("gated_delta_net"), rngs=nnx.Rngs(0))
    for name in ("start", "other"):
        interop.save_pretrained(model, tmp_path / name)
    (tmp_path / "start" / "tokenizer.json").write_text("{}")
    (tmp_path / "start" / "tokenizer_config.json").write_text("[]")
    (tmp_path / "elsewhere").write_text("another")
    (tmp_path / "other" / "tokenizer.json").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    monkeypatch.setattr(convert, "_trained", lambda _: (model, tmp_path / "start" / "tokenizer.json"))
    for name in ("start", "other"):
        assert run(capsys, tmp_path / "run", tmp_path / name, "--overwrite") == (
            0,
            f"{tmp_path / name}: osdn_jax\n",
            "",
        )
        assert (tmp_path / name / "tokenizer.json").read_text() == "{}"
        assert (tmp_path / name / "tokenizer_config.json").read_text() == "[]"
    assert (tmp_path / "elsewhere").read_text() == "another"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m"], "the following arguments are required: DESTINATION"),
        (["m", "n", "--layout", "llama"], "--layout: invalid choice: 'llama'"),
        (["absent", "n"], "SOURCE: got 'absent', which does not exist"),
        (["m", "m"], "which is not empty; --overwrite replaces the model"),
        (["m", "n", "--layout", "kimi_linear"], "'kimi_linear' cannot hold this model"),
    ],
)
def test_wrong_command_lines(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    interop.save_pretrained(CausalLM(model_config("gated_delta_net"), rngs=nnx.Rngs(0)), "m")
    status, out, err = run(capsys, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert os.listdir() == ["m"]
