"""Samples from every source that a report compares: teacher, its ODE pairs, the student, and the baselines.

Dimensions: B batch, N tokens, V codes, D code dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddfast.models.flow_network import FlowNetwork
from ddfast.models.protocol import Condition, Teacher
from ddfast.models.student import Student
from ddfast.ops import nearest_code, noise


@dataclass(kw_only=True)
class Samples:
    """Generated images as codes int64 [B, N] and embeddings [B, N, D], with their condition's index int64 [B]."""

    codes: Tensor
    embeddings: Tensor
    condition: Tensor


@dataclass(kw_only=True)
class Guidance:
    """Settings of the teacher when it takes part; None: its defaults.

    Attributes:
        cfg_scale: classifier-free guidance, in the teacher's own sense.
        cfg_interval: groups after the first + 1 that are guided; negative: all.
        temperature: of the softmax.
        top_k: codes kept; 0 is off.
        top_p: probability mass kept; 1 is off.
    """

    cfg_scale: float | None = None
    cfg_interval: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None


@dataclass(kw_only=True)
class _Request:
    """One batch to make: the sample index decides its noise, so a source's samples do not depend on the batch size."""

    teacher: Teacher
    student: Student | None
    index: Tensor
    noise: Tensor
    generator: torch.Generator
    point: int

    @property
    def condition(self) -> Condition:
        return self.teacher.condition_of(self.index)

    def by_student(self, **settings: object) -> Tensor:
        if self.student is None:
            raise ValueError("student: got None, expected a student for this source")
        return self.student.sample(self.condition, self.noise, **settings)  # type: ignore[arg-type]


def _teacher(request: _Request) -> Tensor:
    return request.teacher.embed(request.teacher.generate(request.condition, generator=request.generator))


def _ode_pairs(request: _Request) -> Tensor:
    codes = request.teacher.generate(request.condition, sampler="flow", noise=request.noise)
    return request.teacher.embed(codes)


def _one_step(request: _Request) -> Tensor:
    return request.by_student()


def _two_steps(request: _Request) -> Tensor:
    assert request.student is not None
    return request.by_student(**request.student.settings(2, request.point))


def _teacher_involved(request: _Request) -> Tensor:
    """The teacher regenerates the second quarter of the groups, the student finishes."""
    groups = len(request.teacher.groups)
    return request.by_student(teacher_range=(max(groups // 4, 1), max(groups // 2, 2)))


def _ar_diffusion(request: _Request) -> Tensor:
    """Stage 1 of DD2: every token's flow integrated in ten steps, one group of tokens after another."""
    if not isinstance(request.student, FlowNetwork):
        raise ValueError("student: got none of DD2's networks, expected one for the source 'ar_diffusion'")
    return request.teacher.embed(request.student.sample_ar(request.condition, request.noise))


def _skip_last(request: _Request) -> Tensor:
    """Skip-last-k: the teacher decodes all groups but the last quarter, which all get the code nearest to their noise.

    It costs three quarters of the teacher's steps and shows what leaving out steps without distilling them does.
    """
    teacher = request.teacher
    starts = teacher.group_starts()
    stop = starts[-1 - max(len(teacher.groups) // 4, 1)]
    codes = teacher.generate(request.condition, generator=request.generator, stop=stop)
    rest = nearest_code(request.noise[:, stop:], teacher.codebook)
    return teacher.embed(torch.cat((codes, rest), dim=1))


def marginal_tables(teacher: Teacher, generator: torch.Generator, *, samples_per_class: int = 4000) -> Tensor:
    """Every token's marginal distribution given the class, estimated from the teacher's samples: [classes, N, V]."""
    shape = (teacher.num_conditions, teacher.num_tokens, teacher.num_codes)
    tables = torch.zeros(shape, dtype=torch.float32, device=teacher.codebook.device)
    for label, table in enumerate(tables):
        condition = torch.full((samples_per_class,), label, dtype=torch.int64, device=tables.device)
        codes = teacher.generate(teacher.condition_of(condition), generator=generator)
        table.scatter_add_(1, codes.T, table.new_full(codes.T.shape, 1 / samples_per_class))
    return tables


def draw_marginals(tables: Tensor, condition: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Codes int64 [B, N], every token drawn on its own from `marginal_tables` [classes, N, V] for labels [B]."""
    probs = tables[condition]
    return torch.multinomial(probs.flatten(0, 1), 1, generator=generator).view(probs.shape[:2])


def _independent_marginals(request: _Request) -> Tensor:
    """onestep*: the best that a sampler of all tokens at once can do without looking at what the others became."""
    tables = marginal_tables(request.teacher, request.generator)
    return request.teacher.embed(draw_marginals(tables, request.index, request.generator))


_MAKERS: dict[str, Callable[[_Request], Tensor]] = {
    "teacher": _teacher,
    "ode_pairs": _ode_pairs,
    "student_1step": _one_step,
    "student_2step": _two_steps,
    "teacher_involved": _teacher_involved,
    "ar_diffusion": _ar_diffusion,
    "skip_last": _skip_last,
    "independent_marginals": _independent_marginals,
}

SOURCES = tuple(_MAKERS)

_LARGEST_TABLE = 2**18
"""Entries of `marginal_tables` up to which they are estimated: every class takes thousands of the teacher's samples."""


def sources_for(teacher: Teacher, student: Student | None = None) -> list[str]:
    """The sources that can be had of this teacher and student (None: any).

    All but the marginals where their tables are too large, DD2's first stage, which is another network's, and a middle
    part by the teacher where the student cannot finish what it began: DD2's starts from noise alone.
    """
    entries = teacher.num_conditions * teacher.num_tokens * teacher.num_codes
    without = {"ar_diffusion"} | ({"independent_marginals"} if entries > _LARGEST_TABLE else set())
    if isinstance(student, FlowNetwork):
        without.add("teacher_involved")
    return [source for source in SOURCES if source not in without]


def sample(
    source: str,
    teacher: Teacher,
    student: Student | None = None,
    *,
    count: int,
    seed: int,
    point: int,
    classes: tuple[int, ...] | None = None,
    batch_size: int = 1000,
) -> Samples:
    """`count` samples of one source; sample i has the class i modulo the number of classes and the noise (seed, i).

    Args:
        source: one of `SOURCES`.
        teacher: makes its own samples, the baselines' and the teacher-involved ones.
        student: needed for the student's sources.
        count: how many.
        seed: of the noise, and of the teacher's draws.
        point: t1, the trajectory point of the second step.
        classes: labels to cycle through; None: all.
        batch_size: samples made at a time.

    Raises:
        ValueError: the source or a class is unknown, `count` is not positive, or the source needs a student.
    """
    if source not in _MAKERS:
        raise ValueError(f"source: got {source!r}, expected one of {', '.join(SOURCES)}")
    # The marginals are estimated once per batch: one batch for all of their samples.
    batch_size = count if source == "independent_marginals" else batch_size
    return _collect(_MAKERS[source], teacher, student, count, seed, point, classes, batch_size)


def sample_student(
    teacher: Teacher,
    student: Student | None,
    *,
    count: int,
    seed: int,
    point: int,
    steps: int = 1,
    teacher_steps: int = 0,
    guidance: Guidance | None = None,
    classes: tuple[int, ...] | None = None,
    batch_size: int = 1000,
) -> Samples:
    """`count` samples of a student in a number of steps, or of its teacher.

    Args:
        steps: of the student (`Student.settings`); 0: the teacher alone.
        guidance: of the teacher's part.
        teacher_steps: groups from `point` on that the teacher regenerates before the student's last pass; 0: none.
        teacher, student, count, seed, point, classes, batch_size: as in `sample`.

    Raises:
        ValueError: as in `sample`; or the teacher would run past the last group.
    """
    given = {name: value for name, value in vars(guidance or Guidance()).items() if value is not None}
    settings: dict[str, Any] = student.settings(steps, point) if student is not None and steps else {}
    if "teacher_range" in settings:
        settings |= given
    if teacher_steps:
        settings = {"teacher_range": (point, point + teacher_steps), **given}

    def make(request: _Request) -> Tensor:
        if steps == 0:
            return teacher.embed(teacher.generate(request.condition, generator=request.generator, **given))
        return request.by_student(**settings)

    return _collect(make, teacher, student, count, seed, point, classes, batch_size)


@torch.no_grad()
def _collect(
    make: Callable[[_Request], Tensor],
    teacher: Teacher,
    student: Student | None,
    count: int,
    seed: int,
    point: int,
    classes: tuple[int, ...] | None,
    batch_size: int,
) -> Samples:
    if count < 1:
        raise ValueError(f"count: got {count}, expected at least 1")
    labels = torch.tensor(classes if classes is not None else range(teacher.num_conditions), dtype=torch.int64)
    if not len(labels):
        raise ValueError("captions: got none, expected a text teacher with captions")
    if int(labels.min()) < 0 or int(labels.max()) >= teacher.num_conditions:
        raise ValueError(f"classes: got {labels.tolist()}, expected labels in 0..{teacher.num_conditions - 1}")
    device = teacher.codebook.device
    generator = torch.Generator(device).manual_seed(seed)
    embeddings, conditions = [], []
    for start in range(0, count, batch_size):
        index = torch.arange(start, min(start + batch_size, count), dtype=torch.int64)
        condition = labels[index % len(labels)].to(device)
        request = _Request(
            teacher=teacher,
            student=student,
            index=condition,
            noise=noise(seed, index, (teacher.num_tokens, teacher.code_dim), device),
            generator=generator,
            point=point,
        )
        embeddings.append(make(request))
        conditions.append(condition)
    made = torch.cat(embeddings)
    return Samples(codes=nearest_code(made, teacher.codebook), embeddings=made, condition=torch.cat(conditions))
