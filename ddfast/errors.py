"""The one exception type for failures a user can act on, and what it repeats of others."""


class DDFastError(Exception):
    """A failure whose one-line message says what to do; commands print it without a traceback."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says; the name of its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
