"""Number of parameters: the closed formulas against models of every rule."""

import itertools

import pytest
from flax import nnx

from osdn_jax.nn import (
    CausalLM,
    DeltaMixer,
    GramConfig,
    HypergradientConfig,
    SoftmaxAttention,
    count_parameters,
    mixer_formula,
    parameter_formula,
)
from support.models import every_rule, model_config

CHANGES = (
    {},
    {"output_gate": True, "tied_embeddings": True},
    {"output_gate": False, "key_heads": 1, "conv_size": 3},
    {"key_heads": None, "layers": 3, "value_dim": 6},
    {"hypergradient": HypergradientConfig(forget=False)},
    {"hypergradient": HypergradientConfig(beta_aware=True), "key_heads": 1},
    {"hypergradient": HypergradientConfig(forget_gate="head")},
    {"hypergradient": HypergradientConfig(forget_gate="constant"), "key_norm": False},
    {"hypergradient": HypergradientConfig(learned_eta=True), "gram": GramConfig(learned_squash=True)},
)
FIXED_BETA = ("delta_net", "osdn", "pgdn", "mamba2")


OF_ATTENTION = (
    {},
    {"output_gate": True, "tied_embeddings": True},
    {"qk_norm": True, "key_heads": 1},
    {"key_heads": None, "layers": 3, "value_dim": 6},
)


@pytest.mark.parametrize("rule", every_rule)
def test_the_formula_is_what_a_model_holds(rule):
    for changes in OF_ATTENTION if rule == "transformer" else CHANGES:
        config = model_config(rule, **changes)
        model = nnx.eval_shape(lambda c=config: CausalLM(c, rngs=nnx.Rngs(params=0)))
        assert count_parameters(model) == parameter_formula(config), changes
        assert count_parameters(model.blocks[0].mixer) == mixer_formula(config.mixer), changes
        assert isinstance(model.blocks[0].mixer, SoftmaxAttention if rule == "transformer" else DeltaMixer)


@pytest.mark.parametrize("rule", FIXED_BETA)
def test_a_fixed_beta_has_no_parameters(rule):
    config = model_config(rule, fixed_beta=1.0)
    model = nnx.eval_shape(lambda: CausalLM(config, rngs=nnx.Rngs(params=0)))
    assert count_parameters(model) == parameter_formula(config)
    assert parameter_formula(model_config(rule)) - parameter_formula(config) == 12 * 4


@pytest.mark.parametrize("rule", ["gated_delta_net", "kda"])
def test_a_scale_of_the_decay_is_a_number_per_head(rule):
    config = model_config(rule, decay_scale=True)
    model = nnx.eval_shape(lambda: CausalLM(config, rngs=nnx.Rngs(params=0)))
    assert count_parameters(model) == parameter_formula(config) == parameter_formula(model_config(rule)) + 4


def test_each_option_changes_the_count():
    def count(rule="osdn", **changes):
        return parameter_formula(model_config(rule, **changes))

    counts = [count(**changes) for changes in ({}, *CHANGES[1:5])]
    for a, b in itertools.combinations(counts, 2):
        assert a != b


def test_counts_by_hand():
    # DeltaNet: q, k (2 heads of 6) and v (4 of 5) from width 12, 4 taps on each, beta, a norm of 5, the output.
    assert mixer_formula(model_config("delta_net").mixer) == 12 * 44 + 4 * 44 + 12 * 4 + 5 + 20 * 12 == 997
    # OSDN adds d_0 and the gate of forgetting, weight and bias, per key head.
    assert mixer_formula(model_config("osdn").mixer) == 997 + 2 * 6 + 12 * 2 + 2
    # KDA adds a decay of rank 6, with its rates and biases, and the output gate; GDN-2 has gates per channel, not beta.
    assert mixer_formula(model_config("kda").mixer) == 997 + 12 * 6 + 6 * 24 + 4 + 24 + 12 * 20 == 1481
    assert mixer_formula(model_config("gdn2").mixer) == 1481 - 12 * 4 + 12 * 2 * 6 + 12 * 4 * 5
    # Attention: q (4 heads of 6), k (2 of 6) and v (2 of 5), and the output from 4 heads of 5.
    assert mixer_formula(model_config("transformer").mixer) == 12 * (24 + 12 + 10) + 20 * 12 == 792
    # The language model: 17 tokens in and out, two norms and three matrices of the MLP, a last norm.
    assert parameter_formula(model_config("delta_net", layers=2)) == 2 * 17 * 12 + 2 * (997 + 24 + 3 * 120) + 12
