"""Error messages of libraries, shortened to one line, and names from files, made safe to print."""

_LONGEST = 200  # characters of a name that are shown


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def joined_lines(error: BaseException) -> str:
    """Return an error's message with its lines joined, or the name of its type if the message is empty."""
    return " ".join(str(error).split()) or type(error).__name__


def printable(name: str) -> str:
    r"""Return a name from a file as it can be shown: control characters are escaped, and a long one is shortened.

    Example:
        >>> printable("layer\x1b[31m.weight\n")
        'layer\\x1b[31m.weight\\n'
    """
    return escaped(f"{name[:_LONGEST]}…" if len(name) > _LONGEST else name)


def escaped(text: str) -> str:
    """Return a text with its control characters, line breaks included, as Python writes them in literals."""
    return text if text.isprintable() else "".join(x if x.isprintable() else ascii(x)[1:-1] for x in text)
