"""The losses of distillation: pure functions of tensors.

Dimensions: m noise draws, B batch, N tokens, V codes, D code dimension.
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

    Source: DD1 section 3.3, docs/method.md section 8 (DD1: losses and training).
    """
    return F.cross_entropy(logits[open_tokens], codes[open_tokens])


def embedding_distance(embeddings: Tensor, target: Tensor, open_tokens: Tensor | None = None) -> Tensor:
    """Mean absolute distance of embeddings [B, N, D] to their targets at the open tokens (bool [B, N]; None: all).

    It stands in for DD1's perceptual distance where no LPIPS weights are at hand;
    docs/method.md section 8 (DD1: losses and training).
    """
    if open_tokens is not None:
        embeddings, target = embeddings[open_tokens], target[open_tokens]
    return F.l1_loss(embeddings, target)


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

    Source: DD1 section 3.3, docs/method.md section 8 (DD1: losses and training).
    """
    with torch.no_grad():
        reference = decode(target)
    return distance(decode(torch.where(open_tokens[..., None], embeddings, target)), reference).mean()


def velocity_distance(velocity: Tensor, target: Tensor) -> Tensor:
    """Mean squared distance of velocities [m, B, N, D]: to the teacher's closed form, or to noise minus token.

    Source: DD2's Ground Truth Score loss and the flow-matching loss, docs/method.md section 11 (DD2: stages 0 and 1).
    """
    return (velocity - target).square().sum(-1).mean()


def score_distance_kl(x: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """Value whose gradient in x is the KL (DMD) form of CSD: the fake score minus the real one, in x_0 predictions.

    Both scores at x_t are -(x_t - (1-t) x_0) / t^2, so their difference is (fake - real) (1-t) / t^2; the factor is
    left out: omega(t) constant in x_0 space was best, docs/method.md section 12 (DD2: the score distance).

    Args:
        x: generated tokens [B, N, D], with a gradient.
        real, fake: x_0 predictions [m, B, N, D] of the teacher and of the guidance network.
    """
    return (x * (fake - real).detach()).sum(-1).mean()


def score_distance_sid(x: Tensor, real: Tensor, fake: Tensor, alpha: float) -> Tensor:
    """CSD in SiD form: (1-alpha) |real - fake|^2 + (real - fake) . (fake - x), in x_0 predictions.

    Args:
        x: generated tokens [B, N, D].
        real, fake: x_0 predictions [m, B, N, D] at noisy x; gradients flow through x and both predictions.
        alpha: the papers use 1.

    Source: docs/method.md section 12 (DD2: the score distance); Zhou et al. 2024 (SiD, arXiv 2404.04057).
    """
    difference = real - fake
    return ((1 - alpha) * difference.square() + difference * (fake - x)).sum(-1).mean()


def anchor_distance(x: Tensor, target: Tensor, width: float) -> Tensor:
    """Mean of w log(1 + d^2 / w^2), d the distance of tokens x [B, N, D] to their targets, w the width in its units.

    Where a token may have to be one of several codes, L1 settles between them, at a code that is none of them; this
    settles at one, as the most likely code of a classifier does (docs/notes/dd2.md has both).
    """
    return width * torch.log1p((x - target).square().sum(-1) / width**2).mean()


def next_token_divergence(logits: Tensor, log_probs: Tensor) -> Tensor:
    """Mean cross-entropy of the teacher's next-token distributions and logits read off the generator's features.

    Args:
        logits: [B, N, V].
        log_probs: the teacher's, given the generator's own tokens [B, N, V]; -inf where filtered.
    """
    return F.cross_entropy(logits.flatten(0, 1), log_probs.exp().flatten(0, 1))
