"""The Triton kernels of the hypergradient preconditioner against the scan: values and every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from osdn_jax import ops
from osdn_jax.ops.arguments import scaled
from support import assert_close, jit, random_like, value_and_gradient
from triton_kernels.common.target import INTERPRETER
from triton_kernels.hypergradient import chunk_size, hypergradient
from triton_kernels.hypergradient.chunk import HypergradientOptions, make_gates
from triton_kernels.hypergradient.expand import expand
from triton_kernels.hypergradient.prepare import prepare
from triton_kernels.hypergradient.scan import scan

LO, HI = BOUNDS = (2 / 3, 3 / 2)
ETA = 0.5
CHUNK = chunk_size(jnp.float32, 64)
TOLERANCE = 1e-5


def base(length=57, heads=1, size=32, seed=0):
    rng = np.random.default_rng(seed)
    k = rng.normal(size=(1, length, heads, size))
    return {
        "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "beta": rng.uniform(0.2, 1, size=(1, length, heads)),
        "log_forget": -rng.uniform(0, 0.02, size=(1, length, heads)),
        "initial": rng.uniform(0.8, 1.1, size=(1, heads, size)),
        "restart": rng.uniform(0.8, 1.1, size=(1, heads, size)),
        "anchor": rng.uniform(0.8, 1.1, size=(heads, size)),
    }


def without(x, *names):
    return {name: value for name, value in x.items() if name not in names}


def one_token():
    """One update leaves the bounds: in one head at the last token of the first chunk, in the other at a later one."""
    x = base(110, heads=2)
    x["k"] *= 0.1
    x["k"][0, CHUNK - 1, 0] *= 300
    x["k"][0, 100, 1] *= 300
    return x


def almost_always():
    """Most updates leave the bounds; channels without keys start on a bound and stay there."""
    x = base(70)
    x["k"] *= 30
    x["k"][..., 5:9] = 0
    x["initial"][..., 5:7], x["initial"][..., 7:9] = LO, HI
    return without(x, "log_forget", "anchor")


def overflow():
    """Without the bounds d would grow by 1e24 per token and overflow within a chunk."""
    x = base()
    x["k"] *= 1e6
    return x


def strong_forgetting():
    """Tokens that forget everything next to tokens that forget almost nothing."""
    x = base(128, size=64)
    x["log_forget"] *= 0.1
    x["log_forget"][0, 10:40:3], x["log_forget"][0, 70:90:7] = -20, -300
    return x


def resets(every=False):
    """Tokens that forget everything, in every notation for it, in a sequential chunk and in others."""
    x = base(64 if every else 130)
    if every:
        x["log_forget"][:] = -np.inf
    else:
        x["log_forget"][0, 5:40:3], x["log_forget"][0, 70:73], x["log_forget"][0, 129] = -np.inf, -1e6, -1e9
        x["log_forget"][0, 80] = np.finfo(np.float32).min
        x["k"][0, 20] *= 30
    return x


# Arrays, options, and for each head whether a value leaves the bounds in each chunk.
CASES = {
    "one token": (base(1, heads=2), {"bounds": BOUNDS, "return_write_key": True}, [[0], [0]]),
    "no bounds, no beta, no forgetting": (without(base(63, size=64), "beta", "log_forget", "anchor"), {}, None),
    "no bounds, forgetting, normalised": (without(base(65), "anchor"), {"normalize": True}, None),
    "write keys, no bounds, strong forgetting": (strong_forgetting(), {"return_write_key": True}, None),
    "bounds that never bind, K 128": (base(64, size=128), {"bounds": BOUNDS}, [[0]]),
    "one bound, K 256": (without(base(33, size=256), "anchor"), {"bounds": (-np.inf, HI)}, [[0]]),
    "write keys, bounds that bind once": (one_token(), {"bounds": BOUNDS, "return_write_key": True}, [[1, 0], [0, 1]]),
    "bounds that bind almost always": (almost_always(), {"bounds": BOUNDS}, [[1, 1]]),
    "an update that overflows": (overflow(), {"bounds": BOUNDS}, [[1]]),
    "resets": (resets(), {"bounds": BOUNDS}, [[1, 0, 0]]),
    "a reset at every token": (resets(every=True), {}, None),
    "write keys, documents": (base(70), {"bounds": BOUNDS, "starts": (30, 31, 64), "return_write_key": True}, [[0, 0]]),
    "documents, no bounds, 200 tokens": (base(200), {"starts": (5, 128, 150)}, None),
}


def segments(x, starts):
    if not starts:
        return None
    ids = np.zeros(x["k"].shape[:2], np.int32)
    for start in starts:
        ids[:, start:] += 1
    return jnp.asarray(ids)


def by_operator(x, *, bounds=None, starts=(), normalize=False, return_write_key=False, implementation="scan"):
    named = {name: x.get(name) for name in ("beta", "log_forget", "initial", "restart")}
    function = ops.hypergradient_write_key if return_write_key else ops.hypergradient_preconditioner
    return function(
        x["k"],
        **named,
        eta=ETA,
        anchor=x.get("anchor", 0.0),
        bounds=bounds,
        normalize=normalize,
        segment_ids=segments(x, starts),
        implementation=implementation,
    )


def kernel(x, *, bounds=None, starts=(), normalize=False, return_write_key=False):
    beta, anchor = x.get("beta"), x.get("anchor")
    step = jnp.full(x["k"].shape[:3], ETA) if beta is None else ETA * beta
    if normalize:
        step = step / (jnp.sum(jnp.square(x["k"].astype(jnp.float32)), axis=-1) + 1e-5)
    resets = None
    if starts:
        resets = jnp.zeros(x["k"].shape[:2], bool).at[:, jnp.array(starts)].set(True)
    anchor = None if anchor is None else jnp.broadcast_to(anchor, x["initial"].shape)
    return hypergradient(
        *(x["k"], step, beta, x.get("log_forget"), resets, x["initial"], x["restart"], anchor, bounds),
        return_write_key=return_write_key,
        target=INTERPRETER,
    )


def as_arrays(x, dtype=jnp.float32):
    arrays = {name: jnp.asarray(value, jnp.float32) for name, value in x.items()}
    return arrays | {"k": arrays["k"].astype(dtype)}


def compute(x, options, transformation=lambda f: f):
    """Return ((values, gradients) of the kernel, the same of the scan)."""
    run, want = (functools.partial(f, **options) for f in (kernel, by_operator))
    cotangents = random_like(jax.eval_shape(transformation(want), x), seed=1)
    return tuple(jit(transformation(value_and_gradient(f)))(x, cotangents) for f in (run, want))


def leaves(d, final, bounds):
    """Return for each head and chunk [P, N] whether an update put a value of d on a bound."""
    after = np.concatenate([d[0, 1:], final], axis=0)
    on = np.isin(after, np.asarray(bounds, np.float32)).any(axis=-1)
    padded = np.pad(on, ((0, -len(on) % CHUNK), (0, 0)))
    return padded.reshape(-1, CHUNK, on.shape[1]).any(axis=1).T


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    x, options, expected = CASES[name]
    got, want = compute(as_arrays(x), options)
    assert_close(got, want, TOLERANCE)
    if expected is not None:
        d, final = jit(functools.partial(by_operator, **options | {"return_write_key": False}))(as_arrays(x))
        np.testing.assert_array_equal(leaves(d, final, options["bounds"]), np.array(expected, bool))


def toward_a_bound(falling):
    """A chunk in which d rises, or falls toward a lower anchor; each head starts a little closer to the bound."""
    x = base(CHUNK, heads=5, size=64)
    squared = np.random.default_rng(1).uniform(*((0.5, 2.5) if falling else (0.2, 2)), size=x["beta"].shape)
    x["k"] *= np.sqrt(squared)[..., None]
    further = np.linspace(0, 0.2, 5)
    x["initial"][...] = (1 - further if falling else 0.7 + further)[:, None]
    x["anchor"] -= 0.5
    return x if falling else without(x, "log_forget", "anchor")


def reach(x):
    """Return the least and most of each head: of the values of a chunk, and of the kernel's estimate of them."""
    d, final = (np.asarray(y[0]) for y in jit(by_operator)(x))
    u, d = np.square(x["k"][0]), np.concatenate([d, final[None]])
    coefficient = ETA * x["beta"][0] * (1 - x["beta"][0] * np.sum(d[:-1] * u, axis=-1))
    added = coefficient[..., None] * u
    left = d[0]
    if "log_forget" in x:
        left = x["anchor"] + np.exp(np.sum(x["log_forget"][0], axis=0))[:, None] * (left - x["anchor"])
    least = np.minimum(d[0], left) + np.sum(np.minimum(added, 0), axis=0)
    most = np.maximum(d[0], left) + np.sum(np.maximum(added, 0), axis=0)
    return [np.stack([y.min(-1), z.max(-1)]) for y, z in ((d[1:].min(0), d[1:].max(0)), (least, most))]


def one_chunk(x, bounds):
    """Return ((d, the final d) of a chunk without resets, the heads in which it is sequential)."""
    forget = "log_forget" in x
    options = HypergradientOptions(
        bounds, forget, anchored=forget, resets=False, return_write_key=False, target=INTERPRETER
    )
    gates = make_gates(ETA * x["beta"], x["beta"], x.get("log_forget"), None)
    inverse = prepare(x["k"], gates, options)
    states = x["restart"], jnp.broadcast_to(x.get("anchor", 0.0), x["initial"].shape)
    chunks, final = scan(x["k"], gates, inverse, x["initial"], *states, options)
    return (expand(chunks, options), final), chunks.sequential[0, :, 0]


@pytest.mark.parametrize(("falling", "bound"), [(False, 0.956), (True, 0.535)])
def test_a_chunk_is_sequential_if_and_only_if_a_value_leaves_the_bounds(falling, bound):
    x = as_arrays(toward_a_bound(falling))
    sign = -1 if falling else 1
    leaves, might = (sign * y[0 if falling else 1] > sign * bound for y in reach(x))
    assert {(bool(a), bool(b)) for a, b in zip(leaves, might, strict=True)} == {(0, 0), (0, 1), (1, 1)}
    assert np.all(sign * x["initial"] < sign * bound)
    bounds = (bound, np.inf) if falling else (-np.inf, bound)
    got, sequential = jit(functools.partial(one_chunk, bounds=bounds))(x)
    np.testing.assert_array_equal(sequential, leaves)
    assert_close(got, jit(functools.partial(by_operator, bounds=bounds))(x), TOLERANCE)


@pytest.mark.parametrize(("dtype", "return_write_key"), [(jnp.bfloat16, True), (jnp.float16, False)])
def test_half_precision(dtype, return_write_key):
    x = as_arrays(base(65, size=64), dtype)
    got, want = compute(x, {"bounds": BOUNDS, "return_write_key": return_write_key})
    # 16-bit keys are squared in float32: only the gradient of k and write keys are rounded to 16 bits.
    assert got[0][0].dtype == (dtype if return_write_key else jnp.float32)
    assert_close(got[0][0].astype(jnp.float32), want[0][0].astype(jnp.float32), 3e-4)
    assert_close(got[1].pop("k").astype(jnp.float32), want[1].pop("k").astype(jnp.float32), 3e-3)
    # The inverse of the coupling has 16 bits.
    assert_close((got[0][1], got[1]), (want[0][1], want[1]), 1e-4)


def test_write_keys_are_d_times_k_rounded_once():
    x = base(70)
    x["k"][0, 66] *= 10
    x = as_arrays(x, jnp.bfloat16)
    (written, _), (d, _) = (jit(functools.partial(kernel, bounds=BOUNDS, return_write_key=m))(x) for m in (True, False))
    np.testing.assert_array_equal(leaves(d, d[:, -1], BOUNDS), [[False, True]])
    np.testing.assert_array_equal(written, scaled(x["k"], d))


def test_vmap_and_equal_results_of_equal_runs():
    pair = [as_arrays(base(seed=seed)) for seed in (3, 4)]
    pair[0]["k"] *= 10  # leaves the bounds
    x = jax.tree.map(lambda *x: jnp.stack(x), *pair)
    got, want = compute(x, {"bounds": BOUNDS}, jax.vmap)
    assert_close(got, want, TOLERANCE)
    again, _ = compute(x, {"bounds": BOUNDS}, jax.vmap)
    jax.tree.map(np.testing.assert_array_equal, again, got)


def test_shard_map():
    x = as_arrays(base(40, heads=2))
    x["k"] = x["k"].at[:, 20, 1].multiply(30)  # leaves the bounds
    x["anchor"] = jnp.broadcast_to(x["anchor"], x["initial"].shape)
    x = {name: jnp.concatenate([a, 0.9 * a]) for name, a in x.items()}
    rows = PartitionSpec("data")

    def sharded(x):
        mesh = Mesh(np.array(jax.devices()[:2]), "data")
        run = functools.partial(kernel, bounds=BOUNDS, starts=(9,))
        return jax.shard_map(run, mesh=mesh, in_specs=rows, out_specs=rows)(x)

    want = functools.partial(by_operator, bounds=BOUNDS, starts=(9,))
    cotangents = random_like(jax.eval_shape(want, x), seed=1)
    got, want = (jit(value_and_gradient(f))(x, cotangents) for f in (sharded, want))
    assert_close(got, want, TOLERANCE)


@pytest.mark.parametrize("key_dim", [20, 64])
def test_operator(key_dim):
    x = as_arrays(base(66, size=key_dim))
    x["k"] = x["k"].at[:, 10].multiply(30)  # leaves the bounds
    runs = [
        functools.partial(by_operator, bounds=BOUNDS, starts=(64,), return_write_key=True, implementation=name)
        for name in ("triton_interpret", "scan")
    ]
    cotangents = random_like(jax.eval_shape(runs[1], x), seed=1)
    assert_close(*(jit(value_and_gradient(run))(x, cotangents) for run in runs), TOLERANCE)


def test_a_missing_number_spreads_as_in_the_scan():
    x = as_arrays(base(100))
    x["k"] = x["k"].at[0, 70, 0, 3].set(jnp.nan)
    got = jit(functools.partial(kernel, bounds=BOUNDS))(x)
    want = jit(functools.partial(by_operator, bounds=BOUNDS))(x)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=TOLERANCE)
    assert not np.all(np.isnan(want[0]))


def test_a_document_that_is_not_finite_stays_alone():
    x, starts = as_arrays(base(130)), (70, 90, 128)
    x["k"] = x["k"].at[0, 75].set(jnp.nan)
    cotangents = random_like(jax.eval_shape(kernel, x), seed=1)
    run, want = (functools.partial(f, bounds=BOUNDS, starts=starts) for f in (kernel, by_operator))
    got, want = (jit(value_and_gradient(f))(x, cotangents) for f in (run, want))
    alone = [*range(70), *range(90, 130)]
    of_tokens = lambda tree: [tree[0][0], *(tree[1][name] for name in ("k", "beta", "log_forget"))]
    for a, b in zip(of_tokens(got), of_tokens(want), strict=True):
        assert_close(a[0, alone], b[0, alone], TOLERANCE)
        assert np.isnan(a[0, 70:90]).any()
    assert_close((got[0][1], got[1]["initial"]), (want[0][1], want[1]["initial"]), TOLERANCE)


@pytest.mark.parametrize("return_write_key", [False, True])
@pytest.mark.parametrize("axis", ["batch", "tokens", "heads"])
def test_nothing(axis, return_write_key):
    """Empty inputs give empty values and gradients of the right shapes and types."""
    of_tokens, of_states = (("batch", "tokens", "heads", "K"), ("batch", "heads", "K"))
    axes = dict.fromkeys(("k", "beta", "log_forget"), of_tokens) | {"anchor": ("heads", "K")}
    axes |= dict.fromkeys(("initial", "restart"), of_states)
    x = {name: a[tuple(slice(0 if n == axis else None) for n in axes[name][: a.ndim])]
         for name, a in as_arrays(base(3), jnp.bfloat16).items()}  # fmt: skip
    (d, final), pull = jax.vjp(lambda x: kernel(x, bounds=BOUNDS, return_write_key=return_write_key), x)
    assert (d.shape, d.dtype) == (x["k"].shape, jnp.bfloat16 if return_write_key else jnp.float32)
    np.testing.assert_array_equal(final, x["initial"])
    (gradient,) = pull((d, final))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), gradient) == jax.tree.map(lambda a: (a.shape, a.dtype), x)
    np.testing.assert_array_equal(gradient.pop("initial"), final)
    assert not any(np.any(g) for g in gradient.values())


def test_keys_that_do_not_fit_are_refused():
    with pytest.raises(NotImplementedError, match="k: got 96 channels, the kernels take 32, 64, 128 or 256"):
        kernel(as_arrays(base(3, size=96)))
    with pytest.raises(NotImplementedError, match="k: got int32, the kernels take bfloat16, float16 or float32"):
        kernel(as_arrays(base(3)) | {"k": jnp.ones((1, 3, 1, 32), jnp.int32)})
