"""Configurations of modules: the papers' rules, and errors that name the field."""

import dataclasses
import json

import pytest

from osdn_jax import ops
from osdn_jax.nn import RULES, AttentionConfig, GramConfig, HypergradientConfig, MixerConfig, ModelConfig, mixer_config
from support.models import SHAPES, delta_rules, model_config

SIZES = {"width": 8, "heads": 4, "key_dim": 4, "value_dim": 4}

pytestmark = pytest.mark.usefixtures("our_checks")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"width": 0}, "width: got 0, expected an int of at least 1"),
        ({"heads": -2}, "heads: got -2"),
        ({"key_dim": 2.0}, "key_dim: got 2.0"),
        ({"value_dim": True}, "value_dim: got True"),
        ({"conv_size": -1}, "conv_size: got -1"),
        ({"key_heads": 0}, "key_heads: got 0, expected an int of at least 1"),
        ({"key_heads": 3}, "key_heads: got 3, expected a divisor of the 4 heads"),
        ({"key_heads": 8}, "key_heads: got 8"),
        ({"decay": "vector"}, "decay: got 'vector', expected one of none, scalar, channel"),
        ({"strength": "vector"}, "strength: got 'vector', expected one of scalar, channel"),
        ({"strength": "channel"}, "strength: got 'channel' with erase=True, decay='none' and preconditioner='none'"),
        ({"strength": "channel", "decay": "scalar"}, "decay='scalar' .* expected it with erase=True, decay='channel'"),
        ({"strength": "channel", "decay": "channel", "erase": False}, "strength: got 'channel' with erase=False"),
        ({"strength": "channel", "decay": "channel", "preconditioner": "gram"}, "and preconditioner='gram', expected"),
        ({"preconditioner": "adam"}, "preconditioner: got 'adam', expected one of none, hypergradient, gram"),
        ({"erase": False, "preconditioner": "gram"}, "preconditioner: got 'gram' with erase=False"),
        ({"erase": False, "preconditioner": "hypergradient"}, "preconditioner: got 'hypergradient' with erase=False"),
        ({"chunk_size": 0}, "chunk_size: got 0"),
        ({"implementation": "magic"}, "implementation: got 'magic', expected None or one of chunk, mosaic_gpu"),
    ],
)
def test_a_mixer_names_the_field_that_is_wrong(changes, said):
    with pytest.raises(ValueError, match=said):
        MixerConfig(**SIZES | changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"width": 0}, "width: got 0, expected an int of at least 1"),
        ({"heads": 2.0}, "heads: got 2.0"),
        ({"value_dim": -1}, "value_dim: got -1"),
        ({"max_length": 0}, "max_length: got 0, expected an int of at least 1"),
        ({"key_heads": 0}, "key_heads: got 0, expected an int of at least 1"),
        ({"key_heads": 3}, "key_heads: got 3, expected a divisor of the 4 heads"),
        ({"key_dim": 5}, "key_dim: got 5, expected an even number"),
        ({"rotary_base": 1.0}, "rotary_base: got 1.0, expected more than 1"),
        ({"rotary_base": float("nan")}, "rotary_base: got nan"),
        ({"chunk_size": 0}, "chunk_size: got 0"),
        ({"implementation": "mosaic_gpu"}, "implementation: got 'mosaic_gpu', expected None or one of chunk, cudnn"),
        (
            {"implementation": "cudnn", "value_dim": 8},
            "implementation: got 'cudnn' with key_dim=4, value_dim=8 and window=None",
        ),
    ],
)
def test_attention_names_the_field_that_is_wrong(changes, said):
    with pytest.raises(ValueError, match=said):
        AttentionConfig(**SIZES | changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vocab_size": 0}, "vocab_size: got 0"),
        ({"layers": 0}, "layers: got 0"),
        ({"mlp_dim": -1}, "mlp_dim: got -1"),
        ({"dtype": "float16"}, "dtype: got 'float16', expected one of float32, bfloat16"),
        ({"remat": "some"}, "remat: got 'some', expected one of none, blocks, full"),
        ({"dropout": 1.0}, "dropout: got 1.0, expected a rate from 0 to below 1"),
        ({"dropout": -0.1}, "dropout: got -0.1"),
        ({"dropout": float("nan")}, "dropout: got nan"),
    ],
)
def test_a_model_names_the_field_that_is_wrong(changes, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(model_config("osdn"), **changes)


def test_an_unknown_rule_is_named_beside_the_known_ones():
    with pytest.raises(
        ValueError, match="rule: got 'osnd', expected one of delta_net, gated_delta_net, kda, gdn2, osdn, os_"
    ):
        mixer_config("osnd", **SHAPES)


def test_an_unknown_preset_is_named():
    with pytest.raises(ValueError, match="papers.*paper.*trust"):
        HypergradientConfig.preset("papers")


def test_rules_are_those_of_the_papers():
    made = {name: mixer_config(name, **SIZES) for name in delta_rules}
    assert {(c.erase, c.decay, c.preconditioner) for c in made.values() if c.strength == "scalar"} == {
        (erase, decay, preconditioner)
        for decay in ("none", "scalar", "channel")
        for erase, preconditioner in ((False, "none"), (True, "none"), (True, "hypergradient"), (True, "gram"))
    }
    assert {name for name, c in made.items() if c.strength == "channel"} == {"gdn2"}
    assert {name for name, c in made.items() if c.preconditioner == "hypergradient" and c.hypergradient.beta_aware} == {
        "os_gdn",
        "os_kda",
    }
    assert {name for name, c in made.items() if c.output_gate} == {
        name for name, c in made.items() if c.decay != "none"
    }


def test_every_rule_but_the_exact_one_has_a_mixer():
    helpers = {"delta_rule", "delta_rule_step", "exact_gram_write_key", "gram_preconditioner"}
    helpers |= {"State", "hypergradient_preconditioner", "hypergradient_preset"}
    helpers |= {"gram_write_key", "hypergradient_write_key", "squares_preconditioner", "squares_write_key"}
    assert set(delta_rules) == set(ops.__all__) - helpers - {"exact_pdn"}
    assert set(RULES) - set(delta_rules) == {"transformer"}


def test_presets():
    paper, trust = (HypergradientConfig.preset(name) for name in ("paper", "trust"))
    assert paper == HypergradientConfig(eta=1.0, bounds=(0.0, 1e9), initial=0.0)
    assert trust == HypergradientConfig(eta=0.003, bounds=(2 / 3, 3 / 2), initial=1.0, anchor=1.0)
    assert HypergradientConfig.preset("trust", anchor=0.0) == dataclasses.replace(trust, anchor=0.0)


def test_one_preconditioner_per_value_head_only_where_it_follows_beta():
    aware, not_aware = (
        mixer_config(rule, **SIZES | {"key_heads": 2}).preconditioner_heads for rule in ("os_gdn", "osdn")
    )
    assert (aware, not_aware, mixer_config("pdn", **SIZES | {"key_heads": 2}).preconditioner_heads) == (4, 2, 2)
    assert mixer_config("osdn", **SIZES).preconditioner_heads == 4


@pytest.mark.parametrize("rule", ["osdn", "pkda", "transformer"])
def test_a_config_comes_back_from_json(rule):
    """Nested dicts and lists, as JSON writes them, give the same config."""
    config = model_config(rule)
    read = json.loads(json.dumps(dataclasses.asdict(config)))
    assert ModelConfig(**read) == config
    assert hash(ModelConfig(**read)) == hash(config)


def test_bounds_of_a_list_are_bounds():
    assert HypergradientConfig(bounds=[0, 1e9]) == HypergradientConfig(bounds=(0.0, 1e9))
    assert HypergradientConfig(bounds=None).bounds is None
    nested = MixerConfig(**SIZES, preconditioner="hypergradient", hypergradient={"eta": 0.5, "bounds": [0.5, 2]})
    assert nested.hypergradient == HypergradientConfig(eta=0.5, bounds=(0.5, 2.0))


@pytest.mark.parametrize(
    ("make", "changes", "error", "said"),
    [
        (HypergradientConfig, {"bounds": [1.0]}, TypeError, r"bounds: got \[1.0\], expected a pair"),
        (HypergradientConfig, {"bounds": (2.0, 1.0)}, ValueError, "bounds: got .*, an empty range"),
        (HypergradientConfig, {"eta": float("nan")}, ValueError, "eta: got nan"),
        (HypergradientConfig, {"eta": "1"}, TypeError, "eta: got '1'"),
        (HypergradientConfig, {"initial": None}, TypeError, "initial: got None"),
        (HypergradientConfig, {"anchor": float("inf")}, ValueError, "anchor: got inf"),
        (HypergradientConfig, {"forget": "no"}, TypeError, "forget: got 'no', expected True or False"),
        (GramConfig, {"squash": 0}, ValueError, "squash: got 0"),
        (GramConfig, {"center": float("nan")}, ValueError, "center: got nan"),
        (
            MixerConfig,
            SIZES | {"hypergradient": {"etta": 1.0}},
            TypeError,
            "hypergradient: got a dict with the keys etta",
        ),
        (MixerConfig, SIZES | {"gram": 1.5}, TypeError, "gram: got float, expected a GramConfig"),
        (MixerConfig, SIZES | {"erase": "no"}, TypeError, "erase: got 'no', expected True or False"),
        (MixerConfig, SIZES | {"output_gate": 1}, TypeError, "output_gate: got 1"),
        (MixerConfig, SIZES | {"norm_epsilon": 0.0}, ValueError, "norm_epsilon: got 0.0, expected more than 0"),
        (AttentionConfig, SIZES | {"qk_norm": "yes"}, TypeError, "qk_norm: got 'yes'"),
        (AttentionConfig, SIZES | {"norm_epsilon": float("nan")}, ValueError, "norm_epsilon: got nan"),
        (ModelConfig, {"vocab_size": 9, "layers": 1, "mlp_dim": 8, "mixer": None}, TypeError, "mixer: got NoneType"),
        (
            ModelConfig,
            {"vocab_size": 9, "layers": 1, "mlp_dim": 8, "mixer": SIZES},
            TypeError,
            "mixer: got a dict with",
        ),
    ],
)
def test_what_json_may_not_hold(make, changes, error, said):
    with pytest.raises(error, match=said):
        make(**changes)
