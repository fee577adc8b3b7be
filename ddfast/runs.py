"""A run's folder: the names in it, who may use it, and what opens from it."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import tomli_w
import torch

from ddfast import env, processes
from ddfast.config import DD1_PREFIX, FILES, TrainConfig, as_then, plain, read_settings, update
from ddfast.distill.checkpoints import FOLDER as CHECKPOINTS
from ddfast.errors import DDFastError
from ddfast.files import expect, file_sha256, locked, parse_json, read_text, write_atomically
from ddfast.messages import say
from ddfast.models.checkpoint import read_checkpoint
from ddfast.models.loading import TEACHER_FILES, build_teacher, load_student, load_teacher
from ddfast.models.official import STUDENT_FILE, TEACHER_FILE, UNFINISHED, checkpoint_file
from ddfast.models.protocol import Teacher
from ddfast.models.student import DD1Student, Student, second_step
from ddfast.ops.native import pytorch_obstacle
from ddfast.portable import base_name, portable
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

_LOCAL = """\
# Of this machine: it names folders, so that the run can go on. What is for others names none (docs/teachers.md).
"""

LOCATION = (
    "out", "device", "resume", "trajectories.batch_size", "parallel", "track", "profile_steps",
    "evaluation.batch_size", "evaluation.batch_sizes", "evaluation.paths", "evaluation.lpips_vgg",
    "evaluation.lpips_linear",
)  # fmt: skip
"""Fields, and tables of fields, that decide where and how a run goes on and what it tells, not what it makes."""


GivenFiles: TypeAlias = Mapping[str, "str | Path | None"]
"""Files of a teacher by their settings (`TEACHER_FILES`), where they are not where a run found them; None: they are."""


def open_student(
    folder: Path, device: str, progress: Progress, *, files: GivenFiles = MappingProxyType({})
) -> tuple[TrainConfig, Teacher, Student]:
    """Configuration, teacher and student of a finished run, or of a folder of `ddfast convert` or `ddfast.hub`.

    Of a run, its student.safetensors is enough.

    Raises:
        DDFastError: `folder` holds none of them, or a file of the teacher is not to be found.
    """
    if not (folder / STUDENT_FILE).exists():
        where = f"no {STUDENT_FILE} there" if folder.is_dir() else f"no {STUDENT_FILE} there: it is no folder"
        raise DDFastError(f"--student {folder}: {where}; `ddfast train` and `ddfast convert` make it")
    config, teacher = open_teacher(folder, device, progress, files=files)
    student = load_student(folder, teacher)
    if (folder / CONFIG).exists():
        complete(student, config)
    if isinstance(student, DD1Student) and student.point is None:
        student.point = second_step(len(teacher.groups))
        where = f"nothing says where the student's second step starts: point {student.point} is assumed"
        say(f"{folder}: {where} (--point of `ddfast convert` and `ddfast sample`)")
    return config, teacher, student


def complete(student: Student, config: TrainConfig) -> None:
    """Tell a student whose file does not say it where its second step starts: where its run's settings say."""
    if isinstance(student, DD1Student) and student.point is None:
        student.point = config.dd1.point


def open_teacher(
    folder: Path, device: str, progress: Progress, *, files: GivenFiles = MappingProxyType({})
) -> tuple[TrainConfig, Teacher]:
    """Configuration and teacher of a finished run, or of a folder of `ddfast convert` or `ddfast.hub`.

    The latter two know nothing of a configuration.

    Raises:
        DDFastError: `folder` holds none of them, or a file of the teacher is not to be found.
    """
    check_device(device)
    given = {name: str(path) for name, path in files.items() if path is not None}
    if (folder / TEACHER_FILE).exists():
        if given:
            raise DDFastError(f"--{min(given)}: has no effect: {folder} holds its teacher, {TEACHER_FILE}")
        return TrainConfig(recipe=folder.name, device=device, out=folder), load_teacher(folder).to(device)
    path, values = _settings_of(folder)
    if "recipe" not in values:
        raise DDFastError(f"{path} names no recipe: it is not a run's")
    config = get_recipe(values["recipe"], preset=values.get("preset", ""), told=path)
    update(config, values)
    config.device, config.out = device, folder
    _find_files(config, folder, given)
    return config, build_teacher(config, progress)


def _settings_of(folder: Path) -> tuple[Path, dict[str, Any]]:
    """A run's settings, and the file that has them."""
    if (folder / CONFIG).exists():
        return folder / CONFIG, read_settings(folder / CONFIG)
    values = student_header(folder).get("config")
    if not isinstance(values, dict):
        raise DDFastError(f"--student {folder}: no {CONFIG} and no {TEACHER_FILE} there; `ddfast train` makes them")
    return folder / STUDENT_FILE, as_then(portable(values))  # files of before name folders of another machine


def student_header(folder: Path) -> dict[str, Any]:
    """What the student's file in a folder says of itself; empty where there is none."""
    path = folder / STUDENT_FILE
    return read_checkpoint(path)[1] if path.exists() else {}


def _find_files(config: TrainConfig, folder: Path, given: Mapping[str, str]) -> None:
    """Set where the teacher's files are: where the user says, where the run found them, or beside its student.

    Raises:
        DDFastError: one is in none of these places, or was given and is not read.
    """
    for name in TEACHER_FILES:
        table, _, field = name.partition(".")
        part = getattr(config, table)
        drawn = getattr(config.teacher, "random_weights", False) and field == "weights"
        if drawn or not hasattr(part, field):
            if name in given:
                why = "are drawn" if drawn else "come from no file"
                raise DDFastError(f"--{name}: has no effect: the weights of {folder} {why}")
            continue
        found = given.get(name, getattr(part, field))
        if found and name not in given and not Path(found).expanduser().exists():
            beside = folder / base_name(found)
            if not beside.exists():
                known = student_header(folder).get("files", {}).get(name, {}).get("sha256", "")
                told = f"{base_name(found)}{f' (SHA-256 {known})' if known else ''}"
                where = f"is neither at {found} nor in this folder" if found != beside.name else "is not in this folder"
                raise DDFastError(f"--student {folder}: its {name}, {told}, {where}: give --{name} FILE")
            found = str(beside)
        setattr(part, field, found)


def hashed_files(config: TrainConfig) -> dict[str, dict[str, str]]:
    """Base name and SHA-256 of the files that a run's settings name, by setting; those that are gone are left out."""
    settings = {name: value for name, value in _flat(plain(config)).items() if name.rpartition(".")[2] in FILES}
    named = {name: value for name, value in settings.items() if value and isinstance(value, str)}
    paths = {name: checkpoint_file(value) for name, value in named.items()}
    if config.init.startswith(DD1_PREFIX):
        start = Path(config.init.removeprefix(DD1_PREFIX))
        paths["init"] = start / STUDENT_FILE if start.is_dir() else start
    return {
        name: {"file": base_name(str(named.get(name, path))), "sha256": _sha256(path, path.stat().st_mtime_ns)}
        for name, path in paths.items()
        if path.is_file()
    }


@functools.lru_cache(maxsize=64)
def _sha256(path: Path, changed: int) -> str:
    """Of a file's content; a run asks more than once, and two gigabytes take seconds."""
    return file_sha256(path)


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
    write_atomically(path, _LOCAL + tomli_w.dumps(mine))


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
        self.seconds: dict[str, float] = read_seconds(path) if path.exists() else {}

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


def read_json(path: Path, checked: Callable[[Any], Any] = lambda found: expect(found, dict[str, Any])) -> Any:
    """The content of a run's JSON file, by what raises `ValueError` unless it is one; default: any object.

    Raises:
        DDFastError: it is damaged, or something else.
    """
    try:
        return checked(parse_json(read_text(path)))
    except ValueError as error:
        raise DDFastError(f"{path} is damaged ({error}); delete it and run again") from error


def read_seconds(path: Path) -> dict[str, float]:
    """Seconds by stage, of a run's stages.json; errors as of `read_json`."""
    return read_json(path, lambda found: expect(found, dict[str, float]))


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
