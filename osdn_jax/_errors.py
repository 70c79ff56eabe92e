"""Error messages of libraries, shortened to one line."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def joined_lines(error: BaseException) -> str:
    """Return an error's message with its lines joined, or the name of its type if the message is empty."""
    return " ".join(str(error).split()) or type(error).__name__
