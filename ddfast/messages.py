"""What the library tells its user beside its results."""

from __future__ import annotations

import functools
import sys

from ddfast import env


def first_process() -> bool:
    """Whether this process speaks for those that torchrun started."""
    return env.rank_and_world_size()[0] == 0


def say(text: str) -> None:
    """Print a message, from the first process only."""
    if first_process():
        print(text, flush=True)


def warn(text: str) -> None:
    """`say` what is alarming, on the error stream."""
    if first_process():
        print(f"warning: {text}", file=sys.stderr, flush=True)


def note(text: str) -> None:
    """`say` what is not part of a command's result, on the error stream."""
    if first_process():
        print(text, file=sys.stderr, flush=True)


@functools.lru_cache(maxsize=256)  # texts may have names in them, and a process may live long
def warn_once(text: str) -> None:
    """`warn`, but of the same text only once."""
    warn(text)
