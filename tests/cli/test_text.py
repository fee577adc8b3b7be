"""The recipe text by the commands: what is made are texts."""

import json

import pytest
from commands import as_a_process

from ddfast.config import update
from ddfast.hub import Generator
from ddfast.models.text import ALPHABET
from ddfast.pipeline import train
from ddfast.recipes import get_recipe

TINY = {
    "teacher": {"num_tokens": 8, "width": 32, "depth": 1, "heads": 2, "iterations": 20, "batch_size": 32},
    "trajectories": {"count": 100, "shard_size": 50},
    "dd1": {"iterations": 4, "batch_size": 16, "point": 2},
    "dd2": {
        "head_width": 16, "head_depth": 1,
        "match": {"start_iterations": 2, "guidance_first": 1, "iterations": 2, "batch_size": 16},
    },
    "evaluation": {"samples": 100, "batch_size": 50, "batch_sizes": [1]},
}  # fmt: skip


@pytest.fixture(scope="module", params=["dd1", "dd2"])
def run_folder(request, cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / request.param
    with as_a_process(cache, "train"):
        config = get_recipe("text")
        update(config, TINY | {"out": str(folder), "method": request.param})
        train(config, progress_bar=lambda name: lambda *_: None)
    return folder


def test_figures_and_a_report_of_texts(run_folder):
    metrics = json.loads((run_folder / "metrics.json").read_text())
    for source in ("teacher", "ode_pairs", "student_1step", "student_2step", "speculative_jacobi"):
        assert {"teacher_nll", "pair_tv"} <= set(metrics[source])
        assert "frechet" not in metrics[source]
    report = (run_folder / "report.md").read_text()
    assert "began with the same noise" in report
    assert "text, teacher" in report
    assert "ms/sample" in report
    for nonsense in ("Class by class", "class 0", "ms/image", "there are no pictures"):
        assert nonsense not in report
    assert not (run_folder / "samples.png").exists()


def test_samples_are_lines(run_folder, run):
    run("sample", "--student", run_folder, "--count", 12)
    lines = (run_folder / "samples-1.txt").read_text().splitlines()
    assert len(lines) == 12
    assert all(len(line) == 8 and set(line) <= set(ALPHABET) | {"¶"} for line in lines)
    told = run("sample", "--student", run_folder, "--count", 12, "--format", "codes", "--to", run_folder / "codes")
    assert "12 code sequences" in told.stdout
    done = run("sample", "--student", run_folder, "--format", "grid", code=1)
    assert "--format grid: this teacher has no image tokenizer; --format text writes its texts" in done.stderr
    done = run("sample", "--student", run_folder, "--resize", 8, code=1)
    assert "--resize: has no effect with --format text: there are no images" in done.stderr
    done = run("sample", "--student", run_folder, "--steps", 0, "--guidance.cfg-scale", 2, code=1)
    assert "cfg_scale: a teacher of text has no condition to guide it by" in done.stderr


def test_other_commands(run_folder, run, tmp_path):
    assert "NLL" in run("evaluate", "--student", run_folder).stdout
    run("plan", "--recipe", "text")
    generator = Generator.from_run(run_folder)
    texts = generator.texts([0, 0], steps=2)
    assert [len(text) for text in texts] == [8, 8]
    with pytest.raises(TypeError, match="TextTeacher has no image tokenizer: `texts` gives the samples' texts"):
        generator.images([0])
    generator.save_pretrained(tmp_path / "hub")
    assert Generator.from_pretrained(str(tmp_path / "hub")).texts([0, 0], steps=2) == texts
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "text generator" in card
    assert "image" not in card.partition("## Teacher")[0]
    run("sample", "--student", tmp_path / "hub", "--count", 3)
    assert len((tmp_path / "hub" / "samples-1.txt").read_text().splitlines()) == 3


def test_images_are_no_text(generators, run):
    done = run("sample", "--student", generators / "digits", "--format", "text", code=1)
    assert "--format text: this teacher makes no text; --format codes writes its codes" in done.stderr
