"""`python -m osdn_jax.convert`: a run and a folder as folders in another layout."""

import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from osdn_jax import convert, interop
from osdn_jax.nn import CausalLM
from osdn_jax.training import load_trained
from support.models import model_config, tokens
from support.pretrained import read_folder
from support.runs import finished


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m"], "the following arguments are required: DESTINATION"),
        (["m", "n", "--layout", "llama"], "--layout: invalid choice: 'llama'"),
        (["absent", "n"], "which does not exist"),
        (["m", "m"], "which is not empty; overwrite=True"),
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
