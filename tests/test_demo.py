"""`make demo`, with models of a second."""

import re
import struct

import pytest

from osdn_jax import demo
from osdn_jax.training import ConfigError
from support.runs import text

CONFIG = """
from osdn_jax.training import parse_arg
from support.runs import tiny_config

def get_config(arg=None):
    return tiny_config({path!r}, model__rule=parse_arg(arg, rule="osdn").rule)
"""


@pytest.fixture
def configured(tmp_path, monkeypatch):
    (tmp_path / "demo.py").write_text(CONFIG.format(path=str(text())))
    monkeypatch.setattr(demo, "_CONFIG", tmp_path / "demo.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path


def parts(out):
    """(rows of the table by name, the sample)."""
    table = {}
    for line in out.splitlines():
        cells = [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]
        if len(cells) == 4:
            table[cells[0]] = cells[1:]
    sample = re.search(r"300 characters from the OSDN model:\n\n(.*)\n\n\d+ min \d+ s in all", out, re.DOTALL)
    return table, sample[1]


def test_the_demo(configured, capsys):
    demo.main()
    table, sample = parts(capsys.readouterr().out)
    assert list(table) == ["model", "OSDN", "DeltaNet", "gzip -9", "xz -9"]
    parameters = [int(table[name][0].replace(",", "")) for name in ("OSDN", "DeltaNet")]
    assert parameters[0] - parameters[1] == 2 * 8 + 16 * 2 + 2  # d_0 and the gate of forgetting
    for name in ("OSDN", "DeltaNet", "gzip -9", "xz -9"):
        assert 0.5 < float(table[name][1]) < 8
    for name in ("OSDN", "DeltaNet"):
        assert float(table[name][2].replace(",", "")) > 0
    header = (configured / "runs" / "demo" / "loss.png").read_bytes()[:24]
    assert struct.unpack(">II", header[16:]) == (1200, 750)
    assert {path.name for path in (configured / "runs" / "demo").iterdir()} == {"osdn", "delta_net", "loss.png"}
    assert len(sample) == 300

    demo.main()  # again: everything is there already
    out = capsys.readouterr().out
    assert out.count("going on from the checkpoint of step 40 of 40") == 2
    assert parts(out) == (table, sample)


def test_outside_a_checkout_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_CONFIG", tmp_path / "nothing.py")
    with pytest.raises(ConfigError, match="nothing.py is not there: the demo runs in a checkout"):
        demo.main()
