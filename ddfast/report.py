"""What a run leaves for people: report.md and samples.png."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ddfast
from ddfast import env, processes, seeds
from ddfast.config import TrainConfig
from ddfast.evaluation.sources import SOURCES, sources_for, stream
from ddfast.files import write_atomically
from ddfast.models.protocol import Teacher
from ddfast.models.student import Student
from ddfast.ops import native
from ddfast.pictures import decoded, grid
from ddfast.runs import PICTURES


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    return {
        "processor": f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ddfast": ddfast.__version__ + (f", commit {commit()}" if commit() else ""),
        "cpu kernels": native.cpu_reason,
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
    batches = [str(batch) for batch in config.evaluation.batch_sizes]
    head = ["model", "steps", "Fréchet", "accuracy", "NLL/token", "pair TV"]
    head += [f"ms/image, batch {batch}" for batch in batches]
    head += [f"with image decoding, batch {batch}" for batch in batches]
    head += [f"speed-up over AR, batch {batch}" for batch in batches]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    names = {"method": student.method.upper(), "two": student.two_steps, **_steps(metrics["num_groups"])}
    for source in SOURCES.values():
        row = metrics.get(source.name, {})
        if not source.label or not row:
            continue
        cells = [source.label.format(**names), source.steps.format(**names, **row)]
        forms = {"frechet": ".2f", "class_accuracy": ".3f", "teacher_nll": ".3f", "pair_tv": ".3f"}
        cells += [format(row[name], form) if name in row else "" for name, form in forms.items()]
        for timing, scale, form in (
            ("seconds_per_image", 1e3, "{:.3f}"),
            ("seconds_per_image_decoded", 1e3, "{:.3f}"),
            ("speedup_vs_ar", 1, "{:.1f}x"),
        ):
            cells += [form.format(row[timing][batch] * scale) if timing in row else "" for batch in batches]
        lines.append("| " + " | ".join(cells) + " |")
    plain = metrics["teacher_plain"]["seconds_per_image"]
    measured = metrics["teacher"]
    notes = [f"Quality from {config.evaluation.samples} samples each."]
    if "frechet" in measured:
        notes.append("Fréchet: in the features of a small classifier, to real images of the training split.")
    notes.append("NLL: nats under the teacher with its guidance, unfiltered.")
    if "pair_tv" in measured:
        notes.append("Pair TV: to fresh samples of the teacher, whose own row is the floor.")
    lines += [
        "",
        " ".join(notes) + " Times: medians, all sources in turn in one run; AR "
        "decoding is this package's KV-cached decoder with guidance. The same in plain PyTorch takes "
        + ", ".join(f"{plain[batch] * 1e3:.2f} ms/image at batch {batch}" for batch in batches)
        + ".",
    ]
    return lines


def write_report(
    config: TrainConfig, metrics: dict[str, Any], student: Student, seconds: dict[str, float], path: Path
) -> None:
    """The table, the pictures and what produced them; of several processes, the first one writes it.

    Args:
        config: the run's settings.
        metrics: content of metrics.json.
        student: of the run.
        seconds: duration of every stage.
        path: the Markdown file.
    """

    def write() -> None:
        text = [
            f"# {student.method.upper()} on the recipe `{config.recipe}`",
            "",
            *([f"![samples]({PICTURES})", ""] if student.teacher.has_decoder else []),
            *quality_table(config, metrics, student),
            "",
            "## What produced it",
            "",
            f"    {command_line('train')}",
            "",
            *[f"- {name}: {value}" for name, value in machine().items()],
            f"- seed {config.seed}; all settings: config.toml",
            "- seconds per stage: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()),
            "",
        ]
        write_atomically(path, "\n".join(text))

    processes.first_does(write)


def _steps(groups: int) -> dict[str, int]:
    return {"n": groups, "quarter": max(groups // 4, 1), "kept": groups - max(groups // 4, 1)}


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
