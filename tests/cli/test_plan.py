"""`ddfast plan` as a user runs it."""

import json
import re

import pytest
from commands import refused_here

from ddfast.planning import parse_bytes

TINY = ["--teacher.width=32", "--teacher.depth=2", "--teacher.heads=2"]


def test_a_plan_says_what_a_training_takes(here, tmp_path):
    code, shown, errors = here(
        "plan",
        *TINY,
        "--preset=paper",
        "--devices=4",
        "--dd1.batch-size=64",
        "--parallel.micro-batch=6",
        "--json",
        tmp_path / "plan.json",
    )
    assert code == 0, errors
    found = json.loads((tmp_path / "plan.json").read_text())
    assert [stage["stage"] for stage in found["stages"]] == ["trajectories", "distillation"]
    stage, number = found["stages"][1], found["parameters"]["student"]
    (phase,) = stage["phases"]
    assert [phase[name] for name in ("micro_batches", "micro_batch", "steps")] == [3, 6, 3000]
    assert [stage["state"][name] for name in ("parameters", "gradients", "moments", "average")] == [
        4 * number, 4 * number, 8 * number, 4 * number,
    ]  # fmt: skip
    assert phase["peak"] > sum(stage["state"].values()) + stage["teacher"]
    assert phase["hours"] == pytest.approx(3000 * phase["flops"] / (4 * 0.4 * 19.5e12) / 3600)
    assert found["disk"]["checkpoints"] == 2 * 16 * number
    assert found["disk"]["pairs"] == 20_000 * (16 + 16)
    assert found["fits"]
    assert re.search(r"distillation, student +replicate +3 x 6 +none", shown)
    assert "\nfits: at most" in shown


def test_a_plan_says_which_batches_of_the_evaluation_do_not_fit(here):
    """A cache of VAR-d16 takes .6 GiB a sample at 512 pixels."""
    scales = ("--teacher.patch-nums", *map(str, (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)))
    code, shown, errors = here("plan", "--recipe=var-d16", "--memory=8GiB", *scales, "--parallel.micro-batch=1")
    assert code == 0, errors
    assert re.search(r"the teacher decodes (\d) samples at a time, not 64: give --evaluation.batch-size \1 ", shown)
    code, shown, errors = here("plan", "--recipe=var-d16", "--parallel.micro-batch=1")
    assert (code, "evaluation: the teacher" in shown) == (0, False), errors


def test_a_plan_that_does_not_fit_says_what_must_change(here):
    code, shown, errors = here(
        "plan", *TINY, "--method=dd2", "--dd2.head-width=16", "--devices=8", "--nodes=2", "--memory=0.5MiB", "--json=-"
    )
    assert code == 0, errors
    (stage,) = json.loads(shown)["stages"]
    assert stage["strategy"] == "shard"
    assert {phase["recompute"] for phase in stage["phases"]} == {"blocks"}
    assert {phase["micro_batch"] for phase in stage["phases"]} == {1}
    assert {phase["gathered"] > 0 for phase in stage["phases"]} == {True}
    assert re.fullmatch("(.* devices in a node, .*, or )?devices of 1 GiB", stage["advice"])


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--peak-flops=-3", "peak_flops: got -3.0, expected a positive number, or 0: the data sheet's"),
        ("--mfu=0", "mfu: got 0.0, expected a positive number"),
        ("--mfu=2", "mfu: got 2.0, expected a share of at most 1"),
        ("--devices=0", "devices: got 0, expected a positive number"),
    ],
)
def test_a_machine_that_cannot_be_is_one_line(here, flag, words):
    refused_here(here, words, "plan", flag)


def test_memory_is_told_with_its_unit():
    assert parse_bytes("80GiB") == 80 * 2**30
    assert parse_bytes("24 GB") == 24 * 10**9
    with pytest.raises(ValueError, match="memory: got 'much', expected a size such as 80GiB"):
        parse_bytes("much")


def test_own_targets_need_no_trajectories(here, tmp_path):
    code, _, errors = here("plan", *TINY, "--dd1.own-share=1", "--memory=1GiB", "--json", tmp_path / "plan.json")
    assert code == 0, errors
    found = json.loads((tmp_path / "plan.json").read_text())
    assert [stage["stage"] for stage in found["stages"]] == ["distillation"]
