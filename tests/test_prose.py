"""English of the comments, docstrings, messages and pages: a list of turns that readers stumble over."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("osdn_jax", "pallas_kernels", "benchmarks", "configs", "docs", "examples", "tests", "tools")
FILES = [
    path
    for path in (*ROOT.glob("*.py"), *ROOT.glob("*.md"), *(p for f in FOLDERS for p in sorted((ROOT / f).rglob("*.*"))))
    if path.suffix in (".py", ".md") and path != Path(__file__)
]
SOURCES = [path for path in FILES if path.suffix == ".py" and "tests" not in path.parts]

# Regular expressions, each with what to write instead.
BANNED = {
    r"anew": "again, or nothing",
    r"likewise": "also",
    r"besides?": "next to, in addition, other than",
    r"need (not )?be": "is needed, can be missing",
    r"ha(s|ve) served": "is dead, is no longer needed",
    r"rounding takes": "the low-order half",
    r"rounded off it": "the low-order half",
    r"of (its|their) own": "separate, its own",
    r"in (its|their) turn": "one after another",
    r"by turns": "alternating",
    r"lent": "limited",
    r"nobody": "no one, nothing",
    r"(so|as) many": "a number",
    r"all else": "everything else",
    r"at all": "",
    r"goes on": "continues",
    r"go on (from|with|where)": "continue",
    r"write strengths?": "beta",
    r"goes token by token": "uses the scan",
    r"passes its tolerance": "exceeds its tolerance",
    r"passes the tolerance": "exceeds the tolerance",
    r"one byte is one token here": "",
    r"goes back where": "",
}
OPENING = re.compile(r"(What|Where|Which|Whether|Whose|Who|Why|How|Of)\b")


def of_prose(path):
    """Return (line number, text) of everything that is written to be read; code is not."""
    return list(enumerate(path.read_text().splitlines(), 1))


@pytest.mark.parametrize("pattern", BANNED)
def test_banned(pattern):
    search = re.compile(rf"\b{pattern}\b", re.IGNORECASE).search
    found = [f"{path.relative_to(ROOT)}:{n}: {line.strip()}" for path in FILES for n, line in of_prose(path) if search(line)]
    assert found == [], f"write instead: {BANNED[pattern]}"


def test_docstrings_open_with_a_sentence():
    found = []
    for path in FILES:
        if path.suffix == ".py":
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    docstring = ast.get_docstring(node) or ""
                    if OPENING.match(docstring):
                        line = getattr(node, "lineno", 1)
                        found.append(f"{path.relative_to(ROOT)}:{line}: {docstring.splitlines()[0]}")
    assert found == []
