"""From a student's codes to the teacher's own for the same noise, by the teacher's passes over all tokens at once.

A pass follows every token's flow from its noise, by the teacher's distribution given the codes before it as they are
(docs/decoding.md). Its only fixed point is what `Teacher.generate(sampler="flow")` makes of that noise, and
every pass makes at least one more group final: as many passes as there are groups always suffice.

Dimensions: B batch, N tokens, D code dimension.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ddfast.models.attention import group_levels, window_positions
from ddfast.models.autoregressive import Condition, condition_size
from ddfast.models.decoding import check_decoded
from ddfast.models.inputs import as_codes, check_noise
from ddfast.models.protocol import Teacher
from ddfast.models.windows import Windows, windows
from ddfast.ops.flow_sample import DEFAULT_SOLVER, DEFAULT_STEPS
from ddfast.ops.sample_codes import only_codes

Refine: TypeAlias = int | Literal["exact"]
"""How many passes: 0 and more, or until nothing changes."""

_LEAVE = 0.75
"""Rows leave the batch when this share of it or less is left to do: gathering their caches costs a copy."""


def check_refine(refine: object) -> None:
    """Raise `TypeError`/`ValueError` unless `refine` is a number of passes or "exact"."""
    expected = "a number of passes, 0 or more, or 'exact'"
    if isinstance(refine, bool) or not isinstance(refine, (int, str)):
        raise TypeError(f"refine: got {refine!r}, expected {expected}")
    if (refine != "exact") if isinstance(refine, str) else (refine < 0):
        raise ValueError(f"refine: got {refine!r}, expected {expected}")


def refined(
    teacher: Teacher,
    condition: Condition,
    noise: Tensor,
    codes: Tensor,
    refine: Refine,
    *,
    cfg_scale: float | None = None,
    cfg_interval: int = -1,
    top_k: int | None = None,
    top_p: float | None = None,
    temperature: float | None = None,
    steps: int = DEFAULT_STEPS,
    solver: str = DEFAULT_SOLVER,
    window: int | None = None,
    cached: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes after a number of the teacher's passes, or when nothing changes any more.

    Args:
        teacher: whose flow it is.
        condition: int64 [B], or text.
        noise: float32 [B, N, D], what the codes were made from.
        codes: int64 [B, N], a guess: a student's, or the codes nearest to the noise.
        refine: passes, or "exact": until every row is final.
        cfg_scale, cfg_interval, top_k, top_p, temperature, steps, solver: as of `Teacher.generate`.
        window: tokens behind the final ones that a pass looks at; None: all that are left.
        cached: see `ddfast.models.windows.windows`.

    Returns:
        codes int64 [B, N], and int64 [B], the passes each row took until it was known to be final (or `refine` of
        them). The codes are those of `generate` up to the rounding of logits: a pass adds up products in another order
        than a step, as `generate` does between batch sizes.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    check_refine(refine)
    if window is not None and window < 1:
        raise ValueError(f"window: got {window}, expected at least 1")
    condition = teacher.accepted(condition)
    batch, count, device = condition_size(condition), teacher.num_tokens, teacher.codebook.device
    noise = check_noise(noise, (batch, count, teacher.code_dim)).to(device)
    codes = as_codes(codes, teacher.num_codes, (batch, count)).to(device)
    scales, filters = teacher.guidance_and_filters(
        cfg_scale=cfg_scale, cfg_interval=cfg_interval, top_k=top_k, top_p=top_p, temperature=temperature
    )
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        network = windows(teacher, condition, scales, filters, cached=cached)
        refinement = _Refinement(network, noise, codes, window or count, {"steps": steps, "solver": solver})
        turn = 0
        while len(refinement.rows) and (refine == "exact" or turn < refine):
            refinement.turn()
            turn += 1
    return refinement.codes.clone(), refinement.passes.clone()  # outside, so that they can enter a training graph


class _Refinement:
    """Sequences under way: `codes` of all of them, of which the first `final` of each of the `rows` left are final."""

    def __init__(self, network: Windows, noise: Tensor, codes: Tensor, window: int, flow: dict[str, Any]) -> None:
        self.network, self.noise, self.codes, self.size, self.flow = network, noise, codes.clone(), window, flow
        teacher, (batch, self.count) = network.teacher, codes.shape
        ends = torch.tensor(teacher.group_starts()[1:], dtype=torch.int64, device=codes.device)
        self.end = ends[group_levels(teacher.groups, codes.device)]  # of every token's group
        self.rows = torch.arange(batch, dtype=torch.int64, device=codes.device)
        self.final, self.passes = torch.zeros_like(self.rows), torch.zeros_like(self.rows)

    def turn(self) -> None:
        """One pass over the next tokens of all rows left."""
        size = min(self.size, self.count - int(self.final.min()))
        first = self.final.clamp_max(self.count - size)  # near the end, what is final already is read again
        place, before = window_positions(first, size), self.codes[self.rows]
        noise = self.noise[self.rows[:, None], place]
        made = only_codes(
            noise=noise, codebook=self.network.teacher.codebook, **self.network.window(before, first, size), **self.flow
        )
        check_decoded(made)
        old = before.gather(1, place)
        made = torch.where(place < self.final[:, None], old, made)
        self.codes[self.rows] = before.scatter(1, place, made)
        self.passes[self.rows] += self.final < self.count
        self.final = torch.minimum(self._right(made == old, place), first + size)
        self._leave()

    def _right(self, kept: Tensor, place: Tensor) -> Tensor:
        """How far rows are final, as far as their window reaches: to the end of the first group that has changed."""
        run = kept.long().cumprod(1).sum(1)
        return torch.where(run < kept.shape[1], self.end[place[:, 0] + run.clamp_max(kept.shape[1] - 1)], self.count)

    def _leave(self) -> None:
        """Rows that are done go, where enough of them do to pay for moving the others' caches."""
        left = (self.final < self.count).nonzero()[:, 0]
        if len(left) <= _LEAVE * len(self.rows):
            self.rows, self.final = self.rows[left], self.final[left]
            if len(left):
                self.network.keep(left)
