"""What is learnt does not depend on how the work is shared: processes, strategies, micro-batches, resumption."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launched
from safetensors import safe_open
from safetensors.torch import load_file
from shared_runs import (
    GUIDANCE,
    RESUMED,
    STUDENT,
    TIMEOUT,
    Case,
    Plan,
    Way,
    copied,
    cut,
    figures,
    interrupt,
    newest,
    refused,
    resumptions,
    train,
    train_all,
    writing,
)

from ddfast import processes

RELATIVE = 1e-4
WEIGHTS = 1e-5
"""Root mean square of a tensor's differences."""

CLOSE = {"ema_distance": 1e-5, "score_discrepancy_t0.125": 1e-5}
"""Differences that are none, of figures that are themselves differences of what is nearly the same."""

MATCH = {"start_iterations": 2, "guidance_first": 1, "guidance_updates": 1, "watch_every": 5, "ema_decay": 0.9}
MATCH |= {"align_iterations": 1, "later_guidance_updates": 1, "iterations": 3, "later_iterations": 1}
KL = {**MATCH, "form": "kl", "fake_score": "codes", "optimizer": "muon"}
SID = {**MATCH, "form": "sid", "fake_score": "velocity", "optimizer": "adamw", "prefix": "continuous"}
CASES = {
    "dd1, digits": Case("digits", "distill", {"iterations": 8, "ema_decay": 0.9, "batch_size": 30}),
    "dd1, var": Case("var", "distill", {"iterations": 4}),
    "dd1, llamagen": Case("llamagen", "distill", {"iterations": 4}),
    "adapt": Case("llamagen", "adapt", {"iterations": 5, "fit_iterations": 2}),
    "tune, store": Case("llamagen", "tune", {"iterations": 5, "head_iterations": 2, "source": "store"}),
    "tune, teacher": Case("var", "tune", {"iterations": 5, "head_iterations": 2, "source": "teacher"}),
    "match, kl": Case("digits", "match", KL),
    "match, sid": Case("var", "match", SID),
}
"""A few steps of each; phases that a stage has are all in them."""

WAYS = {
    1: {
        "dd1, digits": [Way(micro_batch=8)],
        "match, kl": [Way(micro_batch=4, recompute="blocks")],
    },
    2: {
        "dd1, digits": [Way("replicate"), Way("shard", 4)],
        "dd1, var": [Way("shard", 3, "blocks")],
        "adapt": [Way("shard", 4, teacher_too=True)],
        "tune, teacher": [Way("shard", 4, teacher_too=True)],
        "match, sid": [Way("shard", 0, "auto")],
    },
    4: {
        "dd1, digits": [Way("replicate", 3)],
        "dd1, llamagen": [Way("shard", 1, "blocks", nodes=2)],
        "tune, store": [Way("shard", 2)],
        "match, kl": [Way("shard", 3, nodes=2)],
        "match, sid": [Way("shard", 2, "blocks", nodes=2, teacher_too=True)],
    },
}
"""By the number of processes; a batch is of 16 samples (30, of the digits' DD1)."""


def planned(folder: Path, cases: dict[str, Case], ways: dict[str, list[Way]]) -> Plan:
    return [(cases[name], way, folder / name / str(number)) for name in ways for number, way in enumerate(ways[name])]


def in_processes(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    with launched(count, function, *arguments) as running:
        ended = running.ended(limit=1800, together=True)
    assert all(end.code == 0 for end in ended), "\n".join(f"{end.code}: {end.errors}" for end in ended)
    return [(end.value, end.errors) for end in ended]


def in_two(folder: Path, plan: Plan) -> dict[str, Any]:
    with processes.together("cpu", TIMEOUT):
        train_all(plan)
        return resumptions(folder)


def in_four(folder: Path, plan: Plan) -> dict[str, Any]:
    with processes.together("cpu", TIMEOUT):
        train_all(plan)
        train(RESUMED, Way("shard", 1, nodes=2), copied(folder / "interrupted", folder / "by two, then four"))
        few = dataclasses.replace(RESUMED, settings={**RESUMED.settings, "batch_size": 3})
        return {"too few": refused(few, Way(), folder / "too few"), "writing": writing(folder)}


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """Everything that is trained; two launches of processes in all."""
    folder, threads = tmp_path_factory.mktemp("shared"), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        said: dict[str, Any] = {}
        train_all(planned(folder / "reference", CASES, {name: [Way()] for name in CASES}))
        train_all(planned(folder / "1", CASES, WAYS[1]))
        interrupt(Way(), folder / "by one")
        said["two"] = in_processes(2, in_two, folder, planned(folder / "2", CASES, WAYS[2]))
        said["four"] = in_processes(4, in_four, folder, planned(folder / "4", CASES, WAYS[4]))
        train(RESUMED, Way(), folder / "alone")
        train(RESUMED, Way(micro_batch=4), copied(folder / "interrupted", folder / "by two, then one"))
    finally:
        torch.set_num_threads(threads)
    return folder, said


def assert_alike(ours: Path, theirs: Path) -> None:
    """The same figures at every step, and the same files but for rounding."""
    for one, other in zip(figures(ours), figures(theirs), strict=True):
        assert one.keys() == other.keys() and one.pop("stage") == other.pop("stage")
        for name, value in one.items():
            near = pytest.approx(other[name], rel=RELATIVE, abs=CLOSE.get(name, 0.0))
            assert value == near, (ours, one["step"], name)
    assert_same_files(ours, theirs, exactly=False)


def assert_same_files(ours: Path, theirs: Path, *, exactly: bool) -> None:
    names = [name for name in (STUDENT, GUIDANCE) if (theirs / name).exists()]
    assert names and not [name for name in (STUDENT, GUIDANCE) if (ours / name).exists() != (name in names)]
    for name in names:
        with safe_open(ours / name, "pt") as one, safe_open(theirs / name, "pt") as other:
            own = dict.fromkeys(() if exactly else ("digests", "seal"))  # of numbers that differ by rounding
            assert {**one.metadata(), **own} == {**other.metadata(), **own}
        tensors, expected = load_file(ours / name), load_file(theirs / name)
        assert tensors.keys() == expected.keys()
        for key, value in tensors.items():
            assert (value.dtype, value.shape) == (expected[key].dtype, expected[key].shape)
            difference = (value - expected[key]).double()
            if key.endswith("qkv.bias") and not exactly:
                # A key's bias has no gradient but rounding, and AdamW moves by the sign of that as far as by any other.
                query, _, value_part = difference.chunk(3)
                difference = torch.cat((query, value_part))
            apart = float(difference.square().mean().sqrt())
            assert apart <= (0 if exactly else WEIGHTS), (ours, name, key)


QUICK = {"dd1, digits": [Way("shard", 4)], "match, kl": [Way("shard", 3, "blocks")]}


def test_two_processes_learn_what_one_does(tmp_path):
    """The least of what follows: both methods, by FSDP, micro-batches that do not divide, blocks computed again."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train_all(planned(tmp_path / "reference", CASES, {name: [Way()] for name in QUICK}))
    finally:
        torch.set_num_threads(threads)
    plan = planned(tmp_path / "2", CASES, QUICK)
    in_processes(2, train_all, plan)
    for _, _, out in plan:
        assert_alike(out, tmp_path / "reference" / out.parent.name / "0")


@pytest.mark.full
@pytest.mark.parametrize(
    ("count", "name", "number"),
    [(count, name, number) for count, ways in WAYS.items() for name in ways for number in range(len(ways[name]))],
)
def test_what_is_learnt_is_one_processs(done, count, name, number):
    folder, _ = done
    assert_alike(folder / str(count) / name / str(number), folder / "reference" / name / "0")


@pytest.mark.full
def test_files_have_live_and_averaged_weights_and_stacked_matrices_apart(done):
    """As the official layout has them, whichever process held which rows."""
    folder, _ = done
    tensors = load_file(folder / "4" / "dd1, llamagen" / "0" / STUDENT)
    averaged = {name for name in tensors if name.startswith("ema.")}
    assert {name.removeprefix("ema.") for name in averaged} == tensors.keys() - averaged
    assert {name.split(".")[-2] for name in tensors if "feed_forward" in name} == {"w1", "w2", "w3"}


@pytest.mark.full
def test_a_file_is_written_tensor_by_tensor(done):
    for said, _ in done[1]["four"]:
        assert said["writing"]["gathered"] > 20
        assert said["writing"]["most"] == 1


@pytest.mark.full
def test_resumed_by_as_many_it_is_the_same_run_bit_for_bit(done):
    """With the micro-batch that memory held at the start; what a killed process left goes."""
    folder, said = done
    assert_same_files(folder / "resumed", folder / "undisturbed", exactly=True)
    assert figures(folder / "resumed") == figures(folder / "undisturbed")
    assert [one["kept"] for one, _ in said["two"]] == [["matching-00000006", "matching-00000008"]] * 2
    assert not said["two"][0][0]["left"]


@pytest.mark.full
@pytest.mark.parametrize("folder", ["by one, then two", "by two, then one", "by two, then four", "undisturbed"])
def test_resumed_in_another_way_it_learns_the_same(done, folder):
    assert_alike(done[0] / folder, done[0] / "alone")


@pytest.mark.full
def test_a_damaged_checkpoint_gives_way_to_the_one_before(done, tmp_path, capsys):
    folder, said = done
    assert_same_files(folder / "flipped", folder / "undisturbed", exactly=True)
    errors = [errors for _, errors in said["two"]]
    assert errors[0].count("matching-00000008 is damaged (__0_0.distcp): the checkpoint before it is used") == 1
    assert "damaged" not in errors[1]
    ours = Path(shutil.copytree(folder / "by one", tmp_path / "cut"))
    cut(newest(ours))
    train(RESUMED, Way(), ours)
    assert "is damaged (state.json" in capsys.readouterr().err
    assert_alike(ours, folder / "alone")


@pytest.mark.full
def test_what_cannot_go_on_is_one_clear_line(done):
    _, said = done
    two, four = ([one for one, _ in said[count]] for count in ("two", "four"))
    for one in two:
        assert "no checkpoint in" in one["hopeless"] and "is whole; delete the folder" in one["hopeless"]
        assert "belongs to a run with other settings" in one["other settings"]
    for one in four:
        assert one["too few"] == "matching: batch_size 3 is less than a sample for each of 4 processes"
    assert not any("\n" in text for one in (*two, *four) for text in one.values() if isinstance(text, str))


LONG = {
    "dd1, digits": {"iterations": 50},
    "tune, teacher": {"iterations": 50, "head_iterations": 20},
    "match, kl": {"start_iterations": 12, "guidance_first": 6, "iterations": 10, "align_iterations": 4},
    "match, sid": {"start_iterations": 12, "guidance_first": 6, "iterations": 10, "align_iterations": 4},
}
LONG |= {name: {**LONG[name], "later_iterations": 4, "watch_every": 10} for name in ("match, kl", "match, sid")}
LONG_WAYS = {
    1: [Way(micro_batch=8), Way(micro_batch=4, recompute="blocks")],
    2: [Way("replicate", 4), Way("shard", 2, "blocks", teacher_too=True)],
    4: [Way("replicate", 1, "blocks"), Way("shard", 3, nodes=2)],
}


@pytest.mark.full
def test_fifty_steps(tmp_path):
    cases = {
        name: dataclasses.replace(CASES[name], settings={**CASES[name].settings, **longer})
        for name, longer in LONG.items()
    }
    train_all(planned(tmp_path / "reference", cases, {name: [Way()] for name in cases}))
    for count, ways in LONG_WAYS.items():
        plan = planned(tmp_path / str(count), cases, dict.fromkeys(cases, ways))
        if count == 1:
            train_all(plan)
        else:
            in_processes(count, train_all, plan)
        for case, _, out in plan:
            reference = tmp_path / "reference" / out.parent.name / "0"
            assert len(figures(reference)) >= 50, case
            assert_alike(out, reference)
