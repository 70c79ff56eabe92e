"""Atomic writes, and errors that name the file."""

import errno
import os

import pytest

from osdn_jax import _files
from osdn_jax._files import write_atomically
from osdn_jax.training.plots import plot_loss


def test_write_atomically_keeps_the_old_content_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(_files.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("broken", ["open", "fsync", "replace"])
def test_errors_of_the_disk_name_the_file_whatever_fails(tmp_path, monkeypatch, broken):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, broken, fail)
    for write in (
        lambda: write_atomically(tmp_path / "config.json", "{}"),
        lambda: plot_loss({"osdn": [{"tokens": 1, "train/bits_per_byte": 3.0}]}, tmp_path / "loss.png"),
    ):
        with pytest.raises(OSError, match=r"No space left on device: '.*/(config\.json|loss\.png)'$"):
            write()
