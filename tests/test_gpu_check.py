"""`make gpu-check`: its steps, what it goes on with, and that the sanitizers get at clusters. No GPU is needed here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_check
import pytest
from gpu_check import SANITIZED, STEPS, Step

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
    assert found["bad"]["tail"] == ["why"] and found["good"]["commit"] == "abc"
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
    assert gpu_check.check(path, (), "def", steps) and mark.read_text() == "xxx"  # of another commit: again


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
