"""English of the comments, docstrings, messages and pages: a list of turns that readers stumble over."""

import ast
import functools
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("osdn_jax", "pallas_kernels", "triton_kernels")
FOLDERS = (*PACKAGES, "benchmarks", "configs", "docs", "examples", "tests", "tools")
FILES = [
    path
    for path in (*ROOT.glob("*.py"), *ROOT.glob("*.md"), *(p for f in FOLDERS for p in sorted((ROOT / f).rglob("*.*"))))
    if path.suffix in (".py", ".md") and path != Path(__file__)
]

# Regular expressions, each with what to write instead.
BANNED = {
    "all else": "everything else",
    "anew": "again, or nothing",
    "at all": "nothing",
    "besides?": "next to, in addition, other than",
    "by turns": "alternating",
    "goes back where": "is written back to",
    "goes on": "continues",
    "go on (from|with|where)": "continue",
    "goes token by token": "uses the scan",
    "ha(s|ve) served": "is dead, is no longer needed",
    "in (its|their) turn": "one after another",
    "lent": "limited",
    "likewise": "also",
    "need (not )?be": "is needed, can be missing",
    "nobody": "no one, nothing",
    "of (its|their) own": "its own, separate",
    "one byte is one token here": "bits per token",
    "passes (its|the) tolerance": "exceeds its tolerance",
    "rounding takes": "the low-order half",
    "so many": "a number, that many",
    "write strengths?": "beta",
}
OPENING = re.compile(r"(What|Where|Which|Whether|Whose|Who|Why|How|Of)\b")


def docstrings(path):
    """Return (line number, docstring) of every documented object in a file."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, documented)]
    return [(node.body[0].lineno, docstring) for node in nodes if (docstring := ast.get_docstring(node))]


@functools.cache
def prose(path):
    """Return (line number, text) of what is written to be read: a page, or a file's docstrings and comments."""
    if path.suffix == ".md":
        return list(enumerate(path.read_text().splitlines(), 1))
    with path.open("rb") as file:
        comments = [(t.start[0], t.string) for t in tokenize.tokenize(file.readline) if t.type == tokenize.COMMENT]
    return [
        (start + n, line) for start, text in docstrings(path) for n, line in enumerate(text.splitlines())
    ] + comments


@pytest.mark.parametrize("turn", BANNED)
def test_turns_that_are_read_twice(turn):
    search = re.compile(rf"\b{turn}\b", re.IGNORECASE).search
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in FILES
        for number, line in prose(path)
        if search(line)
    ]
    assert found == [], f"write instead: {BANNED[turn]}"


def test_docstrings_open_with_a_sentence():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {docstring.splitlines()[0]}"
        for path in FILES
        if path.suffix == ".py"
        for number, docstring in docstrings(path)
        if OPENING.match(docstring)
    ]
    assert found == []
