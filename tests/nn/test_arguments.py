"""Wrong arguments of modules: every error is one line that names the argument, what came and what was expected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from osdn_jax.nn import CausalLM, DeltaMixer, SoftmaxAttention, likelihood_sums, mixer_config, split_model
from support.models import model_config

SIZES = {"width": 8, "heads": 2, "key_dim": 4, "value_dim": 4}
CONFIGS = {DeltaMixer: mixer_config("osdn", **SIZES), SoftmaxAttention: mixer_config("transformer", **SIZES)}

pytestmark = pytest.mark.usefixtures("our_checks")
mixers = pytest.mark.parametrize("kind", CONFIGS)


def message(error, call, *args, **kwargs):
    with pytest.raises(error) as raised:
        call(*args, **kwargs)
    text = str(raised.value)
    assert "\n" not in text
    return text


def mixer(kind):
    return kind(CONFIGS[kind], 1, jnp.float32, rngs=nnx.Rngs(0))


@mixers
def test_inputs_of_a_mixer_that_do_not_fit(kind):
    def refused(error, x):
        traced = message(error, jax.eval_shape, module, x) if isinstance(x, jax.Array) else None
        text = message(error, module, x)
        assert traced in (text, None)
        return text

    module = mixer(kind)
    assert refused(ValueError, jnp.ones((2, 3, 9))) == "x: got shape (2, 3, 9), expected [B, T, width] with width 8"
    assert refused(ValueError, jnp.ones((3, 8))) == "x: got shape (3, 8), expected [B, T, width]"
    assert refused(TypeError, jnp.ones((2, 3, 8), int)) == (
        "x: got dtype int32, expected a floating-point [B, T, width]"
    )
    assert refused(TypeError, [[[1.0] * 8]]) == "x: got list, expected an array [B, T, width]"


@mixers
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, np.float32])
def test_floating_point_inputs_are_accepted(kind, dtype):
    y, _ = mixer(kind)(np.ones((1, 2, 8), dtype))
    assert y.shape == (1, 2, 8)
    assert y.dtype == jnp.float32


@mixers
def test_a_state_that_is_an_array(kind):
    module, x = mixer(kind), jnp.ones((1, 2, 8))
    for text in (message(TypeError, module, x, x), message(TypeError, jax.eval_shape, module, x, x)):
        assert text.startswith("state: got an Array, expected the ")


@mixers
def test_configurations_of_another_type(kind):
    (other,) = (config for module, config in CONFIGS.items() if module is not kind)
    for config in (other, "osdn", SIZES, None):
        expected = f"config: got {type(config).__name__}, expected a {type(CONFIGS[kind]).__name__}"
        assert message(TypeError, kind, config, 1, jnp.float32, rngs=nnx.Rngs(0)) == expected


@mixers
@pytest.mark.parametrize(
    ("layers", "error", "came"),
    [(0, ValueError, "0"), (-1, ValueError, "-1"), (1.5, TypeError, "1.5"), ("2", TypeError, "'2'")],
)
def test_numbers_of_layers_that_are_refused(kind, layers, error, came):
    expected = f"layers: got {came}, expected an int of at least 1"
    assert message(error, kind, CONFIGS[kind], layers, jnp.float32, rngs=nnx.Rngs(0)) == expected


@pytest.mark.parametrize("kind", [*CONFIGS, CausalLM])
def test_random_streams_of_another_type(kind):
    made = {CausalLM: lambda rngs: CausalLM(model_config("osdn"), rngs=rngs)}.get(
        kind, lambda rngs: kind(CONFIGS[kind], 1, jnp.float32, rngs=rngs)
    )
    assert message(TypeError, made, 0) == "rngs: got int, expected an nnx.Rngs"
    assert message(TypeError, made, jax.random.key(0)) == "rngs: got Array, expected an nnx.Rngs"


@pytest.mark.parametrize("config", [CONFIGS[DeltaMixer], "osdn", {"vocab_size": 3}])
def test_models_of_another_configuration(config):
    expected = f"config: got {type(config).__name__}, expected a ModelConfig"
    assert message(TypeError, CausalLM, config, rngs=nnx.Rngs(0)) == expected


def test_batches_that_do_not_fit():
    apply, parameters = split_model(CausalLM(model_config("osdn"), rngs=nnx.Rngs(0)))
    tokens = jnp.zeros((2, 4), jnp.int32)
    batch = {"inputs": tokens, "targets": tokens, "segment_ids": tokens, "weights": jnp.ones((2, 4))}

    def refused(error, batch):
        return message(error, likelihood_sums, apply, parameters, batch)

    lists = batch | {"targets": [[0] * 4] * 2, "weights": [[1.0] * 4] * 2}
    assert likelihood_sums(apply, parameters, lists).targets == 8
    without = {name: x for name, x in batch.items() if name != "weights"}
    expected = "inputs, targets, segment_ids, weights"
    assert refused(ValueError, without) == f"batch: got the keys inputs, targets, segment_ids, expected {expected}"
    assert refused(TypeError, tokens) == f"batch: got Array, expected a dict with the keys {expected}"
    for name in ("targets", "weights"):
        said = f"batch: got {name} of shape (2, 3), expected (2, 4) like the inputs"
        assert refused(ValueError, batch | {name: batch[name][:, :3]}) == said
