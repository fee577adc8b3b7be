"""What `ddfast tune` records, times and remembers."""

from types import SimpleNamespace

import pytest
import torch
from backends import backends_of
from machine import Machine, machine_of
from official import llamagen_teacher_like, var_teacher_like
from small import build

from ddfast.errors import DDFastError
from ddfast.evaluation.workload import work
from ddfast.models.toy import ToyTeacher
from ddfast.ops import dispatch, findings, native, tuning
from ddfast.ops.findings import Verdict
from ddfast.ops.tuning import Call, Sizes

GPU = torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch, tmp_path) -> Machine:
    return machine_of(monkeypatch, tmp_path)


def transformer() -> torch.nn.Module:
    return build((1,) * 9, trained=True)[0]


def call(op: str, rows: int = 0, size: int = 4096, dim: int = 0) -> Call:
    sizes = Sizes(op=op, dtype=torch.float32, dim=dim, rows=rows, size=size)
    return Call(function=None, arguments=(rows,), sizes=sizes)


def test_work_asks_for_what_decoding_and_training_do(monkeypatch):
    monkeypatch.setenv("DDFAST_BACKEND", "auto")  # the CPU's shortcut decides without asking
    with tuning.recorded() as calls:
        work(ToyTeacher(), 3)
    asked = {made.sizes.op for made in calls}
    assert {"noise", "sample_codes", "draw_codes", "filter_logits", "nearest_code", "codebook_posterior"} <= asked
    names = [str(made.function) for made in calls]
    assert "ddfast.codebook_posterior_backward.default" in names
    assert len(calls) < 20  # one per shape, not one per step
    for made in calls:
        made.run("reference")
        assert made.sizes.rows == 0 or made.sizes.op not in dispatch.DECIDE_CODES


@pytest.mark.parametrize("make", [llamagen_teacher_like, var_teacher_like, transformer])
def test_what_a_decoding_recorded_can_be_called_again(monkeypatch, make):
    """Positions have gone on since, and tensors are of inference mode; caches are written to again."""
    monkeypatch.setenv("DDFAST_BACKEND", "auto")
    teacher = make()
    with tuning.recorded() as calls:
        work(teacher, 2)
    assert {"draw_codes", "sample_codes", "noise"} <= {made.sizes.op for made in calls}
    for made in calls:
        made.run("reference")
        made.run("cpu" if "cpu" in backends_of(made.sizes.op) else "reference")


def test_the_fastest_that_is_right_runs_from_then_on(machine):
    machine.wrong["draw_codes", "triton"] = Verdict(False, "codes differ")
    calls = [call("sample_codes", dim=8), call("sample_codes", dim=8), call("add_norm", 64), call("add_norm", 4096)]
    calls += [call("draw_codes"), call("noise", 64)]
    asked: list[tuple[str, list[str]]] = []

    def timed(made: Call, backends: list[str], device: torch.device, seconds: float) -> dict[str, float]:
        asked.append((made.sizes.op, list(backends)))
        assert seconds <= 20 / 5
        times = {"reference": 9.0, "cuda": 1.0, "triton": 0.8 if made.sizes.op == "sample_codes" else 0.95}
        if made.sizes.rows == 64 and made.sizes.op == "add_norm":
            times["reference"] = 0.1
        return {name: times[name] for name in backends}

    found = tuning.tune(calls, GPU, timed=timed)
    assert ("sample_codes", ["cuda", "triton", "reference"]) in asked
    assert "draw_codes" not in [op for op, _ in asked] or "cuda" in dispatch.KERNELS["draw_codes"]
    assert found["sample_codes float32 8 0 4096"]["order"] == ["triton", "cuda", "reference"]
    assert found["sample_codes float32 8 0 4096"]["ms"] == {"cuda": 2.0, "triton": 1.6, "reference": 18.0}
    assert found["noise float32 0 64 4096"]["order"] == ["cuda", "triton", "reference"]  # 5 % is no reason
    assert "less than 10% apart" in found["noise float32 0 64 4096"]["reason"]

    for _ in range(2):  # here, and in a process that reads it
        choice = dispatch.choose("sample_codes", GPU, torch.float32, rows=7, dim=8, size=4096)
        assert choice.backend == "triton" and "timed here by `ddfast tune`: triton 1600.0 us" in choice.reason
        by_rows = [dispatch.choose("add_norm", GPU, torch.float32, rows=rows, size=4096) for rows in (1, 80, 9000)]
        assert [choice.backend for choice in by_rows] == ["reference", "reference", "triton"]
        findings._read.clear()
        dispatch.forget()
    machine.wrong["sample_codes", "triton"] = Verdict(False, "codes differ")
    assert dispatch.choose("sample_codes", GPU, torch.float16, dim=8, size=4096).backend == "cuda"


def test_a_backend_that_decides_codes_is_one_for_all_batches(machine):
    """A sample's codes must not depend on the batch that it is decoded in."""
    calls = [call(op, size=size, dim=8) for op in sorted(dispatch.DECIDE_CODES) for size in (4096, 16384)]
    tuning.tune(calls, GPU, timed=lambda made, names, *_: dict(zip(names, (3.0, 2.0, 1.0), strict=False)))
    for op in dispatch.DECIDE_CODES:
        chosen = {dispatch.choose(op, GPU, torch.float32, rows=rows, dim=8, size=4096)[0] for rows in (1, 64, 10**6)}
        assert len(chosen) == 1


def test_every_candidate_meets_a_cold_cache_in_turn(monkeypatch):
    log: list[str] = []

    class Event:
        def __init__(self, **_):
            pass

        def record(self):
            log.append("event")

        def synchronize(self):
            pass

        def elapsed_time(self, _):
            return {"cuda": 1.0, "reference": 2.0}[log[-2]]

    real = torch.empty

    def flushed(*arguments, **settings):
        tensor = real(8)
        return SimpleNamespace(zero_=lambda: log.append("flush")) if settings.get("device") == GPU else tensor

    properties = SimpleNamespace(L2_cache_size=1 << 20)
    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", flushed)
    monkeypatch.setattr(tuning, "_replay", lambda made, name: lambda: log.append(name))
    found = tuning.milliseconds(call("noise"), ["cuda", "reference"], GPU, 0.0)
    assert found == {"cuda": 1.0, "reference": 2.0}
    assert log[:8] == ["flush", "event", "cuda", "event", "flush", "event", "reference", "event"]
    assert len(log) == 5 * 8  # five rounds at least, however little time there is


@pytest.fixture
def command(monkeypatch, machine):
    """`ddfast tune` on a GPU that is not there, and how many samples it works with."""
    from ddfast import tune

    worked = []
    monkeypatch.setattr(tune, "check_device", lambda _: None)
    monkeypatch.setattr(tune, "teacher_of", lambda _: None)
    monkeypatch.setattr(tune, "work", lambda _, samples: worked.append(samples))

    def run(*arguments, found=0):
        def tuned(calls, device, seconds):
            made = {f"noise float32 0 64 {number}": entry for number in range(found)}
            if made:
                findings.add(device, "orders", made)
            return made

        entry = {"order": ["cuda", "triton"], "reason": "timed", "rows": 64, "size": 4096}
        monkeypatch.setattr(tuning, "tune", tuned)
        return tune.main(["--recipe", "digits", "--device", "cuda:0", *arguments])

    run.worked = worked
    return run


def test_tune_times_one_sample_too(command):
    """Some kernels are for few rows only."""
    assert command("--samples", "64") == 0
    assert command.worked == [1, 64]
    assert command("--samples", "1") == 0
    assert command.worked == [1, 64, 1]


def test_tune_says_what_it_kept(command, capsys, monkeypatch):
    assert command(found=0) == 0
    shown = capsys.readouterr().out
    assert "nothing was timed" in shown and "kept in" not in shown
    assert command(found=2) == 0
    assert f"kept in {findings.path()}" in capsys.readouterr().out
    findings.path().unlink()

    def refuse(*_):
        raise DDFastError("the disk is full")

    with monkeypatch.context() as full:
        full.setattr(findings, "write_atomically", refuse)
        assert command(found=2) == 0
        assert "kept in" not in capsys.readouterr().out


def test_forgetting_orders_keeps_verdicts_and_other_gpus(command, capsys):
    other = torch.device("cuda", 1)
    assert command("--forget") == 0 and "0 orders forgotten" in capsys.readouterr().out
    assert not findings.path().exists()
    findings.add(GPU, "verdicts", {"noise cuda float32 0": [True, "verified on this GPU"]})
    findings.add(other, "orders", {"noise float32 0 1 1": {"order": ["triton"], "reason": "", "rows": 1, "size": 1}})
    command(found=3)
    assert len(findings.of(GPU)["orders"]) == 3
    command.worked.clear()
    capsys.readouterr()
    assert command("--forget") == 0
    assert "3 orders forgotten" in capsys.readouterr().out and not command.worked
    for _ in range(2):  # here, and in a process that reads the file
        assert findings.of(GPU) == {"verdicts": {"noise cuda float32 0": [True, "verified on this GPU"]}, "orders": {}}
        assert len(findings.of(other)["orders"]) == 1
        findings._read.clear()


def test_tune_needs_a_gpu(capsys):
    from ddfast.tune import main

    assert main(["--recipe", "digits", "--device", "cpu"]) == 1
    assert "tune compares kernels on a GPU: give --device cuda" in capsys.readouterr().err
    assert native.DTYPE_CODES  # as nothing was changed
