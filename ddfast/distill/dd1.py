"""DD1: regress the end of the teacher's trajectories from a few of their points."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ddfast.config import DD1Config
from ddfast.distill.batch import Batch, Part
from ddfast.distill.losses import embedding_distance, perceptual_distance, token_cross_entropy
from ddfast.distill.lpips import LPIPS
from ddfast.distill.method import Method, Roles, scheduled_rate
from ddfast.models.protocol import Teacher
from ddfast.models.student import DD1Student


def check_point(config: DD1Config, teacher: Teacher) -> None:
    """Raise `ValueError` unless the configuration's point lies inside the teacher's trajectories."""
    groups = len(teacher.groups)
    if not 0 < config.point < groups:
        raise ValueError(f"point: got {config.point}, expected a trajectory point in 1..{groups - 1}")
    if config.split > groups:
        raise ValueError(f"split: got {config.split}, expected a group in 0..{groups}, or -1 for none")
    if config.lpips_vgg and not teacher.has_decoder:
        raise ValueError(f"lpips_vgg: got a file, but {type(teacher).__name__} has no image tokenizer")


class DD1(Method):
    """From X_t with t in {0, t1}, predict the final sequence: cross-entropy + a distance of the continuous prediction.

    The distance is LPIPS of the decoded images where its weights are given, else L1 of the embeddings;
    docs/method.md section 8 (DD1: losses and training).

    Args:
        roles: student and teacher; of the teacher, only the image decoder has a part once the trajectories are stored.
        config: points, their probabilities, the losses' weights and LPIPS's files.
    """

    def __init__(self, roles: Roles, config: DD1Config) -> None:
        super().__init__(roles)
        check_point(config, roles.teacher)
        assert isinstance(roles.student, DD1Student)
        self.student, self.config = roles.student, config
        self.networks, self.total = {"student": roles.student}, config.iterations
        self.lpips: LPIPS | None = None
        if config.lpips_vgg:
            loaded = LPIPS.load(Path(config.lpips_vgg), Path(config.lpips_linear))
            self.lpips = loaded.to(roles.teacher.codebook.device)

    def phase(self, step: int) -> str:
        """DD1 has one network to train."""
        return "student"

    def learning_rate(self, phase: str, update: int) -> float:
        """Linear warm-up, then cosine decay."""
        return scheduled_rate(self.config, update, self.total)

    def step(self, phase: str, batch: Batch, part: Part) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss on the tokens that each sequence's point leaves open."""
        student, config = self.student, self.config
        assert batch.codes is not None
        later = torch.rand(part.size, generator=part.generator, dtype=torch.float32) < config.point_probability
        points = (part.own(later).long() * config.point).to(batch.codes.device)
        target = student.codebook[batch.codes]
        is_data = student.data_mask(points, len(batch.codes))
        logits, embeddings = student.predict(
            batch.condition, torch.where(is_data[..., None], target, batch.noise), points
        )
        share = self._open_tokens(part.own(later)) / self._open_tokens(later)
        cross_entropy = share * token_cross_entropy(logits, batch.codes, ~is_data)
        if self.lpips is None:
            name, distance = "embedding_distance", share * embedding_distance(embeddings, target, ~is_data)
        else:
            decode = partial(self.roles.teacher.decode, clamp=False)
            name = "lpips"
            distance = part.share * perceptual_distance(embeddings, target, ~is_data, decode, self.lpips)
        loss = cross_entropy + config.embedding_weight * distance
        return loss, {"cross_entropy": cross_entropy.detach(), name: distance.detach()}

    def _open_tokens(self, later: Tensor) -> int:
        """How many tokens are open in sequences of which some, bool [b], start from the later point."""
        starts = self.roles.teacher.group_starts()
        return len(later) * starts[-1] - int(later.sum()) * starts[self.config.point]
