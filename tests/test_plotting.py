"""Placement of labels."""

import numpy as np
import pytest

from osdn_jax.plotting import label_ends, new_canvas, spread, style_axes


@pytest.mark.parametrize("places", [[0.5], [0.1, 0.1, 0.1], [0.0, 0.9, 0.95, 1.0], [0.2, 0.5, 0.8], []])
def test_labels_are_apart_and_inside(places):
    found = spread(places, 0.1)
    assert len(found) == len(places)
    assert np.all(np.diff(found) >= 0.1 - 1e-12)
    assert all(-1e-12 <= place <= 1 + 1e-12 for place in found)
    if np.all(np.diff(places) >= 0.1):
        np.testing.assert_allclose(found, places, atol=1e-15)


def test_labels_that_do_not_fit_start_at_the_bottom():
    assert spread([0.9, 0.9, 0.9], 0.6) == pytest.approx([0.0, 0.6, 1.2])


@pytest.mark.parametrize(("scale", "middle"), [("linear", 50.5), ("log", 10.0)])
def test_a_label_is_at_the_height_of_its_value(scale, middle):
    axes = new_canvas(4, 3).figure.add_axes((0, 0, 1, 1))
    style_axes(axes, xlabel="x")
    axes.set_yscale(scale)
    axes.set_ylim(1, 100)
    label_ends(axes, [(middle, "here", "#000000")], gap=0.1)
    assert axes.texts[0].xyann == (10, 0)
    assert axes.texts[0].xy == pytest.approx((1.0, 0.5))
