"""Tests of the README: its example, its links and its table of rules."""

import os
import re
import subprocess
import sys
from pathlib import Path

from flax import nnx

from osdn_jax import interop
from osdn_jax.nn import CausalLM, ModelConfig, mixer_config
from support.corpora import write_tokenizer

_ROOT = Path(__file__).parent.parent
_README = (_ROOT / "README.md").read_text()
_EXAMPLES = re.findall(r"```python\n(.*?)```", _README, flags=re.DOTALL)


def test_example_runs_as_printed():
    run = _run(_EXAMPLES[0])
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == "(2, 1000, 4, 64) (2, 4, 64, 64) True".split()


def test_the_example_of_other_libraries_models_runs(tmp_path):
    mixer = mixer_config("gated_delta_net", width=16, heads=2, key_dim=8, value_dim=8)
    model = CausalLM(ModelConfig(vocab_size=290, layers=1, mixer=mixer, mlp_dim=16), rngs=nnx.Rngs(0))
    interop.save_pretrained(model, tmp_path / "folder", layout="gated_deltanet")
    write_tokenizer(tmp_path / "folder/tokenizer.json")
    run = _run(_EXAMPLES[1].replace("path/to", str(tmp_path)))
    assert run.returncode == 0, run.stderr
    assert interop.load_pretrained(tmp_path / "another").config.stack[0].mixer.preconditioner == "gram"


def _run(example):
    """Run an example as a reader does, with the optimisations that the tests do without."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    line = [sys.executable, "-c", example]
    return subprocess.run(line, cwd=_ROOT, env=plain, capture_output=True, text=True, check=False)


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", _README)
    assert [link for link in links if not link.startswith("https://") and not (_ROOT / link).exists()] == []


def test_every_rule_has_a_row():
    from osdn_jax import ops

    rules = [name for name in ops.__all__ if "rule" not in name and name.islower()]
    rules = [name for name in rules if not name.startswith(("hypergradient", "gram", "exact_gram", "squares"))]
    rows = "\n".join(line for line in _README.splitlines() if line.startswith("| `"))
    assert [name for name in rules if f"`{name}`" not in rows] == []
