"""Runs that start from a folder of a pretrained model, as it is or with another rule."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from osdn_jax import interop
from osdn_jax.nn import (
    BlockConfig,
    CausalLM,
    MixerConfig,
    MixtureConfig,
    MLPConfig,
    ModelConfig,
    mixer_config,
    split_model,
)
from osdn_jax.training import ConfigError, build_model_config, load_config, load_trained, train
from osdn_jax.training.starting_point import with_init
from support.runs import compiled_steps, rows, text, tiny_config

SHAPES = {"width": 16, "heads": 2, "key_dim": 4, "value_dim": 8}
DELTA = BlockConfig(mixer_config("gated_delta_net", **SHAPES), MLPConfig(16))
ATTENTION = BlockConfig(
    mixer_config("transformer", **SHAPES, rotary_dim=2), MixtureConfig(experts=4, active=2, hidden=8), "post"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pretrained") / "hybrid"
    model = CausalLM(ModelConfig(vocab_size=256, blocks=(DELTA, ATTENTION)), rngs=nnx.Rngs(3))
    interop.save_pretrained(model, path)
    return path


def still(folder, **changes):
    """A run whose learning rate is so small that a step moves no parameter noticeably."""
    return tiny_config(text(), init=str(folder), optimizer__learning_rate=1e-30, **changes)


@pytest.mark.slow
def test_a_run_starts_from_the_folder_and_goes_on_without_it(folder, tmp_path, capsys, caplog):
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    config = still(moved)
    with jax.log_compiles():
        train(config, tmp_path / "run", stop_at=2)
    assert compiled_steps(caplog) == 1  # not again for the second step
    said = capsys.readouterr().out
    assert f"starting from the model in {moved}" in said
    assert "moved: " in said
    before = split_model(interop.load_pretrained(folder))[1]
    shutil.rmtree(moved)
    after = load_trained(tmp_path / "run")
    assert after.model.stack[1].mlp == ATTENTION.mlp
    assert before.keys() == after.parameters.keys()
    for name, x in before.items():
        np.testing.assert_allclose(after.parameters[name], x, atol=1e-6)
    assert train(config, tmp_path / "run", stop_at=3).step == 3  # the run has its own record of the model
    assert all(row["train/balance"] >= 0.9 for row in rows(tmp_path / "run") if "train/bits_per_byte" in row)


@pytest.mark.slow
def test_a_changed_rule_starts_with_the_same_loss_and_is_trained(folder, tmp_path):
    losses = {}
    for name, surgery in (("plain", {}), ("gram", {"surgery__preconditioner": "gram", "surgery__layers": "0"})):
        train(still(folder, **surgery), tmp_path / name, stop_at=1)
        losses[name] = next(row["train/bits_per_byte"] for row in rows(tmp_path / name) if "train/bits_per_byte" in row)
    assert losses["gram"] == pytest.approx(losses["plain"], abs=1e-5)
    config = load_config(tmp_path / "gram")
    described = build_model_config(with_init(config, tmp_path / "gram"))
    mixer = described.stack[0].mixer
    assert isinstance(mixer, MixerConfig)
    assert mixer.preconditioner == "gram"
    train(
        tiny_config(text(), init=str(folder), surgery__preconditioner="gram", optimizer__learning_rate=1e-2),
        tmp_path / "moving",
        stop_at=8,
    )
    found, start = load_trained(tmp_path / "moving").parameters, load_trained(tmp_path / "gram").parameters
    new = sorted(name for name in found if "gram" in name)
    assert new
    assert all(np.abs(np.asarray(found[name]) - np.asarray(start[name])).max() > 1e-5 for name in new)


@pytest.mark.slow
def test_the_tokenizer_of_the_folder(folder, tmp_path):
    own = tmp_path / "with tokenizer"
    shutil.copytree(folder, own)
    with pytest.raises(ConfigError, match=r"tokenizer"):
        train(still(own, data__tokenizer="init"), tmp_path / "none")
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<s>": 0, "[UNK]": 1, **{word: i for i, word in enumerate("the memory writes what key".split(), 2)}}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(["<s>"])
    made.save(str(own / "tokenizer.json"))
    train(still(own, data__tokenizer="init"), tmp_path / "run", stop_at=1)
    assert load_trained(tmp_path / "run").tokenizer.vocab_size == 7


def test_the_model_in_a_configuration(folder):
    config = with_init(tiny_config(text(), init=str(folder), model__remat="full", model__dtype="bfloat16"))
    made = build_model_config(config)
    blocks = json.loads(config.model.stack)["blocks"]
    assert [block["norm"] for block in blocks] == ["pre", "post"]
    assert (made.remat, made.dtype, made.vocab_size) == ("full", "bfloat16", 256)
    assert made.stack[0] == DELTA
    limited = dataclasses.replace(ATTENTION, mixer=dataclasses.replace(ATTENTION.mixer, max_length=24))
    assert made.stack[1] == limited  # caches of config.sequence_length tokens
    assert with_init(tiny_config(text())).model.stack is None


def test_a_stack_can_be_given(folder):
    written = with_init(tiny_config(text(), init=str(folder))).model.stack
    assert build_model_config(tiny_config(text(), model__stack=written)).stack[0] == DELTA


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"init": "nowhere"}, "nowhere"),
        ({"init": "~nobody-of-that-name/m"}, "init: got '~nobody-of-that-name/m', expected a folder of this machine"),
        ({"init": "FOLDER", "model__stack": "{}"}, "model.stack: got a model in addition to init"),
        ({"surgery__preconditioner": "gram"}, "surgery.preconditioner: got 'gram' without init"),
        ({"init": "FOLDER", "surgery__layers": "0"}, "surgery.layers: got '0' without a change"),
        (
            {"init": "FOLDER", "surgery__preconditioner": "gram", "surgery__layers": "first"},
            "surgery.layers: got 'first', expected numbers",
        ),
        ({"init": "FOLDER", "surgery__preconditioner": "gram", "surgery__layers": "1"}, "layer"),
        ({"data__tokenizer": "init"}, "data.tokenizer: got 'init' without init"),
        ({"model__stack": "{"}, "model.stack: expected JSON of the fields of an nn.ModelConfig"),
        ({"model__stack": "[]"}, "model.stack: expected JSON"),
        ({"model__stack": '{"vocab_size": 9, "hat": 1}'}, "model.stack: .*hat"),
    ],
)
def test_what_is_wrong_is_named(folder, tmp_path, changes, said):
    values = {key: str(folder) if value == "FOLDER" else value for key, value in changes.items()}
    with pytest.raises(ConfigError, match=said):
        train(tiny_config(text(), **values), tmp_path / "run")


def test_one_starting_point_at_a_time(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"init: got .* and start_from"):
        train(tiny_config(text(), init=str(folder)), tmp_path / "run", start_from=tmp_path)


def test_a_vocabulary_that_is_too_small(folder, tmp_path):
    small = tmp_path / "small"
    model = CausalLM(ModelConfig(vocab_size=100, blocks=(DELTA,)), rngs=nnx.Rngs(3))
    assert jnp.isfinite(model(jnp.zeros((1, 2), jnp.int32))[0]).all()
    interop.save_pretrained(model, small)
    with pytest.raises(ConfigError, match="data.tokenizer: got a vocabulary of 256, expected at most the 100 entries"):
        train(tiny_config(text(), init=str(small)), tmp_path / "run")
