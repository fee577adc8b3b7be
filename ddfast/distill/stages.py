"""The stages of a distillation as a run goes through them: DD1's one, DD2's three."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from ddfast import seeds
from ddfast.config import DD2Config, TrainConfig, config_hash
from ddfast.distill.batch import Part
from ddfast.distill.dd1 import DD1, remove_lookahead, trajectory_points
from ddfast.distill.dd2 import Adaptation, Matching, Tuning, code_likelihoods
from ddfast.distill.method import Roles
from ddfast.distill.trainer import from_noise, from_store, optimise, pairs_or_noise
from ddfast.models.checkpoint import AnyTensor, state_of
from ddfast.models.flow_network import FlowNetwork
from ddfast.models.loading import start_student, student_class, student_sizes
from ddfast.models.protocol import Teacher
from ddfast.models.student import DD1Student, Student
from ddfast.progress import Progress
from ddfast.trajectories.store import Trajectories

Live = dict[str, AnyTensor]
"""State of a student's weights without averaging."""


def distill(
    config: TrainConfig,
    teacher: Teacher,
    trajectories: Trajectories | None,
    out: Path,
    *,
    student: DD1Student | None = None,
    progress: Progress | None = None,
) -> tuple[DD1Student, Live]:
    """Train a DD1 student (None: one that starts as the teacher); returns it averaged, and the live weights.

    Of several processes, each then holds a part of both: `ddfast.models.loading.save_student` writes them whole.
    Without trajectories, `config.dd1.own_share` is 1.
    Interruption, resume, log and errors: `ddfast.distill.trainer.optimise`.
    """
    seeds.seed_all(config.seed)
    if student is None:
        student = start_student(teacher, recycles=config.dd1.recycles)
    _set_points(student, config)
    if config.dd1.split >= 0:
        student.split = config.dd1.split
    student = student.to(config.device, torch.float32).train().requires_grad_(True)
    average = optimise(
        DD1(Roles(student=student, teacher=teacher), config.dd1),
        config.dd1,
        pairs_or_noise(trajectories, teacher),
        out,
        stage="distillation",
        seed=config.seed,
        run=config,
        identity=config_hash(config.dd1, *_data(config)),
        ema_decay=config.dd1.ema_decay,
        progress=progress,
    )
    remove_lookahead(student)
    live = _live(student)
    average.copy_to(student)
    return student.eval().requires_grad_(False), live


def new_network(config: TrainConfig, teacher: Teacher, *, from_teacher: bool = True, recycles: int = 0) -> FlowNetwork:
    """A DD2 network of the configuration's size: the teacher's backbone, or one drawn anew, and a new head."""
    seeds.seed_all(config.seed)
    dd2, kind = config.dd2, student_class(teacher, "dd2")
    sizes = {**student_sizes(teacher, recycles), "head_width": dd2.head_width, "head_depth": dd2.head_depth}
    network = kind.from_teacher(teacher, **sizes) if from_teacher else kind(teacher, **sizes)
    assert isinstance(network, FlowNetwork)
    return network.to(config.device, torch.float32)


def untrained_student(config: TrainConfig, teacher: Teacher) -> Student:
    """A student of the configuration's method before its training, to profile it."""
    kind = student_class(teacher, config.method)
    student: Student
    if issubclass(kind, FlowNetwork):
        student = new_network(config, teacher, recycles=config.dd2.recycles)
    else:
        student = kind.from_teacher(teacher, **student_sizes(teacher, config.dd1.recycles))
    if isinstance(student, DD1Student):
        _set_points(student, config)
    return student.to(config.device).eval()


_HELD_OUT = 64 * 256
"""Tokens that the adaptation follows the likelihood on: they are decoded, and have their logits, at the same time."""


def adapt(
    config: TrainConfig, teacher: Teacher, network: FlowNetwork, out: Path, *, progress: Progress | None = None
) -> dict[str, dict[str, float]]:
    """DD2's stage 0: train the network's input in place, where several processes then hold a part of it each.

    Returns:
        nats per token on fresh samples of the teacher, {"before" | "after": {"teacher", "adapted"}}; "before" is an MLP
        that was fitted to nothing. The log has what is between: after the fit, and every as many steps from there.
    """
    generator = seeds.generator(config.seed, number=5_000_003)
    samples = min(max(_HELD_OUT // teacher.num_tokens, 1), 64)
    held_out = from_noise(teacher, decoding=teacher.defaults)(Part.whole(samples, generator))
    assert held_out.codes is not None
    before = code_likelihoods(network, held_out.condition, held_out.codes)
    network.train().requires_grad_(True)
    method = Adaptation(Roles(student=network, teacher=teacher), config.dd2.adapt, held_out)
    optimise(
        method,
        config.dd2.adapt,
        from_noise(teacher, decoding=teacher.defaults),
        out,
        stage="adaptation",
        seed=config.seed,
        run=config,
        identity=config_hash(*_shape(config.dd2), config.dd2.adapt, *_data(config)),
        watch_every=config.dd2.adapt.fit_iterations,
        progress=progress,
    )
    network.eval().requires_grad_(False)
    after = method.call(code_likelihoods, network, held_out.condition, held_out.codes)
    return {"before": before, "after": after}


def tune(
    config: TrainConfig,
    teacher: Teacher,
    network: FlowNetwork,
    trajectories: Trajectories | None,
    out: Path,
    *,
    progress: Progress | None = None,
) -> None:
    """DD2's stage 1: turn the network, in place, into an AR-diffusion model of the teacher's tokens.

    Several processes then hold a part of it each.

    Args:
        trajectories: sequences to learn from; None: the teacher makes them on the fly.
    """
    network.train().requires_grad_(True)
    dd2 = config.dd2
    method = Tuning(Roles(student=network, teacher=teacher), dd2.tune)
    optimise(
        method,
        dd2.tune,
        from_noise(teacher, decoding=method.sampling) if trajectories is None else from_store(trajectories, teacher),
        out,
        stage="tuning",
        seed=config.seed,
        run=config,
        identity=config_hash(*_shape(dd2), dd2.adapt, dd2.tune, *_data(config)),
        progress=progress,
    )
    network.eval().requires_grad_(False)


def match(
    config: TrainConfig,
    teacher: Teacher,
    student: FlowNetwork,
    guidance: FlowNetwork | None,
    out: Path,
    *,
    progress: Progress | None = None,
) -> Live:
    """DD2's stage 2: train generator and guidance network in place.

    The generator ends with its averaged weights; returned are the live ones. Several processes then hold a part each.
    """
    dd2 = config.dd2
    for network in (student, guidance):
        if network is not None:
            network.train().requires_grad_(True)
    student.time = dd2.time
    student.split = dd2.split if dd2.split >= 0 else None
    average = optimise(
        Matching(Roles(student=student, teacher=teacher, guidance=guidance), dd2.match),
        dd2.match,
        from_noise(teacher),
        out,
        stage="matching",
        seed=config.seed,
        run=config,
        identity=config_hash(dd2, config.init, *_data(config)),
        ema_decay=dd2.match.ema_decay,
        watch_every=dd2.match.watch_every,
        progress=progress,
    )
    live = _live(student)
    average.copy_to(student)
    for network in (student, guidance):
        if network is not None:
            network.eval().requires_grad_(False)
    return live


def _set_points(student: DD1Student, config: TrainConfig) -> None:
    """Where the student's steps start: at the points that it is trained from."""
    student.point, *later = trajectory_points(config.dd1, student.teacher)
    student.later_points = tuple(later)


def _live(student: Student) -> Live:
    """A copy of the state, which the moving average is about to overwrite."""
    own = {name: value.detach().clone() for name, value in student.named_parameters(remove_duplicate=False)}
    return state_of(student, own)


def _shape(dd2: DD2Config) -> tuple[int, int]:
    return dd2.head_width, dd2.head_depth


def _data(config: TrainConfig) -> tuple[object, ...]:
    """What decides the data of every stage."""
    trajectories = dataclasses.asdict(config.trajectories)
    del trajectories["batch_size"]  # how the pairs are made, not which
    return trajectories, config.teacher, config.tokenizer, config.seed
