"""Plateau, transition, table and figure of curves made by hand."""

import pytest

from osdn_jax.sweep import (
    Plan,
    chance_of,
    default_threshold,
    make_variants,
    markdown,
    plateau,
    plot_sweep,
    summarise_plan,
    transition,
)

STEPS = [100 * i for i in range(31)]


def curve(at, level):
    """Return a curve that jumps to `level` at step `at`."""
    return [level if step >= at else 0.02 for step in STEPS]


def record(run, accuracy, diverged=False):
    return {
        "key": run.key,
        "seed": run.seed,
        "learning_rate": run.learning_rate,
        "steps": STEPS[: len(accuracy)],
        "accuracy": accuracy,
        "settings": run.variant.settings,
        "diverged": diverged,
        "cpu_seconds": 60.0,
        "trained_together": 1,
        "environment": {"device": "cpu", "cpu": "a processor", "jax": "0.0"},
    }


@pytest.fixture
def plan(tiny):
    return Plan(make_variants(tiny, ["delta_net", "pdn"]), [0, 1, 2], [1e-3, 1e-2], choose=True)


@pytest.fixture
def finished(plan):
    """delta_net: best at 1e-2, one seed without the transition; pdn: at 1e-3, one seed missing, one diverged."""
    done = {}
    for run in plan.runs({}):
        good = (run.variant.label == "delta_net") == (run.learning_rate == 1e-2)
        done[run.key] = record(run, curve(1000, 0.9) if good else curve(0, 0.1))
    for run in plan.runs(done):
        if run.key not in done and (run.variant.label, run.seed) != ("pdn", 2):
            late = run.variant.label == "delta_net" and run.seed == 2
            done[run.key] = record(run, curve(0, 0.03) if late else curve(2000, 0.7)[:25], diverged=not late)
    return done


def test_plateau_is_the_mean_of_the_last_tenth():
    accuracy = [0.0] * 28 + [0.6, 0.8, 1.0]
    assert plateau({"steps": STEPS, "accuracy": accuracy}) == pytest.approx(0.8)  # steps 2800, 2900 and 3000
    assert plateau({"steps": [0, 5], "accuracy": [0.0, 1.0]}) == 1.0
    assert plateau({"steps": [0, 5, 9], "accuracy": [0.0, 1.0, 0.5]}) == 0.75
    many = list(range(101))
    assert plateau({"steps": many, "accuracy": [0.0] * 91 + [1.0] * 10}) == 1.0


def test_transition_is_the_first_evaluation_at_the_threshold():
    run = {"steps": STEPS, "accuracy": curve(700, 0.5)}
    assert transition(run, 0.5) == 700
    assert transition(run, 0.51) is None


def test_the_threshold_is_half_way_from_chance_to_the_best(tiny):
    assert chance_of(tiny) == 0.5  # one of two values
    runs = [{"steps": STEPS, "accuracy": curve(0, level)} for level in (0.3, 0.9)]
    assert default_threshold(runs, 0.5) == pytest.approx(0.7)
    assert default_threshold(runs[:1], 0.5) == 0.5  # nothing is above chance


def test_summary(plan, finished):
    summary = summarise_plan(plan, finished, threshold=0.5)
    first, second = summary.rows
    assert (first.label, first.learning_rate, first.seeds) == ("delta_net", 1e-2, [0, 1, 2])
    assert first.plateaus == pytest.approx([0.9, 0.7, 0.03])
    assert first.mean == pytest.approx(0.5433, abs=1e-4)
    assert first.deviation == pytest.approx(0.4557, abs=1e-4)
    assert first.transitions == [1000, 2000, None]
    assert (second.learning_rate, second.seeds, second.reached) == (1e-3, [0, 1], [1000, 2000])
    assert summary.tried == [
        ("delta_net", [(1e-3, pytest.approx(0.1)), (1e-2, pytest.approx(0.9))]),
        ("pdn", [(1e-3, pytest.approx(0.9)), (1e-2, pytest.approx(0.1))]),
    ]
    assert summary.missing == 1


def test_table(plan, finished):
    text = markdown(plan, summarise_plan(plan, finished, threshold=0.5), "python -m osdn_jax.sweep X")
    assert "| delta_net | 0.01 | 3 | 54.3 | 45.6 | 3.0 to 90.0 | 1,500 (1,000 to 2,000) | 2 of 3 | 80.0 |" in text
    assert "| pdn | 0.001 | 2 | 80.0 | 14.1 | 70.0 to 90.0 | 1,500 (1,000 to 2,000) | 2 of 2 | 80.0 |" in text
    assert "| delta_net | 10.0 | 90.0 |" in text
    assert "    python -m osdn_jax.sweep X\n" in text
    assert "1 of 8 runs have not finished" in text
    assert "a test accuracy of at least 50.0 %" in text
    assert "a better one may lie outside: delta_net, pdn" in text
    assert "Diverged, and ended early: delta_net seed 1 at 0.01, pdn seed 1 at 0.001." in text


def test_a_grid_has_a_row_for_every_rate(tiny):
    plan = Plan(make_variants(tiny, ["pdn"]), [0], [1e-3, 1e-2])
    finished = {run.key: record(run, curve(0, 0.01)) for run in plan.runs({})}
    summary = summarise_plan(plan, finished)
    text = markdown(plan, summary, "")
    assert "| pdn | 0.001 | 1 | 1.0 | – | 1.0 to 1.0 | – | 0 of 1 | – |" in text
    assert "| pdn | 0.01 | 1 |" in text
    assert "first seed" not in text


def test_figure(plan, finished, tmp_path):
    summary = summarise_plan(plan, finished)
    plot_sweep(summary, tmp_path / "a.png", title="mqar", note="seeds 0 to 2")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no run has finished"):
        plot_sweep(summary._replace(rows=[]), tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()
