"""`ddfast profile`: AR decoding against one and two steps, with NVTX ranges, a Chrome trace and Nsight commands."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from ddfast import cli
from ddfast.config import TrainConfig
from ddfast.distill.stages import untrained_student
from ddfast.errors import DDFastError
from ddfast.evaluation.profiling import profile
from ddfast.models.llamagen.captions import give_captions
from ddfast.models.loading import untrained_teacher
from ddfast.progress import progress_bar
from ddfast.report import command_line
from ddfast.runs import check_device, open_student

EXAMPLES = """  python -m ddfast.profile --recipe digits --random-weights
  python -m ddfast.profile --student runs/digits --evaluation.batch-sizes 1 16 64 256"""


_NOT_OF_A_RUN = ("out", "device", "evaluation", "resume", "init")
_OF_A_RUN = ("config", *(field.name for field in dataclasses.fields(TrainConfig) if field.name not in _NOT_OF_A_RUN))


@dataclasses.dataclass(kw_only=True)
class ProfileOptions(TrainConfig):
    """What to time; the trace and the table go to OUT.

    Attributes:
        student: folder of a training run.
        captions: for a text student of `ddfast convert`: file with features or texts, as `ddfast sample` takes it.
        random_weights: time untrained networks of the recipe's sizes instead.
        rounds: repetitions of every measurement; fewer of what takes more than 20 seconds in all.
    """

    student: Path | None = None
    captions: Path | None = None
    random_weights: bool = False
    rounds: int = 7


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""

    def body(rest: list[str]) -> None:
        options = cli.parse("profile", ProfileOptions, rest, EXAMPLES)
        check_device(options.device)
        if options.rounds < 1:
            raise DDFastError(f"--rounds: got {options.rounds}, expected at least 1")
        ignored = dict.fromkeys(("resume", "init"), "there is nothing to resume or to start")
        if not options.student:
            ignored["captions"] = "untrained networks have their own"
        else:
            ignored |= dict.fromkeys((*_OF_A_RUN, "random-weights"), "--student says it")
        cli.check_effect(rest, ignored)
        if options.random_weights:
            teacher = untrained_teacher(options).to(options.device)
            student = untrained_student(options, teacher)
        elif options.student:
            _, teacher, student = open_student(options.student, options.device, progress_bar("teacher"))
            if options.captions:
                give_captions(teacher, options.captions, device=options.device)
        else:
            raise DDFastError("give --student DIR, or --random-weights to time untrained networks")
        shown, command = progress_bar("speed"), command_line("profile")
        lines = profile(options, teacher, student, options.out, command=command, rounds=options.rounds, progress=shown)
        print("\n".join(lines))

    return cli.run("profile", body, arguments)


if __name__ == "__main__":
    sys.exit(main())
