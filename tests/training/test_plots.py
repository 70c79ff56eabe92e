"""The plot of a run."""

import math

import pytest

from osdn_jax.training import plots


def rows(slope, start=3.0):
    train = [
        {"step": s, "tokens": 1000 * s, "train/bits_per_byte": start * s**-slope + 1.2 + 0.05 * math.sin(s * s)}
        for s in range(1, 401)
    ]
    held_out = [
        {"step": s, "tokens": 1000 * s, "validation/bits_per_byte": start * s**-slope + 1.25}
        for s in range(50, 401, 50)
    ]
    return sorted(train + held_out, key=lambda row: row["step"])


def test_plot_is_a_png_of_1200_by_750(tmp_path):
    path = tmp_path / "loss.png"
    plots.plot_loss({"osdn": rows(0.3), "delta_net": rows(0.25)}, path, lines={"xz -9": 2.2}, title="Bits per byte")
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(data[16:20]), int.from_bytes(data[20:24])) == (1200, 750)
    assert [p.name for p in tmp_path.iterdir()] == ["loss.png"]


def test_plot_needs_no_global_state_and_takes_gaps(tmp_path):
    few = [
        {"step": 1, "tokens": 10, "train/bits_per_byte": None},
        {"step": 2, "tokens": 20, "train/bits_per_byte": 2.0},
    ]
    plots.plot_loss({"few": few}, tmp_path / "few.png", x="step")
    assert (tmp_path / "few.png").stat().st_size > 1000


def test_plot_without_anything_to_show_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"'empty' has neither 'train/bits_per_byte' nor 'validation/bits_per_byte'"):
        plots.plot_loss({"empty": [{"step": 1, "tokens": 1, "loss": 1.0}]}, tmp_path / "x.png")
    with pytest.raises(ValueError, match="no runs"):
        plots.plot_loss({}, tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []
