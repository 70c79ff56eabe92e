"""A run of version 0.1.0 still loads, generates and resumes, with the numbers of that version (data/README.md)."""

import json
import tarfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from osdn_jax.generate import generate
from osdn_jax.training import default_config, load_config, load_trained, train
from osdn_jax.training.config import flatten
from support.runs import rows

DATA = Path(__file__).parent / "data"
EXPECTED = json.loads((DATA / "run_0.1.0.json").read_text())


@pytest.fixture
def old(tmp_path):
    with tarfile.open(DATA / "run_0.1.0.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "0.1.0"


def test_it_loads_and_generates(old):
    run = load_trained(old)
    assert run.step == EXPECTED["step"]
    ids = jnp.asarray(run.tokenizer.encode(EXPECTED["prompt"], bos=True))
    logits, _ = run.apply(run.parameters, ids[None])
    np.testing.assert_allclose(logits[0, -2:], EXPECTED["logits"], rtol=1e-4, atol=1e-5)
    assert "".join(generate(old, "ROMEO:", tokens=24, temperature=0.0)) == EXPECTED["likeliest"]


@pytest.mark.slow
def test_it_resumes(old):
    config = default_config()  # of this version, as the same command has it
    config.update_from_flattened_dict(flatten(load_config(old)))
    train(config, old, stop_at=6)
    for row, expected in zip(rows(old), EXPECTED["rows"], strict=True):
        assert row == pytest.approx(expected, rel=1e-4)
