"""An installation without extras: ops and nn work, and what lacks a library names the extra that installs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Only the core dependencies, and what they depend on, can be imported.
SCRIPT = """
import importlib, json, sys, tomllib
from importlib import metadata
from packaging.requirements import Requirement

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
pending, allowed = [Requirement(line) for line in project["dependencies"]], set()
while pending:
    requirement = pending.pop()
    if requirement.name not in allowed:
        allowed.add(requirement.name)
        for line in metadata.requires(requirement.name) or []:
            needed = Requirement(line)
            if not needed.marker or any(needed.marker.evaluate({"extra": e}) for e in ("", *requirement.extras)):
                pending.append(needed)
name = lambda distribution: distribution.lower().replace("_", "-")
allowed = {name(distribution) for distribution in allowed}
blocked = {
    module
    for module, distributions in metadata.packages_distributions().items()
    if not {name(distribution) for distribution in distributions} & {*allowed, "osdn-jax"}
}

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
from osdn_jax import generation, nn, ops
from osdn_jax.regression import markdown, run_bench

messages = {}
for module in sys.argv[1:]:
    try:
        importlib.import_module(module)
    except ImportError as error:
        messages[module] = str(error)
print(json.dumps([sorted(blocked), messages]))
"""
NEED_TRAIN = {
    "osdn_jax.data": "grain",
    "osdn_jax.diagnose": "grain",
    "osdn_jax.evaluation": "grain",
    "osdn_jax.generate": "ml_collections",
    "osdn_jax.planning": "ml_collections",
    "osdn_jax.plotting": "matplotlib",
    "osdn_jax.sweep": "matplotlib",
    "osdn_jax.training": "ml_collections",
}


@pytest.fixture(scope="module")
def core():
    line = [sys.executable, "-c", SCRIPT, *NEED_TRAIN]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_ops_and_nn_need_the_core_alone(core):
    blocked, _ = core
    assert {"grain", "matplotlib", "ml_collections", "pyarrow", "tensorboardX", "tokenizers"} <= set(blocked)


@pytest.mark.parametrize("module", NEED_TRAIN)
def test_the_message_names_the_extra(core, module):
    message = core[1][module]
    assert f"needs the library {NEED_TRAIN[module]}: pip install 'osdn-jax[train]'" in message
    assert "in a checkout pip install -e '.[train]'" in message
