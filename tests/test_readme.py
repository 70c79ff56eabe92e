"""Tests of the README: its example, its links and its table of rules."""

import os
import re
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parent.parent
_README = (_ROOT / "README.md").read_text()


def test_example_runs_as_printed():
    (example,) = re.findall(r"```python\n(.*?)```", _README, flags=re.DOTALL)
    # As a reader has it, with the optimisations that the tests do without.
    plain = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    line = [sys.executable, "-c", example]
    run = subprocess.run(line, cwd=_ROOT, env=plain, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == "(2, 1000, 4, 64) (2, 4, 64, 64) True".split()


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", _README)
    assert [link for link in links if not link.startswith("https://") and not (_ROOT / link).exists()] == []


def test_every_rule_has_a_row():
    from osdn_jax import ops

    rules = [name for name in ops.__all__ if "rule" not in name and name.islower()]
    rules = [name for name in rules if not name.startswith(("hypergradient", "gram", "exact_gram"))]
    rows = "\n".join(line for line in _README.splitlines() if line.startswith("| `"))
    assert [name for name in rules if f"`{name}`" not in rows] == []
