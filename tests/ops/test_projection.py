"""The projection of the hypergradient preconditioner is exact, wherever and however often it binds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from osdn_jax import ops
from support import assert_close, jit, oracle, random_like, value_and_gradient

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.slow]

B, T, H, K, C = 2, 57, 3, 8, 16
LO, HI = BOUNDS = (2 / 3, 3 / 2)
ETA = 0.5
TOLERANCE = 1e-10


def base(seed=0):
    rng = np.random.default_rng(seed)
    k = rng.normal(size=(B, T, H, K))
    return {
        "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "beta": rng.uniform(0.2, 1, size=(B, T, H)),
        "log_forget": -rng.uniform(0, 0.02, size=(B, T, H)),
        "initial": rng.uniform(0.8, 1.1, size=(B, H, K)),
    }


def never():
    x = base()
    return x | {"k": 0.1 * x["k"], "initial": 0 * x["initial"] + 1, "log_forget": 0 * x["log_forget"]}


def one_token():
    """A single update leaves the bounds, in one head in the middle of the second chunk."""
    x = never()
    x["k"][1, 24, 2] *= 300
    return x


def above():
    x = base()
    return x | {"k": 0.7 * x["k"], "log_forget": 0 * x["log_forget"]}


def below():
    x = base()
    return x | {"log_forget": 20 * x["log_forget"]}


def almost_always():
    x = base()
    return x | {"k": x["k"] * np.array([30.0, 3.0, 2.0])[:, None]}


def overflow():
    """Without bounds d would grow by 1e24 per token and overflow within a chunk; one head does not."""
    x = base()
    return x | {"k": x["k"] * np.array([1e6, 0.1, 1e6])[:, None]}


def on_the_bounds():
    """Values exactly on a bound, some in channels with zero keys, are not clipped: their gradient passes whole."""
    x = never()
    x["k"][..., :4] = 0
    x["initial"] = np.where(np.arange(K) % 2, LO, HI) * np.ones((B, H, 1))
    return x


def outside_at_first():
    """The initial state is used unclipped; the first update projects it."""
    x = base()
    return x | {"initial": np.where(np.arange(K) % 2, 0.1, 3.0) * np.ones((B, H, 1))}


# Range of the share of updates that are clipped: ((least, most) below, (least, most) above).
DATA = {
    never: ((0, 0), (0, 0)),
    one_token: ((1e-4, 4e-3), (0, 0)),
    above: ((0, 0), (0.1, 0.5)),
    below: ((0.5, 0.9), (0, 0)),
    almost_always: ((0.9, 0.99), (0, 0)),
    overflow: ((0.5, 0.9), (0, 0)),
    on_the_bounds: ((0, 0), (0.1, 0.3)),
    outside_at_first: ((0.01, 0.1), (0.01, 0.1)),
}


def outputs(x, implementation):
    return ops.hypergradient_preconditioner(**x, eta=ETA, bounds=BOUNDS, chunk_size=C, implementation=implementation)


@functools.cache
def program(implementation):
    """Return the compiled program; all data have the same shapes."""
    return jit(value_and_gradient(functools.partial(outputs, implementation=implementation)))


def clipped_shares(x):
    """Return the shares of the updates that the projection changes, (below, above)."""
    below = above = 0
    d = x["initial"]
    for t in range(T):
        token = {name: x[name][:, t : t + 1] for name in ("k", "beta", "log_forget")}
        _, free = oracle.hypergradient(**token, eta=ETA, initial=d)
        below, above = below + np.sum(free < LO), above + np.sum(free > HI)
        d = np.clip(free, LO, HI)
    return below / (T * d.size), above / (T * d.size)


@pytest.mark.parametrize("implementation", ["scan", "chunk"])
@pytest.mark.parametrize("data", DATA, ids=lambda data: data.__name__)
def test_projection_is_exact(data, implementation):
    x = data()
    for share, (least, most) in zip(clipped_shares(x), DATA[data], strict=True):
        assert least <= share <= most
    expected = oracle.hypergradient(**x, eta=ETA, bounds=BOUNDS)
    cotangents = random_like(expected, seed=1)
    value, gradient = program(implementation)(x, cotangents)
    assert_close(value, expected, TOLERANCE)
    if implementation == "chunk":
        assert_close(gradient, program("scan")(x, cotangents)[1], TOLERANCE)
        return
    rng = np.random.default_rng(2)
    for name in x:
        direction = rng.normal(size=x[name].shape)
        moved = oracle.derivative(
            lambda **x: dict(enumerate(oracle.hypergradient(**x, eta=ETA, bounds=BOUNDS))), x, {name: direction}
        )
        want = sum(np.vdot(cotangents[i], moved[i]) for i in moved)
        assert abs(np.vdot(gradient[name], direction) - want) <= TOLERANCE * max(
            np.linalg.norm(gradient[name]) * np.linalg.norm(direction), 1.0
        )


def test_projection_is_exact_under_vmap():
    """vmap computes both forms of every chunk: the one not selected must leave no NaN in values or gradients."""
    names = [never, overflow, below]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(data() for data in names))
    cotangents = random_like(jax.vmap(lambda x: outputs(x, "scan"))(stacked), seed=1)
    value, gradient = jit(jax.vmap(value_and_gradient(functools.partial(outputs, implementation="chunk"))))(
        stacked, cotangents
    )
    for i, data in enumerate(names):
        want_value, want_gradient = program("scan")(data(), jax.tree.map(lambda c, i=i: c[i], cotangents))
        assert_close(jax.tree.map(lambda v, i=i: v[i], value), want_value, TOLERANCE)
        assert_close(jax.tree.map(lambda g, i=i: g[i], gradient), want_gradient, TOLERANCE)


def test_projection_is_exact_in_float32():
    for data in (overflow, almost_always, below):  # in "above", float32 loses the small steps that move d off the bound
        x = {name: np.asarray(value, np.float32) for name, value in data().items()}
        wide = {name: np.asarray(value, np.float64) for name, value in x.items()}
        cotangents = random_like(oracle.hypergradient(**x, eta=ETA, bounds=BOUNDS), seed=1, dtype=np.float32)
        value, gradient = program("chunk")(x, cotangents)
        assert value[0].dtype == jnp.float32
        want = program("scan")(wide, jax.tree.map(lambda c: c.astype(jnp.float64), cotangents))
        assert_close(value, want[0], 1e-5)
        assert_close(gradient, want[1], 1e-5)


def test_one_sided_bounds():
    k = jnp.asarray(np.random.default_rng(0).normal(size=(1, 40, 2, 8)))
    for implementation in ("scan", "chunk"):
        run = {"eta": 0.5, "implementation": implementation, "chunk_size": 16}
        one_sided, _ = ops.hypergradient_preconditioner(k, bounds=(0.0, np.inf), initial=1.0, **run)
        wide, _ = ops.hypergradient_preconditioner(k, bounds=(0.0, 1e30), initial=1.0, **run)
        np.testing.assert_array_equal(one_sided, wide)
        assert float(jnp.min(one_sided)) == 0.0
