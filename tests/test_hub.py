"""A generator as a folder and a repository; offline but for what is replaced here."""

import json
import os
from pathlib import Path

import pytest
import torch
from official import llamagen_teacher_like, var_teacher_like

import ddfast.hub
from ddfast.cli import main
from ddfast.errors import DDFastError
from ddfast.hub import Generator
from ddfast.models.llamagen.captions import random_captions, save_captions
from ddfast.models.loading import start_student, student_class, untrained_teacher
from ddfast.ops import noise
from ddfast.recipes import get_recipe


def digits_teacher():
    config = get_recipe("digits")
    config.teacher.width, config.teacher.depth = 32, 1
    return untrained_teacher(config)


TEACHERS = {"digits": digits_teacher, "var": var_teacher_like, "llamagen": llamagen_teacher_like}


def generator(family: str) -> Generator:
    teacher = TEACHERS[family]()
    student = start_student(teacher).eval()
    student.split = 1
    return Generator(teacher, student, point=2, card={"cost": "3 hours on one GPU.", "evaluation": "FID of 50,000."})


@pytest.mark.parametrize("family", TEACHERS)
def test_a_folder_gives_the_same_images(tmp_path, family):
    made = generator(family)
    made.save_pretrained(tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "config.json", "model.safetensors", "student.safetensors", "README.md",
    }  # fmt: skip
    loaded = Generator.from_pretrained(str(tmp_path / "model"))
    assert type(loaded.teacher) is type(made.teacher)
    assert loaded.point == 2
    for steps in (1, 2):
        # Weights mapped from a file lie elsewhere in memory, and kernels round by alignment.
        torch.testing.assert_close(loaded.images([0, 3], steps=steps, seed=5), made.images([0, 3], steps=steps, seed=5))
    assert torch.allclose(loaded.images([3], first_index=1), loaded.images([0, 3])[1:], atol=1e-5)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["point"] == 2
    assert config["student"] == json.loads(json.dumps(made.student.config, default=list))


def test_the_card_says_teacher_recipe_cost_and_evaluation(tmp_path):
    generator("var").save_pretrained(tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert card.startswith("---\n")
    for words in ("library_name: ddfast", "VARTeacher", "14 tokens of 16 codes in 3 steps", "3 hours on one GPU.",
                  "FID of 50,000.", "## Recipe\n\nUnknown."):  # fmt: skip
        assert words in card


def test_pushing_uploads_the_folder(monkeypatch):
    import huggingface_hub.hub_mixin as mixin

    uploaded = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **settings):
            return type("Url", (), {"repo_id": repo_id})()

        def upload_folder(self, *, repo_id, folder_path, **settings):
            from pathlib import Path

            uploaded[repo_id] = sorted(path.name for path in Path(folder_path).iterdir())
            return "done"

    monkeypatch.setattr(mixin, "HfApi", Api)
    generator("llamagen").push_to_hub("user/dd1")
    assert uploaded == {"user/dd1": ["README.md", "config.json", "model.safetensors", "student.safetensors"]}


def test_a_repository_is_downloaded_once_and_read_as_a_folder(tmp_path, monkeypatch):
    made = generator("llamagen")
    made.save_pretrained(tmp_path / "model")
    asked = []

    def download(name, **settings):
        asked.append((name, settings["revision"]))
        return str(tmp_path / "model")

    monkeypatch.setattr(ddfast.hub, "snapshot_download", download)
    monkeypatch.setattr(
        "huggingface_hub.hub_mixin.hf_hub_download", lambda **_: str(tmp_path / "model" / "config.json")
    )
    loaded = Generator.from_pretrained("user/dd1", revision="v1")
    assert asked == [("user/dd1", "v1")]
    assert torch.equal(loaded.images([1]), made.images([1]))


def test_folders_that_hold_no_generator(tmp_path):
    with pytest.raises(DDFastError, match="holds no generator of ddfast"):
        Generator.from_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="steps: got 3, expected 1 or 2"):
        generator("llamagen").images([0], steps=3)


# Where from -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dd1-digit", "./dd1-digit", "/no/such", "a/b/c", Path("user/name"), "user/", "~x/y"])
def test_a_mistyped_folder_is_no_repository(monkeypatch, name):
    monkeypatch.setattr(ddfast.hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the network"))
    with pytest.raises(DDFastError, match=r"^no folder .* here; give a folder with a generator, or a repository, U"):
        Generator.from_pretrained(name)


@pytest.mark.parametrize("settings", [{}, {"local_files_only": True}])
def test_a_repository_that_cannot_be_had_is_one_line(tmp_path, monkeypatch, settings):
    """Without a network, whatever huggingface_hub and its libraries raise then."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DDFastError, match=r"^user/dd1 is no folder here, and .*: \w+Error: .*; check the n") as caught:
        Generator.from_pretrained("user/dd1", cache_dir=tmp_path, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [ConnectionError("no route\nto host"), ValueError(), OSError(28, "No space left")])
def test_what_ends_an_upload_is_one_line(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", fail)
    with pytest.raises(DDFastError, match=r"^user/dd1: [A-Za-z]+Error: .+; check the name") as caught:
        generator("llamagen").push_to_hub("user/dd1")
    assert "\n" not in str(caught.value)


def test_a_folder_of_convert_is_a_generator(tmp_path):
    made = generator("var")
    made.save_pretrained(tmp_path / "model")
    official = [
        "convert",
        "--teacher",
        str(tmp_path / "model"),
        "--to",
        str(tmp_path / "official"),
        "--form",
        "official",
    ]
    assert main(official) == 0
    files = [f"--{part}={tmp_path}/official/{part}.pth" for part in ("teacher", "tokenizer", "student")]
    assert main(["convert", *files, "--to", str(tmp_path / "again"), "--point=2", "--split=1"]) == 0
    loaded = Generator.from_pretrained(tmp_path / "again")
    assert (loaded.point, loaded.card) == (2, {})
    torch.testing.assert_close(loaded.images([0, 3], steps=2), made.images([0, 3], steps=2))
    assert main(["convert", *files[:2], "--to", str(tmp_path / "alone")]) == 0
    with pytest.raises(
        DDFastError, match=r"alone holds no generator of ddfast \(no student\.safetensors\); .*--student"
    ):
        Generator.from_pretrained(tmp_path / "alone")


def test_where_a_second_step_starts_is_said_if_nothing_tells_it(tmp_path, capsys):
    made = generator("var")
    for name, point in (("known", 2), ("unknown", None)):
        made.point = point
        made.save_pretrained(tmp_path / name)
    capsys.readouterr()
    assert Generator.from_pretrained(tmp_path / "known").point == 2
    assert capsys.readouterr().out == ""
    assert Generator.from_pretrained(tmp_path / "unknown").point == 1
    assert "nothing says where the student's second step starts: point 1 is assumed" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "[1]", "not json"])
def test_a_damaged_config_is_named(tmp_path, content):
    generator("digits").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(content)
    with pytest.raises(DDFastError, match=r"model holds no generator of ddfast \(config\.json: "):
        Generator.from_pretrained(tmp_path / "model")


def test_a_run_is_told_from_a_generator(tmp_path):
    (tmp_path / "config.toml").write_text("recipe = 'digits'")
    with pytest.raises(DDFastError, match=r"it is a training run: use Generator\.from_run"):
        Generator.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["dtype", "trust_remote_code", "cfg_scale"])
def test_unknown_arguments_are_named(tmp_path, name):
    generator("digits").save_pretrained(tmp_path / "model")
    with pytest.raises(TypeError, match=rf"^{name}: no argument of from_pretrained; known: revision, .*device"):
        Generator.from_pretrained(tmp_path / "model", **{name: 1})


# Images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "words", "arguments"),
    [
        (TypeError, "classes: got 1.5, expected integers", {"classes": [1.5]}),
        (TypeError, "classes: got 2.0, expected integers", {"classes": torch.tensor([2.0])}),
        (TypeError, "classes: got True, expected integers", {"classes": [True]}),
        (ValueError, r"classes: got \[5\], expected labels in 0\.\.4", {"classes": [5]}),
        (ValueError, r"classes: got \[-1, 2\], expected labels in 0\.\.4", {"classes": [-1, 2]}),
        (ValueError, "classes: got neither", {}),
        (ValueError, "classes: got both", {"classes": [1], "captions": ["a cat"]}),
        (DDFastError, "VARTeacher is conditioned on class labels", {"captions": ["a cat"]}),
        (TypeError, "cfg: here it is called cfg_scale", {"classes": [1], "cfg": 4}),
        (TypeError, "g_seed: here it is called seed", {"classes": [1], "g_seed": 4}),
        (TypeError, "label_B: here it is called classes", {"label_B": [1]}),
        (TypeError, "more_smooth: not here", {"classes": [1], "more_smooth": True}),
        (TypeError, "colour: no argument", {"classes": [1], "colour": True}),
        (ValueError, "cfg_scale: has no effect", {"classes": [1], "cfg_scale": 4.0}),
        (ValueError, "seed: got -1", {"classes": [1], "seed": -1}),
        (ValueError, "first_index, batch_size: got -1, 0", {"classes": [1], "first_index": -1}),
        (ValueError, "first_index, batch_size: got 0, -1", {"classes": [1], "batch_size": -1}),
    ],
)
def test_wrong_arguments_of_images(error, words, arguments):
    with pytest.raises(error, match=words):
        generator("var").images(**arguments)


def test_images_do_not_depend_on_the_batch():
    made = generator("llamagen")
    whole = made.images([0, 1, 2, 3, 4], steps=2)
    assert whole.shape[0] == 5
    torch.testing.assert_close(made.images(torch.tensor([0, 1, 2, 3, 4]), steps=2, batch_size=2), whole)
    torch.testing.assert_close(made.images([3, 4], steps=2, first_index=3), whole[3:])
    assert made.images([]).shape == (0, *whole.shape[1:])


def test_the_teachers_part_takes_settings():
    teacher = var_teacher_like()
    network = student_class(teacher, "dd2").from_teacher(teacher, head_width=16, head_depth=1).eval()
    made = Generator(teacher, network, point=1)
    labels = list(range(5)) * 8
    plain, guided = made.images(labels, steps=2), made.images(labels, steps=2, cfg_scale=30.0)
    assert not torch.equal(plain, guided)


def test_refined_to_the_end_they_are_the_teachers():
    made = generator("digits")
    teacher = made.teacher
    eps = noise(4, torch.arange(3), (teacher.num_tokens, teacher.code_dim), "cpu")
    own = teacher.generate(torch.tensor([0, 1, 2]), sampler="flow", noise=eps)
    assert torch.equal(made.codes([0, 1, 2], seed=4, refine="exact"), own)


def test_a_text_generator_is_given_captions(tmp_path):
    teacher = llamagen_teacher_like(model_type="t2i", cls_token_num=4)
    made = Generator(teacher, start_student(teacher).eval(), point=2)
    features, mask = random_captions(3, 4, 12)
    save_captions(tmp_path / "captions.safetensors", features, mask)
    made.save_pretrained(tmp_path / "model")
    loaded = Generator.from_pretrained(tmp_path / "model")
    images = loaded.images(captions=tmp_path / "captions.safetensors", steps=2)
    assert images.shape == (3, 3, 6, 6)
    torch.testing.assert_close(loaded.images(captions=(features, mask), steps=2, batch_size=2), images)
    network = student_class(teacher, "dd2").from_teacher(teacher, head_width=16, head_depth=1).eval()
    assert Generator(teacher, network, point=1).images(captions=(features, mask), steps=3).shape == (3, 3, 6, 6)
    with pytest.raises(ValueError, match="conditioned on text: give captions"):
        loaded.images([0])
    with pytest.raises(ValueError, match=r"condition: got \[3, 4, 13\]"):
        loaded.images(captions=(torch.zeros(3, 4, 13), mask))
    loaded.teacher.captions = (features, mask)
    torch.testing.assert_close(loaded.images([2, 0], steps=2, batch_size=1)[:1], loaded.images([2], steps=2))


# Whole or not at all ----------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("there", [False, True], ids=["new", "over another"])
@pytest.mark.parametrize("step", ["save_teacher", "save_student", "write_atomically"])
def test_a_save_that_fails_changes_nothing(tmp_path, monkeypatch, there, step):
    folder = tmp_path / "model"
    if there:
        generator("digits").save_pretrained(folder)
        (folder / "notes.txt").write_text("mine")
    before = contents(folder) if there else None

    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(ddfast.hub, step, fail)
    with pytest.raises(KeyboardInterrupt):
        generator("var").save_pretrained(folder)
    assert [path.name for path in tmp_path.iterdir()] == (["model"] if there else [])
    assert (contents(folder) if there else None) == before


def test_a_save_over_another_replaces_it_and_keeps_what_is_the_users(tmp_path):
    generator("digits").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("my card")
    (tmp_path / "model" / "notes.txt").write_text("mine")
    made = generator("var")
    made.save_pretrained(tmp_path / "model")
    torch.testing.assert_close(Generator.from_pretrained(tmp_path / "model").images([0]), made.images([0]))
    assert (tmp_path / "model" / "README.md").read_text() == "my card"
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_stopped_between_the_files_of_a_save_the_folder_is_refused(tmp_path, monkeypatch):
    folder, replace = tmp_path / "model", os.replace
    generator("var").save_pretrained(folder)
    moved = []

    def stop_at_the_second(source, target):
        if Path(target).parent == folder and len(moved) == 1:
            raise KeyboardInterrupt
        moved.append(target) if Path(target).parent == folder else None
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        generator("var").save_pretrained(folder)
    with pytest.raises(DDFastError, match=r"model holds no generator of ddfast \(no config\.json\)"):
        Generator.from_pretrained(folder)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DDFastError, match=r"^cannot write .*/file/model: "):
        generator("digits").save_pretrained(tmp_path / "file" / "model")
