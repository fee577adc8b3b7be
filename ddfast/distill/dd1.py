"""DD1: regress the end of the teacher's trajectories from a few of their points."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ddfast.config import DD1Config
from ddfast.distill.batch import Batch, Part
from ddfast.distill.losses import (
    embedding_distance,
    next_token_divergence,
    perceptual_distance,
    token_cross_entropy,
)
from ddfast.distill.lpips import LPIPS
from ddfast.distill.method import Method, Roles, scheduled_rate
from ddfast.models.autoregressive import take
from ddfast.models.layers import Linear
from ddfast.models.protocol import Teacher
from ddfast.models.student import DD1Student, second_step
from ddfast.ops import flow_sample


def add_lookahead(student: DD1Student) -> None:
    """Give a student a layer that leads from the features of a token to those that its head reads the next one off.

    It starts as the identity, and is the student's while it learns: `remove_lookahead`.
    """
    with student.codebook.device:
        layer = Linear(student.width, student.width)
    with torch.no_grad():
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    student.lookahead = layer


def remove_lookahead(student: DD1Student) -> None:
    """Leave the layer behind, if there is one."""
    if hasattr(student, "lookahead"):
        del student.lookahead


def trajectory_points(config: DD1Config, teacher: Teacher) -> tuple[int, ...]:
    """The points beside 0 that are trained, rising; `ValueError` unless they lie inside the teacher's trajectories."""
    groups = len(teacher.groups)
    point = second_step(groups) if config.point is None else config.point
    if not 0 < point < groups:
        raise ValueError(f"point: got {point}, expected a trajectory point in 1..{groups - 1}")
    points = (point, *config.later_points)
    if list(points) != sorted(set(points)) or points[-1] >= groups:
        expected = f"rising trajectory points in {point + 1}..{groups - 1}"
        raise ValueError(f"later_points: got {config.later_points}, expected {expected}")
    return points


def check_settings(config: DD1Config, teacher: Teacher) -> None:
    """Raise `ValueError` unless the configuration fits the teacher."""
    trajectory_points(config, teacher)
    groups = len(teacher.groups)
    if config.split > groups:
        raise ValueError(f"split: got {config.split}, expected a group in 0..{groups}, or -1 for none")
    if config.lookahead_weight and not teacher.one_by_one:
        raise ValueError(
            f"lookahead_weight: got {config.lookahead_weight}, expected 0: it is for teachers of one token per group"
        )
    if config.lpips_vgg and not teacher.has_decoder:
        raise ValueError(f"lpips_vgg: got a file, but {type(teacher).__name__} has no image tokenizer")


class DD1(Method):
    """From X_t, t one of 0, t1, ..., predict the final sequence: cross-entropy + a distance of the continuous one.

    The final sequence is that of a stored pair (the paper's DD1), or every token's own: what the teacher's flow makes
    of its noise, given the codes that the student itself makes before it (`own_share`). A student that recycles learns
    the cross-entropy of every run.

    The distance is LPIPS of the decoded images where its weights are given, else L1 of the embeddings;
    docs/method.md section 8 (DD1: losses and training).

    Args:
        roles: student and teacher; of the teacher, only the image decoder has a part once the trajectories are stored.
        config: points, their probabilities, the losses' weights and LPIPS's files.
    """

    def __init__(self, roles: Roles, config: DD1Config) -> None:
        super().__init__(roles)
        check_settings(config, roles.teacher)
        self.points = trajectory_points(config, roles.teacher)
        assert isinstance(roles.student, DD1Student)
        self.student, self.config = roles.student, config
        self.networks, self.total = {"student": roles.student}, config.iterations
        if config.own_share:
            self.networks["own"] = roles.student
        if config.lookahead_weight:
            add_lookahead(roles.student)
        self.lpips: LPIPS | None = None
        if config.lpips_vgg:
            loaded = LPIPS.load(Path(config.lpips_vgg), Path(config.lpips_linear))
            self.lpips = loaded.to(roles.teacher.codebook.device)

    def phase(self, step: int) -> str:
        """One network: by pairs first ("student"), then after its own codes ("own")."""
        return "student" if step < self.config.pair_iterations else "own"

    def learning_rate(self, phase: str, update: int) -> float:
        """Linear warm-up, then cosine decay."""
        return scheduled_rate(self.config, update, self.total)

    def reads_codes(self, phase: str) -> bool:
        """Those of pairs."""
        return phase != "own"

    def step(self, phase: str, batch: Batch, part: Part) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss on the tokens that each sequence's point leaves open."""
        student, config = self.student, self.config
        later = torch.rand(part.size, generator=part.generator, dtype=torch.float32) < config.point_probability
        points = self._points(later, part.generator)
        own_points = part.own(points)
        on_device = own_points.to(batch.noise.device)
        is_data = student.data_mask(on_device, len(batch.noise))
        given = self._own_codes(batch, own_points > 0) if phase == "own" else batch.codes
        assert given is not None
        x = torch.where(is_data[..., None], student.codebook[given], batch.noise)
        x = student.check_point(batch.condition, x)
        *earlier, (hidden, context, _) = student.runs(batch.condition, x, on_device)
        logits, embeddings = student.code_logits(hidden, context), student.continuous(hidden, context)
        share = self._open_tokens(own_points) / self._open_tokens(points)
        ahead = logits.new_zeros(())
        if phase == "own":
            made = torch.where(is_data, given, logits.argmax(-1))
            with torch.no_grad():
                log_probs = self.roles.teacher.log_probs(batch.condition, made)
                codes, target = flow_sample(log_probs, batch.noise, student.codebook)
            if config.lookahead_weight:
                seen = student.code_logits(student.lookahead(hidden[:, :-1]), context)
                ahead = part.share * next_token_divergence(seen, log_probs[:, 1:])
        else:
            codes, target = given, student.codebook[given]
        logits_by_run = [*(before for *_, before in earlier if before is not None), logits]
        by_run = [share * token_cross_entropy(one, codes, ~is_data) for one in logits_by_run]
        if self.lpips is None:
            name, distance = "embedding_distance", share * embedding_distance(embeddings, target, ~is_data)
        else:
            decode = partial(self.roles.teacher.decode, clamp=False)
            name = "lpips"
            distance = part.share * perceptual_distance(embeddings, target, ~is_data, decode, self.lpips)
        loss = sum(by_run) + config.embedding_weight * distance + config.lookahead_weight * ahead
        logged = {"cross_entropy": by_run[-1].detach(), name: distance.detach()}
        return loss, logged | ({"lookahead": ahead.detach()} if phase == "own" and config.lookahead_weight else {})

    def _points(self, later: Tensor, generator: torch.Generator) -> Tensor:
        """The point int64 [B] of every sequence: 0, or one of the others where `later`, bool [B], says so."""
        if len(self.points) == 1:  # nothing to draw
            return later.long() * self.points[0]
        chosen = torch.randint(len(self.points), later.shape, generator=generator, dtype=torch.int64)
        return later.long() * torch.tensor(self.points, dtype=torch.int64)[chosen]

    @torch.no_grad()
    def _own_codes(self, batch: Batch, later: Tensor) -> Tensor:
        """Codes int64 [B, N] of a first pass, which the sequences that start later, bool [B], go on from."""
        student = self.student
        codes = torch.zeros(batch.noise.shape[:2], dtype=torch.int64, device=batch.noise.device)
        # Chosen on the host, which need not wait for a GPU to know how many there are.
        rows = torch.arange(len(later), dtype=torch.int64)[later].to(codes.device)
        if len(rows):
            last = student.last_run(take(batch.condition, rows), batch.noise[rows], 0)
            codes[rows] = student.code_logits(*last).argmax(-1)
        return codes

    def _open_tokens(self, points: Tensor) -> int:
        """How many tokens are open in sequences that start from points int64 [b]."""
        starts = self.roles.teacher.group_starts()
        given = sum(int((points == point).sum()) * starts[point] for point in self.points)
        return len(points) * starts[-1] - given
