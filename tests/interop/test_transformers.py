"""The families of Transformers: the logits of an independent NumPy model, and saved folders with the same bits."""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from osdn_jax import interop
from osdn_jax.interop.families import family_of
from osdn_jax.interop.saving import differences
from osdn_jax.nn import MESH_AXES, CausalLM, ModelConfig, mixer_config, split_model
from support import pretrained

FAMILIES = ("qwen3_next", "qwen3_5", "qwen3_5_moe", "olmo_hybrid", "kimi_linear")
IDS = np.random.default_rng(0).integers(19, size=(2, 11))  # int64, as NumPy and PyTorch have them

_GOLDEN = os.environ.get("OSDN_GOLDEN_DIR")
GOLDEN = sorted(p for p in (Path(_GOLDEN) / "models").iterdir() if not p.name.startswith("fla_")) if _GOLDEN else []

_DELTA_LAYERS = {"num_hidden_layers": 3, "layer_types": ["full_attention", "linear_attention", "linear_attention"]}
_DENSE = {"num_experts": 0, "num_experts_per_tok": 1}
_RELEASED_KIMI = {
    "num_hidden_layers": 3,
    "linear_attn_config": {
        "kda_layers": [1, 3],
        "full_attn_layers": [2],
        "num_heads": 2,
        "head_dim": 6,
        "short_conv_kernel_size": 4,
    },
    "first_k_dense_replace": 2,
    "moe_layer_freq": 1,
    "moe_router_activation_func": "sigmoid",
    "use_grouped_topk": True,
    "mla_use_nope": True,
    "rope_theta": 1e4,
}
# Options of each family that change what its tensors are or mean.
VARIANTS = {
    "qwen3_next": {
        "as many heads": {"linear_num_key_heads": 4, "num_key_value_heads": 4},
        "one head": {"linear_num_key_heads": 1, "linear_num_value_heads": 3, "num_key_value_heads": 1},
        "tied": {"tie_word_embeddings": True},
        "dense layers": {"mlp_only_layers": [1], "norm_topk_prob": False, "num_experts_per_tok": 3},
        "no experts": _DENSE,
        "every second layer": _DELTA_LAYERS | {"decoder_sparse_step": 2},
        "rotary": _DENSE
        | {
            "rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 1.0, "rope_type": "default"},
        },
        "old rotary": _DENSE | {"rope_parameters": None, "rope_theta": 300.0, "partial_rotary_factor": 0.5},
        "epsilon": _DENSE | {"rms_norm_eps": 1e-2},
    },
    "qwen3_5": {"order": _DELTA_LAYERS, "tied": {"tie_word_embeddings": True}, "heads": {"linear_num_key_heads": 1}},
    "qwen3_5_moe": {"order": _DELTA_LAYERS, "all": {"num_experts_per_tok": 4}},
    "olmo_hybrid": {
        "order": _DELTA_LAYERS,
        "tied": {"tie_word_embeddings": True},
        "no positions": {"rope_parameters": {"rope_theta": None, "rope_type": "default"}},
        "plain beta": {"linear_allow_neg_eigval": False, "rms_norm_eps": 1e-3},
        "as many heads": {"linear_num_key_heads": 4, "num_key_value_heads": 4},
    },
    "kimi_linear": {
        "low rank of queries": {"q_lora_rank": 3},
        "groups": {"num_experts": 6, "num_expert_group": 3, "topk_group": 2, "moe_renormalize": False},
        "two shared": {"num_shared_experts": 2, "mlp_layer_types": ["sparse", "dense"]},
        "no shared channels": {"qk_rope_head_dim": 0},
        "no shared experts": {"num_shared_experts": 0, "mlp_layer_types": ["sparse", "sparse"]},
    },
}
CASES = {family: (family, {}, {}) for family in FAMILIES}
CASES |= {f"{f}: {name}": (f, changes, {}) for f, variants in VARIANTS.items() for name, changes in variants.items()}
CASES |= {
    "olmo_hybrid: released": ("olmo_hybrid", {}, {"released": True}),
    "kimi_linear: released": ("kimi_linear", _RELEASED_KIMI, {"released": True}),
    "qwen3_5_moe: stacked": ("qwen3_5_moe", {}, {"stacked": True}),
    "qwen3_next: stacked": ("qwen3_next", {}, {"stacked": True}),
}


def checkpoint(folder, family, changes, options, **more):
    config = pretrained.config_of(family, **changes)
    if changes is _RELEASED_KIMI:
        config = {
            name: value
            for name, value in config.items()
            if name not in ("layer_types", "mlp_layer_types")
            and not name.startswith(("linear_h", "linear_n", "linear_c"))
        }
    tensors = pretrained.tensors_of(config, **options, **more)
    return pretrained.write_folder(folder, config, tensors), config, tensors


def same_bits(a, b):
    return a.keys() == b.keys() and all(
        (a[k].dtype, a[k].shape, a[k].tobytes()) == (b[k].dtype, b[k].shape, b[k].tobytes()) for k in a
    )


@pytest.mark.parametrize("case", CASES)
def test_logits_and_round_trip(case, tmp_path):
    family, changes, options = CASES[case]
    folder, config, tensors = checkpoint(tmp_path / "m", family, changes, options)
    model = interop.load_pretrained(folder)
    with jax.default_matmul_precision("highest"):
        got = interop.logits(model, IDS)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, pretrained.reference(config, tensors, IDS), atol=1e-5, rtol=0)
    assert interop.save_pretrained(model, tmp_path / "n") == family
    assert same_bits(pretrained.read_folder(tmp_path / "n"), tensors)
    assert (tmp_path / "n" / "config.json").read_text() == (folder / "config.json").read_text()
    assert interop.load_pretrained(tmp_path / "n").config == model.config


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
@pytest.mark.usefixtures("our_checks")
def test_golden_checkpoints(folder, tmp_path):
    expected = np.load(folder / "expected.npz")
    model = interop.load_pretrained(folder)
    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(model(expected["input_ids"])[0], expected["logits"], atol=1e-5, rtol=0)
    interop.save_pretrained(model, tmp_path / "n")
    assert same_bits(pretrained.read_folder(tmp_path / "n"), pretrained.read_folder(folder))
    assert json.loads((tmp_path / "n" / "config.json").read_text()) == json.loads((folder / "config.json").read_text())


@pytest.mark.skipif(not GOLDEN, reason="OSDN_GOLDEN_DIR is not set: no golden data to compare with")
@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_the_numpy_model_has_the_golden_logits(folder):
    config, expected = json.loads((folder / "config.json").read_text()), np.load(folder / "expected.npz")
    got = pretrained.reference(config, pretrained.read_folder(folder), expected["input_ids"])
    np.testing.assert_allclose(got, expected["logits"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_in_several_files(family, tmp_path):
    config = pretrained.config_of(family, dtype="bfloat16")
    tensors = pretrained.tensors_of(config, dtype=pretrained.TYPES["BF16"])
    for name in tensors:
        if name.endswith(("A_log", "dt_bias", "correction_bias")):
            tensors[name] = tensors[name].astype(np.float32)
    folder = pretrained.write_folder(tmp_path / "m", config, tensors, shards=3)
    model = interop.load_pretrained(folder)
    assert model.config.dtype == "bfloat16"
    interop.save_pretrained(model, tmp_path / "n", max_shard_bytes=4000)
    assert same_bits(pretrained.read_folder(tmp_path / "n"), tensors)
    if family != "qwen3_next":
        return
    wide = interop.load_pretrained(folder, dtype="float32")
    np.testing.assert_allclose(interop.logits(wide, IDS), pretrained.reference(config, tensors, IDS), atol=1e-5, rtol=0)
    error = np.abs(interop.logits(model, IDS) - interop.logits(wide, IDS))
    assert np.median(error) < 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_another_model_of_the_same_kind_gets_the_layout_by_name(family, tmp_path):
    folder, _, tensors = checkpoint(tmp_path / "m", family, {}, {"released": True})
    model = interop.load_pretrained(folder)
    model.origin = None
    assert interop.save_pretrained(model, tmp_path / "n", layout=family) == family
    assert same_bits(pretrained.read_folder(tmp_path / "n"), tensors)
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")  # whose defaults may lie outside the vocabulary
    assert [json.loads((tmp_path / "n" / "config.json").read_text())[name] for name in tokens] == [None] * 3
    again = interop.load_pretrained(tmp_path / "n")
    assert differences(again.config, model.config) == []
    assert interop.save_pretrained(model, tmp_path / "own") == "osdn_jax"
    np.testing.assert_array_equal(
        interop.logits(interop.load_pretrained(tmp_path / "own"), IDS), interop.logits(model, IDS)
    )


def test_a_mixture_without_shared_experts(tmp_path):
    """Transformers saves tensors without elements for it; files of others may have none."""
    changes = VARIANTS["kimi_linear"]["no shared experts"]
    folder, config, tensors = checkpoint(tmp_path / "m", "kimi_linear", changes, {})
    model = interop.load_pretrained(folder)
    model.origin = None
    assert interop.save_pretrained(model, tmp_path / "new", layout="kimi_linear") == "kimi_linear"
    assert same_bits(pretrained.read_folder(tmp_path / "new"), tensors)
    some = {name: x for name, x in tensors.items() if x.size}
    assert len(some) == len(tensors) - 6
    loaded = interop.load_pretrained(pretrained.write_folder(tmp_path / "without", config, some))
    np.testing.assert_array_equal(interop.logits(loaded, IDS), interop.logits(model, IDS))
    interop.save_pretrained(loaded, tmp_path / "again")
    assert same_bits(pretrained.read_folder(tmp_path / "again"), some)
    tensors["model.layers.0.block_sparse_moe.shared_experts.up_proj.weight"] = np.zeros((1, 12), np.float32)
    with pytest.raises(ValueError, match=r"shared_experts.up_proj.weight: got shape \[1, 12\], expected \[0, 12\]"):
        interop.load_pretrained(pretrained.write_folder(tmp_path / "wrong", config, tensors))


def test_a_layout_needs_the_kinds_of_layers_of_its_library(tmp_path):
    mixer = mixer_config("gated_delta_net", width=16, heads=2, key_dim=4, value_dim=8)
    model = CausalLM(ModelConfig(vocab_size=32, layers=2, mixer=mixer, mlp_dim=16), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="'olmo_hybrid' needs layers of both kinds"):
        interop.save_pretrained(model, tmp_path / "m", layout="olmo_hybrid")
    assert not (tmp_path / "m").exists()


def test_the_text_of_a_model_with_vision(tmp_path):
    text = pretrained.config_of("qwen3_5")
    config = {"model_type": "qwen3_5", "text_config": text, "vision_config": {"depth": 1}, "image_token_id": 3}
    config |= {"tie_word_embeddings": False, "dtype": "float32"}
    tensors = pretrained.tensors_of(config)
    extra = {"model.visual.blocks.0.proj.weight": np.ones(2, np.float32), "mtp.fc.weight": np.ones(3, np.float32)}
    folder = pretrained.write_folder(tmp_path / "m", config, tensors | extra)
    model = interop.load_pretrained(folder)
    np.testing.assert_allclose(
        interop.logits(model, IDS), pretrained.reference(config, tensors, IDS), atol=1e-5, rtol=0
    )
    assert set(model.origin.left_out) == set(extra)
    with pytest.raises(ValueError, match="model: 2 tensors of .* were not loaded, such as model.visual"):
        interop.save_pretrained(model, tmp_path / "n")
    assert interop.save_pretrained(model, tmp_path / "n", layout="qwen3_5") == "qwen3_5"
    assert json.loads((tmp_path / "n" / "config.json").read_text())["model_type"] == "qwen3_5_text"
    np.testing.assert_array_equal(
        interop.logits(interop.load_pretrained(tmp_path / "n"), IDS), interop.logits(model, IDS)
    )
    lines = interop.inspect(folder).lines
    assert any("vision (1 tensors), multi-token prediction (1 tensors)" in line for line in lines)


@pytest.mark.parametrize("family", ["qwen3_next", "kimi_linear"])
def test_hybrids_over_a_mesh(family, tmp_path):
    """With and without `jax.set_mesh`, and at any number of rows without it."""
    changes = {"vocab_size": 20, "hidden_size": 16}
    changes |= {
        "qwen3_next": {"shared_expert_intermediate_size": 6},
        "kimi_linear": {"linear_num_heads": 4, "num_attention_heads": 4, "num_key_value_heads": 4},
    }[family]
    folder, config, tensors = checkpoint(tmp_path / "m", family, changes, {})
    mesh = jax.make_mesh((1, 2, 2, 1), MESH_AXES)
    model = interop.load_pretrained(folder, mesh=mesh)
    expected = pretrained.reference(config, tensors, IDS)
    np.testing.assert_allclose(interop.logits(model, IDS[:1]), expected[:1], atol=1e-5, rtol=0)
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(interop.logits(model, IDS), expected, atol=1e-5, rtol=0)


def test_a_released_config_with_code_of_a_supported_family(tmp_path):
    folder, config, tensors = checkpoint(tmp_path / "m", "kimi_linear", _RELEASED_KIMI, {"released": True})
    pretrained.write_folder(folder, config | {"auto_map": {"AutoConfig": "configuration_kimi.Kimi"}}, tensors)
    with pytest.raises(ValueError, match="got auto_map, which asks to run code"):
        interop.load_pretrained(folder)
    interop.load_pretrained(folder, ignore_remote_code=True)


def test_a_tied_head_in_the_file(tmp_path):
    folder, config, tensors = checkpoint(tmp_path / "m", "qwen3_next", {"tie_word_embeddings": True}, {})
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    pretrained.write_folder(folder, config, tensors)
    model = interop.load_pretrained(folder)
    interop.save_pretrained(model, tmp_path / "n")
    assert same_bits(pretrained.read_folder(tmp_path / "n"), tensors)
    tensors["lm_head.weight"][0, 0] += 1
    pretrained.write_folder(folder, config, tensors)
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
        interop.load_pretrained(folder)


def test_wrong_tensors_are_listed_by_layer(tmp_path):
    layers = {"num_hidden_layers": 6, "layer_types": ["linear_attention"] * 5 + ["full_attention"]}
    folder, config, tensors = checkpoint(tmp_path / "m", "qwen3_next", layers, {})
    for i in range(6):
        del tensors[f"model.layers.{i}.input_layernorm.weight"]
        tensors[f"model.layers.{i}.mlp.new"] = np.zeros(1, np.float32)
    for i in range(5):
        tensors[f"model.layers.{i}.linear_attn.norm.weight"] = np.zeros(6, np.float32)
    for expert in range(4):
        del tensors[f"model.layers.3.mlp.experts.{expert}.up_proj.weight"]
    pretrained.write_folder(folder, config, tensors)
    with pytest.raises(ValueError, match="do not fit qwen3_next") as error:
        interop.load_pretrained(folder)
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
        "missing: model.layers.{0-5}.input_layernorm.weight",
        "missing: model.layers.3.mlp.experts.{0-3}.up_proj.weight",
        "extra: model.layers.{0-5}.mlp.new",
        "misshapen: model.layers.{0-4}.linear_attn.norm.weight: got shape [6], expected [5]",
    ]


REFUSED = [
    ("qwen3_next", {"attention_bias": True}, "attention_bias: got true, expected false or null"),
    ("qwen3_next", {"hidden_act": "gelu"}, 'hidden_act: got "gelu", expected "silu" or null'),
    ("qwen3_next", {"rope_parameters": {"rope_type": "yarn", "factor": 2}}, 'rope_parameters.rope_type: got "yarn"'),
    ("qwen3_next", {"rope_parameters": {"rope_theta": None}}, "rope_theta: got null, expected a base"),
    (
        "qwen3_next",
        {"layer_types": ["linear_attention"]},
        'layer_types: got ["linear_attention"], expected a list of 2',
    ),
    ("qwen3_next", {"layer_types": ["linear_attention", "sliding_attention"]}, "layer_types: got"),
    ("qwen3_next", {"linear_num_key_heads": 3}, "linear_num_key_heads: got 3, expected a divisor of linear_num_value"),
    ("qwen3_next", {"num_key_value_heads": 3}, "num_key_value_heads: got 3, expected a divisor of num_attention_heads"),
    ("qwen3_next", {"num_experts_per_tok": 9}, "num_experts_per_tok: got 9, expected at most num_experts, 4"),
    ("qwen3_next", {"mlp_only_layers": [5]}, "mlp_only_layers: got [5], expected a list of numbers from 0 to 1"),
    ("qwen3_next", {"hidden_size": "wide"}, 'hidden_size: got "wide", expected an integer of at least 1'),
    (
        "qwen3_next",
        {"num_hidden_layers": 10**9},
        "num_hidden_layers: got 1000000000, expected an integer from 1 to 10,000",
    ),
    ("kimi_linear", {"num_experts": 10**30}, "num_experts: got 1000000000"),
    ("kimi_linear", {"routed_scaling_factor": 10**60}, "routed_scaling_factor: got 1000"),
    ("qwen3_next", {"use_sliding_window": True}, "use_sliding_window: got true"),
    ("qwen3_next", {"brand_new": 1}, "brand_new: got 1, an option unknown here"),
    ("qwen3_5", {"attn_output_gate": False}, "attn_output_gate: got false"),
    ("qwen3_5_moe", {"norm_topk_prob": False}, "norm_topk_prob: got false, expected true or null"),
    ("olmo_hybrid", {"attention_bias": True}, "attention_bias: got true"),
    ("olmo_hybrid", {"rope_parameters": {"rope_type": "linear", "factor": 2}}, 'rope_type: got "linear"'),
    ("olmo_hybrid", {"num_attention_heads": 3}, "num_attention_heads: got 3, expected a divisor of hidden_size, 16"),
    ("kimi_linear", {"mla_use_nope": False}, "mla_use_nope: got false"),
    ("kimi_linear", {"num_key_value_heads": 1}, "num_key_value_heads: got 1, expected 3 or null"),
    ("kimi_linear", {"moe_router_activation_func": "softmax"}, "moe_router_activation_func"),
    ("kimi_linear", {"num_expert_group": 3}, "num_expert_group or topk_group: groups: got 3, expected a divisor"),
    ("kimi_linear", {"n_group": 4}, "n_group: got 4, expected 1, as num_expert_group says"),
    ("kimi_linear", {"layer_types": None, "linear_attn_config": {"kda_layers": [1]}}, "each layer once"),
    (
        "kimi_linear",
        {"linear_attn_config": {"kda_layers": [0, 1]}},
        "kda_layers: got [0, 1], expected a list of numbers",
    ),
    ("kimi_linear", {"linear_attn_config": {"gate": 1}}, "linear_attn_config.gate: got 1, an option unknown"),
]


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED)
def test_options_are_refused_by_name(family, changes, message):
    config = pretrained.config_of(family, **changes)
    with pytest.raises(ValueError, match="^config.json: ") as error:
        family_of(config).describe(config)
    assert message in str(error.value)


def test_entries_of_released_and_older_configs():
    """They say nothing about the logits of text, or what is served anyway."""
    more = {
        "qwen3_next": {
            "full_attention_interval": 4,
            "use_sliding_window": False,
            "temperature": 1.0,
            "_commit_hash": "x",
        },
        "qwen3_5": {"mtp_num_hidden_layers": 1, "mrope_section": [1], "num_experts": 0, "mamba_ssm_dtype": "float32"},
        "olmo_hybrid": {"linear_use_gate": True, "is_decoder": False},
        "kimi_linear": {"rope_theta": 1e4, "head_dim": 2, "num_nextn_predict_layers": 0, "topk_method": "noaux_tc"},
    }
    for family, entries in more.items():
        plain, config = (pretrained.config_of(family, **changes) for changes in ({}, entries))
        assert family_of(config).describe(config) == family_of(plain).describe(plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_options_have_the_defaults_of_transformers(family):
    config = family_of({"model_type": family}).describe({"model_type": family})
    expected = {
        "qwen3_next": (48, 2048, 151936, 3),
        "qwen3_5": (32, 4096, 248320, 3),
        "qwen3_5_moe": (40, 2048, 248320, 3),
        "olmo_hybrid": (32, 3840, 100352, 3),
        "kimi_linear": (27, 2304, 163840, 4),
    }[family]
    kinds = [type(block.mixer).__name__ for block in config.stack]
    first = next(i for i, kind in enumerate(kinds) if kind != "MixerConfig")
    assert (config.depth, config.width, config.vocab_size, first) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_the_caches_hold_what_is_asked(family, tmp_path):
    folder, *_ = checkpoint(tmp_path / "m", family, {}, {})
    for asked, expected in ((None, 64), (9, 9)):
        model = interop.load_pretrained(folder, max_length=asked)
        assert model.config.stack[1].mixer.max_length == expected
    parameters = split_model(model)[1]
    assert all(isinstance(x, jax.Array) for x in parameters.values())
