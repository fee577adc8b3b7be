"""The stages of a run: teacher, trajectories, distillation, evaluation, report; each is skipped when it is done."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddfast import processes
from ddfast.config import DD1_PREFIX, TrainConfig, plain
from ddfast.distill import checkpoints
from ddfast.distill.dd1 import check_settings
from ddfast.distill.stages import Live, adapt, distill, match, new_network, tune
from ddfast.distill.tracking import METRICS, check_trackers
from ddfast.errors import DDFastError
from ddfast.evaluation.paths import path_distance
from ddfast.evaluation.protocol import evaluate
from ddfast.files import write_atomically
from ddfast.messages import say
from ddfast.models.checkpoint import load_state, load_tensors, save_tensors, state_of
from ddfast.models.flow_network import FlowNetwork
from ddfast.models.loading import build_teacher, check_student, load_student, save_student
from ddfast.models.official import STUDENT_FILE
from ddfast.models.protocol import Teacher
from ddfast.models.student import Student
from ddfast.portable import portable
from ddfast.progress import Progress, ProgressBar
from ddfast.report import machine, quality_table, read_metrics, write_pictures, write_report
from ddfast.runs import (
    ADAPTATION_JSON,
    ADAPTED_FILE,
    GUIDANCE_FILE,
    METRICS_JSON,
    PAGE,
    PICTURES,
    REPORT,
    STAGES,
    THROUGHPUT,
    TUNED_FILE,
    Stages,
    check_device,
    claim_folder,
    complete,
    hashed_files,
    occupied,
)
from ddfast.trajectories.generate import generate_trajectories, store_settings
from ddfast.trajectories.memory import release_memory
from ddfast.trajectories.store import Trajectories, TrajectoryStore


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
    if config.method not in METHODS:
        raise DDFastError(f"unknown method {config.method!r}; known: {', '.join(METHODS)}")
    check_init(config)
    check_device(config.device)
    check_trackers(config.track)
    limit, kept = config.parallel.timeout, "the last checkpoint is kept"
    together = processes.together(config.device, limit, option="--parallel.timeout", kept=kept)
    with together, occupied(config.out):
        return _train(config, progress_bar)


def _train(config: TrainConfig, progress_bar: ProgressBar) -> dict[str, Any]:
    """`train` in a folder that is this run's alone, by all processes."""
    out = config.out
    processes.first_does(lambda: claim_folder(config))
    stages = Stages(out / STAGES)
    with stages.timed("teacher"):
        teacher = build_teacher(config, progress_bar("teacher"))
    check_student(teacher, config.method)
    if config.evaluation.lpips_vgg:
        path_distance(config.evaluation, teacher)  # files that are wrong are so now, not after the training
    student = METHODS[config.method](config, teacher, stages, progress_bar)
    checkpoints.remove(out)  # also those that a run left that was stopped when it had its student
    measured = not exists(out / METRICS_JSON)
    if not measured:
        say(f"evaluation: {out / METRICS_JSON} exists, skipped")
        metrics = read_metrics(out / METRICS_JSON)
    else:
        with stages.timed("evaluation"):
            metrics = evaluate(config, teacher, student, progress_bar("evaluation"))
        processes.first_does(lambda: write_atomically(out / METRICS_JSON, json.dumps(metrics, indent=2) + "\n"))
    if not measured and exists(out / PAGE) and exists(out / REPORT):
        say(f"report: {out / PAGE} exists, skipped")
        return metrics
    written = {"report": out / PAGE, "the same without curves": out / REPORT, "log": out / METRICS}
    with stages.timed("report"):
        if teacher.has_decoder:
            written["pictures"] = out / PICTURES
            write_pictures(config, teacher, student, written["pictures"])
        write_report(config, metrics, student, stages.seconds)
    say("\n".join(["", *quality_table(config, metrics, student), ""]))
    say(", ".join(f"{name}: {path}" for name, path in written.items()))
    return metrics


def exists(path: Path) -> bool:
    """Whether the first process sees a file: what the others see of a shared folder may be older."""
    return processes.first_does(path.exists)


def train_dd1(config: TrainConfig, teacher: Teacher, stages: Stages, progress_bar: ProgressBar) -> Student:
    """DD1's stages: trajectories, distillation."""
    out = config.out
    check_settings(config.dd1, teacher)
    store = None
    if config.dd1.pair_iterations:
        with stages.timed("trajectories"):
            store = make_trajectories(config, teacher, progress_bar("trajectories"))
    if exists(out / STUDENT_FILE):
        say(f"student: {out / STUDENT_FILE} exists, skipped")
    else:
        with stages.timed("distillation"):
            trajectories = store.load(config.trajectories.count) if store else None
            trained, live = distill(config, teacher, trajectories, out, progress=progress_bar("distillation"))
        finish_student(config, trained, live)
        del trained, live
        release_memory()
    student = load_student(out, teacher)
    complete(student, config)
    return student


def train_dd2(config: TrainConfig, teacher: Teacher, stages: Stages, progress_bar: ProgressBar) -> Student:
    """DD2's stages: trajectories where stage 1 reads a store, adaptation (LlamaGen), tuning, matching."""
    out, dd2 = config.out, config.dd2
    trajectories = None
    if dd2.tune.source == "store" and needs_tuning(config):
        with stages.timed("trajectories"):
            store = make_trajectories(config, teacher, progress_bar("trajectories"))
            trajectories = store.load(config.trajectories.count)
    if exists(out / STUDENT_FILE):
        say(f"student: {out / STUDENT_FILE} exists, skipped")
        return load_student(out, teacher)
    student, guidance = _starts(config, teacher, trajectories, stages, progress_bar)
    with stages.timed("matching"):
        live = match(config, teacher, student, guidance, out, progress=progress_bar("matching"))
    if guidance is not None:
        save_network(out / GUIDANCE_FILE, guidance)
    finish_student(config, student, live)
    del student, guidance, live
    release_memory()
    return load_student(out, teacher)


def finish_student(config: TrainConfig, student: Student, live: Live) -> None:
    """Write a trained student."""
    files = processes.first_does(lambda: hashed_files(config))
    about = {"config": portable(plain(config)), "files": files}
    save_student(config.out / STUDENT_FILE, student, about, live=live)
    processes.wait()


def _starts(
    config: TrainConfig,
    teacher: Teacher,
    trajectories: Trajectories | None,
    stages: Stages,
    progress_bar: ProgressBar,
) -> tuple[FlowNetwork, FlowNetwork | None]:
    """Generator and guidance network as the matching starts from them, after the stages before it."""
    out, match_config = config.out, config.dd2.match
    base = new_network(config, teacher).cpu()
    if base.looks_up:

        def adapting(network: FlowNetwork) -> None:
            likelihoods = adapt(config, teacher, network, out, progress=progress_bar("adaptation"))
            say("adaptation, nats per token: " + json.dumps(likelihoods))
            if processes.rank() == 0:
                write_atomically(out / ADAPTATION_JSON, json.dumps(likelihoods, indent=2) + "\n")

        with stages.timed("adaptation"):
            base = _after(adapting, base, out / ADAPTED_FILE)
    tuned = base
    if needs_tuning(config):

        def tuning(network: FlowNetwork) -> None:
            tune(config, teacher, network, trajectories, out, progress=progress_bar("tuning"))

        with stages.timed("tuning"):
            tuned = _after(tuning, base, out / TUNED_FILE)

    def started(where: str, recycles: int = 0) -> FlowNetwork:
        network = new_network(config, teacher, from_teacher=False, recycles=recycles)
        trained = {"stage1": tuned, "teacher": base}.get(where)
        if trained is not None:
            network.share(trained)
        return network

    student = started(config.init, config.dd2.recycles)
    if config.init.startswith(DD1_PREFIX):
        student.start_from_student(load_student(config.init.removeprefix(DD1_PREFIX), teacher))
    guidance = started(match_config.guidance_start) if match_config.score_weight else None
    return student, guidance


METHODS: dict[str, Callable[[TrainConfig, Teacher, Stages, ProgressBar], Student]] = {
    "dd1": train_dd1,
    "dd2": train_dd2,
}
"""What makes a student of the teacher, by the method's name: its stages, of which those that are done are skipped."""


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


def _after(stage: Callable[[FlowNetwork], None], network: FlowNetwork, path: Path) -> FlowNetwork:
    """A network like the given one after a stage, as the stage's file has it: the file is made if it is not there.

    Both are on the CPU: beside what a stage trains, the device shall hold nothing.
    """
    if exists(path):
        say(f"{path} exists, skipped")
    else:
        trained = copy.deepcopy(network).to(network.teacher.codebook.device)
        stage(trained)
        save_network(path, trained)
        processes.wait()
        checkpoints.remove(path.parent)
        del trained
        release_memory()
    after = copy.deepcopy(network)
    load_state(after, load_tensors(path)[0], path)
    return after


def save_network(path: Path, network: FlowNetwork) -> None:
    """Write a stage's network; where it is spread over processes, all call this."""
    save_tensors(path, state_of(network), {"network": network.config})


def make_trajectories(config: TrainConfig, teacher: Teacher, progress: Progress) -> TrajectoryStore:
    """The store in `config.out/trajectories` with at least the pairs that the configuration asks for.

    What was made, how fast and on what machine becomes a line of `config.out/throughput.jsonl`.
    """
    settings = config.trajectories
    folder, wanted = config.out / "trajectories", store_settings(teacher, settings, config.seed)
    store = processes.first_then_all(lambda: TrajectoryStore.open_or_create(folder, wanted))
    made = generate_trajectories(teacher, store, settings.count, batch_size=settings.batch_size, progress=progress)
    all_made = [share for share in processes.gather(made) if share.pairs]
    if not all_made:
        say("trajectories: all there, skipped")
    else:
        pairs, rate = sum(share.pairs for share in all_made), sum(share.pairs_per_s for share in all_made)
        say(f"trajectories: {pairs} pairs, {rate:.1f} pairs/s in batches of {all_made[0].batch_size}")
    if not made.pairs:
        return store
    line = {**dataclasses.asdict(made), "pairs_per_s": made.pairs_per_s, "device": config.device}
    line |= {"process": processes.rank(), "processes": processes.count(), **machine()}
    with (config.out / THROUGHPUT).open("a") as file:
        file.write(json.dumps(line) + "\n")
    return store
