"""Another rule for layers of a model: unchanged logits, gradients of the new parameters, and what can be saved."""

import dataclasses
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from safetensors.numpy import load_file

from osdn_jax import interop
from osdn_jax.interop import surgery
from osdn_jax.nn import (
    MESH_AXES,
    AttentionConfig,
    BlockConfig,
    CausalLM,
    GramConfig,
    HypergradientConfig,
    LatentAttentionConfig,
    MixerConfig,
    MixtureConfig,
    MLPConfig,
    ModelConfig,
    mixer_config,
    parameter_spec,
    split_model,
)
from support import fla_checkpoints, fla_loop
from support.fla_checkpoints import entries

V, T = 32, 24
SCALE = 0.5
IDS = np.random.default_rng(1).integers(V, size=(2, T))
SIZES = {"width": 16, "heads": 4, "key_heads": 2, "key_dim": 4, "value_dim": 8}
RULES = {
    "delta_net": mixer_config("delta_net", **SIZES, conv_size=0, fixed_beta=1.0),
    "gated_delta_net": mixer_config("gated_delta_net", **SIZES, negative_eigenvalues=True, key_norm=False),
    "kda": mixer_config("kda", **SIZES, decay_rank=3, decay_bound=-4.0, output_gate_rank=3, output_gate_bias=True),
}
GDN = mixer_config("gated_delta_net", **SIZES)
DELTA = tuple(BlockConfig(mixer, MLPConfig(24)) for mixer in RULES.values())
HYBRID = (
    BlockConfig(GDN, MixtureConfig(experts=4, active=2, hidden=8)),
    BlockConfig(RULES["kda"], MLPConfig(24)),
    BlockConfig(AttentionConfig(16, 2, 8, 8, output_gate=True), MLPConfig(24), "post"),
    BlockConfig(LatentAttentionConfig(16, 2, 4, 4, 8), MLPConfig(24)),
)

PRECONDITIONERS = ("hypergradient", "gram")


def model_of(mixer=None, *, blocks=None, layers=2, **options):
    """Return a model with random parameters, larger than initial ones, so that every part has a say in the logits."""
    sizes = {"blocks": blocks} if blocks else {"layers": layers, "mixer": mixer, "mlp_dim": 24}
    config = ModelConfig(V, **sizes, **options)
    model = CausalLM(config, rngs=nnx.Rngs(0))
    keys = iter(jax.random.split(jax.random.key(1), 200))

    def larger(name, x):
        wide = x.ndim > 1 and "embedding" not in name and "convolution" not in name
        return jax.random.normal(next(keys), x.shape, x.dtype) * SCALE * x.shape[-2] ** -0.5 if wide else x

    return interop.assembled(config, {name: larger(name, x) for name, x in split_model(model)[1].items()})


def descend(model, new, steps=3, rate=1.0):
    """Return the gradient of a loss of all logits, and the parameters after steps against it in `new` alone."""
    apply, parameters = split_model(model)
    targets = jnp.asarray(np.roll(IDS, -1, axis=1))

    @jax.jit
    def gradient(parameters):
        def loss(parameters):
            logs = jax.nn.log_softmax(apply(parameters, jnp.asarray(IDS))[0])
            return -jnp.mean(jnp.take_along_axis(logs, targets[..., None], axis=-1))

        return jax.grad(loss)(parameters)

    first = g = gradient(parameters)
    for _ in range(steps):
        parameters = parameters | {name: parameters[name] - rate * g[name] for name in new}
        g = gradient(parameters)
    return first, parameters


def check(model, changed, *, tolerance=5e-6):
    """Assert that the logits are unchanged, and return the names of the new parameters; all others are shared.

    Factors on the keys are exactly 1 and new decays exactly 0 or those of before; the tolerance is for the rounding of
    another program, which the norms of small outputs enlarge.
    """
    x = jax.random.normal(jax.random.key(2), (2, T, 16), model.config.dtype)
    for before, after in zip(model.blocks, changed.blocks, strict=True):
        if before.config.mixer == after.config.mixer:
            continue
        if after.config.mixer.preconditioner != before.config.mixer.preconditioner:
            np.testing.assert_array_equal(after.mixer.multipliers(x), 1.0)
        if after.config.mixer.decay != before.config.mixer.decay:
            now = jnp.exp(after.mixer.decay(x))
            want = jnp.ones(()) if before.mixer.decay is None else jnp.exp(before.mixer.decay(x))
            want = want[..., None] if want.ndim < now.ndim else want
            np.testing.assert_array_equal(now, np.broadcast_to(want, now.shape))
    with jax.default_matmul_precision("highest"):
        want, got = (interop.logits(m, IDS) for m in (model, changed))
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)
    old, now = (split_model(m)[1] for m in (model, changed))
    new = {name for name, x in now.items() if name not in old or old[name] is not x}
    return new


EXPECTED = {"hypergradient": {"initial", "eta"}, "gram": {"gram_log_squash", "gram_center", "gram_gain/kernel"}}
EXPECTED["gram"] |= {f"gram_decay/{name}" for name in ("project/kernel", "bias", "log_rate")}


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_a_preconditioner_starts_neutral_and_is_learned(preconditioner):
    """In every kind of layer each new parameter has a gradient at the start, and a few steps move it."""
    model = model_of(blocks=DELTA)
    changed = surgery.replace_rule(model, preconditioner=preconditioner)
    new = check(model, changed)
    assert new == {f"blocks/{i}/mixer/{name}" for i in range(len(DELTA)) for name in EXPECTED[preconditioner]}
    gradient, after = descend(changed, new)
    for name in new:
        size = float(jnp.max(jnp.abs(gradient[name])))
        # In a layer of the Gram preconditioner all but log(x) wait for it: their gradients start 1e-10 times as large.
        opens = preconditioner == "hypergradient" or name.endswith("gram_log_squash")
        assert size > (1e-6 if opens else 0.0), name
    before = split_model(changed)[1]
    for name in new:
        assert not np.array_equal(before[name], after[name]), name


def test_forgetting_gets_its_gradient_when_the_preconditioner_has_moved():
    """While d is what it is forgotten toward, forgetting changes nothing: the gate has no gradient at the start."""
    settings = dataclasses.replace(surgery.NEUTRAL_HYPERGRADIENT, forget=True)
    model = model_of(GDN, layers=1)
    changed = surgery.replace_rule(model, preconditioner="hypergradient", hypergradient=settings)
    new = check(model, changed)
    gate = {name for name in new if "/forget/" in name}
    assert {name.split("mixer/")[1] for name in gate} == {"forget/kernel", "forget/bias"}
    gradient, after = descend(changed, new, rate=10.0)
    for name in new:
        assert (float(jnp.max(jnp.abs(gradient[name]))) > 0) == (name not in gate), name
    before = split_model(changed)[1]
    for name in new:
        assert not np.array_equal(before[name], after[name]), name


@pytest.mark.parametrize(
    ("rule", "decay", "waiting"),
    [
        ("gated_delta_net", "channel", ()),
        ("delta_net", "scalar", ("decay/project/kernel", "decay/bias", "decay/log_rate")),
        ("delta_net", "channel", ("decay/down/kernel", "decay/project/kernel", "decay/bias", "decay/log_rate")),
    ],
    ids=["scalar to channel", "none to scalar", "none to channel"],
)
def test_a_decay_starts_as_it_was_and_is_learned(rule, decay, waiting):
    model = model_of(mixer_config(rule, **SIZES), layers=1)
    changed = surgery.replace_rule(model, decay=decay)
    new = check(model, changed)
    names = {"decay/down/kernel", "decay/project/kernel", "decay/bias"} if rule == "gated_delta_net" else set()
    names |= {*waiting, "decay/scale"} if waiting else set()
    assert new == {f"blocks/0/mixer/{name}" for name in names}
    gradient, after = descend(changed, new)
    for name in new:
        opens = name.split("mixer/")[1] not in waiting
        assert float(jnp.max(jnp.abs(gradient[name]))) > (1e-6 if opens else 0.0), name
    before = split_model(changed)[1]
    for name in new:
        assert not np.array_equal(before[name], after[name]), name


def test_both_at_once_in_one_layer_of_a_hybrid():
    model = model_of(blocks=HYBRID)
    changed = surgery.replace_rule(model, [-4], preconditioner="gram", decay="channel")
    assert all(name.startswith("blocks/0/mixer/") for name in check(model, changed))
    mixers = [block.mixer for block in changed.config.stack]
    assert (mixers[0].preconditioner, mixers[0].decay) == ("gram", "channel")
    assert mixers[1:] == [block.mixer for block in HYBRID[1:]]
    everywhere = surgery.replace_rule(model, preconditioner="hypergradient")
    kinds = [getattr(block.mixer, "preconditioner", None) for block in everywhere.config.stack]
    assert kinds == ["hypergradient", "hypergradient", None, None]


def test_a_uniform_model_stays_uniform_if_all_of_it_changes():
    model = model_of(GDN)
    assert surgery.replace_rule(model, preconditioner="gram").config.mixer.preconditioner == "gram"
    part = surgery.replace_rule(model, [1], preconditioner="gram").config
    assert [block.mixer.preconditioner for block in part.blocks] == ["none", "gram"]


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_bfloat16(preconditioner):
    """In bfloat16 the factors on the keys are exactly 1, too: the logits are equal to the bit."""
    wide = model_of(GDN, layers=1, dtype="bfloat16")
    halves = {name: x.astype(jnp.bfloat16) if x.ndim > 1 else x for name, x in split_model(wide)[1].items()}
    model = interop.assembled(wide.config, halves)
    changed = surgery.replace_rule(model, preconditioner=preconditioner)
    new = check(model, changed, tolerance=0)
    parameters = split_model(changed)[1]
    for name in new:
        kernel = name.endswith("kernel")
        assert parameters[name].dtype == (jnp.bfloat16 if kernel else jnp.float32), name
    scalar = surgery.replace_rule(model, decay="channel")
    check(model, scalar, tolerance=0.1)  # the chunks of a decay per channel round otherwise


def test_prefill_and_steps_equal_the_whole_after_training():
    """The learned step size reaches the state that is carried."""
    model = model_of(GDN, layers=1)
    changed = surgery.replace_rule(model, preconditioner="hypergradient")
    apply, _ = split_model(changed)
    _, parameters = descend(changed, check(model, changed), rate=3.0)
    ids, run = jnp.asarray(IDS), jax.jit(lambda p, *a: apply(p, *a))
    whole, _ = run(parameters, ids)
    out, states = run(parameters, ids[:, :20])
    parts = [out]
    for t in range(20, T):
        out, states = run(parameters, ids[:, t : t + 1], states)
        parts.append(out)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, rtol=0, atol=1e-5)
    assert np.abs(whole - interop.logits(model, IDS)).max() > 1e-3


def test_over_a_mesh():
    """New parameters lie on the devices of the old ones."""
    mesh = jax.make_mesh((1, 2, 2, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    model = model_of(GDN)
    place = lambda name, x: jax.device_put(x, jax.NamedSharding(mesh, parameter_spec(name)))
    model = interop.assembled(model.config, {name: place(name, x) for name, x in split_model(model)[1].items()})
    changed = surgery.replace_rule(model, preconditioner="gram", decay="channel")
    for name, x in split_model(changed)[1].items():
        assert x.sharding == jax.NamedSharding(mesh, parameter_spec(name)), name


def written(tmp_path, config):
    return interop.load_pretrained(fla_checkpoints.write(tmp_path / "in", config, fla_checkpoints.tensors(config)))


FIXED = {"forget": False, "anchor": 0.0, "initial": 1.0, "bounds": (2 / 3, 3 / 2), "eta": 0.003}
LAYOUTS = {
    "precond_gated_deltanet": (entries("gated_deltanet", num_v_heads=4), {"gram": GramConfig(squash=1.3)}),
    "precond_kda": (entries("kda"), {"gram": GramConfig(squash=1.3)}),
    "osla_delta_net": (entries("delta_net"), {"hypergradient": HypergradientConfig(**FIXED)}),
    "os_gated_deltanet": (
        entries("gated_deltanet", num_v_heads=4),
        {"hypergradient": HypergradientConfig(**FIXED, beta_aware=True)},
    ),
    "os_kda": (
        entries("kda", num_v_heads=4),
        {"hypergradient": HypergradientConfig(**FIXED, beta_aware=True)},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_that_hold_a_new_rule(layout, tmp_path):
    """The library that has the rule reads the saved folder, as the loop over its tensors does."""
    config, settings = LAYOUTS[layout]
    (preconditioner,) = settings
    changed = surgery.replace_rule(written(tmp_path, config), preconditioner=preconditioner, **settings)
    assert interop.save_pretrained(changed, tmp_path / "out", layout=layout) == layout
    again = interop.load_pretrained(tmp_path / "out")
    assert_equal_parameters(again, changed)
    with jax.default_matmul_precision("highest"):
        got = interop.logits(again, IDS)
    saved = json.loads((tmp_path / "out/config.json").read_text())
    tensors = load_file(tmp_path / "out/model.safetensors")
    want = np.stack([fla_loop.logits(saved, tensors, row) for row in IDS])
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("our_checks")
@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_what_no_layout_holds_is_saved_in_our_own(preconditioner, tmp_path):
    config = entries("gated_deltanet", num_v_heads=4)
    changed = surgery.replace_rule(written(tmp_path, config), preconditioner=preconditioner)
    for layout in ("precond_gated_deltanet", "os_gated_deltanet", "gated_deltanet"):
        with pytest.raises(ValueError, match=f"layout: '{layout}' cannot hold this model"):
            interop.save_pretrained(changed, tmp_path / "no", layout=layout)
    assert interop.save_pretrained(changed, tmp_path / "out") == "osdn_jax"
    again = interop.load_pretrained(tmp_path / "out")
    assert again.config.stack == changed.config.stack
    assert_equal_parameters(again, changed)


def assert_equal_parameters(a, b):
    jax.tree.map(np.testing.assert_array_equal, split_model(a)[1], split_model(b)[1])


def test_a_preconditioner_is_removed():
    model = model_of(dataclasses.replace(GDN, preconditioner="gram"), layers=1)
    plain = surgery.replace_rule(model, preconditioner="none")
    assert plain.config.mixer.preconditioner == "none"
    assert not any("gram" in name for name in split_model(plain)[1])
    assert np.abs(interop.logits(plain, IDS) - interop.logits(model, IDS)).max() > 1e-3


def test_shapes_alone():
    """Inside `nnx.eval_shape` the configuration and the shapes come out, as a run plans them."""
    config = ModelConfig(V, blocks=HYBRID)
    for change in ({"decay": "channel", "layers": [0]}, {"preconditioner": "gram"}):
        abstract = nnx.eval_shape(
            lambda change=change: surgery.replace_rule(CausalLM(config, rngs=nnx.Rngs(0)), **change)
        )
        want = interop.loading.parameter_shapes(abstract.config)
        assert {name: x.shape for name, x in split_model(abstract)[1].items()} == want


def test_numbers_of_new_projections_come_from_the_seed():
    model = model_of(GDN)
    kernels = [
        split_model(surgery.replace_rule(model, preconditioner="gram", seed=seed))[1]["blocks/0/mixer/gram_gain/kernel"]
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert not np.array_equal(kernels[0], kernels[2])


ERRORS = [
    ({}, ValueError, "preconditioner: got None with decay=None, expected at least one"),
    ({"preconditioner": "newton"}, ValueError, "preconditioner: got 'newton', expected one of none, hypergradient"),
    ({"preconditioner": "none", "layers": [0]}, ValueError, "preconditioner: got 'none' for layer 0, which has none"),
    ({"preconditioner": "gram", "layers": [2]}, ValueError, "layers: got 2, whose mixer is of AttentionConfig"),
    ({"preconditioner": "gram", "layers": [-1]}, ValueError, "layers: got -1, whose mixer is of LatentAttention"),
    ({"preconditioner": "gram", "layers": [4]}, ValueError, "layers: got 4, expected a number from -4 to 3"),
    ({"preconditioner": "gram", "layers": [0, -4]}, ValueError, "layers: got layer 0 twice"),
    ({"preconditioner": "gram", "layers": []}, ValueError, "layers: got none"),
    ({"preconditioner": "gram", "layers": "0"}, TypeError, "layers: got '0', expected numbers"),
    ({"preconditioner": "gram", "layers": 0}, TypeError, "layers: got 0, expected numbers"),
    ({"preconditioner": "gram", "layers": [0.0]}, TypeError, "layers: got 0.0, expected an int"),
    ({"preconditioner": "gram", "seed": "a"}, TypeError, "seed: got 'a', expected an int"),
    ({"preconditioner": "gram", "gram": {}}, TypeError, "gram: got dict, expected a GramConfig"),
    ({"decay": "channel", "gram": GramConfig()}, ValueError, "gram: got settings with preconditioner=None"),
    ({"decay": "channel"}, ValueError, "decay: got 'channel' for layer 1, whose decay is 'channel'"),
    ({"decay": "vector"}, ValueError, "decay: got 'vector', expected scalar or channel"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), ERRORS)
def test_errors(arguments, error, message):
    model = nnx.eval_shape(lambda: CausalLM(ModelConfig(V, blocks=HYBRID), rngs=nnx.Rngs(0)))
    with pytest.raises(error, match=f"^{message}"):
        surgery.replace_rule(model, **arguments)


def test_rules_that_cannot_have_it():
    for rule, change, message in (
        ("linear_attention", {"preconditioner": "gram"}, "layer 0: preconditioner: got 'gram' with erase=False"),
        ("gdn2", {"preconditioner": "gram"}, "layer 0: strength: got 'channel'"),
        ("pdn", {"preconditioner": "gram"}, "preconditioner: got 'gram' for layer 0, which has 'gram'; precond"),
        ("linear_attention", {"decay": "scalar"}, "decay: got 'scalar' for layer 0, expected it for a rule with one"),
    ):
        config = ModelConfig(V, 1, mixer_config(rule, **SIZES), mlp_dim=24)
        model = nnx.eval_shape(lambda config=config: CausalLM(config, rngs=nnx.Rngs(0)))
        with pytest.raises(ValueError, match=f"^{message}"):
            surgery.replace_rule(model, **change)
    with pytest.raises(TypeError, match="model: got dict, expected a CausalLM"):
        surgery.replace_rule({}, preconditioner="gram")
    attention = ModelConfig(V, 1, AttentionConfig(16, 2, 8, 8), mlp_dim=24)
    model = nnx.eval_shape(lambda: CausalLM(attention, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="model: got one without a delta rule"):
        surgery.replace_rule(model, preconditioner="gram")


GOLDEN = Path(os.environ.get("OSDN_GOLDEN_DIR", "")) / "models"


@pytest.mark.skipif("OSDN_GOLDEN_DIR" not in os.environ, reason="OSDN_GOLDEN_DIR names no folder")
@pytest.mark.parametrize(
    "name", ["fla_gated_deltanet", "fla_kda", "qwen3_next", "qwen3_5", "olmo_hybrid", "kimi_linear"]
)
def test_golden_models(name):
    """The logits of every library's models are unchanged within 1e-6."""
    model = interop.load_pretrained(GOLDEN / name)
    ids = np.load(GOLDEN / name / "expected.npz")["input_ids"]
    for preconditioner in PRECONDITIONERS:
        changed = surgery.replace_rule(model, preconditioner=preconditioner)
        with jax.default_matmul_precision("highest"):
            got, want = (interop.logits(m, ids) for m in (changed, model))
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
    delta = [block.mixer for block in model.config.stack if isinstance(block.mixer, MixerConfig)]
    if all(mixer.decay == "scalar" for mixer in delta):
        got = interop.logits(surgery.replace_rule(model, decay="channel"), ids)
        np.testing.assert_allclose(got, interop.logits(model, ids), rtol=0, atol=1e-6)
