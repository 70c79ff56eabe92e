"""Models of flash-linear-attention and of OSDN's authors: logits, the layout of what is saved, and refused options."""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from osdn_jax import interop
from osdn_jax.interop.families import FAMILIES
from support import fla_checkpoints, fla_loop
from support.fla_checkpoints import entries

TOLERANCE = 1e-5
IDS = np.random.default_rng(1).integers(32, size=(2, 11))

ATTENTION = {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, "window_size": 3, "rope_theta": 50.0}
LIST = [{"layers": [0], "num_heads": 2}, ATTENTION]
SHARED = {"num_v_heads": 4, "expand_v": 1.5}  # two value heads per key head
CLIPPED = {"osgm_eta": 0.4, "osgm_d_min": 0.7, "osgm_d_max": 1.2, "osgm_use_denominator": True}

CASES = {
    "delta_net": entries("delta_net"),
    "delta_net, gate, one fixed beta of 2": entries(
        "delta_net", use_gate=True, use_beta=False, allow_neg_eigval=True, use_short_conv=False, expand_v=2
    ),
    "delta_net, attention, beta above 1": entries(
        "delta_net", attn=LIST, num_hidden_layers=3, allow_neg_eigval=True, conv_size=2
    ),
    "gated_deltanet, defaults": entries("gated_deltanet", hidden_ratio=None, intermediate_size=None),
    "gated_deltanet, shared keys, sigmoid gate": entries(
        "gated_deltanet", **SHARED, output_gate_activation="sigmoid", allow_neg_eigval=True, norm_eps=1e-3
    ),
    "gated_deltanet, attention, tied": entries(
        "gated_deltanet", attn=ATTENTION, num_hidden_layers=2, tie_word_embeddings=True, use_gate=False
    ),
    "kda, powlu": entries("kda", hidden_act="powlu", use_short_conv=False),
    "kda, shared keys, bound": entries("kda", **SHARED, lower_bound=-5.0, safe_gate=True, allow_neg_eigval=True),
    "kda, attention": entries("kda", attn=LIST, num_hidden_layers=3, expand_v=2.0),
    "precond_gated_deltanet, shared keys": entries("precond_gated_deltanet", **SHARED, squash_x=2.0, use_gate=False),
    "precond_gated_deltanet, attention": entries(
        "precond_gated_deltanet", attn=ATTENTION, num_hidden_layers=2, allow_neg_eigval=True
    ),
    "precond_kda": entries("precond_kda", allow_neg_eigval=True, tie_word_embeddings=True),
    "precond_kda, shared keys, bound": entries("precond_kda", **SHARED, lower_bound=-2),
    "osla_delta_net": entries("osla_delta_net"),
    "osla_delta_net, feedback": entries("osla_delta_net", use_osgm=True, use_gate=True),
    "osla_delta_net, learned decay": entries("osla_delta_net", use_osgm=True, osgm_decay=True, **CLIPPED),
    "osla_delta_net, constant decay": entries("osla_delta_net", use_osgm=True, osgm_decay_mode="constant"),
    "osla_delta_net, decay per token": entries(
        "osla_delta_net", use_osgm=True, osgm_decay_mode="data_dependent", attn=ATTENTION, num_hidden_layers=2
    ),
    "osla_delta_net, average": entries(
        "osla_delta_net", use_osgm=True, osgm_decay_mode="ema", osgm_ema_alpha=0.9, osgm_ema_normalize=True
    ),
    "osla_delta_net, normalized average": entries("osla_delta_net", use_osgm=True, osgm_decay_mode="ema_norm"),
    "os_gated_deltanet, shared keys": entries("os_gated_deltanet", **SHARED, osgm_eta=0.1, osgm_decay_mode="learnable"),
    "os_gated_deltanet, decay per token": entries(
        "os_gated_deltanet", osgm_decay_mode="data_dependent", osgm_freeze=True, **CLIPPED
    ),
    "os_gated_deltanet, shared keys, aware of beta": entries(
        "os_gated_deltanet", **SHARED, osgm_post_gate_regret=True, osgm_eta=0.3, osgm_decay_mode="data_dependent"
    ),
    "os_gated_deltanet, aware of beta, learned decay": entries(
        "os_gated_deltanet", osgm_post_gate_regret=True, osgm_eta=-0.8, osgm_decay_mode="learnable"
    ),
    "os_gated_deltanet without": entries("os_gated_deltanet", use_osgm=False),
    "os_kda, constant decay": entries("os_kda", osgm_decay_gamma=0.9, osgm_eta=0.5),
    "os_kda, shared keys, unaware": entries(
        "os_kda", **SHARED, osgm_beta_aware=False, osgm_decay_mode="data_dependent", **CLIPPED
    ),
    "os_kda, shared keys, no bounds": entries("os_kda", **SHARED, osgm_d_min=None, osgm_decay_mode="none"),
}


@pytest.fixture(params=CASES, ids=str)
def folder(request, tmp_path):
    config = CASES[request.param]
    return fla_checkpoints.write(tmp_path / "in", config, fla_checkpoints.tensors(config))


def read(folder):
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def test_logits_and_layout(folder, tmp_path):
    """Logits equal those of the loop; the saved folder has the same config and the same tensors to the bit."""
    config, tensors = read(folder)
    model = interop.load_pretrained(folder)
    want = np.stack([fla_loop.logits(config, tensors, row) for row in IDS])
    with jax.default_matmul_precision("highest"):
        got = interop.logits(model, IDS)
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)

    family = config["model_type"]
    assert interop.save_pretrained(model, tmp_path / "out") == family
    written, saved = read(tmp_path / "out")
    assert written == config
    assert_equal_tensors(saved, tensors)

    model.origin = None  # as a model that never had this layout: its config.json is written from our configuration
    interop.save_pretrained(model, tmp_path / "new", layout=family)
    written, saved = read(tmp_path / "new")
    assert FAMILIES[family].describe(written).stack == FAMILIES[family].describe(config).stack
    assert_equal_tensors(saved, tensors)


def assert_equal_tensors(got, want):
    assert {name: x.shape for name, x in got.items()} == {name: x.shape for name, x in want.items()}
    for name, x in want.items():
        np.testing.assert_array_equal(got[name], x, err_msg=name)


GOLDEN = Path(os.environ.get("OSDN_GOLDEN_DIR", "")) / "models"


@pytest.mark.skipif("OSDN_GOLDEN_DIR" not in os.environ, reason="OSDN_GOLDEN_DIR names no folder")
@pytest.mark.parametrize("name", ["gated_deltanet", "kda", "precond_gated_deltanet", "precond_kda"])
def test_golden_models(name):
    folder = GOLDEN / f"fla_{name}"
    expected = np.load(folder / "expected.npz")
    with jax.default_matmul_precision("highest"):
        got = interop.logits(interop.load_pretrained(folder), expected["input_ids"])
    np.testing.assert_allclose(got, expected["logits"], rtol=0, atol=TOLERANCE)
    config, tensors = read(folder)
    assert fla_checkpoints.shapes(config) == {key: x.shape for key, x in tensors.items()}
    loop = np.stack([fla_loop.logits(config, tensors, row) for row in expected["input_ids"]])
    np.testing.assert_allclose(loop, expected["logits"], rtol=0, atol=TOLERANCE)


DEFAULTS = {
    "delta_net": (24, 2048, 16, 16, 128, 128, 5632),
    "gated_deltanet": (21, 2048, 6, 6, 256, 512, 5632),
    "kda": (24, 2048, 16, 16, 128, 128, 5632),
    "precond_gated_deltanet": (21, 2048, 6, 6, 256, 512, 5632),
    "precond_kda": (24, 2048, 16, 16, 128, 128, 5632),
    "osla_delta_net": (24, 2048, 16, 16, 128, 128, 5632),
    "os_gated_deltanet": (21, 2048, 6, 6, 256, 512, 5632),
    "os_kda": (24, 2048, 16, 16, 128, 128, 5632),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_absent_entries_have_the_libraries_defaults(name):
    """An entry that is null is one that is absent."""
    for config in ({}, {"num_heads": None, "hidden_ratio": None, "norm_eps": None, "attn": None}):
        model = FAMILIES[name].describe({"model_type": name, **config})
        mixer, mlp = model.stack[0].mixer, model.stack[0].mlp
        sizes = (mixer.width, mixer.num_key_heads, mixer.heads, mixer.key_dim, mixer.value_dim, mlp.hidden)
        assert (model.depth, *sizes) == DEFAULTS[name]
        assert (model.vocab_size, model.norm_epsilon, mixer.norm_epsilon, mixer.conv_size) == (32000, 1e-6, 1e-6, 4)
        assert (model.tied_embeddings, mixer.negative_eigenvalues) == (False, False)
        assert mixer.output_gate == ("delta_net" not in (name, name.removeprefix("osla_")))


REFUSED = [
    ("gated_deltanet", {"attnres_block_size": 4}, "attnres_block_size: got 4, expected null"),
    ("gated_deltanet", {"num_v_heads": 3}, "num_v_heads: got 3, expected a multiple of num_heads = 2"),
    ("gated_deltanet", {"expand_v": 1.3}, r"expand_v: got 1.3, expected head_dim . expand_v to be a whole number"),
    ("gated_deltanet", {"output_gate_activation": "relu"}, "output_gate_activation: got \"relu\", expected one of"),
    ("gated_deltanet", {"use_gate": "yes"}, "use_gate: got \"yes\", expected true or false"),
    ("gated_deltanet", {"conv_bias": True}, "conv_bias: got true, an option unknown here"),
    ("gated_deltanet", {"hidden_act": "gelu"}, "hidden_act: got \"gelu\", expected one of swish, powlu"),
    ("gated_deltanet", {"num_heads": 0}, "num_heads: got 0, expected an integer of at least 1"),
    ("gated_deltanet", {"attn": 3}, "attn: got 3, expected an object or a list of objects"),
    ("gated_deltanet", {"attn": {"layers": [1], "num_heads": 2}}, r"attn.layers: got \[1\], expected a list of layers"),
    ("gated_deltanet", {"attn": {"layers": [0]}}, "attn.num_heads: is missing"),
    ("gated_deltanet", {"attn": {"layers": [0], "num_heads": 3}}, "attn.num_heads: got 3, expected a divisor"),
    ("gated_deltanet", {"attn": {"layers": [0], "num_heads": 2, "qk_norm": True}}, "attn.qk_norm: got true"),
    (
        "gated_deltanet",
        {"attn": [{"layers": [0], "num_heads": 2}, {"layers": [0], "num_heads": 4}]},
        r"attn\[1\].layers: got \[0\], expected each layer once, not 0 again",
    ),
    ("precond_kda", {"attn": [{"layers": [0], "num_heads": 2}]}, "attn: got .*, expected an object"),
    ("precond_kda", {"squash_eps": 1e-5}, "squash_eps: got 1e-05, expected 1e-06 or null"),
    ("precond_gated_deltanet", {"squash_x": 0}, "squash_x: got 0, expected a number above 0"),
    ("kda", {"safe_gate": True}, "safe_gate: got true, expected it with a lower_bound"),
    ("kda", {"lower_bound": 1.0}, "lower_bound: got 1.0, expected a number below 0"),
    ("delta_net", {"qk_norm": "sum"}, "qk_norm: got \"sum\", expected \"l2\" or null"),
    ("delta_net", {"qk_activation": "relu"}, "qk_activation: got \"relu\", expected \"silu\" or null"),
    ("delta_net", {"expand_k": 0.3}, "expand_k: got 0.3, expected hidden_size . expand_k to be a multiple"),
    ("osla_delta_net", {"allow_neg_eigval": True}, "allow_neg_eigval: got true, expected false or null"),
    ("osla_delta_net", {"osgm_decay_mode": "cosine"}, "osgm_decay_mode: got \"cosine\", expected one of none,"),
    ("osla_delta_net", {"osgm_ema_alpha": 1}, "osgm_ema_alpha: got 1, expected a number above 0 and below 1"),
    ("os_gated_deltanet", {"osgm_post_gate_residual": True}, "osgm_post_gate_residual: got true, expected false or"),
    ("os_gated_deltanet", {"osgm_d_decay_source": "gdn"}, "osgm_d_decay_source: got \"gdn\", expected \"osgm\""),
    ("os_gated_deltanet", {"osgm_decay_mode": "ema"}, "osgm_decay_mode: got \"ema\", expected one of none, learnable"),
    ("os_gated_deltanet", {"osgm_d_min": 2, "osgm_d_max": 1}, "osgm_d_min: got 2, expected at most osgm_d_max = 1"),
    ("os_kda", {"osgm_decay_mode": "learnable"}, "osgm_decay_mode: got \"learnable\", expected one of none, constant"),
    ("os_kda", {"osgm_eta": "big"}, "osgm_eta: got \"big\", expected a number"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_refused_options(name, changes, message):
    with pytest.raises(ValueError, match=f"^config.json: .*{message}"):
        FAMILIES[name].describe(entries(name, **changes))


def test_all_problems_at_once():
    config = entries("kda", lower_bound=2, attnres_block_size=2, unknown=1)
    with pytest.raises(ValueError, match="attnres_block_size: .*; lower_bound: .*; unknown: "):
        FAMILIES["kda"].describe(config)


def test_wrong_tensors(tmp_path):
    """Those of a layer are named by the layer."""
    config = entries("precond_kda", num_hidden_layers=2)
    weights = fla_checkpoints.tensors(config)
    for layer in range(2):
        del weights[f"model.layers.{layer}.attn.a_proj.weight"]
    weights["model.layers.1.attn.a_atk_proj.weight"] = np.zeros((2, 16), np.float32)
    weights["model.layers.0.attn.log_atk_scale"] = np.zeros(3, np.float32)
    fla_checkpoints.write(tmp_path / "in", config, weights)
    with pytest.raises(ValueError, match="do not fit precond_kda") as caught:
        interop.load_pretrained(tmp_path / "in")
    text = str(caught.value)
    assert "missing: model.layers.{0-1}.attn.a_proj.weight" in text
    assert "extra: model.layers.1.attn.a_atk_proj.weight" in text
    assert "misshapen: model.layers.0.attn.log_atk_scale: got shape [3], expected [2]" in text
