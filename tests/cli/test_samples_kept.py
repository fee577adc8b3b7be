"""`ddfast sample` for judges: npz, labels, and a run that was ended goes on to what an undisturbed one makes."""

import io
import json
import os
import resource
import shutil
import signal
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import in_this_process, refused_here
from launching import launch, launched
from PIL import Image
from safetensors.torch import load_file
from test_sample import Painter, contents, some

from ddfast import saving
from ddfast.errors import DDFastError
from ddfast.models.checkpoint import load_tensors, save_tensors
from ddfast.models.llamagen.captions import random_captions, save_captions
from ddfast.models.loading import load_student, load_teacher
from ddfast.ops import noise
from ddfast.pictures import pixels
from ddfast.sampling import batch_ranges, conditions_of
from ddfast.saving import save_samples

FORMS = {"files": "x", "npz": "x.npz", "codes": "x.safetensors"}
"""Forms that are kept, and the file or folder of `--to x`."""


def sample(student: Path, form: str, folder: Path, *flags: object) -> tuple:
    """A command of nine samples in batches of three."""
    own = ("--count=9", "--batch-size=3", "--format", form, "--to", folder / "x")
    return ("sample", "--student", student, *own, *flags)


# npz ----------------------------------------------------------------------------------------------------------------


def test_an_npz_is_what_evaluators_read(here, generators, tmp_path):
    assert here(*sample(generators / "var", "npz", tmp_path, "--labels=random", "--seed=3"))[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]
    with zipfile.ZipFile(tmp_path / "x.npz") as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["arr_0.npy", "arr_1.npy"]
        assert all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
        member = archive.read("arr_0.npy")
        settings = json.loads(archive.comment)
    # As OpenAI's evaluator: a header of version 1.0, then rows as they come.
    stream = io.BytesIO(member)
    assert np.lib.format.read_magic(stream) == (1, 0)
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    assert (shape, fortran, dtype) == ((9, 6, 6, 3), False, np.dtype(np.uint8))
    assert len(stream.read()) == 9 * 6 * 6 * 3
    with np.load(tmp_path / "x.npz", allow_pickle=False) as file:
        images, labels = file["arr_0"], file["arr_1"]
        assert "mu" not in file.files
    assert labels.dtype == np.int64
    assert labels.tolist() == conditions_of(torch.arange(9), torch.arange(5), "random", 3).tolist()
    teacher = load_teacher(generators / "var")
    student = load_student(generators / "var", teacher)
    raw = torch.cat(
        [
            teacher.decode(student.sample(torch.from_numpy(labels[part]), chance(teacher, part)), clamp=False)
            for part in map(list, batch_ranges(9, 3))
        ]
    )
    assert np.array_equal(images, pixels(raw).permute(0, 2, 3, 1).numpy())
    assert (settings["labels"], settings["count"], settings["quantise"]) == ("random", 9, "nearest")


def chance(teacher, part: list[int]) -> torch.Tensor:
    return noise(3, torch.tensor(part), (teacher.num_tokens, teacher.code_dim))


@pytest.mark.parametrize("family", ["digits", "llamagen"])
def test_an_npz_is_a_folders_images(here, generators, tmp_path, family):
    for form in ("npz", "files"):
        assert here(*sample(generators / family, form, tmp_path, "--quantise=llamagen", "--resize=8"))[0] == 0
    files = sorted((tmp_path / "x").glob("*.png"))
    with np.load(tmp_path / "x.npz") as file:
        assert np.array_equal(file["arr_0"], np.stack([np.asarray(Image.open(path)) for path in files]))
        assert [f"{i:05d}-class{label}.png" for i, label in enumerate(file["arr_1"])] == [path.name for path in files]


def peak() -> float:
    """MiB that this process has needed at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def peaks(folder: Path, side: int, size: int, counts: tuple[int, ...]) -> list[float]:
    teacher, most = Painter(side=side), []
    for count in counts:
        save_samples(some(count, teacher, batch_size=size), teacher, "npz", folder / str(count), count=count)
        most.append(peak())
    return most


def test_memory_of_an_npz_does_not_grow_with_the_count(tmp_path):
    """An image takes 192 KiB in the file."""
    ((few, many),) = launch(1, peaks, tmp_path, 256, 4, (8, 400))
    assert (tmp_path / "400.npz").stat().st_size > 75 * 2**20
    assert many - few < 25, "MiB more for 392 images, which are 73.5 MiB"


@pytest.mark.full
def test_memory_of_an_npz_of_twenty_thousand_images(tmp_path):
    ((few, many),) = launch(1, peaks, tmp_path, 64, 100, (2000, 20_000))
    assert many < 1.05 * few


# Labels -------------------------------------------------------------------------------------------------------------


def test_random_labels_depend_on_seed_and_number_alone():
    number, classes = torch.arange(50_000), torch.arange(1000)
    whole = conditions_of(number, classes, "random", 7)
    assert torch.equal(whole[123:456], conditions_of(number[123:456], classes, "random", 7))
    assert torch.equal(whole[[5, 3]], conditions_of(torch.tensor([5, 3]), classes, "random", 7))
    for seed in (8, 2**32 + 7, 2**64 - 1):
        assert (conditions_of(number, classes, "random", seed) == whole).float().mean() < 0.005
    # They stay what they are: published samples rest on it.
    assert whole[:8].tolist() == [802, 629, 704, 325, 1, 513, 85, 44]


def test_random_labels_are_as_likely_and_independent():
    labels = conditions_of(torch.arange(50_000), torch.arange(1000), "random", 0).double()
    counts = torch.bincount(labels.long(), minlength=1000).double()
    statistic = float(((counts - 50) ** 2 / 50).sum())
    assert abs(statistic - 999) < 4 * (2 * 999) ** 0.5  # chi-square with 999 degrees of freedom
    centred = (labels - labels.mean()) / labels.std()
    assert abs(float((centred[1:] * centred[:-1]).mean())) < 4 / 50_000**0.5
    first = noise(0, torch.arange(50_000), (1,))[:, 0].double()  # of the samples that have them
    assert abs(float((centred * first).mean())) < 4 / 50_000**0.5


@pytest.mark.parametrize("classes", ["", "4,1"])
def test_labels_of_a_command(here, generators, tmp_path, classes):
    common = ("sample", "--student", generators / "var", "--format=codes", f"--classes={classes}", "--seed=5")
    runs = {
        "uniform": ("--count=20", "--batch-size=20"),
        "random": ("--count=20", "--batch-size=20", "--labels=random"),
        "fewer": ("--count=13", "--batch-size=4", "--labels=random"),
    }
    made = {}
    for name, flags in runs.items():
        assert here(*common, *flags, "--to", tmp_path / name)[0] == 0
        made[name] = load_file(tmp_path / f"{name}.safetensors")
    chosen = [4, 1] if classes else [0, 1, 2, 3, 4]
    assert Counter(made["uniform"]["condition"].tolist()) == dict.fromkeys(chosen, 20 // len(chosen))
    assert set(made["random"]["condition"].tolist()) <= set(chosen)
    assert made["random"]["condition"][:13].equal(made["fewer"]["condition"])
    assert not made["random"]["condition"].equal(made["uniform"]["condition"])


def test_counts_that_are_no_multiple_are_said(here, generators, tmp_path):
    words = "--count 9 is no multiple of 5: 1 or 2 images of each class"
    assert words in here(*sample(generators / "var", "npz", tmp_path))[1]
    for number, flags in enumerate((["--labels=random"], ["--count=10"], ["--classes=1,2,3"])):
        assert "multiple" not in here(*sample(generators / "var", "npz", tmp_path / str(number), *flags))[1]


# Going on -----------------------------------------------------------------------------------------------------------


def command(cache: Path, *arguments: object) -> None:
    """Ends with the command's code."""
    code = in_this_process(cache, *arguments)
    if code:
        sys.exit(code)


def killed_writing(cache: Path, file: int, *arguments: object) -> None:
    """A command that is killed as it is about to give a file its name, the first one being number 1."""
    replace, seen = os.replace, 0

    def counting(*names: object) -> None:
        nonlocal seen
        seen += 1
        if seen == file:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*names)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", counting)
        command(cache, *arguments)


def kill(count: int, *arguments: object) -> None:
    """Let processes be killed."""
    with launched(count, killed_writing, *arguments) as running:
        assert {end.code for end in running.ended(together=True)} & {-signal.SIGKILL}


# samples.json, then nine images, or three batches, the one file, and its name beside the folder.
MOMENTS = {"files": (1, 6), "npz": (2, 4, 6), "codes": (5,)}


@pytest.mark.parametrize(("form", "file"), [(form, file) for form, files in MOMENTS.items() for file in files])
def test_killed_it_goes_on_to_the_same(run, cache, generators, tmp_path, form, file):
    flags = ("--labels=random", "--steps=2", "--seed=4")
    run(*sample(generators / "var", form, tmp_path / "whole", *flags))
    call = sample(generators / "var", form, tmp_path / "killed", *flags)
    kill(1, cache, file, *call)
    assert not (tmp_path / "killed" / FORMS[form]).is_file()
    out = run(*call).stdout
    there = {"files": file - 2, "npz": min(3, file - 2), "codes": min(3, file - 2)}[form]
    kept = there // 3 * 3 if form == "files" else 3 * there  # a batch is made whole, or not at all
    assert (f", {kept} of them from before" in out) == (kept > 0)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == [FORMS[form]]


@pytest.mark.parametrize("form", ["files", "npz"])
def test_any_number_of_processes_goes_on(run, cache, generators, tmp_path, form):
    run(*sample(generators / "digits", form, tmp_path / "whole"))
    call = sample(generators / "digits", form, tmp_path / "two")
    kill(2, cache, 3, *call)
    assert not (tmp_path / "two" / FORMS[form]).is_file()
    launch(3, command, cache, *call)
    assert contents(tmp_path / "two") == contents(tmp_path / "whole")


def interrupted(here, monkeypatch, file: int, *arguments: object) -> str:
    """What a command says that is interrupted as `killed_writing` is."""
    with monkeypatch.context() as patch:
        replace, seen = os.replace, iter(range(1, 1000))

        def counting(*names: object) -> None:
            if next(seen) == file:
                raise KeyboardInterrupt
            replace(*names)

        patch.setattr(os, "replace", counting)
        code, _, errors = here(*arguments)
    assert code == 130
    return errors.strip()


@pytest.mark.parametrize("form", sorted(FORMS))
def test_an_interrupt_says_that_it_goes_on(here, generators, tmp_path, monkeypatch, form):
    line = interrupted(here, monkeypatch, 4, *sample(generators / "var", form, tmp_path))
    assert line.startswith("ddfast sample: interrupted; ")
    assert line.endswith(": the same command goes on")
    assert ("2 images are in" if form == "files" else "2 batches of it are kept") in line
    code, out, _ = here(*sample(generators / "var", form, tmp_path))
    assert code == 0
    assert "; " not in out


def test_before_anything_is_kept_nothing_is_left(here, generators, tmp_path, monkeypatch):
    for form in FORMS:
        interrupted(here, monkeypatch, 2, *sample(generators / "var", form, tmp_path))
        assert not list(tmp_path.iterdir())


def test_all_there_is_said(here, generators, tmp_path):
    call = sample(generators / "var", "files", tmp_path)
    assert here(*call)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "x").glob("*.png")}
    code, out, _ = here(*call)
    assert (code, f"9 images in {tmp_path / 'x'}, 9 of them from before" in out) == (0, True)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "x").glob("*.png")}
    assert sorted(path.name for path in (tmp_path / "x").iterdir())[-1] == "samples.json"


def test_the_batch_size_that_memory_decided_is_kept(here, generators, tmp_path, monkeypatch):
    monkeypatch.setattr("ddfast.drawing.largest_sampling_batch", lambda *_, **__: 4)
    call = ("sample", "--student", generators / "var", "--count=9", "--format=codes", "--to", tmp_path / "x")
    interrupted(here, monkeypatch, 3, *call)
    monkeypatch.setattr("ddfast.drawing.largest_sampling_batch", lambda *_, **__: 9)
    assert here(*call)[0] == 0
    whole = ("--batch-size=3", "--to", tmp_path / "y")  # three batches of three, as of at most four
    assert here(*call, *whole)[0] == 0
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()


@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("fault", ["cut", "flipped", "zeros"])
def test_damaged_files_are_made_again(here, generators, tmp_path, monkeypatch, form, fault):
    assert here(*sample(generators / "var", form, tmp_path / "whole"))[0] == 0
    call = sample(generators / "var", form, tmp_path / "hurt")
    interrupted(here, monkeypatch, 4, *call)
    folder = tmp_path / "hurt" / (FORMS[form] if form == "files" else f".{FORMS[form]}.parts")
    damaged = sorted(path for path in folder.iterdir() if path.suffix in (".png", ".safetensors"))[0]
    content = bytearray(damaged.read_bytes())
    if fault == "cut":
        del content[-5:]
    elif fault == "flipped":  # the last byte: of a PNG's mark, of a part's numbers
        content[-1] ^= 1
    else:
        content[:] = bytes(len(content))
    damaged.write_bytes(content)
    code, out, errors = here(*call)
    assert code == 0, errors
    assert f"{damaged} is damaged, and made again" in out
    assert contents(tmp_path / "hurt") == contents(tmp_path / "whole")


def test_what_is_damaged_while_it_is_put_together_is_an_error(here, generators, tmp_path, monkeypatch):
    finish = saving._Npz.finish

    def damaging(form):
        first = form.kept.parts()[0]
        first.write_bytes(first.read_bytes()[:-1] + b"!")
        finish(form)

    call = sample(generators / "var", "npz", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(saving._Npz, "finish", damaging)
        refused_here(here, "has been damaged; the same command makes it again", *call)
    assert here(*call)[0] == 0


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize(
    ("words", "flags"),
    [
        ("seed is 0, not 1", ["--seed=1"]),
        ("count is 9, not 8", ["--count=8"]),
        ("steps is 1, not 2", ["--steps=2"]),
        ("labels is 'uniform', not 'random'", ["--labels=random"]),
        ("classes is '', not '1,2'", ["--classes=1,2"]),
        ("batch_size is 3, not 5", ["--batch-size=8"]),  # of nine: five and four
        ("count is 9, not 8; seed is 0, not 1", ["--seed=1", "--count=8"]),
    ],
)
def test_other_settings_are_refused_before_anything_is_loaded(
    here, generators, tmp_path, monkeypatch, form, words, flags
):
    interrupted(here, monkeypatch, 4, *sample(generators / "var", form, tmp_path))
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("ddfast.drawing.open_student", None)
        patch.setattr("ddfast.drawing.open_teacher", None)
        where = f"--to {tmp_path / FORMS[form]}: was begun with other settings ({words}"
        refused_here(here, where, *sample(generators / "var", form, tmp_path, *flags))
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("words", "before", "after"),
    [
        ("guidance.top_k is 3, not 4", ["--steps=0", "--guidance.top-k=3"], ["--steps=0", "--guidance.top-k=4"]),
        ("point is 2, not 1", ["--steps=2"], ["--steps=2", "--point=1"]),
        ("quantise is 'nearest', not 'var'", ["--format=files"], ["--format=files", "--quantise=var"]),
        ("resize is 0, not 8", ["--format=npz"], ["--format=npz", "--resize=8"]),
        ("preset is 'var-paper', not ''", ["--preset=var-paper", "--format=files"], ["--format=files"]),
    ],
)  # fmt: skip
def test_so_are_settings_of_networks_and_images(here, generators, tmp_path, monkeypatch, words, before, after):
    interrupted(here, monkeypatch, 4, *sample(generators / "var", "codes", tmp_path, *before))
    there = contents(tmp_path)
    refused_here(here, words, *sample(generators / "var", "codes", tmp_path, *after))
    assert contents(tmp_path) == there


def test_so_are_other_weights_and_captions(here, generators, tmp_path, monkeypatch):
    student = tmp_path / "student"
    shutil.copytree(generators / "text", student)
    captions = ("--captions", generators / "captions.safetensors")
    call = sample(student, "codes", tmp_path, *captions)
    interrupted(here, monkeypatch, 4, *call)
    there = contents(tmp_path)
    save_captions(tmp_path / "others.safetensors", *random_captions(3, 4, 12, seed=1))
    refused_here(here, "(captions is '3, ", *call, "--captions", tmp_path / "others.safetensors")
    (tmp_path / "others.safetensors").unlink()
    assert contents(tmp_path) == there
    path = student / "student.safetensors"
    tensors, config = load_tensors(path)
    next(iter(tensors.values())).add_(1)
    save_tensors(path, tensors, config)
    refused_here(here, "(student is '", *call)


@pytest.mark.parametrize("settings", ["", "[]", "{}", None])
def test_kept_samples_that_nothing_explains_are_refused(here, generators, tmp_path, monkeypatch, settings):
    call = sample(generators / "var", "npz", tmp_path)
    interrupted(here, monkeypatch, 4, *call)
    path = tmp_path / ".x.npz.parts" / "samples.json"
    path.unlink() if settings is None else path.write_text(settings)
    refused_here(here, f"{path} does not say how it was begun; choose another name, or delete {path.parent}", *call)


def test_foreign_images_are_refused(here, generators, tmp_path):
    call = sample(generators / "var", "files", tmp_path)
    assert here(*call)[0] == 0
    (tmp_path / "x" / "cat.jpg").write_bytes(b"")
    refused_here(here, "holds 1 images that are not of this run, such as cat.jpg; choose another folder", *call)
    (tmp_path / "x" / "cat.jpg").unlink()
    (tmp_path / "x" / "samples.json").unlink()
    refused_here(here, "holds 9 images already, such as 00000-class0.png; choose another folder", *call)


def test_a_second_run_meanwhile_is_refused(here, generators, tmp_path):
    call = sample(generators / "var", "npz", tmp_path)
    with saving.Kept("npz", tmp_path / "x.npz", {"any": 1}).claimed():
        refused_here(here, "a run is going on in", *call)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        ("--quantise: has no effect with --format codes", ["--format=codes", "--quantise=var"]),
        ("--resize: has no effect with --format codes", ["--format=codes", "--resize=8"]),
        ("--resize: got -1", ["--resize=-1"]),
        ("--image-size-eval: here it is called --resize", ["--image-size-eval=8"]),
    ],
)
def test_flags_without_effect(here, generators, tmp_path, words, flags):
    refused_here(here, words, "sample", "--student", generators / "var", "--to", tmp_path / "x", *flags)


def test_a_stream_of_ones_own_is_not_kept(tmp_path):
    teacher = Painter()

    def failing():
        yield from some(7, teacher)
        raise DDFastError("no more")

    for form in ("npz", "codes", "files"):
        with pytest.raises(DDFastError, match="no more; "):
            save_samples(failing(), teacher, form, tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]  # whole images
    assert {path.suffix for path in (tmp_path / "x").iterdir()} == {".png"}


# Never less than all --------------------------------------------------------------------------------------------------


def kept_of_ten(folder: Path, form: str = "npz") -> tuple[saving.Kept, Painter]:
    return saving.Kept(form, folder / FORMS[form], {"count": 10}), Painter(0.1, 0.9, side=3, channels=3)


@pytest.mark.parametrize("form", ["npz", "codes"])
def test_a_file_without_all_batches_is_not_made(tmp_path, form):
    """As where the processes of two machines do not see one folder."""
    kept, teacher = kept_of_ten(tmp_path, form)
    with (
        kept.claimed(),
        pytest.raises(DDFastError, match="has 1 batches, expected 2: all processes must see one folder"),
    ):
        kept.whole([range(5), range(5, 10)], lambda batch: [])
        saving.save_stream(some(5, teacher), teacher, kept)
    assert not kept.path.exists()
    assert len(kept.parts()) == 1
    again = kept_of_ten(tmp_path, form)[0]
    with again.claimed():
        assert again.whole([range(5), range(5, 10)], lambda batch: []) == {0}


@pytest.mark.parametrize("form", ["npz", "codes"])
def test_what_another_run_finished_meanwhile_is_not_written_over(tmp_path, form):
    kept, _ = kept_of_ten(tmp_path, form)
    kept.path.write_bytes(b"whole")
    with pytest.raises(DDFastError, match="exists"), kept.claimed():
        raise AssertionError("must not be claimed")
    assert kept.path.read_bytes() == b"whole"


def test_the_name_of_the_whole_is_no_batch(tmp_path):
    kept, teacher = kept_of_ten(tmp_path, "codes")
    kept.path = tmp_path / "50k.safetensors"
    with kept.claimed():
        kept.whole([range(5)], lambda batch: [])
        (kept.folder / "whole.safetensors").write_bytes(b"a run was killed here")
        saving.save_stream(some(5, teacher), teacher, kept)
    assert len(load_file(kept.path)["codes"]) == 5
