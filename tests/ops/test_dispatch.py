"""Which backend runs an op: on a CPU, on a GPU whose kernels are right, wrong, or not known, and as it is asked for."""

import timeit

import pytest
import torch
from machine import Machine, machine_of

from ddfast import env, ops
from ddfast.ops import checks, dispatch, findings, native, verification
from ddfast.ops.findings import Verdict

GPU = torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch, tmp_path) -> Machine:
    return machine_of(monkeypatch, tmp_path)


def chosen(op: str, *arguments, **more) -> str:
    return dispatch.choose(op, GPU, torch.float32, *arguments, **more).backend


def test_every_op_of_a_gpu_has_a_reason_for_its_order_and_a_problem():
    of_a_gpu = {op for op, kernels in dispatch.KERNELS.items() if {*kernels} & {"cuda", "triton"}}
    assert {*dispatch.GPU_ORDER} == of_a_gpu == {*checks.PROBLEMS}


def test_what_is_right_runs_by_itself(machine):
    for op, kernels in dispatch.KERNELS.items():
        first = next(name for name in kernels if name != "cpu")
        choice = dispatch.choose(op, GPU, torch.bfloat16, dim=8)
        assert choice == (first, dispatch.GPU_ORDER[op], "verified on this GPU")
    with pytest.raises(ValueError, match="'cpu' cannot run flow_sample: the tensors are on cuda"):
        chosen("flow_sample", "cpu")
    assert "no kernel for float64" in dispatch.choose("flow_sample", GPU, torch.float64).reason


def test_one_process_verifies_what_will_be_asked_for_next(machine):
    for op in dispatch.KERNELS:
        dispatch.choose(op, GPU, torch.float32, dim=8 if op in dispatch._CODE_DIM else 0)
    assert len(machine.runs) <= 3  # of codes, of heads, of neither
    assert {check.op for run in machine.runs for check in run} == {*dispatch.KERNELS}
    count = len(machine.runs)
    chosen("flow_sample", dim=8)
    assert len(machine.runs) == count
    chosen("flow_sample", dim=32)
    assert {check.dim for check in machine.runs[-1]} == {32}
    dispatch.prepare([("sample_codes", torch.float16, 16), ("activate", torch.float16, 0)], GPU)
    assert {check.op for check in machine.runs[-1]} == {"sample_codes", "activate"}
    count = len(machine.runs)
    dispatch.prepare([("sample_codes", torch.float16, 16), ("activate", torch.float16, 0)], GPU)
    assert len(machine.runs) == count


def test_what_is_wrong_makes_way_for_the_next(machine, capsys):
    machine.wrong["flow_sample", "cuda"] = Verdict(False, "16384 codes: 60 of 64 codes differ, 2 may")
    choice = dispatch.choose("flow_sample", GPU, torch.float32, dim=8)
    assert choice.backend == "triton"
    assert "cuda: 16384 codes: 60 of 64 codes differ" in choice.reason
    assert chosen("sample_codes", dim=8) == "cuda"
    machine.wrong["flow_sample", "triton"] = Verdict(False, "its process ended with signal 11")
    choice = dispatch.choose("flow_sample", GPU, torch.float32, dim=16)
    assert choice.backend == "reference" and "signal 11" in choice.reason
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(told) == 3 and all("not right on this GPU" in line for line in told)
    assert chosen("flow_sample", "cuda", dim=8) == "cuda"  # asked for by name


def test_verdicts_outlive_the_process(machine, monkeypatch):
    machine.wrong["noise", "cuda"] = Verdict(False, "7 numbers have other bits")
    assert chosen("noise") == "triton"
    monkeypatch.setattr(findings, "_read", {})
    dispatch.forget()
    machine.wrong.clear()
    count = len(machine.runs)
    assert chosen("noise") == "triton" and len(machine.runs) == count
    monkeypatch.setattr(findings, "identity", lambda index: {"gpu": "Another GPU"})
    dispatch.forget()
    assert chosen("noise") == "cuda"


def test_what_could_not_be_found_out_is_not_remembered(machine, monkeypatch, capsys):
    machine.wrong["noise", "cuda"] = Verdict(False, "exit code 1 before a kernel ran", final=False)
    assert chosen("noise") == "triton"
    assert "could not be verified" in capsys.readouterr().err
    count = len(machine.runs)
    assert chosen("noise") == "triton" and len(machine.runs) == count
    monkeypatch.setattr(findings, "_read", {})
    monkeypatch.setattr(verification, "_undecided", {})
    dispatch.forget()
    machine.wrong.clear()
    assert chosen("noise") == "cuda"


def test_what_decides_codes_does_not_change_within_a_process(machine, monkeypatch):
    """A GPU that had no memory left for verifying is asked again later; a store's codes come from one kernel."""
    for op, backend in (("sample_codes", "cuda"), ("noise", "cuda")):
        machine.wrong[op, backend] = Verdict(False, "no memory", final=False)
    before = [chosen(op, dim=8) for op in ("sample_codes", "noise")]
    machine.wrong.clear()
    monkeypatch.setattr(verification, "_undecided", {})
    after = [chosen(op, dim=8) for op in ("sample_codes", "noise")]
    assert before == ["triton", "triton"] and after == ["triton", "cuda"]


def test_nothing_is_verified_while_a_graph_is_captured(machine, capsys):
    machine.capturing = True
    choice = dispatch.choose("noise", GPU, torch.float32)
    assert choice.backend == "reference" and "captured or compiled" in choice.reason
    assert not machine.runs and "Call the op once before" in capsys.readouterr().err
    machine.capturing = False
    assert chosen("noise") == "cuda"
    machine.capturing = True
    assert chosen("noise", rows=10**6) == "cuda"  # by the verdict that is stored


def test_what_is_asked_for_is_what_is_verified(machine, monkeypatch, tmp_path):
    """A kernel that was excluded, because it hangs perhaps, is not waited for."""
    for setting, first in (("reference", None), ("sample_codes=triton", None), ("triton", "triton"), ("", "cuda")):
        monkeypatch.setenv("DDFAST_BACKEND", setting)
        machine.runs.clear()
        monkeypatch.setattr(findings, "_read", {})
        monkeypatch.setenv("DDFAST_CACHE", str(tmp_path / f"cache {setting}"))
        dispatch.prepare([("sample_codes", torch.float32, 8)], GPU)
        assert [check.backend for run in machine.runs for check in run] == ([first] if first else [])


def test_a_users_op_without_a_problem_runs_by_name_only(machine, monkeypatch):
    monkeypatch.setitem(dispatch.KERNELS, "scale_shift", ("triton",))
    choice = dispatch.choose("scale_shift", GPU, torch.float32)
    assert choice.backend == "reference" and "no problem in ddfast.ops.checks" in choice.reason
    assert chosen("scale_shift", "triton") == "triton"
    chosen("noise")
    assert "scale_shift" not in {check.op for run in machine.runs for check in run}


def test_a_dimension_that_is_not_known_is_the_usual_one(machine):
    assert chosen("decode_attention") == "triton"
    assert {check.dim for run in machine.runs for check in run if check.op == "decode_attention"} == {64}


def test_what_was_timed_does_not_depend_on_who_asks_first(machine):
    entry = {"order": ["reference"], "reason": "", "rows": 128, "size": 0}
    chosen("add_norm")
    findings.add(GPU, "orders", {"add_norm float32 0 128 0": entry})
    findings.add(GPU, "orders", {"add_norm float32 0 64 0": {**entry, "order": ["triton"], "rows": 64}})
    for first, then in ((70, 120), (120, 70)):
        dispatch.forget()
        assert chosen("add_norm", rows=first) == chosen("add_norm", rows=then) == "triton"


def test_a_gpu_without_tensor_cores_has_no_norm_linear(machine, monkeypatch):
    monkeypatch.setattr(native, "multiplies_matrices", lambda _: False)
    choice = dispatch.choose("norm_linear", "cuda", torch.float16)
    assert choice.backend == "reference" and "made for tensor cores" in choice.reason
    assert dispatch.choose("add_norm", "cuda", torch.float16).backend == "triton"


def test_verification_can_be_left_out(machine, monkeypatch):
    monkeypatch.setenv("DDFAST_VERIFY", "0")
    choice = dispatch.choose("noise", GPU, torch.float32)
    assert choice.backend == "cuda" and "DDFAST_VERIFY=0" in choice.verdict and not machine.runs


def test_a_dimension_that_a_kernel_does_not_take_goes_to_the_next(machine):
    assert chosen("nearest_code", dim=64) == "cuda"
    assert chosen("nearest_code", dim=65) == "triton"
    with pytest.raises(ValueError, match="codes have 65 dimensions, it takes 64 at most"):
        chosen("nearest_code", "cuda", dim=65)


@pytest.mark.parametrize(
    ("setting", "op", "name"),
    [
        ("triton", "flow_sample", "triton"),
        ("cuda", "add_norm", "triton"),  # a preference: there is none in CUDA
        ("cpu", "flow_sample", "cuda"),
        ("triton,cuda", "flow_sample", "triton"),
        ("reference", "flow_sample", "reference"),
        ("cpu,reference", "flow_sample", "reference"),
        ("auto", "flow_sample", "cuda"),
        ("flow_sample=triton", "flow_sample", "triton"),
        ("flow_sample=cpu:triton", "flow_sample", "triton"),
        ("flow_sample=triton", "sample_codes", "cuda"),
        ("reference, flow_sample=cuda", "flow_sample", "cuda"),
        ("reference, flow_sample=auto", "flow_sample", "cuda"),
    ],
)
def test_a_name_for_all_ops_is_a_preference(machine, monkeypatch, setting, op, name):
    monkeypatch.setenv("DDFAST_BACKEND", setting)
    assert chosen(op, dim=8) == name


def test_a_preferred_kernel_must_be_right_too(machine, monkeypatch):
    monkeypatch.setenv("DDFAST_BACKEND", "triton")
    machine.wrong["flow_sample", "triton"] = Verdict(False, "3 codes differ")
    assert chosen("flow_sample", dim=8) == "cuda"
    monkeypatch.setenv("DDFAST_BACKEND", "flow_sample=triton")
    assert chosen("flow_sample", dim=8) == "triton"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("fast", "DDFAST_BACKEND: got 'fast', expected one of auto, reference"),
        ("noise=fast", "DDFAST_BACKEND: got 'fast'"),
        ("niose=cuda", "DDFAST_BACKEND: got the op 'niose', expected one of nearest_code"),
        ("add_norm=cuda", "'cuda' cannot run add_norm: this version of ddfast has no cuda kernel"),
        ("noise=cpu", "'cpu' cannot run noise: the tensors are on cuda"),
        ("noise=cpu:fast", "got 'fast'"),
    ],
)
def test_a_wrong_name_is_an_error(machine, monkeypatch, setting, message):
    monkeypatch.setenv("DDFAST_BACKEND", setting)
    with pytest.raises(ValueError, match=message):
        chosen(setting.split("=")[0] if setting.split("=")[0] in dispatch.KERNELS else "noise")


def test_the_interpreter_runs_by_name_only(machine, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert chosen("activate") == "reference" and chosen("noise") == "cuda"
    monkeypatch.setenv("DDFAST_BACKEND", "triton")
    assert chosen("activate") == "triton"


def test_the_cpu_by_name_and_without(monkeypatch):
    monkeypatch.delenv("DDFAST_BACKEND", raising=False)
    assert dispatch.choose("noise", "cuda", torch.float32).backend == "reference" or torch.cuda.is_available()
    if "cpu" in dispatch.available():
        monkeypatch.setenv("DDFAST_BACKEND", "triton" if not env.triton_interpreted() else "cuda")
        assert dispatch.choose("noise", "cpu", torch.float32).backend == "cpu"  # not an error: a preference
        x = torch.randn(3, 8)
        assert torch.equal(ops.nearest_code(x, x), torch.arange(3))
        monkeypatch.setenv("DDFAST_BACKEND", "reference")
        assert dispatch.choose("noise", "cpu", torch.float32).backend == "reference"
        assert dispatch.choose("noise", "cpu", torch.float32, "cpu").backend == "cpu"
    monkeypatch.delenv("DDFAST_BACKEND")
    monkeypatch.setattr(native, "cpu", None)
    monkeypatch.setattr(native, "cpu_reason", "not built")
    assert dispatch.choose("flow_sample", "cpu", torch.float32)[:2] == ("reference", "cpu: not built")
    with pytest.raises(ValueError, match="cannot run flow_sample: not built"):
        dispatch.choose("flow_sample", "cpu", torch.float32, "cpu")


def test_what_was_timed_decides(machine):
    def timed(order: list[str], rows: int, size: int) -> dict:
        return {"order": order, "reason": "fastest here", "rows": rows, "size": size}

    chosen("sample_codes", dim=8)
    findings.add(GPU, "orders", {
        "sample_codes float32 8 0 16384": timed(["triton", "cuda", "reference"], 0, 16384),
        "add_norm float32 0 64 1024": timed(["reference", "triton"], 64, 1024),
        "add_norm float32 0 65536 1024": timed(["triton", "reference"], 65536, 1024),
    })  # fmt: skip
    dispatch.forget()
    assert dispatch.choose("sample_codes", GPU, torch.float32, dim=8, size=16384)[:2] == ("triton", "fastest here")
    assert chosen("sample_codes", dim=32, size=4096) == "cuda"  # nothing like it was timed
    assert dispatch.choose("sample_codes", GPU, torch.bfloat16, dim=8, size=16384).backend == "cuda"
    for rows, backend in ((2, "reference"), (512, "reference"), (10**5, "triton")):
        assert chosen("add_norm", rows=rows, size=1024) == backend


def test_a_decision_is_cheap(machine):
    """2 us, of which this machine may be the slow one: a fifth of a launch."""

    def decide() -> None:
        dispatch.choose("sample_codes", GPU, torch.bfloat16, "auto", 64, dim=8, size=16384)

    decide()
    assert min(timeit.repeat(decide, number=2000, repeat=7)) / 2000 < 4e-6
