"""Samples of a student, or of its teacher.

Sample i of a seed has the chance (seed, i), whatever batch it is made in. Samples come in batches, one after the other,
so that whoever writes them or measures them need not hold them all. Several processes share the batches, which are the
same however many they are: batch b is made by process b modulo their number.

Dimensions: B batch, N tokens, V codes, D code dimension.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ddfast import processes, seeds
from ddfast.config import SamplingSettings
from ddfast.models.autoregressive import Condition
from ddfast.models.decoding import release_graphs
from ddfast.models.protocol import Teacher
from ddfast.models.refinement import Refine, check_refine
from ddfast.models.student import DD1Student, Student
from ddfast.ops import nearest_code, noise
from ddfast.trajectories.memory import BATCH_OPTION, fitting


@dataclass(kw_only=True)
class Samples:
    """Generated images as codes int64 [B, N] and embeddings [B, N, D].

    With them their condition's index int64 [B], and on the CPU their `number` int64 [B] in the seed's sequence and how
    many `passes` int64 [B] of the network each took, one after another, where its maker counts them (else 0).
    """

    codes: Tensor
    embeddings: Tensor
    condition: Tensor
    number: Tensor
    passes: Tensor

    def to(self, device: torch.device) -> Samples:
        """The same on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("codes", "embeddings", "condition")}
        return dataclasses.replace(self, **moved)

    def split(self, size: int) -> list[Samples]:
        """The same in parts of up to `size` samples."""
        parts = zip(*(tensor.split(size) for tensor in vars(self).values()), strict=True)
        return [Samples(**dict(zip(vars(self), part, strict=True))) for part in parts]

    @classmethod
    def numbered(cls, codes: Tensor, embeddings: Tensor, condition: Tensor) -> Samples:
        """Samples from number 0 on, whose passes nobody counted."""
        number = torch.arange(len(codes), dtype=torch.int64)
        passes = torch.zeros_like(number)
        return cls(codes=codes, embeddings=embeddings, condition=condition, number=number, passes=passes)

    @classmethod
    def joined(cls, parts: Iterable[Samples]) -> Samples:
        """All of the parts in one."""
        whole = list(parts)
        fields = (field.name for field in dataclasses.fields(cls))
        return cls(**{name: torch.cat([getattr(part, name) for part in whole]) for name in fields})


def one_line(text: str) -> str:
    """A text as a line shows it: an end of line inside is a pilcrow."""
    return text.replace("\n", "¶")


def whole(batches: Iterable[Samples], device: torch.device) -> Samples:
    """All samples of a stream in one, on the device that makes them; where processes share it, at each of them."""
    if processes.count() == 1:
        return Samples.joined(batches)
    parts = processes.collected([batch.to(torch.device("cpu")) for batch in batches], everywhere=True)
    return Samples.joined(parts).to(device)


@dataclass(kw_only=True)
class Guidance(SamplingSettings):
    """Settings of the teacher when it takes part; None: its defaults.

    Attributes:
        cfg_interval: groups after the first + 1 that are guided; negative: all.
    """

    cfg_interval: int | None = None

    def given(self) -> dict[str, Any]:
        """The settings that are not None."""
        own = {} if self.cfg_interval is None else {"cfg_interval": self.cfg_interval}
        return self.sampling() | own


@dataclass(kw_only=True)
class Request:
    """One batch to make: samples `number` int64 [B] of a seed, with conditions `index` int64 [B].

    A maker whose samples take passes of the network as it happens says how many in `passes` int64 [B].
    """

    teacher: Teacher
    student: Student | None
    seed: int
    number: Tensor
    index: Tensor
    passes: Tensor | None = None

    @cached_property
    def condition(self) -> Condition:
        return self.teacher.condition_of(self.index)

    @cached_property
    def noise(self) -> Tensor:
        """[B, N, D]."""
        shape = (self.teacher.num_tokens, self.teacher.code_dim)
        return noise(self.seed, self.number, shape, self.teacher.codebook.device)

    @cached_property
    def uniform(self) -> Tensor:
        """Uniform numbers [B, N] of the teacher's draws: what follows the noise in a sample's sequence."""
        count, behind = self.teacher.num_tokens, self.teacher.num_tokens * self.teacher.code_dim
        normal = noise(self.seed, self.number, (behind + count,), self.teacher.codebook.device)[:, behind:]
        return _uniform(normal).float().clamp_max(_BELOW_ONE)

    def uniform_of(self, turn: int, size: int) -> Tensor:
        """Uniform numbers [B, size] of the turn 0 .. N of a decoding that draws tokens more than once."""
        seed, turns = seeds.derived(self.seed, 4_000_003), self.teacher.num_tokens + 1
        normal = noise(seed, self.number * turns + turn, (size,), self.teacher.codebook.device)
        return _uniform(normal).float().clamp_max(_BELOW_ONE)

    def by_student(self, **settings: object) -> Tensor:
        """Embeddings [B, N, D] of the student; arguments as of `Student.sample`."""
        assert self.student is not None
        return self.student.sample(self.condition, self.noise, **settings)  # type: ignore[arg-type]


_BELOW_ONE = 1 - 2**-24
"""The largest float32 below 1."""

LABELS = ("uniform", "random")
"""How samples get their conditions: all in turn, or drawn."""

_LABEL_SEED = 0x9E3779B97F4A7C15
"""How far the seed of the labels is from that of the noise."""


def _uniform(normal: Tensor) -> Tensor:
    """Uniform numbers in [0, 1], float64, of normal ones."""
    return torch.special.ndtr(normal.double())


def conditions_of(number: Tensor, conditions: Tensor, labels: str, seed: int) -> Tensor:
    """Which of the conditions int64 [M] the samples `number` int64 [B] of a seed have: int64 [B], on the CPU.

    Uniform: all of them in turn, so that a multiple of M samples has as many of each. Random: each is as likely, and a
    sample's own chance decides: whatever the count, the batch and the device.
    """
    if labels == "uniform":
        return conditions[number % len(conditions)]
    drawn = _uniform(noise(seeds.derived(seed, _LABEL_SEED), number, (1,), "cpu")[:, 0]) * len(conditions)
    return conditions[drawn.long().clamp_max(len(conditions) - 1)]


MOST = 10_000_000
"""Samples of a stream."""


def batch_ranges(count: int, batch_size: int) -> list[range]:
    """The numbers of the samples in every batch of a stream: all have one size, at most `batch_size`, but the last.

    Raises:
        ValueError: there are more than `MOST` samples: their list alone would not fit in memory.
    """
    if count > MOST:
        raise ValueError(f"count: got {count}, expected at most {MOST}")
    size = math.ceil(count / math.ceil(count / batch_size))
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def sample_student(teacher: Teacher, student: Student | None, **settings: Any) -> Samples:
    """All samples of a student, or of its teacher, as `stream_student` makes them."""
    return whole(stream_student(teacher, student, **settings), teacher.codebook.device)


def stream_student(
    teacher: Teacher,
    student: Student | None,
    *,
    count: int,
    seed: int,
    steps: int = 1,
    teacher_steps: int = 0,
    refine: Refine = 0,
    guidance: Guidance | None = None,
    classes: Sequence[int] | None = None,
    labels: str = "uniform",
    batch_size: int = 1000,
    skip: Collection[int] = (),
) -> Iterator[Samples]:
    """`count` samples, in batches, of a student in a number of steps, or of its teacher; this process's share of them.

    Args:
        steps: of the student (`Student.settings`); 0: the teacher alone.
        guidance: of the teacher's part.
        teacher_steps: groups from the student's point on that the teacher regenerates before the student's last pass;
            0: none.
        refine: passes of the teacher over the student's samples, or "exact" (`Student.sample`).
        teacher: of the student.
        student: None: only with `steps=0`.
        count: how many; sample i has the chance (seed, i).
        seed: of the noise, of the teacher's draws, and of random labels.
        classes: labels to choose from (text: numbers of captions); None: all.
        labels: uniform (sample i has the class i modulo their number) or random (`conditions_of`).
        batch_size: samples made at a time.
        skip: numbers of batches (`batch_ranges`) that are not made.

    Raises:
        ValueError, TypeError: a class is unknown, a number is out of range, a text teacher has no captions, the teacher
            would run past the last group, or a setting has no effect.
        DDFastError: a batch does not fit in memory.
    """
    guidance = guidance or Guidance()
    if steps == 0:
        if teacher_steps:
            raise ValueError("teacher_steps: has no effect with steps=0: the teacher makes every group")
        if refine:
            raise ValueError("refine: has no effect with steps=0: the teacher makes every group")

        def make(request: Request) -> Tensor:
            return teacher.embed(teacher.generate(request.condition, uniform=request.uniform, **guidance.given()))

    else:
        if student is None:
            raise ValueError("student: got None, expected a student (or steps=0: the teacher alone)")
        settings = _settings(teacher, student, steps, teacher_steps, refine, guidance)

        def make(request: Request) -> Tensor:
            return request.by_student(**settings)

    return batches(
        lambda: make,
        teacher,
        student,
        count=count,
        seed=seed,
        classes=classes,
        labels=labels,
        batch_size=batch_size,
        skip=skip,
    )


def _settings(
    teacher: Teacher, student: Student, steps: int, teacher_steps: int, refine: Refine, guidance: Guidance
) -> dict[str, Any]:
    """Arguments of `Student.sample`; raises where one of ours would have no effect."""
    settings, given, groups = student.settings(steps), guidance.given(), len(teacher.groups)
    if teacher_steps:
        if not student.starts_anywhere:
            raise ValueError(
                f"teacher_steps: has no effect on {student.method.upper()}'s students: of k steps, the last k - 1 are "
                "the teacher's"
            )
        point = student.settings(2)["steps"][1]
        if not 0 < teacher_steps <= groups - point:
            expected = f"1 to {groups - point}, the groups from point {point} on"
            raise ValueError(f"teacher_steps: got {teacher_steps}, expected {expected}")
        settings = {"teacher_range": (point, point + teacher_steps)}
    check_refine(refine)
    if refine:
        settings = {**settings, "refine": refine}
    if refine or "teacher_range" in settings:
        return {**settings, **given}
    if given:
        raise ValueError(f"guidance.{next(iter(given))}: has no effect with steps={steps}: the teacher takes no part")
    return settings


def teacher_takes_part(student: Student | None, steps: int, teacher_steps: int = 0, refine: Refine = 0) -> bool:
    """Whether the teacher decodes in a sampling of these steps."""
    if steps == 0 or student is None or teacher_steps or refine:
        return True
    return "teacher_range" in student.settings(steps)


def set_point(teacher: Teacher, student: Student | None, point: int | None, *, steps: int, teacher_steps: int) -> None:
    """Let a student's second step start from the point that the user gives, where that has an effect.

    Raises:
        ValueError: it has none, or is no point of the teacher's trajectories.
    """
    if point is None:
        return
    last = len(teacher.groups) - 1
    if not isinstance(student, DD1Student):
        raise ValueError("point: has no effect: only DD1's students have a second step's point")
    if steps < 2 and not teacher_steps:
        raise ValueError(f"point: has no effect with steps={steps}: there is no second step")
    if not 1 <= point <= last:
        raise ValueError(f"point: got {point}, expected a trajectory point in 1..{last}")
    student.point = point


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


def first_request(teacher: Teacher, student: Student, count: int) -> Request:
    """The first `count` samples of seed 0, with the conditions in turn."""
    labels, number = condition_index(teacher), torch.arange(count, dtype=torch.int64)
    index = labels[number % len(labels)].to(teacher.codebook.device)
    return Request(teacher=teacher, student=student, seed=0, number=number, index=index)


def batches(
    prepare: Callable[[], Callable[[Request], Tensor]],
    teacher: Teacher,
    student: Student | None,
    *,
    count: int,
    seed: int,
    classes: Sequence[int] | None,
    batch_size: int,
    labels: str = "uniform",
    skip: Collection[int] = (),
) -> Iterator[Samples]:
    """What a maker makes of requests, batch by batch; what can be refused is refused at once, before it is prepared.

    Of several processes each makes its share of the batches; the maker is prepared by all of them.

    Args:
        prepare: gives the maker, before the first batch.
        teacher, student, count, seed, classes, batch_size, labels, skip: as in `stream_student`; errors too.
    """
    conditions = condition_index(teacher, classes)
    if count < 1:
        raise ValueError(f"count: got {count}, expected at least 1")
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
    if labels not in LABELS:
        raise ValueError(f"labels: got {labels!r}, expected {' or '.join(LABELS)}")
    seeds.check_seed(seed)
    wanted = [numbers for batch, numbers in enumerate(batch_ranges(count, batch_size)) if batch not in skip]

    def condition(number: Tensor) -> Tensor:
        return conditions_of(number, conditions, labels, seed)

    return _batches(prepare, teacher, student, wanted, seed, condition)


def _batches(
    prepare: Callable[[], Callable[[Request], Tensor]],
    teacher: Teacher,
    student: Student | None,
    wanted: Sequence[range],
    seed: int,
    condition: Callable[[Tensor], Tensor],
) -> Iterator[Samples]:
    device = teacher.codebook.device
    try:
        make = prepare()
        for numbers in processes.share(wanted):
            number = torch.arange(numbers.start, numbers.stop, dtype=torch.int64)
            index = condition(number).to(device)
            request = Request(teacher=teacher, student=student, seed=seed, number=number, index=index)
            with torch.no_grad(), fitting(len(number), device, BATCH_OPTION):
                made = make(request)
                codes = nearest_code(made, teacher.codebook)
                passes = torch.zeros_like(number) if request.passes is None else request.passes.cpu()
                samples = Samples(codes=codes, embeddings=made, condition=index, number=number, passes=passes)
            processes.sign()
            yield samples
            del made, codes, samples, request
    finally:
        release_graphs(teacher)  # of a batch as large as the memory: what comes next needs it
