"""How good samples are: Fréchet distance, class accuracy, teacher likelihood and pairwise code statistics.

Dimensions: B batch, N tokens, V codes, F features.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ddfast import processes, seeds
from ddfast.config import TrainConfig
from ddfast.evaluation.instruments import Classifier, Reference, Sums
from ddfast.evaluation.sources import stream
from ddfast.frechet import Gaussian
from ddfast.models import families
from ddfast.models.family import FeatureNetwork
from ddfast.models.protocol import Teacher
from ddfast.progress import Progress
from ddfast.sampling import Samples
from ddfast.trajectories.memory import BATCH_OPTION, fitting

_LARGEST_PAIRED = 512
"""Codes up to which tables of pairs [V, V] are filled by a few thousand samples."""

_MOST_PAIRED = 2**31
"""Entries of all pairs' tables together up to which they are counted: minutes. There are N (N - 1) / 2 of them, 2.5
million for the 2,240 tokens of VAR's 512 pixels."""

_LEAST_LIKELY = 12
"""Samples that are told one by one, for people to look at."""


def pair_table_distance(codes: Tensor, reference: Tensor, num_codes: int) -> float:
    """Mean total variation between the pairwise code tables of int64 codes [B, N] and reference [B', N].

    For every pair of positions, the joint distribution of the two codes [V, V]; docs/method.md section 16 (Evaluation).
    """
    distances = []
    for i, j in combinations(range(codes.shape[1]), 2):
        tables = [
            torch.bincount(c[:, i] * num_codes + c[:, j], minlength=num_codes**2).double() / len(c)
            for c in (codes, reference)
        ]
        distances.append(float(0.5 * (tables[0] - tables[1]).abs().sum()))
    return float(torch.tensor(distances, dtype=torch.float64).mean())


def pairs_counted(num_tokens: int, num_codes: int) -> bool:
    """Whether tables of all pairs of tokens are small enough to be filled and counted."""
    return num_codes <= _LARGEST_PAIRED and math.comb(num_tokens, 2) * num_codes**2 <= _MOST_PAIRED


class Evaluator:
    """Measures samples of one teacher's task against the teacher itself, and where there is a classifier of its images
    (digits), also against real ones.

    - teacher_nll: mean negative log-likelihood per token, in nats, under the teacher with its guidance and temperature
      but without top-k and top-p, so that every code has a finite likelihood.
    - pair_tv: `pair_table_distance` to fresh samples of the teacher; its floor is the teacher's own row. Only where
      codes and tokens are few enough for tables of all pairs (`pairs_counted`).
    - frechet: distance, in the classifier's features, to real images (`Family.real_images`), and its standard error
      `frechet_error`; precision and recall in the same features.
    - class_accuracy: share of samples whose class the classifier recognises.
    - passes: mean number of passes of the network that a sample took, one after another, and accepted_per_pass: tokens
      that a pass decided. Only of sources that count them (speculative decoding).
    - count: of samples.

    Args:
        config: evaluation settings; the classifier is trained on first use and cached.
        teacher: of the samples.
        progress: called as progress(done, total, text) while the classifier trains.

    Several processes measure their shares of the batches; what is compared as a whole, the first one has and compares.
    """

    def __init__(self, config: TrainConfig, teacher: Teacher, progress: Progress | None = None) -> None:
        self.teacher = teacher
        self.batch_size = config.evaluation.batch_size
        count = config.evaluation.samples
        family = families.of_teacher(teacher)
        self.classifier: FeatureNetwork | None = None
        if teacher.has_decoder:
            self.classifier = processes.first_then_all(lambda: family.feature_network(progress))
        self.paired = pairs_counted(teacher.num_tokens, teacher.num_codes)
        self.reference = Reference(gaussians={})
        self.reference_codes: Tensor | None = None
        if self.classifier is not None and processes.rank() == 0:
            features = self.classifier.features(family.real_images(max(count, 5000), config.seed))
            self.reference = Reference(gaussians={"frechet": Gaussian.of(features)}, features=features)
        if self.paired:
            # A seed of its own: the reference's draws are never those of the samples measured.
            seed = seeds.derived(config.seed, 1_000_003)
            fresh = stream("teacher", teacher, count=count, seed=seed, batch_size=self.batch_size)
            codes = processes.collected([batch.codes.cpu() for batch in fresh])
            self.reference_codes = torch.cat(codes) if codes else None

    @torch.no_grad()
    def measure(self, samples: Samples | Iterable[Samples], *, details: bool = False) -> dict[str, Any]:
        """The figures of one set of samples; of batches, each is measured and forgotten before the next one is made.

        Args:
            samples: all, or batches of them: this process's share, as streams make it.
            details: also tables: `by_class` {figure: {class: mean}}, for the figures that are means over samples, where
                there are classes, and `least_likely` {"number", "teacher_nll": of the dozen that the teacher finds so}.

        Returns:
            The same figures at every process.
        """
        parts = processes.share(samples.split(self.batch_size)) if isinstance(samples, Samples) else samples
        seen = Sums(Classifier(self.classifier)) if self.classifier is not None else None
        kept = [self._measured(batch, seen) for batch in parts]
        figures = {} if seen is None else seen.figures(self.reference)
        measured = processes.collected(kept)
        return processes.first_does(lambda: figures | self._figures(measured, details))

    def _measured(self, batch: Samples, seen: Sums | None) -> dict[str, Tensor]:
        """What is kept of a batch, on the CPU: some numbers of each sample, and where they are compared its codes."""
        kept = {"number": batch.number, "condition": batch.condition.cpu(), "passes": batch.passes}
        kept["likelihood"] = self._likelihoods(batch).mean(1)
        if seen is not None:
            kept["recognised"] = self._see(batch, seen)
        if self.paired:
            kept["codes"] = batch.codes.cpu()
        return kept

    def _likelihoods(self, batch: Samples) -> Tensor:
        """Log-likelihoods float64 [B, N] under the teacher."""
        teacher = self.teacher
        with fitting(len(batch.codes), teacher.codebook.device, BATCH_OPTION):
            table = teacher.log_probs(teacher.condition_of(batch.condition), batch.codes, filtered=False)
            return table.gather(-1, batch.codes[..., None])[..., 0].cpu().double()

    def _see(self, batch: Samples, sums: Sums) -> Tensor:
        """Add what the classifier sees in the images; which of them it recognises: bool [B]."""
        assert self.classifier is not None
        seen = sums.instrument.look(self.teacher.decode(batch.embeddings).cpu())
        sums.add(seen, batch.number)
        return self.classifier.logits(seen["features"]).argmax(-1) == batch.condition.cpu()

    def _figures(self, measured: list[dict[str, Tensor]], details: bool) -> dict[str, Any]:
        """Of all batches, in their order."""
        kept = {name: torch.cat([batch[name] for batch in measured]) for name in measured[0]}
        result: dict[str, Any] = {}
        if "recognised" in kept:
            result["class_accuracy"] = float(kept["recognised"].double().mean())
        result |= {"teacher_nll": -float(kept["likelihood"].mean()), "count": len(kept["number"])}
        if self.reference_codes is not None:
            result["pair_tv"] = pair_table_distance(kept["codes"], self.reference_codes, self.teacher.num_codes)
        if bool(kept["passes"].any()):
            result["passes"] = float(kept["passes"].double().mean())
            result["accepted_per_pass"] = self.teacher.num_tokens / result["passes"]
        return result | (self._details(kept) if details else {})

    def _details(self, kept: dict[str, Tensor]) -> dict[str, Any]:
        """Figures by class, and the samples of the lowest likelihood."""
        by_sample = {"teacher_nll": -kept["likelihood"]}
        if "recognised" in kept:
            by_sample["class_accuracy"] = kept["recognised"].double()
        found: dict[str, Any] = {}
        if self.teacher.num_classes:
            found["by_class"] = {name: _by_class(values, kept["condition"]) for name, values in by_sample.items()}
        worst = by_sample["teacher_nll"].argsort(descending=True, stable=True)[:_LEAST_LIKELY]
        found["least_likely"] = {
            "number": kept["number"][worst].tolist(),
            "teacher_nll": by_sample["teacher_nll"][worst].tolist(),
        }
        return found


def _by_class(values: Tensor, condition: Tensor) -> dict[str, float]:
    """Means of values [B] over each of the labels [B] that there are."""
    labels, place, counts = condition.unique(return_inverse=True, return_counts=True)
    means = torch.zeros(len(labels), dtype=torch.float64).index_add_(0, place, values) / counts
    return dict(zip(map(str, labels.tolist()), means.tolist(), strict=True))
