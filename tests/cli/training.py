"""A training in several processes as the tests of faults run it, and what of it must not depend on interruptions."""

import json
import sys
from pathlib import Path

from commands import TINY, in_this_process

from ddfast.distill.tracking import METRICS
from ddfast.files import read_text

FEW = ["--evaluation.samples=100", "--evaluation.batch-sizes", "1"]

SIZES = {
    "dd1": [
        *TINY, *FEW,
        "--dd1.iterations=12", "--dd1.batch-size=16", "--dd1.log-every=5", "--dd1.checkpoint-every=2",
    ],
    "dd2": [
        *TINY, *FEW,
        "--method=dd2", "--init=stage1", "--dd2.head-width=16", "--dd2.head-depth=1",
        "--dd2.tune.source=store", "--dd2.tune.iterations=8", "--dd2.tune.batch-size=16", "--dd2.tune.log-every=5",
        "--dd2.tune.checkpoint-every=2",
        "--dd2.match.start-iterations=5", "--dd2.match.iterations=4", "--dd2.match.guidance-first=2",
        "--dd2.match.batch-size=16", "--dd2.match.log-every=5", "--dd2.match.checkpoint-every=2",
        "--dd2.match.watch-every=10",
    ],
}  # fmt: skip
"""Arguments by the method."""

TIMES = ("per_second", "seconds", "speedup")


def train(cache: Path, out: Path, method: str, *arguments: object) -> None:
    """`ddfast train` in this process, which ends with its exit code."""
    sys.exit(in_this_process(cache, "train", *SIZES[method], *arguments, "--out", out))


def made(out: Path) -> dict[str, object]:
    """What a finished run has made: weights as bytes, and figures without times."""
    found: dict[str, object] = {path.name: _weights(path) for path in sorted(out.glob("*.safetensors"))}
    found[METRICS] = [without_times(json.loads(line)) for line in read_text(out / METRICS).splitlines()]
    found["metrics.json"] = without_times(json.loads(read_text(out / "metrics.json")))
    return found


def leftovers(out: Path) -> list[str]:
    """Temporary files and checkpoints, of which a finished run has none."""
    return [path.name for path in out.rglob("*") if path.suffix == ".tmp" or path.name == "checkpoints"]


def different(out: Path, whole: Path) -> list[str]:
    """Names of what a run has made otherwise than an undisturbed one."""
    ours, theirs = made(out), made(whole)
    return sorted(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))


def _weights(path: Path) -> tuple[dict, bytes]:
    """A file's header without the run's folder, and its tensors."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    settings = header["__metadata__"]
    settings = {name: json.loads(value) if value.startswith("{") else value for name, value in settings.items()}
    for values in settings.values():
        if isinstance(values, dict):
            values.get("config", values).pop("out", None)
    return {**header, "__metadata__": settings}, data[8 + size :]


def without_times(values: dict) -> dict:
    """Figures without those that no two runs share."""
    return {
        name: without_times(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if not any(time in name for time in TIMES)
    }


if __name__ == "__main__":  # by torchrun
    train(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], *sys.argv[4:])
