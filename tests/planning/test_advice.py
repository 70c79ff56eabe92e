"""Suggestions from made-up costs."""

from osdn_jax.planning.advice import Costs, Option, options, suggest

COSTS = Costs(
    accumulate=2,
    fixed=10,
    working=8,
    kept={"none": 100, "blocks": 40, "full": 10},
    compute={"none": 3.0, "blocks": 3.2, "full": 4.0},
    traffic=1.0,
)


def test_cost_of_micro_batches_and_remat_policies():
    found = {(option.remat, option.accumulate): option for option in options(COSTS, rows=4)}
    assert set(found) == {(remat, n) for remat in COSTS.kept for n in (1, 2, 4)}
    assert found["none", 2] == Option("none", 2, 10 + 8 + 100, 3.0)
    assert found["full", 1] == Option("full", 1, 10 + 2 * (8 + 10), 4.0)
    assert found["blocks", 4] == Option("blocks", 4, 10 + (8 + 40) // 2, 3.2)


def test_traffic_grows_with_the_number_of_micro_batches():
    slow = {option.accumulate: option.seconds for option in options(COSTS, rows=16) if option.remat == "none"}
    assert slow == {1: 3.0, 2: 3.0, 4: 3.0, 8: 4.0, 16: 8.0}


def test_the_fastest_that_fits_comes_first():
    assert [(o.remat, o.accumulate) for o in suggest(COSTS, 4, 1000)] == [("none", 1), ("blocks", 1), ("full", 1)]
    assert [(o.remat, o.accumulate) for o in suggest(COSTS, 4, 120)] == [("none", 2), ("blocks", 1), ("full", 1)]
    assert [(o.remat, o.accumulate) for o in suggest(COSTS, 4, 60)] == [("blocks", 2), ("full", 1)]
    assert [(o.remat, o.accumulate) for o in suggest(COSTS, 4, 20)] == [("full", 4)]
    # If collectives take longest, fewer micro-batches are faster.
    assert [(o.remat, o.accumulate) for o in suggest(COSTS, 16, 25)] == [("blocks", 8), ("full", 4), ("none", 16)]


def test_nothing_fits():
    assert suggest(COSTS, 1, 45) == []
    assert suggest(COSTS, 64, 10) == []


def test_an_option_says_its_flags():
    assert Option("full", 4, 1, 1.0).flags == "--config.model.remat=full --config.accumulate=4"
