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
from ddfast.ops import findings, native, tuning
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
        forget: what was timed on this GPU before, instead of timing.
    """

    samples: int = 64
    seconds: float = 20.0
    forget: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""

    def body(rest: list[str]) -> None:
        options = cli.parse("tune", TuneOptions, rest, EXAMPLES)
        check_device(options.device)
        if (device := torch.device(options.device)).type != "cuda":
            raise DDFastError("tune compares kernels on a GPU: give --device cuda (a CPU has one kernel per op)")
        for name in ("samples", "seconds"):
            if not getattr(options, name) > 0:
                raise DDFastError(f"--{name}: got {getattr(options, name)}, expected a positive number")
        if options.forget:
            return print(f"{findings.forget_orders(device)} orders forgotten, of {findings.path()}; verdicts stay")
        teacher = teacher_of(options)
        with tuning.recorded() as calls:
            for samples in sorted({1, options.samples}):  # one: what has kernels for few rows alone
                work(teacher, samples)
        found = tuning.tune(calls, device, seconds=options.seconds)
        for name, timed in sorted(found.items()):
            print(f"{name}: {timed['order'][0]}, {timed['reason']}")
        print("".join(f"Triton's {line}\n" for line in native.tile_remarks()), end="")
        if not found:
            print("nothing was timed: no op has two backends that are right here; `ddfast doctor` says why")
        elif found.keys() <= findings.orders_on_file(device).keys():
            print(f"kept in {findings.path()}; `ddfast doctor` shows it, `ddfast tune --forget` undoes it")

    return cli.run("tune", body, arguments)


def teacher_of(options: TrainConfig) -> Teacher:
    """The recipe's teacher, or where its files are not given one of its sizes, whose distributions are flat."""
    if isinstance(options.teacher, PretrainedTeacherConfig) and not options.teacher.weights:
        note("no --teacher.weights: an untrained teacher keeps more codes than a trained one, and flows take longer")
        return untrained_teacher(options).to(options.device)
    return build_teacher(options, progress_bar("teacher"))


if __name__ == "__main__":
    sys.exit(main())
