"""A small class-conditional transformer over code embeddings: the digits teacher, and the body of every student.

Dimensions: R rows, S sequence, N tokens, G tokens of one group, W width, H heads, V codes, D code dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddfast.models.attention import (
    CachedAttention,
    KVCache,
    MaskedAttention,
    Mix,
    SequenceMix,
    StepMix,
    WindowAttention,
    block_mask,
    group_levels,
    group_starts,
    window_positions,
)
from ddfast.models.autoregressive import Condition, SamplingDefaults
from ddfast.models.layers import Embedding, LayerNorm, Linear, norm_layer, plain_layer, twice_embedded
from ddfast.models.protocol import Teacher
from ddfast.ops.add_norm import add_norm_unchecked
from ddfast.ops.dispatch import Asked


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(width)
        self.qkv = Linear(width, 3 * width)
        self.project = Linear(width, width)
        self.mlp_norm = LayerNorm(width)
        self.expand = Linear(width, 4 * width)
        self.contract = Linear(4 * width, width)

    def forward(self, x: Tensor, branch: Tensor | None, mix: Mix, layer: int) -> tuple[Tensor, Tensor]:
        """x [R, S, W] and what the block before adds to it; this block's last branch comes back unadded, like that."""
        x, qkv = norm_layer(x, branch, self.qkv, **_norm(self.attention_norm))
        mixed = plain_layer(mix(layer, qkv), self.project)
        x, hidden = norm_layer(x, mixed, self.expand, activation="gelu", **_norm(self.mlp_norm))
        return x, plain_layer(hidden, self.contract)


def _norm(norm: nn.LayerNorm) -> dict[str, Any]:
    """As `add_norm` names what it has."""
    return {"weight": norm.weight, "bias": norm.bias, "eps": norm.eps}


class Transformer(nn.Module):
    """A stack of blocks and the final norm."""

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.width, self.depth, self.heads = width, depth, heads
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = LayerNorm(width)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:  # residual branches start small, so that depth does not change the scale
                scale = 0.02 / (2 * depth) ** 0.5 if name.endswith(("project.weight", "contract.weight")) else 0.02
                nn.init.normal_(parameter, std=scale)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x [R, S, W] to [R, S, W], whole sequences under a mask [S, S]; None is plain causal."""
        return self.run(x, SequenceMix(MaskedAttention(mask), self.head_dim))

    def run(self, x: Tensor, mix: Mix) -> Tensor:
        """x [R, S, W] to [R, S, W], positions seeing each other as `mix` lets them."""
        branch = None
        for layer, block in enumerate(self.blocks):
            x, branch = block(x, branch, mix, layer)
        return add_norm_unchecked(x, branch, **_norm(self.norm))[1]

    @property
    def head_dim(self) -> int:
        """Of every layer's attention."""
        return self.width // self.heads


class TransformerNetwork(nn.Module):
    """The layers and the forward pass that the teacher and DD2's networks have in common.

    The input of the first group is the class token; the input of group k is group k-1, resized to its own number of
    tokens. With groups of one token that is the usual shifted sequence.
    """

    groups: tuple[int, ...]
    num_classes: int

    def _add_layers(self, code_dim: int, num_codes: int, width: int, depth: int, heads: int) -> None:
        self.class_embedding = Embedding(self.num_classes + 1, width)
        self.position_embedding = nn.Parameter(
            torch.empty(sum(self.groups), width, dtype=torch.float32).normal_(std=0.02)
        )
        self.input = Linear(code_dim, width)
        self.body = Transformer(width, depth, heads)
        self.head = Linear(width, num_codes)
        nn.init.normal_(self.class_embedding.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)

    @property
    def transformer_blocks(self) -> nn.ModuleList:
        """See `ddfast.models.blocks`."""
        return self.body.blocks

    def labels(self, condition: Condition, *, unconditional: bool = False) -> Tensor:
        """Labels as the class embedding wants them: `num_classes` where there is no condition."""
        if not isinstance(condition, Tensor):
            raise TypeError(f"condition: got {type(condition).__name__}, expected int64 labels [B]")
        return torch.full_like(condition, self.num_classes) if unconditional else condition

    def group_inputs(self, labels: Tensor, embeddings: Tensor, first: int, last: int) -> Tensor:
        """Input tokens [R, S, W] of groups first..last; `embeddings` starts at group `first - 1` (0 at the start)."""
        starts = group_starts(self.groups)
        parts, offset = [], 0
        for group in range(first, last + 1):
            size = self.groups[group]
            if group == 0:
                parts.append(self.class_embedding(labels)[:, None].expand(-1, size, -1))
                continue
            previous = self.groups[group - 1]
            token = self._words(embeddings[:, offset : offset + previous])
            if previous != size:
                token = F.interpolate(token.transpose(1, 2), size=size, mode="linear").transpose(1, 2)
            parts.append(token)
            offset += previous
        tokens = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return tokens + self.position_embedding[starts[first] : starts[last + 1]]

    def _words(self, embeddings: Tensor) -> Tensor:
        """What embeddings [R, m, D] are in the transformer, [R, m, W]."""
        return self.input(embeddings)

    def hidden(self, labels: Tensor, embeddings: Tensor) -> Tensor:
        """Hidden states [R, N, W] of whole sequences, embeddings [R, N, D]; what the head over codes reads."""
        tokens = self.group_inputs(labels, embeddings, 0, len(self.groups) - 1)
        return self.body(tokens, block_mask(self.groups, tokens.device))


def transformer_sizes(
    teacher: Teacher, width: int | None, depth: int | None, heads: int | None
) -> tuple[int, int, int]:
    """Width, depth and heads, each from a `TransformerTeacher` where it is None; `ValueError` where none gives it."""
    if isinstance(teacher, TransformerTeacher):
        body = teacher.body
        width, depth, heads = width or body.width, depth or body.depth, heads or body.heads
    if width is None or depth is None or heads is None:
        raise ValueError(f"width, depth, heads: {type(teacher).__name__} does not give them, expected three sizes")
    return width, depth, heads


@dataclass
class DecodeState:
    """Progress of one `TransformerTeacher.generate`."""

    labels: Tensor
    cache: KVCache
    groups_fed: int = 0


class TransformerTeacher(TransformerNetwork, Teacher):
    """Class-conditional AR transformer that reads code embeddings.

    Args:
        codebook: float32 [V, D].
        groups: sizes of the positions decoded together.
        num_classes: number of labels.
        width, depth, heads: size of the transformer.
        defaults: sampling settings.
    """

    graphable = True

    def __init__(
        self,
        *,
        codebook: Tensor,
        groups: tuple[int, ...],
        num_classes: int,
        width: int,
        depth: int,
        heads: int,
        defaults: SamplingDefaults | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("codebook", codebook.detach().clone().float())
        self.groups, self.num_classes = tuple(groups), num_classes
        self.defaults = defaults or SamplingDefaults()
        self._add_layers(self.code_dim, self.num_codes, width, depth, heads)

    def begin(self, condition: Condition, *, guided: bool) -> DecodeState:
        labels = self.labels(condition)
        if guided:
            labels = torch.cat((labels, self.labels(condition, unconditional=True)))
        body = self.body
        cache = KVCache(body.depth, len(labels), body.heads, self.num_tokens, body.head_dim, self.position_embedding)
        return DecodeState(labels, cache)

    def advance(self, state: DecodeState, codes: Tensor) -> Tensor:
        first, last = state.groups_fed, self.group_starts().index(self._tokens_known(state) + codes.shape[1])
        state.groups_fed = last + 1
        guided, cache = len(state.labels) != len(codes), state.cache  # then both halves read the same codes
        embeddings = twice_embedded(self.codebook, codes) if guided else self.codebook[codes]
        if first and self.one_by_one:  # a step like any other: the cache knows where
            tokens = self.input(embeddings) + self.position_embedding.index_select(0, cache.position)
        else:
            tokens = self.group_inputs(state.labels, embeddings, first, last)
        mix: Mix
        if tokens.shape[1] == 1:
            mix = StepMix(cache)
        else:
            mask = None  # one group sees everything before it and itself
            if first != last:
                level = group_levels(self.groups[first : last + 1], tokens.device)
                mask = F.pad(level[:, None] >= level[None, :], (cache.length, 0), value=True)
            mix = SequenceMix(CachedAttention(cache, mask), self.body.head_dim)
        hidden = self.body.run(tokens, mix)
        cache.extend(tokens.shape[1])
        return hidden[:, -self.groups[last] :]

    def advance_window(self, state: DecodeState, codes: Tensor, token: Tensor) -> Tensor:
        guided, cache = len(state.labels) != len(codes), state.cache
        embeddings = twice_embedded(self.codebook, codes) if guided else self.codebook[codes]
        position = window_positions(token, codes.shape[1], twice=guided)
        tokens = self.input(embeddings) + self.position_embedding[position]
        return self.body.run(tokens, SequenceMix(WindowAttention(cache, position), self.body.head_dim))

    def keep_rows(self, state: DecodeState, rows: Tensor) -> None:
        state.labels = state.labels[rows]
        state.cache.keep_rows(rows)

    def step_ops(self, rows: int, size: int) -> dict[str, Asked]:
        body, tokens = self.body, rows * size
        attention = {"decode_attention": Asked(rows, body.head_dim, self.num_tokens)} if size == 1 else {}
        layers = dict.fromkeys(("add_norm", "norm_linear"), Asked(tokens, size=body.width))
        return attention | layers | {"activate": Asked(tokens, size=4 * body.width)}

    def read_out(self, hidden: Tensor) -> Tensor:
        return plain_layer(hidden, self.head)

    def _tokens_known(self, state: DecodeState) -> int:
        return self.group_starts()[max(state.groups_fed - 1, 0)]

    def logits(self, condition: Condition, codes: Tensor, *, unconditional: bool = False) -> Tensor:
        self.check_training_condition(condition)
        labels = self.labels(condition, unconditional=unconditional)
        return self.head(self.hidden(labels, self.tokens(codes, len(labels), waits=False)))
