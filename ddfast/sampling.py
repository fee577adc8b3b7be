"""Samples from every source that a report compares: teacher, its ODE pairs, the student, and the baselines.

Sample i of a seed has the chance (seed, i), whatever batch it is made in. Samples come in batches, one after the other,
so that whoever writes them or measures them need not hold them all.

Dimensions: B batch, N tokens, V codes, D code dimension.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ddfast import seeds
from ddfast.models.decoding import release_graphs
from ddfast.models.flow_network import FlowNetwork
from ddfast.models.protocol import Condition, Teacher
from ddfast.models.student import Student
from ddfast.ops import draw_codes, nearest_code, noise
from ddfast.trajectories.memory import fitting


@dataclass(kw_only=True)
class Samples:
    """Generated images as codes int64 [B, N] and embeddings [B, N, D], with their condition's index int64 [B]."""

    codes: Tensor
    embeddings: Tensor
    condition: Tensor

    def split(self, size: int) -> list[Samples]:
        """The same in parts of up to `size` samples."""
        parts = [getattr(self, field.name).split(size) for field in dataclasses.fields(self)]
        return [
            Samples(codes=codes, embeddings=embeddings, condition=condition)
            for codes, embeddings, condition in zip(*parts, strict=True)
        ]

    @classmethod
    def joined(cls, parts: Iterable[Samples]) -> Samples:
        """All of the parts in one."""
        whole = list(parts)
        fields = (field.name for field in dataclasses.fields(cls))
        return cls(**{name: torch.cat([getattr(part, name) for part in whole]) for name in fields})


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

    def given(self) -> dict[str, Any]:
        """The settings that are not None."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(kw_only=True)
class _Request:
    """One batch to make: samples `number` int64 [B] of a seed, with conditions `index` int64 [B]."""

    teacher: Teacher
    student: Student | None
    seed: int
    number: Tensor
    index: Tensor
    point: int

    @property
    def condition(self) -> Condition:
        return self.teacher.condition_of(self.index)

    @property
    def noise(self) -> Tensor:
        """[B, N, D]."""
        shape = (self.teacher.num_tokens, self.teacher.code_dim)
        return noise(self.seed, self.number, shape, self.teacher.codebook.device)

    @property
    def uniform(self) -> Tensor:
        """Uniform numbers [B, N] of the teacher's draws: what follows the noise in a sample's sequence."""
        count, behind = self.teacher.num_tokens, self.teacher.num_tokens * self.teacher.code_dim
        normal = noise(self.seed, self.number, (behind + count,), self.teacher.codebook.device)[:, behind:]
        return torch.special.ndtr(normal.double()).float().clamp_max(_BELOW_ONE)

    def by_student(self, **settings: object) -> Tensor:
        assert self.student is not None
        return self.student.sample(self.condition, self.noise, **settings)  # type: ignore[arg-type]


_BELOW_ONE = 1 - 2**-24
"""The largest float32 below 1."""


def _teacher(request: _Request) -> Tensor:
    return request.teacher.embed(request.teacher.generate(request.condition, uniform=request.uniform))


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
    codes = teacher.generate(request.condition, uniform=request.uniform, stop=stop)
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


def draw_marginals(
    tables: Tensor, condition: Tensor, generator: torch.Generator | None = None, *, uniform: Tensor | None = None
) -> Tensor:
    """Codes int64 [B, N], every token drawn on its own from `marginal_tables` [classes, N, V] for labels [B].

    By `uniform` numbers [B, N], where they are given, else by the generator's.
    """
    probs = tables[condition]
    if uniform is None:
        uniform = torch.rand(probs.shape[:2], generator=generator, dtype=torch.float32, device=probs.device)
    return draw_codes(probs.log(), uniform)


def _independent_marginals(teacher: Teacher, seed: int) -> Callable[[_Request], Tensor]:
    """onestep*: the best that a sampler of all tokens at once can do without looking at what the others became."""
    tables = marginal_tables(teacher, seeds.generator(seed, teacher.codebook.device))
    return lambda request: teacher.embed(draw_marginals(tables, request.index, uniform=request.uniform))


_MAKERS: dict[str, Callable[[_Request], Tensor]] = {
    "teacher": _teacher,
    "ode_pairs": _ode_pairs,
    "student_1step": _one_step,
    "student_2step": _two_steps,
    "teacher_involved": _teacher_involved,
    "ar_diffusion": _ar_diffusion,
    "skip_last": _skip_last,
}

SOURCES = (*_MAKERS, "independent_marginals")

_BY_STUDENT = ("student_1step", "student_2step", "teacher_involved")

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


def sample(source: str, teacher: Teacher, student: Student | None = None, **settings: Any) -> Samples:
    """All samples of one source, as `stream` makes them (of `count`, `seed`, `point`, ...)."""
    return Samples.joined(stream(source, teacher, student, **settings))


def stream(
    source: str,
    teacher: Teacher,
    student: Student | None = None,
    *,
    count: int,
    seed: int,
    point: int,
    classes: Sequence[int] | None = None,
    batch_size: int = 1000,
) -> Iterator[Samples]:
    """`count` samples of one source in batches; sample i has the class i modulo their number and the chance (seed, i).

    Args:
        source: one of `SOURCES`.
        teacher: makes its own samples, the baselines' and the teacher-involved ones.
        student: needed for the student's sources.
        count: how many.
        seed: of the noise, and of the teacher's draws.
        point: t1, the trajectory point of the second step.
        classes: labels to cycle through (text: numbers of captions); None: all.
        batch_size: samples made at a time.

    Raises:
        ValueError, TypeError: the source or a class is unknown, a number is out of range, or the source needs a
            student, or a text teacher captions.
        DDFastError: a batch does not fit in memory.
    """
    if source not in SOURCES:
        raise ValueError(f"source: got {source!r}, expected one of {', '.join(SOURCES)}")
    if student is None and source in _BY_STUDENT:
        raise ValueError("student: got None, expected a student for this source")
    labels = condition_index(teacher, classes)
    _check_numbers(count, seed, batch_size)
    make = _independent_marginals(teacher, seed) if source == "independent_marginals" else _MAKERS[source]
    return _batches(make, teacher, student, count, seed, point, labels, batch_size)


def sample_student(teacher: Teacher, student: Student | None, **settings: Any) -> Samples:
    """All samples of a student, or of its teacher, as `stream_student` makes them."""
    return Samples.joined(stream_student(teacher, student, **settings))


def stream_student(
    teacher: Teacher,
    student: Student | None,
    *,
    count: int,
    seed: int,
    point: int,
    steps: int = 1,
    teacher_steps: int = 0,
    guidance: Guidance | None = None,
    classes: Sequence[int] | None = None,
    batch_size: int = 1000,
) -> Iterator[Samples]:
    """`count` samples, in batches, of a student in a number of steps, or of its teacher.

    Args:
        steps: of the student (`Student.settings`); 0: the teacher alone.
        guidance: of the teacher's part.
        teacher_steps: groups from `point` on that the teacher regenerates before the student's last pass; 0: none.
        teacher, student, count, seed, point, classes, batch_size: as in `stream`.

    Raises:
        ValueError, TypeError, DDFastError: as in `stream`; or the teacher would run past the last group, or a setting
            has no effect.
    """
    guidance = guidance or Guidance()
    labels = condition_index(teacher, classes)
    _check_numbers(count, seed, batch_size)
    if steps == 0:
        if teacher_steps:
            raise ValueError("teacher_steps: has no effect with steps=0: the teacher makes every group")

        def make(request: _Request) -> Tensor:
            return teacher.embed(teacher.generate(request.condition, uniform=request.uniform, **guidance.given()))

    else:
        if student is None:
            raise ValueError("student: got None, expected a student (or steps=0: the teacher alone)")
        settings = _settings(teacher, student, steps, point, teacher_steps, guidance)

        def make(request: _Request) -> Tensor:
            return request.by_student(**settings)

    return _batches(make, teacher, student, count, seed, point, labels, batch_size)


def _settings(
    teacher: Teacher, student: Student, steps: int, point: int, teacher_steps: int, guidance: Guidance
) -> dict[str, Any]:
    """Arguments of `Student.sample`; raises where one of ours would have no effect."""
    settings, given, groups = student.settings(steps, point), guidance.given(), len(teacher.groups)
    if teacher_steps:
        if isinstance(student, FlowNetwork):
            raise ValueError(
                "teacher_steps: has no effect on DD2's students: of k steps, the last k - 1 are the teacher's"
            )
        if not 0 < teacher_steps <= groups - point:
            expected = f"1 to {groups - point}, the groups from point {point} on"
            raise ValueError(f"teacher_steps: got {teacher_steps}, expected {expected}")
        settings = {"teacher_range": (point, point + teacher_steps)}
    if "teacher_range" in settings:
        return {**settings, **given}
    if given:
        raise ValueError(f"guidance.{next(iter(given))}: has no effect with steps={steps}: the teacher takes no part")
    return settings


def teacher_takes_part(student: Student | None, steps: int, teacher_steps: int = 0) -> bool:
    """Whether the teacher decodes in a sampling of these steps."""
    return steps == 0 or bool(teacher_steps) or (steps > 1 and isinstance(student, FlowNetwork))


def second_point(
    teacher: Teacher, student: Student | None, given: int | None, learnt: int, *, steps: int, teacher_steps: int
) -> int:
    """t1 of a sampling: the one that the user gives, where it has an effect, else the one that the student learnt."""
    if given is None:
        return learnt
    last = len(teacher.groups) - 1
    if student is None or isinstance(student, FlowNetwork):
        raise ValueError("point: has no effect: only DD1's students have a second step's point")
    if steps < 2 and not teacher_steps:
        raise ValueError(f"point: has no effect with steps={steps}: there is no second step")
    if not 1 <= given <= last:
        raise ValueError(f"point: got {given}, expected a trajectory point in 1..{last}")
    return given


def condition_index(teacher: Teacher, classes: Sequence[int] | None = None) -> Tensor:
    """Conditions to cycle through, int64 [M]: the given ones (None: all that there are), of which each is there.

    Raises:
        TypeError: a class is no integer.
        ValueError: a class is out of range, there is none, or a text teacher has no captions.
    """
    count = teacher.num_conditions
    if not count:
        raise ValueError("captions: this model is conditioned on text: give captions (--captions FILE, --caption TEXT)")
    if classes is None:
        return torch.arange(count, dtype=torch.int64)
    for label in classes:
        if not isinstance(label, Integral) or isinstance(label, bool):
            raise TypeError(f"classes: got {label!r}, expected integers")
    numbers = [int(label) for label in classes]
    what = "labels" if teacher.num_classes else "numbers of captions"
    if not numbers:
        raise ValueError(f"classes: got none, expected {what} in 0..{count - 1}")
    if min(numbers) < 0 or max(numbers) >= count:
        raise ValueError(f"classes: got {numbers}, expected {what} in 0..{count - 1}")
    return torch.tensor(numbers, dtype=torch.int64)


def first_conditions(teacher: Teacher, count: int) -> tuple[Tensor, Condition]:
    """The first `count` conditions, from the first again where there are fewer: index int64 [B], and what it means."""
    labels = condition_index(teacher)
    index = labels[torch.arange(count, dtype=torch.int64) % len(labels)].to(teacher.codebook.device)
    return index, teacher.condition_of(index)


def _check_numbers(count: int, seed: int, batch_size: int) -> None:
    if count < 1:
        raise ValueError(f"count: got {count}, expected at least 1")
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
    seeds.check_seed(seed)


def _batches(
    make: Callable[[_Request], Tensor],
    teacher: Teacher,
    student: Student | None,
    count: int,
    seed: int,
    point: int,
    labels: Tensor,
    batch_size: int,
) -> Iterator[Samples]:
    device = teacher.codebook.device
    size = math.ceil(count / math.ceil(count / batch_size))  # of all but the last
    try:
        for start in range(0, count, size):
            number = torch.arange(start, min(start + size, count), dtype=torch.int64)
            index = labels[number % len(labels)].to(device)
            request = _Request(
                teacher=teacher, student=student, seed=seed, number=number, index=index, point=point
            )  # fmt: skip
            with torch.no_grad(), fitting(len(number), device, "the batch size"):
                made = make(request)
                samples = Samples(codes=nearest_code(made, teacher.codebook), embeddings=made, condition=index)
            yield samples
            del made, samples, request
    finally:
        release_graphs(teacher)  # of a batch as large as the memory: what comes next needs it
