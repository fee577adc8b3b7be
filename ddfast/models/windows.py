"""A teacher's passes over many tokens at once, each given the codes before it: for what guesses codes and checks them.

Dimensions: B batch, R rows (B, or 2B with guidance), S window, N tokens, V codes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ddfast.models.attention import window_positions
from ddfast.models.autoregressive import Condition, condition_size, take
from ddfast.models.decoding import read_guided
from ddfast.models.protocol import Teacher


class Windows(ABC):
    """Passes over windows of sequences, guided and filtered.

    Args:
        teacher: whose distributions they are.
        condition: int64 [B], or text, on the teacher's device.
        scales, filters: as `Teacher.guidance_and_filters` returns them, of all groups.
    """

    def __init__(
        self, teacher: Teacher, condition: Condition, scales: Sequence[float], filters: Mapping[str, Any]
    ) -> None:
        self.teacher, self.condition, self.filters = teacher, condition, filters
        self.scales = [scale for scale, size in zip(scales, teacher.groups, strict=True) for _ in range(size)]
        self.guided = any(scale != 1.0 for scale in scales)

    @abstractmethod
    def window(self, codes: Tensor, first: Tensor, size: int) -> dict[str, Any]:
        """Arguments of `filter_logits`: logits [B, S, V] and what goes with them.

        Args:
            codes: int64 [B, N]; what is read of them are the codes before each token of the window.
            first: int64 [B], number of a row's first token; in the first call 0, later at least 1.
            size: S.
        """

    @abstractmethod
    def keep(self, rows: Tensor) -> None:
        """Go on with some of the samples, int64 [m]."""

    def _scale(self, position: Tensor) -> float | Tensor:
        """Of guidance, of tokens int64 [B, S]."""
        if len(set(self.scales)) == 1:
            return self.scales[0]
        return torch.tensor(self.scales, dtype=torch.float32, device=position.device)[position]


def windows(
    teacher: Teacher,
    condition: Condition,
    scales: Sequence[float],
    filters: Mapping[str, Any],
    *,
    cached: bool | None = None,
) -> Windows:
    """Passes with a KV cache of what is decided, or teacher-forced over the whole sequence, for any teacher.

    Args:
        teacher, condition, scales, filters: as of `Windows`.
        cached: None: where the teacher can (`has_windows`).
    """
    cached = teacher.has_windows if cached is None else cached
    return (_Cached if cached else _TeacherForced)(teacher, condition, scales, filters)


class _Cached(Windows):
    """A KV cache of what is decided; a window overwrites what the last one left behind that."""

    state: Any = None

    def window(self, codes: Tensor, first: Tensor, size: int) -> dict[str, Any]:
        teacher, hidden = self.teacher, []
        before, left = first - 1, size
        if self.state is None:  # the first token follows the condition
            self.state = teacher.begin(self.condition, guided=self.guided)
            hidden, before, left = [teacher.advance(self.state, codes[:, :0])], first, size - 1
        if left:
            hidden.append(
                teacher.advance_window(self.state, codes.gather(1, window_positions(before, left)), before + 1)
            )
        position = window_positions(first, size)
        logits, guidance = read_guided(teacher, torch.cat(hidden, dim=1), len(codes), self._scale(position))
        return {"logits": logits, **self.filters, **guidance}

    def keep(self, rows: Tensor) -> None:
        batch = condition_size(self.condition)
        self.teacher.keep_rows(self.state, torch.cat((rows, rows + batch)) if self.guided else rows)
        self.condition = take(self.condition, rows)


class _TeacherForced(Windows):
    """The whole sequence in every pass."""

    def window(self, codes: Tensor, first: Tensor, size: int) -> dict[str, Any]:
        position, guidance = window_positions(first, size), dict[str, Any]()
        rows = torch.arange(len(codes), dtype=torch.int64, device=codes.device)[:, None]
        logits = self.teacher.logits(self.condition, codes)[rows, position]
        if self.guided:
            uncond = self.teacher.logits(self.condition, codes, unconditional=True)[rows, position]
            guidance = {"uncond": uncond, "cfg_scale": self._scale(position)}
        return {"logits": logits, **self.filters, **guidance}

    def keep(self, rows: Tensor) -> None:
        self.condition = take(self.condition, rows)
