"""benchmarks/compare_commits.py sees every kind of difference, and none where only times differ."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from compare_commits import compare, untimed
from PIL import Image
from safetensors.torch import load_file, save_file

REPORT = """# DD1

| model | steps | NLL/token | ms/image, batch 1 | speed-up over AR, batch 1 |
|---|---|---|---|---|
| DD1 student | 1 | 3.141 | {ms} | {ms}x |

NLL: nats. The same in plain PyTorch takes {ms} ms/image at batch 1.

- ddfast: 0.1.0, commit {commit}
- seconds per stage: teacher {ms}, distillation {ms}
"""


def write(folder: Path, ms: float, commit: str) -> Path:
    """A run's files, of one result and of times of their own."""
    (folder / "run").mkdir(parents=True)
    tensors = {"weight": torch.arange(6, dtype=torch.float32).view(2, 3), "nan": torch.tensor([torch.nan, -0.0])}
    save_file(tensors, folder / "run" / "student.safetensors", {"config": "{}", "method": '"dd1"'})
    torch.save({"model": {"weight": tensors["weight"]}}, folder / "student.pth")
    lines = [{"step": step, "loss": 0.5 / step, "none": None, "steps_per_second": ms} for step in (1, 2)]
    (folder / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = {"frechet": 1.5, "seconds_per_image": {"1": ms}, "speedup_vs_ar": {"1": ms}}
    (folder / "run" / "metrics.json").write_text(json.dumps({"teacher": row, "nll": float("nan")}))
    (folder / "run" / "stages.json").write_text(json.dumps({"teacher": ms}))
    (folder / "run" / "config.toml").write_text("seed = 0\n")
    (folder / "run" / "report.md").write_text(REPORT.format(ms=ms, commit=commit))
    html = f"<p>3.141</p>\n<td data-time>{ms}x</td>\n<dd>0.1.0, commit {commit}</dd>\n"
    (folder / "run" / "report.html").write_text(html)
    (folder / "run" / "trace.json").write_text("not compared " + commit)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / "samples.png")
    return folder


@pytest.fixture
def before(tmp_path) -> Path:
    return write(tmp_path / "before", 0.25, "1234567890")


@pytest.fixture
def after(tmp_path) -> Path:
    return write(tmp_path / "after", 17.5, "abcdef0123-dirty")


def differences(before: Path, after: Path, *allowed: str) -> list[str]:
    return [line for one in compare(before, after, frozenset(allowed)).values() for line in one.differences]


def test_times_and_the_commit_do_not_matter(before, after):
    found = compare(before, after)
    assert [one.differences for one in found.values()] == [[]] * len(found)
    assert found["file names"].count == 10
    assert found["safetensors tensors"].count == 2
    assert found["metrics.jsonl"].count == 8


def flip_a_bit(folder: Path) -> None:
    path = folder / "run" / "student.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def new_header(folder: Path) -> None:
    path = folder / "run" / "student.safetensors"
    save_file(load_file(path), path, {"config": "{}", "method": '"dd2"', "format": "1"})


def text(name: str, old: str, new: str):
    def change(folder: Path) -> None:
        path = folder / "run" / name
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (flip_a_bit, ["run/student.safetensors: weight: 1 of 6 numbers, by at most "]),
        (new_header, [
            "run/student.safetensors: format: only after",
            """run/student.safetensors: method: '"dd1"' became '"dd2"'""",
        ]),
        (text("metrics.jsonl", "0.25", "0.2500000000000001"),
         ["run/metrics.jsonl: line 2.loss: 0.25 became 0.2500000000000001"]),
        (text("metrics.jsonl", "null", "0"), [
            f"run/metrics.jsonl: line {number}.none: None became 0" for number in (1, 2)
        ]),
        (text("metrics.json", "1.5", "1.25"), ["run/metrics.json: teacher.frechet: 1.5 became 1.25"]),
        (text("metrics.json", "speedup_vs_ar", "speedup"), [
            "run/metrics.json: teacher.speedup.1: only after", "run/metrics.json: teacher.speedup_vs_ar.1: only before",
        ]),
        (text("config.toml", "0", "1"), ["run/config.toml: seed: 0 became 1"]),
        (text("report.md", "3.141", "3.142"), ["run/report.md: line 5: "]),
        (text("report.html", "3.141", "3.142"), ["run/report.html: line 1: "]),
        (lambda folder: (folder / "student.pth").unlink(), ["student.pth: only before"]),
        (lambda folder: (folder / "more.txt").write_text(""), ["more.txt: only after"]),
        (lambda folder: torch.save({"model": {"weight": torch.ones(2, 3).half()}}, folder / "student.pth"),
         ["student.pth: model.weight: float32 [2, 3] became float16 [2, 3]"]),
        (lambda folder: Image.fromarray(np.full((4, 4, 3), (0, 0, 1), np.uint8)).save(folder / "samples.png"),
         ["samples.png: pixels: 16 of 48 numbers, by at most 1"]),
    ],
)  # fmt: skip
def test_a_difference_is_told(before, after, change, told):
    change(after)
    found = differences(before, after)
    assert len(found) == len(told)
    assert all(line.startswith(words) for line, words in zip(found, told, strict=True)), found


def test_a_header_may_be_allowed_to_differ(before, after):
    new_header(after)
    assert differences(before, after, "format", "method") == []
    assert len(differences(before, after, "format")) == 1


def test_zero_and_minus_zero_differ(before, after):
    path = after / "run" / "student.safetensors"
    save_file(load_file(path) | {"nan": torch.tensor([torch.nan, 0.0])}, path, {"config": "{}", "method": '"dd1"'})
    assert differences(before, after) == ["run/student.safetensors: nan: 1 of 2 numbers, by at most nan"]


def test_nothing_but_times_is_taken_out_of_a_text():
    shown = untimed(REPORT.format(ms=12.5, commit="0123abc")).splitlines()
    assert shown[4] == "| DD1 student | 1 | 3.141 |_|_|"
    assert "12.5" not in "".join(shown)
    assert untimed("NLL 3.5, 20 samples") == "NLL 3.5, 20 samples"


def test_a_folder_equals_its_copy(before, tmp_path):
    shutil.copytree(before, tmp_path / "copy")
    assert differences(before, tmp_path / "copy") == []
