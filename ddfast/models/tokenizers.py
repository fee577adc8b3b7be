"""What VAR's and LlamaGen's image tokenizers have in common, in the parameter layout of the official files.

Dimensions: B batch, N tokens, V codes, D code dimension, H height, W width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from ddfast.models.inputs import as_images
from ddfast.models.layers import Conv2d, Embedding, weights_dtype
from ddfast.models.protocol import Teacher
from ddfast.models.vqgan import ConvSizes, Decoder, Encoder, Naming

_PIXELS = 64 * 256 * 256
"""Of images that are decoded at a time: for as many, 20 GiB are counted with VAR's decoder."""


class Quantizer(nn.Module):
    """What official files keep under `quantize`: the codes, statistics of their use, and VAR's phi layers."""

    embedding: nn.Embedding

    def __init__(self, num_codes: int, code_dim: int) -> None:
        super().__init__()
        self.embedding = Embedding(num_codes, code_dim)
        nn.init.normal_(self.embedding.weight)


class ImageTokenizer(nn.Module, ABC):
    """Images to codes and back: encoder, 1x1 or 3x3 convolutions around the codebook, decoder.

    Args:
        sizes: of encoder and decoder.
        naming: parameter names of the family.
        num_codes: V.
        code_dim: D.
        kernel: of the convolutions on both sides of the codebook.

    Attributes:
        downsampling: image pixels per latent pixel, along one side.
    """

    def __init__(self, sizes: ConvSizes, naming: Naming, *, num_codes: int, code_dim: int, kernel: int) -> None:
        super().__init__()
        self.sizes = sizes
        self.downsampling = 2 ** (len(sizes.multipliers) - 1)
        self.encoder, self.decoder = Encoder(sizes, naming), Decoder(sizes, naming)
        self.quantize = Quantizer(num_codes, code_dim)
        self.quant_conv = Conv2d(sizes.latent_channels, code_dim, kernel, padding=kernel // 2)
        self.post_quant_conv = Conv2d(code_dim, sizes.latent_channels, kernel, padding=kernel // 2)

    @abstractmethod
    def codebook(self) -> Tensor:
        """The codes that latents are compared with and that the decoder reads, float32 [V, D]."""

    @abstractmethod
    def codes_of(self, latents: Tensor) -> Tensor:
        """Unquantised latents [B, D, h, w] to codes int64 [B, N]."""

    @abstractmethod
    def decode(self, embeddings: Tensor) -> Tensor:
        """Embeddings [B, N, D], or codes [B, N] of any integer type, to raw images [B, 3, H, W], about [-1, 1]."""

    def encode(self, images: Any, *, low: float = -1.0) -> Tensor:
        """Images to codes int64 [B, N].

        Args:
            images: float [B, 3, H, W] in [low, 1], uint8, or PIL's (`ddfast.models.inputs.as_images`).
            low: 0 or -1.

        Raises:
            TypeError, ValueError: they are something else, out of range, or of a size that does not fit.
        """
        device = self.quant_conv.weight.device
        images = as_images(images, self.sizes.image_channels, low=low, device=device)
        with weights_dtype(images):
            return self.codes_of(self.latents(images if low else 2 * images - 1))

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Settings that the tensors do not tell."""

    def latents(self, images: Tensor) -> Tensor:
        """Unquantised latents [B, D, h, w] of images [B, 3, H, W] in [-1, 1]."""
        sides = images.shape[-2:]
        if (
            images.ndim != 4
            or images.shape[1] != self.sizes.image_channels
            or any(s % self.downsampling for s in sides)
        ):
            channels = self.sizes.image_channels
            expected = f"[B, {channels}, H, W] with H and W multiples of {self.downsampling}"
            raise ValueError(f"images: got shape {list(images.shape)}, expected {expected}")
        return self.quant_conv(self.encoder(images))

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Quantised latents [B, D, h, w] to raw images, of large ones some at a time: they share nothing."""
        pixels = latents[0, 0].numel() * self.downsampling**2 if len(latents) else 1
        parts = latents.split(max(_PIXELS // pixels, 1))
        images = [self.decoder(self.post_quant_conv(part)) for part in parts]
        return images[0] if len(images) == 1 else torch.cat(images)


class TokenizedTeacher(Teacher):
    """A teacher whose codebook, and whose way to images in [0, 1] and back, is an `ImageTokenizer`'s."""

    tokenizer: ImageTokenizer

    def encode(self, images: Any) -> Tensor:
        codes = self.tokenizer.encode(images, low=0.0)
        if codes.shape[1] != self.num_tokens:
            got = f"images of {codes.shape[1]} tokens"
            raise ValueError(f"images: got {got}, expected {self.num_tokens}: resize them to what the teacher makes")
        return codes

    def decode(self, codes: Any, *, clamp: bool = True) -> Tensor:
        images = self.tokenizer.decode(self.tokens(codes))
        return (images.clamp(-1, 1) + 1) / 2 if clamp else images
