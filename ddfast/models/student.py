"""Students: what DD1's and DD2's share, and DD1's: noise in, all tokens out, in one causal pass over [condition, X_t].

A trajectory point t counts groups: the first t groups of X_t are data, the others noise;
docs/method.md section 6 (DD1: trajectories).
Dimensions: B batch, N tokens, V codes, D code dimension, W width.
"""

from __future__ import annotations

import copy
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddfast.models.attention import group_levels, level_mask
from ddfast.models.autoregressive import Condition, condition_size, on_device
from ddfast.models.inputs import check_noise, check_options, known
from ddfast.models.layers import Embedding, Linear, weights_dtype
from ddfast.models.protocol import Teacher
from ddfast.models.refinement import Refine, check_refine, refined
from ddfast.models.transformer import Transformer, TransformerTeacher, transformer_sizes
from ddfast.ops import nearest_code

if TYPE_CHECKING:
    from typing_extensions import Self


def second_step(groups: int) -> int:
    """The trajectory point from which a second step starts where nobody has said: behind the first quarter of groups.

    What was tried: docs/notes/points.md.
    """
    return groups // 4 + 1


class Student(nn.Module, ABC):
    """Network that turns noise into all tokens in one pass: DD1's and DD2's.

    A subclass builds its layers, calls `add_recycling` after them, and implements `complete`, `predict`, `settings`,
    `sizes_config` and `start_from`.

    Args:
        teacher: gives the codebook, the groups and the classes; teacher-involved sampling calls it. It is referred to,
            not contained: it is no part of the student's parameters, state or device moves.
        recycles: how often the network is run again within a pass. Every run after the first reads, beside its input,
            the codes that the run before made: an error of one token, which misleads all after it, is seen and can be
            mended (recycling as in AlphaFold 2, Jumper et al. 2021).

    Attributes:
        method: that trains it, as files and commands call it.
        paper: of the method.
        two_steps: what a table calls its two steps.
        starts_anywhere: a pass may start from any point of a trajectory, not from noise alone.
        split: group from which samples are the network's continuous values, not codes, where `sample` is not told;
            None: nowhere.
    """

    method: ClassVar[str]
    paper: ClassVar[str]
    two_steps: ClassVar[str]
    starts_anywhere: ClassVar[bool]
    codebook: Tensor
    level: Tensor
    split: int | None = None

    def __init__(self, teacher: Teacher, *, recycles: int = 0) -> None:
        super().__init__()
        if isinstance(recycles, bool) or not isinstance(recycles, int) or recycles < 0:
            raise ValueError(f"recycles: got {recycles!r}, expected 0 or more runs after the first")
        self.recycles = recycles
        self._teacher = (teacher,)  # in a tuple, so that nn.Module does not adopt it
        self.groups, self.num_classes = teacher.groups, teacher.num_classes
        self.derive_buffers()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A student of the same teacher, which a copy refers to as well."""
        memo[id(self._teacher)] = self._teacher
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__dict__ = copy.deepcopy(self.__dict__, memo)
        return made

    def derive_buffers(self) -> None:
        """Fill what follows from the teacher and is in no file."""
        teacher = self.teacher
        self.register_buffer("codebook", teacher.codebook.detach().clone(), persistent=False)
        # The group of every token.
        self.register_buffer("level", group_levels(self.groups, teacher.codebook.device), persistent=False)

    # What a student implements -----------------------------------------------------------------------------------

    @abstractmethod
    def predict(self, condition: Condition, x: Tensor, t: int | Tensor) -> tuple[Tensor | None, Tensor]:
        """Predict the data from one trajectory point: a pass of training, which follows autocast (`sample` does not).

        Args:
            condition: int64 [B], or text.
            x: float32 [B, N, D], the point X_t: t groups of code embeddings, then noise.
            t: the point, an int or int64 [B].

        Returns:
            logits over codes [B, N, V], where the student has them, and embeddings [B, N, D].
        """

    @abstractmethod
    def complete(self, condition: Condition, x: Tensor, noise: Tensor, point: int, split: int | None) -> Tensor:
        """One pass: the first `point` groups of x [B, N, D] are kept, the others made from noise [B, N, D]."""

    @abstractmethod
    def settings(self, steps: int) -> dict[str, Any]:
        """Arguments of `sample` for a number of steps."""

    @property
    @abstractmethod
    def sizes_config(self) -> dict[str, Any]:
        """The network's part of `config`."""

    @abstractmethod
    def start_from(self, teacher: Teacher) -> None:
        """Take over the teacher's weights; what has no counterpart there is drawn anew."""

    # What every student inherits ---------------------------------------------------------------------------------

    @classmethod
    def from_teacher(cls, teacher: Teacher, **config: Any) -> Self:
        """A student of the teacher's size that starts from its weights; `config` as the class takes it."""
        student = cls(teacher, **config).to(teacher.codebook.device)
        student.start_from(teacher)
        return student

    @property
    def config(self) -> dict[str, Any]:
        """What rebuilds this module, beside the teacher: `type(self)(teacher, **config)`."""
        return {**({"recycles": self.recycles} if self.recycles else {}), **self.sizes_config}

    def add_recycling(self, width: int) -> None:
        """Make the layer by which a run reads what the one before made, of the width of the network's input.

        It starts at 0, so that all runs do at first what the first one does; without recycling there is none.
        """
        if self.recycles:
            self.recycled = Linear(self.teacher.code_dim, width)
            nn.init.zeros_(self.recycled.weight)
            nn.init.zeros_(self.recycled.bias)

    def read(self, embed: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The input's tokens [B, m, W] for x [B, m, D], or [B, m, 2 D]: x, and beside it what the run before made."""
        if x.shape[-1] == self.teacher.code_dim:
            return embed(x)
        x, made = x.chunk(2, dim=-1)
        return embed(x) + self.recycled(made)

    def header(self) -> dict[str, Any]:
        """What its file says of it beside `config`."""
        return {"split": self.split}

    def read_header(self, header: Mapping[str, Any]) -> None:
        """Take over what `header` wrote."""
        self.split = header.get("split")

    @property
    def teacher(self) -> Teacher:
        """The teacher that this student learnt from."""
        return self._teacher[0]

    def check_point(self, condition: Condition, x: Tensor) -> Tensor:
        """x [B, N, D] in float32; raise unless it has this shape, finite values, and a condition that fits."""
        teacher = self.teacher
        teacher.check_training_condition(condition)
        return check_noise(x, (condition_size(condition), teacher.num_tokens, teacher.code_dim), "x").float()

    def sample(
        self,
        condition: Condition,
        noise: Tensor,
        *,
        steps: tuple[int, ...] = (0,),
        split: int | None = None,
        teacher_range: tuple[int, int] | None = None,
        refine: Refine = 0,
        cfg_scale: float | None = None,
        **generation: Any,
    ) -> Tensor:
        """Generate code embeddings in `len(steps)` passes.

        Each pass predicts everything from its point; the next one keeps the first groups of the result up to its own
        point and puts the *same* noise back for the rest. The result of a pass is the embedding of the most likely
        code before the split and the continuous head's value from there on.

        Args:
            condition: int64 [B], or text.
            noise: float32 [B, N, D].
            steps: trajectory points, rising from 0: `(0,)` one step, `(0, t1)` two.
            split: group from which the continuous head is used; None: the student's own `split`.
            teacher_range: (first, last): after the first pass the teacher regenerates groups first..last-1 from the
                quantised prefix and the same noise, then the student finishes from point `last`.
            refine: passes of the teacher over the result, each with the flow from the same noise
                (`ddfast.models.refinement.refined`), which leave codes alone; "exact": until they are those of
                `Teacher.generate(sampler="flow")`.
            cfg_scale: guidance of the teacher's part; None takes its default.
            generation: other settings of the teacher's part, as in `Teacher.generate`; `sampler="multinomial"` draws
                its tokens as the official scripts do, instead of following the flow from the same noise.

        Returns:
            float32 [B, N, D].

        Raises:
            TypeError, ValueError: an argument is not as above, or has no effect; or the result holds NaN or infinite
                values, where a training diverged, or half precision does not reach.
        """
        count, teacher = len(self.groups), self.teacher
        points = tuple(steps) if isinstance(steps, (tuple, list)) else ()
        rising = points[:1] == (0,) and list(points) == sorted(set(points)) and points[-1] <= count
        if not rising or not all(isinstance(point, int) for point in points):
            expected = f"rising trajectory points from 0 to at most {count}, such as (0,) or (0, 1)"
            raise ValueError(f"steps: got {steps}, expected {expected}")
        split = self.split if split is None else split
        if split is not None and not 0 <= split <= count:
            raise ValueError(f"split: got {split}, expected a group in 0..{count}")
        if teacher_range is not None and not 0 <= teacher_range[0] < teacher_range[1] <= count:
            raise ValueError(f"teacher_range: got {teacher_range}, expected first < last in 0..{count}")
        given = {**generation, **({} if cfg_scale is None else {"cfg_scale": cfg_scale})}
        check_options(teacher.begin, generation, inspect.signature(Teacher.generate).parameters)
        check_refine(refine)
        if given and teacher_range is None and not refine:
            what = "has no effect without teacher_range or refine: the teacher takes no part"
            raise ValueError(f"{next(iter(given))}: {what}")
        if refine:
            _check_refined(given)
        teacher.check_condition(condition)
        condition = on_device(condition, self.codebook.device)
        noise = check_noise(noise, (condition_size(condition), teacher.num_tokens, teacher.code_dim))
        noise = noise.to(self.codebook.device, torch.float32)
        # As in decoding, autocast is for training.
        with torch.inference_mode(), weights_dtype(noise):
            points, x = points[1:], noise
            if teacher_range is None or teacher_range[0] > 0:  # else the teacher starts from nothing
                x = self.complete(condition, noise, noise, 0, split)
            if teacher_range is not None:
                x = self.involve_teacher(condition, noise, x, teacher_range, **given)
                last = teacher_range[1]
                points = (last, *(point for point in points if point > last))
            for point in points:
                x = self.complete(condition, x, noise, point, split)
            if refine:
                given.pop("sampler", None)
                x = self.codebook[
                    refined(teacher, condition, noise, nearest_code(x, self.codebook), refine, **given)[0]
                ]
        if not bool(x.isfinite().all()):
            raise ValueError("the student's samples hold NaN or infinite values; check its weights and precision")
        return x.clone()  # outside inference mode, so that samples can enter a training graph

    def likeliest(self, logits: Tensor) -> Tensor:
        """Embeddings [..., D] of the most likely codes by logits [..., V]; NaN where these are: an index hides it."""
        best, codes = logits.max(-1)
        return self.codebook[codes].masked_fill(~best.isfinite()[..., None], math.nan)

    def nearest(self, x: Tensor) -> Tensor:
        """Embeddings [..., D] of the codes nearest to x [..., D]; NaN where x is."""
        made = self.codebook[nearest_code(x, self.codebook)]
        return made.masked_fill(~x.isfinite().all(-1, keepdim=True), math.nan)

    def involve_teacher(
        self, condition: Condition, noise: Tensor, x: Tensor, teacher_range: tuple[int, int], **generation: Any
    ) -> Tensor:
        """Embeddings of groups 0..last-1: x quantised before `first`, the teacher's from there on.

        Args: as in `sample`; x is the first pass's result [B, N, D].
        """
        starts = self.teacher.group_starts()
        first, last = teacher_range
        prefix = nearest_code(x[:, : starts[first]].contiguous(), self.codebook)
        if generation.get("sampler", "flow") == "flow":
            generation |= {"sampler": "flow", "noise": noise}
        codes = self.teacher.generate(condition, prefix=prefix, stop=starts[last], **generation)
        return self.codebook[codes]


def _check_refined(given: Mapping[str, Any]) -> None:
    """Raise `ValueError` where the teacher's settings are not those of a flow that can be followed in passes."""
    if given.get("sampler", "flow") != "flow":
        raise ValueError(f"refine: got one with sampler {given['sampler']!r}; it follows the flow from the noise")
    foreign = set(given) - {"sampler"} - set(inspect.signature(refined).parameters)
    if foreign:
        raise ValueError(f"{min(foreign)}: has no effect with refine")


class DD1Student(Student):
    """DD1's student: [condition, X_t] in one causal pass, from any point of a trajectory.

    A subclass builds its layers and implements `features`, `code_logits`, `continuous`, `sizes_config` and
    `start_from`.

    Args:
        teacher, recycles: as in `Student`.

    Attributes:
        point: t1, where the second step starts; None: nobody has said.
        later_points: where a third step and others start, rising.
        lookahead: a layer of the training, there for as long (`ddfast.distill.dd1`).
    """

    method, paper, two_steps = "dd1", "[DD1, arXiv 2412.17153](https://arxiv.org/abs/2412.17153)", "2"
    starts_anywhere = True
    point: int | None = None
    later_points: tuple[int, ...] = ()
    lookahead: nn.Module
    mask: Tensor | None

    def derive_buffers(self) -> None:
        """Fill what follows from the teacher and is in no file."""
        super().derive_buffers()
        # Who sees whom in the sequence of one condition token and X_t; None: plain causal.
        self.register_buffer("mask", level_mask((1, *self.groups), self.codebook.device), persistent=False)

    @property
    @abstractmethod
    def width(self) -> int:
        """W."""

    @abstractmethod
    def features(self, condition: Condition, x: Tensor, t: int | Tensor) -> tuple[Tensor, Any]:
        """One run: hidden states [B, N, W] at the tokens of the point X_t, and what the heads need of the condition.

        x is the point [B, N, D], or [B, N, 2 D] in a later run; `read` makes the input's tokens of either.
        """

    @abstractmethod
    def code_logits(self, hidden: Tensor, context: Any) -> Tensor:
        """The head over codes: [B, m, W] to [B, m, V]."""

    @abstractmethod
    def continuous(self, hidden: Tensor, context: Any) -> Tensor:
        """The continuous head: [B, m, W] to [B, m, D]."""

    def header(self) -> dict[str, Any]:
        more = {"later_points": list(self.later_points)} if self.later_points else {}
        return {**super().header(), "point": self.point, **more}

    def read_header(self, header: Mapping[str, Any]) -> None:
        super().read_header(header)
        self.point, self.later_points = header.get("point"), tuple(header.get("later_points", ()))
        if self.point is None:  # files of before have it there alone
            dd1 = header.get("config", {}).get("dd1")
            point = dd1.get("point") if isinstance(dd1, dict) else None
            self.point = point if isinstance(point, int) else None

    def settings(self, steps: int) -> dict[str, Any]:
        most = 2 + len(self.later_points)
        if not 1 <= steps <= most:
            expected = "1 or 2 of a DD1 student" if most == 2 else f"1 to {most} of this DD1 student"
            raise ValueError(f"steps: got {steps}, expected {expected}")
        if steps == 1:
            return {"steps": (0,)}
        if self.point is None:
            raise ValueError("steps: got 2, but nothing says where the second step starts; set the student's `point`")
        return {"steps": (0, self.point, *self.later_points)[:steps]}

    def predict(self, condition: Condition, x: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        """As `Student.predict`; position i sees the condition, the groups before i's and itself."""
        hidden, context = self.last_run(condition, self.check_point(condition, x), t)
        return self.code_logits(hidden, context), self.continuous(hidden, context)

    def runs(self, condition: Condition, x: Tensor, t: int | Tensor) -> Iterator[tuple[Tensor, Any, Tensor | None]]:
        """`features` of every run of a pass, and logits [B, N, V] where the next one reads their codes (else None)."""
        hidden, context = self.features(condition, x, t)
        for _ in range(self.recycles):
            logits = self.code_logits(hidden, context)
            yield hidden, context, logits
            made = torch.where(self.data_mask(t, len(x))[..., None], x, self.likeliest(logits))
            hidden, context = self.features(condition, torch.cat((x, made), dim=-1), t)
        yield hidden, context, None

    def last_run(self, condition: Condition, x: Tensor, t: int | Tensor) -> tuple[Tensor, Any]:
        """`features` of a pass: what its last run has."""
        for hidden, context, _ in self.runs(condition, x, t):
            found = hidden, context
        return found

    def data_levels(self, t: int | Tensor, batch: int, condition_tokens: int) -> Tensor:
        """int64 [B, C + N]: 1 where the sequence of C condition tokens and X_t holds data, 0 where noise."""
        return F.pad(self.data_mask(t, batch).long(), (condition_tokens, 0), value=1)  # the condition counts as data

    def data_mask(self, t: int | Tensor, batch: int) -> Tensor:
        """Boolean [B, N]: True where X_t holds data."""
        expected = f"trajectory points in 0..{len(self.groups)}, an int or int64 [B]"
        integers = isinstance(t, Tensor) and t.dtype == torch.int64 and tuple(t.shape) == (batch,)
        if not integers and (not isinstance(t, int) or isinstance(t, bool)):
            got = f"{t.dtype} {list(t.shape)}" if isinstance(t, Tensor) else repr(t)
            raise TypeError(f"t: got {got}, expected {expected}")
        if isinstance(t, int) or known(t, waits=False):
            low, high = (t, t) if isinstance(t, int) else (int(bound) for bound in torch.aminmax(t))
            if not 0 <= low <= high <= len(self.groups):
                raise ValueError(f"t: got points {low} to {high}, expected {expected}")
        points = t if isinstance(t, int) else t[:, None]
        return (self.level < points).expand(batch, -1)

    def complete(self, condition: Condition, x: Tensor, noise: Tensor, point: int, split: int | None) -> Tensor:
        """The most likely codes before the split, the continuous head's values from there on."""
        starts = self.teacher.group_starts()
        first, count = starts[point], self.teacher.num_tokens
        if first == count:
            return x
        border = count if split is None else max(starts[split], first)
        given = torch.cat((x[:, :first], noise[:, first:]), dim=1) if first else noise
        hidden, context = self.last_run(condition, given, point)
        parts = [x[:, :first]] if first else []
        if border > first:
            parts.append(self.likeliest(self.code_logits(hidden[:, first:border], context)))
        if border < count:
            parts.append(self.continuous(hidden[:, border:], context))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class TransformerStudent(DD1Student):
    """A DD1 student with the small transformer of `TransformerTeacher`, for any teacher.

    Args:
        teacher, recycles: as in `Student`.
        width, depth, heads: size of the transformer; None takes the teacher's, if it is a `TransformerTeacher`.
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        width: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        recycles: int = 0,
    ) -> None:
        super().__init__(teacher, recycles=recycles)
        width, depth, heads = transformer_sizes(teacher, width, depth, heads)
        self.class_embedding = Embedding(self.num_classes + 1, width)
        self.position_embedding = nn.Parameter(torch.empty(teacher.num_tokens + 1, width, dtype=torch.float32))
        self.input = Linear(teacher.code_dim, width)
        self.data_embedding = Embedding(2, width)  # row 1: data, row 0: noise
        self.body = Transformer(width, depth, heads)
        self.head = Linear(width, teacher.num_codes)
        self.continuous_modulation = nn.Parameter(torch.empty(2, width, dtype=torch.float32))  # rows: shift, scale
        self.continuous_head = Linear(width, teacher.code_dim)
        for parameter in (
            self.class_embedding.weight,
            self.position_embedding,
            self.data_embedding.weight,
            self.head.weight,
            self.continuous_modulation,
        ):
            nn.init.normal_(parameter, std=0.02)
        self.add_recycling(width)

    @torch.no_grad()
    def start_from(self, teacher: Teacher) -> None:
        """Take over the teacher's weights.

        Position row 0 (the condition) is the teacher's row 0, rows 2.. are the teacher's rows 1.. (the positions that
        predict the same tokens); row 1, the data/noise embedding and the continuous head have no counterpart. Of a
        teacher that is no `TransformerTeacher`, nothing has.
        """
        if not isinstance(teacher, TransformerTeacher):
            return
        source = teacher.state_dict()
        own = self.state_dict()
        shared = {name: source[name] for name in own if name in source and name != "position_embedding"}
        self.load_state_dict(shared, strict=False)
        first = teacher.groups[0]
        self.position_embedding[0] = source["position_embedding"][0]
        self.position_embedding[1 + first :] = source["position_embedding"][first:]

    @property
    def sizes_config(self) -> dict[str, Any]:
        return {"width": self.body.width, "depth": self.body.depth, "heads": self.body.heads}

    @property
    def width(self) -> int:
        """Of the hidden states."""
        return self.body.width

    @property
    def transformer_blocks(self) -> nn.ModuleList:
        """See `ddfast.models.blocks`."""
        return self.body.blocks

    def features(self, condition: Condition, x: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        if not isinstance(condition, Tensor):
            raise TypeError(f"condition: got {type(condition).__name__}, expected int64 labels [B]")
        label = self.class_embedding(condition)
        tokens = torch.cat((label[:, None], self.read(self.input, x)), dim=1)
        tokens = tokens + self.position_embedding + self.data_embedding(self.data_levels(t, len(x), 1))
        return self.body(tokens, self.mask)[:, 1:], label

    def code_logits(self, hidden: Tensor, context: Tensor) -> Tensor:
        return self.head(hidden)

    def continuous(self, hidden: Tensor, context: Tensor) -> Tensor:
        return modulated_head(hidden, self.continuous_modulation + context[:, None], self.continuous_head)


def modulated_head(hidden: Tensor, modulation: Tensor, linear: nn.Linear, *, eps: float = 1e-5) -> Tensor:
    """DD1's continuous head: LayerNorm without affine, then shift and scale (modulation [B, 2, W]), then linear."""
    return linear(modulated(hidden, *modulation[:, None].unbind(2), eps=eps))


def modulated(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float) -> Tensor:
    """LayerNorm of x [..., W] without affine, then scale and shift that broadcast to it."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


class ContinuousHead(nn.Module):
    """The continuous head of the official students: shift and scale from a learned table and the class embedding."""

    def __init__(self, width: int, code_dim: int) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(2, width, dtype=torch.float32) / width**0.5)
        self.linear = Linear(width, code_dim)

    def forward(self, hidden: Tensor, label: Tensor) -> Tensor:
        """hidden [B, m, W], label [B, W] -> [B, m, D]."""
        return modulated_head(hidden, self.scale_shift_table + label[:, None], self.linear, eps=1e-6)
