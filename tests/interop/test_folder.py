"""Folders: every wrong one is one error that names the file, and nothing in it is executed."""

import json
import os
import pickle

import numpy as np
import pytest

from osdn_jax.interop import load_pretrained
from osdn_jax.interop.folder import Folder
from osdn_jax.interop.safetensors import read_header
from support.pretrained import TYPES, write_folder, write_safetensors

TENSORS = {name: np.full(2, i, np.float32) for i, name in enumerate("abcd")}
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "model", {"model_type": "qwen3_next"}, TENSORS, shards=2)


def change_index(folder, **places):
    values = json.loads((folder / INDEX).read_text())
    values["weight_map"] |= places
    (folder / INDEX).write_text(json.dumps(values))


def check(path, error, message, **options):
    with pytest.raises(error, match=message):
        Folder(path, **options)


def test_one_file_and_several(folder, tmp_path):
    assert Folder(folder).tensors.keys() == TENSORS.keys()
    assert len(Folder(folder).weights.files) == 2
    one = write_folder(tmp_path / "one", {}, TENSORS)
    (one / "model.safetensors").rename(one / "other.safetensors")
    assert Folder(one).weights.size == 32


def test_folders_that_are_none(tmp_path):
    check(tmp_path / "absent", FileNotFoundError, "path: got .*absent.* which does not exist")
    check(tmp_path, FileNotFoundError, "has no config.json")
    (tmp_path / "file").write_text("")
    check(tmp_path / "file", NotADirectoryError, "which is a file")
    check(5, TypeError, "path: got int")


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("[1]", "got a JSON list"), ("\xff", "is not JSON"), ('{"a": ' * 99_999, "is not JSON")],
)
def test_configs_that_are_none(text, message, folder):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    check(folder, ValueError, message)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../model-00001-of-00002.safetensors", "lies outside the folder"),
        ("/etc/passwd", "lies outside the folder"),
        ("a/../../x.safetensors", "lies outside the folder"),
        ("link.safetensors", "lies outside the folder"),
        ("circle.safetensors", "lies outside the folder"),
        ("nul\0.safetensors", "lies outside the folder"),
        ("config.json", "expected a safetensors file"),
        ("absent.safetensors", "'absent.safetensors', which does not exist"),
        (3, "got 3 as the file"),
        ("model-00002-of-00002.safetensors", "lacks a, which"),
    ],
)
def test_indices_that_point_elsewhere(name, message, folder, tmp_path):
    write_safetensors(tmp_path / "outside.safetensors", {"a": np.zeros(2, np.float32)})
    (folder / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    (folder / "circle.safetensors").symlink_to(folder / "circle.safetensors")
    change_index(folder, a=name)
    check(folder, (ValueError, FileNotFoundError), message)


@pytest.mark.parametrize("name", ["config.json", INDEX, "model-00001-of-00002.safetensors", "model.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "circle", "link to nothing"])
def test_what_is_no_file_is_not_opened(name, kind, folder):
    if name == "model.safetensors":
        (folder / INDEX).unlink()
        (folder / "model-00001-of-00002.safetensors").unlink()  # so that there is one other file
    (folder / name).unlink(missing_ok=True)
    {
        "pipe": os.mkfifo,
        "folder": os.mkdir,
        "circle": lambda path: path.symlink_to(path.name),
        "link to nothing": lambda path: path.symlink_to("nothing"),
    }[kind](folder / name)
    if kind == "circle" and name.startswith("model-"):
        check(folder, ValueError, "lies outside the folder")
    else:
        check(folder, ValueError, f"{name}: is a folder, a pipe or a link to no file, expected a file")


def test_other_things_next_to_the_one_file(folder):
    (folder / INDEX).unlink()
    (folder / "model-00001-of-00002.safetensors").unlink()
    os.mkfifo(folder / "pipe.safetensors")
    assert Folder(folder).tensors.keys() == {"b", "d"}
    (folder / "model-00002-of-00002.safetensors").unlink()
    check(folder, FileNotFoundError, "has no model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"No such file: '.*pipe.safetensors'"):
        read_header(folder / "pipe.safetensors")


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_keys_that_occur_twice(name, folder):
    values = json.loads((folder / name).read_text())
    text = json.dumps({"deep": values, "x": 1})
    (folder / name).write_text(text.replace('"x": 1', '"x\\u001b": 1, "x\\u001b": 2'))
    check(folder, ValueError, rf"{name}: is not JSON: the key 'x\\x1b' occurs twice")


def test_tensors_that_the_index_omits_are_read(folder):
    values = json.loads((folder / INDEX).read_text())
    del values["weight_map"]["c"]
    (folder / INDEX).write_text(json.dumps(values))
    assert Folder(folder).tensors.keys() == TENSORS.keys()


def test_names_cannot_control_a_terminal(folder):
    write_safetensors(folder / "model-00001-of-00002.safetensors", {"b\x1b[31m\n": np.zeros(2, np.int64)})
    change_index(folder, **{"\x1b": "model-00001-of-00002.safetensors"})
    check(folder, ValueError, r"lacks \\x1b and 2 more keys, which")
    (folder / INDEX).unlink()
    (folder / "model-00002-of-00002.safetensors").unlink()
    check(folder, ValueError, r"^b\\x1b\[31m\\n: got the type I64")


def test_links_of_the_hub_cache_are_followed(folder, tmp_path):
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(i))
        (snapshot / file.name).symlink_to(os.path.relpath(blobs / str(i), snapshot))
    assert Folder(snapshot).tensors.keys() == TENSORS.keys()


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {}}', "["])
def test_indices_that_are_none(text, folder):
    (folder / INDEX).write_text(text)
    check(folder, ValueError, INDEX)


def test_a_key_in_two_files(folder):
    write_safetensors(folder / "model-00001-of-00002.safetensors", TENSORS)
    check(folder, ValueError, "has the key 'b', which model-00001-of-00002.safetensors has too")


def test_all_problems_of_the_weights_are_listed(folder):
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"short")
    write_safetensors(folder / "model-00002-of-00002.safetensors", {"b": np.zeros(2, np.int64)})
    with pytest.raises(ValueError, match="2 problems") as error:
        Folder(folder)
    assert "truncated" in str(error.value)
    assert "lacks d" in str(error.value)


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "pytorch_model-00001-of-00002.bin"])
def test_pickles_are_refused_unopened(name, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / name).write_bytes(pickle.dumps(Harmful()))
    check(folder, ValueError, f"got weights in {name} only, a pickle")
    assert not (tmp_path / "harm").exists()


def test_no_weights_and_weights_without_an_index(folder):
    (folder / INDEX).unlink()
    check(folder, FileNotFoundError, f"without {INDEX}")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    check(folder, FileNotFoundError, "has no model.safetensors")


@pytest.mark.parametrize(
    "config",
    [
        {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}},
        {"trust_remote_code": True},
        {"text_config": {"auto_map": {"AutoConfig": "x.X"}}},
    ],
)
def test_remote_code_is_refused_unrun(config, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / "modeling_x.py").write_text("import os; os.mkdir('harm')")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_next"} | config))
    with pytest.raises(ValueError, match="asks to run code"):
        load_pretrained(folder)
    Folder(folder, ignore_remote_code=True)
    assert not (tmp_path / "harm").exists()


def test_quantised_weights_are_refused(folder):
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"bits": 4}}))
    check(folder, ValueError, "quantization_config, expected weights that are not quantised")
    (folder / "config.json").write_text("{}")
    write_safetensors(folder / "model-00001-of-00002.safetensors", {n: np.zeros(2, TYPES["F8_E4M3"]) for n in "ac"})
    check(folder, ValueError, "a and 1 more keys: got the type F8_E4M3, expected one of BF16")


@pytest.mark.parametrize("kind", [None, "llama", 5])
def test_unknown_models_are_named(kind, folder):
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ValueError, match=f"model_type: got {kind!r}, expected one of qwen3_next"):
        load_pretrained(folder)
