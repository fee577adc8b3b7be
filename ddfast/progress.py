"""How far a stage is: a callback, and the bar or the lines that it draws."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TypeAlias

from tqdm import tqdm

from ddfast import processes
from ddfast.messages import first_process, say

Progress: TypeAlias = Callable[[int, int, str], None]
"""Called as `progress(done, total, text)` after every step."""

ProgressBar: TypeAlias = Callable[[str], Progress]
"""Makes the progress callback of a stage from its title."""

_PLAIN_SECONDS = 5.0


def silent(done: int, total: int, text: str) -> None:
    """A progress that nobody sees; the other processes are told that this one goes on."""
    processes.sign()


def progress_bar(title: str) -> Progress:
    """A bar with rate and ETA on a terminal, a line now and then elsewhere; of the first process only."""
    bar: tqdm | None = None
    started = last = time.monotonic()

    def on_terminal(done: int, total: int, text: str) -> None:
        nonlocal bar
        processes.sign()
        if bar is None or bar.total != total:
            bar = tqdm(total=total, desc=title, dynamic_ncols=True)
        bar.set_postfix_str(text, refresh=False)
        bar.update(done - bar.n)
        if done >= total:
            bar.close()

    def plain(done: int, total: int, text: str) -> None:
        nonlocal last
        processes.sign()
        now = time.monotonic()
        if done < total and now - last < _PLAIN_SECONDS:
            return
        last = now
        rate = done / max(now - started, 1e-9)
        left = f"{(total - done) / rate:.0f} s left" if done else "started"
        say(", ".join(filter(None, (f"{title}: {done}/{total}", f"{rate:.1f}/s", left, text))))

    if not first_process():
        return silent
    return on_terminal if sys.stderr.isatty() else plain
