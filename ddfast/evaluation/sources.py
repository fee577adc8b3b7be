"""The sources of samples that are compared: teacher, its ODE pairs, the student, and the baselines.

Everything that tells of them (figures, timings, report, pictures, profile) reads the one table `SOURCES`.

Dimensions: B batch, N tokens, V codes, D code dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ddfast import private_api, processes, seeds
from ddfast.evaluation.plain_decoding import plain_decoder
from ddfast.evaluation.speculative_jacobi import speculative_jacobi
from ddfast.models.flow_network import FlowNetwork
from ddfast.models.protocol import Teacher
from ddfast.models.student import Student
from ddfast.ops import draw_codes, nearest_code
from ddfast.sampling import Request, Samples, batches, whole

Make: TypeAlias = Callable[[Request], Tensor]
"""Embeddings [B, N, D] of a batch."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A source of samples, and what is told of it.

    Texts may hold {method}, {two}, {n}, {quarter} and {kept}; the steps of one that counts its passes, {passes} too.

    Attributes:
        name: its key in metrics.json.
        make: makes a batch of samples.
        prepare: in its place where something has to be made of the teacher before the first batch.
        label, steps: its row in the report; empty: it has none, and is not measured.
        picture: its title in samples.png; empty: it is not there.
        timed: its speed is measured.
        profile: its column in `ddfast profile`; empty: it has none.
        by_student: it takes a student.
        counts_passes: its samples take as many passes of the network as it happens, and say how many.
    """

    name: str
    make: Make | None = None
    prepare: Callable[[Teacher], Make] | None = None
    label: str = ""
    steps: str = ""
    picture: str = ""
    timed: bool = False
    profile: str = ""
    by_student: bool = False
    counts_passes: bool = False

    def maker(self, teacher: Teacher) -> Make:
        """What makes its batches."""
        if self.make is not None:
            return self.make
        assert self.prepare is not None
        return self.prepare(teacher)


def _teacher(request: Request) -> Tensor:
    return request.teacher.embed(request.teacher.generate(request.condition, uniform=request.uniform))


def _ode_pairs(request: Request) -> Tensor:
    codes = request.teacher.generate(request.condition, sampler="flow", noise=request.noise)
    return request.teacher.embed(codes)


def _one_step(request: Request) -> Tensor:
    return request.by_student()


def _two_steps(request: Request) -> Tensor:
    assert request.student is not None
    return request.by_student(**request.student.settings(2))


def _teacher_involved(request: Request) -> Tensor:
    """The teacher regenerates the second quarter of the groups, the student finishes."""
    groups = len(request.teacher.groups)
    return request.by_student(teacher_range=(max(groups // 4, 1), max(groups // 2, 2)))


def _ar_diffusion(request: Request) -> Tensor:
    """Stage 1 of DD2: every token's flow integrated in ten steps, one group of tokens after another."""
    if not isinstance(request.student, FlowNetwork):
        raise ValueError("student: got none of DD2's networks, expected one for the source 'ar_diffusion'")
    return request.teacher.embed(request.student.sample_ar(request.condition, request.noise))


def _skip_last(request: Request) -> Tensor:
    """Skip-last-k: the teacher decodes all groups but the last quarter, which all get the code nearest to their noise.

    It costs three quarters of the teacher's steps and shows what leaving out steps without distilling them does.
    """
    teacher = request.teacher
    starts = teacher.group_starts()
    stop = starts[-1 - max(len(teacher.groups) // 4, 1)]
    codes = teacher.generate(request.condition, uniform=request.uniform, stop=stop)
    rest = nearest_code(request.noise[:, stop:], teacher.codebook)
    return teacher.embed(torch.cat((codes, rest), dim=1))


def _speculative_jacobi(request: Request) -> Tensor:
    """Training-free parallel decoding, which draws from the teacher's own distribution; every sample says its passes.

    A teacher whose groups have many tokens decodes these in parallel already, and drafts of whole groups would all have
    to be kept at once.
    """
    codes, request.passes = speculative_jacobi(request.teacher, request.condition, request.uniform_of)
    return request.teacher.embed(codes)


def marginal_tables(teacher: Teacher, generator: torch.Generator, *, samples_per_class: int = 1000) -> Tensor:
    """Every token's marginal distribution given the class, estimated from the teacher's samples: [classes, N, V]."""
    shape = (teacher.num_conditions, teacher.num_tokens, teacher.num_codes)
    tables = torch.zeros(shape, dtype=torch.float32, device=teacher.codebook.device)
    for label, table in enumerate(tables):
        condition = torch.full((samples_per_class,), label, dtype=torch.int64, device=tables.device)
        codes = teacher.generate(teacher.condition_of(condition), generator=generator)
        table.scatter_add_(1, codes.T, table.new_full(codes.T.shape, 1 / samples_per_class))
        processes.sign()
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


def _plain(teacher: Teacher) -> Make:
    decoder = plain_decoder(teacher)
    return lambda request: decoder.generate(request.condition)


_estimated: WeakKeyDictionary[Teacher, tuple[object, Tensor]] = WeakKeyDictionary()
"""Tables of marginals, and what they depend on: figures, timings and pictures of a run ask for the same ones."""


def _independent_marginals(teacher: Teacher) -> Make:
    """onestep*: the best that a sampler of all tokens at once can do without looking at what the others became."""
    device = teacher.codebook.device
    weights = tuple((tensor.data_ptr(), private_api.writes(tensor)) for tensor in teacher.parameters())
    key = (weights, teacher.defaults, teacher.num_conditions, device)

    def estimated() -> Tensor:  # with a seed of its own: no sample of the figures is among those
        return marginal_tables(teacher, seeds.generator(0, device, number=7_000_003)).cpu()

    known, tables = _estimated.get(teacher, (None, torch.empty(0, dtype=torch.float32)))
    same = known == key and teacher.num_classes > 0  # of captions, as many may be others
    if not processes.first_does(lambda: same):
        tables = processes.first_does(estimated).to(device)  # one sequence of draws: there is nothing to share
        _estimated[teacher] = key, tables
    return lambda request: teacher.embed(draw_marginals(tables, request.index, uniform=request.uniform))


SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        Source(name="teacher_plain", prepare=_plain, timed=True, profile="AR, plain PyTorch"),
        Source(
            name="teacher", make=_teacher, label="teacher, AR decoding", steps="{n}", picture="teacher", timed=True,
            profile="AR, ddfast",
        ),
        Source(
            name="ode_pairs", make=_ode_pairs, label="teacher, flow from noise (the training pairs)", steps="{n}",
        ),
        Source(
            name="speculative_jacobi", make=_speculative_jacobi, label="teacher, speculative Jacobi decoding",
            steps="{passes:.1f}", timed=True, profile="speculative Jacobi", counts_passes=True,
        ),
        Source(
            name="ar_diffusion", make=_ar_diffusion, label="AR-diffusion model (stage 1)", steps="{n} x 10",
            by_student=True,
        ),
        Source(
            name="student_1step", make=_one_step, label="{method} student", steps="1", picture="{method}, 1 step",
            timed=True, profile="1 step", by_student=True,
        ),
        Source(
            name="student_2step", make=_two_steps, label="{method} student", steps="{two}",
            picture="{method}, 2 steps", timed=True, profile="2 steps", by_student=True,
        ),
        Source(
            name="teacher_involved", make=_teacher_involved, label="{method} student, teacher-involved",
            steps="2 + {quarter} AR", by_student=True,
        ),
        Source(
            name="skip_last", make=_skip_last, label="baseline skip-last", steps="{kept} AR", timed=True,
            profile="skip-last",
        ),
        Source(
            name="independent_marginals", prepare=_independent_marginals,
            label="baseline onestep* (independent marginals)", steps="1", picture="independent marginals", timed=True,
            profile="independent marginals",
        ),
    )
}  # fmt: skip

MEASURED = [source.name for source in SOURCES.values() if source.label]
"""Names of the sources that samples can be had of."""

_LARGEST_TABLE = 2**18
"""Entries of `marginal_tables` up to which they are estimated: every class takes thousands of the teacher's samples."""


def sources_for(teacher: Teacher, student: Student | None = None) -> list[Source]:
    """The sources that can be had of this teacher and student (None: any).

    All but the marginals where their tables are too large, speculative decoding of groups of many tokens, DD2's first
    stage, which is another network's, and a middle part by the teacher where the student cannot finish what it began:
    DD2's starts from noise alone.
    """
    entries = teacher.num_conditions * teacher.num_tokens * teacher.num_codes
    without = {"ar_diffusion"} | ({"independent_marginals"} if entries > _LARGEST_TABLE else set())
    if not teacher.one_by_one:
        without.add("speculative_jacobi")
    if student is not None and not student.starts_anywhere:
        without.add("teacher_involved")
    return [source for source in SOURCES.values() if source.name not in without]


def sample(source: str, teacher: Teacher, student: Student | None = None, **settings: Any) -> Samples:
    """All samples of one source, as `stream` makes them (of `count`, `seed`, ...)."""
    return whole(stream(source, teacher, student, **settings), teacher.codebook.device)


def stream(
    source: str,
    teacher: Teacher,
    student: Student | None = None,
    *,
    count: int,
    seed: int,
    classes: Sequence[int] | None = None,
    labels: str = "uniform",
    batch_size: int = 1000,
) -> Iterator[Samples]:
    """`count` samples of one source in batches; sample i has the chance (seed, i).

    Of several processes each gets its share of the batches.

    Args:
        source: one of `MEASURED`.
        teacher: makes its own samples, the baselines' and the teacher-involved ones.
        student: needed for the student's sources.
        count, seed, classes, labels, batch_size: as in `ddfast.sampling.stream_student`.

    Raises:
        ValueError, TypeError, DDFastError: the source is unknown, or needs a student; or as `stream_student`.
    """
    if source not in MEASURED:
        raise ValueError(f"source: got {source!r}, expected one of {', '.join(MEASURED)}")
    if student is None and SOURCES[source].by_student:
        raise ValueError("student: got None, expected a student for this source")
    return batches(
        partial(SOURCES[source].maker, teacher),
        teacher,
        student,
        count=count,
        seed=seed,
        classes=classes,
        labels=labels,
        batch_size=batch_size,
    )
