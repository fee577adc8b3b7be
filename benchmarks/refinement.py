"""From a student's samples to the teacher's own by passes of the teacher: how many, how long, and how good on the way.

    python benchmarks/refinement.py --students runs/digits runs/digits-dd2 --count 2000 --json refinement.json
    python benchmarks/refinement.py --recipe llamagen-b --count 4 --windows 16 64 --no-quality

Starts: each student's one and two steps, and the codes nearest to the noise. With a recipe, its teacher has random
weights, and the only start is the noise. Tokens that agree are those that the teacher's flow makes of the same noise.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddfast.config import TrainConfig
from ddfast.evaluation.quality import Evaluator
from ddfast.models.loading import untrained_teacher
from ddfast.models.protocol import Teacher
from ddfast.models.refinement import refined
from ddfast.ops import nearest_code, noise
from ddfast.progress import silent
from ddfast.recipes import get_recipe
from ddfast.report import machine
from ddfast.runs import open_student
from ddfast.sampling import Samples

Start = tuple[str, Callable[[Tensor, Tensor], Tensor]]
"""A name, and codes of conditions and noise."""


def main() -> None:
    """Measure, and print a line per start."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--students", type=Path, nargs="*", default=[])
    parser.add_argument("--recipe", default="")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=100, help="of what is timed")
    parser.add_argument("--passes", type=int, nargs="*", default=[1, 2, 3, 4, 6, 8, 12])
    parser.add_argument("--windows", type=int, nargs="*", default=[0], help="tokens of an exact pass; 0: all left")
    parser.add_argument("--rounds", type=int, default=3, help="of what is timed, after one that warms up")
    parser.add_argument("--no-quality", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for config, teacher, starts in given(options):
        rows += measured(config, teacher, starts, options)
    if options.json:
        told = {name: str(value) for name, value in vars(options).items() if name != "json"}
        options.json.write_text(json.dumps({**machine(), "options": told, "rows": rows}, indent=2) + "\n")


def given(options: argparse.Namespace) -> Iterator[tuple[TrainConfig, Teacher, list[Start]]]:
    """Teachers, and what their passes start from."""
    if options.recipe:
        torch.manual_seed(0)
        config = get_recipe(options.recipe)
        config.teacher.random_weights = True  # type: ignore[attr-defined]
        teacher = untrained_teacher(config).eval().requires_grad_(False)
        yield config, teacher, [("noise", lambda _, eps: nearest_code(eps, teacher.codebook))]
    for number, folder in enumerate(options.students):
        config, teacher, student = open_student(folder, "cpu", silent)

        def codes(condition: Tensor, eps: Tensor, steps: int, student: Any = student) -> Tensor:
            return nearest_code(student.sample(condition, eps, **student.settings(steps)), student.codebook)

        one = (f"{student.method}, one step", lambda condition, eps, codes=codes: codes(condition, eps, 1))
        two = (f"{student.method}, two steps", lambda condition, eps, codes=codes: codes(condition, eps, 2))
        nothing = ("noise", lambda _, eps, teacher=teacher: nearest_code(eps, teacher.codebook))
        yield config, teacher, [one, two] + ([nothing] if number == 0 else [])


def measured(
    config: TrainConfig, teacher: Teacher, starts: list[Start], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row per start."""
    number = torch.arange(options.count, dtype=torch.int64)
    condition = number % teacher.num_conditions
    eps = noise(0, number, (teacher.num_tokens, teacher.code_dim), "cpu")
    own = teacher.generate(condition, sampler="flow", noise=eps)
    evaluator = None if options.no_quality else Evaluator(config, teacher, silent)
    few = slice(0, options.batch_size)
    decoding = seconds(lambda: teacher.generate(condition[few], sampler="flow", noise=eps[few]), options.rounds)
    rows = []

    def told(name: str, **figures: Any) -> None:
        rows.append({"start": name, **figures})
        print(json.dumps(rows[-1]), flush=True)

    told(
        "the teacher's flow",
        passes=len(teacher.groups),
        seconds=decoding,
        **quality(evaluator, own, teacher, condition),
    )
    for name, start in starts:
        guess = start(condition, eps)
        for passes in (0, *options.passes):
            now = refined(teacher, condition, eps, guess, passes)[0]
            agree = float((now == own).double().mean())
            told(name, passes=passes, agree=agree, **quality(evaluator, now, teacher, condition))
        for window in options.windows:
            found, passes = refined(teacher, condition, eps, guess, "exact", window=window or None)
            different = int((found != own).any(1).sum())

            def exact(guess: Tensor = guess, window: int = window) -> Tensor:
                return refined(teacher, condition[few], eps[few], guess[few], "exact", window=window or None)[0]

            took = seconds(exact, options.rounds)
            mean, most = float(passes.double().mean()), int(passes.max())
            told(
                name, passes="exact", window=window, mean_passes=mean, most_passes=most, different=different,
                seconds=took, speedup=decoding / took,
            )  # fmt: skip
    return rows


def quality(evaluator: Evaluator | None, codes: Tensor, teacher: Teacher, condition: Tensor) -> dict[str, float]:
    """What a run's table has of samples."""
    if evaluator is None:
        return {}
    found = evaluator.measure(Samples.numbered(codes, teacher.embed(codes), condition))
    return {name: float(found[name]) for name in ("frechet", "teacher_nll", "pair_tv") if name in found}


def seconds(work: Callable[[], object], rounds: int) -> float:
    """Median of some rounds, after one that warms up."""
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


if __name__ == "__main__":
    main()
