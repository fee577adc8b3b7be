"""Speculative Jacobi decoding: training-free parallel decoding that keeps the teacher's distribution.

A pass of the network reads a window of drafts at once and gives the distribution of each of their tokens. Drafts are
kept from the left on by the rule of speculative sampling, with the distribution that they were drawn from in the pass
before; the first that is not is drawn from what is left of the new distribution, and those behind it are drawn anew, as
drafts for the next pass. A token behind the last window, which nothing was drawn for yet, is drafted uniformly.

Source: Teng et al., arXiv 2410.01699 (ICLR 2025). There a uniform draft counts as drawn with probability 1; here, with
1 / V: both keep the distribution, and this keeps more drafts. There a batch keeps what all of its rows keep; here every
row goes on at its own pace.

Dimensions: B batch, R rows (B, or 2B with guidance), S window, N tokens, V codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ddfast.models.attention import window_positions
from ddfast.models.autoregressive import Condition
from ddfast.models.decoding import check_decoded
from ddfast.models.protocol import Teacher
from ddfast.models.windows import windows
from ddfast.ops import draw_codes, filter_logits

WINDOW = 16
"""Tokens of a window: the published setting, of hundreds of tokens."""


def usual_window(count: int) -> int:
    """S for sequences of `count` tokens: the published one, but no more than about a third of them.

    What lies behind the first draft that is not kept was read in vain, and in a batch a pass costs by its tokens.
    Digits' 16 tokens (docs/decoding.md): 9.7 passes in windows of 6, 9.6 in windows of 15, in 0.4 of the time.
    """
    return min(WINDOW, -(-count // 3))


def speculative_jacobi(
    teacher: Teacher,
    condition: Condition,
    uniform: Callable[[int, int], Tensor],
    *,
    window: int | None = None,
    cached: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw images from the same distribution as `Teacher.generate` with the teacher's defaults, in fewer passes.

    Args:
        teacher: one whose groups have one token each.
        condition: int64 [B], or text.
        uniform: the chance of every pass: of its number 0, 1, ... and a count m, numbers [B, m] in [0, 1). A sample
            whose numbers depend on itself alone does so too, whatever its batch.
        window: S, tokens that a pass reads; 1 is ordinary decoding; None: `usual_window`.
        cached: with a KV cache of what is decided, or in teacher-forced passes over the whole sequence; None: cached
            where the teacher can (`has_windows`).

    Returns:
        codes int64 [B, N], and int64 [B] after how many passes each sample was complete. The batch ends with its last.

    Memory: two windows of log-probabilities, float32 [B, S, V]; without a cache, logits of whole sequences besides.
    Raises:
        ValueError: the teacher has groups of more tokens; `window` is below 1; labels are out of range.
    """
    if not teacher.one_by_one:
        raise ValueError(f"teacher: got groups of {max(teacher.groups)} tokens, expected one token per group")
    count, device = teacher.num_tokens, teacher.codebook.device
    window = usual_window(count) if window is None else window
    if window < 1:
        raise ValueError(f"window: got {window}, expected at least 1")
    size = min(window, max(count - 1, 1))
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        network = windows(teacher, teacher.accepted(condition), *teacher.guidance_and_filters(), cached=cached)
        chance = uniform(0, count)
        drafts = (chance[:, 1:].double() * teacher.num_codes).long()
        nothing = torch.zeros(chance.shape, dtype=torch.int64, device=device)
        codes = torch.cat(
            (draw_codes(**network.window(nothing, nothing[:, 0], 1), uniform=chance[:, :1]), drafts), dim=1
        )
        check_decoded(codes)
        decided = torch.ones(len(codes), dtype=torch.int64, device=device)
        passes, turn = torch.ones_like(decided), 0
        before, first_before = None, decided - size  # the last window's log-probabilities, and its first token: none
        while bool((decided < count).any()):
            turn, passes = turn + 1, passes + (decided < count)
            first = decided.clamp_max(count - size)  # near the end, what is decided already is read again
            log_probs = filter_logits(**network.window(codes, first, size))
            drawn_from = _Drawn(log_probs if before is None else before, first - first_before)
            decided = verify(codes, decided, log_probs, first, drawn_from, uniform(turn, 2 * size))
            check_decoded(codes)
            before, first_before = log_probs, first
    return codes.clone(), passes.clone()  # outside inference mode, so that the codes can enter a training graph


@dataclass
class _Drawn:
    """What the drafts of a window were drawn from: the last window's log-probabilities [B, S, V], `shift` int64 [B]
    tokens further on, and behind these the uniform distribution."""

    log_probs: Tensor
    shift: Tensor

    def at(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """Of places int64 [B, m] in the window: theirs in the last one, and whether they were in it."""
        there = place + self.shift[:, None]
        size = self.log_probs.shape[1]
        return there.clamp_max(size - 1), there < size

    def probability(self, codes: Tensor) -> Tensor:
        """With which each of the window's codes int64 [B, S] was drawn."""
        rows, place = _rows(codes), torch.arange(codes.shape[1], dtype=torch.int64, device=codes.device)
        there, known = self.at(place.expand_as(codes))
        drawn = self.log_probs[rows, there, codes].exp()
        return torch.where(known, drawn, 1 / self.log_probs.shape[-1])

    def distribution(self, place: Tensor) -> Tensor:
        """Of one place int64 [B] of every row: [B, V]."""
        there, known = self.at(place[:, None])
        drawn = self.log_probs[_rows(there), there][:, 0].exp()
        return torch.where(known, drawn, 1 / drawn.shape[-1])


def verify(
    codes: Tensor, decided: Tensor, log_probs: Tensor, first: Tensor, drawn_from: _Drawn, uniform: Tensor
) -> Tensor:
    """Keep the drafts of a window as far as they can be, and draw the others.

    Args:
        codes: int64 [B, N], the first `decided` of them final, the others drafts; written in place.
        decided: int64 [B].
        log_probs: float32 [B, S, V], the teacher's of the window's tokens, given the codes before each; where a draft
            is rejected, what is left of it is written there.
        first: int64 [B], the window's first token.
        drawn_from: distributions of the drafts.
        uniform: [B, 2 S] in [0, 1).

    Returns:
        int64 [B], how many codes are final now: at least one more of every row that was not complete.
    """
    size = log_probs.shape[1]
    window, rows = window_positions(first, size), torch.arange(len(codes), dtype=torch.int64, device=codes.device)
    drafts = codes.gather(1, window)
    to_keep, to_draw = uniform.split(size, dim=1)
    kept = to_keep * drawn_from.probability(drafts) < log_probs.gather(-1, drafts[..., None])[..., 0].exp()
    kept[:, -1] = False  # no draft: the pass read the codes before it alone
    kept |= window < decided[:, None]
    run = kept.long().cumprod(1).sum(1)
    place = run.clamp_max(size - 1)
    own = log_probs[rows, place]
    rejected = (place < size - 1)[:, None]
    log_probs[rows, place] = torch.where(rejected, left_over(own, drawn_from.distribution(place)), own)
    drawn = draw_codes(log_probs, to_draw)
    codes.scatter_(1, window, torch.where(window < (first + run)[:, None], drafts, drawn))
    return (first + run + 1).clamp_max(codes.shape[1])


def left_over(log_probs: Tensor, drawn_from: Tensor) -> Tensor:
    """log max(0, p - q), not normalised, of log p and q [B, V]: the distribution of a token whose draft was rejected.

    log p where nothing is left: p and q are then the same up to rounding.
    """
    rest = (log_probs.exp() - drawn_from).clamp_min(0)
    return torch.where(rest.sum(-1, keepdim=True) > 0, rest.log(), log_probs)


def _rows(like: Tensor) -> Tensor:
    """Number of every row, int64 [B, 1]."""
    return torch.arange(len(like), dtype=torch.int64, device=like.device)[:, None]
