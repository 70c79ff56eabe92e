"""A language model of every rule: against NumPy, token by token, packed, in both implementations and in 16 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from osdn_jax.nn import CausalLM
from osdn_jax.nn.split import split_model
from support import jit, random_like, relative_error
from support.models import (
    LENGTH,
    LENGTHS,
    SEGMENTS,
    VOCABULARY,
    check_slopes,
    every_rule,
    largest_error,
    model_config,
    parameters_of,
    reference_logits,
    small_model,
    tokens,
    with_mixer,
)

ONE_DOCUMENT = np.ones_like(SEGMENTS)

pytestmark = pytest.mark.parametrize("rule", every_rule)


def test_is_what_numpy_makes_of_the_definitions(rule):
    config, _, parameters, forward = small_model(rule)
    logits, _ = forward(parameters, tokens(), SEGMENTS)
    assert logits.shape == (2, LENGTH, VOCABULARY)
    assert logits.dtype == jnp.float32
    assert relative_error(logits, reference_logits(config, parameters, tokens(), SEGMENTS)) < 1e-5


@pytest.mark.slow
def test_token_by_token_is_the_whole(rule):
    _, apply, parameters, forward = small_model(rule)
    whole, after = forward(parameters, tokens(), ONE_DOCUMENT)

    def one_by_one(parameters, x):
        first, states = apply(parameters, x[:, :1])

        def step(states, token):
            logits, states = apply(parameters, token[:, None], states)
            return states, logits[:, 0]

        states, rest = jax.lax.scan(step, states, x[:, 1:].T)
        return jnp.concatenate([first, rest.swapaxes(0, 1)], axis=1), states

    logits, states = jit(one_by_one)(parameters, tokens())
    assert largest_error(logits, whole) < 1e-5
    assert jax.tree.structure(states) == jax.tree.structure(after)
    for got, want in zip(jax.tree.leaves(states), jax.tree.leaves(after), strict=True):
        if jnp.issubdtype(want.dtype, jnp.integer):
            np.testing.assert_array_equal(got, want)
        else:
            assert largest_error(got, want) < 1e-5


def test_packed_documents_are_separate_ones(rule):
    _, _, parameters, forward = small_model(rule)
    packed, _ = forward(parameters, tokens(), SEGMENTS)
    for row, lengths in enumerate(LENGTHS):
        for start, length in zip(np.cumsum([0, *lengths]), lengths, strict=False):
            alone = np.roll(tokens(), -start, axis=1)  # the document first; what follows it does not matter
            separate, _ = forward(parameters, alone, ONE_DOCUMENT)
            assert largest_error(packed[row, start : start + length], separate[row, :length]) < 1e-5
    whole, _ = forward(parameters, tokens(), ONE_DOCUMENT)
    assert largest_error(packed, whole) > 1e-3  # documents would leak, were they not kept apart


def test_a_token_changes_nothing_before_it(rule):
    _, _, parameters, forward = small_model(rule)
    before, _ = forward(parameters, tokens(), SEGMENTS)
    for t in (0, 7, 8, LENGTH - 1):
        other = tokens()
        other[:, t] = (other[:, t] + 1) % VOCABULARY
        after, _ = forward(parameters, other, SEGMENTS)
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert (np.abs(after[:, t] - before[:, t]).max(axis=-1) > 1e-3).all()


@pytest.mark.slow
def test_gradients_in_chunks_are_slopes_and_reach_every_parameter(rule):
    config, _, parameters, forward = small_model(rule)
    cotangent = random_like(jax.ShapeDtypeStruct((2, LENGTH, VOCABULARY), jnp.float32), seed=3)
    x, ids = jnp.asarray(tokens()), jnp.asarray(SEGMENTS)
    apply, _ = parameters_of(with_mixer(config, implementation="chunk", chunk_size=8))

    def loss(parameters):
        logits, _ = apply(parameters, x, segment_ids=ids)
        return jnp.vdot(logits, cotangent), logits

    gradient, logits = jit(jax.grad(loss, has_aux=True))(parameters)
    assert relative_error(logits, forward(parameters, x, ids)[0]) < 1e-5  # forward uses the scan here, or one chunk
    assert [name for name, g in gradient.items() if not np.isfinite(g).all() or np.abs(g).max() < 1e-6] == []
    check_slopes(config, parameters, gradient, cotangent)


@pytest.mark.slow
def test_computing_in_16_bits_stays_near(rule):
    config, _, parameters, forward = small_model(rule)
    apply, fresh = parameters_of(model_config(rule, dtype="bfloat16"))
    assert {x.dtype for x in fresh.values()} == {jnp.dtype("float32")}
    logits, states = jit(lambda p, x: apply(p, x))(parameters, tokens())
    assert logits.dtype == jnp.float32
    if rule == "transformer":  # its memory is its keys and values, which are activations
        assert {state.keys.dtype for state in states} == {jnp.dtype("bfloat16")}
    else:
        assert {state.rule.recurrent.dtype for state in states} == {jnp.dtype("float32")}
    error = relative_error(logits, forward(parameters, tokens(), ONE_DOCUMENT)[0])
    assert 1e-4 < error < 0.1  # and it is in 16 bits: less would be float32
    assert config.dtype == "float32"


def test_starts_with_typed_parameters(rule):
    # A weakly typed one would be another type after the first step, and the step would compile a second time.
    _, fresh = split_model(CausalLM(model_config(rule), rngs=nnx.Rngs(params=0)))
    assert {name: x.aval for name, x in fresh.items() if x.weak_type or x.dtype != jnp.float32} == {}
