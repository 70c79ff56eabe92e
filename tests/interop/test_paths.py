"""Paths that callers give: every wrong one is one error that names it, wherever it is given."""

import re

import pytest
from flax import nnx

from osdn_jax import interop
from osdn_jax.interop import __main__ as command
from osdn_jax.interop.paths import local_folder
from osdn_jax.nn import CausalLM
from support.models import model_config

WRONG = ["~nobody-of-that-name/m", "a\0b", "", " ", "gs://bucket/m", "half \ud800"]


@pytest.fixture(scope="module")
def model():
    return CausalLM(model_config("gated_delta_net"), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("path", WRONG)
def test_names_that_are_no_folder_of_this_machine(path, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    message = re.escape(f"path: got {path!r}, expected a folder of this machine")
    for call in (interop.load_pretrained, interop.inspect, interop.end_tokens):
        with pytest.raises(ValueError, match=message):
            call(path)
    with pytest.raises(ValueError, match=message):
        interop.save_pretrained(model, path, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    assert command.main(["inspect", path]) == 2
    assert re.fullmatch(r"python -m osdn_jax.interop inspect: error: PATH: got [^\n]*\n", capsys.readouterr().err)


def test_paths_of_other_types(model):
    for path in (5, None, b"m"):
        with pytest.raises(TypeError, match=f"path: got {type(path).__name__}, expected the path of a folder"):
            interop.load_pretrained(path)
        with pytest.raises(TypeError, match=f"path: got {type(path).__name__}, expected the path of a folder"):
            interop.save_pretrained(model, path)


def test_a_file_above_the_folder_is_named(model, tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("file/m", "file/a/m"):
        with pytest.raises(FileExistsError, match=f"path: got .*{name}', but .*/file is a file; expected a new folder"):
            interop.save_pretrained(model, tmp_path / name)


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_folder("~/m") == tmp_path / "m"
