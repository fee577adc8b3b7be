"""The DD1 student: noise in, all tokens out, in one causal pass over [condition, X_t].

A trajectory point t counts groups: the first t groups of X_t are data, the others noise (METHOD.md section 2).
Dimensions: B batch, N tokens, V codes, D code dimension, W width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddfast.models.protocol import Condition, Teacher
from ddfast.models.transformer import Transformer, TransformerTeacher, level_mask
from ddfast.ops import nearest_code


class Student(nn.Module):
    """Transformer that predicts the end of a trajectory from any of its points.

    Args:
        teacher: gives the codebook, the groups and the classes; teacher-involved sampling calls it. It is referred to,
            not contained: it is no part of the student's parameters, state or device moves.
        width, depth, heads: size of the transformer; None takes the teacher's.
    """

    def __init__(
        self, teacher: Teacher, *, width: int | None = None, depth: int | None = None, heads: int | None = None
    ) -> None:
        super().__init__()
        if isinstance(teacher, TransformerTeacher):
            body = teacher.body
            width, depth, heads = width or body.width, depth or body.depth, heads or body.heads
        if width is None or depth is None or heads is None:
            raise ValueError(f"width, depth, heads: {type(teacher).__name__} does not give them, expected three sizes")
        self._teacher = (teacher,)  # in a tuple, so that nn.Module does not adopt it
        self.groups, self.num_classes = teacher.groups, teacher.num_classes
        self.register_buffer("codebook", teacher.codebook.detach().clone(), persistent=False)
        self.codebook: Tensor
        level = torch.arange(len(self.groups)).repeat_interleave(torch.tensor(self.groups))
        self.register_buffer("level", level, persistent=False)  # group of every token
        self.level: Tensor
        self.class_embedding = nn.Embedding(self.num_classes + 1, width)
        self.position_embedding = nn.Parameter(torch.empty(teacher.num_tokens + 1, width))
        self.input = nn.Linear(teacher.code_dim, width)
        self.data_embedding = nn.Embedding(2, width)  # row 1: data, row 0: noise
        self.body = Transformer(width, depth, heads)
        self.head = nn.Linear(width, teacher.num_codes)
        self.continuous_modulation = nn.Parameter(torch.empty(2, width))  # rows: shift, scale
        self.continuous_head = nn.Linear(width, teacher.code_dim)
        for parameter in (
            self.class_embedding.weight,
            self.position_embedding,
            self.data_embedding.weight,
            self.head.weight,
            self.continuous_modulation,
        ):
            nn.init.normal_(parameter, std=0.02)

    @classmethod
    def from_teacher(cls, teacher: Teacher) -> Student:
        """A student of the teacher's size that starts from its weights.

        Position row 0 (the condition) is the teacher's row 0, rows 2.. are the teacher's rows 1.. (the positions that
        predict the same tokens); row 1, the data/noise embedding and the continuous head have no counterpart.
        """
        if not isinstance(teacher, TransformerTeacher):
            raise TypeError(f"teacher: got {type(teacher).__name__}, expected a TransformerTeacher to start from")
        student = cls(teacher)
        source = teacher.state_dict()
        own = student.state_dict()
        shared = {name: source[name] for name in own if name in source and name not in ("position_embedding",)}
        student.load_state_dict(shared, strict=False)
        first = teacher.groups[0]
        with torch.no_grad():
            student.position_embedding[0] = source["position_embedding"][0]
            student.position_embedding[1 + first :] = source["position_embedding"][first:]
        return student

    @property
    def teacher(self) -> Teacher:
        """The teacher whose trajectories this student learnt."""
        return self._teacher[0]

    @property
    def config(self) -> dict[str, Any]:
        """What rebuilds this module: `Student(teacher, **config)`."""
        return {"width": self.body.width, "depth": self.body.depth, "heads": self.body.heads}

    def predict(self, condition: Condition, x: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        """Predict the data from one trajectory point.

        Args:
            condition: int64 [B].
            x: float32 [B, N, D], the point X_t: t groups of code embeddings, then noise.
            t: the point, an int or int64 [B].

        Returns:
            logits [B, N, V] and embeddings [B, N, D]; position i sees the condition, the groups before i's and itself.
        """
        hidden, label = self._features(condition, x, t)
        return self.head(hidden), self._continuous(hidden, label)

    def _features(self, condition: Condition, x: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        """Transformer output [B, N, W] at the tokens, and the class embedding [B, W]."""
        if not isinstance(condition, Tensor):
            raise TypeError(f"condition: got {type(condition).__name__}, expected int64 labels [B]")
        batch, num_tokens = x.shape[0], self.teacher.num_tokens
        if x.shape[1:] != (num_tokens, self.teacher.code_dim):
            raise ValueError(f"x: got shape {list(x.shape)}, expected [B, {num_tokens}, {self.teacher.code_dim}]")
        label = self.class_embedding(condition)
        tokens = torch.cat((label[:, None], self.input(x)), dim=1)
        is_data = F.pad(self.data_mask(t, batch).long(), (1, 0), value=1)  # the condition counts as data
        tokens = tokens + self.position_embedding + self.data_embedding(is_data)
        mask = level_mask((1, *self.groups), x.device)
        return self.body(tokens, mask, mask is None)[:, 1:], label

    def _continuous(self, hidden: Tensor, label: Tensor) -> Tensor:
        """The continuous head [..., W] -> [..., D]: shift and scale from the class and a learned table."""
        shift, scale = (self.continuous_modulation + label[:, None]).unbind(1)
        normal = F.layer_norm(hidden, hidden.shape[-1:])
        return self.continuous_head(normal * (1 + scale[:, None]) + shift[:, None])

    def data_mask(self, t: int | Tensor, batch: int) -> Tensor:
        """Boolean [B, N]: True where X_t holds data."""
        low, high = (t, t) if isinstance(t, int) else (int(bound) for bound in torch.aminmax(t))
        if not 0 <= low <= high <= len(self.groups):
            raise ValueError(f"t: got points {low} to {high}, expected trajectory points in 0..{len(self.groups)}")
        points = t if isinstance(t, int) else t[:, None]
        return (self.level < points).expand(batch, -1)

    def sample(
        self,
        condition: Condition,
        noise: Tensor,
        *,
        steps: tuple[int, ...] = (0,),
        split: int | None = None,
        teacher_range: tuple[int, int] | None = None,
        cfg_scale: float | None = None,
    ) -> Tensor:
        """Generate code embeddings in `len(steps)` passes.

        Each pass predicts everything from its point; the next one keeps the first groups of the result up to its own
        point and puts the *same* noise back for the rest. The result of a pass is the embedding of the most likely
        code before the split and the continuous head's value from there on.

        Args:
            condition: int64 [B].
            noise: float32 [B, N, D].
            steps: trajectory points, rising from 0: `(0,)` one step, `(0, t1)` two.
            split: group from which the continuous head is used; None: nowhere.
            teacher_range: (first, last): after the first pass the teacher regenerates groups first..last-1 from the
                quantised prefix and the same noise, then the student finishes from point `last`.
            cfg_scale: guidance of the teacher's part; None takes its default.

        Returns:
            float32 [B, N, D].
        """
        count = len(self.groups)
        if not steps or steps[0] != 0 or list(steps) != sorted(set(steps)) or steps[-1] > count:
            raise ValueError(f"steps: got {steps}, expected rising trajectory points from 0 to at most {count}")
        if split is not None and not 0 <= split <= count:
            raise ValueError(f"split: got {split}, expected a group in 0..{count}")
        if teacher_range is not None and not 0 <= teacher_range[0] < teacher_range[1] <= count:
            raise ValueError(f"teacher_range: got {teacher_range}, expected first < last in 0..{count}")
        with torch.inference_mode():
            x = self._complete(condition, noise, noise, 0, split)
            if teacher_range is not None:
                x = self._involve_teacher(condition, noise, x, teacher_range, split, cfg_scale)
            for point in steps[1:]:
                x = self._complete(condition, x, noise, point, split)
        return x.clone()  # outside inference mode, so that samples can enter a training graph

    def _complete(self, condition: Condition, x: Tensor, noise: Tensor, point: int, split: int | None) -> Tensor:
        """One pass from the point whose data are the first groups of x."""
        starts = self.teacher.group_starts()
        first, count = starts[point], self.teacher.num_tokens
        if point == len(self.groups):
            return x[:, :first]
        border = count if split is None else max(starts[split], first)
        given = torch.cat((x[:, :first], noise[:, first:]), dim=1) if first else noise
        hidden, label = self._features(condition, given, point)
        parts = [x[:, :first]] if first else []
        if border > first:
            parts.append(self.codebook[self.head(hidden[:, first:border]).argmax(-1)])
        if border < count:
            parts.append(self._continuous(hidden[:, border:], label))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _involve_teacher(
        self,
        condition: Condition,
        noise: Tensor,
        x: Tensor,
        teacher_range: tuple[int, int],
        split: int | None,
        cfg_scale: float | None,
    ) -> Tensor:
        starts = self.teacher.group_starts()
        first, last = teacher_range
        prefix = nearest_code(x[:, : starts[first]].contiguous(), self.codebook)
        codes = self.teacher.generate(
            condition, sampler="flow", noise=noise, cfg_scale=cfg_scale, prefix=prefix, stop=starts[last]
        )
        return self._complete(condition, self.codebook[codes], noise, last, split)
