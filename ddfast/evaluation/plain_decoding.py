"""AR decoding in plain PyTorch, as the published scripts do it: the baseline that speed-ups are counted from.

There is a KV cache, and nothing beyond what such a script does: the streams with and without condition are rows of one
batch, the head runs for both, guidance mixes their logits, a top-k and a sort filter, `torch.multinomial` draws. With
`compile=True` a step is one CUDA graph, by torch.compile, as gpt-fast does it.

The weights are read off the teacher's modules by their names. Of its code only layers that are PyTorch's own are
called, and between VAR's scales the tokenizer: a faster `Teacher.generate` leaves this baseline where it was.

Sources, of what is computed and in which order: FoundationVision/LlamaGen `autoregressive/models/{gpt,generate}.py`,
FoundationVision/VAR `models/var.py`, and for `compile=True` pytorch-labs/gpt-fast `generate.py`.

Dimensions: B batch, R rows (B, or 2B with guidance), S new positions, L positions of the cache, N tokens, G tokens of
one group, V codes, D code dimension, W width, H heads, K head dimension.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ddfast import private_api
from ddfast.models.autoregressive import Condition, SamplingDefaults, condition_size
from ddfast.models.decoding import Sampler
from ddfast.models.llamagen.network import LlamaGenTeacher, rope_table
from ddfast.models.protocol import Teacher
from ddfast.models.transformer import TransformerTeacher
from ddfast.models.var.network import VARTeacher
from ddfast.ops.flow_sample import DEFAULT_SOLVER, DEFAULT_STEPS, flow_sample_reference


def plain_decoder(teacher: Teacher, *, compile: bool = False) -> PlainDecoder:
    """The plain decoder of a teacher.

    LlamaGen and the transformer of the digits: a cache of the full length, all of which attention reads under a mask.
    VAR: a cache that grows by `torch.cat`. Other teachers: no cache, the whole sequence through `Teacher.logits`.

    Args:
        teacher: any; its defaults are the sampling settings.
        compile: torch.compile(mode="reduce-overhead", fullgraph=True) of a step: for LlamaGen and the digits from the
            newest code to the next one, for VAR the blocks and the head, anew for every scale.

    Raises:
        ValueError: `compile` for a teacher without a decoder of its own.
    """
    if isinstance(teacher, LlamaGenTeacher):
        return _LlamaGenDecoder(teacher, compile)
    if isinstance(teacher, VARTeacher):
        return _VARDecoder(teacher, compile)
    if isinstance(teacher, TransformerTeacher) and set(teacher.groups) == {1}:
        return _TransformerDecoder(teacher, compile)
    if compile:
        raise ValueError(f"compile: got True for a {type(teacher).__name__}, which is decoded without a cache")
    return _UncachedDecoder(teacher, compile)


class PlainDecoder(ABC):
    """One teacher's plain decoder; `plain_decoder` makes it.

    With `compile`, graphs are compiled in the first call of a batch size, and the caches outlive it.
    """

    scale: float
    guided: bool
    keys: list[Tensor]
    values: list[Tensor]

    def __init__(self, teacher: Any, compile: bool) -> None:
        self.teacher, self.compiled = teacher, compile
        self.keys, self.values = [], []

    @torch.no_grad()
    def generate(
        self,
        condition: Condition,
        *,
        sampler: Sampler = "multinomial",
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        cfg_scale: float | None = None,
        stop: int | None = None,
    ) -> Tensor:
        """Decode images, from the same distribution as `Teacher.generate` with the teacher's defaults.

        Args:
            condition: int64 [B], or text.
            sampler: "multinomial", "greedy", or "flow": the reference of `flow_sample`, in eager PyTorch.
            noise: float32 [B, N, D], for "flow".
            generator: randomness of "multinomial"; a compiled step draws from PyTorch's global one.
            cfg_scale: None takes the teacher's default.
            stop: decode up to this token (it ends a group) instead of all N.

        Returns:
            int64 [B, N], or up to `stop`.

        Raises:
            ValueError: an unknown `sampler`; `stop` ends no group; `noise` is missing or not wanted; "flow" in a
                compiled step, whose checks of its inputs no graph can hold; labels out of range.
        """
        teacher: Teacher = self.teacher
        teacher.check_condition(condition)
        starts = teacher.group_starts()
        stop = teacher.num_tokens if stop is None else stop
        if stop not in starts:
            raise ValueError(f"stop: got {stop} tokens, expected the end of a group: one of {starts}")
        if sampler not in ("multinomial", "greedy", "flow"):
            raise ValueError(f"sampler: got {sampler!r}, expected 'multinomial', 'greedy' or 'flow'")
        if (sampler == "flow") != (noise is not None):
            raise ValueError(f"noise: got {'a tensor' if noise is not None else None} with sampler {sampler!r}")
        if sampler == "flow" and self.compiled:
            raise ValueError("sampler: got 'flow' with compile=True, expected 'multinomial' or 'greedy'")
        cfg_scale = teacher.defaults.cfg_scale if cfg_scale is None else float(cfg_scale)
        scales = [teacher.group_cfg_scale(cfg_scale, group) for group in range(starts.index(stop))]
        self.guided = any(scale != 1.0 for scale in scales)
        codes = torch.zeros(
            condition_size(condition), teacher.num_tokens, dtype=torch.int64, device=teacher.codebook.device
        )
        # VAR has a graph per scale, and torch.compile by itself stops at eight.
        limit = private_api.recompilations(64) if self.compiled else contextlib.nullcontext()
        with limit:
            self.begin(condition, stop)
            for group, (scale, (first, last)) in enumerate(zip(scales, pairwise(starts), strict=False)):
                self.scale = scale
                here = None if noise is None else noise[:, first:last]
                codes[:, first:last] = self.next_codes(codes, group, sampler, generator, here)
        if not self.compiled:
            self.keys, self.values = [], []
        return codes[:, :stop]

    def next_codes(
        self, codes: Tensor, group: int, sampler: Sampler, generator: torch.Generator | None, noise: Tensor | None
    ) -> Tensor:
        """Codes int64 [B, G] of a group, from those of earlier groups in `codes` [B, N]; noise [B, G, D]."""
        logits = self.sampled_logits(self.logits(codes, group))
        if sampler == "flow":
            assert noise is not None
            log_probs = logits.log_softmax(-1)
            return flow_sample_reference(log_probs, noise, self.teacher.codebook, DEFAULT_STEPS, DEFAULT_SOLVER)
        probs = logits.softmax(-1)
        if sampler == "greedy":
            return probs.argmax(-1)
        return torch.multinomial(probs.flatten(0, 1), 1, generator=generator).view(probs.shape[:-1])

    def sampled_logits(self, logits: Tensor) -> Tensor:
        """[R, G, V] as the network gives them to [B, G, V], guided and filtered."""
        if self.guided:
            cond, uncond = logits.chunk(2)
            logits = uncond + self.scale * (cond - uncond)
        return _filtered(logits, self.teacher.defaults)

    @abstractmethod
    def begin(self, condition: Condition, stop: int) -> None:
        """Prepare for images of `stop` tokens under `condition`, with rows for both streams if `guided`."""

    @abstractmethod
    def logits(self, codes: Tensor, group: int) -> Tensor:
        """Logits float32 [R, G, V] of a group, whose earlier codes are in `codes` [B, N]; called for 0, 1, 2, ..."""

    def _twice(self, x: Tensor) -> Tensor:
        """[B, ...] to [R, ...]: both streams read the same codes."""
        return torch.cat((x, x)) if self.guided else x


def _filtered(logits: Tensor, settings: SamplingDefaults) -> Tensor:
    """Logits [B, G, V] by the temperature, -inf where top-k and top-p leave them out."""
    logits = logits / settings.temperature
    if 0 < settings.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(settings.top_k).values[..., -1:], -math.inf)
    if 0.0 < settings.top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(-1)
        outside = probs.cumsum(-1) - probs >= settings.top_p
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -math.inf)
    return logits


class _UncachedDecoder(PlainDecoder):
    """A teacher of whose inside nothing is known: the whole sequence at every step."""

    def begin(self, condition: Condition, stop: int) -> None:
        self.condition, self.starts = condition, self.teacher.group_starts()

    def logits(self, codes: Tensor, group: int) -> Tensor:
        here = slice(self.starts[group], self.starts[group + 1])
        streams = (False, True) if self.guided else (False,)
        return torch.cat([self.teacher.logits(self.condition, codes, unconditional=flag)[:, here] for flag in streams])


class _TokenDecoder(PlainDecoder):
    """One token per step: keys and values are written into a cache of the full length, and attention reads all of it.

    Attributes:
        sizes: depth, key heads and K of the cache.
        mask: bool [1 or R, L, L], who sees whom.
        position: int64 [S], where the new positions are.
    """

    sizes: tuple[int, int, int]
    mask: Tensor
    position: Tensor

    def __init__(self, teacher: Teacher, compile: bool) -> None:
        super().__init__(teacher, compile)
        self.greedy = torch.zeros((), dtype=torch.bool, device=teacher.codebook.device)
        if compile:
            self.step = torch.compile(self._step, mode="reduce-overhead", fullgraph=True, dynamic=False)

    @abstractmethod
    def condition_tokens(self, condition: Condition) -> tuple[Tensor, Tensor | None]:
        """Tokens [R, C, W] of the condition, and which are no padding, bool [R, C] (None: all of them)."""

    @abstractmethod
    def embedded(self, code: Tensor, position: Tensor) -> Tensor:
        """The newest code int64 [B, 1] as the network reads it at `position` [1]: [B, 1, W]."""

    @abstractmethod
    def network(self, x: Tensor, position: Tensor) -> Tensor:
        """Tokens [R, S, W] at `position` [S] to the logits [R, 1, V] of the last."""

    def begin(self, condition: Condition, stop: int) -> None:
        self.first, valid = self.condition_tokens(condition)
        rows, width, _ = self.first.shape
        length = -(-(width + stop) // 8) * 8  # as in gpt-fast and LlamaGen
        mask = torch.ones(1, length, length, dtype=torch.bool, device=self.first.device).tril()
        if valid is not None:  # padding is seen by itself alone
            itself = torch.eye(length, dtype=torch.bool, device=mask.device)
            mask = mask & F.pad(valid, (0, length - width), value=True)[:, None] | itself
        self.position = torch.arange(width, dtype=torch.int64, device=mask.device)
        depth, heads, head_dim = self.sizes
        shape = (rows, heads, length, head_dim)
        if self.compiled and self.keys and self.keys[0].shape == shape:
            self.mask.copy_(mask)  # a CUDA graph holds on to the addresses that it was recorded with
            return
        self.keys, self.values = ([self.first.new_zeros(shape) for _ in range(depth)] for _ in range(2))
        self.mask = mask
        if self.compiled:
            for tensor in (*self.keys, *self.values, self.mask, self.greedy):
                private_api.mark_static_address(tensor)

    def logits(self, codes: Tensor, group: int) -> Tensor:
        if group == 0:
            logits = self.network(self.first, self.position)
            self.position = self.position[-1:].clone()
            return logits
        self.position += 1
        return self._logits_after(codes[:, group - 1 : group], self.position)

    def _logits_after(self, code: Tensor, position: Tensor) -> Tensor:
        return self.network(self._twice(self.embedded(code, position)), position)

    def next_codes(
        self, codes: Tensor, group: int, sampler: Sampler, generator: torch.Generator | None, noise: Tensor | None
    ) -> Tensor:
        if not self.compiled or group == 0:
            return super().next_codes(codes, group, sampler, generator, noise)
        self.greedy.fill_(sampler == "greedy")
        self.position += 1
        torch.compiler.cudagraph_mark_step_begin()  # what the graph returned last time has been copied into `codes`
        return self.step(codes[:, group - 1 : group].clone(), self.position)

    def _step(self, code: Tensor, position: Tensor) -> Tensor:
        """The newest code [B, 1] to the next one, in one graph.

        `torch.multinomial` waits for the device: as in gpt-fast, the draw is a race of exponentials. Greedy decoding
        is the race without randomness, in the same graph, so that what is checked is what is timed.
        """
        probs = self.sampled_logits(self._logits_after(code, position)).softmax(-1)
        race = torch.where(self.greedy, 1.0, torch.empty_like(probs).exponential_())
        return (probs / race).argmax(-1)

    def _attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, position: Tensor) -> Tensor:
        """New query [R, S, H, K], key and value [R, S, key heads, K] to the mixed values [R, S, H K]."""
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, position] = key.transpose(1, 2)
        values[:, :, position] = value.transpose(1, 2)
        mask, grouped = self.mask[:, None, position], query.shape[2] != key.shape[2]
        mixed = F.scaled_dot_product_attention(query.transpose(1, 2), keys, values, attn_mask=mask, enable_gqa=grouped)
        return mixed.transpose(1, 2).flatten(2)


class _LlamaGenDecoder(_TokenDecoder):
    """RMSNorm, rotary embedding and SwiGLU, after a class token or a caption."""

    teacher: LlamaGenTeacher

    def __init__(self, teacher: LlamaGenTeacher, compile: bool) -> None:
        super().__init__(teacher, compile)
        sizes = teacher.sizes
        self.sizes = (sizes.n_layer, sizes.n_kv_head, sizes.dim // sizes.n_head)
        self.rope = rope_table(sizes, teacher.codebook.device)  # [C + N, K / 2, 2]
        if compile:
            private_api.mark_static_address(self.rope)

    def condition_tokens(self, condition: Condition) -> tuple[Tensor, Tensor | None]:
        teacher, embedding = self.teacher, cast(Any, self.teacher.cls_embedding)
        if isinstance(condition, Tensor):
            labels = condition
            if self.guided:
                labels = torch.cat((labels, torch.full_like(labels, teacher.num_classes)))
            return embedding.embedding_table(labels)[:, None], None
        features, valid = condition
        features = features * valid[..., None]
        if self.guided:
            features = torch.cat((features, embedding.uncond_embedding.expand_as(features)))
        first, second = embedding.cap_proj["fc1"], embedding.cap_proj["fc2"]
        tokens = second(F.gelu(first(features.to(first.weight.dtype)), approximate="tanh"))
        return tokens, self._twice(valid.bool())

    def embedded(self, code: Tensor, position: Tensor) -> Tensor:
        return self.teacher.tok_embeddings(code)

    def network(self, x: Tensor, position: Tensor) -> Tensor:
        sizes, rope = self.teacher.sizes, self.rope[position][:, None]  # [S, 1, K / 2, 2]
        heads = (sizes.n_head, sizes.n_kv_head, sizes.n_kv_head)
        for layer, block in enumerate(cast(Any, self.teacher.layers)):
            attention, feed_forward = block.attention, block.feed_forward
            mixed = attention.wqkv(_rms_norm(x, block.attention_norm)).unflatten(-1, (-1, sizes.dim // sizes.n_head))
            query, key, value = mixed.split(heads, dim=2)
            x = x + attention.wo(self._attend(layer, _rotated(query, rope), _rotated(key, rope), value, position))
            normed = _rms_norm(x, block.ffn_norm)
            w1, w3 = feed_forward.w13.weight.chunk(2)
            x = x + feed_forward.w2(F.silu(F.linear(normed, w1)) * F.linear(normed, w3))
        return self.teacher.output(_rms_norm(x[:, -1:], self.teacher.norm)).float()


def _rms_norm(x: Tensor, norm: Any) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)).type_as(x) * norm.weight


def _rotated(x: Tensor, rope: Tensor) -> Tensor:
    """Complex multiplication of interleaved pairs in real numbers, float32: x [R, S, H, K], rope [S, 1, K / 2, 2]."""
    (real, imag), (cos, sin) = x.float().unflatten(-1, (-1, 2)).unbind(-1), rope.unbind(-1)
    return torch.stack((real * cos - imag * sin, imag * cos + real * sin), dim=-1).flatten(-2).type_as(x)


class _TransformerDecoder(_TokenDecoder):
    """The digits' transformer, which reads code embeddings at learnt positions."""

    teacher: TransformerTeacher

    def __init__(self, teacher: TransformerTeacher, compile: bool) -> None:
        super().__init__(teacher, compile)
        body = teacher.body
        self.sizes = (body.depth, body.heads, body.width // body.heads)

    def condition_tokens(self, condition: Condition) -> tuple[Tensor, Tensor | None]:
        teacher = self.teacher
        assert isinstance(condition, Tensor)
        labels = condition
        if self.guided:
            labels = torch.cat((labels, torch.full_like(labels, teacher.num_classes)))
        return teacher.class_embedding(labels)[:, None] + teacher.position_embedding[:1], None

    def embedded(self, code: Tensor, position: Tensor) -> Tensor:
        return self.teacher.input(self.teacher.codebook[code]) + self.teacher.position_embedding[position]

    def network(self, x: Tensor, position: Tensor) -> Tensor:
        _, heads, head_dim = self.sizes
        for layer, block in enumerate(cast(Any, self.teacher.body.blocks)):
            query, key, value = block.qkv(block.attention_norm(x)).unflatten(-1, (3, heads, head_dim)).unbind(2)
            x = x + block.project(self._attend(layer, query, key, value, position))
            x = x + block.contract(F.gelu(block.expand(block.mlp_norm(x)), approximate="tanh"))
        return self.teacher.head(self.teacher.body.norm(x[:, -1:])).float()


class _VARDecoder(PlainDecoder):
    """One scale per step: keys and values are joined to those of earlier scales, all of which attention sees."""

    teacher: VARTeacher

    def __init__(self, teacher: VARTeacher, compile: bool) -> None:
        super().__init__(teacher, compile)
        self.step = self.network
        if compile:
            self.step = torch.compile(self.network, mode="reduce-overhead", fullgraph=True, dynamic=False)

    def begin(self, condition: Condition, stop: int) -> None:
        teacher = self.teacher
        assert isinstance(condition, Tensor)
        labels = condition
        if self.guided:
            labels = torch.cat((labels, torch.full_like(labels, teacher.num_classes)))
        self.label = teacher.class_emb(labels)
        sizes = torch.tensor(teacher.groups, dtype=torch.int64, device=labels.device)
        self.places = teacher.lvl_embed.weight.repeat_interleave(sizes, dim=0) + teacher.pos_1LC[0]
        side = teacher.tokenizer.side
        self.f_hat = teacher.codebook.new_zeros(len(condition), teacher.code_dim, side, side)
        self.starts = teacher.group_starts()
        self.keys, self.values = [], []
        if self.compiled:  # until the next mark, what a scale's graph returned, the cache, stays where it is
            torch.compiler.cudagraph_mark_step_begin()

    def logits(self, codes: Tensor, group: int) -> Tensor:
        teacher, tokenizer = self.teacher, self.teacher.tokenizer
        before, first, last = (self.starts[max(group + offset, 0)] for offset in (-1, 0, 1))
        if group == 0:
            x = self.label[:, None] + teacher.pos_start
        else:
            self.f_hat = self.f_hat + tokenizer.contribution(group - 1, teacher.codebook[codes[:, before:first]])
            latents = tokenizer.next_input(group, self.f_hat)
            x = self._twice(teacher.word_embed(latents.to(teacher.word_embed.weight.dtype)))
        x = x + self.places[first:last]
        logits, self.keys, self.values = self.step(x, self.label, self.keys, self.values)
        return logits

    def network(
        self, x: Tensor, label: Tensor, keys: list[Tensor], values: list[Tensor]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Tokens [R, G, W] and the caches [R, H, before, K] of every layer to logits [R, G, V] and the grown caches."""
        teacher, sizes = self.teacher, self.teacher.sizes
        heads, eps, grown_keys, grown_values = sizes.num_heads, sizes.norm_eps, [], []
        shared = teacher.shared_ada_lin(label) if sizes.shared_aln else None
        for layer, block in enumerate(cast(Any, teacher.blocks)):
            modulation = block.ada_lin(label) if shared is None else block.ada_gss.flatten() + shared
            gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation[:, None].chunk(6, dim=-1)
            attention, feed_forward = block.attn, block.ffn
            bias = torch.cat((attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias))
            qkv = F.linear(_normalised(x, eps) * (1 + scale1) + shift1, attention.mat_qkv.weight, bias)
            query, key, value = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            scale = 0.25 / math.sqrt(query.shape[-1])
            if sizes.attn_l2_norm:
                query = F.normalize(query, dim=-1) * attention.scale_mul_1H11.clamp_max(math.log(100)).exp()
                key, scale = F.normalize(key, dim=-1), 1.0
            if keys:
                key, value = torch.cat((keys[layer], key), dim=2), torch.cat((values[layer], value), dim=2)
            grown_keys.append(key)
            grown_values.append(value)
            mixed = F.scaled_dot_product_attention(query, key, value, scale=scale)
            x = x + attention.proj(mixed.transpose(1, 2).flatten(2)) * gamma1
            normed = _normalised(x, eps) * (1 + scale2) + shift2
            x = x + feed_forward.fc2(F.gelu(feed_forward.fc1(normed), approximate="tanh")) * gamma2
        scale_head, shift_head = teacher.head_nm.ada_lin(label)[:, None].chunk(2, dim=-1)
        logits = teacher.head(_normalised(x, eps) * (1 + scale_head) + shift_head).float()
        return logits, grown_keys, grown_values


def _normalised(x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=eps)
