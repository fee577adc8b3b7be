"""How good samples are: Fréchet distance, class accuracy, teacher likelihood and pairwise code statistics.

Dimensions: B batch, N tokens, V codes, F features.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from ddfast.config import TrainConfig
from ddfast.evaluation.classifier import DigitsClassifier, load_or_train_classifier
from ddfast.models.digits import Progress, digit_batch
from ddfast.models.protocol import Teacher
from ddfast.sampling import Samples, sample


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of the Gaussians fitted to features [B, F] and reference [B', F].

    Source: Heusel et al. 2017 (FID), with features of any network.
    """
    x, y = features.double().numpy(), reference.double().numpy()
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = np.real(sqrtm(cov_x @ cov_y))
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov_x + cov_y - 2 * root))


def pair_table_distance(codes: Tensor, reference: Tensor, num_codes: int) -> float:
    """Mean total variation between the pairwise code tables of int64 codes [B, N] and reference [B', N].

    For every pair of positions, the joint distribution of the two codes [V, V]; METHOD.md section 6 (pairTV).
    """
    distances = []
    for i, j in combinations(range(codes.shape[1]), 2):
        tables = [
            torch.bincount(c[:, i] * num_codes + c[:, j], minlength=num_codes**2).double() / len(c)
            for c in (codes, reference)
        ]
        distances.append(0.5 * (tables[0] - tables[1]).abs().sum())
    return float(torch.stack(distances).mean())


class Evaluator:
    """Measures samples of one teacher's task against the real images and the teacher itself.

    - frechet: distance, in the features of a small classifier trained on the real digits, to rendered real digits of
      the training split (as FID on ImageNet uses the training images).
    - class_accuracy: share of samples whose class the classifier recognises.
    - teacher_nll: mean negative log-likelihood per token, in nats, under the teacher with its guidance and temperature
      but without top-k and top-p, so that every code has a finite likelihood.
    - pair_tv: `pair_table_distance` to fresh samples of the teacher; its floor is the teacher's own row.

    Args:
        config: evaluation settings; the classifier is trained on first use and cached.
        teacher: a digits teacher.
        progress: called as progress(done, total, text) while the classifier trains.
    """

    def __init__(self, config: TrainConfig, teacher: Teacher, progress: Progress | None = None) -> None:
        self.teacher = teacher
        self.classifier: DigitsClassifier = load_or_train_classifier(progress)
        count = config.evaluation.samples
        images, _ = digit_batch("train", max(count, 5000), config.seed + 10)
        self.reference_features = self.classifier.features(images)
        # A seed of its own: the reference's draws are never those of the samples measured.
        fresh = sample("teacher", teacher, count=count, seed=config.seed + 1_000_003, point=1)
        self.reference_codes = fresh.codes

    @torch.no_grad()
    def measure(self, samples: Samples) -> dict[str, float]:
        """The four figures of one set of samples."""
        images = self.teacher.decode(samples.embeddings).cpu()
        features = self.classifier.features(images)
        log_probs = torch.cat(
            [
                self.teacher.log_probs(condition, codes, filtered=False).gather(-1, codes[..., None])
                for condition, codes in zip(samples.condition.split(1000), samples.codes.split(1000), strict=True)
            ]
        )
        recognised = self.classifier.logits(features).argmax(-1) == samples.condition.cpu()
        return {
            "frechet": frechet_distance(features, self.reference_features),
            "class_accuracy": float(recognised.double().mean()),
            "teacher_nll": -float(log_probs.double().mean()),
            "pair_tv": pair_table_distance(samples.codes.cpu(), self.reference_codes.cpu(), self.teacher.num_codes),
        }
