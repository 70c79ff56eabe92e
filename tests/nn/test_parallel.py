"""A model over a mesh is the same model: values and gradients, by module in float64 and as a whole in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from osdn_jax.nn import (
    MESH_AXES,
    RULES,
    BlockConfig,
    CausalLM,
    DeltaMixer,
    GramConfig,
    HypergradientConfig,
    LatentAttention,
    LatentAttentionConfig,
    MixtureConfig,
    MixtureOfExperts,
    MLPConfig,
    ModelConfig,
    SwiGLU,
    TensorParallel,
    mixer_config,
    parameter_spec,
)
from osdn_jax.nn.attention import SoftmaxAttention
from osdn_jax.nn.parallel import look_up, over_mesh
from osdn_jax.nn.sharding import constrain, parameter_axes, spec
from osdn_jax.nn.split import split_model
from support import assert_close, jit, random_like, value_and_gradient

B, T, D = 4, 24, 16
MESHES = {"fsdp and tensor": (1, 4, 2, 1), "data and context": (2, 1, 1, 4), "all": (1, 2, 2, 2)}


def make_mesh(sizes):
    return jax.make_mesh(sizes, MESH_AXES, (AxisType.Auto,) * 4)


def documents(seed=0):
    """Some start at the edges of devices, some inside; one is a single token."""
    marks = np.random.default_rng(seed).uniform(size=(B, T)) < 0.1
    marks[0, [6, 7, 12]] = True
    return jnp.asarray(np.cumsum(marks, axis=1), jnp.int32)


def small_mixer(rule, **changes):
    return mixer_config(rule, width=D, heads=4, key_dim=4, value_dim=6, **changes)


def pure(module):
    """Return (call of the module with given parameters, the parameters)."""
    graph, state = nnx.split(module)
    parameters = jax.tree.map(lambda x: x.astype(jnp.float64), state)
    return (lambda parameters: nnx.merge(graph, parameters)), parameters


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("rule", "mesh"),
    [
        *((rule, "all") for rule in ("osdn", "os_gdn", "gdn2", "pdn", "mamba2", "transformer")),
        ("gated_delta_net", "fsdp and tensor"),
        ("kda", "data and context"),
    ],
)
def test_mixers(rule, mesh):
    """Gates are always float32, so the last digits differ."""
    kind = SoftmaxAttention if rule == "transformer" else DeltaMixer
    check_mixer(kind(small_mixer(rule), 1, jnp.dtype("float64"), rngs=nnx.Rngs(0)), mesh)


def check_mixer(mixer, mesh):
    """Compare a mixer over a mesh with the same mixer on one device, value and gradient."""
    module, parameters = pure(mixer)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(B, T, D)))
    ids = documents()

    def whole(arguments):
        parameters, x = arguments
        return module(parameters)(x, None, ids)[0]

    def parted(arguments):
        parameters, x = arguments
        mesh = jax.sharding.get_abstract_mesh()
        axis = "context" if mesh.shape["context"] > 1 else None
        return over_mesh(module(parameters), "mixer", lambda m, x, ids: m(x, None, ids, axis)[0], mesh, x, ids)

    cotangent = random_like(x, seed=2)
    with jax.numpy_dtype_promotion("standard"):  # of float64 and the gates' float32
        want = jit(value_and_gradient(whole))((parameters, x), cotangent)
        with jax.set_mesh(make_mesh(MESHES[mesh])):
            got = jit(value_and_gradient(parted))((parameters, x), cotangent)
    assert_close(got, want, 2e-6)


LATENT = LatentAttentionConfig(width=D, heads=4, key_dim=4, value_dim=6, rank=6, shared_key_dim=2, query_rank=4)
GATES = {
    "decay_rank": 2,
    "output_gate_rank": 2,
    "output_gate_bias": True,
    "beta_per_key_head": True,
    "decay_scale": True,
}
LEARNED = {"hypergradient": HypergradientConfig(learned_eta=True), "gram": GramConfig(learned_squash=True)}
ALL_HEADS = {"qk_norm": True, "qk_norm_over": "all", "window": 9, "rotary_dim": 2, "qkv_bias": True}
HYBRID = {
    "latent": (LatentAttention, LATENT, "all"),
    "latent over context": (LatentAttention, LATENT, "data and context"),
    "norm over all heads": (SoftmaxAttention, small_mixer("transformer", key_heads=2, **ALL_HEADS), "all"),
    "gates of low rank": (DeltaMixer, small_mixer("kda", key_heads=2, **GATES), "fsdp and tensor"),
    "learned eta": (DeltaMixer, small_mixer("os_gdn", key_heads=2, **LEARNED), "all"),
    "learned squash": (DeltaMixer, small_mixer("pgdn", key_heads=2, **LEARNED), "all"),
    "squares": (DeltaMixer, small_mixer("delta_net", preconditioner="squares", conv_size=0), "all"),
}


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", HYBRID)
def test_mixers_of_hybrids(name):
    kind, config, mesh = HYBRID[name]
    check_mixer(kind(config, 1, jnp.dtype("float64"), rngs=nnx.Rngs(0)), mesh)


@pytest.mark.slow
@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_a_hybrid_with_mixtures(router):
    """Logits, balance and gradients are those of one device; experts are split over tensor."""
    mixture = MixtureConfig(experts=4, active=2, hidden=6, router=router, shared_hidden=4, shared_gate=True)
    mixers = (small_mixer("pgdn"), LATENT)
    blocks = tuple(BlockConfig(mixer, mlp) for mixer, mlp in zip(mixers, (MLPConfig(8), mixture), strict=True))
    apply, parameters = split_model(CausalLM(ModelConfig(vocab_size=8, blocks=blocks), rngs=nnx.Rngs(0)))
    tokens = jnp.asarray(np.random.default_rng(4).integers(8, size=(B, T)), jnp.int32)
    cotangent = jnp.asarray(random_like(jnp.zeros((B, T, D)), seed=2), jnp.float32)

    def loss(parameters):
        hidden, _, balance = apply(parameters, tokens, segment_ids=documents(), method="balanced_features")
        return jnp.vdot(hidden, cotangent) + 3.0 * balance, balance

    want, want_gradient = jit(jax.value_and_grad(loss, has_aux=True))(parameters)
    with jax.set_mesh(make_mesh(MESHES["all"])):
        got, gradient = jit(jax.value_and_grad(loss, has_aux=True))(parameters)
    np.testing.assert_allclose(got, want, rtol=2e-5)
    assert_close(gradient, want_gradient, 2e-5)
    assert parameter_spec("blocks/1/mlp/experts_gate_and_up") == P("tensor", "fsdp", None)


def test_a_mixture_names_what_the_mesh_does_not_divide():
    mixture = MixtureOfExperts(MixtureConfig(experts=6, active=2, hidden=6), D, 1, jnp.float32, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="experts: got 6, expected a multiple of the 4 devices"):
        mixture.shard(4)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("mesh", MESHES)
def test_mlp_and_embedding(mesh):
    module, parameters = pure(SwiGLU(D, 32, 1, jnp.dtype("float64"), rngs=nnx.Rngs(0)))
    table = jnp.asarray(np.random.default_rng(3).normal(size=(10, D)))
    tokens = jnp.asarray(np.random.default_rng(4).integers(10, size=(B, T)), jnp.int32)

    def whole(arguments):
        parameters, table = arguments
        return module(parameters)(table[tokens])

    def parted(arguments):
        parameters, table = arguments
        mesh = jax.sharding.get_abstract_mesh()
        return over_mesh(module(parameters), "mlp", lambda m, x: m(x), mesh, look_up(table, tokens))

    cotangent = random_like(jnp.zeros((B, T, D)), seed=2)
    want = jit(value_and_gradient(whole))((parameters, table), cotangent)
    with jax.set_mesh(make_mesh(MESHES[mesh])):
        got = jit(value_and_gradient(parted))((parameters, table), cotangent)
    assert_close(got, want, 1e-12)


def test_every_parameter_has_axes():
    """Each axis of a parameter has a logical name."""
    for rule in RULES:
        config = ModelConfig(vocab_size=8, layers=1, mixer=small_mixer(rule), mlp_dim=8)
        _, parameters = split_model(CausalLM(config, rngs=nnx.Rngs(0)))
        assert {name: len(parameter_axes(name)) for name in parameters} == {n: x.ndim for n, x in parameters.items()}
    with pytest.raises(ValueError, match="parameter 'blocks/0/mixer/unheard_of' has no axes"):
        parameter_axes("blocks/0/mixer/unheard_of")


@pytest.mark.parametrize("rule", ["osdn", "gdn2", "transformer"])
def test_modules_can_be_sharded(rule):
    """Fused sizes sum to the last axis; the only shard of one is the module; an error names the field."""
    config = ModelConfig(vocab_size=8, layers=1, mixer=small_mixer(rule, key_heads=2), mlp_dim=8)
    block = nnx.eval_shape(lambda: CausalLM(config, rngs=nnx.Rngs(0))).blocks[0]
    for module in (block.mixer, block.mlp):
        assert isinstance(module, TensorParallel)
        _, parameters = split_model(module)
        assert {name: sum(sizes) for name, sizes in module.fused.items()} == {
            name: parameters[name].shape[-1] for name in module.fused
        }
        assert module.shard(1) == nnx.graphdef(module)
    with pytest.raises(ValueError, match="key_heads: got 2, expected a multiple of the 4 devices"):
        block.mixer.shard(4)


def test_gradients_lie_where_parameters_lie():
    mixer = small_mixer("pkda", implementation="scan")  # the smallest program of the rule with the most parameters
    config = ModelConfig(vocab_size=8, layers=1, mixer=mixer, mlp_dim=8)
    apply, parameters = split_model(CausalLM(config, rngs=nnx.Rngs(0)))
    tokens = jnp.asarray(np.random.default_rng(4).integers(8, size=(B, T)), jnp.int32)
    mesh = make_mesh(MESHES["fsdp and tensor"])
    places = {name: NamedSharding(mesh, parameter_spec(name)) for name in parameters}
    with jax.set_mesh(mesh):
        put = {name: jax.device_put(x, places[name]) for name, x in parameters.items()}
        f = jax.grad(lambda p: jnp.sum(jnp.square(apply(p, tokens)[0])))
        gradient = jax.jit(f, out_shardings=places)(put)
    assert {name: x.addressable_shards[0].data.shape for name, x in gradient.items()} == {
        name: places[name].shard_shape(x.shape) for name, x in parameters.items()
    }
    kernel = "blocks/0/mixer/project/kernel"
    assert gradient[kernel].addressable_shards[0].data.size * 8 == parameters[kernel].size


def test_without_a_mesh_nothing_changes():
    x = jnp.ones((2, 3))
    assert constrain(x, "batch", None) is x
    mesh = make_mesh((8, 1, 1, 1))
    inside = jax.shard_map(lambda x: constrain(x, "batch", None), mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    np.testing.assert_array_equal(jit(inside)(jnp.ones((8, 3))), np.ones((8, 3)))
    other = jax.make_mesh((8,), ("rows",), (AxisType.Auto,))
    with jax.set_mesh(other):
        assert constrain(x, "batch", None) is x
    assert spec("batch", "time", None) == P(("data", "fsdp"), "context", None)


def test_errors():
    config = ModelConfig(vocab_size=8, layers=1, mixer=small_mixer("delta_net"), mlp_dim=9)
    model = CausalLM(config, rngs=nnx.Rngs(0))
    tokens = jnp.zeros((8, 8), jnp.int32)
    _, states = model(tokens)
    with jax.set_mesh(make_mesh((8, 1, 1, 1))), pytest.raises(ValueError, match="states: got some over a mesh"):
        model(tokens, states)
    with jax.set_mesh(make_mesh((1, 1, 8, 1))), pytest.raises(ValueError, match="heads: got 4, expected a multiple"):
        model(tokens)
    with jax.set_mesh(make_mesh((4, 1, 2, 1))), pytest.raises(ValueError, match="mlp_dim: got 9, expected a multiple"):
        model(tokens)
    with jax.set_mesh(make_mesh((1, 1, 1, 8))), pytest.raises(ValueError, match="x: got 1 tokens on each device"):
        model(tokens)
