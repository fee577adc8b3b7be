"""`ddfast evaluate`: quality and speed of a student, beside its teacher and the baselines."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ddfast import cli, processes
from ddfast.config import EvaluationConfig, ParallelConfig
from ddfast.evaluation.protocol import evaluate
from ddfast.files import check_new, write_atomically
from ddfast.messages import say
from ddfast.models.llamagen.captions import give_captions
from ddfast.progress import progress_bar
from ddfast.report import quality_table
from ddfast.runs import check_device, open_student

EXAMPLES = """  python -m ddfast.evaluate --student runs/digits
  python -m ddfast.evaluate --student runs/digits --evaluation.samples 20000 --json evaluation.json"""


@dataclasses.dataclass(kw_only=True)
class EvaluateOptions:
    """What to measure.

    Attributes:
        student: folder of a training run.
        evaluation: how many samples, and which batch sizes are timed; default: the run's.
        captions: for a text model: file with features, with a caption in every line, or COCO's JSON.
        json: file for the figures, in the form of metrics.json.
        device: where to run.
    """

    student: Path
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    captions: Path | None = None
    json: Path | None = None
    device: str = "cpu"


def _evaluate(options: EvaluateOptions, arguments: Sequence[str]) -> None:
    target = options.json
    if target:
        processes.first_does(lambda: check_new(target, "--json"))
    config, teacher, student = open_student(options.student, options.device, progress_bar("teacher"))
    if options.captions:
        give_captions(teacher, options.captions, device=options.device)
    cli.overlay(config.evaluation, options.evaluation, "evaluation", arguments)
    metrics = evaluate(config, teacher, student, progress_bar("evaluation"))
    say("\n".join(quality_table(config, metrics, student)))
    if target:
        processes.first_does(lambda: write_atomically(target, json.dumps(metrics, indent=2) + "\n"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""

    def body(rest: list[str]) -> None:
        options = cli.parse_plain("evaluate", EvaluateOptions, rest, EXAMPLES)
        check_device(options.device)
        with processes.together(options.device, ParallelConfig().timeout):
            _evaluate(options, rest)

    return cli.run("evaluate", body, arguments)


if __name__ == "__main__":
    sys.exit(main())
