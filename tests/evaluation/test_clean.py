"""The instrument clean, against clean-fid's own reading, resizing and distance, around the same network."""

import importlib
import importlib.util
import sys
import types

import inceptions
import numpy as np
import pytest
import torch
from PIL import Image
from pixels import channels_last, pictures
from test_frechet import by_singular_values

from ddfast.errors import DDFastError
from ddfast.evaluation.images import Batch, open_images
from ddfast.evaluation.inception import POOL, Inception
from ddfast.evaluation.instruments import INCEPTIONS, Adm, Clean
from ddfast.evaluation.references import ReferenceFile, write_reference


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Inception:
    return Inception(inceptions.write_weights(tmp_path_factory.mktemp("weights") / "inception.pth"))


@pytest.fixture(scope="module")
def plain():
    """pytorch-fid's network with the random weights, that takes what clean-fid gives to its own: 0..255, resized."""
    module = importlib.import_module("pytorch_fid.inception")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: inceptions.random_weights())
        made = module.InceptionV3(resize_input=False, normalize_input=False).eval()
    return lambda images: made((images - 128) / 128)[0].flatten(1)


@pytest.fixture(scope="module")
def cleanfid():
    pytest.importorskip("cleanfid")
    if importlib.util.find_spec("requests") is None:  # what it downloads by, and nothing here does
        sys.modules["requests"] = types.ModuleType("requests")
    return importlib.import_module("cleanfid.fid")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of pictures of several sizes, one of them grey."""
    folder = tmp_path_factory.mktemp("photos")
    for number, side in enumerate((40, 64, 310, 52)):
        image = channels_last(pictures(1, number, size=side))[0][: side - 3 * number]
        Image.fromarray(image[:, :, 0] if number == 3 else image).save(folder / f"{number}.png")
    return folder


def theirs(cleanfid, plain, folder):
    device = torch.device("cpu")
    return cleanfid.get_folder_features(str(folder), plain, num_workers=0, device=device, mode="clean", verbose=False)


def written(folder, images):
    folder.mkdir()
    for number, image in enumerate(channels_last(images)):
        Image.fromarray(image).save(folder / f"{number:03d}.png")
    return folder


@pytest.mark.full
def test_it_is_clean_fid(tmp_path, network, plain, cleanfid, photos):
    """From PNG files to features, and to the distance with a reference in a file, to 1e-6."""
    ours = pictures(5, 20, size=48)
    instrument = INCEPTIONS["clean"](network)
    assert isinstance(instrument, Clean)
    there = open_images(photos, "--make-reference", any_size=True)
    assert write_reference(tmp_path / "real.npz", "clean", instrument.see(there.batches()).reference(), there) == 0
    file = ReferenceFile(tmp_path / "real.npz", "clean")
    batches = [Batch(ours[rows], rows, rows) for rows in torch.arange(5).split(3)]
    figures = instrument.figures(batches, file.seen_by(instrument))
    seen = theirs(cleanfid, plain, written(tmp_path / "ours", ours))
    torch.testing.assert_close(instrument.look(ours)[POOL], torch.from_numpy(seen), rtol=1e-5, atol=1e-5)
    real = theirs(cleanfid, plain, photos)
    assert set(figures) <= {"fid", "fid_error", "count"}
    # Not by clean-fid's own distance: SciPy's root of singular matrices is wrong in the sixth digit, and takes minutes.
    seen, real = (features.astype(np.float64) for features in (seen, real))
    assert figures["fid"] == pytest.approx(by_singular_values(seen, real), rel=1e-6)
    with np.load(tmp_path / "real.npz") as arrays:  # as clean-fid reads its own
        assert arrays["mu"] == pytest.approx(real.mean(0), rel=1e-5, abs=1e-6)
        assert np.allclose(arrays["sigma"], np.cov(real, rowvar=False), rtol=1e-5, atol=1e-5)
        assert arrays["clean"] == 4
    assert abs(Adm(network).look(ours)[POOL] - torch.from_numpy(seen)).max() > 1e-2  # it is another instrument


def test_a_reference_of_clean_fids_own(tmp_path, network):
    generator = np.random.default_rng(0)
    features = generator.normal(size=(9, 2048))
    np.savez_compressed(tmp_path / "a.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    gaussian = ReferenceFile(tmp_path / "a.npz", "clean").gaussians["fid"]
    assert np.array_equal(gaussian.mean.numpy(), features.mean(0))


MU, SIGMA = np.zeros(2048), np.eye(2048)


@pytest.mark.parametrize(
    ("instrument", "arrays", "words"),
    [
        (
            "clean",
            {"mu": MU, "sigma": SIGMA, "mu_s": MU, "sigma_s": SIGMA},
            "takes an .npz file with mu and sigma alone",
        ),
        (
            "clean",
            {"mu": MU, "sigma": SIGMA, "arr_0": MU},
            "takes an .npz file with mu and sigma alone.*it has mu, sigma",
        ),
        ("clean", {"mu": MU}, "it has mu"),
        ("clean", {"mu": MU[1:], "sigma": SIGMA}, r"fid: mean \[2047\]"),
        ("adm", {"mu": MU, "sigma": SIGMA, "clean": np.array(3)}, "was made by --protocol clean"),
        ("dd1", {"mu": MU, "sigma": SIGMA, "clean": np.array(3)}, "is an .npz file"),
    ],
)
def test_references_of_other_instruments_are_named(tmp_path, instrument, arrays, words):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DDFastError, match=words):
        ReferenceFile(tmp_path / "a.npz", instrument)


def test_what_is_no_npz_is_no_reference(tmp_path):
    torch.save({"m": torch.zeros(2048)}, tmp_path / "a.pth")
    with pytest.raises(DDFastError, match=r"takes an .npz file with mu and sigma alone.*it is none"):
        ReferenceFile(tmp_path / "a.pth", "clean")


def test_several_sizes_are_read_one_by_one_where_they_may_be(photos):
    images = open_images(photos, "--make-reference", any_size=True)
    assert images.size == (0, 0)
    assert [batch.number.tolist() for batch in images.batches(4)] == [[number] for number in range(4)]
    assert len({tuple(batch.pixels.shape) for batch in images.batches()}) == 4
    with pytest.raises(DDFastError, match="images of several sizes"):
        open_images(photos, "--images")
