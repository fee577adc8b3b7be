"""Ranges that Nsight and PyTorch's profiler show, and the Chrome traces that the profiler writes."""

from __future__ import annotations

import contextlib
import gzip
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import nvtx
import torch
from torch.profiler import ProfilerActivity

from ddfast.errors import DDFastError
from ddfast.files import whole_file
from ddfast.messages import note
from ddfast.private_api import is_profiled


@contextlib.contextmanager
def span(name: str) -> Iterator[None]:
    """A range of this name in Nsight, and in the profiler's trace where one is recorded; else it costs about 3 us.

    Args:
        name: without a comma: the filters of Nsight Compute read it as a separator.
    """
    with nvtx.annotate(name):
        if not is_profiled():  # PyTorch's range costs 12 us whether anybody sees it or not
            yield
            return
        with torch.profiler.record_function(name):
            yield


def activities(device: torch.device) -> list[ProfilerActivity]:
    """What the profiler records of work on a device."""
    return [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])


_OF_THIS_MACHINE = re.compile(rb'"(host_name|traceName)":\s*"(?:[^"\\]|\\.)*"')
"""What the profiler says of the machine: its name, and where it wrote."""


def write_trace(profiler: torch.profiler.profile, path: Path) -> Path:
    """Write what was recorded as a Chrome trace, compressed where the name ends in .gz; returns the path.

    Raises:
        DDFastError: the file cannot be written.
    """
    try:
        # The profiler goes by the name's end, so it writes under the same name elsewhere.
        with whole_file(path, durable=False) as temporary, tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(made))
            opened = gzip.open if path.suffix == ".gz" else open
            with made.open("rb") as lines, opened(temporary, "wb") as target:
                target.writelines(_OF_THIS_MACHINE.sub(rb'"\1": ""', line) for line in lines)
    except RuntimeError as error:
        raise DDFastError(f"cannot write {path}: {error}") from error
    return path


class ProfileWindow:
    """Records some of the steps that are made in its body, and writes their Chrome trace when they are done.

    The step before them warms the profiler up. A body that ends within the window has its steps so far written, one
    that fails has none. What is recorded: operators with the shapes of their inputs, spans, and a GPU's kernels.

    Args:
        steps: to record, counted from 0; empty: none.
        path: of the trace.
        device: where the steps run.
    """

    def __init__(self, steps: range, path: Path, device: torch.device) -> None:
        self.steps, self.path, self.done = steps, path, 0
        self.profiler: torch.profiler.profile | None = None
        if steps:
            plan = torch.profiler.schedule(wait=steps.start - 1, warmup=1, active=len(steps), repeat=1)
            self.profiler = torch.profiler.profile(activities=activities(device), schedule=plan, record_shapes=True)

    def __enter__(self) -> ProfileWindow:
        if self.profiler:
            self.profiler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._finish(keep=kind is None)

    def step(self) -> None:
        """Say that a step is done."""
        if not self.profiler:
            return
        self.profiler.step()
        self.done += 1
        if self.done == self.steps.stop:
            self._finish(keep=True)

    def _finish(self, *, keep: bool) -> None:
        profiler, self.profiler = self.profiler, None
        if not profiler:
            return
        profiler.stop()
        if not keep:
            return
        if self.done > self.steps.start:
            note(f"Chrome trace: {write_trace(profiler, self.path)} (ui.perfetto.dev)")
        else:
            note(f"no {self.path.name}: {self.done} steps were made, and {self.steps.start} come before the window")
