"""What a training stage tells while it runs: figures to files and trackers, its pace, and a trace of some steps.

    with stage_log(out, "distillation", step, device, config) as log:
        while step < total:
            ...                                   # a step on `sequences` sequences, its parts in `tracing.span`
            log.step(sequences)
            log.figures(step, {"loss": loss})     # now and then
            progress(step, total, log.text(f"loss {loss:.3f}"))

Of several processes the first alone writes figures; each writes its own trace.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch

from ddfast import processes
from ddfast.config import TrainConfig, plain, profiled_steps, trackers
from ddfast.errors import DDFastError, first_line
from ddfast.files import expect, parse_json, read_text, write_atomically
from ddfast.portable import portable
from ddfast.tracing import ProfileWindow

METRICS, PROFILE, TENSORBOARD, WANDB_ID = "metrics.jsonl", "profile", "tensorboard", "wandb-id"
"""In a run's folder."""

Sink: TypeAlias = Callable[[int, Mapping[str, float]], None]
"""Takes the figures of a step."""

Opener: TypeAlias = Callable[[Path, str, int, Mapping[str, Any]], contextlib.AbstractContextManager[Sink]]
"""Makes a sink from a run's folder, the stage, the steps of it that are done, and the run's settings.

What the sink has of later steps, from before an interruption, gives way to what comes.
"""

_RECENT_STEPS = 50
_SECONDS_BETWEEN_LOOKS = 1.0


class StageLog:
    """See the module; `stage_log` makes it."""

    def __init__(self, sinks: list[Sink], pace: Pace, window: ProfileWindow) -> None:
        self._sinks, self._pace, self._window = sinks, pace, window

    def step(self, sequences: int) -> None:
        """Say that a step is done.

        Args:
            sequences: of its whole batch, over all processes.
        """
        self._pace.step(sequences)
        self._window.step()

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Log figures, and the pace with them; every process may call it.

        Args:
            step: steps of the stage that are done.
            figures: numbers by name.
        """
        if self._sinks:
            told = {**figures, **self._pace.figures()}
            for sink in self._sinks:
                sink(step, told)

    def text(self, told: str) -> str:
        """A progress bar's text: what is told, and the pace."""
        return f"{told}, {self._pace.text()}"


@contextlib.contextmanager
def stage_log(
    out: Path, stage: str, step: int, device: torch.device, config: TrainConfig | None = None
) -> Iterator[StageLog]:
    """What a stage tells, from its start or resume to its end.

    Args:
        out: the run's folder.
        stage: its name: in the log, before the slash of a tracker's figures, and in the trace's name.
        step: its steps that are done; figures of later ones, from before an interruption, are dropped.
        device: of the steps.
        config: the run's, for its `track` and `profile_steps`; None: metrics.jsonl alone.

    Raises:
        DDFastError: a tracker is not installed or does not start.
    """
    names = trackers(config.track) if config else ()
    steps = profiled_steps(config.profile_steps if config else "")
    rank = processes.rank()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.ExitStack() as open_until_the_end:
        sinks = []
        if rank == 0:
            settings = portable(plain(config)) if config else {}
            for opener in (json_lines, *(SINKS[name][-1] for name in names)):
                sinks.append(open_until_the_end.enter_context(opener(out, stage, step, settings)))
        window = ProfileWindow(steps, out / PROFILE / f"{stage}-rank{rank}.json.gz", device)
        yield StageLog(sinks, Pace(device), open_until_the_end.enter_context(window))


def check_trackers(track: str) -> None:
    """Raise unless the trackers of `--track` are installed: before a run, not after its first hours."""
    for name in trackers(track):
        _imported(name)


@contextlib.contextmanager
def json_lines(out: Path, stage: str, step: int, settings: Mapping[str, Any]) -> Iterator[Sink]:
    """A line of JSON per step in `out/metrics.jsonl`: stage, step, figures."""
    path = out / METRICS
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        kept = [line for line in _lines(path) if line["stage"] != stage or line["step"] <= step]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))

    def sink(step: int, figures: Mapping[str, float]) -> None:
        with path.open("a") as file:
            file.write(json.dumps({"stage": stage, "step": step, **figures}) + "\n")

    yield sink


def read_log(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of a `metrics.jsonl` by stage and in the order of their steps; of a step's lines, the last counts.

    What is no line of it, such as one that a killed run left half written, is left out, and where there is no file,
    there is nothing.
    """
    stages: dict[str, dict[int, dict[str, Any]]] = {}
    for line in _lines(path):
        stages.setdefault(line["stage"], {})[line["step"]] = line
    return {stage: [lines[step] for step in sorted(lines)] for stage, lines in stages.items()}


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl` that are: stage, step, and figures."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            line = expect(parse_json(text), dict[str, Any])
            figures = {name: value for name, value in line.items() if name not in ("stage", "step")}
            expect((line.get("stage"), line.get("step"), figures), tuple[str, int, dict[str, float]])
            lines.append(line)
    return lines


@contextlib.contextmanager
def tensorboard(out: Path, stage: str, step: int, settings: Mapping[str, Any]) -> Iterator[Sink]:
    """Events in `out/tensorboard/STAGE`: a stage has a folder, as what is to be dropped is told by step alone."""
    writer = _imported("tensorboard")(str(out / TENSORBOARD / stage), purge_step=step + 1)

    def sink(step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            writer.add_scalar(f"{stage}/{name}", value, step)
        writer.flush()  # else a process that is killed takes the last two minutes with it

    with contextlib.closing(writer):
        yield sink


@contextlib.contextmanager
def wandb(out: Path, stage: str, step: int, settings: Mapping[str, Any]) -> Iterator[Sink]:
    """A run of Weights & Biases for the folder, whose id is in `out/wandb-id`; every stage has an axis of steps.

    Its own variables (WANDB_PROJECT, WANDB_MODE, ...) say where it goes. Nothing can be taken back there, so figures of
    steps that it has already are not sent again; they are the same.
    """
    start = _imported("wandb")
    path = out / WANDB_ID
    if not path.exists():
        write_atomically(path, uuid.uuid4().hex[:8] + "\n")
    try:
        run = start(
            id=read_text(path).strip(),
            resume="allow",
            dir=str(out),
            config=dict(settings),
            allow_val_change=True,  # of settings that may be others after an interruption
            settings={"console": "off"},  # it would catch the progress bar
        )
    except Exception as error:  # the client's own types: no key, no network, ...
        remedy = "`wandb login`, or WANDB_MODE=offline without a network"
        raise DDFastError(f"--track wandb: {first_line(error)}; {remedy}") from error
    with run:
        run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        there = run.summary.get(f"{stage}/step", 0)

        def sink(step: int, figures: Mapping[str, float]) -> None:
            if step > there:
                run.log({f"{stage}/{name}": value for name, value in {"step": step, **figures}.items()})

        yield sink


SINKS: dict[str, tuple[str, str, Opener]] = {
    "tensorboard": ("torch.utils.tensorboard", "SummaryWriter", tensorboard),
    "wandb": ("wandb", "init", wandb),
}
"""By the names of `--track`: the module and the name in it that start a tracker, and what opens its sink."""


def _imported(tracker: str) -> Any:
    """What a tracker is started by."""
    module, name, _ = SINKS[tracker]
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:  # a folder of its name is a module that has nothing
        raise DDFastError(f"--track {tracker}: not installed; pip install 'ddfast[{tracker}]'") from error


class Pace:
    """How fast a stage goes, over its last steps, and what it asks of the GPU.

    The first step, which compiles and allocates, does not count any more once there is another.

    Args:
        device: whose utilisation and memory are told, where it is a GPU.
        clock: seconds.
    """

    def __init__(self, device: torch.device, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._device, self._clock = device, clock
        self._sequences, self._steps = 0, 0
        self._marks = deque([(clock(), 0, 0)], maxlen=_RECENT_STEPS + 1)
        self._has_nvml = device.type == "cuda"
        self._looked, self._gpu = clock(), dict[str, float]()

    def step(self, sequences: int) -> None:
        """Say that a step on so many sequences is done."""
        self._steps += 1
        self._sequences += sequences
        if self._steps == 2:
            self._marks.popleft()
        self._marks.append((self._clock(), self._steps, self._sequences))

    def figures(self) -> dict[str, float]:
        """Numbers for the log.

        Returns:
            `steps_per_second` and `sequences_per_second`; of a GPU `peak_memory_gib` (of PyTorch's tensors in this
            process, since its peak was last reset) and where NVML tells it `gpu_utilisation` (0 to 1: the share of
            time with work).
        """
        self._look()
        rates = zip(("steps_per_second", "sequences_per_second"), self._rates(), strict=True)
        return {name: float(f"{rate:.4g}") for name, rate in rates} | self._gpu

    def text(self) -> str:
        """The same for people; the GPU's figures are up to a second old."""
        if not self._gpu or self._clock() - self._looked > _SECONDS_BETWEEN_LOOKS:
            self._look()
        told = [f"{self._rates()[1]:.1f} sequences/s"]
        if "gpu_utilisation" in self._gpu:
            told.append(f"GPU {self._gpu['gpu_utilisation']:.0%}")
        if "peak_memory_gib" in self._gpu:
            told.append(f"{self._gpu['peak_memory_gib']:.1f} GiB")
        return ", ".join(told)

    def _rates(self) -> tuple[float, float]:
        """Steps and sequences per second."""
        (since, *first), (now, *last) = self._marks[0], self._marks[-1]
        steps, sequences = (
            (after - before) / max(now - since, 1e-9) for before, after in zip(first, last, strict=True)
        )
        return steps, sequences

    def _look(self) -> None:
        """Ask the GPU: tens of microseconds, and more where the driver is slow."""
        if self._device.type != "cuda":
            return
        self._looked = self._clock()
        if self._has_nvml:
            try:
                self._gpu["gpu_utilisation"] = torch.cuda.utilization(self._device) / 100
            except Exception:  # nvidia-ml-py is not installed, or this device (a part of one) has no such figure
                self._has_nvml = False
                self._gpu.pop("gpu_utilisation", None)
        self._gpu["peak_memory_gib"] = round(torch.cuda.max_memory_allocated(self._device) / 2**30, 3)
