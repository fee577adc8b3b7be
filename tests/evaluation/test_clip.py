"""The CLIP score, on a tiny random model of transformers' where that is installed, and on a stand-in for it."""

import contextlib
import json
import math
import sys
import types
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from launching import launch
from PIL import Image
from safetensors.torch import save_file

from ddfast import processes
from ddfast.errors import DDFastError
from ddfast.evaluation.clip import Clip, ClipScore, FileScore, clip_figures
from ddfast.evaluation.images import Batch as Numbered
from ddfast.evaluation.resizing import clip_resize

CAPTIONS = ["a red bird on a branch", "two dogs", "a cat", "zebras " * 40, "x"]


@dataclass
class Batch:
    pixels: torch.Tensor
    condition: torch.Tensor
    number: torch.Tensor


def batches(sizes, seed=0, side=48):
    generator, made, start = torch.Generator().manual_seed(seed), [], 0
    for size in sizes:
        pixels = torch.randint(256, (size, 3, side, side), generator=generator, dtype=torch.uint8)
        number = torch.arange(start, start + size)
        made.append(Batch(pixels, (2 * number + 1) % len(CAPTIONS), number))
        start += size
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP of two small layers, with the letters as its tokens."""
    transformers = pytest.importorskip("transformers")
    with contextlib.suppress(ImportError):
        import inceptions  # noqa: F401  transformers imports torchvision where it is, also where it does not fit
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(ord("a") + number) for number in range(26)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    config = transformers.CLIPConfig(
        text_config={**sizes, **ends, "vocab_size": len(tokens), "max_position_embeddings": 20},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    return folder


def plain_cosine(folder, pixels, caption):
    """A picture's and a caption's, one at a time, in float64, with the tokens written out by hand."""
    import transformers

    model = transformers.CLIPModel.from_pretrained(folder, local_files_only=True).double().eval()
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((32, 32), Image.Resampling.BICUBIC)
    image = np.asarray(picture, dtype=np.float64) / 255
    image = (image - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    tokens = [52]
    for word in caption.split():
        tokens += [ord(letter) - ord("a") for letter in word[:-1]] + [26 + ord(word[-1]) - ord("a")]
    tokens = [*tokens[:19], 53]
    with torch.no_grad():
        seen = model.visual_projection(model.vision_model(torch.from_numpy(image).permute(2, 0, 1)[None]).pooler_output)
        read = model.text_projection(model.text_model(torch.tensor([tokens])).pooler_output)
    seen, read = seen.numpy()[0], read.numpy()[0]
    return float(seen @ read / math.sqrt((seen @ seen) * (read @ read)))


def test_scores_are_those_of_a_second_implementation(folder):
    made = batches([3, 1, 4])
    expected = [
        plain_cosine(folder, pixels, CAPTIONS[number])
        for batch in made
        for pixels, number in zip(batch.pixels, batch.condition.tolist(), strict=True)
    ]
    scores = [100 * max(cosine, 0) for cosine in expected]
    assert 0 < sum(cosine > 0 for cosine in expected) < 8  # of random weights some are negative
    score = ClipScore(Clip(folder), CAPTIONS)
    assert [batch is other for batch, other in zip(score.along(iter(made)), made, strict=True)] == [True] * 3
    figures = score.figures()
    assert figures["clip_score"] == pytest.approx(sum(scores) / 8, rel=1e-4)
    assert figures["clip_score_error"] == pytest.approx(np.std(scores, ddof=1) / 8**0.5, rel=1e-4)
    assert figures["count"] == 8


def test_a_score_does_not_depend_on_the_batches(folder):
    clip, whole = Clip(folder), batches([6])[0]
    together = clip.cosines(whole.pixels, [CAPTIONS[number] for number in whole.condition])
    alone = [
        clip.cosines(whole.pixels[row : row + 1], [CAPTIONS[number]])
        for row, number in enumerate(whole.condition.tolist())
    ]
    torch.testing.assert_close(torch.cat(alone), together, rtol=0, atol=1e-6)


def test_preparation_is_that_of_the_librarys_own_processor(folder):
    processing = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    processor = processing.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pixels = batches([2], side=70)[0].pixels
    theirs = processor(list(pixels.permute(0, 2, 3, 1).numpy()), return_tensors="pt")["pixel_values"]
    clip = Clip(folder)
    ours = (clip_resize(pixels, 32) / 255 - clip.mean) / clip.std
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def copied(folder, to):
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_the_folder_says_how_pixels_are_normalised(folder, tmp_path):
    other = copied(folder, tmp_path / "clip")
    file = other / "preprocessor_config.json"
    file.write_text(json.dumps({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.5, 1]}))
    assert Clip(other).std.flatten().tolist() == [0.25, 0.5, 1]
    for wrong in ("{", "[]", '{"image_mean": 1, "image_std": 1}', '{"image_mean": [0,0,0], "image_std": [0,1,1]}'):
        file.write_text(wrong)
        with pytest.raises(DDFastError, match=r"preprocessor_config\.json: "):
            Clip(other)


def test_a_folder_that_lacks_something_is_named(folder, tmp_path):
    with pytest.raises(DDFastError, match=r"--clip .*none: no folder of a CLIP model: it has no config\.json"):
        Clip(tmp_path / "none")
    other = copied(folder, tmp_path / "tokens")
    (other / "vocab.json").unlink()
    with pytest.raises(DDFastError, match=r"^--clip [^\n]*$"):
        Clip(other)
    other = copied(folder, tmp_path / "weights")
    save_file({"logit_scale": torch.zeros(())}, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DDFastError, match=r"^--clip [^\n]* \d+ weights of a CLIP model are missing, such as \S+$"):
        Clip(other)
    (other / "model.safetensors").write_bytes(bytes(20))
    with pytest.raises(DDFastError, match=r"^--clip [^\n]*: cannot load the CLIP model: [^\n]*$"):
        Clip(other)


class Hashes(torch.nn.Module):
    """In place of CLIPModel: an image's features are its colours' means, a caption's the first three tokens."""

    def __init__(self):
        super().__init__()
        text = types.SimpleNamespace(vocab_size=256, max_position_embeddings=5)
        self.config = types.SimpleNamespace(text_config=text, vision_config=types.SimpleNamespace(image_size=16))

    def forward(self, pixel_values, input_ids, attention_mask):
        assert pixel_values.shape[1:] == (3, 16, 16)
        assert bool(attention_mask.all())
        return types.SimpleNamespace(image_embeds=pixel_values.mean((2, 3)), text_embeds=input_ids[:, :3].float() - 100)


class Letters:
    def __len__(self):
        return 256

    def __call__(self, captions, *, padding, truncation, max_length, return_tensors):
        assert (padding, truncation, max_length, return_tensors) == (True, True, 5, "pt")
        ids = torch.tensor([[ord(letter) for letter in f"{caption}     "[:5]] for caption in captions])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """A folder that a stand-in for transformers reads."""
    module = types.ModuleType("transformers")
    found = {"missing_keys": []}
    module.CLIPModel = types.SimpleNamespace(
        from_pretrained=lambda folder, output_loading_info, local_files_only: (Hashes(), found)
    )
    module.AutoTokenizer = types.SimpleNamespace(from_pretrained=lambda folder, local_files_only: Letters())
    monkeypatch.setitem(sys.modules, "transformers", module)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    return tmp_path


def test_it_works_without_the_library_itself(stand_in):
    clip, batch = Clip(stand_in), batches([5], side=16)[0]
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    images = (batch.pixels.numpy().mean((2, 3)) / 255 - mean) / std
    texts = np.array([[ord(letter) for letter in f"{caption}   "[:3]] for caption in CAPTIONS]) - 100.0
    texts = texts[batch.condition.numpy()]
    norms = np.linalg.norm(images, axis=1) * np.linalg.norm(texts, axis=1)
    cosines = (images * texts).sum(1) / norms
    score = ClipScore(clip, CAPTIONS)
    assert len(list(score.along([batch]))) == 1
    assert score.figures()["clip_score"] == pytest.approx(100 * np.maximum(cosines, 0).mean(), rel=1e-5)


def test_an_image_that_is_there_has_the_caption_of_its_number(stand_in):
    clip, batch = Clip(stand_in), batches([5], side=16)[0]
    by_number, by_condition = ClipScore(clip, CAPTIONS), ClipScore(clip, [CAPTIONS[n] for n in batch.condition])
    for score, given in ((by_number, batch), (by_condition, Numbered(batch.pixels, batch.number, batch.number))):
        assert list(score.along([given])) == [given]
    assert by_number.figures() == by_condition.figures()
    assert by_number.said["sha256"] == by_condition.said["sha256"]
    assert by_number.said["captions"] != by_condition.said["captions"]


@pytest.mark.parametrize("wrong", [5, -1])
def test_an_image_without_caption_is_refused(stand_in, wrong):
    number = torch.tensor([wrong])
    batch = Numbered(batches([1])[0].pixels, number, number)
    with pytest.raises(ValueError, match=f"captions: got 5, expected one with the number {wrong}"):
        list(ClipScore(Clip(stand_in), CAPTIONS).along([batch]))


def by_processes(folder, size):
    library = types.ModuleType("transformers")
    library.CLIPModel = types.SimpleNamespace(from_pretrained=lambda folder, **_: (Hashes(), {"missing_keys": []}))
    library.AutoTokenizer = types.SimpleNamespace(from_pretrained=lambda folder, **_: Letters())
    sys.modules["transformers"] = library
    whole = batches([11], side=16)[0]
    parts = [
        Batch(*(part[start : start + size] for part in vars(whole).values()))
        for start in range(0, len(whole.pixels), size)
    ]
    with processes.together("cpu", 60):
        score = ClipScore(Clip(folder), CAPTIONS)
        for _ in score.along(processes.share(parts)):
            pass
        return score.figures()


def test_processes_share_the_pictures(stand_in):
    ended = launch(3, by_processes, stand_in, 2)
    expected = by_processes(stand_in, 2)
    assert ended == [expected] * 3


def test_without_transformers_it_says_what_to_install(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DDFastError, match=r"^--clip: needs transformers \(.*\): pip install 'ddfast\[text\]'$"):
        Clip(tmp_path)


def test_features_of_a_file(tmp_path):
    generator = torch.Generator().manual_seed(3)
    images, texts = torch.randn(40, 8, generator=generator), torch.randn(40, 8, generator=generator)
    path = tmp_path / "features.safetensors"
    save_file({"image_features": images, "text_features": texts.half()}, path)
    x, y = images.double().numpy(), texts.half().double().numpy()
    scores = np.maximum(0, 100 * (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1))
    score = FileScore(path, 40)
    assert list(score.along([1, 2])) == [1, 2]
    assert score.figures() == {
        "clip_score": pytest.approx(scores.mean(), rel=1e-12),
        "clip_score_error": pytest.approx(scores.std(ddof=1) / 40**0.5, rel=1e-12),
        "count": 40,
    }
    save_file({"image_features": texts, "text_features": texts.half()}, path)  # another generator's, by the same model
    assert FileScore(path, 40).said == score.said


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"features": torch.zeros(2, 3)}, "features, expected image_features and text_features"),
        ({"image_features": torch.zeros(2, 3), "text_features": torch.zeros(3, 3)}, r"features \[2, 3\] of torch"),
        (
            {"image_features": torch.zeros(3, 3), "text_features": torch.zeros(3, 3)},
            r"expected floating-point \[2, D\]",
        ),
        ({"image_features": torch.zeros(2), "text_features": torch.zeros(2)}, r"features \[2\]"),
        ({"image_features": torch.ones(2, 3).long(), "text_features": torch.zeros(2, 3)}, r"of torch\.int64"),
    ],
)
def test_other_files_are_refused(tmp_path, tensors, problem):
    path = tmp_path / "features.safetensors"
    save_file(tensors, path)
    with pytest.raises(DDFastError, match=rf"^--clip .*features\.safetensors: holds .*{problem}"):
        FileScore(path, 2)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_features_without_a_direction_are_refused(tmp_path, value):
    path = tmp_path / "features.safetensors"
    save_file({"image_features": torch.ones(2, 3), "text_features": torch.full((2, 3), value)}, path)
    with pytest.raises(DDFastError, match=r"^--clip .*features\.safetensors: .* zero or not finite"):
        FileScore(path, 2)


def test_one_score_has_no_error_and_one_that_is_none_is_refused():
    assert clip_figures(torch.tensor([-0.5], dtype=torch.float64)) == {"clip_score": 0, "count": 1}
    with pytest.raises(ValueError, match="CLIP score: the features of image 1 or of its caption are zero"):
        clip_figures(torch.tensor([0.5, math.nan, 0.1], dtype=torch.float64))
