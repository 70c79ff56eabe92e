"""train(..., on_metrics=…): the rows of metrics.jsonl as they are written, for other trackers."""

import math
import shutil

import pytest

from osdn_jax.training import MetricsWriter, read_metrics, train
from support.runs import finished, text, tiny_config


def collector():
    """(function for on_metrics, the rows that it is called with, as metrics.jsonl has them)."""
    seen = []

    def on_metrics(step, values):
        assert type(step) is int
        assert type(values) is dict
        assert {type(value) for value in values.values()} == {float}
        seen.append({"step": step} | values)
        values.clear()  # the dict is the callable's own

    return on_metrics, seen


@pytest.mark.slow
def test_it_gets_exactly_the_rows_that_are_written_after_resuming_too(tmp_path):
    config = tiny_config(text(), validation__every=10)
    on_metrics, seen = collector()
    train(config, tmp_path, stop_at=11, on_metrics=on_metrics)
    assert seen == read_metrics(tmp_path)
    kinds = ["validation" if "validation/bits_per_byte" in row else "training" for row in seen if row["step"] == 10]
    assert kinds == ["training", "validation"]
    train(config, tmp_path, stop_at=13, on_metrics=on_metrics)
    assert [row["step"] for row in seen] == [*range(1, 11), 10, 11, 12, 13]
    assert seen == read_metrics(tmp_path)


def test_a_run_that_is_resumed_from_an_older_checkpoint_passes_the_repeated_rows_again(tmp_path):
    workdir = shutil.copytree(finished()[0], tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "40")  # as if killed after step 30
    on_metrics, seen = collector()
    train(tiny_config(text()), workdir, on_metrics=on_metrics)
    assert seen == [row for row in read_metrics(workdir) if row["step"] > 30]
    assert [row["step"] for row in seen] == [*range(31, 41), 40]


def test_a_tracker_with_a_log_method_takes_one_line(tmp_path):
    class Run:  # has the method `log` of a run of Weights & Biases
        def __init__(self):
            self.history = {}

        def log(self, data, step):
            self.history.setdefault(step, {}).update(data)

    run = Run()
    train(tiny_config(text()), tmp_path, stop_at=2, on_metrics=lambda step, values: run.log(values, step=step))
    assert list(run.history) == [1, 2]
    assert run.history[2]["tokens"] == 2 * 2 * 24


def test_its_exception_ends_the_run_and_says_where_it_is_from(tmp_path):
    class Enough(Exception):
        pass

    def on_metrics(step, values):
        if step == 3:
            raise Enough("quota")

    config = tiny_config(text())
    with pytest.raises(Enough, match="quota") as error:
        train(config, tmp_path, on_metrics=on_metrics)
    assert error.value.__notes__ == ["raised by on_metrics, called with the metrics of step 3"]
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    assert train(config, tmp_path, stop_at=1).step == 1  # the directory is free, and the run starts again


@pytest.mark.parametrize("wrong", [3, "print", [print]])
def test_what_cannot_be_called_is_refused_before_anything_is_made(tmp_path, wrong):
    with pytest.raises(TypeError, match=r"^on_metrics: got .*, expected a callable"):
        train(tiny_config(text()), tmp_path / "run", on_metrics=wrong)
    assert not (tmp_path / "run").exists()


def test_numbers_that_are_not_finite_are_passed_as_they_are(tmp_path):
    on_metrics, seen = collector()
    with MetricsWriter(tmp_path, on_metrics=on_metrics) as metrics:
        metrics.write(1, {"loss": float("nan"), "count": 2})
    assert math.isnan(seen[0]["loss"])
    assert read_metrics(tmp_path) == [{"step": 1, "loss": None, "count": 2}]


def test_a_process_that_does_not_write_does_not_call(tmp_path):
    on_metrics, seen = collector()
    with MetricsWriter(tmp_path, enabled=False, on_metrics=on_metrics) as metrics:
        metrics.write(1, {"loss": 1.0})
    assert seen == []
