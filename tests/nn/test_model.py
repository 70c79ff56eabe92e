"""The language model: initialisation, dropout, and the model as a function of its parameters."""

import re
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from osdn_jax.nn import MESH_AXES, CausalLM, HypergradientConfig, ModelConfig, mixer_config
from osdn_jax.nn.model import Block
from osdn_jax.nn.parameters import weight_decay_mask
from osdn_jax.nn.split import split_model
from osdn_jax.training import build_model, build_optimizer, default_config
from support import jit
from support.models import LENGTH, VOCABULARY, model_config, parameters_of, small_model, tokens


def config_of(rule, **changes):
    config = default_config()
    config.model.update(rule=rule, layers=2, width=12, heads=4, key_heads=2, mlp_dim=10, **changes)
    return config


def started(config):
    """Return the parameters of a configuration's model, initialised by one program."""
    return jit(lambda: split_model(build_model(config))[1])()


def ending(parameters, name):
    found = [x for path, x in parameters.items() if path.endswith(name)]
    assert len(found) == 2, name  # one in each layer
    return found


# Initialisation


@pytest.mark.parametrize(
    ("rule", "preset", "start"),
    [
        ("osdn", None, 0.0),
        ("osdn", "paper", 0.0),
        ("osdn", "trust", 1.0),
        ("os_gdn", None, 1.0),
        ("os_kda", "paper", 0.0),
    ],
)
def test_the_preconditioner_starts_at_its_preset(rule, preset, start):
    parameters = started(config_of(rule, preset=preset))
    for d in ending(parameters, "mixer/initial"):
        assert d.shape == (2 if rule == "osdn" else 4, 3)
        np.testing.assert_array_equal(d, start)
    for kernel, bias in zip(ending(parameters, "forget/kernel"), ending(parameters, "forget/bias"), strict=True):
        np.testing.assert_array_equal(kernel, 0.0)
        gamma = 1 / (1 + np.exp(-np.asarray(bias, np.float64)))
        assert ((gamma > 0.9989) & (gamma < 0.9991)).all()


def test_the_gram_preconditioner_starts_at_its_center():
    parameters = started(config_of("pgdn"))
    for center in ending(parameters, "gram_center"):
        np.testing.assert_array_equal(center, np.full(2, -0.2, np.float32))


@pytest.mark.parametrize(
    ("rule", "gates"),
    [("gated_delta_net", "mixer/decay"), ("kda", "mixer/decay"), ("gdn2", "mixer/decay"), ("pdn", "gram_decay")],
)
def test_decays_start_in_the_range_of_the_papers(rule, gates):
    config = config_of(rule)
    config.model.update(heads=32, key_heads=32, width=64)
    parameters = started(config)
    rates = np.exp(ending(parameters, f"{gates}/log_rate"))  # A, uniform in (1, 16)
    assert rates.min() >= 1
    assert rates.max() <= 16
    assert 7 < rates.mean() < 10
    assert np.ptp(rates) > 10
    steps = np.logaddexp(0, ending(parameters, f"{gates}/bias"))  # softplus(dt_bias), log-uniform in (0.001, 0.1)
    assert steps.min() >= 0.001 * (1 - 1e-4)
    assert steps.max() <= 0.1 * (1 + 1e-4)
    assert -2.3 < np.log10(steps).mean() < -1.7
    assert np.ptp(np.log10(steps)) > 1.2


def test_norms_start_at_one_and_matrices_at_their_spread():
    parameters = started(config_of("os_gdn"))
    for name, x in parameters.items():
        if name.endswith("scale"):
            np.testing.assert_array_equal(x, 1.0, name)
    for x, fan_in in (("mixer/project/kernel", 12), ("mlp/gate_and_up/kernel", 12)):
        np.testing.assert_allclose(np.std(ending(parameters, x)[0]), fan_in**-0.5, rtol=0.15)
    np.testing.assert_allclose(np.std(parameters["embedding/embedding"]), 0.02, rtol=0.1)


def test_layers_start_differently_and_seeds_too():
    config = config_of("os_kda")
    parameters = started(config)
    first, second = ending(parameters, "mixer/project/kernel")
    assert not np.array_equal(first, second)
    again = started(config)
    config.seed = 1
    other = started(config)
    for name, x in parameters.items():
        np.testing.assert_array_equal(x, again[name])
    constant = ("scale", "initial", "forget/kernel", "forget/bias")
    assert {name for name, x in parameters.items() if np.array_equal(x, other[name])} == {
        name for name in parameters if name.endswith(constant)
    }


# Weight decay

MATRICES = ("project/kernel", "beta/kernel", "output/kernel", "gate/kernel", "down/kernel", "gate_and_up/kernel")
MATRICES += ("gram_gain/kernel", "embedding/embedding", "head/kernel")
EXEMPT = ("scale", "convolution/kernel", "log_rate", "bias", "initial", "forget/kernel", "gram_center")


@pytest.mark.parametrize("rule", ["gdn2", "os_kda", "os_gdn", "pkda", "mamba2"])
def test_weight_decay_moves_matrices_and_nothing_else(rule):
    config = config_of(rule, tied_embeddings=False)
    config.optimizer.warmup_steps = 0
    model = nnx.eval_shape(lambda: build_model(config))
    optimizer = build_optimizer(config, model)
    parameters = jax.eval_shape(lambda: split_model(build_model(config))[1])
    ones = jax.tree.map(jnp.ones_like, parameters)  # so that decay shows in every parameter that it acts on
    with jax.numpy_dtype_promotion("standard"):
        zeros = jax.tree.map(jnp.zeros_like, ones)
        update, _ = jit(lambda: optimizer.update(zeros, optimizer.init(ones), ones))()
    moved = {name for name, x in update.items() if np.any(np.asarray(x) != 0)}
    assert moved == {name for name in parameters if name.endswith(MATRICES) and not name.endswith(EXEMPT)}
    assert set(parameters) - moved == {name for name in parameters if name.endswith(EXEMPT)}
    for name in moved:
        np.testing.assert_allclose(update[name], -config.optimizer.learning_rate * 0.1, rtol=1e-5)
    assert weight_decay_mask(model) == {name: name in moved for name in parameters}


# The model as a function


def test_split_model_is_the_module():
    model = CausalLM(model_config("delta_net"), rngs=nnx.Rngs(params=0))
    apply, parameters = split_model(model)
    x = jnp.asarray(tokens())
    run, want = jit(apply), jit(model)(x)
    for got, of_module in zip(jax.tree.leaves(run(parameters, x)), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(got, of_module)
    changed = parameters | {"head/kernel": 2 * parameters["head/kernel"]}
    np.testing.assert_allclose(run(changed, x)[0], 2 * want[0], rtol=1e-5)
    with pytest.raises(KeyError, match="norm/scale"):
        apply({name: x for name, x in parameters.items() if name != "norm/scale"}, x)


def test_parameters_keep_their_names():
    # Checkpoints use these names.
    parameters = started(config_of("os_gdn", tied_embeddings=False))
    layer = [
        "mixer/beta/kernel",
        "mixer/convolution/kernel",
        "mixer/decay/bias",
        "mixer/decay/log_rate",
        "mixer/decay/project/kernel",
        "mixer/forget/bias",
        "mixer/forget/kernel",
        "mixer/gate/kernel",
        "mixer/initial",
        "mixer/norm/scale",
        "mixer/output/kernel",
        "mixer/project/kernel",
        "mixer_norm/scale",
        "mlp/down/kernel",
        "mlp/gate_and_up/kernel",
        "mlp_norm/scale",
    ]
    names = [f"blocks/{i}/{name}" for i in range(2) for name in layer]
    assert sorted(parameters) == sorted([*names, "embedding/embedding", "head/kernel", "norm/scale"])
    parameters = started(config_of("pkda"))
    own = {"mixer/gram_center", "mixer/gram_decay/bias", "mixer/gram_gain/kernel", "mixer/decay/down/kernel"}
    assert {f"blocks/1/{name}" for name in own} < set(parameters)
    assert "head/kernel" not in parameters
    parameters = started(config_of("gdn2"))
    own = {"mixer/erase_gate/project/kernel", "mixer/write_gate/project/kernel", "mixer/decay/bias"}
    assert {f"blocks/1/{name}" for name in own} < set(parameters)
    assert "blocks/1/mixer/beta/kernel" not in parameters


def test_tied_embeddings_read_with_what_they_write():
    apply, parameters = parameters_of(model_config("delta_net", tied_embeddings=True))
    assert "head/kernel" not in parameters
    gradient = jit(jax.grad(lambda p: apply(p, jnp.zeros((1, 2), jnp.int32))[0][0, :, 3].sum()))(parameters)
    rows = np.abs(gradient["embedding/embedding"]).max(axis=1)
    assert set(np.flatnonzero(rows)) == {0, 3}  # the embedding of token 0, and the logit of token 3


# Dropout


def test_dropout_acts_only_with_a_key():
    apply, parameters = parameters_of(model_config("delta_net", layers=2, dropout=0.5))
    run = jit(lambda key: apply(parameters, jnp.asarray(tokens()), dropout_key=key)[0])
    without = run(None)
    plain, _ = jit(parameters_of(model_config("delta_net", layers=2))[0])(parameters, jnp.asarray(tokens()))
    np.testing.assert_allclose(without, plain, atol=1e-4)
    a, same, b = (run(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, same)
    for x, y in ((a, b), (a, without)):
        assert (np.abs(x - y) > 1e-3).mean() > 0.9


def test_blocks_are_traced_once_however_many_there_are(monkeypatch):
    traced = []
    call = Block.balanced
    monkeypatch.setattr(Block, "balanced", lambda *arguments: traced.append(1) or call(*arguments))
    apply, parameters = parameters_of(model_config("delta_net", layers=4, norm_epsilon=2e-6))
    gradient = jax.grad(lambda parameters: apply(parameters, jnp.asarray(tokens()))[0].sum())
    program = jax.jit(gradient).lower(parameters).as_text()
    assert len(traced) == 1
    assert len(re.findall(r"func\.func private @_run", program)) <= 3  # forward, and for the gradient forward and back


def test_dropout_draws_anew_for_each_layer_and_each_branch(monkeypatch):
    keys = []

    def spy(x, rate, key):
        keys.append((rate, tuple(np.asarray(jax.random.key_data(key)))))
        return x

    monkeypatch.setattr("osdn_jax.nn.model.dropout", spy)
    apply, parameters = parameters_of(model_config("delta_net", layers=3, dropout=0.25))
    with jax.disable_jit():  # numbers, not tracers
        apply(parameters, jnp.asarray(tokens()), dropout_key=jax.random.key(0))
    assert {rate for rate, _ in keys} == {0.25}
    assert len(set(keys)) == len(keys) == 6


# Arguments


def test_a_wrong_kind_of_token_is_refused():
    _, apply, parameters, _ = small_model("delta_net")
    with pytest.raises(TypeError, match="tokens"):
        apply(parameters, jnp.ones((1, LENGTH)))
    with pytest.raises(TypeError, match="tokens"):
        apply(parameters, jnp.ones(LENGTH, jnp.int32))


def test_statistics_of_the_preconditioners():
    """ "paper" starts at its lower bound of 0; "trust", initialised far away, is clipped to both of its bounds."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(8, size=(2, 12)), jnp.int32)

    def statistics(rule, **changes):
        mixer = mixer_config(rule, width=8, heads=2, key_dim=4, value_dim=4, **changes)
        config = ModelConfig(vocab_size=8, layers=3, mixer=mixer, mlp_dim=8)
        return CausalLM(config, rngs=nnx.Rngs(0)).preconditioners(tokens)

    paper = statistics("osdn")
    assert {name: x.shape for name, x in paper.items()} == dict.fromkeys(("mean", "min", "max", "clipped"), (3,))
    assert float(jnp.max(jnp.abs(paper["min"]))) == 0.0
    assert bool(jnp.all((paper["clipped"] >= 1 / 12) & (paper["mean"] < paper["max"])))
    free = statistics("osdn", hypergradient=HypergradientConfig(initial=1.0, bounds=None))
    assert set(free) == {"mean", "min", "max"}
    gram = statistics("pdn")
    assert bool(jnp.all((gram["min"] >= 1 / 1.5) & (gram["max"] <= 1.5)))
    with pytest.raises(ValueError, match="got a model whose rule has none"):
        statistics("delta_net")


@pytest.mark.parametrize("rule", ["os_gdn", "transformer"])
def test_arguments_that_do_not_fit_are_named(rule, our_checks):
    apply, parameters = parameters_of(model_config(rule, layers=2))
    tokens = jnp.zeros((2, 9), jnp.int32)
    _, states = apply(parameters, tokens)
    one = jax.tree.map(lambda x: x[:1] if jnp.ndim(x) else x, states)
    other_apply, other_parameters = parameters_of(
        model_config("os_gdn" if rule == "transformer" else "transformer", layers=2)
    )
    _, other = other_apply(other_parameters, tokens)
    for arguments, error, said in (
        ((tokens[0],), ValueError, r"tokens: got shape \(9,\), expected \[B, T\]"),
        ((jnp.zeros((2, 9)),), TypeError, "tokens: got dtype float32, expected an integer"),
        ((tokens, None, jnp.zeros(9, jnp.int32)), ValueError, r"segment_ids: got shape \(9,\), expected .* \(2, 9\)"),
        ((tokens, None, jnp.zeros((2, 10), jnp.int32)), ValueError, r"segment_ids: got shape \(2, 10\)"),
        ((tokens, None, jnp.zeros((1, 9), jnp.int32)), ValueError, r"segment_ids: got shape \(1, 9\)"),
        ((tokens, None, jnp.zeros((2, 9))), TypeError, "segment_ids: got dtype float32"),
        ((tokens, None, [[0] * 9] * 2), TypeError, "segment_ids: got list"),
        ((tokens, one), ValueError, "of another batch|state: got keys of shape"),
        ((tokens, states[:1]), ValueError, "states: got 1 of them, expected a tuple of 2, one per block"),
        ((tokens, states[0]), ValueError, "states: got"),
        ((tokens, other), TypeError, r"states\[0\]: got an? (MixerState|AttentionState), expected the"),
    ):
        with pytest.raises(error, match=said):
            apply(parameters, *arguments)


@pytest.mark.parametrize("mesh", [False, True])
def test_a_token_outside_the_vocabulary_is_nan(mesh, our_checks):
    """On one device and over a mesh, for every dtype: not the last row, not zeros, not the row of a truncated index."""
    apply, parameters = parameters_of(model_config("delta_net"))
    right = np.array([[1, 2, 3, 4]])
    wrong = [np.array([[1, 2, token, 4]]) for token in (-1, VOCABULARY, 2**31 - 1)]
    context = jax.set_mesh(jax.make_mesh((1, 1, 1, 1), MESH_AXES, (AxisType.Auto,) * 4)) if mesh else nullcontext()
    with context:
        run = jit(lambda tokens: apply(parameters, tokens)[0])
        want = run(jnp.asarray(right, jnp.int32))
        assert np.isfinite(want).all()
        for tokens in wrong:
            got = run(jnp.asarray(tokens, jnp.int32))
            np.testing.assert_allclose(got[:, :2], want[:, :2], rtol=1e-5)
            assert np.isnan(got[:, 2:]).all()
        assert np.isnan(apply(parameters, np.array([[1, 2, 2**32 + 3, 4]]))[0][:, 2:]).all()
        np.testing.assert_allclose(run(jnp.asarray(right, jnp.uint8)), want, rtol=1e-5)
