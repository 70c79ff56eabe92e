"""The blocks of the pages: README.md, CONTRIBUTING.md, CHANGELOG.md and docs/*.md."""

import dataclasses
import itertools
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)

LANGUAGES = ("python", "sh", "text")  # code that is run, command lines that are checked, output and formulas


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced code block of a page."""

    page: Path
    line: int  # of its first line of code, from 1
    language: str
    text: str
    follows: bool  # directly after the block before it, with nothing but blank lines between

    def __str__(self):
        return f"{self.page.name}:{self.line}"


def blocks(page):
    """Return the fenced blocks of a page, in order.

    Raises ValueError for a fence that is not closed, and for an indented block, whose language cannot be told.
    """
    found, start, between = [], None, ["a page starts with text"]
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if start is None and line.lstrip().startswith("```"):
            start, language = number, line.strip().removeprefix("```").strip()
        elif start is not None and line.strip() == "```":
            code = "".join(f"{x}\n" for x in lines[start : number - 1])
            found.append(Block(page, start + 1, language, code, follows=not any(between)))
            start, between = None, []
        elif start is None:
            if line.startswith("    ") and not any(between[-1:]) and not _in_list(lines[: number - 1]):
                raise ValueError(f"{page.name}:{number}: an indented block; give it a fence with a language")
            between.append(line.strip())
    if start is not None:
        raise ValueError(f"{page.name}:{start}: this fence is not closed")
    return found


def _in_list(before):
    """Return True if an indented line after these continues an item of a list."""
    last = next((line for line in reversed(before) if line and not line.startswith(" ")), "")
    return re.match(r"([-*]|\d+\.) ", last) is not None


def commands(block):
    """Yield the commands of a shell block as lists of words, without comments and with brace expansions done."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = [word for raw in shlex.split(line, comments=True) for word in _expanded(raw)]
        if words:
            yield words


def _expanded(word):
    """Return the words that a shell makes of word{a,b}."""
    parts = re.split(r"\{([^{}]*,[^{}]*)\}", word)
    choices = [[part] if i % 2 == 0 else part.split(",") for i, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]
