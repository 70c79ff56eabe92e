"""Diagnostics of a layer against plain loops over tokens in NumPy, float64, and the search in hindsight."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from osdn_jax import nn
from osdn_jax.diagnose.run import build_trained_model
from osdn_jax.evaluation import (
    best_fixed_multipliers,
    diagnose_layer,
    diagnose_model,
    geometric_ratio,
    gram_of_keys,
    write_inputs,
    write_keys,
    write_residuals,
)
from osdn_jax.evaluation.key_gram import random_alignment
from osdn_jax.evaluation.layer_diagnostics import bin_positions
from osdn_jax.nn.mixer import WriteInputs
from support import models, oracle
from support.models import LENGTH, SEGMENTS

pytestmark = pytest.mark.usefixtures("float64")

TRUST = nn.HypergradientConfig.preset("trust", beta_aware=True)
CASES = {
    "delta_net": {},
    "delta_net, beta to 2": {"negative_eigenvalues": True},
    "delta_net, as many key heads": {"key_heads": None},
    "gated_delta_net": {},
    "kda": {},
    "gdn2": {},
    "osdn": {},
    "osdn, trust, beta-aware": {"hypergradient": TRUST},
    "osdn, step matched": {"match_step": True},
    "osdn, keys without norm, beta 1": {"key_norm": False, "fixed_beta": 1.0},
    "os_gdn": {},
    "os_kda": {},
    "pdn": {},
    "pgdn": {},
    "pkda": {},
}
SEARCHED = ("osdn", "kda")  # with and without a decay: compiling the search takes the longest
BINS = 5


def layer(case):
    """(config, parameters, mixer, input x, WriteInputs in float64) of a mixer of four heads on packed sequences."""
    config = models.model_config(case.partition(",")[0], **CASES[case])
    _, parameters = models.parameters_of(config)
    mixer = build_trained_model(config, parameters).blocks[0].mixer
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, LENGTH, config.mixer.width)), jnp.float32)
    inputs = mixer.write_inputs(x, jnp.asarray(SEGMENTS))
    return config, parameters, mixer, x, jax.tree.map(lambda y: y.astype(jnp.float64), inputs)


def in_numpy(inputs):
    """Arrays of a WriteInputs by name, keys and multipliers once per value head, log decay per channel."""
    heads, channels = inputs.v.shape[2], inputs.k.shape[3]
    arrays = {name: None if x is None else np.asarray(x, np.float64) for name, x in inputs._asdict().items()}
    for name in ("q", "k", "multipliers"):
        x = arrays[name]
        arrays[name] = np.stack([x[:, :, h * x.shape[2] // heads] for h in range(heads)], axis=2)
    decay = arrays["log_decay"]
    if decay is None:
        decay = np.zeros(inputs.v.shape[:3])
    arrays["log_decay"] = decay if decay.ndim == 4 else np.repeat(decay[..., None], channels, axis=3)
    return arrays


def residual_loop(arrays, write_key, ids):
    """(e, e') of every token, read from a state that a loop writes."""
    k, v, beta, log_decay = (arrays[name] for name in ("k", "v", "beta", "log_decay"))
    before, after = np.zeros_like(v), np.zeros_like(v)
    for b, h in np.ndindex(v.shape[0], v.shape[2]):
        state = np.zeros((k.shape[3], v.shape[3]))
        for t in range(v.shape[1]):
            if t > 0 and ids[b, t] != ids[b, t - 1]:
                state = np.zeros_like(state)
            state = np.diag(np.exp(log_decay[b, t, h])) @ state
            before[b, t, h] = v[b, t, h] - state.T @ k[b, t, h]
            state = state + beta[b, t, h] * np.outer(write_key[b, t, h], before[b, t, h])
            after[b, t, h] = v[b, t, h] - state.T @ k[b, t, h]
    return before, after


def shadows(arrays):
    """The write keys by name, token by token."""
    k, d = arrays["k"], arrays["multipliers"]
    found = {"actual": d * k, "one": k.copy(), "mean": np.zeros_like(k), "matched": np.zeros_like(k)}
    for place in np.ndindex(k.shape[:3]):
        found["mean"][place] = k[place] * d[place].sum() / len(d[place])
        found["matched"][place] = k[place] * (d[place] @ k[place] ** 2) / (k[place] @ k[place])
    return found


def positions(ids):
    found = np.zeros(ids.shape, int)
    for b, t in np.ndindex(ids.shape):
        found[b, t] = found[b, t - 1] + 1 if t > 0 and ids[b, t] == ids[b, t - 1] else 0
    return found


def reference(arrays, write_key, ids, valid):
    """The quantities of `Writes`, summed token by token."""
    before, after = residual_loop(arrays, write_key, ids)
    heads, bins = arrays["v"].shape[2], (positions(ids) * BINS) // ids.shape[1]
    names = ("log_ratio", "mean_ratio", "loss_before", "loss_after", "factor", "step", "outside")
    tokens = {name: [[[] for _ in range(BINS)] for _ in range(heads)] for name in names}
    for b, t, h in np.ndindex(arrays["beta"].shape):
        if not valid[b, t]:
            continue
        factor = float(write_key[b, t, h] @ arrays["k"][b, t, h])
        step = float(arrays["beta"][b, t, h]) * factor
        pre, post = (0.5 * float(x[b, t, h] @ x[b, t, h]) for x in (before, after))
        q = 1.0 if pre <= 1e-20 else (1 - step) ** 2
        row = (math.log(max(q, 1e-30)), q, pre, post, factor, step, float(not 0 <= step <= 2))
        for name, value in zip(names, row, strict=True):
            tokens[name][h][bins[b, t]].append(value)

    def mean(name):
        return np.array([np.mean(sum(head, [])) for head in tokens[name]])

    def by_position(name):
        return np.array([[np.mean(x) if x else np.nan for x in head] for head in tokens[name]])

    found = {name: mean(name) for name in names[1:]} | {"ratio": np.exp(mean("log_ratio"))}
    found["ratio_by_position"] = np.exp(by_position("log_ratio"))
    for name in ("loss_before", "loss_after", "factor"):
        found[f"{name}_by_position"] = by_position(name)
    return found


def close(got, want, scale=1.0):
    np.testing.assert_allclose(np.asarray(got), want, rtol=1e-6, atol=1e-6 * scale, equal_nan=True)


@pytest.fixture(scope="module", params=CASES)
def case(request):
    config, parameters, mixer, x, inputs = layer(request.param)
    valid = np.ones(SEGMENTS.shape, bool)
    valid[1, -4:] = False
    settings = config.mixer.hypergradient
    bounds = settings.bounds if config.mixer.preconditioner == "hypergradient" else None
    found = diagnose_layer(
        inputs, SEGMENTS, valid, bounds=bounds, bins=BINS, hindsight_steps=3 * (request.param in SEARCHED)
    )
    output = mixer(x, None, jnp.asarray(SEGMENTS))[0]
    return config, parameters, (x, output), inputs, valid, found


def test_what_a_mixer_writes_is_what_it_computes_with(case):
    """A loop over the write inputs, normalised and projected, is the mixer's output by its definition."""
    config, parameters, (x, output), inputs, _, _ = case
    block = {name.removeprefix("blocks/0/"): np.asarray(y, np.float64) for name, y in parameters.items()}
    arrays = in_numpy(inputs)
    out, _ = oracle.delta_rule(
        arrays["q"],
        arrays["k"],
        arrays["v"],
        arrays["beta"],
        write_key=arrays["multipliers"] * arrays["k"],
        log_decay=arrays["log_decay"],
        segment_ids=SEGMENTS,
    )
    out = models._rms(out, block["mixer/norm/scale"]).reshape(*x.shape[:2], -1)
    if config.mixer.output_gate:
        out = out * models._silu(np.asarray(x) @ block["mixer/gate/kernel"])
    assert models.largest_error(out @ block["mixer/output/kernel"], output) < 1e-5


def test_writes_equal_loops(case):
    _, _, _, inputs, valid, found = case
    arrays = in_numpy(inputs)
    keys = shadows(arrays)
    if found.best_multipliers is None:
        assert set(found.writes) == set(keys)
    else:
        keys["best"] = found.best_multipliers * arrays["k"]
        assert set(found.writes) == {*keys, "best_scalar"}
    for name, key in keys.items():
        want = reference(arrays, key, SEGMENTS, valid)
        for quantity, value in want.items():
            close(getattr(found.writes[name], quantity), value)
    assert found.identity_error < 1e-12


def test_multipliers_equal_loops(case):
    config, _, _, inputs, valid, found = case
    arrays = in_numpy(inputs)
    d, k, statistics = arrays["multipliers"], arrays["k"], found.multipliers
    bins = (positions(SEGMENTS) * BINS) // LENGTH
    for h in range(d.shape[2]):
        used = np.array([d[b, t, h] for b, t in np.ndindex(valid.shape) if valid[b, t]])
        energy = np.mean([k[b, t, h] ** 2 for b, t in np.ndindex(valid.shape) if valid[b, t]], axis=0)
        close(statistics.channel_energy[h], energy)
        close(statistics.channel_mean[h], used.mean(axis=0))
        close([statistics.mean[h], statistics.minimum[h], statistics.maximum[h]], [used.mean(), used.min(), used.max()])
        quarters = np.array_split(np.argsort(energy), 4)
        for quarter, i in np.ndindex(4, BINS):
            chosen = [d[b, t, h, quarters[quarter]] for b, t in np.argwhere(valid & (bins == i))]
            close(statistics.by_position[h, quarter, i], np.mean(chosen) if chosen else np.nan)
        if config.mixer.preconditioner == "hypergradient":
            low, high = config.mixer.hypergradient.bounds
            close(statistics.share_on_bound[h], np.mean([x <= low or x >= high for x in used.ravel()]))
        else:
            assert statistics.share_on_bound is None
        lacking, steps = 0, 0
        for b in range(2):
            path = 0.0
            for t in range(LENGTH - 1):
                if SEGMENTS[b, t] == SEGMENTS[b, t + 1] and valid[b, t + 1]:
                    pairs = [(x, y) for x, y in zip(d[b, t, h], d[b, t + 1, h], strict=True) if x > 0 and y > 0]
                    path += max((abs(math.log(y) - math.log(x)) for x, y in pairs), default=0.0)
                    lacking, steps = lacking + (len(pairs) < d.shape[3]), steps + 1
            close(statistics.path[b, h], path)
        close(statistics.undefined[h], lacking / steps)


def test_gram_equals_loops(case):
    _, _, _, inputs, valid, found = case
    k = np.asarray(inputs.k)
    for h in range(k.shape[2]):
        gram = sum(np.outer(k[b, t, h], k[b, t, h]) for b, t in np.argwhere(valid)) / valid.sum()
        values, vectors = np.linalg.eig(gram)
        largest = np.array([max(abs(vectors[:, i])) for i in range(len(values))])
        close(found.gram.eigenvalues[h], sorted(values, reverse=True))
        close(found.gram.alignment[h], (values @ largest) / values.sum())
        close(found.gram.inverse_alignment[h], (largest / values).sum() / (1 / values).sum())
        np.testing.assert_allclose(found.gram.condition[h], values.max() / values.min(), rtol=1e-6)
        scale = np.diag(1 / np.sqrt(np.diag(gram)))
        np.testing.assert_allclose(found.gram.scaled_condition[h], np.linalg.cond(scale @ gram @ scale), rtol=1e-6)


@pytest.mark.parametrize("case", SEARCHED, indirect=True)
def test_fixed_multipliers_are_never_worse_than_none_or_the_mean(case):
    _, _, _, inputs, valid, found = case
    losses = {name: writes.loss_before for name, writes in found.writes.items()}
    rounding = 1e-9 * losses["one"]
    assert np.all(losses["best_scalar"] <= losses["one"] + rounding)
    assert np.all(losses["best"] <= losses["best_scalar"] + rounding)
    arrays = in_numpy(inputs)
    mean = np.maximum(found.multipliers.channel_mean, 1e-3) * arrays["k"]
    assert np.all(losses["best"] <= reference(arrays, mean, SEGMENTS, valid)["loss_before"] + rounding)
    close(found.regret("actual"), losses["actual"] - losses["best"])


def test_gated_rules_take_the_ratio_after_the_decay():
    k, v = jnp.full((1, 2, 1, 1), 1.0), jnp.asarray([1.0, 0.0]).reshape(1, 2, 1, 1)
    beta, decay = jnp.full((1, 2, 1), 0.5), jnp.full((1, 2, 1), math.log(0.2))
    before, after = write_residuals(k, v, beta, log_decay=decay)
    np.testing.assert_allclose(before.ravel(), [1.0, -0.1])  # of the state 0.5, decayed to 0.1
    np.testing.assert_allclose(after.ravel(), [0.5, -0.05])


def test_a_token_without_loss_counts_with_ratio_one():
    step, loss = np.full((1, 3, 1), 0.5), np.array([1.0, 1e-20, 0.0]).reshape(1, 3, 1)
    assert geometric_ratio(step, loss, np.ones((1, 3), bool)) == pytest.approx(0.25 ** (1 / 3))
    assert geometric_ratio(np.ones((1, 1, 1)), np.ones((1, 1, 1)), np.ones((1, 1), bool)) == pytest.approx(1e-30)


def test_a_key_of_zeros_has_finite_shadows():
    keys = write_keys(jnp.zeros((1, 1, 1, 3)), jnp.ones((1, 1, 1, 3)))
    assert all(np.all(np.asarray(x) == 0) for x in keys.values())


def test_positions_start_with_each_segment():
    found = bin_positions(SEGMENTS, LENGTH)
    np.testing.assert_array_equal(found.bins, positions(SEGMENTS))
    np.testing.assert_array_equal(bin_positions(SEGMENTS, 1000).first, np.arange(LENGTH))
    coarse = bin_positions(np.ones((1, 10), int), 3)
    np.testing.assert_array_equal(coarse.first, [np.argmax(coarse.bins[0] == i) for i in range(3)])


def test_alignment_of_axes_and_of_random_directions():
    rng = np.random.default_rng(0)
    energies = np.geomspace(1, 1e-3, 16)
    k = rng.standard_normal((1, 4000, 1, 16)) * np.sqrt(energies)
    rotation = np.linalg.qr(rng.standard_normal((16, 16)))[0]
    straight, rotated = gram_of_keys(k), gram_of_keys(k @ rotation)
    assert straight.alignment[0] > 0.98
    assert abs(rotated.alignment[0] - random_alignment(16)) < 0.15
    assert random_alignment(16) > 1.5 * 16**-0.5
    np.testing.assert_allclose(rotated.eigenvalues, straight.eigenvalues)
    assert straight.scaled_condition[0] < 2
    assert rotated.scaled_condition[0] > 50


def regression(condition, beta=1.0):
    """Unit keys whose channels have energies from 1 to 1 / condition, and values linear in them."""
    rng = np.random.default_rng(3)
    k = rng.standard_normal((4, 200, 1, 12)) * np.sqrt(np.geomspace(1, 1 / condition, 12))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v = k @ (rng.standard_normal((4, 1, 12, 12)) / np.sqrt(12))
    return jnp.asarray(k), jnp.asarray(v), jnp.full((4, 200, 1), beta)


def test_fixed_multipliers_help_keys_of_unequal_energy_alone():
    k, v, beta = regression(100.0)
    found = best_fixed_multipliers(k, v, beta)
    assert found.loss[0] < 0.85 * found.start[0]
    energy = np.mean(np.square(k), axis=(0, 1, 2))
    slope = np.polyfit(np.log(energy), np.log(found.multipliers[0]), 1)[0]
    assert -0.8 < slope < -0.2  # weak channels get the larger d, by less than Newton's -1
    scalar = best_fixed_multipliers(k, v, beta, per_channel=False)
    assert float(np.ptp(scalar.multipliers)) == 0
    assert scalar.loss[0] > 0.95 * scalar.start[0]  # it is not the step size

    k, v, beta = regression(1.0)
    found = best_fixed_multipliers(k, v, beta)
    assert 0.97 * found.start[0] < found.loss[0] <= found.start[0]


def test_the_best_number_is_that_of_a_search_over_a_grid():
    k, v, beta = regression(10.0, beta=0.1)
    found = best_fixed_multipliers(k, v, beta, per_channel=False)
    run = jax.jit(lambda c: write_residuals(k, v, beta, c * k).before)

    def loss(c):
        return 0.5 * float(np.mean(np.sum(np.square(run(jnp.asarray(c))), axis=-1)))

    grid = [loss(c) for c in np.geomspace(0.5, 30, 60)]
    assert float(found.loss[0]) <= min(grid) * (1 + 1e-3)
    assert float(found.loss[0]) == pytest.approx(loss(float(found.multipliers[0, 0])), rel=1e-9)


def test_only_valid_tokens_count_in_the_search():
    k, v, beta = regression(10.0)
    valid = jnp.arange(200)[None] < jnp.asarray([[200], [25], [0], [60]])
    spoiled = jnp.where(valid[:, :, None, None], v, 1e3)
    want = best_fixed_multipliers(k, v, beta, valid=valid)
    np.testing.assert_allclose(best_fixed_multipliers(k, spoiled, beta, valid=valid).loss, want.loss)


def test_a_search_whose_start_overflows_finds_a_smaller_step():
    k, v, beta = regression(1.0, beta=1e3)
    found = best_fixed_multipliers(k, v, beta)
    assert not np.isfinite(found.start[0])
    assert np.isfinite(found.loss[0])
    assert found.loss[0] < 1.2 * best_fixed_multipliers(k, v, beta / 1e3).loss[0]


def test_a_whole_model_layer_by_layer():
    config = models.model_config("osdn", layers=2)
    model = build_trained_model(config, models.parameters_of(config)[1])
    tokens = models.tokens()
    found = diagnose_model(model, tokens, SEGMENTS, bins=BINS, hindsight_steps=0)
    for inputs, layer in zip(
        write_inputs(model, jnp.asarray(tokens), jnp.asarray(SEGMENTS)), found.layers, strict=True
    ):
        arrays = in_numpy(inputs)
        want = reference(arrays, arrays["multipliers"] * arrays["k"], SEGMENTS, np.ones(SEGMENTS.shape, bool))
        for quantity, value in want.items():
            np.testing.assert_allclose(getattr(layer.writes["actual"], quantity), value, rtol=1e-3, atol=1e-5)
        assert layer.identity_error < 1e-5
        assert layer.best_multipliers is None
        assert layer.regret("actual") is None


@pytest.mark.parametrize("rule", ["transformer", "linear_attention", "mamba2", "gla"])
def test_a_model_without_a_delta_rule_is_one_line(rule):
    fields = {"key_dim": 6} if rule == "transformer" else {}
    model = nn.CausalLM(models.model_config(rule, **fields), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"^model: got .*, expected a delta rule: .*$"):
        diagnose_model(model, models.tokens())
    if rule != "transformer":
        with pytest.raises(ValueError, match="write_inputs: got a mixer with erase=False"):
            model.blocks[0].mixer.write_inputs(jnp.zeros((1, 2, 12)))


@pytest.mark.parametrize(
    ("error", "said", "changes"),
    [
        (TypeError, "model: got dict, expected an nn.CausalLM", {"model": {}}),
        (ValueError, "bins: got 0, expected at least 1", {"bins": 0}),
        (TypeError, "bins: got 2.5, expected an int", {"bins": 2.5}),
        (ValueError, "hindsight_steps: got -1, expected at least 0", {"hindsight_steps": -1}),
        (ValueError, r"tokens: got shape \(24,\), expected \[B, T\]", {"tokens": np.zeros(24, np.int32)}),
        (ValueError, r"tokens: got shape \(2, 0\)", {"tokens": np.zeros((2, 0), np.int32)}),
        (TypeError, "tokens: got dtype float64", {"tokens": np.zeros((2, 24))}),
        (ValueError, r"segment_ids: got shape \(2, 23\)", {"segment_ids": SEGMENTS[:, :23]}),
        (ValueError, "valid: got no valid token", {"valid": np.zeros((2, 24), bool)}),
        (ValueError, r"valid: got int32 \(2, 24\), expected bool", {"valid": np.ones((2, 24), np.int32)}),
    ],
)
@pytest.mark.usefixtures("our_checks")
def test_wrong_arguments_are_one_line(error, said, changes):
    model = nn.CausalLM(models.model_config("osdn"), rngs=nnx.Rngs(0))
    arguments = {"model": model, "tokens": models.tokens()} | changes
    with pytest.raises(error, match=said) as raised:
        diagnose_model(**arguments)
    assert "\n" not in str(raised.value)


def test_a_wrong_number_of_steps_is_one_line():
    k, v, beta = regression(1.0)
    with pytest.raises(ValueError, match="steps: got -1, expected an int of at least 0"):
        best_fixed_multipliers(k, v, beta, steps=-1)


def test_inputs_need_no_segments():
    inputs = layer("osdn")[-1]
    ids = np.ones(SEGMENTS.shape, np.int32)
    alone, one = (diagnose_layer(inputs, x, hindsight_steps=0) for x in (None, ids))
    np.testing.assert_allclose(alone.writes["actual"].loss_before, one.writes["actual"].loss_before)
    assert isinstance(inputs, WriteInputs)
