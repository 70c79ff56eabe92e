"""Folders described by `python -m osdn_jax.interop inspect`, and their tokenizers."""

import json

import numpy as np
import pytest

from osdn_jax import interop
from osdn_jax.interop import __main__ as command
from osdn_jax.interop.inspection import pattern
from support import pretrained
from support.corpora import write_tokenizer


@pytest.fixture
def folder(tmp_path):
    layers = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}
    config = pretrained.config_of("qwen3_next", **layers, mlp_only_layers=[3])
    return pretrained.write_folder(tmp_path / "model", config, pretrained.tensors_of(config), shards=2)


def change(folder, **entries):
    config = json.loads((folder / "config.json").read_text()) | entries
    (folder / "config.json").write_text(json.dumps(config))


def test_a_folder_that_can_be_loaded(folder, capsys):
    assert command.main(["inspect", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert max(map(len, lines[1:])) <= 80
    assert [line.strip() for line in lines[1:]] == [
        "family     qwen3_next (Transformers)",
        "layers     4: 2 x (1 delta, 1 attention)",
        "delta      2 key heads, 4 value heads, 4 key and 5 value channels, a decay per",
        "head",
        "attention  2 key heads, 4 query heads, 8 key and 8 value channels, rotary base",
        "10,000",
        "MLP        4 experts of 6 hidden units, 2 per token, a shared one of 7; in 3",
        "layers",
        "MLP        10 hidden units; in 1 layers",
        "width      12",
        "vocabulary 19, the embedding a head apart",
        f"parameters {sum(x.size for x in pretrained.read_folder(folder).values()):,}",
        f"tensors    {len(pretrained.read_folder(folder))} F32; "
        f"{sum(x.nbytes for x in pretrained.read_folder(folder).values()):,} bytes in 2 files",
        "tokenizer  none",
        "problems   none: load_pretrained loads this folder",
    ]


def test_every_problem_is_one_line(folder, capsys):
    change(folder, auto_map={"a": "b"}, hidden_act="gelu", attention_bias=True)
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"short")
    assert command.main(["inspect", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert "problems   4" in out, err
    assert [line.split(": ", 2)[1] for line in err.splitlines()] == ["error"] * 4
    for message in ("got auto_map", 'hidden_act: got "gelu"', "attention_bias: got true", "truncated"):
        assert message in err


def test_tensors_that_do_not_fit(folder, capsys):
    file = folder / "model-00001-of-00002.safetensors"
    tensors = pretrained.read_safetensors(file) | {"odd": np.zeros(1, np.float32)}
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:5]
    pretrained.write_safetensors(file, tensors)
    assert command.main(["inspect", str(folder)]) == 2
    assert [
        line.removeprefix("python -m osdn_jax.interop inspect: error: ")
        for line in capsys.readouterr().err.splitlines()
    ] == [
        "extra: odd",
        "misshapen: model.embed_tokens.weight: got shape [5, 12], expected [19, 12]",
    ]


def test_names_of_tensors_are_shown_safely(folder, capsys):
    file = folder / "model-00001-of-00002.safetensors"
    digits = "9" * 5000
    names = (
        "x\n\x1b[31mY",
        f"model.layers.{digits}.x",
        "model.layers.007.x",
        "model.layers.\u0663.x",
        "model.layers.12.x",
    )
    pretrained.write_safetensors(
        file, pretrained.read_safetensors(file) | dict.fromkeys(names, np.zeros(1, np.float32))
    )
    expected = {
        r"extra: x\n\x1b[31mY",
        f"extra: model.layers.{digits[:187]}…",
        "extra: model.layers.007.x",
        "extra: model.layers.\u0663.x",
        "extra: model.layers.12.x",
    }
    assert command.main(["inspect", str(folder)]) == 2
    err = capsys.readouterr().err
    assert {line.removeprefix("python -m osdn_jax.interop inspect: error: ") for line in err.splitlines()} == expected
    with pytest.raises(ValueError, match="do not fit qwen3_next") as error:
        interop.load_pretrained(folder)
    assert {line.strip() for line in str(error.value).split("\n")[1:]} == expected


@pytest.mark.parametrize("arguments", [[], ["inspect"], ["look", "x"], ["inspect", "a", "b"], ["inspect", "absent"]])
def test_wrong_command_lines(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = command.main(arguments)
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_directory_of_a_run_is_told_from_a_model(folder):
    (folder / "checkpoints").mkdir()
    (folder / "config.json").write_text('{"model": {}}')
    with pytest.raises(ValueError, match="is the working directory of a run of train.py"):
        interop.load_pretrained(folder)


def test_patterns_of_layers():
    assert pattern(["a", "a", "b"] * 3) == "3 x (2 a, 1 b)"
    assert pattern(["a"] * 5) == "5 a"
    assert pattern(["a", "b", "b", "a"]) == "1 a, 2 b, 1 a"


def test_the_tokenizer_of_a_folder(folder):
    write_tokenizer(folder / "tokenizer.json")
    found = interop.tokenizer(folder)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())
    names = {token["content"]: token["id"] for token in vocabulary["added_tokens"]}
    assert found.tokenizer.decode(found.tokenizer.encode("to be")) == "to be"
    assert (found.bos_id, found.eos_ids, found.missing) == (None, (), ("bos_token", "eos_token"))
    name = next(iter(names))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": name}, "eos_token": None}))
    found = interop.tokenizer(folder)
    assert (found.bos_id, found.eos_ids, found.missing) == (names[name], (), ("eos_token",))
    change(folder, bos_token_id=1, eos_token_id=[2, 3])
    assert interop.tokenizer(folder)[1:] == (1, (2, 3), (), ())
    (folder / "generation_config.json").write_text('{"eos_token_id": 4}')
    assert interop.tokenizer(folder)[1:] == (1, (4,), (), ())
    (folder / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(ValueError, match="generation_config.json: got eos_token_id 'x'"):
        interop.tokenizer(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"added_tokens": ["x"]}, "is no tokenizer: its added_tokens or its vocab is malformed"),
        ({"added_tokens": 5}, "is no tokenizer"),
        ({"model": []}, "which tokenizer.json does not have"),
        ({"model": [1]}, "is no tokenizer"),
        ({"model": {"vocab": [3]}}, "is no tokenizer"),
        ({"model": {"vocab": [["a", 0], []]}}, "is no tokenizer"),
        ({"model": {"vocab": {"<e>": "x"}}}, "got the id of '<e>' 'x', expected an id"),
        ({"added_tokens": [{"content": "<e>"}]}, "got the id of '<e>' None, expected an id"),
    ],
)
def test_ids_of_damaged_tokenizers(values, message, folder):
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<e>"}')
    (folder / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        interop.end_tokens(folder)


def test_folders_without_a_tokenizer(folder, tmp_path):
    with pytest.raises(ValueError, match="holds no tokenizer.json"):
        interop.tokenizer(folder)
    with pytest.raises(FileNotFoundError, match="which does not exist"):
        interop.tokenizer(tmp_path / "absent")


def test_remote_code_is_ignored_if_asked(folder, capsys):
    change(folder, auto_map={"AutoModel": "mine.Model"})
    assert command.main(["inspect", str(folder)]) == 2
    assert "auto_map" in capsys.readouterr().err
    assert command.main(["inspect", str(folder), "--ignore_remote_code"]) == 0
