"""Options of the mixers for experiments: kinds of forgetting, keys without norm, fixed beta, matched steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from osdn_jax.nn import CausalLM, HypergradientConfig
from osdn_jax.ops.rules.entry import matched_step
from support import jit, random_like, relative_error
from support.models import (
    LENGTH,
    SEGMENTS,
    VOCABULARY,
    check_slopes,
    model_config,
    parameters_of,
    reference_logits,
    tokens,
    with_mixer,
)

CASES = {
    "forgetting per head": ("osdn", {"hypergradient": HypergradientConfig(forget_gate="head")}),
    "constant forgetting": (
        "os_gdn",
        {"hypergradient": HypergradientConfig(forget_gate="constant", forget_constant=0.9, beta_aware=True)},
    ),
    "learned constant d": ("osdn", {"hypergradient": HypergradientConfig(eta=0.0, initial=1.0, forget=False)}),
    "keys without norm": ("osdn", {"key_norm": False, "fixed_beta": 1.0}),
    "fixed beta": ("pgdn", {"fixed_beta": 0.5}),
    "step of Gram": ("pgdn", {"match_step": True}),
    "step of hypergradient": ("osdn", {"match_step": True}),
    "step per value head": (
        "os_gdn",
        {"match_step": True, "hypergradient": HypergradientConfig.preset("trust", beta_aware=True)},
    ),
}
DEFAULTS = {"match_step": False, "key_norm": True, "fixed_beta": None, "hypergradient": HypergradientConfig()}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_what_numpy_makes_of_the_definitions(case):
    rule, options = CASES[case]
    config = model_config(rule, **options)
    apply, parameters = parameters_of(config)
    cotangent = random_like(jax.ShapeDtypeStruct((2, LENGTH, VOCABULARY), jnp.float32), seed=3)

    def loss(p):
        logits, _ = apply(p, jnp.asarray(tokens()), segment_ids=jnp.asarray(SEGMENTS))
        return jnp.vdot(logits, cotangent), logits

    gradient, logits = jit(jax.grad(loss, has_aux=True))(parameters)
    want = reference_logits(config, parameters, tokens(), SEGMENTS)
    assert relative_error(logits, want) < 1e-5
    check_slopes(config, parameters, gradient, cotangent)
    assert [name for name, g in gradient.items() if np.abs(g).max() < 1e-6] == []
    changed = [name for name in options if name != "hypergradient"] or list(options)
    ordinary = with_mixer(config, **{name: DEFAULTS[name] for name in changed})
    if parameters.keys() >= parameters_of(ordinary)[1].keys():  # the option changes what is computed
        assert relative_error(reference_logits(ordinary, parameters, tokens(), SEGMENTS), want) > 1e-3


@pytest.mark.parametrize("case", [name for name, (_, options) in CASES.items() if "match_step" in options])
def test_multipliers_are_one_number_per_token(case):
    rule, options = CASES[case]
    config = model_config(rule, **options)
    model = CausalLM(config, rngs=nnx.Rngs(params=0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, config.mixer.width)), jnp.float32)
    factors = model.blocks[0].mixer.multipliers(x)
    assert factors.shape == (2, 9, config.mixer.preconditioner_heads, config.mixer.key_dim)
    np.testing.assert_array_equal(factors, np.broadcast_to(np.asarray(factors)[..., :1], factors.shape))
    assert len(np.unique(np.asarray(factors)[..., 0])) > 9


def test_a_key_of_zeros_has_a_matched_step_of_zero():
    zeros = jnp.zeros((1, 2, 1, 3))
    np.testing.assert_array_equal(matched_step(zeros, zeros), 0)
    gradient = jax.grad(lambda k: jnp.sum(matched_step(2.0 * k, k)))(zeros)
    np.testing.assert_array_equal(gradient, 0)
