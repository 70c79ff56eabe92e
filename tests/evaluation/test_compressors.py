"""Bits per byte of general-purpose compressors."""

import gzip
import lzma

import pytest

from osdn_jax.data import shakespeare
from osdn_jax.evaluation import compressed_bits_per_byte


def test_compressors_on_the_held_out_text():
    figures = compressed_bits_per_byte(b"".join(work.text for work in shakespeare("validation")))
    # Other releases of the compressors may differ in the last digit.
    assert figures == pytest.approx({"gzip -9": 3.114, "xz -9": 2.698}, abs=5e-3)


def test_compressed_size_in_bits_per_byte():
    data = bytes(range(256)) * 8
    assert compressed_bits_per_byte(data) == {
        "gzip -9": 8 * len(gzip.compress(data, 9)) / 2048,
        "xz -9": 8 * len(lzma.compress(data, preset=9)) / 2048,
    }


@pytest.mark.parametrize(("data", "error"), [(b"", ValueError), ("text", TypeError)])
def test_compressors_reject(data, error):
    with pytest.raises(error, match="data must"):
        compressed_bits_per_byte(data)
