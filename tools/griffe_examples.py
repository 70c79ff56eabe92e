"""Extension of griffe, which reads the docstrings for mkdocs: a section `Example:` is its section `Examples:`."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Rename the sections before they are parsed: griffe would show `>>>` under another title as a quotation."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the section in one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
