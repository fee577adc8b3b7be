"""`ddfast evaluate --protocol`: from images or a student to a table, and what is refused before that.

In place of Inception a network of a few features looks on: tests/evaluation has the true one.
"""

import hashlib
import json
import resource

import numpy as np
import pytest
import torch
from commands import in_this_process
from launching import launch
from PIL import Image
from pixels import channels_last, pictures

from ddfast import judging as judged
from ddfast.evaluation import references as reference_files
from ddfast.evaluation.inception import LOGITS, POOL, SPATIAL

WIDTH = 6


class Little:
    """Sees colours of places; its weights are a file of any content."""

    def __init__(self, path, device):
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        self.device = torch.device(device)

    def look(self, pixels, prepare):
        places = torch.nn.functional.adaptive_avg_pool2d(pixels.float() / 255, (3, 2))
        return {POOL: places[:, 0].flatten(1), SPATIAL: places[:, 1].flatten(1), LOGITS: 9 * places[:, 2].flatten(1)}


def take_little(patch):
    patch.setattr(judged, "Inception", Little)
    patch.setattr(reference_files, "WIDTHS", {POOL: WIDTH, SPATIAL: WIDTH})


@pytest.fixture(autouse=True)
def little(monkeypatch):
    take_little(monkeypatch)


@pytest.fixture
def files(tmp_path):
    """Weights, images of two sets, and a reference of either instrument."""
    (tmp_path / "weights.pth").write_bytes(b"weights")
    np.savez(tmp_path / "ours.npz", channels_last(pictures(60, 0, size=16)))
    (tmp_path / "real").mkdir()
    for number, image in enumerate(channels_last(pictures(50, 1, size=16))):
        Image.fromarray(image).save(tmp_path / "real" / f"{number:02d}.png")
    return tmp_path


@pytest.fixture
def references(files, here):
    for protocol, name in (("adm", "real.npz"), ("dd1", "real.pth")):
        made = ["--make-reference", files / "real", "--to", files / name, "--inception", files / "weights.pth"]
        code, out, errors = here("evaluate", "--protocol", protocol, *made)
        assert code == 0, errors
        held = ", and 50 of them for precision and recall" if protocol == "adm" else ""
        assert f"statistics of 50 images{held}: {files / name}\n" in out
    return files


def judging(files, protocol, *more):
    reference = files / ("real.npz" if protocol == "adm" else "real.pth")
    return ("evaluate", "--protocol", protocol, "--reference", reference, "--inception", files / "weights.pth", *more)


def test_from_images_to_a_table(here, references, tmp_path):
    files = references
    code, out, _ = here(*judging(files, "adm", "--images", files / "ours.npz", "--json", tmp_path / "a.json"))
    assert code == 0
    said = json.loads((tmp_path / "a.json").read_text())
    assert said["instrument"] == "adm"
    assert said["count"] == 60
    assert said["size"] == [16, 16]
    assert said["source"] == "ours.npz" and str(files / "ours.npz") in out  # the terminal is the user's own
    assert said["reference"]["file"] == "real.npz"
    assert len(said["inception"]["sha256"]) == 64
    assert list(said["figures"]) == [
        "fid", "fid_error", "sfid", "sfid_error", "inception_score", "precision", "recall", "count",
    ]  # fmt: skip
    assert "| images | count | FID-60 | sFID-60 | IS-60 | precision-60 | recall-60 |" in out
    assert "FID-60 is no FID-50k" in out
    code, out, _ = here(*judging(files, "adm", "--images", files / "real", "--beside", tmp_path / "a.json"))
    assert code == 0
    head, _, own, other = (line.split(" | ") for line in out.splitlines() if line.startswith("|"))
    assert [title.strip(" |") for title in head] == [
        "images", "count", "FID-50", "FID-60", "sFID-50", "sFID-60", "IS-50", "IS-60", "precision-50",
        "precision-60", "recall-50", "recall-60",
    ]  # fmt: skip
    assert own[2].strip().startswith("0.00")  # the reference itself
    assert own[-4::2] == ["1.0000", "1.0000"]
    assert own[3].strip() == "" == other[2].strip()
    code, out, _ = here("evaluate", "--beside", tmp_path / "a.json")
    assert code == 0
    assert "| FID-60 |" in out


def test_dd1_has_fid_alone_and_no_column_of_adms(here, references, tmp_path):
    files = references
    code, out, _ = here(*judging(files, "dd1", "--images", files / "ours.npz", "--json", tmp_path / "b.json"))
    assert code == 0
    assert "| images | count | FID-60 |\n" in out
    code, _, errors = here(*judging(files, "adm", "--images", files / "real", "--beside", tmp_path / "b.json"))
    assert code == 1
    assert "was measured with the instrument dd1" in errors
    assert errors.count("\n") == 1 + errors.count("warning")


def test_a_student_is_sampled_and_judged(here, references, generators, tmp_path):
    student = ("--student", generators / "digits", "--count", 30, "--steps", 2, "--labels", "random", "--seed", 3)
    code, out, errors = here(*judging(references, "adm", *student, "--json", tmp_path / "c.json"))
    assert code == 0, errors
    said = json.loads((tmp_path / "c.json").read_text())
    assert said["count"] == 30 == said["figures"]["count"]
    assert said["settings"]["labels"] == "random"
    assert said["settings"]["steps"] == 2
    assert said["source"] == "digits, 2 steps"
    assert "| random | 30 |" in out
    to = ("--format", "npz", "--to", tmp_path / "drawn.npz")
    assert here("sample", *student, *to)[0] == 0
    code, again, _ = here(*judging(references, "adm", "--images", tmp_path / "drawn.npz", "--labels", "random"))
    assert code == 0
    rows = ([line.split(" | ")[1:] for line in text.splitlines() if line.startswith("|")] for text in (out, again))
    assert next(rows) == next(rows)


def commands(cache, folder, *all_of_them):
    """Commands in this process, one of several; the codes that they end with."""
    with pytest.MonkeyPatch.context() as patch:
        take_little(patch)
        return [
            in_this_process(cache, *command, "--json", folder / f"{n}.json") for n, command in enumerate(all_of_them)
        ]


def test_any_number_of_processes_judges_the_same(references, generators, cache, tmp_path):
    student = ("--student", generators / "digits", "--count", 50, "--batch-size", 7)
    given = (
        judging(references, "adm", "--images", references / "ours.npz"),
        judging(references, "adm", "--images", references / "real"),
        judging(references, "dd1", *student),
        judging(references, "adm", *student),
    )
    said = []
    for count in (1, 2, 3):
        (tmp_path / f"{count}").mkdir()
        assert launch(count, commands, cache, tmp_path / f"{count}", *given) == [[0] * len(given)] * count
        said.append([json.loads((tmp_path / f"{count}" / f"{n}.json").read_text()) for n in range(len(given))])
    for one, *others in zip(*said, strict=True):
        for other in others:
            assert other["figures"] == pytest.approx(one["figures"], rel=1e-9, abs=1e-9)
            assert other | {"figures": 0} == one | {"figures": 0}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--protocol", "adm", "--images", "{ours}"), "--inception: missing; give the network's weights"),
        (("--protocol", "adm", "--images", "{ours}", "--inception", "{weights}"), "--reference: missing"),
        (("--images", "{ours}"), "--protocol: missing; give adm, dd1 or clean"),
        (("--protocol", "adm"), "--protocol: has no effect: there are neither --images nor a --student"),
        ((), "--student: missing"),
        (("--student", "x", "--count", "5"), "--count: has no effect: it is for --protocol"),
        (("--protocol", "adm", "--images", "{ours}", "--seed", "1"), "--seed: has no effect: --images are there"),
        (("--protocol", "adm", "--images", "{ours}", "--student", "x"), "--student: has no effect"),
        (("--protocol", "adm", "--images", "x", "--evaluation.samples", "200"), "--evaluation.samples: has no effect"),
        (("--protocol", "adm", "--make-reference", "{ours}"), "--to: missing"),
        (("--protocol", "dd1", "--make-reference", "{ours}", "--to", "x.npz"), "has a name that ends in .pth"),
        (("--protocol", "adm", "--make-reference", "{ours}", "--to", "{real}.npz"), "exists; choose another name"),
        (("--protocol", "adm", "--preset", "dd1", "--student", "x"), "its table is by --protocol dd1, not adm"),
        (("--beside", "{weights}"), "is no JSON"),
        (("--beside", "{metrics}"), "names no instrument"),
        (("--num-fid-samples", "5"), "here it is called --count of --protocol"),
    ],
)
def test_what_is_refused(here, references, arguments, words):
    (references / "metrics.json").write_text("{}")
    places = {name: references / f"{name}.{end}" for name, end in (("ours", "npz"), ("weights", "pth"))}
    places |= {"real": references / "real", "metrics": references / "metrics.json"}
    code, _, errors = here("evaluate", *(argument.format(**places) for argument in arguments))
    assert code == 1
    assert words in errors


def test_images_of_ddfast_say_how_they_were_made(here, references, generators, tmp_path):
    """In a folder and in an npz file alike; what contradicts it is refused, and so is a part of them."""
    files, shared = references, ("--count=4", "--batch-size=4", "--labels=random", "--seed=3")
    for form in ("files", "npz"):
        sampled = ("sample", "--student", generators / "var", "--format", form, "--to", tmp_path / "made")
        assert here(*sampled, *shared)[0] == 0
    for images in (tmp_path / "made", tmp_path / "made.npz"):
        told = tmp_path / f"{images.name}.json"
        code, _, errors = here(*judging(files, "adm", "--images", images, "--json", told))
        assert code == 0, errors
        assert json.loads(told.read_text())["settings"]["labels"] == "random"
        for flags, words in (
            (("--labels=uniform",), f"--labels uniform: --images {images} were made with random ones"),
            (("--preset=var-readme",), f"--preset var-readme: --images {images} were made with the preset none"),
        ):
            code, _, errors = here(*judging(files, "adm", "--images", images, *flags))
            assert code == 1
            assert words in errors
    next((tmp_path / "made").glob("*.png")).unlink()
    code, _, errors = here(*judging(files, "adm", "--images", tmp_path / "made"))
    assert code == 1
    assert "holds 3 images of the 4 that `ddfast sample` was to make: the same command makes the others" in errors


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("mu", "sigma"), "has mu and sigma alone, as references of pytorch-fid and clean-fid do"),
        (("mu", "mu_s", "sigma_s"), "and neither mu with sigma nor arr_0"),
    ],
)
def test_a_reference_of_another_instrument_is_named(here, references, names, words):
    with np.load(references / "real.npz") as there:
        np.savez(references / "other.npz", **{name: there[name] for name in names})
    flags = ("--reference", references / "other.npz", "--inception", references / "weights.pth")
    code, _, errors = here("evaluate", "--protocol", "adm", *flags, "--images", references / "ours.npz")
    assert code == 1
    assert words in errors


class Wide(Little):
    """As many features as the true one has."""

    def look(self, pixels, prepare):
        values = pixels.float().flatten(1) / 255
        weights = torch.sin(torch.arange(values.shape[1] * 2048, dtype=torch.float32)).view(-1, 2048)
        pooled = (values @ weights).tanh()
        return {POOL: pooled, SPATIAL: pooled[:, :2023], LOGITS: pooled[:, :1008]}


def peak(folder, *command):
    """The largest resident set, in KiB, of a command in a process of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judged, "Inception", Wide)
        assert in_this_process(folder, *command) == 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.full
def test_memory_does_not_depend_on_the_count(tmp_path, monkeypatch):
    """FID's: precision and recall keep the features of all images."""
    monkeypatch.undo()  # statistics of the true widths
    (tmp_path / "weights.pth").write_bytes(b"weights")
    found = {}
    for count in (1000, 2000, 20_000):
        np.savez(
            tmp_path / f"{count}.npz", np.tile(channels_last(pictures(1000, 0, size=16)), (count // 1000, 1, 1, 1))
        )
    shared = ("evaluate", "--protocol", "dd1", "--inception", tmp_path / "weights.pth")
    made = (*shared, "--make-reference", tmp_path / "1000.npz", "--to", tmp_path / "real.pth")
    launch(1, peak, tmp_path, *made)
    for count in (2000, 20_000):
        images = ("--reference", tmp_path / "real.pth", "--images", tmp_path / f"{count}.npz")
        (found[count],) = launch(1, peak, tmp_path, *shared, *images)
    assert found[20_000] < 1.05 * found[2000], found
