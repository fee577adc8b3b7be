"""What the studies share: small teachers, students that ddfast's own stages train, and a file of rows."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddfast import seeds
from ddfast.config import TrainConfig, update
from ddfast.distill.stages import distill
from ddfast.evaluation.quality import Evaluator
from ddfast.files import write_atomically
from ddfast.models.loading import build_teacher, start_student
from ddfast.models.protocol import Teacher
from ddfast.models.student import DD1Student, TransformerStudent
from ddfast.models.toy import ToyTeacher
from ddfast.ops import nearest_code, noise
from ddfast.progress import silent
from ddfast.recipes import get_recipe
from ddfast.report import machine
from ddfast.sampling import Samples
from ddfast.trajectories.generate import generate_trajectories, store_settings
from ddfast.trajectories.store import Trajectories, TrajectoryStore

JUDGED = 1000
"""Added to a teacher's seed for the noise that its students are judged by: no training pair has it."""

TOY_WIDTH, TOY_DEPTH, TOY_HEADS = 64, 3, 4
"""Of the toy's students, as in tests/test_toy_quality.py."""


class Rows:
    """Rows of a JSON file, each known by its settings: what is there is not measured again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []

    def measure(self, settings: dict[str, Any], figures: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row of these settings, from the file or measured now; it holds the seconds that this took."""
        plain = json.loads(json.dumps(settings))
        for row in self.rows:
            if all(row.get(name) == value for name, value in plain.items()):
                return row
        started = time.perf_counter()
        row = plain | figures()
        self.rows.append(row | {"seconds": round(time.perf_counter() - started, 1)})
        print(json.dumps(self.rows[-1]), flush=True)
        lines = ",\n".join(f"    {json.dumps(row)}" for row in self.rows)
        about = "".join(f"  {json.dumps(name)}: {json.dumps(value)},\n" for name, value in machine().items())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, f'{{\n{about}  "rows": [\n{lines}\n  ]\n}}\n')
        return self.rows[-1]


@dataclass(kw_only=True)
class Task:
    """A teacher, its training pairs, and noise that its students are judged by.

    Attributes:
        config: of the distillation; its `dd1` is what `train` changes.
        samples: that a student is judged by.
    """

    name: str
    config: TrainConfig
    teacher: Teacher
    samples: int

    @cached_property
    def pairs(self) -> Trajectories:
        """The training pairs."""
        return self.some_pairs(self.config.trajectories.count)

    def some_pairs(self, count: int) -> Trajectories:
        """As many training pairs."""
        settings = store_settings(self.teacher, self.config.trajectories, self.config.seed)
        with tempfile.TemporaryDirectory() as folder:
            store = TrajectoryStore.create(folder, settings)
            generate_trajectories(self.teacher, store, count)
            return store.load(count)

    @cached_property
    def condition(self) -> Tensor:
        """Labels int64 [samples] that are judged."""
        return torch.arange(self.samples, dtype=torch.int64) % self.teacher.num_conditions

    @cached_property
    def noise(self) -> Tensor:
        """Noise [samples, N, D] that is judged."""
        number = torch.arange(self.samples, dtype=torch.int64)
        return noise(self.config.seed + JUDGED, number, (self.teacher.num_tokens, self.teacher.code_dim), "cpu")

    @cached_property
    def flow(self) -> Tensor:
        """Codes [samples, N] of the teacher's flow from this noise: what a perfect student makes."""
        return self.flow_from(self.noise)

    def flow_from(self, noise: Tensor) -> Tensor:
        """Codes [samples, N] of the teacher's flow from a noise."""
        return torch.cat([self.teacher.generate(label, sampler="flow", noise=eps) for label, eps in self.parts(noise)])

    def parts(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Labels and tensors [samples, ...], some samples at a time."""
        return zip(*(tensor.split(5000) for tensor in (self.condition, *tensors)), strict=True)

    @cached_property
    def evaluator(self) -> Evaluator:
        """Of samples that have no exact truth."""
        self.config.evaluation.samples = self.samples
        return Evaluator(self.config, self.teacher, silent)

    def student(self, **sizes: Any) -> DD1Student:
        """A student before its training: the teacher's weights, or for the toy, which has none, fresh ones."""
        seeds.seed_all(self.config.seed)
        if isinstance(self.teacher, ToyTeacher):
            return TransformerStudent(
                self.teacher, **{"width": TOY_WIDTH, "depth": TOY_DEPTH, "heads": TOY_HEADS, **sizes}
            )
        if "width" in sizes or "depth" in sizes:
            return TransformerStudent(self.teacher, **sizes)
        return start_student(self.teacher, **sizes)

    def train(
        self, dd1: dict[str, Any], *, student: DD1Student | None = None, pairs: Trajectories | None = None
    ) -> DD1Student:
        """A student that learnt from the pairs with these settings of DD1 in place of the task's."""
        before = dict(vars(self.config.dd1))
        update(self.config.dd1, dd1)
        try:
            with tempfile.TemporaryDirectory() as folder:
                made, _ = distill(
                    self.config, self.teacher, pairs or self.pairs, Path(folder), student=student or self.student()
                )
                return made
        finally:
            vars(self.config.dd1).update(before)

    def codes(self, student: DD1Student, steps: tuple[int, ...], noise: Tensor | None = None) -> Tensor:
        """Codes [samples, N] of a student, from the noise that is judged or another one."""
        parts = self.parts(self.noise if noise is None else noise)
        made = [student.sample(label, eps, steps=steps) for label, eps in parts]
        return torch.cat([nearest_code(part, student.codebook) for part in made])

    def figures(self, codes: Tensor) -> dict[str, Any]:
        """How good codes [samples, N] are, and how many of each position's are the flow's from the same noise."""
        same = (codes == self.flow).double().mean(0)
        found: dict[str, Any] = {
            "agree": round(float(same.mean()), 4),
            "agree_at": [round(v, 3) for v in same.tolist()],
        }
        if isinstance(self.teacher, ToyTeacher):
            return found | {"tv": round(self.teacher.total_variation(codes), 4)}
        measured = self.evaluator.measure(Samples.numbered(codes, self.teacher.embed(codes), self.condition))
        names = ("teacher_nll", "frechet", "frechet_error", "recall", "class_accuracy", "pair_tv")
        return found | {name: round(float(measured[name]), 4) for name in names if name in measured}


def parser(text: str, experiments: list[str], tasks: list[str], out: str) -> argparse.ArgumentParser:
    """Options of a study: its experiments and tasks, and where its rows go; the first task is the default."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("experiment", choices=experiments)
    made.add_argument("--task", choices=tasks, default=tasks[0])
    made.add_argument("--seed", type=int, default=0, help="of teacher, pairs and student")
    made.add_argument("--out", type=Path, default=Path("benchmarks/results/studies") / out)
    return made


def toy(seed: int = 0, *, samples: int = 100_000, pairs: int = 200_000, **teacher: Any) -> Task:
    """The enumerable teacher, with other sizes or another strength if told so."""
    config = TrainConfig(seed=seed)
    update(config.trajectories, {"count": pairs, "shard_size": min(10_000, pairs)})
    update(config.dd1, {"point": 1, "iterations": 1000, "batch_size": 256, "optimizer": "muon", "learning_rate": 5e-3})
    return Task(name="toy", config=config, teacher=ToyTeacher(seed=seed, **teacher), samples=samples)


def images(recipe: str = "digits", seed: int = 0, *, samples: int = 5000) -> Task:
    """A recipe of the digits; its teacher comes from the cache, or is trained."""
    config = get_recipe(recipe)
    config.seed = seed
    return Task(name=recipe, config=config, teacher=build_teacher(config, silent), samples=samples)


def task(name: str, seed: int = 0, **options: Any) -> Task:
    """The task of a name: toy, or a recipe of the digits."""
    return toy(seed, **options) if name == "toy" else images(name, seed, **options)
