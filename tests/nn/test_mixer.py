"""Inputs that the mixer gives to its rule, and its output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from osdn_jax import ops
from osdn_jax.nn import ChannelGate, DeltaMixer, SoftmaxAttention, SwiGLU, mixer_config
from osdn_jax.nn import mixer as module
from osdn_jax.ops import State, delta_rule, delta_rule_operator
from support import relative_error
from support.models import SHAPES

B, T = 2, 7


@pytest.fixture
def spy(monkeypatch):
    """Calls a mixer with an operator of the test's own; returns the output and what the operator was given."""

    def call(rule, output, **changes):
        mixer = DeltaMixer(mixer_config(rule, **SHAPES | changes), 1, jnp.dtype("float32"), rngs=nnx.Rngs(params=0))
        seen = {}

        def operator(q, k, v, **arguments):
            preconditioner = arguments.pop("preconditioner", None)
            own = {} if preconditioner is None else preconditioner._asdict()
            seen.update(arguments, q=q, k=k, v=v, preconditioner=own)
            return output, State(jnp.zeros(()))

        monkeypatch.setattr(module, "preconditioned_delta_rule", operator)
        monkeypatch.setattr(ops, "gdn2", operator)
        x = jnp.asarray(np.random.default_rng(1).normal(size=(B, T, mixer.config.width)), jnp.float32)
        return mixer(x)[0], seen

    return call


@pytest.fixture
def output():
    return jnp.asarray(np.random.default_rng(0).normal(size=(B, T, SHAPES["heads"], SHAPES["value_dim"])), jnp.float32)


def test_queries_and_keys_have_unit_length(spy, output):
    _, seen = spy("delta_net", output)
    q, k, v, beta = (seen[name] for name in ("q", "k", "v", "beta"))
    assert q.shape == k.shape == (B, T, 2, 6)
    assert v.shape == (B, T, 4, 5)
    for x in (q, k):
        np.testing.assert_allclose(np.linalg.norm(x, axis=-1), 1.0, atol=1e-3)
    assert np.ptp(np.linalg.norm(v, axis=-1)) > 0.1
    assert not np.allclose(q, k)
    assert (beta > 0).all()
    assert (beta < 1).all()


def test_negative_eigenvalues_double_beta(spy, output):
    _, once = spy("delta_net", output)
    _, twice = spy("delta_net", output, negative_eigenvalues=True)
    np.testing.assert_allclose(twice["beta"], 2 * once["beta"], rtol=1e-6)


def test_gates_per_channel_take_the_place_of_beta(spy, output):
    _, seen = spy("gdn2", output)
    k, v, erase, write, decay = (seen[name] for name in ("k", "v", "erase_gate", "write_gate", "log_decay"))
    assert erase.shape == k.shape == (B, T, 2, 6)
    assert write.shape == v.shape == (B, T, 4, 5)
    assert decay.shape == (B, T, 4, 6)
    for gate in (erase, write):  # around 1/2 at first, and no two channels alike
        assert 0.3 < gate.mean() < 0.7
        assert 0 < gate.min() < 0.3
        assert 0.7 < gate.max() < 1
        assert np.ptp(gate, axis=-1).min() > 0.05
    _, wide = spy("gdn2", output, negative_eigenvalues=True)
    np.testing.assert_allclose(wide["erase_gate"], 2 * erase, rtol=1e-6)
    np.testing.assert_array_equal(wide["write_gate"], write)  # what is written has no part in the eigenvalues


def test_gates_per_channel_are_float32_in_16_bits():
    gate = ChannelGate(12, 2, 6, jnp.dtype("bfloat16"), rngs=nnx.Rngs(params=0))
    assert gate(jnp.ones((B, T, 12), jnp.bfloat16)).dtype == jnp.float32


def test_the_output_is_normalised_per_head(spy, output):
    plain, _ = spy("delta_net", output)
    per_head = jnp.asarray([1.0, 7.0, 0.3, 100.0])[None, None, :, None]
    assert relative_error(spy("delta_net", output * per_head)[0], plain) < 1e-4
    assert relative_error(spy("delta_net", output.at[..., 0].multiply(7.0))[0], plain) > 0.1


def test_the_rule_gets_the_options_of_the_config(spy, output):
    _, seen = spy("os_gdn", output, chunk_size=3, implementation="scan")
    assert (seen["chunk_size"], seen["implementation"]) == (3, "scan")
    own = seen["preconditioner"]
    assert (own["eta"], own["bounds"], own["anchor"]) == (0.003, (2 / 3, 3 / 2), 1.0)
    assert own["beta_aware"] is True
    np.testing.assert_array_equal(own["initial"], jnp.ones((4, 6)))
    assert own["log_forget"].shape == (B, T, 4)
    _, seen = spy("pkda", output)
    own = seen["preconditioner"]
    assert own["squash"] == 1.5
    np.testing.assert_array_equal(own["center"], np.full(2, -0.2, np.float32))
    assert seen["log_decay"].shape == (B, T, 4, 6)
    assert own["log_decay"].shape == own["gain"].shape == (B, T, 2)


def test_the_output_gate_is_a_silu_of_the_input(spy, output):
    mixer = DeltaMixer(
        mixer_config("delta_net", **SHAPES, output_gate=True), 1, jnp.dtype("float32"), rngs=nnx.Rngs(params=0)
    )
    x = jnp.asarray(np.random.default_rng(2).normal(size=(B, T, SHAPES["width"])), jnp.float32)
    closed = nnx.clone(mixer)
    closed.gate.kernel[...] = jnp.zeros_like(closed.gate.kernel[...])
    np.testing.assert_array_equal(closed(x)[0], 0.0)  # silu(0) = 0
    assert np.abs(mixer(x)[0]).max() > 0.01


def test_a_state_of_another_batch_is_refused():
    mixer = DeltaMixer(mixer_config("delta_net", **SHAPES), 1, jnp.dtype("float32"), rngs=nnx.Rngs(params=0))
    _, state = mixer(jnp.ones((1, 3, SHAPES["width"])))
    assert isinstance(state, module.MixerState)
    with pytest.raises(TypeError):
        mixer(jnp.ones((2, 1, SHAPES["width"])), state)
    assert jax.tree.map(jnp.shape, state).rule.recurrent == (1, 4, 6, 5)


@pytest.mark.parametrize("rule", ["osdn", "os_kda", "pgdn"])
def test_multipliers_are_those_of_the_write_keys(rule, monkeypatch):
    """`multipliers` returns the factors that the rule writes with, also with shared key heads and packed documents."""
    config = mixer_config(rule, width=8, heads=4, key_heads=2, key_dim=4, value_dim=3)
    mixer = DeltaMixer(config, 1, jnp.dtype("float32"), rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 9, 8)), jnp.float32)
    ids = jnp.asarray([[0] * 9, [0] * 4 + [1] * 5], jnp.int32)
    seen = {}

    def spied(q, k, *arguments, **options):
        seen.update(k=k, write_key=options["write_key"])
        return delta_rule(q, k, *arguments, **options)

    monkeypatch.setattr(delta_rule_operator, "delta_rule", spied)
    mixer(x, None, ids)
    d = mixer.multipliers(x, ids)
    assert float(jnp.std(d)) > 1e-4
    k = jnp.repeat(seen["k"], d.shape[2] // seen["k"].shape[2], axis=2)
    np.testing.assert_allclose(d * k, seen["write_key"], rtol=1e-5, atol=1e-6)


def test_multipliers_need_a_preconditioner():
    config = mixer_config("kda", width=8, heads=2, key_dim=4, value_dim=4)
    mixer = DeltaMixer(config, 1, jnp.dtype("float32"), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="multipliers: got a mixer with preconditioner='none'"):
        mixer.multipliers(jnp.ones((1, 2, 8)))


@pytest.mark.parametrize("dtype", [jnp.float32, "float32", np.float32, jnp.dtype("float32")])
def test_every_form_of_a_dtype_is_accepted(dtype):
    config = mixer_config("delta_net", width=8, heads=2, key_dim=4, value_dim=4)
    mixer = DeltaMixer(config, 1, dtype, rngs=nnx.Rngs(0))
    assert mixer.dtype == jnp.dtype("float32")
    assert mixer(jnp.ones((1, 2, 8), jnp.float32))[0].dtype == jnp.float32


@pytest.mark.usefixtures("our_checks")
@pytest.mark.parametrize("dtype", ["float31", jnp.int32, None])
@pytest.mark.parametrize("module", ["mixer", "attention", "MLP"])
def test_other_types_are_refused(module, dtype):
    sizes = {"width": 8, "heads": 2, "key_dim": 4, "value_dim": 4}
    make = {
        "mixer": lambda: DeltaMixer(mixer_config("delta_net", **sizes), 1, dtype, rngs=nnx.Rngs(0)),
        "attention": lambda: SoftmaxAttention(mixer_config("transformer", **sizes), 1, dtype, rngs=nnx.Rngs(0)),
        "MLP": lambda: SwiGLU(8, 16, 1, dtype, rngs=nnx.Rngs(0)),
    }
    with pytest.raises(TypeError, match=r"dtype: got .*, expected a floating-point type such as jnp\.float32"):
        make[module]()
