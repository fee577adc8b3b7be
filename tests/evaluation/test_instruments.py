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
from given import Given, given, numbers, reference_of
from PIL import Image
from pixels import channels_last, pictures
from test_frechet import by_singular_values, features
from test_manifolds import by_definition
from test_sums import inception_score
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric

from ddfast.evaluation.images import Batch, open_images
from ddfast.evaluation.inception import LOGITS, POOL, SPATIAL, Inception
from ddfast.evaluation.instruments import Adm, Dd1, InceptionScore
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
    return [Batch(images[rows], rows, rows) for rows in torch.arange(len(images), dtype=torch.int64).split(size)]


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


def test_inception_score_is_torch_fidelitys():
    logits, score = given(300, 3)["say"], InceptionScore(100)
    for one in numbers(300, 40, shuffled=True):
        score.add(logits[one.number], one.number)
    theirs = isc_features_to_metric(logits, splits=3, shuffle=False)["inception_score_mean"]
    assert score.mean() == pytest.approx(theirs, rel=1e-12)


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


class Noted(Adm):
    """adm that keeps what it sees, for the second implementation."""

    def __init__(self, network: Inception) -> None:
        super().__init__(network)
        self.seen: list[dict[str, Tensor]] = []

    def look(self, images: Tensor) -> dict[str, Tensor]:
        self.seen.append(super().look(images))
        return self.seen[-1]


def check_adm(folder: Path, network: Inception, count: int, other: int) -> tuple[dict[str, float], Tensor, Tensor]:
    """All figures and the reference's file against NumPy; the figures, and both sets of images."""
    ours, real = pictures(count, 7), pictures(other, 8)
    instrument = Noted(network)
    file = written(folder, instrument, real, "reference.npz")
    figures = instrument.figures(batches(ours, count), file.seen_by(instrument))
    seen = {name: torch.cat([one[name] for one in instrument.seen]).double() for name in (POOL, SPATIAL, LOGITS)}
    x, y = ({name: rows[own] for name, rows in seen.items()} for own in (slice(-count, None), slice(other)))
    assert figures["fid"] == pytest.approx(by_singular_values(x[POOL], y[POOL]), rel=1e-6)
    assert figures["sfid"] == pytest.approx(by_singular_values(x[SPATIAL], y[SPATIAL]), rel=1e-6)
    assert figures["inception_score"] == pytest.approx(inception_score(x[LOGITS], 5000), rel=1e-6)
    assert figures["inception_score"] > 1.1
    assert (figures["precision"], figures["recall"]) == by_definition(x[POOL], y[POOL], 3)
    with np.load(folder / "reference.npz") as arrays:
        assert sorted(arrays) == ["arr_0", "mu", "mu_s", "sigma", "sigma_s"]
        assert np.array_equal(arrays["arr_0"], channels_last(real))
        for mean, covariance, own in (("mu", "sigma", POOL), ("mu_s", "sigma_s", SPATIAL)):
            assert away(arrays[mean], y[own].numpy().mean(0)) < 1e-6
            assert away(arrays[covariance], np.cov(y[own].numpy(), rowvar=False)) < 1e-6
    return figures, ours, real


def away(found: np.ndarray, expected: np.ndarray) -> float:
    """The norm of the difference as a share of what is expected."""
    return float(np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected))


@pytest.mark.full
def test_adm_is_torch_fidelity(tmp_path, network, weights):
    """What torch-fidelity's own command computes of the same images.

    Its FID of fewer images than features has roots of eigenvalues that are rounding (1.3e-5 of it at 40 images, where
    ours is 5e-12 from the distance without covariances); of full rank, `test_figures_of_features` compares.
    """
    figures, ours, real = check_adm(tmp_path, network, 220, 200)
    with contextlib.redirect_stderr(io.StringIO()):
        expected = torch_fidelity.calculate_metrics(
            input1=Pixels(ours), input2=Pixels(real), feature_extractor="inception-v3-compat", isc=True, fid=True,
            prc=True, isc_splits=1, samples_shuffle=False, cuda=False, cache=False, save_cpu_ram=True, verbose=False,
            feature_extractor_weights_path=str(weights),
        )  # fmt: skip
    names = {
        "fid": "frechet_inception_distance",
        "inception_score": "inception_score_mean",
        "precision": "precision",
        "recall": "recall",
    }
    apart = {name: abs(figures[name] / expected[theirs] - 1) for name, theirs in names.items()}
    assert apart.pop("fid") < 1e-4
    assert all(value < 1e-6 for value in apart.values()), apart


@pytest.mark.full
def test_dd1_is_pytorch_fid(tmp_path, network):
    """Statistics and distance of the same images as PNG files."""
    from pytorch_fid import fid_score

    ours, real = pictures(130, 9), pictures(120, 10)
    instrument = Dd1(network)
    file = written(tmp_path, instrument, real, "statistic.pth")
    figures = instrument.figures(batches(ours), file.seen_by(instrument))
    activations = []
    for name, images in (("ours", ours), ("real", real)):
        (tmp_path / name).mkdir()
        files = [tmp_path / name / f"{number:04d}.png" for number in range(len(images))]
        for path, image in zip(files, channels_last(images), strict=True):
            Image.fromarray(image).save(path)
        with contextlib.redirect_stderr(io.StringIO()):
            activations.append(fid_score.get_activations(files, pytorch_fid(), num_workers=0))
    stored = torch.load(tmp_path / "statistic.pth", weights_only=True)
    assert away(stored["m"], activations[1].mean(0)) < 1e-6
    assert away(stored["s"], np.cov(activations[1], rowvar=False)) < 1e-6
    assert figures["fid"] == pytest.approx(by_singular_values(*activations), rel=1e-6)


def test_the_distance_is_pytorch_fids():
    """Of its own function, where covariances have full rank: it adds to them elsewhere."""
    from pytorch_fid.fid_score import calculate_frechet_distance

    x, y = features(400, 24, 1), features(300, 24, 2)
    theirs = calculate_frechet_distance(*(of for one in (x, y) for of in (one.numpy().mean(0), np.cov(one.numpy().T))))
    assert frechet_distance(Gaussian.of(x), Gaussian.of(y)) == pytest.approx(theirs, rel=1e-9)


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
