"""Wrong arguments of modules: every error is one line that names the argument, what came and what was expected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from osdn_jax.nn import (
    MESH_AXES,
    BlockConfig,
    CausalLM,
    DeltaMixer,
    LatentAttention,
    LatentAttentionConfig,
    MLPConfig,
    ModelConfig,
    SoftmaxAttention,
    likelihood_sums,
    mixer_config,
    split_model,
)
from osdn_jax.ops import State
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


_ROWS, _KEYS = "[B]", "[B, Hk, S, K]"
_WRONG_FIELDS = {
    DeltaMixer: [
        ({"window": None}, TypeError, ".window: got a NoneType, expected an array [B, conv_size - 1, channels]"),
        ({"window": 3}, TypeError, ".window: got dtype int32, expected floating-point [B, conv_size - 1, channels]"),
        ({"window": 1.0}, ValueError, ".window: got shape (), expected [B, conv_size - 1, channels]"),
        ({"rule": None}, TypeError, ".rule: got a NoneType, expected an ops.State"),
        ({"rule": State("a")}, TypeError, ".rule.recurrent: got a str, expected an array [B, H, K, V]"),
        (
            {"rule": State(jnp.zeros((2, 2, 4, 4), int))},
            TypeError,
            ".rule.recurrent: got dtype int32, expected floating-point [B, H, K, V]",
        ),
        ({"rule": State(jnp.zeros(2))}, ValueError, ".rule.recurrent: got shape (2,), expected [B, H, K, V]"),
        (
            {"rule": State(jnp.zeros((2, 2, 4, 4)), "a")},
            TypeError,
            ".rule.preconditioner: got a str, expected an array [B, ...]",
        ),
    ],
    SoftmaxAttention: [
        ({"position": None}, TypeError, ".position: got a NoneType, expected an array []"),
        ({"position": 1.0}, TypeError, ".position: got dtype float32, expected integer []"),
        ({"position": [1, 2]}, ValueError, ".position: got shape (2,), expected []"),
        ({"start": [0.0, 0.0]}, TypeError, f".start: got dtype float32, expected integer {_ROWS}"),
        ({"start": 0}, ValueError, f".start: got shape (), expected {_ROWS}"),
        ({"keys": 0}, TypeError, f".keys: got dtype int32, expected floating-point {_KEYS}"),
    ],
}
_WRONG_FIELDS[LatentAttention] = [
    *_WRONG_FIELDS[SoftmaxAttention][:5],
    ({"latents": 0}, TypeError, ".latents: got dtype int32, expected floating-point [B, S, R + shared_key_dim]"),
]
STATES = {
    DeltaMixer: CONFIGS[DeltaMixer],
    SoftmaxAttention: CONFIGS[SoftmaxAttention],
    LatentAttention: LatentAttentionConfig(**SIZES, rank=4, shared_key_dim=2),
}


@pytest.mark.parametrize("kind", STATES)
def test_fields_of_a_state(kind):
    """The call of a mixer, that of a model and `restart` raise the same error, before anything is computed."""
    module = kind(STATES[kind], 1, jnp.float32, rngs=nnx.Rngs(0))
    model = CausalLM(ModelConfig(8, blocks=(BlockConfig(STATES[kind], MLPConfig(8)),)), rngs=nnx.Rngs(0))
    x, (state,) = jnp.ones((2, 1, 8)), model.start_states(2)
    for changes, error, said in _WRONG_FIELDS[kind]:
        arrays = {name: y if y is None or isinstance(y, State) else jnp.asarray(y) for name, y in changes.items()}
        wrong = state._replace(**arrays)
        assert message(error, module, x, wrong) == f"state{said}"
        assert message(error, model, jnp.zeros((2, 1), jnp.int32), (wrong,)) == f"states[0]{said}"
        assert message(error, model.restart, (wrong,), jnp.ones(2, bool)) == f"states[0]{said}"


def test_a_window_without_convolution():
    module = DeltaMixer(mixer_config("osdn", **SIZES, conv_size=0), 1, jnp.float32, rngs=nnx.Rngs(0))
    _, state = module(jnp.ones((2, 1, 8)))
    wrong = state._replace(window=jnp.zeros((2, 3, 24)))
    said = "window: got shape (2, 3, 24), expected (2, 0, 0) without convolution"
    assert message(ValueError, module, jnp.ones((2, 1, 8)), wrong) == said


def stack():
    blocks = tuple(BlockConfig(config, MLPConfig(8)) for config in CONFIGS.values())
    return CausalLM(ModelConfig(8, blocks=blocks), rngs=nnx.Rngs(0))


def test_states_that_do_not_belong_to_the_model():
    model = stack()
    states, rows, tokens = model.start_states(2), jnp.asarray([True, False]), jnp.zeros((2, 1), jnp.int32)
    swapped = "states[0]: got an AttentionState, expected the MixerState of an earlier call"
    without = "states[0]: got a NoneType, expected the MixerState of an earlier call"
    for wrong, said in ((states[::-1], swapped), ((None, None), without)):
        assert message(TypeError, model.restart, wrong, rows) == said
        assert message(TypeError, model, tokens, wrong) == said
    other = CausalLM(model_config("osdn", layers=2), rngs=nnx.Rngs(0)).start_states(2)
    said = "states[0].rule.preconditioner: got shape (2, 2, 6), expected shape (2, 2, 4); the state is of another"
    assert message(ValueError, model.restart, (other[0], states[1]), rows).startswith(said)
    bare = states[0]._replace(rule=State(states[0].rule.recurrent))
    said = "states[0].rule.preconditioner: got None, expected shape (2, 2, 4); the state is of another batch or model"
    assert message(ValueError, model.restart, (bare, states[1]), rows) == said
    plain = states[0]._replace(rule=State(*states[0].rule))  # made by hand, and accepted by every rule
    assert type(model.restart((plain, states[1]), rows)[0].rule) is State


def test_rows_and_batches_that_are_none():
    model = stack()
    states = model.start_states(np.int64(2))
    for rows, came in (([True, False], "list"), (None, "NoneType")):
        said = f"rows: got {came}, expected an array of booleans [B]"
        assert message(TypeError, model.restart, states, rows) == said
    assert message(ValueError, model.start_states, 10**30) == f"batch: got {10**30}, expected an int below 2**31"
    for wrong, error, came in ((-1, ValueError, "-1"), ("a", TypeError, "'a'"), (1.5, TypeError, "1.5")):
        assert message(error, model.start_states, wrong) == f"batch: got {came}, expected an int of at least 0"


def test_tokens_and_segments_that_are_no_numbers():
    model, tokens = stack(), jnp.zeros((2, 1), jnp.int32)
    for wrong, came in (([[0], [0]], "list"), (None, "NoneType"), ("a", "str")):
        assert message(TypeError, model, wrong) == f"tokens: got {came}, expected an array [B, T]"
    texts = np.asarray([["a"], ["b"]])
    assert message(TypeError, model, texts) == "tokens: got dtype <U1, expected an array [B, T]"
    assert message(TypeError, model, tokens, None, texts) == "segment_ids: got dtype <U1, expected an array [B, T]"


def test_states_over_a_mesh():
    """Over a mesh a model returns None for each of them, which is no state to continue from."""
    model, tokens, rows = stack(), jnp.zeros((2, 1), jnp.int32), jnp.asarray([True, False])
    states = model.start_states(2)
    said = "states: got some over a mesh, expected None; decode without jax.set_mesh"
    with jax.set_mesh(jax.make_mesh((1, 1, 1, 1), MESH_AXES)):
        assert message(ValueError, model, tokens, (None, None)) == said
        assert message(ValueError, model, tokens, states) == said
        assert message(ValueError, model.restart, states, rows) == said
        assert message(ValueError, model.start_states, 2).startswith("start_states: got a call under jax.set_mesh")


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
