"""Bits per byte: against NumPy, over every byte once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from osdn_jax.data import Document, PackedWindows, validation_batches
from osdn_jax.evaluation import make_evaluate
from osdn_jax.nn import Chunks, likelihood_sums

VOCABULARY = 256
DOCUMENTS = [Document("a", b"To be, or not to be"), Document("b", b"?"), Document("c", b"that is the question" * 4)]


def random_logits(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32) * 3


def of_logits(logits):
    """A model as `split_model` gives it from the function (parameters, inputs, segment_ids) -> logits."""

    def apply(parameters, *args, method, dropout_key=None, **kwargs):
        size = parameters["table"].shape[-1]
        return jnp.eye(size) if method == "unembedding" else (logits(parameters, *args, **kwargs), None)

    return apply


@of_logits
def bigram(parameters, inputs, segment_ids):
    """A model without memory: the logits are a row of a table."""
    assert segment_ids.shape == inputs.shape
    return parameters["table"][inputs]


def negative_log_likelihood(logits, targets):
    logits = np.asarray(logits, np.float64)
    return np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]


def sums_of(logits, batch):
    model = of_logits(lambda parameters, inputs, segment_ids: parameters["table"])
    return likelihood_sums(model, {"table": logits}, batch)


def test_the_sums_of_a_batch():
    rng = np.random.default_rng(1)
    logits, targets = random_logits(2, 5, 7), rng.integers(7, size=(2, 5)).astype(np.int32)
    weights = np.asarray([[1, 0, 1, 1, 0], [0, 0, 0, 0, 2.5]], np.float32)
    batch = {"inputs": targets, "targets": targets, "segment_ids": targets, "weights": weights}
    got = sums_of(jnp.asarray(logits), batch)
    normalizers = np.log(np.exp(logits.astype(np.float64)).sum(-1))
    np.testing.assert_allclose(got.nats, (negative_log_likelihood(logits, targets) * weights).sum(), rtol=1e-6)
    np.testing.assert_allclose(got.squared_normalizers, (normalizers**2 * weights).sum(), rtol=1e-6)
    assert got.targets == 5.5
    gradient = jax.grad(lambda x: sums_of(x, batch).nats)(jnp.asarray(logits))
    np.testing.assert_array_equal(np.abs(gradient).max(-1) > 0, weights > 0)
    probability = np.exp(logits[1, 4]) / np.exp(logits[1, 4]).sum()
    np.testing.assert_allclose(gradient[1, 4], 2.5 * (probability - np.eye(7)[targets[1, 4]]), rtol=1e-4, atol=1e-6)


def test_a_masked_label_may_be_any_number():
    logits, targets = jnp.asarray(random_logits(1, 3, 7)), np.asarray([[2, -100, 6]], np.int32)
    batch = {"inputs": targets, "targets": targets, "segment_ids": targets, "weights": np.ones((1, 3), np.float32)}
    assert np.isnan(sums_of(logits, batch).nats)
    batch["weights"][0, 1] = 0
    nats, gradient = jax.value_and_grad(lambda x: sums_of(x, batch).nats)(logits)
    want = negative_log_likelihood(logits[:, ::2], targets[:, ::2]).sum()
    np.testing.assert_allclose(nats, want, rtol=1e-6)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[0, 1], 0.0)


def test_positions_choose_the_tokens_of_the_loss():
    logits, ids = jnp.asarray(random_logits(2, 5, 7)), np.zeros((2, 5), np.int32)
    positions, labels = np.asarray([[3, 1], [4, 0]], np.int32), np.asarray([[6, 2], [0, 5]], np.int32)
    weights = np.asarray([[1, 0.5], [1, 0]], np.float32)
    chosen = {"inputs": ids, "segment_ids": ids, "positions": positions, "targets": labels, "weights": weights}
    all_tokens = {"inputs": ids, "segment_ids": ids, "targets": ids.copy(), "weights": np.zeros((2, 5), np.float32)}
    np.put_along_axis(all_tokens["targets"], positions, labels, 1)
    np.put_along_axis(all_tokens["weights"], positions, weights, 1)
    for got, want in zip(sums_of(logits, chosen), sums_of(logits, all_tokens), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)
    got, want = (jax.grad(lambda x, batch=batch: sums_of(x, batch).nats)(logits) for batch in (chosen, all_tokens))
    np.testing.assert_allclose(got, want, atol=1e-6)
    with pytest.raises(ValueError, match=r"got targets of shape \(2, 5\), expected \(2, 2\) like the positions"):
        sums_of(logits, chosen | {"targets": ids})


@pytest.mark.parametrize(("length", "batch_size"), [(7, 3), (16, 2), (200, 4), (1, 50)])
def test_every_byte_counts_once_however_it_is_cut(length, batch_size):
    table = random_logits(VOCABULARY, VOCABULARY)
    batches = validation_batches(PackedWindows(DOCUMENTS, length), batch_size=batch_size)
    got = make_evaluate(bigram, Chunks(3, 100))({"table": jnp.asarray(table)}, batches)
    # Each byte by the one before it, the first of a document by its start.
    nats = [
        negative_log_likelihood(table[before], byte)
        for document in DOCUMENTS
        for before, byte in zip(b"\0" + document.text, document.text, strict=False)
    ]
    assert len(nats) == sum(len(document.text) for document in DOCUMENTS) == 100
    assert isinstance(got, float)
    np.testing.assert_allclose(got, np.mean(nats) / np.log(2), rtol=1e-6)


def test_a_model_that_knows_nothing_needs_eight_bits():
    table = jnp.zeros((VOCABULARY, VOCABULARY))
    got = make_evaluate(bigram)({"table": table}, validation_batches(PackedWindows(DOCUMENTS, 16), batch_size=2))
    np.testing.assert_allclose(got, 8, rtol=1e-6)


def test_the_model_sees_where_documents_start():
    batches = list(validation_batches(PackedWindows(DOCUMENTS, 16), batch_size=2))

    @of_logits
    def by_document(parameters, inputs, segment_ids):
        return parameters["table"][segment_ids]

    table = random_logits(VOCABULARY, VOCABULARY)
    got = make_evaluate(by_document)({"table": jnp.asarray(table)}, batches)
    parts = [(negative_log_likelihood(table[b["segment_ids"]], b["targets"]) * b["weights"]).sum() for b in batches]
    np.testing.assert_allclose(got, sum(parts) / 100 / np.log(2), rtol=1e-6)
