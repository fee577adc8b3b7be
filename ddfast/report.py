"""What a run leaves for people: report.md, report.html and samples.png."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

import ddfast
from ddfast import charts, env, gallery, page, processes, seeds, tables
from ddfast.config import TrainConfig, plain
from ddfast.distill.tracking import METRICS, read_log
from ddfast.evaluation.paths import interpolate
from ddfast.evaluation.sources import sources_for, stream
from ddfast.files import write_atomically
from ddfast.models import families
from ddfast.models.protocol import Teacher
from ddfast.models.student import Student
from ddfast.ops import native
from ddfast.page import Block, Charts, Code, Facts, Page, Section, Text
from ddfast.pictures import decoded, grid
from ddfast.portable import portable_command, shared_settings
from ddfast.runs import PAGE, PICTURES, REPORT, hashed_files, read_json

Shown: TypeAlias = tuple[list[int], dict[str, Tensor]]
"""What `gallery.same_noise` makes."""


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    return {
        "processor": f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ddfast": ddfast.__version__ + (f", commit {commit()}" if commit() else ""),
        "cpu kernels": "none; `ddfast doctor` says why" if native.cpu is None else native.cpu_reason,
    }


def command_line(command: str) -> str:
    """What was typed to start this process, in the form `python -m ddfast.COMMAND ...`, whichever way it was typed.

    Of several processes: what starts as many by torchrun, but for where their machines are.
    """
    # `ddfast COMMAND ...` and `python -m ddfast COMMAND ...` have the command among their arguments.
    arguments = sys.argv[2:] if sys.argv[1:2] == [command] else sys.argv[1:]
    start, (_, size), (_, local) = ["python"], env.rank_and_world_size(), env.local_rank_and_world_size()
    if size > 1:
        start = ["torchrun", f"--nproc-per-node={local}", *([f"--nnodes={size // local}"] if size > local else [])]
    return shlex.join([*start, "-m", f"ddfast.{command}", *arguments])


def commit() -> str:
    """The commit of the source folder, if there is one."""
    folder = Path(ddfast.__file__).resolve().parent
    call = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(call, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def quality_table(config: TrainConfig, metrics: dict[str, Any], student: Student) -> list[str]:
    """Lines of a Markdown table, a row per source of samples.

    Its form: docs/method.md section 18 (Published results).
    """
    return list(tables.quality(config, metrics, student).markdown())


def read_metrics(path: Path) -> dict[str, Any]:
    """A run's metrics.json; errors as of `read_json`."""
    return read_json(path, tables.checked_metrics)


def write_report(config: TrainConfig, metrics: dict[str, Any], student: Student, seconds: dict[str, float]) -> None:
    """What a run has made, on what, and how it went, as report.md and as report.html in `config.out`.

    Of several processes, all share what is sampled for it, and the first one writes it.

    Args:
        config: the run's settings.
        metrics: content of metrics.json.
        student: of the run.
        seconds: duration of every stage.
    """
    teacher = student.teacher
    shown = gallery.same_noise(config, teacher, student) if teacher.has_decoder or teacher.makes_text() else None

    def write() -> None:
        told = _page(config, metrics, student, seconds, shown)
        write_atomically(config.out / REPORT, page.markdown(told))
        write_atomically(config.out / PAGE, page.html(told))

    processes.first_does(write)


def _page(
    config: TrainConfig, metrics: dict[str, Any], student: Student, seconds: dict[str, float], shown: Shown | None
) -> Page:
    """All of the report."""
    teacher, names = student.teacher, tables.names_of(metrics, student)
    sections = [
        Section(title="Quality and speed", blocks=[tables.quality(config, metrics, student)]),
        _samples(config, teacher, shown),
        _paths(config, metrics, student),
        _failures(config, metrics, student),
        _classes(config, metrics, teacher, student),
        _training(config, metrics),
        _origin(config, seconds),
    ]
    if against := charts.quality_against_speed(metrics, names):
        sections[0].blocks.append(Text(text=_DASHED))
        sections[0].blocks.append(Charts(charts=against))
    steps = f"{metrics['num_groups']} steps, {teacher.num_tokens} tokens of {teacher.num_codes} codes"
    family = families.of_teacher(teacher).name
    kind = "an unregistered" if family == "none" else f"the {family}"
    return Page(
        title=f"{student.method.upper()} on the recipe",
        name=config.recipe,
        lead=f"{student.method.upper()} distilled {kind} teacher ({steps}) into a student of one or two steps.",
        cards=tables.cards(metrics, student),
        picture=PICTURES if teacher.has_decoder else "",
        sections=[section for section in sections if section.blocks],
    )


def _samples(config: TrainConfig, teacher: Teacher, shown: Shown | None) -> Section:
    """Teacher and student from the same noise."""
    section = Section(title="Samples from the same noise", blocks=[])
    if shown is None:
        told = "This teacher has no image tokenizer: its samples are codes, and there are no pictures of them."
        section.blocks = [Text(text=told)]
    elif teacher.makes_text():
        told = "What stands in a row began with the same noise. Nothing was picked."
        section.blocks = [Text(text=told), gallery.as_texts(teacher, shown[1])]
    else:
        told = (
            "What stands in a column of a group began with the same noise: the teacher's flow, and the student in one "
            "and in two steps. DD1 learns to end where the flow does; DD2 learns its distribution, and may end "
            "elsewhere. Nothing was picked."
        )
        section.blocks = [Text(text=told), gallery.by_condition(teacher, *shown)]
    return section


_DASHED = "The dashed line is the teacher: what a student can reach at any speed. Here are the sources that are timed."

_PATHS, _FRAMES = 4, 8


def _paths(config: TrainConfig, metrics: dict[str, Any], student: Student) -> Section:
    """What lies between two noises, and how far images move there."""
    teacher, table = student.teacher, tables.paths(metrics, student)
    section = Section(title="Interpolations in noise", blocks=[])
    if teacher.has_decoder:
        conditions = gallery.spread(teacher, _PATHS)
        settings: dict[str, Any] = {"count": len(conditions), "frames": _FRAMES, "classes": conditions}
        settings |= {"seed": seeds.derived(config.seed, 6_000_003)}
        told = "From one noise to another, along the arc between them: the teacher's flow, and the student's one step."
        section.blocks += [
            Text(text=told),
            gallery.paths(student, {who: interpolate(teacher, who, **settings) for who in (None, student)}, conditions),
        ]
    if table is not None:
        section.blocks.append(table)
    return section


def _failures(config: TrainConfig, metrics: dict[str, Any], student: Student) -> Section:
    """What one step does worst."""
    found = gallery.failures(config, metrics, student)
    if found is None:
        return Section(title="Failures", blocks=[])
    told = (
        f"Of the {config.evaluation.samples} one-step samples that the figures are of, those that the teacher finds "
        "least likely, the worst first, each beside the teacher's own from the same noise. Numbers: negative "
        "log-likelihood under the teacher, nats per token."
    )
    return Section(title="Failures", blocks=[Text(text=told), found])


def _classes(config: TrainConfig, metrics: dict[str, Any], teacher: Teacher, student: Student) -> Section:
    """Where a run has classes: the figures of each."""
    table = tables.classes(config, metrics, teacher, student)
    blocks: list[Block] = []
    if table is not None:
        blocks = [Charts(charts=charts.classes(metrics, tables.names_of(metrics, student))), table]
    return Section(title="Class by class", blocks=blocks)


def _training(config: TrainConfig, metrics: dict[str, Any]) -> Section:
    """Curves of every stage that has a log."""
    section = Section(title="Training", blocks=[])
    for stage, lines in read_log(config.out / METRICS).items():
        # What stage 2 of DD2 watches is what the figures measure; stage 0's likelihoods are others.
        own = metrics["teacher"].get("teacher_nll") if any("diversity" in line for line in lines) else None
        drawn = charts.training(stage, lines, {} if own is None else {"teacher_nll": own})
        if drawn:
            section.blocks.append(Charts(title=stage.capitalize(), charts=drawn))
    return section


def _origin(config: TrainConfig, seconds: dict[str, float]) -> Section:
    """What produced it."""
    facts = {
        **machine(),
        "seed": f"{config.seed}; all settings: config.toml",
        "seconds per stage": ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()),
    }
    return Section(
        title="What produced it",
        blocks=[
            Code(text=portable_command(command_line("train"))),
            Facts(facts=facts, timed=("seconds per stage",)),
            Code(title="All settings", text=shared_settings(plain(config), hashed_files(config))),
        ],
    )


def write_pictures(config: TrainConfig, teacher: Teacher, student: Student, path: Path, *, columns: int = 6) -> None:
    """A grid per source, a row per class: teacher, one step, two steps and independent marginals side by side.

    Several processes share what is to be sampled, and the first one writes it.
    """
    classes = min(teacher.num_conditions, 10)
    pictures: dict[str, list[Tensor]] = {}
    for source in sources_for(teacher, student):
        if not source.picture:
            continue
        batches = stream(
            source.name,
            teacher,
            student,
            count=classes * columns,
            seed=seeds.derived(config.seed, 3_000_003),
            classes=range(classes),
            batch_size=min(config.evaluation.batch_size, 64),
        )
        title = source.picture.format(method=student.method.upper())
        pictures[title] = processes.collected([decoded(batch, teacher) for batch in batches])
    processes.first_does(lambda: _write_figure(pictures, classes, path))


def _write_figure(pictures: dict[str, list[Tensor]], rows: int, path: Path) -> None:
    """A grid of pixels, in batches [B, 3, H, W], for every title."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(pictures), figsize=(4.2 * len(pictures), 0.68 * rows + 0.5))
    for axis, (title, batches) in zip(axes, pictures.items(), strict=True):
        image = grid(torch.cat(batches), rows)
        height = (len(image) + 1) // rows
        axis.imshow(image.numpy(), interpolation="nearest")
        axis.set_title(title)
        axis.set_xticks([])
        axis.set_yticks([label * height + height / 2 for label in range(rows)], range(rows))
        axis.tick_params(length=0)
        for side in axis.spines.values():
            side.set_visible(False)
    figure.tight_layout()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))
    pyplot.close(figure)
