"""VAR and its DD1 student, in the parameter layout of the official files.

VAR predicts the code maps of rising scales, a whole scale at a time; its groups are the scales.
Sources: Tian et al. 2024, arXiv 2404.02905; Liu et al. 2024, arXiv 2412.17153 (DD1).

Dimensions: B batch, R rows (B, or 2B with guidance), L sequence, N tokens, V codes, D code dimension, W width, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddfast.models.attention import (
    Attend,
    BlockCausalAttention,
    CachedAttention,
    KVCache,
    MaskedAttention,
    group_levels,
    group_starts,
)
from ddfast.models.autoregressive import Condition, SamplingDefaults, on_device
from ddfast.models.flow_network import FlowNetwork
from ddfast.models.inputs import check_labels
from ddfast.models.layers import Embedding, Linear, norm_layer, plain_layer
from ddfast.models.protocol import Teacher
from ddfast.models.student import ContinuousHead, DD1Student
from ddfast.models.tokenizers import TokenizedTeacher
from ddfast.models.var.tokenizer import VARTokenizer
from ddfast.ops.add_norm import add_norm_unchecked
from ddfast.ops.append_normed import append_normed
from ddfast.ops.dispatch import Asked

MAX_LOG_SCALE = math.log(100)
"""Attention with normalised queries and keys has a learned scale per head, at most 100."""


class VARAttention(nn.Module):
    """Multi-head attention with biases on query and value only, optionally on normalised queries and keys."""

    def __init__(self, width: int, heads: int, l2_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        if l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4.0), dtype=torch.float32))
        self.mat_qkv = Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width, dtype=torch.float32))
        self.v_bias = nn.Parameter(torch.zeros(width, dtype=torch.float32))
        self.proj = Linear(width, width)

    def constants(self) -> tuple[Tensor, Tensor | None]:
        """What weights alone decide: the bias [3 W] of query, key and value, and every head's scale [H] of queries."""
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        if not hasattr(self, "scale_mul_1H11"):
            return bias, None
        return bias, self.scale_mul_1H11.clamp_max(MAX_LOG_SCALE).exp().flatten()

    def forward(self, qkv: Tensor, head_scale: Tensor | None, attend: Attend, layer: int) -> Tensor:
        rows, length, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        qkv = qkv.view(rows, length, 3, self.heads, width // self.heads)
        if head_scale is not None and isinstance(attend, CachedAttention):
            cache = attend.cache
            query = append_normed(qkv, cache.keys[layer], cache.values[layer], cache.length, scale=head_scale)
            mixed = attend.over(layer, query, 1.0)
        else:
            query, key, value = qkv.permute(2, 0, 3, 1, 4)
            scale = 0.25 / math.sqrt(width // self.heads)
            if head_scale is not None:
                query = F.normalize(query, dim=-1) * head_scale[:, None, None]
                key, scale = F.normalize(key, dim=-1), 1.0
            mixed = attend(layer, query, key, value, scale)
        return plain_layer(mixed.transpose(1, 2).reshape(rows, length, width), self.proj)


@dataclass
class BlockConstants:
    """What a block reads at every step and weights and class decide: computed once per sequence.

    Attributes:
        modulation: gamma1, gamma2, 1 + scale1, 1 + scale2, shift1, shift2 as [R, 1, 6, W].
        bias: of query, key and value [3 W].
        head_scale: of normalised queries [H]; None: nothing is normalised.
    """

    modulation: Tensor
    bias: Tensor
    head_scale: Tensor | None


Source: TypeAlias = tuple[Tensor, Tensor | None]
"""What constants follow from: class embeddings [R, W], and the modulation [R, 1, 6, W] where all blocks share one."""

Gated: TypeAlias = tuple[Tensor, Tensor] | tuple[None, None]
"""What is to be added to the residual stream: a branch [R, L, W] and its gate [R, 1, W], or nothing."""


class FeedForward(nn.Module):
    """Two linear layers with GELU (tanh form) between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = Linear(width, hidden), Linear(hidden, width)

    def forward(self, x: Tensor, branch: Tensor | None, **norm: Any) -> tuple[Tensor, Tensor]:
        """Of the norm of x + gate * branch: that sum, and the branch that follows it."""
        x, hidden = norm_layer(x, branch, self.fc1, activation="gelu", **norm)
        return x, plain_layer(hidden, self.fc2)


class VARBlock(nn.Module):
    """Attention and feed-forward, each after a LayerNorm whose scale and shift, and whose gate, the class gives."""

    def __init__(self, width: int, heads: int, hidden: int, l2_norm: bool, shared_aln: bool, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.attn = VARAttention(width, heads, l2_norm)
        self.ffn = FeedForward(width, hidden)
        if shared_aln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width, dtype=torch.float32) / width**0.5)
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), Linear(width, 6 * width))

    def constants(self, label: Tensor, shared: Tensor | None) -> BlockConstants:
        """For class embeddings [R, W]; `shared` [R, 1, 6, W] where all blocks share one modulation layer.

        Beside `forward`: a block that processes hold in parts gathers its weights for this call, and frees them after.
        """
        return self._constants(label, shared)

    def _constants(self, label: Tensor, shared: Tensor | None) -> BlockConstants:
        raw = self.ada_gss + shared if shared is not None else self.ada_lin(label).unflatten(-1, (1, 6, -1))
        modulation = torch.cat((raw[:, :, :2], 1 + raw[:, :, 2:4], raw[:, :, 4:]), dim=2)
        return BlockConstants(modulation, *self.attn.constants())

    def forward(
        self,
        x: Tensor,
        gated: Gated,
        own: BlockConstants | Source,
        attend: Attend,
        layer: int,
        extra: Tensor | None = None,
    ) -> tuple[Tensor, Gated]:
        """x [R, L, W] and what the block before adds to it; this block's last branch comes back unadded, like that.

        `own` is what `constants` made; or what it makes them from, so that in training all that reads the block's
        weights is this call, which may be sharded or repeated. `extra` [R, L, W] joins between attention and
        feed-forward (DD1's students).
        """
        if not isinstance(own, BlockConstants):
            own = self._constants(*own)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = own.modulation.unbind(2)
        branch, gate = gated
        front: dict[str, Any] = {"gate": gate, "weight": scale1, "bias": shift1, "eps": self.eps}
        x, qkv = norm_layer(x, branch, self.attn.mat_qkv, layer_bias=own.bias, **front)
        mixed = self.attn(qkv, own.head_scale, attend, layer)
        if extra is not None:
            x = x + extra
        x, branch = self.ffn(x, mixed, gate=gamma1, weight=scale2, bias=shift2, eps=self.eps)
        return x, (branch, gamma2)


class HeadNorm(nn.Module):
    """LayerNorm before the head, scale and shift from the class."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.ada_lin = nn.Sequential(nn.SiLU(), Linear(width, 2 * width))

    def constants(self, label: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift [R, 1, W] for class embeddings [R, W]."""
        scale, shift = self.ada_lin(label).unflatten(-1, (1, 2, -1)).unbind(2)
        return 1 + scale, shift

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.add(x, (None, None), *self.constants(label))

    def add(self, x: Tensor, gated: Gated, scale: Tensor, shift: Tensor) -> Tensor:
        """The norm of x and what the last block adds to it."""
        branch, gate = gated
        return add_norm_unchecked(x, branch, gate=gate, weight=scale, bias=shift, eps=self.eps)[1]


@dataclass(frozen=True, kw_only=True)
class VARSizes:
    """Sizes of a VAR transformer, by their official names.

    Attributes:
        num_classes: of labels.
        depth: blocks.
        embed_dim: width; officially 64 per block.
        num_heads: attention heads; officially one per block.
        mlp_ratio: width of the feed-forward layer over the width.
        norm_eps: of every LayerNorm.
        shared_aln: one modulation layer for all blocks.
        attn_l2_norm: attention on normalised queries and keys.
    """

    num_classes: int = 1000
    depth: int = 16
    embed_dim: int = 1024
    num_heads: int = 16
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6
    shared_aln: bool = False
    attn_l2_norm: bool = True

    def __post_init__(self) -> None:
        if self.num_heads < 1 or self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads: got {self.num_heads}, expected a divisor of embed_dim {self.embed_dim}")


class _VARNetwork(nn.Module):
    """The layers that teacher and student have in common, under their official names."""

    sizes: VARSizes
    groups: tuple[int, ...]
    num_classes: int
    level: Tensor
    shared_ada_lin: nn.Sequential
    blocks: nn.ModuleList

    def _add_layers(self, sizes: VARSizes, code_dim: int, num_codes: int, levels: tuple[int, ...]) -> None:
        self.sizes, width = sizes, sizes.embed_dim
        self.word_embed = Linear(code_dim, width)
        self.class_emb = Embedding(sizes.num_classes + 1, width)
        self.pos_start = nn.Parameter(torch.empty(1, levels[0], width, dtype=torch.float32))
        self.pos_1LC = nn.Parameter(torch.empty(1, sum(levels), width, dtype=torch.float32))
        self.lvl_embed = Embedding(len(levels), width)
        if sizes.shared_aln:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), Linear(width, 6 * width))
        hidden = round(width * sizes.mlp_ratio)
        self.blocks = nn.ModuleList(
            VARBlock(width, sizes.num_heads, hidden, sizes.attn_l2_norm, sizes.shared_aln, sizes.norm_eps)
            for _ in range(sizes.depth)
        )
        self.head_nm = HeadNorm(width, sizes.norm_eps)
        self.head = Linear(width, num_codes)
        _initialise(self)

    @property
    def transformer_blocks(self) -> nn.ModuleList:
        """See `ddfast.models.blocks`."""
        return self.blocks

    def _sources(self, label: Tensor) -> list[Source]:
        """What every block makes its constants from, for class embeddings [R, W]."""
        shared = None
        if self.sizes.shared_aln:
            shared = self.shared_ada_lin(label).unflatten(-1, (1, 6, -1))
        return [(label, shared)] * len(self.blocks)

    def _constants(self, label: Tensor) -> list[BlockConstants]:
        """Every block's, for class embeddings [R, W]."""
        pairs = zip(self.blocks, self._sources(label), strict=True)
        return [cast(VARBlock, block).constants(*source) for block, source in pairs]

    def _run(
        self,
        x: Tensor,
        constants: Sequence[BlockConstants | Source],
        attend: Attend,
        extra: Callable[[int], Tensor | None] | None = None,
    ) -> tuple[Tensor, Gated]:
        """All blocks, the last one's branch unadded; `extra(layer)` is what a student adds inside each."""
        gated: Gated = (None, None)
        for layer, (block, own) in enumerate(zip(self.blocks, constants, strict=True)):
            x, gated = block(x, gated, own, attend, layer, extra(layer) if extra else None)
        return x, gated

    def labels(self, condition: Condition, unconditional: bool = False) -> Tensor:
        """Class embeddings [B, W]."""
        assert isinstance(condition, Tensor)
        return self.class_emb(torch.full_like(condition, self.num_classes) if unconditional else condition)

    def _places(self) -> Tensor:
        """What every position adds to its token, by its scale and place: [N, W]."""
        return self.lvl_embed(self.level) + self.pos_1LC[0]

    def _tokens(self, label: Tensor, inputs: Tensor, first: int, last: int, places: Tensor) -> Tensor:
        """Input tokens [R, L, W] of scales first..last; `inputs` [R or B, L, D] are those after scale 0."""
        starts = group_starts(self.groups)
        places = places[starts[first] : starts[last + 1]]
        if not inputs.shape[1]:
            return label[:, None] + self.pos_start + places
        words = self._words(inputs.to(self.dtype))
        copies = 1 if len(words) == len(label) else 2  # guidance: both halves read the same codes
        if first:
            return (words.expand(copies, *words.shape) + places).flatten(0, 1)
        return torch.cat((label[:, None] + self.pos_start, words.repeat(copies, 1, 1)), dim=1) + places

    def _words(self, inputs: Tensor) -> Tensor:
        """What inputs [B, m, D] are in the transformer, [B, m, W]."""
        return self.word_embed(inputs)

    def hidden(self, label: Tensor, inputs: Tensor) -> Tensor:
        """What the head over codes reads, [B, N, W]; label [B, W], inputs [B, N', D] are those after scale 0."""
        x = self._tokens(label, inputs, 0, len(self.groups) - 1, self._places())
        x, gated = self._run(x, self._sources(label), BlockCausalAttention(self.groups))
        return self.head_nm.add(x, gated, *self.head_nm.constants(label))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; inputs are cast to it, logits come back in float32."""
        return self.word_embed.weight.dtype


@torch.no_grad()
def _initialise(network: _VARNetwork) -> None:
    """A start from which training works: small embeddings and residual branches, nearly closed gates."""
    sizes = network.sizes
    std = (1 / sizes.embed_dim / 3) ** 0.5
    for name, parameter in network.named_parameters():
        if name.endswith((".bias", "_bias")):
            parameter.zero_()
        elif "scale_mul" not in name:
            nn.init.trunc_normal_(parameter, std=std if parameter.ndim > 2 or "emb" in name else 0.02)
        if name.endswith(("attn.proj.weight", "ffn.fc2.weight")):
            parameter.div_(math.sqrt(2 * sizes.depth))


@dataclass
class VARState:
    """Progress of one `VARTeacher.generate`: labels [R, W], cache, and the latents that the codes so far add up to.

    `constants`, those of `head`'s norm and `places` are what all steps read, and labels and weights decide.
    """

    label: Tensor
    constants: list[BlockConstants]
    head: tuple[Tensor, Tensor]
    places: Tensor
    cache: KVCache
    f_hat: Tensor
    masked_prefix: bool


class VARTeacher(_VARNetwork, TokenizedTeacher):
    """Visual autoregressive model: the input of scale k is the latents of all earlier scales, resized to scale k.

    Guidance follows the official sampling: at scale k of S, `(1 + t) cond - t uncond` with `t = cfg_scale k / (S - 1)`,
    so `cfg_scale` 0 is unguided and the first scale always is. As officially, `top_p` 0 is off, and `generate` takes
    the labels -1 and `num_classes` for "no condition".

    `generate(..., masked_prefix=False)` lets a prefix's scales see each other, which is how the official DD1 scripts
    feed a student's prefix to the teacher: the prefix and the first new scale in one pass without a mask. It changes
    the logits, and is not what the teacher was trained with.

    Args:
        tokenizer: whose codes it models, with its scales.
        sizes: of the transformer.
        defaults: sampling settings.
    """

    tokenizer: VARTokenizer
    graphable = True

    def __init__(self, tokenizer: VARTokenizer, sizes: VARSizes, *, defaults: SamplingDefaults | None = None) -> None:
        super().__init__()
        self.groups = tuple(side**2 for side in tokenizer.patch_nums)
        self.num_classes = sizes.num_classes
        self.defaults = defaults or SamplingDefaults(cfg_scale=2.0, top_k=900, top_p=0.95)
        self._add_layers(sizes, tokenizer.codebook().shape[1], tokenizer.codebook().shape[0], self.groups)
        self.tokenizer = tokenizer
        self.derive_buffers()

    def derive_buffers(self) -> None:
        """Fill what follows from the tokenizer and the sizes and is in no file."""
        self.register_buffer("codebook", self.tokenizer.codebook(), persistent=False)
        self.register_buffer("level", group_levels(self.groups, self.codebook.device), persistent=False)

    def group_cfg_scale(self, cfg_scale: float, group: int) -> float:
        return 1.0 + cfg_scale * group / max(len(self.groups) - 1, 1)

    def logits(self, condition: Condition, codes: Tensor, *, unconditional: bool = False) -> Tensor:
        self.check_training_condition(condition)
        label = self.labels(condition, unconditional)
        inputs = self.tokenizer.teacher_forcing_input(self.tokens(codes, len(label), waits=False))
        return self.head(self.hidden(label, inputs)).float()

    def accepted(self, condition: Condition) -> Condition:
        """As officially, labels may be -1 or `num_classes` too: no condition."""
        if isinstance(condition, Tensor) and condition.dtype == torch.int64:
            condition = condition.where(condition != -1, self.num_classes)
        check_labels(condition, self.num_classes, null=True)
        return on_device(condition, self.codebook.device)

    def filters(self, *, temperature: float, top_k: int, top_p: float) -> dict[str, Any]:
        return super().filters(temperature=temperature, top_k=top_k, top_p=1.0 if top_p == 0 else top_p)

    def begin(self, condition: Condition, *, guided: bool, masked_prefix: bool = True) -> VARState:
        label = self.labels(condition)
        batch = len(label)
        if guided:
            label = torch.cat((label, self.labels(condition, unconditional=True)))
        sizes = self.sizes
        head_dim = sizes.embed_dim // sizes.num_heads
        side = self.tokenizer.side
        return VARState(
            label=label,
            constants=self._constants(label),
            head=self.head_nm.constants(label),
            places=self._places(),
            cache=KVCache(sizes.depth, len(label), sizes.num_heads, self.num_tokens, head_dim, label),
            f_hat=self.codebook.new_zeros(batch, self.code_dim, side, side),
            masked_prefix=masked_prefix,
        )

    def advance(self, state: VARState, codes: Tensor) -> Tensor:
        starts = self.group_starts()
        embeddings, offset, inputs = self.codebook[codes], 0, []
        first = starts.index(state.cache.length)
        last = max(first - 1, 0)  # the codes of the newest scale in the cache are what this call brings
        while offset < codes.shape[1]:
            size = self.groups[last]
            state.f_hat = state.f_hat + self.tokenizer.contribution(last, embeddings[:, offset : offset + size])
            last, offset = last + 1, offset + size
            inputs.append(self.tokenizer.next_input(last, state.f_hat))
        given = torch.cat(inputs, dim=1) if len(inputs) > 1 else (*inputs, embeddings)[0]
        x = self._tokens(state.label, given, first, last, state.places)
        mask = None  # one scale sees everything before it and itself
        if first != last and state.masked_prefix:
            level = self.level[: starts[last + 1]]
            mask = level[starts[first] :, None] >= level[None, :]
        x, (branch, gate) = self._run(x, state.constants, CachedAttention(state.cache, mask))
        state.cache.length += x.shape[1]  # on the host alone: every scale is a step of its own
        read = slice(-self.groups[last], None)
        gated: Gated = (None, None) if branch is None or gate is None else (branch[:, read], gate)
        return self.head_nm.add(x[:, read], gated, *state.head)

    def step_ops(self, rows: int, size: int) -> dict[str, Asked]:
        tokens, heads, width = rows * size, self.sizes.num_heads, self.sizes.embed_dim
        layers = dict.fromkeys(("add_norm", "norm_linear"), Asked(tokens, size=width))
        layers["activate"] = Asked(tokens, size=round(width * self.sizes.mlp_ratio))
        attention = {"append_normed": Asked(3 * heads * tokens, width // heads)} if self.sizes.attn_l2_norm else {}
        return attention | layers

    def read_out(self, hidden: Tensor) -> Tensor:
        return plain_layer(hidden, self.head)


class VARStudent(_VARNetwork, DD1Student):
    """DD1's student of VAR: one more level, the condition token, in front of the teacher's scales.

    A position sees all strictly earlier levels and itself. The embedding of "data" and "noise" enters at the input,
    between attention and feed-forward of every block, and before both heads.

    Args:
        teacher, recycles: as in `Student`; the teacher has a VAR tokenizer.
        layerwise_n_d_embed: pass the data/noise embedding through one linear layer per block.
        sizes: of the transformer, by their official names; those left out are the teacher's.
    """

    def __init__(
        self, teacher: VARTeacher, *, layerwise_n_d_embed: bool = True, recycles: int = 0, **sizes: Any
    ) -> None:
        super().__init__(teacher, recycles=recycles)
        own = {**vars(teacher.sizes), **sizes}
        levels = (1, *self.groups)
        self._add_layers(VARSizes(**own), teacher.code_dim, teacher.num_codes, levels)
        width = self.sizes.embed_dim
        self.n_d_embed = Embedding(2, width)
        nn.init.trunc_normal_(self.n_d_embed.weight, std=0.02)
        if layerwise_n_d_embed:
            self.layerwise_n_d_embed = nn.ModuleList(Linear(width, width) for _ in range(self.sizes.depth + 1))
        self.final_layer_conti = ContinuousHead(width, teacher.code_dim)
        self.add_recycling(width)

    @property
    def width(self) -> int:
        """Of the hidden states."""
        return self.sizes.embed_dim

    @property
    def sizes_config(self) -> dict[str, Any]:
        return {"layerwise_n_d_embed": hasattr(self, "layerwise_n_d_embed"), **vars(self.sizes)}

    @torch.no_grad()
    def start_from(self, teacher: Teacher) -> None:
        """Take over the teacher's weights.

        Level and position row 0 (the condition) are the teacher's row 0, rows 2.. are its rows 1..; row 1 of both, the
        data/noise embeddings and the continuous head have no counterpart. (The official routine draws row 1 of the
        *class* embedding anew, where it means the level's: not repeated here.)
        """
        if not isinstance(teacher, VARTeacher):
            raise TypeError(f"teacher: got {type(teacher).__name__}, expected a VARTeacher to start from")
        source = teacher.state_dict()
        shifted = {"lvl_embed.weight": 0, "pos_1LC": 1}  # name: the dimension that has one more row
        own = self.state_dict()
        self.load_state_dict({n: source[n] for n in own if n in source and n not in shifted}, strict=False)
        for name, dim in shifted.items():
            old, new = source[name], own[name]
            new.narrow(dim, 0, 1).copy_(old.narrow(dim, 0, 1))
            new.narrow(dim, 2, old.shape[dim] - 1).copy_(old.narrow(dim, 1, old.shape[dim] - 1))

    def features(self, condition: Condition, x: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(condition, Tensor)
        label = self.class_emb(condition)
        tokens = torch.cat((label[:, None] + self.pos_start, self.read(self.word_embed, x.to(self.dtype))), dim=1)
        levels = F.pad(self.level + 1, (1, 0))  # the condition is level 0
        is_data = self.data_levels(t, len(x), 1)
        hidden = tokens + self.lvl_embed(levels) + self.pos_1LC + self.n_d_embed(is_data)
        attend, extra = MaskedAttention(self.mask), partial(self._layerwise, is_data=is_data)
        hidden, (branch, gate) = self._run(hidden, self._sources(label), attend, extra)
        if branch is not None and gate is not None:
            hidden = torch.addcmul(hidden, branch, gate)
        return (hidden + self._layerwise(-1, is_data))[:, 1:], label

    def _layerwise(self, layer: int, is_data: Tensor) -> Tensor:
        """The data/noise embedding [B, 1 + N, W] as one layer adds it, from int64 [B, 1 + N]."""
        table = self.n_d_embed.weight
        if hasattr(self, "layerwise_n_d_embed"):
            table = self.layerwise_n_d_embed[layer](table)  # two rows through the layer, not every token
        return F.embedding(is_data, table)

    def code_logits(self, hidden: Tensor, context: Tensor) -> Tensor:
        return self.head(self.head_nm(hidden, context)).float()

    def continuous(self, hidden: Tensor, context: Tensor) -> Tensor:
        return self.final_layer_conti(hidden, context).float()

    def involve_teacher(
        self, condition: Condition, noise: Tensor, x: Tensor, teacher_range: tuple[int, int], **generation: Any
    ) -> Tensor:
        return super().involve_teacher(condition, noise, x, teacher_range, **{"masked_prefix": False, **generation})


class VARFlowNetwork(_VARNetwork, FlowNetwork):
    """DD2's generator or guidance network of VAR: scale k reads the tokens, or the noise, of the scales before it.

    Args:
        teacher: as in `Student`, with a VAR tokenizer.
        head_width, head_depth, time, recycles: as in `FlowNetwork`.
        sizes: of the transformer, by their official names; those left out are the teacher's.
    """

    def __init__(
        self,
        teacher: VARTeacher,
        *,
        head_width: int = 1024,
        head_depth: int = 3,
        time: float = 1.0,
        recycles: int = 0,
        **sizes: Any,
    ) -> None:
        super().__init__(teacher, head_width=head_width, head_depth=head_depth, time=time, recycles=recycles)
        self._add_layers(VARSizes(**{**vars(teacher.sizes), **sizes}), teacher.code_dim, teacher.num_codes, self.groups)
        self.add_head(self.sizes.embed_dim)
        self.add_recycling(self.sizes.embed_dim)

    @property
    def sizes_config(self) -> dict[str, Any]:
        return dict(vars(self.sizes))

    def features(self, condition: Condition, tokens: Tensor) -> Tensor:
        self.teacher.check_training_condition(condition)
        tokenizer = cast(VARTeacher, self.teacher).tokenizer
        parts = [tokenizer.teacher_forcing_input(part) for part in tokens.split(self.teacher.code_dim, dim=-1)]
        return self.hidden(self.labels(condition), torch.cat(parts, dim=-1))

    def _words(self, inputs: Tensor) -> Tensor:
        return self.read(self.word_embed, inputs)

    def code_logits(self, features: Tensor) -> Tensor:
        return self.head(features).float()
