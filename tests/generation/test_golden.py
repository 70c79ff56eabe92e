"""Checkpoints of other libraries, continued in padded batches: the logits that those libraries give."""

import os
from pathlib import Path

import numpy as np
import pytest

from osdn_jax import interop
from osdn_jax.generation import Generator

FOLDERS = sorted(Path(os.environ.get("OSDN_GOLDEN_DIR", "/nowhere"), "models").glob("*"))
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not FOLDERS, reason="OSDN_GOLDEN_DIR has no models")]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_prefill_gives_the_logits_of_the_other_library(folder):
    expected = np.load(folder / "expected.npz")
    ids, logits = expected["input_ids"], expected["logits"]
    places = (1, ids.shape[1] // 2, ids.shape[1])
    generator = Generator(interop.load_pretrained(folder), piece=16)
    state = generator.prefill([row[:place] for row in ids for place in places])
    want = np.stack([row[place - 1] for row in logits for place in places])
    np.testing.assert_allclose(generator.logits(state), want, atol=1e-5)
