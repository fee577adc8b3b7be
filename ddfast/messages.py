"""What the library tells its user beside its results."""

from __future__ import annotations

from ddfast import env


def say(text: str) -> None:
    """Print one line, from the first process only."""
    if env.rank_and_world_size()[0] == 0:
        print(text, flush=True)
