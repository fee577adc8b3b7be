"""DD2's networks: a causal backbone and a light head that gives the velocity of one token's flow.

Generator and guidance network share this architecture: docs/method.md section 10 (DD2: networks). Position i's feature
depends on the tokens
of earlier groups only; the head reads a noisy token, its flow time and the feature. The guidance network's backbone
reads clean tokens, the generator's the noise, so that all tokens come out of one pass.
Dimensions: m noise draws, B batch, N tokens, V codes, D code dimension, W width.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddfast.models.autoregressive import Condition
from ddfast.models.layers import Linear, weights_dtype
from ddfast.models.protocol import Teacher
from ddfast.models.student import Student, modulated
from ddfast.models.transformer import TransformerNetwork, transformer_sizes
from ddfast.ops import nearest_code
from ddfast.ops.forms import x0_from_velocity

_FREQUENCIES, _EPS = 32, 1e-6


class VelocityHead(nn.Module):
    """Residual MLP blocks on a noisy token, modulated by the feature and the flow time (as MAR's diffusion head).

    The modulations' gates and the output start at zero: a new head's velocity is 0 everywhere.

    Args:
        feature_width: of the backbone's features.
        code_dim: D.
        width: of the blocks.
        depth: how many blocks.

    Source: Li et al. 2024 (MAR, arXiv 2406.11838) section 4.2; docs/method.md section 10 (DD2: networks).
    """

    def __init__(self, feature_width: int, code_dim: int, width: int, depth: int) -> None:
        super().__init__()
        self.input = Linear(code_dim, width)
        self.feature = Linear(feature_width, width)
        self.time = nn.Sequential(Linear(2 * _FREQUENCIES, width), nn.SiLU(), Linear(width, width))
        self.blocks = nn.ModuleList(_HeadBlock(width) for _ in range(depth))
        self.modulation = Linear(width, 2 * width)
        self.output = Linear(width, code_dim)
        for layer in (self.modulation, self.output):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, features: Tensor) -> Tensor:
        """x [..., N, D], t [..., N] and features [B, N, W], whose leading dimensions are the last ones of x's."""
        modulation = F.silu(self.feature(features) + self.time(_time_waves(t).to(x.dtype)))
        hidden = self.input(x)
        for block in self.blocks:
            hidden = block(hidden, modulation)
        return self.output(modulated(hidden, *self.modulation(modulation).chunk(2, -1), eps=_EPS))


class _HeadBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulation = Linear(width, 3 * width)
        self.expand, self.contract = Linear(width, width), Linear(width, width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(modulation).chunk(3, -1)
        return x + gate * self.contract(F.silu(self.expand(modulated(x, shift, scale, eps=_EPS))))


def _time_waves(t: Tensor) -> Tensor:
    """Sines and cosines of t [...] in (0, 1] at frequencies 1 to 1000: [..., 64]."""
    frequency = torch.exp(torch.linspace(0, math.log(1000.0), _FREQUENCIES, dtype=torch.float32, device=t.device))
    angle = t[..., None].float() * frequency
    return torch.cat((angle.sin(), angle.cos()), dim=-1)


class FlowNetwork(Student):
    """DD2's generator or guidance network; as a `Student`, it is the generator.

    A subclass builds the backbone, implements `features`, `code_logits` and `sizes_config`, and calls `add_head` with
    the width of its features and `add_recycling` with that of its input.

    Args:
        teacher, recycles: as in `Student`.
        head_width, head_depth: of the velocity head.
        time: flow time at which the generator's head takes the noise; below 1 it starts less collapsed, because a
            guidance network at t=1 knows nothing but the mean.

    Attributes:
        looks_up: its teacher looks tokens up in a table, so that a network in the table's place has to learn it first
            (`embedding_error`).
    """

    method, paper, two_steps = "dd2", "[DD2, arXiv 2510.21003](https://arxiv.org/abs/2510.21003)", "1 + 1 AR"
    starts_anywhere = False
    looks_up: ClassVar[bool] = False

    def __init__(
        self, teacher: Teacher, *, head_width: int, head_depth: int, time: float = 1.0, recycles: int = 0
    ) -> None:
        super().__init__(teacher, recycles=recycles)
        self.head_width, self.head_depth, self.time = head_width, head_depth, time

    def add_head(self, width: int) -> None:
        """Make the velocity head for features of this width."""
        self.velocity_head = VelocityHead(width, self.teacher.code_dim, self.head_width, self.head_depth)

    # What a network implements -----------------------------------------------------------------------------------

    @abstractmethod
    def features(self, condition: Condition, tokens: Tensor) -> Tensor:
        """float32 [B, N, W] from tokens [B, N, D]; position i sees the condition and the groups before its own.

        Of the generator's later runs, tokens are [B, N, 2 D], and `read` makes the input of either.
        """

    @abstractmethod
    def code_logits(self, features: Tensor) -> Tensor:
        """The teacher's head over codes: features [B, N, W] to logits [B, N, V]."""

    def embedding_error(self) -> Tensor:
        """Distance between the table of a teacher that `looks_up` and what stands in its place."""
        raise TypeError(f"{type(self).__name__} reads embeddings: it has nothing to adapt")

    # What every network inherits ---------------------------------------------------------------------------------

    @property
    def config(self) -> dict[str, Any]:
        return {"head_width": self.head_width, "head_depth": self.head_depth, "time": self.time, **super().config}

    def start_from(self, teacher: Teacher) -> None:
        """Take over what backbone and teacher have in common."""
        self.share(teacher)

    def start_from_student(self, student: Student) -> None:
        """Take over a DD1 student's backbone, which reads noise already."""
        self.share(student)

    @torch.no_grad()
    def share(self, source: nn.Module) -> None:
        """Take over what both have by name and shape."""
        theirs, own = source.state_dict(), self.state_dict()
        for name, value in own.items():
            if name in theirs and theirs[name].shape == value.shape:
                value.copy_(theirs[name])

    def velocity(self, x: Tensor, t: Tensor, features: Tensor) -> Tensor:
        """Velocity [..., N, D] of noisy tokens x [..., N, D] at times t [..., N], given features [B, N, W].

        x and t may have more leading dimensions than the features (several draws per token).
        """
        return self.velocity_head(x, t, features).float()

    def x0(self, x: Tensor, t: Tensor, features: Tensor) -> Tensor:
        """The clean token that the velocity stands for; arguments as `velocity`."""
        return x0_from_velocity(x, t, self.velocity(x, t, features))

    def generate(self, condition: Condition, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The generator: continuous tokens [B, N, D] from noise [B, N, D], and the features that made them."""
        return self.runs(condition, noise)[-1]

    def runs(self, condition: Condition, noise: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What every run of the generator makes; later ones read the codes made before, without gradient."""
        found = [self._made(condition, noise, noise)]
        for _ in range(self.recycles):
            made = self.nearest(found[-1][0].detach())
            found.append(self._made(condition, noise, torch.cat((noise, made), dim=-1)))
        return found

    def _made(self, condition: Condition, noise: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(condition, tokens)
        return self.x0(noise, noise.new_full(noise.shape[:-1], self.time), features), features

    def predict(self, condition: Condition, x: Tensor, t: int | Tensor) -> tuple[None, Tensor]:
        """As `Student.predict`, from pure noise only: no logits, continuous embeddings."""
        if isinstance(t, Tensor) or t != 0:
            raise ValueError(f"t: got {t}, expected 0: DD2's generator starts from noise alone")
        return None, self.generate(condition, self.check_point(condition, x))[0]

    def complete(self, condition: Condition, x: Tensor, noise: Tensor, point: int, split: int | None) -> Tensor:
        """All tokens from noise: their nearest codes before the split, continuous from there on."""
        if point == len(self.groups):
            return x
        if point:
            raise ValueError(f"steps: got a pass from point {point}; DD2's generator starts from noise alone, (0,)")
        made = self.generate(condition, noise)[0]
        border = made.shape[1] if split is None else self.teacher.group_starts()[split]
        codes = self.nearest(made[:, :border].contiguous())
        return codes if border == made.shape[1] else torch.cat((codes, made[:, border:]), dim=1)

    def settings(self, steps: int) -> dict[str, Any]:
        """k steps: one of the generator's, then the teacher makes the last k-1 groups again."""
        count = len(self.groups)
        if not 1 <= steps <= count + 1:
            raise ValueError(f"steps: got {steps}, expected 1 to {count + 1}: one, and the teacher's groups")
        return {"teacher_range": (count - steps + 1, count)} if steps > 1 else {}

    @torch.no_grad()
    def sample_ar(self, condition: Condition, noise: Tensor, *, steps: int = 10) -> Tensor:
        """Codes int64 [B, N] sampled group by group from the AR-diffusion model, to judge stage 1 by.

        Every token's velocity is integrated from its noise [B, N, D] by Euler steps, and quantised.
        """
        noise, starts = self.check_point(condition, noise), self.teacher.group_starts()
        with weights_dtype(noise):
            tokens = torch.zeros_like(noise)
            codes = torch.zeros(noise.shape[:2], dtype=torch.int64, device=noise.device)
            for first, last in pairwise(starts):
                features = self.features(condition, tokens)[:, first:last]
                x = noise[:, first:last]
                for step in range(steps, 0, -1):
                    x = x - self.velocity(x, x.new_full(x.shape[:-1], step / steps), features) / steps
                codes[:, first:last] = nearest_code(x.contiguous(), self.codebook)
                tokens[:, first:last] = self.codebook[codes[:, first:last]]
            return codes


class TransformerFlowNetwork(TransformerNetwork, FlowNetwork):
    """A flow network with the small transformer of `TransformerTeacher`, for any teacher.

    Args:
        teacher: as in `Student`.
        width, depth, heads: size of the transformer; None takes the teacher's, if it is a `TransformerTeacher`.
        head_width, head_depth, time, recycles: as in `FlowNetwork`.
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        width: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        head_width: int = 128,
        head_depth: int = 3,
        time: float = 1.0,
        recycles: int = 0,
    ) -> None:
        super().__init__(teacher, head_width=head_width, head_depth=head_depth, time=time, recycles=recycles)
        sizes = transformer_sizes(teacher, width, depth, heads)
        self._add_layers(teacher.code_dim, teacher.num_codes, *sizes)
        self.add_head(self.body.width)
        self.add_recycling(self.body.width)

    @property
    def sizes_config(self) -> dict[str, Any]:
        return {"width": self.body.width, "depth": self.body.depth, "heads": self.body.heads}

    def features(self, condition: Condition, tokens: Tensor) -> Tensor:
        self.teacher.check_training_condition(condition)
        return self.hidden(self.labels(condition), tokens)

    def _words(self, embeddings: Tensor) -> Tensor:
        return self.read(self.input, embeddings)

    def code_logits(self, features: Tensor) -> Tensor:
        return self.head(features)

    @torch.no_grad()
    def start_from_student(self, student: Student) -> None:
        """As `FlowNetwork.start_from_student`; its position i is the student's input token i - 1, which was noise."""
        super().start_from_student(student)
        if self.groups[0] == 1 and isinstance(getattr(student, "position_embedding", None), Tensor):
            source = student.state_dict()
            rows = source["position_embedding"][:-1] + source["data_embedding.weight"][0]
            rows[0] = source["position_embedding"][0] + source["data_embedding.weight"][1]
            self.position_embedding.copy_(rows)
