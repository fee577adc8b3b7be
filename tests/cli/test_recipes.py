"""Every recipe, whole, at sizes of seconds: those of published teachers with random weights, the others trained."""

import json
from pathlib import Path

import pytest
import torch
from commands import few_marginals
from lpips_files import write_lpips

from ddfast.config import config_hash, update
from ddfast.errors import DDFastError
from ddfast.hub import Generator
from ddfast.models.converting import export_student, export_teacher
from ddfast.models.loading import build_teacher, load_student, load_teacher, start_student, untrained_teacher
from ddfast.pipeline import train
from ddfast.recipes import RECIPES, get_recipe
from ddfast.runs import open_student
from ddfast.sampling import sample_student
from ddfast.trajectories.store import TrajectoryStore

SMALL = ["digits-llamagen", "digits-var"]
IN_MINUTES = ["digits", *SMALL, "text"]
PUBLISHED = [name for name in RECIPES if name not in IN_MINUTES]
OURS = ["var-d16", "llamagen-b", "llamagen-xl-t2i"]
"""Of every kind one: the others differ in sizes and schedules."""

TINY = {
    "tokenizer": {
        "num_codes": 16, "code_dim": 4, "channels": 32, "multipliers": [1, 1], "blocks": 1, "latent_channels": 32,
    },
    "trajectories": {"count": 24, "shard_size": 12},
    "dd1": {"iterations": 4, "batch_size": 6, "warmup": 1, "log_every": 2, "checkpoint_every": 2},
    "dd2": {
        "head_width": 16, "head_depth": 1,
        "adapt": {"iterations": 4, "fit_iterations": 2, "batch_size": 4, "log_every": 2},
        "tune": {"iterations": 4, "head_iterations": 2, "batch_size": 4, "log_every": 2},
        "match": {
            "iterations": 2, "guidance_updates": 2, "align_iterations": 1, "later_iterations": 1, "batch_size": 4,
            "log_every": 2, "watch_every": 4,
        },
    },
    "evaluation": {"samples": 100, "batch_size": 50, "batch_sizes": [1, 2]},
}  # fmt: skip
VAR = {"teacher": {"depth": 2, "num_classes": 2, "patch_nums": [1, 2, 3]}, "dd1": {"point": 2, "split": 1}}
LLAMAGEN = {
    "teacher": {"dim": 32, "n_layer": 2, "n_head": 2, "num_classes": 2, "block_size": 9},
    "dd1": {"point": 3, "split": 5},
}
TEXT = {"teacher": {"cls_token_num": 6, "caption_dim": 8}}
BRIEFLY = TINY | {
    "tokenizer": {"num_codes": 16, "iterations": 6, "warmup": 2, "batch_size": 8},
    "teacher": {
        "width": 32, "depth": 1, "heads": 2, "iterations": 4, "batch_size": 8, "training_images": 40,
    },
    "evaluation": {"samples": 100, "batch_size": 50, "batch_sizes": [1, 2], "paths": 4},
}  # fmt: skip


def tiny(name: str, out: Path, preset: str = "", **teacher: object):
    config = get_recipe(name, preset=preset)
    for values in (TINY, VAR if name.startswith("var") else LLAMAGEN, TEXT if name.endswith("t2i") else {}):
        update(config, values)
    update(config, {"out": str(out), "teacher": {"random_weights": True, **teacher}})
    return config


@pytest.fixture(autouse=True)
def quick():
    with few_marginals():
        yield


def silent(title):
    return lambda done, total, text: None


@pytest.mark.parametrize("name", PUBLISHED)
def test_training(name, tmp_path, monkeypatch):
    config = tiny(name, tmp_path / "run")
    metrics = train(config, progress_bar=silent)
    assert {"teacher", "ode_pairs", "student_1step", "student_2step", "skip_last"} <= set(metrics)
    assert metrics["student_1step"]["speedup_vs_ar"].keys() == {"1", "2"}
    assert "frechet" not in metrics["teacher"]  # no feature network of natural images is at hand
    assert (tmp_path / "run" / "samples.png").read_bytes().startswith(b"\x89PNG")
    assert "| DD1 student | 1 |" in (tmp_path / "run" / "report.md").read_text()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    monkeypatch.setattr(TrajectoryStore, "load", lambda *_: pytest.fail("pairs were read for a student that is there"))
    again = train(tiny(name, tmp_path / "run"), progress_bar=silent)
    assert again == metrics
    # and what a user does next
    _, teacher, student = open_student(tmp_path / "run", "cpu", silent(""))
    assert student.split == config.dd1.split
    samples = sample_student(teacher, student, count=3, seed=0, steps=2)
    generator = Generator.from_run(tmp_path / "run")
    assert str(tmp_path) not in generator.card["recipe"]
    images = generator.images([0, 1], steps=2)
    side = 3 * 2
    assert images.shape == (2, 3, side, side)
    assert samples.embeddings.shape == (3, teacher.num_tokens, 4)


@pytest.mark.parametrize("name", PUBLISHED)
def test_training_by_dd2(name, tmp_path):
    config = tiny(name, tmp_path / "run")
    config.method = "dd2"
    metrics = train(config, progress_bar=silent)
    assert {"teacher", "ode_pairs", "student_1step", "student_2step", "ar_diffusion"} <= set(metrics)
    assert "teacher_involved" not in metrics
    report = (tmp_path / "run" / "report.md").read_text()
    assert "| DD2 student | 1 |" in report
    assert "| DD2 student | 1 + 1 AR |" in report
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    stages = ["adaptation", "tuning", "matching"][0 if "llamagen" in name else 1 :]
    assert list(dict.fromkeys(line["stage"] for line in lines)) == stages
    if "llamagen" in name:
        likelihoods = json.loads((tmp_path / "run" / "adaptation.json").read_text())
        assert likelihoods.keys() == {"before", "after"}
    again = tiny(name, tmp_path / "run")
    again.method = "dd2"
    assert train(again, progress_bar=silent) == metrics
    _, teacher, student = open_student(tmp_path / "run", "cpu", silent(""))
    samples = sample_student(teacher, student, count=3, seed=0, steps=3)
    assert samples.embeddings.shape == (3, teacher.num_tokens, 4)
    generator = Generator.from_run(tmp_path / "run")
    generator.save_pretrained(tmp_path / "hub")
    loaded = Generator.from_pretrained(str(tmp_path / "hub"))
    if name.endswith("t2i"):
        loaded.teacher.captions = generator.teacher.captions
    for steps in (1, 2):
        torch.testing.assert_close(loaded.images([0, 1], steps=steps), generator.images([0, 1], steps=steps))


@pytest.mark.parametrize("method", ["dd1", "dd2"])
@pytest.mark.parametrize("name", SMALL)
def test_training_on_a_small_teacher_of_digits(name, method, cache, tmp_path, monkeypatch):
    """From nothing: the teacher is trained on first use, and its images have figures of their own."""
    monkeypatch.setenv("DDFAST_CACHE", str(cache))

    def settings():
        config = get_recipe(name)
        update(config, BRIEFLY | {"out": str(tmp_path / "run"), "method": method, "seed": 7})
        update(config, {"dd2": {"match": {"start_iterations": 2, "guidance_first": 1}}})
        return config

    metrics = train(settings(), progress_bar=silent)
    one_by_one = name == "digits-llamagen"
    for source in ("teacher", "ode_pairs", "student_1step", "student_2step", "independent_marginals"):
        assert {"frechet", "class_accuracy", "teacher_nll", "pair_tv"} <= set(metrics[source]), source
    assert ("speculative_jacobi" in metrics) == one_by_one
    assert train(settings(), progress_bar=silent) == metrics
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    by_dd2 = ["adaptation", "matching"] if one_by_one else ["matching"]
    assert list(dict.fromkeys(line["stage"] for line in lines)) == {"dd1": ["distillation"], "dd2": by_dd2}[method]
    (path,) = cache.glob(f"{name}-teacher-{config_hash(settings().tokenizer, settings().teacher, 7)}.safetensors")
    generator = Generator.from_run(tmp_path / "run")
    assert type(generator.teacher) is type(load_teacher(path))
    generator.save_pretrained(tmp_path / "hub")
    images = Generator.from_pretrained(str(tmp_path / "hub")).images([0, 1], steps=2)
    assert images.shape == (2, 3, 16, 16)
    assert torch.equal(images, generator.images([0, 1], steps=2))


@pytest.mark.parametrize("name", OURS)
def test_our_settings(name, tmp_path):
    """DD1 by pairs as its paper; DD2 without stage 1, from the teacher after the generator's own codes."""
    for method in ("dd1", "dd2"):
        config = tiny(name, tmp_path / method, "ddfast")
        config.method = method
        update(config, {"dd2": {"match": {"start_iterations": 2, "guidance_first": 1, "align_iterations": 0}}})
        config.dd2.match.later_iterations = 0
        metrics = train(config, progress_bar=silent)
        assert {"student_1step", "student_2step"} <= set(metrics)
        assert (tmp_path / method / "trajectories").exists() == (method == "dd1")
        lines = [json.loads(line) for line in (tmp_path / method / "metrics.jsonl").read_text().splitlines()]
        found = set(lines[-1])
        assert {"dd1": {"cross_entropy"}, "dd2": {"anchor", "lookahead", "score_distance"}}[method] <= found
        assert open_student(tmp_path / method, "cpu", silent(""))[0].preset == "ddfast"


@pytest.mark.parametrize("name", RECIPES)
def test_presets(name):
    usual = "ddfast" if name in IN_MINUTES else "paper"
    assert get_recipe(name) == get_recipe(name, preset=usual)
    assert get_recipe(name).preset == usual
    ours, papers = get_recipe(name, preset="ddfast"), get_recipe(name, preset="paper")
    assert ours.teacher == papers.teacher
    assert ours.tokenizer == papers.tokenizer
    assert (papers.dd1.own_share, papers.dd1.optimizer, papers.dd1.lookahead_weight) == (0.0, "adamw", 0.0)
    assert ours.dd1.optimizer == "muon"
    assert ours.dd2.match.anchor_weight == ours.dd2.match.lookahead_weight == 1.0
    assert (ours.init, papers.init) == ("teacher", "stage1")
    if name in PUBLISHED:  # as many updates of the student
        ours, papers = ours.dd2.match, papers.dd2.match
        assert ours.start_iterations + ours.iterations == papers.iterations + papers.later_iterations
        assert (ours.batch_size, ours.top_k, ours.top_p) == (papers.batch_size, papers.top_k, papers.top_p)


@pytest.mark.parametrize("name", IN_MINUTES)
def test_more_updates(name):
    """Of a student that recycles, and of what learns beside it; nothing else is another."""
    long, usual = get_recipe(name, preset="long"), get_recipe(name, preset="ddfast")
    assert long.dd1.iterations == 4 * usual.dd1.iterations
    for field in ("start_iterations", "guidance_first", "iterations"):
        assert getattr(long.dd2.match, field) == 2 * getattr(usual.dd2.match, field)
        setattr(long.dd2.match, field, getattr(usual.dd2.match, field))
    assert long.trajectories.count == 4 * usual.trajectories.count
    assert (long.dd1.recycles, long.dd2.recycles, usual.dd1.recycles, usual.dd2.recycles) == (2, 1, 0, 0)
    long.trajectories, long.dd1.iterations, long.preset = usual.trajectories, usual.dd1.iterations, usual.preset
    long.dd1.recycles = long.dd2.recycles = 0
    assert long == usual


def test_presets_that_there_are_not():
    with pytest.raises(DDFastError, match="--preset: got 'papers', expected one of ddfast, long, paper"):
        get_recipe("digits", preset="papers")
    with pytest.raises(DDFastError, match=r"--preset long: is one of digits, .*, text; of var-d16, ddfast or paper"):
        get_recipe("var-d16", preset="long")
    with pytest.raises(DDFastError, match="--preset paper: has no effect on a recipe of your own, mine:recipe"):
        get_recipe("mine:recipe", preset="paper")


@pytest.mark.parametrize("name", RECIPES)
def test_the_papers_dd2(name):
    config = get_recipe(name, preset="paper")
    match = config.dd2.match
    assert (config.init, match.guidance_start, match.fake_score, match.prefix) == (
        "stage1", "stage1", "velocity", "continuous",
    )  # fmt: skip
    assert (match.optimizer, match.form, match.alpha, match.score_weight) == ("adamw", "sid", 1.0, 1.0)
    assert match.anchor_weight == match.lookahead_weight == match.start_iterations == match.guidance_first == 0


@pytest.mark.parametrize("name", ["var-d16", "llamagen-b"])
def test_from_files(name, tmp_path):
    """The same recipe with the teacher's checkpoint, and a student in the official layout."""
    teacher = untrained_teacher(tiny(name, tmp_path))
    export_teacher(teacher, tmp_path / "teacher.pth", tmp_path / "tokenizer.pth")
    config = tiny(name, tmp_path / "run", random_weights=False, weights=str(tmp_path / "teacher.pth"))
    config.tokenizer.weights = str(tmp_path / "tokenizer.pth")
    built = build_teacher(config)
    label, codes = torch.tensor([0, 1]), torch.randint(16, (2, teacher.num_tokens))
    assert torch.equal(built.logits(label, codes), teacher.logits(label, codes))
    assert built.defaults == teacher.defaults
    student = start_student(built)
    export_student(student, tmp_path / "student.pth")
    noise = torch.randn(2, teacher.num_tokens, 4)
    loaded = load_student(tmp_path / "student.pth", built)
    assert torch.equal(loaded.sample(label, noise), student.sample(label, noise))
    wrong = "depth" if name == "var-d16" else "n_layer"
    update(config, {"teacher": {wrong: 3}})
    with pytest.raises(DDFastError, match=rf"{wrong}: got 3, but the tensors of .* say 2|embed_dim: got 192"):
        build_teacher(config)


def test_a_recipe_of_another_image_size_than_its_files_is_refused(tmp_path):
    """A recipe of 256 pixels must not train on a model of 384 as if it were one of 256."""
    export_teacher(untrained_teacher(tiny("llamagen-b", tmp_path)), tmp_path / "c2i_B_384.pt", tmp_path / "vq.pt")
    config = tiny("llamagen-b", tmp_path / "run", random_weights=False, weights=str(tmp_path / "c2i_B_384.pt"))
    config.tokenizer.weights = str(tmp_path / "vq.pt")
    with pytest.raises(DDFastError, match=r"name of .*c2i_B_384\.pt says 384 pixels"):
        build_teacher(config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_without_files_the_error_says_which(name):
    with pytest.raises(DDFastError, match=rf"recipe {name} needs its teacher's files: --teacher\.weights FILE"):
        build_teacher(get_recipe(name))


def test_lpips_takes_the_place_of_the_embedding_distance(tmp_path):
    config = tiny("var-d16", tmp_path / "run")
    vgg, linear = write_lpips(tmp_path)
    update(config, {"dd1": {"lpips_vgg": str(vgg), "lpips_linear": str(linear)}})
    update(config, {"tokenizer": {"multipliers": [1, 1, 1, 1]}})  # 24 pixels: VGG16 halves them four times
    train(config, progress_bar=silent)
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["lpips"] > 0
    assert "embedding_distance" not in line


def test_a_text_teacher_needs_captions(tmp_path):
    config = tiny("llamagen-xl-t2i", tmp_path)
    teacher = untrained_teacher(config)
    assert teacher.num_conditions == 8
    export_teacher(teacher, tmp_path / "teacher.pth", tmp_path / "tokenizer.pth")
    update(config, {"teacher": {"random_weights": False, "weights": str(tmp_path / "teacher.pth")}})
    update(config, {"tokenizer": {"weights": str(tmp_path / "tokenizer.pth")}})
    with pytest.raises(DDFastError, match=r"a text teacher needs --teacher\.captions FILE"):
        build_teacher(config)


def test_reduced_precision_of_the_teacher(tmp_path):
    config = tiny("llamagen-b", tmp_path, dtype="bfloat16")
    teacher = untrained_teacher(config)
    assert teacher.dtype == torch.bfloat16
    assert teacher.codebook.dtype == teacher.tokenizer.decoder.conv_in.weight.dtype == torch.float32
    assert teacher.rope.dtype == torch.float32
    student = start_student(teacher)
    assert torch.equal(student.to(torch.float32).rope, teacher.rope)  # never rounded on the way
