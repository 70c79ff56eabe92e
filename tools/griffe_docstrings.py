"""Extension of griffe, which reads the docstrings for mkdocs: what the sections of this project's docstrings mean."""

import re
from typing import Any

import griffe

ARGUMENTS = re.compile(r"^( +)((?:\*{0,2}\w+,\s+)+\*{0,2}\w+): (.*(?:\n\1 +.*)*)", re.MULTILINE)


class Sections(griffe.Extension):
    """Rewrite docstrings before they are parsed.

    `Example:` becomes `Examples:`: griffe would show `>>>` under another title as a quotation. An entry for several
    arguments, `q, k: text`, becomes one entry per argument.
    """

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            text = re.sub(r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = ARGUMENTS.sub(_one_each, text)


def _one_each(match: re.Match) -> str:
    indent, names, text = match.groups()
    return "\n".join(f"{indent}{name}: {text}" for name in re.split(r",\s+", names))
