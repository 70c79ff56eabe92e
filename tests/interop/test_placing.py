"""Putting a saved model at its place: links are followed, and nothing that was there is lost."""

import os
import stat
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from osdn_jax import convert, interop
from osdn_jax.interop import placing
from osdn_jax.nn import CausalLM, split_model
from support.models import model_config


@pytest.fixture(scope="module")
def model():
    return CausalLM(model_config("gated_delta_net"), rngs=nnx.Rngs(0))


@pytest.fixture
def folder(model, tmp_path):
    """A saved model in several files, with other files of the user next to them."""
    folder = tmp_path / "m"
    interop.save_pretrained(model, folder, max_shard_bytes=4000)
    (folder / "notes.txt").write_text("mine")
    (folder / "logs").mkdir()
    (folder / "logs" / "a").write_text("log")
    (folder / "tokenizer.json").symlink_to("notes.txt")
    return folder


def contents(folder):
    """Return {path: content} of everything below a folder."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        found[name] = os.readlink(file) if file.is_symlink() else file.is_file() and file.read_bytes()
    return found


def check_loads(folder, model):
    loaded, expected = split_model(interop.load_pretrained(folder))[1], split_model(model)[1]
    for name, x in expected.items():
        np.testing.assert_array_equal(loaded[name], x)


@pytest.mark.parametrize("command", [False, True])
def test_a_link_to_a_folder_stays_a_link(command, model, folder, tmp_path):
    link = tmp_path / "link"
    link.symlink_to("m")
    if command:
        interop.save_pretrained(model, tmp_path / "source")
        convert.main([str(tmp_path / "source"), str(link), "--overwrite"])
    else:
        interop.save_pretrained(model, link, overwrite=True)
    assert os.readlink(link) == "m"
    assert set(os.listdir(folder)) == {
        "config.json",
        "model.safetensors",
        "notes.txt",
        "logs",
        "tokenizer.json",
    }
    check_loads(link, model)


def test_links_to_an_empty_folder_and_to_none(model, tmp_path):
    (tmp_path / "empty").mkdir()
    for target in ("empty", "deep/absent"):
        link = tmp_path / f"to-{Path(target).name}"
        link.symlink_to(target)
        interop.save_pretrained(model, link)
        assert os.readlink(link) == target
        assert set(os.listdir(tmp_path / target)) == {"config.json", "model.safetensors"}
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(FileExistsError, match="path: got .*circle', a link in a circle"):
        interop.save_pretrained(model, tmp_path / "circle")


def test_the_current_folder_and_its_permissions_stay(model, folder, monkeypatch):
    monkeypatch.chdir(folder)
    folder.chmod(0o700)
    interop.save_pretrained(model, ".", overwrite=True)
    assert Path.cwd() == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    check_loads(Path(), model)


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("after", [False, True])
def test_a_failure_of_any_move_leaves_everything_as_it_was(error, after, model, folder, tmp_path, monkeypatch):
    before = contents(tmp_path)
    rename, calls, fails_at, tried = Path.rename, [0], [0], 0

    def failing(self, target):
        calls[0] += 1
        if calls[0] != fails_at[0]:
            return rename(self, target)
        if after:  # as Ctrl-C just after the move
            rename(self, target)
        raise error

    monkeypatch.setattr(Path, "rename", failing)
    while True:
        calls[0], fails_at[0] = 0, tried + 1
        try:
            interop.save_pretrained(model, folder, overwrite=True)
        except type(error):
            assert contents(tmp_path) == before
            tried += 1
        else:
            break
    assert tried > 4  # the files of the old model, its index and config.json, and the new files
    check_loads(folder, model)


def test_what_cannot_be_moved_back_is_named(model, folder, monkeypatch):
    before = contents(folder)
    rename, calls = Path.rename, [0]

    def failing(self, target):
        calls[0] += 1
        if calls[0] > 2:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match=r"the files that were there before are in .*/m/\.old\.") as error:
        interop.save_pretrained(model, folder, overwrite=True)
    assert "config.json" not in os.listdir(folder)  # so that no mixture of two models is loaded
    (old,) = folder.glob(".old.*")
    assert str(old) in str(error.value)
    assert contents(folder).items() >= {name: x for name, x in before.items() if name not in os.listdir(old)}.items()
    assert {name: (old / name).read_bytes() for name in os.listdir(old)}.items() <= before.items()


def test_a_new_folder_that_cannot_be_renamed_is_removed(model, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match=r"No space left.*/m'"):
        interop.save_pretrained(model, tmp_path / "m")
    assert os.listdir(tmp_path) == []


def test_a_folder_is_not_replaced_by_a_file(model, folder):
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    before = contents(folder)
    with pytest.raises(OSError, match="'config.json' is a folder there, expected a file: '.*/m'"):
        interop.save_pretrained(model, folder, overwrite=True)
    assert contents(folder) == before


def test_the_config_of_a_run_is_not_replaced(model, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text('{"model": {}}')
    with pytest.raises(FileExistsError, match="the working directory of a run; expected another folder"):
        interop.save_pretrained(model, tmp_path, overwrite=True)
    assert (tmp_path / "config.json").read_text() == '{"model": {}}'


def test_long_names(model, tmp_path):
    interop.save_pretrained(model, tmp_path / ("x" * 250))
    assert os.listdir(tmp_path) == ["x" * 250]


def test_the_file_named_last_is_absent_while_others_move(tmp_path, monkeypatch):
    for name in ("a", "config", "z"):
        (tmp_path / name).write_text("old")
    rename, seen = Path.rename, []

    def watching(self, target):
        result = rename(self, target)
        seen.append(((tmp_path / "config").exists(), {f.read_text() for f in tmp_path.iterdir() if f.is_file()}))
        return result

    monkeypatch.setattr(Path, "rename", watching)
    with placing.placed(tmp_path, replaced=("z*",), last="config") as new:
        for name in ("a", "b", "config"):
            (new / name).write_text("new")
    assert [there for there, _ in seen] == [False] * 5 + [True]
    assert seen[-1][1] == {"new"}
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "config"]
