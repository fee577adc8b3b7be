"""A run's folder: the names in it, who may use it, and what opens from it."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomli_w
import torch

from ddfast import env, processes
from ddfast.config import TrainConfig, plain, read_settings, update
from ddfast.distill.checkpoints import FOLDER as CHECKPOINTS
from ddfast.errors import DDFastError
from ddfast.files import locked, read_text, write_atomically
from ddfast.messages import say
from ddfast.models.loading import build_teacher, load_student, load_teacher
from ddfast.models.official import STUDENT_FILE, TEACHER_FILE, UNFINISHED
from ddfast.models.protocol import Teacher
from ddfast.models.student import DD1Student, Student
from ddfast.ops.native import pytorch_obstacle
from ddfast.progress import Progress
from ddfast.recipes import get_recipe
from ddfast.tracing import span

CONFIG, METRICS_JSON, STAGES = "config.toml", "metrics.json", "stages.json"
THROUGHPUT = "throughput.jsonl"
REPORT, PAGE, PICTURES = "report.md", "report.html", "samples.png"
LOCK = ".lock"
_LEASE_SECONDS = 150.0

ADAPTED_FILE, TUNED_FILE, GUIDANCE_FILE = "adapted.safetensors", "ar-diffusion.safetensors", "guidance.safetensors"
ADAPTATION_JSON = "adaptation.json"

LOCATION = (
    "out", "device", "resume", "trajectories.batch_size", "parallel", "track", "profile_steps",
    "evaluation.paths", "evaluation.lpips_vgg", "evaluation.lpips_linear",
)  # fmt: skip
"""Fields, and tables of fields, that decide where and how a run goes on and what it tells, not what it makes."""


def open_student(folder: Path, device: str, progress: Progress) -> tuple[TrainConfig, Teacher, Student]:
    """Configuration, teacher and student of a finished run, or of a folder of `ddfast convert` or `ddfast.hub`.

    Raises:
        DDFastError: `folder` holds none of them.
    """
    if not (folder / STUDENT_FILE).exists():
        where = f"no {STUDENT_FILE} there" if folder.is_dir() else f"no {STUDENT_FILE} there: it is no folder"
        raise DDFastError(f"--student {folder}: {where}; `ddfast train` and `ddfast convert` make it")
    config, teacher = open_teacher(folder, device, progress)
    student = load_student(folder, teacher)
    if (folder / CONFIG).exists():
        complete(student, config)
    if isinstance(student, DD1Student) and student.point is None:
        student.point = max(len(teacher.groups) // 2, 1)
        where = f"nothing says where the student's second step starts: point {student.point} is assumed"
        say(f"{folder}: {where} (--point of `ddfast convert` and `ddfast sample`)")
    return config, teacher, student


def complete(student: Student, config: TrainConfig) -> None:
    """Tell a student whose file does not say it where its second step starts: where its run's settings say."""
    if isinstance(student, DD1Student) and student.point is None:
        student.point = config.dd1.point


def open_teacher(folder: Path, device: str, progress: Progress) -> tuple[TrainConfig, Teacher]:
    """Configuration and teacher of a finished run, or of a folder of `ddfast convert` or `ddfast.hub`.

    The latter two know nothing of a configuration.

    Raises:
        DDFastError: `folder` holds none of them.
    """
    check_device(device)
    if (folder / TEACHER_FILE).exists():
        return TrainConfig(recipe=folder.name, device=device, out=folder), load_teacher(folder).to(device)
    if not (folder / CONFIG).exists():
        raise DDFastError(f"--student {folder}: no {CONFIG} and no {TEACHER_FILE} there; `ddfast train` makes them")
    values = read_settings(folder / CONFIG)
    if "recipe" not in values:
        raise DDFastError(f"{folder / CONFIG} names no recipe: it is not a run's")
    config = get_recipe(values["recipe"], preset=values.get("preset", ""), told=folder / CONFIG)
    update(config, values)
    config.device, config.out = device, folder
    return config, build_teacher(config, progress)


def check_device(device: str) -> None:
    """Raise unless `device` is one that ddfast runs on and PyTorch can use."""
    try:
        wanted = torch.device(device)
    except RuntimeError:
        wanted = None
    if wanted is None or wanted.type not in ("cpu", "cuda"):
        raise DDFastError(f"--device: got {device!r}, expected cpu, cuda or cuda:INDEX")
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise DDFastError(f"--device {device}: PyTorch sees no GPU here; use --device cpu")
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise DDFastError(f"--device {device}: PyTorch sees {torch.cuda.device_count()} GPUs here, counted from 0")
    if wanted.type == "cuda" and (obstacle := pytorch_obstacle(wanted.index or 0)):
        raise DDFastError(f"--device {device}: {obstacle}; or use --device cpu")


def claim_folder(config: TrainConfig) -> None:
    """Make `config.out`, or accept it if what it holds was made with the same settings; then write config.toml."""
    out, path = config.out, config.out / CONFIG
    mine = plain(config)
    artefacts = ("trajectories", CHECKPOINTS, STUDENT_FILE, ADAPTED_FILE, TUNED_FILE)
    if (out / UNFINISHED).exists():
        raise DDFastError(
            f"{out / UNFINISHED} is of a run that an older ddfast began: finish it with that, or delete the file to "
            "begin its stage again"
        )
    if any((out / name).exists() for name in artefacts) and path.exists():
        theirs, wanted = _said(read_settings(path)), _said(mine)
        different = [
            f"{name} is {theirs.get(name)!r}, not {wanted.get(name)!r}"
            for name in {**wanted, **{name: None for name in theirs if _LEFT.fullmatch(name)}}
            if not _is_location(name) and theirs.get(name) != wanted.get(name)
        ]
        if different:
            raise DDFastError(f"{out} holds a run with other settings ({'; '.join(different)}); choose another --out")
    elif config.resume:
        raise DDFastError(f"--resume: no run in {out}; leave --resume out to start one")
    write_atomically(path, tomli_w.dumps(mine))


def _is_location(name: str) -> bool:
    return any(name == field or name.startswith(f"{field}.") for field in LOCATION)


@contextlib.contextmanager
def occupied(out: Path) -> Iterator[None]:
    """Within, no other run may use the folder `out`; of several processes, the first one speaks for all.

    What a run that was killed had not finished to write goes.

    Raises:
        DDFastError: one does.
    """

    def enter() -> None:
        # After a restart, a machine that was lost may hold the lock for as long as its file system lets it.
        until = time.monotonic() + (_LEASE_SECONDS if env.restarts() else 0.0)
        while True:
            try:
                kept.enter_context(locked(out / LOCK, f"a run is going on in {out}"))
                break
            except DDFastError:
                if time.monotonic() > until:
                    raise
            processes.sign()
            time.sleep(1.0)
        for unfinished in out.glob(".*.safetensors.*.tmp"):
            unfinished.unlink(missing_ok=True)

    with contextlib.ExitStack() as kept:
        processes.first_does(enter)
        yield


class Stages:
    """Seconds that every stage took, kept over interruptions."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = read_json(path) if path.exists() else {}

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time of the body to the stage's, whether it ends or is interrupted."""
        started = time.perf_counter()
        try:
            with span(name):
                yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
            if processes.rank() == 0:
                write_atomically(self.path, json.dumps(self.seconds, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The content of a run's JSON file; a `DDFastError` where it is damaged."""
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise DDFastError(f"{path} is damaged ({error}); delete it and run again") from error


_LEFT = re.compile(r"dd2\.(tune|match)\.(cfg_scale|temperature|top_k|top_p)")
"""Settings that may be left to the teacher."""


def _said(values: dict[str, Any]) -> dict[str, Any]:
    """Settings as {"a.b": value}, without those left to the teacher: negative ones, as files of before say it."""

    def left(name: str, value: Any) -> bool:
        return _LEFT.fullmatch(name) is not None and isinstance(value, (int, float)) and value < 0

    return {name: value for name, value in _flat(values).items() if not left(name, value)}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as {"a.b": value}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
