"""What `ddfast tune` records, times and remembers."""

from types import SimpleNamespace

import pytest
import torch
from backends import backends_of
from machine import Machine, machine_of
from official import llamagen_teacher_like, var_teacher_like
from small import build

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


def test_tune_needs_a_gpu(capsys):
    from ddfast.tune import main

    assert main(["--recipe", "digits", "--device", "cpu"]) == 1
    assert "tune compares kernels on a GPU: give --device cuda" in capsys.readouterr().err
    assert native.DTYPE_CODES  # as nothing was changed
