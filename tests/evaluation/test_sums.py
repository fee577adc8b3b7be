"""Figures from sums over batches: whatever their order, their sizes and the processes that share them."""

import numpy as np
import pytest
import torch
from given import Given, given, numbers, reference_of
from launching import launch
from pixels import pictures
from test_frechet import by_singular_values
from torch import Tensor

from ddfast import processes
from ddfast.evaluation.images import Batch
from ddfast.evaluation.instruments import Classifier, InceptionScore, Reference, Sums
from ddfast.frechet import Gaussian


def inception_score(logits: Tensor, split: int) -> float:
    """As OpenAI's evaluator: of every `split` rows in their order, the last with what is left."""
    exp = np.exp(logits.double().numpy() - logits.double().numpy().max(1, keepdims=True))
    preds, scores = exp / exp.sum(1, keepdims=True), []
    for start in range(0, len(preds), split):
        part = preds[start : start + split]
        scores.append(np.exp((part * (np.log(part) - np.log(part.mean(0, keepdims=True)))).sum(1).mean()))
    return float(np.mean(scores))


@pytest.mark.parametrize(("count", "split"), [(300, 100), (250, 100), (99, 100), (101, 100)])
def test_inception_score_of_splits(count, split):
    """Whatever the order of batches; the last split with what is left."""
    logits = given(count, 3)["say"]
    for batch, shuffled in ((300, False), (7, False), (40, True)):
        score = InceptionScore(split)
        for one in numbers(count, batch, shuffled=shuffled):
            score.add(logits[one.number], one.number)
        assert score.mean() == pytest.approx(inception_score(logits, split), rel=1e-12)


def shared(batch: int) -> dict[str, float]:
    with processes.together("cpu", 60):
        parts = processes.share(numbers(330, batch))
        real = Given(**given(300, 2)).see(processes.share(numbers(300, 50))).reference()
        return Given(**given(330, 1)).figures(parts, real)


def test_processes_and_batches_do_not_matter():
    whole = shared(330)
    assert shared(17) == pytest.approx(whole, rel=1e-9)
    ended = launch(3, shared, 200)  # of two batches the last process has none
    assert ended[0] == ended[1] == ended[2] == pytest.approx(whole, rel=1e-9)


def test_what_the_reference_lacks_is_left_out():
    real = reference_of(given(300, 2))
    only = Reference(gaussians={"fid": real.gaussians["fid"]})
    figures = Given(**given(330, 1)).figures(numbers(330, 50), only)
    assert list(figures) == ["fid", "fid_error", "inception_score", "count"]


def test_sums_do_not_grow():
    """But for the features of precision and recall, where a reference is made without them."""
    sums = Sums(Given(**given(10, 0)), manifold=False)

    def held() -> int:
        moments = [tensor.numel() for one in sums.moments.values() for tensor in vars(one).values()]
        return sum(moments) + sum(len(row) for row in sums.score.sums.values()) + len(sums.features)

    sizes = []
    for number in numbers(4000, 10):
        sums.add(sums.instrument.look(number.pixels % 10), number.number)
        sizes.append(held())
    assert sizes[0] == sizes[-1]


def test_a_familys_classifier_is_an_instrument():
    class Network:
        def features(self, images):
            return images.flatten(1)

    images, real = pictures(60, 5, size=4) / 255, pictures(80, 6, size=4) / 255
    parts = [Batch(images[rows], rows, rows) for rows in torch.arange(60, dtype=torch.int64).split(13)]
    reference = Reference(gaussians={"frechet": Gaussian.of(real.flatten(1))}, features=real.flatten(1))
    figures = Classifier(Network()).figures(parts, reference)
    assert list(figures) == ["frechet", "frechet_error", "precision", "recall", "count"]
    expected = by_singular_values(images.flatten(1), real.flatten(1))
    assert figures["frechet"] == pytest.approx(expected, rel=1e-9)
