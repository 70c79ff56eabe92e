"""The notebooks run, in reduced form, and are committed with the outputs of a whole run."""

import json
from pathlib import Path

import matplotlib
import pytest

pytestmark = pytest.mark.slow

_NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def _one_operator(namespace):
    assert namespace["lengths"] == [256]
    assert namespace["difference"] < 1e-4
    assert namespace["errors"]["exact_pdn"][-1] < namespace["errors"]["delta_net"][-1]


def _what_the_preconditioner_does(namespace):
    """The findings that the text states."""
    assert namespace["difference"] < 1e-12
    last = {name: errors[:, -30:].mean() for name, (errors, _, _, _) in namespace["results"].items()}
    delta_net, matched = last["DeltaNet = OSDN from d = 1"], last["DeltaNet, step of PDN, x = 2"]
    assert last["PDN, x = 2"] < 0.7 * min(delta_net, matched)
    assert last["OSDN, η = 1, from d = 0"] > 3 * delta_net
    assert namespace["slopes"]["OSDN, η = 1, from d = 0"] > 0.3
    assert namespace["slopes"]["PDN, x = 2"] < -0.1
    batch = namespace["batch"]
    assert batch[3.0, False][-1] < 1e-20 < 1e-12 < batch[3.0, True][-1]
    ratios, losses = (
        {name: x[part][1] for (name, noise), x in namespace["curves"].items() if noise == 0} for part in (0, 1)
    )
    aware = "OSDN, beta-aware, η = 1, from d = 1"
    assert ratios[aware] < 0.1 * ratios["DeltaNet"]
    assert losses[aware] > losses["DeltaNet"]
    errors = namespace["scale_errors"]
    assert errors["OSDN, η = 0.1, from d = 1"][-1] < 1e-3 < 1 < errors["DeltaNet"][-1]


def _recall_from_config_to_figure(namespace):
    assert all(curve.steps == [0, 2, 4] for curve in namespace["curves"].values())
    twice = namespace["sweeps"]["read twice"]
    assert len(twice["osdn_from_2"].reached) == len(twice["pdn"].reached) == 5
    assert twice["osdn_from_2"].mean > twice["delta_net_pdn_step"].mean > twice["osdn_paper"].mean
    assert min(len(row.seeds) for labels in namespace["sweeps"].values() for row in labels.values()) == 5


def _other_libraries_models(namespace):
    assert namespace["again"] == namespace["whole"]
    assert max(namespace["differences"].values()) < 1e-5
    assert list(namespace["written"].values()) == ["gated_deltanet", "osdn_jax", "precond_gated_deltanet"]
    assert namespace["sizes"]["delta rule"][0] == namespace["sizes"]["delta rule"][-1]
    assert len(namespace["curves"]) == 3


# The parameters of a reduced run, and what holds after it.
_REDUCED = {
    "01_one_operator": ({"LENGTH": 256, "REPEATS": 1}, _one_operator),
    "02_what_the_preconditioner_does": (
        {"SEEDS": 2, "TOKENS": 300, "SIZE": 8, "POINTS": 3},
        _what_the_preconditioner_does,
    ),
    "04_other_libraries_models": ({"PRETRAINING": 8, "TUNING": 8, "TOKENS": 4, "WINDOWS": 2}, _other_libraries_models),
    "03_recall_from_config_to_figure": ({"STEPS": 4, "EVERY": 2, "EXAMPLES": 8}, _recall_from_config_to_figure),
}


def _code_cells(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", _NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_in_reduced_form(path, monkeypatch):
    # The notebook is written for a reader's settings, not for the strict ones of the tests.
    import jax

    matplotlib.use("Agg")
    parameters, check = _REDUCED[path.stem]
    namespace: dict = {}
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        for cell in _code_cells(path):
            exec(compile("".join(cell["source"]), str(path), "exec"), namespace)
            if "parameters" in cell["metadata"].get("tags", []):
                assert set(parameters) <= set(namespace)
                namespace |= parameters
    import matplotlib.pyplot as plt

    assert plt.get_fignums()
    plt.close("all")
    check(namespace)


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
