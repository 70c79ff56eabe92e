"""NaN and infinities stay inside their packed segment: values and gradients of the other segments do not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from osdn_jax import ops
from osdn_jax.ops.containment import all_finite, scan_in_blocks
from support import assert_close, jit, random_like, value_and_gradient
from support.cases import NAMED, TRUST, delta, gram, hypergradient, ids, squares

pytestmark = pytest.mark.usefixtures("float64")

STARTS = ((20, 23, 40), (20, 34, 50))  # the second segment, from token 20 on, is not finite
BAD = np.array([(20, 23), (20, 34)])


def packed(case):
    """Return the case with the segments of STARTS, for its oracle as well."""
    batch, length = next(x.shape[:2] for name, x in case.arrays.items() if name in ("k", "v"))
    object.__setattr__(case, "segment_ids", ids(STARTS, batch, length))
    return case


MIXED = [
    packed(delta("delta: channel decay, write key per value head", decay="channel", write_key="value")),
    packed(delta("delta: scalar decay", decay="scalar", key_heads=2, heads=2)),
    packed(delta("delta: no erase", erase=False)),
    packed(hypergradient("hypergradient: unbounded", beta=True, forget=True, eta=0.5, initial=("head", 0.5, 1.5))),
    packed(hypergradient("hypergradient: bounds", **TRUST, anchor=1.0, restart=1.0)),
    packed(gram("gram")),
    packed(squares("squares: sum", initial=("head", 0.5, 1.5))),
    packed(squares("squares: average", average=0.9, normalize=True, initial=0.1)),
]


def outside(x):
    """Return the tokens of [B, T, ...] outside the bad segments."""
    return np.concatenate([np.delete(row, range(*bad), axis=0) for row, bad in zip(np.asarray(x), BAD, strict=True)])


def assert_same_finite(got, want):
    for name in want:
        np.testing.assert_array_equal(np.isfinite(got[name]), np.isfinite(want[name]), err_msg=name)


def spoil(case, fault):
    """Return the arrays of the case with a fault in the second segment of every row: "nan", "inf" or "overflow"."""
    arrays = {name: x.copy() for name, x in case.arrays.items()}
    name = "v" if "v" in arrays else "k"
    for row, (start, _) in enumerate(BAD):
        if fault == "overflow":  # finite inputs whose products are not
            for large in {"k", "write_key", "v"} & set(arrays):
                arrays[large][row, start : start + 2] *= 1e170
        else:
            arrays[name][row, start + 1, ..., 0] = {"nan": np.nan, "inf": np.inf}[fault]
    return arrays


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["nan", "inf", "overflow"])
@pytest.mark.parametrize("case", MIXED, ids=lambda case: case.name)
def test_other_segments_keep_values_and_gradients(case, fault):
    """They equal those with a finite second segment, whatever the cotangents of that segment's outputs are."""
    if (case.name, fault) == ("squares: sum", "overflow"):
        pytest.skip("1 / (D + 1) is 0, and so finite, after an overflow of D")
    arrays, (tokens, final) = spoil(case, fault), case.operator.outputs
    clean_value, clean_gradient = case.by_scan
    cotangents = case.cotangents
    value, gradient = jit(value_and_gradient(case.run("chunk")))(arrays, cotangents)
    by_scan, gradient_by_scan = jit(value_and_gradient(case.run("scan")))(arrays, cotangents)
    for got, want in (
        (value, by_scan),
        (gradient, gradient_by_scan),
    ):  # non-finite values are not hidden: they are where the scan has them
        assert_same_finite(got, want)
    assert not np.isfinite(np.concatenate([np.ravel(x) for x in gradient.values()])).all()
    np.testing.assert_allclose(outside(value[tokens]), outside(clean_value[tokens]), rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(value[final], clean_value[final], rtol=1e-9, atol=1e-11)
    by_token = {name for name, x in arrays.items() if x.shape[:2] == BAD.shape[:1] + (57,)}
    assert by_token
    for name in by_token:
        np.testing.assert_allclose(outside(gradient[name]), outside(clean_gradient[name]), rtol=1e-9, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("case", MIXED[:1] + MIXED[3:], ids=lambda case: case.name)
def test_cotangents_that_are_not_finite_stay_in_their_segment(case):
    tokens = case.operator.outputs[0]
    cotangents = {name: np.array(x) for name, x in case.cotangents.items()}
    for row, (start, _) in enumerate(BAD):
        cotangents[tokens][row, start + 1] = np.nan
    _, gradient = jit(value_and_gradient(case.run("chunk")))(case.arrays, cotangents)
    for name, x in case.arrays.items():
        if x.shape[:2] == (len(BAD), 57):
            np.testing.assert_allclose(outside(gradient[name]), outside(case.by_scan[1][name]), rtol=1e-9, atol=1e-11)
            assert not np.isfinite(np.asarray(gradient[name])).all()


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["scan", "chunk"])
@pytest.mark.parametrize("case", MIXED[:1] + MIXED[3:], ids=lambda case: case.name)
def test_over_devices(case, implementation):
    """The sequence is split over devices, the bad segment over two of them."""
    arrays = spoil(case, "nan")
    arrays = {name: x[:, :56] if x.shape[:2] == (2, 57) else x for name, x in arrays.items()}
    segments = case.segment_ids[:, :56]
    mesh = jax.make_mesh((4,), ("context",), axis_types=(AxisType.Auto,))
    specs = {name: P(None, "context") if x.shape[:2] == (2, 56) else P() for name, x in arrays.items()}
    out_specs = dict(zip(case.operator.outputs, (P(None, "context"), P()), strict=True))

    def whole(x, segments):
        outputs = case.operator.function(**x, segment_ids=segments, **case.options, implementation="scan")
        return dict(zip(case.operator.outputs, outputs, strict=True))

    def local(x, segments):
        options = case.options | {"implementation": implementation, "chunk_size": 16, "context_axis": "context"}
        outputs = case.operator.function(**x, segment_ids=segments, **options)
        return dict(zip(case.operator.outputs, outputs, strict=True))

    def split(x, segments):
        in_specs = (specs, P(None, "context"))
        return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs)(x, segments)

    cotangents = random_like(jax.eval_shape(whole, arrays, segments), seed=1)
    results = [
        jit(value_and_gradient(lambda x, f=f: f(x, jnp.asarray(segments))))(arrays, cotangents) for f in (whole, split)
    ]
    (value, gradient), (value_split, gradient_split) = results
    tokens = case.operator.outputs[0]
    assert np.isfinite(outside(value_split[tokens])).all()
    np.testing.assert_allclose(outside(value_split[tokens]), outside(value[tokens]), rtol=1e-9, atol=1e-11)
    for name in (name for name, x in arrays.items() if x.shape[:2] == (2, 56)):
        np.testing.assert_allclose(outside(gradient_split[name]), outside(gradient[name]), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("case", MIXED[:1] + MIXED[3:], ids=lambda case: case.name)
def test_an_empty_batch(case):
    """Values and gradients of a batch of size 0 are empty arrays of the right shapes."""
    batched = {name: x[:0] if x.shape[0] == len(BAD) else x for name, x in case.arrays.items()}
    options = case.options | {"segment_ids": jnp.asarray(case.segment_ids[:0]), "implementation": "chunk"}
    out, pull = jax.vjp(lambda x: case.operator.function(**x, **options), batched)
    (gradient,) = pull(out)
    assert not any(x.size for x in out)
    assert jax.tree.map(jnp.shape, gradient) == jax.tree.map(jnp.shape, batched)


@pytest.mark.parametrize("rule", ["osdn", "pgdn"])
def test_rules_reset_a_state_that_is_not_finite(rule):
    """It is replaced when the next segment starts."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 24, 2, 4)) / 3) for _ in range(3))
    gate = jnp.full((1, 24, 2), 0.5)
    x = {"q": q, "k": k, "beta": gate}
    if rule == "pgdn":
        x |= {"log_decay": -gate, "gram_log_decay": -gate, "gram_gain": gate}
    segments = jnp.repeat(jnp.arange(3), 8)[None]

    def call(v, at, state=None):
        tokens = {name: array[:, at] for name, array in (x | {"v": v, "segment_ids": segments}).items()}
        return getattr(ops, rule)(**tokens, initial_state=state, chunk_size=8)

    bad = v.at[0, 3].set(jnp.nan)
    want = call(v, slice(8, 24))
    _, state = call(bad, slice(0, 8))
    assert not np.isfinite(state.recurrent).any()
    o, after = call(bad, slice(0, 24))
    np.testing.assert_allclose(o[:, 8:], want[0], rtol=1e-10)
    assert_close(tuple(after), tuple(want[1]), 1e-10)


def test_one_predicate_for_all_rows_under_vmap():
    """With a predicate per row, vmap would compute both forms for every row in every call."""
    x = jnp.array([[1.0, 2.0], [3.0, jnp.nan]])
    assert not jax.vmap(all_finite, out_axes=None)(x)  # out_axes=None is an error for a value per row
    assert jax.vmap(jax.vmap(all_finite, out_axes=None), out_axes=None)(x[:1])

    case = NAMED["delta: scalar decay, write key per key head"]
    program = jit(jax.vmap(case.run("chunk")))
    many = {name: np.stack([x, 2 * x]) for name, x in case.arrays.items()}
    assert_close(jax.tree.map(lambda x: x[0], program(many)), case.expected, 1e-12)
    many["v"][1, 0, 0] = np.nan
    value = program(many)
    assert_close(jax.tree.map(lambda x: x[0], value), case.expected, 1e-12)
    assert not np.isfinite(np.asarray(value["o"][1])).all()


@pytest.mark.slow
@pytest.mark.parametrize("case", [MIXED[1], MIXED[5]], ids=lambda case: case.name)
def test_second_derivatives(case):
    """Reverse mode over reverse mode differentiates through the choice between the fast form and the scan."""
    arrays = jax.tree.map(jnp.asarray, case.arrays)
    tokens, name = case.operator.outputs[0], "k"

    def norm(implementation):
        run = case.run(implementation)

        def loss(k):
            return jnp.sum(run(arrays | {name: k})[tokens] ** 2)

        return jit(jax.grad(lambda k: jnp.sum(jax.grad(loss)(k) ** 2)))

    want, got = (norm(implementation)(arrays[name]) for implementation in ("scan", "chunk"))
    assert_close(got, want, 1e-10)


def test_all_finite():
    assert all_finite({"a": jnp.ones((2, 3)), "b": jnp.full((), 1e300)})
    assert not all_finite([jnp.ones(3), jnp.array([[0.0, jnp.nan]])])
    assert not all_finite((jnp.array([jnp.inf, -jnp.inf]),))
    assert all_finite(jnp.full((2, 4), 1e308))  # although their sum overflows
    assert all_finite(jnp.ones((0, 3)))


@pytest.mark.parametrize("length", [0, 1, 8, 9, 64, 65, 200])
def test_scan_in_blocks_equals_a_scan(length):
    rng = np.random.default_rng(length)
    tokens = {"a": jnp.asarray(rng.uniform(0.5, 1.0, length)), "b": jnp.asarray(rng.normal(size=length))}

    def step(carry, token):
        carry = carry * (1.0 + token["a"]) - jnp.sin(carry * token["b"])
        carry = jnp.where(token["a"] == 0, carry, carry / 2)
        return carry, carry * token["b"]

    def run(loop, x):
        final, out = loop(step, x["first"], {"a": x["a"], "b": x["b"]})
        return {"final": final, "out": out}

    x = tokens | {"first": jnp.asarray(0.3)}
    cotangents = random_like(jax.eval_shape(lambda x: run(jax.lax.scan, x), x), seed=1)
    plain, blocks = (
        jit(value_and_gradient(lambda x, f=f: run(f, x)))(x, cotangents) for f in (jax.lax.scan, scan_in_blocks)
    )
    assert_close(blocks, plain, 1e-12)


def test_containment_costs_little_memory():
    """The gradient of the scan, which is computed for non-finite segments only, holds no state per token."""
    batch, length, heads, size = 1, 2048, 2, 64
    keys = jax.ShapeDtypeStruct((batch, length, heads, size), jnp.float32)
    gates = jax.ShapeDtypeStruct((batch, length, heads), jnp.float32)
    segments = jax.ShapeDtypeStruct((batch, length), jnp.int32)

    def gradient(packed):
        def loss(q, k, v, beta, log_decay, segments):
            segments = segments if packed else None
            o, state = ops.delta_rule(
                q, k, v, beta, log_decay=log_decay, segment_ids=segments, chunk_size=64, implementation="chunk"
            )
            return jnp.sum(o) + jnp.sum(state)

        program = jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4)))
        return program.lower(keys, keys, keys, gates, gates, segments).compile().memory_analysis().temp_size_in_bytes

    whole, contained = gradient(False), gradient(True)
    state, tokens = heads * size * size * 4, length * heads * size * 4
    assert contained < whole + (length / 64 + 16) * state + 6 * tokens < length * state / 4
