"""What decoding needs of a model: codes that are decided group by group, each given those before it.

Dimensions: B batch, R rows (B, or 2B with guidance), N tokens, G tokens of one group, V codes, D code dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ddfast.models.attention import group_starts
from ddfast.models.inputs import check_codes
from ddfast.ops.dispatch import Asked

Condition: TypeAlias = Tensor | tuple[Tensor, Tensor]
"""Class labels int64 [B], or text as (features [B, L, dim], mask [B, L])."""


def condition_size(condition: Condition) -> int:
    """B, the number of samples that a condition stands for."""
    return len(condition if isinstance(condition, Tensor) else condition[0])


def on_device(condition: Condition, device: torch.device) -> Condition:
    """A condition moved to a device."""
    if isinstance(condition, Tensor):
        return condition.to(device)
    features, mask = condition
    return features.to(device), mask.to(device)


def take(condition: Condition, rows: Tensor) -> Condition:
    """The condition of some samples, int64 [m], of those that `condition` stands for."""
    if isinstance(condition, Tensor):
        return condition[rows]
    features, mask = condition
    return features[rows], mask[rows]


@dataclass(kw_only=True, frozen=True)
class SamplingDefaults:
    """The sampling settings that a teacher is meant to be used with, and that its students learn to reproduce."""

    cfg_scale: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


class AutoRegressive(nn.Module, ABC):
    """A model that decodes groups of tokens, one after the other, over the codes of a codebook.

    Attributes:
        codebook: float32 [V, D], the embeddings that the flow and the students work with.
        groups: sizes of the positions decoded together (LlamaGen: 1 each; VAR: pn^2 per scale); they sum to n.
        graphable: `begin` and `advance` may be captured as CUDA graphs: they neither wait for the device nor look at
            the codes on the host nor keep them, and where all groups have one token, every step after the first reads
            its position from the device and updates its state in place.
    """

    codebook: Tensor
    groups: tuple[int, ...]
    graphable: bool = False

    @property
    def num_tokens(self) -> int:
        """n, the number of tokens of one image."""
        return sum(self.groups)

    @property
    def one_by_one(self) -> bool:
        """Whether every group has one token: all steps after the first are then alike."""
        return len(self.groups) == self.num_tokens

    @property
    def num_codes(self) -> int:
        """V, the size of the codebook."""
        return self.codebook.shape[0]

    @property
    def code_dim(self) -> int:
        """D, the dimension of a code's embedding."""
        return self.codebook.shape[1]

    def group_starts(self) -> list[int]:
        """First token of every group, and n at the end: group k is `starts[k]:starts[k + 1]`."""
        return group_starts(self.groups)

    @abstractmethod
    def begin(self, condition: Condition, *, guided: bool) -> Any:
        """Decoding state for `condition`; with `guided`, rows B..2B stand for the same samples without condition."""

    @abstractmethod
    def advance(self, state: Any, codes: Tensor) -> Tensor:
        """Take in the codes decided since the last call and return the next group's logits, or what they are read off.

        Args:
            state: what `begin` returned; updated in place.
            codes: int64 [B, m], whole groups; m = 0 in the first call unless there is a prefix.

        Returns:
            [R, G, V] of any floating type, unguided; hidden states [R, G, W] where `read_out` is overridden.
        """

    def advance_window(self, state: Any, codes: Tensor, token: Tensor) -> Tensor:
        """What `advance` returns, of S tokens of every row at once, at a place of its own: were the codes before right.

        For decoders that guess ahead. A model whose groups have one token each may override it; without, such decoders
        run teacher-forced passes (`Teacher.logits`).

        Args:
            state: what `begin` returned, after one `advance` without codes; what it holds of tokens behind a row's
                window is given up.
            codes: int64 [B, S], each the code right before one of the tokens: of the tokens `token - 1` and following.
            token: int64 [B], number of the first of a row's tokens, 1 .. N - S; what is before `token - 1` was given.

        Returns:
            [R, S, V] or [R, S, W], as `advance`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no windows")

    def keep_rows(self, state: Any, rows: Tensor) -> None:
        """Go on with some of the rows of a state, int64 [m], in place; a model that has windows has this too."""
        raise NotImplementedError(f"{type(self).__name__} has no windows")

    @property
    def has_windows(self) -> bool:
        """Whether `advance_window` is overridden, and groups have one token each."""
        return self.one_by_one and type(self).advance_window is not AutoRegressive.advance_window

    def step_ops(self, rows: int, size: int) -> dict[str, Asked]:
        """The ops with kernels that `advance` runs for R rows of G new tokens, and the sizes that each is asked of.

        A captured step holds on to what chose their kernels; one by one, `decode_attention` must have one.
        """
        return {"decode_attention": Asked(rows)}

    def read_out(self, hidden: Tensor) -> Tensor:
        """Logits [R, G, V] of any floating type of what `advance` returned: here they are that already.

        A model whose last layer is linear overrides it by that layer: guidance is then applied to the hidden states,
        where it comes to the same up to rounding, and the layer runs for half of the rows.
        """
        return hidden

    @property
    def has_linear_head(self) -> bool:
        """Whether `read_out` is overridden."""
        return type(self).read_out is not AutoRegressive.read_out

    def embed(self, codes: Tensor) -> Tensor:
        """Embeddings [..., D] of integer codes [...]; embeddings pass through unchanged."""
        return codes if codes.is_floating_point() else self.codebook[check_codes(codes, self.num_codes, waits=False)]
