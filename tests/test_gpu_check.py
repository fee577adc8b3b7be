"""`make gpu-check`: its steps, what it goes on with, and that the sanitizers get at clusters. No GPU is needed here."""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import gpu_check
import pytest
from gpu_check import RESUME, SANITIZED, STEPS, Step

ROOT = Path(__file__).parents[1]


def python(name: str, code: str, **more) -> Step:
    return Step(name=name, command=(sys.executable, "-c", code), **more)


def test_steps_are_short_and_the_risks_come_first():
    names = [step.name for step in STEPS]
    assert len({*names}) == len(names)
    assert all(step.limit <= 480 for step in STEPS)
    assert names[:2] == ["install", "risks"]
    assert max(names.index(name) for name in ("memcheck", "racecheck", "codes", "layers")) < names.index(
        "bench-flow_sample"
    )
    assert names.index("profile") == len(names) - 1
    assert "-x" not in STEPS[1].command  # a first run tells of all risks
    assert STEPS[0].needs == ("pip>=1", "setuptools>=77", "pybind11>=2", "cmake", "ninja") and STEPS[0].installs
    assert all(RESUME in step.command for step in STEPS if "--results" in step.command)


def test_a_step_that_fails_or_hangs_keeps_no_other_from_running(tmp_path, capsys):
    steps = [
        python("bad", "import sys; print('why'); sys.exit(3)"),
        python("slow", "import time; print('begun', flush=True); time.sleep(60)", limit=1),
        python("lacking", "1", needs=("no_such_package",)),
        python("good", "print('fine')"),
    ]
    path = tmp_path / "gpu-test.json"
    assert not gpu_check.check(path, (), "abc", steps)
    found = json.loads(path.read_text())["steps"]
    assert {name: step["code"] for name, step in found.items()} == {"bad": 3, "slow": "timeout", "good": 0}
    assert found["bad"]["tail"] == ["why"] and found["good"]["sources"] == "abc"
    shown = capsys.readouterr().out
    assert "left out: no no_such_package" in shown and "FAILED: slow (timeout)" in shown


def test_it_goes_on_where_it_stopped(tmp_path):
    mark = tmp_path / "mark"
    once = f"import pathlib; p = pathlib.Path({str(mark)!r}); p.write_text(p.read_text() + 'x' if p.exists() else 'x')"
    steps = [
        python("first", once),
        python("second", f"import pathlib; assert pathlib.Path({str(tmp_path / 'go')!r}).exists()"),
    ]
    path = tmp_path / "gpu-test.json"
    assert not gpu_check.check(path, (), "abc", steps)
    (tmp_path / "go").touch()
    assert gpu_check.check(path, (), "abc", steps)
    assert mark.read_text() == "x"
    assert gpu_check.check(path, ("first",), "abc", steps) and mark.read_text() == "xx"  # by its name: again
    assert gpu_check.check(path, (), "def", steps) and mark.read_text() == "xxx"  # other sources: again


def test_what_is_checked_is_known_by_its_contents(tmp_path):
    """Not by a commit: edits of a tree that was edited before, and trees without git, have none of their own."""
    fingerprint = gpu_check.fingerprint.__wrapped__
    for name in ("ddfast/ops/a.py", "kernels/a.cu", "csrc/a.cpp", "tests/ops/backends.py", "tests/ops/truth.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("one")
    seen = [fingerprint(tmp_path)]
    for name in ("ddfast/ops/a.py", "kernels/a.cu", "csrc/a.cpp", "tests/ops/backends.py", "tests/ops/truth.py"):
        for content in ("two", "three"):
            (tmp_path / name).write_text(content)
            seen.append(fingerprint(tmp_path))
    (tmp_path / "kernels/b.cu").write_text("new")
    seen.append(fingerprint(tmp_path))
    assert len({*seen}) == len(seen)
    for name in ("benchmarks/results/gpu.json", "kernels/__pycache__/a.pyc", "tests/ops/test_a.py", "docs/a.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("what nothing depends on")
    assert fingerprint(tmp_path) == seen[-1]
    files = {file for pattern in gpu_check.SOURCES for file in ROOT.glob(pattern)}
    assert {"ddfast", "kernels", "small.py", "official.py", "gpu_check.py", "setup.py"} <= {file.name for file in files}


def test_nothing_runs_after_a_failed_install(tmp_path, capsys):
    steps = [python("install", "import sys; sys.exit(1)", installs=True), python("next", "1")]
    path = tmp_path / "gpu-test.json"
    assert not gpu_check.check(path, (), "abc", steps)
    assert [*json.loads(path.read_text())["steps"]] == ["install"]
    assert "nothing else was run" in capsys.readouterr().out


def test_another_environment_installs_anew(tmp_path, monkeypatch):
    mark = tmp_path / "mark"
    steps = [python("install", f"open({str(mark)!r}, 'a').write('x')", installs=True)]
    for version, runs in (("1", 1), ("1", 1), ("0", 2)):
        monkeypatch.setattr(gpu_check, "_version", lambda _, version=version: version)
        assert gpu_check.check(tmp_path / "gpu-test.json", (), "abc", steps)
        assert len(mark.read_text()) == runs


def test_what_a_step_started_ends_with_it(tmp_path):
    """Also what its own children started: a kernel that hangs in one would hold the GPU while the next step runs."""
    child = "import os, time; open({file!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    parent = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep({seconds})"
    for name, seconds, limit in (("slow", 60, 3), ("quick", 2, 30)):
        file = tmp_path / name
        code = parent.format(child=child.format(file=str(file)), seconds=seconds)
        gpu_check.run(python(name, code, limit=limit), tmp_path / "gpu-test.json")
        for _ in range(100):
            state = Path(f"/proc/{file.read_text()}/stat")
            if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
                break
            time.sleep(0.05)
        else:
            raise AssertionError(f"{name}: still there")


def test_without_what_a_build_needs_steps_run_from_the_sources(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    told = "import os, ddfast, ddfast_kernels as k; print(*(os.path.realpath(m.__path__[0]) for m in (ddfast, k)))"
    steps = [
        python("install", "import sys; sys.exit(1)", needs=("no_such_package",), installs=True),
        python("next", told),
    ]
    path = tmp_path / "gpu-test.json"
    assert gpu_check.check(path, (), "abc", steps)
    assert json.loads(path.read_text())["steps"]["next"]["tail"] == [f"{ROOT / 'ddfast'} {ROOT / 'kernels'}"]
    assert "Triton's kernels run from this folder" in capsys.readouterr().out
    # pip would take an egg-info here for an installed ddfast, and remove what it names.
    shown = python("install", "import os; print('PYTHONPATH' in os.environ)", installs=True)
    assert gpu_check.run(shown, path)["tail"] == ["False"]


def test_an_old_package_is_missing(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/pip" if name == "pip" else None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name != "cmake" else None)
    monkeypatch.setattr(gpu_check, "_version", lambda name: {"setuptools": "76.1", "pybind11": "3.0"}.get(name, "0"))
    assert gpu_check.missing(STEPS[0].needs) == ["pip>=1", "setuptools>=77", "cmake"]  # another Python's pip


def test_an_unknown_step_is_an_error():
    with pytest.raises(SystemExit, match="STEPS: got nonsense, expected some of install risks"):
        gpu_check.wanted(("nonsense",), ())


def test_sanitizers_run_clusters_staged_codes_and_the_second_launch():
    """The names that `-k` selects, and that their sizes are those at which these things happen."""
    sys.path.insert(0, str(ROOT / "tests" / "gpu"))
    try:
        import test_risks
    finally:
        sys.path.pop(0)
    for tool in ("memcheck", "racecheck", "synccheck"):
        (step,) = [step for step in STEPS if step.name == tool]
        assert "tests/gpu/test_risks.py" in step.command and step.command[-2:] == ("-k", SANITIZED)
    chosen = [name for name in dir(test_risks) if name.startswith("test_") and SANITIZED in name]
    assert {"test_cluster_sampling", "test_cluster_filtering", "test_cluster_nearest", "test_cluster_draw"} <= {*chosen}


def test_kernels_and_benchmarks_need_nothing_but_pytorch_triton_pytest_and_numpy(tmp_path):
    """Everything else is kept from being imported, also from pytest."""
    others = (
        "tyro", "nvtx", "tomli_w", "tomli", "einops", "safetensors", "tqdm", "PIL", "matplotlib", "sklearn", "scipy",
        "hypothesis", "pytest_benchmark", "xdist", "huggingface_hub",
    )  # fmt: skip
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {others!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "DDFAST_CACHE": str(tmp_path),
    }
    for arguments in (
        ["tests/gpu/test_risks.py", "tests/gpu/test_ops.py", "--collect-only"],
        ["benchmarks/test_gpu_kernels.py", "--collect-only", "--results", str(tmp_path / "x.json")],
    ):
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "-o",
            "addopts=--import-mode=importlib",
            "-q",
        ]
        done = subprocess.run([*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    done = subprocess.run(
        [sys.executable, "-c", gpu_check._DOCTOR], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "flow_sample" in done.stdout, done.stderr


def test_results_are_appended_one_benchmark_at_a_time(tmp_path):
    """Also by the stand-in for pytest-benchmark, so that a step that is ended early has kept what it measured."""
    (tmp_path / "test_example.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('n', [1, 2])\n"
        "def test_one(benchmark, n):\n"
        "    benchmark.extra_info.update(op='noise', providers={'cuda': {'median_ms': n}})\n"
        "    assert benchmark.pedantic(lambda: n) == n\n"
    )
    results = tmp_path / "gpu-test.json"
    results.write_text(json.dumps({"steps": {"risks": {"code": 0}}, "benchmarks": [{"name": "test_one[1]"}]}))
    for plugins in (["-p", "no:benchmark"], []):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *plugins]
        command += [
            "-c",
            os.devnull,
            "--rootdir",
            str(tmp_path),
            "-p",
            "conftest",
            "--results",
            str(results),
            str(tmp_path),
        ]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "benchmarks"), *filter(None, sys.path)])}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        if not plugins:
            assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(results.read_text())
    assert found["steps"] == {"risks": {"code": 0}}
    assert [entry["name"] for entry in found["benchmarks"]] == ["test_one[1]", "test_one[2]"]
    assert found["benchmarks"][1]["extra_info"]["providers"]["cuda"]["median_ms"] == 2


def test_a_step_of_benchmarks_goes_on_with_those_that_have_not_passed(tmp_path):
    (tmp_path / "test_example.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('n', [1, 2, 3])\n"
        "def test_one(benchmark, n):\n"
        "    benchmark.extra_info.update(n=n)\n"
        "    assert n != 3\n"
    )
    results = tmp_path / "gpu-test.json"
    others = [{"name": "test_one[1]", "sources": "others"}, {"name": "test_one[2]"}]
    results.write_text(json.dumps({"steps": {}, "benchmarks": others}))
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:benchmark", "-c", os.devnull, "-p", "conftest"]
    command = [sys.executable, "-m", "pytest", *options, "--rootdir", str(tmp_path), "--results", str(results)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "benchmarks"), *filter(None, sys.path)])}
    shown = []
    for more in ([RESUME], [RESUME], []):
        call = [*command, *more, str(tmp_path)]
        shown.append(subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True).stdout)
    assert "1 failed, 2 passed" in shown[0]
    assert "1 failed, 2 skipped" in shown[1]
    assert "1 failed, 2 passed" in shown[2]  # a step that is named runs all of it


def test_a_named_step_measures_anew(tmp_path):
    steps = [python("bench", "import sys; print(sys.argv[1:])")]
    steps = [Step(name="bench", command=(*steps[0].command, RESUME))]
    path = tmp_path / "gpu-test.json"
    for named, arguments in (((), f"['{RESUME}']"), (("bench",), "[]")):
        assert gpu_check.check(path, named, "abc", steps)
        assert json.loads(path.read_text())["steps"]["bench"]["tail"] == [arguments]
