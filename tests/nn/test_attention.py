"""Softmax attention: against a loop in NumPy, in chunks, packed, in several calls, token by token, and its cost."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from osdn_jax.nn import AttentionConfig, SoftmaxAttention
from osdn_jax.nn.parameters import weight_decay_mask
from osdn_jax.nn.softmax import attend, rotate
from osdn_jax.nn.split import split_model
from support import assert_close, jit, random_like, relative_error, value_and_gradient
from support.models import LENGTH, LENGTHS, SEGMENTS, reference_attention

DOCUMENTS = jnp.asarray(SEGMENTS)
CONFIG = AttentionConfig(width=12, heads=4, key_heads=2, key_dim=6, value_dim=5, max_length=LENGTH, rotary_base=100.0)
ONE_DOCUMENT = np.ones_like(SEGMENTS)


def made(dtype="float32", **changes):
    """Return (apply, parameters, x) of a mixer whose norms have scales other than 1."""
    config = dataclasses.replace(CONFIG, **changes)
    apply, parameters = split_model(SoftmaxAttention(config, 1, jnp.dtype(dtype), rngs=nnx.Rngs(params=0)))
    rng = np.random.default_rng(0)
    parameters = {name: x + jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype) for name, x in parameters.items()}
    return apply, parameters, jnp.asarray(rng.normal(size=(2, LENGTH, 12)), dtype)


def reference(parameters, x, segment_ids, **changes):
    wide = {f"mixer/{name}": np.asarray(y, np.float64) for name, y in parameters.items()}
    config = dataclasses.replace(CONFIG, **changes)
    return reference_attention(config, wide, np.asarray(x, np.float64), segment_ids)


# Values and gradients


@pytest.mark.parametrize("segment_ids", [None, DOCUMENTS], ids=["one", "packed"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"chunk_size": 7},
        {"key_heads": None, "qk_norm": True},
        {"key_heads": 1, "output_gate": True, "chunk_size": 1},
        {"rotary_base": 10_000.0, "value_dim": 8},
    ],
    ids=str,
)
def test_is_what_numpy_makes_of_the_definition(changes, segment_ids):
    apply, parameters, x = made(**changes)
    out, _ = jit(apply)(parameters, x, segment_ids=segment_ids)
    want = reference(parameters, x, ONE_DOCUMENT if segment_ids is None else segment_ids, **changes)
    assert relative_error(out, want) < 1e-5


@pytest.mark.parametrize("changes", [{}, {"chunk_size": 7}, {"qk_norm": True, "output_gate": True}], ids=str)
def test_gradients_are_slopes(changes):
    apply, parameters, x = made(**changes)
    cotangent = random_like(jax.ShapeDtypeStruct(x.shape, x.dtype), seed=1)
    inputs = parameters | {"x": x}

    def loss(inputs):
        inputs = dict(inputs)
        return jnp.vdot(apply(inputs, inputs.pop("x"), segment_ids=DOCUMENTS)[0], cotangent)

    gradient = jit(jax.grad(loss))(inputs)
    rng = np.random.default_rng(2)
    for name in inputs:
        along = rng.normal(size=inputs[name].shape)
        above, below = (
            {other: np.asarray(y, np.float64) + (h * along if other == name else 0.0) for other, y in inputs.items()}
            for h in (1e-6, -1e-6)
        )
        change = reference(above, above["x"], SEGMENTS, **changes) - reference(below, below["x"], SEGMENTS, **changes)
        slope = np.vdot(change, cotangent) / 2e-6
        size = np.linalg.norm(np.asarray(gradient[name], np.float64)) * np.linalg.norm(along)
        assert abs(np.vdot(np.asarray(gradient[name], np.float64), along) - slope) < 1e-4 * size, name


def test_float64_is_kept():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        q, k, v = (jnp.asarray(rng.normal(size=(2, 9, heads, 6))) for heads in (4, 2, 2))
        first = jnp.zeros((2, 9), jnp.int32)
        out = attend(q, k, v, first, chunk_size=4)
        scores = np.einsum("bthk,bshk->bhts", q, np.repeat(k, 2, axis=2)) / np.sqrt(6)
        weights = np.exp(np.where(np.tri(9, dtype=bool), scores, -np.inf))
        want = np.einsum("bhts,bshv->bthv", weights / weights.sum(-1, keepdims=True), np.repeat(v, 2, axis=2))
        assert out.dtype == jnp.float64
        assert relative_error(out, want) < 1e-14


def test_large_scores_do_not_overflow():
    q = k = jnp.full((1, 5, 1, 2), 1e4)
    v = jnp.arange(5.0)[None, :, None, None]
    out, pull = jax.vjp(lambda q: attend(q, k, v, jnp.zeros((1, 5), jnp.int32)), q)
    np.testing.assert_allclose(out[0, :, 0, 0], np.arange(5) / 2)
    assert np.isfinite(pull(jnp.ones_like(out))[0]).all()


def test_16_bits_stay_near():
    apply, parameters, x = made("bfloat16", output_gate=True)
    out, state = jit(apply)(parameters, x)
    assert {out.dtype, state.keys.dtype, state.values.dtype} == {jnp.dtype("bfloat16")}
    error = relative_error(out.astype(jnp.float32), reference(parameters, x, ONE_DOCUMENT, output_gate=True))
    assert 1e-4 < error < 2e-2


def test_16_bit_keys_far_from_the_start_keep_their_angles():
    # Angles in bfloat16 would be wrong by full rotations at position 1,000.
    x, far = jnp.ones((1, 1, 1, 64), jnp.bfloat16), jnp.asarray([1001])
    got = rotate(x, far[None], 10_000.0).astype(jnp.float32)
    assert relative_error(got, rotate(x.astype(jnp.float32), far[None], 10_000.0)) < 5e-3


# Positions


def test_only_differences_of_positions_count():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def product(i, j):
        return float(jnp.vdot(rotate(q, jnp.asarray([[i]]), 100.0), rotate(k, jnp.asarray([[j]]), 100.0)))

    assert product(12, 5) == pytest.approx(product(7, 0), rel=1e-4)
    assert abs(product(12, 5) - product(12, 6)) > 1e-2
    np.testing.assert_array_equal(rotate(q, jnp.asarray([[0]]), 100.0), q)


def test_order_matters():
    apply, parameters, x = made()
    apply = jit(apply)
    out, _ = apply(parameters, x)
    swapped, _ = apply(parameters, x[:, jnp.asarray([1, 0, *range(2, LENGTH)])])
    assert np.abs(out[:, -1] - swapped[:, -1]).max() > 1e-3


# Heads


def test_shared_key_heads_are_repeated_ones():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 9, heads, 6)), jnp.float32) for heads in (6, 2, 2))
    first = jnp.zeros((2, 9), jnp.int32)
    shared = attend(q, k, v, first)
    assert relative_error(shared, attend(q, jnp.repeat(k, 3, axis=2), jnp.repeat(v, 3, axis=2), first)) < 1e-6


# Documents and states


def test_packed_documents_are_separate_ones():
    apply, parameters, x = made(chunk_size=7)
    run = jit(apply)
    packed, _ = run(parameters, x, segment_ids=DOCUMENTS)
    for row, lengths in enumerate(LENGTHS):
        for start, length in zip(np.cumsum([0, *lengths]), lengths, strict=False):
            alone, _ = run(parameters, jnp.roll(x, -start, axis=1))
            assert relative_error(packed[row, start : start + length], alone[row, :length]) < 1e-5
    assert relative_error(packed, run(parameters, x)[0]) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("segment_ids", [None, DOCUMENTS], ids=["one", "packed"])
@pytest.mark.parametrize("lengths", [(1, 6, 10, 7), (0, 10, 0, 14)], ids=str)
def test_pieces_with_states_are_the_whole(lengths, segment_ids):
    apply, parameters, x = made(chunk_size=8)
    apply = jit(apply)
    want, last = apply(parameters, x, segment_ids=segment_ids)
    assert sum(lengths) == LENGTH
    pieces, state, start = [], None, 0
    for length in lengths:
        piece = slice(start, start + length)
        ids = None if segment_ids is None else segment_ids[:, piece]
        out, state = apply(parameters, x[:, piece], state, ids)
        pieces.append(out)
        start += length
    assert relative_error(jnp.concatenate(pieces, axis=1), want) < 1e-5
    np.testing.assert_array_equal(state.position, LENGTH)
    np.testing.assert_array_equal(state.start, last.start)
    assert relative_error(state.keys, last.keys) < 1e-5
    assert relative_error(state.values, last.values) < 1e-5


def test_a_state_goes_on_with_its_last_document_and_no_other():
    apply, parameters, x = made()
    apply = jit(apply)
    _, state = apply(parameters, x[:, :20], segment_ids=DOCUMENTS[:, :20])
    np.testing.assert_array_equal(state.start, [6, 13])
    ids = jnp.asarray([[3, 3, 8, 8], [9, 9, 9, 8]])
    out, after = apply(parameters, x[:, 20:], state, ids)
    whole = jnp.concatenate([DOCUMENTS[:, :20], ids], axis=1)
    want, _ = apply(parameters, x, segment_ids=whole)
    assert relative_error(out, want[:, 20:]) < 1e-5
    np.testing.assert_array_equal(after.start, [22, 23])


def test_token_by_token_under_scan_is_the_whole():
    apply, parameters, x = made(output_gate=True)
    want, last = jit(apply)(parameters, x)

    @jit
    def decode(parameters, x):
        first, state = apply(parameters, x[:, :1])

        def step(state, token):
            out, state = apply(parameters, token[:, None], state)
            return state, out[:, 0]

        state, rest = jax.lax.scan(step, state, x[:, 1:].swapaxes(0, 1))
        return jnp.concatenate([first, rest.swapaxes(0, 1)], axis=1), state

    out, state = decode(parameters, x)
    assert relative_error(out, want) < 1e-5
    assert jax.tree.map(lambda y: (y.shape, y.dtype), state) == jax.tree.map(lambda y: (y.shape, y.dtype), last)


def test_a_state_holds_the_last_tokens_and_forgets_those_before():
    apply, parameters, x = made(max_length=5)
    apply = jit(apply)
    _, state = apply(parameters, x[:, :16])
    assert state.keys.shape == (2, 2, 5, 6)
    out, _ = apply(parameters, x[:, 16:17], state)
    seen, _ = apply(parameters, x[:, 12:17])
    assert relative_error(out[:, 0], seen[:, -1]) < 1e-5
    several, _ = apply(parameters, x[:, 16:20], state)
    assert relative_error(several[:, 0], out[:, 0]) < 1e-5
    seen, _ = apply(parameters, x[:, 15:20])
    assert relative_error(several[:, -1], seen[:, -1]) < 1e-5
    assert relative_error(out[:, 0], apply(parameters, x[:, :17])[0][:, -1]) > 1e-3


def test_a_state_of_another_batch_or_config_is_refused(our_checks):
    apply, parameters, x = made()
    _, state = apply(parameters, x)
    with pytest.raises(ValueError, match=r"state: got keys of shape \(2, 2, 24, 6\), expected \(1, 2, 24, 6\)"):
        apply(parameters, x[:1], state)
    longer, _, _ = made(max_length=30)
    with pytest.raises(ValueError, match=r"expected \(2, 2, 30, 6\)"):
        longer(parameters, x, state)


# Parameters


def test_weight_decay_acts_on_matrices():
    config = dataclasses.replace(CONFIG, qk_norm=True, output_gate=True)
    mixer = nnx.eval_shape(lambda: SoftmaxAttention(config, 1, jnp.dtype("float32"), rngs=nnx.Rngs(params=0)))
    assert weight_decay_mask(mixer) == {
        "project/kernel": True,
        "output/kernel": True,
        "gate/kernel": True,
        "query_norm/scale": False,
        "key_norm/scale": False,
    }


# Cost


def peak(function, *arguments):
    """Return the bytes of temporaries of the compiled program."""
    return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def test_a_state_that_is_not_used_costs_nothing():
    def loss_of(max_length):
        apply, parameters, x = made(max_length=max_length)
        return peak(jax.grad(lambda p: apply(p, x)[0].sum()), parameters)

    assert loss_of(1 << 24) == loss_of(LENGTH)


def test_chunks_bound_the_memory_of_training():
    q = jnp.ones((1, 2048, 2, 8))
    first = jnp.zeros((1, 2048), jnp.int32)

    def memory(chunk_size):
        return peak(jax.grad(lambda q: attend(q, q, q, first, chunk_size=chunk_size).sum()), q)

    assert memory(128) < memory(2048) / 4


@pytest.mark.parametrize(("window", "chunk_size"), [(1, 4), (3, 1), (5, 4), (7, 5), (40, 4)])
def test_a_window_scores_the_keys_that_a_chunk_sees(window, chunk_size):
    """Its values and gradients are those of all keys under a mask, also in packed documents and for later queries."""
    length = 18
    for begin in (0, 6):  # the first query
        arrays = dict.fromkeys("kv", (2, length, 2, 6)) | {"q": (2, length - begin, 4, 6)}
        x = random_like({name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in arrays.items()}, seed=1)
        own = np.arange(begin, length)
        documents = np.stack([np.where(own < 11, 0, 11), np.where(own < 8, 0, 8)])
        first = jnp.asarray(np.maximum(documents, own - window + 1), jnp.int32)

        def attended(x, window=None, first=first):
            return {"o": attend(**x, first=first, chunk_size=chunk_size, window=window)}

        cotangents = random_like(jax.eval_shape(attended, x), seed=2)
        got = value_and_gradient(lambda x: attended(x, window))(x, cotangents)
        assert_close(got, value_and_gradient(attended)(x, cotangents), 1e-5)


def test_a_window_bounds_the_memory_of_training():
    q = jnp.ones((1, 4096, 1, 4))
    first = jnp.maximum(jnp.arange(4096, dtype=jnp.int32) - 127, 0)[None]

    def memory(window):
        return peak(jax.grad(lambda q: attend(q, q, q, first, chunk_size=128, window=window).sum()), q)

    assert memory(128) < memory(None) / 4


# cuDNN


def test_cudnn_gets_the_mask_of_the_documents(monkeypatch):
    apply, parameters, x = made(implementation="cudnn", value_dim=6)
    plain = jax.nn.dot_product_attention
    seen = []

    def spy(*arguments, implementation, **options):
        seen.append(implementation)
        return plain(*arguments, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
    apply = jit(apply)
    for ids in (None, DOCUMENTS):
        out, state = apply(parameters, x, segment_ids=ids)
        want = reference(parameters, x, ONE_DOCUMENT if ids is None else ids, value_dim=6)
        assert relative_error(out, want) < 1e-5
    assert seen == ["cudnn", "cudnn"]
    apply(parameters, x[:, :1], state)  # decoding does not use cuDNN
    assert len(seen) == 2


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a GPU may have cuDNN")
def test_cudnn_where_there_is_none_says_so():
    apply, parameters, x = made("bfloat16", implementation="cudnn", value_dim=6)
    with pytest.raises(RuntimeError, match="cuDNN"):
        apply(parameters, x)


def test_what_lies_before_a_segment_does_not_change_its_rounding():
    """After 100,000 tokens of padding the angles are those of a sequence by itself."""
    apply, parameters, x = made()
    _, state = apply(parameters, x[:, :0])
    late = state._replace(position=jnp.int32(100_000), start=jnp.full_like(state.start, 100_000))
    step = jit(apply)
    for t in range(3):
        out, state = step(parameters, x[:, t : t + 1], state)
        moved, late = step(parameters, x[:, t : t + 1], late)
        assert relative_error(moved, out) < 1e-6
