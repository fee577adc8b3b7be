"""A small LlamaGen and a small VAR that learn the digits on first use: the families' own networks and tokenizers.

What is distilled from them is distilled by the code, and through the same stages, as from the published teachers; on
real images, in minutes.

Dimensions: B batch, N tokens, D code dimension, S latent side.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ddfast import seeds
from ddfast.config import (
    DigitsConvTokenizerConfig,
    DigitsLlamaGenTeacherConfig,
    DigitsTeacherConfig,
    DigitsVARTeacherConfig,
    TrainConfig,
)
from ddfast.errors import DDFastError
from ddfast.models.autoregressive import SamplingDefaults
from ddfast.models.digits.data import CANVAS, NUM_CLASSES
from ddfast.models.digits.files import OfDigits
from ddfast.models.digits.training import Quantising, Rounded, fit_teacher, fit_tokenizer
from ddfast.models.llamagen.files import LlamaGenFamily, swiglu_width
from ddfast.models.llamagen.network import LlamaGenSizes, LlamaGenTeacher
from ddfast.models.llamagen.tokenizer import LlamaGenTokenizer
from ddfast.models.tokenizers import ImageTokenizer, TokenizedTeacher
from ddfast.models.var.files import VARFamily
from ddfast.models.var.network import VARSizes, VARTeacher
from ddfast.models.var.tokenizer import Phi, VARTokenizer
from ddfast.models.vqgan import ConvSizes
from ddfast.progress import Progress


class DigitsLlamaGenTeacher(LlamaGenTeacher):
    """A LlamaGen of the digits."""


class DigitsVARTeacher(VARTeacher):
    """A VAR of the digits."""


class _SmallFamily(OfDigits):
    """What both have in common: an image tokenizer is trained, then the transformer over its codes."""

    @abstractmethod
    def _tokenizer(self, config: TrainConfig) -> ImageTokenizer:
        """The tokenizer, its weights random."""

    @abstractmethod
    def _teacher(self, tokenizer: Any, config: TrainConfig) -> TokenizedTeacher:
        """The teacher of a tokenizer, its weights random."""

    @abstractmethod
    def _quantising(self, tokenizer: Any) -> Quantising:
        """The tokenizer as its training calls it."""

    @abstractmethod
    def _logits(self, teacher: Any, labels: Tensor, codes: Tensor) -> Tensor:
        """Teacher-forced [B, N, V]; some labels are "no condition"."""

    def trained(self, config: TrainConfig, progress: Progress | None = None) -> TokenizedTeacher:
        assert isinstance(config.tokenizer, DigitsConvTokenizerConfig)
        assert isinstance(config.teacher, DigitsTeacherConfig)
        how: dict[str, Any] = {"seed": config.seed, "progress": progress}
        seeds.seed_all(config.seed)
        tokenizer = self._tokenizer(config)
        fit_tokenizer(tokenizer, self._quantising(tokenizer), config.tokenizer, **how).requires_grad_(False)
        seeds.seed_all(config.seed)
        teacher = self._teacher(tokenizer, config)
        channels = tokenizer.sizes.image_channels
        return fit_teacher(teacher, partial(self._logits, teacher), config.teacher, channels=channels, **how)


class DigitsLlamaGenFamily(_SmallFamily, LlamaGenFamily):
    """The small LlamaGen, in LlamaGen's layout."""

    name, title = "digits-llamagen", "LlamaGen of digits"
    teacher = DigitsLlamaGenTeacher
    config, tokenizer_config = DigitsLlamaGenTeacherConfig, DigitsConvTokenizerConfig

    def untrained(self, config: TrainConfig) -> DigitsLlamaGenTeacher:
        return self._teacher(self._tokenizer(config), config)

    def _tokenizer(self, config: TrainConfig) -> LlamaGenTokenizer:
        settings = config.tokenizer
        assert isinstance(settings, DigitsConvTokenizerConfig)
        return LlamaGenTokenizer(
            num_codes=settings.num_codes,
            code_dim=settings.code_dim,
            sizes=_conv_sizes(settings, settings.width),
            usage_slots=0,
        )

    def _teacher(self, tokenizer: LlamaGenTokenizer, config: TrainConfig) -> DigitsLlamaGenTeacher:
        settings = config.teacher
        assert isinstance(settings, DigitsLlamaGenTeacherConfig)
        sizes = LlamaGenSizes(
            dim=settings.width,
            n_layer=settings.depth,
            n_head=settings.heads,
            n_kv_head=settings.heads,
            ffn_dim=swiglu_width(settings.width),
            block_size=(CANVAS // tokenizer.downsampling) ** 2,
            num_classes=NUM_CLASSES,
            class_dropout_prob=settings.class_dropout,
        )
        return DigitsLlamaGenTeacher(tokenizer, sizes, defaults=SamplingDefaults(**settings.sampling()))

    def _quantising(self, tokenizer: LlamaGenTokenizer) -> Quantising:
        def latents(images: Tensor) -> Tensor:
            return F.normalize(rearrange(_latents(tokenizer, images), "b d h w -> b (h w) d"), dim=-1)

        def rounded(latents: Tensor, rounding: bool) -> Rounded:
            return Rounded.of(latents, tokenizer.codebook(), rounding)

        def decode(latents: Tensor) -> Tensor:
            side = CANVAS // tokenizer.downsampling
            return tokenizer.decode_latents(rearrange(latents, "b (h w) d -> b d h w", h=side))

        codebook = tokenizer.quantize.embedding.weight.detach()
        return Quantising(latents=latents, rounded=rounded, decode=decode, codebook=codebook)

    def _logits(self, teacher: DigitsLlamaGenTeacher, labels: Tensor, codes: Tensor) -> Tensor:
        return teacher.output(teacher.hidden(labels, teacher.tok_embeddings(codes[:, :-1])))


class DigitsVARFamily(_SmallFamily, VARFamily):
    """The small VAR, in VAR's layout."""

    name, title = "digits-var", "VAR of digits"
    teacher = DigitsVARTeacher
    config, tokenizer_config = DigitsVARTeacherConfig, DigitsConvTokenizerConfig

    def untrained(self, config: TrainConfig) -> DigitsVARTeacher:
        return self._teacher(self._tokenizer(config), config)

    def _tokenizer(self, config: TrainConfig) -> VARTokenizer:
        settings, scales = config.tokenizer, config.teacher
        assert isinstance(settings, DigitsConvTokenizerConfig)
        assert isinstance(scales, DigitsVARTeacherConfig)
        made = VARTokenizer(
            patch_nums=scales.patch_nums,
            num_codes=settings.num_codes,
            code_dim=settings.code_dim,
            sizes=_conv_sizes(settings, settings.code_dim),
        )
        side = CANVAS // made.downsampling
        if made.side != side:
            raise DDFastError(
                f"--teacher.patch-nums: got {scales.patch_nums}, expected the last to be {side}, the side of the "
                f"latents of {settings.levels} --tokenizer.levels"
            )
        for layer in made.modules():
            if isinstance(layer, Phi):  # it starts as the identity: random ones cost more steps than there are
                assert layer.bias is not None
                nn.init.dirac_(layer.weight)
                nn.init.zeros_(layer.bias)
        return made

    def _teacher(self, tokenizer: VARTokenizer, config: TrainConfig) -> DigitsVARTeacher:
        settings = config.teacher
        assert isinstance(settings, DigitsVARTeacherConfig)
        sizes = VARSizes(
            num_classes=NUM_CLASSES,
            depth=settings.depth,
            embed_dim=settings.width,
            num_heads=settings.heads,
        )
        return DigitsVARTeacher(tokenizer, sizes, defaults=SamplingDefaults(**settings.sampling()))

    def _quantising(self, tokenizer: VARTokenizer) -> Quantising:
        return Quantising(
            latents=partial(_latents, tokenizer),
            rounded=partial(_rounded_by_scales, tokenizer),
            decode=tokenizer.decode_latents,
            codebook=tokenizer.quantize.embedding.weight.detach(),
        )

    def _logits(self, teacher: DigitsVARTeacher, labels: Tensor, codes: Tensor) -> Tensor:
        inputs = teacher.tokenizer.teacher_forcing_input(teacher.codebook[codes])
        return teacher.head(teacher.hidden(teacher.labels(labels), inputs))


def _conv_sizes(settings: DigitsConvTokenizerConfig, latent_channels: int) -> ConvSizes:
    return ConvSizes(
        channels=settings.width,
        multipliers=(1,) * settings.levels,
        blocks=settings.blocks,
        latent_channels=latent_channels,
    )


def _latents(tokenizer: ImageTokenizer, images: Tensor) -> Tensor:
    """Unquantised latents [B, D, S, S] of grey images [B, 1, 16, 16] in [0, 1]."""
    return tokenizer.latents((2 * images - 1).expand(-1, tokenizer.sizes.image_channels, -1, -1))


def _rounded_by_scales(tokenizer: VARTokenizer, latents: Tensor, rounding: bool) -> Rounded:
    """Latents [B, D, S, S] as the sum of their scales; what a scale compares is what the scales before it left over.

    After every scale the latents reached and those wanted are drawn to each other, as VAR trains its tokenizer; what
    moves on the side of the codes is phi, as the codebook follows the vectors.
    """
    wanted = latents.detach()
    if not rounding:
        rest, vectors = wanted, []
        for scale in range(len(tokenizer.patch_nums)):
            vectors.append(tokenizer.next_input(scale, rest))
            rest = rest - tokenizer.contribution(scale, vectors[-1]).detach()
        return Rounded.warm_up(latents, torch.cat([vector.flatten(0, 1) for vector in vectors]))
    codes, reached = tokenizer.quantise(wanted)
    rests = [wanted, *(wanted - after.detach() for after in reached[:-1])]
    vectors = [tokenizer.next_input(scale, rest).flatten(0, 1) for scale, rest in enumerate(rests)]
    losses = [F.mse_loss(after, wanted) + 0.25 * F.mse_loss(latents, after.detach()) for after in reached]
    return Rounded(
        latents=latents + (reached[-1] - latents).detach(),
        vectors=torch.cat(vectors),
        codes=torch.cat([of_scale.flatten() for of_scale in tokenizer.split_scales(codes)]),
        loss=torch.stack(losses).mean(),
    )
