"""`ddfast evaluate --protocol clean --captions FILE --clip FOLDER`: from COCO's captions to a table.

In place of Inception and CLIP networks of a few features look on: tests/evaluation has the true ones.
"""

import json
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from pixels import channels_last, pictures
from safetensors.torch import save_file
from test_judging import WIDTH, Little

from ddfast.evaluation.inception import POOL

SAID = [(7, "two dogs"), (5, "a red bird on a branch"), (7, "a pair of dogs"), (9, "x")]
CAPTIONS = ["a red bird on a branch", "two dogs", "x"]


class Letters:
    """A tokenizer, T5's and CLIP's: a token per letter."""

    def __len__(self):
        return 256

    def __call__(self, texts, *, max_length, **settings):
        ids = torch.tensor([[ord(letter) for letter in f"{text}        "[:max_length]] for text in texts])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Encoder(torch.nn.Module):
    def forward(self, input_ids, attention_mask):
        return types.SimpleNamespace(last_hidden_state=input_ids.float()[..., None].expand(-1, -1, 12) / 100)


class Colours(torch.nn.Module):
    """CLIP's place: an image's mean colours, a caption's first letters."""

    config = types.SimpleNamespace(
        text_config=types.SimpleNamespace(vocab_size=256, max_position_embeddings=4),
        vision_config=types.SimpleNamespace(image_size=8),
    )

    def forward(self, pixel_values, input_ids, attention_mask):
        return types.SimpleNamespace(image_embeds=pixel_values.mean((2, 3)), text_embeds=input_ids[:, :3].float() - 100)


@pytest.fixture
def transformers(monkeypatch):
    library = types.ModuleType("transformers")
    found = {"missing_keys": []}
    library.AutoTokenizer = types.SimpleNamespace(from_pretrained=lambda name, **_: Letters())
    library.T5EncoderModel = types.SimpleNamespace(from_pretrained=lambda name: Encoder())
    library.CLIPModel = types.SimpleNamespace(from_pretrained=lambda name, **_: (Colours(), found))
    monkeypatch.setitem(sys.modules, "transformers", library)


@pytest.fixture(autouse=True)
def little(monkeypatch):
    monkeypatch.setattr("ddfast.judging.Inception", Little)
    monkeypatch.setattr("ddfast.evaluation.references.WIDTHS", {POOL: WIDTH})


@pytest.fixture
def files(tmp_path_factory, here):
    """Weights, a reference, COCO's captions and a folder of a CLIP."""
    folder = tmp_path_factory.mktemp("judged")
    (folder / "weights.pth").write_bytes(b"weights")
    np.savez(folder / "real.npz", channels_last(pictures(5, 1, size=16)))
    made = ("--make-reference", folder / "real.npz", "--to", folder / "reference.npz")
    assert here("evaluate", "--protocol", "clean", "--inception", folder / "weights.pth", *made)[0] == 0
    annotations = [{"image_id": image, "id": number, "caption": text} for number, (image, text) in enumerate(SAID)]
    coco = {"images": [{"id": image} for image in (5, 7, 9)], "annotations": annotations}
    (folder / "coco.json").write_text(json.dumps(coco))
    (folder / "clip").mkdir()
    (folder / "clip" / "config.json").write_text("{}")
    (folder / "clip" / "model.safetensors").write_bytes(b"weights")
    return folder


def judging(files, *more):
    given = ("--inception", files / "weights.pth", "--reference", files / "reference.npz")
    return ("evaluate", "--protocol", "clean", *given, *more)


def refused(here, words, *arguments):
    """The last line, after what is said of weights that are not the published ones."""
    code, _, errors = here(*arguments)
    assert code == 1, errors
    line = errors.strip().splitlines()[-1]
    assert line.startswith("ddfast evaluate: error: ")
    assert words in line


def test_a_text_student_and_its_images(here, generators, files, tmp_path, transformers):
    student = ("--student", generators / "text", "--captions", files / "coco.json", "--count", 3)
    clip = ("--clip", files / "clip")
    code, out, errors = here(*judging(files, *student, *clip, "--json", tmp_path / "a.json"))
    assert code == 0, errors
    assert "| images | labels | count | FID-3 | CLIP score |" in out
    assert "CLIP score: 100 max(cos, 0) by clip (" in out
    said = json.loads((tmp_path / "a.json").read_text())
    assert (said["instrument"], said["count"]) == ("clean", 3)
    assert set(said["figures"]) == {"fid", "clip_score", "clip_score_error", "count"}
    # The same images from a file, each with the caption of its number.
    assert here("sample", *student, "--format", "npz", "--to", tmp_path / "drawn.npz")[0] == 0
    images = ("--images", tmp_path / "drawn.npz", "--captions", files / "coco.json")
    beside = ("--beside", tmp_path / "a.json", "--json", tmp_path / "b.json")
    code, out, errors = here(*judging(files, *images, *clip, *beside))
    assert code == 0, errors
    again = json.loads((tmp_path / "b.json").read_text())
    assert again["figures"] == pytest.approx(said["figures"], rel=1e-9)
    assert again["clip"] == said["clip"]
    with np.load(tmp_path / "drawn.npz") as arrays:
        pixels = arrays["arr_0"]
        assert arrays["arr_1"].tolist() == [0, 1, 2]
    sized = np.stack([np.asarray(Image.fromarray(one).resize((8, 8), Image.Resampling.BICUBIC)) for one in pixels])
    colours = sized.mean((1, 2)) / 255
    colours = (colours - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    letters = np.array([[ord(letter) - 100 for letter in f"{text}  "[:3]] for text in CAPTIONS])
    cosines = (colours * letters).sum(1) / np.linalg.norm(colours, axis=1) / np.linalg.norm(letters, axis=1)
    assert said["figures"]["clip_score"] == pytest.approx(100 * np.maximum(cosines, 0).mean(), rel=1e-5)
    # Another model's scores, or those of other captions, share no table.
    (tmp_path / "texts").write_text("a\nb\nc\n")
    other = ("--images", tmp_path / "drawn.npz", "--captions", tmp_path / "texts", *clip)
    refused(here, "was measured with the CLIP captions of SHA-256", *judging(files, *other, *beside[:2]))


def test_features_in_place_of_a_model(here, files, tmp_path):
    images, texts = torch.randn(5, 6), torch.randn(5, 6)
    save_file({"image_features": images, "text_features": texts}, tmp_path / "features.safetensors")
    given = ("--images", files / "real.npz", "--clip", tmp_path / "features.safetensors")
    assert here(*judging(files, *given, "--json", tmp_path / "a.json"))[0] == 0
    figures = json.loads((tmp_path / "a.json").read_text())["figures"]
    expected = 100 * torch.cosine_similarity(images.double(), texts.double()).clamp_min(0).mean()
    assert figures["clip_score"] == pytest.approx(float(expected), rel=1e-9)
    assert figures["fid"] == pytest.approx(0, abs=1e-4)  # the reference's own images
    assert figures["count"] == 5


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("--captions: missing; give the captions that --clip", ["--images={real}", "--clip={clip}"]),
        ("coco.json: has 3 captions, --images 5 images", ["--images={real}", "--clip={clip}", "--captions={coco}"]),
        ("--captions: has no effect: --images are there already", ["--images={real}", "--captions={coco}"]),
        ("no folder of a CLIP model", ["--images={real}", "--clip={tmp}/none", "--captions={texts}"]),
        ("--clip {tmp}/texts.safetensors: holds a", ["--images={real}", "--clip={tmp}/texts.safetensors"]),
        ("coco.json is no file of captions", ["--images={real}", "--clip={clip}", "--captions={tmp}/coco.json"]),
        ("VARTeacher is conditioned on class labels", ["--student={var}", "--captions={coco}", "--clip={clip}"]),
        ("--clip: has no effect", ["--make-reference={real}", "--to={tmp}/x.npz", "--clip={clip}"]),
        ("has a name that ends in .npz", ["--make-reference={real}", "--to={tmp}/x.pth"]),
    ],
)
def test_what_is_refused(here, generators, files, tmp_path, transformers, words, arguments):
    save_file({"a": torch.zeros(1)}, tmp_path / "texts.safetensors")
    (tmp_path / "coco.json").write_text('{"images": []}')
    (tmp_path / "texts").write_text("a\nb\nc\nd\ne\n")
    places = {"real": files / "real.npz", "clip": files / "clip", "coco": files / "coco.json", "tmp": tmp_path}
    places |= {"texts": tmp_path / "texts", "var": generators / "var"}
    given = [argument.format(**places) for argument in arguments]
    call = judging(files, *given)
    if any(argument.startswith("--make-reference") for argument in given):
        call = ("evaluate", "--protocol", "clean", "--inception", files / "weights.pth", *given)
    refused(here, words.format(**places), *call)


def test_a_score_needs_an_instrument_beside_it(here, files, generators):
    student = ("--student", generators / "text", "--clip", files / "clip")
    refused(here, "--clip: has no effect: it is for --protocol", "evaluate", *student)
