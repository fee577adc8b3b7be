"""The one exception type for failures a user can act on, and what it repeats of others."""


class DDFastError(Exception):
    """A failure whose one-line message says what to do; commands print it without a traceback."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says; the name of its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice; the allocator of CPUs has no type for it."""
    said = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(words in said for words in ("allocate memory", "bad_alloc"))
    )
