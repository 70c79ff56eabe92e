"""Models on meshes with Explicit axes, the default of jax.make_mesh: the same values and gradients as on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from osdn_jax.nn import MESH_AXES, CausalLM, DeltaMixer, ModelConfig, SoftmaxAttention, mixer_config
from osdn_jax.nn.chunked_loss import Chunks, cross_entropy
from osdn_jax.nn.split import split_model
from support import assert_close, jit

B, T = 4, 8
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 12, (B, T)), jnp.int32)
SEGMENTS = jnp.asarray(np.repeat([[0, 1]], [3, 5], axis=1) + np.zeros((B, 1), int), jnp.int32)


def model(rule):
    mixer = mixer_config(rule, width=16, heads=2, key_dim=4, value_dim=8)
    config = ModelConfig(vocab_size=12, layers=1, mixer=mixer, mlp_dim=16)
    apply, parameters = split_model(CausalLM(config, rngs=nnx.Rngs(0)))

    def loss(parameters, tokens, segments):
        logits, _ = apply(parameters, tokens, segment_ids=segments)
        return -jnp.mean(jax.nn.log_softmax(logits)[..., 3])

    return apply, jax.value_and_grad(loss), parameters


def whole(tree):
    return jax.tree.map(np.asarray, tree)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["os_gdn", "transformer"])
def test_under_a_mesh_with_the_axes_of_the_model(rule):
    apply, step, parameters = model(rule)
    want = jit(step)(parameters, TOKENS, SEGMENTS)
    with jax.set_mesh(jax.make_mesh((2, 1, 2, 1), MESH_AXES)):
        got = jit(step)(parameters, TOKENS, SEGMENTS)
        logits, states = jit(apply)(parameters, TOKENS)
        assert jax.typeof(logits).sharding.spec == P(("data", "fsdp"), "context", None)
    assert_close(whole(got), whole(want), 1e-3)
    assert set(states) == {None}


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["os_gdn", "transformer"])
def test_tokens_split_by_rows(rule):
    """Plain data parallelism: only the tokens are on the mesh."""
    apply, step, parameters = model(rule)
    want = jit(step)(parameters, TOKENS, SEGMENTS)
    mesh = jax.make_mesh((4,), ("rows",))
    tokens, segments = (jax.device_put(x, NamedSharding(mesh, P("rows"))) for x in (TOKENS, SEGMENTS))
    assert_close(whole(jit(step)(parameters, tokens, segments)), whole(want), 1e-3)

    logits, states = jit(apply)(parameters, tokens[:, :5])
    assert jax.typeof(logits).sharding.spec == P("rows", None, None)
    rest, _ = jit(apply)(parameters, tokens[:, 5:], states)
    plain, _ = jit(apply)(parameters, TOKENS)
    assert_close(np.concatenate([logits, rest], axis=1), np.asarray(plain), 1e-5)


@pytest.mark.slow
def test_parameters_split_too():
    """Sharded parameters are gathered on the devices of the tokens."""
    _, step, parameters = model("os_gdn")
    want = jit(step)(parameters, TOKENS, SEGMENTS)
    mesh = jax.make_mesh((2, 2), ("rows", "columns"))
    split = {
        name: jax.device_put(
            x, NamedSharding(mesh, P(*[None] * (x.ndim - 1), "columns" if x.shape[-1] % 2 == 0 else None))
        )
        for name, x in parameters.items()
    }
    tokens, segments = (jax.device_put(x, NamedSharding(mesh, P("rows"))) for x in (TOKENS, SEGMENTS))
    value, gradient = jit(step)(split, tokens, segments)
    assert_close(whole((value, gradient)), whole(want), 1e-3)
    name = "blocks/0/mixer/project/kernel"
    assert jax.typeof(gradient[name]).sharding.spec == jax.typeof(split[name]).sharding.spec


def test_statistics_of_preconditioners():
    apply, _, parameters = model("os_gdn")
    call = jit(lambda p, t: apply(p, t, method="preconditioners"))
    want = call(parameters, TOKENS)
    tokens = jax.device_put(TOKENS, NamedSharding(jax.make_mesh((4,), ("rows",)), P("rows")))
    assert_close(whole(call(parameters, tokens)), whole(want), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["gdn2", "pkda", "transformer"])
def test_a_mixer_in_a_model_of_ones_own(rule):
    """Values, states and gradients, under jax.set_mesh, and with a mesh that only x has."""
    config = mixer_config(rule, width=16, heads=4, key_heads=2, key_dim=8, value_dim=8)
    kind = SoftmaxAttention if rule == "transformer" else DeltaMixer
    apply, parameters = split_model(kind(config, 1, jnp.dtype("float32"), rngs=nnx.Rngs(0)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, 16)), jnp.float32)

    def step(parameters, x, segments):
        def loss(parameters):
            out, state = apply(parameters, x, None, segments)
            return jnp.sum(out**2), state

        return jax.value_and_grad(loss, has_aux=True)(parameters)

    want = jit(step)(parameters, x, SEGMENTS)
    mesh = jax.make_mesh((4,), ("rows",))
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    split = place(x, "rows"), place(SEGMENTS, "rows")
    assert_close(whole(jit(step)(jax.tree.map(place, parameters), *split)), whole(want), 1e-4)
    with jax.set_mesh(mesh):
        assert_close(whole(jit(step)(parameters, *split)), whole(want), 1e-4)


def test_cross_entropy():
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, 4)), jnp.float32)
    table = jnp.asarray(np.random.default_rng(1).normal(size=(12, 4)), jnp.float32)
    step = jax.value_and_grad(lambda x, w, t: jnp.sum(cross_entropy(x, w, t, Chunks(4, 4))[0]), argnums=(0, 1))
    want = jit(step)(hidden, table, TOKENS)
    mesh = jax.make_mesh((4,), ("rows",))
    x, targets = (jax.device_put(y, NamedSharding(mesh, P("rows"))) for y in (hidden, TOKENS))
    assert_close(whole(jit(step)(x, table, targets)), whole(want), 1e-5)
    with jax.set_mesh(mesh):
        assert_close(whole(jit(step)(x, table, targets)), whole(want), 1e-5)
