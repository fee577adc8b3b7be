"""The examples that people copy run."""

import doctest
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w
from commands import TINY, in_this_process, prepare
from launching import launch
from torch.distributed.run import parse_args

import ddfast
from ddfast import cli
from ddfast.cli import main
from ddfast.config import TrainConfig, update
from ddfast.models import families
from ddfast.models.converting import export_teacher
from ddfast.models.loading import untrained_teacher
from ddfast.ops import dispatch
from ddfast.recipes import get_recipe

ROOT = Path(__file__).parents[2]


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and text of a page's blocks of code."""
    return re.findall(r"```(python|sh)\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def here(command: str) -> None:
    name, *arguments = shlex.split(command)
    assert name == "ddfast"
    assert main(arguments) == 0, command


def execute(page: str, folder: Path, run: Callable[[str], None] = here) -> list[str]:
    """All Python of a page, one block after the other, and its commands; returns these.

    Blocks that begin with the name of a file are in that file, all of them, before anything runs.
    """
    files, names, commands = defaultdict(str), {"__name__": page}, []
    for _, code in blocks(page):
        if file := re.match(r"# (\w+\.py)\n", code):
            files[file[1]] += code
    for name, code in files.items():
        (folder / name).write_text(code)
    for language, code in blocks(page):
        if language == "python" and not re.match(r"# \w+\.py\n", code):
            exec(compile(code, page, "exec"), names)
        elif language == "sh":
            commands += code.strip().splitlines()
            for command in code.strip().splitlines():
                run(command)
    return commands


@pytest.mark.parametrize("page", ["README.md", "docs/adding-an-op.md"])
def test_pages(page, tmp_path, monkeypatch):
    monkeypatch.setattr(dispatch, "KERNELS", dict(dispatch.KERNELS))  # a page adds an op, for other tests there is none
    assert any(language == "python" for language, _ in blocks(page))
    assert not execute(page, tmp_path)


@pytest.mark.full
def test_a_teacher_of_ones_own_reaches_every_command(tmp_path, monkeypatch, restored_families):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    ran = execute("docs/adding-a-teacher.md", tmp_path)
    everything = {"train", "trajectories", "sample", "evaluate", "profile", "convert"}
    assert {command.split()[1] for command in ran} == everything
    assert not (tmp_path / "runs/gru/samples.png").exists()
    assert (tmp_path / "runs/gru-images/samples.png").exists()
    assert "samples.png" not in (tmp_path / "runs/gru/report.md").read_text()
    # A process that was not told to import the module does not, whatever a file says.
    environment = {**os.environ, "PYTHONPATH": str(Path(ddfast.__file__).parents[1])}
    for arguments in (["sample", "--student", "runs/gru"], ["sample", "--student", "shared/gru"]):
        command = [sys.executable, "-m", "ddfast", *arguments, "--format", "codes", "--to", "x"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 1
        assert "--import" in done.stderr
    told = [*command, "--import", "my_teacher"]
    done = subprocess.run(told, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def restored_families():
    """What a page registers is forgotten."""
    before = dict(families._FAMILIES)
    yield
    families._FAMILIES.clear()
    families._FAMILIES.update(before)
    sys.modules.pop("my_teacher", None)


SMALL = {
    "teacher": {"depth": 2, "num_classes": 2, "patch_nums": [1, 2]},
    "dd2": {
        "head_width": 16, "head_depth": 1,
        "tune": {"iterations": 2, "head_iterations": 1, "batch_size": 4},
        "match": {
            "iterations": 1, "guidance_updates": 1, "align_iterations": 1, "later_iterations": 1, "batch_size": 4,
        },
    },
    "trajectories": {"shard_size": 4},
    "evaluation": {"samples": 100, "batch_size": 100, "batch_sizes": [1]},
}  # fmt: skip
DIGITS = [
    *TINY, "--tokenizer.iterations=12", "--teacher.iterations=4", "--trajectories.count=50", "--dd1.iterations=3",
    "--dd1.batch-size=16", "--evaluation.samples=100", "--evaluation.batch-sizes", "1",
]  # fmt: skip
SMALL_TOKENIZER = {"num_codes": 16, "code_dim": 4, "channels": 32, "multipliers": [1, 1], "blocks": 1}


class Scaled:
    """The commands of a page about many GPUs, as they are but for sizes, and with two processes for any number.

    A training begins anew in each folder with one process, two, and two nodes, and with each way to share a process's
    work, once each; else it is found finished: settings of where and how do not make another run of it.
    """

    def __init__(self, cache: Path) -> None:
        self.cache, self.seen = cache, set()
        config = get_recipe("var-d16")
        update(config, {**SMALL, "tokenizer": SMALL_TOKENIZER})
        export_teacher(untrained_teacher(config), Path("var_d16.pth"), Path("vae_ch160v4096z32.pth"))
        Path("small.toml").write_text(tomli_w.dumps(SMALL))

    def __call__(self, command: str) -> None:
        program, *rest = shlex.split(command, comments=True)
        processes = nodes = 1
        if program == "torchrun":
            told = parse_args(rest)
            nodes, processes = int(told.nnodes.split(":")[-1]), 2
            assert told.module and int(told.nproc_per_node) > 1
            rest = [told.training_script.removeprefix("ddfast."), *told.training_script_args]
        name, *arguments = rest
        if name == "train":
            options = cli.parse(name, TrainConfig, arguments, "")
            arguments += DIGITS if options.recipe == "digits" else ["--config=small.toml"]
            run = (options.out, processes, nodes, repr(options.parallel))
            if run not in self.seen and not options.resume:
                shutil.rmtree(options.out, ignore_errors=True)
            self.seen.add(run)
        if name == "trajectories":
            arguments += ["--config=small.toml", "--count=8"]
        if name == "sample":
            arguments = [argument.replace("50000", "4") for argument in arguments]
        arguments = [argument.replace("cuda", "cpu") for argument in arguments]
        if processes == 1:
            assert in_this_process(self.cache, name, *arguments) == 0, command
        else:
            alone = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"} if nodes > 1 else {}
            launch(processes, succeed, self.cache, name, *arguments, **alone)


def succeed(cache: Path, *arguments: str) -> None:
    assert in_this_process(cache, *arguments) == 0, arguments


@pytest.mark.full
def test_commands_for_many_gpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path / "cache")
    run = Scaled(tmp_path / "cache")
    ran = execute("docs/scale.md", tmp_path, run)
    assert {command.split()[0] for command in ran} == {"ddfast", "torchrun"}
    assert any(command.startswith("ddfast plan ") for command in ran)
    assert len(list((tmp_path / "images").glob("*.png"))) == 16
    assert (tmp_path / "figures.json").exists()
    assert len(list((tmp_path / "runs" / "pairs" / "trajectories").glob("*.safetensors"))) == 2
    (tmp_path / "sampling").mkdir()
    monkeypatch.chdir(tmp_path / "sampling")
    for name in ("runs", "var_d16.pth", "vae_ch160v4096z32.pth"):
        Path(name).symlink_to(tmp_path / name)
    Path("var-dd").symlink_to(tmp_path / "runs" / "var-d16")
    assert execute("docs/sampling.md", Path(), run)
    assert len(list(Path("images").glob("*.png"))) == 4
    assert Path("codes.safetensors").exists()


@pytest.mark.full
def test_the_first_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDFAST_CACHE", str(tmp_path / "cache"))  # for the page's Python
    prepare(tmp_path / "cache")

    def run(command: str) -> None:
        program, name, *arguments = shlex.split(command)
        assert program == "ddfast"
        arguments += DIGITS if name == "train" else []
        assert in_this_process(tmp_path / "cache", name, *arguments) == 0, command

    assert execute("docs/first-run.md", Path(), run)
    table = (ROOT / "docs" / "first-run.md").read_text().split("\n| in `runs/digits`")[1].split("\n\n")[0]
    promised = [name for row in table.splitlines() for name in re.findall(r"`([\w.-]+)/?`", row.split("|")[1])]
    assert promised
    assert all((tmp_path / "runs" / "digits" / name).exists() for name in promised)
    assert all((tmp_path / name).exists() for name in ("one-step.png", "two-steps.png", "teacher.png"))


@pytest.mark.parametrize("module", ["ddfast.ops.nearest_code", "ddfast.ops.noise"])
def test_docstrings(module):
    # importlib: the package's attribute of that name is the function.
    result = doctest.testmod(importlib.import_module(module), extraglobs={"torch": __import__("torch")})
    assert result.attempted > 0
    assert result.failed == 0


PAGES = [path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_is_there(page):
    """Names with dots, and imports, of any block or sentence."""
    text = (ROOT / page).read_text()
    names = set(re.findall(r"(?<![\w.])ddfast(?:\.[a-zA-Z]\w*)+(?![\w/])", text))
    for module, imported in re.findall(r"from (ddfast[\w.]*) import ([\w, ]+)", text):
        names |= {f"{module}.{name.strip()}" for name in imported.split(",")}
    placeholders = {name for name in names if name.rpartition(".")[2].isupper()}  # ddfast.COMMAND
    for name in sorted(names - placeholders):
        assert found(name), name


def found(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    module, _, attribute = name.rpartition(".")
    try:
        importlib.import_module(name)
    except ImportError:
        return bool(module) and found(module) and hasattr(resolved(module), attribute)
    return True


def resolved(name: str) -> object:
    try:
        return importlib.import_module(name)
    except ImportError:
        module, _, attribute = name.rpartition(".")
        return getattr(resolved(module), attribute)
