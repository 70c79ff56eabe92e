"""The named rules against the oracle, in one call and token by token, and reductions between them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from osdn_jax import ops
from support import assert_close, jit, oracle

pytestmark = pytest.mark.usefixtures("float64")

B, T, HK, H, K, V = 2, 13, 2, 4, 8, 6
TOLERANCE = 1e-12
TRUST = {"eta": 0.5, "bounds": (0.9, 1.1), "initial": 1.0}


def tokens():
    """Return every per-token array that any rule takes."""
    rng = np.random.default_rng(0)
    k = rng.normal(size=(B, T, HK, K))
    x = {
        "q": rng.normal(size=(B, T, HK, K)),
        "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v": rng.normal(size=(B, T, H, V)),
        "beta": rng.uniform(size=(B, T, H)),
        "scalar": -rng.uniform(0, 0.3, size=(B, T, H)),
        "channel": -rng.uniform(0, 0.3, size=(B, T, H, K)),
        "erase_gate": rng.uniform(size=(B, T, H, K)),
        "write_gate": rng.uniform(size=(B, T, H, V)),
        "gram_log_decay": -rng.uniform(0, 0.3, size=(B, T, HK)),
        "gram_gain": rng.uniform(size=(B, T, HK)),
        "forget": -rng.uniform(0, 0.1, size=(B, T, H)),
    }
    return jax.tree.map(jnp.asarray, x)


def per_head(x):
    return np.repeat(x, H // HK, axis=2)


def plain(x, **more):
    x = {name: more.pop(name, x.get(name)) for name in ("q", "k", "v", "beta")} | more
    return oracle.delta_rule(**x)


def hypergradient(x, decay=None, *, aware, forget=None, **options):
    k = per_head(x["k"]) if aware else x["k"]
    d, final = oracle.hypergradient(k, x["beta"] if aware else None, log_forget=forget, **options)
    return *plain(x, write_key=d * k, log_decay=decay), final


def gram(x, decay=None, **options):
    multiplier, final = oracle.gram(x["k"], x["gram_log_decay"], x["gram_gain"], **options)
    return *plain(x, write_key=multiplier * x["k"], log_decay=decay), final


ONES = np.ones((B, T, H))
DELTA = ("q", "k", "v", "beta")
GRAM = ("gram_log_decay", "gram_gain")
PAPER = {"eta": 1.0, "bounds": (0.0, 1e9)}

DECAYS = {"scalar": "log_decay", "channel": "log_decay"}  # argument names that differ from the array's

# name: (rule, names of its arrays, options, the same by the oracle)
RULES = {
    "delta_net": (ops.delta_net, DELTA, {}, plain),
    "gated_delta_net": (ops.gated_delta_net, (*DELTA, "scalar"), {}, lambda x: plain(x, log_decay=x["scalar"])),
    "kda": (ops.kda, (*DELTA, "channel"), {"scale": 0.5}, lambda x: plain(x, log_decay=x["channel"], scale=0.5)),
    "gdn2": (
        ops.gdn2,
        ("q", "k", "v", "erase_gate", "write_gate", "channel"),
        {},
        lambda x: plain(
            x, k=x["erase_gate"] * per_head(x["k"]), v=x["write_gate"] * x["v"], beta=ONES,
            write_key=per_head(x["k"]), log_decay=x["channel"], q=per_head(x["q"]),
        ),
    ),
    "linear_attention": (ops.linear_attention, DELTA[:3], {}, lambda x: plain(x, beta=ONES, erase=False)),
    "mamba2": (ops.mamba2, (*DELTA, "scalar"), {}, lambda x: plain(x, log_decay=x["scalar"], erase=False)),
    "gla": (
        ops.gla, (*DELTA[:3], "channel"), {}, lambda x: plain(x, beta=ONES, log_decay=x["channel"], erase=False)
    ),
    "osdn": (ops.osdn, DELTA, {}, lambda x: hypergradient(x, aware=False, **PAPER)),
    "osdn, beta-aware": (
        ops.osdn, DELTA, TRUST | {"beta_aware": True}, lambda x: hypergradient(x, aware=True, **TRUST)
    ),
    "os_gdn": (
        ops.os_gdn,
        (*DELTA, "scalar"),
        TRUST | {"anchor": 0.3, "log_forget": "forget", "normalize": True},
        lambda x: hypergradient(x, x["scalar"], aware=True, forget=x["forget"], anchor=0.3, normalize=True, **TRUST),
    ),
    "os_kda": (
        ops.os_kda, (*DELTA, "channel"), {}, lambda x: hypergradient(x, x["channel"], aware=True, **PAPER)
    ),
    "pdn": (ops.pdn, (*DELTA, *GRAM), {}, lambda x: gram(x, center=-0.2)),
    "pgdn": (
        ops.pgdn, (*DELTA, "scalar", *GRAM), {"squash": 2.0}, lambda x: gram(x, x["scalar"], center=-0.2, squash=2.0)
    ),
    "pkda": (ops.pkda, (*DELTA, "channel", *GRAM), {"center": 0.1}, lambda x: gram(x, x["channel"], center=0.1)),
}  # fmt: skip


def call(name, x, **more):
    rule, arrays, options, _ = RULES[name]
    options = {key: x[value] if isinstance(value, str) else value for key, value in options.items()}
    return rule(**{DECAYS.get(name, name): x[name] for name in arrays}, **options, **more)


@pytest.mark.parametrize("name", RULES)
def test_rule_and_its_decoding(name):
    """The rule equals the oracle in one call, and in calls of one token that pass the State on."""

    @jit
    def both(x):
        o, state = call(name, x)

        def step(state, token):
            o, state = call(name, {key: array[:, None] for key, array in token.items()}, initial_state=state)
            return state, o[:, 0]

        _, first = call(name, {key: array[:, :1] for key, array in x.items()})
        rest = {key: jnp.moveaxis(array[:, 1:], 1, 0) for key, array in x.items()}
        last, decoded = jax.lax.scan(step, first, rest)
        return (o, *state), (decoded, *last)

    x = tokens()
    whole, decoded = both(x)
    expected = RULES[name][3](jax.tree.map(np.asarray, x))
    assert_close([a for a in whole if a is not None], list(expected), TOLERANCE)
    o, *state = expected
    assert_close([a for a in decoded if a is not None], [np.moveaxis(o[:, 1:], 1, 0), *state], TOLERANCE)


def test_all_rules_are_tested():
    helpers = {"State", "delta_rule", "delta_rule_step", "exact_gram_write_key", "exact_pdn"}
    helpers |= {"gram_preconditioner", "hypergradient_preconditioner", "hypergradient_preset"}
    helpers |= {"gram_write_key", "hypergradient_write_key", "squares_preconditioner", "squares_write_key"}
    assert {rule.__name__ for rule, *_ in RULES.values()} == set(ops.__all__) - helpers


@pytest.mark.parametrize("initial", [0.7, None])
def test_initial_state_serves_the_first_segment_only(initial):
    """A segment that starts inside the second call starts from `initial`, not from the State of the first call."""
    x = tokens()
    ids = jnp.asarray(np.repeat([[0] * 9 + [1] * (T - 9)], B, axis=0), jnp.int32)
    rule = functools.partial(ops.osdn, eta=0.5, bounds=(0.0, 1.2), initial=initial)
    arrays = {name: x[name] for name in DELTA}

    @jit
    def program(arrays):
        def tokens(start, stop):
            return {name: array[:, start:stop] for name, array in arrays.items()}

        o, state = rule(**arrays, segment_ids=ids)
        first, passed_on = rule(**tokens(0, 5), segment_ids=ids[:, :5])
        second, last = rule(**tokens(5, T), segment_ids=ids[:, 5:], initial_state=passed_on)
        alone, end = rule(**tokens(9, T))
        joined = jnp.concatenate([first, second], axis=1)
        return (o, state, o[:, 9:], state), (joined, last, alone, end)

    assert_close(*program(arrays), TOLERANCE)


@pytest.mark.parametrize("name", ["osdn, beta-aware", "os_gdn", "pdn", "pgdn"])
def test_array_as_initial_state_of_packed_segments(name):
    """It is the recurrent state of the first segment; the preconditioner starts from its initial value."""
    x, cut = tokens(), 5
    recurrent = jnp.asarray(np.random.default_rng(1).normal(size=(B, H, K, V)))
    segments = jnp.asarray(np.broadcast_to(np.arange(T) >= cut, (B, T)), jnp.int32)

    @jit
    def program(x, recurrent):
        packed = call(name, x, segment_ids=segments, initial_state=recurrent)
        first, _ = call(name, {key: array[:, :cut] for key, array in x.items()}, initial_state=recurrent)
        second, final = call(name, {key: array[:, cut:] for key, array in x.items()})
        return packed, (jnp.concatenate([first, second], axis=1), final)

    (o, state), (want, final) = program(x, recurrent)
    assert_close((o, tuple(state)), (want, tuple(final)), TOLERANCE)


@pytest.mark.parametrize("implementation", ["scan", "chunk"])
def test_reductions_between_rules(implementation):
    run = {"implementation": implementation, "chunk_size": 8}

    @jit
    def pairs(x):
        q, k, v, beta = (x[name] for name in DELTA)
        gates = {name: x[name] for name in GRAM}
        delta_net = ops.delta_net(q, k, v, beta=beta, **run)
        gated = ops.gated_delta_net(q, k, v, beta=beta, log_decay=x["scalar"], **run)
        wide = jnp.broadcast_to(x["scalar"][..., None], x["channel"].shape)
        none = jnp.zeros_like(x["scalar"])
        ones = {"erase_gate": jnp.ones_like(k), "write_gate": jnp.ones_like(v)}
        return {
            "Gram, squash 1": (ops.pdn(q, k, v, beta=beta, **gates, squash=1.0, **run), delta_net),
            "hypergradient, eta 0, d_0 1": (ops.osdn(q, k, v, beta=beta, eta=0.0, initial=1.0, **run), delta_net),
            "no decay": (ops.gated_delta_net(q, k, v, beta=beta, log_decay=none, **run), delta_net),
            "no decay per channel": (ops.kda(q, k, v, beta=beta, log_decay=jnp.zeros_like(wide), **run), delta_net),
            "equal channels": (ops.kda(q, k, v, beta=beta, log_decay=wide, **run), gated),
            "equal channels, no erase": (
                ops.gla(q, k, v, log_decay=wide, **run),
                ops.mamba2(q, k, v, beta=jnp.ones_like(beta), log_decay=x["scalar"], **run),
            ),
            "gates of 1": (
                ops.gdn2(q, k, v, **ones, log_decay=wide, **run),
                ops.gated_delta_net(q, k, v, beta=jnp.ones_like(beta), log_decay=x["scalar"], **run),
            ),
            "unit keys, b 1, d 1": (ops.osdn(q, k, v, beta=beta, initial=1.0, bounds=None, **run), delta_net),
        }

    for name, (special, general) in pairs(tokens()).items():
        assert_close({name: (special[0], special[1].recurrent)}, {name: (general[0], general[1].recurrent)}, TOLERANCE)


@pytest.mark.parametrize("implementation", ["scan", "chunk"])
def test_delta_net_is_a_fixed_point_of_the_hypergradient(implementation):
    """Unit keys, b = 1 and d = 1: <d, u> = 1, so that the update is zero."""
    d, final = ops.hypergradient_preconditioner(tokens()["k"], eta=1.0, initial=1.0, implementation=implementation)
    np.testing.assert_allclose(d, 1.0, rtol=0, atol=1e-14)
    np.testing.assert_allclose(final, 1.0, rtol=0, atol=1e-14)


def test_first_token_of_the_paper_writes_nothing():
    x = {name: array[:, :2] for name, array in tokens().items()}
    preset = ops.hypergradient_preset("paper")
    o, state = jit(lambda x: ops.osdn(**{name: x[name] for name in DELTA}, **preset))(x)
    np.testing.assert_array_equal(o[:, 0], 0.0)
    assert np.all(np.linalg.norm(state.recurrent, axis=(-1, -2)) > 0.01)
    trust = ops.hypergradient_preset("trust")
    assert trust == {"eta": 0.003, "bounds": (2 / 3, 3 / 2), "initial": 1.0}


@pytest.mark.parametrize("implementation", ["scan", "chunk"])
def test_exact_gram_is_ridge_regression(implementation):
    """The theorem of arXiv 2604.21100, at every token: S_t = (ridge I + sum k k^T)^-1 sum k v^T; also in two calls."""
    ridge = 0.3
    q, k, v = (np.asarray(tokens()[name]) for name in ("q", "k", "v"))

    @jit
    def program(q, k, v):
        rule = functools.partial(ops.exact_pdn, ridge=ridge, scale=1.0, implementation=implementation, chunk_size=8)
        o, state = rule(q, k, v)
        first, passed_on = rule(q[:, :5], k[:, :5], v[:, :5])
        second, last = rule(q[:, 5:], k[:, 5:], v[:, 5:], initial_state=passed_on)
        return (o, *state), (jnp.concatenate([first, second], axis=1), *last)

    keys, queries = per_head(k), per_head(q)
    o = np.zeros(v.shape)
    for t in range(T):
        seen = keys[:, : t + 1]
        normal = ridge * np.eye(K) + np.einsum("bthi,bthj->bhij", seen, seen)
        state = np.linalg.solve(normal, np.einsum("bthi,bthv->bhiv", seen, v[:, : t + 1]))
        o[:, t] = np.einsum("bhk,bhkv->bhv", queries[:, t], state)
    expected = o, state, np.linalg.inv(normal)[:, :: H // HK]
    for got in program(q, k, v):
        assert_close(got, expected, TOLERANCE)
