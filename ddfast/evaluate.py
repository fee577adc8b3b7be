"""`ddfast evaluate`: quality and speed of a student, beside its teacher and the baselines."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ddfast import cli
from ddfast.config import EvaluationConfig
from ddfast.files import write_atomically
from ddfast.pipeline import evaluate, open_student
from ddfast.report import quality_table

EXAMPLES = """  python -m ddfast.evaluate --student runs/digits
  python -m ddfast.evaluate --student runs/digits --evaluation.samples 20000 --json evaluation.json"""


@dataclasses.dataclass(kw_only=True)
class EvaluateOptions:
    """What to measure.

    Attributes:
        student: folder of a training run.
        evaluation: how many samples, and which batch sizes are timed.
        json: file for the figures, in the form of metrics.json.
        device: where to run.
    """

    student: Path
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    json: Path | None = None
    device: str = "cpu"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""

    def body(rest: list[str]) -> None:
        options = cli.parse_plain("evaluate", EvaluateOptions, rest, EXAMPLES)
        config, teacher, student = open_student(options.student, options.device, cli.progress_bar("teacher"))
        config.evaluation = options.evaluation
        metrics = evaluate(config, teacher, student, cli.progress_bar("evaluation"))
        print("\n".join(quality_table(config, metrics)))
        if options.json:
            write_atomically(options.json, json.dumps(metrics, indent=2) + "\n")

    return cli.run("evaluate", body, arguments)


if __name__ == "__main__":
    sys.exit(main())
