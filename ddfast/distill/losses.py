"""The losses of distillation: pure functions of tensors.

Dimensions: B batch, N tokens, V codes, D code dimension.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def token_cross_entropy(logits: Tensor, codes: Tensor, open_tokens: Tensor) -> Tensor:
    """Mean cross-entropy of the codes at the tokens a trajectory point leaves open.

    Args:
        logits: [B, N, V].
        codes: int64 [B, N].
        open_tokens: bool [B, N], True where X_t still holds noise; tokens that are given as data teach nothing.

    Source: DD1 section 3.3, METHOD.md section 2.
    """
    return F.cross_entropy(logits[open_tokens], codes[open_tokens])


def embedding_distance(embeddings: Tensor, target: Tensor, open_tokens: Tensor) -> Tensor:
    """Mean absolute distance of embeddings [B, N, D] to their targets at the open tokens (bool [B, N]).

    It stands in for DD1's perceptual distance where no LPIPS weights are at hand (METHOD.md section 2).
    """
    return F.l1_loss(embeddings[open_tokens], target[open_tokens])


def perceptual_distance(
    embeddings: Tensor,
    target: Tensor,
    open_tokens: Tensor,
    decode: Callable[[Tensor], Tensor],
    distance: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Mean perceptual distance of the image decoded from embeddings [B, N, D] to the one decoded from their targets.

    Args:
        embeddings, target: [B, N, D]; given tokens are taken from the target.
        open_tokens: bool [B, N].
        decode: embeddings to raw images in [-1, 1] scale.
        distance: (images, images) -> [B], such as LPIPS.

    Source: DD1 section 3.3, METHOD.md section 2.
    """
    with torch.no_grad():
        reference = decode(target)
    return distance(decode(torch.where(open_tokens[..., None], embeddings, target)), reference).mean()
