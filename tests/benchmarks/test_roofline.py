"""Roofline bounds and shares, counted by hand."""

import pytest

from benchmarks.gpu import roofline
from osdn_jax.compare import Shape
from support.gpu_records import SHAPE


def test_roofline_bounds_are_those_counted_by_hand():
    one = Shape(1, 1, 1, 1, 128, 128)
    assert roofline.least_flops(one, False) == 163_840
    assert roofline.least_flops(one, True) == 3 * 163_840
    sizes = dict.fromkeys("qkwv", 256)
    assert roofline.least_bytes(sizes, 256, False) == 1280
    assert roofline.least_bytes(sizes, 256, True) == 1280 + 4 * 256 + 256 + 4 * 256
    assert roofline.shares(1e-3, 10**9, 10**11, roofline.Ceilings(4e12, 4e14)) == pytest.approx((0.25, 0.25))
    assert roofline.per_head_and_token(1e-3, SHAPE) == pytest.approx(1.907, abs=1e-3)
