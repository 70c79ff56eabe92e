"""Variants and plans: which runs a sweep has, and when an old result counts."""

import pytest

from osdn_jax.sweep import Plan, by_key, chosen_rate, make_variants
from osdn_jax.training.config import ConfigError

RATES = [1e-3, 3e-3, 1e-2]


def record(run, accuracy):
    steps = [10 * i for i in range(len(accuracy))]
    settings = run.variant.settings
    return {
        "key": run.key,
        "seed": run.seed,
        "learning_rate": run.learning_rate,
        "steps": steps,
        "accuracy": accuracy,
        "settings": settings,
    }


def test_a_grid_has_every_rate_and_seed(tiny):
    plan = Plan(make_variants(tiny, ["delta_net", "pdn"]), [0, 1], RATES)
    runs = plan.runs({})
    assert plan.total == len(runs) == len({run.key for run in runs}) == 12
    assert [(r.variant.label, r.learning_rate, r.seed) for r in runs[:3]] == [
        ("delta_net", 1e-3, 0),
        ("delta_net", 1e-3, 1),
        ("delta_net", 3e-3, 0),
    ]


def test_choose_trains_other_seeds_at_the_best_rate_alone(tiny):
    plan = Plan(make_variants(tiny, ["delta_net", "pdn"]), [4, 5, 6], RATES, choose=True)
    assert plan.total == 10
    first = plan.runs({})
    assert [(r.variant.label, r.learning_rate, r.seed) for r in first] == [
        (label, rate, 4) for label in ("delta_net", "pdn") for rate in RATES
    ]
    finished = {run.key: record(run, [0, x, x, x]) for run, x in zip(first[:3], (0.1, 0.9, 0.2), strict=True)}
    runs = plan.runs(finished)
    assert [(r.learning_rate, r.seed) for r in runs if r.variant.label == "delta_net"] == [
        *((rate, 4) for rate in RATES),
        (3e-3, 5),
        (3e-3, 6),
    ]
    assert len(runs) == 8  # pdn is not tried yet


def test_of_equal_plateaus_the_earlier_curve_is_chosen(tiny):
    plan = Plan(make_variants(tiny, ["pdn"]), [0], RATES)
    curves = ([0, 0, 1, 1, 1], [0, 0.5, 1, 1, 1], [0, 1, 1, 0.9, 1])
    assert chosen_rate([record(run, curve) for run, curve in zip(plan.runs({}), curves, strict=True)]) == 3e-3


def test_a_plan_survives_the_pipe(tiny):
    plan = Plan(make_variants(tiny, ["pdn"], ["t: osdn model.preset=trust"]), [0, 1], RATES, choose=True, vmap=True)
    other = Plan.from_json(plan.as_json())
    assert [run.key for run in other.runs({})] == [run.key for run in plan.runs({})]
    assert (other.choose, other.vmap, other.total) == (True, True, plan.total)


def test_what_changes_the_result_is_another_run(tiny):
    def key(**changes):
        config = tiny.copy_and_resolve_references()
        config.update_from_flattened_dict(changes)
        return Plan(make_variants(config, ["pdn"]), [0], [1e-3]).runs({})[0].key

    same = key()
    for changes in ({"steps": 9}, {"model.width": 16}, {"data.task": "mqar:length=16,pairs=3,vocabulary=32"}):
        assert key(**changes) != same
    for changes in ({"log_every": 3}, {"checkpoint.keep": 9}, {"seed": 5}, {"optimizer.learning_rate": 0.5}):
        assert key(**changes) == same


def test_a_result_from_before_a_new_key_still_counts(tiny):
    [run] = Plan(make_variants(tiny, ["pdn"]), [0], [1e-3]).runs({})
    old = record(run, [0, 1])
    old["settings"] = {k: v for k, v in old["settings"].items() if k not in ("model.eta", "ema")}
    old["key"] = "of the version before"
    assert list(by_key([old])) == [run.key]
    old["settings"]["ema"] = 0.5
    assert list(by_key([old])) != [run.key]


def test_variants(tiny):
    declared = {"beta2": "delta_net model.negative_eigenvalues=true"}
    given = ["trust: osdn model.preset=trust model.anchor=1", "wide:model.width=16", "none: osdn model.preset=None"]
    variants = make_variants(tiny, ["pdn", "beta2"], given, declared)
    pdn, beta2, trust, wide, none = (v.config for v in variants)
    assert [v.label for v in variants] == ["pdn", "beta2", "trust", "wide", "none"]
    assert (pdn.model.rule, beta2.model.rule, beta2.model.negative_eigenvalues) == ("pdn", "delta_net", True)
    assert (trust.model.preset, trust.model.anchor, wide.model.width, none.model.preset) == ("trust", 1.0, 16, None)
    assert (wide.model.rule, tiny.model.width) == ("delta_net", 8)


@pytest.mark.parametrize(
    ("rules", "given", "said"),
    [
        (["ozdn"], [], r"--rules: got 'ozdn', expected some of .*did you mean osdn"),
        ([], ["osdn"], "--variant: got 'osdn', expected 'NAME: RULE KEY=VALUE …'"),
        ([], ["a: ozdn"], "--variant a: got the rule 'ozdn', expected one of"),
        ([], ["a: osdn model.pre=trust"], r"--variant a: there is no key 'model.pre' \(did you mean model.preset"),
        ([], ["a: osdn model.eta=fast"], "--variant a: got 'model.eta=fast': expected a float"),
        ([], ["a: osdn trust"], "--variant a: got 'trust', expected KEY=VALUE"),
        (
            [],
            ["a: osdn seed=3"],
            "got 'seed=3', but seeds and learning rates are those of the whole sweep",
        ),
        ([], ["a: osdn steps=None"], "--variant a: got 'steps=None': expected an int"),
        (["osdn"], ["osdn: pdn"], "two variants of the name 'osdn'"),
        (["osdn"], ["again: osdn"], "'again' has the same settings as 'osdn'"),
    ],
)
def test_variants_that_are_wrong(tiny, rules, given, said):
    with pytest.raises(ConfigError, match=said):
        make_variants(tiny, rules, given)
