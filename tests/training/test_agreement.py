"""All processes start, or none does. The other processes' reports are simulated; test_distributed.py has real ones."""

import jax
import pytest

from osdn_jax.training import ConfigError, WorkdirConfigError, agreement, distributed
from support.runs import tiny_config

pytestmark = pytest.mark.slow


@pytest.fixture
def two(monkeypatch):
    """Set the report of the other of two processes; return the report of this one, the first, and whether it left."""
    heard = {"reports": [], "left": False}

    def other(failed=None, run=None):
        def gather(report):
            heard["reports"].append(report)
            return [report, {"failed": failed, "run": report["run"] if run is None else run}]

        monkeypatch.setattr(agreement, "_gather", gather)
        return heard

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(agreement, "_check_devices", lambda reason: None)
    monkeypatch.setattr(agreement, "_outcome", None)
    monkeypatch.setattr(distributed, "leave", lambda: heard.update(left=True))
    return other


def test_a_run_is_described_by_all_that_it_depends_on(two):
    config = tiny_config("text", optimizer__learning_rate=2e-3)
    run = agreement.describe(config, workdir="runs/a")
    assert {
        "optimizer.learning_rate": 2e-3,
        "data.path": "text",
        "mesh.fsdp": 1,
        "workdir": "runs/a",
    }.items() <= run.items()
    assert {"jax", "osdn_jax"} <= set(run)
    two()
    agreement.agree(run)
    two(run=run | {"optimizer.learning_rate": 1e-3, "new": 1})
    words = (
        "new: got .absent. in process 0 and 1 in process 1.*; optimizer.learning_rate: got 0.002 in process 0 and 0.001"
    )
    with pytest.raises(ConfigError, match=words):
        agreement.agree(run)


def test_a_failure_of_another_ends_this_one(two):
    two(failed="no such file: 'a'")
    with pytest.raises(ConfigError, match="^process 1 failed: no such file: 'a'$"):
        agreement.agree({})
    with pytest.raises(ConfigError, match="^process 0 failed: a; process 1 failed: no such file: 'a'$"):
        agreement.fail(ValueError("a"))


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (ValueError("a\n  b"), ConfigError, "a b"),
        (FileNotFoundError(2, "No such file", "x"), ConfigError, "[Errno 2] No such file: 'x'"),
        (WorkdirConfigError("another run"), WorkdirConfigError, "another run"),
        (KeyError("x"), KeyError, "KeyError('x')"),
        (RuntimeError("out of memory"), RuntimeError, "RuntimeError('out of memory')"),
        (KeyboardInterrupt(), KeyboardInterrupt, "interrupted"),
    ],
)
def test_this_one_says_why_it_fails(two, error, kind, told):
    heard = two()
    with pytest.raises(kind) as raised:
        agreement.fail(error)
    assert heard["reports"] == [{"failed": told, "run": {}}]
    users = isinstance(raised.value, ConfigError)
    assert heard["left"] != users  # the command line leaves for the user's mistakes
    if users:
        assert str(raised.value) == f"process 0 failed: {told}"
    else:
        assert raised.value is error


def test_alone_an_error_is_what_it_was():
    with pytest.raises(ConfigError, match="^a\n  b$"):
        agreement.fail(ValueError("a\n  b"))
    with pytest.raises(KeyError):
        agreement.fail(KeyError("a"))
    error = ConfigError("a")
    assert agreement.tell(error, ["train.py", "--config=a"]) is error


def test_what_the_first_one_makes_is_there_for_all(two, tmp_path, monkeypatch):
    monkeypatch.setattr(agreement, "_PATIENCE", 0.0)
    heard, file = two(), tmp_path / "config.json"
    agreement.by_first(file.touch, file)
    assert [report["failed"] for report in heard["reports"]] == [None, None]

    monkeypatch.setattr(distributed, "is_primary", lambda: False)
    missing = tmp_path / "elsewhere" / "config.json"
    words = f"{missing.parent} is not the first process's; expected a directory that all share"
    with pytest.raises(ConfigError, match=words):
        agreement.by_first(lambda: pytest.fail("not the first"), missing)
    assert heard["reports"][-1]["failed"] == words


def test_processes_with_unequal_devices(monkeypatch):
    class Device:
        def __init__(self, process):
            self.process_index = process

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "devices", lambda: [Device(0), Device(0), Device(1)])
    with pytest.raises(ConfigError, match="devices: got 2 in process 0 and 1 in process 1, expected the same in all"):
        agreement.agree({})
