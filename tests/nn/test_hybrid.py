"""Stacks of different blocks: parts equal the whole, documents, restarts, bfloat16 parameters, other configurations."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from osdn_jax.nn import (
    AttentionConfig,
    BlockConfig,
    CausalLM,
    GramConfig,
    LatentAttentionConfig,
    MixtureConfig,
    MLPConfig,
    ModelConfig,
    count_parameters,
    mixer_config,
    parameter_formula,
    parameter_spec,
)
from osdn_jax.nn.flops import per_token
from support import jit, relative_error
from support.models import parameters_of

B, T, V = 2, 24, 17
SHAPES = {"width": 12, "heads": 4, "key_heads": 2, "key_dim": 6, "value_dim": 5}
KDA = mixer_config(
    "kda",
    **SHAPES,
    decay_rank=3,
    decay_bound=-5.0,
    output_gate_rank=3,
    output_gate_bias=True,
    output_gate_activation="sigmoid",
    beta_per_key_head=True,
    decay_scale=True,
)
SUMS = mixer_config("gated_delta_net", **SHAPES, preconditioner="squares")
NEITHER = mixer_config(
    "pgdn", **SHAPES, conv_size=0, preconditioner_per_value_head=True, gram=GramConfig(learned_squash=True)
)
ATTENTION = mixer_config(
    "transformer", **SHAPES, rotary_dim=4, window=7, qk_norm=True, qk_norm_offset=1.0, qkv_bias=True, max_length=T
)
UNPOSITIONED = AttentionConfig(**SHAPES, rotary_base=None, qk_norm=True, qk_norm_over="all", max_length=T)
LATENT = LatentAttentionConfig(width=12, heads=4, key_dim=4, value_dim=5, rank=6, shared_key_dim=2, max_length=T)
MIXTURE = MixtureConfig(experts=4, active=2, hidden=6, shared_hidden=6, shared_gate=True)
SIGMOID = MixtureConfig(experts=4, active=2, hidden=6, router="sigmoid", groups=2, active_groups=1, scale=2.0)
STACK = ModelConfig(
    vocab_size=V,
    norm_offset=1.0,
    blocks=(
        BlockConfig(KDA, MLPConfig(10)),
        BlockConfig(NEITHER, MIXTURE),
        BlockConfig(ATTENTION, MLPConfig(10, "powlu"), "post"),
        BlockConfig(UNPOSITIONED, SIGMOID),
        BlockConfig(LATENT, MIXTURE),
        BlockConfig(SUMS, MLPConfig(10)),
    ),
)
IDS = np.stack([np.repeat([1, 2, 3], (5, 1, 18)), np.repeat([4, 9], (13, 11))]).astype(np.int32)


def tokens(seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(V, size=(B, T)), jnp.int32)


def read(apply, parameters, ids, parts, states=None, segment_ids=None):
    outputs, at = [], 0
    for size in parts:
        part = slice(at, at + size)
        known = None if segment_ids is None else segment_ids[:, part]
        out, states = apply(parameters, ids[:, part], states, known)
        outputs.append(out)
        at += size
    return jnp.concatenate(outputs, axis=1), states


@pytest.mark.parametrize("parts", [(1,) * T, (5, 1, 2, 16), (23, 1)])
def test_parts_equal_the_whole(parts):
    apply, parameters = parameters_of(STACK)
    whole, _ = jit(apply)(parameters, tokens())
    parted, _ = read(jit(apply), parameters, tokens(), parts)
    assert relative_error(parted, whole) < 1e-5


def test_a_packed_document_is_computed_by_itself():
    apply, parameters = parameters_of(STACK)
    packed, _ = jit(apply)(parameters, tokens(), None, IDS)
    alone, _ = jit(apply)(parameters, tokens()[1:, 13:])
    assert relative_error(packed[1:, 13:], alone) < 1e-5


def test_padding_on_the_left_is_another_document():
    apply, parameters = parameters_of(STACK)
    ids = jnp.pad(tokens(), ((0, 0), (3, 0)))
    real = jnp.pad(jnp.ones((B, T), jnp.int32), ((0, 0), (3, 0)))
    first, states = jit(apply)(parameters, ids[:, :20], None, real[:, :20])
    rest, _ = jit(apply)(parameters, ids[:, 20:], states)
    whole, _ = jit(apply)(parameters, tokens())
    assert relative_error(jnp.concatenate([first[:, 3:], rest], axis=1), whole) < 1e-5


def test_rows_restart():
    model = CausalLM(STACK, rngs=nnx.Rngs(0))
    _, states = model(tokens()[:, :9])
    states = model.restart(states, jnp.asarray([True, False]))
    got, _ = model(tokens()[:, 9:], states)
    fresh, _ = model(tokens()[:, 9:])
    continued, _ = model(tokens())
    assert relative_error(got[0], fresh[0]) < 1e-5
    assert relative_error(got[1], continued[1, 9:]) < 1e-5
    with pytest.raises(ValueError, match="states: got 2 of them, expected a tuple of 6"):
        model.restart(states[:2], jnp.asarray([True, False]))
    with pytest.raises(ValueError, match=r"rows: got shape \(1,\), expected \(2,\)"):
        model.restart(states, jnp.asarray([True]))


@pytest.mark.usefixtures("our_checks")
def test_rows_that_restart_are_booleans():
    model = CausalLM(STACK, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="rows: got int32, expected booleans"):
        model.restart(model.start_states(B), jnp.zeros(B, jnp.int32))


def test_start_states_continue_like_none():
    model = CausalLM(STACK, rngs=nnx.Rngs(0))
    got, _ = model(tokens(), model.start_states(B))
    assert relative_error(got, model(tokens())[0]) < 1e-5


def test_every_parameter_is_counted_has_a_partition_and_a_gradient():
    model = CausalLM(STACK, rngs=nnx.Rngs(0))
    assert count_parameters(model) == parameter_formula(STACK)
    apply, parameters = parameters_of(STACK)
    assert all(len(parameter_spec(name)) == x.ndim for name, x in parameters.items())
    gradient = jit(jax.grad(lambda p: apply(p, tokens())[0][..., 0].sum()))(parameters)
    without = {name for name, g in gradient.items() if not np.any(np.asarray(g))}
    assert without == {"blocks/3/mlp/router_bias"}


def test_flops_count_the_experts_that_are_used():
    _, parameters = parameters_of(STACK)
    more = dataclasses.replace(MIXTURE, active=3)
    wider = dataclasses.replace(
        STACK, blocks=tuple(dataclasses.replace(b, mlp=more) if b.mlp == MIXTURE else b for b in STACK.blocks)
    )
    flops = [per_token(config, parameters, T).matrices for config in (STACK, wider)]
    assert flops[1] - flops[0] == 2 * 2 * 3 * 12 * 6
    # 7 tokens at most in the window, and 1 to 6 at the start; (T + 1) / 2 on average without one
    mixing = sum((6 * 4 * 6 * 5) for _ in range(3)) + 2 * (28 + 17 * 7) / T * 44 + 25 * 44 + 25 * 4 * 11
    assert per_token(STACK, parameters, T).mixing == pytest.approx(mixing)


def test_bfloat16_parameters_are_computed_with_like_rounded_float32_ones():
    apply, parameters = parameters_of(STACK)
    rounded = {name: x.astype(jnp.bfloat16) for name, x in parameters.items()}
    wide = {name: x.astype(jnp.float32) for name, x in rounded.items()}
    got, want = (jit(apply)(p, tokens())[0] for p in (rounded, wide))
    assert relative_error(got, want) < 1e-6


def test_another_configuration_with_the_same_parameters():
    model = CausalLM(STACK, rngs=nnx.Rngs(0))
    model.origin = "a folder"
    longer = tuple(
        block
        if "max_length" not in vars(block.mixer)
        else dataclasses.replace(block, mixer=dataclasses.replace(block.mixer, max_length=99))
        for block in STACK.blocks
    )
    other = model.with_config(dataclasses.replace(STACK, blocks=longer))
    assert other.origin == "a folder"
    np.testing.assert_array_equal(other(tokens())[0], model(tokens())[0])
    assert other.start_states(1)[3].keys.shape[2] == 99
    assert other.start_states(1)[2].keys.shape[2] == 7  # the window
    with pytest.raises(ValueError, match=r"config: got one whose model has .* \(2 parameters differ\)"):
        model.with_config(dataclasses.replace(STACK, vocab_size=V + 1))


def test_a_configuration_survives_json():
    for config in (STACK, ModelConfig(vocab_size=V, layers=2, mixer=mixer_config("os_gdn", **SHAPES), mlp_dim=10)):
        written = json.loads(json.dumps(dataclasses.asdict(config)))
        assert ModelConfig.from_dict(written) == config
    with pytest.raises(TypeError, match="mixer: got a dict with the keys heads, hat, expected those of a MixerConfig"):
        ModelConfig.from_dict({"vocab_size": V, "mixer": {"heads": 1, "hat": 2}})


def test_the_stack_of_a_uniform_model():
    mixer = mixer_config("osdn", **SHAPES)
    config = ModelConfig(vocab_size=V, layers=3, mixer=mixer, mlp_dim=10)
    assert config.stack == (BlockConfig(mixer, MLPConfig(10)),) * 3
    assert config.is_uniform
    assert not STACK.is_uniform
    same = ModelConfig(vocab_size=V, blocks=config.stack)
    got, want = (CausalLM(c, rngs=nnx.Rngs(0))(tokens())[0] for c in (same, config))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"layers": 4}, ValueError, "layers: got 4 with 6 blocks"),
        ({"mlp_dim": 4}, ValueError, "blocks: got some in addition to mixer or mlp_dim"),
        ({"blocks": ()}, TypeError, r"blocks: got \(\), expected a tuple"),
        ({"blocks": (KDA,)}, TypeError, "blocks: got MixerConfig at 0, expected a BlockConfig"),
        ({"blocks": None, "layers": None}, ValueError, "layers: got None"),
        ({"norm_offset": "1"}, TypeError, "norm_offset"),
    ],
)
@pytest.mark.usefixtures("our_checks")
def test_a_stack_names_what_is_wrong(changes, error, said):
    with pytest.raises(error, match=said):
        dataclasses.replace(STACK, **changes)


@pytest.mark.usefixtures("our_checks")
def test_blocks_of_another_width_are_refused():
    wide = BlockConfig(dataclasses.replace(KDA, width=16), MLPConfig(10))
    with pytest.raises(ValueError, match="blocks: got width 16 at 1, expected that of block 0, 12"):
        ModelConfig(vocab_size=V, blocks=(STACK.blocks[0], wide))
    with pytest.raises(ValueError, match="norm: got 'middle'"):
        BlockConfig(KDA, MLPConfig(10), "middle")
