"""Figures against those of the libraries that others use, and against a second implementation in NumPy.

An Inception of the published names and shapes has random weights here. What takes Inception's time is small, or full.
"""

import contextlib
import functools
import io
import os
from pathlib import Path

import inceptions
import numpy as np
import pytest
import torch
import torch_fidelity
from inceptions import channels_last, pictures
from launching import launch
from PIL import Image
from test_frechet import by_singular_values, features
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric

from ddfast import processes
from ddfast.evaluation.images import Batch, open_images
from ddfast.evaluation.inception import LOGITS, POOL, SPATIAL, Inception
from ddfast.evaluation.instruments import Adm, Classifier, Dd1, InceptionScore, Reference, Sums
from ddfast.evaluation.references import ReferenceFile, write_reference
from ddfast.frechet import Gaussian, frechet_distance


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return inceptions.write_weights(tmp_path_factory.mktemp("weights") / "inception.pth")


@pytest.fixture(scope="module")
def network(weights) -> Inception:
    return Inception(weights)


@pytest.fixture(scope="module")
def theirs(weights):
    """torch-fidelity's own extractor of a few features."""
    names = ["2048", "logits_unbiased"]
    return torch_fidelity.FeatureExtractorInceptionV3("x", names, feature_extractor_weights_path=str(weights))


def batches(images: Tensor, size: int = 50):
    return [Batch(images[rows], rows) for rows in torch.arange(len(images), dtype=torch.int64).split(size)]


# What Inception sees -------------------------------------------------------------------------------------------------


def test_features_are_torch_fidelitys(network, theirs):
    images = pictures(6, 2)
    seen, (pool, logits) = Adm(network).look(images), theirs(images)
    assert torch.equal(seen[POOL], pool)
    assert torch.equal(seen[LOGITS], logits)
    assert pool.std(0).mean() > 0.05  # random weights do not all say the same
    assert (pool == 0).double().mean() < 0.2


def test_spatial_features_are_in_tensorflows_order(network, theirs):
    """Rows, columns, and the first seven channels after the ReLU, as a hook in torch-fidelity's network finds them."""
    images, caught = pictures(3, 3), []
    hook = theirs.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, output: caught.append(output.clone()))
    theirs(images)
    hook.remove()
    seen = Adm(network).look(images)[SPATIAL].view(3, 17, 17, 7)
    for row, column, channel in ((0, 0, 0), (3, 16, 6), (16, 2, 1)):
        assert torch.equal(seen[:, row, column, channel], caught[0][:, channel, row, column])
    assert (seen >= 0).all()
    assert 0.1 < (seen > 0).double().mean() < 0.9


@functools.cache
def pytorch_fid():
    """Its network with the random weights: its file's address is asked for by name, and given what is here."""
    from pytorch_fid import inception

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: inceptions.random_weights())
        return inception.InceptionV3().eval()


def test_features_are_pytorch_fids(network):
    images = pictures(6, 4)
    with torch.no_grad():
        expected = pytorch_fid()(images.float() / 255)[0].flatten(1)
    seen = Dd1(network).look(images)[POOL]
    assert torch.allclose(seen, expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(seen, Adm(network).look(images)[POOL], rtol=1e-3, atol=1e-3)


# Figures of features -------------------------------------------------------------------------------------------------


class Given(Adm):
    """adm of features that are there: an image is the number of its features."""

    def __init__(self, **features: Tensor) -> None:
        self.features = features

    def look(self, images: Tensor) -> dict[str, Tensor]:
        return {name: self.features[key][images] for name, key in ((POOL, "pool"), (SPATIAL, "space"), (LOGITS, "say"))}


def given(count: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(24, 24, generator=generator)
    return {
        "pool": (torch.randn(count, 24, generator=generator) @ mixed / 5 + 0.5).relu(),
        "space": torch.randn(count, 10, generator=generator).relu(),
        "say": 2 * torch.randn(count, 16, generator=generator),
    }


def numbers(count: int, size: int, *, shuffled: bool = False):
    number = torch.arange(count, dtype=torch.int64)
    if shuffled:
        number = number[torch.randperm(count, generator=torch.Generator().manual_seed(1))]
    return [Batch(rows, rows) for rows in number.split(size)]


def reference_of(features: dict[str, Tensor]) -> Reference:
    return Given(**features).see(numbers(len(features["pool"]), 64)).reference()


def inception_score(logits: Tensor, split: int) -> float:
    """As OpenAI's evaluator: of every `split` rows in their order, the last with what is left."""
    exp = np.exp(logits.double().numpy() - logits.double().numpy().max(1, keepdims=True))
    preds, scores = exp / exp.sum(1, keepdims=True), []
    for start in range(0, len(preds), split):
        part = preds[start : start + split]
        scores.append(np.exp((part * (np.log(part) - np.log(part.mean(0, keepdims=True)))).sum(1).mean()))
    return float(np.mean(scores))


def test_figures_of_features():
    ours, real = given(400, 1), given(350, 2)
    figures = Given(**ours).figures(numbers(400, 60), reference_of(real))
    statistics = [fid_features_to_statistics(one["pool"].double()) for one in (ours, real)]
    fid = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert figures["fid"] == pytest.approx(fid, rel=1e-9)
    assert figures["sfid"] == pytest.approx(by_singular_values(ours["space"], real["space"]), rel=1e-9)
    isc = isc_features_to_metric(ours["say"], splits=1, shuffle=False)["inception_score_mean"]
    assert figures["inception_score"] == pytest.approx(isc, rel=1e-12)
    assert list(figures) == [
        "fid", "fid_error", "sfid", "sfid_error", "inception_score", "precision", "recall", "count",
    ]  # fmt: skip
    assert figures["count"] == 400
    assert 0 < figures["fid_error"] < figures["fid"]


@pytest.mark.parametrize(("count", "other"), [(400, 300), (20, 30)])
def test_the_distance_is_nearer_to_the_truth_than_by_eigenvalues_of_the_product(count, other):
    """torch-fidelity's way: where covariances are singular, its eigenvalues of rounding have roots."""
    x, y = features(count, 64, 1), features(other, 64, 2)
    truth = by_singular_values(x, y)
    ours = frechet_distance(Gaussian.of(x), Gaussian.of(y))
    statistics = [fid_features_to_statistics(one) for one in (x, y)]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert theirs == pytest.approx(truth, rel=1e-5)
    assert ours == pytest.approx(truth, rel=1e-11)
    assert abs(ours - truth) <= abs(theirs - truth) + 1e-12 * truth


@pytest.mark.parametrize(("count", "split"), [(300, 100), (250, 100), (99, 100), (101, 100)])
def test_inception_score_of_splits(count, split):
    """Whatever the order of batches; torch-fidelity's where splits are equal."""
    logits = given(count, 3)["say"]
    for batch, shuffled in ((300, False), (7, False), (40, True)):
        score = InceptionScore(split)
        for one in numbers(count, batch, shuffled=shuffled):
            score.add(logits[one.number], one.number)
        assert score.mean() == pytest.approx(inception_score(logits, split), rel=1e-12)
    if count % split == 0:
        theirs = isc_features_to_metric(logits, splits=count // split, shuffle=False)["inception_score_mean"]
        assert score.mean() == pytest.approx(theirs, rel=1e-12)


def shared(batch: int) -> dict[str, float]:
    with processes.together("cpu", 60):
        parts = processes.share(numbers(330, batch))
        real = Given(**given(300, 2)).see(processes.share(numbers(300, 50))).reference()
        return Given(**given(330, 1)).figures(parts, real)


def test_processes_and_batches_do_not_matter():
    whole = shared(330)
    for batch, count in ((30, 3), (200, 3), (17, 2)):
        ended = launch(count, shared, batch)
        assert all(end == ended[0] for end in ended)
        assert ended[0] == pytest.approx(whole, rel=1e-9)


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
    reference = Reference(gaussians={"frechet": Gaussian.of(real.flatten(1))}, features=real.flatten(1))
    figures = Classifier(Network()).figures(batches(images, 13), reference)
    assert list(figures) == ["frechet", "frechet_error", "precision", "recall", "count"]
    expected = by_singular_values(images.flatten(1), real.flatten(1))
    assert figures["frechet"] == pytest.approx(expected, rel=1e-9)


# Through Inception ---------------------------------------------------------------------------------------------------


class Pixels(torch.utils.data.Dataset):
    """As torch-fidelity takes images."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> Tensor:
        return self.images[number]


def written(folder: Path, instrument, images: Tensor, name: str) -> ReferenceFile:
    """A reference's file by `write_reference`, as it is read again."""
    np.savez(folder / "real.npz", channels_last(images))
    there = open_images(folder / "real.npz", "--make-reference")
    made = instrument.see(there.batches(), manifold=False).reference()
    write_reference(folder / name, instrument.name, made, there)
    return ReferenceFile(folder / name, instrument.name)


def check_adm(folder: Path, network: Inception, weights: Path, count: int, other: int) -> None:
    """FID, Inception score, precision and recall are torch-fidelity's; sFID and the file NumPy's."""
    ours, real = pictures(count, 7), pictures(other, 8)
    instrument = Adm(network)
    file = written(folder, instrument, real, "reference.npz")
    figures = instrument.figures(batches(ours), file.seen_by(instrument))
    with contextlib.redirect_stderr(io.StringIO()):
        expected = torch_fidelity.calculate_metrics(
            input1=Pixels(ours), input2=Pixels(real), feature_extractor="inception-v3-compat", isc=True, fid=True,
            prc=True, isc_splits=1, samples_shuffle=False, cuda=False, cache=False, save_cpu_ram=True, verbose=False,
            feature_extractor_weights_path=str(weights),
        )  # fmt: skip
    looked = (instrument.look(images) for images in (ours, real))
    seen, seen_real = ({name: value.double().numpy() for name, value in one.items()} for one in looked)
    for name, own in (("fid", POOL), ("sfid", SPATIAL)):
        assert figures[name] == pytest.approx(by_singular_values(seen[own], seen_real[own]), rel=1e-6)
    assert figures["fid"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-6)
    assert figures["inception_score"] == pytest.approx(expected["inception_score_mean"], rel=1e-6)
    assert figures["inception_score"] > 1.1
    assert figures["precision"] == pytest.approx(expected["precision"], rel=1e-6)
    assert figures["recall"] == pytest.approx(expected["recall"], rel=1e-6)
    with np.load(folder / "reference.npz") as arrays:
        assert sorted(arrays) == ["arr_0", "mu", "mu_s", "sigma", "sigma_s"]
        assert np.array_equal(arrays["arr_0"], channels_last(real))
        for mean, covariance, own in (("mu", "sigma", POOL), ("mu_s", "sigma_s", SPATIAL)):
            assert arrays[mean] == pytest.approx(seen_real[own].mean(0), rel=1e-6, abs=1e-9)
            assert np.allclose(arrays[covariance], np.cov(seen_real[own], rowvar=False), rtol=1e-6, atol=1e-9)


def check_dd1(folder: Path, network: Inception, count: int, other: int) -> None:
    """The file, and the images' own statistics, are what pytorch-fid computes from the same PNG files."""
    from pytorch_fid import fid_score

    ours, real = pictures(count, 9), pictures(other, 10)
    instrument = Dd1(network)
    file = written(folder, instrument, real, "statistic.pth")
    figures = instrument.figures(batches(ours), file.seen_by(instrument))
    statistics = []
    for name, images in (("ours", ours), ("real", real)):
        (folder / name).mkdir()
        files = []
        for number, image in enumerate(channels_last(images)):
            files.append(folder / name / f"{number:04d}.png")
            Image.fromarray(image).save(files[-1])
        with contextlib.redirect_stderr(io.StringIO()):
            made = fid_score.calculate_activation_statistics(files, pytorch_fid(), 50, 2048, "cpu", 0)
        statistics.append(made)
    stored = torch.load(folder / "statistic.pth", weights_only=True)
    return figures, statistics, stored


def test_adm_on_a_few_images(tmp_path, network, weights):
    check_adm(tmp_path, network, weights, 12, 10)


@pytest.mark.full
def test_adm_is_torch_fidelity(tmp_path, network, weights):
    check_adm(tmp_path, network, weights, 240, 200)


ADM_FILES = os.environ.get("DDFAST_ADM_FILES")


@pytest.mark.full
@pytest.mark.skipif(not ADM_FILES, reason="DDFAST_ADM_FILES names no folder with the evaluator's published files")
def test_the_row_that_the_field_knows():
    """OpenAI's samples of ADM, on a GPU where there is one: by TensorFlow 215.84 / 3.9426 / 6.1404 / .8265 / .5309.

    The tolerances are what a PyTorch port on the same weights is away from TensorFlow: its convolutions round
    otherwise, and its distances were float16.
    """
    folder, device = Path(ADM_FILES), "cuda" if torch.cuda.is_available() else "cpu"
    instrument = Adm(Inception(folder / "weights-inception-2015-12-05-6726825d.pth", device))
    reference = ReferenceFile(folder / "VIRTUAL_imagenet256_labeled.npz", "adm").seen_by(instrument)
    images = open_images(folder / "admnet_guided_upsampled_imagenet256.npz", "--images")
    figures = instrument.figures(images.batches(), reference, count=images.count)
    assert figures["inception_score"] == pytest.approx(215.84, abs=0.3)
    assert figures["fid"] == pytest.approx(3.9426, abs=0.005)
    assert figures["sfid"] == pytest.approx(6.1404, abs=0.005)
    assert figures["precision"] == pytest.approx(0.8265, abs=0.002)
    assert figures["recall"] == pytest.approx(0.5309, abs=0.004)
