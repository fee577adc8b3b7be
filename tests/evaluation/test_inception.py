"""Files of Inception's weights and of references: what they may be, and what is said of others."""

import builtins
import hashlib
import subprocess
import sys

import inceptions
import numpy as np
import pytest
import torch
from pixels import channels_last, pictures

from ddfast.errors import DDFastError
from ddfast.evaluation.images import open_images
from ddfast.evaluation.inception import Inception
from ddfast.evaluation.instruments import Reference
from ddfast.evaluation.references import MOST_IMAGES, ReferenceFile, write_reference
from ddfast.frechet import Gaussian


def test_published_names_promise_their_content(tmp_path, capsys):
    """Random weights are told from the published ones, and another file under their name is refused."""
    path = inceptions.write_weights(tmp_path / "mine.pth")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert Inception(path).sha256 == digest
    assert "mine.pth has not the published weights (6726825d)" in capsys.readouterr().err
    named = path.rename(tmp_path / f"mine-{digest[:8]}.pth")
    assert Inception(named).sha256 == digest
    wrong = named.rename(tmp_path / "weights-inception-2015-12-05-6726825d.pth")
    with pytest.raises(DDFastError, match=f"its name says 6726825d, its content has the SHA-256 {digest[:8]}"):
        Inception(wrong)


class Traced(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def torchscript(path):
    torch.jit.script(Traced()).save(str(path))


def changed(**tensors):
    """The random weights with some tensors in place of their own (None: without)."""

    def write(path):
        content = {**inceptions.random_weights(), **{name.replace("__", "."): value for name, value in tensors.items()}}
        torch.save({name: value for name, value in content.items() if value is not None}, path)

    return write


class Code:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code of a file was run')",))


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (torchscript, "TorchScript program, which is not run here"),
        (changed(AuxLogits__fc__bias=torch.zeros(3)), "is torchvision's classifier, which was trained otherwise"),
        (changed(fc__weight=torch.zeros(1000, 2048)), "is torchvision's classifier"),
        (changed(fc__weight=torch.zeros(1008, 2047)), "is not the Inception of 2015-12-05: .*fc.weight"),
        (changed(Mixed_7b__branch1x1__conv__weight=None), "not the Inception of .*Mixed_7b.branch1x1.conv"),
        (lambda path: torch.save({"a.weight": torch.zeros(2)}, path), r"is no Inception network \(a.weight"),
        (lambda path: torch.save({"x": Code()}, path), "something else than tensors"),
        (lambda path: path.write_text("<html>"), "web page"),
        (lambda path: None, "no checkpoint at"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_other_files_are_named(write, words, tmp_path):
    path = tmp_path / "weights.pth"
    write(path)
    with pytest.raises(DDFastError, match=words):
        Inception(path)


def test_the_library_is_optional(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "torch_fidelity":
            raise ModuleNotFoundError("No module named 'torch_fidelity'", name="torch_fidelity")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DDFastError, match=r"torch_fidelity is not installed: pip install 'ddfast\[fid\]'"):
        Inception(tmp_path / "any.pth")


def test_a_torchvision_that_does_not_fit(tmp_path, monkeypatch):
    real = builtins.__import__

    def unfit(name, *rest):
        if name == "torch_fidelity":
            raise RuntimeError("operator torchvision::nms does not exist")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", unfit)
    with pytest.raises(DDFastError, match=r"torchvision does not fit PyTorch .*torchvision::nms") as caught:
        Inception(tmp_path / "any.pth")
    assert "\n" not in str(caught.value)


def test_nothing_is_imported_before_it_is_needed():
    """`import ddfast.evaluate` works without the libraries of the instruments."""
    code = "import sys, ddfast.evaluate; print(*(n for n in sys.modules if 'fidelity' in n or 'torchvision' in n))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# References ----------------------------------------------------------------------------------------------------------


def statistics(width: int, seed: int = 0) -> Gaussian:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(8, width, generator=generator, dtype=torch.float64)
    return Gaussian(rows.mean(0), torch.cov(rows.T), 8)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(gaussians={"fid": statistics(2048), "sfid": statistics(2023, 1)})


def test_what_is_written_is_read(tmp_path, reference):
    np.savez(tmp_path / "images.npz", channels_last(pictures(9, 0, size=4)))
    images = open_images(tmp_path / "images.npz", "--images")
    assert write_reference(tmp_path / "adm.npz", "adm", reference, images) == 9
    assert write_reference(tmp_path / "dd1.pth", "dd1", reference, images) == 0
    adm, dd1 = ReferenceFile(tmp_path / "adm.npz", "adm"), ReferenceFile(tmp_path / "dd1.pth", "dd1")
    for name, gaussian in adm.gaussians.items():
        assert torch.equal(gaussian.mean, reference.gaussians[name].mean)
        assert torch.equal(gaussian.covariance, reference.gaussians[name].covariance)
    assert torch.equal(dd1.gaussians["fid"].covariance, reference.gaussians["fid"].covariance)
    assert adm.images.count == 9
    assert dd1.images is None


def test_a_reference_holds_some_of_many_images(tmp_path, reference, monkeypatch):
    """In their order, chosen by the seed."""
    assert MOST_IMAGES == 10_000
    monkeypatch.setattr("ddfast.evaluation.references.MOST_IMAGES", 5)
    real = channels_last(pictures(40, 0, size=4))
    np.savez(tmp_path / "images.npz", real)
    images = open_images(tmp_path / "images.npz", "--images")
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert write_reference(tmp_path / f"{name}.npz", "adm", reference, images, seed) == 5
        with np.load(tmp_path / f"{name}.npz") as arrays:
            kept = arrays["arr_0"]
        found.append([int((real == one).all((1, 2, 3)).nonzero()[0][0]) for one in kept])
    assert found[0] == found[1] == sorted(set(found[0]))
    assert found[0] != found[2]


def arrays(path, **content):
    np.savez(path, **content)


MU, SIGMA = np.zeros(2048), np.eye(2048)
SPATIAL = {"mu_s": np.zeros(2023), "sigma_s": np.eye(2023)}


@pytest.mark.parametrize(
    ("instrument", "name", "write", "words"),
    [
        ("adm", "x.npz", lambda path: arrays(path, m=MU), "takes an .npz file with mu, sigma, mu_s, .*, not m"),
        ("adm", "x.npz", lambda path: arrays(path, mu=MU[:5], sigma=SIGMA, **SPATIAL), r"fid: mean \[5\] and"),
        ("adm", "x.npz", lambda path: arrays(path, mu=MU, sigma=SIGMA * np.nan, **SPATIAL), "not finite"),
        (
            "adm", "x.npz", lambda path: arrays(path, mu=MU, sigma=np.triu(np.ones((2048, 2048))), **SPATIAL),
            "not symmetric",
        ),
        ("adm", "x.npz", lambda path: arrays(path, mu=MU.astype(int), sigma=SIGMA, **SPATIAL), "mu is int64"),
        ("adm", "x.npz", lambda path: arrays(path, mu=MU, sigma=SIGMA, arr_0=MU), "arr_0 is float64"),
        ("adm", "x.pth", lambda path: torch.save({"m": torch.zeros(2048)}, path), "takes an .npz file"),
        ("dd1", "x.npz", lambda path: arrays(path, mu=MU, sigma=SIGMA), "is an .npz file, as --protocol adm takes it"),
        ("dd1", "x.pth", lambda path: torch.save({"mu": torch.zeros(2048)}, path), "takes m and s, not mu"),
        ("dd1", "x.pth", lambda path: torch.save({"x": Code()}, path), "something else than tensors"),
        ("dd1", "x.pth", lambda path: None, "there is no such file"),
    ],
)  # fmt: skip
def test_other_references_are_named(instrument, name, write, words, tmp_path):
    write(tmp_path / name)
    with pytest.raises(DDFastError, match=words):
        ReferenceFile(tmp_path / name, instrument)


def test_dd1s_file_may_hold_arrays_of_numpy(tmp_path):
    torch.save({"m": MU.astype(np.float32), "s": SIGMA}, tmp_path / "x.pth")
    fitted = ReferenceFile(tmp_path / "x.pth", "dd1").gaussians["fid"]
    assert fitted.mean.dtype == torch.float64
    assert torch.equal(fitted.covariance, torch.eye(2048, dtype=torch.float64))
