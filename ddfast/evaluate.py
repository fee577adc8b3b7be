"""`ddfast evaluate`: quality and speed of a student, beside its teacher and the baselines."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from ddfast import cli, processes
from ddfast.config import ParallelConfig
from ddfast.errors import DDFastError
from ddfast.evaluation.protocol import evaluate
from ddfast.files import check_new, write_atomically
from ddfast.judging import EvaluateOptions, judge, without_effect
from ddfast.messages import say
from ddfast.models.llamagen.captions import give_captions
from ddfast.progress import progress_bar
from ddfast.report import quality_table
from ddfast.runs import check_device, open_student

EXAMPLES = """  python -m ddfast.evaluate --student runs/digits
  python -m ddfast.evaluate --student runs/digits --evaluation.samples 20000 --json evaluation.json
  python -m ddfast.evaluate --protocol adm --reference VIRTUAL_imagenet256_labeled.npz --inception weights.pth \\
    --student var-d16 --preset var-readme --json var-d16.json
  python -m ddfast.evaluate --protocol adm --reference VIRTUAL_imagenet256_labeled.npz --inception weights.pth \\
    --images samples.npz --beside var-d16.json
  python -m ddfast.evaluate --protocol adm --inception weights.pth --make-reference photos --to photos.npz"""


def _evaluate(options: EvaluateOptions, arguments: Sequence[str]) -> None:
    target, folder = options.json, options.student
    if folder is None:
        raise DDFastError("--student: missing; give the folder of a run, or --protocol with --images")
    if target:
        processes.first_does(lambda: check_new(target, "--json"))
    config, teacher, student = open_student(folder, options.device, progress_bar("teacher"), files=options.files)
    texts = options.captions or options.caption
    if texts:
        give_captions(teacher, texts, encoder=options.text_encoder, device=options.device)
    cli.overlay(config.evaluation, options.evaluation, "evaluation", arguments)
    metrics = evaluate(config, teacher, student, progress_bar("evaluation"))
    say("\n".join(quality_table(config, metrics, student)))
    if target:
        processes.first_does(lambda: write_atomically(target, json.dumps(metrics, indent=2) + "\n"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""

    def body(rest: list[str]) -> None:
        options = cli.parse_plain("evaluate", EvaluateOptions, rest, EXAMPLES)
        cli.check_effect(rest, without_effect(options))
        check_device(options.device)
        with processes.together(options.device, ParallelConfig().timeout):
            if options.judges:
                say("\n".join(judge(options, progress_bar)))
            else:
                _evaluate(options, rest)

    return cli.run("evaluate", body, arguments)


if __name__ == "__main__":
    sys.exit(main())
