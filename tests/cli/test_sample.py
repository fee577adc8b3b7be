"""`ddfast sample`: what it writes, where, from what, and how much memory it takes for it."""

import errno
import json
import os
import resource
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from commands import refused_here
from PIL import Image
from safetensors.torch import load_file

from ddfast.errors import DDFastError
from ddfast.evaluation.sources import MEASURED, sample, stream
from ddfast.models.llamagen.captions import load_captions, random_captions, save_captions
from ddfast.models.loading import load_student, load_teacher
from ddfast.models.student import TransformerStudent
from ddfast.models.toy import ToyTeacher
from ddfast.ops import nearest_code, noise
from ddfast.pictures import pixels
from ddfast.sampling import Samples, sample_student
from ddfast.saving import new_target, save_samples
from ddfast.trajectories import memory

# Pictures ---------------------------------------------------------------------------------------------------------


class Painter(ToyTeacher):
    """Decodes to images of its own, `side` pixels wide."""

    def __init__(self, *values: float, side: int = 2, channels: int = 3) -> None:
        super().__init__()
        self.values, self.side, self.channels = values or (0.5,), side, channels

    def decode(self, codes, *, clamp=True):
        image = torch.tensor(self.values).repeat(self.channels * self.side**2)[: self.channels * self.side**2]
        images = image.view(1, self.channels, self.side, self.side).repeat(len(codes), 1, 1, 1)
        return images if clamp else 2 * images - 1


def some(count: int, teacher: ToyTeacher, **settings: int):
    return stream("teacher", teacher, count=count, seed=0, batch_size=settings.get("batch_size", 7))


@pytest.mark.parametrize("channels", [1, 3])
def test_values_are_rounded_to_nearest_in_rgb(tmp_path, channels):
    levels = [0.0, 0.4, 0.6, 127.5, 200.4, 200.6, 254.4, 254.6, 255.0]
    teacher = Painter(*(level / 255 for level in levels), side=3, channels=channels)
    save_samples(some(2, teacher), teacher, "files", tmp_path / "images")
    save_samples(some(2, teacher), teacher, "grid", tmp_path / "grid")
    for path in (*(tmp_path / "images").iterdir(), tmp_path / "grid.png"):
        picture = Image.open(path)
        assert picture.mode == "RGB"
        first = np.asarray(picture)[:3, :3]
        for channel in range(3):
            assert first[..., channel].reshape(-1).tolist() == [0, 0, 1, 128, 200, 201, 254, 255, 255]


def test_out_of_range_values_do_not_wrap():
    assert pixels(torch.tensor([-1.02, 1.02]).view(1, 1, 1, 2))[0, 0, 0].tolist() == [0, 255]


@pytest.mark.parametrize("family", ["var", "llamagen", "digits", "dd2"])
def test_files_are_what_the_fields_tools_stack(here, generators, tmp_path, family):
    folder, target = generators / family, tmp_path / "images"
    assert here("sample", "--student", folder, "--format=files", "--count=5", "--to", target)[0] == 0
    files = sorted(target.glob("*.png"))
    assert [file.name for file in files] == [f"0000{i}-class{i}.png" for i in range(5)]
    stacked = np.stack([np.asarray(Image.open(file)) for file in files])  # as VAR's and LlamaGen's npz builders do
    side = 16 if family == "digits" else 6
    assert (stacked.shape, stacked.dtype) == ((5, side, side, 3), np.uint8)
    teacher = load_teacher(folder)
    student = load_student(folder, teacher)
    chance = noise(0, torch.arange(5), (teacher.num_tokens, teacher.code_dim))
    images = teacher.decode(student.sample(torch.arange(5), chance)).numpy()
    assert np.abs(stacked.transpose(0, 3, 1, 2) / 255 - images).max() <= 0.501 / 255


# Where to ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "name", "written"),
    [
        ("grid", "x", "x.png"), ("grid", "x.png", "x.png"), ("grid", "x.PNG", "x.PNG"), ("grid", "v1.5", "v1.5.png"),
        ("codes", "x", "x.safetensors"), ("codes", "x.safetensors", "x.safetensors"),
        ("npz", "x", "x.npz"), ("npz", "x.npz", "x.npz"),
        ("files", "x", "x"), ("files", "v1.5", "v1.5"),
    ],
)  # fmt: skip
def test_a_target_is_the_file_itself_or_gets_its_suffix(tmp_path, form, name, written):
    teacher = Painter()
    assert new_target(form, tmp_path / name) == tmp_path / written
    save_samples(some(3, teacher), teacher, form, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [written]


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("grid", "x.jpg"), ("grid", "x.safetensors"), ("grid", "x.npz"), ("codes", "x.png"), ("codes", "x.pt"),
        ("files", "x.png"), ("files", "x.safetensors"), ("npz", "x.png"), ("npz", "x.npy"),
    ],
)  # fmt: skip
def test_a_suffix_of_something_else_is_refused(here, generators, tmp_path, form, name):
    arguments = ("sample", "--student", generators / "var", "--format", form, "--to", tmp_path / name)
    refused_here(here, f"--to {tmp_path / name}: the form {form} takes", *arguments)
    assert not list(tmp_path.iterdir())


def contents(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("form", ["grid", "files", "npz", "codes"])
@pytest.mark.parametrize("name", ["x", ""])  # given, and by default
def test_results_of_another_run_are_refused_before_any_work(here, generators, tmp_path, form, name):
    student = tmp_path / "student"
    shutil.copytree(generators / "var", student)
    target = tmp_path / name if name else student / "samples-1"
    to = ("--to", target) if name else ()
    first = ("sample", "--student", student, "--format", form, "--count=5", *to)
    assert here(*first)[0] == 0
    if form == "files":  # as of another program
        next(tmp_path.rglob("samples.json")).unlink()
    before = contents(tmp_path)
    words = "holds 5 images already, such as 00000-class0.png; choose" if form == "files" else "exists; choose another"
    for again in (first, (*first, "--count=2"), (*first, "--student", tmp_path / "nowhere", "--to", target)):
        refused_here(here, words, *again)
    assert contents(tmp_path) == before


def test_a_folder_with_other_things_is_used(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "notes.txt").write_text("mine")
    teacher = Painter()
    save_samples(some(2, teacher), teacher, "files", tmp_path / "images")
    assert len(list((tmp_path / "images").iterdir())) == 3
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "cat.JPG").write_bytes(b"")
    with pytest.raises(DDFastError, match=r"old: holds 1 images already, such as cat\.JPG"):
        save_samples(some(2, teacher), teacher, "files", tmp_path / "old")


@pytest.mark.parametrize("form", ["grid", "files", "npz", "codes"])
def test_what_cannot_be_written_is_said_before_any_work(here, tmp_path, form):
    (tmp_path / "file").write_text("")
    arguments = ("sample", "--student", tmp_path / "nowhere", "--format", form, "--to", tmp_path / "file" / "x")
    refused_here(here, "file is not a directory", *arguments)


# Streams ----------------------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_count(tmp_path):
    """An image takes 768 KiB here; a hundred batches must not take more than one."""
    teacher = Painter(side=256)
    peak = []
    for count in (8, 400):
        lines = save_samples(some(count, teacher, batch_size=4), teacher, "files", tmp_path / str(count), count=count)
        assert lines == [f"{count} images in {tmp_path / str(count)}"]
        peak.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))
    assert peak[1] - peak[0] < 64, "MiB more for 392 images, which are 294 MiB"


def test_a_batch_is_written_before_the_next_is_made(tmp_path):
    teacher, seen = Painter(), []

    def watched():
        for batch in some(20, teacher, batch_size=5):
            seen.append(len(list((tmp_path / "x").glob("*.png"))))
            yield batch

    calls = []
    save_samples(watched(), teacher, "files", tmp_path / "x", count=20, progress=lambda *call: calls.append(call))
    assert seen == [0, 5, 10, 15]
    assert calls == [(done, 20, "") for done in (5, 10, 15, 20)]


@pytest.mark.parametrize("source", [source for source in MEASURED if source != "ar_diffusion"])
def test_samples_depend_on_neither_batch_size_nor_count(source):
    teacher = ToyTeacher()
    student = TransformerStudent(teacher, width=16, depth=1, heads=2)
    for parameter in student.parameters():  # large enough that samples depend on their noise
        torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(0))
    settings = {"seed": 5}
    student.point = 1
    whole = sample(source, teacher, student, count=50, batch_size=50, **settings)
    for size in (1, 7, 49):
        parts = sample(source, teacher, student, count=50, batch_size=size, **settings)
        same = (parts.codes == whole.codes).all(-1).float().mean()
        assert same == 1 if "student" not in source and source != "teacher_involved" else same > 0.9  # by rounding
    fewer = sample(source, teacher, student, count=20, batch_size=20, **settings)
    assert (fewer.codes == whole.codes[:20]).all(-1).float().mean() > 0.9
    other = sample(source, teacher, student, count=50, **{**settings, "seed": 6})
    assert (other.codes == whole.codes).all(-1).float().mean() < 0.9


def test_the_teachers_draws_have_its_distribution():
    teacher = ToyTeacher()
    codes = sample("teacher", teacher, count=50_000, seed=3).codes
    assert teacher.total_variation(codes) < 0.06


def test_batches_have_one_size_at_most_the_one_asked_for():
    assert [len(batch.codes) for batch in some(20, ToyTeacher(), batch_size=9)] == [7, 7, 6]
    whole = Samples.joined(some(20, ToyTeacher()))
    assert [len(part.codes) for part in whole.split(8)] == [8, 8, 4]


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("ending", "code"), [(KeyboardInterrupt, 130), (FULL, 1)], ids=["interrupt", "full disk"])
def test_ended_early_it_leaves_whole_pictures_and_says_how_many(here, generators, tmp_path, monkeypatch, ending, code):
    replace, target = os.replace, tmp_path / "x"

    def failing(source, name):
        if name.name.startswith("00005"):
            raise ending
        replace(source, name)

    monkeypatch.setattr(os, "replace", failing)
    flags = ("--format=files", "--count=9", "--batch-size=3", "--to", target)
    got, _, errors = here("sample", "--student", generators / "var", *flags)
    (line,) = errors.strip().splitlines()
    assert got == code
    assert line.endswith(f"; 5 images are in {target}, each of them whole: the same command goes on")
    assert ("interrupted" if code == 130 else "No space left on device") in line
    pictures = [f"0000{i}-class{i}.png" for i in range(5)]
    assert sorted(path.name for path in target.iterdir()) == [*pictures, "samples.json"]
    assert all(Image.open(target / name).convert("RGB").size == (6, 6) for name in pictures)


@pytest.mark.parametrize("form", ["grid", "npz", "codes"])
@pytest.mark.parametrize(("ending", "code"), [(KeyboardInterrupt, 130), (FULL, 1)], ids=["interrupt", "full disk"])
def test_ended_early_there_is_no_half_of_the_one_file(here, generators, tmp_path, monkeypatch, form, ending, code):
    def failing(*_):
        raise ending

    monkeypatch.setattr(os, "replace", failing)
    flags = ("--format", form, "--count=9", "--to", tmp_path / "x")
    got, _, errors = here("sample", "--student", generators / "var", *flags)
    (line,) = errors.strip().splitlines()
    assert got == code
    assert form != "grid" or line.endswith(f"; {new_target(form, tmp_path / 'x')} was not written")
    assert not list(tmp_path.iterdir())


def test_the_batch_is_what_fits_into_free_memory(here, generators, tmp_path, monkeypatch):
    teacher = load_teacher(generators / "var")
    student = load_student(generators / "var", teacher)
    settings = {"decodes": False, "images": True}
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**40)
    assert memory.largest_sampling_batch(teacher, student, **settings) == 1000
    one = memory.image_bytes(teacher)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 100 * one)
    with_images = memory.largest_sampling_batch(teacher, student, **settings)
    without = memory.largest_sampling_batch(teacher, student, decodes=False, images=False)
    decoding = memory.largest_sampling_batch(teacher, student, decodes=True, images=True)
    assert 1 <= decoding < with_images < 80 and with_images < without
    monkeypatch.setattr(memory, "free_bytes", lambda device: 100)
    arguments = ("sample", "--student", generators / "var", "--count=3", "--to", tmp_path / "x")
    refused_here(here, "not enough memory on cpu", *arguments)
    code, out, _ = here(*arguments, "--batch-size=2")
    assert (code, "3 images" in out) == (0, True)


def test_a_decoders_memory_is_its_largest_activations(generators):
    teacher = load_teacher(generators / "llamagen")  # 6 pixels wide, 32 channels there
    assert memory.image_bytes(teacher) == 4 * memory._ROWS * 32 * 6 * 6


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_batch_that_does_not_fit_after_all_is_one_error(here, generators, tmp_path, monkeypatch, error):
    def decode(*_, **__):
        raise error

    monkeypatch.setattr("ddfast.models.var.VARTeacher.decode", decode)
    arguments = ("sample", "--student", generators / "var", "--count=4", "--batch-size=2", "--to", tmp_path / "x")
    refused_here(here, "2 samples at a time do not fit in the memory of cpu; give --batch-size", *arguments)


def test_another_runtime_error_is_not_taken_for_it(generators, monkeypatch):
    with pytest.raises(RuntimeError, match="something else"), memory.fitting(3, torch.device("cpu"), "--batch-size"):
        raise RuntimeError("something else")


# Flags ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("guidance.cfg_scale: has no effect with steps=1", ["var", "--guidance.cfg-scale=3"]),
        ("guidance.top_k: has no effect with steps=2", ["var", "--steps=2", "--guidance.top-k=3"]),
        ("guidance.top_p: has no effect with steps=1", ["dd2", "--guidance.top-p=0.5"]),
        ("point: got 0, expected a trajectory point in 1..2", ["var", "--steps=2", "--point=0"]),
        ("point: got 3, expected a trajectory point in 1..2", ["var", "--steps=2", "--point=3"]),
        ("point: has no effect with steps=1", ["var", "--point=1"]),
        ("point: has no effect: only DD1's", ["var", "--steps=0", "--point=1"]),
        ("point: has no effect: only DD1's", ["dd2", "--steps=2", "--point=1"]),
        ("teacher_steps: has no effect with steps=0", ["var", "--steps=0", "--teacher-steps=1"]),
        ("teacher_steps: has no effect on DD2's", ["dd2", "--teacher-steps=1"]),
        ("teacher_steps: got 2, expected 1 to 1, the groups from point 2", ["var", "--teacher-steps=2"]),
        ("teacher_steps: got -1, expected 1 to 1", ["var", "--teacher-steps=-1"]),
        ("refine: has no effect with steps=0", ["var", "--steps=0", "--refine=1"]),
        ("refine: got -1, expected a number of passes, 0 or more, or 'exact'", ["var", "--refine=-1"]),
        ("seed: got -5, expected 0 to 2^64 - 1", ["var", "--seed=-5"]),
        ("seed: got 18446744073709551616, expected", ["var", f"--seed={2**64}"]),
        ("steps: got -1", ["var", "--steps=-1"]),
        ("steps: got 3, expected 1 or 2", ["var", "--steps=3"]),
        ("count: got 0", ["var", "--count=0"]),
        ("--batch-size: got -1", ["var", "--batch-size=-1"]),
        ("classes: got [5], expected labels in 0..4", ["var", "--classes=5"]),
        ("classes: got [-1], expected labels in 0..4", ["var", "--classes=-1"]),
        ("--classes: got '1.5'", ["var", "--classes=1.5"]),
        ("--cfg: here it is called --guidance.cfg-scale", ["var", "--cfg", "4"]),
        ("--cfg-scale: here it is called --guidance.cfg-scale", ["var", "--cfg_scale=4"]),
        ("--g-seed: here it is called --seed", ["var", "--g_seed", "1"]),
        ("--num-fid-samples: here it is called --count", ["var", "--num-fid-samples", "50000"]),
        ("--image-size: not an option here", ["var", "--image-size", "256"]),
        ("--more-smooth: not here", ["var", "--more-smooth"]),
    ],
)
def test_a_flag_has_an_effect_or_is_an_error(here, generators, tmp_path, words, arguments):
    name, *flags = arguments
    refused_here(here, words, "sample", "--student", generators / name, "--to", tmp_path / "x", *flags)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("guidance", [[], ["--guidance.cfg-scale=3", "--guidance.top-k=9"]], ids=["usual", "other"])
@pytest.mark.parametrize("name", ["var", "digits", "llamagen", "dd2"])
def test_refined_to_the_end_samples_are_the_teachers_flow(here, generators, tmp_path, name, guidance):
    asked = ("sample", "--student", generators / name, "--format=codes", "--count=9", "--seed=5", *guidance)
    assert here(*asked, "--refine=exact", "--to", tmp_path / "exact")[0] == 0
    assert here(*asked, "--refine=2", "--to", tmp_path / "two")[0] == 0
    teacher = load_teacher(generators / name)
    found = load_file(tmp_path / "exact.safetensors")
    eps = noise(5, torch.arange(9), (teacher.num_tokens, teacher.code_dim), "cpu")
    settings = {"cfg_scale": 3.0, "top_k": 9} if guidance else {}
    own = teacher.generate(found["condition"], sampler="flow", noise=eps, **settings)
    assert torch.equal(found["codes"], own)
    twice, second = load_file(tmp_path / "two.safetensors")["codes"], teacher.group_starts()[2]
    assert torch.equal(twice[:, :second], own[:, :second])


@pytest.mark.parametrize(
    "arguments",
    [
        ["var", "--refine=1"],
        ["digits", "--refine=exact", "--guidance.cfg-scale=30"],
        ["var", "--steps=0", "--guidance.cfg-scale=3"],
        ["var", "--teacher-steps=1", "--point=1", "--guidance.cfg-scale=30"],
        ["var", "--steps=2", "--point=1"],
        ["dd2", "--steps=2", "--guidance.cfg-scale=30"],
        ["var", f"--seed={2**32}"],
        ["var", "--steps=0", f"--seed={2**32}"],
        ["var", "--classes=2,4"],
    ],
)
def test_flags_that_are_taken_change_the_samples(here, generators, tmp_path, arguments):
    name, *flags = arguments
    made = []
    for number, given in enumerate(([flag for flag in flags if "steps" in flag], flags)):
        target = tmp_path / f"{number}.safetensors"
        call = ("sample", "--student", generators / name, "--format=codes", "--count=40", "--to", target, *given)
        assert here(*call)[0] == 0
        made.append(load_file(target)["codes"])
    assert not torch.equal(*made)


# Captions ---------------------------------------------------------------------------------------------------------


def test_a_text_student_is_sampled_from_caption_features(here, generators, tmp_path):
    folder, captions = generators / "text", generators / "captions.safetensors"
    arguments = ("sample", "--student", folder, "--captions", captions, "--count=5")
    assert here(*arguments, "--format=files", "--to", tmp_path / "x")[0] == 0
    names = [f"0000{i}-caption{i % 3}.png" for i in range(5)]
    assert sorted(path.name for path in (tmp_path / "x").glob("*.png")) == names
    assert here(*arguments, "--format=codes", "--classes=2,0", "--steps=2", "--to", tmp_path / "y")[0] == 0
    made = load_file(tmp_path / "y.safetensors")
    assert made["condition"].tolist() == [2, 0, 2, 0, 2]
    teacher = load_teacher(folder)
    features, mask = load_captions(captions)
    chance = noise(0, torch.arange(5), (teacher.num_tokens, teacher.code_dim))
    rows = torch.tensor([2, 0, 2, 0, 2])
    expected = load_student(folder, teacher).sample((features[rows], mask[rows]), chance, steps=(0, 2))
    assert torch.equal(made["codes"], nearest_code(expected, teacher.codebook))
    assert here(*arguments, "--steps=0", "--to", tmp_path / "z")[0] == 0


class Words:
    """A tokenizer: a token per word."""

    def __call__(self, texts, *, max_length, **settings):
        rows = [[len(word) for word in text.split()][:max_length] for text in texts]
        ids = torch.tensor([row + [0] * (max_length - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


class Encoder(torch.nn.Module):
    def forward(self, input_ids, attention_mask):
        return types.SimpleNamespace(last_hidden_state=input_ids.float()[..., None].expand(-1, -1, 12) / 10)


@pytest.fixture
def t5(monkeypatch):
    """A stand-in for `transformers`; the names of the encoders that were asked for."""
    asked: list[str] = []
    library = types.ModuleType("transformers")
    library.AutoTokenizer = types.SimpleNamespace(from_pretrained=lambda model: Words())
    library.T5EncoderModel = types.SimpleNamespace(from_pretrained=lambda model: asked.append(model) or Encoder())
    monkeypatch.setitem(sys.modules, "transformers", library)
    return asked


def test_captions_are_given_as_text_or_as_a_file_of_it(here, generators, tmp_path, t5):
    texts = ["a red bird on a branch", "two dogs"]  # six words, of which this model reads four
    (tmp_path / "texts").write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*texts, "", ""]).encode())
    made = []
    for number, given in enumerate(
        (["--caption", texts[0], "--caption", texts[1]], ["--captions", tmp_path / "texts", "--text-encoder", "mine"])
    ):
        target = tmp_path / f"{number}.safetensors"
        call = ("sample", "--student", generators / "text", "--format=codes", "--count=4", "--to", target, *given)
        assert here(*call)[0] == 0
        made.append(load_file(target))
    assert made[0]["condition"].tolist() == [0, 1, 0, 1]
    assert torch.equal(made[0]["codes"], made[1]["codes"])
    assert t5 == ["google/flan-t5-xl", "mine"]


@pytest.mark.parametrize("held", [1000, 1], ids=["kept", "encoded batch by batch"])
def test_captions_in_cocos_format(here, generators, tmp_path, t5, monkeypatch, held):
    """Of each image its first one; the codes are those of the same texts."""
    monkeypatch.setattr("ddfast.models.llamagen.captions._HELD", held)
    said = [(7, "two dogs"), (5, "a red bird on a branch"), (7, "a pair of dogs"), (9, "x")]
    annotations = [{"image_id": image, "id": number, "caption": text} for number, (image, text) in enumerate(said)]
    images = [{"id": image} for image in (5, 7, 9)]
    (tmp_path / "coco.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    texts = ["a red bird on a branch", "two dogs", "x"]
    made = []
    for number, given in enumerate(
        (["--captions", tmp_path / "coco.json"], [word for text in texts for word in ("--caption", text)])
    ):
        target = tmp_path / f"{number}.safetensors"
        call = ("sample", "--student", generators / "text", "--format=codes", "--count=5", "--to", target)
        assert here(*call, "--batch-size=2", *given)[0] == 0
        made.append(load_file(target))
    assert made[0]["condition"].tolist() == [0, 1, 2, 0, 1]
    assert torch.equal(made[0]["codes"], made[1]["codes"])


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("conditioned on text: give captions (--captions FILE, --caption TEXT)", ["text"]),
        ("VARTeacher is conditioned on class labels, 0..4", ["var", "--captions", "{captions}"]),
        ("VARTeacher is conditioned on class labels, 0..4", ["var", "--caption", "a cat"]),
        ("expected numbers of captions in 0..2", ["text", "--captions", "{captions}", "--classes=3"]),
        ("--caption: has no effect beside --captions", ["text", "--captions", "{captions}", "--caption", "a cat"]),
        ("--text-encoder: has no effect", ["text", "--text-encoder", "mine"]),
        ("cannot read {tmp}/none", ["text", "--captions", "{tmp}/none"]),
        ("empty.txt holds no captions", ["text", "--captions", "{tmp}/empty.txt"]),
        ("wide.safetensors: got [2, 4, 13]", ["text", "--captions", "{tmp}/wide.safetensors"]),
        ("bytes is not UTF-8 text", ["text", "--captions", "{tmp}/bytes"]),
        (
            "coco.json is no file of captions in COCO's format: images: got nothing",
            ["text", "--captions={tmp}/coco.json"],
        ),
    ],
)
def test_wrong_captions_are_refused(here, generators, tmp_path, t5, words, arguments):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "bytes").write_bytes(b"\xff\xe9 no text")
    (tmp_path / "coco.json").write_text("{}")
    save_captions(tmp_path / "wide.safetensors", *random_captions(2, 4, 13))
    places = {"captions": generators / "captions.safetensors", "tmp": tmp_path}
    name, *flags = (argument.format(**places) for argument in arguments)
    call = ("sample", "--student", generators / name, "--to", tmp_path / "x", *flags)
    refused_here(here, words.format(**places), *call)


def test_a_text_student_in_code(generators):
    teacher = load_teacher(generators / "text")
    with pytest.raises(ValueError, match="conditioned on text: give captions"):
        sample_student(teacher, load_student(generators / "text", teacher), count=1, seed=0)
