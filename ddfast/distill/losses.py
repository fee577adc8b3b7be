"""The losses of distillation: pure functions of tensors.

Dimensions: B batch, N tokens, V codes, D code dimension.
"""

from __future__ import annotations

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
