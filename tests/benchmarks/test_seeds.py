"""Seeds of the demo's models: what is trained, what is read, and the record."""

import json
import subprocess

import pytest

from benchmarks import seeds
from osdn_jax.training import default_config
from osdn_jax.training.workdir import save_config


@pytest.fixture
def trained(monkeypatch):
    """Replace train.py; return the command lines that were started."""
    lines = []

    def run(line, *, cwd, check):
        assert check
        lines.append(line)
        [workdir] = [part.removeprefix("--workdir=") for part in line if part.startswith("--workdir=")]
        finished(seeds.Path(workdir), bits=2.5 + 0.01 * len(lines), flags=line)

    monkeypatch.setattr(subprocess, "run", run)
    return lines


def finished(workdir, bits, flags, steps=3):
    workdir.mkdir(parents=True, exist_ok=True)
    config = default_config()
    name, _, seed = workdir.name.rpartition("-")
    config.seed, config.steps = int(seed), steps
    for key, value in seeds.VARIANTS[name][0].items():
        config.model[key] = value
    save_config(workdir, config)
    rows = [{"step": 1, "validation/bits_per_byte": 9.0}, {"step": steps, "validation/bits_per_byte": bits}]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_trains_what_is_missing_and_writes_the_record(tmp_path, trained):
    finished(tmp_path / "runs" / "osdn-1", bits=2.25, flags=())
    arguments = ["--variants=osdn,fixed_d", "--seeds=2", "--steps=3", f"--runs={tmp_path}/runs", f"--out={tmp_path}"]
    record = seeds.main(arguments)
    assert record["bits_per_byte"] == {
        "delta_net": [2.51, pytest.approx(2.54)],
        "osdn": [2.52, 2.25],
        "fixed_d": [2.53, 2.55],
    }
    assert len(trained) == 5
    assert trained[2][2:-1] == [
        "--config=configs/demo.py:rule=osdn,seed=0,steps=3",
        "--config.model.eta=0.0",
        "--config.model.initial=1.0",
        "--config.model.forget=False",
    ]
    assert json.loads((tmp_path / "demo-seeds.json").read_text()) == record
    page = (tmp_path / "demo-seeds.md").read_text()
    assert "| `osdn` | 2.3850 | 0.1909 | 2.5200 | 2.2500 | -0.1400 ± 0.1500 | 1 of 2 |" in page
    assert seeds.main(arguments)["bits_per_byte"] == record["bits_per_byte"]
    assert len(trained) == 5


def test_another_run_under_the_name_is_refused(tmp_path, trained, capsys):
    finished(tmp_path / "delta_net-0", bits=2.0, flags=(), steps=4)
    with pytest.raises(SystemExit):
        seeds.main(["--seeds=2", "--steps=3", f"--runs={tmp_path}", f"--out={tmp_path}"])
    assert (
        "delta_net-0: got a run with {'rule': 'delta_net', 'seed': 0, 'steps': 4}, expected" in capsys.readouterr().err
    )
    assert trained == []


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--variants=osnd", "--variants: got osnd, expected some of"),
        ("--seeds=1", "--seeds: got 1, expected at least 2"),
    ],
)
def test_bad_arguments(argument, said, capsys):
    with pytest.raises(SystemExit):
        seeds.main([argument])
    assert said in capsys.readouterr().err


def test_a_difference_is_of_the_same_seed():
    found = seeds.difference([2.0, 2.2, 2.4], [2.1, 2.4, 2.4])
    assert found == {"mean": pytest.approx(-0.1), "standard_error": pytest.approx(0.1 / 3**0.5), "lower": 2}
