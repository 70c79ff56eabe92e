"""Saving and loading again: the same bits, the same layout, and never half a folder."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from osdn_jax import interop
from osdn_jax.interop import saving
from osdn_jax.nn import MESH_AXES, CausalLM, parameter_spec, split_model
from support.models import model_config, tokens
from support.pretrained import read_folder, read_safetensors, write_safetensors


@pytest.fixture(scope="module")
def model():
    return CausalLM(model_config("os_gdn"), rngs=nnx.Rngs(0))


def arrays(model):
    return {name: np.asarray(x) for name, x in split_model(model)[1].items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("rule", ["os_kda", "pgdn", "gdn2", "transformer"])
def test_our_own_models_come_back(rule, tmp_path):
    model = CausalLM(model_config(rule, tied_embeddings=rule == "gdn2"), rngs=nnx.Rngs(0))
    assert interop.save_pretrained(model, tmp_path / "a") == "osdn_jax"
    loaded = interop.load_pretrained(tmp_path / "a")
    assert loaded.config == model.config
    assert_same(arrays(loaded), arrays(model))
    ids = tokens().astype(np.int64)
    np.testing.assert_array_equal(interop.logits(loaded, ids), interop.logits(model, ids))
    assert interop.save_pretrained(loaded, tmp_path / "b") == "osdn_jax"
    for name in sorted(os.listdir(tmp_path / "a")):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_several_files_with_an_index(model, tmp_path):
    interop.save_pretrained(model, tmp_path / "m", max_shard_bytes=2000)
    files = sorted((tmp_path / "m").glob("*.safetensors"))
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    found = {name: file.name for file in files for name in read_safetensors(file)}
    assert index == {
        "metadata": {"total_size": sum(x.nbytes for x in arrays(model).values())},
        "weight_map": dict(sorted(found.items())),
    }
    for file in files:
        tensors = read_safetensors(file)
        assert len(tensors) == 1 or sum(x.nbytes for x in tensors.values()) <= 2000
    assert_same(arrays(interop.load_pretrained(tmp_path / "m")), arrays(model))


def test_dtypes(model, tmp_path):
    interop.save_pretrained(model, tmp_path / "half", dtype="bfloat16")
    assert {x.dtype for x in read_folder(tmp_path / "half").values()} == {jnp.dtype("bfloat16")}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    kept = interop.load_pretrained(tmp_path / "half")
    assert kept.config.dtype == "bfloat16"
    assert {x.dtype for x in arrays(kept).values()} == {jnp.dtype("bfloat16")}
    wide = interop.load_pretrained(tmp_path / "half", dtype=jnp.float32)
    assert wide.config.dtype == "float32"
    assert {x.dtype for x in arrays(wide).values()} == {jnp.dtype("float32")}
    interop.save_pretrained(wide, tmp_path / "again")  # in the types of the folder that it came from
    assert_same(read_folder(tmp_path / "again"), read_folder(tmp_path / "half"))
    for bad, error in (("float16", ValueError), ("int32", ValueError), ("x", TypeError)):
        with pytest.raises(error, match="dtype: got"):
            interop.load_pretrained(tmp_path / "half", dtype=bad)


def test_other_types_of_tensors(model, tmp_path):
    interop.save_pretrained(model, tmp_path / "m")
    values = {name: x.astype(np.float64) for name, x in read_folder(tmp_path / "m").items()}
    values |= {name: values[name].astype(np.float16) for name in values if name.startswith("blocks")}
    write_safetensors(tmp_path / "m" / "model.safetensors", values)
    loaded = interop.load_pretrained(tmp_path / "m")
    assert loaded.config.dtype == "float32"
    assert {x.dtype for x in arrays(loaded).values()} == {jnp.dtype("float32"), jnp.dtype("float16")}
    interop.save_pretrained(loaded, tmp_path / "n")
    assert {x.dtype for x in read_folder(tmp_path / "n").values()} == {np.dtype("f8"), np.dtype("f2")}


def test_onto_a_mesh(model, tmp_path):
    model = CausalLM(dataclasses.replace(model.config, vocab_size=18), rngs=nnx.Rngs(0))
    interop.save_pretrained(model, tmp_path / "m")
    mesh = jax.make_mesh((1, 2, 2, 1), MESH_AXES)  # with Explicit axes
    loaded = interop.load_pretrained(tmp_path / "m", mesh=mesh)
    for name, x in split_model(loaded)[1].items():
        assert x.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, parameter_spec(name)), x.ndim), name
    assert_same(arrays(loaded), arrays(model))
    interop.save_pretrained(loaded, tmp_path / "deep" / "n")
    assert_same(read_folder(tmp_path / "deep" / "n"), read_folder(tmp_path / "m"))


def test_meshes_that_do_not_fit(model, tmp_path):
    interop.save_pretrained(model, tmp_path / "m")
    with pytest.raises(TypeError, match="mesh: got int, expected a"):
        interop.load_pretrained(tmp_path / "m", mesh=4)
    with pytest.raises(ValueError, match="mesh: got the axes x, expected data, fsdp, tensor, context"):
        interop.load_pretrained(tmp_path / "m", mesh=jax.make_mesh((2,), ("x",)))
    with pytest.raises(ValueError, match="mesh: got 2 parts for an axis of 17 of embedding/embedding, expected a div"):
        interop.load_pretrained(tmp_path / "m", mesh=jax.make_mesh((1, 1, 2, 1), MESH_AXES))


def test_nan_is_said(model, tmp_path):
    interop.save_pretrained(model, tmp_path / "m")
    values = {name: x.copy() for name, x in read_folder(tmp_path / "m").items()}
    values["blocks/0/mixer/beta/kernel"][0, 0] = np.nan
    values["head/kernel"][1, 1] = -np.inf
    write_safetensors(tmp_path / "m" / "model.safetensors", values)
    with pytest.raises(ValueError, match="NaN or infinities in the tensors") as error:
        interop.load_pretrained(tmp_path / "m")
    assert "head/kernel" in str(error.value)
    assert "blocks/0/mixer/beta/kernel" in str(error.value)
    loaded = interop.load_pretrained(tmp_path / "m", allow_nonfinite=True)
    assert np.isnan(arrays(loaded)["blocks/0/mixer/beta/kernel"][0, 0])


def test_tensors_that_do_not_fit(model, tmp_path):
    interop.save_pretrained(model, tmp_path / "m")
    values = read_folder(tmp_path / "m")
    values["blocks/0/mixer/new"] = values.pop("blocks/0/mixer/beta/kernel")
    values["head/kernel"] = values["head/kernel"].T
    write_safetensors(tmp_path / "m" / "model.safetensors", values)
    with pytest.raises(ValueError, match="do not fit osdn_jax") as error:
        interop.load_pretrained(tmp_path / "m")
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
        "missing: blocks/0/mixer/beta/kernel",
        "extra: blocks/0/mixer/new",
        "misshapen: head/kernel: got shape [17, 12], expected [12, 17]",
    ]


def test_folders_are_not_overwritten_unasked(model, tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    interop.save_pretrained(model, folder, max_shard_bytes=2000)  # an empty folder may be filled
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="which is not empty; overwrite=True"):
        interop.save_pretrained(model, folder)
    interop.save_pretrained(model, folder, overwrite=True)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors", "notes.txt"]
    assert os.listdir(tmp_path) == ["m"]
    assert_same(arrays(interop.load_pretrained(folder)), arrays(model))


def test_a_failure_leaves_the_old_folder(model, tmp_path, monkeypatch):
    interop.save_pretrained(model, tmp_path / "m")
    before = {name: (tmp_path / "m" / name).read_bytes() for name in os.listdir(tmp_path / "m")}
    monkeypatch.setattr(saving, "_write_weights", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    for name in ("m", "new"):
        with pytest.raises(OSError, match="No space left"):
            interop.save_pretrained(model, tmp_path / name, overwrite=True)
    assert os.listdir(tmp_path) == ["m"]
    assert {name: (tmp_path / "m" / name).read_bytes() for name in os.listdir(tmp_path / "m")} == before


def test_files_next_to_the_weights_are_copied(model, tmp_path):
    interop.save_pretrained(model, tmp_path / "m")
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "README.md"):
        (tmp_path / "m" / name).write_text(name)
    loaded = interop.load_pretrained(tmp_path / "m")
    interop.save_pretrained(loaded, tmp_path / "n")
    assert set(os.listdir(tmp_path / "m")) - set(os.listdir(tmp_path / "n")) == {"README.md"}


@pytest.mark.parametrize(
    ("path", "options", "error", "message"),
    [
        ("file/b", {}, FileExistsError, "file is a file"),
        ("file", {}, FileExistsError, "which is a file"),
        ("m", {"layout": "llama"}, ValueError, "layout: got 'llama', expected one of qwen3_next"),
        ("m", {"max_shard_bytes": 0}, ValueError, "max_shard_bytes: got 0"),
        ("m", {"layout": "qwen3_next"}, ValueError, "'qwen3_next' cannot hold this model: .*preconditioner"),
    ],
)
def test_wrong_arguments(path, options, error, message, model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(error, match=message):
        interop.save_pretrained(model, tmp_path / path, **options)
    assert os.listdir(tmp_path) == ["file"]


def test_more_wrong_arguments(model, tmp_path):
    with pytest.raises(TypeError, match="model: got dict, expected a CausalLM"):
        interop.save_pretrained({}, tmp_path / "m")
    with pytest.raises(TypeError, match="path: got int"):
        interop.save_pretrained(model, 3)
    with pytest.raises(TypeError, match="model: got dict"):
        interop.logits({}, tokens())
    with pytest.raises(TypeError, match="ids: got float64, expected integers"):
        interop.logits(model, np.ones((1, 2)))
    with pytest.raises(ValueError, match=r"ids: got shape \(2,\), expected"):
        interop.logits(model, np.ones(2, int))
    with pytest.raises(ValueError, match="max_length: got 0"):
        interop.load_pretrained(tmp_path, max_length=0)


def test_ids_outside_the_vocabulary(model):
    for bad in (17, -1, 2**32):
        logits = interop.logits(model, np.asarray([[3, bad, 4]]))
        assert np.isfinite(logits[0, 0]).all()
        assert np.isnan(logits[0, 1:]).all()


def test_later_versions_are_refused(model, tmp_path):
    interop.save_pretrained(model, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["model"]["new_field"] = 1
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json: model: .*new_field"):
        interop.load_pretrained(tmp_path / "m")


def test_origins_compare_by_what_they_say():
    a = interop.Origin("f", "x", "{}", {"k": ("F32", (1,))})
    assert a == dataclasses.replace(a)
    assert hash(a) == hash(dataclasses.replace(a))
    assert a != dataclasses.replace(a, tensors={"k": ("F32", (2,))})
    assert a != "f"
