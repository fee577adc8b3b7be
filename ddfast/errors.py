"""The one exception type for failures a user can act on."""


class DDFastError(Exception):
    """A failure whose one-line message says what to do; commands print it without a traceback."""
