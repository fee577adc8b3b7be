"""What the tests look at of a run's checkpoints."""

import contextlib
import json
from pathlib import Path

from ddfast.distill.checkpoints import FOLDER, STATE


def states(out: Path) -> list[dict]:
    """States of the checkpoints in a run's folder, the last step last."""
    found = []
    for path in sorted((out / FOLDER).glob(f"[!.]*/{STATE}")):
        with contextlib.suppress(FileNotFoundError):  # a run that goes on has removed it
            found.append(json.loads(path.read_text()))
    return found


def last_step(out: Path) -> int:
    """Step of the last checkpoint; -1: there is none."""
    return max((state["step"] for state in states(out)), default=-1)
