"""What a run's figures are: quality of every source of samples, and speed."""

from __future__ import annotations

from typing import Any

from ddfast import processes, seeds
from ddfast.config import TrainConfig
from ddfast.distill.stages import new_network
from ddfast.evaluation.paths import path_distance, path_figures
from ddfast.evaluation.quality import Evaluator
from ddfast.evaluation.sources import MEASURED, sources_for, stream
from ddfast.evaluation.speed import IMAGE_DECODER, measure_speed
from ddfast.models.checkpoint import load_state, load_tensors
from ddfast.models.protocol import Teacher
from ddfast.models.student import Student
from ddfast.progress import Progress, silent
from ddfast.runs import TUNED_FILE
from ddfast.tracing import span


def evaluate(config: TrainConfig, teacher: Teacher, student: Student, progress: Progress) -> dict[str, Any]:
    """Quality of every source, lengths of paths in noise, and the speeds, as metrics.json holds them.

    Processes share the work, and all of them get the figures.
    """
    evaluator = Evaluator(config, teacher, silent)
    rows: dict[str, dict[str, Any]] = {}
    sources = [source.name for source in sources_for(teacher, student) if source.name in MEASURED]
    settings: dict[str, Any] = {"count": config.evaluation.samples, "batch_size": config.evaluation.batch_size}
    settings |= {"seed": sample_seed(config)}
    distance = path_distance(config.evaluation, teacher)
    paths = {"count": config.evaluation.paths, "batch_size": settings["batch_size"]}
    paths["seed"] = seeds.derived(config.seed, 5_000_003)
    for done, source in enumerate(sources):
        progress(done, len(sources) + 1, source)
        with span(f"evaluate {source}"):
            rows[source] = dict(evaluator.measure(stream(source, teacher, student, **settings), details=True))
            if distance is not None:
                rows[source] |= path_figures(source, teacher, student, distance, **paths)
    if processes.first_does((config.out / TUNED_FILE).exists):
        tuned = new_network(config, teacher)
        load_state(tuned, load_tensors(config.out / TUNED_FILE)[0], config.out / TUNED_FILE)
        rows["ar_diffusion"] = dict(evaluator.measure(stream("ar_diffusion", teacher, tuned, **settings), details=True))
    progress(len(sources), len(sources) + 1, "speed")
    add_speed(rows, config, teacher, student)
    progress(len(sources) + 1, len(sources) + 1, "done")
    told = {"method": student.method, "recipe": config.recipe, "num_groups": len(teacher.groups)}
    return told | ({} if distance is None else {"path_distance": distance.name}) | rows


def sample_seed(config: TrainConfig) -> int:
    """Of the samples that the figures are of."""
    return seeds.derived(config.seed, 2_000_003)


def add_speed(rows: dict[str, dict[str, Any]], config: TrainConfig, teacher: Teacher, student: Student) -> None:
    """Seconds per image, with and without image decoding, and the speed-ups over this package's AR decoding."""
    seconds = measure_speed(teacher, student, batch_sizes=config.evaluation.batch_sizes)
    decoder = seconds.pop(IMAGE_DECODER, None)
    for source, own in seconds.items():
        row = rows.setdefault(source, {})
        row["seconds_per_image"] = {str(batch): value for batch, value in own.items()}
        if decoder is not None:
            row["seconds_per_image_decoded"] = {str(batch): own[batch] + decoder[batch] for batch in own}
    for source in ("student_1step", "student_2step"):
        for baseline, key in (("teacher", "speedup_vs_ar"), ("teacher_plain", "speedup_vs_plain_ar")):
            own = seconds[source]
            rows[source][key] = {str(batch): seconds[baseline][batch] / own[batch] for batch in own}
