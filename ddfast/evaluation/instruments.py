"""Instruments: by which network's features, and in which figures, images are compared with a reference.

Figures of two instruments are never compared. adm is OpenAI's evaluator (guided-diffusion), dd1 is pytorch-fid as
Distilled Decoding 1 uses it; a family's classifier is the instrument of its own images.

Dimensions: B batch, F features, C classes of a network.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ddfast import processes
from ddfast.evaluation.images import Pictured
from ddfast.evaluation.inception import (
    LOGITS,
    POOL,
    SPATIAL,
    Inception,
    prepared_as_pytorch_fid,
    prepared_as_tensorflow,
)
from ddfast.evaluation.manifolds import precision_and_recall
from ddfast.frechet import Gaussian, Moments, frechet_distance, frechet_error
from ddfast.models.family import FeatureNetwork
from ddfast.progress import Progress, silent

SPLIT = 5000
"""Samples of which OpenAI's evaluator takes one Inception score; the figure is their mean."""


@dataclass(kw_only=True)
class Reference:
    """What samples are compared with.

    Attributes:
        gaussians: by the name of the distance.
        features: [N, F] of real images, for precision and recall; None: these are left out.
    """

    gaussians: Mapping[str, Gaussian]
    features: Tensor | None = None


class Instrument(ABC):
    """A network, and what is measured in what it sees.

    Attributes:
        name: of the instrument.
        distances: by the name of a Fréchet distance, that of the features it is taken in.
        manifold: name of the features of precision and recall; empty: these are not measured.
        score: name of the logits of the Inception score; empty: it is not measured.
        device: where the comparison of features runs.
    """

    name: ClassVar[str]
    distances: ClassVar[Mapping[str, str]]
    manifold: ClassVar[str] = ""
    score: ClassVar[str] = ""
    device: torch.device = torch.device("cpu")

    @abstractmethod
    def look(self, images: Tensor) -> dict[str, Tensor]:
        """What the network sees in images [B, ...]: features [B, F] and logits [B, C] by name."""

    def see(
        self,
        pictures: Iterable[Pictured],
        progress: Progress = silent,
        *,
        count: int = 0,
        manifold: bool = True,
    ) -> Sums:
        """The sums over this process's share of the pictures, of which each batch is forgotten before the next one.

        Args:
            pictures: in batches.
            progress: called as progress(done, count, text) after every batch.
            count: of all pictures; 0: not known.
            manifold: keep the features of precision and recall, where they are measured.
        """
        sums, done = Sums(self, manifold=manifold), 0
        for batch in pictures:
            sums.add(self.look(batch.pixels), batch.number)
            done = min(done + len(batch.number) * processes.count(), count) if count else done + len(batch.number)
            progress(done, count or done, "")
        return sums

    def figures(
        self, pictures: Iterable[Pictured], reference: Reference, progress: Progress = silent, *, count: int = 0
    ) -> dict[str, float]:
        """Figures of pictures against a reference, the same at every process; arguments as of `see`.

        Returns:
            As of `Sums.figures`.
        """
        return self.see(pictures, progress, count=count).figures(reference, progress)


class Sums:
    """What an instrument's figures need of a set of images, batch by batch.

    Memory: independent of their count, but for the features of precision and recall (4 F bytes an image).
    """

    def __init__(self, instrument: Instrument, *, manifold: bool = True) -> None:
        self.instrument = instrument
        self.manifold = instrument.manifold if manifold else ""
        self.moments = {name: Moments() for name in instrument.distances}
        self.score = InceptionScore() if instrument.score else None
        self.features: list[Tensor] = []

    def add(self, seen: Mapping[str, Tensor], number: Tensor) -> None:
        """Add what the instrument saw in the images `number` int64 [B]."""
        for name, features in self.instrument.distances.items():
            self.moments[name].add(seen[features], number)
        if self.score:
            self.score.add(seen[self.instrument.score], number)
        if self.manifold:
            self.features.append(seen[self.manifold].float().cpu())

    def reference(self) -> Reference:
        """The images as a reference, of all processes together; features are at the first process alone."""
        gaussians = {name: moments.shared().whole() for name, moments in self.moments.items()}
        features = processes.collected(self.features)
        return Reference(gaussians=gaussians, features=torch.cat(features) if features else None)

    def figures(self, reference: Reference, progress: Progress = silent) -> dict[str, float]:
        """Figures of all processes' images against a reference, which the first one compares, and all get.

        Returns:
            Those that the reference allows, in this order: of every distance its value and its `_error` (where there
            are samples enough), `inception_score`, `precision`, `recall`, and the `count` of images.

        Raises:
            ValueError: there are too few images, or features are not finite.
        """
        moments = {name: moments.shared() for name, moments in self.moments.items()}
        scores = self.score.shared() if self.score else None
        features = processes.collected(self.features)
        count = sum(processes.gather(self.count()))

        def compared() -> dict[str, float]:
            result: dict[str, float] = {}
            for done, (name, fitted) in enumerate(reference.gaussians.items()):
                progress(done, len(reference.gaussians), "distances")
                result[name] = frechet_distance(moments[name], fitted)
                error = frechet_error(moments[name], fitted)
                if error is not None:
                    result[f"{name}_error"] = error
            if scores:
                result["inception_score"] = scores.mean()
            if reference.features is not None and features:
                sets = (torch.cat(features), reference.features)
                on_device = (one.to(self.instrument.device) for one in sets)
                result["precision"], result["recall"] = precision_and_recall(*on_device, progress=progress)
            return result | {"count": count}

        return processes.first_does(compared)

    def count(self) -> int:
        """Images that were added here."""
        return int(next(iter(self.moments.values())).count.sum())


@dataclass
class InceptionScore:
    """exp of the mutual information of image and class, of every `split` images that follow each other.

    Of each split, sums: of p, and of p log p. Float64; the order of batches does not matter.

    Source: Salimans et al. 2016; splits as in OpenAI's evaluator, unshuffled, the last one with what is left.
    """

    split: int = SPLIT
    sums: dict[int, Tensor] = field(default_factory=dict)

    def add(self, logits: Tensor, number: Tensor) -> None:
        """Add class logits [B, C] of the images `number` int64 [B]."""
        log_p = logits.double().log_softmax(1)
        p = log_p.exp()
        one = torch.ones(len(p), 1, dtype=torch.float64, device=p.device)
        rows = torch.cat((p, (p * log_p).sum(1, keepdim=True), one), dim=1).cpu()
        splits = number // self.split
        for place in splits.unique().tolist():
            own = rows[splits == place].sum(0)
            self.sums[place] = self.sums[place] + own if place in self.sums else own

    def shared(self) -> InceptionScore:
        """The sums of all processes; all of them ask at the same point."""
        together: dict[int, Tensor] = {}
        for sums in processes.gather(self.sums):
            for place, own in sums.items():
                together[place] = together[place] + own if place in together else own
        return InceptionScore(self.split, together)

    def mean(self) -> float:
        """Of the splits' scores."""
        scores = []
        for _, sums in sorted(self.sums.items()):
            mean = sums[:-2] / sums[-1]
            scores.append(math.exp(float(sums[-2] / sums[-1] + torch.special.entr(mean).sum())))
        return sum(scores) / len(scores)


class OfInception(Instrument):
    """An instrument that looks through Inception."""

    def __init__(self, network: Inception) -> None:
        self.network, self.device = network, network.device

    @staticmethod
    @abstractmethod
    def prepare(pixels: Tensor) -> Tensor:
        """Pixels uint8 [B, 3, H, W] as the network's first layer gets them."""

    def look(self, images: Tensor) -> dict[str, Tensor]:
        """What Inception sees in pixels uint8 [B, 3, H, W]."""
        return self.network.look(images, self.prepare)


class Adm(OfInception):
    """OpenAI's evaluator, on torch-fidelity's Inception: FID, sFID, Inception score, precision and recall."""

    name = "adm"
    distances: ClassVar[Mapping[str, str]] = {"fid": POOL, "sfid": SPATIAL}
    manifold = POOL
    score = LOGITS
    prepare = staticmethod(prepared_as_tensorflow)


class Dd1(OfInception):
    """pytorch-fid, as Distilled Decoding 1 uses it: FID alone."""

    name = "dd1"
    distances: ClassVar[Mapping[str, str]] = {"fid": POOL}
    prepare = staticmethod(prepared_as_pytorch_fid)


class Classifier(Instrument):
    """A family's own feature network: the Fréchet distance in its features, precision and recall."""

    name = "classifier"
    distances: ClassVar[Mapping[str, str]] = {"frechet": "features"}
    manifold = "features"

    def __init__(self, network: FeatureNetwork) -> None:
        self.network = network

    def look(self, images: Tensor) -> dict[str, Tensor]:
        """What it sees in images [B, C, H, W] in [0, 1], as the family's teachers make them."""
        return {"features": self.network.features(images)}


INCEPTIONS: dict[str, type[OfInception]] = {instrument.name: instrument for instrument in (Adm, Dd1)}
"""The instruments of the field, by name."""
