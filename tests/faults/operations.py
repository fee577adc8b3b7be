"""What ddfast does to files, each as a function of two folders: `base` has what is there before, `work` the result.

Sizes take a second. They run in processes forked by injection.py.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from commands import TINY, in_this_process
from commands import prepare as prepare_cache
from injection import CLOCK, MEMORY, NOTHING, REMOVE, Fault, Server
from training import SIZES, without_times

from ddfast import cli, pipeline
from ddfast.config import update
from ddfast.distill.tracking import METRICS
from ddfast.hub import Generator
from ddfast.models.digits import classifier
from ddfast.models.loading import build_teacher
from ddfast.ops import findings
from ddfast.recipes import get_recipe
from ddfast.runs import LOCK, METRICS_JSON, PAGE, PICTURES, REPORT, STAGES, THROUGHPUT

_FEW = ["--evaluation.samples=100", "--evaluation.paths=0", "--evaluation.batch-sizes", "1"]


def command(base: str, *arguments: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "_ITERATIONS", 3)  # as `prepare` makes it
        return in_this_process(Path(base) / "cache", *arguments)


def train(base: str, work: str, method: str) -> int:
    """`ddfast train` up to the student."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "evaluate", lambda *_: {})
        for name in ("write_pictures", "write_report", "quality_table"):
            patch.setattr(pipeline, name, lambda *_: [])
        return command(base, "train", *SIZES[method], "--out", f"{work}/run")


def pairs(base: str, work: str) -> int:
    return command(base, "trajectories", *TINY, "--out", f"{work}/run")


def dd1(base: str, work: str) -> int:
    return train(base, work, "dd1")


def dd2(base: str, work: str) -> int:
    return train(base, work, "dd2")


def report(base: str, work: str) -> int:
    return command(base, "train", *SIZES["dd1"], *_FEW, "--out", f"{work}/run")


def evaluate(base: str, work: str) -> int:
    return command(base, "evaluate", "--student", f"{base}/run", *_FEW, "--json", f"{work}/evaluation.json")


def convert(base: str, work: str) -> int:
    return command(base, "convert", "--teacher", f"{base}/hub", "--to", f"{work}/converted")


def _sample(base: str, work: str, form: str, target: str) -> int:
    settings = [
        "--student",
        f"{base}/run",
        "--count",
        24,
        "--batch-size",
        8,
        "--format",
        form,
        "--to",
        f"{work}/{target}",
    ]
    return command(base, "sample", *settings)


def sample_codes(base: str, work: str) -> int:
    return _sample(base, work, "codes", "codes.safetensors")


def sample_npz(base: str, work: str) -> int:
    return _sample(base, work, "npz", "samples.npz")


def sample_files(base: str, work: str) -> int:
    return _sample(base, work, "files", "images")


def sample_grid(base: str, work: str) -> int:
    return _sample(base, work, "grid", "grid.png")


def hub_save(base: str, work: str) -> int:
    def body(rest: list[str]) -> None:
        Generator.from_run(f"{base}/run").save_pretrained(f"{work}/hub")

    return _library(base, body)


def hub_load(base: str, work: str) -> int:
    """And what the generator makes, in a file."""

    def body(rest: list[str]) -> None:
        codes = Generator.from_pretrained(f"{base}/hub").codes([1, 2, 3], seed=4)
        Path(work, "codes.json").write_text(json.dumps(codes.tolist()))

    return _library(base, body)


def teacher_cache(base: str, work: str) -> int:
    """The digits teacher, trained on first use: into a cache of its own."""

    def body(rest: list[str]) -> None:
        config = get_recipe("digits")
        update(config.tokenizer, {"iterations": 4, "warmup": 1, "batch_size": 16, "width": 8})
        update(config.teacher, {"width": 16, "depth": 1, "iterations": 4, "training_images": 100, "batch_size": 16})
        build_teacher(config)

    return _library(work, body)


def verdicts(base: str, work: str) -> int:
    """The table of what was found about a GPU's kernels."""

    def body(rest: list[str]) -> None:
        for number in range(3):
            findings.add(torch.device("cuda", 0), "verdicts", {f"op {number}": [True, "right"]})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(findings, "identity", lambda index: {"gpu": "any"})
        return _library(work, body)


def _library(cache: str, body: Callable[[list[str]], None]) -> int:
    """A use of the library; what ends it is said as a command says it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDFAST_CACHE", f"{cache}/cache")
        torch.set_num_threads(1)
        return cli.run("library", body, [])


@dataclass(frozen=True, kw_only=True)
class Operation:
    """What is done, and to what.

    Attributes:
        title: in the table.
        function: of this module, by its name.
        start: folders and files of `base` that are in `work` before it, by their new names.
        again: whether the same call goes on, or says that all is there; else it refuses what is there.
        keeps: whether what was done before a fault is kept, and the same call does the rest alone.
        optional: whether it goes on without what cannot be written, and warns.
        never: kinds of events that it does not have (or the test alone has).
    """

    title: str
    function: str
    start: Mapping[str, str] = field(default_factory=dict)
    again: bool = True
    keeps: bool = False
    optional: bool = False
    never: int = 0

    def meets(self, fault: Fault) -> bool:
        """Whether a fault can come while it is done."""
        return bool(fault.kinds & ~self.never)


OPERATIONS = {
    operation.function: operation
    for operation in (
        Operation(title="make pairs", function="pairs", keeps=True, never=CLOCK | REMOVE),
        Operation(title="train DD1", function="dd1", keeps=True, start={"run/trajectories": "run/trajectories"}),
        Operation(title="train DD2", function="dd2", keeps=True, start={"run/trajectories": "run/trajectories"}),
        Operation(title="judge a run", function="report", keeps=True, start={"done": "run"}, never=REMOVE),
        Operation(title="evaluate", function="evaluate", again=False, never=REMOVE),
        Operation(title="convert", function="convert", again=False, never=CLOCK | REMOVE),
        Operation(title="sample codes", function="sample_codes", again=False, keeps=True, never=CLOCK),
        Operation(title="sample npz", function="sample_npz", again=False, keeps=True, never=CLOCK),
        Operation(title="sample files", function="sample_files", keeps=True, never=CLOCK),
        Operation(title="sample a grid", function="sample_grid", again=False, never=CLOCK | REMOVE),
        Operation(title="hub save", function="hub_save", never=CLOCK),
        Operation(title="hub load", function="hub_load", never=~MEMORY),
        Operation(title="cached teacher", function="teacher_cache", never=REMOVE),
        Operation(title="kernels' verdicts", function="verdicts", optional=True, never=CLOCK | REMOVE),
    )
}
"""All that write, by their function."""


def prepare(base: str) -> int:
    """What is there before: a cache, a finished run of DD1 ("done": without its report), a hub folder."""
    folder = Path(base)
    prepare_cache(folder / "cache")
    code = train(base, base, "dd1")
    if code == 0:
        (folder / "run" / METRICS_JSON).unlink()  # of no figures
        shutil.copytree(folder / "run", folder / "done")
        code = hub_save(base, base)
    return code


VOLATILE = {STAGES, PAGE, REPORT, PICTURES, "README.md"}
"""Files with times in them, or pictures of them."""

IGNORED = {LOCK, "kernels.lock", THROUGHPUT}
"""Files that nothing depends on."""


def result(work: Path) -> dict[str, str]:
    """What is in a folder, by the name: a digest of what does not depend on times and on the folder's own name."""
    found = {}
    for path in sorted(work.rglob("*")):
        if not path.is_file() or path.name in IGNORED:
            continue
        name, data = str(path.relative_to(work)), path.read_bytes()
        if path.name in VOLATILE:
            data = b"there" if data else b""
        elif path.name.endswith(("metrics.json", "evaluation.json", "kernels.json")):
            data = json.dumps(without_times(json.loads(data)), sort_keys=True).encode()
        elif path.name == METRICS:
            lines = [without_times(json.loads(line)) for line in data.splitlines()]
            data = json.dumps(lines, sort_keys=True).encode()
        else:
            data = data.replace(str(work).encode(), b"")
        found[name] = hashlib.sha256(data).hexdigest()[:16]
    return found


def each(*quick: str) -> list:
    """Every operation as a parameter of a test; `make test` has those named."""
    return [
        pytest.param(operation, id=name, marks=() if name in quick else pytest.mark.full)
        for name, operation in OPERATIONS.items()
    ]


def start(operation: Operation, base: Path, work: Path) -> Path:
    """A folder with what is there before the operation."""
    work.mkdir(parents=True)
    for source, name in operation.start.items():
        shutil.copytree(base / source, work / name)
    return work


def run(server: Server, operation: Operation, base: Path, work: Path, fault: Fault = NOTHING, at: int = 0):
    return server.run(f"operations:{operation.function}", base, work, below=work, fault=fault, at=at)


class Undisturbed:
    """Results of operations, and how many events each has; made when first asked for."""

    def __init__(self, server: Server, base: Path, root: Path) -> None:
        self.server, self.base, self.root = server, base, root
        self.results: dict[str, dict[str, str]] = {}
        self.events: dict[tuple[str, int], int] = {}

    def of(self, operation: Operation) -> dict[str, str]:
        if operation.function not in self.results:
            work = start(operation, self.base, self.root / operation.function)
            ended = run(self.server, operation, self.base, work)
            assert ended.code == 0, ended.errors
            self.results[operation.function] = result(work)
        return self.results[operation.function]

    def count(self, operation: Operation, kinds: int) -> int:
        """Events of some kinds."""
        key = operation.function, kinds
        if key not in self.events:
            fault = Fault(name="counted", what=0, kinds=kinds)
            work = start(operation, self.base, self.root / f"{operation.function}-{kinds}")
            self.events[key] = run(self.server, operation, self.base, work, fault).events
        return self.events[key]
