"""Every entry of a config.json with wrong values: one error that names the file and the entry, or a model."""

import copy
import dataclasses
import json

import pytest

from osdn_jax.interop.families import FAMILIES, describe, own
from osdn_jax.nn import AttentionConfig, BlockConfig, MixtureConfig, ModelConfig
from support import pretrained
from support.fla_checkpoints import entries
from support.models import model_config

WRONG = ["x", "", True, 0, -1, 2.5, float("nan"), float("inf"), 2**31, 10**400, -(10**400), 1e300, -1e300]
WRONG += [[], ["x"], [None], {}, {"a": 1}, [[]], "a\ud800"]

_ATTENTION = {"layers": [0], "num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, "window_size": 3, "rope_theta": 50.0}
_FEEDBACK = {"osgm_d_min": 0.5, "osgm_d_max": 2.0, "osgm_eta": 1.0, "osgm_decay_gamma": 0.9}


def _own():
    uniform = model_config("os_kda")
    attention = AttentionConfig(uniform.width, 2, 4, 4, rotary_base=50.0)
    mixture = MixtureConfig(4, 2, 8, router="sigmoid", groups=2, shared_hidden=8)
    return ModelConfig(17, blocks=(*uniform.stack, BlockConfig(attention, mixture, "post")))


CONFIGS = {
    "osdn_jax": own.express(model_config("pgdn")),
    "osdn_jax, blocks": own.express(_own()),
    "osla_delta_net": entries(
        "osla_delta_net", use_osgm=True, osgm_decay_mode="learnable", osgm_ema_alpha=0.9, attn=_ATTENTION, **_FEEDBACK
    ),
    "os_gated_deltanet": entries("os_gated_deltanet", osgm_post_gate_regret=True, **_FEEDBACK),
    "os_kda": entries("os_kda", osgm_beta_aware=True, lower_bound=-3.0, **_FEEDBACK),
    "delta_net": entries("delta_net", conv_size=4, norm_eps=1e-5, hidden_ratio=4),
    "gated_deltanet": entries("gated_deltanet", num_v_heads=2, expand_v=2.0, use_gate=True, attn=[_ATTENTION]),
    "precond_kda": entries("precond_kda", lower_bound=-3.0, safe_gate=True, squash_x=1.5, squash_eps=1e-6),
    **{name: pretrained.config_of(name) for name in ("qwen3_next", "qwen3_5_moe", "olmo_hybrid", "kimi_linear")},
}


def places(values, before=()):
    """Yield the path to every value of nested objects and lists."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        yield (*before, key)
        if isinstance(value, dict | list):
            yield from places(value, (*before, key))


# Entries that a problem may name instead: those that do not fit the changed one.
_OTHERS = {
    "head_dim": "partial_rotary_factor",
    "num_hidden_layers": "layer_types",
    "num_attention_heads": "num_key_value_heads",
    "blocks": "Block",
}


@pytest.mark.usefixtures("our_checks")
@pytest.mark.parametrize("name", CONFIGS)
def test_wrong_values_are_named(name):
    config = json.loads(json.dumps(CONFIGS[name]))
    family = FAMILIES[name.split(",")[0]]
    describe(family, config)
    refused = 0
    for *path, key in places(config):
        if key == "model_type":
            continue
        for value in WRONG:
            changed = copy.deepcopy(config)
            inner = changed
            for step in path:
                inner = inner[step]
            inner[key] = value
            entry = next(step for step in (key, *reversed(path)) if isinstance(step, str))
            try:
                assert isinstance(describe(family, changed), ModelConfig)
            except ValueError as error:
                text = str(error)
                refused += 1
                assert text.startswith("config.json: "), (path, key, value, text)
                assert entry in text or _OTHERS.get(entry, entry) in text, (path, key, value, text)
                assert text.isprintable(), (path, key, value, text)
    assert refused > 100


@pytest.mark.usefixtures("our_checks")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 2**31 - 1}, "model.layers: got 2147483647, expected at most 10,000"),
        ({"vocab_size": 10**400}, "model.vocab_size: got 10+..., expected at most 2,147,483,647"),
        ({"blocks": [{}] * 10_001}, "model.blocks: got 10001, expected at most 10,000"),
        ({"norm_epsilon": 1e300}, r"model.norm_epsilon: got 1e\+300, expected a number that float32 has"),
        ({"mlp_dim": "x"}, "model: mlp_dim: got 'x', expected an int of at least 1"),
        ({"new\x1b": 1}, r"model: .*'new\\x1b'"),
    ],
)
def test_our_own_configs_have_limits(changes, message):
    config = {"model_type": "osdn_jax", "model": dataclasses.asdict(model_config("pgdn")) | changes}
    with pytest.raises(ValueError, match=f"^config.json: {message}"):
        describe(own.FAMILY, config)


@pytest.mark.parametrize(
    ("name", "entry", "value", "expected"),
    [
        ("kda", "lower_bound", -(10**400), "a number below 0"),
        ("os_kda", "osgm_eta", 10**400, "a number"),
        ("os_kda", "osgm_eta", 1e300, "a number"),
        ("os_gated_deltanet", "osgm_d_min", -(10**400), "a number"),
        ("osla_delta_net", "osgm_d_max", 10**400, "a number"),
    ],
)
def test_numbers_that_float32_does_not_have(name, entry, value, expected):
    with pytest.raises(ValueError, match=rf"^config.json: {entry}: got .*, expected {expected}$"):
        describe(FAMILIES[name], entries(name, **{entry: value}))
