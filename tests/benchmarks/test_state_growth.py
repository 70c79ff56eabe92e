"""The search for keys and gates under which a state grows."""

import re

import jax
import pytest

from benchmarks import state_growth

SMALL = ["--channels", "2", "--cycles", "2", "--steps", "40", "--searches", "1"]


@pytest.mark.slow
def test_it_finds_growth_where_there_is_some_and_none_where_there_is_not(capsys):
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        state_growth.main(["--rules", "any_d,trust", *SMALL])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if re.search(r"\d\.\d{4}", line)]
    (_, _, grows, _, _), (_, _, bounded, _, _) = rows
    assert 1.06 < float(grows) < 1.0839  # the largest norm of one token
    assert float(bounded) <= 1.0001


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rules", "osdm"], "--rules: got 'osdm', expected some of gdn2, any_d"),
        (["--channels", "two"], "--channels and --cycles: expected integers with commas between them"),
        (["--steps", "0"], "--channels, --cycles, --steps and --searches: expected at least 1"),
    ],
)
def test_wrong_flags_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        state_growth.main(arguments)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
