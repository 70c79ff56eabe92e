"""Accuracy on a recall task against a loop, and of models that know all answers or none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from osdn_jax import nn
from osdn_jax.data import validation_batches
from osdn_jax.data.recall import IGNORE, TaskWindows, mqar
from osdn_jax.evaluation import make_recall_accuracy, recall_accuracy


def lookup(table):
    """A model whose logits are rows of `table` by token, as its features are the tokens' one-hot codes."""

    def apply(parameters, *arguments, method="__call__"):
        if method == "unembedding":
            return parameters.T
        hidden = jax.nn.one_hot(arguments[0], len(table))
        return (hidden if method == "features" else hidden @ parameters), ()

    return apply, jnp.asarray(table, jnp.float32)


def by_loop(answers, targets):
    shares = []
    for answer, target in zip(answers, targets, strict=True):
        asked = target != IGNORE
        if asked.any():
            shares.append(np.mean(answer[asked] == target[asked]))
    return np.mean(shares)


@pytest.mark.parametrize("questions", [None, 2, 4])
def test_against_a_loop(questions):
    tokens, targets = mqar(60, 16, 2, vocabulary=8, seed=0)
    targets[:5] = IGNORE  # examples without a question
    targets[5:20, 4:8] = IGNORE
    table = np.random.default_rng(0).normal(size=(8, 8))
    apply, parameters = lookup(table)
    want = by_loop(table.astype(np.float32).argmax(axis=1)[tokens], targets)
    got = recall_accuracy(apply, parameters, tokens, targets, questions=questions)
    np.testing.assert_allclose(float(got), want, rtol=1e-6)
    assert 0 < want < 1
    batches = validation_batches(TaskWindows(type(mqar(1, 8, 1, seed=0))(tokens, targets)), batch_size=7)
    got = make_recall_accuracy(apply, questions=questions)(parameters, batches)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_a_model_that_knows_is_right():
    tokens, targets = np.full((3, 4), 1, np.int32), np.full((3, 4), IGNORE, np.int32)
    targets[:, 2] = 5
    apply, parameters = lookup(np.eye(8)[[0, 5, 0, 0, 0, 0, 0, 0]])
    assert float(recall_accuracy(apply, parameters, tokens, targets, questions=1)) == 1
    assert np.isnan(float(recall_accuracy(apply, parameters, tokens, np.full_like(targets, IGNORE))))


def test_on_a_language_model_under_jit_and_vmap():
    mixer = nn.mixer_config("delta_net", width=8, heads=1, key_dim=8, value_dim=8)
    config = nn.ModelConfig(vocab_size=16, layers=1, mixer=mixer, mlp_dim=8)
    apply, one = nn.split_model(nn.CausalLM(config, rngs=nnx.Rngs(0)))
    _, two = nn.split_model(nn.CausalLM(config, rngs=nnx.Rngs(1)))
    tokens, targets = mqar(40, 16, 2, vocabulary=16, seed=0)
    both = jax.tree.map(lambda *x: jnp.stack(x), one, two)
    accuracy = jax.jit(jax.vmap(lambda p: recall_accuracy(apply, p, tokens, targets, questions=2)))(both)
    for got, parameters in zip(accuracy, (one, two), strict=True):
        logits = apply(parameters, jnp.asarray(tokens))[0]
        np.testing.assert_allclose(got, by_loop(np.asarray(logits.argmax(-1)), targets), rtol=1e-6)
