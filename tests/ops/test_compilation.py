"""Equal calls compile once, also outside of jit."""

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from osdn_jax import nn, ops
from osdn_jax.nn.chunked_loss import Chunks, cross_entropy
from osdn_jax.nn.softmax import attend


@pytest.fixture
def compilations():
    """A counter of compiled programs, [count]; the fixture itself compiles one."""
    count = [0]

    def listen(event, seconds, **more):
        count[0] += "backend_compile" in event

    jax.monitoring.register_event_duration_secs_listener(listen)
    jax.jit(lambda x: 3.0 * x)(1.0)
    assert count[0] == 1
    yield count
    jax.monitoring.unregister_event_duration_listener(listen)


def arrays(rule, length=3):
    rng = np.random.default_rng(0)
    uniform = lambda *shape: jnp.asarray(rng.uniform(0.1, 0.5, size=shape), jnp.float32)
    q, k, v, gate, channel = (
        *(uniform(1, length, 2, 4) for _ in range(3)),
        uniform(1, length, 2),
        uniform(1, length, 2, 4),
    )
    more = {
        "osdn": {"beta": gate},
        "delta_net": {"beta": gate},
        "os_gdn": {"beta": gate, "log_decay": -gate},
        "kda": {"beta": gate, "log_decay": -channel},
        "pkda": {"beta": gate, "log_decay": -channel, "gram_log_decay": -gate, "gram_gain": gate},
        "gdn2": {"erase_gate": channel, "write_gate": uniform(1, length, 2, 4), "log_decay": -channel},
        "linear_attention": {},
    }
    return {"q": q, "k": k, "v": v} | more[rule]


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["scan", "chunk", None])
@pytest.mark.parametrize("rule", ["delta_net", "osdn", "os_gdn", "kda", "pkda", "gdn2", "linear_attention"])
def test_rules(rule, implementation, compilations):
    x, segments = arrays(rule), jnp.asarray([[0, 0, 1]])

    def value():
        return getattr(ops, rule)(**x, implementation=implementation)

    def gradient():
        def loss(x):
            return jnp.sum(getattr(ops, rule)(**x, implementation=implementation, segment_ids=segments)[0])

        return jax.grad(loss)(x)

    for call in (value, gradient):
        first = call()
        count = compilations[0]
        repeated = call()
        assert compilations[0] == count
        jax.tree.map(np.testing.assert_array_equal, repeated, first)


def test_other_functions(compilations):
    q, k, v, beta = arrays("delta_net").values()
    model = nn.mixer_config("transformer", width=8, heads=2, key_dim=4, value_dim=4)
    attention = nn.SoftmaxAttention(model, 1, jnp.dtype(jnp.float32), rngs=nnx.Rngs(0))
    first, targets = jnp.zeros((1, 3), jnp.int32), jnp.zeros((1, 3), jnp.int32)
    with jax.enable_x64(True):
        wide = jnp.asarray(np.asarray(k, np.float64))
    calls = {
        "step": lambda: ops.delta_rule_step(None, q[:, 0], k[:, 0], v[:, 0], beta[:, 0]),
        "preconditioner": lambda: ops.hypergradient_preconditioner(k, beta, eta=0.1, bounds=(0.0, 1.0)),
        "attend": lambda: attend(q, k, v, first, chunk_size=2),
        "attention": lambda: attention(jnp.ones((1, 3, 8), jnp.float32))[0],
        "cross entropy": lambda: jax.grad(
            lambda x: jnp.sum(cross_entropy(x, jnp.ones((5, 4), jnp.float32), targets, Chunks(2, 2))[0])
        )(q[:, :, 0]),
        "exact Gram": lambda: exact(wide),
    }
    for name, call in calls.items():
        call()
        count = compilations[0]
        call()
        assert compilations[0] == count, name


def exact(k):
    with jax.enable_x64(True):
        return ops.exact_gram_write_key(k)


def test_other_options_are_other_programs():
    """Static options are part of the key that compiled programs are cached by."""
    x = arrays("delta_net")
    for options in ({"scale": 1.0}, {"scale": 2.0}, {"implementation": "scan"}, {"chunk_size": 2}):
        o, _ = ops.delta_net(**x, **options)
        scale = options.get("scale", 0.5)
        np.testing.assert_allclose(o, scale / 0.5 * ops.delta_net(**x)[0], rtol=1e-5)
    assert not np.allclose(ops.delta_rule(**x, erase=False)[0], ops.delta_rule(**x)[0])
