"""Arrays sharded by batch and heads, on meshes with Explicit and with Auto axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from osdn_jax import ops
from support import assert_close, random_like

pytestmark = pytest.mark.slow

B, T, H, K = 4, 10, 4, 8
AXIS_TYPES = {"Explicit": AxisType.Explicit, "Auto": AxisType.Auto}


def mesh_of(axis_type, **axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AXIS_TYPES[axis_type],) * len(axes))


def arrays(rule, key_heads):
    rng = np.random.default_rng(0)
    uniform = lambda *shape: jnp.asarray(rng.uniform(0.1, 0.5, size=shape), jnp.float32)
    x = {"q": uniform(B, T, key_heads, K), "k": uniform(B, T, key_heads, K), "v": uniform(B, T, H, K)}
    heads, keys, channel = uniform(B, T, H), uniform(B, T, key_heads), uniform(B, T, H, K)
    more = {
        "delta_net": {"beta": heads},
        "kda": {"beta": heads, "log_decay": -channel},
        "os_gdn": {"beta": heads, "log_decay": -heads, "log_forget": -heads},
        "osdn": {"beta": heads},
        "pgdn": {"beta": heads, "log_decay": -heads, "gram_log_decay": -keys, "gram_gain": keys},
        "gdn2": {"erase_gate": uniform(B, T, key_heads, K), "write_gate": x["v"], "log_decay": -channel},
        "linear_attention": {},
    }
    return x | more[rule]


def program(rule, segments, **options):
    def call(x):
        o, state = getattr(ops, rule)(**x, segment_ids=segments, **options)
        return {"o": o} | {name: y for name, y in state._asdict().items() if y is not None}

    def value_and_gradient(x, cotangents):
        value, pull = jax.vjp(call, x)
        return value, pull(cotangents)[0]

    return call, value_and_gradient


RULES = {"delta_net": "chunk", "kda": "chunk", "os_gdn": "chunk", "osdn": None, "pgdn": "chunk", "gdn2": None}


@pytest.mark.parametrize("axis_type", AXIS_TYPES)
@pytest.mark.parametrize("rule", RULES)
def test_rows_and_heads(rule, axis_type):
    """Values and gradients equal those on one device and are sharded as the inputs are."""
    mesh = mesh_of(axis_type, rows=2, heads=2)
    x = arrays(rule, key_heads=2)
    segments = jnp.asarray(np.arange(T)[None] // 4 + np.zeros((B, 1), int), jnp.int32)
    call, both = program(rule, segments, implementation=RULES[rule], chunk_size=4)
    cotangents = random_like(jax.eval_shape(call, x), seed=1)
    want = jax.jit(both)(x, cotangents)

    place = lambda x: jax.device_put(x, NamedSharding(mesh, P("rows", None, "heads")))
    state = lambda x: jax.device_put(x, NamedSharding(mesh, P("rows", "heads")))
    split = {name: place(y) for name, y in x.items()}
    cotangents = {name: place(y) if name == "o" else state(y) for name, y in cotangents.items()}
    got = jax.jit(both)(split, cotangents)
    assert_close(got, want, 1e-5)
    if axis_type == "Explicit":
        assert jax.typeof(got[0]["o"]).sharding.spec == P("rows", None, "heads", None)
        assert jax.typeof(got[0]["recurrent"]).sharding.spec == P("rows", "heads", None, None)
        text = jax.jit(both).lower(split, cotangents).compile().as_text()
        assert not any(f"{collective}(" in text for collective in ("all-gather", "all-to-all", "collective-permute"))
        assert_close(call(split), want[0], 1e-5)  # not under jit


@pytest.mark.parametrize("implementation", ["scan", "chunk", None])
def test_rows_alone(implementation):
    """Data parallelism on a default mesh of jax.make_mesh."""
    mesh = jax.make_mesh((4,), ("rows",))
    x = arrays("delta_net", key_heads=4)
    split = {name: jax.device_put(y, NamedSharding(mesh, P("rows"))) for name, y in x.items()}
    call, _ = program("delta_net", None, implementation=implementation)
    assert_close(jax.jit(call)(split), jax.jit(call)(x), 1e-5)


def test_some_arrays_sharded():
    """Unsharded arrays, and fewer key heads than devices, are handled; so are states and single steps."""
    mesh = jax.make_mesh((2, 4), ("rows", "heads"))
    x = arrays("osdn", key_heads=2)
    call, _ = program("osdn", None)
    split = x | {"v": jax.device_put(x["v"], NamedSharding(mesh, P("rows", None, "heads")))}
    with jax.set_mesh(mesh):
        assert_close(jax.jit(call)(split), jax.jit(call)(x), 1e-5)

        state = jnp.ones((B, H, K, K), jnp.float32)
        step = lambda x, state: ops.delta_rule_step(state, **{name: y[:, 0] for name, y in x.items()})
        placed = jax.device_put(state, NamedSharding(mesh, P("rows", "heads")))
        assert_close(jax.jit(step)(split, placed), jax.jit(step)(x, state), 1e-5)


def test_unsupported_shardings_are_refused_by_name():
    mesh = jax.make_mesh((2, 2), ("a", "b"))
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    x = arrays("delta_net", key_heads=4)
    for name, spec, message in (
        ("k", (None, "a"), r"k: got its axis 1 split over the mesh axes \('a',\), expected batch and heads alone"),
        ("v", (None, None, None, "a"), r"v: got its axis 3 split over the mesh axes \('a',\)"),
        ("beta", ("b",), r"beta: got batch split over the mesh axes \('b',\), expected \('a',\) as for q"),
        ("v", (None, None, "a"), r"v: got heads split over the mesh axes \('a',\), which split the batch of q"),
    ):
        split = x | {"q": place(x["q"], "a"), name: place(x[name], *spec)}
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda split=split: ops.delta_net(**split))
    state = place(jnp.ones((B, H, K, K), jnp.float32), None, None, "a")
    token = {name: y[:, 0] for name, y in x.items()}
    with pytest.raises(ValueError, match="^state: got its axis 2 split"):
        jax.eval_shape(lambda: ops.delta_rule_step(state, **token))
