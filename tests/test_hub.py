"""A generator as a folder and a repository; offline but for what is replaced here."""

import json

import pytest
import torch
from official import llamagen_teacher_like, var_teacher_like

from ddfast.errors import DDFastError
from ddfast.hub import Generator
from ddfast.models.digits import untrained_digits_teacher
from ddfast.models.loading import start_student
from ddfast.recipes import get_recipe


def digits_teacher():
    config = get_recipe("digits")
    config.teacher.width, config.teacher.depth = 32, 1
    return untrained_digits_teacher(config.tokenizer, config.teacher)


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
    import ddfast.hub

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
