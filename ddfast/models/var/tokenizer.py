"""VAR's image tokenizer, in the parameter layout of the official files.

Dimensions: B batch, N tokens, V codes, D code dimension, P side of one scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ddfast.models.inputs import as_embeddings
from ddfast.models.layers import Conv2d, weights_dtype
from ddfast.models.tokenizers import ImageTokenizer
from ddfast.models.vqgan import VAR_NAMING, ConvSizes
from ddfast.ops.nearest_code import nearest_code

IMAGENET_SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


class Phi(Conv2d):
    """(1 - ratio) h + ratio conv(h): what VAR applies to every scale's contribution."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__(channels, channels, 3, padding=1)
        self.ratio = ratio

    def forward(self, x: Tensor) -> Tensor:
        return (1 - self.ratio) * x + self.ratio * super().forward(x)


def phi_index(scale: int, num_scales: int, count: int) -> int:
    """Which of `count` phi layers serves one scale: the nearest of equally spaced ticks, as VAR computes it.

    Ten scales and four layers have two exact ties, which the rounding of this float64 arithmetic decides.
    """
    margin = 1 / 3 / count if count == 4 else 1 / 2 / count
    ticks = np.linspace(margin, 1 - margin, count)
    return int(np.abs(ticks - scale / max(num_scales - 1, 1)).argmin())


class VARTokenizer(ImageTokenizer):
    """VAR's multi-scale residual VQVAE: scale k is the code map, at P_k x P_k, of what earlier scales left over.

    Args:
        patch_nums: P of every scale, rising to the latents' own side.
        num_codes, code_dim: V and D, which is also the number of latent channels.
        sizes: of encoder and decoder; its latent channels are D.
        share_quant_resi: number of phi layers; 1: one for all scales, 0: not shared.
        default_qresi_counts: number of phi layers that are not shared; 0: one per scale.
        quant_resi: phi's ratio; 0: phi is the identity.
        quant_conv_ks: kernel of the convolutions around the codebook.
        using_znorm: compare directions instead of distances.
        hit_scales: rows of the statistics buffer that official files carry.

    Source: Tian et al. 2024, arXiv 2404.02905, algorithms 1 and 2.
    """

    def __init__(
        self,
        *,
        patch_nums: tuple[int, ...] = IMAGENET_SCALES,
        num_codes: int = 4096,
        code_dim: int = 32,
        sizes: ConvSizes | None = None,
        share_quant_resi: int = 4,
        default_qresi_counts: int = 0,
        quant_resi: float = 0.5,
        quant_conv_ks: int = 3,
        using_znorm: bool = False,
        hit_scales: int | None = None,
    ) -> None:
        sizes = sizes or ConvSizes(channels=160, latent_channels=code_dim)
        super().__init__(sizes, VAR_NAMING, num_codes=num_codes, code_dim=code_dim, kernel=quant_conv_ks)
        self.patch_nums, self.quant_resi, self.using_znorm = tuple(patch_nums), float(quant_resi), using_znorm
        hits = torch.zeros(len(patch_nums) if hit_scales is None else hit_scales, num_codes, dtype=torch.float32)
        self.quantize.register_buffer("ema_vocab_hit_SV", hits)
        self.phi_count = share_quant_resi or default_qresi_counts or len(patch_nums)
        if abs(self.quant_resi) > 1e-6:
            self.quantize.quant_resi = self._phis(share_quant_resi, code_dim)

    def _phis(self, shared: int, channels: int) -> nn.Module:
        """The phi layers under the official names, which tell how they are shared."""
        phis = nn.ModuleList(Phi(channels, abs(self.quant_resi)) for _ in range(self.phi_count))
        if shared == 0:
            return phis
        return nn.ModuleDict({"qresi": phis[0]} if shared == 1 else {"qresi_ls": phis})

    @property
    def config(self) -> dict[str, Any]:
        return {"patch_nums": list(self.patch_nums), "quant_resi": self.quant_resi, "using_znorm": self.using_znorm}

    @property
    def side(self) -> int:
        """Side of the latents: that of the last scale."""
        return self.patch_nums[-1]

    def codebook(self) -> Tensor:
        return self.quantize.embedding.weight.detach().float()

    def _phi(self, scale: int, x: Tensor) -> Tensor:
        if abs(self.quant_resi) <= 1e-6:
            return x
        phis = self.quantize.quant_resi
        if isinstance(phis, nn.ModuleDict):
            if "qresi" in phis:
                return phis["qresi"](x)
            phis = phis["qresi_ls"]
        return cast(nn.ModuleList, phis)[phi_index(scale, len(self.patch_nums), self.phi_count)](x)

    def contribution(self, scale: int, embeddings: Tensor) -> Tensor:
        """What one scale's embeddings [B, P^2, D] add to the latents: [B, D, side, side]."""
        x = rearrange(embeddings, "b (h w) d -> b d h w", h=self.patch_nums[scale])
        if scale < len(self.patch_nums) - 1:
            x = F.interpolate(x, size=(self.side, self.side), mode="bicubic")
        return self._phi(scale, x)

    def next_input(self, scale: int, f_hat: Tensor) -> Tensor:
        """The latents so far as the AR model reads them before `scale`: [B, D, side, side] to [B, P^2, D]."""
        size = self.patch_nums[scale]
        if size != self.side:
            f_hat = F.interpolate(f_hat, size=(size, size), mode="area")
        return f_hat.flatten(2).transpose(1, 2)

    def split_scales(self, tokens: Tensor) -> list[Tensor]:
        """[B, N, ...] cut at the scales."""
        return list(tokens.split([side**2 for side in self.patch_nums], dim=1))

    def embed_to_fhat(self, embeddings: Tensor) -> list[Tensor]:
        """Latents after every scale, from embeddings [B, N, D]: a list of [B, D, side, side]."""
        return list(self._latents_after(self.split_scales(embeddings)))

    def _latents_after(self, parts: list[Tensor]) -> Iterator[Tensor]:
        return accumulate(self.contribution(scale, part) for scale, part in enumerate(parts))

    def teacher_forcing_input(self, embeddings: Tensor) -> Tensor:
        """What the AR model reads at every scale but the first, from embeddings [B, N, D]: [B, N - P_0^2, D]."""
        f_hats = self._latents_after(self.split_scales(embeddings)[:-1])
        inputs = [self.next_input(scale + 1, f_hat) for scale, f_hat in enumerate(f_hats)]
        return torch.cat([embeddings[:, :0], *inputs], dim=1)

    def quantise(self, latents: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Latents [B, D, side, side] to codes int64 [B, N] and the latents that every scale reaches."""
        if latents.shape[-2:] != (self.side, self.side):
            expected = f"{self.side} x {self.side} latents"
            raise ValueError(
                f"images: got {list(latents.shape[-2:])} latents, expected {expected} for {self.patch_nums}"
            )
        rest, codes, f_hats = latents, [], []
        codebook, f_hat = self.codebook(), torch.zeros_like(latents)
        for scale in range(len(self.patch_nums)):
            # The last scale has the latents' own side: no resize.
            found = nearest_code(self.next_input(scale, rest).contiguous(), codebook, cosine=self.using_znorm)
            added = self.contribution(scale, codebook[found])
            f_hat, rest = f_hat + added, rest - added
            codes.append(found)
            f_hats.append(f_hat)
        return torch.cat(codes, dim=1), f_hats

    def codes_of(self, latents: Tensor) -> Tensor:
        return self.quantise(latents)[0]

    def decode(self, embeddings: Any) -> Tensor:
        count = sum(side**2 for side in self.patch_nums)
        embeddings = as_embeddings(embeddings, self.codebook(), (None, count))
        with weights_dtype(embeddings):
            return self.decode_latents(self.embed_to_fhat(embeddings)[-1])
