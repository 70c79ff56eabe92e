"""The rows of a run: each once, complete, and in TensorBoard's files too."""

import json
import math
import resource
import signal
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from osdn_jax.training import events as event_files
from osdn_jax.training.metrics import MetricsWriter, read_metrics


def steps(workdir):
    return [row["step"] for row in read_metrics(workdir / "metrics.jsonl")]


def write_steps(workdir, steps, **options):
    with MetricsWriter(workdir, **options) as writer:
        for step in steps:
            writer.write(step, {"train/loss": 1 / step, "run": options.get("resume_step") or 0})


def events(workdir):
    """Return [(step, tag, value)] of the event files (TensorFlow records: length, its CRC, the event, its CRC)."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir(), key=lambda p: p.stat().st_mtime_ns):
        data, at = path.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += size + 16
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            if event.HasField("session_log"):  # tells TensorBoard to discard this step and later ones
                found.append((event.step, "start", None))
    return found


def test_rows_are_json_lines_with_their_step(tmp_path):
    with MetricsWriter(tmp_path / "new") as writer:
        writer.write(1, {"a": jnp.float32(0.5), "b": np.int64(3), "c": True, "d": jnp.bfloat16(1.5), "e": [[2.0]]})
        lines = (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()  # while the writer is open
        assert [json.loads(line) for line in lines] == [{"step": 1, "a": 0.5, "b": 3, "c": 1, "d": 1.5, "e": 2.0}]
        writer.write(1, {"validation/loss": 2.0})
    assert read_metrics(tmp_path / "new")[1] == {"step": 1, "validation/loss": 2.0}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, jnp.float32(jnp.nan), jnp.bfloat16(jnp.inf)])
def test_what_is_not_finite_is_null(tmp_path, value):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": value})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": None}]


def test_what_is_no_number_is_refused_and_not_half_written(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(5, {"loss": 1.0})
        for bad in ("text", [1.0, 2.0], None):
            with pytest.raises(TypeError, match="'bad' is no number"):
                writer.write(6, {"loss": 1.0, "bad": bad})
        with pytest.raises(ValueError, match="'step'"):
            writer.write(6, {"step": 1.0})
        with pytest.raises(ValueError, match="step 4 comes after step 5"):
            writer.write(4, {"loss": 1.0})
    assert steps(tmp_path) == [5]


def test_resuming_drops_the_rows_that_will_be_written_again(tmp_path):
    write_steps(tmp_path, range(1, 11))
    write_steps(tmp_path, range(7, 9), resume_step=6)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [row["run"] for row in read_metrics(tmp_path)] == [0] * 6 + [6] * 2


def test_resuming_keeps_the_rows_of_the_checkpoint_itself(tmp_path):
    write_steps(tmp_path, [1, 2, 2, 3])
    write_steps(tmp_path, [3], resume_step=2)
    assert steps(tmp_path) == [1, 2, 2, 3]


def test_starting_again_from_the_beginning_drops_all(tmp_path):
    write_steps(tmp_path, [1, 2])
    write_steps(tmp_path, [1])
    assert steps(tmp_path) == [1]


@pytest.mark.parametrize("cut", ['{"step": 3, "lo', '{"step": 3, "name": "\xc3'])
def test_a_line_cut_short_by_a_crash_is_dropped(tmp_path, cut):
    write_steps(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(cut.encode("latin-1"))
    assert steps(tmp_path) == [1, 2]
    write_steps(tmp_path, [3], resume_step=2)
    assert steps(tmp_path) == [1, 2, 3]


def test_a_whole_line_that_lacks_only_its_newline_is_kept(tmp_path):
    write_steps(tmp_path, [1])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2}')
    write_steps(tmp_path, [3], resume_step=2)
    assert steps(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize(
    "bad",
    [
        '{"step": 1, "lo',
        "[1]",
        '{"loss": 1.0}',
        '{"step": 1, "loss": "1.0"}',
        '{"step": true}',
        '{"step": 1, "loss": [1.0]}',
        pytest.param("[" * 20_000, id="deep"),
        "\xff\xfe",
    ],
)
def test_damage_elsewhere_is_named_and_nothing_is_dropped(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + bad + '\n{"step": 2}\n')
    for call in (lambda: read_metrics(path), lambda: MetricsWriter(tmp_path, resume_step=2)):
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
            call()
    assert path.read_text().count("\n") == 3


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
        read_metrics(tmp_path)


def test_tensorboard_gets_the_same_numbers_and_is_told_what_to_forget(tmp_path):
    write_steps(tmp_path, [1, 2, 4])
    write_steps(tmp_path, [3], resume_step=2)
    found = events(tmp_path)
    assert [(s, v) for s, tag, v in found if tag == "train/loss"] == [
        (1, 1),
        (2, 0.5),
        (4, 0.25),
        (3, pytest.approx(1 / 3)),
    ]
    assert (3, "start", None) in found


# A full disk


@pytest.fixture
def limited():
    """Limit the size of files, for a real error of the operating system as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


def within(seconds, call):
    """Call in a separate thread, so that a hang fails only this test."""
    thread = threading.Thread(target=call, daemon=True)  # its exceptions fail the test, too
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it hangs"


@pytest.mark.parametrize("flush_seconds", [-1, 3600])
def test_event_files_that_cannot_be_written_are_one_warning(tmp_path, monkeypatch, caplog, flush_seconds):
    real = event_files.RecordWriter
    monkeypatch.setattr(event_files, "RecordWriter", lambda path: real("/dev/full"))
    monkeypatch.setattr(event_files, "_FLUSH_SECONDS", flush_seconds)
    within(120, lambda: write_steps(tmp_path, range(1, 2001)))
    assert steps(tmp_path) == list(range(1, 2001))
    (record,) = caplog.records
    assert f"{tmp_path / 'tensorboard'}: [Errno 28] No space left on device" in record.getMessage()


def test_event_files_without_a_folder_are_one_warning(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("a file")
    within(60, lambda: write_steps(tmp_path, [1, 2]))
    assert steps(tmp_path) == [1, 2]
    assert len(caplog.records) == 1


def test_a_row_that_cannot_be_written_names_the_file_and_leaves_no_part(tmp_path, limited):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 1.0})
        limited((tmp_path / "metrics.jsonl").stat().st_size + 10)
        with pytest.raises(OSError, match=r"File too large: '.*/metrics\.jsonl'"):
            writer.write(2, {"loss": 1.0})
        assert steps(tmp_path) == [1]
        limited(resource.RLIM_INFINITY)
        writer.write(2, {"loss": 1.0})
    assert steps(tmp_path) == [1, 2]


def test_rewriting_the_rows_on_a_full_disk_names_the_file_and_keeps_it(tmp_path, limited):
    write_steps(tmp_path, range(1, 20))
    limited(100)
    with pytest.raises(OSError, match=r"'.*/metrics\.jsonl'"):
        MetricsWriter(tmp_path, resume_step=10)
    limited(resource.RLIM_INFINITY)
    assert steps(tmp_path) == list(range(1, 20))
