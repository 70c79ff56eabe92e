"""The papers' language models: sizes, recipes and programs, without an array."""

import ast
import re
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from osdn_jax.nn import AttentionConfig, MixtureConfig, count_parameters, parameter_formula
from osdn_jax.training import ConfigError, build_model, build_model_config, build_schedule

FOLDER = Path(__file__).parents[2] / "configs"
RULES = ("delta_net", "osdn", "gated_delta_net", "os_gdn", "kda", "os_kda", "pdn", "pgdn", "pkda", "transformer")
OF_PRECONDITIONED_DELTANET = {"pdn", "pgdn", "pkda"}
# (at least, at most, width, heads)
SIZES = {"lm_340m": (340e6, 350e6, 1024, 8), "lm_1b": (1.3e9, 1.4e9, 2048, 16)}

every_size = pytest.mark.parametrize("name", SIZES)


def get_config(name, arg=None):
    return runpy.run_path(str(FOLDER / f"{name}.py"))["get_config"](arg)


def stated(name):
    """Return {rule: parameters} from the table in the file's docstring."""
    docstring = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text()))
    rows = re.findall(r"^ +(\w+) +([\d,]+)$", docstring, flags=re.MULTILINE)
    return {rule: int(count.replace(",", "")) for rule, count in rows}


@every_size
def test_every_rule_of_the_papers_is_in_the_table(name):
    assert tuple(stated(name)) == RULES


@pytest.mark.parametrize("rule", RULES)
@every_size
def test_a_model_has_the_size_that_is_stated(name, rule):
    config = get_config(name, f"rule={rule}")
    low, high, width, heads = SIZES[name]
    made = build_model_config(config)
    assert parameter_formula(made) == stated(name)[rule]
    assert low <= stated(name)[rule] <= high
    mixer = made.mixer
    assert (made.vocab_size, made.layers, made.dtype) == (32_000, 24, "bfloat16")
    assert (mixer.width, mixer.heads, mixer.num_key_heads, mixer.key_dim, mixer.value_dim) == (
        width,
        heads,
        heads,
        128,
        128,
    )
    assert isinstance(mixer, AttentionConfig) == (rule == "transformer")
    assert config.batch_size * config.sequence_length == 524_288
    billions = 15 if name == "lm_340m" else 50 if rule in OF_PRECONDITIONED_DELTANET else 100
    assert config.steps == billions * 10**9 // 524_288
    build_schedule(config)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
@every_size
def test_a_model_holds_what_is_stated_and_can_be_traced(name, rule):
    config = get_config(name, f"rule={rule}")
    assert count_parameters(nnx.eval_shape(lambda: build_model(config))) == stated(name)[rule]
    config.model.layers = 2  # tracing is slow, and all layers are the same
    model = nnx.eval_shape(lambda: build_model(config))

    def forward(model, tokens):
        with jax.numpy_dtype_promotion("standard"):  # Flax's RMSNorm needs it in 16 bits
            return model(tokens, segment_ids=tokens)[0]

    tokens = jax.ShapeDtypeStruct((2, config.sequence_length), jnp.int32)
    logits = nnx.eval_shape(forward, model, tokens)
    assert (logits.shape, logits.dtype) == ((2, config.sequence_length, 32_000), jnp.float32)


@pytest.mark.parametrize("rule", RULES)
def test_recipes_are_those_of_the_papers(rule):
    config = get_config("lm_340m", f"rule={rule}")
    got = (config.data.path, config.sequence_length, config.optimizer.learning_rate, config.optimizer.weight_decay)
    if rule in OF_PRECONDITIONED_DELTANET:
        assert got == ("hf:gmongaras/SlimPajama-627B_Reupload", 2048, 4e-4, 0.01)
    else:
        assert got == ("hf:HuggingFaceFW/fineweb-edu", 4096, 1e-3, 0.1)
    settings = config.optimizer
    assert (settings.beta1, settings.beta2, settings.clip_norm, settings.warmup_steps) == (0.9, 0.95, 1.0, 1024)


@every_size
def test_rules_can_be_compared_on_one_recipe(name):
    configs = [get_config(name, f"rule={rule},data=slimpajama") for rule in RULES]
    for config in configs:
        config.model.rule = "osdn"
    assert all(config == configs[0] for config in configs)
    assert configs[0] != get_config(name)


@pytest.mark.parametrize("rule", ["kda", "os_kda", "pkda"])
def test_a_gate_of_low_rank_as_in_preconditioned_deltanet(rule):
    config = get_config("lm_340m", f"rule={rule},gate=low_rank")
    count = parameter_formula(build_model_config(config))
    assert f"{rule} {count:,}" in (FOLDER / "lm_340m.py").read_text()
    assert count - stated("lm_340m")[rule] == 24 * (2 * 1024 * 128 + 1024)
    with pytest.raises(ConfigError, match="gate: got 'wide', expected one of none, low_rank, full"):
        get_config("lm_340m", "gate=wide")


@pytest.mark.parametrize("rule", ["delta_net", "gated_delta_net", "kda", "os_gdn", "pgdn"])
@pytest.mark.parametrize("pattern", ["pre", "olmo"])
def test_hybrids_have_three_delta_rules_to_one_attention(rule, pattern):
    made = build_model_config(get_config("hybrid_340m", f"rule={rule},pattern={pattern}"))
    kinds = [isinstance(block.mixer, AttentionConfig) for block in made.stack]
    assert kinds == [False, False, False, True] * 6
    assert {block.norm for block in made.stack[3::4]} == {"pre" if pattern == "pre" else "post"}
    docstring = ast.get_docstring(ast.parse((FOLDER / "hybrid_340m.py").read_text()))
    row = re.search(rf"^ +{rule} +([\d,]+) +([\d,]+)$", docstring, flags=re.MULTILINE)
    assert row.group(1 if pattern == "pre" else 2) == f"{parameter_formula(made):,}"


def test_a_hybrid_with_experts():
    made = build_model_config(get_config("hybrid_340m", "experts=32"))
    assert all(block.mlp == MixtureConfig(experts=32, active=4, hidden=704) for block in made.stack)
    assert f"{parameter_formula(made):,} parameters" in (FOLDER / "hybrid_340m.py").read_text()
    with pytest.raises(ConfigError, match="pattern: got 'post', expected one of pre, olmo"):
        get_config("hybrid_340m", "pattern=post")


@every_size
def test_the_command_line_reaches_the_configuration(name):
    config = get_config(name, "rule=kda,seed=3,steps=2000")
    assert (config.model.rule, config.seed, config.steps) == ("kda", 3, 2000)
    with pytest.raises(ConfigError, match="data: got 'pile', expected one of fineweb_edu, slimpajama"):
        get_config(name, "data=pile")
    with pytest.raises(ConfigError, match="'ruel'.*did you mean rule"):
        get_config(name, "ruel=kda")
