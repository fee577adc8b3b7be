"""The one exception type for failures a user can act on, and what it repeats of others."""

_LONGEST = 500
"""Letters of an error of others, which may repeat all of a file."""


class DDFastError(Exception):
    """A failure whose one-line message says what to do; commands print it without a traceback."""

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """A text on one line, whatever it repeats of a file: what is no letter is escaped, and steers no terminal."""
    if text.isprintable():
        return text
    line = " ".join(text.splitlines())
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in line)


def shown(value: object, length: int = 80) -> str:
    """A value as a message repeats it, on one line: of a large one, the beginning."""
    if isinstance(value, (dict, list, tuple, set)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 128:  # Python refuses to write too many digits
        return f"a whole number of {value.bit_length()} bits"
    text = "nothing" if value is None else " ".join(repr(value).split())
    return text if len(text) <= length else f"{text[: length - 3]}..."


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its beginning; the name of its class where it says nothing."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice; the allocator of CPUs has no type for it."""
    said = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(words in said for words in ("allocate memory", "bad_alloc"))
    )
