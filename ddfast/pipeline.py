"""The stages of a run: teacher, trajectories, distillation, evaluation, report; each is skipped when it is done."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nvtx
import tomli_w
import torch

from ddfast import env, seeds
from ddfast.config import DD1_PREFIX, TrainConfig, read_toml, update
from ddfast.distill.dd1 import check_point
from ddfast.distill.stages import adapt, distill, match, new_network, tune
from ddfast.distill.trainer import CHECKPOINT, METRICS
from ddfast.errors import DDFastError
from ddfast.evaluation import Evaluator, measure_speed
from ddfast.files import read_text, write_atomically
from ddfast.messages import say
from ddfast.models.checkpoint import load_state, load_tensors, save_tensors
from ddfast.models.digits import Progress
from ddfast.models.flow_network import FlowNetwork
from ddfast.models.llamagen import LlamaGenFlowNetwork
from ddfast.models.loading import load_student, load_teacher, save_student
from ddfast.models.official import STUDENT_FILE, TEACHER_FILE
from ddfast.models.protocol import Teacher
from ddfast.models.student import Student
from ddfast.recipes import build_teacher, get_recipe
from ddfast.report import machine, quality_table, write_pictures, write_report
from ddfast.sampling import sources_for, stream
from ddfast.trajectories.generate import generate_trajectories, store_settings
from ddfast.trajectories.store import TrajectoryStore

CONFIG, METRICS_JSON, STAGES = "config.toml", "metrics.json", "stages.json"
THROUGHPUT = "throughput.jsonl"

ADAPTED_FILE, TUNED_FILE, GUIDANCE_FILE = "adapted.safetensors", "ar-diffusion.safetensors", "guidance.safetensors"
ADAPTATION_JSON = "adaptation.json"

ProgressBar = Callable[[str], Progress]
"""Makes the progress callback of a stage from its title."""

LOCATION = ("out", "device", "resume", "trajectories.batch_size")
"""Fields that decide where and how a run goes on, not what it makes."""


def train(config: TrainConfig, *, progress_bar: ProgressBar) -> dict[str, Any]:
    """Run what is missing in `config.out`, and return the content of metrics.json.

    A folder whose config.toml has other settings is refused before anything is written; a run of the same settings
    continues by itself, and with `resume` there must be one.

    Args:
        config: everything about the run.
        progress_bar: makes the progress callback of a stage from its title.

    Raises:
        DDFastError: the folder cannot be used, the method is unknown, or a stage fails; what was done is kept.
    """
    env.check_one_process("train")
    if config.method not in ("dd1", "dd2"):
        raise DDFastError(f"unknown method {config.method!r}; known: dd1, dd2")
    check_init(config)
    check_device(config.device)
    out = config.out
    claim_folder(config)
    stages = Stages(out / STAGES)

    with stages.timed("teacher"):
        teacher = build_teacher(config, progress_bar("teacher"))
    student = (train_dd1 if config.method == "dd1" else train_dd2)(config, teacher, stages, progress_bar)
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


def train_dd1(config: TrainConfig, teacher: Teacher, stages: Stages, progress_bar: ProgressBar) -> Student:
    """DD1's stages: trajectories, distillation."""
    out = config.out
    check_point(config.dd1, teacher)
    with stages.timed("trajectories"):
        store = make_trajectories(config, teacher, progress_bar("trajectories"))
    if (out / STUDENT_FILE).exists():
        print(f"student: {out / STUDENT_FILE} exists, skipped")
        return load_student(out, teacher)
    with stages.timed("distillation"):
        trajectories = store.load(config.trajectories.count)
        student, live = distill(config, teacher, trajectories, out, progress=progress_bar("distillation"))
    save_student(out / STUDENT_FILE, student, {"config": plain(config)}, live=live)
    (out / CHECKPOINT).unlink(missing_ok=True)
    return student


def train_dd2(config: TrainConfig, teacher: Teacher, stages: Stages, progress_bar: ProgressBar) -> Student:
    """DD2's stages: trajectories where stage 1 reads a store, adaptation (LlamaGen), tuning, matching."""
    out, dd2 = config.out, config.dd2
    trajectories = None
    if dd2.tune.source == "store" and needs_tuning(config):
        with stages.timed("trajectories"):
            store = make_trajectories(config, teacher, progress_bar("trajectories"))
            trajectories = store.load(config.trajectories.count)
    if (out / STUDENT_FILE).exists():
        print(f"student: {out / STUDENT_FILE} exists, skipped")
        return load_student(out, teacher)
    base = new_network(config, teacher)
    if isinstance(base, LlamaGenFlowNetwork):
        with stages.timed("adaptation"), _artefact(base, out / ADAPTED_FILE) as todo:
            if todo:
                likelihoods = adapt(config, teacher, base, out, progress=progress_bar("adaptation"))
                print("adaptation, nats per token: " + json.dumps(likelihoods))
                write_atomically(out / ADAPTATION_JSON, json.dumps(likelihoods, indent=2) + "\n")
    tuned = copy.deepcopy(base)
    if needs_tuning(config):
        with stages.timed("tuning"), _artefact(tuned, out / TUNED_FILE) as todo:
            if todo:
                tune(config, teacher, tuned, trajectories, out, progress=progress_bar("tuning"))

    def started(where: str) -> FlowNetwork:
        trained = {"stage1": tuned, "teacher": base}.get(where)
        return new_network(config, teacher, from_teacher=False) if trained is None else copy.deepcopy(trained)

    student = started(config.init)
    if config.init.startswith(DD1_PREFIX):
        student.start_from_student(load_student(config.init.removeprefix(DD1_PREFIX), teacher))
    guidance = started(dd2.match.guidance_start) if dd2.match.score_weight else None
    with stages.timed("matching"):
        live = match(config, teacher, student, guidance, out, progress=progress_bar("matching"))
    if guidance is not None:
        save_network(out / GUIDANCE_FILE, guidance)
    save_student(out / STUDENT_FILE, student, {"config": plain(config)}, live=live)
    (out / CHECKPOINT).unlink(missing_ok=True)
    return student


def needs_tuning(config: TrainConfig) -> bool:
    """Whether generator or guidance network starts from stage 1."""
    match = config.dd2.match
    return config.init == "stage1" or (match.score_weight > 0 and match.guidance_start == "stage1")


def check_init(config: TrainConfig) -> None:
    """Raise unless `config.init` names a start that the method has."""
    init = config.init
    if init in ("stage1", "teacher", "scratch"):
        return
    if not init.startswith(DD1_PREFIX):
        raise DDFastError(f"--init: got {init!r}, expected stage1, teacher, scratch or dd1:PATH")
    path = Path(init.removeprefix(DD1_PREFIX))
    if config.method != "dd2":
        raise DDFastError(f"--init {init}: only --method dd2 starts from a DD1 student")
    if not (path.is_file() or (path / STUDENT_FILE).exists()):
        raise DDFastError(f"--init {init}: no {STUDENT_FILE} at {path}; `ddfast train --method dd1` makes it")


@contextlib.contextmanager
def _artefact(network: FlowNetwork, path: Path) -> Iterator[bool]:
    """Load a stage's network if its file is there (yields False), else save it after the body (yields True)."""
    if path.exists():
        print(f"{path} exists, skipped")
        load_state(network, load_tensors(path)[0], path)
        yield False
        return
    yield True
    save_network(path, network)
    (path.parent / CHECKPOINT).unlink(missing_ok=True)


def save_network(path: Path, network: FlowNetwork) -> None:
    """Write a stage's network."""
    save_tensors(path, network.state_dict(), {"network": network.config})


def make_trajectories(config: TrainConfig, teacher: Teacher, progress: Progress) -> TrajectoryStore:
    """The store in `config.out/trajectories` with at least the pairs that the configuration asks for.

    What was made, how fast and on what machine becomes a line of `config.out/throughput.jsonl`.
    """
    settings = config.trajectories
    store = TrajectoryStore.open_or_create(config.out / "trajectories", store_settings(teacher, settings, config.seed))
    made = generate_trajectories(teacher, store, settings.count, batch_size=settings.batch_size, progress=progress)
    if not made.pairs:
        print("trajectories: all there, skipped")
        return store
    print(f"trajectories: {made.pairs} pairs, {made.pairs_per_s:.1f} pairs/s in batches of {made.batch_size}")
    rank, world_size = env.rank_and_world_size()
    line = {**dataclasses.asdict(made), "pairs_per_s": made.pairs_per_s, "device": config.device}
    line |= {"process": rank, "processes": world_size, **machine()}
    with (config.out / THROUGHPUT).open("a") as file:
        file.write(json.dumps(line) + "\n")
    return store


def evaluate(config: TrainConfig, teacher: Teacher, student: Student, progress: Progress) -> dict[str, Any]:
    """Quality of every source and the speeds, as metrics.json holds them."""
    evaluator = Evaluator(config, teacher)
    rows: dict[str, dict[str, Any]] = {}
    sources = sources_for(teacher, student)
    settings: dict[str, Any] = {"count": config.evaluation.samples, "batch_size": config.evaluation.batch_size}
    settings |= {"seed": seeds.derived(config.seed, 2_000_003), "point": config.dd1.point}
    for done, source in enumerate(sources):
        progress(done, len(sources) + 1, source)
        with nvtx.annotate(f"evaluate {source}"):
            rows[source] = dict(evaluator.measure(stream(source, teacher, student, **settings)))
    if (config.out / TUNED_FILE).exists():
        tuned = new_network(config, teacher)
        load_state(tuned, load_tensors(config.out / TUNED_FILE)[0], config.out / TUNED_FILE)
        rows["ar_diffusion"] = dict(evaluator.measure(stream("ar_diffusion", teacher, tuned, **settings)))
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
        where = f"no {STUDENT_FILE} there" if folder.is_dir() else f"no {STUDENT_FILE} there: it is no folder"
        raise DDFastError(f"--student {folder}: {where}; `ddfast train` and `ddfast convert` make it")
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
        config = TrainConfig(recipe=folder.name, device=device, out=folder)
        header = load_tensors(folder / STUDENT_FILE)[1] if (folder / STUDENT_FILE).exists() else {}
        point = header.get("point")
        config.dd1.point = point or max(len(teacher.groups) // 2, 1)
        if point is None and header.get("method") == "dd1":
            where = f"nothing says where the student's second step starts: point {config.dd1.point} is assumed"
            say(f"{folder}: {where} (--point of `ddfast convert` and `ddfast sample`)")
        return config, teacher
    if not (folder / CONFIG).exists():
        raise DDFastError(f"--student {folder}: no {CONFIG} and no {TEACHER_FILE} there; `ddfast train` makes them")
    values = read_toml(folder / CONFIG)
    if "recipe" not in values:
        raise DDFastError(f"{folder / CONFIG} names no recipe: it is not a run's")
    config = get_recipe(values["recipe"])
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


def claim_folder(config: TrainConfig) -> None:
    """Make `config.out`, or accept it if what it holds was made with the same settings; then write config.toml."""
    out, path = config.out, config.out / CONFIG
    mine = plain(config)
    artefacts = ("trajectories", CHECKPOINT, STUDENT_FILE, ADAPTED_FILE, TUNED_FILE)
    if any((out / name).exists() for name in artefacts) and path.exists():
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


class Stages:
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
        return json.loads(read_text(path))
    except ValueError as error:
        raise DDFastError(f"{path} is damaged ({error}); delete it and run again") from error


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as {"a.b": value}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
