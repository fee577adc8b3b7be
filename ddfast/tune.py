"""`ddfast tune`: which kernels are fastest on this GPU, at the shapes of a recipe; remembered for this machine."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

import torch

from ddfast import cli
from ddfast.config import PretrainedTeacherConfig, TrainConfig
from ddfast.errors import DDFastError
from ddfast.evaluation.workload import work
from ddfast.messages import note
from ddfast.models.loading import build_teacher, untrained_teacher
from ddfast.models.protocol import Teacher
from ddfast.ops import findings, tuning
from ddfast.progress import progress_bar
from ddfast.runs import check_device

EXAMPLES = """  python -m ddfast.tune --recipe llamagen-l
  python -m ddfast.tune --recipe var-d16 --teacher.weights var_d16.pth --tokenizer.weights vae.pth --samples 256"""


@dataclasses.dataclass(kw_only=True)
class TuneOptions(TrainConfig):
    """What to time.

    Attributes:
        samples: decoded at a time, and trained on.
        seconds: that the timing takes; verifying and compiling come before.
    """

    samples: int = 64
    seconds: float = 20.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""

    def body(rest: list[str]) -> None:
        options = cli.parse("tune", TuneOptions, rest, EXAMPLES)
        check_device(options.device)
        device = torch.device(options.device)
        if device.type != "cuda":
            raise DDFastError("tune compares kernels on a GPU: give --device cuda (a CPU has one kernel per op)")
        for name in ("samples", "seconds"):
            if not getattr(options, name) > 0:
                raise DDFastError(f"--{name}: got {getattr(options, name)}, expected a positive number")
        with tuning.recorded() as calls:
            work(teacher_of(options), options.samples)
        found = tuning.tune(calls, device, seconds=options.seconds)
        for name, timed in sorted(found.items()):
            print(f"{name}: {timed['order'][0]}, {timed['reason']}")
        print(f"kept in {findings.path()}; `ddfast doctor` shows it, and deleting the file undoes it")

    return cli.run("tune", body, arguments)


def teacher_of(options: TrainConfig) -> Teacher:
    """The recipe's teacher, or where its files are not given one of its sizes, whose distributions are flat."""
    if isinstance(options.teacher, PretrainedTeacherConfig) and not options.teacher.weights:
        note("no --teacher.weights: an untrained teacher keeps more codes than a trained one, and flows take longer")
        return untrained_teacher(options).to(options.device)
    return build_teacher(options, progress_bar("teacher"))


if __name__ == "__main__":
    sys.exit(main())
