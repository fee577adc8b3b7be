"""The convolutional encoder and decoder of VQGAN, as VAR's and LlamaGen's tokenizers use it.

Both families took it from the same source and differ in parameter names alone, so that one implementation with a
`Naming` serves both and loads either's files as they are. Source: Esser et al. 2021, arXiv 2012.09841.
Dimensions: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from ddfast.config import VQTokenizerConfig
from ddfast.models.checkpoint import AnyTensor
from ddfast.models.layers import Conv2d, GroupNorm


@dataclass(frozen=True, kw_only=True)
class Naming:
    """Parameter names of one family.

    Attributes:
        down, up: list of resolution levels in the encoder and in the decoder.
        block: list of residual blocks in a level.
        middle: the three middle layers.
        fused_qkv: one convolution for query, key and value.
        up_from_finest: the decoder's list starts with the finest level, though the coarsest runs first.
    """

    down: str
    up: str
    block: str
    middle: tuple[str, str, str]
    fused_qkv: bool
    up_from_finest: bool


VAR_NAMING = Naming(
    down="down", up="up", block="block", middle=("block_1", "attn_1", "block_2"), fused_qkv=True, up_from_finest=True
)
LLAMAGEN_NAMING = Naming(
    down="conv_blocks", up="conv_blocks", block="res", middle=("0", "1", "2"), fused_qkv=False, up_from_finest=False
)


@dataclass(frozen=True, kw_only=True)
class ConvSizes:
    """Sizes of an encoder-decoder pair.

    Attributes:
        channels: width of the finest level.
        multipliers: width of every level, finest first, in units of `channels`.
        blocks: residual blocks per level of the encoder; the decoder has one more.
        latent_channels: channels between encoder and decoder.
        image_channels: of the images.
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    latent_channels: int = 256
    image_channels: int = 3

    @classmethod
    def configured(cls, tokenizer: VQTokenizerConfig, latent_channels: int) -> ConvSizes:
        """The sizes that a recipe's tokenizer of random weights has."""
        return cls(
            channels=tokenizer.channels,
            multipliers=tuple(tokenizer.multipliers),
            blocks=tokenizer.blocks,
            latent_channels=latent_channels,
        )

    @classmethod
    def read(cls, tensors: Mapping[str, AnyTensor], naming: Naming) -> ConvSizes:
        """The sizes that a tokenizer's tensors have."""
        pattern = re.compile(rf"encoder\.{naming.down}\.(\d+)\.{naming.block}\.(\d+)\.conv1\.weight")
        found = {tuple(map(int, match.groups())): name for name in tensors if (match := pattern.fullmatch(name))}
        first = tensors["encoder.conv_in.weight"]
        levels = range(max(level for level, _ in found) + 1)
        return cls(
            channels=first.shape[0],
            multipliers=tuple(tensors[found[level, 0]].shape[0] // first.shape[0] for level in levels),
            blocks=max(block for _, block in found) + 1,
            latent_channels=tensors["encoder.conv_out.weight"].shape[0],
            image_channels=first.shape[1],
        )


def _norm(channels: int) -> nn.GroupNorm:
    return GroupNorm(32, channels, eps=1e-6)


def _conv3(inputs: int, outputs: int) -> nn.Conv2d:
    return Conv2d(inputs, outputs, 3, padding=1)


class ResidualBlock(nn.Module):
    """norm, swish, convolution, twice; a 1x1 convolution on the shortcut where the width changes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(inputs), _conv3(inputs, outputs)
        self.norm2, self.conv2 = _norm(outputs), _conv3(outputs, outputs)
        if inputs != outputs:
            self.nin_shortcut = Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + hidden


class PixelAttention(nn.Module):
    """Single-head self-attention over the pixels of [B, C, H, W]."""

    def __init__(self, channels: int, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.norm = _norm(channels)
        if fused:
            self.qkv = Conv2d(channels, 3 * channels, 1)
        else:
            self.q, self.k, self.v = (Conv2d(channels, channels, 1) for _ in range(3))
        self.proj_out = Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normal = self.norm(x)
        parts = self.qkv(normal).chunk(3, dim=1) if self.fused else (self.q(normal), self.k(normal), self.v(normal))
        query, key, value = (part.flatten(2).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0]
        return x + self.proj_out(mixed.transpose(1, 2).reshape(x.shape))


class Resample(nn.Module):
    """Half (`down`) or twice the size, through one 3x3 convolution."""

    def __init__(self, channels: int, down: bool) -> None:
        super().__init__()
        self.down = down
        self.conv = Conv2d(channels, channels, 3, stride=2 if down else 1, padding=0 if down else 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.down:
            return self.conv(F.pad(x, (0, 1, 0, 1)))  # the source pads on the right and at the bottom only
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Stack(nn.Module):
    """What encoder and decoder share: a level of blocks, and the middle."""

    def __init__(self, naming: Naming) -> None:
        super().__init__()
        self.naming = naming

    def _level(self, widths: list[int], coarsest: bool, resample: str | None) -> nn.ModuleDict:
        """Residual blocks of the given widths (input first), attention at the coarsest level, and a resampling."""
        naming = self.naming
        blocks = nn.ModuleList(ResidualBlock(a, b) for a, b in pairwise(widths))
        looks = nn.ModuleList(PixelAttention(width, naming.fused_qkv) for width in widths[1:] if coarsest)
        level = nn.ModuleDict({naming.block: blocks, "attn": looks})
        if resample:
            level[resample] = Resample(widths[-1], resample == "downsample")
        return level

    def _run(self, level: nn.ModuleDict, x: Tensor) -> Tensor:
        blocks, looks = cast(nn.ModuleList, level[self.naming.block]), cast(nn.ModuleList, level["attn"])
        for number, block in enumerate(blocks):
            x = block(x)
            if len(looks):
                x = looks[number](x)
        for name in ("downsample", "upsample"):
            if name in level:
                x = level[name](x)
        return x

    def _middle(self, width: int) -> nn.ModuleDict:
        first, look, second = self.naming.middle
        fused = self.naming.fused_qkv
        return nn.ModuleDict(
            {
                first: ResidualBlock(width, width),
                look: PixelAttention(width, fused),
                second: ResidualBlock(width, width),
            }
        )


class Encoder(_Stack):
    """Images [B, 3, H, W] in [-1, 1] to latents [B, C, H / f, W / f], f = 2^(levels - 1)."""

    def __init__(self, sizes: ConvSizes, naming: Naming) -> None:
        super().__init__(naming)
        widths = [sizes.channels * multiplier for multiplier in sizes.multipliers]
        self.conv_in = _conv3(sizes.image_channels, sizes.channels)
        levels = []
        for level, width in enumerate(widths):
            before = widths[max(level - 1, 0)] if level else sizes.channels
            coarsest = level == len(widths) - 1
            levels.append(self._level([before, *[width] * sizes.blocks], coarsest, None if coarsest else "downsample"))
        setattr(self, naming.down, nn.ModuleList(levels))
        self.mid = self._middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = _conv3(widths[-1], sizes.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in getattr(self, self.naming.down):
            x = self._run(level, x)
        for layer in self.mid.values():
            x = layer(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(_Stack):
    """Latents [B, C, h, w] to raw images [B, 3, f h, f w], about [-1, 1]."""

    def __init__(self, sizes: ConvSizes, naming: Naming) -> None:
        super().__init__(naming)
        widths = [sizes.channels * multiplier for multiplier in sizes.multipliers]
        self.conv_in = _conv3(sizes.latent_channels, widths[-1])
        self.mid = self._middle(widths[-1])
        levels, before = [], widths[-1]
        for level in reversed(range(len(widths))):
            path = [before, *[widths[level]] * (sizes.blocks + 1)]
            levels.append(self._level(path, level == len(widths) - 1, "upsample" if level else None))
            before = widths[level]
        setattr(self, naming.up, nn.ModuleList(reversed(levels) if naming.up_from_finest else levels))
        self.norm_out = _norm(before)
        self.conv_out = _conv3(before, sizes.image_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for layer in self.mid.values():
            x = layer(x)
        levels = getattr(self, self.naming.up)
        for level in reversed(levels) if self.naming.up_from_finest else levels:
            x = self._run(level, x)
        return self.conv_out(F.silu(self.norm_out(x)))
