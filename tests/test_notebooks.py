"""The notebooks run, in reduced form, and are committed with the outputs of a whole run."""

import json
from pathlib import Path

import matplotlib
import pytest

pytestmark = pytest.mark.slow

_NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
_REDUCED = {"LENGTH": 256, "REPEATS": 1}


def _code_cells(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", _NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_in_reduced_form(path, monkeypatch):
    # The notebook is written for a reader's settings, not for the strict ones of the tests.
    import jax

    matplotlib.use("Agg")
    namespace: dict = {}
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        for cell in _code_cells(path):
            exec(compile("".join(cell["source"]), str(path), "exec"), namespace)
            if "parameters" in cell["metadata"].get("tags", []):
                assert set(_REDUCED) <= set(namespace)
                namespace |= _REDUCED
    import matplotlib.pyplot as plt

    assert plt.get_fignums()
    plt.close("all")
    assert namespace["lengths"] == [256]
    assert namespace["difference"] < 1e-4
    assert namespace["errors"]["exact_pdn"][-1] < namespace["errors"]["delta_net"][-1]


@pytest.mark.parametrize("path", _NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_with_its_outputs_and_small(path):
    cells = _code_cells(path)
    counts = [cell["execution_count"] for cell in cells]
    assert counts == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 4
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert path.stat().st_size < 400_000


def test_there_is_a_notebook():
    assert _NOTEBOOKS
