"""Values that are not finite in one document reach no other, through attention, mixers and the whole model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from osdn_jax.nn.softmax import attend
from support import jit, random_like, value_and_gradient
from support.models import SEGMENTS, VOCABULARY, model_config, parameters_of

B, T, H, K = 2, 12, 2, 4
FIRST = np.repeat([[0, 5, 8], [0, 3, 10]], [5, 3, 4], axis=1)  # the start of each query's document
FIRST[1] = np.repeat([0, 3, 10], [3, 7, 2])
BAD = 6  # a token of the second document in both rows
OTHERS = np.array([[t < 5 or t >= 8 for t in range(T)], [t < 3 or t >= 10 for t in range(T)]])


def heads(seed=0):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=(B, T, H, K)), jnp.float32) for name in "qkv"}


def attention(x, chunk_size=None, window=None):
    return {"o": attend(**x, first=jnp.asarray(FIRST, jnp.int32), chunk_size=chunk_size, window=window)}


@pytest.mark.parametrize(("chunk_size", "window"), [(None, None), (5, None), (2, 8)])
@pytest.mark.parametrize(("name", "value"), [("q", np.nan), ("k", np.nan), ("v", np.nan), ("v", np.inf), ("k", 1e30)])
def test_attention(name, value, chunk_size, window):
    """A bad token reaches neither earlier tokens nor other documents, in values and in gradients."""
    x = heads()
    bad = x | {name: x[name].at[:, BAD].set(value)}
    if value == 1e30:
        bad = bad | {"q": x["q"].at[:, BAD].set(1e30)}  # finite, but their product is not
    program = jit(value_and_gradient(lambda x: attention(x, chunk_size, window)))
    cotangents = random_like(jax.eval_shape(attention, x), seed=1)
    want, d_want = program(x, cotangents)
    got, d_got = program(bad, cotangents)
    np.testing.assert_allclose(got["o"][OTHERS], want["o"][OTHERS], rtol=1e-5, atol=1e-6)
    before = np.s_[:, 5:BAD] if name != "q" else np.s_[:, BAD + 1 :]  # a query affects its own token only
    np.testing.assert_allclose(got["o"][before][:1], want["o"][before][:1], rtol=1e-5, atol=1e-6)
    assert not np.isfinite(np.asarray(got["o"][:, BAD])).any()
    for each in "qkv":
        np.testing.assert_allclose(d_got[each][OTHERS], d_want[each][OTHERS], rtol=1e-4, atol=1e-6)
    assert not np.isfinite(np.concatenate([np.ravel(x) for x in d_got.values()])).all()


def test_attention_without_documents_is_causal():
    x = heads()
    o = attend(x["q"], x["k"], x["v"].at[:, BAD].set(jnp.nan), jnp.zeros((B, T), jnp.int32))
    assert np.isfinite(np.asarray(o[:, :BAD])).all()
    assert np.isnan(np.asarray(o[:, BAD:])).all()


@pytest.mark.parametrize("rule", ["os_kda", "pgdn", "transformer"])
def test_a_model(rule):
    """A NaN embedding of one token leaves the logits of the other documents unchanged."""
    apply, parameters = parameters_of(model_config(rule, layers=2, chunk_size=8))
    rng = np.random.default_rng(0)
    segments = np.asarray(SEGMENTS)
    tokens = rng.integers(0, VOCABULARY - 1, size=segments.shape).astype(np.int32)
    second = segments == np.array([[2], [9]])
    last = np.argmax(np.cumsum(second, axis=1), axis=1)
    tokens[np.arange(2), last] = VOCABULARY - 1
    bad = parameters | {"embedding/embedding": parameters["embedding/embedding"].at[-1].set(jnp.nan)}
    program = jit(lambda p: apply(p, jnp.asarray(tokens), segment_ids=jnp.asarray(segments))[0])
    got, want = program(bad), program(parameters)
    np.testing.assert_allclose(got[~second], want[~second], rtol=1e-4, atol=1e-5)
    assert np.isnan(got[np.arange(2), last]).all()
