"""Options of config.json: known, refused by name, and all problems in one error."""

import re

import pytest

from osdn_jax.interop.families.rotary import rotary
from osdn_jax.interop.options import LARGEST, Options


def test_readers_return_values_and_defaults():
    options = Options({"a": 3, "b": 0.5, "c": True, "d": "x", "e": None, "model_type": "m", "list": [1, 3]})
    assert options.integer("a") == 3
    assert options.number("b") == 0.5
    assert options.flag("c", False) is True
    assert options.choice("d", "y", ("x", "y")) == "x"
    assert (options.integer("e", 7), options.integer("f", None), options.flag("g", True)) == (7, None, True)
    assert options.indices("list", 3, 1) == [0, 2]
    options.finish()


def test_all_problems_are_in_one_error():
    options = Options({"a": 0, "b": "x", "c": 1, "d": "z", "odd": {"deep": 1}, "f": True, "list": [9], "words": ["q"]})
    options.integer("a")
    options.number("b")
    options.flag("c", False)
    options.choice("d", "y", ("x", "y"))
    options.integer("missing")
    options.integer("f")
    options.indices("list", 3)
    options.words("words", 1, ("p",))
    with pytest.raises(ValueError, match="config.json: a: got 0") as error:
        options.finish()
    assert str(error.value).split("; ") == [
        "config.json: a: got 0, expected an integer of at least 1",
        'b: got "x", expected a number above 0',
        "c: got 1, expected true or false",
        'd: got "z", expected one of x, y',
        "missing: is missing, expected an integer of at least 1",
        "f: got true, expected an integer of at least 1",
        "list: got [9], expected a list of numbers from 0 to 2",
        'words: got ["q"], expected a list of 1 of p',
        'odd: got {"deep": 1}, an option unknown here',
    ]


def test_entries_of_wrong_types_are_refused():
    options = Options({"word": [1], "words": [["x"]], "number": 10**60, "wide": 2**31})
    options.choice("word", "x", {"x": 1})
    options.words("words", 1, {"x": 1})
    options.number("number", 1.0)
    options.integer("wide")
    assert [problem.split(":")[0] for problem in options.problems] == ["word", "words", "number", "wide"]


def test_numbers_have_limits_on_both_sides():
    options = Options({"a": -2, "b": -(10**400), "c": 1e300, "d": 1.0, "e": float("nan"), "f": True})
    assert options.number("a", above=-LARGEST) == -2.0
    assert options.number("absent", None, above=-LARGEST, below=0.0) is None
    options.number("b", None, above=-LARGEST, below=0.0)
    options.number("c", above=-LARGEST)
    options.number("d", 0.5, below=1.0)
    options.number("e", above=-LARGEST)
    options.number("f", above=-LARGEST)
    first, *others = options.problems
    assert first.startswith("b: got -1000")
    assert first.endswith("..., expected a number below 0")
    assert others == [
        "c: got 1e+300, expected a number",
        "d: got 1.0, expected a number above 0 and below 1",
        "e: got NaN, expected a number",
        "f: got true, expected a number",
    ]


def test_names_cannot_control_a_terminal():
    options = Options({"odd\x1b[31m\n": 1, "x" * 5000: 2})
    with pytest.raises(ValueError, match=r"config.json: odd") as error:
        options.finish()
    assert str(error.value) == (
        rf"config.json: odd\x1b[31m\n: got 1, an option unknown here; {'x' * 200}…: got 2, an option unknown here"
    )


def test_required_values_are_compared_with_their_types():
    options = Options({"a": False, "b": 0, "c": 0.0})
    for name in "abc":
        options.require(name, False)
    assert options.problems == ["b: got 0, expected false or null", "c: got 0.0, expected false or null"]


def test_sections_and_second_names():
    options = Options({"part": {"x": 1, "y": 2}, "new": 4, "old": 5})
    assert options.section("part").integer("x") == 1
    assert options.name_of("new", "old") == "new"
    with pytest.raises(ValueError, match=r"old: got 5, expected 4, as new says; part.y: got 2, an option unknown"):
        options.finish()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, (1e4, 4)),
        ({"rope_theta": 5e5, "partial_rotary_factor": 0.5}, (5e5, 8)),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, (1e6, 4)),
        ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 1.0}}, (1e6, None)),
        ({"rope_parameters": {"rope_theta": None}}, (None, None)),
        ({"rope_theta": None, "rope_scaling": None}, (None, None)),
        ({"rope_scaling": {"type": "default"}, "rope_theta": 100}, (100, 4)),
    ],
)
def test_rotary_positions_of_old_and_new_configs(config, expected):
    options = Options(config)
    assert rotary(options, 16, 0.25) == expected
    options.finish()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4}}, 'rope_parameters.rope_type: got "yarn"'),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, 'rope_scaling.type: got "linear"'),
        (
            {"rope_parameters": {"rope_type": "default", "factor": 4}},
            "rope_parameters.factor: got 4, an option",
        ),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters.full_attention"),
        ({"rope_parameters": 3}, "rope_parameters: got 3, expected an object"),
        ({"rope_theta": "x"}, 'rope_theta: got "x", expected a number above 1'),
        ({"partial_rotary_factor": 2}, "partial_rotary_factor: got 2, expected a share"),
        ({"partial_rotary_factor": 0.2}, "partial_rotary_factor: got 0.2, expected an even number"),
    ],
)
def test_other_rotary_positions_are_refused(config, message):
    options = Options(config)
    rotary(options, 16, 0.25)
    with pytest.raises(ValueError, match=re.escape(message)):
        options.finish()
