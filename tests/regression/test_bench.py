"""`run_bench`: losses and ratios against NumPy loops, rules of the user's own, and wrong arguments."""

import functools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from osdn_jax import ops
from osdn_jax.regression import RULES, Condition, Rule, draw, markdown, measure_rule, record, run_bench
from osdn_jax.regression.bench import arithmetic, geometric

SMALL = Condition("mine", 10, noise=0.1, width=4, length=24)


def loop(write_key, drawn, beta, *, decay=1.0):
    """Scores of every seed, a token at a time."""
    found = []
    for seed in range(len(drawn.k)):
        state = np.zeros((drawn.k.shape[-1], drawn.v.shape[-1]))
        losses, ratios = [], []
        for t in range(drawn.k.shape[1]):
            k, v, w = drawn.k[seed, t], drawn.v[seed, t], write_key[seed, t]
            losses.append(np.sum((v - state.T @ k) ** 2) / drawn.scale[seed, t])
            state *= decay
            before = v - state.T @ k
            state += beta * np.outer(w, before)
            ratios.append(np.sum((v - state.T @ k) ** 2) / np.sum(before**2))
        recalled = drawn.asked[seed] @ state
        distance = np.linalg.norm(recalled[:, None] - drawn.answers[seed][None], axis=-1)
        found.append(
            (
                np.mean(losses),
                np.mean(np.sum((recalled - drawn.answers[seed]) ** 2, -1)),
                np.exp(np.mean(np.log(np.maximum(ratios, 1e-30)))),
                np.mean(distance.argmin(1) == np.arange(len(distance))),
            )
        )
    return np.array(found).T


@pytest.mark.parametrize("beta", [0.3, 0.9])
@pytest.mark.parametrize(
    "condition",
    [SMALL, Condition("mine", 10, scale=(0.1, 2.0), path="ramp", width=4, length=24)],
    ids=["noise", "scale"],
)
def test_scores_against_a_loop(condition, beta):
    drawn = draw(condition, 2)
    rule = Rule(write_key=lambda k, beta: k * jnp.asarray([0.5, 1.0, 1.5, 2.0]).astype(k.dtype)[None, None, None])
    scores = measure_rule(rule, drawn, [beta, 1.0])
    loss, end, ratio, _ = loop(drawn.k * [0.5, 1.0, 1.5, 2.0], drawn, beta)
    np.testing.assert_allclose(scores.loss[0], loss, rtol=1e-9)
    np.testing.assert_allclose(scores.end[0], end, rtol=1e-9)
    np.testing.assert_allclose(scores.ratio[0], ratio, rtol=1e-6)
    assert np.all(np.isnan(scores.recall))


def test_scores_with_decay_against_a_loop():
    drawn = draw(SMALL, 2)
    scores = measure_rule(Rule(write_key=lambda k, beta: k, log_decay=math.log(0.9)), drawn, [0.7])
    loss, end, _, _ = loop(drawn.k, drawn, 0.7, decay=0.9)
    np.testing.assert_allclose(scores.loss[0], loss, rtol=1e-9)
    np.testing.assert_allclose(scores.end[0], end, rtol=1e-9)


@pytest.mark.parametrize("reads", [1, 2])
def test_recall_of_repeated_pairs_against_a_loop(reads):
    drawn = draw(Condition("mine", 10, width=6, pairs=8, reads=reads), 4)
    for beta in (0.4, 1.0):
        scores = measure_rule(RULES["delta_net"], drawn, [beta])
        _, end, _, recall = loop(drawn.k, drawn, beta)
        np.testing.assert_allclose(scores.end[0], end, rtol=1e-9)
        np.testing.assert_array_equal(scores.recall[0], recall)
        assert 0.2 < recall.mean() < 1


@pytest.mark.parametrize(
    "condition", [SMALL, Condition("mine", 10, width=6, pairs=8, reads=2)], ids=["stream", "pairs"]
)
def test_a_whole_memory_scores_as_its_write_keys(condition):
    drawn = draw(condition, 2)
    whole = Rule(run=lambda q, k, v, beta: ops.osdn(q, k, v, beta=beta, scale=1.0))
    both = [measure_rule(rule, drawn, [0.4, 1.0]) for rule in (whole, RULES["osdn_paper"])]
    for name, one, other in zip(both[0]._fields, *both, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, err_msg=name)


def test_many_values_of_beta_run_in_blocks(monkeypatch):
    drawn = draw(SMALL, 2)
    together = measure_rule(RULES["osdn_ones_beta"], drawn, [0.3, 0.6, 1.0])
    monkeypatch.setattr("osdn_jax.regression.measure._BLOCK", 1)
    apart = measure_rule(RULES["osdn_ones_beta"], drawn, [0.3, 0.6, 1.0])
    for one, other in zip(together, apart, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9)


def test_osdn_from_ones_is_delta_net_on_unit_keys():
    drawn = draw(Condition("mine", 100, width=8, length=100), 2)
    both = [measure_rule(RULES[name], drawn, [0.5, 1.0]) for name in ("osdn_ones", "delta_net")]
    for score in ("loss", "end"):
        np.testing.assert_allclose(*(getattr(scores, score) for scores in both), rtol=1e-9)


def test_the_told_diagonal_beats_delta_net_where_keys_are_ill_conditioned():
    """Its loss at the end is below a tenth of DeltaNet's for every seed; the mean is below 1e-3 at full size."""
    drawn = draw(Condition("mine", 100, width=16, length=400), 4)
    told, delta_net, exact = (
        measure_rule(RULES[name], drawn, [1.0]) for name in ("told_diagonal", "delta_net", "exact_gram")
    )
    assert np.all(told.end < 0.1 * delta_net.end)
    assert np.all(told.loss < delta_net.loss)
    assert np.all(exact.loss < told.loss)


def test_divergence_is_infinite():
    drawn = draw(Condition("mine", scale=(4.0, 4.0), width=4, length=200), 2)
    scores = measure_rule(RULES["delta_net"], drawn, [0.05, 1.0])
    assert np.all(np.isfinite(scores.loss[0]))
    assert np.all(np.isinf(scores.loss[1]))
    assert np.all(np.isinf(scores.end[1]))


def double(k, beta):
    return 2.0 * k


def memory(q, k, v, *, beta):
    return ops.delta_net(q, k, v, beta=beta, scale=1.0)


@functools.cache
def mine():
    return run_bench(
        {"double": double, "memory": memory, "given": Rule(write_key=double, reads_beta=False, about="twice the key")},
        builtin=["delta_net"],
        conditions=[SMALL, Condition("other", width=4, pairs=3)],
        seeds=3,
        betas=(0.25, 0.5, 1.0),
    )


def test_rules_of_the_user():
    results = mine()
    assert list(results.rules) == ["delta_net", "double", "memory", "given"]
    delta_net, doubled, whole, given = (results.row(name, SMALL) for name in results.rules)
    np.testing.assert_allclose(doubled.scores.loss[0], delta_net.scores.loss[1], rtol=1e-9)
    np.testing.assert_allclose(whole.scores.loss, delta_net.scores.loss, rtol=1e-9)
    np.testing.assert_allclose(given.scores.loss, doubled.scores.loss, rtol=1e-12)


def test_means_and_best_beta():
    row = mine().row("delta_net", SMALL)
    means = row.scores.loss.mean(1)
    assert row.best == means.argmin()
    value = row.value("loss", 0)
    assert value.mean == pytest.approx(means[0])
    assert value.error == pytest.approx(row.scores.loss[0].std(ddof=1) / math.sqrt(3))
    assert row.value("end", 2).mean == pytest.approx(np.exp(np.log(row.scores.end[2]).mean()))
    assert row.lowest_end == np.log(row.scores.end).mean(1).argmin()
    pairs = mine().conditions("other")[0]
    best = mine().row("double", pairs)
    assert best.scores.recall[best.best].mean() == best.scores.recall.mean(1).max()


def test_relative_losses_are_paired():
    results = mine()
    doubled, delta_net = (results.row(name, SMALL) for name in ("double", "delta_net"))
    found = results.relative(doubled, beta=0.5)
    logs = np.log(doubled.scores.loss[1] / delta_net.scores.loss[1])
    assert found.mean == pytest.approx(np.exp(logs.mean()))
    assert found.error == pytest.approx(np.exp(logs.std(ddof=1) / math.sqrt(3)))
    assert results.relative(delta_net) == (1.0, 1.0)
    alone = run_bench({"double": double}, builtin=[], conditions=[SMALL], seeds=1, betas=(1.0,))
    assert math.isnan(alone.relative(alone.rows[0]).mean)


def test_means_of_what_diverges():
    assert arithmetic(np.array([1.0, np.inf])).mean == math.inf
    assert geometric(np.array([1.0, np.inf])).mean == math.inf
    assert math.isnan(geometric(np.array([2.0])).error)


def test_page_and_record():
    results = mine()
    page = "\n".join(markdown(results))
    assert "| `double` | passed to the bench |" in page
    assert page.count("kappa 10, noise 0.1") == 8
    found = record(results, {"cpu": "x"})
    assert [c["name"] for c in found["conditions"]] == [c.name for c in results.conditions()]
    row = next(r for r in found["rows"] if r["rule"] == "double" and r["condition"] == 0)
    assert row["loss"] == pytest.approx(results.row("double", SMALL).scores.loss.mean(1), rel=0.01)
    assert row["one"]["beta"] == 1.0


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (3, "rules: mine: got int, expected a Rule, a function of"),
        (lambda k: k, r"rules: mine: got a function of \(k\), expected"),
        (lambda q, k, v: v, r"rules: mine: got a function of \(q, k, v\), expected"),
    ],
)
def test_what_is_no_rule(rule, message):
    with pytest.raises(TypeError, match=message):
        run_bench({"mine": rule}, builtin=[], conditions=[SMALL])


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda k, beta: k[:, :, 0], r"rules: mine: write_key: got a result of shape \(.*expected"),
        (lambda q, k, v, beta: q[:, :, :, :2], r"rules: mine: run: got a result of shape"),
        (lambda k, beta: k + k.mean(1, keepdims=True), "rules: mine: got a result that depends on later tokens"),
        (lambda q, k, v, beta: q + k[:, ::-1], "rules: mine: got a result that depends on later tokens"),
    ],
)
def test_rules_that_return_something_else(rule, message):
    with pytest.raises(ValueError, match=message):
        run_bench({"mine": rule}, builtin=[], conditions=[SMALL], seeds=2, betas=(1.0,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rules": {"delta_net": double}}, "rules: got 'delta_net', the name of a built-in rule"),
        ({"builtin": ["nothing"]}, "builtin: got 'nothing', expected some of delta_net"),
        ({"builtin": []}, "rules: got no rule"),
        ({"families": ["nothing"]}, "families: got 'nothing'"),
        ({"families": ["scale"], "conditions": [SMALL]}, "conditions: got conditions and families"),
        ({"betas": (0.5,)}, "betas: got .* with 1 among them"),
        ({"betas": (-1.0, 1.0)}, "betas: got"),
        ({"seeds": 0}, "seeds: got 0"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        run_bench(**arguments)


def test_what_was_not_measured():
    with pytest.raises(KeyError, match="pdn_2 was not measured on mine"):
        mine().row("pdn_2", SMALL)
    with pytest.raises(ValueError, match="beta: got 0.7, expected one of 0.25, 0.5, 1"):
        mine().rows[0].at(0.7)
