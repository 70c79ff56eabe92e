"""Rows of the tables: each is its own inverse, and puts every element where it belongs."""

import numpy as np
import pytest

from osdn_jax.interop.mapping import Key, Row, fused, linear, same
from osdn_jax.interop.plan import grouped, match

GROUPED = Row((Key("qkvz", {"q": 2, "k": 2, "v": 6, "z": 6}, 3),), {"project": ("q", "k", "v"), "gate": ("z",)})
ROWS = {
    "same": (same("a", "p"), {"p": (5,)}),
    "table": (same("a", "p"), {"p": (5, 3)}),
    "reshaped": (same("a", "p", shape=(1, 1, 5, 1)), {"p": (5,)}),
    "linear": (linear("a", "p"), {"p": (3, 5)}),
    "fused": (fused({"q": 2, "k": 3, "v": 4}, "p"), {"p": (3, 9)}),
    "biases": (fused({"q": 2, "k": 3, "v": 4}, "p", transpose=False), {"p": (9,)}),
    "convolution": (fused({"q": 2, "k": 3}, "p", convolution=True), {"p": (4, 5)}),
    "any widths": (fused({"q": 2, "k": 3, "v": 4}, "p", convolution=True, any_widths=True), {"p": (4, 9)}),
    "grouped": (GROUPED, {"project": (4, 30), "gate": (4, 18)}),
    "experts": (
        Row((Key("g{expert}", {"g": 3}), Key("u{expert}", {"u": 3})), {"p": ("g", "u")}, 2),
        {"p": (2, 4, 6)},
    ),
    "stacked": (Row((Key("gu", {"g": 3, "u": 3}),), {"p": ("g", "u")}), {"p": (2, 4, 6)}),
}


@pytest.mark.parametrize("name", ROWS)
def test_saving_is_the_inverse_of_loading(name):
    row, shapes = ROWS[name]
    parameters = {path: np.random.default_rng(0).normal(size=shape) for path, shape in shapes.items()}
    file_shapes = row.shapes(shapes)
    tensors = row.save(parameters, file_shapes)
    experts = () if row.experts is None else (row.experts,)
    assert [tensor.shape for tensor in tensors] == [(*experts, *shape) for shape in file_shapes]
    loaded = row.load(tensors)
    assert loaded.keys() == parameters.keys()
    for path, value in parameters.items():
        np.testing.assert_array_equal(loaded[path], value)


def test_groups_keep_the_pieces_of_one_head_together():
    tensor = np.arange(48)[:, None] * np.ones((1, 2))
    loaded = GROUPED.load([tensor])
    assert loaded["project"][0, :4].tolist() == [0, 1, 16, 17]  # q of the first two heads
    assert loaded["project"][0, 6:8].tolist() == [2, 3]  # k of the first
    assert loaded["gate"][0, :7].tolist() == [10, 11, 12, 13, 14, 15, 26]


def test_any_widths_join_to_the_same_parameter():
    row, shapes = ROWS["any widths"]
    tensors = row.save({"p": np.arange(36.0).reshape(4, 9)}, [(3, 1, 4)] * 3)
    assert [tensor.shape for tensor in tensors] == [(3, 1, 4)] * 3
    np.testing.assert_array_equal(row.load(tensors)["p"], np.arange(36.0).reshape(4, 9))
    found = {"q": (3, 1, 4), "k": (3, 1, 4), "v": (3, 1, 4)}
    assert match([row], shapes, found).problems == []
    assert match([row], shapes, found | {"v": (4, 1, 4)}).problems != []


def test_all_differences_are_reported_together():
    rows = [linear(f"layers.{i}.{name}.weight", f"{i}/{name}") for i in range(8) for name in ("a", "b")]
    shapes = {name: (3, 5) for row in rows for name in row.parameters}
    found = {f"layers.{i}.a.weight": (5, 3) for i in range(8) if i not in (1, 2, 5)}
    found |= {f"layers.{i}.b.weight": (5, 3 if i else 4) for i in range(8)}
    found |= {"layers.9.a.weight": (5, 3), "visual.x": (1,), "odd{0}": (1,)}
    plan = match(rows, shapes, found, [r"visual\."])
    assert plan.left_out == ["visual.x"]
    assert plan.problems == [
        "missing: layers.{1-2,5}.a.weight",
        "extra: layers.9.a.weight",
        "extra: odd{0}",
        "misshapen: layers.0.b.weight: got shape [5, 4], expected [5, 3]",
    ]


def test_experts_and_layers_are_joined():
    names = [f"layers.{i}.experts.{e}.w1.weight" for i in (0, 1, 3) for e in range(4)]
    assert grouped(names) == ["layers.{0-1,3}.experts.{0-3}.w1.weight"]
    assert grouped([*names, "layers.7.experts.2.w1.weight", "norm.weight"]) == [
        "layers.{0-1,3}.experts.{0-3}.w1.weight",
        "layers.7.experts.2.w1.weight",
        "norm.weight",
    ]


def test_tables_have_to_cover_the_parameters():
    with pytest.raises(ValueError, match="rows: got a table"):
        match([same("a", "p")], {"p": (1,), "q": (1,)}, {"a": (1,)})
    with pytest.raises(ValueError, match="rows: got a table"):
        match([same("a", "p"), same("b", "p")], {"p": (1,)}, {"a": (1,)})


def test_other_names_and_copies():
    row = same("a", "p", also=("old",), copies=("copy",))
    plan = match([row], {"p": (2,)}, {"old": (2,), "copy": (2,)})
    assert (plan.problems, plan.sources[0].names, plan.sources[0].copies) == ([], [["old"]], [("old", "copy")])
    assert match([row], {"p": (2,)}, {"a": (2,), "old": (2,)}).problems == ["extra: old"]
    assert match([row], {"p": (2,)}, {"a": (2,), "copy": (3,)}).problems == [
        "misshapen: copy: got shape [3], expected [2]"
    ]
