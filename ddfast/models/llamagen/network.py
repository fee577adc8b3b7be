"""LlamaGen, class- and text-conditional, and its DD1 student, in the parameter layout of the official files.

A Llama over image tokens in raster order, after one class token or the (left-padded) features of a caption.
Sources: Sun et al. 2024, arXiv 2406.06525; Liu et al. 2024, arXiv 2412.17153 (DD1).

Dimensions: B batch, R rows (B, or 2B with guidance), C condition tokens, L sequence, N tokens, V codes, D code
dimension, W width, H heads, K head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddfast.models.attention import (
    Attend,
    CachedAttention,
    KVCache,
    MaskedAttention,
    Mix,
    SequenceMix,
    StepMix,
    WindowAttention,
    window_positions,
)
from ddfast.models.autoregressive import Condition, SamplingDefaults, condition_size
from ddfast.models.flow_network import FlowNetwork
from ddfast.models.inputs import as_codes, known
from ddfast.models.layers import Embedding, Linear, norm_layer, plain_layer, stack_rows, twice_embedded
from ddfast.models.llamagen.tokenizer import LlamaGenTokenizer
from ddfast.models.protocol import Teacher
from ddfast.models.student import ContinuousHead, DD1Student
from ddfast.models.tokenizers import TokenizedTeacher
from ddfast.ops import nearest_code
from ddfast.ops.add_norm import add_norm_unchecked
from ddfast.ops.dispatch import Asked

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class LlamaGenSizes:
    """Sizes of a LlamaGen transformer, by their official names.

    Attributes:
        dim: width.
        n_layer: blocks.
        n_head: query heads.
        n_kv_head: key and value heads.
        ffn_dim: width of the feed-forward layer.
        block_size: image tokens, a square.
        model_type: "c2i" (class labels) or "t2i" (captions).
        num_classes: of labels (c2i).
        class_dropout_prob: 0: the teacher was trained without guidance, and has no embedding for "no condition".
        cls_token_num: condition tokens.
        token_num: rows of the stored unconditional caption, of which the first `cls_token_num` are read (t2i);
            0: as many as are read.
        caption_dim: of caption features (t2i).
        rope_base: of the rotary embedding.
        norm_eps: of every RMSNorm.
    """

    dim: int = 1024
    n_layer: int = 24
    n_head: int = 16
    n_kv_head: int = 16
    ffn_dim: int = 2816
    block_size: int = 256
    model_type: str = "c2i"
    num_classes: int = 1000
    class_dropout_prob: float = 0.1
    cls_token_num: int = 1
    token_num: int = 0
    caption_dim: int = 2048
    rope_base: float = 10000
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        side = round(self.block_size**0.5)
        if side * side != self.block_size:
            raise ValueError(f"block_size: got {self.block_size}, expected a square: images are square")
        if self.model_type not in ("c2i", "t2i"):
            raise ValueError(f"model_type: got {self.model_type!r}, expected 'c2i' or 't2i'")
        if 0 < self.token_num < self.cls_token_num:
            raise ValueError(f"token_num: got {self.token_num}, expected at least cls_token_num {self.cls_token_num}")
        if self.dim % self.n_head or self.n_head % self.n_kv_head:
            got = f"dim {self.dim}, n_head {self.n_head}, n_kv_head {self.n_kv_head}"
            raise ValueError(f"n_head: got {got}, expected n_head to divide dim and n_kv_head to divide n_head")


# width, blocks, heads and feed-forward width of the published models
_PUBLISHED = {
    "B": (768, 12, 12, 2048), "L": (1024, 24, 16, 2816), "XL": (1280, 36, 20, 3584), "XXL": (1536, 48, 24, 4096),
    "XXXL": (2560, 48, 40, 6912), "1B": (2048, 22, 32, 5632), "3B": (3200, 24, 32, 8704), "7B": (4096, 32, 32, 11008),
}  # fmt: skip

LLAMAGEN_SIZES = {
    name: LlamaGenSizes(dim=dim, n_layer=blocks, n_head=heads, n_kv_head=heads, ffn_dim=hidden)
    for name, (dim, blocks, heads, hidden) in _PUBLISHED.items()
}
"""The published LlamaGen models by name."""


_COLDEST, _SMALLEST_NUCLEUS = 1e-5, 1e-30


class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast back, times a weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, None)[1]

    def add(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        """x + branch [R, L, W], and its norm."""
        return add_norm_unchecked(x, branch, weight=self.weight, eps=self.eps, rms=True)

    def before(
        self, layer: nn.Linear, x: Tensor, branch: Tensor | None, activation: str = "none"
    ) -> tuple[Tensor, Tensor]:
        """x + branch [R, L, W], and what a layer makes of its norm."""
        return norm_layer(x, branch, layer, activation=activation, weight=self.weight, eps=self.eps, rms=True)


def rope_table(sizes: LlamaGenSizes, device: torch.device | str = "cpu") -> Tensor:
    """Cosines and sines of the 2-D rotary embedding, float32 [C + N, K / 2, 2]: row angles first, then column angles.

    Condition tokens have zeros, not (1, 0): their queries and keys become zero vectors.
    """
    half = sizes.dim // sizes.n_head // 2
    exponent = torch.arange(0, half, 2, dtype=torch.float32, device=device)[: half // 2] / half
    frequency = 1.0 / sizes.rope_base**exponent
    side = round(sizes.block_size**0.5)
    angle = torch.outer(torch.arange(side, dtype=torch.float32, device=device), frequency)
    grid = torch.cat((angle[:, None].expand(-1, side, -1), angle[None].expand(side, -1, -1)), dim=-1).flatten(0, 1)
    grid = torch.cat((torch.zeros(sizes.cls_token_num, half, dtype=torch.float32, device=device), grid))
    table = torch.stack((grid.cos(), grid.sin()), dim=-1)
    table[: sizes.cls_token_num] = 0
    return table


class LlamaAttention(nn.Module):
    """Attention with rotary embedding, from query, key and value on; fewer key than query heads are allowed."""

    def __init__(self, sizes: LlamaGenSizes) -> None:
        super().__init__()
        heads, head_dim = sizes.n_head + 2 * sizes.n_kv_head, sizes.dim // sizes.n_head
        self.wqkv = Linear(sizes.dim, heads * head_dim, bias=False)
        self.wo = Linear(sizes.dim, sizes.dim, bias=False)

    def forward(self, qkv: Tensor, mix: Mix, layer: int) -> Tensor:
        return plain_layer(mix(layer, qkv), self.wo)


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x). The rows of w1 and w3 are one matrix, w13: one product. States have both, as files do."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w13 = Linear(width, 2 * hidden, bias=False)
        self.w2 = Linear(hidden, width, bias=False)
        stack_rows(self, "w13.weight", ("w1.weight", "w3.weight"))

    def forward(self, x: Tensor, branch: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """Of the norm of x + branch: that sum, and the branch that follows it."""
        x, hidden = norm.before(self.w13, x, branch, "swiglu")
        return x, plain_layer(hidden, self.w2)


class LlamaBlock(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, sizes: LlamaGenSizes) -> None:
        super().__init__()
        self.attention = LlamaAttention(sizes)
        self.feed_forward = SwiGLU(sizes.dim, sizes.ffn_dim)
        self.attention_norm = RMSNorm(sizes.dim, sizes.norm_eps)
        self.ffn_norm = RMSNorm(sizes.dim, sizes.norm_eps)

    def forward(self, x: Tensor, branch: Tensor | None, mix: Mix, layer: int) -> tuple[Tensor, Tensor]:
        """x [R, L, W] and what the block before adds to it; this block's last branch comes back unadded, like that."""
        x, qkv = self.attention_norm.before(self.attention.wqkv, x, branch)
        return self.feed_forward(x, self.attention(qkv, mix, layer), self.ffn_norm)


class LabelEmbedding(nn.Module):
    """Labels int64 [B] to one token [B, 1, W]; a last row may stand for "no condition"."""

    def __init__(self, sizes: LlamaGenSizes, unconditional: bool) -> None:
        super().__init__()
        self.embedding_table = Embedding(sizes.num_classes + unconditional, sizes.dim)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)[:, None]


class CaptionEmbedding(nn.Module):
    """Caption features [B, C, dim] to C tokens [B, C, W], by a two-layer network."""

    def __init__(self, sizes: LlamaGenSizes) -> None:
        super().__init__()
        self.cap_proj = nn.ModuleDict(
            {
                "fc1": Linear(sizes.caption_dim, sizes.dim, bias=False),
                "fc2": Linear(sizes.dim, sizes.dim, bias=False),
            }
        )
        self.tokens = sizes.cls_token_num
        rows = sizes.token_num or sizes.cls_token_num
        uncond = torch.randn(rows, sizes.caption_dim, dtype=torch.float32) / sizes.caption_dim**0.5
        self.register_buffer("uncond_embedding", uncond)
        self.uncond_embedding: Tensor

    def unconditional(self, features: Tensor) -> Tensor:
        """The features that stand for "no caption", as many as those given [B, C, dim]."""
        return self.uncond_embedding[: self.tokens].expand_as(features)

    def forward(self, features: Tensor) -> Tensor:
        first, second = (cast(nn.Linear, self.cap_proj[name]) for name in ("fc1", "fc2"))
        return second(F.gelu(first(features.to(first.weight.dtype)), approximate="tanh"))


class _LlamaGenNetwork(nn.Module):
    """The layers that teacher and student have in common, under their official names."""

    sizes: LlamaGenSizes
    rope: Tensor

    def _add_layers(self, sizes: LlamaGenSizes, num_codes: int, *, unconditional: bool) -> None:
        self.sizes = sizes
        text = sizes.model_type == "t2i"
        self.cls_embedding = CaptionEmbedding(sizes) if text else LabelEmbedding(sizes, unconditional)
        self.layers = nn.ModuleList(LlamaBlock(sizes) for _ in range(sizes.n_layer))
        self.norm = RMSNorm(sizes.dim, sizes.norm_eps)
        self.output = Linear(sizes.dim, num_codes, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    @property
    def transformer_blocks(self) -> nn.ModuleList:
        """See `ddfast.models.blocks`."""
        return self.layers

    def _derive_rope(self, device: torch.device | str) -> None:
        self.register_buffer("rope", rope_table(self.sizes, device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As nn.Module's; the angles are made anew, because a change of dtype must not reach them."""
        self._buffers.pop("rope", None)
        super()._apply(fn, recurse)
        self._derive_rope(self.output.weight.device)
        return self

    def _condition_tokens(self, condition: Condition, unconditional: bool = False) -> tuple[Tensor, Tensor | None]:
        """Condition tokens [B, C, W], and which of them are no padding, bool [B, C] (None: all of them)."""
        sizes = self.sizes
        if sizes.model_type == "c2i":
            assert isinstance(condition, Tensor)
            if unconditional and sizes.class_dropout_prob == 0:
                raise ValueError(
                    "cfg_scale: this teacher has no embedding for 'no condition', expected 1 (no guidance)"
                )
            labels = torch.full_like(condition, sizes.num_classes) if unconditional else condition
            return self.cls_embedding(labels), None
        features, valid = self._padded(condition)
        if unconditional:
            features = cast(CaptionEmbedding, self.cls_embedding).unconditional(features)
        else:
            features = features.masked_fill(~valid[..., None], 0)
        return self.cls_embedding(features), valid

    def _padded(self, condition: Condition) -> tuple[Tensor, Tensor]:
        """Features [B, C, dim] and bool mask [B, C] of captions of up to C tokens; padding changes nothing for them."""
        features, valid = condition
        missing = self.sizes.cls_token_num - features.shape[1]
        return F.pad(features, (0, 0, missing, 0)), F.pad(valid != 0, (missing, 0))

    def _run(self, x: Tensor, mix: Mix) -> tuple[Tensor, Tensor]:
        """All blocks; what the last of them adds comes back unadded."""
        branch = None
        for layer, block in enumerate(self.layers):
            x, branch = block(x, branch, mix, layer)
        return x, cast(Tensor, branch)

    def _sequence(self, length: int, attend: Attend) -> SequenceMix:
        """Attention between the first `length` positions."""
        sizes = self.sizes
        return SequenceMix(attend, sizes.dim // sizes.n_head, kv_heads=sizes.n_kv_head, rope=self.rope[:length])

    def hidden(self, condition: Condition, tokens: Tensor, unconditional: bool = False) -> Tensor:
        """What the head over codes reads, [B, N, W], from the condition and embedded tokens 0..N-2 [B, N - 1, W]."""
        first, valid = self._condition_tokens(condition, unconditional)
        x = torch.cat((first, tokens), dim=1)
        x, branch = self._run(x, self._sequence(x.shape[1], MaskedAttention(padded_mask(valid, x.shape[1]))))
        read = slice(first.shape[1] - 1, None)
        return self.norm.add(x[:, read], branch[:, read])[1]

    def _check_captions(self, condition: Condition) -> None:
        """Raise unless a text condition is one that this network reads."""
        sizes = self.sizes
        expected = f"features [B, up to {sizes.cls_token_num}, {sizes.caption_dim}] and their mask [B, as many]"
        if not isinstance(condition, tuple) or len(condition) != 2 or not all(isinstance(c, Tensor) for c in condition):
            raise TypeError(f"condition: got {type(condition).__name__}, expected a pair of {expected}")
        features, valid = condition
        if not features.is_floating_point():
            raise TypeError(f"condition: got features of {features.dtype}, expected floating-point ones")
        fits = features.ndim == 3 and features.shape[2] == sizes.caption_dim
        if not fits or not 1 <= features.shape[1] <= sizes.cls_token_num or valid.shape != features.shape[:2]:
            raise ValueError(f"condition: got {list(features.shape)} and {list(valid.shape)}, expected {expected}")
        if not known(features):
            return
        valid = valid != 0
        if bool((valid[:, :-1] & ~valid[:, 1:]).any()):
            raise ValueError("condition: got a mask with padding behind a token, expected padding on the left")
        if not bool(features.masked_fill(~valid[..., None], 0).isfinite().all()):
            raise ValueError("condition: got NaN or infinite features, expected finite ones")

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; inputs are cast to it, logits come back in float32."""
        return self.output.weight.dtype


def padded_mask(valid: Tensor | None, length: int) -> Tensor | None:
    """Bool [B, 1, L, L] of a causal sequence whose first C positions may be padding; None where nothing is.

    Padding is seen by nobody but itself (an empty row of a softmax would be NaN).
    """
    if valid is None:
        return None
    column = F.pad(valid, (0, length - valid.shape[1]), value=True)
    causal = torch.ones(length, length, dtype=torch.bool, device=valid.device).tril()
    diagonal = torch.eye(length, dtype=torch.bool, device=valid.device)
    return (causal & column[:, None] | diagonal)[:, None]


@dataclass
class LlamaGenState:
    """Progress of one `LlamaGenTeacher.generate`: what is still to be fed of the condition, its padding, the cache.

    `first` int64 [R] is where a row's caption begins, behind its padding.
    """

    pending: Tensor | None
    valid: Tensor | None
    first: Tensor | None
    cache: KVCache
    guided: bool


class _OnDemand(Protocol):
    """Captions whose features are made when a batch asks for them."""

    def __len__(self) -> int: ...

    def encoded(self, index: Tensor) -> tuple[Tensor, Tensor]: ...


class LlamaGenTeacher(_LlamaGenNetwork, TokenizedTeacher):
    """LlamaGen's GPT: one token per step, conditioned on a class or on a caption.

    `codebook` is the tokenizer's, normalised as it is used. Guidance needs `cfg_scale` above 1, as officially; a
    `cfg_interval` ends it. As officially too, `temperature` 0 and `top_p` 0 come to the likeliest code. A text
    condition is `(features [B, L, dim], mask [B, L])`, padded on the left; L up to the model's `cls_token_num`.

    Args:
        tokenizer: whose codes it models.
        sizes: of the transformer.
        defaults: sampling settings.

    Attributes:
        captions: features [M, C, dim] and masks [M, C] that training pairs of a text teacher cycle through; or what
            makes them of a batch (`captions.EncodedOnDemand`).
    """

    graphable = True
    tokenizer: LlamaGenTokenizer
    captions: tuple[Tensor, Tensor] | _OnDemand | None = None

    def __init__(
        self, tokenizer: LlamaGenTokenizer, sizes: LlamaGenSizes, *, defaults: SamplingDefaults | None = None
    ) -> None:
        super().__init__()
        text = sizes.model_type == "t2i"
        self.groups = (1,) * sizes.block_size
        self.num_classes = 0 if text else sizes.num_classes
        if defaults is None:
            scale = 2.0 if sizes.class_dropout_prob else 1.0  # trained without "no condition": nothing to guide by
            defaults = SamplingDefaults(cfg_scale=7.5 if text else scale, top_k=1000 if text else 8000)
        self.defaults = defaults
        num_codes = tokenizer.codebook().shape[0]
        self.tok_embeddings = Embedding(num_codes, sizes.dim)
        self._add_layers(sizes, num_codes, unconditional=sizes.class_dropout_prob > 0)
        self.tokenizer = tokenizer
        self.derive_buffers()

    def derive_buffers(self) -> None:
        """Fill what follows from the tokenizer and the sizes and is in no file."""
        self.register_buffer("codebook", self.tokenizer.codebook(), persistent=False)
        self._derive_rope(self.codebook.device)

    @property
    def num_conditions(self) -> int:
        if self.sizes.model_type == "c2i":
            return self.num_classes
        if self.captions is None:
            return 0
        return len(self.captions[0] if isinstance(self.captions, tuple) else self.captions)

    def condition_of(self, index: Tensor) -> Condition:
        if self.sizes.model_type == "c2i":
            return index
        if self.captions is None:
            raise ValueError("captions: got None, expected features and masks: set the teacher's `captions` first")
        if not isinstance(self.captions, tuple):
            features, valid = self.captions.encoded(index)
            return features.to(index.device), valid.to(index.device)
        features, valid = self.captions
        where = index.to(features.device)
        return features[where].to(index.device), valid[where].to(index.device)

    def group_cfg_scale(self, cfg_scale: float, group: int) -> float:
        return cfg_scale if cfg_scale > 1.0 else 1.0

    def check_condition(self, condition: Condition) -> None:
        if self.sizes.model_type == "c2i":
            super().check_condition(condition)
        else:
            self._check_captions(condition)

    def filters(self, *, temperature: float, top_k: int, top_p: float) -> dict[str, Any]:
        # Officially, the temperature is at least 1e-5, and a nucleus always holds the likeliest code.
        temperature = _COLDEST if 0 <= temperature < _COLDEST else temperature
        return super().filters(temperature=temperature, top_k=top_k, top_p=_SMALLEST_NUCLEUS if top_p == 0 else top_p)

    def logits(self, condition: Condition, codes: Tensor, *, unconditional: bool = False) -> Tensor:
        self.check_training_condition(condition)
        shape = (condition_size(condition), self.num_tokens)
        if codes.is_floating_point():
            codes = nearest_code(self.tokens(codes, shape[0]), self.codebook)
        codes = as_codes(codes, self.num_codes, shape, waits=False)
        return self.output(self.hidden(condition, self.tok_embeddings(codes[:, :-1]), unconditional)).float()

    def begin(self, condition: Condition, *, guided: bool) -> LlamaGenState:
        tokens, valid = self._condition_tokens(condition)
        if guided:
            tokens = torch.cat((tokens, self._condition_tokens(condition, unconditional=True)[0]))
            valid = None if valid is None else torch.cat((valid, valid))
        sizes = self.sizes
        length = tokens.shape[1] + self.num_tokens - 1
        head_dim = sizes.dim // sizes.n_head
        cache = KVCache(sizes.n_layer, len(tokens), sizes.n_kv_head, length, head_dim, tokens)
        first = None if valid is None else valid.shape[1] - valid.sum(1)
        return LlamaGenState(pending=tokens, valid=valid, first=first, cache=cache, guided=guided)

    def advance(self, state: LlamaGenState, codes: Tensor) -> Tensor:
        # Rows with and without the condition read the same codes.
        new = twice_embedded(self.tok_embeddings.weight, codes) if state.guided else self.tok_embeddings(codes)
        x, state.pending = new if state.pending is None else torch.cat((state.pending, new), dim=1), None
        cache, length = state.cache, x.shape[1]
        mix: Mix
        if length == 1:
            mix = StepMix(cache, rope=self.rope, first=state.first)
        else:  # the whole sequence so far
            mask = padded_mask(state.valid, length)
            mix = self._sequence(length, CachedAttention(cache, mask, causal=mask is None))
        x, branch = self._run(x, mix)
        cache.extend(length)
        return self.norm.add(x[:, -1:], branch[:, -1:])[1]

    def advance_window(self, state: LlamaGenState, codes: Tensor, token: Tensor) -> Tensor:
        sizes = self.sizes
        x = twice_embedded(self.tok_embeddings.weight, codes) if state.guided else self.tok_embeddings(codes)
        position = window_positions(token + sizes.cls_token_num - 1, codes.shape[1], twice=state.guided)
        attend = WindowAttention(state.cache, position, state.first)
        head_dim = sizes.dim // sizes.n_head
        mix = SequenceMix(attend, head_dim, kv_heads=sizes.n_kv_head, rope=self.rope[position])
        return self.norm.add(*self._run(x, mix))[1]

    def keep_rows(self, state: LlamaGenState, rows: Tensor) -> None:
        state.valid = None if state.valid is None else state.valid[rows]
        state.first = None if state.first is None else state.first[rows]
        state.cache.keep_rows(rows)

    def step_ops(self, rows: int, size: int) -> dict[str, Asked]:
        sizes = self.sizes
        attention = Asked(rows, sizes.dim // sizes.n_head, sizes.cls_token_num + sizes.block_size - 1)
        layers = dict.fromkeys(("add_norm", "norm_linear"), Asked(rows, size=sizes.dim))
        return {"decode_attention": attention, "activate": Asked(rows, size=sizes.ffn_dim)} | layers

    def read_out(self, hidden: Tensor) -> Tensor:
        return plain_layer(hidden, self.output)


class LlamaGenStudent(_LlamaGenNetwork, DD1Student):
    """DD1's student of LlamaGen: reads the condition and X_t, sees what is before a position and the position itself.

    The embedding of "data" and "noise" is added once, at the input. The continuous head reads the hidden states
    before the final norm, with shift and scale from the class embedding (text: the mean of the caption's tokens).

    Args:
        teacher: as in `Student`, with a LlamaGen tokenizer.
        recycles: as in `Student`.
        sizes: of the transformer, by their official names; those left out are the teacher's.
    """

    def __init__(self, teacher: LlamaGenTeacher, *, recycles: int = 0, **sizes: Any) -> None:
        own = LlamaGenSizes(**{**vars(teacher.sizes), **sizes})
        self.sizes = own
        super().__init__(teacher, recycles=recycles)
        self.tok_embeddings = Linear(teacher.code_dim, own.dim)
        self.n_d_embed = Embedding(2, own.dim)
        self._add_layers(own, teacher.num_codes, unconditional=True)  # officially always there, and never used
        nn.init.zeros_(self.tok_embeddings.bias)
        self.final_layer_conti = ContinuousHead(own.dim, teacher.code_dim)
        self.add_recycling(own.dim)

    def derive_buffers(self) -> None:
        """Fill what follows from the teacher and the sizes and is in no file."""
        super().derive_buffers()
        self._derive_rope(self.codebook.device)

    @property
    def width(self) -> int:
        """Of the hidden states."""
        return self.sizes.dim

    @property
    def sizes_config(self) -> dict[str, Any]:
        return dict(vars(self.sizes))

    @torch.no_grad()
    def start_from(self, teacher: Teacher) -> None:
        """Take over the teacher's condition embedding, blocks, norm and head over codes.

        The input projection reads codes where the teacher looks tokens up, so it, the data/noise embedding and the
        continuous head have no counterpart.
        """
        if not isinstance(teacher, LlamaGenTeacher):
            raise TypeError(f"teacher: got {type(teacher).__name__}, expected a LlamaGenTeacher to start from")
        source = teacher.state_dict()
        own = self.state_dict()
        for name, value in own.items():
            if name in source and not name.startswith("tok_embeddings."):
                value[: len(source[name])].copy_(source[name])  # a teacher without guidance has one label row fewer

    def features(self, condition: Condition, x: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        tokens, valid = self._condition_tokens(condition)
        width = tokens.shape[1]
        is_data = self.n_d_embed(self.data_levels(t, len(x), width))
        sequence = torch.cat((tokens, self.read(self.tok_embeddings, x.to(self.dtype))), dim=1) + is_data
        mask = padded_mask(valid, sequence.shape[1])
        x, branch = self._run(sequence, self._sequence(sequence.shape[1], MaskedAttention(mask)))
        hidden = x + branch
        if valid is None:
            label = tokens[:, 0]
        else:
            weight = valid[..., None].to(tokens.dtype)
            label = (tokens * weight).sum(1) / weight.sum(1).clamp_min(1)
        return hidden[:, width:], label

    def code_logits(self, hidden: Tensor, context: Tensor) -> Tensor:
        return self.output(self.norm(hidden)).float()

    def continuous(self, hidden: Tensor, context: Tensor) -> Tensor:
        return self.final_layer_conti(hidden, context).float()


class LlamaGenFlowNetwork(_LlamaGenNetwork, FlowNetwork):
    """DD2's generator or guidance network of LlamaGen.

    An MLP on R^d stands where the teacher looks tokens up, so that noise and continuous tokens can be read
    (`embedding_error` is what DD2's stage 0 fits first).

    Args:
        teacher: as in `Student`, with a LlamaGen tokenizer.
        head_width, head_depth, time, recycles: as in `FlowNetwork`.
        sizes: of the transformer, by their official names; those left out are the teacher's.
    """

    looks_up = True

    def __init__(
        self,
        teacher: LlamaGenTeacher,
        *,
        head_width: int = 1024,
        head_depth: int = 3,
        time: float = 1.0,
        recycles: int = 0,
        **sizes: Any,
    ) -> None:
        own = LlamaGenSizes(**{**vars(teacher.sizes), **sizes})
        self.sizes = own
        super().__init__(teacher, head_width=head_width, head_depth=head_depth, time=time, recycles=recycles)
        self._add_layers(own, teacher.num_codes, unconditional=own.class_dropout_prob > 0)
        self.tok_embeddings = nn.Sequential(
            Linear(teacher.code_dim, own.dim), nn.GELU(approximate="tanh"), Linear(own.dim, own.dim)
        )
        self.add_head(own.dim)
        self.add_recycling(own.dim)

    def derive_buffers(self) -> None:
        """Fill what follows from the teacher and the sizes and is in no file."""
        super().derive_buffers()
        self._derive_rope(self.codebook.device)

    @property
    def sizes_config(self) -> dict[str, Any]:
        return dict(vars(self.sizes))

    def features(self, condition: Condition, tokens: Tensor) -> Tensor:
        self.teacher.check_training_condition(condition)
        return self.hidden(condition, self.read(self.tok_embeddings, tokens[:, :-1].to(self.dtype)))

    def code_logits(self, features: Tensor) -> Tensor:
        return self.output(features).float()

    def embedding_error(self) -> Tensor:
        """Mean squared distance of every code's MLP value to the teacher's table: what stage 0 fits first."""
        table = cast(LlamaGenTeacher, self.teacher).tok_embeddings.weight
        return F.mse_loss(self.tok_embeddings(self.codebook.to(self.dtype)).float(), table.float())
