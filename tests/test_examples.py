"""The examples run and print what their docstrings say; README.md lists each of them."""

import re
import runpy
from pathlib import Path

import jax
import pytest

pytestmark = pytest.mark.slow

_ROOT = Path(__file__).parent.parent
_EXAMPLES = sorted(path for path in (_ROOT / "examples").glob("*.py") if path.name != "demo.py")  # tests/test_demo.py


@pytest.mark.parametrize("path", _EXAMPLES, ids=lambda path: path.stem)
@pytest.mark.usefixtures("our_checks")
def test_example_runs(path, capsys):
    # As a reader runs it, not with the strict settings of the tests.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        runpy.run_path(str(path))
    lines = capsys.readouterr().out.splitlines()
    last = [float(re.findall(r"\d[\d.]*(?:e[+-]\d+)?", line)[-1]) for line in lines]
    match path.stem:
        case "own_model":
            assert re.fullmatch(r"loss of the first step \d\.\d\d, of the last 0\.[012]\d", lines[0])
        case "own_preconditioner":
            plain, preconditioned = map(float, re.findall(r"\d\.\d+e[+-]\d+", lines[0]))
            assert preconditioned < 1e-3 * plain
        case "prefill_and_decode":
            assert max(last) < 1e-5
        case "split_sequence":
            assert lines[0] == "8 devices, 128 of 1024 tokens on each"
            assert max(last[1:]) < 1e-5
        case _:
            pytest.fail(f"say here what {path.name} prints")


@pytest.mark.parametrize("path", _EXAMPLES, ids=lambda path: path.stem)
def test_example_is_short_and_listed(path):
    assert len(path.read_text().splitlines()) < 60
    assert f"(examples/{path.name})" in (_ROOT / "README.md").read_text()
    assert f"python examples/{path.name}" in path.read_text().splitlines()[0]
