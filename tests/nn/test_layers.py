"""Small layers: short convolution, unit norm, gated MLP, dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from osdn_jax.nn import ShortConvolution, SwiGLU, unit_norm
from osdn_jax.nn.layers import dropout, project
from support import relative_error

B, T, C = 2, 11, 5


@pytest.fixture(params=[1, 2, 4])
def convolution(request):
    return ShortConvolution(C, request.param, rngs=nnx.Rngs(params=0))


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def correlation(x, taps, window=None):
    """out[t] = sum over j of taps[j] x[t - size + 1 + j]: the last tap is on the current token."""
    x, taps = np.asarray(x, np.float64), np.asarray(taps, np.float64)
    size = len(taps)
    out = np.zeros_like(x)
    for t in range(x.shape[1]):
        for j in range(size):
            source = t - (size - 1) + j
            if source >= 0:
                out[:, t] += taps[j] * x[:, source]
            elif window is not None:
                out[:, t] += taps[j] * np.asarray(window, np.float64)[:, size - 1 + source]
    return out


def test_convolution_is_a_causal_correlation(convolution):
    x, taps = random(B, T, C), convolution.kernel[...]
    out, window = convolution(x)
    assert relative_error(out, correlation(x, taps)) < 1e-6
    size = len(taps)
    np.testing.assert_array_equal(window, x[:, T - size + 1 :])
    before = random(B, size - 1, C, seed=1)
    assert relative_error(convolution(x, before)[0], correlation(x, taps, before)) < 1e-6


def test_convolution_in_pieces_is_the_whole(convolution):
    x = random(B, T, C)
    whole, last = convolution(x)
    pieces, window, start = [], None, 0
    for length in (1, 2, 1, 5, 2):  # some shorter than the window
        out, window = convolution(x[:, start : start + length], window)
        pieces.append(out)
        start += length
    assert start == T
    assert relative_error(jnp.concatenate(pieces, axis=1), whole) < 1e-6
    np.testing.assert_array_equal(window, last)


def test_convolution_stays_inside_documents(convolution):
    x, ids = random(B, T, C), jnp.asarray([[0, 0, 1, 2, 2, 2, 2, 2, 3, 3, 3], [7, 7, 7, 7, 7, 7, 7, 7, 7, 5, 5]])
    packed, _ = convolution(x, segment_ids=ids)
    for row in range(B):
        for number in np.unique(ids[row]):
            inside = np.flatnonzero(ids[row] == number)
            alone, _ = convolution(x[row : row + 1, inside[0] : inside[-1] + 1])
            assert relative_error(packed[row, inside], alone[0]) < 1e-6
    # The window belongs to the first document only.
    size = convolution.kernel.shape[0]
    window = random(B, size - 1, C, seed=1)
    carried, _ = convolution(x, window, ids)
    first = np.asarray(ids == ids[:, :1])
    want = np.where(first[..., None], convolution(x, window)[0], packed)
    assert relative_error(carried, want) < 1e-6


@pytest.mark.parametrize("last", [1, 2, 3, 4])
def test_the_window_after_packed_documents_is_that_of_the_last_one(convolution, last):
    x, ids = random(B, T, C), jnp.asarray([[0] * (T - last) + [1] * last] * B)
    np.testing.assert_array_equal(convolution(x, segment_ids=ids)[1], convolution(x[:, T - last :])[1])


def test_convolution_gradient_is_the_transposed_correlation(convolution):
    x, cotangent = random(B, T, C), random(B, T, C, seed=1)
    gradient = jax.grad(lambda x: jnp.vdot(convolution(x)[0], cotangent))(x)
    reversed_taps = np.asarray(convolution.kernel[...])
    want = correlation(cotangent[:, ::-1], reversed_taps)[:, ::-1]
    assert relative_error(gradient, want) < 1e-6


def test_convolution_starts_within_the_bound_of_its_size():
    taps = ShortConvolution(1000, 4, rngs=nnx.Rngs(params=0)).kernel[...]
    assert taps.shape == (4, 1000)
    assert 0.49 < np.abs(taps).max() <= 0.5  # 4 ** -0.5
    assert abs(float(taps.mean())) < 0.02


def test_unit_norm():
    x = random(3, 4, 7)
    want = np.asarray(x, np.float64)
    want = want / np.sqrt((want**2).sum(-1, keepdims=True) + 1e-6)
    assert relative_error(unit_norm(x), want) < 1e-6
    np.testing.assert_array_equal(unit_norm(jnp.zeros((2, 3))), 0.0)
    assert np.isfinite(jax.grad(lambda x: unit_norm(x).sum())(jnp.zeros((2, 3)))).all()
    with jax.numpy_dtype_promotion("standard"):
        narrow = unit_norm(x.astype(jnp.bfloat16))
    assert narrow.dtype == jnp.bfloat16
    assert relative_error(narrow, want) < 5e-3


def test_swiglu():
    mlp = SwiGLU(6, 9, 2, jnp.dtype("float32"), rngs=nnx.Rngs(params=0))
    x = random(B, T, 6)
    gate, up = np.split(np.asarray(x @ mlp.gate_and_up.kernel[...], np.float64), 2, axis=-1)
    want = (gate / (1 + np.exp(-gate)) * up) @ np.asarray(mlp.down.kernel[...], np.float64)
    assert relative_error(mlp(x), want) < 1e-6


def test_projections_back_start_smaller_in_deeper_models():
    def spread(layers):
        mlp = SwiGLU(200, 300, layers, jnp.dtype("float32"), rngs=nnx.Rngs(params=0))
        return float(mlp.gate_and_up.kernel[...].std()), float(mlp.down.kernel[...].std())

    np.testing.assert_allclose(spread(1), (200**-0.5, (2 * 300) ** -0.5), rtol=0.02)
    np.testing.assert_allclose(spread(8), (200**-0.5, (16 * 300) ** -0.5), rtol=0.02)


def test_dropout_without_a_rate_or_a_key_is_nothing():
    x = random(B, T, C)
    assert dropout(x, 0.0, jax.random.key(0)) is x
    assert dropout(x, 0.5, None) is x


def test_dropout_keeps_the_expectation():
    x = jnp.full((40, 50, 50), 2.0)
    out = np.asarray(dropout(x, 0.2, jax.random.key(0)))
    assert set(np.unique(out)) == {0.0, 2.5}
    assert abs(out.mean() - 2.0) < 5 * 2.0 * np.sqrt(0.25 / out.size)  # five standard deviations
    assert dropout(x.astype(jnp.bfloat16), 0.2, jax.random.key(0)).dtype == jnp.bfloat16


def test_dropout_differs_by_key():
    x = jnp.ones((2, 30, 30))
    a, same, b = (dropout(x, 0.5, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, same)
    assert 0.4 < np.mean(np.asarray(a) != np.asarray(b)) < 0.6


@pytest.mark.usefixtures("our_checks")
def test_unit_norm_takes_floating_point_numbers():
    """In integers every component would be rounded to 0 or 1."""
    with pytest.raises(TypeError, match=r"x: got dtype int32, expected a floating-point \[..., D\]"):
        unit_norm(jnp.asarray([3, 4]))
    with pytest.raises(TypeError, match=r"x: got list, expected an array \[..., D\]"):
        unit_norm([3.0, 4.0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_projection_is_a_product_in_both_modes_of_differentiation(dtype):
    x, d_x, out = (jax.random.normal(jax.random.key(i), (2, 3, s)).astype(dtype) for i, s in enumerate((4, 4, 5)))
    w, d_w = (jax.random.normal(jax.random.key(i), (4, 5)).astype(dtype) for i in (3, 4))
    tolerance = 1e-6 if dtype == jnp.float32 else 2e-2
    for mode in (lambda f: jax.jvp(f, (x, w), (d_x, d_w)), lambda f: jax.vjp(f, x, w)[1](out)):
        for got, want in zip(mode(project), mode(jnp.matmul), strict=True):
            assert got.dtype == want.dtype
            np.testing.assert_allclose(
                *(np.asarray(y, np.float32) for y in (got, want)), rtol=tolerance, atol=tolerance
            )
