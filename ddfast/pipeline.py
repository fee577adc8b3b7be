"""The stages of a run: teacher, trajectories, distillation, evaluation, report; each is skipped when it is done."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nvtx
import tomli_w
import torch

from ddfast.config import TrainConfig, read_toml, update
from ddfast.distill.dd1 import check_point
from ddfast.distill.trainer import CHECKPOINT, METRICS, distill
from ddfast.errors import DDFastError
from ddfast.evaluation import Evaluator, measure_speed
from ddfast.files import write_atomically
from ddfast.models.checkpoint import load_tensors
from ddfast.models.digits import Progress
from ddfast.models.loading import STUDENT_FILE, TEACHER_FILE, load_student, load_teacher, save_student
from ddfast.models.protocol import Teacher
from ddfast.models.student import Student
from ddfast.recipes import build_teacher, get_recipe
from ddfast.report import quality_table, write_pictures, write_report
from ddfast.sampling import sample, sources_for
from ddfast.trajectories.generate import generate_trajectories, store_settings
from ddfast.trajectories.store import TrajectoryStore

CONFIG, METRICS_JSON, STAGES = "config.toml", "metrics.json", "stages.json"

LOCATION = ("out", "device", "resume")
"""Fields that decide where and how a run goes on, not what it makes."""


def train(config: TrainConfig, *, progress_bar: Callable[[str], Progress]) -> dict[str, Any]:
    """Run what is missing in `config.out`, and return the content of metrics.json.

    A folder whose config.toml has other settings is refused before anything is written; a run of the same settings
    continues by itself, and with `resume` there must be one.

    Args:
        config: everything about the run.
        progress_bar: makes the progress callback of a stage from its title.

    Raises:
        DDFastError: the folder cannot be used, the method is unknown, or a stage fails; what was done is kept.
    """
    if config.method != "dd1":
        raise DDFastError(f"unknown method {config.method!r}; known: dd1")
    check_device(config.device)
    out = config.out
    claim_folder(config)
    stages = _Stages(out / STAGES)

    with stages.timed("teacher"):
        teacher = build_teacher(config, progress_bar("teacher"))
    check_point(config.dd1, teacher)
    with stages.timed("trajectories"):
        store = make_trajectories(config, teacher, progress_bar("trajectories"))
    if (out / STUDENT_FILE).exists():
        print(f"student: {out / STUDENT_FILE} exists, skipped")
        student = load_student(out, teacher)
    else:
        with stages.timed("distillation"):
            trajectories = store.load(config.trajectories.count)
            student, live = distill(config, teacher, trajectories, out, progress=progress_bar("distillation"))
        save_student(out / STUDENT_FILE, student, {"config": plain(config)}, live=live)
        (out / CHECKPOINT).unlink(missing_ok=True)
    if (out / METRICS_JSON).exists():
        print(f"evaluation: {out / METRICS_JSON} exists, skipped")
        return _read_json(out / METRICS_JSON)
    with stages.timed("evaluation"):
        metrics = evaluate(config, teacher, student, progress_bar("evaluation"))
    write_pictures(config, teacher, student, out / "samples.png")
    write_report(config, metrics, stages.seconds, out / "report.md")
    write_atomically(out / METRICS_JSON, json.dumps(metrics, indent=2) + "\n")
    print("\n".join(["", *quality_table(config, metrics), ""]))
    print(f"report: {out / 'report.md'}, pictures: {out / 'samples.png'}, log: {out / METRICS}")
    return metrics


def make_trajectories(config: TrainConfig, teacher: Teacher, progress: Progress) -> TrajectoryStore:
    """The store in `config.out/trajectories` with at least the pairs that the configuration asks for."""
    wanted = store_settings(teacher, config.trajectories, config.seed)
    store = TrajectoryStore.open_or_create(config.out / "trajectories", wanted)
    rate = generate_trajectories(teacher, store, config.trajectories.count, progress=progress)
    print(f"trajectories: {rate:.0f} pairs/s" if rate else "trajectories: all there, skipped")
    return store


def evaluate(config: TrainConfig, teacher: Teacher, student: Student, progress: Progress) -> dict[str, Any]:
    """Quality of every source and the speeds, as metrics.json holds them."""
    evaluator = Evaluator(config, teacher)
    rows: dict[str, dict[str, Any]] = {}
    point, count = config.dd1.point, config.evaluation.samples
    sources = sources_for(teacher)
    seed, batch_size = config.seed + 2_000_003, config.evaluation.batch_size
    for done, source in enumerate(sources):
        progress(done, len(sources) + 1, source)
        with nvtx.annotate(f"evaluate {source}"):
            samples = sample(source, teacher, student, count=count, seed=seed, point=point, batch_size=batch_size)
            rows[source] = dict(evaluator.measure(samples))
    progress(len(sources), len(sources) + 1, "speed")
    add_speed(rows, config, teacher, student)
    progress(len(sources) + 1, len(sources) + 1, "done")
    return {"method": config.method, "recipe": config.recipe, "num_groups": len(teacher.groups), **rows}


def add_speed(rows: dict[str, dict[str, Any]], config: TrainConfig, teacher: Teacher, student: Student) -> None:
    """Seconds per image, with and without image decoding, and the speed-ups over this package's AR decoding."""
    names = {"teacher": "ar", "teacher_plain": "ar_plain", "student_1step": "student_1step"}
    names |= {"student_2step": "student_2step", "independent_marginals": "marginals"}
    seconds = measure_speed(teacher, student, batch_sizes=config.evaluation.batch_sizes, point=config.dd1.point)
    decoder = seconds["image_decoder"]
    for row, source in names.items():
        if source in seconds:
            own = seconds[source]
            rows.setdefault(row, {})["seconds_per_image"] = {str(batch): value for batch, value in own.items()}
            rows[row]["seconds_per_image_decoded"] = {str(batch): own[batch] + decoder[batch] for batch in own}
    for row in ("student_1step", "student_2step"):
        for baseline, key in (("ar", "speedup_vs_ar"), ("ar_plain", "speedup_vs_plain_ar")):
            rows[row][key] = {str(batch): seconds[baseline][batch] / own for batch, own in seconds[row].items()}


def open_student(folder: Path, device: str, progress: Progress) -> tuple[TrainConfig, Teacher, Student]:
    """Configuration, teacher and student of a finished run, or of a folder of `ddfast convert` or `ddfast.hub`.

    Raises:
        DDFastError: `folder` holds none of them.
    """
    if not (folder / STUDENT_FILE).exists():
        raise DDFastError(f"--student {folder}: no {STUDENT_FILE} there; `ddfast train` and `ddfast convert` make it")
    config, teacher = open_teacher(folder, device, progress)
    return config, teacher, load_student(folder, teacher)


def open_teacher(folder: Path, device: str, progress: Progress) -> tuple[TrainConfig, Teacher]:
    """Configuration and teacher of a finished run, or of a folder of `ddfast convert` or `ddfast.hub`.

    The latter two know no more of a configuration than the point of the student's second step.

    Raises:
        DDFastError: `folder` holds none of them.
    """
    check_device(device)
    if (folder / TEACHER_FILE).exists():
        teacher = load_teacher(folder).to(device)
        config = TrainConfig(recipe=folder.name, device=device)
        header = load_tensors(folder / STUDENT_FILE)[1] if (folder / STUDENT_FILE).exists() else {}
        config.dd1.point = header.get("point") or max(len(teacher.groups) // 2, 1)
        return config, teacher
    if not (folder / CONFIG).exists():
        raise DDFastError(f"--student {folder}: no {CONFIG} and no {TEACHER_FILE} there; `ddfast train` makes them")
    values = read_toml(folder / CONFIG)
    if "recipe" not in values:
        raise DDFastError(f"{folder / CONFIG} names no recipe: it is not a run's")
    config = get_recipe(values["recipe"])
    update(config, values)
    config.device = device
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


def claim_folder(config: TrainConfig) -> None:
    """Make `config.out`, or accept it if what it holds was made with the same settings; then write config.toml."""
    out, path = config.out, config.out / CONFIG
    mine = plain(config)
    if any((out / name).exists() for name in ("trajectories", CHECKPOINT, STUDENT_FILE)) and path.exists():
        theirs = _flat(read_toml(path))
        different = [
            f"{name} is {theirs.get(name)!r}, not {value!r}"
            for name, value in _flat(mine).items()
            if name not in LOCATION and theirs.get(name) != value
        ]
        if different:
            raise DDFastError(f"{out} holds a run with other settings ({'; '.join(different)}); choose another --out")
    elif config.resume:
        raise DDFastError(f"--resume: no run in {out}; leave --resume out to start one")
    write_atomically(path, tomli_w.dumps(mine))


def plain(config: TrainConfig) -> dict[str, Any]:
    """A configuration as TOML and JSON can hold it."""
    values = dataclasses.asdict(config)
    values["out"] = str(values["out"])
    return _listed(values)


def _listed(values: dict[str, Any]) -> dict[str, Any]:
    """Tuples as the lists that TOML and JSON read back."""
    return {
        name: _listed(value) if isinstance(value, dict) else list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
    }


class _Stages:
    """Seconds that every stage took, kept over interruptions."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = _read_json(path) if path.exists() else {}

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time of the body to the stage's, whether it ends or is interrupted."""
        started = time.perf_counter()
        try:
            with nvtx.annotate(name):
                yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
            write_atomically(self.path, json.dumps(self.seconds, indent=2) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise DDFastError(f"{path} is damaged ({error}); delete it and run again") from error


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as {"a.b": value}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
