"""Model, schedule, optimiser and text of a configuration, and the configurations of the repository."""

import ast
import re
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from osdn_jax.nn import AttentionConfig, CausalLM, Chunks, HypergradientConfig, count_parameters, parameter_formula
from osdn_jax.training import (
    StepConfig,
    build_corpus,
    build_model,
    build_model_config,
    build_optimizer,
    build_schedule,
    build_step_config,
    default_config,
    parse_arg,
)
from osdn_jax.training.build import random_state
from osdn_jax.training.config import flatten
from support import jit
from support.runs import write_text

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))


def config_of(**changes):
    config = default_config()
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return config


# The model


def test_every_setting_of_the_model_arrives():
    made = build_model_config(
        config_of(
            model__rule="os_gdn",
            model__layers=3,
            model__width=24,
            model__heads=4,
            model__key_heads=2,
            model__key_dim=5,
            model__value_dim=7,
            model__mlp_dim=11,
            model__conv_size=3,
            model__tied_embeddings=False,
            model__dropout=0.25,
            model__dtype="bfloat16",
            model__remat="full",
            model__output_gate=False,
            model__negative_eigenvalues=True,
            model__preset="paper",
            model__forget=False,
            model__anchor=1.0,
            model__chunk_size=16,
            model__implementation="chunk",
        )
    )
    assert (made.vocab_size, made.layers, made.mlp_dim, made.dropout, made.dtype) == (256, 3, 11, 0.25, "bfloat16")
    assert (made.tied_embeddings, made.remat) == (False, "full")
    mixer = made.mixer
    assert (mixer.width, mixer.heads, mixer.key_heads, mixer.key_dim, mixer.value_dim) == (24, 4, 2, 5, 7)
    assert (mixer.conv_size, mixer.chunk_size, mixer.implementation) == (3, 16, "chunk")
    assert (mixer.output_gate, mixer.negative_eigenvalues, mixer.decay) == (False, True, "scalar")
    assert mixer.hypergradient == HypergradientConfig.preset("paper", forget=False, anchor=1.0, beta_aware=True)


def test_every_setting_of_the_preconditioners_arrives():
    options = {"eta": 0.5, "initial": 0.75, "forget_gate": "constant", "forget_constant": 0.99, "beta_aware": True}
    made = build_model_config(config_of(**{f"model__{name}": value for name, value in options.items()})).mixer
    assert made.hypergradient == HypergradientConfig(**options)
    options = {"match_step": True, "key_norm": False, "fixed_beta": 1.0}
    made = build_model_config(
        config_of(model__rule="pdn", model__squash=2.0, **{f"model__{name}": value for name, value in options.items()})
    ).mixer
    assert made.gram.squash == 2.0
    assert {name: getattr(made, name) for name in options} == options


def test_what_is_not_set_is_as_the_rule_has_it():
    made = build_model_config(config_of(model__rule="os_gdn", model__width=24, model__heads=4)).mixer
    assert (made.key_dim, made.value_dim, made.key_heads, made.output_gate) == (6, 6, None, True)
    assert made.hypergradient == HypergradientConfig.preset("trust", beta_aware=True)
    assert build_model_config(config_of(model__rule="osdn")).mixer.hypergradient == HypergradientConfig()


def test_every_setting_of_the_transformer_arrives():
    sizes = {"model__width": 24, "model__heads": 4, "model__key_heads": 2, "model__key_dim": 6, "model__value_dim": 5}
    made = build_model_config(
        config_of(
            model__rule="transformer",
            model__vocab_size=300,
            model__rotary_base=5e5,
            model__qk_norm=True,
            model__max_length=77,
            model__output_gate=True,
            model__chunk_size=16,
            **sizes,
        )
    )
    assert made.vocab_size == 300
    assert made.mixer == AttentionConfig(
        width=24,
        heads=4,
        key_heads=2,
        key_dim=6,
        value_dim=5,
        rotary_base=5e5,
        qk_norm=True,
        output_gate=True,
        max_length=77,
        chunk_size=16,
    )
    plain = build_model_config(config_of(model__rule="transformer", sequence_length=99)).mixer
    assert plain == AttentionConfig(width=128, heads=2, key_dim=64, value_dim=64, max_length=99)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__rule": "osnd"}, "rule: got 'osnd'"),
        ({"model__heads": 3}, "model.heads: got 3, expected a divisor of model.width = 128; or give model.key_dim"),
        ({"model__heads": 3, "model__key_dim": 8}, "or give model.value_dim"),
        ({"model__heads": 0}, "model.heads: got 0"),
        ({"model__key_dim": 0}, "key_dim: got 0"),
        ({"model__value_dim": 0}, "value_dim: got 0"),
        ({"model__key_heads": 3}, "key_heads: got 3"),
        ({"model__preset": "papers"}, "papers"),
        ({"model__rule": "delta_net", "model__preset": "paper"}, "model.preset: got 'paper', but the rule 'delta_net'"),
        (
            {"model__rule": "transformer", "model__preset": "paper"},
            "got 'paper', but the rule 'transformer' has no hypergradient",
        ),
        (
            {"model__rule": "transformer", "model__negative_eigenvalues": True},
            "model.negative_eigenvalues: got True, but",
        ),
        ({"model__rule": "pdn", "model__eta": 0.5}, "model.eta: got 0.5, but the rule 'pdn' has no hypergradient"),
        ({"model__rule": "delta_net", "model__forget_gate": "head"}, "model.forget_gate: got 'head', but"),
        ({"model__rule": "osdn", "model__squash": 2.0}, "model.squash: got 2.0, but the rule 'osdn' has no Gram"),
        ({"model__rule": "pdn", "model__squash": 0.0}, "model.squash: got 0.0"),
        ({"model__rule": "transformer", "model__key_norm": False}, "model.key_norm: got False, but the rule"),
        ({"model__rule": "delta_net", "model__match_step": True}, "match_step: got True with preconditioner='none'"),
        ({"model__fixed_beta": 0.0}, "model.fixed_beta: got 0.0"),
        ({"model__fixed_beta": 1.0, "model__negative_eigenvalues": True}, "fixed_beta: got 1.0 with negative"),
        ({"model__forget_constant": 1.5}, "model.forget_constant: got 1.5"),
        ({"model__forget_gate": "channel"}, "forget_gate: got 'channel', expected one of token, head, constant"),
        ({"model__rule": "transformer", "model__implementation": "scan"}, "implementation: got 'scan'"),
        ({"model__vocab_size": 0}, "vocab_size: got 0"),
        ({"model__dtype": "float16"}, "dtype: got 'float16'"),
        ({"model__remat": "most"}, "remat: got 'most'"),
        ({"model__implementation": "magic"}, "implementation: got 'magic'"),
        ({"model__chunk_size": 0}, "chunk_size: got 0"),
    ],
)
def test_a_model_that_cannot_be_is_refused_by_name(changes, said, our_checks):
    with pytest.raises(ValueError, match=said):
        build_model_config(config_of(**changes))


# The schedule and the optimiser


def test_the_schedule_warms_up_and_comes_down_along_a_cosine():
    schedule = build_schedule(config_of(steps=100, optimizer__learning_rate=2e-3, optimizer__warmup_steps=10))
    steps = np.arange(101)
    got = [float(schedule(int(step))) for step in steps]
    cosine = 0.5 * (1 + np.cos(np.pi * (steps - 10) / 90))
    want = 2e-3 * np.where(steps < 10, steps / 10, 0.1 + 0.9 * cosine)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-9)
    assert max(got) == got[10]


def test_the_schedule_may_do_without_warm_up():
    schedule = build_schedule(config_of(steps=10, optimizer__warmup_steps=0, optimizer__final_fraction=0.5))
    np.testing.assert_allclose([schedule(0), schedule(10)], [3e-3, 1.5e-3], rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 100, "optimizer__warmup_steps": 100}, "optimizer.warmup_steps: got 100, .* below steps = 100"),
        ({"optimizer__warmup_steps": -1}, "optimizer.warmup_steps: got -1"),
        ({"optimizer__learning_rate": 0.0}, "optimizer.learning_rate: got 0.0"),
        ({"optimizer__learning_rate": float("nan")}, "optimizer.learning_rate: got nan"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_by_name(changes, said):
    with pytest.raises(ValueError, match=said):
        build_schedule(config_of(**changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimizer__clip_norm": 0.0}, "optimizer.clip_norm: got 0.0, expected more than 0"),
        ({"optimizer__clip_norm": -1.0}, "optimizer.clip_norm: got -1.0"),
        ({"optimizer__beta1": 1.0}, "optimizer.beta1: got 1.0, expected from 0 to below 1"),
        ({"optimizer__beta2": -0.1}, "optimizer.beta2: got -0.1"),
        ({"optimizer__weight_decay": -0.1}, "optimizer.weight_decay: got -0.1, expected at least 0"),
        ({"optimizer__name": "sgd"}, "optimizer.name: got 'sgd', expected one of adamw, muon"),
        ({"optimizer__name": "muon", "optimizer__muon_learning_rate": 0.0}, "optimizer.muon_learning_rate: got 0.0"),
        ({"optimizer__muon_momentum": 1.0}, "optimizer.muon_momentum: got 1.0, expected from 0 to below 1"),
    ],
)
def test_an_optimiser_that_cannot_be_is_refused_by_name(changes, said):
    config = config_of(model__layers=1, model__width=8, model__mlp_dim=4, **changes)
    model = nnx.eval_shape(lambda: CausalLM(build_model_config(config), rngs=nnx.Rngs(params=0)))
    with pytest.raises(ValueError, match=said):
        build_optimizer(config, model)


def test_the_optimiser_is_adamw_behind_a_clip():
    config = config_of(
        steps=10, model__layers=1, model__width=8, model__mlp_dim=4, optimizer__warmup_steps=0, optimizer__clip_norm=0.5
    )
    model = nnx.eval_shape(lambda: build_model(config))
    optimizer = build_optimizer(config, model)
    name = "embedding/embedding"  # a matrix, so it decays
    shapes = {"/".join(map(str, path)): x.get_value().shape for path, x in nnx.to_flat_state(nnx.state(model))}
    rng = np.random.default_rng(0)
    p = {key: jnp.asarray(rng.normal(size=shape), jnp.float32) for key, shape in shapes.items()}
    state, advance = optimizer.init(p), jit(optimizer.update)
    value, m, v = np.asarray(p[name], np.float64), 0.0, 0.0
    schedule = build_schedule(config)
    for step in (1, 2, 3):
        g = {key: jnp.asarray(rng.normal(size=shape), jnp.float32) for key, shape in shapes.items()}
        norm = np.sqrt(sum(np.sum(np.asarray(x, np.float64) ** 2) for x in g.values()))
        assert norm > 0.5
        with jax.numpy_dtype_promotion("standard"):
            update, state = advance(g, state, p)
        p = jax.tree.map(jnp.add, p, update)
        clipped = np.asarray(g[name], np.float64) * 0.5 / norm
        m, v = 0.9 * m + 0.1 * clipped, 0.95 * v + 0.05 * clipped**2
        direction = m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.95**step)) + 1e-8)
        value = value - float(schedule(step - 1)) * (direction + 0.1 * value)
        np.testing.assert_allclose(p[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", ["os_kda", "gdn2", "pgdn"])
def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest(rule):
    config = config_of(
        steps=10,
        model__rule=rule,
        model__layers=1,
        model__width=8,
        model__mlp_dim=4,
        model__tied_embeddings=False,
        optimizer__warmup_steps=0,
        optimizer__clip_norm=1e9,
        optimizer__muon_learning_rate=0.5,
        optimizer__muon_momentum=0.0,
    )
    model = nnx.eval_shape(lambda: build_model(config))
    rng = np.random.default_rng(0)
    shapes = {"/".join(map(str, path)): x.get_value().shape for path, x in nnx.to_flat_state(nnx.state(model))}
    p, g = ({name: jnp.asarray(rng.normal(size=x), jnp.float32) for name, x in shapes.items()} for _ in range(2))

    def update_by(name):
        config.optimizer.name = name
        optimizer = build_optimizer(config, model)
        with jax.numpy_dtype_promotion("standard"):
            update, state = jit(lambda: optimizer.update(g, optimizer.init(p), p))()
        assert all(isinstance(x, jax.Array) and x.size for x in jax.tree.leaves(state))  # a checkpoint can hold it
        return update

    muon, adamw = update_by("muon"), update_by("adamw")
    different = {name for name in p if not np.allclose(muon[name], adamw[name], rtol=1e-5)}
    matrices = ("mixer/project/kernel", "mixer/output/kernel", "mixer/gate/kernel", "gate_and_up/kernel")
    assert different == {name for name in p if name.endswith((*matrices, "mlp/down/kernel"))}
    for name in different:
        rows, columns = p[name].shape
        step = -(np.asarray(muon[name]) / 0.5 + 0.1 * np.asarray(p[name]))
        singular = np.linalg.svd(step, compute_uv=False) / max(1, columns / rows) ** 0.5
        assert 0.5 < singular.min() <= singular.max() < 1.5  # equal in all directions, whatever the gradient
        assert np.vdot(step, g[name]) > 0


# The settings of a step


def test_every_setting_of_the_step_arrives():
    made = build_step_config(
        config_of(
            batch_size=6,
            accumulate=3,
            ema=0.5,
            loss__sequence_chunk=7,
            loss__vocabulary_chunk=9,
            loss__z_loss=1e-4,
        )
    )
    assert made == StepConfig(accumulate=3, chunks=Chunks(7, 9), z_loss=1e-4, ema=0.5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"accumulate": 0}, "accumulate: got 0, expected at least 1"),
        ({"accumulate": 3}, "accumulate: got 3, expected a divisor of batch_size = 16"),
        ({"ema": 1.0}, "ema: got 1.0, expected from 0 to below 1"),
        ({"ema": -0.5}, "ema: got -0.5"),
        ({"loss__sequence_chunk": 0}, "loss.sequence_chunk: got 0, expected at least 1"),
        ({"loss__vocabulary_chunk": -1}, "loss.vocabulary_chunk: got -1"),
        ({"loss__z_loss": -1.0}, "loss.z_loss: got -1.0, expected a number of at least 0"),
        ({"loss__z_loss": float("nan")}, "loss.z_loss: got nan"),
    ],
)
def test_a_step_that_cannot_be_is_refused_by_name(changes, said):
    with pytest.raises(ValueError, match=said):
        build_step_config(config_of(**changes))


# Text and random numbers


def test_text_of_ones_own_is_split_and_shakespeare_has_held_out_plays(tmp_path):
    path = write_text(tmp_path / "mine.txt")
    train, validation = build_corpus(config_of(data__path=str(path), data__validation_fraction=0.25))
    whole = path.read_bytes()
    assert b"".join(d.text for d in train + validation) == whole
    assert 0.2 < sum(len(d.text) for d in validation) / len(whole) < 0.3
    train, validation = build_corpus(config_of())
    assert (len(train), len(validation)) == (38, 4)
    assert "winters_tale" in {document.name for document in validation}


def test_random_numbers_go_by_the_seed():
    a, same, b = (np.asarray(random_state(config_of(seed=seed))) for seed in (0, 0, 1))
    assert a.dtype == np.uint32
    np.testing.assert_array_equal(a, same)
    assert not np.array_equal(a, b)


# The configurations of the repository


def test_there_are_configurations():
    assert "demo.py" in {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configuration_loads_builds_and_names_its_command(path):
    config = runpy.run_path(str(path))["get_config"]()
    assert flatten(config).keys() == flatten(default_config()).keys()
    if path.stem == "finetune":  # which needs a folder: tests/training/test_starting_point.py
        config.data.tokenizer = "bytes"
    model = nnx.eval_shape(lambda: build_model(config))
    assert count_parameters(model) == parameter_formula(build_model_config(config))
    build_schedule(config)
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert re.search(rf"make demo|python train\.py --config=configs/{path.name}", docstring)


def test_the_demo_compares_two_models_of_about_one_size():
    get_config = runpy.run_path(str(CONFIGS[0].parent / "demo.py"))["get_config"]
    sizes = [parameter_formula(build_model_config(get_config(f"rule={rule}"))) for rule in ("osdn", "delta_net")]
    assert 1 < sizes[0] / sizes[1] < 1.01
    assert (get_config("seed=3").seed, get_config("steps=7").steps) == (3, 7)
    assert parse_arg("rule=kda", rule="osdn").rule == get_config("rule=kda").model.rule
