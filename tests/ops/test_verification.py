"""The process that verifies kernels, whatever becomes of it; what is remembered; and that a wrong kernel is found."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from backends import backends_of

from ddfast import env, messages, ops
from ddfast.errors import DDFastError
from ddfast.ops import checks, findings, verification
from ddfast.ops.findings import Check, Verdict

GPU = torch.device("cuda", 0)
CHECKS = [Check(op, "cuda", torch.float32, 0) for op in ("noise", "activate", "add_norm")]


def child(tmp_path: Path, body: str) -> list[str]:
    """A process in the place of ddfast.ops.checks: `tell(...)` prints an event, `wanted` is what is asked."""
    head = """
        import json, os, sys, time
        wanted = json.loads(sys.argv[1])
        def tell(**event):
            print(json.dumps(event), flush=True)
    """
    script = tmp_path / "child.py"
    script.write_text(textwrap.dedent(head) + textwrap.dedent(body))
    return [sys.executable, str(script)]


def test_a_real_child():
    """What raises is wrong, and the rest is verified in the same process."""
    wanted = [Check("noise", "nowhere", torch.float32, 0), Check("activate", "reference", torch.bfloat16, 0)]
    wanted += [Check("noise", "cpu", torch.float32, 0)] * ("cpu" in backends_of("noise"))
    first, *others = verification.run(wanted, None).values()
    assert not first.passed and first.final and "ValueError: backend: got 'nowhere'" in first.text
    assert others == [Verdict(True, "verified on this GPU")] * (len(wanted) - 1)


def test_a_death_takes_one_kernel_with_it(tmp_path):
    """As an illegal access does, or a trap; the rest goes to a second process."""
    command = child(tmp_path, """
        tell(ready=True)
        for i, check in enumerate(wanted["checks"]):
            tell(begins=i)
            if check[0] == "activate":
                os.abort()
            tell(ends=i)
    """)  # fmt: skip
    verdicts = verification.run(CHECKS, 0, command)
    assert [verdict.passed for verdict in verdicts.values()] == [True, False, True]
    assert verdicts[CHECKS[1]] == Verdict(False, "its process ended with signal 6")


def test_a_device_with_an_error_in_it_is_left(tmp_path):
    command = child(tmp_path, """
        tell(ready=True); tell(begins=0); tell(ends=0, wrong="CUDA error: an illegal memory access")
        sys.exit(3)
    """)  # fmt: skip
    verdicts = verification.run(CHECKS, 0, command)
    assert [verdict.text for verdict in verdicts.values()] == ["CUDA error: an illegal memory access"] * 3


def test_a_kernel_that_hangs_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(verification, "TIMEOUT", 1.5)
    command = child(tmp_path, """
        tell(ready=True); tell(begins=0)
        if wanted["checks"][0][0] == "noise":
            time.sleep(60)
        tell(ends=0)
    """)  # fmt: skip
    verdicts = verification.run(CHECKS[:2], 0, command)
    assert verdicts[CHECKS[0]] == Verdict(False, "it took longer than 2 s", final=True, kept=False)
    assert verdicts[CHECKS[1]].passed


@pytest.mark.parametrize("name", ["KILL", "TERM", "INT", "HUP", "SEGV", "ABRT", "BUS", "ILL", "FPE"])
def test_who_ends_the_process_says_nothing_of_the_kernel(tmp_path, name):
    """The kernel of Linux for want of memory, a scheduler, Ctrl-C; a crash is the kernel's."""
    number = getattr(signal, f"SIG{name}")
    command = child(tmp_path, f"tell(ready=True); tell(begins=0); os.kill(os.getpid(), {int(number)}); time.sleep(60)")
    crashed = name in ("SEGV", "ABRT", "BUS", "ILL", "FPE")
    expected = Verdict(False, f"its process ended with signal {int(number)}", final=crashed, kept=crashed)
    assert verification.run(CHECKS[:1], 0, command) == {CHECKS[0]: expected}


OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2 GiB"


@pytest.mark.parametrize(
    ("error", "told", "left"),
    [
        (checks.Wrong("codes differ"), "wrong", False),
        (ValueError("backend: 'cuda' cannot run it"), "wrong", False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "wrong", True),
        (RuntimeError("flow_sample: cudaErrorIllegalAddress, an illegal memory access"), "wrong", True),
        (RuntimeError("Triton Error [HIP]: invalid device function"), "wrong", True),
        (RuntimeError("noise: cudaErrorLaunchOutOfResources, too many resources requested"), "wrong", True),
        (torch.OutOfMemoryError(OUT_OF_MEMORY), "unknown", True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "unknown", True),
        (RuntimeError("draw_codes: cudaErrorMemoryAllocation"), "unknown", True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "unknown", True),
        (MemoryError(), "unknown", False),
        (OSError(28, "No space left on device"), "unknown", False),
        (OSError(30, "Read-only file system", "/var/cache/triton"), "unknown", False),
        (subprocess.CalledProcessError(1, ["gcc"]), "unknown", False),
    ],
    ids=str,
)
def test_what_is_the_kernels_fault(monkeypatch, capsys, error, told, left):
    """What passes is not kept; what CUDA says ends the process."""

    def solve(check: Check, device: torch.device) -> None:
        if check.op == "noise":
            raise error

    monkeypatch.setattr(checks, "solve", solve)
    wanted = [[check.op, check.backend, str(check.dtype), check.dim] for check in CHECKS[:2]]
    assert checks.main(json.dumps({"index": None, "checks": wanted})) == (checks.LEFT if left else 0)
    ends = [event for event in map(json.loads, capsys.readouterr().out.splitlines()) if "ends" in event]
    assert told in ends[0] and len(ends[0]) == 2
    assert ends[1:] == ([] if left else [{"ends": 1}])


def test_a_users_folder_does_not_stand_in_for_modules(tmp_path, monkeypatch):
    """A queue.py or torch/ where the user stands; what this process would find there the child finds too."""
    for name in ("queue.py", "torch.py", "json.py"):
        (tmp_path / name).write_text("raise RuntimeError('not this one')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    wanted = Check("activate", "reference", torch.float32, 0)
    assert verification.run([wanted], None) == {wanted: Verdict(True, "verified on this GPU")}
    monkeypatch.setattr(sys, "path", [*sys.path, "", Path("no name")])
    assert env.of_a_verifier()["PYTHONPATH"].split(os.pathsep)[-1] == str(tmp_path)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("raise RuntimeError('CUDA: no driver')", "exit code 1 before a kernel ran (RuntimeError: CUDA: no driver)"),
        (
            "raise RuntimeError('all CUDA-capable devices are busy or unavailable' + chr(10) + 'Compile with DSA.')",
            "(RuntimeError: all CUDA-capable devices are busy or unavailable): in exclusive compute mode",
        ),
        ("tell(ready=True)", "exit code 0 before a kernel ran"),
        ("print('not ours'); print('[1]'); os.kill(os.getpid(), 9)", "signal 9 before a kernel ran"),
    ],
)
def test_a_child_that_cannot_run_says_nothing_of_the_kernels(tmp_path, body, text):
    verdicts = verification.run(CHECKS, 0, child(tmp_path, body))
    assert all(not v.passed and not v.final and text in v.text for v in verdicts.values()), verdicts


def test_a_verdict_tells_of_tiles(tmp_path):
    command = child(tmp_path, "tell(ready=True); tell(begins=0); tell(ends=0, remarks=['a tile of 16 x 16'])")
    assert verification.run(CHECKS[:1], 0, command) == {
        CHECKS[0]: Verdict(True, "verified on this GPU; a tile of 16 x 16")
    }


def test_no_memory_says_nothing_of_the_kernels(tmp_path):
    command = child(tmp_path, "tell(ready=True); tell(begins=0); tell(ends=0, unknown='no memory'); sys.exit(3)")
    assert verification.run(CHECKS[:1], 0, command) == {CHECKS[0]: Verdict(False, "no memory", final=False)}


def test_no_python_to_start(monkeypatch):
    (verdict,) = verification.run(CHECKS[:1], 0, ["/no/such/python"]).values()
    assert not verdict.final and "no process could be started" in verdict.text

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    (verdict,) = verification.run(CHECKS[:1], 0).values()
    assert not verdict.final and "no process could be started" in verdict.text


def test_the_child_is_no_rank_and_finds_what_this_process_finds(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("DDFAST_BACKEND", "reference")
    monkeypatch.setattr(sys, "path", [*sys.path, "/somewhere"])
    command = child(tmp_path, """
        seen = [os.environ.get(name) for name in ("RANK", "DDFAST_BACKEND", "DDFAST_VERIFY")]
        tell(ready=True); tell(begins=0)
        tell(ends=0, wrong=repr((seen, "/somewhere" in sys.path, wanted["index"])))
    """)  # fmt: skip
    (verdict,) = verification.run(CHECKS[:1], 5, command).values()
    assert verdict.text == "([None, None, '0'], True, 5)"


@pytest.fixture
def folder(monkeypatch, tmp_path) -> Path:
    """ddfast's cache, with a GPU that is not there."""
    monkeypatch.setenv("DDFAST_CACHE", str(tmp_path))
    monkeypatch.setattr(findings, "_read", {})
    monkeypatch.setattr(findings, "identity", lambda index: {"gpu": "Test GPU", "index": index})
    monkeypatch.setattr(verification, "_undecided", {})
    monkeypatch.setattr(verification, "_told", set())
    messages.warn_once.cache_clear()
    return tmp_path


def add(name: str) -> None:
    findings.add(GPU, "verdicts", {name: [True, "verified"]})


def test_findings_are_kept_per_machine(folder, monkeypatch):
    add("one")
    monkeypatch.setattr(findings, "_read", {})
    add("two")
    assert {*findings.of(GPU)["verdicts"]} == {"one", "two"}
    assert not findings.of(torch.device("cuda", 1))["verdicts"]
    for number in range(findings._KEPT + 3):
        findings.add(torch.device("cuda", number + 2), "verdicts", {"x": [True, ""]})
    machines = json.loads((folder / findings.FILE).read_text())["machines"]
    assert len(machines) == findings._KEPT and findings.machine_key(0) not in machines


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "null", '{"format": 1}', '{"format": 1, "machines": [3]}', '{"format": 99, "machines": {}}',
        '{"format": 1, "machines": {"KEY": 7}}', '{"format": 1, "machines": {"KEY": {"verdicts": {"one": []}}}}',
        '{"format": 1, "machines": {"KEY": {"orders": {"one": {"order": ["cuda"]}}}}}', "\x00\xff",
    ],
)  # fmt: skip
def test_a_damaged_file_is_done_without(folder, content, capsys):
    (folder / findings.FILE).write_text(content.replace("KEY", findings.machine_key(0)), encoding="latin-1")
    for _ in range(2):
        assert findings.of(GPU, again=True) == {"verdicts": {}, "orders": {}}
    assert capsys.readouterr().err.count("cannot be used") == (0 if "99" in content else 1)
    add("one")
    findings._read.clear()
    assert findings.of(GPU)["verdicts"] == {"one": [True, "verified"]}


def test_a_folder_that_cannot_be_written_is_done_without(folder, monkeypatch, capsys):
    (folder / "file").write_text("")
    monkeypatch.setenv("DDFAST_CACHE", str(folder / "file" / "below"))
    with findings.locked():
        add("one")
        add("two")
    assert {*findings.of(GPU)["verdicts"]} == {"one", "two"}
    assert capsys.readouterr().err.count("is found anew by every process") == 1


def test_processes_add_to_each_others_findings(folder):
    """What several find at once is all there in the end: each waits for the lock."""
    script = textwrap.dedent("""
        import sys, torch
        from ddfast.ops import findings
        findings.identity = lambda index: {"gpu": "Test GPU", "index": index}
        for number in range(10):
            with findings.locked():
                findings.add(torch.device("cuda", 0), "verdicts", {f"{sys.argv[1]} {number}": [True, ""]})
    """)
    running = [subprocess.Popen([sys.executable, "-c", script, str(number)]) for number in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert len(findings.of(GPU, again=True)["verdicts"]) == 20


def test_one_process_verifies_for_the_others(folder, monkeypatch):
    """The one that waited for the lock finds the verdict there."""
    runs = []

    def run(wanted: list[Check], index: int) -> dict[Check, Verdict]:
        runs.append(wanted)
        return dict.fromkeys(wanted, Verdict(True, "verified on this GPU"))

    monkeypatch.setattr(verification, "run", run)
    verification.verify(CHECKS, GPU)
    monkeypatch.setattr(findings, "_read", {})  # as in another process
    findings.of(GPU)["verdicts"].clear()  # which looked before the first one had written
    verification.verify(CHECKS, GPU)
    assert len(runs) == 1
    assert verification.known(CHECKS[0], GPU) == Verdict(True, "verified on this GPU")


@pytest.fixture
def twins(folder, monkeypatch) -> SimpleNamespace:
    """Two GPUs of one model; `verdicts` is what is found out on either, and `now` the time."""
    stand_in = SimpleNamespace(verdicts={}, runs=[], now=0.0)

    def run(wanted: list[Check], index: int) -> dict[Check, Verdict]:
        stand_in.runs.append(index)
        return dict.fromkeys(wanted, stand_in.verdicts[index])

    monkeypatch.setattr(findings, "identity", lambda index: {"gpu": "Test GPU"})
    monkeypatch.setattr(verification, "run", run)
    monkeypatch.setattr(verification.time, "monotonic", lambda: stand_in.now)
    return stand_in


def test_what_passes_is_of_one_gpu_and_asked_again(twins, capsys):
    other = torch.device("cuda", 1)
    twins.verdicts = {0: Verdict(False, "no memory", final=False), 1: Verdict(True, "verified on this GPU")}
    for now, runs in ((0, 1), (299, 1), (301, 2), (899, 2), (902, 3)):
        twins.now = now
        if verification.known(CHECKS[0], GPU) is None:
            verification.verify(CHECKS[:1], GPU)
        assert verification.known(CHECKS[0], GPU) == twins.verdicts[0]
        assert len(twins.runs) == runs
    assert capsys.readouterr().err.count("could not be verified") == 1
    assert verification.known(CHECKS[0], other) is None
    verification.verify(CHECKS[:1], other)
    assert verification.known(CHECKS[0], other) == verification.known(CHECKS[0], GPU) == twins.verdicts[1]


def test_a_kernel_that_took_too_long_does_not_run_in_this_process(twins, monkeypatch, capsys):
    twins.verdicts = {0: Verdict(False, "it took longer than 120 s", kept=False)}
    verification.verify(CHECKS[:1], GPU)
    twins.now = 1e6
    assert verification.known(CHECKS[0], GPU) == twins.verdicts[0]
    assert "not right on this GPU" in capsys.readouterr().err
    assert not findings.of(GPU, again=True)["verdicts"]


def test_every_process_tells_once_what_is_not_right(twins, monkeypatch, capsys):
    """By whichever process it was found."""
    twins.verdicts = {0: Verdict(False, "codes differ")}
    verification.verify(CHECKS[:1], GPU)
    for _ in range(2):
        for _ in range(2):
            assert verification.known(CHECKS[0], GPU) == twins.verdicts[0]
        assert capsys.readouterr().err.count("not right on this GPU") == 1
        monkeypatch.setattr(findings, "_read", {})  # as in another process
        monkeypatch.setattr(verification, "_told", set())


def test_a_user_without_a_home(monkeypatch):
    """As containers have them: HOME is unset, and the uid has no entry in passwd."""

    def nobody(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", nobody)
    monkeypatch.setattr(Path, "home", lambda: nobody(Path()))
    monkeypatch.delenv("DDFAST_CACHE", raising=False)
    assert env.cache_dir().parent == Path(tempfile.gettempdir())
    assert env.cache_dir().name.startswith("ddfast-")
    monkeypatch.setenv("DDFAST_CACHE", "~/ddfast")
    with pytest.raises(DDFastError, match="DDFAST_CACHE is '~/ddfast'"):
        env.cache_dir()


def test_the_identity_tells_kernels_and_versions_apart(monkeypatch):
    properties = SimpleNamespace(name="Test GPU", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    for cached in (findings.identity, findings.kernels_hash):
        cached.cache_clear()
    first = findings.identity(0)
    assert {"gpu", "capability", "driver", "torch", "triton", "ddfast", "kernels"} <= {*first}
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: real(self) + (b"#" if self.name == "noise.py" else b""))
    for cached in (findings.identity, findings.kernels_hash):
        cached.cache_clear()
    second = findings.identity(0)
    assert first.pop("kernels") != second.pop("kernels") and first == second
    monkeypatch.undo()
    for cached in (findings.identity, findings.kernels_hash):
        cached.cache_clear()


def slightly_wrong(value: object) -> object:
    """A kernel's result in which one row is not the reference's."""
    if isinstance(value, tuple):
        return tuple(slightly_wrong(part) for part in value)
    assert isinstance(value, torch.Tensor)
    if value.dtype == torch.int64:
        return value.roll(1, -1)
    wrong = value.clone()
    finite = wrong[..., -1].isfinite()
    wrong[..., -1][finite] += 0.3
    return wrong


def unwritten(value: object) -> object:
    """One in which a row was never written."""
    if isinstance(value, tuple):
        return tuple(unwritten(part) for part in value)
    assert isinstance(value, torch.Tensor)
    wrong = value.clone()
    wrong[-4 if value.dtype == torch.int64 else -1 :] = -7 if value.dtype == torch.int64 else torch.nan
    return wrong


@pytest.mark.parametrize("damage", [slightly_wrong, unwritten])
@pytest.mark.parametrize("op", sorted(checks.PROBLEMS))
def test_a_wrong_kernel_is_found(monkeypatch, op, damage):
    kernel = getattr(ops, op)

    def damaged(*arguments, backend: str, **settings):
        result = kernel(*arguments, backend="reference", **settings)
        return result if backend == "reference" else damage(result)

    monkeypatch.setattr(checks, "ops", SimpleNamespace(**{**vars(ops), op: damaged}))
    dim = 64 if op in ("decode_attention", "append_normed") else 8
    check = Check(op, "cuda", torch.float32, dim)
    with pytest.raises(checks.Wrong):
        checks.solve(check, torch.device("cpu"), 32)


def test_an_op_without_a_problem_is_not_right():
    with pytest.raises(checks.Wrong, match="has no problem"):
        checks.solve(Check("scale_shift", "cuda", torch.float32, 0), torch.device("cpu"))


@pytest.mark.parametrize("dim", [8, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factor", [0.0, 2.0, 1.1])
def test_a_wrong_gradient_is_found(monkeypatch, factor, dtype, dim):
    """Of a kernel whose forward is right."""

    class Damaged(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, grad):
            return factor * grad

    def damaged(x, *arguments, backend: str):
        x = x if backend == "reference" else Damaged.apply(x)
        return ops.codebook_posterior(x, *arguments, backend="reference")

    monkeypatch.setattr(checks, "ops", SimpleNamespace(**{**vars(ops), "codebook_posterior": damaged}))
    with pytest.raises(checks.Wrong, match="gradient"):
        checks.solve(Check("codebook_posterior", "cuda", dtype, dim), torch.device("cpu"), 32)


@pytest.mark.parametrize("dim", [8, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_right_gradients_pass(dtype, dim):
    """Interpreted kernels too, whose products are not those of tensor cores but rounded as theirs are."""
    for name in backends_of("codebook_posterior"):
        checks.solve(Check("codebook_posterior", name, dtype, dim), torch.device("cpu"), 1 if name == "cpu" else 32)


@pytest.mark.parametrize("op", sorted({*checks.PROBLEMS} - {"noise"}))
def test_float32_is_exact_enough(op):
    """The definitions themselves in float32: a kernel that is as good as PyTorch is not called wrong."""
    dim = {"decode_attention": 64, "append_normed": 32}.get(op, 8)
    checks.solve(Check(op, "reference", torch.float32, dim), torch.device("cpu"), 1 if op == "activate" else 8)


def test_activate_has_room_for_approximations(monkeypatch):
    """Exponential and quotient of a GPU are off by two units each: 2^-22 of their size."""

    def activate(x, times=None, *, kind: str, backend: str):
        if backend == "reference":
            return ops.activate(x, times, kind=kind, backend="reference")
        slope = 1.0 if kind == "silu" else 2 * (2 / torch.pi) ** 0.5
        fall = -slope * x * (1 if kind == "silu" else 1 + 0.044715 * x * x)
        y = x / (1 + fall.exp() * (1 + 2**-22)) * (1 - 2**-22)
        return y if times is None else y * times

    monkeypatch.setattr(checks, "ops", SimpleNamespace(**{**vars(ops), "activate": activate}))
    checks.solve(Check("activate", "triton", torch.float32, 0), torch.device("cpu"))


@pytest.mark.parametrize("op", sorted(checks.PROBLEMS))
def test_the_kernels_here_solve_the_problems(op):
    """Without a GPU those of the CPU, or interpreted ones: problems that they cannot solve would let nothing run."""
    names = [name for name in backends_of(op) if name != "reference"]
    if not names:
        pytest.skip("no kernel runs here")
    dim = {"decode_attention": 64, "append_normed": 32}.get(op, 8)
    checks.solve(Check(op, names[0], torch.bfloat16, dim), torch.device("cpu"), 32 if names[0] == "cpu" else 128)
