"""The proof that a change changed nothing: the same work under two revisions, and what it leaves compared bit by bit.

python benchmarks/compare_commits.py main HEAD
python benchmarks/compare_commits.py main HEAD --allow-header format --keep compared

Each revision is checked out into a work tree of its own and does the work below by its commands and `ddfast.hub` alone,
in one thread, with a cache of its own: it trains its own teacher. Five minutes each, on a core. Both run
under this interpreter and its compiled modules: a change to csrc/ or kernels/ is not seen. What measures time, the
commit and Chrome traces are not compared.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tomli_w
import tomllib
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

ROOT = Path(__file__).parents[1]
COMMANDS = ("train", "trajectories", "sample", "evaluate", "profile", "convert", "doctor")

# The work ----------------------------------------------------------------------------------------------------------

DIGITS = {
    "recipe": "digits",
    "tokenizer": {"iterations": 30, "warmup": 10, "batch_size": 64},
    "teacher": {"width": 32, "depth": 1, "heads": 2, "iterations": 20, "training_images": 500, "batch_size": 32},
    "trajectories": {"count": 150, "shard_size": 50, "batch_size": 50},
    "dd1": {"iterations": 20, "batch_size": 16, "warmup": 5, "log_every": 5},
    "dd2": {
        "head_width": 16, "head_depth": 1, "tune": {"iterations": 10, "batch_size": 16, "log_every": 5},
        "match": {
            "start_iterations": 6, "iterations": 4, "guidance_first": 3, "batch_size": 16, "log_every": 1,
            "watch_every": 6,
        },
    },
    "evaluation": {"samples": 150, "batch_size": 100, "batch_sizes": [1, 4]},
}  # fmt: skip
SMALL = {
    "tokenizer": {
        "num_codes": 16, "code_dim": 4, "channels": 32, "multipliers": [1, 1], "blocks": 1, "latent_channels": 32,
    },
    "trajectories": {"count": 24, "shard_size": 12, "batch_size": 12},
    "dd2": {
        "head_width": 16, "head_depth": 1,
        "adapt": {"iterations": 4, "fit_iterations": 2, "batch_size": 4, "log_every": 1},
        "tune": {"iterations": 4, "head_iterations": 2, "batch_size": 4, "log_every": 1},
        "match": {
            "iterations": 2, "guidance_updates": 2, "align_iterations": 1, "later_iterations": 1, "batch_size": 4,
            "log_every": 1, "watch_every": 4,
        },
    },
    "evaluation": {"samples": 100, "batch_size": 50, "batch_sizes": [1]},
}  # fmt: skip
STUDENT = {"iterations": 4, "batch_size": 6, "warmup": 1, "log_every": 1}
VAR = {
    "recipe": "var-d16", "teacher": {"random_weights": True, "depth": 2, "num_classes": 2, "patch_nums": [1, 2, 3]},
    "dd1": {"point": 2, "split": 1, **STUDENT}, **SMALL,
}  # fmt: skip
GPT = {"random_weights": True, "dim": 32, "n_layer": 2, "n_head": 2, "block_size": 9}
LLAMAGEN = {
    "recipe": "llamagen-b", "teacher": {"num_classes": 2, **GPT}, "dd1": {"point": 3, "split": 5, **STUDENT}, **SMALL,
}  # fmt: skip
TEXT = LLAMAGEN | {"recipe": "llamagen-xl-t2i", "teacher": {"cls_token_num": 6, "caption_dim": 8, **GPT}}
CONFIGS = {"digits": DIGITS, "var": VAR, "llamagen": LLAMAGEN, "text": TEXT}

HUB = """
import sys
from safetensors.torch import save_file
from ddfast.hub import Generator

run, folder = sys.argv[1:]
made = Generator.from_run(run)
made.save_pretrained(folder)
for name, generator in (("made", made), ("loaded", Generator.from_pretrained(folder))):
    images = {str(steps): generator.images([0, 1, 1], steps=steps, seed=5) for steps in (1, 2)}
    save_file(images, f"{folder}-images-{name}.safetensors")
"""


def work() -> Iterator[list[str]]:
    """What each revision does in its folder, command after command: arguments of the interpreter."""

    def command(name: str, text: str) -> list[str]:
        return ["-m", f"ddfast.{name}", *text.split()]

    for name in CONFIGS:
        yield command("train", f"--config {name}.toml --method dd1 --out {name}-dd1")
        start = "--init stage1" if name == "digits" else ""
        yield command("train", f"--config {name}.toml --method dd2 --out {name}-dd2 {start}")
        for run, steps in (("dd1", 0), ("dd1", 1), ("dd1", 2), ("dd2", 1), ("dd2", 2)):
            to = f"--format codes --to {name}-{run}-{steps}"
            yield command("sample", f"--student {name}-{run} --steps {steps} --count 7 --seed 3 {to}")
    start = "--init dd1:digits-dd1 --dd2.time=0.9"
    yield command("train", f"--config digits.toml --method dd2 {start} --out digits-from-dd1")
    yield command("trajectories", "--config digits.toml --count 60 --out pairs")
    yield command("trajectories", "--config digits.toml --count 130 --out pairs")
    solver = "--trajectories.store-noise --trajectories.solver=heun"
    yield command("trajectories", f"--config var.toml {solver} --out noise")
    for run in ("digits-dd1", "var-dd1", "llamagen-dd1"):
        settings = "--teacher-steps 2 --guidance.cfg-scale 1.7 --guidance.top-k 9 --guidance.top-p 0.9 --count 7"
        yield command("sample", f"--student {run} {settings} --point 1 --format codes --to {run}-teacher")
        yield command("sample", f"--student {run} --steps 2 --classes 1,0 --count 7 --format grid --to {run}-grid")
        yield command("sample", f"--student {run} --classes 0,1 --count 3 --format files --to {run}-files")
    for run in ("digits-dd1", "digits-dd2", "llamagen-dd1"):
        yield command("evaluate", f"--student {run} --evaluation.samples 120 --json {run}.json")
    for run in ("digits-dd1", "digits-dd2", "var-dd1", "var-dd2", "llamagen-dd1"):
        yield ["-c", HUB, run, f"{run}-hub"]
    for name, told in (("var", ""), ("llamagen", "--n-head 2 --block-size 9")):
        files = " ".join(f"--{part} {name}-official/{part}.pth" for part in ("teacher", "tokenizer", "student"))
        yield command("convert", f"--teacher {name}-dd1-hub --form official --to {name}-official")
        yield command("convert", f"{files} {told} --point 2 --split 1 --to {name}-again")
        yield command("sample", f"--student {name}-again --steps 2 --count 7 --format codes --to {name}-again-codes")
    yield command("profile", "--student var-dd1 --rounds 1 --evaluation.batch-sizes 1 --out traces/run")
    yield command("profile", "--config llamagen.toml --method dd2 --random-weights --rounds 1 --out traces/random")


def do_work(revision: str, folder: Path, logs: Path) -> dict[str, str]:
    """Do the work of a revision in a folder, with what it printed in `logs`; returns its commands' help texts."""
    folder.mkdir(parents=True)
    logs.mkdir(parents=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DDFAST_", "PYTHON"))}
    fixed = {"OMP_NUM_THREADS": "1", "DDFAST_CACHE": "cache", "HF_HUB_OFFLINE": "1", "COLUMNS": "120", "NO_COLOR": "1"}
    for name, config in CONFIGS.items():
        (folder / f"{name}.toml").write_text(tomli_w.dumps(config))
    with tempfile.TemporaryDirectory() as temporary:
        tree = Path(temporary) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), revision], check=True)

        def call(number: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
            environment = {**kept, **fixed, "PYTHONPATH": str(tree)}
            called = [sys.executable, *arguments]
            done = subprocess.run(called, cwd=folder, env=environment, capture_output=True, text=True)
            what = " ".join("HUB" if argument == HUB else argument for argument in arguments)
            text = f"{what}\n\n{done.stdout}\n{done.stderr}\nexit code {done.returncode}\n"
            (logs / f"{number:03d}.txt").write_text(text)
            codes[what] = done.returncode
            if done.returncode:
                print(f"exit code {done.returncode}: {what}: {logs}/{number:03d}.txt", flush=True)
            return done

        codes: dict[str, int] = {}
        try:
            where = call(0, ["-c", "import ddfast; print(ddfast.__file__)"]).stdout.strip()
            assert Path(where).is_relative_to(tree.resolve()), f"{where} is not of revision {revision}"
            for number, arguments in enumerate(work(), 1):
                call(number, arguments)
            (folder / "exit-codes.json").write_text(json.dumps(codes, indent=2))
            return {name: call(900, ["-m", "ddfast", name, "--help"]).stdout for name in COMMANDS}
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


# The comparison ----------------------------------------------------------------------------------------------------

TIME = re.compile(r"seconds|speedup|per_second|pairs_per_s|gpu_utilisation|peak_memory")
NOT_COMPARED = {"trace.json"}


class Compared(NamedTuple):
    """Of a class of artefacts: how many were compared, and what differs."""

    count: int
    differences: list[str]


def compare(before: Path, after: Path, allowed: frozenset[str] = frozenset()) -> dict[str, Compared]:
    """All files of two folders, entry by entry, but the keys `allowed` of safetensors headers."""
    names = [
        {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        for folder in (before, after)
    ]
    found = {"file names": Compared(len(names[0] | names[1]), [])}
    for name in sorted(names[0].keys() ^ names[1].keys()):
        found["file names"].differences.append(f"{name}: only {'before' if name in names[0] else 'after'}")
    for name in sorted(names[0].keys() & names[1].keys()):
        if Path(name).name in NOT_COMPARED:
            continue
        contents = [READERS.get(Path(name).suffix, lines)(folder[name]) for folder in names]
        for kind in contents[0]:
            ours, theirs = (content[kind] for content in contents)
            keys = (ours.keys() | theirs.keys()) - (allowed if kind == "safetensors headers" else set())
            count, differences = found.get(kind, Compared(0, []))
            for key in sorted(keys):
                if not (key in ours and key in theirs):
                    differences.append(f"{name}: {key}: only {'before' if key in ours else 'after'}")
                elif told := difference(ours[key], theirs[key]):
                    differences.append(f"{name}: {key}: {told}")
            found[kind] = Compared(count + len(keys), differences)
    return found


def difference(before: Any, after: Any) -> str:
    """What differs between two entries, in words; empty: nothing. Tensors are compared bit by bit."""
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return "" if repr(before) == repr(after) else f"{before!r:.120} became {after!r:.120}"
    if before.dtype != after.dtype or before.shape != after.shape:
        kinds = (f"{str(one.dtype).removeprefix('torch.')} {list(one.shape)}" for one in (before, after))
        return " became ".join(kinds)
    bits = [one.contiguous().view(-1).view(torch.uint8).view(one.numel(), -1) for one in (before, after)]
    count = int((bits[0] != bits[1]).any(-1).sum()) if before.numel() else 0
    most = (before.double() - after.double()).abs().max() if count else 0.0
    return f"{count} of {before.numel()} numbers, by at most {most:.3g}" if count else ""


Entries = dict[str, dict[str, Any]]
"""Of a file: class of artefact -> key -> what is compared."""


def tensors(path: Path) -> Entries:
    """A safetensors file: its tensors, and the keys of its header."""
    with safe_open(path, framework="pt") as file:
        values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
        header: dict[str, Any] = dict(file.metadata() or {})
        if "config" in header:
            header["config"] = json.loads(header["config"])
        return {"safetensors tensors": values, "safetensors headers": flat(header)}


def pickled(path: Path) -> Entries:
    """A PyTorch checkpoint."""
    return {"pth entries": flat(torch.load(path, weights_only=True))}


def pixels(path: Path) -> Entries:
    """A picture."""
    with Image.open(path) as picture:
        return {"png pictures": {"pixels": torch.from_numpy(np.array(picture)), "mode": picture.mode}}


def figures(path: Path) -> Entries:
    """A JSON file; of stages.json every figure is a time."""
    known = path.name in ("config.json", "manifest.json", "metrics.json")
    timed = "seconds" if path.name == "stages.json" else ""
    return {path.name if known else "other .json": flat(read_json(path), timed)}


def losses(path: Path) -> Entries:
    """A file with a JSON object in every line."""
    made = (json.loads(line) for line in path.read_text().splitlines())
    return {path.name: flat({f"line {number}": line for number, line in enumerate(made, 1)})}


def settings(path: Path) -> Entries:
    """A TOML file."""
    return {".toml settings": flat(tomllib.loads(path.read_text()))}


def lines(path: Path) -> Entries:
    """A text, line by line."""
    made = untimed(path.read_text()).splitlines()
    return {f"{path.suffix or 'other'} lines": {f"line {number}": line for number, line in enumerate(made, 1)}}


def page(path: Path) -> Entries:
    """A report, line by line; of a line that measures time, that it is there."""
    made = untimed(path.read_text()).splitlines()
    told = enumerate(("a time" if "data-time" in line else line for line in made), 1)
    return {".html lines": {f"line {number}": line for number, line in told}}


READERS: dict[str, Callable[[Path], Entries]] = {
    ".safetensors": tensors, ".pth": pickled, ".png": pixels, ".json": figures, ".jsonl": losses,
    ".toml": settings, ".html": page,
}  # fmt: skip


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text())


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested tables and lists as {"a.b.0": value}; of what measures time, that it is there."""
    if isinstance(value, (dict, list)) and value:
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: one for part, inner in parts for key, one in flat(inner, f"{name}.{part}".lstrip(".")).items()}
    if TIME.search(name):
        return {name: "a time"}
    return {name: untimed(value) if isinstance(value, str) else value}


def untimed(text: str) -> str:
    """A text without the commit, and the times of its sentences and tables."""
    text = re.sub(r"[\d.]+(?= ms/image| s\b)", "_", text)
    text = re.sub(r"(, commit )\S+", r"\1_", text)
    made, hidden = [], []
    for line in text.splitlines():
        cells = line.split("|")
        if not line.startswith("|"):
            hidden = []
            line = re.sub(r"[\d.]+", "_", line) if line.startswith("- seconds per stage") else line
        elif not hidden:
            hidden = [bool(re.match(r" (ms/image|with image decoding|speed-up)", cell)) for cell in cells]
        else:
            line = "|".join("_" if hide else cell for cell, hide in zip(cells, hidden, strict=True))
        made.append(line)
    return "\n".join(made)


def main() -> int:
    """Compare two revisions; the exit code is 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before")
    parser.add_argument("after")
    parser.add_argument("--keep", type=Path, help="new folder for what was made and printed; default: a temporary one")
    parser.add_argument("--allow-header", action="append", default=[], metavar="KEY", help="of a safetensors header")
    options = parser.parse_args()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="compare-commits-"))
    helps = []
    for side in (sides := ("before", "after")):
        started = time.monotonic()
        helps.append(do_work(getattr(options, side), folder.resolve() / side, folder.resolve() / f"{side}-logs"))
        print(f"{side}: {getattr(options, side)}, {time.monotonic() - started:.0f} s", flush=True)
    found = compare(folder / "before", folder / "after", frozenset(options.allow_header))
    for kind, (count, differences) in found.items():
        print(f"{kind}: {count} compared, {len(differences)} differ", *differences, sep="\n    ")
    changed = [name for name in COMMANDS if helps[0][name] != helps[1][name]]
    print(f"help texts, for information: {len(COMMANDS)} compared, {len(changed)} differ")
    for name in changed:
        texts = [one[name].splitlines() for one in helps]
        told = [line for line in difflib.ndiff(*texts) if line[0] in "+-"]
        print(f"    ddfast {name} --help", *told, sep="\n    ")
    failed = [what for side in sides for what, code in read_json(folder / side / "exit-codes.json").items() if code]
    different = sum(len(one.differences) for one in found.values())
    if not failed and not different and not options.keep:
        shutil.rmtree(folder)
    print(f"{different} differences, {len(failed)} failed commands", "" if not folder.exists() else f"(see {folder})")
    return int(bool(failed or different))


if __name__ == "__main__":
    sys.exit(main())
