"""Cross-entropy in chunks: against the plain one in values and gradients, its memory, and its sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from osdn_jax.nn import Chunks, cross_entropy
from support import assert_close, jit
from support.models import model_config, parameters_of, tokens

B, T, D, V = 2, 13, 5, 37
CHUNKS = [Chunks(), Chunks(13, 37), Chunks(4, 10), Chunks(5, 1), Chunks(1, 36), Chunks(6, 50)]


def plain(hidden, unembedding, targets):
    logits = jnp.einsum("btd,vd->btv", hidden, unembedding.astype(hidden.dtype), preferred_element_type=jnp.float32)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return nats, jax.nn.logsumexp(logits, axis=-1)


def arguments(dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(B, T, D)), dtype)
    unembedding = jnp.asarray(3 * rng.normal(size=(V, D)), jnp.float32)
    return hidden, unembedding, jnp.asarray(rng.integers(V, size=(B, T)), jnp.int32)


def with_gradient(function, targets):
    """Return (hidden, unembedding) -> ((nats, normalisers), gradients of a sum of both, weighted per token)."""
    rng = np.random.default_rng(1)
    weights = [jnp.asarray(rng.integers(3, size=(B, T)), jnp.float32) for _ in range(2)]

    def program(hidden, unembedding):
        outputs, pull = jax.vjp(lambda x, w: function(x, w, targets), hidden, unembedding)
        return outputs, pull((weights[0], weights[1]))

    return program


@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)], ids=["32", "16"])
def test_equals_the_plain_one(chunks, dtype, tolerance):
    hidden, unembedding, targets = arguments(dtype)
    got = jit(with_gradient(lambda *args: cross_entropy(*args, chunks), targets))(hidden, unembedding)
    want = jit(with_gradient(plain, targets))(hidden, unembedding)
    assert [x.dtype for x in jax.tree.leaves(got)] == [jnp.float32, jnp.float32, dtype, jnp.float32]
    assert_close(got[0], want[0], 1e-6)  # both accumulate products of the same dtype in float32
    assert_close(got[1], want[1], tolerance)


def test_follows_doubles():
    with jax.enable_x64(True):
        hidden, unembedding, targets = (x.astype(jnp.float64) if x.dtype == jnp.float32 else x for x in arguments())
        nats, normalizers = jit(lambda *args: cross_entropy(*args, Chunks(4, 10)))(hidden, unembedding, targets)
    logits = np.asarray(hidden) @ np.asarray(unembedding).T
    want = np.log(np.exp(logits).sum(-1))
    np.testing.assert_allclose(normalizers, want, rtol=1e-14)
    taken = np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]
    np.testing.assert_allclose(nats, want - taken, rtol=1e-12)


def test_large_logits_do_not_overflow():
    hidden, unembedding, targets = arguments()
    run = jit(with_gradient(lambda *args: cross_entropy(*args, Chunks(4, 10)), targets))
    for got, want in zip(
        jax.tree.leaves(run(1e3 * hidden, unembedding)),
        jax.tree.leaves(jit(with_gradient(plain, targets))(1e3 * hidden, unembedding)),
        strict=True,
    ):
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_a_target_outside_the_vocabulary_has_no_nats():
    hidden, unembedding, targets = arguments()
    targets = targets.at[0, 3].set(V).at[1, 0].set(-1)
    nats, normalizers = jit(lambda *args: cross_entropy(*args, Chunks(4, 10)))(hidden, unembedding, targets)
    assert set(zip(*np.nonzero(np.isnan(nats)), strict=True)) == {(0, 3), (1, 0)}
    assert np.isfinite(normalizers).all()


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_of_a_model_it_is_that_of_its_logits(tied):
    apply, parameters = parameters_of(model_config("linear_attention", tied_embeddings=tied))
    x, targets = jnp.asarray(tokens()), jnp.asarray(tokens(1))

    def in_chunks(p):
        hidden, _ = apply(p, x, method="features")
        return cross_entropy(hidden, apply(p, method="unembedding"), targets, Chunks(5, 7))[0].mean()

    def of_logits(p):
        return optax.softmax_cross_entropy_with_integer_labels(apply(p, x)[0], targets).mean()

    got, want = (jit(jax.value_and_grad(f))(parameters) for f in (in_chunks, of_logits))
    assert_close(got[0], want[0], 1e-6)
    assert_close(got[1], want[1], 1e-5)  # the same gradient, summed in another order


def test_needs_a_tenth_of_the_memory():
    def temporaries(function):
        shapes = [
            jax.ShapeDtypeStruct(shape, dtype)
            for shape, dtype in (((1, 4096, 64), jnp.float32), ((32768, 64), jnp.float32), ((1, 4096), jnp.int32))
        ]
        objective = jax.value_and_grad(lambda x, w, y: function(x, w, y)[0].mean(), argnums=(0, 1))
        return jax.jit(objective).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    whole, chunked = temporaries(plain), temporaries(cross_entropy)
    assert whole > 4096 * 32768 * 4
    assert chunked < whole / 10


def test_rows_tokens_and_words_stay_on_their_devices():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(4, 16, 8)), jnp.float32)
    unembedding = jnp.asarray(rng.normal(size=(32, 8)), jnp.float32)
    targets = jnp.asarray(rng.integers(32, size=(4, 16)), jnp.int32)
    program = jax.jit(
        jax.value_and_grad(lambda x, w: cross_entropy(x, w, targets, Chunks(4, 4))[0].mean(), argnums=(0, 1))
    )
    want = program(hidden, unembedding)
    mesh = jax.make_mesh((2, 2, 2), ("data", "context", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    placed = (
        jax.device_put(hidden, NamedSharding(mesh, PartitionSpec("data", "context"))),
        jax.device_put(unembedding, NamedSharding(mesh, PartitionSpec("tensor"))),
    )
    assert_close(program(*placed), want, 1e-6)
    text = program.lower(*placed).compile().as_text()
    assert "all-reduce" in text
    for moving in ("all-gather", "all-to-all", "collective-permute"):
        assert moving not in text


def test_a_chunk_of_nothing_is_refused(our_checks):
    for chunks, said in ((Chunks(0, 1), "chunks.sequence: got 0"), (Chunks(1, -1), "chunks.vocabulary: got -1")):
        with pytest.raises(ValueError, match=said):
            cross_entropy(*arguments(), chunks)


@pytest.mark.usefixtures("our_checks")
def test_wrong_arguments_are_named():
    hidden, table, targets = jnp.ones((1, 3, 4)), jnp.ones((7, 4)), jnp.zeros((1, 3), jnp.int32)
    for wrong, error, said in (
        ((hidden, table, jnp.zeros((1, 3))), TypeError, "targets: got dtype float32, expected an integer"),
        ((hidden, table, [[0, 0, 0]]), TypeError, "targets: got list"),
        ((hidden, table, targets[:, :2]), ValueError, r"targets: got shape \(1, 2\), expected \[B, T\] = \(1, 3\)"),
        ((hidden, jnp.ones((7, 5)), targets), ValueError, r"unembedding: got shape \(7, 5\), .* D = 4 of hidden"),
        ((hidden[0], table, targets), ValueError, r"hidden: got shape \(3, 4\)"),
        ((targets, table, targets), TypeError, "hidden: got dtype int32"),
    ):
        with pytest.raises(error, match=said):
            cross_entropy(*wrong)


@pytest.mark.usefixtures("our_checks")
def test_targets_of_any_integer_type():
    """No target outside the vocabulary becomes a valid one, by truncation from 64 bits to 32 or by a negative index."""
    hidden, table = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 4)), jnp.float32), jnp.eye(300, 4)
    want, _ = cross_entropy(hidden, table, jnp.array([[1, 2, 3]], jnp.int32))
    for dtype in (np.int8, np.uint16, np.int64, np.uint64):
        got, _ = cross_entropy(hidden, table, np.array([[1, 2, 3]], dtype))
        np.testing.assert_array_equal(got, want)
    for outside in (np.array([[2**32 + 1, -1, 300]], np.int64), np.array([[2**64 - 1, 2**32, 300]], np.uint64)):
        assert np.isnan(cross_entropy(hidden, table, outside)[0]).all()
